"""Eigenpairs tracked from step to step: planted spectra that move, and training runs with catapults.

Compared with a reference: eigenvalues by LAPACK, of planted matrices and of Hessians by double backward. Only behavioural:
numbers of products.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvlab as cl
from curvlab.diagnostics.tracking import tracked_eigenpairs
from curvlab.linalg import Eigenpairs, LinearOperator

F64 = torch.float64
STEPS = 40
SEEDS = [pytest.param(range(0, 21, 4), id="some"), pytest.param(range(21), id="all", marks=pytest.mark.slow)]
OBJECTIVE = cl.Objective(nn.Linear(1, 1), "squared_error", (torch.ones(1, 1), torch.ones(1, 1)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def basis(P: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(P, P, generator=seeded(seed), dtype=F64)).Q


def follow(bases, spectra, k: int, *, seed: int = 0, dtype=F64, hints=None) -> tuple[list[Eigenpairs], Tensor]:
    """Tracked pairs of the matrices Q diag(values) Qᵀ, checked to be honest Ritz pairs, and which ranks were lost.

    A rank is lost where the true eigenvalue lies above the reported interval; (steps, k) booleans.
    """
    carry: dict = {}
    found, lost = [], []
    for step, (Q, values) in enumerate(zip(bases, spectra, strict=True)):
        A = (Q @ torch.diag(values) @ Q.T).to(dtype)
        op = LinearOperator(lambda V, A=A: A @ V, len(A), dtype)
        at = cl.Snapshot(OBJECTIVE, OBJECTIVE.params(), step, seed, carry=carry)
        pairs = tracked_eigenpairs(at, "planted", op, k, 1e-2, hint=None if hints is None else hints[step].to(dtype))
        true = values.sort(descending=True).values
        rounding = pairs.floor + 4 * torch.finfo(dtype).eps * len(A) * float(true.abs().max())
        own = torch.linalg.vector_norm(A.to(F64) @ pairs.vectors.to(F64) - pairs.vectors * pairs.values, dim=0)
        assert pairs.converged
        assert pairs.verified == pairs.explored  # a product of its own with every random direction
        assert torch.all((pairs.residuals - own).abs() <= rounding)
        assert torch.all(pairs.values <= true[:k] + rounding)  # no Ritz value above the eigenvalue of its rank
        distance = (pairs.values[:, None] - true[None]).abs().min(1).values
        assert torch.all(distance <= pairs.residuals + rounding)  # some eigenvalue is that near
        found.append(pairs)
        lost.append(pairs.values + pairs.residuals < true[:k] - rounding)
    return found, torch.stack(lost)


def mean_products(found: list[Eigenpairs]) -> float:
    return float(np.mean([pairs.matvecs for pairs in found[1:]]))


def spectrum(P: int, *top: float) -> Tensor:
    return torch.cat([torch.tensor(top, dtype=F64), torch.linspace(-0.5, 0.4, P - len(top), dtype=F64)])


def between(one: Tensor, two: Tensor, t: int) -> Tensor:
    return one + (two - one) * t / (STEPS - 1)


# Spectra that move. Each case gives the eigenvalues and the number of top ones that must never be lost.

MOVES = {
    "first_and_second_cross": lambda P, t: between(spectrum(P, 5, 4, 3, 2), spectrum(P, 4, 5, 3, 2), t),
    "k_th_and_next_cross": lambda P, t: between(spectrum(P, 5, 4, 3, 2), spectrum(P, 5, 3, 4, 2), t),
    "first_and_second_swap": lambda P, t: spectrum(P, *((5, 4, 3, 2) if t < 20 else (4, 5, 3, 2))),
    "k_th_and_next_swap": lambda P, t: spectrum(P, *((5, 4, 3, 2) if t < 20 else (5, 3, 4, 2))),
    "first_and_second_swap_every_step": lambda P, t: spectrum(P, *((5, 4, 3, 2) if t < 20 or t % 2 else (4, 5, 3, 2))),
    "all_scaled_by_a_jump": lambda P, t: spectrum(P, 5, 4, 3, 2) * (1.0 if t < 20 else 30.0),
    "repeated": lambda P, t: spectrum(P, 5, 5, 5, 2) * (1 + t / 20),
    "negative_top": lambda P, t: between(spectrum(P, 5, 4, 3, 2), spectrum(P, 4, 5, 3, 2), t) - 8,
    "sign_of_the_top_changes": lambda P, t: spectrum(P, 5, 4, 3, 2) - 0.3 * t,
}


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("move", MOVES)
def test_moving_eigenvalues_are_not_lost(move, k, seeds):
    """The eigenvectors stand still, so a tracked one that loses its rank keeps a residual of zero."""
    spent = []
    for seed in seeds[::2]:
        P = (20, 50, 200)[seed % 3]
        found, lost = follow([basis(P, seed)] * STEPS, [MOVES[move](P, t) for t in range(STEPS)], k, seed=seed)
        assert not lost.any()
        spent.append(mean_products(found))
    assert np.mean(spent) <= (4 if k == 1 else 5)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("angle", [0.02, 0.3, 1.5])
def test_turning_eigenvectors_are_not_lost(angle, dtype, k, seeds):
    """The whole basis turns by exp(angle K), K antisymmetric and random of norm 1: up to a new basis at every step."""
    for seed in seeds[::2]:
        P = (20, 60, 150)[seed % 3]
        turn, bases = rotation(P, angle, seed), [basis(P, seed)]
        for _ in range(STEPS - 1):
            bases.append(turn @ bases[-1])
        spectra = [MOVES["first_and_second_cross"](P, t) for t in range(STEPS)]
        found, lost = follow(bases, spectra, k, seed=seed, dtype=dtype)
        assert not lost[:, 0].any()
        if angle == 0.02:
            assert mean_products(found) <= 2 * k + 3


def rotation(P: int, angle: float, seed: int) -> Tensor:
    K = torch.randn(P, P, generator=seeded(seed), dtype=F64)
    return torch.linalg.matrix_exp(angle * (K - K.T) / torch.linalg.matrix_norm(K - K.T, 2))


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("jump", [1.1, 2.0, 10.0, "split", "rise"])
def test_what_rises_in_an_unseen_direction_is_found_within_16_steps(jump, k, seeds):
    """Nothing that is tracked, nor the gradient, has any part of it: only a random vector can find it.

    "rise": the hidden eigenvalue grows by 0.5 a step from 3.25, so that it is the largest four steps later.
    "split": one of seven copies of the top eigenvalue leaves the others, of which no more than k + 1 have been seen.
    """
    waits = []
    for seed in seeds:
        P = (20, 100, 300)[seed % 3]
        rise = 3 + seed
        quiet = spectrum(P, *((5, 4, 3, 2) if jump != "split" else (5,) * 7))
        risen = quiet.clone()
        if jump != "rise":
            risen[6 if jump == "split" else P // 2] = 6.0 if jump == "split" else 5 * jump
        Q = basis(P, seed)
        spectra = [risen if t >= rise else quiet for t in range(STEPS)]
        if jump == "rise":
            hidden = [torch.full((1,), min(8.0, 5.25 + 0.5 * (t - rise)), dtype=F64) for t in range(STEPS)]
            spectra = [torch.cat([quiet[:-1], value.clamp_min(3.25)]) for value in hidden]
        _, lost = follow([Q] * STEPS, spectra, k, seed=seed, hints=[Q[:, :5].sum(1)] * STEPS)
        missed = torch.nonzero(lost[:, 0])[:, 0].tolist()
        assert missed == list(range(rise, rise + len(missed)))  # once found it is not lost again
        waits.append(len(missed))
    assert max(waits) <= 16
    assert np.mean(waits) <= 9


@pytest.mark.parametrize("k", [1, 3])
def test_an_outlier_that_the_hint_points_to_is_found_at_once(k):
    """A gradient that grows along the new direction, as in a catapult, calls for a search beside it."""
    Q = basis(100, 1)
    quiet, risen = spectrum(100, 5, 4, 3, 2), spectrum(100, 5, 4, 3, 2)
    risen[50] = 20.0
    hints = [Q[:, 0] + (2.0 * Q[:, 50] if t >= 5 else 0.0) for t in range(20)]
    _, lost = follow([Q] * 20, [risen if t >= 5 else quiet for t in range(20)], k, hints=hints)
    assert not lost.any()


@pytest.mark.parametrize("k", [1, 3])
def test_a_matrix_at_rest_costs_k_and_one_products(k):
    found, _ = follow([basis(200, 0)] * 33, [spectrum(200, 5, 4, 3, 2)] * 33, k)
    spent = [pairs.matvecs for pairs in found]
    assert spent[2:16] + spent[17:32] == [k + 1] * 29
    assert max(spent[16], spent[32]) <= 20
    assert [pairs.explored for pairs in found] == [t % 16 == 0 for t in range(33)]


def test_after_an_alarm_it_explores_at_growing_intervals():
    spectra = [spectrum(50, 5, 4, 3, 2) for _ in range(STEPS)]
    hints = [torch.ones(50, dtype=F64) * (3.0 if t >= 5 else 1.0) for t in range(STEPS)]
    found, _ = follow([basis(50, 0)] * STEPS, spectra, 1, hints=hints)
    assert [t for t, pairs in enumerate(found) if pairs.explored] == [0, 5, 6, 8, 12, 20, 36]


def test_eigenvectors_that_return_every_second_step_are_remembered():
    """At the edge of stability odd and even steps are alike, so the vectors of two steps ago are a good start."""
    Q, turn = basis(150, 0), rotation(150, 0.5, 1)
    found, lost = follow([turn @ Q if t % 2 else Q for t in range(STEPS)], [spectrum(150, 5, 4, 3, 2)] * STEPS, 1)
    assert not lost.any()
    assert np.median([pairs.matvecs for pairs in found[3:]]) <= 4


# Training with catapults


def dense_hessian(L: cl.Objective, w: Tensor, model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """The Hessian by one backward pass over the gradient for each row, in float64."""
    x, y = data[0].double(), data[1] if data[1].dtype == torch.int64 else data[1].double()
    v = w.double().requires_grad_()
    params, end = {}, 0
    for name, p in model.named_parameters():
        params[name] = v[end : end + p.numel()].view(p.shape)
        end += p.numel()
    out = torch.func.functional_call(model, params, (x,))
    loss = nn.functional.cross_entropy(out, y) if y.dtype == torch.int64 else 0.5 * (out - y).square().sum(1).mean()
    (g,) = torch.autograd.grad(loss, v, create_graph=True)
    rows = [torch.autograd.grad(g[i], v, retain_graph=True)[0] for i in range(len(v))]
    return torch.stack(rows)


#               lr · first sharpness, momentum, batch size, activation
TRAININGS = {
    "stable": (0.5, 0.0, 20, "tanh"),
    "catapult": (3.0, 0.0, 20, "tanh"),
    "catapult_gelu": (2.5, 0.0, 20, "gelu"),
    "jumps_of_lr": (None, 0.0, 20, "tanh"),
    "momentum": (1.0, 0.9, 20, "tanh"),
    "sgd": (1.5, 0.0, 4, "tanh"),
    "sgd_momentum": (0.3, 0.9, 4, "gelu"),
}


FAST = [
    ("stable", "squared_error", torch.float32), ("catapult", "squared_error", F64),
    ("jumps_of_lr", "cross_entropy", torch.float32),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "loss", "dtype"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in itertools.product(TRAININGS, ("squared_error", "cross_entropy"), (torch.float32, F64))
    ],
)
def test_the_top_is_never_lost_in_training(case, loss, dtype):
    scale, momentum, batch, activation = TRAININGS[case]
    x = torch.randn(20, 3, generator=seeded(0), dtype=F64).to(dtype)
    labels = torch.randint(0, 3, (20,), generator=seeded(1))
    y = labels if loss == "cross_entropy" else nn.functional.one_hot(labels, 3).to(dtype)
    act = {"tanh": nn.Tanh, "gelu": nn.GELU}[activation]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), act(), nn.Linear(6, 3)).to(dtype)
    reference = nn.Sequential(nn.Linear(3, 6), act(), nn.Linear(6, 3)).double()
    L = cl.Objective(model, loss, (x, y))
    first = float(torch.linalg.eigvalsh(dense_hessian(L, L.params(), reference, (x, y)))[-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=(scale or 0.5) / first, momentum=momentum)
    plan = ["sharpness", ("hessian_eigenvalues", {"k": 5})]
    misses, spent = [], []
    for at in cl.train(L, optimizer, cl.Batches(20, batch, 80), diagnostics=plan):
        if scale is None and at.step % 16 == 10:
            optimizer.param_groups[0]["lr"] = (3.0 if at.step % 32 == 10 else 0.3) / first
        H = dense_hessian(L, at.w, reference, (x, y))
        true = np.linalg.eigvalsh(H.numpy())[::-1]
        rounding = 1e-9 if dtype == F64 else 3e-5
        for name in ("sharpness", "hessian_eigenvalues"):
            m = at.measurements[name]
            value, error, floor = (np.atleast_1d(a) for a in (m.value, m.error, m.floor))
            slack = floor + rounding * np.abs(true).max()
            assert np.all(value <= true[: len(value)] + slack)
            assert np.all(np.abs(value[:, None] - true[None]).min(1) <= error + slack)
            misses.append(value[0] + error[0] < true[0] - slack[0])
        spent.append(at.measurements["sharpness"].matvecs)
    assert len(spent) == 80  # no run diverges
    assert not any(misses)
    assert np.mean(spent) <= (4 if case == "stable" else 20)


def test_requests_of_other_sizes_and_tolerances_change_no_number():
    Q = basis(60, 0)
    matrices = [Q @ torch.diag(MOVES["first_and_second_cross"](60, t)) @ Q.T for t in range(20)]
    requests = [(1, 1e-2), (1, 1e-3), (3, 1e-2)]

    def values(wanted) -> dict:
        carry: dict = {}
        found: dict = {}
        for step, A in enumerate(matrices):
            at = cl.Snapshot(OBJECTIVE, OBJECTIVE.params(), step, carry=carry)
            for request in wanted:
                pairs = tracked_eigenpairs(at, "planted", A, *request)
                found.setdefault(request, []).append(pairs.values)
        return found

    together = values(requests[::-1])
    for request in requests:
        alone = values([request])[request]
        assert all(torch.equal(a, b) for a, b in zip(alone, together[request], strict=True))
