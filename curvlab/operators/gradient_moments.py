"""Second moment S_b and covariance C_b of the mini-batch gradient."""

from __future__ import annotations

from torch import Tensor

from ..linalg import LinearOperator
from ..objective import Objective
from ..per_example import ExampleGradients


def noise_share(n: int, batch_size: int, replacement: bool = False) -> float:
    """γ/b, the share of C_1 in the covariance of a batch gradient: C_b = (γ/b) C_1 (Lee eq. 1).

    Derivation. Let z_i count how often example i is in the batch, so g_b - g = (1/b) Σ z_i (g_i - g). Then
    C_b = (1/b²) Σ_ij Cov(z_i, z_j) (g_i - g)(g_j - g)ᵀ. With replacement z is multinomial with Var z_i = (b/n)(1 -
    1/n) and Cov(z_i, z_j) = -b/n²; without, Var z_i = (b/n)(1 - b/n) and Cov(z_i, z_j) = -(b/n)(1 - b/n)/(n-1). Because
    Σ_i (g_i - g) = 0, the terms with i ≠ j sum to minus those with i = j, and C_b = (Var z_i - Cov(z_i, z_j)) n/b² C_1,
    which is C_1/b with replacement and (n-b)/(n-1) C_1/b without.

    Limits: b = n without replacement and n = 1 give 0.

    Raises:
        ValueError: b below 1, or above n without replacement.
    """
    if batch_size < 1 or (batch_size > n and not replacement):
        raise ValueError(
            f"batch_size is {batch_size}; expected 1 to {n} (the number of examples) for sampling without "
            "replacement; pass replacement=True for larger batches"
        )
    if n == 1:
        return 0.0
    gamma = 1.0 if replacement else (n - batch_size) / (n - 1)
    return gamma / batch_size


def gradient_second_moment(
    L: Objective,
    w: Tensor | None = None,
    *,
    batch_size: int,
    replacement: bool = False,
    examples: ExampleGradients | None = None,
) -> LinearOperator:
    """S_b = E[g_b g_bᵀ] = (γ/b) S_1 + (1 - γ/b) g gᵀ as a `LinearOperator`, (P, P).

    Exact for every b from 1 to N: the expectation over batches is taken in closed form, nothing is sampled. S_1 is the
    mean of g_i g_iᵀ, also called the empirical Fisher. A product costs about one gradient.

    Args:
        batch_size: b. With ``batch_size=N`` and no replacement, S_N = g gᵀ.
        replacement: whether batches are drawn with replacement.
        examples: captured per-example gradients at w, to share.

    Raises:
        ValueError: b outside 1..N without replacement.

    Source: Lee 2022, sec. 2 and eq. 1.
    """
    share = noise_share(L.size, batch_size, replacement)
    examples = examples or ExampleGradients(L, L.point(w))
    return _moment(L, examples, share, 1 - share, f"S_{batch_size}")


def gradient_covariance(
    L: Objective,
    w: Tensor | None = None,
    *,
    batch_size: int,
    replacement: bool = False,
    examples: ExampleGradients | None = None,
) -> LinearOperator:
    """C_b = Var[g_b] = (γ/b)(S_1 - g gᵀ) as a `LinearOperator`, (P, P); arguments as `gradient_second_moment`.

    Source: Lee 2022, eq. 1; C_1 is Smith et al. 2021's covariance, whose trace is Γ (eq. 22).
    """
    share = noise_share(L.size, batch_size, replacement)
    examples = examples or ExampleGradients(L, L.point(w))
    return _moment(L, examples, share, -share, f"C_{batch_size}")


def _moment(L: Objective, examples: ExampleGradients, first: float, mean: float, name: str) -> LinearOperator:
    """first · S_1 + mean · g gᵀ. With x = (g_i·V)_i centred, both are one combination of example gradients:
    S_1 V = (1/n) Σ g_i x_i and g gᵀ V = (1/n) Σ g_i x̄, which keeps C_b positive semidefinite under rounding."""

    def matmat(V: Tensor) -> Tensor:
        x = examples.dot(V)
        average = x.mean(0, keepdim=True)
        coefficients = first * (x - average) + (first + mean) * average
        return examples.combine(coefficients / L.size)

    return LinearOperator(matmat, L.num_params, L.dtype, L.device, name=name)
