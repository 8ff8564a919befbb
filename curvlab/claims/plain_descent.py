"""The series of one run of plain gradient descent, in the units in which claims speak: multiples of 2/lr."""

from __future__ import annotations

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
        augmented = (training.get("batches") or {}).get("augment")
        self.trained_loss = training.get("trained_loss") or (augmented and f"images are augmented, {augmented}")
        self.subset = training.get("objective", {}).get("subset")
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
        if not self.run.records:
            return "nothing was measured yet"
        if len(self.lrs) != 1:
            return f"the learning rate is not constant ({len(self.lrs)} values); thresholds are for a constant one"
        name = self.optimizer.get("name")
        if name != "SGD":
            return f"the optimizer is {name}; 2/lr is the threshold of plain SGD"
        extra = [
            key for key in ("momentum", "weight_decay", "dampening", "nesterov", "maximize") if self.optimizer.get(key)
        ]
        if extra:
            return f"the optimizer uses {', '.join(extra)}; 2/lr is the threshold of plain SGD"
        if self.optimizer.get("differing"):
            return (
                f"parameter groups differ in {', '.join(self.optimizer['differing'])}; 2/lr is that of a single group"
            )
        if self.trained_loss:
            return f"training uses another loss than is measured: {self.trained_loss}"
        if self.subset:
            return f"a subset of the parameters is measured ({', '.join(self.subset[:3])}, ...), and all are trained"
        if not isinstance(self.batch_size, int):
            return "the batch size of training is not known; pass batch_size to train()"
        return None

    def columns(self, *names: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """The steps at which all of the named quantities have a value, and their values there.

        A curve over batch sizes is read at the batch size of training.

        Raises:
            KeyError: one was not measured, or is a curve without that batch size.
        """
        found = []
        for name in names:
            series = self.run.series(name)
            if series.values.ndim > 1:
                series = self.run.series(name, batch_size=self.batch_size)
            found.append({int(t): float(v) for t, v in zip(series.steps, series.values, strict=True) if np.isfinite(v)})
        steps = sorted(set.intersection(*(set(one) for one in found)))
        return np.array(steps), [np.array([one[t] for t in steps]) for one in found]

    @property
    def diverged(self) -> bool:
        """The loss is not finite somewhere, or ends at more than twice its start."""
        loss = self.run.series("loss").values
        return not np.isfinite(loss).all() or bool(np.median(loss[-max(5, len(loss) // 20) :]) > 2 * loss[0])


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
