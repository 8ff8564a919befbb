"""Figures. Imports no torch: a log, or what was measured, is all that a figure needs."""

from .bands import bands, common
from .points import density, lines, measurements, plane
from .runs import batch_sizes, edge_of_stability, figures, loss_difference, plot, quantities
from .style import save
from .sweeps import sweep

__all__ = [
    "bands",
    "batch_sizes",
    "common",
    "density",
    "edge_of_stability",
    "figures",
    "lines",
    "loss_difference",
    "measurements",
    "plane",
    "plot",
    "quantities",
    "save",
    "sweep",
]
