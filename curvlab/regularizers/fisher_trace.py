"""The Fisher trace of micro-batches, with one label per example drawn from the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses import binary_cross_entropy, cross_entropy
from .micro_batch import MicroBatch
from .registry import regularizer
from .vectors import squared_norm


@regularizer(
    "FT",
    formula="mean_M ‖∇L̂_M‖², labels drawn from the model",
    source="Novack et al. 2022 (arXiv 2211.15853), eq. 4",
    draws="labels",
    needs="likelihood",
)
def fisher_trace_penalty(m: MicroBatch) -> Tensor:
    """FT: GN with one label per example drawn from the model, Σ_M (|M|/|B|) ‖∇(1/|M|) Σ_{x in M} ℓ(x, ŷ)‖².

    Drawn labels are constants for differentiation, as in the paper. Scores have mean zero, so the expectation over labels is
    mean_M Tr(F_M)/|M|, with F_M the Fisher information of the micro-batch: not Tr(F), and smaller for large micro-batches.
    The likelihoods: categorical for ``"cross_entropy"``, Bernoulli for ``"binary_cross_entropy"``, a Gaussian of unit
    variance for ``"squared_error"``.

    Source: Novack et al. 2022 (arXiv 2211.15853), eq. 4; Jastrzebski et al. 2021 (arXiv 2012.14193).
    """
    noise: list[Tensor] = []  # of the whole micro-batch, so that it does not depend on how that is split into parts

    def losses(part: MicroBatch) -> Tensor:
        z = part.outputs
        if not noise:
            noise.append(label_noise(m.L.loss, (m.size, *z.shape[1:]), m.generator))
        return m.L.loss(z, sampled_targets(m.L.loss, z.detach(), noise[0][part.range].to(z.device)))  # type: ignore[operator]

    return squared_norm(m.mean_gradient(losses))


def label_noise(loss: Any, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """What turns outputs into labels: a uniform number per example, or per output, or a normal one per output."""
    if loss is cross_entropy:
        return torch.rand(shape[0], dtype=torch.float64, generator=generator)
    draw = torch.rand if loss is binary_cross_entropy else torch.randn
    return draw(shape, dtype=torch.float64, generator=generator)


def sampled_targets(loss: Any, outputs: Tensor, noise: Tensor) -> Tensor:
    """Targets drawn from the likelihood of `outputs`: class indices (B,), 0 or 1, or outputs plus noise."""
    if loss is cross_entropy:
        upper = outputs.double().softmax(1).cumsum(1)[:, :-1]  # of each class's share of [0, 1)
        return (upper <= noise[:, None]).sum(1)
    if loss is binary_cross_entropy:
        return (noise < outputs.double().sigmoid()).to(outputs.dtype)
    return outputs + noise.to(outputs.dtype)
