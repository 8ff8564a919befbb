"""Figures of runs, as the papers draw them: a log is all that a figure needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..measurement import Measurement
from ..runs import Run, Series
from .points import curve
from .series import (
    Line,
    adaptive,
    aligned,
    examples,
    interaction_bound,
    legend,
    scalar,
    smooth,
    threshold,
    title,
    training,
)
from .style import BLACK, BLUE, GREEN, RED, SHADES, axes_of, fill, point_marker, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVATURES = ("sharpness", "preconditioned_sharpness", "interaction_sharpness")


def plot(runs: Run | Sequence[Run], folder: str | Path | None = None) -> list[Path]:
    """Draw every figure that the logs allow (see `figures`) and save each as PNG and PDF; returns the PNG paths.

    Args:
        folder: where; default the run's folder, or the parent of several.

    Raises:
        ValueError: no run, or none with a measurement.
    """
    return save(figures(runs, folder))


def figures(runs: Run | Sequence[Run], folder: str | Path | None = None) -> dict[Path, Figure]:
    """Every figure that the logs allow, under the path, without suffix, where it would be saved.

    Every run gives `quantities`, everything that was measured. One run gives `edge_of_stability` (Lee 2022, fig. 4a-c)
    and, with expected loss differences, `loss_difference` (figs. 1, 2). Several runs with different batch sizes also
    give `batch_sizes` (fig. 4d).

    Args:
        folder: where; default the run's folder, or the parent of several.

    Raises:
        ValueError: no run, or none with a measurement.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    found: dict[Path, Figure] = {}
    sizes = {str(training(run).get("batch_size")) for run in runs}
    if len(sizes) > 1 and all(_over_batch_sizes(run) for run in runs):
        found[Path(folder or runs[0].path.parent) / "batch_sizes"] = batch_sizes(runs)
    for run in runs:
        place = Path(folder) if folder is not None and len(runs) == 1 else run.path
        if {*CURVATURES} & set(run.names):
            found[place / "edge_of_stability"] = edge_of_stability(run)
        if {"expected_loss_difference", "instability", "gradient_norm"} <= set(run.names):
            found[place / "loss_difference"] = loss_difference(run)
        if run.names:
            found[place / "quantities"] = quantities(run)
    if not found:
        raise ValueError("nothing to draw: no run has measurements; ask for some with train(diagnostics=...)")
    return found


def _over_batch_sizes(run: Run) -> bool:
    return (
        {"interaction_sharpness", "gradient_concentration"} <= set(run.names)
        and isinstance(training(run).get("batch_size"), int)
        and interaction_bound(run) is not None
    )


def edge_of_stability(run: Run) -> Figure:
    """Sharpness and interaction-aware sharpness with 95% intervals against the threshold, 2/lr for plain SGD, and the loss
    above, where it was measured or logged as `batch_loss` (Lee 2022, fig. 4a-c).

    Adaptive optimizers have a threshold of the preconditioned sharpness, which is drawn instead.

    Raises:
        ValueError: no curvature was measured.
    """
    curves = _curvatures(run)
    if not curves:
        raise ValueError(f"{run.path} has no curvature to draw; measure one of {', '.join(CURVATURES)}")
    loss = _loss(run)
    shape = {"figsize": (7.2, 5.6), "sharex": True, "height_ratios": [1, 1.7]} if loss else {"figsize": (7.2, 3.8)}
    figure, axes = axes_of(2 if loss else 1, **shape)
    top, bottom = axes if loss else (axes, axes)
    if loss:
        top.semilogy(loss.steps, loss.values, color=BLACK, lw=1, marker=point_marker(loss.steps))
        top.set_ylabel(loss.name)
    top.set_title(title(run), fontsize=9, loc="left")
    for series, colour, label in curves:
        _band(bottom, series, colour, label)
    values = np.concatenate([series.values for series, _, _ in curves])
    limits = [
        line for line in (threshold(run),) if line and (not adaptive(run) or "preconditioned" in curves[0][0].name)
    ]
    for line in limits:
        bottom.plot(
            line.steps, line.values, color=BLACK, ls="--", lw=1.1, marker=point_marker(line.steps), label=legend(line)
        )
    bound = None if training(run).get("batch_size") == examples(run) else interaction_bound(run)
    if bound is not None:
        label = f"{bound.name} (running median)"
        bottom.plot(bound.steps, smooth(bound.values), color=GREEN, ls=":", lw=1.4, label=label)
    _keep_in_view(bottom, values, limits)
    bottom.set_xlabel("step")
    bottom.set_ylabel("curvature")
    bottom.legend(fontsize=8, framealpha=0.9)
    return figure


