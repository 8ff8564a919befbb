"""One folder per run: what was asked, what was measured at every step, and where training ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from . import files
from .files import JSON_LIMIT, read_tensors, write_whole
from .measurement import axis_index, half_width

CONFIG, LOG, RESULT = "config.json", "measurements.jsonl", "result.json"
_writing: weakref.WeakValueDictionary[Path, Run] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Series:
    """One measured quantity over the steps of a run; arrays of length T, NaN where there is no value.

    Attributes:
        steps, values, errors: as logged; a vector quantity without a chosen coordinate has values of shape (T, K).
        df, floors, kinds: what the errors mean (see `Measurement`).
        notes: remarks by step.
        axis: name and coordinates of a vector quantity, those of the last step.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    df: np.ndarray
    floors: np.ndarray
    kinds: np.ndarray
    notes: dict[int, str] = field(default_factory=dict)
    axis: tuple[str, tuple] | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of the intervals at each step, as `Measurement.interval`."""
        shape = (len(self),) + (1,) * (self.values.ndim - 1)
        half = half_width(self.errors, self.kinds.reshape(shape), self.df, self.floors, level)
        return self.values - half, self.values + half


class Run:
    """A run folder: `config.json`, `measurements.jsonl` with one line per measured step, and saved tensors.

    `Run(path)` opens an existing one for reading, also while it is written. A line that was being written when a run
    was killed is left out, with a warning. One process at a time writes: what the folder holds need not be trusted, and
    nothing outside of it is written.

    Raises:
        FileNotFoundError: there is no run at `path`.
        ValueError: the configuration is not one that curvlab wrote.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            raise FileNotFoundError(
                f"{self.path} holds no run: {CONFIG} is missing. Runs are made by train(run=...) and by `curvlab run`"
            )
        self.config: dict[str, Any] = read_config(self.path / CONFIG)
        self._file: int | None = None
        self._lock: int | None = None
        self._cache: tuple[int, list[dict[str, Any]]] = (-1, [])

    @classmethod
    def create(cls, path: str | os.PathLike, config: dict[str, Any]) -> Run:
        """Make a new run folder; `config` is stored with where it came from (command, commit, versions).

        Raises:
            FileExistsError: there is a run at `path` already; nothing of it is touched.
            ValueError: the configuration is larger than a configuration can be.
        """
        return cls._begin(Path(path), config, os.O_EXCL)

    @classmethod
    def _begin(cls, folder: Path, config: dict[str, Any], exclusive: int) -> Run:
        content = json.dumps(_plain(config | {"provenance": provenance()}), indent=2, allow_nan=False).encode()
        if len(content) > JSON_LIMIT:
            raise ValueError(
                f"the configuration of {folder} has {len(content)} bytes, expected at most {JSON_LIMIT}; leave data out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # The log is created exclusively and first: of two processes only one gets the folder.
            log = files.open_no_link(folder / LOG, os.O_WRONLY | os.O_CREAT | exclusive | os.O_APPEND)
        except FileExistsError:
            raise FileExistsError(
                f"{folder} already holds a run, which is never overwritten; choose another folder or delete it"
            ) from None
        held = None
        try:
            held = files.lock(folder)
            write_whole(folder / CONFIG, content)
            return cls(folder)._writes(log, held)
        except BaseException:
            os.close(log)
            files.unlock(held)
            raise

    @classmethod
    def resume(cls, path: str | os.PathLike, config: dict[str, Any]) -> Run:
        """Open an existing run to write on, or make it if there is none; `config` must say what the stored one says.

        The number of threads may differ; bits then do too. Whatever had it open in this process is closed.

        Raises:
            ValueError: the settings differ, the run lacks its configuration, or another process is writing it; the message
                lists what differs.
        """
        folder = Path(path)
        if old := _writing.get(folder.resolve()):
            old.close()
        log = folder / LOG
        if not log.exists() or (log.stat().st_size == 0 and not (folder / CONFIG).exists()):
            return cls._begin(folder, config, 0)  # also where one was killed before its first step
        run = cls(folder)
        stored, asked = run.config.get("training", {}), _plain(config).get("training", {})
        odd = [key for key in {**stored, **asked} if key != "threads" and stored.get(key) != asked.get(key)]
        if odd:
            pairs = [f"{key} was {_shown(stored.get(key))} and is {_shown(asked.get(key))}" for key in odd[:6]]
            raise ValueError(
                f"{folder} was made with other settings ({'; '.join(pairs)}); resume it with the same ones, or choose "
                "another folder"
            )
        held = files.lock(folder)
        try:
            run._writes(files.open_no_link(log, os.O_RDWR | os.O_APPEND), held)
        except BaseException:
            files.unlock(held)
            raise
        run.truncate(run.size)
        return run

    def _writes(self, log: int, held: int | None) -> Run:
        self._file, self._lock = log, held
        _writing[self.path.resolve()] = self
        return self

    @property
    def size(self) -> int:
        """Bytes in the log so far."""
        return (os.fstat(self._file) if self._file is not None else (self.path / LOG).stat()).st_size

    def truncate(self, size: int) -> None:
        """Forget what was logged beyond the first `size` bytes, and a line of which these have only a part.

        Raises:
            RuntimeError: the run was opened for reading, or closed.
        """
        log = self._writable()
        size = max(0, min(size, self.size))  # beyond its end a file would grow by zeros
        with files.open_file(self.path / LOG) as stream:
            stream.seek(start := max(0, size - JSON_LIMIT))
            size = start + stream.read(size - start).rfind(b"\n") + 1
        os.ftruncate(log, size)
        self._cache = (-1, [])

    def _writable(self) -> int:
        if self._file is None:
            raise RuntimeError(f"{self.path} was opened for reading; only the run that Run.create made can be written")
        return self._file

    def append(self, record: dict[str, Any]) -> None:
        """Write one record as one line, in a single system call: killed at any instant, the log loses at most it.

        Raises:
            RuntimeError: the run was opened for reading, or closed.
            OSError: there is no space for it; the log then ends with the record before.
        """
        line = (json.dumps(_plain(record), allow_nan=False, separators=(",", ":")) + "\n").encode()
        log = self._writable()
        size = os.fstat(log).st_size
        try:
            while line:
                line = line[os.write(log, line) :]  # a disk that is nearly full takes a part
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(log, size)
            raise

    @property
    def is_open(self) -> bool:
        """Whether it can be written."""
        return self._file is not None

    def close(self) -> None:
        """Close the log; the run stays readable."""
        if self._file is not None:
            os.close(self._file)
            files.unlock(self._lock)
            self._file = self._lock = None

    @property
    def records(self) -> list[dict[str, Any]]:
        """All complete lines of the log so far.

        Raises:
            ValueError: a line is no record; the message says which and why.
        """
        file = self.path / LOG
        size = file.stat().st_size if file.exists() else 0
        if size != self._cache[0]:
            found, line = [], b"\n"
            if size:
                with files.open_file(file) as stream:
                    for number, line in enumerate(files.lines(stream, file), 1):
                        if line.endswith(b"\n"):
                            found.append(read_record(line, file, number))
            if not line.endswith(b"\n"):
                warnings.warn(f"{file} ends in an incomplete line, which is left out", stacklevel=3)
            self._cache = (size, found)
        return self._cache[1]

    @property
    def names(self) -> list[str]:
        """The quantities that were measured, in order of appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record["measurements"]))

    def series(self, name: str, **coordinate: Any) -> Series:
        """A quantity over the steps at which it was measured.

        Args:
            coordinate: picks from the named axis of a vector quantity, such as ``batch_size=32``.

        Raises:
            KeyError: the quantity was not measured, or has no such coordinate; the message says what there is.
        """
        found = [
            (record["step"], record["measurements"][name]) for record in self.records if name in record["measurements"]
        ]
        if not found:
            raise KeyError(
                f"{name} was not measured in {self.path}; there are {', '.join(self.names) or 'no records yet'}"
            )
        rows = [_row(entry, coordinate) for _, entry in found]
        value, error, df, floor = (np.array(_rectangular([row[i] for row in rows]), dtype=float) for i in range(4))
        notes = {step: entry["note"] for step, entry in found if entry.get("note")}
        kinds = np.array([entry["kind"] for _, entry in found])
        axes = [entry["axis"] for _, entry in found if entry.get("axis")] if not coordinate else []
        axis = (axes[-1][0], tuple(axes[-1][1])) if axes else None
        return Series(name, np.array([step for step, _ in found]), value, error, df, floor, kinds, notes, axis)

    def column(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, numbers) of something logged beside the measurements, such as "lr" or "seconds"."""
        found = [(record["step"], record[key]) for record in self.records if record.get(key) is not None]
        return np.array([step for step, _ in found]), np.array([number for _, number in found], dtype=float)

    def save(self, name: str, tensors: dict[str, Any]) -> Path:
        """Save tensors and plain values as NAME.pt: to a temporary file first, so that a file is whole or absent."""
        return self.write(name, packed(tensors))

    def write(self, name: str, content: bytes) -> Path:
        """As `save`, of what `packed` made."""
        return write_whole(self.path / f"{_checked_name(name)}.pt", content)

    def save_trajectory(
        self,
        steps: list[int],
        params: list[Any],
        *,
        times: list[float] | None = None,
        errors: list[float] | None = None,
    ) -> Path:
        """Save `trajectory.pt`: steps (T,), params (T, P), and for a flow times (T,) and errors of the params (T,)."""
        import torch

        zero = [0.0] * len(steps)
        columns = {"times": zero if times is None else times, "errors": zero if errors is None else errors}
        numbers = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
        return self.save("trajectory", {"steps": torch.tensor(steps), "params": torch.stack(params), **numbers})

    def load(self, name: str, *, device: str | None = "cpu") -> dict[str, Any]:
        """Read NAME.pt, to a device, or with None to where the tensors were.

        Only tensors and plain values are accepted, nothing is executed.

        Raises:
            FileNotFoundError: it was not saved.
            ValueError: the file is damaged, or holds something else.
        """
        file = self.path / f"{_checked_name(name)}.pt"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; a run saves its final parameters when it ends or is interrupted"
            )
        return read_tensors(file, device)


