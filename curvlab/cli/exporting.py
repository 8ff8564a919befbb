"""`curvlab export`: what runs measured, as CSV."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from ..files import printable
from .reading import expand


def export_command(arguments: list[str]) -> int:
    def options(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path | None = None, wide: bool = False
    ) -> tuple[tuple[Path, ...], Path | None, bool]:
        """What runs measured, as CSV: a row for each number, with its error and 95% interval.

        Args:
            runs: Run folders, or folders of runs.
            out: File to write; default standard output.
            wide: A row for each step instead, with columns such as sharpness and sharpness_error.
        """
        return runs, out, wide

    paths, out, wide = tyro.cli(options, args=arguments, prog="curvlab export")
    from .. import tables

    runs = expand(paths)
    if wide and (odd := tables.changing(runs)):
        print(
            f"curvlab: left out {', '.join(odd)}, whose coordinates change from step to step: export without --wide",
            file=sys.stderr,
        )
    tables.to_csv(runs, out or sys.stdout, wide=wide)
    if out:
        print(printable(str(out)))
    return 0
