"""What is true of the matrices of any objective: properties that hold for every model, loss, data and point.

Compared with a reference: relations between independent ways to the same number, on random small models in float64: products
with each other, permuted, repeated and split data, rotated parameters, scaled and summed losses, weighted and repeated
examples, averages over every possible batch. `test_operators.py` compares the same matrices with dense ones.

Every property is a function of drawn values, run on a few examples, and on many in the slow tests.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Attention, CausalAttention, Normalized, Recurrent, TiedEmbedding, TiedLinear, block, split
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlab as cl
from curvlab.per_example import ExampleGradients

FEW, MANY = 6, 250
TOLERANCE = 1e-10
ACTIVATIONS = [nn.Tanh, nn.GELU, nn.ReLU, nn.SiLU, nn.Softplus, nn.ELU, nn.Sigmoid]


# -- problems --------------------------------------------------------------------------------------------------------------


def conv(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2, padding=1, stride=2), activation(), nn.Flatten(), nn.Linear(8, 3))


def frozen(activation: type[nn.Module]) -> nn.Module:
    """Random features: linear in its parameters."""
    model = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


# name -> (model of an activation, shape of an input; None for tokens)
MODELS: dict[str, Any] = {
    "linear": (lambda a: nn.Linear(3, 2), (3,)),
    "linear conv": (lambda a: nn.Sequential(nn.Conv1d(2, 2, 2, bias=False), nn.AvgPool1d(2), nn.Flatten()), (2, 3)),
    "features": (frozen, (3,)),
    "mlp": (lambda a: nn.Sequential(nn.Linear(3, 4), a(), nn.Linear(4, 3)), (3,)),
    "deep": (lambda a: nn.Sequential(nn.Linear(2, 3), a(), nn.Linear(3, 3, bias=False), a(), nn.Linear(3, 2)), (2,)),
    "conv": (conv, (1, 3, 3)),
    "attention": (lambda a: Attention(), (2, 4)),
    "causal": (lambda a: CausalAttention(), (3, 4)),
    "layer norm": (lambda a: Normalized(), (4,)),
    "recurrent": (lambda a: Recurrent(nn.GRU), (2, 2)),
    "tied": (lambda a: TiedLinear(), (4,)),
    "tied embedding": (lambda a: TiedEmbedding(), None),
}
LINEAR = ["linear", "linear conv", "features"]


def margin(z: Tensor, y: Tensor) -> Tensor:
    """A smooth loss of the user's own, whose output Hessian is neither constant nor positive."""
    return torch.log1p((z - y).square()).sum(1)


