"""Norms, products and sums of per-example gradients without forming them.

Compared with a reference: squared norms, inner products, products and combinations, with dense per-example gradients
from one backward pass an example (`cases.py`), over all cases and chunkings, and at points where a rule could be
mistaken for right.
Behaviour only: which parameters go by which rule, hooks, and what is kept in memory.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, CHUNKINGS, Reference, block, off, solved
from torch import nn

import curvlab as cl
from curvlab.hvp import HessianProducts
from curvlab.per_example import ExampleGradients


def agree(examples, rows):
    """All requests, against dense rows (N, P)."""
    (n, P), norms = rows.shape, rows.square().sum(1)
    V, C = block(P, 4), block(n, 3)
    scale = torch.linalg.norm(rows)
    assert off(examples.squared_norms(), norms) < 1e-13
    assert off(examples.dot(V), rows @ V, scale) < 1e-13
    assert off(examples.combine(C), rows.T @ C, scale) < 1e-13
    assert off(examples.gram(), rows @ rows.T) < 1e-13


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_products_and_sums(case, chunking):
    problem, reference = solved(case.name)
    examples = ExampleGradients(problem.objective(chunk_size=CHUNKINGS[chunking]), reference.w)
    agree(examples, reference.rows)
    agree(examples, reference.rows)  # now from what was kept


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rules(case):
    problem, reference = solved(case.name)
    L = problem.objective()
    examples = ExampleGradients(L, reference.w)
    assert examples.rules == {name: "layer" if name.startswith(case.layers or " ") else "vmap" for name in L.names}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_smaller_than_the_captures_changes_no_number(case):
    problem, reference = solved(case.name)
    small = ExampleGradients(problem.objective(chunk_size=4, memory=1), reference.w)
    ample = ExampleGradients(problem.objective(chunk_size=4, memory="1GiB"), reference.w)
    V, C = block(len(reference.w)), block(problem.size)
    scale = torch.linalg.norm(reference.rows)
    for _ in range(2):  # captured, then kept
        assert off(small.squared_norms(), ample.squared_norms()) < 1e-14
        assert off(small.dot(V), ample.dot(V), scale) < 1e-14
        assert off(small.combine(C), ample.combine(C), scale) < 1e-14
        assert off(small.gram(), ample.gram()) < 1e-14


def test_captures_are_kept_while_they_fit_in_a_quarter_of_the_memory():
    problem, reference = solved("mlp_tanh_cross_entropy")
    ample = problem.objective(chunk_size=4)
    calls = []
    hook = problem.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        examples = ExampleGradients(ample, reference.w)
        examples.squared_norms()
        before = len(calls)
        examples.dot(block(len(reference.w)))
        assert len(calls) == before
        rebuilt = ExampleGradients(problem.objective(chunk_size=4, memory=1), reference.w)
        rebuilt.squared_norms()
        before = len(calls)
        rebuilt.dot(block(len(reference.w)))
        assert len(calls) >= before + 3
        before = len(calls)
        rebuilt.squared_norms()  # are kept themselves
        assert len(calls) == before
    finally:
        hook.remove()


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_example_gradients_ride_on_the_pass_of_the_gradient(case, chunking):
    problem, reference = solved(case.name)
    L = problem.objective(chunk_size=CHUNKINGS[chunking])
    products = HessianProducts(L, reference.w, listens=True)
    plain = HessianProducts(L, reference.w)
    for found, expected in zip(products.value_and_gradient(), plain.value_and_gradient(), strict=True):
        assert off(found, expected) < 1e-14
    heard, own = ExampleGradients(L, reference.w, heard=products.captures), ExampleGradients(L, reference.w)
    V = block(len(reference.w))
    calls = []
    hook = problem.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        assert off(heard.squared_norms(), own.squared_norms()) < 1e-14
        assert off(heard.squared_norms(), reference.rows.square().sum(1)) < 1e-13
        own_calls = len(calls)
        if not heard._formed:
            assert own_calls == len(products.captures)  # those of `own`
        assert off(heard.dot(V), reference.rows @ V, torch.linalg.norm(reference.rows)) < 1e-13
    finally:
        hook.remove()
    assert off(products.matmat(V), plain.matmat(V)) < 1e-14


@pytest.mark.parametrize("name", ["mlp_gelu_cross_entropy", "normalized_cnn", "weighted", "sequence"])
def test_gradients_along_outputs_need_no_forward_pass_of_their_own(name):

    problem, reference = solved(name)
    L = problem.objective(chunk_size=4)
    products = HessianProducts(L, reference.w, listens=True)
    with torch.no_grad():
        outputs = torch.cat([L.outputs(L.leaves_at(reference.w), chunk) for chunk in L.chunks()])
    for seed in range(2):
        u = torch.randn(outputs.shape, dtype=outputs.dtype, generator=torch.Generator().manual_seed(seed))
        heard = ExampleGradients(L, reference.w, along=u, heard=products.captures).squared_norms()
        assert off(heard, ExampleGradients(L, reference.w, along=u).squared_norms()) < 1e-14
    assert off(products.matmat(block(L.num_params)), cl.hessian(L, reference.w) @ block(L.num_params)) < 1e-14


def test_listening_stops_where_a_quarter_of_the_memory_ends():
    problem, reference = solved("mlp_tanh_cross_entropy")
    L = problem.objective(chunk_size=3)  # three chunks
    bytes_each = HessianProducts(L, reference.w, listens=True).captures[0].nbytes
    L.memory = 8 * bytes_each
    L.__dict__["graph_bytes"] = 1.0  # all graphs are kept
    products = HessianProducts(L, reference.w, listens=True)
    assert (products.kept, len(products.captures)) == (3, 2)
    found = ExampleGradients(L, reference.w, heard=products.captures)
    assert off(found.squared_norms(), reference.rows.square().sum(1)) < 1e-13


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "dict_batch"], ids=str)
def test_gradients_of_projected_outputs(case, chunking):
    problem, reference = solved(case.name)
    z, J = reference.outputs
    along = block(*z.shape)
    examples = ExampleGradients(problem.objective(chunk_size=CHUNKINGS[chunking]), reference.w, along=along)
    agree(examples, (along[:, :, None] * J).sum(1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_formed_by_vmap_where_it_can(case):
    problem, reference = solved(case.name)
    L, backwards = problem.objective(chunk_size=100), []
    grads = L.grads
    L.grads = lambda *args, **options: backwards.append(1) or grads(*args, **options)
    assert off(L.example_gradients(reference.w), reference.rows) < 1e-13
    assert len(backwards) == (0 if case.vmap else problem.size)


def test_dropout_masks_do_not_depend_on_the_memory():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.PReLU(), nn.Linear(5, 3)).double()
    ample, small = (cl.Objective(model, "cross_entropy", (X, Y), mode="train", memory=m) for m in ("1GiB", 1))
    for L in (ample, small):
        mean = ExampleGradients(L, L.params()).combine(torch.full((9, 1), 1 / 9, dtype=torch.float64))[:, 0]
        assert off(mean, L.gradient()) < 1e-13


def test_hooks_of_the_model_are_left_alone():
    problem = BY_NAME["cnn"].build(0)
    seen = []
    handle = problem.model[0].register_forward_hook(lambda *_: seen.append(1))
    agree(ExampleGradients(problem.objective(), solved("cnn")[1].w), solved("cnn")[1].rows)
    assert seen
    for module in problem.model:
        expected = [handle.id] if module is problem.model[0] else []
        assert list(module._forward_hooks) == expected


def test_combinations_of_example_gradients_reproduce_the_gradient():
    problem, reference = solved("weighted")
    examples = ExampleGradients(problem.objective(), reference.w)
    mean = examples.combine(torch.full((problem.size, 1), 1 / problem.size, dtype=torch.float64))[:, 0]
    assert off(mean, reference.gradient) < 1e-13


def test_changing_the_model_does_not_change_its_example_gradients():
    problem, (_, reference) = BY_NAME["tied_linear"].build(0), solved("tied_linear")
    examples = ExampleGradients(problem.objective(chunk_size=4, memory=1), reference.w)
    examples.squared_norms()
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(1.0)
    agree(examples, reference.rows)


# -- where a rule could be mistaken for right ----------------------------------------------------------------------


def rows_alone(L, w):
    """Dense per-example gradients by one backward pass each."""
    return torch.cat([L.gradient(w, torch.tensor([i]))[None] for i in range(L.size)])


X, Y = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(9) % 3


class AlsoAsAFunction(nn.Module):
    """A weight that is used by its module and once more without it."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(torch.tanh(self.shared(x)), self.shared.weight)))


