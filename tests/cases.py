"""The one table of cases (model x loss x data) that every conformance test runs over, and dense references for them.

The references share no code with the package: they have their own functional call, their own average, their own
losses, and form every matrix entry by entry. `test_operators.py` checks them against finite differences.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

from curvlab import Objective, batch_loss
from curvlab.hvp import ENGINES

DOUBLE = torch.float64

# Compiling takes tens of seconds a graph, and differences are approximate.
EAGER = [engine for engine in ENGINES if engine not in ("compiled", "differences")]


@dataclass(frozen=True)
class Problem:
    """What `Objective` takes, and `losses(call, batch)`, the same per-example losses for the reference."""

    model: nn.Module
    loss: Any
    data: Any
    losses: Callable[[Callable[..., Any], Any], Tensor]
    weights: Tensor | None = None

    @property
    def size(self) -> int:
        return len(leaves(self.data)[0])

    def objective(self, *, form: str = "tensors", **options: Any) -> Objective:
        return Objective(self.model, self.loss, FORMS[form](self.data), weights=self.weights, **options)


@dataclass(frozen=True)
class Case:
    """A problem from a seed, and what is special about it.

    Attributes:
        layers: names, or beginnings of names, of the parameters that go by a layer's rule; all others are formed.
        vmap: whether vmap can form the others, and so all per-example gradients.
        forward_mode: whether the forward-mode rules of all its layers are right.
        piecewise_linear: in the parameters of any one layer, so tr(H) = tr(GGN).
        linear: in all parameters together, so H = GGN for squared error.
    """

    name: str
    build: Callable[[int], Problem]
    layers: tuple[str, ...] = ()
    vmap: bool = True
    forward_mode: bool = True
    piecewise_linear: bool = False
    linear: bool = False

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []


def case(**traits: Any) -> Callable[[Callable[[], Problem]], Callable[[], Problem]]:
    """Enter a problem in the table under the name of its function."""

    def enter(function: Callable[[], Problem]) -> Callable[[], Problem]:
        _enter(function.__name__, function, **traits)
        return function

    return enter


def _enter(name: str, function: Callable[[], Problem], **traits: Any) -> None:
    def build(seed: int = 0) -> Problem:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            problem = function()
        problem.model.double()
        return problem

    CASES.append(Case(name, build, **traits))


# -- data and losses -----------------------------------------------------------------------------------------------


def inputs(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape).double()  # also exact in float32


def classes(n: int, c: int) -> Tensor:
    return torch.randint(c, (n,))


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    probabilities = targets if targets.is_floating_point() else F.one_hot(targets, outputs.shape[1])
    return (outputs.logsumexp(1) - (outputs * probabilities).sum(1)).to(outputs.dtype)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    if not targets.is_floating_point():
        targets = F.one_hot(targets, outputs.shape[1])
    return ((outputs - targets) ** 2).flatten(1).sum(1) / 2


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    p = outputs.sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).flatten(1).sum(1)


REFERENCE_LOSSES = {
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
    "binary_cross_entropy": binary_cross_entropy,
}


# Written out, of the losses in one example's outputs.
OUTPUT_HESSIANS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda z: torch.diag(z.softmax(0)) - torch.outer(z.softmax(0), z.softmax(0)),
    "squared_error": lambda z: torch.eye(len(z), dtype=DOUBLE),
    "binary_cross_entropy": lambda z: torch.diag(z.sigmoid() * (1 - z.sigmoid())),
}


def supervised(model: nn.Module, loss: str, x: Any, y: Tensor, weights: Tensor | None = None) -> Problem:
    def losses(call: Callable[..., Any], batch: Any) -> Tensor:
        return REFERENCE_LOSSES[loss](call(batch[0]), batch[1])

    return Problem(model, loss, (x, y), losses, weights)


# -- the table -----------------------------------------------------------------------------------------------------


def _mlp(activation: type[nn.Module], loss: str) -> Callable[[], Problem]:
    def build() -> Problem:
        model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 5), activation(), nn.Linear(5, 3))
        return supervised(model, loss, inputs(9, 4), classes(9, 3))

    return build


for _activation in (nn.Tanh, nn.ReLU, nn.GELU):
    for _loss in ("cross_entropy", "squared_error"):
        _enter(
            f"mlp_{_activation.__name__.lower()}_{_loss}",
            _mlp(_activation, _loss),
            layers=("0.", "2.", "4."),
            piecewise_linear=_activation is nn.ReLU,
        )


@case(layers=("weight", "bias"), linear=True, piecewise_linear=True)
def linear() -> Problem:
    return supervised(nn.Linear(5, 2), "squared_error", inputs(9, 5), inputs(9, 2))


@case(layers=("0.", "2."))
def class_probabilities() -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return supervised(model, "cross_entropy", inputs(9, 4), inputs(9, 3).softmax(1))


@case(layers=("0.", "2."))
def several_labels() -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return supervised(model, "binary_cross_entropy", inputs(9, 4), torch.randint(2, (9, 3)))


@case(layers=("0.", "2."))
def weighted() -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    weights = torch.rand(11).double() * 3
    weights[4] = 0.0
    return supervised(model, "cross_entropy", inputs(11, 4), classes(11, 3), weights)


@case(layers=("0.", "2.", "4.", "7."), piecewise_linear=True)
def cnn() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (3, 2), dilation=(2, 1), groups=2, padding=(2, 0), padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(18, 3),
    )
    return supervised(model, "cross_entropy", inputs(7, 2, 5, 5), classes(7, 3))


@case(layers=("0.", "2.", "5."))
def cnn_1d() -> Problem:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding="same", dilation=2),
        nn.Tanh(),
        nn.Conv1d(4, 4, 2, stride=2, groups=4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 2),
    )
    return supervised(model, "squared_error", inputs(7, 2, 6), inputs(7, 2))


@case(layers=("0.", "1.", "3.", "4.", "8."))
def normalized_cnn() -> Problem:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 2),
        norm,
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=4),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    return supervised(model, "squared_error", inputs(7, 1, 4, 4), classes(7, 2))


class Pooled(nn.Module):
    """Linear layers on sequences (B, T, .), so that examples meet a weight at several positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.last = nn.Linear(2, 3), nn.Linear(3, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.wide(torch.tanh(self.first(x)))).mean(1))


