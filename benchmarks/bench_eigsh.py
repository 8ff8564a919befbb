"""How many products and how much time do the top eigenvalues take, along a training trajectory, cold and warm?

The demo (1024 digits, mlp 64-64-64-10 with tanh, squared error, rate 0.2), full batches: the parameters of consecutive steps
are kept, late in training, and every solver goes through them in order. Asked for are the top eigenvalue, and the top five,
to a relative residual of 1e-2. Every round solves one point by each solver, in an order drawn anew; the Hessian is the
same kept graph for all but PyHessian, which has its own. Reported: products, CPU time in gradients of the same round, and
afterwards the residuals ‖Hq - θq‖/|θ_1| (largest of k) and the errors of values against a solution to 1e-5.

    curvlab cold, tracked    cl.eigsh from random vectors; and as diagnostics do it in a run, from the last step's vectors
    scipy cold, warm         eigsh (ARPACK) by H.to_scipy(); from the sum of the last vectors
    lobpcg cold, warm        scipy's; torch.lobpcg takes matrices only, no products; from the last vectors
    hessian-eigenthings      its Lanczos, which goes on for a fixed number of steps: 40
    PyHessian                its power iteration by its own products, tol 1e-3 of the value's change, 100 steps at most

A library that is not installed is left out, and the record says so.

    python benchmarks/bench_eigsh.py [--quick] [--rounds 20] [--device cuda] [--records FOLDER]
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import record
import torch
from torch import Tensor

import curvlab as cl
from curvlab.diagnostics.tracking import top_eigenpairs
from curvlab.hvp import HessianProducts
from curvlab.linalg import LinearOperator
from curvlab.linalg.probes import generator, normal
from curvlab.timing import Spread, column, one_stage, timed

TOL, LR, BEFORE, ROUNDS = 1e-2, 0.2, 300, 20
PEERS = ("pyhessian", "hessian_eigenthings")
Pairs = tuple[Tensor, Tensor]  # values (k,), descending, and vectors (P, k)
Solver = Callable[[LinearOperator, Tensor, Pairs | None], Pairs]


def main() -> None:
    parser = common.options(__doc__, "64 examples and 2 points", f"{ROUNDS} points")
    chosen = parser.parse_args()
    n, before, rounds = (64, 5, 2) if chosen.quick else (1024, BEFORE, ROUNDS)
    rounds = chosen.rounds or rounds
    L, points = trajectory(n, before, rounds + 1, chosen.device)
    results = [row for k in (1, 5) for row in measured(L, points, k)]
    for row in results:
        print(
            f"k = {row['k']}  {row['solver']:22}{row['products']['median']:6.0f} products, "
            f"{row['gradients']['median']:7.1f} gradients, residual {row['residual']:.1e}, error {row['value_error']:.1e}"
        )
    settings = {
        "quick": chosen.quick, "n": n, "steps_before": before, "rounds": rounds, "tol": TOL, "device": chosen.device,
        "model": "mlp 64-64-64-10 tanh", "loss": "squared_error", "peers": common.versions(*PEERS),
    }  # fmt: skip
    file = record.append({"benchmark": "bench_eigsh", "settings": settings, "results": results}, chosen.records)
    print(f"appended to {file}")


def trajectory(n: int, before: int, count: int, device: str) -> tuple[cl.Objective, list[Tensor]]:
    """The demo's objective, and its parameters at consecutive steps of full-batch descent."""
    data = tuple(part.to(device) for part in cl.problems.digits(n)[0])
    L = cl.Objective(cl.problems.mlp((64, 64, 64, 10)).to(device), "squared_error", data)
    sgd = torch.optim.SGD(L.model.parameters(), lr=LR)
    points = [at.w for at in cl.train(L, sgd, cl.Batches(n, n, before + count))]
    return L, points[before:]


class Run:
    """One solver that goes through the points, from its own last vectors if it is warm; counts products."""

    def __init__(self, L: cl.Objective, points: list[Tensor], solver: Solver, warm: bool) -> None:
        self.L, self.solver, self.warm = L, solver, warm
        self._points = iter(points)
        self.found: list[Pairs] = []
        self.products: list[int] = []

    def __call__(self) -> None:
        w, count = next(self._points), 0
        products = HessianProducts(self.L, w)

        def matmat(V: Tensor) -> Tensor:
            nonlocal count
            count += V.shape[1]
            return products.matmat(V)

        H = LinearOperator(matmat, self.L.num_params, self.L.dtype, self.L.device)
        self.found.append(self.solver(H, w, self.found[-1] if self.warm and self.found else None))
        self.products.append(count)


