"""The monitor of a user's own loop, its schedules, its budget, and what it says of costs.

Compared with a reference: what it measures, with `measure` at the same weights and with `train`; thresholds under schedules
of the learning rate, with their formulas; Rayleigh quotients between two searches, with dense ones; announced products, with
those that were spent; the budget, with its bound at simulated costs. Behaviour only: messages, trackers, ranks. Loops of
eight styles are in test_loops.py; that training is the same without it, also after faults, in test_observer.py.
"""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab as cl
from curvlab import schedule
from curvlab.budget import MARGIN, Budget
from curvlab.cost import rehearse
from curvlab.diagnostics import evaluate, parse
from curvlab.measurement import Measurement
from curvlab.monitor import UPDATE_NOTE, flat
from curvlab.optimizers import stability_threshold
from curvlab.optional import require_package

X, Y = cl.problems.digits(96)[0]
TARGETS = nn.functional.one_hot(Y, 10).double()
NAMES = ["loss", "sharpness", "interaction_sharpness", "instability", "batch_gradient_cosine"]


def net(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cl.problems.mlp((64, 12, 10)).to(dtype)


def objective(model, **options):
    return cl.Objective(model, "squared_error", (X.to(next(model.parameters()).dtype), Y), **options)


def loop(model, optimizer, steps, call, *, scheduler=None, b=24):
    """The plain loop of a user; `call(step, loss)` between backward and step."""
    batches = torch.randint(len(X), (steps, b), generator=torch.Generator().manual_seed(1))
    for step, index in enumerate(batches):
        optimizer.zero_grad()
        loss = 0.5 * (model(X[index].double()) - TARGETS[index]).square().sum(1).mean()
        loss.backward()
        call(step, loss)
        optimizer.step()
        if scheduler:
            scheduler.step()


def monitored(tmp_path=None, steps=6, diagnostics=NAMES, lr=0.05, make=torch.optim.SGD, scheduler=None, **options):
    model = net()
    optimizer = make(model.parameters(), lr=lr)
    options = {"batch_size": 24, "announce": None, "run": tmp_path and tmp_path / "run"} | options
    monitor = cl.Monitor(objective(model), diagnostics, optimizer=optimizer, **options)
    found = []
    loop(model, optimizer, steps, lambda step, loss: found.append(monitor(step, batch_loss=loss)),
         scheduler=scheduler and scheduler(optimizer))  # fmt: skip
    return types.SimpleNamespace(model=model, optimizer=optimizer, monitor=monitor, found=found)


# -- what is measured --------------------------------------------------------------------------------------------------


def test_a_monitor_measures_and_logs_what_train_does(tmp_path):
    mine = monitored(tmp_path)
    model = net()
    L = objective(model)
    batches = torch.randint(len(X), (6, 24), generator=torch.Generator().manual_seed(1))
    theirs = list(
        cl.train(
            L,
            torch.optim.SGD(model.parameters(), lr=0.05),
            batches,
            diagnostics=NAMES,
            batch_size=24,
            run=tmp_path / "b",
        )
    )
    for a, b in zip(mine.found, theirs, strict=True):
        assert {n: (m.value, m.error) for n, m in a.items()} == {
            n: (m.value, m.error) for n, m in b.measurements.items()
        }
    mine.monitor.close()
    run, other = cl.Run(tmp_path / "run"), cl.Run(tmp_path / "b")
    for key in ("lr", "threshold", "batch_loss", "matvecs"):
        assert run.column(key)[1] == pytest.approx(other.column(key)[1], rel=1e-12)
    shared = set(run.config["training"]) & set(other.config["training"]) - {"threads"}
    assert len(shared) >= 10
    assert {key: run.config["training"][key] for key in shared} == {
        key: other.config["training"][key] for key in shared
    }


@pytest.mark.parametrize("where", ["before the backward pass", "after the backward pass", "after the step"])
def test_it_may_be_called_anywhere_and_knows_which_gradient_is_new(where):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = cl.Monitor(objective(model), ["sharpness", "batch_gradient_cosine"], optimizer=optimizer, announce=None)
    for step in range(4):
        if where == "before the backward pass":
            found = monitor(step)
        loss = 0.5 * (model(X.double()) - TARGETS).square().sum(1).mean()
        loss.backward()
        if where == "after the backward pass":
            found = monitor(step)
        optimizer.step()
        if where == "after the step":
            found = monitor(step)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        if step:
            cosine = found["batch_gradient_cosine"]
            assert (cosine.value is not None) == (where == "after the backward pass"), cosine
    expected = cl.measure(monitor.L, ["sharpness"])["sharpness"].value
    if where == "after the step":
        assert found["sharpness"].value == pytest.approx(expected, rel=1e-3)


def test_a_model_with_its_loss_and_data_will_do():
    model = net()
    a = cl.Monitor(model, ["sharpness"], loss="squared_error", data=(X.double(), Y), announce=None)(0)
    b = cl.Monitor(objective(model), ["sharpness"], announce=None)()
    assert a["sharpness"].value == b["sharpness"].value
    with pytest.raises(ValueError, match=r"a model needs its loss and data: Monitor\(model"):
        cl.Monitor(model, ["sharpness"])


# -- when --------------------------------------------------------------------------------------------------------------


def test_schedules():
    assert [s for s in range(10) if schedule.due(3, s)] == [0, 3, 6, 9]
    log = [s for s in range(100_001) if schedule.due("log", s)]
    assert log[:4] == [0, 1, 2, 3]
    assert all(sum(10**k <= s < 10 ** (k + 1) for s in log) == 10 for k in range(2, 5))
    assert {100, 1000, 10_000, 100_000} <= set(log)
    every = {"a": 5, "b": lambda step: step == 7}
    assert schedule.select({"a": 1, "b": 2, "c": 3}, every, 5) == {"a": 1, "c": 3}
    assert schedule.select({"a": 1, "b": 2, "c": 3}, every, 7) == {"b": 2, "c": 3}


@pytest.mark.parametrize(
    "every, message",
    [
        (0, "every is 0; expected a whole number of steps from 1, 'log', or a function"),
        (True, "every is True"),
        ("often", "every is 'often'"),
        ({"sharpness": 2.5}, "sharpness is 2.5; expected a whole number"),
        ({"sharp": 2}, "every has 'sharp', which is not measured; there are sharpness"),
    ],
)
def test_schedules_that_cannot_be(every, message):
    with pytest.raises(ValueError, match=message):
        cl.Monitor(objective(net()), ["sharpness"], every=every)


@pytest.mark.parametrize("maker", ["monitor", "train"])
def test_each_diagnostic_has_its_own_schedule(tmp_path, maker):
    every = {"sharpness": 3, "gradient_norm": "log", "hessian_trace": lambda step: step == 4}
    names = ["loss", "sharpness", "gradient_norm", "hessian_trace"]
    if maker == "monitor":
        made = monitored(tmp_path, 8, names, every=every)
        assert made.found[1].keys() == {"loss", "gradient_norm"}
    else:
        model = net()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        list(
            cl.train(objective(model), sgd, cl.Batches(96, 24, 8), diagnostics=names, every=every, run=tmp_path / "run")
        )
    run = cl.Run(tmp_path / "run")
    steps = {name: run.series(name).steps.tolist() for name in names}
    assert steps == {
        "loss": list(range(8)),
        "sharpness": [0, 3, 6],
        "gradient_norm": [0, 1, 2, 3, 4, 5, 6],
        "hessian_trace": [4],
    }
    assert run.config["training"]["every"]["gradient_norm"] == "log"
    assert "lambda" in run.config["training"]["every"]["hessian_trace"]


def test_nothing_is_touched_on_steps_without_a_measurement(monkeypatch):
    made = monitored(steps=1, every=100)
    for name in ("params", "gradient", "losses", "measuring"):
        monkeypatch.setattr(cl.Objective, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    loop(made.model, made.optimizer, 50, lambda step, loss: made.found.append(made.monitor(step + 1)))
    assert made.found[1:] == [{}] * 50


def test_the_step_of_a_call():
    made = monitored(steps=0, diagnostics=["loss"])
    assert made.monitor()
    assert made.monitor._last == 0
    assert made.monitor(0) == {}
    assert made.monitor(3)
    with pytest.raises(ValueError, match=r"step is 2 after step 3; expected increasing steps.*load_state_dict"):
        made.monitor(2)


# -- thresholds --------------------------------------------------------------------------------------------------------


def test_thresholds_follow_the_learning_rate(tmp_path):
    made = monitored(
        tmp_path, 6, ["loss"], lr=0.2, make=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.5, weight_decay=0.1),
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    )  # fmt: skip
    rates = np.array([0.2, 0.2, 0.1, 0.1, 0.05, 0.05])
    run = cl.Run(tmp_path / "run")
    assert run.column("lr")[1] == pytest.approx(rates)
    assert run.column("threshold")[1] == pytest.approx(3 / rates - 0.1)
    assert made.monitor.threshold == pytest.approx(3 / 0.025 - 0.1)
    training = run.config["training"]
    assert (training["optimizer"]["momentum"], training["optimizer"]["weight_decay"]) == (0.5, 0.1)


def test_adam_is_preconditioned_by_its_own_state():
    made = monitored(steps=5, diagnostics=["preconditioned_sharpness"], lr=1e-3, make=torch.optim.Adam)
    assert made.monitor.threshold == pytest.approx(38 / 1e-3)
    model, optimizer = made.model, made.optimizer
    found = made.monitor(5)["preconditioned_sharpness"]  # after the step: that of the step which was taken
    v = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()])
    root = ((v / (1 - 0.999**5)).sqrt() + 1e-8).sqrt()
    H = cl.dense(cl.hessian(made.monitor.L))
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(H / root[:, None] / root)[-1]), rel=1e-2)
    fresh = cl.Monitor(objective(net()), ["preconditioned_sharpness"], announce=None,
                       optimizer=torch.optim.Adam(net().parameters()))  # fmt: skip
    assert fresh(0)["preconditioned_sharpness"].value is None


