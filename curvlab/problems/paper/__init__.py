"""The papers' experiments with the papers' models, data and lengths: presets and studies by the names of the small ones.

Every setting carries its source (`Study.sources`, `Row.sources`): the place in the paper that states it, or "ours" and why.
Imports no torch.
"""

from __future__ import annotations

from .figures import FIGURES, PAPER, Figure

__all__ = ["FIGURES", "PAPER", "Figure"]
