"""Classification data made from a seed: a few telling inputs among noise, images of any shape, sequences of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .data import Examples, Split, replace_labels


def sparse_classification(
    n: int = 20,
    d: int = 40,
    *,
    num_classes: int = 3,
    signal: float = 0.7,
    n_test: int = 1000,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Classes that a few inputs tell and the others do not, ((x_train, y_train), (x_test, y_test)):

        x_c = signal · 1[y = c] for the classes c,   x_j ~ N(0, 1) for the other d - num_classes inputs.

    The matrix with 1/signal in num_classes places maps inputs to the classes' one-hot vectors without error. With n < d many
    others do so on the training set, and only a bias towards sparse ones finds it: see `diagonal_linear`, with squared
    error. It is to test accuracy what `sparse_regression` is to test loss.

    Args:
        n: number of training examples.
        d: number of inputs.
        num_classes: number of classes, drawn independently for each example.
        signal: how telling the input of a class is, in standard deviations of the others; the smaller the harder.
        n_test: number of test examples.
        seed: draws everything; the numbers are drawn in float64, so both precisions get the same problem.
        dtype: of the inputs.

    Returns:
        Inputs (n, d) and labels (n,) int64, and the same for n_test.

    Raises:
        ValueError: a number of examples is not positive, there are fewer than two classes or more than inputs, or
            ``signal`` is not positive.

    >>> (x_train, y_train), _ = sparse_classification()
    >>> x_train.shape, y_train.shape
    (torch.Size([20, 40]), torch.Size([20]))
    """
    if min(n, n_test) < 1 or not 2 <= num_classes <= d or not 0.0 < signal < float("inf"):
        raise ValueError(
            f"n is {n}, n_test {n_test}, d {d}, num_classes {num_classes} and signal {signal}, expected at least 1 example "
            "each, 2 or more classes and as many inputs, and a positive signal. Pass for example n=20, d=40, num_classes=3."
        )
    rng = np.random.default_rng(seed)

    def draw(count: int) -> Examples:
        y = rng.integers(num_classes, size=count)
        return _examples(
            np.hstack([signal * np.eye(num_classes)[y], rng.standard_normal((count, d - num_classes))]), y, dtype
        )

    return draw(n), draw(n_test)


