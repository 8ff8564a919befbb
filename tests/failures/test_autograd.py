"""Autograd machinery that lacks a second derivative, or has a wrong one: failures F31 to F42 and F77 to F80.

Compared with a reference: products of every engine and per-example gradients, in each row's setting, with the dense float64
matrices of `cases.py` for the same function without the hindrance; products through single operations with central
differences of the gradient. Behaviour only: texts of refusals, what is warned of, what stays on the model and in memory.
"""

from __future__ import annotations

import copy
import functools
import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DOUBLE,
    EAGER,
    Attention,
    CausalAttention,
    Problem,
    Recurrent,
    Reference,
    TiedEmbedding,
    TiedLinear,
    block,
    cast,
    classes,
    inputs,
    off,
    solved,
    supervised,
)  # fmt: skip
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import curvlab as cl
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.hvp import HessianProducts
from curvlab.per_example import ExampleGradients
from curvlab.regularizers.registry import REGULARIZERS

PACKAGE = Path(cl.__file__).parent
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: its kernels differ from the CPU's")


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build().double()


def problem(model: nn.Module, *shape: int, n: int = 6, outputs: int = 3) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return supervised(model, "cross_entropy", inputs(n, *shape), classes(n, outputs))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def right(
    L: cl.Objective, reference: Reference, *, engines: list[str] = EAGER, tol: float = 1e-13, examples: bool = True
) -> dict[str, HessianProducts]:
    """Products by every engine and per-example norms against the dense reference; the products by engine."""
    H, rows, w = reference.hessian, reference.rows, reference.w
    V, used = block(len(w)), {}
    for engine in engines:
        used[engine] = products = HessianProducts(L, w, engine=engine)
        found = products.matmat(V.to(L.device, L.dtype)).cpu()
        assert off(found, H @ V, torch.linalg.norm(H, 2)) < tol, engine
        assert off(products.value_and_gradient()[1].cpu(), reference.gradient) < tol, engine
        assert (products.engine == engine) or products.reason, engine
    if examples:
        norms = rows.square().sum(1)
        assert off(ExampleGradients(L, w).squared_norms().cpu(), norms) < tol
        assert off(L.example_gradients(w.to(L.device)).cpu(), rows) < tol
    return used


# -- F31: attention ------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class OwnKernel(CausalAttention):
    """Its forward chooses the kernel, against the choice of whoever measures."""

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().forward(x)


