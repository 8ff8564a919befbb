"""Every registered diagnostic on small nets in float64.

Compared with a reference: the dense definitions of `curvlab.references` (a Hessian row by row, a loop over examples, means
over all batches), of losses that are written out here, and, for the top of the spectrum and the trace, PyHessian. Only
behavioural: conformance of whatever is registered, refusals, and what is reported where no value exists.
"""

from __future__ import annotations

import dataclasses
import doctest
import itertools
import json
import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlab as cl
from curvlab import references
from curvlab.diagnostics import DIAGNOSTICS, interaction, noise, registry, spectrum, values
from curvlab.references import DEFINITIONS
from curvlab.verification import TWO_POINTS

F64 = torch.float64


LR = 0.3


class Dense(references.Dense):
    """A small net with its references, whose forward pass and losses are written out here."""

    def __init__(self, widths: tuple[int, ...], n: int, loss: str, *, seed: int = 0, weighted: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.model = cl.problems.mlp(widths, dtype=F64, seed=seed)
        x = torch.randn(n, widths[0], generator=draw, dtype=F64)
        y = torch.randint(widths[-1], (n,), generator=draw)
        test = torch.randn(5, widths[0], generator=draw, dtype=F64), torch.randint(widths[-1], (5,), generator=draw)
        weights = torch.rand(n, generator=draw, dtype=F64) + 0.1 if weighted else None
        self.loss = loss
        self.shapes = [(name, p.shape) for name, p in self.model.named_parameters()]
        L = cl.Objective(self.model, loss, (x, y), weights=weights)
        super().__init__(L, cl.Objective(self.model, loss, test), lr=LR)
        s = torch.ones(n, dtype=F64) if weights is None else weights / weights.mean()
        assert torch.allclose(self.scale, s, rtol=1e-15)

    def outputs(self, w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        parts = w.split([math.prod(shape) for _, shape in self.shapes])
        state = {name: part.view(shape) for (name, shape), part in zip(self.shapes, parts, strict=True)}
        return torch.func.functional_call(self.model, state, (batch[0],))

    def losses(self, w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        z, y = self.outputs(w, batch), batch[1]
        if self.loss == "cross_entropy":
            return torch.logsumexp(z, 1) - (z * nn.functional.one_hot(y, z.shape[1])).sum(1)
        return 0.5 * (z - nn.functional.one_hot(y, z.shape[1])).pow(2).sum(1)


ELSEWHERE = {"hessian_density"}  # a function, in a test of its own



@cache
def dense(name: str) -> Dense:
    return {
        "cross_entropy": lambda: Dense((3, 4, 3), 7, "cross_entropy"),
        "squared_error": lambda: Dense((2, 3, 2), 6, "squared_error", seed=1),
        "weighted": lambda: Dense((2, 3, 2), 6, "cross_entropy", seed=2, weighted=True),
        "one_example": lambda: Dense((3, 4, 3), 1, "cross_entropy", seed=3),
        "many_examples": lambda: Dense((3, 4, 3), 40, "cross_entropy", seed=4),
    }[name]()


def snapshot(
    d: Dense, b, *, replacement: bool = False, seed: int = 0, w: Tensor | None = None, carry: dict | None = None
) -> cl.Snapshot:
    return cl.Snapshot(
        d.L,
        d.w if w is None else w,
        step=1,
        seed=seed,
        batch_size=b,
        replacement=replacement,
        lr=LR,
        batch_gradient=d.drawn,
        preconditioner=d.divisor(),
        test=d.held_out,
        carry=carry,
    )


def step_before(d: Dense) -> dict:
    """What the snapshot of the step before leaves for the diagnostics that look back."""
    carry: dict = {}
    before = dataclasses.replace(snapshot(d, 1, w=d.w_before()), step=0, batch_gradient=d.G[0], carry=carry)
    evaluated(before, TWO_POINTS)
    return carry


def evaluated(at: cl.Snapshot, requests) -> dict[str, cl.Measurement]:
    return cl.diagnostics.evaluate(at, cl.diagnostics.parse(requests))


def tight(d: Dense, names, b, *, replacement: bool = False) -> dict[str, cl.Measurement]:
    requests = [(name, references.accurate(d).get(name, {})) for name in names]
    carry = step_before(d) if set(names) & set(TWO_POINTS) else None
    return evaluated(snapshot(d, b, replacement=replacement, carry=carry), requests)


def agree(m: cl.Measurement, truth: Tensor | float, what: str) -> None:
    """To rounding; an estimate to five standard errors."""
    truth = np.asarray(truth)
    off = np.abs(np.asarray(m.value) - truth)
    allowed = 5 * np.asarray(m.error) if m.kind == "sem" else 1e-9 * (1e-3 + np.abs(truth))
    assert np.all(off <= allowed + m.floor), f"{what}: {m.value} instead of {truth}"


def test_every_diagnostic_has_a_definition_here():
    assert set(DIAGNOSTICS) == set(DEFINITIONS) | ELSEWHERE


SIZED = [name for name, entry in DIAGNOSTICS.items() if "batch_size" in entry.needs] + ["gradient_second_moment_trace"]


def check_definition(name: str, case: str, b: int, replacement: bool) -> None:
    d = dense(case)
    m = tight(d, [name], b, replacement=replacement)[name]
    agree(m, DEFINITIONS[name](d, b, replacement), name)
    if m.kind != "sem":
        assert np.all(np.asarray(m.error) <= 1e-5 * (1 + np.abs(np.asarray(m.value))))


@pytest.mark.parametrize("case", ["cross_entropy", "squared_error", "weighted"])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_definition(name, case):
    check_definition(name, case, 1, False)


@pytest.mark.parametrize("b, replacement", [(3, False), (6, False), (1, True), (3, True)])
@pytest.mark.parametrize("case", ["cross_entropy", "weighted"])
@pytest.mark.parametrize("name", SIZED)
def test_definition_for_batches(name, case, b, replacement):
    check_definition(name, case, b, replacement)


def test_definition_of_the_density():
    """The expectation over probes of the weight of each eigenvalue is 1/P."""
    d = dense("cross_entropy")
    m = evaluated(snapshot(d, 1), [("hessian_density", {"num_probes": 100, "steps": 50})])["hessian_density"]
    grid = np.array(m.axis[1])
    assert np.all(np.abs(m.value - d.density(torch.tensor(grid)).numpy()) <= 5 * m.error + 1e-6 * m.value.max())
    assert np.trapezoid(m.value, grid) == pytest.approx(1, abs=1e-3)


# Spread over examples needs two of them, and a loss that rises in the end along its gradient.
NEEDS_TWO = {
    "critical_sharpness",
    "gradient_covariance_effective_rank",
    "example_gradient_cosine",
    "gradient_variance_top_share",
    "gradient_covariance_eigenvalues",
    "covariance_overlap",
}


@pytest.mark.parametrize("name", sorted(NEEDS_TWO))
def test_a_single_example_has_no_spread(name):
    d = dense("one_example")
    if name == "gradient_covariance_eigenvalues":
        assert evaluated(snapshot(d, 1), [(name, {"k": 1})])[name].value == pytest.approx(0, abs=1e-15)
    elif name == "covariance_overlap":
        with pytest.raises(ValueError, match=r"k is 5; expected 1 to 0"):
            evaluated(snapshot(d, 1), [name])
    else:
        m = evaluated(snapshot(d, 1), [name])[name]
        assert m.value is None
        assert m.note


@pytest.mark.parametrize("name", sorted(set(DEFINITIONS) - NEEDS_TWO))
def test_a_single_example(name):
    d = dense("one_example")
    if name in ("interaction_sharpness", "instability"):
        truth = d.g @ d.H @ d.g / (d.g @ d.g)
    elif name == "gradient_concentration":
        truth = torch.ones(())
    else:
        truth = DEFINITIONS[name](d, 1, False)
    m = tight(d, [name], 1)[name]
    agree(m, truth, name)
    probes = name in ("hessian_trace", "layer_hessian_trace") or "draws" in references.accurate(d).get(name, {})
    assert m.kind != "sem" or probes  # there the chance does not lie in batches
    for replacement_b in (1, 4):
        again = tight(d, [name], replacement_b, replacement=True)[name]
        assert np.allclose(again.value, m.value, rtol=1e-12)


def test_full_batches_without_replacement_have_no_noise():
    d = dense("many_examples")
    m = evaluated(snapshot(d, d.n), [name for name in DIAGNOSTICS if "batch_size" in DIAGNOSTICS[name].needs])
    rayleigh = float(d.g @ d.H @ d.g / (d.g @ d.g))
    assert m["interaction_sharpness"].value == pytest.approx(rayleigh, rel=1e-12)
    assert m["instability"].value == pytest.approx(rayleigh, rel=1e-12)
    assert m["interaction_trace"].value == pytest.approx(float(d.g @ d.H @ d.g), rel=1e-12)
    assert m["gradient_concentration"].value == pytest.approx(1.0, abs=1e-14)
    change = d.value(d.w - LR * d.g) - d.value(d.w)
    assert m["expected_loss_difference"].value == pytest.approx(float(change), rel=1e-10)
    assert all(one.kind != "sem" for one in m.values())


def test_full_batches_with_replacement_have_noise():
    d = dense("many_examples")
    m = tight(d, ["gradient_second_moment_trace"], d.n, replacement=True)["gradient_second_moment_trace"]
    variance = (d.G - d.g).square().sum(1).mean()
    assert m.value == pytest.approx(float(d.g @ d.g + variance / d.n), rel=1e-12)
    more = tight(d, ["gradient_second_moment_trace"], 3 * d.n, replacement=True)["gradient_second_moment_trace"]
    assert more.value == pytest.approx(float(d.g @ d.g + variance / (3 * d.n)), rel=1e-12)


@pytest.mark.parametrize("name", SIZED)
def test_a_curve_over_batch_sizes_is_the_single_values(name):
    d = dense("many_examples")
    sizes = (1, 2, 8, 40)
    curve = evaluated(snapshot(d, sizes), [name])[name]
    assert curve.axis == ("batch_size", sizes)
    for b in sizes:
        single = evaluated(snapshot(d, b), [name])[name]
        one = curve.select(batch_size=b)
        assert (one.value, one.error, one.floor) == (single.value, single.error, single.floor)
        by_option = evaluated(snapshot(d, 3), [(name, {"batch_size": b})])[name]
        assert by_option.value == single.value


def test_a_curve_costs_no_more_products_than_a_point():
    d = dense("many_examples")
    curve = evaluated(snapshot(d, (1, 2, 4, 8, 16, 32)), ["instability"])["instability"]
    point = evaluated(snapshot(d, 8), ["instability"])["instability"]
    assert curve.matvecs == point.matvecs > 0


# Relations between them


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    loss=st.sampled_from(["cross_entropy", "squared_error"]),
    n=st.integers(1, 9),
    b=st.integers(1, 9),
    replacement=st.booleans(),
    size=st.floats(0.1, 5),
)
def test_interaction_sharpness_never_exceeds_the_sharpness(seed, loss, n, b, replacement, size):
    d = Dense((2, 3, 2), n, loss, seed=seed)
    b = b if replacement else min(b, n)
    w = size * torch.randn(len(d.w), generator=torch.Generator().manual_seed(seed), dtype=F64)
    at = snapshot(d, b, replacement=replacement, w=w)
    m = evaluated(at, [("sharpness", {"tol": 1e-10}), ("interaction_sharpness", {"exact": True})])
    top, along = m["sharpness"], m["interaction_sharpness"]
    assert along.value <= top.interval()[1] + along.floor


@pytest.mark.parametrize("exact", [True, False])
def test_instability_is_interaction_sharpness_over_concentration(exact):
    options = {"exact": exact}
    names = [("instability", options), ("interaction_sharpness", options), "gradient_concentration"]
    m = evaluated(snapshot(dense("many_examples"), (1, 4, 16)), names)
    ratio = m["interaction_sharpness"].value / m["gradient_concentration"].value
    assert np.allclose(m["instability"].value, ratio, rtol=1e-12)


def test_instability_marks_where_the_quadratic_prediction_changes_sign():
    """Lee eq. 5: E[ΔL] = -lr ‖g‖² + lr²/2 tr(H S_b), which is zero at lr = 2/instability."""
    d = dense("many_examples")
    m = tight(d, ["instability", "interaction_trace"], 4)
    lr = 2 / m["instability"].value
    assert -lr * float(d.g @ d.g) + lr**2 / 2 * m["interaction_trace"].value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("b", [1, 2, 4])
def test_noise_of_a_batch_is_its_share_of_gamma(b, replacement):
    """Smith eq. 32, by enumeration: E‖g_b - ∇L‖² = (γ/b) Γ."""
    d = dense("cross_entropy")
    scatter = (d.batch_gradients(b, replacement) - d.g).square().sum(1).mean()
    gamma = 1.0 if replacement else (d.n - b) / (d.n - 1)
    m = evaluated(snapshot(d, b), ["gradient_variance"])["gradient_variance"]
    assert float(scatter) == pytest.approx(gamma / b * m.value, rel=1e-12)


def test_the_note_says_where_the_smallest_eigenvalue_is_larger_in_magnitude():
    x = torch.eye(4, dtype=F64)
    model = nn.Linear(4, 1, bias=False, dtype=F64)
    curvature = torch.tensor([-3.0, 1.0, 0.5, 0.0], dtype=F64)
    L = cl.Objective(model, lambda z, y: 2 * curvature[y] * z[:, 0] ** 2, (x, torch.arange(4)))
    m = cl.measure(L, [("sharpness", {"tol": 1e-10}), ("hessian_eigenvalues", {"k": 2})])
    assert m["sharpness"].value == pytest.approx(1.0, abs=1e-9)
    assert "the smallest eigenvalue is at most -3 and larger in magnitude" in m["sharpness"].note
    assert "larger in magnitude" in m["hessian_eigenvalues"].note


@pytest.mark.parametrize("name", ["sharpness", "hessian_eigenvalues", "gradient_alignment", "gradient_top_share"])
def test_bounds_hold_at_loose_tolerances(name):
    d = dense("many_examples")
    truth = np.asarray(DEFINITIONS[name](d, 1, False))
    for seed, tol in itertools.product(range(5), (0.3, 0.1, 0.01)):
        m = evaluated(snapshot(d, 1, seed=seed), [(name, {"tol": tol})])[name]
        low, high = m.interval()
        if name in ("sharpness", "hessian_eigenvalues"):  # to some eigenvalue, and never above the one asked for
            spectrum_of_h = d.eigenvalues.numpy()
            near = np.abs(np.atleast_1d(m.value)[:, None] - spectrum_of_h[None]).min(1)
            assert np.all(near <= np.atleast_1d(m.error) + np.atleast_1d(m.floor))
            assert np.all(m.value <= truth + m.floor)
        elif tol <= 0.01:
            assert low <= truth <= high


# From step to step


class Diagonal(nn.Module):
    """0.5 Σ c_j w_j², whose curvatures c are a buffer and can be set."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(size, dtype=F64))
        self.register_buffer("c", torch.linspace(0, 0.4, size, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (self.c * self.w**2).sum() * x


@pytest.mark.parametrize("name", ["sharpness", "hessian_eigenvalues"])
def test_an_eigenvalue_that_rises_unseen_is_found(name):
    """The tracked eigenvector stays exact while another one overtakes it, of which the gradient has no part either."""
    model = Diagonal(30)
    model.w.data[2] = 0.0
    L = cl.Objective(model, cl.batch_loss(lambda model, x: model(x)), torch.ones(2, dtype=F64))
    options = {"k": 2} if name == "hessian_eigenvalues" else {}
    model.c[0], model.c[1] = 1.0, 0.9
    carry: dict = {}
    for step in range(48):
        model.c[2] = 0.4 + 0.05 * step
        at = cl.Snapshot(L, L.params(), step=step, batch_size=1, carry=carry)
        last = evaluated(at, [(name, options)])[name]
    assert np.max(last.value) == pytest.approx(float(model.c[2]), rel=1e-2)


def test_a_slow_drift_is_tracked_with_few_products():
    model = Diagonal(200)
    L = cl.Objective(model, cl.batch_loss(lambda model, x: model(x)), torch.ones(2, dtype=F64))
    carry: dict = {}
    spent, cold = 0, 0
    for step in range(48):
        model.c[7] = 1.0 + 0.02 * step
        at = cl.Snapshot(L, L.params(), step=step, batch_size=1, carry=carry)
        m = evaluated(at, ["sharpness"])["sharpness"]
        assert m.value == pytest.approx(float(model.c[7]), rel=1e-3)
        spent, cold = spent + m.matvecs, cold or m.matvecs
    assert spent < 48 * cold / 2


# Conformance of whatever is registered


def record(m: cl.Measurement) -> dict:
    return json.loads(json.dumps(m.to_dict(), allow_nan=False))


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_conformance(name):
    d = dense("many_examples")
    carries = [step_before(d) if name in TWO_POINTS else None for _ in range(2)]
    one, two = (evaluated(snapshot(d, 4, seed=3, carry=carry), [name])[name] for carry in carries)
    assert isinstance(one, cl.Measurement)
    assert one.kind in ("exact", "bound", "sem")
    assert one.kind in (DIAGNOSTICS[name].kind, "exact")
    assert np.all(np.isfinite(one.value)) if one.value is not None else one.note
    assert np.all(np.asarray(one.error) >= 0)
    assert np.all(np.asarray(one.floor) >= 0)
    assert np.array_equal(one.value, two.value)
    assert np.array_equal(one.error, two.error)
    assert one.matvecs == two.matvecs >= 0
    low, high = one.interval()
    assert np.all(low <= one.value)
    assert np.all(one.value <= high)
    if isinstance(one.value, np.ndarray):
        assert one.axis is not None
        assert len(one.axis[1]) == len(one.value)
    entry = DIAGNOSTICS[name]
    assert entry.function.__doc__
    assert all([entry.symbol, entry.formula, entry.cost])


@pytest.mark.parametrize("name", DIAGNOSTICS)
@pytest.mark.parametrize("sizes", [4, (1, 4)])
def test_records_survive_json(name, sizes):
    m = evaluated(snapshot(dense("many_examples"), sizes), [name])[name]
    again = record(m)
    assert np.array_equal(again["value"], m.value)
    assert np.array_equal(again["error"], m.error)
    assert np.array_equal(again.get("floor", 0.0), m.floor) or not np.any(m.floor)
    assert again["kind"] == m.kind
    assert again.get("axis") == (None if m.axis is None else [m.axis[0], list(m.axis[1])])
    assert again["matvecs"] == m.matvecs


def test_no_number_depends_on_who_else_is_measured():
    d = dense("many_examples")
    forward = evaluated(snapshot(d, 4), list(DIAGNOSTICS))
    backward = evaluated(snapshot(d, 4), list(reversed(DIAGNOSTICS)))
    for name in DIAGNOSTICS:
        alone = evaluated(snapshot(d, 4), [name])[name]
        for together in (forward[name], backward[name]):
            assert np.array_equal(alone.value, together.value), name
            assert np.array_equal(alone.error, together.error), name


def test_no_number_in_a_run_depends_on_who_else_is_measured():
    def values_of(names) -> dict[str, list]:
        d = Dense((2, 3, 2), 20, "cross_entropy", seed=4)
        adam = torch.optim.Adam(d.model.parameters(), lr=0.05)
        found: dict[str, list] = {name: [] for name in names}
        for at in cl.train(d.L, adam, cl.Batches(20, 4, 6), diagnostics=names, test=d.held_out):
            for name in names:
                found[name].append(record(at.measurements[name]) | {"seconds": 0, "matvecs": 0})
        return found

    together = values_of([name for name in DIAGNOSTICS if name not in ELSEWHERE])
    assert [name for name in together if values_of([name])[name] != together[name]] == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_diverged_parameters_give_no_value_and_a_reason(name, bad):
    d = dense("squared_error")
    at = snapshot(d, (1, 2), w=torch.full_like(d.w, bad))
    if name == "batch_gradient_norm":
        at = cl.Snapshot(d.L, d.w, batch_size=1, batch_gradient=torch.full_like(d.w, bad) * 1e200)
    m = evaluated(at, [name])[name]
    assert m.value is None or np.all(np.isfinite(m.value))
    if not (name.endswith("_accuracy") or bad == 1e200):  # an argmax exists wherever outputs can be compared
        assert m.value is None
    if m.value is None:
        assert m.note
        assert record(m)["value"] is None
        with pytest.raises(ValueError, match="there is no value and so no interval: "):
            m.interval()


@pytest.mark.parametrize("name", ["train_accuracy", "test_accuracy"])
def test_accuracy_of_outputs_that_are_nan_does_not_exist(name):
    d = dense("cross_entropy")
    m = evaluated(snapshot(d, 1, w=torch.full_like(d.w, math.nan)), [name])[name]
    assert m.value is None


@pytest.mark.parametrize(
    "name, reason",
    [
        ("interaction_sharpness", "the gradient is zero"),
        ("instability", "the gradient is zero"),
        ("gradient_concentration", "the gradient of every batch is zero"),
        ("gradient_alignment", "the gradient is zero, so it has no direction"),
        ("gradient_top_share", "the gradient is zero, so it has no direction"),
    ],
)
def test_ratios_do_not_exist_where_the_gradient_is_zero(name, reason):
    model = nn.Linear(3, 1, dtype=F64)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    with torch.no_grad():
        L = cl.Objective(model, "squared_error", (x, model(x)))
    request = (name, {"k": 2}) if name == "gradient_top_share" else name
    m = cl.measure(L, [request], batch_size=2)[name]
    assert m.value is None
    assert reason in m.note


def test_accuracy_does_not_exist_without_classes():
    L = cl.Objective(nn.Linear(2, 1), "squared_error", (torch.eye(2), torch.zeros(2, 1)))
    m = cl.measure(L, ["train_accuracy"])["train_accuracy"]
    assert m.value is None
    assert "no classes" in m.note


def test_alignment_needs_two_parameters():
    L = cl.Objective(nn.Linear(1, 1, bias=False), "squared_error", (torch.ones(2, 1), torch.zeros(2, 1)))
    m = cl.measure(L, ["gradient_alignment"])["gradient_alignment"]
    assert m.value is None
    assert "needs two parameters" in m.note


# A diagnostic of the user's own


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(DIAGNOSTICS)
    yield
    DIAGNOSTICS.clear()
    DIAGNOSTICS.update(before)


@pytest.mark.usefixtures("registered")
def test_a_diagnostic_of_ones_own(tmp_path):
    @cl.diagnostic("‖w‖_p", formula="(Σ |w_j|^p)^(1/p)", kind="exact", cost="none")
    def weight_norm(at: cl.Snapshot, *, p: float = 2.0) -> cl.Measurement:
        """The p-norm of the parameters."""
        return cl.Measurement(float(at.w.norm(p)))

    d = Dense((2, 3, 2), 6, "cross_entropy")
    assert cl.measure(d.L, ["weight_norm"])["weight_norm"].value == float(d.w.norm())
    sgd = torch.optim.SGD(d.model.parameters(), lr=0.1)
    requests = [("weight_norm", {"p": 1.0}), "loss"]
    norms = [
        float(at.w.norm(1.0))
        for at in cl.train(d.L, sgd, cl.Batches(6, 2, 4), diagnostics=requests, run=tmp_path / "run")
    ]
    run = cl.Run(tmp_path / "run")
    assert run.names == ["weight_norm", "loss"]
    assert run.series("weight_norm").values.tolist() == norms
    assert ["weight_norm", {"p": 1.0}] in run.config["training"]["diagnostics"]


@pytest.mark.usefixtures("registered")
def test_names_and_needs_are_checked_when_a_diagnostic_is_registered():
    def loss(at):
        """Another loss."""

    with pytest.raises(ValueError, match=r"diagnostic loss: the name is taken"):
        cl.diagnostic("L", formula="", kind="exact", cost="")(loss)

    def new(at):
        """New."""

    with pytest.raises(ValueError, match=r"diagnostic new needs \['moon'\]; expected among \['batch_gradient', "):
        cl.diagnostic("N", formula="", kind="exact", cost="", needs=["moon", "lr"])(new)
    assert "new" not in DIAGNOSTICS


# Refusals


@pytest.mark.parametrize(
    "requests, given, message",
    [
        (["sharpnes"], {}, r"there is no diagnostic 'sharpnes'; there are .*sharpness"),
        (["loss", "loss"], {}, r"diagnostic loss is asked for twice; ask once"),
        ([("sharpness", {"tolerance": 1})], {}, r"sharpness has no option \['tolerance'\]; it has tol"),
        ([("loss", {"k": 1})], {}, r"diagnostic loss has no option \['k'\]; it has none"),
        (["instability"], {}, r"instability needs batch_size: pass batch_size=32, or a sequence"),
        (["expected_loss_difference"], {"batch_size": 2}, r"expected_loss_difference needs lr: pass lr=0.1"),
        (["test_loss"], {}, r"test_loss needs test: pass test=Objective\(model, loss, held_out_data\)"),
        (["batch_gradient_norm"], {}, r"needs batch_gradient: it exists while training: measure it with train\(\)"),
        (["instability"], {"batch_size": 7}, r"batch_size is 7; expected 1 to 6 .* pass replacement=True"),
        (["instability"], {"batch_size": 0}, r"batch_size is 0; expected 1 to 6"),
        ([("instability", {"probes": 1})], {"batch_size": 2}, r"probes is 1; an error needs at least 2 \(16 is"),
        ([("hessian_eigenvalues", {"k": 99})], {}, r"k is 99; expected 1 to 17, the size of the matrix"),
        ([("gradient_covariance_eigenvalues", {"k": 7})], {}, r"k is 7; expected 1 to 6, the largest rank"),
        ([("covariance_overlap", {"k": 6})], {}, r"k is 6; expected 1 to 5"),
        (["loss"], {"batch_size": "8"}, r"batch_size is '8'; expected a whole number such as 32, or a sequence"),
        (["loss"], {"batch_size": ()}, r"batch_size is \(\); expected a whole number"),
        (["loss"], {"batch_size": [1, 2.5]}, r"batch_size is \[1, 2.5\]; expected a whole number"),
        ([("gradient_top_share", {"k": 17})], {}, r"k is 18; expected 1 to 17, the size of the matrix"),
    ],
)
def test_measure_refuses(requests, given, message):
    with pytest.raises(ValueError, match=message):
        cl.measure(dense("squared_error").L, requests, **given)


@pytest.mark.parametrize("options", [{"target": 0.0}, {"target": -1.0}, {"target": 0.1, "budget": 15}])
def test_a_target_must_be_positive_and_the_budget_larger_than_the_pilot(options):
    with pytest.raises(ValueError, match=r"expected a relative error above 0 and at least 16 samples, which the pilot"):
        cl.measure(dense("many_examples").L, [("instability", options)], batch_size=2)


def test_requests_are_refused_before_anything_is_computed():
    d = dense("squared_error")
    with pytest.raises(ValueError, match="no diagnostic"):
        cl.measure(d.L, ["loss", "sharpnes"], w=torch.zeros(3))  # the wrong w is not even looked at
    with pytest.raises(ValueError, match=r"w has shape \(3,\); expected \(17,\), as L.params\(\) gives"):
        cl.measure(d.L, ["loss"], w=torch.zeros(3))


def test_a_diagnostic_called_directly_asks_for_its_batch_size():
    with pytest.raises(ValueError, match=r"batch_size is missing; pass batch_size=32, or a sequence of batch sizes"):
        interaction.instability(cl.Snapshot(dense("squared_error").L, dense("squared_error").w))


def test_measure_draws_its_seed_from_a_generator():
    d = dense("many_examples")
    one, two = (
        cl.measure(d.L, ["instability"], batch_size=4, generator=torch.Generator().manual_seed(s))["instability"]
        for s in (5, 6)
    )
    again = cl.measure(d.L, ["instability"], batch_size=4, generator=torch.Generator().manual_seed(5))["instability"]
    assert one.value == again.value != two.value


def test_a_single_name_is_a_request_too():
    assert list(cl.measure(dense("squared_error").L, "loss")) == ["loss"]


@pytest.mark.parametrize("module", [registry, values, noise, interaction, spectrum])
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0


# PyHessian, which averages over batches and therefore gets the data as one


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    (x, y), _ = cl.problems.digits(64)
    model = cl.problems.mlp((64, 8, 10))
    L = cl.Objective(model, "cross_entropy", (x, y))
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in cl.train(L, sgd, cl.Batches(64, 64, 40)):
        pass
    return model, x, y


def test_pyhessian_agrees(digits):
    pyhessian = pytest.importorskip("pyhessian")
    model, x, y = digits
    L = cl.Objective(model, "cross_entropy", (x, y))
    torch.manual_seed(0)
    theirs = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    top, _ = theirs.eigenvalues(maxIter=1000, tol=1e-5, top_n=2)
    samples = np.array(theirs.trace(maxIter=400, tol=0.0))
    model.zero_grad()
    ours = cl.measure(L, [("hessian_eigenvalues", {"k": 2, "tol": 1e-4})])["hessian_eigenvalues"]
    assert np.allclose(ours.value, top, rtol=1e-2)
    trace = cl.trace(cl.hessian(L), num_matvecs=128, generator=torch.Generator().manual_seed(0))
    noise_of_both = math.hypot(samples.std(ddof=1) / math.sqrt(len(samples)), trace.error)
    assert abs(samples.mean() - trace.value) <= 4 * noise_of_both
