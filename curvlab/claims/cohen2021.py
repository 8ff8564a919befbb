"""Cohen et al. 2021 (arXiv 2103.00065) and 2022 (arXiv 2207.14484): full-batch descent at the edge of stability."""

from __future__ import annotations

import numpy as np

from ..runs import Run
from .plain_descent import FALLING, MIN_STEPS, MIN_WINDOW, PlainDescent, plateau_start
from .registry import Decision, Verdict, claim
from .statistics import average, first_sustained, level, trend

# Where the papers see the sharpness settle, in units of the threshold.
ABOVE = (0.95, 1.5)  # "at or just above", for plain descent
AT = (0.85, 1.25)  # "at", for the others, whose sharpness falls and returns in long waves
ADAPTIVE = ("Adam", "AdamW", "RMSprop")
ABOUT = {
    "plain": "plain gradient descent",
    "momentum": "SGD with momentum",
    "adaptive": "Adam, AdamW and RMSprop",
}


class FullBatch(PlainDescent):
    """Logs of full-batch training by a family of optimizers, and its threshold: 2/lr, or what the log states."""

    def __init__(self, run: Run, *families: str) -> None:
        super().__init__(run)
        self.name = name = self.optimizer.get("name")
        self.family = "adaptive" if name in ADAPTIVE else "momentum" if self.optimizer.get("momentum") else "plain"
        self.families = families
        self.thresholds = np.unique(run.column("threshold")[1])
        # What the stated threshold accounts for: the rest of what the optimizer does is refused as for plain descent.
        # Decoupled weight decay moves it by about lr·w, which is neglected.
        told = {"plain": (), "momentum": ("momentum", "nesterov", "dampening"), "adaptive": ("name", "momentum")}
        kept = {key: value for key, value in self.optimizer.items() if key not in told[self.family]}
        if name == "AdamW":
            kept.pop("weight_decay", None)
        self.optimizer = {"name": "SGD", **kept}

    @property
    def threshold(self) -> float:
        return 2 / self.lr if self.family == "plain" else float(self.thresholds[0])

    @property
    def refusal(self) -> str | None:
        """Why the claim says nothing about the run, or None."""
        about = " or ".join(ABOUT[family] for family in self.families)
        if self.family not in self.families:
            return f"the optimizer is {self.name}, of the family {ABOUT[self.family]}; the claim is about {about}"
        refusal = super().refusal
        if refusal is None and not self.full_batch:
            refusal = f"batches of {self.batch_size}: the claim is about full-batch descent"
        if refusal is None and self.family != "plain" and len(self.thresholds) != 1:
            refusal = f"the log states {len(self.thresholds)} thresholds; expected one, where a formula for it is known"
        return refusal


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
    return _hovers("edge_of_stability", FullBatch(run, "plain"), "sharpness")


@claim(
    source="Cohen et al. 2021, sec. 2 and App. B",
    sentence="Under full-batch descent with momentum the sharpness rises to that optimizer's own threshold, (2 + 2β)/lr for "
    "Polyak's and (2 + 2β)/(lr(1 + 2β)) for Nesterov's, and hovers there, while the loss keeps falling.",
)
def momentum_edge(run: Run) -> Verdict:
    """Sharpness hovers at the threshold of SGD with momentum: the rule of `edge_of_stability`, with "at" for "above".

    Statistic: level of s = sharpness/threshold from the arrival to the end, with the threshold that the log's records state
    (`curvlab.optimizers.stability_threshold`). In units of 2/lr it is 1.9 times as high for Polyak's momentum at β = 0.9, so
    sharpness that stops at 2/lr does not pass. The arrival is where the median of the next max(20, T/20) measured s is at
    least 0.9, and that of all later ones at least 0.85.

    Holds: s does not start there, and the sharpness has moved by at least 5% in the run; the interval of the level lies in
    (0.85, 1.25), s ≥ 0.85 at 80% of the steps or more, and the trend of log L over that window is below -0.001.
    Does not hold: the level lies outside the band, or s ≥ 0.85 at less than 60%; the run diverged; or s never arrives
    although the sharpness no longer rises.
    Undecided: too short, or a start at the threshold; train longer, or at another learning rate.
    Not applicable: mini-batches, no momentum, or a log without `threshold`.

    On the controls the sharpness is constant, so it never holds, with momentum as without.
    """
    return _hovers("momentum_edge", FullBatch(run, "momentum"), "sharpness")


