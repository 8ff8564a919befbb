"""`curvlab run`: train, measure every step, judge and draw."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command_line import run_options
from ..problems.presets import Experiment
from ..runs import Run
from .text import verdict_table

if TYPE_CHECKING:
    from ..ranks import Ranks


def run_command(arguments: list[str]) -> int:
    name = "edge-of-stability"
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    options = run_options(name, *arguments)
    if options.resume and options.out is None:
        raise ValueError("--resume goes on with a run: give its folder by --out")
    from ..ranks import started  # not before help was asked for: it loads torch

    folder = options.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    keep = {"checkpoint_every": options.checkpoint_every or None, "resume": options.resume}
    with started(options.timeout) as ranks:  # of several that torchrun starts, the first one writes and tells
        runs, interrupted = _train_all(options.experiment, folder, keep, ranks)
    if ranks.rank:
        return 130 if interrupted else 0
    diverged = [(run.path, reason) for run in runs if (reason := run.records[-1].get("ended"))]
    for path, reason in diverged:
        kept = f"; the state before is in {path / 'checkpoint.pt'}" if (path / "checkpoint.pt").exists() else ""
        print(f"curvlab: {path}: {reason}{kept}", file=sys.stderr)
    if runs:
        from ..claims import check
        from ..plots import plot

        print(verdict_table(check(runs)))
        for path in plot(runs, folder):
            print(f"figure: {path}")
    print(f"run:    {folder}")
    return 130 if interrupted else int(bool(diverged))


def _train_all(experiment: Experiment, folder: Path, keep: dict[str, Any], ranks: Ranks) -> tuple[list[Run], bool]:
    """The runs that have records, and whether they were interrupted."""
    from ..problems.experiments import start

    runs: list[Run] = []
    several = len(experiment.batch_size) > 1
    for b in experiment.batch_size:
        place = folder / f"b{b or experiment.n or 'full'}" if several else folder
        training = start(experiment, b, run=place, group="world" if ranks.count > 1 else None, **keep)
        if not ranks.rank:
            runs.append(Run(place))
        label = f"b={training.batches.batch_size}" if several else ""
        if _follow(training.snapshots, training.batches.steps, experiment.lr, label, shown=not ranks.rank):
            print(f"interrupted; what was measured is in {place}", file=sys.stderr)
            return [run for run in runs if run.records], True
    return [run for run in runs if run.records], False


def _follow(snapshots: Any, steps: int, lr: float, label: str, *, shown: bool) -> bool:
    """Train with a progress bar that shows the live numbers; True if it was interrupted."""
    from tqdm import tqdm

    numbers = {"loss": "loss", "sharpness": "‖H‖", "interaction_sharpness": "‖H‖_S", "test_accuracy": "acc"}
    bar = tqdm(total=steps, desc=label or "training", unit="step", mininterval=0.2, disable=not shown)
    bar.set_postfix({"2/lr": f"{2 / lr:.4g}"})
    try:
        for at in snapshots:
            bar.update(at.step + 1 - bar.n)
            live = {s: str(at.measurements[n]).split(" ")[0] for n, s in numbers.items() if n in at.measurements}
            if live:
                bar.set_postfix({"2/lr": f"{2 / lr:.4g}", **live}, refresh=False)
        return False
    except KeyboardInterrupt:
        return True
    finally:
        snapshots.close()  # saves the parameters and closes the log
        bar.close()
