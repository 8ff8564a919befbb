"""The same quantities layer by layer: diagonal blocks of the Hessian, norms of gradients and parameters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..linalg import LinearOperator
from ..linalg.probes import rademacher
from ..linalg.trace import quadratic_mean
from ..measurement import Measurement
from ..snapshot import Snapshot
from .estimation import default_probes
from .registry import diagnostic
from .tracking import tracked_eigenpairs


@diagnostic(
    "‖H_l‖", formula="largest eigenvalue of each layer's diagonal block of H", kind="bound",
    cost="14-23 products a layer, 2-5 when tracked",
)  # fmt: skip
def layer_sharpness(at: Snapshot, *, tol: float = 1e-2) -> Measurement:
    """Sharpness with all other layers held fixed, over an axis "layer"; never above the sharpness of the whole.

    A layer is a module with trainable parameters of its own; tied parameters belong to the first.

    Estimator: for each layer a tracked search on its diagonal block.

    Error: the residual, which bounds the distance to *some* eigenvalue of the block.

    Fails: every product is one with the whole Hessian, so the cost grows with the number of layers, normalization
    layers included. Curvature between layers is in no block.
    """
    values, errors, floors = [], [], []
    for name, place in layers(at).items():
        pairs = tracked_eigenpairs(at, f"layer {name}", _block(at, place), 1, tol)
        values.append(float(pairs.values[0]))
        errors.append(float(pairs.residuals[0]))
        floors.append(pairs.floor)
    return _by_layer(at, values, "bound", errors, floors=floors)


@diagnostic(
    "tr(H_l)",
    formula="trace of each layer's diagonal block of H",
    kind="sem",
    cost="16 products for all layers, 3 in a run",
)
def layer_hessian_trace(at: Snapshot, *, probes: int | None = None) -> Measurement:
    """Traces of the diagonal blocks of the Hessian, over an axis "layer"; they sum to tr(H).

    Estimator: Hutchinson with one set of random signs for all layers: Σ_{j in l} z_j (Hz)_j, one product a probe.

    Error: from the images of the probes, which tell the variance better than their samples; from only 2 of them the
    intervals covered 88%.

    Fails: couplings to other layers add variance to every block, so a layer with a small trace beside dear ones has a
    large relative error. Errors of layers share probes and are not independent.

    Args:
        probes: random sign vectors, one product each; default 16 at a single point, 3 in a run.

    Raises:
        ValueError: fewer than 2 probes.

    Source: Hutchinson 1989.
    """
    shape = (at.objective.num_params, default_probes(at, probes, step=3))
    Z = rademacher(shape, at.gradient, generator=at.generator("layer_hessian_trace"))
    Y = at.hessian @ Z
    found = [quadratic_mean(Z[place], Y[place], block=True) for place in layers(at).values()]
    scales = [float((Z[place] * Y[place]).double().sum(0).abs().max()) for place in layers(at).values()]
    floors = [16 * torch.finfo(at.objective.dtype).eps * scale for scale in scales]
    values, errors = [float(m.value) for m in found], [float(m.error) for m in found]  # type: ignore[arg-type]
    return _by_layer(at, values, "sem", errors, df=[float(m.df) for m in found], floors=floors)


@diagnostic("‖∇_l L‖", formula="norm of the full gradient in each layer", kind="exact", cost="1 gradient, shared")
def layer_gradient_norm(at: Snapshot) -> Measurement:
    """Norms of the gradient by layer, over an axis "layer"; their squares sum to ‖∇L‖².

    Estimator: parts of the full gradient, whose pass is shared.

    Fails: as `gradient_norm`, of a sample of the data every entry is too large.
    """
    return _norms(at, at.gradient)


@diagnostic("‖w_l‖", formula="norm of the parameters of each layer", kind="exact", cost="none")
def layer_parameter_norm(at: Snapshot) -> Measurement:
    """Norms of the parameters by layer, over an axis "layer".

    Estimator: read from w.

    Fails: in front of a normalization layer the scale of a weight has no effect on the loss, so that its norm says how
    the effective learning rate changes, not how large the function is.
    """
    return _norms(at, at.w)


def layers(at: Snapshot) -> dict[str, Tensor]:
    """The places of each layer's parameters in the flat vector, by the name of the layer."""
    L = at.objective
    found: dict[str, list[Tensor]] = {}
    end = 0
    for name, size in zip(L.names, L.sizes, strict=True):
        layer = name.rpartition(".")[0] or name
        found.setdefault(layer, []).append(torch.arange(end, end + size, device=L.device))
        end += size
    return {name: torch.cat(places) for name, places in found.items()}


def _block(at: Snapshot, place: Tensor) -> LinearOperator:
    def matmat(V: Tensor) -> Tensor:
        whole = torch.zeros(at.objective.num_params, V.shape[1], dtype=V.dtype, device=V.device)
        whole[place] = V
        return (at.hessian @ whole)[place]

    L = at.objective
    return LinearOperator(matmat, len(place), L.dtype, L.device, "a block of the Hessian", at.errors)


def _norms(at: Snapshot, v: Tensor) -> Measurement:
    values = [float(v[place].double().norm()) for place in layers(at).values()]
    if not np.isfinite(values).all():
        raise FloatingPointError("not finite: the parameters have diverged")
    eps = torch.finfo(at.objective.dtype).eps
    return _by_layer(at, values, "exact", [0.0] * len(values), floors=[16 * eps * x for x in values])


def _by_layer(
    at: Snapshot,
    values: list[float],
    kind: str,
    errors: list[float],
    *,
    df: list[float] | float = np.inf,
    floors: list[float],
) -> Measurement:
    axis = ("layer", tuple(layers(at)))
    full = np.broadcast_to(df, len(values)).astype(float)
    return Measurement(np.array(values), np.array(errors), kind, full, np.array(floors), axis=axis)  # type: ignore[arg-type]
