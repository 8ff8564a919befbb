"""The papers' experiments with the papers' models, data and lengths: presets and studies by the names of the small ones.

Every setting carries its source (`Study.sources`, `Row.sources`): the place in the paper that states it, or "ours" and why.
Imports no torch.
"""

from __future__ import annotations

from ..studies import Study
from .lee import LEE
from .novack import NOVACK
from .smith import SMITH

PAPER: dict[str, Study] = LEE | SMITH | NOVACK

__all__ = ["PAPER"]