@claim(
    source="Cohen et al. 2022 (arXiv 2207.14484), sec. 3",
    sentence="Under full-batch Adam or RMSprop the preconditioned sharpness rises to the optimizer's threshold, 38/lr for "
    "Adam at β₁ = 0.9, and hovers there, while the loss keeps falling.",
)
def adaptive_edge(run: Run) -> Verdict:
    """Preconditioned sharpness hovers at the threshold of an adaptive optimizer, by the rule of `momentum_edge`.

    Statistic: as there, with s = preconditioned_sharpness/threshold, the threshold being that of the log's records. It is
    derived for a preconditioner at rest; the paper finds it met because P moves slowly (β₂ near 1).

    Holds: s does not start at the threshold; from its arrival the interval of the level lies in (0.85, 1.25), s ≥ 0.85 at
    80% of the steps or more, and the loss falls. The plain `sharpness` must have moved by 5% or more: on a quadratic P
    alone, which shrinks with the gradient, can carry the preconditioned sharpness to the threshold.
    Does not hold: the level is outside the band, the run diverged, the curvature never moved, or the preconditioned
    sharpness stays below and no longer rises.
    Undecided: too short, or at the threshold from the first measured step on; train longer, or at another rate.
    Not applicable: mini-batches, another optimizer, weight decay in the gradient, or a log without `threshold`.

    On the controls, trained by Adam instead, the plain sharpness is constant, so it never holds.
    """
    return _hovers("adaptive_edge", FullBatch(run, "adaptive"), "preconditioned_sharpness")


