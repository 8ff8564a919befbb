"""`curvlab sweep`: rows, grids and seeds in one command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..command_line import sweep_asked
from ..problems.studies import STUDIES
from .text import table

if TYPE_CHECKING:
    from ..sweep import Outcome, Result, Sweep


def sweep_command(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        names = ", ".join(STUDIES)
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"usage: curvlab sweep PRESET [options]\n\nPRESET is a preset or a study ({names}); its options:\n")
            arguments = ["edge-of-stability", *arguments]
        else:
            raise ValueError(f"name what to sweep: a preset, or one of the studies {names}")
    sweep = sweep_asked(*arguments)
    from ..sweep import conduct

    progress = _Progress(sweep)
    try:
        outcome = conduct(sweep, progress)
    except KeyboardInterrupt:
        progress.close()
        print(f"interrupted; the same command continues in {sweep.folder}", file=sys.stderr)
        return 130
    finally:
        progress.close()
    _print(sweep, outcome)
    return 1 if any(r.status == "failed" for r in [*outcome.results, *outcome.tuning]) else 0


class _Progress:
    """A bar that counts runs, and a line for each that went wrong."""

    def __init__(self, sweep: Sweep) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=sweep.size, unit="run", mininterval=0.2)

    def __call__(self, result: Result) -> None:
        self.bar.update()
        self.bar.set_postfix_str(result.job.folder.name)
        if result.status in ("failed", "diverged"):
            self.bar.write(f"{result.job.folder}: {result.status}  {result.reason}", file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def _print(sweep: Sweep, outcome: Outcome) -> None:
    from ..sweep.table import lines, sentence_line

    metric = sweep.metric or sweep.study.metric
    chosen = {label: " ".join(f"{k}={v}" for k, v in point.items()) for label, point in outcome.chosen.items()}
    head, *rows = lines(sweep.study, outcome.summaries, metric, chosen)
    print(table(head, rows))
    if outcome.judged:
        print("\nhere (95% intervals of paired differences):")
        for judged in outcome.judged:
            print(sentence_line(judged, sweep.study))
    for note in outcome.notes:
        print(f"note: {note}")
    for path in outcome.files:
        print(f"{'figure' if path.suffix == '.png' else 'table'}: {path}")
