"""Files: written whole, by one process at a time; and read on the assumption that someone else made them."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import pickle
import re
import socket
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
JSON_LIMIT = 16 << 20  # bytes of a configuration or of one record
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
# Control characters and marks that turn the direction of text: a terminal obeys them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text with its control characters written out, as a terminal can show it.

    Example:
        >>> printable("a" + chr(27) + "[2J")
        'a\\\\x1b[2J'
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


# Writing


def write_whole(file: Path, content: bytes) -> Path:
    """Write to a temporary file first, so that the file is whole or absent; a link in its place is replaced, not followed.

    Raises:
        OSError: it cannot be written, such as for lack of space; what was there before still is.
    """
    temporary = file.with_name(file.name + ".tmp")
    try:
        with contextlib.suppress(FileNotFoundError):  # of a process that was killed
            temporary.unlink()
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o644), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):  # the space is needed
            temporary.unlink()
        raise
    return file


_held: set[int] = set()


def _let_go() -> None:
    for held in _held:
        os.close(held)
    _held.clear()


if hasattr(os, "register_at_fork"):  # a loader's worker must not keep the lock of a parent that died
    os.register_at_fork(after_in_child=_let_go)


def lock(folder: Path, what: str = "a run") -> int | None:
    """Hold a folder, in which the file `.lock` then names this process and its machine; give the result to `unlock`.

    A process that dies lets go of it: the next one takes it over and says so on standard error.

    Raises:
        ValueError: another process holds it.
    """
    if fcntl is None:
        return None
    held = open_no_link(folder / LOCK, os.O_RDWR | os.O_CREAT)
    owner = re.match(rb"(\d+) (\S+)", os.pread(held, 300, 0))
    pid, host = (int(owner[1]), printable(owner[2].decode(errors="replace"))) if owner else (0, "")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = False
    except BlockingIOError:
        taken = True
    except OSError:  # a file system without locks: what the file says must do
        taken = bool(owner) and (host != socket.gethostname() or _alive(pid))
    if taken:
        os.close(held)
        who = f"process {pid} on {host}" if owner else "another process"
        raise ValueError(
            f"{folder} is being written by {who}; wait until it has ended, or choose another folder. "
            f"(If it has ended, delete {folder / LOCK}.)"
        )
    if owner:
        print(f"curvlab: {folder}: process {pid} on {host} died while it wrote {what}; taken over", file=sys.stderr)
    with contextlib.suppress(OSError):  # a full disk does not unlock
        os.ftruncate(held, 0)
        os.pwrite(held, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    _held.add(held)
    return held


def unlock(held: int | None) -> None:
    """Let go of a folder."""
    if held is not None and held in _held:
        _held.remove(held)
        os.ftruncate(held, 0)
        os.close(held)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def open_no_link(file: Path, flags: int) -> int:
    """A file descriptor for writing to a file that is no link to somewhere else.

    Raises:
        ValueError: it is a link, or no file.
        OSError: as `os.open`.
    """
    try:
        opened = os.open(file, flags | NO_LINK | getattr(os, "O_NONBLOCK", 0), 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ValueError(f"{file} is {_kind(os.lstat(file).st_mode)}, expected a file; delete it") from None
        raise
    if not stat.S_ISREG(mode := os.fstat(opened).st_mode):
        os.close(opened)
        raise ValueError(f"{file} is {_kind(mode)}, expected a file; delete it")
    return opened


# Reading


def open_file(file: Path) -> BinaryIO:
    """A regular file, opened for reading: a pipe would be waited for, and a device may have no end.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    try:
        opened = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG):
            raise ValueError(f"{file} is no file that can be read ({error.strerror}); expected a file") from None
        raise
    if not stat.S_ISREG(mode := os.fstat(opened).st_mode):
        os.close(opened)
        raise ValueError(f"{file} is {_kind(mode)}, expected a file")
    return open(opened, "rb")


def read_file(file: Path, limit: int) -> bytes:
    """All of a regular file of at most `limit` bytes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else, or larger.
    """
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise ValueError(f"{file} has {size} bytes, expected at most {limit}; it is another file, or damaged")
        return stream.read(limit)


def lines(stream: BinaryIO, file: Path) -> Iterator[bytes]:
    """Lines with their ends, the last perhaps without.

    Raises:
        ValueError: one is longer than a record can be.
    """
    while line := stream.readline(JSON_LIMIT + 1):
        if len(line) > JSON_LIMIT:
            raise ValueError(f"{file} has a line of more than {JSON_LIMIT} bytes; it was not written by curvlab")
        yield line