def _hovers(name: str, logs: FullBatch, quantity: str) -> Verdict:
    """The one rule of the edge, in units of the optimizer's threshold."""
    if logs.refusal:
        return Verdict(name, "not applicable", logs.refusal)
    steps, (loss, sharpness, s) = logs.columns("loss", "sharpness", quantity)
    s = s / logs.threshold
    plain = logs.family == "plain"
    edge, band = ("2/lr", ABOVE) if plain else (f"{logs.threshold * logs.lr:.3g}/lr", AT)
    if logs.diverged:
        return Verdict(name, "does not hold", "the loss diverged")
    crossing = first_sustained(s > 1, max(20, len(s) // 30)) if plain else plateau_start(s)
    if crossing is None:
        if _rises(s):
            why = f"not at {edge} yet, and the run is short or the sharpness still rises; train longer"
            return Verdict(name, "undecided", why)
        return Verdict(name, "does not hold", f"never comes to {edge} and no longer rises; ends at {s[-1]:.2f} of it")
    if len(s) - crossing < MIN_WINDOW:
        return Verdict(name, "undecided", f"at {edge} from step {steps[crossing]}, too near the end; train longer")
    window = slice(crossing, None)
    at, falling = level(s[window]), trend(np.log(loss[window]))
    share = float((s[window] >= band[0]).mean())
    moved = float(sharpness.max() / sharpness.min()) if sharpness.min() > 0 else np.inf
    decision: Decision
    if moved < 1.05:
        decision, reason = "does not hold", "the curvature never moved"
    elif crossing == 0:
        decision, reason = "undecided", f"starts at or above {edge}, so there is no crossing to see"
    elif at.low > band[0] and at.high < band[1] and share >= 0.8 and falling.high < FALLING:
        decision, reason = "holds", f"at {edge} from step {steps[crossing]}, then hovers while the loss falls"
    elif at.high < band[0] or at.low > band[1] or share < 0.6:
        decision = "does not hold"
        reason = f"does not stay near {edge}: at least {band[0]:g} of it at {share:.0%} of the steps"
    else:
        decision, reason = "undecided", "the level or the fall of the loss is not clear; train longer"
    unit = f"{quantity}·lr/2" if plain else f"{quantity}/threshold, {edge}"
    return Verdict(
        name, decision, reason, at.value, at.interval, f"{band[0]:g} to {band[1]:g} ({unit})",
        {"crossing": int(steps[crossing]), "share_above": share, "log_loss_trend": str(falling)},
    )  # fmt: skip


def _rises(s: np.ndarray) -> bool:
    """Whether a series is too short to tell, or still rises in its second half."""
    return len(s) < MIN_STEPS or trend(np.log(np.maximum(s[len(s) // 2 :], 1e-12))).low > 0.01


@claim(
    source="Cohen et al. 2021, sec. 3",
    sentence="Progressive sharpening: as long as training is stable, the sharpness under full-batch descent keeps rising.",
)
def progressive_sharpening(run: Run) -> Verdict:
    """Sharpness rises, and keeps rising, from the start of training up to the optimizer's threshold.

    Statistic: the trend of log(sharpness), its total change, from the first measured step to the first five in a row above
    the threshold (2/lr, or the log's for momentum), or to the end of a run without. Five, because a start above it for a
    step or two is no arrival, while one that does not last, as often with momentum, is.

    Holds: the interval of the trend lies above log 1.1, a rise by a tenth, and the sharpness rises between at least 7 of
    the 9 pairs of neighbouring tenths of that time (4.5 are expected of a series without a trend).
    Does not hold: the interval lies below log 1.1, or fewer than 5 of the 9 pairs rise.
    Undecided: fewer than 20 measured steps before the crossing, or anything between; use a smaller learning rate, which
    moves the threshold up, or measure more often.
    Not applicable: mini-batches, an adaptive optimizer, or a start at or above the threshold.

    On the controls the sharpness is constant: a trend of 0, which does not hold.
    """
    name = "progressive_sharpening"
    logs = FullBatch(run, "plain", "momentum")
    if logs.refusal:
        return Verdict(name, "not applicable", logs.refusal)
    steps, (sharpness,) = logs.columns("sharpness")
    s = sharpness / logs.threshold
    crossing = first_sustained(s > 1, 5)
    if crossing == 0:
        return Verdict(name, "not applicable", "starts above the threshold; use a smaller learning rate")
    before = s[:crossing]
    if len(before) < 20 or before.min() <= 0:
        return Verdict(
            name, "undecided", f"{len(before)} measured steps of positive sharpness before the threshold; needs 20"
        )
    rise = trend(np.log(before))
    tenths = np.array([np.median(part) for part in np.array_split(before, 10)])
    rising = int((np.diff(tenths) > 0).sum())
    decision: Decision
    if rise.low > np.log(1.1) and rising >= 7:
        decision, reason = "holds", "the sharpness keeps rising"
    elif rise.high < np.log(1.1) or rising < 5:
        decision, reason = "does not hold", "the sharpness does not keep rising"
    else:
        decision, reason = "undecided", "rises, but not by a clear tenth or not steadily; use a smaller learning rate"
    end = "to the threshold" if crossing else "in the whole run, below the threshold"
    details = {
        "from_step": int(steps[0]),
        "to_step": int(steps[len(before) - 1]),
        "start": float(before[0]),
        "end": float(before[-1]),
        "tenths_that_rise": rising,
    }
    return Verdict(
        name, decision, f"{reason} {end}: {rising} of 9 tenths rise", rise.value, rise.interval,
        f"above {np.log(1.1):.3f} (total change of log sharpness)", details,
    )  # fmt: skip


@claim(
    source="Cohen et al. 2021, sec. 3",
    sentence="At the edge of stability the training loss is non-monotone from step to step, yet falls in the long run.",
)
def nonmonotone_loss(run: Run) -> Verdict:
    """The loss rises at many single steps after the sharpness has crossed 2/lr, at few before, and falls on the whole.

    Statistic: share of steps at which the loss rises (by more than 10⁻⁵ of itself, which is above float32 rounding),
    from the crossing of 2/lr to the end; interval from ten contiguous batches of steps.

    Holds: the interval lies above 0.05 and above the share before the crossing; the trend of log L after the crossing is
    below -0.001; and the sharpness moved by 5% or more in the run.
    Does not hold: the interval lies below 0.05; the loss rises in the long run or diverges; or the curvature never moved.
    Undecided: between, or fewer than 50 steps after the crossing; train longer.
    Not applicable: no sustained crossing of 2/lr, mini-batches, or momentum, whose loss is not monotone anyway. Also a log
    without neighbouring steps: measure every step.

    On the controls there is no crossing: on a quadratic, descent below 2/lr is monotone, and above it diverges.
    """
    name = "nonmonotone_loss"
    logs = FullBatch(run, "plain")
    if logs.refusal:
        return Verdict(name, "not applicable", logs.refusal)
    steps, (loss, sharpness) = logs.columns("loss", "sharpness")
    if logs.diverged:
        return Verdict(name, "does not hold", "the loss diverged")
    crossing = first_sustained(sharpness * logs.lr > 2, max(20, len(steps) // 30))
    if crossing is None:
        return Verdict(name, "not applicable", "the sharpness does not cross 2/lr for good, so there is no edge")
    near = np.diff(steps) == 1
    if near.mean() < 0.9:
        return Verdict(name, "not applicable", "the loss of neighbouring steps is needed; measure every step")
    rises = np.diff(loss) > 1e-5 * np.abs(loss[:-1])
    before, after = rises[:crossing][near[:crossing]], rises[crossing:][near[crossing:]]
    if len(after) < MIN_WINDOW:
        return Verdict(name, "undecided", f"crosses 2/lr at step {steps[crossing]}, too near the end; train longer")
    share, falling = average(after), trend(np.log(loss[crossing:]))
    early = float(before.mean()) if len(before) else 0.0
    decision: Decision
    if sharpness.max() < 1.05 * sharpness.min():
        decision, reason = "does not hold", "the curvature never moved"
    elif share.high < 0.05 or falling.low > 0:
        decision = "does not hold"
        reason = "the loss is monotone" if share.high < 0.05 else "the loss rises in the long run"
    elif share.low > max(0.05, early) and falling.high < FALLING:
        decision, reason = (
            "holds",
            f"rises at {share.value:.0%} of the steps (before: {early:.0%}) and falls on the whole",
        )
    else:
        decision, reason = "undecided", "the share of rises or the fall of the loss is not clear; train longer"
    details = {"crossing": int(steps[crossing]), "share_before": early, "log_loss_trend": str(falling)}
    return Verdict(
        name,
        decision,
        reason,
        share.value,
        share.interval,
        "above 0.05 (share of steps at which the loss rises)",
        details,
    )
