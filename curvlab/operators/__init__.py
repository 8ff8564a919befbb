"""One file per matrix: an `Objective` and a point become a `LinearOperator`."""

from .fisher import fisher
from .ggn import ggn
from .gradient_moments import gradient_covariance, gradient_second_moment, noise_share
from .hessian import hessian

__all__ = ["fisher", "ggn", "gradient_covariance", "gradient_second_moment", "hessian", "noise_share"]
