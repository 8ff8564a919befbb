"""`curvlab watch`: the log of a run while it is written, a line for each record. Imports no torch."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro

from .. import files
from ..plots.series import ADAPTIVE, limit
from ..runs import CONFIG, LOG, Run, read_record

KEY = (
    "loss", "batch_loss", "sharpness", "preconditioned_sharpness", "interaction_sharpness", "instability",
    "test_loss", "test_accuracy",
)  # fmt: skip
COLUMNS, BARS, RECENT = 6, 32, 12  # shown unless asked for; width of a history; lines of records on a terminal


def watch_command(arguments: list[str]) -> int:
    def options(
        run: Annotated[Path, tyro.conf.Positional],
        quantities: tuple[str, ...] = (),
        interval: float = 1.0,
        once: bool = False,
        wait: bool = False,
    ) -> dict[str, Any]:
        """Follow a run of `curvlab run`, curvlab.train or curvlab.Monitor while it is written.

        One line for each record, with curvatures as shares of the threshold of the optimizer; ends when the run ends, or
        with Ctrl-C, which does not touch the run.

        Args:
            run: Folder of the run.
            quantities: What to show; default the loss, the curvatures that were measured, and what fits beside them.
            interval: Seconds between two looks.
            once: Show where the run stands, and end.
            wait: Wait for a run that does not exist yet.
        """
        return locals()

    asked = tyro.cli(options, args=arguments, prog="curvlab watch")
    if not 0 < asked["interval"] < math.inf:
        raise ValueError(f"--interval is {asked['interval']}; expected a number of seconds above 0, such as 1")
    try:
        view = _View(_opened(asked["run"], asked["wait"], asked["interval"]), asked["quantities"])
    except KeyboardInterrupt:
        return 0
    view.look()
    if asked["once"]:
        print("\n".join(view.frame()))
        return 0
    follow = _follow_on_terminal if sys.stdout.isatty() else _follow_as_lines
    try:
        follow(view, asked["interval"])
    except KeyboardInterrupt:
        view.look()
    print("\n".join(["", *view.summary()]) if follow is _follow_as_lines else "")
    return 0


def _opened(path: Path, wait: bool, interval: float) -> Run:
    if not wait and not (path / CONFIG).is_file():
        inside = sorted(str(file.parent) for file in path.glob(f"*/{CONFIG}"))
        hint = (
            f"watch one of {', '.join(inside[:6])}" if inside else "to wait for one that is about to start, add --wait"
        )
        raise FileNotFoundError(f"{path} holds no run; {hint}")
    if not (path / CONFIG).is_file():
        print(f"curvlab: waiting for a run in {path}", file=sys.stderr)
        while not (path / CONFIG).is_file():
            time.sleep(interval)
    return Run(path)


def _follow_as_lines(view: _View, interval: float) -> None:
    """A line for each record, for pipes and files."""
    new, head = 0, ""  # all that there is at first
    while True:
        over = view.ended  # asked first: what was logged before the end is then read
        new = min(new, view.look())
        if view.head() != head and view.log.records:
            head = view.head()
            print(head)
        for record in view.log.records[new:]:
            print(view.line(record))
        new = len(view.log.records)
        sys.stdout.flush()
        if over:
            return
        time.sleep(interval)


def _follow_on_terminal(view: _View, interval: float) -> None:
    """The last records and the histories, drawn over themselves."""
    height = 0
    while True:
        over = view.ended
        view.look()
        size = shutil.get_terminal_size()
        lines = [line[: size.columns - 1] for line in view.frame(min(RECENT, max(1, size.lines - 14)))]
        print(f"\x1b[{height}F\x1b[J" if height else "", end="")
        print("\n".join(lines), flush=True)
        height = len(lines)
        if over:
            return
        time.sleep(interval)


class _Log:
    """The records of a log so far; each look reads only what is new, and leaves out a line that is being written."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: list[dict[str, Any]] = []
        self._read, self._last = 0, b""

    def read(self) -> int:
        """Look; returns from which record on they are new."""
        if not self.file.exists():
            return 0
        before = self.records
        with files.open_file(self.file) as stream:
            stream.seek(self._read - len(self._last))
            kept = stream.read(len(self._last)) == self._last
            if not kept:  # a resumed run forgets what was logged after its checkpoint
                stream.seek(0)
                self._read, self.records = 0, []
            lines = [line for line in files.lines(stream, self.file) if line.endswith(b"\n")]
        known = len(self.records) + 1
        self.records = self.records + [read_record(line, self.file, i) for i, line in enumerate(lines, known)]
        self._read += sum(map(len, lines))
        self._last = lines[-1] if lines else self._last if kept else b""
        pairs = enumerate(zip(before, self.records, strict=False))
        return len(before) if kept else next((i for i, (a, b) in pairs if a != b), min(len(before), len(self.records)))


