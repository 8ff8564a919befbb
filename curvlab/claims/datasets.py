"""Claims decided for each data set by itself, as a table that marks reversals between them (Novack et al. 2022, C.2)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..runs import Run
from .registry import CLAIMS, Verdict, check

UNNAMED = "unnamed"


@dataclass(frozen=True)
class Cell:
    """A claim on one data set.

    Attributes:
        decision: of the claim; of several runs that each decide it, what those say that come to a decision, "mixed" if some
            hold and others do not, and undecided or not applicable if none does.
        statistic, interval: of a single verdict; None of several.
        counts: how many runs, or groups of runs, came to which decision.
        metric: what the statistic is a difference of, where the claim says so.
        paper: the paper's own value of the statistic on this data set.
        reason: of the first verdict with that decision.
    """

    decision: str
    statistic: float | None
    interval: tuple[float, float] | None
    counts: Mapping[str, int]
    metric: str
    paper: float | None
    reason: str


@dataclass(frozen=True)
class Row:
    """A claim over data sets.

    Attributes:
        cells: by data set.
        reversed: it holds on one data set and does not on another, or does both on one.
        paper: the paper's own values of the statistic by data set, of all that it has.
    """

    claim: str
    cells: Mapping[str, Cell]
    reversed: bool
    paper: Mapping[str, float]


def by_data_set(runs: Sequence[Run]) -> list[Row]:
    """All claims, decided separately on the runs of each data set, in the order of the registry.

    Runs are grouped by the data set that their experiment names, and runs from other loops by ``config={"data": NAME}``;
    those that name none are one group. A claim states its paper's value of the statistic, in the unit of the statistic, as
    ``Verdict.details["paper"]``, a mapping from names of data sets to numbers.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_data(run), []).append(run)
    verdicts = {name: check(members) for name, members in groups.items()}
    rows = []
    for claim in CLAIMS:
        found = {name: [v for v in all_of_it if v.claim == claim] for name, all_of_it in verdicts.items()}
        papers = [v.details.get("paper") or {} for several in found.values() for v in several]
        paper = {name: float(x) for one in papers for name, x in one.items()}
        cells = {name: _cell(several, _of(name, paper)) for name, several in found.items()}
        decisions = {cell.decision for cell in cells.values()}
        rows.append(Row(claim, cells, {"holds", "does not hold"} <= decisions or "mixed" in decisions, paper))
    return rows


def lines(rows: Sequence[Row], *, everything: bool = False) -> list[tuple[str, ...]]:
    """The table as text, head first: a column for each data set, reversals, and the paper's values.

    Args:
        everything: also claims that are applicable on none of the data sets.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.cells))
    body = [
        (row.claim, *(_written(row.cells[name]) for name in names), "reversal" * row.reversed, _paper(row.paper))
        for row in rows
        if everything or {cell.decision for cell in row.cells.values()} - {"not applicable"}
    ]
    return [("claim", *names, "", "in the paper"), *body]


def _data(run: Run) -> str:
    experiment = run.config.get("experiment")
    stated = experiment.get("data") if isinstance(experiment, dict) else None
    return str(stated or run.config.get("data") or UNNAMED)


def _of(name: str, paper: Mapping[str, float]) -> float | None:
    """The paper's value on a data set under whichever of its names: cifar10-8k is CIFAR-10."""
    known = {_squash(key): x for key, x in paper.items()}
    return known.get(_squash(name), known.get(_squash(re.sub(r"-\d+k?$", "", name))))


def _squash(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def _cell(verdicts: Sequence[Verdict], paper: float | None) -> Cell:
    counts: Counter[str] = Counter(v.decision for v in verdicts)
    order = ("holds", "does not hold", "undecided", "not applicable")
    decision: str = next((d for d in order if counts[d]), "not applicable")
    if counts["holds"] and counts["does not hold"]:
        decision = "mixed"
    statistic, interval = (verdicts[0].statistic, verdicts[0].interval) if len(verdicts) == 1 else (None, None)
    reason = next((v.reason for v in verdicts if v.decision == decision), "" if verdicts else "needs several runs")
    metric = str(verdicts[0].details.get("metric", "")) if verdicts else ""
    return Cell(decision, statistic, interval, dict(counts), metric, paper, reason)


def _written(cell: Cell) -> str:
    text = cell.decision
    if sum(cell.counts.values()) > 1:
        text += f" ({', '.join(f'{n} {name}' for name, n in cell.counts.items())})" * (len(cell.counts) > 1)
    elif cell.statistic is not None and cell.interval is not None and cell.decision != "not applicable":
        text += f" {cell.statistic:.3g} [{cell.interval[0]:.3g}, {cell.interval[1]:.3g}]" + f" {cell.metric}" * bool(
            cell.metric
        )
    return text + (f"; paper {cell.paper:.3g}" if cell.paper is not None else "")


def _paper(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {x:.3g}" for name, x in values.items())