def packed(tensors: dict[str, Any]) -> bytes:
    """What `torch.save` writes of tensors and plain values."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.=+-]*", name):
        raise ValueError(
            f"the name is {name!r}; expected letters, digits and . = + - _, such as 'final', and no folder"
        )
    return name


def read_config(file: Path) -> dict[str, Any]:
    """A run's configuration.

    Raises:
        ValueError: something that is none; the message says why.
    """
    try:
        config = files.read_json(files.read_file(file, JSON_LIMIT))
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}, expected an object")
        _check_config(config)
        return config
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON of a run ({error}); restore it or run again") from None


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a sweep has measured where a run ended: its status, and numbers by name under "final"; None without it.

    Raises:
        ValueError: the file is something else.
    """
    file = folder / RESULT
    if not file.is_file():
        return None
    try:
        found = files.read_json(files.read_file(file, JSON_LIMIT))
        if not isinstance(found, dict) or found.get("status") not in ("finished", "diverged"):
            raise ValueError("it states no status")
        if not isinstance(found.get("final"), dict) or not all(map(_is_number, found["final"].values())):
            raise ValueError("its final numbers are none")
        return found
    except ValueError as error:
        raise ValueError(f"{file} is not what a sweep writes ({error}); delete it, to measure again") from None


def _check_config(config: dict[str, Any]) -> None:
    """What readers take for granted."""
    training = _part(config, "training", dict) or {}
    # What a user puts under "experiment" is the user's; who needs that of a preset looks at it.
    for key in ("optimizer", "batches", "objective"):
        _part(training, key, dict)
    _part(training, "lr", int | float)
    _part(training, "diagnostics", list)
    for name, options in training.get("diagnostics") or []:
        if not (isinstance(name, str) and isinstance(options, dict)):
            raise ValueError("a diagnostic is no pair of a name and options")


