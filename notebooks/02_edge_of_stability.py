# %% [markdown]
# # 2. The edge of stability of gradient descent
#
# On a quadratic loss gradient descent with learning rate $\eta$ diverges as soon as the largest eigenvalue of the
# Hessian, the sharpness, exceeds $2/\eta$. Cohen et al. 2021 ([arXiv 2103.00065](https://arxiv.org/abs/2103.00065),
# fig. 1) found that networks train right there: the sharpness rises to $2/\eta$ and hovers just above it, while the
# loss goes down, although not at every step. Lee 2022 (fig. 4a-c and sec. 4.2; much of it is also in *A new
# characterization of the edge of stability based on a sharpness measure aware of batch gradient distribution*, ICLR
# 2023) adds a second curvature, along the gradient, $\|H\|_{S_n} = \nabla L^\top H\,\nabla L/\|\nabla L\|^2$, which
# stays near zero, soars once the gradient has turned into the sharpest direction, and then oscillates *around*
# $2/\eta$.
#
# We train on digits with full batches, measure at every step, and let the claims of both papers be judged.

# %% reduced="STEPS = 30"
from pathlib import Path
from tempfile import mkdtemp

import torch

import curvlab as cl

torch.set_num_threads(1)  # small models are fastest with one
runs = Path(mkdtemp())  # or a folder of your own, such as Path("runs")

STEPS = 450
LR = 0.2

# %%
train, _ = cl.problems.digits(1024)
model = cl.problems.mlp((64, 64, 64, 10), "tanh")
L = cl.Objective(model, "squared_error", train)  # 0.5 times the sum over outputs, as Cohen et al.

names = [
    "loss",
    "gradient_norm",
    "sharpness",
    "interaction_sharpness",
    "instability",
    "gradient_alignment",
    "gradient_cosine",
]
sgd = torch.optim.SGD(model.parameters(), lr=LR)
for _ in cl.train(L, sgd, cl.Batches(L.size, L.size, STEPS), diagnostics=names, run=runs / "gd"):
    pass

run = cl.Run(runs / "gd")
cl.plots.edge_of_stability(run)

# %% [markdown]
# ## How the curvature gets there
#
# Proposition 4.1 of Lee: once the sharpness has passed $2/\eta$, the gradient's component along the sharpest
# direction $q_1$ grows at every step and those along all others shrink, so that the gradient turns into $q_1$. From
# then on consecutive gradients point against each other.

# %%
figure, (top, bottom) = cl.plots.axes_of(2, figsize=(7.2, 4.6), sharex=True)
blue, red = cl.plots.colours(2)
for name, colour, style in (("sharpness", blue, "-"), ("interaction_sharpness", red, "--")):
    series = run.series(name)
    top.plot(series.steps, series.values * LR / 2, style, color=colour, lw=1, label=name.replace("_", " "))
top.axhline(1, color="0.3", ls=":", label="2/lr")
top.set(ylabel="curvature, in units of 2/lr", ylim=(0, 1.6))
cosines = {"gradient_alignment": "with the sharpest direction (absolute)", "gradient_cosine": "with the next gradient"}
for (name, label), colour, style in zip(cosines.items(), (blue, red), ("-", "--"), strict=True):
    series = run.series(name)
    bottom.plot(series.steps, series.values, style, color=colour, lw=1, label=label)
bottom.set(ylabel="cosine of the gradient", xlabel="step", ylim=(-1.1, 1.1), xlim=(0, min(STEPS, 300)))
top.legend(fontsize=8, loc="upper left")
bottom.legend(fontsize=8, loc="center left", bbox_to_anchor=(0.05, 0.73))
figure

# %% [markdown]
# ## What the claims say
#
# A claim is a numeric rule over the log (`curvlab explain edge_of_stability` prints it). The statistic is in units of
# $2/\eta$ where a curvature is judged.

# %%
cl.claims.check(run)

# %% [markdown]
# Everything that the two papers say of full-batch descent is there. The sharpness passes 2/lr = 10 at step 116 and
# keeps rising, since nothing happens yet: the gradient has next to no component along $q_1$, a cosine of $10^{-5}$.
# That component grows by a factor of 700,000 in 84 steps; at step 196 $\|H\|_{S_n}$ passes $2/\eta$, the loss spikes,
# and the sharpness is thrown back from 1.22 to about 1.05 of $2/\eta$. From then on it hovers at 1.09 while
# $\|H\|_{S_n}$ oscillates around 1.00, consecutive gradients are nearly opposite, and the loss rises at 40% of the
# steps.
#
# **On a GPU, or at the paper's scale.** Cohen et al. train fully-connected networks on 5,000 images of CIFAR-10, Lee
# a six-layer CNN on 8,192: `cl.problems.load("cifar10-5k")` or `"cifar10-8k"` (it says which files to put where),
# with `cl.problems.mlp((3072, 200, 200, 10), "tanh")` behind a `torch.nn.Flatten`, or `cl.problems.model("6cnn")`.
# Move the model with `.to("cuda")`; the objective follows it. Lee's figure 4 has learning rates of 0.01 and 0.02, so
# raise `STEPS`. Measuring at every step costs a few Hessian-vector products each; `every=5` in `cl.train` (odd,
# because every second step is alike at the edge) makes it a fifth.
#
# **Where this differs from the papers.** Digits and a small tanh network instead of CIFAR-10; one seed. On digits
# $\lambda_2$, too, comes close to $2/\eta$, so that the premise of Prop. 4.1, one unstable direction alone, is met
# only roughly.
