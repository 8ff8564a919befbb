"""Eigenpairs at an end of the spectrum, from products alone, with a residual beside every eigenvalue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..memory import require
from .operator import LinearOperator, relative_error
from .probes import normal
from .rows import Rows, rows_of

Which = Literal["LA", "SA", "LM"]
EXPLORE = 6  # rounds from a random vector before its residual says anything: in many dimensions it starts small, and
# without them one cold search in five for k=1 and tol=1e-2 settles on the second of two close eigenvalues
SMALL = 100  # rows of a matrix whose whole basis is held, so that no spectrum is out of reach
PARTS = 16  # in which vectors are converted to float64


@dataclass(frozen=True)
class Eigenpairs:
    """Ritz pairs of a symmetric matrix.

    Attributes:
        values: (K,) Ritz values, descending.
        vectors: (P, K) orthonormal Ritz vectors; the entry of largest magnitude of each is positive.
        residuals: (K,) ‖A v - θ v‖ of the unit vectors v. Within this distance of θ (and `floor`) lies *some* eigenvalue of
            A; it need not be the one that was asked for. For ``which="LA"``, θ_1 never exceeds the largest eigenvalue.
        matvecs: products spent.
        converged: whether every residual is at most tol times the largest |Ritz value|, up to rounding.
        extremes: smallest and largest Ritz value seen.
        floor: rounding error of a Ritz value, or that of products that are off by more, in the unit of `values`.
        guards: (P, G) the Ritz vectors that come next, converged or not, as many as were asked for and the basis had.
        guard_values: (G,) their Ritz values, descending in the order of `which`.
        explored: whether a random vector joined, from the start or because the given ones were distrusted.
        verified: whether the residuals come from products of their own with `vectors`.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    extremes: tuple[float, float]
    floor: float
    guards: Tensor
    guard_values: Tensor
    explored: bool
    verified: bool


