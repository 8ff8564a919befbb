"""Figures of runs, as the papers draw them: a log is all that a figure needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..runs import Run, Series
from .style import BLACK, BLUE, GREEN, RED, SHADES, axes_of, fill, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ADAPTIVE = ("Adam", "AdamW", "RMSprop")  # whose thresholds are for the preconditioned sharpness


def plot(runs: Run | Sequence[Run], folder: str | Path | None = None) -> list[Path]:
    """Draw every figure that the logs allow and save each as PNG and PDF; returns the PNG paths.

    Every run gives `quantities`, everything that was measured. One run gives `edge_of_stability` (Lee 2022, fig. 4a-c)
    and, with expected loss differences, `loss_difference` (figs. 1, 2). Several runs with different batch sizes also
    give `batch_sizes` (fig. 4d).

    Args:
        folder: where; default the run's folder, or the parent of several.

    Raises:
        ValueError: no run, or none with a measurement.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    figures: dict[Path, Figure] = {}
    if len(runs) > 1 and all({"interaction_sharpness", "gradient_concentration"} <= set(run.names) for run in runs):
        figures[Path(folder or runs[0].path.parent) / "batch_sizes"] = batch_sizes(runs)
    for run in runs:
        place = Path(folder) if folder is not None and len(runs) == 1 else run.path
        if {"loss", "sharpness"} <= set(run.names):
            figures[place / "edge_of_stability"] = edge_of_stability(run)
        if {"expected_loss_difference", "instability", "gradient_norm"} <= set(run.names):
            figures[place / "loss_difference"] = loss_difference(run)
        if run.names:
            figures[place / "quantities"] = quantities(run)
    if not figures:
        raise ValueError("nothing to draw: no run has measurements; ask for some with train(diagnostics=...)")
    return save(figures)


def edge_of_stability(run: Run) -> Figure:
    """Loss above, sharpness and interaction-aware sharpness against 2/lr below, with 95% intervals (Lee 2022, fig. 4a-c)."""
    figure, (top, bottom) = axes_of(2, figsize=(7.2, 5.6), sharex=True, height_ratios=[1, 1.7])
    loss = run.series("loss")
    top.semilogy(loss.steps, loss.values, color=BLACK, lw=1)
    top.set_ylabel("training loss")
    top.set_title(_title(run), fontsize=9, loc="left")
    b = run.config.get("training", {}).get("batch_size")
    curves = [("sharpness", BLUE, "sharpness  ‖H‖")]
    if "preconditioned_sharpness" in run.names and not np.isnan(run.series("preconditioned_sharpness").values).all():
        # of an adaptive optimizer, whose threshold is for this
        curves = [("preconditioned_sharpness", BLUE, "preconditioned sharpness")]
    elif "interaction_sharpness" in run.names:
        name = "S_n" if b == _examples(run) else "S_b"
        curves.append(("interaction_sharpness", RED, rf"interaction-aware sharpness  $\|H\|_{{{name}}}$"))
    adaptive = run.config.get("training", {}).get("optimizer", {}).get("name") in ADAPTIVE
    highest = 0.0
    for name, colour, label in curves:
        series = run.series(name)
        _band(bottom, series, colour, label)
        highest = max(highest, float(np.nanquantile(series.values, 0.995)))
    if not adaptive or curves[0][0] == "preconditioned_sharpness":
        _threshold(bottom, run)
    if "gradient_concentration" in run.names and b != _examples(run):
        rho, (_, lr) = run.series("gradient_concentration"), run.column("lr")
        label = r"$2\rho_b/\mathrm{lr}$ (running median)"
        bottom.plot(rho.steps, _smooth(2 * rho.values / lr[: len(rho)]), color=GREEN, ls=":", lw=1.4, label=label)
    bottom.set_ylim(min(0.0, float(np.nanquantile(run.series(curves[-1][0]).values, 0.005))), 1.15 * highest)
    bottom.set_xlabel("step")
    bottom.set_ylabel("curvature")
    bottom.legend(fontsize=8, loc="lower right", framealpha=0.9)
    return figure


