"""Gradient norms of regimes over training, as distances to those of small batches; hides how trajectories are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .regimes import MARGINS, Member, Regime, Regimes, Seed
from .statistics import Estimate, mean_over_seeds

EARLY = 10  # of the 40 parts of a trajectory


class Trajectories:
    """How far the gradient norms of regimes are from those of small batches, seed by seed.

    The distance of two runs is the mean of |log ‖∇L_M‖ - log ‖∇L_M'‖| over parts of training, of which there are 40; of
    small batches ‖∇L_M‖ is the norm of the batch, of large ones the mean over micro-batches as large as small batches.
    """

    def __init__(self, regimes: Regimes, metric: str = "") -> None:
        self.regimes, self.metric = regimes, metric
        lengths = [m.run.records[-1]["step"] + 1 for m in regimes.small.members + regimes.large.members]
        self.steps = min(lengths)

    def best(self, regime: Regime) -> dict[Seed, Member]:
        """The runs that are looked at: those whose ends are the best."""
        metric = self.metric or next(
            (name for name in MARGINS if all(name in m.run.names for m in regime.members)), None
        )
        if metric is None and len(regime.by_choice) > 1:
            raise KeyError(
                f"{regime.label} has {len(regime.by_choice)} settings; needs test_accuracy to choose the best"
            )
        return regime.best(metric) if metric else next(iter(regime.by_choice.values()))

    def logs(self, regime: Regime) -> dict[Seed, np.ndarray]:
        """Logarithms of the norms, (40,), by seed."""
        return {seed: m.trajectory(self.regimes.b, self.steps) for seed, m in self.best(regime).items()}

    def distances(self, regime: Regime, part: slice = slice(EARLY)) -> dict[Seed, float]:
        """To small batches of the same seed."""
        ours, small = self.logs(regime), self.logs(self.regimes.small)
        return {s: float(np.abs(ours[s] - small[s])[part].mean()) for s in ours if s in small}

    def scatter(self, part: slice = slice(EARLY)) -> dict[Seed, float]:
        """The mean distance of small batches to others, with the same initialization if there are such, by seed."""
        logs = self.logs(self.regimes.small)
        pairs = [(s, t) for s in logs for t in logs if s != t]
        pairs = [(s, t) for s, t in pairs if s[0] == t[0]] or pairs
        return {
            s: float(np.mean([np.abs(logs[s] - logs[t])[part].mean() for q, t in pairs if q == s])) for s, _ in pairs
        }


def ratio(over: Mapping[Seed, float], under: Mapping[Seed, float], *, comparisons: int = 1) -> Estimate:
    """Geometric mean of paired ratios over seeds, with its 95% t interval."""
    logs = [math.log(max(over[s], 1e-12) / max(under[s], 1e-12)) for s in over if s in under]
    e = mean_over_seeds(logs, comparisons=comparisons)
    if math.isnan(e.value):
        return e
    return Estimate(*(math.exp(x) if x < 700 else math.inf for x in (e.value, e.low, e.high)))
