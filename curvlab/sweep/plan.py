"""From a study, a grid and seeds to jobs: one run of one experiment each, in a folder of its own. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..problems.presets import Experiment, from_config, vary
from ..problems.rows import Study
from ..runs import CONFIG, read_config

SEEDS = ("init_seed", "data_seed", "probe_seed")
Point = dict[str, str]  # setting -> value, as written
Grid = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Job:
    """One run: the row and the grid point it belongs to, its seed, its experiment, its folder, and the run it waits for."""

    label: str
    point: tuple[tuple[str, str], ...]
    seed: int
    experiment: Experiment
    folder: Path
    after: Path | None = None


def parse_grid(entries: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Axes written as setting=value,value,...

    Raises:
        ValueError: an entry of another form, an axis or a value that comes twice.

    Example:
        >>> parse_grid(["lr=0.1,0.2", "penalty.gradient_norm=0.01"])
        {'lr': ('0.1', '0.2'), 'penalty.gradient_norm': ('0.01',)}
    """
    grid: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        values = tuple(text.split(","))
        if not name or not all(values):
            raise ValueError(f"an axis of the grid is {entry!r}; expected setting=value,value such as lr=0.1,0.2")
        if name in grid or len(set(values)) < len(values):
            raise ValueError(f"the grid has {entry!r}, in which something comes twice; give each axis and value once")
        grid[name] = values
    return grid


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds written as 0,1,2 or 0-2.

    Raises:
        ValueError: anything else, or a seed that comes twice.

    Example:
        >>> parse_seeds("0-2,7")
        (0, 1, 2, 7)
    """
    found: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            raise ValueError(f"seeds are {text!r}; expected whole numbers such as 0,1,2 or 0-2")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(found)) < len(found):
        raise ValueError(f"seeds are {text!r}, of which one comes twice; give each once")
    return tuple(found)


def points(grid: Grid) -> list[Point]:
    """All combinations of a grid, the last axis fastest; of no axis, the one empty point."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def plan(
    study: Study,
    base: Experiment,
    points_of: Mapping[str, Sequence[Point]],
    seeds: Sequence[int],
    folder: Path,
    *,
    measured: Sequence[str] = (),
    external: Mapping[tuple[str, int], Path] | None = None,
) -> list[Job]:
    """A job for every row, point and seed. A seed is that of initialization, label noise, order of the data and probes,
    but for those that a row fixes.

    Args:
        base: of all rows.
        points_of: the grid points of each row.
        measured: diagnostics that every run logs beside those of its experiment.
        external: finished runs for rows that need one, by (row, seed); by default those of this plan.

    Raises:
        ValueError: an unknown setting or value; a row that needs one run of another row, where that has several.
    """
    jobs: list[Job] = []
    for label, wanted in points_of.items():
        for point in wanted:
            experiment = study.experiment(label, base)
            for name, text in point.items():
                experiment = vary(experiment, name, text)
            if len(experiment.batch_size) > 1:
                raise ValueError(
                    f"batch_size is {experiment.batch_size}; a run of a sweep has one: vary it with --grid"
                )
            logged = [entry.partition(":")[0] for entry in experiment.diagnostics]
            log = (*experiment.diagnostics, *(m for m in measured if m not in logged))
            for s in seeds:
                seeds_of_row = {name: s for name in SEEDS if name not in study.rows[label].change}
                own: dict[str, Any] = {**seeds_of_row, "diagnostics": log}
                place, after = folder / _name(label, point, s), None
                if study.rows[label].external:
                    after = _external(study.rows[label].external, point, s, points_of, folder, external or {})
                    own["external"] = str(after)
                job = Job(label, tuple(point.items()), s, dataclasses.replace(experiment, **own), place, after)
                jobs.append(job)
    return jobs


def _external(
    row: str,
    point: Point,
    seed: int,
    points_of: Mapping[str, Sequence[Point]],
    folder: Path,
    known: Mapping[tuple[str, int], Path],
) -> Path:
    if (row, seed) in known:
        return known[row, seed]
    there = list(points_of.get(row, ()))
    if len(there) != 1 and point not in there:
        raise ValueError(
            f"a run needs the step lengths of row {row}, which has {len(there)} points and none with its settings"
        )
    return folder / _name(row, there[0] if len(there) == 1 else point, seed)


def _name(label: str, point: Point, seed: int) -> str:
    parts = [label] * bool(label) + [f"{name}={text}" for name, text in point.items()] + [f"seed={seed}"]
    return re.sub(r"[^\w.=+-]", "-", "_".join(parts))


def check_folders(jobs: Iterable[Job]) -> None:
    """Refuse to continue runs that were started with other settings, before anything is run.

    Raises:
        ValueError: naming the folder and the settings.
    """
    for job in jobs:
        file = job.folder / CONFIG
        if not file.is_file():
            continue
        there = dataclasses.asdict(from_config(read_config(file))[0])
        asked = dataclasses.asdict(job.experiment)
        odd = [name for name in asked if name != "external" and there[name] != asked[name]]
        if odd:
            was = ", ".join(f"{name} = {there[name]} there and {asked[name]} here" for name in odd[:3])
            raise ValueError(f"{job.folder} holds a run with other settings: {was}; choose another folder by --out")
