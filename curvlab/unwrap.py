"""The module and the optimizer inside what frameworks wrap around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# By name, so that none of the frameworks is imported: wrapper -> where it keeps what it wraps.
_MODULES = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "_FabricModule": "module",
}
_OPTIMIZERS = {"AcceleratedOptimizer", "_FabricOptimizer", "LightningOptimizer"}


def unwrap(model: nn.Module) -> nn.Module:
    """The module that was compiled, made distributed, or set up by Fabric or accelerate.

    A wrapper's own forward pass synchronizes ranks, casts, or is compiled; what is measured is the module itself. The
    parameters are the same tensors. (accelerate's mixed precision sits in a patched `forward`, which `curvlab.guard` puts
    aside while measuring.)

    Raises:
        ValueError: a wrapper that shards the parameters.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> unwrap(torch.nn.DataParallel(torch.compile(layer))) is layer
        True
    """
    name = type(model).__name__
    if name == "FullyShardedDataParallel":
        raise ValueError(
            "the model is wrapped in FullyShardedDataParallel, which keeps parameters flat and in parts; shard it with "
            "torch.distributed.fsdp.fully_shard instead, and what is sharded is measured as it is, or measure a copy of it"
        )
    return unwrap(getattr(model, _MODULES[name])) if name in _MODULES else model


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the wrapper of Lightning, Fabric or accelerate."""
    # Fabric's and Lightning's wrappers give each object a class of its own, such as FabricSGD, below the one named here.
    wrapped = any(base.__name__ in _OPTIMIZERS for base in type(optimizer).__mro__)
    return unwrap_optimizer(optimizer.optimizer) if wrapped else optimizer
