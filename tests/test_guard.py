"""Measuring never changes the training.

Compared with a reference: parameters, buffers, optimizer states and random states after training with every diagnostic
at every step, bit by bit, with those after a plain loop that knows nothing of the package; and each diagnostic measured
alone with the same one among all others. Behaviour only: what a measurement leaves behind, one diagnostic at a time,
also when it fails half way.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Attention, Recurrent, block
from torch import nn

import curvlab as cl
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.guard import measuring
from curvlab.per_example import ExampleGradients

AT_A_POINT = [name for name, entry in DIAGNOSTICS.items() if not {"batch_gradient", "preconditioner"} & {*entry.needs}]
WHILE_TRAINING = [name for name, entry in DIAGNOSTICS.items() if "preconditioner" not in entry.needs]
CHEAPER = {"hessian_density": {"num_probes": 2, "steps": 4, "points": 9}, "directional_alignment": {"alphas": (1.0,)}}
N = 24  # more than the number of probes, so that estimates are estimates


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = seeded(N, 4), torch.arange(N) % 3
TEST = seeded(10, 4, seed=1), torch.arange(10) % 3


def build(seed=0):
    """Dropout, batch normalization that trains, and batch normalization that is frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4))
        model = nn.Sequential(*first, nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        model[5].running_mean.normal_()
        model[5].requires_grad_(False).eval()
        return model


STEP = {"batch_size": 5, "lr": 0.1}


def objectives(model):
    return cl.Objective(model, "cross_entropy", (X, Y), chunk_size=16), cl.Objective(model, "cross_entropy", TEST)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def asked(names):
    """The diagnostics with options that make the dear ones cheaper."""
    return [(name, CHEAPER.get(name, {})) for name in names]


def flags():
    """Global settings of torch that change what a training step computes."""
    out = {}
    for backend in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"):
        module = torch.backends
        for part in backend.split("."):
            module = getattr(module, part)
        out[backend] = module.fp32_precision
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    for kernel in ("flash", "mem_efficient", "math", "cudnn"):
        out[kernel] = getattr(cuda, f"{kernel}_sdp_enabled")()
    out["cudnn"] = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    out["fastpath"] = torch.backends.mha.get_fastpath_enabled()
    out["matmul"] = torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32
    out["autocast"] = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    out["modes"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    out["deterministic"] = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    return out


def random_states():
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), [numpy[0], numpy[1].tolist(), *numpy[2:]]


def tensors(tree):
    """A copy of nested containers with tensors as lists, to be compared with ==."""
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tree.tolist()
    if isinstance(tree, dict):
        return {key: tensors(value) for key, value in tree.items()}
    return [tensors(value) for value in tree] if isinstance(tree, list | tuple) else tree


def state(model, optimizer=None):
    """All that a measurement must leave as it was."""
    return {
        "parameters": {name: (id(p), p._version, tensors(p.detach())) for name, p in model.named_parameters()},
        "gradients": {name: (id(p.grad), tensors(p.grad)) for name, p in model.named_parameters()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "buffers": {name: (id(b), b._version, tensors(b)) for name, b in model.named_buffers()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [list(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "optimizer": None if optimizer is None else tensors(optimizer.state_dict()),
        "random": random_states(),
        "flags": flags(),
    }


@pytest.fixture
def training():
    """A model, its objectives and its optimizer in the middle of training: with gradients and momentum."""
    model = build()
    L, test = objectives(model)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model, L, test, optimizer


def at(L, test):
    w, g = L.params(), L.gradient()
    return cl.Snapshot(L, w, **STEP, test=test, batch_gradient=g, preconditioner=g.abs() + 1, carry={})


# -- what a measurement leaves behind ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_a_diagnostic_leaves_no_trace(name, training):
    model, L, test, optimizer = training
    point = at(L, test)
    before = state(model, optimizer)
    if name in AT_A_POINT:
        cl.measure(L, asked([name]), **STEP, test=test)
        assert state(model, optimizer) == before
    DIAGNOSTICS[name].function(point, **CHEAPER.get(name, {}))
    assert state(model, optimizer) == before


def test_making_an_objective_and_its_operators_leaves_no_trace(training):
    model, _, _, optimizer = training
    before = state(model, optimizer)
    for mode in ("eval", "train"):
        model[1].training = mode == "eval"  # in training mode its statistics would couple the examples
        inside = state(model, optimizer)
        L = cl.Objective(model, "cross_entropy", (X, Y), mode=mode, weights=torch.arange(N))
        L.value(), L.gradient(), L.example_gradients(), L.accuracy(), L.describe()
        V = block(L.num_params).float()
        for engine in ("graph", "double_backward", "forward_over_reverse"):
            cl.hessian(L, engine=engine) @ V
        cl.ggn(L) @ V
        cl.gradient_covariance(L, batch_size=3) @ V
        ExampleGradients(L, L.params()).squared_norms()
        assert state(model, optimizer) == inside
    model[1].training = True
    assert state(model, optimizer) == before


class HalfWay(Exception):
    pass


def test_a_diagnostic_that_fails_half_way_leaves_no_trace(training, monkeypatch):
    model, L, _, optimizer = training
    monkeypatch.setattr("curvlab.diagnostics.registry.DIAGNOSTICS", dict(DIAGNOSTICS))
    monkeypatch.setattr("curvlab.diagnostics.DIAGNOSTICS", dict(DIAGNOSTICS))

    @cl.diagnostic("x", formula="x", kind="exact", cost="much")
    def fails(at):
        _ = at.value, at.hessian_gradient, at.examples.squared_norms()
        torch.rand(3), random.random(), np.random.rand()
        raise HalfWay

    before = state(model, optimizer)
    with pytest.raises(HalfWay):
        cl.measure(L, ["loss", "fails"])
    assert state(model, optimizer) == before
    assert cl.measure(L, ["loss"])["loss"].value == float(L.value())


@pytest.mark.parametrize("allowed", range(0, 40, 6))
def test_a_model_that_fails_half_way_leaves_no_trace(allowed, training):
    model, _, _, optimizer = training
    calls = [-1000]

    def loss(model, batch):
        calls[0] += 1
        if calls[0] > allowed:
            raise HalfWay
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    L = cl.Objective(model, cl.batch_loss(loss), (X, Y), chunk_size=10)
    before = state(model, optimizer)
    calls[0] = 0
    with pytest.raises(HalfWay):
        cl.measure(L, ["sharpness", "interaction_sharpness", "gradient_variance", "expected_loss_difference"], **STEP)
    assert state(model, optimizer) == before
    assert not model[5].training


def lstm():
    return Recurrent(nn.LSTM)


def gru():
    return Recurrent(nn.GRU)


@pytest.mark.parametrize("build_model, shape", [(Attention, (3, 4)), (lstm, (3, 2)), (gru, (3, 2))])
def test_attention_and_recurrent_layers_are_as_before(build_model, shape):
    model, x = build_model(), seeded(7, *shape)
    model(x).sum().backward()
    before, outputs = state(model), model.eval()(x)
    model.train()
    L = cl.Objective(model, lambda z, y: z.square().sum(1), (x, Y[:7]))
    cl.measure(L, ["sharpness", "gradient_variance"])
    assert state(model) == before
    assert torch.equal(model.eval()(x), outputs)
    if hasattr(model, "recurrent"):
        flat = model.recurrent._flat_weights
        assert all(a is b for a, b in zip(flat, model.recurrent.parameters(), strict=True))


def test_models_that_act_on_a_change_of_mode_are_not_set_off():
    """Some adapters merge their weights when they are put in evaluation mode."""

    class Merging(nn.Linear):
        def train(self, mode=True):
            with torch.no_grad():
                self.weight.add_(1.0)
            return super().train(mode)

    model = nn.Sequential(Merging(4, 3))
    before = state(model)
    for mode in ("eval", "train"):
        cl.Objective(model, "cross_entropy", (X, Y), mode=mode).gradient()
        assert state(model) == before


@pytest.fixture
def restore_flags():
    """Put back what a test sets, also if the package does not."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.enabled = True
    torch.backends.cudnn.deterministic = False
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
    torch.backends.mha.set_fastpath_enabled(True)


SETTINGS = {
    "matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "no_tf32_in_cudnn": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "no_cudnn": lambda: setattr(torch.backends.cudnn, "enabled", False),
    "deterministic_cudnn": lambda: setattr(torch.backends.cudnn, "deterministic", True),
    "no_flash": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "no_math": lambda: torch.backends.cuda.enable_math_sdp(False),
    "no_fastpath": lambda: torch.backends.mha.set_fastpath_enabled(False),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", [lstm, lambda: nn.Linear(2, 2)], ids=["lstm", "linear"])
def test_settings_of_the_user_are_as_before(setting, model, restore_flags):
    SETTINGS[setting]()
    before = flags()
    L = cl.Objective(model(), lambda z, y: z.square().flatten(1).sum(1), (seeded(7, 3, 2), Y[:7]))
    L.gradient()
    assert flags() == before


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_numbers_do_not_depend_on_the_context(context, training):
    _, L, test, _ = training
    options = {**STEP, "test": test}
    names = ["loss", "gradient_variance", "sharpness", "interaction_sharpness", "expected_loss_difference"]
    expected = cl.measure(L, names, **options)
    with context():
        before = flags()
        found = cl.measure(L, names, **options)
        assert flags() == before
    assert {name: numbers(m) for name, m in found.items()} == {name: numbers(m) for name, m in expected.items()}


def test_inside_the_guard():
    model = nn.Sequential(Attention(), Recurrent(nn.LSTM)).train()
    model[1].eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with measuring(model):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.backends.cuda.flash_sdp_enabled()
            assert torch.backends.cuda.math_sdp_enabled()
            assert not torch.backends.cudnn.enabled
            assert not any(module.training for module in model.modules())
            with measuring(model):  # free when already inside
                assert not model.training
            assert torch.is_grad_enabled()
            with measuring(model, train_mode=True):
                assert model[0].training
            assert not any(module.training for module in model.modules())
    with measuring(model, train_mode=True):
        assert model[0].training
        assert not model[1].training  # frozen by the user
    assert model[0].training
    assert not model[1].training


# -- training with and without -------------------------------------------------------------------------------------


def plain_loop(model, optimizer, batches):
    """Training as anybody writes it."""
    for index in batches:
        optimizer.zero_grad()
        losses = F.cross_entropy(model(X[index]), Y[index], reduction="none")
        (losses.sum() / len(losses)).backward()
        optimizer.step()


def end(model, optimizer):
    return tensors(model.state_dict()), tensors(optimizer.state_dict()), random_states()


@pytest.mark.parametrize("name, batch_size", [("sgd", 6), ("sgd", N), ("momentum", 6), ("adam", 6)])
def test_training_is_the_same_with_and_without_diagnostics(name, batch_size):
    batches = cl.Batches(N, batch_size, steps=4)
    ends = {}
    for kind in ("plain", "bare", "measured"):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        model = build()
        optimizer = OPTIMIZERS[name](model.parameters())
        if kind == "plain":
            plain_loop(model, optimizer, batches)
        else:
            L, test = objectives(model)
            names = [] if kind == "bare" else list(DIAGNOSTICS) if name == "adam" else WHILE_TRAINING
            for snapshot in cl.train(L, optimizer, batches, diagnostics=asked(names), test=test):
                assert list(snapshot.measurements) == names
                if names:  # what is done with a snapshot does not matter either
                    _ = snapshot.hessian @ snapshot.gradient, torch.equal(snapshot.w, L.params())
        ends[kind] = end(model, optimizer)
    assert ends["bare"] == ends["plain"]
    assert ends["measured"] == ends["plain"]


def test_training_on_batches_larger_than_the_measured_set_is_the_same():
    ends = []
    for kind in ("plain", "measured"):
        torch.manual_seed(0)
        model = build()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        if kind == "plain":
            plain_loop(model, optimizer, [torch.arange(N)] * 3)
        else:
            L = cl.Objective(model, "cross_entropy", (X[:8], Y[:8]))
            for _ in cl.train(L, optimizer, [(X, Y)] * 3, diagnostics=["loss"]):
                pass
        ends.append(end(model, optimizer))
    assert ends[0] == ends[1]


def test_a_snapshot_holds_the_gradient_that_the_step_uses():
    model = build()
    L, _ = objectives(model)
    steps = []
    for snapshot in cl.train(L, OPTIMIZERS["sgd"](model.parameters()), cl.Batches(N, 6, steps=4)):
        steps.append((snapshot.w, snapshot.batch_gradient, snapshot.lr))
    last = (L.params(), None, None)
    for (w, g, lr), (after, _, _) in zip(steps, [*steps[1:], last], strict=True):
        assert torch.allclose(after, w - lr * g, atol=1e-7)


def test_leaving_the_loop_takes_no_further_step():
    model = build()
    L, _ = objectives(model)
    for snapshot in cl.train(L, OPTIMIZERS["sgd"](model.parameters()), cl.Batches(N, 6, steps=4)):
        if snapshot.step == 2:
            break
    assert torch.equal(snapshot.w, L.params())


def test_micro_batches_accumulate_the_same_gradient():
    found = []
    for micro in (None, 4):
        model = build().eval()
        L, _ = objectives(model)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        found.append([s.batch_gradient for s in cl.train(L, sgd, cl.Batches(N, 10, steps=2), micro_batch_size=micro)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


# -- one diagnostic more -------------------------------------------------------------------------------------------


def numbers(m):
    """Everything but what it cost: shared products count for the first to ask."""
    return str((tensors(m.to_dict()) | {"matvecs": 0, "seconds": 0}, m.df, m.floor, m.axis))


def test_one_diagnostic_more_changes_no_other_at_a_point(training):
    _, L, test, _ = training
    options = {"batch_size": (3, 5), "lr": 0.1, "test": test}
    together, backwards = (cl.measure(L, asked(AT_A_POINT[::order]), **options) for order in (1, -1))
    assert list(together) == list(backwards)[::-1] == AT_A_POINT
    for name in AT_A_POINT:
        assert numbers(backwards[name]) == numbers(together[name]), name
        assert numbers(cl.measure(L, asked([name]), **options)[name]) == numbers(together[name]), name


def log_of(diagnostics, steps):
    model = build()
    L, test = objectives(model)
    torch.manual_seed(0)
    batches = cl.Batches(N, 5, steps=steps)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    return [dict(at.measurements) for at in cl.train(L, optimizer, batches, diagnostics=diagnostics, test=test)]


# In ten steps control variates are fitted anew and windows of pooled variance fill.
@pytest.mark.parametrize("steps", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_one_diagnostic_more_changes_no_other_in_training(steps):
    together, backwards = (log_of(asked([*DIAGNOSTICS][::order]), steps) for order in (1, -1))
    for name in DIAGNOSTICS:
        expected = [numbers(at[name]) for at in together]
        assert [numbers(at[name]) for at in backwards] == expected, name
        assert [numbers(at[name]) for at in log_of(asked([name]), steps)] == expected, name


def test_options_of_one_diagnostic_do_not_leak_into_another():
    alone = log_of(["sharpness", "interaction_trace", "batch_sharpness"], steps=4)
    among = [
        ("hessian_eigenvalues", {"k": 1}),
        ("gradient_alignment", {"tol": 1e-1}),
        ("interaction_sharpness", {"probes": 4, "k": 3}),
        ("instability", {"batch_size": (2, 24)}),
        ("batch_sharpness_of_means", {"samples": 6}),
        "interaction_trace",
        "batch_sharpness",
        "sharpness",
    ]
    for a, b in zip(alone, log_of(among, steps=4), strict=True):
        assert {name: numbers(m) for name, m in a.items()} == {name: numbers(b[name]) for name in a}


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(training):
    _, L, _, _ = training
    found = [cl.measure(L, ["interaction_trace"], batch_size=5, seed=seed)["interaction_trace"] for seed in (0, 0, 1)]
    assert numbers(found[0]) == numbers(found[1])
    assert found[0].value != found[2].value
    drawn = [
        cl.measure(L, ["interaction_trace"], batch_size=5, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    assert numbers(drawn[0]["interaction_trace"]) == numbers(drawn[1]["interaction_trace"])


def test_a_copy_of_the_model_can_be_made_after_measuring(training):
    model, L, test, _ = training
    cl.measure(L, asked(AT_A_POINT), **STEP, test=test)
    assert tensors(copy.deepcopy(model).state_dict()) == tensors(model.state_dict())
