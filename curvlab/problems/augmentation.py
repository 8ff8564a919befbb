"""Batches of randomly cropped and mirrored images, for training only; hides how the draws are keyed, so that runs resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batches import Batches
from ..linalg.probes import generator
from ..objective import Objective

PADDING = 4


@dataclass(frozen=True)
class Augmented:
    """The batches of an objective's images, each image cropped and mirrored anew: batches of data, as `train` takes them.

    An image is padded by 4 zeros on each side (after standardization by channel that is the mean colour), cropped to its
    size at one of 9 x 9 places, and mirrored with probability 1/2. The draws depend on the seed of the batches and on the
    step alone, so a resumed run sees the same images. The objective keeps the images as they are: what is measured of L
    stays a function of w; penalties and norms of micro-batches are those of the augmented batch that is trained on.

    Raises:
        ValueError: examples that are not images (n, channels, height, width).

    Example:
        >>> from curvlab.problems import model, synthetic_images
        >>> L = Objective(model("cnn6", "small", shape=(3, 8, 8)), "cross_entropy", synthetic_images(8, shape=(3, 8, 8))[0])
        >>> x, y = next(iter(Augmented(L, Batches(8, 4, steps=2))))
        >>> x.shape, y.shape
        (torch.Size([4, 3, 8, 8]), torch.Size([4]))
    """

    L: Objective
    batches: Batches

    def __post_init__(self) -> None:
        x = self.L.examples.first(1)[1][0]
        if x.ndim != 4:
            raise ValueError(
                f"augment crops and mirrors images, but an example has shape {tuple(x.shape[1:])}; expected (channels, "
                "height, width). Leave --augment out, or choose a data set of images"
            )

    @property
    def batch_size(self) -> int:
        return self.batches.batch_size

    @property
    def replacement(self) -> bool:
        return self.batches.replacement

    @property
    def steps(self) -> int:
        return self.batches.steps

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return self.since(0)

    def since(self, step: int) -> Iterator[Any]:
        """The batches of steps `step`, `step` + 1, ...: exactly those that the whole iteration has there."""
        for k, index in enumerate(self.batches.since(step), step):
            (piece,) = self.L.pieces(index)
            x, y = piece.batch
            yield cropped(x, *draws(len(x), generator(self.batches.seed, k, "augmentation"))), y

    def describe(self) -> dict[str, Any]:
        """What a run's configuration says of them."""
        return {
            **self.batches.describe(),
            "augment": f"crops after padding by {PADDING}, mirrored with probability 1/2",
        }


def draws(count: int, generator: torch.Generator, padding: int = PADDING) -> tuple[Tensor, Tensor]:
    """Corners (count, 2) of crops, uniform over 0 to 2·padding in both directions, and who is mirrored (count,)."""
    corners = torch.randint(2 * padding + 1, (count, 2), generator=generator)
    return corners, torch.rand(count, generator=generator) < 0.5


def cropped(x: Tensor, corners: Tensor, mirrored: Tensor, padding: int = PADDING) -> Tensor:
    """Images (n, channels, height, width) padded with zeros, cropped from these corners, and mirrored left to right."""
    n, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    rows = corners[:, :1] + torch.arange(height)
    columns = corners[:, 1:] + torch.where(mirrored[:, None], torch.arange(width).flip(0), torch.arange(width))
    rows, columns = rows.to(x.device), columns.to(x.device)
    each = torch.arange(n, device=x.device)[:, None, None]
    return padded.movedim(1, -1)[each, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
