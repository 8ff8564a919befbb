"""Hessian-vector products at one point: the engines, and which one is used when."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from .capture import Capture, layers_of
from .gradient_graph import ChunkGradient, GradientGraph, TracedGradient, recordings, still_true
from .objective import Chunk, Objective

Engine = Literal["auto", "graph", "traced", "compiled", "double_backward", "forward_over_reverse"]
ENGINES: tuple[Engine, ...] = ("graph", "traced", "compiled", "double_backward", "forward_over_reverse")


class HessianProducts:
    """H(w) @ V for one objective at one point, exactly, summed over chunks of the data.

    Engines (all agree to rounding):

    - ``"graph"``: the gradient is computed once with its graph, which is kept; a product is one backward pass through
      it, about 1.9-2.5 gradients. Also gives the loss and the gradient. Chunks whose graphs do not fit in half of the
      objective's `memory` are rebuilt, once for each block of vectors.
    - ``"traced"``: the same operations, recorded once for each shape of a chunk (`curvlab.linearize`) and repeated
      without autograd at all later points: a product in 0.92-1.09 of the graph's time, least for small models and
      transformers, after a first part that takes 0.1-0.4 gradients more; mostly the same bits. Recording takes 0.3-5 s.
      Where a model cannot be recorded (control flow that depends on data, batch statistics), it is ``"graph"``, and one
      line of the log "curvlab" says why.
    - ``"compiled"``: the recording through `torch.compile`: 0.8-0.9 of the graph's time on a CPU, after 10-150 s of
      compiling.
    - ``"double_backward"``: as graph, with nothing kept: 3.1-3.7 gradients, memory of one chunk.
    - ``"forward_over_reverse"``: forward-mode derivative of the gradient (`torch.func.jvp` of `torch.func.grad`): 3-6
      gradients, no kept graph; needs forward-mode rules, which some layers (LSTM) lack.
    - ``"auto"``: ``"graph"``, which becomes ``"double_backward"`` chunk by chunk where memory ends. `curvlab bench hvp`
      compares the engines on a model of one's own.

    A recording holds for the operations that it has. If the model or the loss reads a number of Python that changes from
    step to step, the losses of two examples, evaluated anew at each point, are not the recording's, which is dropped.

    Reverse-over-reverse and forward-over-reverse are the two orders that PyTorch gets right through LayerNorm and
    BatchNorm; others are silently wrong (pytorch issues 175754, 186256).

    Args:
        batch: indices of the examples whose mean loss is differentiated; default all.
        listens: whether the pass that builds a kept graph also captures what example gradients need, as far as that fits in
            a quarter of the objective's `memory`; see `captures`.

    Attributes:
        engine: the engine in use.
        kept: number of chunks whose graphs are kept, of `len(chunks)`.
        reason: why, in words.
    """

    _points: list[ChunkGradient]
    _value_and_gradient: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        objective: Objective,
        w: Tensor,
        *,
        engine: Engine = "auto",
        batch: Tensor | None = None,
        listens: bool = False,
    ) -> None:
        if engine not in ("auto", *ENGINES):
            raise ValueError(f"engine is {engine!r}; expected 'auto' or one of {ENGINES}")
        padded = [n for n, m in objective.model.named_modules() if getattr(m, "padding_idx", None) is not None]
        if engine == "forward_over_reverse" and padded:  # its rule in PyTorch lets the padding row through
            raise ValueError(
                f"{padded[0]} has a padding_idx, whose forward-mode derivative is silently wrong; use engine='graph' or "
                "'double_backward'"
            )
        self.objective = objective
        with torch.inference_mode(False):  # a copy that can be differentiated
            self.w = objective.point(w)
        self.constants = objective.constants()
        self._asked, self._batch, self._listens = engine, batch, listens
        self._recordings = recordings(objective)
        self._cut()
        self.size = sum(chunk.size for chunk in self.chunks)

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """L(w), float64 scalar, and ∇L(w), (P,); builds the kept graphs on first use."""
        if self._value_and_gradient is None:
            self._value_and_gradient = self.objective.fitting(self._built, self._cut)
        return self._value_and_gradient

    def matmat(self, V: Tensor) -> Tensor:
        """H(w) @ V, (P, K) -> (P, K)."""
        return self.objective.fitting(lambda: self._product(V), self._cut)

    @property
    def reason(self) -> str:
        """Why the engine in use is the one: what was asked for, whether it could be recorded, and what fits in memory."""
        chunks = len(self.chunks)
        if self.engine in ("double_backward", "forward_over_reverse"):
            return f"{self.engine} was asked for, and keeps nothing"
        if self._asked in ("traced", "compiled") and self.engine == "graph":
            why = f"{self._asked} was asked for, but nothing could be recorded (the log has the reason)"
        else:
            why = "auto takes graph" if self._asked == "auto" else f"{self.engine} was asked for"
        rest = "" if self.kept == chunks else "; the others are rebuilt for each block of vectors"
        return f"{why}; half of {self.objective.memory / 2**20:.4g} MiB keeps {self.kept} of {chunks} chunks{rest}"

    @property
    def captures(self) -> list[Capture]:
        """What was heard of the layers while the graphs were built, a capture for each chunk that had room."""
        self.value_and_gradient()
        return [point.capture for point in self._points if point.capture is not None]

    def _cut(self) -> None:
        """The data in chunks, with nothing computed."""
        self.chunks = self.objective.pieces(self._batch, self.objective.chunk_size)
        self.engine = self._chosen(self._asked)
        self.kept = min(len(self.chunks), self._room())
        self._points, self._value_and_gradient = [], None

    def _built(self) -> tuple[Tensor, Tensor]:
        L = self.objective
        points, values, gradient = [], [], torch.empty(0)
        owners, room = layers_of(L) if self._listens else None, L.memory / 4
        with L.measuring(self.constants):
            for i, chunk in enumerate(self.chunks):
                point = self._at(chunk, owners if i < self.kept and room > 0 else None, check=i == 0)
                values.append(point.value)
                gradient = gradient.add_(point.gradient) if i else point.gradient
                if i < self.kept:
                    points.append(point)
                    room -= point.capture.nbytes if point.capture else 0
        self._points = points  # all of them or, after an error, none
        return torch.stack(values).sum() / self.size, gradient.div_(self.size)

    def _product(self, V: Tensor) -> Tensor:
        L = self.objective
        if self.kept:
            self.value_and_gradient()
        if not V.shape[1]:
            return torch.zeros_like(V)
        columns: list[Tensor] = []
        product: Callable[[Tensor], Tensor]
        with L.measuring(self.constants):
            for i, chunk in enumerate(self.chunks):
                if self.engine == "forward_over_reverse":
                    product = partial(self._jvp_of_gradient, L.place(chunk))
                else:
                    product = (self._points[i] if i < self.kept else self._at(chunk, check=i == 0)).product
                found = [product(v) for v in V.T]
                columns = [a.add_(b) for a, b in zip(columns, found, strict=True)] if columns else found
        total = columns[0][:, None] if len(columns) == 1 else torch.stack(columns, 1)
        return total.div_(self.size)

    def _chosen(self, engine: Engine) -> Engine:
        """The engine to use: a recording where it was asked for and can be made."""
        if engine not in ("traced", "compiled"):
            return "graph" if engine == "auto" else engine
        L, made = self.objective, self._recordings
        possible = all(made.find(L, self.w, L.place(chunk), self.constants) for chunk in self.chunks)
        return engine if possible else "graph"

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for products, beside parameters and data, as foreseen for chunks of full size."""
        L = self.objective
        each = self._recorded_bytes() if self.engine in ("traced", "compiled") else L.graph_bytes * L.chunk_size
        return int(self.kept * each)

    def _recorded_bytes(self) -> int:
        return max(self._recordings.of(chunk).nbytes for chunk in map(self.objective.place, self.chunks))

    def _room(self) -> int:
        """How many chunks may keep what products need, in half of the objective's memory."""
        if self.engine in ("traced", "compiled"):
            return int(self.objective.memory / 2 / max(1, self._recorded_bytes()))
        return self.objective.graphs_that_fit if self.engine == "graph" else 0

    def _at(self, chunk: Chunk, owners: dict[str, nn.Module] | None = None, *, check: bool) -> ChunkGradient:
        """The gradient of a chunk, and what its products need."""
        L = self.objective
        chunk, params = L.place(chunk), [p.detach().requires_grad_() for p in L.split(self.w)]  # w is a copy of our own
        if self.engine in ("traced", "compiled") and self._recordings.has(chunk):  # others may have dropped it
            find = self._recordings.compile if self.engine == "compiled" else self._recordings.of
            point = TracedGradient(L, params, chunk, find(chunk), self.constants)
            if not check or still_true(point, L, params, chunk):
                return point
            self._recordings.refuse()
            self.engine = "graph"
        return GradientGraph(L, params, chunk, owners)

    def _jvp_of_gradient(self, chunk: Chunk, v: Tensor) -> Tensor:
        L = self.objective
        params = [p.detach() for p in L.leaves_at(self.w)]
        gradient = torch.func.grad(lambda p: L.losses(p, chunk).sum())
        return L.join(torch.func.jvp(gradient, (params,), (L.split(v.contiguous()),))[1])
