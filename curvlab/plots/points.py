"""Figures of one point: measured curves and spectra, densities of eigenvalues, the loss along lines and over planes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..measurement import Measurement
from .style import BLACK, BLUE, ORANGE, PURPLE, RED, axes_of, fill

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..landscape import Lines, Plane
    from ..linalg import SpectralDensity


def measurements(found: Mapping[str, Measurement], *, title: str = "") -> Figure:
    """Every quantity of `curvlab.measure` that has an axis, a panel each, with 95% intervals.

    Layers and outputs are bars; batch sizes, densities, and eigenvalues that span more than a decade have logarithmic axes.

    Raises:
        ValueError: no quantity has an axis.
    """
    curves = {name: m for name, m in found.items() if m.axis is not None and m.value is not None}
    if not curves:
        raise ValueError(
            "nothing to draw: no quantity has an axis; such as hessian_eigenvalues or several batch sizes do"
        )
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = axes_of(rows, columns, figsize=(4.4 * columns, 3.2 * rows), squeeze=False)
    for ax, (name, m) in zip(axes.flat, curves.items(), strict=False):
        curve(ax, m)
        ax.set_title(name, fontsize=9, loc="left")
        ax.tick_params(labelsize=8, which="both")
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def curve(ax: Axes, m: Measurement) -> None:
    """A quantity over its axis, with 95% intervals."""
    assert m.axis is not None
    name, points = m.axis
    value = np.asarray(m.value)
    low, high = (np.asarray(end) for end in m.interval())
    bars = np.stack([value - low, high - value])
    if name in ("layer", "output"):
        places = np.arange(len(points))
        ax.barh(places, value, xerr=bars, color=BLUE, alpha=0.7, error_kw={"lw": 1})
        ax.set_yticks(places, [str(point) for point in points])
        ax.invert_yaxis()
        ax.set_ylabel(name, fontsize=8)
        return
    x = np.array(points, dtype=float)
    if name == "eigenvalue":
        _density(ax, x, value, low, high)
        return
    ax.errorbar(x, value, yerr=bars, color=BLUE, marker="o", ms=3.5, lw=1, elinewidth=1, capsize=2)
    ax.set_xlabel(name.replace("_", " "), fontsize=8)
    if name == "batch_size":
        ax.set_xscale("log", base=2)
    if name == "index":
        ax.locator_params(axis="x", integer=True)
        ax.set_ylabel("eigenvalue", fontsize=8)
        if value.min() > 0 and value.max() > 10 * value.min():
            ax.set_yscale("log")


def density(found: SpectralDensity, *, title: str = "") -> Figure:
    """The eigenvalue density of `curvlab.spectral_density`, for any operator, with 95% intervals; logarithmic."""
    figure, axes = axes_of(1, figsize=(6.4, 4.0))
    values = found.values.numpy()
    m = Measurement(values, found.errors.numpy(), "sem", np.full(len(values), len(found.nodes) - 1.0))
    low, high = m.interval()
    _density(axes, found.grid.numpy(), values, np.asarray(low), np.asarray(high))
    axes.set_title(title, fontsize=9, loc="left")
    return figure


def _density(ax: Axes, grid: np.ndarray, values: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    lowest = max(1e-12, 1e-6 * float(values.max()))
    fill(ax, grid, np.maximum(values, lowest), np.maximum(low, lowest), np.maximum(high, lowest), BLUE)
    ax.set_yscale("log")
    ax.set_ylim(lowest, 3 * float(values.max()))
    ax.set_xlabel("eigenvalue", fontsize=8)
    ax.set_ylabel("density", fontsize=8)


def lines(found: Lines) -> Figure:
    """The loss along the directions of `curvlab.landscape.top_lines`."""
    figure, axes = axes_of(1, figsize=(6.0, 4.0))
    styles = zip([RED, BLUE, ORANGE, PURPLE, BLACK], ["-", "--", "-.", ":", "-"], strict=True)
    for name, values, (colour, style) in zip(found.names, found.values, styles, strict=False):
        shown = np.where(np.isfinite(values), values, np.nan)
        axes.plot(found.alphas, shown, color=colour, ls=style, lw=1.3, label=f"along {name}")
    axes.axvline(0, color="0.7", lw=0.8)
    axes.set_xlabel("distance")
    axes.set_ylabel("loss")
    axes.legend(fontsize=8)
    return figure


def plane(plane: Plane) -> Figure:
    """Contours of the loss over a plane of `curvlab.landscape`, with its path."""
    figure, axes = axes_of(1, figsize=(5.6, 4.6))
    values = np.where(np.isfinite(plane.values), plane.values, np.nan)
    positive = np.nanmin(values) > 0
    shown = np.log10(values) if positive else values
    contours = axes.contourf(plane.alphas, plane.betas, shown.T, levels=30, cmap="viridis")
    axes.contour(plane.alphas, plane.betas, shown.T, levels=30, colors="white", linewidths=0.3)
    axes.plot(0, 0, "o", color="white", mec=BLACK, label="w")
    if len(plane.path):
        axes.plot(plane.path[:, 0], plane.path[:, 1], ".-", color=RED, lw=1, label="path, projected")
    axes.set_xlabel(f"along {plane.names[0]}")
    axes.set_ylabel(f"along {plane.names[1]}")
    axes.locator_params(axis="x", nbins=5)
    axes.legend(fontsize=8)
    figure.colorbar(contours, ax=axes, label="log10 of the loss" if positive else "loss")
    return figure