def test_the_learning_rate_without_an_optimizer():
    monitor = cl.Monitor(objective(net()), ["expected_loss_difference"], lr=0.1, batch_size=8, announce=None)
    assert monitor(0)["expected_loss_difference"].value < 0
    assert monitor.threshold is None
    with pytest.raises(ValueError, match="batch_gradient_cosine needs batch_gradient"):
        cl.Monitor(objective(net()), ["batch_gradient_cosine"])


def test_the_batch_size_may_be_read_from_the_loader():
    loader = DataLoader(TensorDataset(X, Y), batch_size=24)
    assert cl.Monitor(objective(net()), ["gradient_concentration"], batch_size=loader).batch_size == 24
    odd = DataLoader(TensorDataset(X, Y), batch_sampler=torch.utils.data.BatchSampler(range(9), 3, False))
    with pytest.raises(ValueError, match="the DataLoader has no batch size of its own"):
        cl.Monitor(objective(net()), ["gradient_concentration"], batch_size=odd)


# -- logs --------------------------------------------------------------------------------------------------------------


def test_trackers_get_flat_numbers():
    class Tracker:
        def __init__(self):
            self.seen = []

        def log(self, numbers, step):
            self.seen.append((step, numbers))

    tracker, calls = Tracker(), []
    made = monitored(
        steps=2,
        diagnostics=["sharpness", ("instability", {"batch_size": [8, 24]})],
        log=[tracker, lambda n, step: calls.append(n)],
    )
    (_, first), _ = tracker.seen
    assert [step for step, _ in tracker.seen] == [0, 1]
    assert calls == [numbers for _, numbers in tracker.seen]
    found = made.found[0]
    assert first["curvlab/sharpness"] == found["sharpness"].value
    assert first["curvlab/sharpness_error"] == found["sharpness"].error
    assert first["curvlab/instability/24"] == found["instability"].select(batch_size=24).value
    assert first["curvlab/threshold"] == pytest.approx(2 / 0.05)
    assert {"curvlab/lr", "curvlab/batch_loss"} <= set(first)
    assert all(type(x) is float and math.isfinite(x) for x in first.values())
    assert flat({"a": Measurement(None, note="no"), "b": Measurement(math.nan)}) == {}


