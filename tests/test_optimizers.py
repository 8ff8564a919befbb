"""Thresholds and preconditioners: each threshold against the optimizer itself on a quadratic, just below and just above;
each preconditioner against the step that torch takes."""

import pytest
import torch

import curvlab as cl
from curvlab.optimizers import learning_rate, preconditioner, settings, stability_threshold

F64 = torch.float64

PLAIN = {
    "gd": (torch.optim.SGD, {}),
    "polyak": (torch.optim.SGD, {"momentum": 0.9}),
    "dampened": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.5}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "weight_decay": (torch.optim.SGD, {"momentum": 0.5, "weight_decay": 0.3}),
}


def grows(optimizer, parameter, curvature, steps):
    """Whether the optimizer diverges on ½ λ w²."""
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * curvature * parameter**2).sum().backward()
        optimizer.step()
    return float(parameter.detach().abs().max()) > 1.0


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("side", [0.98, 1.02])
def test_the_threshold_divides_what_converges_from_what_diverges(name, side):
    kind, options = PLAIN[name]
    w = torch.nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = kind([w], lr=0.1, **options)
    threshold = stability_threshold(settings(optimizer), 0.1)
    assert grows(optimizer, w, side * threshold, 1500) == (side > 1)


@pytest.mark.parametrize("side", [0.97, 1.03])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_the_threshold_of_adam_with_a_frozen_preconditioner(beta, side):
    """Adam with P constant is w ← w - lr P⁻¹ m, m ← β m + (1 - β) g: iterate that recursion."""
    lr, P = 0.01, 3.0
    curvature = side * stability_threshold({"name": "Adam", "betas": (beta, 0.999)}, lr) * P
    w, m = 1.0, 0.0
    for _ in range(3000):
        m = beta * m + (1 - beta) * curvature * w
        w = w - lr * m / P
        if abs(w) > 1e6:
            break
    assert (abs(w) > 1.0) == (side > 1)
    assert stability_threshold({"name": "Adam", "betas": (0.9, 0.999)}, lr) == pytest.approx(38 / lr)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.9)),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.99), weight_decay=0.1, eps=1e-3),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.0, 0.9), weight_decay=0.0),
        lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, eps=1e-4),
    ],
)
def test_the_preconditioner_is_what_the_next_step_divides_by(make):
    """Without first moments a step is lr g/P exactly, so P follows from the step that torch takes."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, dtype=F64)
    x, y = torch.randn(10, 3, dtype=F64), torch.randn(10, 2, dtype=F64)
    L = cl.Objective(model, "squared_error", (x, y))
    optimizer = make(model.parameters())
    decay = optimizer.param_groups[0]["weight_decay"]
    predicted = None
    for at in cl.train(L, optimizer, cl.Batches(10, 4, steps=5, seed=1)):
        assert predicted is None or torch.allclose(at.w, predicted, rtol=1e-10)
        predicted = at.w - 0.01 * (at.batch_gradient + decay * at.w) / at.preconditioner


def test_optimizers_without_a_formula_have_no_threshold_or_preconditioner():
    model = torch.nn.Linear(2, 1)
    L = cl.Objective(model, "squared_error", (torch.eye(2), torch.zeros(2, 1)))
    for optimizer in (
        torch.optim.Adagrad(model.parameters()),
        torch.optim.Adam(model.parameters(), amsgrad=True),
        torch.optim.RMSprop(model.parameters(), centered=True),
    ):
        assert stability_threshold(settings(optimizer), 0.1) is None
        assert preconditioner(optimizer, L) is None
    assert preconditioner(torch.optim.SGD(model.parameters(), lr=0.1), L) is None
    assert stability_threshold({"name": "SGD", "momentum": 0.5, "dampening": 0.5, "nesterov": True}, 0.1) is None


def test_groups_that_differ_are_said():
    model = torch.nn.Linear(2, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5, "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert settings(optimizer)["differing"] == ["lr", "momentum"]
    assert learning_rate(optimizer) is None


def test_preconditioned_sharpness_of_a_quadratic():
    """H is diagonal, so P^{-1/2} H P^{-1/2} is too."""

    class Diagonal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.linspace(1, 2, 6, dtype=F64))

        def forward(self, x):
            return 0.5 * (torch.arange(1.0, 7.0, dtype=F64) * self.w**2).sum() * x

    model = Diagonal()
    L = cl.Objective(model, cl.batch_loss(lambda model, x: model(x)), torch.ones(3, dtype=F64))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for at in cl.train(
        L, optimizer, cl.Batches(3, 3, steps=4), diagnostics=[("preconditioned_sharpness", {"tol": 1e-9})]
    ):
        expected = float((torch.arange(1.0, 7.0, dtype=F64) / at.preconditioner).max())
        assert at.measurements["preconditioned_sharpness"].value == pytest.approx(expected, rel=1e-8)


def test_any_optimizer_with_a_closure_trains():
    model = torch.nn.Linear(2, 1, dtype=F64)
    x = torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    L = cl.Objective(model, "squared_error", (x, x.sum(1, keepdim=True)))
    before = float(L.value())
    for _ in cl.train(L, torch.optim.LBFGS(model.parameters(), lr=0.5), cl.Batches(8, 8, steps=5)):
        pass
    assert float(L.value()) < 1e-3 * before
