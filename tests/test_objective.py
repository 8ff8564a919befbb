"""The objective: one loss of one vector, whatever the model, the data and its split; and everything it refuses.

Compared with a reference: value, gradient and per-example gradients, with `cases.py`, over all cases, chunkings and
forms of data; and at random splits and weights. Behaviour only: what kinds of batches and options are understood,
training mode, and the refusals. Of those there is one table: every `raise` of the files that it covers has a row, and
a test sees to that.
"""

from __future__ import annotations

import ast
import itertools
import math
import random
import tempfile
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, CHUNKINGS, EAGER, FORMS, Listed, Recurrent, block, off, pick, solved, split
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

import curvlab as cl
from curvlab.batches import Examples
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.diagnostics.values import exact
from curvlab.losses import correct
from curvlab.per_example import ExampleGradients
from curvlab.trained import TrainedObjective

PACKAGE = Path(cl.__file__).parent
each_case = pytest.mark.parametrize("case", CASES, ids=str)
repeatable = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = seeded(12, 4), torch.arange(12) % 3
INDEX = torch.tensor([4, 0, 4, 2])


def linear(d_in=4, d_out=3, **options):
    layer = nn.Linear(d_in, d_out, **options).double()
    for i, p in enumerate(layer.parameters()):
        p.data = seeded(*p.shape, seed=i)
    return layer


def objective(model=None, loss="cross_entropy", data=(X, Y), **options):
    return cl.Objective(linear() if model is None else model, loss, data, **options)


# -- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunking", CHUNKINGS)
@each_case
def test_value_gradient_and_example_gradients(case, chunking):
    problem, reference = solved(case.name)
    L = problem.objective(chunk_size=CHUNKINGS[chunking])
    w, rows = reference.w, reference.rows
    value, gradient, found = L.value(w), L.gradient(w), L.example_gradients(w)
    assert (L.size, L.num_params) == (len(rows), len(w))
    assert value.dtype == torch.float64
    assert abs(float(value) - reference.value) < 1e-14 * abs(reference.value)
    assert off(gradient, reference.gradient) < 1e-13
    assert off(found, rows) < 1e-13
    assert off(found.mean(0), gradient) < 1e-13
    assert off(L.example_gradients(w, INDEX), rows[INDEX]) < 1e-13
    assert off(L.gradient(w, INDEX), rows[INDEX].mean(0)) < 1e-13
    losses = reference.losses(w) * reference.scale
    assert abs(float(L.value(w, INDEX) - losses[INDEX].mean())) < 1e-14 * float(losses.abs().max())


@pytest.mark.parametrize("form", [form for form in FORMS if form != "tensors"])
@each_case
def test_every_form_of_data_gives_the_same_objective(case, form):
    problem, reference = solved(case.name)
    L = problem.objective(form=form)
    assert L.size == problem.size
    assert abs(float(L.value(reference.w)) - reference.value) < 1e-14 * abs(reference.value)
    assert off(L.example_gradients(reference.w), reference.rows) < 1e-13


@each_case
def test_a_batch_as_it_is_gives_what_its_indices_give(case):
    problem, reference = solved(case.name)
    L, batch = problem.objective(), pick(problem.data, INDEX)
    if problem.weights is None:
        assert torch.equal(L.gradient(reference.w, batch), L.gradient(reference.w, INDEX))
        assert torch.equal(L.value(reference.w, batch), L.value(reference.w, INDEX))


def partitions(n):
    """Sizes of the parts of n examples."""
    return st.lists(st.booleans(), min_size=n - 1, max_size=n - 1).map(
        lambda cuts: [len(part) for part in "".join(" x" if cut else "x" for cut in [False, *cuts]).split(" ")]
    )


@given(sizes=partitions(8), chunk_size=st.integers(1, 9), weights=st.lists(st.integers(0, 3), min_size=8, max_size=8))
@repeatable
def test_how_the_data_is_split_changes_no_number(sizes, chunk_size, weights):
    x, y = X[:8], Y[:8]
    s = None if sum(weights) == 0 else torch.tensor(weights)
    model, w = linear(), seeded(15, seed=1)
    whole = objective(model, data=(x, y), weights=s)
    parts = objective(model, data=split((x, y), sizes), weights=s, chunk_size=chunk_size)
    scale = torch.ones(8).double() if s is None else s.double() / s.double().mean()
    z = w.clone().requires_grad_()
    losses = F.cross_entropy(x @ z[:12].view(3, 4).T + z[12:], y, reduction="none")
    mean = (scale * losses).mean()
    (gradient,) = torch.autograd.grad(mean, z)
    for L in (whole, parts):
        assert abs(float(L.value(w) - mean.detach())) < 1e-14
        assert off(L.gradient(w), gradient, 1.0) < 1e-14
    v = seeded(15, seed=2)
    assert off(cl.hessian(parts, w) @ v, cl.hessian(whole, w) @ v, 1.0) < 1e-14
    assert off(cl.ggn(parts, w) @ v, cl.ggn(whole, w) @ v, 1.0) < 1e-14
    assert off(parts.example_gradients(w), whole.example_gradients(w), 1.0) < 1e-14


class Pooled(nn.Module):
    """Of sequences of any length."""

    def __init__(self):
        super().__init__()
        self.layer = linear(2)

    def forward(self, x):
        return torch.tanh(self.layer(x)).mean(1)


LENGTHS = (3, 3, 1, 4, 4, 4, 2, 2)  # batches that cannot be joined


def ragged(together):
    """Sequences of those lengths as batches; `together[i]` leaves i and i + 1 in one batch if it can."""
    examples = [(seeded(1, T, 2, seed=i), Y[i : i + 1]) for i, T in enumerate(LENGTHS)]
    batches = [examples[0]]
    for i, (x, y) in enumerate(examples[1:]):
        before = batches[-1]
        if together[i] and before[0].shape[1] == x.shape[1]:
            batches[-1] = (torch.cat([before[0], x]), torch.cat([before[1], y]))
        else:
            batches.append((x, y))
    return batches


@given(together=st.lists(st.booleans(), min_size=7, max_size=7), chunk_size=st.integers(1, 8))
@repeatable
def test_how_sequences_of_different_lengths_are_split_changes_no_number(together, chunk_size):
    model, w = Pooled(), seeded(9, seed=1)
    L = objective(model, data=ragged(together), chunk_size=chunk_size)
    alone = [objective(model, data=batch) for batch in ragged([False] * 7)]
    rows = torch.stack([one.gradient(w) for one in alone])
    assert L.size == 8
    assert abs(float(L.value(w)) - sum(float(one.value(w)) for one in alone) / 8) < 1e-14
    assert off(L.example_gradients(w), rows) < 1e-13
    assert off(L.gradient(w), rows.mean(0)) < 1e-13
    v = seeded(9, seed=2)
    assert off(cl.hessian(L, w) @ v, sum(cl.hessian(one, w) @ v for one in alone) / 8) < 1e-13


def test_example_gradients_come_in_the_order_of_the_indices():
    L = objective(Pooled(), data=ragged([True] * 7))
    index = torch.tensor([5, 0, 7, 0, 2])
    assert off(L.example_gradients(batch=index), L.example_gradients()[index]) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_relative_to_their_mean(dtype):
    s = torch.arange(12.0).double()
    L, scaled = (objective(weights=c * s, dtype=dtype) for c in (1, 40))
    rows = objective().example_gradients()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert off(L.example_gradients(), s[:, None] / s.mean() * rows) < tolerance
    assert off(L.gradient(), (s[:, None] * rows).sum(0) / s.sum()) < tolerance
    assert off(L.gradient(), scaled.gradient().double()) < tolerance
    assert off(objective(weights=torch.full((12,), 0.3)).gradient(), objective().gradient()) < 1e-14


