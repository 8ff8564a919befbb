"""Benchmarks run, and their records are complete. What they measure is never tested."""

import importlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from curvlab import plots
from curvlab.regularizers import REGULARIZERS
from curvlab.throughput import EAGER

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
ENVIRONMENT = {"command", "commit", "versions", "platform", "started", "cores", "threads", "load"}


def records(folder: Path, name: str) -> list[dict]:
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run(name: str, folder: Path, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--records", str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(record: dict, name: str) -> None:
    assert record["benchmark"] == name
    assert set(record["environment"]) >= ENVIRONMENT
    assert record["environment"]["threads"] == 1
    assert record["environment"]["command"][0] == f"{name}.py"
    text = json.dumps(record)
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    assert not platform.node() or f'"{platform.node()}"' not in text


def check_penalties(record: dict, sizes: list[int], names: set[str]) -> None:
    check(record, "penalties")
    found = [(row["micro_batch_size"], row["candidate"]) for row in record["results"]]
    assert sorted(found) == sorted((size, name) for size in sizes for name in {"plain", "torch", *names})
    for row in record["results"]:
        numbers = [row["ratio"], row["wall_ratio"], row["milliseconds"], *row["quartiles"]]
        assert all(math.isfinite(x) and x > 0 for x in numbers), row
        assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
        if row["candidate"] == "plain":
            assert numbers[0] == numbers[1] == 1


@pytest.mark.slow
def test_penalties_run_and_append(tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "penalties.jsonl").write_text('{"benchmark": "earlier"}\n')
    printed = run("penalties", folder)
    earlier, new = records(folder, "penalties")
    assert earlier == {"benchmark": "earlier"}
    assert new["settings"]["quick"] is True
    check_penalties(new, [16, 64], set(REGULARIZERS))
    assert all(name in printed for name in REGULARIZERS)
    assert str(tmp_path) not in json.dumps(new)


@pytest.mark.parametrize("record", records(BENCHMARKS / "records", "penalties"))
def test_kept_records_of_penalties_are_complete(record):
    names = {row["candidate"] for row in record["results"]} - {"plain", "torch"}  # of its time
    assert "gradient_norm_penalty" in names
    assert record["settings"]["quick"] is False
    check_penalties(record, [16, 128, 1024], names)


def test_the_table_of_benchmarks_is_the_folder():
    scripts = {file.stem for file in BENCHMARKS.glob("*.py")} - {"record", "common", "tables", "libraries", "scenarios"}
    table = (BENCHMARKS / "README.md").read_text(encoding="utf-8").partition("Other libraries")[0]
    assert scripts == {part.split(".py")[0] for part in table.split("python benchmarks/")[1:]}


@pytest.mark.slow
def test_products_of_engines_and_peers_are_compared(tmp_path):
    printed = run("bench_hvp", tmp_path)
    (record,) = records(tmp_path, "bench_hvp")
    check(record, "bench_hvp")
    assert record["settings"]["models"] == {"mlp": {"examples": 16, "parameters": 26122}}
    assert set(record["settings"]["peers"]) == {
        "pyhessian",
        "curvlinops",
        "hessian_eigenthings",
    }  # also those not there
    found = {row["name"]: row for row in record["results"]}
    exact = set(EAGER) - {"differences"}
    assert {f"curvlab {engine}" for engine in exact} | {"scipy (curvlab)", "by hand"} <= set(found)
    for name, row in found.items():
        assert name in printed
        assert row["difference"] < 1e-5
        assert row["peak_bytes"] is not None
        for spread in (row["product"], row["product_ratio"], row["first_ratio"]):
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]


@pytest.mark.slow
def test_norms_of_per_example_gradients_are_compared(tmp_path):
    run("bench_per_example", tmp_path)
    (record,) = records(tmp_path, "bench_per_example")
    check(record, "bench_per_example")
    found = {row["name"]: row for row in record["results"]}
    assert {"curvlab", "vmap"} <= set(found)
    assert set(record["settings"]["peers"]) == {"opacus", "backpack"}
    for row in found.values():
        assert row["difference"] < 1e-4
        assert row["product_ratio"]["median"] > 0
        assert row["peak_bytes"] is not None


