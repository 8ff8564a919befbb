"""What does a Hessian-vector product cost, by every engine of curvlab and by other libraries, in gradients of the same data?

Models: MLPs of 26k and 301k parameters, 6CNN, ResNet-18 (an eighth of the channels), a small GPT and a small vision
transformer, on so few examples that a gradient takes 4-30 ms on one core. The gradient is written by hand. Every round runs
each candidate once, in an order drawn anew: what comes first at a new point, with loss and gradient where there is such a
part, then three products with a flat vector, which are averaged. All products are compared with that of the kept graph:
`difference`, relative, of which float32 explains 1e-6 or so. Memory is what grows in a fresh process during the first part
and two products.

    by hand                 autograd.grad of the gradient, whose graph is kept: what any library on top of it can reach
    curvlab ENGINE          cl.hessian(L, engine=ENGINE); "compiled" with --compile only
    scipy (curvlab)         the kept graph through H.to_scipy(), as scipy's eigsh calls it, numpy vectors on the host
    PyHessian, one batch    its hessian_vector_product on the gradient that its constructor computes
    PyHessian, loader       its dataloader_hv_product, over four batches; its constructor computes nothing
    curvlinops              HessianLinearOperator over one batch
    hessian-eigenthings     HessianOperator over one batch

A library that is not installed is left out, and the record says so.

    python benchmarks/bench_hvp.py [--quick] [--models mlp ...] [--compile] [--rounds 12] [--device cuda] [--records FOLDER]
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import Tensor, nn

import curvlab as cl
from curvlab.hvp import HessianProducts
from curvlab.problems import TIMED, timed_problem
from curvlab.throughput import EAGER, Product, Start, engine_start, probe

ROUNDS = 12
BATCHES = 4  # of a loader
PEERS = ("pyhessian", "curvlinops", "hessian_eigenthings")


def main() -> None:
    parser = common.options(__doc__, "16 examples and 2 rounds of the smallest model", str(ROUNDS))
    parser.add_argument("--models", nargs="*", choices=TIMED, help="default all")
    parser.add_argument("--compile", action="store_true", help="also the compiled engine: 10-150 s a model")
    chosen = parser.parse_args()
    models = chosen.models or (["mlp"] if chosen.quick else list(TIMED))
    common.contest(
        "bench_hvp", chosen, Contest, lambda contest: contest.starts(chosen.compile), prepared,
        models=models, rounds=ROUNDS, peers=PEERS, batches_of_loaders=BATCHES,
    )  # fmt: skip


class Contest:
    """A problem with all candidates: each has a copy of the model, and the same data and parameters."""

    def __init__(self, name: str, n: int | None, device: str) -> None:
        model, loss, data = timed_problem(name, n)
        self.model = Outputs(model.to(device).eval(), tokens=loss == "token")
        self.x, self.y = (part.to(device) for part in data)
        self.L = cl.Objective(model, loss, (self.x, self.y))
        self.v = probe(self.L)
        self.criterion = nn.CrossEntropyLoss()
        self.sizes = {"examples": self.L.size, "parameters": self.L.num_params}

    def gradient(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.criterion(self.model(self.x), self.y), list(self.model.parameters()))

    def starts(self, compiled: bool) -> dict[str, Start]:
        """Candidates by name; the first is what the others' products are compared with."""
        L, w = self.L, self.L.params()
        engines = [engine for engine in EAGER if engine != "differences"] + ["compiled"] * compiled  # those that are exact
        found: dict[str, Start] = {f"curvlab {engine}": engine_start(L, w, engine) for engine in engines}
        found["scipy (curvlab)"] = self.scipy
        found["by hand"] = self.by_hand
        if common.peer("pyhessian"):
            found["PyHessian, one batch"] = self.pyhessian_batch
            found["PyHessian, loader"] = self.pyhessian_loader
        if common.peer("curvlinops"):
            found["curvlinops"] = self.curvlinops
        if common.peer("hessian_eigenthings"):
            found["hessian-eigenthings"] = self.eigenthings
        return found

    def by_hand(self) -> Product:
        params = list(self.model.parameters())
        grads = torch.autograd.grad(self.criterion(self.model(self.x), self.y), params, create_graph=True)
        return lambda v: flat(torch.autograd.grad(grads, params, self.L.split(v), retain_graph=True))

    def scipy(self) -> Product:
        products = HessianProducts(self.L, self.L.params())
        products.value_and_gradient()
        H = cl.hessian(self.L, products=products).to_scipy()
        return lambda v: torch.from_numpy(H @ v.cpu().numpy()).to(v.device)

    def pyhessian_batch(self) -> Product:
        from pyhessian.utils import hessian_vector_product

        made = self._pyhessian(data=(self.x, self.y))
        return lambda v: flat(hessian_vector_product(made.gradsH, made.params, self.L.split(v)))

    def pyhessian_loader(self) -> Product:
        size = -(-len(self.x) // BATCHES)
        made = self._pyhessian(dataloader=list(zip(self.x.split(size), self.y.split(size), strict=True)))
        return lambda v: flat(made.dataloader_hv_product(self.L.split(v))[1])

    def _pyhessian(self, **data: Any) -> Any:
        from pyhessian import hessian

        warnings.filterwarnings("ignore", message=".*create_graph=True.*")  # that is how it works
        return hessian(copy.deepcopy(self.model), self.criterion, cuda=self.v.is_cuda, **data)

    def curvlinops(self) -> Product:
        from curvlinops import HessianLinearOperator

        params = [p for p in self.model.parameters() if p.requires_grad]
        data = [(self.x, self.y)]
        H = HessianLinearOperator(self.model, self.criterion, params, data, check_deterministic=False)
        return lambda v: H @ v

    def eigenthings(self) -> Product:
        from hessian_eigenthings import HessianOperator, supervised_loss

        return HessianOperator(self.model, [(self.x, self.y)], supervised_loss(self.criterion)).matvec


class Outputs(nn.Module):
    """A model whose outputs have the classes where `nn.CrossEntropyLoss` has them."""

    def __init__(self, model: nn.Module, *, tokens: bool) -> None:
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).mT if self.tokens else self.model(x)


def flat(parts: Any) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def prepared(model: str, n: int | None, name: str, device: str) -> Callable[[], Any]:
    """What a fresh process does while its memory is watched."""
    small = Contest(model, 2, device)
    small.starts(compiled=True)[name]()(small.v)  # what is loaded on first use is not a product's
    contest = Contest(model, n, device)
    start = contest.starts(compiled=True)[name]

    def job() -> None:
        product = start()
        for _ in range(2):
            product(contest.v)

    return job


if __name__ == "__main__":
    main()
