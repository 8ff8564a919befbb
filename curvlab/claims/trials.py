"""Runs as points of a grid over learning rate, batch size, penalty, updates per batch and seed; hides where logs say so."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..runs import Run
from .registry import Decision
from .statistics import Estimate, mean_over_seeds

SEEDS = 2  # fewest, since an interval over seeds needs two
C_REG = {"implicit_regularizer": 1.0, "gradient_norm_penalty": 4.0}  # penalty -> its strength in units of λ
# Settings in which the runs of a grid may differ; everything else must agree.
_VARIED = (
    "lr", "batch_size", "penalty", "micro_batch", "method", "method_options", "steps", "num_epochs", "every", "init_seed",
    "data_seed", "probe_seed", "seed", "diagnostics", "trajectory", "device", "threads",
)  # fmt: skip
_STATED = ("training", "experiment", "provenance", "run_batch_size", *_VARIED)


@dataclass(frozen=True)
class Trial:
    """One run of SGD, or of n-step SGD, as a point of a grid.

    Attributes:
        lr: ε of SGD, or the bare rate α of n-step SGD: of one update.
        n: updates on each batch.
        penalty: λ, the strength of C_reg over batches of the size of training.
        steps: batches; `epochs` of the data.
        seed: what replicates differ in.
        setting: everything else that the configuration states.
    """

    run: Run
    lr: float
    n: int
    batch_size: int
    examples: int
    penalty: float
    steps: int
    epochs: float
    seed: Hashable
    setting: str

    @cached_property
    def score(self) -> float:
        """Test performance: the mean of `test_accuracy` over the last quarter of the log, or where there is none, of the
        negative logarithm of `test_loss`; NaN where the run diverged.

        The paper takes the highest accuracy of a run. That of a noisy run is high by luck, the more so the larger ε/B: on
        linear regression, where steps of any size only cost, it makes large ones look better.
        """
        return math.nan if self.diverged else float(self._late(0.75, 1.0).mean())

    @cached_property
    def settled(self) -> bool:
        """Stable, and the mean over the last quarter is at most `margin` above that of the quarter before: it is not short
        of training."""
        return self.stable and len(self._performance) >= 8 and self.score - self._late(0.5, 0.75).mean() <= self.margin

    def _late(self, start: float, stop: float) -> np.ndarray:
        n = len(self._performance)
        return self._performance[min(round(start * n), n - 1) : max(round(stop * n), 1)]

    @cached_property
    def stable(self) -> bool:
        """It has not diverged, and in its second half the training loss stays below half of its start."""
        loss = self.run.series("loss").values
        return not self.diverged and bool((loss[len(loss) // 2 :] < loss[0] / 2).all())

    @property
    def diverged(self) -> bool:
        """The log has a point without a value, or ends before the run should have."""
        return self.ended_early or not np.isfinite(self._performance).all()

    @property
    def ended_early(self) -> bool:
        """The log has no more than its start, or a next point of it would lie before the end."""
        logged = [record["step"] for record in self.run.records[-2:]]
        return self.steps > 1 if len(logged) == 1 else 2 * logged[1] - logged[0] < self.steps - 1

    @property
    def margin(self) -> float:
        """The smallest difference in score that matters: half a percent of accuracy, 5% of a loss."""
        return 0.005 if self.by_accuracy else 0.05

    @property
    def metric(self) -> str:
        return "test_accuracy" if self.by_accuracy else "test_loss"

    @property
    def by_accuracy(self) -> bool:
        return "test_accuracy" in self.run.names and bool(np.isfinite(self.run.series("test_accuracy").values).any())

    @cached_property
    def _performance(self) -> np.ndarray:
        if self.by_accuracy:
            return self.run.series("test_accuracy").values
        if "test_loss" not in self.run.names:
            raise KeyError(f"neither test_accuracy nor test_loss was measured in {self.run.path}")
        return -np.log(np.maximum(self.run.series("test_loss").values, 1e-300))


def trials(runs: Iterable[Run]) -> list[Trial]:
    """The runs of plain descent, with or without C_reg and several updates per batch; all others are left out."""
    found: list[Trial] = []
    seen: Counter[tuple] = Counter()
    for trial in filter(None, map(_trial, runs)):
        point = (trial.lr, trial.n, trial.batch_size, trial.penalty, trial.steps, trial.seed, trial.setting)
        seen[point] += 1
        copy = f"{trial.seed}, copy {seen[point]}"  # replicates that state no seed
        found.append(trial if seen[point] == 1 else replace(trial, seed=copy))
    return found


def _trial(run: Run) -> Trial | None:
    training = run.config.get("training", {})
    optimizer, objective = training.get("optimizer", {}), training.get("objective", {})
    b, lr, examples = training.get("batch_size"), training.get("lr"), objective.get("examples")
    if optimizer.get("name") not in ("SGD", "NStepSGD") or not isinstance(b, int) or not lr or not run.records:
        return None
    penalty = _penalty(training, b)
    if penalty is None or any(optimizer.get(key) for key in ("momentum", "maximize", "differing")):
        return None
    stated = training.get("batches") or {}
    steps = int(stated.get("steps") or run.records[-1]["step"] + 1)
    experiment = run.config.get("experiment") or {}
    epochs = experiment.get("num_epochs") or round(steps * b / examples, 1)
    return Trial(
        run, float(lr), int(optimizer.get("n", 1)), b, int(examples), penalty, steps, float(epochs), seed_of(run.config),
        setting_of(run.config),
    )  # fmt: skip


def _penalty(training: Mapping[str, Any], b: int) -> float | None:
    """λ; None where something else is trained than C + λ C_reg over batches of the size of training."""
    given = [(strength, name) for strength, name, _ in training.get("penalties") or []]
    if not given:
        return None if training.get("trained_loss") else 0.0
    if len(given) > 1 or given[0][1] not in C_REG or training.get("micro_batch_size") not in (None, b):
        return None
    return float(given[0][0]) * C_REG[given[0][1]]


def seed_of(config: Mapping[str, Any]) -> Hashable:
    """What replicates of a run differ in; 0 where no seed is stated."""
    experiment, batches = config.get("experiment") or {}, config.get("training", {}).get("batches") or {}
    seeds = [experiment.get("init_seed"), experiment.get("data_seed"), config.get("seed"), batches.get("seed")]
    return next((seed for seed in seeds if seed is not None), 0)


def setting_of(config: Mapping[str, Any]) -> str:
    """Everything that a run states beside what the runs of a grid may differ in."""
    training, experiment = config["training"], config.get("experiment") or {}
    stated = {key: value for key, value in experiment.items() if key not in _VARIED}
    batches = {key: (training.get("batches") or {}).get(key) for key in ("epochs", "order")}
    common = {key: training.get(key) for key in ("scheduler", "replacement")}
    objective = {key: training["objective"].get(key) for key in ("examples", "parameters", "loss", "mode", "dtype")}
    decay = training["optimizer"].get("weight_decay", 0.0)
    own = {key: value for key, value in config.items() if key not in _STATED}
    return json.dumps([stated, batches, common, objective, decay, own], sort_keys=True)


def largest(found: Iterable[Trial], key: Callable[[Trial], Hashable]) -> list[Trial]:
    """The trials that share the most frequent key, with the same setting always part of it."""
    groups: dict[Hashable, list[Trial]] = {}
    for trial in found:
        groups.setdefault((trial.setting, key(trial)), []).append(trial)
    return max(groups.values(), key=len, default=[])


def by_seed(found: Iterable[Trial]) -> dict[Hashable, list[Trial]]:
    """Trials of each seed."""
    seeds: dict[Hashable, list[Trial]] = {}
    for trial in found:
        seeds.setdefault(trial.seed, []).append(trial)
    return seeds


def over_seeds(values: Iterable[float], *, comparisons: int = 1) -> Estimate:
    """`mean_over_seeds` of the values that exist."""
    return mean_over_seeds([v for v in values if np.isfinite(v)], comparisons=comparisons)


def means(found: Sequence[Trial], axis: Callable[[Trial], float]) -> dict[float, float]:
    """Mean score at each value of an axis, in increasing order; without values where a seed diverged."""
    values = {x: [t.score for t in found if axis(t) == x] for x in sorted({axis(t) for t in found})}
    return {x: float(np.mean(scores)) for x, scores in values.items() if np.isfinite(scores).all()}


def arms(runs: Sequence[Run]) -> tuple[list[Trial], list[Trial]] | str:
    """The runs over ε without penalty, and those over λ at the smallest ε that has some; or what is missing."""
    found = [t for t in trials(runs) if t.n == 1]
    group = largest((t for t in found if any(_penalized(t, o) for o in found)), lambda t: (t.batch_size, t.epochs))
    start = min((t.lr for t in group if t.penalty), default=None)
    plain, strong = [t for t in group if not t.penalty], [t for t in group if t.lr == start]
    rates, strengths = {t.lr for t in plain}, {t.penalty for t in strong if t.penalty}
    seeds = {t.seed for t in plain} & {t.seed for t in strong}
    if len(rates) < 3 or len(strengths) < 2 or start not in rates or len(seeds) < SEEDS:
        return (
            f"needs 3 learning rates without penalty and, at one of them, 2 strengths of C_reg, with {SEEDS} common seeds; "
            f"there are ε = {sorted(rates)}, λ = {sorted(strengths)} and {len(seeds)} common seeds"
        )
    return plain, strong


def _penalized(t: Trial, other: Trial) -> bool:
    """Whether another run with a penalty belongs to the same group."""
    same = (other.setting, other.batch_size, other.epochs) == (t.setting, t.batch_size, t.epochs)
    return same and bool(other.penalty)


def inside(at: Estimate, band: tuple[float, float], well: str, more: str) -> tuple[Decision, str]:
    """Whether an interval lies in a band, outside it, or neither."""
    if band[0] < at.low and at.high < band[1]:
        return "holds", well
    if at.high < band[0] or at.low > band[1]:
        return "does not hold", f"{at} lies outside {band[0]:g} to {band[1]:g}"
    return "undecided", f"{at} is too wide an interval; {more}"


def described(*groups: Sequence[Trial]) -> dict[str, Any]:
    """Which runs a verdict is of."""
    members = [t for group in groups for t in group]
    names = sorted({t.run.path.name for t in members})
    return {"runs": names, "seeds": sorted({str(t.seed) for t in members})}
