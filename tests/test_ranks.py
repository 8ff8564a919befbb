"""Several processes, each with a part of the data, measure and train as one does.

Compared with a reference: operators, example gradients and every diagnostic on 3 gloo ranks, with unequal parts and with an
empty one, and trainings on 2, against one process in float64. Behaviour only: what ranks refuse, a rank that dies, and one
that hangs.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import curvlab as cl
from curvlab import checks
from curvlab import ranks as ranks_module
from curvlab.cli import main
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.per_example import ExampleGradients
from curvlab.ranks import Ranks, RanksLost

F64 = torch.float64
CLOSE = 1e-12
TIMEOUT = 2  # seconds
MICRO_BATCHES = {*cl.regularizers.REGULARIZERS, "microbatch_gradient_norm"}


def problem(n: int, group=None, **options) -> tuple[cl.Objective, cl.Objective]:
    """A small convolutional net with n examples, and held-out ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 3)).double()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 1, 6, generator=generator, dtype=F64), torch.arange(n) % 3
    test = cl.Objective(model, "cross_entropy", (x.flip(0), y), group=group)
    return cl.Objective(model, "cross_entropy", (x, y), group=group, **options), test


def operators(n: int, group=None) -> dict[str, Tensor]:
    """What one asks of an objective."""
    L, _ = problem(n, group, chunk_size=2)
    w = 1.1 * L.params()
    V = torch.randn(L.num_params, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    E, some = ExampleGradients(L, w), torch.tensor([n - 1, 0, n // 2])
    weighted, _ = problem(n, group, weights=torch.arange(1.0, n + 1))
    return {
        "value": L.value(w),
        "gradient": L.gradient(w),
        "batch": L.gradient(w, some),
        "weighted": weighted.gradient(w),
        "accuracy": L.accuracy(w),
        "H": cl.hessian(L, w) @ V,
        "double backward": cl.hessian(L, w, engine="double_backward") @ V,
        "differences": cl.hessian(L, w, engine="differences") @ V,
        "G": cl.ggn(L, w) @ V,
        "S": cl.gradient_second_moment(L, w, batch_size=2) @ V,
        "C": cl.gradient_covariance(L, w, batch_size=1) @ V,
        "norms": E.squared_norms(),
        "gram": E.gram(),
        "rows": L.example_gradients(w),
        "eigenvalues": cl.eigsh(cl.hessian(L, w), 3, tol=1e-8).values,
    }


def measured(n: int, group=None) -> dict[str, Tensor]:
    """Every diagnostic, at a point and in a training."""
    L, test = problem(n, group)
    names = [name for name, d in DIAGNOSTICS.items() if "trained" not in d.needs and name not in MICRO_BATCHES]
    found = {}
    sgd = torch.optim.SGD(L.model.parameters(), lr=0.05)
    for at in cl.train(L, sgd, cl.Batches(L.size, 4, 2), diagnostics=names, test=test):
        for name, m in at.measurements.items():
            if m.value is not None:
                found[f"{name} {at.step}"] = torch.as_tensor(np.atleast_1d(np.asarray(m.value, dtype=float)))
                found[f"{name} {at.step} ±"] = torch.as_tensor(np.atleast_1d(np.asarray(m.error, dtype=float)))
    found["w"] = L.params()
    return found


def work(rank: int, count: int, folder: str, n: int) -> None:
    """One rank: everything, saved."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    found = {**operators(n, "world"), **measured(n, "world")}
    found |= {f"few {name}": value for name, value in operators(count - 1, "world").items()}  # the last rank has none
    wrapped = DistributedDataParallel(problem(n)[0].model)
    L = cl.Objective(wrapped, "cross_entropy", problem(n)[0].examples.batches, group="world")
    found["wrapped"] = cl.hessian(L) @ torch.ones(L.num_params, dtype=F64)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder, count, n = str(tmp_path_factory.mktemp("ranks")), 3, 11
    together(work, count, count, folder, n)
    return n, [torch.load(f"{folder}/{rank}.pt") for rank in range(count)]


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) >= set(expected)
    for name, value in expected.items():
        small = name.endswith(("±", "differences")) or "difference_sharpness" in name  # differences, as residuals are
        close = 1e-9 if small else CLOSE
        torch.testing.assert_close(
            found[name], value, atol=close, rtol=close, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_operators_are_those_of_one_process(ranks):
    n, found = ranks
    assert_alike(found[0], operators(n))
    assert_alike(found[0], {f"few {name}": value for name, value in operators(2).items()})
    L = problem(n)[0]
    assert_alike(found[0], {"wrapped": cl.hessian(L) @ torch.ones(L.num_params, dtype=F64)})


def test_every_diagnostic_is_that_of_one_process(ranks):
    n, found = ranks
    assert_alike(found[0], measured(n))


def test_all_ranks_have_the_same_bits(ranks):
    _, (zero, *others) = ranks
    for other in others:
        for name, value in zero.items():
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(other[name])), name


def trained(folder: str, group=None) -> Tensor:
    """A training that logs, checkpoints, and goes on from its checkpoint."""
    L, test = problem(12, group)
    L.model[3].weight.data.mul_(1.5)
    adam = torch.optim.Adam(L.model.parameters(), lr=0.01)
    options = {"diagnostics": ["sharpness", "interaction_trace"], "test": test, "run": folder, "checkpoint_every": 2}
    for at in cl.train(L, adam, cl.Batches(12, 5, 6), **options):
        if at.step == 3:
            break
    L, test = problem(12, group)  # at other weights: the checkpoint has them
    adam = torch.optim.Adam(L.model.parameters(), lr=0.01)
    for _ in cl.train(L, adam, cl.Batches(12, 5, 6), resume=True, **{**options, "test": test}):
        pass
    return L.params()


def lost(rank: int, folder: str) -> None:
    """Two ranks, of which one dies in the third step."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(trained(f"{folder}/run", "world"), f"{folder}/{rank}.pt")
    L, _ = problem(12, "world")
    sgd = torch.optim.SGD(L.model.parameters(), lr=0.01)
    try:
        for at in cl.train(L, sgd, cl.Batches(12, 5, 6), diagnostics=["sharpness"], run=f"{folder}/lost"):
            if rank == 1 and at.step == 2:
                os._exit(0)
    except RanksLost as error:
        torch.save(str(error), f"{folder}/lost.pt")
    os._exit(0)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("two"))
    together(lost, 2, folder)
    return folder


def test_a_run_of_two_ranks_is_that_of_one(two, tmp_path):
    expected = trained(str(tmp_path / "run"))
    found = [torch.load(f"{two}/{rank}.pt") for rank in range(2)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], expected, atol=CLOSE, rtol=CLOSE)
    here, there = cl.Run(tmp_path / "run"), cl.Run(f"{two}/run")
    assert len(there.records) == len(here.records) == 6
    for name in ("sharpness", "interaction_trace"):
        np.testing.assert_allclose(there.series(name).values, here.series(name).values, rtol=1e-11)


def test_a_rank_that_dies_ends_the_others_with_one_message_and_a_readable_run(two):
    found = torch.load(f"{two}/lost.pt")
    assert found.startswith("rank 0 of 2 got no answer from the others (")
    assert "): one of them has died. Its own output says why; what was logged is readable" in found
    assert len(cl.Run(f"{two}/lost").records) == 3


def hung(rank: int, folder: str) -> None:
    """Two ranks of a loop of one's own, of which one sleeps in the midst of the third measurement."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT))
    L, _ = problem(12, "world")
    adam = torch.optim.Adam(L.model.parameters(), lr=0.01)
    monitor = cl.Monitor(L, ["gradient_variance", "sharpness"], run=f"{folder}/run", optimizer=adam, announce=None)
    for step in range(4):
        adam.zero_grad()
        L.live_losses((torch.randn(4, 1, 6, dtype=F64), torch.arange(4) % 3)).mean().backward()
        if rank == 1 and step == 2:
            Ranks.sum = lambda *_: time.sleep(60)
        before = training_state(L.model, adam)
        started = time.monotonic()
        try:
            monitor(step)
        except RanksLost as error:
            same = all(map(torch.equal, before, training_state(L.model, adam)))
            torch.save((str(error), step, time.monotonic() - started, same), f"{folder}/hung.pt")
            os._exit(0)
        adam.step()


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of weights, gradients, what the optimizer keeps, and the random state."""
    kept = [value for state in optimizer.state.values() for value in state.values()]
    parameters = list(model.parameters())
    return [t.detach().clone() for t in (*parameters, *(p.grad for p in parameters), *kept, torch.get_rng_state())]


def test_a_rank_that_hangs_ends_the_others_after_the_timeout_and_leaves_training_as_it_was(tmp_path):
    context = together(hung, 2, str(tmp_path), join=False)
    try:
        context.processes[0].join(60)
        message, step, seconds, same = torch.load(tmp_path / "hung.pt")
    finally:
        context.processes[1].kill()
    assert message.startswith("rank 0 of 2 got no answer from the others (Timed out waiting")
    assert "): one of them hangs, or is slower than the timeout of the process group, which is that of" in message
    assert "\n" not in message
    assert (step, same) == (2, True)
    assert TIMEOUT <= seconds < TIMEOUT + 20
    assert [record["step"] for record in cl.Run(tmp_path / "run").records] == [0, 1]


def test_the_timeout_is_an_option_of_run(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(ranks_module, "started", lambda timeout: asked.append(timeout) or nullcontext(Ranks()))
    options = ["--steps", "1", "--n", "8", "--hidden", "2", "--diagnostics", "loss", "--out", str(tmp_path / "run")]
    assert main(["run", *options, "--timeout", "5"]) == 0
    assert asked == [5.0]


def test_what_one_process_alone_can_do_is_refused(monkeypatch):
    L, _ = problem(6)
    monkeypatch.setattr(L.ranks, "count", 2)
    with pytest.raises(ValueError, match=r"micro-batches of a penalty need all data in one process, and 2 ranks hold parts"):
        cl.measure(L, ["gradient_norm_penalty"], batch_size=2)
    with pytest.raises(ValueError, match=r"measurements within a budget of time need all data in one process"):
        cl.Monitor(L, ["loss"], budget=0.1)


def test_what_depends_on_how_data_are_divided_is_refused(monkeypatch):
    monkeypatch.setattr(Ranks, "agree", lambda *_: None)
    data = torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)
    L = cl.Objective(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "cross_entropy", data)
    L.ranks.count, L.mode = 2, "train"
    with pytest.raises(ValueError, match=r"statistics of batches, as 1 \(BatchNorm1d\) has them, need all data in one"):
        checks.alike(L)
    L = cl.Objective(nn.Sequential(nn.Linear(2, 3), nn.Dropout()), "cross_entropy", data)
    L.ranks.count, L.mode = 2, "train"
    with pytest.raises(ValueError, match="dropout masks, which are fixed by chunk, need all data in one process"):
        checks.alike(L)


def test_a_group_needs_torch_distributed():
    with pytest.raises(ValueError, match=r"torch.distributed is not initialised; start with torchrun"):
        problem(6, "world")


@pytest.mark.parametrize("n, count", [(11, 3), (2, 3), (6, 3), (1, 1)])
def test_parts_are_contiguous_and_cover_all(n, count, monkeypatch):
    ranks = Ranks()
    ranks.count = count
    found = []
    for ranks.rank in range(count):
        part = ranks.part(n)
        found += range(part.start, part.stop)
    assert found == list(range(n))
