"""Problems. Compared with a reference: the digits (scikit-learn) and parameter counts (by hand). The rest is
behaviour: splits, label noise, seeds, refusals."""

from __future__ import annotations

import doctest
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlab.problems import DATA, MODELS, cnn, data, digits, linear, linear_regression, mlp, models


@pytest.mark.parametrize("module", [data, models])
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0


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


@pytest.mark.parametrize("name", DATA)
def test_data_follow_seed_and_dtype_only(name):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    low, high = DATA[name](seed=5), DATA[name](seed=5, dtype=torch.float64)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    for (x, y), (x_high, y_high) in zip(low, high, strict=True):
        assert x.dtype == torch.float32
        assert x_high.dtype == torch.float64
        assert torch.equal(x, x_high.float())
        assert torch.equal(y, y_high.to(y.dtype))


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
    assert torch.equal(w.double(), _flat(MODELS[name](**options, seed=1, dtype=torch.float64)))
    assert name == "linear" or not torch.equal(w, _flat(MODELS[name](**options, seed=2)))


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
