"""Section 6 of the failure modes: the user's files, a test for each row from F64 to F76.

Behaviour only: what is readable after a kill, what is refused, what is run (nothing). More of the same at length is in
test_survival.py and test_hostile.py.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_problems import _write_cifar10, _write_stl10
from test_survival import killed_after, training

import curvlab as cl
from curvlab import files, measurement, runs
from curvlab.cli import main
from curvlab.measurement import Measurement
from curvlab.problems import formats, load
from curvlab.problems.presets import Experiment, from_config, vary
from curvlab.problems.rows import Row, Study
from curvlab.runs import Run
from curvlab.sweep.plan import plan

ROOT = Path(cl.__file__).parent.parent


def record(step: int, **values) -> dict:
    return {"step": step, "measurements": {name: m.to_dict() for name, m in values.items()}}


def log_of(path: Path) -> Path:
    return path / runs.LOG


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path / "run", {"name": "a test"})


def in_another_process(code: str, *arguments: object, **options) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, text=True, **options)


def test_F64_a_file_that_is_rewritten_is_whole_after_every_kill(tmp_path):
    """As config.json, result.json, table.json and the report are."""
    file, rng = tmp_path / "table.json", random.Random(0)
    files.write_whole(file, b'{"text": "a"}')

    def rewrite():
        while True:
            for letter in "abc":
                files.write_whole(file, json.dumps({"text": letter * 300_000}).encode())

    for _ in range(10):
        assert killed_after(rng.uniform(0, 0.02), rewrite)
        assert set(json.loads(file.read_text())["text"]) <= set("abc")
    files.write_whole(file, b"{}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]  # nothing is left of those that were killed


def test_F64_files_are_rewritten_in_one_place_only():
    """No other code of the library opens a file for writing, but for tables that a user names."""
    writes = re.compile(r'write_text\(|write_bytes\(|open\([^)]*"[wax]|(?<!of )torch\.save\((?!model)')
    package = ROOT / "curvlab"
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if writes.search(file.read_text())}
    assert found <= {"files.py", "runs.py", "tables.py", "docs/quantity.py", "docs/figures.py"}


def test_F65_a_checkpoint_is_whole_after_every_kill(run):
    rng = random.Random(1)
    run.save("checkpoint", {"step": 0, "w": torch.zeros(50_000)})
    run.close()

    def save():
        again = Run.resume(run.path, {"name": "a test"})
        for step in range(1, 10**6):
            again.save("checkpoint", {"step": step, "w": torch.full((50_000,), float(step))})

    for _ in range(10):
        assert killed_after(rng.uniform(0, 0.03), save)
        state = run.load("checkpoint")
        assert torch.equal(state["w"], torch.full((50_000,), float(state["step"])))


def test_F66_a_kill_loses_nothing_that_was_appended(tmp_path):
    code = """
        import sys
        from curvlab.runs import Run
        run = Run.create(sys.argv[1], {})
        step = 0
        while True:
            run.append({"step": step, "measurements": {"loss": {"value": step, "error": 0.0, "kind": "exact"}},
                        "padding": "x" * 3000})
            print(step, flush=True)
            step += 1
    """
    path = tmp_path / "killed"
    child = in_another_process(code, path, stdout=subprocess.PIPE)
    for line in child.stdout:
        if int(line) >= 300:
            break
    child.send_signal(signal.SIGKILL)
    said = [int(line) for line in child.stdout.read().split("\n")[:-1]]
    child.wait()
    assert child.returncode == -signal.SIGKILL
    lines = log_of(path).read_bytes().split(b"\n")
    assert lines[-1] == b""  # one write, so no line is torn even by this kill
    steps = Run(path).series("loss").steps.tolist()
    assert steps == list(range(len(steps)))
    assert len(steps) > (said[-1] if said else 300)


@pytest.mark.parametrize("torn", [b'{"step":2,"meas', b"\xce", b"{"])
def test_F66_a_torn_last_line_is_left_out_with_a_warning(run, torn):
    for step in range(2):
        run.append(record(step, loss=Measurement(1.0)))
    with open(log_of(run.path), "ab") as file:
        file.write(torn)
    reader = Run(run.path)
    with pytest.warns(UserWarning, match=r"measurements.jsonl ends in an incomplete line, which is left out"):
        assert len(reader.records) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, of Linux")
def test_F67_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    """The system's own ENOSPC, where a checkpoint is about to be written over the last one."""
    run = Run.create(tmp_path / "run", {})
    run.save("state", {"step": 1})
    opened = os.open

    def full(file, flags, *mode):
        return opened("/dev/full" if str(file).endswith(".tmp") else file, flags & ~os.O_EXCL, *mode)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="No space left"):
        run.save("state", {"step": 2})
    assert run.load("state") == {"step": 1}


