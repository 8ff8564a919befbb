"""Measuring never changes the training, also when it fails.

Compared with a reference: parameters, buffers, gradients, optimizer states, random states, attributes and modes of modules,
backend flags, and the position of the loader after training with diagnostics at every step, bit by bit, with those after a
loop that knows nothing of the package; numbers measured after a fault, with those without it. What one measurement leaves
behind is in test_guard.py; loops of frameworks are in test_loops.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from states import (
    OPTIMIZERS,
    STEP,
    N,
    Remembering,
    X,
    Y,
    asked,
    build,
    flags,
    numbers,
    objectives,
    random_states,
    state,
    tensors,
)
from torch.utils.data import DataLoader, TensorDataset

import curvlab as cl
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.gradient_graph import GradientGraph
from curvlab.objective import Objective

BATCH = STEP["batch_size"]
LAYERS = {
    "dropout": {"norm": False},
    "norm": {"dropout": False},
    "both": {},
    "neither": {"dropout": False, "norm": False},
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]
each_device = pytest.mark.parametrize("device", DEVICES)


def known(optimizer):
    """The diagnostics that exist for an optimizer."""
    return [name for name, entry in DIAGNOSTICS.items() if optimizer == "adam" or "preconditioner" not in entry.needs]


# -- training with and without -------------------------------------------------------------------------------------------


class Training:
    """A network in training on a shuffling loader, from a fixed start. Its batches have random noise of their own."""

    def __init__(self, optimizer="sgd", layers="both", workers=0, device="cpu", loss="cross_entropy"):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.model = build(**LAYERS[layers], growth=0.01).to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.device, self.loss = device, loss
        self.loader = DataLoader(TensorDataset(X, Y), BATCH, shuffle=True, num_workers=workers, drop_last=True)

    def monitor(self, names, **options):
        L, test = objectives(self.model, self.loss)
        options |= {"optimizer": self.optimizer, "batch_size": BATCH, "test": test, "announce": None}
        return cl.Monitor(L, asked(names), **options)

    def batches(self, steps):
        """The first batches of the loader, read as they are needed, with noise."""
        for _, (x, y) in zip(range(steps), self.loader, strict=False):
            yield x.to(self.device) + 0.1 * torch.randn(len(x), device=self.device)[:, None], y.to(self.device)

    def step(self, x, y, between=lambda place: None):
        """One step as anybody writes it, which also reads what the forward pass has left on the model."""
        between("before the forward pass")
        losses = F.cross_entropy(self.model(x), y, reduction="none")
        between("before the backward pass")
        (losses.sum() / len(losses) + 0.01 * self.model[6].last.square().mean()).backward()
        between("after the backward pass")
        self.optimizer.step()
        between("after the step")
        self.optimizer.zero_grad()

    def end(self):
        """Everything that goes on into further training, bit by bit; the next random numbers are the loader's too."""
        remembered = self.model[6].calls, tensors(self.model[6].last)
        return (
            tensors(self.model.state_dict()),
            tensors(self.optimizer.state_dict()),
            random_states(),
            remembered,
            flags(),
        )


PLACES = ["before the forward pass", "before the backward pass", "after the backward pass", "after the step"]


def own_loop(names, place=None, steps=3, **setting):
    """The end of a training in a loop of one's own, with a monitor at one place of it, or with none."""
    training = Training(**setting)
    monitor = training.monitor(names) if place else None
    found = []
    for x, y in training.batches(steps):
        training.step(x, y, lambda now: found.append(monitor()) if now == place else None)
    assert all(list(measured) == list(names) for measured in found)
    return training.end()


def by_train(names, steps=3, **setting):
    """The end of a training by `train`; without names, of the same steps by hand."""
    training = Training(**setting)
    if names is None:
        for x, y in training.batches(steps):
            training.optimizer.zero_grad()
            losses = F.cross_entropy(training.model(x), y, reduction="none")
            (losses.sum() / len(losses)).backward()
            training.optimizer.step()
        return training.end()
    L, test = objectives(training.model)
    options = {"diagnostics": asked(names), "test": test, "batch_size": BATCH}
    for at in cl.train(L, training.optimizer, training.batches(steps), **options):
        assert list(at.measurements) == list(names)
        _ = at.hessian @ at.gradient  # what is done with a snapshot does not matter either
    return training.end()


@functools.cache
def unobserved(loop, **setting):
    return loop(None, **setting)


GRID = list(itertools.product(OPTIMIZERS, LAYERS, (0, 2)))
SLICE = {  # measured at one place, in fewer steps
    ("sgd", "dropout", 2): PLACES[0],
    ("momentum", "neither", 0): PLACES[3],
    ("adam", "both", 0): PLACES[1],
}


def rows():
    fast = [pytest.param(*row, [place], 2) for row, place in SLICE.items()]
    return fast + [pytest.param(*row, PLACES, 4, marks=pytest.mark.slow) for row in GRID]


