"""TensorBoard: an adapter from the monitor's numbers to a SummaryWriter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def tracker(writer: Any) -> Callable[..., None]:
    """The numbers as scalars of a `SummaryWriter` of torch or of tensorboardX, for ``Monitor(..., log=tracker(writer))``.

    TensorBoard keeps float32, 7 digits: the run folder of the monitor is the record.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> writer = SummaryWriter(tempfile.mkdtemp())
        >>> log = tracker(writer)
        >>> log({"curvlab/sharpness": 2.5}, step=0)
        >>> writer.close()
    """

    def log(numbers: Mapping[str, float], step: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return log
