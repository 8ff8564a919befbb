"""Penalties on the gradient norm of micro-batches, of one of them, and its finite-difference form."""

from __future__ import annotations

from torch import Tensor

from .micro_batch import MicroBatch
from .registry import regularizer
from .vectors import squared_norm, with_gradient


@regularizer("GN", formula="mean_M ‖∇L_M‖²", source="Novack et al. 2022 (arXiv 2211.15853), eq. 1")
def gradient_norm_penalty(m: MicroBatch) -> Tensor:
    """GN: the squared gradient norm, averaged over micro-batches, Σ_M (|M|/|B|) ‖∇L_M‖².

    The gradient is Σ_M (|M|/|B|) 2 H_M ∇L_M, exactly, by double backward. With |M| = |B| it is ‖∇L_B‖². There is no factor
    1/2 or 1/4: `implicit_regularizer` is a quarter of it.

    Source: Novack et al. 2022 (arXiv 2211.15853), eq. 1; Barrett and Dherin 2020 (arXiv 2009.11162).

    Example:
        >>> import torch, curvlab as cl
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
        >>> L = cl.Objective(model, "cross_entropy", (x, y))
        >>> loss = torch.nn.functional.cross_entropy(model(x), y)
        >>> (loss + 0.01 * gradient_norm_penalty(L, None, (x, y), micro_batch_size=4)).backward()
    """
    return m.squared_gradient_norm


@regularizer(
    "GN of one S",
    formula="‖∇L_S‖², S one of B's micro-batches",
    source="Novack et al. 2022 (arXiv 2211.15853), App. B.2",
    draws="S",
    sampled=True,
)
def sampled_gradient_norm_penalty(m: MicroBatch) -> Tensor:
    """The squared gradient norm ‖∇L_S‖² of one micro-batch S, drawn uniformly among B's micro-batches at each evaluation.

    No factor |M|/|B|: its expectation over S is GN if all micro-batches have the same size, at the cost of one of them.

    Source: Novack et al. 2022 (arXiv 2211.15853), App. B.2.
    """
    return m.squared_gradient_norm


@regularizer(
    "GN by differences",
    formula="mean_M ‖∇L_M‖², its gradient 2‖g‖(∇L_M(w + h g/‖g‖) - g)/h",
    source="Geiping et al. 2022 (arXiv 2109.14119)",
    first_order=True,
)
def gradient_norm_difference_penalty(m: MicroBatch, *, h: float = 0.01) -> Tensor:
    """GN with a gradient by finite differences, for models without a second derivative.

    The value is that of `gradient_norm_penalty`. With g = ∇L_M its gradient, 2 H_M g, is replaced by

        2 (‖g‖/h) (∇L_M(w + h g/‖g‖) - ∇L_M(w)),

    a step of length `h` uphill as in sharpness-aware minimization, with the same dropout masks and without touching the
    model: two more plain gradients, with their memory.

    The error of the gradient is h ‖g‖ ∇³L_M[d, d] + O(h²) with d = g/‖g‖: first order in h, zero for a quadratic loss.
    Rounding adds about 2 ε ‖g‖ G/h, with ε the machine precision and G the typical size of per-example gradients. Where a
    relu switches between the two points the difference sees its kink, and double backward does not.

    Source: Geiping et al. 2022 (arXiv 2109.14119), with forward differences.
    """
    if not m.graph:
        return m.squared_gradient_norm
    plain = m.plain_gradient
    square = squared_norm(plain)
    norm = square.sqrt()
    step = h / norm.clamp_min(1e-30)  # no step where the gradient is zero
    ahead = m.gradient_at([p.detach() + step * g for p, g in zip(m.params, plain, strict=True)])
    return with_gradient(square, m.params, [2 * norm / h * (a - g) for a, g in zip(ahead, plain, strict=True)])
