"""Regularizers, and the gradient of a batch by micro-batches.

Compared with a reference: value and gradient of every penalty with the paper's formula over dense gradients and Hessians
in float64 (rows of double backward, checked by finite differences on a net with LayerNorm), expectations over draws with
their closed forms, penalized training with a loop of torch alone. The rest is behaviour: memory, traces, refusals.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, DOUBLE, OUTPUT_HESSIANS, Attention, Normalized, Reference, classes, inputs, off, supervised
from torch import Tensor, nn

import curvlab as cl
from curvlab.batch_gradient import BatchGradient
from curvlab.regularizers import REGULARIZERS

SIZES = [1, 4, 100]  # 4 leaves a smaller last one
CASES = ["layer_norm", "several_labels", "weighted", "unused_parameters", "linear"]
EXACT = [name for name in REGULARIZERS if name != "gradient_norm_difference_penalty"]
DRAWING = [name for name, entry in REGULARIZERS.items() if entry.draws]


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the formulas ----------------------------------------------------------------------------------------------------


def row_of(x: Tensor, w: Tensor) -> Tensor:
    """∂x/∂w, zero where x is a constant."""
    found = torch.autograd.grad(x, w, retain_graph=True, allow_unused=True)[0] if x.requires_grad else None
    return torch.zeros_like(w) if found is None else found


class Dense:
    """Gradients and Hessians of scalar functions of the examples of a case, one example at a time."""

    def __init__(self, name: str) -> None:
        self.problem = BY_NAME[name].build(0)
        self.reference = Reference(self.problem)
        self.w, self.n, self.scale = self.reference.w, self.problem.size, self.reference.scale
        self.L = self.problem.objective()

    def outputs(self, w: Tensor) -> Tensor:
        return self.reference.call(w)(self.problem.data[0]).reshape(self.n, -1)

    def derivatives(self, scalars: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients (n, P) and Hessians (n, P, P) of s_i φ_i, for scalars(w) = φ (n,)."""
        w = self.w.clone().requires_grad_()
        G, H = [], []
        for value in self.scale * scalars(w):
            (g,) = torch.autograd.grad(value, w, create_graph=True)
            rows = [row_of(x, w) for x in g]
            G.append(g.detach())
            H.append(torch.stack(rows))
        return torch.stack(G), torch.stack(H)

    @cache  # noqa: B019
    def of_loss(self) -> tuple[Tensor, Tensor]:
        return self.derivatives(self.reference.losses)

    def parts(self, size: int) -> list[slice]:
        return [slice(lo, min(lo + size, self.n)) for lo in range(0, self.n, size)]


def mean_squares(d: Dense, size: int, G: Tensor, H: Tensor, parts: list[slice] | None = None) -> tuple[Tensor, Tensor]:
    """mean_M ‖∇φ_M‖² and its gradient mean_M 2 ∇²φ_M ∇φ_M."""
    value, gradient = torch.zeros((), dtype=DOUBLE), torch.zeros(len(d.w), dtype=DOUBLE)
    for part in parts or d.parts(size):
        share = len(G[part]) / (d.n if parts is None else len(G[part]))
        g, h = G[part].mean(0), H[part].mean(0)
        value, gradient = value + share * g @ g, gradient + share * 2 * h @ g
    return value, gradient


def labels(d: Dense, size: int) -> Tensor:
    """The labels that the model draws, micro-batch by micro-batch from one generator."""
    z, draw, found = d.outputs(d.w), seeded(), []
    for part in d.parts(size):
        m = z[part]
        if d.problem.loss == "cross_entropy":
            for p, u in zip(m.softmax(1), torch.rand(len(m), dtype=DOUBLE, generator=draw), strict=True):
                found.append(next(c for c in range(len(p)) if u < p[: c + 1].sum() or c == len(p) - 1))
        elif d.problem.loss == "binary_cross_entropy":
            found += (torch.rand(m.shape, dtype=DOUBLE, generator=draw) < 1 / (1 + (-m).exp())).double()
        else:
            found += m + torch.randn(m.shape, dtype=DOUBLE, generator=draw)
    return torch.stack(found) if isinstance(found[0], Tensor) else torch.tensor(found)


def fisher(d: Dense, size: int) -> tuple[Tensor, Tensor]:
    drawn = labels(d, size)
    relabelled = (d.problem.data[0], drawn)
    return mean_squares(d, size, *d.derivatives(lambda w: d.reference.losses(w, relabelled)))


def average_jacobian(d: Dense, size: int) -> tuple[Tensor, Tensor]:
    return mean_squares(d, size, *d.derivatives(lambda w: d.outputs(w).sum(1) / d.outputs(w).shape[1]))


def unit_jacobian(d: Dense, size: int) -> tuple[Tensor, Tensor]:
    draw, directions = seeded(), torch.zeros_like(d.outputs(d.w))
    for part in d.parts(size):
        u = torch.randn(directions.shape[1], dtype=DOUBLE, generator=draw)
        directions[part] = u / (u @ u).sqrt()
    return mean_squares(d, size, *d.derivatives(lambda w: (d.outputs(w) * directions).sum(1)))


def sampled(d: Dense, size: int) -> tuple[Tensor, Tensor]:
    parts = d.parts(size)
    drawn = parts[int(torch.randint(len(parts), (), generator=seeded()))]
    return mean_squares(d, size, *d.of_loss(), parts=[drawn])


