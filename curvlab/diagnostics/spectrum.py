"""The top of the Hessian's spectrum, tracked from step to step, and the gradient's place in it."""

from __future__ import annotations

import numpy as np
import torch

from ..measurement import Measurement, missing
from ..operators import ggn
from ..snapshot import Snapshot
from .registry import diagnostic
from .sampled import population_eigenvalue
from .tracking import largest, remarked, subspace_error, top_eigenpairs, tracked_eigenpairs


@diagnostic(
    "‖H‖", formula="λ_max(H), algebraically largest", kind="bound", cost="14-23 products, 2-5 when tracked", divided=True
)
def sharpness(at: Snapshot, *, tol: float = 1e-2) -> Measurement:
    """The largest eigenvalue of the Hessian, λ_1 = ‖H‖ wherever |λ_min| is smaller; otherwise the note says so.

    Compare with 2/lr for full-batch gradient descent; `curvlab.optimizers.stability_threshold` has the threshold of
    other optimizers.

    Estimator: a Ritz value θ from block Lanczos with residual r at most `tol` times the largest |Ritz value|. During
    training the last eigenvectors start the next search, and a random vector and the gradient join them every 16th step
    and whenever the Hessian has changed much, so that an eigenvalue that rises unseen is found. Under a monitor's budget it
    is the Rayleigh quotient of the last eigenvector between two searches, for one product, and the note says so.

    Error: the residual r = ‖Hv - θv‖: θ ≤ λ_1, and *some* eigenvalue lies within r of θ. At a point, and wherever a random
    vector takes part, it has one more product with v; between, the products of the search. The value itself is usually
    better by orders of magnitude, because the distance to λ_1 is at most r²/gap. For a population the standard error of a
    bootstrap over examples.

    Fails: the Hessian is the one of autograd: it does not see kinks of relu networks, which `secant_sharpness` does. An
    eigenvalue that rises away from the last eigenvectors may be seen 16 measured steps late. After 320 products without
    convergence the note says so. Of a sample of the data it is too large: `population_size` gives the population's, for
    about 34 products more (`curvlab.diagnostics.sampled.population_eigenvalue`). Under batch statistics it is that of
    all data as one batch.

    Source: Cohen et al. 2021 (arXiv 2103.00065).
    """
    pairs = top_eigenpairs(at, 1, tol)
    return population_eigenvalue(at, pairs) if at.objective.population_size else largest(pairs)


@diagnostic(
    "λ_i",
    formula="k algebraically largest eigenvalues of H",
    kind="bound",
    cost="30-50 products for k=5, 7-16 when tracked",
    divided=True,
)
def hessian_eigenvalues(at: Snapshot, *, k: int = 5, tol: float = 1e-2) -> Measurement:
    """The k algebraically largest eigenvalues of the Hessian, descending, over an axis "index".

    The eigenvectors stay on the snapshot: ``curvlab.diagnostics.tracking.top_eigenpairs(at, k, tol).vectors``.

    Estimator: as `sharpness`, with k vectors; random start vectors, k of them, see eigenvalues of multiplicity up to k.

    Error: the residual of each, which bounds the distance to *some* eigenvalue.

    Fails: that none was passed over is likely, not proven. `tol` is relative to the largest: eigenvalues below it are
    resolved to their error only. Negative eigenvalues count as the smallest, whatever their size. Of the data as they
    are, also where they are a sample of a population.

    Raises:
        ValueError: k outside 1..P.

    Source: Lee 2022, sec. 2.
    """
    pairs = top_eigenpairs(at, k, tol)
    found = Measurement(
        pairs.values.cpu().numpy(),
        pairs.residuals.cpu().numpy(),
        "bound",
        floor=np.full(k, pairs.floor),
        axis=("index", tuple(range(1, k + 1))),
    )
    return remarked(found, pairs)