@each_device
@pytest.mark.parametrize("optimizer, layers, workers, places, steps", rows())
def test_training_is_the_same_with_every_diagnostic_at_every_step(optimizer, layers, workers, places, steps, device):
    setting = {"optimizer": optimizer, "layers": layers, "workers": workers, "device": device, "steps": steps}
    for place in places:
        assert own_loop(known(optimizer), place, **setting) == unobserved(own_loop, **setting), place
    assert by_train(known(optimizer), **setting) == unobserved(by_train, **setting)


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_training_is_the_same_with_one_diagnostic_at_every_step(name, device):
    for optimizer, layers, workers in GRID:
        if name in known(optimizer):
            setting = {"optimizer": optimizer, "layers": layers, "workers": workers, "device": device}
            assert own_loop([name], "after the backward pass", **setting) == unobserved(own_loop, **setting), setting
            assert by_train([name], **setting) == unobserved(by_train, **setting), setting


# Full batches are exact in another way, and what is trained on may be larger than what is measured.
@pytest.mark.parametrize("batch, measured", [(N, N), (N, 8)])
def test_training_on_full_batches_is_the_same(batch, measured):
    ends = []
    for names in ([], ["loss", "interaction_trace", "expected_loss_difference"]):
        training = Training("momentum")
        L = cl.Objective(training.model, "cross_entropy", (X[:measured], Y[:measured]))
        for _ in cl.train(L, training.optimizer, [(X[:batch], Y[:batch])] * 3, diagnostics=names, batch_size=measured):
            pass
        ends.append(training.end())
    assert ends[0] == ends[1]


@each_device
def test_settings_and_modes_come_back_from_a_compiled_model_under_settings_of_the_user(device):
    """Stance of the compiler, autocast, default dtype, warnings, deterministic algorithms: set by the user, and kept."""
    training = Training("adam", device=device)
    training.model.compile(backend="eager")
    monitor = training.monitor(["sharpness", "gradient_variance", "fisher_trace"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("eager_on_recompile"))
        stack.enter_context(torch.autocast(device, torch.bfloat16, cache_enabled=False))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.no_grad())
        warnings.filterwarnings("ignore", message="of the user")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_default_dtype(torch.float64)
        try:
            before = state(training.model, training.optimizer)
            monitor()
            assert state(training.model, training.optimizer) == before
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_default_dtype(torch.float32)


# -- with faults -----------------------------------------------------------------------------------------------------------


class Fault(Exception):
    """What no code expects."""


def user_loss(model, batch):
    """A loss of the user's own, which may fail as any code of the user's may."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


KINDS = {
    "product": (GradientGraph, "products"),
    "gradient": (torch.autograd, "grad"),
    "example": (Objective, "chunk_gradients"),
    "vmap": (torch.func, "vmap"),
    "forward": (Remembering, "forward"),
    "loss": (sys.modules[__name__], "user_loss"),
}


class Failing:
    """Inside, the n-th call of a kind, from 1, raises `error`; `fired` says whether there was one."""

    def __init__(self, kind, n, error=Fault):
        (self.owner, self.name), self.left, self.error, self.fired = KINDS[kind], n, error, False

    def __enter__(self):
        self.original = original = getattr(self.owner, self.name)

        def counted(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise self.error
            return original(*args, **kwargs)

        setattr(self.owner, self.name, counted)
        return self

    def __exit__(self, kind, error, trace):
        setattr(self.owner, self.name, self.original)
        assert kind is None or self.fired
        return kind is not None and issubclass(kind, self.error)


def error_of(n):
    return (Fault, KeyboardInterrupt)[n % 2]


def loss_of(kind):
    return cl.batch_loss(lambda model, batch: user_loss(model, batch)) if kind == "loss" else "cross_entropy"


def values(found):
    return {name: numbers(m) for name, m in found.items()}


def carried(monitor):
    """What later measurements depend on. (The length of the log is that of its seconds, too.)"""
    return tensors({key: value for key, value in monitor.state_dict().items() if key != "log_size"})


def monitored(names, kind, tmp_path=None):
    """A training with a monitor in its third step, after the backward pass, and that monitor's state."""
    training = Training("adam", loss=loss_of(kind))
    monitor = training.monitor(names, run=tmp_path and tmp_path / "run")
    steps = training.batches(3)
    for _ in range(2):
        training.step(*next(steps), lambda place: monitor() if place == "after the backward pass" else None)
    x, y = next(steps)
    F.cross_entropy(training.model(x), y).backward()
    return training, monitor, monitor.state_dict()


def check_faults(names, kind, places, tmp_path=None):
    """After a fault at each of the places, until one is beyond the last: no trace, and the same call measures the same."""
    training, monitor, saved = monitored(names, kind, tmp_path)
    before = state(training.model, training.optimizer)
    expected, after = values(monitor(2)), carried(monitor)
    for n in places:
        monitor.load_state_dict(saved)
        with Failing(kind, n, error_of(n)) as failing:
            monitor(2)
        assert state(training.model, training.optimizer) == before, (kind, n)
        if not failing.fired:
            return
        assert tensors(monitor.state_dict()) == tensors(saved), (kind, n)
        assert values(monitor(2)) == expected, (kind, n)
        assert carried(monitor) == after, (kind, n)
        assert state(training.model, training.optimizer) == before, (kind, n)