def _part(x: dict[str, Any], key: str, kind: Any) -> Any:
    value = x.get(key)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{key} is a {type(value).__name__}")
    return value


def read_record(line: bytes, file: Path, number: int) -> dict[str, Any]:
    """A line of a log.

    Raises:
        ValueError: it is no record; the message says why.
    """
    try:
        record = files.read_json(line)
        _check_record(record)
        return record
    except ValueError as error:
        raise ValueError(
            f"line {number} of {file} is no record ({error}); it is damaged, or not written by a run: take the line out"
        ) from None


def _check_record(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}, expected an object")
    step, measurements = record.get("step"), record.get("measurements")
    if not isinstance(step, int) or not 0 <= step < 2**63:
        raise ValueError(f"step is {_shown(step)}, expected a whole number from 0")
    if not isinstance(measurements, dict):
        raise ValueError(f"measurements is {_shown(measurements)}, expected an object")
    for key in ("lr", "threshold", "batch_loss", "seconds", "matvecs", "effective_lr"):
        if not _is_number(record.get(key)):
            raise ValueError(f"{key} is {_shown(record[key])}, expected a number or null")
    for name, m in measurements.items():
        _check_measurement(name, m)


def _check_measurement(name: str, m: Any) -> None:
    """A number or null for each field, or as many as the axis has."""
    odd = [key for key in ("value", "error", "kind") if key not in m] if isinstance(m, dict) else ["value"]
    if odd:
        raise ValueError(f"{name} has no {odd[0]}")
    axis, width = m.get("axis"), None
    if axis is not None:
        if not (isinstance(axis, list) and len(axis) == 2 and isinstance(axis[0], str) and isinstance(axis[1], list)):
            raise ValueError(f"the axis of {name} is {_shown(axis)}, expected a name and a list")
        width = len(axis[1])
        if any(isinstance(x, list | dict) for x in axis[1]):
            raise ValueError(f"the axis of {name} has coordinates that are no numbers or names")
    for key in ("value", "error", "df", "floor", "seconds", "matvecs"):
        x = m.get(key)
        fits = len(x) == width and all(map(_is_number, x)) if isinstance(x, list) else _is_number(x)
        if not fits:
            raise ValueError(f"{key} of {name} is {_shown(x)}, expected a number for each point of its axis, or null")
    if m["kind"] not in ("exact", "bound", "sem"):
        raise ValueError(f"the kind of {name} is {_shown(m['kind'])}, expected exact, bound or sem")
    if not isinstance(m.get("note") or "", str):
        raise ValueError(f"the note of {name} is {_shown(m['note'])}, expected text")


