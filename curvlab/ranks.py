"""Processes that hold parts of the data: what they sum, gather and agree on, over torch.distributed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class RanksLost(RuntimeError):
    """Another process of the group has died, or did not answer in time."""


class Ranks:
    """The processes of a group, of which each holds a contiguous part of the data; or this one alone, which holds all.

    All of them make the same calls in the same order. What they are given is the same on all ranks, and so is what they
    return; decisions that are taken on it are therefore the same too.

    Args:
        group: a process group of torch.distributed, "world" for all processes, or None for this process alone.

    Attributes:
        rank, count: this process among how many.
        summed, gathered: bytes so far of what was summed, and of all rows that were gathered; one process sends none of it.

    Raises:
        ValueError: torch.distributed is not initialised, or this process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        self.rank, self.count, self._group = 0, 1, None
        self.summed = self.gathered = 0
        if group is None:
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"group is {group!r}, but torch.distributed is not initialised; start with torchrun and call "
                "torch.distributed.init_process_group() first, or pass group=None"
            )
        self._group = dist.group.WORLD if group == "world" else group
        self.rank, self.count = dist.get_rank(self._group), dist.get_world_size(self._group)
        if self.rank < 0:
            raise ValueError("this process is not in the group; only those in it may measure with it")

    def part(self, n: int) -> slice:
        """The positions, of n in all, that this rank holds: as equal parts as can be, the first ones larger."""
        return self._part(self.rank, n)

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """The sums over ranks, in one message for each dtype."""
        self.summed += sum(t.nbytes for t in tensors)
        if self.count == 1:
            return list(tensors)
        out = list(tensors)
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            with self._together():
                dist.all_reduce(flat, group=self._group)
            for i, part in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
                out[i] = part.view(tensors[i].shape)
        return out

    def gather(self, rows: Tensor, n: int) -> Tensor:
        """The rows of all ranks in their order, (n, ...), from those of `part(n)`."""
        self.gathered += n * rows.shape[1:].numel() * rows.itemsize
        if self.count == 1:
            return rows
        sizes = [part.stop - part.start for part in (self._part(rank, n) for rank in range(self.count))]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in sizes]
        with self._together():
            dist.all_gather(found, padded, group=self._group)
        return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])

    def scatter(self, rows: Tensor) -> Tensor:
        """Of the sums over ranks of rows, one for each rank, that of this rank."""
        self.gathered += rows.nbytes  # as many bytes as gathering them takes
        if self.count == 1:
            return rows[0]
        own = torch.empty_like(rows[:1])
        with self._together():
            dist.reduce_scatter_tensor(own, rows.contiguous(), group=self._group)
        return own[0]

    def all(self, flag: bool) -> bool:
        """Whether something is so on every rank."""
        return flag if self.count == 1 else all(self._objects(flag))

    def of_first(self, value: T) -> T:
        """The value that the first rank has."""
        if self.count == 1:
            return value
        return self._objects(value if self.rank == 0 else None)[0]

    def agree(self, what: str, tensor: Tensor) -> None:
        """Make sure that all ranks have the same numbers, by a hash of their bits.

        Raises:
            ValueError: they have not.
        """
        if self.count == 1:
            return
        own = torch.stack([torch.tensor(zlib.crc32(what.encode()), device=tensor.device), *_hash(tensor)])
        found = [torch.empty_like(own) for _ in range(self.count)]
        with self._together():
            dist.all_gather(found, own, group=self._group)
        other = next((i for i, hashes in enumerate(found) if not torch.equal(hashes, found[0])), None)
        if other is not None:
            raise ValueError(
                f"ranks 0 and {other} differ in {what}, as rank {self.rank} has it, or make other calls; start all ranks "
                "from the same weights and seeds, and let all of them make the same calls"
            )

    def require_one(self, what: str) -> None:
        """Refuse what one process alone can do.

        Raises:
            ValueError: there are several.
        """
        if self.count > 1:
            raise ValueError(
                f"{what} need all data in one process, and {self.count} ranks hold parts of it; measure them in one process"
            )

    def _objects(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        with self._together():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def _part(self, rank: int, n: int) -> slice:
        size, more = divmod(n, self.count)
        start = rank * size + min(rank, more)
        return slice(start, start + size + (rank < more))

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition(". ")[0].rpartition("] ")[2] or type(error).__name__  # without its place
            why = "one of them has died. Its own output says why"
            if "timed out" in reason.lower() or "timeout" in reason.lower():
                why = (
                    "one of them hangs, or is slower than the timeout of the process group, which is that of "
                    "init_process_group(timeout=) or curvlab run --timeout"
                )
            raise RanksLost(
                f"rank {self.rank} of {self.count} got no answer from the others ({reason}): {why}; what was logged is "
                "readable, and training is where it was"
            ) from error


@contextmanager
def started(timeout: float = 600.0) -> Iterator[Ranks]:
    """The processes that torchrun has started, as a group, or this one alone where it has started none.

    Args:
        timeout: seconds after which a rank that does not answer counts as lost.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield Ranks("world")
    finally:
        dist.destroy_process_group()


def _hash(tensor: Tensor) -> list[Tensor]:
    """Two sums over its bits, on its device."""
    bits = tensor.detach().contiguous().view(-1).view(torch.int32)
    return [bits.sum(dtype=torch.int64), bits[1::3].sum(dtype=torch.int64)]
