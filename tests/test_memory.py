"""What happens where memory ends: fewer examples at once, and the same numbers.

Compared with a reference: numbers with the same objective in ample memory, announced peaks with the resident memory of fresh
processes. The end of memory is played, by a forward pass of more than so many examples that raises what the allocators
raise, and once real, by a limit of the address space.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DOUBLE, block, off, some
from torch import nn

import curvlab as cl
from curvlab import memory
from curvlab.guard import out_of_memory
from curvlab.hvp import HessianProducts
from curvlab.per_example import ExampleGradients

ENDED = {
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried ..."
    ),
    "oneDNN": RuntimeError("could not create a primitive"),
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


class Small(cl.Objective):
    """An objective on a device for `room` examples."""

    room, error = 10**9, ENDED["CPU"]

    def losses(self, params, chunk):
        if chunk.size > self.room:
            raise self.error
        return super().losses(params, chunk)


def objective(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.randn(20, 4, dtype=DOUBLE), torch.randint(3, (20,))
    return Small(model, "cross_entropy", data, **options)


@pytest.mark.parametrize("error", ENDED.values(), ids=ENDED.keys())
@pytest.mark.parametrize("engine", ["graph", "double_backward", "forward_over_reverse"])
def test_products_go_on_with_half_the_chunk(engine, error, caplog):
    L = objective()
    V = block(L.num_params)
    expected = cl.hessian(L, engine=engine) @ V
    products = HessianProducts(L, L.params(), engine=engine)
    L.room, L.error = 6, error
    assert off(products.matmat(V), expected) < 1e-14
    assert L.chunk_size == 5
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "memory ended with 20 examples at once; going on with 10",
        "memory ended with 10 examples at once; going on with 5",
    ]
    assert off(cl.hessian(L, engine=engine) @ V, expected) < 1e-14


def test_values_and_gradients_go_on():
    L = objective()
    value, gradient = L.value(), L.gradient()
    L.room = 7
    assert abs(float(L.value() - value)) < 1e-14
    assert off(L.gradient(), gradient) < 1e-14


def test_diagnostics_go_on_with_the_same_probes():
    names = ["gradient_variance", "interaction_trace", "sharpness", "hessian_trace"]
    expected = cl.measure(objective(), names, batch_size=4)
    L = objective()
    L.room = 6  # what is tried once on a few examples fits
    found = cl.measure(L, names, batch_size=4)
    for name in names:
        assert found[name].value == pytest.approx(expected[name].value, rel=1e-9)


def test_the_budget_shrinks_with_the_chunk():
    L = objective(memory="8KiB", chunk_size=4)
    assert L.halve(ENDED["CPU"])
    assert (L.chunk_size, L.memory) == (2, 4096)


@pytest.mark.parametrize("message", ["shapes cannot be multiplied", "could not create a primitive descriptor for a matmul"])
def test_other_errors_and_single_examples_are_not_retried(message):
    L = objective(chunk_size=2)
    L.room, L.error = 0, RuntimeError(message)
    with pytest.raises(RuntimeError, match=message):
        L.value()
    assert L.chunk_size == 2
    L.error = ENDED["CPU"]
    with pytest.raises(RuntimeError, match="allocate memory"):
        L.value()
    assert L.chunk_size == 1


def test_out_of_memory_is_told_from_other_errors():
    assert all(map(out_of_memory, ENDED.values()))
    assert not out_of_memory(RuntimeError("no memory of it"))
    assert not out_of_memory(MemoryError())


# -- what cannot fit ---------------------------------------------------------------------------------------------------


def test_what_cannot_fit_is_refused_with_the_fix(monkeypatch):
    """Where memory is overcommitted no allocation fails: the system would end the process."""
    L = objective()
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4000)
    P = L.num_params
    text = rf"eigsh with k=1 of {P} rows, with \d+ vectors, takes .* MiB, and .* are free on cpu; pass a smaller k, max_"
    with pytest.raises(MemoryError, match=text + r"basis=3 \(more products\), or measure a block"):
        cl.measure(L, ["sharpness"])
    with pytest.raises(
        MemoryError, match=r"20 gradients of 43 parameters each takes .*curvlab.per_example.ExampleGradients"
    ):
        L.example_gradients()
    with pytest.raises(MemoryError, match=r"a dense matrix of 43 rows takes .* use eigsh or trace"):
        cl.dense(cl.hessian(L))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 400)
    with pytest.raises(MemoryError, match=r"the Gram matrix of 20 examples takes .* measure fewer examples"):
        ExampleGradients(L, L.params()).gram()
    lines = []
    monitor = cl.Monitor(L, ["gradient_variance"], announce=lines.append)
    with pytest.raises(
        MemoryError, match=r"measuring gradient_variance takes .*pass memory= to Objective, a smaller chunk"
    ):
        monitor()
    assert "MiB" in lines[0]  # what it would take is announced before


def test_free_memory_is_that_of_the_machine_or_of_the_container(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert 2**20 < memory.free_bytes(cpu) < memory.total_bytes(cpu)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (str(limit), str(tmp_path / "none")))
    limit.write_text("max\n")
    machine = memory.total_bytes(cpu)
    limit.write_text(f"{2**33}\n")
    assert memory.total_bytes(cpu) == min(machine, 2**33)
    assert memory.free_bytes(cpu) < 2**33
    limit.write_text(f"{2**20}\n")  # less than this process has
    assert memory.free_bytes(cpu) == 0
    assert [memory.readable(n) for n in (3 * 2**20, 3 * 2**29)] == ["3 MiB", "1.5 GiB"]


# -- what fresh processes take -----------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads and limits memory as Linux has it")


def fresh(job: str, cases: list) -> list:
    """What `peaks.py` finds, each case in a process of its own."""
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder), str(folder.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if job == "peak":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is no longer resident
    command = [sys.executable, str(folder / "peaks.py"), job, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PEAKS = [
    (model, n, chunk, plan)
    for model in ("mlp", "cnn", "transformer")
    for n, chunk in ((500, None), (1500, 100), (3000, 400))
    for plan in ("product", "eigsh", "examples")
]


@linux
@pytest.mark.parametrize(
    "cases",
    [pytest.param([("mlp", 1500, 100, "product")], id="one"), pytest.param(PEAKS, id="all", marks=pytest.mark.slow)],
)
def test_the_announced_peak_is_right_within_a_fifth(cases):
    """Of resident memory, allowing for 3 MiB that a process takes for itself."""
    wrong = []
    for case, found in zip(cases, fresh("peak", cases), strict=True):
        print(*case, found)
        announced, measured = found
        if not abs(announced - measured) <= 0.2 * measured + 3:
            wrong.append((*case, found))
    assert not wrong


LEFT = [
    ("mlp", ["loss", "gradient_norm", "gradient_variance"], 30),
    ("small", ["sharpness", "interaction_sharpness", "gradient_variance", "fisher_trace"], 1000),
]


@linux
@pytest.mark.parametrize("case", some(LEFT, 2))
def test_measurements_leave_nothing_behind(case):
    (grown,) = fresh("growth", [case])
    assert grown < 5, f"{grown:.2f} MiB more after {case[-1]} measurements"


@linux
@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer"])
def test_where_memory_really_ends_half_the_chunk_gives_the_same(model):
    (found,) = fresh("limited", [(model, 8000, 100)])
    assert found["chunk_size"] < 8000, found
    assert max(found["off"]) < 1e-5, found