def test_accuracy():
    model = linear()
    right = (model(X).argmax(1) == Y).double()
    weights = torch.arange(12.0).double()
    assert float(objective(model, chunk_size=5).accuracy()) == float(right.mean())
    found = objective(model, weights=weights, chunk_size=5).accuracy()
    assert abs(float(found) - float((right * weights).sum() / weights.sum())) < 1e-15
    one_hot = F.one_hot(Y, 3).double()
    assert float(objective(model, data=(X, one_hot)).accuracy()) == float(right.mean())
    assert objective(model, "squared_error", (X, X[:, :3])).accuracy() is None
    assert objective(linear(4, 1), "squared_error", (X, X[:, :1])).accuracy() is None
    assert objective(model, cl.batch_loss(lambda m, b: m(b[0]).square().sum(1))).accuracy() is None
    assert correct("text", Y) is None
    assert correct(torch.eye(3), torch.eye(3).long()) is None  # several labels, which would be broadcast


# -- points --------------------------------------------------------------------------------------------------------


@each_case
def test_flat_vectors_and_named_shapes_are_the_same(case):
    problem, _ = solved(case.name)
    L, live = problem.objective(), dict(problem.model.named_parameters())
    w = L.params()
    named = L.unflatten(w)
    assert list(named) == L.names == [name for name, p in live.items() if p.requires_grad]
    assert all(torch.equal(value, live[name]) for name, value in named.items())
    assert torch.equal(L.join(L.split(w)), w)
    assert torch.equal(L.join(list(named.values())), w)
    assert [tuple(part.shape) for part in L.split(w)] == [tuple(shape) for shape in L.shapes]
    named[L.names[-1]].fill_(7.0)  # views
    assert bool((w[-L.sizes[-1] :] == 7).all())
    assert not torch.equal(L.params(), w)  # a copy


def test_columns_of_a_block_can_be_unflattened():
    L = objective()
    V = block(L.num_params, 3)
    assert torch.equal(L.join(L.split(V[:, 1])), V[:, 1])


def test_tied_weights_count_once():
    for name, size in (("tied_linear", 64), ("tied_embedding", 50)):
        problem, _ = solved(name)
        assert problem.objective().num_params == size == sum(p.numel() for p in problem.model.parameters())


def test_a_point_may_be_given_in_any_precision_and_is_not_written_to():
    L, w = objective(), seeded(15, seed=3).float()
    before = w.clone()
    assert torch.equal(L.gradient(w), L.gradient(w.double()))
    assert torch.equal(w, before)
    assert not L.gradient(w.double().requires_grad_()).requires_grad


def test_default_point_is_where_training_stands():
    model = linear()
    L = objective(model)
    before = L.value()
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # no gradients: no step
    assert L.value() == before
    with torch.no_grad():
        model.bias.add_(torch.tensor([1.0, 0.0, 0.0]))
    assert L.value() != before
    assert torch.equal(L.params()[12:], model.bias)


def compiled(kind):
    layers = [linear(), nn.Tanh(), linear(3)]
    if kind == "part":
        layers[0] = torch.compile(layers[0], backend="aot_eager")
    model = nn.Sequential(*layers)
    if kind == "in_place":
        model.compile(backend="aot_eager")
    return torch.compile(model, backend="aot_eager") if kind == "whole" else model


@pytest.mark.parametrize("kind", ["whole", "in_place", "part"])
def test_compiled_models_are_measured_eagerly(kind):
    L, eager = objective(compiled(kind)), objective(compiled("not"))
    v = block(L.num_params)
    assert torch.equal(L.gradient(), eager.gradient())
    assert torch.equal(cl.hessian(L) @ v, cl.hessian(eager) @ v)


def test_an_objective_says_what_it_is():
    L = objective(weights=1 + torch.arange(12), chunk_size=5, memory="1MB")
    assert L.describe() == {
        "examples": 12, "parameters": 15, "model": "Linear", "loss": "cross_entropy", "mode": "eval",
        "dtype": "torch.float64", "device": "cpu", "chunk_size": 5, "memory": 10**6, "weighted": True,
        "population_size": None, "subset": None, "data": L.data_hash(),
        "convention": "mean over examples of -log softmax(outputs)[target]",
    }  # fmt: skip


# -- batches -------------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x, shift=None):
        return self.layer(x) + shift


@dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor
    source: str = "text"


Named = namedtuple("Named", ["x", "y"])
SHIFT = X[:, :3]
KINDS_OF_INPUTS = {
    "tuple": (X, SHIFT),
    "list": [X, SHIFT],
    "dict": {"x": X, "shift": SHIFT},
    "ordered": OrderedDict(shift=SHIFT, x=X),
    "mapping": UserDict(x=X, shift=SHIFT),
}


@pytest.mark.parametrize("kind", KINDS_OF_INPUTS)
def test_inputs_of_several_tensors_are_passed_on_by_place_or_name(kind):
    model = TwoInputs()
    L = objective(model, data=(KINDS_OF_INPUTS[kind], Y), chunk_size=5)
    expected = F.cross_entropy(model(X, SHIFT), Y)
    assert abs(float(L.value() - expected.detach())) < 1e-14
    assert off(L.example_gradients().mean(0), torch.cat([g.flatten() for g in grad(expected, model)])) < 1e-13


def grad(value, model):
    return torch.autograd.grad(value, list(model.parameters()))


KINDS_OF_BATCHES = {
    "tuple": ((X, Y), lambda b: (b[0], b[1])),
    "list_of_tuples": ([(X[:7], Y[:7]), (X[7:], Y[7:])], lambda b: (b[0], b[1])),
    "dict": ({"x": X, "y": Y, "name": "text", "nothing": None}, lambda b: (b["x"], b["y"])),
    "dict_of_list": ({"both": [X, Y]}, lambda b: b["both"]),
    "mapping": (UserDict(x=X, y=Y), lambda b: (b["x"], b["y"])),
    "dataclass": (Record(X, Y), lambda b: (b.x, b.y)),
    "list_of_dataclasses": ([Record(X[:5], Y[:5]), Record(X[5:], Y[5:])], lambda b: (b.x, b.y)),
    "different_remarks": ([Record(X[:5], Y[:5], "a"), Record(X[5:], Y[5:], "b")], lambda b: (b.x, b.y)),
    "namedtuple": (Named(X, Y), lambda b: (b.x, b.y)),
    "tensor": (torch.cat([X, Y[:, None]], 1), lambda b: (b[:, :4], b[:, 4].long())),
    "dataset": (TensorDataset(X, Y), lambda b: (b[0], b[1])),
    "unbatched_loader": (DataLoader([(X[:7], Y[:7]), (X[7:], Y[7:])], batch_size=None), lambda b: (b[0], b[1])),
}


@pytest.mark.parametrize("kind", KINDS_OF_BATCHES)
def test_a_batch_loss_takes_any_tree_of_tensors(kind):
    data, read = KINDS_OF_BATCHES[kind]
    model = linear()

    def loss(model, batch):
        x, y = read(batch)
        return F.cross_entropy(model(x), y, reduction="none")

    L, plain = objective(model, cl.batch_loss(loss), data, chunk_size=4), objective(model)
    assert L.size == 12
    assert abs(float(L.value() - plain.value())) < 1e-14
    assert off(L.example_gradients(), plain.example_gradients()) < 1e-13
    v = seeded(15, seed=2)
    assert off(cl.hessian(L) @ v, cl.hessian(plain) @ v) < 1e-13
    assert off(ExampleGradients(L, L.params()).squared_norms(), plain.example_gradients().square().sum(1)) < 1e-13


