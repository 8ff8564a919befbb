"""The list of methods: the optimizers that the papers define, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .base import Method

T = TypeVar("T", bound=type[Method])

METHODS: dict[str, type[Method]] = {}


def method(name: str, *, formula: str, source: str) -> Callable[[T], T]:
    """Register a `Method` under a name.

    Args:
        formula: one line of plain text.
        source: paper and equation.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: T) -> T:
        if name in METHODS:
            raise ValueError(f"method {name}: the name is taken by {METHODS[name].__name__}; choose another")
        cls.formula, cls.source = formula, source
        METHODS[name] = cls
        return cls

    return register
