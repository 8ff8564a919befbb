"""Per-example losses, as functions (outputs (B, ...), targets) -> (B,), and the accuracy that goes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Any, Any], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(outputs)[target], (B,), for logits (B, C) and class indices (B,) or class probabilities (B, C).

    Raises:
        ValueError: outputs that are not (B, C). Sequences need a loss of one's own, which says how tokens are averaged.
    """
    _two_dimensional(outputs, "cross_entropy")
    return F.cross_entropy(outputs, targets, reduction="none")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """0.5 * sum over outputs of (output - target)², (B,); class indices (B,) stand for one-hot targets.

    The factor and the sum, instead of a mean over outputs, set the scale of every comparison with 2/lr. They are those
    of Cohen et al. 2021 (arXiv 2103.00065).

    Raises:
        ValueError: targets that are neither class indices nor of the shape of the outputs.
    """
    if not targets.is_floating_point():
        _two_dimensional(outputs, "squared_error with class indices")
        # F.one_hot has no batching rule under vmap.
        targets = (targets[..., None] == torch.arange(outputs.shape[-1], device=targets.device)).to(outputs.dtype)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"squared_error got outputs of shape {tuple(outputs.shape)} and targets of shape "
            f"{tuple(targets.shape)}; expected equal shapes, or class indices of shape (B,)"
        )
    return 0.5 * (outputs - targets).square().flatten(1).sum(1)


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum over outputs of -log p(target), (B,), for logits and 0/1 targets (or probabilities) of the same shape.

    Raises:
        ValueError: shapes that differ.
    """
    if targets.shape != outputs.shape:
        raise ValueError(
            f"binary_cross_entropy got outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}; "
            "expected equal shapes"
        )
    losses = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
    return losses.reshape(len(losses), -1).sum(1)


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
    "binary_cross_entropy": binary_cross_entropy,
}


def fisher_root(loss: Any, outputs: Tensor, xi: Tensor) -> Tensor | None:
    """R ξ per example, where R Rᵀ is the Fisher information of the likelihood in the outputs; None without a likelihood.

    The likelihoods: categorical with softmax, R = diag(√p)(I - √p √pᵀ); independent Bernoulli, R = diag(√(p(1 - p)));
    Gaussian of unit variance for `squared_error`, R = I. In each R Rᵀ is also the Hessian of the loss in the outputs, so
    Fisher and GGN agree. With random signs ξ, E[R ξ ξᵀ Rᵀ] = R Rᵀ.

    Args:
        outputs, xi: (B, C), or (B,) for a single logit.
    """
    if loss is cross_entropy:
        root = outputs.softmax(1).sqrt()
        return root * (xi - root * (root * xi).sum(1, keepdim=True))
    if loss is binary_cross_entropy:
        p = outputs.sigmoid()
        return (p * (1 - p)).sqrt() * xi
    return xi if loss is squared_error else None


@dataclass(frozen=True)
class BatchLoss:
    """A loss of a whole batch; made by `batch_loss`."""

    function: Callable[[Any, Any], Tensor]


def batch_loss(function: Callable[[Any, Any], Tensor]) -> BatchLoss:
    """Mark `function`, (model, batch) -> (B,), as a loss that calls the model itself.

    For dict batches, Hugging Face outputs, contrastive terms per example, or any other pytree.

    Example:
        >>> import torch
        >>> loss = batch_loss(lambda model, batch: (model(batch["x"]) - batch["y"]).square().sum(1))
    """
    return BatchLoss(function)


def resolve(loss: str | Loss | BatchLoss) -> Loss | BatchLoss:
    """The function behind a name; a callable stays what it is.

    Raises:
        ValueError: an unknown name, or a torch loss module that averages over the batch.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(
                f"loss is {loss!r}; expected one of {sorted(LOSSES)}, or a function (outputs, targets) -> (B,)"
            )
        return LOSSES[loss]
    reduction = getattr(loss, "reduction", "none")
    if reduction != "none":
        name = type(loss).__name__
        raise ValueError(
            f"{name} has reduction={reduction!r}, one number for the batch; curvlab does the averaging and "
            f"needs one number per example: pass {name}(reduction='none'), summed over outputs if need be"
        )
    return loss


def correct(outputs: Tensor, targets: Tensor) -> Tensor | None:
    """1 where the largest output is at the target class, else 0, (B,); NaN for outputs that are not finite.

    None where the targets are no classes.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        return None
    if targets.is_floating_point():
        probabilities = targets.shape == outputs.shape and bool(
            (targets >= 0).all() and (targets.sum(1) - 1).abs().max() < 1e-4
        )
        return _hits(outputs, targets.argmax(1)) if probabilities else None
    return _hits(outputs, targets)


def _hits(outputs: Tensor, classes: Tensor) -> Tensor:
    hits = (outputs.argmax(1) == classes).to(outputs.dtype)
    return torch.where(torch.isfinite(outputs).all(1), hits, torch.nan)


def _two_dimensional(outputs: Tensor, name: str) -> None:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"{name} got model outputs of {got}; expected (B, C). Pass a function (outputs, targets) -> (B,) "
            "that says how the other dimensions are averaged, or batch_loss for other batches and outputs"
        )
