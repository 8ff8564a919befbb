"""Per-example gradients without forming them: their squared norms, inner products, products g_i·q, sums Σ c_i g_i."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from .capture import Capture, layers_of, places_of
from .layers import Part, Rows
from .memory import require
from .objective import Chunk, Objective
from .sharded import require_gathered

FORMED = 64  # example gradients that are formed at once
Scalars = Callable[[list[Tensor], Chunk], Tensor]


class ExampleGradients:
    """The N x P matrix of per-example gradients g_i = s_i ∇ℓ_i(w) at one point, known by what one asks of it.

    One forward and backward pass captures, for every layer with a rule in `curvlab.layers` (linear, convolution, embedding,
    layer, group and batch normalization), its inputs a_i and output gradients δ_i. For a linear layer g_i is their outer
    product, summed over positions, so that

        ‖g_i‖² = ‖a_i‖²‖δ_i‖²  (or a Gram product over positions),   g_i·q = δ_iᵀ Q a_i,   Σ c_i g_i = Σ c_i δ_i a_iᵀ

    cost about a matrix product a layer. The other parameters go by vmap, as do layers where the rule does not apply: used
    twice, tied, called with reshaped examples. Which is which is not guessed but checked: on first use a random combination
    Σ c_i g_i of five examples must equal the backward pass, parameter by parameter.

    Captures are kept while they fit in a quarter of the objective's `memory`; beyond that each request runs through the
    data again.

    Args:
        along: (N, C) vectors u_i; the gradients are then those of u_i·f(x_i), J_iᵀ u_i, instead of those of the losses.
        heard: what another pass over the data at w has captured already; chunks that are not among them have a pass here.

    Attributes:
        rules: how each parameter is treated, ``"layer"`` or ``"vmap"``, by name.

    Source: Goodfellow 2015 (arXiv 1510.01799) for linear layers; Rochette et al. 2019 (arXiv 1912.06015) for convolutions.
    """

    def __init__(
        self, objective: Objective, w: Tensor, *, along: Tensor | None = None, heard: Iterable[Capture] = ()
    ) -> None:
        objective.require_examples("per-example gradients")
        require_gathered(objective, "per-example gradients")
        self.objective = L = objective
        self.w = objective.point(w)
        self._along = along
        self._heard = {capture.positions.start: capture for capture in heard}
        self._scalars: Scalars = L.losses if along is None else self._projected
        self._layers = layers_of(L)
        self.rules = {name: "layer" if name in self._layers else "vmap" for name in L.names}
        self._formed = [name for name in L.names if name not in self._layers]
        numbers = sum(size for name, size in zip(L.names, L.sizes, strict=True) if name not in self._layers)
        self._chunk_size = L.chunk_size
        if numbers and L.given_chunk_size is None:
            fit = L.memory / 4 / (numbers * torch.finfo(L.dtype).bits // 8)
            self._chunk_size = max(1, min(L.chunk_size, int(fit)))
        self._kept: dict[int, list[Part]] = {}
        self._kept_bytes = 0
        self._squared_norms: Tensor | None = None

    def squared_norms(self) -> Tensor:
        """‖g_i‖², (N,) float64."""
        if self._squared_norms is None:
            norms = [_total(p.squared_norms() for p in parts) for _, parts in self._captures()]
            self._squared_norms = self._of_all(norms, self.w.new_zeros(0, dtype=torch.float64))
        return self._squared_norms

    def dot(self, V: Tensor) -> Tensor:
        """g_i·v_k, (N, K), for V of shape (P, K)."""
        self.objective.ranks.agree("the vectors of a product", V)
        return self._of_all([_total(p.dot(V) for p in parts) for _, parts in self._captures()], V[:0])

    def combine(self, C: Tensor) -> Tensor:
        """Σ_i c_ik g_i, (P, K), for coefficients C of shape (N, K)."""
        total = torch.zeros(self.objective.num_params, C.shape[1], dtype=C.dtype, device=C.device)
        for chunk, parts in self._captures():
            for p in parts:
                p.add_combination(C[chunk.positions], total)
        return self.objective.ranks.sum(total)[0]

    def gram(self) -> Tensor:
        """g_i·g_j, (N, N): memory N², and one pass over pairs of chunks.

        Raises:
            MemoryError: they would not fit in the memory that is free.
        """
        L = self.objective
        fix = "measure fewer examples: L.restricted(indices)"
        require(L.size**2 * L.dtype.itemsize, L.device, f"the Gram matrix of {L.size} examples", fix)
        out = torch.empty(L.size, L.size, dtype=L.dtype, device=L.device)
        if L.ranks.count > 1:  # the gradients of some examples at a time, formed where they are
            for lo in range(0, L.size, FORMED):
                some = torch.eye(L.size, dtype=L.dtype, device=L.device)[:, lo : lo + FORMED]
                out[:, lo : lo + FORMED] = self.dot(self.combine(some))
            return out
        for chunk, parts in self._captures():
            for other, others in self._captures():
                if other.positions.start >= chunk.positions.start:
                    if [p.key for p in parts] == [q.key for q in others]:
                        block = _total(p.gram(q) for p, q in zip(parts, others, strict=True))
                    else:
                        block = self._form(chunk, L.names).gram(self._form(other, L.names))
                    out[chunk.positions, other.positions] = block
                    out[other.positions, chunk.positions] = block.T
        return out

    def _of_all(self, rows: list[Tensor], empty: Tensor) -> Tensor:
        """Rows of this rank's chunks as those of all examples."""
        return self.objective.ranks.gather(torch.cat(rows or [empty]), self.objective.size)

    def _captures(self) -> Iterator[tuple[Chunk, list[Part]]]:
        L = self.objective
        for i, chunk in enumerate(L.chunks(size=self._chunk_size)):
            if self._along is not None:
                chunk = replace(chunk, batch=(chunk.batch, self._along[chunk.positions]), weights=None)
            parts = self._kept.get(i)
            if parts is None:
                with L.measuring():
                    parts, used = self._captured(chunk)
                    # a layer may be called otherwise on other examples than on those of the check
                    lost = [name for name, module in self._layers.items() if module not in used]
                    if self._formed or lost:
                        parts.append(self._form(chunk, self._formed + lost))
                size = sum(p.nbytes() for p in parts)
                if self._kept_bytes + size <= L.memory / 4:
                    self._kept[i], self._kept_bytes = parts, self._kept_bytes + size
            yield chunk, parts

    def _captured(self, chunk: Chunk) -> tuple[list[Part], set[nn.Module | None]]:
        heard = self._heard.get(chunk.positions.start)
        if heard is not None and heard.positions == chunk.positions:
            if self._along is not None:
                return heard.parts_along(self._along[chunk.positions])
            if heard.deltas is not None:
                return heard.parts(heard.deltas)
        with Capture(self.objective, chunk, self._layers) as capture:
            values = self._scalars(self.objective.leaves_at(self.w), chunk)
        return capture.parts_of(values)

    def _projected(self, params: list[Tensor], chunk: Chunk) -> Tensor:
        batch, along = chunk.batch
        return (self.objective.outputs(params, replace(chunk, batch=batch)) * along).flatten(1).sum(1)

    def _form(self, chunk: Chunk, names: list[str]) -> Rows:
        """Example gradients of the parameters without a rule, by vmap, or by a loop where vmap cannot."""
        places = places_of(self.objective)
        names = [n for n in self.objective.names if n in names]
        where = torch.cat([torch.arange(places[n].start, places[n].stop) for n in names])
        params = [p.detach() for p in self.objective.leaves_at(self.w)]
        rows = self.objective.chunk_gradients(params, chunk, names, self._scalars)
        return Rows(rows, where.to(self.objective.device))


def _total(terms: Iterator[Tensor]) -> Tensor:
    first = next(terms)
    return sum(terms, first)
