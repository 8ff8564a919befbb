"""Sweeps. Against references: tables against descent and Student's t written out here, interrupted sweeps against whole ones
bit by bit, grafted step lengths against the other run's log, choices against planted optima. Behavioural: what is refused,
reported and drawn."""

import csv
import dataclasses
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
import torch

from curvlab import Run, plots, problems
from curvlab.claims.statistics import Estimate
from curvlab.cli import main
from curvlab.problems.presets import Experiment, parse_diagnostics
from curvlab.problems.rows import Row, Sentence, Study
from curvlab.problems.studies import STUDIES, study
from curvlab.sweep import (
    Job,
    Result,
    Summary,
    Sweep,
    Wanted,
    conduct,
    difference,
    estimate,
    judge,
    parse_grid,
    parse_seeds,
    run,
    summarize,
)
from curvlab.sweep.conduct import choose
from curvlab.sweep.plan import plan

TINY = Experiment(
    data="linear_regression", n=24, model="linear", lr=0.1, steps=6, diagnostics=("loss",), dtype="float64"
)
DIGITS = Experiment(n=24, hidden=(4,), steps=6, diagnostics=("loss",))


def one(base=TINY, **rows):
    return Study("a test", base, rows or {"": Row()}, metric="test_loss")


def descended(seed, lr, steps=6, n=24):
    """Test loss of full-batch descent on linear regression, from the formula."""
    (x, y), (x_test, y_test) = problems.linear_regression(n, noise=0.0, seed=seed, dtype=torch.float64)
    x, y, x_test, y_test = (a.numpy() for a in (x, y, x_test, y_test))
    w = np.zeros((x.shape[1], 1))
    for _ in range(steps):
        w -= lr * x.T @ (x @ w - y) / n
    return float(0.5 * np.mean((x_test @ w - y_test) ** 2))


# -- plans -----------------------------------------------------------------------------------------


def test_a_plan_has_a_run_for_every_row_point_and_seed(tmp_path):
    asked = one(A=Row({"momentum": 0.5}), B=Row())
    sweep = Sweep(asked, tmp_path, grid=parse_grid(["lr=0.1,0.2", "batch_size=4,8"]), seeds=(3, 5))
    jobs = sweep.jobs()
    assert len(jobs) == len({job.folder for job in jobs}) == 2 * 4 * 2 == sweep.size
    assert {(j.label, j.experiment.lr, j.experiment.batch_size, j.experiment.init_seed) for j in jobs} == {
        (label, lr, (b,), s) for label in "AB" for lr in (0.1, 0.2) for b in (4, 8) for s in (3, 5)
    }
    for j in jobs:
        assert j.experiment.init_seed == j.experiment.data_seed == j.experiment.probe_seed == j.seed
        assert j.experiment.momentum == (0.5 if j.label == "A" else 0.0)


def test_a_row_has_axes_of_its_own_which_the_grid_adds_to_and_replaces(tmp_path):
    asked = one(A=Row({"momentum": 0.5}, grid={"lr": ("0.1", "0.2")}), B=Row())
    points = [(j.label, dict(j.point)) for j in Sweep(asked, tmp_path, seeds=(0,)).jobs()]
    assert points == [("A", {"lr": "0.1"}), ("A", {"lr": "0.2"}), ("B", {})]
    sweep = Sweep(asked, tmp_path, grid=parse_grid(["lr=0.3", "batch_size=4,8"]), seeds=(0,))
    assert [(j.label, j.experiment.lr, j.experiment.batch_size) for j in sweep.jobs()] == [
        (row, 0.3, (b,)) for row in "AB" for b in (4, 8)
    ]
    assert len(sweep.jobs()) == sweep.size
    with pytest.raises(ValueError, match="row A sets lr itself"):
        asked.experiment("A", dataclasses.replace(TINY, lr=0.7))


def test_several_batch_sizes_of_a_preset_are_an_axis(tmp_path):
    asked = study("sgd-iir")
    assert [j.experiment.batch_size for j in Sweep(asked, tmp_path, seeds=(0,)).jobs()] == [
        (8,),
        (32,),
        (128,),
        (512,),
        (1024,),
    ]
    chosen = Sweep(asked, tmp_path, seeds=(0,), grid={"batch_size": ("4",)})
    assert [j.experiment.batch_size for j in chosen.jobs()] == [(4,)]


