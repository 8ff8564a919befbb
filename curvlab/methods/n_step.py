"""Several updates on the same batch before the next one is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .base import Closure, Method
from .registry import method


@method(
    "n_step_sgd",
    formula="n times w ← w - α ∇L_B(w) on the same B; ε = nα",
    source="Smith et al. 2021 (arXiv 2101.12176), sec. 4, eq. 24 and 39",
)
class NStepSGD(Method):
    """n-step SGD: n updates with the bare learning rate α on each batch, effective learning rate ε = nα.

    At first order in ε it is SGD with learning rate ε; its implicit regularization is that of α = ε/n (eq. 39). A step costs
    n gradients, of which the first is the one in `.grad`.

    Args:
        lr: the bare learning rate α.
        n: updates per batch.

    Raises:
        ValueError: n below 1; at a step, no closure while n > 1.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = NStepSGD([w], lr=0.5, n=2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> w.tolist(), optimizer.effective_lr
        ([0.25], 1.0)
    """

    needs_closure = True

    def __init__(self, params: Iterable[Any], lr: float, *, n: int) -> None:
        if n < 1:
            raise ValueError(f"n is {n}; expected at least 1 update per batch")
        super().__init__(params, lr, n=n)

    def advance(self, closure: Closure | None) -> None:
        for update in range(self.setting("n")):
            if update:
                self.evaluate(closure)
            self.descend()

    @property
    def effective_lr(self) -> float | None:
        """ε = nα, of the first parameter group."""
        return self.setting("n") * self.setting("lr")
