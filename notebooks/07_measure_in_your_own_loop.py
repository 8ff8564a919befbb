# %% [markdown]
# # 7. Measure inside your own training loop
#
# Your training loop exists, with its own optimizer, schedule and augmentation, and you want to see the edge of
# stability pass by without rewriting it. A `Monitor` is made before the loop and called once a step. It measures the
# clean loss on a fixed set of data, reads the learning rate and the momentum from the optimizer, and leaves no trace:
# with and without it, training is the same to the last bit.
#
# The loop below has what makes thresholds move: Nesterov momentum $\beta = 0.9$, whose threshold is
# $(2+2\beta)/(\eta\,(1+2\beta))$ (Cohen et al. 2021, [arXiv 2103.00065](https://arxiv.org/abs/2103.00065), sec. 2),
# and a learning rate $\eta$ that falls to half, so that the threshold doubles. Batches are half of the data, with
# noise on the inputs.

# %% reduced="EPOCHS = 6"
import os
from tempfile import mkdtemp

import torch
from torch.utils.data import DataLoader, TensorDataset

import curvlab as cl
from curvlab.cli import main as curvlab

torch.set_num_threads(1)  # small models are fastest with one
os.chdir(mkdtemp())  # or a folder of your own; the runs go to runs/ there

EPOCHS = 200

# %%
(x, classes), (x_test, test_classes) = cl.problems.digits(1024)
y = torch.nn.functional.one_hot(classes, 10).float()
model = cl.problems.mlp((64, 64, 64, 10), "tanh")
loader = DataLoader(TensorDataset(x, y), batch_size=512, shuffle=True, generator=torch.Generator().manual_seed(0))
sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, EPOCHS * len(loader), eta_min=0.05)
noise = torch.Generator().manual_seed(1)


def train_step(inputs, targets):
    sgd.zero_grad()
    noisy = inputs + 0.1 * torch.randn(inputs.shape, generator=noise)
    (0.5 * (model(noisy) - targets).square().sum(1).mean()).backward()


# %% [markdown]
# ## The monitor
#
# `every` says when: a number of steps, `"log"` for about ten times a decade, a function of the step, or one of these
# for each name.

# %%
monitor = cl.Monitor(
    model,
    ["loss", "sharpness", "instability", "gradient_noise_scale", "hessian_density", "test_accuracy"],
    loss="squared_error",
    data=(x, y),
    test=cl.Objective(model, "squared_error", (x_test, test_classes)),
    optimizer=sgd,
    batch_size=loader,
    every={
        "loss": 3, "sharpness": 3, "instability": 3,  # odd: at the edge every second step is alike
        "gradient_noise_scale": "log",
        "hessian_density": lambda step: step in (0, 300),
        "test_accuracy": 10 * len(loader),
    },
    run="runs/mine",
    announce=None,  # by default it says on standard error what the first measurement will cost
)  # fmt: skip

for _ in range(EPOCHS):
    for inputs, targets in loader:
        train_step(inputs, targets)
        monitor()  # between the backward pass and the step it also sees the gradient about to be used
        sgd.step()
        cosine.step()
monitor.close()

# %%
run = cl.Run("runs/mine")
cl.plots.edge_of_stability(run)

# %% [markdown]
# ## Watch, read, export
#
# While it trains, `curvlab watch runs/mine` follows the run in another terminal: each curvature, and its share of the
# threshold of that step. Afterwards it shows where the run ended.

# %%
_ = curvlab(["watch", "runs/mine", "--once", "--quantities", "loss", "sharpness", "test_accuracy"])

# %%
table = cl.tables.to_pandas(run, wide=True).set_index("step")  # `curvlab export runs/mine --wide` writes it as CSV
columns = ["lr", "threshold", "sharpness", "sharpness_error", "instability", "instability_error"]
table[columns].dropna().iloc[::20].round(3)

# %% [markdown]
# What was measured at a few steps only:

# %%
cl.plots.quantities(run, ["hessian_density", "gradient_noise_scale", "test_accuracy"])

# %% [markdown]
# ## A budget instead of a schedule
#
# `budget=0.2` keeps measuring within a fifth of the training time, on whatever machine. What is due is then spaced by
# its measured cost, and between two searches for eigenvectors the last ones are followed for one product each; the
# notes of these measurements say so.

# %%
frugal = cl.Monitor(
    model, ["sharpness"], loss="squared_error", data=(x, y), optimizer=sgd, budget=0.2, run="runs/frugal", announce=None
)
for _ in range(EPOCHS):
    for inputs, targets in loader:
        train_step(inputs, targets)
        frugal()
        sgd.step()
frugal.close()

measured = cl.Run("runs/frugal").series("sharpness")
print(f"{len(measured)} of {EPOCHS * len(loader)} steps, of which {len(measured.notes)} by following eigenvectors")

# %% [markdown]
# ## What the claims say

# %%
for v in cl.claims.check(run, ["edge_of_stability", "momentum_edge", "interaction_edge"]):
    print(f"{v.claim}: {v.decision}. {v.reason}")

# %% [markdown]
# The sharpness climbs, meets the threshold at about step 120 and follows it for some 70 steps, with a spike of the
# loss each time it is thrown back. Then the threshold, which the falling learning rate raises, runs ahead: the
# sharpness goes on rising, but stays below, at 0.89 of the threshold in the end. That the budget of the second
# monitor allows measurements at few steps only is a property of this problem: a step of training costs hardly more
# than a single product with the Hessian.
#
# No claim applies, and that is as it should be: they speak of plain descent, or of a constant learning rate.
#
# **On a GPU, or at your scale.** Nothing in the monitor changes: model and data where they are, `sgd` the optimizer
# that you have, also wrapped by Fabric or accelerate. What matters is the fixed `data` that it measures on: a few
# thousand clean examples, not the augmented loader. For Lightning, the Hugging Face Trainer, TensorBoard or wandb the
# README has a line each.
#
# **Where this differs from the paper.** Cohen et al. keep the learning rate constant and use full batches without
# augmentation; there the sharpness hovers at the threshold (`curvlab run momentum-edge`).
