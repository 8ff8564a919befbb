"""One folder per run: what was asked, what was measured at every step, and where training ended."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .measurement import axis_index, half_width

CONFIG, LOG = "config.json", "measurements.jsonl"


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
    was killed is left out, with a warning.

    Raises:
        FileNotFoundError: there is no run at `path`.
        ValueError: the configuration is not readable JSON.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            raise FileNotFoundError(
                f"{self.path} holds no run: {CONFIG} is missing. Runs are made by train(run=...) and by `curvlab run`"
            )
        try:
            self.config: dict[str, Any] = json.loads((self.path / CONFIG).read_text())
        except ValueError as error:
            raise ValueError(f"{self.path / CONFIG} is not readable JSON ({error}); restore it or run again") from None
        self._file: int | None = None
        self._cache: tuple[int, list[dict[str, Any]]] = (-1, [])

    @classmethod
    def create(cls, path: str | os.PathLike, config: dict[str, Any]) -> Run:
        """Make a new run folder; `config` is stored with where it came from (command, commit, versions).

        Raises:
            FileExistsError: there is a run at `path` already; nothing of it is touched.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # The log is created exclusively and first: of two processes only one gets the folder.
            log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except FileExistsError:
            raise FileExistsError(
                f"{folder} already holds a run, which is never overwritten; choose another folder or delete it"
            ) from None
        write_whole(folder / CONFIG, json.dumps(_plain(config | {"provenance": provenance()}), indent=2).encode())
        run = cls(folder)
        run._file = log
        return run

    @classmethod
    def resume(cls, path: str | os.PathLike, config: dict[str, Any]) -> Run:
        """Open an existing run to write on, or make it if there is none; `config` must say what the stored one says.

        The number of threads may differ; bits then do too.

        Raises:
            ValueError: the settings differ, or the run lacks its configuration; the message lists what differs.
        """
        folder = Path(path)
        if not (folder / LOG).exists():
            return cls.create(folder, config)
        run = cls(folder)
        stored, asked = run.config.get("training", {}), _plain(config).get("training", {})
        odd = [key for key in {**stored, **asked} if key != "threads" and stored.get(key) != asked.get(key)]
        if odd:
            listing = "; ".join(f"{key} was {stored.get(key)!r} and is {asked.get(key)!r}" for key in odd)
            raise ValueError(
                f"{folder} was made with other settings ({listing}); resume it with the same ones, or choose another folder"
            )
        run._file = os.open(folder / LOG, os.O_WRONLY | os.O_APPEND)
        return run

    @property
    def size(self) -> int:
        """Bytes in the log so far."""
        return (os.fstat(self._file) if self._file is not None else (self.path / LOG).stat()).st_size

    def truncate(self, size: int) -> None:
        """Forget what was logged beyond the first `size` bytes.

        Raises:
            RuntimeError: the run was opened for reading, or closed.
        """
        os.ftruncate(self._writable(), min(size, self.size))  # beyond its end a file would grow by zeros
        self._cache = (-1, [])

    def _writable(self) -> int:
        if self._file is None:
            raise RuntimeError(f"{self.path} was opened for reading; only the run that Run.create made can be written")
        return self._file

    def append(self, record: dict[str, Any]) -> None:
        """Write one record as one line, in a single system call: killed at any instant, the log loses at most it.

        Raises:
            RuntimeError: the run was opened for reading, or closed.
        """
        line = json.dumps(_plain(record), allow_nan=False, separators=(",", ":")) + "\n"
        os.write(self._writable(), line.encode())

    def close(self) -> None:
        """Close the log; the run stays readable."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def records(self) -> list[dict[str, Any]]:
        """All complete lines of the log so far."""
        file = self.path / LOG
        size = file.stat().st_size if file.exists() else 0
        if size != self._cache[0]:
            *lines, tail = file.read_bytes().split(b"\n") if size else [b""]
            if tail:
                warnings.warn(f"{file} ends in an incomplete line, which is left out", stacklevel=3)
            self._cache = (size, [json.loads(line) for line in lines])
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
        import io

        import torch

        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        return write_whole(self.path / f"{name}.pt", buffer.getvalue())

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
        file = self.path / f"{name}.pt"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; a run saves its final parameters when it ends or is interrupted"
            )
        return read_tensors(file, device)


def read_tensors(file: Path, device: str | None = "cpu") -> Any:
    """The content of a file of `torch.save`: tensors and plain values, nothing is executed.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    import pickle
    import zipfile

    import torch

    try:
        with zipfile.ZipFile(file) as archive:  # torch.load does not notice a flipped byte
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        damaged = "it is no archive of torch.save"
    if damaged:
        raise ValueError(f"{file} is damaged, or was not written by torch.save ({damaged}); save it, or run, again")
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError):
        raise ValueError(
            f"{file} holds more than tensors and plain values, such as a whole model, and is not read; save the "
            "state dict alone: torch.save(model.state_dict(), 'weights.pt')"
        ) from None


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
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if isinstance(x, bool | int | str) or x is None:
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if hasattr(x, "tolist"):
        return _plain(x.tolist())
    return str(x)


def write_whole(file: Path, content: bytes) -> Path:
    """Write to a temporary file first, so that the file is whole or absent."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    return file
