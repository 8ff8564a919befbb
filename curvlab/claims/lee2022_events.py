"""Lee 2022, sec. 4.2: what happens on the way to the edge of stability and at it, step by step, under full batches."""

from __future__ import annotations

import numpy as np

from ..runs import Run
from .lee2022 import interaction_edge
from .plain_descent import MIN_STEPS, MIN_WINDOW, PlainDescent, plateau, plateau_start
from .registry import Decision, Verdict, claim
from .statistics import Estimate, average, first_sustained, trend


@claim(
    source="Lee 2022, sec. 4.2, observations (i)-(v)",
    sentence="For GD, in this order: ‖H‖ rises; it exceeds 2/lr; the gradient aligns with q_1; ‖H‖_{S_n} reaches 2/lr; then "
    "‖H‖_{S_n} falls back, and so on around 2/lr.",
)
def order_of_events(run: Run) -> Verdict:
    """The events on the way to the edge come in the paper's order.

    In units s = sharpness·lr/2, x = instability·lr/2, a = gradient_alignment, the events are

    - (ii) the first step with s > 1 that stays so (90% of the next max(20, T/30) measured steps);
    - (iv) the first later step with x > 1;
    - (iii) the beginning of the alignment that leads to (iv): the last step before (iv) with a < 0.5, and one on.

    Each has an earliest and a latest step, by the 95% intervals in the log. Statistic: steps from (ii) to (iv), with the
    interval of those ends. As ‖H‖_{S_n} ≤ ‖H‖, (iv) cannot come before (ii); what can fail is that the sharpness rises
    before (ii), that the gradient is not aligned then, that it is at (iv), and that x falls again.

    Holds: s starts below 0.95 (median of the first tenth of the way to (ii)); (ii) ≤ (iii) ≤ (iv), and the latest (ii) is
    before the earliest (iv); and, after (iv), x falls below 1 again at least three times.
    Does not hold: the run diverged; the sharpness never crosses 2/lr and no longer rises; the gradient is aligned at (ii)
    already or is not at (iv); or x is above 1 at more than 90% of the steps afterwards.
    Undecided: (iv) is not reached, fewer than 50 measured steps follow it, or x falls below 1 fewer than three times; train
    longer.
    Not applicable: mini-batches, for which the paper states no order.

    On the controls the sharpness never crosses 2/lr (it is constant), so the claim does not hold.
    """
    name = "order_of_events"
    logs = PlainDescent(run)
    if refusal := _full_batch_only(logs):
        return Verdict(name, "not applicable", refusal)
    steps, (s, x, a) = logs.columns("sharpness", "instability", "gradient_alignment")
    if logs.diverged:
        return Verdict(name, "does not hold", "the loss diverged")
    s, x = s * logs.lr / 2, x * logs.lr / 2
    errors = [_half_widths(run, quantity, steps) * logs.lr / 2 for quantity in ("sharpness", "instability")]
    events = _Events(s, x, a)
    if events.crossing is None:
        if len(s) < MIN_STEPS or trend(np.log(np.maximum(s[len(s) // 2 :], 1e-12))).low > 0.01:
            return Verdict(name, "undecided", "not at 2/lr yet, and the sharpness still rises; train longer")
        return Verdict(name, "does not hold", "(ii) never comes: the sharpness stays below 2/lr and no longer rises")
    if events.arrival is None or len(s) - events.arrival < MIN_WINDOW:
        return Verdict(name, "undecided", "‖H‖_{S_n} is not at 2/lr, or not for long enough; train longer")
    # The ends: every event as early, or as late, as the errors allow.
    early, late = (_Events(s + sign * errors[0], x + sign * errors[1], a) for sign in (1, -1))
    ends = [(_step(steps, e.crossing), _step(steps, e.arrival)) for e in (early, late)]
    at = [int(steps[i]) for i in (events.crossing, events.aligned, events.arrival)]
    after = x[events.arrival :] > 1
    returns = int((after[:-1] & ~after[1:]).sum())
    start = float(np.median(s[: max(1, events.crossing // 10)]))
    faults = [f"s starts at {start:.2f}, not below 0.95"] * (start >= 0.95)
    faults += [f"aligned before the crossing, at step {at[1]}"] * (events.aligned < events.crossing)
    faults += [f"not aligned at (iv): {a[events.arrival]:.2f}"] * bool(a[events.arrival] < 0.5)
    faults += [f"‖H‖_{{S_n}} stays above 2/lr: it falls below {returns} times"] * bool(after.mean() > 0.9)
    decision: Decision
    if faults:
        decision, reason = "does not hold", "; ".join(faults)
    elif returns < 3:
        decision, reason = "undecided", f"‖H‖_{{S_n}} has fallen below 2/lr {returns} times; train longer"
    elif ends[1][0] < ends[0][1]:
        way = "crosses 2/lr at step {}, aligns from {}, ‖H‖_{{S_n}} there at {}, then falls and returns"
        decision, reason = "holds", way.format(*at)
    else:
        decision, reason = "undecided", "the errors of (ii) and (iv) overlap; measure with a smaller tol"
    details = {
        "crossing": at[0],
        "aligned_from": at[1],
        "arrival": at[2],
        "start": start,
        "alignment_at_crossing": float(a[events.crossing]),
        "alignment_at_arrival": float(a[events.arrival]),
        "returns": returns,
    }
    low, high = ends[0][1] - ends[1][0], ends[1][1] - ends[0][0]
    return Verdict(
        name, decision, reason, at[2] - at[0], (low, high), "above 0 (steps from the crossing to the arrival)", details
    )


class _Events:
    """Indices at which the sharpness crosses 1 for good, instability arrives there, and alignment begins."""

    def __init__(self, s: np.ndarray, x: np.ndarray, a: np.ndarray) -> None:
        self.crossing = first_sustained(s > 1, max(20, len(s) // 30))
        self.arrival: int | None = None
        self.aligned = -1
        later = np.flatnonzero(x > 1) if self.crossing is not None else np.array([], int)
        later = later[later >= (self.crossing or 0)]
        if len(later):
            self.arrival = int(later[0])
            apart = np.flatnonzero(a[: self.arrival] < 0.5)
            self.aligned = int(apart[-1]) + 1 if len(apart) else 0


def _step(steps: np.ndarray, index: int | None) -> int:
    """The step at an index; that after the end where the event does not come."""
    return int(steps[-1]) + 1 if index is None else int(steps[index])


def _half_widths(run: Run, quantity: str, steps: np.ndarray) -> np.ndarray:
    """Half widths of the 95% intervals at these steps."""
    series = run.series(quantity)
    low, high = series.interval()
    return ((high - low) / 2)[np.isin(series.steps, steps)]


def _second_eigenvalue(run: Run, first: int, last: int) -> float:
    """The largest that the second eigenvalue was between two steps; NaN where it was not measured."""
    if "hessian_eigenvalues" not in run.names:
        return float("nan")
    series = run.series("hessian_eigenvalues", index=2)
    there = series.values[(series.steps >= first) & (series.steps <= last)]
    return float(np.max(there, initial=-np.inf)) if len(there) else float("nan")


def _full_batch_only(logs: PlainDescent) -> str | None:
    return logs.refusal or (
        None if logs.full_batch else f"batches of {logs.batch_size}: the claim is about full-batch descent"
    )


@claim(
    source="Lee 2022, Prop. 4.1",
    sentence="Once ‖H‖ has exceeded 2/lr, and while the loss is quadratic, GD turns the gradient into q_1: cos(q_1, ∇L) "
    "rises to 1, |q_1ᵀ∇L| without bound, and ‖H‖_{S_n} to ‖H‖.",
)
def gradient_aligns(run: Run) -> Verdict:
    """Between the crossing of 2/lr by ‖H‖ and the arrival of ‖H‖_{S_n} there, the three quantities of Prop. 4.1 rise.

    The time is from the sustained crossing (`edge_of_stability`; the first measured step if the run starts above 2/lr) to
    the peak of instability before it first falls again, once it has exceeded 2/lr: what rises falls only when the loss is no
    longer quadratic, and then the proposition does not speak. Statistic: the cosine at the end of that time, with the error
    in the log.

    Holds: the cosine is above 0.9 at the end and below 0.5 at the beginning (median of up to five steps); |q_1ᵀ∇L| =
    cosine·gradient_norm has grown by a factor 3 or more; and ‖H‖_{S_n} is at 0.9 of ‖H‖ or more.
    Does not hold: the interval of the cosine lies below 0.9, or another of these conditions fails, although the premise is
    met: the second eigenvalue, by `hessian_eigenvalues`, stays below 2/lr in that time.
    Undecided: the arrival was not reached, the interval covers 0.9, or it fails and the second eigenvalue is not known;
    train longer, measure the alignment with a smaller `tol`, or measure `hessian_eigenvalues`.
    Not applicable: no crossing, mini-batches, alignment that is there already at the beginning, or it fails and the second
    eigenvalue reaches 2/lr.

    The proposition is about quadratic losses: on one whose largest eigenvalue alone exceeds 2/lr the claim holds, although
    training diverges. On the controls, which train below 2/lr, nothing crosses: not applicable.
    """
    name = "gradient_aligns"
    logs = PlainDescent(run)
    if refusal := _full_batch_only(logs):
        return Verdict(name, "not applicable", refusal)
    steps, (s, x, a, norm) = logs.columns("sharpness", "instability", "gradient_alignment", "gradient_norm")
    events = _Events(s * logs.lr / 2, x * logs.lr / 2, a)
    begin, end = events.crossing, events.arrival
    if begin is None:
        return Verdict(name, "not applicable", "the sharpness does not cross 2/lr for good")
    if end is None:
        return Verdict(name, "undecided", "‖H‖_{S_n} has not reached 2/lr; train longer")
    first = slice(begin, min(begin + 5, max(begin + 1, end)))
    falls = np.flatnonzero(np.diff(x[end:]) < 0)
    end = end + int(falls[0]) if len(falls) else len(x) - 1
    start = float(np.median(a[first]))
    if start >= 0.5:
        return Verdict(
            name, "not applicable", f"the gradient is along q_1 at the crossing already (cosine {start:.2f})"
        )
    second = _second_eigenvalue(run, steps[begin], steps[end]) * logs.lr / 2
    error = float(_half_widths(run, "gradient_alignment", steps)[end])
    at = Estimate(float(a[end]), max(0.0, float(a[end]) - error), min(1.0, float(a[end]) + error))
    grown = float(a[end] * norm[end] / np.median(a[first] * norm[first]))
    reached = float(x[end] / s[end])
    faults = [f"the cosine is {at.value:.2f} at the peak"] * bool(at.high < 0.9)
    faults += [f"|q_1ᵀ∇L| has grown by {grown:.2g}"] * (grown < 3) + [f"‖H‖_{{S_n}} is {reached:.2f} ‖H‖"] * (
        reached < 0.9
    )
    decision: Decision = "does not hold" if faults else "holds" if at.low > 0.9 else "undecided"
    if faults and second > 1:
        decision = "not applicable"
        faults.append(f"the second eigenvalue reaches {second:.2f} of 2/lr, against the premise")
    elif faults and np.isnan(second):
        decision = "undecided"
        faults.append("whether the second eigenvalue was below 2/lr is not known; measure hessian_eigenvalues")
    well = f"from {start:.2g} at step {steps[begin]} to {at.value:.2f} at {steps[end]}; |q_1ᵀ∇L| grew by {grown:.3g}"
    reason = "; ".join(faults) or (well if at.low > 0.9 else "the error of the cosine covers 0.9; use a smaller tol")
    details = {
        "crossing": int(steps[begin]), "peak": int(steps[end]), "cosine_at_crossing": start, "growth_along_q1": grown,
        "interaction_over_sharpness": reached, "second_eigenvalue": None if np.isnan(second) else second,
    }  # fmt: skip
    return Verdict(name, decision, reason, at.value, at.interval, "above 0.9 (cosine with q_1 at the peak)", details)


@claim(
    source="Lee 2022, sec. 5.2 (against linear scaling)",
    sentence="After entering the edge of stability the cosine between two consecutive batch gradients is mostly negative.",
)
def oscillating_gradients(run: Run) -> Verdict:
    """Consecutive gradients point against each other at the edge.

    Statistic: share of negative `batch_gradient_cosine` on the plateau of instability·lr/2 (that of `interaction_edge`),
    interval from ten contiguous batches of steps. With full batches without `batch_gradient_cosine`, `gradient_cosine`.

    A negative mean alone is no evidence of an edge: for a quadratic loss E[g_bᵀg_b'] = ‖∇L‖²(1 - lr·instability), which is
    -‖∇L‖² wherever noise balances descent. So holds needs `interaction_edge` to hold.

    Holds: `interaction_edge` holds and the interval of the share lies above 0.5.
    Does not hold: the interval lies below 0.5.
    Undecided: it covers 0.5; or it lies above and `interaction_edge` is undecided, as with small batches, where
    the balance of noise explains it too.
    Not applicable: `interaction_edge` does not hold or is not applicable: there is no edge. Cosines need every step.

    On the controls `interaction_edge` does not hold, so this is not applicable.
    """
    name = "oscillating_gradients"
    edge = interaction_edge(run)
    if edge.decision in ("does not hold", "not applicable"):
        return Verdict(name, "not applicable", f"no edge of stability: {edge.reason}")
    logs = PlainDescent(run)
    quantity = "batch_gradient_cosine"
    if quantity not in run.names and logs.full_batch:
        quantity = "gradient_cosine"
    steps, (x,) = logs.columns("instability")
    window = plateau(x)
    if window is None:
        return Verdict(name, "undecided", f"no plateau yet: {edge.reason}")
    at, (cosine,) = logs.columns(quantity)
    late = at >= steps[window][0]
    if late.sum() < MIN_WINDOW:
        return Verdict(
            name, "undecided", f"{late.sum()} cosines on the plateau; needs {MIN_WINDOW}: measure every step"
        )
    share = average(cosine[late] < 0)
    before = cosine[at < steps[plateau_start(x) or 0]]
    early = float((before < 0).mean()) if len(before) else None
    decision: Decision
    if share.high < 0.5:
        decision, reason = "does not hold", "consecutive gradients do not oppose each other"
    elif share.low > 0.5 and edge.decision == "holds":
        decision, reason = "holds", f"negative at {share.value:.0%} of the steps on the plateau"
    elif share.low > 0.5:
        decision, reason = (
            "undecided",
            f"negative at {share.value:.0%} of the steps; the edge: {edge.reason}",
        )
    else:
        decision, reason = "undecided", "the share is not clear; train longer"
    details = {
        "median_cosine": float(np.median(cosine[late])),
        "share_before": early,
        "from_step": int(steps[window][0]),
    }
    return Verdict(
        name, decision, reason, share.value, share.interval, "above 0.5 (share of negative cosines)", details
    )


@claim(
    source="Lee 2022, sec. 4.2 and fig. 3 (left)",
    sentence="Asymmetric valleys: in the unstable regime the curvature along the step usually falls, in the stable one it "
    "usually rises.",
)
def asymmetric_valleys(run: Run) -> Verdict:
    """‖H_α‖_{S_n} along the gradient step, against its value at the start of the step, in both regimes.

    r = directional_sharpness at the end of the step (alpha = 1) over instability, which for full batches is ‖H‖_{S_n}, at
    the steps after the arrival at 2/lr (`interaction_edge`). Changes below 0.1% count as neither.
    Statistic: the smaller of two shares: of r < 1 among the steps with instability > 2/lr, and of r > 1 among the others;
    intervals from ten contiguous batches of the steps of each.

    Holds: both intervals lie above 0.5.
    Does not hold: one of them lies below 0.5.
    Undecided: otherwise, or with fewer than 20 steps of either kind; train longer.
    Not applicable: mini-batches, no arrival at 2/lr, or alphas without 1.

    A quadratic loss has r = 1 at every step, so it never holds there; the controls also never arrive with full batches.
    """
    name = "asymmetric_valleys"
    logs = PlainDescent(run)
    if refusal := _full_batch_only(logs):
        return Verdict(name, "not applicable", refusal)
    steps, (x,) = logs.columns("instability")
    x = x * logs.lr / 2
    start = plateau_start(x)
    curve = run.series("directional_sharpness")
    alphas = list(curve.axis[1]) if curve.axis else []
    if start is None or 1.0 not in alphas:
        why = "instability does not arrive at 2/lr" if start is None else f"alphas are {alphas}; needs 1.0 among them"
        return Verdict(name, "not applicable", why)
    both = np.intersect1d(steps[start:], curve.steps)
    here = x[np.isin(steps, both)]
    ratios = curve.values[np.isin(curve.steps, both)] * logs.lr / 2 / here[:, None]
    valid = np.isfinite(ratios).all(1)
    here, ratios = here[valid], ratios[valid]
    r, unstable = ratios[:, alphas.index(1.0)], here > 1
    if min(unstable.sum(), (~unstable).sum()) < 20:
        why = f"{unstable.sum()} unstable and {(~unstable).sum()} stable steps; needs 20 of each: train longer"
        return Verdict(name, "undecided", why)
    flatter, sharper = average(r[unstable] < 0.999), average(r[~unstable] > 1.001)
    least = min(flatter, sharper, key=lambda share: share.value)
    decision: Decision
    if flatter.low > 0.5 and sharper.low > 0.5:
        decision, reason = "holds", "flatter across the valley when unstable, sharper when stable"
    elif flatter.high < 0.5 or sharper.high < 0.5:
        decision = "does not hold"
        reason = (
            "unstable steps do not meet less curvature"
            if flatter.high < 0.5
            else "stable steps do not meet more curvature"
        )
    else:
        decision, reason = "undecided", "the shares are not clear; train longer"
    by_alpha = {
        regime: dict(zip(map(str, alphas), np.median(ratios[which], 0).tolist(), strict=True))
        for regime, which in (("unstable", unstable), ("stable", ~unstable))
    }
    details = {"flatter_when_unstable": str(flatter), "sharper_when_stable": str(sharper), "median_ratio": by_alpha}
    return Verdict(
        name, decision, f"{reason}: {flatter.value:.0%} and {sharper.value:.0%} of the steps", least.value, least.interval,
        "above 0.5 (the smaller share)", details,
    )  # fmt: skip
