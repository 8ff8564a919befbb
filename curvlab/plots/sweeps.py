"""Figures of sweeps: a metric over one axis, over two, or by named rows, with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..claims.statistics import Estimate, mean_over_seeds
from .style import BLACK, BLUE, GREEN, RED, axes_of, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..sweep import Summary


def sweep(
    summaries: Sequence[Summary], metric: str, *, scale: float = 1.0, baselines: Sequence[str] = (), title: str = ""
) -> Figure:
    """The metric of a sweep, with 95% t intervals over seeds; single seeds are dots.

    One axis gives lines over it, a line for each row; two axes give a heat map for each row; otherwise each row and point
    has a line of its own, with the intervals of `baselines` as bands.

    Raises:
        ValueError: no row has a value.
    """
    shown = [s for s in summaries if s.values]
    if not shown:
        raise ValueError("nothing to draw: no run of the sweep has a value")
    axes = list(dict.fromkeys(name for s in shown for name, _ in s.point))
    same = all(len(s.point) == len(axes) for s in shown)
    label = _label(metric, scale)
    if same and len(axes) == 1 and len({s.point for s in shown}) > 1:
        return curves({metric: shown}, scale=scale, title=title)
    if same and len(axes) == 2:
        return _maps(shown, axes, label, scale, title)
    return _rows(shown, label, scale, baselines, title)


def panels(
    summaries: Sequence[Summary], metric: str, labels: Sequence[str], *, per: Mapping[str, float], title: str = ""
) -> Figure:
    """A line for each row over its one axis, and in a second panel over the axis divided by `per` of the row.

    What governs the metric is the axis on which the lines coincide. Seeds are compared in pairs: what a seed changes at all
    points alike, the median over the points that all seeds have, is taken off before means and 95% t intervals; those of a
    loss are of its logarithm. A cross at the bottom marks that a seed diverged there.

    Args:
        labels: of the x axes, one or two.
        per: by row.

    Raises:
        ValueError: no row has a value.

    Source of the paired intervals: Cousineau 2005 (doi:10.20982/tqmp.01.1.p042).
    """
    if not any(s.values for s in summaries):
        raise ValueError("nothing to draw: no run of the sweep has a value")
    figure, axes = axes_of(1, len(labels), figsize=(1.2 + 4.6 * len(labels), 4.2), squeeze=False, sharey=True)
    estimates = _paired(summaries, metric)
    rows = list(dict.fromkeys(s.label for s in summaries))
    for i, (ax, label) in enumerate(zip(axes[0], labels, strict=True)):
        x = {(s.label, s.point): float(s.point[0][1]) / (per[s.label] if i else 1.0) for s in summaries}
        for row, colour, marker in zip(rows, colours(len(rows)), "os^Dvp" * len(rows), strict=False):
            keys = sorted((key for key in estimates if key[0] == row), key=x.__getitem__)
            y = np.array([estimates[key].value for key in keys])
            ends = np.array([estimates[key].interval for key in keys]).reshape(-1, 2).T
            bars = np.where(np.isfinite(ends[1]), np.abs(ends - y), 0.0)  # none for a single seed
            ax.errorbar([x[key] for key in keys], y, yerr=bars, color=colour, marker=marker, ms=5, lw=1.2, capsize=3,
                        label=row or None)  # fmt: skip
            lost = [x[s.label, s.point] for s in summaries if s.label == row and s.diverged]
            ax.plot(lost, [0.02] * len(lost), "x", color=colour, ms=5, transform=ax.get_xaxis_transform(),
                    label=f"{row}: a seed diverged" if lost else None)  # fmt: skip
        ax.set_xscale("log")
        ax.set_xticks(sorted(set(x.values())), [f"{v:.3g}" for v in sorted(set(x.values()))], fontsize=8)
        ax.minorticks_off()
        ax.set_xlabel(label)
    if "accuracy" not in metric:
        axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylim(*_view([*estimates.values()], log="accuracy" not in metric))
    axes[0, 0].set_ylabel(f"{metric.replace('_', ' ')}, mean and 95%, seeds paired")
    axes[0, 0].set_title(title, fontsize=9, loc="left")
    axes[0, 0].legend(fontsize=8)
    return figure


def _paired(summaries: Sequence[Summary], metric: str) -> dict[tuple, Estimate]:
    """Means over seeds by row and point, with intervals that know of what a seed changes at all points alike."""
    loss = "accuracy" not in metric
    tables = {
        (s.label, s.point): {k: math.log(v) if loss else v for k, v in s.values.items()} for s in summaries if s.values
    }
    seeds = {seed for values in tables.values() for seed in values}
    whole = [values for values in tables.values() if len(values) == len(seeds)]
    effects = {k: float(np.median([v[k] - float(np.mean([*v.values()])) for v in whole] or [0.0])) for k in seeds}
    shift = float(np.mean([*effects.values()]))
    found = {}
    for key, values in tables.items():
        e = mean_over_seeds(v - effects[seed] + shift for seed, v in values.items())
        found[key] = Estimate(*np.exp([e.value, e.low, e.high]).tolist()) if loss else e
    return found


def _view(estimates: Sequence[Estimate], log: bool) -> tuple[float, float]:
    """Limits around the values and typical intervals, so that one wide interval does not flatten everything else."""
    table = np.array([(e.low, e.value, e.high) for e in estimates])
    with np.errstate(divide="ignore"):
        low, y, high = (np.log(table) if log else table).T
    half = (high - low) / 2
    typical = float(np.median(half[np.isfinite(half)])) if np.isfinite(half).any() else 0.0
    reach = max(0.12 * float(np.ptp(y)), 1.5 * typical, 0.01)
    ends = y.min() - reach, y.max() + reach
    return (math.exp(ends[0]), math.exp(ends[1])) if log else ends


def curves(panels: Mapping[str, Sequence[Summary]], *, scale: float = 1.0, title: str = "") -> Figure:
    """Metrics over the one axis that their summaries have, a panel each; those without an axis are levels.

    Args:
        scale: of the first metric.

    Raises:
        ValueError: a metric without a value over the axis.
    """
    figure, axes = axes_of(1, len(panels), figsize=(6.4 if len(panels) == 1 else 5.2 * len(panels), 4.2), squeeze=False)
    for i, (ax, (metric, summaries)) in enumerate(zip(axes[0], panels.items(), strict=True)):
        factor = 1.0 if i else scale
        shown = [s for s in summaries if s.values and s.point]
        if not shown:
            raise ValueError(f"nothing to draw of {metric}: no run of the sweep has a value over an axis")
        _curves(ax, shown, shown[0].point[0][0], _label(metric, factor), factor)
        levels = [s for s in summaries if s.values and not s.point]
        for s, style in zip(levels, ("--", ":", "-."), strict=False):
            ax.axhline(s.mean.value * factor, color=BLACK, lw=1, ls=style, label=f"{s.label}, mean")
        _keep_in_view(ax.set_ylim, [*shown, *levels], factor)
        if levels or {s.label for s in shown} != {""}:
            ax.legend(fontsize=8)
    axes[0, 0].set_title(title, fontsize=9, loc="left")
    return figure


def _label(metric: str, scale: float) -> str:
    return metric.replace("_", " ") + {1.0: "", 100.0: ", %"}.get(scale, f" x {scale:g}")


def _curves(ax: Axes, shown: Sequence[Summary], axis: str, label: str, scale: float) -> None:
    x = _positions(ax, [s.point[0][1] for s in shown], axis)
    rows = list(dict.fromkeys(s.label for s in shown))
    for row, colour, marker in zip(rows, colours(len(rows)), "osD^v<>pXP*h" * len(rows), strict=False):
        members = sorted((s for s in shown if s.label == row), key=lambda s: x[s.point[0][1]])
        places = [x[s.point[0][1]] for s in members]
        ax.errorbar(
            places, [s.mean.value * scale for s in members], yerr=_bars(members, scale), color=colour, marker=marker, ms=4,
            lw=1.2, capsize=3, label=row or None,
        )  # fmt: skip
        for place, s in zip(places, members, strict=True):
            ax.plot([place] * len(s.values), np.array([*s.values.values()]) * scale, ".", color=colour, alpha=0.4, ms=4)
    ax.set_xlabel(axis.replace("_", " "))
    ax.set_ylabel(f"{label}\nmean and 95%")


def _maps(shown: Sequence[Summary], axes: list[str], label: str, scale: float, title: str) -> Figure:
    rows = list(dict.fromkeys(s.label for s in shown))
    figure, panels = axes_of(1, len(rows), figsize=(1.6 + 4.0 * len(rows), 4.0), squeeze=False)
    means = [s.mean.value * scale for s in shown]
    low, high = min(means), max(means)
    values = [sorted({dict(s.point)[axis] for s in shown}, key=_key) for axis in axes]
    for ax, row in zip(panels[0], rows, strict=True):
        grid = np.full((len(values[1]), len(values[0])), np.nan)
        ax.grid(False)
        for s in (s for s in shown if s.label == row):
            point = dict(s.point)
            j, i = values[0].index(point[axes[0]]), values[1].index(point[axes[1]])
            grid[i, j] = s.mean.value * scale
            half = (s.mean.high - s.mean.low) / 2 * scale
            text = f"{grid[i, j]:.4g}" + (f"\n±{half:.2g}" if np.isfinite(half) else "")
            dark = (grid[i, j] - low) < 0.6 * (high - low)
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        image = ax.imshow(grid, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
        ax.set_xticks(range(len(values[0])), values[0])
        ax.set_yticks(range(len(values[1])), values[1])
        ax.set_xlabel(axes[0].replace("_", " "))
        ax.set_ylabel(axes[1].replace("_", " "))
        ax.set_title(row, fontsize=9, loc="left")
    figure.colorbar(image, ax=list(panels[0]), label=label)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def _rows(shown: Sequence[Summary], label: str, scale: float, baselines: Sequence[str], title: str) -> Figure:
    figure, ax = axes_of(1, figsize=(6.8, 1.2 + 0.36 * len(shown)))
    for baseline, colour in zip(baselines, (RED, GREEN), strict=False):
        for s in (s for s in shown if s.label == baseline):
            ax.axvline(s.mean.value * scale, color=colour, lw=1, ls="--", label=f"{baseline}, mean")
    for i, s in enumerate(shown):
        ax.plot(np.array([*s.values.values()]) * scale, [i] * len(s.values), ".", color=BLUE, alpha=0.4, ms=6)
        ax.errorbar(s.mean.value * scale, i, xerr=_bars([s], scale), color=BLACK, marker="o", ms=4.5, lw=1.4, capsize=3)
    ax.set_yticks(range(len(shown)), [s.name or "all" for s in shown])
    ax.invert_yaxis()
    _keep_in_view(ax.set_xlim, shown, scale)
    ax.set_xlabel(f"{label}: mean, 95% interval, seeds")
    ax.set_title(title, fontsize=9, loc="left", wrap=True)
    if baselines:
        ax.legend(fontsize=8)
    return figure


def _bars(members: Sequence[Summary], scale: float) -> np.ndarray:
    """Half widths below and above; none for a single seed."""
    half = np.array([(s.mean.high - s.mean.low) / 2 * scale for s in members])
    return np.tile(np.where(np.isfinite(half), half, 0.0), (2, 1))


def _keep_in_view(set_limits: object, shown: Sequence[Summary], scale: float) -> None:
    """Limits from the means and seeds, so that one wide interval does not flatten everything else."""
    points = np.array([v for s in shown for v in s.values.values()]) * scale
    bars = _bars(shown, scale)[0]
    typical = float(np.median(bars))
    reach = max(0.12 * float(np.ptp(points)), 1.5 * typical, 1e-12 + 0.01 * abs(float(points.mean())))
    set_limits(points.min() - reach, points.max() + reach)  # type: ignore[operator]


def _positions(ax: Axes, values: Sequence[str], axis: str) -> dict[str, float]:
    """Where the values of an axis lie: at the numbers that they are, otherwise one after the other."""
    found = list(dict.fromkeys(values))
    try:
        numbers = {value: float(value) for value in found}
    except ValueError:
        ax.set_xticks(range(len(found)), found)
        return {value: float(i) for i, value in enumerate(found)}
    if min(numbers.values()) > 0 and max(numbers.values()) > 5 * min(numbers.values()):
        ax.set_xscale("log", base=2 if axis in ("batch_size", "micro_batch") else 10)
    ax.set_xticks(list(numbers.values()), found)
    ax.minorticks_off()
    return numbers


def _key(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text
