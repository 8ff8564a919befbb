"""Functions of tensors, captured once as a CUDA graph and replayed on other values: no launch of kernels one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2  # calls before the capture, in which libraries make their workspaces


class Replay:
    """A function of tensors whose results are overwritten by the next call.

    Args:
        function: of fixed shapes, which reads its arguments, and whatever else stays where it is, and waits for nothing.
        inputs: examples of its arguments.
        pool: of the graphs that share memory; what one of them returned may be overwritten when another is replayed, unless
            it is still referred to.

    Raises:
        RuntimeError: the function cannot be captured, such as one that reads a value back.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], pool: Any) -> None:
        self._inputs = [t.detach().clone() for t in inputs]
        self.outputs, self._replay = capture(lambda: function(*self._inputs), pool)

    def __call__(self, *inputs: Tensor) -> Any:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._replay()
        return self.outputs


def capture(function: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    """What a function returns, and what computes it anew in place."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = function()
    graph.replay()
    return outputs, graph.replay


def new_pool(device: torch.device) -> Any:
    """A pool of memory for graphs; None where there are none."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
