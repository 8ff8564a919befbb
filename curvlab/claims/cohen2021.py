"""Cohen, Kaur, Li, Kolter and Talwalkar 2021 (arXiv 2103.00065): gradient descent at the edge of stability."""

from __future__ import annotations

import numpy as np

from ..runs import Run
from .plain_descent import FALLING, MIN_STEPS, MIN_WINDOW, PlainDescent
from .registry import Verdict, claim
from .statistics import first_sustained, level, trend


@claim(
    source="Cohen et al. 2021, sec. 3",
    sentence="Under full-batch gradient descent the sharpness rises to 2/lr and then hovers at or just above it, while the "
    "loss keeps falling.",
)
def edge_of_stability(run: Run) -> Verdict:
    """Sharpness crosses 2/lr for good and hovers above it.

    Statistic: level of s = sharpness·lr/2 from the crossing to the end. The crossing is the first measured step with
    s > 1 after which at least 90% of the next max(20, T/30) measured ones have s > 1, so a start above 2/lr for a step or
    two does not count.

    Holds: s starts below 1 and has moved by at least 5% in the run (on a quadratic it is constant, wherever it lies); the
    interval of the level lies in (0.95, 1.5), s ≥ 0.95 at 80% of the steps or more, and the trend of log L over
    that window is below -0.001.
    Does not hold: the level lies outside the band, or s ≥ 0.95 at less than 60%; the run diverged; or it never crosses
    although the sharpness no longer rises.
    Undecided: a run that ends too early, or starts above 2/lr, or anything between.
    Not applicable: mini-batches, or an optimizer whose threshold is not 2/lr.

    On the controls (linear regression with GD and SGD) the sharpness is constant, so it never holds.
    """
    name = "edge_of_stability"
    logs = PlainDescent(run)
    if logs.refusal or not logs.full_batch:
        why = logs.refusal or f"batches of {logs.batch_size}: the claim is about full-batch descent"
        return Verdict(name, "not applicable", why)
    steps, (loss, sharpness) = logs.columns("loss", "sharpness")
    s = sharpness * logs.lr / 2
    if logs.diverged:
        return Verdict(name, "does not hold", "the loss diverged")
    crossing = first_sustained(s > 1, max(20, len(s) // 30))
    if crossing is None:
        rising = trend(np.log(np.maximum(s[len(s) // 2 :], 1e-12))) if len(s) >= MIN_STEPS else None
        if rising is None or rising.low > 0.01:
            return Verdict(
                name, "undecided", "not at 2/lr yet, and the run is short or the sharpness still rises; train longer"
            )
        return Verdict(name, "does not hold", f"never crosses 2/lr and no longer rises; ends at {s[-1]:.2f} of it")
    if len(s) - crossing < MIN_WINDOW:
        return Verdict(name, "undecided", f"crosses 2/lr at step {steps[crossing]}, too near the end; train longer")
    window = slice(crossing, None)
    at, falling = level(s[window]), trend(np.log(loss[window]))
    share = float((s[window] >= 0.95).mean())
    moved = float(s.max() / s.min()) if s.min() > 0 else np.inf
    if crossing == 0 or moved < 1.05:
        decision = "does not hold" if moved < 1.05 else "undecided"
        reason = "the curvature never moved" if moved < 1.05 else "starts above 2/lr, so there is no crossing to see"
    elif at.low > 0.95 and at.high < 1.5 and share >= 0.8 and falling.high < FALLING:
        decision, reason = "holds", f"crosses at step {steps[crossing]}, then hovers while the loss falls"
    elif at.high < 0.95 or at.low > 1.5 or share < 0.6:
        decision, reason = "does not hold", f"does not stay near 2/lr: at least 0.95 of it at {share:.0%} of the steps"
    else:
        decision, reason = "undecided", "the level or the fall of the loss is not clear; train longer"
    return Verdict(
        name, decision, reason, at.value, at.interval, "0.95 to 1.5 (sharpness·lr/2)",  # type: ignore[arg-type]
        {"crossing": int(steps[crossing]), "share_above": share, "log_loss_trend": str(falling)},
    )  # fmt: skip
