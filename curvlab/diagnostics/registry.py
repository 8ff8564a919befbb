"""The list of diagnostics, and how one of them is evaluated."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch

from .. import schedule
from ..checks import finite_point
from ..hvp import Engine
from ..linalg import relative_error
from ..measurement import Measurement, missing
from ..objective import Objective
from ..sharded import require_gathered
from ..snapshot import Snapshot

Function = Callable[..., Measurement]
Request = str | tuple[str, Mapping[str, Any]]
NEEDS = {
    "batch_size": "pass batch_size=32, or a sequence of batch sizes",
    "lr": "pass lr=0.1, the learning rate of the step",
    "test": "pass test=Objective(model, loss, held_out_data)",
    "batch_gradient": "it exists while training: measure it with train(), or with Monitor(..., optimizer=optimizer)",
    "trained": "what is trained is known while training: measure it with train(), or measure an objective that says it: "
    "curvlab.trained.TrainedObjective(L, penalties, weight_decay=0.01)",
}


NO_GRADIENT = (
    "there is no gradient of this step yet: call the monitor between the backward pass and the optimizer's step"
)
TRAINED = "trained/"  # asks for a diagnostic of the objective that is trained


@dataclass(frozen=True)
class Diagnostic:
    """A named function Snapshot -> Measurement, with what the documentation says of it."""

    name: str
    function: Function
    symbol: str
    formula: str
    kind: str
    cost: str
    needs: tuple[str, ...]
    options: tuple[str, ...]
    divided: bool


DIAGNOSTICS: dict[str, Diagnostic] = {}
ALIASES = {  # the same number under another name
    "gradient_noise_interaction": "instability",
    "microbatch_gradient_norm_squared": "gradient_norm_penalty",
}


def diagnostic(
    symbol: str,
    *,
    formula: str,
    kind: str,
    cost: str,
    needs: Iterable[str] = (),
    options_of: Function | None = None,
    divided: bool = False,
) -> Callable[[Function], Function]:
    """Register a function ``(at: Snapshot, **options) -> Measurement`` under its own name.

    It is then a name for `measure` and `train`, in logs, plots and on the command line.

    Args:
        symbol: of the quantity, as in the papers.
        formula: one line of plain text.
        kind: "exact", "bound" or "sem"; for the documentation, the result states its own.
        cost: in gradients of the data and products with the Hessian.
        needs: what a snapshot must have: "batch_size", "lr", "test", "batch_gradient".
        options_of: another diagnostic, to which this one passes its ``**options`` on.
        divided: whether it may be asked of an objective whose vectors are divided among ranks (``sharded="keep"``): its sums
            over entries are those of `Objective.entries`.

    Raises:
        ValueError: a name that is taken, or an unknown need.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        unknown = set(needs) - set(NEEDS)
        if name in DIAGNOSTICS or unknown:
            raise ValueError(
                f"diagnostic {name}: the name is taken"
                if name in DIAGNOSTICS
                else f"diagnostic {name} needs {sorted(unknown)}; expected among {sorted(NEEDS)}"
            )
        options = _options(function) + [
            o for o in (_options(options_of) if options_of else []) if o not in _options(function)
        ]
        DIAGNOSTICS[name] = Diagnostic(
            name, function, symbol, formula, kind, cost, tuple(needs), tuple(options), divided
        )
        return function

    return register


def _options(function: Function) -> list[str]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]


def parse(requests: Iterable[Request]) -> dict[str, dict[str, Any]]:
    """Names, or pairs (name, options), as options by name.

    Raises:
        ValueError: an unknown or repeated name, or an option that the diagnostic does not have; the message lists what
            there is.
    """
    plan: dict[str, dict[str, Any]] = {}
    for request in [requests] if isinstance(requests, str) else requests:
        name, options = (request, {}) if isinstance(request, str) else request
        prefix = TRAINED if name.startswith(TRAINED) else ""
        plain = name.removeprefix(prefix)
        plain = ALIASES.get(plain, plain)
        if plain not in DIAGNOSTICS:
            raise ValueError(f"there is no diagnostic {name!r}; there are {', '.join(sorted(DIAGNOSTICS))}")
        name = prefix + plain
        if name in plan:
            raise ValueError(f"diagnostic {name} is asked for twice; ask once, with the options of one of them")
        known = DIAGNOSTICS[plain].options
        unknown = set(options) - set(known)
        if unknown:
            raise ValueError(f"diagnostic {name} has no option {sorted(unknown)}; it has {', '.join(known) or 'none'}")
        plan[name] = dict(options)
    return plan


