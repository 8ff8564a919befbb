"""What products do on a GPU: captured recordings, and several vectors at once.

Compared with a reference: products of every case with those of autograd's graph. Where there is no GPU, a function stands
for the capture: it computes in place, as a replay does, so that all but CUDA itself is tested. Behaviour only: what `auto`
takes, what is said, and what happens where a capture or a block is not possible.
"""

import itertools

import pytest
import torch
from cases import CASES, DOUBLE, EAGER, block, off, solved, some
from torch import nn
from torch.utils import _pytree as pytree

import curvlab as cl
from curvlab import gradient_graph, hvp, replay
from curvlab.hvp import MANY, HessianProducts, fastest_block

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: captures graphs")


@pytest.fixture
def captures(monkeypatch):
    """Functions that were captured, by a stand-in for CUDA that works on a CPU."""
    made = []

    def in_place(function, pool):
        outputs = function()
        made.append(function)

        def again():
            pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(function()), strict=True)
            for old, new in pairs:
                old.copy_(new)

        return outputs, again

    monkeypatch.setattr(replay, "capture", in_place)
    for module in (gradient_graph, hvp):
        monkeypatch.setattr(module, "CAPTURES_ON", ("cpu",))
    return made


@pytest.fixture
def pairs(monkeypatch):
    """Vectors are multiplied two at once."""
    monkeypatch.setattr(hvp, "BLOCKS_ON", ("cpu",))
    monkeypatch.setattr(hvp, "fastest_block", lambda *_: 2)


def made(L, w, engine):
    """What is compared of a point."""
    P = HessianProducts(L, w, engine=engine)
    return P, torch.cat([P.value_and_gradient()[0][None], P.value_and_gradient()[1], P.matmat(block(len(w))).flatten()])


@pytest.mark.parametrize("case", some(CASES, 6), ids=str)  # that all can be recorded: test_tracing.py
def test_captured_recordings_agree_at_points_in_turn(case, captures):
    problem, reference = solved(case.name)
    L = problem.objective(chunk_size=4)
    first, second = reference.w, reference.w + 0.01 * torch.linspace(-1, 1, len(reference.w), dtype=DOUBLE)
    points = {}
    for w in (first, second):
        points[id(w)], found = made(L, w, "traced")
        assert off(found, made(L, w, "graph")[1]) < 1e-14
    assert captures
    for w in (first, second, first):  # each takes over what the other has left
        V = block(len(w), seed=3)
        expected = HessianProducts(L, w, engine="graph").matmat(V)
        assert off(points[id(w)].matmat(V), expected) < 1e-14


def test_chunks_that_are_not_kept_share_one_capture(captures):
    problem, reference = solved("layer_norm")
    L = problem.objective(chunk_size=3, memory=1)
    found, other = made(L, reference.w, "traced")[1], made(L, reference.w, "graph")[1]
    assert off(found, other) < 1e-14
    assert len(captures) == 2  # a first and a second part


def test_what_cannot_be_captured_is_run_operation_by_operation(captures, monkeypatch, caplog):
    def refused(function, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "capture", refused)
    problem, reference = solved("layer_norm")
    L = problem.objective(chunk_size=4)
    P, found = made(L, reference.w, "traced")
    made(L, reference.w, "traced")
    assert P.engine == "traced"
    assert off(found, made(L, reference.w, "graph")[1]) < 1e-14
    (line,) = [record.getMessage() for record in caplog.records if record.name == "curvlab"]
    assert line == (
        "Hessian-vector products are replayed operation by operation: no capture, operation not permitted when stream is "
        "capturing"
    )


def test_a_run_on_such_a_device_takes_recordings(captures):
    problem, reference = solved("layer_norm")
    L = problem.objective(chunk_size=4)
    few, many = (HessianProducts(L, reference.w, expected=expected) for expected in (None, MANY))
    assert (few.engine, many.engine) == ("graph", "traced")
    assert many.reason.startswith("auto takes traced on cpu with many products to come")
    sgd = torch.optim.SGD(L.model.parameters(), lr=0.0)
    for _ in cl.train(L, sgd, cl.Batches(L.size, L.size, 2), diagnostics=["sharpness"]):
        pass
    assert captures


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("engine", EAGER)
@pytest.mark.parametrize("case", some([c for c in CASES if c.forward_mode], 6), ids=str)
def test_several_vectors_at_once(case, engine):
    problem, reference = solved(case.name)
    L = problem.objective(chunk_size=4)
    if engine == "forward_over_reverse" and any(getattr(m, "padding_idx", None) is not None for m in L.model.modules()):
        pytest.skip("has no such engine: padding_idx")
    V = block(L.num_params, 3)
    assert off(HessianProducts(L, reference.w, engine=engine).matmat(V), reference.hessian @ V) < 1e-12


@pytest.mark.usefixtures("pairs")
def test_several_vectors_at_once_in_captured_recordings(captures):
    problem, reference = solved("layer_norm")
    V = block(len(reference.w), 5)
    found = HessianProducts(problem.objective(chunk_size=4), reference.w, engine="traced").matmat(V)
    assert off(found, reference.hessian @ V) < 1e-12


@pytest.mark.parametrize("prices, expected", [((4, 6, 9, 20), 4), ((4, 9), 1), ((4, 6, "no rule"), 2)])
def test_the_block_is_as_large_as_is_fastest_for_each_vector(prices, expected, monkeypatch):
    clock, calls = [0.0], itertools.count(0)

    def product(rows):
        price = prices[next(calls) // 2]
        if price == "no rule":
            raise RuntimeError(price)
        clock[0] += price
        return rows

    monkeypatch.setattr(hvp.time, "perf_counter", lambda: clock[0])
    assert fastest_block(product, product, torch.ones(3, 11)) == expected


def test_blocks_that_a_model_has_no_rule_for(monkeypatch):
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            return Square.apply(ctx.saved_tensors[0], g)

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, g):
            ctx.save_for_backward(x, g)
            return 3 * x**2 * g

        @staticmethod
        def backward(ctx, u):
            x, g = ctx.saved_tensors
            return 6 * x * g * u, 3 * x**2 * u

    class Model(nn.Linear):
        def forward(self, x):
            return Cube.apply(super().forward(x))

    monkeypatch.setattr(hvp, "BLOCKS_ON", ("cpu",))
    L = cl.Objective(Model(3, 2).double(), "squared_error", (torch.ones(4, 3).double(), torch.zeros(4, 2).double()))
    V = block(L.num_params)
    one = torch.stack([cl.hessian(L) @ v for v in V.T], 1)
    torch.testing.assert_close(cl.hessian(L) @ V, one, atol=1e-13, rtol=1e-12)


@cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_captured_recordings_agree_on_a_gpu(case):
    problem, reference = solved(case.name)
    L = problem.objective(chunk_size=4, device="cuda")
    for scale in (1.0, 0.9):
        found, expected = (made(L, scale * reference.w, engine)[1] for engine in ("traced", "graph"))
        assert off(found.cpu(), expected.cpu()) < 1e-12
