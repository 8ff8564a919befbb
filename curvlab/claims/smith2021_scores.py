"""Smith et al. 2021 (arXiv 2101.12176): what the implicit regularizer C_reg explains of test performance.

These claims compare runs over learning rates, batch sizes, penalties, updates per batch and seeds (`trials`): the largest
group of runs that agree in everything else is judged, and the others are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ..runs import Run
from .registry import Decision, Verdict, claim
from .smith2021 import SOURCE
from .statistics import Estimate
from .trials import SEEDS, Trial, arms, by_seed, described, inside, largest, means, over_seeds, trials

# -- figs. 1, 5 and 6a: an explicit C_reg in the place of a large learning rate ----------------------------------------


@claim(
    source=f"{SOURCE}, figs. 1a, 1b, 5 and 6a",
    sentence="C_reg in the loss at a small learning rate recovers the test performance of a large learning rate.",
    several=True,
)
def explicit_regularizer_recovers(runs: Sequence[Run]) -> Verdict:
    """At the small ε₀ the best λ closes the gap to the best ε.

    Test performance is `Trial.score`: test accuracy (or minus the log of test loss) over the last quarter of a run, not its
    highest as in the paper, which is partly luck. ε* is the best by the mean over seeds, ε₀ the learning rate of the runs
    with penalties. Statistic: the share of the gap that λ closes, r = (λ at ε₀ - ε₀)/(ε* - ε₀), from means over seeds.
    Interval, and decision: of the paired numbers (λ at ε₀ - ε₀) - (ε* - ε₀)/2 over seeds, by t, in units of the gap and
    shifted by 1/2; so wide, by Bonferroni, that those of all λ hold at once. That of the λ with the highest lower end is
    reported: the best by the mean may be one that is unstable for some seeds.

    Holds: r > 1/2 for sure for some λ. Does not hold: r < 1/2 for sure for all λ. Undecided: otherwise (add seeds), or a
    run at ε₀ has not settled, so that the gap may be one of training time. Not applicable: no gap, that is ε* - ε₀ not
    surely above 0; fewer than two seeds; fewer than 3 learning rates without penalty, or 2 strengths above 0.
    """
    name = "explicit_regularizer_recovers"
    groups = arms(runs)
    if isinstance(groups, str):
        return Verdict(name, "not applicable", groups)
    plain, penalized = groups
    start = penalized[0].lr
    rates, strengths = means(plain, lambda t: t.lr), means(penalized, lambda t: t.penalty)
    strengths.pop(0.0, None)
    if start not in rates or not strengths:
        return Verdict(name, "not applicable", "runs at the small learning rate diverged")
    best_rate, best_strength = max(rates, key=rates.__getitem__), max(strengths, key=strengths.__getitem__)
    table = {(t.seed, t.lr, t.penalty): t.score for t in [*plain, *penalized]}
    rows = [
        (table[seed, start, 0.0], table[seed, best_rate, 0.0], [table[seed, start, x] for x in strengths])
        for seed in by_seed(plain)
        if {(seed, start, 0.0), (seed, best_rate, 0.0), *((seed, start, x) for x in strengths)} <= table.keys()
    ]
    gap = over_seeds((large - small for small, large, _ in rows), comparisons=len(rates) - 1)  # the best was picked
    details = {"ε": rates, "λ": strengths, "best ε": best_rate, "best λ": best_strength, "gap": str(gap)}
    details |= {"score": plain[0].metric} | described(plain, penalized)
    if not gap.low > 0:
        why = f"no gap to close: the best ε is not surely better than ε = {start:g} ({gap})"
        return Verdict(name, "not applicable", why, details=details)
    halves = [[explicit - (small + large) / 2 for explicit in at_each] for small, large, at_each in rows]
    columns = zip(strengths, zip(*halves, strict=True), strict=True)
    nets = {x: over_seeds(column, comparisons=len(strengths)) for x, column in columns}
    surest = max(nets, key=lambda x: nets[x].low)
    share = Estimate(*(x / gap.value + 0.5 for x in (nets[surest].value, *nets[surest].interval)))
    rising = [t for t in plain if t.lr == start and not t.settled]
    threshold = "above 0.5 (share of the gap that λ closes)"
    if rising:
        why = f"{len(rising)} runs at ε = {start:g} still improve: the gap may be one of training time; train longer"
        return Verdict(name, "undecided", why, share.value, share.interval, threshold, details)
    never = all(net.high < 0 for net in nets.values())
    decision: Decision = "holds" if share.low > 0.5 else "does not hold" if never else "undecided"
    reason = f"λ = {surest:g} at ε = {start:g} against ε = {best_rate:g}"
    return Verdict(
        name,
        decision,
        reason + "; add seeds" * (decision == "undecided"),
        share.value,
        share.interval,
        threshold,
        details,
    )


@claim(
    source=f"{SOURCE}, fig. 1b",
    sentence="The best strength λ of C_reg at a small learning rate equals the best learning rate.",
    several=True,
)
def best_penalty_is_best_rate(runs: Sequence[Run]) -> Verdict:
    """λ_opt = ε_opt, as on the paper's CIFAR-10 but not on its Fashion-MNIST, where they differ by a factor of 8.

    Statistic: log2(λ_opt/ε_opt) per seed, each the vertex of the parabola through the best point of a curve of test
    performance and its two neighbours in log ε or log λ; t interval over seeds.

    Holds: the interval lies within a factor of 2. Does not hold: it lies outside. Undecided: otherwise (add seeds), or a
    best point of the mean curve lies at an end of its grid (extend it; a value at which a seed diverged counts as worse than
    all others, so it may be the end). Not applicable: `explicit_regularizer_recovers` does
    not hold or is not applicable: without a benefit there is no optimum to compare.
    """
    name = "best_penalty_is_best_rate"
    recovery = explicit_regularizer_recovers(runs)
    if recovery.decision in ("not applicable", "does not hold"):
        return Verdict(name, "not applicable", f"explicit_regularizer_recovers: {recovery.decision}; {recovery.reason}")
    groups = arms(runs)
    assert not isinstance(groups, str)  # recovery would not apply
    plain, penalized = groups
    penalized = [t for t in penalized if t.penalty]
    for members, axis in ((plain, lambda t: t.lr), (penalized, lambda t: t.penalty)):
        curve, grid = means(members, axis), {axis(t) for t in members}
        if max(curve, key=curve.__getitem__) in (min(grid), max(grid)):
            why = f"the best of {[f'{x:g}' for x in sorted(grid)]} is at an end of the grid; extend it"
            return Verdict(name, "undecided", why, details=dict(recovery.details))
    ratios = []
    for seed, members in by_seed(penalized).items():
        rate = _vertex({t.lr: t.score for t in plain if t.seed == seed})
        ratios.append(_vertex({t.penalty: t.score for t in members}) - rate)
    at = over_seeds(ratios)
    decision, reason = inside(at, (-1.0, 1.0), "λ_opt is ε_opt to a factor of 2", "add seeds")
    return Verdict(
        name, decision, reason, at.value, at.interval, "-1 to 1 (log2 of λ_opt/ε_opt)", dict(recovery.details)
    )


def _vertex(curve: Mapping[float, float]) -> float:
    """log2 of where the parabola through the best point and its neighbours peaks; the best point itself at an end."""
    points = sorted((math.log2(x), y) for x, y in curve.items() if math.isfinite(y) and x > 0)
    if not points:
        return math.nan
    best = max(range(len(points)), key=lambda i: points[i][1])
    if not 0 < best < len(points) - 1:
        return points[best][0]
    x, y = np.array(points[best - 1 : best + 2]).T
    a, b, _ = np.polyfit(x - x[1], y, 2)
    return float(x[1] - b / (2 * a)) if a < 0 else float(x[1])


# -- figs. 3, 4, 6 and 7: which combination of two settings governs test performance ------------------------------------


@claim(
    source=f"{SOURCE}, eq. 22, figs. 3a and 6b",
    sentence="At equal epochs test performance is governed by ε/B: batch sizes agree at equal ε/B, where B is not large.",
    several=True,
)
def rate_over_batch_size(runs: Sequence[Run]) -> Verdict:
    """Batch sizes agree better at equal ε/B than at equal ε.

    Of every pair of batch sizes B₁ < B₂ and every ε, the score (`Trial.score`) of (B₂, ε) is compared with that of (B₁, ε)
    and of (B₁, εB₁/B₂), where all three exist for that seed and have settled (`Trial.settled`): in the second half of the
    run the training loss stays below half of its start, and the last quarter is at most 0.005 of accuracy (5% of a test
    loss) above the one before. For on any problem runs beyond the largest stable rate are worse whatever B is, and at equal
    epochs runs that are short of training are a function of ε/B, since εN/B is the time of an epoch.

    Statistic: R = (root mean square difference at equal ε)/(that at equal ε/B) per seed; geometric mean, and t interval of
    log R over seeds. Where curves are straight in log ε, R = p/(1 - p) for a score that is a function of ε/B^p.

    Holds: R > 2 for sure. Does not hold: R < 1 for sure. Undecided: otherwise; noise pulls R towards 1: add seeds, or a grid
    over which the score changes more. Not applicable: fewer than 2 batch sizes, or 3 comparisons, for two seeds; or no
    benefit: at the batch size with most runs the best ε is not surely better than the smallest one. So the control is not
    applicable: on linear regression what ε/B governs is the harm that noise does.
    """
    found = [t for t in trials(runs) if t.n == 1 and not t.penalty]
    members = largest(found, lambda t: t.epochs)
    scaled = _contest(members, _rate, _size, 1)
    return _governed("rate_over_batch_size", scaled, members, "ε/B", "ε", "batch sizes", (_rate, _size))


@claim(
    source=f"{SOURCE}, figs. 3b and 6c",
    sentence="At a fixed learning rate and number of steps test performance is governed by λ/B.",
    several=True,
)
def penalty_over_batch_size(runs: Sequence[Run]) -> Verdict:
    """Batch sizes agree better at equal λ/B than at equal λ, with C_reg over batches of the size of training.

    Statistic, interval and rule are those of `rate_over_batch_size`, with λ for ε, over runs of equal ε and equal steps.
    """
    found = [t for t in trials(runs) if t.n == 1 and t.penalty]
    members = largest(found, lambda t: (t.lr, t.steps))
    scaled = _contest(members, _strength, _size, 1)
    return _governed("penalty_over_batch_size", scaled, members, "λ/B", "λ", "batch sizes", (_strength, _size))


@claim(
    source=f"{SOURCE}, eq. 39, figs. 4 and 7",
    sentence="The test performance of n-step SGD is governed by the bare learning rate α, not by the effective one nα.",
    several=True,
)
def bare_rate_governs(runs: Sequence[Run]) -> Verdict:
    """Numbers of updates per batch agree better at equal α than at equal ε = nα.

    Statistic, interval and rule are those of `rate_over_batch_size`: R = (root mean square difference at equal ε)/(that at
    equal α), of every pair n₁ < n₂, at equal batch size and epochs (or, where there are more runs of it, equal updates).
    Holds: R > 2 for sure. Does not hold: R < 1 for sure. Unstable runs, which are left out, would decide it alone: the
    largest stable rate is one of α on every problem, on quadratic losses too.
    """
    members, scaled = _n_step(runs)
    return _governed("bare_rate_governs", scaled, members, "α", "ε = nα", "numbers of updates n", (_rate, _updates))


@claim(
    source=f"{SOURCE}, sec. 4, as the prediction of the SDE analogy",
    sentence="n-step SGD performs as SGD at its effective learning rate ε = nα: the temperature ε/B governs.",
    several=True,
)
def temperature_governs(runs: Sequence[Run]) -> Verdict:
    """What the SDE analogy says, and the paper denies: n agree better at equal ε = nα than at equal α.

    The reciprocal of the R of `bare_rate_governs`, by the same rule; that both hold is impossible.
    """
    members, scaled = _n_step(runs)
    swapped = [(same, ratio, count) for ratio, same, count in scaled]
    return _governed("temperature_governs", swapped, members, "ε = nα", "α", "numbers of updates n", (_rate, _updates))


Axis = Callable[[Trial], float]
# Per seed: root mean square difference at equal ratio, at equal rate, number of comparisons.
Contest = list[tuple[float, float, int]]


def _n_step(runs: Sequence[Run]) -> tuple[list[Trial], Contest]:
    found = [t for t in trials(runs) if not t.penalty]
    choices = [
        largest(found, lambda t: (t.batch_size, t.epochs)),
        largest(found, lambda t: (t.batch_size, t.steps * t.n)),
    ]
    members = max(choices, key=lambda group: len({t.n for t in group}))
    at_equal = _contest(members, _rate, _updates, -1)
    return members, [
        (rate, ratio, count) for ratio, rate, count in at_equal
    ]  # here the plain rate is what should govern


def _contest(members: Iterable[Trial], rate: Axis, size: Axis, power: int) -> Contest:
    """Differences between sizes at equal rate/size^power and at equal rate, over the points where both can be taken."""
    found: Contest = []
    for trials_of in by_seed(members).values():
        table = {(size(t), round(math.log2(rate(t)), 2)): t.score for t in trials_of if t.settled}
        ratios, rates = [], []
        for (large, x), score in table.items():
            for small in {s for s, _ in table if s < large}:
                scaled = (small, round(x + power * math.log2(small / large), 2))
                if scaled in table and (small, x) in table:
                    ratios.append(score - table[scaled])
                    rates.append(score - table[small, x])
        if len(ratios) >= 3:
            found.append((_rms(ratios), _rms(rates), len(ratios)))
    return found


def _governed(
    name: str, contest: Contest, members: Sequence[Trial], right: str, wrong: str, what: str, axes: tuple[Axis, Axis]
) -> Verdict:
    if len(contest) < SEEDS:
        left_out = sum(not t.settled for t in members)
        why = f"needs {SEEDS} seeds with 2 {what} and 3 comparisons both at equal {right} and at equal {wrong}; there are "
        why += f"{len(contest)}, from {len(members)} runs of which {left_out} are unstable or still improve"
        return Verdict(name, "not applicable", why)
    logs = over_seeds(math.log(max(rates, 1e-12) / max(ratios, 1e-12)) for ratios, rates, _ in contest)
    at = Estimate(math.exp(logs.value), math.exp(logs.low), math.exp(min(logs.high, 700.0)))
    benefit = _benefit(members, *axes)
    details = {
        f"rms difference at equal {right}": _rms(r for r, _, _ in contest),
        f"rms difference at equal {wrong}": _rms(r for _, r, _ in contest),
        "benefit": str(benefit),
        "score": members[0].metric,
        "comparisons": sum(count for *_, count in contest),
        "not settled": sorted(t.run.path.name for t in members if not t.settled),
    } | described(members)
    threshold = f"above 2 (differences at equal {wrong} / at equal {right})"
    if not benefit.low > 0:
        why = f"no benefit to be governed: the best is not surely better than the smallest ({benefit})"
        return Verdict(name, "not applicable", why, at.value, at.interval, threshold, details)
    decision: Decision = "holds" if at.low > 2 else "does not hold" if at.high < 1 else "undecided"
    reason = f"differences at equal {wrong} over those at equal {right}: {at}"
    reason += "; add seeds, or a wider grid" * (decision == "undecided")
    return Verdict(name, decision, reason, at.value, at.interval, threshold, details)


def _benefit(members: Sequence[Trial], rate: Axis, size: Axis) -> Estimate:
    """Score at the best rate less that at the smallest, of settled runs of the size that has most, paired by seed."""
    sizes = [size(t) for t in members if t.settled]
    common = [t for t in members if t.settled and size(t) == max(sorted(set(sizes)), key=sizes.count)]
    seeds = by_seed(common)
    curve = {rate(t) for t in common if all(any(rate(o) == rate(t) for o in own) for own in seeds.values())}
    if len(curve) < 2:
        return over_seeds([])
    average = means([t for t in common if rate(t) in curve], rate)
    ends = [{rate(t): t.score for t in own} for own in seeds.values()]
    best = max(average, key=average.__getitem__)
    return over_seeds((own[best] - own[min(curve)] for own in ends), comparisons=len(curve) - 1)


def _rate(t: Trial) -> float:
    return t.lr


def _strength(t: Trial) -> float:
    return t.penalty


def _size(t: Trial) -> float:
    return t.batch_size


def _updates(t: Trial) -> float:
    return t.n


def _rms(x: Iterable[float]) -> float:
    return float(np.sqrt(np.mean(np.square(list(x)))))
