"""The list of regularizers, and how one of them becomes a differentiable number of (objective, params, batch)."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..losses import LIKELIHOODS, BatchLoss
from ..objective import Objective
from .evaluation import evaluate
from .micro_batch import MicroBatches

Term = Callable[..., Tensor]  # (micro-batch, **options) -> scalar
Penalty = Callable[..., Tensor]  # (objective, params, batch, *, micro_batch_size, ...) -> scalar
Request = str | Penalty | tuple[str | Penalty, Mapping[str, Any]]
_COMMON = """

    Args:
        L: the objective, for its model, loss and weights.
        params: None for the live model in its own mode and precision: the gradient arrives in the parameters' `.grad`;
            its buffers, such as running statistics, stay as they are. Or a flat (P,) vector, evaluated as every
            measurement is, and differentiable in that vector.
        batch: indices of examples, a 1-D int64 tensor; a batch of data; or None for all data.
        micro_batch_size: |M|, examples of one micro-batch; default the whole batch. A last smaller one counts by its size.
        generator: of what is drawn, on the CPU; default torch's own.
        create_graph: keep the graphs of all micro-batches, for higher derivatives; refused with LayerNorm and with batch
            statistics, where PyTorch's third derivatives are wrong. Otherwise value and gradient are accumulated with the
            memory of one micro-batch, whatever the batch.

    Returns:
        A scalar to be added to a loss. `backward` with create_graph=True raises RuntimeError unless the graph was kept.

    Raises:
        ValueError, TypeError: a micro-batch size below 1, params that are neither, a loss without what the penalty needs,
            create_graph where third derivatives are wrong.
