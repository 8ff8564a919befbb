"""Sweeps: rows of experiments over grids and seeds, in parallel, resumable, with a table, a figure and verdicts.

>>> from curvlab.sweep import Sweep, conduct
>>> from curvlab.problems.studies import study
>>> sweep = Sweep(study("control"), "runs/control", grid={"lr": ("0.05", "0.1"), "batch_size": ("4",)}, seeds=(0, 1))
>>> len(sweep.jobs())
4
"""

from .conduct import Outcome, conduct
from .options import Sweep
from .plan import Job, parse_grid, parse_seeds
from .table import Judged, Summary, difference, estimate, judge, summarize
from .work import Result, Wanted, run

__all__ = [
    "Job",
    "Judged",
    "Outcome",
    "Result",
    "Summary",
    "Sweep",
    "Wanted",
    "conduct",
    "difference",
    "estimate",
    "judge",
    "parse_grid",
    "parse_seeds",
    "run",
    "summarize",
]
