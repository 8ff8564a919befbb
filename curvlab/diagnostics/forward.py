"""Curvature along the update from values of the loss alone: of derivatives, only the gradient that gives the direction."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..measurement import Measurement, missing
from ..snapshot import Snapshot
from .registry import NEEDS, diagnostic

DOUBLINGS = 30  # of a step, up or down, after which there is no bracket
MOVES = 30  # of a difference step, by a factor of two
NO_DIRECTION = "the gradient is zero, so it has no direction"


@diagnostic(
    "2/lr_c",
    formula="lr_c: largest step along the update after which the loss is not above its start",
    kind="bound",
    cost="1 gradient, shared, and 13-25 forward passes",
    divided=True,
)
def critical_sharpness(
    at: Snapshot, *, along: Literal["gradient", "batch_gradient"] = "gradient", tol: float = 1e-2
) -> Measurement:
    """The sharpness of the step about to be taken: with a learning rate lr above lr_c, thus 2/lr below this, it raises the
    loss.

    On a quadratic dᵀHd/gᵀd for an update -lr d: along the gradient, the `interaction_sharpness` of full batches.

    Estimator: w - lr d with d = ∇L(w), divided entry by entry by the preconditioner where the optimizer has a known one.
    From the learning rate (without one, from L/gᵀd) the step is doubled or halved, 30 times at most, until the loss passes
    its start, and the bracket is bisected. Losses are summed in float64.

    Error: half of the bracket that is left, at most `tol` of the value; the floor is what the rounding of a loss moves the
    crossing by, as the scatter of seven losses a few roundings apart shows it.

    Fails: no value where no bracket is found, where the loss stops being finite before it rises above its start, where the
    gradient is zero, or where the loss changes by no more than its rounding. Momentum and weight decay are not in d. Where
    the loss rises and falls again on the way, it is one of its crossings, and need not be the first.

    Args:
        along: the gradient of the measured loss, or that of the batch about to be used, penalties included.
        tol: half width of the interval, relative to the value.

    Source: arXiv 2601.16979.
    """
    g = at.gradient if along == "gradient" else at.batch_gradient
    if g is None:
        return missing(f"there is no gradient of a batch: {NEEDS['batch_gradient']}")
    d = g if at.preconditioner is None else g / at.preconditioner
    slope = float(at.objective.entries.dot(at.gradient, d))
    if slope == 0.0:
        return missing(NO_DIRECTION)
    loss = _Ray(at, -d)
    step = at.lr or abs(loss.start / slope) or 1.0
    falls = loss.falls(step)
    for _ in range(DOUBLINGS):
        last, step = step, 2 * step if falls else step / 2
        if loss.falls(step) != falls:
            break
    else:
        how = "does not exceed" if falls else "exceeds"
        return missing(f"no bracket: after a step of {step:.3g}, {DOUBLINGS} factors of two away, the loss {how} its start")
    low, high = sorted((last, step))
    if high * abs(slope) <= 16 * loss.rounding:
        return missing("steps at which the loss might rise change it by no more than its rounding; measure in float64")
    rise, blur = math.nan, 0.0
    while high - low > max(tol * (high + low), blur) and low < (middle := (low + high) / 2) < high:
        if not math.isfinite(rise) and math.isfinite(loss(high)):
            rise = (loss(high) - loss(low)) / (high - low)
            blur = 4 * loss.rounding / rise
        low, high = (middle, high) if loss.falls(middle) else (low, middle)
    if not math.isfinite(rise):
        return missing(f"the loss does not exceed its start up to a step of {low:.3g}, after which it is not finite")
    return Measurement(1 / low + 1 / high, 1 / low - 1 / high, "bound", floor=2 * blur / low**2)


@diagnostic(
    "gᵀHg/‖g‖² by differences",
    formula="(L(w + hu) - 2L(w) + L(w - hu))/h², u = ∇L/‖∇L‖",
    kind="bound",
    cost="1 gradient, shared, and 13-20 forward passes",
    divided=True,
)
def difference_sharpness(at: Snapshot, *, tol: float = 1e-3) -> Measurement:
    """Curvature along the gradient without a second derivative: the `interaction_sharpness` of full batches.

    Estimator: second differences of the loss over h, 2h and 4h, of which two pairs are extrapolated to fourth order. h
    starts at the sixth root of the rounding unit, and is doubled where rounding is the larger error and halved where
    truncation is, until both together are at most `tol` of the value, or balance. It is not doubled beyond where the loss
    has another slope than ‖∇L‖, by a half. Losses are summed in float64.

    Error: what the two extrapolations differ by, about 15 times the error of the finer one; the floor is 8 standard
    deviations of the rounding of a loss over h², as the scatter of seven losses a few roundings apart shows it.

    Fails: where the error is larger than the value, which the note says: in float32 late in training. No value where the
    gradient is zero, the loss is not finite around w, or its differences do not settle: those of relu networks see kinks,
    which the Hessian does not, and are off by factors.

    Args:
        tol: relative error that will do.

    Source: Abramowitz and Stegun 1964, 25.3.23, with Richardson extrapolation; Moré and Wild 2011 (doi 10.1137/100786125)
    for the rounding.
    """
    g = at.gradient
    length = float(at.objective.entries.norms(g))
    if length == 0.0:
        return missing(NO_DIRECTION)
    loss = _Ray(at, g / length)

    def second(h: float) -> float:
        return (loss(h) - 2 * loss.start + loss(-h)) / h**2

    h, best = torch.finfo(at.objective.dtype).eps ** (1 / 6), (math.inf, math.nan, math.inf, math.inf)
    for _ in range(MOVES):
        near, middle, far = second(h), second(2 * h), second(4 * h)
        found = near + (near - middle) / 3
        truncation, rounding = abs(found - middle - (middle - far) / 3), 8 * loss.rounding / h**2
        bent = abs((loss(4 * h) - loss(-4 * h)) / (8 * h) - length) > length / 2 + loss.rounding / h
        if bent or not math.isfinite(truncation):
            truncation = math.inf
        elif truncation + rounding >= best[0]:
            break
        else:
            best = (truncation + rounding, found, truncation, rounding)
            if best[0] <= tol * abs(found):
                break
        h = h / 2 if truncation > rounding else 2 * h
    total, value, truncation, rounding = best
    if not math.isfinite(total):
        return missing("the loss is not finite around the point")
    if total > tol * abs(value) and truncation > 16 * rounding:  # a smooth loss would have let them balance
        return missing("second differences of the loss do not settle as their step shrinks, as at the kinks of relu")
    note = None if total < abs(value) else "not resolved from zero; measure in float64"
    rounding += 16 * torch.finfo(torch.float64).eps * abs(value)
    return Measurement(value, truncation, "bound", floor=rounding, note=note)


class _Ray:
    """The loss on a line through a snapshot's point, w + t d; each value is computed once."""

    def __init__(self, at: Snapshot, d: Tensor) -> None:
        self._at, self._d = at, d
        self._known: dict[float, float] = {}
        self.start = self(0.0)

    def __call__(self, t: float) -> float:
        if t not in self._known:
            self._known[t] = float(self._at.objective.value(self._at.w + t * self._d))
        return self._known[t]

    def falls(self, t: float) -> bool:
        """Whether the loss at t is not above its start; it is where it is not finite."""
        return self(t) <= self.start

    @cached_property
    def rounding(self) -> float:
        """Standard deviation of the rounding of a loss: of what is left in third differences of values so close together
        that a smooth function has none (Moré and Wild 2011); at least that of a sum of N roundings of the mean loss."""
        L = self._at.objective
        eps, least = torch.finfo(L.dtype).eps, torch.finfo(torch.float64).eps
        apart = 32 * eps * float(L.entries.norms(self._at.w) / L.entries.norms(self._d))
        values = torch.tensor([self(i * apart) for i in range(7)], dtype=torch.float64)
        scatter = float((values.diff(n=3).square().mean() / 20).sqrt())
        return max(scatter, max(eps / math.sqrt(L.size), least) * abs(self.start))
