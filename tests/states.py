"""All that a measurement must leave as it was, and a small network in the middle of training to look at it.

Shared by the tests of one measurement (test_guard.py) and of whole trainings (test_observer.py).
"""

from __future__ import annotations

import random
import warnings

import numpy as np
import torch
from torch import nn

import curvlab as cl
from curvlab.diagnostics import DIAGNOSTICS

AT_A_POINT = [name for name, entry in DIAGNOSTICS.items() if not {"batch_gradient", "preconditioner"} & {*entry.needs}]
WHILE_TRAINING = [name for name, entry in DIAGNOSTICS.items() if "preconditioner" not in entry.needs]
CHEAPER = {"hessian_density": {"num_probes": 2, "steps": 4, "points": 9}, "directional_alignment": {"alphas": (1.0,)}}
N = 24  # more than the number of probes, so that estimates are estimates


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = seeded(N, 4), torch.arange(N) % 3
TEST = seeded(10, 4, seed=1), torch.arange(10) % 3


class Remembering(nn.Module):
    """Counts its calls, on which training may depend, and leaves its input for the training step to read."""

    def __init__(self, growth):
        super().__init__()
        self.growth, self.calls, self.last = growth, 0, None

    def forward(self, x):
        self.calls += 1
        self.last = x
        return x * (1 + self.growth * self.calls) if self.training else x


def build(seed=0, *, dropout=True, norm=True, growth=0.0):
    """Dropout, batch normalization that trains, and batch normalization that is frozen; or without."""

    def normalization(n):
        return nn.BatchNorm1d(n) if norm else nn.Identity()

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = nn.Sequential(nn.Linear(4, 6), normalization(6), nn.Tanh(), nn.Dropout(0.4 if dropout else 0.0))
        model = nn.Sequential(*first, nn.Linear(6, 5), normalization(5), Remembering(growth), nn.Linear(5, 3))
        if norm:
            model[5].running_mean.normal_()
            model[5].requires_grad_(False).eval()
        return model


STEP = {"batch_size": 5, "lr": 0.1}


def objectives(model, loss="cross_entropy"):
    return cl.Objective(model, loss, (X, Y), chunk_size=16), cl.Objective(model, "cross_entropy", TEST)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def asked(names):
    """The diagnostics with options that make the dear ones cheaper."""
    return [(name, CHEAPER.get(name, {})) for name in names]


def flags():
    """Global settings of torch that change what a training step computes."""
    out = {}
    for backend in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"):
        module = torch.backends
        for part in backend.split("."):
            module = getattr(module, part)
        out[backend] = module.fp32_precision
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    for kernel in ("flash", "mem_efficient", "math", "cudnn"):
        out[kernel] = getattr(cuda, f"{kernel}_sdp_enabled")()
    out["cudnn"] = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    out["fastpath"] = torch.backends.mha.get_fastpath_enabled()
    out["matmul"] = torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32
    out["autocast"] = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    out["autocast dtypes"] = torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")
    out["autocast cache"] = torch.is_autocast_cache_enabled()
    out["modes"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    out["deterministic"] = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    out["anomaly"] = torch.is_anomaly_enabled()
    out["stance"] = torch._dynamo.eval_frame._stance.stance
    out["warnings"] = list(warnings.filters)
    return out


def random_states():
    numpy = np.random.get_state()
    cuda = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else []
    return torch.get_rng_state().tolist(), random.getstate(), [numpy[0], numpy[1].tolist(), *numpy[2:]], cuda


def tensors(tree):
    """A copy of nested containers with tensors as lists, to be compared with ==."""
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tree.tolist()
    if isinstance(tree, dict):
        return {key: tensors(value) for key, value in tree.items()}
    return [tensors(value) for value in tree] if isinstance(tree, list | tuple) else tree


def state(model, optimizer=None):
    """All that a measurement must leave as it was."""
    return {
        "parameters": {name: (id(p), p._version, tensors(p.detach())) for name, p in model.named_parameters()},
        "gradients": {name: (id(p.grad), tensors(p.grad)) for name, p in model.named_parameters()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "buffers": {name: (id(b), b._version, tensors(b)) for name, b in model.named_buffers()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [list(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "attributes": {
            name: {key: id(value) for key, value in vars(module).items()} for name, module in model.named_modules()
        },
        "optimizer": None if optimizer is None else tensors(optimizer.state_dict()),
        "random": random_states(),
        "seeds for GPUs not in use yet": [id(call) for call in torch.cuda._lazy_seed_tracker.get_calls()],
        "flags": flags(),
    }


def numbers(m):
    """Everything but what it cost: shared products count for the first to ask."""
    return str((tensors(m.to_dict()) | {"matvecs": 0, "seconds": 0}, m.df, m.floor, m.axis))
