"""What benchmarks share: options, other libraries where they are, memory in a fresh process."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import record
import torch

from curvlab.throughput import Speed, compare

PEERS = {
    "pyhessian": "pyhessian",
    "curvlinops": "curvlinops-for-pytorch",
    "hessian_eigenthings": "hessian-eigenthings",
    "opacus": "opacus",
    "backpack": "backpack-for-pytorch",
}


def options(text: str | None, quick: str, rounds: str) -> argparse.ArgumentParser:
    """The options that every benchmark has, and one thread."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{quick}: whether it runs, not what it costs")
    parser.add_argument("--rounds", type=int, help=f"how often each candidate runs; default {rounds}")
    parser.add_argument("--device", default="cpu", help="where to measure; on a GPU the clock counts, not CPU time")
    parser.add_argument("--records", type=Path, default=record.RECORDS, help="folder to append the record to")
    return parser


def peer(name: str) -> ModuleType | None:
    """Another library, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def versions(*names: str) -> dict[str, str | None]:
    """Versions of other libraries; None: not installed, and left out of the comparison."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(PEERS[name]) if peer(name) else None
        except importlib.metadata.PackageNotFoundError:  # importable, without metadata
            found[name] = "unknown"
    return found


def contest(
    benchmark: str,
    chosen: argparse.Namespace,
    make: Callable[..., Any],
    starts: Callable[[Any], Any],
    prepared: Callable[..., Callable[[], Any]],
    *,
    models: Sequence[str],
    rounds: int,
    peers: Sequence[str],
    **settings: Any,
) -> None:
    """Time every candidate on every model, with its memory in a fresh process; print, and append the record.

    Args:
        make: (model, examples or None, device) -> the problem, with `L`, `gradient`, `v` and `sizes`.
        starts: problem -> candidates by name, as `curvlab.throughput.compare` takes them.
        prepared: (model, examples or None, candidate, device) -> what a fresh process does while its memory is watched.
        rounds: how often each candidate runs; 2 on 16 examples with ``--quick``.
    """
    n, few = (16, 2) if chosen.quick else (None, rounds)
    rounds, results = chosen.rounds or few, []
    memory = {
        (model, name): growth(prepared, model, n, name, chosen.device)
        for model in models
        for name in starts(make(model, n, "cpu"))  # names only; a GPU's first use is the processes'
    }
    for model in models:
        problem = make(model, n, chosen.device)
        print(f"\n{model}: N = {problem.L.size}, P = {problem.L.num_params}")
        for speed in compare(problem.gradient, starts(problem), problem.v, rounds=rounds):
            results.append({"model": model, **asdict(speed), "peak_bytes": memory[model, speed.name]})
            print(line(speed, memory[model, speed.name]))
    settings = {
        "quick": chosen.quick,
        "rounds": rounds,
        "device": device_name(chosen.device),
        "models": {model: make(model, n, "cpu").sizes for model in models},
        **settings,
        "peers": versions(*peers),
    }
    file = record.append({"benchmark": benchmark, "settings": settings, "results": results}, chosen.records)
    print(f"appended to {file}")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def line(speed: Speed, peak: int | None) -> str:
    if speed.first_ratio is None or speed.per_second is None:
        return f"{speed.name:30} {speed.note}"
    odd = f"  differs by {speed.difference:.1e}" if (speed.difference or 0) > 1e-4 else ""
    memory = "" if peak is None else f"{peak / 2**20:8.1f} MiB"
    first = f"first {speed.first_ratio!s:18} then " if speed.first_ratio.median > 0.005 else ""
    return (
        f"{speed.name:30} {first}{speed.product_ratio!s:18} gradients, {speed.per_second:7.1f} a second {memory}{odd}"
    )


def growth(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int | None:
    """Bytes by which memory grows at most while prepare(*arguments)() runs, in a fresh process; None if it fails.

    Resident memory, or on a GPU what torch allocates there. What `prepare` does is not counted; it must be a function of a
    module, and the arguments such as can be sent to a process. The last argument is the device.
    """
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(["torch", "curvlab.throughput", "scipy.sparse.linalg"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_grown, args=(there, prepare, arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return None
    finally:
        process.join()


def _grown(answer: Any, prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    device = torch.device(arguments[-1])
    try:
        job = prepare(*arguments)
    except Exception:  # why is said where the same is timed
        answer.send(None)
        return
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        answer.send(torch.cuda.max_memory_allocated(device) - before)
        return
    gc.collect()
    with contextlib.suppress(
        OSError, AttributeError
    ):  # what preparing took at its most is forgotten, where there is Linux
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before, _ = resident()
    job()
    answer.send(max(0, resident()[1] - before))


def resident() -> tuple[int, int]:
    """Bytes of memory that this process has, and the most that it ever had; the same twice where the former is unknown."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else most
    return now, max(now, most)