class Twice(nn.Module):
    """A loss of the user's own that is a module, with a number that is no parameter."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.softplus(-2 * z * y).sum(1)


NAMED = ["cross_entropy", "squared_error", "binary_cross_entropy"]  # with a likelihood
LOSSES: dict[str, Any] = {name: name for name in NAMED} | {"margin": margin, "module": Twice()}


@dataclass(frozen=True)
class Drawn:
    """A model with its loss, data and a point."""

    model: nn.Module
    loss: Any
    x: Tensor
    y: Tensor
    w: Tensor
    V: Tensor
    weights: Tensor | None = None
    description: str = ""

    def __repr__(self) -> str:
        return self.description

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def examples(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    def objective(self, **options: Any) -> cl.Objective:
        return cl.Objective(self.model, self.loss, self.examples, **{"weights": self.weights, **options})

    def picked(self, index: Any) -> Drawn:
        """Of some of the examples, in this order."""
        return replace(
            self, x=self.x[index], y=self.y[index], weights=None if self.weights is None else self.weights[index]
        )


def drawn(
    kind: str, activation: type[nn.Module], loss: str, n: int, seed: int, spread: float = 0.5, weighted: bool = False
) -> Drawn:
    """`spread`: of the point around the initialization; of a whole 3 outputs saturate."""
    make, shape = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = make(activation).double()
        x = torch.randint(6, (n, 3)) if shape is None else torch.randn(n, *shape).double()
        z = model(x).detach()
        targets = {
            "cross_entropy": lambda: torch.randint(z.shape[1], (n,)),
            "binary_cross_entropy": lambda: torch.randint(2, z.shape).double(),
            "module": lambda: torch.randint(2, z.shape).double() * 2 - 1,
        }
        y = targets.get(loss, lambda: torch.randn(z.shape).double())()
        weights = torch.rand(n).double() + 0.1 if weighted else None
        w = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        w = w + spread * torch.randn(len(w)).double()
    names = f"{kind!r}, nn.{activation.__name__}, {loss!r}, {n}, {seed}, {spread}, {weighted}"
    return Drawn(model, LOSSES[loss], x, y, w, block(len(w), 3, seed), weights, f"drawn({names})")


def problems(
    kinds: Any = tuple(MODELS), losses: Any = tuple(LOSSES), weighted: Any = (False, True), most: int = 6
) -> Any:
    """Random problems. Hypothesis chooses kinds and sizes; numbers come from the seed, so that no kink is hit exactly."""
    return st.builds(
        drawn,
        st.sampled_from(kinds),
        st.sampled_from(ACTIVATIONS),
        st.sampled_from(losses),
        st.integers(1, most),
        st.integers(0, 2**20),
        st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]),
        st.sampled_from(weighted),
    )


SAMPLING = st.tuples(st.integers(0, 30), st.booleans())


def batch_of(sampling: tuple[int, bool], n: int) -> tuple[int, bool]:
    """A batch size that `n` examples have, and whether it is drawn with replacement, which allows more."""
    raw, replacement = sampling
    return 1 + raw % (2 * n + 1 if replacement else n), replacement


def matrices(L: cl.Objective, w: Tensor, b: int, replacement: bool) -> dict[str, cl.LinearOperator]:
    moment = {"batch_size": b, "replacement": replacement}
    found = {
        "hessian": cl.hessian(L, w),
        "ggn": cl.ggn(L, w),
        "second_moment": cl.gradient_second_moment(L, w, **moment),
        "covariance": cl.gradient_covariance(L, w, **moment),
    }
    return found | ({"fisher": cl.fisher(L, w)} if getattr(L.loss, "__name__", "") in NAMED else {})


def scales(d: Drawn) -> dict[str, float]:
    """Sizes of what the entries of each matrix are made of: of saturated outputs they nearly cancel."""
    L = d.objective()
    G = L.example_gradients(d.w)
    moment = float(G.square().sum(1).mean())
    jacobian = float(torch.linalg.norm(cl.ggn(L, d.w, output_hessian="identity") @ d.V))
    curvature = jacobian + float(torch.linalg.norm(cl.hessian(L, d.w) @ d.V)) + float(G.norm(dim=1).mean())
    return {
        "value": 1 + float(L.value(d.w)), "gradient": float(G.norm(dim=1).mean()) + 1e-300,
        "hessian": curvature, "ggn": curvature, "fisher": curvature, "second_moment": moment, "covariance": moment,
        "squared_norms": moment,
    }  # fmt: skip


def check(found: Any, expected: Any, scale: float, what: Any = "") -> None:
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    off = float(torch.linalg.norm(found - expected))
    assert off <= TOLERANCE * (scale + 1e-280), f"{what}: off by {off:.3g} on a scale of {scale:.3g}"


def everything(L: cl.Objective, d: Drawn, b: int, replacement: bool) -> dict[str, Tensor]:
    """Loss, gradient, squared norms of example gradients in the order of the data, and products with each matrix."""
    products = {name: A @ d.V for name, A in matrices(L, d.w, b, replacement).items()}
    return {"value": L.value(d.w), "gradient": L.gradient(d.w), **products}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], d: Drawn, powers: Any = None, c: float = 1.0) -> None:
    """Each result is `c` to its power (default 0) times the expected one."""
    size = scales(d)
    assert found.keys() == expected.keys()
    for name in found:
        factor = c ** (powers or {}).get(name, 0)
        check(found[name], factor * expected[name], factor * size[name], name)


# -- the harness -----------------------------------------------------------------------------------------------------------

PROPERTIES: list[Any] = []


def of(*strategies: Any, examples: Any = (), **named: Any) -> Any:
    """Enter a property that is to hold for all that the strategies draw; `examples` of it once failed."""

    def enter(function: Any) -> Any:
        wrapped = given(*strategies, **named)(function)
        for arguments in examples:
            wrapped = example(*arguments)(wrapped)
        PROPERTIES.append(wrapped)
        return function

    return enter


# -- matrices --------------------------------------------------------------------------------------------------------------


@of(problems(), SAMPLING)
def matrices_are_symmetric_and_linear(d, sampling):
    size = scales(d)
    U = block(len(d.w), 3, seed=7)
    for name, A in matrices(d.objective(), d.w, *batch_of(sampling, d.n)).items():
        check(U.T @ (A @ d.V), (A @ U).T @ d.V, size[name], name)
        check(A @ (2.5 * U - d.V), 2.5 * (A @ U) - A @ d.V, size[name], name)
        check(A @ U[:, 0], (A @ U)[:, 0], size[name], name)


@of(
    problems(kinds=["linear", "linear conv", "mlp", "deep"], weighted=[False]),
    SAMPLING,
    examples=[(drawn("deep", nn.GELU, "cross_entropy", 1, 260, 3.0, False), (16, True))],  # a loss of 0
)
def traces_are_sums_of_eigenvalues(d, sampling):
    for name, A in matrices(d.objective(), d.w, *batch_of(sampling, d.n)).items():
        size = scales(d)[name] + float(torch.linalg.norm(D := cl.dense(A)))
        values = cl.eigsh(A, len(d.w), tol=1e-12, generator=torch.Generator().manual_seed(0)).values
        check(values.sum(), D.trace(), size, name)
        check(values, torch.linalg.eigvalsh(D).flip(0), size, name)
        check(cl.trace(A, method="exact").value, values.sum(), size, name)


@of(problems(kinds=LINEAR, losses=["squared_error"]))
def the_ggn_of_a_linear_model_with_squared_error_is_the_hessian(d):
    L = d.objective()
    check(cl.ggn(L, d.w) @ d.V, cl.hessian(L, d.w) @ d.V, scales(d)["ggn"])


@of(
    problems(losses=NAMED),
    examples=[(drawn("layer norm", nn.Tanh, "cross_entropy", 1, 1, 3.0, True),)],  # a loss of 7e-12
)
def the_fisher_is_the_ggn_and_neither_is_negative(d):
    L, size = d.objective(), scales(d)["ggn"]
    product = cl.ggn(L, d.w) @ d.V
    check(cl.fisher(L, d.w) @ d.V, product, size)
    assert float(torch.linalg.eigvalsh(d.V.T @ product)[0]) >= -TOLERANCE * size


# -- the loss --------------------------------------------------------------------------------------------------------------

FIRST_POWER = {"value": 1, "gradient": 1, "hessian": 1, "ggn": 1, "second_moment": 2, "covariance": 2}


@of(problems(), SAMPLING, st.sampled_from([1e-6, 0.3, 7.0, 1e6]))
def a_scaled_loss_scales_what_is_measured(d, sampling, c):
    b = batch_of(sampling, d.n)
    loss = d.objective().loss
    plain = everything(replace(d, loss=lambda z, y: loss(z, y)).objective(), d, *b)
    scaled = everything(replace(d, loss=lambda z, y: c * loss(z, y)).objective(), d, *b)
    same(scaled, plain, d, FIRST_POWER, c)


@of(problems(), st.sampled_from([(1.0, 1.0), (2.0, -3.0), (0.0, 1.5)]))
def a_sum_of_losses_has_the_sum_of_their_gradients_and_curvatures(d, factors):
    first, (p, q) = d.objective().loss, factors

    def second(z, y):
        return (z.sin() * torch.arange(1, z.shape[1] + 1)).sum(1)

    losses = first, second, lambda z, y: p * first(z, y) + q * second(z, y)
    parts = [everything(replace(d, loss=loss).objective(), d, d.n, False) for loss in losses]
    size = scales(d)
    for name in ("value", "gradient", "hessian", "ggn"):
        scale = 10 * (size[name] + float(torch.linalg.norm(parts[1][name])) + size["hessian"])
        check(parts[2][name], p * parts[0][name] + q * parts[1][name], scale, name)


# -- the data --------------------------------------------------------------------------------------------------------------


@of(problems(), SAMPLING, st.randoms(use_true_random=False))
def the_order_of_the_examples_does_not_matter(d, sampling, rng):
    order = torch.tensor(rng.sample(range(d.n), d.n))
    b = batch_of(sampling, d.n)
    same(everything(d.picked(order).objective(), d, *b), everything(d.objective(), d, *b), d)
    norms = [ExampleGradients(e.objective(), d.w).squared_norms() for e in (d, d.picked(order))]
    check(norms[1], norms[0][order], scales(d)["squared_norms"])


@of(problems(most=4), st.integers(1, 9), st.integers(2, 3))
def data_that_are_repeated_are_the_same_data_if_batches_are_drawn_with_replacement(d, b, times):
    repeated = d.picked(torch.arange(d.n).repeat(times))
    found, expected = everything(repeated.objective(), d, b, True), everything(d.objective(), d, b, True)
    same(found, expected, d)
    b = min(b, d.n)  # without replacement more copies allow more noise
    S, more = (cl.gradient_covariance(e.objective(), d.w, batch_size=b) @ d.V for e in (d, repeated))
    n, N = d.n, d.n * times
    if n > 1:
        check(more * (n - b) / (n - 1), S * (N - b) / (N - 1), scales(d)["covariance"])


@of(
    problems(most=8),
    SAMPLING,
    st.lists(st.integers(1, 4), min_size=1, max_size=8),
    st.integers(1, 8),
    st.sampled_from([None, 2000, 20_000]),
)
def the_split_into_batches_and_chunks_does_not_matter(d, sampling, sizes, chunk_size, memory):
    """Given as batches of these sizes, evaluated so many at once, with graphs kept for all, some or none of the chunks."""
    ends = [e for e in itertools.accumulate(sizes) if e < d.n] + [d.n]
    cuts = [e - s for s, e in zip([0, *ends], ends, strict=False)]
    options = {"weights": d.weights, "chunk_size": chunk_size, "memory": memory}
    L = cl.Objective(d.model, d.loss, split(d.examples, cuts), **options)
    b = batch_of(sampling, d.n)
    same(everything(L, d, *b), everything(d.objective(), d, *b), d)
    norms = [ExampleGradients(e, d.w).squared_norms() for e in (d.objective(), L)]
    check(norms[1], norms[0], scales(d)["squared_norms"])


@of(problems(most=4, weighted=[False]), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def a_weight_of_two_is_the_example_twice(d, counts):
    """In loss, gradient, Hessian, GGN and Fisher. Not in moments: a batch may have one of the two without the other."""
    counts = torch.tensor(counts)[: d.n]
    counts[0] += int(counts.sum() == 0)
    weighted = replace(d, weights=counts.double())
    found = everything(weighted.objective(), d, 1, False)
    repeated = d.picked(torch.repeat_interleave(torch.arange(d.n), counts))
    expected = everything(repeated.objective(), d, 1, False)
    moments = ("second_moment", "covariance")
    size = scales(d)
    for name in found.keys() - moments:
        check(found[name], expected[name], 4 * size[name], name)  # weights up to 4 times their mean


# -- moments of the gradient -----------------------------------------------------------------------------------------------


@of(problems(), SAMPLING)
def second_moments_depend_on_the_batch_size_as_they_should(d, sampling):
    """S_b = S_n + C_b, C_b = (γ/b) C_1, both positive semidefinite, and their limits."""
    L, size, n = d.objective(), scales(d)["second_moment"], d.n
    b, replacement = batch_of(sampling, n)
    g = L.gradient(d.w)
    full = torch.outer(g, g) @ d.V

    def moments(b, replacement):
        A = matrices(L, d.w, b, replacement)
        return A["second_moment"] @ d.V, A["covariance"] @ d.V

    S, C = moments(b, replacement)
    for M in (S, C):
        assert float(torch.linalg.eigvalsh(d.V.T @ M)[0]) >= -TOLERANCE * size
    check(S, full + C, size)
    gamma = 0.0 if n == 1 else 1.0 if replacement else (n - b) / (n - 1)
    check(C, gamma / b * moments(1, True)[1], size)
    check(moments(1, True)[0], moments(1, False)[0], size)
    check(moments(n, False)[0], full, size)
    check(moments(n, False)[1], 0 * full, size)
    check(moments(n, True)[1], moments(1, True)[1] / n, size)
    traces = cl.measure(L, ["gradient_second_moment_trace"], w=d.w, batch_size=b, replacement=replacement)
    rows = L.example_gradients(d.w)
    spread = (rows - g).square().sum(1).mean()
    check(traces["gradient_second_moment_trace"].value, g @ g + gamma / b * spread, size)


@of(problems(most=4), SAMPLING)
def formulas_of_the_interaction_trace_agree(d, sampling):
    """tr(H S_b): by dense matrices; by example gradients (eq. 4 of Lee); over every possible batch; as it is measured."""
    L, n = d.objective(), d.n
    b, replacement = batch_of(sampling, n)
    b = min(b, 4)
    H = cl.dense(cl.hessian(L, d.w))
    S = cl.dense(cl.gradient_second_moment(L, d.w, batch_size=b, replacement=replacement))
    size = float(torch.linalg.norm(H) * torch.linalg.norm(S)) + scales(d)["hessian"] * scales(d)["second_moment"]
    trace = float((H * S).sum())
    rows, g = L.example_gradients(d.w), L.gradient(d.w)
    share = 0.0 if n == 1 else (1.0 if replacement else (n - b) / (n - 1)) / b
    check(share * float(((rows @ H) * rows).sum(1).mean()) + (1 - share) * float(g @ H @ g), trace, size)
    batches = itertools.product(range(n), repeat=b) if replacement else itertools.combinations(range(n), b)
    gradients = torch.stack([L.gradient(d.w, torch.tensor(batch)) for batch in batches])
    check(((gradients @ H) * gradients).sum(1).mean(), trace, size)
    found = cl.measure(L, ["interaction_trace"], w=d.w, batch_size=b, replacement=replacement)["interaction_trace"]
    assert found.kind == "exact"
    check(found.value, trace, size)


# -- parameters ------------------------------------------------------------------------------------------------------------


class Rotated(nn.Module):
    """The same model with parameters u, w = Q u."""

    def __init__(self, model: nn.Module, Q: Tensor, w: Tensor) -> None:
        super().__init__()
        self.kept = [model]  # in a list: its own parameters are none of this module's
        self.register_buffer("Q", Q)
        self.u = nn.Parameter(Q.T @ w)

    def forward(self, x: Tensor) -> Tensor:
        own = {name: p for name, p in self.kept[0].named_parameters() if p.requires_grad}
        parts = (self.Q @ self.u).split([p.numel() for p in own.values()])
        state = {name: part.view_as(p) for part, (name, p) in zip(parts, own.items(), strict=True)}
        return torch.func.functional_call(self.kept[0], state, (x,))


@of(problems(kinds=[k for k in MODELS if k not in ("attention", "recurrent")], most=4), SAMPLING)
def rotated_parameters_have_the_same_eigenvalues(d, sampling):
    """Also the layer-wise rules, against vmap: one vector of all parameters belongs to no layer."""
    P = len(d.w)
    Q = torch.linalg.qr(block(P, P, seed=3)).Q
    b = batch_of(sampling, d.n)
    L = d.objective()
    R = replace(d, model=Rotated(d.model, Q, d.w), w=Q.T @ d.w)
    LR, size = R.objective(), scales(d)
    check(LR.value(R.w), L.value(d.w), size["value"])
    check(Q @ LR.gradient(R.w), L.gradient(d.w), size["gradient"])
    dense = {}
    for name, A in matrices(L, d.w, *b).items():
        D, E = cl.dense(A), cl.dense(matrices(LR, R.w, *b)[name])
        scale = size[name] + float(torch.linalg.norm(D))
        check(Q @ E @ Q.T, D, scale, name)
        check(torch.linalg.eigvalsh(E), torch.linalg.eigvalsh(D), scale, name)
        dense[name] = D, scale
    (_, h), (_, s) = dense["hessian"], dense["second_moment"]
    options = {"batch_size": b[0], "replacement": b[1]}
    found, expected = (
        cl.measure(M, ["interaction_trace", "gradient_variance"], w=w, **options) for M, w in ((LR, R.w), (L, d.w))
    )
    check(found["interaction_trace"].value, expected["interaction_trace"].value, h * s)
    check(found["gradient_variance"].value, expected["gradient_variance"].value, s)


# -- the tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("property", PROPERTIES, ids=lambda f: f.__name__)
def test_property(property, examples):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": quiet}
    phases = [Phase.explicit, Phase.generate]  # a problem that fails is small already
    settings(max_examples=examples, phases=phases, **options)(property)()
