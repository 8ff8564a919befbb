"""What one measurement leaves behind, and what one diagnostic does to another; whole trainings are in test_observer.py.

Compared with a reference: each diagnostic measured alone with the same one among all others; the gradient of a snapshot with
the step that is taken. Behaviour only: the state of model, optimizer and process after a measurement.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Attention, Recurrent, block
from states import (
    AT_A_POINT,
    CHEAPER,
    OPTIMIZERS,
    STEP,
    N,
    X,
    Y,
    asked,
    build,
    flags,
    numbers,
    objectives,
    random_states,
    seeded,
    state,
    tensors,
)
from torch import nn

import curvlab as cl
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.guard import measuring
from curvlab.per_example import ExampleGradients


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
            assert not torch.backends.mkldnn.enabled
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


@pytest.mark.parametrize(
    "draw", [np.random.randn, np.random.rand, random.random, lambda: random.gauss(0, 1), lambda: torch.rand(1)]
)
@pytest.mark.parametrize("drawn", range(4))
def test_numbers_that_are_drawn_inside_are_drawn_again(draw, drawn):
    """Of two normal numbers numpy keeps one for later, which changes none of its words."""
    model = nn.Linear(1, 1)
    for _ in range(drawn):
        np.random.randn()
    before = random_states()
    for times in range(3):
        with measuring(model):
            for _ in range(times):
                draw()
        assert random_states() == before


# -- snapshots of training ------------------------------------------------------------------------------------------


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


# In eighteen steps control variates are fitted anew and windows of pooled variance fill.
@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 18])
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
    model[6].last = None  # of the last training step, with its graph
    assert tensors(copy.deepcopy(model).state_dict()) == tensors(model.state_dict())
