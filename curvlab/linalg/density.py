"""The density of a matrix's eigenvalues, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .operator import LinearOperator
from .probes import normal


@dataclass(frozen=True)
class SpectralDensity:
    """Eigenvalue density smoothed by a Gaussian; it integrates to 1.

    Attributes:
        grid: (T,) where it is evaluated.
        values: (T,) mean over probes.
        errors: (T,) one standard error over probes, of the smoothed density.
        df: (T,) degrees of freedom of the errors.
        nodes, weights: (num_probes, steps) Ritz values and their weights; each row of weights sums to 1.
        sigma: standard deviation of the smoothing.
        matvecs: products spent.
    """

    grid: Tensor
    values: Tensor
    errors: Tensor
    df: Tensor
    nodes: Tensor
    weights: Tensor
    sigma: float
    matvecs: int


def spectral_density(
    A: LinearOperator | Tensor,
    *,
    num_probes: int = 8,
    steps: int = 40,
    grid: Tensor | int = 400,
    sigma: float | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Smoothed density of the eigenvalues of a symmetric matrix.

    Each probe v gives, by `steps` products, the Gauss quadrature of the measure Σ_i (v·q_i)² δ(λ - λ_i)/‖v‖², whose mean
    over v is the density. Isolated eigenvalues at the ends appear at their place with weight about 1/P; the bulk is
    right in its moments, to degree 2 `steps` - 1 for each probe.

    With f the Gaussian around a point of the grid, a probe gives Σ f(λ_i) c_i, where c_i = (v·q_i)²/‖v‖²;
    its variance is 2/(P + 2) times that of f over the eigenvalues, which the same quadrature gives for f². That is far
    less scattered than the sample variance of skewed samples. One probe counts as many degrees of freedom as there are
    eigenvalues under the Gaussian, (Σ f)²/Σ f².

    Args:
        num_probes: at least 2, for an error.
        steps: Lanczos steps a probe, with full reorthogonalization; at most P.
        grid: points, or how many between the extreme Ritz values, widened by 4 sigma.
        sigma: smoothing, in the unit of the eigenvalues; default 1/100 of the range.

    Raises:
        ValueError: fewer than 2 probes or 1 step.
        FloatingPointError: a product is not finite.

    Source: Golub and Welsch 1969; Lin, Saad and Yang 2016 (arXiv 1308.5467); Ghorbani et al. 2019 (arXiv 1901.10159).

    Example:
        >>> import torch
        >>> A = torch.diag(torch.cat([torch.zeros(90), torch.ones(10)]).double())
        >>> found = spectral_density(A, generator=torch.Generator().manual_seed(0))
        >>> bool((found.weights * found.nodes).sum(1).mean() < 0.2)  # a tenth of the eigenvalues are 1
        True
    """
    if num_probes < 2 or steps < 1:
        raise ValueError(
            f"got num_probes={num_probes}, steps={steps}; expected at least 2 probes, for an error, and 1 step"
        )
    P = A.shape[0]
    steps = min(steps, P)
    nodes = torch.zeros(num_probes, steps, dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    like, matvecs = torch.empty(0, dtype=A.dtype, device=A.device), 0
    for i in range(num_probes):
        theta, omega = quadrature(A, normal((P,), like, generator=generator), steps)
        k = len(theta)
        nodes[i, :k], weights[i, :k] = theta.cpu(), omega.cpu()
        nodes[i, k:] = nodes[i, 0]
        matvecs += k
    low, high = float(nodes.min()), float(nodes.max())
    size = max(abs(low), abs(high))
    spread = high - low if high - low > 1e-6 * size else size or 1.0
    sigma = sigma if sigma is not None else spread / 100
    if isinstance(grid, int):
        grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, grid, dtype=torch.float64)
    bumps = torch.exp(-0.5 * ((grid[:, None, None] - nodes) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    each = (bumps * weights).sum(2)
    mean, squares = each.mean(1), (bumps.square() * weights).sum(2).mean(1)
    errors = (2 / (P + 2) * (squares - mean.square()).clamp_min(0) / num_probes).sqrt()
    df = (num_probes - 1) * torch.nan_to_num(P * mean.square() / squares, nan=1.0).clamp_min(1)
    return SpectralDensity(grid, mean, errors, df, nodes, weights, sigma, matvecs)


def quadrature(A: LinearOperator | Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes θ (k,), ascending, and weights ω (k,), which sum to 1, of the Gauss rule that A and v define; float64.

    Σ ω_j f(θ_j) = vᵀf(A)v/‖v‖², exactly for polynomials f of degree below 2k; k as `tridiagonal`.

    Raises:
        FloatingPointError: a product is not finite.

    Source: Golub and Welsch 1969.
    """
    diagonal, off = tridiagonal(A, v, steps)
    theta, Y = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return theta, Y[0].square()


def tridiagonal(A: LinearOperator | Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The Lanczos matrix of A from v, as diagonal (k,) and off-diagonal (k - 1,), float64, on the device.

    k is `steps`, or less where the Krylov space of v ends earlier. With Q the orthonormal basis, A Q = Q T + β q eᵀ; it is
    orthogonalized twice against itself, so no eigenvalue appears as a ghost.

    Raises:
        FloatingPointError: a product is not finite.
    """
    eps = torch.finfo(A.dtype).eps
    Q = torch.zeros(len(v), steps, dtype=A.dtype, device=A.device)
    Q[:, 0] = v / torch.linalg.vector_norm(v)
    diagonal, off = [], []
    for j in range(steps):
        u = A @ Q[:, j]
        diagonal.append(Q[:, j].double() @ u.double())
        size = torch.linalg.vector_norm(u)
        for _ in range(2):
            u = u - Q[:, : j + 1] @ (Q[:, : j + 1].T @ u)
        beta = torch.linalg.vector_norm(u)
        if not bool(torch.isfinite(beta)):
            raise FloatingPointError(
                "a product is not finite; the parameters have diverged. Measure at other parameters"
            )
        if j + 1 == steps or bool(beta <= 10 * eps * size):
            break
        off.append(beta.double())
        Q[:, j + 1] = u / beta
    return torch.stack(diagonal), torch.stack(off) if off else torch.zeros(0, dtype=torch.float64, device=A.device)
