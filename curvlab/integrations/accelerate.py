"""A loop with accelerate: a monitor that knows its batch size, its trackers and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..diagnostics.registry import Request
from ..monitor import Monitor
from ..objective import Objective


def monitor(
    accelerator: Any, model: Objective | Any, diagnostics: Iterable[Request], *, loader: Any, **options: Any
) -> Monitor:
    """A `curvlab.Monitor` of a loop with accelerate; the main process measures and logs to the accelerator's trackers.

    Call it where `accelerator.sync_gradients` is true, as in the example: only there does `optimizer.step()` take a step,
    and only there are the gradients those of the whole step. With fp16, call `accelerator.unscale_gradients()` or
    `accelerator.clip_grad_norm_(...)` before it.

    Args:
        accelerator: the `Accelerator`; `accelerator.log` gets the numbers.
        model: prepared or not, or an `Objective` of it. Under mixed precision it is measured without.
        diagnostics: names or (name, options), see `curvlab list`.
        loader: the training's loader, prepared. b of S_b is its batch size over all processes, times
            `gradient_accumulation_steps`.
        options: all else that `Monitor` takes: loss and data, optimizer, every, run, budget, ...

    Raises:
        ValueError: a loader that was not prepared; and as `Monitor`.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> x, y = torch.randn(32, 3), torch.randn(32, 1)
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> watch = {"loss": torch.nn.MSELoss(), "data": (x, y), "optimizer": optimizer}
        >>> curvature = monitor(accelerator, model, ["sharpness", "instability"], loader=loader, announce=None, **watch)
        >>> for batch, targets in loader:
        ...     with accelerator.accumulate(model):
        ...         accelerator.backward(torch.nn.functional.mse_loss(model(batch), targets))
        ...         if accelerator.sync_gradients:
        ...             found = curvature()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> curvature.batch_size
        8
    """
    if not hasattr(loader, "total_batch_size"):
        raise ValueError(
            f"loader is a {type(loader).__name__}; expected the training's loader as accelerator.prepare(...) gave it, "
            "which knows the batch size over all processes"
        )
    own = options.pop("log", ())
    options.setdefault("batch_size", loader.total_batch_size * accelerator.gradient_accumulation_steps)
    return Monitor(
        model, diagnostics, log=[accelerator.log, *(own if isinstance(own, list | tuple) else [own])], **options
    )
