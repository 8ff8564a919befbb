"""Interventions in the trainer: schedules, checkpoints and exact resume, the objective that is trained.

Compared with a reference: training by torch alone, runs that were not interrupted (bit by bit), and dense float64 Hessians
of penalized losses by loops of double backward. Nothing is only behavioural.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvlab as cl
from curvlab import methods
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.trained import TrainedObjective

F64 = torch.float64
N = 24  # examples


def net(*, dropout: bool = False, normalized: bool = False, dtype: torch.dtype = F64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        middle: list[nn.Module] = [nn.BatchNorm1d(6)] if normalized else []
        end: list[nn.Module] = [nn.Dropout(0.3)] if dropout else []
        return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), *end, nn.Linear(6, 3)).to(dtype)


def data(n: int = N) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    return x, torch.arange(n) % 3


def objective(model: nn.Module, loss: str = "cross_entropy") -> cl.Objective:
    return cl.Objective(model, loss, data())


# Schedules


def test_a_scheduler_is_stepped_after_the_step():
    ours, theirs = net(), net()
    sgd = torch.optim.SGD(ours.parameters(), lr=0.5, momentum=0.9)
    decay = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.8)
    rates = [at.lr for at in cl.train(objective(ours), sgd, cl.Batches(24, 24, 5), scheduler=decay)]
    assert rates == pytest.approx([0.5 * 0.8**k for k in range(5)])
    x, y = data()
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.5, momentum=0.9)
    decay = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.8)
    for _ in range(5):
        sgd.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        sgd.step()
        decay.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_scheduler_that_looks_at_the_loss_gets_it():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-9)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, factor=0.5, patience=0, threshold=0.1, eps=0)
    rates = [at.lr for at in cl.train(objective(model), sgd, cl.Batches(24, 24, 4), scheduler=plateau)]
    assert rates == [1e-9, 1e-9, 5e-10, 2.5e-10]


def test_the_threshold_is_that_of_the_optimizer_at_every_step(tmp_path):
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    decay = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.5)
    options = {"scheduler": decay, "diagnostics": ["loss", "sharpness"], "run": tmp_path / "a"}
    list(cl.train(objective(model), sgd, cl.Batches(24, 24, 3), **options))
    run = cl.Run(tmp_path / "a")
    expected = [7.6, 15.2, 30.4]
    assert run.column("threshold")[1] == pytest.approx(expected)
    lines = cl.plots.edge_of_stability(run).axes[1].lines
    drawn = {line.get_label(): line for line in lines}["threshold of SGD = 7.6 ... 30.4"]
    assert drawn.get_ydata() == pytest.approx(expected)


def test_the_effective_learning_rate_is_that_of_the_step_taken(tmp_path):
    model = net()
    L, ngd = objective(model), methods.NormalizedGD(model.parameters(), lr=0.1)
    points = [at.w for at in cl.train(L, ngd, cl.Batches(24, 24, 4), diagnostics=["gradient_norm"], run=tmp_path / "a")]
    run = cl.Run(tmp_path / "a")
    steps, rates = run.column("effective_lr")
    assert list(steps) == [0, 1, 2, 3]
    assert rates == pytest.approx(0.1 / run.series("gradient_norm").values)
    assert run.column("threshold")[1] == pytest.approx(2 / rates)
    assert [float((b - a).norm()) for a, b in pairwise(points)] == pytest.approx([0.1] * 3)


# Checkpoints and resume

NAMES = [name for name, d in DIAGNOSTICS.items() if "test" not in d.needs and "trained" not in d.needs]
EVERY_OPTIMIZER = {
    "sgd": lambda m, L: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9),
    "adam": lambda m, L: torch.optim.Adam(m.parameters(), lr=0.01),
    "iterative_grafting": lambda m, L: methods.IterativeGrafting(m.parameters(), lr=0.2),
    "anti_pgd": lambda m, L: methods.AntiPGD(m.parameters(), lr=0.2, sigma=0.01),
    "noisy_gd": lambda m, L: methods.NoisyGD(m.parameters(), lr=0.2, objective=L, batch_size=4),
}


def train(
    folder: Path, stop: int | None = None, *, steps: int = 9, optimizer: str = "sgd", resume: bool = False,
    batches: object = None, diagnostics: list = ["loss", "sharpness", "interaction_sharpness"], **kind: bool,  # noqa: B006
) -> None:  # fmt: skip
    model = net(**kind)
    L = objective(model)
    opt = EVERY_OPTIMIZER[optimizer](model, L)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 4, 0.5)
    own = cl.Batches(24, 8, steps, epochs=True) if batches is None else batches
    snapshots = cl.train(
        L, opt, own, diagnostics=diagnostics, run=folder, checkpoint_every=2, resume=resume, scheduler=scheduler,
        penalties=[(0.01, "fisher_trace")], micro_batch_size=4, trajectory=True, batch_size=8,
    )  # fmt: skip
    torch.manual_seed(11)
    np.random.seed(12)
    torch.set_num_threads(1)  # bits depend on it
    for at in snapshots:
        if stop is not None and at.step == stop:
            break


def same_runs(a: Path, b: Path) -> None:
    one, two = cl.Run(a), cl.Run(b)
    assert [strip(r) for r in one.records] == [strip(r) for r in two.records]
    ends = one.load("final"), two.load("final")
    assert torch.equal(ends[0]["params"], ends[1]["params"])
    assert ends[0]["step"] == ends[1]["step"]
    paths = one.load("trajectory"), two.load("trajectory")
    assert all(torch.equal(paths[0][key], paths[1][key]) for key in paths[0])


def strip(record: dict) -> dict:
    record = json.loads(json.dumps(record))
    record.pop("seconds")
    for measured in record["measurements"].values():
        measured.pop("seconds")
    return record


@pytest.mark.parametrize("kind", [{}, {"dropout": True}, {"normalized": True}])
@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, kind, stop):
    train(tmp_path / "whole", **kind)
    train(tmp_path / "parts", stop, **kind)
    train(tmp_path / "parts", resume=True, **kind)
    same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("optimizer", EVERY_OPTIMIZER)
def test_every_optimizer_resumes(tmp_path, optimizer):
    train(tmp_path / "whole", optimizer=optimizer)
    train(tmp_path / "parts", 6, optimizer=optimizer)
    train(tmp_path / "parts", resume=True, optimizer=optimizer)
    same_runs(tmp_path / "whole", tmp_path / "parts")


def test_every_diagnostic_resumes(tmp_path):
    asked = {"diagnostics": NAMES, "steps": 5}
    train(tmp_path / "whole", **asked)
    train(tmp_path / "parts", 3, **asked)
    train(tmp_path / "parts", resume=True, **asked)
    same_runs(tmp_path / "whole", tmp_path / "parts")


def loader() -> torch.utils.data.DataLoader:
    x, y = data()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True)


def test_a_shuffling_loader_resumes_in_its_order(tmp_path):
    train(tmp_path / "whole", batches=loader(), dropout=True)
    train(tmp_path / "parts", 3, batches=loader(), dropout=True)
    train(tmp_path / "parts", resume=True, batches=loader(), dropout=True)
    same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_ended_yields_nothing_more_and_gives_its_end(tmp_path):
    train(tmp_path / "run")
    before = (tmp_path / "run" / "measurements.jsonl").read_bytes()
    train(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "measurements.jsonl").read_bytes() == before
    model = net()
    L, sgd = objective(model), torch.optim.SGD(model.parameters(), lr=0.1)
    assert len(list(cl.train(L, sgd, cl.Batches(24, 24, 3), run=tmp_path / "b"))) == 3
    end = L.params()
    again = net()
    L, sgd = objective(again), torch.optim.SGD(again.parameters(), lr=0.1)
    assert list(cl.train(L, sgd, cl.Batches(24, 24, 3), run=tmp_path / "b", resume=True)) == []
    assert torch.equal(L.params(), end)


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path):
    train(tmp_path / "run", 3)
    before = (tmp_path / "run" / "measurements.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"made with other settings \(batches was .*'steps': 9.* and is .*'steps': 7"):
        train(tmp_path / "run", resume=True, steps=7)
    assert (tmp_path / "run" / "measurements.jsonl").read_bytes() == before


KILLED = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from test_training import train
train(Path({folder!r}), steps=400, resume={resume})
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_run_killed_at_any_instant_resumes(tmp_path):
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED.format(tests=tests, folder=str(tmp_path / "parts"), resume=True)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(tests).parent), tests])}
    for _ in range(2):
        process = subprocess.Popen(command, env=environment)
        log, grown = tmp_path / "parts" / "measurements.jsonl", 0
        size = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 60
        while grown < 30_000 and process.poll() is None and time.monotonic() < deadline:
            grown = (log.stat().st_size if log.exists() else 0) - size
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if grown:
            cl.Run(tmp_path / "parts").load("checkpoint")
    train(tmp_path / "parts", 60, steps=400, resume=True)
    train(tmp_path / "whole", 60, steps=400)
    parts, whole = (cl.Run(tmp_path / name) for name in ("parts", "whole"))
    n = min(len(parts.records), len(whole.records))
    assert n >= 20
    assert [strip(r) for r in parts.records[:n]] == [strip(r) for r in whole.records[:n]]


@pytest.mark.parametrize("given", [{"resume": True}, {"checkpoint_every": 3}, {"trajectory": True}])
def test_what_needs_a_folder_says_so(given):
    model = net()
    with pytest.raises(ValueError, match="need a folder to read and write; pass run="):
        cl.train(objective(model), torch.optim.SGD(model.parameters(), lr=0.1), cl.Batches(24, 8, 2), **given)


def test_checkpoints_come_after_whole_numbers_of_steps(tmp_path):
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="checkpoint_every is 0; expected a whole number"):
        cl.train(objective(model), sgd, cl.Batches(24, 8, 2), run=tmp_path / "a", checkpoint_every=0)


# The objective that is trained


def dense(model: nn.Module, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of a scalar by rows of double backward."""
    params = list(model.parameters())
    grads = torch.autograd.grad(value, params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.autograd.grad(e, params, retain_graph=True, materialize_grads=True) for e in flat]
    return flat.detach(), torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def penalized(model: nn.Module, strength: float, micro: int, decay: float) -> Tensor:
    """L + strength · mean_M ‖∇L_M‖² + (decay/2) ‖w‖², by a loop over micro-batches."""
    x, y = data()
    params, total = list(model.parameters()), torch.zeros((), dtype=F64)
    for lo in range(0, 24, micro):
        loss = nn.functional.cross_entropy(model(x[lo : lo + micro]), y[lo : lo + micro])
        grads = torch.autograd.grad(loss, params, create_graph=True)
        share = len(x[lo : lo + micro]) / 24
        total = total + share * (loss + strength * sum(g.square().sum() for g in grads))
    return total + decay / 2 * sum(p.square().sum() for p in params)


