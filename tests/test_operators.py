"""Matrices of an objective.

Compared with a reference: products with the Hessian (every engine), the GGN, S_b and C_b, with the dense matrices of
`cases.py`, over all cases and chunkings; those references with finite differences; S_b and C_b also with averages over
every possible batch. Behaviour only: what later changes of the model do to an operator, which graphs are kept, what is
refused, and which file may import which.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
from pathlib import Path

import pytest
import torch
from cases import BY_NAME, CASES, CHUNKINGS, EAGER, Reference, block, cast, off, pick, solved
from torch import nn

import curvlab as cl
from curvlab.hvp import HessianProducts
from curvlab.operators import noise_share
from curvlab.per_example import ExampleGradients

PACKAGE = Path(cl.__file__).parent
WITH_OUTPUTS = [case for case in CASES if case.name != "dict_batch"]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_chunking = pytest.mark.parametrize("chunking", CHUNKINGS)

OPERATORS = {
    **{f"hessian_{engine}": lambda L, w, engine=engine: cl.hessian(L, w, engine=engine) for engine in EAGER},
    "ggn": cl.ggn,
    "fisher": cl.fisher,
    "second_moment": lambda L, w: cl.gradient_second_moment(L, w, batch_size=3),
    "covariance": lambda L, w: cl.gradient_covariance(L, w, batch_size=3),
}


def runs(case, name):
    """Whether an operator of this name exists for the case: the GGN needs outputs."""
    return case in WITH_OUTPUTS or name not in ("ggn", "fisher")


def norm(A):
    return torch.linalg.norm(A, 2)


# -- the references themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layer_norm", "scaled_dot_product_attention"])
def test_dense_hessian_is_the_finite_difference_of_the_gradient(name):
    _, reference = solved(name)
    h = 1e-5
    steps = h * torch.eye(len(reference.w), dtype=torch.float64)
    columns = [
        (reference._gradient(reference.mean, reference.w + e) - reference._gradient(reference.mean, reference.w - e))
        for e in steps
    ]
    assert off(torch.stack(columns, 1) / (2 * h), reference.hessian) < 1e-8


@pytest.mark.parametrize("case", [case for case in CASES if case.forward_mode], ids=str)
def test_two_ways_to_a_dense_hessian_agree(case):
    _, reference = solved(case.name)
    assert off(reference.hessian_double_backward(), reference.hessian) < 1e-14


# -- products over all cases and chunkings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, engine, chunking",
    [
        pytest.param(
            *row, id="-".join(map(str, row)), marks=() if {"graph", "uneven"} & {*row[1:]} else pytest.mark.slow
        )
        for row in itertools.product(CASES, EAGER, CHUNKINGS)
        if runs(*row[:2])
    ],
)
def test_hessian(case, engine, chunking):
    problem, reference = solved(case.name)
    H = cl.hessian(problem.objective(chunk_size=CHUNKINGS[chunking]), reference.w, engine=engine)
    V = block(H.size)
    assert off(H @ V, reference.hessian @ V, norm(reference.hessian)) < 1e-13


@each_chunking
@pytest.mark.parametrize("case", WITH_OUTPUTS, ids=str)
def test_ggn_and_fisher(case, chunking):
    problem, reference = solved(case.name)
    L = problem.objective(chunk_size=CHUNKINGS[chunking])
    V = block(L.num_params)
    assert off(cl.ggn(L, reference.w) @ V, reference.ggn @ V, norm(reference.ggn)) < 1e-13
    if chunking != "uneven":
        return
    assert off(cl.fisher(L, reference.w) @ V, reference.ggn @ V, norm(reference.ggn)) < 1e-13
    plain = reference.gauss_newton(lambda z: torch.eye(len(z), dtype=z.dtype))
    assert off(cl.ggn(L, reference.w, output_hessian="identity") @ V, plain @ V, norm(plain)) < 1e-13


@each_chunking
@each_case
def test_second_moment_and_covariance(case, chunking):
    problem, reference = solved(case.name)
    L = problem.objective(chunk_size=CHUNKINGS[chunking])
    examples = ExampleGradients(L, reference.w)
    V, scale = block(L.num_params), norm(reference.second_moment)
    for b, replacement in itertools.product((1, 3, L.size), (False, True)):
        options = {"batch_size": b, "replacement": replacement, "examples": examples}
        S_b, C_b = reference.moment(b, replacement)
        assert off(cl.gradient_second_moment(L, reference.w, **options) @ V, S_b @ V, scale) < 1e-13
        assert off(cl.gradient_covariance(L, reference.w, **options) @ V, C_b @ V, scale) < 1e-13


@each_case
def test_operators_are_linear_and_symmetric(case):
    problem, reference = solved(case.name)
    L = problem.objective()
    for name in filter(lambda name: runs(case, name), OPERATORS):
        linear_and_symmetric(OPERATORS[name](L, reference.w))


def linear_and_symmetric(A):
    V = block(A.size, 2)
    AV = A @ V
    scale = float(AV.norm())
    assert off(V.T @ AV, (V.T @ AV).T, scale) < 1e-13
    assert off(A @ (V[:, 0] - 3 * V[:, 1]), AV[:, 0] - 3 * AV[:, 1], scale) < 1e-13


@each_case
def test_float32_agrees_with_float64(case):
    _, reference = solved(case.name)
    problem = case.build(0)
    model, data, w = problem.model.float(), cast(problem.data, torch.float32), reference.w.float()
    L = cl.Objective(model, problem.loss, data, weights=problem.weights)
    V = block(L.num_params)
    found = {"hessian": cl.hessian(L, w), "second_moment": cl.gradient_second_moment(L, w, batch_size=1)}
    if case in WITH_OUTPUTS:
        found["ggn"] = cl.ggn(L, w)
    for name, A in found.items():
        expected = getattr(reference, name)
        product = A @ V.float()
        assert product.dtype == torch.float32
        assert off(product, expected @ V, norm(expected)) < 1e-5, name


def test_a_float32_model_can_be_measured_in_float64():
    problem, reference = BY_NAME["batch_norm"].build(0), solved("batch_norm")[1]
    L = cl.Objective(problem.model.float(), problem.loss, cast(problem.data, torch.float32), dtype=torch.float64)
    V = block(L.num_params)
    assert off(cl.hessian(L, reference.w) @ V, reference.hessian @ V, norm(reference.hessian)) < 1e-13


# -- theorems ------------------------------------------------------------------------------------------------------


def test_ggn_is_the_hessian_of_a_linear_model_with_squared_error():
    linear = [case for case in CASES if case.linear]
    assert linear
    for case in linear:
        L = solved(case.name)[0].objective()
        H = cl.dense(cl.hessian(L))
        assert off(cl.dense(cl.ggn(L)), H) < 1e-14


@pytest.mark.parametrize("case", [case for case in CASES if case.piecewise_linear], ids=str)
def test_hessian_and_ggn_of_piecewise_linear_nets_have_the_same_trace(case):
    problem, reference = solved(case.name)
    L = problem.objective()
    H, G = cl.dense(cl.hessian(L, reference.w)), cl.dense(cl.ggn(L, reference.w))
    assert abs(float(H.trace() - G.trace())) < 1e-13 * float(G.trace())
    assert case.linear or off(H, G) > 1e-3  # the traces agree, the matrices do not


@pytest.mark.parametrize("name", ["mlp_tanh_cross_entropy", "several_labels", "weighted"])
def test_fisher_is_an_average_over_all_labels_of_the_model(name):
    problem, reference = solved(name)
    (x, y), w = problem.data, reference.w
    z, loss = reference.outputs[0], problem.loss
    if loss == "cross_entropy":
        labels = [(z.softmax(1)[:, c], torch.full((len(x),), c)) for c in range(z.shape[1])]
    else:
        several = [torch.tensor(bits).expand_as(y) for bits in itertools.product((0, 1), repeat=y.shape[1])]
        labels = [(torch.where(bits == 1, z.sigmoid(), 1 - z.sigmoid()).prod(1), bits) for bits in several]
    assert off(sum(p for p, _ in labels), torch.ones(len(x), dtype=z.dtype)) < 1e-14
    fisher = torch.zeros(len(w), len(w), dtype=z.dtype)
    for p, label in labels:
        rows = cl.Objective(problem.model, loss, (x, label)).example_gradients(w)
        fisher += (reference.scale[:, None] * p[:, None] * rows).T @ rows / len(x)
    L = problem.objective()
    assert off(cl.dense(cl.fisher(L, w)), fisher) < 1e-13
    assert off(cl.dense(cl.ggn(L, w)), fisher) < 1e-13


def test_products_of_a_batch_are_those_of_its_own_loss():
    problem, reference = solved("mlp_gelu_cross_entropy")
    index = torch.tensor([3, 0, 3, 7, 5])
    own = cl.Objective(problem.model, problem.loss, pick(problem.data, index))
    V, found = block(own.num_params), []
    for engine, chunk_size in itertools.product(EAGER, (None, 2)):
        L = problem.objective(chunk_size=chunk_size)
        products = HessianProducts(L, reference.w, engine=engine, batch=index)
        value, gradient = products.value_and_gradient()
        found.append((products.matmat(V), gradient, value[None]))
    expected = cl.hessian(own, reference.w) @ V, own.gradient(reference.w), own.value(reference.w)[None]
    assert all(off(a, b) < 1e-13 for one in found for a, b in zip(one, expected, strict=True))


@pytest.mark.parametrize("name", ["mlp_tanh_cross_entropy", "weighted"])
def test_ggn_second_moment_and_covariance_are_positive_semidefinite(name):
    problem, reference = solved(name)
    L = problem.objective()
    for A in (
        cl.ggn(L, reference.w),
        cl.gradient_second_moment(L, reference.w, batch_size=2),
        cl.gradient_covariance(L, reference.w, batch_size=2),
    ):
        eigenvalues = torch.linalg.eigvalsh(cl.dense(A))
        assert eigenvalues[0] > -1e-14 * eigenvalues[-1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("b", [1, 2, 5])
def test_moments_are_averages_over_every_possible_batch(b, replacement, weighted):
    n = 5
    problem, _ = solved("mlp_tanh_squared_error")
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64) if weighted else None
    L = cl.Objective(nn.Linear(4, 3).double(), "cross_entropy", pick(problem.data, slice(n)), weights=weights)
    w = block(L.num_params, 1)[:, 0]
    rows = L.example_gradients(w)
    batches = itertools.product(range(n), repeat=b) if replacement else itertools.combinations(range(n), b)
    g_b = torch.stack([rows[list(batch)].mean(0) for batch in batches])
    S, g = g_b.T @ g_b / len(g_b), rows.mean(0)
    C = (g_b - g).T @ (g_b - g) / len(g_b)
    options = {"batch_size": b, "replacement": replacement}
    assert off(cl.dense(cl.gradient_second_moment(L, w, **options)), S) < 1e-13
    assert off(cl.dense(cl.gradient_covariance(L, w, **options)), C, norm(S)) < 1e-13
    # S_b = γ/b S_1 + (1 - γ/b) S_n
    share = noise_share(n, b, replacement)
    S_1, S_n = (cl.dense(cl.gradient_second_moment(L, w, batch_size=size)) for size in (1, n))
    assert off(share * S_1 + (1 - share) * S_n, S) < 1e-13
    assert off(S_n, torch.outer(g, g)) < 1e-13


def test_noise_share_at_its_limits():
    assert noise_share(7, 1) == noise_share(7, 1, True) == 1.0
    assert noise_share(7, 7) == 0.0
    assert noise_share(1, 1) == noise_share(1, 5, True) == 0.0
    assert noise_share(7, 14, True) == 1 / 14


# -- behaviour -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_changing_the_model_does_not_change_an_operator(name):
    problem = BY_NAME["mlp_gelu_cross_entropy"].build(0)
    L = problem.objective(chunk_size=4)
    A, v = OPERATORS[name](L, None), block(L.num_params)
    before = A @ v
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(1.0)
    assert torch.equal(A @ v, before)
    assert not torch.equal(OPERATORS[name](L, None) @ v, before)


@pytest.mark.parametrize("name", OPERATORS)
def test_changing_the_vector_does_not_change_an_operator(name):
    problem, reference = solved("mlp_gelu_cross_entropy")
    L, w = problem.objective(), reference.w.clone()
    A, v = OPERATORS[name](L, w), block(L.num_params)
    before = A @ v
    w.zero_()
    assert torch.equal(A @ v, before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_work_where_gradients_are_off(name, context):
    problem, reference = solved("mlp_gelu_cross_entropy")
    with context():
        L = problem.objective()
        A = OPERATORS[name](L, reference.w.clone())
        V = block(A.size)
        product = A @ V
    assert torch.equal(product, OPERATORS[name](problem.objective(), reference.w) @ V.clone())


def test_graphs_that_do_not_fit_in_memory_are_rebuilt():
    problem, reference = solved("layer_norm")
    L = problem.objective(chunk_size=4)
    V, one = block(L.num_params), L.graph_bytes * 4
    found = []
    for memory, kept in ((100 * one, 3), (4.5 * one, 2), (one, 0)):
        products = HessianProducts(problem.objective(chunk_size=4, memory=int(memory)), reference.w)
        assert (products.kept, len(products.chunks)) == (kept, 3)
        value, gradient = products.value_and_gradient()
        found.append((products.matmat(V), value, gradient))
        assert abs(float(value) - reference.value) < 1e-14
        assert off(gradient, reference.gradient) < 1e-13
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_ggn_graphs_that_do_not_fit_in_memory_are_rebuilt():
    problem, reference = solved("layer_norm")
    ample, none = (problem.objective(chunk_size=4, memory=memory) for memory in ("1GiB", 1))
    V = block(ample.num_params)
    assert torch.equal(cl.ggn(ample, reference.w) @ V, cl.ggn(none, reference.w) @ V)


def test_losses_linear_in_the_parameters_or_the_outputs_have_no_curvature():
    x, y = solved("linear")[0].data
    model = nn.Linear(5, 2).double()
    L = cl.Objective(model, lambda outputs, targets: (outputs * targets).sum(1), (x, y))
    V = block(L.num_params)
    for engine in EAGER:
        assert not (cl.hessian(L, engine=engine) @ V).any()
    assert not (cl.ggn(L) @ V).any()


def test_an_operator_without_a_point_is_at_the_parameters_of_the_model():
    problem, _ = solved("mlp_gelu_cross_entropy")
    L = problem.objective()
    reference = Reference(problem, perturb=0.0)
    v = block(L.num_params)
    assert off(cl.hessian(L) @ v, reference.hessian @ v, norm(reference.hessian)) < 1e-13
    assert off(cl.ggn(L) @ v, reference.ggn @ v, norm(reference.ggn)) < 1e-13


@pytest.mark.parametrize("name", OPERATORS)
def test_a_point_of_another_length_is_refused_when_the_operator_is_made(name):
    with pytest.raises(ValueError, match=r"w has shape \(3,\); expected \(73,\)"):
        OPERATORS[name](solved("mlp_tanh_cross_entropy")[0].objective(), torch.zeros(3))


# -- the package as a whole ----------------------------------------------------------------------------------------

# As in DESIGN.md, lowest first: a file imports only from lower layers, or from its own folder.
LAYERS = (
    {"measurement", "memory", "cross_entropy", "guard", "layers", "linearize", "optional", "replay", "schedule"},
    {"derivatives", "timing", "unwrap", "ranks", "sharded", "files"},
    {"losses", "batches"},
    {"linalg"},
    {"checks"},
    {"objective"},
    {"capture"},
    {"gradient_graph", "per_example", "optimizers", "origins"},
    {"self_check"},
    {"hvp"},
    {"operators"},
    {"snapshot", "runs", "regularizers", "budget", "throughput"},
    {"tables"},
    {"diagnostics", "batch_gradient", "methods", "landscape"},
    {"point", "references", "flow", "cost"},
    {"verification"},
    {"trained"},
    {"monitor"},
    {"trainer"},
    {"claims", "problems", "integrations", "compat"},
    {"plots"},
    {"report"},
    {"sweep", "planning"},
    {"command_line"},
    {"docs"},
    {"cli"},
    {"__main__"},
)
HEIGHT = {unit: height for height, units in enumerate(LAYERS) for unit in units}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported_units(file):
    """The files or folders directly under the package that a source file imports, types aside."""

    def statements(node):
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
                yield child
                yield from statements(child)

    depth = len(file.relative_to(PACKAGE).parts)
    for node in statements(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level == depth or (node.module or "").startswith("curvlab")):
            path = (node.module or "").removeprefix("curvlab").strip(".")
            yield from [path.split(".")[0]] if path else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("curvlab.")]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file):
    if file == PACKAGE / "__init__.py":
        assert not list(imported_units(file))  # it loads names on first use
        return
    unit = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    unplaced = {unit, *imported_units(file)} - set(HEIGHT)
    assert not unplaced, f"give {unplaced} a place in LAYERS"
    above = [other for other in imported_units(file) if other != unit and HEIGHT[other] >= HEIGHT[unit]]
    assert not above, f"{unit} may not import {above}"


def test_the_layer_test_sees_imports():
    below = {"checks", "batches", "derivatives", "guard", "linalg", "losses", "memory", "ranks", "sharded", "unwrap"}
    assert set(imported_units(PACKAGE / "objective.py")) == below
    assert {"linalg", "operators", "snapshot"} <= set(imported_units(PACKAGE / "diagnostics" / "interaction.py"))


def test_nothing_uses_functorch():
    assert not [str(file) for file in SOURCES if "functorch" in file.read_text()]