def test_a_row_may_fix_a_seed(tmp_path):
    jobs = Sweep(one(a=Row(), b=Row({"data_seed": 7})), tmp_path, seeds=(0, 3)).jobs()
    seeds = [(j.experiment.init_seed, j.experiment.data_seed, j.experiment.probe_seed) for j in jobs]
    assert seeds == [(0, 0, 0), (3, 3, 3), (0, 7, 0), (3, 7, 3)]


def test_a_metric_that_is_logged_with_options_is_not_logged_again(tmp_path):
    base = dataclasses.replace(TINY, diagnostics=("test_loss:every=3",))
    (job,) = Sweep(one(base), tmp_path, seeds=(0,), statistic="best").jobs()
    assert job.experiment.diagnostics == ("test_loss:every=3",)


def test_options_for_all_rows_do_not_hide_those_of_a_row():
    asked = STUDIES["novack-digits"]
    assert asked.experiment("GN", dataclasses.replace(asked.base, steps=7)).steps == 7
    with pytest.raises(ValueError, match="row LB sets lr itself"):
        asked.experiment("LB", dataclasses.replace(asked.base, lr=0.7))


@pytest.mark.parametrize("name", ["novack-regularizers", "novack-digits", "novack-sparse", "novack-micro-batch"])
def test_rows_of_novack_state_a_point_of_their_grids(name):
    asked = STUDIES[name]
    if name != "novack-micro-batch":
        regimes = ["SB", "LB", "GN", "FT", "AJ", "UJ", "IG", "EG", "NGD", "Anti-PGD"]
        assert set(regimes) - set(asked.rows) == ({"UJ"} if name == "novack-sparse" else set())
    assert asked.base.validation > 0
    assert asked.base.batch_size[0] >= 8 * asked.experiment("SB").batch_size[0]
    for label, row in asked.rows.items():
        experiment = asked.experiment(label)
        for axis, values in row.tune.items():
            stated = [problems.vary(experiment, axis, text) for text in values]
            assert any(set(e.penalty + e.method_options) == set(experiment.penalty + experiment.method_options)
                       and e.lr == experiment.lr for e in stated), (label, axis)  # fmt: skip


@pytest.mark.parametrize("name", ["smith-batch-rates", "smith-batch-penalties", "smith-n-step"])
def test_the_studies_of_smith_compare_sizes_at_equal_rates_and_at_equal_ratios(name):
    """Three comparisons at least, as their claims need, between each two neighbouring rows."""
    rows = [*STUDIES[name].rows.values()]
    assert len(STUDIES[name].panels) == 2
    for a, b in itertools.pairwise(rows):
        (x,), (y,) = ([{*map(float, values)} for values in row.grid.values()] for row in (a, b))
        scaled = [{round(v / row.per, 6) for v in values} for row, values in ((a, x), (b, y))]
        assert min(len(x & y), len(scaled[0] & scaled[1])) >= 2
        for label, row in STUDIES[name].rows.items():
            e = STUDIES[name].experiment(label)
            assert row.per in (e.batch_size[0], 1 / problems.presets.parse_options("", e.method_options).get("n", 1))


def test_the_penalties_of_smith_are_at_a_rate_of_the_grid():
    asked = STUDIES["smith-rates"]
    assert asked.experiment("penalties").lr in [*map(float, asked.rows["rates"].grid["lr"])]
    assert asked.experiment("penalties").micro_batch == 0  # C_reg is over batches of the size of training


@pytest.mark.parametrize("name", [name for name in STUDIES if name.startswith("novack")])
def test_studies_of_novack_measure_the_norms_that_are_compared(name):
    asked = STUDIES[name]
    (b,) = asked.experiment("SB").batch_size
    for label in asked.rows:
        e = asked.experiment(label)
        options = dict(
            entry if isinstance(entry, tuple) else (entry, {}) for entry in parse_diagnostics(e.diagnostics)[0]
        )
        found = options["microbatch_gradient_norm"].get("micro_batch_size", e.micro_batch)
        assert found == b, label
        assert "batch_gradient_norm" in options
        assert asked.metric in options


