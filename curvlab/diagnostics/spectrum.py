"""The top of the Hessian's spectrum, tracked from step to step, and the gradient's place in it."""

from __future__ import annotations

import numpy as np
import torch

from ..linalg import Eigenpairs, eigsh
from ..measurement import Measurement, missing
from ..snapshot import Snapshot
from .registry import diagnostic

RANDOM_EVERY = 16


@diagnostic("‖H‖", formula="λ_max(H), algebraically largest", kind="bound", cost="7-17 products, 2-5 when tracked")
def sharpness(at: Snapshot, *, tol: float = 1e-2) -> Measurement:
    """The largest eigenvalue of the Hessian, λ_1 = ‖H‖ wherever |λ_min| is smaller; otherwise the note says so.

    A Ritz value θ from Lanczos with residual r at most `tol` times the largest |Ritz value|: θ ≤ λ_1, and *some*
    eigenvalue lies within r of θ; `error` is r. The value itself is usually better by orders of magnitude, because the
    distance to λ_1 is at most r²/gap. During training the last eigenvectors and the gradient start the next search, and
    every 16th step a random vector joins them, so that an eigenvalue that rises unseen is found.

    Source: Cohen et al. 2021 (arXiv 2103.00065); compare with 2/lr for full-batch gradient descent.
    """
    pairs = top_eigenpairs(at, 1, tol)
    return _with_remarks(
        Measurement(float(pairs.values[0]), float(pairs.residuals[0]), "bound", floor=pairs.floor), pairs
    )


@diagnostic(
    "λ_i",
    formula="k algebraically largest eigenvalues of H",
    kind="bound",
    cost="13-31 products for k=5, fewer when tracked",
)
def hessian_eigenvalues(at: Snapshot, *, k: int = 5, tol: float = 1e-2) -> Measurement:
    """The k largest eigenvalues of the Hessian, descending, each with its residual as `error` (see `sharpness`).

    The eigenvectors stay on the snapshot: ``curvlab.diagnostics.spectrum.top_eigenpairs(at, k, tol).vectors``.

    Raises:
        ValueError: k outside 1..P.
    """
    pairs = top_eigenpairs(at, k, tol)
    found = Measurement(
        pairs.values.cpu().numpy(),
        pairs.residuals.cpu().numpy(),
        "bound",
        floor=np.full(k, pairs.floor),
        axis=("index", tuple(range(1, k + 1))),
    )
    return _with_remarks(found, pairs)


@diagnostic("|cos(q_1, ∇L)|", formula="|q_1ᵀ∇L| / ‖∇L‖", kind="bound", cost="products for 2 eigenpairs")
def gradient_alignment(at: Snapshot, *, tol: float = 1e-3) -> Measurement:
    """Cosine between the gradient and the top eigenvector, without sign, which an eigenvector does not have.

    `error` bounds what the error of the eigenvector does to it: √2 r/gap (Davis and Kahan), with the gap to the second
    Ritz value; where the two largest eigenvalues are too close to be told apart it reaches 1.

    Source: Lee 2022, Prop. 4.1 and observation (iii) of sec. 4.2.
    """
    if at.objective.num_params < 2:
        return missing("needs two parameters: with one the cosine is 1 by definition")
    pairs, g = top_eigenpairs(at, 2, tol), at.gradient
    cosine = abs(float(pairs.vectors[:, 0].double() @ g.double())) / float(g.double().norm())
    error = min(1.0, 2**0.5 * _subspace_error(pairs, 1))
    return _finite(Measurement(cosine, error, "bound", floor=16 * torch.finfo(at.objective.dtype).eps))


@diagnostic(
    "‖Q_kᵀ∇L‖²/‖∇L‖²",
    formula="share of the gradient in the span of the k top eigenvectors",
    kind="bound",
    cost="products for k+1 eigenpairs",
)
def gradient_top_share(at: Snapshot, *, k: int = 5, tol: float = 1e-3) -> Measurement:
    """Share of the squared gradient norm in the top-k eigenspace of the Hessian, 0 to 1.

    `error` bounds what the error of the subspace does to it: ‖R‖/gap, with the gap between λ_k and λ_{k+1}.

    Raises:
        ValueError: k + 1 above P.

    Source: Gur-Ari et al. 2018 (arXiv 1812.04754); Lee 2022, sec. 5.1.
    """
    pairs, g = top_eigenpairs(at, k + 1, tol), at.gradient.double()
    share = float((pairs.vectors[:, :k].double().T @ g).square().sum() / g.square().sum())
    error = min(1.0, _subspace_error(pairs, k))
    return _finite(Measurement(share, error, "bound", floor=16 * torch.finfo(at.objective.dtype).eps))


def top_eigenpairs(at: Snapshot, k: int, tol: float) -> Eigenpairs:
    """The k top eigenpairs of the Hessian at a snapshot, warm-started from the previous snapshot of the run."""
    return at.shared(("eigenpairs", k, tol), lambda: _solve(at, k, tol))


def _solve(at: Snapshot, k: int, tol: float) -> Eigenpairs:
    key = ("eigenpairs", k, tol)
    carry = {} if at.carry is None else at.carry
    last, count = carry.get(key, (None, 0))
    start, fresh = None, 1
    if last is not None:
        start = torch.cat([last, at.gradient[:, None]], 1)
        fresh = 1 if count % RANDOM_EVERY == 0 else 0
    pairs = eigsh(
        at.hessian,
        k,
        tol=tol,
        start=start,
        random_columns=fresh,
        generator=at.generator(f"eigenpairs {k} {tol}"),
    )
    carry[key] = (pairs.vectors, count + 1)
    return pairs


def _with_remarks(found: Measurement, pairs: Eigenpairs) -> Measurement:
    remarks = []
    low, high = pairs.extremes
    if -low > high:
        remarks.append(f"the smallest eigenvalue is at most {low:.4g} and larger in magnitude")
    if not pairs.converged:
        remarks.append(f"not converged after {pairs.matvecs} products")
    note = "; ".join(remarks) or None
    return Measurement(found.value, found.error, found.kind, floor=found.floor, axis=found.axis, note=note)


def _subspace_error(pairs: Eigenpairs, k: int) -> float:
    """Bound on the sine of the angle to the true top-k eigenspace, by the gap below it."""
    gap = float(pairs.values[k - 1] - pairs.values[k] - pairs.residuals[k])
    residual = float(pairs.residuals[:k].norm()) + pairs.floor
    return residual / gap if gap > 0 else 1.0


def _finite(found: Measurement) -> Measurement:
    if found.value != found.value:
        return missing("the gradient is zero, so it has no direction")
    return found
