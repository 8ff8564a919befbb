"""Gradient flow, and how far training is from it.

Compared with a reference: flows of quadratic losses with the matrix exponential, of quartic ones with their closed form;
penalties with their dense formulas; SGD, n-step SGD and gradient descent with the orders of their distance from the flows of
plain and modified losses (Smith et al. 2021, eq. 10, 20 and 39). The rest is behaviour: logs, saved trajectories, refusals.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlab as cl
from curvlab import methods

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# Exact solutions

X, Y = drawn(12, 5), drawn(12, 1, seed=1)


def regression(dtype: torch.dtype = DOUBLE) -> cl.Objective:
    model = nn.Linear(5, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(drawn(1, 5, seed=2))
    return cl.Objective(model, "squared_error", (X.to(dtype), Y.to(dtype)))


def exact(t: float, A: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """The solution of dw/dt = -(A w - b)."""
    values, vectors = torch.linalg.eigh(A)
    rest = torch.linalg.solve(A, b)
    return rest + vectors @ (torch.exp(-t * values) * (vectors.T @ (w - rest)))


H, B = X.T @ X / 12, X.T @ Y[:, 0] / 12


@pytest.mark.parametrize("tol", [1e-4, 1e-6, 1e-8, 1e-11])
def test_the_flow_of_a_quadratic_loss(tol, tmp_path):
    L = regression()
    start = L.params()
    for _ in cl.gradient_flow(L, 40, lr=0.2, tol=tol, run=tmp_path / "flow"):
        pass
    run = cl.Run(tmp_path / "flow")
    saved = run.load("trajectory")
    truth = torch.stack([exact(0.2 * k, H, B, start) for k in range(41)])
    off = (saved["params"] - truth).norm(dim=1)
    assert float(off.max()) < 30 * tol
    assert bool((off <= saved["errors"] + 1e-14).all())
    assert float(saved["errors"].max()) < 3000 * tol
    assert saved["times"].tolist() == pytest.approx([0.2 * k for k in range(41)])
    assert run.column("error")[1].tolist() == saved["errors"].tolist()


def test_the_flow_of_a_stiff_quadratic_loss_takes_few_steps_and_keeps_its_tolerance():
    """λ from 1e-3 to 1e3: explicit steps are limited to 6/λ_max, and the error control finds that limit by itself."""
    model = nn.Linear(4, 1, bias=False).double()
    eigenvalues = torch.tensor([1e3, 10.0, 1.0, 1e-3], dtype=DOUBLE)
    L = cl.Objective(model, "squared_error", ((4 * eigenvalues).sqrt().diag(), torch.zeros(4, 1, dtype=DOUBLE)))
    start = L.params()
    calls = []
    gradient = L.gradient
    L.gradient = lambda *args: (calls.append(1), gradient(*args))[1]
    *_, end = cl.gradient_flow(L, 1, lr=0.2)
    assert torch.allclose(end.w, start * torch.exp(-0.2 * eigenvalues), rtol=0, atol=1e-7)
    steps = 0.2 * 1e3 / 6
    assert (
        len(calls) < 2 * 15 * 2 * steps
    )  # two integrations of up to twice as many steps, 15 gradients each with dense output


def test_the_flow_with_penalties():
    """Of a quadratic: ∇(s ‖∇L‖²) = 2 s H (H w - b); and over micro-batches the mean of those."""
    L = regression()
    start = L.params()
    *_, end = cl.gradient_flow(L, [3], lr=0.2, penalties=[(0.3, "gradient_norm")], tol=1e-11)
    A = H + 0.6 * H @ H
    assert torch.allclose(end.w, exact(0.6, A, B + 0.6 * H @ B, start), rtol=0, atol=1e-10)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    for options, index in (({"micro_batch_size": 4}, torch.arange(12)), ({"partition": order.view(3, 4)}, order)):
        A, b = H.clone(), B.clone()
        for part in index.split(4):
            H_M, b_M = X[part].T @ X[part] / 4, X[part].T @ Y[part, 0] / 4
            A, b = A + 0.6 * H_M @ H_M / 3, b + 0.6 * H_M @ b_M / 3
        penalties = [(1.2, cl.regularizers.implicit_regularizer)]
        *_, end = cl.gradient_flow(L, [3], lr=0.2, penalties=penalties, tol=1e-9, **options)
        assert torch.allclose(end.w, exact(0.6, A, b, start), rtol=0, atol=1e-8)
        assert end.measurements["implicit_regularizer"].value == pytest.approx(
            sum(float((X[p].T @ (X[p] @ end.w - Y[p, 0]) / 4).square().sum()) for p in index.split(4)) / 12, rel=1e-9
        )


def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
    return targets * outputs[:, 0] ** 4 / 4


def quartic_objective(sign: float) -> cl.Objective:
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(2.0)
    return cl.Objective(model, quartic, (torch.ones(2, 1, dtype=DOUBLE), torch.full((2,), sign, dtype=DOUBLE)))


def test_the_flow_of_a_quartic_loss():
    """dw/dt = -w³: w = w_0/√(1 + 2 w_0² t)."""
    for at in cl.gradient_flow(quartic_objective(1.0), 30, lr=0.1, tol=1e-10):
        assert float(at.w) == pytest.approx(2 / math.sqrt(1 + 8 * 0.1 * at.step), abs=1e-8)


def test_a_flow_that_runs_away_is_followed_as_far_as_it_goes(tmp_path):
    """dw/dt = w³ leaves in time 1/8."""
    seen = []
    flow = (
        seen.append(at.step)
        for at in cl.gradient_flow(quartic_objective(-1.0), 30, lr=0.01, run=tmp_path / "flow", tol=1e-5)
    )
    with pytest.raises(
        FloatingPointError, match=r"cannot be followed beyond t = 0\.125 of 0\.13 .* runs away in finite"
    ):
        list(flow)
    assert seen == list(range(13))
    assert cl.Run(tmp_path / "flow").load("trajectory")["steps"].tolist() == seen


def test_a_float32_model_is_followed_in_its_own_precision_or_in_float64():
    L = regression(torch.float32)
    start = L.params().double()
    *_, end = cl.gradient_flow(L, 5, lr=0.2, tol=2e-4)
    assert end.w.dtype == torch.float32
    assert torch.allclose(end.w.double(), exact(1.0, H, B, start), rtol=0, atol=1e-3)
    with pytest.raises(
        ValueError, match=r"tol is 1e-08, but the gradients are torch.float32 and allow 1e-04; make the"
    ):
        cl.gradient_flow(L, 5, lr=0.2)
    precise = cl.Objective(L.model, "squared_error", (X.float(), Y.float()), dtype=DOUBLE)
    *_, end = cl.gradient_flow(precise, 5, lr=0.2)
    assert torch.allclose(end.w, exact(1.0, H, B, start), rtol=0, atol=1e-6)


# What a flow gives


def network() -> cl.Objective:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    (x, y), _ = cl.problems.digits(32, dtype=DOUBLE)
    return cl.Objective(model, "cross_entropy", (x, y))


def test_snapshots_and_logs_are_those_of_training(tmp_path):
    L = network()
    before = L.params()
    requests = ["loss", "gradient_norm", "sharpness", ("gradient_second_moment_trace", {})]
    flow = cl.gradient_flow(
        L, 6, lr=0.05, diagnostics=requests, every=2, run=tmp_path / "flow", batch_size=8, config={"note": "mine"}
    )
    seen = [(at.step, at.lr, dict(at.measurements), at.w) for at in flow]
    assert torch.equal(L.params(), before)
    assert [(step, lr) for step, lr, _, _ in seen] == [(k, 0.05) for k in range(7)]
    for step, _, measured, w in seen:
        assert bool(measured) == (step % 2 == 0)
        if measured:
            alone = cl.measure(L, requests, w=w, batch_size=8)
            for name in ("loss", "gradient_norm"):
                assert measured[name].value == pytest.approx(alone[name].value, rel=1e-12)
            assert measured["sharpness"].value == pytest.approx(alone["sharpness"].value, rel=1e-3)
    run = cl.Run(tmp_path / "flow")
    assert run.series("loss").steps.tolist() == [0, 2, 4, 6]
    assert run.series("loss").values.tolist() == [m["loss"].value for _, _, m, _ in seen[::2]]
    assert run.column("time")[1].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert run.config["note"] == "mine"
    assert run.config["training"]["optimizer"] == {"name": "gradient_flow", "tol": 1e-8}
    assert run.config["training"]["trained_loss"] is None
    assert torch.equal(run.load("final")["params"], seen[-1][3])
    assert torch.equal(run.load("trajectory")["params"], torch.stack([w for _, _, _, w in seen[::2]]))
    assert np.all(np.diff(run.series("loss").values) < 0)


def test_a_flow_can_be_left_and_starts_anywhere(tmp_path):
    L = network()
    w = L.params() + 1
    for at in cl.gradient_flow(L, 6, lr=0.05, w=w, run=tmp_path / "flow", penalties=[(0.1, "implicit_regularizer")]):
        if at.step == 0:
            assert torch.equal(at.w, w)
        if at.step == 3:
            break
    run = cl.Run(tmp_path / "flow")
    assert run.load("trajectory")["steps"].tolist() == [0, 1, 2, 3]
    assert run.load("final")["step"] == 3
    assert run.config["training"]["trained_loss"] == "0.1 implicit_regularizer is added"
    assert run.series("implicit_regularizer").values[0] == pytest.approx(float(L.gradient(w).square().sum()) / 4)


def test_steps_may_have_gaps():
    L = regression()
    start = L.params()
    flow = list(cl.gradient_flow(L, [2, 3, 10], lr=0.2))
    assert [at.step for at in flow] == [2, 3, 10]
    for at in flow:
        assert torch.allclose(at.w, exact(0.2 * at.step, H, B, start), rtol=0, atol=1e-7)
    assert [at.step for at in cl.gradient_flow(L, 0, lr=0.2)] == [0]
    assert torch.equal(next(cl.gradient_flow(L, 0, lr=0.2)).w, start)


REFUSED = {
    "steps": (r"steps are \[2, 1\]; expected a number from 0", {"steps": [2, 1]}),
    "no_steps": (r"steps are \[\]; expected a number", {"steps": []}),
    "negative": (r"steps are -1; expected a number", {"steps": -1}),
    "lr": ("lr is 0; expected a positive time per step", {"lr": 0}),
    "every": ("every is 0; expected a whole number", {"every": 0}),
    "tol": ("tol is 1e-16, but the gradients are torch.float64 and allow 2e-13", {"tol": 1e-16}),
    "diagnostic": ("there is no diagnostic 'sharpnes'", {"diagnostics": ["sharpnes"]}),
    "needs": ("diagnostic instability needs batch_size", {"diagnostics": ["instability"]}),
    "penalty": ("there is no regularizer 'norm'", {"penalties": [(1.0, "norm")]}),
    "random": (
        "fisher_trace_penalty draws .* at random, so it is no function of w",
        {"penalties": [(1, "fisher_trace")]},
    ),
    "micro_batch_size": ("micro_batch_size is 0; expected at least 1", {"micro_batch_size": 0}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name):
    text, options = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        cl.gradient_flow(network(), **{"steps": 3, "lr": 0.1} | options)


def test_a_flow_is_never_overwritten(tmp_path):
    list(cl.gradient_flow(regression(), 1, lr=0.1, run=tmp_path / "flow"))
    with pytest.raises(FileExistsError, match="already holds a run"):
        cl.gradient_flow(regression(), 1, lr=0.1, run=tmp_path / "flow")


# Distances between trajectories


def test_the_distance_of_training_from_a_flow(tmp_path):
    L = network()
    flow = {at.step: at.w for at in cl.gradient_flow(L, range(0, 20, 2), lr=0.1, run=tmp_path / "flow", tol=1e-6)}
    requests = [("trajectory_distance", {"run": tmp_path / "flow"})]
    sgd = torch.optim.SGD(L.model.parameters(), lr=0.1)
    errors = cl.Run(tmp_path / "flow").load("trajectory")["errors"].tolist()
    for at in cl.train(L, sgd, cl.Batches(32, 32, 22), diagnostics=requests, run=tmp_path / "gd"):
        m = at.measurements["trajectory_distance"]
        if at.step in flow:
            assert m.value == pytest.approx(float((at.w - flow[at.step]).norm()), rel=1e-12)
            assert m.error == errors[at.step // 2]
            assert m.kind == ("bound" if at.step else "exact")
        else:
            assert m.value is None
            assert m.note == f"the trajectory has no step {at.step}; it has 0, 2, ..., 18"
    values = cl.Run(tmp_path / "gd").series("trajectory_distance").values
    assert np.isnan(values[1::2]).all()
    assert values[0] == 0 < values[2] < values[18]


def test_the_distance_travelled():
    L = network()
    start = L.params()
    sgd = torch.optim.SGD(L.model.parameters(), lr=0.1)
    for at in cl.train(L, sgd, cl.Batches(32, 8, 5), diagnostics=["trajectory_distance"]):
        m = at.measurements["trajectory_distance"]
        assert m.value == pytest.approx(float((at.w - start).norm()), rel=1e-12)
        assert m.kind == "exact"
    assert cl.measure(L, ["trajectory_distance"])["trajectory_distance"].value == 0


def test_the_distance_between_two_runs(tmp_path):
    """Of any run that saved its points as a flow does."""
    L = network()
    path = {}
    sgd = torch.optim.SGD(L.model.parameters(), lr=0.1)
    for at in cl.train(L, sgd, cl.Batches(32, 8, 5, seed=1), run=tmp_path / "one"):
        path[at.step] = at.w
    cl.Run(tmp_path / "one").save(
        "trajectory",
        {"steps": torch.tensor(list(path)), "params": torch.stack(list(path.values())), "errors": torch.zeros(5)},
    )
    other = network()
    sgd = torch.optim.SGD(other.model.parameters(), lr=0.1)
    requests = [("trajectory_distance", {"run": str(tmp_path / "one")})]
    for at in cl.train(other, sgd, cl.Batches(32, 8, 5, seed=2), diagnostics=requests):
        m = at.measurements["trajectory_distance"]
        assert m.value == pytest.approx(float((at.w - path[at.step]).norm()), rel=1e-12)
        assert (m.kind, m.error) == ("exact", 0)


def test_a_trajectory_of_another_model_and_one_that_is_not_there_are_refused(tmp_path):
    list(cl.gradient_flow(regression(), 1, lr=0.1, run=tmp_path / "flow"))
    with pytest.raises(ValueError, match=r"flow has 5 parameters and this model 610; compare runs of the same model"):
        cl.measure(network(), [("trajectory_distance", {"run": tmp_path / "flow"})])
    with pytest.raises(FileNotFoundError, match="holds no run"):
        cl.measure(network(), [("trajectory_distance", {"run": tmp_path / "none"})])
    L = regression()
    list(cl.train(L, torch.optim.SGD(L.model.parameters(), lr=0.1), cl.Batches(12, 4, 1), run=tmp_path / "bare"))
    with pytest.raises(FileNotFoundError, match=r"trajectory\.pt does not exist"):
        cl.measure(L, [("trajectory_distance", {"run": tmp_path / "bare"})])


# Smith's theorem: the order in the learning rate of the distance between discrete steps and the flow of a modified loss

RATES = (0.01, 0.005, 0.0025)
ALTERNATING = cl.Batches(32, 8, 8, epochs=True, order="alternating")
PARTITION = ALTERNATING.partition


def order(distances: list[float]) -> float:
    """The slope of log distance over log rate, by least squares."""
    return float(np.polyfit(np.log(RATES[: len(distances)]), np.log(distances), 1)[0])


def sgd_end(batches, lr: float, n: int = 1) -> Tensor:
    L = network()
    optimizer = methods.NStepSGD(L.model.parameters(), lr, n=n)
    for _ in cl.train(L, optimizer, batches):
        pass
    return L.params()


@cache
def flow_end(steps: int, lr: float, strength: float, whole: bool = False) -> Tensor:
    """At time lr·steps, of C + strength · (1/4) mean_k ‖∇Ĉ_k‖² over the four batches, or over all data as one."""
    penalties = [(strength, "implicit_regularizer")] if strength else []
    partition = torch.arange(32)[None] if whole else PARTITION
    *_, end = cl.gradient_flow(network(), [steps], lr=lr, penalties=penalties, partition=partition, tol=1e-10)
    return end.w


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())


# Coefficients are multiples of that of eq. 20 and 39, which is the bare learning rate.
@pytest.mark.parametrize("n, coefficient, expected", [(1, 0.0, 2), (1, 1.0, 3), (1, 2.0, 2), (3, 0.0, 2), (3, 1.0, 3)])
def test_sgd_with_a_reversed_second_epoch_follows_the_modified_loss(n, coefficient, expected):
    """Smith eq. 20, and eq. 39 for n-step SGD: order 3 with the right coefficient, 2 with any other or none."""
    found = []
    for lr in RATES:
        bare = lr / n
        found.append(distance(sgd_end(ALTERNATING, bare, n), flow_end(8, lr, coefficient * bare)))
    assert order(found) == pytest.approx(expected, abs=0.15)


def test_n_step_sgd_has_not_the_coefficient_of_sgd():
    found = [distance(sgd_end(ALTERNATING, lr / 3, 3), flow_end(8, lr, lr)) for lr in RATES[:2]]
    assert order(found) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("n", [1, 3])
def test_forward_epochs_follow_no_modified_loss(n):
    """The order of the batches enters at second order: two epochs forward are that far from the flow of C_mod."""
    forward = cl.Batches(32, 8, 8, epochs=True, order="fixed")
    found = [distance(sgd_end(forward, lr / n, n), flow_end(8, lr, lr / n)) for lr in RATES[:2]]
    assert order(found) == pytest.approx(2, abs=0.15)


@cache
def ends_of_all_orders(lr: float) -> Tensor:
    return torch.stack([sgd_end(list(PARTITION[list(p)]), lr) for p in itertools.permutations(range(4))])


@pytest.mark.parametrize("coefficient, expected", [(0.0, 2), (1.0, 3)])
def test_the_mean_over_all_orders_of_one_epoch_follows_the_modified_loss(coefficient, expected):
    """Smith eq. 15-20."""
    found = [distance(ends_of_all_orders(lr).mean(0), flow_end(4, lr, coefficient * lr)) for lr in RATES[:2]]
    assert order(found) == pytest.approx(expected, abs=0.15)


def test_one_epoch_does_not_depend_on_the_order_of_batches_at_first_order():
    """Smith eq. 14: "no noise in the iterates of SGD after completing one epoch" at O(ε); the spread is of order 2."""
    spreads = [float((ends_of_all_orders(lr) - ends_of_all_orders(lr).mean(0)).norm(dim=1).max()) for lr in RATES[:2]]
    assert order(spreads) == pytest.approx(2, abs=0.15)


def test_two_alternating_epochs_do_not_depend_on_the_order_at_second_order():
    """The trick of sec. 2.2: the reversed epoch cancels what the order adds at O(ε²)."""
    spreads = []
    for lr in RATES[:2]:
        ends = [sgd_end(list(PARTITION[[*p, *reversed(p)]]), lr) for p in ((0, 1, 2, 3), (2, 0, 3, 1), (3, 1, 0, 2))]
        spreads.append(max(distance(a, b) for a, b in itertools.combinations(ends, 2)))
    assert order(spreads) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("coefficient, expected", [(0.0, 2), (1.0, 3), (2.0, 2)])
def test_gradient_descent_follows_its_own_modified_loss(coefficient, expected):
    """Smith eq. 10 (Barrett and Dherin 2021): C + (ε/4) ‖∇C‖²."""
    full = cl.Batches(32, 32, 8)
    found = [distance(sgd_end(full, lr), flow_end(8, lr, coefficient * lr, whole=True)) for lr in RATES[:2]]
    assert order(found) == pytest.approx(expected, abs=0.15)


def test_the_penalty_of_the_modified_loss_is_smiths():
    """C_reg = (1/4) mean_k ‖∇Ĉ_k‖² over the batches that are trained on, by plain differentiation."""
    L = network()
    x, y = L.examples.batches[0]
    params = list(L.model.parameters())
    total = torch.zeros((), dtype=DOUBLE)
    for part in PARTITION:
        grads = torch.autograd.grad(F.cross_entropy(L.model(x[part]), y[part]), params, create_graph=True)
        total = total + sum(g.square().sum() for g in grads) / 16
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, params)])
    h = 1e-4  # one tiny step of the flow of C + 1000 C_reg against that of C
    flows = [
        next(cl.gradient_flow(L, [1], lr=h * 1e-3, penalties=p, partition=PARTITION, tol=1e-12)).w
        for p in ([(1000.0, "implicit_regularizer")], [])
    ]
    assert torch.allclose((flows[1] - flows[0]) / h, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
