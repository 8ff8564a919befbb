"""float32 against float64: what rounding does to a number is inside the floor that it states.

Compared with a reference: every registered diagnostic of trained float32 nets, measured in float32, against the same
parameters and the same probes measured in float64. Nothing is only behavioural.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvlab as cl
from curvlab.diagnostics import DIAGNOSTICS

TRAINING = {"batch_gradient", "test"}  # what a single point does not have
NAMES = [name for name, d in DIAGNOSTICS.items() if not TRAINING & set(d.needs) and name != "hessian_density"]


class Attention(nn.Module):
    """Images as eight tokens, one attention layer, layer normalization, mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 10)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.view(-1, 8, 8))
        seen = nn.functional.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h))
        return self.head(self.norm(h + seen).mean(1))


def _net(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        normalized = [nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)]
        return {
            "tanh": lambda: cl.problems.mlp((64, 32, 10)),
            "relu": lambda: cl.problems.mlp((64, 64, 64, 10), "relu"),
            "convolutions": lambda: cl.problems.cnn((2, 2, 2, 4, 4, 4)),
            "batch normalization": lambda: nn.Sequential(*normalized),
            "attention": Attention,
        }[name]()


@cache
def trained(name: str, loss: str) -> tuple[cl.Objective, cl.Objective]:
    """The same float32 parameters, measured in float32 and in float64."""
    (x, y), _ = cl.problems.digits(64)
    model = _net(name)
    L = cl.Objective(model, loss, (x, y))
    for _ in cl.train(L, torch.optim.SGD(model.parameters(), lr=0.1), cl.Batches(64, 64, 60)):
        pass
    return L, cl.Objective(model, loss, (x, y), dtype=torch.float64)


@pytest.mark.parametrize(
    "net, loss",
    [
        ("tanh", "cross_entropy"),
        pytest.param("tanh", "squared_error", marks=pytest.mark.slow),
        pytest.param("relu", "cross_entropy", marks=pytest.mark.slow),
        ("convolutions", "squared_error"),
        ("batch normalization", "cross_entropy"),
        ("attention", "squared_error"),
    ],
)
def test_rounding_is_inside_the_floor(net, loss):
    given = {"batch_size": (1, 8, 64), "lr": 0.1, "seed": 1}
    single, double = (cl.measure(L, NAMES, **given) for L in trained(net, loss))
    for name in NAMES:
        a, b = single[name], double[name]
        if a.value is None and name == "difference_sharpness":  # kinks are nearer than the steps of float32
            assert net in ("relu", "convolutions", "batch normalization")
            continue
        assert (a.value is None) == (b.value is None), name
        if a.value is None:
            continue
        off = np.abs(np.asarray(a.value) - np.asarray(b.value))
        # Searches and fits stop elsewhere in another precision, by no more than the errors that they state.
        allowed = np.asarray(a.floor) + np.asarray(a.error) + np.asarray(b.error)
        assert np.all(off <= allowed), f"{name}: off by {off}, stated {allowed}"


def test_floors_are_no_excuse():
    """For well-conditioned quantities the floor is below 1e-4 of the value."""
    L, _ = trained("tanh", "cross_entropy")
    asked = [
        "loss", "gradient_norm", "sharpness", "interaction_sharpness", "instability", "gradient_concentration",
        "gradient_variance", "fisher_trace", "hessian_trace", "ggn_trace", "gradient_covariance_eigenvalues",
    ]  # fmt: skip
    for name, m in cl.measure(L, asked, batch_size=8).items():
        assert np.all(np.asarray(m.floor) <= 1e-4 * np.abs(np.asarray(m.value))), name
