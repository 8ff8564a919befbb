"""The optimizers that the papers define, and the sources of batches.

Compared with a reference: every update with its formula, written out with `torch.autograd.grad`; the noise of the
covariance with that of all batches that SGD can draw, enumerated; the stochastic differential equation with the variance of
an Ornstein-Uhlenbeck process; the sums of Anti-PGD with its perturbations. The rest is behaviour: states that survive,
gradients that are asked for, what is refused.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlab as cl
from curvlab import methods
from curvlab.batch_gradient import BatchGradient
from curvlab.linalg.probes import normal
from curvlab.methods import METHODS
from curvlab.methods.noise import covariance_root
from curvlab.optimizers import learning_rate

DOUBLE = torch.float64
LR = 0.1


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


X, Y = drawn(12, 3), torch.arange(12) % 2


def network(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()


def objective(model: nn.Module) -> cl.Objective:
    return cl.Objective(model, "cross_entropy", (X, Y))


def gradient(model: nn.Module, index=slice(None), at: Tensor | None = None) -> Tensor:
    """The mean gradient of some examples, flat, at the model's parameters or others; leaves `.grad` alone."""
    names = [name for name, _ in model.named_parameters()]
    live = list(model.parameters())
    values = live if at is None else [v.requires_grad_() for v in split(model, at)]
    outputs = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (X[index],))
    return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(outputs, Y[index]), values)])


def split(model: nn.Module, v: Tensor) -> list[Tensor]:
    params = list(model.parameters())
    parts = v.detach().split([p.numel() for p in params])
    return [part.clone().view_as(p) for part, p in zip(parts, params, strict=True)]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Batch:
    """A closure as the methods ask for it, with micro-batches, and a list of what was asked."""

    def __init__(self, model: nn.Module, parts: list[Tensor]) -> None:
        self.model, self.parts, self.asked = model, parts, []
        self.micro_batches = len(parts)

    def __call__(self) -> Tensor:
        self.asked.append("batch")
        return self._backward(torch.cat(self.parts))

    def micro(self, i: int) -> None:
        self.asked.append(i)
        self._backward(self.parts[i])

    def _backward(self, index: Tensor) -> Tensor:
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(X[index]), Y[index])
        loss.backward()
        return loss.detach()


PARTS = list(torch.arange(12).split(3))
NORMS = [0.5, 2.0, 0.0, 1.5, 0.25, 3.0, 1.0, 1.0]
SETTINGS = {
    "grafting": lambda model: {
        "magnitude": torch.optim.Adam(model.parameters(), lr=0.02),
        "direction": "micro_batch",
        "seed": 5,
    },
    "iterative_grafting": lambda model: {"seed": 5},
    "external_grafting": lambda model: {"norms": NORMS},
    "normalized_gd": lambda model: {},
    "anti_pgd": lambda model: {"sigma": 0.1, "noise_steps": 4, "seed": 5},
    "n_step_sgd": lambda model: {"n": 3},
    "noisy_gd": lambda model: {"objective": objective(model), "batch_size": 4, "seed": 5},
    "sde": lambda model: {"objective": objective(model), "batch_size": 4, "substeps": 3, "seed": 5},
}


def built(name: str, model: nn.Module, lr: float = LR) -> methods.Method:
    return METHODS[name](model.parameters(), lr, **SETTINGS[name](model))


def walk(model: nn.Module, optimizer, steps: int, parts: list[Tensor] = PARTS) -> list[Tensor]:
    path = []
    for _ in range(steps):
        optimizer.step(Batch(model, parts))
        path.append(flat(model))
    return path


# What every method promises


