"""Several seeds side by side: the mean over seeds at each step, with its t interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..measurement import half_width
from ..runs import Run, flattened
from .series import Line, adaptive, aligned, legend, scalar, threshold, title
from .style import BLACK, axes_of, colours, point_marker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What may differ between runs of one configuration: seeds (every setting whose name ends so), where it was run, and what was
# measured when, since that changes nothing about the training.
ASIDE = ("provenance", "threads", "memory", "chunk_size", "engine", "external", "every", "diagnostics", "budget")
CURVATURE = ("sharpness", "interaction_sharpness", "instability")


def bands(runs: Sequence[Run], names: Sequence[str] | None = None) -> Figure:
    """Quantities over the steps of runs that differ in nothing but seeds: mean and 95% t interval over seeds.

    Runs are grouped by their configuration without seeds. A group of several runs is a band around its mean, with the single
    runs faint behind it; a run on its own is a line. A group is drawn at the steps that all its runs have; where they have
    others, the legend says how many there are. The thresholds of the optimizer are dashed.

    Args:
        names: default: the loss and the sharpness (of adaptive optimizers the preconditioned one).

    Raises:
        ValueError: no runs, or one that lacks a quantity.

    Source: Student's t interval, with n - 1 degrees of freedom for n seeds.
    """
    if not runs:
        raise ValueError("nothing to draw: name at least one run")
    names = list(names or _default(runs))
    lacking = [f"{name} in {run.path}" for name in names for run in runs if not _has(run, name)]
    if lacking or not names:
        raise ValueError(
            f"nothing to draw for {', '.join(lacking) or 'these runs'}; all runs have "
            f"{', '.join(name for name in runs[0].names if all(_has(run, name) for run in runs)) or 'nothing in common'}"
        )
    groups = grouped(runs)
    figure, axes = axes_of(
        len(names), 1, figsize=(7.2, 1.0 + 2.5 * len(names)), sharex=True, squeeze=False,
        height_ratios=[1.0 if name.endswith("loss") else 1.4 for name in names],
    )  # fmt: skip
    for ax, name in zip(axes[:, 0], names, strict=True):
        _panel(ax, name, groups)
    axes[0, 0].set_title(_heading(groups), fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("step")
    return figure


def common(runs: Sequence[Run]) -> list[str]:
    """What all runs measured and is one number a step, in the order of the first."""
    return [name for name in runs[0].names if all(_has(run, name) and run.series(name).axis is None for run in runs)]


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs whose configurations are equal but for seeds, under what makes the group differ from the others."""
    settings = [_plain(flattened(_without_seeds(run.config))) for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    differing = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    # The same setting is stated by the experiment and again by the training that it gave; the first is the user's.
    own = [key for key in differing if not key.startswith("training.")] or differing
    groups: dict[tuple, list[Run]] = {}
    for run, one in zip(runs, settings, strict=True):
        groups.setdefault(tuple(one.get(key) for key in differing), []).append(run)
    labels = {}
    for values, members in groups.items():
        of = dict(zip(differing, values, strict=True))
        named = {key.split(".")[-1]: of[key] for key in own if of[key] is not None}
        parts = [f"{name} = {value}" for name, value in named.items() if f"run_{name}" not in named]
        label = ", ".join(parts[:3]).replace("run_batch_size", "batch_size") + (", ..." if len(parts) > 3 else "")
        labels[label if label not in labels else f"{label} ({members[0].path.name})"] = members
    return labels


def _panel(axes: Axes, name: str, groups: Mapping[str, list[Run]]) -> None:
    limits: dict[str, tuple[Line, Any]] = {}
    entry = ""
    for (label, runs), colour in zip(groups.items(), colours(len(groups)), strict=True):
        lines = []
        for run in runs:
            series, entry = scalar(run, name)
            shown = np.isfinite(series.values)
            lines.append(Line(series.steps[shown], series.values[shown]))
        _band(axes, lines, colour, label)
        if _compared(name, runs[0]) and (limit := _mean_threshold(runs)) is not None:
            same = limits.setdefault(legend(limit), (limit, colour))
            limits[legend(limit)] = (limit, colour if same[1] == colour else BLACK)
    for label, (limit, colour) in limits.items():
        colour = BLACK if len(limits) == 1 else colour
        axes.plot(limit.steps, limit.values, color=colour, ls="--", lw=1, label=label)
    _keep_in_view(axes, name.endswith("loss"), [line for line, _ in limits.values()])
    axes.set_ylabel(name.replace("_", " ") + (f"\n{entry}" if entry else ""), fontsize=9)
    axes.legend(fontsize=7, framealpha=0.9)


def _keep_in_view(axes: Axes, loss: bool, limits: Sequence[Line]) -> None:
    """Limits from the single runs, of which those that diverge leave the view, and a threshold that is not far above."""
    solid = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines if line.get_linestyle() == "-"]
    drawn = [values for values in solid if len(values)]
    if not drawn:
        return
    every = np.concatenate(drawn)
    if loss and every.min() > 0:
        axes.set_yscale("log")
        axes.set_ylim(every.min() / 1.3, min(every.max(), 10 * max(line[0] for line in drawn)) * 1.3)
        return
    low, high = np.quantile(every, [0.002, 0.998])
    lowest = [float(line.values.min()) for line in limits]
    high = min(high, 4 * max(lowest)) if lowest else high
    high = max([high, *(bound for bound in lowest if bound < 3 * high)])
    reach = 0.1 * (high - max(low, -high)) or 1.0
    axes.set_ylim(max(low, -high) - reach, high + reach)


