"""A plan of a measurement before there is a machine for it: memory, messages and time, from a rehearsal that is scaled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .checks import memory_bytes
from .cost import Cost, Size, duration, rehearsal
from .diagnostics import DIAGNOSTICS, parse, require
from .diagnostics.registry import Request, batch_sizes
from .memory import readable, total_bytes
from .objective import Objective
from .problems import digits, mlp
from .snapshot import Snapshot

ASPECT = 128  # width over number of layers, and width of a head, as in GPT-3 and Llama
KEPT = 34, 3  # numbers in a kept graph per token, layer and unit of width; per pair of tokens, layer and head
FORWARD_ONLY = ("critical_sharpness", "difference_sharpness")  # which hold a vector or two


@dataclass(frozen=True)
class Plan:
    """What a measurement takes of each of several ranks.

    Attributes:
        costs: by quantity, and in all under "": products, gradients, vectors, bytes, seconds of computing, bytes sent.
        size: parameters, examples, ranks, budget for kept graphs, chunks.
        vector: bytes of a vector of all parameters, also of the model beside the measurement.
        device_memory: bytes of a device.
        flops: operations a second, of a device in the gradient.
        bandwidth: bytes a second that a rank sends; None for no account of it.
        fixes: what to change where it does not fit, a line each.
    """

    costs: dict[str, Cost]
    size: Size
    vector: int
    device_memory: int
    flops: float
    bandwidth: float | None
    fixes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """On each device at the peak: of the measurement and of the model, without what training keeps there."""
        return self.costs[""].bytes + self.vector

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.bytes <= self.device_memory

    @property
    def sent_by_product(self) -> int:
        """Bytes that a rank sends for a product."""
        return self.size.sent(self.vector)

    @property
    def seconds(self) -> float:
        """Of computing and, where the bandwidth is known, of sending, one after the other."""
        return self.costs[""].seconds + (self.costs[""].sent / self.bandwidth if self.bandwidth else 0.0)

    def __str__(self) -> str:
        s, total = self.size, self.costs[""]
        rebuilt = "" if s.kept == s.chunks else ", the others are rebuilt for each product"
        communication = "; sending is not counted (--bandwidth)" if s.ranks > 1 and not self.bandwidth else ""
        lines = [
            f"vectors    {readable(self.vector)} each, about {total.vectors:.0f} at the peak: "
            f"{readable(int(total.vectors * self.vector))}",
            f"graphs     {readable(int(s.graph_bytes))} an example, chunks of {s.chunk}: half of {readable(s.memory)} keeps "
            f"{s.kept} of {s.chunks}{rebuilt}",
            f"messages   a product sends {readable(self.sent_by_product)} from each rank, all {readable(total.sent)}",
            f"time       {total.gradients:.3g} gradients of {s.share} examples, {duration(self.seconds)} at "
            f"{self.flops:.2g} FLOP/s{communication}",
            f"peak       {readable(self.bytes)} on each device with the model, of {readable(self.device_memory)}: "
            f"{'fits' if self.fits else 'does not fit'}",
        ]
        return "\n".join(lines + [f"           {fix}" for fix in self.fixes])


def plan(
    L: Objective | None = None,
    diagnostics: Iterable[Request] = ("sharpness",),
    *,
    w: Tensor | None = None,
    batch_size: int | Sequence[int] | None = None,
    lr: float | None = None,
    test: Objective | None = None,
    seed: int = 0,
    params: float | None = None,
    examples: int | None = None,
    tokens: int | None = None,
    activations: int | str | None = None,
    ranks: int = 1,
    dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    memory: int | str | None = None,
    device_memory: int | str | None = None,
    flops: float | None = None,
    bandwidth: float | None = None,
) -> Plan:
    """What measuring some quantities at a point takes: products, bytes per device, bytes sent and seconds.

    The diagnostics are rehearsed on some of the data of `L` (`curvlab.cost.rehearsal`), or without it on a small net. The
    number of products is taken over; vectors grow with the parameters, graphs with the activations, passes with the
    operations of a gradient, and each of the ranks does a share of the passes. Against measurements on two ranks, of five
    quantities of three models, bytes at the peak, products and bytes sent were within 22%; the seconds of a sharpness on one
    and two ranks within 19% on a quiet machine, whose own scatter is as large. Not foreseen: what training keeps on the
    device beside the model; the Gram matrix of example gradients on several ranks.

    Args:
        L: the objective; None for one of which only sizes are known.
        diagnostics, w, batch_size, lr, test, seed: as `measure` takes them.
        params: number of parameters, where it is not that of `L`.
        examples: all of them; default those of `L`, or 1.
        tokens: length of a sequence. Without `L` the model is a transformer of the usual shape: width 128 times the
            layers, heads of 128, P = 12 layers·width².
        activations: bytes of the kept graph of an example's gradient, or text such as "2GiB"; default as found on `L`,
            where that is 34 tokens·layers·width + 3 tokens²·layers·heads numbers without it.
        ranks: processes with a device each, which share the examples; each has all parameters.
        dtype: without `L`, of measuring.
        chunk_size: examples at once; default that of `L`, or what fits.
        memory: budget for kept graphs; default a quarter of `device_memory`, or where that is not given that of `L`.
        device_memory: of each device; default that of the device here.
        flops: operations a second that a device reaches in a gradient; default what this one does in the rehearsal.
        bandwidth: bytes a second from each rank.

    Raises:
        ValueError: neither an objective nor parameters with tokens or activations; a size that is not positive; what
            `measure` refuses.

    Example:
        >>> made = plan(params=7e9, examples=1024, tokens=2048, ranks=64, device_memory="80GiB")
        >>> made.fits, made.bytes > 40 * 4 * 7e9
        (False, True)
    """
    for name, given in (("params", params), ("examples", examples), ("tokens", tokens), ("ranks", ranks),
                        ("flops", flops), ("bandwidth", bandwidth)):  # fmt: skip
        if given is not None and not given >= 1:
            raise ValueError(f"{name} is {given}; expected a number from 1 on")
    if L is None and (params is None or (tokens is None and activations is None)):
        raise ValueError(
            "a plan needs a model with data, or its sizes: params=7e9 and tokens=2048 of a transformer, or else "
            "activations='2GiB', the bytes of an example's kept graph"
        )
    requests = parse(diagnostics)
    sizes = batch_sizes(batch_size)
    real, L = L, L or _small(dtype)
    require(L, requests, {"batch_size": sizes, "lr": lr, "test": test})
    found = rehearsal(Snapshot(L, L.point(w), seed=seed, batch_size=sizes, lr=lr, test=test), requests)
    P, work = int(params or L.num_params), _operations(L)
    numbers, operations = _transformer(P, tokens or 1)
    graph, there = (L.graph_bytes, work * P / L.num_params) if real else (numbers * L.dtype.itemsize, operations)
    if activations is not None:
        graph = memory_bytes(activations, L.device)
    device = total_bytes(L.device) if device_memory is None else memory_bytes(device_memory, L.device)
    budget = L.memory if real and device_memory is None else device // 4
    if memory is not None:
        budget = memory_bytes(memory, L.device)
    rate = work * found.chunk / found.whole[0]
    size = Size(
        examples or (real.size if real else 1), P, graph, budget, chunk_size or L.given_chunk_size, ranks,
        work=there / work, speed=flops / rate if flops else 1.0,
    )  # fmt: skip
    made = Plan(found.costs(size), size, P * L.dtype.itemsize, device, flops or rate, bandwidth)
    return made if made.fits else replace(made, fixes=tuple(_fixes(made, requests, L.dtype)))


def _fixes(made: Plan, requests: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> Iterator[str]:
    """What to change for less memory."""
    size, vectors = made.size, made.costs[""].vectors + 1  # with the model
    graphs = made.bytes - int(vectors * made.vector)
    room = made.device_memory - min(graphs, made.device_memory // 2)
    if graphs > made.device_memory // 2:
        smaller = f"keep fewer graphs, in smaller chunks (--memory {readable(size.memory // 8).replace(' ', '')})"
        yield smaller if size.chunk > 1 else "take shorter examples (--tokens), whose graphs are smaller"
    if vectors * made.vector > room:
        yield f"measure a block of at most {size.params * room / (vectors * made.vector):.2g} parameters (--parameters)"
    if any(options.get("k", 1) > 1 for options in requests.values()):
        yield "ask for fewer eigenpairs (--k 1)"
    if dtype == torch.float64:
        yield "measure in single precision (--dtype float32)"
    if names := [name for name in FORWARD_ONLY if name in DIAGNOSTICS and name not in requests]:
        yield f"measure by forward passes alone (--diagnostics {' '.join(names)})"


def _transformer(params: int, tokens: int) -> tuple[float, float]:
    """Numbers in the kept graph of a sequence, and operations of its gradient, for a transformer of the usual shape."""
    width = (params * ASPECT / 12) ** (1 / 3)
    layers = heads = width / ASPECT
    linear, pairs = KEPT
    kept = layers * tokens * (linear * width + pairs * heads * tokens)
    return kept, 6.0 * params * tokens + 12 * layers * width * tokens**2


def _operations(L: Objective) -> float:
    """Of the gradient of an example."""
    few = L.first(2).size
    with FlopCounterMode(display=False) as counter:
        L.gradient(batch=torch.arange(few))
    return max(1.0, counter.get_total_flops() / few)


def _small(dtype: torch.dtype) -> Objective:
    """A net whose vectors are far larger than its graphs, on data whose Hessian has a usual spectrum."""
    return Objective(mlp((64, 256, 256, 10), dtype=dtype), "cross_entropy", digits(256)[0])
