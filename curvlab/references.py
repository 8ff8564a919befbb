"""Dense references for the diagnostics of one point: matrices formed entry by entry, a loop over examples, averages over all
batches. They share the model's forward pass with the rest of the package, and nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import losses
from .batches import batch_size, take
from .objective import Objective
from .regularizers import REGULARIZERS

DRAWN, BEFORE, MICRO = (0, 3, 4), 0.1, 4  # the batch of the step; how far the step before came; a micro-batch
ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25)
ENTRIES = 5 * 10**7  # of a Jacobian


class Dense:
    """The summands of an objective at w, its Hessian and gradients, formed entry by entry in float64.

    Costs P products for a Hessian and P² numbers for each example: for a few examples and some hundred parameters.

    Args:
        L: in evaluation mode, in float64, on the CPU.
        test: of held-out data.
        lr: of the step.

    Attributes:
        G: (N, P) gradients of the weighted examples.
        g: (P,) their mean.
        H: (P, P) the Hessian of the mean loss.
    """

    def __init__(self, L: Objective, test: Objective | None = None, *, lr: float = 0.3) -> None:
        self.L, self.held_out, self.lr = L, test, lr
        self.w, self.n = L.params(), L.size
        self.k = max(1, min(5, len(self.w) - 1))
        self.scale = torch.ones(self.n, dtype=self.w.dtype) if L.weights is None else L.weights
        self.data = [L.place(piece).batch for piece in L.pieces()]
        self.examples = [take(batch, slice(i, i + 1)) for batch in self.data for i in range(batch_size(batch))]
        self.forward_mode = all(getattr(m, "padding_idx", None) is None for m in L.model.modules())  # wrong through it
        with L.measuring():
            self.G = torch.stack([self._gradient(i) for i in range(self.n)])
        self.g = self.G.mean(0)

    # -- the function ----------------------------------------------------------------------------------------------

    def _call(self, w: Tensor, batch: Any, **options: Any) -> Any:
        parts = w.split([p.numel() for p in self.L.variables()])
        state = {
            f"model.{name}": part.reshape(p.shape)
            for name, p, part in zip(self.L.names, self.L.variables(), parts, strict=True)
        }
        with self.L.measuring():
            return torch.func.functional_call(self.L.module, state, (batch,), options)

    def losses(self, w: Tensor, batch: Any) -> Tensor:
        """(B,), without weights."""
        return self._call(w, batch)

    def outputs(self, w: Tensor, batch: Any) -> Tensor:
        """(B, ...)"""
        return self._call(w, batch, outputs_only=True)

    def value(self, w: Tensor) -> Tensor:
        return (self.scale * torch.cat([self.losses(w, batch) for batch in self.data])).sum() / self.n

    def _gradient(self, i: int) -> Tensor:
        w = self.w.clone().requires_grad_()
        return self.scale[i] * torch.autograd.grad(self.losses(w, self.examples[i])[0], w)[0]

    def hessian_of(self, function: Callable[[Tensor], Tensor], w: Tensor | None = None) -> Tensor:
        """(P, P), by forward mode over the gradient where the layers have rules, by rows of the gradient's graph otherwise.

        Neither jacrev of jacrev nor torch.func.hessian: both are silently wrong through LayerNorm.
        """
        w = self.w if w is None else w
        if self.forward_mode:
            try:
                gradient = torch.func.grad(function)  # jacfwd of it, in parts of 64 rows
                rows = torch.func.vmap(lambda v: torch.func.jvp(gradient, (w,), (v,))[1], chunk_size=64)
                return rows(torch.eye(len(w), dtype=w.dtype))
            except (RuntimeError, NotImplementedError):  # no rule, or none for vectors side by side
                self.forward_mode = False
        w = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(function(w), w, create_graph=True)
        if not g.requires_grad:
            return torch.zeros(len(w), len(w), dtype=w.dtype)
        return torch.stack([torch.autograd.grad(entry, w, retain_graph=True)[0] for entry in g])

    @cached_property
    def H(self) -> Tensor:
        return self.hessian_of(self.value)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.linalg.eigh(self.H))

    @property
    def eigenvalues(self) -> Tensor:
        """(P,), ascending."""
        return self._eigen[0]

    @property
    def eigenvectors(self) -> Tensor:
        return self._eigen[1]

    @cached_property
    def example_hessians(self) -> Tensor:
        """(N, P, P)"""

        def loss(i: int) -> Callable[[Tensor], Tensor]:
            return lambda w: self.scale[i] * self.losses(w, self.examples[i])[0]

        return torch.stack([self.hessian_of(loss(i)) for i in range(self.n)])

    # -- batches -----------------------------------------------------------------------------------------------------

    def batches(self, b: int, replacement: bool) -> Iterator[tuple[int, ...]]:
        """Every batch, all of the same probability."""
        every = range(self.n)
        return itertools.product(every, repeat=b) if replacement else itertools.combinations(every, b)

    def batch_gradients(self, b: int, replacement: bool) -> Tensor:
        """g_b of every batch."""
        return torch.stack([self.G[list(batch)].mean(0) for batch in self.batches(b, replacement)])

    def S(self, b: int, replacement: bool) -> Tensor:
        """E[g_b g_bᵀ] by going through every batch."""
        g_b = self.batch_gradients(b, replacement)
        return g_b.T @ g_b / len(g_b)

    def covariance(self) -> Tensor:
        return (self.G - self.g).T @ (self.G - self.g) / self.n

    def loss_difference(self, b: int, replacement: bool) -> Tensor:
        after = [self.value(self.w - self.lr * g_b) for g_b in self.batch_gradients(b, replacement)]
        return torch.stack(after).mean() - self.value(self.w)

    def batch_curvatures(self, b: int, replacement: bool) -> Tensor:
        """g_bᵀ H_b g_b of every batch, with the Hessian of the batch's own loss."""
        found = []
        for batch in self.batches(b, replacement):
            g_b, H_b = self.G[list(batch)].mean(0), self.example_hessians[list(batch)].mean(0)
            found.append(g_b @ H_b @ g_b)
        return torch.stack(found)

    @property
    def drawn(self) -> Tensor:
        """The gradient of the batch that the step takes."""
        return self.G[list(DRAWN)].mean(0) if self.n > max(DRAWN) else self.g

    def micro_batches(self) -> list[slice]:
        return [slice(lo, min(lo + MICRO, self.n)) for lo in range(0, self.n, MICRO)]

    def by_micro_batch(self, function: Callable[[slice], Tensor]) -> Tensor:
        """The mean over micro-batches, by their size."""
        return torch.stack([len(self.G[part]) / self.n * function(part) for part in self.micro_batches()]).sum()

    @property
    def outputs_count(self) -> int:
        """N C, or 1 where the loss hides the outputs."""
        return 1 if isinstance(self.L.loss, losses.BatchLoss) else self.z.numel()

    # -- outputs -----------------------------------------------------------------------------------------------------

    @cached_property
    def z(self) -> Tensor:
        """(N, C)"""
        return torch.cat([self.outputs(self.w, batch).flatten(1) for batch in self.data]).detach()

    @cached_property
    def jacobian(self) -> Tensor:
        """(N, C, P)

        Raises:
            TypeError: more than 5e7 entries.
        """
        if self.z.numel() * len(self.w) > ENTRIES:
            raise TypeError(f"the Jacobian has {self.z.numel() * len(self.w):.2g} entries")
        rows = []
        for example in self.examples:
            w = self.w.clone().requires_grad_()
            z = self.outputs(w, example).flatten()
            rows.append(torch.stack([torch.autograd.grad(entry, w, retain_graph=True)[0] for entry in z]))
        return torch.stack(rows)

    def of_outputs(self, i: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The loss of example i as a function of its outputs, and these."""
        shape, targets = self.outputs(self.w, self.examples[i]).shape, self.examples[i][1]
        return lambda z: self.L.loss(z.reshape(shape), targets)[0], self.z[i]  # type: ignore[operator]

    def output_gradient(self) -> Tensor:
        found = []
        for i in range(self.n):
            loss, z = self.of_outputs(i)
            z = z.clone().requires_grad_()
            found.append(self.scale[i] * torch.autograd.grad(loss(z), z)[0].abs())
        return torch.stack(found).mean(0)

    def ggn_trace(self) -> Tensor:
        """(1/N) Σ s_i tr(J_iᵀ ∇²ℓ_i J_i), with the Hessian of the loss in the outputs formed."""
        found = []
        for i, J in enumerate(self.jacobian):
            loss, z = self.of_outputs(i)
            found.append(self.scale[i] * (J * (torch.func.jacfwd(torch.func.grad(loss))(z) @ J)).sum())
        return torch.stack(found).mean()

    def score_norms(self) -> Tensor:
        """(N,) E over the model's own labels of ‖∇ log p(y|x_i)‖², label by label.

        Raises:
            TypeError: the loss is no likelihood that is known.
        """
        J, loss = self.jacobian, self.L.loss
        if loss is losses.squared_error:
            return J.square().sum((1, 2))
        if loss is losses.binary_cross_entropy:
            p = self.z.sigmoid()
            return (p * (1 - p) * J.square().sum(2)).sum(1)
        if loss is not losses.cross_entropy:
            raise TypeError("the loss is no likelihood that is known")
        p = self.z.softmax(1)
        scores = J - (p[:, :, None] * J).sum(1, keepdim=True)  # ∇ log p_c
        return (p * scores.square().sum(2)).sum(1)

    def mean_jacobian(self, part: slice) -> Tensor:
        """(C, P)"""
        return (self.scale[:, None, None] * self.jacobian)[part].mean(0)

    def ntk(self) -> Tensor:
        """(1/N) Jᵀ J, which has the non-zero eigenvalues of (1/N) J Jᵀ."""
        J = (self.scale.sqrt()[:, None, None] * self.jacobian).reshape(-1, len(self.w))
        return J.T @ J / self.n

    def accuracy(self, L: Objective | None) -> Tensor:
        assert L is not None
        hits, scale = [], torch.ones(L.size) if L.weights is None else L.weights
        for batch in (L.place(piece).batch for piece in L.pieces()):
            targets = batch[1].argmax(1) if batch[1].is_floating_point() else batch[1]
            hits.append(self.outputs(self.w, batch).argmax(1) == targets)
        return (torch.cat(hits).double() * scale).mean()

    def test_loss(self) -> Tensor:
        assert self.held_out is not None
        found = torch.cat([self.losses(self.w, self.held_out.place(piece).batch) for piece in self.held_out.pieces()])
        return (found if self.held_out.weights is None else found * self.held_out.weights).mean()

    # -- other points and parts ----------------------------------------------------------------------------------------

    def divisor(self) -> Tensor:
        """What an adaptive optimizer could divide by."""
        return 0.5 + torch.linspace(0, 1, len(self.w), dtype=self.w.dtype)

    def w_before(self) -> Tensor:
        return self.w + BEFORE * torch.linspace(-1, 1, len(self.w), dtype=self.w.dtype)

    def gradient_at(self, w: Tensor) -> Tensor:
        w = w.clone().requires_grad_()
        return torch.autograd.grad(self.value(w), w)[0]

    def secant(self) -> Tensor:
        before = self.w_before()
        step = self.w - before
        linear = self.gradient_at(before) @ step
        return 2 * (self.value(self.w) - self.value(before) - linear) / (step @ step)

    def layers(self) -> list[Tensor]:
        """Places of the parameters of each module in the flat vector."""
        names = [name.rpartition(".")[0] or name for name in self.L.names]
        sizes = torch.tensor([p.numel() for p in self.L.variables()])
        owner = torch.arange(len(names)).repeat_interleave(sizes)
        return [
            torch.nonzero(torch.tensor([names[i] == layer for i in owner.tolist()]))[:, 0]
            for layer in dict.fromkeys(names)
        ]

    def by_layer(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([function(place) for place in self.layers()])

    def block(self, place: Tensor) -> Tensor:
        return self.H[place][:, place]

    def along_step(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([function(self.w - alpha * self.lr * self.g) for alpha in ALPHAS])

    def critical_step(self) -> Tensor:
        """Where the loss along the preconditioned gradient first comes back to its start; NaN if it does not."""
        d = self.g / self.divisor()
        start, step = self.value(self.w), 0.05 * self.g @ d / (d @ self.H @ d).abs()
        steps = [i * step for i in range(1, 2000)]
        low = high = next((t for t in steps if self.value(self.w - t * d) > start), step * math.nan)
        low = low - step
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self.value(self.w - middle * d) > start else (middle, high)
        return high

    @cached_property
    def hessians_along_step(self) -> list[Tensor]:
        return [self.hessian_of(self.value, self.w - alpha * self.lr * self.g) for alpha in ALPHAS]

    def top_share(self, k: int) -> Tensor:
        return (self.eigenvectors[:, -k:].T @ self.g).square().sum() / self.g.square().sum()

    def density(self, grid: Tensor) -> Tensor:
        """The density of eigenvalues, smoothed as `hessian_density` says."""
        sigma = (self.eigenvalues[-1] - self.eigenvalues[0]) / 100
        bumps = torch.exp(-0.5 * ((grid[:, None] - self.eigenvalues) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        return bumps.mean(1)


def top(A: Tensor, k: int) -> Tensor:
    """The k largest eigenvalues, descending."""
    return torch.linalg.eigvalsh(A).flip(0)[:k]


def leading(A: Tensor, k: int) -> Tensor:
    """The k top eigenvectors, (P, k)."""
    return torch.linalg.eigh(A).eigenvectors[:, -k:]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def _resultant(g_b: Tensor) -> Tensor:
    return (g_b / g_b.norm(dim=1, keepdim=True)).mean(0).square().sum()


def _pair_cosines(G: Tensor) -> Tensor:
    return torch.stack([cosine(G[i], G[j]) for i in range(len(G)) for j in range(len(G)) if i != j]).mean()


def _largest_share(x: Tensor) -> Tensor:
    return x.max() / x.sum()


def _variation(norms: Tensor) -> Tensor:
    return norms.std(correction=0) / norms.mean()


def _projected(S: Tensor, Q: Tensor) -> Tensor:
    return (Q.T @ S @ Q).trace() / S.trace()


# The definitions, of (references, batch size, replacement). A new diagnostic of one point gets a line here.
Definition = Callable[[Dense, int, bool], Tensor]
DEFINITIONS: dict[str, Definition] = {
    "loss": lambda d, b, r: d.value(d.w),
    "gradient_norm": lambda d, b, r: d.g.norm(),
    "batch_gradient_norm": lambda d, b, r: d.drawn.norm(),
    "train_accuracy": lambda d, b, r: d.accuracy(d.L),
    "test_loss": lambda d, b, r: d.test_loss(),
    "test_accuracy": lambda d, b, r: d.accuracy(d.held_out),
    "gradient_second_moment_trace": lambda d, b, r: d.S(b, r).trace(),
    "gradient_variance": lambda d, b, r: (d.G - d.g).square().sum(1).mean(),
    "gradient_concentration": lambda d, b, r: d.g @ d.g / d.S(b, r).trace(),
    "interaction_trace": lambda d, b, r: (d.H @ d.S(b, r)).trace(),
    "interaction_sharpness": lambda d, b, r: (d.H @ d.S(b, r)).trace() / d.S(b, r).trace(),
    "instability": lambda d, b, r: (d.H @ d.S(b, r)).trace() / (d.g @ d.g),
    "expected_loss_difference": lambda d, b, r: d.loss_difference(b, r),
    "sharpness": lambda d, b, r: d.eigenvalues[-1],
    "hessian_eigenvalues": lambda d, b, r: d.eigenvalues.flip(0)[: d.k],
    "gradient_alignment": lambda d, b, r: (d.eigenvectors[:, -1] @ d.g).abs() / d.g.norm(),
    "gradient_top_share": lambda d, b, r: d.top_share(d.k),
    "gradient_variance_top_share": lambda d, b, r: _largest_share((d.G - d.g).square().sum(1)),
    "gradient_noise_scale": lambda d, b, r: d.covariance().trace() / (d.g @ d.g),
    "example_gradient_cosine": lambda d, b, r: _pair_cosines(d.G),
    "mean_resultant_length": lambda d, b, r: _resultant(d.batch_gradients(b, r)),
    "batch_gradient_norm_variation": lambda d, b, r: _variation(d.batch_gradients(b, r).norm(dim=1)),
    "batch_gradient_top_share": lambda d, b, r: _projected(d.S(b, r), d.eigenvectors[:, -d.k :]),
    "loss_output_gradient": lambda d, b, r: d.output_gradient(),
    "gradient_covariance_eigenvalues": lambda d, b, r: top(d.covariance(), spread(d)),
    "gradient_covariance_effective_rank": lambda d, b, r: d.covariance().trace() ** 2 / d.covariance().square().sum(),
    "covariance_overlap": lambda d, b, r: (
        (leading(d.H, spread(d, 4)).T @ leading(d.covariance(), spread(d, 4))).square().sum() / spread(d, 4)
    ),
    "fisher_trace": lambda d, b, r: (d.scale * d.score_norms()).mean(),
    "ntk_eigenvalues": lambda d, b, r: top(d.ntk(), min(5, len(d.w), d.z.numel())),
    "preconditioned_sharpness": lambda d, b, r: top(d.H / torch.outer(d.divisor(), d.divisor()).sqrt(), 1)[0],
    "batch_sharpness": lambda d, b, r: (d.batch_curvatures(b, r) / d.batch_gradients(b, r).square().sum(1)).mean(),
    "batch_sharpness_of_means": lambda d, b, r: d.batch_curvatures(b, r).mean() / d.S(b, r).trace(),
    "secant_sharpness": lambda d, b, r: d.secant(),
    "critical_sharpness": lambda d, b, r: 2 / d.critical_step(),
    "difference_sharpness": lambda d, b, r: d.g @ d.H @ d.g / (d.g @ d.g),
    "gradient_cosine": lambda d, b, r: cosine(d.g, d.gradient_at(d.w_before())),
    "batch_gradient_cosine": lambda d, b, r: cosine(d.drawn, d.G[0]),
    "directional_sharpness": lambda d, b, r: torch.stack([d.g @ H @ d.g for H in d.hessians_along_step]) / (d.g @ d.g),
    "directional_alignment": lambda d, b, r: torch.stack(
        [(leading(H, 1)[:, 0] @ d.eigenvectors[:, -1]).abs() for H in d.hessians_along_step]
    ),
    "loss_along_step": lambda d, b, r: d.along_step(d.value),
    "hessian_trace": lambda d, b, r: d.H.trace(),
    "ggn_trace": lambda d, b, r: d.ggn_trace(),
    "layer_sharpness": lambda d, b, r: d.by_layer(lambda place: top(d.block(place), 1)[0]),
    "layer_hessian_trace": lambda d, b, r: d.by_layer(lambda place: d.block(place).trace()),
    "layer_gradient_norm": lambda d, b, r: d.by_layer(lambda place: d.g[place].norm()),
    "layer_parameter_norm": lambda d, b, r: d.by_layer(lambda place: d.w[place].norm()),
    "trajectory_distance": lambda d, b, r: torch.zeros(()),  # from its own start
    "microbatch_gradient_norm": lambda d, b, r: d.by_micro_batch(lambda part: d.G[part].mean(0).norm()),
    "gradient_norm_penalty": lambda d, b, r: d.by_micro_batch(lambda part: d.G[part].mean(0).square().sum()),
    "gradient_norm_difference_penalty": lambda d, b, r: DEFINITIONS["gradient_norm_penalty"](d, b, r),
    "sampled_gradient_norm_penalty": lambda d, b, r: torch.stack(
        [d.G[part].mean(0).square().sum() for part in d.micro_batches()]
    ).mean(),
    "fisher_trace_penalty": lambda d, b, r: d.by_micro_batch(
        lambda part: (d.scale**2 * d.score_norms())[part].mean() / len(d.G[part])
    ),
    "average_jacobian_penalty": lambda d, b, r: d.by_micro_batch(
        lambda part: d.mean_jacobian(part).mean(0).square().sum()
    ),
    "unit_jacobian_penalty": lambda d, b, r: d.by_micro_batch(
        lambda part: d.mean_jacobian(part).square().sum(1).mean()
    ),
    "implicit_regularizer": lambda d, b, r: DEFINITIONS["gradient_norm_penalty"](d, b, r) / 4,
    "implicit_regularizer_mean": lambda d, b, r: d.g @ d.g / 4,
    "implicit_regularizer_variance": lambda d, b, r: d.by_micro_batch(
        lambda part: (d.G[part].mean(0) - d.g).square().sum() / 4
    ),
}


def spread(d: Dense, most: int = 5) -> int:
    """How many eigenvalues of the covariance of N gradients are asked for."""
    return max(1, min(most, d.n - 1, len(d.w) - 1))


def accurate(d: Dense) -> dict[str, dict[str, Any]]:
    """Options by which diagnostics are as accurate as they can be, and ask for no more than there is."""
    tol, micro = {"tol": 1e-12}, {"micro_batch_size": MICRO}
    return {
        **{name: {"exact": True} for name in ("interaction_trace", "interaction_sharpness", "instability")},
        **dict.fromkeys(("sharpness", "gradient_alignment", "preconditioned_sharpness", "directional_alignment"), tol),
        **{
            name: tol | {"k": d.k} for name in ("hessian_eigenvalues", "gradient_top_share", "batch_gradient_top_share")
        },
        "layer_sharpness": tol,
        **dict.fromkeys(("critical_sharpness", "difference_sharpness"), tol),
        "ntk_eigenvalues": tol | {"k": min(5, len(d.w), d.outputs_count)},
        "covariance_overlap": tol | {"k": spread(d, 4)},
        "gradient_covariance_eigenvalues": {"k": spread(d)},
        "expected_loss_difference": {"samples": 500},
        **{name: {"samples": 400} for name in ("mean_resultant_length", "batch_gradient_norm_variation")},
        **{name: {"samples": 150} for name in ("batch_sharpness", "batch_sharpness_of_means")},
        "layer_hessian_trace": {"probes": 300},
        "hessian_trace": {"num_matvecs": max(2, min(300, len(d.w) - 1))},
        "hessian_density": {"num_probes": 20, "steps": min(len(d.w), 100)},
        "microbatch_gradient_norm": micro,
        **{name: micro | ({"draws": 100} if entry.draws else {}) for name, entry in REGULARIZERS.items()},
    }
