"""What a measurement will cost, told before it is paid: from a rehearsal on some of the data."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .batches import batch_size
from .diagnostics import evaluate
from .memory import Allocations, readable
from .objective import Objective
from .snapshot import Snapshot

QUICK = 0.5  # seconds of a rehearsal, below which it is done twice


@dataclass(frozen=True)
class Cost:
    """Products with the Hessian, the chunks that each runs through, seconds, and bytes at the peak."""

    products: int
    chunks: int
    seconds: float
    bytes: int

    def __str__(self) -> str:
        chunks = f" x {self.chunks} chunks" if self.chunks > 1 else ""
        return f"{self.products} products{chunks}, about {_time(self.seconds)}, {readable(self.bytes)}"


def rehearse(at: Snapshot, plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Cost]:
    """What a plan will cost at a snapshot, by name, and in all under "".

    The plan is carried out at the same point for an eighth of the examples or one chunk at most, and a gradient and a
    product are timed there and on a whole chunk. The number of products is taken over. A product will cost what it costs on
    all of the data; what goes into passes over the data grows like the gradient; the solver's own work, which depends on
    the number of parameters alone, stays. The peak is what operations allocate at most while the plan is carried out there,
    and what more data add to it: graphs that will be kept, the workspace of a whole chunk, what is captured of example
    gradients. It is that of live tensors; an allocator that holds on to freed memory has more.
    """
    L, chunk = at.objective, min(at.objective.size, at.objective.chunk_size)
    some = max(1, min(-(-L.size // 8), chunk))
    part = _restricted(at, some)
    here = _prices(part)
    whole = here if some == chunk else _prices(_restricted(at, chunk))
    with Allocations() as memory:
        passes, elapsed, peaks = _rehearsed(part, plan, memory)
    captured = getattr(part._shared.get("examples"), "_kept_bytes", 0)
    if elapsed < QUICK:  # what is slow only once, and the counting of bytes, would be a large part of it
        part = part.anew(carry={})
        passes, elapsed, _ = _rehearsed(part, plan)
    overhead = max(0.0, elapsed - sum(m.seconds for m in part.measurements.values())) / len(plan)
    chunks = len(L.pieces(size=L.chunk_size))
    kept = min(chunks, L.graphs_that_fit)
    gradient, product = (max(a, L.size / chunk * b) for a, b in zip(here, whole, strict=True))
    product += (1 - kept / chunks) * gradient  # graphs that do not fit are rebuilt
    others = L.graph_bytes * chunk * (min(chunks, kept + 1) - 1)
    others += max(0, min(captured * L.size // some, L.memory // 4) - captured)
    sizes = [_peaks(part), _peaks(part if some == chunk else _restricted(at, chunk))]
    workspace = [large - small for small, large in zip(*sizes, strict=True)]
    costs = {}
    for name, m in part.measurements.items():
        rest = max(0.0, m.seconds - m.matvecs * here[1])  # passes over the data, or the solver's own work
        among_data = passes[name] * here[0] > rest / 2
        rest = rest * gradient / here[0] if among_data else rest + passes[name] * (gradient - here[0])
        seconds = overhead + rest + m.matvecs * product
        costs[name] = Cost(m.matvecs, chunks, seconds, int(peaks[name] + workspace[m.matvecs > 0] + others))
    products, seconds = (sum(column) for column in zip(*((c.products, c.seconds) for c in costs.values()), strict=True))
    costs[""] = Cost(int(products), chunks, seconds, max(c.bytes for c in costs.values()))
    part.release()
    return costs


def _rehearsed(
    part: Snapshot, plan: Mapping[str, Mapping[str, Any]], memory: Allocations | None = None
) -> tuple[dict[str, float], float, dict[str, int]]:
    """Measure at the snapshot; passes over its data by name, seconds, and the most bytes by name where they are counted."""
    passes, peaks = {}, {}
    started = time.perf_counter()
    for name, options in plan.items():
        if memory:
            memory.peak = memory.now
        with _passes(part.objective) as seen:
            evaluate(part, {name: options})
        passes[name] = sum(seen) / part.objective.size
        peaks[name] = memory.peak if memory else 0
    return passes, time.perf_counter() - started, peaks


def _peaks(at: Snapshot) -> tuple[int, int]:
    """Bytes at most during a gradient with its graph, and during a product."""
    at = at.anew(carry={})
    with Allocations() as memory:
        v = at.gradient
        gradient = memory.peak
        _ = at.hessian @ v
    at.release()
    return gradient, memory.peak


def _restricted(at: Snapshot, count: int) -> Snapshot:
    """The same point for some of the examples, with a batch that is the same share of them, which keeps γ."""
    n = at.objective.size
    L = at.objective if count == n else at.objective.restricted(torch.arange(count) * n // count)  # data may be sorted
    b = at.batch_size
    fitting = tuple(_share(x, count, n) for x in b) if isinstance(b, tuple) else b and _share(b, count, n)
    return at.anew(objective=L, batch=None, batch_size=fitting, carry={})


def _share(batch_size: int, count: int, n: int) -> int:
    return max(1, round(batch_size * count / n))


@contextlib.contextmanager
def _passes(L: Objective) -> Iterator[list[int]]:
    """The numbers of examples that the model is evaluated on inside."""
    seen: list[int] = []
    handle = L.module.register_forward_pre_hook(lambda _, args: seen.append(batch_size(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


def _prices(at: Snapshot) -> tuple[float, float]:
    """Seconds of a gradient, and of a product with a graph that is kept: the least of three, for the first finds kernels."""
    found = (math.inf, math.inf)
    H, v = at.hessian, at.gradient
    for _ in range(3):
        started = time.perf_counter()
        at.objective.gradient(at.w)
        between = time.perf_counter()
        _ = H @ v
        found = min(found[0], between - started), min(found[1], time.perf_counter() - between)
    at.release()
    return found


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.{0 if seconds > 0.01 else 1}f} ms"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"
