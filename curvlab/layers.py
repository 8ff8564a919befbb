"""How the gradient of one layer's parameters splits into examples, without forming what can stay a product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Part(Protocol):
    """Example gradients of some parameters, for the B examples of a chunk; places are in the flat vector of length P."""

    @property
    def key(self) -> tuple:
        """Which parameters they are: equal for the same part of another chunk."""
        ...

    def nbytes(self) -> int: ...

    def squared_norms(self) -> Tensor:
        """(B,) float64."""
        ...

    def dot(self, V: Tensor) -> Tensor:
        """Products with the columns of V (P, K): (B, K)."""
        ...

    def add_combination(self, C: Tensor, total: Tensor) -> None:
        """Add Σ_i c_ik g_i for C (B, K) to `total` (P, K), at this part's places."""

    def gram(self, other: Part) -> Tensor:
        """Inner products with the same part of another chunk, (B, B')."""
        ...


@dataclass
class Outer:
    """A weight of shape (G·O, I) whose example gradients are Σ_t δ_t a_tᵀ in each of G groups, and its bias."""

    a: Tensor  # (B, G, T, I)
    delta: Tensor  # (B, G, T, O)
    weight: slice | None
    bias: slice | None

    @property
    def key(self) -> tuple:
        return (str(self.weight), str(self.bias))

    def nbytes(self) -> int:
        return self.a.nbytes + self.delta.nbytes

    def squared_norms(self) -> Tensor:
        a, delta = self.a, self.delta
        (_, G, T, I), O = a.shape, delta.shape[3]
        total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
        if self.weight is not None:
            if T == 1:
                total += (_squares(a, 3) * _squares(delta, 3)).sum((1, 2))
            else:  # positions interact: through the T x T Gram matrices, or through the gradients themselves
                gram = T * (I + O) < I * O
                for rows in pieces(len(a), (T * T if gram else I * O) * G):
                    x, d = a[rows], delta[rows]
                    if gram:
                        total[rows] += torch.linalg.vecdot((x @ x.mT).flatten(1), (d @ d.mT).flatten(1))
                    else:
                        total[rows] += _squares((d.mT @ x).flatten(1), 1)
        if self.bias is not None:
            total += _squares(delta.sum(2).flatten(1), 1)
        return total

    def dot(self, V: Tensor) -> Tensor:
        (B, G, T, I), O, K = self.a.shape, self.delta.shape[3], V.shape[1]
        out = torch.zeros(B, K, dtype=V.dtype, device=V.device)
        if self.weight is not None:
            W = V[self.weight].T.contiguous()  # (K, G O I)
            for rows in pieces(B, G * max(O * I if T > 1 else 0, O * K)):
                a, delta = self.a[rows], self.delta[rows]
                if T == 1 and G == 1:
                    image = (a[:, 0, 0] @ W.view(K * O, I).T).view(-1, K, O)
                    out[rows] += (image @ delta[:, 0, 0, :, None])[:, :, 0]
                else:
                    out[rows] += (delta.mT @ a).flatten(1) @ W.T
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

    def gram(self, other: Part) -> Tensor:
        assert isinstance(other, Outer)
        out = torch.zeros(len(self.a), len(other.a), dtype=self.a.dtype, device=self.a.device)
        if self.weight is not None and self.a.shape[2] == 1:
            for g in range(self.a.shape[1]):
                left, right = (self.a[:, g, 0], self.delta[:, g, 0]), (other.a[:, g, 0], other.delta[:, g, 0])
                out += (left[0] @ right[0].T) * (left[1] @ right[1].T)
        elif self.weight is not None:
            size = self.a.shape[1] * self.a.shape[3] * self.delta.shape[3]
            for mine in pieces(len(self.a), size):
                rows = (self.delta[mine].mT @ self.a[mine]).flatten(1)
                for theirs in pieces(len(other.a), size):
                    out[mine, theirs] += rows @ (other.delta[theirs].mT @ other.a[theirs]).flatten(1).T
        if self.bias is not None:
            out += self.delta.sum(2).flatten(1) @ other.delta.sum(2).flatten(1).T
        return out


@dataclass
class Lookup:
    """An embedding table (V, D) whose example gradients add δ_t to the row of token t."""

    tokens: Tensor  # (B, T)
    delta: Tensor  # (B, T, D)
    weight: slice

    @property
    def key(self) -> tuple:
        return (str(self.weight),)

    def nbytes(self) -> int:
        return self.tokens.nbytes + self.delta.nbytes

    def squared_norms(self) -> Tensor:
        total = torch.zeros(len(self.tokens), dtype=torch.float64, device=self.delta.device)
        T = self.tokens.shape[1]
        for rows in pieces(len(total), T * T):
            tokens, delta = self.tokens[rows], self.delta[rows].double()
            same = tokens[:, :, None] == tokens[:, None, :]
            total[rows] = ((delta @ delta.mT) * same).sum((1, 2))
        return total

    def dot(self, V: Tensor) -> Tensor:
        D = self.delta.shape[2]
        tables = V[self.weight].view(-1, D, V.shape[1])
        return torch.stack([(tables[self.tokens, :, k] * self.delta).sum((1, 2)) for k in range(V.shape[1])], 1)

    def add_combination(self, C: Tensor, total: Tensor) -> None:
        D = self.delta.shape[2]
        for k, c in enumerate(C.T):
            rows = (self.delta * c[:, None, None]).reshape(-1, D)
            total[self.weight, k] += torch.zeros(
                (self.weight.stop - self.weight.start) // D, D, dtype=rows.dtype, device=rows.device
            ).index_add_(0, self.tokens.flatten(), rows).flatten()  # fmt: skip

    def gram(self, other: Part) -> Tensor:
        assert isinstance(other, Lookup)
        out = torch.zeros(len(self.tokens), len(other.tokens), dtype=self.delta.dtype, device=self.delta.device)
        for i, (tokens, delta) in enumerate(zip(self.tokens, self.delta, strict=True)):
            same = tokens[None, :, None] == other.tokens[:, None, :]  # (B', T, T')
            out[i] = ((delta @ other.delta.mT) * same).sum((1, 2))
        return out


