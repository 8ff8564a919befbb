"""Digits and regressions, which need no file of the user's; hides how they are split and what is random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Examples = tuple[Tensor, Tensor]
Split = tuple[Examples, Examples]

NUM_DIGITS, NUM_TEST = 1797, 773


def digits(
    n_train: int = 1024,
    *,
    center: bool = False,
    label_noise: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Handwritten digits as ((x_train, y_train), (x_test, y_test)): 8x8 pixels, 10 classes.

    The examples are in one fixed order, whatever the seed: the training set is the first ``n_train`` of it
    and the test set the last 773, so a smaller training set is part of every larger one.

    Args:
        n_train: number of training examples, 1 to 1024.
        center: subtract the mean of the training set, pixel by pixel, and divide by one number, the standard
            deviation of all its pixels, so that a training pixel has mean square 1; the test set likewise.
            Otherwise inputs lie in [0, 1].
        label_noise: the share of *training* labels, rounded to whole examples, that is replaced by another
            class, uniformly drawn; test labels stay true.
        seed: draws the label noise, and nothing else.
        dtype: of the inputs.

    Returns:
        Inputs of shape (n_train, 64) and (773, 64), and labels of shape (n_train,) and (773,), int64.

    Raises:
        ValueError: ``n_train`` or ``label_noise`` is out of range, or ``center`` meets a single image.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository (1998), doi:10.24432/C50P49, CC BY 4.0: its test part, as in scikit-learn's ``load_digits``.

    >>> (x_train, y_train), (x_test, y_test) = digits(512, label_noise=0.2)
    >>> x_train.shape, y_train.shape, x_test.shape, y_test.shape
    (torch.Size([512, 64]), torch.Size([512]), torch.Size([773, 64]), torch.Size([773]))
    """
    largest = NUM_DIGITS - NUM_TEST
    if not 1 <= n_train <= largest:
        raise ValueError(
            f"n_train is {n_train}, expected 1 to {largest}: the other {NUM_TEST} digits are the test set. "
            f"Ask for at most {largest}."
        )
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        x, y = file["images"] / 16.0, file["labels"].astype(np.int64)
    order = np.random.default_rng(0).permutation(NUM_DIGITS)
    train, test = order[:n_train], order[-NUM_TEST:]
    if center:
        x = x - x[train].mean(axis=0)
        std = x[train].std()
        if std == 0.0:
            raise ValueError(
                f"center=True with n_train={n_train} divides by a standard deviation of 0, expected distinct "
                "images. Take at least 2 examples."
            )
        x = x / std
    y_train = replace_labels(y[train], label_noise, num_classes=10, rng=np.random.default_rng(seed))
    return _tensors(x[train], y_train, dtype), _tensors(x[test], y[test], dtype)