def quarter(d: Dense, size: int, function=mean_squares) -> tuple[Tensor, Tensor]:
    value, gradient = function(d, size, *d.of_loss())
    return value / 4, gradient / 4


def spread(d: Dense, size: int, G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """mean_M ‖g_M - g‖² and its gradient mean_M 2 (H_M - H)(g_M - g)."""
    value, gradient = torch.zeros((), dtype=DOUBLE), torch.zeros(len(d.w), dtype=DOUBLE)
    for part in d.parts(size):
        share, away = len(G[part]) / d.n, G[part].mean(0) - G.mean(0)
        value, gradient = value + share * away @ away, gradient + share * 2 * (H[part].mean(0) - H.mean(0)) @ away
    return value, gradient


FORMULAS: dict[str, Callable[[Dense, int], tuple[Tensor, Tensor]]] = {
    "gradient_norm_penalty": lambda d, size: mean_squares(d, size, *d.of_loss()),
    "sampled_gradient_norm_penalty": sampled,
    "fisher_trace_penalty": fisher,
    "average_jacobian_penalty": average_jacobian,
    "unit_jacobian_penalty": unit_jacobian,
    "implicit_regularizer": quarter,
    "implicit_regularizer_mean": lambda d, size: quarter(d, d.n),
    "implicit_regularizer_variance": lambda d, size: quarter(d, size, spread),
}


@cache
def dense(name: str) -> Dense:
    return Dense(name)


def penalty(d: Dense, name: str, size: int, w: Tensor | None, batch=None, **options) -> Tensor:
    batch = torch.arange(d.n) if batch is None else batch
    return REGULARIZERS[name].penalty(d.L, w, batch, micro_batch_size=size, generator=seeded(), **options)


def with_derivative(d: Dense, name: str, size: int, **options) -> tuple[Tensor, Tensor]:
    w = d.w.clone().requires_grad_()
    value = penalty(d, name, size, w, **options)
    return value.detach(), torch.autograd.grad(value, w)[0]


def test_every_exact_regularizer_has_a_formula_here():
    assert set(FORMULAS) == set(EXACT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", EXACT)
def test_value_and_gradient_are_those_of_the_formula(name, case, size):
    d = dense(case)
    value, gradient = with_derivative(d, name, size)
    true_value, true_gradient = FORMULAS[name](d, size)
    scale = float(mean_squares(d, size, *d.of_loss())[0])  # for the variance of one micro-batch, which is zero
    assert float(value) == pytest.approx(float(true_value), rel=1e-10, abs=1e-13 * scale)
    assert off(gradient, true_gradient, max(float(true_gradient.norm()), 1e-3 * scale)) < 1e-10
    assert float(penalty(d, name, size, d.w)) == pytest.approx(float(true_value), rel=1e-10, abs=1e-13 * scale)


def directional(function: Callable[[Tensor], Tensor], w: Tensor, d: Tensor, h: float = 1e-4) -> Tensor:
    """The derivative along d by a central difference of fourth order."""
    return (8 * (function(w + h * d) - function(w - h * d)) - function(w + 2 * h * d) + function(w - 2 * h * d)) / (
        12 * h
    )


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", EXACT)
def test_gradients_by_finite_differences_through_layer_norm(name, size):
    d = dense("layer_norm")
    along = torch.randn(len(d.w), generator=seeded(1), dtype=DOUBLE)
    along /= along.norm()
    _, gradient = with_derivative(d, name, size)
    found = directional(lambda w: penalty(d, name, size, w), d.w, along)
    assert float(gradient @ along) == pytest.approx(float(found), rel=1e-7, abs=1e-8 * float(gradient.norm()))


@pytest.mark.parametrize("name", EXACT)
def test_second_derivatives_with_create_graph(name):
    d = dense("mlp_tanh_cross_entropy")
    along = torch.randn(len(d.w), generator=seeded(1), dtype=DOUBLE)
    along /= along.norm()
    w = d.w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(penalty(d, name, 4, w, create_graph=True), w, create_graph=True)
    (product,) = torch.autograd.grad(gradient @ along, w)
    assert off(gradient.detach(), with_derivative(d, name, 4)[1]) < 1e-12

    def slope(w: Tensor) -> Tensor:
        w = w.clone().requires_grad_()
        return torch.autograd.grad(penalty(d, name, 4, w), w)[0]

    assert off(product, directional(slope, d.w, along, 1e-3)) < 1e-7


def norms() -> dict[str, tuple[nn.Module, bool]]:
    """Normalizations, and whether PyTorch's third derivatives through them are right."""
    return {
        "layer": (nn.LayerNorm(4), False),
        "batch": (nn.BatchNorm1d(4), False),
        "instance": (nn.InstanceNorm1d(4), False),
        "batch_eval": (nn.BatchNorm1d(4).eval(), True),
        "group": (nn.GroupNorm(2, 4), True),
        "rms": (nn.RMSNorm(4), True),
    }


@pytest.mark.filterwarnings("ignore:input's size at dim=1")
@pytest.mark.parametrize("name", norms())
def test_wrong_third_derivatives_are_refused(name):
    norm, right = norms()[name]
    shape = (nn.Unflatten(1, (2, 4)), nn.Flatten()) if name == "instance" else (nn.Identity(), nn.Identity())
    torch.manual_seed(0)
    wide = nn.Linear(4, 8 if name == "instance" else 4)
    model = nn.Sequential(wide, shape[0], norm, shape[1], nn.Tanh(), nn.LazyLinear(3)).double()
    model(data()[0])
    L = cl.Objective(model.eval() if name == "instance" else model, "cross_entropy", data())
    live, use = L.variables(), cl.regularizers.gradient_norm_penalty
    if not right:
        with pytest.raises(
            ValueError, match=r"third derivatives of the model, and PyTorch's are silently wrong through"
        ):
            use(L, None, None, create_graph=True)
        return
    along = [torch.randn(p.shape, generator=seeded(1), dtype=DOUBLE) for p in live]
    slopes = torch.autograd.grad(use(L, None, None, create_graph=True), live, create_graph=True)
    products = torch.autograd.grad(sum((s * a).sum() for s, a in zip(slopes, along, strict=True)), live)

    def slope(t: float) -> Tensor:
        moved = copy.deepcopy(model)
        for p, a in zip(moved.parameters(), along, strict=True):
            p.data += t * a
        there = cl.Objective(moved, "cross_entropy", data())
        use(there, None, None).backward()
        return flat_gradient(moved)

    h = 1e-3
    expected = (8 * (slope(h) - slope(-h)) - slope(2 * h) + slope(-2 * h)) / (12 * h)
    assert off(torch.cat([p.flatten() for p in products]), expected) < 1e-4


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_gradient_without_graph_is_never_differentiated_silently(name):
    d = dense("layer_norm")
    w = d.w.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again; pass create_graph=True to the penalty"):
        torch.autograd.grad(penalty(d, name, 4, w), w, create_graph=True)


# -- relations ---------------------------------------------------------------------------------------------------------


def test_gn_of_one_micro_batch_is_the_squared_norm_of_the_batch():
    d = dense("layer_norm")
    batch = torch.tensor([0, 3, 4, 8])
    assert float(penalty(d, "gradient_norm_penalty", 4, d.w, batch)) == pytest.approx(
        float(d.L.gradient(d.w, batch).square().sum()), rel=1e-12
    )
    _, gradient = with_derivative(d, "gradient_norm_penalty", 4, batch=batch)
    hessian = d.of_loss()[1][batch].mean(0)
    assert off(gradient, 2 * hessian @ d.L.gradient(d.w, batch)) < 1e-12


def test_the_implicit_regularizer_is_a_quarter_of_gn_and_the_sum_of_its_parts():
    d = dense("mlp_tanh_cross_entropy")
    whole, mean, variance, gn = (
        with_derivative(d, name, 2)
        for name in (
            "implicit_regularizer",
            "implicit_regularizer_mean",
            "implicit_regularizer_variance",
            "gradient_norm_penalty",
        )
    )
    for i in (0, 1):
        assert off(whole[i], gn[i] / 4) < 1e-14
        assert off(mean[i] + variance[i], whole[i]) < 1e-13


def test_the_variance_part_over_all_batches_is_the_gradient_variance():
    """Smith eq. 22 with batches of 2 of 4: the mean over the 3 partitions is (N-B)/(N-1) Γ/(4B)."""
    d = dense("mlp_tanh_cross_entropy")
    chosen = torch.tensor([1, 4, 5, 7])
    found = [
        float(penalty(d, "implicit_regularizer_variance", 2, d.w, chosen[torch.tensor(order)]))
        for order in ([0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2])
    ]
    G = d.of_loss()[0][chosen]
    gamma = (G - G.mean(0)).square().sum(1).mean()
    assert sum(found) / 3 == pytest.approx(float((4 - 2) / (4 - 1) * gamma / (4 * 2)), rel=1e-12)


@pytest.mark.parametrize("case", ["mlp_tanh_cross_entropy", "several_labels", "linear"])
@pytest.mark.parametrize("size", [3, 9])
def test_ft_over_labels_is_the_mean_fisher_trace_over_the_size(case, size):
    d = dense(case)
    z, J = d.reference.outputs
    traces = torch.stack([(j @ j.T @ OUTPUT_HESSIANS[d.problem.loss](x)).trace() for x, j in zip(z, J, strict=True)])
    expected = sum(len(traces[part]) / d.n * traces[part].mean() / len(traces[part]) for part in d.parts(size))
    m = cl.measure(d.L, [("fisher_trace_penalty", {"draws": 150, "micro_batch_size": size})], w=d.w)[
        "fisher_trace_penalty"
    ]
    assert m.kind == "sem"
    assert abs(m.value - float(expected)) < 4 * m.error
    assert m.error < 0.15 * float(expected)  # Tr(F) itself is `size` times as large


@pytest.mark.parametrize("size", [4, 9])
def test_uj_over_directions_is_the_mean_squared_frobenius_norm_over_c(size):
    d = dense("layer_norm")
    _, J = d.reference.outputs
    norms = [len(J[part]) / d.n * J[part].mean(0).square().sum() for part in d.parts(size)]
    expected = float(sum(norms)) / J.shape[1]
    m = cl.measure(d.L, [("unit_jacobian_penalty", {"draws": 150, "micro_batch_size": size})], w=d.w)
    m = m["unit_jacobian_penalty"]
    assert abs(m.value - expected) < 4 * m.error
    assert m.error < 0.15 * expected  # without the factor 1/C it is 3 times as large


def test_the_sampled_micro_batch_is_each_of_them():
    d = dense("mlp_tanh_cross_entropy")
    G = d.of_loss()[0]
    truth = {round(float(G[part].mean(0).square().sum()), 12) for part in d.parts(3)}
    draw = seeded()
    found = [
        float(cl.regularizers.sampled_gradient_norm_penalty(d.L, d.w, None, micro_batch_size=3, generator=draw))
        for _ in range(30)
    ]
    assert {round(value, 12) for value in found} == truth


def test_the_difference_form_has_an_error_of_first_order():
    d = dense("layer_norm")
    value, exact = with_derivative(d, "gradient_norm_penalty", 4)
    errors = []
    for h in (0.04, 0.02, 0.01):
        found, gradient = with_derivative(d, "gradient_norm_difference_penalty", 4, h=h)
        assert float(found) == pytest.approx(float(value), rel=1e-14)
        errors.append(gradient - exact)
    assert off(errors[0], 2 * errors[1]) < 0.1
    assert off(errors[1], 2 * errors[2]) < 0.05
    assert float(errors[2].norm()) < 0.1 * float(exact.norm())


def test_the_error_of_the_difference_form_is_the_one_stated():
    """h ‖g‖ ∇³L[d, d], for one micro-batch."""
    d = dense("layer_norm")
    _, exact = with_derivative(d, "gradient_norm_penalty", d.n)
    g = d.of_loss()[0].mean(0)
    along, h = g / g.norm(), 1e-4
    ahead, behind = (d.L.gradient(d.w + s * along) for s in (1e-3, -1e-3))
    third = (ahead - 2 * d.L.gradient(d.w) + behind) / 1e-6
    _, found = with_derivative(d, "gradient_norm_difference_penalty", d.n, h=h)
    assert off(found - exact, h * g.norm() * third) < 1e-2


def test_the_difference_form_is_exact_for_a_quadratic_and_at_a_zero_gradient():
    d = dense("linear")
    for h in (1.0, 0.01):
        assert (
            off(
                with_derivative(d, "gradient_norm_difference_penalty", 4, h=h)[1],
                FORMULAS["gradient_norm_penalty"](d, 4)[1],
            )
            < 1e-11
        )
    model = nn.Linear(2, 1, dtype=DOUBLE)
    x = torch.ones(3, 2, dtype=DOUBLE)
    L = cl.Objective(model, "squared_error", (x, model(x).detach()))
    value = cl.regularizers.gradient_norm_difference_penalty(L, None, None)
    value.backward()
    assert float(value.detach()) == 0
    assert float(model.weight.grad.norm()) == 0


def test_a_model_without_second_derivative_trains_by_differences():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    class Layer(nn.Module):
        def __init__(self, sine: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.sine, self.linear = sine, nn.Linear(4, 3, dtype=DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            return self.sine(self.linear(x))

    torch.manual_seed(0)
    model = Layer(Once.apply)
    twin = Layer(torch.sin)
    twin.load_state_dict(model.state_dict())
    data = inputs(6, 4), classes(6, 3)
    found = []
    for net, name in ((model, "gradient_norm_difference"), (twin, "gradient_norm")):
        L = cl.Objective(net, "cross_entropy", data)
        BatchGradient(L, data, penalties=[(1.0, (name, {"h": 1e-6} if net is model else {}))])()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert off(found[0], found[1]) < 1e-5


# -- the live model ----------------------------------------------------------------------------------------------------


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


@pytest.mark.parametrize("name", REGULARIZERS)
def test_on_the_live_model_it_is_one_line(name):
    d = Dense("layer_norm")
    x, y = d.problem.data
    w = d.L.params().requires_grad_()
    use = REGULARIZERS[name].penalty
    (expected,) = torch.autograd.grad(use(d.L, w, (x, y), micro_batch_size=4, generator=seeded()), w)
    expected = d.L.gradient(w.detach()) + 0.01 * expected
    for given in (None, d.L.variables()):
        d.problem.model.zero_grad()
        loss = F.cross_entropy(d.problem.model(x), y)
        (loss + 0.01 * use(d.L, given, (x, y), micro_batch_size=4, generator=seeded())).backward()
        assert off(flat_gradient(d.problem.model), expected) < 1e-12
    with torch.no_grad():
        assert not use(d.L, None, (x, y)).requires_grad


def net_with_everything(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.Dropout(0.4),
            nn.Linear(6, 5),
            nn.BatchNorm1d(5),
            nn.Linear(5, 3),
        ).double()
    model[5].running_mean.fill_(0.1)
    model[5].eval()
    return model


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, generator=seeded(2), dtype=DOUBLE), torch.arange(n) % 3


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_penalty_leaves_the_live_model_as_it_was(name):
    model = net_with_everything()
    L = cl.Objective(model, "cross_entropy", data())
    before = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    for params in (None, L.params()):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                REGULARIZERS[name].penalty(L, params, data(), micro_batch_size=4, generator=seeded())
            assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[0].values(), strict=True))
            assert [m.training for m in model.modules()] == before[1]
            assert all(p.grad is None for p in model.parameters())
            if params is not None:
                assert torch.equal(torch.get_rng_state(), state)
            torch.set_rng_state(state)


@pytest.mark.parametrize("name", DRAWING)
def test_draws_follow_torchs_own_generator_by_default(name):
    d = dense("layer_norm")
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append([float(REGULARIZERS[name].penalty(d.L, d.w, None, micro_batch_size=2)) for _ in range(3)])
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) > 1


