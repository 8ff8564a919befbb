"""One file per family of diagnostics; importing this package fills the registry."""

from . import values, noise, covariance, interaction, spectrum, traces, fisher, blocks, stability, forward
from . import trajectory, penalties
from .registry import DIAGNOSTICS, diagnostic, evaluate, parse, require

__all__ = [
    "DIAGNOSTICS",
    "diagnostic",
    "evaluate",
    "parse",
    "require",
    "values",
    "noise",
    "covariance",
    "interaction",
    "spectrum",
    "traces",
    "fisher",
    "blocks",
    "stability",
    "forward",
    "trajectory",
    "penalties",
]
