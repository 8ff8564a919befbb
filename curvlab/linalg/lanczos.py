"""Eigenpairs at an end of the spectrum, from products alone, with a residual beside every eigenvalue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .operator import LinearOperator
from .probes import normal

Which = Literal["LA", "SA", "LM"]
EXPLORE = 6  # rounds from a random vector before its residual says anything: in many dimensions it starts small


@dataclass(frozen=True)
class Eigenpairs:
    """Ritz pairs of a symmetric matrix.

    Attributes:
        values: (K,) Ritz values, descending.
        vectors: (P, K) orthonormal Ritz vectors; the entry of largest magnitude of each is positive.
        residuals: (K,) ‖A v - θ v‖. Within this distance of θ lies *some* eigenvalue of A; it need not be the one
            that was asked for. For ``which="LA"``, θ_1 never exceeds the largest eigenvalue.
        matvecs: products spent.
        converged: whether every residual is at most tol times the largest |Ritz value|.
        extremes: smallest and largest Ritz value seen.
        floor: rounding error of a Ritz value, in the unit of `values`.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    extremes: tuple[float, float]
    floor: float


def eigsh(
    A: LinearOperator | Tensor,
    k: int = 1,
    *,
    which: Which = "LA",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    start: Tensor | None = None,
    random_columns: int = 1,
    max_basis: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The k algebraically largest (LA), smallest (SA) or largest-in-magnitude (LM) eigenpairs of A.

    Block Lanczos written as Rayleigh-Ritz: the basis V and its image A V are kept, every new block is made of the
    residuals of the wanted pairs that have not converged, orthogonalized twice against the whole basis, and the
    basis is restarted with its best Ritz vectors when it is full. From random start vectors this spans the same
    Krylov space as the three-term recurrence; from given vectors (a warm start) it also uses what they know of each
    other. Residuals come from the products themselves, never from the recurrence.

    Cold starts use k random columns and so see eigenvalues of multiplicity up to k. A start vector orthogonal to the
    answer would hide it for ever, therefore `random_columns` random ones join the given ones, and what they lead to is
    followed until the next Ritz pair is seen to lie below the wanted ones.

    Cost: 7-17 products for k=1 and tol=1e-2 on loss Hessians when cold, a few when warm; memory 2 `max_basis`
    vectors. Vectors, products and the small projected matrix stay on the device; each round reads a few scalars to decide
    whether to stop.

    Args:
        A: symmetric, (P, P); a `LinearOperator` or a dense tensor.
        k: from 1 to P.
        tol: relative to the largest |Ritz value|; 0 asks for rounding level.
        max_matvecs: where to give up, with ``converged=False`` and the best pairs so far. Default 300 + 20 k.
        start: (P,) or (P, S) vectors to start from; they need not be orthonormal.
        generator: for the random columns; a CPU generator.

    Raises:
        ValueError: k outside 1..P, an unknown `which`, or a start of another length.
        FloatingPointError: a product with A is not finite.

    Source: Lanczos 1950; Rayleigh-Ritz with thick restart as in Wu and Simon 2000 (doi 10.1137/S0895479898334605).

    Example:
        >>> import torch
        >>> pairs = eigsh(torch.diag(torch.tensor([3.0, 1.0, -5.0], dtype=torch.float64)), k=2)
        >>> [round(x, 6) for x in pairs.values.tolist()]
        [3.0, 1.0]
    """
    P = A.shape[0]
    if not 1 <= k <= P:
        raise ValueError(f"k is {k}; expected 1 to {P}, the size of the matrix")
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f"which is {which!r}; expected 'LA' (largest), 'SA' (smallest) or 'LM' (largest magnitude)")
    max_matvecs = max(k, max_matvecs if max_matvecs is not None else 300 + 20 * k)
    max_basis = min(P, max(max_basis or 0, 2 * k + 20))
    eps = torch.finfo(A.dtype).eps

    V = _start_block(A, k, start, random_columns, generator)
    AV = _product(A, V)
    T = _symmetric(V.T @ AV)
    explore, explored = start is not None and random_columns > 0, 0
    matvecs, extremes = V.shape[1], (float("inf"), float("-inf"))
    while True:
        theta, Y = torch.linalg.eigh(T)
        order = _order(theta, which)
        theta, Y = theta[order], Y[:, order].to(V.dtype)
        X, AX = V @ Y[:, : k + 1], AV @ Y[:, : k + 1]
        R = AX - X * theta[: k + 1].to(V.dtype)
        residuals = torch.linalg.vector_norm(R, dim=0, dtype=torch.float64)
        scale = theta.abs().max()
        floor = 16 * eps * scale
        wanted = torch.nonzero(residuals[:k] > torch.clamp(tol * scale, min=floor))[:, 0].tolist()
        if explore and not wanted:
            explored += 1
            early = explored <= EXPLORE and V.shape[1] > k and bool(residuals[k] > floor)
            if early or _may_rise(theta, residuals, k, which, max(tol * float(scale), float(floor))):
                wanted = [k]
        extremes = (min(extremes[0], float(theta.min())), max(extremes[1], float(theta.max())))
        wanted = wanted[: max(0, max_matvecs - matvecs)]
        if not wanted or V.shape[1] == P:
            break
        if max_basis == P:
            wanted = wanted[: P - V.shape[1]]
        if V.shape[1] + len(wanted) > max_basis:
            keep = max(k + len(wanted), max_basis // 2)
            V, AV, T = V @ Y[:, :keep], AV @ Y[:, :keep], torch.diag(theta[:keep])
        B = orthonormalize(R[:, wanted], V, min_norm=float(floor) / 4)
        if B.shape[1] == 0:  # the basis is invariant to rounding: nothing is left to find in it
            break
        AB = _product(A, B)
        cross = (V.T @ AB).double()
        T = torch.cat([torch.cat([T, cross], 1), torch.cat([cross.T, _symmetric(B.T @ AB)], 1)])
        V, AV = torch.cat([V, B], 1), torch.cat([AV, AB], 1)
        matvecs += B.shape[1]

    descending = torch.argsort(theta[:k], descending=True)
    X = X[:, :k][:, descending]
    X = X * torch.sign(X.gather(0, X.abs().argmax(0, keepdim=True)))
    residuals = residuals[descending]
    converged = bool((residuals <= max(tol * float(scale), float(floor))).all())
    return Eigenpairs(theta[:k][descending], X, residuals, matvecs, converged, extremes, float(floor))


def orthonormalize(B: Tensor, against: Tensor | None = None, *, min_norm: float = 0.0) -> Tensor:
    """An orthonormal basis of the columns of B, orthogonal to the orthonormal columns of `against`.

    Gram-Schmidt, twice ("twice is enough"): as a block against `against`, column by column among themselves. Columns that
    keep less than `min_norm`, or no more than rounding of their length, are dropped, so the result may have fewer columns.
    """
    before = torch.linalg.vector_norm(B, dim=0)
    alive = before > min_norm
    B = B[:, alive] / before[alive]
    Q = B[:, :0] if against is None else against
    for _ in range(2):
        B = B - Q @ (Q.T @ B)
    fixed = Q.shape[1]
    for v in B.T:
        for _ in range(2):
            v = v - Q @ (Q.T @ v)
        length = torch.linalg.vector_norm(v)
        if bool(length > 100 * torch.finfo(B.dtype).eps):
            v = v / length
            v = v - Q @ (Q.T @ v)  # a short remainder is mostly rounding
            Q = torch.cat([Q, (v / torch.linalg.vector_norm(v))[:, None]], 1)
    return Q[:, fixed:]


def _start_block(
    A: LinearOperator | Tensor,
    k: int,
    start: Tensor | None,
    random_columns: int,
    generator: torch.Generator | None,
) -> Tensor:
    P = A.shape[0]
    like = torch.empty(0, dtype=A.dtype, device=A.device)
    given = like.reshape(P, 0) if start is None else start.detach().reshape(start.shape[0], -1)
    if given.shape[0] != P:
        raise ValueError(f"start has {given.shape[0]} rows; expected {P}, the size of the matrix")
    given = orthonormalize(given.to(like)[:, torch.isfinite(given).all(0)])
    random = max(random_columns if given.shape[1] else 0, k - given.shape[1])
    if random == 0:
        return given[:, :P]
    noise = orthonormalize(normal((P, min(random, P)), like, generator=generator), given)
    return torch.cat([given, noise], 1)[:, :P]


def _product(A: LinearOperator | Tensor, V: Tensor) -> Tensor:
    AV = A @ V
    if not torch.isfinite(AV).all():
        name = A.name if isinstance(A, LinearOperator) else "the matrix"
        raise FloatingPointError(
            f"a product with {name} is not finite; the parameters have diverged, or the loss has "
            "an infinite second derivative there (norm or sqrt at 0). Measure at other parameters"
        )
    return AV


def _symmetric(T: Tensor) -> Tensor:
    T = T.double()
    return (T + T.T) / 2


def _may_rise(theta: Tensor, residuals: Tensor, k: int, which: Which, tolerance: float) -> bool:
    """Whether the next Ritz pair may still overtake the wanted ones: not settled, or within its residual of them."""
    if len(theta) <= k or float(residuals[k]) <= tolerance:
        return False
    last, following, residual = theta[k - 1], theta[k], residuals[k]
    gap = {"LA": last - following, "SA": following - last, "LM": last.abs() - following.abs()}[which]
    return bool(residual > 0.05 * theta.abs().max()) or bool(gap <= residual)


def _order(theta: Tensor, which: Which) -> Tensor:
    key = {"LA": theta, "SA": -theta, "LM": theta.abs()}[which]
    return torch.argsort(key, descending=True)
