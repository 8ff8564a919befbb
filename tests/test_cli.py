"""The command line as a user types it: behavioural; the numbers are those of the library, tested elsewhere."""

import json
import os
import signal
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest

from curvlab import Run
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
    verdicts = {v["claim"]: v for v in json.loads(capsys.readouterr().out)}
    assert {name: v["decision"] for name, v in verdicts.items()} == {
        "edge_of_stability": "holds",
        "interaction_edge": "holds",
        "quadratic_loss_difference": "holds",
    }
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
        (["sweep"], "name what to sweep: a preset, or one of the studies novack-digits"),
        (["sweep", "nonsense"], "there is no preset 'nonsense'; there are novack-digits, edge-of-stability"),
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


@pytest.mark.parametrize("command", [["run"], ["sweep"], ["sweep", "novack-digits"]])
def test_help_answers_without_loading_torch(command):
    code = (
        f"import sys; sys.argv = ['curvlab', *{command}, '--help']\n"
        "try:\n from curvlab.cli import main; main()\n"
        "finally:\n assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--lr" in done.stdout


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
