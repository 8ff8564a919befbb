"""Traces of the Hessian and of its Gauss-Newton part, and the whole density of the spectrum."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..linalg import LinearOperator, spectral_density, trace
from ..linalg.probes import rademacher
from ..linalg.trace import quadratic_mean
from ..measurement import Measurement, missing
from ..operators import ggn
from ..snapshot import Snapshot
from .estimation import default_probes, estimate
from .fisher import fisher_trace
from .registry import diagnostic

Method = Literal["auto", "split", "xtrace", "hutchinson", "exact"]


@diagnostic("tr(H)", formula="Σ λ_i", kind="sem", cost="32 products and tr(GGN); 2 in a run")
def hessian_trace(
    at: Snapshot,
    *,
    method: Method = "auto",
    num_matvecs: int | None = None,
    target: float | None = None,
    budget: int | None = None,
) -> Measurement:
    """Trace of the Hessian.

    Estimator: by `method`:

    - ``"split"``: tr(G) + tr(H - G), the Gauss-Newton part exactly (C passes) and Hutchinson on the rest, with the same
      probes for both products. Best once training has started: the rest is small.
    - ``"xtrace"``, ``"hutchinson"``, ``"exact"``: see `curvlab.trace`.
    - ``"auto"``: split and plain Hutchinson are compared on four pilot probes, which then are not used, and the one with the
      smaller variance serves; XTrace if the loss has no known likelihood, so that tr(G) is not at hand, and where products
      are differences of gradients, since the model may have no second derivative. The note states the
      choice. In a run the choice is made anew at each step.

    Error: a standard error over probes; in a run that of two, whose variance is pooled over steps if the loss has a
    known likelihood. ``"exact"``, and as many products as parameters, are exact.

    Fails: ``"auto"`` and ``"split"`` take C passes for C outputs, at every step: with many classes ask for
    ``"hutchinson"``. Where positive and negative eigenvalues cancel, the error is large against the value, and a
    relative `target` may not be reached. Under batch statistics ``"auto"`` and ``"split"`` are refused.

    Args:
        num_matvecs: products with H, beside the pilot's; default 32, in a run 2. P or more are exact.
        target, budget: as for `interaction_trace`, where probes are sampled (not for XTrace).

    Raises:
        ValueError: an unknown method, or fewer than 2 probes.

    Source: Hutchinson 1989; Epperly et al. 2024 (arXiv 2301.07825) for XTrace.
    """
    probes = default_probes(at, num_matvecs, single=32)
    generator = at.generator("hessian_trace")
    splits = method == "split" or (method == "auto" and at.engine != "differences")  # G needs two derivatives too
    likelihood = splits and fisher_trace(at, exact=True).value is not None
    if method == "split" and not likelihood:
        return missing(
            "the split needs the trace of the GGN: loss='cross_entropy', 'binary_cross_entropy' or 'squared_error'"
        )
    if method in ("xtrace", "hutchinson", "exact") or probes >= at.objective.num_params or not likelihood:
        chosen = str(method)
        if method in ("auto", "split"):
            chosen = "xtrace" if probes >= 4 else "hutchinson"
        found = trace(at.hessian, method=chosen, num_matvecs=probes, generator=generator)  # type: ignore[arg-type]
        return replace(found, note=f"method: {chosen}")
    G = at.shared("ggn", lambda: ggn(at.objective, at.w))
    chosen = str(method)
    if method == "auto":
        Z, HZ, GZ = _images(at, G, 4, generator)
        plain, rest = quadratic_mean(Z, HZ), quadratic_mean(Z, HZ - GZ)
        chosen = "split" if rest.error < plain.error else "hutchinson"
    split = chosen == "split"

    def draw(count: int) -> tuple[Tensor, Tensor]:
        Z, HZ, GZ = _images(at, G if split else None, count, generator)
        return Z, HZ - GZ

    known = float(fisher_trace(at, exact=True).value) if split else 0.0  # type: ignore[arg-type]
    key = ("hessian_trace", chosen)
    found = estimate(at, key, draw, probes=probes, known=known, target=target, budget=budget)
    floor = 16 * torch.finfo(at.objective.dtype).eps * (abs(known) + abs(float(found.value)))  # type: ignore[arg-type]
    note = f"method: {chosen}" + (f"; {found.note}" if found.note else "")
    return replace(found, floor=floor, note=note)


@diagnostic(
    "tr(G)", formula="trace of the generalized Gauss-Newton matrix", kind="exact", cost="C gradients for C outputs"
)
def ggn_trace(at: Snapshot, *, num_matvecs: int = 32) -> Measurement:
    """Trace of the generalized Gauss-Newton matrix, the part of the Hessian that is never negative for convex losses.

    Estimator: exactly, as the Fisher trace, for losses with a known likelihood; otherwise by XTrace.

    Error: a standard error by XTrace.

    Fails: C passes for C outputs, dear with many classes: `fisher_trace` samples the same number. No value where the
    outputs are unknown or no tensor. Refused under batch statistics.

    Args:
        num_matvecs: products of XTrace; unused where the trace is exact.

    Raises:
        ValueError: fewer than 4 products.

    Source: Schraudolph 2002 (doi 10.1162/08997660260028683).
    """
    found = fisher_trace(at, exact=True)
    if found.value is not None:
        return found
    try:
        G = at.shared("ggn", lambda: ggn(at.objective, at.w))
    except TypeError as error:
        return missing(str(error))
    return trace(G, num_matvecs=num_matvecs, generator=at.generator("ggn_trace"))


@diagnostic("density of λ", formula="(1/P) Σ δ(λ - λ_i), smoothed", kind="sem", cost="320 products")
def hessian_density(at: Snapshot, *, num_probes: int = 8, steps: int = 40, points: int = 200) -> Measurement:
    """Density of the Hessian's eigenvalues, over an axis "eigenvalue".

    Estimator: stochastic Lanczos quadrature: `steps` Lanczos steps from each of `num_probes` random vectors, smoothed
    by a Gaussian of 1/100 of the range.

    Error: that of the smoothed density, over probes; what smoothing does is not in it.

    Fails: an outlier far above the bulk sets the range, and blurs the bulk to a hundredth of it. An isolated eigenvalue
    weighs 1/P: draw on a logarithmic scale, and take its place from `hessian_eigenvalues`. In a run nothing is shared
    between steps, and the axis moves with the spectrum.

    Raises:
        ValueError: fewer than 2 probes.

    Source: Ghorbani et al. 2019 (arXiv 1901.10159).
    """
    generator = at.generator("hessian_density")
    found = spectral_density(at.hessian, num_probes=num_probes, steps=steps, grid=points, generator=generator)
    axis = ("eigenvalue", tuple(found.grid.tolist()))
    return Measurement(found.values.numpy(), found.errors.numpy(), "sem", found.df.numpy(), axis=axis)


def _images(
    at: Snapshot, G: LinearOperator | None, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random signs Z and their images H Z and G Z (zero without G), (P, count) each."""
    Z = rademacher((at.objective.num_params, count), at.gradient, generator=generator)
    return Z, at.hessian @ Z, torch.zeros_like(Z) if G is None else G @ Z
