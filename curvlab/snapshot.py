"""One point of a training run: everything a diagnostic may look at, each shared intermediate computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .capture import Capture
from .hvp import MANY, Engine, HessianProducts
from .linalg import LinearOperator
from .linalg.probes import generator
from .measurement import Measurement
from .objective import Objective
from .operators import hessian
from .per_example import ExampleGradients

T = TypeVar("T")
LISTENS = "listens"  # what a run carries from the first snapshot on whose example gradients were asked for


@dataclass(frozen=True)
class Snapshot:
    """A point w_t, before its step is taken, and what the step is about to use.

    Attributes:
        objective: the loss that is measured.
        w: (P,) parameters, a copy.
        step: t.
        seed: of the probes; a diagnostic's stream is fixed by (seed, step, its name) alone.
        batch_size: of training, for S_b; a tuple gives curves over b.
        replacement: whether batches are drawn with replacement.
        lr: learning rate about to be used; None where the optimizer has none, or several.
        optimizer: name and settings of the optimizer, such as ``{"name": "SGD", "momentum": 0.0}``.
        batch: what was drawn to be trained on: indices into the data, or a batch of data; None stands for all data.
        micro_batch_size: |M|, of the parts in which the batch's gradient is accumulated; None for the whole batch.
        modes: train or eval of the model's modules while it trains, by name; None for those of measuring.
        penalties: values of the penalties that are trained, as they were drawn, by (name, *options).
        batch_gradient: (P,) gradient about to be used, of the batch that was drawn, with that of the penalties.
        known: L(w) and ∇L(w) where training has just computed them: the batch is all data, and nothing else is trained.
        preconditioner: (P,) what the step is about to divide the gradient by, entry by entry, for adaptive optimizers.
        test: objective over held-out data.
        trained: the same point of the objective that is trained, with penalties and weight decay.
        search: whether eigenpairs are searched for; False for the Rayleigh quotients of the vectors that earlier snapshots
            left.
        carry: what earlier snapshots of the run left for later ones (warm starts, pooled variances); None for a point
            on its own. A diagnostic keeps its state under its own key.
        measurements: by name, filled in as they are made.
        alone: seconds that each of them would take on its own, with what others had computed for it.
        errors: of the products by differences that went into what was asked for, in that order; see `LinearOperator`.
    """

    objective: Objective
    w: Tensor
    step: int = 0
    seed: int = 0
    batch_size: int | tuple[int, ...] | None = None
    replacement: bool = False
    lr: float | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    batch: Any = None
    micro_batch_size: int | None = None
    modes: dict[str, bool] | None = None
    penalties: dict[tuple, float] = field(default_factory=dict)
    batch_gradient: Tensor | None = None
    known: tuple[float, Tensor] | None = None
    preconditioner: Tensor | None = None
    test: Objective | None = None
    trained: Snapshot | None = None
    search: bool = True
    carry: dict[Hashable, Any] | None = None
    engine: Engine = "auto"
    measurements: dict[str, Measurement] = field(default_factory=dict)
    _shared: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    alone: dict[str, float] = field(default_factory=dict)
    errors: list[tuple[float, float]] = field(default_factory=list, repr=False)
    _inherited: dict[Hashable, list[tuple[float, float]]] = field(default_factory=dict, repr=False)
    _prices: dict[Hashable, float] = field(default_factory=lambda: {"": 0.0}, repr=False)
    _asked: set[Hashable] = field(default_factory=set, repr=False)
    _count: list[int] = field(default_factory=lambda: [0], repr=False)

    def shared(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The intermediate `key`, computed by the first diagnostic that asks for it.

        Keys must name all options that the result depends on, so that what one diagnostic gets never depends on who
        else is measured.
        """
        if key not in self._shared:
            started, spared, before = time.perf_counter(), self._prices[""], len(self.errors)
            self._shared[key] = compute()
            self._prices[key] = time.perf_counter() - started + self._prices[""] - spared
            self._inherited[key] = self.errors[before:]
        else:
            self.errors.extend(self._inherited[key])
            if key not in self._asked:
                self._prices[""] += self._prices[key]
        self._asked.add(key)
        return self._shared[key]

    def anew(self, **changes: Any) -> Snapshot:
        """The same point, with some fields changed, of which nothing is computed yet."""
        empty: dict[str, Any] = {
            "known": None, "measurements": {}, "alone": {}, "errors": [], "_inherited": {}, "_shared": {},
            "_prices": {"": 0.0}, "_asked": set(),
        }  # fmt: skip
        return replace(self, **{**empty, "_count": [0], **changes})

    def spared(self) -> float:
        """Seconds that were not spent since the last call, because others had computed what was asked for."""
        found, self._prices[""] = self._prices[""], 0.0
        self._asked.clear()
        return found

    def release(self) -> None:
        """Forget the intermediates and free their graphs; they are computed again if asked for."""
        self._shared.clear()
        self._asked.clear()
        if self.trained is not None:
            self.trained.release()

    def record(self, seconds: float, **numbers: Any) -> dict[str, Any]:
        """What a run logs of this point: its measurements, the `seconds` that they took, and further numbers."""
        return {
            "step": self.step,
            "lr": self.lr,
            "batch_size": self.batch_size,
            **numbers,
            "chunk_size": self.objective.chunk_size,  # which is halved where memory ends
            "matvecs": self.matvecs,
            "seconds": round(seconds, 6),
            "measurements": {name: m.to_dict() for name, m in self.measurements.items()},
        }

    def generator(self, name: str) -> torch.Generator:
        """A generator of probes for the diagnostic `name` at this step."""
        return generator(self.seed, self.step, name)

    @property
    def matvecs(self) -> int:
        """Products with the Hessian spent so far."""
        return self._count[0]

    @property
    def value(self) -> Tensor:
        """L(w), float64 scalar."""
        return self._value_and_gradient[0]

    @property
    def gradient(self) -> Tensor:
        """∇L(w), (P,).

        Raises:
            FloatingPointError: it is not finite; the message names the parameter.
        """
        g = self._value_and_gradient[1]
        where = self.shared("gradient is finite", lambda: self.objective.not_finite(g))
        if where:
            raise FloatingPointError(
                f"the gradient is not finite in {where}: the parameters have diverged, or the loss has no derivative there "
                "(norm, sqrt or log at 0)"
            )
        return g

    @property
    def _value_and_gradient(self) -> tuple[Tensor, Tensor]:
        if self.known is None:
            return self._products.value_and_gradient()
        return torch.tensor(self.known[0], dtype=torch.float64, device=self.w.device), self.known[1]

    @property
    def gradient_floor(self) -> float:
        """Rounding error of ‖∇L‖: that of a sum of N gradients of their typical length, which may cancel."""

        def compute() -> float:
            eps = torch.finfo(self.objective.dtype).eps
            if self.objective.coupled:
                return 16 * eps * float(self.gradient.norm())
            return 4 * eps * float(self.examples.squared_norms().mean().sqrt())

        return self.shared("gradient_floor", compute)

    @property
    def hessian(self) -> LinearOperator:
        """H(w), whose products are counted in `matvecs`."""
        return self.shared("hessian", lambda: self.counted(hessian(self.objective, self.w, products=self._products)))

    @property
    def hessian_gradient(self) -> Tensor:
        """H g, (P,)."""
        return self.shared("hessian_gradient", lambda: self.hessian @ self.gradient)

    @property
    def examples(self) -> ExampleGradients:
        """Per-example gradients at w."""
        return self.shared("examples", self.examples_along)

    def examples_along(self, u: Tensor | None = None) -> ExampleGradients:
        """Per-example gradients at w; with u (N, C) those of u_i·f(x_i) instead of the losses.

        In a run, the pass that computes the gradient listens for them from the second point on that asks.
        """
        heard: list[Capture] = []
        if self.carry is not None:
            if self._listens:
                heard = self._products.captures
            self.carry[LISTENS] = True
        return ExampleGradients(self.objective, self.w, along=u, heard=heard)

    @property
    def _listens(self) -> bool:
        return self.carry is not None and LISTENS in self.carry

    @property
    def _products(self) -> HessianProducts:
        def compute() -> HessianProducts:
            return self.products(listens=self._listens, expected=None if self.carry is None else MANY)

        return self.shared("products", compute)

    def products(self, w: Tensor | None = None, **options: Any) -> HessianProducts:
        """Products with the Hessian at w (default: here), by the engine of the snapshot. Options as `HessianProducts`."""
        w = self.w if w is None else w
        return HessianProducts(self.objective, w, engine=self.engine, errors=self.errors, **options)

    def counted(self, A: LinearOperator) -> LinearOperator:
        """The same matrix, whose products are added to `matvecs`."""
        count = self._count

        def matmat(V: Tensor) -> Tensor:
            count[0] += V.shape[1]
            return A.matmat(V)

        return replace(A, matmat=matmat)
