"""Gradient descent with Gaussian noise of the covariance of SGD, and the stochastic differential equation behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ..linalg.probes import normal
from ..objective import Objective
from ..operators.gradient_moments import noise_share
from ..per_example import ExampleGradients
from ..sharded import require_whole
from .base import Closure, Method
from .registry import method

Covariance = Literal["full", "diagonal", "isotropic"]


def covariance_root(L: Objective, covariance: Covariance = "full") -> tuple[int, Callable[[Tensor], Tensor]]:
    """A linear map A with A Aᵀ = C_1, its diagonal, or (tr(C_1)/P) I, at the model's current parameters: (width, A).

    C_1 = (1/N) Σ (g_i - g)(g_i - g)ᵀ is the covariance of the gradients of single examples. A takes (width,) to (P,), so
    that A ξ with standard normal ξ is Gaussian noise of that covariance. Nothing of size P x P or N x P is formed.

        full       A ξ = N^{-1/2} Σ ξ_i (g_i - g), width N; costs one capture of per-example gradients
        diagonal   A ξ = √diag(C_1) ∘ ξ, width P; forms all per-example gradients, in chunks: as many gradients as vmap costs
        isotropic  A ξ = √(tr(C_1)/P) ξ, width P; costs one capture

    Source: Smith et al. 2021 (arXiv 2101.12176), eq. 23 (F there); Lee 2022, eq. 1.
    """
    if covariance == "full":
        examples = ExampleGradients(L, L.params())

        def combine(xi: Tensor) -> Tensor:  # centring the coefficients centres the gradients
            return examples.combine(((xi - xi.mean()) / math.sqrt(L.size))[:, None])[:, 0]

        return L.size, combine
    if covariance == "diagonal":
        deviation = _variances(L).sqrt()
        return L.num_params, lambda xi: deviation * xi
    w = L.params()
    total = ExampleGradients(L, w).squared_norms().mean() - L.gradient(w).double().square().sum()
    scale = math.sqrt(max(0.0, float(total)) / L.num_params)
    return L.num_params, lambda xi: scale * xi


def _variances(L: Objective) -> Tensor:
    """diag(C_1), (P,): the variance over examples of each coordinate of the gradient."""
    w = L.params()
    mean, total = L.gradient(w), torch.zeros(L.num_params, dtype=torch.float64, device=L.device)
    rows = max(1, min(L.chunk_size, L.memory // (4 * L.num_params * w.element_size())))
    for index in torch.arange(L.size).split(rows):
        total += (L.example_gradients(w, index) - mean).square().sum(0, dtype=torch.float64)
    return (total / L.size).to(L.dtype)


class _Diffusion(Method):
    """Steps of -∇L dt with Gaussian noise of the gradients, each of `substeps` Euler-Maruyama steps."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        objective: Objective,
        batch_size: int,
        covariance: Covariance,
        replacement: bool,
        substeps: int,
        seed: int,
    ) -> None:
        if covariance not in ("full", "diagonal", "isotropic"):
            raise ValueError(f"covariance is {covariance!r}; expected 'full', 'diagonal' or 'isotropic'")
        self.objective = objective
        self.share = noise_share(objective.population_size or objective.size, batch_size, replacement)
        super().__init__(
            params,
            lr,
            batch_size=batch_size,
            covariance=covariance,
            replacement=replacement,
            substeps=substeps,
            temperature=lr * self.share,
            seed=seed,
        )
        require_whole(objective, "optimizers that add noise")
        if not {id(p) for p in self.parameters()} & {id(p) for p in objective.variables()}:
            raise ValueError(
                "the optimizer holds none of the trainable parameters of the objective's model, so their noise is unknown; "
                "make both from the same model"
            )

    @property
    def temperature(self) -> float:
        """T = lr γ/b, which is Smith's ε/B when batches are drawn with replacement, or N ≫ B; of the first group."""
        return self.setting("lr") * self.share

    def advance(self, closure: Closure | None) -> None:
        substeps, draw = self.setting("substeps"), self.generator("noise")
        for group in self.param_groups:
            group["temperature"] = group["lr"] * self.share
        for i in range(substeps):
            if i:
                self.evaluate(closure)
            self._euler_maruyama(1 / substeps, draw)

    def _euler_maruyama(self, fraction: float, draw: torch.Generator) -> None:
        """w ← w - dt ∇L + √(T dt) C_1^{1/2} z with dt = fraction · lr; at fraction 1 the noise is lr · N(0, C_b)."""
        L = self.objective
        width, root = covariance_root(L, self.setting("covariance"))
        parts = L.split(root(normal((width,), L.params(), generator=draw)))
        noise = {id(p): part for p, part in zip(L.variables(), parts, strict=True)}
        self.descend(fraction)
        for p, lr in self.rates():
            if id(p) in noise:
                p.add_(noise[id(p)].to(p), alpha=lr * math.sqrt(self.share * fraction))


