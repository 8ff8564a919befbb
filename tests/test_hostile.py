"""Files that someone else made: configurations, logs, checkpoints, data sets and whole run folders.

Behaviour only: each is refused by name with a documented error, or read; nothing is run, nothing is written elsewhere, and
neither time nor memory goes beyond what the file's own size explains. Flipped bits of formats without checksums (pixels,
digits of a log) may be read as other data of the right shape and range, which no reader can tell.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_problems import READERS

import curvlab as cl
from curvlab import claims, files, runs, tables
from curvlab.cli import main
from curvlab.problems import formats
from curvlab.problems.registry import DATA
from curvlab.report import report
from curvlab.runs import Run

FEW_AND_MANY = pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.slow)])
LIMITS = {"seconds": 120, "mebibytes": 600}  # per read, and over all of a test; some terabytes are claimed below


# What a reader does beside reading

_watched: list[Path] = []
_seen: list[str] = []


def _audit(event: str, arguments: tuple) -> None:
    if not _watched:
        return
    if event == "subprocess.Popen" and arguments[1][0] == "git":  # where curvlab comes from
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
        _seen.append(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        file = Path(os.path.abspath(os.fsdecode(arguments[0])))
        follows = not arguments[2] & (os.O_NOFOLLOW | os.O_EXCL)
        place = Path(os.path.realpath(file if follows else file.parent)) / ("" if follows else file.name)
        if not any(place.is_relative_to(folder) for folder in _watched):
            _seen.append(f"wrote {place}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def harmless(folder: Path):
    """Fails if what is inside runs something, writes outside of the folder, hangs, or takes memory beyond the limit."""

    def hangs(*_):
        raise AssertionError(f"it takes longer than {LIMITS['seconds']} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _watched[:], _seen[:] = [Path(os.path.realpath(folder)), Path("/dev")], []
    old = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LIMITS["seconds"])
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        _watched.clear()
    assert _seen == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LIMITS["mebibytes"] * 1024


@pytest.mark.parametrize("harm", ["writes", "runs", "takes memory"])
def test_the_watch_sees_what_is_done(tmp_path, monkeypatch, harm):
    monkeypatch.setitem(LIMITS, "mebibytes", 50)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    act = {
        "writes": lambda: (tmp_path / "other").write_text(""),
        "runs": lambda: subprocess.run(["true"]),
        "takes memory": lambda: np.zeros(before * 1024 + (100 << 20), np.uint8).fill(1),
    }[harm]
    with pytest.raises(AssertionError), harmless(tmp_path / "folder"):
        act()


# Runs


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "good"
    train(folder)
    return folder


def train(folder: Path, resume: bool = False, lr: float = 0.1) -> list[int]:
    torch.manual_seed(0)
    model = cl.problems.mlp((64, 4, 10))
    L = cl.Objective(model, "cross_entropy", cl.problems.digits(32)[0])
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    names = ["loss", "sharpness", ("hessian_eigenvalues", {"k": 2}), "interaction_sharpness"]
    steps = cl.train(L, sgd, cl.Batches(32, 8, 6), diagnostics=names, run=folder, checkpoint_every=2, resume=resume)
    return [at.step for at in steps]


@pytest.fixture
def copied(good, tmp_path) -> Path:
    return copy_of(good, tmp_path)


def copy_of(folder: Path, place: Path) -> Path:
    target = place / "run"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def read_all(folder: Path) -> None:
    """What readers of a run look at, figures aside."""
    run = Run(folder)
    for name in run.names:
        run.series(name).interval()
    for key in ("lr", "seconds", "threshold"):
        run.column(key)
    tables.table(run)
    tables.table(run, wide=True)
    claims.check([run])
    runs.read_result(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        assert main(["watch", str(folder), "--once"]) in (0, 2)
    assert "Traceback" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


REFUSALS = (ValueError, FileNotFoundError, KeyError)  # as documented by Run, series and load


def read_or_refused(read, folder: Path, *names: str) -> str:
    """What the reader said; empty where it read."""
    with harmless(folder):
        try:
            read()
            return ""
        except REFUSALS as error:
            text = str(error)
    assert text
    assert any(name in text for name in names), f"the file is not named: {text}"
    assert len(text) < 3000
    assert files.printable(text) == text
    return text


def test_a_good_run_is_read(copied):
    assert read_or_refused(lambda: read_all(copied), copied) == ""


DEEP = 100_000
CONFIGURATIONS = {
    "nan": ('{"training": {"lr": NaN}}', "it has NaN, which is no number"),
    "infinity": ('{"training": {"lr": 1e999}}', "it has 1e999, which is no number"),
    "long integer": ('{"seed": 1' + "0" * 5000 + "}", "beyond 64 bits"),
    "twice": ('{"training": {"lr": 1, "lr": 2}}', "it has 'lr' twice"),
    "deep": ("[" * DEEP + "]" * DEEP, "nested too deep"),
    "deep objects": ('{"a":' * DEEP + "1" + "}" * DEEP, "nested too deep"),
    "no object": ("[1, 2]", "it is a list, expected an object"),
    "other types": ('{"training": [1]}', "training is a list"),
    "text for a number": ('{"training": {"lr": "fast"}}', "lr is a str"),
    "not text": (b"\xff\xfe\x00", "codec can't decode"),
    "empty": ("", "Expecting value"),
    "binary": (bytes(range(256)) * 4, "codec can't decode"),
    "large": ('{"a": "' + "x" * runs.JSON_LIMIT + '"}', "expected at most 16777216"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations_that_are_none(copied, case):
    content, message = CONFIGURATIONS[case]
    (copied / runs.CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())
    text = read_or_refused(lambda: Run(copied), copied, str(copied / runs.CONFIG))
    assert message in text
    assert main(["claims", str(copied)]) == main(["plot", str(copied)]) == 2
    with pytest.raises(ValueError, match=r"config\.json is not readable JSON"):
        train(copied, resume=True)


def test_many_keys_are_read_or_refused_in_few_words(copied):
    config = json.loads((copied / runs.CONFIG).read_text())
    config["training"] |= {f"k{i}": i for i in range(50_000)}
    (copied / runs.CONFIG).write_text(json.dumps(config))
    with harmless(copied):
        assert len(Run(copied).config["training"]) > 50_000
        with pytest.raises(ValueError, match=r"made with other settings \(k0 was 0 and is None; k1") as told:
            train(copied, resume=True)
    assert len(str(told.value)) < 3000
    with pytest.raises(
        ValueError, match=r"the configuration of .*new has 1\d+ bytes, expected at most 16777216; leave"
    ):
        Run.create(copied.parent / "new", {"x": "x" * (17 << 20)})
    assert not (copied.parent / "new").exists()


GOOD_ENTRY = {"value": 1.0, "error": 0.0, "kind": "exact"}
LINES = {
    "gigantic": (b"x" * (runs.JSON_LIMIT + 10) + b"\n", "a line of more than 16777216 bytes"),
    "no json": (b"hello\n", "Expecting value"),
    "zeros": (bytes(1000) + b"\n", "Expecting value"),
    "a list": (b"[]\n", "it is a list, expected an object"),
    "no step": ({"measurements": {}}, "step is None, expected a whole number"),
    "negative step": ({"step": -1, "measurements": {}}, "step is -1"),
    "large step": ({"step": 2**63, "measurements": {}}, "step is 9223372036854775808"),
    "no measurements": ({"step": 0}, "measurements is None"),
    "no value": ({"step": 0, "measurements": {"loss": {"error": 0, "kind": "exact"}}}, "loss has no value"),
    "a name for a value": ({"step": 0, "measurements": {"loss": GOOD_ENTRY | {"value": "x"}}}, "value of loss is 'x'"),
    "another kind": ({"step": 0, "measurements": {"loss": GOOD_ENTRY | {"kind": "sure"}}}, "the kind of loss is 'sure'"),
    "a list for a kind": ({"step": 0, "measurements": {"loss": GOOD_ENTRY | {"kind": []}}}, "the kind of loss is []"),
    "a bare list": ({"step": 0, "measurements": {"loss": GOOD_ENTRY | {"value": [1]}}}, "value of loss is [1]"),
    "a short axis": (
        {"step": 0, "measurements": {"s": GOOD_ENTRY | {"value": [1, 2], "axis": ["k", [1]]}}}, "value of s is [1, 2]",
    ),
    "no axis": ({"step": 0, "measurements": {"s": GOOD_ENTRY | {"axis": 3}}}, "the axis of s is 3"),
    "a note": ({"step": 0, "measurements": {"s": GOOD_ENTRY | {"note": 3}}}, "the note of s is 3"),
    "text for a rate": ({"step": 0, "lr": "x", "measurements": {}}, "lr is 'x', expected a number"),
    "twice": (b'{"step":1,"step":2,"measurements":{}}\n', "it has 'step' twice"),
    "nan": (b'{"step":1,"lr":NaN,"measurements":{}}\n', "it has NaN"),
    "deep": (b'{"step":1,"measurements":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}\n", "nested too deep"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_lines_that_are_no_records(copied, case):
    content, message = LINES[case]
    raw = content if isinstance(content, bytes) else json.dumps(content).encode() + b"\n"
    log = copied / runs.LOG
    whole = log.read_bytes()
    log.write_bytes(whole + raw + whole)
    text = read_or_refused(lambda: Run(copied).records, copied, str(log))
    assert message in text
    assert "gigantic" in case or "line 7 of" in text
    for command in (["export"], ["claims"], ["watch", "--once"], ["report"]):
        with harmless(copied):
            assert main([command[0], str(copied), *command[1:]]) == 2


# Files of another type


@pytest.mark.parametrize("name", [runs.CONFIG, runs.LOG, "final.pt", "checkpoint.pt", files.LOCK, runs.RESULT])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "dangling"])
def test_files_of_another_type_are_refused_and_never_waited_for(copied, name, kind):
    file = copied / name
    file.unlink(missing_ok=True)
    {
        "folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "device": lambda: file.symlink_to("/dev/zero"),
        "loop": lambda: file.symlink_to(file), "dangling": lambda: file.symlink_to(copied.parent / "elsewhere"),
    }[kind]()  # fmt: skip
    read_or_refused(lambda: [read_all(copied), Run(copied).load("final")], copied, str(copied))
    read_or_refused(lambda: train(copied, resume=True), copied, str(copied))
    assert [entry.name for entry in copied.parent.iterdir()] == ["run"]


def test_links_in_a_run_folder_lead_no_writing_out_of_it(copied, tmp_path_factory):
    """What is appended, truncated, saved, drawn or reported stays in the folder."""
    outside = tmp_path_factory.mktemp("outside")
    names = [
        runs.LOG, files.LOCK, "config.json.tmp", "checkpoint.pt", "checkpoint.pt.tmp", "final.pt.tmp", "report.html",
        "report.html.tmp", "edge_of_stability.png", "edge_of_stability.pdf", "quantities.png", "quantities.pdf.tmp",
    ]  # fmt: skip
    for name in names:
        (outside / name).write_bytes((copied / name).read_bytes() if (copied / name).exists() else b"precious")
    before = {file.name: file.read_bytes() for file in outside.iterdir()}
    (copied / "final.pt").unlink()
    for name in names:
        (copied / name).unlink(missing_ok=True)
        (copied / name).symlink_to(outside / name)
    with harmless(copied):
        report(Run(copied))
        figure, _ = cl.plots.axes_of(1, 1, figsize=(2, 2))
        cl.plots.save({copied / name: figure for name in ("edge_of_stability", "quantities")})
        for link in (files.LOCK, runs.LOG):
            with pytest.raises(ValueError, match=rf"{link} is a link, expected a file; delete it"):
                train(copied, resume=True)
            (copied / link).unlink()
            if link == runs.LOG:
                (copied / link).write_bytes(before[link])
        train(copied, resume=True)
    assert {file.name: file.read_bytes() for file in outside.iterdir()} == before
    assert not (copied / "report.html").is_symlink()
    assert not (copied / "checkpoint.pt").is_symlink()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "", "..", ".hidden", "a\0b", "a\x1b[2J"])
def test_names_are_no_paths(copied, name):
    run = Run(copied)
    with harmless(copied):
        for act in (run.load, lambda name: run.save(name, {"w": torch.ones(2)})):
            with pytest.raises(ValueError, match=r"the name is .* expected letters, digits and .* and no folder"):
                act(name)


# Checkpoints


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return buffer.getvalue()


def entries_of(content: dict) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(runs.packed(content))) as made:
        return {name: made.read(name) for name in made.namelist()}


def claiming(count: int) -> bytes:
    """A checkpoint whose storage is said to have so many numbers."""
    entries = entries_of({"w": torch.arange(12345.0)})
    (name,) = (name for name in entries if name.endswith("data.pkl"))
    small = b"M" + (12345).to_bytes(2, "little")
    assert small in entries[name]
    entries[name] = entries[name].replace(small, b"\x8a\x08" + count.to_bytes(8, "little", signed=True))
    return archive(entries)


def overlapping() -> bytes:
    """Entries that share their bytes, as bombs have them."""
    raw = archive({"a/data.pkl": pickle.dumps({}), "a/data/0": b"x" * 1000})
    at = raw.rindex(b"PK\x01\x02")
    size = struct.pack("<II", 5000, 5000)
    return raw[: at + 20] + size + raw[at + 28 :]


LONG_STRING = b"\x80\x04\x8e" + (10**13).to_bytes(8, "little") + b"."
CHECKPOINTS = {
    "executes": (lambda marker: runs.packed({"w": Runs(marker)}), "is not read"),
    "a plain pickle": (lambda marker: pickle.dumps(Runs(marker)), "it is no archive of torch.save"),
    "an old pickle": (lambda marker: pickle.dumps(Runs(marker), 0), "it is no archive"),
    "a bomb": (lambda _: archive({"a/data.pkl": bytes(1 << 24)}, zipfile.ZIP_DEFLATED), "its entries are compressed"),
    "overlaps": (lambda _: overlapping(), "overlap"),
    "terabytes": (lambda _: claiming(10**12), "a tensor claims 1000000000000 numbers and has 49380 bytes"),
    "a little more": (lambda _: claiming(12346), "a tensor claims 12346 numbers and has 49380 bytes"),
    "negative": (lambda _: claiming(-1), "a tensor claims -1 numbers"),
    "one for many": (lambda _: runs.packed({"w": torch.ones(1).expand(10**12)}), "a tensor of 1000000000000 numbers has 1 "),
    "a memo of terabytes": (
        lambda _: archive({"a/data.pkl": b"\x80\x02}r\xff\xff\xff\x7f.", "a/version": b"3"}), "",
    ),
    "a string of terabytes": (lambda _: archive({"a/data.pkl": LONG_STRING}), ""),
    "no pickle in it": (lambda _: archive({"a/b": b""}), "There is no item named"),
    "leads out": (lambda _: archive({"../../data.pkl": pickle.dumps({})}), ""),
    "empty": (lambda _: b"", "no archive"),
    "no entries": (lambda _: archive({}), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_that_are_none(copied, case, monkeypatch):
    make, message = CHECKPOINTS[case]
    marker = copied.parent / "executed"
    for name in ("final", "checkpoint"):
        (copied / f"{name}.pt").write_bytes(make(marker))
        text = read_or_refused(lambda: Run(copied).load(name), copied, str(copied / f"{name}.pt"))  # noqa: B023
        assert message in text
        assert text or case == "a memo of terabytes"  # which is an empty dictionary
    said = read_or_refused(lambda: train(copied, resume=True), copied, str(copied))
    assert said or case == "a memo of terabytes"
    assert not marker.exists()


FOREIGN = {
    "of another model": lambda state: state["model"].popitem(),
    "of another shape": lambda state: state["model"].update({next(iter(state["model"])): torch.ones(3)}),
    "without a part": lambda state: state.pop("optimizer"),
    "with text for a step": lambda state: state.update(step="three"),
    "with text for a size": lambda state: state.update(log_size="all"),
    "with nothing for random states": lambda state: state.update(random=None),
    "with a list for a state": lambda state: state.update(model=[1, 2]),
    "without a setting of the optimizer": lambda state: state["optimizer"]["param_groups"][0].pop("momentum"),
    "with a long text for a step": lambda state: state.update(step="\x1b[2J" * 10**5),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_checkpoints_of_something_else(copied, case):
    (copied / "final.pt").unlink()
    state = Run(copied).load("checkpoint")
    FOREIGN[case](state)
    (copied / "checkpoint.pt").write_bytes(runs.packed(state))
    log = (copied / runs.LOG).read_bytes()
    text = read_or_refused(lambda: train(copied, resume=True), copied, str(copied))
    assert "final.pt and checkpoint.pt" in text
    assert "delete both files to start again" in text
    assert len(text) < 3000
    assert (copied / runs.LOG).read_bytes() == log
    with Path(copied / files.LOCK).open() as lock:
        assert lock.read() == ""  # it can be resumed at once
    (copied / "checkpoint.pt").unlink()
    assert train(copied, resume=True) == list(range(6))


# What is shown


EVIL = "<script>alert(1)</script>\"'&\x1b]0;owned\x07\x1b[2J\u202e$\\frac{$"


def hostile_strings(folder: Path) -> None:
    """A run in which every string that someone else may have written is hostile."""
    config = json.loads((folder / runs.CONFIG).read_text())
    config |= {"note": EVIL, EVIL: {"deep": [EVIL]}, "data": EVIL}
    config["provenance"]["command"] = [EVIL]
    (folder / runs.CONFIG).write_text(json.dumps(config))
    lines = []
    for line in (folder / runs.LOG).read_text().splitlines():
        record = json.loads(line)
        record["measurements"][EVIL] = record["measurements"]["loss"] | {"note": EVIL}
        record[EVIL] = 1.0
        curve = record["measurements"]["hessian_eigenvalues"]
        record["measurements"]["curve" + EVIL] = curve | {"axis": [EVIL, [EVIL, 2]]}
        lines.append(json.dumps(record))
    (folder / runs.LOG).write_text("\n".join(lines) + "\n")


def test_reports_and_terminals_show_hostile_strings_as_text(copied, capsys):
    folder = copied.rename(copied.with_name("<img src=x onerror=1>\x1b[31m$x"))
    hostile_strings(folder)
    with harmless(folder.parent):
        page = report(Run(folder)).read_text()
        for arguments in (
            ["claims", str(folder), "--all"], ["claims", str(folder), "--json"], ["export", str(folder)],
            ["export", str(folder), "--wide"], ["watch", str(folder), "--once"], ["plot", str(folder)],
            ["plot", str(folder), "--bands", "--quantities", files.printable(EVIL)],
            ["plot", str(folder), "--quantities", "no\x1b[2J"], ["export", str(folder / "no\x1b[2J")],
        ):  # fmt: skip
            assert main(arguments) in (0, 2), arguments
            out, err = capsys.readouterr()
            shown = out + err
            assert "Traceback" not in shown
            assert shown == "".join(c for c in shown if files.printable(c) == c), arguments
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page
    assert files.printable(page) == page


# Data sets


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    made = {}
    for name, (write, shape, _) in READERS.items():
        made[name] = tmp_path_factory.mktemp(name)
        parts = [(rng.integers(0, 256, (5, *shape), dtype=np.uint8), np.sort(rng.integers(0, 10, 5))) for _ in range(2)]
        write(made[name], *parts)
    return made


def load_data(name: str, folder: Path) -> None:
    (x, y), (x_test, y_test) = DATA[name](folder=folder, standardize="none")
    shape = READERS[name][1]
    for images, labels in ((x, y), (x_test, y_test)):
        assert images.shape == (len(labels), *shape)
        assert bool(torch.isfinite(images).all())
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        assert labels.dtype == torch.int64
        assert bool(((labels >= 0) & (labels < 100)).all())


def idx(shape: tuple[int, ...], content: bytes, *, size: int | None = None) -> bytes:
    header = b"\0\0\x08" + bytes([size or len(shape)]) + b"".join(struct.pack(">I", n) for n in shape)
    return gzip.compress(header + content)


def bomb(start: bytes, mebibytes: int) -> bytes:
    """Zeros that unpack to a thousand times their size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(start)]
    parts += [packer.compress(bytes(1 << 20)) for _ in range(mebibytes)]
    return b"".join([*parts, packer.flush()])


