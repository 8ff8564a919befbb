"""What a measurement will cost, told before it is paid: from a rehearsal on some of the data."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .batches import batch_size
from .diagnostics import evaluate
from .objective import Objective
from .snapshot import Snapshot


@dataclass(frozen=True)
class Cost:
    """Products with the Hessian, the chunks that each runs through, seconds, and bytes at the peak."""

    products: int
    chunks: int
    seconds: float
    bytes: int

    def __str__(self) -> str:
        chunks = f" x {self.chunks} chunks" if self.chunks > 1 else ""
        return f"{self.products} products{chunks}, about {_time(self.seconds)}, {_size(self.bytes)}"


def rehearse(at: Snapshot, plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Cost]:
    """What a plan will cost at a snapshot, by name, and in all under "".

    The plan is carried out at the same point for an eighth of the examples at most, and for one chunk at most. What that
    took is taken over, with the number of products, and each product and each pass over the data is charged the time by
    which one of them takes longer on all of the data, of which one chunk is timed. The peak is that of the graphs that will
    be kept, the vectors of the products, and what is captured of example gradients.
    """
    L = at.objective
    some = max(1, min(-(-L.size // 8), L.chunk_size))
    part = _restricted(at, some)
    passes: dict[str, float] = {}
    started = time.perf_counter()
    for name, options in plan.items():
        with _passes(part.objective) as seen:
            evaluate(part, {name: options})
        passes[name] = sum(seen) / part.objective.size
    overhead = time.perf_counter() - started - sum(m.seconds for m in part.measurements.values())
    captured = getattr(part._shared.get("examples"), "_kept_bytes", 0) * L.size // some
    part.release()
    here = _prices(part)
    whole = _prices(_restricted(at, min(L.size, L.chunk_size)))
    scale = L.size / min(L.size, L.chunk_size)
    slower = [max(0.0, scale * b - a) for a, b in zip(here, whole, strict=True)]
    chunks = len(L.pieces(size=L.chunk_size))
    peak = _graphs(at) + min(captured, L.memory // 4)
    costs = {}
    for name, m in part.measurements.items():
        seconds = m.seconds + overhead / len(plan) + passes[name] * slower[0] + m.matvecs * slower[1]
        costs[name] = Cost(m.matvecs, chunks, seconds, peak + 2 * min(m.matvecs, 24) * at.w.nbytes)
    total = [sum(column) for column in zip(*((c.products, c.seconds) for c in costs.values()), strict=True)]
    costs[""] = Cost(int(total[0]), chunks, total[1], max(c.bytes for c in costs.values()))
    return costs


def _restricted(at: Snapshot, count: int) -> Snapshot:
    """The same point for some of the examples, with a batch that is the same share of them, which keeps γ."""
    n = at.objective.size
    L = at.objective if count == n else at.objective.restricted(torch.arange(count) * n // count)  # data may be sorted
    b = at.batch_size
    fitting = tuple(_share(x, count, n) for x in b) if isinstance(b, tuple) else b and _share(b, count, n)
    fresh: dict[str, Any] = {"carry": {}, "measurements": {}, "alone": {}, "_shared": {}, "_count": [0]}
    return replace(at, objective=L, batch=None, batch_size=fitting, **fresh)


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
    """Seconds of a gradient with its graph, and of a product: the least of three, for the first finds kernels."""
    found = (math.inf, math.inf)
    for _ in range(3):
        at.release()
        started = time.perf_counter()
        _ = at.gradient
        between = time.perf_counter()
        _ = at.hessian @ at.gradient
        found = min(found[0], between - started), min(found[1], time.perf_counter() - between)
    at.release()
    return found


def _graphs(at: Snapshot) -> int:
    L = at.objective
    chunks = len(L.pieces(size=L.chunk_size))
    kept = min(chunks, int(L.memory / 2 / max(1.0, L.graph_bytes * L.chunk_size)))
    return int(L.graph_bytes * L.chunk_size * min(chunks, kept + 1))


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.{0 if seconds > 0.01 else 1}f} ms"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
