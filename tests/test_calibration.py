"""Error bars: 95% intervals contain the truth in about 95% of seeds, and the values scatter around it without bias.

Compared with a reference: traces of matrices that are known, tr(H S_b) from dense H and S_b, the loss change averaged
over every possible batch, and in a run the exact trace at every step. The band that is promised is 90-98%; a test allows
one standard error of its number of seeds beyond it, so the slow tests, with many seeds, are sharper. Nothing here is only
behavioural.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import curvlab as cl
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.diagnostics.interaction import REFRESH

QUICK, MANY = 300, 2000
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
        self.L = cl.Objective(model, loss, (x, y))
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
        return at

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


@pytest.mark.parametrize("probes", [None, 4])
@pytest.mark.parametrize("name", POINTS)
def test_interaction_at_one_point(name, probes):
    _interaction(point(name), probes, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("probes", [None, 8, 4])
@pytest.mark.parametrize("name", MORE_POINTS)
def test_interaction_at_one_point_with_many_seeds(name, probes):
    if name == "untrained" and probes is not None:
        pytest.xfail(
            "at initialization of a net of 40 examples few probes are skewed: 87% with 4 and 88% with 8 of them"
        )
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
    if (name, method, num_matvecs) == ("outlier", "hutchinson", 4):
        pytest.skip(
            "four squares of one normal number are too skewed for any interval of this kind; documented in trace()"
        )
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
    "name, lr, b", [("cross_entropy", 0.5, 1), ("cross_entropy", 0.5, 2), ("squared_error", 0.3, 1)]
)
def test_expected_loss_difference(name, lr, b):
    _loss_difference(point(name), b, lr, None, 150)


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


def test_four_batches_give_no_bias():
    """Four batches may all miss the few that matter: no error bar of theirs is calibrated, but the mean is right."""
    p = point("cross_entropy")
    truth = float(p.loss_change(0.5, _batches(p.L.size, 1)).mean())
    function = DIAGNOSTICS["expected_loss_difference"].function
    found = [function(p.at(seed, batch_size=1, lr=0.5), samples=4).value for seed in range(QUICK)]
    assert_unbiased(np.array(found), truth, "expected_loss_difference, samples=4")


# Other estimates with a standard error


def _other(name: str, given: dict, options: dict, truth: np.ndarray | float) -> None:
    p, function = point("cross_entropy"), DIAGNOSTICS[name].function
    check(lambda seed: function(p.at(seed, **given), **options), truth, 1000, f"{name}, {options}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"method": "hutchinson"}, {"method": "split", "num_matvecs": 4}, {"method": "xtrace"}]
)
def test_hessian_trace(options):
    _other("hessian_trace", {}, options, float(point("cross_entropy").H.trace()))


@pytest.mark.slow
@pytest.mark.parametrize("probes", [None, 4])
def test_layer_hessian_trace(probes):
    diagonal = point("cross_entropy").H.diagonal()  # 6 -> 6 -> 4
    truth = np.array([float(diagonal[:42].sum()), float(diagonal[42:].sum())])
    _other("layer_hessian_trace", {}, {"probes": probes}, truth)


@pytest.mark.slow
@pytest.mark.parametrize("probes", [2, 3])
def test_fisher_trace(probes):
    p = point("cross_entropy")
    exact = cl.measure(p.L, [("fisher_trace", {"exact": True})], w=p.w)["fisher_trace"].value
    _other("fisher_trace", {}, {"probes": probes}, exact)


@pytest.mark.slow
def test_mean_resultant_length():
    G = point("cross_entropy").G
    truth = float((G / G.norm(dim=1, keepdim=True)).mean(0).square().sum())
    _other("mean_resultant_length", {"batch_size": 1}, {}, truth)


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
    inside = _tracked(32, 0.2, "cross_entropy", 4)
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
