"""Residual blocks: what is added to what, and where normalization stands."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """relu(shortcut(x) + BN conv relu BN conv x), with two 3x3 convolutions.

    The shortcut is the identity, or a 1x1 convolution with BN where the shape changes (option B).

    Source: He et al. 2016 (arXiv 1512.03385), fig. 2 and sec. 3.3.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.shortcut(x) + self.branch(x))


class PreActivationBlock(nn.Module):
    """x + conv relu BN conv relu BN x, or with SkipInit x + α · conv relu conv relu x, where α starts at 0.

    Where the shape changes, x is replaced by a 1x1 convolution of the first activation. With SkipInit convolutions have
    biases (ours), since no normalization shifts their outputs.

    Source: Zagoruyko and Komodakis 2016 (arXiv 1605.07146), fig. 1c; De and Smith 2020 (arXiv 2002.10444) for SkipInit.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, *, skipinit: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(normalization(c_in, skipinit), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=skipinit),
            normalization(c_out, skipinit),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=skipinit),
            Scale() if skipinit else nn.Identity(),
        )
        self.shortcut: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=skipinit)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enter(x)
        return (x if self.shortcut is None else self.shortcut(a)) + self.branch(a)


class Scale(nn.Module):
    """One number α that multiplies a residual branch and starts at 0, so that the block starts as its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x


def normalization(channels: int, skipinit: bool) -> nn.Module:
    """Batch normalization, or nothing where SkipInit replaces it."""
    return nn.Identity() if skipinit else nn.BatchNorm2d(channels)
