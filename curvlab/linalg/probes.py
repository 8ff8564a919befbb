"""Random vectors that depend on a seed alone: not on the device, the global generators, or who else draws."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a key such as (seed, step, name of the diagnostic).

    Every key has a stream of its own, so one more diagnostic changes no other diagnostic's probes.
    """
    words = [zlib.crc32(str(part).encode()) for part in key]
    seed = 0
    for word in words:  # a polynomial hash modulo a Mersenne prime: order matters, 61 bits
        seed = (seed * 1_000_003 + word + 1) % (2**61 - 1)
    return torch.Generator().manual_seed(seed)


def rademacher(
    shape: Sequence[int],
    like: Tensor | torch.device,
    dtype: torch.dtype | None = None,
    *,
    generator: torch.Generator | None,
) -> Tensor:
    """Independent random signs. Drawn on the CPU, so that every device sees the same ones."""
    device = like.device if isinstance(like, Tensor) else like
    dtype = dtype or (like.dtype if isinstance(like, Tensor) else torch.get_default_dtype())
    signs = torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8)
    return (2 * signs - 1).to(device, dtype)


def normal(shape: Sequence[int], like: Tensor, *, generator: torch.Generator | None) -> Tensor:
    """Independent standard normals in the dtype and on the device of `like`, drawn on the CPU in float64."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(like.device, like.dtype)
