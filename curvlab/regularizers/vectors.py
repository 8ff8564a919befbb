"""Vectors in parts, and scalars whose gradient is known or must not be trusted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def squared_norm(vectors: list[Tensor]) -> Tensor:
    """‖v‖² of a vector given in parts."""
    flat = torch.cat([v.reshape(-1) for v in vectors])
    return flat.dot(flat)


def inner(u: list[Tensor], v: list[Tensor]) -> Tensor:
    """uᵀv of vectors given in parts."""
    return torch.cat([a.reshape(-1) for a in u]).dot(torch.cat([b.reshape(-1) for b in v]))


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: list[Tensor], *params: Tensor) -> Tensor:
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of this penalty was accumulated without its graph and cannot be differentiated again; pass "
                "create_graph=True to the penalty, at the memory of all its micro-batches (not for the difference form)"
            )
        return None, None, *(upstream * g for g in ctx.gradient)


def with_gradient(value: Tensor, params: list[Tensor], gradient: list[Tensor]) -> Tensor:
    """`value` as a function of `params` with a known gradient; differentiating it twice is refused."""
    return _KnownGradient.apply(value, gradient, *params)


def without_third_derivative(value: Tensor) -> str | None:
    """A normalization in the graph of `value` that PyTorch differentiates right twice, but not three times.

    Its second backward takes the mean and the deviation that the forward pass saved for constants. With torch 2.13 third
    derivatives are off by 14-18% in small nets; GroupNorm, RMSNorm and BatchNorm with fixed statistics are right.
    """
    seen: set[Any] = set()
    pending = [value.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "LayerNormBackward" in node.name():
            return "LayerNorm"
        if "BatchNormBackward" in node.name() and getattr(node, "_saved_training", False):
            return "BatchNorm or InstanceNorm with batch statistics"
        pending += [parent for parent, _ in node.next_functions]
    return None
