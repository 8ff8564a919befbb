"""Weights & Biases: an adapter that neither loses the monitor's numbers nor makes it drop the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def tracker(run: Any) -> Callable[..., None]:
    """The numbers in the history of a wandb run, against an axis of their own; for ``Monitor(..., log=tracker(run))``.

    A row of wandb's history that is older than its newest is dropped, and every `run.log` without a step begins a new row.
    So the monitor's numbers go to row t, or to the newest one if the run's own logging is ahead, with t in "curvlab/step",
    the axis that they are drawn against. (Rows numbered by something slower than steps, such as `run.log(..., step=epoch)`,
    would be overtaken: log those without a step.)

    Example:
        >>> import tempfile, wandb
        >>> quiet = wandb.Settings(silent=True)
        >>> run = wandb.init(mode="offline", dir=tempfile.mkdtemp(), settings=quiet)
        >>> log = tracker(run)
        >>> log({"curvlab/sharpness": 2.5}, step=0)
        >>> run.finish()
    """
    run.define_metric("curvlab/step")
    run.define_metric("curvlab/*", step_metric="curvlab/step")
    row = -1

    def log(numbers: Mapping[str, float], step: int) -> None:
        nonlocal row
        row = max(step, run.step, row + 1)
        run.log({**numbers, "curvlab/step": step}, step=row)

    return log
