"""How the gradient distribution meets the curvature: tr(H S_b) and what the papers make of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..linalg import eigsh
from ..linalg.probes import rademacher
from ..measurement import Measurement, missing
from ..operators import noise_share
from ..snapshot import Snapshot
from .estimation import batch_gradients, default_probes, estimate, likely_batches
from .noise import BatchSizes, over_batch_sizes, second_moment, squared_norm
from .registry import diagnostic
from .sampled import HS_B, S_B, S_N, sampled_moments

REFRESH = 16  # steps between two fits of the control variate
_COST = "16 probes and 10-30 products; 2 probes and 2 products when tracked"


@diagnostic(
    "tr(H S_b)",
    formula="E[g_bᵀ H g_b] = (γ/b) tr(H S_1) + (1 - γ/b) gᵀHg",
    kind="sem",
    cost=_COST,
    needs=["batch_size"],
)
def interaction_trace(
    at: Snapshot,
    *,
    batch_size: BatchSizes = None,
    exact: bool = False,
    probes: int | None = None,
    k: int | None = None,
    target: float | None = None,
    budget: int | None = None,
) -> Measurement:
    """The curvature that mini-batch gradients meet, with H of the full data.

    Estimator: gᵀHg is exact. tr(H S_1) is estimated without bias from v = N^{-1/2} Σ ±g_i, for which E[vᵀHv] = tr(H
    S_1), with a control variate: for any vectors q_k and numbers λ_k, here k approximate eigenpairs,

        tr(H S_1) = (1/N) Σ_k λ_k Σ_i (q_k·g_i)² + E[vᵀHv - Σ_k λ_k (q_k·v)²],

    whose first part is exact and whose second varies little, since about as many directions as there are classes carry
    the trace. In a run eigenpairs are refitted every 16 steps, never from the same step's probes.

    Error: at a single point from 16 probes. In a run 2 probes a step are used, and their variance, relative to the
    first part, is pooled over the last 8 measured steps. Full batches without replacement, N of at most `probes`, and
    `exact` are exact.

    Fails: with k below the number of classes, or where the landscape jumps between two refits, the control variate
    leaves much and the error grows; the value stays unbiased. Of a sample of the data it is too large, because the
    examples that make the gradient make the Hessian too: state `population_size`. It does not see kinks of relu
    networks. Not the curvature of the batch's own loss, which is often larger: `batch_sharpness`.

    Args:
        batch_size: b, or a sequence for a curve from the same two traces; default that of training.
        exact: all N products (or 2P, whichever is less), no error: for small problems. N of at most `probes` does it
            anyway.
        probes: random vectors v; where moments are sampled (batch normalization with the statistics of the batch, data that
            are a sample of a population), the `samples` of `curvlab.diagnostics.sampled.sampled_moments`, and no other
            option applies.
        k: eigenpairs of the control variate; default 10, at most P.
        target: relative half-width of the 95% interval of tr(H S_1), reached by as many probes as it takes, at most
            `budget`; see `curvlab.diagnostics.estimation.estimate`.
        budget: the most probes that a `target` may take; default 512.

    Source: Lee 2022, eq. 4-5.
    """

    def trace_at(b: int) -> Measurement:
        sampled = sampled_moments(at, b, probes, curvature=True)
        if sampled:
            return sampled.entry(HS_B)
        share = noise_share(at.objective.size, b, at.replacement)
        g, Hg = at.gradient.double(), at.hessian_gradient.double()
        full = float(g @ Hg)
        eps = torch.finfo(at.objective.dtype).eps
        floor = 16 * eps * float(g.norm() * Hg.norm()) + 2 * float(Hg.norm()) * at.gradient_floor
        if share == 0.0:  # every batch is the data set
            return _checked(Measurement(full, floor=floor))
        first = _interaction_of_examples(at, exact, probes, k, target, budget)
        return _checked(first.scaled(share, plus=(1 - share) * full, floor=(1 - share) * floor))

    return over_batch_sizes(at, batch_size, trace_at)


@diagnostic(
    "‖H‖_{S_b}",
    formula="tr(H S_b) / tr(S_b)",
    kind="sem",
    cost=_COST,
    needs=["batch_size"],
    options_of=interaction_trace,
)
def interaction_sharpness(at: Snapshot, *, batch_size: BatchSizes = None, **options: Any) -> Measurement:
    """Interaction-aware sharpness: the curvature along mini-batch gradients, never above λ_max(H).

    Compare with 2ρ_b/lr (eq. 11). Options as `interaction_trace`.

    Estimator: `interaction_trace` over the exact tr(S_b), without the bias of a ratio of estimates.

    Error: that of tr(H S_b) over tr(S_b). Full batches (b = N without replacement) are exact: gᵀHg/‖g‖². Where moments
    are sampled, of both traces together.

    Fails: no value where all gradients are zero. An estimate may exceed λ_max(H) by its error. Otherwise as
    `interaction_trace`; four look-alikes are confused in public code: see `batch_sharpness`.

    Source: Lee 2022, Definition 2.
    """
    return _interaction_over(at, batch_size, S_B, lambda b: second_moment(at, b), options)


@diagnostic(
    "tr(H S_b)/tr(S_n)",
    formula="tr(H S_b) / ‖∇L‖² = ‖H‖_{S_b} / ρ_b",
    kind="sem",
    cost=_COST,
    needs=["batch_size"],
    options_of=interaction_trace,
)
def instability(at: Snapshot, *, batch_size: BatchSizes = None, **options: Any) -> Measurement:
    """Above 2/lr the expected loss of a locally quadratic function increases with the next step of plain SGD.

    Andreyev and Beneventano 2024 call the same number gradient-noise interaction, which is an alias here. Options as
    `interaction_trace`.

    Estimator: `interaction_trace` over the exact ‖∇L‖².

    Error: that of tr(H S_b) over ‖∇L‖². Where moments are sampled, of both together.

    Fails: at a plateau of the loss it is 2/lr by balance of noise alone (eq. 6 with zero on the left), so it marks an
    edge only with evidence beyond that (see `curvlab.claims`). 2/lr assumes steps -lr g_b on the loss that is measured:
    not momentum, Adam, penalties or weight decay. Near a stationary point ‖∇L‖² vanishes and the ratio explodes; of a
    sample ‖∇L‖² is too large: state `population_size`. No value where ‖∇L‖ is zero, or not resolved from zero.

    Source: Lee 2022, Definition 1.
    """
    return _interaction_over(at, batch_size, S_N, lambda b: second_moment_full(at), options)


@diagnostic(
    "E[L(w - lr g_b)] - L(w)",
    formula="mean over batches of the loss change of one plain SGD step",
    kind="sem",
    cost="64 forward passes and the control variate; 4 when tracked",
    needs=["batch_size", "lr"],
)
def expected_loss_difference(
    at: Snapshot,
    *,
    batch_size: BatchSizes = None,
    samples: int | None = None,
    k: int | None = None,
    target: float | None = None,
    budget: int | None = None,
) -> Measurement:
    """What the next step of plain SGD does to the full loss on average, without a quadratic approximation.

    Compare with the quadratic prediction -lr ‖∇L‖² + (lr²/2) tr(H S_b).

    Estimator: batches are drawn anew (not the one that training uses) and the loss is evaluated after each step. The
    control variate is the quadratic model with k approximate eigenpairs, -lr g·g_b + (lr²/2) Σ_k λ_k (q_k·g_b)², whose
    expectation is known exactly. Batches whose loss is likely to differ from it are drawn more often, and weighted.

    Error: in a run that of 4 batches, whose variance is pooled over steps. Full batches without replacement need one
    evaluation and are exact.

    Fails: few single examples may carry most of the change, so small batches want many: with 16 of b=1 the intervals
    covered 84% on a net of 48 examples. Every batch size costs batches of its own. The step is -lr g_b, whatever the
    optimizer. Refused under batch statistics, unless batches are full.

    Args:
        samples: batches; default 32 at a single point, 4 in a run.
        k: eigenpairs of the control variate; default 10, at most P.
        target, budget: as for `interaction_trace`, in batches.

    Source: Lee 2022, eq. 3-6 and 9.
    """

    def difference(b: int) -> Measurement:
        L, lr = at.objective, float(at.lr)  # type: ignore[arg-type]
        share, floor = (
            noise_share(L.size, b, at.replacement),
            16 * torch.finfo(L.dtype).eps * abs(float(at.value)),
        )
        if share == 0.0:
            return _checked(Measurement(float(L.value(at.w - lr * at.gradient) - at.value), floor=floor))
        Q, values, dots = _control(at, k)
        gradient, generator = at.gradient.double(), at.generator(f"expected_loss_difference {b}")
        second = share * dots.square().mean(0) + (1 - share) * (Q.T.double() @ gradient).square()
        expected = -lr * squared_norm(at) + lr**2 / 2 * float(values @ second)
        scale = lr * squared_norm(at) + lr**2 / 2 * float(values.abs() @ second)

        def draw(count: int) -> list[float]:
            # What the quadratic model leaves is of third order in the step.
            batches, inverse = likely_batches(at, b, count, lambda norms: norms**1.5, generator=generator, dots=dots)
            G = batch_gradients(at, batches)
            realised = torch.stack([L.value(at.w - lr * g) - at.value for g in G.T])
            model = -lr * (gradient @ G.double()) + lr**2 / 2 * (values[:, None] * (Q.T @ G).double().square()).sum(0)
            return (inverse * (realised - model)).tolist()

        found = estimate(
            at, ("expected_loss_difference", b), draw, probes=default_probes(at, samples, single=32, step=4),
            known=expected, scale=scale, floor=floor, restart=_refitted(at, k), target=target, budget=budget,
        )  # fmt: skip
        return _checked(found)

    return over_batch_sizes(at, batch_size, difference)


def second_moment_full(at: Snapshot) -> Measurement:
    """tr(S_n) = ‖∇L‖²."""
    return Measurement(squared_norm(at), floor=2 * math.sqrt(squared_norm(at)) * at.gradient_floor)


def _interaction_over(
    at: Snapshot, batch_size: BatchSizes, below: int, exact: Callable[[int], Measurement], options: dict[str, Any]
) -> Measurement:
    """tr(H S_b) over another moment: jointly where moments are sampled, otherwise over its exact value for b."""

    def ratio(b: int) -> Measurement:
        sampled = sampled_moments(at, b, options.get("probes"), curvature=True)
        if sampled:
            return sampled.ratio(HS_B, below)
        return _over(interaction_trace(at, batch_size=b, **options), exact(b))

    return over_batch_sizes(at, batch_size, ratio)


def _interaction_of_examples(
    at: Snapshot, exact: bool, probes: int | None, k: int | None, target: float | None, budget: int | None
) -> Measurement:
    """tr(H S_1)."""
    probes = default_probes(at, probes)
    if exact or at.objective.size <= probes:
        return at.shared("interaction_of_examples", lambda: _exact(at))
    key = ("interaction_of_examples", probes, k, target, budget)
    return at.shared(key, lambda: _estimated(at, probes, k, target, budget))


def _exact(at: Snapshot) -> Measurement:
    L, E = at.objective, at.examples
    total, size = 0.0, 0.0
    by_examples = 2 * L.num_params > L.size
    count = L.size if by_examples else L.num_params
    for lo in range(0, count, 64):
        block = torch.zeros(count, min(64, count - lo), device=L.device, dtype=L.dtype)
        block[range(lo, lo + block.shape[1]), range(block.shape[1])] = 1
        # tr(H S_1) = (1/N) Σ g_iᵀ H g_i = Σ_j (S_1 e_j)ᵀ H e_j, whichever sum is shorter
        left = E.combine(block) if by_examples else E.combine(E.dot(block))
        terms = (left * (at.hessian @ (left if by_examples else block))).sum(0, dtype=torch.float64) / L.size
        total, size = total + float(terms.sum()), size + float(terms.abs().sum())
    return Measurement(total, floor=16 * torch.finfo(L.dtype).eps * size)


def _estimated(at: Snapshot, probes: int, k: int | None, target: float | None, budget: int | None) -> Measurement:
    N = at.objective.size
    _, values, dots = _control(at, k)
    known = float(values @ dots.square().mean(0))
    scale = float(values.abs() @ dots.square().mean(0))
    generator = at.generator("interaction_trace")
    floor = 16 * torch.finfo(at.objective.dtype).eps * scale

    def draw(count: int) -> tuple[Tensor, Tensor]:
        signs = rademacher((N, count), at.gradient, generator=generator)
        HV = at.hessian @ (at.examples.combine(signs) / math.sqrt(N))
        predicted = dots @ (values[:, None] * (dots.T @ signs.double())) / N
        return signs, at.examples.dot(HV).double() / math.sqrt(N) - predicted

    return estimate(
        at, ("interaction_trace", probes, k), draw, probes=probes, known=known, scale=scale, floor=floor,
        restart=_refitted(at, k), target=target, budget=budget,
    )  # fmt: skip


def _control(at: Snapshot, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors q_k (P, K), numbers λ_k (K,) and products q_k·g_i (N, K) for the control variates of this step."""
    k = min(10 if k is None else k, at.objective.num_params)

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        Q, values = _control_vectors(at, k)
        return Q, values, at.examples.dot(Q).double()

    return at.shared(("control", k), compute)


