"""Ways in which measuring a Hessian goes wrong, each as a function that makes the user's situation. Hides the references.

The numbers F1 ... F80 are those of a list of failures that were seen with PyTorch 2.13; `LEFT_OUT` says why others of that
list are not here. References are dense Hessians in float64 made without any of the libraries: rows of double backward
through a copy of the model, or of `clean`, the same function in plain operations; each is compared with a central
difference of the gradient when it is made.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from libraries import Mean, flat
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

CE = nn.CrossEntropyLoss


@dataclass
class Case:
    """What a user has, and what is asked.

    Attributes:
        data: what the libraries get: batches, a loader, or an iterator.
        whole: (inputs, targets), all examples once, for the reference.
        ask: "product", two products; a number k, the top k eigenvalues; "smallest"; "budget", the top one by 4 products;
            "trace", for 20 seeds; "one trace".
        start: a vector to start a search for eigenvalues from.
        modes: in which of the model's modes the answer may be right.
        clean: the same model in operations that all have second derivatives; the reference is of it.
        exact: the reference itself, where it is known: a Hessian or eigenvalues.
        wanted: whether a number can be right at all; otherwise only an error is.
        state: what must be as before, of `failure_modes.state`.
        names: of which an error must name one, as a pattern.
        during: what the measurement happens inside of.
        between: done after the library has got the problem and before it is asked.
    """

    model: nn.Module
    data: Any
    whole: tuple[Any, Tensor]
    names: str
    criterion: Any = field(default_factory=CE)
    ask: str | int = "product"
    start: Tensor | None = None
    modes: tuple[str, ...] = ("eval",)
    clean: nn.Module | None = None
    exact: Tensor | None = None
    wanted: bool = True
    state: tuple[str, ...] = ()
    during: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    between: Callable[[], object] = lambda: None

    def references(self) -> list[Tensor]:
        """The Hessians, or eigenvalues, of which the answer must be one."""
        if not self.wanted:
            return []
        if self.exact is not None:
            return [self.exact]
        return [dense(self.clean or self.model, self.criterion, *self.whole, mode) for mode in self.modes]


def dense(model: nn.Module, criterion: Any, x: Any, y: Tensor, mode: str = "eval") -> Tensor:
    """(P, P) Hessian of the criterion on all examples at once, in float64."""
    model = copy.deepcopy(model).double().train(mode == "train")
    criterion = copy.deepcopy(criterion).double()
    y = y.double() if y.is_floating_point() else y
    x = {name: part.double() for name, part in x.items()} if isinstance(x, dict) else double(x)
    params = [p for p in model.parameters() if p.requires_grad]

    def gradient(graph: bool = False) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = criterion(model(x), y)
        found = torch.autograd.grad(loss, params, create_graph=graph, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in found])

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        g = gradient(graph=True)
        H = torch.zeros(len(g), len(g), dtype=torch.float64)
        for i in range(len(g) if g.requires_grad else 0):
            H[i] = flat(torch.autograd.grad(g[i], params, retain_graph=True, materialize_grads=True))
        v, step, ends = probes(len(g))[:, 0].double(), 1e-6, []
        for move in (step, -2 * step, step):
            for p, part in zip(params, v.split([p.numel() for p in params]), strict=True):
                p.data = p.data + move * part.view(p.shape)
            ends.append(gradient())
        error = (H @ v - (ends[0] - ends[1]).detach() / (2 * step)).norm()
    assert error < 1e-5 * (1 + (H @ v).norm()), f"the reference is off by {error:.1e}"
    return H


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def probes(P: int) -> Tensor:
    """(P, 2) vectors to multiply with."""
    return torch.randn(P, 2, generator=torch.Generator().manual_seed(1))


# -- what scenarios are made of --------------------------------------------------------------------------------------


def net(*middle: nn.Module, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), *middle, nn.Tanh(), nn.Linear(6, outputs))


def vectors(n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5), torch.arange(n) % 3


def made(model: nn.Module, names: str, *, sizes: Any = None, whole: Any = None, **options: Any) -> Case:
    """A case with the data split into batches of `sizes`; one batch by default."""
    x, y = vectors() if whole is None else whole
    data = [(x, y)] if sizes is None else list(zip(x.split(sizes), y.split(sizes), strict=True))
    return Case(model, data, (x, y), names, **options)


class Op(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def with_op(function: Callable[..., Tensor], plain: Callable[..., Tensor], names: str = "", last: bool = False) -> Case:
    """A net that has `function` in it, and the same with `plain`."""
    model = nn.Sequential(*net(), Op(function)) if last else net(Op(function))
    clean = copy.deepcopy(model)
    clean[3 if last else 1].function = plain
    where = rf"{module(3 if last else 1)}|\bOp\b"
    return made(model, f"{where}|{names}" if names else where, clean=clean)


def module(name: object) -> str:
    """The pattern of a module whose name is a number, which stands in many a message for something else."""
    return rf"(module|layer|in|of) ['\"`]?{name}\b|\b{name} \(|\b{name}\.\w"


def quadratic(eigenvalues: Any, names: str, *, rotated: bool = True, **options: Any) -> Case:
    """½ Σ ± (w·x_i)², whose Hessian has these eigenvalues, in a random basis or on its diagonal."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    d = len(values)
    Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q if rotated else torch.eye(d, dtype=torch.float64)
    x, sign = (Q * (values.abs() * d).sqrt()).T.float(), values.sign().float()[:, None]
    model = nn.Linear(d, 1, bias=False)
    criterion = Mean(lambda outputs, targets: 0.5 * (targets * outputs.square()).sum(1))
    exact = values.sort(descending=True).values if isinstance(options.get("ask"), int) else (Q * values) @ Q.T
    return Case(model, [(x, sign)], (x, sign), names, criterion, exact=exact, **options)


