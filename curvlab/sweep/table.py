"""Results over seeds: means with intervals, paired differences, and sentences that these decide. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..claims.regimes import decide
from ..claims.registry import Decision
from ..claims.statistics import Estimate
from ..claims.statistics import mean_over_seeds as estimate
from ..files import write_whole
from ..problems.rows import Row, Study
from .work import Result, larger_is_better


@dataclass(frozen=True)
class Summary:
    """One row and grid point over its seeds.

    Attributes:
        values: of the metric by seed, of the runs that count.
        mean: with its 95% t interval over seeds, of infinite width for one seed; NaN without values.
        median: of the same values, for metrics with heavy tails.
        diverged, failed: seeds without a value, which are left out of mean and median.
        left_out: seeds that were not among the best.
    """

    label: str
    point: tuple[tuple[str, str], ...]
    values: Mapping[int, float]
    mean: Estimate
    median: float
    diverged: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Row and point on one line."""
        return " ".join([self.label] * bool(self.label) + [f"{k}={v}" for k, v in self.point])


@dataclass(frozen=True)
class Judged:
    """A sentence, what the paired difference of its rows says about it, and that difference."""

    text: str
    decision: Decision
    difference: Estimate
    reason: str = ""


def summarize(results: Iterable[Result], metric: str, *, keep: int = 0) -> list[Summary]:
    """Rows and grid points in the order in which they first come, each over its seeds.

    Args:
        keep: count only so many seeds, the best by the metric (Smith et al. 2021: 5 of 7, by the highest test accuracy
            during training); 0 for all. The interval does not know of the choice and is too narrow then.
    """
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault((result.job.label, result.job.point), []).append(result)
    found = []
    for (label, point), members in groups.items():
        members = sorted(members, key=lambda r: r.job.seed)
        valued = [r for r in members if r.status == "finished" and r.values.get(metric) is not None]
        sign = -1.0 if larger_is_better(metric) else 1.0
        ranked = sorted(valued, key=lambda r: sign * (r.values[metric] or 0.0))
        seeds = {r.job.seed for r in (ranked[:keep] if keep else ranked)}
        values = {r.job.seed: float(r.values[metric] or 0.0) for r in valued if r.job.seed in seeds}
        found.append(
            Summary(
                label, point, values, estimate(values.values()), float(np.median([*values.values()] or [math.nan])),
                diverged=tuple(r.job.seed for r in members if r.status == "diverged"),
                failed=tuple(r.job.seed for r in members if r not in valued and r.status != "diverged"),
                left_out=tuple(r.job.seed for r in valued if r.job.seed not in seeds),
            )
        )  # fmt: skip
    return found


def difference(a: Summary, b: Summary) -> Estimate:
    """Mean of a - b over the seeds that both have, with the 95% t interval of the paired differences."""
    return estimate(a.values[seed] - b.values[seed] for seed in a.values if seed in b.values)


def judge(study: Study, summaries: Sequence[Summary]) -> list[Judged]:
    """What the runs say about the sentences of a study, by paired differences (see `claims.regimes.decide`).

    A sentence about a gap that is not there is not applicable.
    """
    rows = {summary.label: summary for summary in summaries}
    found = []
    for sentence in study.sentences:
        if not {*sentence.rows, *(sentence.gap or ())} <= set(rows):
            continue
        d = difference(*(rows[label] for label in sentence.rows))
        gap = None if sentence.gap is None else difference(*(rows[label] for label in sentence.gap))
        if gap is not None and sentence.gap is not None and not gap.low > 0:
            reason = f"{sentence.gap[0]} is not surely above {sentence.gap[1]} here"
            found.append(Judged(sentence.text, "not applicable", d, reason))
        else:
            found.append(Judged(sentence.text, decide(sentence.relation, d, study.margin), d))
    return found


def better(a: Estimate, b: Estimate, metric: str) -> bool:
    """Whether a mean is better than another, NaN being worst."""
    if math.isnan(a.value) or math.isnan(b.value):
        return not math.isnan(a.value)
    return a.value > b.value if larger_is_better(metric) else a.value < b.value