def measured(L: cl.Objective, points: list[Tensor], k: int) -> list[dict[str, Any]]:
    """One row for each solver."""
    counts: dict[str, list[int]] = {
        "curvlab tracked": [],
        "PyHessian": [],
    }  # of those that do not use the Hessian given
    runs = {name: Run(L, points, make(L, k), warm) for name, (make, warm) in solvers().items()}
    runs["curvlab tracked"] = Run(L, points, tracked(L, k, counts["curvlab tracked"]), False)
    if common.peer("pyhessian") and k == 1:
        runs["PyHessian"] = Run(L, points, pyhessian(L, counts["PyHessian"]), False)
    stages = [one_stage(lambda: L.gradient(points[0])), *map(one_stage, runs.values())]
    seconds = timed(stages, len(points) - 1, device=L.device, warm_up=1)[:, :, column(L.device)]
    hessians = [cl.hessian(L, w) for w in points[1:]]
    true = [cl.eigsh(H, k, tol=1e-5, guards=2, generator=generator("truth")).values for H in hessians]
    rows = []
    for i, (name, run) in enumerate(runs.items(), 1):
        residuals = [residual(H, *pairs) for H, pairs in zip(hessians, run.found[1:], strict=True)]
        errors = [float(((p[0] - t).abs() / t.abs()).max()) for p, t in zip(run.found[1:], true, strict=True)]
        rows.append({
            "k": k,
            "solver": name,
            "products": vars(Spread.of(np.array((counts.get(name) or run.products)[1:]))),
            "gradients": vars(Spread.of(seconds[:, i] / seconds[:, 0])),
            "milliseconds": 1e3 * float(np.median(seconds[:, i])),
            "residual": float(np.median(residuals)),
            "value_error": float(np.median(errors)),
        })  # fmt: skip
    return rows


def residual(H: LinearOperator, values: Tensor, vectors: Tensor) -> float:
    return float(((H @ vectors) - vectors * values).norm(dim=0).max() / values[0].abs())


def solvers() -> dict[str, tuple[Callable[[cl.Objective, int], Solver], bool]]:
    """How each is made, and whether it starts from its last vectors."""
    found: dict[str, tuple[Callable[[cl.Objective, int], Solver], bool]] = {
        "curvlab cold": (cold, False),
        "scipy cold": (arpack, False),
        "scipy warm": (arpack, True),
        "lobpcg cold": (lobpcg, False),
        "lobpcg warm": (lobpcg, True),
    }
    if common.peer("hessian_eigenthings"):
        found["hessian-eigenthings"] = (eigenthings, False)
    return found


def cold(L: cl.Objective, k: int) -> Solver:
    def solve(H: LinearOperator, w: Tensor, last: Pairs | None) -> Pairs:
        pairs = cl.eigsh(H, k, tol=TOL, generator=generator("cold"))
        return pairs.values, pairs.vectors

    return solve


def tracked(L: cl.Objective, k: int, counts: list[int]) -> Solver:
    """With the snapshot's own graph, which also gives the gradient."""
    carry: dict[Any, Any] = {}
    steps = itertools.count()

    def solve(H: LinearOperator, w: Tensor, last: Pairs | None) -> Pairs:
        at = cl.Snapshot(L, w, next(steps), 0, carry=carry)
        pairs = top_eigenpairs(at, k, TOL)
        counts.append(pairs.matvecs)
        return pairs.values, pairs.vectors

    return solve


def arpack(L: cl.Objective, k: int) -> Solver:
    from scipy.sparse.linalg import eigsh

    def solve(H: LinearOperator, w: Tensor, last: Pairs | None) -> Pairs:
        start = normal((L.num_params,), w, generator=generator("arpack")) if last is None else last[1].sum(1)
        values, vectors = eigsh(H.to_scipy(), k, which="LA", tol=TOL, v0=start.cpu().numpy())
        return torch.tensor(values[::-1].copy()).to(w), torch.tensor(vectors[:, ::-1].copy()).to(w)

    return solve


def lobpcg(L: cl.Objective, k: int) -> Solver:
    from scipy.sparse.linalg import lobpcg

    def solve(H: LinearOperator, w: Tensor, last: Pairs | None) -> Pairs:
        start = normal((L.num_params, k), w, generator=generator("lobpcg")) if last is None else last[1]
        scale = 1.0 if last is None else float(last[0][0])  # its tolerance is absolute
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values, vectors = lobpcg(H.to_scipy(), start.cpu().numpy(), tol=TOL * scale, maxiter=100)
        return torch.tensor(values).to(w), torch.tensor(vectors).to(w)

    return solve


def eigenthings(L: cl.Objective, k: int) -> Solver:
    from hessian_eigenthings import LambdaOperator, lanczos

    def solve(H: LinearOperator, w: Tensor, last: Pairs | None) -> Pairs:
        A = LambdaOperator(lambda v: H @ v, L.num_params, device=w.device, dtype=w.dtype)
        found = lanczos(A, k=k, max_iter=40, tol=TOL, which="LA", seed=0)
        return found.eigenvalues[:k].to(w), found.eigenvectors[:k].T.to(w)

    return solve


def pyhessian(L: cl.Objective, counts: list[int]) -> Solver:
    """With its own products, which are counted."""
    theirs = importlib.import_module("pyhessian.hessian")  # which the class hides
    (x, y), product, model = L.examples.batches[0], theirs.hessian_vector_product, L.model
    targets = torch.nn.functional.one_hot(y, 10).to(x)

    def counted(*args: Any) -> Any:
        counts[-1] += 1
        return product(*args)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum() / len(targets)

    def solve(H: LinearOperator, w: Tensor, last: Pairs | None) -> Pairs:
        counts.append(0)
        model.zero_grad()
        torch.nn.utils.vector_to_parameters(w, model.parameters())
        theirs.hessian_vector_product = counted
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            made = theirs.hessian(model, loss, data=(x, targets), cuda=w.is_cuda)
            values, vectors = made.eigenvalues(maxIter=100, tol=1e-3, top_n=1)
        theirs.hessian_vector_product = product
        model.zero_grad()
        return torch.tensor(values).to(w), torch.cat([part.reshape(-1) for part in vectors[0]]).detach()[:, None]

    return solve


if __name__ == "__main__":
    main()
