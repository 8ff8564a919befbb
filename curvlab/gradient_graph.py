"""The gradient of one chunk of data and what its Hessian-vector products need: as autograd's graph, or as a recording of
the operations that are in it, which is made once for each shape of a chunk."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .batches import leaves, take, tree_map
from .capture import Capture
from .guard import out_of_memory
from .linearize import Linearized, NotTraceable, linearize
from .objective import Chunk, Objective
from .replay import Replay, new_pool

CAPTURES_ON = ("cuda",)  # devices on which recordings are replayed as graphs of the device's own
SHAPES = 8  # recordings of one objective
DIFFERENCE_STEPS = {torch.float64: 1e-6, torch.float32: 1e-2}  # length of a step of w between two gradients
STRIKES = 3  # points at which a recording was not the function any more, after which none is made
_log = logging.getLogger("curvlab")


class ChunkGradient:
    """Losses and gradient of the summed loss of one chunk, and products with its Hessian."""

    objective: Objective
    losses: Tensor
    grads: list[Tensor]
    capture: Capture | None = None

    @property
    def value(self) -> Tensor:
        return self.losses.double().sum()

    @property
    def gradient(self) -> Tensor:
        return self.objective.join(self.grads)

    def product(self, v: Tensor) -> Tensor:
        """H v, (P,) -> (P,)."""
        return self.objective.join(self.products(self.objective.split(v.contiguous())))

    def products_of(self, rows: Tensor) -> Tensor:
        """H v of several vectors at once, (K, P) -> (K, P)."""
        return torch.func.vmap(self.product)(rows)

    def products(self, parts: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError


class GradientGraph(ChunkGradient):
    """By autograd: the gradient, with the graph that leads to it.

    Args:
        owners: layers that are listened to, for example gradients without a pass of their own; the result is `capture`.
    """

    def __init__(
        self, objective: Objective, params: list[Tensor], chunk: Chunk, owners: dict[str, nn.Module] | None = None
    ) -> None:
        self.objective = objective
        with nullcontext() if owners is None else Capture(objective, chunk, owners) as self.capture:
            losses = objective.losses(params, chunk)
        edges = [] if self.capture is None else self.capture.edges
        found: Sequence[Tensor | None] = [None] * len([*params, *edges])
        if losses.requires_grad:
            found = torch.autograd.grad(losses.sum(), [*params, *edges], create_graph=True, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=False)]
        if self.capture is not None:
            self.capture.deltas = [None if d is None else d.detach() for d in found[len(params) :]]
        self.losses, self.grads = losses.detach(), [g.detach() for g in grads]
        # Only gradients that vary with the parameters, and parameters that they vary with, take part in products.
        self._varying = [i for i, g in enumerate(grads) if g.requires_grad]
        # Of the gradient itself nothing is kept for them, only where in the graph it is.
        self._roots: list[Any] = [g if g.is_leaf else get_gradient_edge(g) for g in (grads[i] for i in self._varying)]
        self._params = params

    def products(self, parts: list[Tensor]) -> list[Tensor]:
        if not self._varying:  # the loss is linear in the parameters
            return [torch.zeros_like(p) for p in self._params]
        vectors = [parts[i] for i in self._varying]
        found = torch.autograd.grad(self._roots, self._params, vectors, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if h is None else h for p, h in zip(self._params, found, strict=True)]


def jvp_of_gradient(objective: Objective, w: Tensor, chunk: Chunk, v: Tensor) -> Tensor:
    """H v of the summed loss of a chunk, (P,), by the forward-mode derivative of the gradient."""
    params = objective.split(w)
    gradient = torch.func.grad(lambda p: objective.losses(p, chunk).sum())
    return objective.join(torch.func.jvp(gradient, (params,), (objective.split(v.contiguous()),))[1])


class GradientAlone(ChunkGradient):
    """By autograd, without what products need."""

    def __init__(self, objective: Objective, params: list[Tensor], chunk: Chunk) -> None:
        losses = objective.losses(params, chunk)
        self.objective, self.losses, self.grads = objective, losses.detach(), objective.grads(losses.sum(), params)


def half_difference(objective: Objective, w: Tensor, chunk: Chunk, step: Tensor) -> Tensor:
    """(∇L(w + step) - ∇L(w - step))/2 of the summed loss of a chunk, (P,): H step, but for terms of third order."""
    above, below = (GradientAlone(objective, objective.leaves_at(at), chunk).gradient for at in (w + step, w - step))
    return (above - below) / 2


def without_padding(L: Objective, V: Tensor) -> Tensor:
    """V, (P,) or (P, K), with zeros for the padding rows of embeddings, which backward passes take for constants."""
    layers = (m for m in L.model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
    rows = {id(m.weight): m.padding_idx for m in layers if m.padding_idx is not None}
    if not rows:
        return V
    free = torch.ones(L.num_params, dtype=V.dtype, device=V.device)
    for p, part in zip(L.variables(), L.split(free), strict=True):
        if id(p) in rows:
            part[rows[id(p)]] = 0
    return V * (free if V.ndim == 1 else free[:, None])


class TracedGradient(ChunkGradient):
    """By a recording, without autograd."""

    def __init__(self, objective: Objective, inputs: list[Tensor], trace: Linearized) -> None:
        self.objective, self._second = objective, trace.second
        with torch.no_grad():
            values, self._needed = trace.first(*inputs)
        self.losses, *self.grads = values

    def products(self, parts: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return self._second(*self._needed, *parts)


class Captured:
    """Both parts of a recording as graphs of the device, which compute where they once were captured.

    Attributes:
        holder: the point whose values lie there now, as a weak reference.
    """

    def __init__(self, trace: Linearized, inputs: Sequence[Tensor], device: torch.device) -> None:
        self._trace, self._pool = trace, new_pool(device)
        self._second: dict[int, Replay] = {}
        self.holder: Callable[[], object] = lambda: None
        with torch.no_grad():
            self.first = Replay(trace.first, inputs, self._pool)

    def second(self, parts: list[Tensor], count: int = 0) -> list[Tensor]:
        """Products with vectors in the shapes of parameters, or with `count` of them in a first dimension."""
        if count not in self._second:
            needed = self.first.outputs[1]

            def products(*parts: Tensor) -> list[Tensor]:
                return self._trace.second(*needed, *parts)

            self._second[count] = Replay(torch.func.vmap(products) if count else products, parts, self._pool)
        return self._second[count](*parts)


class CapturedGradient(ChunkGradient):
    """By a recording that is replayed. Points share the memory that it computes in: the one that is asked takes it over."""

    def __init__(self, objective: Objective, inputs: list[Tensor], captured: Captured) -> None:
        self.objective, self._inputs, self._captured = objective, inputs, captured
        self._hold()
        self.losses, *self.grads = [value.clone() for value in captured.first.outputs[0]]

    def products(self, parts: list[Tensor]) -> list[Tensor]:
        return self._second(parts)

    def products_of(self, rows: Tensor) -> Tensor:
        L, count = self.objective, len(rows)
        parts = [part.reshape(count, *shape) for part, shape in zip(rows.split(L.sizes, 1), L.shapes, strict=True)]
        return torch.cat([part.reshape(count, -1) for part in self._second(parts, count)], 1)

    def _second(self, parts: list[Tensor], count: int = 0) -> list[Tensor]:
        with torch.no_grad():
            self._hold()
            return self._captured.second(parts, count)

    def _hold(self) -> None:
        if self._captured.holder() is not self:
            with torch.no_grad():
                self._captured.first(*self._inputs)
            self._captured.holder = weakref.ref(self)


@dataclass
class Recordings:
    """The recordings of one objective, by what they depend on: shapes, and all of a batch that is no tensor.

    Attributes:
        made: None where a recording cannot be made.
        strikes: points at which a recording was not the function any more.
        captured: by recording and place among the data, for each has the values of one chunk; None once that failed.
        blocks: how many vectors at once were fastest, by engine and number of vectors.
    """

    made: dict[Hashable, Linearized | None] = field(default_factory=dict)
    compiled: dict[Hashable, Linearized] = field(default_factory=dict)
    captured: dict[Hashable, Captured] | None = field(default_factory=dict)
    blocks: dict[Hashable, int] = field(default_factory=dict)
    strikes: int = 0

    def find(self, L: Objective, w: Tensor, chunk: Chunk, constants: dict[str, Tensor]) -> Linearized | None:
        """The recording for a chunk, made now if there is none; None, with one line in the log, where it cannot be."""
        key = _key(chunk)
        if key not in self.made and len(self.made) < SHAPES and self.strikes < STRIKES:
            try:
                self.made[key] = self._record(L, L.leaves_at(w), chunk, constants)
            except NotTraceable as reason:
                self.made[key] = None
                _log.warning("Hessian-vector products go through autograd's graph: no trace, %s", reason)
        return self.made.get(key)

    def gradient(
        self, L: Objective, params: list[Tensor], chunk: Chunk, constants: dict[str, Tensor], *, kept: bool, compiles: bool
    ) -> ChunkGradient:
        """By the recording of a chunk, which was made: compiled on first use, or captured where the device can do that."""
        key, trace = _key(chunk), self.of(chunk)
        inputs = [*params, *_inputs(chunk), *constants.values()]
        if compiles:
            if key not in self.compiled:
                self.compiled[key] = trace.compiled()
            trace = self.compiled[key]
        elif self.captured is not None and L.device.type in CAPTURES_ON:
            place = key, chunk.positions.start if kept else None
            try:
                if place not in self.captured:
                    self.captured[place] = Captured(trace, inputs, L.device)
                return CapturedGradient(L, inputs, self.captured[place])
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                self.captured = None
                _log.warning("Hessian-vector products are replayed operation by operation: no capture, %s", error)
        return TracedGradient(L, inputs, trace)

    def _record(self, L: Objective, params: list[Tensor], chunk: Chunk, constants: dict[str, Tensor]) -> Linearized:
        if L.mode != "eval" or L.coupled:
            raise NotTraceable("the examples of a batch are coupled, or the model draws random numbers")
        count, batch = len(params), _inputs(chunk)

        def function(inputs: list[Tensor], vectors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            at = [p.detach().requires_grad_() for p in inputs[:count]]
            given = iter(inputs[count : count + len(batch)])
            weights = None if chunk.weights is None else next(given)
            own = replace(chunk, batch=tree_map(lambda _: next(given), chunk.batch), weights=weights)
            with L.measuring(dict(zip(constants, inputs[count + len(batch) :], strict=True))):
                graph = GradientGraph(L, at, own)
                return [graph.losses, *graph.grads], graph.products(vectors)

        with L.measuring(constants):
            vectors = [torch.empty_like(p) for p in params]
            trace = linearize(function, [*(p.detach() for p in params), *batch, *constants.values()], vectors)
            self._verify(trace, L, params, chunk, constants)
        return trace

    def _verify(
        self, trace: Linearized, L: Objective, params: list[Tensor], chunk: Chunk, constants: dict[str, Tensor]
    ) -> None:
        """Loss, gradient and the second of two products against autograd."""
        inputs = [*params, *_inputs(chunk), *constants.values()]
        found, true = TracedGradient(L, inputs, trace), GradientGraph(L, params, chunk)
        v = torch.linspace(-1, 1, L.num_params, dtype=L.dtype, device=L.device).sin()
        found.product(v)
        pairs = [(found.losses, true.losses), (found.gradient, true.gradient), (found.product(v), true.product(v))]
        eps = torch.finfo(L.dtype).eps
        if not all(bool((a - b).norm() <= 1e3 * eps * b.norm()) for a, b in pairs):
            raise NotTraceable("the recorded operations gave other numbers than the model")

    def has(self, chunk: Chunk) -> bool:
        """Whether there is a recording for a chunk."""
        return self.made.get(_key(chunk)) is not None

    def of(self, chunk: Chunk) -> Linearized:
        """The recording of a chunk, which was made."""
        trace = self.made[_key(chunk)]
        assert trace is not None
        return trace

    def refuse(self) -> None:
        """Forget recordings that are not the function any more."""
        self.strikes += 1
        for made in (self.made, self.compiled, self.captured or {}):
            made.clear()
        _log.warning(
            "the loss is another function than when its Hessian-vector products were traced: something that it reads is no "
            "tensor, and has changed; the trace was dropped"
        )


def still_true(point: ChunkGradient, L: Objective, params: list[Tensor], chunk: Chunk) -> bool:
    """Whether the losses of the first examples, evaluated anew, are those of the recording."""
    few = slice(0, 2)
    positions = slice(chunk.positions.start, min(chunk.positions.start + 2, chunk.positions.stop))
    weights = None if chunk.weights is None else chunk.weights[few]
    with torch.no_grad():
        now = L.losses(params, replace(chunk, positions=positions, batch=take(chunk.batch, few), weights=weights))
    then = point.losses[: len(now)]
    return bool(((now - then).abs() <= 1e3 * torch.finfo(L.dtype).eps * (1 + now.abs())).all())


def recordings(L: Objective) -> Recordings:
    """Those of an objective, kept with it."""
    found = vars(L).get("_recordings")
    if found is None:
        found = L._recordings = Recordings()  # type: ignore[attr-defined]
    return found


def _inputs(chunk: Chunk) -> list[Tensor]:
    return [*([] if chunk.weights is None else [chunk.weights]), *leaves(chunk.batch)]


def _key(chunk: Chunk) -> Hashable:
    return chunk.weights is None, repr(tree_map(lambda t: (tuple(t.shape), t.dtype), chunk.batch))
