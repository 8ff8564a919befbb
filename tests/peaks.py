"""Resident memory of fresh processes, for `test_memory.py`: `python peaks.py JOB JSON` prints a JSON list, a row a case.

Every case has a process of its own, forked before anything is computed. For peaks the caller sets MALLOC_MMAP_THRESHOLD_, so
that freed memory goes back to the system at once: what the C library's heap holds on to depends on the order of allocations.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy.special  # noqa: F401  what is loaded on first use is not measured
import torch
from test_precision import Attention
from torch import nn

import curvlab as cl
from curvlab.cost import rehearse
from curvlab.diagnostics import evaluate, parse

MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "small": lambda: nn.Sequential(nn.Linear(64, 60), nn.Tanh(), nn.Linear(60, 10)),
    "mlp": lambda: nn.Sequential(nn.Linear(64, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 10)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 10),
    ),
    "transformer": lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), Attention()),
}  # fmt: skip
PLANS: dict[str, list[Any]] = {
    "product": ["curvature_along_gradient"],
    "eigsh": [("hessian_eigenvalues", {"k": 8})],
    "examples": ["gradient_variance"],
}


@cl.diagnostic("gᵀHg", formula="gᵀHg", kind="exact", cost="1 product")
def curvature_along_gradient(at: cl.Snapshot) -> cl.Measurement:
    """One product."""
    return cl.Measurement(float(at.gradient @ at.hessian_gradient))


def objective(model: str, n: int, chunk: int | None, memory: str = "64MiB") -> cl.Objective:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    data = torch.randn(n, 64, generator=generator), torch.randint(10, (n,), generator=generator)
    return cl.Objective(MODELS[model](), "cross_entropy", data, chunk_size=chunk, memory=memory)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def settled() -> int:
    """Bytes that are resident once all that is free went back, from where peaks are counted on."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def peak(model: str, n: int, chunk: int | None, plan: str) -> tuple[float, float]:
    """MiB that are announced for a measurement, and those by which memory grows at most during it."""
    L = objective(model, n, chunk)
    at = cl.Snapshot(L, L.params(), batch_size=16)
    announced = rehearse(at, parse(PLANS[plan]))[""].bytes
    before = settled()
    evaluate(at, parse(PLANS[plan]))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return announced / MIB, (most - before) / MIB


def growth(model: str, names: list[str], times: int) -> float:
    """MiB that so many measurements leave behind, by `measure` and by a monitor."""
    L = objective(model, 64, 32)
    monitor = cl.Monitor(L, names, batch_size=8, announce=None)

    def measured(count: int) -> int:
        for _ in range(count):
            cl.measure(L, names, batch_size=8)
            monitor()
        return settled()

    before = measured(5)
    return (measured(times) - before) / MIB


def limited(model: str, n: int, room: int) -> dict[str, Any]:
    """Gradient and product where the address space ends in the midst of them, and without that limit."""
    small = objective(model, n, 64)
    v = torch.ones(small.num_params)
    expected = small.gradient().double(), (cl.hessian(small, engine="double_backward") @ v).double()
    L = objective(model, n, n, "1GiB")
    _ = L.graph_bytes
    settled()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + room * MIB, resource.RLIM_INFINITY))
    gradient = L.gradient().double()
    product = (cl.hessian(L) @ v).double()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    off = [float((a - b).norm() / b.norm()) for a, b in zip((gradient, product), expected, strict=True)]
    return {"chunk_size": L.chunk_size, "off": off}


def forked(job: Callable[..., Any], arguments: list[Any]) -> Any:
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            answer = job(*arguments)
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        answer = json.load(file)
    os.wait()
    return answer


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = {"peak": peak, "growth": growth, "limited": limited}[sys.argv[1]]
    print(json.dumps([forked(job, case) for case in json.loads(sys.argv[2])]))