@case(layers=("first.", "wide.", "last."))
def sequence() -> Problem:
    return supervised(Pooled(), "cross_entropy", inputs(8, 3, 2), classes(8, 2))


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.temperature = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)))) * self.temperature


@case(layers=("first.", "norm.", "last."))
def layer_norm() -> Problem:
    return supervised(Normalized(), "cross_entropy", inputs(9, 4), classes(9, 3))


@case(layers=("0.", "1.", "4."))
def batch_norm() -> Problem:
    norm = nn.BatchNorm1d(5)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))
    return supervised(model, "squared_error", inputs(9, 4), classes(9, 3))


class TiedLinear(nn.Module):
    """One weight in two modules, and one module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.again, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.again(torch.tanh(self.again(h)))))


@case(layers=("first.bias", "second.bias", "last."))
def tied_linear() -> Problem:
    return supervised(TiedLinear(), "cross_entropy", inputs(9, 4), classes(9, 4))


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens))).mean(1))


@case(layers=("mix.", "head.bias"))
def tied_embedding() -> Problem:
    return supervised(TiedEmbedding(), "cross_entropy", torch.randint(6, (8, 3)), classes(8, 6))


class PaddedEmbedding(nn.Module):
    """A token whose vector is a constant for the backward pass, but not for forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3, padding_idx=0), nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)).mean(1))


@case(layers=("embedding.", "head."), forward_mode=False)
def padded_embedding() -> Problem:
    tokens = torch.randint(6, (8, 4))
    tokens[:, -1] = 0
    return supervised(PaddedEmbedding(), "cross_entropy", tokens, classes(8, 3))


