"""Moments of the mini-batch gradient: tr(S_b), Γ = tr(C_1), and the concentration ρ_b. All exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..measurement import Kind, Measurement, missing
from ..operators import noise_share
from ..snapshot import Snapshot
from .registry import diagnostic
from .values import exact

BatchSizes = int | Sequence[int] | None


@diagnostic("tr(S_b)", formula="E‖g_b‖² = (γ/b) tr(S_1) + (1 - γ/b) ‖∇L‖²", kind="exact", cost="1 gradient, shared")
def gradient_second_moment_trace(at: Snapshot, *, batch_size: BatchSizes = None) -> Measurement:
    """Expected squared norm of the mini-batch gradient; for b = 1 (also the default) the mean of ‖g_i‖².

    From exact per-example norms, layer by layer. A sequence of batch sizes gives a curve from the same two traces.

    Source: Lee 2022, eq. 1 and 12.
    """
    return over_batch_sizes(
        at, batch_size if batch_size is not None else at.batch_size or 1, lambda b: second_moment(at, b)
    )


@diagnostic("Γ", formula="tr(C_1) = (1/N) Σ ‖g_i‖² - ‖∇L‖²", kind="exact", cost="1 gradient, shared")
def gradient_variance(at: Snapshot) -> Measurement:
    """Trace of the covariance of per-example gradients; E‖g_b - ∇L‖² is γ/b times this.

    Source: Smith et al. 2021 (arXiv 2101.12176), eq. 22 and 32.
    """
    total = mean_squared_norm(at)
    return exact(total - squared_norm(at), at.objective, scale=total)


@diagnostic("ρ_b", formula="‖∇L‖² / tr(S_b)", kind="exact", cost="1 gradient, shared", needs=["batch_size"])
def gradient_concentration(at: Snapshot, *, batch_size: BatchSizes = None) -> Measurement:
    """How concentrated mini-batch gradients are, 0 to 1; 1 for full batches without replacement.

    Source: Lee 2022, Definition 3 and eq. 12.
    """

    def rho(b: int) -> Measurement:
        total = float(second_moment(at, b).value)  # type: ignore[arg-type]
        return (
            exact(squared_norm(at) / total, at.objective) if total else missing("the gradient of every batch is zero")
        )

    return over_batch_sizes(at, batch_size if batch_size is not None else at.batch_size, rho)


def squared_norm(at: Snapshot) -> float:
    """‖∇L‖² = tr(S_n)."""
    return float(at.gradient.double().square().sum())


def mean_squared_norm(at: Snapshot) -> float:
    """(1/N) Σ ‖g_i‖² = tr(S_1)."""
    return at.shared("mean_squared_norm", lambda: float(at.examples.squared_norms().mean()))


def second_moment(at: Snapshot, b: int) -> Measurement:
    """tr(S_b), exact."""
    share = noise_share(at.objective.size, b, at.replacement)
    total = share * mean_squared_norm(at) if share else 0.0
    return exact(total + (1 - share) * squared_norm(at), at.objective)


def over_batch_sizes(
    at: Snapshot, batch_size: BatchSizes | tuple[int, ...], one: Callable[[int], Measurement]
) -> Measurement:
    """`one(b)` for one batch size, or an array over the axis "batch_size" for several.

    Raises:
        ValueError: no batch size at all.
    """
    if batch_size is None:
        raise ValueError("batch_size is missing; pass batch_size=32, or a sequence of batch sizes")
    if isinstance(batch_size, int):
        return one(batch_size)
    found = [one(int(b)) for b in batch_size]
    without = next((m for m in found if m.value is None), None)
    if without is not None:
        return without
    kind: Kind = next((m.kind for m in found if m.kind != "exact"), "exact")

    def column(name: str) -> np.ndarray:
        return np.array([getattr(m, name) for m in found], dtype=float)

    note = next((m.note for m in found if m.note), None)
    return Measurement(
        column("value"),
        column("error"),
        kind,
        column("df"),
        column("floor"),
        axis=("batch_size", tuple(int(b) for b in batch_size)),
        note=note,
    )