def test_a_broken_tracker_or_a_full_disk_does_not_end_training(tmp_path, monkeypatch):
    def broken(numbers, step):
        raise ConnectionError("no network")

    def full(self, record):
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="function did not take the numbers .ConnectionError: no network.") as told:
        made = monitored(steps=3, diagnostics=["loss"], log=broken)
    assert len(told) == 1
    assert all(made.found)
    monkeypatch.setattr(cl.Run, "append", full)
    with pytest.warns(UserWarning, match="cannot be written .*No space left.*; training and measuring go on") as told:
        made = monitored(tmp_path, 3, ["loss"])
    assert len(told) == 1
    assert all(made.found)


def test_a_resumed_run_logs_the_same_numbers(tmp_path):
    names = ["loss", "sharpness", "interaction_sharpness"]
    whole = monitored(tmp_path, 8, names)
    whole.monitor.close()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"optimizer": optimizer, "batch_size": 24, "announce": None, "run": tmp_path / "two"}
    monitor = cl.Monitor(objective(model), names, **options)
    batches = torch.randint(len(X), (8, 24), generator=torch.Generator().manual_seed(1))
    state = None
    step = 0
    while step < 8:
        if (
            step == 5 and state is not None and state["taken"] == 6
        ):  # killed after step 5, back to the state before step 4
            model.load_state_dict(state["model"])
            monitor.close()
            monitor = cl.Monitor(objective(model), names, resume=True, **options)
            monitor.load_state_dict(state["monitor"])
            step, state = 4, {"taken": 0}
        if step == 4 and state is None:
            torch.save({"model": model.state_dict(), "monitor": monitor.state_dict()}, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True) | {"taken": 6}
        index = batches[step]
        optimizer.zero_grad()
        loss = 0.5 * (model(X[index].double()) - TARGETS[index]).square().sum(1).mean()
        loss.backward()
        monitor(step, batch_loss=loss)
        optimizer.step()
        step += 1
    a, b = cl.Run(tmp_path / "run"), cl.Run(tmp_path / "two")
    for one, other in zip(a.records, b.records, strict=True):
        for m in (*one["measurements"].values(), *other["measurements"].values()):
            m.pop("seconds")
        assert one["measurements"] == other["measurements"]
    with pytest.raises(FileExistsError, match="already holds a run"):
        cl.Monitor(objective(model), names, **options)


