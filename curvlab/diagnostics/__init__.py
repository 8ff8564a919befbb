"""One file per family of diagnostics; importing this package fills the registry."""

from . import interaction, noise, spectrum, values
from .registry import DIAGNOSTICS, diagnostic, evaluate, parse, require

__all__ = [
    "DIAGNOSTICS",
    "diagnostic",
    "evaluate",
    "interaction",
    "noise",
    "parse",
    "require",
    "spectrum",
    "values",
]
