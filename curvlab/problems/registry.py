"""Every model and data set by name; hides in which file they live, and that papers spell the names in other ways."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from . import convolutional, data, images, models, synthetic, toy, transformer
from .data import Split

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": models.mlp,
    "cnn": models.cnn,
    "linear": models.linear,
    "mlp_3x4096": models.mlp_3x4096,
    "cnn6": convolutional.cnn6,
    "resnet9": convolutional.resnet9,
    "resnet18": convolutional.resnet18,
    "vgg11": convolutional.vgg11,
    "vgg16_bn": convolutional.vgg16_bn,
    "wrn_10_1": convolutional.wrn_10_1,
    "wrn_16_4": convolutional.wrn_16_4,
    "wrn_28_2": convolutional.wrn_28_2,
    "gpt": transformer.gpt,
    "vit": transformer.vit,
    "diagonal_linear": toy.diagonal_linear,
}

DATA: dict[str, Callable[..., Split]] = {
    "digits": data.digits,
    "linear_regression": data.linear_regression,
    "sparse_regression": data.sparse_regression,
    "sparse_classification": synthetic.sparse_classification,
    "synthetic_images": synthetic.synthetic_images,
    "markov_chain": synthetic.markov_chain,
    "cifar10": images.cifar10,
    "cifar100": images.cifar100,
    "stl10": images.stl10,
    "svhn": images.svhn,
    "fashion_mnist": images.fashion_mnist,
    "tiny_imagenet": images.tiny_imagenet,
}


class Count(NamedTuple):
    """Parameters of a named model with its default arguments, and what its paper says of it."""

    full: int
    small: int
    paper: str


PARAMETERS: dict[str, Count] = {
    "mlp_3x4096": Count(36_818_954, 59_210, "Smith, appendix D: 3 layers of width 4096; no count"),
    "cnn6": Count(510_250, 7_370, "Lee: 6CNN, 0.51M, which does not determine the layout; ours"),
    "resnet9": Count(2_408_266, 38_514, "Lee: ResNet-9, 2.3M, which does not determine the layout; ours"),
    "resnet18": Count(11_173_962, 176_402, "Novack: ResNet-18 with batch normalization; no count"),
    "vgg11": Count(9_225_610, 145_210, "Novack: VGG11 without batch normalization; no count"),
    "vgg16_bn": Count(14_724_042, 231_746, "Novack: VGG16 with batch normalization; no count"),
    "wrn_10_1": Count(77_709, 5_133, "Smith: 10-1 Wide-ResNet with SkipInit; no count"),
    "wrn_16_4": Count(2_747_536, 172_720, "Smith: 16-4 Wide-ResNet with SkipInit; no count"),
    "wrn_28_2": Count(1_467_610, 92_734, "Lee: WRN-28-2, 36M, which fits WRN-28-10 (36,479,194) instead"),
    "gpt": Count(801_536, 27_520, "none of the papers; ours"),
    "vit": Count(809_098, 29_418, "none of the papers; ours"),
}

_OTHER_NAMES = {"6cnn": "cnn6", "vgg16": "vgg16_bn"}
_OTHER_SIZES = {("cifar10", "5k"): 5000}  # Cohen et al. 2021; elsewhere k is 1024, as Lee says


def model(name: str, *args: Any, **options: Any) -> nn.Module:
    """A model by its name here or in a paper, such as "resnet18", "ResNet-18" or "6CNN", with its own arguments.

    The papers' models all take (size, shape=, num_classes=, seed=, dtype=).

    Raises:
        ValueError: an unknown name.

    >>> sum(p.numel() for p in model("WRN-10-1", "small").parameters())
    5133
    """
    key = _squash(name)
    found = {_squash(known): known for known in MODELS} | _OTHER_NAMES
    if key not in found:
        raise ValueError(f"model is {name!r}, expected one of {', '.join(MODELS)}. Pass one of these names.")
    return MODELS[found[key]](*args, **options)


def load(name: str, **options: Any) -> Split:
    """A data set or a subset of one by name, ((x_train, y_train), (x_test, y_test)), such as "cifar10-8k".

    The number after the name is that of the training examples; k is 1024, as Lee says, so that cifar10-8k, stl10-4k and
    tiny-imagenet-32k have 8192, 4096 and 32768; cifar10-5k alone is that of Cohen et al. 2021 with 5000.

    Raises:
        ValueError: an unknown name; FileNotFoundError: a data set that is read from files, which are not there.

    >>> (x, y), _ = load("digits-512", center=True)
    >>> x.shape
    torch.Size([512, 64])
    """
    key, n = _resolve(name)
    return DATA[key](**options) if n is None else DATA[key](n, **options)


def canonical(name: str) -> str:
    """The one name under which a data set is logged: it carries the number of training examples, if there is one.

    Raises:
        ValueError: an unknown name.

    >>> canonical("CIFAR-10-8k"), canonical("cifar10-5k"), canonical("Fashion-MNIST")
    ('cifar10-8192', 'cifar10-5000', 'fashion_mnist')
    """
    key, n = _resolve(name)
    return key if n is None else f"{key}-{n}"


def _resolve(name: str) -> tuple[str, int | None]:
    found = {_squash(known): known for known in DATA}
    if _squash(name) in found:  # before looking for a number: CIFAR-10 has none
        return found[_squash(name)], None
    match = re.fullmatch(r"(.+)-(\d+)(k?)", name.lower())
    if match is None or _squash(match[1]) not in found:
        raise ValueError(
            f"data set is {name!r}, expected one of {', '.join(DATA)}, with the number of training examples after a hyphen "
            "if not all are meant. Pass for example 'cifar10-8k'."
        )
    key = found[_squash(match[1])]
    count = _OTHER_SIZES.get((key, match[2] + match[3]), int(match[2]) * (1024 if match[3] else 1))
    return key, count


def _squash(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())
