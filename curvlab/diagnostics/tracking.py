"""Eigenpairs that follow a matrix from one step of a run to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import Eigenpairs, LinearOperator, eigsh
from ..linalg.rows import Rows, rows_of
from ..measurement import Measurement
from ..snapshot import Snapshot

EXPLORE_EVERY = 16  # measured steps between two searches with a random vector while nothing happens
DISTRUST = 0.2  # relative residual of the start in the new matrix, above which a random vector joins at once
SWELL = 1.5  # ratio of the hint's lengths, either way, above which a random vector joins at once
TURN = 0.2  # sine of a vector's turn in one step, above which the one before is kept too: at the edge the period is 2
# Whose values between two searches may be Rayleigh quotients of the vectors that were found last.
UPDATED = ("sharpness", "hessian_eigenvalues", "preconditioned_sharpness", "layer_sharpness", "ntk_eigenvalues")
GUARDS = 4  # eigenvectors at most that are followed beyond the k that were asked for


@dataclass(frozen=True)
class Track:
    """What a search leaves for the next one, and when that is to explore."""

    start: Tensor
    vectors: Tensor
    values: Tensor
    hint: float
    interval: int
    wait: int


def tracked_eigenpairs(
    at: Snapshot, name: str, A: LinearOperator | Tensor, k: int, tol: float, *, hint: Tensor | None = None
) -> Eigenpairs:
    """The k top eigenpairs of A, started from those of the last measured steps under the same name, k and tol.

    The start grows with what the spectrum asks for. It has the last k Ritz vectors; the next one, so that the k-th place
    may change hands between two steps, and up to four that would come level with the k-th if both moved as far as the
    fastest eigenvalue did; and the vectors of the step before where they differ, because at the edge of stability every
    second step is alike. An eigenvalue that rises where none of these sees it is looked for with a random vector and the
    `hint` (P,), such as the gradient, which turns to the sharpest direction when that becomes unstable: every 16 measured
    steps while nothing happens; at once when the residuals of the start exceed a fifth of the largest wanted eigenvalue
    or the length of the hint has changed by a factor of 1.5; and 1, 3, 7 and 15 steps after such an alarm.
    At these steps the residuals too get products of their own, k more; between them they come from the products of the
    Rayleigh-Ritz step, which `eigsh` holds.

    Where a snapshot is not to search, the Rayleigh-Ritz values of the last vectors, for k products.

    Every (name, k, tol) has a track of its own, so no number depends on who else is measured. Cost: k + 1 products a
    step at least, one for each vector that is followed further, 6 or more to explore; memory: at most 2 k + 4 vectors.
    """
    key = ("eigenpairs", name, k, tol)
    carry = {} if at.carry is None else at.carry
    last = Track(**carry[key]) if key in carry else None
    if not at.search and last is not None:
        found = last.vectors  # what a search at this step would start from stays as it is
        return at.shared(
            ("quotients", *key), lambda: eigsh(A, k, tol=tol, start=found, random_columns=0, max_matvecs=k)
        )

    def solve() -> Eigenpairs:
        length = 1.0 if hint is None else float(rows_of(A).norms(hint))
        start, swollen, random = None, False, 0
        if last is not None:
            swollen = not last.hint / SWELL <= length <= last.hint * SWELL
            random = int(swollen or last.wait <= 1)
            start = torch.cat([last.start, hint[:, None]], 1) if random and hint is not None else last.start
        generator = at.generator(f"eigenpairs {name} {k} {tol}")
        pairs = eigsh(
            A, k, tol=tol, start=start, random_columns=random, distrust=DISTRUST, guards=GUARDS, generator=generator
        )
        if last is None:
            interval = EXPLORE_EVERY
        elif swollen or (pairs.explored and not random):
            interval = 1
        else:
            interval = min(EXPLORE_EVERY, 2 * last.interval) if random else last.interval
        wait = interval if last is None or pairs.explored else last.wait - 1
        carry[key] = vars(
            Track(_start(pairs, last, rows_of(A)), pairs.vectors, pairs.values, length, interval, wait)
        )  # plain, to be saved
        return pairs

    return at.shared(key, solve)


def _start(pairs: Eigenpairs, last: Track | None, rows: Rows) -> Tensor:
    """The Ritz vectors, the guards worth a column, and what the vectors of the step before add to them."""
    if last is None:
        return torch.cat([pairs.vectors, pairs.guards[:, :1]], 1)
    change = float((pairs.values - last.values).abs().max())
    near = int((pairs.guard_values > pairs.values[-1] - 2 * change).sum())
    V = torch.cat([pairs.vectors, pairs.guards[:, : max(1, near)]], 1)
    rest = last.vectors - V @ rows.sum(V.T @ last.vectors)
    return torch.cat([V, rest[:, rows.norms(rest) > TURN]], 1)


def top_eigenpairs(at: Snapshot, k: int, tol: float) -> Eigenpairs:
    """The k top eigenpairs of the Hessian at a snapshot, tracked."""
    return tracked_eigenpairs(at, "hessian", at.hessian, k, tol, hint=at.gradient)


def largest(pairs: Eigenpairs) -> Measurement:
    """The top Ritz value with its residual, and remarks on what a reader should know."""
    return remarked(Measurement(float(pairs.values[0]), float(pairs.residuals[0]), "bound", floor=pairs.floor), pairs)


def remarked(found: Measurement, pairs: Eigenpairs) -> Measurement:
    """Add what a reader should know: a larger |λ_min|, or no convergence."""
    remarks = []
    low, high = pairs.extremes
    if -low > high:
        remarks.append(f"the smallest eigenvalue is at most {low:.4g} and larger in magnitude")
    if not pairs.converged:
        remarks.append(f"not converged after {pairs.matvecs} products")
    note = "; ".join(remarks) or None
    return Measurement(found.value, found.error, found.kind, floor=found.floor, axis=found.axis, note=note)


def subspace_error(pairs: Eigenpairs, k: int) -> float:
    """Bound on the sine of the angle to the true top-k eigenspace, by the gap below it (Davis and Kahan 1970)."""
    if k >= len(pairs.values):
        return 0.0 if k == pairs.vectors.shape[0] else 1.0
    gap = float(pairs.values[k - 1] - pairs.values[k] - pairs.residuals[k])
    residual = float(pairs.residuals[:k].norm()) + pairs.floor
    return min(1.0, residual / gap) if gap > 0 else 1.0
