"""The generalized Gauss-Newton matrix, G = E[J_iᵀ ∇²_z ℓ J_i]: the Hessian without the curvature of the model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..linalg import LinearOperator
from ..objective import Chunk, Objective
from ..self_check import check_outputs
from ..sharded import require_gathered


def ggn(
    L: Objective, w: Tensor | None = None, *, output_hessian: Literal["loss", "identity"] = "loss"
) -> LinearOperator:
    """G(w) = (1/N) Σ_i s_i J_iᵀ (∂²ℓ/∂z²) J_i as a `LinearOperator`, (P, P), J_i the Jacobian of the outputs z.

    H = G + (1/N) Σ s_i Σ_c (∂ℓ/∂z_c) ∇²z_c. G equals H for models that are linear in their parameters, tr(G) = tr(H)
    for piecewise-linear ones, and G is the Fisher for softmax cross-entropy. Exact up to rounding; a product costs
    about two gradients on a graph that is kept as long as it fits in half of the objective's `memory`. Reverse mode
    only, so layers without forward-mode rules work.

    Args:
        output_hessian: ``"identity"`` replaces ∂²ℓ/∂z² by 1: (1/N) Σ_i s_i J_iᵀ J_i, whose non-zero eigenvalues are those of
            the neural tangent kernel J Jᵀ over N (Jacot et al. 2018, arXiv 1806.07572).

    Raises:
        TypeError: outputs that are no tensor, or unknown because a `batch_loss` calls the model itself.
        ValueError: another `output_hessian`, or a Function in the model that cannot be differentiated twice.

    Source: Schraudolph 2002 (doi 10.1162/08997660260028683).
    """
    if output_hessian not in ("loss", "identity"):
        raise ValueError(f"output_hessian is {output_hessian!r}; expected 'loss' or 'identity'")
    require_gathered(L, "products with the GGN")
    check_outputs(L)
    w = L.point(w)
    L.ranks.agree("the point", w)
    chunks, constants = L.pieces(size=L.chunk_size), L.constants()
    keep = L.graphs_that_fit
    graphs: dict[int, _OutputGraph] = {}

    def matmat(V: Tensor) -> Tensor:
        L.ranks.agree("the vectors of a product", V)
        with L.measuring(constants):
            total = torch.zeros_like(V)
            if not V.shape[1]:
                return total
            for i, chunk in enumerate(chunks):
                graph = graphs.get(i) or _OutputGraph(L, w, L.place(chunk), output_hessian)
                if i < keep:
                    graphs[i] = graph
                total += torch.stack([graph.product(v.contiguous()) for v in V.T], 1)
        return L.ranks.sum(total)[0] / L.size

    with (
        L.measuring(),
        torch.no_grad(),
    ):  # an objective without outputs is refused here, not at the first product
        outputs = L.outputs(L.leaves_at(w), L.first(2))
    if not isinstance(outputs, Tensor):
        raise TypeError(f"the model's outputs are a {type(outputs).__name__}; the GGN needs a tensor: wrap the model")
    return LinearOperator(matmat, L.num_params, L.dtype, L.device, name="the GGN")


class _OutputGraph:
    """The outputs of one chunk with their graph, and the gradient of its loss in the outputs with its own."""

    def __init__(self, L: Objective, w: Tensor, chunk: Chunk, output_hessian: str) -> None:
        self.L, self.params = L, L.leaves_at(w)
        self.z = L.outputs(self.params, chunk)
        self.at = self.z.detach().requires_grad_()
        if output_hessian == "loss":
            losses = L.loss(self.at, chunk.batch[1])  # type: ignore[operator]
        else:
            losses = 0.5 * self.at.square().flatten(1).sum(1)
        losses = losses if chunk.weights is None else losses * chunk.weights
        (self.dz,) = torch.autograd.grad(losses.sum(), self.at, create_graph=True)
        # J v by two reverse passes: Jᵀu is linear in u, so its derivative in u applied to v is J v.
        self.u = torch.zeros_like(self.z, requires_grad=True)
        self.Ju = torch.autograd.grad(self.z, self.params, self.u, create_graph=True, allow_unused=True)

    def product(self, v: Tensor) -> Tensor:
        pairs = [(g, part) for g, part in zip(self.Ju, self.L.split(v), strict=True) if g is not None]
        (Jv,) = torch.autograd.grad([g for g, _ in pairs], self.u, [part for _, part in pairs], retain_graph=True)
        if not self.dz.requires_grad:  # a loss linear in the outputs
            return torch.zeros_like(v)
        (HJv,) = torch.autograd.grad(self.dz, self.at, Jv, retain_graph=True)
        found = torch.autograd.grad(self.z, self.params, HJv, retain_graph=True, allow_unused=True)
        return self.L.join([torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found, strict=True)])