@pytest.mark.slow
def test_solvers_are_compared_along_a_trajectory(tmp_path):
    run("bench_eigsh", tmp_path)
    (record,) = records(tmp_path, "bench_eigsh")
    check(record, "bench_eigsh")
    found = {(row["k"], row["solver"]): row for row in record["results"]}
    names = {"curvlab cold", "curvlab tracked", "scipy cold", "scipy warm", "lobpcg cold", "lobpcg warm"}
    assert set(found) >= {(k, name) for k in (1, 5) for name in names}
    for (k, name), row in found.items():
        assert row["products"]["median"] >= k
        assert row["gradients"]["median"] > 0
        if name.startswith("curvlab"):
            assert row["residual"] <= 1.01e-2
            assert row["value_error"] < 1e-2
    assert found[1, "curvlab tracked"]["products"]["median"] < found[1, "curvlab cold"]["products"]["median"]


@pytest.mark.slow
def test_memory_is_measured_against_examples_and_chunk(tmp_path):
    run("bench_memory", tmp_path)
    (record,) = records(tmp_path, "bench_memory")
    check(record, "bench_memory")
    rows = record["results"]
    assert {(row["n"], row["chunk_size"]) for row in rows} == {(256, 64), (512, 64), (512, 128)}
    assert all(row["engine"] == "graph" for row in rows)
    assert all(row["samples"] == [row["peak_bytes"]] for row in rows)
    assert all(row["peak_bytes"] > 0 for row in rows)


@pytest.mark.slow
def test_steps_with_diagnostics_are_timed_and_their_errors_measured(tmp_path):
    run("bench_step", tmp_path)
    (record,) = records(tmp_path, "bench_step")
    check(record, "bench_step")
    found = {(row["b"], row["candidate"]): row for row in record["results"]}
    assert {b for b, _ in found} == {64, 32}
    assert {name for _, name in found} >= {"bare", "by hand", "all", "sharpness", "interaction_trace", "loss"}
    assert found[64, "bare"]["mean_ratio"] == 1
    estimated = [row for row in record["results"] if row["true_error"] is not None]
    assert len(estimated) == 2 * 4
    assert all(row["true_error"] < 0.2 for row in estimated)
    assert all(row["gradients"]["median"] > 0 for row in record["results"])


@pytest.mark.slow
def test_scaling_is_measured_and_planned(tmp_path):
    run("bench_scaling", tmp_path)
    (record,) = records(tmp_path, "bench_scaling")
    check(record, "bench_scaling")
    found = {(row["scaling"], row["ranks"]): row for row in record["results"]}
    assert set(found) == {(kind, count) for kind in ("strong", "weak") for count in (1, 2, 4, 8, 16, 64)}
    for (_, count), row in found.items():
        assert (row["samples"] is not None) == (count in record["settings"]["measured"])
        assert row["planned_seconds"] > row["planned_communication"] >= 0
    assert 0 < found["strong", 1]["seconds"] > found["strong", 1]["communication"]


def test_answers_of_libraries_are_judged(scenarios):
    judged = importlib.import_module("failure_modes").judged
    rows = {row.number: i for i, row in enumerate(scenarios.ROWS) if row.number in ("F8", "F40", "F49")}
    found = {(number, name): judged(i, name) for number, i in rows.items() for name in ("curvlab", "PyHessian")}
    assert {key: row["outcome"] for key, row in found.items()} == {
        ("F8", "curvlab"): "right",
        ("F8", "PyHessian"): "right",
        ("F40", "curvlab"): "right",
        ("F40", "PyHessian"): "wrong",
        ("F49", "curvlab"): "named error",
        ("F49", "PyHessian"): "wrong",
    }
    assert ".grad" in found["F40", "PyHessian"]["changed"]
    assert found["F49", "PyHessian"]["detail"] == "nan"


@pytest.mark.slow
def test_curvlab_is_right_or_names_the_cause_in_every_row(tmp_path):
    run("failure_modes", tmp_path, "--rows", "--libraries", "curvlab")
    (record,) = records(tmp_path, "failure_modes")
    check(record, "failure_modes")
    assert [row for row in record["results"] if row["outcome"] not in ("right", "named error")] == []
    assert len(record["results"]) > 60


def test_every_failure_is_a_row_or_left_out_for_a_reason(scenarios):
    rows = [row.number for row in scenarios.ROWS if row.number != "state"]
    assert sorted({*rows, *scenarios.LEFT_OUT}, key=lambda name: int(name[1:])) == [f"F{i}" for i in range(1, 81)]
    assert not set(rows) & set(scenarios.LEFT_OUT)
    titles = [row.title for row in scenarios.ROWS]
    assert len(set(titles)) == len(titles)


