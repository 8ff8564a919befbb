"""How parameters are drawn; hides that the global random numbers, devices and precisions stay out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import nn

Size = Literal["full", "small"]
T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Layers made inside draw float32 parameters from `seed` alone, on the CPU; nothing global moves.

    Under ``torch.device("meta")`` they are made there and nothing is drawn: for counting parameters.
    """
    # torch.manual_seed would also seed the GPUs, which fork_rng(devices=[]) does not restore; and under
    # another default device the draws would come from that device's generator.
    counting = torch.get_default_device().type == "meta"
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("meta" if counting else "cpu"):
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def he(model: Module) -> Module:
    """Draw anew, in place: weights of convolutions normal with variance 2/fan_in, of linear layers 1/fan_in; biases 0.

    Convolutions are taken to be followed by a relu, linear layers to be heads, which are not.

    Source: He et al. 2015 (arXiv 1502.01852), eq. 10.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if isinstance(layer, nn.Conv2d) else "linear")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def check_widths(widths: Sequence[int], *, at_least: int) -> None:
    """Refuse layer widths that are too few or not positive.

    Raises:
        ValueError: naming the widths.
    """
    if len(widths) < at_least or min(widths) < 1:
        raise ValueError(
            f"layer widths are {tuple(widths)}, expected {at_least} or more positive numbers: inputs first, "
            "outputs last. Pass for example (64, 32, 10)."
        )


def choose(size: Size, *, full: T, small: T) -> T:
    """One of two, by the argument ``size`` that every named model takes.

    Raises:
        ValueError: another size.
    """
    if size not in ("full", "small"):
        raise ValueError(f"size is {size!r}, expected 'full' or 'small'. Pass 'small' for a network of CPU size.")
    return full if size == "full" else small