# -- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    number: str
    title: str
    make: Callable[[], Case]


ROWS: list[Row] = []


def row(number: str, title: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Enter a scenario in the table."""

    def enter(make: Callable[[], Case]) -> Callable[[], Case]:
        ROWS.append(Row(number, title, make))
        return make

    return enter


@row("F1", "BatchNorm in training: running statistics")
def running_statistics() -> Case:
    return made(net(nn.BatchNorm1d(6)), r"BatchNorm|mode", modes=("eval", "train"), state=("buffers",))


@row("F2", "BatchNorm in training, two batches")
def batch_statistics() -> Case:
    return made(net(nn.BatchNorm1d(6)), r"BatchNorm", modes=("eval", "train"), sizes=6)


@row("F3", "BatchNorm in training, batches of one")
def batches_of_one() -> Case:
    return made(net(nn.BatchNorm1d(6)), r"BatchNorm", modes=("eval", "train"), sizes=1)


@row("F4", "spectral_norm: its power iteration goes on")
def spectral_norm() -> Case:
    model = net()
    model[0] = nn.utils.parametrizations.spectral_norm(model[0])
    return made(model, rf"spectral|{module(0)}", state=("buffers",))


@row("F4", "Embedding(max_norm) rewrites its weight")
def max_norm() -> Case:
    model = nn.Sequential(nn.Embedding(8, 5, max_norm=0.5), nn.Tanh(), nn.Linear(5, 3))
    whole = torch.arange(12) % 8, torch.arange(12) % 3
    clean = copy.deepcopy(model)
    clean(whole[0])  # rewrites it
    clean[0].max_norm = None
    return made(model, r"0\.weight|max_norm", whole=whole, clean=clean, state=("parameters",))


@row("F5", "dropout in training")
def dropout() -> Case:
    return made(net(nn.Dropout(0.5)), r"Dropout|mode")


class DropPath(nn.Module):
    """Stochastic depth with Python's random numbers, as many models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([[2.0 * (random.random() < 0.5)] for _ in x]) if self.training else x


@row("F5", "stochastic depth by Python's random numbers")
def drop_path() -> Case:
    return made(net(DropPath()), rf"DropPath|{module(1)}|mode", state=("Python's random state",))


@row("F6", "a loader that shuffles and drops the last batch")
def dropping_loader() -> Case:
    x, y = vectors(10)
    return Case(net(), DataLoader(TensorDataset(x, y), 4, shuffle=True, drop_last=True), (x, y), r"drop_last|loader")


class Augmented(Dataset):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + torch.randn(5), self.y[i]


@row("F6", "random augmentation")
def augmentation() -> Case:
    x, y = vectors()
    return Case(net(), DataLoader(Augmented(x, y), 12), (x, y), r"augment|transform|data", wanted=False)


@row("F7", "a generator as data, empty on its second pass")
def one_shot() -> Case:
    x, y = vectors()
    batches = ((a, b) for a, b in zip(x.split(4), y.split(4), strict=True))
    return Case(net(), batches, (x, y), r"data|iterator|generator|loader")


@row("F8", "a smaller last batch")
def unequal_batches() -> Case:
    return made(net(), r"batch", sizes=(5, 5, 2))


@row("F9", "class weights, several batches")
def class_weights() -> Case:
    whole = torch.randn(12, 5), torch.tensor([0, 0, 0, 0, 1, 1, 2, 1, 2, 2, 2, 2])
    return made(net(), r"weight", criterion=CE(weight=torch.tensor([10.0, 1, 0.1])), sizes=4, whole=whole)


@row("F9", "a batch whose targets are all ignored")
def ignored_batch() -> Case:
    whole = torch.randn(12, 5), torch.tensor([0, 1, 2, 0, -100, -100, -100, -100, 1, 2, 0, -100])
    return made(net(), r"ignore|target", sizes=4, whole=whole)


@row("F9", "token means over batches of unequal lengths")
def token_means() -> Case:
    tokens = torch.arange(12 * 6).view(12, 6) * 7 % 10
    targets = tokens * 3 % 10
    targets[torch.arange(6) >= torch.arange(1, 13)[:, None] / 2] = -100
    model = nn.Sequential(nn.Embedding(10, 4), nn.Tanh(), nn.Linear(4, 10), Op(lambda z: z.transpose(1, 2)))
    return made(model, r"ignore|token|target", sizes=4, whole=(tokens, targets))


@row("F10", "a loss summed over each batch")
def summed() -> Case:
    case = made(net(), r"reduction", criterion=CE(reduction="sum"), sizes=4)
    case.exact = dense(case.model, CE(reduction="sum"), *case.whole)
    return case


@row("F10", "MSELoss, a mean over outputs too")
def mean_over_outputs() -> Case:
    whole = torch.randn(12, 5), torch.randn(12, 3)
    return made(net(), r"MSE|reduction", criterion=nn.MSELoss(), sizes=(7, 5), whole=whole)


@row("F11", "a model that mixes the batch, x - x.mean(0)")
def mixing() -> Case:
    return made(net(Op(lambda x: x - x.mean(0))), r"mean over|other examples|batch", sizes=4)


@row("F13", "tied weights")
def tied() -> Case:
    model = nn.Sequential(nn.Embedding(8, 5), nn.Tanh(), nn.Linear(5, 8, bias=False))
    model[2].weight = model[0].weight
    return made(model, r"weight", whole=(torch.arange(12) % 8, torch.arange(12) * 3 % 8))


@row("F14", "frozen parameters")
def frozen() -> Case:
    model = net()
    model[0].requires_grad_(False)
    return made(model, r"0\.weight|requires_grad")


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.other = net(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@row("F15", "a parameter that the loss does not use")
def unused() -> Case:
    return made(Unused(), r"other")


@row("F17", "a loss that is linear in the parameters")
def linear_loss() -> Case:
    return made(nn.Linear(5, 3), r"linear", criterion=Mean(lambda outputs, targets: outputs.sum(1)))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)).double())