def test_batches_with_different_scalars_are_not_joined():
    def loss(model, batch):
        return batch["scale"] * model(batch["x"]).square().sum(1)

    batches = [{"x": x, "scale": torch.tensor(s)} for x, s in ((X[:5], 1.0), (X[5:], 100.0))]
    model = linear()
    expected = sum(float(loss(model, batch).detach().sum()) for batch in batches) / 12
    assert abs(float(objective(model, cl.batch_loss(loss), batches).value()) - expected) < 1e-12


def test_equal_batches_are_joined_and_others_are_kept():
    assert len(Examples(split((X, Y), [5, 3, 4]), pairs=True).batches) == 1
    assert len(Examples(ragged([True] * 7), pairs=True).batches) == 4
    examples = Examples([(X, Y), (X.float(), Y)], pairs=True)
    assert (len(examples.batches), len(examples), examples.size) == (2, 24, 24)
    assert examples.nbytes() == X.nbytes + X.nbytes // 2 + 2 * Y.nbytes


@pytest.mark.parametrize("options", [{"shuffle": True}, {"shuffle": True, "drop_last": True}, {"num_workers": 2}])
def test_a_loader_is_read_in_order_without_moving_random_states(options):
    model, loader = linear(), DataLoader(TensorDataset(X, Y), batch_size=5, **options)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    L = objective(model, data=loader)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert torch.equal(L.examples.batches[0][0], X)
    assert torch.equal(L.examples.batches[0][1], Y)


def test_data_and_weights_made_in_inference_mode_can_be_differentiated():
    expected = objective(weights=torch.arange(12)).gradient()
    with torch.inference_mode():
        L = objective(data=(X.float(), Y.clone()), weights=torch.arange(12))
        assert off(L.gradient(), expected.clone()) < 1e-7
    assert off(L.gradient(), expected) < 1e-7
    with torch.inference_mode():
        assert torch.equal(objective(weights=torch.arange(12)).gradient(), expected)


def test_loss_modules_follow_the_objective_in_precision():
    weight = torch.tensor([0.5, 1.0, 2.0])
    L = objective(linear().float(), nn.CrossEntropyLoss(weight=weight, reduction="none"), dtype=torch.float64)
    expected = F.cross_entropy(linear()(X), Y, weight=weight.double(), reduction="none").mean()
    assert abs(float(L.value() - expected.detach())) < 1e-6


# -- mini-batches of training --------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 9), b=st.integers(1, 12), seed=st.integers(0, 5), kind=st.sampled_from(["epochs", "with", "own"])
)
@repeatable
def test_batches_draw_as_they_say(n, b, seed, kind):
    b = b if kind == "with" else min(b, n)
    batches = cl.Batches(n, b, steps=4, seed=seed, epochs=kind == "epochs", replacement=kind == "with")
    drawn = list(batches)
    assert len(drawn) == len(batches) == 4
    assert all(torch.equal(a, c) for a, c in zip(drawn, batches, strict=True))  # the same again
    for batch in drawn:
        assert batch.dtype == torch.int64
        assert batch.shape == (b,)
        assert 0 <= int(batch.min()) <= int(batch.max()) < n
        assert kind == "with" or len(batch.unique()) == b
    if kind == "epochs":
        first = torch.cat(drawn[: max(1, n // b)])[: n // b * b]
        assert len(first.unique()) == min(len(first), 4 * b)
    if b == n and kind != "with":
        assert torch.equal(drawn[0], torch.arange(n))


# -- memory and chunks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, expected",
    [
        ("2GiB", 2**31),
        ("500MB", 5 * 10**8),
        ("1.5 kb", 1500),
        (1000, 1000),
        ("64B", 64),
        ("10 KiB", 10240),
        (1e3, 1000),
    ],
)
def test_memory_is_bytes_or_text(given, expected):
    assert objective(memory=given).memory == expected


def test_memory_has_a_default():
    assert objective().memory > 10**6


def test_chunks_take_at_most_a_quarter_of_the_memory():
    L = solved("layer_norm")[0].objective()
    per_example = L.graph_bytes
    assert per_example > 8 * 20  # the activations alone
    for k in (1, 2, 5):
        assert solved("layer_norm")[0].objective(memory=int(4 * k * per_example) + 1).chunk_size == k
    assert solved("layer_norm")[0].objective(memory=1).chunk_size == 1
    assert L.chunk_size == L.size
    assert objective(chunk_size=100).chunk_size == 12


def test_memory_of_a_graph_is_known_when_the_first_batch_is_a_single_example():
    data = ragged([True] * 7)
    L = objective(Pooled(), data=[data[1], *data[:1], *data[2:]])
    assert L.graph_bytes > 8 * 3  # the activations of one position


def test_chunks_are_consecutive_and_within_their_size():
    L = objective(data=ragged([True] * 7), model=Pooled(), chunk_size=2)
    chunks = list(L.chunks())
    assert [chunk.size for chunk in chunks] == [2, 1, 2, 1, 2]
    assert [(c.positions.start, c.positions.stop) for c in chunks] == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 8)]


def test_large_data_stays_where_it_is():
    data = (X.float(), Y)
    L = objective(data=data, memory=X.nbytes)
    assert L.examples.batches[0][0].dtype == torch.float32
    assert next(iter(L.chunks())).batch[0].dtype == torch.float64
    assert off(L.gradient(), objective().gradient()) < 1e-6


# -- training mode -------------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x):
        return self.layer(F.dropout(x, 0.5, self.training))


class AttentionWithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True), linear()

    def forward(self, x):
        x = x.view(-1, 1, 4).expand(-1, 2, -1)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def dropout_mlp():
    return nn.Sequential(linear(4, 5), nn.Tanh(), nn.Dropout(0.5), linear(5, 3)).double()


@pytest.mark.parametrize("model", [dropout_mlp, ByHand, lambda: AttentionWithDropout().double()])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_dropout_in_training_mode_is_one_fixed_mask(model, chunk_size):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model()
    L = objective(model, mode="train", chunk_size=chunk_size)
    w, v = L.params(), block(L.num_params)
    assert L.value(w) == L.value(w)
    assert L.value(w) != objective(model).value(w)
    H = cl.hessian(L, w)
    HV = H @ v
    assert torch.equal(HV, H @ v)
    assert off(v.T @ HV, (v.T @ HV).T) < 1e-13
    for engine in EAGER:
        assert off(cl.hessian(L, w, engine=engine) @ v, HV) < 1e-13
    rows = L.example_gradients(w)
    assert off(rows.mean(0), L.gradient(w)) < 1e-13
    assert off(ExampleGradients(L, w).squared_norms(), rows.square().sum(1)) < 1e-13
    h = 1e-5 * v[:, 0]
    assert off((L.gradient(w + h) - L.gradient(w - h)) / 2e-5, HV[:, 0]) < 1e-7


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_puts_flags_and_random_states_back(training):
    model = dropout_mlp().train(training)
    before = torch.get_rng_state()
    L = objective(model, mode="train")
    L.gradient()
    cl.hessian(L) @ L.params()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training == training for module in model.modules())


