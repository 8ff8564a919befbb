"""PyHessian's calls, answered by curvlab. Hides how lists of tensors and criteria that average become an `Objective`.

Import `hessian` from here instead of from ``pyhessian``, `normalization` instead of from ``pyhessian.utils``, `get_esd_plot`
and `density_generate` instead of from the file density_plot.py beside PyHessian's examples.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import batch_size, take, tree_map
from ..linalg import LinearOperator, eigsh, quadrature
from ..linalg.probes import generator, rademacher
from ..linalg.trace import sample_mean
from ..losses import FUNCTIONS
from ..measurement import Measurement
from ..objective import Objective
from ..operators import hessian as hessian_of

PILOT = 16  # probes whose variance says how many more a trace needs
BLOCK = 8  # probes multiplied together: where graphs do not fit in memory, they are rebuilt once a block


class hessian:
    """The Hessian of the mean loss over a batch or a data set, with the interface of PyHessian.

    What it gives is the Hessian of a `curvlab.Objective`: of the mean over all examples, in evaluation mode, at the
    parameters that the model has when a method is called. PyHessian differs where its answers are not that: class weights
    and ignored targets are normalised over all the data here, not in each batch; a loader is read as its data set, so
    ``drop_last`` drops nothing; the model's flags, `.grad` and buffers stay as they are.

    The probes depend on the state that torch's global generator has when the object is made, which is read and not changed:
    ``torch.manual_seed(0)`` before makes the numbers reproducible, and another seed gives other probes. Each call draws
    new ones.

    Args:
        model: any `nn.Module`, also in DataParallel.
        criterion: ``(outputs, targets)`` -> the mean over the batch: a loss module or function of torch, or any callable
            whose value on a batch is the mean of its values on batches of one example, which is checked.
        data: one batch, ``(inputs, targets)``.
        dataloader: a `DataLoader` that visits each example once, or a list of batches. One of `data` and `dataloader`.
        cuda: measure on the GPU, the model's own if it is on one; otherwise on the CPU. The model itself is not moved.

    Attributes:
        params: the trainable parameters of the model, in the order of the lists of tensors below.
        device: where it measures, such as "cpu".
        objective: the `curvlab.Objective`, for whatever else curvlab measures.
        eigenvalue_measurement: after `eigenvalues`: the same values with their errors and the products spent.
        trace_measurement: after `trace`: the mean with its standard error.

    Raises:
        ValueError: both or neither of `data` and `dataloader`; no CUDA device; a loader that visits a part of its data or
            some of them twice; a criterion that is no mean over examples; and what `curvlab.Objective` refuses, such as
            random augmentation.
        TypeError: a `dataloader` that may not give the same batches twice.

    Source: the interface is that of PyHessian 0.1 (Yao, Gholami, Keutzer and Mahoney 2020, arXiv 1912.07145).

    Example:
        >>> import torch
        >>> x, y = torch.eye(2).repeat(4, 1), torch.zeros(8, 1)
        >>> h = hessian(torch.nn.Linear(2, 1, bias=False), torch.nn.MSELoss(), data=(x, y), cuda=False)
        >>> [round(value, 5) for value in h.eigenvalues(top_n=2)[0]]
        [1.0, 1.0]
    """

    def __init__(
        self, model: nn.Module, criterion: Any, data: Any = None, dataloader: Any = None, cuda: bool = True
    ) -> None:
        if (data is None) == (dataloader is None):
            given = "neither" if data is None else "both"
            raise ValueError(f"got {given} of data and dataloader; pass data=(inputs, targets) or dataloader=...")
        self.model, self.criterion = model, criterion
        own = type(criterion) in FUNCTIONS.values() or any(criterion is function for function in FUNCTIONS)
        loss = criterion if own else _ByExample(criterion)
        batches = [data] if dataloader is None else dataloader
        self.objective = Objective(model, loss, batches, device=_device(model, cuda))
        if not own:
            _require_mean(self.objective, criterion)
        self.params = self.objective.variables()
        self.device = str(self.objective.device)
        self.eigenvalue_measurement: Measurement | None = None
        self.trace_measurement: Measurement | None = None
        self._generator = generator("pyhessian", torch.get_rng_state().numpy().tobytes().hex())

    def dataloader_hv_product(self, v: list[Tensor]) -> tuple[float, list[Tensor]]:
        """(vᵀHv, H v) for v as tensors in the shapes of `params`; v need not have length 1."""
        L = self.objective
        flat = L.join([part.detach().to(L.device, L.dtype) for part in v])
        image = self._matrix() @ flat
        return float(flat.double() @ image.double()), self._parts(image)

    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        """The eigenpairs of largest magnitude, the largest first.

        Block Lanczos instead of power iteration: 10-20 products for the first pair. `eigenvalue_measurement` holds the
        residual of each as its error; the value itself is usually better by orders of magnitude.

        Args:
            maxIter: products that each pair may cost; a warning says when they were not enough.
            tol: residual of every pair, ‖H v - θ v‖, relative to the largest |θ|. PyHessian's bounds the change of θ between
                two iterations, which may be small far from an eigenvalue.
            top_n: how many pairs.

        Returns:
            The eigenvalues, and the eigenvectors of length 1, each a list of tensors in the shapes of `params`.
        """
        _require_positive(maxIter=maxIter, top_n=top_n)
        pairs = eigsh(
            self._matrix(), top_n, which="LM", tol=tol, max_matvecs=maxIter * top_n, generator=self._generator
        )
        order = torch.argsort(pairs.values.abs(), descending=True)
        values, residuals = pairs.values[order].cpu(), pairs.residuals[order].cpu()
        if not pairs.converged:
            warnings.warn(
                f"maxIter={maxIter} products for each eigenpair left a residual of {float(residuals.max()):.1e}, more than "
                f"tol={tol} of {float(values[0]):.3g}; raise maxIter or tol",
                RuntimeWarning,
                stacklevel=2,
            )
        self.eigenvalue_measurement = Measurement(
            values.numpy(),
            residuals.numpy(),
            "bound",
            floor=np.full(top_n, pairs.floor),
            matvecs=pairs.matvecs,
            axis=("index", tuple(range(1, top_n + 1))),
        )
        return values.tolist(), [self._parts(v) for v in pairs.vectors[:, order.to(pairs.vectors.device)].T]

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Quadratic forms zᵀHz of random signs z, whose mean estimates tr(H); `trace_measurement` has its standard error.

        Args:
            maxIter: the most probes, one product each.
            tol: half the width of the 95% interval, relative to the value. A pilot of 16 probes says how many it takes;
                PyHessian stops as soon as two running means happen to be close, often at the second probe.

        Raises:
            FloatingPointError: a product is not finite.
        """
        _require_positive(maxIter=maxIter)
        H = self._matrix()
        samples = self._quadratic_forms(H, min(maxIter, PILOT))
        pilot = sample_mean(samples)
        low, high = (float(end) for end in pilot.interval(0.95))
        target = tol * abs(float(np.mean(samples)))
        needed = len(samples) * ((high - low) / (2 * target)) ** 2 if target > 0 else math.inf
        if needed > len(samples):
            more = maxIter if needed > maxIter else math.ceil(needed)
            samples += self._quadratic_forms(H, more - len(samples))
        self.trace_measurement = sample_mean(samples, matvecs=len(samples))
        return samples

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """The density of the eigenvalues by stochastic Lanczos quadrature, for `get_esd_plot`.

        Each of `n_v` random sign vectors gives Ritz values θ_j and weights ω_j that sum to 1, by Lanczos with full
        reorthogonalization in `iter` products: Σ ω_j f(θ_j) = vᵀf(H)v/P exactly for polynomials f of degree below
        2 `iter`, and so tr f(H)/P in the mean.

        Returns:
            Ritz values, ascending, and weights, a list each for every vector. Where the Krylov space of one ends early, as
            with fewer than `iter` parameters, its list is shorter; it is filled with weights of 0 to the longest.

        Raises:
            FloatingPointError: a product is not finite.
        """
        _require_positive(iter=iter, n_v=n_v)
        L, H = self.objective, self._matrix()
        nodes, weights = [], []
        for _ in range(n_v):
            v = rademacher((L.num_params,), L.device, L.dtype, generator=self._generator)
            theta, omega = quadrature(H, v, min(iter, L.num_params))
            nodes.append(theta.tolist())
            weights.append(omega.tolist())
        longest = max(len(row) for row in nodes)
        nodes = [row + row[-1:] * (longest - len(row)) for row in nodes]
        return nodes, [row + [0.0] * (longest - len(row)) for row in weights]

    def _matrix(self) -> LinearOperator:
        """H at the model's current parameters."""
        return hessian_of(self.objective)

    def _parts(self, v: Tensor) -> list[Tensor]:
        return [part.clone() for part in self.objective.split(v.contiguous())]

    def _quadratic_forms(self, H: LinearOperator, count: int) -> list[float]:
        samples: list[float] = []
        while len(samples) < count:
            shape = (H.size, min(BLOCK, count - len(samples)))
            Z = rademacher(shape, H.device, H.dtype, generator=self._generator)
            samples += (Z.double() * (H @ Z).double()).sum(0).tolist()
        if not np.isfinite(samples).all():
            raise FloatingPointError(
                "a product with the Hessian is not finite; the parameters have diverged. Measure at other parameters"
            )
        return samples


