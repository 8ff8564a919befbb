"""Every diagnostic of a user's own problem, shrunk, against dense references."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checks
from .diagnostics import DIAGNOSTICS, evaluate, parse
from .losses import BatchLoss, Loss
from .measurement import Measurement
from .objective import Objective
from .references import DEFINITIONS, Dense, accurate
from .self_check import check_products
from .snapshot import Snapshot

EXACT, LEVEL = 1e-10, 0.9999  # relative error of what is exact; of the intervals that must hold an estimate's reference
TWO_POINTS = ("secant_sharpness", "gradient_cosine", "batch_gradient_cosine")


@dataclass(frozen=True)
class Row:
    """A diagnostic and its reference.

    Attributes:
        ours, reference: the values; the one of an array's entries with the largest error, where there are several.
        error: their distance.
        allowed: what it may be: 1e-10 of the value plus the rounding floor, a bound, or the half width of a 99.99% interval.
        z: the error in standard errors; None for what is not estimated.
        status: "ok", "WRONG", "no reference", or "no value".
        note: why there is no value or no reference.
    """

    name: str
    ours: float | None = None
    reference: float | None = None
    error: float | None = None
    allowed: float | None = None
    z: float | None = None
    status: str = "ok"
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        problem: what was verified: how many examples, and which parameters.
        rows: a row for each diagnostic, and one for the check of products on all parameters.
    """

    problem: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether something could be compared, and nothing was wrong."""
        found = [row.status for row in self.rows]
        return "ok" in found and "WRONG" not in found

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        head = f"{'diagnostic':{width}}  {'curvlab':>12} {'reference':>12} {'error':>8} {'allowed':>8} {'z':>5}  "
        lines = [
            f"{row.name:{width}}  {_shown(row.ours, '12.5g')} {_shown(row.reference, '12.5g')} {_shown(row.error, '8.1e')} "
            f"{_shown(row.allowed, '8.1e')} {_shown(row.z, '5.1f')}  {row.status}{': ' if row.note else ''}{row.note}"
            for row in self.rows
        ]
        counts = [
            f"{sum(row.status == s for row in self.rows)} {s}" for s in dict.fromkeys(r.status for r in self.rows)
        ]
        return "\n".join([self.problem, head.rstrip(), *lines, ", ".join(counts)])


def verify(
    model: nn.Module,
    loss: str | Loss | BatchLoss,
    data: Any,
    *,
    weights: Tensor | Callable[[Any], Tensor] | None = None,
    parameters: checks.Which | None = None,
    diagnostics: Iterable[str] | None = None,
    examples: int = 7,
    batch_size: int = 2,
    lr: float | None = None,
    max_parameters: int = 300,
    seed: int = 0,
    show: bool = True,
) -> Verification:
    """Compare diagnostics on a small copy of a problem with dense references, and print the table.

    The copy is the model in float64 on the CPU, in evaluation mode, with a few examples. The references share only the
    model's forward pass with the rest of the package: a Hessian formed row by row, a gradient for each example, averages
    over all batches. A Hessian product on all parameters is compared with central differences besides. Takes seconds to a
    minute. Model and random states are left as they are.

    Args:
        model, loss, data, weights, parameters: as for `Objective`.
        diagnostics: names; default all that are registered.
        examples: how many of the data, spread evenly.
        batch_size: b of S_b.
        lr: of a step; default half of 1/λ_max.
        max_parameters: for dense matrices. Of larger models whole parameter tensors are taken, the smallest first; the rest
            are constants, and the result says so.
        seed: of the probes.
        show: whether to print the table.

    Raises:
        ValueError: what `Objective` refuses, or no parameter tensor that is small enough.

    Example:
        >>> import torch
        >>> data = torch.randn(20, 3), torch.randint(2, (20,))
        >>> verify(torch.nn.Linear(3, 2), "cross_entropy", data, diagnostics=["sharpness"], show=False).ok
        True
    """
    L = Objective(model, loss, data, weights=weights, parameters=parameters)
    found = verified(
        L,
        diagnostics=diagnostics,
        examples=examples,
        batch_size=batch_size,
        lr=lr,
        max_parameters=max_parameters,
        seed=seed,
    )
    if show:
        print(found)
    return found


def verified(
    whole: Objective,
    w: Tensor | None = None,
    *,
    diagnostics: Iterable[str] | None,
    examples: int,
    batch_size: int,
    lr: float | None,
    max_parameters: int,
    seed: int,
) -> Verification:
    """The same of an objective at a point w, (P,); default the model's current parameters."""
    plan = parse(DIAGNOSTICS if diagnostics is None else diagnostics)
    names = _small_enough(whole, max_parameters)
    L, test = _shrunk(whole, whole.point(w), names, examples)
    dense = Dense(L, test)
    dense.lr = lr or 0.5 / max(1e-9, float(dense.eigenvalues[-1].detach()))
    rows = [_products(whole, whole.point(w)), *(_compared(name, dense, min(batch_size, L.size), seed) for name in plan)]
    part = f"{L.num_params} parameters"
    if len(names) < len(whole.names):
        part = f"{L.num_params} of {whole.num_params} parameters ({', '.join(names)}; the others are constants)"
    return Verification(f"{L.size} of {whole.size} examples, {part}", tuple(rows))


