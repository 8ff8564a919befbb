"""Parameters of which each rank holds a part: what `fully_shard` (FSDP2) and tensor parallelism make of a model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .memory import readable, require

if TYPE_CHECKING:
    from .objective import Objective

Sharded = Literal["gather", "keep"]
_log = logging.getLogger("curvlab")

# DTensors are known by their attributes, so that torch.distributed.tensor is not imported where nobody has it.


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor over several ranks."""
    return hasattr(tensor, "full_tensor") and tensor.device_mesh.size() > 1


def gathered(tensor: Tensor) -> Tensor:
    """All of a detached tensor: of a DTensor, for which all its ranks call this, the parts together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here."""
    return getattr(tensor, "_local_tensor", tensor)


def version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place: by what was done to it, or by FSDP to its part."""
    part = local(tensor)
    return 0 if part.is_inference() else part._version if part is tensor else tensor._version + part._version


def parameters(module: nn.Module, *, remove_duplicate: bool = True) -> dict[str, Tensor]:
    """Parameters by name. Where FSDP has put a gathered one in place for a while, the sharded one, which is trained."""
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=remove_duplicate))
    if "torch.distributed.fsdp" not in sys.modules:
        return named
    trained = {id(standing): sharded for m in module.modules() for standing, sharded in _standing_in(m)}
    return {name: trained.get(id(p), p) for name, p in named.items()}


def _standing_in(module: Any) -> Iterator[tuple[Tensor, Tensor]]:
    if not hasattr(module, "_get_fsdp_state"):
        return
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for p in group.fsdp_params:
            for name in ("_unsharded_param", "_sharded_post_forward_param"):
                if vars(p).get(name) is not None:
                    yield vars(p)[name], p.sharded_param


class Constants:
    """Sharded parameters that are no variables, as they were last gathered: ranks may not evaluate equally often."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, Tensor]] = {}

    def gather(self, params: dict[str, Tensor]) -> None:
        """Gather those of the parameters that are sharded, on all ranks."""
        self._held = {n: (version(p), gathered(p.detach())) for n, p in params.items() if is_sharded(p)}

    def of(self, name: str, p: Tensor) -> Tensor:
        """The parameter p as it was gathered, or itself if it is not sharded.

        Raises:
            RuntimeError: it has changed since.
        """
        if not is_sharded(p):
            return p.detach()
        then, found = self._held[name]
        if then != version(p):
            raise RuntimeError(
                f"the frozen parameter {name.removeprefix('model.')} is sharded and has changed since it was gathered; call "
                "L.params() on all ranks, which gathers it again"
            )
        return found


class Kept:
    """Vectors of which each rank holds the entries of its parts of the parameters.

    A model is evaluated at whole parameters, which are put together inside the graph, so that derivatives are those of the
    parts, summed over ranks. All ranks therefore evaluate equally often.

    Args:
        variables: the sharded parameters by name.
        ranks: that hold the parts, a `curvlab.ranks.Ranks`.

    Attributes:
        shapes, sizes: of the parts that are here.
        here: (p,) where they lie in the flat vector of all, on the CPU.
        size: P, of that vector.

    Raises:
        ValueError: a parameter that the ranks do not divide among them.
    """

    def __init__(self, variables: dict[str, Any], ranks: Any) -> None:
        count, rank = ranks.count, ranks.rank
        for name, p in variables.items():
            once = is_sharded(p) and p.device_mesh.ndim == 1 and p.placements[0].is_shard()
            if not once or p.device_mesh.size() != count or p.device_mesh.get_local_rank() != rank:
                raise ValueError(
                    f"sharded='keep' needs every variable divided among the {count} ranks of the group, once and in their "
                    f"order, and parameter {name} is not; pass sharded='gather', or leave it out by parameters="
                )
        like = list(variables.values())
        self.shapes, self.sizes = [local(p).shape for p in like], [local(p).numel() for p in like]
        lengths = [p.numel() for p in like]
        self.size, first = sum(lengths), 0
        here = []
        for p, length in zip(like, lengths, strict=True):
            here.append(_parts(torch.arange(first, first + length).view(p.shape), p)[rank].reshape(-1))
            first += length
        self.here = torch.cat(here)
        self._ranks, self._dims = ranks, [p.placements[0].dim for p in like]
        empty = [_parts(torch.empty(p.shape, device="meta"), p) for p in like]
        self._shapes = [[parts[r].shape for parts in empty] for r in range(count)]
        self._room = max(sum(shape.numel() for shape in shapes) for shapes in self._shapes)

    def whole(self, parts: list[Tensor]) -> list[Tensor]:
        """Parts as whole parameters, differentiable as often as one likes."""
        own = torch.cat([part.reshape(-1) for part in parts])
        rows = _Gathered.apply(torch.nn.functional.pad(own, (0, self._room - len(own))), self._ranks)
        divided = []
        for row, shapes in zip(rows, self._shapes, strict=True):
            sizes = [shape.numel() for shape in shapes]
            pieces = row[: sum(sizes)].split(sizes)
            divided.append([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])
        return [torch.cat(one, dim) for one, dim in zip(zip(*divided, strict=True), self._dims, strict=True)]


