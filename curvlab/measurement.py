"""A measured number: its value, how wrong it may be, and what it cost."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["exact", "bound", "sem"]
Number = float | np.ndarray


@dataclass(frozen=True)
class Measurement:
    """A number that does not travel alone.

    Attributes:
        value: the number, or an array along `axis`; ``None`` where it does not exist (`note` says why).
        error: in the unit of `value`. Its meaning is `kind`:
            ``"exact"``: up to rounding, `error` is 0 and `floor` is the rounding;
            ``"bound"``: the distance to the truth (for a Ritz value: to *some* eigenvalue) is at most `error`;
            ``"sem"``: `error` is one standard error, with `df` degrees of freedom.
        df: degrees of freedom of the standard error.
        floor: an estimate of the rounding error, part of every interval.
        matvecs: products with the Hessian that this number caused; shared ones count for the first to ask.
        seconds: wall-clock time that this number caused.
        axis: name and coordinates of an array value, such as ``("batch_size", (8, 32))``.
        note: a remark, or why there is no value.
    """

    value: Number | None
    error: Number = 0.0
    kind: Kind = "exact"
    df: Number = math.inf
    floor: Number = 0.0
    matvecs: int = 0
    seconds: float = 0.0
    axis: tuple[str, tuple] | None = None
    note: str | None = None

    def interval(self, level: float = 0.95) -> tuple[Number, Number]:
        """Lower and upper end of an interval that contains the truth with probability `level`.

        A bound holds with certainty whatever the level. A standard error is widened by the quantile of Student's t
        with `df` degrees of freedom. The rounding floor is added to both.

        Raises:
            ValueError: if there is no value, or if `level` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; expected a probability between 0 and 1, such as 0.95")
        if self.value is None:
            raise ValueError(f"there is no value and so no interval: {self.note}")
        half = half_width(self.error, self.kind, self.df, self.floor, level)
        return self.value - half, self.value + half

    def select(self, **coordinate: Any) -> Measurement:
        """One entry of an array value, by its coordinate: ``m.select(batch_size=32)``.

        Raises:
            KeyError: if the axis has another name or lacks the coordinate.
        """
        index = axis_index(self.axis, coordinate)

        def pick(x: Any) -> Any:
            return float(x[index]) if isinstance(x, np.ndarray) else x

        return dataclasses.replace(
            self,
            value=pick(self.value),
            error=pick(self.error),
            df=pick(self.df),
            floor=pick(self.floor),
            axis=None,
        )

    def scaled(self, factor: float, *, plus: float = 0.0, floor: float = 0.0) -> Measurement:
        """``factor`` times this measurement `plus` an exact number, with `floor` added to the rounding.

        Raises:
            ValueError: there is no value.
        """
        if self.value is None:
            raise ValueError(f"there is no value to scale: {self.note}")
        size = abs(factor)
        return dataclasses.replace(
            self, value=factor * self.value + plus, error=size * self.error, floor=size * self.floor + floor
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values. A number that is not finite becomes null, with a note."""
        lost = self.value is not None and not np.all(np.isfinite(self.value))
        out: dict[str, Any] = {"value": _plain(self.value), "error": _plain(self.error), "kind": self.kind}
        if self.kind == "sem":
            out["df"] = _plain(self.df)
        if np.any(np.asarray(self.floor) > 0):
            out["floor"] = _plain(self.floor)
        if self.axis:
            out["axis"] = [self.axis[0], list(self.axis[1])]
        if self.note or lost:
            out["note"] = self.note or "not finite"
        return out | {"matvecs": self.matvecs, "seconds": round(self.seconds, 6)}

    def __str__(self) -> str:
        if self.value is None:
            return f"no value ({self.note})"
        if isinstance(self.value, np.ndarray):
            name, points = self.axis or ("index", tuple(range(len(self.value))))
            errors = np.broadcast_to(self.error, self.value.shape), np.broadcast_to(self.floor, self.value.shape)
            shown = [
                f"{p:.4g}: {v:.4g}" if isinstance(p, float) else f"{p}: {self._shown(v, e, f, bare=not e)}"
                for p, v, e, f in zip(points, self.value, *errors, strict=True)
            ]
            return f"{name} " + ", ".join(shown if len(shown) <= 12 else [*shown[:3], "...", *shown[-3:]])
        return self._shown(self.value, float(self.error), float(self.floor), bare=self.kind == "exact")

    def _shown(self, value: float, error: float, floor: float, *, bare: bool) -> str:
        """One number; where its bound or its rounding is larger than it is, what its magnitude is surely below."""
        if self.kind != "sem" and abs(value) < error + floor < math.inf:
            above = abs(value) + error + floor
            digit = 10.0 ** math.floor(math.log10(above))
            return f"<{math.ceil(above / digit) * digit:.1g}"
        return f"{value:.4g}" if bare else f"{value:.4g} ± {error:.1g}"


def half_width(error: Any, kind: Any, df: Any, floor: Any, level: float) -> Any:
    """Half the width of an interval at `level`: the error times its quantile, plus the rounding floor.

    Works on numbers and on arrays; `kind` may be an array of kinds.
    """
    from scipy.special import stdtrit  # 0.2 s that only intervals need

    factor = np.where(np.asarray(kind) == "sem", stdtrit(np.asarray(df, dtype=float), (1 + level) / 2), 1.0)
    half = np.asarray(error) * factor + np.asarray(floor)
    return half if half.ndim else float(half)


def axis_index(axis: tuple[str, tuple] | list | None, coordinate: dict[str, Any]) -> int:
    """Position of ``{name: value}`` on a named axis; a KeyError says what the axis has."""
    (name, wanted), *more = coordinate.items()
    if more or axis is None or axis[0] != name or wanted not in axis[1]:
        has = "the value is a single number" if axis is None else f"the axis is {axis[0]} = {list(axis[1])}"
        raise KeyError(f"{', '.join(f'{k}={v}' for k, v in coordinate.items())} is not there: {has}")
    return list(axis[1]).index(wanted)


def missing(reason: str) -> Measurement:
    """A measurement that does not exist, and why."""
    return Measurement(None, note=reason)


def _plain(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return [_plain(float(e)) for e in x]
    return None if x is None or not math.isfinite(x) else float(x)