@dataclass
class Rows:
    """Example gradients that were formed, (B, p), with their places in the flat vector."""

    rows: Tensor
    places: Tensor

    @property
    def key(self) -> tuple:
        return (len(self.places), int(self.places.sum()))

    def nbytes(self) -> int:
        return self.rows.nbytes

    def squared_norms(self) -> Tensor:
        return _squares(self.rows, 1)

    def dot(self, V: Tensor) -> Tensor:
        return self.rows @ V[self.places]

    def add_combination(self, C: Tensor, total: Tensor) -> None:
        total[self.places] += self.rows.T @ C

    def gram(self, other: Part) -> Tensor:
        assert isinstance(other, Rows)
        return self.rows @ other.rows.T


def rule(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """What to keep of the input of a layer that has a rule here, as (module, input) -> tensor; None for other layers.

    A subclass with a forward of its own, a parametrized layer, and an embedding that scales by frequency have none.
    """
    if nn.utils.parametrize.is_parametrized(module) or getattr(module, "scale_grad_by_freq", False):
        return None
    return next((keep for kind, keep in _KEEP.items() if type(module).forward is kind.forward), None)


def part(module: nn.Module, kept: Tensor, delta: Tensor, places: dict[str, slice]) -> Part:
    """The example gradients of a layer from what was kept of its input and the gradient of its output.

    `places` are those of its trainable parameters, by their name in the layer.
    """
    B, weight, bias = len(delta), places.get("weight"), places.get("bias")
    if isinstance(module, nn.Embedding):
        assert weight is not None
        if module.padding_idx is not None:
            delta = delta * (kept != module.padding_idx)[..., None]
        return Lookup(kept.reshape(B, -1), delta.reshape(B, -1, delta.shape[-1]), weight)
    if isinstance(module, nn.Linear):
        return Outer(kept.reshape(B, 1, -1, kept.shape[-1]), delta.reshape(B, 1, -1, delta.shape[-1]), weight, bias)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        G, T = module.groups, kept.shape[-1]
        return Outer(kept.view(B, G, -1, T).mT, delta.reshape(B, G, -1, T).mT, weight, bias)
    # normalization: y = weight · x̂ + bias, elementwise over the normalized or channel dimensions
    if isinstance(module, nn.LayerNorm):
        shape = (B, -1, weight.stop - weight.start if weight else module.weight.numel())
        product, plain = (kept * delta).reshape(shape).sum(1), delta.reshape(shape).sum(1)
    else:
        product, plain = ((t.reshape(B, t.shape[1], -1)).sum(2) for t in (kept * delta, delta))
    chosen = [(rows, p) for rows, p in ((product, weight), (plain, bias)) if p is not None]
    where = torch.cat([torch.arange(p.start, p.stop) for _, p in chosen]).to(delta.device)
    return Rows(torch.cat([rows for rows, _ in chosen], 1), where)


def _squares(x: Tensor, dim: int) -> Tensor:
    """Sums of squares, as squared norms: four to ten times as fast as sums in float64, to a few roundings."""
    return torch.linalg.vector_norm(x, dim=dim).double().square()


def pieces(count: int, numbers_each: int, limit: int = 2**24) -> list[slice]:
    """Ranges of examples whose temporaries stay below `limit` numbers."""
    step = max(1, limit // max(1, numbers_each))
    return [slice(lo, min(lo + step, count)) for lo in range(0, count, step)]


def _as_is(module: nn.Module, a: Tensor) -> Tensor:
    return a


def _unfolded(module: nn.Module, a: Tensor) -> Tensor:
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    a = F.pad(a, module._reversed_padding_repeated_twice, mode=mode)
    one = isinstance(module, nn.Conv1d)
    lead = (1,) if one else ()
    size, dilation, stride = ((*lead, *x) for x in (module.kernel_size, module.dilation, module.stride))
    return F.unfold(a[:, :, None] if one else a, size, dilation=dilation, stride=stride)


def _layer_normalized(module: nn.Module, a: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    return F.layer_norm(a, module.normalized_shape, None, None, module.eps)


def _group_normalized(module: nn.Module, a: Tensor) -> Tensor:
    assert isinstance(module, nn.GroupNorm)
    return F.group_norm(a, module.num_groups, None, None, module.eps)


def _batch_normalized(module: nn.Module, a: Tensor) -> Tensor:
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    return F.batch_norm(a, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)


_KEEP: dict[type[nn.Module], Callable[[nn.Module, Tensor], Tensor]] = {
    nn.Linear: _as_is,
    nn.Conv1d: _unfolded,
    nn.Conv2d: _unfolded,
    nn.Embedding: _as_is,
    nn.LayerNorm: _layer_normalized,
    nn.GroupNorm: _group_normalized,
    nn.BatchNorm2d: _batch_normalized,  # BatchNorm1d and 3d share its forward
}
