"""Curvature along the update from losses alone.

Compared with a reference: quadratics, where both quantities are known, steps that training takes, and dense Hessians in both
precisions (`test_diagnostics.py` has the definitions). Behaviour only: why there is no value, and that passes are forward.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import solved
from torch import Tensor, nn

import curvlab as cl

F64 = torch.float64
BOTH = ["critical_sharpness", "difference_sharpness"]


def regression(dtype: torch.dtype = F64, scale: float = 1.0) -> cl.Objective:
    """Least squares, whose Hessian is constant."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, k, generator=draw, dtype=F64) for k in (5, 1))
    model = nn.Linear(5, 1, bias=False, dtype=F64)
    nn.init.normal_(model.weight, generator=draw)
    return cl.Objective(model, "squared_error", (scale * x, y), dtype=dtype)


def of_weight(function, w: float = 1.0, dtype: torch.dtype = F64) -> cl.Objective:
    """A function of one weight."""
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, w)
    one = torch.ones(2, 1, dtype=dtype)
    return cl.Objective(model, lambda z, y: function(z[:, 0]), (one, one), check="never")


@pytest.mark.parametrize("lr", [None, 1e-4, 1e3])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_on_a_quadratic_both_are_the_curvature_along_the_gradient(scale, lr):
    L = regression(scale=scale)
    g = L.gradient()
    truth = float(g @ (cl.hessian(L) @ g) / (g @ g))
    found = cl.measure(L, [(name, {"tol": 1e-10}) for name in BOTH], lr=lr)
    assert found["critical_sharpness"].value == pytest.approx(truth, rel=2e-10)
    for m in found.values():
        assert m.interval()[0] <= truth <= m.interval()[1]
    assert found["difference_sharpness"].value == pytest.approx(truth, rel=1e-8)


def test_a_preconditioned_step():
    L = regression()
    adam = torch.optim.Adam(L.model.parameters(), lr=0.01)
    for at in cl.train(L, adam, cl.Batches(20, 20, 3), diagnostics=[("critical_sharpness", {"tol": 1e-9})]):
        d = at.gradient / at.preconditioner
        truth = float(d @ (at.hessian @ d) / (at.gradient @ d))
        assert at.measurements["critical_sharpness"].value == pytest.approx(truth, rel=1e-8)


def test_steps_below_it_lower_the_loss_and_steps_above_raise_it():
    p, _ = solved("mlp_tanh_cross_entropy")
    L = p.objective()
    request = ("critical_sharpness", {"along": "batch_gradient", "tol": 1e-6})
    sgd = torch.optim.SGD(L.model.parameters(), lr=0.1)
    state = {name: t.clone() for name, t in L.model.state_dict().items()}
    for at in cl.train(L, sgd, cl.Batches(L.size, L.size - 2, 1), diagnostics=[request]):
        m = at.measurements["critical_sharpness"]
        critical, step = 2 / m.value, at.batch_gradient
        for factor, rises in ((0.5, False), (0.999, False), (1.001, True), (1.5, True)):
            assert bool(L.value(at.w - factor * critical * step) > at.value) == rises
    L.model.load_state_dict(state)


@pytest.mark.parametrize("name", ["mlp_gelu_cross_entropy", "layer_norm", "weighted", "padded_embedding", "gru"])
def test_errors_hold_in_both_precisions(name):
    p, _ = solved(name)
    found = {}
    for dtype in (F64, torch.float32):
        L = cl.Objective(p.model, p.loss, p.data, weights=p.weights, dtype=dtype, chunk_size=4)
        found[dtype] = cl.measure(L, [BOTH[0], (BOTH[1], {"tol": 1e-12})])
    L = p.objective()
    g = L.gradient()
    truth = float(g @ (cl.hessian(L) @ g) / (g @ g))
    for dtype, relative in ((F64, 1e-8), (torch.float32, 3e-3)):
        m = found[dtype]["difference_sharpness"]
        assert abs(m.value - truth) <= m.error + m.floor <= relative * abs(truth)
    (exact, fine), (coarse, rough) = ((m["critical_sharpness"].value, m["critical_sharpness"].error) for m in found.values())
    assert abs(exact - coarse) <= fine + rough


def nothing_above(z: Tensor) -> Tensor:
    return torch.where(z < -3, torch.nan, z)


@pytest.mark.parametrize(
    "L, name, reason",
    [
        (lambda: of_weight(lambda z: z), BOTH[0], "no bracket: after a step of 1.07e+09, 30 factors of two away, the loss"),
        (lambda: of_weight(nothing_above), BOTH[0], "does not exceed its start up to a step of 4, after which it is not"),
        (lambda: of_weight(lambda z: z**2, 0.0), BOTH[0], "the gradient is zero"),
        (lambda: of_weight(lambda z: z**2, 0.0), BOTH[1], "the gradient is zero"),
        (lambda: of_weight(lambda z: 1e6 + 1e-3 * z**2, dtype=torch.float32), BOTH[0], "by no more than its rounding"),
        (lambda: of_weight(lambda z: torch.where(z == 1, z, torch.nan)), BOTH[1], "the loss is not finite around the point"),
    ],
)  # fmt: skip
def test_without_a_bracket_there_is_no_value(L, name, reason):
    m = cl.measure(L(), [name])[name]
    assert m.value is None
    assert reason in m.note


def test_against_the_gradient_and_without_one_there_is_no_value():
    L = regression()
    at = cl.Snapshot(L, L.params(), batch_gradient=-L.gradient(), lr=0.1)
    request = [("critical_sharpness", {"along": "batch_gradient"})]
    uphill = cl.diagnostics.evaluate(at, cl.diagnostics.parse(request))["critical_sharpness"]
    assert uphill.note.endswith("the loss exceeds its start")
    assert "there is no gradient of a batch" in cl.measure(L, request)["critical_sharpness"].note


def test_what_is_not_resolved_says_so():
    L = of_weight(lambda z: 1e3 + 1e-4 * z.sin(), dtype=torch.float32)
    m = cl.measure(L, ["difference_sharpness"])["difference_sharpness"]
    assert m.note == "not resolved from zero; measure in float64"
    assert m.interval()[0] <= -1e-4 * math.sin(1) <= m.interval()[1]


def test_one_gradient_and_forward_passes():
    L, passes = regression(), []
    _ = L.chunk_size  # which is found by two gradients of a few examples
    losses = L.losses
    L.losses = lambda *given: passes.append(torch.is_grad_enabled()) or losses(*given)
    for name in BOTH:
        passes.clear()
        m = cl.measure(L, [name])[name]
        assert m.matvecs == 0
        assert passes.count(True) == 1
        assert 8 < len(passes) < 30
