"""Ranks that start quickly: forked from a process that has imported what they need, and has done nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

IMPORTED = ["curvlab", "curvlab.cli", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "pytest"]


def together(work: Callable[..., None], count: int, *arguments: object, join: bool = True) -> Any:
    """``work(rank, *arguments)`` in each of `count` processes; what runs, where it is not waited for."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return torch.multiprocessing.start_processes(work, arguments, count, join=join, start_method="forkserver")
