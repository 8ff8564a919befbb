"""Products by central differences of the gradient: the engine that is approximate, and says so.

Compared with a reference: products and the diagnostics made of them with dense float64 matrices, of twins by plain
operations where a Function has no second derivative. Behaviour only: what is marked, warned of, refused and recommended.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from cases import BY_NAME, DOUBLE, Reference, block, off, solved, some
from failures.test_autograd import OwnKernel, made, problem
from failures.test_silent_functions import DATA, OnceSine, net, objective
from torch import nn

import curvlab as cl
from curvlab.hvp import HessianProducts
from curvlab.references import DEFINITIONS, Dense
from curvlab.throughput import Speed, Spread, recommended, throughput

KINKED = {"mlp_relu_cross_entropy", "mlp_relu_squared_error", "cnn"}
PLAN = ["loss", "sharpness", "interaction_trace", "interaction_sharpness", "gradient_alignment", "batch_sharpness"]


def largest(A: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(A, dim=0).max()


@pytest.mark.filterwarnings("ignore:the loss of the first examples does not depend")
@pytest.mark.parametrize("name", some(list(BY_NAME), 3))
def test_products_are_right_within_their_error(name):
    p, reference = solved(name)
    V = block(len(reference.w))
    expected = reference.hessian @ V
    for dtype, tol in ((DOUBLE, 1e-9), (torch.float32, 1e-4)):
        if dtype == torch.float32 and name in KINKED:
            continue
        L = cl.Objective(p.model, p.loss, p.data, weights=p.weights, dtype=dtype, chunk_size=4)
        products = HessianProducts(L, reference.w, engine="differences")
        found = products.matmat(V.to(dtype))
        assert largest(found.double() - expected) < tol * largest(expected)
        assert largest(found.double() - expected) < 2 * products.error * largest(expected)
        assert products.error < 3e-3
        assert off(products.value_and_gradient()[1], reference.gradient) < (1e-13 if dtype == DOUBLE else 2e-6)
        assert L.outcomes == {"gradient": "ok"}


def test_the_step_is_divided_by_the_length_of_the_vector():
    p, reference = solved("mlp_tanh_cross_entropy")
    products = HessianProducts(p.objective(), reference.w, engine="differences")
    v = block(len(reference.w), 1)
    one = products.matmat(v)
    V = torch.cat([1e9 * v, 1e-9 * v, 0 * v], 1)
    assert torch.allclose(products.matmat(V), torch.cat([1e9 * one, 1e-9 * one, 0 * one], 1), rtol=1e-7)
    assert products.matmat(v[:, :0]).shape == (len(v), 0)
    assert products.error < 1e-8


def test_piecewise_linear_networks_in_float32_are_warned_of():
    p, reference = solved("mlp_relu_cross_entropy")
    L = cl.Objective(p.model, p.loss, p.data, dtype=torch.float32)
    products, V = HessianProducts(L, reference.w, engine="differences"), block(len(reference.w)).float()
    with pytest.warns(UserWarning, match=r"are off by 0.\d of their length in torch.float32.*dtype=torch.float64\)"):
        products.matmat(V)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        products.matmat(V)
    with pytest.warns(UserWarning, match="are off by"):
        found = cl.measure(L, ["sharpness"], w=reference.w.float(), engine="differences")["sharpness"]
    assert found.error > 0.1 * found.value


@pytest.mark.parametrize("dtype, tol", [(DOUBLE, 1e-8), (torch.float32, 1e-3)])
@pytest.mark.parametrize("last", [False, True])
def test_a_plan_without_second_derivatives_is_marked_approximate(last, dtype, tol):
    twin = objective(torch.sin, last=last)
    d = Dense(twin)
    L = cl.Objective(net(OnceSine.apply, last=last), "cross_entropy", DATA, dtype=dtype)
    requests = [(name, {"tol": 1e-6} if name in ("sharpness", "gradient_alignment") else {}) for name in PLAN]
    found = cl.measure(L, requests, batch_size=1, engine="differences")
    for name, m in found.items():
        truth = float(DEFINITIONS[name](d, 1, False))
        if name == "loss":
            assert m.note is None
            assert m.kind == "exact"
            continue
        assert "approximate: products by central differences, off by about" in m.note
        assert m.kind == "bound"
        low, high = m.interval()
        assert low <= truth <= high
        assert abs(m.value - truth) < tol * abs(truth)
        assert m.error > 0
    alone = cl.measure(L, requests[-2:], batch_size=1, engine="differences")
    for name, m in alone.items():  # no error depends on who else is measured
        assert (m.value, m.error, m.note) == (found[name].value, found[name].error, found[name].note)


def test_a_run_by_differences_follows_one_by_double_backward():
    def values(function, engine):
        L = objective(function)
        sgd = torch.optim.SGD(L.model.parameters(), lr=0.3)
        names = ["sharpness", "interaction_trace", "hessian_trace", "layer_sharpness", "directional_sharpness"]
        return [
            {n: np.atleast_1d(m.value) for n, m in at.measurements.items() if n != "hessian_trace"}
            for at in cl.train(L, sgd, cl.Batches(9, 3, 4), diagnostics=names, engine=engine)
        ]

    for one, two in zip(values(OnceSine.apply, "differences"), values(torch.sin, "auto"), strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(value, two[name], rtol=1e-5, err_msg=name)


@pytest.mark.filterwarnings("ignore")
def test_refusals_name_the_engine_and_it_works():
    p = problem(made(OwnKernel), 3, 4)
    once = objective(OnceSine.apply)
    for L in (p.objective(), once):
        with pytest.raises(ValueError, match='engine="differences"'):
            cl.hessian(L) @ torch.ones(L.num_params, dtype=DOUBLE)
        cl.hessian(L, engine="differences") @ torch.ones(L.num_params, dtype=DOUBLE)
        with pytest.raises(ValueError, match='engine="differences"'):  # which checked the gradient only
            cl.hessian(L) @ torch.ones(L.num_params, dtype=DOUBLE)
    p.model.__class__ = OwnKernel.__bases__[0]  # the same function by a kernel that has a second derivative
    reference = Reference(p)
    p.model.__class__ = OwnKernel
    V = block(len(reference.w))
    H = cl.hessian(p.objective(), reference.w, engine="differences")
    assert off(H @ V, reference.hessian @ V) < 1e-8
    assert 0 < H.errors[-1][0] < 1e-8 * H.errors[-1][1]


def test_a_gradient_that_is_not_that_of_the_loss_is_still_warned_of():
    L = objective(lambda x: x * x.norm(dim=1, keepdim=True).detach())
    with pytest.warns(UserWarning, match="gradient is not that of the loss.*detach in 1"):
        cl.measure(L, ["sharpness"], engine="differences")
    assert L.outcomes["gradient"].startswith("warned")


def test_differences_are_never_chosen_unasked():
    p, _ = solved("linear")
    L = p.objective(memory=1)
    assert HessianProducts(L, L.params()).engine == "graph"
    assert HessianProducts(L, L.params(), engine="differences").reason == "differences was asked for, and keeps nothing"
    one = Spread(1.0, 1.0, 1.0)
    slow, fast = (Speed(n, n, one, one, setup=s) for n, s in (("graph", 9.0), ("differences", 0.0)))
    assert recommended([slow, fast]) is slow
    assert recommended([fast]) is fast
    L = cl.Objective(nn.Linear(2, 1), "squared_error", (torch.eye(2), torch.ones(2, 1)))
    (found,) = throughput(L, engines=["differences"], rounds=1)
    assert (found.used, found.note, found.nbytes) == ("differences", "approximate", 0)
