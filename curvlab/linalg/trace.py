"""The trace of a matrix from a few products, with an honest error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..measurement import Measurement
from .operator import LinearOperator, dense
from .probes import normal, rademacher
from .rows import Rows, rows_of


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

    The error is one standard error, with (number of probes - 1) degrees of freedom for XTrace and at least as many for
    Hutchinson (`quadratic_mean`), plus a rounding floor, so that an exactly low-rank matrix does not report zero.

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
        _require_finite(diagonal)
        floor = 8 * torch.finfo(A.dtype).eps * float(diagonal.abs().sum())
        return Measurement(float(diagonal.sum()), floor=floor, matvecs=P)
    per_probe = 2 if method == "xtrace" else 1
    if num_matvecs < 2 * per_probe:
        raise ValueError(
            f"num_matvecs is {num_matvecs}; {method} takes {per_probe} a probe and an honest error needs "
            f"at least 2 probes: pass num_matvecs={2 * per_probe} or more (16 probes are a good default)"
        )
    probes = num_matvecs // per_probe
    found = (_xtrace if method == "xtrace" else _hutchinson)(A, probes, generator)
    return replace(found, matvecs=probes * per_probe)


def _require_finite(Y: Tensor) -> None:
    if not bool(torch.isfinite(Y).all()):
        raise FloatingPointError("a product is not finite; the parameters have diverged. Measure at other parameters")


def sample_mean(samples: Sequence[float], *, offset: float = 0.0, floor: float = 0.0, matvecs: int = 0) -> Measurement:
    """`offset` plus the mean of independent samples, with its standard error.

    The samples are quadratic forms of random vectors, with tails heavier than a normal's, so the variance of n of them is
    worth less than n - 1 degrees of freedom: (n - 1)/(1 + κ/2) for an excess kurtosis κ. Three quarters of n - 1 are
    credited (κ = 2/3), which matters for few samples only.
    """
    x = torch.as_tensor(samples, dtype=torch.float64)
    n = len(x)
    error = float(x.std(correction=1)) / math.sqrt(n) if n > 1 else math.inf
    return Measurement(offset + float(x.mean()), error, "sem", df=credited(n - 1), floor=floor, matvecs=matvecs)


def credited(degrees: float) -> float:
    """Degrees of freedom of a variance of heavy-tailed samples; see `sample_mean`."""
    return max(1.0, 0.75 * degrees)


def quadratic_mean(
    Z: Tensor, Y: Tensor, *, offset: float = 0.0, floor: float = 0.0, block: bool = False, rows: Rows | None = None
) -> Measurement:
    """`offset` plus the mean of zᵀMz over random signs Z (P, n), from the images Y = M Z, with its standard error.

    Samples of a quadratic form are skewed (χ² where one eigenvalue dominates), so that their mean and their sample
    variance rise and fall together and Student's interval covers 82-90%. The images hold more than the samples: z_p y_p
    has mean M_pp and variance Σ_{q≠p} M_pq², and Var(zᵀMz) = 2 Σ_{q≠p} M_pq², so twice the sum over p of the sample
    variances of z_p y_p is unbiased and far less scattered. One probe is worth as many degrees of freedom as M has
    eigenvalues that matter, (Σμ²)²/Σμ⁴, which is estimated by 1/mean cos²(y_j, y_k).

    With `block`, Z and Y are some of the rows only, and the result is the trace of that diagonal block B of M. There
    Var = Σ_p Var(z_p y_p) + ‖B‖_F² - Σ B_pp², and ‖B‖_F² is the mean of (z_jᵀy_k)(z_kᵀy_j) over pairs of probes, each
    product over the rows of the block; the difference lies between zero and the first sum. `rows` says which rows of Z and Y
    are here, where other processes hold the rest.
    """
    rows = rows or Rows(len(Z))
    Z, Y = Z.double(), Y.double()
    terms, n = Z * Y, Y.shape[1]
    variance = 2 * float(rows.sum(terms.var(1, correction=1).sum()))
    if block:
        each = variance / 2
        crossed = (Z.T @ Y) * (Y.T @ Z)
        squares = float(crossed.fill_diagonal_(0).sum()) / (n * (n - 1))
        diagonal = float(terms.mean(1).square().sum()) - each / n
        variance = each + min(max(squares - diagonal, 0.0), each)
    U = Y / rows.norms(Y).clamp_min(torch.finfo(torch.float64).tiny)
    overlap = float(rows.sum(U.T @ U).fill_diagonal_(0).square().sum()) / (n * (n - 1))
    df = (n - 1) / min(1.0, max(overlap, 1e-4))
    return Measurement(offset + float(rows.sum(terms.sum(0)).mean()), math.sqrt(variance / n), "sem", df=df, floor=floor)


def _hutchinson(A: LinearOperator | Tensor, probes: int, generator: torch.Generator | None) -> Measurement:
    rows = rows_of(A)
    Z = rows.drawn(lambda n: rademacher((n, probes), A.device, A.dtype, generator=generator))
    AZ = A @ Z
    _require_finite(AZ)
    rounding = float(rows.norms(AZ).max()) * math.sqrt(A.shape[0])
    return quadratic_mean(Z, AZ, floor=8 * torch.finfo(A.dtype).eps * rounding, rows=rows)


def _xtrace(A: LinearOperator | Tensor, m: int, generator: torch.Generator | None) -> Measurement:
    """Leave-one-out estimates: for each i, Q_i spans the image of all probes but the i-th.

    With Y = A Ω = Q R, the space of Q_i is that of Q without the directions Q S_i, where S_i is orthogonal to every
    column of R but the i-th. With x_i = (I - S_i S_iᵀ) Qᵀ ω_i the coordinates of the projection of ω_i,

        t_i = tr(QᵀAQ) - tr(S_iᵀ QᵀAQ S_i) + c_i (ω_i - Q x_i)ᵀ A (ω_i - Q x_i),   c_i = (P - m + 1) / (P - ‖x_i‖²).

    The t_i share probes and are correlated, which the sample standard error of the source leaves out: it is 0.7-0.85 of
    the true one. Let t_ij be t_i made without probe j, and d_ij = t_i - t_ij. Given the other probes, t_ij and t_ji are
    independent with mean tr(A), and d_ji has mean zero given all probes but the j-th; hence Cov(t_i, t_j) = E[d_ij d_ji],
    exactly, and

        (Σ_i (t_i - mean)² + Σ_{i≠j} d_ij d_ji) / (m (m - 1))

    is an unbiased estimate of the variance of the mean. A negative second sum, which is chance, is left out.
    """
    P = A.shape[0]
    rows, like = rows_of(A), torch.empty(0, dtype=A.dtype, device=A.device)
    Omega = rows.drawn(lambda n: normal((n, m), like, generator=generator))
    Omega = Omega * (math.sqrt(P) / rows.norms(Omega)).to(like)
    Y = A @ Omega
    _require_finite(Y)
    Q, R = rows.qr(Y)
    AQ = A @ Q
    _require_finite(AQ)
    H, W, R = rows.sum(Q.T @ AQ).double(), rows.sum(Q.T @ Omega).double(), R.double()

    def without(index: Tensor) -> tuple[Tensor, Tensor]:
        """t_i for every i in a row of `index` (B, q), made without the probes of that row; and the scale of its rounding."""
        B, q = index.shape
        keep = torch.ones(B, m, dtype=torch.bool, device=R.device).scatter_(1, index, False)
        others = R.T[keep.nonzero()[:, 1]].view(B, m - q, m).mT
        S = torch.linalg.qr(others, mode="complete").Q[:, :, m - q :]
        w, r = W.T[index], R.T[index]
        x = w - (w @ S) @ S.mT
        residual = (w * r).sum(2) - 2 * (x * r).sum(2) + (x * (x @ H)).sum(2)
        scale = (P - m + q) / (P - (x * x).sum(2))
        low_rank = H.trace() - (S * (H @ S)).sum((1, 2))
        return low_rank[:, None] + scale * residual, scale * (w * r).sum(2).abs()

    t, sizes = (found[:, 0] for found in without(torch.arange(m, device=R.device)[:, None]))
    pairs = torch.combinations(torch.arange(m, device=R.device))
    d = t[pairs] - without(pairs)[0]
    squares = float((t - t.mean()).square().sum()) + max(0.0, 2 * float(d.prod(1).sum()))
    size = float(torch.linalg.eigvalsh((H + H.T) / 2).abs().sum() + sizes.max())
    floor = 8 * torch.finfo(A.dtype).eps * size
    return Measurement(float(t.mean()), math.sqrt(squares / (m * (m - 1))), "sem", df=m - 1, floor=floor)