def test_a_state_in_memory_is_not_touched_by_later_steps():
    made = monitored(steps=3, diagnostics=NAMES)
    state = made.monitor.state_dict()
    first = made.monitor(3)
    again = []
    for _ in range(2):
        made.monitor.load_state_dict(state)
        again.append(made.monitor(3))
    for found in again:
        assert {n: (m.value, m.error, m.df) for n, m in found.items()} == {
            n: (m.value, m.error, m.df) for n, m in first.items()
        }


def test_closing_lets_go_of_the_optimizer_and_ends_the_run(tmp_path):
    with monitored(tmp_path, 2, ["loss"]).monitor as monitor:
        optimizer = monitor.optimizer
        assert len(optimizer._optimizer_step_post_hooks) == 1
    assert not optimizer._optimizer_step_post_hooks
    assert cl.Run(tmp_path / "run").load("final") == {"step": 1, "complete": True}


def test_claims_and_figures_read_a_monitors_run(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    names = ["loss", "gradient_norm", "sharpness", "interaction_sharpness", "instability"]
    monitor = cl.Monitor(
        objective(model), names, optimizer=optimizer, batch_size=96, run=tmp_path / "run", announce=None
    )
    for _ in range(120):
        optimizer.zero_grad()
        (0.5 * (model(X.double()) - TARGETS).square().sum(1).mean()).backward()
        monitor()
        optimizer.step()
    monitor.close()
    run = cl.Run(tmp_path / "run")
    verdicts = {v.claim: v.decision for v in cl.claims.check(run)}
    assert verdicts["edge_of_stability"] != "not applicable"
    assert any(path.name == "edge_of_stability.png" for path in cl.plots.plot(run))


# -- costs and budgets -------------------------------------------------------------------------------------------------


def test_what_it_will_cost_is_said_before(capsys):
    lines = []
    made = monitored(
        steps=3, diagnostics=["sharpness", "hessian_trace"], announce=lines.append, every={"hessian_trace": 2}
    )
    assert len(lines) == 1
    assert lines[0].startswith("step 0: measuring sharpness, hessian_trace: ")
    found = made.found[0]
    for name in ("sharpness", "hessian_trace"):
        assert 1 / 1.5 <= made.monitor.costs[name].products / found[name].matvecs <= 1.5
        assert f"{name} {made.monitor.costs[name].products} products" in lines[0]
    cl.Monitor(objective(net()), ["sharpness"])(0)
    assert capsys.readouterr().err.startswith("curvlab: step 0: measuring sharpness: ")


@pytest.mark.parametrize("kind", ["mlp", "subset", *(pytest.param(k, marks=pytest.mark.slow) for k in ("conv", "chunks"))])
def test_announced_products_are_right_within_a_factor_of_a_half(kind):
    model = net()
    data = (X.double() if kind != "conv" else X.double().view(-1, 1, 8, 8), Y)
    if kind == "conv":
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)).double()
    options = {"chunk_size": 10} if kind == "chunks" else {"parameters": "0"} if kind == "subset" else {}
    if kind == "subset":
        options = {"parameters": lambda name, p: p.ndim == 2}
    L = cl.Objective(model, "cross_entropy", data, **options)
    names = ["sharpness", ("hessian_eigenvalues", {"k": 3}), "interaction_trace", "hessian_trace", "fisher_trace",
             ("hessian_density", {}), "batch_sharpness", "gradient_variance"]  # fmt: skip
    at = cl.Snapshot(L, L.params(), batch_size=12, carry={})
    told = rehearse(at, parse(names))
    found = evaluate(at, parse(names))
    assert told[""].chunks == (10 if kind == "chunks" else 1)
    for name, m in found.items():
        a, b = told[name].products, m.matvecs
        assert a == b or 1 / 1.5 <= (a + 1) / (b + 1) <= 1.5, (name, a, b)
    assert told[""].seconds > 0
    assert told[""].bytes > 2 * L.num_params * 8