class Live:
    """Bytes that autograd has saved and not yet let go."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> Live:
        counter = self

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor.detach()  # with its graph it would keep itself alive
                counter.now += tensor.nbytes
                counter.most = max(counter.most, counter.now)

            def __del__(self) -> None:
                counter.now -= self.tensor.nbytes

        self.hooks = torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.__exit__()


@pytest.mark.parametrize("name", REGULARIZERS)
def test_memory_is_that_of_one_micro_batch(name):
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    L = cl.Objective(model, "cross_entropy", data(64))
    w = L.params().requires_grad_()
    most: dict[str, list[int]] = {"penalty": [], "flat": [], "closure": []}
    for n in (16, 64):
        batch = torch.arange(n)
        for kind, run in {
            "penalty": lambda b: REGULARIZERS[name].penalty(L, None, b, micro_batch_size=8),
            "flat": lambda b: REGULARIZERS[name].penalty(L, w, b, micro_batch_size=8),
            "closure": lambda b: BatchGradient(L, b, micro_batch_size=8, penalties=[(0.1, name)])(),
        }.items():
            with Live() as live:
                result = run(batch)
            most[kind].append(live.most)
            del result
    for few, many in most.values():
        assert 0 < many <= 1.05 * few + 100
    with Live() as live:
        kept = REGULARIZERS[name].penalty(L, None, torch.arange(64), micro_batch_size=8, create_graph=True)
    assert live.most > 2 * most["penalty"][1] or name == "sampled_gradient_norm_penalty"
    del kept


@pytest.mark.parametrize("name", ["fisher_trace_penalty", "gradient_norm_penalty", "unit_jacobian_penalty"])
def test_a_value_does_not_depend_on_chunks(name):
    d = dense("weighted")
    found = [
        float(REGULARIZERS[name].penalty(d.problem.objective(chunk_size=chunk), d.w, None, generator=seeded()))
        for chunk in (None, 4, 1)
    ]
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-12)


# -- the closure of a training step --------------------------------------------------------------------------------------


def by_hand(model: nn.Module, batch: tuple[Tensor, Tensor], size: int, strength: float = 0.0) -> float:
    """Loss and GN of micro-batches, by torch alone; the gradient arrives in `.grad`."""
    x, y = batch
    total = 0.0
    for lo in range(0, len(x), size):
        part = slice(lo, lo + size)
        losses = F.cross_entropy(model(x[part]), y[part], reduction="none")
        share = len(losses) / len(x)
        objective = share * losses.mean()
        total += float(objective.detach())
        if strength:
            g = torch.autograd.grad(losses.mean(), [*model.parameters()], create_graph=True)
            objective = objective + strength * share * sum(p.square().sum() for p in g)
        objective.backward()
    return total


@pytest.mark.parametrize("strength", [0.0, 0.3])
@pytest.mark.parametrize("size", [3, 4, 5, 12])
def test_the_closure_trains_batch_norm_and_dropout_by_micro_batches(size, strength):
    ours, theirs = net_with_everything(), net_with_everything()
    L = cl.Objective(ours, "cross_entropy", data())
    torch.manual_seed(3)
    loss = BatchGradient(L, torch.arange(12), micro_batch_size=size, penalties=[(strength, "gradient_norm")])()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert loss == pytest.approx(by_hand(theirs, data(), size, strength), rel=1e-14)
    assert torch.equal(after, torch.get_rng_state())
    assert off(flat_gradient(ours), flat_gradient(theirs)) < 1e-13
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    assert [m.training for m in ours.modules()] == [m.training for m in theirs.modules()]


@pytest.mark.parametrize("size", [5, None])
def test_without_penalties_the_closure_is_that_of_torch_bit_by_bit(size):
    ours, theirs = net_with_everything().float(), net_with_everything().float()
    x, y = data()
    L = cl.Objective(ours, "cross_entropy", (x.float(), y))
    torch.manual_seed(3)
    BatchGradient(L, torch.arange(12), micro_batch_size=size, penalties=[(0.0, "gradient_norm")])()
    torch.manual_seed(3)
    for lo in range(0, 12, size or 12):
        part = slice(lo, lo + (size or 12))
        (F.cross_entropy(theirs(x[part].float()), y[part], reduction="none").sum() / 12).backward()
    assert torch.equal(flat_gradient(ours), flat_gradient(theirs))


ALL = [(0.1 * (i + 1), name) for i, name in enumerate(REGULARIZERS)]


@pytest.mark.parametrize("weighted", [False, True])
def test_all_penalties_at_once_share_a_step(weighted):
    model = Normalized().double()
    weights = torch.linspace(0, 2, 9, dtype=DOUBLE) if weighted else None
    L = cl.Objective(model, "cross_entropy", data(9), weights=weights)
    closure = BatchGradient(L, torch.arange(9), micro_batch_size=4, penalties=ALL, generator=seeded())
    loss = closure()
    assert loss == pytest.approx(float(L.value()), rel=1e-12)
    assert closure.micro_batches == 3
    total, expected = flat_gradient(model), L.gradient()
    for strength, name in ALL:
        alone = BatchGradient(L, torch.arange(9), micro_batch_size=4, penalties=[(strength, name)], generator=seeded())
        alone()
        assert alone.penalties[name] == pytest.approx(closure.penalties[name], rel=1e-12)
        expected = expected + flat_gradient(model) - L.gradient()
        if name not in DRAWING:
            value = REGULARIZERS[name].penalty(L, None, torch.arange(9), micro_batch_size=4)
            assert closure.penalties[name] == pytest.approx(float(value.detach()), rel=1e-12)
            model.zero_grad()
            value.backward()
            alone()
            found = flat_gradient(model)
            model.zero_grad()
            (strength * REGULARIZERS[name].penalty(L, None, torch.arange(9), micro_batch_size=4)).backward()
            assert off(found, L.gradient() + flat_gradient(model)) < 1e-11
    assert off(total, expected) < 1e-11
    values = [strength * closure.penalties[name] for strength, name in ALL]
    assert closure.penalty == pytest.approx(sum(values), rel=1e-12)
    assert closure.objective() == pytest.approx(loss + sum(values), rel=1e-12)  # the same draws again
    norms = [float(L.gradient(batch=torch.arange(9)[part]).norm()) for part in dense("layer_norm").parts(4)]
    assert closure.micro_norms == pytest.approx(norms, rel=1e-12)


def test_the_gradient_of_one_micro_batch():
    model = Normalized().double()
    L = cl.Objective(model, "cross_entropy", data(9))
    closure = BatchGradient(L, torch.arange(9), micro_batch_size=4, penalties=[(1.0, "gradient_norm")])
    closure()
    for i, part in enumerate(dense("layer_norm").parts(4)):
        index = torch.arange(9)[part]
        assert closure.micro(i) == pytest.approx(float(L.value(batch=index)), rel=1e-12)
        assert off(flat_gradient(model), L.gradient(batch=index)) < 1e-12
    assert BatchGradient(L, torch.arange(9)).micro_norms is None


def test_norms_come_only_where_they_are_free():
    L = cl.Objective(Normalized().double(), "cross_entropy", data(9))
    for penalties, free in [([], False), ([(1.0, "average_jacobian")], False), ([(1.0, "implicit_regularizer")], True)]:
        closure = BatchGradient(L, torch.arange(9), micro_batch_size=4, penalties=penalties)
        closure()
        assert (closure.micro_norms is not None) == free


def test_dropout_has_one_mask_per_micro_batch_in_both_passes():
    """C_reg is the sum of its parts, and a quadratic loss has an exact difference form, only under equal masks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x = data()[0]
    L = cl.Objective(model, "squared_error", (x, x[:, :2].flip(0)))

    def trained(*names: str) -> tuple[dict[str, float], Tensor]:
        closure = BatchGradient(L, torch.arange(12), micro_batch_size=5, penalties=[(1.0, name) for name in names])
        torch.manual_seed(7)
        closure()
        return closure.penalties, flat_gradient(model)

    whole = trained("implicit_regularizer")
    parts = trained("implicit_regularizer_mean", "implicit_regularizer_variance")
    assert sum(parts[0].values()) == pytest.approx(whole[0]["implicit_regularizer"], rel=1e-12)
    assert off(parts[1], whole[1]) < 1e-12
    exact, by_differences = trained("gradient_norm"), trained("gradient_norm_difference")
    assert by_differences[0].popitem()[1] == pytest.approx(exact[0].popitem()[1], rel=1e-12)
    assert off(by_differences[1], exact[1]) < 1e-10