@row("F18", "parameters of float32 and float64")
def mixed_precision() -> Case:
    return made(Mixed(), r"second|dtype|float")


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3, bias=False, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.layer.weight.T).abs()


class RealPairs(nn.Module):
    """The same in real and imaginary parts."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.real, self.imaginary = nn.Parameter(weight.real.clone()), nn.Parameter(weight.imag.clone())

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.real.T).square() + (x @ self.imaginary.T).square()).sqrt()


@row("F19", "complex parameters")
def complex_parameters() -> Case:
    model = Complex()
    return made(model, r"layer\.weight|complex", ask=1, clean=RealPairs(model.layer.weight.detach()))


@row("F20", "channels_last parameters")
def channels_last() -> Case:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    whole = torch.randn(12, 2, 3, 3), torch.arange(12) % 3
    return made(model.to(memory_format=torch.channels_last), r"0\.weight", whole=whole)


@row("F21", "a lazy layer that is not initialized")
def lazy() -> Case:
    return made(nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 3)), r"[Ll]azy|ninitialized|\b0\.", ask=1)


@row("F21", "an embedding with sparse gradients")
def sparse() -> Case:
    model = nn.Sequential(nn.Embedding(8, 5, sparse=True), nn.Tanh(), nn.Linear(5, 3))
    return made(model, rf"{module(0)}|sparse=", whole=(torch.arange(12) % 8, torch.arange(12) % 3))


class TakesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.body(batch["x"] + batch["shift"])


@row("F22", "inputs that are a dict, two batches")
def dict_batches() -> Case:
    x, y = vectors()
    whole = {"x": x, "shift": torch.ones(12, 5)}
    data = [({name: part[rows] for name, part in whole.items()}, y[rows]) for rows in (slice(0, 8), slice(8, 12))]
    return Case(TakesDict(), data, (whole, y), r"dict|mapping|batch")


@row("F24", "an infinite second derivative, √ at 0")
def infinite() -> Case:
    model = net(Op(lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True) + x))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    return made(model, r"0\.(weight|bias)", wanted=False)


@row("F25", "a step of the optimizer between graph and use")
def stepped() -> Case:
    return _changed_between(lambda model: torch.optim.SGD(model.parameters(), lr=5.0).step())


@row("F25", "weights changed through .data between graph and use")
def changed_through_data() -> Case:
    def change(model: nn.Module) -> None:
        for p in model.parameters():
            p.data.mul_(-2.0)

    return _changed_between(change)


def _changed_between(change: Callable[[nn.Module], None]) -> Case:
    """Right is the Hessian at the old or the new parameters."""
    case = made(net(), r"changed|version|weight")
    x, y = case.whole
    F.cross_entropy(case.model(x), y).backward()
    old = copy.deepcopy(case.model)
    case.between = lambda: change(case.model)
    case.references = lambda: [dense(m, case.criterion, x, y) for m in (old, case.model)]  # type: ignore[method-assign]
    return case


class OldSquare(torch.autograd.Function):
    """Right, in the style of before torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class OnceSquare(OldSquare):
    """Its backward pass is a constant to autograd."""

    backward = staticmethod(torch.autograd.function.once_differentiable(OldSquare.backward))


class DetachedSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach().clone()
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.x * g


class NewSquare(torch.autograd.Function):
    """Right, without a rule for forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


@row("F16", "@once_differentiable as the last operation")
def once_last() -> Case:
    return with_op(OnceSquare.apply, torch.square, "OnceSquare|0\\.weight", last=True)


@row("F26", "@once_differentiable inside the net")
def once_inside() -> Case:
    return with_op(OnceSquare.apply, torch.square, "OnceSquare|0\\.weight")


@row("F27", "a custom Function that saves a detached tensor")
def saves_detached() -> Case:
    return with_op(DetachedSquare.apply, torch.square, "DetachedSquare|0\\.weight")


@row("F28", ".detach() in the forward pass")
def detached_scale() -> Case:
    return with_op(lambda x: x * x.detach(), torch.square, "detach|0\\.weight")


@row("F29", "a custom Function of the old style")
def old_style() -> Case:
    return with_op(OldSquare.apply, torch.square)


@row("F30", "a custom Function without a forward-mode rule")
def no_forward_mode() -> Case:
    return with_op(NewSquare.apply, torch.square)


def sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 4, 4), torch.arange(12) % 3


class First(nn.Module):
    """A recurrent or attention module, and a linear layer on the mean of what it returns."""

    def __init__(self, body: nn.Module, attention: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.attention = body, nn.Linear(4, 3), attention

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x, x, x) if self.attention else self.body(x)
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))


@row("F31", "nn.MultiheadAttention")
def attention() -> Case:
    return made(
        First(nn.MultiheadAttention(4, 2, batch_first=True), True),
        r"body|MultiheadAttention|TransformerEncoder|sdpa_kernel",
        whole=sequences(),
    )


@row("F31", "nn.TransformerEncoderLayer")
def transformer() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, "gelu", batch_first=True)
    return made(First(layer), r"body|MultiheadAttention|TransformerEncoder|sdpa_kernel", whole=sequences())


@row("F32", "nn.LSTM")
def lstm() -> Case:
    return made(First(nn.LSTM(4, 4, batch_first=True)), r"body|LSTM", whole=sequences())


@row("F32", "nn.GRU")
def gru() -> Case:
    return made(First(nn.GRU(4, 4, batch_first=True)), r"body|GRU", whole=sequences())


@row("F33", "torch.compile")
def compiled() -> Case:
    model = net()
    return made(torch.compile(model, backend="aot_eager"), r"compile", clean=model)  # type: ignore[arg-type]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = net(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.body[1:], self.body[0](x), use_reentrant=self.reentrant)


def checkpointed(reentrant: bool) -> Case:
    model = Checkpointed(reentrant)
    return made(model, r"body|use_reentrant|checkpoint", clean=copy.deepcopy(model.body))


@row("F34", "checkpoint(use_reentrant=False)")
def checkpoint_new() -> Case:
    return checkpointed(False)


@row("F34", "checkpoint(use_reentrant=True)")
def checkpoint_old() -> Case:
    return checkpointed(True)


@row("F35", "a full backward hook on a module")
def backward_hook() -> Case:
    model = net()
    model[0].register_full_backward_hook(lambda module, inputs, outputs: None)
    return made(model, rf"hook|{module(0)}", clean=copy.deepcopy(model))


@row("F36", "a hook that clips a parameter's gradient")
def clipping_hook() -> Case:
    model = net()
    clean = copy.deepcopy(model)
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return made(model, r"hook|0\.weight", clean=clean)


@row("F37", "inside torch.no_grad")
def no_grad() -> Case:
    return made(net(), r"no_grad|enable_grad", during=torch.no_grad)


@row("F37", "inside torch.inference_mode, data made there")
def inference_mode() -> Case:
    with torch.inference_mode():
        x, y = vectors()
    case = made(net(), r"inference", whole=(x, y), during=torch.inference_mode)
    case.whole = x.clone(), y.clone()
    return case


@row("F38", "control flow that depends on the data")
def control_flow() -> Case:
    return made(net(Op(lambda x: torch.sin(x) if x.abs().mean().item() > 0.1 else x)), rf"{module(1)}|\bOp\b")


@row("F40", "gradients that the user has accumulated")
def accumulated() -> Case:
    case = made(net(), r"accumulat|overwrit|chang", state=(".grad",))
    F.cross_entropy(case.model(case.whole[0]), case.whole[1]).backward()
    return case


@row("F43", "inside bfloat16 autocast")
def autocast() -> Case:
    return made(net(), r"autocast|bfloat16", during=lambda: torch.autocast("cpu", torch.bfloat16))


@row("F44", "a model that accelerate prepared for bfloat16")
def accelerated() -> Case:
    from accelerate import Accelerator

    model = net()
    clean = copy.deepcopy(model)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    return made(prepared, r"accelerate|bf16|autocast", clean=clean)


@row("F47", "thirty pairs of a decaying spectrum: ghosts")
def ghosts() -> Case:
    return quadratic([1.0, 0.93, 0.62, 0.61, *(0.5 * 0.9**i for i in range(196))], r"converge", ask=30)


@row("F48", "a double largest eigenvalue")
def multiplicity() -> Case:
    return quadratic([2.0, 2.0, *torch.linspace(1, 0, 38)], r"converge", ask=3)


@row("F49", "NaN in a weight")
def diverged() -> Case:
    model = net()
    with torch.no_grad():
        model[2].weight[1, 1] = torch.nan
    return made(model, r"2\.weight", ask=1, wanted=False)


@row("F50", "a Hessian that is zero")
def zero() -> Case:
    return quadratic([0.0] * 8, r"zero", ask=1)


@row("F51", "a Hessian of rank one")
def rank_one() -> Case:
    return quadratic([20.0] + [0.0] * 11, r"rank|zero", ask=4)


@row("F52", "as many eigenvalues as parameters")
def all_eigenvalues() -> Case:
    return quadratic([3.0, 2.0, -1.0, 0.5], r"\bk\b", ask=4)


@row("F53", "a largest eigenvalue smaller than the other end")
def negative() -> Case:
    return quadratic([-30.0, -5.0, *torch.linspace(-4, -1, 18)], r"algebraic|magnitude", ask=1)


@row("F54", "a start vector orthogonal to the answer")
def orthogonal_start() -> Case:
    start = torch.ones(20)
    start[0] = 0
    return quadratic([10.0, *torch.linspace(1, 0, 19)], r"start|v0|init", rotated=False, ask=1, start=start)


@row("F55", "too few products to converge: partial results, said so")
def no_convergence() -> Case:
    return quadratic(torch.linspace(1, 0, 200) ** 3, r"converge", ask="budget")


@row("F56", "the trace: within 10%, or in its stated interval, for 18 of 20 seeds")
def stopping() -> Case:
    return quadratic(
        [10.0, -6.0, *(4 / i for i in range(1, 30)), *torch.linspace(0.1, -0.1, 170)], r"trace", ask="trace"
    )


@row("F57", "an eigenvalue of 1e-9 beside 1e3, or a bound that says it is rounding")
def tiny() -> Case:
    return quadratic([1e3, *torch.linspace(1, 0.1, 38), 1e-9], r"rounding|bound", ask="smallest")


@row("F77", "LayerNorm")
def layer_norm() -> Case:
    return made(net(nn.LayerNorm(6)), rf"LayerNorm|{module(1)}")


@row("F80", "GroupNorm")
def group_norm() -> Case:
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    return made(model, rf"GroupNorm|{module(1)}", whole=(torch.randn(12, 2, 3, 3), torch.arange(12) % 3))


@row("state", "train and eval flags, some layers frozen in eval")
def flags() -> Case:
    model = net(nn.BatchNorm1d(6)).train()
    model[1].eval()
    return made(model, r"mode|eval", state=("train/eval flags",))


@row("state", "the random numbers of training, by a trace")
def random_numbers() -> Case:
    return quadratic(torch.linspace(1, 0, 120), r"generator|seed", ask="one trace", state=("torch's random state",))


LEFT_OUT = {
    "F12": "what is measured is the loss as passed, in all four libraries",
    "F23": "H has no kinks by definition; only curvlab has secant_sharpness beside it",
    "F39": "as F5",
    "F41": "memory, not a number",
    "F42": "threads: the others measure the live parameters only",
    "F45": "TF32 needs a GPU",
    "F46": "wants 10 million parameters",
    "F58": "covariances of gradients are curvlab's only",
    "F59": "signs of eigenvectors are a convention",
    "F60": "rounding between threads and chunks, not a failure",
    "F61": "memory: see bench_memory.py",
    "F62": "needs a GPU",
    "F63": "needs a GPU",
    **{f"F{i}": "files and logs, which the others do not write" for i in range(64, 77)},
    "F78": "penalties are curvlab's only",
    "F79": "per-example norms: see bench_per_example.py",
}