def batch_sizes(given: Any) -> int | tuple[int, ...] | None:
    """A batch size, or several, as plain integers.

    Raises:
        ValueError: something else, or an empty sequence.
    """
    if given is None or isinstance(given, Integral):
        return None if given is None else int(given)
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
    if not listed or not all(isinstance(b, Integral) for b in listed):
        raise ValueError(f"batch_size is {given!r}; expected a whole number such as 32, or a sequence such as [8, 32]")
    return tuple(int(b) for b in listed)


def require(L: Objective, plan: Mapping[str, Mapping[str, Any]], available: Mapping[str, Any]) -> None:
    """Refuse, before anything is computed, diagnostics that need what is not there, or vectors that are whole.

    Raises:
        ValueError: naming the diagnostic, what it needs, and how to pass it.
    """
    for name, options in plan.items():
        entry = DIAGNOSTICS[name.removeprefix(TRAINED)]
        needs = entry.needs
        if not entry.divided:
            require_gathered(L, f"diagnostics such as {name}")
        for need in (*needs, "trained") if name.startswith(TRAINED) else needs:
            if available.get(need) is None and options.get(need) is None:
                raise ValueError(f"diagnostic {name} needs {need}: {NEEDS[need]}")


def described(
    L: Objective,
    plan: Mapping[str, Mapping[str, Any]],
    *,
    every: schedule.Every,
    batch_size: int | tuple[int, ...] | None,
    replacement: bool,
    seed: int,
    engine: Engine,
) -> dict[str, Any]:
    """What the configuration of any run says of what is measured, and how."""
    return {
        "objective": L.describe(),
        "batch_size": batch_size,
        "replacement": replacement,
        "every": schedule.described(every),
        "diagnostics": list(plan.items()),
        "probe_seed": seed,
        "engine": engine,
        "threads": torch.get_num_threads(),
    }


def _why_not_finite(at: Snapshot) -> str:
    try:
        _ = at.gradient
    except ArithmeticError as error:  # which names the parameter
        return f"not finite: {error}"
    return "not finite: the parameters have diverged"


def _approximate(found: Measurement, errors: list[tuple[float, float]]) -> Measurement:
    """With the share of the value by which products by differences may be off."""
    if found.value is None or not errors:
        return found
    off = relative_error(errors)
    share = off * np.abs(found.value)
    note = f"approximate: products by central differences, off by about {off:.1g} of the longest"
    note = f"{found.note}; {note}" if found.note else note
    if found.kind == "sem":
        return dataclasses.replace(found, floor=found.floor + share, note=note)
    return dataclasses.replace(found, kind="bound", error=found.error + share, note=note)


def evaluate(at: Snapshot, plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Measurement]:
    """Measure a plan at a snapshot, inside one state guard; also kept in ``at.measurements``.

    A point where the loss or a product is not finite gives measurements without value and with that reason, so that
    training can go on.
    """
    with at.objective.measuring():
        for name, options in plan.items():
            point = at.trained if name.startswith(TRAINED) else at
            assert point is not None
            point.spared()
            started, spent, before = time.perf_counter(), at.matvecs, len(point.errors)
            entry = DIAGNOSTICS[name.removeprefix(TRAINED)]
            try:
                finite_point(point.objective, point.w)
                found = missing(NO_GRADIENT)
                if "batch_gradient" not in entry.needs or point.batch_gradient is not None:
                    found = point.objective.fitting(partial(entry.function, point, **options), point.release)
            except (ArithmeticError, torch.linalg.LinAlgError) as error:  # not finite, or so large that it overflows
                found = missing(str(error))
            if found.value is not None and not np.all(np.isfinite(found.value)):
                found = missing(_why_not_finite(point))
            found = _approximate(found, point.errors[before:])
            seconds = time.perf_counter() - started
            at.measurements[name] = dataclasses.replace(found, matvecs=at.matvecs - spent, seconds=seconds)
            at.alone[name] = seconds + point.spared()
    return at.measurements
