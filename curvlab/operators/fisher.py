"""The Fisher information of the model's likelihood, F = E_x E_{y ~ model}[∇log p ∇log pᵀ]."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..linalg import LinearOperator
from ..losses import fisher_root
from ..objective import Objective
from .ggn import ggn


def fisher(L: Objective, w: Tensor | None = None) -> LinearOperator:
    """F(w) = (1/N) Σ_i s_i J_iᵀ Var_{y ~ model}[∇_z log p] J_i as a `LinearOperator`, (P, P).

    The expectation is over labels that the model itself draws, in closed form. For ``"cross_entropy"`` (categorical),
    ``"binary_cross_entropy"`` (Bernoulli) and ``"squared_error"`` (Gaussian of unit variance) the outputs are the natural
    parameters of the likelihood, so F equals the GGN; a product costs about two gradients. The second moment of the
    gradients of the *given* labels, often called the empirical Fisher, is `gradient_second_moment` with ``batch_size=1``.

    Raises:
        ValueError: a loss without a known likelihood.

    Source: Novack et al. 2022 (arXiv 2211.15853), eq. 3; Martens 2020 (arXiv 1412.1193), sec. 9.
    """
    with L.measuring(), torch.no_grad():
        at = L.leaves_at(w)
        outputs = L.outputs(at, L.first(2))
    if fisher_root(L.loss, outputs, torch.zeros_like(outputs)) is None:
        raise ValueError(
            "the Fisher needs the likelihood behind the loss; it is known for loss='cross_entropy', 'binary_cross_entropy' "
            "and 'squared_error'"
        )
    return replace(ggn(L, w), name="the Fisher")
