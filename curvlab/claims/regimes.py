"""Runs as the regimes that a comparison of small and large batches has; hides which settings make a regime, and seeds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ..runs import Run, read_result
from .registry import Decision
from .statistics import Estimate, mean_over_seeds

Relation = Literal["above", "reaches", "misses"]
Seed = tuple  # of initialization, and of the order of the data
MARGINS = {"test_accuracy": 0.005, "test_loss": 0.1}  # the smallest difference in score that matters
FACTOR = 8  # between the batch sizes of small and large batches, at least; 40 in the paper
TRAINED = 0.01  # of the first training loss: a level at which test losses may be compared
BINS = 40  # equal parts of a trajectory
_PROBLEM = (
    "data", "data_options", "n", "validation", "center", "label_noise", "model", "model_size", "hidden", "activation", "loss"
)  # fmt: skip
_CHOICE = ("schedule", "steps", "num_epochs", "replacement", "epochs", "order")
_OURS = ("IterativeGrafting", "ExternalGrafting", "NormalizedGD", "AntiPGD")


def decide(relation: Relation, d: Estimate, margin: float) -> Decision:
    """What the interval of a paired difference d = a - b says, where m is the smallest difference that matters:

        above     holds if d > 0 for sure, does not hold if d < m for sure
        reaches   holds if d > -m for sure, does not hold if d < 0 for sure
        misses    the opposite of "reaches"

    where "for sure" is the whole interval. Both of a rule may be true of a small difference that is well measured; then
    the sentence holds. In all other cases it is undecided.
    """
    if not math.isfinite(d.high - d.low):
        return "undecided"
    if relation == "above":
        return "holds" if d.low > 0 else "does not hold" if d.high < margin else "undecided"
    reached = d.low > -margin
    missed = d.high < 0 and not reached
    if not (reached or missed):
        return "undecided"
    return "holds" if reached == (relation == "reaches") else "does not hold"


@dataclass(frozen=True)
class Member:
    """One run of a regime.

    Attributes:
        kind: "plain", the name of the one penalty that is trained (without `_penalty`), or that of the method.
        micro_batch: |M| of penalty or method; the batch size where none is stated.
        problem: what runs must have in common to be compared: data, model, loss, momentum, weight decay.
        choice: what is tuned for each regime: learning rate, strength, options, length, as text.
        seed: of initialization and data; runs of equal ones are paired.
    """

    run: Run
    kind: str
    batch_size: int
    micro_batch: int
    problem: str
    choice: str
    seed: Seed

    @cached_property
    def _result(self) -> dict[str, Any]:
        """What the sweep that made the run, if one did, has measured where training ended."""
        return read_result(self.run.path) or {"status": None, "final": {}}

    def final(self, metric: str) -> float:
        """The metric where training ended, as a sweep measures it there; otherwise the last one of the log."""
        found = self._result["final"].get(metric)
        return float(self.run.series(metric).values[-1]) if found is None else float(found)

    def score(self) -> float:
        """Where training ended, the larger the better."""
        if "test_accuracy" in self.run.names:
            return self.final("test_accuracy")
        return -math.log(max(self.final("test_loss"), 1e-300))

    @cached_property
    def complete(self) -> bool:
        """The log reaches the end of training, with a finite number there."""
        if self._result["status"] == "diverged":
            return False
        steps = (self.run.config["training"].get("batches") or {}).get("steps")
        logged = [record["step"] for record in self.run.records[-2:]]
        if not logged or (steps and 2 * logged[-1] - logged[0] + 1 < 0.9 * steps):  # a next step would be there
            return False
        return all(math.isfinite(self.final(metric)) for metric in MARGINS if metric in self.run.names)

    @cached_property
    def _norms(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By the number of examples of the gradient: steps, and mean gradient norms of so many."""
        training, found = self.run.config["training"], {}
        if "microbatch_gradient_norm" in self.run.names:
            options = dict(training.get("diagnostics") or []).get("microbatch_gradient_norm", {})
            size = options.get("micro_batch_size") or training.get("micro_batch_size") or self.batch_size
            series = self.run.series("microbatch_gradient_norm")
            found[min(size, self.batch_size)] = series.steps, series.values
        if self.kind == "plain" and "batch_gradient_norm" in self.run.names:
            series = self.run.series("batch_gradient_norm")
            if len(series) > len(found.get(self.batch_size, ((), ()))[0]):  # the same norms, at more steps
                found[self.batch_size] = series.steps, series.values
        return found

    def trajectory(self, size: int, steps: int) -> np.ndarray:
        """Logarithms of ‖∇L_M‖ of micro-batches of `size`, averaged in 40 equal parts of the first `steps`.

        Raises:
            KeyError: it was not measured, or too rarely.
        """
        name = self.run.path.name
        if size not in self._norms:
            there = f"of {', '.join(map(str, self._norms))} examples" if self._norms else "at all"
            raise KeyError(
                f"{name} needs microbatch_gradient_norm of {size} examples (micro_batch_size={size}); measured {there}"
            )
        at, norms = self._norms[size]
        place = at * BINS // steps
        with np.errstate(invalid="ignore"):
            sums, counts = (np.bincount(place[at < steps], w, BINS) for w in (norms[at < steps], None))
            if not counts.all():
                raise KeyError(
                    f"{name} has gradient norms in {np.sum(counts > 0)} of {BINS} parts of {steps} steps; needs all"
                )
            return np.log(np.maximum(sums / counts, 1e-300))


