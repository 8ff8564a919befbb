"""Jobs on the cores that are given: each run is finished once, resumed if it was interrupted, and reported if it fails."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..files import write_whole
from ..problems.formats import MissingData
from ..problems.rows import Statistic
from ..runs import RESULT, Run, read_result
from .plan import Job, check_folders

Status = Literal["finished", "diverged", "failed", "interrupted"]


@dataclass(frozen=True)
class Result:
    """What became of a job: its metrics, None where there is no number, and why it has none."""

    job: Job
    status: Status
    values: dict[str, float | None] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Wanted:
    """What is read from a run.

    Attributes:
        metrics: diagnostics, or `validation_loss` and `validation_accuracy`, which are measured where training ends.
        statistic: of all but these two: "final" at the end of training, "best" of the log (the largest accuracy, otherwise
            the smallest value), "late" the median of the second half of the log.
        checkpoint_every: steps between checkpoints.
    """

    metrics: tuple[str, ...]
    statistic: Statistic = "final"
    checkpoint_every: int = 200


def larger_is_better(metric: str) -> bool:
    """Whether the metric is an accuracy."""
    return "accuracy" in metric


def run(jobs: Sequence[Job], wanted: Wanted, *, workers: int = 1) -> Iterator[Result]:
    """Run jobs and yield their results as they come, in the order of completion.

    Finished runs are read, not repeated; interrupted ones continue from their last checkpoint. A job that fails, by an
    exception or by the death of its process, is a result like others. With one worker everything happens in this process.

    Raises:
        ValueError: fewer than one worker, or a folder with a run of other settings; before anything is run.
        MissingData: the files of a data set are not there; at the first run that needs them.
        KeyboardInterrupt: after all runs in progress were left in a state from which they continue.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected at least 1 process")
    check_folders(jobs)
    waiting, ours = list(jobs), {job.folder for job in jobs}
    ended: dict[Path, Status] = {}
    with _Crew(workers) as crew:
        running: dict[Future, Job] = {}
        while waiting or running:
            for job in [job for job in waiting if _ready(job, ended, ours)][: workers - len(running)]:
                waiting.remove(job)
                running[crew.submit(_work, job, wanted, ended.get(job.after) if job.after else None)] = job
            done = wait(running, return_when=FIRST_COMPLETED).done
            if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
                done = wait(running).done  # one death breaks the pool, and all that was in progress with it
                crew.renew()
            for future in done:
                job, error = running.pop(future), future.exception()
                if isinstance(error, MissingData):
                    raise error
                why = f"its process or another died, perhaps for lack of memory ({error})"
                result = future.result() if error is None else Result(job, "failed", reason=why)
                ended[job.folder] = result.status
                yield result


def _ready(job: Job, ended: dict[Path, Status], ours: set[Path]) -> bool:
    return job.after is None or job.after in ended or job.after not in ours


class _Crew:
    """Processes that stop at the next step when they are asked to; none for one worker, whose work is done here."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.context = multiprocessing.get_context("spawn")
        self.stop = self.context.Event()
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Crew:
        self.renew()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.pool is not None:
            self.stop.set()
            self.pool.shutdown(cancel_futures=True)

    def renew(self) -> None:
        if self.workers > 1:
            self.pool = ProcessPoolExecutor(
                self.workers, mp_context=self.context, initializer=_enlist, initargs=(self.stop,)
            )

    def submit(self, function: Callable[..., Result], *args: Any) -> Future:
        if self.pool is not None:
            return self.pool.submit(function, *args)
        future: Future = Future()
        future.set_result(function(*args))
        return future


_stop: Any = None  # in a worker process: the event that ends its work


def _enlist(stop: Any) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the event ends runs in order
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed sweep leaves no process behind; what it was running continues from its checkpoint."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job, wanted: Wanted, before: Status | None) -> Result:
    if before is not None and before != "finished":
        return Result(job, "failed", reason=f"it needs {job.after}, which is {before}")
    try:
        status = _train(job, wanted)
        if status == "interrupted":
            return Result(job, status)
        return Result(job, status, {name: _value(job, name, wanted.statistic) for name in wanted.metrics})
    except MissingData:
        raise  # no other run has it either
    except Exception as error:  # whatever it is, the other runs go on
        with contextlib.suppress(OSError):
            job.folder.mkdir(parents=True, exist_ok=True)
            write_whole(job.folder / "error.txt", traceback.format_exc().encode())
        lines = (str(error.args[0]) if error.args else "").splitlines() or [""]
        return Result(job, "failed", reason=f"{type(error).__name__}: {lines[0]}")


def _train(job: Job, wanted: Wanted) -> Status:
    stored = _stored(job)
    if stored:
        return stored["status"]
    from ..problems.experiments import start

    (b,) = job.experiment.batch_size
    batches, snapshots = start(job.experiment, b, run=job.folder, checkpoint_every=wanted.checkpoint_every, resume=True)
    try:
        for _ in snapshots:
            if _stop is not None and _stop.is_set():
                return "interrupted"
    finally:
        snapshots.close()  # type: ignore[attr-defined]
    taken = Run(job.folder).load("final")["step"]
    finite = _measure(job, "loss") is not None
    status: Status = "finished" if finite and taken == batches.steps else "diverged"
    _store(job, {"status": status, "step": taken, "final": {}})
    (job.folder / "error.txt").unlink(missing_ok=True)
    return status


def _value(job: Job, name: str, statistic: Statistic) -> float | None:
    if statistic == "final" or name.startswith("validation_"):
        stored = _stored(job)
        if name not in stored["final"]:
            stored["final"][name] = _measure(job, name)
            _store(job, stored)
        return stored["final"][name]
    values = Run(job.folder).series(name).values
    if statistic == "late":
        values = values[len(values) // 2 :]
    if not np.isfinite(values).any():
        return None
    if statistic == "late":
        return float(np.nanmedian(values))
    return float(np.nanmax(values) if larger_is_better(name) else np.nanmin(values))


def _measure(job: Job, name: str) -> float | None:
    """A metric where training ended; None if it is not a finite number."""
    from ..point import measure
    from ..problems.experiments import final_point

    end = final_point(job.folder)
    held, quantity = end.problem.test, name
    if name.startswith("validation_"):
        if end.problem.validation is None:
            raise ValueError(f"{name} needs examples that are set aside; give their number by --validation")
        held, quantity = end.problem.validation, name.replace("validation_", "test_")
    found = measure(
        end.problem.objective, [quantity], w=end.w, batch_size=end.batch_size, replacement=job.experiment.replacement,
        lr=job.experiment.lr, test=held, seed=job.experiment.probe_seed,
    )[quantity]  # fmt: skip
    if found.value is not None and np.ndim(found.value):
        raise ValueError(f"{name} has several values; a metric of a sweep is one number")
    return None if found.value is None or not math.isfinite(float(found.value)) else float(found.value)


def _stored(job: Job) -> dict[str, Any]:
    """What is known of a run that ended; empty for others."""
    return read_result(job.folder) or {}


def _store(job: Job, content: dict[str, Any]) -> None:
    write_whole(job.folder / RESULT, json.dumps(content, indent=2).encode())
