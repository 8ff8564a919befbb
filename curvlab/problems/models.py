"""Fully connected and small models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import nn

from .initialization import Size, check_widths, choose, he, seeded

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
}


def mlp(
    widths: Sequence[int] = (64, 64, 64, 10),
    activation: str = "tanh",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """A fully connected network (B, widths[0]) -> (B, widths[-1]) with PyTorch's default initialisation.

    Args:
        widths: inputs, hidden layers, outputs; at least two numbers.
        activation: between the layers: "tanh", "relu", "gelu", "elu" or "silu".
        seed: draws the parameters; the global generator stays where it is.
        dtype: of the parameters, drawn in float32 and then converted, so both precisions start alike.

    Raises:
        ValueError: ``activation`` is not one of the names, or ``widths`` is not two or more positive numbers.

    >>> sum(p.numel() for p in mlp((64, 8, 10)).parameters())
    610
    """
    if activation not in ACTIVATIONS:
        choices = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation is {activation!r}, expected one of {choices}. Pass one of these names.")
    check_widths(widths, at_least=2)
    layers: list[nn.Module] = []
    with seeded(seed):
        for d_in, d_out in pairwise(widths):
            layers += [nn.Linear(d_in, d_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def mlp_3x4096(
    size: Size = "full",
    *,
    shape: Sequence[int] = (1, 28, 28),
    num_classes: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Smith's network for Fashion-MNIST: three relu layers of width 4096 and a linear head, inputs flattened.

    36.8M parameters at 28x28 inputs. The initialization, of which the paper says nothing, is PyTorch's default (ours).

    Args:
        size: "full", or "small": width 64 (ours), 59k parameters.
        shape: of one input; the network sees its numbers in a row.
        num_classes: number of outputs.
        seed: draws the parameters; the global generator stays where it is.
        dtype: of the parameters, drawn in float32 and then converted, so both precisions start alike.

    Raises:
        ValueError: ``size`` is neither "full" nor "small", or a number is not positive.

    Source: Smith et al. 2021 (arXiv 2101.12176), appendix D.

    >>> mlp_3x4096("small")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    width = choose(size, full=4096, small=64)
    return nn.Sequential(
        nn.Flatten(), *mlp((prod(shape), width, width, width, num_classes), "relu", seed=seed, dtype=dtype)
    )


def cnn(
    widths: Sequence[int] = (8, 8, 8, 16, 16, 16),
    *,
    num_classes: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """A relu network of 3x3 convolutions for 8x8 images, (B, 1, 8, 8) or flat (B, 64) -> (B, num_classes).

    Average pooling after the second and the fourth convolution, global average pooling, a linear head.
    Weights are normal with variance 2/fan_in (He et al. 2015, arXiv:1502.01852, eq. 10), 1/fan_in in the
    head, which no relu follows; biases are zero.

    Args:
        widths: channels of each convolution.
        num_classes: number of outputs.
        seed: draws the parameters; the global generator stays where it is.
        dtype: of the parameters, drawn in float32 and then converted, so both precisions start alike.

    Raises:
        ValueError: ``widths`` is empty, or one of the numbers is not positive.

    >>> cnn()(torch.zeros(3, 64)).shape
    torch.Size([3, 10])
    """
    check_widths((*widths, num_classes), at_least=2)
    layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (1, 8, 8))]
    with seeded(seed):
        for i, (c_in, c_out) in enumerate(pairwise((1, *widths)), start=1):
            layers += [he(nn.Conv2d(c_in, c_out, 3, padding=1)), nn.ReLU()]
            if i in (2, 4):
                layers.append(nn.AvgPool2d(2))
        head = he(nn.Linear(widths[-1], num_classes))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).to(dtype)


def linear(d_in: int, d_out: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear map (B, d_in) -> (B, d_out) without bias that starts at zero.

    Args:
        d_in: number of inputs.
        d_out: number of outputs.
        seed: has no effect, nothing is drawn; every model takes one.
        dtype: of the weight.

    Raises:
        ValueError: ``d_in`` or ``d_out`` is not positive.

    >>> linear(3, 1)(torch.ones(2, 3)).tolist()
    [[0.0], [0.0]]
    """
    check_widths((d_in, d_out), at_least=2)
    with seeded(seed):  # nn.Linear draws a weight before it can be set to zero
        model = nn.Linear(d_in, d_out, bias=False, dtype=dtype)
    nn.init.zeros_(model.weight)
    return model