def batch_sizes(runs: Sequence[Run]) -> Figure:
    """‖H‖_{S_b} of several runs against its bound 2ρ_b/lr, for each batch size (Lee 2022, fig. 4d); running medians."""
    figure, (left, right) = axes_of(1, 2, figsize=(9.6, 4.4), width_ratios=[1.5, 1])
    runs = sorted(runs, key=lambda run: run.config["training"]["batch_size"])
    plateaus = []
    for i, run in enumerate(runs):
        b, colour = run.config["training"]["batch_size"], SHADES[round(i * (len(SHADES) - 1) / max(1, len(runs) - 1))]
        value, rho = run.series("interaction_sharpness"), run.series("gradient_concentration")
        bound = 2 * rho.values / run.column("lr")[1][: len(rho)]
        left.plot(value.steps, _smooth(value.values), color=colour, lw=1.3, label=f"b = {b}")
        left.plot(rho.steps, _smooth(bound), color=colour, lw=1, ls="--")
        half = slice(len(value) // 2, None)
        plateaus.append((b, *(np.nanquantile(x[half], [0.25, 0.5, 0.75]) for x in (value.values, bound))))
    _threshold(left, runs[0])
    left.set_xlabel("step")
    left.set_ylabel(r"$\|H\|_{S_b}$   (dashed: $2\rho_b/\mathrm{lr}$)")
    left.set_title(_title(runs[0], batch=False), fontsize=9, loc="left")
    left.legend(fontsize=8)
    b = np.array([row[0] for row in plateaus], dtype=float)
    for k, colour, marker, label, shift in (
        (1, RED, "o", r"$\|H\|_{S_b}$", 0.97),
        (2, GREEN, "s", r"$2\rho_b/\mathrm{lr}$", 1.03),
    ):
        q = np.array([row[k] for row in plateaus])
        spread = [q[:, 1] - q[:, 0], q[:, 2] - q[:, 1]]
        right.errorbar(b * shift, q[:, 1], yerr=spread, color=colour, marker=marker, ms=5, lw=1, capsize=2, label=label)
    right.axhline(_two_over_lr(runs[0]), color=BLACK, ls="--", lw=1, label="2/lr")
    right.set_xscale("log", base=2)
    right.set_xlabel("batch size b")
    right.set_ylabel("second half of the run: median, quartiles")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    return figure


def loss_difference(run: Run) -> Figure:
    """Expected loss difference against `instability`, in units in which eq. 6 is y = x - 1 (Lee 2022, figs. 1, 2)."""
    figure, axes = axes_of(1, figsize=(6.4, 4.6))
    lr = run.column("lr")[1]
    x, y, g = (run.series(name) for name in ("instability", "expected_loss_difference", "gradient_norm"))
    lr = lr[: len(x)]
    horizontal, vertical = x.values * lr / 2, y.values / (lr * g.values**2)
    low, high = y.interval()
    errors = [np.maximum(0, vertical - low / (lr * g.values**2)), np.maximum(0, high / (lr * g.values**2) - vertical)]
    shown = np.isfinite(horizontal) & np.isfinite(vertical)
    axes.errorbar(
        horizontal[shown], vertical[shown], yerr=[e[shown] for e in errors], fmt="none", ecolor="0.8", lw=0.6, zorder=1
    )
    points = axes.scatter(horizontal[shown], vertical[shown], c=x.steps[shown], s=7, cmap="viridis", zorder=2)
    ends = np.array([min(0.0, np.nanmin(horizontal)), np.nanquantile(horizontal, 0.995)])
    axes.plot(ends, ends - 1, color=BLUE, lw=1.2, label=r"eq. 6: slope $\mathrm{lr}^2/2$, zero at 2/lr")
    axes.axhline(0, color="0.6", lw=0.6)
    axes.axvline(1, color=BLACK, ls="--", lw=1, label="2/lr")
    axes.set_xlim(ends[0] - 0.05, 1.1 * ends[1])
    low_y, high_y = np.nanquantile(vertical, [0.002, 0.998])
    axes.set_ylim(min(-1.1, low_y), max(0.3, 1.2 * high_y))
    axes.set_xlabel(r"$\mathrm{tr}(H S_b)/\mathrm{tr}(S_n)$  in units of 2/lr")
    axes.set_ylabel(r"$(E[L_{t+1}] - L_t)\,/\,(\mathrm{lr}\,\mathrm{tr}(S_n))$")
    axes.set_title(_title(run), fontsize=9, loc="left")
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
        if series.axis is None:
            fill(ax, series.steps, series.values, *series.interval(), BLUE)
        elif len(series.axis[1]) <= 12:
            _lines(ax, series)
        else:
            low, high = (end[-1] for end in series.interval())
            fill(ax, np.array(series.axis[1]), series.values[-1], low, high, BLUE)
            ax.set_xlabel(f"{series.axis[0]}, at step {series.steps[-1]}", fontsize=8)
        ax.tick_params(labelsize=8)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    figure.suptitle(_title(run), fontsize=9, x=0.01, ha="left")
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


def _threshold(axes: Axes, run: Run) -> None:
    """What the curvature is compared with: 2/lr, or the threshold of the optimizer in use."""
    steps, bound = run.column("threshold")
    lr = run.column("lr")[1]
    optimizer = run.config.get("training", {}).get("optimizer", {})
    if not len(bound) and len(lr) and not optimizer.get("momentum"):  # a log without thresholds
        steps, bound = run.column("lr")[0], 2 / lr
    if len(bound):
        plain = len(bound) == len(lr) and np.allclose(bound, 2 / lr)
        name = "2/lr" if plain else f"threshold of {optimizer.get('name', 'the optimizer')}"
        first, last = (f"{x:.4g}" for x in (bound[0], bound[-1]))
        label = f"{name} = {first}" if first == last else f"{name} = {first} ... {last}"
        axes.plot(steps, bound, color=BLACK, ls="--", lw=1.1, label=label)


def _two_over_lr(run: Run) -> float:
    return 2 / float(run.column("lr")[1][0])


def _smooth(x: np.ndarray, window: int = 15) -> np.ndarray:
    """Centred running median that ignores missing values and shrinks at the ends: a jump stays where it is."""
    half = window // 2
    return np.array([np.nanmedian(x[max(0, i - half) : i + half + 1]) for i in range(len(x))])


def _examples(run: Run) -> int | None:
    return run.config.get("training", {}).get("objective", {}).get("examples")


def _title(run: Run, batch: bool = True) -> str:
    training = run.config.get("training", {})
    objective = training.get("objective", {})
    parts = [f"{objective.get('model', '')}, {objective.get('parameters')} parameters, n = {objective.get('examples')}"]
    if "experiment" in run.config:
        e = run.config["experiment"]
        parts = [
            f"{e['data']}, {e['model']}" + (f" {e['activation']}" if e["model"] == "mlp" else "") + f", n = {e['n']}"
        ]
    parts += [str(objective.get("loss", "")).replace("_", " "), f"lr = {training.get('lr')}"]
    if batch:
        b = training.get("batch_size")
        parts.append("full batch" if b == objective.get("examples") else f"b = {b}")
    return ", ".join(parts)
