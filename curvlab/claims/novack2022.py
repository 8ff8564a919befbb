"""Novack, Kaur, Marwah, Garg and Lipton 2022 (arXiv 2211.15853): what makes large batches generalize like small ones.

All claims are about several runs of one problem: plain SGD with small batches (SB) and with large ones (LB, at least 8 times
as large), and large batches with a penalty or by another method, over seeds. Runs are paired by the seeds of initialization
and data. What differs within a regime (learning rate, strength, length) was chosen for it: the choice with the best mean
counts, and intervals are widened to hold for all choices at once. Unfinished and diverged runs are left out and named.

Scores are differences d in test accuracy at the end of training, where m = 0.005 is the smallest that matters; for
regressions, d is minus the difference in log test loss, m = 0.1 (see `regimes.Difference`). One seed decides nothing; an
undecided claim becomes decidable by more seeds. Claims about generalization are not applicable unless SB is surely above LB:
on a control, where the batch size does not matter, none of them can hold. `details["paper"]` has the paper's own value of
the statistic, by data set. Claims about gradient norms are in `novack2022_norms`.

Runs of `curvlab` state all of this themselves. Those of another loop say it by the configuration of their `Monitor`:
``config={"experiment": {"data": "cifar10", "penalty": ["gradient_norm=0.01"], "micro_batch": 128, "init_seed": 0,
"data_seed": 0}}``, without penalty where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..runs import Run
from .regimes import Difference, Regimes, Relation, decide, difference
from .registry import Decision, Verdict, claim

JACOBIANS = ("average_jacobian", "unit_jacobian")
GRADIENTS = ("gradient_norm", "fisher_trace")
METHODS = ("IterativeGrafting", "ExternalGrafting", "NormalizedGD")
Paper = Mapping[str, float]
_TABLE_1 = ("cifar10", "cifar100", "tiny_imagenet", "svhn")
_SB, _LB = (92.33, 71.01, 39.64, 93.69), (90.00, 66.45, 27.71, 90.37)


def _minus(ours: Sequence[float], others: Sequence[float], names: Sequence[str] = _TABLE_1) -> dict[str, float]:
    """Differences of percentages as the statistic has them: between 0 and 1."""
    return {name: round((a - b) / 100, 4) for name, a, b in zip(names, ours, others, strict=True)}


@claim(
    source="Novack et al. 2022, table 1",
    sentence="Small batches generalize better than large ones.",
    several=True,
)
def generalization_gap(runs: Sequence[Run]) -> Verdict:
    """SB is above LB, the premise of every other claim of the paper.

    Statistic: d = SB - LB over seeds. Holds: d > 0 for sure (the whole interval); does not hold: d < m for sure; undecided
    otherwise, and with one seed. On a control without a gap it does not hold, or is undecided.
    """
    regimes = Regimes(runs)
    d = difference(regimes.small, regimes.large)
    return _of_difference("generalization_gap", "above", d, regimes, None, _minus(_SB, _LB))


@claim(
    source="Novack et al. 2022, table 1",
    sentence="The gradient-norm penalty on micro-batches of the size of small batches recovers the accuracy of the latter.",
    several=True,
)
def gradient_norm_recovers(runs: Sequence[Run]) -> Verdict:
    """LB with `gradient_norm_penalty`, |M| the size of small batches, is not below SB by more than m.

    Statistic: d = GN - SB over seeds. Holds: d > -m for sure; does not hold: d < 0 for sure, and not the former; undecided
    otherwise; not applicable unless SB - LB > 0 for sure. The paper's own GN is short of SB by more than m on three of four
    data sets ("nearly recovers").
    """
    paper = _minus((91.98, 70.22, 37.78, 92.77), _SB)
    return _against_small_batches("gradient_norm_recovers", runs, "gradient_norm", "reaches", paper)


@claim(
    source="Novack et al. 2022, table 1",
    sentence="The Fisher-trace penalty on micro-batches of the size of small batches recovers the accuracy of the latter.",
    several=True,
)
def fisher_trace_recovers(runs: Sequence[Run]) -> Verdict:
    """LB with `fisher_trace_penalty`: statistic d = FT - SB, and the rule of `gradient_norm_recovers`."""
    paper = _minus((91.79, 71.19, 40.25, 93.72), _SB)
    return _against_small_batches("fisher_trace_recovers", runs, "fisher_trace", "reaches", paper)


@claim(
    source="Novack et al. 2022, table 1",
    sentence="Penalizing the average Jacobian does not recover the accuracy of small batches.",
    several=True,
)
def average_jacobian_fails(runs: Sequence[Run]) -> Verdict:
    """LB with `average_jacobian_penalty` stays below SB.

    Statistic: d = AJ - SB over seeds. The opposite of `gradient_norm_recovers`: holds if d < 0 for sure and may be below
    -m; does not hold if d > -m for sure; undecided otherwise; not applicable without a gap.
    """
    paper = _minus((90.41, 65.95, 22.86, 91.76), _SB)
    return _against_small_batches("average_jacobian_fails", runs, "average_jacobian", "misses", paper)


@claim(
    source="Novack et al. 2022, table 1",
    sentence="Penalizing the unit Jacobian does not recover the accuracy of small batches.",
    several=True,
)
def unit_jacobian_fails(runs: Sequence[Run]) -> Verdict:
    """LB with `unit_jacobian_penalty`: statistic d = UJ - SB, and the rule of `average_jacobian_fails`."""
    paper = _minus((90.46, 66.41, 26.07, 92.08), _SB)
    return _against_small_batches("unit_jacobian_fails", runs, "unit_jacobian", "misses", paper)


@claim(
    source="Novack et al. 2022, sec. 3.2 (iii) and table 1",
    sentence="Penalties on loss gradients (gradient norm, Fisher trace) generalize better than those on the Jacobian.",
    several=True,
)
def loss_gradients_beat_jacobians(runs: Sequence[Run]) -> Verdict:
    """Each of GN and FT that there are runs of is above each of AJ and UJ.

    Statistic: the smallest of the paired differences d, whose intervals hold for all at once. Holds: all d > 0 for sure;
    does not hold: some d < m for sure; undecided otherwise; not applicable without a gap between SB and LB.
    """
    name, regimes = "loss_gradients_beat_jacobians", Regimes(runs)
    ours = [regimes.of(kind) for kind in GRADIENTS if kind in regimes.kinds]
    others = [regimes.of(kind) for kind in JACOBIANS if kind in regimes.kinds]
    if not (ours and others):
        raise KeyError(
            "needs large batches with gradient_norm or fisher_trace, and with average_jacobian or unit_jacobian"
        )
    comparisons = len(ours) * len(others)
    found = {f"{a.label} - {b.label}": difference(a, b, comparisons=comparisons) for a in ours for b in others}
    decisions = {pair: decide("above", d.estimate, d.margin) for pair, d in found.items()}
    worst = min(found, key=lambda pair: found[pair].estimate.value)
    failing = next((pair for pair in decisions if decisions[pair] == "does not hold"), None)
    shown = failing or worst
    decision: Decision = (
        "holds" if set(decisions.values()) == {"holds"} else "does not hold" if failing else "undecided"
    )
    paper = _minus((91.79, 70.22, 37.78, 92.77), (90.46, 66.41, 26.07, 92.08))
    details = {"differences": {pair: str(d.estimate) for pair, d in found.items()}}
    return _of_difference(name, "above", found[shown], regimes, no_gap(regimes), paper, decision, details)


@claim(
    source="Novack et al. 2022, B.1, tables 2 and 3",
    sentence="The gradient-norm penalty no longer recovers the accuracy of small batches when |M| approaches the batch.",
    several=True,
)
def gradient_norm_needs_small_micro_batches(runs: Sequence[Run]) -> Verdict:
    """GN loses accuracy, and misses SB, as |M| grows from the size of small batches to at least half of the batch.

    Statistic: d = GN with the largest |M| - GN with |M| = b. Holds: d < 0 for sure, and the former is surely below SB
    (`average_jacobian_fails` has the rule). Does not hold: d > -m for sure, or the largest |M| still reaches SB for sure.
    Undecided otherwise. Not applicable: fewer than two |M|, the largest below half of the batch, or no gap between SB
    and LB. `details["benefit"]` has GN - LB for every |M|.
    """
    paper = _minus((64.23, 31.96), (70.22, 37.78), ("cifar100", "tiny_imagenet")) | _minus(
        (75.11,), (76.89,), ("cifar10",)
    )
    return _needs_small_micro_batches("gradient_norm_needs_small_micro_batches", runs, "gradient_norm", paper)


@claim(
    source="Novack et al. 2022, B.1, table 2",
    sentence="The Fisher-trace penalty no longer recovers the accuracy of small batches when |M| approaches the batch.",
    several=True,
)
def fisher_trace_needs_small_micro_batches(runs: Sequence[Run]) -> Verdict:
    """As `gradient_norm_needs_small_micro_batches`, with FT."""
    paper = _minus((65.44, 37.71), (71.19, 40.25), ("cifar100", "tiny_imagenet"))
    return _needs_small_micro_batches("fisher_trace_needs_small_micro_batches", runs, "fisher_trace", paper)


@claim(
    source="Novack et al. 2022, B.2 and fig. 3",
    sentence="Penalizing the gradient norm of one sampled micro-batch recovers the accuracy of small batches.",
    several=True,
)
def sampled_micro_batch_recovers(runs: Sequence[Run]) -> Verdict:
    """LB with `sampled_gradient_norm_penalty`: statistic d = it - SB, and the rule of `gradient_norm_recovers`."""
    return _against_small_batches("sampled_micro_batch_recovers", runs, "sampled_gradient_norm", "reaches", {})


@claim(
    source="Novack et al. 2022, B.2 and fig. 3",
    sentence="The benefit of one sampled micro-batch diminishes as its size approaches that of the batch.",
    several=True,
)
def sampled_micro_batch_must_be_small(runs: Sequence[Run]) -> Verdict:
    """As `gradient_norm_needs_small_micro_batches`, with `sampled_gradient_norm_penalty`."""
    return _needs_small_micro_batches("sampled_micro_batch_must_be_small", runs, "sampled_gradient_norm", {})


@claim(
    source="Novack et al. 2022, D.1 and fig. 5",
    sentence="One sampled micro-batch instead of the average over all does not change the final accuracy.",
    several=True,
)
def sampled_micro_batch_equals_average(runs: Sequence[Run]) -> Verdict:
    """The penalties on one sampled micro-batch and on all differ by less than m.

    Statistic: d = sampled - average. Holds: -m < d < m for sure; does not hold: d > 0 or d < 0 for sure, and not the former;
    undecided otherwise; not applicable without a gap between SB and LB.
    """
    regimes = Regimes(runs)
    d = difference(regimes.of("sampled_gradient_norm"), regimes.of("gradient_norm"))
    e, m = d.estimate, d.margin
    inside = e.low > -m and e.high < m
    decision: Decision = "holds" if inside else "does not hold" if e.low > 0 or e.high < 0 else "undecided"
    name = "sampled_micro_batch_equals_average"
    return _of_difference(name, "equals", d, regimes, no_gap(regimes), {}, decision)


@claim(
    source="Novack et al. 2022, C.1 and table 4",
    sentence="Iterative grafting recovers the accuracy of small batches (on CIFAR-10; not on CIFAR-100).",
    several=True,
)
def iterative_grafting_recovers(runs: Sequence[Run]) -> Verdict:
    """LB by `iterative_grafting`: statistic d = IG - SB, and the rule of `gradient_norm_recovers`."""
    paper = _minus((92.16, 68.4), (92.33, 71.21), ("cifar10", "cifar100"))
    return _against_small_batches("iterative_grafting_recovers", runs, "IterativeGrafting", "reaches", paper)


@claim(
    source="Novack et al. 2022, C.1 and table 4",
    sentence="External grafting recovers the accuracy of small batches (on CIFAR-10; not on CIFAR-100).",
    several=True,
)
def external_grafting_recovers(runs: Sequence[Run]) -> Verdict:
    """LB by `external_grafting`: statistic d = EG - SB, and the rule of `gradient_norm_recovers`."""
    paper = _minus((92.12, 68.3), (92.33, 71.21), ("cifar10", "cifar100"))
    return _against_small_batches("external_grafting_recovers", runs, "ExternalGrafting", "reaches", paper)


@claim(
    source="Novack et al. 2022, C.1 and table 4",
    sentence="Normalized gradient descent recovers the accuracy of small batches (on CIFAR-10; not on CIFAR-100).",
    several=True,
)
def normalized_gd_recovers(runs: Sequence[Run]) -> Verdict:
    """LB by `normalized_gd`: statistic d = NGD - SB, and the rule of `gradient_norm_recovers`."""
    paper = _minus((92.10, 66.83), (92.33, 71.21), ("cifar10", "cifar100"))
    return _against_small_batches("normalized_gd_recovers", runs, "NormalizedGD", "reaches", paper)


@claim(
    source="Novack et al. 2022, D.2 and table 6",
    sentence="Anti-PGD in large batches does not recover the accuracy of small batches.",
    several=True,
)
def anti_pgd_fails(runs: Sequence[Run]) -> Verdict:
    """LB by `anti_pgd` stays below SB: statistic d = Anti-PGD - SB with its best settings, and the rule of
    `average_jacobian_fails`. The interval holds for all settings at once, as "no combination" of the paper wants it."""
    return _against_small_batches(
        "anti_pgd_fails", runs, "AntiPGD", "misses", _minus((67.54,), (71.21,), ("cifar100",))
    )


def no_gap(regimes: Regimes) -> str | None:
    """Why claims about generalization mean nothing here: SB is not surely above LB; None where it is."""
    gap = difference(regimes.small, regimes.large).estimate
    return None if gap.low > 0 else f"small batches are not surely above large ones here ({gap})"


def largest_micro_batch(regimes: Regimes, kind: str) -> int:
    """The largest |M| of a penalty, where it is above |M| = b and at least half of the batch.

    Raises:
        KeyError: it is not.
    """
    sizes = regimes.micro_batches(kind)
    if regimes.b not in sizes or 2 * sizes[-1] < regimes.B:
        raise KeyError(
            f"{kind} has micro-batches {sizes}; needs runs with {regimes.b}, the size of small batches, and with at least "
            f"half of the batch of {regimes.B}"
        )
    return sizes[-1]


def _against_small_batches(name: str, runs: Sequence[Run], kind: str, relation: Relation, paper: Paper) -> Verdict:
    """A regime of large batches against SB."""
    regimes = Regimes(runs)
    d = difference(regimes.of(kind), regimes.small)
    return _of_difference(name, relation, d, regimes, no_gap(regimes), paper)


def _needs_small_micro_batches(name: str, runs: Sequence[Run], kind: str, paper: Paper) -> Verdict:
    """Micro-batches as large as the batch against those as large as small batches."""
    regimes = Regimes(runs)
    largest = largest_micro_batch(regimes, kind)
    d = difference(regimes.of(kind, largest), regimes.of(kind))
    rest = difference(regimes.of(kind, largest), regimes.small)
    missed = decide("misses", rest.estimate, rest.margin)
    decision: Decision = "undecided"
    if d.estimate.high < 0 and missed == "holds":
        decision = "holds"
    elif d.estimate.low > -d.margin or missed == "does not hold":
        decision = "does not hold"
    benefit = {m: difference(regimes.of(kind, m), regimes.large).estimate for m in regimes.micro_batches(kind)}
    details = {"largest_minus_small_batches": str(rest.estimate), "benefit": {m: str(e) for m, e in benefit.items()}}
    return _of_difference(name, "misses", d, regimes, no_gap(regimes), paper, decision, details)


def _of_difference(
    name: str,
    relation: str,
    d: Difference,
    regimes: Regimes,
    refused: str | None,
    paper: Paper,
    decision: Decision | None = None,
    details: Mapping[str, Any] | None = None,
) -> Verdict:
    """The verdict on a difference, decided by `relation` if no decision is given."""
    m = d.margin
    threshold = {"above": "above 0", "reaches": f"above {-m}", "misses": "below 0", "equals": f"{-m} to {m}"}[relation]
    said: dict[str, Any] = {"metric": d.metric, "margin": m, "pairs": d.pairs, "paper": dict(paper)}
    said |= {"runs": [[x.run.path.name for x in side.values()] for side in (d.a, d.b)]}
    said |= {"settings": [next(iter(side.values())).choice for side in (d.a, d.b)]}
    said |= {"batch_sizes": [regimes.b, regimes.B]} | ({"left_out": regimes.left_out} if regimes.left_out else {})
    e = d.estimate
    if relation != "above" or name != "generalization_gap":
        said["gap"] = str(difference(regimes.small, regimes.large).estimate)
    if refused:
        decision, reason = "not applicable", refused
    else:
        if decision is None:
            decision = decide(relation, e, m)  # type: ignore[arg-type]
        reason = f"{d.labels}, {d.pairs} paired seeds" + f", best of {d.choices} choices of settings" * (d.choices > 1)
        reason += "; more seeds would tell" * (decision == "undecided")
    return Verdict(name, decision, reason, e.value, e.interval, threshold, said | dict(details or {}))
