# %% [markdown]
# # 3. The edge of SGD
#
# With small batches the sharpness stops well below $2/\eta$. Does SGD have an edge of stability of its own, and which
# quantity marks it? Two answers:
#
# - Lee 2022 (Definitions 1-4, eq. 11, fig. 4d): $\mathrm{tr}(HS_b)/\mathrm{tr}(S_n)$, here `instability`, oscillates
#   around $2/\eta$, $S_b = \mathrm{E}[g_bg_b^\top]$ being the second moment of the batch gradient. Equivalently, the
#   interaction-aware sharpness $\|H\|_{S_b} = \mathrm{tr}(HS_b)/\mathrm{tr}(S_b)$ settles at $2\rho_b/\eta$, with the
#   concentration $\rho_b = \mathrm{tr}(S_n)/\mathrm{tr}(S_b)$ that falls with the batch size: implicit interaction
#   regularization (IIR).
# - Andreyev and Beneventano 2024 ([arXiv 2412.20553](https://arxiv.org/abs/2412.20553)): the batch sharpness
#   $\mathrm{E}[g_b^\top H_b\,g_b/\|g_b\|^2]$, with the Hessian of the batch itself, settles at $2/\eta$.
#
# There is a trap. On *any* plateau of the loss the expected loss difference is zero, and then eq. 6 puts
# `instability` at $2/\eta$, edge or not. So the same measurements are made on a control that cannot have an edge:
# linear regression, whose Hessian is constant, trained far below $2/\lambda_{\max}$.

# %% reduced="STEPS, EVERY, SIZES, CONTROL = 30, 5, (8, 128), (4, 64)"
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch

import curvlab as cl

torch.set_num_threads(1)  # small models are fastest with one
runs = Path(mkdtemp())  # or a folder of your own, such as Path("runs")

STEPS, EVERY = 600, 5
SIZES = (8, 32, 128, 512)  # batch sizes
CONTROL = (4, 16, 64)

# %%
names = ["loss", "sharpness", "interaction_sharpness", "instability", "gradient_concentration", "batch_sharpness"]


def descend(model, data, lr, b, name):
    L = cl.Objective(model, "squared_error", data)
    sgd = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in cl.train(L, sgd, cl.Batches(L.size, b, STEPS), diagnostics=names, every=EVERY, run=runs / name):
        pass
    return cl.Run(runs / name)


images, _ = cl.problems.digits(1024)
digits = [descend(cl.problems.mlp((64, 64, 64, 10), "tanh"), images, 0.2, b, f"digits b={b}") for b in SIZES]
cl.plots.batch_sizes(digits)

# %% [markdown]
# ## Beside the control

# %%
regression, _ = cl.problems.linear_regression(256, 16, noise=1.0)
control = [descend(cl.problems.linear(16, 1), regression, 0.12, b, f"control b={b}") for b in CONTROL]

figure, panels = cl.plots.axes_of(1, 2, figsize=(9.6, 4.2), sharey=True)
shown = {"instability": "tr(H S_b)/tr(S_n)", "sharpness": "sharpness", "batch_sharpness": "batch sharpness",
         "interaction_sharpness": "interaction-aware sharpness"}  # fmt: skip
for ax, sizes, trained, lr, title in zip(
    panels, (SIZES, CONTROL), (digits, control), (0.2, 0.12), ("digits", "control: linear regression"), strict=True
):
    for (name, label), colour, marker, style in zip(
        shown.items(), cl.plots.colours(4), "os^D", ("-", "--", "-.", ":"), strict=True
    ):
        late = [run.series(name).values[len(run.records) // 2 :] * lr / 2 for run in trained]
        low, middle, high = np.array([np.quantile(values, (0.25, 0.5, 0.75)) for values in late]).T
        ax.errorbar(
            sizes, middle, (middle - low, high - middle), color=colour, marker=marker, ls=style, capsize=3, label=label
        )
    ax.axhline(1, color="0.3", lw=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, sizes)
    ax.set(xlabel="batch size b", title=title, ylim=(0, 1.5))
panels[0].set_ylabel("second half, in units of 2/lr: median, quartiles")
panels[1].legend(fontsize=8, loc="center", bbox_to_anchor=(0.5, 0.4))
figure

# %% [markdown]
# ## What the claims say

# %%
claims = ["iir", "interaction_edge", "batch_sharpness_edge", "batch_sharpness_is_closer"]
cl.claims.check(digits, claims)

# %%
cl.claims.check(control, claims)
