"""The distribution of the mini-batch gradient: its moments, concentration, and directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..measurement import Kind, Measurement, missing
from ..operators import noise_share
from ..snapshot import Snapshot
from .estimation import batch_gradients, default_probes, estimate, likely_batches
from .registry import batch_sizes, diagnostic
from .sampled import S_B, S_N, sampled_moments
from .tracking import subspace_error, top_eigenpairs
from .values import exact

BatchSizes = int | Sequence[int] | None


@diagnostic("tr(S_b)", formula="E‖g_b‖² = (γ/b) tr(S_1) + (1 - γ/b) ‖∇L‖²", kind="exact", cost="1 gradient, shared")
def gradient_second_moment_trace(
    at: Snapshot, *, batch_size: BatchSizes = None, samples: int | None = None
) -> Measurement:
    """Expected squared norm of the mini-batch gradient, E‖g_b‖²; for b = 1 (also the default) the mean of ‖g_i‖².

    Estimator: exact per-example norms, layer by layer, without forming a gradient; a sequence of batch sizes gives a
    curve from the same two traces.

    Error: a standard error (jackknife) where moments are sampled: under batch statistics, and for a population.

    Fails: parameters of layers without a rule (`curvlab.layers`), and of layers that are tied or used twice, go by
    vmap, at many times the cost. Under batch statistics b = 1 is refused.

    Args:
        samples: of `curvlab.diagnostics.sampled.sampled_moments`, where moments are sampled: mini-batches with statistics of
            their own, or groups of the examples that are a sample of a population.

    Source: Lee 2022, eq. 1 and 12.
    """
    asked = batch_size if batch_size is not None else at.batch_size

    def trace(b: int) -> Measurement:
        sampled = sampled_moments(at, b, samples, curvature=False)
        return sampled.entry(S_B) if sampled else second_moment(at, b)

    return over_batch_sizes(at, 1 if asked is None else asked, trace)


@diagnostic("Γ", formula="tr(C_1) = (1/N) Σ ‖g_i‖² - ‖∇L‖²", kind="exact", cost="1 gradient, shared")
def gradient_variance(at: Snapshot) -> Measurement:
    """Trace of the covariance of per-example gradients; E‖g_b - ∇L‖² is γ/b times this.

    Estimator: exact per-example norms, layer by layer, less ‖∇L‖².

    Error: the floor is relative to tr(S_1), of which ‖∇L‖² is subtracted. A standard error for a population.

    Fails: where 1% of the examples carry more than half of it (the note says so), over more data it may not exist at
    all. Refused under batch statistics.

    Source: Smith et al. 2021 (arXiv 2101.12176), eq. 22 and 32.
    """
    sampled = sampled_moments(at, 1, None, curvature=False)
    if sampled:
        return sampled.of(lambda x: x[..., S_B] - x[..., S_N])
    total = mean_squared_norm(at)
    found = exact(total - squared_norm(at), at.objective, scale=total)
    share, count = _top_share(at)
    if at.objective.size >= 100 and share > 0.5:
        found = replace(found, note=f"heavy tails: {count} examples (1%) carry {share:.0%} of it")
    return found


@diagnostic(
    "top 1% of Γ", formula="share of Γ of the 1% of examples with the largest ‖g_i - ∇L‖²", kind="exact",
    cost="2 gradients, shared",
)  # fmt: skip
def gradient_variance_top_share(at: Snapshot) -> Measurement:
    """How much of Γ the largest 1% of the examples carry, at least one: near 0.01 for light tails, 1 for the heaviest.

    Estimator: all ‖g_i - ∇L‖², from per-example norms and products with ∇L; no sampling.

    Fails: of fewer than 150 examples the 1% is a single one, so that light tails give 1/N instead of 0.01. No value
    where all gradients are equal. Refused under batch statistics.

    Source: Smith et al. 2021 (arXiv 2101.12176), sec. 3, on heavy tails.
    """
    share, _ = _top_share(at)
    return missing("all per-example gradients are equal") if share != share else exact(share, at.objective)


@diagnostic("tr(C_1)/‖∇L‖²", formula="Γ/‖∇L‖²", kind="exact", cost="1 gradient, shared")
def gradient_noise_scale(at: Snapshot) -> Measurement:
    """The simple noise scale, a batch size: from there on larger batches bring little.

    Estimator: Γ and ‖∇L‖², both exact.

    Error: a standard error (jackknife, with the bias of the ratio removed) for a population.

    Fails: of a sample of the data it is too small, since noise adds to ‖∇L‖²: state `population_size`. Near a minimum
    it grows without bound as ‖∇L‖ vanishes; where ‖∇L‖ is zero, or not resolved from zero, there is no value. Refused
    under batch statistics.

    Source: McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.9.
    """
    sampled = sampled_moments(at, 1, None, curvature=False)
    if sampled:
        return sampled.of(lambda x: x[..., S_B] / x[..., S_N] - 1, below=S_N)
    full, total = squared_norm(at), mean_squared_norm(at)
    if full == 0.0:
        return missing("the gradient is zero, so the ratio does not exist")
    return exact((total - full) / full, at.objective, scale=total / full)


@diagnostic(
    "mean cos(g_i, g_j)", formula="mean cosine between the gradients of two different examples", kind="exact",
    cost="1 gradient, shared",
)  # fmt: skip
def example_gradient_cosine(at: Snapshot) -> Measurement:
    """Mean cosine over all pairs of different examples, of their gradients.

    Estimator: (‖Σ ĝ_i‖² - N)/(N(N-1)) with ĝ_i = g_i/‖g_i‖: every pair, without forming any, and without any sampling.

    Fails: no value where an example has a zero gradient. An example with a tiny gradient counts as much as one that
    moves the parameters; with pairs weighted by length it would be about the ρ_1 of `gradient_concentration`. Refused
    under batch statistics.
    """
    norms, N = at.examples.squared_norms().sqrt(), at.objective.size
    if N < 2 or not bool((norms > 0).all()):
        return missing("needs two examples, none with a zero gradient")
    total = at.examples.combine((1 / norms).to(at.objective.dtype)[:, None])
    return exact((float(total.double().square().sum()) - N) / (N * (N - 1)), at.objective, scale=1.0)


@diagnostic(
    "R̄_b²", formula="‖E[g_b/‖g_b‖]‖²", kind="sem", cost="16 sums over examples; 4 in a run", needs=["batch_size"]
)
def mean_resultant_length(at: Snapshot, *, batch_size: BatchSizes = None, samples: int | None = None) -> Measurement:
    """Squared mean resultant length of the directions of mini-batch gradients; compare with ρ_b.

    Estimator: m independent batches and the mean cosine of different pairs, (‖Σ ĝ‖² - m)/(m(m-1)), which has no bias;
    the plain squared mean has one of about (1 - R̄²)/m. For b = 1 all examples, exact.

    Error: that of the jackknife over batches, with m - 1 degrees of freedom.

    Fails: no value from two batches, which have no error, or where a batch has a zero gradient. Small lengths need many
    batches, more than the 4 of a run. Refused under batch statistics.

    Source: Lee 2022, sec. 5.1; Mardia and Jupp 2000.
    """

    def length(b: int) -> Measurement:
        if b == 1:
            inverse = 1 / at.examples.squared_norms().sqrt()
            if not bool(torch.isfinite(inverse).all()):
                return missing("the gradient of a batch is zero")
            mean = at.examples.combine(inverse[:, None].to(at.objective.dtype)).double() / at.objective.size
            return exact(float(mean.square().sum()), at.objective, scale=1.0)
        G = _batch_gradients(at, b, default_probes(at, samples, step=4))
        norms = G.norm(dim=0)
        if not bool((norms > 0).all()):
            return missing("the gradient of a batch is zero")
        m = G.shape[1]
        if m == 1:
            return Measurement(1.0)
        cosines = (G / norms).T @ (G / norms)
        rows = cosines.sum(1) - 1
        value = float(rows.sum()) / (m * (m - 1))
        if m == 2:
            return missing("an error needs at least 3 batches: pass samples=16")
        without = (rows.sum() - 2 * rows) / ((m - 1) * (m - 2))
        error = math.sqrt((m - 1) / m * float((without - without.mean()).square().sum()))
        return Measurement(value, error, "sem", df=m - 1, floor=16 * torch.finfo(at.objective.dtype).eps)

    return over_batch_sizes(at, batch_size, length)


@diagnostic(
    "std‖g_b‖/E‖g_b‖", formula="coefficient of variation of the batch gradient's norm", kind="sem",
    cost="23 sums over examples; 11 in a run", needs=["batch_size"],
)  # fmt: skip
def batch_gradient_norm_variation(
    at: Snapshot, *, batch_size: BatchSizes = None, samples: int | None = None
) -> Measurement:
    """Spread of ‖g_b‖ over batches; where it is small R̄_b² and ρ_b agree.

    Estimator: with s² = tr(S_b), which is exact, E‖g_b‖ = s(1 - d), d = E(‖g_b‖ - s)²/(2s²), and the coefficient of
    variation is √((1 - d)^{-2} - 1). Only d is estimated, from batches that are drawn half uniformly and half in
    proportion to the (‖g_b‖ - s)² that is predicted for them. For b = 1 all examples, exact.

    Error: that of d, to first order, pooled over steps in a run.

    Fails: near zero the first-order error exceeds the value and says only that the spread is small. No value where the
    gradient of every batch is zero. Refused under batch statistics.

    Source: Lee 2022, sec. 5.1.
    """

    def variation(b: int) -> Measurement:
        if b == 1:
            norms = at.examples.squared_norms().sqrt()
            return exact(float(norms.std(correction=0) / norms.mean()), at.objective)
        if noise_share(at.objective.size, b, at.replacement) == 0.0:
            return Measurement(0.0)
        s = math.sqrt(float(second_moment(at, b).value))  # type: ignore[arg-type]
        if s == 0.0:
            return missing("the gradient of every batch is zero")
        generator = at.generator(f"batch_gradient_norm_variation {b}")

        def draw(count: int) -> list[float]:
            batches, inverse = likely_batches(at, b, count, lambda n2: (n2.sqrt() - s).square(), generator=generator)
            norms = torch.linalg.vector_norm(batch_gradients(at, batches).double(), dim=0)
            return (inverse * (norms / s - 1).square() / 2).tolist()

        key, count = ("batch_gradient_norm_variation", b), default_probes(at, samples, step=4)
        found = estimate(at, key, draw, probes=count, scale=1.0)
        floor = 16 * torch.finfo(at.objective.dtype).eps
        mean = max(1 - float(found.value), math.sqrt(squared_norm(at)) / s, floor)  # type: ignore[arg-type]
        value = math.sqrt(max(mean**-2 - 1, 0.0))
        return replace(found, value=value, error=float(found.error) / (mean**3 * max(value, floor)), floor=floor)

    return over_batch_sizes(at, batch_size, variation)


@diagnostic(
    "tr(Q_kᵀ S_b Q_k)/tr(S_b)", formula="share of batch gradients in the span of the k top eigenvectors of H",
    kind="bound", cost="products for k+1 eigenpairs and k products g_i·q", needs=["batch_size"],
)  # fmt: skip
def batch_gradient_top_share(
    at: Snapshot, *, batch_size: BatchSizes = None, k: int = 5, tol: float = 1e-3
) -> Measurement:
    """Expected squared length of g_b in the top-k eigenspace of the Hessian over E‖g_b‖², 0 to 1.

    Estimator: tracked eigenvectors, and g_i·q_k of every example: exact over batches.

    Error: bounds what the error of the eigenspace does to it, as in `gradient_top_share`.

    Fails: where λ_k and λ_{k+1} are too close to be told apart the bound reaches 1, although the share may be right:
    choose k at a gap, such as the number of classes. A tight `tol` makes every step of a run as dear as a point.
    Refused under batch statistics.

    Source: Lee 2022, sec. 5.1; Gur-Ari et al. 2018 (arXiv 1812.04754).
    """
    pairs = top_eigenpairs(at, k + 1, tol)
    Q = pairs.vectors[:, :k]
    each = float(at.examples.dot(Q).double().square().sum(1).mean())
    full = float((Q.T.double() @ at.gradient.double()).square().sum())

    def share(b: int) -> Measurement:
        noise, total = noise_share(at.objective.size, b, at.replacement), second_moment(at, b).value
        if not total:
            return missing("the gradient of every batch is zero")
        value = (noise * each + (1 - noise) * full) / float(total)
        floor = 16 * torch.finfo(at.objective.dtype).eps
        return Measurement(value, subspace_error(pairs, k), "bound", floor=floor)

    return over_batch_sizes(at, batch_size, share)


@diagnostic(
    "E|∂ℓ/∂z_c|", formula="mean absolute gradient of the loss in each output", kind="exact", cost="1 forward pass"
)
def loss_output_gradient(at: Snapshot) -> Measurement:
    """Mean over examples of |∂ℓ/∂z_c| for each output c, over an axis "output".

    What reaches the outputs of the model from the loss; its collapse explains why penalties on Jacobians of the outputs
    differ from penalties on gradients of the loss.

    Estimator: one forward pass, and the derivative of the loss in its outputs alone.

    Fails: no value where a `batch_loss` calls the model itself. Outputs of several dimensions are flattened: a model of
    sequences has an entry for every position and class.

    Source: Novack et al. 2022 (arXiv 2211.15853), eq. 2 and 5.
    """
    L, parts = at.objective, []
    with L.measuring():
        params = [p.detach() for p in L.leaves_at(at.w)]
        for chunk in L.chunks() if L.pieces() else [L.first(1)]:  # a rank without examples has zeros of their size
            try:
                z = L.outputs(params, chunk).detach().requires_grad_()
            except TypeError:  # a batch_loss calls the model itself
                return missing("the loss calls the model itself, so its outputs are unknown")
            losses = L.loss(z, chunk.batch[1])  # type: ignore[operator]
            (dz,) = torch.autograd.grad(losses.sum() if chunk.weights is None else losses @ chunk.weights, z)
            parts.append(dz.double().abs().reshape(len(dz), -1).sum(0))
    total = torch.stack(parts).sum(0) if L.pieces() else torch.zeros_like(parts[0])
    values = (L.ranks.sum(total)[0] / L.size).cpu().numpy()
    zero = np.zeros(len(values))
    floor = 16 * torch.finfo(L.dtype).eps * values
    return Measurement(values, zero, "exact", zero + np.inf, floor, axis=("output", tuple(range(len(values)))))


@diagnostic("ρ_b", formula="‖∇L‖² / tr(S_b)", kind="exact", cost="1 gradient, shared", needs=["batch_size"])
def gradient_concentration(at: Snapshot, *, batch_size: BatchSizes = None, samples: int | None = None) -> Measurement:
    """How concentrated mini-batch gradients are, 0 to 1; 1 for full batches without replacement.

    Estimator: exact traces, as `gradient_second_moment_trace`; `samples` as there.

    Error: a standard error (jackknife, with the bias of the ratio removed) under batch statistics and for a population.

    Fails: of a sample of the data it is too large, since noise adds to ‖∇L‖²: state `population_size`. No value where
    all gradients are zero. Under batch statistics b = 1 is refused.

    Source: Lee 2022, Definition 3 and eq. 12.
    """

    def rho(b: int) -> Measurement:
        sampled = sampled_moments(at, b, samples, curvature=False)
        if sampled:
            return sampled.ratio(S_N, S_B)
        total = float(second_moment(at, b).value)  # type: ignore[arg-type]
        if not total:
            return missing("the gradient of every batch is zero")
        if noise_share(at.objective.size, b, at.replacement) == 0.0:
            return Measurement(1.0)
        found = exact(squared_norm(at) / total, at.objective)
        return replace(found, floor=found.floor + 2 * math.sqrt(squared_norm(at)) * at.gradient_floor / total)

    return over_batch_sizes(at, batch_size, rho)


def _batch_gradients(at: Snapshot, b: int, count: int) -> Tensor:
    """Gradients of independent uniform batches, (P, count) float64; one where every batch is the data set."""
    n, generator = at.objective.size, at.generator(f"batch gradients {b}")
    if noise_share(n, b, at.replacement) == 0.0:
        return at.gradient[:, None].double()
    if at.replacement:
        return batch_gradients(at, torch.randint(n, (count, b), generator=generator)).double()
    drawn = [torch.randperm(n, generator=generator)[:b] for _ in range(count)]
    return batch_gradients(at, torch.stack(drawn)).double()


def _top_share(at: Snapshot) -> tuple[float, int]:
    """Share of Γ of the 1% of the examples (at least one) that carry most of it, and how many those are."""

    def compute() -> tuple[float, int]:
        g = at.gradient
        along = at.examples.dot(g[:, None])[:, 0].double()
        distances = (at.examples.squared_norms() - 2 * along + squared_norm(at)).clamp(min=0)
        count = max(1, round(len(distances) / 100))
        total = float(distances.sum())
        return float(distances.topk(count).values.sum()) / total if total > 0 else math.nan, count

    return at.shared("variance_top_share", compute)


def squared_norm(at: Snapshot) -> float:
    """‖∇L‖² = tr(S_n)."""
    return float(at.gradient.double().square().sum())


def mean_squared_norm(at: Snapshot) -> float:
    """(1/N) Σ ‖g_i‖² = tr(S_1)."""
    return at.shared("mean_squared_norm", lambda: float(at.examples.squared_norms().mean()))


def second_moment(at: Snapshot, b: int) -> Measurement:
    """tr(S_b), exact."""
    share = noise_share(at.objective.size, b, at.replacement)
    total = share * mean_squared_norm(at) if share else 0.0
    found = exact(total + (1 - share) * squared_norm(at), at.objective)
    return replace(found, floor=found.floor + 2 * (1 - share) * math.sqrt(squared_norm(at)) * at.gradient_floor)


def over_batch_sizes(
    at: Snapshot, batch_size: BatchSizes | tuple[int, ...], one: Callable[[int], Measurement]
) -> Measurement:
    """`one(b)` for one batch size, or an array over the axis "batch_size" for several; default those of the snapshot.

    Raises:
        ValueError: no batch size at all.
    """
    batch_size = at.batch_size if batch_size is None else batch_size
    if batch_size is None:
        raise ValueError("batch_size is missing; pass batch_size=32, or a sequence of batch sizes")
    sizes = batch_sizes(batch_size)
    if not isinstance(sizes, tuple):
        return one(int(sizes))  # type: ignore[arg-type]
    found = [one(b) for b in sizes]
    without = next((m for m in found if m.value is None), None)
    if without is not None:
        return without
    kind: Kind = next((m.kind for m in found if m.kind != "exact"), "exact")

    def column(name: str) -> np.ndarray:
        return np.array([getattr(m, name) for m in found], dtype=float)

    note = next((m.note for m in found if m.note), None)
    return Measurement(
        column("value"),
        column("error"),
        kind,
        column("df"),
        column("floor"),
        axis=("batch_size", sizes),
        note=note,
    )
