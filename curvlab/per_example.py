"""Per-example gradients without forming them: their squared norms, products g_i·q, and sums Σ c_i g_i."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .objective import Chunk, Objective

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


class ExampleGradients:
    """The N x P matrix of per-example gradients g_i = s_i ∇ℓ_i(w) at one point, known by what one asks of it.

    One forward and backward pass captures, for every linear and convolution layer, its inputs a_i and output gradients
    δ_i; g_i is their outer product, summed over positions, so that

        ‖g_i‖² = ‖a_i‖²‖δ_i‖²  (or a Gram product over positions),   g_i·q = δ_iᵀ Q a_i,   Σ c_i g_i = Σ c_i δ_i a_iᵀ

    cost about a matrix product a layer. The other parameters go by vmap, as do layers where the rule does not apply:
    used twice, tied, called with reshaped examples. Which is which is not guessed but checked: on first use a random
    combination Σ c_i g_i of five examples must equal the backward pass, parameter by parameter.

    Captures are kept while they fit in a quarter of the objective's `memory`; beyond that each request runs through the
    data again.

    Attributes:
        rules: how each parameter is treated, ``"layer"`` or ``"vmap"``, by name.

    Source: Goodfellow 2015 (arXiv 1510.01799) for linear layers; Rochette et al. 2019 (arXiv 1912.06015) for
        convolutions.
    """

    def __init__(self, objective: Objective, w: Tensor) -> None:
        objective.require_examples("per-example gradients")
        self.objective = L = objective
        self.w = w.detach().clone()
        self._layers = _layers_of(L)
        self.rules = {name: "layer" if name in self._layers else "vmap" for name in L.names}
        self._kept: dict[int, list[Any]] = {}
        self._kept_bytes = 0

    def squared_norms(self) -> Tensor:
        """‖g_i‖², (N,) float64."""
        return torch.cat([sum(part.squared_norms() for part in parts) for _, parts in self._captures()])

    def dot(self, V: Tensor) -> Tensor:
        """g_i·v_k, (N, K), for V of shape (P, K)."""
        return torch.cat([sum(part.dot(V) for part in parts) for _, parts in self._captures()])

    def combine(self, C: Tensor) -> Tensor:
        """Σ_i c_ik g_i, (P, K), for coefficients C of shape (N, K)."""
        total = torch.zeros(self.objective.num_params, C.shape[1], dtype=C.dtype, device=C.device)
        for chunk, parts in self._captures():
            for part in parts:
                part.add_combination(C[chunk.positions], total)
        return total

    def _captures(self) -> Any:
        L = self.objective
        for i, chunk in enumerate(L.chunks()):
            parts = self._kept.get(i)
            if parts is None:
                with L.measuring():
                    parts = _capture(L, self.w, chunk, self._layers)
                size = sum(part.nbytes() for part in parts)
                if self._kept_bytes + size <= L.memory / 4:
                    self._kept[i], self._kept_bytes = parts, self._kept_bytes + size
            yield chunk, parts


@dataclass
class _Outer:
    """A weight of shape (G·O, I) whose example gradients are Σ_t δ_t a_tᵀ in each of G groups, and its bias."""

    a: Tensor  # (B, G, T, I)
    delta: Tensor  # (B, G, T, O)
    weight: slice | None  # where in the flat vector
    bias: slice | None

    def nbytes(self) -> int:
        return self.a.nbytes + self.delta.nbytes

    def squared_norms(self) -> Tensor:
        a, delta = self.a, self.delta
        (_, _, T, I), O = a.shape, delta.shape[3]
        total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
        if self.weight is not None:
            if T == 1:
                total += (a.double().square().sum(3) * delta.double().square().sum(3)).sum((1, 2))
            else:  # positions interact: through the T x T Gram matrices, or through the gradients themselves
                gram = T * (I + O) < I * O
                for rows in _pieces(len(a), (T * T if gram else I * O) * a.shape[1]):
                    x, d = a[rows], delta[rows]
                    product = (x @ x.mT) * (d @ d.mT) if gram else (d.mT @ x).square()
                    total[rows] += product.sum((1, 2, 3), dtype=torch.float64)
        if self.bias is not None:
            total += delta.sum(2).double().square().sum((1, 2))
        return total

    def dot(self, V: Tensor) -> Tensor:
        (B, G, T, I), O, K = self.a.shape, self.delta.shape[3], V.shape[1]
        out = torch.zeros(B, K, dtype=V.dtype, device=V.device)
        if self.weight is not None:
            W = V[self.weight].view(G, O, I, K)
            for rows in _pieces(B, G * max(O * I if T > 1 else 0, O * K)):
                a, delta = self.a[rows], self.delta[rows]
                if T == 1 and G == 1:
                    image = a[:, 0, 0] @ W[0].permute(1, 0, 2).reshape(I, O * K)
                    out[rows] += (image.view(-1, O, K) * delta[:, 0, 0, :, None]).sum(1)
                else:
                    out[rows] += (delta.mT @ a).flatten(1) @ W.reshape(G * O * I, K)
        if self.bias is not None:
            out += self.delta.sum(2).flatten(1) @ V[self.bias]
        return out

    def add_combination(self, C: Tensor, total: Tensor) -> None:
        a, delta = self.a, self.delta
        for k, c in enumerate(C.T):
            scaled = delta * c[:, None, None, None]
            if self.weight is not None:
                x, d = a.transpose(0, 1).flatten(1, 2), scaled.transpose(0, 1).flatten(1, 2)  # (G, B T, .)
                total[self.weight, k] += (d.mT @ x).flatten()
            if self.bias is not None:
                total[self.bias, k] += scaled.sum((0, 2)).flatten()


@dataclass
class _Rows:
    """Example gradients of some parameters, formed: (B, p), with their places in the flat vector."""

    rows: Tensor
    places: Tensor

    def nbytes(self) -> int:
        return self.rows.nbytes

    def squared_norms(self) -> Tensor:
        return self.rows.double().square().sum(1)

    def dot(self, V: Tensor) -> Tensor:
        return self.rows @ V[self.places]

    def add_combination(self, C: Tensor, total: Tensor) -> None:
        total[self.places] += self.rows.T @ C


def _layers_of(L: Objective) -> dict[str, nn.Module]:
    """The parameters whose layer rule reproduces the backward pass, with their layers."""
    cached = getattr(L, "_layer_rules", None)
    if cached is not None:
        return cached
    owners: dict[str, nn.Module] = {}
    for prefix, module in L.model.named_modules():
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        plain |= isinstance(module, _CONVOLUTIONS) and type(module).forward in {c.forward for c in _CONVOLUTIONS}
        for name in ("weight", "bias") if plain else ():
            full = f"{prefix}.{name}" if prefix else name
            if full in L.names and not nn.utils.parametrize.is_parametrized(module):
                owners[full] = module
    with L.measuring():
        owners = _verified(L, owners)
    L._layer_rules = owners  # type: ignore[attr-defined]
    return owners


def _verified(L: Objective, owners: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Drop the layers for which a random combination of example gradients is not what the backward pass gives."""
    chunk, w = L.first(5), L.params()
    coefficients = torch.linspace(0.3, 1.7, chunk.size, device=L.device, dtype=L.dtype).flip(0)
    coefficients[::2] *= -1
    params = L.leaves_at(w)
    losses = L.losses(params, chunk)
    truth = L.grads((losses * coefficients).sum(), params)
    captured, called = _capture_layers(L, w, chunk, owners)
    places = _places(L)
    total = torch.zeros(L.num_params, 1, device=L.device, dtype=L.dtype)
    for part in captured:
        part.add_combination(coefficients[:, None], total)
    tolerance = math.sqrt(torch.finfo(L.dtype).eps)
    scale = max(float(g.abs().max()) for g in truth)
    good = {}
    for name, g in zip(L.names, truth, strict=True):
        module = owners.get(name)
        if module in called:
            error = (total[places[name], 0] - g.flatten()).abs().max()
            if bool(error <= tolerance * (scale + float(g.abs().max()))):
                good[name] = module
    return good


