"""Penalties of (objective, params, batch): one function of a micro-batch each; importing this package fills the registry."""

from .fisher_trace import fisher_trace_penalty
from .gradient_norm import gradient_norm_difference_penalty, gradient_norm_penalty, sampled_gradient_norm_penalty
from .implicit import implicit_regularizer, implicit_regularizer_mean, implicit_regularizer_variance
from .jacobian import average_jacobian_penalty, unit_jacobian_penalty
from .micro_batch import MicroBatch
from .registry import REGULARIZERS, regularizer, resolve

__all__ = [
    "REGULARIZERS",
    "MicroBatch",
    "average_jacobian_penalty",
    "fisher_trace_penalty",
    "gradient_norm_difference_penalty",
    "gradient_norm_penalty",
    "implicit_regularizer",
    "implicit_regularizer_mean",
    "implicit_regularizer_variance",
    "regularizer",
    "resolve",
    "sampled_gradient_norm_penalty",
    "unit_jacobian_penalty",
]
