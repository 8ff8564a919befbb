"""The command line as a user types it: behavioural; the numbers are those of the library, tested elsewhere."""

import configparser
import csv
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import matplotlib.image
import numpy as np
import pytest
import torch

import curvlab as cl
from curvlab import Run, tables
from curvlab.cli import main
from curvlab.problems import Experiment, build, start

SHORT = ["--steps", "12", "--n", "64", "--hidden", "8"]


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The demo, whole: 600 steps with every quantity at every step."""
    folder = tmp_path_factory.mktemp("runs") / "eos"
    assert main(["run", "--out", str(folder)]) == 0
    return folder


def test_the_main_job_shows_the_edge_of_stability(main_job, capsys):
    assert main(["claims", str(main_job), "--json"]) == 0
    decisions = {v["claim"]: v["decision"] for v in json.loads(capsys.readouterr().out)}
    edge = ("edge_of_stability", "interaction_edge", "quadratic_loss_difference")
    assert {name: decisions[name] for name in edge} == dict.fromkeys(edge, "holds")
    assert "does not hold" not in decisions.values()
    run = Run(main_job)
    late = slice(300, None)
    assert 1.0 < np.median(run.series("sharpness").values[late]) * 0.1 < 1.2
    assert 0.97 < np.median(run.series("interaction_sharpness").values[late]) * 0.1 < 1.03


def test_the_main_job_leaves_its_figures_and_its_origin(main_job):
    for name in ("edge_of_stability", "loss_difference"):
        picture = matplotlib.image.imread(main_job / f"{name}.png")
        assert picture[..., :3].std() > 0.05  # something is drawn
        assert (main_job / f"{name}.pdf").stat().st_size > 5000
    config = json.loads((main_job / "config.json").read_text())
    assert config["experiment"]["lr"] == 0.2
    assert {"command", "commit", "versions"} <= set(config["provenance"])
    assert config["training"]["objective"]["device"] == "cpu"


def test_the_end_of_a_run_can_be_measured_again(main_job, capsys):
    assert (
        main(
            [
                "measure",
                str(main_job),
                "--diagnostics",
                "loss",
                "interaction_sharpness",
                "--batch-size",
                "8",
                "32",
                "--json",
            ]
        )
        == 0
    )
    out = json.loads(capsys.readouterr().out)
    last = Run(main_job).series("loss")
    assert out["step"] == last.steps[-1] + 1 == 600  # the last step was taken after the last measurement
    L, _, _, _ = build(Experiment())
    final = Run(main_job).load("final")["params"]
    assert out["measurements"]["loss"]["value"] == pytest.approx(float(L.value(final)), rel=1e-6)
    assert out["measurements"]["interaction_sharpness"]["axis"] == ["batch_size", [8, 32]]
    assert main(["measure", str(main_job), "--batch-size", "8", "32"]) == 0
    assert "batch_size=32" in capsys.readouterr().out


@pytest.mark.slow
def test_the_surroundings_of_the_end_are_drawn(tmp_path, capsys):
    run = tmp_path / "run"
    main(["run", *SHORT, "--out", str(run)])
    capsys.readouterr()
    assert main(["landscape", str(run), "--points", "5", "--radius", "0.5"]) == 0
    names = ["landscape_lines.png", "landscape_q1_q2.png", "landscape_q1_step.png"]
    assert capsys.readouterr().out.splitlines() == [str(run / name) for name in names]
    asked = ["--diagnostics", "hessian_eigenvalues", "layer_gradient_norm", "--figure", str(run / "measured.png")]
    assert main(["measure", str(run), *asked]) == 0
    assert "index=1" in capsys.readouterr().out
    for name in [*names, "measured.png"]:
        assert matplotlib.image.imread(run / name)[..., :3].std() > 0.05


@pytest.mark.slow
def test_several_batch_sizes_are_several_runs(tmp_path, capsys):
    folder = tmp_path / "iir"
    assert main(["run", "sgd-iir", "--batch-size", "4", "16", "--out", str(folder), *SHORT]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["b16", "b4", "batch_sizes.pdf", "batch_sizes.png"]
    assert main(["claims", str(folder)]) == 0
    assert "iir" in capsys.readouterr().out
    assert main(["plot", str(folder), "--out", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "batch_sizes.png").exists()


def test_every_setting_of_a_preset_is_an_option(tmp_path):
    options = (
        "--data linear_regression --model linear --label-noise 0.5 --lr 0.05 --momentum 0.5 --batch-size 4 --replacement "
        "--every 3 --init-seed 1 --data-seed 2 --probe-seed 3 --diagnostics loss sharpness --dtype float64 --device cpu "
        "--steps 9 --n 32"
    )
    assert main(["run", "control", "--out", str(tmp_path / "r"), *options.split()]) == 0
    run = Run(tmp_path / "r")
    assert [record["step"] for record in run.records] == [0, 3, 6]
    assert run.names == ["loss", "sharpness"]
    assert run.config["training"]["objective"]["dtype"] == "torch.float64"
    assert run.config["training"]["optimizer"]["momentum"] == 0.5
    assert run.config["training"]["replacement"] is True
    assert run.config["training"]["probe_seed"] == 3


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers(tmp_path):
    logs = []
    for name in ("a", "b"):
        assert main(["run", "--out", str(tmp_path / name), "--batch-size", "8", *SHORT]) == 0
        records = Run(tmp_path / name).records
        logs.append([{k: m["value"] for k, m in record["measurements"].items()} for record in records])
    assert logs[0] == logs[1]


def test_penalties_and_methods_are_options(tmp_path):
    asked = ["--penalty", "gradient_norm=0.01", "--micro-batch", "16", "--method", "iterative_grafting"]
    asked += ["--diagnostics", "loss"]
    assert main(["run", *asked, *SHORT, "--out", str(tmp_path / "r")]) == 0
    run = Run(tmp_path / "r")
    assert run.config["training"]["penalties"] == [[0.01, "gradient_norm_penalty", {}]]
    assert run.config["training"]["micro_batch_size"] == 16
    assert run.config["training"]["optimizer"]["name"] == "IterativeGrafting"
    assert run.names == ["loss", "gradient_norm_penalty"]
    assert main(["measure", str(tmp_path / "r"), "--diagnostics", "loss"]) == 0


def test_an_interrupted_run_goes_on(tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ["--batch-size", "8", "--diagnostics", "loss", "sharpness", *SHORT]
    assert main(["run", *options, "--out", str(whole)]) == 0
    training = start(Experiment(batch_size=(8,), diagnostics=("loss", "sharpness"), steps=12, n=64, hidden=(8,)), 8,
                     run=stopped, checkpoint_every=5)  # fmt: skip
    for at in training.snapshots:
        if at.step == 7:
            break
    training.snapshots.close()
    assert main(["run", *options, "--out", str(stopped), "--resume"]) == 0
    logs = [
        [(r["step"], {k: m["value"] for k, m in r["measurements"].items()}) for r in Run(p).records]
        for p in (whole, stopped)
    ]
    assert logs[0] == logs[1]
    assert main(["run", *options, "--resume"]) == 2
    assert "give its folder by --out" in capsys.readouterr().err


def test_a_sweep_is_one_command(tmp_path, capsys):
    options = ["--diagnostics", "loss", "--seeds", "0,1", "--workers", "1", "--out", str(tmp_path / "s"), *SHORT]
    assert main(["sweep", "edge-of-stability", "--grid", "lr=0.05,0.1", "batch_size=8,32", *options]) == 0
    out = capsys.readouterr().out
    assert "lr    batch_size  seeds  test_accuracy" in out
    assert f"figure: {tmp_path / 's' / 'sweep.png'}" in out
    assert main(["plot", str(tmp_path / "s"), "--out", str(tmp_path / "figures")]) == 0  # its runs are runs like others
    assert main(["claims", str(tmp_path / "s" / "lr=0.1_batch_size=8_seed=1")]) == 0


def test_a_study_ends_in_sentences(tmp_path, capsys):
    options = ["--rows", "SB", "LB", "EG", "--steps", "4", "--seeds", "0,1", "--workers", "1"]
    assert main(["sweep", "novack-digits", *options, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines() if line[:2] in ("SB", "LB", "EG")]
    assert rows == ["SB", "LB", "EG"]
    for part in ("minus LB", "minus SB", "in the paper", "92.33", "small batches generalize better than large ones"):
        assert part in out


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("edge-of-stability", "novack-digits", "control", "interaction_sharpness", "test_accuracy", "iir",
                 "gradient_norm_penalty", "iterative_grafting", "wrn_16_4", "fashion_mnist"):  # fmt: skip
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "there is no command 'nonsense'"),
        (["run", "nonsense"], "there is no preset 'nonsense'"),
        (["claims", "/nowhere"], "holds no run"),
        (["measure", "/nowhere"], "holds no run"),
        (["plot"], "name at least one run"),
        (["plot", "/nowhere", "--quantities", "loss"], "--quantities says what --bands shows; give both"),
        (["export"], "name at least one run"),
        (["export", "/nowhere"], "holds no run"),
        (["watch", "/nowhere"], "/nowhere holds no run; to wait for one that is about to start, add --wait"),
        (["watch", "/nowhere", "--interval", "0"], "--interval is 0.0; expected a number of seconds above 0"),
        (["sweep"], "name what to sweep: a preset, or one of the studies novack-regularizers"),
        (["sweep", "nonsense"], "there is no preset 'nonsense'; there are novack-regularizers, novack-sparse"),
        (["sweep", "control", "--seeds", "a"], "seeds are 'a'"),
        (["sweep", "control", "--grid", "colour=red"], "there is no setting 'colour' to vary"),
        (["sweep", "novack-digits", "--tuning-seeds", "0,9"], "seeds [0] are for tuning and for the table"),
        (["run", "--method", "adagrad"], "there is no method 'adagrad'"),
        (["run", "--penalty", "gradient_norm"], "expected name=strength"),
        (["run", "--method", "external_grafting"], "--external RUN"),
    ],
)
def test_mistakes_get_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_run_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "measurements.jsonl").write_text("precious")
    assert main(["run", "--out", str(tmp_path / "r"), *SHORT]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert (tmp_path / "r" / "measurements.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["run"], "--lr"), (["sweep"], "--lr"), (["sweep", "novack-digits"], "--lr"), (["measure"], "--checkpoint"),
        (["watch"], "--once"), (["export"], "--wide"), (["plot"], "--bands"),
    ],
)  # fmt: skip
def test_help_answers_without_loading_torch(command, option):
    code = (
        f"import sys; sys.argv = ['curvlab', *{command}, '--help']\n"
        "try:\n from curvlab.cli import main; main()\n"
        "finally:\n assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


@pytest.mark.slow
def test_ctrl_c_leaves_a_readable_run(tmp_path):
    folder = tmp_path / "r"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "curvlab", "run", "--out", str(folder), "--steps", "100000", "--n", "64", "--hidden", "8"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job ignores
    )  # fmt: skip
    log = folder / "measurements.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size > 20000):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    run = Run(folder)
    assert len(run.records) >= 5
    final = run.load("final")
    assert final["step"] >= run.records[-1]["step"]
    assert "verdict" in out


def test_seeds_are_drawn_together_and_exported(tmp_path, capsys):
    for seed in range(2):
        asked = Experiment(
            diagnostics=("loss", "sharpness"), steps=12, n=64, hidden=(8,), init_seed=seed, data_seed=seed
        )
        list(start(asked, 16, run=tmp_path / "runs" / "deep" / str(seed)).snapshots)
    assert main(["plot", str(tmp_path / "runs"), "--bands", "--quantities", "sharpness"]) == 0
    figure = tmp_path / "runs" / "deep" / "bands.png"
    assert capsys.readouterr().out == f"{figure}\n"
    assert matplotlib.image.imread(figure)[..., :3].std() > 0.05
    assert main(["export", str(tmp_path / "runs"), "--wide"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    runs = [Run(tmp_path / "runs" / "deep" / str(seed)) for seed in range(2)]
    assert [float(row["sharpness"]) for row in rows] == [v for run in runs for v in run.series("sharpness").values]
    assert main(["export", str(runs[0].path), "--out", str(tmp_path / "all.csv")]) == 0
    text = io.StringIO()
    tables.to_csv(runs[0], text)
    assert (tmp_path / "all.csv").read_text() == text.getvalue()


def test_what_has_no_columns_is_named(tmp_path, capsys):
    run = Run.create(tmp_path / "r", {})
    for step in range(2):
        density = {"value": [1.0], "error": 0.0, "kind": "exact", "axis": ["eigenvalue", [float(step)]]}
        run.append({"step": step, "measurements": {"hessian_density": density}})
    assert main(["export", str(run.path), "--wide"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "run,step"
    assert "left out hessian_density, whose coordinates change from step to step" in err


def test_a_reader_that_leaves_is_no_error(tmp_path):
    run = Run.create(tmp_path / "r", {})
    for step in range(2000):
        run.append({"step": step, "measurements": {"loss": {"value": 1.0 / (1 + step), "error": 0.0, "kind": "exact"}}})
    for command in (["export", str(run.path)], ["watch", str(run.path), "--interval", "0.05"], ["list"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "curvlab", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if command[0] != "list":
            process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


class TestWatch:
    """On logs that grow while they are watched."""

    CONFIG: ClassVar = {
        "training": {"optimizer": {"name": "SGD", "momentum": 0.0}, "batch_size": 32, "batches": {"steps": 50}}
    }

    def record(self, step, **values):
        curve = {
            "value": [1.0, 8.0],
            "error": [0.1, 0.1],
            "kind": "sem",
            "df": [3.0, 3.0],
            "axis": ["batch_size", [8, 32]],
        }
        measured = {name: {"value": v, "error": 0.0, "kind": "exact"} for name, v in values.items()}
        if "loss" in values:
            measured["instability"] = curve
        return {"step": step, "lr": 0.2, "threshold": 10.0, "seconds": 0.5, "measurements": measured}

    def finish(self, run):
        run.close()
        (run.path / "final.pt").write_bytes(b"")

    def test_a_line_for_each_record_until_the_end(self, tmp_path, capsys):
        run = Run.create(tmp_path / "r", self.CONFIG)
        run.append(self.record(0, loss=2.0, sharpness=5.0))

        def train():
            time.sleep(0.15)
            run.append(self.record(1, loss=1.0, sharpness=None))
            half = json.dumps(self.record(2, loss=0.5, sharpness=12.5)) + "\n"
            for part in (half[:40], half[40:]):  # as seen by a reader in between
                with (run.path / "measurements.jsonl").open("a") as stream:
                    stream.write(part)
                time.sleep(0.15)
            run.append(self.record(4, gradient_norm=1.0))
            self.finish(run)

        thread = threading.Thread(target=train)
        thread.start()
        assert main(["watch", str(run.path), "--interval", "0.02"]) == 0
        thread.join()
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        head = ["step", "loss", "sharpness", "(of", "2/lr)", "instability", "(of", "2/lr)", "seconds"]
        assert rows[0] == head
        assert rows[1] == ["0", "2", "5", "(0.50)", "8", "(0.80)", "0.5"]
        assert rows[2] == ["1", "1", "-", "8", "(0.80)", "0.5"]
        assert rows[3] == ["2", "0.5", "12.5", "(1.25)", "8", "(0.80)", "0.5"]
        assert rows[4] == [*head[:-1], "gradient_norm", "seconds"]  # which is new
        assert rows[5] == ["4", "1", "0.5"]
        text = [" ".join(row) for row in rows]
        assert text[6:8] == ["", f"step 4 of 50, ended; 4 records, 2.0 s of measuring ({run.path})"]
        assert text[8] == "loss █▃▁ 0.5 0.5 to 2"
        assert text[9] == "sharpness (of 2/lr) ▁█ 12.5 (1.25) 5 to 12.5"

    def test_once_says_where_a_run_stands(self, tmp_path, capsys):
        run = Run.create(tmp_path / "r", self.CONFIG)
        assert main(["watch", str(run.path), "--once"]) == 0
        assert capsys.readouterr().out == f"no records yet ({run.path})\n"
        run.append(self.record(0, loss=2.0, sharpness=5.0))
        with (run.path / "measurements.jsonl").open("a") as stream:
            stream.write('{"step": 1, "mea')
        assert main(["watch", str(run.path), "--once", "--quantities", "sharpness"]) == 0
        out = capsys.readouterr().out
        assert "step 0 of 50, last record 0.0 s ago; 1 record, 0.5 s of measuring" in out
        assert "sharpness (of 2/lr)  ▁  5 (0.50)" in out
        assert "loss" not in out
        assert main(["watch", str(run.path), "--once", "--quantities", "sharpnes"]) == 2
        assert "has no sharpnes; it has loss, sharpness, instability, lr, threshold, seconds" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("optimizer", "threshold", "expected"),
        [
            ({"name": "SGD"}, None, {"sharpness (of 2/lr)": "5 (0.50)", "interaction_sharpness (of 2ρ_b/lr)": "2 (0.80)"}),
            ({"name": "SGD", "momentum": 0.9}, 19.0,
             {"sharpness (of threshold)": "5 (0.26)", "interaction_sharpness (of ρ_b·threshold)": "2 (0.42)"}),
            ({"name": "Adam"}, 20.0,
             {"sharpness": "5", "preconditioned_sharpness (of threshold)": "8 (0.40)", "interaction_sharpness": "2"}),
        ],
    )  # fmt: skip
    def test_each_curvature_has_the_threshold_of_the_optimizer(self, tmp_path, capsys, optimizer, threshold, expected):
        run = Run.create(tmp_path / "r", {"training": {"optimizer": optimizer}})
        names = {
            "sharpness": 5.0,
            "preconditioned_sharpness": 8.0,
            "interaction_sharpness": 2.0,
            "gradient_concentration": 0.25,
        }
        record = {
            "step": 0,
            "lr": 0.2,
            "measurements": {n: {"value": v, "error": 0, "kind": "exact"} for n, v in names.items()},
        }
        run.append(record | ({"threshold": threshold} if threshold else {}))
        assert main(["watch", str(run.path), "--once"]) == 0
        rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
        found = {
            row[0].strip(): [cell.strip() for cell in row if cell.strip()][2] for row in rows if "▁" in "".join(row)
        }
        assert expected.items() <= found.items()

    def test_a_run_that_goes_back_is_read_again(self, tmp_path, capsys):
        run = Run.create(tmp_path / "r", self.CONFIG)
        for step in range(6):
            run.append(self.record(step, loss=1.0 + step))
        (run.path / "final.pt").write_bytes(b"")
        os.utime(run.path / "final.pt", (1, 1))  # of the interrupted run: long before the log was last written

        def train():
            time.sleep(0.15)
            run.truncate(len((run.path / "measurements.jsonl").read_bytes()) // 3)
            run.append(self.record(2, loss=9.0))
            time.sleep(0.15)
            self.finish(run)

        thread = threading.Thread(target=train)
        thread.start()
        assert main(["watch", str(run.path), "--interval", "0.02"]) == 0
        thread.join()
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [row[:2] for row in rows if row and row[0].isdigit()] == [[str(t), f"{1 + t}"] for t in range(6)] + [
            ["2", "9"]
        ]

    def test_a_log_of_something_else_is_refused(self, tmp_path, capsys):
        run = Run.create(tmp_path / "r", self.CONFIG)
        (run.path / "measurements.jsonl").write_text("this\nthat\n")
        assert main(["watch", str(run.path)]) == 2
        assert "it is damaged, or not written by a run: take the line out" in capsys.readouterr().err

    def test_a_folder_of_runs_is_named(self, tmp_path, capsys):
        Run.create(tmp_path / "r", self.CONFIG)
        assert main(["watch", str(tmp_path)]) == 2
        assert f"holds no run; watch one of {tmp_path / 'r'}" in capsys.readouterr().err

    def test_runs_of_a_monitor_and_of_train_are_followed_alike(self, tmp_path, capsys):
        x, y = torch.randn(16, 3), torch.randn(16, 1)
        for name in ("monitor", "train"):
            model = torch.nn.Linear(3, 1)
            sgd = torch.optim.SGD(model.parameters(), lr=0.05)
            L = cl.Objective(model, "squared_error", (x, y))
            if name == "train":
                list(
                    cl.train(
                        L, sgd, cl.Batches(16, 16, steps=3), diagnostics=["loss", "sharpness"], run=tmp_path / name
                    )
                )
            else:
                options = {"optimizer": sgd, "run": tmp_path / name, "announce": None}
                with cl.Monitor(L, ["loss", "sharpness"], **options) as monitor:
                    for step in range(3):
                        monitor(step, batch_loss=1.0)
            assert main(["watch", str(tmp_path / name)]) == 0
            lines = capsys.readouterr().out.splitlines()
            assert lines[0].split() == ["step", "loss", "sharpness", "(of", "2/lr)", "seconds"]
            assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
            assert "ended; 3 records" in lines[5]

    def start(self, folder, *options, **streams):
        return subprocess.Popen(
            [sys.executable, "-m", "curvlab", "watch", str(folder), "--interval", "0.05", *options], text=True, **streams,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "60", "LINES": "30"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    def test_it_waits_for_a_run_and_ends_with_ctrl_c(self, tmp_path):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.start(tmp_path / "r", "--wait", **streams)
        assert "waiting for a run" in process.stderr.readline()
        Run.create(tmp_path / "r", self.CONFIG).append(self.record(0, loss=2.0))
        assert process.stdout.readline().split()[:2] == ["step", "loss"]
        assert process.stdout.readline().split()[:2] == ["0", "2"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")
        assert "step 0 of 50, last record" in out
        waiting = self.start(tmp_path / "other", "--wait", **streams)
        waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        assert (waiting.wait(30), waiting.stderr.read()) == (0, "")
        waiting.stdout.close()
        waiting.stderr.close()

    def test_on_a_terminal_it_draws_over_itself(self, tmp_path):
        run = Run.create(tmp_path / "r", self.CONFIG)
        run.append(self.record(0, loss=2.0, sharpness=5.0))
        ours, theirs = pty.openpty()
        process = self.start(run.path, stdin=theirs, stdout=theirs, stderr=subprocess.STDOUT)
        os.close(theirs)
        seen = self.until(ours, "8 to 8")
        run.append(self.record(1, loss=1.0, sharpness=15.0))
        seen = self.until(ours, "15 (1.50)")
        assert "\x1b[" in seen
        assert "F\x1b[J" in seen
        self.finish(run)
        seen = self.until(ours, "ended")
        assert process.wait(30) == 0
        assert max(map(len, seen.replace("\x1b[J", "").split("\r\n"))) <= 70
        os.close(ours)

    def until(self, terminal, text):
        seen, deadline = b"", time.monotonic() + 30
        while text.encode() not in seen and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 4096)
        assert text.encode() in seen, seen
        return seen.decode(errors="replace")


def test_the_citation_states_what_the_package_does():
    root = Path(__file__).parents[1]
    cited = dict(line.split(": ", 1) for line in (root / "CITATION.cff").read_text().splitlines() if ": " in line)
    metadata = configparser.ConfigParser()
    metadata.read(root / "setup.cfg")
    assert cited["cff-version"] == "1.2.0"
    assert cited["  - name"] == metadata["metadata"]["author"]
    for ours, theirs in (
        ("title", "name"),
        ("version", "version"),
        ("license", "license"),
        ("abstract", "description"),
    ):
        assert cited[ours] == metadata["metadata"][theirs]


@pytest.mark.slow
def test_engines_are_timed_at_the_end_of_a_run_and_on_a_named_problem(tmp_path, capsys):
    assert main(["run", *SHORT, "--out", str(tmp_path / "r")]) == 0
    capsys.readouterr()
    figure = tmp_path / "bars.png"
    asked = ["--rounds", "1", "--engines", "graph", "double_backward"]
    assert main(["bench", "hvp", str(tmp_path / "r"), *asked, "--figure", str(figure)]) == 0
    assert f"{tmp_path / 'r'}, step 12, N = 64" in capsys.readouterr().out
    assert matplotlib.image.imread(figure)[..., :3].std() > 0.05
    assert main(["bench", "hvp", "--problem", "mlp", "--n", "16", "--dtype", "float64", *asked]) == 0
    assert capsys.readouterr().out.startswith("mlp, N = 16, P = 26122\nengine")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "bench measures hvp"),
        (["hvp"], "takes a run, a model or a problem"),
        (["hvp", "--problem", "mpl"], "problem is 'mpl', expected one of mlp, mlp_300k, cnn6, resnet18, gpt, vit"),
        (["hvp", "--problem", "mlp", "--loss", "token"], "leave out loss"),
        (["hvp", "r", "--n", "3"], "--n is of --problem"),
        (["hvp", "--problem", "mlp", "--engines", "fast"], r"engines are ('fast',); expected some of ('graph'"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
