"""A function that is linear in some of its inputs, recorded once as a graph of operations and split in two: what does not
depend on those inputs, which runs once at each point, and what does, which runs once for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

Function = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]
_SAME = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)


class NotTraceable(RuntimeError):
    """Why a function cannot be recorded."""


@dataclass(frozen=True)
class Linearized:
    """A recorded function (inputs, vectors) -> (values, products) whose products are linear in the vectors.

    Nothing of the inputs' values is in the recording: it is good for any inputs of the same shapes. Both parts do what the
    function did, operation by operation, so that their results have the same bits.

    Attributes:
        first: inputs -> (values, what the second part needs).
        second: (what it needs, vectors) -> products.
        nbytes: of what it needs, beside the inputs.
    """

    first: Callable[..., Any]
    second: Callable[..., Any]
    nbytes: int

    def compiled(self) -> Linearized:
        """Both parts through `torch.compile`: faster, after 10-90 s of compiling each, and equal up to rounding."""
        first, second = (torch.compile(part, dynamic=False) for part in (self.first, self.second))
        return replace(self, first=_as_compiled(first), second=_as_compiled(second))


def _as_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Not eagerly, as everything else runs while measuring."""

    def call(*inputs: Tensor) -> Any:
        with torch.compiler.set_stance("default"):
            return function(*inputs)

    return call


def linearize(function: Function, inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> Linearized:
    """Record a function on tensors of the given shapes, without computing anything.

    The function may differentiate inside; what it records are the operations that autograd runs.

    Raises:
        NotTraceable: what the function does depends on values, an operation cannot be recorded, or it overwrites its
            inputs; the message has the reason.
    """
    try:
        recorded = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(list(inputs), list(vectors))
    except Exception as error:  # whatever a model's forward may raise under tracing
        raise NotTraceable(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    graph = recorded.graph
    for node in list(graph.nodes):
        if node.target in _SAME:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    (end,) = (node for node in graph.nodes if node.op == "output")
    given = [node for node in graph.nodes if node.op == "placeholder"]
    varying = set(given[len(inputs) :])
    for node in graph.nodes:
        if node is not end and not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    _refuse_overwriting(graph, set(given), varying)
    results = list(end.args[0])
    values, products = results[: len(results) - len(vectors)], results[len(results) - len(vectors) :]
    needed = [n for n in graph.nodes if n not in varying and n is not end and not varying.isdisjoint(n.users)]
    needed += [n for n in dict.fromkeys(products) if n not in varying and n not in needed]  # products that are constant
    inside = [n for n in graph.nodes if n not in varying and n is not end]
    first = _part(recorded, given[: len(inputs)], inside, (values, needed))
    second = _part(recorded, [*needed, *given[len(inputs) :]], [n for n in graph.nodes if n in varying], products)
    own = {key: size for key, size in _storages(needed).items() if key not in _storages(given)}
    return Linearized(first, second, sum(own.values()))


def _part(whole: fx.GraphModule, inputs: list[fx.Node], nodes: list[fx.Node], results: Any) -> fx.GraphModule:
    """Some nodes of a graph, in their order, as a function of others; what it does not need any more is freed."""
    graph, copies = fx.Graph(), {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.node.map_arg(results, copies.__getitem__))
    graph.eliminate_dead_code()
    return fx.GraphModule(whole, graph)


def _refuse_overwriting(graph: fx.Graph, given: set[fx.Node], varying: set[fx.Node]) -> None:
    """In-place operations may overwrite what the same part has made, and nothing that is used again."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        written = node.args[0]
        while isinstance(written, fx.Node) and getattr(written.target, "is_view", False):
            written = written.args[0]
        if written in given or (node in varying and written not in varying):
            raise NotTraceable(f"{node.target} overwrites what later products need")


def _storages(nodes: Sequence[fx.Node]) -> dict[int, int]:
    """Bytes of the storages that the values of nodes lie in; views share them."""
    storages = (node.meta["val"].untyped_storage() for node in nodes)
    return {storage._cdata: storage.nbytes() for storage in storages}
