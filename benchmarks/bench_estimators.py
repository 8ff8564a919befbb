"""How far off is each estimator of tr(H S_b), of the Fisher trace and of the Hessian trace, for the products it takes?

An mlp 64-32-10 with tanh and a small convolutional network with relu on 256 digits, cross-entropy, at initialization and
after 300 steps of full-batch descent; everything in float64. The matrices are formed once, and the estimators multiply with
them: an error depends on what is multiplied, not on how. Reported: the root mean square of the relative error over seeds, at
a number of products with H (for the Fisher trace: passes over the data, or products with the GGN). The truths are the exact
formulas on the same matrices, and are compared with what the diagnostics give exactly: N products for tr(H S_b), C passes
for the Fisher trace.

tr(H S_b), b = 32, without replacement, of which gᵀHg is exact and tr(H S_1) estimated:
    batches                    mean of g_bᵀ H g_b over random batches
    signs                      vᵀHv for v = N^{-1/2} Σ ±g_i
    signs, control             the same with 10 eigenpairs as control variate: `interaction_trace` at a point, where the
                               products of their search count
    signs, control at hand     the same where they do not, as in a run, in which they are refitted every 8 steps
    XTrace                     on the N x N matrix of g_iᵀ H g_j / N
Fisher trace:
    labels                     ‖∇ log p(y|x)‖² for labels y that the model draws, one an example and pass
    signs                      ‖Jᵀ R ξ‖² for random signs ξ: `fisher_trace`
    Hutchinson, XTrace         on the GGN
Hessian trace:
    Hutchinson, XTrace         of `cl.trace`; Hutch++ as in Meyer et al. 2021 (arXiv 2010.09649), written out here
    split                      tr(GGN), which takes C passes that are not counted, and Hutchinson on the rest

    python benchmarks/bench_estimators.py [--quick] [--rounds 40] [--device cuda] [--records FOLDER]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import common
import record
import torch
from torch import Tensor, nn

import curvlab as cl
from curvlab.linalg.probes import generator, rademacher
from curvlab.losses import fisher_root
from curvlab.operators import noise_share

BUDGETS, SEEDS, B, K = (4, 8, 16, 32, 64), 40, 32, 10
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: cl.problems.mlp((64, 32, 10)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10)
    ),
}
Estimator = Callable[[int, torch.Generator], float | None]  # None: the budget is too small


def main() -> None:
    parser = common.options(__doc__, "32 examples, the cnn, 4 seeds, 2 budgets and 3 steps", f"{SEEDS} seeds")
    chosen = parser.parse_args()
    n, models, budgets, steps = (32, ["cnn"], (8, 16), 3) if chosen.quick else (256, list(MODELS), BUDGETS, 300)
    seeds = chosen.rounds or (4 if chosen.quick else SEEDS)
    results = []
    for model in models:
        L = objective(model, n, chosen.device)
        for point, w in (("initialization", L.params()), ("trained", trained(L, steps))):
            for quantity, (truth, estimators) in Matrices(L, w).quantities().items():
                for name, estimator in estimators.items():
                    where = {"model": model, "point": point, "quantity": quantity, "estimator": name, "truth": truth}
                    results.append(where | {"errors": errors(estimator, truth, budgets, seeds)})
                    print(line(results[-1]))
    settings = {
        "quick": chosen.quick, "n": n, "b": min(B, n // 2), "k": K, "steps": steps, "budgets": budgets, "seeds": seeds,
        "models": models, "loss": "cross_entropy", "device": chosen.device,
    }  # fmt: skip
    file = record.append({"benchmark": "bench_estimators", "settings": settings, "results": results}, chosen.records)
    print(f"appended to {file}")


def errors(estimator: Estimator, truth: float, budgets: tuple[int, ...], seeds: int) -> list[float | None]:
    """Root mean square over seeds of the relative error, for each budget."""
    found = []
    for budget in budgets:
        values = [estimator(budget, generator("bench_estimators", budget, seed)) for seed in range(seeds)]
        squares = [(value / truth - 1) ** 2 for value in values if value is not None]
        found.append(math.sqrt(sum(squares) / len(squares)) if len(squares) == seeds else None)
    return found


def objective(model: str, n: int, device: str) -> cl.Objective:
    torch.manual_seed(0)
    data = tuple(part.to(device) for part in cl.problems.digits(n)[0])
    return cl.Objective(MODELS[model]().to(device), "cross_entropy", data, dtype=torch.float64)


def trained(L: cl.Objective, steps: int, lr: float = 0.5) -> Tensor:
    w = L.params()
    for _ in range(steps):
        w = w - lr * L.gradient(w)
    return w


class Matrices:
    """What the estimators need of a point, formed once."""

    def __init__(self, L: cl.Objective, w: Tensor) -> None:
        self.L, self.w, self.b = L, w, min(B, L.size // 2)
        self.H, self.GGN = cl.dense(cl.hessian(L, w)), cl.dense(cl.ggn(L, w))
        self.G = L.example_gradients(w)  # (N, P)
        self.M = self.G @ self.H @ self.G.T / L.size  # (N, N), of which tr(H S_1) is the trace
        x = torch.cat([batch[0] for batch in L.examples.batches])

        def call(params: dict[str, Tensor], one: Tensor) -> Tensor:
            return torch.func.functional_call(L.model, params, (one[None],))[0]

        params = L.unflatten(w)
        self.outputs = torch.func.vmap(call, (None, 0))(params, x)
        parts = torch.func.vmap(torch.func.jacrev(call), (None, 0))(params, x)
        J = torch.cat([parts[name].flatten(2) for name in params], 2)  # (N, C, P)
        self.kernels = J @ J.mT  # (N, C, C)

    def quantities(self) -> dict[str, tuple[float, dict[str, Estimator]]]:
        """The exact value of each quantity, and its estimators."""
        share = noise_share(self.L.size, self.b, False)
        full = float(self.M.mean() * self.L.size * (1 - share))
        found = {
            "tr(H S_b)": (share * float(self.M.trace()) + full, self.interaction(share, full)),
            "tr(F)": (float(self.GGN.trace()), self.fisher()),
            "tr(H)": (float(self.H.trace()), self.hessian()),
        }
        names = (("interaction_trace", {"exact": True}), ("fisher_trace", {"exact": True}))
        exact = cl.measure(self.L, list(names), w=self.w, batch_size=self.b)
        for (truth, _), name in zip(found.values(), ("interaction_trace", "fisher_trace"), strict=False):
            assert abs(exact[name].value - truth) <= 1e-9 * abs(truth), name
        return found

    def interaction(self, share: float, full: float) -> dict[str, Estimator]:
        N, b = self.L.size, self.b
        draws = generator("control")
        pairs = cl.eigsh(self.H, min(K, len(self.H)), which="LM", tol=0.05, max_matvecs=6 * K, generator=draws)
        dots = self.G @ pairs.vectors  # (N, K)
        control = dots @ (pairs.values[:, None] * dots.T) / N

        def batches(m: int, draws: torch.Generator) -> float:
            index = torch.stack([torch.randperm(N, generator=draws)[:b] for _ in range(m)])
            return float(torch.stack([self.M[i][:, i].sum() * N / b**2 for i in index]).mean())

        def signs(m: int, draws: torch.Generator, rest: Tensor, known: float) -> float | None:
            if m < 2:
                return None
            found = cl.trace(rest, method="hutchinson", num_matvecs=m, generator=draws)
            return share * (known + found.value) + full

        def xtrace(m: int, draws: torch.Generator) -> float:
            return share * cl.trace(self.M, num_matvecs=m, generator=draws).value + full

        rest, known = self.M - control, float(control.trace())
        return {
            "batches": batches,
            "signs": lambda m, draws: signs(m, draws, self.M, 0.0),
            "signs, control": lambda m, draws: signs(m - pairs.matvecs, draws, rest, known),
            "signs, control at hand": lambda m, draws: signs(m, draws, rest, known),
            "XTrace": xtrace,
        }

    def fisher(self) -> dict[str, Estimator]:
        z, p = self.outputs, self.outputs.softmax(1)

        def mean_form(u: Tensor) -> float:
            return float(torch.einsum("nc,ncd,nd->", u, self.kernels, u)) / len(z)

        def labels(m: int, draws: torch.Generator) -> float:
            drawn = torch.multinomial(p.cpu(), m, replacement=True, generator=draws).T.to(p.device)
            return sum(mean_form(nn.functional.one_hot(y, z.shape[1]) - p) for y in drawn) / m

        def signs(m: int, draws: torch.Generator) -> float:
            drawn = (rademacher(z.shape, z.device, z.dtype, generator=draws) for _ in range(m))
            return sum(mean_form(fisher_root(self.L.loss, z, xi)) for xi in drawn) / m

        return {"labels": labels, "signs": signs, **on(self.GGN)}

    def hessian(self) -> dict[str, Estimator]:
        rest, known = self.H - self.GGN, float(self.GGN.trace())
        split = on(rest)["Hutchinson"]
        return on(self.H) | {
            "Hutch++": lambda m, draws: hutch_plus_plus(self.H, m, draws),
            "split": lambda m, draws: known + split(m, draws),
        }


def on(A: Tensor) -> dict[str, Estimator]:
    return {
        "Hutchinson": lambda m, draws: cl.trace(A, method="hutchinson", num_matvecs=m, generator=draws).value,
        "XTrace": lambda m, draws: cl.trace(A, num_matvecs=m, generator=draws).value,
    }


def hutch_plus_plus(A: Tensor, m: int, draws: torch.Generator) -> float:
    """A third of the products each for a basis, its trace, and Hutchinson on what is orthogonal to it."""
    each = m // 3
    S, Z = (rademacher((len(A), count), A.device, A.dtype, generator=draws) for count in (each, m - 2 * each))
    Q = torch.linalg.qr(A @ S).Q
    Z = Z - Q @ (Q.T @ Z)
    return float((Q * (A @ Q)).sum() + (Z * (A @ Z)).sum() / Z.shape[1])


def line(row: dict[str, Any]) -> str:
    shown = "".join("       -" if error is None else f"{error:8.1%}" for error in row["errors"])
    return f"{row['model']:5}{row['point']:15}{row['quantity']:10}{row['estimator']:24}{shown}"


if __name__ == "__main__":
    main()
