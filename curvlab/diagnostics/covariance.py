"""The covariance C_1 of per-example gradients beyond its trace: eigenvalues, rank, and how it lies to the Hessian."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..linalg import Eigenpairs, LinearOperator, trace
from ..measurement import Measurement, missing
from ..operators import gradient_covariance
from ..snapshot import Snapshot
from .noise import mean_squared_norm, squared_norm
from .registry import diagnostic
from .tracking import remarked, subspace_error, top_eigenpairs, tracked_eigenpairs

GRAM_LIMIT = 2048  # examples up to which the N x N Gram matrix is formed


@diagnostic(
    "λ_i(C_1)", formula="k largest eigenvalues of the covariance of per-example gradients", kind="bound",
    cost="the N x N Gram matrix for N up to 2048, exact; otherwise 2 gradients a product",
)  # fmt: skip
def gradient_covariance_eigenvalues(at: Snapshot, *, k: int = 5, tol: float = 1e-2) -> Measurement:
    """The k largest eigenvalues of C_1, descending, over an axis "index".

    Estimator: for N up to 2048 the centred Gram matrix g_i·g_j/N, whose non-zero eigenvalues are those of C_1.
    Otherwise Lanczos on products with C_1, tracked from step to step.

    Error: exact for N up to 2048; otherwise the residual, which bounds the distance to *some* eigenvalue of C_1.

    Fails: a single example with a huge gradient is an eigenvector of its own: see `gradient_variance_top_share`.
    Products with C_1 are not counted in `matvecs`. Refused under batch statistics.

    Raises:
        ValueError: k outside 1..min(N, P).
    """
    L = at.objective
    if not 1 <= k <= min(L.size, L.num_params):
        raise ValueError(f"k is {k}; expected 1 to {min(L.size, L.num_params)}, the largest rank that C_1 can have")
    axis = ("index", tuple(range(1, k + 1)))
    if L.size <= GRAM_LIMIT:
        values, scale = _gram_eigenvalues(at)
        floor = np.full(k, 16 * torch.finfo(L.dtype).eps * scale)
        return Measurement(values[:k].cpu().numpy(), np.zeros(k), "exact", np.full(k, np.inf), floor, axis=axis)
    pairs = _covariance_eigenpairs(at, k, tol)
    found, errors = pairs.values.cpu().numpy(), pairs.residuals.cpu().numpy()
    return remarked(Measurement(found, errors, "bound", floor=np.full(k, pairs.floor), axis=axis), pairs)


@diagnostic(
    "tr(C_1)²/tr(C_1²)", formula="effective rank of the covariance of per-example gradients", kind="sem",
    cost="the Gram matrix for N up to 2048, exact; otherwise 16 products with C_1",
)  # fmt: skip
def gradient_covariance_effective_rank(at: Snapshot, *, probes: int = 4) -> Measurement:
    """Participation ratio of the eigenvalues of C_1, from 1 to min(N - 1, P): how many directions gradient noise has.

    Estimator: exact from the Gram matrix for N up to 2048. Otherwise tr(C_1) exactly and tr(C_1²) by XTrace, four
    products with C_1 a probe, which the few large eigenvalues cost no variance.

    Error: for N above 2048 that of the denominator, to first order.

    Fails: it is the square of a mean over the mean of squares, so one example with a huge gradient pulls it to 1. No
    value where all gradients are equal. Refused under batch statistics.

    Args:
        probes: of XTrace, at least 2; unused for N up to 2048.

    Raises:
        ValueError: fewer than 2 probes.
    """
    L = at.objective
    if L.size <= GRAM_LIMIT:
        values, scale = _gram_eigenvalues(at)
        total, squares = float(values.sum()), float(values.square().sum())
        if squares == 0.0:
            return missing("all per-example gradients are equal")
        return Measurement(total**2 / squares, floor=64 * torch.finfo(L.dtype).eps * total**2 * scale / squares / total)
    C = gradient_covariance(L, at.w, batch_size=1, examples=at.examples)
    square = LinearOperator(lambda V: C @ (C @ V), C.size, C.dtype, C.device, "the squared covariance")
    found = trace(square, num_matvecs=2 * probes, generator=at.generator("effective_rank"))
    mean, total = float(found.value), mean_squared_norm(at) - squared_norm(at)  # type: ignore[arg-type]
    value = total**2 / mean
    floor = value * (float(found.floor) / mean + 64 * torch.finfo(L.dtype).eps)
    return Measurement(value, value * float(found.error) / mean, found.kind, found.df, floor)


@diagnostic(
    "‖Q_HᵀQ_C‖_F²/k", formula="overlap of the k top eigenvectors of H with those of C_1", kind="bound",
    cost="products for k+1 eigenpairs of both",
)  # fmt: skip
def covariance_overlap(at: Snapshot, *, k: int = 5, tol: float = 1e-3) -> Measurement:
    """How far the top eigenspaces of the Hessian and of the gradient covariance are the same, 0 to 1.

    Estimator: tracked eigenvectors of both, k + 1 each; ‖Q_HᵀQ_C‖_F²/k. Two random subspaces have k/P.

    Error: twice the sum of the bounds on the sines of the angles between computed and true eigenspaces (Davis and
    Kahan).

    Fails: the bound reaches 1 where either matrix has no gap after its k-th eigenvalue, although the overlap may be
    right: choose k at a gap. A tight `tol` makes every step of a run as dear as a point. Refused under batch
    statistics.

    Raises:
        ValueError: k + 1 above min(N, P).

    Source: Lee 2022, sec. 5.1.
    """
    L = at.objective
    if not 1 <= k < min(L.size, L.num_params):
        raise ValueError(f"k is {k}; expected 1 to {min(L.size, L.num_params) - 1}")
    H, C = top_eigenpairs(at, k + 1, tol), _covariance_eigenpairs(at, k + 1, tol)
    overlap = float((H.vectors[:, :k].double().T @ C.vectors[:, :k].double()).square().sum()) / k
    error = min(1.0, 2 * (subspace_error(H, k) + subspace_error(C, k)))
    return Measurement(overlap, error, "bound", floor=16 * torch.finfo(L.dtype).eps)


def _covariance_eigenpairs(at: Snapshot, k: int, tol: float) -> Eigenpairs:
    C = gradient_covariance(at.objective, at.w, batch_size=1, examples=at.examples)
    return tracked_eigenpairs(at, "covariance", C, k, tol)


def _gram_eigenvalues(at: Snapshot) -> tuple[Tensor, float]:
    """Eigenvalues of the centred Gram matrix over N, descending, and the scale of its rounding."""

    def compute() -> tuple[Tensor, float]:
        K = at.examples.gram().double() / at.objective.size
        scale = float(K.diagonal().sum())
        K = K - K.mean(0, keepdim=True)
        K = K - K.mean(1, keepdim=True)
        return torch.linalg.eigvalsh((K + K.T) / 2).flip(0).clamp(min=0), scale

    return at.shared("gram_eigenvalues", compute)
