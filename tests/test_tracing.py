"""Recordings of gradients and products.

Compared with a reference: products of every case that can be recorded with autograd's, bit for bit or to rounding (against
dense Hessians: test_operators.py). Behaviour only: when one is made, reused, dropped, or cannot be made.
"""

import logging

import pytest
import torch
from cases import CASES, DOUBLE, block, off, solved, some
from torch import nn

import curvlab as cl
from curvlab import gradient_graph
from curvlab.gradient_graph import STRIKES
from curvlab.hvp import HessianProducts
from curvlab.linearize import NotTraceable, linearize


def mlp(*, inputs=4, n=9, activation=nn.Tanh):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 5), activation(), nn.Linear(5, 3)).double()
    return model, (torch.randn(n, inputs, dtype=DOUBLE), torch.randint(3, (n,)))


def products(L, engine, w=None):
    V = block(L.num_params)
    P = HessianProducts(L, L.point(w), engine=engine)
    value, gradient = P.value_and_gradient()
    return P.engine, torch.cat([value[None], gradient, P.matmat(V).flatten()])


@pytest.fixture
def traces(monkeypatch):
    """How often something was recorded."""
    made = []

    def counted(*args):
        made.append(args)
        return linearize(*args)

    monkeypatch.setattr(gradient_graph, "linearize", counted)
    return made


@pytest.mark.parametrize("case", some(CASES, 4), ids=str)
def test_a_recording_repeats_what_autograd_does(case):
    problem, reference = solved(case.name)
    L = problem.objective(chunk_size=4)
    w = reference.w + 0.01 * torch.linspace(-1, 1, len(reference.w), dtype=DOUBLE)
    engine, found = products(L, "traced", w)
    _, expected = products(L, "graph", w)
    assert off(found, expected) < 1e-14
    assert engine == "traced"


def test_it_is_made_once_for_each_shape_and_holds_at_other_points(traces):
    model, data = mlp()
    L = cl.Objective(model, "cross_entropy", data, chunk_size=4)  # chunks of 4, 4 and 1
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * step
        assert torch.equal(products(L, "traced")[1], products(L, "graph")[1])
    assert len(traces) == 2


def test_buffers_and_frozen_parameters_are_no_part_of_it(traces):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    model[0].bias.requires_grad_(False)
    L = cl.Objective(model, "cross_entropy", mlp()[1])
    products(L, "traced")
    with torch.no_grad():
        model[0].bias += 1
        model[1].running_mean += 0.5
    assert torch.equal(products(L, "traced")[1], products(L, "graph")[1])
    assert len(traces) == 1


def test_products_stay_at_their_point_when_the_model_moves():
    model, data = mlp()
    L = cl.Objective(model, "cross_entropy", data)
    V = block(L.num_params)
    P = HessianProducts(L, L.params(), engine="traced")
    before = P.matmat(V)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(P.matmat(V), before)


class Tempered(nn.Module):
    """Outputs over a temperature that is a number of Python."""

    def __init__(self):
        super().__init__()
        self.inner, self.temperature = mlp()[0], 1.0

    def forward(self, x):
        return self.inner(x) / self.temperature


def test_a_number_of_python_that_changes_drops_it(traces, caplog):
    model = Tempered()
    L = cl.Objective(model, "cross_entropy", mlp()[1])
    for step in range(STRIKES + 2):
        model.temperature = 1.0 + step
        assert torch.equal(products(L, "traced")[1], products(L, "graph")[1])
    assert len(traces) == 3  # each second point finds the last one wrong
    assert "has changed; the trace was dropped" in caplog.text


def test_products_of_an_earlier_point_outlive_a_dropped_recording():
    model = Tempered()
    L = cl.Objective(model, "cross_entropy", mlp()[1], chunk_size=3, memory=1)  # nothing is kept
    V = block(L.num_params)
    earlier = HessianProducts(L, L.params(), engine="traced")
    model.temperature = 2.0
    assert products(L, "traced")[0] == "graph"
    assert torch.equal(earlier.matmat(V), HessianProducts(L, L.params(), engine="graph").matmat(V))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()[0]

    def forward(self, x):
        return self.inner(x) if x.sum() > 1e9 else 2 * self.inner(x)


