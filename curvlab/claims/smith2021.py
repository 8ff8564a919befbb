"""Smith et al. 2021 (arXiv 2101.12176): the modified loss of SGD, its implicit regularizer, and the spread behind it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from ..runs import Run
from .registry import Decision, Verdict, claim
from .statistics import Estimate
from .trials import Trial, arms, by_seed, described, inside, over_seeds, trials

SOURCE = "Smith et al. 2021"
SPREAD_BAND = (0.9, 1.1)  # of the measured spread over eq. 32


# -- eq. 32: how far a mini-batch gradient is from the full one ------------------------------------------------------


@claim(
    source=f"{SOURCE}, eq. 32",
    sentence="E‖ĝ_b - g‖² = (N-b)/(N-1) Γ/b: the spread of a mini-batch gradient from the variance of those of examples.",
)
def minibatch_gradient_spread(run: Run) -> Verdict:
    """The batches that training drew spread as the variance of per-example gradients says.

    Statistic: mean over steps of r_t = (‖ĝ_b‖² - ‖g‖²) / ((N-b)/(N-1) Γ/b), from `batch_gradient_norm`, `gradient_norm` and
    `gradient_variance`. Given w_t and a batch that is drawn independently of it, r_t has mean 1 by eq. 32, so its deviations
    are uncorrelated over steps however w moves, and the interval is the t interval over steps.

    Holds: the interval lies in (0.9, 1.1). Does not hold: it lies outside. Undecided: otherwise; more steps decide it, some
    hundreds where ‖g‖² is not far above Γ/b. Not applicable: full batches; batches that are cut once for all epochs, or
    whose drawing is not stated; penalties or another loss in the gradient that is logged. Of epochs through shuffled data
    only the first step of each counts: the batches left for later ones depend on those that have moved w.

    At b near N the factor (N-b)/(N-1) is far from 1, so such a run also tells it from Γ/b alone (see details). A wrong Γ or
    batch size does not hold on any problem, and linear regression holds: the statement is an identity of sampling.
    """
    name = "minibatch_gradient_spread"
    training = run.config.get("training", {})
    b, N, batches = training.get("batch_size"), training.get("objective", {}).get("examples"), training.get("batches")
    refusal = _no_independent_batches(training)
    if refusal or not isinstance(b, int):
        return Verdict(name, "not applicable", refusal or "the batch size of training is not one number")
    logged = [run.series(key) for key in ("batch_gradient_norm", "gradient_norm", "gradient_variance")]
    columns = [dict(zip(s.steps.tolist(), s.values, strict=True)) for s in logged]
    steps = sorted(set.intersection(*map(set, columns)))
    if batches["epochs"]:
        steps = [step for step in steps if step % (N // b) == 0]
    drawn, full, variance = (np.array([column[step] for step in steps], dtype=float) for column in columns)
    factor = 1.0 if training.get("replacement") else (N - b) / (N - 1)
    with np.errstate(all="ignore"):
        ratio = (drawn**2 - full**2) / (factor * variance / b)
    at = over_seeds(ratio)  # steps are to this claim what seeds are to the others
    details = {"steps": len(steps), "factor": factor, "over Γ/b alone": at.value * factor}
    threshold = "0.9 to 1.1 (mean of (‖ĝ_b‖² - ‖g‖²) over eq. 32)"
    if len(steps) < 100:
        why = f"{len(steps)} measured steps with an independent batch; needs at least 100"
        return Verdict(name, "undecided", why, at.value, at.interval, threshold, details)
    decision, reason = inside(at, SPREAD_BAND, "the spread is that of eq. 32", "measure more steps")
    return Verdict(name, decision, reason, at.value, at.interval, threshold, details)


def _no_independent_batches(training: Mapping[str, Any]) -> str | None:
    batches = training.get("batches")
    if batches is None:
        return "how the batches were drawn is not stated; train on curvlab.Batches"
    if batches["order"] != "new":
        return f"batches are cut once and taken in {batches['order']} order: they are no random draws"
    if batches.get("augment"):
        return "batches are of augmented images, and the spread that is measured is not"
    if training.get("penalties") or training.get("trained_loss"):
        return "the gradient that is logged has more than the measured loss in it"
    if training.get("batch_size") == training.get("objective", {}).get("examples") and not training.get("replacement"):
        return "full batches do not spread"
    return None


# -- eq. 1, 20 and 39: the flow that SGD follows -----------------------------------------------------------------------


@claim(
    source=f"{SOURCE}, eq. 1, 20 and 39",
    sentence="After an epoch and its reverse SGD is O(ε²) from gradient flow on C and O(ε³) from flow on C + ε C_reg; "
    "n-step SGD from flow on C + (ε/n) C_reg.",
    several=True,
)
def modified_loss_order(runs: Sequence[Run]) -> Verdict:
    """Orders in ε of the distances of SGD from two flows, where an epoch and its reverse end.

    Needs, for three learning rates or more, two runs with batches in alternating order that log `trajectory_distance` at
    step 2N/b: one from a flow without penalty, one from a flow with `implicit_regularizer` of the strength of the bare
    learning rate, both with that learning rate times n. A flow is read from the folder that the run's configuration names,
    or from the runs that are given.

    Statistic: slope of log distance over log lr, by least squares; with several seeds the mean and t interval of the slopes
    of each, with one the jackknife over learning rates, which measures how far the slope still bends.

    Holds: the intervals lie within 0.25 of 2 (flow on C) and of 3 (flow on the modified loss). Does not hold: one of them
    lies outside. Undecided: otherwise, or a distance below a hundred times the error of its flow: take smaller learning
    rates, or a smaller tolerance and float64. Not applicable: batches in another order, since what it adds is of order 2;
    flows on other losses alone. A flow with another coefficient is of order 2; it is listed under details and not judged.
    Every smooth loss holds, linear regression too: the statement is a theorem, and the run a test of the optimizer.
    """
    name = "modified_loss_order"
    found, notes = _distances(runs)
    if {0.0, 1.0} - {coefficient for _, coefficient, *_ in found}:
        missing = "runs compared with flows on C and on C + ε C_reg" if found else "runs of SGD compared with a flow"
        why = f"there are no {missing} at the end of an epoch and its reverse"
        return Verdict(name, "not applicable", "; ".join([why, *notes]))
    orders: dict[tuple[int, float], Estimate] = {}
    for n, coefficient in sorted({(n, c) for n, c, *_ in found}):
        points = [(seed, lr, d) for m, c, seed, lr, d, _ in found if (m, c) == (n, coefficient)]
        if len({lr for _, lr, _ in points}) >= 3:
            orders[n, coefficient] = _order(points)
    details = {f"order, n = {n}, {c:g} ε C_reg": str(e) for (n, c), e in orders.items()} | {"runs": len(found)}
    judged = {key: e for key, e in orders.items() if key[1] in (0.0, 1.0)}
    if not {c for _, c in judged} >= {0.0, 1.0}:
        why = "needs three learning rates for the flow on C and for that on the modified loss"
        return Verdict(name, "not applicable", why, details=details)
    off = {key: e.value - 2 - key[1] for key, e in judged.items()}
    worst = judged[max((key for key in judged if key[1] == 1.0), key=lambda key: abs(off[key]))]
    threshold = "2.75 to 3.25 (order against the modified flow; 1.75 to 2.25 against the plain one)"
    blurred = sum(not resolved for *_, resolved in found)
    if blurred:
        why = (
            f"{blurred} distances are not resolved from the error of their flow; take a smaller tolerance, and float64"
        )
        return Verdict(name, "undecided", why, worst.value, worst.interval, threshold, details)
    decisions = {key: inside(e, (1.75 + key[1], 2.25 + key[1]), "", "")[0] for key, e in judged.items()}
    wrong = [f"n = {n}, {c:g} ε C_reg" for (n, c), decision in decisions.items() if decision == "does not hold"]
    decision: Decision = "does not hold" if wrong else "holds" if set(decisions.values()) == {"holds"} else "undecided"
    reason = {
        "does not hold": f"another order for {', '.join(wrong)}",
        "holds": "order 2 from the flow on C, 3 from the modified one",
        "undecided": "an interval is too wide; take smaller learning rates, or more seeds",
    }[decision]
    return Verdict(name, decision, reason, worst.value, worst.interval, threshold, details)


def _distances(runs: Sequence[Run]) -> tuple[list[tuple[int, float, Hashable, float, float, bool]], list[str]]:
    """(n, coefficient in units of the bare rate, seed, lr, distance, whether it is resolved) of each run; why others are
    left out."""
    found, notes = [], []
    given = {run.path.resolve(): run for run in runs}
    for trial in trials(runs):
        training = trial.run.config["training"]
        options = dict(training.get("diagnostics") or []).get("trajectory_distance") or {}
        if "run" not in options or trial.penalty:
            continue
        batches = training.get("batches") or {}
        if batches.get("order") != "alternating" and trial.batch_size != trial.examples:
            notes.append(f"{trial.run.path.name}: batches are not in alternating order")
            continue
        flow = _flow(options["run"], given)
        if flow is None:
            notes.append(f"{trial.run.path.name}: the flow {options['run']} is not there; give it with the runs")
            continue
        settings = flow.config["training"]
        strengths = {item[1]: item[0] for item in settings.get("penalties") or []}
        same_time = math.isclose(settings.get("lr") or 0.0, trial.lr * trial.n, rel_tol=1e-6)
        if not same_time or set(strengths) - {"implicit_regularizer"}:
            notes.append(f"{trial.run.path.name}: {flow.path.name} is no flow of its learning rate on C + λ C_reg")
            continue
        series = trial.run.series("trajectory_distance")
        here = np.flatnonzero((series.steps == 2 * trial.examples // trial.batch_size) & np.isfinite(series.values))
        if not len(here):
            notes.append(f"{trial.run.path.name}: no distance at the end of two epochs; train one step longer")
            continue
        value, error = float(series.values[here[0]]), float(series.errors[here[0]] + series.floors[here[0]])
        coefficient = round(strengths.get("implicit_regularizer", 0.0) / trial.lr, 6)
        found.append((trial.n, coefficient, trial.seed, trial.lr, value, value > 100 * error))
    return found, notes


def _flow(path: str, given: Mapping[Any, Run]) -> Run | None:
    """The run of a flow, where its folder still is or among the runs that are given, by its path or else its name."""
    from pathlib import Path

    try:
        run = given.get(Path(path).resolve()) or Run(path)
    except FileNotFoundError:
        run = next((r for r in given.values() if r.path.name == Path(path).name), None)  # type: ignore[assignment]
    is_flow = run is not None and run.config.get("training", {}).get("optimizer", {}).get("name") == "gradient_flow"
    return run if is_flow else None


def _order(points: Sequence[tuple[Hashable, float, float]]) -> Estimate:
    """Slope of log distance over log lr, of (seed, lr, distance)."""
    seeds: dict[Hashable, list[tuple[float, float]]] = {}
    for seed, lr, distance in points:
        seeds.setdefault(seed, []).append((math.log(lr), math.log(distance)))
    slopes = [_slope(pairs) for pairs in seeds.values() if len({x for x, _ in pairs}) >= 3]
    if len(slopes) > 1:
        return over_seeds(slopes)
    pairs = [(math.log(lr), math.log(distance)) for _, lr, distance in points]
    without = np.array([_slope([p for p in pairs if p[0] != x]) for x in {x for x, _ in pairs}])
    k = len(without)
    half = 1.96 * math.sqrt((k - 1) / k * float(((without - without.mean()) ** 2).sum()))
    value = _slope(pairs)
    return Estimate(value, value - half, value + half)


def _slope(pairs: Sequence[tuple[float, float]]) -> float:
    x, y = np.array(pairs).T
    x = x - x.mean()
    return float(x @ y / (x @ x))


# -- fig. 1c: the implicit regularizer at the end of training ----------------------------------------------------------


@claim(
    source=f"{SOURCE}, fig. 1c",
    sentence="C_reg at the end of training is smaller for larger learning rates ε, and for larger strengths λ of C_reg in "
    "the loss.",
    several=True,
)
def implicit_regularizer_falls(runs: Sequence[Run]) -> Verdict:
    """C_reg falls with ε, and with λ, also at an equal time of training.

    C_reg = (‖∇C‖² + (N-B)/(N-1) Γ/B)/4, its mean over batches (eq. 22), from `gradient_norm` and `gradient_variance`, both
    of all data: the mean of its logarithm over the last tenth of the time lr·t of a run. Three slopes per seed: of log C_reg
    over log ε at λ = 0; the same with every run read at the time at which that of the smallest ε ends; and over log(ε + λ)
    at the smallest ε that has penalties. Runs that ended early, as those that diverge do, are left out.

    Statistic: the slope over ε at the end. Interval: t over seeds. The slope at equal time is the one that progress cannot
    explain: at equal epochs a larger ε has gone further, and for small ε all runs are points of one flow.

    Holds: all three intervals lie below 0. Does not hold: that over ε at the end, or over λ, lies above 0. Undecided:
    otherwise; add seeds, or, where C_reg does not fall at equal time, smaller ε, of which the theory speaks.
    Not applicable: fewer than three ε at λ = 0, or two λ above 0 at one of them, each with two seeds. Linear regression with
    noise does not hold: there C_reg rises with ε, by the spread of the iterates.
    """
    name = "implicit_regularizer_falls"
    groups = arms(runs)
    if isinstance(groups, str):
        return Verdict(name, "not applicable", groups)
    plain, penalized = groups
    slopes: dict[str, list[float]] = {"ε, at the end": [], "ε, at equal time": [], "λ": []}
    for members in by_seed(t for t in plain if not t.ended_early).values():
        end = min(t.lr * int(t.run.series("gradient_variance").steps[-1]) for t in members)
        x = [math.log(t.lr) for t in members]
        slopes["ε, at the end"].append(_finite_slope(x, [_log_c_reg(t) for t in members]))
        slopes["ε, at equal time"].append(_finite_slope(x, [_log_c_reg(t, end) for t in members]))
    for members in by_seed(t for t in penalized if not t.ended_early).values():
        x = [math.log(t.lr + t.penalty) for t in members]
        slopes["λ"].append(_finite_slope(x, [_log_c_reg(t) for t in members]))
    estimates = {key: over_seeds(values) for key, values in slopes.items()}
    at = estimates["ε, at the end"]
    rising = [key for key in ("ε, at the end", "λ") if estimates[key].low > 0]
    unclear = [key for key, e in estimates.items() if not e.high < 0]
    decision: Decision = "does not hold" if rising else "undecided" if unclear else "holds"
    reason = f"C_reg rises with {'; '.join(rising)}" if rising else f"no sure fall with {'; '.join(unclear)}; add seeds"
    if decision == "holds":
        reason = "C_reg falls with ε, at the end and at equal time, and with λ"
    elif unclear == ["ε, at equal time"] and not rising:
        reason = (
            "C_reg falls with ε at the end, but at equal time it does not: training that went further explains the fall"
        )
    details = {f"slope over {key}": str(e) for key, e in estimates.items()} | described(plain, penalized)
    return Verdict(name, decision, reason, at.value, at.interval, "below 0 (slope of log C_reg over log ε)", details)


def _log_c_reg(t: Trial, end: float | None = None) -> float:
    """Mean of log C_reg over the last tenth of the time lr·t up to `end`; NaN where the run diverged."""
    norm, variance = t.run.series("gradient_norm"), t.run.series("gradient_variance")
    steps, i, j = np.intersect1d(norm.steps, variance.steps, return_indices=True)
    share = (t.examples - t.batch_size) / (t.examples - 1) / t.batch_size
    values = (norm.values[i] ** 2 + share * variance.values[j]) / 4
    if not (np.isfinite(values).all() and (values > 0).all()):
        return math.nan
    time = t.lr * steps
    return float(np.interp(np.linspace(0.9, 1.0, 21) * (time[-1] if end is None else end), time, np.log(values)).mean())


def _finite_slope(x: Sequence[float], y: Sequence[float]) -> float:
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    return _slope(pairs) if len({a for a, _ in pairs}) >= 3 else math.nan