def _curvatures(run: Run) -> list[tuple[Series, str, str]]:
    """The curvatures that the optimizer's threshold is about, each with a colour and a label."""
    found = []
    names = [name for name in CURVATURES if name in run.names and np.isfinite(run.series(name).values).any()]
    if "preconditioned_sharpness" in names:
        names = ["preconditioned_sharpness"]  # of an adaptive optimizer, whose threshold is for this
    colours = {"interaction_sharpness": RED}
    full = "S_n" if training(run).get("batch_size") == examples(run) else "S_b"
    labels = {
        "sharpness": "sharpness  ‖H‖",
        "preconditioned_sharpness": "preconditioned sharpness",
        "interaction_sharpness": rf"interaction-aware sharpness  $\|H\|_{{{full}}}$",
    }
    for name in names:
        series, entry = scalar(run, name)
        found.append((series, colours.get(name, BLUE), labels[name] + (f"  {entry}" if entry else "")))
    return found


def _loss(run: Run) -> Line | None:
    """The training loss, or that of the mini-batches where only it was logged."""
    if "loss" in run.names:
        series = run.series("loss")
        return Line(series.steps, series.values, "training loss")
    steps, values = run.column("batch_loss")
    return Line(steps, values, "mini-batch loss") if len(values) else None


def _keep_in_view(axes: Axes, values: np.ndarray, limits: Sequence[Line]) -> None:
    """Limits from the curves without their rarest values, and a threshold that is not far above them."""
    highest = float(np.nanquantile(values, 0.995))
    for line in limits:
        nearest = float(np.min(line.values))
        highest = max(highest, nearest) if nearest < 3 * highest else highest
    axes.set_ylim(min(0.0, float(np.nanquantile(values, 0.005))), 1.15 * highest if highest > 0 else None)


def batch_sizes(runs: Sequence[Run]) -> Figure:
    """‖H‖_{S_b} of several runs against its bound 2ρ_b/lr, for each batch size (Lee 2022, fig. 4d); running medians.

    Under momentum the bound is ρ_b times its threshold.

    Raises:
        ValueError: a run without a batch size, without ρ_b, or of an adaptive optimizer, which has no such bound.
    """
    odd = [str(run.path) for run in runs if not _over_batch_sizes(run)]
    if odd:
        raise ValueError(
            f"{', '.join(odd)} cannot be compared over batch sizes: expected interaction_sharpness, gradient_concentration, "
            "one batch size and a threshold in each run"
        )
    figure, (left, right) = axes_of(1, 2, figsize=(9.6, 4.4), width_ratios=[1.5, 1])
    runs = sorted(runs, key=lambda run: training(run)["batch_size"])
    sizes = list(dict.fromkeys(training(run)["batch_size"] for run in runs))
    shades = [SHADES[round(i * (len(SHADES) - 1) / max(1, len(sizes) - 1))] for i in range(len(sizes))]
    values: list[np.ndarray] = []
    bounds: list[Line] = []
    plateaus: list[tuple] = []
    for run in runs:
        b = training(run)["batch_size"]
        colour = shades[sizes.index(b)]
        value, bound = scalar(run, "interaction_sharpness")[0], interaction_bound(run)
        assert bound is not None
        label = f"b = {b}" if b not in [row[0] for row in plateaus] else None
        values.append(value.values)
        bounds.append(bound)
        left.plot(
            value.steps, smooth(value.values), color=colour, lw=1.3, label=label, marker=point_marker(value.steps)
        )
        left.plot(bound.steps, smooth(bound.values), color=colour, lw=1, ls="--")
        late = [line.values[line.steps >= run.records[-1]["step"] / 2] for line in (value, bound)]
        plateaus.append((b, *(np.nanquantile(x, [0.25, 0.5, 0.75]) if len(x) else np.full(3, np.nan) for x in late)))
    name = bounds[0].name
    limits = [line for line in map(threshold, runs) if line is not None]
    _keep_in_view(left, np.concatenate(values), [*limits, *bounds])
    if all(np.array_equal(line.values[:1], limits[0].values[:1]) for line in limits):
        left.plot(limits[0].steps, limits[0].values, color=BLACK, ls="--", lw=1.1, label=legend(limits[0]))
        if np.ptp(limits[0].values) == 0:
            right.axhline(limits[0].values[0], color=BLACK, ls="--", lw=1, label=limits[0].name)
    left.set_xlabel("step")
    left.set_ylabel(rf"$\|H\|_{{S_b}}$   (dashed: {name})")
    left.set_title(title(runs[0], batch=False), fontsize=9, loc="left")
    left.legend(fontsize=8, loc="lower center", ncols=3)
    _plateaus(right, plateaus, name)
    return figure


