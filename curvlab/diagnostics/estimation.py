"""Means of random samples with honest errors: drawn where they matter, pooled over a run, or sampled until narrow."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from ..linalg.probes import rademacher
from ..linalg.trace import quadratic_mean, sample_mean
from ..measurement import Measurement, half_width
from ..operators import noise_share
from ..snapshot import Snapshot

WINDOW = 8  # measured steps over which variance is pooled at most
FADE = 0.7  # weight of a step in the pool, relative to the next
PILOT = 16  # samples of the first stage when a target is given
BUDGET = 512  # samples at most when a target is given
POOL = 32  # random batches of which one is evaluated
SKETCH = 3  # random sums of example gradients that, with ∇L, predict the norm of a batch gradient

Samples = list[float] | tuple[Tensor, Tensor]


def default_probes(at: Snapshot, probes: int | None, single: int = 16, step: int = 2) -> int:
    """`probes`, or 16 at a single point and 2 a step in a run.

    Raises:
        ValueError: fewer than 2, which have no honest error.
    """
    probes = probes if probes is not None else (single if at.carry is None else step)
    if probes < 2:
        raise ValueError(f"probes is {probes}; an error needs at least 2 (16 is a good number at a single point)")
    return probes


def estimate(
    at: Snapshot,
    key: Hashable,
    draw: Callable[[int], Samples],
    *,
    probes: int,
    known: float = 0.0,
    scale: float | None = None,
    restart: bool = False,
    floor: float = 0.0,
    target: float | None = None,
    budget: int | None = None,
) -> Measurement:
    """`known` plus the mean of independent samples that ``draw(n)`` gives n more of: as numbers, or for quadratic forms
    zᵀMz as random signs Z and images Y = M Z, (p, n) each, which tell the variance much better (`quadratic_mean`).

    Without a target: `probes` samples. In a run their variance, relative to `scale`², is pooled over the last measured
    steps with fading weights, back to the last `restart`: where the samples depend on something that ages, such as a
    control variate that is refitted every 16 steps, variances before and after have nothing to do with each other. `scale`
    follows the size of the quantity (default: the result), so that a loss that falls by orders of magnitude does not spoil
    the pool.

    With a `target`, the half-width of the 95% interval relative to the value: Stein's two stages. A pilot of 16
    samples gives the variance, which fixes how many are drawn in all, at most `budget`; the variance of the pilot
    serves for the error too, with its degrees of freedom, so that stopping does not spoil the interval (a stop as soon
    as the interval looks narrow enough covers 81% instead of 95%). The note says if the budget ended first.

    Raises:
        ValueError: a target that is not positive, or a budget below the pilot.

    Source: Stein 1945 (doi 10.1214/aoms/1177731088).
    """
    if target is not None:
        return _two_stages(draw, known, floor, target, BUDGET if budget is None else budget)
    samples = draw(probes)
    found = _mean(samples, known, floor)
    scale = abs(float(found.value)) if scale is None else scale  # type: ignore[arg-type]
    if at.carry is None or scale == 0.0:
        return found
    history: list[float] = at.carry.setdefault(("variance", key), [])
    relative = float(found.error) / scale
    if not math.isfinite(relative):
        return found
    if restart:
        history.clear()
    history.append(relative * relative * probes)
    del history[:-WINDOW]
    weights = [FADE**age for age in range(len(history))]
    mean = sum(w * v for w, v in zip(weights, reversed(history), strict=True)) / sum(weights)
    steps = sum(weights) ** 2 / sum(w * w for w in weights)
    single = 0.75 * (probes - 1)
    if isinstance(
        samples, tuple
    ):  # images show the variance of each probe by itself, and few overstate their own worth
        single = min(float(found.df) * probes / (probes - 1), 2.0 * probes)
    return replace(found, error=scale * math.sqrt(mean / probes), df=max(1.0, single * steps))


def _mean(samples: Samples, known: float, floor: float) -> Measurement:
    if isinstance(samples, tuple):
        return quadratic_mean(*samples, offset=known, floor=floor)
    return sample_mean(samples, offset=known, floor=floor)


def _joined(one: Samples, two: Samples) -> Samples:
    if isinstance(one, tuple):
        return torch.cat([one[0], two[0]], 1), torch.cat([one[1], two[1]], 1)  # type: ignore[list-item]
    return one + two  # type: ignore[operator]


def _two_stages(draw: Callable[[int], Samples], known: float, floor: float, target: float, budget: int) -> Measurement:
    if target <= 0 or budget < PILOT:
        raise ValueError(
            f"got target={target} and budget={budget}; expected a relative error above 0 and at least {PILOT} samples, "
            "which the pilot takes"
        )
    samples = draw(PILOT)
    pilot = _mean(samples, known, floor)
    wanted = target * abs(float(pilot.value))  # type: ignore[arg-type]
    single = half_width(float(pilot.error) * math.sqrt(PILOT), "sem", pilot.df, 0.0, 0.95)  # of one sample
    room = wanted - floor
    needed = math.ceil((single / room) ** 2) if room > 0 else budget + 1
    total = max(PILOT, min(budget, needed))
    if total > PILOT:
        samples = _joined(samples, draw(total - PILOT))
    error = float(pilot.error) * math.sqrt(PILOT / total)
    value = _mean(samples, known, floor).value
    note = None
    if needed > budget:
        note = f"the budget of {budget} samples ended before the target; {needed} would be needed"
    return Measurement(value, error, "sem", df=pilot.df, floor=floor, note=note)


def likely_batches(
    at: Snapshot,
    b: int,
    count: int,
    score: Callable[[Tensor], Tensor],
    *,
    generator: torch.Generator,
    dots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices (count, b) of random batches that are likely to matter, and the weights (count,) that keep means unbiased.

    A few batches of long gradients often carry a mean, and uniform ones miss them all, value and error alike (coverage
    50-80%). Each batch is therefore drawn from a pool of 32 of its own (all examples for b = 1), half uniformly and half in
    proportion to ``score(‖g_b‖²)``; no weight exceeds 2. The norm need not be right, so it costs no gradient of the batch:
    with orthonormal Q, ‖g_b‖² ≈ ‖Qᵀg_b‖² + (γ/b) mean(‖g_i‖² - ‖Qᵀg_i‖²). Where the model couples the examples of a batch,
    batches are uniform.

    Args:
        dots: g_i·q_k, (N, K), of orthonormal q_k that carry much of the example gradients; default those of ∇L and 3 random
            sums of example gradients (4 products and 3 sums, shared).
    """
    n = at.objective.size
    size = 1 if at.objective.coupled else n if b == 1 else POOL
    if b == 1 and size == n:
        index = torch.arange(n)[None, :, None].expand(count, n, 1)
    elif at.replacement:
        index = torch.randint(n, (count, size, b), generator=generator)
    else:
        drawn = [torch.randperm(n, generator=generator)[:b] for _ in range(count * size)]
        index = torch.stack(drawn).view(count, size, b)
    if size == 1:
        return index[:, 0], torch.ones(count, dtype=torch.float64, device=at.w.device)
    dots = (_sketch(at) if dots is None else dots).cpu()
    rest = (at.examples.squared_norms().cpu() - dots.square().sum(1)).clamp_min(0)
    share = noise_share(n, b, at.replacement)
    scores = score(dots[index].mean(2).square().sum(2) + share * rest[index].mean(2))
    even = torch.full_like(scores, 1 / size)
    chance = 0.5 * even + 0.5 * torch.nan_to_num(scores / scores.sum(1, keepdim=True), nan=1 / size)
    chosen = torch.multinomial(chance, 1, generator=generator)
    batches = index.gather(1, chosen[:, :, None].expand(count, 1, b))[:, 0]
    return batches, (even / chance).gather(1, chosen)[:, 0].to(at.w.device)


def batch_gradients(at: Snapshot, batches: Tensor) -> Tensor:
    """Gradients (P, count) of batches given by indices (count, b)."""
    coefficients = torch.zeros(at.objective.size, len(batches), dtype=torch.float64)
    share = torch.full(batches.T.shape, 1 / batches.shape[1], dtype=torch.float64)
    coefficients.scatter_add_(0, batches.T, share)
    return at.examples.combine(coefficients.to(at.w.device, at.objective.dtype))


def _sketch(at: Snapshot) -> Tensor:
    """g_i·q_k for an orthonormal basis of ∇L and random sums of example gradients, (N, K) float64."""

    def compute() -> Tensor:
        signs = rademacher((at.objective.size, SKETCH), at.gradient, generator=at.generator("sketch"))
        V = torch.cat([at.gradient[:, None], at.examples.combine(signs)], 1)
        return at.examples.dot(torch.linalg.qr(V).Q).double()

    return at.shared("sketch", compute)