def read_json(text: bytes) -> Any:
    """JSON as curvlab writes it; control characters in its strings are written out.

    Raises:
        ValueError: something else, also what most readers let pass: NaN, infinities, numbers beyond 64 bits, keys that come
            twice; or it is nested too deep.
    """
    try:
        decoded = text.decode()
        found = json.loads(
            decoded, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite, parse_int=_integer
        )
        return _printable(found) if "\\" in decoded or _CONTROL.search(decoded) else found
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"it has {printable(twice)[:80]!r} twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"it has {text}, which is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text[:80])


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"it has the number {text[:20]}..., which is beyond 64 bits")
    return int(text)


def _printable(x: Any) -> Any:
    if isinstance(x, dict):
        return {printable(key): _printable(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_printable(value) for value in x]
    return printable(x) if isinstance(x, str) else x


def _kind(mode: int) -> str:
    kinds: dict[str, Callable[[int], bool]] = {
        "a folder": stat.S_ISDIR, "a link": stat.S_ISLNK, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK,
    }  # fmt: skip
    return next((name for name, test in kinds.items() if test(mode)), "a device")


def read_tensors(file: Path, device: str | None = "cpu") -> Any:
    """The content of a file of `torch.save`: tensors and plain values, nothing is executed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, claims more than it has, or holds something else.
    """
    import torch

    with open_file(file) as stream:
        try:
            _audit(stream)
        except Exception as error:  # whatever it takes to read a damaged archive or pickle
            why = printable(str(error) or type(error).__name__)[:300]
            raise ValueError(
                f"{file} is damaged, or was not written by torch.save ({why}); save it, or run, again"
            ) from None
        stream.seek(0)
        try:
            return torch.load(stream, map_location=device, weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(
                f"{file} holds more than tensors and plain values, such as a whole model, and is not read; save the "
                "state dict alone: torch.save(model.state_dict(), 'weights.pt')"
            ) from None
        except Exception as error:  # as above
            why = printable(str(error)).partition("\n")[0][:300]
            raise ValueError(f"{file} cannot be read ({why}); save it, or run, again") from None


def _audit(stream: BinaryIO) -> None:
    """Hold an archive against what it says of itself: torch.load sees neither a flipped byte nor a storage that is short."""
    try:
        archive = zipfile.ZipFile(stream)
    except zipfile.BadZipFile:
        raise ValueError("it is no archive of torch.save") from None
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed")
    if len(set(names)) < len(names) or sum(e.file_size for e in entries) > os.fstat(stream.fileno()).st_size:
        raise ValueError("its entries overlap")
    if damaged := archive.testzip():
        raise ValueError(damaged)
    prefix = names[0].partition("/")[0] if names else ""
    sizes = {entry.filename.removeprefix(f"{prefix}/data/"): entry.file_size for entry in entries}
    _Audit(archive.read(f"{prefix}/data.pkl"), sizes).load()


class _Inert:
    """Stands for whatever a pickle names, and does nothing."""

    itemsize = count = 0

    def __new__(cls, *args: Any, **options: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...
    def add(self, value: Any) -> None: ...


class _Tensor(_Inert):
    """A view of a storage; one number may stand for many, but not for more than memory holds."""

    def __init__(self, storage: Any = None, offset: Any = 0, size: Any = (), *args: Any) -> None:
        if isinstance(storage, _Inert) and math.prod(size) > max(storage.count, 1 << 24):
            raise ValueError(f"a tensor of {math.prod(size)} numbers has {storage.count} of them")


class _Audit(pickle._Unpickler):  # the one in C takes as much memory as an index in the pickle says
    """Walks through a pickle of torch.save without making anything of it."""

    def __init__(self, content: bytes, sizes: dict[str, int]) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "torch" and name.endswith("Storage") and hasattr(torch, name):
            size = 1 if name == "UntypedStorage" else getattr(torch, name)._dtype.itemsize
            return type("_Storage", (_Inert,), {"itemsize": size})
        return _Tensor if name.startswith("_rebuild_tensor") else _Inert

    def persistent_load(self, pid: Any) -> _Inert:
        _, kind, key, _, count = pid
        if not (isinstance(count, int) and 0 <= count * kind.itemsize <= self.sizes.get(key, -1)):
            raise ValueError(f"a tensor claims {count} numbers and has {self.sizes.get(key, 0)} bytes")
        storage = _Inert()
        storage.count = count
        return storage
