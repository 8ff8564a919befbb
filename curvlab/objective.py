"""The training loss as a function of one flat vector. Hides modules, batches, devices, chunks, and the average."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from . import checks, derivatives
from .batches import Examples, batch_size, leaves, take, tree_map
from .guard import functional_call, measuring, out_of_memory, seed_everything
from .linalg.rows import Rows
from .losses import Averaged, BatchLoss, Loss, convention, correct, cross_entropy, logits, reads_logits, resolve
from .memory import chunk_that_fits, give_back, graphs_that_fit, require
from .ranks import Ranks
from .sharded import Constants, Kept, Sharded, found_in, gathered, local, parameters, require_gathered
from .unwrap import unwrap

_log = logging.getLogger("curvlab")
T = TypeVar("T")
Check = Literal["first", "always", "never"]


@dataclass(frozen=True)
class Chunk:
    """Some consecutive examples: positions, batch, their scaled weights (B,) or None, and a seed for random layers."""

    positions: slice
    batch: Any
    weights: Tensor | None
    seed: int

    @property
    def size(self) -> int:
        return self.positions.stop - self.positions.start


class Objective:
    """L(w) = (1/N) Σ_i s_i ℓ_i(w): the mean per-example loss of a model over a fixed data set.

    The model is evaluated on copies of its parameters and buffers (`curvlab.guard.functional_call`), in evaluation mode
    unless told otherwise, and is never modified. `L.params()` is the point where training stands now; every method
    takes any other point as a flat vector.

    L is the loss as given: what an optimizer or a loop does to its gradient (weight decay, clipping, a `GradScaler`) is no
    part of it. `curvlab.trained.TrainedObjective(L, weight_decay=0.01)` has the Hessian H + 0.01 I.

    Args:
        model: any `nn.Module`; what DistributedDataParallel, `torch.compile`, Fabric or accelerate wrapped is unwrapped.
            Parameters with ``requires_grad`` are the variables; tied weights count once, frozen ones and buffers are
            constants, read at each evaluation.
        loss: ``(outputs, targets) -> (B,)``, one number per example; or ``"cross_entropy"``, ``"binary_cross_entropy"``,
            ``"squared_error"`` (0.5 times the sum over outputs), ``"token"`` or ``"next_token"`` (the mean over all tokens
            of sequences, -100 ignored); or a torch loss that averages, such as `nn.CrossEntropyLoss(weight=...)`, which is
            taken apart into examples and their weights; or ``batch_loss(f)`` with ``f(model, batch) -> (B,)``.
        data: ``(inputs, targets)`` tensors, a map-style `Dataset`, a `DataLoader` over one (read in the order of the
            dataset, without its sampler), or a sequence of batches; any pytree with `batch_loss`. Kept in memory.
            Inputs that are a tuple or a mapping are passed to the model as ``*inputs`` or ``**inputs``; a mapping with
            "labels", as Hugging Face has them, is split into inputs and targets. Of outputs that are no tensor, a named
            loss reads the `logits`, or the first tensor.
        mode: ``"eval"``, or ``"train"``: dropout masks are then fixed by seed and chunk, and BatchNorm is accepted only
            if all data is a single batch, because its loss is no mean over examples.
        device: where to measure; default: where the model is.
        dtype: float32 or float64; default: that of the parameters. float64 measures a float32 model in float64.
        chunk_size: examples evaluated at once; default: what fits in `memory`. Halved, for good, where memory ends.
        memory: bytes, or text such as ``"2GiB"``, for kept graphs and captured activations; default an eighth of the
            machine's memory, or a quarter of the GPU's.
        weights: non-negative weights of the examples, (N,), or a function batch -> (B,); s_i = weight_i / mean weight,
            which is the same however the data are split. Default those of the loss; without any s_i = 1.
        population_size: how many examples training has, where `data` is a random sample of them. tr(S_b), tr(H S_b), their
            ratios, Γ, the noise scale and the sharpness are then estimated for all of them, with the error of sampling;
            everything else is of `data`.
        check: when Hessian-vector products are checked against central differences, in float64 on at most 8 examples (see
            `curvlab.self_check`): ``"first"``, before the first product; ``"always"``, at each new point; or ``"never"``.
        parameters: the variables, where they are not all that `requires_grad`: names of parameters or modules, or patterns,
            such as ``"head"`` or ``["blocks.*.weight", "norm"]``; or a function (name, parameter) -> bool, such as
            ``lambda name, p: "embed" not in name``. H is then that block of the Hessian.
        group: of torch.distributed processes, "world" for all of them, that share the work: each keeps its contiguous part
            of `data`, which all are given whole, and all make the same calls, from the same weights. Results are those of
            one process, on every rank. What `fully_shard` (FSDP2) or tensor parallelism has sharded is measured on all ranks
            that hold parts: `params` gathers the parameters, as they are then, and a line of the log "curvlab" says what
            that takes; the sharded model is not touched. Frozen parameters that are sharded are those of the last gathering.
        sharded: ``"gather"``, or ``"keep"``: all vectors are (p,), the entries of this rank's parts of the parameters, so
            that the many of an eigensolver are divided among the ranks; whole parameters are in graphs alone. For `value`,
            `gradient`, `hessian`, `eigsh`, `trace` and the diagnostics loss, sharpness, hessian_eigenvalues,
            critical_sharpness and difference_sharpness, which sum over the entries of all ranks; `entries` does so for
            products and norms of one's own. Hessian-vector products are then not checked against differences.

    Raises:
        ValueError, TypeError: what would give a silently wrong number: nothing to train, mixed or half-precision or
            complex parameters, a loss reduced over the batch, an empty or misshapen batch, values that are not finite,
            a loss that is not deterministic or not a mean over examples. The message names the fix.
        MemoryError: sharded parameters would not fit whole in the memory that is free.

    Attributes:
        checked: what the check of products found: "ok", "warned: ..." or "unchecked: ...", with why; None before it.

    Example:
        >>> import torch
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> L = Objective(torch.nn.Linear(3, 1), "squared_error", (x, y))
        >>> L.gradient(L.params()).shape
        torch.Size([4])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss | BatchLoss,
        data: Any,
        *,
        mode: Literal["eval", "train"] = "eval",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        memory: int | str | None = None,
        weights: Tensor | Callable[[Any], Tensor] | None = None,
        population_size: int | None = None,
        parameters: checks.Which | None = None,
        check: Check = "first",
        group: Any = None,
        sharded: Sharded = "gather",
    ) -> None:
        if check not in ("first", "always", "never"):
            raise ValueError(f"check is {check!r}; expected 'first', 'always' or 'never'")
        if mode not in ("eval", "train"):
            raise ValueError(f"mode is {mode!r}; expected 'eval' or 'train'")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; expected at least 1 example")
        self.ranks = Ranks(group)
        self.model = unwrap(model)
        self.loss = resolve(loss)
        self.mode = mode
        self.check = check
        self.outcomes: dict[str, str] = {}  # of checks on first use
        self.draws = mode == "train"  # random numbers from the global generators; checked below
        self._held: dict[str, Tensor] | None = None
        self._gathered = Constants()
        self.hooks: list[str] = []
        self._variables = checks.trainable(self.model, parameters)
        self.subset = len(self._variables) < len(checks.trainable(self.model))
        first = next(iter(self._variables.values()))
        self.device = torch.empty(0, device=device or first.device).device
        self.dtype = checks.real_dtype(self._variables, dtype)
        self.sharded = found_in(self, sharded)
        self.kept = Kept(self._variables, self.ranks) if self.sharded and sharded == "keep" else None
        self.shapes = self.kept.shapes if self.kept else [p.shape for p in self._variables.values()]
        self.sizes = self.kept.sizes if self.kept else [p.numel() for p in self._variables.values()]
        self.num_params = sum(self.sizes)
        self.memory = checks.memory_bytes(memory, self.device)
        if self.kept:
            self.memory = -self._largest(-self.memory)
        self.examples = Examples(data, pairs=not isinstance(self.loss, BatchLoss), ranks=self.ranks)
        self.size = self.examples.size
        if isinstance(self.loss, Averaged):
            plain = all(self.loss.unweighted(y) for _, y in self.examples.batches)
            self.loss = cross_entropy if self.ranks.all(plain) else self.loss
        self._call = _Evaluation(self.model, self.loss)
        checks.finite_data(self.examples)
        with torch.inference_mode(False):
            if self.examples.nbytes() <= self.memory / 4:
                self.examples.map(self._place)
            self._weigh: Callable[[Any], Tensor | None] | None = weights if callable(weights) else None
            if weights is None and isinstance(self.loss, Averaged | BatchLoss):
                self._weigh = self.loss.weights
            self.mean_weight, self.weights = self._scaled(weights)
        self.population_size = checks.population(population_size, self.size, self.weights is not None)
        self.given_chunk_size = chunk_size
        checks.alike(self)
        hooks = derivatives.hooks_on(self)  # which measuring sets aside
        with self.measuring():
            checks.deterministic_mean(self)
            gradient, on_tensors = derivatives.unhindered(self)
            checks.dependence(self, gradient)
            checks.class_indices(self)
        self.hooks = hooks + on_tensors
        if self.sharded:
            _ = self.graph_bytes  # while all ranks are here: it takes gradients at the current point
        if self.hooks:
            _log.warning("measured without %s: hooks change gradients, and not the loss", ", ".join(self.hooks))

    # -- points ---------------------------------------------------------------------------------------------------

    def params(self) -> Tensor:
        """(P,) detached copy of the model's trainable parameters, in the dtype and on the device of measuring."""
        checks.same_buffers(self)
        if self.sharded:
            self._gathered.gather(self._others())
        return self.join([self.held(p) for p in self.variables()])

    def held(self, like: Tensor) -> Tensor:
        """What vectors hold of a live tensor that is like a parameter: all of it, or the part that is kept here."""
        return (local if self.kept else gathered)(like.detach()).to(self.device, self.dtype)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """A flat (P,) vector as views by parameter name."""
        return dict(zip(self._variables, self.split(v), strict=True))

    def split(self, v: Tensor) -> list[Tensor]:
        """A flat (P,) vector as a list of views in the shapes of the parameters."""
        return [part.view(shape) for part, shape in zip(v.split(self.sizes), self.shapes, strict=True)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The flat (P,) vector of tensors in the shapes of the parameters."""
        return torch.cat([part.reshape(-1) for part in parts])

    def point(self, w: Tensor | None = None) -> Tensor:
        """A copy of w on the device of measuring; default the model's current parameters.

        Raises:
            ValueError: a w of another length.
        """
        if w is None:
            return self.params()
        if w.shape != (self.num_params,):
            raise ValueError(f"w has shape {tuple(w.shape)}; expected ({self.num_params},), as L.params() gives")
        return w.detach().to(self.device, self.dtype, copy=True)

    def leaves_at(self, w: Tensor | None = None) -> list[Tensor]:
        """The parameters at w as leaves of a new graph: copies, so a later change of w cannot reach the graph."""
        return [part.requires_grad_() for part in self.split(self.point(w))]

    def where_not_finite(self, v: Tensor) -> list[str]:
        """The names of the parameters where a flat vector is not finite, the same on all ranks."""
        count = torch.stack([(~torch.isfinite(part)).sum() for part in self.split(v)])
        count = self.ranks.sum(count)[0] if self.kept else count
        return [name for name, some in zip(self._variables, count.tolist(), strict=True) if some]

    def not_finite(self, v: Tensor) -> str:
        """The parameters where a flat vector is not finite, in words; "" where it is. The same on all ranks."""
        bad = self.where_not_finite(v)
        return "" if not bad else f"parameter {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")

    # -- values ---------------------------------------------------------------------------------------------------

    def value(self, w: Tensor | None = None, batch: Any = None) -> Tensor:
        """L(w), a float64 scalar; or the mean over a `batch`, given by indices (b,) or as it is."""
        w = self.params() if w is None else w  # gathered once, however often memory ends
        return self.fitting(lambda: self._value(w, batch))

    def gradient(self, w: Tensor | None = None, batch: Any = None) -> Tensor:
        """∇L(w), (P,); or the mean gradient of a `batch`, given by indices (b,) or as it is."""
        w = self.params() if w is None else w
        return self.fitting(lambda: self._gradient(w, batch))

    def _value(self, w: Tensor, batch: Any) -> Tensor:
        with self.measuring(), torch.no_grad():
            params, count = self.leaves_at(w), 0
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for chunk in self.chunks(batch):
                total += self.losses(params, chunk).double().sum()
                count += chunk.size
        return self.mean(count, total)[0]

    def _gradient(self, w: Tensor, batch: Any) -> Tensor:
        with self.measuring():
            total, count = torch.zeros(self.num_params, device=self.device, dtype=self.dtype), 0
            for chunk in self.chunks(batch):
                params = self.leaves_at(w)
                value = self.losses(params, chunk).sum()
                total += self.join(self.grads(value, params))
                count += chunk.size
        return self.mean(count, total)[0]

    @property
    def entries(self) -> Rows:
        """Which entries of the flat vectors are here, for products and norms over those of all ranks."""
        return Rows(self.kept.size, self.kept.here, self.ranks) if self.kept else Rows(self.num_params)

    def mean(self, count: int, *totals: Tensor) -> list[Tensor]:
        """Sums over `count` examples of this rank as means over those of all ranks; the sums are overwritten."""
        if self.kept:  # vectors are summed by their graph
            return [(t if t.ndim else self.ranks.sum(t)[0]).div_(self.size) for t in totals]
        if self.ranks.count == 1:
            return [total.div_(count) for total in self.ranks.sum(*totals)]
        *sums, n = self.ranks.sum(*totals, torch.tensor(count, dtype=torch.float64, device=self.device))
        return [total.div_(n) for total in sums]

    def rows(self, function: Callable[[Chunk], Tensor], batch: Any = None) -> Tensor:
        """What a function of chunks, -> (B, ...), gives for all examples, on every rank, (N, ...)."""
        require_gathered(self, "rows of examples")
        if batch is not None:
            self.ranks.require_one("rows of a batch")
        found = [function(chunk) for chunk in self.chunks(batch)]
        return self.ranks.gather(torch.cat(found or [function(self.first(1))[:0]]), self.size)

    def example_gradients(self, w: Tensor | None = None, batch: Any = None) -> Tensor:
        """s_i ∇ℓ_i(w) for every example of a batch (default: all), (B, P): B times the memory of a gradient.

        By vmap, or by a loop where the model does not allow it.

        Raises:
            MemoryError: they would not fit in the memory that is free.
        """
        self.require_examples("per-example gradients")
        require_gathered(self, "per-example gradients")
        count = self.size if batch is None else sum(piece.size for piece in self.pieces(batch))
        what = f"{count} gradients of {self.num_params} parameters each"
        fix = "pass a batch, or ask for norms and products by curvlab.per_example.ExampleGradients, which forms none"
        require(2 * count * self.num_params * self.dtype.itemsize, self.device, what, fix)
        with self.measuring():
            params = [p.detach() for p in self.leaves_at(w)]
            return self.rows(lambda chunk: self.chunk_gradients(params, chunk), batch)

    def accuracy(self, w: Tensor | None = None) -> Tensor | None:
        """Share of examples whose largest output is the target class, a float64 scalar; None without classes."""
        require_gathered(self, "accuracies")
        if isinstance(self.loss, BatchLoss):
            return None
        with self.measuring(), torch.no_grad():
            params, hits = self.leaves_at(w), torch.zeros((), dtype=torch.float64, device=self.device)
            for chunk in self.chunks():
                right = correct(self.outputs(params, chunk), chunk.batch[1])
                if right is None:
                    break
                hits += (right if chunk.weights is None else right * chunk.weights).double().sum()
            known = not self.pieces() or right is not None
            return self.ranks.sum(hits)[0] / self.size if self.ranks.all(known) else None

    # -- what operators are made of ---------------------------------------------------------------------------------

    @contextmanager
    def measuring(self, constants: dict[str, Tensor] | None = None) -> Iterator[None]:
        """The state guard around every evaluation (see `curvlab.guard`); free when already inside.

        With `constants`, frozen parameters and buffers have the values that `constants()` gave, not those of now.
        """
        held = self._held
        with measuring(self.model, train_mode=self.mode == "train", device=self.device.type):
            self._held = constants if constants is not None else held
            try:
                yield
            except RuntimeError as error:
                reason = derivatives.undifferentiable(self, error)
                if reason is None:
                    raise
                raise ValueError(reason) from error
            finally:
                self._held = held

    def constants(self) -> dict[str, Tensor]:
        """What the model and the loss read beside the variables: frozen parameters, and copies of the buffers."""
        found = {n: self._place(self._gathered.of(n, p)) for n, p in self._others().items()}
        return found | {n: self._place(b.detach()).clone() for n, b in self._call.named_buffers()}

    def chunks(self, batch: Any = None, *, size: int | None = None) -> Iterator[Chunk]:
        """The data (or a batch) in pieces of at most `size` (default `chunk_size`) examples, on the device.

        Everything that sums over examples walks through these.
        """
        pieces = self.pieces(batch, size or self.chunk_size)
        return (self.place(piece) for piece in pieces)

    def place(self, piece: Chunk) -> Chunk:
        """The same examples on the device and in the precision of measuring."""
        return replace(piece, batch=tree_map(self._place, piece.batch))

    def pieces(self, batch: Any = None, size: int | None = None) -> list[Chunk]:
        """The data, or a batch given by indices (b,) or as it is, in parts of at most `size` examples, where they lie."""
        out: list[Chunk] = []
        self.examples.require_unchanged()
        if batch is None:
            for piece, part in self.examples.chunks(size or self.size):
                out.append(Chunk(piece, part, None if self.weights is None else self.weights[piece], len(out)))
            if self.kept:  # all ranks evaluate equally often, some of them an example of weight 0
                nothing = torch.zeros(1, device=self.device, dtype=self.dtype)
                no = replace(self.first(1), positions=slice(0, 1), weights=nothing)
                out += [no] * (self._largest(len(out)) - len(out))
            return out
        require_gathered(self, "batches")
        foreign = False
        if isinstance(batch, Tensor) and batch.ndim == 1 and batch.dtype == torch.int64:
            selected = self.examples.select(batch)
        elif self.weights is not None and self._weigh is None:
            raise ValueError(
                "the examples are weighted and the weights of a foreign batch are unknown; pass the indices "
                "of its examples, a 1-D int64 tensor"
            )
        else:
            selected, foreign = [(torch.arange(batch_size(batch)), batch)], True
        for index, whole in selected:
            if foreign:
                s = None if self._weigh is None else self._normalized(self._weigh(whole))
            else:
                s = None if self.weights is None else self.weights[index.to(self.device)]
            step = size or len(index)
            for lo in range(0, len(index), step):
                piece = slice(lo, min(lo + step, len(index)))
                part = whole if piece == slice(0, len(index)) else take(whole, piece)
                out.append(Chunk(piece, part, None if s is None else s[piece], len(out)))
        return out

    def live_losses(self, batch: Any) -> Tensor:
        """ℓ_i of a batch, (B,), on the live model in its own mode: for training, with gradients in its parameters."""
        return self._call(batch)

    def double(self) -> Objective:
        """The same objective, evaluated in float64."""
        other = copy.copy(self)
        other.dtype = torch.float64
        other.weights = None if self.weights is None else self.weights.double()
        for derived in ("chunk_size", "graph_bytes", "_recordings"):
            other.__dict__.pop(derived, None)
        return other

    @property
    def checked(self) -> str | None:
        """What the check of Hessian-vector products found; None before there were any."""
        return self.outcomes.get("products")

    def restricted(self, index: Tensor) -> Objective:
        """The same objective of some of the examples, which keep their weights."""
        self.ranks.require_one("some of the examples")
        other = copy.copy(self)
        parts = [batch for _, batch in self.examples.select(index)]
        other.examples = Examples(parts, pairs=not isinstance(self.loss, BatchLoss))
        other.size = len(index)
        other.weights = None if self.weights is None else self.weights[index.to(self.device)]
        other.__dict__.pop("chunk_size", None)
        return other

    @property
    def names(self) -> list[str]:
        """Names of the trainable parameters, in the order of the flat vector."""
        return list(self._variables)

    def live_difference(self) -> str | None:
        """Why the loss that training sees, in the model's own mode, is another one than is measured; None if it is not."""
        if self.mode == "train":
            return None
        for name, module in self.model.named_modules():
            if module.training and isinstance(module, checks.COUPLING + checks.RANDOM):
                return f"{name} ({type(module).__name__}) acts in training as it does not when measured"
        return None

    @property
    def module(self) -> nn.Module:
        """The live model and, where it is a module, the loss, as one module of a batch that gives (B,) losses."""
        return self._call

    def variables(self) -> list[Tensor]:
        """The live trainable parameters, in the order of the flat vector: those that the model holds now.

        Raises:
            ValueError: the model has lost one, or has another shape there than when the objective was made.
        """
        live = parameters(self.model)
        for name, p in self._variables.items():
            now = live.get(name)
            if now is None or now.shape != p.shape:
                raise ValueError(
                    f"parameter {name} had shape {tuple(p.shape)} when the objective was made, and "
                    f"{'is gone' if now is None else f'has {tuple(now.shape)}'} now; make the Objective anew"
                )
            self._variables[name] = now  # load_state_dict(assign=True) and a new layer put others there
        thawed = [] if self.subset else [n for n, p in live.items() if p.requires_grad and n not in self._variables]
        if thawed:
            warnings.warn(
                f"parameter {thawed[0]} is trained now, and was frozen or absent when the objective was made, which takes "
                "it for a constant. Make the Objective anew to include it",
                stacklevel=2,
            )
        return list(self._variables.values())

    def describe(self) -> dict[str, Any]:
        """What a record must say of the objective: sizes, loss, mode, precision, device, chunks."""
        loss = getattr(self.loss, "__name__", type(self.loss).__name__)
        return {
            "examples": self.size,
            "data": self.data_hash(),
            "parameters": self.entries.size,
            "subset": self.names if self.subset else None,
            "model": type(self.model).__name__,
            "loss": loss,
            "convention": convention(self.loss),
            "mode": self.mode,
            "dtype": str(self.dtype),
            "device": str(self.device),
            "chunk_size": self.chunk_size,
            "memory": self.memory,
            "weighted": self.weights is not None,
            "population_size": self.population_size,
        }

    def data_hash(self) -> str:
        """SHA-256 of the data in the precision of measuring: of equal data, however they were split, on any device.

        "" where ranks hold parts of the data.
        """
        if self.ranks.count > 1:
            return ""
        found = hashlib.sha256()
        for batch in self.examples.batches:
            for leaf in leaves(batch):
                found.update(self._place(leaf).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()[:16]

    def losses(self, params: list[Tensor], chunk: Chunk) -> Tensor:
        """s_i ℓ_i for the examples of a chunk, (B,), differentiable in `params`.

        Raises:
            ValueError: a loss that is not (B,), or a forward pass that rewrites a parameter.
        """
        self.reseed(chunk)
        state = self._state(params)
        before = _versions(state)
        with self._without_hooks():
            losses = functional_call(self._call, state, (chunk.batch,))
        if (after := _versions(state)) != before:
            self.refuse_rewritten([name for name, old, new in zip(state, before, after, strict=True) if old != new])
        if not isinstance(losses, Tensor) or losses.shape != (chunk.size,):
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            raise ValueError(
                f"the loss returned {got} for a batch of {chunk.size}; expected ({chunk.size},), one number "
                "per example. Use reduction='none' and sum or average over the other dimensions yourself"
            )
        return losses if chunk.weights is None else losses * chunk.weights

    def outputs(self, params: list[Tensor], chunk: Chunk) -> Tensor:
        """The model's outputs for a chunk, differentiable in `params`; not defined for a `batch_loss`."""
        if isinstance(self.loss, BatchLoss):
            raise TypeError(
                "a batch_loss calls the model itself, so its outputs are unknown; pass loss as a function "
                "(outputs, targets) -> (B,) for what needs outputs, such as the GGN"
            )
        self.reseed(chunk)
        with self._without_hooks():
            return functional_call(self._call, self._state(params), (chunk.batch,), {"outputs_only": True})

    def read_outputs(self, returned: Any) -> Any:
        """The outputs in what a call of the model returned: its logits, where the loss reads them."""
        return logits(returned) if self._call.reads_logits else returned

    def grads(
        self, value: Tensor, params: list[Tensor], *, create_graph: bool = False, retain_graph: bool | None = None
    ) -> list[Tensor]:
        """Gradients of a scalar, exact zeros where it does not depend on a parameter."""
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in params]
        found = torch.autograd.grad(
            value, params, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
        )
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]

    def require_examples(self, what: str) -> None:
        """Refuse `what` where the loss has no per-example gradients of its own."""
        if self.coupled:
            raise ValueError(
                f"{what} do not exist: {self.coupled} couples the examples of a batch. Measure in mode='eval', and the loss "
                "without penalties"
            )

    @property
    def coupled(self) -> str | None:
        """What couples the examples of a batch, such as "1 (BatchNorm1d)"; None for a mean over examples."""
        return checks.live_module(self, checks.COUPLING)

    @cached_property
    def chunk_size(self) -> int:
        """Examples evaluated at once: as given, or so many that one kept graph takes at most a quarter of `memory`."""
        if self.given_chunk_size is not None:
            return min(self.given_chunk_size, self.size)
        if self.coupled:
            return self.size
        return chunk_that_fits(self.memory, self.graph_bytes, self.size)

    def halve(self, error: BaseException) -> bool:
        """Whether memory has ended, and half as many examples at once, with half the budget, may do: so it is from now on.

        Numbers change by rounding only. A line of the log "curvlab" says so.
        """
        if not out_of_memory(error) or self.coupled or self.kept or self.chunk_size < 2:
            return False
        size, self.given_chunk_size = self.chunk_size, self.chunk_size // 2
        self.__dict__.pop("chunk_size", None)
        self.memory //= 2
        _log.warning("memory ended with %d examples at once; going on with %d", size, self.given_chunk_size)
        return True

    def fitting(self, compute: Callable[[], T], forget: Callable[[], None] = lambda: None) -> T:
        """What `compute` returns, begun again with half the examples at once each time that memory ends.

        Args:
            forget: drops what earlier attempts have left.
        """
        while True:
            try:
                return compute()
            except RuntimeError as error:
                if not self.halve(error):
                    raise
            forget()  # after the error, whose traceback holds tensors
            give_back(self.device)

    @cached_property
    def graph_bytes(self) -> float:
        """Bytes that a kept gradient graph takes per example, measured by what autograd saves for two and for six."""
        small, large, w = self.first(2).size, self.first(6).size, self.params()
        if large == small:
            return max(1.0, self._saved_bytes(w, small) / small)
        return max(1.0, (self._saved_bytes(w, large) - self._saved_bytes(w, small)) / (large - small))

    @property
    def graphs_that_fit(self) -> int:
        """How many chunks may keep a gradient graph in half of `memory`."""
        gathered = self.kept.size * self.dtype.itemsize if self.kept else 0  # whole parameters
        return graphs_that_fit(self.memory, self.graph_bytes * self.chunk_size + gathered)

    # -- internals --------------------------------------------------------------------------------------------------

    def _place(self, tensor: Tensor) -> Tensor:
        tensor = gathered(tensor)
        return tensor.to(self.device, self.dtype) if tensor.is_floating_point() else tensor.to(self.device)

    def _largest(self, number: int) -> int:
        """The largest of the numbers that ranks give."""
        return int(self.ranks.gather(torch.tensor([number], device=self.device), self.ranks.count).max())

    def _others(self) -> dict[str, Tensor]:
        """The parameters of model and loss that are no variables."""
        own = {f"model.{name}" for name in self._variables}
        return {n: p for n, p in parameters(self._call).items() if n not in own}

    def _state(self, params: list[Tensor]) -> dict[str, Tensor]:
        """Everything the model reads: the given parameters, frozen ones, and copies of the buffers."""
        params = self.kept.whole(params) if self.kept else params
        state = dict(zip((f"model.{name}" for name in self._variables), params, strict=True))
        if self._held is None:
            return state | self.constants()
        buffers = {name for name, _ in self._call.named_buffers()}  # a forward pass may write to them
        return state | {n: t.clone() if n in buffers else t for n, t in self._held.items()}

    def _without_hooks(self) -> AbstractContextManager:
        return derivatives.without_tensor_hooks() if self.hooks else nullcontext()

    def reseed(self, chunk: Chunk) -> None:
        """The same random numbers at every evaluation of a chunk; the guard restores the generators."""
        if self.draws:
            seed_everything(chunk.seed)

    def refuse_rewritten(self, names: list[str]) -> None:
        """Refuse a forward pass that has rewritten what it was given, other than buffers.

        Raises:
            ValueError: naming the parameter.
        """
        buffers = {name for name, _ in self._call.named_buffers()}
        for name in names:
            if name not in buffers:  # whose copies may be written to
                raise ValueError(
                    f"parameter {name.removeprefix('model.')} is rewritten by the model's own forward pass, so the loss is "
                    "not a function of it; take the rewriting out of forward, such as into the training loop"
                )

    def chunk_gradients(
        self,
        params: list[Tensor],
        chunk: Chunk,
        names: list[str] | None = None,
        scalars: Callable[[list[Tensor], Chunk], Tensor] | None = None,
    ) -> Tensor:
        """(B, p) gradients of the examples of a chunk in the named parameters (default: all), by vmap or a loop.

        `scalars` are functions of the examples, (params, chunk) -> (B,), other than `losses`.
        """
        chosen = [i for i, name in enumerate(self._variables) if names is None or name in names]
        scalars = scalars or self.losses

        def scalar(part: list[Tensor], batch: Any, weight: Tensor | None) -> Tensor:
            full = list(params)
            for i, p in zip(chosen, part, strict=True):
                full[i] = p
            whole = iter(batched)
            one = Chunk(slice(0, 1), tree_map(lambda t: t[None] if next(whole) else t, batch), None, chunk.seed)
            value = scalars(full, one)[0]
            return value if weight is None else value * weight

        batched = [leaf.ndim > 0 for leaf in leaves(chunk.batch)]
        dims = tree_map(lambda t: 0 if t.ndim else None, chunk.batch)
        weight_dim = None if chunk.weights is None else 0
        try:
            mapped = torch.func.vmap(torch.func.grad(scalar), in_dims=(None, dims, weight_dim))
            found = mapped([params[i] for i in chosen], chunk.batch, chunk.weights)
            return torch.cat([g.reshape(len(g), -1) for g in found], 1)
        except (RuntimeError, TypeError, ValueError):  # control flow, in-place updates, leaves that are no tensors
            params = [p.detach().requires_grad_() for p in params]
            part = [params[i] for i in chosen]
            rows = [self.grads(value, part, retain_graph=True) for value in scalars(params, chunk)]
            return torch.stack([self.join(row) for row in rows])

    def _saved_bytes(self, w: Tensor, examples: int) -> int:
        alive: weakref.WeakSet[_Saved] = weakref.WeakSet()  # what was saved on the way and is not needed again is freed

        def pack(tensor: Tensor) -> _Saved:
            saved = _Saved(tensor)
            alive.add(saved)
            return saved

        with self.measuring(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            params, chunk = self.leaves_at(w), self.first(examples)
            kept = self.grads(self.losses(params, chunk).sum(), params, create_graph=True)
        own = {p.untyped_storage().data_ptr() for p in params}
        dense = (saved.tensor for saved in alive if saved.tensor.layout is torch.strided)
        storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in dense)}
        del kept  # until here it held the graph
        return sum(size for pointer, size in storages.items() if pointer not in own)

    def first(self, count: int) -> Chunk:
        """The first examples, at most `count`, as a chunk."""
        if self.kept:
            piece = self.examples.first(count)[0]
            count = -self._largest(piece.start - piece.stop)
        piece, batch = self.examples.first(count)
        return Chunk(piece, tree_map(self._place, batch), None if self.weights is None else self.weights[piece], 0)

    def _scaled(self, weights: Tensor | Callable[[Any], Tensor] | None) -> tuple[float, Tensor | None]:
        """The mean weight, and the weights of the examples over it; None where all are the same."""
        if self._weigh is not None:
            parts = [part for batch in self.examples.batches if (part := self._weigh(batch)) is not None]
            here = self.examples.offsets[-1] - self.examples.offsets[0]
            weights = self.ranks.gather(torch.cat(parts)[:here], self.size) if parts else None
        if weights is None:
            return 1.0, None
        weights = torch.as_tensor(weights).detach().clone().to(self.device, torch.float64)
        if isinstance(self.loss, Averaged) and not bool(weights.any()):
            raise ValueError(
                f"all {self.size} targets are ignored (ignore_index={self.loss.ignored}), or of classes of weight 0, so the "
                "mean does not exist; pass data with targets that count"
            )
        valid = weights.shape == (self.size,) and bool((weights >= 0).all()) and bool(torch.isfinite(weights).all())
        if not valid or not float(weights.sum()) > 0:
            raise ValueError(
                f"weights have shape {tuple(weights.shape)}; expected ({self.size},) finite non-negative "
                "numbers, one per example, not all zero"
            )
        self.mean_weight = float(weights.mean())
        return self.mean_weight, self._normalized(weights)

    def _normalized(self, weights: Tensor | None) -> Tensor | None:
        """Weights over the mean weight of the data; None where that is 1 for all."""
        if weights is None:
            return None
        s = weights.to(self.device, torch.float64) / self.mean_weight
        return None if bool((s == 1).all()) else s.to(self.dtype)


@dataclass(eq=False)
class _Saved:
    """A tensor that a node of autograd's graph keeps."""

    tensor: Tensor


def _versions(state: dict[str, Tensor]) -> list[int]:
    """How often each tensor has been changed in place."""
    return [0 if t.is_inference() else t._version for t in state.values()]


class _Evaluation(nn.Module):
    """Model and loss as one module of a batch, so that `functional_call` can put parameters under both."""

    def __init__(self, model: nn.Module, loss: Loss | BatchLoss) -> None:
        super().__init__()
        self.model = model
        self.loss: Any = loss.function if isinstance(loss, BatchLoss) else loss
        self.whole = isinstance(loss, BatchLoss)
        self.reads_logits = reads_logits(loss)

    def forward(self, batch: Any, outputs_only: bool = False) -> Any:
        if self.whole:
            return self.loss(self.model, batch)
        inputs, targets = batch
        if isinstance(inputs, Mapping):
            outputs = self.model(**inputs)
        else:
            outputs = self.model(*inputs) if isinstance(inputs, list | tuple) else self.model(inputs)
        if self.reads_logits:
            outputs = logits(outputs)
        return outputs if outputs_only else self.loss(outputs, targets)