@case(layers=("0.bias", "2.weight", "4."))
def frozen() -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return supervised(model, "cross_entropy", inputs(9, 4), classes(9, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


@case(layers=("head.",))
def multihead_attention() -> Problem:
    return supervised(Attention(), "cross_entropy", inputs(7, 3, 4), classes(7, 3))


class CausalAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


@case(layers=("qkv.", "out."))
def scaled_dot_product_attention() -> Problem:
    return supervised(CausalAttention(), "squared_error", inputs(7, 3, 4), classes(7, 3))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


@case(layers=("head.",), vmap=False)
def gru() -> Problem:
    return supervised(Recurrent(nn.GRU), "cross_entropy", inputs(7, 3, 2), classes(7, 2))


@case(layers=("head.",), vmap=False)
def lstm() -> Problem:
    return supervised(Recurrent(nn.LSTM), "squared_error", inputs(7, 3, 2), classes(7, 2))


def _masked_error(model: Callable[..., Any], batch: Any) -> Tensor:
    error = (model(batch["x"])["prediction"] - batch["y"]) ** 2 * batch["mask"]
    return error.sum(1) / batch["mask"].sum(1)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"prediction": self.body(x)}


@case(layers=("body.0.", "body.2."))
def dict_batch() -> Problem:
    mask = torch.randint(2, (8, 3)).double()
    mask[:, 0] = 1
    batch = {"x": inputs(8, 4), "y": inputs(8, 3), "mask": mask}
    return Problem(Named(), batch_loss(_masked_error), batch, _masked_error)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.used, self.idle = nn.Parameter(torch.randn(2, 2)), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.used(x))


@case(layers=("used.",))
def unused_parameters() -> Problem:
    return supervised(Unused(), "squared_error", inputs(8, 4), inputs(8, 3))


BY_NAME = {case.name: case for case in CASES}
CHUNKINGS = {"whole": None, "uneven": 4, "single": 1}


# -- the same data in other forms ----------------------------------------------------------------------------------


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(part)]


def pick(tree: Any, index: Any) -> Any:
    """Examples of a batch of nested tuples and dicts."""
    if isinstance(tree, Tensor):
        return tree[index]
    if isinstance(tree, dict):
        return {key: pick(value, index) for key, value in tree.items()}
    return type(tree)(pick(value, index) for value in tree)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating-point tensors in another precision."""
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: cast(value, dtype) for key, value in tree.items()}
    return type(tree)(cast(value, dtype) for value in tree)


def split(batch: Any, sizes: list[int]) -> list[Any]:
    """A batch as a list of batches of the given sizes."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [pick(batch, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


class Listed(Dataset):
    """The examples of a batch, one by one."""

    def __init__(self, batch: Any) -> None:
        self.batch, self.size = batch, len(leaves(batch)[0])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Any:
        return pick(self.batch, i)


FORMS: dict[str, Callable[[Any], Any]] = {
    "tensors": lambda batch: batch,
    "batches": lambda batch: split(batch, [3, 1, len(leaves(batch)[0]) - 4]),
    "dataset": Listed,
    "loader": lambda batch: DataLoader(Listed(batch), batch_size=3, shuffle=True),
}


