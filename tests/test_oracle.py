"""Every quantity on a grid of models, precisions and chunkings, against dense float64 references.

Compared with a reference: gradients, per-example norms, products with H, G, F, S_b and C_b, and every registered diagnostic
in its exact mode, with the definitions of `curvlab.references` for a float64 model of the same (rounded) parameters and
data. The Hessians of those references are themselves compared with the ones of `cases.py`. Batches are of one example, of
which there are so few that all are used. NO_EXACT_MODE lists the diagnostics that remain estimates; `test_diagnostics.py`
has them within their errors.

Errors are relative to the size of what is added up: ‖H‖ for eigenvalues, ‖H‖ tr(S_b) for traces of products, the terms of
a difference for the difference. What is made of eigenvectors moves by ‖H‖/gap times the error of H.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME, CHUNKINGS, Problem, Reference, block, cast, pick
from torch import Tensor

import curvlab as cl
from curvlab.diagnostics import DIAGNOSTICS, evaluate, parse
from curvlab.losses import BatchLoss
from curvlab.per_example import ExampleGradients
from curvlab.references import DEFINITIONS, Dense, accurate
from curvlab.verification import TWO_POINTS

MODELS = [
    "mlp_tanh_cross_entropy", "mlp_relu_squared_error", "mlp_gelu_cross_entropy", "linear", "several_labels", "weighted",
    "cnn_1d", "normalized_cnn", "sequence", "layer_norm", "batch_norm", "tied_linear", "tied_embedding", "frozen",
    "multihead_attention", "scaled_dot_product_attention", "gru", "lstm", "dict_batch",
]  # fmt: skip
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-6}  # bfloat16 models are measured in float32
MATVECS = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 1e-6}  # residuals at which solvers stop
NO_EXACT_MODE = {"expected_loss_difference", "layer_hessian_trace", "hessian_density"}
NO_EXACT_MODE |= {"critical_sharpness", "difference_sharpness"}  # by differences of losses
NO_EXACT_MODE |= {"fisher_trace_penalty", "sampled_gradient_norm_penalty", "unit_jacobian_penalty"}  # which draw
LR, B = 0.3, 1


@dataclass(frozen=True)
class Cell:
    """A model in a precision: what curvlab measures, and the same rounded numbers in float64."""

    name: str
    precision: str

    @cached_property
    def given(self) -> Problem:
        """The problem in its own precision, at parameters that are not those of the initialization."""
        problem, dtype = BY_NAME[self.name].build(0), PRECISIONS[self.precision]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in problem.model.parameters():
                p.copy_(p.float() + 0.1 * torch.randn(p.shape, generator=generator))  # exact in float32
        return replace(problem, model=problem.model.to(dtype), data=cast(problem.data, dtype))

    @cached_property
    def exact(self) -> Problem:
        double = copy.deepcopy(self.given.model).double()
        return replace(self.given, model=double, data=cast(self.given.data, torch.float64))

    @cached_property
    def dense(self) -> Dense:
        p = self.exact
        L, held_out = (cl.Objective(p.model, p.loss, data, weights=w) for data, w in ((p.data, p.weights), self.test(p)))
        return Dense(L, held_out, lr=LR)

    def test(self, p: Problem) -> tuple[Any, Tensor | None]:
        return pick(p.data, slice(0, 4)), None if p.weights is None else p.weights[:4]

    def objectives(self, chunk_size: int | None) -> tuple[cl.Objective, cl.Objective]:
        """What is measured, and the held-out data."""
        p, own = self.given, None if self.precision == "float64" else torch.float32
        made = [
            cl.Objective(p.model, p.loss, data, weights=weights, chunk_size=chunk_size, dtype=own, check="never")
            for data, weights in ((p.data, p.weights), self.test(p))
        ]
        return made[0], made[1]


@cache
def cell(name: str, precision: str) -> Cell:
    return Cell(name, precision)


# -- the size of what is added up ----------------------------------------------------------------------------------


def size(A: Tensor) -> float:
    return float(torch.linalg.norm(A, 2)) if A.ndim == 2 else float(torch.linalg.norm(A))


def gap(d: Dense, k: int = 1, A: Tensor | None = None) -> float:
    """‖A‖/(λ_k - λ_{k+1}), by which an error of A is multiplied in the space of its k top eigenvectors."""
    values = (d.eigenvalues if A is None else torch.linalg.eigvalsh(A)).flip(0)
    return float(values.abs().max() / (values[k - 1] - values[k])) if k < len(values) else 1.0


def noise(d: Dense) -> float:
    """‖g_i‖ over ‖∇L‖, by which an error of the g_i is multiplied in ∇L."""
    return max(1.0, float(d.G.square().sum(1).mean().sqrt() / d.g.norm()))


def secant(d: Dense) -> float:
    step = d.w - d.w_before()
    slope = d.gradient_at(d.w_before()) @ step
    return float(2 * (d.value(d.w).abs() + d.value(d.w_before()).abs() + slope.abs()) / (step @ step))


S1: Callable[[Dense], float] = lambda d: float(d.G.square().sum(1).mean())  # noqa: E731
SIZES: dict[str, Callable[[Dense], float]] = {
    "sharpness": lambda d: size(d.H),
    "hessian_eigenvalues": lambda d: size(d.H),
    "hessian_trace": lambda d: float(d.eigenvalues.abs().sum()),
    "ggn_trace": lambda d: float(d.ggn_trace()),
    "layer_sharpness": lambda d: size(d.H),
    "interaction_trace": lambda d: size(d.H) * S1(d),
    "interaction_sharpness": lambda d: size(d.H),
    "instability": lambda d: size(d.H) * S1(d) / float(d.g @ d.g) * noise(d),
    "batch_sharpness": lambda d: max(size(H) for H in d.example_hessians),
    "batch_sharpness_of_means": lambda d: max(size(H) for H in d.example_hessians),
    "directional_sharpness": lambda d: max(size(H) for H in d.hessians_along_step),
    "preconditioned_sharpness": lambda d: size(d.H) / float(d.divisor().min()),
    "secant_sharpness": secant,
    "gradient_variance": S1,
    "gradient_norm": lambda d: S1(d) ** 0.5,
    "gradient_noise_scale": lambda d: S1(d) / float(d.g @ d.g) * noise(d),
    "gradient_concentration": lambda d: noise(d),
    "gradient_cosine": lambda d: noise(d),
    "implicit_regularizer_mean": S1,
    "implicit_regularizer_variance": S1,
    "gradient_norm_penalty": S1,
    "gradient_norm_difference_penalty": S1,
    "sampled_gradient_norm_penalty": S1,
    "layer_gradient_norm": lambda d: S1(d) ** 0.5,
    "gradient_alignment": lambda d: gap(d) * noise(d),
    "directional_alignment": lambda d: max(gap(d, A=H) for H in (d.H, *d.hessians_along_step)),
    "example_gradient_cosine": lambda d: 1 / (d.n - 1),  # what is taken from the squared sum of N unit vectors
    "gradient_top_share": lambda d: gap(d, d.k) * noise(d),
    "batch_gradient_top_share": lambda d: gap(d, d.k),
}


# -- the quantities ------------------------------------------------------------------------------------------------


def operators(c: Cell, L: cl.Objective) -> dict[str, float]:
    """Errors of products, gradients and per-example norms."""
    d, w, V = c.dense, L.params(), block(L.num_params)
    S, g = d.S(B, False), d.g
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {
        "value": (L.value(w), d.value(d.w), float(d.value(d.w))),
        "gradient": (L.gradient(w), g, S1(d) ** 0.5),
        "example gradients": (L.example_gradients(w), d.G, size(d.G)),
        "example norms": (ExampleGradients(L, w).squared_norms(), d.G.square().sum(1), float(d.G.square().sum(1).max())),
    }
    products: dict[str, tuple[Any, Tensor, Tensor]] = {
        f"H {engine}": (cl.hessian(L, w, engine=engine), d.H, d.H)
        for engine in ("graph", "double_backward", "forward_over_reverse")
    }
    products["S_b"] = cl.gradient_second_moment(L, w, batch_size=B), S, S
    products["C_b"] = cl.gradient_covariance(L, w, batch_size=B), d.covariance(), S
    if not isinstance(L.loss, BatchLoss):
        G = sum(s * J.T @ hessian @ J for s, J, hessian in zip(d.scale, d.jacobian, output_hessians(d), strict=True)) / d.n
        products["G"] = cl.ggn(L, w), G, G
        products["F"] = cl.fisher(L, w), G, G
    for name, (A, dense, scale) in products.items():
        pairs[name] = A @ V.to(L.dtype), dense @ V, size(scale) * float(V.norm())
    return {name: size((found.double() - truth).flatten()) / scale for name, (found, truth, scale) in pairs.items()}


def output_hessians(d: Dense) -> list[Tensor]:
    found = []
    for i in range(d.n):
        loss, z = d.of_outputs(i)
        found.append(torch.func.jacfwd(torch.func.grad(loss))(z))
    return found


def diagnostics(c: Cell, L: cl.Objective, test: cl.Objective, names: list[str]) -> tuple[dict[str, float], set[str]]:
    """Errors of diagnostics, and those that were estimates."""
    d, dtype = c.dense, L.dtype
    at = cl.Snapshot(
        L, L.params(), step=1, batch_size=B, lr=LR, test=test, batch_gradient=d.drawn.to(dtype),
        preconditioner=d.divisor().to(dtype),
    )  # fmt: skip
    errors, estimates = {}, set()
    for name in names:
        carry: dict[Any, Any] | None = None
        if name in TWO_POINTS:
            carry = {}
            before = replace(at, w=d.w_before().to(dtype), step=0, batch_gradient=d.G[0].to(dtype), carry=carry)
            evaluate(before.anew(), parse([name]))
        try:
            m = evaluate(at.anew(carry=carry), parse([(name, options(d, name, c.precision))]))[name]
            truth = None if m.value is None else DEFINITIONS[name](d, B, False).detach().numpy()
        except TypeError:  # quantities of outputs, of a loss that hides them
            assert isinstance(L.loss, BatchLoss), name
            continue
        if m.kind == "sem":
            estimates.add(name)
        elif truth is not None:
            scale = SIZES[name](d) if name in SIZES else float(np.abs(truth).max())
            error = float(np.abs(np.asarray(m.value) - truth).max())
            errors[name] = error / scale if scale else error
    return errors, estimates


def options(d: Dense, name: str, precision: str) -> dict[str, Any]:
    chosen = dict(accurate(d).get(name, {}))
    if "tol" in chosen:
        chosen["tol"] = MATVECS[precision]
    exact = {"hessian_trace": {"method": "exact"}, "fisher_trace": {"exact": True}}
    return exact.get(name, chosen)


def check(name: str, precision: str, chunking: str, names: list[str]) -> dict[str, float]:
    c = cell(name, precision)
    L, test = c.objectives(CHUNKINGS[chunking])
    errors, estimates = diagnostics(c, L, test, names)
    errors |= operators(c, L)
    assert estimates <= NO_EXACT_MODE
    wrong = {what: error for what, error in errors.items() if not error <= TOLERANCE[precision]}
    assert not wrong
    return errors


EXACT = [name for name in DEFINITIONS if name not in NO_EXACT_MODE]


def test_every_diagnostic_is_in_the_grid():
    assert set(EXACT) | NO_EXACT_MODE == set(DIAGNOSTICS)
    assert len(MODELS) >= 12


@pytest.mark.parametrize(
    "name, precision, chunking",
    [("layer_norm", "float64", "uneven"), ("weighted", "float32", "single"), ("sequence", "bfloat16", "whole")],
)
def test_a_slice_of_the_grid(name, precision, chunking):
    check(name, precision, chunking, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_grid(name, precision, chunking, record_property):
    for what, error in check(name, precision, chunking, EXACT).items():
        record_property(what, error)


@pytest.mark.parametrize("name", ["layer_norm", pytest.param("gru", marks=pytest.mark.slow)])
def test_the_references_agree(name):
    """The Hessians and gradients of the package's references with those that share no code with it."""
    c = cell(name, "float64")
    reference = Reference(c.exact, forward_mode=BY_NAME[name].forward_mode, perturb=0.0)
    assert size(c.dense.H - reference.hessian) < 1e-12 * size(c.dense.H)
    assert size(c.dense.G - reference.rows) < 1e-12 * size(c.dense.G)


