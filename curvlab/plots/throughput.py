"""How fast Hessian-vector products are, in gradients of the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .style import BLUE, ORANGE, axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..throughput import Speed


def throughput(panels: Mapping[str, Sequence[Speed]]) -> Figure:
    """Bars of what `curvlab.throughput` found, a panel for each title: a product, and what comes first at a new point.

    Lengths are gradients of the same data, with quartiles over rounds. Candidates that failed have their reason instead.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    tallest = max(len(speeds) for speeds in panels.values())
    size = (5.0 * columns if columns > 1 else 7.0, rows * (1.0 + 0.38 * tallest))
    figure, axes = axes_of(rows, columns, figsize=size, squeeze=False)
    for ax, (title, speeds) in zip(axes.flat, panels.items(), strict=False):
        _bars(ax, speeds)
        ax.set_title(title, fontsize=9, loc="left")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), fontsize=8, loc="outside upper right", ncols=2)
    figure.supxlabel("gradients of the same data", fontsize=9)
    return figure


def _bars(ax: Axes, speeds: Sequence[Speed]) -> None:
    longest = 1.0
    for name, offset, colour in (("first_ratio", 0.2, ORANGE), ("product_ratio", -0.2, BLUE)):
        shown = [(i, getattr(speed, name)) for i, speed in enumerate(speeds) if getattr(speed, name) is not None]
        places = np.array([i for i, _ in shown]) + offset
        median, low, high = (np.array([getattr(s, q) for _, s in shown]) for q in ("median", "low", "high"))
        label = {"first_ratio": "first at a new point, with the gradient", "product_ratio": "a product"}[name]
        ends = np.stack([median - low, high - median])
        ax.barh(places, median, 0.38, xerr=ends, color=colour, label=label, error_kw={"lw": 1})
        for place, value, end in zip(places, median, high, strict=True):
            ax.text(end, place, f" {value:.2f}", fontsize=7, va="center")
        longest = max([longest, *high.tolist()])
    for i, speed in enumerate(speeds):
        if speed.first is None:
            ax.text(0.02, i, speed.note[:48], fontsize=7, va="center", color="0.4")
    names = [s.name if s.used in (s.name, None) else f"{s.name} ({s.used})" for s in speeds]
    ax.set_yticks(range(len(speeds)), names, fontsize=8)
    ax.set_xlim(0, 1.15 * longest)
    ax.axvline(1, color="0.4", lw=0.8, ls=":")
    ax.tick_params(labelsize=8)
    ax.invert_yaxis()
