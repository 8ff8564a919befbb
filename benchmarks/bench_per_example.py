"""What do the exact squared norms of all per-example gradients cost, in gradients of the same data?

Models as in bench_hvp.py: MLPs of 26k and 301k parameters, 6CNN, a small GPT and a small vision transformer. The gradient is
written by hand. Every round runs each candidate once, at a new point, in an order drawn anew. All norms are compared with
curvlab's: `difference`, the largest relative one. Memory is what grows in a fresh process during one call.

    curvlab           ExampleGradients(L, w).squared_norms(): rules of layers, nothing of size N x P
    vmap              torch.func.vmap of torch.func.grad, and the norms of what it gives, (N, P)
    Opacus            GradSampleModule, whose grad_sample is (N, P) too
    BackPACK          its extension BatchL2Grad; knows layers of the MLPs and the CNN only

A library that is not installed is left out, and the record says so.

    python benchmarks/bench_per_example.py [--quick] [--rounds 6] [--device cuda] [--records FOLDER]
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import common
import torch
from bench_hvp import Contest
from torch import Tensor, nn

from curvlab.per_example import ExampleGradients
from curvlab.throughput import Start

ROUNDS = 6
MODELS = ("mlp", "mlp_300k", "cnn6", "gpt", "vit")
PEERS = ("opacus", "backpack")


def main() -> None:
    parser = common.options(__doc__, "16 examples and 2 rounds of the smallest model", str(ROUNDS))
    chosen = parser.parse_args()
    models = MODELS[:1] if chosen.quick else MODELS
    common.contest("bench_per_example", chosen, Contest, starts, prepared, models=models, rounds=ROUNDS, peers=PEERS)


def starts(contest: Contest) -> dict[str, Start]:
    """Candidates by name; each makes what it needs first and gives a function that ignores its argument."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of Opacus and BackPACK, about inputs
    found: dict[str, Callable[[Contest], Callable[[], Tensor]]] = {"curvlab": by_layers, "vmap": by_vmap}
    if common.peer("opacus"):
        found["Opacus"] = by_opacus
    if common.peer("backpack"):
        found["BackPACK"] = by_backpack

    def start(make: Callable[[Contest], Callable[[], Tensor]]) -> Start:
        made: list[Callable[[], Tensor]] = []  # what a library prepares in a model once is no candidate's

        def first() -> Callable[[Tensor], Tensor]:
            if not made:
                made.append(make(contest))
            return lambda _: made[0]()

        return first

    return {name: start(make) for name, make in found.items()}


def by_layers(contest: Contest) -> Callable[[], Tensor]:
    L, w = contest.L, contest.L.params()
    return lambda: ExampleGradients(L, w).squared_norms().float()


def by_vmap(contest: Contest) -> Callable[[], Tensor]:
    model, criterion = contest.model, contest.criterion
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return criterion(torch.func.functional_call(model, params | buffers, (x[None],)), y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return lambda: squares(gradients(params, contest.x, contest.y).values())


def by_opacus(contest: Contest) -> Callable[[], Tensor]:
    from opacus import GradSampleModule

    model = GradSampleModule(copy.deepcopy(contest.model), strict=False, loss_reduction="mean")
    model.train()  # it captures nothing otherwise; no layer here acts otherwise in training

    def norms() -> Tensor:
        model.zero_grad()
        contest.criterion(model(contest.x), contest.y).backward()
        return squares(p.grad_sample for p in model.parameters())

    return norms


def by_backpack(contest: Contest) -> Callable[[], Tensor]:
    import backpack

    plain = copy.deepcopy(contest.model.model)
    if not isinstance(plain, nn.Sequential):
        raise NotImplementedError("BackPACK has no rules for the layers of this model")
    model, criterion = backpack.extend(plain), backpack.extend(nn.CrossEntropyLoss(reduction="sum"))

    def norms() -> Tensor:
        model.zero_grad()
        with backpack.backpack(backpack.extensions.BatchL2Grad()):
            criterion(model(contest.x), contest.y).backward()
        return torch.stack([p.batch_l2 for p in model.parameters()]).sum(0)

    return norms


def squares(parts: Any) -> Tensor:
    return torch.stack([part.flatten(1).square().sum(1) for part in parts]).sum(0)


def prepared(model: str, n: int | None, name: str, device: str) -> Callable[[], Any]:
    """What a fresh process does while its memory is watched."""
    small, contest = Contest(model, 2, device), Contest(model, n, device)
    starts(small)[name]()(small.v)  # what is loaded on first use is not counted
    norms = starts(contest)[name]()
    return lambda: norms(contest.v)


if __name__ == "__main__":
    main()
