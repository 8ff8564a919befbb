"""The closure of one training step: a batch's gradient on the live model, by micro-batches, with penalties."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .linalg.probes import generator as keyed
from .objective import Objective
from .regularizers.micro_batch import MicroBatch, MicroBatches
from .regularizers.registry import Request, checked_size, require, terms
from .regularizers.sites import Trained, second_derivatives
from .self_check import check_products
from .sharded import require_whole


class BatchGradient:
    """The gradient of L_B + Σ strength·penalty in the `.grad` of the live model, in its own mode.

    Calling it zeroes `.grad`, accumulates the gradient micro-batch by micro-batch with the memory of one, and returns the
    mean loss L_B, without penalties. Loss and penalties of a micro-batch share the forward pass, and penalties on its
    gradient share that gradient's graph, so that a call with GN costs less than three without. BatchNorm has the statistics
    of each micro-batch; what is drawn (labels, u, S) is the same in every call, so an optimizer may call again.

    Args:
        batch: indices into the data of L, or a batch of data.
        micro_batch_size: |M|; default the whole batch.
        penalties: pairs (strength, regularizer); those of strength 0 are left out.
        generator: seeds what penalties draw; default torch's own.

    Attributes:
        penalties: values of the penalties by name, after a call.
        penalty: Σ strength·value, after a call.
        micro_norms: ‖∇L_M‖ of each micro-batch after a call, if they came at no cost; otherwise None.

    Raises:
        ValueError: a micro-batch size below 1; a penalty that is unknown, comes twice, or does not exist for this loss, or
            one that needs second derivatives where those of the model are wrong.

    Example:
        >>> import torch, curvlab as cl
        >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.arange(8) % 2)
        >>> L = cl.Objective(model, "cross_entropy", data)
        >>> closure = BatchGradient(L, data, micro_batch_size=4, penalties=[(0.01, "gradient_norm")])
        >>> loss = closure()
        >>> torch.optim.SGD(model.parameters(), lr=0.1).step()
    """

    def __init__(
        self,
        L: Objective,
        batch: Any,
        *,
        micro_batch_size: int | None = None,
        penalties: Iterable[tuple[float, Request]] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        require_whole(L, "steps of curvlab.train")
        self.L = L
        self.pieces = L.pieces(batch, checked_size(micro_batch_size))
        self.terms = [term for term in terms(penalties) if term[0]]
        for _, entry, _ in self.terms:
            L.ranks.require_one(f"micro-batches of the penalty {entry.name}")
            require(L, entry)
        if not L.checked and any(not entry.first_order for _, entry, _ in self.terms):
            check_products(L, L.params())  # the gradient of such a penalty is a product with H
        here = torch.tensor(sum(piece.size for piece in self.pieces), device=L.device)
        self.size = int(L.ranks.sum(here)[0])
        self.penalties: dict[str, float] = {}
        self.penalty = 0.0
        self.micro_norms: list[float] | None = None
        self._seed = 0
        if any(entry.draws for _, entry, _ in self.terms):
            self._seed = int(torch.randint(2**62, (), generator=generator))

    @property
    def micro_batches(self) -> int:
        """How many micro-batches the batch has."""
        return len(self.pieces)

    def __call__(self) -> float:
        """Accumulate the gradient of loss and penalties in `.grad`; returns the mean loss."""
        self._zero()
        batches = MicroBatches(Trained(self.L, live=True), self.pieces, graph=bool(self.terms))
        generators = [keyed(self._seed, entry.name) for _, entry, _ in self.terms]
        weights = [entry.weights(batches, g) for (_, entry, _), g in zip(self.terms, generators, strict=True)]
        values: list[list[Tensor]] = [[] for _ in self.terms]
        squares: list[Tensor | None] = []
        total = 0.0
        with self._kernels():
            for i, m in enumerate(batches):
                loss = m.losses.sum() / self.size
                objective = loss
                for k, (strength, entry, options) in enumerate(self.terms):
                    if weights[k][i]:
                        m.generator = generators[k]
                        term = weights[k][i] * entry.term(m, **options)
                        objective = objective + strength * term
                        values[k].append(term.detach())
                squares.append(vars(m).get("squared_gradient_norm"))
                _backward(objective)
                total += float(m.losses.detach().double().sum()) / self.size
        total = self._summed(total)
        sums = [float(torch.stack(found).double().sum()) for found in values]
        self.penalties = {entry.name: value for (_, entry, _), value in zip(self.terms, sums, strict=True)}
        self.penalty = sum(strength * value for (strength, _, _), value in zip(self.terms, sums, strict=True))
        free = [float(square.detach().sqrt()) for square in squares if square is not None]
        self.micro_norms = free if len(free) == len(squares) else None
        return total

    def _summed(self, total: float) -> float:
        """The gradient of all ranks in `.grad`, and their loss."""
        ranks = self.L.ranks
        if ranks.count == 1:
            return total
        params = [p for p in self.L._call.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        loss, *summed = ranks.sum(torch.tensor(total, dtype=torch.float64, device=self.L.device), *grads)
        for p, grad in zip(params, summed, strict=True):
            p.grad = grad.clone()
        return float(loss)

    def micro(self, i: int) -> float:
        """The gradient of the i-th micro-batch's mean loss in `.grad`, without penalties; returns that loss."""
        self.L.ranks.require_one("gradients of single micro-batches")
        self._zero()
        m = MicroBatch(Trained(self.L, live=True), self.pieces[i], graph=False)
        _backward(m.loss)
        return float(m.loss.detach())

    def objective(self) -> float:
        """The same as a call, but the value returned is that of the trained objective, L_B + Σ strength·penalty."""
        return self() + self.penalty

    def _zero(self) -> None:
        for p in self.L._call.parameters():  # those of the model, and of a loss that is a module
            p.grad = None

    def _kernels(self) -> contextlib.AbstractContextManager[None]:
        second = any(not entry.first_order for _, entry, _ in self.terms)
        return second_derivatives(self.L.model) if second else contextlib.nullcontext()


def _backward(value: Tensor) -> None:
    if value.requires_grad:  # otherwise it does not depend on the parameters
        value.backward()
