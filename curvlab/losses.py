"""Per-example losses, as functions (outputs (B, ...), targets) -> (B,), and the accuracy that goes with them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cross_entropy import CLASSES, many_classes

Loss = Callable[[Any, Any], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(outputs)[target], (B,), for logits (B, C) and class indices (B,) or class probabilities (B, C).

    Raises:
        ValueError: outputs that are not (B, C). Sequences need a loss of one's own, which says how tokens are averaged.
    """
    _two_dimensional(outputs, "cross_entropy")
    if outputs.shape[1] >= CLASSES and targets.ndim == 1:
        return many_classes(outputs, targets)
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


class Averaged(nn.Module):
    """A torch loss module that averages, taken apart: the loss of each example, and what the example weighs.

    With weights w_i from `weights`, Σ w_i ℓ_i / Σ w_i is the module's own value on any data, however they are split:
    `CrossEntropyLoss` and `NLLLoss` with class weights, ignored targets, label smoothing and further dimensions weigh an
    example by the class weights of its targets that are not ignored; other modules average over all elements, or over the
    batch alone ("batchmean").

    Args:
        criterion: a module of torch.nn with reduction "mean" or "batchmean".
        shift: so many positions of the outputs, (B, T, C), are compared with later targets; None for outputs that have
            the classes in their second dimension, as the module itself expects.

    Raises:
        ValueError: outputs and targets of shapes that would be broadcast.
    """

    def __init__(self, criterion: Any, shift: int | None = None) -> None:
        super().__init__()
        self.criterion = copy.copy(criterion)
        self.criterion.reduction = "none"
        self.batch_mean = criterion.reduction == "batchmean"
        self.by_class = isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss)
        self.shift = shift
        self.__name__ = type(criterion).__name__ if shift is None else "next_token" if shift else "token"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """ℓ_i, (B,); 0 for an example of weight 0."""
        if self.shift is not None:
            if outputs.ndim != 3 or targets.shape != outputs.shape[:2]:
                raise ValueError(
                    f"{self.__name__} got outputs of shape {tuple(outputs.shape)} and targets of shape "
                    f"{tuple(targets.shape)}; expected (B, T, V) and (B, T)"
                )
            # All of the outputs stay, so that nothing of their size is copied; the last ones have no target.
            ends = targets.new_full((len(targets), self.shift), self.criterion.ignore_index)
            outputs, targets = outputs.mT, torch.cat([targets[:, self.shift :], ends], 1)
        elif not self.by_class and outputs.shape != targets.shape:
            raise ValueError(
                f"{self.__name__} got outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}; "
                "expected equal shapes, which torch would broadcast to another loss"
            )
        found = self._elements(outputs, targets)
        found = found.reshape(len(found), -1)
        if self.by_class and not targets.is_floating_point():
            weights = self._of_targets(targets)
            return found.sum(1) / torch.where(weights > 0, weights, 1.0).to(found)
        return found.sum(1) if self.batch_mean else found.mean(1)

    def _elements(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the criterion averages, in the shape that it has before."""
        if self._by_rows(outputs, targets):
            rows = outputs.movedim(1, -1).reshape(-1, outputs.shape[1])
            classes = torch.where(targets == self.criterion.ignore_index, 0, targets)
            found = many_classes(rows, classes.flatten()).view(targets.shape)
            return found * self._each(targets).to(found)
        own = {name: buffer.to(outputs) for name, buffer in self.criterion.named_buffers()}  # class weights
        return torch.func.functional_call(self.criterion, own, (outputs, targets))

    def _by_rows(self, outputs: Tensor, targets: Tensor) -> bool:
        plain = isinstance(self.criterion, nn.CrossEntropyLoss) and not self.criterion.label_smoothing
        return plain and not targets.is_floating_point() and outputs.ndim > 1 and outputs.shape[1] >= CLASSES

    def weights(self, batch: Any) -> Tensor | None:
        """(B,) what the examples of a batch (inputs, targets) weigh; None if all weigh the same."""
        if not self.by_class or batch[1].is_floating_point():
            return None
        return self._of_targets(batch[1][:, self.shift :] if self.shift and batch[1].ndim == 2 else batch[1])

    def _of_targets(self, targets: Tensor) -> Tensor:
        return self._each(targets).reshape(len(targets), -1).sum(1)

    def _each(self, targets: Tensor) -> Tensor:
        """What each target weighs: its class weight, or 1, and 0 if it is ignored."""
        kept, weight = targets != self.criterion.ignore_index, self.criterion.weight
        return kept if weight is None else kept * weight.to(targets.device)[torch.where(kept, targets, 0)]

    def unweighted(self, targets: Tensor) -> bool:
        """Whether this is plain `cross_entropy` for such targets: a class each, none of them ignored."""
        simple = (
            isinstance(self.criterion, nn.CrossEntropyLoss) and self.shift is None and self.criterion.weight is None
        )
        if not simple or self.criterion.label_smoothing:
            return False
        return targets.ndim == (2 if targets.is_floating_point() else 1) and bool((targets != self.ignored).all())

    @property
    def ignored(self) -> int:
        """The class index that stands for no target."""
        return getattr(self.criterion, "ignore_index", -100)


# Of sequences, for logits (B, T, V) and targets (B, T), -100 ignored: a sequence weighs as many tokens as count in it, so
# that the mean is that over all tokens. For `next_token` the targets are the inputs, as language models have it.
token, next_token = Averaged(nn.CrossEntropyLoss(), shift=0), Averaged(nn.CrossEntropyLoss(), shift=1)

LIKELIHOODS: dict[str, Loss] = {  # whose model of the targets is known
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
    "binary_cross_entropy": binary_cross_entropy,
}
LOSSES: dict[str, Loss] = LIKELIHOODS | {"token": token, "next_token": next_token}


def logits(outputs: Any) -> Any:
    """The tensor that a named loss reads: the outputs themselves, their `logits`, or the first tensor of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return outputs["logits"]
    if isinstance(getattr(outputs, "logits", None), Tensor):
        return outputs.logits
    listed = outputs if isinstance(outputs, list | tuple) else ()
    return next((item for item in listed if isinstance(item, Tensor)), outputs)


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
    weights: Callable[[Any], Tensor | None] = lambda batch: None


def batch_loss(
    function: Callable[[Any, Any], Tensor], *, weights: Callable[[Any], Tensor | None] = lambda batch: None
) -> BatchLoss:
    """Mark `function`, (model, batch) -> (B,), as a loss that calls the model itself.

    For dict batches, Hugging Face outputs, contrastive terms per example, or any other pytree.

    Args:
        weights: batch -> (B,), what the examples weigh in the mean, such as their numbers of unmasked tokens; default all
            the same.

    Example:
        >>> import torch
        >>> loss = batch_loss(lambda model, batch: (model(batch["x"]) - batch["y"]).square().sum(1))
    """
    return BatchLoss(function, weights)


FUNCTIONS: dict[Any, type[nn.Module]] = {  # which average, and so say nothing of one example
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


def resolve(loss: str | Loss | BatchLoss) -> Loss | BatchLoss:
    """The function behind a name; a torch loss that averages is taken apart; another callable stays what it is.

    Raises:
        ValueError: an unknown name, or a loss whose reduction is not known to be a mean.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(
                f"loss is {loss!r}; expected one of {sorted(LOSSES)}, or a function (outputs, targets) -> (B,)"
            )
        return LOSSES[loss]
    if inspect.isfunction(loss) and loss in FUNCTIONS:
        loss = FUNCTIONS[loss]()
    reduction = getattr(loss, "reduction", "none")
    if reduction == "none" or isinstance(loss, Averaged):
        return loss
    if reduction in ("mean", "batchmean") and isinstance(loss, nn.modules.loss._Loss):
        return Averaged(loss)
    name = type(loss).__name__
    raise ValueError(
        f"{name} has reduction={reduction!r}, one number for the batch; curvlab does the averaging and needs one number per "
        f"example: pass {name}(reduction='none'), summed over outputs if need be"
    )


CONVENTIONS: dict[Loss, str] = {
    cross_entropy: "mean over examples of -log softmax(outputs)[target]",
    squared_error: "mean over examples of 0.5 * sum over outputs of (output - target)^2",
    binary_cross_entropy: "mean over examples of the sum over outputs of -log p(target)",
}


def convention(loss: Loss | BatchLoss) -> str:
    """In words, what is averaged over what: the scale of every number that is compared with 2/lr."""
    if isinstance(loss, Averaged):
        kind = "sum over the batch / its size" if loss.batch_mean else "own mean over all data at once"
        return f"{type(loss.criterion).__name__}: its {kind}, with its class weights, without ignored targets"
    return CONVENTIONS.get(loss, "mean over examples of what the given function returns")  # type: ignore[arg-type]


def reads_logits(loss: Any) -> bool:
    """Whether a loss is one of ours, for which `logits` picks what it reads from the model's outputs."""
    return isinstance(loss, Averaged) or loss in LOSSES.values()


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
    return _hits(outputs, targets) if targets.ndim == 1 else None


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
