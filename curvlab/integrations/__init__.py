"""Other people's frameworks: a file for each, imported only when asked for, so that curvlab needs none of them.

| file | for | gives |
|---|---|---|
| `lightning` | Lightning's Trainer | `CurvatureCallback` |
| `transformers` | Hugging Face's Trainer | `CurvatureCallback` |
| `accelerate` | a loop with accelerate | `monitor(accelerator, ...)` |
| `fabric` | a loop with Lightning Fabric | `monitor(fabric, ...)` |
| `tensorboard` | TensorBoard and tensorboardX | `tracker(writer)`, for `log=` |
| `wandb` | Weights & Biases | `tracker(run)`, for `log=` |

What takes (dict, step=...) needs no file here: ``Monitor(..., log=trackio)``, ``log=mlflow.log_metrics``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__all__ = sorted(module.name for module in pkgutil.iter_modules(__path__))


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"curvlab.integrations has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
