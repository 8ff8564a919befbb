"""Named models and data, small enough for a laptop; hides which file each one is in."""

from curvlab.problems.data import DATA, digits, linear_regression
from curvlab.problems.models import MODELS, cnn, linear, mlp

__all__ = ["DATA", "MODELS", "cnn", "digits", "linear", "linear_regression", "mlp"]
