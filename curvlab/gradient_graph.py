"""The gradient of one chunk of data and what its Hessian-vector products need: as autograd's graph, or as a recording of
the operations that are in it, which is made once for each shape of a chunk."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .batches import leaves, take, tree_map
from .capture import Capture
from .linearize import Linearized, NotTraceable, linearize
from .objective import Chunk, Objective

SHAPES = 8  # recordings of one objective
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
        self._grads = [grads[i] for i in self._varying]
        self._params = params

    def products(self, parts: list[Tensor]) -> list[Tensor]:
        if not self._varying:  # the loss is linear in the parameters
            return [torch.zeros_like(p) for p in self._params]
        vectors = [parts[i] for i in self._varying]
        found = torch.autograd.grad(self._grads, self._params, vectors, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if h is None else h for p, h in zip(self._params, found, strict=True)]


class TracedGradient(ChunkGradient):
    """By a recording, without autograd."""

    def __init__(
        self,
        objective: Objective,
        params: list[Tensor],
        chunk: Chunk,
        trace: Linearized,
        constants: dict[str, Tensor],
    ) -> None:
        self.objective, self._second = objective, trace.second
        with torch.no_grad():
            values, self._needed = trace.first(*params, *_inputs(chunk), *constants.values())
        self.losses, *self.grads = values

    def products(self, parts: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return self._second(*self._needed, *parts)


@dataclass
class Recordings:
    """The recordings of one objective, by what they depend on: shapes, and all of a batch that is no tensor.

    Attributes:
        made: None where a recording cannot be made.
        strikes: points at which a recording was not the function any more.
    """

    made: dict[Hashable, Linearized | None] = field(default_factory=dict)
    compiled: dict[Hashable, Linearized] = field(default_factory=dict)
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
        found, true = TracedGradient(L, params, chunk, trace, constants), GradientGraph(L, params, chunk)
        v = torch.linspace(-1, 1, L.num_params, dtype=L.dtype, device=L.device).sin()
        found.product(v)
        pairs = [(found.losses, true.losses), (found.gradient, true.gradient), (found.product(v), true.product(v))]
        eps = torch.finfo(L.dtype).eps
        if not all(bool((a - b).norm() <= 1e3 * eps * b.norm()) for a, b in pairs):
            raise NotTraceable("the recorded operations gave other numbers than the model")

    def compile(self, chunk: Chunk) -> Linearized:
        """The recording of a chunk, compiled on first use."""
        key, trace = _key(chunk), self.of(chunk)
        if key not in self.compiled:
            self.compiled[key] = trace.compiled()
        return self.compiled[key]

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
        self.made.clear()
        self.compiled.clear()
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
