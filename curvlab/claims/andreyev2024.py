"""Andreyev and Beneventano 2024 (arXiv 2412.20553): batch sharpness as what marks the edge of stability of SGD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..runs import Run
from .lee2022 import BAND
from .plain_descent import FALLING, MIN_STEPS, PlainDescent, plateau, plateau_start
from .registry import Decision, Verdict, claim
from .statistics import Estimate, batch_medians, level, mean_over_seeds, trend
from .trials import Trial, largest, trials


@claim(
    source="Andreyev and Beneventano 2024 (arXiv 2412.20553)",
    sentence="Under SGD batch sharpness, E[g_bᵀ H_b g_b/‖g_b‖²], rises to 2/lr and hovers there.",
)
def batch_sharpness_edge(run: Run) -> Verdict:
    """Batch sharpness settles at 2/lr, in a run of mini-batches.

    Statistic: level of x = batch_sharpness·lr/2 over the plateau: the steps after its arrival near 1 (`plateau` of
    `interaction_edge`), in the second half of the run.

    Holds: the interval of the level lies in (0.85, 1.25), the loss still falls (trend of log L below -0.001), and the
    sharpness has moved by 5% or more in the run. Noise that balances descent puts `instability` at 2/lr, but not this.
    Does not hold: the level lies outside the band; x stays below it and no longer rises (trend of log x over the second half
    not surely above 0.01); the run diverged; or the curvature never moved.
    Undecided: x still rises, or arrives in the last 50 measured steps, or the loss is flat; train longer.
    Not applicable: full batches (`interaction_edge` is the same there), or an optimizer whose threshold is not 2/lr.

    On the controls batch sharpness is constant, wherever it lies, so it never holds.
    """
    name = "batch_sharpness_edge"
    logs = PlainDescent(run)
    refusal = logs.refusal or ("full batches: interaction_edge is the same claim there" if logs.full_batch else None)
    if refusal:
        return Verdict(name, "not applicable", refusal)
    steps, (loss, x, s) = logs.columns("loss", "batch_sharpness", "sharpness")
    x = x * logs.lr / 2
    if logs.diverged:
        return Verdict(name, "does not hold", "the loss diverged")
    if len(x) < MIN_STEPS:
        return Verdict(name, "undecided", f"{len(x)} measured steps; needs at least {MIN_STEPS}")
    low, high = np.sort(batch_medians(s, 20))[[0, -1]]
    if high < 1.05 * low:
        return Verdict(name, "does not hold", "the curvature never moved")
    late = slice(len(x) // 2, None)
    window = plateau(x)
    if window is None:
        last = level(x[late])
        if plateau_start(x) is not None or _rises(x[late]) or BAND[0] <= last.high:
            return Verdict(name, "undecided", f"ends at {last} of 2/lr and still rises, or just arrives; train longer")
        why = f"batch sharpness settles at {last} of 2/lr"
        return Verdict(name, "does not hold", why, last.value, last.interval, "0.85 to 1.25 (batch_sharpness·lr/2)")
    at, falling = level(x[window]), trend(np.log(loss[window]))
    decision: Decision
    if at.high < BAND[0] or at.low > BAND[1]:
        decision, reason = "does not hold", f"settles at {at} of 2/lr"
    elif at.low > BAND[0] and at.high < BAND[1] and falling.high < FALLING:
        decision, reason = "holds", "settles at 2/lr while the loss falls"
    else:
        decision, reason = "undecided", "the level or the fall of the loss is not clear; train longer"
    details = {
        "batch_size": logs.batch_size,
        "from_step": int(steps[window][0]),
        "sharpness": str(level(s[window] * logs.lr / 2)),
        "log_loss_trend": str(falling),
    }
    return Verdict(name, decision, reason, at.value, at.interval, "0.85 to 1.25 (batch_sharpness·lr/2)", details)


@claim(
    source="Andreyev and Beneventano 2024 (arXiv 2412.20553), against Lee 2022, Definition 1",
    sentence="For every batch size, batch sharpness marks the edge of SGD better than tr(H S_b)/tr(S_n): it settles closer "
    "to 2/lr.",
    several=True,
)
def batch_sharpness_is_closer(runs: Sequence[Run]) -> Verdict:
    """Which of two quantities settles closer to 2/lr, at each batch size: batch sharpness or Lee's instability.

    For each run the levels of batch_sharpness·lr/2 and instability·lr/2 over the second half, and the difference of their
    distances to 1. By batch size the mean of it over seeds with its t interval, or, with fewer than 3 seeds, that of the
    first run from the intervals of its levels (root of the sum of squares). Intervals hold for all batch sizes at once
    (Bonferroni, with seeds). Statistic: the mean at the batch size where batch sharpness fares worst.

    Holds: at every b the interval lies below 0: batch sharpness is closer.
    Does not hold: at some b it lies above 0: instability is closer, and batch sharpness is not on its way: its level is
    above 0.95, or the trend of its logarithm over the second half is not surely above 0.01.
    Undecided: otherwise; add seeds, or train longer.
    Not applicable: fewer than 3 batch sizes below N at one learning rate and otherwise equal settings. Of several such
    groups the largest is judged; full batches, for which both are equal, and runs that diverged are left out.

    At any plateau of the loss noise alone puts instability at 2/lr (eq. 6 of Lee), so being closer is not yet being
    the cause: the controls show instability at 2/lr and batch sharpness far below it, and so the claim does not hold there.
    """
    name = "batch_sharpness_is_closer"
    found = [t for t in trials(runs) if t.n == 1 and not t.penalty and _usable(t)]
    group = sorted(largest(found, lambda t: t.lr), key=lambda t: (t.batch_size, str(t.seed)))
    sizes = sorted({t.batch_size for t in group})
    if len(sizes) < 3:
        return Verdict(name, "not applicable", f"batch sizes {sizes} below N at one learning rate; needs 3 or more")
    by_size: dict[int, list[tuple[Estimate, Estimate]]] = {b: [] for b in sizes}
    unsettled = []
    for t in group:
        _, (batch, instability) = PlainDescent(t.run).columns("batch_sharpness", "instability")
        if len(batch) < MIN_STEPS:
            why = f"{len(batch)} measured steps at b={t.batch_size}; needs at least {MIN_STEPS}"
            return Verdict(name, "undecided", why)
        late = slice(len(batch) // 2, None)
        by_size[t.batch_size].append((level(batch[late] * t.lr / 2), level(instability[late] * t.lr / 2)))
        if _rises(batch[late]) and by_size[t.batch_size][-1][0].high < 0.95:
            unsettled.append(t.batch_size)
    nearer = {b: _nearer(pairs, len(sizes)) for b, pairs in by_size.items()}
    worse = [b for b, d in nearer.items() if d.low > 0 and b not in unsettled]
    decision: Decision
    if worse:
        decision, reason = "does not hold", f"instability is closer to 2/lr at b={worse}"
    elif unsettled:
        decision, reason = "undecided", f"batch sharpness still rises at b={sorted(set(unsettled))}; train longer"
    elif all(d.high < 0 for d in nearer.values()):
        decision, reason = "holds", "batch sharpness is closer to 2/lr at every b"
    else:
        unclear = [b for b, d in nearer.items() if d.high >= 0]
        decision, reason = "undecided", f"neither is surely closer at b={unclear}; add seeds or train longer"
    worst = max(nearer.values(), key=lambda d: d.value)
    details: dict[str, Any] = {
        "runs": [t.run.path.name for t in group],
        "batch_sizes": sizes,
        "seeds": {b: len(pairs) for b, pairs in by_size.items()},
        "batch_sharpness": {b: str(_over(pairs, 0)) for b, pairs in by_size.items()},
        "instability": {b: str(_over(pairs, 1)) for b, pairs in by_size.items()},
        "difference_of_distances": {b: str(d) for b, d in nearer.items()},
    }
    threshold = "below 0 (distance of batch sharpness to 2/lr minus that of instability, worst b, in 2/lr)"
    return Verdict(name, decision, reason, worst.value, worst.interval, threshold, details)


def _usable(t: Trial) -> bool:
    logs = PlainDescent(t.run)
    return logs.refusal is None and not logs.full_batch and not logs.diverged


def _rises(x: np.ndarray) -> bool:
    return trend(np.log(np.maximum(x, 1e-12))).low > 0.01


def _over(pairs: Sequence[tuple[Estimate, Estimate]], which: int) -> Estimate:
    """The level over seeds, or in the one run that there is."""
    one = pairs[0][which]
    return mean_over_seeds(pair[which].value for pair in pairs) if len(pairs) >= 3 else one


def _nearer(pairs: Sequence[tuple[Estimate, Estimate]], comparisons: int) -> Estimate:
    """The distance of the first level to 1 minus that of the second."""
    distances = [abs(a.value - 1) - abs(b.value - 1) for a, b in pairs]
    if len(pairs) >= 3:
        return mean_over_seeds(distances, comparisons=comparisons)
    half = math.hypot(*((e.high - e.low) / 2 for e in pairs[0]))
    return Estimate(distances[0], distances[0] - half, distances[0] + half)