@pytest.mark.parametrize("micro", [5, 8, 24])
def test_the_trained_objective_has_the_hessian_of_loss_penalty_and_decay(micro):
    model = net()
    T = TrainedObjective(objective(model), [(0.3, "gradient_norm")], micro_batch_size=micro, weight_decay=0.1)
    value = penalized(model, 0.3, micro, 0.1)
    gradient, H = dense(model, value)
    assert float(T.value()) == pytest.approx(float(value.detach()), rel=1e-12)
    assert torch.allclose(T.gradient(), gradient, rtol=1e-10, atol=1e-13)
    assert torch.allclose(cl.dense(cl.hessian(T)), H, rtol=1e-9, atol=1e-12)


def test_the_trained_objective_is_measured_beside_the_loss(tmp_path):
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    asked = ["loss", "gradient_norm", "sharpness", "hessian_trace"]
    asked += [f"trained/{name}" for name in asked] + ["trained/gradient_second_moment_trace"]
    run, first = tmp_path / "run", None
    options = {"penalties": [(0.3, "gradient_norm")], "micro_batch_size": 8, "run": run}
    for at in cl.train(objective(model), sgd, cl.Batches(24, 24, 3), diagnostics=asked, **options):
        gradient, H = dense(model, penalized(model, 0.3, 8, 0.1))
        m = at.measurements
        assert m["trained/gradient_norm"].value == pytest.approx(float(gradient.norm()), rel=1e-9)
        assert m["trained/sharpness"].value == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)
        assert m["trained/loss"].value > m["loss"].value
        low, high = m["trained/hessian_trace"].interval(0.9999)
        assert low <= float(H.trace()) <= high
        assert m["trained/sharpness"].value != m["sharpness"].value
        first = first or m["trained/loss"].value
    assert cl.Run(run).series("trained/loss").values[0] == first
    assert m["trained/gradient_second_moment_trace"].kind == "exact"  # the batch is all data


