"""The list of claims, and what a verdict is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..runs import Run

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
        run: name of the run, or of the runs.
    """

    claim: str
    decision: Decision
    reason: str
    statistic: float | None = None
    interval: tuple[float, float] | None = None
    threshold: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    run: str = ""


@dataclass(frozen=True)
class Claim:
    """A named rule: one run, or several runs, to a `Verdict`."""

    name: str
    function: Callable[..., Verdict]
    source: str
    sentence: str
    several: bool


CLAIMS: dict[str, Claim] = {}


def claim(*, source: str, sentence: str, several: bool = False) -> Callable[[Callable], Callable]:
    """Register a function ``Run -> Verdict`` (or ``Sequence[Run] -> Verdict`` if it takes `several`) under its name."""

    def register(function: Callable[..., Verdict]) -> Callable[..., Verdict]:
        CLAIMS[function.__name__] = Claim(function.__name__, function, source, sentence, several)
        return function

    return register


def check(runs: Run | Sequence[Run]) -> list[Verdict]:
    """All claims on a run, or on several: each claim about one run for every run, then those about several together.

    A claim reads logs and nothing else. Where a quantity that it needs was not measured it is not applicable, and the
    reason names the quantity.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    verdicts = [_judge(c, run, run.path.name) for c in CLAIMS.values() if not c.several for run in runs]
    if len(runs) > 1:
        together = ", ".join(run.path.name for run in runs)
        verdicts += [_judge(c, runs, together) for c in CLAIMS.values() if c.several]
    return verdicts


def _judge(claim: Claim, given: Any, name: str) -> Verdict:
    from dataclasses import replace

    try:
        verdict = claim.function(given)
    except KeyError as error:
        verdict = Verdict(claim.name, "not applicable", str(error.args[0]))
    return replace(verdict, run=name)
