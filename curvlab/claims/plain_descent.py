"""The series of one run of plain gradient descent, in the units in which claims speak: multiples of 2/lr."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from ..runs import Run

MIN_STEPS = 100  # measured steps below which nothing is decided
FALLING = -1e-3  # a trend of log L must lie below this: a constant loss has one of rounding
MIN_WINDOW = 50  # measured steps that a plateau must have


class PlainDescent:
    """Logs of plain SGD or GD at a constant learning rate.

    The thresholds 2/lr and 2ρ_b/lr assume steps -lr g_b on the loss whose Hessian is measured; other optimizers have
    others, so `refusal` says why a run is outside.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        training = run.config.get("training", {})
        self.optimizer = training.get("optimizer", {})
        self.batch_size = training.get("batch_size")
        self.examples = training.get("objective", {}).get("examples")
        self.replacement = bool(training.get("replacement"))
        self.lrs = np.unique(run.column("lr")[1])

    @property
    def lr(self) -> float:
        return float(self.lrs[0])

    @property
    def full_batch(self) -> bool:
        return self.batch_size == self.examples and not self.replacement

    @property
    def refusal(self) -> str | None:
        """Why the thresholds of plain descent do not apply, or None."""
        if len(self.lrs) != 1:
            return f"the learning rate is not constant ({len(self.lrs)} values); thresholds are for a constant one"
        name = self.optimizer.get("name")
        if name != "SGD":
            return f"the optimizer is {name}; 2/lr is the threshold of plain SGD"
        extra = [key for key in ("momentum", "weight_decay", "dampening", "nesterov") if self.optimizer.get(key)]
        if extra:
            return f"the optimizer uses {', '.join(extra)}; 2/lr is the threshold of plain SGD"
        if not isinstance(self.batch_size, int):
            return "the batch size of training is not known; pass batch_size to train()"
        return None

    def relative(self, name: str) -> np.ndarray:
        """A curvature over the threshold 2/lr, at the measured steps; NaN where it has no value."""
        return self.run.series(name).values * self.lr / 2

    @cached_property
    def loss(self) -> np.ndarray:
        return self.run.series("loss").values

    @cached_property
    def steps(self) -> np.ndarray:
        return self.run.series("loss").steps

    @property
    def diverged(self) -> bool:
        """The loss is not finite somewhere, or ends at more than twice its start."""
        last = self.loss[-max(5, len(self.loss) // 20) :]
        return not np.isfinite(self.loss).all() or bool(np.median(last) > 2 * self.loss[0])


def plateau_start(x: np.ndarray) -> int | None:
    """Where `x` has reached the neighbourhood of 1 for good: the median of the next points is at least 0.9, and that of
    all later ones at least 0.85."""
    window = max(20, len(x) // 20)
    for i in range(len(x) - window + 1):
        if np.median(x[i : i + window]) >= 0.9 and np.median(x[i:]) >= 0.85:
            return i
    return None


def plateau(x: np.ndarray) -> slice | None:
    """The measured steps after the arrival, at most the second half of the run; None if they are too few."""
    start = plateau_start(x)
    if start is None:
        return None
    start = max(start, len(x) // 2)
    return slice(start, len(x)) if len(x) - start >= MIN_WINDOW else None