def _band(axes: Axes, lines: Sequence[Line], colour: Any, label: str) -> None:
    steps, values = aligned(*lines)
    if len(lines) == 1 or not len(steps):
        what = ", ".join(part for part in (label, "1 run" if len(lines) == 1 else "no step in common") if part)
        for line in lines:
            axes.plot(line.steps, line.values, color=colour, lw=1, marker=point_marker(line.steps), label=what)
            what = ""
        return
    for line in lines:
        axes.plot(line.steps, line.values, color=colour, lw=0.6, alpha=0.35, marker=point_marker(line.steps))
    x = np.stack(values)
    n, mean = len(lines), x.mean(0)
    half = half_width(x.std(0, ddof=1) / np.sqrt(n), "sem", np.full(mean.shape, n - 1.0), 0.0, 0.95)
    every = {step for line in lines for step in line.steps.tolist()}
    parts = [label, f"mean of {n} runs, 95%", f"at the {len(steps)} of {len(every)} steps that all have"]
    text = ", ".join(part for part in parts[: 3 if len(steps) < len(every) else 2] if part)
    axes.plot(steps, mean, color=colour, lw=1.4, marker=point_marker(steps), label=text)
    axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.25, lw=0)


def _mean_threshold(runs: Sequence[Run]) -> Line | None:
    """The threshold of a group: the mean over its runs, where it depends on them as that of grafted steps does."""
    found = [line for line in map(threshold, runs) if line is not None]
    if len(found) < len(runs):
        return None
    steps, values = aligned(*found)
    return Line(steps, np.mean(values, axis=0), found[0].name) if len(steps) else None


def _compared(name: str, run: Run) -> bool:
    """Whether the optimizer's threshold is about this quantity."""
    return name == "preconditioned_sharpness" if adaptive(run) else name in CURVATURE


def _default(runs: Sequence[Run]) -> list[str]:
    curvature = "preconditioned_sharpness" if any(adaptive(run) for run in runs) else "sharpness"
    return [name for name in ("loss", curvature) if all(_has(run, name) for run in runs)]


def _has(run: Run, name: str) -> bool:
    return name in run.names and bool(np.isfinite(run.series(name).values).any())


def _heading(groups: Mapping[str, list[Run]]) -> str:
    first = next(iter(groups.values()))[0]
    if len(groups) == 1:
        return title(first)
    return f"{title(first, lr=False, batch=False)}: {sum(map(len, groups.values()))} runs"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as text, which can be compared."""
    return {key: str(value) if isinstance(value, list) else value for key, value in settings.items()}


def _without_seeds(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        kept = (key for key in tree if not (key in ASIDE or key == "seed" or key.endswith("_seed")))
        return {key: _without_seeds(tree[key]) for key in kept}
    return tree