@dataclass
class Regime:
    """Runs of one regime by what was chosen for it, and by seed."""

    label: str
    by_choice: dict[str, dict[Seed, Member]] = field(default_factory=dict)

    @property
    def members(self) -> list[Member]:
        return [m for seeds in self.by_choice.values() for m in seeds.values()]

    def best(self, metric: str) -> dict[Seed, Member]:
        """The runs of the choice with the best mean end, among those with most seeds."""
        most = max(len(seeds) for seeds in self.by_choice.values())
        sign = 1 if metric == "test_accuracy" else -1
        full = [seeds for seeds in self.by_choice.values() if len(seeds) == most]
        return max(full, key=lambda seeds: sign * float(np.mean([m.final(metric) for m in seeds.values()])))


class Regimes:
    """The regimes among some runs of one problem: plain small and large batches, and what is done to large ones.

    Raises:
        KeyError: there are not two plain batch sizes far enough apart on one problem, or that on several.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        members = [m for run in runs if (m := member(run)) is not None]
        problems: dict[str, list[Member]] = {}
        for m in members:
            problems.setdefault(m.problem, []).append(m)
        usable = [found for found in problems.values() if _apart(found)]
        if len(usable) != 1:
            there = {str(json.loads(m.problem)[0]) for found in usable for m in found}
            raise KeyError(
                f"runs of {len(usable)} problems have small and large batches ({', '.join(sorted(there)) or 'none'}); judge "
                "each on its own"
                if usable
                else "needs runs of plain descent with small and with large batches on one problem, batch sizes a factor "
                f"{FACTOR} apart"
            )
        (self.all,) = usable
        sizes = [m.batch_size for m in self.all if m.kind == "plain"]
        self.b, self.B = min(sizes), max(sizes)
        self.left_out = [m.run.path.name for m in self.all if not m.complete]

    @cached_property
    def small(self) -> Regime:
        return self._gather("SB", lambda m: m.kind == "plain" and m.batch_size == self.b)

    @cached_property
    def large(self) -> Regime:
        return self._gather("LB", lambda m: m.kind == "plain" and m.batch_size == self.B)

    def of(self, kind: str, micro_batch: int | None = None) -> Regime:
        """Large batches with a penalty or by a method, of micro-batches as large as small batches if not stated.

        Raises:
            KeyError: there are none.
        """
        size = micro_batch or self.b
        free = kind in ("NormalizedGD", "AntiPGD", "ExternalGrafting")  # have no micro-batches of their own
        label = kind if free else f"{kind} |M|={size}"
        return self._gather(
            label, lambda m: m.kind == kind and m.batch_size == self.B and (free or m.micro_batch == size)
        )

    def micro_batches(self, kind: str) -> list[int]:
        """The sizes of micro-batches with which there are runs."""
        return sorted({m.micro_batch for m in self.all if m.kind == kind and m.batch_size == self.B and m.complete})

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(m.kind for m in self.all if m.batch_size == self.B and m.kind != "plain"))

    def _gather(self, label: str, wanted: Callable[[Member], bool]) -> Regime:
        regime = Regime(label)
        for m in self.all:
            if wanted(m) and m.complete:
                regime.by_choice.setdefault(m.choice, {})[m.seed] = m
        if not regime.by_choice:
            kept = f"; left out as unfinished or diverged: {', '.join(self.left_out)}" if self.left_out else ""
            raise KeyError(f"needs runs of {label} with large batches (B={self.B}; small ones have b={self.b}){kept}")
        return regime


def member(run: Run) -> Member | None:
    """A run as part of a regime; None for what is in none: other optimizers, several penalties, unknown batch sizes.

    Raises:
        KeyError: a penalty that a user's own configuration states in another form than name=strength.
    """
    training, experiment = run.config.get("training") or {}, run.config.get("experiment")
    experiment = experiment if isinstance(experiment, dict) else {}
    optimizer, b = training.get("optimizer") or {}, training.get("batch_size")
    penalties = [p for p in _penalties(training, experiment) if p[0]]
    ours = optimizer.get("name") in _OURS
    if not isinstance(b, int) or not (ours or optimizer.get("name") == "SGD") or len(penalties) > (0 if ours else 1):
        return None
    kind = optimizer["name"] if ours else penalties[0][1].removesuffix("_penalty") if penalties else "plain"
    objective = training.get("objective") or {}
    problem = [experiment.get(key) for key in _PROBLEM] if experiment else [run.config.get("data")]
    problem += [objective.get("examples"), objective.get("loss"), objective.get("model")]
    problem += [optimizer.get(key) or 0 for key in ("momentum", "weight_decay")]
    chosen = {"lr": training.get("lr", optimizer.get("lr"))} | {p[1]: [p[0], p[2]] for p in penalties}
    chosen |= {key: x for key, x in optimizer.items() if ours and key not in ("name", "lr", "seed")}
    chosen |= {key: experiment[key] for key in _CHOICE if experiment.get(key) not in (None, [], 0, False)}
    size = training.get("micro_batch_size") or experiment.get("micro_batch") or b
    seed = tuple(experiment.get(key, run.config.get("seed")) for key in ("init_seed", "data_seed"))
    return Member(run, kind, b, min(size, b), json.dumps(problem), json.dumps(chosen), seed)


def _penalties(training: Mapping[str, Any], experiment: Mapping[str, Any]) -> list[tuple[float, str, Any]]:
    """(strength, name, options), of the training or, in a loop of the user's own, as its configuration says."""
    if "penalties" in training:
        return [(float(strength), name, options) for strength, name, options in training["penalties"]]
    found = []
    for entry in experiment.get("penalty") or ():
        match = re.fullmatch(r"(\w+)=([\d.e+-]+)(:.*)?", entry)
        if match is None:
            raise KeyError(
                f"a penalty in the configuration is {entry!r}; expected name=strength, such as gradient_norm=0.01"
            )
        found.append((float(match[2]), match[1], match[3]))
    return found


