"""At which steps something is measured: every so many, ever more rarely, or as a function says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

Schedule = int | Literal["log"] | Callable[[int], bool]
Every = Schedule | Mapping[str, Schedule]
T = TypeVar("T")


def due(schedule: Schedule, step: int) -> bool:
    """Whether a step is one of the schedule's: k means 0, k, 2k, ...; "log" about ten in each decade, and 0.

    Example:
        >>> [step for step in range(30) if due("log", step)]
        [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25]
    """
    if callable(schedule):
        return bool(schedule(step))
    if schedule == "log":
        near = round(10 * math.log10(step)) if step else 0
        return step == 0 or step in {round(10 ** (k / 10)) for k in (near - 1, near, near + 1)}
    return step % schedule == 0


def of(every: Every, name: str) -> Schedule:
    """The schedule of one name; without one of its own, every step."""
    return every.get(name, 1) if isinstance(every, Mapping) else every


def select(plan: Mapping[str, T], every: Every, step: int) -> dict[str, T]:
    """The part of a plan that is due at a step."""
    return {name: options for name, options in plan.items() if due(of(every, name), step)}


def checked(every: Every, names: Mapping[str, Any]) -> Every:
    """The same schedules, if they can be used for these names.

    Raises:
        ValueError: no whole number of steps from 1, no "log", no function; or a name that is not measured.
    """
    listed = every.items() if isinstance(every, Mapping) else [("every", every)]
    for name, schedule in listed:
        if isinstance(every, Mapping) and name not in names:
            raise ValueError(f"every has {name!r}, which is not measured; there are {', '.join(names) or 'none'}")
        valid = callable(schedule) or schedule == "log" or (isinstance(schedule, int) and schedule >= 1)
        if not valid or isinstance(schedule, bool):
            raise ValueError(
                f"{name} is {schedule!r}; expected a whole number of steps from 1, 'log', or a function step -> bool"
            )
    return every


def described(every: Every) -> Any:
    """What a run's configuration says of it: functions by their names."""
    if isinstance(every, Mapping):
        return {name: described(schedule) for name, schedule in every.items()}
    return getattr(every, "__qualname__", type(every).__name__) if callable(every) else every
