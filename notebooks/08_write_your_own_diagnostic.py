# %% [markdown]
# # 8. Write your own diagnostic
#
# A diagnostic is one function and one decorator. It is then a name for `cl.measure`, `cl.train` and `cl.Monitor`, in
# logs, figures, the command line and `curvlab explain`, and it is held to the same promise: no number without its
# error.
#
# As an example: how many directions carry the curvature? Gur-Ari et al. 2018 ([arXiv
# 1812.04754](https://arxiv.org/abs/1812.04754)) find that with $C$ classes about $C$ directions dominate. We compare
# the sum of squares of all eigenvalues, $\|H\|_F^2 = \sum_i\lambda_i^2$, with that of the top ten.

# %% reduced="STEPS, TRIALS = 12, 5"
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
# ## A quantity with a bound
#
# A diagnostic gets a `Snapshot`, one point of a training, and returns a `Measurement`. The top $k$ eigenvalues are
# Ritz values $\theta_i$, each within its residual $r_i$ of an eigenvalue, so their sum of squares is within $\sum_i
# 2|\theta_i|r_i + r_i^2$ of one of eigenvalues: `kind="bound"`. The solver is the one that `sharpness` and
# `hessian_eigenvalues` use; in a run it starts from the eigenvectors of the last measured step.


# %%
@cl.diagnostic("Σ_{i≤k} λ_i²", formula="squares of the k largest eigenvalues", kind="bound", cost="25-45 products")
def top_square(at, *, k=10):
    """Sum of the squares of the k largest eigenvalues of the Hessian.

    Estimator: Ritz values, tracked through a run.

    Error: Σ 2|θ_i| r_i + r_i², with the residuals r_i.

    Args:
        k: number of eigenvalues.

    Source: ours.
    """
    pairs = top_eigenpairs(at, k, 1e-2)
    theta, r = pairs.values.double(), pairs.residuals.double()
    return cl.Measurement(float(theta.square().sum()), float((2 * theta.abs() * r + r.square()).sum()), "bound")


# %% [markdown]
# ## A sampled quantity
#
# For random signs $z$, $\mathrm{E}\,\|Hz\|^2 = \|H\|_F^2$. A few large eigenvalues make this noisy, so they are taken
# out first: for any orthonormal $Q$, $\|H\|_F^2 = \|HQ\|_F^2 + \mathrm{E}\,\|H(z - QQ^\top z)\|^2$. The samples of
# the second term are independent, so the error is the standard error of their mean, `kind="sem"`, with one degree of
# freedom less than there are probes. Three habits:
#
# - Options are keyword arguments with defaults, asked for by `("hessian_frobenius", {"probes": 64})`.
# - Random numbers come from `at.generator(name)`, which seed, step and name determine: no other number changes.
# - What several diagnostics need is computed once, by the first to ask: `at.shared(key, compute)`. The key names
#   every option that matters. Here $Q$ and $HQ$ are shared with whoever else wants ten eigenvectors.


# %%
@cl.diagnostic("‖H‖_F²", formula="Σ λ_i²", kind="sem", cost="26 products and those for k eigenpairs")
def hessian_frobenius(at, *, probes=16, k=10):
    """Squared Frobenius norm of the Hessian.

    Estimator: ‖HQ‖_F², with Q the k top eigenvectors, and the mean of ‖H(z - QQᵀz)‖² over random signs z.

    Error: the standard error of that mean.

    Args:
        probes: random sign vectors, at least 2.
        k: eigenvectors that are taken out, 0 for none.

    Source: Hutchinson 1989, applied to H².
    """
    known, signs = (
        0.0,
        2.0 * torch.randint(0, 2, (at.w.numel(), probes), generator=at.generator("hessian_frobenius")) - 1,
    )
    Z = signs.to(at.w)
    if k:
        Q = top_eigenpairs(at, k, 1e-2).vectors
        known = float(at.shared(("H times top eigenvectors", k), lambda: at.hessian @ Q).double().square().sum())
        Z = Z - Q @ (Q.T @ Z)
    rest = (at.hessian @ Z).double().square().sum(0)
    return cl.Measurement(known + float(rest.mean()), float(rest.std()) / probes**0.5, "sem", df=probes - 1)


