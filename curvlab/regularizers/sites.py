"""Where and how micro-batches are evaluated: as in measuring, or as in training; and what such an evaluation needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import tree_map
from ..checks import COUPLING
from ..guard import exact_weight_norm, functional_call, random_states
from ..losses import BatchLoss
from ..objective import Chunk, Objective


class Measured:
    """The objective as every measurement sees it, at given parameters; to be used inside `L.measuring()`."""

    shares_outputs = False

    def __init__(self, L: Objective, params: list[Tensor]) -> None:
        self.L, self.params = L, params

    def place(self, chunk: Chunk) -> Chunk:
        return self.L.place(chunk)

    def losses(self, chunk: Chunk, params: list[Tensor] | None = None) -> Tensor:
        return self.L.losses(self.params if params is None else params, chunk)

    def outputs(self, chunk: Chunk) -> Any:
        return self.L.outputs(self.params, chunk)

    def untouched(self) -> Measured:
        return self


class Trained:
    """The model as it trains: its live parameters, in its own mode, precision and device.

    With `live`, the model itself runs, so that its buffers, such as the running statistics of BatchNorm, move as in
    training; otherwise it reads copies of them.
    """

    def __init__(self, L: Objective, *, live: bool = False) -> None:
        self.L, self.live, self.params = L, live, L.variables()
        self.shares_outputs = not isinstance(L.loss, BatchLoss)
        self._like = next(L.model.parameters())

    def place(self, chunk: Chunk) -> Chunk:
        def put(tensor: Tensor) -> Tensor:
            like = self._like
            return tensor.to(like.device, like.dtype) if tensor.is_floating_point() else tensor.to(like.device)

        weights = None if chunk.weights is None else put(chunk.weights)
        return replace(chunk, batch=tree_map(put, chunk.batch), weights=weights)

    def losses(self, chunk: Chunk, params: list[Tensor] | None = None) -> Tensor:
        losses = self._call(chunk.batch, params)
        return losses if chunk.weights is None else losses * chunk.weights

    def outputs(self, chunk: Chunk) -> Any:
        return self._call(chunk.batch, outputs_only=True)

    def untouched(self) -> Trained:
        return Trained(self.L)

    def _call(self, batch: Any, params: list[Tensor] | None = None, **options: Any) -> Any:
        evaluation = self.L._call
        if self.live and params is None:
            return evaluation(batch, **options)
        named = zip(self.L.names, self.params if params is None else params, strict=True)
        state = {f"model.{name}": p for name, p in named}
        state |= {name: buffer.clone() for name, buffer in evaluation.named_buffers()}
        return functional_call(evaluation, state, (batch,), options)


Site = Measured | Trained


@contextlib.contextmanager
def second_derivatives(model: nn.Module) -> Iterator[None]:
    """Kernels that can be differentiated twice, and right: of attention, recurrence and weight norm; nothing compiled."""
    modules = list(model.modules())
    cudnn = torch.backends.cudnn.enabled
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        stack.enter_context(exact_weight_norm(model))
        if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in modules):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.backends.cudnn.enabled = cudnn and not any(isinstance(m, nn.RNNBase) for m in modules)
            yield
        finally:
            torch.backends.cudnn.enabled = cudnn


class Statistics:
    """Says more than torch does where BatchNorm has a single value per channel.

    Raises:
        ValueError: naming the size of the micro-batch and what to choose instead.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            raise ValueError(
                f"a micro-batch of {self.size} example has no statistics for BatchNorm in training; choose a "
                "micro_batch_size of at least 2 that leaves no single example over"
            ) from error


def coupled(model: nn.Module) -> bool:
    """Whether examples of a micro-batch depend on each other now."""
    return any(isinstance(m, COUPLING) and (m.training or m.running_mean is None) for m in model.modules())


def random_state() -> tuple[Tensor, list[Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


@contextlib.contextmanager
def repeated(state: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """The random numbers that followed `state`, once more; the generators come back to where they are now."""
    with random_states():
        torch.set_rng_state(state[0])
        if state[1]:
            torch.cuda.set_rng_state_all(state[1])
        yield