def test_settings_are_chosen_by_what_the_study_says(tmp_path):
    assert Sweep(STUDIES["novack-sparse"], tmp_path).select == "validation_loss"
    assert Sweep(STUDIES["novack-sparse"], tmp_path, select="validation_accuracy").select == "validation_accuracy"
    assert Sweep(one(), tmp_path).select == "validation_accuracy"


# -- the table -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two rates and three seeds, in two processes, by the command."""
    folder = tmp_path_factory.mktemp("sweep") / "s"
    options = "--n 24 --label-noise 0 --batch-size 0 --steps 6 --diagnostics loss --dtype float64 --metric test_loss"
    command = ["sweep", "control", *options.split(), "--grid", "lr=0.1,0.05", "--workers", "2", "--out", str(folder)]
    assert main(command) == 0
    return folder, command


def test_the_table_is_what_the_runs_say(swept, capsys):
    folder, command = swept
    with (folder / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["lr"] for row in rows] == ["0.1", "0.05"]
    for row in rows:
        values = [descended(seed, float(row["lr"])) for seed in (0, 1, 2)]
        low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(values), scale=scipy.stats.sem(values))
        found = [float(row[k]) for k in ("mean", "low", "high", "median")]
        assert found == pytest.approx([np.mean(values), low, high, np.median(values)], rel=1e-9)
        assert (row["seeds"], row["diverged"], row["failed"]) == ("3", "0", "0")
    runs = json.loads((folder / "table.json").read_text())["runs"]
    for entry in runs:
        reference = descended(entry["seed"], float(entry["point"]["lr"]))
        assert entry["values"]["test_loss"] == pytest.approx(reference, rel=1e-9)
    assert matplotlib.image.imread(folder / "sweep.png")[..., :3].std() > 0.03
    assert (folder / "sweep.pdf").stat().st_size > 3000
    assert main(command) == 0
    assert f"{float(rows[0]['mean']):.4g} ±" in capsys.readouterr().out