@diagnostic("|cos(q_1, ∇L)|", formula="|q_1ᵀ∇L| / ‖∇L‖", kind="bound", cost="products for 2 eigenpairs")
def gradient_alignment(at: Snapshot, *, tol: float = 1e-3) -> Measurement:
    """Cosine between the gradient and the top eigenvector, without sign, which an eigenvector does not have.

    Estimator: two tracked eigenpairs; a random direction has about 1/√P.

    Error: bounds what the error of the eigenvector does to it: √2 r/gap (Davis and Kahan), with the gap to the second
    Ritz value; where the two largest eigenvalues are too close to be told apart it reaches 1.

    Fails: with close eigenvalues q_1 itself is not defined, however small `tol`: `gradient_top_share` over both is. No
    value where the gradient is zero, or with a single parameter.

    Source: Lee 2022, Prop. 4.1 and observation (iii) of sec. 4.2.
    """
    if at.objective.num_params < 2:
        return missing("needs two parameters: with one the cosine is 1 by definition")
    g = at.gradient.double()
    length = float(g.norm())
    if length == 0.0:
        return missing("the gradient is zero, so it has no direction")
    pairs = top_eigenpairs(at, 2, tol)
    cosine = abs(float(pairs.vectors[:, 0].double() @ g)) / length
    error = min(1.0, 2**0.5 * subspace_error(pairs, 1))
    return Measurement(cosine, error, "bound", floor=16 * torch.finfo(at.objective.dtype).eps)


@diagnostic(
    "‖Q_kᵀ∇L‖²/‖∇L‖²",
    formula="share of the gradient in the span of the k top eigenvectors",
    kind="bound",
    cost="products for k+1 eigenpairs",
)
def gradient_top_share(at: Snapshot, *, k: int = 5, tol: float = 1e-3) -> Measurement:
    """Share of the squared gradient norm in the top-k eigenspace of the Hessian, 0 to 1.

    Estimator: k + 1 tracked eigenpairs; a random direction has k/P.

    Error: bounds what the error of the subspace does to it: ‖R‖/gap, with the gap between λ_k and λ_{k+1}.

    Fails: without a gap after λ_k the bound reaches 1, although the share may be right: choose k at a gap, such as the
    number of classes. A tight `tol` makes every step of a run as dear as a point. No value where the gradient is zero.

    Raises:
        ValueError: k + 1 above P.

    Source: Gur-Ari et al. 2018 (arXiv 1812.04754); Lee 2022, sec. 5.1.
    """
    g = at.gradient.double()
    length = float(g.square().sum())
    if length == 0.0:
        return missing("the gradient is zero, so it has no direction")
    pairs = top_eigenpairs(at, k + 1, tol)
    share = float((pairs.vectors[:, :k].double().T @ g).square().sum()) / length
    return Measurement(share, subspace_error(pairs, k), "bound", floor=16 * torch.finfo(at.objective.dtype).eps)


@diagnostic(
    "λ_i(NTK)", formula="k largest eigenvalues of (1/N) J Jᵀ, J the Jacobian of all outputs", kind="bound",
    cost="14-23 products with the GGN for k=1",
)  # fmt: skip
def ntk_eigenvalues(at: Snapshot, *, k: int = 5, tol: float = 1e-2) -> Measurement:
    """The k largest eigenvalues of the neural tangent kernel over N, over an axis "index".

    For squared error they are those of the GGN.

    Estimator: Lanczos on (1/N) Σ J_iᵀ J_i, which has the same non-zero eigenvalues, tracked from step to step.

    Error: the residual of each, which bounds the distance to *some* eigenvalue.

    Fails: no value where the outputs are no tensor, or a `batch_loss` calls the model itself. The labels do not enter.
    All outputs are summed over; the kernel of one output is another matrix. Its products are not counted in `matvecs`.

    Raises:
        ValueError: k outside 1..P.

    Source: Jacot et al. 2018 (arXiv 1806.07572).
    """
    try:
        A = at.shared("ntk", lambda: ggn(at.objective, at.w, output_hessian="identity"))
    except TypeError as error:
        return missing(str(error))
    pairs = tracked_eigenpairs(at, "ntk", A, k, tol)
    values, errors = pairs.values.cpu().numpy(), pairs.residuals.cpu().numpy()
    axis = ("index", tuple(range(1, k + 1)))
    return remarked(Measurement(values, errors, "bound", floor=np.full(k, pairs.floor), axis=axis), pairs)
