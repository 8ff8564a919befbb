"""Eigenpairs that follow a matrix from one step of a run to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Eigenpairs, LinearOperator, eigsh
from ..measurement import Measurement
from ..snapshot import Snapshot

RANDOM_EVERY = 16  # measured steps between two searches with a fresh random vector


def tracked_eigenpairs(
    at: Snapshot, name: str, A: LinearOperator | Tensor, k: int, tol: float, *, hint: Tensor | None = None
) -> Eigenpairs:
    """The k top eigenpairs of A, started from those of the last measured step under the same name.

    `hint` (P,) joins the start, such as the gradient, which turns to the sharpest direction when that becomes unstable.
    Every 16th search also has a random vector, so that an eigenvalue that rises in a direction unseen is found.
    """
    key = ("eigenpairs", name, k, tol)

    def solve() -> Eigenpairs:
        carry = {} if at.carry is None else at.carry
        last, count = carry.get(key, (None, 0))
        start, fresh = None, 1
        if last is not None:
            start = last if hint is None else torch.cat([last, hint[:, None]], 1)
            fresh = 1 if count % RANDOM_EVERY == 0 else 0
        generator = at.generator(f"eigenpairs {name} {k} {tol}")
        pairs = eigsh(A, k, tol=tol, start=start, random_columns=fresh, generator=generator)
        carry[key] = (pairs.vectors, count + 1)
        return pairs

    return at.shared(key, solve)


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
