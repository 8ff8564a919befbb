"""Moments of the batch gradient where they are sampled: batch normalization with its own statistics, and measuring sets
that are a sample of a population.

Compared with a reference: batches and Hessians by plain loops in float64; the population's own moments, by enumeration of
every sample, and by counting how often 95% intervals contain them. Nothing is only behavioural.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvlab as cl
from curvlab.diagnostics.sampled import Moments, _curvatures, population_eigenvalue
from curvlab.linalg.probes import generator

NAMES = ["gradient_second_moment_trace", "gradient_concentration"]
CURVED = ["interaction_trace", "interaction_sharpness", "instability"]
EXAMPLEWISE = ["gradient_variance", "gradient_noise_scale"]


def normalized_net() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
        return model, torch.randn(24, 5, dtype=torch.float64), torch.arange(24) % 3


def loop_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.train()
    loss = nn.functional.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def loop_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.train()
    params = list(model.parameters())
    grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True) for entry in flat]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


# Batch normalization with the statistics of each batch


@pytest.mark.parametrize("replacement", [False, True])
def test_batches_with_their_own_statistics_are_those_of_a_loop(replacement):
    model, x, y = normalized_net()
    L = cl.Objective(model, "cross_entropy", (x, y), mode="train")
    options = [(n, {"samples": 12}) for n in NAMES] + [(n, {"probes": 12}) for n in CURVED]
    found = cl.measure(L, options, batch_size=8, replacement=replacement, seed=3)
    draws = generator(3, 0, "coupled batches 8")
    rows = []
    for _ in range(12):
        index = torch.randint(24, (8,), generator=draws) if replacement else torch.randperm(24, generator=draws)[:8]
        rows.append(loop_gradient(model, x[index], y[index]))
    G, H, g = torch.stack(rows, 1), loop_hessian(model, x, y), loop_gradient(model, x, y)
    forms, norms, full = (G * (H @ G)).sum(0), G.square().sum(0), float(g @ g)
    for name, samples in [("gradient_second_moment_trace", norms), ("interaction_trace", forms)]:
        assert found[name].value == pytest.approx(float(samples.mean()), rel=1e-10)
        assert found[name].error == pytest.approx(float(samples.std()) / math.sqrt(12), rel=1e-8)
        assert found[name].kind == "sem"
        assert found[name].df == 11
        assert "12 mini-batches" in found[name].note
    assert found["instability"].value == pytest.approx(float(forms.mean()) / full, rel=1e-10)
    # ratios lose their bias of order 1/G: jackknife by a loop
    ratios = {"interaction_sharpness": (forms, norms), "gradient_concentration": (torch.full_like(norms, full), norms)}
    for name, (above, below) in ratios.items():
        whole = float(above.mean() / below.mean())
        parts = np.array([float(np.delete(above, j).mean() / np.delete(below, j).mean()) for j in range(12)])
        assert found[name].value == pytest.approx(12 * whole - 11 * parts.mean(), rel=1e-9)
        assert found[name].error == pytest.approx(math.sqrt(11 * parts.var()), rel=1e-9)


def test_the_whole_batch_is_exact_and_leaves_no_trace():
    model, x, y = normalized_net()
    model.eval()
    before = {name: b.clone() for name, b in model.named_buffers()}
    L = cl.Objective(model, "cross_entropy", (x, y), mode="train")
    found = cl.measure(L, [*NAMES, *CURVED], batch_size=24)
    sampled = cl.measure(L, [*NAMES, *CURVED], batch_size=6)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert not model.training
    g, H = loop_gradient(model, x, y), loop_hessian(model, x, y)
    truth = {
        "gradient_second_moment_trace": g @ g, "gradient_concentration": 1.0, "interaction_trace": g @ H @ g,
        "interaction_sharpness": g @ H @ g / (g @ g), "instability": g @ H @ g / (g @ g),
    }  # fmt: skip
    for name, value in truth.items():
        assert found[name].kind == "exact"
        assert found[name].value == pytest.approx(float(value), rel=1e-9)
        assert sampled[name].kind == "sem"


def test_batches_of_one_have_no_statistics():
    model, x, y = normalized_net()
    L = cl.Objective(model, "cross_entropy", (x, y), mode="train")
    with pytest.raises(ValueError, match=r"batch_size=1 .* at least 2 examples, whose statistics 1 \(BatchNorm1d\)"):
        cl.measure(L, ["gradient_concentration"], batch_size=1)


def test_heavy_tails_are_said():
    model, x, y = normalized_net()
    L = cl.Objective(model, "cross_entropy", (x, y), mode="train")
    few, many = (
        cl.measure(L, ["gradient_second_moment_trace"], batch_size=b) for b in (2, 12)
    )  # two give a tiny deviation
    assert "heavy tails: one of them carries" in few["gradient_second_moment_trace"].note
    assert "heavy tails" not in many["gradient_second_moment_trace"].note


def test_intervals_of_sampled_batches_are_calibrated():
    model, x, y = normalized_net()
    order = torch.Generator().manual_seed(0)
    batches = [torch.randperm(24, generator=order)[:8] for _ in range(2000)]
    G = torch.stack([loop_gradient(model, x[index], y[index]) for index in batches], 1)
    H, g = loop_hessian(model, x, y), loop_gradient(model, x, y)
    rows = np.stack([np.full(G.shape[1], float(g @ g)), G.square().sum(0), (G * (H @ G)).sum(0)], 1)
    truth = rows.mean(0)
    draw = np.random.default_rng(0)
    hits = np.zeros(3)
    for _ in range(1000):
        some = rows[draw.integers(len(rows), size=64)]
        M = Moments(some.mean(0), (some.sum(0) - some) / 63, 1.0, "64 of them")
        for k, (m, value) in enumerate(
            [(M.entry(1), truth[1]), (M.ratio(0, 1), truth[0] / truth[1]), (M.ratio(2, 1), truth[2] / truth[1])]
        ):
            low, high = m.interval()
            hits[k] += low <= value <= high
    assert np.all((hits >= 900) & (hits <= 980))


# A measuring set that is a sample


def _moments_of(G: Tensor, H: Tensor) -> np.ndarray:
    """‖g‖², tr(S_1), gᵀHg, tr(H S_1) of examples with gradients G (n, P) and Hessians H (n, P, P)."""
    g, mean = G.mean(0), H.mean(0)
    second, interaction = G.square().sum(1).mean(), ((G @ mean) * G).sum(1).mean()
    return np.array([float(value) for value in (g @ g, second, g @ mean @ g, interaction)])


def _estimates(G: Tensor, H: Tensor, N: float) -> tuple[float, float]:
    """gᵀHg and tr(H S_1) of the population from groups of one example each."""
    T = torch.einsum("ip,jpq,kq->ijk", G, H, G)
    A = torch.einsum("ip,jpq,iq->ij", G, H, G)
    ones = torch.ones(len(G), dtype=torch.float64)
    return _curvatures(T, A, ones, ones, N)


def _examples(n: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    G = torch.randn(n, 3, generator=draw, dtype=torch.float64) + 1
    H = torch.randn(n, 3, 3, generator=draw, dtype=torch.float64)
    return G, H + H.mT + G[:, :, None] * G[:, None]  # gradients and Hessians that know of each other


def test_curvatures_of_an_infinite_population_are_unbiased_over_every_sample():
    G, H = _examples(3)
    found = [_estimates(G[list(s)], H[list(s)], math.inf) for s in itertools.product(range(3), repeat=4)]
    assert np.mean(found, 0) == pytest.approx(_moments_of(G, H)[2:], rel=1e-10)


def test_curvatures_of_a_finite_population():
    G, H = _examples(8)
    samples = list(itertools.combinations(range(8), 6))
    found = np.array([_estimates(G[list(s)], H[list(s)], 8) for s in samples])
    plug_in = np.array([_moments_of(G[list(s)], H[list(s)])[2:] for s in samples])
    truth = _moments_of(G, H)[2:]
    assert found.mean(0)[1] == pytest.approx(truth[1], rel=1e-10)  # of second order: exact
    # of third order: to O(1/mN), far less than what is mended
    assert abs(found.mean(0)[0] - truth[0]) < 0.2 * abs(plug_in.mean(0)[0] - truth[0])


def _population() -> tuple[cl.Objective, nn.Module, Tensor, Tensor]:
    (x, y), _ = cl.problems.digits(200, dtype=torch.float64)
    model = cl.problems.mlp((64, 5, 10), dtype=torch.float64)
    L = cl.Objective(model, "cross_entropy", (x, y))
    sgd = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in cl.train(L, sgd, cl.Batches(200, 200, 20)):
        pass
    return L, model, x, y


def _coverage(seeds: int, m: int) -> tuple[dict[str, float], dict[str, list[float]], dict[str, float]]:
    L, model, x, y = _population()
    names = [*NAMES, *EXAMPLEWISE, *CURVED]
    exact = [(n, {"exact": True}) if n in CURVED else n for n in names]
    truth = {name: float(found.value) for name, found in cl.measure(L, exact, batch_size=8).items()}
    truth["sharpness"] = float(cl.eigsh(cl.hessian(L), tol=1e-6).values[0])
    hits = dict.fromkeys(truth, 0.0)
    values: dict[str, list[float]] = {name: [] for name in truth}
    for seed in range(seeds):
        index = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:m]
        part = cl.Objective(model, "cross_entropy", (x[index], y[index]), population_size=200)
        found = cl.measure(part, [*names, "sharpness"], batch_size=8, seed=seed)
        for name, value in truth.items():
            low, high = found[name].interval() if found[name].value is not None else (-math.inf, math.inf)
            hits[name] += (low <= value <= high) / seeds
            values[name].append(math.nan if found[name].value is None else float(found[name].value))
    return hits, values, truth


@pytest.mark.slow
@pytest.mark.parametrize("m", [50, 120])
def test_a_sample_covers_its_population(m):
    hits, values, truth = _coverage(500, m)
    for name, share in hits.items():
        x = np.array(values[name])
        lost = np.isnan(x)  # the denominator is not resolved: no claim is made
        assert 0.90 <= share <= (0.985 if not lost.any() else 1.0), f"{name}: {share:.1%}"
        if lost.any():
            continue  # what is resolved is no fair sample
        assert abs(x.mean() - truth[name]) < 4 * x.std() / math.sqrt(len(x)) + 0.03 * abs(truth[name]), name


@pytest.mark.slow
def test_a_sample_covers_its_population_quickly():
    hits, values, truth = _coverage(12, 60)
    assert np.mean(list(hits.values())) > 0.85
    assert min(hits.values()) > 0.6
    # what the correction is for: the sample's own ‖∇L‖² is too large by Γ/m
    assert np.nanmean(values["gradient_concentration"]) == pytest.approx(truth["gradient_concentration"], rel=0.15)


def test_all_of_the_population_is_no_sample():
    L, model, x, y = _population()
    same = cl.Objective(model, "cross_entropy", (x, y), population_size=200)
    for name, found in cl.measure(same, [*NAMES, *EXAMPLEWISE, "sharpness"], batch_size=8).items():
        assert found.value == cl.measure(L, [name], batch_size=8)[name].value


def test_the_record_states_the_population_and_what_is_not_resolved_has_no_value():
    _, model, x, y = _population()
    part = cl.Objective(model, "cross_entropy", (x[:40], y[:40]), population_size=10**6)
    assert part.describe()["population_size"] == 10**6
    model.load_state_dict({k: v * 0 for k, v in model.state_dict().items()})  # almost no gradient but for the classes
    balanced = torch.arange(40) % 10
    at_rest = cl.Objective(model, "cross_entropy", (x[:40], balanced), population_size=10**6)
    found = cl.measure(at_rest, ["gradient_noise_scale"], batch_size=8)["gradient_noise_scale"]
    assert found.value is None
    assert "not resolved from zero" in found.note


def test_refusals():
    model = nn.Linear(2, 1)
    data = torch.eye(2), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="population_size is 1 for 2 examples"):
        cl.Objective(model, "squared_error", data, population_size=1)
    with pytest.raises(ValueError, match="population_size is 5 for 2 weighted examples"):
        cl.Objective(model, "squared_error", data, population_size=5, weights=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="at least 3 groups of examples, got 2"):
        cl.measure(cl.Objective(model, "squared_error", data, population_size=5), ["gradient_variance"])


def test_the_eigenvalue_of_a_population_on_planted_hessians():
    """Quadratic examples with H_i = diag(1 ± s_i e_1): the bootstrap of λ_1 is that of a mean, with its standard error."""
    n, N = 64, 10**9
    x = torch.zeros(n, 3, dtype=torch.float64)
    scale = torch.linspace(1.0, 3.0, n, dtype=torch.float64)
    x[:, 0] = scale.sqrt()
    model = nn.Linear(3, 1, bias=False).double()
    L = cl.Objective(model, "squared_error", (x, torch.zeros(n, 1, dtype=torch.float64)), population_size=N)
    at = cl.Snapshot(L, L.params(), seed=0)
    found = population_eigenvalue(at, cl.eigsh(at.hessian, tol=1e-8))
    assert found.value == pytest.approx(2.0, rel=0.02)
    assert found.error == pytest.approx(float(scale.std()) / math.sqrt(n), rel=0.35)
