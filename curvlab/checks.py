"""What an objective refuses at the door, because it would become a silently wrong number later."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase as fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batches import Examples, leaves, take
from .guard import get_random_states, same_random_states
from .linalg.probes import generator, normal
from .losses import Averaged, cross_entropy, squared_error
from .memory import total_bytes
from .sharded import gathered, is_sharded, parameters

if TYPE_CHECKING:
    from .objective import Chunk, Objective

COUPLING: tuple[type, ...] = (nn.modules.batchnorm._BatchNorm,)
RANDOM: tuple[type, ...] = (nn.modules.dropout._DropoutNd, nn.RReLU)
DRAWS = 32  # evaluations of a model that draws random numbers, before it is believed not to use them

Which = str | Iterable[str] | Callable[[str, Any], bool]


def trainable(model: nn.Module, which: Which | None = None) -> dict[str, Tensor]:
    """The parameters with `requires_grad` by name, or those among them that `which` picks; tied ones come once.

    Args:
        which: names of parameters or modules, or patterns such as ``"blocks.*.weight"``; or a function of (name, parameter).

    Raises:
        ValueError: there are none, a lazy one has no shape yet, gradients are sparse or scaled by counts, an embedding
            rewrites its table, or two parameters share memory.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, p in named if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(f"parameter {lazy[0]} has no shape yet; run the model once on a batch before measuring")
    rewriting = [name for name, m in model.named_modules() if getattr(m, "max_norm", None) is not None]
    if rewriting:
        raise ValueError(
            f"module {rewriting[0]} has max_norm={model.get_submodule(rewriting[0]).max_norm}, by which the forward pass "
            f"rewrites its weight; measure with model.{rewriting[0]}.max_norm = None"
        )
    scaling = [name for name, m in model.named_modules() if getattr(m, "scale_grad_by_freq", False)]
    if scaling:
        raise ValueError(
            f"module {scaling[0]} has scale_grad_by_freq=True, which divides gradients by counts in the batch, so that they "
            f"are those of no loss; measure with model.{scaling[0]}.scale_grad_by_freq = False"
        )
    sparse = [name for name, m in model.named_modules() if getattr(m, "sparse", False)]
    if sparse:
        raise ValueError(
            f"module {sparse[0]} gives sparse gradients, which have no second derivative; set sparse=False"
        )
    found = {name: p for name, p in parameters(model).items() if p.requires_grad}
    if not found:
        raise ValueError("the model has no parameter with requires_grad=True; unfreeze what is to be measured")
    _apart(found)
    if which is None:
        return found
    aliases = parameters(model, remove_duplicate=False)
    held = {id(p) for name, p in aliases.items() if _picked(name, p, which)}
    picked = {name: p for name, p in found.items() if id(p) in held}
    if not picked:
        raise ValueError(f"parameters={which!r} picks none of the trainable parameters; there are {', '.join(found)}")
    return picked


def _picked(name: str, p: Tensor, which: Which) -> bool:
    if callable(which):
        return bool(which(name, p))
    patterns = [which] if isinstance(which, str) else which
    return any(fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*") for pattern in patterns)


def _apart(found: dict[str, Tensor]) -> None:
    """Refuse parameters that are one tensor for the model and several for autograd."""
    ends: dict[int, tuple[int, str]] = {}  # of the last parameter in each storage
    for name, p in sorted(found.items(), key=lambda item: item[1].storage_offset()):
        if p.is_sparse or not p.numel() or p.device.type == "meta" or is_sharded(p):
            continue
        key, start = p.untyped_storage().data_ptr(), p.storage_offset()
        end, other = ends.get(key, (0, ""))
        if start < end:
            raise ValueError(
                f"parameters {other} and {name} share memory without being the same Parameter, so a step changes both and "
                "each is counted; tie them by assigning one Parameter to both modules, without .data"
            )
        last = sum(int(stride) * (size - 1) for size, stride in zip(p.shape, p.stride(), strict=True))
        ends[key] = int(start + last + 1), name


def real_dtype(variables: dict[str, Tensor], asked: torch.dtype | None) -> torch.dtype:
    """The one real dtype of the parameters, or the one asked for.

    Raises:
        ValueError: mixed or complex parameters, or a precision in which curvature drowns in rounding.
    """
    dtypes = {p.dtype for p in variables.values()}
    imaginary = next((name for name, p in variables.items() if p.is_complex()), None)
    if imaginary:
        raise ValueError(
            f"parameter {imaginary} is {variables[imaginary].dtype}; expected real ones, since the Hessian is linear over "
            "the reals only. Hold nn.Parameter(torch.view_as_real(p)) and take torch.view_as_complex of it in forward"
        )
    if len(dtypes) > 1:
        listing = ", ".join(f"{name}: {p.dtype}" for name, p in list(variables.items())[:6])
        raise ValueError(
            f"parameters have dtypes {sorted(map(str, dtypes))} ({listing}, ...); expected one real dtype. "
            "Convert the model, such as model.float()"
        )
    dtype = asked or next(iter(dtypes))
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"dtype is {dtype}; curvature needs torch.float32 or torch.float64: pass dtype=torch.float32 to measure a copy "
            "of the parameters in float32"
        )
    return dtype


