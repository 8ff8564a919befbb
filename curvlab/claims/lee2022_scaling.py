"""Lee 2022, sec. 5: how concentrated batch gradients are, and which scaling of (b, lr) that gives (eq. 12, fig. 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..runs import Run
from .plain_descent import MIN_STEPS, PlainDescent
from .registry import Decision, Verdict, claim
from .statistics import Estimate, average, batch_medians, mean_over_seeds
from .trials import Trial, largest, trials

RULES: dict[str, Callable[[float, float, float], float]] = {  # (b, ρ_b, lr) -> the ratio that a rule keeps
    "LSSR": lambda b, rho, lr: rho / lr,
    "linear": lambda b, rho, lr: b / lr,
    "square_root": lambda b, rho, lr: b**0.5 / lr,
}


@claim(
    source="Lee 2022, sec. 5.1 and Definition 3",
    sentence="ρ_b is close to the squared mean resultant length R̄_b² of batch gradients.",
)
def resultant_length(run: Run) -> Verdict:
    """R̄_b² and ρ_b agree over a run.

    Statistic: the ratio of R̄_b² to ρ_b, each averaged over one of ten contiguous parts of the run (a single R̄_b² from few
    batches is noisy, but without bias): mean over the parts, with a t interval.

    Holds: the interval lies in (0.8, 1.25). Where the spread of ‖g_b‖ is not small the paper expects less; the details have
    its level where `batch_gradient_norm_variation` was measured.
    Does not hold: the interval lies outside.
    Undecided: it covers an end, or fewer than 100 measured steps; train longer, or take more `samples`.
    Not applicable: full batches, for which both are 1; an optimizer or loss other than plain descent on the measured one.

    It is a statement about gradients and not about an edge, so it may well be true of a quadratic loss too, whose "holds"
    would be evidence of nothing: where the sharpness moves by less than 5%, as on the controls, it is not applicable.
    """
    name = "resultant_length"
    logs = PlainDescent(run)
    if refusal := _no_noise(logs) or _constant_curvature(logs):
        return Verdict(name, "not applicable", refusal)
    _, (length, rho) = logs.columns("mean_resultant_length", "gradient_concentration")
    if len(rho) < MIN_STEPS:
        return Verdict(name, "undecided", f"{len(rho)} measured steps; needs at least {MIN_STEPS}")
    parts = zip(np.array_split(length, 10), np.array_split(rho, 10), strict=True)
    ratio = mean_over_seeds(float(a.mean() / b.mean()) for a, b in parts)
    decision, reason = _within(ratio, 0.8, 1.25, "R̄_b² and ρ_b agree", "train longer, or take more samples")
    details = {"batch_size": logs.batch_size, "rho_b": float(np.median(rho))}
    if "batch_gradient_norm_variation" in run.names:
        details["norm_variation"] = float(np.median(logs.columns("batch_gradient_norm_variation")[1][0]))
    return Verdict(name, decision, reason, ratio.value, ratio.interval, "0.8 to 1.25 (R̄_b²/ρ_b)", details)


@claim(
    source="Lee 2022, Definition 3 and eq. 12",
    sentence="The batches that training draws have E‖g_b‖² = ‖∇L‖²/ρ_b, with ρ_b from the moments of single examples.",
)
def concentration_of_drawn_batches(run: Run) -> Verdict:
    """ρ_b, computed by eq. 12 from per-example gradients, against the batches that were drawn.

    Statistic: mean over steps of ‖g_b‖² ρ_b/‖∇L‖², with `batch_gradient_norm` for ‖g_b‖. Given the past each term has the
    expectation 1, so they are uncorrelated; interval from ten contiguous batches of steps.

    Holds: the interval lies in (0.9, 1.1).
    Does not hold: it lies outside. Since the relation is exact, this means that batches are not drawn as stated, or that
    the gradient trained with is not that of the loss that is measured.
    Undecided: otherwise, or with fewer than 100 measured steps; train longer.
    Not applicable: full batches; epochs without replacement, whose batches are not independent of those before.

    On a quadratic loss it is as exact, and would be evidence of nothing: where the sharpness moves by less than 5%, as on
    the controls, it is not applicable.
    """
    name = "concentration_of_drawn_batches"
    logs = PlainDescent(run)
    drawn = run.config.get("training", {}).get("batches") or {}
    refusal = _no_noise(logs) or _constant_curvature(logs)
    if refusal is None and drawn.get("epochs"):
        refusal = "batches are drawn in epochs, so they depend on those before"
    if refusal:
        return Verdict(name, "not applicable", refusal)
    _, (norm, gradient, rho) = logs.columns("batch_gradient_norm", "gradient_norm", "gradient_concentration")
    if len(rho) < MIN_STEPS:
        return Verdict(name, "undecided", f"{len(rho)} measured steps; needs at least {MIN_STEPS}")
    mean = average(norm**2 * rho / gradient**2)
    decision, reason = _within(mean, 0.9, 1.1, "drawn batches are as concentrated as ρ_b says", "train longer")
    return Verdict(
        name,
        decision,
        reason,
        mean.value,
        mean.interval,
        "0.9 to 1.1 (‖g_b‖² ρ_b/‖∇L‖²)",
        {"batch_size": logs.batch_size},
    )


def _no_noise(logs: PlainDescent) -> str | None:
    return logs.refusal or ("full batches: both sides are equal by definition" if logs.full_batch else None)


def _constant_curvature(logs: PlainDescent) -> str | None:
    """Why a run may be one on a quadratic loss, or None."""
    _, (s,) = logs.columns("sharpness")
    low, high = np.sort(batch_medians(s, min(20, len(s))))[[0, -1]]
    return None if high >= 1.05 * low else "the curvature never moved: the loss may be quadratic, as on the controls"


def _within(at: Estimate, low: float, high: float, well: str, more: str) -> tuple[Decision, str]:
    if low < at.low and at.high < high:
        return "holds", well
    if at.high < low or at.low > high:
        return "does not hold", f"{at} is outside {low:g} to {high:g}"
    return "undecided", f"{at} is too wide or at an end; {more}"


@claim(
    source="Lee 2022, sec. 5.2, eq. 12 and fig. 5",
    sentence="Over batch sizes and learning rates the final sharpness follows ρ_b/lr (LSSR), better than b/lr or √b/lr.",
    several=True,
)
def scaling_of_sharpness(runs: Sequence[Run]) -> Verdict:
    """Which scaling rule the final sharpness of a grid over (b, lr) follows.

    Each rule says that runs with an equal ratio end alike: LSSR ρ_b/lr, linear b/lr, square root √b/lr. For each seed the
    logarithm of the final sharpness (median of the last quarter of the run) is fitted by a parabola in the logarithm of the
    ratio, which is equally free for all three. ρ_b is eq. 12 with one ρ for the whole grid, as in the paper's figure: the
    median over its runs of the ρ that their `gradient_concentration` gives at the end. Statistic: root mean square residual
    of LSSR over that of the better of the two other rules; geometric mean over seeds, with a t interval.

    Holds: the interval lies below 1, and LSSR explains at least 80% of the variance (mean over seeds).
    Does not hold: the interval lies above 1; or LSSR explains less than half; or the sharpness varies by less than 5%
    over the grid, as on a quadratic loss.
    Undecided: otherwise; add seeds, or reach further into saturation (b near N).
    Not applicable: fewer than 3 seeds that have the whole grid; fewer than 4 batch sizes, a factor 16 apart and up to N/4
    at least; fewer than 3 learning rates, a factor 4 apart. Runs that diverged, or of other settings, are left out.

    On the controls the sharpness is constant, so it does not hold.
    """
    return _scaling("scaling_of_sharpness", runs, "sharpness", np.log, 0.05)


@claim(
    source="Lee 2022, sec. 5.2, eq. 12 and fig. 5",
    sentence="Over batch sizes and learning rates the test accuracy follows ρ_b/lr (LSSR), better than b/lr or √b/lr.",
    several=True,
)
def scaling_of_accuracy(runs: Sequence[Run]) -> Verdict:
    """Which scaling rule the final test accuracy of a grid over (b, lr) follows, by the rule of `scaling_of_sharpness`.

    Statistic: as there, with the accuracy itself instead of the logarithm of the sharpness.

    Holds: the interval of the ratio of residuals lies below 1, and LSSR explains at least 80% of the variance.
    Does not hold: the interval lies above 1; or LSSR explains less than half; or the accuracy varies by less than 0.005 over
    the grid.
    Undecided: otherwise; add seeds, or a harder problem, on which (b, lr) matter more.
    Not applicable: as there, and without `test_accuracy`, as on the controls, which are regressions.
    """
    return _scaling("scaling_of_accuracy", runs, "test_accuracy", lambda accuracy: accuracy, 0.005)


def _scaling(
    name: str, runs: Sequence[Run], quantity: str, transform: Callable[[np.ndarray], np.ndarray], least: float
) -> Verdict:
    found = [t for t in trials(runs) if t.n == 1 and not t.penalty]
    both = [largest(found, lambda t: ("epochs", t.epochs)), largest(found, lambda t: ("steps", t.steps))]
    grid = [t for t in max(both, key=len) if _ended(t.run)]
    seeds = sorted({str(t.seed) for t in grid})
    table = {seed: {(t.batch_size, t.lr): t for t in grid if str(t.seed) == seed} for seed in seeds}
    cells = sorted(set.intersection(*(set(one) for one in table.values()))) if table else []
    if lack := _lacks(cells, len(seeds), grid[0].examples if grid else 0):
        return Verdict(name, "not applicable", lack)
    members = {seed: [table[seed][cell] for cell in cells] for seed in seeds}
    rho = float(np.median([_single(t) for ts in members.values() for t in ts if _share(t) > 0]))
    ends = {seed: transform(np.array([_end(t.run, quantity) for t in ts])) for seed, ts in members.items()}
    fits = {
        rule: [
            _residual(np.log([ratio(t.batch_size, _concentration(t, rho), t.lr) for t in ts]), ends[seed])
            for seed, ts in members.items()
        ]
        for rule, ratio in RULES.items()
    }
    worse = np.minimum(fits["linear"], fits["square_root"])
    logs = mean_over_seeds(np.log(np.maximum(fits["LSSR"], 1e-12) / np.maximum(worse, 1e-12)))
    ratio = Estimate(*(float(np.exp(min(v, 700.0))) for v in (logs.value, logs.low, logs.high)))
    varies = float(np.mean([np.ptp(y) for y in ends.values()]))
    df = len(cells) - 3
    explained = {
        rule: float(
            np.mean([1 - r**2 * df / max(len(y) * y.var(), 1e-300) for r, y in zip(rs, ends.values(), strict=True)])
        )
        for rule, rs in fits.items()
    }
    decision: Decision
    if varies < least:
        decision, reason = "does not hold", f"{quantity} does not answer to (b, lr): it varies by {varies:.2g}"
    elif ratio.low > 1 or explained["LSSR"] < 0.5:
        best = min(fits, key=lambda rule: float(np.mean(fits[rule])))
        decision, reason = (
            "does not hold",
            f"the best rule is {best}; LSSR explains {explained['LSSR']:.0%} of the variance",
        )
    elif ratio.high < 1 and explained["LSSR"] >= 0.8:
        decision, reason = (
            "holds",
            f"LSSR explains {explained['LSSR']:.0%} of the variance and leaves less than the others",
        )
    else:
        decision, reason = "undecided", "the rules are not told apart; add seeds, or batch sizes closer to N"
    details = {
        "explained": explained,
        "residuals": {rule: float(np.mean(rs)) for rule, rs in fits.items()},
        "rho": rho,
        "seeds": seeds,
        "batch_sizes": sorted({b for b, _ in cells}),
        "learning_rates": sorted({lr for _, lr in cells}),
        "cells": len(cells),
    }
    threshold = "below 1 (residual of LSSR over that of the better other rule)"
    return Verdict(name, decision, reason, ratio.value, ratio.interval, threshold, details)


def _lacks(cells: Sequence[tuple[int, float]], seeds: int, examples: int) -> str | None:
    sizes, rates = sorted({b for b, _ in cells}), sorted({lr for _, lr in cells})
    wide = len(sizes) >= 4 and sizes[-1] >= 16 * sizes[0] and 4 * sizes[-1] >= examples
    if wide and len(rates) >= 3 and rates[-1] >= 3.99 * rates[0] and seeds >= 3 and len(cells) >= 9:
        return None
    return (
        "needs a grid of 4 batch sizes, a factor 16 apart and up to N/4, by 3 learning rates, a factor 4 apart, with 3 "
        f"seeds; common to {seeds} seeds are b = {sizes} and lr = {rates}"
    )


def _ended(run: Run) -> bool:
    logs = PlainDescent(run)
    return logs.refusal is None and not logs.diverged


def _end(run: Run, quantity: str) -> float:
    """Median over the last quarter of the run."""
    values = run.series(quantity).values
    return float(np.median(values[-max(1, len(values) // 4) :]))


def _share(t: Trial) -> float:
    """γ/b of eq. 1."""
    replaced = t.run.config["training"].get("replacement")
    gamma = 1.0 if replaced else (t.examples - t.batch_size) / max(t.examples - 1, 1)
    return gamma / t.batch_size


def _single(t: Trial) -> float:
    """ρ of single examples, from that of the run's batches by eq. 12."""
    inverse = 1 / _end(t.run, "gradient_concentration")
    return 1 / ((inverse - 1) / _share(t) + 1)


def _concentration(t: Trial, rho: float) -> float:
    """ρ_b by eq. 12."""
    return 1 / (_share(t) / rho + 1 - _share(t))


def _residual(x: np.ndarray, y: np.ndarray) -> float:
    """Root mean square residual of a parabola."""
    x = x - x.mean()
    left = y - np.polyval(np.polyfit(x, y, 2), x)
    return float(np.sqrt(left @ left / (len(x) - 3)))
