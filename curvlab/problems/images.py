"""The papers' image data sets, read from the user's files: CIFAR, STL-10, SVHN, Fashion-MNIST, Tiny ImageNet.

Every data set takes the same arguments and returns the same thing, ((x_train, y_train), (x_test, y_test)):

- ``n``: number of training examples, default all: the first n of a permutation of the training set, so that a smaller
  subset is part of every larger one (the papers do not say which examples they took); the test set is whole;
- ``subset_seed``: draws that permutation, and nothing else; replicates over ``seed`` have the same examples;
- ``folder``: where the files are, default the environment variable DATASETS; nothing is downloaded;
- ``standardize``: "channel", each channel minus its mean over the training examples that are returned, divided by its
  standard deviation; "image", the same for each image by itself; or "none", pixels from 0 to 1;
- ``label_noise``: share of training labels that is replaced by another class;
- ``seed``: draws the label noise, and nothing else;
- ``dtype``: of the images, which are (n, channels, height, width); labels are int64;

and raises a FileNotFoundError where a file is missing, and a ValueError where one is not what it should be, ``n`` or
``label_noise`` is out of range, or ``standardize`` is something else.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..files import read_file
from .data import Split, replace_labels
from .formats import LIMIT, find, integers, labelled, read_bytes, read_idx, read_matlab, read_pickle

if TYPE_CHECKING:
    from typing_extensions import Unpack

Folder = str | os.PathLike | None
Arrays = tuple[np.ndarray, np.ndarray]


class Options(TypedDict, total=False):
    """What every data set takes beside n and the folder."""

    standardize: Literal["channel", "image", "none"]
    label_noise: float
    subset_seed: int
    seed: int
    dtype: torch.dtype


def cifar10(n: int | None = None, *, folder: Folder = None, **options: Unpack[Options]) -> Split:
    """CIFAR-10: 50,000 and 10,000 images of 3x32x32 in 10 classes, from the Python version's six batches.

    Files: cifar-10-batches-py/data_batch_1 to data_batch_5 and test_batch. Default ``standardize="channel"`` (ours).

    Source: Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """

    def read(*names: str) -> Arrays:
        parts = [_cifar("cifar10", folder, "cifar-10-batches-py", name, "labels", 10) for name in names]
        return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])

    train = read(*(f"data_batch_{i}" for i in range(1, 6)))
    return _finish(train, read("test_batch"), n, num_classes=10, **options)


def cifar100(n: int | None = None, *, folder: Folder = None, **options: Unpack[Options]) -> Split:
    """CIFAR-100: 50,000 and 10,000 images of 3x32x32 in 100 classes (the fine labels), from the Python version.

    Files: cifar-100-python/train and test. Default ``standardize="channel"`` (ours).

    Source: Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """
    train, test = (
        _cifar("cifar100", folder, "cifar-100-python", part, "fine_labels", 100) for part in ("train", "test")
    )
    return _finish(train, test, n, num_classes=100, **options)


def stl10(n: int | None = None, *, folder: Folder = None, **options: Unpack[Options]) -> Split:
    """STL-10: 5,000 and 8,000 labelled images of 3x96x96 in 10 classes.

    Files: stl10_binary/train_X.bin, train_y.bin, test_X.bin, test_y.bin. Default ``standardize="channel"`` (ours).

    Source: Coates, Lee and Ng 2011, An analysis of single-layer networks in unsupervised feature learning.
    """

    def read(part: str) -> Arrays:
        x, y = (find("stl10", folder, ("stl10_binary", ""), f"{part}_{kind}.bin") for kind in "Xy")
        images = read_bytes(x, (-1, 3, 96, 96)).transpose(0, 1, 3, 2)  # stored column by column
        return labelled(images, integers(read_bytes(y, (-1,)), y) - 1, 10, x)

    return _finish(read("train"), read("test"), n, num_classes=10, **options)


def svhn(n: int | None = None, *, folder: Folder = None, **options: Unpack[Options]) -> Split:
    """SVHN, cropped digits: 73,257 and 26,032 images of 3x32x32 in 10 classes; the class is the digit.

    Files: svhn/train_32x32.mat and test_32x32.mat. Default ``standardize="channel"`` (ours).

    Source: Netzer et al. 2011, Reading digits in natural images with unsupervised feature learning.
    """

    def read(part: str) -> Arrays:
        path = find("svhn", folder, ("svhn", "SVHN", ""), f"{part}_32x32.mat")
        content = read_matlab(path)
        x = content.get("X", np.empty(0))
        if not isinstance(x, np.ndarray) or x.ndim != 4 or x.shape[:3] != (32, 32, 3) or "y" not in content:
            raise ValueError(f"{path} holds {sorted(content)}, expected X (height, width, channels, n) and y")
        y = integers(content["y"], path)
        return labelled(x.transpose(3, 2, 0, 1), np.where(y == 10, 0, y), 10, path)

    return _finish(read("train"), read("test"), n, num_classes=10, **options)


def fashion_mnist(n: int | None = None, *, folder: Folder = None, **options: Unpack[Options]) -> Split:
    """Fashion-MNIST: 60,000 and 10,000 images of 1x28x28 in 10 classes.

    Files: fashion-mnist/train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, and t10k-... for the test set.
    Default ``standardize="image"``, as Smith et al. 2021 (arXiv 2101.12176), appendix D.

    Source: Xiao et al. 2017 (arXiv 1708.07747).
    """

    def read(part: str) -> Arrays:
        places = ("fashion-mnist", "FashionMNIST/raw", "")
        x, y = (
            find("fashion_mnist", folder, places, f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
        )
        return labelled(read_idx(x, (28, 28))[:, None], read_idx(y, ()), 10, x)

    options.setdefault("standardize", "image")
    return _finish(read("train"), read("t10k"), n, num_classes=10, **options)


def tiny_imagenet(n: int | None = None, *, folder: Folder = None, **options: Unpack[Options]) -> Split:
    """Tiny ImageNet: 100,000 and 10,000 (its validation set) images of 3x64x64 in 200 classes.

    Files: the folder tiny-imagenet-200. Only the images that are asked for are decoded. Classes are numbered in the
    order of their WordNet identifiers. Default ``standardize="channel"`` (ours).

    Source: Stanford CS231n; a part of ImageNet (Deng et al. 2009).
    """
    home = find("tiny_imagenet", folder, ("tiny-imagenet-200", ""), "wnids.txt").parent
    classes = {name: k for k, name in enumerate(sorted(_words(home / "wnids.txt").split()))}
    folders = {path.name for path in home.glob("train/*")}
    if folders != set(classes):
        raise ValueError(
            f"{home}/train has {len(folders)} folders and wnids.txt {len(classes)} classes, which are not the same; get the "
            "data set again from its home"
        )
    pairs = [
        (path, k) for name, k in classes.items() for path in sorted((home / "train" / name / "images").glob("*.JPEG"))
    ]
    test_pairs = _annotated(find("tiny_imagenet", home, ("val",), "val_annotations.txt"), classes)
    train, test = (
        (np.array([str(path) for path, _ in rows]), np.array([k for _, k in rows])) for rows in (pairs, test_pairs)
    )
    return _finish(train, test, n, num_classes=len(classes), decode=_decode, **options)


def _words(file: Path) -> str:
    return read_file(file, LIMIT).decode(errors="replace")


def _annotated(notes: Path, classes: Mapping[str, int]) -> list[tuple[Path, int]]:
    """The images of the validation set and their classes, each image named once."""
    rows = [line.split("\t") for line in _words(notes).splitlines()]
    odd = [row for row in rows if len(row) < 2 or row[1] not in classes]
    files = {path.name for path in (notes.parent / "images").glob("*.JPEG")}
    if odd or sorted(row[0] for row in rows) != sorted(files):
        raise ValueError(
            f"{notes} does not name each of {len(files)} images once with a known class; get the data set again from its "
            "home"
        )
    return [(notes.parent / "images" / row[0], classes[row[1]]) for row in rows]


def _cifar(name: str, folder: Folder, place: str, file: str, labels: str, num_classes: int) -> Arrays:
    path = find(name, folder, (place, ""), file)
    content = read_pickle(path)
    data = content.get("data")
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072 or labels not in content:
        raise ValueError(
            f"{path} holds {sorted(content)}, expected data (n, 3072) and {labels}; is it the Python version?"
        )
    return labelled(data.reshape(-1, 3, 32, 32), content[labels], num_classes, path)


def _decode(paths: np.ndarray) -> np.ndarray:
    from PIL import Image

    images = []
    for path in paths:
        try:
            with Image.open(io.BytesIO(read_file(Path(path), LIMIT)), formats=["JPEG"]) as image:
                size = image.size  # before memory is taken for it
                pixels = np.asarray(image.convert("RGB"), dtype=np.uint8) if size == (64, 64) else np.empty(0)
        except Exception as error:  # the readers of damaged images have many
            raise ValueError(f"{path} cannot be read as an image ({error}); get the data set again") from None
        if size != (64, 64):
            raise ValueError(f"{path} has {size[1]}x{size[0]} pixels, expected 64x64")
        images.append(pixels.transpose(2, 0, 1))
    return np.stack(images)


def _finish(
    train: Arrays,
    test: Arrays,
    n: int | None,
    *,
    num_classes: int,
    decode: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    standardize: Literal["channel", "image", "none"] = "channel",
    label_noise: float = 0.0,
    subset_seed: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """The subset, its noisy labels, and pixels as the options ask for them."""
    (x, y), (x_test, y_test) = train, test
    if n is not None and not 1 <= n <= len(x):
        raise ValueError(f"n is {n}, expected 1 to {len(x)}, the examples in the files. Pass n=None for all of them.")
    if standardize not in ("channel", "image", "none"):
        raise ValueError(f"standardize is {standardize!r}, expected 'channel', 'image' or 'none'. Pass one of these.")
    chosen = np.random.default_rng(subset_seed).permutation(len(x))[:n]
    y = replace_labels(y[chosen], label_noise, num_classes=num_classes, rng=np.random.default_rng(seed))
    images, test_images = (torch.as_tensor(decode(a).copy()).to(dtype).div_(255) for a in (x[chosen], x_test))
    if standardize == "channel":
        mean, std = _moments(images, (0, 2, 3))
        images, test_images = (images - mean) / std, (test_images - mean) / std
    elif standardize == "image":
        images, test_images = _each_standardized(images), _each_standardized(test_images)
    return (images, torch.as_tensor(y)), (test_images, torch.as_tensor(y_test))


def _moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation; the latter at least 1/√(pixels of an image), so that a constant image stays finite."""
    return x.mean(dims, keepdim=True), x.std(dims, keepdim=True, correction=0).clamp_min(x[0].numel() ** -0.5)


def _each_standardized(x: Tensor) -> Tensor:
    mean, std = _moments(x, (1, 2, 3))
    return (x - mean) / std
