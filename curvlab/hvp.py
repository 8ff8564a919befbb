"""Hessian-vector products at one point: three engines, and which one is used when."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .objective import Chunk, Objective

Engine = Literal["auto", "graph", "double_backward", "forward_over_reverse"]
ENGINES = ("graph", "double_backward", "forward_over_reverse")


class HessianProducts:
    """H(w) @ V for one objective at one point, exactly, summed over chunks of the data.

    Engines (all agree to rounding):

    - ``"graph"``: the gradient is computed once with its graph, which is kept; a product is one backward pass through
      it, about 1.4-2.2 gradients. Also gives the loss and the gradient. Chunks whose graphs do not fit in half of the
      objective's `memory` are rebuilt, once for each block of vectors.
    - ``"double_backward"``: the same with nothing kept: 2.4-3.5 gradients, memory of one chunk.
    - ``"forward_over_reverse"``: forward-mode derivative of the gradient (`torch.func.jvp` of `torch.func.grad`): 2-3
      gradients, no kept graph; needs forward-mode rules, which some layers (LSTM) lack.
    - ``"auto"``: ``"graph"``, which becomes ``"double_backward"`` chunk by chunk where memory ends.

    Reverse-over-reverse and forward-over-reverse are the two orders that PyTorch gets right through LayerNorm and
    BatchNorm; others are silently wrong (pytorch issues 175754, 186256).

    Args:
        batch: indices of the examples whose mean loss is differentiated; default all.

    Attributes:
        engine: the engine in use.
        kept: number of chunks whose graphs are kept, of `len(chunks)`.
    """

    def __init__(
        self, objective: Objective, w: Tensor, *, engine: Engine = "auto", batch: Tensor | None = None
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
        self.engine = "graph" if engine == "auto" else engine
        self.w = objective.point(w)
        self.chunks = objective.pieces(batch, objective.chunk_size)
        self.constants = objective.constants()
        self.size = sum(chunk.size for chunk in self.chunks)
        self.kept = 0
        if self.engine == "graph":
            self.kept = min(len(self.chunks), objective.graphs_that_fit)
        self._graphs: list[_GradientGraph] = []
        self._value_and_gradient: tuple[Tensor, Tensor] | None = None

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """L(w), float64 scalar, and ∇L(w), (P,); builds the kept graphs on first use."""
        if self._value_and_gradient is None:
            L = self.objective
            value = torch.zeros((), dtype=torch.float64, device=L.device)
            gradient = torch.zeros(L.num_params, dtype=L.dtype, device=L.device)
            with L.measuring(self.constants):
                for i, chunk in enumerate(self.chunks):
                    graph = _GradientGraph(L, self.w, L.place(chunk))
                    value, gradient = value + graph.value, gradient + graph.gradient
                    if i < self.kept:
                        self._graphs.append(graph)
            self._value_and_gradient = value / self.size, gradient / self.size
        return self._value_and_gradient

    def matmat(self, V: Tensor) -> Tensor:
        """H(w) @ V, (P, K) -> (P, K)."""
        L = self.objective
        if self.kept:
            self.value_and_gradient()
        with L.measuring(self.constants):
            total = torch.zeros_like(V)
            if not V.shape[1]:
                return total
            for i, chunk in enumerate(self.chunks):
                if self.engine == "forward_over_reverse":
                    columns = [self._jvp_of_gradient(L.place(chunk), v) for v in V.T]
                else:
                    graph = self._graphs[i] if i < self.kept else _GradientGraph(L, self.w, L.place(chunk))
                    columns = [graph.product(v) for v in V.T]
                total += torch.stack(columns, 1)
            return total / self.size

    def _jvp_of_gradient(self, chunk: Chunk, v: Tensor) -> Tensor:
        L = self.objective
        params = [p.detach() for p in L.leaves_at(self.w)]
        gradient = torch.func.grad(lambda p: L.losses(p, chunk).sum())
        return L.join(torch.func.jvp(gradient, (params,), (L.split(v.contiguous()),))[1])


class _GradientGraph:
    """The gradient of the summed loss of one chunk, with the graph that leads to it."""

    def __init__(self, objective: Objective, w: Tensor, chunk: Chunk) -> None:
        self.objective = objective
        params = objective.leaves_at(w)
        losses = objective.losses(params, chunk)
        grads = objective.grads(losses.sum(), params, create_graph=True)
        self.value = losses.detach().double().sum()
        self.gradient = objective.join([g.detach() for g in grads])
        # Only gradients that vary with the parameters, and parameters that they vary with, take part in products.
        self._varying = [i for i, g in enumerate(grads) if g.requires_grad]
        self._grads = [grads[i] for i in self._varying]
        self._params = params

    def product(self, v: Tensor) -> Tensor:
        if not self._varying:  # the loss is linear in the parameters
            return torch.zeros_like(v)
        parts = self.objective.split(v.contiguous())
        found = torch.autograd.grad(
            self._grads, self._params, [parts[i] for i in self._varying], retain_graph=True, allow_unused=True
        )
        return self.objective.join(
            [torch.zeros_like(p) if h is None else h for p, h in zip(self._params, found, strict=True)]
        )