class _View:
    """A run as lines of text."""

    def __init__(self, run: Run, quantities: Sequence[str]) -> None:
        self.run, self.asked, self.log = run, tuple(quantities), _Log(run.path / LOG)
        training = run.config.get("training", {})
        self.where = files.printable(str(run.path))
        self.optimizer = training.get("optimizer") or {}
        self.batch_size = training.get("batch_size")
        self.steps = (training.get("batches") or {}).get("steps")

    @property
    def ended(self) -> bool:
        """Whether the run was closed, and not resumed since."""
        final, log = self.run.path / "final.pt", self.log.file
        if not final.exists():
            return False
        changed = log.stat().st_mtime if log.exists() else 0.0
        # in copies of a run the times of the two files are no longer in order
        return final.stat().st_mtime > changed - 2 or time.time() - changed > 60

    def look(self) -> int:
        """Read what is new in the log, from which record on; a ValueError if what was asked for is not among it."""
        new = self.log.read()
        records = self.log.records
        there = {name: None for record in records for name in [*record["measurements"], *record]}
        there = {name: None for name in there if name not in ("step", "measurements")}
        there |= {name: None for name, _ in self.run.config.get("training", {}).get("diagnostics", [])}
        lacking = [name for name in self.asked if records and name not in there]
        if lacking:
            raise ValueError(f"{self.run.path} has no {', '.join(lacking)}; it has {', '.join(there)}")
        return new

    def names(self) -> list[str]:
        """What is shown."""
        if self.asked:
            return list(self.asked)
        seen = {name: None for record in self.log.records for name in record["measurements"]}
        logged = {name for record in self.log.records[:1] for name in record if name == "batch_loss"} - {"loss"}
        known = [name for name in KEY if name in seen or (name in logged and "loss" not in seen)]
        return known + [name for name in seen if name not in known][: max(0, COLUMNS - len(known))]

    def head(self) -> str:
        return _row(["step", *(self._title(name) for name in self.names()), "seconds"])

    def line(self, record: dict[str, Any]) -> str:
        names = self.names()
        cells = [
            str(record["step"]),
            *(self._cell(name, record) for name in names),
            f"{record.get('seconds') or 0:.3g}",
        ]
        return _row(cells, [len(title) for title in ["step", *map(self._title, names), "seconds"]])

    def state(self) -> str:
        """Where the run stands."""
        if not self.log.records:
            return f"{'ended without records' if self.ended else 'no records yet'} ({self.where})"
        last = self.log.records[-1]
        of = f" of {self.steps}" if self.steps else ""
        age = time.time() - self.log.file.stat().st_mtime
        state = "ended" if self.ended else f"last record {_duration(age)} ago"
        spent = sum(record.get("seconds") or 0.0 for record in self.log.records)
        count = f"{len(self.log.records)} record{'s' * (len(self.log.records) > 1)}"
        return f"step {last['step']}{of}, {state}; {count}, {_duration(spent)} of measuring ({self.where})"

    def summary(self) -> list[str]:
        """The state, and the history of each quantity with its last value."""
        found = []
        for name in self.names():
            history = [(r, v) for r in self.log.records if (v := self._value(name, r)) is not None]
            if history:
                values = [v for _, v in history]
                ends = f"{min(values):.4g} to {max(values):.4g}"
                found.append((self._title(name), _bars(values), self._cell(name, history[-1][0]), ends))
        width = [max((len(row[i]) for row in found), default=0) for i in range(4)]
        lines = [f"{a:<{width[0]}}  {b:<{width[1]}}  {c:>{width[2]}}   {d}" for a, b, c, d in found]
        return [self.state(), *lines]

    def frame(self, recent: int = 1) -> list[str]:
        """The summary under the last records."""
        records = self.log.records[-recent:]
        return [*([self.head(), *map(self.line, records), ""] if records else []), *self.summary()]

    def _title(self, name: str) -> str:
        for record in reversed(self.log.records):
            if (limit := self._limit(name, record)) is not None:
                return f"{name} (of {limit[1]})"
        return name

    def _cell(self, name: str, record: dict[str, Any]) -> str:
        value, limit = self._value(name, record), self._limit(name, record)
        if value is None:
            return "-" if name in record["measurements"] else ""
        return f"{value:.4g}" + (f" ({value / limit[0]:.2f})" if limit else "")

    def _value(self, name: str, record: dict[str, Any]) -> float | None:
        """A quantity as one number: of a curve the entry of the batch size of training, or the first."""
        m = record["measurements"].get(name)
        if m is None:
            number = record.get(name)
            return number if isinstance(number, int | float) else None
        value = m["value"]
        if isinstance(value, list) and value:
            axis, coordinates = m["axis"]
            trained = axis == "batch_size" and self.batch_size in coordinates
            return value[coordinates.index(self.batch_size) if trained else 0]
        return value if isinstance(value, int | float) else None

    def _limit(self, name: str, record: dict[str, Any]) -> tuple[float, str] | None:
        """What a curvature is compared with, and its name."""
        found, adaptive = limit(record, self.optimizer), self.optimizer.get("name") in ADAPTIVE
        if found is None:
            return None
        threshold, what = found[0], "2/lr" if found[1] == "2/lr" else "threshold"
        if name == ("preconditioned_sharpness" if adaptive else "sharpness") or (
            name == "instability" and not adaptive
        ):
            return threshold, what
        rho = self._value("gradient_concentration", record)
        if name == "interaction_sharpness" and rho and not adaptive:
            return rho * threshold, "2ρ_b/lr" if what == "2/lr" else "ρ_b·threshold"
        return None


def _row(cells: Sequence[str], widths: Sequence[int] | None = None) -> str:
    widths = [len(cell) for cell in cells] if widths is None else widths
    return "  ".join(files.printable(cell).rjust(max(10, width)) for cell, width in zip(cells, widths, strict=True))


def _bars(values: Sequence[float], count: int = BARS) -> str:
    """A history as a line of bars, each the mean of so many values; from the smallest to the largest."""
    count = min(count, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, span = min(means), max(means) - min(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (x - low) / span) if span > 0 else 0] for x in means)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
