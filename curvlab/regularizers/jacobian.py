"""Penalties on the Jacobian of the outputs, which leave the gradient of the loss in the outputs out."""

from __future__ import annotations

import torch
from torch import Tensor

from .micro_batch import MicroBatch
from .registry import regularizer
from .vectors import squared_norm


@regularizer(
    "AJ",
    formula="mean_M ‖J̄_Mᵀ 1/C‖², J̄_M the mean Jacobian of the outputs",
    source="Novack et al. 2022 (arXiv 2211.15853), eq. 6",
    needs="outputs",
)
def average_jacobian_penalty(m: MicroBatch) -> Tensor:
    """AJ: the squared norm of the gradient of the mean output, Σ_M (|M|/|B|) ‖(1/|M|) Σ_{x in M} ∇_w (1/C) Σ_c z_c(x)‖².

    All C outputs and all examples count alike; the labels do not enter.

    Source: Novack et al. 2022 (arXiv 2211.15853), eq. 6.
    """
    return squared_norm(m.mean_gradient(lambda part: _flat(part.outputs).mean(1)))


@regularizer(
    "UJ",
    formula="mean_M ‖J̄_Mᵀ u‖², u uniform on the unit sphere",
    source="Novack et al. 2022 (arXiv 2211.15853), eq. 7",
    draws="u",
    needs="outputs",
)
def unit_jacobian_penalty(m: MicroBatch) -> Tensor:
    """UJ: the squared norm of the mean Jacobian along a random unit vector of the outputs, Σ_M (|M|/|B|) ‖J̄_Mᵀ u_M‖².

    J̄_M = (1/|M|) Σ_{x in M} ∂z/∂w, (C, P), and u_M uniform on the unit sphere, one draw for each micro-batch. The
    expectation over u is mean_M ‖J̄_M‖_F²/C; the paper's remark that it is ‖∇z‖_F² drops the factor 1/C and the mean.

    Source: Novack et al. 2022 (arXiv 2211.15853), eq. 7.
    """
    direction: list[Tensor] = []

    def along(part: MicroBatch) -> Tensor:
        z = _flat(part.outputs)
        if not direction:
            u = torch.randn(z.shape[1], dtype=torch.float64, generator=m.generator)
            direction.append((u / u.norm()).to(z.device, z.dtype))
        return z @ direction[0]

    return squared_norm(m.mean_gradient(along))


def _flat(outputs: Tensor) -> Tensor:
    """(B, C) for outputs of any shape (B, ...)."""
    return outputs.reshape(len(outputs), -1)
