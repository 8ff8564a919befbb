# %% [markdown]
# # 6. The modified loss of SGD
#
# Small steps of gradient descent follow the gradient flow of the loss $C$. Steps of finite size leave it, and Smith
# et al. 2021 ([arXiv 2101.12176](https://arxiv.org/abs/2101.12176), eq. 1 and 20) say where they go: over an epoch,
# in the mean over the order of its batches, SGD follows the flow of
# $$C_{\mathrm{mod}} = C + \epsilon\,C_{\mathrm{reg}},\qquad C_{\mathrm{reg}} = \frac{1}{4m}\sum_k\|\nabla\hat C_k\|^2,$$
# where $\hat C_k$ is the loss of the $k$-th of $m$ batches. After a fixed number of epochs the distance to the flow
# on $C$ is of order $\epsilon^2$, that to the flow on $C_{\mathrm{mod}}$ of order $\epsilon^3$. An epoch followed by
# the same batches backwards cancels what depends on their order. For SGD with $n$ updates on each batch, of rate
# $\alpha$ and so of effective rate $\epsilon = n\alpha$, eq. 39 has $\alpha\,C_{\mathrm{reg}}$: the bare rate sets
# the strength, not the effective one.
#
# We measure both orders in double precision, then look at what the modified loss does to the curvature.

# %% reduced="SEEDS, RATES, STEPS = (0,), (0.04, 0.02, 0.01), 24"
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch

import curvlab as cl

torch.set_num_threads(1)  # small models are fastest with one
runs = Path(mkdtemp())  # or a folder of your own, such as Path("runs")

SEEDS = (0, 1, 2)
RATES = (0.01, 0.005, 0.0025)
STEPS = 400

# %%
orders = [cl.Run(path) for path in cl.problems.orders(runs / "orders", seeds=SEEDS, rates=RATES)]

figure, panels = cl.plots.axes_of(1, 2, figsize=(9.6, 4.0), sharey=True)
for ax, n in zip(panels, (1, 3), strict=True):
    for modified, colour, marker, order in zip((False, True), cl.plots.colours(2), "os", (2, 3), strict=True):
        chosen = [run for run in orders if f"-n={n}-" in run.path.name and run.path.name.endswith("=0") != modified]
        rate = np.array([n * run.column("lr")[1][0] for run in chosen])
        distance = np.array([run.series("trajectory_distance").values[-1] for run in chosen])
        flow = "C_{\\mathrm{mod}}" if modified else "C"
        ax.loglog(rate, distance, marker, color=colour, ms=4, label=f"from the flow on ${flow}$, {len(SEEDS)} seeds")
        middle = np.exp(np.mean(np.log(distance / rate**order)))
        ax.loglog(RATES, middle * np.array(RATES) ** order, "-" if modified else "--", color=colour, lw=1,
                  label=rf"slope {order}")  # fmt: skip
    ax.set(xlabel=r"$\epsilon$, the learning rate" if n == 1 else r"$\epsilon = n\,\alpha$, the effective learning rate",
           title="SGD" if n == 1 else f"{n}-step SGD")  # fmt: skip
    ax.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    ax.minorticks_off()
panels[0].set_ylabel("distance after two epochs")
panels[0].legend(fontsize=8)
figure

# %%
cl.claims.check(orders, ["modified_loss_order"])

# %% [markdown]
# ## Curvature along the flows
#
# With a learning rate that is not small, on the same 32 digits: SGD that visits the same four batches in a new order
# in each epoch, and the two flows at the same time $t = \epsilon\cdot$steps.

# %%
LR, EVERY = 0.3, 4


def problem():
    (x, y), _ = cl.problems.digits(32, dtype=torch.float64)
    return cl.Objective(cl.problems.mlp((64, 8, 10), dtype=torch.float64), "cross_entropy", (x, y))


L, batches = problem(), cl.Batches(32, 8, STEPS + 1, epochs=True, order="shuffled")
sgd = torch.optim.SGD(L.model.parameters(), lr=LR)
for _ in cl.train(L, sgd, batches, diagnostics=["loss", "sharpness"], every=EVERY, run=runs / "SGD"):
    pass
for name, penalties in (("C", []), ("C_mod", [(LR, "implicit_regularizer")])):
    flow = cl.gradient_flow(
        problem(), range(0, STEPS + 1, EVERY), lr=LR, penalties=penalties, partition=batches.partition,
        diagnostics=["loss", "sharpness"], every=EVERY, run=runs / name, tol=1e-6,
    )  # fmt: skip
    for _ in flow:
        pass

followed = {name: cl.Run(runs / name).series("sharpness") for name in ("SGD", "C", "C_mod")}
labels = {"SGD": "SGD", "C": "flow on $C$", "C_mod": r"flow on $C_{\mathrm{mod}}$"}
figure, (top, bottom) = cl.plots.axes_of(2, figsize=(7.2, 5.0), sharex=True, height_ratios=[1.3, 1])
for (name, series), colour, style in zip(followed.items(), cl.plots.colours(3), ("-", "--", ":"), strict=True):
    time = series.steps * LR
    top.plot(time, series.values, style, color=colour, label=labels[name])
    bottom.plot(time, series.values / followed["C"].values, style, color=colour)
top.set(ylabel="sharpness")
bottom.set(xlabel=r"time $t = \epsilon\cdot$steps", ylabel="over flow on $C$")
top.legend(fontsize=8)
figure

# %%
for name in ("C", "C_mod"):
    apart = np.abs(followed["SGD"].values / followed[name].values - 1)
    print(f"sharpness of SGD, relative distance to that of the flow on {name}: median {np.median(apart):.1%}")

# %% [markdown]
# The claim holds: the orders are 2 and 3, for SGD and for 3-step SGD with its own coefficient. At the smallest rate
# the modified flow comes fifty to a hundred times closer to where SGD ends. In the second part, with a rate thirty
# times the largest of the first, well outside of the expansion, the flow on $C_{\mathrm{mod}}$ still tells most of
# what SGD does to the curvature: the sharpness of SGD is 4.0% away from that along the flow on $C$ in the median,
# lower at every step, and 0.8% from that along the flow on $C_{\mathrm{mod}}$. At the peak, where the curvature
# changes fastest, SGD is lower than both.
#
# **On a GPU, or at the paper's scale.** The orders need double precision and an integrator of the flow, so this part
# is best left at a small scale; `rates=` and `seeds=` of `cl.problems.orders` change it. At the scale of the paper's
# figures 1 and 2, a Wide-ResNet on CIFAR-10, one trains on the modified loss itself: `cl.train(..., penalties=[(rate,
# "implicit_regularizer")], micro_batch_size=32)` with `cl.problems.model("wrn_10_1").to("cuda")` and
# `cl.problems.load("cifar10")`, against plain training at larger rates. On digits no benefit of a larger rate is
# sure, so none of the claims about it applies there.
#
# **Where this differs from the paper.** The paper derives the orders and tests their consequences for test accuracy;
# the direct measurement of the orders, and the curvature along the flows, are ours. The batches of the second part
# come in a new order in each epoch, one run.
