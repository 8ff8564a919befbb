"""Where in a forward pass things happened: which module called a Function of Python, or took a value out of the graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .objective import Objective

CUTS = ("detach", "detach_", "data", "item", "tolist", "numpy", "__float__")
_ONCE = once_differentiable(lambda ctx: None).__code__  # which all that it marks share


@dataclass(frozen=True)
class CustomFunction:
    """A `torch.autograd.Function` in the graph.

    Attributes:
        once: whether its backward pass is marked `@once_differentiable`.
    """

    name: str
    place: str
    once: bool

    def __str__(self) -> str:
        return f"{self.name} in {self.place}"


@dataclass(frozen=True)
class Origins:
    """The Functions of Python in a graph, and calls such as "detach in 0 (Scale)" that take values out of it."""

    functions: list[CustomFunction]
    cuts: list[str]


def origins(L: Objective, forward: Callable[[], Tensor]) -> Origins:
    """Run `forward`, a pass of the objective's module, and look where its result comes from."""
    with ExitStack() as stack:
        seen = _Seen(L.module, stack)
        stack.enter_context(seen)
        result = forward()
    seen.claim([result])
    return Origins(list(dict.fromkeys(seen.functions)), list(dict.fromkeys(seen.cuts)))


class _Seen(TorchFunctionMode):
    """Listens to the modules, so that nodes and calls can be given to the innermost one that runs."""

    def __init__(self, module: nn.Module, stack: ExitStack) -> None:
        super().__init__()
        self.functions: list[CustomFunction] = []
        self.cuts: list[str] = []
        self._running = ["the loss"]
        self._nodes: set[Any] = set()
        for name, part in module.named_modules():
            place = f"{name.removeprefix('model.')} ({type(part).__name__})"
            if part is not module:
                before = part.register_forward_pre_hook(self._enter(place), with_kwargs=True)
                after = part.register_forward_hook(self._leave)
                stack.callback(before.remove)
                stack.callback(after.remove)

    def claim(self, tree: Any) -> None:
        """Give all new nodes that lead to some tensors to the module that runs."""
        todo = [t.grad_fn for t in _tensors(tree)]
        while todo:
            node = todo.pop()
            if node is None or node in self._nodes:
                continue
            self._nodes.add(node)
            todo += [before for before, _ in node.next_functions]
            if isinstance(node, BackwardCFunction):
                function = node._forward_cls
                once = getattr(function.backward, "__code__", None) is _ONCE
                self.functions.append(CustomFunction(function.__name__, self._running[-1], once))

    def _enter(self, place: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.claim([args, kwargs])
            self._running.append(place)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.claim([output])
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        name = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
        if any(t.requires_grad for t in _tensors([args, kwargs])):
            if name in CUTS:
                self.cuts.append(f"{name} in {self._running[-1]}")
            elif not torch.is_grad_enabled() and any(t.is_floating_point() for t in _tensors(result)):
                self.cuts.append(f"no_grad in {self._running[-1]}")
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
