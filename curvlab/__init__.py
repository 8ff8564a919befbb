"""Curvature and gradient noise of a training loss, with error bars. The public names; they load on first use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# No module at this level is named like a function here: importing the module would hide the function.
_HOME = {
    "Objective": "objective",
    "batch_loss": "losses",
    "Batches": "batches",
    "Measurement": "measurement",
    "Snapshot": "snapshot",
    "LinearOperator": "linalg",
    "Eigenpairs": "linalg",
    "eigsh": "linalg",
    "trace": "linalg",
    "spectral_density": "linalg",
    "dense": "linalg",
    "hessian": "operators",
    "ggn": "operators",
    "gradient_second_moment": "operators",
    "fisher": "operators",
    "gradient_covariance": "operators",
    "diagnostic": "diagnostics.registry",
    "measure": "point",
    "plan": "planning",
    "verify": "verification",
    "train": "trainer",
    "gradient_flow": "flow",
    "Monitor": "monitor",
    "Run": "runs",
}
_MODULES = (
    "claims", "diagnostics", "integrations", "landscape", "linalg", "methods", "operators", "plots", "problems",
    "regularizers", "sweep", "tables",
)  # fmt: skip

__all__ = [
    "Objective", "batch_loss", "Batches", "Measurement", "Snapshot",
    "LinearOperator", "Eigenpairs", "eigsh", "trace", "spectral_density", "dense",
    "hessian", "ggn", "fisher", "gradient_second_moment", "gradient_covariance",
    "diagnostic", "measure", "plan", "verify", "train", "gradient_flow", "Monitor", "Run",
    "claims", "diagnostics", "integrations", "landscape", "linalg", "methods", "operators", "plots", "problems",
    "regularizers", "sweep", "tables",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"curvlab.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"curvlab.{name}")
    else:
        raise AttributeError(f"curvlab has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