"""


@dataclass(frozen=True)
class Regularizer:
    """A penalty by name: a function of one micro-batch, and how the micro-batches count.

    Attributes:
        term: (micro-batch, **options) -> scalar. The penalty is Σ_M (|M|/|B|) term(M).
        penalty: the public function of (L, params, batch).
        draws: what is drawn at random, or nothing.
        needs: "outputs" of the model, or the "likelihood" behind the loss.
        sampled: the penalty is term(S) for one S, drawn uniformly among the micro-batches.
        first_order: the term asks for no second derivative of the model.
    """

    name: str
    term: Term
    penalty: Penalty
    symbol: str
    formula: str
    source: str
    draws: str
    needs: str
    sampled: bool
    first_order: bool
    options: tuple[str, ...]

    def weights(self, batches: MicroBatches, generator: torch.Generator | None) -> list[float]:
        """How much each micro-batch counts."""
        if not self.sampled:
            return batches.weights
        drawn = int(torch.randint(len(batches.pieces), (), generator=generator))
        return [float(i == drawn) for i in range(len(batches.pieces))]


REGULARIZERS: dict[str, Regularizer] = {}
WATCHERS: list[Callable[[Regularizer], None]] = []  # told of every new one


def regularizer(
    symbol: str,
    *,
    formula: str,
    source: str,
    draws: str = "",
    needs: str = "",
    sampled: bool = False,
    first_order: bool = False,
) -> Callable[[Term], Penalty]:
    """Turn a function of one micro-batch, ``(m, **options) -> scalar``, into a registered penalty of (L, params, batch).

    The function looks at ``m.loss``, ``m.gradient``, ``m.outputs`` and so on (see `MicroBatch`). The penalty is the mean
    over the micro-batches, a name for `train(penalties=...)`, and a diagnostic of the same name.

    Raises:
        ValueError: a name that is taken.

    Example:
        >>> @regularizer("‖∇L_M‖₁", formula="mean_M Σ_j |∂_j L_M|", source="here")
        ... def gradient_sum_penalty(m):
        ...     return sum(g.abs().sum() for g in m.gradient)
        >>> import curvlab as cl  # where it is a diagnostic now
        >>> del REGULARIZERS["gradient_sum_penalty"], cl.diagnostics.DIAGNOSTICS["gradient_sum_penalty"]
    """

    def register(term: Term) -> Penalty:
        name = term.__name__
        if name in REGULARIZERS:
            raise ValueError(f"regularizer {name}: the name is taken")

        def penalty(
            L: Objective,
            params: Tensor | list[Tensor] | None,
            batch: Any,
            *,
            micro_batch_size: int | None = None,
            generator: torch.Generator | None = None,
            create_graph: bool = False,
            **options: Any,
        ) -> Tensor:
            _known_options(entry, options)
            require(L, entry)
            L.ranks.require_one("micro-batches of a penalty")
            pieces = L.pieces(batch, checked_size(micro_batch_size))
            return evaluate(entry, L, params, pieces, generator, create_graph, options)

        own = [p for p in inspect.signature(term).parameters.values() if p.kind is p.KEYWORD_ONLY]
        common = list(inspect.signature(penalty).parameters.values())[:-1]
        functools.update_wrapper(penalty, term)
        del penalty.__wrapped__  # type: ignore[attr-defined]
        penalty.__signature__ = inspect.Signature(common + own, return_annotation=Tensor)  # type: ignore[attr-defined]
        penalty.__doc__ = inspect.cleandoc(term.__doc__ or "") + "\n\n" + inspect.cleandoc(_COMMON)
        names = tuple(p.name for p in own)
        entry = Regularizer(name, term, penalty, symbol, formula, source, draws, needs, sampled, first_order, names)
        for tell in WATCHERS:
            tell(entry)
        REGULARIZERS[name] = entry
        return penalty

    return register


def resolve(request: Request) -> tuple[Regularizer, dict[str, Any]]:
    """The regularizer behind a name, a penalty function, or a pair of either with options.

    `_penalty` at the end of a name may be left out.

    Raises:
        ValueError: an unknown regularizer, or an option that it does not have; the message lists what there is.

    Example:
        >>> resolve("gradient_norm")[0].name
        'gradient_norm_penalty'
    """
    given, options = request if isinstance(request, tuple) else (request, {})
    name = given if isinstance(given, str) else getattr(given, "__name__", repr(given))
    entry = REGULARIZERS.get(name) or REGULARIZERS.get(f"{name}_penalty")
    if entry is None or (not isinstance(given, str) and given is not entry.penalty):
        raise ValueError(
            f"there is no regularizer {name!r}; there are {', '.join(REGULARIZERS)}. Make one of a function of a "
            "micro-batch by the decorator curvlab.regularizers.regularizer"
        )
    _known_options(entry, options)
    return entry, dict(options)


def terms(penalties: Iterable[tuple[float, Request]]) -> list[tuple[float, Regularizer, dict[str, Any]]]:
    """Pairs (strength, regularizer) as (strength, entry, options).

    Raises:
        ValueError: something else than such pairs, a strength that is not finite, or a regularizer that comes twice.
    """
    found: list[tuple[float, Regularizer, dict[str, Any]]] = []
    for pair in penalties:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], Real)):
            raise ValueError(
                f"a penalty is {pair!r}; expected (strength, regularizer), such as (0.01, 'gradient_norm')"
            )
        strength, request = pair
        if not math.isfinite(strength):
            raise ValueError(f"the strength of a penalty is {strength}; expected a finite number")
        entry, options = resolve(request)
        if any(entry is other for _, other, _ in found):
            raise ValueError(f"penalty {entry.name} is given twice; give it once, with the sum of the strengths")
        found.append((float(strength), entry, options))
    return found


def refusal(L: Objective, entry: Regularizer) -> str | None:
    """Why a regularizer does not exist for an objective, or None."""
    if entry.needs and isinstance(L.loss, BatchLoss):
        return (
            f"{entry.name} needs the outputs of the model, and a batch_loss calls the model itself; pass loss as a function "
            "(outputs, targets) -> (B,)"
        )
    if entry.needs == "likelihood" and L.loss not in LIKELIHOODS.values():
        known = ", ".join(map(repr, LIKELIHOODS))
        return f"{entry.name} needs the likelihood behind the loss; it is known for loss={known}"
    return None


def require(L: Objective, entry: Regularizer) -> None:
    """Refuse a regularizer that does not exist for an objective.

    Raises:
        ValueError: saying what is missing.
    """
    reason = refusal(L, entry)
    if reason:
        raise ValueError(reason)


def checked_size(micro_batch_size: int | None) -> int | None:
    """A micro-batch size of at least 1, or None for the whole batch.

    Raises:
        ValueError: something else.
    """
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(
            f"micro_batch_size is {micro_batch_size}; expected at least 1 example, or None for the whole batch"
        )
    return micro_batch_size


def _known_options(entry: Regularizer, options: Mapping[str, Any]) -> None:
    unknown = set(options) - set(entry.options)
    if unknown:
        raise ValueError(
            f"regularizer {entry.name} has no option {sorted(unknown)}; it has {', '.join(entry.options) or 'none'}"
        )
