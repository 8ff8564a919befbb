"""Colours and axes that all figures share."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by the colour-blind, and in print by line style.
BLUE, RED, GREEN, ORANGE, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#333333"
SHADES = ["#440154", "#3b528b", "#21918c", "#5ec962", "#e0b400"]  # dark to light: small to large batches


def axes_of(*shape: int, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes in the style of all others, as `matplotlib.pyplot.subplots` makes them; `figsize` is needed.

    Nothing of it is global: `save` writes the figure, and a notebook shows it where it is the last expression of a cell.
    """
    from .inline import Inline  # not pyplot: no display, no global state

    size = options.pop("figsize")
    ratios: dict[str, Any] = {k: options.pop(k) for k in ("height_ratios", "width_ratios") if k in options}
    figure = Inline(figsize=size, layout="constrained")
    axes = figure.subplots(*shape, gridspec_kw=ratios or None, **options)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, lw=0.5)
    return figure, axes


def fill(axes: Axes, x: Any, y: Any, low: Any, high: Any, colour: Any, label: str | None = None) -> None:
    axes.plot(x, y, color=colour, lw=1, marker="." if len(x) < 3 else None, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.25, lw=0)


def point_marker(steps: Any) -> str | None:
    """What was measured once or twice is drawn as points, too: a line of one point is none."""
    return "o" if len(steps) < 3 else None


def colours(count: int) -> list[Any]:
    """So many colours that can be told apart; up to six of them by the colour-blind."""
    if count <= 6:
        return [BLUE, RED, GREEN, ORANGE, PURPLE, BLACK][:count]
    from matplotlib import colormaps

    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]


def save(figures: Mapping[Path, Figure]) -> list[Path]:
    """Save each figure as PNG and PDF under its path without suffix; returns the PNG paths."""
    for path, figure in figures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".png", ".pdf"):
            content = io.BytesIO()
            figure.savefig(content, dpi=150, format=suffix[1:])
            write_whole(path.with_suffix(suffix), content.getvalue())
    return [path.with_suffix(".png") for path in figures]