def test_every_method_is_tested_here():
    assert set(METHODS) == set(SETTINGS)
    for cls in METHODS.values():
        assert cls.__doc__
        assert cls.formula
        assert cls.source


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_continues_from_a_saved_state_is_bit_identical(name):
    model = network()
    optimizer = built(name, model)
    whole = walk(model, optimizer, 7)
    model = network()
    optimizer = built(name, model)
    walk(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = network(seed=9)
    optimizer = built(name, model, lr=7.0)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.steps_taken == 3
    assert all(torch.equal(a, b) for a, b in zip(walk(model, optimizer, 4), whole[3:], strict=True))
    assert not torch.equal(whole[3], whole[4])


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_drawn_from_the_global_generators(name):
    model = network()
    optimizer = built(name, model)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    path = walk(model, optimizer, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again = network()
    assert torch.equal(walk(again, built(name, again), 2)[-1], path[-1])


@pytest.mark.parametrize("name", ["grafting", "iterative_grafting", "anti_pgd", "noisy_gd", "sde"])
def test_the_seed_decides_what_is_drawn(name):
    ends = []
    for seed in (5, 6):
        model = network()
        optimizer = METHODS[name](model.parameters(), LR, **SETTINGS[name](model) | {"seed": seed})
        ends.append(walk(model, optimizer, 3)[-1])
    assert not torch.equal(*ends)


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_that_is_there_is_used_and_one_that_is_not_is_computed(name):
    ends = []
    for computed in (True, False):
        model = network()
        optimizer = built(name, model)
        batch = Batch(model, PARTS)
        asked = []
        for _ in range(2):
            if computed:
                batch()
            batch.asked.clear()
            loss = optimizer.step(batch)
            assert (loss is None) == computed
            assert all(p.grad is None for p in model.parameters())  # it is that of an old point now
            asked.append(batch.asked.count("batch"))
        ends.append((flat(model), asked))
    assert torch.equal(ends[0][0], ends[1][0])
    assert [n + 1 for n in ends[0][1]] == ends[1][1]
    assert ends[0][1] == [{"n_step_sgd": 2, "sde": 2}.get(name, 0)] * 2


@pytest.mark.parametrize("name", [name for name in METHODS if not built(name, network()).needs_closure])
def test_a_method_that_needs_no_closure_leaves_the_gradient(name):
    model = network()
    optimizer = built(name, model)
    Batch(model, PARTS)()
    before = [p.grad.clone() for p in model.parameters()]
    assert optimizer.step() is None
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_schedulers_set_the_rate_and_settings_are_plain(name):
    model = network()
    optimizer = built(name, model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    walk(model, optimizer, 1)
    schedule.step()
    halved = walk(model, optimizer, 1)[-1]
    again = network()
    constant = built(name, again)
    walk(again, constant, 1)
    constant.param_groups[0]["lr"] = LR / 2
    assert torch.equal(walk(again, constant, 1)[-1], halved)
    assert learning_rate(optimizer) == LR / 2
    assert all(isinstance(v, int | float | str | bool | None) for k, v in optimizer.defaults.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_parameter_without_gradient_stays_and_is_counted_as_zero(name):
    model = network()
    model.extra = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    settings = SETTINGS[name](model)
    if "objective" in settings:
        settings["objective"] = cl.Objective(model, "cross_entropy", (X, Y))
    optimizer = METHODS[name](model.parameters(), LR, **settings)
    optimizer.step(Batch(model, PARTS))
    if name != "anti_pgd":
        assert torch.equal(model.extra.detach(), torch.ones(2, dtype=DOUBLE))


@pytest.mark.parametrize("name", METHODS)
def test_in_training(name):
    """Through `train`, by micro-batches of 3: as in a loop of one's own."""
    model = network()
    optimizer = built(name, model)
    for _ in cl.train(objective(model), optimizer, cl.Batches(12, 12, 3), micro_batch_size=3):
        pass
    again = network()
    assert torch.allclose(walk(again, built(name, again), 3)[-1], flat(model), rtol=1e-12, atol=1e-14)
    assert optimizer.steps_taken == 3


# Grafting


def test_iterative_grafting():
    model = network()
    optimizer = methods.IterativeGrafting(model.parameters(), LR, seed=2)
    seen = []
    for _ in range(30):
        w, g = flat(model), gradient(model)
        norms = [float(gradient(model, part).norm()) for part in PARTS]
        batch = Batch(model, PARTS)
        optimizer.step(batch)
        (chosen,) = [i for i in batch.asked if i != "batch"]
        seen.append(chosen)
        assert torch.allclose(flat(model), w - LR * norms[chosen] * g / g.norm(), rtol=1e-12, atol=1e-14)
        assert optimizer.effective_lr == pytest.approx(LR * norms[chosen] / float(g.norm()), rel=1e-12)
    assert set(seen) == {0, 1, 2, 3}  # a miss has probability 4 (3/4)^30 = 7e-4


def test_iterative_grafting_draws_micro_batches_uniformly():
    optimizer = methods.IterativeGrafting([nn.Parameter(torch.ones(1))], LR)
    counts = torch.zeros(4)
    for step in range(4000):
        counts[torch.randint(4, (), generator=optimizer.generator("micro_batch", step))] += 1
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 16.3  # chi-squared with 3 degrees of freedom, 99.9%


def test_a_single_micro_batch_is_plain_descent():
    model = network()
    optimizer = methods.IterativeGrafting(model.parameters(), LR)
    w, g = flat(model), gradient(model)
    walk(model, optimizer, 1, [torch.arange(12)])
    assert torch.allclose(flat(model), w - LR * g, rtol=1e-12, atol=1e-14)
    assert optimizer.effective_lr == pytest.approx(LR, rel=1e-12)


def test_external_grafting_with_the_log_of_another_run(tmp_path):
    other = network(seed=4)
    sgd = torch.optim.SGD(other.parameters(), lr=LR)
    norms = []
    for at in cl.train(
        objective(other), sgd, cl.Batches(12, 3, 6), diagnostics=["batch_gradient_norm"], run=tmp_path / "small"
    ):
        norms.append(float(gradient(other, list(cl.Batches(12, 3, 6))[at.step]).norm()))
    series = cl.Run(tmp_path / "small").series("batch_gradient_norm")
    model = network()
    optimizer = methods.ExternalGrafting(model.parameters(), LR, norms=series)
    for norm in norms:
        w, g = flat(model), gradient(model)
        walk(model, optimizer, 1)
        assert torch.allclose(flat(model), w - LR * norm * g / g.norm(), rtol=1e-12, atol=1e-14)
        assert optimizer.effective_lr == pytest.approx(LR * norm / float(g.norm()), rel=1e-12)
    with pytest.raises(ValueError, match=r"norms for 6 steps, and step 6 needs one more; train it for longer"):
        walk(model, optimizer, 1)


def test_normalized_steps_have_the_length_lr():
    model = network()
    optimizer = methods.NormalizedGD(model.parameters(), LR)
    w, g = flat(model), gradient(model)
    walk(model, optimizer, 1)
    assert torch.allclose(flat(model), w - LR * g / g.norm(), rtol=1e-12, atol=1e-14)
    assert optimizer.effective_lr == pytest.approx(LR / float(g.norm()), rel=1e-12)


def test_grafting_of_two_optimizers():
    """The length of Adam's step and the direction of momentum's, both with their own state."""
    model, mirror = network(), network()
    optimizer = methods.Grafting(
        model.parameters(),
        0.5,
        magnitude=torch.optim.Adam(model.parameters(), lr=0.02),
        direction=torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.9),
    )
    first, second, buffer = torch.zeros(14, dtype=DOUBLE), torch.zeros(14, dtype=DOUBLE), torch.zeros(14, dtype=DOUBLE)
    for t in range(1, 5):
        g = gradient(model)
        first, second, buffer = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2, 0.9 * buffer + g
        adam = 0.02 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        expected = flat(model) - 0.5 * adam.norm() * buffer / buffer.norm()
        walk(model, optimizer, 1)
        assert torch.allclose(flat(model), expected, rtol=1e-10, atol=1e-13)
        assert optimizer.effective_lr == pytest.approx(float(0.5 * adam.norm() / g.norm()), rel=1e-9)
    assert not torch.equal(flat(model), flat(mirror))


def test_grafting_of_functions_and_of_the_same_micro_batch():
    model = network()
    fixed = drawn(14, seed=8)
    optimizer = methods.Grafting(
        model.parameters(), LR, magnitude=lambda closure: 2.5, direction=lambda closure: split(model, fixed)
    )
    assert optimizer.needs_closure
    w = flat(model)
    walk(model, optimizer, 1)
    assert torch.allclose(flat(model), w - LR * 2.5 * fixed / fixed.norm(), rtol=1e-12, atol=1e-14)
    same = methods.Grafting(model.parameters(), LR, magnitude="micro_batch", direction="micro_batch")
    w, steps = flat(model), [gradient(model, part) for part in PARTS]
    walk(model, same, 1)
    assert min(float((w - LR * g - flat(model)).norm()) for g in steps) < 1e-14


def test_groups_have_their_own_rates_and_one_norm():
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3 * LR}]
    optimizer = methods.NormalizedGD(groups, LR)
    w, g = flat(model), gradient(model)
    rates = torch.tensor([LR] * 8 + [3 * LR] * 6, dtype=DOUBLE)
    walk(model, optimizer, 1)
    assert torch.allclose(flat(model), w - rates * g / g.norm(), rtol=1e-12, atol=1e-14)
    assert optimizer.effective_lr == pytest.approx(float((rates * g).norm() / g.norm() ** 2), rel=1e-12)


def test_no_step_is_taken_where_there_is_no_direction():
    w = nn.Parameter(torch.ones(3, dtype=DOUBLE))
    w.grad = torch.zeros(3, dtype=DOUBLE)
    optimizer = methods.NormalizedGD([w], LR)
    optimizer.step()
    assert torch.equal(w.detach(), torch.ones(3, dtype=DOUBLE))
    assert optimizer.effective_lr is None


# Anti-PGD


def test_the_perturbations_of_anti_pgd_telescope():
    """On a linear loss the gradient is constant, so w_k is where plain descent is, plus ξ_k - ξ_0; then ξ_K - ξ_0 stays."""
    slope, start = drawn(200), drawn(200, seed=1)
    w = nn.Parameter(start.clone())
    optimizer = methods.AntiPGD([w], LR, sigma=0.3, noise_steps=5, seed=7)
    xi = [optimizer.perturbation(k)[0] for k in range(9)]
    for k in range(1, 9):
        w.grad = slope.clone()
        optimizer.step()
        assert torch.allclose(w.detach(), start - k * LR * slope + xi[min(k, 5)] - xi[0], rtol=0, atol=1e-12)
    assert optimizer.effective_lr is None


def test_the_perturbations_of_anti_pgd_are_independent_normals():
    w = nn.Parameter(torch.zeros(2000, dtype=DOUBLE))
    optimizer = methods.AntiPGD([w], LR, sigma=0.3)
    xi = torch.stack([optimizer.perturbation(k)[0] for k in range(6)])
    correlation = xi @ xi.T / 2000 / 0.09
    assert float((correlation - torch.eye(6, dtype=DOUBLE)).abs().max()) < 4.5 * math.sqrt(2 / 2000)
    assert float((xi / 0.3).pow(4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96 / 12000))


def test_anti_pgd_adds_the_difference_to_a_step_of_descent():
    model = network()
    optimizer = methods.AntiPGD(model.parameters(), LR, sigma=0.3)
    w, g = flat(model), gradient(model)
    new, old = (torch.cat([x.flatten() for x in optimizer.perturbation(k)]) for k in (1, 0))
    walk(model, optimizer, 1)
    assert torch.allclose(flat(model), w - LR * g + new - old, rtol=1e-12, atol=1e-14)


# n-step SGD


def test_n_steps_on_the_same_batch():
    model = network()
    optimizer = methods.NStepSGD(model.parameters(), LR, n=4)
    w = flat(model)
    for _ in range(4):
        w = w - LR * gradient(model, at=w)
    walk(model, optimizer, 1)
    assert torch.allclose(flat(model), w, rtol=1e-12, atol=1e-14)
    assert optimizer.effective_lr == pytest.approx(4 * LR)


def test_one_step_is_plain_sgd_to_the_bit_and_needs_no_closure():
    model, plain = network(), network()
    optimizer, sgd = methods.NStepSGD(model.parameters(), LR, n=1), torch.optim.SGD(plain.parameters(), lr=LR)
    for _ in range(3):
        for m, o in ((model, optimizer), (plain, sgd)):
            Batch(m, PARTS)()
            o.step()
    assert torch.equal(flat(model), flat(plain))


# Noise


def covariance(model: nn.Module) -> Tensor:
    rows = torch.stack([gradient(model, [i]) for i in range(12)])
    return torch.cov(rows.T, correction=0)


@pytest.mark.parametrize("kind", ["full", "diagonal", "isotropic"])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_the_linear_map_behind_the_noise(kind, chunk_size):
    model = network()
    L = cl.Objective(model, "cross_entropy", (X, Y), chunk_size=chunk_size)
    width, root = covariance_root(L, kind)
    A = torch.stack([root(e) for e in torch.eye(width, dtype=DOUBLE)], 1)
    C = covariance(model)
    expected = {"full": C, "diagonal": C.diag().diag(), "isotropic": C.trace() / 14 * torch.eye(14, dtype=DOUBLE)}
    assert torch.allclose(A @ A.T, expected[kind], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["full", "diagonal", "isotropic"])
@pytest.mark.parametrize("replacement", [False, True])
def test_the_noise_of_a_step(kind, replacement):
    """Its scale is that of the batches that SGD draws, all of which are enumerated."""
    model = network()
    b, everyone = 2, range(12)
    batches = itertools.product(everyone, repeat=b) if replacement else itertools.combinations(everyone, b)
    rows = torch.stack([gradient(model, [i]) for i in everyone])
    means = torch.stack([rows[list(batch)].mean(0) for batch in batches])
    C_b = torch.cov(means.T, correction=0)
    C_1 = covariance(model)
    L = objective(model)
    optimizer = methods.NoisyGD(
        model.parameters(), LR, objective=L, batch_size=b, covariance=kind, replacement=replacement, seed=3
    )
    width, root = covariance_root(L, kind)
    z = normal((width,), C_1, generator=optimizer.generator("noise"))
    w, g = flat(model), gradient(model)
    share = float(C_b.trace() / C_1.trace())
    assert torch.allclose(C_b, share * C_1, rtol=1e-10, atol=1e-14)
    walk(model, optimizer, 1)
    assert torch.allclose(flat(model), w - LR * g + LR * math.sqrt(share) * root(z), rtol=1e-11, atol=1e-13)
    assert optimizer.temperature == pytest.approx(LR * share, rel=1e-12)
    assert optimizer.param_groups[0]["temperature"] == pytest.approx(LR * share, rel=1e-12)


def test_the_covariance_of_many_steps_is_that_of_sgd():
    model = nn.Linear(2, 1, bias=False).double()
    x, y = drawn(5, 2, seed=2), drawn(5, 1, seed=3)
    L = cl.Objective(model, "squared_error", (x, y))
    start = L.params()
    rows = (x * (x @ start - y[:, 0])[:, None]).double()
    means = torch.stack([rows[list(batch)].mean(0) for batch in itertools.combinations(range(5), 2)])
    C_b = torch.cov(means.T, correction=0)
    moves = []
    for seed in range(600):
        with torch.no_grad():
            model.weight.copy_(start[None])
        model.weight.grad = rows.mean(0)[None].clone()
        methods.NoisyGD(model.parameters(), 1.0, objective=L, batch_size=2, seed=seed).step()
        moves.append(model.weight.detach()[0] - start)
    moved = torch.stack(moves)
    whitened = (moved + rows.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(C_b)).T
    found = whitened.T @ whitened / 600
    assert float((found - torch.eye(2, dtype=DOUBLE)).abs().max()) < 4.5 * math.sqrt(2 / 600)
    assert float(whitened.mean(0).abs().max()) < 4.5 / math.sqrt(600)


def test_one_euler_step_of_the_sde_is_noisy_descent_to_the_bit():
    """Smith's eq. 23: its Euler discretization with step ε has the noise of SGD."""
    ends = []
    for cls, more in ((methods.NoisyGD, {"replacement": True}), (methods.SDE, {"substeps": 1})):
        model = network()
        optimizer = cls(model.parameters(), LR, objective=objective(model), batch_size=4, seed=3, **more)
        ends.append(walk(model, optimizer, 4)[-1])
        assert optimizer.temperature == pytest.approx(LR / 4)
    assert torch.equal(*ends)


def test_substeps_of_the_sde():
    model = network()
    L = objective(model)
    optimizer = methods.SDE(model.parameters(), LR, objective=L, batch_size=4, substeps=3, seed=3)
    draw, dt, T = optimizer.generator("noise"), LR / 3, LR / 4
    expected, mirror = flat(model), network()
    for _ in range(3):
        width, root = covariance_root(objective(mirror))
        z = normal((width,), X, generator=draw)
        expected = expected - dt * gradient(mirror) + math.sqrt(T * dt) * root(z)
        nn.utils.vector_to_parameters(expected, mirror.parameters())
    walk(model, optimizer, 1)
    assert torch.allclose(flat(model), expected, rtol=1e-12, atol=1e-14)


class Points(nn.Module):
    """A location w, and the loss 0.5 ‖w - x‖²: the gradient noise is that of the data, wherever w is."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dim, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), -1)


@pytest.mark.parametrize("substeps", [1, 20])
def test_the_variance_of_the_sde_is_that_of_an_ornstein_uhlenbeck_process(substeps):
    """dw = -(w - x̄) dt + √T σ dW has the variance T σ² (1 - e^{-2t})/2 after t; Euler steps that of their recursion."""
    dim, lr, steps, b = 3000, 0.3, 4, 2
    x = drawn(6, dim, seed=4)
    x = (x - x.mean(0)) / x.std(0, correction=0)  # mean 0 and variance 1 in each coordinate
    model = Points(dim)
    L = cl.Objective(model, "squared_error", (x, x))
    optimizer = methods.SDE(
        model.parameters(), lr, objective=L, batch_size=b, substeps=substeps, covariance="diagonal", seed=1
    )
    for _ in range(steps):
        optimizer.step(BatchGradient(L, torch.arange(6)))
    found = float(model.w.detach().square().mean())
    T, t, dt, variance = lr / b, lr * steps, lr / substeps, 0.0
    for _ in range(steps * substeps):
        variance = (1 - dt) ** 2 * variance + T * dt
    error = math.sqrt(2 / dim)  # relative, of a variance from so many coordinates
    assert found == pytest.approx(variance, rel=4 * error)
    if substeps == 20:
        assert variance == pytest.approx(T * (1 - math.exp(-2 * t)) / 2, rel=0.02)


def test_the_temperature_follows_the_learning_rate():
    model = network()
    optimizer = methods.SDE(model.parameters(), LR, objective=objective(model), batch_size=4, substeps=1)
    optimizer.param_groups[0]["lr"] = LR / 2
    walk(model, optimizer, 1)
    assert optimizer.temperature == optimizer.param_groups[0]["temperature"] == pytest.approx(LR / 8)


# Batch sources


ORDERS = ("new", "fixed", "shuffled", "alternating")


def epochs_of(order: str, seed: int = 0) -> list[list[tuple[int, ...]]]:
    batches = [tuple(b.tolist()) for b in cl.Batches(12, 3, 24, epochs=True, order=order, seed=seed)]
    return [batches[i : i + 4] for i in range(0, 24, 4)]


@pytest.mark.parametrize("order", ORDERS)
def test_every_epoch_has_every_example_once(order):
    for epoch in epochs_of(order):
        assert sorted(itertools.chain(*epoch)) == list(range(12))


def test_the_orders_of_epochs():
    for seed in range(3):
        fixed, shuffled, alternating, new = (epochs_of(order, seed) for order in ("fixed", *ORDERS[2:], "new"))
        partition = [
            tuple(b) for b in cl.Batches(12, 3, 1, epochs=True, order="shuffled", seed=seed).partition.tolist()
        ]
        assert fixed == [partition] * 6
        assert alternating == [partition, partition[::-1]] * 3
        assert all(set(epoch) == set(partition) for epoch in shuffled)
        assert len({tuple(epoch) for epoch in shuffled}) > 3
        assert len({frozenset(epoch) for epoch in new}) == 6
    assert epochs_of("fixed", 0) != epochs_of("fixed", 1)
    assert cl.Batches(12, 3, 1, epochs=True).partition is None


def test_all_orders_of_shuffled_epochs_are_equally_likely():
    batches = cl.Batches(3, 1, 3 * 3000, epochs=True, order="shuffled")
    drawn_orders = torch.cat(list(batches)).view(3000, 3).tolist()
    counts = np.array([drawn_orders.count(list(p)) for p in itertools.permutations(range(3))])
    assert float(((counts - 500) ** 2 / 500).sum()) < 20.5  # chi-squared with 5 degrees of freedom, 99.9%


KINDS = [{}, {"replacement": True}, *({"epochs": True, "order": order} for order in ORDERS)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())) or "independent")
@pytest.mark.parametrize("b", [3, 12])
def test_a_source_continues_from_any_step(kind, b):
    batches = cl.Batches(12, b, 17, seed=3, **kind)
    whole = [batch.tolist() for batch in batches]
    assert len(whole) == len(batches) == 17
    for step in (0, 1, 4, 9, 16, 17, 30):
        assert [batch.tolist() for batch in batches.since(step)] == whole[step:]
    assert cl.Batches(**dataclasses.asdict(batches)) == batches


@pytest.mark.parametrize("order", ORDERS[1:])
def test_full_batches_of_any_order_are_the_data(order):
    batches = cl.Batches(4, 4, 3, epochs=True, order=order)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3]] * 3
    assert batches.partition.tolist() == [[0, 1, 2, 3]]


# What is refused


def weight() -> nn.Parameter:
    w = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    w.grad = torch.ones(2, dtype=DOUBLE)
    return w


def noisy(cls=methods.NoisyGD, params=None, **options):
    model = network()
    options = {"objective": objective(model), "batch_size": 4} | options
    return cls(model.parameters() if params is None else params, LR, **options)


class Unfinished(methods.Method):
    pass


REFUSED = {
    "lr": ("lr is -1; expected a finite number from 0", lambda: methods.NormalizedGD([weight()], -1)),
    "name": (
        "method anti_pgd: the name is taken by AntiPGD",
        lambda: methods.method("anti_pgd", formula="", source="")(methods.AntiPGD),
    ),
    "advance": ("Unfinished must define advance", lambda: Unfinished([weight()], 0.1).step()),
    "no_gradient": (
        r"NormalizedGD needs a gradient that is not in \.grad: pass step\(closure\)",
        lambda: methods.NormalizedGD([nn.Parameter(torch.ones(2))], 0.1).step(),
    ),
    "n_step_without_closure": (
        "NStepSGD needs a gradient that is not in .grad",
        lambda: methods.NStepSGD([weight()], 0.1, n=2).step(),
    ),
    "n": ("n is 0; expected at least 1 update", lambda: methods.NStepSGD([weight()], 0.1, n=0)),
    "source": ("direction is 3.0; expected 'batch' or", lambda: methods.Grafting([weight()], 1, direction=3.0)),
    "source_name": (
        "magnitude is 'adam'; expected 'batch' or",
        lambda: methods.Grafting([weight()], 1, magnitude="adam"),
    ),
    "other_parameters": (
        "the direction is of a SGD over other parameters; make it from the same ones",
        lambda: methods.Grafting([weight()], 1, direction=torch.optim.SGD([weight()], lr=1)),
    ),
    "negative": (
        "the magnitude of the step is -2.0; expected a number from 0",
        lambda: methods.Grafting([weight()], 1, magnitude=-2.0).step(),
    ),
    "no_micro_batches": (
        r"needs the gradients of micro-batches, but the closure is missing; train with curvlab.train\(",
        lambda: methods.IterativeGrafting([weight()], 1).step(),
    ),
    "plain_closure": (
        "but the closure is a plain function",
        lambda: methods.IterativeGrafting([weight()], 1).step(lambda: 0.0),
    ),
    "used_up": (
        "norms for 0 steps, and step 0 needs",
        lambda: methods.ExternalGrafting([weight()], 1, norms=[]).step(),
    ),
    "norms": (
        r"norms have shape \(3,\) and no norm at positions \[1, 2\]",
        lambda: methods.ExternalGrafting([weight()], 1, norms=[1.0, math.nan, -1.0]),
    ),
    "norms_shape": (
        r"norms have shape \(1, 2\); expected one",
        lambda: methods.ExternalGrafting([weight()], 1, norms=[[1.0, 2.0]]),
    ),
    "sigma": ("sigma is -1; expected a finite", lambda: methods.AntiPGD([weight()], 1, sigma=-1)),
    "noise_steps": ("noise_steps is -1; expected", lambda: methods.AntiPGD([weight()], 1, sigma=1, noise_steps=-1)),
    "covariance": ("covariance is 'half'; expected 'full', 'diagonal'", lambda: noisy(covariance="half")),
    "batch_size": ("batch_size is 13; expected 1 to 12", lambda: noisy(batch_size=13)),
    "foreign": ("holds none of the trainable parameters", lambda: noisy(params=[weight()])),
    "substeps": ("substeps is 0; expected at least 1 Euler step", lambda: noisy(methods.SDE, substeps=0)),
    "order": ("order is 'back'; expected 'new', 'fixed'", lambda: cl.Batches(12, 3, 1, epochs=True, order="back")),
    "order_of_epochs": ("order='fixed' is an order of epochs; pass", lambda: cl.Batches(12, 3, 1, order="fixed")),
    "rest": ("12 examples in fixed batches of 5 leave 2 out", lambda: cl.Batches(12, 5, 1, epochs=True, order="fixed")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name):
    text, call = REFUSED[name]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=text):
        call()


def test_norms_of_some_steps_only_are_refused(tmp_path):
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    options = {"diagnostics": ["batch_gradient_norm"], "run": tmp_path / "run", "every": 3}
    for _ in cl.train(objective(model), sgd, cl.Batches(12, 3, 9), **options):
        pass
    series = cl.Run(tmp_path / "run").series("batch_gradient_norm")
    with pytest.raises(ValueError, match=r"the norms are of steps \[0, 3, 6\]...; expected every step from 0"):
        methods.ExternalGrafting([weight()], 1, norms=series)
