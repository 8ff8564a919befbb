"""What can come between a loss and its derivatives: hooks, recomputation, operations that cannot be differentiated twice."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from .objective import Objective

# What PyTorch says of an operation without a derivative, and what can stand in its place, by a part of its name.
_MISSING = re.compile(r"derivative for .* is not implemented|double backward|does not support backward")
_INSTEAD = {
    "scaled_dot_product": "F.scaled_dot_product_attention(q, k, v) without sdpa_kernel(...) around it, which then runs the "
    "math kernel while measuring",
    "flexattention": "F.scaled_dot_product_attention(q, k, v, attn_mask=mask)",
    "_cdist": "torch.linalg.vector_norm(a[..., :, None, :] - b[..., None, :, :], dim=-1)",
    "_pdist": "torch.linalg.vector_norm(x[i] - x[j], dim=-1) with i, j = torch.triu_indices(len(x), len(x), 1)",
    "embedding_bag": "F.embedding(indices, weight).mean(1)",
    "hardsigmoid": "F.relu6(x + 3) / 6",
    "margin_loss": "the margins with torch.gather and clamp(min=0)",
    "segment_reduce": "torch.zeros(...).index_add(0, segments, values)",
    "sparse_mm": "a product with the dense matrix",
}


def unhindered(L: Objective) -> tuple[list[Tensor | None], list[str]]:
    """Refuse what would compute derivatives at other parameters than those given.

    Costs a gradient of eight examples. Hooks are no part of the loss, so measuring does without them: those of parameters
    stay with the live ones, those of modules are set aside (`curvlab.guard`), and those that a forward pass puts on tensors
    are ignored (`without_tensor_hooks`).

    Returns:
        The gradient of the first examples by parameter, None where they do not depend on it; and the hooks that a
        forward pass puts on tensors, by name.

    Raises:
        ValueError: activation checkpointing, or another way round the parameters; the message names the parameter.
    """
    live = {id(p): name for name, p in zip(L.names, L.variables(), strict=True)}
    with L.measuring():
        params, chunk = L.leaves_at(), L.first(8)
        found: list[Tensor | None] = [None] * len(params)
        with _running(L) as running, _Forward(live) as forward:
            forward.where = lambda: _named(L, running[-1]) if running else "the loss"
            value = L.losses(params, chunk).sum()
        with _Backward(live) as backward:
            try:
                if value.requires_grad:
                    found = list(torch.autograd.grad(value, params, allow_unused=True))
            except RuntimeError as error:
                if "use_reentrant=True" not in str(error):
                    raise
                backward.read.append("part of the model")
    if forward.read:
        raise ValueError(
            f"the loss reads the tensor of parameter {forward.read[0]} itself, which is not at the point that is measured, "
            f"and would miss it in every derivative; read it from the module, as model.get_parameter({forward.read[0]!r})"
        )
    if backward.read:
        raise ValueError(
            f"{backward.read[0]} is computed again in the backward pass (activation checkpointing), at the live parameters "
            "instead of those measured; switch checkpointing off while measuring: model.gradient_checkpointing_disable() of "
            "transformers, or block(x) in place of checkpoint(block, x)"
        )
    on_tensors = [f"a tensor hook in the forward pass of {where}" for where in dict.fromkeys(forward.hooked)]
    return found, on_tensors


def hooks_on(L: Objective) -> list[str]:
    """The hooks on the variables and modules of an objective that act when autograd goes back, by name."""
    found = [f"a hook on parameter {n}" for n, p in zip(L.names, L.variables(), strict=True) if p._backward_hooks]
    hooked = (m for m in L.module.modules() if m._backward_hooks or m._backward_pre_hooks)
    return found + [f"a backward hook of {_named(L, module)}" for module in hooked]


def undifferentiable(L: Objective, error: RuntimeError) -> str | None:
    """What an error of autograd means: which module lacks a derivative, and what to write; None for other errors."""
    if type(error) not in (RuntimeError, NotImplementedError) or not _MISSING.search(str(error)):
        return None
    line = str(error).strip().splitlines()[0]
    where = _origin(L) if L.kept is None else "a part of the model"  # all ranks would have to look for it
    instead = next((text for part, text in _INSTEAD.items() if part in line.lower()), None)
    fix = f"write {instead}" if instead else "write it with operations that can be differentiated twice"
    if "support backward" not in line:  # the first derivative is there
        fix += ', or take products of H by engine="differences", which are approximate and need first derivatives only'
    return f"{where} cannot be differentiated twice by PyTorch ({line}); in its place {fix}"


@contextmanager
def without_tensor_hooks() -> Iterator[None]:
    """Hooks that a forward pass puts on tensors are not put."""
    with _Silence():
        yield


class _Forward(TorchFunctionMode):
    """Live parameters that operations read, and where hooks are put on tensors."""

    def __init__(self, live: dict[int, str]) -> None:
        super().__init__()
        self._live = live
        self.where: Callable[[], str] = lambda: "the loss"
        self.read: list[str] = []
        self.hooked: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.register_hook:
            self.hooked.append(self.where())
        elif isinstance(result, Tensor) and result.requires_grad:
            self.read += [self._live[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in self._live]
        return result


class _Backward(TorchDispatchMode):
    """Live parameters that operations read; `torch.autograd.grad` itself hides what it runs from a function mode."""

    def __init__(self, live: dict[int, str]) -> None:
        super().__init__()
        self._live = live
        self.read: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read += [self._live[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in self._live]
        return func(*args, **(kwargs or {}))


class _Silence(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook:
            return RemovableHandle(OrderedDict())
        return func(*args, **(kwargs or {}))


def _origin(L: Objective) -> str:
    """The innermost module whose outputs cannot be differentiated twice, by trying each of them."""
    # Any point will do where other ranks, which may have met no error, would have to take part in gathering the current one.
    params = L.leaves_at(torch.linspace(-0.1, 0.1, L.num_params) if L.sharded else None)
    found: list[str] = []

    def check(tensors: Any, module: nn.Module | None) -> None:
        values = [t.square().sum() for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.requires_grad]
        if not values or found:
            return
        try:
            first = L.grads(torch.stack(values).sum(), params, create_graph=True)
            L.grads(torch.stack([g.sum() for g in first]).sum(), params, retain_graph=True)
        except RuntimeError:
            found.append("the loss" if module is None else _named(L, module))

    with _running(L, check) as running:
        try:
            L.losses(params, L.first(2))
        except Exception:  # in the forward pass itself
            found.append(_named(L, running[-1]) if running else "the loss")
    return found[0] if found else "the model"


@contextmanager
def _running(
    L: Objective, check: Callable[[Any, nn.Module | None], None] = lambda tensors, module: None
) -> Iterator[list[nn.Module]]:
    """The modules that are called, the innermost last; `check` is called with what goes in and what comes out."""
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        check((args, kwargs), running[-1] if running else None)  # what went wrong before is the caller's
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        check(output, module)
        running.pop()

    handles: list[Any] = []
    for module in L.module.modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _named(L: Objective, module: nn.Module) -> str:
    name = next((name for name, m in L.model.named_modules() if m is module), None)
    if name is None:
        return "the loss"
    return f"{name} ({type(module).__name__})" if name else f"the model's own forward ({type(module).__name__})"