def test_decoupled_decay_is_no_part_of_the_trained_objective():
    model = net()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    (at, *_) = cl.train(objective(model), adamw, cl.Batches(24, 24, 1), diagnostics=["loss", "trained/loss"])
    assert at.measurements["trained/loss"].value == at.measurements["loss"].value
    groups = [{"params": list(model[0].parameters()), "weight_decay": 0.1}, {"params": list(model[2].parameters())}]
    sgd = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match=r"weight decays \[0.0, 0.1\]; the trained objective needs one"):
        cl.train(objective(model), sgd, cl.Batches(24, 24, 1), diagnostics=["trained/loss"])


def test_what_the_trained_objective_cannot_have_is_refused():
    L = objective(net())
    T = TrainedObjective(L, [(0.1, "gradient_norm")], micro_batch_size=8)
    with pytest.raises(
        ValueError, match="per-example gradients do not exist: the penalty gradient_norm_penalty couples"
    ):
        T.example_gradients()
    with pytest.raises(TypeError, match="no function of the model's outputs alone"):
        cl.ggn(T)
    with pytest.raises(ValueError, match="sampled_gradient_norm_penalty is no mean over micro-batches"):
        TrainedObjective(L, [(0.1, "sampled_gradient_norm")])
    with pytest.raises(TypeError, match="looks at the gradient of the whole batch"):
        TrainedObjective(L, [(0.1, "implicit_regularizer_variance")])
    layer = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match="third derivatives, and PyTorch's are silently wrong through LayerNorm"):
        TrainedObjective(objective(layer), [(0.1, "gradient_norm")])
    with pytest.raises(ValueError, match="trained/loss needs trained: what is trained is known while training"):
        cl.measure(L, ["trained/loss"])


