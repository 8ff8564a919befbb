"""Error bars: 95% intervals contain the truth in about 95% of seeds, and the values scatter around it without bias.

Compared with a reference: traces of matrices that are known, tr(H S_b) from dense H and S_b, means over every possible
batch (of 8: over 20 000), the density of known eigenvalues, and in a run the exact value at every step. `ROWS` has every
diagnostic that is registered with a standard error; a new one without a row fails a test. The band that is promised is
90-98%; a test allows one standard error of its number of seeds beyond it, so the slow tests, with many seeds, are sharper.
Nothing here is only behavioural.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import curvlab as cl
from curvlab.diagnostics import DIAGNOSTICS, covariance
from curvlab.diagnostics.interaction import REFRESH

QUICK, MANY = 200, 2000
INTERACTION = ("interaction_trace", "interaction_sharpness", "instability")


def assert_calibrated(hits: int, seeds: int, what: str, *, highest: float = 0.98) -> None:
    """The coverage is in the band, or outside by no more than one standard error."""
    low, high = 0.90 - math.sqrt(0.90 * 0.10 / seeds), highest + math.sqrt(highest * (1 - highest) / seeds)
    assert low <= hits / seeds <= high, f"{what}: 95% intervals contain the truth in {hits / seeds:.1%} of {seeds}"


def check(measure: Callable[[int], cl.Measurement], truth: np.ndarray | float, seeds: int, what: str) -> None:
    """Coverage within the band and no bias, for one number or for each entry of an array."""
    found = [measure(seed) for seed in range(seeds)]
    values = np.array([m.value for m in found])
    intervals = [m.interval(0.95) for m in found]
    inside = np.array([(low <= truth) & (truth <= high) for low, high in intervals])
    for hits in np.atleast_1d(inside.sum(0)):
        assert_calibrated(int(hits), seeds, what)
    assert_unbiased(values, truth, what)


def assert_unbiased(values: np.ndarray, truth: np.ndarray | float, what: str) -> None:
    """The mean of independent values is within four standard errors of the truth."""
    standard_error = values.std(0, ddof=1) / math.sqrt(len(values))
    off = np.abs(values.mean(0) - truth)
    assert np.all(off <= 4 * standard_error + 1e-12 * np.abs(truth)), f"{what}: off by {off / standard_error} s.e."


# One point of a small net, whose dense Hessian stands for its products, so that hundreds of seeds take a second


class Point:
    """A tanh net after some steps of gradient descent: outliers in the spectrum, as many as there are classes."""

    def __init__(self, loss: str, steps: int, widths: tuple[int, ...], n: int, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % widths[-1]
        centers = torch.randn(widths[-1], widths[0], generator=generator, dtype=torch.float64)
        x = centers[y] + 0.7 * torch.randn(n, widths[0], generator=generator, dtype=torch.float64)
        model = cl.problems.mlp(widths, dtype=torch.float64, seed=seed)
        self.L, self.widths = cl.Objective(model, loss, (x, y)), widths
        self.w = self.L.params()
        for _ in range(steps):
            self.w = self.w - 0.5 * self.L.gradient(self.w)
        self.first = cl.Snapshot(self.L, self.w)
        self.G = self.L.example_gradients(self.w)
        self.g = self.G.mean(0)
        self.H = cl.dense(self.first.hessian)

    def at(self, seed: int, **given) -> cl.Snapshot:
        """A cold snapshot for this seed. What does not depend on the seed is handed in through `shared`."""
        at = cl.Snapshot(self.L, self.w, seed=seed, **given)
        H = cl.LinearOperator(lambda V: self.H @ V, self.L.num_params, torch.float64)
        at.shared("products", lambda: self.first._products)
        at.shared("hessian", lambda: H)
        at.shared("examples", lambda: self.first.examples)
        at.shared("outputs", lambda: self.first.shared("outputs", self._outputs))
        at.shared("fisher_trace", lambda: self.fisher)
        at.shared("ggn", lambda: cl.LinearOperator(lambda V: self.ggn @ V, self.L.num_params, torch.float64))
        return at

    @cached_property
    def ggn(self) -> Tensor:
        return cl.dense(cl.ggn(self.L, self.w))

    @cached_property
    def fisher(self) -> float:
        """tr(F) = tr(GGN) for the likelihoods that are known."""
        return float(self.ggn.trace())

    @cached_property
    def mean_squared_jacobian(self) -> float:
        """‖J̄‖_F²/C of the mean Jacobian of the outputs, which is E‖J̄u‖² over the unit sphere (Novack eq. 7)."""
        x, _ = self.L.examples.batches[0]
        J = torch.func.jacrev(lambda p: self._forward(p, x).mean(0))(self.w)
        return float(J.square().sum() / len(J))

    def _outputs(self) -> Tensor:
        with torch.no_grad():
            return self._forward(self.w, self.L.examples.batches[0][0])

    @cached_property
    def hessians(self) -> Tensor:
        """(N, P, P) Hessians of the examples."""
        x, y = self.L.examples.batches[0]

        def one(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return self.L.loss(self._forward(p, x[None]), y[None])[0]

        return torch.stack(
            [torch.func.jacfwd(torch.func.grad(one))(self.w, a, b).detach() for a, b in zip(x, y, strict=True)]
        )

    @cache  # noqa: B019
    def batches(self, b: int) -> tuple[Tensor, Tensor]:
        """Gradients g_b (M, P) and g_bᵀ H_b g_b (M,) of every batch of 1 or 2, and of 20 000 of more."""
        n = self.L.size
        index = torch.rand(20_000, n, generator=torch.Generator().manual_seed(9)).topk(b, 1).indices
        if b <= 2:
            index = torch.combinations(torch.arange(n), b)
        G = self.G[index].mean(1)
        forms = [(g * (self.hessians[i].mean(1) @ g[:, :, None])[:, :, 0]).sum(1) for g, i in _pieces(G, index)]
        return G, torch.cat(forms)

    def second_moment(self, b: int) -> Tensor:
        """S_b without replacement, dense."""
        n = len(self.G)
        share = (n - b) / (n - 1) / b
        return share * self.G.T @ self.G / n + (1 - share) * torch.outer(self.g, self.g)

    def interaction(self, name: str, b: int) -> float:
        S = self.second_moment(b)
        below = {"interaction_trace": 1.0, "interaction_sharpness": S.trace(), "instability": self.g @ self.g}[name]
        return float((self.H * S).sum() / below)

    def loss_change(self, lr: float, coefficients: Tensor) -> Tensor:
        """L(w - lr Σ c_i g_i) - L(w) for each row of coefficients, by batched matrix products."""
        points = self.w - lr * coefficients @ self.G
        return self._losses(points) - self._losses(self.w[None])

    def _losses(self, points: Tensor) -> Tensor:
        x, y = self.L.examples.batches[0]
        with torch.no_grad():
            return torch.func.vmap(lambda p: self.L.loss(self._forward(p, x), y).mean())(points)

    def _forward(self, p: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.L.model, self.L.unflatten(p), (x,))


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(t.split(500) for t in tensors), strict=True)


class OwnCurvature:
    """What `HessianProducts` gives for a batch, from dense Hessians of the examples."""

    def __init__(self, at: cl.Snapshot, batch: Tensor) -> None:
        p = next(p for p in map(point, MORE_POINTS) if p.L is at.objective)
        self.g, self.H = p.G[batch].mean(0), p.hessians[batch].mean(0)

    def value_and_gradient(self) -> tuple[None, Tensor]:
        return None, self.g

    def matmat(self, V: Tensor) -> Tensor:
        return self.H @ V


@pytest.fixture
def stand_ins(monkeypatch):
    """Dense Hessians of batches, and probes instead of the Gram matrix."""
    whole = cl.Snapshot.products

    def products(at, w=None, batch=None, **options):
        return whole(at, w, **options) if batch is None else OwnCurvature(at, batch)

    monkeypatch.setattr(cl.Snapshot, "products", products)
    monkeypatch.setattr(covariance, "GRAM_LIMIT", 0)


@cache
def point(name: str) -> Point:
    return {
        "untrained": lambda: Point("cross_entropy", 0, (6, 6, 4), 40),
        "cross_entropy": lambda: Point("cross_entropy", 40, (6, 6, 4), 40),
        "converged": lambda: Point("cross_entropy", 150, (6, 6, 4), 40, seed=1),
        "squared_error": lambda: Point("squared_error", 40, (5, 8, 4), 48, seed=2),
        "more_examples": lambda: Point("cross_entropy", 30, (6, 6, 4), 200, seed=3),
        "few_parameters": lambda: Point("squared_error", 150, (2, 3, 2), 200, seed=4),
    }[name]()


POINTS = ["untrained", "cross_entropy", "squared_error"]
MORE_POINTS = [*POINTS, "converged", "more_examples", "few_parameters"]


def test_the_stand_in_measures_what_measure_does():
    p = point("cross_entropy")
    ours = cl.measure(p.L, [*INTERACTION, "expected_loss_difference"], w=p.w, batch_size=(1, 8), lr=0.3, seed=5)
    for name, m in ours.items():
        again = DIAGNOSTICS[name].function(p.at(5, batch_size=(1, 8), lr=0.3))
        assert np.allclose(again.value, m.value, rtol=1e-6)
        assert np.allclose(again.error, m.error, rtol=1e-4)


def test_outliers_carry_the_spectrum_of_the_trained_nets():
    values = torch.linalg.eigvalsh(point("cross_entropy").H)
    assert values[-1] > 2 * values[-2] > 0
    assert values[-4:].sum() > 0.5 * values.sum()


def _interaction(p: Point, probes: int | None, seeds: int) -> None:
    truth = {name: np.array([p.interaction(name, b) for b in (1, 8)]) for name in INTERACTION}
    found: dict[str, list[cl.Measurement]] = {name: [] for name in INTERACTION}
    for seed in range(seeds):
        at = p.at(seed, batch_size=(1, 8))
        for name in INTERACTION:
            found[name].append(DIAGNOSTICS[name].function(at, probes=probes))
    for name in INTERACTION:
        check(found[name].__getitem__, truth[name], seeds, f"{name}, probes={probes}")


@pytest.mark.slow
@pytest.mark.parametrize("probes", [None, 4])
@pytest.mark.parametrize("name", POINTS)
def test_interaction_at_one_point(name, probes):
    _interaction(point(name), probes, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("probes", [None, 8, 4])
@pytest.mark.parametrize("name", MORE_POINTS)
def test_interaction_at_one_point_with_many_seeds(name, probes):
    _interaction(point(name), probes, MANY)


def test_exact_interaction_is_the_dense_one():
    p = point("squared_error")
    for name in INTERACTION:
        m = cl.measure(p.L, [(name, {"exact": True})], w=p.w, batch_size=(1, 8))[name]
        low, high = m.interval()
        truth = np.array([p.interaction(name, b) for b in (1, 8)])
        assert m.kind == "exact"
        assert np.all((low <= truth) & (truth <= high))
        assert np.all(high - low < 1e-11 * np.abs(truth))


# Traces


def _rotated(spectrum: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    Q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64)).Q
    return Q @ torch.diag(spectrum) @ Q.T


def _matrix(name: str, size: int = 80) -> Tensor:
    i = torch.arange(size, dtype=torch.float64)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    if name in ("untrained", "cross_entropy", "squared_error", "converged"):
        return point(name).H
    return {
        "flat": lambda: _rotated(1 + 0.1 * noise),
        "exponential": lambda: _rotated(torch.exp(-i / 5)),
        "fast": lambda: _rotated(torch.exp(-i)),
        "outlier": lambda: _rotated(torch.cat([torch.full((1,), 100.0, dtype=torch.float64), i[1:] / size])),
        "power": lambda: _rotated(1 / (i + 1)),
        "slow_power": lambda: _rotated((i + 1) ** -0.5),
        "fast_power": lambda: _rotated((i + 1) ** -2.0),
        "indefinite": lambda: _rotated(noise),
    }[name]()


def _trace(name: str, method: str, num_matvecs: int | None, seeds: int) -> None:
    A = _matrix(name)
    budget = {} if num_matvecs is None else {"num_matvecs": num_matvecs}
    check(
        lambda seed: cl.trace(A, method=method, generator=torch.Generator().manual_seed(seed), **budget),
        float(A.trace()),
        seeds,
        f"{method}, {name}, num_matvecs={num_matvecs}",
    )


FOUR_PROBES = [("xtrace", None), ("xtrace", 8), ("hutchinson", None), ("hutchinson", 4)]


@pytest.mark.parametrize("method, num_matvecs", FOUR_PROBES)
@pytest.mark.parametrize("name", ["flat", "exponential", "outlier", "power", "cross_entropy"])
def test_trace(name, method, num_matvecs):
    _trace(name, method, num_matvecs, QUICK if num_matvecs or method == "hutchinson" else QUICK // 2)


@pytest.mark.slow
@pytest.mark.parametrize("method, num_matvecs", [*FOUR_PROBES, ("xtrace", 16), ("hutchinson", 16)])
@pytest.mark.parametrize(
    "name",
    [
        "flat", "exponential", "fast", "outlier", "power", "slow_power", "fast_power", "indefinite",
        "untrained", "cross_entropy", "squared_error", "converged",
    ],
)  # fmt: skip
def test_trace_with_many_seeds(name, method, num_matvecs):
    _trace(name, method, num_matvecs, 1000)


# The loss change of a step, against the mean over all batches


def _batches(n: int, b: int) -> Tensor:
    """Every batch of one, or every ordered pair drawn with replacement, as coefficients (batches, n)."""
    one = torch.eye(n, dtype=torch.float64)
    return one if b == 1 else (one[:, None] + one[None]).reshape(-1, n) / 2


def _loss_difference(p: Point, b: int, lr: float, samples: int | None, seeds: int) -> None:
    truth = float(p.loss_change(lr, _batches(p.L.size, b)).mean())
    given = {"batch_size": b, "lr": lr, "replacement": b > 1}
    function = DIAGNOSTICS["expected_loss_difference"].function
    what = f"expected_loss_difference, b={b}, samples={samples}"
    check(lambda seed: function(p.at(seed, **given), samples=samples), truth, seeds, what)


@pytest.mark.parametrize(
    "name, lr, b",
    [
        ("cross_entropy", 0.5, 2),
        pytest.param("cross_entropy", 0.5, 1, marks=pytest.mark.slow),
        pytest.param("squared_error", 0.3, 1, marks=pytest.mark.slow),
    ],
)
def test_expected_loss_difference(name, lr, b):
    _loss_difference(point(name), b, lr, None, 100)


@pytest.mark.slow
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize(
    "name, lr",
    [
        ("untrained", 0.5),
        ("cross_entropy", 0.5),
        ("cross_entropy", 0.05),
        ("converged", 0.5),
        ("squared_error", 0.3),
        ("squared_error", 0.05),
        ("more_examples", 0.5),
    ],
)
def test_expected_loss_difference_with_many_seeds(name, lr, b):
    _loss_difference(point(name), b, lr, None, 500)


@pytest.mark.slow
def test_four_batches_give_no_bias():
    """Four batches may all miss the few that matter: no error bar of theirs is calibrated, but the mean is right."""
    p = point("cross_entropy")
    truth = float(p.loss_change(0.5, _batches(p.L.size, 1)).mean())
    function = DIAGNOSTICS["expected_loss_difference"].function
    found = [function(p.at(seed, batch_size=1, lr=0.5), samples=4).value for seed in range(QUICK)]
    assert_unbiased(np.array(found), truth, "expected_loss_difference, samples=4")


# Every diagnostic with a standard error


@dataclass(frozen=True)
class Row:
    """What is calibrated: the truth at a point, what the snapshot has, and the options, of which the first is quick."""

    truth: Callable[[Point], np.ndarray | float]
    options: tuple[dict, ...] = ({},)
    given: dict | None = None
    inverse: bool = False  # of an estimate: the interval holds the truth, but the mean of few probes is biased


SIZES = (1, 2, 8)
TARGETS = ({"target": 0.3}, {"target": 0.1}, {"target": 0.03, "budget": 256})
FEW_TARGETS = ({"target": 0.3}, {"target": 0.1, "budget": 128})  # where a sample is slow


def _by_size(statistic: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Point], np.ndarray]:
    return lambda p: np.array([float(statistic(*p.batches(b))) for b in SIZES])


def _resultant(G: Tensor, forms: Tensor) -> Tensor:
    squared = (G / G.norm(dim=1, keepdim=True)).mean(0).square().sum()
    return squared if len(G) < 20_000 else squared - (1 - squared) / len(G)


def _layer_traces(p: Point) -> np.ndarray:
    sizes = [i * o + o for i, o in pairwise(p.widths)]
    return np.array([float(part.sum()) for part in p.H.diagonal().split(sizes)])


def _interaction_row(name: str) -> Row:
    given = {"batch_size": (1, 8)}
    return Row(lambda p: np.array([p.interaction(name, b) for b in (1, 8)]), ({}, *TARGETS), given)


def _rank(p: Point) -> float:
    C = torch.cov(p.G.T, correction=0)
    return float(C.trace() ** 2 / C.square().sum())


ROWS = {
    "interaction_trace": _interaction_row("interaction_trace"),
    "interaction_sharpness": _interaction_row("interaction_sharpness"),
    "instability": _interaction_row("instability"),
    "expected_loss_difference": Row(
        lambda p: float(p.loss_change(0.3, _batches(p.L.size, 1)).mean()),
        ({}, *FEW_TARGETS),
        {"batch_size": 1, "lr": 0.3},
    ),
    "mean_resultant_length": Row(_by_size(_resultant), given={"batch_size": SIZES}),
    "batch_gradient_norm_variation": Row(
        _by_size(lambda G, forms: G.norm(dim=1).std(correction=0) / G.norm(dim=1).mean()), given={"batch_size": SIZES}
    ),
    "batch_sharpness": Row(
        _by_size(lambda G, forms: (forms / G.square().sum(1)).mean()), ({}, *FEW_TARGETS), {"batch_size": SIZES}
    ),
    "batch_sharpness_of_means": Row(
        _by_size(lambda G, forms: forms.mean() / G.square().sum(1).mean()), ({}, *FEW_TARGETS), {"batch_size": SIZES}
    ),
    "gradient_covariance_effective_rank": Row(_rank, ({}, {"probes": 2}, {"probes": 8}), inverse=True),
    "fisher_trace": Row(lambda p: p.fisher, (*({"probes": 2, **target} for target in ({}, *TARGETS)), {"probes": 3})),
    "hessian_trace": Row(
        lambda p: float(p.H.trace()),
        (
            {},
            {"method": "hutchinson"},
            {"method": "hutchinson", "num_matvecs": 2},
            {"method": "split", "num_matvecs": 4},
            {"method": "xtrace"},
            *TARGETS,
        ),
    ),
    "layer_hessian_trace": Row(_layer_traces, ({}, {"probes": 4}, {"probes": 3})),
    "fisher_trace_penalty": Row(lambda p: p.fisher / p.L.size, ({"draws": 4},)),
    "unit_jacobian_penalty": Row(lambda p: p.mean_squared_jacobian, ({"draws": 4},)),
    "sampled_gradient_norm_penalty": Row(
        lambda p: float(torch.stack([g.mean(0).square().sum() for g in p.G.split(8)]).mean()),
        ({"draws": 16, "micro_batch_size": 8},),
    ),
}
ELSEWHERE = {"hessian_density"}  # a function, in a test of its own
PENALTIES = [name for name in ROWS if name.endswith("penalty")]  # slow: each draw is a step's worth of work


def test_every_standard_error_is_calibrated():
    registered = {name for name, d in DIAGNOSTICS.items() if d.kind == "sem"}
    assert registered - set(ROWS) - ELSEWHERE == set(), "give each of them a row in ROWS"
    assert set(ROWS) <= set(DIAGNOSTICS)


def _calibrated(name: str, where: str, options: dict, seeds: int) -> None:
    row, p, function = ROWS[name], point(where), DIAGNOSTICS[name].function
    truth = row.truth(p)
    found = [function(p.at(seed, **(row.given or {})), **options) for seed in range(seeds)]
    values = np.array([m.value for m in found])
    inside = [np.atleast_1d((m.interval()[0] <= truth) & (truth <= m.interval()[1])) for m in found]
    sampled = np.broadcast_to(found[0].error, np.shape(truth)).reshape(-1) > 0
    for hits in np.sum(inside, 0)[sampled]:
        assert_calibrated(int(hits), seeds, f"{name} at {where}, {options}")
    assert np.all(np.all(inside, 0)[~sampled]), f"{name}: an exact value is off"
    if "target" not in options and not row.inverse:  # how many samples are drawn then depends on the value of the pilot
        assert_unbiased(values, truth, name)


@pytest.mark.parametrize("name", sorted(set(ROWS) - {*INTERACTION, "expected_loss_difference", *PENALTIES}))
def test_calibration(name, stand_ins):
    _calibrated(name, "cross_entropy", ROWS[name].options[0], 100)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["untrained", "cross_entropy", "squared_error", "converged"])
@pytest.mark.parametrize("name, options", [(name, options) for name, row in ROWS.items() for options in row.options])
def test_calibration_with_many_seeds(name, options, where, stand_ins):
    _calibrated(name, where, options, 500)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "target" in row.options[-1]])
def test_a_budget_that_ends_first_is_noted(name, stand_ins):
    given = {**(ROWS[name].given or {}), **({"batch_size": 1} if "batch" in name else {})}
    options = {"target": 1e-6, "budget": 16, **({"probes": 2} if name == "fisher_trace" else {})}
    m = DIAGNOSTICS[name].function(point("cross_entropy").at(0, **given), **options)
    assert "the budget of 16 samples ended before the target" in m.note


def _density(where: str, probes: int, seeds: int) -> None:
    p = point(where)
    values = torch.linalg.eigvalsh(p.H).numpy()
    hits = total = 0
    for seed in range(seeds):
        m = DIAGNOSTICS["hessian_density"].function(p.at(seed), num_probes=probes, points=60)
        x = np.array(m.axis[1])
        sigma = (x[-1] - x[0]) / 108  # the range of the Ritz values, 100 sigma, and 4 sigma on both sides
        truth = (np.exp(-0.5 * ((x[:, None] - values) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))).mean(1)
        low, high = m.interval()
        seen = truth > 1e-3 * truth.max()
        hits, total = hits + int(((low <= truth) & (truth <= high))[seen].sum()), total + int(seen.sum())
    assert_calibrated(hits, total, f"hessian_density at {where}, {probes} probes")


def test_density():
    _density("cross_entropy", 8, 40)


@pytest.mark.slow
@pytest.mark.parametrize("probes", [4, 8, 16])
@pytest.mark.parametrize("where", ["untrained", "cross_entropy", "squared_error"])
def test_density_with_many_seeds(where, probes):
    _density(where, probes, 500)


# A run, where the variance of few probes is pooled over steps


def _run(steps: int, lr: float, loss: str, diagnostics: list, *, seed: int = 0) -> Iterator[cl.Snapshot]:
    (x, y), _ = cl.problems.digits(256)
    model = cl.problems.mlp((64, 16, 10))
    L = cl.Objective(model, loss, (x, y))
    sgd = torch.optim.SGD(model.parameters(), lr=lr)
    return cl.train(L, sgd, cl.Batches(256, 8, steps, seed=1), diagnostics=diagnostics, seed=seed)


def _tracked(steps: int, lr: float, loss: str, seeds: int) -> np.ndarray:
    """Whether each interval holds the exact value, (seeds, steps)."""
    exact = [("interaction_trace", {"exact": True})]
    truth = [at.measurements["interaction_trace"].value for at in _run(steps, lr, loss, exact)]
    inside = np.zeros((seeds, steps), dtype=bool)
    for seed in range(seeds):
        for t, at in enumerate(_run(steps, lr, loss, ["interaction_trace"], seed=seed)):
            low, high = at.measurements["interaction_trace"].interval(0.95)
            inside[seed, t] = low <= truth[t] <= high
    return inside


def test_tracked_interaction_in_a_run():
    inside = _tracked(20, 0.2, "cross_entropy", 4)
    assert_calibrated(int(inside.sum()), inside.size, "tracked interaction_trace")


@pytest.mark.slow
@pytest.mark.parametrize("loss, lr", [("cross_entropy", 0.4), ("cross_entropy", 0.05), ("squared_error", 0.1)])
def test_tracked_interaction_in_a_long_run(loss, lr):
    inside = _tracked(150, lr, loss, 8)
    assert_calibrated(int(inside.sum()), inside.size, "tracked interaction_trace")
    assert_calibrated(int(inside[:, :REFRESH].sum()), inside[:, :REFRESH].size, "the first steps of a run")
    late = inside[:, REFRESH:]
    for age in range(REFRESH):
        # At the first step after a refit nothing is known of the new variance: there the interval may be too wide.
        same = late[:, age::REFRESH]
        assert_calibrated(int(same.sum()), same.size, f"{age} steps after a refit", highest=1.0)


# The other estimates in a run, on a small net whose every batch of one can be evaluated


FEW_SAMPLES = {
    "interaction_trace": ({"batch_size": 1}, {"exact": True}),
    "hessian_trace": ({}, {"method": "exact"}),
    "fisher_trace": ({"probes": 2}, {"exact": True}),
    "batch_sharpness": ({"batch_size": 1}, {"samples": 40}),
    "batch_sharpness_of_means": ({"batch_size": 1}, {"samples": 40}),
    "expected_loss_difference": ({"batch_size": 1}, None),
}


def _small_run(loss: str, lr: float, steps: int, every: int, requests: list, seed: int) -> Iterator[cl.Snapshot]:
    p = Point(loss, 0, (6, 8, 6), 40)
    sgd = torch.optim.SGD(p.L.model.parameters(), lr=lr)
    batches = cl.Batches(40, 8, steps * every, seed=1)
    run = cl.train(p.L, sgd, batches, diagnostics=requests, seed=seed, every=every)
    return (at for at in run if at.measurements)


def _few_samples(loss: str, lr: float, every: int, steps: int, seeds: int) -> None:
    exact = [(name, {**options, **more}) for name, (options, more) in FEW_SAMPLES.items() if more]
    truth: dict[str, list[float]] = {name: [] for name in FEW_SAMPLES}
    for at in _small_run(loss, lr, steps, every, exact, 0):
        for name, m in at.measurements.items():
            truth[name].append(float(m.value))
        after = [at.objective.value(at.w - lr * g) for g in at.objective.example_gradients(at.w)]
        truth["expected_loss_difference"].append(float(torch.stack(after).mean() - at.value))
    estimates = [(name, options) for name, (options, _) in FEW_SAMPLES.items()]
    inside: dict[str, list] = {name: [] for name in FEW_SAMPLES}
    for seed in range(seeds):
        for t, at in enumerate(_small_run(loss, lr, steps, every, estimates, seed)):
            for name, m in at.measurements.items():
                low, high = m.interval()
                inside[name].append(low <= truth[name][t] <= high)
    for name, hits in inside.items():
        assert_calibrated(sum(hits), len(hits), f"{name} in a run, every={every}")


@pytest.mark.slow
def test_few_samples_a_step():
    _few_samples("cross_entropy", 0.3, 1, 12, 8)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("loss, lr", [("cross_entropy", 0.3), ("squared_error", 0.1)])
def test_few_samples_a_step_with_many_seeds(loss, lr, every):
    _few_samples(loss, lr, every, 24, 25)