@pytest.mark.parametrize("n, probes", [(40, None), (12, None), (60, 40)])
def test_the_rehearsal_of_few_examples_is_exact_where_the_measurement_is(n, probes):
    """An eighth of them would be no more than the probes, which is another way to measure, by fewer products."""
    L = cl.Objective(net(), "cross_entropy", (X[:n].double(), Y[:n]), chunk_size=8)
    plan = parse([("interaction_trace", {"probes": probes})])
    at = cl.Snapshot(L, L.params(), batch_size=4)
    told, found = rehearse(at, plan)["interaction_trace"], evaluate(at, plan)["interaction_trace"]
    assert (found.error == 0) == (n == 12)
    assert 1 / 1.25 <= told.products / found.matvecs <= 1.25


def test_a_cost_that_cannot_be_known_is_said_to_be_unknown(monkeypatch):
    lines = []
    monkeypatch.setattr("curvlab.monitor.rehearse", lambda at, plan: 1 / 0)
    assert monitored(steps=1, diagnostics=["loss"], announce=lines.append).found[0]["loss"].value > 0
    assert lines == ["step 0: measuring loss; the cost is not known (division by zero)"]


def simulate(budget, costs, step_seconds, steps, updates=()):
    """A training whose measurements cost what is stated; the steps at which each item was measured."""
    taken = {item: [] for item in costs}
    for step in range(steps):
        budget.train(step_seconds, 1)
        on = [item for item in costs if item not in updates and budget.on(item, step)]
        on += [u for u in updates if u.split(" ")[0] not in on and budget.on(u, step)]
        if on:
            budget.pay({item: costs[item] for item in on}, sum(costs[item] for item in on))
            spacing = dict.fromkeys(costs, 1.0)
            budget.plan(spacing, updates)
        for item in on:
            taken[item].append(step)
        beyond = budget.spent - budget.loan - budget.share * budget.trained
        assert beyond <= sum(costs.values())  # never more than one measurement of all
    return taken


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_the_budget_is_kept_and_used(share):
    costs = {"cheap": 0.01, "dear": 0.5, "dearer": 5.0}
    budget = Budget(share)
    taken = simulate(budget, costs, step_seconds=0.1, steps=20_000)
    assert budget.loan == 0.0
    assert budget.spent <= share * budget.trained + sum(costs.values())
    assert budget.spent >= 0.25 * MARGIN * share * budget.trained  # powers of three waste at most two thirds
    assert len(taken["cheap"]) > len(taken["dear"]) > len(taken["dearer"]) > 3
    settled = [{t for t in taken[item] if t > 10_000} for item in costs]
    assert settled[2] <= settled[1] <= settled[0]  # nested


def test_what_fits_the_budget_is_measured_whenever_it_is_due():
    taken = simulate(Budget(0.5), {"cheap": 0.01}, step_seconds=0.1, steps=100)
    assert taken["cheap"] == list(range(100))