# -- the gradient that training has computed ---------------------------------------------------------------------------


def _hooked(model):
    model[0].weight.register_hook(lambda g: 0.5 * g)


def _dropping(model):
    model.insert(1, nn.Dropout(0.5))


@pytest.mark.parametrize(
    "reused, change, batch, options",
    [
        (True, lambda model: None, N, {}),
        (True, lambda model: None, N, {"micro_batch_size": 5}),
        (False, lambda model: None, 8, {}),
        (False, lambda model: None, N, {"penalties": [(0.1, "gradient_norm")]}),
        (False, _hooked, N, {}),
        (False, _dropping, N, {}),
    ],
    ids=["all data", "micro-batches", "a batch", "a penalty", "a hook", "dropout"],
)
def test_the_gradient_of_all_data_is_that_of_training_where_they_are_the_same(reused, change, batch, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    change(model)
    L = cl.Objective(model, "cross_entropy", (torch.randn(N, 3).double(), torch.arange(N) % 2), weights=torch.rand(N))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for at in cl.train(L, sgd, cl.Batches(N, batch, 3), diagnostics=["loss", "gradient_norm", "sharpness"], **options):
        assert (at.known is not None) == reused
        alone = cl.measure(L, ["loss", "gradient_norm"], w=at.w)
        for name, found in alone.items():
            assert at.measurements[name].value == pytest.approx(found.value, rel=1e-13)
        torch.testing.assert_close(at.gradient, L.gradient(at.w), rtol=1e-12, atol=1e-15)


def test_a_gradient_in_less_precision_is_not_taken():
    model = nn.Linear(3, 2)
    L = cl.Objective(model, "cross_entropy", (torch.randn(N, 3), torch.arange(N) % 2))
    steps = cl.train(L, torch.optim.SGD(model.parameters(), lr=0.1), cl.Batches(N, N, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert next(steps).known is None
    assert next(steps).known is not None
