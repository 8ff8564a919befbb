"""Studies: named rows of experiments that are compared seed by seed, and what a paper says of them. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .presets import ABOUT, PRESETS, Experiment

Scale = Literal["small", "paper"]
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
        seeds, statistic, keep: the protocol, see `curvlab.sweep.Sweep`.
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
    seeds: tuple[int, ...] = (0, 1, 2)
    statistic: Statistic = "final"
    keep: int = 0
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


_LARGE, _SMALL = (256,), (16,)
_RATES = ("0.1", "0.3", "1")
_RECOVERS = "{} recovers the accuracy of small batches"
_FAILS = "{} does not recover the accuracy of small batches"


def _penalty(name: str, lr: float, strength: str, grid: tuple[str, ...], paper: str) -> Row:
    change = {"penalty": (f"{name}={strength}",), "lr": lr}
    tune = {"lr": _RATES, f"penalty.{name}": grid}
    return Row(change, tune, about=f"large batches, {name} on micro-batches", paper=f"{paper} (CIFAR-10)")


def _method(name: str, lr: float, rates: tuple[str, ...], paper: str, external: str = "") -> Row:
    about = f"large batches, {name}"
    return Row({"method": name, "lr": lr}, {"lr": rates}, external, about=about, paper=f"{paper} (CIFAR-10)")


# The paper's: the regimes, micro-batches as large as small batches, no momentum, and that learning rate and strength are
# tuned for each regime. Ours, since the paper does not state them or has other data: model, sizes, steps, grids, and the
# choice on validation examples, whose labels are as noisy as those of training. The values below were chosen by
# `curvlab sweep novack-digits --tuning-seeds 100,101`.
_NOVACK: dict[str, Row] = {
    "SB": Row(
        {"batch_size": _SMALL, "lr": 0.3}, {"lr": ("0.03", *_RATES)}, about="small batches", paper="92.33 (CIFAR-10)"
    ),
    "LB": Row({"lr": 0.1}, {"lr": ("0.03", *_RATES)}, about="large batches", paper="90.00 (CIFAR-10)"),
    "GN": _penalty("gradient_norm", 0.3, "0.3", ("0.1", "0.3", "1"), "91.98"),
    "FT": _penalty("fisher_trace", 0.3, "0.3", ("0.1", "0.3", "1"), "91.79"),
    "AJ": _penalty("average_jacobian", 0.1, "0.3", ("0.3", "1", "3"), "90.41"),
    "UJ": _penalty("unit_jacobian", 0.3, "0.03", ("0.01", "0.03", "0.1"), "90.46"),
    "IG": _method("iterative_grafting", 0.03, ("0.01", "0.03", "0.1", "0.3"), "92.16"),
    "EG": _method("external_grafting", 0.03, ("0.01", "0.03", "0.1", "0.3"), "92.12", external="SB"),
    "NGD": _method("normalized_gd", 0.03, ("0.01", "0.03", "0.1"), "92.10"),
    "Anti-PGD": Row(
        {"method": "anti_pgd", "method_options": ("noise_steps=300", "sigma=0.01"), "lr": 0.1},
        {"lr": _RATES, "method.sigma": ("0.01", "0.03", "0.1")},
        about="large batches, anticorrelated noise for three quarters of the steps",
        paper="67.54 against SB 71.21 (CIFAR-100)",
    ),
}
_GAP = ("SB", "LB")

STUDIES: dict[str, Study] = {
    "novack-digits": Study(
        "regularizers and methods against small batches, digits with 20% wrong labels (Novack et al. 2022, tables 1, 4)",
        Experiment(
            n=1024,
            validation=512,
            label_noise=0.2,
            activation="relu",
            loss="cross_entropy",
            batch_size=_LARGE,
            micro_batch=16,
            steps=400,
            diagnostics=("batch_gradient_norm", "microbatch_gradient_norm", "test_accuracy"),
        ),
        _NOVACK,
        baselines=("LB", "SB"),
        sentences=(
            Sentence("small batches generalize better than large ones", "above", _GAP),
            *(Sentence(_RECOVERS.format(x), "reaches", (x, "SB"), _GAP) for x in ("GN", "FT")),
            *(Sentence(_FAILS.format(x), "misses", (x, "SB"), _GAP) for x in ("AJ", "UJ")),
            *(Sentence(_RECOVERS.format(x) + " (on CIFAR-10)", "reaches", (x, "SB"), _GAP) for x in ("IG", "EG", "NGD")),
            Sentence(_FAILS.format("Anti-PGD"), "misses", ("Anti-PGD", "SB"), _GAP),
            *(Sentence(f"{x} generalizes better than plain large batches", "above", (x, "LB"))
              for x in ("GN", "FT", "AJ", "UJ", "IG", "EG", "NGD", "Anti-PGD")),
            *(Sentence(f"{x} generalizes better than {y}", "above", (x, y)) for x in ("GN", "FT") for y in ("AJ", "UJ")),
        ),
        margin=0.005,
        scale=100.0,
    ),
    "novack-sparse": Study(
        "small batches and small micro-batches find sparser solutions (Novack et al. 2022, tables 1-3, on a diagonal net)",
        Experiment(
            data="sparse_regression",
            n=20,
            model="diagonal_linear",
            loss="squared_error",
            dtype="float64",
            lr=0.06,
            batch_size=(20,),
            steps=1100,
            micro_batch=1,
            every=10,
            diagnostics=("loss", "test_loss", "batch_gradient_norm"),
        ),
        {
            "SB": Row({"batch_size": (1,), "every": 1}, about="small batches"),
            "LB": Row(about="large batches"),
            **{
                f"GN-{m}": Row({"penalty": ("gradient_norm=0.03",), "micro_batch": m}, about=f"large batches, GN, |M| = {m}")
                for m in (1, 2, 5, 10, 20)
            },
        },
        metric="test_loss",
        baselines=("LB", "SB"),
    ),
}  # fmt: skip

from .smith_studies import SMITH  # noqa: E402, its rows are made of the classes above

STUDIES |= SMITH


def study(name: str, scale: Scale = "small") -> Study:
    """A study, or a preset as a study of one row.

    Args:
        scale: "small", for minutes on a CPU, or "paper", with the paper's model, data and lengths.

    Raises:
        ValueError: an unknown name, or one that does not exist at this scale.
    """
    found = studies(scale)
    if name not in found:
        other: Scale = "small" if scale == "paper" else "paper"
        where = f" at --scale {scale}, but at --scale {other}" if name in studies(other) else ""
        raise ValueError(f"there is no preset {name!r}{where}; there are {', '.join(found)}")
    return found[name]


def studies(scale: Scale = "small") -> dict[str, Study]:
    """All studies of a scale, and its presets as studies of one row."""
    if scale == "paper":
        from .paper import PAPER

        return PAPER
    return STUDIES | {name: Study(ABOUT[name], experiment, {"": Row()}) for name, experiment in PRESETS.items()}


def preset(name: str, scale: Scale = "small") -> Experiment:
    """The experiment of a preset.

    Raises:
        ValueError: an unknown name, one that does not exist at this scale, or a study of several rows.
    """
    asked = study(name, scale)
    if list(asked.rows) != [""]:
        raise ValueError(f"{name} is a study of {len(asked.rows)} rows; run it by `curvlab sweep {name}`")
    return asked.base