def _apart(members: Sequence[Member]) -> bool:
    sizes = [m.batch_size for m in members if m.kind == "plain"]
    return bool(sizes) and max(sizes) >= FACTOR * min(sizes)


@dataclass(frozen=True)
class Difference:
    """Mean paired difference of two regimes in score, over the seeds that both have, and between how many it was chosen.

    The score is the accuracy where training ended, or minus the logarithm of the test loss: at equal training loss, the
    lowest that both runs of a pair reach, if that is below 1% of the first one, since test losses fall as long as training
    losses do; otherwise where training ended.
    """

    estimate: Estimate
    metric: str
    a: dict[Seed, Member]
    b: dict[Seed, Member]
    pairs: int
    choices: int
    labels: str

    @property
    def margin(self) -> float:
        return MARGINS[self.metric]


def difference(a: Regime, b: Regime, *, comparisons: int = 1) -> Difference:
    """The difference of two regimes, each with its best choice of settings, for which the interval accounts.

    Args:
        comparisons: how many such differences are looked at together.

    Raises:
        KeyError: they have no metric in common.
    """
    members = a.members + b.members
    metric = next((name for name in MARGINS if all(name in m.run.names for m in members)), None)
    if metric is None:
        raise KeyError(f"needs test_accuracy, or test_loss, of the runs of {a.label} and {b.label}")
    ours, theirs = a.best(metric), b.best(metric)
    pairs = [(ours[s], theirs[s]) for s in ours if s in theirs]
    choices = len(a.by_choice) * len(b.by_choice)
    values = (_paired(x, y, metric) for x, y in pairs)
    e = mean_over_seeds(values, comparisons=comparisons * choices)
    return Difference(e, metric, ours, theirs, len(pairs), choices, f"{a.label} - {b.label}")


def _paired(x: Member, y: Member, metric: str) -> float:
    if metric == "test_accuracy":
        return x.final(metric) - y.final(metric)
    ends = _at_equal_training_loss(x.run, y.run) or (x.final(metric), y.final(metric))
    return math.log(max(ends[1], 1e-300)) - math.log(max(ends[0], 1e-300))


def _at_equal_training_loss(x: Run, y: Run) -> tuple[float, float] | None:
    """Test losses where the training loss first is at the lowest level that both runs reach; None if that is high."""
    if not all("loss" in run.names for run in (x, y)):
        return None
    losses = [run.series("loss") for run in (x, y)]
    level = max(float(np.nanmin(series.values)) for series in losses)
    if level > TRAINED * min(float(series.values[0]) for series in losses):
        return None
    found = []
    for run, series in zip((x, y), losses, strict=True):
        i = int(np.flatnonzero(series.values <= level)[0])
        (before, there), steps = np.log(series.values[i - 1 : i + 1]), series.steps[i - 1 : i + 1]
        step = np.interp(math.log(level), [there, before], steps[::-1])
        tests = run.series("test_loss")
        found.append(math.exp(np.interp(step, tests.steps, np.log(tests.values))))
    return found[0], found[1]
