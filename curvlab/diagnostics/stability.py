"""Sharpness as the optimizer meets it: preconditioned, of its own batches, along its own steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..linalg import LinearOperator, eigsh
from ..measurement import Measurement, missing
from ..operators import hessian, noise_share
from ..snapshot import Snapshot
from .estimation import default_probes, estimate, likely_batches
from .noise import BatchSizes, over_batch_sizes, second_moment
from .registry import diagnostic
from .tracking import largest, subspace_error, top_eigenpairs, tracked_eigenpairs
from .values import exact

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25)


@diagnostic(
    "λ_max(P^{-1/2} H P^{-1/2})",
    formula="largest eigenvalue of the preconditioned Hessian",
    kind="bound",
    cost="14-23 products, 2-5 when tracked",
)
def preconditioned_sharpness(at: Snapshot, *, tol: float = 1e-2) -> Measurement:
    """The sharpness that Adam, AdamW or RMSprop meets; compare with `curvlab.optimizers.stability_threshold`.

    The threshold is 38/lr for Adam at β₁ = 0.9.

    Estimator: P is the diagonal that the step is about to divide by, read from the optimizer's state, with its bias
    correction and ε. P^{-1/2} H P^{-1/2} has the eigenvalues of P^{-1} H and is symmetric; its largest is tracked as
    `sharpness` is.

    Error: the residual, as for `sharpness`.

    Fails: no value for other optimizers, with amsgrad or centered, or at a point that no training has led to. P holds
    the gradient of the batch about to be used: at the first steps, and with small batches, it is noisy. The threshold
    takes P as constant, and neglects decoupled weight decay.

    Source: Cohen et al. 2022 (arXiv 2207.14484), eq. 2.
    """
    if at.preconditioner is None:
        return missing("there is no known preconditioner: measure it while train() uses Adam, AdamW or RMSprop")
    root = at.preconditioner.rsqrt()[:, None]
    H = at.hessian
    A = replace(H, matmat=lambda V: root * H.matmat(root * V), name="the preconditioned Hessian")
    return largest(tracked_eigenpairs(at, "preconditioned", A, 1, tol, hint=at.gradient * root[:, 0]))


@diagnostic(
    "E[g_bᵀ H_b g_b/‖g_b‖²]",
    formula="mean over batches of the curvature of the batch's own loss along its gradient",
    kind="sem",
    cost="16 batches, each 1 gradient and 1 product of b examples; 4 in a run; 1 gradient and 7 sums, shared",
    needs=["batch_size"],
)
def batch_sharpness(
    at: Snapshot,
    *,
    batch_size: BatchSizes = None,
    samples: int | None = None,
    target: float | None = None,
    budget: int | None = None,
) -> Measurement:
    """Batch sharpness, with the mini-batch's own Hessian H_b: a mean of ratios.

    Not ‖H‖_{S_b}, whose H is that of all data: the batch's own Hessian overstates tr(H S_b) by 38-90% on a small net.

    Estimator: few batches carry much of it, so that batches are drawn half uniformly and half in proportion to ‖g_b‖²,
    and weighted so that the mean is that over all batches (uniform ones cover 55-93% for the ratio of means). For b = 1
    and no more than `samples` examples all of them are used and the result is exact.

    Error: in a run that of 4 batches, whose variance is pooled over steps. Full batches without replacement are exact.

    Fails: no value where the gradient of a drawn batch is zero. Every batch size costs batches of its own. Four
    look-alikes are confused in public code: this one, the ratio of means `batch_sharpness_of_means`,
    `interaction_sharpness` with the H of all data, and gradient-noise interaction, which is `instability`.

    Args:
        samples: batches; default 16 at a single point, 4 in a run, whose variance is pooled over steps.
        target, budget: as for `interaction_trace`, in batches.

    Source: Andreyev and Beneventano 2024 (arXiv 2412.20553).
    """
    given: dict[str, Any] = {"samples": samples, "target": target, "budget": budget}
    return _over_batches(at, "batch_sharpness", batch_size, lambda curvature, norm, b: curvature / norm, **given)


@diagnostic(
    "E[g_bᵀ H_b g_b]/E‖g_b‖²",
    formula="ratio of means of the same, with tr(S_b) below",
    kind="sem",
    cost="as batch_sharpness, shared, and 1 gradient",
    needs=["batch_size"],
    options_of=batch_sharpness,
)
def batch_sharpness_of_means(at: Snapshot, *, batch_size: BatchSizes = None, **options: Any) -> Measurement:
    """Batch sharpness as a ratio of means, E[g_bᵀ H_b g_b] over E‖g_b‖². Options as `batch_sharpness`.

    Estimator: the batches of `batch_sharpness`, with which it shares them; the denominator tr(S_b) is exact, so there
    is no bias of a ratio.

    Error: that of the numerator over tr(S_b); pooled over steps in a run.

    Fails: as `batch_sharpness`, of which it is no approximation: the two differ where long gradients meet another
    curvature than short ones. Refused under batch statistics.

    Source: Andreyev and Beneventano 2024 (arXiv 2412.20553).
    """

    def over_second_moment(curvature: Tensor, norm: Tensor, b: int) -> Tensor:
        return curvature / float(second_moment(at, b).value)  # type: ignore[arg-type]

    return _over_batches(at, "batch_sharpness_of_means", batch_size, over_second_moment, **options)


@diagnostic(
    "2(ΔL - g·Δw)/‖Δw‖²",
    formula="curvature that the loss showed along the last step",
    kind="exact",
    cost="1 gradient, shared",
)
def secant_sharpness(at: Snapshot) -> Measurement:
    """Curvature along the displacement since the last measured step, from losses and gradients alone.

    Estimator: with Δw = w_t - w_s, s the last measured step: 2(L(w_t) - L(w_s) - ∇L(w_s)·Δw)/‖Δw‖², the average of Δwᵀ
    H Δw/‖Δw‖² along the way. It sees the kinks of relu networks, which the Hessian does not. For one step of gradient
    descent this is 2(ΔL + lr ‖g‖²)/(lr² ‖g‖²).

    Error: the floor is the rounding of the difference of losses.

    Fails: no value at the first measured step, at a point that no training has led to, or where the parameters have not
    moved. Between steps that are far apart (`every`) it averages over a path that was not taken straight. Small steps
    late in float32 training drown in the floor: measure in float64.
    """
    if at.carry is None:
        return missing("needs two points: measure it in train()")
    last = at.carry.get("secant")
    here = (at.w, float(at.value), at.gradient)
    at.carry["secant"] = here
    if last is None:
        return missing("there is no earlier measured step")
    w, value, gradient = last
    step = (at.w - w).double()
    length = float(step.square().sum())
    if length == 0.0:
        return missing("the parameters have not moved since the last measured step")
    linear = float(gradient.double() @ step)
    found = 2 * (here[1] - value - linear) / length
    eps = torch.finfo(at.objective.dtype).eps
    rounding = 2 * eps * (abs(here[1]) + abs(value) + abs(linear)) / length
    return Measurement(found, floor=16 * rounding)


@diagnostic(
    "cos(∇L_t, ∇L_{t+1})",
    formula="cosine of the full gradients of consecutive steps",
    kind="exact",
    cost="1 gradient, shared",
)
def gradient_cosine(at: Snapshot) -> Measurement:
    """Cosine between the full gradient at this step and at the one before; negative at the edge of stability.

    Estimator: the gradient of the step before is kept.

    Fails: no value unless the step before was measured too: it needs every step. None either where a gradient is zero.

    Source: Lee 2022, sec. 5.2.
    """
    return _cosine_to_last(at, "gradient_cosine", at.gradient)


@diagnostic(
    "cos(g_b, g_b')",
    formula="cosine of the batch gradients of consecutive steps",
    kind="exact",
    cost="none",
    needs=["batch_gradient"],
)
def batch_gradient_cosine(at: Snapshot) -> Measurement:
    """Cosine between the gradient about to be used and the one used at the step before.

    Estimator: the gradient that training has computed, and the one before, which is kept; penalties included.

    Fails: no value unless the step before was measured too. For small batches noise keeps it near zero: two batches
    share little but ∇L. With dropout or BatchNorm it is of the loss that trains, not of the one that is measured.

    Source: Lee 2022, sec. 5.2.
    """
    assert at.batch_gradient is not None
    return _cosine_to_last(at, "batch_gradient_cosine", at.batch_gradient)


@diagnostic(
    "‖H_α‖_{S_n}",
    formula="gᵀ H(w - α lr g) g/‖g‖², g = ∇L(w)",
    kind="exact",
    cost="1 gradient and 1 product for each α",
    needs=["lr"],
)
def directional_sharpness(at: Snapshot, *, alphas: Sequence[float] = ALPHAS) -> Measurement:
    """Curvature in the direction of the gradient at w, met further along it: over an axis "alpha", with S_n fixed at w.

    Above its value at alpha = 0, the `interaction_sharpness` of full batches, the valley gets sharper across; below it,
    flatter (asymmetric valleys).

    Estimator: one gradient and one product at each w - α lr g.

    Fails: the direction is that of full-batch descent, whatever the optimizer does. No value where the gradient is zero
    or the loss is not finite along the step. Near a minimum, where gradients of examples cancel, the floor grows.

    Source: Lee 2022, fig. 3 left.
    """
    g = at.gradient.double()
    length = float(g.norm())
    if length == 0.0:
        return missing("the gradient is zero, so it has no direction")
    products = [(_hessian_along(at, alpha) @ at.gradient).double() for alpha in alphas]
    eps, rounding = torch.finfo(at.objective.dtype).eps, 2 * at.gradient_floor / length
    floors = [float(Hg.norm()) / length * (16 * eps + rounding) for Hg in products]
    return _curve(at, [float(g @ Hg) / length**2 for Hg in products], alphas, floors)


@diagnostic(
    "cos(q_1(H_α), q_1(H))",
    formula="absolute cosine of the top eigenvectors here and along the step",
    kind="bound",
    cost="13-22 products for each α",
    needs=["lr"],
)
def directional_alignment(at: Snapshot, *, alphas: Sequence[float] = ALPHAS, tol: float = 1e-3) -> Measurement:
    """How far the top eigenvector turns along the step: |q_1(H(w - α lr g))·q_1(H(w))|, over an axis "alpha".

    Estimator: two eigenpairs at w, and two at each point, started from those at w.

    Error: the sum of the bounds √2 r/gap for both eigenvectors.

    Fails: where the two largest eigenvalues meet, here or there, the top eigenvector changes places or is not defined,
    and the bound reaches 1. Dear in a run: one search for each α at every step. No value with a single parameter.

    Source: Lee 2022, sec. 4.2 and fig. 3.
    """
    if at.objective.num_params < 2:
        return missing("needs two parameters")
    here = top_eigenpairs(at, 2, tol)
    values, errors = [], []
    for alpha in alphas:
        there = eigsh(
            _hessian_along(at, alpha),
            2,
            tol=tol,
            start=here.vectors,
            verify=False,
            generator=at.generator(f"alpha {alpha}"),
        )
        values.append(abs(float(there.vectors[:, 0].double() @ here.vectors[:, 0].double())))
        errors.append(min(1.0, 2**0.5 * (subspace_error(here, 1) + subspace_error(there, 1))))
    floor = np.full(len(values), 16 * torch.finfo(at.objective.dtype).eps)
    return Measurement(np.array(values), np.array(errors), "bound", floor=floor, axis=("alpha", tuple(alphas)))


@diagnostic(
    "L(w - α lr g)",
    formula="loss along the full-gradient step",
    kind="exact",
    cost="1 forward pass for each α",
    needs=["lr"],
)
def loss_along_step(at: Snapshot, *, alphas: Sequence[float] = ALPHAS) -> Measurement:
    """The training loss along the step of plain gradient descent, over an axis "alpha".

    Estimator: one forward pass at each w - α lr g.

    Fails: the step is that of full-batch descent, whatever the optimizer does. No value where the loss is not finite
    along it.

    Source: Lee 2022, fig. 3 right.
    """
    return _curve(at, [float(at.objective.value(_along(at, alpha))) for alpha in alphas], alphas)


def _over_batches(
    at: Snapshot,
    name: str,
    batch_size: BatchSizes,
    value: Callable[[Tensor, Tensor, int], Tensor],
    *,
    samples: int | None = None,
    target: float | None = None,
    budget: int | None = None,
) -> Measurement:
    def mean(b: int) -> Measurement:
        count = default_probes(at, samples, step=4)
        everything = b == 1 and at.objective.size <= count
        drawn = at.shared(("batch_curvature", b, everything), lambda: list[Tensor]())
        used = 0

        def draw(more: int) -> list[float]:
            nonlocal used
            used += more
            _draw_curvatures(at, b, used, drawn, everything)
            curvature, norm, inverse, _ = torch.stack(drawn[used - more : used], 1)
            if not bool((norm > 0).all()):
                raise FloatingPointError("the gradient of a batch is zero")
            return (inverse * value(curvature, norm, b)).tolist()

        if noise_share(at.objective.size, b, at.replacement) == 0.0:  # every batch is the data set
            found = Measurement(draw(1)[0])
        elif everything:
            found = Measurement(sum(draw(at.objective.size)) / at.objective.size)
        else:
            found = estimate(at, (name, b), draw, probes=count, scale=1.0, target=target, budget=budget)
        _, norm, _, rounding = torch.stack(drawn[:used], 1)
        return replace(found, floor=float(value(rounding, norm, b).mean()))

    return over_batch_sizes(at, batch_size, mean)


def _draw_curvatures(at: Snapshot, b: int, count: int, drawn: list[Tensor], everything: bool) -> None:
    """Extend (g_bᵀ H_b g_b, ‖g_b‖², weight, rounding), float64, to `count` independent batches, or through all examples."""
    L = at.objective
    for i in range(len(drawn), count):
        batch, weight = torch.tensor([i]), torch.ones((), dtype=torch.float64, device=L.device)
        if noise_share(L.size, b, at.replacement) == 0.0:
            batch = torch.arange(L.size)
        elif not everything:
            generator = at.generator(f"batch_curvature {b} {i}")
            batches, weights = likely_batches(at, b, 1, lambda norms: norms, generator=generator)
            batch, weight = batches[0], weights[0]
        products = at.products(batch=batch)
        g = products.value_and_gradient()[1]
        Hg, g = products.matmat(g[:, None])[:, 0].double(), g.double()
        rounding = Hg.norm() * (16 * torch.finfo(L.dtype).eps * g.norm() + 2 * at.gradient_floor)
        drawn.append(torch.stack([g @ Hg, g @ g, weight, rounding]))


def _cosine_to_last(at: Snapshot, key: str, g: Tensor) -> Measurement:
    if at.carry is None:
        return missing("needs two steps: measure it in train()")
    last = at.carry.get(key)
    at.carry[key] = (at.step, g)
    if last is None or last[0] != at.step - 1:
        return missing("the step before was not measured")
    a, b = g.double(), last[1].double()
    size = float(a.norm() * b.norm())
    if size == 0.0:
        return missing("the gradient is zero, so it has no direction")
    return exact(float(a @ b) / size, at.objective, scale=1.0)


def _along(at: Snapshot, alpha: float) -> Tensor:
    return at.w - alpha * float(at.lr) * at.gradient  # type: ignore[arg-type]


def _hessian_along(at: Snapshot, alpha: float) -> LinearOperator:
    def compute() -> LinearOperator:
        return at.counted(hessian(at.objective, products=at.products(_along(at, alpha))))

    return at.shared(("hessian", alpha), compute)


def _curve(
    at: Snapshot, values: list[float], alphas: Sequence[float], floors: list[float] | None = None
) -> Measurement:
    found = np.array(values)
    if not np.isfinite(found).all():
        raise FloatingPointError("not finite: the loss diverges along the step")
    floor = 16 * torch.finfo(at.objective.dtype).eps * np.abs(found) if floors is None else np.array(floors)
    zero = np.zeros(len(found))
    return Measurement(found, zero, "exact", zero + np.inf, floor, axis=("alpha", tuple(float(a) for a in alphas)))