def usable_device(name: str | None) -> None:
    """Refuse a device that torch cannot put a tensor on.

    Raises:
        ValueError: naming it, and why.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def memory_bytes(memory: int | str | None, device: torch.device) -> int:
    """A memory budget in bytes; None is an eighth of the machine's memory, or a quarter of the GPU's.

    Raises:
        ValueError: not a positive number of bytes, or text such as "2GiB".
    """
    if memory is None:
        return total_bytes(device) // (4 if device.type == "cuda" else 8)
    units = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}
    text = str(memory).strip().lower()
    unit = next((u for u in units if text.endswith(u)), "")
    try:
        size = int(float(text.removesuffix(unit)) * units.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"memory is {memory!r}; expected a number of bytes, or text such as '2GiB' or '500MB'")
    return size


def population(given: int | None, size: int, weighted: bool) -> int | None:
    """The number of examples of which `size` are a sample; None where they are all.

    Raises:
        ValueError: fewer than there are, or examples with weights, whose mean over the population is unknown.
    """
    if given is None or given == size:
        return None
    if given < size or weighted:
        raise ValueError(
            f"population_size is {given} for {size} {'weighted ' if weighted else ''}examples; expected the number of "
            "examples of which the data are a uniform sample, without weights"
        )
    return int(given)


def finite_data(examples: Examples) -> None:
    """Refuse NaN and infinity in the data.

    Raises:
        ValueError: naming the example.
    """
    for batch, offset in zip(examples.batches, examples.offsets, strict=False):
        for leaf in leaves(batch):
            if leaf.is_floating_point() and not torch.isfinite(leaf).all():
                bad = ~torch.isfinite(leaf.reshape(len(leaf), -1) if leaf.ndim else leaf.reshape(1, 1)).all(1)
                raise ValueError(
                    f"the data holds a value that is not finite, in example {offset + int(torch.nonzero(bad)[0, 0])}; "
                    "clean the data, or give such examples weight 0 and finite values"
                )


def live_module(L: Objective, kinds: tuple[type, ...]) -> str | None:
    """The first module of some kinds that acts as in training while L is measured, such as "layers.1 (BatchNorm2d)"."""

    def live(module: Any) -> bool:
        if L.mode == "eval":  # batch normalization without tracked statistics uses those of the batch even then
            return isinstance(module, COUPLING) and getattr(module, "running_mean", None) is None
        return module.training or not L.model.training

    for name, module in L.model.named_modules():
        if isinstance(module, kinds) and live(module):
            return f"{name} ({type(module).__name__})"
    return None


def alike(L: Objective) -> None:
    """Refuse ranks that hold other weights, and what several ranks cannot do.

    Raises:
        ValueError: naming what differs, or the module.
    """
    if L.ranks.count == 1:
        return
    if not L.kept:
        L.ranks.agree("weights", L.params())
    coupling = live_module(L, COUPLING)
    if coupling:
        L.ranks.require_one(f"statistics of batches, as {coupling} has them,")
    if L.mode == "train":
        L.ranks.require_one("dropout masks, which are fixed by chunk,")


def same_buffers(L: Objective) -> None:
    """Refuse buffers that differ between ranks, as running statistics do which each rank takes of its own batches.

    Raises:
        ValueError: naming the first of them.
    """
    if L.ranks.count == 1:
        return
    found = {name: b for name, b in L.model.named_buffers() if b.is_floating_point()}
    if found:
        what = f"buffers such as {next(iter(found))}, which SyncBatchNorm would keep alike"
        L.ranks.agree(what, L.join([gathered(b.detach()).double() for b in found.values()]))


def deterministic_mean(L: Objective) -> None:
    """Refuse a loss that is not finite, not deterministic, or not a mean over examples.

    Costs a few forward passes of 8 examples; dozens for a model that draws random numbers where it is measured.

    Raises:
        ValueError: naming the module, parameter or example, and the fix.
    """
    _rewritten_attributes(L)
    if L.mode == "train":
        _trained_spectral_norm(L)
    coupling = live_module(L, COUPLING)
    if coupling and (L.mode == "eval" or len(L.examples.batches) > 1 or L.chunk_size < L.size or L.size < 2):
        raise ValueError(
            f"{coupling} uses the statistics of the batch, so the loss is not a mean over examples. Measure in "
            "mode='eval' with tracked statistics, or in mode='train' with all data as a single batch and chunk_size=None"
        )
    with L.measuring(), torch.no_grad():
        w, chunk = L.params(), L.first(8)
        for name, p in L.unflatten(w).items():
            if not torch.isfinite(p).all():
                raise ValueError(
                    f"parameter {name} holds values that are not finite; measure a model that has not diverged"
                )
        params = L.leaves_at(w)
        losses = L.losses(params, chunk)
        rewritten = [name for name, p, q in zip(L.names, params, L.split(w), strict=True) if not torch.equal(p, q)]
        L.refuse_rewritten(rewritten)  # through .data, which no version counts
        if not torch.isfinite(losses).all():
            i = int(torch.nonzero(~torch.isfinite(losses))[0, 0])
            raise ValueError(
                f"the loss of example {i} is {float(losses[i])} at the model's current parameters; check the parameters, "
                "the inputs and the targets for NaN and out-of-range classes"
            )
        _mean_over_examples(L, w, chunk, bool(coupling))
        zeros = [not bool(p.any()) for p in L.split(w)]
        if not L.ranks.all(not any(zeros)):  # a head of zeros, as many networks start with, hides everything before it
            noise = L.split(0.1 * normal(w.shape, w, generator=generator("a head of zeros")))
            moved = [p + q if zero else p for p, q, zero in zip(L.split(w), noise, zeros, strict=True)]
            _mean_over_examples(L, L.join(moved), chunk, bool(coupling))


def _mean_over_examples(L: Objective, w: Tensor, chunk: Chunk, coupling: bool) -> None:
    params = L.leaves_at(w)
    draws = _draws(L, params, chunk)
    L.draws = L.draws or draws
    losses = L.losses(params, chunk)
    if not torch.isfinite(losses).all():
        return
    seeds = range(1, DRAWS + 1 if draws else 1)
    masked = any(not _close(losses, L.losses(params, replace(chunk, seed=chunk.seed + seed))) for seed in seeds)
    if (masked and L.mode == "eval") or not _close(losses, L.losses(params, chunk)):
        raise ValueError(
            "the loss of the same examples differs between two evaluations: the model is random in "
            f"mode={L.mode!r} (sampling or dropout by hand?). Make it deterministic in eval mode"
        )
    if coupling or masked:
        return  # no mean over examples, or masks that depend on the position in the chunk
    half = max(1, chunk.size // 2)
    ranges = [r for r in (slice(0, half), slice(half, chunk.size)) if r.stop > r.start]
    parts = [replace(chunk, positions=r, batch=take(chunk.batch, r), weights=_part(chunk.weights, r)) for r in ranges]
    if not _close(losses, torch.cat([L.losses(params, part) for part in parts])):
        raise ValueError(
            "the loss of an example depends on the other examples of its batch, so the loss is not a mean over "
            "examples. Remove the coupling (batch statistics, contrastive terms, x - x.mean(0)) from the model or loss"
        )


def _draws(L: Objective, params: list[Tensor], chunk: Chunk) -> bool:
    """Whether an evaluation draws from the global generators, whatever it does with the numbers."""
    reseeds, L.draws, before = L.draws, False, get_random_states()
    try:
        L.losses(params, chunk)
    finally:
        L.draws = reseeds
    return not same_random_states(before, get_random_states())


def _trained_spectral_norm(L: Objective) -> None:
    """Refuse singular vectors that the forward pass improves as constants: the Hessian lacks their derivative."""
    for name, module in L.model.named_modules():
        hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
        if (type(module).__name__ == "_SpectralNorm" or "SpectralNorm" in hooks) and module.training:
            raise ValueError(
                f"the spectral norm of {name.split('.parametrizations')[0]} takes a step of power iteration in every "
                "forward pass in training, whose derivative autograd does not see; measure in mode='eval'"
            )


def _rewritten_attributes(L: Objective) -> None:
    """Refuse a forward pass that changes in place a tensor which is neither a parameter nor a buffer, and undo it."""
    held = [
        (f"{name}.{key}" if name else key, value, value._version, value.clone())
        for name, module in L.model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and not value.requires_grad and not value.is_inference()
    ]
    if not held:
        return
    with L.measuring(), torch.no_grad():
        L.losses(L.leaves_at(), L.first(2))
    for name, value, version, before in held:
        if value._version != version:
            value.copy_(before)
            raise ValueError(
                f"the model's forward pass changes its attribute {name} in place, a tensor that is neither a parameter nor "
                "a buffer, so measuring would change training; make it a buffer by register_buffer"
            )


def dependence(L: Objective, gradient: list[Tensor | None]) -> None:
    """Refuse a loss that depends on no parameter, and warn of the parameters that it does not depend on.

    Raises:
        ValueError: naming a parameter, and what may have cut it off.
    """
    idle = [name for name, g in zip(L.names, gradient, strict=True) if g is None]
    if len(idle) == len(L.names):
        raise ValueError(
            f"the loss depends on none of the {len(L.names)} parameters ({L.names[0]}, ...): is it of another model, or cut "
            "off by detach(), .item() or no_grad()? A batch_loss must call the model that it is given"
        )
    if idle:
        listing = ", ".join(idle[:6]) + (", ..." if len(idle) > 6 else "")
        warnings.warn(
            f"the loss of the first examples does not depend on {listing}: their gradient and curvature are zero. If it "
            "should, look for detach(), .item() or no_grad() on the way; if not, requires_grad_(False) leaves them out",
            stacklevel=3,
        )


def class_indices(L: Objective) -> None:
    """Refuse class indices that no output stands for: `squared_error` would take them for targets of zero,
    `cross_entropy` ignores -100 and still counts the example.

    Raises:
        ValueError: naming the range of indices and the number of outputs.
    """
    taken_apart = L.loss if isinstance(L.loss, Averaged) and L.loss.by_class else None
    if L.loss not in (squared_error, cross_entropy) and taken_apart is None:
        return
    with L.measuring(), torch.no_grad():
        outputs = L.outputs(L.leaves_at(), L.first(2))
    classes = outputs.shape[1 if taken_apart and taken_apart.shift is None else -1]
    for _, targets in L.examples.batches:
        valid = (targets >= 0) & (targets < classes)
        if taken_apart:
            valid |= targets == taken_apart.ignored
        if not targets.is_floating_point() and not bool(valid.all()):
            raise ValueError(
                f"class indices run from {int(targets.min())} to {int(targets.max())}, but the model has {classes} outputs. "
                "Give examples to be ignored weight 0 and a valid class; for a regression on integers pass targets.float() "
                "in the shape of the outputs"
            )


def finite_point(L: Objective, w: Tensor) -> None:
    """Refuse parameters that are not finite.

    Raises:
        FloatingPointError: naming the first of them.
    """
    if L.kept is None and bool(torch.isfinite(w).all()):
        return
    if bad := L.where_not_finite(w):
        what = "NaN" if bool(w.isnan().any()) else "infinity"
        raise FloatingPointError(
            f"parameter {bad[0]} holds {what}: training has diverged; go back to a checkpoint and take a smaller lr"
        )


def _part(weights: Tensor | None, r: slice) -> Tensor | None:
    return None if weights is None else weights[r]


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding: far from what a random or coupled model does, far above what chunking does."""
    tolerance = math.sqrt(torch.finfo(a.dtype).eps)
    return bool((a - b).abs().max() <= tolerance * (1 + a.abs().max()))
