"""Gradient descent with anticorrelated perturbations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..linalg.probes import normal
from .base import Closure, Method
from .registry import method


@method(
    "anti_pgd",
    formula="w ← w - lr ∇L_B + (ξ_{k+1} - ξ_k), ξ_k ~ N(0, σ² I); later without noise",
    source="Orvieto et al. 2022 (arXiv 2202.02831); Novack et al. 2022 (arXiv 2211.15853), App. D.2",
)
class AntiPGD(Method):
    """Anticorrelated perturbed gradient descent: w_{k+1} = w_k - lr ∇L_B(w_k) + ξ_{k+1} - ξ_k, then plain descent.

    The ξ are independent N(0, σ² I). Their differences telescope: w_k is ξ_k - ξ_0 away from where the gradients alone lead.
    From step `noise_steps` on there is no noise; the perturbation that remains, ξ_K - ξ_0, is not taken back, so the first
    step without noise starts where the last one with noise ended, and descent contracts it.

    Args:
        sigma: standard deviation σ of each coordinate (Novack's Table 6 states σ²); not multiplied by lr.
        noise_steps: K, the number of steps with noise; None for all.
        seed: of ξ.

    Raises:
        ValueError: a negative `sigma` or `noise_steps`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, *, sigma: float, noise_steps: int | None = None, seed: int = 0
    ) -> None:
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigma is {sigma}; expected a finite standard deviation from 0")
        if noise_steps is not None and noise_steps < 0:
            raise ValueError(f"noise_steps is {noise_steps}; expected a number of steps from 0, or None for all")
        super().__init__(params, lr, sigma=sigma, noise_steps=noise_steps, seed=seed)

    def advance(self, closure: Closure | None) -> None:
        k, last = self.steps_taken, self.setting("noise_steps")
        self.descend()
        if last is None or k < last:
            for p, new, old in zip(self.parameters(), self.perturbation(k + 1), self.perturbation(k), strict=True):
                p.add_(new - old)

    def perturbation(self, step: int) -> list[Tensor]:
        """ξ at a step, in the shapes of the parameters."""
        draw = self.generator("perturbation", step)
        return [self.setting("sigma") * normal(p.shape, p, generator=draw) for p in self.parameters()]
