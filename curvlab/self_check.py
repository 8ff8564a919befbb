"""Whether Hessian-vector products are derivatives of the gradient, and the gradient that of the loss: one central difference
of each along a random direction, in float64 on a few examples. It finds what PyTorch differentiates wrongly in silence."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .batches import tree_map
from .gradient_graph import DIFFERENCE_STEPS, GradientAlone, GradientGraph, jvp_of_gradient, without_padding
from .guard import out_of_memory
from .linalg.probes import generator, normal
from .objective import Chunk, Objective
from .origins import Origins, origins

EXAMPLES, STEP, TOLERANCE = 8, 1e-6, 1e-4
DIRECTIONS = 3  # a kink beside the point spoils one of them
LENGTHS = (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3)  # of steps, where there is no float64
_ROUNDING = 100 * torch.finfo(torch.float64).eps / STEP  # of a central difference, relative to what is subtracted
_WAY_OUT = ', or pass engine="differences", whose products are approximate and need first derivatives only'
_log = logging.getLogger("curvlab")


def check_products(
    L: Objective, w: Tensor, *, engine: str = "graph", constants: dict[str, Tensor] | None = None
) -> None:
    """Check the Hessian-vector products of an objective at w, where its `check` asks for it; `L.checked` has the result.

    Costs a product and two gradients of at most 8 examples. They are evaluated as all else is, on copies of parameters and
    buffers, here in float64, where relative errors are 1e-8 even for wide relu networks, and 0.1-1 for what is wrong. Where
    float64 is impossible, second differences of the loss may confirm the products; otherwise they are 'unchecked'.
    Of products that are differences of the gradient themselves, only the gradient is checked, against the loss, and the
    result is `L.outcomes["gradient"]`.

    Args:
        engine: of the products.
        constants: what the model reads beside the variables at w, as `Objective.constants` gave it.

    Raises:
        ValueError: products that are no derivatives of the gradient, naming the Function, its module, and the fix.
    """
    if L.kept:
        L.outcomes["products"] = "unchecked: ranks keep parts of the parameters; check a smaller model, or sharded='gather'"
        return
    what = checked_of(engine)
    before = L.outcomes.get(what)
    if L.check == "never" or (L.check == "first" and before):
        return
    with L.measuring():
        found = _verdict(L, w, engine, L.constants() if constants is None else constants)
    if found.startswith("unchecked") and found != before:
        _log.warning("Hessian-vector products are %s", found)
    if found:
        L.outcomes[what] = found


def checked_of(engine: str) -> str:
    """What of an objective is checked for an engine, as its `outcomes` name it."""
    return "gradient" if engine == "differences" else "products"


def check_outputs(L: Objective) -> None:
    """Refuse, once for an objective, outputs that go through a Function which cannot be differentiated twice.

    For products with the Gauss-Newton matrix, which need no more.

    Raises:
        ValueError: naming the Function, its module, and the fix.
    """
    if L.check == "never" or "outputs" in L.outcomes:
        return
    with L.measuring():
        chunk = L.place(L.first(2))
        _refuse_once(origins(L, lambda: L.outputs(L.leaves_at(), chunk)), "the GGN is")
    L.outcomes["outputs"] = "ok"


@dataclass(frozen=True)
class _Point:
    """The summed loss of a few examples near w."""

    L: Objective
    w: Tensor
    chunk: Chunk
    engine: str

    def losses(self) -> Tensor:
        return self.L.losses(self.L.leaves_at(self.w), self.chunk)

    def at(self, w: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient, (P,)."""
        point = GradientAlone(self.L, self.L.leaves_at(w), self.chunk)
        return float(point.value), point.gradient

    def product(self, v: Tensor) -> Tensor:
        if self.engine == "forward_over_reverse":
            return jvp_of_gradient(self.L, self.w, self.chunk, v)
        if self.engine == "differences":
            return _difference(self, v, DIFFERENCE_STEPS[self.L.dtype]).change
        return GradientGraph(self.L, self.L.leaves_at(self.w), self.chunk).product(v)

    def unit(self, k: int) -> Tensor:
        v = without_padding(self.L, normal([self.L.num_params], self.w, generator=generator("self-check", k)))
        return v / v.norm()

    def random(self) -> bool:
        first = self.at(self.w)[1]
        return any(float((self.at(self.w)[1] - first).norm()) > 1e-9 * float(first.norm()) for _ in range(8))


