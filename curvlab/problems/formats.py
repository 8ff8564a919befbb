"""Readers of the files in which image data sets are published. Nothing in a file is run; lengths and claims are checked."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..files import printable, read_file

LIMIT = 1 << 30  # bytes of one file, packed and unpacked; the largest that is read has 221 MB


class _Array:
    """The name of numpy's array in a pickle; called, it would make one of any size, of what the memory holds."""


def _empty(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """The start of an array, which its state then fills."""
    return np.ndarray((0,), np.uint8)


# What a pickle of numpy arrays needs; anything else in one, such as os.system, is refused.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): _empty,
}


class MissingData(FileNotFoundError):
    """A data set whose files are not there; the message says what to put where."""


def find(name: str, folder: str | os.PathLike | None, places: Sequence[str], file: str) -> Path:
    """The file of a data set in one of the usual places of a folder, by default that in the environment's DATASETS.

    Raises:
        MissingData: no folder, or no such file; the message says where it was expected.
    """
    root = folder or os.environ.get("DATASETS")
    expected = " or ".join(str(Path(place, file)) for place in places)
    help = (
        "Nothing is downloaded: get the files from the data set's home, or take synthetic_images(shape=...), images of "
        "the same shape that need none."
    )
    if not root:
        raise MissingData(
            f"{name} is read from files, and no folder is known; expected {expected} in a folder that is given as "
            f"folder=... or in the environment variable DATASETS. {help}"
        )
    for place in places:
        path = Path(root, place, file)
        if path.exists():
            return path
    raise MissingData(f"{name} is read from files; expected {expected} in {Path(root).resolve()}. {help}")


def read_pickle(path: Path) -> dict[str, Any]:
    """A dictionary of numpy arrays, lists, numbers and text, from Python 2 or 3; its keys become text.

    Raises:
        ValueError: the file is no such pickle, or names anything else, which is not run.
    """
    try:
        content = _Unpickler(io.BytesIO(read_file(path, LIMIT)), encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # whatever it takes to read a damaged pickle
        why = printable(str(error))[:200]
        raise ValueError(f"{path} is not a pickle of arrays ({why}); get the file again from its home") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary; get the file again")
    return {_text(key): value for key, value in content.items() if isinstance(key, bytes | str)}


def _text(key: bytes | str) -> str:
    return printable(key.decode(errors="replace") if isinstance(key, bytes) else key)[:80]


class _Unpickler(pickle._Unpickler):  # the one in C takes as much memory as an index in the pickle says
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _latin1
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which was not run")
        return _ALLOWED[module, name]


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def read_idx(path: Path, shape_of_one: tuple[int, ...] | None = None) -> np.ndarray:
    """An array of unsigned bytes in the IDX format of MNIST, gzipped or not.

    Args:
        shape_of_one: of an example, which the file must state.

    Raises:
        ValueError: another kind of file, one that is cut off, or one that unpacks to more than it can hold.
    """
    raw = read_file(path, LIMIT)
    try:
        if path.suffix == ".gz":
            raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); get the file again from its home") from None
    if len(raw) > LIMIT:
        raise ValueError(f"{path} unpacks to more than {LIMIT} bytes; it is another file: get it again from its home")
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} does not start as an IDX file of unsigned bytes; get the file again from its home")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", count=raw[3], offset=4))
    if shape_of_one is not None and shape[1:] != shape_of_one:
        raise ValueError(
            f"{path} states the shape {shape[:8]}, expected (n, ...) with ... = {shape_of_one}; get it again"
        )
    return _shaped(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]), shape, path)


def read_bytes(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A file of unsigned bytes as an array; the first entry of its shape may be -1.

    Raises:
        ValueError: the length does not fit.
    """
    raw = np.frombuffer(read_file(path, LIMIT), np.uint8)
    return _shaped(raw, (len(raw) // prod(shape[1:]), *shape[1:]) if shape[0] < 0 else shape, path)


def read_matlab(path: Path) -> dict[str, np.ndarray]:
    """The arrays X and y of a MATLAB file (version 5).

    Raises:
        ValueError: another kind of file, one that is cut off, or one that unpacks to more than it can hold.
    """
    from scipy.io import loadmat

    raw = read_file(path, LIMIT)
    try:
        _check_matlab(raw)
        with np.errstate(all="ignore"):
            return loadmat(io.BytesIO(raw), variable_names=["X", "y"])
    except Exception as error:  # the reader has many
        why = printable(str(error))[:200]
        raise ValueError(f"{path} cannot be read as a MATLAB file ({why}); get the file again from its home") from None


def _check_matlab(raw: bytes) -> None:
    """What the elements of a file unpack to, before memory is taken for it."""
    if len(raw) < 128 or raw[126:128] not in (b"IM", b"MI"):
        raise ValueError("it does not start as one of version 5")
    order, place, total = ("<" if raw[126:128] == b"IM" else ">"), 128, 0
    while place < len(raw):
        kind, size = np.frombuffer(raw[place : place + 8].ljust(8, b"\0"), f"{order}u4").tolist()
        if size > len(raw) - place - 8:
            raise ValueError("it is cut off")
        if kind == 15:  # compressed
            unpacker, rest = zlib.decompressobj(), raw[place + 8 : place + 8 + size]
            while rest and total <= LIMIT:
                total += len(unpacker.decompress(rest, 1 << 20))
                rest = unpacker.unconsumed_tail
        if total > LIMIT:
            raise ValueError(f"it unpacks to more than {LIMIT} bytes")
        place += 8 + size


def integers(y: Any, source: Path) -> np.ndarray:
    """Labels as int64 of shape (n,).

    Raises:
        ValueError: they are no whole numbers.
    """
    try:
        found = np.asarray(y if isinstance(y, np.ndarray) else list(y))
    except (ValueError, TypeError, OverflowError):
        found = np.empty(0, object)
    if found.dtype.kind not in "iu":
        raise ValueError(
            f"{source} has labels that are no whole numbers ({found.dtype}); get the file again from its home"
        )
    return found.astype(np.int64).reshape(-1)


def labelled(x: np.ndarray, y: np.ndarray, num_classes: int, source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images of unsigned bytes and their labels as int64, after a check that they belong together.

    Raises:
        ValueError: different numbers, another type, or labels out of range.
    """
    y = integers(y, source)
    if x.dtype != np.uint8 or len(x) != len(y) or not len(y) or y.min() < 0 or y.max() >= num_classes:
        raise ValueError(
            f"{source} holds {len(x)} images of {x.dtype} and {len(y)} labels from {y.min(initial=0)} to "
            f"{y.max(initial=0)}, expected as many images of uint8 as labels from 0 to {num_classes - 1}"
        )
    return x, y


def _shaped(raw: np.ndarray, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if raw.size != prod(shape):
        raise ValueError(
            f"{path} holds {raw.size} bytes of data, expected {prod(shape)} for {shape}: it is cut off, or another file"
        )
    return raw.reshape(shape)
