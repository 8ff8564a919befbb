"""Linear algebra that knows a matrix only by ``A @ V``; a dense tensor is as good as a `LinearOperator`."""

from .density import SpectralDensity, quadrature, spectral_density, tridiagonal
from .lanczos import Eigenpairs, eigsh, orthonormalize
from .operator import LinearOperator, dense, from_scipy, relative_error
from .trace import trace

__all__ = [
    "Eigenpairs",
    "LinearOperator",
    "SpectralDensity",
    "dense",
    "eigsh",
    "from_scipy",
    "orthonormalize",
    "quadrature",
    "relative_error",
    "spectral_density",
    "trace",
    "tridiagonal",
]
