"""Training as a generator of snapshots: measure at w_t, hand it out, take the step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .batches import Batches, tree_map
from .diagnostics import evaluate, parse, require
from .diagnostics.registry import Request, batch_sizes
from .hvp import Engine
from .objective import Chunk, Objective
from .optimizers import learning_rate, preconditioner, settings
from .runs import Run
from .snapshot import Snapshot


def train(
    L: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    *,
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
        diagnostics: names or (name, options), measured at steps 0, `every`, 2 `every`, ... An odd `every` is wise:
            dynamics at the edge of stability have period 2.
        run: a new folder for the log, and `final.pt` with the last parameters, buffers and number of steps
            taken, whichever way the loop ends.
        config: what else to store in the run's configuration.
        test: held-out data.
        micro_batch_size: accumulate the batch's gradient over parts of at most so many examples.
        batch_size, replacement: b of S_b and its sampling; default those of `batches`.
        seed: of the probes, and of nothing else; data order belongs to `batches`, initialization to the model.
        engine: of Hessian-vector products.

    Raises:
        ValueError: unknown diagnostics, or some that need what is not there; before the first step.
        FileExistsError: `run` already holds a run.

    Example:
        >>> import torch, curvlab as cl
        >>> model = torch.nn.Linear(2, 1)
        >>> L = Objective(model, "squared_error", (torch.eye(2), torch.zeros(2, 1)))
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> [at.step for at in train(L, sgd, cl.Batches(2, 2, steps=3), diagnostics=["loss"])]
        [0, 1, 2]
    """
    plan = parse(diagnostics)
    if every < 1:
        raise ValueError(f"every is {every}; expected a whole number of steps from 1")
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(
            f"micro_batch_size is {micro_batch_size}; expected at least 1 example, or None for the whole batch"
        )
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
                    "trained_loss": L.live_difference(),
                    "micro_batch_size": micro_batch_size,
                    "probe_seed": seed,
                    "engine": engine,
                    "threads": torch.get_num_threads(),
                },
            },
        )
    return _steps(
        L, optimizer, batches, plan, every, log, test, micro_batch_size, batch_size, replacement, seed, engine
    )


def _steps(
    L: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
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
            optimizer.zero_grad()
            batch_loss = backward(L, batch, micro_batch_size)
            at = Snapshot(
                L,
                L.params(),
                step,
                seed,
                batch_size=batch_size,
                replacement=replacement,
                lr=learning_rate(optimizer),
                optimizer=settings(optimizer),
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
            if isinstance(optimizer, torch.optim.LBFGS):  # evaluates the loss itself, as often as it likes
                optimizer.step(lambda batch=batch: _closure(L, optimizer, batch, micro_batch_size))
            else:
                optimizer.step()
            taken += 1
    finally:
        if log is not None:
            buffers = {name: b.detach().cpu() for name, b in L.model.named_buffers()}
            log.save("final", {"step": taken, "params": L.params().cpu(), "buffers": buffers})
            log.close()


def backward(L: Objective, batch: Any, micro_batch_size: int | None = None) -> float:
    """Accumulate the mean gradient of a batch in the `.grad` of the live model, in its own mode; returns the mean loss."""
    like = next(iter(L.model.parameters()))

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, like.dtype) if tensor.is_floating_point() else tensor.to(like.device)

    pieces: list[Chunk] = L.pieces(batch, micro_batch_size)
    count, total = sum(piece.size for piece in pieces), 0.0
    for piece in pieces:
        losses = L.live_losses(tree_map(place, piece.batch))
        if piece.weights is not None:
            losses = losses * place(piece.weights)
        mean = losses.sum() / count
        mean.backward()
        total += float(mean.detach())
    return total


def _closure(L: Objective, optimizer: torch.optim.Optimizer, batch: Any, micro_batch_size: int | None) -> float:
    optimizer.zero_grad()
    return backward(L, batch, micro_batch_size)


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
