"""Training as a generator of snapshots: measure at w_t, hand it out, take the step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import schedule
from .batch_gradient import BatchGradient
from .batches import Batches
from .derivatives import hooks_on
from .diagnostics import evaluate, parse, require
from .diagnostics.registry import TRAINED, Request, batch_sizes, described
from .files import printable
from .guard import full_precision, get_random_states, random_states, set_random_states
from .hvp import Engine
from .linalg.probes import generator
from .objective import Objective
from .optimizers import flat_gradient, learning_rate, preconditioner, settings, stability_threshold, weight_decay
from .regularizers import registry as regularizers
from .runs import Run, packed
from .sharded import require_whole
from .snapshot import Snapshot
from .trained import TrainedObjective


def train(
    L: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    *,
    penalties: Iterable[tuple[float, regularizers.Request]] = (),
    diagnostics: Iterable[Request] = (),
    every: schedule.Every = 1,
    run: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    test: Objective | None = None,
    scheduler: Any = None,
    micro_batch_size: int | None = None,
    batch_size: int | tuple[int, ...] | None = None,
    replacement: bool | None = None,
    trajectory: bool = False,
    seed: int = 0,
    engine: Engine = "auto",
) -> Iterator[Snapshot]:
    """Train the model of an objective and yield a `Snapshot` before every step.

    For each batch: its gradient is computed in the model's own mode, a snapshot of w_t with that gradient and the
    learning rate is measured and logged, handed out, and then the optimizer steps. Leaving the loop with `break` ends
    training; the step of the last snapshot is not taken. Measuring changes nothing: parameters are bit-identical with
    any diagnostics.

    A snapshot's intermediates are dropped when training goes on; its parameters and measurements stay valid.

    Args:
        L: the objective whose model is trained and whose data is measured.
        optimizer: over the model's parameters.
        batches: what to train on: indices into the data of L (see `Batches`), or batches of data, such as a
            `DataLoader` with augmentation.
        penalties: pairs (strength, regularizer), added to the loss that is trained, such as
            ``(0.01, "gradient_norm")``, ``(0.01, curvlab.regularizers.gradient_norm_penalty)`` or
            ``(0.01, ("gradient_norm_difference", {"h": 0.001}))``. Their values are measured under their names.
        diagnostics: names or (name, options), measured at steps 0, `every`, 2 `every`, ... (an odd number is wise:
            dynamics at the edge of stability have period 2), or by schedules of their own (see `Monitor`). They are of the
            loss L, without penalties and weight decay; the prefix "trained/", as in ``"trained/sharpness"``, asks for the
            objective that is trained (`curvlab.trained.TrainedObjective`).
        run: a new folder for the log, and `final.pt` with the last parameters, buffers and number of steps
            taken, whichever way the loop ends. Training ends where the loss of a batch is not finite; the record of that
            step and `final.pt` then state the reason. A full disk does not end it: a warning says once that something could
            not be written.
        checkpoint_every: save all that training depends on to `checkpoint.pt` before every so many steps: parameters,
            buffers, optimizer, scheduler, random states, and what diagnostics carry from step to step. Where the loss of a
            batch is not finite, the checkpoint before is kept.
        resume: continue the run in the folder `run` from its last checkpoint, or from the start without one, given the
            same model, optimizer, batches and settings anew. What is logged is bit-identical to what a run that was not
            interrupted logs (equal threads and device). `batches` that have `since` are taken from that step on; others are
            iterated anew with the random states of the start, and skipped. A run that had ended yields nothing more.
        scheduler: a learning-rate scheduler of `optimizer`, stepped after every step. (Stepped in the body of the loop it
            would change the rate of the step that was just measured.)
        trajectory: also save the parameters at the measured steps, for `trajectory_distance`.
        config: what else to store in the run's configuration.
        test: held-out data.
        micro_batch_size: |M|: accumulate the batch's gradient over parts of at most so many examples; those of the
            penalties, and those with statistics of their own under BatchNorm.
        batch_size, replacement: b of S_b and its sampling; default those of `batches`.
        seed: of the probes and of what penalties draw, and of nothing else; data order belongs to `batches`,
            initialization to the model.
        engine: of Hessian-vector products.

    Raises:
        ValueError: unknown diagnostics or penalties, or some that need what is not there; before the first step.
            Also a resumed run that was made with other settings.
        FileExistsError: `run` already holds a run, and is not to be resumed.

    Example:
        >>> import torch, curvlab as cl
        >>> model = torch.nn.Linear(2, 1)
        >>> L = Objective(model, "squared_error", (torch.eye(2), torch.zeros(2, 1)))
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> [at.step for at in train(L, sgd, cl.Batches(2, 2, steps=3), diagnostics=["loss"])]
        [0, 1, 2]
    """
    plan, penalties = parse(diagnostics), list(penalties)
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}; expected a whole number of steps from 1")
    if run is None and (resume or checkpoint_every or trajectory):
        raise ValueError("resume, checkpoint_every and trajectory need a folder to read and write; pass run='runs/a'")
    regularizers.checked_size(micro_batch_size)
    terms = regularizers.terms(penalties)
    for _, entry, options in terms:
        regularizers.require(L, entry)
        plan.setdefault(entry.name, options)
    every = schedule.checked(every, plan)
    _same_parameters(L, optimizer, batches)
    training = _Training(
        L, optimizer, batches, penalties, plan, every,
        test=test, scheduler=scheduler, micro_batch_size=micro_batch_size,
        batch_size=batch_sizes(batch_size if batch_size is not None else getattr(batches, "batch_size", None)),
        replacement=replacement if replacement is not None else getattr(batches, "replacement", False),
        checkpoint_every=checkpoint_every, keeps_trajectory=trajectory, seed=seed, engine=engine,
    )  # fmt: skip
    if any(name.startswith(TRAINED) for name in plan):
        training.trained = TrainedObjective(
            L, penalties, micro_batch_size=micro_batch_size, weight_decay=weight_decay(optimizer), seed=seed
        )
    require(L, plan, {
        "batch_size": training.batch_size, "lr": learning_rate(optimizer), "test": test, "batch_gradient": True,
        "trained": training.trained,
    })  # fmt: skip
    if run is not None and L.ranks.rank == 0:
        settled = {**(config or {}), "training": training.describe(terms)}
        training.log = Run.resume(run, settled) if resume else Run.create(run, settled)
    return training.steps()


@dataclass
class _Training:
    """The settings of a training, and what it has besides the model and the optimizer."""

    L: Objective
    optimizer: torch.optim.Optimizer
    batches: Iterable[Any]
    penalties: list[tuple[float, regularizers.Request]]
    plan: dict[str, dict[str, Any]]
    every: schedule.Every
    test: Objective | None
    scheduler: Any
    micro_batch_size: int | None
    batch_size: int | tuple[int, ...] | None
    replacement: bool
    checkpoint_every: int | None
    keeps_trajectory: bool
    seed: int
    engine: Engine
    trained: TrainedObjective | None = None
    log: Run | None = None
    carry: dict[Hashable, Any] = field(default_factory=dict)
    path: list[tuple[int, Tensor]] = field(default_factory=list)
    reason: str = ""  # why training ended before its last step
    told: bool = False  # that the run cannot be written
    beginning: dict[str, Any] = field(default_factory=dict)

    def describe(self, terms: list) -> dict[str, Any]:
        """What the run's configuration says."""
        return described(
            self.L, self.plan, every=self.every, batch_size=self.batch_size, replacement=self.replacement,
            seed=self.seed, engine=self.engine,
        ) | {
            "optimizer": settings(self.optimizer),
            "lr": learning_rate(self.optimizer),
            "scheduler": type(self.scheduler).__name__ if self.scheduler else None,
            "batches": self.batches.describe() if hasattr(self.batches, "describe") else None,
            "trained_loss": _trained_loss(self.L, terms),
            "penalties": [[strength, entry.name, options] for strength, entry, options in terms],
            "micro_batch_size": self.micro_batch_size,
        }  # fmt: skip

    def steps(self) -> Iterator[Snapshot]:
        """Snapshots from where the run stands to its end."""
        self.beginning = get_random_states()
        state = self._restored()
        if state is None:
            return
        taken, complete = state.get("step", 0), False
        record: dict[str, Any] = {}
        try:
            for step, batch in enumerate(self._batches(state), taken):
                due = self.checkpoint_every and self.log and step % self.checkpoint_every == 0
                saved = packed(self._state(step)) if due else b""
                self.optimizer.zero_grad()  # also what it holds beside the model
                closure = BatchGradient(
                    self.L, batch, micro_batch_size=self.micro_batch_size, penalties=self.penalties,
                    generator=generator(self.seed, step, "penalties"),
                )  # fmt: skip
                batch_loss = closure()
                diverged = not math.isfinite(batch_loss)
                if diverged:  # the record says so, and the checkpoint before is kept
                    self.reason = f"the loss of the batch is {batch_loss} at step {step}: training ended"
                elif saved:
                    self._keep(functools.partial(Run.write, name="checkpoint", content=saved))
                at = self._snapshot(step, batch, closure, batch_loss)
                asked = schedule.select(self.plan, self.every, step)
                if asked or diverged:
                    record = self._measured(at, asked, batch_loss)
                yield at
                at.release()
                complete = diverged
                if diverged:
                    return
                self._step(closure, batch_loss)
                taken += 1
                self._finish(record, getattr(self.optimizer, "effective_lr", None))
            complete = True
        finally:
            self._finish(record, None)
            self._end(taken, complete)

    def _snapshot(self, step: int, batch: Any, closure: BatchGradient, batch_loss: float) -> Snapshot:
        L, gradient = self.L, flat_gradient(self.L)
        at = Snapshot(
            L, L.params(), step, self.seed,
            batch_size=self.batch_size, replacement=self.replacement,
            lr=learning_rate(self.optimizer), optimizer=settings(self.optimizer),
            batch=batch, micro_batch_size=self.micro_batch_size,
            modes={name: module.training for name, module in L.model.named_modules()},
            penalties={(e.name, *sorted(o.items())): closure.penalties[e.name] for _, e, o in closure.terms},
            batch_gradient=gradient, known=(batch_loss, gradient) if self._trains_what_is_measured(batch, closure) else None,
            preconditioner=preconditioner(self.optimizer, L),
            test=self.test, carry=self.carry, engine=self.engine,
        )  # fmt: skip
        if self.trained is None:
            return at
        own = self.carry.setdefault("trained", {})
        point = at.anew(objective=self.trained, carry=own, _count=at._count)
        return dataclasses.replace(at, trained=point)

    def _trains_what_is_measured(self, batch: Any, closure: BatchGradient) -> bool:
        """Whether the batch is all data, evaluated as it is when measured, so that its gradient is that of L."""
        L = self.L
        if closure.terms or not isinstance(batch, Tensor) or batch.shape != (L.size,) or batch.dtype != torch.int64:
            return False
        alike = all(p.dtype == L.dtype and p.device == L.device for p in L.variables())
        if L.hooks or hooks_on(L):
            return False
        if not alike or not full_precision(L.model, L.device.type) or L.mode == "train" or L.live_difference():
            return False
        return bool((batch.sort().values == torch.arange(L.size, device=batch.device)).all())

    def _measured(self, at: Snapshot, due: dict[str, Any], batch_loss: float) -> dict[str, Any]:
        """Measure and log; the record itself where the step has something to add to it."""
        started = time.perf_counter()
        evaluate(at, due)
        seconds = time.perf_counter() - started
        threshold = stability_threshold(at.optimizer, at.lr) if at.lr else None
        ended = {"ended": self.reason} if self.reason else {}
        record = at.record(seconds, threshold=threshold, batch_loss=batch_loss, **ended)
        if self.keeps_trajectory:
            self.path.append((at.step, at.w.cpu()))
        if hasattr(self.optimizer, "effective_lr"):  # known when the step is taken
            return record
        self._keep(lambda log: log.append(record))
        return {}

    def _finish(self, record: dict[str, Any], effective_lr: float | None) -> None:
        if record:
            threshold = 2 / effective_lr if effective_lr else None  # the step is along the gradient
            whole = {**record, "effective_lr": effective_lr, "threshold": threshold}
            self._keep(lambda log: log.append(whole))
        record.clear()

    def _keep(self, write: Callable[[Run], Any]) -> None:
        """Write to the run. Training is worth more than its log: what fails is told once."""
        if self.log is None or not self.log.is_open:
            return
        try:
            write(self.log)
        except OSError as error:
            if not self.told:
                warnings.warn(
                    f"{self.log.path} cannot be written ({error}); training goes on, without what cannot be written",
                    stacklevel=3,
                )
            self.told = True

    def _step(self, closure: BatchGradient, batch_loss: float) -> None:
        if isinstance(self.optimizer, torch.optim.LBFGS):  # evaluates what it minimizes, as often as it likes
            self.optimizer.step(closure.objective)
        elif getattr(self.optimizer, "needs_closure", False):
            self.optimizer.step(closure)
        else:
            self.optimizer.step()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(batch_loss)
        elif self.scheduler is not None:
            self.scheduler.step()

    # -- where a run stands -------------------------------------------------------------------------------------------

    def _batches(self, state: dict[str, Any]) -> Iterator[Any]:
        """The batches from the step of a checkpoint on, with the random states that training had there."""
        if not state:
            return iter(self.batches)
        if hasattr(self.batches, "since"):
            found = self.batches.since(state["step"])
        else:
            self.beginning = state["beginning"]
            set_random_states(self.beginning)
            found = itertools.islice(self.batches, state["step"], None)
            found = itertools.chain(itertools.islice(found, 1), found)  # skips now
        first = list(itertools.islice(found, 1))
        set_random_states(state["random"])
        return itertools.chain(first, found)

    def _restored(self) -> dict[str, Any] | None:
        """The last checkpoint, put back; nothing in it for a new run; None for one that had ended."""
        with self._fitting():
            stored = {} if self.log is None else self._stored(self.log)
        state = self.L.ranks.of_first(stored)
        with self._fitting():
            return self._put_back(state)

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what lies in the folder may be anything
            if self.log is not None:
                self.log.close()
            if isinstance(error, ValueError) and self.log is not None and str(self.log.path) in str(error):
                raise  # it names the file
            why = printable(f"{type(error).__name__}: {error}")[:1000]
            where = "" if self.log is None else f" in {self.log.path}"
            raise ValueError(
                f"final.pt and checkpoint.pt{where} do not fit this training ({why}); "
                "make the model, optimizer and scheduler of the run, or delete both files to start again"
            ) from error

    def _stored(self, log: Run) -> dict[str, Any]:
        """What a run's folder has: its end, if it is complete, or its last checkpoint."""

        def load(name: str) -> dict[str, Any]:
            return log.load(name, device=None) if (log.path / f"{name}.pt").exists() else {}

        final = load("final")
        return final if final.get("complete") else load("checkpoint")

    def _put_back(self, state: dict[str, Any]) -> dict[str, Any] | None:
        if state.get("complete"):
            for p, value in zip(self.L.variables(), self.L.split(state["params"]), strict=True):
                p.data.copy_(value)
            self.L.model.load_state_dict(state["buffers"], strict=False)
            if self.log is not None:
                self.log.close()
            return None
        if state:
            if not isinstance(state["step"], int) or state["step"] < 0:
                raise TypeError(f"step is {state['step']!r}, expected a whole number")
            with random_states():
                set_random_states(state["beginning"])
                set_random_states(state["random"])
            self.L.module.load_state_dict(state["model"])
            keys = [set(group) for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for before, group in zip(keys, self.optimizer.param_groups, strict=True):
                if lacking := before - set(group):  # torch does not look, and the step would fail
                    raise TypeError(f"the optimizer's state lacks {', '.join(sorted(lacking))}")
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            self.carry.update(state["carry"])
            self.path.extend(state["path"])
        if self.log is not None:
            self.log.truncate(state.get("log_size", 0))
        return state

    def _state(self, step: int) -> dict[str, Any]:
        assert self.log is not None
        return {
            "step": step,
            "log_size": self.log.size,
            "model": self.L.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "random": get_random_states(),
            "beginning": self.beginning,
            "carry": self.carry,
            "path": self.path,
        }

    def _end(self, taken: int, complete: bool) -> None:
        if self.log is None:
            return
        buffers = {name: b.detach().cpu() for name, b in self.L.model.named_buffers()}
        final = {
            "step": taken, "params": self.L.params().cpu(), "buffers": buffers, "complete": complete,
            "reason": self.reason,
        }  # fmt: skip
        if self.path:
            steps, params = zip(*self.path, strict=True)
            self._keep(lambda log: log.save_trajectory(list(steps), list(params)))
        self._keep(lambda log: log.save("final", final))
        self.log.close()


def _same_parameters(L: Objective, optimizer: torch.optim.Optimizer, batches: Iterable[Any]) -> None:
    require_whole(L, "steps of curvlab.train")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in L.variables()}:
        raise ValueError(
            "the optimizer holds none of the trainable parameters of the objective's model; make it from "
            "L.model.parameters()"
        )
    if L.subset:
        raise ValueError(
            f"the objective has a subset of the model's parameters ({', '.join(L.names[:3])}, ...), and all would be "
            "trained; train an objective of all of them and measure the subset with Monitor, or freeze the others"
        )
    if isinstance(batches, Batches) and batches.n != L.size:
        raise ValueError(
            f"the batches index {batches.n} examples, but the objective has {L.size}: pass Batches(L.size, ...)"
        )


def _trained_loss(L: Objective, terms: list) -> str | None:
    """How the loss that is trained differs from the one that is measured; None if it does not."""
    reasons = [L.live_difference(), *(f"{strength} {entry.name} is added" for strength, entry, _ in terms if strength)]
    return "; ".join(reason for reason in reasons if reason) or None