# -- dense references ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def differentiable_attention() -> Iterator[None]:
    """The attention kernels that have second derivatives."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class Reference:
    """A problem at a generic point w, with every matrix formed densely.

    Attributes:
        w: (P,) near the initialization, not at it.
    """

    def __init__(self, problem: Problem, *, forward_mode: bool = True, perturb: float = 0.1) -> None:
        self.problem, self.forward_mode = problem, forward_mode
        self.model = copy.deepcopy(problem.model).eval()
        self.variables = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        flat = torch.cat([p.flatten() for p in self.variables.values()])
        noise = torch.randn(len(flat), generator=torch.Generator().manual_seed(1))
        self.w = (flat.float() + perturb * noise).double()  # exact in float32
        weights = problem.weights
        self.scale = torch.ones(problem.size, dtype=DOUBLE) if weights is None else weights / weights.mean()

    def call(self, w: Tensor) -> Callable[..., Any]:
        """The model as a function of its inputs, at w."""
        parameters, start = {}, 0
        for name, p in self.variables.items():
            parameters[name] = w[start : start + p.numel()].reshape(p.shape)
            start += p.numel()
        return lambda *args, **kwargs: functional_call(self.model, parameters, args, kwargs)

    def losses(self, w: Tensor, batch: Any = None) -> Tensor:
        """ℓ_i, (B,), without weights."""
        with differentiable_attention():
            return self.problem.losses(self.call(w), self.problem.data if batch is None else batch)

    def mean(self, w: Tensor) -> Tensor:
        return (self.losses(w) * self.scale).sum() / len(self.scale)

    @functools.cached_property
    def value(self) -> float:
        return float(self.mean(self.w))

    @functools.cached_property
    def gradient(self) -> Tensor:
        return self._gradient(self.mean, self.w)

    @functools.cached_property
    def rows(self) -> Tensor:
        """(N, P) gradients of the weighted examples, each evaluated on its own."""
        one = [pick(self.problem.data, slice(i, i + 1)) for i in range(self.problem.size)]
        return torch.stack(
            [
                s * self._gradient(lambda w, b=batch: self.losses(w, b).sum(), self.w)
                for s, batch in zip(self.scale, one, strict=True)
            ]
        )

    @functools.cached_property
    def hessian(self) -> Tensor:
        return self.hessian_forward_over_reverse() if self.forward_mode else self.hessian_double_backward()

    def hessian_forward_over_reverse(self) -> Tensor:
        # Neither torch.func.hessian nor jacrev of jacrev: both are silently wrong with LayerNorm.
        return torch.func.jacfwd(torch.func.grad(self.mean))(self.w)

    def hessian_double_backward(self) -> Tensor:
        w = self.w.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.mean(w), w, create_graph=True)
        return torch.stack([torch.autograd.grad(g, w, retain_graph=True)[0] for g in gradient])

    @functools.cached_property
    def outputs(self) -> tuple[Tensor, Tensor]:
        """The outputs z_i, (N, C), and their Jacobians J_i, (N, C, P)."""
        w = self.w.clone().requires_grad_()
        with differentiable_attention():
            z = self.call(w)(self.problem.data[0])
        J = [torch.stack([torch.autograd.grad(z_ic, w, retain_graph=True)[0] for z_ic in z_i]) for z_i in z]
        return z.detach(), torch.stack(J)

    def gauss_newton(self, output_hessian: Callable[[Tensor], Tensor]) -> Tensor:
        """(1/N) Σ s_i J_iᵀ H_i J_i."""
        return sum(s * J.T @ output_hessian(z) @ J for s, z, J in zip(self.scale, *self.outputs, strict=True)) / len(
            self.scale
        )

    @functools.cached_property
    def ggn(self) -> Tensor:
        return self.gauss_newton(OUTPUT_HESSIANS[self.problem.loss])

    @functools.cached_property
    def second_moment(self) -> Tensor:
        """S_1."""
        return self.rows.T @ self.rows / len(self.rows)

    def moment(self, b: int, replacement: bool) -> tuple[Tensor, Tensor]:
        """S_b and C_b from S_1 and the mean (Lee 2022, eq. 1)."""
        n, g = len(self.rows), self.rows.mean(0)
        gamma = 1.0 if replacement else (n - b) / (n - 1)
        C = gamma / b * (self.second_moment - torch.outer(g, g))
        return C + torch.outer(g, g), C

    @staticmethod
    def _gradient(function: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
        w = w.clone().requires_grad_()
        return torch.autograd.grad(function(w), w)[0]


@functools.cache
def solved(name: str) -> tuple[Problem, Reference]:
    """The problem of a case and its reference, made once and shared; tests that change a model build their own."""
    case = BY_NAME[name]
    problem = case.build(0)
    return problem, Reference(problem, forward_mode=case.forward_mode)


def some(cases: list, every: int) -> list:
    """All of them, of which the default suite runs each `every`-th."""
    return [case if i % every == 0 else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


def off(found: Tensor, expected: Tensor, scale: Tensor | float | None = None) -> float:
    """Largest error relative to `scale`, by default the norm of what is expected."""
    size = torch.linalg.norm(expected if scale is None else torch.as_tensor(scale, dtype=DOUBLE))
    return float(torch.linalg.norm(found.double() - expected) / size)


def block(P: int, K: int = 3, seed: int = 2) -> Tensor:
    """K random unit columns, (P, K)."""
    V = torch.randn(P, K, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return V / torch.linalg.vector_norm(V, dim=0)