def lines(study: Study, summaries: Sequence[Summary], metric: str, chosen: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The table as text: a head, then a line for each row and point.

    Args:
        chosen: by row, settings that were chosen by tuning.
    """
    axes = [] if chosen else list(dict.fromkeys(name for summary in summaries for name, _ in summary.point))
    # Over a grid a baseline has a value for each point.
    baselines = [] if axes else [s for label in study.baselines for s in summaries if s.label == label]
    columns: dict[str, list[str]] = {}
    if any(s.label for s in summaries):
        columns["row"] = [s.label for s in summaries]
    for axis in axes:
        columns[axis] = [dict(s.point).get(axis, "") for s in summaries]
    columns["seeds"] = [_count(s) for s in summaries]
    unit = {1.0: "", 100.0: ", %"}.get(study.scale, f" x {study.scale:g}")
    columns[f"{metric}{unit}"] = [_plus_minus(s.mean, study.scale) for s in summaries]
    columns["median"] = [_number(s.median * study.scale) for s in summaries]
    for b in baselines:
        columns[f"minus {b.label}"] = ["" if b is s else _signed(difference(s, b), study.scale) for s in summaries]
    columns["chosen"] = [chosen.get(s.label, "") for s in summaries]
    columns["settings"] = [] if chosen else [_settings(study.rows[s.label]) for s in summaries]
    columns["in the paper"] = [study.rows[s.label].paper for s in summaries]
    kept = {head: cells for head, cells in columns.items() if any(cells)}
    return [tuple(kept), *zip(*kept.values(), strict=True)]


def _count(s: Summary) -> str:
    lost = [f"{len(x)} {word}" for x, word in ((s.diverged, "diverged"), (s.failed, "failed")) if x]
    return ", ".join([str(len(s.values)), *lost])


def _settings(row: Row) -> str:
    """What the row itself changes, as the command line writes it."""
    written = {k: "+".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in row.change.items()}
    return " ".join(f"{name}={text}" for name, text in written.items())


def sentence_line(judged: Judged, study: Study) -> str:
    """A verdict on one line."""
    why = f"; {judged.reason}" if judged.reason else ""
    return f"{judged.decision:>14}: {judged.text}  ({_signed(judged.difference, study.scale)}{why})"


def _plus_minus(e: Estimate, scale: float) -> str:
    if math.isnan(e.value):
        return "-"
    half = (e.high - e.low) / 2 * scale
    return _number(e.value * scale) if math.isinf(half) else f"{_number(e.value * scale)} ± {_number(half)}"


def _signed(e: Estimate, scale: float) -> str:
    if math.isnan(e.value):
        return "-"
    if math.isinf(e.high):
        return f"{e.value * scale:+.2f}" if scale != 1 else f"{e.value:+.3g}"
    spec = "+.2f" if scale != 1 else "+.3g"
    return f"{e.value * scale:{spec}} [{e.low * scale:{spec}}, {e.high * scale:{spec}}]"


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.2f}" if 10 <= abs(x) < 1000 else f"{x:.4g}"


def write(
    folder: Path, summaries: Sequence[Summary], results: Iterable[Result], facts: Mapping[str, Any]
) -> list[Path]:
    """table.csv, a line for each row and point, and table.json, with every run and `facts` about the sweep."""
    axes = list(dict.fromkeys(name for summary in summaries for name, _ in summary.point))
    names = ["mean", "low", "high", "median"]
    stream = io.StringIO()
    table = csv.writer(stream)
    table.writerow(["row", *axes, "seeds", *names, "diverged", "failed", "left_out"])
    for s in summaries:
        point = dict(s.point)
        numbers = (s.mean.value, s.mean.low, s.mean.high, s.median)
        counts = (len(s.diverged), len(s.failed), len(s.left_out))
        table.writerow([s.label, *(point.get(a, "") for a in axes), len(s.values), *numbers, *counts])
    write_whole(folder / "table.csv", stream.getvalue().encode())
    runs = [
        {"row": r.job.label, "point": dict(r.job.point), "seed": r.job.seed, "status": r.status, "values": r.values,
         "folder": r.job.folder.name, "reason": r.reason}
        for r in sorted(results, key=lambda r: r.job.folder)
    ]  # fmt: skip
    content = {**facts, "table": [asdict(s) for s in summaries], "runs": runs}
    write_whole(folder / "table.json", json.dumps(_plain(content), indent=2).encode())
    return [folder / "table.csv", folder / "table.json"]


def _plain(x: Any) -> Any:
    """JSON has no numbers that are not finite."""
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, Mapping):
        return {str(key): _plain(value) for key, value in x.items()}
    return [_plain(value) for value in x] if isinstance(x, list | tuple) else x