def test_training_mode_leaves_frozen_layers_frozen():
    model = nn.Sequential(linear(4, 5), nn.BatchNorm1d(5).double().eval(), nn.Tanh(), linear(5, 3))
    model[1].running_mean.normal_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(objective(model, mode="train").gradient(), objective(model, mode="eval").gradient())
    assert not model[1].training
    assert model.training


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False)])
def test_batch_norm_in_training_mode_is_a_function_of_the_whole_batch(norm):
    model = nn.Sequential(linear(4, 5), norm.double(), nn.Tanh(), linear(5, 3)).train()
    L = objective(model, mode="train")
    w = L.params().requires_grad_()
    before = {name: b.clone() for name, b in model.named_buffers()}
    copies = {name: b.clone() for name, b in model.named_buffers()}
    value = F.cross_entropy(torch.func.functional_call(model, {**L.unflatten(w), **copies}, (X,)), Y)
    (gradient,) = torch.autograd.grad(value, w, create_graph=True)
    H = torch.stack([torch.autograd.grad(g, w, retain_graph=True)[0] for g in gradient])
    assert abs(float(L.value() - value.detach())) < 1e-14
    assert off(L.gradient(), gradient.detach()) < 1e-13
    for engine in EAGER:
        assert off(cl.dense(cl.hessian(L, engine=engine)), H) < 1e-13
    cl.ggn(L) @ L.params()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


# -- refusals ------------------------------------------------------------------------------------------------------


class Streaming(IterableDataset):
    def __iter__(self):
        return iter(())


class Endless(Dataset):
    def __getitem__(self, i):
        return X[0], Y[0]


class Augmented(Listed):
    def __getitem__(self, i):
        self.reads = getattr(self, "reads", 0) + 1
        x, y = super().__getitem__(i)
        return x + self.reads, y


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) * random.random()


