"""`curvlab sweep`: rows, grids and seeds in one command."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..problems.presets import Experiment
from ..problems.rows import Statistic
from ..problems.studies import STUDIES, Scale, study
from .text import table, taken_scale

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
    sweep = parsed(*arguments)
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


def parsed(name: str, *arguments: str) -> Sweep:
    """The sweep that a command line asks for."""
    given = taken_scale(arguments)
    asked = study(name, given)

    @dataclasses.dataclass(frozen=True)
    class Options:
        experiment: Annotated[Experiment, tyro.conf.OmitArgPrefixes] = asked.base
        scale: Scale = given
        """paper: the paper's model, data, lengths and protocol, which need its data set and a GPU."""
        grid: tuple[str, ...] = ()
        """Axes to run over, setting=value,value: lr=0.1,0.2 batch_size=8,32 penalty.gradient_norm=0.01,0.1 method.sigma=0.1
        hidden=32,64+64."""
        seeds: str = ",".join(map(str, asked.seeds))
        """Seeds of the table: 0,1,2 or 0-6."""
        rows: tuple[str, ...] = ()
        """Some rows of a study; default all."""
        metric: str = asked.metric
        """What is tabled: any diagnostic of one number, validation_loss or validation_accuracy."""
        statistic: Statistic = asked.statistic
        """Where training ends; best of the log; or the median of the second half of the log."""
        keep: int = asked.keep
        """Count only so many seeds, the best ones (Smith: 5 of 7, with --statistic best); 0 for all."""
        tune: tuple[str, ...] = ()
        """Axes from which the settings of each row are chosen first, as in --grid; default those of the study."""
        tuning_seeds: str = ""
        """Seeds of the runs on which the choice is made; they must not be among --seeds."""
        select: str = asked.select
        """What the choice is made by."""
        workers: int = 0
        """Runs at a time, a process each; 0 for as many as there are cores, and for one on a GPU."""
        checkpoint_every: int = 200
        """Save the state of training every so many steps, from which an interrupted run continues."""
        out: Path = Path("runs") / (f"{name}-sweep" if given == "small" else f"{name}-{given}-sweep")
        """Folder of the sweep; the same command again continues there."""

    options = tyro.cli(Options, args=arguments, prog=f"curvlab sweep {name}", description=asked.about)
    from ..sweep import Sweep, parse_grid, parse_seeds

    return Sweep(
        asked,
        options.out,
        base=options.experiment,
        rows=options.rows,
        grid=parse_grid(options.grid),
        seeds=parse_seeds(options.seeds),
        tune=parse_grid(options.tune),
        tuning_seeds=parse_seeds(options.tuning_seeds),
        select=options.select,
        metric=options.metric,
        statistic=options.statistic,
        keep=options.keep,
        workers=options.workers or _cores(options.experiment),
        checkpoint_every=options.checkpoint_every,
    )


def _cores(experiment: Experiment) -> int:
    """How many runs fit on the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // experiment.threads) if experiment.device == "cpu" else 1


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