def test_a_loss_that_is_linear_or_does_not_use_a_parameter_has_zeros():
    class Odd(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1, dtype=DOUBLE)
            self.idle = nn.Parameter(torch.ones(2, dtype=DOUBLE))

    model = Odd()
    L = cl.Objective(model, lambda z, y: z[:, 0], (data()[0], data()[1]))
    w = L.params().requires_grad_()
    for name in EXACT:
        if REGULARIZERS[name].needs != "likelihood":
            value = REGULARIZERS[name].penalty(L, w, None, micro_batch_size=4, generator=seeded())
            assert torch.autograd.grad(value, w)[0].abs().max() == 0
            BatchGradient(L, None, micro_batch_size=4, penalties=[(1.0, name)])()
            assert off(flat_gradient(model), L.gradient()) < 1e-12
    constant = cl.Objective(model, lambda z, y: 0 * z[:, 0] + 1, (data()[0], data()[1]))
    assert BatchGradient(constant, None, penalties=[(1.0, "gradient_norm")])() == 1.0
    assert flat_gradient(model).abs().max() == 0


@pytest.mark.parametrize("kind", ["attention", "lstm", "dict_batch"])
def test_layers_whose_default_kernels_have_no_second_derivative(kind):
    torch.manual_seed(0)
    problem = supervised(Attention(), "cross_entropy", inputs(7, 3, 4), classes(7, 3)) if kind == "attention" else None
    problem = problem or BY_NAME[kind].build(0)
    problem.model.double()
    L = problem.objective()
    BatchGradient(L, torch.arange(7), micro_batch_size=3, penalties=[(0.1, "gradient_norm")])()
    w = L.params().requires_grad_()
    (expected,) = torch.autograd.grad(
        cl.regularizers.gradient_norm_penalty(L, w, torch.arange(7), micro_batch_size=3), w
    )
    found = torch.cat([p.grad.flatten() for p in L.variables()])
    assert off(found, L.gradient(batch=torch.arange(7)) + 0.1 * expected) < 1e-11


