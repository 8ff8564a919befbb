"""How much memory there is, and the refusal of what cannot fit: where memory is overcommitted no allocation fails, and the
system ends the process instead."""

from __future__ import annotations

import ctypes
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL = 2**26  # bytes, below which nobody looks
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def total_bytes(device: torch.device) -> int:
    """Of a GPU, or of the machine, or what the container that this process runs in may use of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    texts = [file.read_text().strip() for file in map(Path, LIMITS) if file.exists()]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(int(text) for text in texts if text != "max")])


def free_bytes(device: torch.device) -> int:
    """What can still be allocated: on a GPU with what torch has reserved, on the CPU without swapping."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free, status = total_bytes(device), Path("/proc/self/statm")
    if status.exists():
        free -= int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = min([free, *(2**10 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))])
    return max(0, free)


def give_back(device: torch.device) -> None:
    """Let the system have what is free here: what torch has reserved on a GPU, what the C library holds on to on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif os.name == "posix" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def require(count: int, device: torch.device, what: str, fix: str) -> None:
    """Refuse `what`, which takes so many bytes, where they are not free.

    Raises:
        MemoryError: with both numbers and the fix.
    """
    if count > SMALL and count > (free := free_bytes(device)):
        raise MemoryError(f"{what} takes {readable(count)}, and {readable(free)} are free on {device}; {fix}")


def chunk_that_fits(memory: int, graph_bytes: float, examples: int, given: int | None = None) -> int:
    """Examples evaluated at once: as given, or so many that one kept graph takes at most a quarter of the budget."""
    return max(1, min(examples, given or int(memory / 4 / graph_bytes)))


def graphs_that_fit(memory: int, nbytes: float) -> int:
    """How many chunks may keep a gradient graph of so many bytes in half of the budget."""
    return int(memory / 2 / max(1.0, nbytes))


def readable(count: int) -> str:
    """Bytes as text, such as "1.5 GiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


class Allocations(TorchDispatchMode):
    """A context that counts what operations allocate: `peak`, the most bytes at once.

    Of what kernels need inside, convolutions on a CPU are counted, which lay out what they take and give once more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        given, made = _storages((args, kwargs)), _storages(found)
        for key, storage in made.items():
            if key not in given and key not in self._known:
                self._known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        inside = 0
        if "convolution" in str(function) and all(s.device.type == "cpu" for s in made.values()):
            inside = sum(s.nbytes() for s in (given | made).values())
        self.peak = max(self.peak, self.now + inside)
        return found

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    found = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return {id(storage): storage for storage in found}
