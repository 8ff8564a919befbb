"""The value and the gradient of a penalty, micro-batch by micro-batch, as one number that autograd knows."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..objective import Chunk, Objective
from .micro_batch import MicroBatches
from .sites import Measured, Trained, second_derivatives
from .vectors import with_gradient, without_third_derivative

if TYPE_CHECKING:
    from .registry import Regularizer


def accumulate(
    entry: Regularizer,
    batches: MicroBatches,
    options: Mapping[str, Any],
    generator: torch.Generator | None,
) -> tuple[Tensor, list[Tensor]]:
    """Value (float64) and gradient of a penalty, micro-batch by micro-batch; an empty gradient if none is wanted."""
    site = batches.site
    value = torch.zeros((), dtype=torch.float64, device=site.params[0].device)
    gradient = [torch.zeros_like(p) for p in site.params] if batches.graph else []
    for weight, m in zip(entry.weights(batches, generator), batches, strict=True):
        if weight == 0:
            continue
        m.generator = generator
        term = weight * entry.term(m, **options)
        value += term.detach()
        if batches.graph:
            for total, found in zip(gradient, site.L.grads(term, site.params), strict=True):
                total += found
    return value, gradient


def evaluate(
    entry: Regularizer,
    L: Objective,
    params: Tensor | list[Tensor] | None,
    pieces: list[Chunk],
    generator: torch.Generator | None,
    create_graph: bool,
    options: Mapping[str, Any],
) -> Tensor:
    """A penalty as a differentiable scalar, at a flat vector or on the live model."""
    if entry.draws and generator is None:  # measuring restores torch's own, so one draw of it seeds ours
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    if isinstance(params, Tensor):
        w = params
        given = L.point(w)  # which checks the shape
        graph = torch.is_grad_enabled() and w.requires_grad
        with L.measuring():
            kept = create_graph and graph
            parts = L.split(w.to(given.device, given.dtype)) if kept else L.leaves_at(given)
            batches = MicroBatches(Measured(L, parts), pieces, graph=graph, keep=kept)
            if kept:
                return _whole(entry, batches, options, generator)
            value, gradient = accumulate(entry, batches, options, generator)
        value = value.to(w.device, w.dtype)
        return with_gradient(value, [w], [L.join(gradient).to(w.device, w.dtype)]) if graph else value
    live = L.variables()
    if params is not None and not (len(params) == len(live) and all(map(operator.is_, params, live))):
        raise ValueError(
            "params is a list of other tensors than the model's; expected None for the live model, L.variables(), or a flat "
            f"({L.num_params},) vector"
        )
    graph = torch.is_grad_enabled()
    with second_derivatives(L.model), torch.enable_grad():
        batches = MicroBatches(Trained(L), pieces, graph=graph, keep=create_graph and graph)
        if batches.keep:
            return _whole(entry, batches, options, generator)
        value, gradient = accumulate(entry, batches, options, generator)
    value = value.to(live[0].dtype)
    return with_gradient(value, live, gradient) if graph else value


def _whole(
    entry: Regularizer, batches: MicroBatches, options: Mapping[str, Any], generator: torch.Generator | None
) -> Tensor:
    """The penalty with the graphs of all its micro-batches."""
    found: list[Tensor] = []
    for weight, m in zip(entry.weights(batches, generator), batches, strict=True):
        if weight:
            m.generator = generator
            found.append(weight * entry.term(m, **options))
    value = torch.stack(found).sum()
    normalization = without_third_derivative(value)
    if normalization:
        raise ValueError(
            f"create_graph=True asks for third derivatives of the model, and PyTorch's are silently wrong through "
            f"{normalization}; leave create_graph out (the penalty's gradient is right), or use GroupNorm or RMSNorm"
        )
    return value
