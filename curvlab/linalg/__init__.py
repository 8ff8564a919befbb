"""Linear algebra that knows a matrix only by ``A @ V``; a dense tensor is as good as a `LinearOperator`."""

from .lanczos import Eigenpairs, eigsh, orthonormalize
from .operator import LinearOperator, dense, from_scipy
from .trace import trace

__all__ = ["Eigenpairs", "LinearOperator", "dense", "eigsh", "from_scipy", "orthonormalize", "trace"]
