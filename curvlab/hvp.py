"""Hessian-vector products at one point: the engines, and which one is used when."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from .capture import Capture, layers_of
from .checks import finite_point
from .gradient_graph import (
    CAPTURES_ON,
    DIFFERENCE_STEPS,
    ChunkGradient,
    GradientAlone,
    GradientGraph,
    half_difference,
    jvp_of_gradient,
    recordings,
    still_true,
    without_padding,
)
from .linalg import relative_error
from .objective import Objective
from .origins import origins
from .self_check import check_products, checked_of
from .sharded import local, parameters, require_gathered, version
from .timing import synchronize

Engine = Literal["auto", "graph", "traced", "compiled", "double_backward", "forward_over_reverse", "differences"]
Product = Callable[[Tensor], Tensor]
_log = logging.getLogger("curvlab")
ENGINES: tuple[Engine, ...] = ("graph", "traced", "compiled", "double_backward", "forward_over_reverse", "differences")
KEEP_NOTHING = ("double_backward", "forward_over_reverse", "differences")
BLOCKS_ON = ("cuda",)  # devices on which several vectors at once may be faster; on a CPU they are not
DOUBTFUL = 0.1  # relative error of products by differences, from which on they are warned of
MANY = 1000  # products, from which on a recording is worth its seconds on a GPU


class HessianProducts:
    """H(w) @ V for one objective at one point, summed over chunks of the data; exactly, but by ``"differences"``.

    Engines (all but the last agree to rounding):

    - ``"graph"``: the gradient is computed once with its graph, which is kept; a product is one backward pass through
      it, about 1.9-2.5 gradients. Also gives the loss and the gradient. Chunks whose graphs do not fit in half of the
      objective's `memory` are rebuilt, once for each block of vectors.
    - ``"traced"``: the same operations, recorded once for each shape of a chunk (`curvlab.linearize`) and repeated
      without autograd at all later points: a product in 0.92-1.09 of the graph's time, least for small models and
      transformers, after a first part that takes 0.1-0.4 gradients more; mostly the same bits. Recording takes 0.3-5 s.
      Where a model cannot be recorded (control flow that depends on data, batch statistics), it is ``"graph"``, and one
      line of the log "curvlab" says why.
    - ``"compiled"``: the recording through `torch.compile`: 0.73-0.98 of the graph's time on a CPU, least for transformers,
      after 10-150 s of compiling.
    - ``"double_backward"``: as graph, with nothing kept: 3.1-3.7 gradients, memory of one chunk.
    - ``"forward_over_reverse"``: forward-mode derivative of the gradient (`torch.func.jvp` of `torch.func.grad`): 3-6
      gradients, no kept graph. Where forward-mode rules are missing (`F.huber_loss`) or wrong (`padding_idx`), as the first
      two examples show, it is ``"double_backward"``, and one line of the log says why.
    - ``"differences"``: central differences of the gradient, which need no second derivative and no graph: for what is
      `@once_differentiable`, for attention kernels that have a first derivative only. Approximate, and therefore only where
      it is asked for. With u = v/‖v‖ and D(ε) = ‖v‖ (∇L(w + εu) - ∇L(w - εu))/(2ε) it is D(ε) + (D(ε) - D(2ε))/3, of
      fourth order, four gradients a product; its distance to D(2ε) is the estimate of its error, in `error`. ε is 1e-6 in
      float64, where products are right to 1e-8 of their length or better, also those of relu networks, whose kinks are
      farther away. In float32 it is 1e-2: right to 1e-6-5e-4 for smooth networks, and useless for relu networks, which meet
      kinks at steps where rounding allows any digits: on 2 x 512 units the top eigenvector's product is off by 0.9 of its
      length and a random vector's by 20, and by 0.3 and 5 at the best of all steps. Where `error` exceeds 0.1 there is a
      warning.
    - ``"auto"``: ``"graph"``, which becomes ``"double_backward"`` chunk by chunk where memory ends; on a GPU ``"traced"``
      where 1000 products or more are expected, as in a run. `curvlab bench hvp` compares engines on one's own model.

    On a GPU a recording is captured as CUDA graphs, if it can be, so that no kernel is launched by itself; and of several
    vectors so many are multiplied at once as are fastest, which is timed once.

    A recording holds for the operations that it has. If the model or the loss reads a number of Python that changes from
    step to step, the losses of two examples, evaluated anew at each point, are not the recording's, which is dropped.

    Reverse-over-reverse and forward-over-reverse are the two orders that PyTorch gets right through LayerNorm and
    BatchNorm; others are silently wrong (pytorch issues 175754, 186256).

    Args:
        batch: indices of the examples whose mean loss is differentiated; default all.
        listens: whether the pass that builds a kept graph also captures what example gradients need, as far as that fits in
            a quarter of the objective's `memory`; see `captures`.
        expected: products to come with the objective, at this point and later ones, for "auto"; default few.
        errors: where to note, of each block of products by differences, how far those of unit vectors are off at most, and
            the length of the longest; default a list of its own.

    The first product is preceded by a check against central differences, as the objective's `check` says.

    Attributes:
        engine: the engine in use.
        kept: number of chunks whose graphs are kept, of `len(chunks)`.
        reason: why, in words.
        error: of products by differences, the largest estimated error so far, relative to the longest, both of unit vectors.
    """

    _points: list[ChunkGradient]
    _value_and_gradient: tuple[Tensor, Tensor] | None
    _sums: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        objective: Objective,
        w: Tensor,
        *,
        engine: Engine = "auto",
        batch: Tensor | None = None,
        listens: bool = False,
        expected: int | None = None,
        errors: list[tuple[float, float]] | None = None,
    ) -> None:
        if engine not in ("auto", *ENGINES):
            raise ValueError(f"engine is {engine!r}; expected 'auto' or one of {ENGINES}")
        self.objective = objective
        with torch.inference_mode(False):  # a copy that can be differentiated
            self.w = objective.point(w)
        finite_point(objective, self.w)
        self.constants = objective.constants()
        self._frozen = self._fingerprint()
        self._asked, self._batch, self._listens = engine, batch, listens
        again = objective.check == "always" and batch is None
        self._checked = checked_of(engine) in objective.outcomes and not again
        self.errors, self._doubted = [] if errors is None else errors, False
        self._many = expected is not None and expected >= MANY
        self._recordings = recordings(objective)
        self._value_and_gradient = None
        if objective.kept is None:
            objective.ranks.agree("the point", self.w)
        elif engine not in ("auto", "graph", "double_backward"):
            require_gathered(objective, f"products by engine={engine!r}")
        self._cut()

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """L(w), float64 scalar, and ∇L(w), (P,); builds the kept graphs on first use."""
        if self._value_and_gradient is None:
            value, gradient = self.objective.fitting(self._built, self._forget)
            value, gradient = self.objective.mean(self._count, value, gradient)
            self._value_and_gradient = value, gradient
        return self._value_and_gradient

    def matmat(self, V: Tensor) -> Tensor:
        """H(w) @ V, (P, K) -> (P, K)."""
        if not self._checked:
            check_products(self.objective, self.w, engine=self.engine, constants=self.constants)
            self._checked = True
        if self.objective.kept is None:
            self.objective.ranks.agree("the vectors of a product", V)
        found = self._by_differences(V) if self.engine == "differences" else self._mean(V)
        L = self.objective
        if not math.isfinite(float(L.entries.sum(found.sum()))):  # which may be an overflow of the sum alone
            where = L.not_finite((found * 0).sum(1))
            if where and not L.not_finite((V * 0).sum(1)):
                raise FloatingPointError(
                    f"a product with the Hessian is not finite in {where}; the parameters have diverged, or the loss has an "
                    "infinite second derivative there (norm or sqrt at 0). Measure at other parameters"
                )
        return found

    @property
    def error(self) -> float:
        return relative_error(self.errors)

    def _mean(self, V: Tensor) -> Tensor:
        total = self.objective.fitting(lambda: self._product(V), self._forget)
        return self.objective.mean(self._count, total)[0]

    def _by_differences(self, V: Tensor) -> Tensor:
        """Extrapolated from two steps along each column, whose differences come as further columns."""
        V = without_padding(self.objective, V)
        lengths = torch.linalg.vector_norm(V, dim=0, dtype=torch.float64)
        lengths = torch.where(lengths > 0, lengths, 1.0)
        scale = (DIFFERENCE_STEPS[V.dtype] / lengths).to(V.dtype)
        near, far = self._mean(torch.cat([scale * V, 2 * scale * V], 1)).chunk(2, 1)
        near, far = near / scale, far / (2 * scale)
        found = near + (near - far) / 3
        sizes = [torch.linalg.vector_norm(A, dim=0, dtype=torch.float64) / lengths for A in (found - far, found)]
        if V.shape[1]:
            self.errors.append((float(sizes[0].max()), float(sizes[1].max())))
        if self.error > DOUBTFUL and not self._doubted:
            self._doubted = True
            warnings.warn(
                f"products by central differences of the gradient are off by {self.error:.1g} of their length in {V.dtype}: "
                "it jumps within their steps, as at the kinks of relu, or drowns in rounding. Measure in float64: "
                "Objective(..., dtype=torch.float64)",
                stacklevel=2,
            )
        return found

    def _fingerprint(self) -> dict[str, tuple[int, float]]:
        """Of the frozen parameters, which are not copied: a change through .data leaves the version as it was."""
        own = parameters(self.objective.module) if self.constants else {}
        return {
            name.removeprefix("model."): (version(p), float(local(p).detach().sum(dtype=torch.float64)))
            for name, p in own.items()
            if name in self.constants
        }

    @property
    def reason(self) -> str:
        """Why the engine in use is the one: what was asked for, whether it could be recorded, and what fits in memory."""
        chunks = len(self.chunks)
        if self.engine in KEEP_NOTHING:
            if self.engine == self._asked:
                return f"{self.engine} was asked for, and keeps nothing"
            return f"{self._asked} was asked for, but {self._lacks()}; {self.engine} keeps nothing"
        expected = f" on {self.objective.device.type} with {'many' if self._many else 'few'} products to come"
        if self._asked in ("traced", "compiled") and self.engine == "graph":
            why = f"{self._asked} was asked for, but nothing could be recorded (the log has the reason)"
        else:
            why = f"auto takes {self.engine}{expected}" if self._asked == "auto" else f"{self.engine} was asked for"
        rest = "" if self.kept == chunks else "; the others are rebuilt for each block of vectors"
        return f"{why}; half of {self.objective.memory / 2**20:.4g} MiB keeps {self.kept} of {chunks} chunks{rest}"

    @property
    def captures(self) -> list[Capture]:
        """What was heard of the layers while the graphs were built, a capture for each chunk that had room."""
        self.objective.fitting(self._built, self._forget)
        return [point.capture for point in self._points if point.capture is not None]

    def _forget(self) -> None:
        (self._recordings.captured or {}).clear()
        self._cut()

    def _cut(self) -> None:
        """The data in chunks, with nothing computed."""
        self.chunks = self.objective.pieces(self._batch, self.objective.chunk_size)
        self.engine = self._chosen(self._asked)
        self.kept = min(len(self.chunks), self._room())
        self._count = sum(chunk.size for chunk in self.chunks)
        self._points, self._sums = [], None

    def _built(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient summed over this rank's chunks, whose graphs are built and kept at the first call."""
        if self._sums is not None:
            return self._sums
        L = self.objective
        owners, room = layers_of(L) if self._listens else None, L.memory / 4
        with L.measuring(self.constants):  # also what is written to later, which inference mode would forbid
            points, value = [], torch.zeros((), dtype=torch.float64, device=L.device)
            gradient = torch.zeros_like(self.w)
            for i in range(len(self.chunks)):
                point = self._at(i, owners if i < self.kept and room > 0 else None)
                value += point.value
                gradient = gradient.add_(point.gradient) if i else point.gradient
                if i < self.kept:
                    points.append(point)
                    point.grads = []  # as long as all parameters, for each chunk
                    room -= point.capture.nbytes if point.capture else 0
        self._points = points  # all of them or, after an error, none
        self._sums = value, gradient
        return self._sums

    def _product(self, V: Tensor) -> Tensor:
        L = self.objective
        now = self._fingerprint() if self._frozen else {}
        for name, before in self._frozen.items():
            if now[name] != before:
                raise RuntimeError(
                    f"the frozen parameter {name} has changed since these products were made, and they are of no one point "
                    "any more; make them anew: H = curvlab.hessian(L)"
                )
        if self.kept:
            self._built()
        if not (V.shape[1] and self.chunks):
            return torch.zeros_like(V)
        columns: list[Tensor] = []
        with L.measuring(self.constants):
            for i in range(len(self.chunks)):
                found = self._columns(*self._products_of_chunk(i), V)
                columns = [a.add_(b) for a, b in zip(columns, found, strict=True)] if columns else found
        return columns[0][:, None] if len(columns) == 1 else torch.stack(columns, 1)

    def _products_of_chunk(self, i: int) -> tuple[Product, Product]:
        """Products with one vector (P,), and with the rows of (K, P)."""
        if self.engine == "forward_over_reverse":
            one = partial(jvp_of_gradient, self.objective, self.w, self.objective.place(self.chunks[i]))
            return one, torch.func.vmap(one)
        if self.engine == "differences":
            one = partial(half_difference, self.objective, self.w, self.objective.place(self.chunks[i]))
            return one, lambda rows: torch.stack([one(v) for v in rows])
        point = self._points[i] if i < self.kept else self._at(i)
        return point.product, point.products_of

    def _columns(self, one: Product, several: Product, V: Tensor) -> list[Tensor]:
        size, blocks, key = 1, self._recordings.blocks, (self.engine, V.shape[1])
        if V.shape[1] > 1 and V.device.type in BLOCKS_ON:
            if key not in blocks:
                blocks[key] = fastest_block(one, several, V)
            size = blocks[key]
        if size == 1:
            return [one(v) for v in V.T]
        return [h for rows in V.T.split(size) for h in several(rows)]

    def _chosen(self, engine: Engine) -> Engine:
        """The engine to use: a recording or forward mode where it was asked for and is possible."""
        if engine == "forward_over_reverse" and self._lacks():
            return "double_backward"
        if engine == "auto":
            recorded = self._many and self.objective.device.type in CAPTURES_ON and self.objective.kept is None
            engine = "traced" if recorded else "graph"
        if engine not in ("traced", "compiled"):
            return engine
        L, made = self.objective, self._recordings
        possible = all(made.find(L, self.w, L.place(chunk), self.constants) for chunk in self.chunks)
        return engine if possible else "graph"

    def _lacks(self) -> str | None:
        """Why forward mode cannot be used, found once for each objective; None if it can."""
        L = self.objective
        if "_forward_mode_lacks" not in vars(L):
            with L.measuring(self.constants):
                L._forward_mode_lacks = found = self._tried()  # type: ignore[attr-defined]
            if found:
                _log.warning("Hessian-vector products go by double backward: %s", found)
        return L._forward_mode_lacks  # type: ignore[attr-defined]

    def _tried(self) -> str | None:
        L = self.objective
        padded = [name for name, m in L.model.named_modules() if getattr(m, "padding_idx", None) is not None]
        if padded:  # its rule in PyTorch lets the padding row through
            return f"the forward-mode derivative of {padded[0]} with its padding_idx is wrong"
        few = L.first(2) if not L.coupled else L.place(self.chunks[0])
        v = torch.linspace(-1, 1, L.num_params, dtype=L.dtype, device=L.device).sin()
        try:
            found = jvp_of_gradient(L, self.w, few, v)
        except RuntimeError as error:  # there is no rule, or no way through torch.func
            functions = origins(L, lambda: L.losses(L.leaves_at(self.w), few)).functions
            through = f"does not go through {', '.join(map(str, functions))}" if functions else "fails"
            return f"forward mode {through} ({str(error).strip().splitlines()[0]})"
        true = GradientGraph(L, L.leaves_at(self.w), few).product(v)
        close = (found - true).norm() <= 1e3 * torch.finfo(L.dtype).eps * true.norm()
        return None if bool(close) else "forward mode gives other numbers than double backward"

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for products, beside parameters and data, as foreseen for chunks of full size."""
        L = self.objective
        each = self._recorded_bytes() if self.engine in ("traced", "compiled") else L.graph_bytes * L.chunk_size
        return int(self.kept * each)

    def _recorded_bytes(self) -> int:
        placed = map(self.objective.place, self.chunks)
        needed = max((self._recordings.of(chunk).nbytes for chunk in placed), default=1)
        return 2 * needed if self.objective.device.type in CAPTURES_ON else needed  # with what a captured graph computes in

    def _room(self) -> int:
        """How many chunks may keep what products need, in half of the objective's memory."""
        if self.engine in ("traced", "compiled"):
            return int(self.objective.memory / 2 / max(1, self._recorded_bytes()))
        return self.objective.graphs_that_fit if self.engine == "graph" else 0

    def _at(self, i: int, owners: dict[str, nn.Module] | None = None) -> ChunkGradient:
        """The gradient of chunk i, and what its products need."""
        L = self.objective
        chunk, params = L.place(self.chunks[i]), [p.detach().requires_grad_() for p in L.split(self.w)]  # w is our own copy
        if self.engine == "differences":
            return GradientAlone(L, params, chunk)
        if self.engine in ("traced", "compiled") and self._recordings.has(chunk):  # others may have dropped it
            kept, compiles = i < self.kept, self.engine == "compiled"
            point = self._recordings.gradient(L, params, chunk, self.constants, kept=kept, compiles=compiles)
            if i or still_true(point, L, params, chunk):
                return point
            self._recordings.refuse()
            self.engine = "graph"
        return GradientGraph(L, params, chunk, owners)


def fastest_block(one: Product, several: Product, V: Tensor) -> int:
    """How many columns of V (P, K) take least time each when they are multiplied at once: 1, 2, 4, ...; timed, so it varies.

    Args:
        one, several: products with a vector (P,), and with the rows of (k, P).
    """
    rows, best, least = V.T.contiguous(), 1, math.inf
    for size in (2**i for i in range(V.shape[1].bit_length())):
        product = partial(one, rows[0]) if size == 1 else partial(several, rows[:size])
        try:
            product()  # what is set up once does not count
            synchronize(V.device)
            started = time.perf_counter()
            product()
            synchronize(V.device)
        except RuntimeError:  # no rule for several at once, or no memory
            if size == 1:
                raise
            break
        each = (time.perf_counter() - started) / size
        if each >= least:
            break
        best, least = size, each
    return best
