"""The list of claims, and what a verdict is."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..runs import Run

NAMED = 6  # runs that are judged together and named one by one
Decision = Literal["holds", "does not hold", "undecided", "not applicable"]


@dataclass(frozen=True)
class Verdict:
    """What a run, or several, say about a claim.

    Attributes:
        claim: name of the claim.
        decision: "holds", "does not hold", "undecided" or "not applicable".
        statistic: the number that decides, `interval` at 95%, and the `threshold` it is compared with, in words.
        reason: why, and what would make it decidable.
        details: everything else that the rule looked at.
        run: name of the run, or of the runs; of more than a few, their number.
    """

    claim: str
    decision: Decision
    reason: str
    statistic: float | None = None
    interval: tuple[float, float] | None = None
    threshold: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    run: str = ""

    @property
    def number(self) -> str:
        """The statistic with its interval, as tables show it."""
        if self.statistic is None or self.interval is None:
            return ""
        return f"{self.statistic:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


class Verdicts(list[Verdict]):
    """A list that shows what applies to the runs, in a notebook as a table: claim, run, decision, statistic, reason."""

    def __repr__(self) -> str:
        lines = ("  ".join(part for part in row if part) for row in self._rows())
        return "\n".join([*lines, *self._others()])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("claim", "run", "verdict", "statistic, 95%", "why"))
        cells = ("".join(f'<td style="text-align: left">{html.escape(x)}</td>' for x in row) for row in self._rows())
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<table><tr>{head}</tr>{body}</table>" + "".join(f"<p>{line}</p>" for line in self._others())

    def _rows(self) -> list[tuple[str, ...]]:
        shown = (v for v in self if v.decision != "not applicable")
        return [(v.claim, _shortened(v.run), v.decision, v.number, v.reason) for v in shown]

    def _others(self) -> list[str]:
        count = len(self) - len(self._rows())
        return [f"not applicable: {count} of {len(self)}"] * bool(count)


@dataclass(frozen=True)
class Claim:
    """A named rule: one run, or several runs, to a `Verdict`."""

    name: str
    function: Callable[..., Verdict]
    source: str
    sentence: str
    several: bool


def _shortened(runs: str) -> str:
    names = runs.split(", ")
    return runs if len(names) <= 5 else f"{len(names)} runs"


CLAIMS: dict[str, Claim] = {}


def claim(*, source: str, sentence: str, several: bool = False) -> Callable[[Callable], Callable]:
    """Register a function ``Run -> Verdict`` (or ``Sequence[Run] -> Verdict`` if it takes `several`) under its name."""

    def register(function: Callable[..., Verdict]) -> Callable[..., Verdict]:
        CLAIMS[function.__name__] = Claim(function.__name__, function, source, sentence, several)
        return function

    return register


def check(runs: Run | Sequence[Run], names: Iterable[str] | None = None) -> Verdicts:
    """Claims on a run, or on several: each claim about one run for every run, then those about several together.

    A claim reads logs and nothing else. Where a quantity that it needs was not measured it is not applicable, and the
    reason names the quantity.

    Args:
        names: of the claims to judge; default all.

    Raises:
        ValueError: an unknown name.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    names = list(CLAIMS if names is None else names)
    if unknown := [name for name in names if name not in CLAIMS]:
        raise ValueError(f"there are no claims {unknown}; there are {', '.join(CLAIMS)}")
    chosen = [CLAIMS[name] for name in names]
    verdicts = Verdicts(_judge(c, run, run.path.name) for c in chosen if not c.several for run in runs)
    if len(runs) > 1:
        together = ", ".join(run.path.name for run in runs) if len(runs) <= NAMED else f"{len(runs)} runs"
        verdicts += [_judge(c, runs, together) for c in chosen if c.several]
    return verdicts


def _judge(claim: Claim, given: Any, name: str) -> Verdict:
    from dataclasses import replace

    try:
        verdict = claim.function(given)
    except KeyError as error:
        verdict = Verdict(claim.name, "not applicable", str(error.args[0]))
    return replace(verdict, run=name)
