"""The same measurements from a training loop that someone already has: called once per step, it changes nothing there."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import schedule
from .batches import tree_map
from .budget import Budget
from .cost import rehearse
from .diagnostics import evaluate, parse, require
from .diagnostics.registry import Request, batch_sizes, described
from .diagnostics.tracking import UPDATED
from .hvp import Engine
from .measurement import Measurement
from .memory import require as require_memory
from .objective import Objective
from .optimizers import flat_gradient, learning_rate, preconditioner, settings, stability_threshold
from .runs import Run
from .sharded import version
from .snapshot import Snapshot
from .unwrap import unwrap_optimizer

Tracker = Any  # has .log(dict, step=...), or is a function of (dict, step)
UPDATE = " update"  # of an eigenpair, by the Rayleigh quotient of the vectors that were found last
UPDATE_NOTE = "Rayleigh quotient of the vectors that were found last"


def say(text: str) -> None:
    """Tell the user something that is no result."""
    print(f"curvlab: {text}", file=sys.stderr, flush=True)


class Monitor:
    """Diagnostics of a training loop that is not curvlab's, measured when they are due, logged, and returned.

    Call it once per step, anywhere between two optimizer steps; between the backward pass and the step it also sees the
    gradient about to be used. It measures the objective at the model's current parameters, on its own fixed data, and
    leaves parameters, buffers, gradients, random states and flags as they are. On steps without a measurement it does
    nothing.

    In a process group (DistributedDataParallel) rank 0 measures and writes; on other ranks a call returns {}. With
    ``Objective(..., group="world")``, which a model sharded by FSDP2 needs, all ranks call it and measure together.

    Args:
        L: the objective: the model that is trained, its loss, and a fixed set of data. Or the model itself, with `loss` and
            `data` as `Objective` takes them.
        diagnostics: names or (name, options), see `curvlab list`.
        every: the schedule: k for steps 0, k, 2k, ... (an odd k is wise: dynamics at the edge of stability have period 2),
            ``"log"`` for about ten in each decade, or a function step -> bool; or a mapping from names to such schedules, in
            which names that it lacks are measured every step.
        run: a new folder for the log.
        optimizer: whose learning rate, momentum, betas and weight decay are read at every measurement, for thresholds and
            for what depends on a step. Frameworks' wrappers are looked through.
        batch_size, replacement: b of S_b and its sampling; a sequence gives curves over b; a `DataLoader` stands for its
            batch size times the number of ranks.
        lr: the learning rate, where there is no torch optimizer to read it from.
        budget: the share of the training time that measuring may take, such as 0.1. What is due is then spaced by its
            measured cost, in powers of three; between two searches for eigenvalues their Rayleigh quotients are followed, at
            one product for each, and the notes of these measurements say so.
        log: where else the numbers go: anything with ``.log(dict, step=...)``, a function of (dict, step), or several.
        test: held-out data.
        config: what else to store in the run's configuration.
        seed: of the probes.
        engine: of Hessian-vector products.
        resume: go on with the run in the folder `run`; `load_state_dict` then says from which step.
        announce: called with lines such as what the first measurement will cost; None for silence. Default: standard error.

    Attributes:
        run: the log, a `Run`; None without a folder.
        costs: what the first measurement was expected to cost, by name, and in all under "".

    Raises:
        ValueError: unknown diagnostics, or some that need what is not given; before anything is computed.
        FileExistsError: `run` already holds a run.

    Example:
        >>> import torch, curvlab as cl
        >>> model, x, y = torch.nn.Linear(2, 1), torch.eye(2), torch.zeros(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = Monitor(model, ["sharpness"], loss="squared_error", data=(x, y), optimizer=sgd, announce=None)
        >>> for step in range(3):
        ...     (0.5 * (model(x) - y).square().sum(1).mean()).backward()
        ...     found = monitor(step)
        ...     sgd.step()
        ...     sgd.zero_grad()
        >>> float(found["sharpness"].value) < monitor.threshold
        True
    """

    def __init__(
        self,
        L: Objective | nn.Module,
        diagnostics: Iterable[Request],
        *,
        loss: Any = None,
        data: Any = None,
        every: schedule.Every = 1,
        run: str | os.PathLike | None = None,
        optimizer: Any = None,
        batch_size: int | Sequence[int] | DataLoader | None = None,
        replacement: bool = False,
        lr: float | None = None,
        budget: float | None = None,
        log: Tracker | Iterable[Tracker] = (),
        test: Objective | None = None,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        engine: Engine = "auto",
        resume: bool = False,
        announce: Callable[[str], None] | None = say,
    ) -> None:
        if isinstance(L, nn.Module):
            if loss is None or data is None:
                raise ValueError(
                    "a model needs its loss and data: Monitor(model, [...], loss='cross_entropy', data=(x, y))"
                )
            L = Objective(L, loss, data)
        self.L, self.test, self.seed, self.engine = L, test, seed, engine
        self.plan = parse(diagnostics)
        self.every = schedule.checked(every, self.plan)
        self.optimizer = None if optimizer is None else unwrap_optimizer(optimizer)
        self.given_lr = lr
        self.batch_size, self.replacement = _batch_size(batch_size), replacement
        self.budget = None if budget is None else Budget(budget)
        if budget is not None:  # seconds differ from rank to rank, and what is due may not
            L.ranks.require_one("measurements within a budget of time")
        first = _rank() == 0
        self.trackers: list[Any] = (list(log) if isinstance(log, list | tuple) else [log]) if first else []
        self.announce = announce if announce and first else (lambda text: None)
        require(L, self.plan, {
            "batch_size": self.batch_size, "lr": self.lr, "test": test, "batch_gradient": self.optimizer,
        })  # fmt: skip
        self.costs: dict[str, Any] = {}
        self.carry: dict[Hashable, Any] = {}
        self._counts: dict[str, int] = {}
        self._last: int | None = None
        self._left = time.perf_counter()
        self._warned: set[str] = set()
        self._announced = self._logged = 0
        self._used: tuple[Tensor, int] | None = None
        self._probe = min(L.variables(), key=lambda p: p.numel())
        self._hook = None
        if self.optimizer is not None:
            self._hook = self.optimizer.register_step_post_hook(self._stepped)
        self.run: Run | None = None
        if run is not None and first:
            settled = {**(config or {}), "training": self.describe()}
            self.run = Run.resume(run, settled) if resume else Run.create(run, settled)

    def __call__(self, step: int | None = None, *, batch: Any = None, **numbers: Any) -> dict[str, Measurement]:
        """Measure and log what is due at a step; a second call at the same step does nothing.

        A call that raises, or is interrupted, has never been: monitor and log are as before it, so that the same call again
        measures what it would have measured.

        Args:
            step: t, increasing; default one more than the last.
            batch: what the training step is about to use, for penalties' diagnostics: indices, or a batch of data.
            numbers: further numbers for the record and the trackers, such as ``batch_loss=loss``.

        Returns:
            Measurements by name, {} where nothing was due.

        Raises:
            ValueError: a step before the last one.
        """
        was = {"last": self._last, "counts": dict(self._counts)}
        step = self._step(step)
        if step is None or (_rank() != 0 and self.L.ranks.count == 1):
            return {}  # one process measures, unless the objective is shared by several
        plan, updates = self._due(step)
        if not plan and not updates:
            return {}
        before = self.state_dict() | was
        try:
            return self._measured(step, plan, updates, batch, numbers)
        except BaseException:
            self.load_state_dict(before)
            raise

    def _measured(
        self, step: int, plan: dict[str, Any], updates: dict[str, Any], batch: Any, numbers: Mapping[str, Any]
    ) -> dict[str, Measurement]:
        """Measure in full what is planned, update the rest, write it down and pay for it."""
        called = time.perf_counter()
        at = self._snapshot(step, batch)
        self._foretell(at, {name: options for name, options in plan.items() if self._counts[name] == 1})
        started = time.perf_counter()
        evaluate(at, plan)
        if updates:
            evaluate(dataclasses.replace(at, search=False), updates)
        for name in updates:
            at.measurements[name] = _updated(at.measurements[name])
        at.release()
        seconds = time.perf_counter() - started
        further = {name: _number(x) for name, x in numbers.items()}
        self._write(at, at.record(seconds, threshold=self.threshold, **further), further)
        self._account(at, updates, time.perf_counter() - called)
        return at.measurements

    @property
    def lr(self) -> float | None:
        """The learning rate now: the optimizer's, if all its groups have the same."""
        return self.given_lr if self.optimizer is None else learning_rate(self.optimizer)

    @property
    def threshold(self) -> float | None:
        """The sharpness (of an adaptive optimizer: the preconditioned one) above which the optimizer is unstable now.

        None where it is not known (see `curvlab.optimizers.stability_threshold`).
        """
        lr = self.lr
        return stability_threshold(self._settings(), lr) if lr else None

    def describe(self) -> dict[str, Any]:
        """What the run's configuration says."""
        return described(
            self.L, self.plan, every=self.every, batch_size=self.batch_size, replacement=self.replacement,
            seed=self.seed, engine=self.engine,
        ) | {
            "optimizer": self._settings(),
            "lr": self.lr,
            "budget": self.budget and self.budget.share,
            "trained_loss": self.L.live_difference(),
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What later measurements depend on, as tensors and plain values: to be saved with the training's own checkpoint."""
        return {
            "last": self._last,
            "log_size": self.run.size if self.run else self._logged,
            "carry": _containers(self.carry),
            "counts": dict(self._counts),
            "budget": self.budget and dataclasses.asdict(self.budget),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what the run's log has beyond it is forgotten."""
        self._last = state["last"]
        self.carry, self._counts = _containers(state["carry"]), dict(state["counts"])
        if self.budget and state["budget"]:
            self.budget = Budget(**state["budget"])
        if self.run:
            self.run.truncate(state["log_size"])
        self._left = time.perf_counter()

    def close(self) -> None:
        """Close the log and let go of the optimizer; what was logged stays."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.run is not None:
            self._keep(self.run, lambda run: run.save("final", {"step": self._last, "complete": True}))
            self._logged = self.run.size
            self.run.close()
            self.run = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- when ---------------------------------------------------------------------------------------------------------

    def _step(self, step: int | None) -> int | None:
        """The step of a call; None if it was seen before."""
        last = self._last
        if step is None:
            step = 0 if last is None else last + 1
        if last is not None and step < last:
            raise ValueError(
                f"step is {step} after step {last}; expected increasing steps. To go on from a checkpoint of the training, "
                "save monitor.state_dict() in it and load it with monitor.load_state_dict()"
            )
        if step == last:
            return None
        if self.budget:
            self.budget.train(time.perf_counter() - self._left, step - last if last is not None else 1)
            self._left = time.perf_counter()
        self._last = step
        return step

    def _due(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is to be measured in full, and what only to be updated."""
        plan = schedule.select(self.plan, self.every, step)
        for name in plan:
            self._counts[name] = self._counts.get(name, 0) + 1
        if self.budget is None:
            return plan, {}
        on = {name: self.budget.on(name, self._counts[name] - 1) for name in plan}
        updates = {
            name: options for name, options in plan.items()
            if not on[name] and name in self._updatable and self.budget.on(name + UPDATE, self._counts[name] - 1)
        }  # fmt: skip
        return {name: options for name, options in plan.items() if on[name]}, updates

    @property
    def _updatable(self) -> list[str]:
        return [] if self.L.population_size else [name for name in self.plan if name in UPDATED]

    def _foretell(self, at: Snapshot, plan: Mapping[str, Mapping[str, Any]]) -> None:
        """Say what is about to be measured for the first time will cost."""
        if not plan or self.L.ranks.count > 1:
            return
        try:
            found = rehearse(at, plan)
        except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:  # the measurement itself will say it
            self.announce(f"step {at.step}: measuring {', '.join(plan)}; the cost is not known ({error})")
            return
        total = found[""]
        each = "; ".join(f"{name} {cost.products} products" for name, cost in found.items() if name and cost.products)
        self.announce(
            f"step {at.step}: measuring {', '.join(plan)}: {total}{' (' if each else ''}{each}{')' if each else ''}"
        )
        self.costs |= found
        fix = "pass memory= to Objective, a smaller chunk_size, k, or block of the parameters (parameters=)"
        require_memory(total.bytes, self.L.device, f"measuring {', '.join(plan)}", fix)

    def _account(self, at: Snapshot, updates: Mapping[str, Any], seconds: float) -> None:
        """Pay for what was measured, and space what is to come."""
        if self.budget is None:
            return
        step, known = at.step, self.budget.seconds
        self.budget.pay({name + UPDATE * (name in updates): cost for name, cost in at.alone.items()}, seconds)
        spacing = {name: (step + 1) / count for name, count in self._counts.items()}
        for name in self._updatable:
            if name in at.measurements and name not in updates and name + UPDATE not in known:
                # a guess until one is measured: a product or two and the gradient, which costs as much
                known[name + UPDATE] = known[name] * min(1.0, 3 / max(1, at.measurements[name].matvecs))
            spacing[name + UPDATE] = spacing.get(name, 1.0)
        before = dict(self.budget.levels)
        self.budget.plan(spacing, [name + UPDATE for name in self._updatable])
        if self.budget.levels != before and self._counts and step >= self._announced:
            self._announced = 2 * step + 1  # spacings settle: they are told ever more rarely
            self.announce(f"step {step}: {self._spacing(spacing)}")
        self._left = time.perf_counter()

    def _spacing(self, spacing: Mapping[str, float]) -> str:
        assert self.budget is not None
        parts = []
        for name, level in self.budget.levels.items():
            if not name.endswith(UPDATE):
                steps = round(spacing[name] * 3**level)
                text = f"{name} every {steps} steps" if steps > 1 else f"{name} every step"
                update = self.budget.levels.get(name + UPDATE, level)
                if update < level:
                    text += f", updated every {round(spacing[name] * 3**update)}"
                parts.append(f"{text} ({1e3 * self.budget.seconds[name]:.3g} ms)")
        return f"for a budget of {self.budget.share:.0%} of the training time: {'; '.join(parts)}"

    # -- what ---------------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {} if self.optimizer is None else settings(self.optimizer)

    def _snapshot(self, step: int, batch: Any) -> Snapshot:
        L, optimizer = self.L, self.optimizer
        gradient = self._fresh_gradient()
        return Snapshot(
            L, L.params(), step, self.seed,
            batch_size=self.batch_size, replacement=self.replacement, lr=self.lr, optimizer=self._settings(),
            batch=batch, modes={name: module.training for name, module in L.model.named_modules()},
            batch_gradient=gradient,
            preconditioner=None if optimizer is None else preconditioner(optimizer, L, coming=gradient is not None),
            test=self.test, carry=self.carry, engine=self.engine,
        )  # fmt: skip

    def _stepped(self, *_: Any) -> None:
        """After a step of the optimizer: the gradients that are there now have been used."""
        g = self._probe.grad
        self._used = None if g is None else (g, version(g))

    def _fresh_gradient(self) -> Tensor | None:
        """(P,) the gradient in `.grad`, if it is of a backward pass since the last step of the optimizer."""
        g = self._probe.grad
        used = bool(g is not None and self._used and self._used[0] is g and self._used[1] == version(g))
        if g is None or self.optimizer is None or used:
            return None
        gradient = flat_gradient(self.L)
        return gradient if bool(gradient.any()) else None  # zeroed in place, before the backward pass

    def _write(self, at: Snapshot, record: dict[str, Any], further: Mapping[str, float]) -> None:
        """To the run and to the trackers. Training is worth more than its log: what fails is told once."""
        if self.run is not None:
            self._keep(self.run, lambda run: run.append(record))
        numbers = flat(at.measurements) | {f"curvlab/{name}": x for name, x in further.items()}
        for name in ("lr", "threshold"):
            if record[name] is not None:
                numbers[f"curvlab/{name}"] = record[name]
        for tracker in self.trackers:
            try:
                getattr(tracker, "log", tracker)(numbers, step=at.step)
            except Exception as error:  # a tracker's own: network, disk, a closed run
                self._warn(f"{type(tracker).__name__} did not take the numbers ({type(error).__name__}: {error})")

    def _keep(self, run: Run, write: Callable[[Run], Any]) -> None:
        try:
            write(run)
        except OSError as error:
            self._warn(f"{run.path} cannot be written ({error}); training and measuring go on without the log")

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=4)


def flat(measurements: Mapping[str, Measurement]) -> dict[str, float]:
    """Measurements as trackers take them: one number each, under names such as "curvlab/sharpness".

    Errors go under "..._error", entries of curves under their coordinate, such as "curvlab/instability/32"; what has no
    value is left out.

    Example:
        >>> flat({"sharpness": Measurement(2.0, 0.5, "bound")})
        {'curvlab/sharpness': 2.0, 'curvlab/sharpness_error': 0.5}
    """
    found: dict[str, float] = {}
    for name, m in measurements.items():
        if m.value is None:
            continue
        points = [("", m)] if not m.axis else [(f"/{c}", m.select(**{m.axis[0]: c})) for c in m.axis[1]]
        for suffix, point in points:
            value, error = float(point.value), float(np.asarray(point.error))  # type: ignore[arg-type]
            if np.isfinite(value):
                found[f"curvlab/{name}{suffix}"] = value
                if point.kind != "exact" and np.isfinite(error):
                    found[f"curvlab/{name}{suffix}_error"] = error
    return found


def _containers(carry: dict[Hashable, Any]) -> dict[Hashable, Any]:
    """The same in containers of its own: later steps change these in place, but replace their tensors."""
    return tree_map(lambda tensor: tensor, carry)


def _updated(found: Measurement) -> Measurement:
    others = [part for part in (found.note or "").split("; ") if part and not part.startswith("not converged")]
    return dataclasses.replace(found, note="; ".join([UPDATE_NOTE, *others]))


def _number(x: Any) -> float:
    return float(x.detach()) if isinstance(x, Tensor) else float(x)


def _batch_size(given: Any) -> int | tuple[int, ...] | None:
    if isinstance(given, DataLoader):
        if given.batch_size is None:
            raise ValueError("the DataLoader has no batch size of its own (batch_sampler); pass batch_size=32")
        world = torch.distributed.get_world_size() if _distributed() else 1
        return given.batch_size * world
    return batch_sizes(given)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0
