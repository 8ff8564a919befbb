"""Residuals and intervals of Ritz values on LAPACK's test matrices for symmetric eigenproblems, at every end.

Compared with a reference: eigenvalues by LAPACK, improved by a Rayleigh quotient in extended precision, and residuals in
extended precision. Nothing here is only behavioural.

The 21 types are those of LAPACK's `dchkst` (Anderson et al. 1999, LAPACK Users' Guide; its generator is `dlatms`): here a
matrix gets its eigenvectors from the QR factor of a normal matrix. "Near overflow" is √overflow · ulp / P, as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from curvlab.linalg import LinearOperator, eigsh

F64 = torch.float64
TYPES = range(1, 22)
RATIO = 30  # residual / (‖A‖ ulp) at tol=0; LAPACK's own threshold of 30 is for a ratio with another factor P below


def spectrum(kind: str, P: int, ulp: float, generator: torch.Generator, *, positive: bool = False) -> Tensor:
    """From 1 to ulp: evenly or geometrically spaced, or 1 once and else ulp; with random signs unless `positive`."""
    t = torch.linspace(0, 1, P, dtype=F64)
    values = {"even": 1 - t * (1 - ulp), "geometric": ulp**t, "clustered": torch.where(t == 0, 1.0, ulp).to(F64)}[kind]
    return values if positive else values * signs(P, generator)


def signs(P: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (P,), generator=generator).to(F64) * 2 - 1


def rotated(values: Tensor, generator: torch.Generator) -> Tensor:
    """With random eigenvectors, symmetric to the last bit."""
    P = len(values)
    Q = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=F64)).Q
    A = Q @ torch.diag(values) @ Q.T
    return (A + A.T) / 2


def lapack(number: int, P: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Test matrix of this number, (P, P)."""
    limits = torch.finfo(dtype)
    large = math.sqrt(1 / limits.tiny) * limits.eps / P
    small = math.sqrt(limits.tiny) * P / limits.eps

    def spread(kind: str, *, positive: bool = False) -> Tensor:
        return spectrum(kind, P, limits.eps, generator, positive=positive)

    def random() -> Tensor:
        B = torch.rand(P, P, generator=generator, dtype=F64) * 2 - 1
        return B.triu() + B.triu(1).T

    def dominant() -> Tensor:
        """Tridiagonal, diagonally dominant, with a geometric diagonal."""
        d = spread("geometric", positive=True)
        e = torch.rand(P - 1, generator=generator, dtype=F64) * 0.5 * torch.minimum(d[1:], d[:-1])
        return torch.diag(d) + torch.diag(e, 1) + torch.diag(e, -1)

    kinds = ("even", "geometric", "clustered")
    if number <= 2:
        A = torch.eye(P, dtype=F64) * (number - 1)
    elif number <= 7:
        A = torch.diag(spread((*kinds, "geometric", "geometric")[number - 3]))
    elif number <= 12:
        A = rotated(spread((*kinds, "even", "even")[number - 8]), generator)
    elif number <= 15:
        A = random()
    elif number <= 20:
        A = rotated(spread((*kinds, "even", "even")[number - 16], positive=True), generator)
    else:
        A = dominant()
    scale = large if number in (6, 11, 14, 19) else small if number in (7, 12, 15, 20) else 1.0
    return (scale * A).to(dtype)