def test_finished_runs_are_not_repeated_and_more_may_be_added(swept, capsys):
    folder, command = swept
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*") if path.name != "error.txt"}
    assert main([*command, "--seeds", "0-3", "--workers", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(folder.glob("*/final.pt"))) == 8
    assert main([*command, "--momentum", "0.5"]) == 2
    assert "holds a run with other settings: momentum = 0.0 there and 0.5 here" in capsys.readouterr().err


def test_best_and_late_values_are_read_from_the_log(tmp_path):
    jobs = plan(one(), TINY, {"": [{}]}, [0], tmp_path, measured=["test_loss"])
    (late,) = run(jobs, Wanted(("test_loss",), "late"))
    (best,) = run(jobs, Wanted(("test_loss", "loss"), "best"))
    (final,) = run(jobs, Wanted(("test_loss",)))
    log = Run(jobs[0].folder).series("test_loss").values
    assert log == pytest.approx([descended(0, 0.1, steps) for steps in range(6)], rel=1e-9)
    assert late.values["test_loss"] == np.median(log[3:])
    assert best.values["test_loss"] == log.min()
    assert final.values["test_loss"] == pytest.approx(descended(0, 0.1), rel=1e-9)


def job(label="", seed=0, **point):
    return Job(label, tuple(point.items()), seed, TINY, None)


def result(value, label="", seed=0, status="finished", **point):
    return Result(job(label, seed, **point), status, {"m": value, "accuracy": value})


def test_the_best_seeds_are_kept():
    results = [result(v, seed=s) for s, v in enumerate([0.5, 0.9, 0.7, 0.8])]
    (high,), (low,) = summarize(results, "accuracy", keep=2), summarize(results, "m", keep=2)
    assert (high.values, high.left_out, high.mean.value) == ({1: 0.9, 3: 0.8}, (0, 2), pytest.approx(0.85))
    assert (low.values, low.left_out) == ({0: 0.5, 2: 0.7}, (1, 3))


def test_runs_without_a_value_are_counted_and_left_out():
    results = [
        result(1.0),
        result(None, seed=1, status="diverged"),
        result(None, seed=2, status="failed"),
        result(3.0, seed=3),
    ]
    (row,) = summarize(results, "m")
    assert (row.values, row.diverged, row.failed, row.median) == ({0: 1.0, 3: 3.0}, (1,), (2,), 2.0)
    (empty,) = summarize(results[1:2], "m")
    assert np.isnan(empty.mean.value)
    assert np.isnan(empty.median)
    assert estimate([4.0]) == Estimate(4.0, -np.inf, np.inf)


def summary(label, values):
    return Summary(label, (), dict(enumerate(values)), estimate(values), float(np.median(values)))


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(5), rng.standard_normal(5)
    found = difference(summary("a", a), dataclasses.replace(summary("b", b), values={i: b[i] for i in (1, 2, 4)}))
    d = (a - b)[[1, 2, 4]]
    low, high = scipy.stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((d.mean(), low, high))


@pytest.mark.parametrize(
    ("relation", "d", "decision"),
    [
        ("above", [2.0, 2.1, 1.9], "holds"),
        ("above", [-2.0, -2.1, -1.9], "does not hold"),
        ("above", [0.01, -0.01, 0.0], "does not hold"),  # less than the margin, for sure
        ("above", [3.0, -2.0, 1.0], "undecided"),
        ("above", [3.0], "undecided"),
        ("reaches", [0.01, -0.01, 0.0], "holds"),
        ("reaches", [2.0, 2.1, 1.9], "holds"),
        ("reaches", [-2.0, -2.1, -1.9], "does not hold"),
        ("reaches", [3.0, -2.0, 1.0], "undecided"),
        ("misses", [-2.0, -2.1, -1.9], "holds"),
        ("misses", [0.01, -0.01, 0.0], "does not hold"),
        ("misses", [3.0, -2.0, 1.0], "undecided"),
    ],
)
def test_sentences_are_decided_by_the_interval_of_the_difference(relation, d, decision):
    asked = dataclasses.replace(one(), sentences=(Sentence("s", relation, ("a", "b")),), margin=0.5)
    b = np.arange(len(d), dtype=float)
    (found,) = judge(asked, [summary("a", b + d), summary("b", b)])
    assert found.decision == decision


def test_a_sentence_about_a_gap_needs_the_gap():
    asked = dataclasses.replace(one(), sentences=(Sentence("s", "reaches", ("x", "a"), ("a", "b")),), margin=0.5)
    a, b, x = np.array([2.0, 2.1, 1.9]), np.zeros(3), np.array([2.0, 2.0, 2.0])
    assert judge(asked, [summary("a", a), summary("b", b), summary("x", x)])[0].decision == "holds"
    (found,) = judge(asked, [summary("a", b), summary("b", a), summary("x", x)])
    assert (found.decision, found.reason) == ("not applicable", "a is not surely above b here")
    assert judge(asked, [summary("a", a), summary("b", b)]) == []


# -- runs that depend on each other, fail, or are killed -------------------------------------------


GRAFTED = {
    "EG": Row({"method": "external_grafting", "lr": 0.2}, external="SB"),
    "SB": Row({"batch_size": (4,), "lr": 0.05, "diagnostics": ("batch_gradient_norm",)}),
}


def test_a_row_takes_its_step_lengths_from_the_run_of_the_same_seed(tmp_path):
    results = conduct(Sweep(one(DIGITS, **GRAFTED), tmp_path, seeds=(0, 1))).results
    assert [r.status for r in results] == ["finished"] * 4
    for seed in (0, 1):
        norms = Run(tmp_path / f"SB_seed={seed}").series("batch_gradient_norm").values
        eg = Run(tmp_path / f"EG_seed={seed}")
        assert eg.config["experiment"]["external"] == str(tmp_path / f"SB_seed={seed}")
        gradients = [record["measurements"]["loss"] for record in eg.records]
        assert len(gradients) == len(norms) == 6
        # ‖Δw‖ = lr ‖g_SB‖, and effective_lr is that over the own gradient's norm
        L, _, _, _ = problems.build(dataclasses.replace(DIGITS, init_seed=seed, batch_size=(0,)))
        first = float(L.gradient(L.params()).norm())
        assert eg.records[0]["effective_lr"] * first == pytest.approx(0.2 * norms[0], rel=1e-5)


def test_one_failing_run_is_reported_and_loses_no_other(tmp_path, capsys):
    rows = {**GRAFTED, "SB": Row({"batch_size": (99,), "diagnostics": ("batch_gradient_norm",)}), "LB": Row()}
    results = {
        r.job.label: r for r in run(Sweep(one(DIGITS, **rows), tmp_path, seeds=(0,)).jobs(), Wanted(("test_loss",)))
    }
    assert results["LB"].status == "finished"
    assert results["SB"].status == "failed"
    assert "batch_size is 99; expected 1 to 24" in results["SB"].reason
    assert "Traceback" in (tmp_path / "SB_seed=0" / "error.txt").read_text()
    assert results["EG"].status == "failed"
    assert "it needs" in results["EG"].reason
    assert "which is failed" in results["EG"].reason
    options = "--n 24 --hidden 4 --steps 3 --seeds 0 --workers 1 --grid batch_size=4,99 --diagnostics loss"
    assert main(["sweep", "edge-of-stability", *options.split(), "--out", str(tmp_path / "s")]) == 1
    out = capsys.readouterr()
    assert "batch_size is 99" in out.err
    assert "0, 1 failed" in out.out


class Bomb:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
def test_a_process_that_dies_takes_no_later_run_with_it(tmp_path):
    good = plan(one(), TINY, {"": [{}]}, [0, 1, 2], tmp_path)
    bad = dataclasses.replace(good[0], point=(("x", Bomb()),), folder=tmp_path / "bad")
    results = list(run([bad, *good], Wanted(("test_loss",)), workers=2))
    assert len(results) == 4
    assert [r.reason[:20] for r in results if r.job is bad] == ["its process or anoth"]
    assert sum(r.status == "finished" for r in results) >= 2  # the one beside it may have gone with it
    again = list(run(good, Wanted(("test_loss",))))
    assert [r.status for r in again] == ["finished"] * 3


def test_diverged_runs_are_no_failures(tmp_path):
    results = list(
        run(Sweep(one(), tmp_path, seeds=(0,), grid={"lr": ("0.1", "1e200")}).jobs(), Wanted(("test_loss",)))
    )
    assert [r.status for r in results] == ["finished", "diverged"]
    assert results[1].values == {"test_loss": None}


def lines_of(log):
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.slow
def test_a_killed_sweep_continues_bit_by_bit(tmp_path):
    options = (
        "--n 64 --hidden 8 --steps 150 --batch-size 8 --diagnostics loss sharpness --seeds 0,1 --checkpoint-every 25"
    )
    command = ["sweep", "edge-of-stability", *options.split(), "--metric", "test_loss", "--workers", "1", "--out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "curvlab", *command, str(killed)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    second = killed / "seed=1" / "measurements.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not lines_of(second) > 40:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "seed=1" / "result.json").exists(), "it was too fast to be killed"
    finished = (killed / "seed=0" / "final.pt").stat().st_mtime_ns
    assert main([*command, str(killed)]) == main([*command, str(whole)]) == 0
    assert (killed / "seed=0" / "final.pt").stat().st_mtime_ns == finished
    for seed in ("seed=0", "seed=1"):
        logs = [
            [(r["step"], {k: m["value"] for k, m in r["measurements"].items()}) for r in Run(place / seed).records]
            for place in (killed, whole)
        ]
        assert logs[0] == logs[1]
        assert len(logs[0]) == 150
    assert (killed / "table.csv").read_text() == (whole / "table.csv").read_text()


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_and_the_same_command_continues(tmp_path):
    options = "--n 64 --hidden 8 --steps 20000 --diagnostics loss --seeds 0,1,2 --metric test_loss --workers 2"
    command = ["sweep", "edge-of-stability", *options.split(), "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "curvlab", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # which a background job ignores
    )
    logs = [tmp_path / f"seed={s}" / "measurements.jsonl" for s in (0, 1)]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not all(log.exists() and log.stat().st_size > 5000 for log in logs):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # to this process alone: it tells its workers
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command continues" in err
    assert "Traceback" not in err
    for log in logs:
        end = Run(log.parent).load("final")
        assert 0 < end["step"] < 20000
        assert not end["complete"]


# -- tuning ----------------------------------------------------------------------------------------


def test_tuning_finds_the_planted_rate_on_validation_data_and_tables_fresh_seeds(tmp_path):
    base = dataclasses.replace(TINY, n=40, validation=16, label_noise=0.1)
    rows = {"slow": Row({"steps": 4}), "fast": Row({"momentum": 0.3}, {"lr": ("0.001",)})}
    sweep = Sweep(
        one(base, **rows), tmp_path, seeds=(0, 1), tune={"lr": ("0.001", "0.2", "1e150")}, tuning_seeds=(7, 8),
        select="validation_loss",
    )  # fmt: skip
    seen = []
    outcome = conduct(sweep, seen.append)
    assert len(seen) == sweep.size == 2 * 3 * 2 + 4
    assert outcome.chosen == {"slow": {"lr": "0.2"}, "fast": {"lr": "0.2"}}
    assert outcome.notes == []  # in the middle of the grid
    assert {(r.job.seed, r.job.experiment.lr) for r in outcome.results} == {(0, 0.2), (1, 0.2)}
    for r in outcome.tuning:  # on examples that no gradient has seen
        if r.job.experiment.lr == 0.2 and r.job.label == "slow":
            (x, y), _ = problems.linear_regression(40, noise=0.1, seed=r.job.seed, dtype=torch.float64)
            x, y, w = x.numpy(), y.numpy(), np.zeros((16, 1))
            for _ in range(4):
                w -= 0.2 * x[:24].T @ (x[:24] @ w - y[:24]) / 24
            assert r.values["validation_loss"] == pytest.approx(0.5 * np.mean((x[24:] @ w - y[24:]) ** 2), rel=1e-9)
    assert json.loads((tmp_path / "table.json").read_text())["chosen"]["slow"] == {"lr": "0.2"}


def test_tuning_external_grafting_takes_the_chosen_small_batches(tmp_path):
    base = dataclasses.replace(DIGITS, validation=8)
    rows = {**GRAFTED, "SB": dataclasses.replace(GRAFTED["SB"], tune={"lr": ("1e-6", "0.1")})}
    sweep = Sweep(one(base, **rows), tmp_path, seeds=(0,), tuning_seeds=(5,), select="validation_loss")
    outcome = conduct(sweep)
    assert outcome.chosen == {"EG": {}, "SB": {"lr": "0.1"}}
    assert "SB: lr=0.1 is at the end of its grid" in outcome.notes
    (eg,) = [r.job for r in outcome.tuning if r.job.label == "EG"]
    assert eg.experiment.external == str(tmp_path / "tuning" / "SB_lr=0.1_seed=5")
    (eg,) = [r.job for r in outcome.results if r.job.label == "EG"]
    assert eg.experiment.external == str(tmp_path / "SB_lr=0.1_seed=0")


def test_a_choice_is_the_best_mean_without_lost_seeds():
    results = [result(v, seed=s, lr=lr) for lr, vs in {"1": (0.5, 0.6), "2": (0.9, 0.7), "3": (0.1, 0.2)}.items()
               for s, v in enumerate(vs)]  # fmt: skip
    assert choose(summarize(results, "accuracy"), "accuracy") == ({"lr": "2"}, [])
    assert choose(summarize(results, "m"), "m") == ({"lr": "3"}, [": lr=3 is at the end of its grid"])
    lost = [*results, result(None, seed=2, status="diverged", lr="2")]
    assert choose(summarize(lost, "accuracy"), "accuracy")[0] == {"lr": "1"}
    with pytest.raises(ValueError, match="every point of row 'a' diverged or failed while tuning"):
        choose(summarize([result(None, "a", status="failed")], "m"), "m")


# -- what is refused -------------------------------------------------------------------------------


REFUSED = {
    "grid": ("an axis of the grid is 'lr'", lambda f: parse_grid(["lr"])),
    "grid_value": ("an axis of the grid is 'lr=0.1,'", lambda f: parse_grid(["lr=0.1,"])),
    "grid_twice": ("something comes twice", lambda f: parse_grid(["lr=0.1,0.1"])),
    "seeds": ("seeds are 'a'; expected whole numbers", lambda f: parse_seeds("a")),
    "seeds_twice": ("seeds are '0,0-1', of which one comes twice", lambda f: parse_seeds("0,0-1")),
    "no_seeds": ("there are no seeds", lambda f: Sweep(one(), f, seeds=())),
    "rows": (r"there are no rows \['x'\]", lambda f: Sweep(one(), f, rows=("x",))),
    "overlap": (r"seeds \[1\] are for tuning and for the table", lambda f: tuned(f, seeds=(0, 1), tuning_seeds=(1, 2))),
    "keep": ("keep is 4 of 3 seeds", lambda f: Sweep(one(), f, keep=4)),
    "tune_without_seeds": ("--tune needs seeds of its own", lambda f: Sweep(one(), f, tune={"lr": ("1",)})),
    "tune_and_grid": ("give one of the two", lambda f: tuned(f, grid={"lr": ("1",)})),
    "nothing_to_tune": ("there is nothing to tune", lambda f: tuned(f, tune={})),
    "select_test": ("settings are not chosen by test_loss", lambda f: tuned(f, select="test_loss")),
    "no_validation": ("needs examples that are set aside", lambda f: tuned(f, base=TINY)),
    "workers": ("workers is 0; expected at least 1 process", lambda f: list(run([], Wanted(("loss",)), workers=0))),
    "unknown_axis": ("there is no setting 'x' to vary", lambda f: Sweep(one(), f, grid={"x": ("1",)}).jobs()),
    "batch_sizes": ("a run of a sweep has one", lambda f: Sweep(one(), f, grid={"batch_size": ("4+8",)}).jobs()),
    "external": ("needs the step lengths of row SB", lambda f: Sweep(one(DIGITS, **GRAFTED), f, rows=("EG",)).jobs()),
    "nothing_to_draw": ("no run of the sweep has a value", lambda f: plots.sweep([], "loss")),
}  # fmt: skip


def tuned(folder, **options):
    given = {"tuning_seeds": (9,), "tune": {"lr": ("0.1",)}, "base": dataclasses.replace(TINY, validation=4)}
    return Sweep(one(), folder, **given | options)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    text, call = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        call(tmp_path)


def test_two_sweeps_do_not_write_to_one_folder(tmp_path):
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being written by another process; wait until it has ended"):
            conduct(Sweep(one(), tmp_path, seeds=(0,)))
    assert conduct(Sweep(one(), tmp_path, seeds=(0,))).results[0].status == "finished"


def test_a_metric_is_one_number(tmp_path):
    (found,) = run(plan(one(), TINY, {"": [{}]}, [0], tmp_path / "a"), Wanted(("layer_gradient_norm",)))
    assert (found.status, found.reason[:32]) == ("failed", "ValueError: layer_gradient_norm ")
    (found,) = run(plan(one(), TINY, {"": [{}]}, [0], tmp_path / "b"), Wanted(("validation_loss",)))
    assert "needs examples that are set aside" in found.reason


# -- figures ---------------------------------------------------------------------------------------


def point(label, values, **settings):
    return dataclasses.replace(summary(label, values), point=tuple(settings.items()))


def test_one_axis_is_a_line_for_each_row():
    found = [point(row, [v, v + 0.1], lr=lr) for row in "ab" for lr, v in (("0.1", 1.0), ("0.2", 2.0), ("3", 3.0))]
    (ax,) = plots.sweep(found, "test_loss", scale=10.0).axes
    lines = [line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in lines] == [[0.1, 0.2, 3.0]] * 2
    assert list(lines[0].get_ydata()) == pytest.approx([10.5, 20.5, 30.5])
    assert ax.get_xscale() == "log"
    assert "test loss" in ax.get_ylabel()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_rows_over_their_own_axes_coincide_where_the_scaled_axis_governs():
    """Losses (lr/b)·seed: straight lines over lr that are one line over lr/b, and seeds that change all points alike."""
    found = [point(f"b={b}", [x * 2.0, x * 8.0], lr=str(b * x)) for b in (1, 4) for x in (0.25, 0.5, 1.0)]
    figure = plots.panels(found, "test_loss", ["lr", "lr/b"], per={"b=1": 1.0, "b=4": 4.0})
    left, right = figure.axes
    x = [[list(line.get_xdata()) for line in ax.lines if line.get_marker() in ("o", "s")] for ax in (left, right)]
    assert x == [[[0.25, 0.5, 1.0], [1.0, 2.0, 4.0]], [[0.25, 0.5, 1.0]] * 2]
    for line in (line for line in right.lines if line.get_marker() in ("o", "s")):
        assert list(line.get_ydata()) == pytest.approx([1.0, 2.0, 4.0])  # geometric means over seeds
    low, high = (line.get_ydata() for line in right.lines[1:3])  # ends of bars: paired, the seeds agree
    assert list(low) == pytest.approx(list(high))
    assert (left.get_ylabel()[:9], right.get_xlabel(), left.get_yscale()) == ("test loss", "lr/b", "log")


PLACED = {
    "LB": Row(),
    "again": Row({"data_seed": 1}),
    "GN-4": Row({"penalty": ("gradient_norm=0.1",), "micro_batch": 4}),
    "GN-24": Row({"penalty": ("gradient_norm=0.2",), "micro_batch": 24}),
}


@pytest.mark.parametrize(("axis", "places"), [("micro_batch", [4.0, 24.0]), ("strength", [0.1, 0.2])])
def test_a_study_may_have_its_penalties_over_an_axis(tmp_path, monkeypatch, axis, places):
    norm = "microbatch_gradient_norm"
    base = dataclasses.replace(TINY, diagnostics=(f"{norm}:micro_batch_size=4",))
    asked = dataclasses.replace(one(base, **PLACED), axis=axis, beside=norm, baselines=("LB",))
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figures: drawn.extend(figures.values()) or [])
    outcome = conduct(Sweep(asked, tmp_path))
    score, norms = drawn[0].axes
    means = [s.mean.value for s in outcome.summaries if s.label != "again"]
    logged = [np.mean([Run(r.job.folder).series(norm).values.mean() for r in outcome.results if r.job.label == row])
              for row in PLACED if row != "again"]  # fmt: skip
    for ax, (level, *over) in ((score, means), (norms, logged)):
        line = next(line for line in ax.lines if list(line.get_xdata()) == places)
        assert list(line.get_ydata()) == pytest.approx(over)
        dashed = next(line for line in ax.lines if line.get_linestyle() == "--")
        assert list(dashed.get_ydata()) == pytest.approx([level] * 2)
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["LB, mean", "GN"]
    assert norms.get_ylabel() == "microbatch gradient norm, over training\nmean and 95%"


def test_nothing_over_an_axis_is_refused():
    with pytest.raises(ValueError, match="nothing to draw of loss"):
        plots.curves({"loss": [summary("a", [1.0])]})


def test_two_axes_are_a_map():
    found = [point("", [x * y, x * y + 2], lr=str(x), n=str(y)) for x in (1, 2) for y in (10, 9, 11)]
    ax = plots.sweep(found, "loss").axes[0]
    assert ax.images[0].get_array().tolist() == [[10, 19], [11, 21], [12, 23]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["9", "10", "11"]


def test_rows_without_axes_are_dots_with_intervals():
    ax = plots.sweep([summary("a", [1.0, 2.0]), summary("b", [3.0, 5.0])], "loss", baselines=["a"]).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert any(list(line.get_xdata()) == [1.5, 1.5] for line in ax.lines)
