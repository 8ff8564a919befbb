"""Lee 2022: the interaction of SGD with the loss landscape (Definition 1, eq. 6 and 9)."""

from __future__ import annotations

import numpy as np

from ..runs import Run
from .plain_descent import FALLING, MIN_STEPS, PlainDescent, plateau, plateau_start
from .registry import Decision, Verdict, claim
from .statistics import batch_medians, block_bootstrap, level, trend

BAND = (0.85, 1.25)  # in units of 2/lr: measured plateaus sit 0-10% above it


@claim(
    source="Lee 2022, Definition 1 and sec. 4",
    sentence="tr(H S_b)/tr(S_n) rises to 2/lr and oscillates around it, for GD and SGD: the edge of stability.",
)
def interaction_edge(run: Run) -> Verdict:
    """`instability` oscillates around 2/lr, at an edge and not by balance of noise alone.

    Statistic: level of x = instability·lr/2 over the plateau: the steps after its arrival near 1, in the second half of
    the run.

    At any plateau of the loss E[ΔL] = 0, and eq. 6 then puts x at 1 without any edge: linear regression with label noise
    shows it. So the rule asks for evidence that no quadratic loss can give, and holds needs all of

    - the interval of the level inside (0.85, 1.25), and x > 1 at 10-90% of the steps;
    - the trend of log L below -0.001 over the plateau: the loss still falls;
    - the interval of the sharpness above 2/lr (s = sharpness·lr/2 > 1) while the run does not diverge. On a quadratic such a
      run diverges.

    Does not hold: the level lies outside the band; x stays on one side of 1; the run diverged; x never arrives although the
    sharpness no longer rises; or the sharpness moved by less than 5% in the whole run, so that x = 1 is noise balance.
    Undecided: otherwise; in particular SGD with small batches, whose sharpness stays below 2/lr: one run cannot tell an edge
    from balance there, the b-dependence over several runs can (`iir`).
    """
    name = "interaction_edge"
    logs = PlainDescent(run)
    if logs.refusal:
        return Verdict(name, "not applicable", logs.refusal)
    steps, (loss, x, s) = logs.columns("loss", "instability", "sharpness")
    x, s = x * logs.lr / 2, s * logs.lr / 2
    if logs.diverged:
        return Verdict(name, "does not hold", "the loss diverged")
    if len(x) < MIN_STEPS:
        return Verdict(name, "undecided", f"{len(x)} measured steps; needs at least {MIN_STEPS}")
    window = plateau(x)
    if window is None:
        if plateau_start(x) is not None:
            return Verdict(name, "undecided", "arrives at 2/lr too near the end; train longer")
        rising = trend(np.log(np.maximum(s[len(s) // 2 :], 1e-12)))
        last = f"instability ends at {np.median(x[len(x) // 2 :]):.2f} of 2/lr"
        if rising.low > 0.01:
            return Verdict(name, "undecided", f"{last} and the sharpness still rises; train longer")
        return Verdict(name, "does not hold", f"{last} and the sharpness no longer rises")
    at, sharp, falling = level(x[window]), level(s[window]), trend(np.log(loss[window]))
    above = float((x[window] > 1).mean())
    moved = float(np.divide(*np.sort(batch_medians(s, 20))[[-1, 0]]))
    decision: Decision
    if at.high < BAND[0] or at.low > BAND[1] or not 0.1 <= above <= 0.9:
        decision, reason = "does not hold", f"does not oscillate around 2/lr: above it at {above:.0%} of the steps"
    elif moved < 1.05:
        decision, reason = "does not hold", "at 2/lr by balance of noise: the curvature never moved"
    elif at.low > BAND[0] and at.high < BAND[1] and falling.high < FALLING and sharp.low > 1:
        decision, reason = "holds", "oscillates around 2/lr while the loss falls and the sharpness is above 2/lr"
    elif sharp.low <= 1:
        decision, reason = (
            "undecided",
            "at 2/lr, but with sharpness below 2/lr balance of noise explains it too; compare several b (iir)",
        )
    else:
        decision, reason = "undecided", "the level or the fall of the loss is not clear; train longer"
    details = {
        "from_step": int(steps[window][0]),
        "share_above": above,
        "sharpness": str(sharp),
        "log_loss_trend": str(falling),
    }
    return Verdict(name, decision, reason, at.value, at.interval, "0.85 to 1.25 (instability·lr/2)", details)


@claim(
    source="Lee 2022, eq. 6 and 9, figs. 1 and 2",
    sentence="Before the edge the expected loss difference follows its quadratic prediction (slope lr²/2, zero at 2/lr); at "
    "the edge the slope in the unstable regime is gentler.",
)
def quadratic_loss_difference(run: Run) -> Verdict:
    """The loss is locally quadratic before the edge, and less steep than that beyond it.

    In units x = instability·lr/2 and y = E[ΔL]/(lr ‖∇L‖²), eq. 6 without remainder is the line y = x - 1. Two parts:

    - before: measured steps from the third on, up to the arrival at 2/lr, with x < 1. Least squares must give a slope and a
      zero crossing within 0.1 of 1. The slope is identified only if at least 5 steps have x in (0.05, 0.95): x soars
      within a few steps, so measure every step.
    - after (statistic): slope through (1, 0) of the steps with x > 1 on the plateau, interval by moving blocks.

    Holds: `interaction_edge` holds, the first part does, and the interval of the second lies below 0.9.
    Does not hold: the first part fails where it is identified, or the second's interval lies above 0.9.
    Undecided: a part is not identified, or the interval covers 0.9.
    Not applicable: `interaction_edge` does not hold, so there is no "after". A quadratic loss has slope 1 throughout by
    construction and cannot pass.
    """
    name = "quadratic_loss_difference"
    logs = PlainDescent(run)
    if logs.refusal:
        return Verdict(name, "not applicable", logs.refusal)
    edge = interaction_edge(run)
    names = ("instability", "sharpness", "expected_loss_difference", "gradient_norm")
    _, (x, s, difference, norm) = logs.columns(*names)
    if edge.decision != "holds":
        return Verdict(
            name, "not applicable", f"interaction_edge: {edge.decision}, so there is no edge to compare with"
        )
    x, s, y = x * logs.lr / 2, s * logs.lr / 2, difference / (logs.lr * norm**2)
    before, line = _before(x, y, s)
    window = plateau(x)
    if window is None:
        return Verdict(name, "undecided", "the loss difference was measured at too few steps of the plateau")
    unstable = np.flatnonzero((np.arange(len(x)) >= window.start) & (x > 1))
    if len(unstable) < 20:
        return Verdict(name, "undecided", f"{len(unstable)} unstable steps on the plateau; needs 20", details=line)
    slope = block_bootstrap(x[unstable], y[unstable], lambda a, b: float(np.sum((a - 1) * b) / np.sum((a - 1) ** 2)))
    decision: Decision
    if before is False or slope.low > 0.9:
        decision = "does not hold"
        reason = "not on the line before the edge" if before is False else "no gentler slope beyond the edge"
    elif before and slope.high < 0.9:
        decision, reason = "holds", "on the line before the edge, gentler beyond it"
    else:
        decision = "undecided"
        reason = (
            "no steps between 0 and 2/lr before the edge; measure every step"
            if before is None
            else "interval covers 0.9"
        )
    return Verdict(
        name, decision, reason, slope.value, slope.interval, "below 0.9 (slope beyond the edge; 1 on a quadratic)", line
    )


def _before(x: np.ndarray, y: np.ndarray, s: np.ndarray) -> tuple[bool | None, dict[str, float]]:
    """Whether the steps before the arrival lie on y = x - 1 (None: not identified), and the fitted line."""
    first = next((i for i in range(5, len(x)) if x[i] > 1), len(x))
    arrival = plateau_start(x)
    end = first if arrival is None else max(arrival, first)
    index = np.arange(len(x))
    early = (index >= 3) & (index < end) & (x < 1) & np.isfinite(y)
    if ((x > 0.05) & (x < 0.95) & early).sum() < 5 or s[:3].max() >= 1:
        return None, {}
    slope, intercept = np.polyfit(x[early], y[early], 1)
    zero = -intercept / slope
    return bool(abs(slope - 1) <= 0.1 and abs(zero - 1) <= 0.1), {
        "slope_before": float(slope),
        "zero_before": float(zero),
    }