def array_of(shape: tuple[int, ...], state: bool = True) -> bytes:
    """A pickle of an array that says to have a shape; without a state it would be what the memory holds."""
    numbers = b"".join(b"\x8a\x08" + n.to_bytes(8, "little") for n in shape)
    made = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(" + numbers + b"tU\x01B\x87R"
        b"sU\x06labels]K\x01as."
    )
    return made if not state else made.replace(b"R", b"R", 1)


PICKLES = {
    "terabytes": array_of((10**9, 3072)),
    "what the memory holds": array_of((1, 3072)),
    "numpy called": b"\x80\x02}U\x04datacnumpy\nndarray\n(M\xe8\x03M\x00\x0ctRs.",
    "a memo of terabytes": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a string of terabytes": LONG_STRING,
    "executes": b"cos\nmkdir\n(S'executed'\ntR.",
    "a module's attribute": b"\x80\x04\x8c\x05numpy\x8c\x0bload.__doc__\x93.",
    "labels of fractions": pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [1.5]}, 2),
    "ragged labels": pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [[1], [1, 2]]}, 2),
    "text for labels": pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": "12"}, 2),
    "no labels": pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": None}, 2),
    "floats": pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}, 2),
    "odd keys": pickle.dumps({"data": 3, (1, 2): 4, "\x1b[2J": 1}, 2),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_are_no_data_set(data_sets, tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copy_tree(data_sets["cifar10"], tmp_path)
    file = folder / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(PICKLES[case])
    assert read_or_refused(lambda: load_data("cifar10", folder), folder, str(file))
    assert not (tmp_path / "executed").exists()


def copy_tree(source: Path, place: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, place / "data"))


