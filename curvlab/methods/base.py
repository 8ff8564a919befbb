"""What all methods share: one protocol of gradients and closures, and a state that survives saving and loading."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..linalg.probes import generator

Closure = Callable[[], Any]


class Method(torch.optim.Optimizer):
    """An optimizer over `.grad` of live parameters, whose step may ask for more gradients.

    When `step` is called, `.grad` holds the gradient of the batch at the current parameters; if it is empty, the closure
    computes it. A method with `needs_closure` calls the closure again for gradients of the same batch at other points, or of
    parts of it. A closure zeroes `.grad`, computes the loss, calls `backward()` and returns the loss. One that serves every
    method, as `train` passes it, also has `micro_batches`, their number, and `micro(i)`, which leaves the gradient of the
    i-th alone in `.grad`. After a step with a closure `.grad` is empty, so that the gradient of an old point is never taken
    for that of a new one.

    All randomness comes from (seed, number of the step), so a step counter is all that is saved of it, and a run that
    continues from a `state_dict` is bit-identical.

    Attributes:
        needs_closure: whether `step` must be given a closure.
        formula, source: the update, and where it is from.
    """

    needs_closure: bool = False
    formula: str = ""
    source: str = ""

    def __init__(self, params: Iterable[Any], lr: float, **settings: Any) -> None:
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr is {lr}; expected a finite number from 0")
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step; returns the loss if the closure had to compute it, otherwise None.

        Raises:
            ValueError: a closure is needed, for the gradient or for more, and there is none.
        """
        loss = None
        if all(p.grad is None for p in self.parameters()):
            loss = self.evaluate(closure)
        self.advance(closure)
        self._own["step"] = self.steps_taken + 1
        if closure is not None:
            for p in self.parameters():
                p.grad = None
        return loss

    def advance(self, closure: Closure | None) -> None:
        """Change the parameters; `.grad` holds the gradient. What a method defines."""
        raise NotImplementedError(f"{type(self).__name__} must define advance(closure), which changes the parameters")

    def evaluate(self, closure: Closure | None) -> Any:
        """Compute the gradient of the batch at the current parameters."""
        if closure is None:
            raise ValueError(
                f"{type(self).__name__} needs a gradient that is not in .grad: pass step(closure) a function that zeroes "
                "the gradients, computes the loss, calls backward() and returns the loss"
            )
        with torch.enable_grad():
            return closure()

    @property
    def steps_taken(self) -> int:
        """How many steps were taken."""
        return self._own.get("step", 0)

    @property
    def effective_lr(self) -> float | None:
        """Length of the last step divided by ‖∇L_B‖, for methods that set the length; None for others and at the start."""
        return self._own.get("effective_lr")

    @property
    def _own(self) -> dict[str, Any]:
        """The method's state, kept with the first parameter, so that `state_dict` carries it."""
        return self.state[self.param_groups[0]["params"][0]]

    def setting(self, name: str) -> Any:
        """A setting that is the same for all parameter groups."""
        return self.param_groups[0][name]

    def parameters(self) -> list[Tensor]:
        """All parameters, in the order of the groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def rates(self) -> Iterator[tuple[Tensor, float]]:
        """Each parameter with the learning rate of its group."""
        for group in self.param_groups:
            for p in group["params"]:
                yield p, group["lr"]

    def gradients(self) -> list[Tensor]:
        """What `.grad` holds, zero where a parameter has none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]

    def descend(self, fraction: float = 1.0) -> None:
        """w ← w - fraction · lr · gradient."""
        for p, lr in self.rates():
            if p.grad is not None:
                p.sub_(p.grad, alpha=fraction * lr)

    def generator(self, what: str, step: int | None = None) -> torch.Generator:
        """The random numbers for one purpose of a step, the current one by default."""
        return generator(self.setting("seed"), self.steps_taken if step is None else step, what)


def norm(vectors: Sequence[Tensor]) -> float:
    """Euclidean norm of all entries together, summed in float64."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(v, dtype=torch.float64)) ** 2 for v in vectors))
