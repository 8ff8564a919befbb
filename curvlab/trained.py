"""The objective that training minimizes, loss and penalties and weight decay, as another function of one flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .linalg.probes import generator
from .objective import Chunk, Objective
from .regularizers import registry as regularizers
from .regularizers.micro_batch import MicroBatch
from .regularizers.sites import Measured
from .regularizers.vectors import without_third_derivative
from .sharded import require_gathered


class TrainedObjective(Objective):
    """L(w) + Σ strength · R(w) + (weight_decay/2) ‖w‖² over the data of L, cut in its order into micro-batches.

    Everything that needs values, gradients and Hessian-vector products of an objective works on it: its Hessian is exact, by
    differentiating the penalty's gradient again. What needs examples by themselves or the model's outputs does not exist:
    a penalty couples the examples of its micro-batch. A penalty that draws (labels, u) keeps one draw for each micro-batch.

    Args:
        L: the objective that is measured.
        penalties: pairs (strength, regularizer), as for `train`.
        micro_batch_size: |M|; default all data, which then is one chunk.
        weight_decay: of an optimizer that adds it to the gradient (not of AdamW, whose decay is no part of a loss).
        seed: of what penalties draw.

    Example:
        >>> import torch, curvlab as cl
        >>> L = cl.Objective(torch.nn.Linear(2, 1), "squared_error", (torch.eye(2), torch.zeros(2, 1)))
        >>> H, decayed = cl.dense(cl.hessian(L)), cl.dense(cl.hessian(TrainedObjective(L, weight_decay=0.25)))
        >>> torch.equal(decayed, H + 0.25 * torch.eye(3))
        True

    Raises:
        ValueError, TypeError: a penalty that is no mean over micro-batches of a function of each with a Hessian, or whose
            third derivatives, which its Hessian needs, PyTorch gets wrong.
    """

    def __init__(
        self,
        L: Objective,
        penalties: Iterable[tuple[float, regularizers.Request]] = (),
        *,
        micro_batch_size: int | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        require_gathered(L, "penalties and weight decay")
        self.__dict__.update(
            {k: v for k, v in vars(L).items() if k not in ("chunk_size", "graph_bytes", "_layer_rules", "_recordings")}
        )
        self.outcomes = {}  # penalties are differentiated once more
        self.plain = L
        self.terms = [term for term in regularizers.terms(penalties) if term[0]]
        self.weight_decay, self.seed = weight_decay, seed
        size = regularizers.checked_size(micro_batch_size)
        self.given_chunk_size = (size or L.size) if self.terms else L.given_chunk_size
        for _, entry, _ in self.terms:
            regularizers.require(L, entry)
            if entry.sampled or entry.first_order:
                raise ValueError(
                    f"{entry.name} is no mean over micro-batches of a function that has a Hessian; measure the loss itself, "
                    "without the prefix trained/"
                )
        self._refuse_wrong_derivatives()

    def double(self) -> TrainedObjective:
        """The same objective, evaluated in float64."""
        other = super().double()
        assert isinstance(other, TrainedObjective)
        other.plain = self.plain.double()
        return other

    def describe(self) -> dict[str, Any]:
        """Also what is added to the loss."""
        penalties = [[strength, entry.name, options] for strength, entry, options in self.terms]
        return super().describe() | {"penalties": penalties, "weight_decay": self.weight_decay}

    @property
    def coupled(self) -> str | None:
        """The penalties, which couple the examples of a micro-batch."""
        names = [entry.name for _, entry, _ in self.terms]
        return f"the penalty {', '.join(names)}" if names else self.plain.coupled

    @contextmanager
    def measuring(self, constants: dict[str, Tensor] | None = None) -> Iterator[None]:
        """The state guard of the plain objective."""
        with self.plain.measuring(constants):
            yield

    def losses(self, params: list[Tensor], chunk: Chunk) -> Tensor:
        """s_i ℓ_i plus the penalties of the micro-batch `chunk` and weight decay, (B,), differentiable in `params`."""
        losses = self._penalized(params, chunk) if self.terms else self.plain.losses(params, chunk)
        if self.weight_decay:
            losses = losses + self.weight_decay / 2 * torch.stack([p.square().sum() for p in params]).sum()
        return losses

    def _penalized(self, params: list[Tensor], chunk: Chunk) -> Tensor:
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():  # a penalty's value needs gradients too
            m = MicroBatch(Measured(self.plain, params), chunk, graph=True)
            losses = m.losses
            for strength, entry, options in self.terms:
                m.generator = generator(self.seed, f"{entry.name} {chunk.seed}")
                losses = losses + strength * entry.term(m, **options)
        return losses if wanted else losses.detach()

    def outputs(self, params: list[Tensor], chunk: Chunk) -> Tensor:
        """Not defined: the trained objective is no function of the outputs alone.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "the trained objective is no function of the model's outputs alone; measure the loss itself, without the prefix "
            "trained/"
        )

    def _refuse_wrong_derivatives(self) -> None:
        if not self.terms:
            return
        with self.measuring(), torch.enable_grad():
            params = self.leaves_at()
            layer = without_third_derivative(self.losses(params, self.first(2)).sum())
        if layer:
            raise ValueError(
                f"the Hessian of a penalty on gradients needs third derivatives, and PyTorch's are silently wrong through "
                f"{layer}; measure the loss itself, without the prefix trained/, or use GroupNorm or RMSNorm"
            )
