"""What the words of `curvlab run` and `curvlab sweep` ask for; hides which option settles the defaults of the others."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .problems.presets import Experiment
from .problems.rows import Statistic
from .problems.studies import Scale, preset, study

if TYPE_CHECKING:
    from .sweep import Sweep


def run_options(name: str, *arguments: str) -> Any:
    """The options of a command line: `experiment`, `out`, `checkpoint_every`, `resume`, `timeout`."""
    given = _scale(arguments)
    base = preset(name, given)

    @dataclasses.dataclass(frozen=True)
    class Options:
        experiment: Annotated[Experiment, tyro.conf.OmitArgPrefixes] = base
        scale: Scale = given
        """paper: the paper's model, data and lengths, which need its data set and a GPU."""
        out: Path | None = None
        """Folder of the run; default runs/PRESET-TIME."""
        checkpoint_every: int = 0
        """Save the state of training every so many steps, so that a killed run can go on; 0 for never."""
        resume: bool = False
        """Go on with the run in --out where its last checkpoint is."""
        timeout: float = 600.0
        """Of several ranks that torchrun starts: seconds after which one that does not answer counts as lost."""

    return tyro.cli(Options, args=arguments, prog=f"curvlab run {name}", description=study(name, given).about)


def sweep_asked(name: str, *arguments: str) -> Sweep:
    """The sweep that a command line asks for."""
    given = _scale(arguments)
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
    from .sweep import Sweep, parse_grid, parse_seeds

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


def _scale(arguments: Sequence[str]) -> Scale:
    """What --scale says, which settles the defaults of all other options; they parse it again and refuse nonsense."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return "paper" if ("--scale", "paper") in pairwise(words) else "small"