IDX = {
    "terabytes": (idx((2**31, 2**10, 28), b"x"), "states the shape"),
    "terabytes of images": (idx((2**31, 28, 28), b"x"), "expected 1683627180032"),
    "a bomb": (bomb(b"\0\0\x08\x03" + struct.pack(">III", 2**22, 28, 28), 1100), "unpacks to more than 1073741824"),
    "many dimensions": (idx((1,) * 200, b"x"), "states the shape"),
    "of another shape": (idx((5, 14, 56), bytes(5 * 784)), "states the shape (5, 14, 56), expected"),
    "damaged inside": (gzip.compress(bytes(2000))[:12] + b"\xff" * 30, "cannot be unpacked"),
    "not packed": (b"\0\0\x08\x03", "cannot be unpacked"),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c == "a bomb" else c for c in IDX])
def test_idx_files_that_claim_more_than_they_have(data_sets, tmp_path, case, monkeypatch):
    content, message = IDX[case]
    folder = copy_tree(data_sets["fashion_mnist"], tmp_path)
    file = folder / "fashion-mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(content)
    monkeypatch.setitem(LIMITS, "mebibytes", 3200 if case == "a bomb" else LIMITS["mebibytes"])
    assert message in read_or_refused(lambda: load_data("fashion_mnist", folder), folder, str(file))


