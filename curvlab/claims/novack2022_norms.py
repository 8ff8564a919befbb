"""Novack et al. 2022 (arXiv 2211.15853): whether regularized large batches have the gradient norms of small ones.

What the regimes are, and what is common to the claims, is said in `novack2022`. The logs need `microbatch_gradient_norm` of
micro-batches as large as small batches; for small batches themselves `batch_gradient_norm` will do. Its trajectory is cut
into 40 parts, of which the first ten are "early". As in the paper the axis is that of steps and each regime has its own
learning rate, so a regime may be far from another because it is faster: `details["settings"]` says what was compared. On a
control whose gradient norms do not depend on the batch size there is nothing to mimic: the claims are not applicable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..runs import Run
from .novack2022 import GRADIENTS, JACOBIANS, METHODS, largest_micro_batch, no_gap
from .regimes import BINS, Regime, Regimes, decide, difference
from .registry import Decision, Verdict, claim
from .statistics import Estimate, mean_over_seeds
from .trajectories import EARLY, Trajectories, ratio

MIMICS = 0.75  # of the distance of large batches: what is closer to small ones mimics them
CORRELATED = 0.5


@claim(
    source="Novack et al. 2022, figs. 1 and 2",
    sentence="Under the gradient-norm penalty micro-batch gradient norms mimic those of small batches early in training.",
    several=True,
)
def gradient_norm_mimics(runs: Sequence[Run]) -> Verdict:
    """Gradient norms of LB with GN are closer to those of SB than those of plain LB are.

    Statistic: distance of GN to SB over distance of LB to SB, geometric mean over seeds. The distance is the mean of
    |log ‖∇L_M‖ - log ‖∇L_M'‖| over the first quarter of training, |M| the size of small batches (see
    `trajectories.Trajectories`). Holds: below 0.75 for sure; does not hold: above 0.75 for sure; undecided otherwise. Not
    applicable: norms of |M| = b not measured, or LB is not surely farther from SB than SB is from other SB, so that
    there is nothing to mimic: those with the same initialization and another order of the data if there are such (needed
    where seeds are different problems), otherwise those of other seeds.
    """
    return _mimics("gradient_norm_mimics", runs, "gradient_norm")


@claim(
    source="Novack et al. 2022, figs. 1 and 2",
    sentence="Under the Fisher-trace penalty the micro-batch gradient norms mimic those of small batches early in training.",
    several=True,
)
def fisher_trace_mimics(runs: Sequence[Run]) -> Verdict:
    """As `gradient_norm_mimics`, with FT."""
    return _mimics("fisher_trace_mimics", runs, "fisher_trace")


@claim(
    source="Novack et al. 2022, fig. 1",
    sentence="Under Jacobian penalties the micro-batch gradient norms do not mimic those of small batches.",
    several=True,
)
def jacobians_do_not_mimic(runs: Sequence[Run]) -> Verdict:
    """The ratio of `gradient_norm_mimics` for AJ and UJ, the smaller one.

    Holds: above 0.75 for sure for each that there are runs of (intervals hold for both at once); does not hold: below 0.75
    for sure for one; undecided otherwise; not applicable as there.
    """
    name, regimes = "jacobians_do_not_mimic", Regimes(runs)
    kinds = [kind for kind in JACOBIANS if kind in regimes.kinds]
    if not kinds:
        raise KeyError("needs large batches with average_jacobian or unit_jacobian")
    t = Trajectories(regimes)
    large = t.distances(regimes.large)
    found = {kind: ratio(t.distances(regimes.of(kind)), large, comparisons=len(kinds)) for kind in kinds}
    e = min(found.values(), key=lambda x: x.value)
    sure = all(x.low > MIMICS for x in found.values())
    decision: Decision = (
        "holds" if sure else "does not hold" if any(x.high < MIMICS for x in found.values()) else "undecided"
    )
    details = {"ratios": {kind: str(x) for kind, x in found.items()}}
    return _of_ratio(name, decision, e, f"above {MIMICS}", t, details=details)


@claim(
    source="Novack et al. 2022, B.1 and fig. 2",
    sentence="With larger micro-batches in the penalty, gradient norms mimic those of small batches less.",
    several=True,
)
def large_micro_batches_mimic_less(runs: Sequence[Run]) -> Verdict:
    """GN with the largest |M| is farther from SB in gradient norms than GN with |M| = b.

    Statistic: ratio of the two distances of `gradient_norm_mimics`, both of norms over micro-batches of b. Holds: above 1
    for sure; does not hold: below 1 for sure; undecided otherwise; not applicable as there, or with one |M|.
    """
    regimes = Regimes(runs)
    largest = largest_micro_batch(regimes, "gradient_norm")
    t = Trajectories(regimes)
    e = ratio(t.distances(regimes.of("gradient_norm", largest)), t.distances(regimes.of("gradient_norm")))
    decision: Decision = "holds" if e.low > 1 else "does not hold" if e.high < 1 else "undecided"
    return _of_ratio("large_micro_batches_mimic_less", decision, e, "above 1", t, details={"largest": largest})


@claim(
    source="Novack et al. 2022, sec. 3.2 (i)",
    sentence="The Fisher-trace penalty mimics small batches throughout training; under the gradient-norm penalty gradient "
    "norms collapse to much smaller values.",
    several=True,
)
def fisher_trace_mimics_longer(runs: Sequence[Run]) -> Verdict:
    """After the first quarter, FT is closer to SB in gradient norms than GN, whose norms lie below those of SB.

    Statistic: distance of FT to SB over distance of GN to SB in the last three quarters. Holds: below 1 for sure, and the
    norms of GN over those of SB there are below 0.75 for sure. Does not hold: either is above for sure; undecided otherwise.
    Not applicable as `gradient_norm_mimics`, with the guard over those three quarters.
    """
    regimes = Regimes(runs)
    t, later = Trajectories(regimes), slice(EARLY, BINS)
    gn, ft = regimes.of("gradient_norm"), regimes.of("fisher_trace")
    e = ratio(t.distances(ft, later), t.distances(gn, later))
    collapse = _level(t, gn, later)
    decision: Decision = "undecided"
    if e.high < 1 and collapse.high < MIMICS:
        decision = "holds"
    elif e.low > 1 or collapse.low > MIMICS:
        decision = "does not hold"
    details = {
        "gradient_norm_over_small_batches": str(collapse),
        "fisher_trace_over_small_batches": str(_level(t, ft, later)),
    }
    threshold = "below 1, and norms of GN below 0.75 of those of SB"
    return _of_ratio("fisher_trace_mimics_longer", decision, e, threshold, t, later, details)


@claim(
    source="Novack et al. 2022, A.2 and fig. 1",
    sentence="Large batches, which generalize worse, show an early explosion of micro-batch gradient norms.",
    several=True,
)
def early_explosion(runs: Sequence[Run]) -> Verdict:
    """Gradient norms of LB peak higher in the first quarter of training than those of SB.

    Statistic: (peak of LB / start of LB) / (peak of SB / start of SB), geometric mean over seeds; the start is the first of
    40 parts of training and the peak the highest of the first ten. Holds: above 1 for sure, and the peak of LB over its
    start is above 1.25 for sure. Does not hold: either is below for sure. Undecided otherwise. Not applicable without a gap
    between SB and LB, or without norms of |M| = b.
    """
    regimes = Regimes(runs)
    t = Trajectories(regimes)
    peaks = [
        {s: math.exp(float(x[:EARLY].max() - x[0])) for s, x in t.logs(r).items()}
        for r in (regimes.large, regimes.small)
    ]
    e, own = ratio(*peaks), ratio(peaks[0], dict.fromkeys(peaks[0], 1.0))
    decision: Decision = "undecided"
    if e.low > 1 and own.low > 1.25:
        decision = "holds"
    elif e.high < 1 or own.high < 1.25:
        decision = "does not hold"
    details = {"peak_of_large": str(own), "peak_of_small": str(ratio(peaks[1], dict.fromkeys(peaks[1], 1.0)))}
    details |= {"late_large_over_small": str(_level(t, regimes.large, slice(BINS // 2, BINS)))}
    threshold = "above 1, and the peak of LB above 1.25 of its start"
    return _of_ratio("early_explosion", decision, e, threshold, t, None, details, no_gap(regimes))


@claim(
    source="Novack et al. 2022, sec. 3.2 (i) and fig. 1",
    sentence="The gradient-norm penalty converges in fewer steps than the Fisher-trace penalty, but drops at random.",
    several=True,
)
def gradient_norm_faster_but_unstable(runs: Sequence[Run]) -> Verdict:
    """GN reaches an accuracy sooner than FT, and falls below its own best more.

    Statistic: steps of FT over steps of GN, geometric mean over seeds, until the test accuracy, as running median of five,
    first is at 95% of the lower of the two final ones; and r, the mean of (best so far - accuracy) over the second half,
    GN - FT. Holds: the first above 1 and r > 0 for sure; does not hold: the first below 1, or r < 0, for sure; undecided
    otherwise. Not applicable with less than 100 measured accuracies, or without a gap between SB and LB.
    """
    regimes = Regimes(runs)
    gn, ft = (regimes.of(kind).best("test_accuracy") for kind in GRADIENTS)
    steps: list[dict[Any, float]] = [{}, {}]
    drops: dict[Any, float] = {}
    for seed in [s for s in gn if s in ft]:
        series = [m.run.series("test_accuracy") for m in (gn[seed], ft[seed])]
        if min(map(len, series)) < 100:
            raise KeyError(f"{min(map(len, series))} measured accuracies of a run; needs at least 100")
        smooth = [np.median(np.lib.stride_tricks.sliding_window_view(s.values, 5), axis=1) for s in series]
        target = 0.95 * min(x[-1] for x in smooth)
        for i in (0, 1):
            steps[i][seed] = 1.0 + float(series[i].steps[np.flatnonzero(smooth[i] >= target)[0] + 2])
        below = [(np.maximum.accumulate(s.values) - s.values)[len(s) // 2 :].mean() for s in series]
        drops[seed] = float(below[0] - below[1])
    e, r = ratio(steps[1], steps[0]), mean_over_seeds(drops.values())
    decision: Decision = "undecided"
    if e.low > 1 and r.low > 0:
        decision = "holds"
    elif e.high < 1 or r.high < 0:
        decision = "does not hold"
    details = {"drops": str(r)}
    threshold = "above 1, and drops of GN above those of FT"
    name = "gradient_norm_faster_but_unstable"
    return _of_ratio(name, decision, e, threshold, None, details=details, refused=no_gap(regimes))


@claim(
    source="Novack et al. 2022, sec. 1 and 3",
    sentence="Generalization is strongly correlated with how well micro-batch gradient norms mimic those of small batches.",
    several=True,
)
def mimicking_goes_with_generalization(runs: Sequence[Run]) -> Verdict:
    """Over regularized regimes, the closer to SB in gradient norms early on, the better the end.

    Statistic: Spearman correlation between score and minus the distance of `gradient_norm_mimics` over plain LB and all
    penalties and |M|, for each seed; mean over seeds. Holds: above 0.5 for sure; does not hold: below 0.5 for sure;
    undecided otherwise. Not applicable with fewer than five regimes, without a gap between SB and LB, and as
    `gradient_norm_mimics`.
    """
    from scipy.stats import spearmanr

    regimes = Regimes(runs)
    penalized = [kind for kind in regimes.kinds if kind not in (*METHODS, "AntiPGD")]
    groups = [regimes.large, *(regimes.of(kind, m) for kind in penalized for m in regimes.micro_batches(kind))]
    if len(groups) < 5:
        raise KeyError(f"{len(groups)} regimes of large batches with and without penalties; needs 5")
    t = Trajectories(regimes)
    distances = [t.distances(group) for group in groups]
    scores = [{s: m.score() for s, m in t.best(group).items()} for group in groups]
    seeds = [s for s in distances[0] if all(s in d for d in distances)]
    rho = mean_over_seeds(float(spearmanr([d[s] for d in distances], [x[s] for x in scores])[0]) * -1 for s in seeds)
    decision: Decision = "holds" if rho.low > CORRELATED else "does not hold" if rho.high < CORRELATED else "undecided"
    details = {"distance": {g.label: float(np.mean([*d.values()])) for g, d in zip(groups, distances, strict=True)}}
    threshold = f"above {CORRELATED} (rank correlation)"
    name = "mimicking_goes_with_generalization"
    return _of_ratio(name, decision, rho, threshold, t, details=details, refused=no_gap(regimes))


@claim(
    source="Novack et al. 2022, C and fig. 4",
    sentence="Large batches can recover the accuracy of small ones without mimicking their gradient norms (grafting, NGD).",
    several=True,
)
def mimicking_is_not_necessary(runs: Sequence[Run]) -> Verdict:
    """Some grafted or normalized regime reaches SB and does not mimic it.

    Statistic: the ratio of `gradient_norm_mimics` of the regime that reaches SB (by the rule of `gradient_norm_recovers`)
    and is farthest from it. Holds: above 0.75 for sure (intervals hold for all regimes at once); does not hold: all that
    reach are below 0.75 for sure; undecided otherwise, also where none surely reaches. Not applicable where all miss SB for
    sure, so that nothing was recovered; without a gap between SB and LB; and as `gradient_norm_mimics`.
    """
    name, regimes = "mimicking_is_not_necessary", Regimes(runs)
    kinds = [kind for kind in METHODS if kind in regimes.kinds]
    if not kinds:
        raise KeyError("needs large batches by iterative_grafting, external_grafting or normalized_gd")
    reached: dict[str, Decision] = {}
    for kind in kinds:
        d = difference(regimes.of(kind), regimes.small, comparisons=len(kinds))
        reached[kind] = decide("reaches", d.estimate, d.margin)
    t = Trajectories(regimes)
    large = t.distances(regimes.large)
    found = {
        kind: ratio(t.distances(regimes.of(kind)), large, comparisons=len(kinds))
        for kind in kinds
        if reached[kind] == "holds"
    }
    details = {"reaches": reached, "ratios": {kind: str(e) for kind, e in found.items()}}
    if not found:
        missed = set(reached.values()) == {"does not hold"}
        reason = (
            "none of them recovers the accuracy of small batches" if missed else "none of them surely does; more seeds"
        )
        refused = no_gap(regimes)
        return Verdict(name, "not applicable" if missed or refused else "undecided", refused or reason, details=details)
    e = max(found.values(), key=lambda x: x.value)
    decision: Decision = "holds" if any(x.low > MIMICS for x in found.values()) else "undecided"
    if all(x.high < MIMICS for x in found.values()):
        decision = "does not hold"
    return _of_ratio(name, decision, e, f"above {MIMICS}", t, details=details, refused=no_gap(regimes))


def _mimics(name: str, runs: Sequence[Run], kind: str) -> Verdict:
    regimes = Regimes(runs)
    t = Trajectories(regimes)
    large, ours = regimes.large, regimes.of(kind)
    e = ratio(t.distances(ours), t.distances(large))
    decision: Decision = "holds" if e.high < MIMICS else "does not hold" if e.low > MIMICS else "undecided"
    details: dict[str, Any] = {"whole_run": str(ratio(t.distances(ours, slice(None)), t.distances(large, slice(None))))}
    sides = {"ours": ours, "large": large, "small": regimes.small}
    details["settings"] = {side: next(iter(t.best(r).values())).choice for side, r in sides.items()}
    return _of_ratio(name, decision, e, f"below {MIMICS}", t, details=details)


def _level(t: Trajectories, regime: Regime, part: slice) -> Estimate:
    """Gradient norms over those of small batches, in the geometric mean over a part of training and over seeds."""
    ours, small = t.logs(regime), t.logs(t.regimes.small)
    return ratio(*({s: math.exp(float(x[part].mean())) for s, x in logs.items()} for logs in (ours, small)))


def _of_ratio(
    name: str,
    decision: Decision,
    e: Estimate,
    threshold: str,
    t: Trajectories | None,
    part: slice | None = slice(EARLY),
    details: Mapping[str, Any] | None = None,
    refused: str | None = None,
) -> Verdict:
    """The verdict on a ratio; not applicable if it was refused, or if nothing is to be mimicked in a `part` of training."""
    said = dict(details or {})
    if t is not None and part is not None:
        apart = ratio(t.distances(t.regimes.large, part), t.scatter(part))
        said["large_batches_over_scatter"] = str(apart)
        if not refused and not apart.low > 1:
            refused = f"large batches are not surely farther from small ones than seeds are from each other ({apart})"
    if refused:
        return Verdict(name, "not applicable", refused, e.value, e.interval, threshold, said)
    if not math.isfinite(e.high):
        decision = "undecided"
    reason = f"{threshold}: {e}" + ("; more seeds would tell" if decision == "undecided" else "")
    return Verdict(name, decision, reason, e.value, e.interval, threshold, said)