def _small_enough(L: Objective, most: int) -> list[str]:
    """As many whole tensors as fit, the smallest first, in their order."""
    chosen, total = set(), 0
    for size, name in sorted(zip(L.sizes, L.names, strict=True)):
        total += size
        if total <= most:
            chosen.add(name)
    if not chosen:
        size, name = min(zip(L.sizes, L.names, strict=True))
        raise ValueError(
            f"the smallest parameter tensor, {name}, has {size} numbers, and dense references are for at most "
            f"max_parameters={most}; pass max_parameters={size}, which takes {size}² numbers for each example, or a "
            "narrower model"
        )
    return [name for name in L.names if name in chosen]


def _shrunk(whole: Objective, w: Tensor, names: list[str], count: int) -> tuple[Objective, Objective]:
    """A few examples of the data, and others held out, on a copy of the model with the parameters w."""
    twin = copy.deepcopy(whole.model).double().cpu()
    own = dict(twin.named_parameters())
    for name, part in zip(whole.names, whole.split(w), strict=True):
        own[name].data.copy_(part)
    used = torch.arange(whole.size) if whole.weights is None else whole.weights.nonzero()[:, 0].cpu()
    places = used[torch.linspace(0, len(used) - 1, min(count, len(used))).round().long()].unique()
    rest = used[~torch.isin(used, places)][:count]

    def taken(index: Tensor) -> Objective:
        batches = [batch for _, batch in whole.examples.select(index)]
        weights = None if whole.weights is None else whole.weights.cpu()[index]
        return Objective(
            twin,
            whole.loss,
            batches,
            weights=weights,
            parameters=names,
            dtype=torch.float64,
            device="cpu",
            check="never",
        )

    return taken(places), taken(rest if len(rest) else places)


def _products(L: Objective, w: Tensor) -> Row:
    """The check of Hessian-vector products by central differences, on all parameters."""
    name = "Hessian-vector products"
    other = copy.copy(L)
    other.check, other.outcomes = "first", {}
    try:
        check_products(other, w)
    except ValueError as error:
        return Row(name, status="WRONG", note=str(error))
    found = other.checked or "unchecked: the loss is not finite"
    return Row(name) if found.startswith("ok") else Row(name, status="no reference", note=found)


def _compared(name: str, dense: Dense, b: int, seed: int) -> Row:
    """A diagnostic at its most accurate, and its reference."""
    carry: dict[Any, Any] | None = None
    at = Snapshot(
        dense.L, dense.w, step=1, seed=seed, batch_size=b, lr=dense.lr, batch_gradient=dense.drawn,
        preconditioner=dense.divisor(), test=dense.held_out,
    )  # fmt: skip
    try:
        if name in TWO_POINTS:
            carry = {}
            before = replace(at, w=dense.w_before(), step=0, batch_gradient=dense.G[0], carry=carry)
            evaluate(before.anew(), parse([name]))
        found = evaluate(at.anew(carry=carry), parse([(name, accurate(dense).get(name, {}))]))[name]
    except (ValueError, TypeError) as error:
        return Row(name, status="no value", note=str(error))
    if found.value is None:
        return Row(name, status="no value", note=found.note or "")
    try:
        truth = _reference(name, dense, b, found)
    except TypeError as error:
        return Row(name, status="no reference", note=str(error))
    if truth is None:
        return Row(name, ours=float(np.max(found.value)), status="no reference")
    return _row(name, found, truth)


def _reference(name: str, dense: Dense, b: int, found: Measurement) -> np.ndarray | None:
    if name == "hessian_density" and found.axis:
        return dense.density(torch.tensor(found.axis[1], dtype=torch.float64)).numpy()
    if name not in DEFINITIONS:
        return None
    with dense.L.measuring():
        return DEFINITIONS[name](dense, b, False).detach().numpy()


def _row(name: str, found: Measurement, truth: np.ndarray) -> Row:
    """The entry that is farthest off, by what is allowed."""
    ours, truth = np.atleast_1d(np.asarray(found.value, dtype=float)), np.atleast_1d(truth)
    size = np.abs(truth).max()
    low, high = found.interval(LEVEL)
    allowed = np.broadcast_to((np.asarray(high) - np.asarray(low)) / 2 + EXACT * size, ours.shape)
    if name == "hessian_density":  # what quadrature misses, which is in no error
        allowed = allowed + 1e-6 * size
    error = np.abs(ours - truth)
    i = int(np.argmax(error / np.maximum(allowed, 1e-300)))
    sem = np.broadcast_to(np.asarray(found.error), ours.shape)[i] if found.kind == "sem" else 0.0
    status = "ok" if np.isfinite(error).all() and error[i] <= allowed[i] else "WRONG"
    z = float(error[i] / sem) if sem > 0 else None
    return Row(name, float(ours[i]), float(truth[i]), float(error[i]), float(allowed[i]), z, status, found.note or "")


def _shown(x: float | None, form: str) -> str:
    return f"{'':>{form.split('.')[0]}}" if x is None else f"{x:{form}}"
