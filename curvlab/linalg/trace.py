"""The trace of a matrix from a few products, with an honest error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..measurement import Measurement
from .operator import LinearOperator, dense
from .probes import normal, rademacher


def trace(
    A: LinearOperator | Tensor,
    *,
    method: Literal["xtrace", "hutchinson", "exact"] = "xtrace",
    num_matvecs: int = 32,
    generator: torch.Generator | None = None,
) -> Measurement:
    """tr(A) of a symmetric matrix.

    - ``"hutchinson"``: mean of zᵀAz over random signs z, one product each. Variance 2(‖A‖_F² - Σ A_ii²).
    - ``"xtrace"``: every probe also serves the low-rank approximation of all the others, so that the few large
      eigenvalues cost no variance; two products a probe. Much better than Hutchinson where the spectrum decays, never
      much worse.
    - ``"exact"``: all P products; also what happens when `num_matvecs` reaches P.

    The error is one standard error with (number of probes - 1) degrees of freedom, plus a rounding floor, so an
    exactly low-rank matrix does not report an error of zero.

    Raises:
        ValueError: an unknown method, or fewer than 2 probes (4 products for xtrace): one probe has no honest error.
        FloatingPointError: a product is not finite.

    Source: Hutchinson 1989; Epperly, Tropp and Webber 2024 (arXiv 2301.07825), with vectors uniform on the sphere and
    their normalization (sec. 2.2 there).

    Example:
        >>> import torch
        >>> trace(torch.diag(torch.arange(5.0, dtype=torch.float64)), num_matvecs=8).value
        10.0
    """
    P = A.shape[0]
    if method not in ("xtrace", "hutchinson", "exact"):
        raise ValueError(f"method is {method!r}; expected 'xtrace', 'hutchinson' or 'exact'")
    if method == "exact" or num_matvecs >= P:
        diagonal = dense(A).diagonal().double()
        floor = 8 * torch.finfo(A.dtype).eps * float(diagonal.abs().sum())
        return Measurement(float(diagonal.sum()), floor=floor, matvecs=P)
    per_probe = 2 if method == "xtrace" else 1
    if num_matvecs < 2 * per_probe:
        raise ValueError(
            f"num_matvecs is {num_matvecs}; {method} takes {per_probe} a probe and an honest error needs "
            f"at least 2 probes: pass num_matvecs={2 * per_probe} or more (16 probes are a good default)"
        )
    probes = num_matvecs // per_probe
    samples, floor = (_xtrace if method == "xtrace" else _hutchinson)(A, probes, generator)
    if not math.isfinite(sum(samples)):
        raise FloatingPointError("a product is not finite; the parameters have diverged. Measure at other parameters")
    return sample_mean(samples, floor=floor, matvecs=probes * per_probe)


def sample_mean(samples: Sequence[float], *, offset: float = 0.0, floor: float = 0.0, matvecs: int = 0) -> Measurement:
    """`offset` plus the mean of independent samples, with its standard error and n - 1 degrees of freedom."""
    x = torch.as_tensor(samples, dtype=torch.float64)
    n = len(x)
    error = float(x.std(correction=1)) / math.sqrt(n) if n > 1 else math.inf
    return Measurement(offset + float(x.mean()), error, "sem", df=max(n - 1, 1), floor=floor, matvecs=matvecs)


def _hutchinson(
    A: LinearOperator | Tensor, probes: int, generator: torch.Generator | None
) -> tuple[list[float], float]:
    Z = rademacher((A.shape[0], probes), A.device, A.dtype, generator=generator)
    AZ = A @ Z
    samples = (Z * AZ).sum(0, dtype=torch.float64)
    rounding = float(torch.linalg.vector_norm(AZ, dim=0).max()) * math.sqrt(A.shape[0])
    return samples.tolist(), 8 * torch.finfo(A.dtype).eps * rounding


def _xtrace(A: LinearOperator | Tensor, m: int, generator: torch.Generator | None) -> tuple[list[float], float]:
    """Leave-one-out estimates: for each i, Q_i spans the image of all probes but the i-th.

    With Y = A Ω = Q R, the space of Q_i is that of Q without the direction Q s_i, where s_i is orthogonal to every
    column of R but the i-th. With x_i = (I - s_i s_iᵀ) Qᵀ ω_i the coordinates of the projection of ω_i,

        t_i = tr(QᵀAQ) - s_iᵀ QᵀAQ s_i + c_i (ω_i - Q x_i)ᵀ A (ω_i - Q x_i),   c_i = (P - m + 1) / (P - ‖x_i‖²).
    """
    P = A.shape[0]
    Omega = normal((P, m), torch.empty(0, dtype=A.dtype, device=A.device), generator=generator)
    Omega = Omega * (math.sqrt(P) / torch.linalg.vector_norm(Omega, dim=0))
    Q, R = torch.linalg.qr(A @ Omega)
    AQ = A @ Q
    H, W, R = (Q.T @ AQ).double(), (Q.T @ Omega).double(), R.double()
    others = torch.stack([torch.cat([R[:, :i], R[:, i + 1 :]], 1) for i in range(m)])
    S = torch.linalg.svd(others, full_matrices=True).U[:, :, -1].T  # column i is s_i
    X = W - S * (S * W).sum(0)
    residual = (W * R).sum(0) - 2 * (X * R).sum(0) + (X * (H @ X)).sum(0)
    scale = (P - m + 1) / (P - (X * X).sum(0))
    samples = H.trace() - (S * (H @ S)).sum(0) + scale * residual
    eps = torch.finfo(A.dtype).eps
    size = float(torch.linalg.eigvalsh((H + H.T) / 2).abs().sum() + (scale * (W * R).sum(0).abs()).max())
    return samples.tolist(), 8 * eps * size
