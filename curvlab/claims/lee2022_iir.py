"""Lee 2022, Definition 4 and eq. 11: implicit interaction regularization, the dependence of an edge on the batch size."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..runs import Run
from .lee2022 import BAND
from .plain_descent import MIN_STEPS, PlainDescent, plateau
from .registry import Decision, Verdict, claim
from .statistics import Estimate, level, mean_over_seeds, trend
from .trials import seed_of, setting_of

NAME = "iir"
THRESHOLD = "0.85 to 1.25 (plateau / (2ρ_b/lr), worst b)"
ANSWER = 1.15  # of the sharpness at the largest b over that at the smallest
Seeds = Mapping[Hashable, list[PlainDescent]]  # runs in order of b


@claim(
    source="Lee 2022, eq. 11 and fig. 4d",
    sentence="Over batch sizes, ‖H‖_{S_b} settles at 2ρ_b/lr: proportional to b for small b, saturating at 2/lr.",
    several=True,
)
def iir(runs: Sequence[Run]) -> Verdict:
    """Implicit interaction regularization, as the b-dependence over several runs with equal lr.

    For one run, ‖H‖_{S_b} ≤ 2ρ_b/lr is the same inequality as stability in Definition 1, so it says nothing new. Runs are
    compared that agree in learning rate and seed, and in everything else but b. Statistic: the ratio of the plateau of
    ‖H‖_{S_b} to 2ρ_b/lr, the one farthest from 1 over b.

    Holds needs all of: the ratio's interval in (0.85, 1.25) for every b; plateaus of ‖H‖_{S_b} ordered in b (each at least
    0.95 of the one before, the last at least 1.5 of the first); the largest b at 0.9-1.1 of 2/lr; and, because ratio and
    order also follow from balance of noise, a *sharpness* that answers to b: its level at the largest b is at least 1.15
    times that at the smallest, for sure. On a quadratic loss the sharpness is constant.
    Does not hold: a run diverged, a ratio outside, no order, no saturation, or no answer of the sharpness.
    Undecided: a run that has not arrived and whose sharpness still rises; or intervals that cover an end.
    Not applicable: fewer than 3 batch sizes, less than a factor 16 between them, momentum.

    Intervals: of one seed, from the ten parts of each plateau; of several, by t over the seeds of the logarithms of what
    each run gives (that a ratio lies outside must be sure for all b at once, by Bonferroni), and order and saturation are
    those of the geometric means. Of several learning rates, or problems, each is decided by itself: all must hold, and one
    that does not hold decides; the statistic is that of the first with the decision.
    """
    logs = [PlainDescent(run) for run in runs]
    usable = [one for one in logs if not one.refusal]
    if not usable:
        return Verdict(NAME, "not applicable", next((one.refusal for one in logs if one.refusal), "there are no runs"))
    families = _families(usable)
    if not families:
        sizes = sorted({one.batch_size or 0 for one in usable})
        why = f"batch sizes {sizes}: needs 3 or more, a factor 16 apart, at one learning rate and seed"
        return Verdict(NAME, "not applicable", why)
    verdicts = [_judged(seeds) for seeds in families.values()]
    order: tuple[Decision, ...] = ("does not hold", "undecided", "holds")
    chosen = next(v for decision in order for v in verdicts if v.decision == decision)
    if len(families) == 1:
        return chosen
    each = {f"lr = {lr:g}, b = {list(b)}": v.decision for (_, lr, b), v in zip(families, verdicts, strict=True)}
    return replace(chosen, details=chosen.details | {"each": each})


def _families(logs: Sequence[PlainDescent]) -> dict[tuple, Seeds]:
    """Runs over enough batch sizes, by seed, of each problem, learning rate and set of batch sizes."""
    groups: dict[tuple, dict[int, PlainDescent]] = {}
    for one in sorted(logs, key=lambda one: one.run.records[-1]["step"]):  # of equal ones the longest stays
        key = (setting_of(one.run.config), one.lr, seed_of(one.run.config))
        groups.setdefault(key, {})[one.batch_size or 0] = one
    families: dict[tuple, dict[Hashable, list[PlainDescent]]] = {}
    for (setting, lr, seed), by_size in groups.items():
        sizes = tuple(sorted(by_size))
        if len(sizes) >= 3 and sizes[-1] >= 16 * sizes[0]:
            families.setdefault((setting, lr, sizes), {})[seed] = [by_size[b] for b in sizes]
    return dict(families)


@dataclass(frozen=True)
class Settled:
    """Where a run settled, in units of 2/lr: ‖H‖_{S_b} over its bound, itself, and the sharpness, which may still rise."""

    ratio: Estimate
    plateau: float
    sharpness: Estimate
    rising: bool


def _settled(one: PlainDescent) -> Settled | str:
    """Where a run settled, or why that cannot be told."""
    _, columns = one.columns("instability", "sharpness", "interaction_sharpness")
    x, s, u = (column * one.lr / 2 for column in columns)
    if len(x) < MIN_STEPS:
        return f"{len(x)} measured steps at b={one.batch_size}; needs at least {MIN_STEPS}"
    window = plateau(x)
    rising = trend(np.log(np.maximum(s[len(s) // 2 :], 1e-12))).low > 0.01
    if window is None and rising:
        return f"b={one.batch_size} has not settled and its sharpness still rises; train longer"
    window = window or slice(len(x) // 2, None)
    # ‖H‖_{S_b} over 2ρ_b/lr is x itself, because instability = ‖H‖_{S_b} / ρ_b
    return Settled(level(x[window]), float(np.median(u[window])), level(s[window]), rising)


def _judged(seeds: Seeds) -> Verdict:
    """The verdict at one learning rate."""
    sizes = [one.batch_size for one in next(iter(seeds.values()))]
    if any(one.diverged for row in seeds.values() for one in row):
        return Verdict(NAME, "does not hold", "a run diverged")
    table: list[list[Settled]] = []  # by seed, by batch size
    for row in seeds.values():
        table.append([])
        for one in row:
            found = _settled(one)
            if isinstance(found, str):
                return Verdict(NAME, "undecided", found)
            table[-1].append(found)
    columns = list(zip(*table, strict=True))
    ratios = [_level(column) for column in columns]
    surely = [_level(column, comparisons=len(sizes)) for column in columns]
    plateaus = [_geometric([one.plateau for one in column]).value for column in columns]
    answer = _answer(table)
    outside = [b for b, r in zip(sizes, surely, strict=True) if r.high < BAND[0] or r.low > BAND[1]]
    faults = [f"off the bound at b={outside}"] * bool(outside)
    if not all(b >= 0.95 * a for a, b in pairwise(plateaus)) or plateaus[-1] < 1.5 * plateaus[0]:
        faults.append("not ordered in b")
    if not 0.9 <= plateaus[-1] <= 1.1:
        faults.append(f"the largest b is at {plateaus[-1]:.2f} of 2/lr")
    faults += ["the sharpness does not answer to b: balance of noise"] * (answer.high < ANSWER)
    decision: Decision
    if not faults and all(r.low > BAND[0] and r.high < BAND[1] for r in ratios) and answer.low >= ANSWER:
        decision, reason = "holds", "plateaus follow 2ρ_b/lr, in order, up to 2/lr, and the sharpness answers to b"
    elif plateaus[-1] < 0.9 and any(row[-1].rising for row in table) and not outside:
        decision, reason = "undecided", "the largest batch is below 2/lr and its sharpness still rises; train longer"
    elif faults:
        decision, reason = "does not hold", "; ".join(faults)
    else:
        decision, reason = "undecided", "intervals are too wide; train longer" + ", or add seeds" * (len(table) > 1)
    worst = max(ratios, key=lambda r: abs(math.log(max(r.value, 1e-12))))
    details = {
        "batch_sizes": sizes,
        "seeds": [str(seed) for seed in seeds],
        "ratio_to_bound": [str(r) for r in ratios],
        "plateau_over_2_by_lr": plateaus,
        "sharpness": [_geometric([one.sharpness.value for one in column]).value for column in columns],
        "sharpness_answer": str(answer),
    }
    return Verdict(NAME, decision, reason, worst.value, worst.interval, THRESHOLD, details)


def _level(column: Sequence[Settled], comparisons: int = 1) -> Estimate:
    """The ratio at one batch size: of one seed with its own interval."""
    return column[0].ratio if len(column) == 1 else _geometric([one.ratio.value for one in column], comparisons)


def _answer(table: Sequence[Sequence[Settled]]) -> Estimate:
    """Sharpness at the largest b over that at the smallest; of one seed between the near and the far ends of intervals."""
    if len(table) > 1:
        return _geometric([row[-1].sharpness.value / row[0].sharpness.value for row in table])
    small, large = table[0][0].sharpness, table[0][-1].sharpness
    return Estimate(large.value / small.value, large.low / small.high, large.high / small.low)


def _geometric(values: Sequence[float], comparisons: int = 1) -> Estimate:
    logs = mean_over_seeds([math.log(max(v, 1e-12)) for v in values], comparisons=comparisons)
    return Estimate(*(math.exp(min(v, 700.0)) for v in (logs.value, logs.low, logs.high)))
