"""A loop with Lightning Fabric: a monitor that knows its batch size, its loggers and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..diagnostics.registry import Request
from ..monitor import Monitor
from ..objective import Objective


def monitor(
    fabric: Any,
    model: Objective | Any,
    diagnostics: Iterable[Request],
    *,
    loader: Any,
    accumulate: int = 1,
    **options: Any,
) -> Monitor:
    """A `curvlab.Monitor` of a loop with Fabric; the main process measures and logs to Fabric's loggers.

    Call it before each `optimizer.step()`. Fabric leaves accumulation to the loop, so only the loop knows when that is.

    Args:
        fabric: the `Fabric`; `fabric.log_dict` gets the numbers.
        model: set up or not, or an `Objective` of it. Under mixed precision it is measured without.
        diagnostics: names or (name, options), see `curvlab list`.
        loader: the training's loader, set up. b of S_b is its batch size, times `accumulate`, times the number of ranks.
        accumulate: backward passes in one optimizer step.
        options: all else that `Monitor` takes: loss and data, optimizer, every, run, budget, ...

    Raises:
        ValueError: as `Monitor`.

    Example:
        >>> import torch
        >>> from lightning.fabric import Fabric
        >>> x, y = torch.randn(32, 3), torch.randn(32, 1)
        >>> model = torch.nn.Linear(3, 1)
        >>> fabric = Fabric(accelerator="cpu", devices=1)
        >>> model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
        >>> loader = fabric.setup_dataloaders(loader)
        >>> watch = {"loss": torch.nn.MSELoss(), "data": (x, y), "optimizer": optimizer, "announce": None}
        >>> curvature = monitor(fabric, model, ["sharpness", "instability"], loader=loader, accumulate=2, **watch)
        >>> for i, (batch, targets) in enumerate(loader):
        ...     last = i % 2 == 1
        ...     with fabric.no_backward_sync(model, enabled=not last):
        ...         fabric.backward(torch.nn.functional.mse_loss(model(batch), targets) / 2)
        ...     if last:
        ...         found = curvature()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> curvature.batch_size
        8
    """
    own, size = options.pop("log", ()), loader.batch_size
    options.setdefault("batch_size", size and size * accumulate * fabric.world_size)
    return Monitor(
        model, diagnostics, log=[fabric.log_dict, *(own if isinstance(own, list | tuple) else [own])], **options
    )
