"""What the layers of a model were given in one forward pass, and how gradients of their outputs become example gradients."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Part, part, rule
from .linalg.probes import generator, normal
from .objective import Chunk, Objective


class Capture:
    """A context for one forward pass over a chunk: it listens to the layers that own the named parameters.

    Args:
        owners: layers by the names of their parameters, such as `layers_of` gives.

    Attributes:
        positions: of the chunk.
        nbytes: of what is kept of the layers' inputs.
        deltas: gradients of the chunk's summed loss at `edges`, where the pass that was listened to has computed them.
    """

    def __init__(self, L: Objective, chunk: Chunk, owners: dict[str, nn.Module]) -> None:
        self._L, self._count, self._owners = L, chunk.size, owners
        self.positions = chunk.positions
        self.deltas: list[Tensor | None] | None = None
        self._kept: dict[nn.Module, Tensor] = {}
        self._edges: dict[nn.Module, Any] = {}
        self._calls: dict[nn.Module, int] = {}
        self._handles: list[Any] = []
        self._output: Any = None
        self.nbytes = 0

    def __enter__(self) -> Capture:
        listened = dict.fromkeys(self._owners.values())
        self._handles = [module.register_forward_hook(self._remember) for module in listened]
        self._handles.append(self._L.model.register_forward_hook(self._keep_output))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def modules(self) -> list[nn.Module]:
        """The layers that were called once, with the examples first, in the order of their parameters."""
        return [m for m in dict.fromkeys(self._owners.values()) if self._calls.get(m) == 1 and m in self._edges]

    @property
    def edges(self) -> list[Any]:
        """Where the gradients of their outputs are, for `torch.autograd.grad`."""
        return [self._edges[m] for m in self.modules]

    def parts(self, deltas: list[Tensor | None]) -> tuple[list[Part], set[nn.Module | None]]:
        """Example gradients from the gradients at `edges`, and the layers that they are of."""
        places = places_of(self._L)
        parts: list[Part] = []
        used: set[nn.Module | None] = set()
        for module, delta in zip(self.modules, deltas, strict=True):
            if delta is not None and len(delta) == self._count:
                own = {name.rpartition(".")[2]: places[name] for name, m in self._owners.items() if m is module}
                parts.append(part(module, self._kept[module], delta, own))
                used.add(module)
        return parts, used

    def parts_of(self, values: Tensor, *, retain_graph: bool = False) -> tuple[list[Part], set[nn.Module | None]]:
        """The same for the sum of `values` that the forward pass led to."""
        if not self.modules or not values.requires_grad:
            return [], set()
        found = torch.autograd.grad(values.sum(), self.edges, allow_unused=True, retain_graph=retain_graph)
        return self.parts(list(found))

    def parts_along(self, u: Tensor) -> tuple[list[Part], set[nn.Module | None]]:
        """The same for Σ_i u_i·f(x_i), of the outputs f that the forward pass gave; its graph stays."""
        return self.parts_of(self._L.read_outputs(self._output) * u, retain_graph=True)

    def _remember(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._calls[module] = self._calls.get(module, 0) + 1
        keep = rule(module)
        if keep and args and isinstance(output, Tensor) and output.requires_grad and len(args[0]) == self._count:
            self._kept[module] = keep(module, args[0].detach())
            self.nbytes += self._kept[module].nbytes
            # The edge, not the tensor: a later in-place activation would make the tensor stand for its own result.
            self._edges[module] = torch.autograd.graph.get_gradient_edge(output)

    def _keep_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._output = output


def layers_of(L: Objective) -> dict[str, nn.Module]:
    """The parameters whose layer rule reproduces the backward pass, with their layers; found once per objective."""
    cached = getattr(L, "_layer_rules", None)
    if cached is None:
        owners = {
            f"{prefix}.{name}" if prefix else name: module
            for prefix, module in L.model.named_modules()
            if rule(module)
            for name, _ in module.named_parameters(recurse=False)
        }
        counts = Counter(id(p) for _, p in L.model.named_parameters(remove_duplicate=False))
        alone = {name for name, p in L.model.named_parameters() if counts[id(p)] == 1}  # tied ones have cross terms
        with L.measuring():
            cached = _verified(L, {name: m for name, m in owners.items() if name in L.names and name in alone})
        L._layer_rules = cached  # type: ignore[attr-defined]
    return cached


def _verified(L: Objective, owners: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Drop the layers for which a random combination of example gradients is not what the backward pass gives."""
    # Not at the current point, where a head of zeros, as many networks start with, would hide everything before it.
    chunk, w = L.first(5), L.params()
    w = w + (0.1 + w.abs().mean()) * normal(w.shape, w, generator=generator("layer rules"))
    coefficients = torch.linspace(1.7, 0.3, chunk.size, device=L.device, dtype=L.dtype)
    coefficients[::2] *= -1
    params = L.leaves_at(w)
    truth = L.grads((L.losses(params, chunk) * coefficients).sum(), params)
    with Capture(L, chunk, owners) as capture:
        losses = L.losses(L.leaves_at(w), chunk)
    parts, captured = capture.parts_of(losses)
    total = torch.zeros(L.num_params, 1, device=L.device, dtype=L.dtype)
    for p in parts:
        p.add_combination(coefficients[:, None], total)
    eps, largest = torch.finfo(L.dtype).eps, max(float(g.abs().max()) for g in truth)
    good: dict[str, nn.Module] = {}
    for (name, place), g in zip(places_of(L).items(), truth, strict=True):
        if owners.get(name) in captured:
            error = float((total[place, 0] - g.flatten()).abs().max())
            if error <= math.sqrt(eps) * float(g.abs().max()) + 1e3 * eps * largest:
                good[name] = owners[name]
    return good


def places_of(L: Objective) -> dict[str, slice]:
    """Where each parameter lies in the flat vector."""
    ends = torch.cumsum(torch.tensor(L.sizes), 0).tolist()
    return {name: slice(end - size, end) for name, size, end in zip(L.names, L.sizes, ends, strict=True)}
