"""Figures. Imports no torch: a log, or what was measured, is all that a figure needs."""

from .bands import bands
from .points import density, lines, measurements, plane
from .runs import batch_sizes, edge_of_stability, loss_difference, plot, quantities
from .style import save
from .sweeps import sweep

__all__ = [
    "bands",
    "batch_sizes",
    "density",
    "edge_of_stability",
    "lines",
    "loss_difference",
    "measurements",
    "plane",
    "plot",
    "quantities",
    "save",
    "sweep",
]