def test_the_rule_for_named_errors(scenarios):
    named = importlib.import_module("failure_modes").named
    assert named("1 (BatchNorm1d) uses the statistics of the batch. Measure in mode='eval'", "BatchNorm")
    assert not named("1 (BatchNorm1d) uses the statistics of the batch", "BatchNorm")  # says nothing of what to do
    assert not named("the loss differs between two evaluations. Measure in mode='eval'", "BatchNorm")  # names no module
    assert not named("Trying to use forward AD with mkldnn_rnn_layer", "mkldnn")


@pytest.mark.slow
def test_errors_of_estimators_are_measured(tmp_path):
    run("bench_estimators", tmp_path)
    (record,) = records(tmp_path, "bench_estimators")
    check(record, "bench_estimators")
    found = {(row["point"], row["quantity"], row["estimator"]): row["errors"] for row in record["results"]}
    assert {quantity for _, quantity, _ in found} == {"tr(H S_b)", "tr(F)", "tr(H)"}
    for point in ("initialization", "trained"):
        assert found[point, "tr(H S_b)", "signs, control"] == [None, None]  # the search takes more
        assert all(error < 0.1 for error in found[point, "tr(H S_b)", "signs, control at hand"])
        assert all(0 < error < 1 for error in found[point, "tr(H)", "Hutch++"])


@pytest.fixture
def scenarios(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scenarios")


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tables")


def test_the_tables_of_pages_are_those_of_the_records(tables):
    for name, (page, _) in tables.PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text.partition(tables.begin(name))[2].partition(tables.end(name))[0].strip() == tables.tables(name), name
    for name, (benchmark, _) in tables.DRAWN.items():
        assert (tables.FIGURES / f"{name}.png").exists() == bool(tables.latest(benchmark, BENCHMARKS / "records"))


def test_tables_take_the_last_full_record_of_each_device(tables, tmp_path):
    def made(device, quick, median):
        spread = {"low": median, "median": median, "high": median}
        own = dict.fromkeys(("first", "product", "first_ratio", "product_ratio"), spread)
        row = {"model": "mlp", "name": "curvlab graph", "used": "curvlab graph", **own, "setup": 0.0, "nbytes": None}
        failed = row | dict.fromkeys(own) | {"name": "other", "used": None, "peak_bytes": None, "note": "broken"}
        settings = {"quick": quick, "device": device, "models": {"mlp": {"examples": 8, "parameters": 26122}}}
        results = [row | {"difference": 0.0, "note": "", "peak_bytes": 3 * 2**20}, failed | {"difference": None}]
        return {"settings": settings, "results": results, "environment": {"versions": {"torch": "2.x"}}}

    lines = [made("a GPU", False, 7.0), made("cpu", False, 1.5), made("cpu", False, 1.75), made("cpu", True, 9.0)]
    (tmp_path / "bench_hvp.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = tables.tables("speed", tmp_path)
    assert "| curvlab graph | 1.75 |" in text
    assert "| other | - |" in text
    assert text.index("1.75") < text.index("7.00")
    assert "1.50" not in text
    assert "9.00" not in text
    (panel,) = tables.panels(lines[1]).values()
    assert [speed.name for speed in panel] == ["curvlab graph", "other"]
    assert plots.throughput({"mlp": panel}).axes[0].get_title(loc="left") == "mlp"
    assert tables.tables("speed", tmp_path / "nothing") == tables.MISSING


def test_growth_of_memory_is_that_of_the_job_in_a_fresh_process(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    common = importlib.import_module("common")
    found = common.growth(reserve, 32 * 2**20, "cpu")
    assert 31 * 2**20 < found < 40 * 2**20


def reserve(size, device):
    """Takes far more memory before it is measured than while it is."""
    torch.ones(10 * size, dtype=torch.uint8, device=device)
    return lambda: torch.ones(size, dtype=torch.uint8, device=device)


def test_costs_are_counted(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "costs.py"),
        "--quick",
        "--records",
        str(tmp_path),
        "--names",
        "loss",
        "sharpness",
    ]
    problem = {"data": "digits", "n": 64, "model": "mlp 64-64-64-10 tanh", "loss": "squared_error", "steps": 5, "b": 8}
    before = {"loss": {"point": [9, 9.0]}, "gradient_norm": {"point": [0, 1.0]}}
    (tmp_path / "costs.json").write_text(json.dumps({"problem": problem, "costs": before}))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads((tmp_path / "costs.json").read_text())["costs"]
    assert list(counted) == ["loss", "gradient_norm", "sharpness"]
    assert counted["gradient_norm"] == before["gradient_norm"]  # which was not asked for again
    assert counted["loss"] == {"point": [0, 1.0], "step": [0.0, 1.0]}
    products, passes = counted["sharpness"]["point"]
    assert products >= 3
    assert passes == 1.0