def _plateaus(axes: Axes, plateaus: Sequence[tuple], name: str) -> None:
    b = np.array([row[0] for row in plateaus], dtype=float)
    for k, colour, marker, label, shift in (
        (1, RED, "o", r"$\|H\|_{S_b}$", 0.97),
        (2, GREEN, "s", name, 1.03),
    ):
        q = np.array([row[k] for row in plateaus])
        spread = [q[:, 1] - q[:, 0], q[:, 2] - q[:, 1]]
        axes.errorbar(b * shift, q[:, 1], yerr=spread, color=colour, marker=marker, ms=5, lw=1, capsize=2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch size b")
    axes.set_ylabel("second half of the run: median, quartiles")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def loss_difference(run: Run) -> Figure:
    """Expected loss difference against `instability`, in units in which eq. 6 is y = x - 1 (Lee 2022, figs. 1, 2).

    At the steps at which both, the gradient norm and the learning rate are known.

    Raises:
        ValueError: there is no such step.
    """
    difference, entry = scalar(run, "expected_loss_difference")
    low, high = difference.interval()
    steps, (x, y, low, high, g, lr) = aligned(
        scalar(run, "instability")[0], difference, (difference.steps, low), (difference.steps, high),
        run.series("gradient_norm"), run.column("lr"),
    )  # fmt: skip
    horizontal, unit = x * lr / 2, lr * g**2
    vertical = y / unit
    shown = np.isfinite(horizontal) & np.isfinite(vertical)
    if not shown.any():
        raise ValueError(
            f"{run.path} has no step at which expected_loss_difference, instability, gradient_norm and lr are known"
        )
    figure, axes = axes_of(1, figsize=(6.4, 4.6))
    errors = [np.maximum(0, vertical - low / unit), np.maximum(0, high / unit - vertical)]
    axes.errorbar(
        horizontal[shown], vertical[shown], yerr=[e[shown] for e in errors], fmt="none", ecolor="0.8", lw=0.6, zorder=1
    )
    points = axes.scatter(horizontal[shown], vertical[shown], c=steps[shown], s=7, cmap="viridis", zorder=2)
    ends = np.array([min(0.0, np.nanmin(horizontal)), np.nanquantile(horizontal, 0.995)])
    axes.plot(ends, ends - 1, color=BLUE, lw=1.2, label=r"eq. 6: slope $\mathrm{lr}^2/2$, zero at 2/lr")
    axes.axhline(0, color="0.6", lw=0.6)
    axes.axvline(1, color=BLACK, ls="--", lw=1, label="2/lr")
    axes.set_xlim(ends[0] - 0.05, 1.1 * ends[1])
    low_y, high_y = np.nanquantile(vertical, [0.002, 0.998])
    axes.set_ylim(min(-1.1, low_y), max(0.3, 1.2 * high_y))
    axes.set_xlabel(r"$\mathrm{tr}(H S_b)/\mathrm{tr}(S_n)$  in units of 2/lr")
    axes.set_ylabel(r"$(E[L_{t+1}] - L_t)\,/\,(\mathrm{lr}\,\mathrm{tr}(S_n))$")
    axes.set_title(title(run, batch=not entry) + (f", {entry}" if entry else ""), fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="upper left")
    figure.colorbar(points, label="step", ax=axes)
    return figure


def quantities(run: Run, names: Sequence[str] | None = None) -> Figure:
    """Everything that was measured (or `names`), a panel each, with 95% intervals.

    A quantity over a named axis gives a line for each coordinate, or, for more than twelve, the last curve over the axis.
    """
    names = list(names or run.names)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = axes_of(rows, columns, figsize=(4.2 * columns, 2.4 * rows), squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        series = run.series(name)
        ax.set_title(name, fontsize=9, loc="left")
        if not np.isfinite(series.values).any():
            reason = next(iter(series.notes.values()), "")
            ax.text(0.5, 0.5, f"no value\n{reason}", transform=ax.transAxes, ha="center", fontsize=7, wrap=True)
        elif series.axis is None:
            fill(ax, series.steps, series.values, *series.interval(), BLUE)
        elif len(series.axis[1]) <= 12:
            _lines(ax, series)
        else:
            last = np.flatnonzero(np.isfinite(series.values).any(1))[-1]
            value, error, kind, df, floor = (
                column[last] for column in (series.values, series.errors, series.kinds, series.df, series.floors)
            )
            curve(ax, Measurement(value, error, kind, df, floor, axis=series.axis))
            ax.set_title(f"{name}, at step {series.steps[last]}", fontsize=9, loc="left")
        ax.tick_params(labelsize=8, which="both")
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    figure.suptitle(title(run), fontsize=9, x=0.01, ha="left")
    figure.supxlabel("step", fontsize=9)
    return figure


def _lines(axes: Axes, series: Series) -> None:
    from matplotlib import colormaps

    assert series.axis is not None
    name, coordinates = series.axis
    low, high = series.interval()
    for j, coordinate in enumerate(coordinates):
        colour = colormaps["viridis"](j / max(1, len(coordinates) - 1) * 0.9)
        fill(axes, series.steps, series.values[:, j], low[:, j], high[:, j], colour, label=str(coordinate))
    axes.legend(title=name, fontsize=6, title_fontsize=6, ncols=2)


def _band(axes: Axes, series: Series, colour: str, label: str) -> None:
    low, high = series.interval()
    kinds = {"bound": "residual bound", "sem": "95% interval"}
    meaning = next((kinds[kind] for kind in series.kinds if kind in kinds), "exact")
    fill(axes, series.steps, series.values, low, high, colour, f"{label}  ({meaning})")