def test_bombs_are_refused_at_the_limit(tmp_path, monkeypatch):
    """As above, with a small limit."""
    from scipy.io import savemat

    monkeypatch.setattr(formats, "LIMIT", 1 << 20)
    (tmp_path / "x.gz").write_bytes(bomb(b"\0\0\x08\x01" + struct.pack(">I", 2**22), 4))
    with pytest.raises(ValueError, match=r"x\.gz unpacks to more than 1048576 bytes"):
        formats.read_idx(tmp_path / "x.gz")
    savemat(tmp_path / "x.mat", {"X": np.zeros((1 << 21), np.uint8)}, do_compression=True)
    with pytest.raises(ValueError, match=r"x\.mat cannot be read .*it unpacks to more than 1048576 bytes"):
        formats.read_matlab(tmp_path / "x.mat")
    (tmp_path / "x.bin").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(ValueError, match=r"x\.bin has 1048577 bytes, expected at most 1048576"):
        formats.read_bytes(tmp_path / "x.bin", (-1,))


def test_images_that_claim_more_than_they_have(data_sets, tmp_path):
    from PIL import Image

    folder = copy_tree(data_sets["tiny_imagenet"], tmp_path)
    image = next(folder.glob("tiny-imagenet-200/val/images/*.JPEG"))
    whole = image.read_bytes()
    at = whole.index(b"\xff\xc0") + 5
    png = io.BytesIO()
    Image.new("RGB", (64, 64)).save(png, "PNG")
    for content, message in (
        (whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :], "cannot be read as an image"),
        (whole[:at] + b"\x10\x00\x10\x00" + whole[at + 4 :], "has 4096x4096 pixels, expected 64x64"),
        (png.getvalue(), "cannot be read as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "cannot be read as an image"),
    ):
        image.write_bytes(content)
        assert message in read_or_refused(lambda: load_data("tiny_imagenet", folder), folder, str(image))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_data_of_another_type_are_refused(data_sets, tmp_path, name, kind):
    folder = copy_tree(data_sets[name], tmp_path)
    file = max(
        (f for f in folder.rglob("*") if f.is_file()), key=lambda f: ("val" in str(f), f.suffix == ".JPEG", f.name)
    )
    file.unlink()
    {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "device": lambda: file.symlink_to("/dev/zero")}[kind]()
    assert read_or_refused(lambda: load_data(name, folder), folder, str(folder))


