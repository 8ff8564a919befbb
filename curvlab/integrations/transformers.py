"""Hugging Face's Trainer: a callback that owns a monitor. Hides its events, its log, its collators and checkpoints."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from ..diagnostics.registry import Request
from ..files import read_tensors, write_whole
from ..guard import random_states
from ..monitor import Monitor
from ..optional import require_package
from ..runs import packed

_trainer: Any = require_package("transformers.trainer", "curvlab[transformers]")


class CurvatureCallback(_trainer.TrainerCallback):
    """Measure during `Trainer.train`: after each due backward pass and clipping, before the optimizer's step.

    The weights are then w_t and `.grad` holds the gradient of the whole step, accumulated and clipped. The step is
    `state.global_step`, the number of optimizer steps taken. The training's loader is never iterated, because that would
    draw other batches. The monitor's state is saved in the trainer's checkpoints.

    With ``fp16=True, max_grad_norm=0`` the Trainer leaves its loss scale on the gradients: clip, or use bf16.

    Args:
        diagnostics: names or (name, options), see `curvlab list`.
        loss: such as ``"next_token"``, ``"token"`` or ``"cross_entropy"``, see `curvlab.Objective`: the model's own loss is
            one number for a batch, and does not say what each example contributes.
        data: a fixed set to measure on: a data set or list of examples, which the trainer's own collator makes into batches,
            once (its columns are those that the model takes, and the labels); or a mapping with "labels", (inputs, targets)
            tensors, or a `DataLoader`, as `curvlab.Objective` takes them.
        batch_size: b of S_b; default what makes a step: the batch size per device, times devices, times
            `gradient_accumulation_steps`.
        log: trackers; the Trainer itself may be one, see the example.
        options: all else that `curvlab.Monitor` takes: every, run, budget, ...

    Attributes:
        monitor: the `curvlab.Monitor`, from the beginning of the training on.

    Raises:
        ImportError: transformers or accelerate is missing, or does not import beside the installed torch.
        ValueError: as `Monitor` and `Objective`, when training begins.

    Example:
        >>> import tempfile, torch, transformers
        >>> config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> text = [{"input_ids": row, "labels": row} for row in torch.randint(11, (16, 8))]
        >>> arguments = transformers.TrainingArguments(
        ...     tempfile.mkdtemp(), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2,
        ...     use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        ... )
        >>> trainer = transformers.Trainer(model, arguments, train_dataset=text)
        >>> curvature = CurvatureCallback(["sharpness"], loss="next_token", data=text[:8], log=trainer, announce=None)
        >>> trainer.add_callback(curvature)
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'curvlab/sharpness': ...
        >>> [entry["step"] for entry in trainer.state.log_history if "curvlab/sharpness" in entry]
        [0, 1]
        >>> curvature.monitor.batch_size
        8
    """

    def __init__(
        self,
        diagnostics: Iterable[Request],
        *,
        loss: Any,
        data: Any,
        batch_size: Any = None,
        log: Any = (),
        **options: Any,
    ) -> None:
        self.diagnostics, self.loss, self.data = list(diagnostics), loss, data
        self.batch_size, self.options = batch_size, options
        self.log = [_tracker(log) for log in (log if isinstance(log, list | tuple) else [log])]
        self.monitor: Monitor | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, train_dataloader: Any, **_: Any
    ) -> None:
        """Build the monitor: the model is in place now, and a checkpoint has been read."""
        saved = self._file(args, state)
        resumed = state.global_step > 0 and saved.is_file()
        per_device = state.train_batch_size or args.train_batch_size
        in_all = per_device * args.gradient_accumulation_steps * args.world_size
        self.monitor = Monitor(
            model, self.diagnostics, loss=self.loss, data=_collated(self.data, train_dataloader.collate_fn, per_device),
            batch_size=in_all if self.batch_size is None else self.batch_size, optimizer=optimizer, log=self.log,
            **({"resume": True} if resumed else {}) | self.options,
        )  # fmt: skip
        if resumed:
            self.monitor.load_state_dict(read_tensors(saved, None))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure what is due."""
        if self.monitor is not None:
            self.monitor(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save what later measurements depend on, beside the trainer's own state."""
        saved = self._file(args, state)
        if self.monitor is not None and state.is_world_process_zero and saved.parent.is_dir():
            write_whole(saved, packed(self.monitor.state_dict()))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the log."""
        if self.monitor is not None:
            self.monitor.close()

    def _file(self, args: Any, state: Any) -> Path:
        """In the folder of a checkpoint, with a name of its own for each of several callbacks."""
        key = zlib.crc32(repr(self.diagnostics).encode())
        return Path(args.output_dir, f"checkpoint-{state.global_step}", f"curvlab-{key:08x}.pt")


def _tracker(log: Any) -> Any:
    """A Trainer logs at the step that it knows itself, and adds to the dictionary that it is given."""
    return (lambda numbers, step: log.log(dict(numbers))) if isinstance(log, _trainer.Trainer) else log


def _collated(data: Any, collate: Any, batch_size: int) -> Any:
    """Examples as batches by the trainer's collator; once, because collators may draw random masks."""
    if isinstance(data, Mapping | tuple | DataLoader):
        return data
    with random_states():
        return list(DataLoader(data, batch_size=batch_size, collate_fn=collate))