# -- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 12])
def test_penalized_training_is_that_of_torch(tmp_path, size):
    ours, theirs = net_with_everything(), net_with_everything()
    L = cl.Objective(ours, "cross_entropy", data())
    sgd = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    batches = cl.Batches(12, 12, steps=4)
    torch.manual_seed(1)
    options = {"penalties": [(0.2, cl.regularizers.gradient_norm_penalty)], "micro_batch_size": size}
    for at in cl.train(L, sgd, batches, diagnostics=["loss"], run=tmp_path / "run", **options):
        assert at.measurements["gradient_norm_penalty"].value == next(iter(at.penalties.values())) > 0
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for _ in batches:
        sgd.zero_grad()
        by_hand(theirs, data(), size, 0.2)
        sgd.step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10)
    run = cl.Run(tmp_path / "run")
    assert run.config["training"]["penalties"] == [[0.2, "gradient_norm_penalty", {}]]
    assert run.config["training"]["micro_batch_size"] == size
    assert "0.2 gradient_norm_penalty is added" in run.config["training"]["trained_loss"]
    assert len(run.series("gradient_norm_penalty").values) == 4


def test_training_draws_anew_at_every_step_from_its_seed():
    """UJ of a model that does not move, on the same batch, varies with u alone."""

    def values(seed: int) -> list[float]:
        L = cl.Objective(cl.problems.mlp((4, 6, 3), dtype=DOUBLE), "cross_entropy", data())
        sgd = torch.optim.SGD(L.model.parameters(), lr=0.0)
        state = torch.get_rng_state()
        steps = cl.train(L, sgd, [torch.arange(12)] * 4, penalties=[(1.0, "unit_jacobian")], seed=seed)
        found = [at.measurements["unit_jacobian_penalty"].value for at in steps]
        assert torch.equal(torch.get_rng_state(), state)
        return found

    with torch.random.fork_rng(devices=[]):
        first, again, other = values(0), values(0), values(1)
    assert first == again
    assert len({round(value, 9) for value in first + other}) == 8