def test_F68_two_processes_do_not_write_one_run(tmp_path, capfd):
    folder = tmp_path / "run"
    run = Run.create(folder, {"training": {}})
    assert (folder / files.LOCK).read_text().split() == [str(os.getpid()), socket.gethostname()]
    code = f"from curvlab.runs import Run; Run.resume({str(folder)!r}, {{'training': {{}}}})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert other.returncode == 1
    assert (
        f"{folder} is being written by process {os.getpid()} on {socket.gethostname()}; wait until it has ended"
        in other.stderr
    )
    run.append({"step": 0, "measurements": {}})
    run.close()
    assert (folder / files.LOCK).read_bytes() == b""
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
    # that one ended without closing the run
    capfd.readouterr()
    again = Run.resume(folder, {"training": {}})
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(f"on {socket.gethostname()} died while it wrote a run; taken over")
    assert len(again.records) == 1


class _Command:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval, np.load])
def test_F69_a_pickle_that_runs_something_is_refused_and_not_run(function, tmp_path):
    target = str(tmp_path / "ran")
    argument = f"__import__('os').mkdir({target!r})" if function is eval else target
    evil = pickle.dumps({"data": _Command(function, argument)}, protocol=2)
    (tmp_path / "evil").write_bytes(evil)
    message = rf"evil is not a pickle of arrays \(it names .*{function.__name__}, which was not run\)"
    with pytest.raises(ValueError, match=message):
        formats.read_pickle(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()
    if function is not np.load:  # it would have run
        pickle.loads(evil)
        assert (tmp_path / "ran").exists()


def test_F69_a_genuine_batch_is_read_and_another_shape_is_not(tmp_path):
    x, y = np.arange(13 * 3072, dtype=np.uint8).reshape(13, 3, 32, 32), np.arange(13) % 10
    _write_cifar10(tmp_path, (x, y), (x[:6], y[:6]))
    assert torch.equal(load("cifar10", folder=tmp_path, standardize="none")[1][1], torch.as_tensor(y[:6]))


class Trap:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CURVLAB_TRAP"],))


def test_F70_nothing_is_executed_when_a_checkpoint_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CURVLAB_TRAP", str(tmp_path / "sprung"))
    buffer = io.BytesIO()
    torch.save({"w": Trap()}, buffer)
    (run.path / "trap.pt").write_bytes(buffer.getvalue())
    assert zipfile.is_zipfile(run.path / "trap.pt")
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        run.load("trap")
    (run.path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"plain\.pt is damaged"):
        run.load("plain")
    assert not (tmp_path / "sprung").exists()


def test_F70_no_file_is_loaded_in_a_way_that_runs_it():
    for file in (ROOT / "curvlab").rglob("*.py"):
        text = file.read_text()
        assert "weights_only=False" not in text, file
        assert "allow_pickle=True" not in text, file
        assert text.count("torch.load(") == text.count("weights_only=True") + text.count("torch.load notices"), file
        assert "pickle.load" not in text, file


def test_F71_no_archive_is_unpacked_and_one_in_the_place_of_data_is_refused(tmp_path):
    for file in (ROOT / "curvlab").rglob("*.py"):
        assert not {"tarfile", "extractall", "shutil.unpack_archive"} & set(file.read_text().split()), file
    folder, outside = tmp_path / "data" / "cifar-10-batches-py", tmp_path / "outside"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "data_batch_1", "w:gz") as tar:
        entry = tarfile.TarInfo("../../outside")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"evil"))
    with pytest.raises(ValueError, match=r"data_batch_1 is not a pickle of arrays .*get the file again"):
        load("cifar10", folder=tmp_path / "data")
    assert not outside.exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_F72_a_damaged_checkpoint_is_refused(run, damage):
    file = run.save("state", {"w": torch.randn(1000)})
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(
        {"truncated": content[: len(content) // 2], "flipped": content, "empty": b"", "text": b"hello"}[damage]
    )
    with pytest.raises(
        ValueError, match=r"state.pt is damaged, or was not written by torch.save .*; save it, or run, again"
    ):
        run.load("state")


def test_F72_images_without_their_labels_are_refused(tmp_path):
    """STL-10 cut after a whole image, which a length alone does not show."""
    x, y = np.zeros((13, 3, 96, 96), np.uint8), np.arange(13) % 10
    _write_stl10(tmp_path, (x, y), (x, y))
    file = tmp_path / "stl10_binary" / "train_X.bin"
    file.write_bytes(file.read_bytes()[: 7 * 3 * 96 * 96])
    with pytest.raises(ValueError, match=r"train_X.bin holds 7 images of uint8 and 13 labels from 0 to 9"):
        load("stl10", folder=tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning-rate", "1"], "learning-rate"), (["--step", "3"], "step"), (["--lr", "1e-3x"], "1e-3x"),
        (["--steps", "no"], "no"), (["--steps", "1.5"], "1.5"),
    ],
)  # fmt: skip
def test_F73_settings_are_checked_and_never_abbreviated(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert message in "".join(capsys.readouterr())
    assert not (tmp_path / "run").exists()


def test_F73_numbers_are_numbers_and_text_is_text(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "secret")
    e = vary(vary(vary(Experiment(), "lr", "1e-3"), "steps", "010"), "activation", "${oc.env:SECRET}")
    assert (e.lr, e.steps, e.activation) == (0.001, 10, "${oc.env:SECRET}")
    config = {"experiment": dataclasses.asdict(dataclasses.replace(e, activation="no"))}
    made = Run.create(tmp_path / "run", config)
    assert from_config(Run(made.path).config)[0].activation == "no"
    assert "secret" not in (made.path / runs.CONFIG).read_text()
    for odd, message in (
        ({"_target_": "os.system"}, r"differs in the settings \['_target_'\]"), ({"lr": "1e-3"}, "lr = 1e-3"),
        ({"hidden": ["a"]}, "other types .*hidden"), ({"center": 1}, "center = 1"), ({"steps": 2.5}, "steps = 2.5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            from_config({"experiment": config["experiment"] | odd})
    text = (made.path / runs.CONFIG).read_text()
    (made.path / runs.CONFIG).write_text(text.replace('"lr": 0.001', '"lr": 0.001, "lr": 0.5'))
    with pytest.raises(ValueError, match=r"config\.json is not readable JSON of a run \(it has 'lr' twice\)"):
        Run(made.path)


def test_F74_names_do_not_lead_out_of_a_folder(run, tmp_path):
    for name in ("../x", "../../x", "/x", "a/../../x", ".."):
        with pytest.raises(
            ValueError, match=r"expected letters, digits and \. = \+ - _, such as 'final', and no folder"
        ):
            run.save(name, {})
        with pytest.raises(ValueError, match="the name is"):
            run.load(name)
    study = Study("a test", Experiment(batch_size=(4,)), {"../../x": Row()})
    for job in plan(study, study.base, {"../../x": [{"activation": "../../../y"}]}, [0], tmp_path / "sweep"):
        assert job.folder.resolve().parent == (tmp_path / "sweep").resolve()


def test_F75_what_is_not_finite_is_null_with_a_reason(tmp_path):
    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    list(training(tmp_path / "run", loss=lambda outputs, _: outputs.square().sum(1).square(), lr=1e9, steps=200))
    lines = [json.loads(line, parse_constant=refuse) for line in log_of(tmp_path / "run").read_text().splitlines()]
    lost = [m for line in lines for m in line["measurements"].values() if m["value"] is None]
    assert lost
    assert all(m["note"] for m in lost)
    series = Run(tmp_path / "run").series("hessian_trace")
    assert np.isnan(series.values[-1])
    assert series.notes[series.steps[-1]]
    run = Run.create(tmp_path / "other", {"lr": float("nan")})
    run.append(record(0, a=Measurement(float("inf")), b=measurement.missing("it diverged")))
    found = Run(run.path)
    assert found.config["lr"] is None
    assert found.series("a").notes == {0: "not finite"}
    assert found.series("b").notes == {0: "it diverged"}


def test_F76_the_run_keeps_all_digits_of_what_a_tracker_rounds(tmp_path):
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))
    model, rounded = torch.nn.Linear(4, 3, dtype=torch.float64), {}

    def tracker(numbers, step):
        rounded.update({name: float(np.float32(number)) for name, number in numbers.items()})

    with cl.Monitor(
        model, ["loss"], loss="cross_entropy", data=(x, y), run=tmp_path / "run", log=tracker, announce=None
    ) as monitor:
        value = float(monitor(0)["loss"].value)
    assert rounded["curvlab/loss"] == float(np.float32(value)) != value
    assert Run(tmp_path / "run").series("loss").values.tolist() == [value]
