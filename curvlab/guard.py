"""What a measurement may touch, and how all of it is put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

# Where matrix products may run in reduced precision (TF32 on a GPU, bfloat16 on a CPU: 8-10 bit mantissas).
_PRECISION: dict[str, tuple[Any, ...]] = {
    "cuda": (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn),  # type: ignore[attr-defined]
    "cpu": (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn),  # type: ignore[attr-defined]
}
_active: list[tuple[nn.Module, bool]] = []


@contextlib.contextmanager
def measuring(model: nn.Module, *, train_mode: bool = False, device: str = "cpu") -> Iterator[None]:
    """Run the body so that the model can be differentiated twice, and leave no trace.

    Inside: gradients are on, autocast, TF32 and inference mode are off, attention uses its math kernel (the only one
    with a second derivative), cuDNN's recurrent kernels (which have none) are off, compiled modules run eagerly, a
    `forward` that accelerate patched for mixed precision is the original one, and every module is in evaluation mode. With
    `train_mode`, modules keep their flags if the model is in training, so layers that the user froze stay frozen;
    otherwise all of them are put in training mode.

    Afterwards, also after an exception: train/eval flags and all other attributes of the modules, the random states of
    Python, numpy, torch and CUDA, and the backend flags are what they were. `.grad`, parameters and buffers are never
    written in the first place, because `Objective` evaluates on copies. Attributes are put back, not copied: what a forward
    pass appends to a list of the module stays there.
    """
    if _active and _active[-1][0] is model and _active[-1][1] == train_mode:  # already inside
        yield
        return
    flags = [(module, module.training) for module in model.modules()]
    # Some forward passes count their calls, or leave on the module what the training step reads after them: an auxiliary
    # loss, a hidden state.
    attributes = [(vars(module), dict(vars(module))) for module, _ in flags]
    marks = (
        "_orig_mod",
        "_compiled_call_impl",
        "_compiler_ctx",
    )  # torch.compile(module), module.compile(), Lightning's
    compiled = any(getattr(module, mark, None) is not None for module, _ in flags for mark in marks)
    recurrent = any(isinstance(module, nn.RNNBase) for module, _ in flags)
    patched = [state for state, _ in attributes if {"forward", "_original_forward"} <= state.keys()]
    _active.append((model, train_mode))
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(random_states())
            stack.enter_context(_backend_flags(recurrent, device))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device_type in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device_type, enabled=False))
            if compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if not (train_mode and model.training):
                for module, _ in flags:  # not model.train(), which some models override to do more
                    module.training = train_mode
            for state in patched:  # by accelerate, for mixed precision
                state["forward"] = state["_original_forward"]
            yield
    finally:
        _active.pop()
        for module, training in flags:
            module.training = training
        for state, before in attributes:
            for name in state.keys() - before.keys():
                del state[name]
            state.update(before)


def full_precision(model: nn.Module, device: str) -> bool:
    """Whether the model computes now, outside of a measurement, in the precision that it is measured in."""
    patched = any("_original_forward" in vars(module) for module in model.modules())
    return not (patched or torch.is_autocast_enabled(device) or _reduced(device))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has ended, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def random_states() -> Iterator[None]:
    """Put the random states of Python, numpy, torch and CUDA back afterwards."""
    before = get_random_states()
    try:
        yield
    finally:
        set_random_states(before)


def get_random_states() -> dict[str, Any]:
    """The random states of Python, numpy, torch and CUDA, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `get_random_states` gave."""
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def _reduced(device: str) -> list[tuple[Any, str]]:
    """Only what is reduced is touched: a flag that is set stops following the flags above it."""
    return [(b, b.fp32_precision) for b in _PRECISION.get(device, ()) if b.fp32_precision not in ("none", "ieee")]


def seed_random_layers(seed: int) -> None:
    """Seed what dropout draws from, inside `random_states`."""
    # torch.manual_seed would also leave a seed behind for GPUs that are not in use yet.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def _backend_flags(recurrent: bool, device: str) -> Iterator[None]:
    reduced = _reduced(device)
    fastpath, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    with contextlib.ExitStack() as stack:
        # The kernel selection is restored by its own context manager.
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        try:
            torch.backends.cudnn.enabled = cudnn and not recurrent
            torch.backends.mha.set_fastpath_enabled(False)
            for backend, _ in reduced:
                backend.fp32_precision = "ieee"
            yield
        finally:
            torch.backends.cudnn.enabled = cudnn
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for backend, value in reduced:
                backend.fp32_precision = value