def test_a_strength_of_zero_logs_and_changes_no_bit(tmp_path):
    ends = []
    for penalties in ([], [(0.0, name) for name in REGULARIZERS]):
        model = net_with_everything()
        L = cl.Objective(model, "cross_entropy", data())
        torch.manual_seed(0)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for at in cl.train(L, sgd, cl.Batches(12, 8, steps=3), penalties=penalties, micro_batch_size=4):
            assert set(at.measurements) == {name for _, name in penalties}
            assert all(m.value is not None for m in at.measurements.values())
        ends.append((copy.deepcopy(model.state_dict()), torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0].values(), ends[1][0].values(), strict=True))
    assert torch.equal(ends[0][1], ends[1][1])


def test_claims_about_the_threshold_do_not_apply_to_penalized_runs(tmp_path):
    from curvlab.claims.plain_descent import PlainDescent

    for strength in (0.0, 0.5):
        model = Normalized()
        L = cl.Objective(model, "cross_entropy", (data()[0].float(), data()[1]))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        path = tmp_path / f"run{strength}"
        penalties = [(strength, ("gradient_norm_difference", {"h": 0.001}))]
        for _ in cl.train(L, sgd, cl.Batches(12, 12, steps=2), penalties=penalties, diagnostics=["loss"], run=path):
            pass
        refusal = PlainDescent(cl.Run(path)).refusal
        if strength:
            assert refusal == (
                "training uses another loss than is measured: 0.5 gradient_norm_difference_penalty is added"
            )
        else:
            assert refusal is None


