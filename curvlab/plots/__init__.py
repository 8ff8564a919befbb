"""Figures. Imports no torch: a log, or what was measured, is all that a figure needs."""

from .bands import bands, common
from .points import density, lines, measurements, plane
from .runs import batch_sizes, edge_of_stability, figures, loss_difference, plot, quantities
from .style import axes_of, colours, save
from .sweeps import curves, panels, sweep
from .throughput import throughput

__all__ = [
    "axes_of",
    "bands",
    "batch_sizes",
    "colours",
    "common",
    "curves",
    "density",
    "edge_of_stability",
    "figures",
    "lines",
    "loss_difference",
    "measurements",
    "panels",
    "plane",
    "plot",
    "quantities",
    "save",
    "sweep",
    "throughput",
]
