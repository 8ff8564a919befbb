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
from .diagnostics.estimation import default_probes
from .memory import Allocations, chunk_that_fits, graphs_that_fit, readable
from .objective import Objective
from .snapshot import Snapshot

QUICK = 5.0  # seconds of a rehearsal, below which it is done twice


@dataclass(frozen=True)
class Cost:
    """What a measurement takes, of each rank where there are several.

    Attributes:
        products: with the Hessian.
        chunks: that each of them runs through.
        seconds: of computing.
        bytes: at the peak, beside the model and the data.
        gradients: what the seconds are in gradients of the rank's examples.
        vectors: how many vectors of all parameters are held at the peak.
        sent: bytes that a rank sends to others.
    """

    products: int
    chunks: int
    seconds: float
    bytes: int
    gradients: float = 0.0
    vectors: float = 0.0
    sent: int = 0

    def __str__(self) -> str:
        chunks = f" x {self.chunks} chunks" if self.chunks > 1 else ""
        return f"{self.products} products{chunks}, about {duration(self.seconds)}, {readable(self.bytes)}"


@dataclass(frozen=True)
class Size:
    """What a measurement is foreseen for.

    Attributes:
        examples: of all ranks.
        params: P.
        graph_bytes: of a kept graph, per example.
        memory: budget for kept graphs.
        chunk_size: examples at once; None for what fits.
        ranks: K, of which each has a K-th of the examples.
        work: of an example's gradient, in that of the rehearsal.
        speed: of the device, in that of the rehearsal.
    """

    examples: int
    params: int
    graph_bytes: float
    memory: int
    chunk_size: int | None = None
    ranks: int = 1
    work: float = 1.0
    speed: float = 1.0

    @property
    def share(self) -> int:
        """Examples of a rank, at most."""
        return -(-self.examples // self.ranks)

    @property
    def chunk(self) -> int:
        """Examples at once."""
        return chunk_that_fits(self.memory, self.graph_bytes, self.share, self.chunk_size)

    @property
    def chunks(self) -> int:
        """That a rank's examples are."""
        return -(-self.share // self.chunk)

    @property
    def kept(self) -> int:
        """Chunks that keep their graphs."""
        return min(self.chunks, graphs_that_fit(self.memory, self.graph_bytes * self.chunk))

    @property
    def others(self) -> float:
        """Bytes of the graphs that are there beside that of the chunk at work."""
        return self.graph_bytes * self.chunk * (min(self.chunks, self.kept + 1) - 1)

    def sent(self, summed: float, gathered: float = 0.0) -> int:
        """Bytes that a rank sends where so many are summed and gathered: 2(K-1)/K and (K-1)/K of them, in a ring."""
        return int((self.ranks - 1) / self.ranks * (2 * summed + gathered))


@dataclass(frozen=True)
class _Part:
    """What one quantity took in a rehearsal: beside `products`, so many passes over the data and seconds."""

    products: int
    passes: float
    seconds: float
    fixed: float  # bytes that are as many for any number of examples
    summed: int
    gathered: int


@dataclass(frozen=True)
class Rehearsal:
    """A measurement of some of the examples, from which follows what it costs for all, or at another size.

    Attributes:
        size: of the objective.
        some, chunk: the examples of the rehearsal, and those of a whole chunk.
        here, whole: seconds of a gradient and of a product, of either.
        slopes: bytes of workspace per example, of a gradient and of a product.
        captured: bytes per example that are kept of example gradients.
        overhead: seconds of each quantity beside its own.
        vector: bytes of a vector of all parameters.
    """

    size: Size
    some: int
    chunk: int
    here: tuple[float, float]
    whole: tuple[float, float]
    slopes: tuple[float, float]
    captured: float
    overhead: float
    vector: int
    parts: Mapping[str, _Part]

    def price(self, count: float) -> tuple[float, float]:
        """Seconds of a gradient and of a product, of so many examples."""
        little = min(1.0, count / self.some)
        gradient, product = (max(a * little, count / self.chunk * b) for a, b in zip(self.here, self.whole, strict=True))
        return gradient, product

    def costs(self, to: Size | None = None) -> dict[str, Cost]:
        """By name, and in all under ""; at the size of the objective, or at another."""
        to = to or self.size
        larger, heavier = to.params / self.size.params, to.graph_bytes / self.size.graph_bytes
        gradient, product = (seconds / to.speed for seconds in self.price(to.share * to.work))
        product += (1 - to.kept / to.chunks) * gradient  # graphs that do not fit are rebuilt
        others = to.others + min(self.captured * heavier * to.share, to.memory // 4)
        costs = {}
        for name, part in self.parts.items():
            among_data = part.passes * self.here[0] > part.seconds / 2
            if among_data:
                rest = part.seconds * gradient / self.here[0]
            else:  # the solver's own work
                passing = part.passes * self.here[0]
                rest = max(0.0, part.seconds - passing) * larger / to.speed + part.passes * gradient
            seconds = (self.overhead + rest) + part.products * product
            held = part.fixed * larger
            workspace = self.slopes[part.products > 0] * heavier * to.chunk
            costs[name] = Cost(
                part.products, to.chunks, seconds, int(held + workspace + others), seconds / gradient,
                part.fixed / self.vector,
                to.sent(part.summed * larger, part.gathered * to.examples / self.some),
            )  # fmt: skip
        return costs | {"": _in_all(costs, to.chunks)}


def rehearse(at: Snapshot, plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Cost]:
    """What a plan will cost at a snapshot, by name, and in all under ""; see `rehearsal`."""
    return rehearsal(at, plan).costs()


def rehearsal(at: Snapshot, plan: Mapping[str, Mapping[str, Any]]) -> Rehearsal:
    """A plan carried out at the same point for an eighth of the examples or one chunk at most, but for more of them than
    there are probes: estimates from so few examples are exact, which costs otherwise.

    A gradient and a product are timed there and on a whole chunk. The number of products is taken over. A product will cost
    what it costs on all of the data; what goes into passes over the data grows like the gradient; the solver's own work,
    which depends on the number of parameters alone, stays. The peak is what operations allocate at most while the plan is
    carried out there, and what more data add to it: graphs that will be kept, the workspace of a whole chunk, what is
    captured of example gradients. It is that of live tensors; an allocator that holds on to freed memory has more.
    """
    L, chunk = at.objective, min(at.objective.size, at.objective.chunk_size)
    probes = [default_probes(at, options.get("probes")) for options in plan.values()]
    some = min(L.size, max(min(-(-L.size // 8), chunk), 1 + max(probes, default=0)))
    part = _restricted(at, some)
    full = part if some == chunk else _restricted(at, chunk)
    here = _prices(part)
    whole = here if some == chunk else _prices(full)
    with Allocations() as memory:
        found, elapsed = _rehearsed(part, plan, memory)
    captured = getattr(part._shared.get("examples"), "_kept_bytes", 0)
    if elapsed < QUICK:  # what is slow only once, and the counting of bytes, would be a large part of it
        part = part.anew(carry=_no_carry(at))
        again, elapsed = _rehearsed(part, plan)
        found = {name: replace(again[name], fixed=found[name].fixed) for name in plan}
    overhead = max(0.0, elapsed - sum(p.seconds for p in found.values())) / len(plan)
    few = some if some < chunk else max(1, chunk // 2)
    small, large = _peaks(part if few == some else _restricted(at, few)), _peaks(full)
    slopes = (large[0] - small[0]) / max(1, chunk - few), (large[1] - small[1]) / max(1, chunk - few)
    size = Size(L.size, L.num_params, L.graph_bytes, L.memory, L.given_chunk_size)
    there = replace(size, examples=some)
    parts = {}
    for name, p in found.items():
        held = p.fixed - slopes[p.products > 0] * there.chunk - there.others - captured
        parts[name] = replace(p, seconds=max(0.0, p.seconds - p.products * here[1]), fixed=max(0.0, held))
    part.release()
    return Rehearsal(
        size, some, chunk, here, whole, slopes, captured / some, overhead, L.num_params * L.dtype.itemsize, parts
    )


def _in_all(costs: Mapping[str, Cost], chunks: int) -> Cost:
    found = list(costs.values())
    return Cost(
        sum(c.products for c in found), chunks, sum(c.seconds for c in found), max(c.bytes for c in found),
        sum(c.gradients for c in found), max(c.vectors for c in found), sum(c.sent for c in found),
    )  # fmt: skip


def _rehearsed(
    at: Snapshot, plan: Mapping[str, Mapping[str, Any]], memory: Allocations | None = None
) -> tuple[dict[str, _Part], float]:
    """Measure at the snapshot: what each took, its peak where bytes are counted, and all seconds."""
    found, ranks = {}, at.objective.ranks
    started = time.perf_counter()
    for name, options in plan.items():
        if memory:
            memory.peak = memory.now
        summed, gathered = ranks.summed, ranks.gathered
        with _passes(at.objective) as seen:
            m = evaluate(at, {name: options})[name]
        sums = ranks.summed - summed, ranks.gathered - gathered
        found[name] = _Part(m.matvecs, sum(seen) / at.objective.size, m.seconds, memory.peak if memory else 0, *sums)
    return found, time.perf_counter() - started


def _peaks(at: Snapshot) -> tuple[int, int]:
    """Bytes at most during a gradient with its graph, and during a product."""
    at = at.anew(carry=_no_carry(at))
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
    return at.anew(objective=L, batch=None, batch_size=fitting, carry=_no_carry(at))


def _no_carry(at: Snapshot) -> dict[Any, Any] | None:
    """Nothing left by earlier snapshots, at a point of a run as at one on its own."""
    return None if at.carry is None else {}


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


def duration(seconds: float) -> str:
    """Seconds as text, such as "40 s"."""
    if seconds < 1:
        return f"{1e3 * seconds:.{0 if seconds > 0.01 else 1}f} ms"
    if seconds < 6000:
        return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.3g} hours"