@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0])
def test_rules_do_not_depend_on_the_size_of_the_gradient_where_they_are_checked(size):
    """With a head of zeros, as many networks start, no gradient reaches the layers before it."""
    model = AlsoAsAFunction().double()
    with torch.no_grad():
        model.head.weight.copy_(size * block(3, 4))
    L = cl.Objective(model, "cross_entropy", (X, Y))
    w = block(L.num_params, 1)[:, 0] * 3
    assert ExampleGradients(L, L.params()).rules["shared.weight"] == "vmap"
    agree(ExampleGradients(L, w), rows_alone(L, w))


class Recursion(nn.Module):
    """A layer that is called once a position: once for the first batch, often for others."""

    def __init__(self):
        super().__init__()
        self.enter, self.again, self.gain = nn.Linear(2, 3), nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        h = torch.zeros(len(x), 3, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = torch.tanh(self.enter(x[:, t]) + self.again(h))
        return self.gain * h


@pytest.mark.parametrize("lengths", [(1, 4), (4, 1), (2, 4)])
def test_layers_that_are_called_more_often_for_other_batches(lengths):
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(5, T, 2, generator=generator).double(), Y[:5]) for T in lengths]
    L = cl.Objective(Recursion().double(), "cross_entropy", data)
    w = block(L.num_params, 1)[:, 0] * 3
    agree(ExampleGradients(L, w), rows_alone(L, w))