@dataclass(frozen=True)
class _Difference:
    """What central differences along v say, beside what derivatives do."""

    slope: float  # of the loss
    along: float  # gradient·v
    change: Tensor  # of the gradient, (P,)
    value: float
    size: float  # of the gradient


def _difference(at: _Point, v: Tensor, h: float) -> _Difference:
    (above, up), (below, down) = at.at(at.w + h * v), at.at(at.w - h * v)
    along = float((up + down) @ v) / 2
    return _Difference((above - below) / (2 * h), along, (up - down) / (2 * h), abs(above), float(up.norm()))


def _verdict(L: Objective, w: Tensor, engine: str, constants: dict[str, Tensor]) -> str:
    """ "ok", "warned: ..." or "unchecked: ..."; nothing at a point that is not finite, or where products raise errors."""
    count = max(1, min(EXAMPLES, int(L.memory / 8 / L.graph_bytes)))
    floats = 8 * L.num_params + sum(t.numel() for t in constants.values() if t.is_floating_point())
    if L.dtype == torch.float64 or 8 * floats <= L.memory:
        found, why = _attempt(L.double(), w, engine, constants, count, _by_gradients)
        if found and not found.startswith("unchecked"):
            return found
        why = why or found.removeprefix("unchecked: ")
    else:
        found, why = "", f"copies in float64 take more than memory={L.memory}"
    if L.dtype == torch.float64 or not why:
        return found
    again, failed = _attempt(L, w, engine, constants, count, lambda at: _by_losses(at, why))
    return "" if failed else again


def _attempt(
    L: Objective, w: Tensor, engine: str, constants: dict[str, Tensor], count: int, judge: Callable[[_Point], str]
) -> tuple[str, str]:
    """What `judge` says, or why it could not: with fewer examples where memory ends."""
    index = torch.arange(L.examples.offsets[0], L.examples.offsets[-1])  # of this rank
    index = index if L.weights is None else index[L.weights.cpu()[index] > 0]
    if not len(index):
        return "ok", ""  # the other ranks check
    while True:
        try:
            with L.measuring(tree_map(L._place, constants)):
                chunk = L.place(L.pieces(index[:count])[0])
                return judge(_Point(L, L.point(w), chunk, engine)), ""
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if not out_of_memory(error) or count == 1:
                return "", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        count //= 2  # after the error, whose traceback holds tensors


def _by_gradients(at: _Point) -> str:
    for k in range(DIRECTIONS):
        v = at.unit(k)
        product, near = at.product(v), _difference(at, v, STEP)
        off, gap = float((product - near.change).norm()), abs(near.slope - near.along)
        if not math.isfinite(off) or not math.isfinite(gap):
            return ""
        size = max(float(product.norm()), float(near.change.norm()))
        # Losses and gradients that are almost zero may be what is left of numbers that are not, as in a network that is
        # certain of its classes: they are rounded as those are, in steps that both differences meet.
        bent = off > TOLERANCE * size + _ROUNDING * (1 + near.size)
        tilted = gap > 10 * TOLERANCE * max(abs(near.slope), abs(near.along)) + _ROUNDING * (1 + near.value)
        if not bent and not tilted:
            return "ok"
        nearer = _difference(at, v, STEP / 4)
        steady = not bent or float((nearer.change - near.change).norm()) <= off / 10
        if steady and (not tilted or abs(nearer.slope - near.slope) <= gap / 10):
            found = origins(at.L, at.losses)
            if bent:
                _refuse_once(found, "Hessian-vector products are", off / size, _WAY_OUT)
            if tilted:
                return _warn(found, gap / max(abs(near.slope), abs(near.along)))
            raise ValueError(
                f"Hessian-vector products are wrong by {off / size:.2g} of their size, although the gradient is right: a "
                f"backward pass takes for constant what depends on the parameters. {_suspects(found)} Save inputs and "
                "outputs with ctx.save_for_backward and compute the backward pass from them by differentiable operations, "
                f"not from detached copies, or write the Function as plain operations{_WAY_OUT}"
            )
        if at.random():
            raise ValueError(
                "the gradient of the same examples differs between two evaluations: the model is random in "
                f"mode={at.L.mode!r} (sampling or dropout by hand?). Make it deterministic in eval mode"
            )
    return "unchecked: the gradient jumps within 1e-6 of this point, as it does at the kinks of relu"


