"""Functions and models whose second derivatives PyTorch gets wrong in silence: each ends in a right value or a named error.

Compared with a reference: the Hessian of a twin of plain operations, by forward mode over reverse mode, in float64. Only
behavioural: what errors and warnings say. The number in a test's name is that of the failure mode.
"""

from __future__ import annotations

import re

import pytest
import torch
from cases import classes, inputs
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import curvlab as cl
from curvlab.hvp import HessianProducts

F64 = torch.float64


class Sine(Function):
    """As it should be written before PyTorch 2: the context comes into the forward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class OnceSine(Sine):
    backward = staticmethod(once_differentiable(Sine.backward))


class DetachedSine(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.cosine = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.cosine


class NewSine(Function):
    """As PyTorch 2 has it, without rules for forward mode and vmap."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Activation(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def net(function, *, last: bool = False) -> nn.Sequential:
    """The function between two layers, or after the last one."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    layers[3 if last else 1 : 3 if last else 2] = [Activation(function)]
    if last:
        layers[1] = nn.Tanh()
    return nn.Sequential(*layers).double()


torch.manual_seed(1)
DATA = inputs(9, 4), classes(9, 3)


def objective(function, *, last: bool = False, **options) -> cl.Objective:
    return cl.Objective(net(function, last=last), "cross_entropy", DATA, **options)


def reference(L: cl.Objective) -> Tensor:
    """The Hessian of the same net with torch.sin."""
    return torch.func.jacfwd(torch.func.grad(lambda w: mean_loss(L, w)))(L.params())


def mean_loss(L: cl.Objective, w: Tensor) -> Tensor:
    twin = nn.Sequential(*(Activation(torch.sin) if isinstance(m, Activation) else m for m in L.model))
    x, y = DATA
    names = [name for name, _ in twin.named_parameters()]
    parts = [part.view(p.shape) for part, p in zip(w.split(L.sizes), twin.parameters(), strict=True)]
    z = torch.func.functional_call(twin, dict(zip(names, parts, strict=True)), (x,))
    return (z.logsumexp(1) - z[torch.arange(len(y)), y]).mean()


def off(L: cl.Objective) -> float:
    """The error of our Hessian, relative to its norm."""
    H = reference(L)
    return float((cl.dense(cl.hessian(L)) - H).norm() / H.norm())


@pytest.mark.parametrize("last", [False, True])
def test_F16_only_what_the_first_gradient_lacks_counts_as_zero(last):
    """`allow_unused` and `materialize_grads` turn a broken graph into zeros: unused parameters are zero, broken ones not."""
    L = objective(torch.sin, last=last)
    expected, error = cl.dense(cl.hessian(L)), off(L)
    L.model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=F64)))
    with pytest.warns(UserWarning, match="does not depend on unused"):
        idle = cl.Objective(L.model, "cross_entropy", DATA)
    H, place = cl.dense(cl.hessian(idle)), idle.names.index("unused")
    begin = sum(idle.sizes[:place])
    kept = [i for i in range(idle.num_params) if not begin <= i < begin + 2]
    assert float(H[begin : begin + 2].abs().max()) == 0
    assert torch.allclose(H[kept][:, kept], expected, atol=1e-14)
    assert error < 1e-12
    broken = objective(OnceSine.apply, last=last)
    broken.model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=F64)))
    with pytest.raises(ValueError, match=r"OnceSine in .* is marked @once_differentiable"):
        cl.hessian(cl.Objective(broken.model, "cross_entropy", DATA)) @ torch.ones(idle.num_params, dtype=F64)


def train(L: cl.Objective, penalty: str):
    sgd = torch.optim.SGD(L.model.parameters(), lr=0.1)
    return iter(cl.train(L, sgd, cl.Batches(9, 3, steps=1), penalties=[(0.1, penalty)]))


@pytest.mark.parametrize("last", [False, True])
def test_F26_once_differentiable(last):
    L = objective(OnceSine.apply, last=last)
    v = torch.ones(L.num_params, dtype=F64)
    place = f"{3 if last else 1} \\(Activation\\)"
    with pytest.raises(
        ValueError, match=f"wrong by .*OnceSine in {place} is marked @once_differentiable.*Remove the mark"
    ):
        cl.hessian(L) @ v
    with pytest.raises(ValueError, match=f"the GGN is wrong.*OnceSine in {place}"):
        cl.ggn(L)
    with pytest.raises(ValueError, match="OnceSine"):
        cl.measure(L, ["loss", "sharpness"])
    with pytest.raises(ValueError, match="OnceSine"):  # a penalty's gradient is a product with H
        next(train(L, "gradient_norm"))
    assert next(train(L, "gradient_norm_difference")).step == 0
    assert cl.measure(L, ["gradient_norm"])["gradient_norm"].value > 0  # right without second derivatives
    assert off(objective(OnceSine.apply, last=last, check="never")) > 0.01  # what the check spares us
    assert off(objective(Sine.apply, last=last)) < 1e-12


@pytest.mark.parametrize("last", [False, True])
def test_F27_a_function_that_saves_a_detached_tensor(last):
    L = objective(DetachedSine.apply, last=last)
    with pytest.raises(
        ValueError, match=r"although the gradient is right.*DetachedSine in . \(Activation\).*save_for_backward"
    ):
        cl.measure(L, ["sharpness"])
    assert off(objective(DetachedSine.apply, last=last, check="never")) > 0.01


@pytest.mark.parametrize(
    "function, cut",
    [
        (lambda x: x * x.norm(dim=1, keepdim=True).detach(), "detach"),
        (lambda x: x / (1 + x.data.square().mean(1, keepdim=True)), "data"),
        (lambda x: x * torch.tensor([row.norm().item() for row in x], dtype=x.dtype)[:, None], "item"),
        (lambda x: x * without_gradients(x), "no_grad"),
        (lambda x: x + (x.sin() - x).detach(), "detach"),
    ],
    ids=["scale", "data", "item", "no_grad", "straight_through"],
)
def test_F28_values_that_leave_the_graph(function, cut):
    """The Hessian is that of the loss with a part held constant: symmetric, deterministic, and perhaps meant."""
    L = objective(function)
    with pytest.warns(
        UserWarning, match=rf"gradient is not that of the loss.*{cut} in 1 \(Activation\).*check='never'"
    ) as seen:
        found = cl.measure(L, ["sharpness"])["sharpness"]
    assert len(seen) == 1
    assert found.value is not None
    assert L.checked.startswith("warned")
    cl.measure(L, ["sharpness"])  # once
    assert cl.measure(objective(function, check="never"), ["sharpness"])["sharpness"].value == found.value


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.norm(dim=1, keepdim=True)


def test_F28_a_constant_of_the_backward_pass_that_is_part_of_the_layer():
    """The padding row of an embedding is no value that left the graph."""
    model = nn.Sequential(nn.Embedding(6, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 3)).double()
    tokens = torch.tensor([[0, 1], [2, 0], [3, 4], [5, 0]])
    L = cl.Objective(model, "cross_entropy", (tokens, torch.tensor([0, 1, 2, 0])))
    cl.measure(L, ["sharpness"])
    assert L.checked == "ok"


EXAMPLES = ["gradient_second_moment_trace", "gradient_variance", ("interaction_trace", {"exact": True})]


def check_function(function: type[Function], reason: str) -> None:
    """Right by double backward, also where forward mode was asked for, and by loops."""
    L, twin = objective(function.apply), objective(torch.sin)
    assert off(L) < 1e-12
    assert L.checked == "ok"
    assert torch.allclose(L.example_gradients(), twin.example_gradients(), atol=1e-14)
    assert torch.allclose(cl.dense(cl.ggn(L)), cl.dense(cl.ggn(twin)), atol=1e-13)
    found, true = (cl.measure(one, EXAMPLES, batch_size=2) for one in (L, twin))
    for name, m in found.items():
        assert m.value == pytest.approx(true[name].value, rel=1e-10)
    name = f"{function.__name__} in 1 \\(Activation\\)"
    products, V = HessianProducts(L, L.params(), engine="forward_over_reverse"), torch.eye(L.num_params, dtype=F64)
    assert torch.allclose(products.matmat(V), cl.dense(cl.hessian(twin)), atol=1e-13)
    assert re.search(f"forward mode does not go through {name}.*{reason}.*; double_backward keeps", products.reason)


def test_F29_an_old_style_function():
    check_function(Sine, "setup_context")


def test_F30_a_function_without_rules_for_forward_mode_and_vmap():
    check_function(NewSine, "jvp")
