"""Runs survive: kills at any instant, a full disk, a second process, divergence.

Compared with a reference: a run that was killed and resumed with the same run uninterrupted, bit by bit. The rest is
behaviour: what is readable afterwards, what is said.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import curvlab as cl
from curvlab import files, runs
from curvlab.cli import main
from curvlab.runs import Run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL: a POSIX system")


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )  # fmt: skip


def training(folder: Path, *, steps: int = 20, resume: bool = True, lr: float = 0.01, loss="cross_entropy", **options):
    """What a user's script does anew each time it is started; epochs of 4 steps, checkpoints after 3."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 4, generator=draw), torch.randint(3, (24,), generator=draw)
    model = network()
    L = cl.Objective(model, loss, (x, y))
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    torch.manual_seed(11)
    return cl.train(
        L, adam, cl.Batches(24, 6, steps, epochs=True), diagnostics=["loss", ("hessian_trace", {"num_matvecs": 6})],
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps), run=folder, resume=resume,
        **{"checkpoint_every": 3, **options},
    )  # fmt: skip


def without_seconds(run: Run) -> list[dict]:
    records = json.loads(json.dumps(run.records))
    for record in records:
        for part in (record, *record["measurements"].values()):
            part.pop("seconds", None)
    return records


def forked(work) -> int:
    """A process that does it, and ends without anything of pytest's."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # that a dead process was taken over
        work()
        os._exit(0)
    except BaseException as error:
        sys.__stdout__.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)


def killed_after(seconds: float, work) -> bool:
    """Whether the process was killed before it ended."""
    pid = forked(work)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "the process failed by itself"
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_times_is_the_run_that_was_not(tmp_path, kills):
    for name in ("first", "whole"):  # the first also imports
        started = time.perf_counter()
        list(training(tmp_path / name))
        seconds = time.perf_counter() - started
    whole, rng = Run(tmp_path / "whole"), random.Random(0)
    assert len(whole.records) == 20
    done = run = 0
    while done < kills:
        folder = tmp_path / f"killed-{run}"
        run += 1
        while done < kills and not (folder / "final.pt").exists():  # some fall before the first step, or into the last
            done += killed_after(rng.uniform(0, 0.7 * seconds), lambda: list(training(folder)))  # noqa: B023
            if (folder / runs.CONFIG).exists():
                steps = steps_of(folder)
                assert steps == list(range(len(steps)))
            for name in ("checkpoint", "final"):
                if (folder / f"{name}.pt").exists():
                    Run(folder).load(name)
        for _ in training(folder):
            pass
        assert without_seconds(Run(folder)) == without_seconds(whole)
        ends = Run(folder).load("final"), whole.load("final")
        assert ends[0]["complete"]
        assert torch.equal(ends[0]["params"], ends[1]["params"])
        for name, buffer in ends[0]["buffers"].items():
            assert torch.equal(buffer, ends[1]["buffers"][name])


def torn(folder: Path) -> bool:
    log = folder / runs.LOG
    return log.exists() and not (log.read_bytes() or b"\n").endswith(b"\n")


def steps_of(folder: Path) -> list[int]:
    told = pytest.warns(UserWarning, match="an incomplete line") if torn(folder) else contextlib.nullcontext()
    with told:
        return [record["step"] for record in Run(folder).records]


RECORD = {"measurements": {"loss": {"value": 0.5, "error": 0.0, "kind": "exact"}}, "padding": "x" * 2000}


@pytest.mark.parametrize("kills", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_kill_loses_at_most_the_record_in_flight(tmp_path, kills):
    rng = random.Random(1)
    told_file = tmp_path / "told"
    torn_logs = 0
    for i in range(kills):
        folder = tmp_path / str(i)
        run = Run.create(folder, {})
        run.close()
        told_file.write_bytes(bytes(8))
        told = os.open(told_file, os.O_RDWR)

        def write(folder=folder, told=told):
            run, step = Run.resume(folder, {}), 0
            while True:
                run.append({"step": step, **RECORD})
                step += 1
                os.pwrite(told, step.to_bytes(8, "little"), 0)

        assert killed_after(rng.uniform(0, 0.01), write)
        appended = int.from_bytes(os.pread(told, 8, 0), "little")
        os.close(told)
        torn_logs += torn(folder)
        steps = steps_of(folder)
        assert steps == list(range(len(steps)))
        assert appended <= len(steps) <= appended + 1
        again = Run.resume(folder, {})  # also after a line that is torn
        again.append({"step": len(steps), **RECORD})
        again.close()
        assert len(Run(folder).records) == len(steps) + 1
    assert torn_logs <= kills // 10


def test_a_run_killed_while_its_folder_was_made_can_be_resumed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / runs.LOG).touch()
    (tmp_path / "run" / f"{runs.CONFIG}.tmp").write_text("{")
    assert len(list(training(tmp_path / "run", steps=2))) == 2
    assert len(Run(tmp_path / "run").records) == 2
    assert not list((tmp_path / "run").glob("*.tmp"))


# A full disk


class Full:
    """A disk on which so many bytes are free; what does not fit is written in part, as systems do."""

    def __init__(self, monkeypatch, free: int) -> None:
        self.free, self.write = free, os.write
        monkeypatch.setattr(os, "write", self)
        monkeypatch.setattr(os, "fsync", self.sync)

    def __call__(self, fd, content):
        part = content[: self.free]
        if not part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.free -= len(part)
        return self.write(fd, part)

    def sync(self, fd):
        if self.free == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_training_survives_a_full_disk(tmp_path, monkeypatch):
    list(training(tmp_path / "whole"))
    whole = Run(tmp_path / "whole")
    snapshots = training(tmp_path / "full")
    disk = Full(monkeypatch, 5000)
    with pytest.warns(UserWarning, match="cannot be written .*No space left") as told:
        steps = [at.step for at in snapshots]
    assert steps == list(range(20))
    assert len(told) == 1
    assert disk.free == 0
    found = Run(tmp_path / "full")
    kept = len(found.records)
    assert 3 < kept < 20
    assert without_seconds(found) == without_seconds(whole)[:kept]  # and no torn line
    assert found.load("checkpoint")["step"] in range(0, kept + 3, 3)  # the last one that fitted
    assert not list(found.path.glob("*.tmp"))
    monkeypatch.undo()
    list(training(tmp_path / "full"))  # there is space again
    assert without_seconds(Run(tmp_path / "full")) == without_seconds(whole)
    assert torch.equal(Run(tmp_path / "full").load("final")["params"], whole.load("final")["params"])


def test_a_limit_of_the_system_is_a_full_disk(tmp_path):
    """RLIMIT_FSIZE ends writes in the middle of a line, in the system itself."""

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        snapshots = training(tmp_path / "run", checkpoint_every=None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.warns(UserWarning, match="cannot be written .*File too large") as told:
            assert len(list(snapshots)) == 20
        assert len(told) == 1

    assert os.waitpid(forked(work), 0)[1] == 0
    log = tmp_path / "run" / runs.LOG
    assert 1000 < log.stat().st_size <= 2000
    assert log.read_bytes().endswith(b"\n")
    assert len(Run(tmp_path / "run").records) == log.read_bytes().count(b"\n")
    assert not (tmp_path / "run" / "final.pt").exists()


def test_a_monitor_survives_a_full_disk(tmp_path, monkeypatch):
    model = network()
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    monitor = cl.Monitor(model, ["loss"], loss="cross_entropy", data=(x, y), run=tmp_path / "run", announce=None)
    Full(monkeypatch, 600)

    def measured():
        values = [monitor(step)["loss"].value for step in range(5)]
        monitor.close()
        return values

    with pytest.warns(UserWarning, match="cannot be written .*; training and measuring go on without the log") as told:
        assert None not in measured()
    assert len(told) == 1
    assert 0 < len(Run(tmp_path / "run").records) < 5


# Two processes


def test_of_two_processes_that_race_for_a_run_one_gets_it(tmp_path):
    read, write = os.pipe()

    def work():
        os.read(read, 1)  # start together
        try:
            run = Run.resume(tmp_path / "run", {})
            run.append({"step": 0, "measurements": {}})
            time.sleep(0.3)
        except ValueError as error:
            os._exit(7 if "is being written by" in str(error) else 1)

    racers = [forked(work) for _ in range(6)]
    os.write(write, b"123456")
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in racers]
    assert sorted(ends) == [0] + [7] * 5
    assert len(Run(tmp_path / "run").records) == 1


def test_a_child_does_not_keep_the_lock_of_a_parent_that_died(tmp_path):
    """As a loader's worker, which outlives a killed training for some seconds."""
    read, write = os.pipe()

    def parent():
        run = Run.create(tmp_path / "run", {})
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
        os.write(write, str(child).encode())
        run.append({"step": 0, "measurements": {}})
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(forked(parent), 0)
    child = int(os.read(read, 20))
    try:
        Run.resume(tmp_path / "run", {}).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_run_that_is_opened_anew_here_belongs_to_the_new_one(tmp_path):
    """As where a cell of a notebook is run again."""
    one = Run.create(tmp_path / "run", {})
    two = Run.resume(tmp_path / "run", {})
    two.append({"step": 0, "measurements": {}})
    with pytest.raises(RuntimeError, match="was opened for reading"):
        one.append({"step": 0, "measurements": {}})
    assert len(two.records) == 1


