"""Problems that can be solved on paper: the diagonal linear network, and a quadratic with a planted spectrum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .initialization import check_widths


def diagonal_linear(
    d: int = 30, outputs: int = 1, *, scale: float = 0.1 * 2**0.5, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The diagonal linear network f(x) = ⟨u ∘ v, x⟩, (B, d) -> (B, 1), that starts at u = scale, v = 0, so at f = 0.

    Several outputs have a u and a v each, (d, outputs) in all.

    In p = (u + v)/√2 and q = (u - v)/√2 it is ⟨p² - q², x⟩/2 with p = q = scale/√2, 0.1 by default. Small batches find
    sparser u ∘ v than large ones: with `sparse_regression`, the smallest problem on which generalization differs, and
    with `sparse_classification`, on which accuracy does.

    Args:
        d: number of inputs.
        outputs: number of outputs.
        scale: of u at the start.
        seed: has no effect, nothing is drawn; every model takes one.
        dtype: of the parameters.

    Raises:
        ValueError: ``d`` or ``outputs`` is not positive.

    Source: Woodworth et al. 2020 (arXiv 2002.09277), sec. 4; HaoChen et al. 2021 (arXiv 2006.08680).

    >>> diagonal_linear(3)(torch.ones(2, 3)).tolist()
    [[0.0], [0.0]]
    """
    check_widths((d, outputs), at_least=2)
    return DiagonalLinear((d, outputs) if outputs > 1 else (d,), scale).to(dtype)


class DiagonalLinear(nn.Module):
    """See `diagonal_linear`."""

    def __init__(self, shape: tuple[int, ...], scale: float) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.full(shape, scale, dtype=torch.float64))
        self.v = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.u * self.v).view(len(self.u), -1)


class Problem(NamedTuple):
    """The arguments of an `Objective`, in its order."""

    model: nn.Module
    loss: str | Callable[[Tensor, Tensor], Tensor]
    data: tuple[Tensor, Tensor]


def quadratic(
    spectrum: Sequence[float] = (5.0, 2.0, 1.0, 0.5, 0.1),
    *,
    n: int = 32,
    noise: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """A quadratic loss with a planted spectrum and gradient noise, as the arguments of an `Objective`:

        ℓ_i(w) = ½ (w - c_i)ᵀ H (w - c_i),   H = Q diag(spectrum) Qᵀ,   Σ c_i = 0,

    so L(w) = ½ wᵀHw + constant, ∇L = Hw, example gradients are H(w - c_i), and S_1 - S_n = H (Σ c_i c_iᵀ/n) H is the same
    everywhere. Descent with a rate lr multiplies q_iᵀ∇L by 1 - lr·λ_i in each step: Proposition 4.1 of Lee, in which
    λ_1 > 2/lr > λ_i > 0 for the others, follows, since q_1ᵀ∇L grows and every other component shrinks.

    Outputs are z = diag(√|λ|) Qᵀ(w - c_i), and the loss is ``"squared_error"`` with targets 0, so the GGN and the Fisher
    matrix are H too. With a negative λ it is ½ Σ sign(λ_k) z_k², which stands for no likelihood.

    Args:
        spectrum: eigenvalues of H, in any order; the columns of ``model.Q`` are their eigenvectors.
        n: number of examples.
        noise: standard deviation of the normal entries of c_i, before their mean is taken off.
        seed: draws Q (Haar), the c_i, and the start, w ~ N(0, 1).
        dtype: of everything, drawn in float64 and then converted.

    Returns:
        (model, loss, data): the model holds w, Q and H (as ``model.H``); the data are (c, targets), (n, P) each.

    Raises:
        ValueError: an empty spectrum or one that is not finite, ``n`` is not positive, or ``noise`` is negative.

    Source: Lee 2022, Proposition 4.1.

    >>> model, loss, data = quadratic([3.0, 1.0])
    >>> torch.linalg.eigvalsh(model.H)
    tensor([1.0000, 3.0000], dtype=torch.float64)
    """
    eigenvalues = np.asarray(spectrum, dtype=np.float64)
    if eigenvalues.ndim != 1 or not len(eigenvalues) or not np.isfinite(eigenvalues).all():
        raise ValueError(
            f"spectrum is {spectrum}, expected one or more finite eigenvalues. Pass for example [5, 2, 1]."
        )
    if n < 1 or not 0.0 <= noise < float("inf"):
        raise ValueError(
            f"n is {n} and noise is {noise}, expected at least 1 example and a finite standard deviation. "
            "Pass noise=0 for equal examples."
        )
    rng = np.random.default_rng(seed)
    q, r = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))
    draws = noise * rng.standard_normal((n, len(eigenvalues)))
    c = torch.as_tensor(draws - draws.mean(0), dtype=dtype)
    # The signs of R's diagonal make Q uniform over the orthogonal group.
    model = Quadratic(eigenvalues, q * np.sign(np.diag(r)), rng.standard_normal(len(eigenvalues))).to(dtype)
    if (eigenvalues >= 0).all():
        return Problem(model, "squared_error", (c, torch.zeros_like(c)))
    return Problem(model, signed_squares, (c, torch.as_tensor(np.sign(eigenvalues), dtype=dtype).expand_as(c).clone()))


def signed_squares(outputs: Tensor, signs: Tensor) -> Tensor:
    """½ Σ_k sign_k z_k², (B,), for outputs and signs (B, P)."""
    return 0.5 * (signs * outputs.square()).sum(1)


class Quadratic(nn.Module):
    """z = diag(√|λ|) Qᵀ(w - c), (B, P) -> (B, P); see `quadratic`."""

    eigenvalues: Tensor
    Q: Tensor

    def __init__(self, eigenvalues: np.ndarray, Q: np.ndarray, start: np.ndarray) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(start))
        self.register_buffer("eigenvalues", torch.as_tensor(eigenvalues))
        self.register_buffer("Q", torch.as_tensor(Q))

    @property
    def H(self) -> Tensor:
        """The planted Hessian, (P, P)."""
        return self.Q * self.eigenvalues @ self.Q.T

    def forward(self, c: Tensor) -> Tensor:
        return (self.w - c) @ self.Q * self.eigenvalues.abs().sqrt()
