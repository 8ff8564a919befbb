"""Packages that curvlab can do without: imported when first needed, and named when they are missing or broken."""

from __future__ import annotations

import importlib
from types import ModuleType


def require_package(name: str, install: str) -> ModuleType:
    """Import an optional package.

    Args:
        name: of the module, such as "pandas" or "lightning.pytorch".
        install: what brings it, as pip takes it, such as "curvlab[pandas]".

    Raises:
        ImportError: the package is missing, or breaks while it is imported; one line with the remedy.

    Example:
        >>> require_package("math", "curvlab").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package beside another torch than its own breaks with errors of every kind
        package = name.split(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        reason = (
            "is not installed" if missing else f"does not import ({type(error).__name__}: {error})".replace("\n", " ")
        )
        remedy = f"pip install '{install}'" if missing else "install a version that fits your torch, or remove it"
        raise ImportError(f"{package} {reason}: {remedy}") from None
