"""Problems to measure on: models, data that needs no download, and presets. Names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "digits": "data",
    "linear_regression": "data",
    "DATA": "data",
    "MODELS": "models",
    "mlp": "models",
    "cnn": "models",
    "linear": "models",
    "Experiment": "presets",
    "PRESETS": "presets",
    "build": "presets",
}

__all__ = ["digits", "linear_regression", "mlp", "cnn", "linear", "DATA", "MODELS", "Experiment", "PRESETS", "build"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"curvlab.problems has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"curvlab.problems.{_HOME[name]}"), name)