def test_without_locks_of_the_system_the_file_decides(tmp_path, monkeypatch):
    if files.fcntl is None:
        pytest.skip("needs fcntl to take it away")

    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    files.unlock(files.lock(tmp_path))
    dead = forked(lambda: None)
    os.waitpid(dead, 0)
    for owner, refused in (
        (f"{os.getppid()} {socket.gethostname()}", True),
        (f"{dead} elsewhere", True),
        (f"{dead} {socket.gethostname()}", False),
    ):
        (tmp_path / files.LOCK).write_text(owner)
        if refused:
            with pytest.raises(ValueError, match="is being written by process"):
                files.lock(tmp_path)
        else:
            files.unlock(files.lock(tmp_path))


# Divergence


@pytest.mark.parametrize("every", [1, 5])
def test_divergence_is_recorded_and_the_last_good_state_is_kept(tmp_path, every):
    """Adam takes bounded steps: the loss overflows where the weights have become large enough."""
    snapshots = training(tmp_path / "run", loss=exploding, lr=1e9, steps=200, every=every, checkpoint_every=1)
    steps = [at.step for at in snapshots]
    assert 1 < len(steps) < 200
    run = Run(tmp_path / "run")
    last = run.records[-1]
    assert last["step"] == steps[-1]
    assert last["batch_loss"] is None
    assert last["ended"].startswith("the loss of the batch is ")
    assert last["ended"].endswith(f" at step {steps[-1]}: training ended")
    assert not any("ended" in record for record in run.records[:-1])
    kept = run.load("checkpoint")
    assert kept["step"] == steps[-1] - 1
    assert all(torch.isfinite(value).all() for value in kept["model"].values())
    final = run.load("final")
    assert (final["complete"], final["reason"], final["step"]) == (True, last["ended"], steps[-1])
    assert list(training(tmp_path / "run", loss=exploding, lr=1e9, steps=200, every=every, checkpoint_every=1)) == []


def exploding(outputs, targets):
    return outputs.square().sum(1).square()


def test_the_command_states_divergence_by_its_status(tmp_path, capsys):
    arguments = ["run", "--n", "16", "--hidden", "4", "--steps", "50", "--lr", "1e30", "--diagnostics", "loss"]
    assert main([*arguments, "--checkpoint-every", "1", "--out", str(tmp_path / "run")]) == 1
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'run'}: the loss of the batch is " in err
    assert f"the state before is in {tmp_path / 'run' / 'checkpoint.pt'}" in err
    assert "Traceback" not in out + err
    torch.set_num_threads(1)
