"""What a sweep is: rows, grids and seeds of a study, and how settings are chosen. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..problems.presets import Experiment
from ..problems.rows import Statistic, Study
from .plan import Grid, Job, Point, plan, points
from .work import Wanted


@dataclass(frozen=True)
class Sweep:
    """What to run, over what, and what to read from it.

    Attributes:
        folder: of one folder per run, the table and the figure. The same sweep again continues there; more seeds, points
            or rows may be added.
        base: what all rows have in common; default the study's.
        rows: some of the study's rows; default all.
        grid: axes over which every row is run, beside those of its own.
        seeds: of the table; default the study's.
        tune: axes from which each row's settings are chosen; default the rows' own.
        tuning_seeds: of the runs on which the choice is made, in `folder`/tuning; none for no tuning.
        select: what the choice is made by: the best mean over the tuning seeds, measured where training ends; default the
            study's.
        metric: of the table; default the study's.
        statistic, checkpoint_every: see `Wanted`; default of the first the study's.
        keep: count the best so many seeds only, 0 for all; default the study's.
        workers: processes.

    Raises:
        ValueError: options that do not go together: tuning seeds that are seeds of the table too, tuning without axes or
            validation data, a choice on test data.
    """

    study: Study
    folder: str | os.PathLike
    base: Experiment | None = None
    rows: tuple[str, ...] = ()
    grid: Grid = field(default_factory=dict)
    seeds: tuple[int, ...] = None  # type: ignore[assignment]
    tune: Grid = field(default_factory=dict)
    tuning_seeds: tuple[int, ...] = ()
    select: str = None  # type: ignore[assignment]
    metric: str = ""
    statistic: Statistic = None  # type: ignore[assignment]
    keep: int = None  # type: ignore[assignment]
    workers: int = 1
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("seeds", "statistic", "keep", "select"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.study, name))
        unknown = set(self.rows) - set(self.study.rows)
        if unknown:
            raise ValueError(f"there are no rows {sorted(unknown)}; there are {', '.join(self.study.rows)}")
        if not self.seeds:
            raise ValueError("there are no seeds; give at least one, such as --seeds 0,1,2")
        both = sorted(set(self.seeds) & set(self.tuning_seeds))
        if both:
            raise ValueError(
                f"seeds {both} are for tuning and for the table; settings look better on the seeds they were chosen on: "
                "give fresh ones"
            )
        if self.keep < 0 or self.keep > len(self.seeds):
            raise ValueError(
                f"keep is {self.keep} of {len(self.seeds)} seeds; expected 0, for all, to {len(self.seeds)}; give --keep"
            )
        if self.tune and not self.tuning_seeds:
            raise ValueError("--tune needs seeds of its own: give --tuning-seeds, such as 100,101")
        if self.tuning_seeds:
            self._check_tuning()

    def _check_tuning(self) -> None:
        if self.grid or any(self.study.rows[label].grid for label in self.labels):
            raise ValueError("--grid varies settings and --tune chooses them; give one of the two")
        if not any(self._axes(label) for label in self.labels):
            raise ValueError(
                "there is nothing to tune: no row has a grid of its own; give one, such as --tune lr=0.1,0.2"
            )
        if self.select.startswith("test_"):
            raise ValueError(
                f"settings are not chosen by {self.select}; expected validation_accuracy or validation_loss"
            )
        if self.select.startswith("validation_") and not (self.base or self.study.base).validation:
            raise ValueError(f"{self.select} needs examples that are set aside; give their number by --validation")

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(label for label in self.study.rows if not self.rows or label in self.rows)

    @property
    def wanted(self) -> Wanted:
        return Wanted((self.metric or self.study.metric,), self.statistic, self.checkpoint_every)

    def jobs(self, chosen: Mapping[str, Point] | None = None) -> list[Job]:
        """The runs of the table, of the chosen settings if there are any."""
        each = {label: [chosen[label]] if chosen else points(self.axes(label)) for label in self.labels}
        measured = () if self.statistic == "final" else self.wanted.metrics
        return plan(self.study, self._base, each, self.seeds, Path(self.folder), measured=measured)

    def tuning_jobs(self, labels: Sequence[str], external: Mapping[tuple[str, int], Path] | None = None) -> list[Job]:
        """The runs from which the settings of some rows are chosen; of rows that need runs of another, from `external`."""
        each = {label: points(self._axes(label)) for label in labels}
        return plan(self.study, self._base, each, self.tuning_seeds, Path(self.folder) / "tuning", external=external)

    @property
    def size(self) -> int:
        """How many runs there are."""
        tuning = sum(len(points(self._axes(label))) for label in self.labels) * len(self.tuning_seeds)
        each = sum(1 if self.tuning_seeds else len(points(self.axes(label))) for label in self.labels)
        return tuning + each * len(self.seeds)

    def axes(self, label: str) -> Grid:
        """What a row is run over: its own grid and that of the sweep."""
        grid = {**self.study.rows[label].grid, **self.grid}
        sizes = (self.base or self.study.base).batch_size
        several = len(sizes) > 1 and "batch_size" not in grid  # several batch sizes are several runs
        return {"batch_size": tuple(map(str, sizes)), **grid} if several else grid

    @property
    def _base(self) -> Experiment:
        """With one batch size, which the grid may change."""
        base = self.base or self.study.base
        return replace(base, batch_size=base.batch_size[:1])

    def _axes(self, label: str) -> Grid:
        return self.tune or self.study.rows[label].tune