def _capture(L: Objective, w: Tensor, chunk: Chunk, owners: dict[str, nn.Module]) -> list[Any]:
    parts: list[Any] = list(_capture_layers(L, w, chunk, owners)[0])
    rest = [name for name in L.names if name not in owners]
    if rest:
        parts.append(_rest(L, w, chunk, rest))
    return parts


def _capture_layers(
    L: Objective, w: Tensor, chunk: Chunk, owners: dict[str, nn.Module]
) -> tuple[list[_Outer], set[nn.Module]]:
    """Inputs and output gradients of the layers in `owners`, and the layers that were called once, as expected."""
    inputs: dict[nn.Module, Tensor] = {}
    edges: dict[nn.Module, Any] = {}
    calls: dict[nn.Module, int] = {}

    def remember(module: nn.Module, args: tuple, output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if args and isinstance(output, Tensor) and output.requires_grad:
            inputs[module] = args[0].detach()
            # The edge, not the tensor: a later in-place activation would make the tensor stand for its own result.
            edges[module] = torch.autograd.graph.get_gradient_edge(output)

    modules = list(dict.fromkeys(owners.values()))
    handles = [module.register_forward_hook(remember) for module in modules]
    try:
        losses = L.losses(L.leaves_at(w), chunk)
    finally:
        for handle in handles:
            handle.remove()
    seen = [m for m in modules if calls.get(m) == 1 and m in edges and inputs[m].shape[0] == chunk.size]
    if not seen or not losses.requires_grad:
        return [], set()
    deltas = torch.autograd.grad(losses.sum(), [edges[m] for m in seen], allow_unused=True)
    places = _places(L)
    prefixes = {m: name for name, m in L.model.named_modules()}
    parts, used = [], set()
    for module, delta in zip(seen, deltas, strict=True):
        if delta is None or delta.shape[0] != chunk.size:
            continue
        prefix = f"{prefixes[module]}." if prefixes[module] else ""
        weight, bias = (places[prefix + n] if prefix + n in owners else None for n in ("weight", "bias"))
        parts.append(_Outer(*_as_outer(module, inputs[module], delta), weight, bias))
        used.add(module)
    return parts, used


def _as_outer(module: nn.Module, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients as (B, groups, positions, features)."""
    B = len(a)
    if isinstance(module, nn.Linear):
        return a.reshape(B, 1, -1, a.shape[-1]), delta.reshape(B, 1, -1, delta.shape[-1])
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    a = F.pad(a, module._reversed_padding_repeated_twice, mode=mode)
    one = isinstance(module, nn.Conv1d)
    lead = (1,) if one else ()
    patches = F.unfold(
        a[:, :, None] if one else a,
        (*lead, *module.kernel_size),
        dilation=(*lead, *module.dilation),
        stride=(*lead, *module.stride),
    )
    G, T = module.groups, patches.shape[-1]
    return patches.view(B, G, -1, T).mT, delta.reshape(B, G, -1, T).mT


def _rest(L: Objective, w: Tensor, chunk: Chunk, names: list[str]) -> _Rows:
    """Formed example gradients of the named parameters, by vmap, or by a loop where vmap cannot."""
    places = _places(L)
    where = torch.cat([torch.arange(places[n].start, places[n].stop) for n in names]).to(L.device)
    params = [p.detach() for p in L.leaves_at(w)]
    return _Rows(L.chunk_gradients(params, chunk, names), where)


def _places(L: Objective) -> dict[str, slice]:
    """Where each parameter lies in the flat vector."""
    ends = torch.cumsum(torch.tensor(L.sizes), 0).tolist()
    return {name: slice(end - size, end) for name, size, end in zip(L.names, L.sizes, ends, strict=True)}


def _pieces(count: int, numbers_each: int, limit: int = 2**24) -> list[slice]:
    """Ranges of examples whose temporaries stay below `limit` numbers."""
    step = max(1, limit // max(1, numbers_each))
    return [slice(lo, min(lo + step, count)) for lo in range(0, count, step)]
