"""A figure that a notebook shows."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text


class Inline(Figure):
    """A figure that a notebook shows where it is the last expression of a cell, without pyplot."""

    def draw(self, renderer: Any) -> None:
        """Draw; dollar signs of a user's names, which are no formula, are shown as they are."""
        for text in self.findobj(Text):
            if "$" in text.get_text():
                try:
                    MathTextParser("agg").parse(text.get_text())
                except ValueError:
                    text.set_parse_math(False)
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
