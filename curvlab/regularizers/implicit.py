"""The implicit regularizer of SGD, and its two parts."""

from __future__ import annotations

from torch import Tensor

from .micro_batch import MicroBatch
from .registry import regularizer
from .vectors import inner, squared_norm

SMITH = "Smith et al. 2021 (arXiv 2101.12176)"


@regularizer("C_reg", formula="(1/4) mean_k ‖∇Ĉ_k‖²", source=f"{SMITH}, eq. 1, 20")
def implicit_regularizer(m: MicroBatch) -> Tensor:
    """C_reg = (1/4) mean_k ‖∇Ĉ_k‖² over the mini-batches k of a data set: here, over the micro-batches of `batch`.

    The mean path of SGD with a small learning rate ε, over epochs that visit all mini-batches in random order, follows
    gradient flow on C + ε C_reg. The modified loss C_mod = C + λ C_reg is that of strength λ. A quarter of
    `gradient_norm_penalty`; the sum of `implicit_regularizer_mean` and `implicit_regularizer_variance`. For n-step SGD the
    strength is ε/n (eq. 39).

    Source: Smith et al. 2021 (arXiv 2101.12176), eq. 1, 20 and sec. 3.
    """
    return m.squared_gradient_norm / 4


@regularizer("C_reg, mean", formula="(1/4) ‖∇C‖²", source=f"{SMITH}, eq. 2, 22")
def implicit_regularizer_mean(m: MicroBatch) -> Tensor:
    """(1/4) ‖∇C‖², the part of C_reg that full-batch gradient descent has too; ∇C = mean_k ∇Ĉ_k over the whole `batch`.

    Exact with the memory of one micro-batch: ∇C comes from a pass of its own, one more gradient.

    Source: Smith et al. 2021 (arXiv 2101.12176), eq. 2 and 22.
    """
    # Linear in the micro-batch's gradient, so that the mean over micro-batches has the value and the gradient of ‖∇C‖²/4.
    return inner(m.gradient, m.batch_gradient) / 2 - squared_norm(m.batch_gradient) / 4


@regularizer("C_reg, variance", formula="(1/4) mean_k ‖∇Ĉ_k - ∇C‖²", source=f"{SMITH}, eq. 2, 22")
def implicit_regularizer_variance(m: MicroBatch) -> Tensor:
    """(1/4) mean_k ‖∇Ĉ_k - ∇C‖², the part of C_reg that comes from the spread of mini-batch gradients.

    For mini-batches of B examples drawn from N its expectation is (N-B)/(N-1) Γ/(4B), Γ the trace of the covariance of
    per-example gradients (eq. 22; `gradient_variance`). Exact with the memory of one micro-batch: ∇C comes from a pass of
    its own, one more gradient.

    Source: Smith et al. 2021 (arXiv 2101.12176), eq. 2 and 22.
    """
    # ∇C may be a constant here: the derivative through it is the mean of ∇Ĉ_k - ∇C, which is zero.
    return squared_norm([g - mean for g, mean in zip(m.gradient, m.batch_gradient, strict=True)]) / 4
