"""What a measurement may touch, and how all of it is put back."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Where matrix products may run in reduced precision (TF32 on a GPU, bfloat16 on a CPU: 8-10 bit mantissas).
_PRECISION: dict[str, tuple[Any, ...]] = {
    "cuda": (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn),  # type: ignore[attr-defined]
    "cpu": (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn),  # type: ignore[attr-defined]
}
# What torch says on a CPU; the others are oneDNN without room for a kernel or its scratch, not one that it lacks.
_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "could not create a primitive\n",
    "could not execute a primitive\n",
)
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_lock = threading.RLock()  # backend flags, random states and the model are one for all threads
_active: list[tuple[nn.Module, bool]] = []
_numpy_last: list[Any] = [b"", ()]  # words of numpy's generator and its state, when that was read last


@contextlib.contextmanager
def measuring(model: nn.Module, *, train_mode: bool = False, device: str = "cpu") -> Iterator[None]:
    """Run the body so that the model can be differentiated twice, and leave no trace.

    Inside: gradients are on, autocast, TF32 and inference mode are off, attention uses its math kernel (the only one
    with a second derivative), weight normalization is not torch's (whose second derivative is wrong), the recurrent
    kernels of cuDNN and oneDNN (which have none, or no forward mode) are off, what was compiled runs eagerly, a `forward`
    that accelerate patched for mixed precision is the original one, backward hooks of modules are set aside (they change
    gradients, and not the loss), as are hooks of torch.distributed (FSDP, tensor parallelism), no parametrization is cached
    (it would be that of other parameters), and every module is in evaluation mode. With `train_mode`, modules keep their
    flags if the model is in training, so layers that the user froze stay frozen; otherwise all of them are put in training
    mode.

    Afterwards, also after an exception: train/eval flags, the random states of Python, numpy, torch and CUDA, the backend
    flags, and what a forward pass left in the modules' attributes (counters, kept outputs, what it appended to a list) are
    what they were. `.grad`, parameters and buffers are never written in the first place, because `Objective` evaluates on
    copies.

    One thread measures at a time. Another one that calls the model, or asks for its `state_dict`, waits, because the
    module holds the measured point in place of its parameters meanwhile; one that reads ``module.weight`` or
    `named_parameters` does not wait. While another thread uses those, measure a copy of the model.
    """
    with _lock:
        if _active and _active[-1][0] is model and _active[-1][1] == train_mode:  # already inside
            yield
        else:
            with _measuring(model, train_mode, device):
                yield


@contextlib.contextmanager
def _measuring(model: nn.Module, train_mode: bool, device: str) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    # Some forward passes count their calls, or leave on the module what the training step reads after them: an auxiliary
    # loss, a hidden state.
    attributes = [(vars(module), dict(vars(module)), _contents(vars(module))) for module, _ in flags]
    recurrent = any(isinstance(module, nn.RNNBase) for module, _ in flags)
    patched = [state for state, *_ in attributes if {"forward", "_original_forward"} <= state.keys()]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
    _active.append((model, train_mode))
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_others_wait([module for module, _ in flags]))
            stack.enter_context(random_states())
            stack.enter_context(_backend_flags(recurrent, device))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device_type in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device_type, enabled=False))
            stack.enter_context(exact_weight_norm(model))
            if "torch._dynamo" in sys.modules:  # something may be compiled: a module, its forward, a function inside
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if not (train_mode and model.training):
                for module, training in flags:  # not model.train(), which some models override to do more
                    if training != train_mode:
                        module.training = train_mode
            for state in patched:  # by accelerate, for mixed precision
                state["forward"] = state["_original_forward"]
            for state, *_ in attributes:
                state.update((key, OrderedDict()) for key in _BACKWARD_HOOKS if state[key])
                if distributed:
                    _set_aside_distribution(state)
            yield
    finally:
        _active.pop()
        parametrize._cache_enabled = cached
        for state, before, contents in attributes:
            for name in state.keys() - before.keys():
                del state[name]
            state.update(before)
            for name, items in contents.items():
                state[name].clear()
                (state[name].extend if isinstance(items, list) else state[name].update)(items)
        for module, training in flags:
            if module.training != training:  # of a module of TorchScript, whose flag is no attribute
                module.training = training


def _set_aside_distribution(state: dict[str, Any]) -> None:
    """Take out of a module's attributes what torch.distributed lets its calls do: hooks that gather, cast, or distribute,
    and methods that run such hooks (`register_fsdp_forward_method`)."""

    def distributes(function: Any) -> bool:
        return getattr(function, "__globals__", {}).get("__name__", "").startswith("torch.distributed.")

    for key in _FORWARD_HOOKS:
        if any(map(distributes, state[key].values())):
            state[key] = OrderedDict((k, hook) for k, hook in state[key].items() if not distributes(hook))
    state.update((k, f.__wrapped__) for k, f in list(state.items()) if distributes(f) and hasattr(f, "__wrapped__"))


def functional_call(module: nn.Module, state: dict[str, Tensor], args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
    """`torch.func.functional_call`, of a module that may be registered under several names.

    torch's own puts the value that it was given back into such a module, for good, instead of its parameter (it swaps each
    of the names and undoes that in the same order). Here each place that holds a tensor is swapped once.
    """
    places = {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, part in module.named_modules()
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    }
    values = {id(places[name]): value for name, value in state.items() if name in places}
    own = {name: values[id(tensor)] for name, tensor in places.items() if id(tensor) in values}
    return torch.func.functional_call(module, own, args, kwargs, tie_weights=False)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextlib.contextmanager
def exact_weight_norm(model: nn.Module) -> Iterator[None]:
    """Weight normalization by operations with a second derivative.

    That of torch's own kernel is silently wrong: it takes the norms for constants (off by a third of the Hessian's size).
    """
    names = {type(hook).__name__ for m in model.modules() for hook in (m, *m._forward_pre_hooks.values())}
    if not names & {"_WeightNorm", "WeightNorm"}:
        yield
        return
    users: list[Any] = [torch, sys.modules["torch.nn.utils.weight_norm"]]
    before = [user._weight_norm for user in users]
    try:
        for user in users:
            user._weight_norm = _weight_norm
        yield
    finally:
        for user, own in zip(users, before, strict=True):
            user._weight_norm = own


def full_precision(model: nn.Module, device: str) -> bool:
    """Whether the model computes now, outside of a measurement, in the precision that it is measured in."""
    patched = any("_original_forward" in vars(module) for module in model.modules())
    return not (patched or torch.is_autocast_enabled(device) or _reduced(device))


@contextlib.contextmanager
def _others_wait(modules: list[nn.Module]) -> Iterator[None]:
    """Let other threads that call a module, or save it, wait until the measurement is over."""
    measuring_thread = threading.get_ident()

    def wait(module: nn.Module, *_: Any) -> None:
        # Threads that were not started in Python are autograd's own, for which the measuring thread waits.
        mine = threading.get_ident() == measuring_thread
        if not mine and module in known and not isinstance(threading.current_thread(), threading._DummyThread):
            with _lock:
                pass

    if threading.active_count() == 1:
        yield
        return
    known = set(modules)  # and not the replicas that a DataParallel inside the model runs in threads of its own
    handles = [module.register_forward_pre_hook(wait, prepend=True) for module in modules]
    handles += [module.register_state_dict_pre_hook(wait) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has ended, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in f"{error}\n" for sign in _NO_MEMORY)
    )


def _contents(state: dict[str, Any]) -> dict[str, Any]:
    """Copies of the public lists, dicts and sets among a module's attributes."""
    return {
        name: copy.copy(value)
        for name, value in state.items()
        if type(value) in (list, dict, set) and not name.startswith("_")
    }


