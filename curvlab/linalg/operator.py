"""A symmetric matrix that is known only by its products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..memory import require
from .rows import Rows, rows_of


@dataclass(frozen=True)
class LinearOperator:
    """A symmetric matrix A of size (P, P), known only by ``A @ v`` and ``A @ V``.

    Everything in `curvlab.linalg` uses only `shape`, `dtype`, `device` and ``@``, so a dense symmetric tensor is
    as good an operand as this class.

    Attributes:
        matmat: the product of A with a block of columns, (P, K) -> (P, K).
        size: P.
        dtype, device: of the vectors that it takes and returns.
        name: what it is, for messages.
        errors: of each product so far that was off by more than rounding: of unit vectors, how far it was off, and how long
            it was, at most.
        rows: which rows of its vectors are here, where several processes hold parts of them; None for all.
    """

    matmat: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")  # noqa: RUF009  a torch.device is immutable
    name: str = "A"
    errors: list[tuple[float, float]] = field(default_factory=list)
    rows: Rows | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size, self.size)

    def __matmul__(self, V: Tensor) -> Tensor:
        """A @ V for V of shape (P,) or (P, K), or of the rows of it that are here.

        Raises:
            ValueError: if the shape, dtype or device of V does not fit.
        """
        here = rows_of(self).count
        if V.ndim not in (1, 2) or V.shape[0] != here:
            some = "" if here == self.size else f", of which {here} rows are on this rank"
            raise ValueError(
                f"{self.name} is {self.size} x {self.size}{some}; it cannot multiply shape {tuple(V.shape)}. "
                f"Pass ({here},) or ({here}, K)"
            )
        if V.dtype != self.dtype or V.device != self.device:
            raise ValueError(
                f"{self.name} works in {self.dtype} on {self.device}, but got {V.dtype} on {V.device}. "
                f"Convert with V.to({self.name}.device, {self.name}.dtype)"
            )
        V = V.detach()
        return self.matmat(V[:, None])[:, 0] if V.ndim == 1 else self.matmat(V)

    def to_scipy(self) -> Any:
        """The same matrix as a `scipy.sparse.linalg.LinearOperator`, with numpy vectors on the host."""
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def product(V: Any) -> Any:
            return (self @ torch.as_tensor(V).to(self.device, self.dtype)).cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return ScipyOperator(self.shape, matvec=product, matmat=product, rmatvec=product, dtype=numpy_dtype)


def relative_error(errors: Sequence[tuple[float, float]]) -> float:
    """How far products were off at most, relative to the longest; 0 without any."""
    worst, longest = (max(column) for column in zip(*errors, strict=True)) if errors else (0.0, 0.0)
    return worst / longest if longest else 0.0


def from_scipy(A: Any, *, name: str = "A") -> LinearOperator:
    """A scipy sparse matrix, numpy array or `scipy.sparse.linalg.LinearOperator` as a `LinearOperator`.

    Raises:
        ValueError: if it is not square, or not float32 or float64.
    """
    dtype = {"float32": torch.float32, "float64": torch.float64}.get(str(A.dtype))
    if len(A.shape) != 2 or A.shape[0] != A.shape[1] or dtype is None:
        raise ValueError(f"got shape {A.shape} and dtype {A.dtype}; expected a square matrix of float32 or float64")
    return LinearOperator(lambda V: torch.as_tensor(A @ V.numpy(), dtype=dtype), A.shape[0], dtype, name=name)


def dense(A: LinearOperator | Tensor) -> Tensor:
    """All entries of A, (P, P), by P products: for small matrices and for tests.

    Raises:
        MemoryError: they would not fit in the memory that is free.
    """
    P = A.shape[0]
    require(2 * P * P * A.dtype.itemsize, A.device, f"a dense matrix of {P} rows", "use eigsh or trace, which take products")
    rows, E = rows_of(A), torch.eye(P, dtype=A.dtype, device=A.device)
    if rows.here is None:
        return A @ E
    return rows.sum(torch.zeros_like(E).index_copy(0, rows.here.to(A.device), A @ E[rows.here]))
