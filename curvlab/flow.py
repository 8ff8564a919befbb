"""Gradient flow of an objective, plain or with penalties, sampled where a training run has its steps."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from scipy.integrate import DOP853
from torch import Tensor

from .diagnostics import evaluate, parse, require
from .diagnostics.registry import Request, batch_sizes, described
from .hvp import Engine
from .objective import Objective
from .regularizers import registry as regularizers
from .runs import Run
from .sharded import require_gathered
from .snapshot import Snapshot


def gradient_flow(
    L: Objective,
    steps: int | Iterable[int],
    *,
    lr: float,
    w: Tensor | None = None,
    penalties: Iterable[tuple[float, regularizers.Request]] = (),
    micro_batch_size: int | None = None,
    partition: Tensor | None = None,
    diagnostics: Iterable[Request] = (),
    every: int = 1,
    run: str | os.PathLike | None = None,
    config: Mapping[str, Any] | None = None,
    test: Objective | None = None,
    batch_size: int | tuple[int, ...] | None = None,
    replacement: bool = False,
    tol: float = 1e-8,
    seed: int = 0,
    engine: Engine = "auto",
) -> Iterator[Snapshot]:
    """Follow dw/dt = -∇[L + Σ strength · penalty](w) and yield a `Snapshot` at the times t = lr·k, k in `steps`.

    The flow is what small steps tend to; a run with learning rate lr is at its step k where the flow is at t = lr·k, so both
    are compared step by step (`trajectory_distance`). Snapshots, diagnostics and logs are those of `train`. The model is not
    changed.

    Integrated by the Runge-Kutta method of order 8 of Dormand and Prince with adaptive steps (scipy's DOP853): 15 gradients
    for a step of length at most about 6/λ_max, the method's interval of stability. A second integration with a hundred times
    the tolerance runs along; their largest distance so far, logged as "error" with every record, estimates the error of the
    second, and so cautiously that of the flow. It is no proof: where both take their first steps too large, at `tol` above
    1e-6, it can be too small by a factor.

    Args:
        L: the objective; float64 for the default tolerance.
        steps: step numbers k in increasing order; a number stands for 0, 1, ..., `steps`, one more than training hands out.
        lr: time of one step; for n-step SGD the effective one.
        w: (P,) where to start; default the model's current parameters.
        penalties: (strength, regularizer) pairs, as for `train`, that draw nothing at random. Smith's modified loss (eq. 20)
            is ``[(lr, "implicit_regularizer")]`` with the batches of training as `partition`; for n-step SGD (eq. 39) the
            strength is the bare learning rate, while `lr` is the effective one.
        micro_batch_size: penalties are means over micro-batches of so many examples of all data in its order.
        partition: (m, b) indices of the micro-batches instead, such as `Batches.partition` of training.
        diagnostics, every: measured, logged and kept in the trajectory at the steps that `every` divides.
        run: a new folder for the log, `trajectory.pt` and `final.pt`, both saved whichever way the loop ends.
        config, test, batch_size, replacement, seed, engine: as for `train`.
        tol: error of one step, relative to each coordinate or to the root mean square of w(0), whichever is larger.

    Raises:
        ValueError: steps that are negative, not increasing or none; `lr` not positive; a tolerance below what the precision
            of the objective allows; a penalty that is unknown or random; unknown diagnostics.
        FloatingPointError: the integration cannot go on, because the flow runs away in finite time.
        FileExistsError: `run` already holds a run.

    Source: Smith et al. 2021 (arXiv 2101.12176), sec. 2; Hairer, Nørsett and Wanner, Solving Ordinary Differential
    Equations I, sec. II.5.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1).double()
        >>> L = Objective(model, "squared_error", (torch.eye(2).double(), torch.zeros(2, 1).double()))
        >>> [at.step for at in gradient_flow(L, 3, lr=0.1)]
        [0, 1, 2, 3]
    """
    require_gathered(L, "gradient flows")
    listed = list(range(steps + 1)) if isinstance(steps, int) else [int(step) for step in steps]
    if not listed or listed[0] < 0 or any(b <= a for a, b in itertools.pairwise(listed)):
        raise ValueError(f"steps are {steps!r}; expected a number from 0, or step numbers from 0 that increase")
    if not lr > 0:
        raise ValueError(f"lr is {lr}; expected a positive time per step")
    if every < 1:
        raise ValueError(f"every is {every}; expected a whole number of steps from 1")
    least = 1e3 * torch.finfo(L.dtype).eps
    if not tol >= least:
        raise ValueError(
            f"tol is {tol:g}, but the gradients are {L.dtype} and allow {least:.0e}; make the objective with "
            "dtype=torch.float64, or pass a larger tol"
        )
    plan, sizes = parse(diagnostics), batch_sizes(batch_size)
    require(L, plan, {"batch_size": sizes, "lr": lr, "test": test})
    field = _Field(L, penalties, micro_batch_size, partition)
    for _, entry, options in field.terms:
        plan.setdefault(entry.name, options)
    start = L.point(w)
    log = None
    if run is not None:
        settings = described(
            L, plan, every=every, batch_size=sizes, replacement=replacement, seed=seed, engine=engine
        ) | {
            "optimizer": {"name": "gradient_flow", "tol": tol},
            "lr": lr,
            "penalties": [(strength, entry.name, options) for strength, entry, options in field.terms],
            "trained_loss": "; ".join(f"{strength} {entry.name} is added" for strength, entry, _ in field.terms)
            or None,
            "micro_batch_size": field.micro_batch_size,
        }
        log = Run.create(run, {**(config or {}), "training": settings})
    points = _points(field, start, listed, lr, tol)
    common = {
        "seed": seed,
        "batch_size": sizes,
        "replacement": replacement,
        "lr": lr,
        "optimizer": {"name": "gradient_flow"},
        "batch": field.batch,
        "micro_batch_size": field.micro_batch_size,
        "test": test,
        "engine": engine,
    }
    return _snapshots(L, points, plan, every, log, common)


def _snapshots(
    L: Objective,
    points: Iterator[tuple[int, Tensor, dict[str, float]]],
    plan: dict[str, dict[str, Any]],
    every: int,
    log: Run | None,
    common: dict[str, Any],
) -> Iterator[Snapshot]:
    carry: dict[Hashable, Any] = {}
    kept: list[tuple[int, Tensor, float, float]] = []
    at = None
    try:
        for step, w, numbers in points:
            at = Snapshot(L, w, step, carry=carry, **common)
            if step % every == 0:
                started = time.perf_counter()
                evaluate(at, plan)
                if log is not None:
                    kept.append((step, w.cpu(), numbers["time"], numbers["error"]))
                    log.append(at.record(time.perf_counter() - started, **numbers))
            yield at
            at.release()
    finally:
        if log is not None:
            if kept:
                taken, params, times, errors = (list(column) for column in zip(*kept, strict=True))
                log.save_trajectory(taken, params, times=times, errors=errors)
            if at is not None:
                buffers = {name: b.detach().cpu() for name, b in L.model.named_buffers()}
                log.save("final", {"step": at.step, "params": at.w.cpu(), "buffers": buffers})
            log.close()


def _points(
    field: _Field, start: Tensor, steps: list[int], lr: float, tol: float
) -> Iterator[tuple[int, Tensor, dict[str, float]]]:
    """(k, w(lr k), numbers to log) for each step k."""
    y, end = start.double().cpu().numpy(), lr * steps[-1]
    best, control = (_Solution(field, y, end, tolerance) for tolerance in (tol, 100 * tol))
    error = 0.0
    for step in steps:
        with field.L.measuring():
            for t in best.advance(lr * step):  # also between the points asked for, where both may agree by chance
                error = max(error, float(np.linalg.norm(best(t) - control(t))))
            here = best(lr * step)
        numbers = {"time": lr * step, "error": error, "gradients": field.evaluations}
        yield step, torch.from_numpy(here.copy()).to(start.device, start.dtype), numbers


class _Field:
    """-∇[L + Σ strength · penalty] as a function of a numpy vector."""

    def __init__(
        self,
        L: Objective,
        penalties: Iterable[tuple[float, regularizers.Request]],
        micro_batch_size: int | None,
        partition: Tensor | None,
    ) -> None:
        self.L, self.terms, self.evaluations = L, regularizers.terms(penalties), 0
        self.batch = None if partition is None else partition.reshape(-1)
        self.micro_batch_size = regularizers.checked_size(micro_batch_size) if partition is None else partition.shape[1]
        for _, entry, _ in self.terms:
            regularizers.require(L, entry)
            if entry.draws:
                raise ValueError(
                    f"{entry.name} draws {entry.draws} at random, so it is no function of w that a flow could follow; "
                    "use a penalty that draws nothing, such as gradient_norm_penalty"
                )

    def __call__(self, t: float, y: np.ndarray) -> np.ndarray:
        self.evaluations += 1
        w = torch.from_numpy(y).to(self.L.device, self.L.dtype, copy=True)
        return -self.gradient(w).double().cpu().numpy()

    def gradient(self, w: Tensor) -> Tensor:
        total, leaf = self.L.gradient(w), w.detach().requires_grad_()
        for strength, entry, options in self.terms:
            with torch.enable_grad():
                value = entry.penalty(self.L, leaf, self.batch, micro_batch_size=self.micro_batch_size, **options)
                total = total + strength * torch.autograd.grad(value, leaf)[0]
        return total


class _Solution:
    """The solution of dy/dt = field(t, y) as a function of increasing times."""

    def __init__(self, field: _Field, y: np.ndarray, end: float, tol: float) -> None:
        scale = float(np.sqrt(np.mean(y**2))) or 1.0
        self.solver = DOP853(field, 0.0, y, end, rtol=tol, atol=tol * scale) if end else None
        self.start, self.dense = y, None  # type: np.ndarray, Any

    def __call__(self, t: float) -> np.ndarray:
        for _ in self.advance(t):
            pass
        return self.start if self.dense is None else self.dense(t)

    def advance(self, t: float) -> Iterator[float]:
        """Integrate up to `t`, or a little further, and yield times in the steps taken for it, at which to look."""
        while self.solver is not None and self.solver.t < t:
            with warnings.catch_warnings(), np.errstate(all="ignore"):  # a rejected step may overflow
                warnings.simplefilter("ignore", RuntimeWarning)
                message = self.solver.step()
            if self.solver.status == "failed":
                raise FloatingPointError(
                    f"the flow cannot be followed beyond t = {self.solver.t:.6g} of {t:.6g} ({message}): it runs away in "
                    "finite time, as for a loss without lower bound; ask for fewer steps"
                )
            self.dense = self.solver.dense_output()
            yield from np.linspace(self.solver.t_old, self.solver.t, 5)[1:]
