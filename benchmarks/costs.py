"""What does each diagnostic cost on the demo problem, in products with the Hessian and passes over the data?

A product is one H @ v over all data. A pass is one evaluation of the model on all data, mostly with a gradient, or a
gradient that rides on the evaluation of another pass. Counted, not timed, so the machine does not matter: at a single
point, and per step of a run once tracking has settled (the mean of sixteen steps, which is one cycle of the control
variates). The README's table is made from this record.

    python benchmarks/costs.py            # all diagnostics, some minutes; writes benchmarks/records/costs.json
    python benchmarks/costs.py --quick    # a smaller problem, to see that it works
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import curvlab as cl
from curvlab.capture import Capture
from curvlab.diagnostics import DIAGNOSTICS

SETTLED, CYCLE = 8, 16  # steps before counting, and counted


class Counting(cl.Objective):
    """An objective that counts the examples it evaluates for measurements."""

    seen = 0

    def losses(self, params: Any, chunk: Any) -> torch.Tensor:
        self.seen += chunk.size
        return super().losses(params, chunk)

    def outputs(self, params: Any, chunk: Any) -> torch.Tensor:
        self.seen += chunk.size
        return super().outputs(params, chunk)

    def passes(self) -> float:
        """Passes over the data since the last call."""
        found, self.seen = self.seen / self.size, 0
        return found


def _count_gradients_alone() -> None:
    """Gradients of outputs along vectors, by the graph of a pass that was listened to."""
    plain = Capture.parts_along

    def counted(capture: Capture, u: torch.Tensor) -> Any:
        capture._L.seen += capture._count  # type: ignore[attr-defined]
        return plain(capture, u)

    Capture.parts_along = counted  # type: ignore[method-assign]


def demo(n: int, steps: int) -> tuple[Counting, Counting, dict[str, torch.Tensor]]:
    """The demo's objective and test objective after some steps of training."""
    train, test = cl.problems.digits(n)
    model = cl.problems.mlp((64, 64, 64, 10))
    L = Counting(model, "squared_error", train)
    for _ in cl.train(L, torch.optim.SGD(model.parameters(), lr=0.2), cl.Batches(n, n, steps)):
        pass
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return L, Counting(model, "squared_error", test), state


def costs(name: str, L: Counting, test: Counting, state: dict[str, torch.Tensor], b: int) -> dict[str, Any]:
    """Products and passes of one diagnostic, at a point and per step."""
    L.model.load_state_dict(state)
    _ = (
        L.chunk_size,
        L.examples,
        cl.measure(L, ["gradient_variance"]),
    )  # what is found once per objective is not counted
    L.passes()
    out: dict[str, Any] = {"point": None}
    if not {"batch_gradient", "trained"} & set(DIAGNOSTICS[name].needs):
        m = cl.measure(L, [name], batch_size=b, lr=0.2, test=test)[name]
        out["point"] = [m.matvecs, round(L.passes(), 1)]
    sgd = torch.optim.SGD(L.model.parameters(), lr=0.2)
    dear = out["point"] is not None and out["point"][0] > 100
    steps = 2 if dear else SETTLED + CYCLE
    products, passes = [], []
    batches = cl.Batches(L.size, b, steps)
    for at in cl.train(L, sgd, batches, diagnostics=[name], test=test):
        products.append(at.measurements[name].matvecs)
        passes.append(L.passes())
    kept = slice(-1, None) if dear else slice(SETTLED, None)
    count = len(products[kept])
    out["step"] = [round(sum(products[kept]) / count, 1), round(sum(passes[kept]) / count, 1)]
    return out


def main(argv: list[str] | None = None) -> None:
    """Count and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 examples, 5 steps of training")
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "records", help="folder of the record")
    parser.add_argument("--names", nargs="*", help="only these diagnostics; the record keeps what it has of the others")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    _count_gradients_alone()
    n, steps, b = (64, 5, 8) if options.quick else (1024, 150, 32)
    L, test, state = demo(n, steps)
    found = {name: costs(name, L, test, state, b) for name in options.names or DIAGNOSTICS}
    problem = {
        "data": "digits",
        "n": n,
        "model": "mlp 64-64-64-10 tanh",
        "loss": "squared_error",
        "steps": steps,
        "b": b,
    }
    options.records.mkdir(parents=True, exist_ok=True)
    file, record = options.records / "costs.json", {"problem": problem, "unit": "[products, passes]", "costs": found}
    if options.names and file.exists() and (before := json.loads(file.read_text()))["problem"] == problem:
        counted = before["costs"] | found
        record["costs"] = {name: counted[name] for name in DIAGNOSTICS if name in counted}
    file.write_text(json.dumps(record, indent=1) + "\n")
    for name, cost in found.items():
        print(f"{name:40s} at a point {cost['point']}, per step {cost['step']}")


if __name__ == "__main__":
    main()
