"""What figures need of a log: one number a step, series taken at the steps that they share, thresholds at their steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..runs import Run, Series

ADAPTIVE = ("Adam", "AdamW", "RMSprop")  # whose thresholds are for the preconditioned sharpness


class Line(NamedTuple):
    """Numbers at steps, and what to call them."""

    steps: np.ndarray
    values: np.ndarray
    name: str = ""


def scalar(run: Run, name: str) -> tuple[Series, str]:
    """A quantity as one number a step, and which entry of a curve that is: the batch size of training, or else the first.

    Raises:
        KeyError: it was not measured, or its coordinates change from step to step.
    """
    series = run.series(name)
    if series.axis is None:
        return series, ""
    axis, coordinates = series.axis
    b = training(run).get("batch_size")
    chosen = b if axis == "batch_size" and b in coordinates else coordinates[0]
    return run.series(name, **{axis: chosen}), f"{axis.replace('_', ' ')} {chosen}"


def aligned(*lines: tuple[np.ndarray, np.ndarray] | Line | Series) -> tuple[np.ndarray, list[np.ndarray]]:
    """The steps that all of them have, and their values there: quantities have schedules of their own."""
    pairs = [(line.steps, line.values) if isinstance(line, Series) else line[:2] for line in lines]
    found = [dict(zip(steps.tolist(), values, strict=True)) for steps, values in pairs]
    shared = sorted(set.intersection(*(set(one) for one in found)))
    return np.array(shared), [np.array([one[step] for step in shared], dtype=float) for one in found]


def training(run: Run) -> dict[str, Any]:
    """What the configuration says of the training."""
    return run.config.get("training", {})


def optimizer(run: Run) -> dict[str, Any]:
    """Name and settings of the optimizer."""
    return training(run).get("optimizer") or {}


def adaptive(run: Run) -> bool:
    """Whether the threshold of the optimizer is for the preconditioned sharpness."""
    return optimizer(run).get("name") in ADAPTIVE


def limit(record: Mapping[str, Any], optimizer: Mapping[str, Any]) -> tuple[float, str] | None:
    """The optimizer's threshold at a record of the log, and its name: 2/lr where it is that; None where none is known."""
    value, lr, name = record.get("threshold"), record.get("lr"), optimizer.get("name", "the optimizer")
    if "threshold" not in record and lr and name not in ADAPTIVE and not optimizer.get("momentum"):
        value = 2 / lr  # a log without thresholds
    if not value or value <= 0:
        return None
    return value, "2/lr" if lr and math.isclose(value * lr, 2, rel_tol=1e-6) else f"threshold of {name}"


def threshold(run: Run) -> Line | None:
    """What the sharpness (of an adaptive optimizer: the preconditioned one) is compared with, at each logged step.

    It is 2/lr for plain descent, and follows a schedule of the learning rate. None where the optimizer has none that is
    known.
    """
    found = [(record["step"], at) for record in run.records if (at := limit(record, optimizer(run))) is not None]
    if not found:
        return None
    names = {name for _, (_, name) in found}
    other = next((name for name in names if name != "2/lr"), "2/lr")
    return Line(np.array([step for step, _ in found]), np.array([value for _, (value, _) in found]), other)


def interaction_bound(run: Run) -> Line | None:
    """What ‖H‖_{S_b} is compared with: ρ_b times the threshold, at the steps at which ρ_b was measured.

    2ρ_b/lr for plain SGD (Lee 2022, fig. 4). None without ρ_b, and for adaptive optimizers.
    """
    limit = threshold(run)
    if limit is None or adaptive(run) or "gradient_concentration" not in run.names:
        return None
    steps, (rho, bound) = aligned(scalar(run, "gradient_concentration")[0], limit)
    return Line(steps, rho * bound, r"$2\rho_b/\mathrm{lr}$" if limit.name == "2/lr" else rf"$\rho_b$ · {limit.name}")


def smooth(x: np.ndarray, window: int = 15) -> np.ndarray:
    """Centred running median that ignores missing values and shrinks at the ends: a jump stays where it is."""
    half = window // 2
    parts = [x[max(0, i - half) : i + half + 1] for i in range(len(x))]
    return np.array([np.nanmedian(part) if np.isfinite(part).any() else np.nan for part in parts])


def examples(run: Run) -> int | None:
    """N."""
    return training(run).get("objective", {}).get("examples")


def title(run: Run, *, lr: bool = True, batch: bool = True) -> str:
    """Problem, loss, and unless left out learning rate and batch size, on one line."""
    objective = training(run).get("objective", {})
    parts = [f"{objective.get('model', '')}, {objective.get('parameters')} parameters, n = {objective.get('examples')}"]
    if "experiment" in run.config:
        e = run.config["experiment"]
        parts = [
            f"{e['data']}, {e['model']}" + (f" {e['activation']}" if e["model"] == "mlp" else "") + f", n = {e['n']}"
        ]
    parts += [str(objective.get("loss", "")).replace("_", " "), f"lr = {_span(run.column('lr')[1])}" if lr else ""]
    b = training(run).get("batch_size")
    if batch and b is not None:
        sizes = ", ".join(map(str, b)) if isinstance(b, list) else b
        parts.append("full batch" if b == objective.get("examples") else f"b = {sizes}")
    return ", ".join(part for part in parts if part)


def legend(line: Line) -> str:
    """Its name with its value, or its first and last ones."""
    return f"{line.name} = {_span(line.values)}"


def _span(values: np.ndarray) -> str:
    if not len(values):
        return "unknown"
    first, last = (f"{x:.4g}" for x in (values[0], values[-1]))
    return first if first == last else f"{first} ... {last}"
