"""The command line: run a preset, sweep, measure a run or a model of one's own, follow, judge, draw and export runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

USAGE = """usage: curvlab COMMAND ...

  run [PRESET] [options]    train, measure every step, judge and draw; default preset: edge-of-stability
  sweep PRESET [options]    run a preset or a study over grids and seeds; one table and one figure
  measure RUN [options]     measure the final point of a run
  measure --model package.module:make_model --data package.module:make_data [--checkpoint FILE] [options]
                            measure a model of one's own
  plan RUN|--model ...|--params 7e9 --tokens 2048 [--ranks 64] [options]
                            products, memory, messages and time of a measurement, before it is paid for
  verify RUN|--model ...    every quantity on a small copy against dense references
  bench hvp RUN|--model ...|--problem NAME
                            how fast Hessian-vector products are by every engine, and which one to take
  watch RUN [options]       follow a run while it trains
  landscape RUN [options]   draw the loss around the final point of a run
  claims RUN ... [--json]   what runs say about the papers' claims
  plot RUN ... [--bands]    draw the figures of runs, or what runs of several seeds have in common
  compare RUN RUN ...       draw the same quantities of several runs over each other
  report RUN ...            configuration, figures, claims and costs as one HTML file
  export RUN ... [options]  what was measured as CSV
  explain [NAME]            what a quantity or an error means, and how it is estimated
  list                      presets, studies, diagnostics, regularizers, methods, models, data sets and claims

`curvlab COMMAND --help` lists the options of a command. Exit status: 0 where all went well, 1 where a run diverged
(`run`) or failed (`sweep`) or a measurement would not fit (`plan`), 2 for a mistake or a file that cannot be read, 130 after
Ctrl-C.
"""

COMMANDS = {
    "run": "running",
    "sweep": "sweeping",
    "measure": "points",
    "plan": "planning",
    "landscape": "points",
    "bench": "benching",
    "verify": "verifying",
    "watch": "watching",
    "export": "exporting",
    "report": "reporting",
    "compare": "reporting",
    "explain": "explaining",
    "claims": "reading",
    "plot": "reading",
    "list": "reading",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return 141  # as the shell has it for the signal


def _run(arguments: list[str]) -> int:
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
    except BrokenPipeError:
        raise
    except (ValueError, OSError, KeyError) as error:
        from ..files import printable

        print(printable(f"curvlab: {error.args[0] if len(error.args) == 1 else error}"), file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "RanksLost":  # known by its name, so that help needs no torch
            raise
        print(f"curvlab: {error}", file=sys.stderr)
        return 1