def test_control_flow_that_depends_on_data_is_not_recorded(caplog):
    L = cl.Objective(Branching(), "cross_entropy", mlp()[1], chunk_size=3)
    with caplog.at_level(logging.WARNING, "curvlab"):
        engine, found = products(L, "traced")
        products(L, "traced")
    assert engine == "graph"
    assert torch.equal(found, products(L, "graph")[1])
    (line,) = caplog.messages
    assert line.startswith("Hessian-vector products go through autograd's graph: no trace, ")


def test_batch_statistics_are_not_recorded(caplog):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    L = cl.Objective(model, "cross_entropy", mlp()[1], mode="train")
    assert products(L, "traced")[0] == "graph"
    assert "coupled" in caplog.text


def test_what_is_kept_is_counted_and_bounded():
    model, data = mlp(n=40)
    L = cl.Objective(model, "cross_entropy", data, chunk_size=10)
    P = HessianProducts(L, L.params(), engine="traced")
    expected = P.matmat(block(L.num_params))
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in P._points[0]._needed}
    inputs = next(L.chunks()).batch[0]  # needed, as the parameters are, which every chunk has a copy of
    kept.pop(inputs.untyped_storage().data_ptr())
    nbytes = gradient_graph.recordings(L).of(next(L.chunks())).nbytes
    weights = sum(p.numel() * 8 for p in model.parameters())
    assert nbytes <= sum(kept.values()) <= nbytes + weights
    L.memory = 4 * nbytes
    small = HessianProducts(L, L.params(), engine="traced")
    assert (P.kept, small.kept) == (4, 2)
    assert torch.equal(small.matmat(block(L.num_params)), expected)


@pytest.mark.parametrize(
    "engine, memory, reason",
    [
        ("auto", "1MiB", "auto takes graph on cpu with few products to come; half of 1 MiB keeps 3 of 3 chunks"),
        (
            "graph",
            1,
            "graph was asked for; half of 9.537e-07 MiB keeps 0 of 3 chunks; the others are rebuilt for each block",
        ),
        ("traced", "1MiB", "traced was asked for; half of 1 MiB keeps 3 of 3 chunks"),
        ("double_backward", "1MiB", "double_backward was asked for, and keeps nothing"),
    ],
)
def test_the_choice_of_an_engine_has_a_reason(engine, memory, reason):
    model, data = mlp()
    L = cl.Objective(model, "cross_entropy", data, chunk_size=3, memory=memory)
    assert HessianProducts(L, L.params(), engine=engine).reason.startswith(reason)


def test_the_reason_says_that_nothing_could_be_recorded():
    L = cl.Objective(Branching(), "cross_entropy", mlp()[1])
    assert HessianProducts(L, L.params(), engine="traced").reason.startswith(
        "traced was asked for, but nothing could be recorded (the log has the reason); half of"
    )


@pytest.mark.slow
def test_compiled_products_agree():
    model, data = mlp(n=32)
    L = cl.Objective(model, "cross_entropy", data, chunk_size=16)
    for scale in (0.5, 2.0):
        engine, found = products(L, "compiled", scale * L.params())
        assert engine == "compiled"
        assert off(found, products(L, "graph", scale * L.params())[1]) < 1e-13


# -- linearize ----------------------------------------------------------------------------------------------------


def test_linearize_splits_a_function_of_ones_own():
    def function(inputs, vectors):
        (x,), (v,) = inputs, vectors
        e = x.exp()
        return [e.sum()], [e * v]

    found = linearize(function, [torch.zeros(3)], [torch.zeros(3)])
    values, needed = found.first(torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(values[0], torch.tensor([0.0, 1.0, 2.0]).exp().sum())
    assert [n.op for n in found.second.graph.nodes].count("call_function") == 1  # the exponential is in the first part
    v = torch.tensor([1.0, -1.0, 0.5])
    assert torch.equal(found.second(*needed, v)[0], torch.tensor([0.0, 1.0, 2.0]).exp() * v)
    assert found.nbytes == 12


def test_linearize_refuses_what_would_spoil_the_next_product():
    def overwrites(inputs, vectors):
        return [inputs[0].sum()], [inputs[0].mul_(vectors[0])]

    with pytest.raises(NotTraceable, match="overwrites what later products need"):
        linearize(overwrites, [torch.ones(2)], [torch.ones(2)])
    with pytest.raises(NotTraceable, match="DataDependent"):
        linearize(lambda x, v: ([x[0]], [v[0] * float(x[0].sum())]), [torch.ones(2)], [torch.ones(2)])