def test_updates_fill_the_time_between():
    costs = {"sharpness": 2.0, "sharpness update": 0.05}
    budget = Budget(0.1)
    budget.seconds["sharpness update"] = 0.05
    taken = simulate(budget, costs, step_seconds=0.1, steps=5000, updates=["sharpness update"])
    assert len(taken["sharpness update"]) > 3 * len(taken["sharpness"]) > 10
    assert not set(taken["sharpness"]) & set(taken["sharpness update"])


@pytest.mark.parametrize("share", [0.0, -1.0, 2.0])
def test_budgets_that_cannot_be(share):
    with pytest.raises(ValueError, match=rf"budget is {share}; expected a share of the training time, such as 0.1"):
        Budget(share)


def test_between_two_searches_the_rayleigh_quotients_are_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(Budget, "on", lambda self, item, count: item.endswith("update") or count % 3 == 0)
    made = monitored(
        steps=6, diagnostics=["sharpness", ("hessian_eigenvalues", {"k": 3})], budget=0.1, announce=lines.append
    )
    model, optimizer = net(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    vectors = None

    def check(step, loss):
        nonlocal vectors
        L = objective(model)
        H = cl.dense(cl.hessian(L))
        found = made.found[step]["hessian_eigenvalues"]
        if step % 3 == 0:
            assert found.note is None or UPDATE_NOTE not in found.note
            assert found.value == pytest.approx(torch.linalg.eigvalsh(H).flip(0)[:3].numpy(), rel=1e-2)
            vectors = cl.eigsh(cl.hessian(L), 3, tol=1e-2)
        else:
            assert found.note.startswith(UPDATE_NOTE)
            assert made.found[step]["sharpness"].matvecs == 1
            assert found.matvecs == 3
            exact = torch.linalg.eigvalsh(H).flip(0).numpy()
            assert (found.value <= exact[:3] * (1 + 1e-12)).all()
            distances = np.abs(found.value[:, None] - exact).min(1)
            assert (distances <= found.error + 1e-12).all()

    loop(model, optimizer, 6, check)


def test_a_budget_is_kept_in_a_loop_and_said(monkeypatch):
    lines, clock = [], [0.0]
    monkeypatch.setattr("curvlab.monitor.time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    real = cl.monitor.evaluate

    def slow(at, plan):
        clock[0] += sum({"loss": 0.01, "sharpness": 1.0}[name] for name in plan) if at.search else 0.1
        return real(at, plan)

    monkeypatch.setattr("curvlab.monitor.evaluate", slow)
    model = net()
    monitor = cl.Monitor(objective(model), ["loss", "sharpness"], budget=0.1, announce=lines.append,
                         optimizer=torch.optim.SGD(model.parameters(), lr=0.01))  # fmt: skip
    measured = {"loss": 0, "sharpness": 0}
    for step in range(400):
        clock[0] += 0.5
        for name in monitor(step):
            measured[name] += 1
    assert monitor.budget.spent <= 0.1 * 200 + 1.2
    assert measured["sharpness"] < 100
    assert lines[0].startswith("step 0: measuring loss, sharpness: ")
    assert any("for a budget of 10% of the training time" in line and "sharpness every" in line for line in lines[1:])


# -- ranks and packages --------------------------------------------------------------------------------------------------


def test_other_ranks_than_the_first_measure_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("curvlab.monitor._rank", lambda: 1)
    made = monitored(tmp_path, 2)
    assert made.found == [{}, {}]
    assert not (tmp_path / "run").exists()


def test_missing_and_broken_packages_are_named(tmp_path, monkeypatch):
    with pytest.raises(ImportError, match=r"^no_such_package is not installed: pip install 'curvlab\[nothing\]'$"):
        require_package("no_such_package", "curvlab[nothing]")
    (tmp_path / "breaks.py").write_text("raise RuntimeError('operator does\\nnot exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError, match=r"^breaks does not import \(RuntimeError: operator does not exist\): install a ver"
    ):
        require_package("breaks", "curvlab")
    assert require_package("math", "curvlab") is sys.modules["math"]


def test_the_threshold_is_the_formulas():
    made = monitored(steps=1, diagnostics=["loss"], make=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9))
    assert made.monitor.threshold == stability_threshold({"name": "SGD", "momentum": 0.9}, 0.05)