@contextlib.contextmanager
def random_states() -> Iterator[None]:
    """Put the random states of Python, numpy, torch and CUDA back afterwards."""
    before, words = get_random_states(), _numpy_words()
    try:
        yield
    finally:
        set_random_states(before, numpy=words != _numpy_words() or _keeps_a_normal(before["numpy"]))


def _numpy_words() -> bytes:
    """The words of numpy's global generator and its place among them, read where they are, in 1 µs.

    Raises:
        TypeError: it is not numpy's own, the Mersenne twister.
    """
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if not isinstance(generator, np.random.MT19937):
        raise TypeError(
            f"numpy's global generator is a {type(generator).__name__}, whose state is not put back; take numpy's own, "
            "np.random.set_bit_generator(np.random.MT19937(seed)), and the other one by itself: "
            f"np.random.Generator(np.random.{type(generator).__name__}(seed))"
        )
    return ctypes.string_at(generator.ctypes.state_address, 4 * 624 + 4)


def _keeps_a_normal(state: Any) -> bool:
    """Whether numpy has drawn two normal numbers and given one: its next one changes no word."""
    return bool(state[3])


def _numpy_state() -> Any:
    """`np.random.get_state()`, which takes 60 µs, called only where numbers may have been drawn since."""
    words = _numpy_words()
    if words != _numpy_last[0] or _keeps_a_normal(_numpy_last[1]):
        _numpy_last[:] = words, np.random.get_state()
    return _numpy_last[1]


def get_random_states() -> dict[str, Any]:
    """The random states of Python, numpy, torch and CUDA, as tensors and plain values."""
    kind, keys, *rest = _numpy_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any], *, numpy: bool = True) -> None:
    """Put back what `get_random_states` gave; that of `numpy` need not be where it has not changed."""
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    if numpy:
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def _reduced(device: str) -> list[tuple[Any, str]]:
    """Only what is reduced is touched: a flag that is set stops following the flags above it."""
    return [(b, b.fp32_precision) for b in _PRECISION.get(device, ()) if b.fp32_precision not in ("none", "ieee")]


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, inside `random_states`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also leave a seed behind for GPUs that are not in use yet.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def same_random_states(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results of `get_random_states` are the same."""
    tensors = [[s["torch"], s["numpy"][1], *s["cuda"]] for s in (a, b)]
    plain = [(s["python"], s["numpy"][2:]) for s in (a, b)]
    return plain[0] == plain[1] and len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))


@contextlib.contextmanager
def _backend_flags(recurrent: bool, device: str) -> Iterator[None]:
    reduced = _reduced(device)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    libraries: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn) if recurrent else ()
    kernels = [(library, library.enabled) for library in libraries]
    with contextlib.ExitStack() as stack:
        # The kernel selection is restored by its own context manager.
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        try:
            for library, _ in kernels:
                library.enabled = False
            torch.backends.mha.set_fastpath_enabled(False)
            for backend, _ in reduced:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for library, enabled in kernels:
                library.enabled = enabled
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for backend, value in reduced:
                backend.fp32_precision = value
