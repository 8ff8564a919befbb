"""Levels and trends of autocorrelated series, with intervals that do not pretend to independence.

A series is cut into ten contiguous batches. Their medians are nearly independent as soon as a batch is longer than the
memory of the series, so a t interval over the ten is honest where one over all steps would be far too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

BATCHES = 10


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def level(x: np.ndarray) -> Estimate:
    """Mean of ten batch medians, with a t interval (9 degrees of freedom)."""
    return mean_over_seeds(batch_medians(x))


def trend(x: np.ndarray) -> Estimate:
    """Total change over the window: the slope of the ten batch medians times ten, with a t interval (8 degrees)."""
    z = batch_medians(x)
    k = np.arange(BATCHES) - (BATCHES - 1) / 2
    slope = (k @ z) / (k @ k)
    rest = z - z.mean() - slope * k
    half = _t(BATCHES - 2) * math.sqrt(rest @ rest / (BATCHES - 2) / (k @ k))
    return Estimate(float(BATCHES * slope), float(BATCHES * (slope - half)), float(BATCHES * (slope + half)))


def batch_medians(x: np.ndarray, batches: int = BATCHES) -> np.ndarray:
    """Medians of contiguous batches of nearly equal length."""
    return np.array([np.median(part) for part in np.array_split(x, batches)])


def first_sustained(above: np.ndarray, window: int, share: float = 0.9) -> int | None:
    """The first index where `above` is true and true for at least `share` of the next `window` entries."""
    for i in np.flatnonzero(above[: len(above) - window + 1]):
        if above[i : i + window].mean() >= share:
            return int(i)
    return None


def block_bootstrap(
    x: np.ndarray,
    y: np.ndarray,
    statistic: Callable[[np.ndarray, np.ndarray], float],
    *,
    draws: int = 400,
    seed: int = 0,
) -> Estimate:
    """A statistic of pairs in time order, with the 95% quantiles over moving blocks of length √n."""
    n = len(x)
    length = max(3, round(math.sqrt(n)))
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        starts = rng.integers(0, n - length + 1, math.ceil(n / length))
        index = (starts[:, None] + np.arange(length)).ravel()[:n]
        values.append(statistic(x[index], y[index]))
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(statistic(x, y)), float(low), float(high))


def _t(df: int, comparisons: int = 1) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, 1 - 0.025 / comparisons))


def mean_over_seeds(values: Iterable[float], *, comparisons: int = 1) -> Estimate:
    """Mean of independent values with its 95% t interval; of infinite width for fewer than two.

    Args:
        comparisons: how many such means there are of which one is looked at; the interval then holds for all of them at
            once (Bonferroni), so it also holds for one that was picked because it is the best.

    Example:
        >>> str(mean_over_seeds([1.0, 2.0, 3.0]))
        '2 [-0.484, 4.48]'
    """
    x = np.array(list(values), dtype=float)
    if len(x) < 2:
        return Estimate(float(x[0]) if len(x) else math.nan, -math.inf, math.inf)
    half = _t(len(x) - 1, comparisons) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Estimate(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def average(x: np.ndarray) -> Estimate:
    """Mean of ten contiguous batches, with a t interval (9 degrees of freedom): for shares, whose medians are 0 or 1."""
    return mean_over_seeds(np.mean(part) for part in np.array_split(x, BATCHES))
