"""Tables on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..files import printable

if TYPE_CHECKING:
    from ..claims import Verdict


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their longest cell, the head underlined."""
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def verdict_table(verdicts: Sequence[Verdict], *, every: bool = False) -> str:
    """What runs say about claims; those that do not apply are counted, or with `every` listed."""
    rows = []
    applicable = [v for v in verdicts if v.decision != "not applicable"]
    for v in verdicts if every else applicable:
        rows.append((v.claim, v.run, v.decision, v.number, v.reason))
    shown = table(("claim", "run", "verdict", "statistic, 95%", "why"), rows)
    others = 0 if every else len(verdicts) - len(applicable)
    return shown + f"\n\n{others} verdicts are not applicable; --all says why" * (others > 0)
