"""Lightning's Trainer: a callback that owns a monitor. Hides Lightning's hooks, counters, loggers and checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ..diagnostics.registry import Request
from ..monitor import Monitor
from ..optional import require_package

# The same library has two names; its Trainer calls callbacks by the names of their hooks, so either base class serves both.
_NAME = "pytorch_lightning" if "pytorch_lightning" in sys.modules else "lightning.pytorch"
_Callback: Any = require_package(_NAME, "curvlab[lightning]").Callback


class CurvatureCallback(_Callback):
    """Measure during `Trainer.fit`: after each due backward pass, before clipping and before the optimizer's step.

    The weights are then w_t and `.grad` holds the gradient of the whole step, unscaled: accumulated over batches, averaged
    over ranks. The step is that of the optimizer (`trainer.global_step`), so it counts neither accumulated batches nor
    validation. The numbers go to the trainer's loggers, and the monitor's state into the trainer's checkpoints.

    Args:
        diagnostics: names or (name, options), see `curvlab list`.
        loss, data: as `curvlab.Objective` takes them; data is a fixed set to measure on, not the training's loader.
        model: name of the submodule whose outputs the loss takes, such as ``"net"``; default the LightningModule itself.
        optimizer: which one is watched, where `configure_optimizers` returns several. Its own steps are then counted.
        batch_size: b of S_b; default what makes a step: the training loader's batch size, times
            `accumulate_grad_batches`, times the number of ranks.
        log: trackers besides the trainer's loggers.
        options: all else that `curvlab.Monitor` takes: every, run, budget, ...

    Attributes:
        monitor: the `curvlab.Monitor`, from the beginning of `fit` on.

    Raises:
        ImportError: Lightning is missing, or does not import beside the installed torch.
        ValueError: as `Monitor` and `Objective`, when `fit` begins.

    Example:
        >>> import torch, lightning.pytorch as pl
        >>> class Regression(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(3, 1)
        ...     def training_step(self, batch):
        ...         return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> x, y = torch.randn(32, 3), torch.randn(32, 1)
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
        >>> curvature = CurvatureCallback(
        ...     ["sharpness", "instability"], loss=torch.nn.MSELoss(), data=(x, y), model="net", every=3, announce=None
        ... )
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[curvature], enable_model_summary=False, **quiet)
        >>> trainer.fit(Regression(), loader)
        >>> curvature.monitor.batch_size
        8
    """

    def __init__(
        self,
        diagnostics: Iterable[Request],
        *,
        loss: Any,
        data: Any,
        model: str = "",
        optimizer: int = 0,
        batch_size: Any = None,
        log: Any = (),
        **options: Any,
    ) -> None:
        self.diagnostics, self.loss, self.data, self.model = list(diagnostics), loss, data, model
        self.optimizer, self.batch_size, self.options = optimizer, batch_size, options
        self.trackers = log if isinstance(log, list | tuple) else [log]  # Lightning gives callbacks a `log` of its own
        self.monitor: Monitor | None = None
        self.taken = 0  # steps of the watched optimizer
        self._state: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the monitor: the model is in place now, and a checkpoint has been read."""
        goes_on = bool(self._state) and trainer.global_step > 0
        batch_size = _batch_size(trainer) if self.batch_size is None else self.batch_size
        self.monitor = Monitor(
            pl_module.get_submodule(self.model), self.diagnostics, loss=self.loss, data=self.data,
            optimizer=trainer.optimizers[self.optimizer], log=[*map(_metrics_of, trainer.loggers), *self.trackers],
            batch_size=batch_size, **({"resume": True} if goes_on else {}) | self.options,
        )  # fmt: skip
        self.taken = self._state["taken"] if goes_on else 0
        if goes_on:
            self.monitor.load_state_dict(self._state["monitor"])
        self._state = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Measure what is due."""
        several = len(trainer.optimizers) > 1
        if self.monitor is None or (several and optimizer is not trainer.optimizers[self.optimizer]):
            return
        self.monitor(self.taken if several else trainer.global_step)
        self.taken += 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the log."""
        if self.monitor is not None:
            self._state = self.state_dict()  # for checkpoints that are saved after `fit`
            self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoints."""
        if self._state or self.monitor is None:
            return self._state
        return {"monitor": self.monitor.state_dict(), "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint that `fit` goes on from."""
        self._state = state

    @property
    def state_key(self) -> str:
        """Names the state in a checkpoint; it tells several of these callbacks apart."""
        return self._generate_state_key(diagnostics=self.diagnostics, model=self.model, optimizer=self.optimizer)


def _metrics_of(logger: Any) -> Any:
    return lambda numbers, step: logger.log_metrics(numbers, step=step)


def _batch_size(trainer: Any) -> int | None:
    """Of an optimizer step, where it can be read."""
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return size and size * trainer.accumulate_grad_batches * trainer.world_size
