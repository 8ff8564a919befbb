"""The command line: run a preset, sweep, measure a saved run, judge it, draw it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

USAGE = """usage: curvlab COMMAND ...

  run [PRESET] [options]    train, measure every step, judge and draw; default preset: edge-of-stability
  sweep PRESET [options]    run a preset or a study over grids and seeds; one table and one figure
  measure RUN [options]     measure the final point of a run
  landscape RUN [options]   draw the loss around the final point of a run
  claims RUN ... [--json]   what runs say about the papers' claims
  plot RUN ...              draw the figures of runs
  list                      presets, studies, diagnostics, regularizers, methods, models, data sets and claims

`curvlab COMMAND --help` lists the options of a command.
"""

COMMANDS = {
    "run": "running",
    "sweep": "sweeping",
    "measure": "points",
    "landscape": "points",
    "claims": "reading",
    "plot": "reading",
    "list": "reading",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"curvlab: there is no command {name!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    command = getattr(importlib.import_module(f"curvlab.cli.{COMMANDS[name]}"), f"{name}_command")
    try:
        return command(arguments[1:])
    except (ValueError, FileNotFoundError, FileExistsError, KeyError) as error:
        print(f"curvlab: {error.args[0] if len(error.args) == 1 else error}", file=sys.stderr)
        return 2
