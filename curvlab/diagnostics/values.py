"""What training looks at itself: loss, gradient norms, accuracy, and the held-out values."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..measurement import Measurement, missing
from ..objective import Objective
from ..snapshot import Snapshot
from .registry import diagnostic


@diagnostic("L", formula="(1/N) Σ ℓ_i", kind="exact", cost="1 gradient, shared", divided=True)
def loss(at: Snapshot) -> Measurement:
    """The training loss at w, over the whole measuring set, without penalties and weight decay.

    Estimator: one pass over the data, summed in float64; the gradient of the same pass is shared.

    Fails: it differs from what a training loop prints where the model has dropout or BatchNorm, whose eval mode is
    measured by default, where batches are augmented, and where means over batches of unequal size are averaged.
    """
    return exact(at.value, at.objective)


@diagnostic("‖∇L‖", formula="‖(1/N) Σ g_i‖", kind="exact", cost="1 gradient, shared")
def gradient_norm(at: Snapshot) -> Measurement:
    """Euclidean norm of the full gradient at w; its square is tr(S_n).

    Estimator: the norm, in float64, of the gradient of one pass over the data.

    Error: the floor has the rounding of a sum of N gradients of their typical length, which counts near a minimum,
    where they cancel.

    Fails: of a sample of the data it is too large, because noise adds to its square; `population_size` does not mend it
    here, but does in `gradient_concentration` and `instability`.

    Source: Lee 2022, sec. 2.
    """
    found = exact(at.gradient.double().norm(), at.objective)
    return replace(found, floor=found.floor + at.gradient_floor)


@diagnostic(
    "‖g_b‖",
    formula="norm of the gradient of the batch that was drawn",
    kind="exact",
    cost="none",
    needs=["batch_gradient"],
)
def batch_gradient_norm(at: Snapshot) -> Measurement:
    """Norm of the gradient that the step is about to use, of the one batch that was drawn (not an expectation).

    Estimator: read from the gradient that training has computed, that of penalties included.

    Fails: one draw; its mean square over batches is `gradient_second_moment_trace`. It belongs to the mode in which the
    model trains, so with dropout or BatchNorm it is not that of the measured loss.

    Source: Novack et al. 2022 (arXiv 2211.15853), App. C.1, where it sets the step of external grafting.
    """
    assert at.batch_gradient is not None
    return exact(at.batch_gradient.double().norm(), at.objective)


@diagnostic(
    "accuracy",
    formula="share of examples whose largest output is the target class",
    kind="exact",
    cost="1 forward pass",
)
def train_accuracy(at: Snapshot) -> Measurement:
    """Share of training examples (by weight) classified correctly at w.

    Estimator: one forward pass, in eval mode unless the objective says otherwise.

    Fails: no value where the outputs are not (B, C) with C of at least 2, where the targets are neither class indices
    nor probabilities, or where a `batch_loss` calls the model itself.
    """
    return _accuracy(at.objective, at.w)


@diagnostic(
    "L_test",
    formula="mean loss over held-out data",
    kind="exact",
    cost="1 forward pass of the test data",
    needs=["test"],
)
def test_loss(at: Snapshot) -> Measurement:
    """Mean loss over the held-out data at w.

    Estimator: one forward pass of the held-out data.

    Error: exact for that set; no statement about the population, of which it is a sample.

    Fails: on data that were used to choose settings it is too small; keep a validation set beside it.
    """
    assert at.test is not None
    return exact(at.test.value(_in(at.test, at.w)), at.test)


@diagnostic(
    "test accuracy",
    formula="share of held-out examples classified correctly",
    kind="exact",
    cost="1 forward pass of the test data",
    needs=["test"],
)
def test_accuracy(at: Snapshot) -> Measurement:
    """Share of held-out examples (by weight) classified correctly at w.

    Estimator: one forward pass of the held-out data.

    Error: exact for that set; no statement about the population, of which it is a sample.

    Fails: no value where `train_accuracy` has none. On data that were used to choose settings it is too high.
    """
    assert at.test is not None
    return _accuracy(at.test, _in(at.test, at.w))


def exact(value: Tensor | float, objective: Objective, *, scale: float | None = None) -> Measurement:
    """An exact measurement with a rounding floor relative to `scale` (default: the value itself).

    Raises:
        FloatingPointError: the value is not finite.
    """
    value = float(value)
    if not math.isfinite(value):
        raise FloatingPointError(f"not finite ({value}): the parameters have diverged")
    scale = abs(value) if scale is None else scale
    return Measurement(value, floor=16 * torch.finfo(objective.dtype).eps * scale)


def _accuracy(objective: Objective, w: Tensor) -> Measurement:
    share = objective.accuracy(w)
    if share is None:
        return missing("the targets are no classes, or the loss calls the model itself")
    if not math.isfinite(float(share)):
        return missing("the outputs are not finite: the parameters have diverged")
    return Measurement(float(share))


def _in(objective: Objective, w: Tensor) -> Tensor:
    return w.to(objective.device, objective.dtype)
