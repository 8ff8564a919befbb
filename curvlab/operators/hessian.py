"""The Hessian of the objective, H = ∇²L(w)."""

from __future__ import annotations

from torch import Tensor

from ..hvp import Engine, HessianProducts
from ..linalg import LinearOperator
from ..objective import Objective


def hessian(
    L: Objective, w: Tensor | None = None, *, engine: Engine = "auto", products: HessianProducts | None = None
) -> LinearOperator:
    """H(w) = (1/N) Σ_i s_i ∇²ℓ_i(w) as a `LinearOperator`, (P, P).

    Products are exact up to rounding (relative 1e-15 in float64, 1e-7 in float32), at kinks of piecewise-linear
    activations as autograd defines them: the curvature of a kink itself is not seen. With ``engine="differences"`` they are
    approximate, and `errors` of the result says by how much.

    Args:
        w: (P,) where; default the model's current parameters, copied now.
        engine: see `curvlab.hvp.HessianProducts`.
        products: already built ones, whose graph is shared.

    Raises:
        ValueError: an unknown engine or a w of another length.

    Source: Pearlmutter 1994 (doi 10.1162/neco.1994.6.1.147).

    Example:
        >>> import torch
        >>> from curvlab import Objective
        >>> L = Objective(torch.nn.Linear(2, 1, bias=False), "squared_error", (torch.eye(2), torch.zeros(2, 1)))
        >>> hessian(L) @ torch.ones(2)
        tensor([0.5000, 0.5000])
    """
    products = products or HessianProducts(L, L.point(w), engine=engine)
    errors, rows = products.errors, L.entries
    return LinearOperator(products.matmat, rows.size, L.dtype, L.device, "the Hessian", errors, rows)