def multiple(multiplicity: int, end: float, P: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """An eigenvalue of this multiplicity at ±1, the others between -0.9 and 0.9."""
    rest = 1.8 * torch.rand(P - multiplicity, generator=generator, dtype=F64) - 0.9
    return rotated(torch.cat([torch.full((multiplicity,), end, dtype=F64), rest]), generator).to(dtype)


def eigenvalues(A: Tensor) -> np.ndarray:
    """Those of LAPACK, and their Rayleigh quotients in extended precision, in units of the largest."""
    _, X = torch.linalg.eigh(A.double() / A.double().abs().max().clamp_min(torch.finfo(F64).tiny))
    X, A = (M.double().numpy().astype(np.longdouble) for M in (X, A))
    return (X * (A @ X)).sum(0) / (X * X).sum(0)


def check_intervals(A: Tensor, k: int, which: str, tol: float, seed: int) -> None:
    """Residuals are those of the unit vectors; every interval has an eigenvalue; at tol=0 residuals are a few ulp."""
    pairs = eigsh(A, k, which=which, tol=tol, generator=torch.Generator().manual_seed(seed))
    X, values, wide = (M.numpy().astype(np.longdouble) for M in (pairs.vectors, pairs.values, A))
    true = eigenvalues(A)
    norm = max(float(np.abs(true).max()), torch.finfo(A.dtype).tiny)
    R = (wide @ X - X * values) / norm
    ulp, residuals = torch.finfo(A.dtype).eps, pairs.residuals.numpy() / norm
    explicit = np.sqrt((R * R).sum(0))
    assert pairs.converged
    assert pairs.verified
    assert np.abs(np.sqrt((X * X).sum(0)) - 1).max() <= 8 * ulp
    assert np.abs(explicit - residuals).max() <= 4 * ulp
    assert (np.abs(values[:, None] - true).min(1) / norm <= residuals + pairs.floor / norm).all()
    assert tol > 0 or explicit.max() < RATIO * ulp


def cases(seed: int, dtype: torch.dtype, sizes: int) -> Iterator[tuple[Tensor, int]]:
    """(A, k): the 21 types with P in 1, 2, 3, k, k + 1 and `sizes`; multiplicities 2 to 10 with k below and above them."""
    generator = torch.Generator().manual_seed(seed)
    for k in (1, 2, 5):
        for P in sorted({P for P in (1, 2, 3, k, k + 1, sizes) if k <= P}):
            yield from ((lapack(number, P, dtype, generator), k) for number in TYPES)
    for multiplicity in range(2, 11):
        for end in (1.0, -1.0):
            A = multiple(multiplicity, end, max(sizes, 12), dtype, generator)
            yield from ((A, k) for k in (1, multiplicity, multiplicity + 1))


def run(seed: int, dtype: torch.dtype, sizes: int, ends: tuple[str, ...], tols: tuple[float, ...]) -> int:
    runs = 0
    for A, k in cases(seed, dtype, sizes):
        for which in ends:
            for tol in tols:
                check_intervals(A, k, which, tol, seed)
                runs += 1
    return runs


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_every_interval_has_an_eigenvalue(dtype):
    """A slice of the slow test: one seed, one end and one tolerance for each matrix."""
    generator = torch.Generator().manual_seed(0)
    for i, number in enumerate((*TYPES, *TYPES)):
        P, k = ((1, 1), (2, 2), (3, 2), (6, 5), (24, 3), (40, 1))[(i + number) % 6]
        check_intervals(lapack(number, P, dtype, generator), k, ("LA", "SA", "LM")[i % 3], (0.0, 1e-2)[i // 21], i)
    for multiplicity in range(2, 11):
        which, end = ("LA", 1.0) if multiplicity % 2 else ("SA", -1.0)
        A = multiple(multiplicity, end, 24, dtype, generator)
        check_intervals(A, multiplicity + 1, which, 0.0, multiplicity)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_every_interval_has_an_eigenvalue_in_many_runs(dtype):
    """At least 5000 runs for each dtype."""
    ends, tols = ("LA", "SA", "LM"), (0.0, 1e-2)
    assert sum(run(seed, dtype, sizes, ends, tols) for seed, sizes in enumerate((12, 25, 40, 60))) >= 5000


@pytest.mark.parametrize("k, max_basis", [(1, 4), (3, 8), (3, None)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_residuals_stay_true_over_many_restarts(dtype, k, max_basis):
    """Products that are combined again and again drift from A V, and V from orthonormal."""
    generator = torch.Generator().manual_seed(0)
    A = rotated(torch.linspace(0, 1, 150, dtype=F64) ** 0.5, generator).to(dtype)
    tol, ulp = 1e-5, torch.finfo(dtype).eps
    pairs = eigsh(A, k, tol=tol, max_basis=max_basis, max_matvecs=8000, verify=False, generator=generator)
    X = pairs.vectors.double()
    explicit = torch.linalg.vector_norm(A.double() @ X - X * pairs.values, dim=0)
    assert pairs.converged
    assert not pairs.verified
    assert pairs.matvecs > 100
    assert torch.allclose(pairs.residuals, explicit, rtol=0, atol=16 * ulp)
    assert torch.allclose(X.T @ X, torch.eye(k, dtype=F64), rtol=0, atol=16 * ulp)


@pytest.mark.parametrize("k", [1, 5])
def test_a_product_of_its_own_tells_of_products_with_errors(k):
    """What a search holds has been made to agree with itself; a fresh product has an error that nothing has seen."""
    generator = torch.Generator().manual_seed(0)
    d = torch.cat([torch.tensor([20.0, 9, 8, 7, 6], dtype=F64), 0.1 * torch.linspace(-1, 1, 195, dtype=F64)])
    A, ratios = rotated(d, generator), []
    for seed in range(8):
        errors = torch.Generator().manual_seed(seed)
        noisy = LinearOperator(lambda V: A @ V + 0.01 * torch.randn(V.shape, generator=errors, dtype=F64), 200)  # noqa: B023
        for verify in (False, None):
            pairs = eigsh(noisy, k, tol=1e-2, verify=verify, generator=torch.Generator().manual_seed(0))
            again = torch.linalg.vector_norm(noisy @ pairs.vectors - pairs.vectors * pairs.values, dim=0)
            ratios.append(float((pairs.residuals / again).max()))
    held, own = np.median(ratios[::2]), np.median(ratios[1::2])
    assert held < 0.6
    assert own > 0.9
