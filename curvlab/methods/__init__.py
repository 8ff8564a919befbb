"""Optimizers that the papers define; importing this package fills the registry."""

from .anti_pgd import AntiPGD
from .base import Method
from .grafting import ExternalGrafting, Grafting, IterativeGrafting, NormalizedGD
from .n_step import NStepSGD
from .noise import SDE, NoisyGD
from .registry import METHODS, method

__all__ = [
    "METHODS",
    "AntiPGD",
    "ExternalGrafting",
    "Grafting",
    "IterativeGrafting",
    "Method",
    "NStepSGD",
    "NoisyGD",
    "NormalizedGD",
    "SDE",
    "method",
]
