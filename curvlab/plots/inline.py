"""A figure that a notebook shows."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Inline(Figure):
    """A figure that a notebook shows where it is the last expression of a cell, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
