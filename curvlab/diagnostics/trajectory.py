"""How far training is from another path: a gradient flow, another run, or its own start."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..measurement import Measurement, missing
from ..runs import Run
from ..snapshot import Snapshot
from .registry import diagnostic


@diagnostic(
    "‖w - w'‖",
    formula="distance to where another run, or a gradient flow, was at the same step; to the own start without one",
    kind="bound",
    cost="none",
)
def trajectory_distance(at: Snapshot, *, run: str | os.PathLike | None = None) -> Measurement:
    """Euclidean distance of w_t to the point w'_t of another trajectory at the same step.

    Estimator: `run` is the folder of a run that saved its trajectory, such as `gradient_flow(..., run=...)` with the
    learning rate of this run, which is then at step t where the flow is at time lr·t. Without `run` the other point is
    the first one of this run that was measured: the distance travelled.

    Error: that of the other point: the estimated error of integration for a flow, 0 for a run.

    Fails: no value at a step that the trajectory lacks. A flow with another learning rate is compared at another time,
    and nothing says so.

    Args:
        run: folder of the other run; default the own start.

    Raises:
        ValueError: the trajectory is of a model with another number of parameters.
        FileNotFoundError: there is no run, or it saved no trajectory.

    Source: Smith et al. 2021 (arXiv 2101.12176), sec. 2.2, for the flow of the modified loss.
    """
    carry: dict[Any, Any] = {} if at.carry is None else at.carry
    w = at.w.double().cpu()
    if run is None:
        other, error = carry.setdefault("trajectory_distance start", w), 0.0
    else:
        file = Path(run) / "trajectory.pt"
        saved = _load(os.path.abspath(run), file.stat().st_mtime_ns if file.exists() else 0)
        if saved["params"].shape[1] != len(w):
            raise ValueError(
                f"the trajectory in {run} has {saved['params'].shape[1]} parameters and this model {len(w)}; compare runs "
                "of the same model"
            )
        found = torch.nonzero(saved["steps"] == at.step)
        if not len(found):
            return missing(f"the trajectory has no step {at.step}; it has {_range(saved['steps'])}")
        other, error = saved["params"][found[0, 0]].double(), float(saved["errors"][found[0, 0]])
    floor = float(torch.finfo(at.w.dtype).eps * w.norm())
    return Measurement(float((w - other).norm()), error, "bound" if error else "exact", floor=floor)


@lru_cache(maxsize=2)
def _load(run: str, modified: int) -> dict[str, Any]:
    """Not kept with the run's own state, which is saved in its checkpoints."""
    return Run(run).load("trajectory")


def _range(steps: Tensor) -> str:
    listed = [str(step) for step in steps.tolist()]
    return ", ".join(listed if len(listed) <= 4 else [*listed[:2], "...", listed[-1]])
