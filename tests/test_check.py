"""The check of Hessian-vector products on first use, and `verify`.

Compared with a reference: nothing here; both compare with references themselves, and are right if they pass the models of
the table and find what is planted. Only behavioural: when they run, what they leave, what they say.
"""

from __future__ import annotations

import itertools
import logging
import random
from dataclasses import replace

import pytest
import scipy.special  # noqa: F401  # whose import adds a filter of warnings
import torch
from cases import BY_NAME, CASES, classes, inputs
from test_guard import state
from torch import Tensor, nn

import curvlab as cl
from curvlab import references, self_check, verification
from curvlab.cli import main
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.measurement import Measurement
from curvlab.self_check import check_products

F64 = torch.float64


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def data(n: int = 9, width: int = 4, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return inputs(n, width).to(dtype), classes(n, 3)


def product(L: cl.Objective, **options) -> Tensor:
    return cl.hessian(L, **options) @ torch.ones(L.num_params, dtype=L.dtype)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_false_alarm_on_the_table_of_models(case, mode):
    for dtype in (F64, torch.float32):
        L = case.build(0).objective(mode=mode, dtype=dtype)
        check_products(L, L.params())
        assert L.checked == "ok"
        if case.forward_mode:
            L.outcomes.clear()
            check_products(L, L.params(), engine="forward_over_reverse")
            assert L.checked == "ok"


@pytest.mark.parametrize(
    "width, n",
    [(64, 8), (512, 8), pytest.param(512, 512, marks=pytest.mark.slow), pytest.param(2048, 8, marks=pytest.mark.slow)],
)
def test_no_false_alarm_on_wide_relu_nets(width, n):
    """In float32, where no difference in place has a usable step."""
    for depth in (2, 3):
        model = mlp(32, *[width] * depth, 3, activation=nn.ReLU, dtype=torch.float32)
        L = cl.Objective(model, "cross_entropy", data(n, 32, torch.float32))
        check_products(L, L.params())
        assert L.checked == "ok"


class Noisy(nn.Module):
    """Random by Python's own generator, once it is switched on."""

    on = False

    def forward(self, x: Tensor) -> Tensor:
        return x * (random.random() + 0.5) if self.on else x


def test_a_model_that_becomes_random_is_found():
    model = nn.Sequential(nn.Linear(4, 5), Noisy(), nn.Tanh(), nn.Linear(5, 3)).double()
    L = cl.Objective(model, "cross_entropy", data())
    model[1].on = True
    with pytest.raises(ValueError, match=r"gradient of the same examples differs.*random in mode='eval'"):
        product(L)


def test_fixed_dropout_masks_are_no_noise():
    L = cl.Objective(
        nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double(), "cross_entropy", data(), mode="train"
    )
    product(L)
    assert L.checked == "ok"


@pytest.mark.parametrize("check, times", [("first", 1), ("always", 3), ("never", 0)])
def test_when_it_runs(check, times, monkeypatch):
    seen = []
    found = self_check._verdict
    monkeypatch.setattr(self_check, "_verdict", lambda *args: seen.append(1) or found(*args))
    L = cl.Objective(mlp(4, 5, 3), "cross_entropy", data(), check=check)
    L.value(), L.gradient(), cl.measure(L, ["loss", "gradient_variance"], batch_size=2)
    assert not seen
    assert L.checked is None
    for scale in (1.0, 1.1, 1.2):
        H = cl.hessian(L, scale * L.params())
        for _ in range(3):
            H @ torch.ones(L.num_params, dtype=F64)
    assert len(seen) == times
    assert L.checked == (None if check == "never" else "ok")
    with pytest.raises(ValueError, match="check is 'sometimes'; expected 'first', 'always' or 'never'"):
        cl.Objective(mlp(4, 5, 3), "cross_entropy", data(), check="sometimes")


def test_the_trained_objective_is_checked_by_itself():
    """Its gradient differentiates the penalty's once more than the plain one."""
    L = cl.Objective(mlp(4, 5, 3), "cross_entropy", data())
    names = ["sharpness", "trained/sharpness"]
    run = cl.train(
        L, torch.optim.SGD(L.model.parameters(), lr=0.1), cl.Batches(9, 3, steps=2), diagnostics=names,
        penalties=[(0.1, "gradient_norm")],
    )  # fmt: skip
    for at in run:
        assert at.trained.objective.checked == L.checked == "ok"


class Single(nn.Module):
    """A matrix that no conversion reaches, so that the model exists in float32 alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = [torch.eye(width) * 1.1]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix[0]


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().tanh().to(x.dtype)


def single(*middle: nn.Module) -> cl.Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), *middle, nn.Linear(5, 3))
    return cl.Objective(model, "cross_entropy", data(dtype=torch.float32))


@pytest.mark.parametrize("layer", [Single(5), Rounding()], ids=["refuses", "rounds"])
def test_without_float64_differences_of_the_loss_confirm(layer):
    L = single(layer, nn.Tanh())
    product(L)
    assert L.checked == "ok: by differences of the loss in torch.float32"


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.norm(dim=1, keepdim=True).detach()


def test_without_float64_what_is_detached_is_still_found():
    L = single(Single(5), Detached())
    with pytest.warns(UserWarning, match=r"not that of the loss.*detach in 2 \(Detached\)"):
        product(L)


def test_without_float64_what_cannot_be_confirmed_is_unchecked(caplog):
    x, y = data(dtype=torch.float32)
    model = nn.Sequential(nn.Linear(4, 4), Single(4), nn.Tanh())
    L = cl.Objective(model, lambda z, y: z.square().sum(1) + 1e6, (x, y))  # in which differences drown
    with caplog.at_level(logging.WARNING, logger="curvlab"):
        product(L)
    assert L.checked.startswith("unchecked: float64 is impossible here (RuntimeError: expected m1 and m2")
    assert "second differences of the loss in torch.float32" in L.checked
    assert [record.message for record in caplog.records] == [f"Hessian-vector products are {L.checked}"]


def test_a_point_at_a_kink_is_unchecked(caplog):
    """All units are at 0, where relu has two derivatives."""
    model = mlp(4, 5, 3, activation=nn.ReLU)
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    L = cl.Objective(model, "cross_entropy", data())
    with caplog.at_level(logging.WARNING, logger="curvlab"):
        product(L)
    assert L.checked == "unchecked: the gradient jumps within 1e-6 of this point, as it does at the kinks of relu"
    assert len(caplog.records) == 1


def test_a_point_that_is_not_finite_says_nothing():
    L = cl.Objective(mlp(4, 5, 3), "cross_entropy", data())
    bad = L.params()
    bad[0] = torch.nan
    check_products(L, bad)
    assert L.checked is None
    product(L)
    assert L.checked == "ok"


def test_a_linear_loss_and_a_flat_one_pass():
    linear = cl.Objective(nn.Linear(4, 1).double(), lambda z, y: z[:, 0] * y, data())
    flat = cl.Objective(nn.Linear(4, 1).double(), lambda z, y: 0 * z[:, 0], data())
    for L in (linear, flat):
        assert float(product(L).abs().max()) == 0
        assert L.checked == "ok"


def test_examples_of_weight_zero_are_not_what_is_checked():
    weights = torch.zeros(30, dtype=F64)
    weights[20:] = 1
    broken = nn.Sequential(nn.Linear(4, 5), Detached(), nn.Linear(5, 3)).double()
    with pytest.warns(UserWarning, match="not that of the loss"):
        product(cl.Objective(broken, "cross_entropy", data(30), weights=weights))


def test_memory_is_respected(monkeypatch):
    """Fewer examples in a small budget, fewer where memory ends, and no copy in float64 that would not fit."""
    sizes, losses = [], cl.Objective.losses

    def counting(self, params, chunk):
        if self.dtype == F64:
            sizes.append(chunk.size)
            if chunk.size > limit:
                raise torch.OutOfMemoryError("no")
        return losses(self, params, chunk)

    monkeypatch.setattr(cl.Objective, "losses", counting)
    x = torch.randn(40, 50, 4)
    for graphs, limit, most in ((99, 99, 8), (99, 3, 2), (2.5, 99, 2)):  # noqa: B007
        L = cl.Objective(mlp(4, 5, 3, dtype=torch.float32), lambda z, x: z.square().sum((1, 2)), (x, x))
        L.memory = int(graphs * 8 * L.graph_bytes)  # graphs in float32 are half as large, and four may be kept
        sizes.clear()
        product(L)
        assert L.checked == "ok"
        assert sizes[-1] == most
    L.outcomes.clear()
    L.memory = 100
    sizes.clear()
    check_products(L, L.params())
    assert not sizes
    assert L.checked == "ok: by differences of the loss in torch.float32"


@pytest.mark.parametrize("broken", [False, True])
def test_it_leaves_no_trace(broken):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), Noisy(), nn.Linear(5, 3))
    model.double().train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    L = cl.Objective(model, "cross_entropy", data(), check="always")
    model[4].on = broken
    before = state(model)
    if broken:
        with pytest.raises(ValueError, match="random"):
            product(L)
    else:
        product(L)
    assert state(model) == before


@pytest.mark.parametrize("check", ["first", "always"])
def test_training_is_bit_identical(check):
    def trained(check: str) -> Tensor:
        case = BY_NAME["batch_norm"].build(0)
        case.model.train()
        torch.manual_seed(3)
        sgd = torch.optim.SGD(case.model.parameters(), lr=0.1)
        monitor = cl.Monitor(case.objective(check=check), ["sharpness"], optimizer=sgd) if check else None
        for _ in range(4):
            sgd.zero_grad()
            case.losses(case.model, case.data).mean().backward()
            if monitor:
                monitor()
            sgd.step()
        return torch.cat([t.flatten().double() for t in case.model.state_dict().values()])

    assert torch.equal(trained(check), trained(""))


# Verify


QUICK = ["loss", "sharpness", "interaction_trace", "gradient_variance", "ggn_trace", "fisher_trace", "layer_sharpness"]


def verified(case: str, **options) -> verification.Verification:
    problem = BY_NAME[case].build(0)
    return cl.verify(problem.model, problem.loss, problem.data, weights=problem.weights, show=False, **options)


def statuses(found: verification.Verification) -> dict[str, str]:
    return {row.name: row.status for row in found.rows}


def test_every_diagnostic_agrees_with_its_reference(capsys):
    problem = BY_NAME["layer_norm"].build(0)
    before = state(problem.model)
    found = cl.verify(problem.model, problem.loss, problem.data)
    assert state(problem.model) == before
    assert found.ok
    assert set(statuses(found).values()) == {"ok"}
    assert list(statuses(found)) == ["Hessian-vector products", *DIAGNOSTICS]
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert "7 of 9 examples" in printed
    assert f"{len(DIAGNOSTICS) + 1} ok" in printed
    estimated = {row.name: row.z for row in found.rows if row.z is not None}
    assert {"mean_resultant_length", "hessian_trace", "hessian_density", "batch_sharpness"} <= set(estimated)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the loss of the first examples does not depend on")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_verify_on_the_table_of_models(case):
    found = verified(case.name)
    assert found.ok
    assert set(statuses(found).values()) <= {"ok", "no value", "no reference"}


@pytest.mark.parametrize("case", ["weighted", "several_labels", "lstm", "dict_batch", "linear", "padded_embedding"])
def test_verify_quickly(case):
    found = verified(case, diagnostics=QUICK)
    assert found.ok
    hidden = {"ggn_trace", "fisher_trace"} if case == "dict_batch" else set()
    assert {name for name, status in statuses(found).items() if status != "ok"} == hidden
    assert all(row.note for row in found.rows if row.name in hidden)


def test_verify_finds_what_is_wrong(monkeypatch):
    """A wrong factor in a number, and an interval that is too narrow."""
    entries = dict(DIAGNOSTICS)
    wrong = {
        "gradient_variance": lambda at: Measurement(1.001 * float(entries["gradient_variance"].function(at).value)),
        "mean_resultant_length": lambda at, **options: replace(
            entries["mean_resultant_length"].function(at, **options), error=1e-9
        ),
    }
    for name, function in wrong.items():
        monkeypatch.setitem(DIAGNOSTICS, name, replace(entries[name], function=function))
    found = verified("layer_norm", diagnostics=["loss", *wrong])
    assert statuses(found) == {"Hessian-vector products": "ok", "loss": "ok"} | dict.fromkeys(wrong, "WRONG")
    assert not found.ok


def test_verify_names_a_function_that_is_differentiated_wrongly():
    model = nn.Sequential(nn.Linear(4, 5), Detached(), nn.Linear(5, 3))
    with pytest.warns(UserWarning, match="not that of the loss"):
        found = cl.verify(model, "cross_entropy", data(), diagnostics=["loss"], show=False)
    row = found.rows[0]
    assert row.status == "no reference"
    assert "detach in 1 (Detached)" in row.note


def test_what_has_no_reference_is_never_ok(monkeypatch):
    monkeypatch.delitem(references.DEFINITIONS, "gradient_norm")
    found = verified("layer_norm", diagnostics=["gradient_norm"])
    assert found.rows[1].status == "no reference"
    assert not verification.Verification("", found.rows[1:]).ok
    assert verified("gru", diagnostics=["test_loss"]).ok


def test_large_models_are_verified_in_part():
    L = mlp(64, 40, 3, dtype=torch.float32)
    found = cl.verify(L, "cross_entropy", data(20, 64), diagnostics=QUICK, show=False)
    assert found.ok
    assert found.problem == "7 of 20 examples, 163 of 2723 parameters (0.bias, 2.weight, 2.bias; the others are constants)"
    with pytest.raises(
        ValueError, match=r"the smallest parameter tensor, 2\.bias, has 3 numbers.*max_parameters=2; pass"
    ):
        cl.verify(L, "cross_entropy", data(20, 64), max_parameters=2, show=False)


def test_losses_that_average_keep_their_weights():
    model, (x, y) = mlp(4, 5, 3), data()
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64), ignore_index=2)
    found = cl.verify(model, criterion, (x, y), examples=99, diagnostics=QUICK, show=False)
    assert found.ok
    used = y != 2
    assert found.rows[1].ours == pytest.approx(float(criterion(model(x[used]), y[used]).detach()))


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "verify_me.py").write_text(
        "import torch\nmodel = torch.nn.Linear(3, 2)\ndata = torch.randn(9, 3), torch.arange(9) % 2\n"
    )
    monkeypatch.chdir(tmp_path)
    given = ["verify", "--model", "verify_me:model", "--data", "verify_me:data", "--diagnostics", "sharpness"]
    assert main(given) == 0
    assert "sharpness" in capsys.readouterr().out
    monkeypatch.setitem(references.DEFINITIONS, "sharpness", lambda d, b, r: d.eigenvalues[-1] + 1)
    assert main(given) == 1
    assert "WRONG" in capsys.readouterr().out
