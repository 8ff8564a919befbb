"""What an optimizer is about to do, read from its own state: its preconditioner, and where it becomes unstable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .objective import Objective

ADAPTIVE = ("Adam", "AdamW", "RMSprop")


def settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Name and plain settings of the optimizer: those of the first parameter group, and where other groups differ, a list
    "differing" of the settings' names."""
    groups = [
        {key: value for key, value in group.items() if isinstance(value, bool | int | float | str | tuple)}
        for group in optimizer.param_groups
    ]
    differing = sorted({key for group in groups for key in group if group[key] != groups[0].get(key)})
    return {"name": type(optimizer).__name__, **groups[0]} | ({"differing": differing} if differing else {})


def learning_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate, if all groups have the same."""
    rates = {float(group["lr"]) for group in optimizer.param_groups if "lr" in group}
    return rates.pop() if len(rates) == 1 else None


def weight_decay(optimizer: torch.optim.Optimizer) -> float:
    """The weight decay w that the optimizer adds to the gradient, as that of (w/2) ‖w‖² in the loss; 0 where decoupled.

    Raises:
        ValueError: parameter groups that differ in it.
    """
    found = {
        0.0 if group.get("decoupled_weight_decay") or isinstance(optimizer, torch.optim.AdamW)
        else float(group.get("weight_decay", 0.0))
        for group in optimizer.param_groups
    }  # fmt: skip
    if len(found) > 1:
        raise ValueError(
            f"parameter groups have weight decays {sorted(found)}; the trained objective needs one; measure the loss "
            "itself, without the prefix trained/"
        )
    return found.pop()


def stability_threshold(settings: dict[str, Any], lr: float) -> float | None:
    """The (preconditioned) sharpness above which the step diverges on a quadratic; None where no formula is known.

    From the linear recursion of the optimizer on one eigendirection with eigenvalue λ (of P^{-1/2} H P^{-1/2} for adaptive
    ones, whose P is taken as constant): gradient descent 2/lr; Polyak momentum β with torch's update (2 + 2β)/lr; Nesterov
    (2 + 2β)/(lr (1 + 2β)); Adam (2 + 2β₁)/((1 - β₁) lr), 38/lr at β₁ = 0.9; RMSprop 2/lr, with its own momentum (2 + 2β)/lr.
    Weight decay w in the gradient (SGD, Adam, RMSprop) shifts λ by w, and for SGD the threshold is lowered by it; decoupled
    decay (AdamW) is neglected, being lr·w ≪ 1.

    Source: Cohen et al. 2021 (arXiv 2103.00065), sec. 2 and App. B; Cohen et al. 2022 (arXiv 2207.14484), sec. 3.
    """
    name, momentum = settings.get("name"), float(settings.get("momentum", 0.0) or 0.0)
    if settings.get("maximize") or settings.get("amsgrad") or settings.get("centered"):
        return None
    if name == "SGD":
        # torch applies dampening to the gradient's share in the momentum buffer
        gain = (1 - float(settings.get("dampening", 0.0))) if momentum else 1.0
        shape = (1 + 2 * momentum) if settings.get("nesterov") else 1.0
        if gain != 1.0 and settings.get("nesterov"):
            return None
        return (2 + 2 * momentum) / (lr * shape * gain) - float(settings.get("weight_decay", 0.0))
    if name in ("Adam", "AdamW"):
        beta = float(settings["betas"][0])
        return (2 + 2 * beta) / ((1 - beta) * lr)
    if name == "RMSprop":
        return (2 + 2 * momentum) / lr
    return None


def flat_gradient(L: Objective) -> Tensor:
    """(P,) the gradient in the live model's `.grad`, zero where there is none."""
    return L.join([L.held(torch.zeros_like(p) if p.grad is None else p.grad) for p in L.variables()])


def preconditioner(optimizer: torch.optim.Optimizer, L: Objective, *, coming: bool = True) -> Tensor | None:
    """(P,) diagonal of the matrix that the next step divides the gradient by; None for optimizers without one.

    From the second moments *after* the gradient in `.grad` has entered them, with bias correction and ε as torch applies
    them: Adam and AdamW √(v_{t+1}/(1 - β₂^{t+1})) + ε, RMSprop √v_{t+1} + ε. Where the gradient of the coming step is not
    known (``coming=False``), that of the last step; None before the first.

    Source: Cohen et al. 2022 (arXiv 2207.14484), sec. 2.
    """
    name = type(optimizer).__name__
    if name not in ADAPTIVE:
        return None
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parts = []
    for p in L.variables():
        group, state = groups.get(id(p)), optimizer.state.get(p, {})
        if group is None or group.get("amsgrad") or group.get("centered") or not (coming or state):
            return None
        g = torch.zeros_like(p) if p.grad is None else p.grad.detach()
        if group.get("weight_decay") and name != "AdamW":
            g = g + group["weight_decay"] * p.detach()
        if name == "RMSprop":
            alpha = group["alpha"]
            v = state.get("square_avg", torch.zeros_like(p))
            v = alpha * v + (1 - alpha) * g.square() if coming else v
            parts.append(v.sqrt() + group["eps"])
        else:
            beta, t = group["betas"][1], int(state.get("step", 0)) + coming
            v = state.get("exp_avg_sq", torch.zeros_like(p))
            v = beta * v + (1 - beta) * g.square() if coming else v
            parts.append((v / (1 - beta**t)).sqrt() + group["eps"])
    return L.join([L.held(part) for part in parts])