def _by_losses(at: _Point, why: str) -> str:
    """By second differences of the loss along the gradient, in the precision of the objective."""
    value, g = at.at(at.w)
    size = float(g.norm())
    if not math.isfinite(value) or not math.isfinite(size):
        return ""
    noise = 1e3 * torch.finfo(at.L.dtype).eps * abs(value)
    bend, curvature = None, 0.0
    for v in (at.unit(0), g / size if size else at.unit(1)):
        sides = [(h, at.at(at.w + h * v)[0], at.at(at.w - h * v)[0]) for h in LENGTHS]
        bend = _settled([(above - 2 * value + below, h**2) for h, above, below in sides], noise, 0.02)
        slope, along = _settled([(above - below, 2 * h) for h, above, below in sides], noise, 0.01), float(g @ v)
        curvature = float(v @ at.product(v))
        if slope is not None and abs(slope - along) > 0.05 * max(abs(slope), abs(along)):
            return _warn(origins(at.L, at.losses), abs(slope - along) / max(abs(slope), abs(along)))
    if bend is not None and abs(bend - curvature) <= 0.05 * abs(bend):
        return f"ok: by differences of the loss in {at.L.dtype}"
    if at.engine != "differences":
        _refuse_once(origins(at.L, at.losses), "Hessian-vector products are", way_out=_WAY_OUT)
    said = "do not settle" if bend is None else f"give {bend:.4g}, and the products {curvature:.4g}"
    return f"unchecked: float64 is impossible here ({why}), and second differences of the loss in {at.L.dtype} {said}"


def _settled(differences: list[tuple[float, float]], noise: float, tolerance: float) -> float | None:
    """Where two neighbouring quotients, whose numerators are above the noise, agree best, if they do."""
    quotients = [a / b if abs(a) > noise else math.nan for a, b in differences]
    pairs = [(abs(a - b), a) for a, b in pairwise(quotients) if math.isfinite(a - b)]
    gap, best = min(pairs, default=(math.inf, math.nan))
    return best if gap <= tolerance * abs(best) else None


def _refuse_once(found: Origins, what: str, error: float | None = None, way_out: str = "") -> None:
    once = [str(f) for f in found.functions if f.once]
    if once:
        by = "" if error is None else f" by {error:.2g} of their size"
        raise ValueError(
            f"{what} wrong{by}: the backward pass of {', '.join(once)} is marked @once_differentiable, so PyTorch takes "
            "it for constant. Remove the mark and write backward with differentiable operations on tensors saved by "
            f"ctx.save_for_backward, or write the Function as plain operations{way_out}"
        )


def _warn(found: Origins, error: float) -> str:
    text = (
        f"the gradient is not that of the loss (off by {error:.2g}), so H is that of the loss with a part held constant. "
        f"{_suspects(found)} If that is meant, pass check='never' to Objective; otherwise let gradients through"
    )
    warnings.warn(text, stacklevel=2)
    return f"warned: {text}"


def _suspects(found: Origins) -> str:
    parts = []
    if found.cuts:
        parts.append(f"Values leave the graph by {', '.join(found.cuts)}.")
    if found.functions:
        parts.append(f"Functions with a backward pass of their own: {', '.join(map(str, found.functions))}.")
    return " ".join(parts) or "No Function of Python and no detach() was seen in the forward pass."