def _control_vectors(at: Snapshot, k: int) -> tuple[Tensor, Tensor]:
    state: dict[str, Any] = {} if at.carry is None else at.carry.setdefault(("control", k), {})
    if not state or state["age"] >= REFRESH:
        start = state.get("Q")
        pairs = eigsh(
            at.hessian,
            k,
            which="LM",
            tol=0.05 if start is None else 0.1,
            start=start,
            random_columns=1,
            max_matvecs=6 * k,
            verify=False,
            generator=at.generator(f"control {k}"),
        )
        state.update(Q=pairs.vectors, values=pairs.values, age=0)
    state["age"] += 1
    return state["Q"], state["values"]


def _refitted(at: Snapshot, k: int | None) -> bool:
    """Whether the control vectors are new at this step."""
    k = min(10 if k is None else k, at.objective.num_params)
    return at.carry is not None and at.carry[("control", k)]["age"] == 1


def _over(numerator: Measurement, denominator: Measurement) -> Measurement:
    """A ratio with an exact denominator, whose rounding enters the floor."""
    d = float(denominator.value)  # type: ignore[arg-type]
    if numerator.value is None or d == 0.0:
        return missing("the gradient is zero, so the ratio does not exist")
    relative = float(denominator.floor) / d
    return numerator.scaled(1 / d, floor=abs(float(numerator.value)) / d * relative)


def _checked(found: Measurement) -> Measurement:
    if not math.isfinite(float(found.value)):  # type: ignore[arg-type]
        raise FloatingPointError("not finite: the parameters have diverged")
    return found
