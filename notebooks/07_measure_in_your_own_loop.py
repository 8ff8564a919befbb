# %% [markdown]
# # 7. Measure inside your own training loop
#
# Your training loop exists, with its own optimizer, schedule and augmentation, and you want to see the edge of
# stability pass by without rewriting it. A `Monitor` is made before the loop and called once a step. It measures the
# clean loss on a fixed set of data, reads the learning rate and the momentum from the optimizer, and leaves no trace:
# with and without it, training is the same to the last bit.
#
# The loop below has what makes thresholds move: momentum, a learning rate that falls along a cosine, and noisy
# inputs. With Polyak momentum $\beta$ the threshold is $(2+2\beta)/\eta$ (Cohen et al. 2021, [arXiv
# 2103.00065](https://arxiv.org/abs/2103.00065), sec. 2 and appendix B), so it rises as $\eta$ falls.

# %% reduced="EPOCHS = 3"
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import curvlab as cl
from curvlab.cli import main as curvlab

torch.set_num_threads(1)  # small models are fastest with one
runs = Path(mkdtemp())  # or a folder of your own, such as Path("runs")

EPOCHS = 60

# %%
(x, y), test = cl.problems.digits(1024)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
loader = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True)
sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, EPOCHS * len(loader))

# %% [markdown]
# ## The monitor
#
# `every` says when: a number of steps, `"log"` for about ten times a decade, a function of the step, or one of these
# for each name.

# %%
monitor = cl.Monitor(
    model,
    ["loss", "sharpness", "instability", "hessian_density", "test_accuracy"],
    loss="cross_entropy",
    data=(x, y),
    test=cl.Objective(model, "cross_entropy", test),
    optimizer=sgd,
    batch_size=loader,
    every={"loss": 3, "sharpness": 3, "instability": 3, "hessian_density": "log", "test_accuracy": len(loader)},
    run=runs / "mine",
    announce=None,  # by default it says on standard error what the first measurement will cost
)

for _ in range(EPOCHS):
    for inputs, targets in loader:
        sgd.zero_grad()
        noisy = inputs + 0.1 * torch.randn_like(inputs)
        cross_entropy(model(noisy), targets).backward()
        monitor()  # between the backward pass and the step it also sees the gradient about to be used
        sgd.step()
        cosine.step()
monitor.close()

# %%
run = cl.Run(runs / "mine")
cl.plots.edge_of_stability(run)

# %% [markdown]
# ## Watch, read, export
#
# While it trains, `curvlab watch runs/mine` follows the run in another terminal: each curvature, and its share of the
# threshold now.

# %%
_ = curvlab(["watch", str(run.path), "--once"])

# %%
table = cl.tables.to_pandas(run, wide=True).set_index(
    "step"
)  # `curvlab export runs/mine --wide` writes the same as CSV
table[["lr", "threshold", "sharpness", "sharpness_error", "instability", "instability_error"]].iloc[::60].round(3)

# %% [markdown]
# The density of the whole spectrum was measured at a few steps only; the last of them:

# %%
cl.plots.quantities(run, ["hessian_density", "test_accuracy"])

# %% [markdown]
# ## A budget instead of a schedule
#
# `budget=0.1` keeps measuring within a tenth of the training time. What is due is then spaced by its measured cost,
# and between two searches for eigenvectors the last ones are followed for one product each.

# %%
frugal = cl.Monitor(
    model,
    ["loss", "sharpness"],
    loss="cross_entropy",
    data=(x, y),
    optimizer=sgd,
    budget=0.1,
    run=runs / "frugal",
    announce=None,
)
for _ in range(EPOCHS // 3):
    for inputs, targets in loader:
        sgd.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        frugal()
        sgd.step()
frugal.close()

steps = EPOCHS // 3 * len(loader)
measured = cl.Run(runs / "frugal").series("sharpness")
print(f"sharpness at fewer than all steps: {len(measured) < steps}, of which by update only: {len(measured.notes) > 0}")

# %% [markdown]
# ## What the claims say

# %%
cl.claims.check(run)