def _is_number(x: Any) -> bool:
    return x is None or (isinstance(x, int | float) and not isinstance(x, bool))


def _shown(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 400 else f"{text[:400]}..."


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted names, such as "training.optimizer.name".

    Example:
        >>> flattened({"training": {"lr": 0.1, "batch_size": 8}, "seed": 0})
        {'training.lr': 0.1, 'training.batch_size': 8, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def provenance() -> dict[str, Any]:
    """Where a run comes from: command, commit, versions, machine, time."""
    versions = {}
    for package in ("curvlab", "torch", "numpy", "scipy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return {
        "command": sys.argv,
        "commit": _commit(),
        "versions": versions | {"python": platform.python_version()},
        "platform": platform.platform(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _row(entry: dict[str, Any], coordinate: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    fields: tuple[Any, ...] = (
        entry["value"],
        entry["error"],
        entry.get("df", math.inf),
        entry.get("floor", 0.0),
    )
    if coordinate and entry["value"] is not None:
        index = axis_index(entry.get("axis"), coordinate)
        fields = tuple(x[index] if isinstance(x, list) else x for x in fields)
    width = len(entry["value"]) if not coordinate and isinstance(entry["value"], list) else None
    df = [math.inf if x is None else x for x in fields[2]] if isinstance(fields[2], list) else fields[2]
    numbers = [fields[0], fields[1], math.inf if df is None else df, fields[3]]
    value, error, df, floor = (x if width is None or isinstance(x, list) else [x] * width for x in numbers)
    return value, error, df, floor


def _rectangular(rows: list[Any]) -> list[Any]:
    """Rows where a missing value is as wide as the others."""
    width = next((len(row) for row in rows if isinstance(row, list)), None)
    if width is None:
        return [math.nan if row is None else row for row in rows]
    return [
        [math.nan if x is None else x for x in row] if isinstance(row, list) else [math.nan] * width for row in rows
    ]


def _plain(x: Any) -> Any:
    """As JSON has it: no NaN, no numpy numbers, no paths."""
    if isinstance(x, dict):
        return {files.printable(str(key)): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if isinstance(x, bool | int) or x is None:
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if hasattr(x, "tolist"):
        return _plain(x.tolist())
    return files.printable(str(x))