class Flexible(CausalAttention):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        return self.out(flex_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("build", [CausalAttention, Attention, Encoder])
def test_F31_attention_has_a_second_derivative(build):
    p = problem(made(build).train(), 3, 4)
    right(p.objective(), Reference(p))
    assert torch.backends.cuda.flash_sdp_enabled()  # the user's choice of kernels is back


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build, op", [(OwnKernel, "flash_attention"), (Flexible, "FlexAttention")])
def test_F31_kernels_without_one_are_named(build, op):
    text = rf"own forward \({build.__name__}\) cannot be differentiated twice by PyTorch \(.*{op}.*write F.scaled_dot"
    for engine in EAGER:
        with pytest.raises(ValueError, match=text):
            cl.hessian(problem(made(build), 3, 4).objective(), engine=engine) @ torch.ones(63, dtype=DOUBLE)


@on_cuda
@pytest.mark.parametrize("build", [CausalAttention, Attention, Encoder])
def test_F31_attention_on_a_gpu(build):
    p = problem(made(build).train(), 3, 4)
    reference = Reference(p)
    right(replace(p, model=p.model.float(), data=cast(p.data, torch.float32)).objective(device="cuda"), reference, tol=2e-6)


# -- F32: recurrent layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_F32_recurrent_layers_are_right_with_every_engine(kind, dtype, tol):
    p = problem(made(lambda: Recurrent(kind)), 3, 2, outputs=2)
    reference = Reference(p, forward_mode=False)
    L = replace(p, model=p.model.to(dtype), data=cast(p.data, dtype)).objective()
    used = right(L, reference, tol=tol)
    assert {name: products.engine for name, products in used.items()} == {name: name for name in EAGER}
    assert torch.backends.mkldnn.enabled  # the user's kernels are back


@on_cuda
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_F32_recurrent_layers_on_a_gpu(kind):
    p = problem(made(lambda: Recurrent(kind)), 3, 2, outputs=2)
    reference = Reference(p, forward_mode=False)
    L = replace(p, model=p.model.float(), data=cast(p.data, torch.float32)).objective(device="cuda")
    right(L, reference, tol=2e-6)
    assert torch.backends.cudnn.enabled


# -- F33: torch.compile --------------------------------------------------------------------------------------------


class CompiledInside(nn.Module):
    """A compiled function that is no module, so that nothing on the model tells of it."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.activate = compiled(lambda x: torch.tanh(x) * x.sin())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activate(self.first(x)))


def in_place(compiled: Callable[..., Any]) -> nn.Module:
    model = CompiledInside(lambda f: f)
    model.compile(backend=compiled.keywords["backend"])
    return model


COMPILED = {
    "whole": lambda compiled: compiled(CompiledInside(lambda f: f)),
    "in place": in_place,
    "a part": lambda compiled: nn.Sequential(compiled(nn.Linear(4, 5)), compiled(nn.Tanh()), nn.Linear(5, 3)),
    "a function": CompiledInside,
}


@pytest.mark.parametrize("kind", COMPILED)
def test_F33_compiled_models_are_measured_eagerly(kind):
    compilations = []

    def backend(graph, example_inputs):
        from torch._dynamo.backends.debugging import aot_eager

        compilations.append(graph)
        return aot_eager(graph, example_inputs)

    model = made(lambda: COMPILED[kind](functools.partial(torch.compile, backend=backend)))
    p = problem(model, 4)
    plain = mlp() if kind == "a part" else CompiledInside(lambda f: f)
    plain.double().load_state_dict({n.replace("_orig_mod.", ""): t for n, t in model.state_dict().items()})
    reference = Reference(replace(p, model=plain))
    model(p.data[0]).sum().backward()  # as in training
    count = len(compilations)
    assert count
    right(p.objective(), reference)
    assert len(compilations) == count
    model(p.data[0][:1].detach().clone())
    model(p.data[0][:3].detach().clone())
    assert len(compilations) > count  # it compiles again for other shapes: the user's stance is back


# -- F34: activation checkpointing ---------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None, part: str = "module") -> None:
        super().__init__()
        self.first, self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.reentrant, self.part = reentrant, part

    def forward(self, x: Tensor) -> Tensor:
        run = {
            "module": self.body,
            "function": lambda h: torch.tanh(F.linear(h, self.body.weight, self.body.bias)),
            "no parameters": lambda h: torch.tanh(h) * h,
        }[self.part]
        h = self.first(x)
        return self.head(run(h) if self.reentrant is None else checkpoint(run, h, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant, part", [(False, "module"), (False, "function"), (True, "module")])
def test_F34_activation_checkpointing_is_refused_by_name(reentrant, part):
    what = "part of the model" if reentrant else "body.weight"
    with pytest.raises(ValueError, match=rf"{what} is computed again .*block\(x\) in place of checkpoint\(block, x\)"):
        problem(made(lambda: Checkpointed(reentrant, part)), 4).objective()


def test_F34_recomputation_without_parameters_is_right():
    p = problem(made(lambda: Checkpointed(False, "no parameters")), 4)
    plain = copy.deepcopy(p.model)
    plain.reentrant = None
    used = right(p.objective(), Reference(replace(p, model=plain)))
    assert used["forward_over_reverse"].engine == "double_backward"
    assert "saved tensor hooks" in used["forward_over_reverse"].reason


# -- F35, F36: hooks -----------------------------------------------------------------------------------------------


def clipped(gradient: Tensor) -> Tensor:
    return gradient.clamp(-1e-3, 1e-3)


def clip_output(module: nn.Module, args: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(clipped)


HOOKS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "parameter": ("a hook on parameter 0.weight", lambda m: m[0].weight.register_hook(clipped)),
    "module": (
        "a backward hook of 2 (Linear)",
        lambda m: m[2].register_full_backward_hook(lambda m, grad_in, grad_out: (clipped(grad_in[0]),)),
    ),
    "pre": (
        "a backward hook of 2 (Linear)",
        lambda m: m[2].register_full_backward_pre_hook(lambda m, grad_out: tuple(map(clipped, grad_out))),
    ),
    "tensor": ("a tensor hook in the forward pass of 0 (Linear)", lambda m: m[0].register_forward_hook(clip_output)),
}


def test_F35_backward_hooks_of_modules_do_not_stop_torch_func():
    p = problem(made(mlp), 4)
    reference, fired = Reference(p), []
    p.model[2].register_full_backward_hook(lambda *_: fired.append(1))
    used = right(p.objective(), reference)
    assert used["forward_over_reverse"].engine == "forward_over_reverse"
    assert not fired


@pytest.mark.parametrize("kind", HOOKS)
def test_F36_hooks_are_warned_of_by_name_and_measured_without(kind, caplog):
    p = problem(made(mlp), 4)
    reference = Reference(p)
    name, register = HOOKS[kind]
    register(p.model)
    F.cross_entropy(p.model(p.data[0]), p.data[1]).backward()
    trained = [q.grad.clone() for q in p.model.parameters()]
    L = p.objective()
    assert f"measured without {name}: hooks change gradients, and not the loss" in caplog.text
    right(L, reference)
    assert off(cl.ggn(L, reference.w) @ reference.w, reference.ggn @ reference.w) < 1e-13
    for q in p.model.parameters():
        q.grad = None
    F.cross_entropy(p.model(p.data[0]), p.data[1]).backward()
    assert all(torch.equal(q.grad, g) for q, g in zip(p.model.parameters(), trained, strict=True))  # the hook still acts
    assert off(L.gradient(), torch.cat([g.flatten() for g in trained])) > 0.1


def test_F36_the_gradient_of_training_is_not_taken_for_the_losss_where_hooks_change_it():
    for _, register in HOOKS.values():
        p = problem(made(mlp), 4)
        true = float(p.objective().gradient().norm())
        register(p.model)
        L, sgd = p.objective(), torch.optim.SGD(p.model.parameters(), lr=0.1)
        (at,) = cl.train(L, sgd, cl.Batches(L.size, L.size, steps=1), diagnostics=["gradient_norm"])
        assert at.measurements["gradient_norm"].value == pytest.approx(true, rel=1e-12)


# -- F37: modes of autograd ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_F37_gradients_exist_where_autograd_is_off(context):
    def build() -> nn.Module:
        return made(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))

    reference = Reference(problem(build(), 4))
    _ = reference.hessian, reference.rows, reference.gradient
    with context():  # the model, its buffers, the data and the point are all made inside
        p = problem(build(), 4)
        reference.w = reference.w.clone()
        L = p.objective()
        right(L, reference)
        assert cl.measure(L, ["sharpness"], w=reference.w)["sharpness"].value is not None
    right(L, reference)


# -- F38, F39: what vmap cannot do ---------------------------------------------------------------------------------


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out = torch.zeros_like(h)
        rows = torch.nonzero(x[:, 0] > 0)[:, 0]
        out[rows] = h[rows].tanh() if len(rows) else h[rows]
        scale = 2.0 if out.square().sum().item() >= 0 else 1.0
        return self.head(out * scale + h.sin())


def test_F38_control_flow_that_depends_on_data_is_right(caplog):
    p = problem(made(DataDependent), 4)
    used = right(p.objective(), Reference(p, forward_mode=False))
    assert used["traced"].engine == "graph"
    assert "nothing could be recorded" in used["traced"].reason
    assert "no trace" in caplog.text


def test_F39_dropout_is_off_by_default_and_one_fixed_mask_otherwise():
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3))).train()
    p = problem(model, 4)
    reference = Reference(p)  # without dropout
    right(p.objective(), reference)
    L, w, v = p.objective(mode="train"), reference.w, block(len(reference.w))
    H = HessianProducts(L, w, engine="double_backward").matmat(v)
    assert off(H, reference.hessian @ v) > 1e-2
    assert all(torch.equal(H, HessianProducts(L, w, engine="double_backward").matmat(v)) for _ in range(3))
    assert off(L.example_gradients(w).mean(0), L.gradient(w)) < 1e-13
    assert off(ExampleGradients(L, w).combine(torch.ones(6, 1, dtype=DOUBLE))[:, 0] / 6, L.gradient(w)) < 1e-13


# -- F40, F41: graphs that stay alive ------------------------------------------------------------------------------

STEP: dict[str, Any] = {"batch_size": 3, "lr": 0.1}


def without_needs() -> list[str]:
    return [name for name, entry in DIAGNOSTICS.items() if not {"batch_gradient", "preconditioner", "test"} & {*entry.needs}]


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_F40_measuring_leaves_grad_alone_and_no_graph_behind():
    p = problem(made(mlp), 4)
    F.cross_entropy(p.model(p.data[0]), p.data[1]).backward()
    grads = [(q.grad, q.grad.clone()) for q in p.model.parameters()]
    L, counts = p.objective(), []
    for _ in range(4):
        cl.measure(L, ["sharpness", "hessian_trace", "interaction_sharpness", "gradient_variance"], **STEP)
        counts.append(live_tensors())
    assert counts[1:] == counts[1:2] * 3
    for q, (grad, value) in zip(p.model.parameters(), grads, strict=True):
        assert q.grad is grad
        assert torch.equal(grad, value)
        assert grad.grad_fn is None
    create_graph = [file for file in PACKAGE.rglob("*.py") if "backward(create_graph" in file.read_text()]
    assert create_graph == []


def test_F41_what_is_returned_carries_no_graph(tmp_path):
    p = problem(made(mlp), 4)
    L, sgd = p.objective(), torch.optim.SGD(p.model.parameters(), lr=0.1)
    monitor = cl.Monitor(L, ["sharpness"], every=1, optimizer=sgd, run=tmp_path / "run")
    before, found = live_tensors(), []
    for step in range(4):
        found.append(monitor(step))
        for m in cl.measure(L, without_needs() if step == 0 else ["sharpness", "gradient_norm"], **STEP).values():
            assert not isinstance(m.value, Tensor)
            assert not isinstance(m.error, Tensor)
    monitor.close() if hasattr(monitor, "close") else None
    assert all(not isinstance(m.value, Tensor) for one in found for m in one.values())
    # a fixed number for warm starts, none for each step
    assert live_tensors() - before < 40
    for tensor in (L.value(), L.gradient(), L.params(), L.example_gradients(), cl.hessian(L) @ block(L.num_params)):
        assert tensor.grad_fn is None
        assert not tensor.requires_grad


# -- F42: threads --------------------------------------------------------------------------------------------------


def test_F42_another_thread_never_sees_the_measured_point():
    p = problem(made(mlp).eval(), 4)
    x, model = p.data[0], p.model
    L, expected, weights = p.objective(), model(x).detach(), {n: t.clone() for n, t in model.state_dict().items()}
    wrong: list[str] = []
    calls, stop = [0], threading.Event()

    def use() -> None:
        while not stop.is_set():
            calls[0] += 1
            if not torch.equal(model(x), expected):
                wrong.append("outputs")
            if any(not torch.equal(t, weights[n]) for n, t in model.state_dict().items()):
                wrong.append("state_dict")

    thread = threading.Thread(target=use)
    thread.start()
    w = L.params() + 1.0
    for _ in range(20):
        cl.hessian(L, w) @ torch.ones(L.num_params, dtype=DOUBLE)
    stop.set()
    thread.join()
    assert calls[0] > 0
    assert wrong == []
    assert not any(m._forward_pre_hooks or m._state_dict_pre_hooks for m in model.modules())


def test_F42_threads_that_measure_take_turns():
    problems = [problem(made(mlp, seed).train(), 4) for seed in (0, 0, 1)]
    shared = problems[0].objective()
    objectives = [shared, shared, *(p.objective() for p in problems[1:])]
    names = ["loss", "gradient_norm", "sharpness"]
    expected = [{n: m.value for n, m in cl.measure(L, names).items()} for L in objectives]
    found: list[list[Any]] = [[] for _ in objectives]

    def measure(i: int) -> None:
        for _ in range(5):
            found[i].append({n: m.value for n, m in cl.measure(objectives[i], names).items()})

    threads = [threading.Thread(target=measure, args=(i,)) for i in range(len(objectives))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == [values] * 5 for one, values in zip(found, expected, strict=True))
    assert all(p.model.training and p.model[0].training for p in problems)


# -- F77, F78, F80: orders and batches of derivatives through normalization ----------------------------------------


def test_F77_products_through_layer_norm_are_right_in_every_order():
    case, reference = solved("layer_norm")
    right(case.objective(), reference)
    w, h = reference.w, 1e-5
    columns = []
    for e in h * torch.eye(len(w), dtype=DOUBLE):
        ends = [reference._gradient(reference.mean, w + s * e) for s in (1, -1)]
        columns.append((ends[0] - ends[1]) / (2 * h))
    assert off(torch.stack(columns, 1), reference.hessian) < 1e-8
    banned = ("jacrev(", "func.hessian(")  # silently wrong through LayerNorm
    assert [str(f) for f in PACKAGE.rglob("*.py") if any(word in f.read_text() for word in banned)] == []


@pytest.mark.parametrize("name", [name for name in REGULARIZERS if "difference" not in name])
def test_F78_penalties_differentiate_right_through_layer_norm(name):
    case, reference = solved("layer_norm")
    L, along, h = case.objective(), block(len(reference.w), 1)[:, 0], 1e-4

    def penalty(w: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return REGULARIZERS[name].penalty(L, w, torch.arange(L.size), micro_batch_size=4, generator=generator)

    w = reference.w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(penalty(w), w)
    at = {k: float(penalty(reference.w + k * h * along)) for k in (-2, -1, 1, 2)}
    difference = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    assert float(gradient @ along) == pytest.approx(difference, rel=1e-6, abs=1e-8 * float(gradient.norm()))


def test_F80_blocks_of_products_through_group_norm_are_right(monkeypatch):
    build = lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))  # noqa: E731
    p = problem(made(build), 2, 3)
    reference = Reference(p)
    right(p.objective(), reference)
    monkeypatch.setattr("curvlab.hvp.BLOCKS_ON", ("cpu",))  # as on a GPU, several vectors at once
    monkeypatch.setattr("curvlab.hvp.fastest_block", lambda one, several, V: V.shape[1])
    right(p.objective(), reference)


# -- F79: per-example gradients that layers do not show ------------------------------------------------------------


class TiedFunctionally(TiedEmbedding):
    """The embedding is also the head, by a call that no module sees."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.embedding(tokens))).mean(1), self.embedding.weight)


@pytest.mark.parametrize("build", [Attention, TiedFunctionally, TiedLinear, TiedEmbedding, Encoder])
def test_F79_per_example_norms_of_layers_that_hooks_do_not_show(build):
    p = problem(made(build), *((3, 4) if build in (Attention, Encoder) else (4,)))
    if issubclass(build, TiedEmbedding):
        tokens = torch.arange(18).reshape(6, 3) % 5
        p = supervised(p.model, "cross_entropy", tokens, torch.arange(6))
    if build is TiedLinear:
        p = supervised(p.model, "cross_entropy", p.data[0], p.data[1])
    reference, L = Reference(p), p.objective()
    examples = ExampleGradients(L, reference.w)
    assert off(examples.squared_norms(), reference.rows.square().sum(1)) < 1e-13
    assert off(examples.gram(), reference.rows @ reference.rows.T) < 1e-13
    assert off(examples.combine(torch.ones(6, 1, dtype=DOUBLE))[:, 0] / 6, reference.gradient) < 1e-13


# -- every operation of torch.nn -----------------------------------------------------------------------------------


class Through(nn.Module):
    """A linear layer, an operation on its output (B, ...), and what is left of it as three outputs."""

    def __init__(self, operation: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.operation = nn.Linear(4, int(torch.tensor(shape).prod())), operation
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(self.first(x).reshape(len(x), *self.shape)).reshape(len(x), -1)
        weight = torch.linspace(-1.0, 2.0, 3 * y.shape[1], dtype=y.dtype, device=y.device).sin().reshape(3, -1)
        return F.linear(y, weight)


class First(nn.Module):
    """Of several outputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> Tensor:
        return self.module(z)[0]


def pairs(z: Tensor) -> tuple[Tensor, Tensor]:
    return z[..., :3], z[..., 3:]


PLANE, VECTOR = (2, 6, 6), (6,)
ACTIVATIONS = (
    "CELU ELU GELU GLU Hardshrink Hardswish Hardtanh LeakyReLU LogSigmoid LogSoftmax Mish PReLU RReLU ReLU ReLU6 SELU SiLU "
    "Sigmoid Softmax Softmin Softplus Softshrink Softsign Tanh Tanhshrink"
)
OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    **{
        name: (getattr(nn, name)(**({"dim": -1} if "Soft" in name and name[4:] in ("max", "min") else {})), VECTOR)
        for name in ACTIVATIONS.replace("LogSoftmax", "").split()
    },
    "LogSoftmax": (nn.LogSoftmax(-1), VECTOR),
    "Threshold": (nn.Threshold(0.1, 0.2), VECTOR),
    "Conv1d": (nn.Conv1d(2, 3, 2), (2, 6)),
    "Conv2d": (nn.Conv2d(2, 3, 3, padding=1, stride=2), PLANE),
    "Conv3d": (nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "ConvTranspose1d": (nn.ConvTranspose1d(2, 3, 2), (2, 6)),
    "ConvTranspose2d": (nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 3, 3)),
    "Unfold": (nn.Unfold(2), PLANE),
    "Fold": (nn.Fold((3, 3), 2), (4, 4)),
    "AvgPool1d": (nn.AvgPool1d(2), (2, 6)),
    "AvgPool2d": (nn.AvgPool2d(2), PLANE),
    "MaxPool1d": (nn.MaxPool1d(2), (2, 6)),
    "MaxPool2d": (nn.MaxPool2d(2), PLANE),
    "LPPool2d": (nn.LPPool2d(2, 2), PLANE),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d(2), PLANE),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d(2), PLANE),
    "BatchNorm2d": (nn.BatchNorm2d(2), PLANE),
    "GroupNorm": (nn.GroupNorm(2, 4), (4, 3)),
    "InstanceNorm2d": (nn.InstanceNorm2d(2, affine=True), PLANE),
    "LayerNorm": (nn.LayerNorm(6), VECTOR),
    "RMSNorm": (nn.RMSNorm(6), VECTOR),
    "LocalResponseNorm": (nn.LocalResponseNorm(2), PLANE),
    "Bilinear": (lambda z: torch.einsum("bi,bj->bij", *pairs(z)), VECTOR),
    "CosineSimilarity": (lambda z: F.cosine_similarity(*pairs(z))[:, None], VECTOR),
    "PairwiseDistance": (lambda z: F.pairwise_distance(*pairs(z))[:, None], VECTOR),
    "normalize": (lambda z: F.normalize(z), VECTOR),
    "pad reflect": (lambda z: F.pad(z, (1, 1), mode="reflect"), (2, 6)),
    "pad circular": (lambda z: F.pad(z, (1, 1), mode="circular"), (2, 6)),
    "pad replicate": (lambda z: F.pad(z, (1, 1), mode="replicate"), (2, 6)),
    "PixelShuffle": (nn.PixelShuffle(2), (4, 3, 3)),
    "Upsample bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 3)),
    "Upsample bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), (2, 3, 3)),
    "Upsample nearest": (nn.Upsample(scale_factor=2), (2, 3, 3)),
    "grid_sample": (
        lambda z: F.grid_sample(z[:, :, :, :3], z[:, :, :, 3:].permute(0, 2, 3, 1).tanh() * 0.9, align_corners=True),
        (2, 3, 6),
    ),
    "Embedding": (lambda z: z @ z.new_tensor([[1.0, 2.0]] * 6), VECTOR),
    "scaled_dot_product_attention": (lambda z: F.scaled_dot_product_attention(z, z, z), (3, 4)),
    "TransformerEncoderLayer": (nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), (3, 4)),
    "LSTM": (First(nn.LSTM(2, 3, batch_first=True)), (3, 2)),
    "GRU": (First(nn.GRU(2, 3, batch_first=True)), (3, 2)),
    "cumprod": (lambda z: z.cumprod(-1), VECTOR),
    "logsumexp": (lambda z: z.logsumexp(-1, keepdim=True), VECTOR),
    "einsum": (lambda z: torch.einsum("bij,bkj->bik", z, z), (2, 3)),
    "huber_loss": (lambda z: F.huber_loss(*pairs(z), reduction="none", delta=0.5), VECTOR),
    "smooth_l1_loss": (lambda z: F.smooth_l1_loss(*pairs(z), reduction="none"), VECTOR),
    "soft_margin_loss": (lambda z: F.soft_margin_loss(z, z.detach().sign(), reduction="none"), VECTOR),
    "kl_div": (lambda z: F.kl_div(z.log_softmax(-1), z.flip(-1).softmax(-1), reduction="none"), VECTOR),
    "poisson_nll_loss": (lambda z: F.poisson_nll_loss(*pairs(z), reduction="none"), VECTOR),
    "gaussian_nll_loss": (lambda z: F.gaussian_nll_loss(z[:, :2], z[:, 2:4], z[:, 4:].exp(), reduction="none"), VECTOR),
    "triplet_margin_loss": (
        lambda z: F.triplet_margin_loss(z[:, :2], z[:, 2:4], z[:, 4:], margin=5.0, reduction="none")[:, None],
        VECTOR,
    ),
    "binary_cross_entropy_with_logits": (
        lambda z: F.binary_cross_entropy_with_logits(z, z.flip(-1).sigmoid(), reduction="none"),
        VECTOR,
    ),
}  # fmt: skip
WITHOUT: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], str]] = {
    "cdist": (lambda z: torch.cdist(z, z + 1.0), (3, 2), "vector_norm"),
    "pdist": (lambda z: torch.stack([F.pdist(one) for one in z]), (3, 2), "triu_indices"),
    "embedding_bag": (
        lambda z: torch.cat([F.embedding_bag(torch.tensor([[0, 1]]), one) for one in z]), (3, 2), "F.embedding"
    ),
    "hardsigmoid": (F.hardsigmoid, VECTOR, "relu6"),
    "multi_margin_loss": (
        lambda z: F.multi_margin_loss(z, torch.zeros(len(z)).long(), reduction="none")[:, None], VECTOR, "clamp"
    ),
    "multilabel_margin_loss": (
        lambda z: F.multilabel_margin_loss(z, torch.tensor([[0, 2, -1, 0, 0, 0]] * len(z)), reduction="none")[:, None],
        VECTOR, "clamp",
    ),
    "segment_reduce lengths": (
        lambda z: torch.stack([torch.segment_reduce(one, "sum", lengths=torch.tensor([2, 1])) for one in z]),
        (3, 2), "index_add",
    ),
    "segment_reduce offsets": (
        lambda z: torch.stack([torch.segment_reduce(one, "sum", offsets=torch.tensor([0, 2, 3])) for one in z]),
        (3, 2), "index_add",
    ),
    "sparse.mm reduce": (
        lambda z: torch.stack([torch.sparse.mm(torch.eye(3).to(z.dtype).to_sparse_csr(), one, "sum") for one in z]),
        (3, 2), "dense matrix",
    ),
    "ctc_loss": (
        lambda z: torch.stack(
            [F.ctc_loss(one.log_softmax(-1)[:, None], torch.tensor([[1]]), [4], [1], reduction="none") for one in z]
        ),
        (4, 3), "differentiated twice",
    ),
}  # fmt: skip


def differenced(reference: Reference, V: Tensor, h: float = 1e-5) -> Tensor:
    """H V by central differences of first derivatives."""
    ends = [[reference._gradient(reference.mean, reference.w + s * h * v) for v in V.T] for s in (1, -1)]
    return torch.stack([(a - b) / (2 * h) for a, b in zip(*ends, strict=True)], 1)


def one_is_right(name: str) -> None:
    operation, shape = OPERATIONS[name]
    p = problem(made(lambda: Through(copy.deepcopy(operation), shape)), 4)
    reference = Reference(p)
    V = block(len(reference.w), 2)
    expected = differenced(reference, V)
    for engine in ("double_backward", "forward_over_reverse"):
        found = HessianProducts(p.objective(), reference.w, engine=engine).matmat(V)
        assert off(found, expected) < 1e-6, engine


@pytest.mark.parametrize("name", ["Softplus", "GroupNorm", "grid_sample", "huber_loss"])
def test_operations_of_torch_nn_are_right(name):
    one_is_right(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_of_torch_nn_is_right(name):
    one_is_right(name)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", WITHOUT)
def test_operations_without_a_second_derivative_are_named(name):
    operation, shape, instead = WITHOUT[name]
    p = problem(made(lambda: nn.Sequential(Through(operation, shape))), 4)
    L = p.objective()
    for engine in ("graph", "forward_over_reverse"):
        with pytest.raises(ValueError, match=rf"^0 \(Through\) cannot be differentiated twice by PyTorch.*{instead}"):
            cl.hessian(L, engine=engine) @ torch.ones(L.num_params, dtype=DOUBLE)
    assert off(L.example_gradients().mean(0), L.gradient()) < 1e-13  # first derivatives are there
