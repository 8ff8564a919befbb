"""A setting with where it comes from, so that no value of a paper's experiment stands without its source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..presets import Experiment
from ..rows import Row, Study

PROTOCOL = ("seeds", "statistic", "keep")  # settings of a study that are none of its experiments
# What every experiment states, also where the value is the default: what decides how training goes.
ESSENTIAL = (
    "data", "data_options", "augment", "model", "loss", "batch_size", "epochs", "lr", "schedule", "method", "momentum",
    "weight_decay",
)  # fmt: skip


class Mark(NamedTuple):
    """A value, and its source: a place in the paper, or "ours", with a reason after a colon."""

    value: Any
    source: str


Marked = dict[str, Mark]


def stated(value: Any, where: str) -> Mark:
    """A setting that the paper states, there."""
    return Mark(value, where)


def ours(value: Any, why: str = "not stated") -> Mark:
    """A setting that is not in our text of the paper."""
    return Mark(value, f"ours: {why}")


def is_ours(source: str) -> bool:
    """Whether a source is no place in the paper."""
    return source.startswith("ours")


def study(about: str, settings: Marked, rows: Mapping[str, Row] | None = None, **others: Any) -> Study:
    """A study, or without rows a preset, of marked settings of its base experiment and of its protocol."""
    values = {name: mark.value for name, mark in settings.items()}
    protocol = {name: values.pop(name) for name in PROTOCOL if name in values}
    sources = {name: mark.source for name, mark in settings.items()}
    return Study(about, Experiment(**values), rows or {"": Row()}, sources=sources, **protocol, **others)


def row(settings: Marked, grid: Marked | None = None, tune: Marked | None = None, **others: Any) -> Row:
    """A row of marked settings and axes."""
    marked = {**(tune or {}), **(grid or {}), **settings}
    return Row(
        {name: mark.value for name, mark in settings.items()},
        {name: mark.value for name, mark in (tune or {}).items()},
        grid={name: mark.value for name, mark in (grid or {}).items()},
        sources={name: mark.source for name, mark in marked.items()},
        **others,
    )


def powers(low: int, high: int, times: float = 1.0) -> tuple[str, ...]:
    """times·2^low to times·2^high as the command line writes them; all are exact in floating point.

    >>> powers(-3, -1)
    ('0.125', '0.25', '0.5')
    """
    return tuple(repr(times * 2.0**k) for k in range(low, high + 1))
