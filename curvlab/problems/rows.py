"""What a study is: named rows of experiments over a common base, and sentences about pairs of rows. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .presets import Experiment

Statistic = Literal["final", "best", "late"]


@dataclass(frozen=True)
class Row:
    """One regime of a study.

    Attributes:
        change: settings that differ from the study's base.
        tune: grid of settings to choose from when tuning seeds are given, as the command line writes it; the values in
            `change` were chosen from it.
        grid: axes of its own over which the row is run; `--grid` adds axes and replaces those of the same name.
        external: another row, whose run of the same seed gives external grafting its step lengths.
        about: what the row is.
        paper: the paper's own number, in words.
        sources: where the settings come from, where that differs from the study's `sources`.
        per: what the values of its grid are divided by in the second panel of the figure, such as its batch size.
    """

    change: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    external: str = ""
    about: str = ""
    paper: str = ""
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    per: float = 1.0


@dataclass(frozen=True)
class Sentence:
    """A statement about two rows, decided by the interval of their paired difference (see `curvlab.sweep.judge`).

    Attributes:
        relation: "above": the first is higher than the second; "reaches": it is not below the second by more than the
            study's margin; "misses": it is.
        gap: two rows; the statement means nothing unless the first of these is above the second.
    """

    text: str
    relation: Literal["above", "reaches", "misses"]
    rows: tuple[str, str]
    gap: tuple[str, str] | None = None


@dataclass(frozen=True)
class Study:
    """Rows over a common base, the metric they are compared by, and sentences to decide.

    Attributes:
        baselines: rows to which each row's difference is tabled.
        margin: smallest difference that matters, in the unit of the metric.
        scale: what the metric is multiplied by in print, such as 100 for percent.
        axis: over which the figure has the rows with a penalty, lines of those of one name (up to a hyphen), and
            baselines as levels.
        beside: a quantity of the logs, whose mean over training is in a second panel of that figure.
        seeds, statistic, keep, select: the protocol, see `curvlab.sweep.Sweep`.
        sources: by setting, where the paper states it, or "ours" and why; only at the scale of a paper.
        panels: where every row has a grid of one axis, what these axes are in a figure that has a line for each row; and
            what their values over `Row.per` are, in a second panel.
    """

    about: str
    base: Experiment
    rows: Mapping[str, Row]
    metric: str = "test_accuracy"
    baselines: tuple[str, ...] = ()
    sentences: tuple[Sentence, ...] = ()
    margin: float = 0.0
    scale: float = 1.0
    axis: Literal["", "micro_batch", "strength"] = ""
    beside: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    statistic: Statistic = "final"
    keep: int = 0
    select: str = "validation_accuracy"
    sources: Mapping[str, str] = field(default_factory=dict)
    panels: tuple[str, ...] = ()

    def experiment(self, label: str, base: Experiment | None = None) -> Experiment:
        """The experiment of a row, over the study's base or another.

        Raises:
            ValueError: the other base changes a setting that the row sets itself.
        """
        change, base = self.rows[label].change, base or self.base
        own = dict.fromkeys([*change, *(axis for axis in self.rows[label].grid if "." not in axis)])
        lost = [name for name in own if getattr(base, name) != getattr(self.base, name)]
        if lost:
            raise ValueError(f"row {label} sets {', '.join(lost)} itself; leave the option out, or vary it with --grid")
        return dataclasses.replace(base, **change)
