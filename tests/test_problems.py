"""Problems. Compared with a reference: the digits (scikit-learn), parameter counts (by hand, and the documented table),
products and per-example gradients of every model (double backward and a loop), the quadratic (its planted matrix), and
the readers of image files (arrays that the tests write). The rest is behaviour: splits, label noise, seeds, refusals."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import pickle
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvlab as cl
from curvlab import problems
from curvlab.losses import token
from curvlab.per_example import ExampleGradients
from curvlab.problems import (
    DATA,
    MODELS,
    PARAMETERS,
    canonical,
    cnn,
    data,
    digits,
    formats,
    linear,
    linear_regression,
    load,
    markov_chain,
    mlp,
    models,
    quadratic,
    sparse_classification,
    sparse_regression,
    synthetic_images,
    transformer,
    wide_resnet,
)
from curvlab.problems.blocks import PreActivationBlock, Scale

# Data


def test_digits_are_those_of_scikit_learn():
    reference = pytest.importorskip("sklearn.datasets").load_digits()
    (x, y), (x_test, y_test) = digits(dtype=torch.float64)
    order = np.random.default_rng(0).permutation(1797)
    assert np.array_equal(16 * torch.cat([x, x_test]).numpy(), reference.data[order])
    assert np.array_equal(torch.cat([y, y_test]).numpy(), reference.target[order])


def test_digits_file_states_its_license():
    with np.load(data.Path(data.__file__).with_name("digits.npz")) as file:
        assert file["images"].shape == (1797, 64)
        assert file["images"].dtype == file["labels"].dtype == np.uint8
        assert "CC BY 4.0" in " ".join(file["attribution"])


def test_order_of_digits_is_fixed():
    # NumPy may change its generator; logged runs would then silently belong to another split.
    order = np.random.default_rng(0).permutation(1797).astype("<i8")
    assert sorted(order) == list(range(1797))
    assert hashlib.sha256(order.tobytes()).hexdigest().startswith("14b7f6bc58ce844e")


def test_smaller_training_sets_are_nested_and_the_test_set_is_the_same():
    (x, y), (x_test, y_test) = digits()
    (x_100, y_100), (x_test_100, y_test_100) = digits(100, seed=7)
    assert torch.equal(x_100, x[:100])
    assert torch.equal(y_100, y[:100])
    assert torch.equal(x_test_100, x_test)
    assert torch.equal(y_test_100, y_test)


@given(share=st.floats(0, 1), n=st.integers(1, 1024), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_label_noise_changes_exactly_the_share_that_was_asked_for(share, n, seed):
    (x, y), (_, y_test) = digits(n)
    (x_noisy, y_noisy), (_, y_test_noisy) = digits(n, label_noise=share, seed=seed)
    assert (y != y_noisy).sum() == round(share * n)
    assert 0 <= y_noisy.min() <= y_noisy.max() <= 9
    assert torch.equal(x, x_noisy)
    assert torch.equal(y_test, y_test_noisy)
    assert torch.equal(y_noisy, digits(n, label_noise=share, seed=seed)[0][1])


def test_label_noise_is_uniform_over_the_other_classes_and_follows_the_seed():
    (_, y), _ = digits()
    (_, noisy), _ = digits(label_noise=1.0)
    counts = torch.bincount((noisy - y) % 10, minlength=10)
    assert counts[0] == 0
    chi_square = ((counts[1:] - 1024 / 9) ** 2 / (1024 / 9)).sum()
    assert chi_square < 26.1  # p = 0.001 with 8 degrees of freedom
    assert not torch.equal(noisy, digits(label_noise=1.0, seed=1)[0][1])


def test_center_makes_training_inputs_mean_zero_and_mean_square_one():
    (raw, _), (raw_test, _) = digits(512, dtype=torch.float64)
    (x, _), (x_test, _) = digits(512, center=True, dtype=torch.float64)
    assert x.mean(dim=0).abs().max() < 1e-12
    assert abs((x**2).mean().item() - 1) < 1e-12
    scale = (raw[1] - raw[0]).norm() / (x[1] - x[0]).norm()
    torch.testing.assert_close(x_test * scale, raw_test - raw.mean(dim=0))


def test_linear_regression_is_linear_plus_noise_of_the_stated_size():
    (x, y), (x_test, y_test) = linear_regression(2000, 8, noise=0.5, seed=3, dtype=torch.float64)
    assert x.shape == x_test.shape == (2000, 8)
    assert y.shape == y_test.shape == (2000, 1)
    theta = torch.linalg.lstsq(x, y).solution
    assert abs((y_test - x_test @ theta).std().item() - 0.5) < 0.04  # 5 standard errors
    assert not torch.equal(x, x_test)
    (x, y), (x_test, y_test) = linear_regression(50, 8, noise=0.0, dtype=torch.float64)
    torch.testing.assert_close(x_test @ torch.linalg.lstsq(x, y).solution, y_test)


FROM_FILES = ("cifar10", "cifar100", "stl10", "svhn", "fashion_mnist", "tiny_imagenet")


@pytest.mark.parametrize("name", [name for name in DATA if name not in FROM_FILES])
def test_data_follow_seed_and_dtype_only(name):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    low, high = DATA[name](seed=5), DATA[name](seed=5, dtype=torch.float64)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    for (x, y), (x_high, y_high) in zip(low, high, strict=True):
        if name == "markov_chain":
            assert x.dtype == x_high.dtype == torch.int64
            x_high = x_high.double()
        else:
            assert x.dtype == torch.float32
        assert x_high.dtype == torch.float64
        assert torch.equal(x, x_high.to(x.dtype))
        assert torch.equal(y, y_high.to(y.dtype))


def test_sparse_regression_has_a_sparse_solution_among_many():
    (x, y), (x_test, y_test) = sparse_regression(seed=2, dtype=torch.float64)
    assert torch.linalg.matrix_rank(x) == 20 < x.shape[1]
    theta = torch.linalg.lstsq(x_test, y_test).solution
    assert sorted(theta.flatten().round(decimals=9).tolist()) == [0.0] * 27 + [1.0] * 3
    torch.testing.assert_close(x @ theta, y)
    for seed in range(30):  # never two in one place
        _, (x_all, y_all) = sparse_regression(n_test=40, seed=seed, dtype=torch.float64)
        assert abs(torch.linalg.lstsq(x_all, y_all).solution.sum() - 3) < 1e-9
    (x_noisy, y_noisy), _ = sparse_regression(4000, noise=0.5, seed=2, dtype=torch.float64)
    assert abs((y_noisy - x_noisy @ theta).std().item() - 0.5) < 0.03  # 5 standard errors


def test_sparse_classification_is_told_by_few_inputs_and_fitted_by_many():
    (x, y), (x_test, y_test) = sparse_classification(seed=2, dtype=torch.float64)
    onehot, onehot_test = (torch.nn.functional.one_hot(t, 3).double() for t in (y, y_test))
    W = torch.linalg.lstsq(x_test, onehot_test).solution
    torch.testing.assert_close(W, torch.eye(40, 3, dtype=torch.float64) / 0.7)
    dense = torch.linalg.pinv(x) @ onehot  # the shortest of those that fit the training set
    torch.testing.assert_close(x @ dense, onehot)
    assert torch.equal((x_test @ W).argmax(1), y_test)
    assert 0.4 < ((x_test @ dense).argmax(1) == y_test).double().mean() < 0.9


@pytest.mark.slow
def test_small_batches_find_sparser_diagonal_networks():
    # The only problem known here on which generalization depends on the batch size; 30 problems at once.
    sets = [sparse_regression(seed=seed, dtype=torch.float64) for seed in range(30)]
    x, y, x_test, y_test = (torch.stack([s[i][j] for s in sets]) for i in (0, 1) for j in (0, 1))

    def risk(batch_size, lr):
        start = problems.diagonal_linear(dtype=torch.float64)
        u, v = (p.detach().expand(30, -1) for p in (start.u, start.v))
        generator = torch.Generator().manual_seed(0)
        for _ in range(5000):
            i = torch.rand(30, 20, generator=generator).argsort(1)[:, :batch_size, None]
            xs, ys = x.gather(1, i.expand(-1, -1, 30)), y.gather(1, i)
            g = (xs.mT @ (xs @ (u * v)[..., None] - ys))[..., 0] / batch_size
            u, v = u - lr * g * v, v - lr * g * u
        return (x_test @ (u * v)[..., None] - y_test).square().mean()

    large = risk(20, 0.02)
    assert risk(1, 0.06) < 0.7 * large  # 0.56
    assert 0.7 * large < risk(20, 0.06) < large  # 0.83


# Synthetic images and tokens


def test_synthetic_images_are_shifted_patterns_plus_noise():
    (x, y), (x_test, y_test) = synthetic_images(200, difficulty=0.0, dtype=torch.float64)
    assert x.shape == (200, 3, 32, 32)
    assert set(y.tolist()) == set(range(10))
    size = torch.fft.fft2(torch.cat([x, x_test])).abs()  # blind to shifts
    labels = torch.cat([y, y_test])
    for c in range(10):
        first = size[labels == c][0]
        assert (size[labels == c] - first).abs().max() < 1e-9 * first.max()
        assert (size[labels == (c + 1) % 10][0] - first).abs().max() > 0.1 * first.max()
    assert (x[y == 0][:20] - x[y == 0][0]).abs().amax((1, 2, 3)).count_nonzero() > 10  # and they are shifted
    (noisy, _), _ = synthetic_images(200, difficulty=3.0, dtype=torch.float64)
    assert abs(noisy.square().mean() - 1) < 0.05
    assert abs((noisy * 10**0.5 - x).square().mean() / 9 - 1) < 0.05


def test_synthetic_images_are_learnable_and_harder_with_difficulty():
    def accuracy(difficulty):
        (x, y), (x_test, y_test) = synthetic_images(600, shape=(1, 12, 12), difficulty=difficulty)
        x, x_test = x.flatten(1), x_test.flatten(1)
        targets = (y[:, None] == torch.arange(10)).float() - 0.1
        theta = torch.linalg.solve(x.T @ x + 60 * torch.eye(144), x.T @ targets)
        return ((x_test @ theta).argmax(1) == y_test).float().mean()

    easy, middle, hard = accuracy(0.3), accuracy(1.5), accuracy(10.0)
    assert easy > 0.85
    assert easy - 0.1 > middle > hard + 0.1


def test_synthetic_sets_are_nested_and_label_noise_leaves_the_images():
    (x, y), (x_test, y_test) = synthetic_images(60, n_test=5, shape=(1, 4, 6))
    (x_few, y_few), (x_few_test, _) = synthetic_images(20, n_test=5, shape=(1, 4, 6))
    assert torch.equal(x_few, x[:20])
    assert torch.equal(y_few, y[:20])
    assert torch.equal(x_few_test, x_test)
    (x_noisy, y_noisy), (_, y_noisy_test) = synthetic_images(60, n_test=5, shape=(1, 4, 6), label_noise=0.5)
    assert torch.equal(x_noisy, x)
    assert (y_noisy != y).sum() == 30
    assert torch.equal(y_noisy_test, y_test)
    assert torch.equal(markov_chain(20)[0][0], markov_chain(60)[0][0][:20])


def test_markov_chain_draws_both_sets_from_one_chain():
    frequencies = []
    for x, y in markov_chain(4000, n_test=4000, num_classes=5, seed=1):
        assert torch.equal(x[:, 1:], y[:, :-1])
        first = torch.bincount(x[:, 0], minlength=5)
        assert ((first - 800) ** 2 / 800).sum() < 18.5  # p = 0.001 with 4 degrees of freedom
        counts = torch.zeros(5, 5, dtype=torch.float64)
        counts.index_put_((x.flatten(), y.flatten()), torch.ones(x.numel(), dtype=torch.float64), accumulate=True)
        frequencies.append(counts / counts.sum(1, keepdim=True))
    assert (frequencies[0] - frequencies[1]).abs().max() < 0.02
    assert frequencies[0].amax(1).mean() > 0.5  # a few followers carry most of the weight


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: digits(1025), "n_train is 1025, expected 1 to 1024.*Ask for at most 1024"),
        (lambda: digits(0), "n_train is 0, expected 1 to 1024"),
        (lambda: digits(label_noise=20), "label_noise is 20, expected a share from 0 to 1.*pass 0.2"),
        (lambda: digits(1, center=True), "n_train=1 divides by a standard deviation of 0.*at least 2"),
        (lambda: linear_regression(0), "n is 0 and d is 16, expected at least 1 each"),
        (lambda: linear_regression(noise=-1.0), "noise is -1.0, expected a finite.*Pass 0"),
        (lambda: linear_regression(noise=float("nan")), "noise is nan, expected a finite"),
        (lambda: mlp(activation="sine"), "activation is 'sine', expected one of tanh, relu, gelu, elu, silu"),
        (lambda: mlp((64,)), r"widths are \(64,\), expected 2 or more positive.*Pass for example"),
        (lambda: cnn(()), r"widths are \(10,\), expected 2 or more positive"),
        (lambda: linear(3, 0), r"widths are \(3, 0\), expected 2 or more positive"),
        (lambda: sparse_regression(d=2), "n is 20, n_test 1000, d 2 and nonzeros 3, expected.*at most d nonzeros"),
        (lambda: sparse_classification(d=2), "d 2, num_classes 3 and signal 0.7, expected.*Pass for example n=20"),
        (lambda: sparse_classification(signal=0.0), "signal 0.0, expected.*a positive signal"),
        (lambda: sparse_regression(noise=-1.0), "noise is -1.0, expected a finite.*Pass 0"),
        (lambda: synthetic_images(0), "n is 0, n_test 1024, num_classes 10 and shape .3, 32, 32., expected positive"),
        (lambda: synthetic_images(shape=(32, 32)), r"shape \(32, 32\), expected.*Pass for example shape"),
        (lambda: synthetic_images(difficulty=-1.0), "difficulty is -1.0, expected a finite ratio.*Pass"),
        (lambda: synthetic_images(label_noise=2), "label_noise is 2, expected a share.*pass 0.2"),
        (lambda: markov_chain(num_classes=1), "num_classes 1, expected positive numbers and 2 or more tokens.*Pass"),
        (lambda: problems.resnet18("large"), "size is 'large', expected 'full' or 'small'. Pass 'small'"),
        (lambda: problems.vgg11(shape=(32, 32)), r"shape is \(32, 32\), expected \(channels, height, width\).*Pass"),
        (lambda: problems.vgg11(num_classes=0), r"widths are .*0\), expected 2 or more positive"),
        (lambda: wide_resnet(12, 1), "depth is 12, expected 6k . 4.*Pass for example 10, 16 or 28"),
        (lambda: wide_resnet(4, 1), "depth is 4, expected 6k . 4"),
        (lambda: problems.gpt(shape=(3, 8, 8)), r"shape is \(3, 8, 8\), expected \(T,\).*Pass for example \(32,\)"),
        (lambda: problems.vit(shape=(3, 8)), r"shape is \(3, 8\), expected \(channels.*Pass for example \(3, 32, 32\)"),
        (lambda: problems.vit(shape=(3, 8, 3)), r"shape is \(3, 8, 3\), expected .* at least 4x4 pixels"),
        (lambda: problems.timed_problem("mpl"), r"problem is 'mpl', expected one of mlp, .*Pass one of these names"),
        (lambda: problems.diagonal_linear(0), r"widths are \(0, 1\), expected 2 or more positive"),
        (lambda: quadratic([]), r"spectrum is \[\], expected one or more finite.*Pass for example"),
        (lambda: quadratic([1.0, float("inf")]), "spectrum is .*inf.*, expected one or more finite"),
        (lambda: quadratic(noise=-1.0), "n is 32 and noise is -1.0, expected.*Pass noise=0"),
        (lambda: problems.model("AlexNet"), "model is 'AlexNet', expected one of mlp, cnn, .*Pass one of these"),
        (lambda: load("imagenet"), "data set is 'imagenet', expected one of digits, .*Pass for example 'cifar10-8k'"),
        (lambda: load("imagenet-5k"), "data set is 'imagenet-5k', expected one of digits"),
    ],
)
def test_nonsense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Models

MODEL_CASES = [
    ("mlp", {}, 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10),
    ("mlp", {"widths": (64, 8, 10), "activation": "gelu"}, 64 * 8 + 8 + 8 * 10 + 10),
    ("cnn", {}, 9 * (8 + 64 + 64 + 128 + 256 + 256) + 3 * 8 + 3 * 16 + 16 * 10 + 10),
    ("cnn", {"widths": (4, 6), "num_classes": 3}, 9 * (4 + 24) + 4 + 6 + 6 * 3 + 3),
    ("linear", {"d_in": 64, "d_out": 2}, 128),
    ("diagonal_linear", {}, 60),
    ("diagonal_linear", {"d": 4, "outputs": 3}, 24),
    *((name, {"size": "small"}, count.small) for name, count in PARAMETERS.items()),
]
models_and_counts = pytest.mark.parametrize("name, options, num_params", MODEL_CASES)


def _flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@models_and_counts
def test_parameter_counts(name, options, num_params):
    assert len(_flat(MODELS[name](**options))) == num_params


def test_every_model_has_a_case():
    assert {name for name, _, _ in MODEL_CASES} == set(MODELS)


@models_and_counts
def test_models_follow_their_seed_and_leave_the_global_one(name, options, num_params):
    state = torch.get_rng_state()
    w = _flat(MODELS[name](**options, seed=1))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(w, _flat(MODELS[name](**options, seed=1)))
    high = _flat(MODELS[name](**options, seed=1, dtype=torch.float64))
    assert torch.equal(w, high.float())
    assert name == "diagonal_linear" or torch.equal(w.double(), high)
    assert name in ("linear", "diagonal_linear") or not torch.equal(w, _flat(MODELS[name](**options, seed=2)))


def test_mlp_has_the_default_initialisation():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        reference = torch.nn.Linear(64, 8), torch.nn.Linear(8, 10)
    model = mlp((64, 8, 10), seed=4)
    assert torch.equal(model[0].weight, reference[0].weight)
    assert torch.equal(model[2].bias, reference[1].bias)


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_mlp_has_its_activation_between_layers_only(activation):
    model = mlp((3, 5, 5, 2), activation)
    assert [isinstance(layer, models.ACTIVATIONS[activation]) for layer in model] == [0, 1, 0, 1, 0]


def test_cnn_takes_flat_and_square_images_and_has_he_variances():
    model = cnn((64,) * 6)
    x = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), model(x.view(5, 1, 8, 8)))
    convolutions = [layer for layer in model if isinstance(layer, torch.nn.Conv2d)]
    assert len(convolutions) == 6
    for layer in convolutions[1:]:
        assert abs(layer.weight.var().item() * 64 * 9 / 2 - 1) < 0.04  # 5 standard errors
        assert not layer.bias.any()
    pooled = [i for i, layer in enumerate(model) if isinstance(layer, torch.nn.AvgPool2d)]
    assert pooled == [6, 11]


def test_linear_starts_at_zero_without_bias():
    assert not linear(16, 1, seed=3).weight.any()
    assert linear(16, 1).bias is None


# The papers' models


@pytest.mark.parametrize("name, count", PARAMETERS.items())
def test_full_sizes_have_the_documented_numbers_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in MODELS[name]().parameters()) == count.full


def test_counts_that_the_literature_gives():
    # conv weights and two numbers per normalized channel of a basic block, by hand
    def block(c_in, c_out):
        shortcut = c_in * c_out + 2 * c_out if c_in != c_out else 0
        return 9 * c_in * c_out + 9 * c_out**2 + 4 * c_out + shortcut

    stages = [(64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    resnet18 = 27 * 64 + 2 * 64 + sum(block(*cs) for cs in stages) + 512 * 10 + 10
    assert PARAMETERS["resnet18"].full == resnet18
    assert round(resnet18 / 1e6, 2) == 11.17
    assert round(PARAMETERS["wrn_28_2"].full / 1e6, 2) == 1.47
    assert round(PARAMETERS["cnn6"].full / 1e6, 2) == 0.51
    assert PARAMETERS["mlp_3x4096"].full == 785 * 4096 + 2 * 4097 * 4096 + 4097 * 10
    with torch.device("meta"):
        assert round(sum(p.numel() for p in wide_resnet(28, 10).parameters()) / 1e6, 1) == 36.5
        # with normalization instead of SkipInit, the 2.7M of Zagoruyko and Komodakis, table 4
        assert round(sum(p.numel() for p in wide_resnet(16, 4).parameters()) / 1e6, 2) == 2.75


def test_a_default_precision_or_device_does_not_move_a_seed():
    reference = _flat(problems.resnet9("small", seed=3))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(reference, _flat(problems.resnet9("small", seed=3)))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


SMALL = {  # name: (data of a few examples, loss)
    "mlp": (lambda: digits(5, dtype=torch.float64), "squared_error"),
    "cnn": (lambda: digits(5, dtype=torch.float64), "squared_error"),
    "linear": (lambda: linear_regression(5, 4, dtype=torch.float64), "squared_error"),
    "gpt": (lambda: markov_chain(4, length=6), "token"),
    "diagonal_linear": (lambda: sparse_regression(5, dtype=torch.float64), "squared_error"),
}
IMAGES = (lambda: synthetic_images(4, shape=(3, 8, 8), dtype=torch.float64), "cross_entropy")
BY_VMAP = {"wrn_10_1": r".*\.alpha", "wrn_16_4": r".*\.alpha", "diagonal_linear": "[uv]"}


def _small(name):
    """A small model in float64 that has left its start, and the objective of a few examples."""
    get, loss = SMALL.get(name, IMAGES)
    (x, y), _ = get()
    options = {"d_in": 4, "d_out": 1} if name == "linear" else {}
    if name in PARAMETERS:
        options = {"size": "small", "shape": tuple(x.shape[1:])}
    model = MODELS[name](**options, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def noise(p):
        return torch.randn(p.shape, generator=generator, dtype=p.dtype)

    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * noise(p)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += 0.1 * noise(module.running_mean)
                module.running_var += noise(module.running_var) ** 2
    return model, (x, y), cl.Objective(model, loss, (x, y))


def test_the_small_models_all_have_data():
    assert set(MODELS) == set(SMALL) | set(PARAMETERS)


@pytest.mark.parametrize("name", MODELS)
def test_products_and_example_gradients_against_double_backward(name):
    model, (x, y), L = _small(name)
    model.eval()
    params = list(model.parameters())
    losses = L.loss(model(x), y)
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    norms = torch.stack([sum(g.square().sum() for g in row) for row in rows])
    grads = torch.autograd.grad(losses.mean(), params, create_graph=True)
    v = [torch.randn(p.shape, generator=torch.Generator().manual_seed(7), dtype=p.dtype) for p in params]
    product = torch.autograd.grad(sum((g * u).sum() for g, u in zip(grads, v, strict=True)), params, allow_unused=True)
    product = L.join([torch.zeros_like(p) if h is None else h for p, h in zip(params, product, strict=True)])
    w, flat = L.params(), L.join(v)
    torch.testing.assert_close(cl.hessian(L, w) @ flat, product)
    torch.testing.assert_close(L.gradient(w), L.join([g.detach() for g in grads]))
    G = ExampleGradients(L, w)
    torch.testing.assert_close(G.squared_norms(), norms)
    torch.testing.assert_close(G.dot(flat[:, None])[:, 0], torch.stack([L.join(list(row)) @ flat for row in rows]))
    by_vmap = {parameter for parameter, how in G.rules.items() if how != "layer"}
    assert by_vmap == {p for p in L.names if re.fullmatch(BY_VMAP.get(name, "none"), p)}  # the layer rules apply


@pytest.mark.parametrize("name", ["wrn_10_1", "gpt"])
def test_ggn_products_against_jacobians(name):
    model, (x, y), L = _small(name)
    params = list(model.eval().parameters())
    v = torch.randn(L.num_params, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.zeros_like(v)
    for i in range(2):
        z = model(x[i : i + 1])
        leaf = z.detach().requires_grad_()
        (d,) = torch.autograd.grad(L.loss(leaf, y[i : i + 1]).sum(), leaf, create_graph=True)
        H = torch.stack([torch.autograd.grad(e, leaf, retain_graph=True)[0].flatten() for e in d.flatten()])
        J = torch.stack([L.join(list(torch.autograd.grad(e, params, retain_graph=True))) for e in z.flatten()])
        expected += J.T @ (H @ (J @ v)) / 2
    G = cl.ggn(cl.Objective(model, L.loss, (x[:2], y[:2])), L.params())
    torch.testing.assert_close(G @ v, expected)


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "gpt"])
@pytest.mark.parametrize("shape, num_classes", [((3, 32, 32), 10), ((1, 8, 8), 3), ((3, 20, 12), 2)])
def test_image_models_take_any_shape_flat_or_not_and_depend_on_each_example_alone(name, shape, num_classes):
    model = MODELS[name]("small", shape=shape, num_classes=num_classes).eval()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(x)
        assert out.shape == (3, num_classes)
        torch.testing.assert_close(out, model(x.flatten(1)))
        torch.testing.assert_close(out[1:2], model(x[1:2]))


def _convolutions(model, size=3):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (size, size)]


@pytest.mark.parametrize(
    "name, threes, ones, batch_norm",
    [
        ("cnn6", 6, 0, 0),
        ("resnet9", 9, 2, 11),
        ("resnet18", 17, 3, 20),
        ("vgg11", 8, 0, 0),
        ("vgg16_bn", 13, 0, 13),
        ("wrn_10_1", 7, 2, 0),
        ("wrn_16_4", 13, 3, 0),
        ("wrn_28_2", 25, 3, 25),
    ],
)
def test_layers_are_those_of_the_names(name, threes, ones, batch_norm):
    with torch.device("meta"):
        for model in (MODELS[name]("full"), MODELS[name]("small")):
            assert len(_convolutions(model)) == threes
            assert len(_convolutions(model, 1)) == ones
            assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == batch_norm
            assert not any(isinstance(m, nn.Dropout) for m in model.modules())


@pytest.mark.parametrize(
    "name, sides",
    [
        ("cnn6", [32, 32, 16, 16, 8, 8]),
        ("resnet9", [32, 32, 32, 16, 16, 8, 8, 8, 8]),
        ("resnet18", [32] * 5 + [16] * 4 + [8] * 4 + [4] * 4),
        ("vgg11", [32, 16, 8, 8, 4, 4, 2, 2]),
        ("vgg16_bn", [32] * 2 + [16] * 2 + [8] * 3 + [4] * 3 + [2] * 3),
        ("wrn_10_1", [32] * 3 + [16] * 2 + [8] * 2),
        ("wrn_16_4", [32] * 5 + [16] * 4 + [8] * 4),
        ("wrn_28_2", [32] * 9 + [16] * 8 + [8] * 8),
    ],
)
def test_images_shrink_where_the_names_say(name, sides):
    seen = []
    with torch.device("meta"):
        model = MODELS[name]()
        for layer in _convolutions(model):
            layer.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
        model(torch.zeros(2, 3, 32, 32))
    assert seen == sides
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.MaxPool2d | nn.AvgPool2d)}
    assert kinds == {"cnn6": {nn.AvgPool2d}, "vgg11": {nn.MaxPool2d}, "vgg16_bn": {nn.MaxPool2d}}.get(name, set())


def test_cnn6_takes_batch_norm_as_an_option():
    model = problems.cnn6("small", batch_norm=True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model) == 6
    assert all(m.bias is None for m in _convolutions(model))


@pytest.mark.parametrize("name", ["wrn_10_1", "wrn_16_4"])
def test_skipinit_starts_every_branch_at_zero(name):
    model = MODELS[name]("small").eval()
    scales = [m.alpha for m in model.modules() if isinstance(m, Scale)]
    blocks = [m for m in model.modules() if isinstance(m, PreActivationBlock)]
    assert len(scales) == len(blocks) == {"wrn_10_1": 3, "wrn_16_4": 6}[name]
    assert not any(alpha.item() for alpha in scales)
    x = torch.randn(2, blocks[0].branch[0].in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = x if blocks[0].shortcut is None else blocks[0].shortcut(x.relu())
    assert torch.equal(blocks[0](x), expected)
    with torch.no_grad():
        scales[0].fill_(0.5)
    assert not torch.equal(blocks[0](x), expected)


def test_convolutions_have_he_variances_and_heads_do_not_gain():
    for name in ("resnet18", "vgg11", "wrn_16_4"):
        model = MODELS[name]("small", num_classes=100)
        for layer in _convolutions(model)[-4:]:
            fan_in, n = layer.weight[0].numel(), layer.weight.numel()
            assert abs(layer.weight.var().item() * fan_in / 2 - 1) < 5 * (2 / n) ** 0.5  # 5 standard errors
        head = model[-1]
        assert abs(head.weight.var().item() * head.in_features - 1) < 5 * (2 / head.weight.numel()) ** 0.5
        assert not head.bias.any()


def test_gpt_looks_back_only():
    model = problems.gpt("small", shape=(8,))
    tokens = markov_chain(2, length=8)[0][0]
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 16
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(2).all()
    assert model(tokens[:, :3]).shape == (2, 3, 16)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_torch(causal):
    attention = transformer.Attention(12, 3, causal=causal).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (f(x).view(2, 5, 3, 4).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    reference = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(2, 5, 12)
    torch.testing.assert_close(attention(x), attention.out(reference))


def test_token_loss_is_the_mean_over_tokens():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2], [3, 3, 0]])
    expected = [-sum(logits[i, t].log_softmax(0)[targets[i, t]] for t in range(3)) / 3 for i in range(2)]
    torch.testing.assert_close(token(logits, targets), torch.stack(expected))


@pytest.mark.parametrize(
    "spelling, name",
    [("6CNN", "cnn6"), ("ResNet-9", "resnet9"), ("ResNet-18", "resnet18"), ("VGG11", "vgg11"), ("VGG16", "vgg16_bn"),
     ("WRN-10-1", "wrn_10_1"), ("WRN-16-4", "wrn_16_4"), ("WRN-28-2", "wrn_28_2"), ("GPT", "gpt"),
     ("mlp-3x4096", "mlp_3x4096")],
)  # fmt: skip
def test_models_have_the_papers_names(spelling, name):
    assert torch.equal(_flat(problems.model(spelling, "small", seed=2)), _flat(MODELS[name]("small", seed=2)))


def test_the_papers_models_share_one_signature():
    for name in PARAMETERS:
        with torch.device("meta"):
            shape = (7,) if name == "gpt" else (2, 8, 8)
            MODELS[name]("small", shape=shape, num_classes=3, seed=1, dtype=torch.float64)
        assert next(iter(inspect.signature(MODELS[name]).parameters.values())).default == "full"


# Problems that can be solved on paper


def test_diagonal_linear_starts_as_stated_and_computes_its_formula():
    model = problems.diagonal_linear(4, dtype=torch.float64)
    assert torch.equal(model.u, torch.full((4,), 0.1 * 2**0.5, dtype=torch.float64))
    assert not model.v.any()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        model.v.copy_(torch.arange(4.0))
    torch.testing.assert_close(model(x)[:, 0], sum(model.u[j] * model.v[j] * x[:, j] for j in range(4)))


def test_every_output_of_a_diagonal_linear_net_is_one():
    model = problems.diagonal_linear(4, 3, dtype=torch.float64)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        model.v.copy_(torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for c in range(3):
        alone = problems.diagonal_linear(4, dtype=torch.float64)
        alone.load_state_dict({"u": model.u[:, c], "v": model.v[:, c]})
        torch.testing.assert_close(model(x)[:, c], alone(x)[:, 0])


@pytest.mark.parametrize("spectrum", [(5.0, 2.0, 1.0, 0.0), (3.0, 3.0, 1.0), (2.0, 1.0, -4.0), (1.5,)])
def test_quadratic_has_the_planted_hessian_and_noise(spectrum):
    model, loss, (c, targets) = quadratic(spectrum, n=7, noise=0.8, seed=4)
    L = cl.Objective(model, loss, (c, targets))
    w = L.params() + 0.3
    H = model.Q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ model.Q.T
    torch.testing.assert_close(torch.linalg.eigvalsh(H), torch.tensor(sorted(spectrum), dtype=torch.float64))
    torch.testing.assert_close(cl.dense(cl.hessian(L, w)), H)
    torch.testing.assert_close(cl.dense(cl.ggn(L, w)), H)
    torch.testing.assert_close(model.H, H)
    torch.testing.assert_close(L.gradient(w), H @ w)
    torch.testing.assert_close(L.example_gradients(w), (w - c) @ H)
    constant = sum(0.5 * c_i @ H @ c_i for c_i in c) / 7
    torch.testing.assert_close(L.value(w), 0.5 * w @ H @ w + constant)
    assert c.mean(0).abs().max() < 1e-15
    if min(spectrum) >= 0:
        torch.testing.assert_close(cl.dense(cl.fisher(L, w)), H)


def test_the_basis_of_the_quadratic_is_orthogonal_and_seeded():
    for seed in range(5):
        Q = quadratic([3.0, 2.0, 1.0], seed=seed).model.Q
        torch.testing.assert_close(Q.T @ Q, torch.eye(3, dtype=torch.float64))
        assert torch.equal(Q, quadratic([1.0, 1.0, 1.0], seed=seed).model.Q)
    firsts = torch.stack([quadratic([2.0, 1.0], n=1, seed=seed).model.Q[0, 0] for seed in range(200)])
    assert abs(firsts.mean()) < 5 * (0.5 / 200) ** 0.5  # Haar: mean 0, variance 1/2
    low = quadratic([3.0, 1.0], seed=1, dtype=torch.float32)
    assert low.model.w.dtype == low.model.H.dtype == low.data[0].dtype == torch.float32
    assert torch.equal(low.data[0], quadratic([3.0, 1.0], seed=1).data[0].float())


def test_proposition_4_1_of_lee():
    spectrum, lr, steps = (5.0, 3.0, 2.5, 1.0), 0.5, 60  # λ_1 = 5 > 2/lr = 4 > 3
    model, loss, examples = quadratic(spectrum, n=16)
    L, Q = cl.Objective(model, loss, examples), model.Q
    w = L.params()
    start = Q.T @ L.gradient(w)
    cosines, sharpness = [], []
    for t in range(steps):
        g = L.gradient(w)
        factors = torch.tensor([(1 - lr * x) ** t for x in spectrum], dtype=torch.float64)
        torch.testing.assert_close(Q.T @ g, factors * start, rtol=1e-9, atol=1e-12 * float(g.norm()))
        cosines.append(abs(float(Q[:, 0] @ g / g.norm())))
        if t % 10 == 9:
            sharpness.append(
                cl.measure(L, ["interaction_sharpness"], w=w, batch_size=16)["interaction_sharpness"].value
            )
        w = w - lr * g
    assert all(a <= b + 1e-12 for a, b in pairwise(cosines))
    assert 1 - cosines[-1] < 1e-12
    assert abs(float(Q[:, 0] @ g)) > 1e9 * abs(float(start[0]))  # 1.5^59 = 2.4e10
    assert all(a <= b + 1e-9 for a, b in pairwise(sharpness))
    assert abs(sharpness[-1] - 5) < 1e-9
    # and with 2/lr above λ_1 the gradient turns to the component that shrinks slowest, here that of 1
    w = L.params()
    for _ in range(60):
        w = w - 0.3 * L.gradient(w)
    assert abs(cl.measure(L, ["interaction_sharpness"], w=w, batch_size=16)["interaction_sharpness"].value - 1) < 1e-6


# Names of data sets


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cifar10-8k", "cifar10-8192"),
        ("CIFAR-10-8k", "cifar10-8192"),
        ("cifar10-8192", "cifar10-8192"),
        ("cifar10-5k", "cifar10-5000"),
        ("CIFAR-100-8k", "cifar100-8192"),
        ("stl10-4k", "stl10-4096"),
        ("STL-10-4k", "stl10-4096"),
        ("tiny-imagenet-32k", "tiny_imagenet-32768"),
        ("Tiny-ImageNet-32k", "tiny_imagenet-32768"),
        ("cifar100-5k", "cifar100-5120"),
        ("CIFAR-10", "cifar10"),
        ("cifar100", "cifar100"),
        ("Fashion-MNIST", "fashion_mnist"),
        ("SVHN", "svhn"),
        ("digits-512", "digits-512"),
    ],
)
def test_names_of_subsets_resolve_to_numbers(name, expected):
    assert canonical(name) == expected
    assert canonical(expected) == expected


def test_load_gives_the_subset_with_its_options():
    for got, expected in zip(
        load("digits-100", label_noise=0.3, seed=2), digits(100, label_noise=0.3, seed=2), strict=True
    ):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    assert load("markov_chain", length=3)[0][0].shape == (1024, 3)


# Readers of files


def _cifar_batch(path, x, y, key, module=None):
    path.parent.mkdir(exist_ok=True)
    raw = pickle.dumps({b"data": x.reshape(len(x), -1), key: y.tolist()}, protocol=2)
    if module:
        assert b"numpy._core.multiarray" in raw
        raw = raw.replace(b"numpy._core.multiarray", module)  # as older versions of numpy wrote it
    path.write_bytes(raw)


def _write_cifar10(folder, train, test):
    home = folder / "cifar-10-batches-py"
    parts = zip(np.array_split(train[0], 5), np.array_split(train[1], 5), strict=True)
    for i, (x, y) in enumerate(parts, start=1):
        _cifar_batch(home / f"data_batch_{i}", x, y, b"labels", b"numpy.core.multiarray" if i == 1 else None)
    _cifar_batch(home / "test_batch", *test, b"labels")


def _write_cifar100(folder, train, test):
    for part, (x, y) in {"train": train, "test": test}.items():
        _cifar_batch(folder / "cifar-100-python" / part, x, y, b"fine_labels")


def _write_stl10(folder, train, test):
    (folder / "stl10_binary").mkdir()
    for part, (x, y) in {"train": train, "test": test}.items():
        (folder / "stl10_binary" / f"{part}_X.bin").write_bytes(b"".join(image.mT.tobytes() for image in x))
        (folder / "stl10_binary" / f"{part}_y.bin").write_bytes(bytes(int(k) + 1 for k in y))


def _write_svhn(folder, train, test):
    from scipy.io import savemat

    (folder / "svhn").mkdir()
    for part, (x, y) in {"train": train, "test": test}.items():
        digit = np.where(y == 0, 10, y)[:, None].astype(np.uint8)
        savemat(folder / "svhn" / f"{part}_32x32.mat", {"X": x.transpose(2, 3, 1, 0), "y": digit})


def _write_fashion_mnist(folder, train, test):
    (folder / "fashion-mnist").mkdir()
    for part, (x, y) in {"train": train, "t10k": test}.items():
        images = np.array([2051, len(x), 28, 28], ">i4").tobytes() + x.tobytes()
        labels = np.array([2049, len(y)], ">i4").tobytes() + y.astype(np.uint8).tobytes()
        (folder / "fashion-mnist" / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / "fashion-mnist" / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def _write_tiny_imagenet(folder, train, test):
    from PIL import Image

    home = folder / "tiny-imagenet-200"
    names = [f"n{9 - k}" for k in range(10)]  # listed in another order than sorted
    (home / "val" / "images").mkdir(parents=True)
    (home / "wnids.txt").write_text("\n".join(names))
    for class_name in names:
        (home / "train" / class_name / "images").mkdir(parents=True)
    rows = []
    for part, (x, y) in {"train": train, "val": test}.items():
        for i, (image, k) in enumerate(zip(x, y, strict=True)):
            place = home / "val" / "images" if part == "val" else home / "train" / f"n{k}" / "images"
            place.mkdir(parents=True, exist_ok=True)
            grey = bool((image == image[0, 0, 0]).all())
            pixels = image[0] if grey else image.transpose(1, 2, 0)
            Image.fromarray(pixels, "L" if grey else "RGB").save(place / f"x_{i:02}.JPEG", quality=100)
            rows.append(f"x_{i:02}.JPEG\tn{k}\t0\t0\t63\t63")
    (home / "val" / "val_annotations.txt").write_text("\n".join(rows[len(train[0]) :]))


READERS = {
    "cifar10": (_write_cifar10, (3, 32, 32), "cifar-10-batches-py/data_batch_1"),
    "cifar100": (_write_cifar100, (3, 32, 32), "cifar-100-python/train"),
    "stl10": (_write_stl10, (3, 96, 96), "stl10_binary/train_X.bin"),
    "svhn": (_write_svhn, (3, 32, 32), "svhn/train_32x32.mat"),
    "fashion_mnist": (_write_fashion_mnist, (1, 28, 28), "fashion-mnist/train-images-idx3-ubyte.gz"),
    "tiny_imagenet": (_write_tiny_imagenet, (3, 64, 64), "tiny-imagenet-200/wnids.txt"),
}
readers = pytest.mark.parametrize("name", READERS)


@pytest.fixture
def files(name, tmp_path):
    """A folder with a tiny copy of a data set in its own format, and what is in it."""
    write, shape, _ = READERS[name]
    rng = np.random.default_rng(0)
    sets = []
    for count in (13, 6):
        x = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        if name == "tiny_imagenet":  # one colour each, so that JPEG loses next to nothing; the first is grey
            x = np.broadcast_to(x[:, :, :1, :1], x.shape).copy()
            x[0] = 77
        sets.append((x, np.sort(rng.integers(0, 10, count))))
    write(tmp_path, *sets)
    return tmp_path, *sets


def test_every_reader_is_tested():
    assert set(READERS) == set(FROM_FILES)


@readers
def test_readers_give_what_is_in_the_files(name, files, monkeypatch):
    folder, (x, y), (x_test, y_test) = files
    monkeypatch.delenv("DATASETS", raising=False)
    (got, labels), (got_test, labels_test) = DATA[name](folder=folder, standardize="none", dtype=torch.float64)
    order = np.random.default_rng(0).permutation(13)
    tolerance = 3 / 255 if name == "tiny_imagenet" else 1e-15
    assert np.abs(got.numpy() - x[order] / 255).max() <= tolerance
    assert np.abs(got_test.numpy() - x_test / 255).max() <= tolerance
    assert labels.dtype == labels_test.dtype == torch.int64
    assert labels.tolist() == y[order].tolist()
    assert labels_test.tolist() == y_test.tolist()
    # a subset from the environment's folder, its noisy labels, and the folder that holds the files itself
    monkeypatch.setenv("DATASETS", str(folder))
    (few, few_labels), (few_test, _) = load(f"{name}-5", standardize="none", label_noise=0.4, seed=3)
    assert few.dtype == torch.float32
    assert torch.equal(few, got[:5].float())
    assert torch.equal(few_test, got_test.float())
    assert (few_labels != labels[:5]).sum() == 2
    inner = (folder / READERS[name][2]).parent
    assert torch.equal(DATA[name](folder=inner, standardize="none", dtype=torch.float64)[0][0], got)


def _loaded(name, folder):
    return [tensor for part in DATA[name](folder=folder, standardize="none") for tensor in part]


@readers
def test_a_file_that_is_cut_off_never_gives_other_data(name, files):
    """Each file of a copy, cut at several places: refused, or, where nothing that is read is lost, the same."""
    folder = files[0]
    whole, told = _loaded(name, folder), []
    for file in sorted(path for path in folder.rglob("*") if path.is_file())[:8]:
        raw = file.read_bytes()
        for size in (0, len(raw) // 3, len(raw) - len(raw) // 8, len(raw) - 1):
            file.write_bytes(raw[:size])
            try:
                got = _loaded(name, folder)
            except ValueError as error:
                told.append(str(error))
            else:
                assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True)), (file, size)
        file.write_bytes(raw)
    assert len(told) >= 6
    assert all(str(folder) in message for message in told)


@pytest.mark.parametrize("name", ["tiny_imagenet"])
def test_a_copy_of_tiny_imagenet_that_is_not_whole_is_refused(name, files):
    from PIL import Image

    home = files[0] / "tiny-imagenet-200"
    image = next(home.glob("val/images/*.JPEG"))
    raw = image.read_bytes()
    image.unlink()
    with pytest.raises(ValueError, match=r"val_annotations.txt does not name each of 5 images once with a known class"):
        _loaded(name, files[0])
    Image.new("RGB", (64, 32)).save(image)
    with pytest.raises(ValueError, match=r"JPEG has 32x64 pixels, expected 64x64"):
        _loaded(name, files[0])
    image.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"JPEG cannot be read as an image .*get the data set again"):
        _loaded(name, files[0])
    image.write_bytes(raw)
    (home / "train" / "n99").mkdir()
    with pytest.raises(ValueError, match=r"train has \d+ folders and wnids.txt 10 classes, which are not the same"):
        _loaded(name, files[0])


@pytest.mark.parametrize("name", ["cifar10"])
def test_subsets_are_drawn_by_a_seed_of_their_own(name, files):
    folder, (x, _), _ = files
    for seed in (0, 5):
        few = DATA[name](6, folder=folder, standardize="none", subset_seed=seed, dtype=torch.float64)[0][0]
        assert np.array_equal(few.numpy(), x[np.random.default_rng(seed).permutation(13)[:6]] / 255)
        more = DATA[name](9, folder=folder, standardize="none", subset_seed=seed, seed=3, dtype=torch.float64)[0][0]
        assert torch.equal(more[:6], few)


@readers
def test_readers_say_where_files_are_expected(name, tmp_path, monkeypatch):
    monkeypatch.delenv("DATASETS", raising=False)
    expected = READERS[name][2]
    with pytest.raises(
        FileNotFoundError, match=f"{name} is read from files, and no folder is known; expected {expected}"
    ):
        DATA[name]()
    with pytest.raises(
        FileNotFoundError, match=f"expected {expected}.* in {tmp_path}.*Nothing is downloaded.*synthetic_images"
    ):
        DATA[name](folder=tmp_path)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_standardization(name, files):
    folder, (x, _), (x_test, _) = files
    order = np.random.default_rng(0).permutation(13)[:7]
    pixels, pixels_test = x[order] / 255, x_test / 255
    (channel, _), (channel_test, _) = DATA[name](7, folder=folder, standardize="channel", dtype=torch.float64)
    mean, std = pixels.mean((0, 2, 3), keepdims=True), pixels.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(channel.numpy(), (pixels - mean) / std, atol=1e-12)
    np.testing.assert_allclose(channel_test.numpy(), (pixels_test - mean) / std, atol=1e-12)
    (image, _), _ = DATA[name](7, folder=folder, standardize="image", dtype=torch.float64)
    for got, one in zip(image.numpy(), pixels, strict=True):
        np.testing.assert_allclose(got, (one - one.mean()) / one.std(), atol=1e-12)
    default = image if name == "fashion_mnist" else channel  # Smith's choice, and ours
    assert torch.equal(DATA[name](7, folder=folder, dtype=torch.float64)[0][0], default)


@pytest.mark.parametrize("name", ["fashion_mnist"])
def test_a_constant_image_stays_finite_and_nonsense_is_refused(name, files):
    folder, flat = files[0], files[0] / "flat"
    flat.mkdir()
    _write_fashion_mnist(flat, *[(np.full((3, 28, 28), 9, np.uint8), np.arange(3))] * 2)
    assert load("fashion-mnist", folder=flat)[0][0].abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"n is 14, expected 1 to 13, the examples in the files. Pass n=None"):
        load("fashion-mnist-14", folder=folder)
    with pytest.raises(ValueError, match=r"standardize is 'pixel', expected 'channel', 'image' or 'none'. Pass"):
        load("fashion-mnist", folder=folder, standardize="pixel")
    with pytest.raises(ValueError, match="label_noise is 2, expected a share"):
        load("fashion-mnist", folder=folder, label_noise=2)


def test_pickles_that_are_something_else_are_refused(tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match="holds a list, expected a dictionary; get the file again"):
        formats.read_pickle(path)
    raw = pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}, protocol=2)
    for broken in (b"", b"no pickle", raw[: len(raw) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"is not a pickle of arrays .*get the file again"):
            formats.read_pickle(path)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"holds \['data'\], expected data \(n, 3072\) and labels; is it the Python"):
        load("cifar10", folder=tmp_path)
    for x, y in (
        (np.zeros((2, 3072), np.uint8), [1]),
        (np.zeros((1, 3072)), [1]),
        (np.zeros((1, 3072), np.uint8), [10]),
    ):
        path.write_bytes(pickle.dumps({"data": x, "labels": y}, protocol=2))
        with pytest.raises(ValueError, match=f"holds {len(x)} images of {x.dtype} and 1 labels.*labels from 0 to 9"):
            load("cifar10", folder=tmp_path)


def test_cut_off_files_are_refused(tmp_path):
    (tmp_path / "train_X.bin").write_bytes(bytes(3 * 96 * 96 + 7))
    (tmp_path / "train_y.bin").write_bytes(bytes([1]))
    with pytest.raises(ValueError, match=r"train_X.bin holds 27655 bytes of data, expected 27648 for .* it is cut off"):
        load("stl10", folder=tmp_path)
    header = np.array([2051, 2, 28, 28], ">i4").tobytes()
    path = tmp_path / "train-images-idx3-ubyte.gz"
    cases = {
        gzip.compress(header + bytes(28 * 28)): "holds 784 bytes of data, expected 1568",
        gzip.compress(b"something else"): "does not start as an IDX file of unsigned bytes",
        gzip.compress(header[:6]): "does not start as an IDX file",
        gzip.compress(header + bytes(2 * 28 * 28))[:-9]: "cannot be unpacked .*get the file again",
        b"no gzip": "cannot be unpacked",
    }
    for raw, message in cases.items():
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            formats.read_idx(path)
    mat = tmp_path / "train_32x32.mat"
    mat.write_bytes(b"no matlab file")
    with pytest.raises(ValueError, match=r"cannot be read as a MATLAB file .*get the file again"):
        load("svhn", folder=tmp_path)
    from scipy.io import savemat

    savemat(mat, {"X": np.zeros((32, 32), np.uint8)})
    with pytest.raises(ValueError, match=r"holds .*'X'.*, expected X \(height, width, channels, n\) and y"):
        load("svhn", folder=tmp_path)