class Centered(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.head, self.reentrant = linear(), linear(3), reentrant

    def forward(self, x):
        return self.head(checkpoint(lambda x: torch.tanh(self.body(x)), x, use_reentrant=self.reentrant))


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Rewriting(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-1e-3, 1e-3)
        return super().forward(x)


class RewritingData(nn.Linear):
    def forward(self, x):
        self.weight.data.clamp_(-1e-3, 1e-3)
        return super().forward(x)


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
        self.calls = torch.zeros(())

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def drawn(sampler):
    return objective(data=DataLoader(TensorDataset(X, Y), sampler=sampler))


def rolled(items, times=itertools.count()):  # noqa: B008  counts its calls
    """Mixes the examples of a batch otherwise in each call, and leaves one on its own as it is."""
    x, y = default_collate(items)
    return x.roll(next(times), 0), y


def shared_memory():
    model = nn.Sequential(linear(4, 4), nn.Tanh(), linear(4, 4))
    model[2].weight.data = model[0].weight.data
    return objective(model)


def changed_data():
    x = X.clone()
    L = objective(data=(x, Y))
    x.add_(1)
    L.value()


def changed_layer():
    model = nn.Sequential(linear(4, 5), linear(5, 3))
    L = objective(model)
    model[1] = linear(5, 4)
    L.params()


def changed_frozen():
    model = nn.Sequential(linear(4, 5), linear(5, 3))
    model[0].weight.requires_grad_(False)
    H = cl.hessian(objective(model))
    model[0].weight.data *= 2
    H @ torch.ones(H.shape[0]).double()


class Root(nn.Linear):
    def forward(self, x):
        return super().forward(x) + (self.weight * 0).sum().abs().sqrt()


def with_value(value, tensor, i):
    tensor = tensor.clone()
    tensor[i] = value
    return tensor


def broken(value):
    model = linear()
    model.bias.data[1] = value
    return model


def mixed():
    return nn.Sequential(linear(), nn.Linear(3, 3).float())


def normalized(**options):
    return nn.Sequential(linear(), nn.BatchNorm1d(3, **options).double())


def snapshot(L=None, **options):
    L = objective() if L is None else L
    return cl.Snapshot(L, options.pop("w", L.params()), **options)


def diagnostic(name, at, **options):
    return DIAGNOSTICS[name].function(at, **options)


def registered(name, needs=()):
    def function(at):
        raise NotImplementedError

    function.__name__ = name
    return cl.diagnostic("x", formula="x", kind="exact", cost="none", needs=needs)(function)


def penalty_differentiated_twice():
    L = objective()
    value = cl.regularizers.gradient_norm_penalty(L, None, None)
    torch.autograd.grad(value, L.variables(), create_graph=True)


def named(name):
    def function(m):
        raise NotImplementedError

    function.__name__ = name
    return function


def measure(*names, L=None, **options):
    return cl.measure(objective() if L is None else L, names, **options)


def train(model=None, batches=None, trained=None, **options):
    model = linear() if model is None else model
    sgd = torch.optim.SGD((trained or model).parameters(), lr=0.1)
    return list(cl.train(objective(model), sgd, batches or cl.Batches(12, 4, 1), **options))


def other_trajectory():
    with tempfile.TemporaryDirectory() as folder:
        run = cl.Run.create(Path(folder) / "run", {})
        run.save("trajectory", {"steps": torch.arange(1), "params": torch.ones(1, 3), "errors": torch.zeros(1)})
        run.close()
        measure(("trajectory_distance", {"run": run.path}))


def top_eigenvector():
    return cl.eigsh(cl.hessian(objective()), generator=torch.Generator()).vectors[:, 0]


def own(outputs, targets):
    return outputs.square().sum(1)


def with_another_generator_of_numpy():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        return objective()
    finally:
        np.random.set_bit_generator(before)


REFUSALS = {
    # guard.py
    "generator_of_numpy": (
        TypeError,
        r"numpy's global generator is a PCG64, .*set_bit_generator\(np.random.MT19937",
        with_another_generator_of_numpy,
    ),
    # objective.py
    "mode": (ValueError, "mode is 'test'; expected 'eval' or 'train'", lambda: objective(mode="test")),
    "chunk_size": (ValueError, "chunk_size is 0; expected at least 1", lambda: objective(chunk_size=0)),
    "point": (ValueError, r"w has shape \(3,\); expected \(15,\)", lambda: objective().value(torch.ones(3))),
    "column": (ValueError, r"w has shape \(15, 1\)", lambda: objective().gradient(torch.ones(15, 1))),
    "foreign_batch_of_weighted": (
        ValueError,
        "weights of a foreign batch are unknown",
        lambda: objective(weights=1 + torch.arange(12)).value(batch=(X, Y)),
    ),
    "no_folder_to_resume": (
        ValueError,
        "need a folder to read and write; pass run=",
        lambda: cl.train(L := objective(), torch.optim.SGD(L.variables(), lr=0.1), [], resume=True),
    ),
    "weight_decays_that_differ": (
        ValueError,
        r"weight decays \[0.0, 0.1\]; the trained objective needs one",
        lambda: cl.train(
            L := objective(),
            torch.optim.SGD([{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(L.variables())], lr=0.1),
            [],
            diagnostics=["trained/loss"],
        ),
    ),
    "whole_batch_gradient_of_a_micro_batch": (
        TypeError,
        "looks at the gradient of the whole batch",
        lambda: TrainedObjective(objective(), [(0.1, "implicit_regularizer_mean")]),
    ),
    "population": (ValueError, "population_size is 5 for 12 examples", lambda: objective(population_size=5)),
    "groups_of_a_population": (
        ValueError,
        "at least 3 groups of examples, got 2",
        lambda: cl.measure(objective(population_size=50), [("gradient_concentration", {"samples": 2})], batch_size=2),
    ),
    "broadcast_targets": (
        ValueError,
        r"MSELoss got outputs of shape \(8, 3\) and targets of shape \(8, 1\); expected equal shapes",
        lambda: objective(loss=nn.MSELoss(), data=(X, X[:, :1])),
    ),
    "tokens_without_positions": (
        ValueError,
        r"next_token got outputs of shape \(8, 3\) and targets of shape \(8,\); expected \(B, T, V\) and \(B, T\)",
        lambda: objective(loss="next_token"),
    ),
    "no_such_device": (
        ValueError,
        "device 'abacus' cannot be used",
        lambda: cl.problems.build(cl.problems.Experiment(device="abacus")),
    ),
    "no_such_parameters": (
        ValueError,
        "parameters='heads' picks none of the trainable parameters; there are weight, bias",
        lambda: objective(parameters="heads"),
    ),
    "train_with_a_subset": (
        ValueError,
        "has a subset of the model's parameters.*measure the subset with Monitor",
        lambda: cl.train(L := objective(parameters="bias"), torch.optim.SGD(L.variables(), lr=0.1), []),
    ),
    "sampled_loader": (
        ValueError,
        r"the DataLoader draws by a SubsetRandomSampler, which need not visit each example once.*Subset\(dataset, indices\)",
        lambda: objective(data=DataLoader(TensorDataset(X, Y), sampler=torch.utils.data.SubsetRandomSampler([1, 2]))),
    ),
    "unknown_sampler": (
        ValueError,
        "draws by a Balanced, which need not visit each example once",
        lambda: drawn(type("Balanced", (torch.utils.data.Sampler,), {"__iter__": lambda _: iter([0] * 12)})()),
    ),
    "listed_sampler": (ValueError, "draws by a list", lambda: drawn([0, 1, 1])),
    "weights_in_batches": (
        ValueError,
        "draws by a WeightedRandomSampler",
        lambda: objective(
            data=DataLoader(
                TensorDataset(X, Y),
                batch_sampler=torch.utils.data.BatchSampler(
                    torch.utils.data.WeightedRandomSampler(torch.ones(12), 12), 4, False
                ),
            )
        ),
    ),
    "iterable": (TypeError, "data is an IterableDataset.*list\\(DataLoader", lambda: objective(data=Streaming())),
    "mixing_collate": (
        ValueError,
        "collating the same examples twice gives different values",
        lambda: objective(data=DataLoader(TensorDataset(X, Y), batch_size=6, collate_fn=rolled)),
    ),
    "sharded": (
        ValueError,
        "FullyShardedDataParallel, which keeps parameters flat and in parts; shard it with torch.distributed.fsdp",
        lambda: objective(type("FullyShardedDataParallel", (nn.Module,), {})()),
    ),
    "reduced_function": (
        ValueError,
        r"the loss returned shape \(\) for a batch of 8; expected \(8,\)",
        lambda: objective(loss=lambda z, y: F.cross_entropy(z, y)),
    ),
    "loss_per_output": (
        ValueError,
        r"the loss returned shape \(8, 3\)",
        lambda: objective(loss=nn.MSELoss(reduction="none"), data=(X, X[:, :3])),
    ),
    "loss_no_tensor": (ValueError, "the loss returned a float", lambda: objective(loss=lambda z, y: 1.0)),
    "ggn_of_batch_loss": (
        TypeError,
        "a batch_loss calls the model itself",
        lambda: cl.ggn(objective(loss=cl.batch_loss(lambda m, b: own(m(b[0]), 0)))),
    ),
    "ggn_of_a_tuple": (
        TypeError,
        "outputs",
        lambda: cl.ggn(objective(Pair(4, 3).double(), lambda z, y: own(z[0], y))),
    ),
    "example_gradients_of_batch_norm": (
        ValueError,
        r"per-example gradients do not exist: 1 \(BatchNorm1d\) couples the examples of a batch. Measure in mode='eval'",
        lambda: objective(normalized(), mode="train").example_gradients(),
    ),
    "captures_of_batch_norm": (
        ValueError,
        "per-example gradients do not exist",
        lambda: cl.gradient_covariance(objective(normalized(), mode="train"), batch_size=2),
    ),
    "weights_shape": (
        ValueError,
        r"weights have shape \(3,\); expected \(12,\)",
        lambda: objective(weights=torch.ones(3)),
    ),
    "weights_negative": (
        ValueError,
        "finite non-negative",
        lambda: objective(weights=with_value(-1, torch.ones(12), 2)),
    ),
    "weights_zero": (ValueError, "not all zero", lambda: objective(weights=torch.zeros(12))),
    "weights_nan": (ValueError, "finite non-negative", lambda: objective(weights=torch.full((12,), math.nan))),
    "weights_infinite": (
        ValueError,
        "finite non-negative",
        lambda: objective(weights=with_value(math.inf, torch.ones(12), 10)),
    ),
    # checks.py
    "lazy": (ValueError, "parameter weight has no shape yet; run the model once", lambda: objective(nn.LazyLinear(3))),
    "all_frozen": (
        ValueError,
        "no parameter with requires_grad=True",
        lambda: objective(linear().requires_grad_(False)),
    ),
    "sparse": (
        ValueError,
        "module 0 gives sparse gradients, which have no second derivative; set sparse=False",
        lambda: objective(nn.Sequential(nn.Embedding(3, 4, sparse=True), linear()).double(), data=(Y, Y)),
    ),
    "no_parameters": (ValueError, "no parameter with requires_grad=True", lambda: objective(nn.Identity())),
    "mixed": (ValueError, r"dtypes \['torch.float32', 'torch.float64'\].*model.float\(\)", lambda: objective(mixed())),
    "complex": (
        ValueError,
        r"parameter weight is torch.complex64; expected real ones.*view_as_real\(p\)",
        lambda: objective(nn.Linear(4, 3, dtype=torch.complex64)),
    ),
    "lazy_buffer": (
        ValueError,
        "parameter 1.running_mean has no shape yet",
        lambda: objective(nn.Sequential(linear(), nn.LazyBatchNorm1d(affine=False))),
    ),
    "max_norm": (
        ValueError,
        "module 0 has max_norm=9.0, by which the forward pass rewrites its weight; measure with model.0.max_norm = None",
        lambda: objective(nn.Sequential(nn.Embedding(3, 3, max_norm=9.0)).double(), data=(Y, Y)),
    ),
    "scale_grad_by_freq": (
        ValueError,
        "module 0 has scale_grad_by_freq=True.*measure with model.0.scale_grad_by_freq = False",
        lambda: objective(nn.Sequential(nn.Embedding(3, 3, scale_grad_by_freq=True)).double(), data=(Y, Y)),
    ),
    "shared_memory": (ValueError, "parameters 0.weight and 2.weight share memory without being", shared_memory),
    "counting": (ValueError, "changes its attribute calls in place.*register_buffer", lambda: objective(Counting())),
    "spectral_norm_in_training": (
        ValueError,
        "the spectral norm of 0 takes a step of power iteration in every forward pass in training.*mode='eval'",
        lambda: objective(nn.Sequential(nn.utils.parametrizations.spectral_norm(linear())), mode="train"),
    ),
    "another_model": (
        ValueError,
        r"depends on none of the 2 parameters \(weight, ...\).*must call the model that it is given",
        lambda: objective(loss=cl.batch_loss(lambda m, b: linear()(b[0]).square().sum(1))),
    ),
    "changed_data": (ValueError, r"the data have been changed in place.*data=\(x.clone\(\), y.clone\(\)\)", changed_data),
    "changed_layer": (
        ValueError,
        r"parameter 1.weight had shape \(3, 5\) when the objective was made, and has \(4, 5\) now; make the Objective anew",
        changed_layer,
    ),
    "changed_frozen": (RuntimeError, "the frozen parameter 0.weight has changed since.*make them anew", changed_frozen),
    "all_ignored": (
        ValueError,
        r"all 12 targets are ignored \(ignore_index=2\)",
        lambda: objective(loss=nn.CrossEntropyLoss(ignore_index=2), data=(X, 0 * Y + 2)),
    ),
    "product_not_finite": (
        FloatingPointError,
        "a product with the Hessian is not finite in parameter weight and 1 more; .*norm or sqrt at 0",
        lambda: cl.hessian(objective(Root(4, 3).double())) @ torch.ones(15).double(),
    ),
    "gradient_not_finite": (
        FloatingPointError,
        "the gradient is not finite in parameter weight: .*norm, sqrt or log at 0",
        lambda: snapshot(objective(Root(4, 3).double())).gradient,
    ),
    "half": (ValueError, "dtype is torch.bfloat16; curvature needs", lambda: objective(linear().bfloat16())),
    "asked_half": (ValueError, "dtype is torch.float16; curvature needs", lambda: objective(dtype=torch.float16)),
    "memory": (ValueError, "memory is 'much'; expected a number of bytes", lambda: objective(memory="much")),
    "memory_unit": (ValueError, "memory is '2TiB'", lambda: objective(memory="2TiB")),
    "memory_negative": (ValueError, "memory is -1", lambda: objective(memory=-1)),
    "memory_infinite": (ValueError, "memory is 'inf'; expected a number of bytes", lambda: objective(memory="inf")),
    "nan_input": (
        ValueError,
        "not finite, in example 9; clean the data",
        lambda: objective(data=split((with_value(math.nan, X, 9), Y), [5, 7])),
    ),
    "infinite_target": (
        ValueError,
        "not finite, in example 2",
        lambda: objective(loss="squared_error", data=(X, with_value(math.inf, SHIFT, 2))),
    ),
    "batch_norm_chunked": (
        ValueError,
        r"1 \(BatchNorm1d\) uses the statistics of the batch",
        lambda: objective(normalized(), mode="train", chunk_size=5),
    ),
    "batch_norm_untracked": (
        ValueError,
        "uses the statistics of the batch",
        lambda: objective(normalized(track_running_stats=False)),
    ),
    "loss_not_finite": (
        ValueError,
        "the loss of example 3 is nan at the model's current parameters",
        lambda: objective(
            loss=lambda z, y: own(z, y) + torch.where(y == 99, math.nan, 0.0), data=(X, with_value(99, Y, 3))
        ),
    ),
    "random": (
        ValueError,
        "differs between two evaluations: the model is random",
        lambda: objective(Noisy(4, 3).double()),
    ),
    "coupled": (ValueError, "depends on the other examples of its batch", lambda: objective(Centered(4, 3).double())),
    "batch_average": (
        ValueError,
        "depends on the other examples of its batch",
        lambda: objective(loss=lambda z, y: own(z, y).mean().expand(len(z))),
    ),
    "diverged_parameter": (
        ValueError,
        "parameter bias holds values that are not finite",
        lambda: objective(broken(math.nan)),
    ),
    "rewriting": (
        ValueError,
        r"parameter weight is rewritten by the model's own forward pass",
        lambda: objective(Rewriting(4, 3).double()),
    ),
    "rewriting_data": (
        ValueError,
        "parameter weight is rewritten by the model's own forward pass",
        lambda: objective(RewritingData(4, 3).double()),
    ),
    # derivatives.py
    "checkpointed": (
        ValueError,
        r"body.weight is computed again in the backward pass .* block\(x\) in place of checkpoint\(block, x\)",
        lambda: objective(Checkpointed(False)),
    ),
    "around_the_module": (
        ValueError,
        r"the loss reads the tensor of parameter weight itself.*model.get_parameter\('weight'\)",
        lambda: objective(m := linear(), lambda z, y, own=m.weight: z.sum(1) + own.sum()),
    ),
    "no_second_derivative": (
        ValueError,
        r"1 \(Hardsigmoid\) cannot be differentiated twice by PyTorch .*; in its place write F.relu6\(x \+ 3\) / 6",
        lambda: cl.hessian(objective(nn.Sequential(linear(), nn.Hardsigmoid()))) @ torch.ones(15, 1).double(),
    ),
    # batches.py
    "no_batch": (ValueError, "data holds no batch", lambda: objective(data=[])),
    "index_above": (
        IndexError,
        "indices run from 0 to 12; expected 0 to 11",
        lambda: objective().value(batch=torch.tensor([0, 12])),
    ),
    "index_below": (IndexError, "indices run from -1 to 3", lambda: objective().value(batch=torch.tensor([3, -1]))),
    "no_index": (ValueError, "empty", lambda: objective().value(batch=torch.empty(0, dtype=torch.int64))),
    "no_index_gradient": (ValueError, "empty", lambda: objective().gradient(batch=torch.empty(0, dtype=torch.int64))),
    "lengths_differ": (ValueError, r"have shapes \[\(12, 4\), \(5,\)\]", lambda: objective(data=(X, Y[:5]))),
    "no_tensors": (ValueError, r"have shapes \[\]", lambda: objective(data=(X.numpy(), Y.numpy()))),
    "empty_batch": (ValueError, "a batch is empty", lambda: objective(data=[(X, Y), (X[:0], Y[:0])])),
    "batch_size_zero": (ValueError, "batch_size is 0; expected 1 to 12", lambda: cl.Batches(12, 0, 1)),
    "batch_size_above": (ValueError, "batch_size is 13; expected 1 to 12", lambda: cl.Batches(12, 13, 1)),
    "epochs": (ValueError, "cannot draw with replacement", lambda: cl.Batches(12, 4, 1, replacement=True, epochs=True)),
    "order": (ValueError, "order is 'back'; expected 'new'", lambda: cl.Batches(12, 4, 1, epochs=True, order="back")),
    "order_without_epochs": (ValueError, "is an order of epochs", lambda: cl.Batches(12, 4, 1, order="fixed")),
    "fixed_rest": (ValueError, "leave 2 out", lambda: cl.Batches(12, 5, 1, epochs=True, order="fixed")),
    "streamed": (
        TypeError,
        r"streams an IterableDataset.*list\(loader\)",
        lambda: objective(data=DataLoader(Streaming())),
    ),
    "iterator": (
        TypeError,
        "data is a generator, which may not give the same",
        lambda: objective(data=(b for b in [(X, Y)])),
    ),
    "endless": (TypeError, "Endless has no length", lambda: objective(data=Endless())),
    "empty_dataset": (ValueError, "the dataset is empty", lambda: objective(data=TensorDataset(X[:0], Y[:0]))),
    "augmented": (
        ValueError,
        "twice gives different values, as random augmentation",
        lambda: objective(data=Augmented((X, Y))),
    ),
    "inputs_alone": ((TypeError, ValueError), r"\(inputs, targets\)", lambda: objective(data=X)),
    "dict_without_batch_loss": ((TypeError, ValueError), "batch_loss", lambda: objective(data={"x": X, "y": Y})),
    # losses.py
    "loss_shape": (
        ValueError,
        r"outputs of shape \(8, 3\) and targets of shape \(8, 4\)",
        lambda: objective(loss="squared_error", data=(X, X)),
    ),
    "broadcast": (
        ValueError,
        r"targets of shape \(8,\)",
        lambda: objective(linear(4, 1), "squared_error", (X, X[:, 0])),
    ),
    "labels_shape": (
        ValueError,
        r"binary_cross_entropy got outputs of shape \(8, 3\) and targets of shape \(8,\); expected equal shapes",
        lambda: objective(loss="binary_cross_entropy"),
    ),
    "unknown_loss": (
        ValueError,
        r"loss is 'mse'; expected one of \[.*'cross_entropy', 'next_token', 'squared_error'",
        lambda: objective(loss="mse"),
    ),
    "reduced_module": (
        ValueError,
        r"CrossEntropyLoss has reduction='sum'.*pass CrossEntropyLoss\(reduction='none'\)",
        lambda: objective(loss=nn.CrossEntropyLoss(reduction="sum")),
    ),
    "sequence_outputs": (
        ValueError,
        r"cross_entropy got model outputs of shape \(8, 1, 3\); expected \(B, C\)",
        lambda: objective(data=(X[:, None], Y[:, None])),
    ),
    "tuple_outputs": (
        ValueError,
        r"cross_entropy got model outputs of shape \(8, 2, 3\)",
        lambda: objective(Recurrent(nn.GRU).double().recurrent, data=(X.view(12, 2, 2), Y)),
    ),
    "sequence_classes": (
        ValueError,
        "squared_error with class indices got model outputs of shape",
        lambda: objective(loss="squared_error", data=(X[:, None], Y)),
    ),
    "class_out_of_range": (
        ValueError,
        "class",
        lambda: objective(loss="squared_error", data=(X, with_value(3, Y, 10))),
    ),
    "counts_for_one_output": (ValueError, "class", lambda: objective(linear(4, 1), "squared_error", (X, Y))),
    # hvp.py, operators
    "engine": (
        ValueError,
        "engine is 'fast'; expected 'auto' or one of",
        lambda: cl.hessian(objective(), engine="fast"),
    ),
    "output_hessian": (
        ValueError,
        "output_hessian is 'one'; expected 'loss' or 'identity'",
        lambda: cl.ggn(objective(), output_hessian="one"),
    ),
    "fisher_of_own_loss": (
        ValueError,
        "the Fisher needs the likelihood behind the loss; it is known for loss='cross_entropy'",
        lambda: cl.fisher(objective(loss=own)),
    ),
    "moment_batch_size": (
        ValueError,
        "batch_size is 13; expected 1 to 12",
        lambda: cl.gradient_second_moment(objective(), batch_size=13),
    ),
    "covariance_batch_size": (
        ValueError,
        "batch_size is 0",
        lambda: cl.gradient_covariance(objective(), batch_size=0, replacement=True),
    ),
    # diagnostics, measure
    "other_trajectory": (ValueError, "has 3 parameters and this model 15; compare", other_trajectory),
    "diverged_point": (
        FloatingPointError,
        "parameter weight holds infinity: training has diverged; go back to a checkpoint and take a smaller lr",
        lambda: cl.hessian(objective(), with_value(math.inf, objective().params(), 0)),
    ),
    "diverged_value": (FloatingPointError, r"not finite \(nan\)", lambda: exact(math.nan, objective())),
    "diverged_step": (
        FloatingPointError,
        "not finite: the parameters have diverged",
        lambda: diagnostic("expected_loss_difference", snapshot(batch_size=12, lr=1e308)),
    ),
    "one_probe": (
        ValueError,
        "probes is 1; an error needs at least 2",
        lambda: measure(("interaction_trace", {"probes": 1}), batch_size=2),
    ),
    "target": (
        ValueError,
        "got target=0 and budget=512; expected a relative error above 0",
        lambda: measure(("batch_sharpness", {"target": 0}), batch_size=2),
    ),
    "budget": (
        ValueError,
        "budget=15; expected .* at least 16 samples",
        lambda: measure(("batch_sharpness", {"target": 0.1, "budget": 15}), batch_size=2),
    ),
    "covariance_rank": (
        ValueError,
        "k is 13; expected 1 to 12, the largest rank",
        lambda: measure(("gradient_covariance_eigenvalues", {"k": 13})),
    ),
    "covariance_overlap": (
        ValueError,
        "k is 12; expected 1 to 11",
        lambda: measure(("covariance_overlap", {"k": 12})),
    ),
    "diverged_layers": (
        FloatingPointError,
        "not finite: the parameters have diverged",
        lambda: diagnostic("layer_parameter_norm", snapshot(w=torch.full((15,), math.inf))),
    ),
    "diverged_along_step": (
        FloatingPointError,
        "not finite: the loss diverges along the step",
        lambda: diagnostic("loss_along_step", snapshot(lr=1e308)),
    ),
    "zero_batch_gradient": (
        FloatingPointError,
        "the gradient of a batch is zero",
        lambda: diagnostic("batch_sharpness", snapshot(objective(loss=lambda z, y: 0 * z.sum(1)), batch_size=2)),
    ),
    "no_batch_sizes": (
        ValueError,
        r"batch_size is \[\]; expected a whole number such as 32",
        lambda: measure("gradient_concentration", batch_size=[]),
    ),
    "fractional_batch_size": (
        ValueError,
        r"batch_size is 2.5; expected a whole number",
        lambda: measure("gradient_concentration", batch_size=2.5),
    ),
    "no_batch_size": (ValueError, "batch_size is missing", lambda: diagnostic("gradient_concentration", snapshot())),
    "batch_size_of_measure": (
        ValueError,
        "batch_size is 0",
        lambda: measure("gradient_second_moment_trace", batch_size=0),
    ),
    "name_taken": (ValueError, "diagnostic loss: the name is taken", lambda: registered("loss")),
    "unknown_need": (ValueError, r"needs \['time'\]; expected among", lambda: registered("needy", ["time", "lr"])),
    "unknown_diagnostic": (
        ValueError,
        "there is no diagnostic 'shrpness'; there are .*sharpness",
        lambda: measure("shrpness"),
    ),
    "asked_twice": (ValueError, "loss is asked for twice", lambda: measure("loss", "loss")),
    "unknown_option": (
        ValueError,
        r"no option \['tolerance'\]; it has tol",
        lambda: measure(("sharpness", {"tolerance": 1})),
    ),
    "needs_batch_size": (
        ValueError,
        "instability needs batch_size: pass batch_size=32",
        lambda: measure("instability"),
    ),
    "needs_lr": (ValueError, "needs lr: pass lr=0.1", lambda: measure("expected_loss_difference", batch_size=2)),
    "needs_test": (ValueError, "test_loss needs test: pass test=Objective", lambda: measure("test_loss")),
    "needs_training": (ValueError, r"measure it with train\(\)", lambda: measure("batch_gradient_norm")),
    # landscape.py
    "direction": (
        ValueError,
        r"direction has shape \(3,\); expected that of w, \(15,\)",
        lambda: cl.landscape.line(objective(), objective().params(), torch.ones(3), [0.0]),
    ),
    "plane": (
        ValueError,
        r"u has shape \(3,\); expected that of w, \(15,\)",
        lambda: cl.landscape.plane(objective(), torch.ones(15), torch.ones(3), torch.ones(15), [0.0], [0.0]),
    ),
    "step_along_eigenvector": (
        ValueError,
        "the step lies along q_1 and spans no plane",
        lambda: cl.landscape.top_plane(objective(), step=2 * top_eigenvector(), generator=torch.Generator()),
    ),
    # regularizers and batch_gradient.py
    "regularizer_name_taken": (
        ValueError,
        "regularizer gradient_norm_penalty: the name is taken",
        lambda: cl.regularizers.regularizer("x", formula="x", source="x")(named("gradient_norm_penalty")),
    ),
    "unknown_regularizer": (
        ValueError,
        "there is no regularizer 'grad_norm'; there are .*gradient_norm_penalty",
        lambda: cl.regularizers.resolve("grad_norm"),
    ),
    "function_without_decorator": (
        ValueError,
        "there is no regularizer 'mine'; .*by the decorator curvlab.regularizers.regularizer",
        lambda: train(penalties=[(0.1, named("mine"))]),
    ),
    "no_pair": (
        ValueError,
        r"a penalty is 'gradient_norm'; expected \(strength, regularizer\)",
        lambda: train(penalties=["gradient_norm"]),
    ),
    "strength": (
        ValueError,
        "the strength of a penalty is nan",
        lambda: train(penalties=[(math.nan, "gradient_norm")]),
    ),
    "penalty_twice": (
        ValueError,
        "penalty gradient_norm_penalty is given twice",
        lambda: train(penalties=[(0.1, "gradient_norm"), (0.2, "gradient_norm_penalty")]),
    ),
    "penalty_option": (
        ValueError,
        r"regularizer gradient_norm_penalty has no option \['h'\]; it has none",
        lambda: train(penalties=[(0.1, ("gradient_norm", {"h": 1.0}))]),
    ),
    "likelihood_of_a_penalty": (
        ValueError,
        "fisher_trace_penalty needs the likelihood behind the loss; it is known for loss='cross_entropy'",
        lambda: cl.regularizers.fisher_trace_penalty(objective(loss=own), None, None),
    ),
    "outputs_of_a_batch_loss": (
        ValueError,
        "average_jacobian_penalty needs the outputs of the model, and a batch_loss calls the model itself",
        lambda: cl.regularizers.average_jacobian_penalty(
            objective(loss=cl.batch_loss(lambda m, b: own(m(b[0]), 0))), None, None
        ),
    ),
    "outputs_of_a_pair": (
        TypeError,
        r"the model returned a tuple; this penalty needs outputs that are one tensor \(B, ...\)",
        lambda: cl.regularizers.average_jacobian_penalty(
            objective(Pair(4, 3).double(), lambda z, y: own(z[0], y)), None, None
        ),
    ),
    "micro_batch_size_of_a_penalty": (
        ValueError,
        "micro_batch_size is 0; expected at least 1 example",
        lambda: cl.regularizers.gradient_norm_penalty(objective(), None, None, micro_batch_size=0),
    ),
    "params_of_another_model": (
        ValueError,
        r"params is a list of other tensors than the model's; expected None for the live model, .* \(15,\) vector",
        lambda: cl.regularizers.gradient_norm_penalty(objective(), list(linear().parameters()), None),
    ),
    "statistics_of_one_example": (
        ValueError,
        "a micro-batch of 1 example has no statistics for BatchNorm in training; choose a micro_batch_size of at least 2",
        lambda: train(normalized(), penalties=[(0.1, "gradient_norm")], micro_batch_size=3),
    ),
    "penalty_differentiated_twice": (
        RuntimeError,
        "accumulated without its graph and cannot be differentiated again; pass create_graph=True",
        penalty_differentiated_twice,
    ),
    "third_derivatives_of_layer_norm": (
        ValueError,
        "PyTorch's are silently wrong through LayerNorm; leave create_graph out",
        lambda: cl.regularizers.gradient_norm_penalty(
            objective(nn.Sequential(linear(), nn.LayerNorm(3).double())), None, None, create_graph=True
        ),
    ),
    "draws": (
        ValueError,
        "draws is 1; a mean needs at least 2",
        lambda: measure(("fisher_trace_penalty", {"draws": 1})),
    ),
    # train
    "no_checkpoints": (
        ValueError,
        "checkpoint_every is 0; expected a whole number of steps from 1",
        lambda: train(checkpoint_every=0),
    ),
    "every": (ValueError, "every is 0; expected a whole number", lambda: train(every=0)),
    "micro_batch_size": (
        ValueError,
        "micro_batch_size is 0; expected at least 1 example",
        lambda: train(micro_batch_size=0),
    ),
    "optimizer_of_another_model": (
        ValueError,
        "the optimizer holds none of the trainable parameters",
        lambda: train(trained=linear()),
    ),
    "batches_of_other_data": (
        ValueError,
        "the batches index 24 examples, but the objective has 12",
        lambda: train(batches=cl.Batches(24, 4, 1)),
    ),
    "check": (ValueError, "check is .sometimes.; expected .first., .always. or", lambda: objective(check="sometimes")),
    "train_needs_test": (ValueError, "test_loss needs test", lambda: train(diagnostics=["test_loss"])),
}


class Doubled(torch.autograd.Function):
    """Of the style that torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name):
    exception, text, call = REFUSALS[name]
    with pytest.raises(exception, match=text):
        call()


OWN_TESTS = {"linalg", "claims", "problems", "measurement", "runs", "plots", "report", "cli", "__init__", "__main__"}
OWN_TESTS |= {
    "linearize",
    "gradient_graph",
    "self_check",
    "references",
    "verification",
    "throughput",
    "methods",
    "flow",
    "trained",
    "sweep",
    "monitor",
    "schedule",
    "optional",
    "integrations",
    "compat",
    "tables",
    "budget",
    "memory",
    "docs",
    "ranks",
    "sharded",
    "planning",
    "files",
    "trainer",
}


def test_every_raise_has_a_refusal():
    """Of the files without a test file of their own for it: each statement is reached by a row of the table."""
    reached = set()
    for _, _, call in REFUSALS.values():
        try:
            call()
        except Exception as error:
            trace = error.__traceback__
            while trace.tb_next is not None:
                trace = trace.tb_next
            reached.add((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
    missing = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.relative_to(PACKAGE).parts[0].removesuffix(".py") in OWN_TESTS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:  # passing on is no refusal
                lines = range(node.lineno, node.end_lineno + 1)
                if not any((str(file), line) in reached for line in lines):
                    missing.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert missing == []


def test_a_run_is_never_overwritten(tmp_path):
    model = linear()
    train(model, run=tmp_path / "run")
    with pytest.raises(FileExistsError, match="already holds a run, which is never overwritten"):
        train(model, run=tmp_path / "run")


def test_unknown_attributes_of_the_package_are_refused():
    with pytest.raises(AttributeError, match=r"curvlab has no attribute 'hesian'; it has .*hessian"):
        _ = cl.hesian


def test_at_a_point_that_is_not_finite_a_measurement_says_so():
    L = objective(loss="squared_error")
    found = cl.measure(L, ["loss", "sharpness", "gradient_variance"], w=1e200 * torch.ones(15).double())
    assert all(m.value is None for m in (found["loss"], found["gradient_variance"]))
    assert "diverged" in found["loss"].note


def test_what_is_accepted_on_purpose():
    objective(data=[(X, Y)])
    objective(data=[X, Y])
    objective(weights=list(range(12)))
    objective(chunk_size=50)
    objective(loss=nn.CrossEntropyLoss(reduction="none"))
    objective(nn.Sequential(nn.Dropout(0.5), linear()), mode="train")
    objective(data=(X[:1], Y[:1]))