# %% [markdown]
# ## Is it right?
#
# First against a dense Hessian, on a problem that is small enough. Then the error bars: over many seeds, how often
# does the 95% interval contain the truth?

# %%
train, _ = cl.problems.digits(1024)
small = cl.Objective(
    cl.problems.mlp((64, 4, 10), "tanh"), "cross_entropy", (train[0][:32], train[1][:32]), dtype=torch.float64
)
H = cl.dense(cl.hessian(small))
truth = {
    "top_square": float(torch.linalg.eigvalsh(H)[-10:].square().sum()),
    "hessian_frobenius": float(H.square().sum()),
}
for name, m in cl.measure(small, list(truth)).items():
    print(f"{name:18} {m!s:18} truth {truth[name]:.4g}")


def covers(seed, **options):
    low, high = cl.measure(small, [("hessian_frobenius", options)], seed=seed)["hessian_frobenius"].interval(0.95)
    return low <= truth["hessian_frobenius"] <= high


for options in ({"probes": 16}, {"probes": 4}):
    share = np.mean([covers(seed, **options) for seed in range(TRIALS)])
    print(f"{options}: {share:.1%} of the 95% intervals contain the truth")

# %% [markdown]
# ## In a run
#
# The names are enough, for training as for the figure of what was measured.

# %%
L = cl.Objective(cl.problems.mlp((64, 64, 64, 10), "tanh"), "cross_entropy", train)
sgd = torch.optim.SGD(L.model.parameters(), lr=0.2)
names = ["sharpness", "hessian_frobenius", "top_square"]
for _ in cl.train(L, sgd, cl.Batches(L.size, 128, STEPS), diagnostics=names, every=11, run=runs / "own"):
    pass

run = cl.Run(runs / "own")
cl.plots.quantities(run)

# %% [markdown]
# And the answer to the question:

# %%
total, top, largest = (run.series(name) for name in ("hessian_frobenius", "top_square", "sharpness"))
low, high = total.interval(0.95)
figure, ax = cl.plots.axes_of(1, figsize=(6.4, 3.6))
shown = {"top ten eigenvalues": top.values, "largest eigenvalue": largest.values**2}
for (label, part), colour, style in zip(shown.items(), cl.plots.colours(2), ("-", "--"), strict=True):
    ax.plot(total.steps, part / total.values, style, color=colour, label=label)
    ax.fill_between(total.steps, part / high, part / low, color=colour, alpha=0.25, lw=0)
ax.set(xlabel="step", ylabel=r"share of $\|H\|_F^2$, with 95% interval", ylim=(0, 1))
ax.legend(fontsize=8, loc="center right")
figure

# %%
for k in (0, 10):
    print(f"k = {k:2}: {cl.measure(L, [('hessian_frobenius', {'k': k})])['hessian_frobenius']}")

# %% [markdown]
# ## Its page
#
# The parts of the docstring become what `curvlab explain` prints.

# %%
_ = curvlab(["explain", "hessian_frobenius"])

# %% [markdown]
# At the start ten directions of 8970 hold a tenth of $\|H\|_F^2$. After 100 steps it is 94%, in the end 98%, and the
# largest eigenvalue alone has 30%: curvature is as low-dimensional as Gur-Ari et al. say. Taking the top eigenvectors
# out of the probes shrinks the standard error from 8 to 0.04, so that the band of the last figure cannot be seen.
# Both quantities agree with the dense Hessian, and the intervals contain the truth about as often as they promise,
# also with four probes.
#
# **On a GPU, or at scale.** Nothing changes: `.to(at.w)` puts the signs where the parameters are, and `at.generator`
# draws the same ones for every device. A diagnostic that needs the batch size, the learning rate or held-out data
# says so by `needs=("batch_size",)`; it is then refused, with the fix, where they are missing.
#
# **Where this differs from the paper.** Gur-Ari et al. follow the gradient in the top subspace (`gradient_top_share`
# measures that); the share of the Frobenius norm is our example. There is no claim to judge. One that reads the log
# of your quantity is again one function and one decorator, `cl.claims.claim`.
