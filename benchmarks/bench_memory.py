"""How does the peak memory of a Hessian-vector product grow with the number of examples N, and with the chunk?

An mlp 64-512-512-10 with tanh on synthetic inputs, cross-entropy, with a budget of 64 MiB: at one chunk size for N from 4096
to 65536, and at one N for chunks from 256 to 4096. What grows in a fresh process during the gradient and two products, the
median of three processes; the data lie in memory before. The budget bounds the graphs that are kept, so that the peak must
not grow with N.

    python benchmarks/bench_memory.py [--quick] [--rounds 3] [--device cuda] [--records FOLDER]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import record
import torch

import curvlab as cl
from curvlab.hvp import HessianProducts
from curvlab.throughput import probe

MEMORY, ENGINES = "64MiB", ("graph", "double_backward")
SIZES, CHUNK = (4096, 8192, 16384, 32768, 65536), 512
CHUNKS = (256, 1024, 2048, 4096)
QUICK = ((256, 64), (512, 64), (512, 128))


def main() -> None:
    chosen = common.options(__doc__, "256 and 512 examples, one engine and process", "3").parse_args()
    rounds, engines = chosen.rounds or (1 if chosen.quick else 3), ENGINES[:1] if chosen.quick else ENGINES
    cases = QUICK if chosen.quick else (*((n, CHUNK) for n in SIZES), *((SIZES[0], chunk) for chunk in CHUNKS))
    results = []
    for engine in engines:
        for n, chunk in cases:
            found = [common.growth(job, engine, n, chunk, chosen.device) for _ in range(rounds)]
            peaks = sorted(peak for peak in found if peak is not None)
            peak = peaks[len(peaks) // 2] if peaks else None
            results.append({"engine": engine, "n": n, "chunk_size": chunk, "peak_bytes": peak, "samples": peaks})
    for row in results:
        peak = "failed" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:8.1f} MiB"
        print(f"{row['engine']:18} N = {row['n']:<7} chunks of {row['chunk_size']:<6} {peak}")
    settings = {"quick": chosen.quick, "rounds": rounds, "memory": MEMORY, "device": chosen.device}
    file = record.append({"benchmark": "bench_memory", "settings": settings, "results": results}, chosen.records)
    print(f"appended to {file}")


def job(engine: Any, n: int, chunk: int, device: str) -> Callable[[], Any]:
    """What a fresh process does while its memory is watched."""
    once(objective(8, 4, device), engine)  # what is loaded on first use is not counted
    L = objective(n, chunk, device)
    return lambda: once(L, engine)


def objective(n: int, chunk: int, device: str) -> cl.Objective:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 64, generator=generator), torch.randint(10, (n,), generator=generator)
    model = cl.problems.mlp((64, 512, 512, 10)).to(device)
    return cl.Objective(model, "cross_entropy", (x, y), chunk_size=chunk, memory=MEMORY, device=device)


def once(L: cl.Objective, engine: Any) -> None:
    products, v = HessianProducts(L, L.params(), engine=engine), probe(L)
    products.value_and_gradient()
    for _ in range(2):
        products.matmat(v[:, None])


if __name__ == "__main__":
    main()