def test_lbfgs_minimizes_the_penalized_loss():
    model = nn.Linear(4, 2, dtype=DOUBLE)
    x = data()[0]
    L = cl.Objective(model, "squared_error", (x, x[:, :2] + 1))
    lbfgs = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=50)
    for _ in cl.train(
        L, lbfgs, cl.Batches(12, 12, steps=3), penalties=[(0.3, "unit_jacobian"), (0.3, "gradient_norm")]
    ):
        pass
    closure = BatchGradient(L, None, penalties=[(0.3, "gradient_norm")])
    closure()
    assert flat_gradient(model).norm() < 1e-3  # the Jacobian of a linear model is constant


def test_an_optimizer_that_asks_for_the_closure_gets_it():
    seen = []

    class Greedy(torch.optim.SGD):
        needs_closure = True

        def step(self, closure=None):
            before = flat_gradient(model)
            loss = closure()
            assert off(flat_gradient(model), before) < 1e-14  # draws are the same again
            seen.append((closure.micro_batches, loss, closure.micro(1)))
            closure()
            return super().step()

    model = Normalized().double()
    L = cl.Objective(model, "cross_entropy", data(9))
    greedy = Greedy(model.parameters(), lr=0.1)
    for _ in cl.train(L, greedy, cl.Batches(9, 6, steps=2), penalties=[(0.1, "fisher_trace")], micro_batch_size=4):
        pass
    assert [n for n, _, _ in seen] == [2, 2]