SOME = ["loss", "sharpness", "interaction_sharpness", "gradient_variance"]
DEAR = ["hessian_trace", "expected_loss_difference", "batch_sharpness", "microbatch_gradient_norm", "secant_sharpness"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_leaves_no_trace_and_later_numbers_are_the_same(kind, tmp_path):
    check_faults(SOME, kind, [1, 2, 5, 13, 34, 10**6], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_a_fault_at_each_place_of_a_diagnostic_leaves_no_trace(name, kind):
    if kind == "loss":
        try:
            monitored([name], kind)
        except (TypeError, ValueError) as error:
            pytest.skip(f"does not exist for a loss of the user's: {error}")
    check_faults([name], kind, itertools.count(1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_each_place_of_the_first_measurement_leaves_no_trace(kind):
    """What an objective finds out once, such as how its layers split into examples, is found by the next measurement."""
    names = SOME + DEAR
    training = Training("adam", loss=loss_of(kind))
    before = state(training.model, training.optimizer)

    def objective():
        return objectives(training.model, training.loss)[0]

    expected = values(cl.measure(objective(), names, **STEP))
    for n in itertools.count(1):
        L = objective()
        with Failing(kind, n, error_of(n)) as failing:
            cl.measure(L, names, **STEP)
        assert values(cl.measure(L, names, **STEP)) == expected, n
        assert state(training.model, training.optimizer) == before, n
        if not failing.fired:
            return


def test_a_fault_while_an_objective_is_made_leaves_no_trace():
    training = Training("adam")
    before = state(training.model, training.optimizer)
    for kind in ("forward", "gradient"):
        for n in itertools.count(1):
            with Failing(kind, n, error_of(n)) as failing:
                objectives(training.model)
            assert state(training.model, training.optimizer) == before
            if not failing.fired:
                break
        assert n > 2


def test_an_error_that_vmap_may_raise_is_taken_for_one_and_goes_by_a_loop():
    training = Training()
    before = state(training.model)
    L, _ = objectives(training.model)
    G = L.example_gradients()
    with Failing("vmap", 1, RuntimeError) as failing:
        assert torch.allclose(L.example_gradients(), G, atol=1e-6)
    assert failing.fired
    assert state(training.model) == before


@pytest.mark.parametrize("kind, n, retry", [("product", 3, True), ("gradient", 9, True), ("forward", 2, False)])
def test_training_goes_on_after_a_fault_as_without_measuring(kind, n, retry):
    """A loop that catches what a monitor raises; it may ask again or leave the step out."""
    training, found = Training("adam"), {}
    monitor = training.monitor(SOME)

    def call(place):
        if place == "before the backward pass":
            step = training.model[6].calls - 1
            with Failing(kind, n if step == 1 else 10**6, error_of(n)) as failing:
                found[step] = monitor(step)
            assert failing.fired == (step == 1)
            if failing.fired and retry:
                found[step] = monitor(step)

    for x, y in training.batches(4):
        training.step(x, y, call)
    plain = Training("adam")
    watching = plain.monitor(SOME)

    def watch(place):
        step = plain.model[6].calls - 1
        if place == "before the backward pass" and (retry or step != 1):
            assert values(found[step]) == values(watching(step)), step

    for x, y in plain.batches(4):
        plain.step(x, y, watch)
    assert training.end() == plain.end() == unobserved(own_loop, steps=4, optimizer="adam")


PLACES = {"product": range(1, 12), "gradient": range(1, 14), "forward": range(2, 4)}  # the first forward pass is training's


@pytest.mark.parametrize(
    ("kind", "n"),
    [pytest.param(kind, n, marks=() if n == 2 else pytest.mark.slow) for kind, places in PLACES.items() for n in places],
)
@pytest.mark.parametrize("resume", [True, False])
def test_train_goes_on_after_a_fault(kind, n, resume, tmp_path):
    """From the checkpoint before the fault; or by hand, with the step of the gradient that is there."""

    def train(batches, folder, training, **options):
        L, test = objectives(training.model)
        options = {"run": tmp_path / folder, "diagnostics": SOME, "batch_size": BATCH, "test": test} | options
        return cl.train(L, training.optimizer, batches, **options)

    whole, batches = Training("adam"), cl.Batches(N, BATCH, steps=4)
    for _ in train(batches, "whole", whole):
        pass
    broken = Training("adam")
    steps = train(batches, "broken", broken, checkpoint_every=1)
    for _ in range(2):
        next(steps)
    with Failing(kind, n, error_of(n)) as failing:
        next(steps)
    assert failing.fired
    if resume:
        broken = Training("adam")
        broken.model[6].calls = 2  # in no state dict
        for _ in train(batches, "broken", broken, checkpoint_every=1, resume=True):
            pass
        logs = [
            [
                (r["step"], {k: {**m, "seconds": 0} for k, m in r["measurements"].items()})
                for r in cl.Run(folder).records
            ]
            for folder in (tmp_path / "whole", tmp_path / "broken")
        ]
        assert logs[0] == logs[1]
    else:
        broken.optimizer.step()
        for _ in train(list(batches)[3:], "rest", broken):
            pass
    assert broken.end()[:2] == whole.end()[:2]