def normalization(v: list[Tensor]) -> list[Tensor]:
    """A list of tensors as one vector of length 1; zeros stay zeros."""
    length = math.sqrt(sum(float(part.double().square().sum()) for part in v))
    return [part / (length or 1.0) for part in v]


def density_generate(
    eigenvalues: Any, weights: Any, num_bins: int = 10000, sigma_squared: float = 1e-5, overhead: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """The density of `hessian.density` on a grid: its mean over the probes, smoothed by a Gaussian.

    Args:
        eigenvalues, weights: one list for each probe.
        sigma_squared: variance of the Gaussian, times the range of the grid where that exceeds 1; never below the squared
            spacing of the grid, where eigenvalues would fall between its points.
        overhead: how far the grid reaches beyond the extreme eigenvalues.

    Returns:
        The density, (num_bins,), whose integral over the grid is 1, and the grid.
    """
    nodes, masses = np.asarray(eigenvalues, dtype=float), np.asarray(weights, dtype=float)
    grid = np.linspace(nodes.min() - overhead, nodes.max() + overhead, num_bins)
    spacing = grid[1] - grid[0]
    variance = max(sigma_squared * max(1.0, grid[-1] - grid[0]), spacing**2)
    density = np.zeros(num_bins)
    for row, mass in zip(nodes, masses, strict=True):
        density += np.exp(-((grid[:, None] - row) ** 2) / (2 * variance)) @ mass
    return density / (density.sum() * spacing), grid


def get_esd_plot(eigenvalues: Any, weights: Any) -> Any:
    """Draw the eigenvalue density of `hessian.density` on a logarithmic axis, and save it as example.pdf.

    Returns:
        The matplotlib figure, which a notebook shows; no window is opened and pyplot's state is left alone.
    """
    from matplotlib.figure import Figure

    density, grid = density_generate(eigenvalues, weights)
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(grid, density + 1e-7)
    axes.set_xlim(float(np.min(eigenvalues)) - 1, float(np.max(eigenvalues)) + 1)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    figure.savefig("example.pdf")
    return figure


class _ByExample(nn.Module):
    """A criterion that averages over a batch, called with each example alone: twice the same, so that it may squeeze()."""

    def __init__(self, criterion: Any) -> None:
        super().__init__()
        self.criterion = criterion
        self.mapped = True

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """ℓ_i, (B,).

        Raises:
            ValueError: the criterion gives no number for such a batch.
        """
        if self.mapped:
            try:
                return torch.vmap(lambda *one: self._value(*tree_map(lambda t: t.expand(2, *t.shape), one)))(
                    outputs, targets
                )
            except Exception:  # control flow on values, operations without a batching rule, leaves that are no tensors
                self.mapped = False
        twice = [take((outputs, targets), torch.tensor([i, i])) for i in range(batch_size((outputs, targets)))]
        try:
            return torch.stack([self._value(*one) for one in twice])
        except Exception as error:
            raise ValueError(
                f"criterion gives no number for a batch of one example, repeated ({type(error).__name__}: {error}); "
                "expected the mean over a batch of any size, as losses of shape (B,) give by .mean()"
            ) from error

    def _value(self, outputs: Any, targets: Any) -> Tensor:
        return self.criterion(outputs, targets).reshape(())


def _device(model: nn.Module, cuda: bool) -> torch.device:
    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("cuda=True, the default as in PyHessian, but torch finds no CUDA device; pass cuda=False")
    first = next(model.parameters(), None)
    return first.device if first is not None and first.device.type == "cuda" else torch.device("cuda")


def _require_positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")


def _require_mean(L: Objective, criterion: Any) -> None:
    """Refuse a criterion whose value on a batch is not the mean of its values on the examples, of 64 from all the data."""
    count = min(L.size, 64)
    index = torch.arange(count) * (L.size - 1) // max(1, count - 1)
    with L.measuring(), torch.no_grad():
        params = L.leaves_at()
        for chunk in L.chunks(index, size=count):
            mean = L.losses(params, chunk).mean()
            found = criterion(L.outputs(params, chunk), chunk.batch[1])
            tolerance = math.sqrt(torch.finfo(L.dtype).eps) * (1 + abs(float(mean)))
            if not abs(float(found) - float(mean)) <= tolerance:
                raise ValueError(
                    f"criterion gives {float(found):.6g} for {chunk.size} examples, whose own values have the mean "
                    f"{float(mean):.6g}; expected that mean. Divide a sum by len(outputs), pass class weights by "
                    "torch.nn.CrossEntropyLoss(weight=...), and take out terms that couple examples"
                )
