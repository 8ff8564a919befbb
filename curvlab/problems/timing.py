"""Problems on which speed is compared: six models with a few examples, whose gradients take milliseconds on one core."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .convolutional import cnn6, resnet18
from .data import Examples, digits
from .models import mlp
from .synthetic import markov_chain, synthetic_images
from .transformer import gpt, vit

IMAGE = (3, 16, 16)


def _images(n: int) -> Examples:
    return synthetic_images(n, n_test=1, shape=IMAGE)[0]


# name: (model, loss, data of n examples, n)
TIMED: dict[str, tuple[Callable[[], nn.Module], str, Callable[[int], Examples], int]] = {
    "mlp": (lambda: mlp((64, 128, 128, 10)), "cross_entropy", lambda n: digits(n)[0], 1024),
    "mlp_300k": (lambda: mlp((64, 512, 512, 10)), "cross_entropy", lambda n: digits(n)[0], 512),
    "cnn6": (lambda: cnn6(shape=IMAGE), "cross_entropy", _images, 16),
    "resnet18": (lambda: resnet18("small", shape=IMAGE), "cross_entropy", _images, 32),
    "gpt": (gpt, "token", lambda n: markov_chain(n, n_test=1)[0], 8),
    "vit": (lambda: vit(shape=IMAGE), "cross_entropy", _images, 16),
}


def timed_problem(name: str, n: int | None = None) -> tuple[nn.Module, str, Examples]:
    """(model, loss, data) of a problem on which speed is compared, such as "mlp", with n examples.

    Raises:
        ValueError: an unknown name.

    >>> model, loss, (x, y) = timed_problem("mlp", 64)
    >>> sum(p.numel() for p in model.parameters()), loss, len(x)
    (26122, 'cross_entropy', 64)
    """
    if name not in TIMED:
        raise ValueError(f"problem is {name!r}, expected one of {', '.join(TIMED)}. Pass one of these names.")
    model, loss, data, size = TIMED[name]
    return model(), loss, data(n or size)
