"""A whole sweep: choose settings on validation data where that is asked for, run, and write the table and the figure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import files
from ..problems.presets import parse_penalties, vary
from ..problems.rows import Study
from ..runs import Run
from .options import Sweep
from .plan import Job, Point
from .table import Judged, Summary, better, judge, summarize, write
from .work import Result, Wanted, run

Watcher = Callable[[Result], None]


@dataclass(frozen=True)
class Outcome:
    """What a sweep gave.

    Attributes:
        results: of the runs of the table; `tuning` of those before it.
        summaries: the table.
        chosen: settings by row, if there was tuning.
        judged: the study's sentences.
        notes: what a reader of the table must know.
        files: table.csv, table.json and the figure.
    """

    results: list[Result]
    summaries: list[Summary]
    tuning: list[Result]
    chosen: dict[str, Point]
    judged: list[Judged]
    notes: list[str]
    files: list[Path]


def conduct(sweep: Sweep, watch: Watcher = lambda result: None) -> Outcome:
    """Tune, run, and write the table and the figure; `watch` sees each result as it comes.

    Raises:
        ValueError: settings that do not exist or do not go together; a row whose tuning runs all failed; a folder in which
            another sweep is running.
        KeyboardInterrupt: the same sweep continues.
    """
    with _alone(Path(sweep.folder)):
        return _conduct(sweep, watch)


def _conduct(sweep: Sweep, watch: Watcher) -> Outcome:
    metric = sweep.wanted.metrics[0]
    tuned, chosen, notes = _tuned(sweep, watch) if sweep.tuning_seeds else ([], {}, [])
    results = _run(sweep.jobs(chosen), sweep.wanted, sweep.workers, watch)
    summaries = summarize(results, metric, keep=sweep.keep)
    single = len({s.label for s in summaries}) == len(summaries)
    judged = judge(sweep.study, summaries) if single and metric == sweep.study.metric else []
    if sweep.keep:
        notes.append(
            f"best {sweep.keep} of {len(sweep.seeds)} seeds: intervals do not know of the choice, and are too narrow"
        )
    facts = {
        "about": sweep.study.about, "metric": metric, "statistic": sweep.statistic, "seeds": sweep.seeds,
        "tuning_seeds": sweep.tuning_seeds, "select": sweep.select if chosen else None, "chosen": chosen, "notes": notes,
        "sentences": [vars(j) | {"difference": vars(j.difference)} for j in judged],
    }  # fmt: skip
    files = write(Path(sweep.folder), summaries, results, facts) + _figure(sweep, summaries, results, metric)
    return Outcome(results, summaries, tuned, chosen, judged, notes, files)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder that no other sweep may write to meanwhile; a process that dies lets go of it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = files.lock(folder, "a sweep")
    try:
        yield
    finally:
        files.unlock(held)


def _run(jobs: Sequence[Job], wanted: Wanted, workers: int, watch: Watcher) -> list[Result]:
    """Results in the order of the jobs."""
    found = {}
    for result in run(jobs, wanted, workers=workers):
        found[result.job.folder] = result
        watch(result)
    return [found[job.folder] for job in jobs]


def _tuned(sweep: Sweep, watch: Watcher) -> tuple[list[Result], dict[str, Point], list[str]]:
    """Choose each row's settings; rows that take step lengths from another row come after it and take its chosen ones."""
    wanted = Wanted((sweep.select,), checkpoint_every=sweep.checkpoint_every)
    results: list[Result] = []
    chosen: dict[str, Point] = {}
    notes: list[str] = []
    external: dict[tuple[str, int], Path] = {}
    dependent = [label for label in sweep.labels if sweep.study.rows[label].external]
    for labels in ([label for label in sweep.labels if label not in dependent], dependent):
        found = _run(sweep.tuning_jobs(labels, external), wanted, sweep.workers, watch)
        results += found
        summaries = summarize(found, sweep.select)
        for label in labels:
            chosen[label], remarks = choose([s for s in summaries if s.label == label], sweep.select)
            notes += remarks
        external |= {(r.job.label, r.job.seed): r.job.folder for r in found if dict(r.job.point) == chosen[r.job.label]}
    return results, {label: chosen[label] for label in sweep.labels}, notes


def choose(summaries: Sequence[Summary], metric: str) -> tuple[Point, list[str]]:
    """The point with the best mean, among those of which no seed diverged or failed; and remarks on the choice.

    Raises:
        ValueError: there is no such point.
    """
    best: Summary | None = None
    for s in summaries:
        if not (s.diverged or s.failed) and (best is None or better(s.mean, best.mean, metric)):
            best = s
    if best is None:
        name = summaries[0].label if summaries else ""
        raise ValueError(f"every point of row {name!r} diverged or failed while tuning; choose another grid")
    remarks = []
    for axis, text in best.point:
        values = list(dict.fromkeys(dict(s.point)[axis] for s in summaries))
        if len(values) > 1 and text in (values[0], values[-1]):
            remarks.append(f"{best.label}: {axis}={text} is at the end of its grid")
    return dict(best.point), remarks


def _figure(sweep: Sweep, summaries: Sequence[Summary], results: Sequence[Result], metric: str) -> list[Path]:
    from .. import plots

    if not any(s.values for s in summaries):
        return []
    # Chosen settings differ from row to row and are in the table.
    shown = [replace(s, point=()) for s in summaries] if sweep.tuning_seeds else summaries
    baselines = [label for label in sweep.study.baselines if label in sweep.labels]
    e, scale = sweep.base or sweep.study.base, sweep.study.scale
    title = f"{e.data}, {e.model}, {e.loss.replace('_', ' ')}, n = {e.n - e.validation}; {len(sweep.seeds)} seeds"
    if sweep.study.panels and all(len(s.point) == 1 for s in shown):
        per = {label: row.per for label, row in sweep.study.rows.items()}
        figure = plots.panels(shown, metric, sweep.study.panels, per=per, title=title)
    elif sweep.study.axis and not sweep.grid:
        panels = {metric: _placed(summaries, sweep.study)}
        if name := sweep.study.beside:
            panels[f"{name}, over training"] = _placed(_means(results, name), sweep.study)
        figure = plots.curves(panels, scale=scale, title=title)
    else:
        figure = plots.sweep(shown, metric, scale=scale, baselines=baselines, title=title)
    return plots.save({Path(sweep.folder) / "sweep": figure})


def _placed(summaries: Sequence[Summary], study: Study) -> list[Summary]:
    """Rows with a penalty where they lie on the study's axis, under their names up to a hyphen; and baselines, placeless."""
    found = []
    for s in summaries:
        e = study.experiment(s.label)
        for name, text in s.point:
            e = vary(e, name, text)
        if e.penalty:
            place = e.micro_batch if study.axis == "micro_batch" else parse_penalties(e.penalty)[0][0]
            found.append(replace(s, label=s.label.partition("-")[0], point=((study.axis, f"{place:g}"),)))
        elif s.label in study.baselines:
            found.append(replace(s, point=()))
    return found


def _means(results: Sequence[Result], name: str) -> list[Summary]:
    """Means over the log of what the runs measured on the way."""
    logged = [
        replace(r, values={name: float(np.mean(Run(r.job.folder).series(name).values))})
        for r in results
        if r.status == "finished"
    ]
    return summarize(logged, name)
