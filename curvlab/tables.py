"""Runs as tables: a row for each number with its interval, or a row for each step; for CSV files and data frames."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from .files import printable
from .measurement import half_width
from .optional import require_package
from .runs import Run

Row = dict[str, Any]
Runs = Run | str | os.PathLike | Iterable[Run | str | os.PathLike]

LONG = ("run", "step", "quantity", "axis", "coordinate", "value", "error", "kind", "df", "low", "high", "note")
NUMBERS = ("value", "error", "df", "low", "high")


def table(runs: Runs, *, wide: bool = False) -> list[Row]:
    """What runs logged, as rows of plain values; None where there is none.

    By default a row for each number, with the columns

    - `run`: the path as it was given; `step`;
    - `quantity`: the name of a diagnostic, or of a number that is logged beside them: lr, threshold, seconds, matvecs,
      batch_loss, ...; `axis` and `coordinate` of an entry of a curve, such as "batch_size" and 32;
    - `value`; `error`, whose meaning is `kind` (see `Measurement`; None beside the diagnostics); `df` of a standard error;
    - `low` and `high`, the ends of the 95% interval, with rounding; `note`.

    With `wide` a row for each step: run, step, the numbers beside the diagnostics, and for each quantity its value and
    its error, named ``sharpness`` and ``sharpness_error``, for entries of curves ``instability[batch_size=32]`` and
    ``instability_error[batch_size=32]``. Curves over coordinates that change from step to step (`changing`) are left out;
    a logged number named as a diagnostic gets the prefix ``logged_``.

    Args:
        runs: a run or its folder, or several.

    Raises:
        FileNotFoundError: a folder holds no run.

    Example:
        >>> import tempfile
        >>> run = Run.create(tempfile.mkdtemp() + "/a", {})
        >>> measured = {"sharpness": {"value": 9.5, "error": 0.5, "kind": "bound"}}
        >>> run.append({"step": 0, "lr": 0.2, "measurements": measured})
        >>> [(row["quantity"], row["value"], row["low"], row["high"]) for row in table(run)]
        [('lr', 0.2, None, None), ('sharpness', 9.5, 9.0, 10.0)]
        >>> [(row["sharpness"], row["sharpness_error"]) for row in table(run, wide=True)]
        [(9.5, 0.5)]
    """
    opened = _opened(runs)
    rows = [row for run in opened for row in _rows(run)]
    if wide:
        return _widened(rows)
    _add_intervals(rows)
    return [{name: row[name] for name in LONG} for row in rows]


def changing(runs: Runs) -> list[str]:
    """Quantities whose coordinates differ between steps of a run, such as the eigenvalues of a density."""
    return _changing([row for run in _opened(runs) for row in _rows(run)])


def to_csv(runs: Runs, file: str | os.PathLike | TextIO, *, wide: bool = False) -> None:
    """Write `table` as CSV, to a path or an open text file. Numbers have all their digits: read back, they are the same."""
    if isinstance(file, str | os.PathLike):
        with open(file, "w", newline="") as stream:
            return to_csv(runs, stream, wide=wide)
    rows = table(runs, wide=wide)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_columns(rows, wide))
    writer.writerows(row.values() for row in rows)


def to_pandas(runs: Runs, *, wide: bool = False) -> Any:
    """`table` as a pandas.DataFrame; missing numbers are NaN.

    Raises:
        ImportError: pandas is not there.
    """
    pandas = require_package("pandas", "curvlab[pandas]")
    rows = table(runs, wide=wide)
    frame = pandas.DataFrame(rows, columns=_columns(rows, wide))
    numbers = [name for name in frame if name not in ("run", "step")] if wide else NUMBERS
    return frame.astype(dict.fromkeys(numbers, float))


def _opened(runs: Runs) -> list[Run]:
    listed = [runs] if isinstance(runs, Run | str | os.PathLike) else list(runs)
    return [run if isinstance(run, Run) else Run(run) for run in listed]


def _columns(rows: Sequence[Row], wide: bool) -> list[str]:
    return list(rows[0] if rows else ("run", "step") if wide else LONG)


def _rows(run: Run) -> Iterator[Row]:
    """The long rows of a run, with the floors of their intervals, and without their ends."""
    name = printable(run.path.as_posix())
    for record in run.records:
        base = {"run": name, "step": record["step"]}
        beside = ((key, x) for key, x in record.items() if key != "step" and _is_number(x))
        for key, number in beside:
            yield base | _entry(key, {"value": number}, None, None)
        for quantity, m in record["measurements"].items():
            for index, (axis, coordinate) in _points(m):
                yield base | _entry(quantity, m, index, (axis, coordinate))


def _points(m: Mapping[str, Any]) -> Iterator[tuple[int | None, tuple[str | None, Any]]]:
    if not m.get("axis"):
        yield None, (None, None)
        return
    axis, coordinates = m["axis"]
    for index, coordinate in enumerate(coordinates):
        yield index, (axis, coordinate)


def _entry(quantity: str, m: Mapping[str, Any], index: int | None, place: tuple[str | None, Any] | None) -> Row:
    def pick(x: Any) -> Any:
        return x[index] if isinstance(x, list) and index is not None else x

    kind, value = m.get("kind"), pick(m["value"])
    error = pick(m.get("error")) if value is not None else None
    df = None
    if kind == "sem" and value is not None:
        df = pick(m.get("df"))
        df = math.inf if df is None else df  # JSON has no infinity
    axis, coordinate = place or (None, None)
    return {
        "quantity": quantity, "axis": axis, "coordinate": coordinate, "value": value, "error": error, "kind": kind,
        "df": df, "low": None, "high": None, "note": m.get("note"), "floor": pick(m.get("floor", 0.0)),
    }  # fmt: skip


def _add_intervals(rows: Sequence[Row]) -> None:
    known = [row for row in rows if row["kind"] and row["value"] is not None and row["error"] is not None]
    if not known:
        return
    value, error, floor = (np.array([row[key] for row in known], dtype=float) for key in ("value", "error", "floor"))
    df = np.array([row["df"] or math.inf for row in known])
    half = half_width(error, np.array([row["kind"] for row in known]), df, floor, 0.95)
    for row, low, high in zip(known, (value - half).tolist(), (value + half).tolist(), strict=True):
        row["low"], row["high"] = low, high


def _changing(rows: Sequence[Row]) -> list[str]:
    found: dict[tuple[str, str], dict[int, list[Any]]] = {}
    for row in rows:
        if row["axis"] is not None:
            of_run = found.setdefault((row["quantity"], row["run"]), {})
            of_run.setdefault(row["step"], []).append(row["coordinate"])
    odd = (name for (name, _), curves in found.items() if len({tuple(curve) for curve in curves.values()}) > 1)
    return list(dict.fromkeys(odd))


def _widened(rows: Sequence[Row]) -> list[Row]:
    """Rows of one step side by side; all have the same columns, in order of appearance, numbers beside them first."""
    left_out, diagnostics = set(_changing(rows)), {row["quantity"] for row in rows if row["kind"]}
    steps: dict[tuple[str, int], Row] = {}
    beside: dict[str, None] = {}
    measured: dict[str, None] = {}
    for row in rows:
        name = row["quantity"]
        step = steps.setdefault((row["run"], row["step"]), {"run": row["run"], "step": row["step"]})
        if not row["kind"]:
            name = f"logged_{name}" if name in diagnostics else name  # monitor(step, loss=...) beside the measured loss
            beside[name], step[name] = None, row["value"]
        elif name not in left_out:
            place = "" if row["axis"] is None else f"[{row['axis']}={row['coordinate']}]"
            entries = {name + place: row["value"], f"{name}_error{place}": row["error"]}
            measured.update(dict.fromkeys(entries))
            step.update(entries)
    columns = ["run", "step", *beside, *measured]
    return [{name: step.get(name) for name in columns} for step in steps.values()]


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