def linear_regression(
    n: int = 256,
    d: int = 16,
    *,
    noise: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Linear regression as ((x_train, y_train), (x_test, y_test)), with x, θ*, ε standard normal and

        y = x·θ* + noise·ε.

    This is the control problem: its Hessian is constant, so training cannot move it to an edge of stability,
    and a claim that "holds" here has seen gradient noise alone. The test set is drawn afresh with that θ*.

    Args:
        n: number of training examples, and of test examples.
        d: number of inputs.
        noise: standard deviation of the targets around x·θ*.
        seed: draws everything; the numbers are drawn in float64, so both precisions get the same problem.
        dtype: of inputs and targets.

    Returns:
        Inputs of shape (n, d) and targets of shape (n, 1), twice.

    Raises:
        ValueError: ``n`` or ``d`` is not positive, or ``noise`` is negative or not finite.

    >>> (x_train, y_train), (x_test, y_test) = linear_regression(n=100, d=5)
    >>> x_train.shape, y_train.shape
    (torch.Size([100, 5]), torch.Size([100, 1]))
    """
    if n < 1 or d < 1:
        raise ValueError(f"n is {n} and d is {d}, expected at least 1 each. Pass positive whole numbers.")
    if not 0.0 <= noise < float("inf"):
        raise ValueError(f"noise is {noise}, expected a finite standard deviation. Pass 0 for targets without noise.")
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal((d, 1))

    def draw() -> Examples:
        x = rng.standard_normal((n, d))
        y = x @ theta + noise * rng.standard_normal((n, 1))
        return torch.as_tensor(x, dtype=dtype), torch.as_tensor(y, dtype=dtype)

    return draw(), draw()


def sparse_regression(
    n: int = 20,
    d: int = 30,
    *,
    nonzeros: int = 3,
    noise: float = 0.0,
    n_test: int = 1000,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Sparse regression as ((x_train, y_train), (x_test, y_test)), with x, ε standard normal and

        y = x·θ* + noise·ε,   θ* = 1 in `nonzeros` random places, else 0.

    With n < d many θ fit the training set, and only a bias towards sparse ones finds θ*: see `diagonal_linear`. Seeds 0
    to 29 are the 30 problems over which results are averaged. Test targets are free of noise, so twice the test loss
    is, up to sampling, the risk ‖θ - θ*‖². Noise in the training targets drowns the effect of the batch size.

    Args:
        n: number of training examples.
        d: number of inputs.
        nonzeros: number of inputs that matter.
        noise: standard deviation of the training targets around x·θ*.
        n_test: number of test examples.
        seed: draws everything; the numbers are drawn in float64, so both precisions get the same problem.
        dtype: of inputs and targets.

    Returns:
        Inputs (n, d) and targets (n, 1), and (n_test, d) and (n_test, 1).

    Raises:
        ValueError: a number of examples or inputs is not positive, there are more nonzeros than inputs, or ``noise`` is
            negative or not finite.

    >>> (x_train, y_train), (x_test, y_test) = sparse_regression()
    >>> x_train.shape, y_train.shape, x_test.shape
    (torch.Size([20, 30]), torch.Size([20, 1]), torch.Size([1000, 30]))
    """
    if min(n, n_test) < 1 or not 1 <= nonzeros <= d:
        raise ValueError(
            f"n is {n}, n_test {n_test}, d {d} and nonzeros {nonzeros}, expected at least 1 each and at most d nonzeros. "
            "Pass for example n=20, d=30, nonzeros=3."
        )
    if not 0.0 <= noise < float("inf"):
        raise ValueError(f"noise is {noise}, expected a finite standard deviation. Pass 0 for targets without noise.")
    rng = np.random.default_rng(seed)
    theta = np.zeros((d, 1))
    theta[rng.choice(d, nonzeros, replace=False)] = 1.0
    x, x_test = rng.standard_normal((n, d)), rng.standard_normal((n_test, d))
    y = x @ theta + noise * rng.standard_normal((n, 1))

    def tensors(*arrays: np.ndarray) -> Examples:
        return torch.as_tensor(arrays[0], dtype=dtype), torch.as_tensor(arrays[1], dtype=dtype)

    return tensors(x, y), tensors(x_test, x_test @ theta)


def replace_labels(y: np.ndarray, share: float, *, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """A copy of labels (n,) in which a share, rounded to whole examples, is another class, uniformly drawn.

    Raises:
        ValueError: a share below 0 or above 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"label_noise is {share}, expected a share from 0 to 1. For 20% wrong labels pass 0.2.")
    wrong = rng.choice(len(y), size=round(share * len(y)), replace=False)
    y = y.copy()
    # A shift of 1 to num_classes - 1 reaches every other class equally often, and never the true one.
    y[wrong] = (y[wrong] + rng.integers(1, num_classes, size=len(wrong))) % num_classes
    return y


def _tensors(x: np.ndarray, y: np.ndarray, dtype: torch.dtype) -> Examples:
    return torch.as_tensor(x, dtype=dtype), torch.as_tensor(y)
