"""What does a training step with a penalty cost, in plain steps of the same micro-batches?

The demo's network (64-64-64-10, tanh, squared error) on 1024 digits in one batch, cut into micro-batches of 16, 128 and
1024 examples, on one thread. A step is what `train` does between two measurements: `BatchGradient` and the optimizer.
Every round runs each candidate once, in an order drawn anew; a ratio is that of a candidate and the plain step of the same
round. Median and quartiles over rounds are reported, of the process's CPU time, which others on the machine disturb less
than the clock; without them both agree, so a record has both. The rate is 0: all candidates stay at the same point.
`torch` is the plain step written by hand, without this library.

    python benchmarks/penalties.py [--quick] [--rounds 60] [--records FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch

import curvlab as cl
from curvlab.batch_gradient import BatchGradient
from curvlab.regularizers import REGULARIZERS
from curvlab.timing import one_stage, timed

STRENGTH = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="64 examples and 3 rounds: whether it runs, not what it costs"
    )
    parser.add_argument("--rounds", type=int, help="how often each candidate runs; default 60, or 3")
    parser.add_argument("--records", type=Path, default=record.RECORDS, help="folder to append the record to")
    chosen = parser.parse_args()
    n, sizes, rounds = (64, (16, 64), 3) if chosen.quick else (1024, (16, 128, 1024), 60)
    rounds = chosen.rounds or rounds
    torch.set_num_threads(1)
    results = [row for size in sizes for row in measured(n, size, rounds)]
    for row in results:
        low, high = row["quartiles"]
        print(
            f"|M| = {row['micro_batch_size']:<5}{row['candidate']:33}{row['ratio']:5.2f} ({low:.2f} to {high:.2f}) "
            f"plain steps, {row['wall_ratio']:5.2f} by the clock, {row['milliseconds']:7.2f} ms"
        )
    settings = {
        "n": n,
        "rounds": rounds,
        "quick": chosen.quick,
        "model": "mlp 64-64-64-10 tanh",
        "loss": "squared_error",
    }
    file = record.append({"benchmark": "penalties", "settings": settings, "results": results}, chosen.records)
    print(f"appended to {file}")


def measured(n: int, micro_batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each candidate: median CPU time of a step, and its ratio to the plain step of the same round."""
    steps = candidates(n, micro_batch_size)
    seconds = timed([one_stage(step) for step in steps.values()], rounds)  # (rounds, candidates, CPU and clock)
    ratios = seconds / seconds[:, :1]
    return [
        {
            "micro_batch_size": micro_batch_size,
            "candidate": name,
            "ratio": round(float(np.median(ratios[:, i, 0])), 3),
            "quartiles": np.quantile(ratios[:, i, 0], [0.25, 0.75]).round(3).tolist(),
            "wall_ratio": round(float(np.median(ratios[:, i, 1])), 3),
            "milliseconds": round(1e3 * float(np.median(seconds[:, i, 0])), 3),
        }
        for i, name in enumerate(steps)
    ]


def candidates(n: int, micro_batch_size: int) -> dict[str, Callable[[], None]]:
    """One step each: plain, by hand, and with every regularizer there is."""
    (x, y), _ = cl.problems.digits(n)
    model = cl.problems.mlp((64, 64, 64, 10), "tanh")
    L = cl.Objective(model, "squared_error", (x, y))
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    batch, onehot = torch.arange(n), torch.nn.functional.one_hot(y, 10).float()

    def step(*penalties: tuple[float, str]) -> None:
        BatchGradient(L, batch, micro_batch_size=micro_batch_size, penalties=penalties)()
        sgd.step()

    def by_hand() -> None:
        sgd.zero_grad()
        for piece in batch.split(micro_batch_size):
            (0.5 * (model(x[piece]) - onehot[piece]).square().sum() / n).backward()
        sgd.step()

    penalized = {name: (lambda name=name: step((STRENGTH, name))) for name in REGULARIZERS}
    return {"plain": step, "torch": by_hand, **penalized}


if __name__ == "__main__":
    main()
