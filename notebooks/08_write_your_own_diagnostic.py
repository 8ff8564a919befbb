# %% [markdown]
# # 8. Write your own diagnostic
#
# A diagnostic is one function and one decorator. It is then a name for `cl.measure`, `cl.train` and `cl.Monitor`, in
# logs, figures, the command line and `curvlab explain`, and it is held to the same promise: no number without its
# error.
#
# As an example: how many directions carry the curvature? The sharpness is the largest eigenvalue; the Frobenius norm
# $\|H\|_F^2 = \sum_i\lambda_i^2$ counts all of them, and Gur-Ari et al. 2018 ([arXiv
# 1812.04754](https://arxiv.org/abs/1812.04754)) find that with $C$ classes about $C$ directions dominate. Two
# quantities: $\|H\|_F^2$ itself, by random probes, and the share of it in the top $k$.

# %% reduced="STEPS, TRIALS = 12, 10"
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch

import curvlab as cl
from curvlab.cli import main as curvlab
from curvlab.diagnostics.tracking import top_eigenpairs

torch.set_num_threads(1)  # small models are fastest with one
runs = Path(mkdtemp())  # or a folder of your own, such as Path("runs")

STEPS = 400
TRIALS = 200

# %% [markdown]
# ## A sampled quantity
#
# For random signs $z$, $\mathrm{E}\,\|Hz\|^2 = \|H\|_F^2$. The samples are independent, so the error is the standard
# error of their mean (`kind="sem"`) with $n-1$ degrees of freedom. Three habits:
#
# - Options are keyword arguments with defaults: `("hessian_frobenius", {"num_probes": 64})`.
# - Random numbers come from `at.generator(name)`, which is fixed by seed, step and name: no other number changes.
# - What others may need goes through `at.shared(key, compute)`, computed by the first to ask. The key names all
#   options that matter.


# %%
def probed(at, num_probes):
    """‖Hz‖² for random signs z, (num_probes,)."""

    def compute():
        signs = torch.randint(0, 2, (at.w.numel(), num_probes), generator=at.generator("hessian_frobenius"))
        return (at.hessian @ (2.0 * signs - 1).to(at.w)).double().square().sum(0)

    return at.shared(("hessian_frobenius", num_probes), compute)


@cl.diagnostic("‖H‖_F²", formula="Σ λ_i²", kind="sem", cost="16 products")
def hessian_frobenius(at, *, num_probes=16):
    """Squared Frobenius norm of the Hessian.

    Estimator: the mean of ‖Hz‖² over random signs z.

    Error: the standard error of the mean over probes.

    Fails: with few probes where one eigenvalue dominates, since the samples are then far from normal.

    Source: Hutchinson 1989, applied to H².
    """
    squares = probed(at, num_probes)
    error = float(squares.std()) / num_probes**0.5
    return cl.Measurement(float(squares.mean()), error, "sem", df=num_probes - 1)


# %% [markdown]
# ## A quantity with a bound
#
# $\sum_{i\le k}\lambda_i^2$ of the top $k$ comes from Ritz values $\theta_i$, each within its residual $r_i$ of an
# eigenvalue. To first order the sum of squares is then off by at most $\sum_i 2|\theta_i|r_i + r_i^2$:
# `kind="bound"`. The eigenvectors are those that `sharpness` and `hessian_eigenvalues` track through a run.


# %%
@cl.diagnostic(
    "Σ_{i≤k} λ_i²", formula="squares of the k algebraically largest eigenvalues", kind="bound", cost="25-45 products"
)
def top_square(at, *, k=10, tol=1e-2):
    """Sum of the squares of the k largest eigenvalues of the Hessian.

    Estimator: Ritz values, tracked through a run.

    Error: Σ 2|θ_i| r_i + r_i², with the residuals r_i.

    Source: ours.
    """
    pairs = top_eigenpairs(at, k, tol)
    theta, r = pairs.values.double(), pairs.residuals.double()
    return cl.Measurement(float(theta.square().sum()), float((2 * theta.abs() * r + r.square()).sum()), "bound")


# %% [markdown]
# ## Is it right?
#
# First against a dense Hessian, on a copy of the problem that is small enough. Then the error bars: how often does
# the 95% interval contain the truth over many seeds?

# %%
train, _ = cl.problems.digits(1024)
small = cl.Objective(cl.problems.mlp((64, 4, 10), "tanh", dtype=torch.float64), "cross_entropy",
                     (train[0][:32].double(), train[1][:32]))  # fmt: skip
H = cl.dense(cl.hessian(small))
truth = {
    "hessian_frobenius": float(H.square().sum()),
    "top_square": float(torch.linalg.eigvalsh(H)[-10:].square().sum()),
}
for name, m in cl.measure(small, list(truth)).items():
    print(f"{name:18} {m!s:18} truth {truth[name]:.4g}")


def covers(seed, num_probes):
    m = cl.measure(small, [("hessian_frobenius", {"num_probes": num_probes})], seed=seed)["hessian_frobenius"]
    low, high = m.interval(0.95)
    return low <= truth["hessian_frobenius"] <= high


for num_probes in (4, 16):
    share = np.mean([covers(seed, num_probes) for seed in range(TRIALS)])
    print(f"{num_probes} probes: {share:.1%} of the 95% intervals contain the truth")

# %% [markdown]
# ## In a run
#
# Names are enough; so is a figure of everything that was measured.

# %%
model = cl.problems.mlp((64, 64, 64, 10), "tanh")
L = cl.Objective(model, "cross_entropy", train)
sgd = torch.optim.SGD(model.parameters(), lr=0.2)
names = ["loss", "sharpness", "hessian_frobenius", "top_square"]
for _ in cl.train(L, sgd, cl.Batches(L.size, 128, STEPS), diagnostics=names, every=11, run=runs / "own"):
    pass

run = cl.Run(runs / "own")
cl.plots.quantities(run)

# %%
total, top = run.series("hessian_frobenius"), run.series("top_square")
low, high = total.interval(0.95)
figure, ax = cl.plots.axes_of(1, figsize=(6.4, 3.6))
blue, red = cl.plots.colours(2)
ax.plot(top.steps, top.values / total.values, color=blue, label="share of the top 10 in $\\|H\\|_F^2$")
ax.fill_between(top.steps, top.values / high, top.values / low, color=blue, alpha=0.25, lw=0)
ax.plot(
    total.steps, run.series("sharpness").values ** 2 / total.values, "--", color=red, label="share of the largest alone"
)
ax.axhline(1, color="0.3", ls=":")
ax.set(xlabel="step", ylabel="share", ylim=(0, 1.3))
ax.legend(fontsize=8)
figure

# %% [markdown]
# ## Its page
#
# The docstring's parts become what `curvlab explain` prints.

# %%
_ = curvlab(["explain", "hessian_frobenius"])
