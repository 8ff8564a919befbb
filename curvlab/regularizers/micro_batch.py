"""Micro-batches at given parameters: their loss, gradient and outputs, each computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..batches import take
from ..objective import Chunk
from .sites import Measured, Site, Statistics, coupled, random_state, repeated
from .vectors import squared_norm


class MicroBatch:
    """One micro-batch M, as regularizers see it.

    Attributes:
        loss: L_M = (1/|M|) Σ s_i ℓ_i, a scalar.
        gradient: ∇L_M as a list in the shapes of the parameters; with its graph if `graph`.
        squared_gradient_norm: ‖∇L_M‖², a scalar, likewise.
        outputs: of the model, (|M|, ...).
        batch_gradient: ∇L_B of the whole batch; a constant, unless all graphs are kept.
        range: positions of a part within its micro-batch.
        generator: of draws.
        graph: whether gradients are wanted, and so graphs kept. If not, large micro-batches are evaluated in `parts`.
    """

    def __init__(self, site: Site, chunk: Chunk, *, graph: bool, owner: MicroBatches | None = None) -> None:
        self.site, self.chunk, self.graph = site, chunk, graph
        self.L, self.params, self.size = site.L, site.params, chunk.size
        self.range = slice(0, chunk.size)
        self.generator: torch.Generator | None = None
        self._owner = owner

    @cached_property
    def losses(self) -> Tensor:
        """s_i ℓ_i, (|M|,)."""
        if not self.site.shares_outputs:
            self._remember()
            with Statistics(self.size):
                return self.site.losses(self.placed)
        losses = self.L._call.loss(self._outputs, self.placed.batch[1])
        return losses if self.placed.weights is None else losses * self.placed.weights

    @cached_property
    def loss(self) -> Tensor:
        return self.losses.sum() / self.size

    @cached_property
    def gradient(self) -> list[Tensor]:
        return self.mean_gradient(lambda part: part.losses, weighted=True)

    @cached_property
    def squared_gradient_norm(self) -> Tensor:
        return squared_norm(self.gradient)

    @cached_property
    def plain_gradient(self) -> list[Tensor]:
        """∇L_M without its graph."""
        if not self.graph or "gradient" in vars(self):
            return [g.detach() for g in self.gradient]
        return self.L.grads(self.loss, self.params, retain_graph=True)

    @property
    def batch_gradient(self) -> list[Tensor]:
        if self._owner is None:
            raise TypeError(
                "the penalty looks at the gradient of the whole batch, which the trained objective, made of micro-batches, "
                "does not have; measure the loss itself, without the prefix trained/"
            )
        return self._owner.gradient

    @property
    def outputs(self) -> Tensor:
        """The model's outputs, (|M|, ...).

        Raises:
            TypeError: the model returns something else than one tensor.
        """
        if not isinstance(self._outputs, Tensor):
            raise TypeError(
                f"the model returned a {type(self._outputs).__name__}; this penalty needs outputs that are one tensor "
                "(B, ...): wrap the model so that it returns it"
            )
        return self._outputs

    def mean_gradient(self, scalars: Callable[[MicroBatch], Tensor], *, weighted: bool = False) -> list[Tensor]:
        """∇ (1/|M|) Σ s_i φ_i for scalars φ_i of the examples, (|M|,), that are made from a part of the micro-batch.

        `weighted`: they contain the weights s_i already.
        """
        total: list[Tensor] = []
        for part in self.parts:
            values = scalars(part)
            if not weighted and part.placed.weights is not None:
                values = values * part.placed.weights
            # The forward graph stays for others that share it.
            keep = self.graph or part is self
            mean = values.sum() / self.size
            found = self.L.grads(mean, self.params, create_graph=self.graph, retain_graph=keep)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return total

    def gradient_at(self, params: list[Tensor]) -> list[Tensor]:
        """∇L_M at other parameters, with the same dropout masks; leaves no trace in the model."""
        leaves = [p.detach().requires_grad_() for p in params]
        _ = self.losses  # whose masks are repeated
        with repeated(self._before):
            mean = self.site.untouched().losses(self.placed, leaves).sum() / self.size
        return self.L.grads(mean, leaves)

    @cached_property
    def placed(self) -> Chunk:
        return self.site.place(self.chunk)

    @property
    def parts(self) -> list[MicroBatch]:
        """The micro-batch in parts that fit in the objective's memory; itself where graphs are kept or examples coupled."""
        step = self.L.chunk_size if isinstance(self.site, Measured) else self.size
        if self.graph or step >= self.size or coupled(self.L.model):
            return [self]
        return [self._part(slice(lo, min(lo + step, self.size))) for lo in range(0, self.size, step)]

    def _part(self, r: slice) -> MicroBatch:
        weights = None if self.chunk.weights is None else self.chunk.weights[r]
        piece = replace(self.chunk, positions=r, batch=take(self.chunk.batch, r), weights=weights)
        part = MicroBatch(self.site, piece, graph=False)
        part.range = r
        return part

    @cached_property
    def _outputs(self) -> Any:
        self._remember()
        with Statistics(self.size):
            return self.site.outputs(self.placed)

    def _remember(self) -> None:
        if self.graph:  # for the masks of `gradient_at`
            self._before = random_state()


class MicroBatches:
    """The micro-batches of a batch, one after the other; with `keep`, all of them at once.

    Attributes:
        weights: |M|/|B| of each.
        gradient: ∇L_B = Σ_M (|M|/|B|) ∇L_M, by a pass of its own over the data with the same dropout masks.
    """

    def __init__(self, site: Site, pieces: list[Chunk], *, graph: bool, keep: bool = False) -> None:
        self.site, self.pieces, self.graph, self.keep = site, pieces, graph, keep
        self.size = sum(piece.size for piece in pieces)
        self.weights = [piece.size / self.size for piece in pieces]
        self._before = random_state()

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._members) if self.keep else map(self._member, self.pieces)

    @cached_property
    def gradient(self) -> list[Tensor]:
        if self.keep:
            return self._mean([m.gradient for m in self])
        site = self.site.untouched()
        with repeated(self._before):
            return self._mean(MicroBatch(site, piece, graph=False).gradient for piece in self.pieces)

    def _mean(self, gradients: Iterable[list[Tensor]]) -> list[Tensor]:
        total: list[Tensor] = []
        for weight, found in zip(self.weights, gradients, strict=True):
            total = (
                [a + weight * b for a, b in zip(total, found, strict=True)] if total else [weight * b for b in found]
            )
        return total

    @cached_property
    def _members(self) -> list[MicroBatch]:
        return [self._member(piece) for piece in self.pieces]

    def _member(self, piece: Chunk) -> MicroBatch:
        return MicroBatch(self.site, piece, graph=self.graph, owner=self)