def test_data_sets_do_not_lead_out_of_their_folder(data_sets, tmp_path):
    folder = copy_tree(data_sets["tiny_imagenet"], tmp_path)
    home = folder / "tiny-imagenet-200"
    notes = home / "val" / "val_annotations.txt"
    rows = notes.read_text().splitlines()
    notes.write_text("\n".join(["../../../secret.JPEG" + rows[0][rows[0].index("\t") :], *rows[1:]]))
    assert "does not name each of" in read_or_refused(lambda: load_data("tiny_imagenet", folder), folder, str(notes))
    notes.write_text("\n".join(rows))
    names = (home / "wnids.txt").read_text().split()
    (home / "wnids.txt").write_text("\n".join(["../../..", *names[1:]]))
    assert "are not the same" in read_or_refused(lambda: load_data("tiny_imagenet", folder), folder, str(home))


# Fuzz


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """The bytes, damaged in one way or two."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(data) + 1)
        span = rng.choice((1, 2, 4, 8, 64, 1024))
        match rng.randrange(8):
            case 0:
                del data[at:]
            case 1 | 2 if data:
                for _ in range(rng.choice((1, 4))):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 3:
                data[at : at + span] = rng.randbytes(span)
            case 4:
                del data[at : at + span]
            case 5:
                data[at:at] = data[max(0, at - span) : at]
            case 6:
                data[at : at + span] = rng.choice((b"\xff", b"\0", b"\x7f", b"{", b"["))[:1] * span
            case _:
                data = (
                    bytearray(rng.randbytes(rng.randrange(200))) if rng.random() < 0.1 else data + rng.randbytes(span)
                )
    return bytes(data)


STRANGE = [
    None, True, -1, 0, 2**63, 2**64, 10**30, 0.5, -1e308, 1e308, "", "../../x", EVIL, "x" * 5000, [], {}, [[]], [1, "a"],
    {"a": {}}, [None], {"value": None},
]  # fmt: skip


def mutated_json(raw: bytes, rng: random.Random) -> bytes:
    """JSON of another structure, or damaged bytes."""
    if rng.random() < 0.3:
        return mutated(raw, rng)
    lines = raw.split(b"\n") if b"\n{" in raw else [raw]
    i = rng.randrange(len(lines))
    if not lines[i]:
        return mutated(raw, rng)
    root = json.loads(lines[i])
    for _ in range(rng.choice((1, 1, 3))):
        place = root
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
                place = place[key]
                continue
            change = rng.randrange(4)
            if change == 0:
                del place[key]
            elif change == 1 and isinstance(place, dict):
                place[rng.choice(("x", EVIL, "step", "axis"))] = place.pop(key)
            else:
                place[key] = copy.deepcopy(rng.choice(STRANGE))
            break
    text = json.dumps(root, allow_nan=True)
    if rng.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]
    lines[i] = text.encode()
    return b"\n".join(lines)


@FEW_AND_MANY
@pytest.mark.parametrize("name", [runs.CONFIG, runs.LOG, runs.RESULT])
def test_fuzz_of_logs_and_configurations(good, tmp_path, name, count):
    folder, rng = copy_of(good, tmp_path), random.Random(name)
    (folder / runs.RESULT).write_text(json.dumps({"status": "finished", "step": 6, "final": {"test_loss": 1.0}}))
    whole, refused = (folder / name).read_bytes(), 0
    for i in range(count):
        (folder / name).write_bytes(mutated_json(whole, rng))
        with allowed_warnings():
            refused += bool(read_or_refused(lambda: read_all(folder), folder, str(folder)))
            if i % 20 == 0:
                read_or_refused(lambda: [report(Run(folder))], folder, str(folder), "nothing to draw")
    assert 0 < refused <= count


def allowed_warnings():
    import warnings

    stack = contextlib.ExitStack()
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    return stack


@FEW_AND_MANY
def test_fuzz_of_checkpoints(good, tmp_path, count):
    folder, rng = copy_of(good, tmp_path), random.Random("checkpoint")
    (folder / "final.pt").unlink()
    whole, log = (folder / "checkpoint.pt").read_bytes(), (folder / runs.LOG).read_bytes()
    refused = 0
    for i in range(count):
        content = mutated(whole, rng)
        if i % 3 == 0:  # past the archive's checksums
            entries = archive_entries(whole)
            name = rng.choice([name for name in entries if name.endswith("data.pkl")] + list(entries))
            content = archive(entries | {name: mutated(entries[name], rng)})
        (folder / "checkpoint.pt").write_bytes(content)
        refused += bool(read_or_refused(lambda: Run(folder).load("checkpoint"), folder, str(folder)))
        if i % 6 == 0:
            with allowed_warnings():
                read_or_refused(lambda: train(folder, resume=True), folder, str(folder))
            (folder / runs.LOG).write_bytes(log)
            (folder / "final.pt").unlink(missing_ok=True)
    assert count // 2 < refused <= count


def archive_entries(raw: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(raw)) as made:
        return {name: made.read(name) for name in made.namelist()}


@FEW_AND_MANY
@pytest.mark.parametrize("name", READERS)
def test_fuzz_of_data_sets(data_sets, tmp_path, name, count):
    folder, rng = copy_tree(data_sets[name], tmp_path), random.Random(name)
    places = sorted(file for file in folder.rglob("*") if file.is_file())
    refused = 0
    for _ in range(count):
        file = rng.choice(places)
        whole = file.read_bytes()
        content = mutated(whole, rng)
        if file.suffix == ".gz" and rng.random() < 0.5:  # past the checksum
            content = gzip.compress(mutated(gzip.decompress(whole), rng), 1)
        file.write_bytes(content)
        with allowed_warnings():
            refused += bool(read_or_refused(lambda: load_data(name, folder), folder, str(folder)))
        file.write_bytes(whole)
    assert refused >= count // 6
