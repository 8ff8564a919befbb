"""The runs of Smith et al. 2021's main result: SGD over an epoch and back, and the gradient flows that it may follow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..batches import Batches
from ..flow import gradient_flow
from ..methods import NStepSGD
from ..objective import Objective
from ..trainer import train
from .data import digits
from .models import mlp

EXAMPLES, BATCH = 32, 8


def orders(
    folder: str | os.PathLike,
    *,
    seeds: Sequence[int] = (0,),
    rates: Sequence[float] = (0.01, 0.005, 0.0025),
    repeats: Sequence[int] = (1, 3),
) -> list[Path]:
    """Train over one epoch and the same batches backwards, in float64, and measure how far that ends from two flows.

    The flows go over the time lr·steps, on the loss C and on the modified loss C + λ C_reg with λ the bare rate; the claim
    `modified_loss_order` fits the orders of the distances in lr, which eq. 20 and 39 have at 2 and 3. A few seconds for each
    seed and n.

    Args:
        folder: of the run folders, which are returned: those of SGD; the flows lie beside them.
        rates: effective learning rates, at least three.
        repeats: n, updates on each batch, at the bare rate lr/n.

    Source: Smith et al. 2021 (arXiv 2101.12176), sec. 2.2 and 4.
    """
    made = []
    settings = [(s, n, lr, c) for s in seeds for n in repeats for lr in rates for c in (0.0, 1.0)]
    for seed, n, lr, coefficient in settings:
        name = f"seed={seed}-n={n}-lr={lr:g}-lambda={coefficient * lr / n:g}"
        flow, sgd = Path(folder) / f"flow-{name}", Path(folder) / f"sgd-{name}"
        # A step more than two epochs: a distance is logged before the step.
        batches = Batches(EXAMPLES, BATCH, 2 * EXAMPLES // BATCH + 1, epochs=True, order="alternating", seed=seed)
        penalties = [(lr / n, "implicit_regularizer")] if coefficient else []
        for _ in gradient_flow(
            _objective(seed),
            [0, batches.steps - 1],
            lr=lr,
            penalties=penalties,
            partition=batches.partition,
            tol=1e-10,
            run=flow,
        ):
            pass
        L = _objective(seed)
        optimizer = NStepSGD(L.model.parameters(), lr / n, n=n)
        asked = [("trajectory_distance", {"run": str(flow)})]
        for _ in train(L, optimizer, batches, diagnostics=asked, run=sgd, config={"seed": seed}):
            pass
        made.append(sgd)
    return made


def _objective(seed: int) -> Objective:
    (x, y), _ = digits(EXAMPLES, dtype=torch.float64)
    return Objective(mlp((64, 8, 10), seed=seed, dtype=torch.float64), "cross_entropy", (x, y))
