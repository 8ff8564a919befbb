"""Which rows of all vectors are here: all of them, or those of this process, where several hold one vector together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**20  # rows that are drawn at once where some are kept; torch draws the same numbers in blocks of multiples of 16


@dataclass(frozen=True)
class Rows:
    """The rows of vectors that this process holds, and what is taken over the rows of all processes.

    Attributes:
        size: how many there are in all.
        here: (n,) which of them are here, ascending; None for all.
        ranks: that hold the others, a `curvlab.ranks.Ranks`.
    """

    size: int
    here: Tensor | None = None
    ranks: Any = None

    @property
    def count(self) -> int:
        """How many are here."""
        return self.size if self.here is None else len(self.here)

    def sum(self, own: Tensor) -> Tensor:
        """Sums over the rows that are here, such as VᵀW, as sums over all of them."""
        return own if self.here is None or not own.numel() else self.ranks.sum(own)[0]

    def norms(self, V: Tensor) -> Tensor:
        """Lengths of the columns, or of a vector, float64."""
        own = torch.linalg.vector_norm(V, dim=0, dtype=torch.float64)
        return own if self.here is None else self.sum(own.square()).sqrt()

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """uᵀv of two vectors, float64."""
        return self.sum(u.double() @ v.double())

    def largest(self, V: Tensor) -> Tensor:
        """The entry of largest magnitude of each column, (1, K)."""
        if self.here is not None:
            V = self.ranks.gather(Rows(len(V) + 1).largest(torch.cat([V, V.new_zeros(1, V.shape[1])])), self.ranks.count)
        return V.gather(0, V.abs().argmax(0, keepdim=True))

    def qr(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """An orthonormal basis Q of the columns, of which the rows that are here, and R with V = QR."""
        Q, R = torch.linalg.qr(V)
        if self.here is None:
            return Q, R
        m, lacking = V.shape[1], V.shape[1] - len(R)  # fewer rows than columns are here
        R = torch.cat([R, R.new_zeros(lacking, m)])
        outer, R = torch.linalg.qr(self.ranks.gather(R, m * self.ranks.count))
        return Q @ outer[m * self.ranks.rank :][: m - lacking], R

    def drawn(self, draw: Callable[[int], Tensor]) -> Tensor:
        """The rows that are here of what `draw`, (rows) -> (rows, K), draws for all, the same for any division."""
        if self.here is None:
            return draw(self.size)
        parts, first = [], 0
        while first < self.size:
            some = BLOCK if self.size - first >= 2 * BLOCK else self.size - first
            lo, hi = torch.searchsorted(self.here, torch.tensor([first, first + some])).tolist()
            block = draw(some)
            parts.append(block[(self.here[lo:hi] - first).to(block.device)])
            first += some
        return torch.cat(parts)


def rows_of(A: Any) -> Rows:
    """Those of the vectors of a `LinearOperator`, or of a dense matrix."""
    return getattr(A, "rows", None) or Rows(A.shape[0])