class Transposed(nn.Module):
    """A layer that sees positions first, and as many of them as there are examples in a chunk."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.transpose(0, 1))).mean(0))


@pytest.mark.parametrize("T", [4, 5, 9])
def test_layers_that_see_another_dimension_first(T):
    x = torch.randn(9, T, 2, generator=torch.Generator().manual_seed(0)).double()
    L = cl.Objective(Transposed().double(), "cross_entropy", (x, Y), chunk_size=T)
    w = block(L.num_params, 1)[:, 0] * 3
    agree(ExampleGradients(L, w), rows_alone(L, w))


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


def folded():
    """A linear layer on reshaped examples: two rows of each."""
    return nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1), nn.Linear(2, 3), nn.Unflatten(0, (-1, 2)), Mean())


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Branching(nn.Module):
    """Control flow that vmap refuses."""

    def __init__(self):
        super().__init__()
        self.a, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        rows = [self.scale * row if row.sum() > 0 else row - self.scale for row in self.a(x)]
        return torch.stack(rows)


def wide_convolution():
    """More channels than positions, so that norms come from Gram matrices over positions."""
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 8, 1), nn.Tanh(), nn.Conv1d(8, 9, 2, stride=2), Flat())


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3]


@pytest.mark.parametrize("model", [parametrized, folded, Branching, wide_convolution])
def test_unusual_models(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        L = cl.Objective(model().double(), "cross_entropy", (X, Y), chunk_size=4)
    rows = rows_alone(L, L.params())
    agree(ExampleGradients(L, L.params()), rows)
    assert off(L.example_gradients(), rows) < 1e-13


def test_a_point_without_gradient():
    L = cl.Objective(nn.Linear(4, 3).double(), lambda z, y: 0 * z.sum(1), (X, Y))
    examples = ExampleGradients(L, L.params())
    assert not examples.squared_norms().any()
    assert not examples.combine(block(9)).any()


def test_float32_keeps_norms_in_float64():
    reference = Reference(BY_NAME["linear"].build(0))
    problem = BY_NAME["linear"].build(0)
    L = cl.Objective(problem.model.float(), problem.loss, tuple(t.float() for t in problem.data))
    norms = ExampleGradients(L, reference.w.float()).squared_norms()
    assert norms.dtype == torch.float64
    assert off(norms, reference.rows.square().sum(1)) < 1e-6
