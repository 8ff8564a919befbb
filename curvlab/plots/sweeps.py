"""Figures of sweeps: a metric over one axis, over two, or by named rows, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

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
