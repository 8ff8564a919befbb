"""Small models; hides how they are initialised from a seed without moving the global random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

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
    _check_widths(widths, at_least=2)
    layers: list[nn.Module] = []
    with _seeded(seed):
        for d_in, d_out in pairwise(widths):
            layers += [nn.Linear(d_in, d_out, dtype=torch.float32), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1]).to(dtype)


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
    _check_widths((*widths, num_classes), at_least=2)
    layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (1, 8, 8))]
    with _seeded(seed):
        for i, (c_in, c_out) in enumerate(pairwise((1, *widths)), start=1):
            layers += [_he(nn.Conv2d(c_in, c_out, 3, padding=1, dtype=torch.float32), "relu"), nn.ReLU()]
            if i in (2, 4):
                layers.append(nn.AvgPool2d(2))
        head = _he(nn.Linear(widths[-1], num_classes, dtype=torch.float32), "linear")
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
    _check_widths((d_in, d_out), at_least=2)
    with _seeded(seed):  # nn.Linear draws a weight before it can be set to zero
        model = nn.Linear(d_in, d_out, bias=False, dtype=dtype)
    nn.init.zeros_(model.weight)
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # torch.manual_seed would also seed the GPUs, which fork_rng(devices=[]) does not restore; and under
    # another default device the draws would come from that device's generator.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _he(layer: nn.Conv2d | nn.Linear, nonlinearity: Literal["relu", "linear"]) -> nn.Module:
    nn.init.kaiming_normal_(layer.weight, nonlinearity=nonlinearity)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _check_widths(widths: Sequence[int], *, at_least: int) -> None:
    if len(widths) < at_least or min(widths) < 1:
        raise ValueError(
            f"layer widths are {tuple(widths)}, expected {at_least} or more positive numbers: inputs first, "
            "outputs last. Pass for example (64, 32, 10)."
        )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "linear": linear,
}
