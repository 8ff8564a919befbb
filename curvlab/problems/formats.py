"""Readers of the files in which image data sets are published. Nothing in a file is run, and lengths are checked."""

from __future__ import annotations

import gzip
import io
import os
import pickle
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

# What a pickle of numpy arrays needs; anything else in one, such as os.system, is refused.
_reconstruct = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
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
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a pickle of arrays ({error}); get the file again from its home") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary; get the file again")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in content.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _latin1
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which was not run")
        return _ALLOWED[module, name]


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes in the IDX format of MNIST, gzipped or not.

    Raises:
        ValueError: another kind of file, or one that is cut off.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); get the file again from its home") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} does not start as an IDX file of unsigned bytes; get the file again from its home")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", count=raw[3], offset=4))
    return _shaped(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]), shape, path)


def read_bytes(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A file of unsigned bytes as an array; the first entry of its shape may be -1.

    Raises:
        ValueError: the length does not fit.
    """
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    return _shaped(raw, (len(raw) // prod(shape[1:]), *shape[1:]) if shape[0] < 0 else shape, path)


def read_matlab(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a MATLAB file (version 5).

    Raises:
        ValueError: another kind of file, or one that is cut off.
    """
    from scipy.io import loadmat

    try:
        return loadmat(path)
    except Exception as error:  # the reader has many
        raise ValueError(
            f"{path} cannot be read as a MATLAB file ({error}); get the file again from its home"
        ) from None


def labelled(x: np.ndarray, y: np.ndarray, num_classes: int, source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images of unsigned bytes and their labels as int64, after a check that they belong together.

    Raises:
        ValueError: different numbers, another type, or labels out of range.
    """
    y = np.asarray(y).astype(np.int64).reshape(-1)
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
