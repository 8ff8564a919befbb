"""Cross-entropy of many classes, such as a vocabulary, whose gradient graph keeps one tensor of the size of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CLASSES = 1024  # from so many on, what is kept is worth more than what calls of Python cost


def many_classes(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each row, (M, C), (M,) -> (M,); as `F.cross_entropy` with reduction "none".

    Autograd's own keeps the log-probabilities, the gradient δ in the logits, and what leads from one to the other. Here only
    δ = g (p - e_target) is kept, which the layer before needs too (g: gradient that arrives at a row's loss), for with it
    the product with the softmax's Hessian is, without p,

        g (diag(p) - p pᵀ) u = δ ∘ a + g a_target e_target,  a = u - m,  m = pᵀu = δᵀu / g + u_target.

    Derivatives of any order, forward and reverse. Rows with g = 0 (ignored targets) have none, also in g.
    """
    return _Loss.apply(logits, targets)


class _Loss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.logsumexp(1) - _at(logits, targets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        logits, targets = ctx.saved_tensors
        return _Gradient.apply(logits, targets, g), None

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, _: Any) -> Tensor:
        logits, targets = ctx.saved_tensors
        return (_Gradient.apply(logits, targets, torch.ones_like(dz[:, 0])) * dz).sum(1)


class _Gradient(torch.autograd.Function):
    """δ = g (p - e_target), (M, C)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, g: Tensor) -> Tensor:
        return _add(logits.softmax(1), targets, -1.0) * g[:, None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])
        ctx.save_for_forward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        delta, targets, g = ctx.saved_tensors
        along = _over((delta * u).sum(1), g)
        return _product(delta, targets, g, u, along), None, along

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, _: Any, dg: Tensor) -> Tensor:
        delta, targets, g = ctx.saved_tensors
        return _product(delta, targets, g, dz, _over((delta * dz).sum(1), g)) + delta * _over(dg, g)[:, None]


def _product(delta: Tensor, targets: Tensor, g: Tensor, u: Tensor, along: Tensor) -> Tensor:
    """g (diag(p) - p pᵀ) u of each row, where `along` is (p - e_target)ᵀu."""
    a = u - (along + _at(u, targets))[:, None]
    return _add(delta * a, targets, g * _at(a, targets))


def _at(rows: Tensor, targets: Tensor) -> Tensor:
    return rows.gather(1, targets[:, None])[:, 0]


def _add(rows: Tensor, targets: Tensor, values: Tensor | float) -> Tensor:
    values = torch.as_tensor(values, dtype=rows.dtype, device=rows.device).expand(len(rows))
    return rows.scatter_add(1, targets[:, None], values[:, None])


def _over(numerator: Tensor, g: Tensor) -> Tensor:
    """Numerator / g, and 0 where g is."""
    return torch.where(g == 0, torch.zeros_like(g), numerator / torch.where(g == 0, torch.ones_like(g), g))
