"""Means of random samples with honest errors: pooled over the steps of a run, or sampled until narrow enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from ..linalg.trace import credited, quadratic_mean, sample_mean
from ..measurement import Measurement, half_width
from ..snapshot import Snapshot

WINDOW = 8  # measured steps over which variance is pooled at most
FADE = 0.7  # weight of a step in the pool, relative to the next
PILOT = 16  # samples of the first stage when a target is given
BUDGET = 512  # samples at most when a target is given


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
    control variate that is refitted every 8 steps, variances before and after have nothing to do with each other. `scale`
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
    # Images show the variance of each probe by itself; numbers only their differences.
    df = probes * steps if isinstance(samples, tuple) else credited((probes - 1) * steps)
    return replace(found, error=scale * math.sqrt(mean / probes), df=df)


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
