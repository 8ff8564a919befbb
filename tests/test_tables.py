"""Runs as tables: compared with `Run.series`, which has tests of its own, and number for number with the log."""

import csv
import io
import json
import math
import sys
import types

import numpy as np
import pytest

from curvlab import Run, tables
from curvlab.tables import changing, table, to_csv, to_pandas

EIGEN = {"kind": "bound", "axis": ["index", [1, 2]]}
LOG = [
    {"step": 0, "lr": 0.1, "threshold": 20.0, "batch_size": [8, 32], "batch_loss": 1 / 3, "matvecs": 7, "seconds": 0.25,
     "measurements": {
         "sharpness": {"value": 0.1 + 0.2, "error": 1e-17, "kind": "bound", "floor": 1e-3},
         "instability": {"value": [1.0, 2.0], "error": [0.1, 0.2], "kind": "sem", "df": [4.0, None],
                         "axis": ["batch_size", [8, 32]]},
         "hessian_eigenvalues": EIGEN | {"value": [3.0, math.pi], "error": 0.5},
         "hessian_density": {"value": [1.0, 2.0], "error": [0.0, 0.0], "kind": "exact", "axis": ["eigenvalue", [0.0, 1.0]]},
     }},
    {"step": 3, "lr": 0.05, "threshold": 40.0, "batch_size": [8, 32], "batch_loss": None, "matvecs": 9, "seconds": 0.5,
     "measurements": {
         "sharpness": {"value": None, "error": 0.0, "kind": "exact", "note": "diverged"},
         "secant_sharpness": {"value": 2.0, "error": None, "kind": "sem", "df": 3.0},
         "hessian_density": {"value": [1.0, 2.0], "error": [0.0, 0.0], "kind": "exact", "axis": ["eigenvalue", [0.0, 2.0]]},
     }},
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    made = Run.create(tmp_path / "run", {})
    for record in LOG:
        made.append(record)
    made.close()
    return Run(tmp_path / "run")


def find(rows, quantity, step=0, coordinate=None):
    (row,) = (r for r in rows if (r["quantity"], r["step"], r["coordinate"]) == (quantity, step, coordinate))
    return row


def test_every_number_of_the_log_is_a_row_with_its_interval(run):
    rows = table(run)
    assert {tuple(row) for row in rows} == {tables.LONG}
    assert len(rows) == 2 * 5 - 1 + (1 + 2 + 2 + 2) + (1 + 1 + 2)  # numbers beside, of which one is null; measured
    for name in run.names:
        series = run.series(name)
        low, high = series.interval()
        for i, step in enumerate(series.steps):
            for j, coordinate in enumerate(series.axis[1] if series.axis else [None]):
                if name == "hessian_density" and step == 0:
                    continue  # series has the coordinates of the last step
                row = find(rows, name, step, coordinate)
                expected = [a.reshape(len(series), -1)[i, j] for a in (series.values, series.errors, low, high)]
                got = [math.nan if row[key] is None else row[key] for key in ("value", "error", "low", "high")]
                if math.isnan(expected[0]):
                    expected[1] = math.nan  # what does not exist has no error
                assert got == pytest.approx(expected, rel=1e-15, nan_ok=True), (name, step)
    assert find(rows, "sharpness")["kind"] == "bound"
    assert find(rows, "sharpness")["low"] < 0.3 - 1e-3 + 1e-9  # with rounding
    assert find(rows, "sharpness", 3)["note"] == "diverged"
    assert find(rows, "instability", 0, 32)["df"] == math.inf
    assert (find(rows, "instability", 0, 8)["axis"], find(rows, "instability", 0, 8)["df"]) == ("batch_size", 4.0)
    assert find(rows, "batch_loss") == dict.fromkeys(tables.LONG) | {
        "run": run.path.as_posix(), "step": 0, "quantity": "batch_loss", "value": 1 / 3,
    }  # fmt: skip


def test_a_row_for_each_step(run):
    first, second = table(run, wide=True)
    assert list(first) == list(second)
    assert list(first)[:7] == ["run", "step", "lr", "threshold", "batch_loss", "matvecs", "seconds"]
    assert first["hessian_eigenvalues[index=2]"] == math.pi
    assert (first["instability[batch_size=8]"], first["instability_error[batch_size=32]"]) == (1.0, 0.2)
    assert (first["sharpness_error"], second["sharpness"], second["sharpness_error"]) == (1e-17, None, None)
    assert (second["lr"], second["batch_loss"], second["instability[batch_size=8]"]) == (0.05, None, None)
    assert changing(run) == ["hessian_density"]  # which has no columns that fit every step
    assert not [name for name in first if "density" in name]


def test_a_number_named_as_a_diagnostic_stays_apart(tmp_path):
    made = Run.create(tmp_path / "run", {})
    for step in range(2):
        measured = {"loss": {"value": 5.0, "error": 0.0, "kind": "exact"}} if step else {}
        made.append({"step": step, "loss": 7.0, "measurements": measured})
    rows = table(made, wide=True)
    assert [(row["loss"], row["logged_loss"]) for row in rows] == [(None, 7.0), (5.0, 7.0)]


@pytest.mark.parametrize("wide", [False, True])
def test_read_back_the_numbers_are_the_same(run, tmp_path, wide):
    to_csv(run, tmp_path / "all.csv", wide=wide)
    text = io.StringIO()
    to_csv([run.path], text, wide=wide)
    assert (tmp_path / "all.csv").read_text() == text.getvalue()
    rows = table(run, wide=wide)
    back = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert len(back) == len(rows)
    numbers = 0
    for there, row in zip(back, rows, strict=True):
        assert list(there) == list(row)
        for name, x in row.items():
            if isinstance(x, int | float):
                numbers += 1
                assert float(there[name]) == x  # bit for bit
            else:
                assert there[name] == ("" if x is None else x)
    assert numbers > 20


def test_several_runs_are_told_apart_and_share_columns(run, tmp_path):
    other = Run.create(tmp_path / "other", {})
    other.append({"step": 0, "lr": 0.3, "measurements": {"loss": {"value": 1.0, "error": 0.0, "kind": "exact"}}})
    rows = table([run, str(other.path)], wide=True)
    assert [(row["run"], row["step"]) for row in rows] == [(str(run.path), 0), (str(run.path), 3), (str(other.path), 0)]
    assert [row["loss"] for row in rows] == [None, None, 1.0]
    assert len({tuple(row) for row in rows}) == 1


def test_a_run_without_records_has_a_head(tmp_path):
    Run.create(tmp_path / "run", {})
    for wide, head in ((False, ",".join(tables.LONG)), (True, "run,step")):
        text = io.StringIO()
        to_csv(tmp_path / "run", text, wide=wide)
        assert text.getvalue() == head + "\n"


def test_a_frame_is_made_from_the_same_rows(run, monkeypatch):
    """Without pandas, by a stand-in that keeps what it is given; with pandas, numbers are float64."""
    try:
        import pandas
    except ImportError:
        made = {}

        class DataFrame:
            def __init__(self, rows, columns):
                made.update(rows=rows, columns=columns)

            def __iter__(self):
                return iter(made["columns"])

            def astype(self, kinds):
                return made | {"kinds": kinds}

        monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=DataFrame))
        frame = to_pandas(run)
        assert (frame["rows"], frame["columns"]) == (table(run), list(tables.LONG))
        assert set(frame["kinds"]) == {"value", "error", "df", "low", "high"}
        assert to_pandas(run, wide=True)["kinds"]["sharpness"] is float
    else:
        frame = to_pandas(run)
        assert isinstance(frame, pandas.DataFrame)
        assert np.array_equal(frame["value"], [np.nan if r["value"] is None else r["value"] for r in table(run)], True)
        assert to_pandas(run, wide=True)["sharpness"].dtype == float


def test_without_pandas_the_remedy_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'curvlab\[pandas\]'|pandas does not import"):
        to_pandas(run)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        table(tmp_path)


def test_rows_are_plain(run):
    assert json.loads(json.dumps(table(run)))