# -- diagnostics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REGULARIZERS, "microbatch_gradient_norm"])
def test_a_diagnostic_has_the_statistics_of_training(name):
    """BatchNorm without dropout: the value is that of the live model, whose buffers stay."""
    model = net_with_everything()
    model[3].p = 0.0
    L = cl.Objective(model, "cross_entropy", data())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for at in cl.train(L, sgd, cl.Batches(12, 8, steps=2), diagnostics=[name], micro_batch_size=4):
        found = at.measurements[name]
        again = cl.diagnostics.evaluate(at, {name: {}})[name]
        assert again.value == found.value
        before = copy.deepcopy(list(model.buffers()))
        if name in REGULARIZERS and name not in DRAWING:
            live = REGULARIZERS[name].penalty(L, None, at.batch, micro_batch_size=4)
            assert found.value == pytest.approx(float(live.detach()), rel=1e-12)
        elif name == "microbatch_gradient_norm":
            net = copy.deepcopy(model)
            gradients = [
                torch.autograd.grad(F.cross_entropy(net(data()[0][part]), data()[1][part]), [*net.parameters()])
                for part in at.batch.split(4)
            ]
            norms = [math.sqrt(sum(float(g.square().sum()) for g in one)) for one in gradients]
            assert found.value == pytest.approx(sum(norms) / 2, rel=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_a_trained_penalty_is_logged_as_it_was_drawn():
    model = net_with_everything()
    L = cl.Objective(model, "cross_entropy", data())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    penalties = [(0.1, name) for name in REGULARIZERS]
    requests = [("fisher_trace_penalty", {"micro_batch_size": 2})]
    for at in cl.train(
        L, sgd, cl.Batches(12, 8, steps=2), penalties=penalties, micro_batch_size=4, diagnostics=requests
    ):
        for name in REGULARIZERS:
            same = at.measurements[name].value == at.penalties[(name,)]
            assert same == (name != "fisher_trace_penalty")


def test_squares_of_norms_have_two_names():
    d = dense("layer_norm")
    one = cl.measure(d.L, [("microbatch_gradient_norm_squared", {"micro_batch_size": 2})], w=d.w)
    G = d.of_loss()[0]
    norms = [(len(G[part]) / d.n, float(G[part].mean(0).norm())) for part in d.parts(2)]
    assert one["gradient_norm_penalty"].value == pytest.approx(sum(s * n**2 for s, n in norms), rel=1e-12)
    two = cl.measure(d.L, [("microbatch_gradient_norm", {"micro_batch_size": 2})], w=d.w)
    assert two["microbatch_gradient_norm"].value == pytest.approx(sum(s * n for s, n in norms), rel=1e-12)


def test_a_penalty_without_what_it_needs_has_no_value():
    problem = BY_NAME["dict_batch"].build(0)
    found = cl.measure(
        problem.objective(), ["average_jacobian_penalty", "fisher_trace_penalty", "gradient_norm_penalty"]
    )
    assert "needs the outputs of the model" in found["average_jacobian_penalty"].note
    assert "needs the outputs" in found["fisher_trace_penalty"].note
    assert found["gradient_norm_penalty"].value > 0
    own = cl.Objective(nn.Linear(4, 3, dtype=DOUBLE), lambda z, y: z.square().sum(1), data())
    assert "likelihood behind the loss" in cl.measure(own, ["fisher_trace_penalty"])["fisher_trace_penalty"].note


# -- one's own -------------------------------------------------------------------------------------------------------------


def test_a_regularizer_of_ones_own_is_a_penalty_and_a_diagnostic():
    from curvlab.diagnostics import DIAGNOSTICS

    @cl.regularizers.regularizer("‖∇L‖_p", formula="mean_M Σ_j |∂_j L_M|^p", source="here")
    def power_penalty(m: cl.regularizers.MicroBatch, *, p: float = 2.0) -> Tensor:
        """The sum of powers of the gradient's entries."""
        return sum(g.abs().pow(p).sum() for g in m.gradient)

    try:
        d = dense("layer_norm")
        w = d.w.clone().requires_grad_()
        value = power_penalty(d.L, w, None, micro_batch_size=4)
        (gradient,) = torch.autograd.grad(value, w)
        assert off(gradient, FORMULAS["gradient_norm_penalty"](d, 4)[1]) < 1e-12
        assert off(power_penalty(d.L, w, None, p=4).detach(), d.of_loss()[0].mean(0).pow(4).sum()) < 1e-12
        measured = cl.measure(d.L, [("power_penalty", {"p": 4.0})], w=d.w)["power_penalty"]
        assert measured.value == pytest.approx(float(d.of_loss()[0].mean(0).pow(4).sum()), rel=1e-12)
        assert cl.regularizers.resolve(("power", {"p": 3.0}))[1] == {"p": 3.0}
        assert cl.regularizers.resolve(power_penalty)[0].penalty is power_penalty
    finally:
        REGULARIZERS.pop("power_penalty")
        DIAGNOSTICS.pop("power_penalty")


@pytest.mark.parametrize("name", REGULARIZERS)
def test_conformance(name):
    entry = REGULARIZERS[name]
    assert all([entry.symbol, entry.formula, entry.source])
    assert "Args:" in entry.penalty.__doc__
    assert cl.regularizers.resolve(name.removesuffix("_penalty"))[0] is entry
    assert getattr(cl.regularizers, name) is entry.penalty
