"""`curvlab report` and `curvlab compare`: runs as one file, and over each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tyro

from ..files import printable
from .reading import expand


def report_command(arguments: list[str]) -> int:
    def options(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path | None = None
    ) -> tuple[tuple[Path, ...], Path | None]:
        """Write configuration, figures, claims and costs of runs to one HTML file.

        Args:
            runs: Run folders, or folders of runs.
            out: The file; default report.html in the run's folder, or in that of several runs.
        """
        return runs, out

    paths, out = tyro.cli(options, args=arguments, prog="curvlab report")
    from ..report import report

    print(printable(str(report(expand(paths), out))))
    return 0


def compare_command(arguments: list[str]) -> int:
    def options(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
        quantities: tuple[str, ...] = (),
        out: Path | None = None,
    ) -> tuple[tuple[Path, ...], tuple[str, ...], Path | None]:
        """Draw the same quantities of several runs over each other; runs that differ only in seeds as a mean with its band.

        Args:
            runs: Run folders, or folders of runs.
            quantities: What to draw; default all that the runs have in common and that are one number a step.
            out: Folder of the figure; default the one that holds the runs.
        """
        return runs, quantities, out

    paths, quantities, out = tyro.cli(options, args=arguments, prog="curvlab compare")
    from .. import plots

    runs = expand(paths)
    if len(runs) < 2:
        raise ValueError(f"{paths[0]} is one run; name at least two to compare, or draw it with curvlab plot")
    place = out or Path(os.path.commonpath([run.path.parent for run in runs]))
    for path in plots.save({place / "compare": plots.bands(runs, quantities or plots.common(runs))}):
        print(printable(str(path)))
    return 0