def synthetic_images(
    n: int = 1024,
    *,
    n_test: int = 1024,
    num_classes: int = 10,
    shape: Sequence[int] = (3, 32, 32),
    difficulty: float = 1.0,
    label_noise: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Images of the shape of CIFAR's with something to learn, ((x_train, y_train), (x_test, y_test)):

        x = (T_y, shifted + difficulty · noise)/√(1 + difficulty²).

    T_y is the pattern of the class, a few waves of low frequency in each channel; the shift, uniform up to an eighth of
    height and width in every direction, wraps around; the noise is half waves of the same kind and half white, so that
    it cannot be filtered out. Pattern and noise have mean square 1, and so have the images, up to sampling.

    Args:
        n: number of training examples; a smaller training set is part of every larger one.
        n_test: number of test examples.
        num_classes: number of classes, drawn independently for each image.
        shape: channels, height and width.
        difficulty: ratio of noise to pattern. Least squares on 2048 images of CIFAR's shape classifies 98% of test images
            at 1, 80% at 2, 40% at 4 and 17% at 8.
        label_noise: share of training labels that is replaced by another class.
        seed: draws everything; the numbers are drawn in float64, so both precisions get the same problem.
        dtype: of the images.

    Returns:
        Images (n, *shape) and labels (n,) int64, and the same for n_test.

    Raises:
        ValueError: a number is not positive, ``shape`` has not three, or ``difficulty`` or ``label_noise`` is out of range.

    >>> (x_train, y_train), _ = synthetic_images(64, label_noise=0.2)
    >>> x_train.shape, y_train.shape
    (torch.Size([64, 3, 32, 32]), torch.Size([64]))
    """
    if min(n, n_test) < 1 or num_classes < 2 or len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"n is {n}, n_test {n_test}, num_classes {num_classes} and shape {tuple(shape)}, expected positive numbers, "
            "2 or more classes and (channels, height, width). Pass for example shape=(3, 32, 32)."
        )
    if not 0.0 <= difficulty < float("inf"):
        raise ValueError(
            f"difficulty is {difficulty}, expected a finite ratio of noise to pattern. Pass for example 1.0."
        )
    patterns = _waves(np.random.default_rng((seed, 0)), num_classes, shape)

    def draw(count: int, part: int) -> tuple[np.ndarray, np.ndarray]:
        # A generator for each kind of number, so that the first examples do not depend on how many follow.
        kinds = [np.random.default_rng((seed, part, kind)) for kind in range(4)]
        y = kinds[0].integers(num_classes, size=count)
        reach = np.array(shape[1:]) // 8
        x = np.stack(
            [
                np.roll(patterns[c], s, axis=(1, 2))
                for c, s in zip(y, kinds[1].integers(-reach, reach + 1, (count, 2)), strict=True)
            ]
        )
        noise = (_waves(kinds[2], count, shape) + kinds[3].standard_normal(x.shape)) / np.sqrt(2)
        return (x + difficulty * noise) / np.sqrt(1 + difficulty**2), y

    (x, y), (x_test, y_test) = draw(n, 1), draw(n_test, 2)
    y = replace_labels(y, label_noise, num_classes=num_classes, rng=np.random.default_rng((seed, 3)))
    return _examples(x, y, dtype), _examples(x_test, y_test, dtype)


def markov_chain(
    n: int = 1024,
    *,
    n_test: int = 256,
    length: int = 32,
    num_classes: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Sequences of a Markov chain for next-token prediction, ((x_train, y_train), (x_test, y_test)), y one step ahead.

    The rows of the transition matrix are Dirichlet with concentration 0.3, so a few followers of each token carry most
    of the weight; the first token is uniform. The loss "token" goes with it; no model can expect less than the chain's
    entropy rate, nor does one need more than a table of pairs to reach it.

    Args:
        n: number of training sequences; a smaller training set is part of every larger one.
        n_test: number of test sequences.
        length: tokens in a sequence.
        num_classes: tokens in the vocabulary.
        seed: draws the chain and the sequences.
        dtype: has no effect, tokens are int64; every data set takes one.

    Returns:
        Tokens (n, length) and the tokens that follow them, (n, length), int64; and the same for n_test.

    Raises:
        ValueError: a number is not positive, or the vocabulary has fewer than two tokens.

    >>> (x, y), _ = markov_chain(8)
    >>> x.shape, torch.equal(x[:, 1:], y[:, :-1])
    (torch.Size([8, 32]), True)
    """
    if min(n, n_test, length) < 1 or num_classes < 2:
        raise ValueError(
            f"n is {n}, n_test {n_test}, length {length} and num_classes {num_classes}, expected positive numbers and 2 or "
            "more tokens. Pass for example length=32, num_classes=16."
        )
    rows = np.random.default_rng((seed, 0)).dirichlet(np.full(num_classes, 0.3), num_classes).cumsum(1)
    rows[:, -1] = 1.0  # the sum of a row may round to less, and a draw may lie between

    def draw(count: int, part: int) -> Examples:
        u = np.random.default_rng((seed, part)).random((count, length + 1))
        tokens = np.empty(u.shape, dtype=np.int64)
        tokens[:, 0] = (u[:, 0] * num_classes).astype(np.int64)
        for t in range(1, length + 1):
            tokens[:, t] = (rows[tokens[:, t - 1]] <= u[:, t, None]).sum(1)
        return torch.as_tensor(tokens[:, :-1].copy()), torch.as_tensor(tokens[:, 1:].copy())

    return draw(n, 1), draw(n_test, 2)


def _waves(rng: np.random.Generator, count: int, shape: Sequence[int], cutoff: int = 3) -> np.ndarray:
    """Random fields (count, *shape) of expected mean square 1: waves with at most `cutoff` periods in each direction."""
    channels, height, width = shape
    axes = []
    for size in (height, width):
        k = np.arange(1, cutoff + 1)[:, None] * (2 * np.pi / size) * np.arange(size)
        axes.append(np.concatenate([np.ones((1, size)), np.sqrt(2) * np.cos(k), np.sqrt(2) * np.sin(k)]))
    waves = len(axes[0])
    weights = rng.standard_normal((count, channels, waves, waves)) / waves
    return np.einsum("ncab,ah,bw->nchw", weights, *axes, optimize=True)


def _examples(x: np.ndarray, y: np.ndarray, dtype: torch.dtype) -> Examples:
    return torch.as_tensor(x, dtype=dtype), torch.as_tensor(y)
