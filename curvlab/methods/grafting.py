"""Grafting: the length of the step from one algorithm, its direction from another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Closure, Method, norm
from .registry import method

Source = str | float | torch.optim.Optimizer | Callable[[Closure | None], Any]
NAMED = ("batch", "micro_batch")


@method("grafting", formula="w ← w - lr ‖g_M‖ g_D/‖g_D‖", source="Novack et al. 2022 (arXiv 2211.15853), eq. 9")
class Grafting(Method):
    """w ← w - lr ‖g_M‖ g_D/‖g_D‖: magnitude and direction from any two algorithms.

    Norms are over all parameters together. Where the direction is zero no step is taken.

    Args:
        lr: multiplies the magnitude; 1 if the magnitude has its own.
        magnitude, direction: ``"batch"``, the gradient of the batch; ``"micro_batch"``, that of one of its micro-batches,
            drawn uniformly at each step; a torch optimizer over the same parameters, for the step that it would take, its
            state being kept up to date and saved; or a function of the closure that returns tensors in the shapes of the
            parameters. A magnitude may also be a number from 0, or a function that returns one.
        seed: of the draws of micro-batches.

    Raises:
        ValueError, TypeError: an unknown source, or an optimizer over other parameters; at a step, micro-batches that the
            closure does not have, or a negative magnitude.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> adam = torch.optim.Adam([w], lr=1.0)
        >>> optimizer = Grafting([w], lr=1.0, magnitude=5.0, direction=adam)
        >>> w.grad = torch.tensor([1.0, 0.0])
        >>> _ = optimizer.step()
        >>> [round(x, 4) for x in w.tolist()]
        [-2.0, 4.0]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        magnitude: Source = "batch",
        direction: Source = "batch",
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, seed=seed)
        self.sources: dict[str, Source] = {"magnitude": magnitude, "direction": direction}
        for role, source in self.sources.items():
            self._check(role, source)
        self.needs_closure = any(s == "micro_batch" or _is_function(s) for s in self.sources.values())

    def advance(self, closure: Closure | None) -> None:
        gradient = self.gradients()
        direction = self._vectors("direction", closure)
        source = self.sources["magnitude"]
        found = source if isinstance(source, int | float) else self._vectors("magnitude", closure)
        magnitude = float(found) if isinstance(found, int | float) else norm(found)
        if magnitude < 0:
            raise ValueError(f"the magnitude of the step is {magnitude}; expected a number from 0")
        length, batch = norm(direction), norm(gradient)
        squares = 0.0
        for (p, lr), d in zip(self.rates(), direction, strict=True):
            scale = lr * magnitude / length if length else 0.0
            p.sub_(d.to(p), alpha=scale)
            squares += (scale * norm([d])) ** 2
        self._own["effective_lr"] = math.sqrt(squares) / batch if batch else None

    def state_dict(self) -> dict[str, Any]:
        """The state, with that of optimizers that are grafted."""
        inner = {role: s.state_dict() for role, s in self.sources.items() if isinstance(s, torch.optim.Optimizer)}
        return super().state_dict() | ({"sources": inner} if inner else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for role, inner in state_dict.get("sources", {}).items():
            source = self.sources[role]
            if isinstance(source, torch.optim.Optimizer):
                source.load_state_dict(inner)

    def _vectors(self, role: str, closure: Closure | None) -> Any:
        source = self.sources[role]
        if source == "batch":
            return self.gradients()
        if source == "micro_batch":
            return self._aside(lambda: self._micro_batch(closure))
        if isinstance(source, torch.optim.Optimizer):
            return self._proposed(source)
        assert callable(source)
        return self._aside(lambda: source(closure))

    def _micro_batch(self, closure: Any) -> list[Tensor]:
        if not hasattr(closure, "micro"):
            raise TypeError(
                f"{type(self).__name__} needs the gradients of micro-batches, but the closure is "
                f"{'missing' if closure is None else 'a plain ' + type(closure).__name__}; train with "
                "curvlab.train(..., micro_batch_size=32), or give the closure micro_batches and micro(i)"
            )
        # One generator for both roles: the same micro-batch, if both ask for one.
        chosen = torch.randint(closure.micro_batches, (), generator=self.generator("micro_batch"))
        with torch.enable_grad():
            closure.micro(int(chosen))
        return self.gradients()

    def _aside(self, compute: Callable[[], Any]) -> Any:
        """Something that may overwrite `.grad`, which holds the batch gradient again afterwards."""
        kept = [p.grad for p in self.parameters()]
        for p in self.parameters():
            p.grad = None
        try:
            return compute()
        finally:
            for p, grad in zip(self.parameters(), kept, strict=True):
                p.grad = grad

    def _proposed(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """The step that an optimizer would take from here, which it believes to have taken."""
        before = [p.clone() for p in self.parameters()]
        optimizer.step()
        steps = []
        for p, old in zip(self.parameters(), before, strict=True):
            steps.append(old - p)
            p.copy_(old)
        return steps

    def _check(self, role: str, source: Source) -> None:
        number = isinstance(source, int | float) and role == "magnitude"
        optimizer = isinstance(source, torch.optim.Optimizer)
        if not (source in NAMED or number or optimizer or _is_function(source)):
            raise ValueError(
                f"{role} is {source!r}; expected {' or '.join(map(repr, NAMED))}, a torch optimizer or a function"
                + (", or a number" if role == "magnitude" else "")
            )
        if isinstance(source, torch.optim.Optimizer):
            theirs = {id(p) for group in source.param_groups for p in group["params"]}
            if theirs != {id(p) for p in self.parameters()}:
                raise ValueError(
                    f"the {role} is of a {type(source).__name__} over other parameters; make it from the same ones"
                )


def _is_function(source: Source) -> bool:
    return callable(source) and not isinstance(source, torch.optim.Optimizer)


@method(
    "iterative_grafting",
    formula="w ← w - lr ‖∇L_M‖ ∇L_B/‖∇L_B‖, M one of the micro-batches of B",
    source="Novack et al. 2022 (arXiv 2211.15853), App. C.1",
)
class IterativeGrafting(Grafting):
    """Iterative grafting: the direction of the whole batch, the gradient norm of one of its micro-batches.

    M is drawn uniformly at each step. With a single micro-batch, M = B and this is plain SGD.

    Raises:
        TypeError: at a step, a closure without micro-batches.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, seed: int = 0) -> None:
        super().__init__(params, lr, magnitude="micro_batch", direction="batch", seed=seed)


@method(
    "external_grafting",
    formula="w ← w - lr ‖∇L_M(w'_k)‖ ∇L_B/‖∇L_B‖, w'_k of another run",
    source="Novack et al. 2022 (arXiv 2211.15853), App. C.1",
)
class ExternalGrafting(Grafting):
    """External grafting: the direction of the batch, the gradient norm that another run had at the same step.

    Args:
        norms: one number per step, such as ``Run("runs/small").series("batch_gradient_norm")`` of a run that measured
            it at every step.

    Raises:
        ValueError: norms that are negative, missing or not of every step from 0; at a step, norms that are used up.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = ExternalGrafting([w], lr=0.5, norms=[2.0])
        >>> w.grad = torch.tensor([0.0, 7.0])
        >>> _ = optimizer.step()
        >>> w.tolist()
        [3.0, 3.0]
    """

    def __init__(self, params: Iterable[Any], lr: float, *, norms: Any) -> None:
        self.norms = _norms(norms)
        super().__init__(params, lr, magnitude=self._next, direction="batch")
        self.needs_closure = False

    def _next(self, closure: Closure | None) -> float:
        if self.steps_taken >= len(self.norms):
            raise ValueError(
                f"the other run has norms for {len(self.norms)} steps, and step {self.steps_taken} needs one more; "
                "train it for longer, or stop earlier"
            )
        return self.norms[self.steps_taken]


def _norms(given: Any) -> list[float]:
    values = np.asarray(getattr(given, "values", given), dtype=float)
    if values.ndim != 1 or not np.all(np.isfinite(values)) or np.any(values < 0):
        bad = [] if values.ndim != 1 else np.flatnonzero(~(values >= 0) | ~np.isfinite(values))[:3].tolist()
        raise ValueError(
            f"norms have shape {values.shape}" + (f" and no norm at positions {bad}" if bad else "") + "; expected one "
            "finite number from 0 for each step"
        )
    steps: Sequence[int] | None = getattr(given, "steps", None)
    if steps is not None and list(steps) != list(range(len(values))):
        first = [int(step) for step in steps[:3]]
        raise ValueError(
            f"the norms are of steps {first}...; expected every step from 0: measure batch_gradient_norm at every step"
        )
    return values.tolist()


@method(
    "normalized_gd", formula="w ← w - lr ∇L_B/‖∇L_B‖", source="Novack et al. 2022 (arXiv 2211.15853), App. C.1 (NGD)"
)
class NormalizedGD(Grafting):
    """Normalized gradient descent: every step has the length lr.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.grad = torch.tensor([0.0, 7.0])
        >>> _ = NormalizedGD([w], lr=0.5).step()
        >>> w.tolist()
        [3.0, 3.5]
    """

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, lr, magnitude=1.0, direction="batch")
