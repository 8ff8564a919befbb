"""How does measuring scale over ranks, and which share of it goes into communication?

The sharpness at the initialization of mlp_300k (301k parameters), with the examples divided among the ranks (strong scaling)
or so many on each (weak). Ranks are processes of this machine with a thread each, over gloo, or a GPU each, over NCCL: as
many as there are cores or GPUs. Every round times a gradient and the search, by the clock, since waiting counts; the share
of communication is the time of rank 0 inside sums, gathers and agreements, where it also waits for the others. Beside it is
what `curvlab.plan` foresees from one process, with the bandwidth that the largest number of measured ranks had; more ranks
than were measured have the plan alone.

    python benchmarks/bench_scaling.py [--quick] [--n 512] [--rounds 5] [--device cuda] [--records FOLDER]
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import common
import record
import torch
import torch.distributed as dist

import curvlab as cl
from curvlab.cost import Cost, Rehearsal, rehearsal
from curvlab.problems import timed_problem
from curvlab.ranks import Ranks
from curvlab.timing import synchronize

RANKS, NAME = (1, 2, 4, 8, 16, 64), "sharpness"


def main() -> None:
    parser = common.options(__doc__, "64 examples of a smaller net, one round", "5")
    parser.add_argument("--n", type=int, help="examples: of all ranks, and in weak scaling of each; default 512")
    chosen = parser.parse_args()
    model, n = ("mlp", chosen.n or 64) if chosen.quick else ("mlp_300k", chosen.n or 512)
    rounds, there = chosen.rounds or (1 if chosen.quick else 5), available(chosen.device)
    found, results = rehearsed_once(model, n, chosen.device), []
    for weak in (False, True):
        results += scaling(model, n, weak, rounds, chosen.device, there, found)
    for row in results:
        print(
            f"{row['scaling']:8}{row['ranks']:4} ranks  measured {shown(row['seconds'], row['communication'])}, "
            f"planned {shown(row['planned_seconds'], row['planned_communication'])}; in gradients "
            f"{row['gradients'] or 0:.1f}, planned {row['planned_gradients']:.1f}"
        )
    settings = {
        "quick": chosen.quick, "rounds": rounds, "device": common.device_name(chosen.device), "model": model, "n": n,
        "measured": [count for count in RANKS if count <= there], "quantity": NAME,
    }  # fmt: skip
    file = record.append({"benchmark": "bench_scaling", "settings": settings, "results": results}, chosen.records)
    print(f"appended to {file}")


def available(device: str) -> int:
    """Ranks that this machine has a core or a GPU for."""
    if torch.device(device).type == "cuda":
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rehearsed_once(model: str, n: int, device: str) -> Rehearsal:
    """What the plan follows from: the second of two rehearsals, since kernels are found in the first."""
    L = objective(model, n, device)
    return [rehearsal(cl.Snapshot(L, L.params()), {NAME: {}}) for _ in range(2)][1]


def scaling(
    model: str, n: int, weak: bool, rounds: int, device: str, there: int, rehearsed: Rehearsal
) -> list[dict[str, Any]]:
    """A row for each number of ranks: what was measured, and what the plan says."""
    found = {count: measured(count, model, n * count if weak else n, rounds, device) for count in RANKS if count <= there}
    most, bandwidth, rows = max(found), None, []
    plans: list[tuple[int, Cost]] = []
    for count in RANKS:
        size = replace(rehearsed.size, examples=n * count if weak else n, ranks=count)
        planned = rehearsed.costs(size)[""]
        if count == most > 1:
            bandwidth = planned.sent / max(1e-9, median(found[count]["communication"]))
        plans.append((count, planned))
    for count, planned in plans:
        sending = planned.sent / bandwidth if bandwidth else 0.0
        here = found.get(count)
        rows.append({
            "scaling": "weak" if weak else "strong",
            "ranks": count,
            "samples": here,
            "seconds": here and median(here["seconds"]),
            "communication": here and median(here["communication"]),
            "gradients": here and median(here["seconds"]) / median(here["gradient"]),
            "planned_seconds": planned.seconds + sending,
            "planned_communication": sending,
            "planned_gradients": planned.gradients,
        })  # fmt: skip
    return rows


def shown(seconds: float | None, communication: float | None) -> str:
    if seconds is None or communication is None:
        return "-"
    return f"{1e3 * seconds:.1f} ms ({communication / seconds:.0%} communication)"


def objective(model: str, n: int, device: str, **options: Any) -> cl.Objective:
    torch.manual_seed(0)
    net, loss, data = timed_problem(model, n)
    return cl.Objective(net.to(device), loss, data, chunk_size=n, check="never", **options)


def measured(count: int, model: str, n: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every round on rank 0: of a gradient, of the search, and of its communication."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (count, folder, model, n, rounds, device), nprocs=count)
        return json.loads(Path(folder, "found.json").read_text())


def work(rank: int, count: int, folder: str, model: str, n: int, rounds: int, device: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    place, backend = torch.device(device), "nccl" if device == "cuda" else "gloo"
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timedelta(seconds=300))
    L, spent = objective(model, n, device, group="world"), [0.0]
    together = Ranks._together

    @contextlib.contextmanager
    def timed(ranks: Ranks) -> Iterator[None]:
        synchronize(place)
        started = time.perf_counter()
        with together(ranks):
            yield
        synchronize(place)
        spent[0] += time.perf_counter() - started

    Ranks._together = timed  # type: ignore[method-assign]
    found: dict[str, list[float]] = {"gradient": [], "seconds": [], "communication": []}
    for _ in range(rounds + 1):  # the first warms up
        L.gradient()
        synchronize(place)
        started = time.perf_counter()
        L.gradient()
        synchronize(place)
        between, spent[0] = time.perf_counter(), 0.0
        cl.measure(L, [NAME])
        synchronize(place)
        for name, seconds in zip(found, (between - started, time.perf_counter() - between, spent[0]), strict=True):
            found[name].append(seconds)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps({name: samples[1:] for name, samples in found.items()}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
