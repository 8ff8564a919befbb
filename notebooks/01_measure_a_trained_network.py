# %% [markdown]
# # 1. Measure a trained network
#
# Training has stopped somewhere. How curved is the loss there, in how many directions, and what would the next step
# of SGD meet? This notebook trains a small network on handwritten digits and measures the end point: the spectrum of
# the Hessian, whose few outliers Sagun et al. ([arXiv 1706.04454](https://arxiv.org/abs/1706.04454)) and Ghorbani et
# al. ([arXiv 1901.10159](https://arxiv.org/abs/1901.10159), fig. 1) describe, and the curves over the batch size $b$
# that follow from eq. 1 and 12 of Lee 2022. Every number comes with its error.

# %% reduced="STEPS, SIZES, K = 30, [1, 32, 1024], 4"
import torch

import curvlab as cl

torch.set_num_threads(1)  # small models are fastest with one

STEPS = 600
SIZES = [2**k for k in range(11)]  # batch sizes
K = 20  # eigenvalues

# %%
train, test = cl.problems.digits(1024)
model = cl.problems.mlp((64, 64, 64, 10), "tanh")
L = cl.Objective(model, "cross_entropy", train)  # the mean loss as a function of one flat vector

sgd = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in cl.train(L, sgd, cl.Batches(L.size, 32, STEPS)):
    pass

# %% [markdown]
# ## Numbers with errors
#
# `exact` is up to rounding; `bound` is a distance that the truth keeps to; `sem` is one standard error, of which the
# interval takes the right multiple.

# %%
names = ["loss", "test_accuracy", "gradient_norm", "sharpness", "hessian_trace", "ggn_trace", "fisher_trace",
         "gradient_noise_scale"]  # fmt: skip
found = cl.measure(L, names, test=cl.Objective(model, "cross_entropy", test))
for name, m in found.items():
    low, high = m.interval(0.95)
    print(f"{name:21} {m!s:18} {m.kind:6} 95%: {low:.5g} to {high:.5g}")

# %% [markdown]
# Two identities say whether such numbers can be trusted. For cross-entropy the Gauss-Newton matrix is the Fisher
# matrix, so the trace of the one, sampled with four probes, must agree with that of the other, which is exact here.
# And on a problem that is small enough for a dense Hessian the sharpness must be its largest eigenvalue.

# %%
sampled = cl.measure(L, [("fisher_trace", {"probes": 4})])["fisher_trace"]
low, high = sampled.interval(0.95)
print(f"tr(G) = {found['ggn_trace'].value:.2f}; tr(F) = {sampled}, 95%: {low:.2f} to {high:.2f}")

few = cl.Objective(
    cl.problems.mlp((64, 8, 10), "tanh"), "cross_entropy", (train[0][:16], train[1][:16]), dtype=torch.float64
)
dense = torch.linalg.eigvalsh(cl.dense(cl.hessian(few)))[-1]
top = cl.measure(few, ["sharpness"])["sharpness"]
print(f"largest eigenvalue of the dense Hessian {dense:.4f}; sharpness {top}")

# %% [markdown]
# ## Curves and spectra
#
# All batch sizes come from the same two traces, $\mathrm{tr}(HS_1)$ and $\nabla L^\top H\,\nabla L$, so a whole curve
# costs what a point does.

# %%
curves = cl.measure(
    L,
    [("hessian_eigenvalues", {"k": K}), "hessian_density", "interaction_sharpness", "gradient_concentration",
     "layer_sharpness", "layer_hessian_trace"],
    batch_size=SIZES,
)  # fmt: skip
cl.plots.measurements(curves, title="digits, MLP 64-64-64-10 tanh, cross-entropy, after training")

# %% [markdown]
# And the loss itself, along the two sharpest directions and along the gradient:

# %%
cl.plots.lines(cl.landscape.top_lines(L, step=-L.gradient(), radius=1.0))

# %% [markdown]
# The spectrum is of the kind that the two papers describe: a bulk at zero with a tail to 0.6, and outside of it seven
# eigenvalues, up to 3.4, a few less than there are classes. Along the two sharpest directions the loss is anything
# but quadratic at a distance of 1. The Gauss-Newton part makes up four fifths of $\mathrm{tr}(H)$; the first layer
# carries most of both, sharpness and trace.
#
# The curves show what small batches see. A gradient of one example is nearly all noise, $\rho_1 = 0.004$, and the
# curvature along it is 1.85 on average. As $b$ grows $\rho_b$ goes to 1 and $\|H\|_{S_b}$ to 2.84, still below the
# sharpness, which it never exceeds.
#
# **On a GPU, or at the paper's scale.** Load your own weights into your own module and pass it with `.to("cuda")`,
# its loss and its data to `cl.Objective`; nothing else changes. `memory="8 GiB"` there bounds what measuring may
# keep, and a subset of a few thousand examples is usually enough, with `population_size=` for the size of the whole.
# With many classes leave out `ggn_trace` and ask for `("hessian_trace", {"method": "hutchinson"})`: by default both
# cost a pass for each output.
#
# **Where this differs from the papers.** They measure convolutional networks, at many points of training; this is one
# point of a small one. No claim is judged: there is no run. The identities above are exact theorems, and hold.