@method(
    "noisy_gd",
    formula="w ← w - lr ∇L + lr ζ, ζ ~ N(0, C_b), or with its diagonal, or isotropic of the same trace",
    source="Smith et al. 2021 (arXiv 2101.12176), eq. 23",
)
class NoisyGD(_Diffusion):
    """Gradient descent with Gaussian noise as large as that of SGD with batches of b: w ← w - lr ∇L + lr ζ, Cov ζ = C_b.

    Train on full batches: what is in `.grad` is taken for the full gradient. The noise has the covariance C_b of the
    objective at the current parameters, measured anew at each step.

    Args:
        objective: the loss whose examples make the noise, over the model that is trained.
        batch_size: b.
        covariance: ``"full"``, C_b; ``"diagonal"``, its diagonal; ``"isotropic"``, a multiple of I of the same trace.
        replacement: whether the batches of SGD are drawn with replacement.
        seed: of the noise.

    Raises:
        ValueError: an unknown covariance, an optimizer over none of the parameters of the objective, or b outside 1..N
            without replacement.

    Source: Smith et al. 2021 (arXiv 2101.12176), eq. 23; C_b by Lee 2022, eq. 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        objective: Objective,
        batch_size: int,
        covariance: Covariance = "full",
        replacement: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            objective=objective,
            batch_size=batch_size,
            covariance=covariance,
            replacement=replacement,
            substeps=1,
            seed=seed,
        )


@method(
    "sde",
    formula="dw = -∇L dt + √T C_1^{1/2} dW over a time lr, T = lr/b",
    source="Smith et al. 2021 (arXiv 2101.12176), eq. 23",
)
class SDE(_Diffusion):
    """The stochastic differential equation of SGD: dw = -∇L dt + √T C_1^{1/2} dW, integrated over a time lr per step.

    Smith's eq. 23 writes the update of SGD as w ← w - ε∇L + √(εT) ξ with Cov ξ = C_1 and T = ε/B. An Euler step of the
    equation above over dt = ε is just that, since dW has the variance dt: √T · √ε = √(εT). (With √(εT) before dW the noise
    of a step would be smaller by √ε and depend on the unit of time.) Each `step` is `substeps` Euler-Maruyama steps of dt =
    lr/substeps with independent noise, C_1 measured at the start of each (Itô). With one substep it is `NoisyGD`; as their
    number grows the paths tend, in distribution, to those of the equation, while T stays that of lr.

    Train on full batches. A step costs as many gradients, and captures of per-example gradients, as it has substeps.

    Args:
        objective, batch_size, covariance, seed: as `NoisyGD`.
        substeps: Euler steps per step; dt ≪ ε where they are many.
        replacement: True for Smith's T = ε/B; False multiplies T by γ = (N - B)/(N - 1), the temperature of SGD without
            replacement where B is not small against N.

    Raises:
        ValueError: `substeps` below 1; as `NoisyGD`; at a step, no closure while `substeps` > 1.
    """

    needs_closure = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        objective: Objective,
        batch_size: int,
        substeps: int = 10,
        covariance: Covariance = "full",
        replacement: bool = True,
        seed: int = 0,
    ) -> None:
        if substeps < 1:
            raise ValueError(f"substeps is {substeps}; expected at least 1 Euler step per step")
        super().__init__(
            params,
            lr,
            objective=objective,
            batch_size=batch_size,
            covariance=covariance,
            replacement=replacement,
            substeps=substeps,
            seed=seed,
        )