def _parts(whole: Tensor, like: Any) -> list[Tensor]:
    """What each rank would have of a tensor, were it divided as `like` is."""
    dim, count = like.placements[0].dim, like.device_mesh.size()
    parts = list(whole.chunk(count, dim))
    return parts + [whole.narrow(dim, 0, 0)] * (count - len(parts))


class _Gathered(torch.autograd.Function):
    """The rows (n,) of all ranks, (K, n), on each of them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Any) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(own[None], ranks.count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Summed.apply(grad, ctx.ranks), None


class _Summed(torch.autograd.Function):
    """Of the sums over ranks of (K, n) rows the one of this rank: the transpose of gathering."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Any) -> Tensor:
        ctx.ranks = ranks
        return ranks.scatter(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gathered.apply(grad, ctx.ranks), None


def require_gathered(L: Objective, what: str) -> None:
    """Refuse what needs whole vectors, where ranks keep parts of them.

    Raises:
        ValueError: they do.
    """
    if L.kept:
        raise ValueError(
            f"{what} need whole vectors on each rank, and with sharded='keep' each holds parts of them; pass "
            "sharded='gather' to Objective, if they fit. Values, gradients, products with the Hessian, eigsh, trace and "
            "sharpness work"
        )


def found_in(L: Objective, sharded: Sharded) -> bool:
    """Whether parameters of the model are sharded. They are gathered to be measured; a line of the log says what that takes.

    Raises:
        ValueError: another `sharded`, one process alone is to measure, or a buffer is sharded.
        MemoryError: all of them would not fit in the memory that is free.
    """
    if sharded not in ("gather", "keep"):
        raise ValueError(f"sharded is {sharded!r}; expected 'gather' or 'keep'")
    params: dict[str, Any] = parameters(L.model)
    parts = {name: p for name, p in params.items() if is_sharded(p)}
    buffers: dict[str, Any] = dict(L.model.named_buffers())
    for name, b in buffers.items():
        if is_sharded(b) and not all(place.is_replicate() for place in b.placements):
            raise ValueError(f"buffer {name} is sharded; expected buffers that every rank has whole, as FSDP leaves them")
    if not parts:
        return False
    name, first = next(iter(parts.items()))
    if L.ranks.count == 1:
        raise ValueError(
            f"parameter {name} is sharded over {first.device_mesh.size()} ranks, and one process alone would measure; pass "
            "group='world' to Objective, and let all ranks make the same calls"
        )
    size = sum(p.numel() for p in parts.values()) * L.dtype.itemsize
    what = f"gathering {len(parts)} sharded parameters, which every rank holds whole while it measures,"
    require(size, L.device, what, "measure a smaller model, or on devices with more memory")
    if L.ranks.rank == 0:
        _log.info("%s takes %s on each rank", what.removesuffix(","), readable(size))
    return True


def require_whole(L: Objective, what: str) -> None:
    """Refuse what works on the live parameters, where ranks hold parts of them.

    Raises:
        ValueError: they do.
    """
    if L.sharded:
        raise ValueError(
            f"{what} need every parameter whole on each rank, and parameter {L.names[0]} is sharded; train in a loop of "
            "your own, where FSDP steps the parts, and measure there with Monitor"
        )
