"""One file per family of diagnostics; importing this package fills the registry."""

from . import blocks, covariance, fisher, interaction, noise, spectrum, stability, traces, values
from .registry import DIAGNOSTICS, diagnostic, evaluate, parse, require

__all__ = [
    "DIAGNOSTICS",
    "diagnostic",
    "evaluate",
    "parse",
    "require",
    "blocks",
    "covariance",
    "fisher",
    "interaction",
    "noise",
    "spectrum",
    "stability",
    "traces",
    "values",
]
