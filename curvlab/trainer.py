"""Training as a generator of snapshots: measure at w_t, hand it out, take the step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .batch_gradient import BatchGradient
from .batches import Batches
from .diagnostics import evaluate, parse, require
from .diagnostics.registry import Request, batch_sizes
from .hvp import Engine
from .linalg.probes import generator
from .objective import Objective
from .optimizers import learning_rate, preconditioner, settings
from .regularizers import registry as regularizers
from .runs import Run
from .snapshot import Snapshot


def train(
    L: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    *,
    penalties: Iterable[tuple[float, regularizers.Request]] = (),
    diagnostics: Iterable[Request] = (),
    every: int = 1,
    run: str | os.PathLike | None = None,
    config: Mapping[str, Any] | None = None,
    test: Objective | None = None,
    micro_batch_size: int | None = None,
    batch_size: int | tuple[int, ...] | None = None,
    replacement: bool | None = None,
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
            ``(0.01, ("gradient_norm_difference", {"h": 0.001}))``. Their values are measured under their names; all other
            diagnostics are of the loss without penalties.
        diagnostics: names or (name, options), measured at steps 0, `every`, 2 `every`, ... An odd `every` is wise:
            dynamics at the edge of stability have period 2.
        run: a new folder for the log, and `final.pt` with the last parameters, buffers and number of steps
            taken, whichever way the loop ends.
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
        FileExistsError: `run` already holds a run.

    Example:
        >>> import torch, curvlab as cl
        >>> model = torch.nn.Linear(2, 1)
        >>> L = Objective(model, "squared_error", (torch.eye(2), torch.zeros(2, 1)))
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> [at.step for at in train(L, sgd, cl.Batches(2, 2, steps=3), diagnostics=["loss"])]
        [0, 1, 2]
    """
    plan, penalties = parse(diagnostics), list(penalties)
    if every < 1:
        raise ValueError(f"every is {every}; expected a whole number of steps from 1")
    regularizers.checked_size(micro_batch_size)
    terms = regularizers.terms(penalties)
    for _, entry, options in terms:
        regularizers.require(L, entry)
        plan.setdefault(entry.name, options)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not trained & {id(p) for p in L.variables()}:
        raise ValueError(
            "the optimizer holds none of the trainable parameters of the objective's model; make it from "
            "L.model.parameters()"
        )
    if isinstance(batches, Batches) and batches.n != L.size:
        raise ValueError(
            f"the batches index {batches.n} examples, but the objective has {L.size}: pass Batches(L.size, ...)"
        )
    batch_size = batch_sizes(batch_size if batch_size is not None else getattr(batches, "batch_size", None))
    replacement = replacement if replacement is not None else getattr(batches, "replacement", False)
    available = {"batch_size": batch_size, "lr": learning_rate(optimizer), "test": test, "batch_gradient": True}
    require(plan, available)
    log = None
    if run is not None:
        log = Run.create(
            run,
            {
                **(config or {}),
                "training": {
                    "objective": L.describe(),
                    "optimizer": settings(optimizer),
                    "lr": learning_rate(optimizer),
                    "batch_size": batch_size,
                    "replacement": replacement,
                    "every": every,
                    "diagnostics": list(plan.items()),
                    "trained_loss": _trained_loss(L, terms),
                    "penalties": [[strength, entry.name, options] for strength, entry, options in terms],
                    "micro_batch_size": micro_batch_size,
                    "probe_seed": seed,
                    "engine": engine,
                    "threads": torch.get_num_threads(),
                },
            },
        )
    return _steps(
        L,
        optimizer,
        batches,
        penalties,
        plan,
        every,
        log,
        test,
        micro_batch_size,
        batch_size,
        replacement,
        seed,
        engine,
    )


def _steps(
    L: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    penalties: list[tuple[float, regularizers.Request]],
    plan: dict[str, dict[str, Any]],
    every: int,
    log: Run | None,
    test: Objective | None,
    micro_batch_size: int | None,
    batch_size: int | tuple[int, ...] | None,
    replacement: bool,
    seed: int,
    engine: Engine,
) -> Iterator[Snapshot]:
    carry: dict[Hashable, Any] = {}
    taken = 0
    try:
        for step, batch in enumerate(batches):
            optimizer.zero_grad()  # also what it holds beside the model
            draws = generator(seed, step, "penalties")
            closure = BatchGradient(L, batch, micro_batch_size=micro_batch_size, penalties=penalties, generator=draws)
            batch_loss = closure()
            at = Snapshot(
                L,
                L.params(),
                step,
                seed,
                batch_size=batch_size,
                replacement=replacement,
                lr=learning_rate(optimizer),
                optimizer=settings(optimizer),
                batch=batch,
                micro_batch_size=micro_batch_size,
                modes={name: module.training for name, module in L.model.named_modules()},
                penalties={(e.name, *sorted(o.items())): closure.penalties[e.name] for _, e, o in closure.terms},
                batch_gradient=_flat_gradient(L),
                preconditioner=preconditioner(optimizer, L),
                test=test,
                carry=carry,
                engine=engine,
            )
            if plan and step % every == 0:
                started = time.perf_counter()
                evaluate(at, plan)
                if log is not None:
                    log.append(_record(at, batch_loss, time.perf_counter() - started))
            yield at
            at.release()
            if not math.isfinite(batch_loss):
                return  # diverged: the log says so, and the parameters of this point are kept
            if isinstance(optimizer, torch.optim.LBFGS):  # evaluates what it minimizes, as often as it likes
                optimizer.step(closure.objective)
            elif getattr(optimizer, "needs_closure", False):
                optimizer.step(closure)
            else:
                optimizer.step()
            taken += 1
    finally:
        if log is not None:
            buffers = {name: b.detach().cpu() for name, b in L.model.named_buffers()}
            log.save("final", {"step": taken, "params": L.params().cpu(), "buffers": buffers})
            log.close()


def _trained_loss(L: Objective, terms: list) -> str | None:
    """How the loss that is trained differs from the one that is measured; None if it does not."""
    reasons = [L.live_difference(), *(f"{strength} {entry.name} is added" for strength, entry, _ in terms if strength)]
    return "; ".join(reason for reason in reasons if reason) or None


def _flat_gradient(L: Objective) -> Tensor:
    """The gradient in the live model's `.grad`, as the objective's flat vector."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in L.variables()]
    return L.join([g.detach().to(L.device, L.dtype) for g in grads])


def _record(at: Snapshot, batch_loss: float, seconds: float) -> dict[str, Any]:
    return {
        "step": at.step,
        "lr": at.lr,
        "batch_size": at.batch_size,
        "batch_loss": batch_loss,
        "matvecs": at.matvecs,
        "seconds": round(seconds, 6),
        "measurements": {name: m.to_dict() for name, m in at.measurements.items()},
    }
