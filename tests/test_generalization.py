"""Small batches, and penalties on small micro-batches, find sparser solutions than large batches (Novack et al. 2022).

The diagonal linear network f(x) = ⟨u ∘ v, x⟩ on sparse regression: 20 examples of 30 inputs of which 3 matter, 30 problems,
start u = 0.1·√2, v = 0, float64. Risks ‖u ∘ v - θ*‖² are compared problem by problem: the geometric mean of ratios of risks,
with a 95% t interval over the 30 problems. LB are full batches, SB batches of one example drawn independently, GN is LB
with the penalty of strength 0.03. Risks fall as long as the training loss does, and that takes thousands of steps; so they
are read where a problem's training loss first is below 1e-3, which takes every one at most 3500 steps at rate 0.02 and 1300
at 0.06. After equally many steps, regimes that train faster look better than they are.

Behaviour is checked, not a reference, except that the 30 problems trained side by side in one model are the problems
trained one by one with `train`.

What was seen, relative to LB at rate 0.02 (95% intervals of ±0.01 to ±0.05):

                                     LB     SB     GN of |M| = 1      2      5     10     20
    loss 1e-3, rate 0.02           1      0.90            0.69   0.85   0.97   1.01   1.04
    loss 1e-3, rate 0.06           1.01   0.69            0.68   0.85   0.97   1.02   1.04
    after 3600 steps, rate 0.02    1      0.91            0.54   0.76   0.96   1.02   1.06
    after 3600 steps, rate 0.06    0.72   0.47

So the gain of SB over LB is 0.69 at rate 0.06; the 0.47 after equally many steps contain the threefold rate, by which LB
gains as much as 0.72 while it has nothing to gain at equal training loss. That GN of 1 equals SB is due to
its strength: at 0.015, the rate/4 of SGD's implicit regularizer, it reaches 0.83 only.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor, nn

import curvlab as cl
from curvlab.batch_gradient import BatchGradient
from curvlab.problems import diagonal_linear, sparse_regression

PROBLEMS, N = 30, 20
STRENGTH = 0.03
TARGET = 1e-3
DOUBLE = torch.float64


class SideBySide(nn.Module):
    """Diagonal networks that share nothing, (B, K, d) -> (B, K).

    `squared_error` adds up outputs, so loss and squared gradient norms are sums over problems: one step, penalties
    included, is the K steps of the problems on their own.
    """

    def __init__(self, alone: nn.Module, problems: int) -> None:
        super().__init__()
        self.u = nn.Parameter(alone.u.detach().repeat(problems, 1))
        self.v = nn.Parameter(alone.v.detach().repeat(problems, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * (self.u * self.v)).sum(2)


class Data(NamedTuple):
    """Inputs (n, K, d) and targets (n, K) of K problems, and their true coefficients (K, d)."""

    x: Tensor
    y: Tensor
    theta: Tensor


@cache
def data(problems: int = PROBLEMS) -> Data:
    splits = [sparse_regression(N, seed=seed, dtype=DOUBLE) for seed in range(problems)]
    theta = [torch.linalg.lstsq(x, y).solution[:, 0] for _, (x, y) in splits]  # test targets have no noise
    x, y = (torch.stack([train[i] for train, _ in splits], 1) for i in (0, 1))
    return Data(x, y[:, :, 0], torch.stack(theta))


class Outcome(NamedTuple):
    """Risks (K,): where the training loss first is below TARGET, and after all steps."""

    at_target: Tensor
    at_end: Tensor


@cache
def trained(lr: float, steps: int, batch_size: int = N, micro_batch_size: int | None = None) -> Outcome:
    """Train all problems, penalized if there is a micro-batch size; look at them every tenth step."""
    x, y, theta = data()
    model = SideBySide(diagonal_linear(x.shape[2], dtype=DOUBLE), PROBLEMS)
    L = cl.Objective(model, "squared_error", (x, y))
    sgd = torch.optim.SGD(model.parameters(), lr=lr)
    penalties = [(STRENGTH, "gradient_norm")] if micro_batch_size else []
    found = torch.full((PROBLEMS,), math.nan, dtype=DOUBLE)
    for step, batch in enumerate(cl.Batches(N, batch_size, steps)):
        BatchGradient(L, batch, micro_batch_size=micro_batch_size, penalties=penalties)()
        sgd.step()
        if step % 10 == 9:
            with torch.no_grad():
                below = (model(x) - y).square().mean(0) / 2 < TARGET
                risk = (model.u * model.v - theta).square().sum(1)
            found = torch.where(below & found.isnan(), risk, found)
    assert not found.isnan().any(), f"the loss of {int(found.isnan().sum())} problems stays above {TARGET}"
    return Outcome(found, risk)


class Ratio(NamedTuple):
    """Geometric mean of ratios, and its 95% interval."""

    value: float
    low: float
    high: float


def ratio(risks: Tensor, others: Tensor) -> Ratio:
    """Of risks (K,) to those of the same problems under another training."""
    logs = (risks / others).log()
    half = student.ppf(0.975, len(logs) - 1) * logs.std() / math.sqrt(len(logs))
    return Ratio(*(math.exp(x) for x in (logs.mean(), logs.mean() - half, logs.mean() + half)))


@pytest.mark.parametrize(
    "batch_size, micro_batch_size, penalties", [(1, None, []), (N, None, []), (N, 5, [(STRENGTH, "gradient_norm")])]
)
def test_side_by_side_is_one_by_one(batch_size, micro_batch_size, penalties):
    x, y, theta = data()
    options = {"micro_batch_size": micro_batch_size, "penalties": penalties}

    def after(model: nn.Module, loss_data: tuple[Tensor, Tensor]) -> Tensor:
        L = cl.Objective(model, "squared_error", loss_data)
        sgd = torch.optim.SGD(model.parameters(), lr=0.06)
        for _ in cl.train(L, sgd, cl.Batches(N, batch_size, 30), **options):
            pass
        return (model.u * model.v).detach()

    together = after(SideBySide(diagonal_linear(dtype=DOUBLE), PROBLEMS), (x, y))
    for k in (0, 17):
        alone = after(diagonal_linear(dtype=DOUBLE), (x[:, k], y[:, k, None]))
        assert float((alone - together[k]).norm() / alone.norm()) < 1e-12
    assert theta.round(decimals=9).unique().tolist() == [0.0, 1.0]
    assert theta.sum(1).tolist() == pytest.approx([3.0] * PROBLEMS)


@pytest.mark.slow
def test_small_batches_and_small_micro_batches_generalize_better():
    lr, steps = 0.06, 1400
    large, small = trained(lr, steps).at_target, trained(lr, steps, batch_size=1).at_target
    gn = {
        size: trained(lr, longest, micro_batch_size=size).at_target
        for size, longest in ((1, 850), (5, 1100), (N, 1100))
    }
    assert ratio(small, large).high < 0.8
    assert ratio(gn[1], large).high < 0.8
    assert ratio(gn[1], small).high < 1.1  # recovers what small batches gain
    assert ratio(gn[1], gn[5]).high < 0.8
    assert ratio(gn[5], gn[N]).high < 1
    assert ratio(gn[N], large).low > 1  # no benefit is left


@pytest.mark.slow
def test_the_benefit_vanishes_monotonically_in_the_size_of_micro_batches():
    """SB at both rates; GN at the smaller one, 3600 steps of all."""
    steps = 3600
    large = trained(0.02, steps)
    others = {
        "LB 0.06": trained(0.06, steps),
        "SB 0.02": trained(0.02, steps, batch_size=1),
        "SB 0.06": trained(0.06, steps, batch_size=1),
    }
    sizes = (1, 2, 5, 10, N)
    gn = {size: trained(0.02, steps, micro_batch_size=size) for size in sizes}
    for name, outcome in {**others, **gn}.items():
        print(name, *(ratio(ours, base) for ours, base in zip(outcome, large, strict=True)))
    assert ratio(others["SB 0.02"].at_target, large.at_target).high < 0.95
    assert ratio(others["SB 0.06"].at_target, large.at_target).high < 0.8
    # The rate alone gives large batches nothing but speed, which equal numbers of steps mistake for a benefit.
    assert ratio(others["LB 0.06"].at_target, large.at_target).low > 0.98
    assert ratio(others["LB 0.06"].at_end, large.at_end).high < 0.85
    for smaller, larger in pairwise(sizes):
        assert ratio(gn[smaller].at_target, gn[larger].at_target).high < 1
        assert ratio(gn[smaller].at_end, gn[larger].at_end).high < 1
    assert ratio(gn[5].at_target, large.at_target).high < 1
    assert ratio(gn[N].at_target, large.at_target).low > 1
    assert ratio(gn[N].at_end, large.at_end).low > 1
