"""Linear algebra from products alone, as theorems about matrices whose spectrum is known.

Compared with a reference: eigenvalues and traces of planted spectra, LAPACK through torch, and scipy's eigsh. Only
behavioural: numbers of products, warm starts, streams of random numbers, refusals.
"""

from __future__ import annotations

import doctest
import importlib
import math

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlab import linalg
from curvlab.linalg import LinearOperator, dense, eigsh, from_scipy, orthonormalize, probes
from curvlab.linalg import trace as trace_of

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotated(spectrum, *, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    """A dense symmetric matrix with this spectrum and random eigenvectors."""
    spectrum = torch.as_tensor(spectrum, dtype=F64)
    Q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=seeded(seed), dtype=F64)).Q
    A = Q @ torch.diag(spectrum) @ Q.T
    return ((A + A.T) / 2).to(dtype)


class Counting:
    """An operator that counts the columns it has multiplied."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.products = A, 0

    def operator(self) -> LinearOperator:
        def matmat(V: Tensor) -> Tensor:
            self.products += V.shape[1]
            return self.A @ V

        return LinearOperator(matmat, len(self.A), self.A.dtype, self.A.device, name="the counted matrix")


def check_pairs(A: Tensor, pairs: linalg.Eigenpairs, k: int) -> None:
    """What holds for any Ritz pairs, converged or not."""
    P, eps = len(A), torch.finfo(A.dtype).eps
    values, X = pairs.values.to(F64), pairs.vectors.to(F64)
    true = torch.linalg.eigvalsh(A.to(F64))
    rounding = pairs.floor + 64 * P * eps * float(true.abs().max())
    assert pairs.values.shape == pairs.residuals.shape == (k,)
    assert pairs.vectors.shape == (P, k)
    assert pairs.vectors.dtype == A.dtype
    assert torch.all(values[:-1] >= values[1:])
    assert torch.allclose(X.T @ X, torch.eye(k, dtype=F64), atol=64 * P * eps)
    explicit = torch.linalg.vector_norm(A.to(F64) @ X - X * values, dim=0)
    assert torch.all((pairs.residuals - explicit).abs() <= rounding)
    distance = (values[:, None] - true[None]).abs().min(1).values
    assert torch.all(distance <= pairs.residuals + rounding)  # Weyl: some eigenvalue is that near
    assert torch.all(values <= true.flip(0)[:k] + rounding)  # Cauchy interlacing: no Ritz value above its eigenvalue
    assert torch.all(values >= true[:k].flip(0) - rounding)
    assert pairs.extremes[0] >= float(true[0]) - rounding
    assert pairs.extremes[1] <= float(true[-1]) + rounding
    biggest = X.gather(0, X.abs().argmax(0, keepdim=True))
    assert torch.all(biggest > 0)


# eigsh: every spectrum, every end

SPECTRA = {
    "identity": torch.ones(12),
    "zero": torch.zeros(12),
    "rank_1": torch.tensor([20.086] + [0.0] * 11),
    "rank_1_negative": torch.tensor([-3.0] + [0.0] * 11),
    "low_rank": torch.tensor([5.0, 4.0, -3.0] + [0.0] * 27),
    "double": torch.tensor([3.0, 3.0] + [i / 30 for i in range(30)]),
    "triple": torch.tensor([3.0] * 3 + [i / 30 for i in range(30)]),
    "fivefold": torch.tensor([3.0] * 5 + [i / 30 for i in range(30)]),
    "indefinite": torch.linspace(-2, 1, 40),
    "negative_definite": -torch.linspace(1, 3, 40),
    "clustered": torch.cat([1 + 1e-4 * torch.arange(5.0), torch.linspace(0, 0.5, 35)]),
    "tiny_next_to_huge": torch.cat([torch.tensor([1e12, 1e6, 1.0, 1e-6]), torch.linspace(-1e-9, 1e-9, 26)]),
    "outliers": torch.cat([torch.tensor([50.0, 20.0, 10.0]), torch.linspace(-0.1, 0.2, 97)]),
}


def wanted(A: Tensor, k: int, which: str) -> Tensor:
    true = torch.linalg.eigvalsh(A.to(F64))
    key = {"LA": true, "SA": -true, "LM": true.abs()}[which]
    return true[key.argsort(descending=True)[:k]].sort(descending=True).values


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", SPECTRA)
def test_values_of_planted_spectra(name, which):
    A = rotated(SPECTRA[name])
    k = 5
    pairs = eigsh(A, k, which=which, tol=1e-9, generator=seeded())
    if which == "LA":
        check_pairs(A, pairs, k)
    assert pairs.converged
    scale = max(abs(x) for x in pairs.extremes)
    expected = wanted(A, k, which)
    if which == "LM":  # of a pair ±λ at the border either may come
        assert torch.allclose(pairs.values.abs().sort().values, expected.abs().sort().values, atol=1e-8 * scale)
    else:
        assert torch.allclose(pairs.values, expected, atol=1e-8 * scale)


@pytest.mark.parametrize("multiplicity", [2, 3, 4, 5])
@pytest.mark.parametrize("extra", [0, 2])
def test_all_copies_of_a_repeated_eigenvalue_are_found(multiplicity, extra):
    rest = torch.linspace(-1, 1, 60)
    A = rotated(torch.cat([torch.full((multiplicity,), 4.0), rest]))
    pairs = eigsh(A, multiplicity + extra, tol=1e-8, generator=seeded())
    check_pairs(A, pairs, multiplicity + extra)
    assert torch.allclose(pairs.values[:multiplicity], torch.full((multiplicity,), 4.0, dtype=F64), atol=1e-10)
    if extra:
        assert torch.allclose(pairs.values[multiplicity:], rest.flip(0)[:extra].to(F64), atol=1e-8)


@pytest.mark.parametrize("P", [1, 2, 3, 7])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_tiny_matrices_and_every_k(P, which):
    A = rotated(torch.linspace(-1.5, 2, P)) if P > 1 else torch.tensor([[-2.5]], dtype=F64)
    for k in range(1, P + 1):
        pairs = eigsh(A, k, which=which, generator=seeded())
        assert pairs.matvecs <= P + k  # k of them for the residuals
        assert torch.allclose(pairs.values, wanted(A, k, which), atol=2e-3)
        assert torch.allclose(pairs.vectors.T @ pairs.vectors, torch.eye(k, dtype=F64), atol=1e-12)
    assert torch.allclose(pairs.values, torch.linalg.eigvalsh(A).flip(0), atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 39, 40])
def test_k_up_to_all(k):
    A = rotated(torch.linspace(-2, 3, 40))
    pairs = eigsh(A, k, tol=1e-8, generator=seeded())
    check_pairs(A, pairs, k)
    assert torch.allclose(pairs.values, wanted(A, k, "LA"), atol=1e-7)


spectra = st.one_of(
    st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=1, max_size=25),
    st.lists(st.sampled_from([-3.0, 0.0, 1.0, 2.0, 1e-8, 1e8]), min_size=1, max_size=25),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(spectrum=spectra, seed=st.integers(0, 1000), data=st.data())
def test_ritz_pairs_of_any_matrix(spectrum, seed, data):
    P = len(spectrum)
    k = data.draw(st.integers(1, P), label="k")
    limit = data.draw(st.integers(1, 3 * P), label="max_matvecs")
    A = rotated(spectrum, seed=seed)
    counted = Counting(A)
    pairs = eigsh(counted.operator(), k, max_matvecs=limit, generator=seeded(seed))
    check_pairs(A, pairs, k)
    assert pairs.matvecs == counted.products <= max(k, limit)
    if pairs.converged:
        scale = max(abs(x) for x in pairs.extremes)
        assert torch.all(pairs.residuals <= max(1e-3 * scale, pairs.floor))


def test_float32():
    A = rotated(torch.cat([torch.tensor([9.0, 5.0]), torch.linspace(-1, 1, 98)]), dtype=torch.float32)
    pairs = eigsh(A, 3, tol=0.0, generator=seeded())
    check_pairs(A, pairs, 3)
    assert pairs.vectors.dtype == torch.float32
    assert pairs.converged  # tol=0 asks for rounding level, which can be reached
    assert torch.allclose(pairs.values[:2], torch.tensor([9.0, 5.0], dtype=F64), rtol=1e-5)


def test_a_dense_tensor_and_an_operator_give_the_same():
    A = rotated(torch.linspace(-1, 4, 30))
    one, two = (eigsh(operand, 4, generator=seeded()) for operand in (A, LinearOperator(lambda V: A @ V, 30)))
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.vectors, two.vectors)


@pytest.mark.parametrize("k", [1, 4, 30])
def test_matvecs_are_the_products_that_were_done(k):
    counted = Counting(rotated(torch.linspace(-1, 4, 120)))
    pairs = eigsh(counted.operator(), k, generator=seeded())
    assert pairs.matvecs == counted.products


@pytest.mark.parametrize("room", ["least", "default"])
@pytest.mark.parametrize("k", [1, 3, 10, 30])
def test_a_small_basis_restarts_and_is_still_right(k, room, monkeypatch):
    spectrum = torch.linspace(0, 1, 200) ** 0.5  # crowded at the top, so that many products are needed
    counted = Counting(rotated(spectrum))
    limit = k + 2 if room == "least" else 2 * k + 20
    held = []

    def watched(B, against=None, **options):
        Q = orthonormalize(B, against, **options)
        held.append(Q.shape[1] + (0 if against is None else against.shape[1]))
        return Q

    monkeypatch.setattr("curvlab.linalg.lanczos.orthonormalize", watched)
    tol, max_basis = (1e-3, limit) if room == "least" else (1e-7, None)
    pairs = eigsh(counted.operator(), k, tol=tol, max_basis=max_basis, max_matvecs=8000, generator=seeded())
    assert pairs.converged
    assert pairs.matvecs == counted.products > limit  # more than the basis holds
    assert max(held) <= limit
    check_pairs(counted.A, pairs, k)
    assert torch.allclose(pairs.values, wanted(counted.A, k, "LA"), atol=1e-8 if tol == 1e-7 else 1e-3)


@pytest.mark.parametrize("k", [1, 8])
def test_a_start_that_is_too_large_is_cut_to_the_limits(k):
    counted = Counting(rotated(torch.linspace(0, 1, 100)))
    start = torch.randn(100, 40, generator=seeded(), dtype=F64)
    pairs = eigsh(counted.operator(), k, tol=1e-3, start=start, max_basis=k + 2, max_matvecs=k + 1, generator=seeded())
    assert pairs.matvecs == counted.products == k + 1
    check_pairs(counted.A, pairs, k)


def test_a_basis_too_small_for_the_wanted_pairs_is_refused():
    with pytest.raises(ValueError, match=r"max_basis is 6; expected at least 7, which is k \+ 2, or None for 30"):
        eigsh(torch.eye(50, dtype=F64), 5, max_basis=6)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_guards_are_the_ritz_vectors_that_come_next(which):
    A = rotated(torch.linspace(-1.5, 2, 60) ** 3)
    plain = eigsh(A, 3, which=which, generator=seeded())
    pairs = eigsh(A, 3, which=which, guards=4, generator=seeded())
    assert plain.guards.shape == (60, 0)
    assert torch.equal(pairs.vectors, plain.vectors)
    assert pairs.matvecs == plain.matvecs
    X = torch.cat([pairs.vectors, pairs.guards], 1)
    assert torch.allclose(X.T @ X, torch.eye(7, dtype=F64), atol=1e-12)
    assert torch.allclose((pairs.guards.T @ A @ pairs.guards).diagonal(), pairs.guard_values, atol=1e-12)
    key = {"LA": pairs.guard_values, "SA": -pairs.guard_values, "LM": pairs.guard_values.abs()}[which]
    assert torch.all(key[:-1] >= key[1:])
    assert eigsh(A[:3, :3], 3, which=which, guards=4, generator=seeded()).guards.shape == (3, 0)


def test_products_needed_for_the_top_of_a_hessian_like_spectrum():
    outliers = torch.tensor([20.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
    A = rotated(torch.cat([outliers, 0.1 * torch.linspace(-1, 1, 491)]))
    assert eigsh(A, 1, tol=1e-2, generator=seeded()).matvecs <= 18
    assert eigsh(A, 5, tol=1e-2, generator=seeded()).matvecs <= 45


def test_warm_start_from_the_answer_needs_few_products():
    A = rotated(torch.cat([torch.tensor([5.0, 4.0, 3.0]), torch.linspace(-1, 1, 197)]))
    cold = eigsh(A, 3, tol=1e-6, generator=seeded())
    warm = eigsh(A, 3, tol=1e-6, start=cold.vectors, random_columns=0, generator=seeded(1))
    assert warm.matvecs == 3
    assert torch.allclose(warm.values, cold.values, atol=1e-9)
    assert eigsh(A, 3, tol=1e-6, start=cold.vectors, generator=seeded(1)).matvecs < 0.5 * cold.matvecs
    nearby = cold.vectors + 0.01 * torch.randn(200, 3, generator=seeded(2), dtype=F64)
    loose = eigsh(A, 3, tol=1e-2, start=nearby, random_columns=0, generator=seeded(1))
    assert loose.matvecs < 0.5 * cold.matvecs


@pytest.mark.parametrize("index", [1, 5, 49])
def test_a_start_that_is_orthogonal_to_the_answer_still_finds_it(index):
    A = torch.diag(torch.linspace(5, 0, 50, dtype=F64))
    pairs = eigsh(A, 1, tol=1e-8, start=torch.eye(50, dtype=F64)[:, index], generator=seeded())
    assert float(pairs.values[0]) == pytest.approx(5.0, abs=1e-8)


@pytest.mark.parametrize("P", [300, 10_000])
def test_a_hidden_outlier_of_a_large_matrix_is_found(P):
    """In many dimensions a random vector has a small residual from the first, long before it has seen the outlier."""
    spectrum = 1e-3 * torch.linspace(-1, 1, P, dtype=F64)
    spectrum[0], spectrum[1] = 2.0, 1.0
    op = LinearOperator(lambda V: spectrum[:, None] * V, P)
    known = torch.zeros(P, dtype=F64)
    known[1] = 1.0
    pairs = eigsh(op, 1, tol=1e-2, start=known, generator=seeded())
    assert float(pairs.values[0]) == pytest.approx(2.0, rel=1e-2)
    assert pairs.matvecs <= 20


@pytest.mark.parametrize("kind", ["too_many", "repeated", "zero", "not_finite", "one_dimensional", "other_dtype"])
def test_any_start_will_do(kind):
    A = rotated(torch.linspace(0, 1, 8) ** 2)
    V = torch.randn(8, 3, generator=seeded(), dtype=F64)
    start = {
        "too_many": torch.randn(8, 11, generator=seeded(), dtype=F64),
        "repeated": torch.cat([V[:, :1], V[:, :1], V[:, 1:]], 1),
        "zero": torch.zeros(8, 2, dtype=F64),
        "not_finite": torch.cat([V, torch.full((8, 1), math.nan, dtype=F64)], 1),
        "one_dimensional": V[:, 0],
        "other_dtype": V.float().requires_grad_(),
    }[kind]
    pairs = eigsh(A, 2, tol=1e-8, start=start, generator=seeded())
    check_pairs(A, pairs, 2)
    assert torch.allclose(pairs.values, wanted(A, 2, "LA"), atol=1e-10)


def test_max_matvecs_stops_with_the_best_so_far():
    counted = Counting(rotated(torch.linspace(0, 1, 500) ** 0.5))
    pairs = eigsh(counted.operator(), 3, tol=1e-10, max_matvecs=20, generator=seeded())
    assert not pairs.converged
    assert pairs.matvecs == counted.products <= 20
    check_pairs(counted.A, pairs, 3)
    assert eigsh(counted.A, 3, max_matvecs=1, generator=seeded()).matvecs == 3  # k products are the least


def test_eigsh_is_deterministic_by_its_generator():
    A = rotated(torch.linspace(0, 1, 60))
    one, two, other = (eigsh(A, 2, generator=seeded(s)) for s in (7, 7, 8))
    assert torch.equal(one.vectors, two.vectors)
    assert not torch.equal(one.vectors, other.vectors)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_eigsh_refuses_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"k is {k}; expected 1 to 3, the size of the matrix"):
        eigsh(torch.eye(3, dtype=F64), k)


def test_eigsh_refuses_an_unknown_end():
    with pytest.raises(ValueError, match=r"which is 'LR'; expected 'LA' \(largest\), 'SA' \(smallest\) or 'LM'"):
        eigsh(torch.eye(3, dtype=F64), which="LR")


def test_eigsh_refuses_a_start_of_another_length():
    with pytest.raises(ValueError, match=r"start has 4 rows; expected 3, the size of the matrix"):
        eigsh(torch.eye(3, dtype=F64), start=torch.ones(4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_eigsh_refuses_products_that_are_not_finite(bad):
    A = torch.full((4, 4), bad, dtype=F64)
    with pytest.raises(FloatingPointError, match=r"a product with the matrix is not finite; .* Measure at other"):
        eigsh(A)
    with pytest.raises(FloatingPointError, match=r"a product with the bad one is not finite"):
        eigsh(LinearOperator(lambda V: A @ V, 4, name="the bad one"))


# orthonormalize


def spans(Q: Tensor, B: Tensor) -> bool:
    """Whether every column of B is a combination of the orthonormal columns of Q."""
    return bool((B - Q @ (Q.T @ B)).norm() <= 1e-10 * B.norm())


@pytest.mark.parametrize("columns", [1, 4, 10, 13])
def test_orthonormalize_gives_a_basis(columns):
    B = torch.randn(10, columns, generator=seeded(), dtype=F64)
    Q = orthonormalize(B)
    assert Q.shape == (10, min(10, columns))
    assert torch.allclose(Q.T @ Q, torch.eye(Q.shape[1], dtype=F64), atol=1e-14)
    assert spans(Q, B)


@pytest.mark.parametrize("order", ["aab", "aba", "abb", "a0b", "abab", "aaab"])
def test_orthonormalize_drops_dependent_columns_and_nothing_else(order):
    a, b = torch.randn(6, 2, generator=seeded(), dtype=F64).T
    B = torch.stack([{"a": a, "b": b, "0": torch.zeros(6, dtype=F64)}[c] for c in order], 1)
    Q = orthonormalize(B)
    assert Q.shape == (6, 2)
    assert torch.allclose(Q.T @ Q, torch.eye(2, dtype=F64), atol=1e-14)
    assert spans(Q, B)


@pytest.mark.parametrize("distance", [1.0, 1e-4, 1e-8, 1e-12])
def test_orthonormalize_against_a_basis_twice_is_enough(distance):
    V = torch.linalg.qr(torch.randn(30, 5, generator=seeded(), dtype=F64)).Q
    B = V[:, :2] + distance * torch.randn(30, 2, generator=seeded(1), dtype=F64)
    Q = orthonormalize(B, V)
    assert Q.shape == (30, 2)
    both = torch.cat([V, Q], 1)
    assert torch.allclose(both.T @ both, torch.eye(7, dtype=F64), atol=1e-13)


def test_orthonormalize_of_what_is_already_spanned_is_empty():
    V = torch.linalg.qr(torch.randn(30, 5, generator=seeded(), dtype=F64)).Q
    assert orthonormalize(V @ torch.randn(5, 3, generator=seeded(), dtype=F64), V).shape == (30, 0)
    assert orthonormalize(torch.zeros(30, 2, dtype=F64)).shape == (30, 0)
    assert orthonormalize(torch.empty(30, 0, dtype=F64)).shape == (30, 0)


def test_orthonormalize_drops_columns_below_min_norm():
    B = torch.diag(torch.tensor([1.0, 1e-3, 1.0], dtype=F64))
    assert orthonormalize(B, min_norm=1e-2).shape == (3, 2)


# trace


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_exact_trace(dtype):
    A = rotated(torch.linspace(-3, 2, 50), dtype=dtype)
    truth = float(A.double().trace())
    for options in ({"method": "exact"}, {"num_matvecs": 50}, {"num_matvecs": 99, "method": "hutchinson"}):
        m = trace_of(A, **options)
        low, high = m.interval()
        assert m.kind == "exact"
        assert m.matvecs == 50
        assert low <= truth <= high
        assert high - low <= 2e-4 if dtype == torch.float32 else high - low <= 1e-12


@pytest.mark.parametrize("method", ["hutchinson", "xtrace"])
@pytest.mark.parametrize("name", ["indefinite", "outliers", "clustered", "low_rank"])
def test_trace_estimates_are_unbiased(name, method):
    A = rotated(SPECTRA[name])
    n = 400
    values = np.array([trace_of(A, method=method, num_matvecs=8, generator=seeded(s)).value for s in range(n)])
    off = abs(values.mean() - float(A.trace()))
    assert off <= 4 * values.std(ddof=1) / math.sqrt(n) + 1e-12


def test_hutchinson_has_the_variance_of_the_docstring():
    A = rotated(SPECTRA["indefinite"])
    n = 1000
    values = np.array([trace_of(A, method="hutchinson", num_matvecs=8, generator=seeded(s)).value for s in range(n)])
    expected = 2 * float(A.square().sum() - A.diagonal().square().sum()) / 8
    assert values.var(ddof=1) == pytest.approx(expected, rel=4 * math.sqrt(2 / n))


def test_hutchinson_is_exact_for_diagonal_matrices():
    A = torch.diag(torch.linspace(-3, 2, 50, dtype=F64))
    m = trace_of(A, method="hutchinson", num_matvecs=4, generator=seeded())
    assert m.value == pytest.approx(float(A.trace()), abs=1e-12)
    assert m.error <= 1e-12


def test_the_error_of_xtrace_is_that_of_its_values():
    """Leave-one-out estimates share probes; their sample standard error is too small by up to √2."""
    A = rotated((1 + torch.arange(80.0)) ** -0.5)
    found = [trace_of(A, num_matvecs=16, generator=seeded(s)) for s in range(500)]
    scatter = np.std([m.value for m in found], ddof=1)
    assert math.sqrt(np.mean([m.error**2 for m in found])) == pytest.approx(scatter, rel=0.15)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("spectrum", [[], [1.0], [3.0, -2.0], [1e6, 5.0, 1.0, -1e-3]])
def test_xtrace_of_low_rank_is_exact_to_rounding_and_does_not_claim_more(spectrum, dtype):
    A = rotated(torch.tensor(spectrum + [0.0] * (100 - len(spectrum))), dtype=dtype)
    truth = float(A.double().trace())
    for seed in range(20):
        m = trace_of(A, num_matvecs=16, generator=seeded(seed))
        low, high = m.interval()
        assert m.matvecs == 16
        assert low <= truth <= high
        eps = torch.finfo(dtype).eps
        scale = sum(abs(x) for x in spectrum)
        assert eps * scale <= (high - low) / 2 <= 1000 * eps * scale


@pytest.mark.parametrize(
    "method, num_matvecs, spent", [("xtrace", 4, 4), ("xtrace", 9, 8), ("hutchinson", 2, 2), ("hutchinson", 9, 9)]
)
def test_trace_counts_the_products_that_were_done(method, num_matvecs, spent):
    counted = Counting(rotated(torch.linspace(0, 1, 40)))
    m = trace_of(counted.operator(), method=method, num_matvecs=num_matvecs, generator=seeded())
    assert m.matvecs == counted.products == spent
    assert m.kind == "sem"
    assert m.df >= 1


def test_trace_of_float32_is_estimated_in_float32_and_summed_in_float64():
    A = rotated(1 / (1 + torch.arange(60.0)), dtype=torch.float32)
    for method in ("xtrace", "hutchinson"):
        one = trace_of(A, method=method, num_matvecs=8, generator=seeded())
        two = trace_of(A.double(), method=method, num_matvecs=8, generator=seeded())
        assert one.value == pytest.approx(two.value, rel=1e-5)
        assert one.floor > 1e3 * two.floor


def test_trace_refuses_an_unknown_method():
    with pytest.raises(ValueError, match=r"method is 'hutch\+\+'; expected 'xtrace', 'hutchinson' or 'exact'"):
        trace_of(torch.eye(3, dtype=F64), method="hutch++")


@pytest.mark.parametrize("method, num_matvecs, least", [("xtrace", 3, 4), ("xtrace", 0, 4), ("hutchinson", 1, 2)])
def test_trace_refuses_a_single_probe(method, num_matvecs, least):
    with pytest.raises(ValueError, match=rf"num_matvecs is {num_matvecs}; .*pass num_matvecs={least} or more"):
        trace_of(torch.eye(30, dtype=F64), method=method, num_matvecs=num_matvecs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["xtrace", "hutchinson", "exact"])
def test_trace_refuses_products_that_are_not_finite(method, bad):
    A = torch.eye(30, dtype=F64)
    A[3, 4] = A[4, 3] = bad
    with pytest.raises(FloatingPointError, match=r"a product is not finite; the parameters have diverged"):
        trace_of(A, method=method, num_matvecs=8, generator=seeded())


# Lanczos quadrature and the density of eigenvalues


@pytest.mark.parametrize("name", ["indefinite", "outliers", "low_rank", "identity", "clustered"])
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_lanczos_quadrature_has_the_moments_of_its_vector(name, steps):
    """k steps integrate every polynomial of degree 2k - 1 exactly: e_1ᵀ Tʲ e_1 = vᵀAʲv/‖v‖²."""
    A = rotated(SPECTRA[name]) / float(SPECTRA[name].abs().max() or 1)
    v = torch.randn(len(A), generator=seeded(), dtype=F64)
    diagonal, off = linalg.tridiagonal(A, v, steps)
    k = len(diagonal)
    assert k <= steps
    assert len(off) == k - 1
    T = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
    for j in range(2 * k):
        power = torch.linalg.matrix_power(A, j)
        assert float(torch.linalg.matrix_power(T, j)[0, 0]) == pytest.approx(float(v @ power @ v / (v @ v)), abs=1e-12)


def test_all_lanczos_steps_give_all_eigenvalues():
    A = rotated(torch.linspace(-2, 3, 30))
    diagonal, off = linalg.tridiagonal(A, torch.ones(30, dtype=F64), 30)
    T = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
    assert torch.allclose(torch.linalg.eigvalsh(T), torch.linalg.eigvalsh(A), atol=1e-10)


@pytest.mark.parametrize("name", ["identity", "zero", "rank_1", "low_rank"])
def test_lanczos_ends_with_its_krylov_space(name):
    A = rotated(SPECTRA[name])
    distinct = len(set(SPECTRA[name].tolist()))
    diagonal, _ = linalg.tridiagonal(A, torch.randn(len(A), generator=seeded(), dtype=F64), 10)
    assert len(diagonal) <= distinct + 1


@pytest.mark.parametrize("name", ["indefinite", "outliers", "zero", "identity", "rank_1"])
def test_density_of_eigenvalues(name):
    counted = Counting(rotated(SPECTRA[name]))
    found = linalg.spectral_density(counted.operator(), num_probes=4, steps=20, generator=seeded())
    assert found.matvecs == counted.products <= 80
    assert found.values.shape == found.errors.shape == found.grid.shape
    assert torch.all(found.values >= 0)
    assert torch.allclose(found.weights.sum(1), torch.ones(4, dtype=F64), atol=1e-12)
    assert float(torch.trapezoid(found.values, found.grid)) == pytest.approx(1, abs=1e-3)


def test_density_is_that_of_the_eigenvalues_on_average():
    spectrum = torch.cat([torch.tensor([5.0]), torch.linspace(-1, 1, 99)])
    grid = torch.linspace(-2, 6, 50, dtype=F64)
    options = {"grid": grid, "sigma": 0.3, "steps": 30, "num_probes": 200}
    found = linalg.spectral_density(rotated(spectrum), generator=seeded(), **options)
    bumps = torch.exp(-0.5 * ((grid[:, None] - spectrum) / 0.3) ** 2) / (0.3 * math.sqrt(2 * math.pi))
    assert torch.all((found.values - bumps.mean(1)).abs() <= 5 * found.errors + 1e-9)


@pytest.mark.parametrize("options", [{"num_probes": 1}, {"steps": 0}])
def test_density_refuses(options):
    with pytest.raises(
        ValueError, match=r"got num_probes=\d, steps=\d+; expected at least 2 probes, for an error, and 1"
    ):
        linalg.spectral_density(torch.eye(3, dtype=F64), **options)


def test_density_refuses_products_that_are_not_finite():
    with pytest.raises(FloatingPointError, match=r"a product is not finite; the parameters have diverged"):
        linalg.spectral_density(torch.full((3, 3), math.nan, dtype=F64))


# LinearOperator and scipy


def test_operator_products_of_vectors_and_blocks():
    A = rotated(torch.linspace(-1, 1, 6))
    op = LinearOperator(lambda V: A @ V, 6)
    V = torch.randn(6, 3, generator=seeded(), dtype=F64)
    assert op.shape == (6, 6)
    assert torch.equal(op @ V, A @ V)
    assert (op @ V[:, 0]).shape == (6,)
    assert torch.allclose(op @ V[:, 0], A @ V[:, 0])
    assert torch.equal(dense(op), A)
    assert torch.equal(dense(A), A)
    assert not (op @ V.requires_grad_()).requires_grad


@pytest.mark.parametrize("shape", [(5,), (5, 2), (), (6, 1, 1)])
def test_operator_refuses_another_shape(shape):
    op = LinearOperator(lambda V: V, 6, name="the matrix B")
    with pytest.raises(ValueError, match=r"the matrix B is 6 x 6; it cannot multiply shape .* Pass \(6,\) or \(6, K\)"):
        op @ torch.zeros(shape, dtype=F64)


def test_operator_refuses_another_dtype_or_device():
    op = LinearOperator(lambda V: V, 6)
    message = r"A works in torch.float64 on cpu, but got torch.float32 on cpu. Convert with V.to\(A.device, A.dtype\)"
    with pytest.raises(ValueError, match=message):
        op @ torch.zeros(6)
    with pytest.raises(ValueError, match=r"but got torch.float64 on meta"):
        op @ torch.zeros(6, dtype=F64, device="meta")


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_scipy_solves_our_operators(which, dtype):
    A = rotated(torch.cat([torch.tensor([6.0, 5.0, -7.0]), torch.linspace(-1, 1, 60)]), dtype=dtype)
    op = LinearOperator(lambda V: A @ V, len(A), dtype)
    theirs = scipy.sparse.linalg.eigsh(op.to_scipy(), k=3, which=which, return_eigenvectors=False)
    ours = eigsh(op, 3, which=which, tol=1e-6, generator=seeded())
    assert np.allclose(np.sort(ours.values.numpy()), np.sort(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["sparse", "array", "operator"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_we_solve_the_operators_of_scipy(form, dtype):
    laplacian = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(30, 30)).astype(dtype)
    theirs = scipy.sparse.linalg.eigsh(laplacian.astype("float64"), k=3, which="LA", return_eigenvectors=False)
    A = {
        "sparse": lambda: laplacian.tocsr(),
        "array": lambda: laplacian.toarray(),
        "operator": lambda: scipy.sparse.linalg.aslinearoperator(laplacian.tocsr()),
    }[form]()
    op = from_scipy(A, name="the Laplacian")
    assert op.name == "the Laplacian"
    assert op.dtype == getattr(torch, dtype)
    assert torch.equal(dense(op), torch.as_tensor(laplacian.toarray()))
    ours = eigsh(op, 3, tol=1e-6, generator=seeded())
    assert np.allclose(np.sort(ours.values.numpy()), np.sort(theirs), rtol=1e-5)


def test_there_and_back_again():
    A = rotated(torch.linspace(-1, 2, 9))
    again = from_scipy(LinearOperator(lambda V: A @ V, 9).to_scipy())
    assert torch.allclose(dense(again), A)
    assert again.to_scipy().matvec(np.ones(9)).shape == (9,)
    assert again.to_scipy().rmatvec(np.ones(9)).shape == (9,)


@pytest.mark.parametrize("array", [np.zeros((3, 4)), np.zeros((3, 3), int), np.zeros((3, 3), complex), np.zeros(3)])
def test_from_scipy_refuses_what_is_no_real_square_matrix(array):
    with pytest.raises(ValueError, match=r"got shape .* and dtype .*; expected a square matrix of float32 or float64"):
        from_scipy(array)


# Probes


def test_streams_of_keys_are_fixed_for_ever():
    """Logs of old runs can only be reproduced while these numbers stay."""

    def stream() -> torch.Generator:
        return probes.generator(0, 7, "sharpness")

    assert stream().initial_seed() == 1370249859224922397
    assert probes.rademacher((8,), torch.zeros(1), generator=stream()).tolist() == [1, -1, 1, 1, 1, -1, -1, 1]
    drawn = probes.normal((2,), torch.zeros(1, dtype=F64), generator=stream())
    assert drawn.tolist() == pytest.approx([0.9087278048062544, 0.0007568553982300253], abs=1e-15)


def test_streams_differ_by_key():
    keys = [(s, t, name) for s in (0, 1) for t in range(50) for name in ("sharpness", "interaction_trace", "a", "b")]
    keys += [(t, s, name) for s, t, name in keys if s != t] + [("ab", "c"), ("a", "bc"), ("abc",), (0,), (0, 0), ()]
    seeds = {probes.generator(*key).initial_seed() for key in set(keys)}
    assert len(seeds) == len(set(keys))


def test_streams_are_apart_from_the_global_ones():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = probes.normal((5,), torch.zeros(1), generator=probes.generator(3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(one, probes.normal((5,), torch.zeros(1), generator=probes.generator(3, 4)))


def test_probes_have_the_dtype_of_their_like():
    like = torch.zeros(1, dtype=F64)
    signs = probes.rademacher((1000, 3), like, generator=seeded())
    assert signs.dtype == F64
    assert signs.shape == (1000, 3)
    assert torch.all(signs.abs() == 1)
    assert float(signs.mean().abs()) < 4 / math.sqrt(3000)
    assert probes.rademacher((2,), torch.device("cpu"), torch.float32, generator=seeded()).dtype == torch.float32
    single = probes.normal((3,), like.float(), generator=seeded())
    assert torch.equal(single, probes.normal((3,), like, generator=seeded()).float())


@pytest.mark.parametrize("name", ["density", "lanczos", "operator", "probes", "trace"])
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(f"curvlab.linalg.{name}")).failed == 0