def eigsh(
    A: LinearOperator | Tensor,
    k: int = 1,
    *,
    which: Which = "LA",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    start: Tensor | None = None,
    random_columns: int = 1,
    distrust: float = float("inf"),
    max_basis: int | None = None,
    guards: int = 0,
    verify: bool | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The k algebraically largest (LA), smallest (SA) or largest-in-magnitude (LM) eigenpairs of A.

    Block Lanczos written as Rayleigh-Ritz: the basis V and its image A V are kept, every new block is made of the
    residuals of the wanted pairs that have not converged, orthogonalized twice against the whole basis, and the
    basis is restarted with its best Ritz vectors when it is full. From random start vectors this spans the same
    Krylov space as the three-term recurrence; from given vectors (a warm start) it also uses what they know of each
    other.

    Residuals never come from the recurrence. A search that random vectors took part in multiplies its Ritz vectors by A
    once more, k products, and values and residuals are those of these products. Other searches combine the products that
    they hold: the same to a few roundings of ‖A‖ where A is a fixed linear map, but up to five times too small where every
    product has an error of its own, as with a loader that shuffles.

    Cold starts use k random columns and so see eigenvalues of multiplicity up to k. A start vector orthogonal to the
    answer would hide it for ever, therefore `random_columns` random ones join the given ones. What random vectors lead
    to is followed for six rounds more, and until the next Ritz pairs are seen to lie below the wanted ones. A start
    without them may be distrusted after all: where its residuals exceed `distrust`, a random vector joins; otherwise the
    next pair is followed only while one more round might lift it above the wanted ones.

    Cost: 14-23 products for k=1 and tol=1e-2 on loss Hessians when cold, a few when warm. Memory: at most `max_basis`
    vectors and as many images, up to twice that while the basis grows, and 3 (k + 1 + guards) vectors for Ritz
    pairs and their residuals. Vectors and products stay on their device. A round waits for it three times: for which of the
    new vectors are independent, for the new rows of the small projected matrix, and for the residuals.

    Args:
        A: symmetric, (P, P); a `LinearOperator` or a dense tensor.
        k: from 1 to P.
        tol: relative to the largest |Ritz value|; 0 asks for rounding level.
        max_matvecs: where to give up, with ``converged=False`` and the best pairs so far; k products are the least.
            Default 300 + 20 k. The products that verify are among them, if it leaves room for 2 k.
        start: (P,) or (P, S) vectors to start from, the best first; they need not be orthonormal. What does not fit into
            the basis beside the random columns is left out.
        random_columns: random start vectors beside the given ones.
        distrust: residual of the start, relative to the largest wanted |Ritz value|, above which a random vector joins.
        max_basis: the most vectors to hold, at least k + 2; fewer make more rounds. Default 2 k + 20, or P up to 100.
        guards: how many Ritz vectors beyond the k to return, for a later warm start; they cost no products.
        verify: whether residuals get products of their own; default where a random vector joined.
        generator: for the random columns; a CPU generator.

    Raises:
        ValueError: k outside 1..P, an unknown `which`, a `max_basis` below k + 2, or a start of another length.
        FloatingPointError: a product with A is not finite.
        MemoryError: the vectors would not fit in the memory that is free.

    Source: Lanczos 1950; Rayleigh-Ritz with thick restart as in Wu and Simon 2000 (doi 10.1137/S0895479898334605).

    Example:
        >>> import torch
        >>> pairs = eigsh(torch.diag(torch.tensor([3.0, 1.0, -5.0], dtype=torch.float64)), k=2)
        >>> [round(x, 6) for x in pairs.values.tolist()]
        [3.0, 1.0]
    """
    rows, P = rows_of(A), A.shape[0]
    if not 1 <= k <= P:
        raise ValueError(f"k is {k}; expected 1 to {P}, the size of the matrix")
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f"which is {which!r}; expected 'LA' (largest), 'SA' (smallest) or 'LM' (largest magnitude)")
    if max_basis is None:
        max_basis = max(2 * k + 20, P if P <= SMALL else 0)
    if max_basis < k + 2:
        raise ValueError(
            f"max_basis is {max_basis}; expected at least {k + 2}, which is k + 2, or None for {2 * k + 20}"
        )
    max_basis = min(P, max_basis)
    held = 2 * max_basis + 3 * (k + 1 + guards)
    fix = f"pass a smaller k, max_basis={k + 2} (more products), or measure a block of the parameters"
    what = f"eigsh with k={k} of {rows.count} rows, with {held} vectors,"
    require(held * rows.count * A.dtype.itemsize, A.device, what, fix)
    max_matvecs = max(k, max_matvecs if max_matvecs is not None else 300 + 20 * k)
    eps = torch.finfo(A.dtype).eps
    errors = getattr(A, "errors", [])
    before = len(errors)

    warm = start is not None
    explore, explored = not warm or random_columns > 0, 0
    reserve = k if (explore if verify is None else verify) and max_matvecs >= 2 * k else 0  # products that verify
    block = _start_block(A, k, start, random_columns, min(max_basis, max_matvecs - reserve), generator)
    basis, images = _Columns(block, max_basis), _Columns(A @ block, max_basis)
    V, AV = basis.matrix, images.matrix
    T = _symmetric(_projected(A, V, AV))
    # image of the newest vector of the random one's Krylov space
    lead = AV[:, -1:].clone() if warm and explore else AV[:, :0]
    reported = k + 1 + guards
    matvecs, extremes = V.shape[1], (float("inf"), float("-inf"))
    while True:
        theta, Y = torch.linalg.eigh(T)
        order = _order(theta, which)
        theta, Y = theta[order], Y[:, order].to(V)
        X, AX = V @ Y[:, :reported], AV @ Y[:, :reported]
        scale = theta.abs().max()
        floor = max(16 * eps, relative_error(errors[before:])) * scale
        unit = scale if bool(scale > 0) else torch.ones_like(scale)
        R = (AX - X * theta[:reported].to(V)).div_(unit)  # so that no square overflows or vanishes
        residuals = unit * rows.norms(R).cpu()
        wanted = torch.nonzero(residuals[:k] > torch.clamp(tol * scale, min=floor))[:, 0].tolist()
        tolerance = max(tol * float(scale), float(floor))
        joins = warm and not explore and float(residuals[:k].max()) > distrust * float(theta[:k].abs().max())
        leads = joins
        if joins:
            explore, wanted = True, [*wanted, R.shape[1]]
            reserve = k if verify is not False and matvecs + k <= max_matvecs else 0
            R = torch.cat([R, rows.drawn(lambda n: normal((n, 1), block, generator=generator))], 1)
        if not wanted:
            explored += 1
            if explored <= EXPLORE and lead.shape[1]:
                leads, wanted = True, [R.shape[1]]
                R = torch.cat([R, (lead / unit).to(R.dtype)], 1)
            elif explore and explored <= EXPLORE and V.shape[1] > k and bool(residuals[k] > floor):
                wanted = [k]
            else:
                wanted = _may_rise(theta, residuals, k, which, tolerance, explore=explore)
        extremes = (min(extremes[0], float(theta.min())), max(extremes[1], float(theta.max())))
        wanted = wanted[: max(0, max_matvecs - matvecs - reserve)]
        if not wanted or V.shape[1] == P:
            break
        if max_basis == P:
            wanted = wanted[: P - V.shape[1]]
        if V.shape[1] + len(wanted) > max_basis:
            keep = min(max(k + 1, max_basis // 2), V.shape[1])
            wanted = wanted[: max_basis - keep]
            V, AV = _orthonormal_again(V @ Y[:, :keep], AV @ Y[:, :keep], rows)
            basis.restart(V)
            images.restart(AV)
            T = _symmetric(_projected(A, V, AV))
            V, AV = basis.matrix, images.matrix
        B = orthonormalize(R[:, wanted], V, min_norm=4 * eps, rows=rows)
        if B.shape[1] == 0:  # the basis is invariant to rounding: nothing is left to find in it
            break
        AB = A @ B
        V, AV = basis.append(B), images.append(AB)
        cross, own = _projected(A, V, AB).split([len(T), B.shape[1]])
        T = torch.cat([torch.cat([T, cross], 1), torch.cat([cross.T, _symmetric(own)], 1)])
        matvecs += B.shape[1]
        lead = AB[:, -1:] if leads else lead

    guard_vectors, guard_values = X[:, k : k + guards], theta[k : k + guards].to(V.device)
    X, AX = X[:, :k], AX[:, :k]
    signed = (rows.norms(X) * torch.sign(rows.largest(X))).to(X.dtype)
    X = X / signed
    AX = A @ X if reserve else AX / signed
    matvecs += reserve
    values = rows.sum((X * AX).sum(0, dtype=torch.float64))
    R = (AX - X * values.to(X.dtype)).div_(unit)
    residuals = unit * rows.norms(R)
    descending = torch.argsort(values, descending=True)
    return Eigenpairs(
        values=values[descending],
        vectors=X[:, descending],
        residuals=residuals[descending],
        matvecs=matvecs,
        converged=bool((_finite(A, residuals.cpu()) <= tolerance + floor / 2).all()),
        extremes=extremes,
        floor=float(floor),
        guards=guard_vectors,
        guard_values=guard_values,
        explored=explore,
        verified=reserve > 0,
    )


def orthonormalize(
    B: Tensor, against: Tensor | None = None, *, min_norm: float = 0.0, rows: Rows | None = None
) -> Tensor:
    """An orthonormal basis of the columns of B, orthogonal to the orthonormal columns of `against`.

    Gram-Schmidt, twice ("twice is enough"): as a block against `against`, with unit length in between; then column by
    column among themselves, where a short remainder is mostly rounding and goes through all of it again. Columns that keep
    less than `min_norm`, or no more than rounding of their length, are dropped, so the result may have fewer columns. `rows`
    says which rows are here, where other processes hold the rest.
    """
    rows = rows or Rows(len(B))
    Q = B[:, :0] if against is None else against
    short = 100 * torch.finfo(B.dtype).eps
    B, alive = _unit(B, min_norm, rows)
    B, long = _unit(B - Q @ rows.sum(Q.T @ B), short, rows)
    B, alive = B - Q @ rows.sum(Q.T @ B), alive & long
    found = B[:, :0]
    for v in B.T:  # a column that is dropped is zero until the end, so that a device need not be waited for
        v, long = _unit((v - found @ rows.sum(found.T @ v))[:, None], short, rows)
        if found.shape[1]:
            v = v - Q @ rows.sum(Q.T @ v)
            v = v - found @ rows.sum(found.T @ v)
        alive[found.shape[1]] &= long[0]
        found = torch.cat([found, _unit(v, 0.0, rows)[0]], 1)
    return found[:, alive]


def _unit(B: Tensor, shortest: float, rows: Rows) -> tuple[Tensor, Tensor]:
    """The columns at unit length to less than rounding of their own precision, or zero where they are not longer than
    `shortest`; and which are longer.
    """
    lengths = rows.norms(B)
    long = lengths > shortest
    return torch.where(long, B / lengths, 0).to(B.dtype), long


def _projected(A: LinearOperator | Tensor, V: Tensor, AV: Tensor) -> Tensor:
    """Vᵀ A V, on the CPU, where the small matrices are."""
    return _finite(A, _inner(V, AV, rows_of(A)).cpu())


def _inner(V: Tensor, W: Tensor, rows: Rows) -> Tensor:
    """Vᵀ W in float64, in parts of the rows, so that no copy of V is made: float32 sums would cost half of the digits."""
    some = max(1, -(-V.shape[0] // PARTS))
    parts = zip(V.split(some), W.split(some), strict=True)
    return rows.sum(torch.stack([v.double().T @ w.double() for v, w in parts]).sum(0))


def _orthonormal_again(X: Tensor, AX: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """X, orthonormal but for rounding that restarts pile up, and A X: one Newton step towards X (XᵀX)^(-1/2)."""
    step = (1.5 * torch.eye(X.shape[1], dtype=torch.float64, device=X.device) - 0.5 * _inner(X, X, rows)).to(X.dtype)
    return X @ step, AX @ step


class _Columns:
    """A matrix that grows by columns in place, each contiguous, up to `most` of them.

    On a GPU its memory doubles when it is full. On a CPU, where memory is not taken before it is written to, there is room
    for all of them at once: smaller rooms that were left would stay with the process.
    """

    def __init__(self, first: Tensor, most: int) -> None:
        self._count, self._most = first.shape[1], most
        self._rows = first.new_empty(most if first.device.type == "cpu" else self._count, first.shape[0])
        self._rows[: self._count] = first.T

    @property
    def matrix(self) -> Tensor:
        """(P, m), a view."""
        return self._rows[: self._count].T

    def append(self, B: Tensor) -> Tensor:
        """The matrix with the columns of B after its own."""
        count = self._count + B.shape[1]
        if count > len(self._rows):
            rows = self._rows.new_empty(min(max(2 * len(self._rows), count), self._most), B.shape[0])
            rows[: self._count] = self._rows[: self._count]
            self._rows = rows
        self._rows[self._count : count] = B.T
        self._count = count
        return self.matrix

    def restart(self, B: Tensor) -> None:
        """The columns of B, no more than there were, in the place of its own."""
        self._count = B.shape[1]
        self._rows[: self._count] = B.T


def _start_block(
    A: LinearOperator | Tensor,
    k: int,
    start: Tensor | None,
    random_columns: int,
    room: int,
    generator: torch.Generator | None,
) -> Tensor:
    """An orthonormal block of k to `room` columns: the given ones and random ones, which are drawn and then cut to fit."""
    rows, P = rows_of(A), A.shape[0]
    like = torch.empty(0, dtype=A.dtype, device=A.device)
    given = like.reshape(rows.count, 0) if start is None else start.detach().reshape(start.shape[0], -1)
    if given.shape[0] != rows.count:
        raise ValueError(f"start has {given.shape[0]} rows; expected {rows.count}, the size of the matrix")
    bad = rows.sum((~torch.isfinite(given)).sum(0))
    given = orthonormalize(given.to(like)[:, bad == 0], rows=rows)
    given = given[:, : max(k, room - random_columns)]
    random = max(random_columns if given.shape[1] else 0, k - given.shape[1])
    if random == 0:
        return given
    noise = rows.drawn(lambda n: normal((n, min(random, P)), like, generator=generator))
    noise = orthonormalize(noise, given, rows=rows)
    return torch.cat([given, noise], 1)[:, :room]


def _finite(A: LinearOperator | Tensor, numbers: Tensor) -> Tensor:
    if not torch.isfinite(numbers).all():
        name = A.name if isinstance(A, LinearOperator) else "the matrix"
        raise FloatingPointError(
            f"a product with {name} is not finite; the parameters have diverged, or the loss has "
            "an infinite second derivative there (norm or sqrt at 0). Measure at other parameters"
        )
    return numbers


def _symmetric(T: Tensor) -> Tensor:
    return (T + T.T) / 2


def _may_rise(theta: Tensor, residuals: Tensor, k: int, which: Which, tolerance: float, *, explore: bool) -> list[int]:
    """The first Ritz pair after the wanted ones that has not settled, if it may still overtake them.

    After an exploration: while its residual r is large, or it lies within r of them. Otherwise only if the next round
    could lift it above their tolerance: by at most r, and by r²/(θ - ρ) if its residual vector has the Rayleigh quotient ρ,
    for which θ - ρ is taken as a quarter of the largest |Ritz value|.
    """
    open_pairs = torch.nonzero(residuals[k:] > tolerance)[:1, 0].tolist()
    if not open_pairs:
        return []
    j = k + open_pairs[0]
    last, following, residual, scale = theta[k - 1], theta[j], residuals[j], theta.abs().max()
    gap = {"LA": last - following, "SA": following - last, "LM": last.abs() - following.abs()}[which]
    if explore:
        rises = bool(residual > 0.05 * scale) or bool(gap <= residual)
    else:
        rises = bool(gap + tolerance <= torch.minimum(residual, 4 * residual**2 / scale))
    return [j] if rises else []


def _order(theta: Tensor, which: Which) -> Tensor:
    key = {"LA": theta, "SA": -theta, "LM": theta.abs()}[which]
    return torch.argsort(key, descending=True)
