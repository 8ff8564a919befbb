"""Every regularizer as a diagnostic of the same name, with or without a strength in training."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch

from ..guard import random_states, seed_everything
from ..linalg.trace import sample_mean
from ..measurement import Measurement, missing
from ..regularizers import registry as regularizers
from ..regularizers.evaluation import accumulate
from ..regularizers.micro_batch import MicroBatches
from ..regularizers.sites import Measured
from ..regularizers.vectors import squared_norm
from ..snapshot import Snapshot
from .registry import diagnostic
from .values import exact

_COST = "1 gradient of the batch; none if it is trained"
_AS_A_DIAGNOSTIC = """

    Fails: of one batch: over batches it scatters. Without a micro-batch size, here or in training, the whole batch is one
    micro-batch, whose mean gradient is as a rule shorter than those of its parts.

    Estimator: the value on the batch that is trained on, with the micro-batches of training (or `micro_batch_size`) and
    the modules in the modes in which they train; on all data at a point that no training has led to. A penalty that is
    trained is not computed again: its value is the one that was drawn."""
_DRAWS = """ Otherwise one draw, whose value is exact for that draw; `draws`, at
    least 2, gives the mean of so many as an estimate of the expectation, with its standard error."""


@diagnostic(
    "‖∇L_M‖",
    formula="mean_M ‖∇L_M‖ over the micro-batches of the batch",
    kind="exact",
    cost="1 gradient of the batch",
)
def microbatch_gradient_norm(at: Snapshot, *, micro_batch_size: int | None = None) -> Measurement:
    """Mean gradient norm of the micro-batches of the batch that is trained on, Σ_M (|M|/|B|) ‖∇L_M‖.

    The mean of the squares is `gradient_norm_penalty`, also called `microbatch_gradient_norm_squared`.

    Estimator: one pass over the batch, a micro-batch at a time, with the modules in the modes in which they train. At a
    point that no training has led to, the batch is all data.

    Error: exact for this batch; over batches it is one draw.

    Fails: it depends on |M|: small micro-batches have long gradients. Without `micro_batch_size`, here or in training,
    the micro-batch is the whole batch, and the value one norm.

    Args:
        micro_batch_size: |M|; default that of training.

    Source: Novack et al. 2022 (arXiv 2211.15853), figures 1 and 2.
    """
    with _micro_batches(at, micro_batch_size, "microbatch_gradient_norm") as batches:
        norms = [float(squared_norm([g.double() for g in m.gradient]).sqrt()) for m in batches]
    return exact(sum(w * norm for w, norm in zip(batches.weights, norms, strict=True)), at.objective)


def register(entry: regularizers.Regularizer) -> None:
    """Make a diagnostic of a regularizer."""

    def measured(
        at: Snapshot, *, micro_batch_size: int | None = None, draws: int | None = None, **options: Any
    ) -> Measurement:
        return _penalty(at, entry, micro_batch_size, draws, options)

    own = list(inspect.signature(measured).parameters.values())[: 3 if entry.draws else 2]
    keywords = [p for p in inspect.signature(entry.term).parameters.values() if p.name in entry.options]
    functools.update_wrapper(measured, entry.term)
    del measured.__wrapped__  # type: ignore[attr-defined]
    measured.__signature__ = inspect.Signature(own + keywords, return_annotation=Measurement)  # type: ignore[attr-defined]
    measured.__doc__ = (entry.term.__doc__ or "") + _AS_A_DIAGNOSTIC + (_DRAWS if entry.draws else "")
    kind = "sem" if entry.draws else "exact"
    diagnostic(entry.symbol, formula=entry.formula, kind=kind, cost=_COST)(measured)


def _penalty(
    at: Snapshot,
    entry: regularizers.Regularizer,
    micro_batch_size: int | None,
    draws: int | None,
    options: dict[str, Any],
) -> Measurement:
    """The value of a penalty: the one that is trained, or one of its own, or the mean of several draws with its error."""
    if draws is not None and draws < 2:
        raise ValueError(f"draws is {draws}; a mean needs at least 2, and None gives the value of a single draw")
    reason = regularizers.refusal(at.objective, entry)
    if reason:
        return missing(reason)
    trained = at.penalties.get((entry.name, *sorted(options.items())))
    if trained is not None and draws is None and micro_batch_size in (None, at.micro_batch_size):
        return exact(trained, at.objective)
    generator, values = at.generator(entry.name), []
    for _ in range(draws or 1):
        with _micro_batches(at, micro_batch_size, entry.name) as batches:
            values.append(float(accumulate(entry, batches, options, generator)[0]))
    if draws is None:
        return exact(values[0], at.objective)
    if not all(map(math.isfinite, values)):
        return exact(math.nan, at.objective)
    floor = 16 * torch.finfo(at.objective.dtype).eps * abs(sum(values) / len(values))
    return sample_mean(values, floor=floor)


@contextlib.contextmanager
def _micro_batches(at: Snapshot, micro_batch_size: int | None, name: str) -> Iterator[MicroBatches]:
    """The micro-batches that are trained on, at w, with the modules in the modes in which they train, leaving no trace."""
    L = at.objective
    size = regularizers.checked_size(micro_batch_size) or at.micro_batch_size
    L.ranks.require_one("micro-batches of a penalty")
    with L.measuring(), random_states(), _in_modes(at):
        seed_everything(at.generator(f"{name} masks").initial_seed())
        yield MicroBatches(Measured(L, L.leaves_at(at.w)), L.pieces(at.batch, size), graph=False)


@contextlib.contextmanager
def _in_modes(at: Snapshot) -> Iterator[None]:
    before = [(name, module, module.training) for name, module in at.objective.model.named_modules()]
    try:
        for name, module, training in before:
            module.training = (at.modes or {}).get(name, training)
        yield
    finally:
        for _, module, training in before:
            module.training = training


for _entry in regularizers.REGULARIZERS.values():
    register(_entry)
regularizers.WATCHERS.append(register)  # and of what is registered later
