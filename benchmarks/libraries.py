"""curvlab and three other libraries behind the same few questions. Hides how each is called.

Each is used as its documentation shows: PyHessian with one batch or a loader, on the CPU; curvlinops with the parameters
that require gradients, its check for determinism on, eigenvalues by scipy's eigsh and traces by its xtrace;
hessian-eigenthings by its Lanczos and its Hutch++. What a library has no way to be asked raises `NotApplicable`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class NotApplicable(Exception):
    """The library has no such feature; the text says which."""


@dataclass(frozen=True)
class Values:
    """Eigenvalues or one trace, (k,); what the library says of the error, and of the convergence of each, where it does."""

    values: Tensor
    bound: float | None = None
    converged: Tensor | None = None


class Mean(nn.Module):
    """A criterion, the mean of ``each(outputs, targets)`` (B,)."""

    reduction = "mean"

    def __init__(self, each: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.each = each

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.each(outputs, targets).mean()


class Library:
    """The Hessian of the mean of `criterion` over `data`, an iterable of (inputs, targets), where the model stands now."""

    def __init__(self, model: nn.Module, criterion: Any, data: Any) -> None:
        raise NotImplementedError

    def product(self, v: Tensor) -> Tensor:
        """H v of a flat (P,) vector."""
        raise NotImplementedError

    def top(self, k: int, *, products: int | None = None, start: Tensor | None = None) -> Values:
        """The k algebraically largest eigenvalues."""
        raise NotImplementedError

    def smallest(self) -> Values:
        """The algebraically smallest eigenvalue."""
        raise NotImplementedError

    def trace(self, seed: int) -> Values:
        """With about 100 products."""
        raise NotImplementedError


class Curvlab(Library):
    def __init__(self, model: nn.Module, criterion: Any, data: Any) -> None:
        import curvlab as cl

        loss = criterion.each if isinstance(criterion, Mean) else criterion
        if isinstance(data, list) and isinstance(data[0][0], Mapping):  # which it would pass on as keyword arguments
            loss = cl.batch_loss(lambda model, batch: nn.CrossEntropyLoss(reduction="none")(model(batch[0]), batch[1]))
        self.cl, self.H = cl, cl.hessian(cl.Objective(model, loss, data))

    def product(self, v: Tensor) -> Tensor:
        return self.H @ v.to(self.H.dtype)

    def top(self, k: int, *, products: int | None = None, start: Tensor | None = None) -> Values:
        return self._values(k, max_matvecs=products, start=None if start is None else start[:, None])

    def smallest(self) -> Values:
        return self._values(1, which="SA")

    def _values(self, k: int, **options: Any) -> Values:
        found = self.cl.eigsh(self.H, k, generator=torch.Generator().manual_seed(0), **options)
        bound, converged = float(found.residuals.max()) + found.floor, torch.full((k,), found.converged)
        return Values(found.values, bound, converged)

    def trace(self, seed: int) -> Values:
        found = self.cl.trace(self.H, num_matvecs=100, generator=torch.Generator().manual_seed(seed))
        low, high = found.interval(0.95)
        return Values(torch.tensor([found.value]), (high - low) / 2)


class PyHessian(Library):
    def __init__(self, model: nn.Module, criterion: Any, data: Any) -> None:
        from pyhessian import hessian

        one = isinstance(data, list) and len(data) == 1
        self.made = hessian(
            model, criterion, data=data[0] if one else None, dataloader=None if one else data, cuda=False
        )

    def product(self, v: Tensor) -> Tensor:
        from pyhessian.utils import hessian_vector_product

        made, sizes = self.made, [p.numel() for p in self.made.params]
        parts = [part.view_as(p) for part, p in zip(v.split(sizes), made.params, strict=True)]
        if made.full_dataset:
            return flat(made.dataloader_hv_product(parts)[1])
        return flat(hessian_vector_product(made.gradsH, made.params, parts))

    def top(self, k: int, *, products: int | None = None, start: Tensor | None = None) -> Values:
        if start is not None:
            raise NotApplicable("takes no start vector")
        values, _ = self.made.eigenvalues(top_n=k, **({} if products is None else {"maxIter": products}))
        return Values(torch.tensor(values))

    def smallest(self) -> Values:
        raise NotApplicable("largest in magnitude only")

    def trace(self, seed: int) -> Values:
        torch.manual_seed(seed)
        return Values(torch.tensor(self.made.trace()).mean()[None])


class Curvlinops(Library):
    def __init__(self, model: nn.Module, criterion: Any, data: Any) -> None:
        from curvlinops import HessianLinearOperator

        params = [p for p in model.parameters() if p.requires_grad]
        mapping = isinstance(data, list) and isinstance(data[0][0], Mapping)
        options = {"batch_size_fn": lambda x: len(next(iter(x.values())))} if mapping else {}
        with contextlib.redirect_stdout(io.StringIO()):  # its check prints
            self.H = HessianLinearOperator(model, criterion, params, data, **options)

    def product(self, v: Tensor) -> Tensor:
        return self.H @ v.to(self.H.dtype)

    def top(self, k: int, *, products: int | None = None, start: Tensor | None = None) -> Values:
        options = {} if products is None else {"maxiter": products, "ncv": 2}
        return self._values(k, v0=None if start is None else start.numpy(), **options)

    def smallest(self) -> Values:
        return self._values(1, which="SA")

    def _values(self, k: int, which: str = "LA", **options: Any) -> Values:
        from scipy.sparse.linalg import ArpackNoConvergence, eigsh

        try:
            values, _ = eigsh(self.H.to_scipy(), k, which=which, **options)
        except ArpackNoConvergence as error:  # which carries what has converged
            return Values(torch.as_tensor(error.eigenvalues), converged=torch.zeros(k, dtype=torch.bool))
        return Values(torch.tensor(values[::-1].copy()), converged=torch.ones(k, dtype=torch.bool))

    def trace(self, seed: int) -> Values:
        from curvlinops import xtrace

        torch.manual_seed(seed)
        return Values(xtrace(self.H, 100)[None])


class Eigenthings(Library):
    def __init__(self, model: nn.Module, criterion: Any, data: Any) -> None:
        from hessian_eigenthings import HessianOperator, supervised_loss

        self.H = HessianOperator(model, data, supervised_loss(criterion))

    def product(self, v: Tensor) -> Tensor:
        return self.H @ v.to(self.H.dtype)

    def top(self, k: int, *, products: int | None = None, start: Tensor | None = None) -> Values:
        from hessian_eigenthings import power_iteration_one

        if start is not None:
            value, _, residual, _, converged = power_iteration_one(self.H, init=start)
            return Values(torch.tensor([value]), residual, torch.tensor([converged]))
        return self._values(k, products or max(2 * k, 40), "LA")

    def smallest(self) -> Values:
        return self._values(1, 40, "SA")

    def _values(self, k: int, steps: int, which: str) -> Values:
        from hessian_eigenthings import lanczos

        found = lanczos(self.H, k=k, max_iter=min(steps, self.H.size), which=which, seed=0)
        return Values(found.eigenvalues, float(found.residuals.max()), found.converged)

    def trace(self, seed: int) -> Values:
        from hessian_eigenthings import trace

        found = trace(self.H, seed=seed)
        return Values(torch.tensor([found.estimate]), 2 * found.stderr)


LIBRARIES: dict[str, tuple[str, type[Library]]] = {  # name: what is imported, and the class above
    "curvlab": ("curvlab", Curvlab),
    "PyHessian": ("pyhessian", PyHessian),
    "curvlinops": ("curvlinops", Curvlinops),
    "hessian-eigenthings": ("hessian_eigenthings", Eigenthings),
}


def flat(parts: Any) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])
