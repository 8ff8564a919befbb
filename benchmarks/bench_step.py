"""What does a training step cost with each diagnostic, and with all of them, in bare steps and in gradients of all data?

The demo problem: 1024 digits, mlp 64-64-64-10 with tanh, squared error, rate 0.2; full batches, and batches of 32. S_b is
that of batches of 32 in both. All candidates train side by side along the same trajectory, each in a loop of `curvlab.train`
with a model of its own; every round advances each by one step, in an order drawn anew. Ratios are to the bare step (`train`
without diagnostics) and to the gradient of all data, written by hand, of the same round. Quartiles and means are over steps;
means count the steps at which tracked vectors are found anew. For what is estimated there are relative errors: the one that
is stated, and at every 20th step the distance from a value that is 10 or more times as accurate. `by hand` is a step without
curvlab.

    python benchmarks/bench_step.py [--quick] [--rounds 200] [--device cuda] [--records FOLDER]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import common
import numpy as np
import record
import torch

import curvlab as cl
from curvlab.timing import Spread, column, one_stage, timed

DIAGNOSTICS = (
    "loss", "sharpness", "interaction_trace", "interaction_sharpness", "gradient_concentration", "gradient_variance",
    "fisher_trace",
)  # fmt: skip
# What is estimated, with the options that make it 10 or more times as accurate.
REFERENCES: dict[str, dict[str, Any]] = {
    "sharpness": {"tol": 1e-4},
    "interaction_trace": {"probes": 256},
    "interaction_sharpness": {"probes": 256},
    "fisher_trace": {"exact": True},
}
LR, B, STEPS, SPACING = 0.2, 32, 200, 20


def main() -> None:
    parser = common.options(__doc__, "64 examples and 4 steps", f"{STEPS} steps")
    chosen = parser.parse_args()
    n, steps, spacing = (64, 4, 2) if chosen.quick else (1024, STEPS, SPACING)
    steps, results = chosen.rounds or steps, []
    for batch in (n, B):
        rows = measured(n, batch, steps, spacing, chosen.device)
        results += rows
        print(f"\nb = {batch}, {steps} steps")
        for row in rows:
            errors = row["stated_error"], row["true_error"]
            shown = "".join(
                f", {what} error {e:.1%}" for what, e in zip(("stated", "true"), errors, strict=True) if e is not None
            )
            print(
                f"{row['candidate']:24}{row['ratio']['median']:7.2f} bare steps, {row['gradients']['median']:6.2f} "
                f"gradients, mean {row['mean_gradients']:6.2f}{shown}"
            )
    settings = {
        "quick": chosen.quick, "n": n, "rounds": steps, "b": B, "lr": LR, "model": "mlp 64-64-64-10 tanh",
        "loss": "squared_error", "device": chosen.device,
    }  # fmt: skip
    file = record.append({"benchmark": "bench_step", "settings": settings, "results": results}, chosen.records)
    print(f"appended to {file}")


class Training:
    """One loop of `train` on the demo problem, step by step, and what it measured."""

    def __init__(self, n: int, batch: int, steps: int, diagnostics: tuple[str, ...], device: str) -> None:
        data = tuple(part.to(device) for part in cl.problems.digits(n)[0])
        self.L = cl.Objective(cl.problems.mlp((64, 64, 64, 10)).to(device), "squared_error", data)
        sgd = torch.optim.SGD(self.L.model.parameters(), lr=LR)
        self.points: list[torch.Tensor] = []
        self.found: list[dict[str, cl.Measurement]] = []
        batches = cl.Batches(n, batch, steps)
        self._steps: Iterator[Any] = cl.train(self.L, sgd, batches, diagnostics=diagnostics, batch_size=B)

    def __call__(self) -> None:
        at = next(self._steps)
        self.points.append(at.w)
        self.found.append(at.measurements)


def measured(n: int, batch: int, steps: int, spacing: int, device: str) -> list[dict[str, Any]]:
    """One row for each candidate."""
    sets = {"bare": (), **{name: (name,) for name in DIAGNOSTICS}, "all": DIAGNOSTICS}
    loops = {name: Training(n, batch, steps + 1, names, device) for name, names in sets.items()}
    candidates: dict[str, Callable[[], None]] = {**loops, "by hand": by_hand(n, batch, steps + 1, device)}
    gradient = gradient_by_hand(n, device)
    stages = [one_stage(gradient), *map(one_stage, candidates.values())]
    seconds = timed(stages, steps, device=device, warm_up=1)[:, :, column(device)]
    places = range(0, steps + 1, spacing)
    L, points = loops["bare"].L, loops["bare"].points
    true = [cl.measure(L, list(REFERENCES.items()), w=points[i], batch_size=B, seed=1) for i in places]
    rows = []
    for i, name in enumerate(candidates, 1):
        found = loops[name].found if name in REFERENCES else []
        values = [
            (float(found[k][name].value), float(t[name].value)) for k, t in zip(places, true, strict=True) if found
        ]
        stated = [m[name].error / abs(m[name].value) for m in found]
        rows.append({
            "b": batch,
            "candidate": name,
            "ratio": vars(Spread.of(seconds[:, i] / seconds[:, 1])),
            "gradients": vars(Spread.of(seconds[:, i] / seconds[:, 0])),
            "mean_ratio": float(seconds[:, i].mean() / seconds[:, 1].mean()),
            "mean_gradients": float(seconds[:, i].mean() / seconds[:, 0].mean()),
            "milliseconds": 1e3 * float(np.median(seconds[:, i])),
            "stated_error": float(np.median(stated)) if stated else None,
            "true_error": float(np.median([abs(a - b) / abs(b) for a, b in values])) if values else None,
        })  # fmt: skip
    return rows


def by_hand(n: int, batch: int, steps: int, device: str) -> Callable[[], None]:
    """Training without this library, on the same batches."""
    (x, y), model = cl.problems.digits(n)[0], cl.problems.mlp((64, 64, 64, 10)).to(device)
    x, targets = x.to(device), torch.nn.functional.one_hot(y, 10).float().to(device)
    sgd, indices = torch.optim.SGD(model.parameters(), lr=LR), iter(cl.Batches(n, batch, steps))

    def step() -> None:
        index = next(indices)
        sgd.zero_grad()
        (0.5 * (model(x[index]) - targets[index]).square().sum() / batch).backward()
        sgd.step()

    return step


def gradient_by_hand(n: int, device: str) -> Callable[[], None]:
    (x, y), model = cl.problems.digits(n)[0], cl.problems.mlp((64, 64, 64, 10)).to(device)
    x, targets = x.to(device), torch.nn.functional.one_hot(y, 10).float().to(device)
    params = list(model.parameters())
    return lambda: torch.autograd.grad(0.5 * (model(x) - targets).square().sum() / n, params) and None


if __name__ == "__main__":
    main()
