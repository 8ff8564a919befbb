"""Moments of the batch gradient that no closed form gives: of a loss that couples its batch, of data that are a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import COUPLING, live_module
from ..linalg import Eigenpairs, LinearOperator, orthonormalize
from ..linalg.probes import rademacher
from ..measurement import Measurement, missing
from ..operators import hessian, noise_share
from ..snapshot import Snapshot

S_N, S_B, HS_B = 0, 1, 2  # the entries of `Moments`
GROUPS, GROUPS_IN_A_RUN = 16, 8
BATCHES, BATCHES_IN_A_RUN = 64, 16


@dataclass(frozen=True)
class Moments:
    """tr(S_n), tr(S_b) and tr(H S_b), estimated jointly, with the jackknife that gives the error of any function of them.

    Attributes:
        whole: (3,) from everything.
        without: (G, 3) from everything but one batch, or one group of examples.
        share: of the jackknife's variance that counts, 1 - m/N for m of N examples.
        how: what was sampled.
    """

    whole: np.ndarray
    without: np.ndarray
    share: float
    how: str

    def entry(self, i: int) -> Measurement:
        """One of the three moments."""
        return self.of(lambda x: x[..., i])

    def ratio(self, above: int, below: int) -> Measurement:
        """A ratio of two of them, with the errors of both and their correlation."""
        return self.of(lambda x: x[..., above] / x[..., below], below=below)

    def of(self, function: Callable[[np.ndarray], np.ndarray], *, below: int | None = None) -> Measurement:
        """A function of the moments, less its bias of order 1/G, with the standard error of the jackknife.

        No value if the 95% interval of the moment `below` the fraction bar reaches zero.
        """
        if below is not None:
            bottom = self.of(lambda x: x[..., below])
            if bottom.interval()[0] <= 0:
                return missing(
                    f"the denominator, {bottom}, is not resolved from zero ({self.how}); measure more of them"
                )
        value, error, df = self._jackknife(function)
        return Measurement(value, error, "sem", df=df, note=self.how)

    def _jackknife(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float, float]:
        parts, G = function(self.without), len(self.without)
        error = np.sqrt(self.share * (G - 1) / G * np.square(parts - parts.mean()).sum())
        bias = (G - 1) * (parts.mean() - function(self.whole)) * self.share
        return float(function(self.whole) - bias), float(error), G - 1.0


def sampled_moments(at: Snapshot, b: int, samples: int | None, *, curvature: bool) -> Moments | None:
    """The moments of batches of b where they must be sampled, or None where the closed forms hold (Lee eq. 1).

    **A loss that couples its batch** (batch normalization with the statistics of the batch, a trained objective with
    penalties): S_b is the second moment of
    the gradients of `samples` (64, in a run 16) independent mini-batches, each with its own statistics; H and S_n are
    those of all the measured data as one batch. E[g_b] is then not ∇L, and S_b no mixture of S_1 and S_n.

    **Data that are m of N examples** (``Objective(..., population_size=N)``): what holds for all N is estimated. The
    plug-in ‖∇L_m‖² is too large by (1 - m/N) Γ/m on average, and gᵀHg and tr(H S_1) are too large as well, because the
    examples that give the gradient also give the Hessian. The examples are dealt at random into `samples` (16, in a run 8)
    groups; with the sums g^i of gradients and H^j of Hessians over groups,

        U = mean over different i, j, k of g^iᵀ H^j g^k   and   V = gᵀHg over all examples

    have the means of N = ∞ and N = m; in between U + (m/N)(V - U), and likewise for the other moments. The error is
    that of a jackknife over groups, times √(1 - m/N).

    Raises:
        ValueError: batches of one example under batch normalization, or fewer than 3 groups or batches.
    """
    L = at.objective
    coupled = L.coupled
    if coupled is None and L.population_size is None:
        return None
    share = noise_share(L.population_size or L.size, b, at.replacement)
    single, step = (GROUPS, GROUPS_IN_A_RUN) if coupled is None else (BATCHES, BATCHES_IN_A_RUN)
    count = samples if samples is not None else (single if at.carry is None else step)
    if coupled is None:
        count = min(count, L.size)
    if count < 3 or (b == 1 and live_module(L, COUPLING)):
        raise ValueError(
            f"got batch_size={b} and {count} samples; expected batches of at least 2 examples, whose statistics {coupled} "
            "can use, and at least 3 of them"
            if coupled
            else f"a population's error needs at least 3 groups of examples, got {count}; measure more examples"
        )
    if coupled:
        return None if share == 0.0 else _of_batches(at, b, count, curvature)
    a, s, h, t = _of_population(at, count, curvature).T
    found = np.stack([a, share * s + (1 - share) * a, share * t + (1 - share) * h], 1)
    N = L.population_size
    how = f"estimated for a population of {N} from {L.size} examples"
    return Moments(found[-1], found[:-1], 1 - L.size / N, how)  # type: ignore[operator]


def _of_batches(at: Snapshot, b: int, count: int, curvature: bool) -> Moments:
    """From mini-batches with statistics of their own."""
    L, g = at.objective, at.gradient.double()

    def gradients() -> Tensor:
        generator = at.generator(f"coupled batches {b}")
        draws = [
            torch.randint(L.size, (b,), generator=generator)
            if at.replacement
            else torch.randperm(L.size, generator=generator)[:b]
            for _ in range(count)
        ]
        return torch.stack([L.gradient(at.w, batch=index) for index in draws], 1)

    G = at.shared(("coupled batches", b, count), gradients)
    norms = G.double().square().sum(0).cpu().numpy()
    forms = np.full(count, np.nan)
    if curvature:
        HG = at.shared(("coupled products", b, count), lambda: at.hessian @ G)
        forms = (G.double() * HG.double()).sum(0).cpu().numpy()
    rows = np.stack([np.full(count, float(g.square().sum())), norms, forms], 1)
    without = (rows.sum(0) - rows) / (count - 1)
    how, largest = f"Monte Carlo over {count} mini-batches, each with its own statistics", norms.max() / norms.sum()
    if largest > 0.2 and largest > 4 / count:
        how += f"; heavy tails: one of them carries {largest:.0%} of tr(S_b), ask for more samples"
    return Moments(rows.mean(0), without, 1.0, how)


def _of_population(at: Snapshot, groups: int, curvature: bool) -> np.ndarray:
    """‖g‖², tr(S_1), gᵀHg and tr(H S_1) of the population: (G + 1, 4), without each group and, last, from all of them."""
    key = ("population", groups, curvature)
    return at.shared(key, lambda: _estimate_population(at, groups, curvature))


def _estimate_population(at: Snapshot, groups: int, curvature: bool) -> np.ndarray:
    L, N = at.objective, float(at.objective.population_size)  # type: ignore[arg-type]
    member = _groups(at, groups)
    n = member.sum(0)
    sums = at.examples.combine(member.to(L.device, L.dtype))
    K = (sums.double().T @ sums.double()).cpu()
    norms = member.T @ at.examples.squared_norms().cpu()
    forms = _group_forms(at, member, sums) if curvature else None
    rows = []
    for left in [*range(groups), None]:
        keep = torch.ones(groups, dtype=torch.float64)
        if left is not None:
            keep[left] = 0.0
        m, second = float(n @ keep), float(norms @ keep)
        a, s = float(keep @ K @ keep) / m**2, second / m
        a -= (1 - m / N) * (s - a) / (m - 1)
        rows.append([a, s, *(_curvatures(*forms, n, keep, N) if forms else (np.nan, np.nan))])
    return np.array(rows)


def _groups(at: Snapshot, groups: int) -> Tensor:
    """(m, G) membership of the examples in random groups of nearly equal size."""
    m = at.objective.size
    order = torch.randperm(m, generator=at.generator("groups of examples"))
    member = torch.zeros(m, groups, dtype=torch.float64)
    member[order, torch.arange(m) % groups] = 1.0
    return member


def _group_forms(at: Snapshot, member: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """T_ijk = g^iᵀ H^j g^k (G, G, G) and A_ij ≈ Σ_{l in i} g_lᵀ H^j g_l (G, G), with sums of gradients and Hessians.

    The second from v^i = Σ ±g_l, two sets of signs, less the part along the top Ritz vectors, which is known exactly.
    """
    L, G = at.objective, member.shape[1]
    generator = at.generator("population")
    signs = [rademacher((L.size, 1), at.gradient, generator=generator) for _ in range(2)]
    V = torch.cat([at.examples.combine(member.to(L.device, L.dtype) * sign) for sign in signs], 1)
    Q, values = _top(at, sums)
    along = at.examples.dot(Q).double()
    excess = (Q.double().T @ V.double()).square()
    known = member.to(L.device).T @ along.square() @ values
    excess = excess.view(Q.shape[1], 2, G).mean(1).T @ values - known
    n = member.sum(0).to(L.device)
    T, A = [], []
    for j in range(G):
        H = _group_hessian(at, torch.nonzero(member[:, j])[:, 0])
        if j == 0:  # one product with each group is one with all data
            H = at.counted(H)
        HX = (H @ torch.cat([sums, V], 1)).double() * float(n[j])
        T.append(sums.double().T @ HX[:, :G])
        A.append((V.double() * HX[:, G:]).sum(0).view(2, G).mean(0) - float(n[j]) * excess)
    return torch.stack(T, 1).cpu(), torch.stack(A, 1).cpu()


def _top(at: Snapshot, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz pairs of H on the span of the groups' gradients, for a control variate: any pairs leave it unbiased."""
    Q = orthonormalize(sums)
    theta, Y = torch.linalg.eigh((Q.T @ (at.hessian @ Q)).double())
    return Q @ Y.to(Q.dtype), theta


def _curvatures(T: Tensor, A: Tensor, n: Tensor, keep: Tensor, N: float) -> tuple[float, float]:
    """gᵀHg and tr(H S_1) of a population of N from the groups that are kept."""
    m = float(n @ keep)
    c = keep * n
    T = T * keep[:, None, None] * keep[None, :, None] * keep[None, None, :]
    A = A * keep[:, None] * keep[None, :]
    every = float(T.sum())
    same = float(torch.einsum("iij->", T)), float(torch.einsum("ijj->", T)), float(torch.einsum("iji->", T))
    all_same = float(torch.einsum("iii->", T))
    different = every - sum(same) + 2 * all_same
    count = m**3 - 3 * m * float(c.square().sum()) + 2 * float((c**3).sum())
    U, V = different / count, every / m**3
    apart = float(A.sum() - A.diagonal().sum()) / (m**2 - float(c.square().sum()))
    return U + m / N * (V - U), apart + m / N * (float(A.sum()) / m**2 - apart)


def population_eigenvalue(at: Snapshot, pairs: Eigenpairs, *, groups: int = 32, replicates: int = 400) -> Measurement:
    """The largest eigenvalue of the population's Hessian, from the top eigenpairs of that of a sample, by the bootstrap.

    The largest eigenvalue of a sample's Hessian is too large on average: its eigenvector fits the sample. With H^j the
    Hessians of random groups of examples, Σ c_j H^j for multinomial c stands to H as H to the population's, in bias and in
    scatter. All replicates are taken on one subspace, the given eigenvectors and H^j q_1 for every j, which holds their top
    eigenvector to first order; it costs about `groups` products.

    Source: Efron 1979 (doi 10.1214/aos/1176344552).
    """
    L = at.objective
    groups = min(groups, L.size)
    member = _groups(at, groups)
    n = member.sum(0)
    H = [_group_hessian(at, torch.nonzero(column)[:, 0]) for column in member.T]
    H[0] = at.counted(H[0])  # one product with each group is one with all data
    q = pairs.vectors[:, :1]
    B = orthonormalize(torch.cat([pairs.vectors, *(A @ q for A in H)], 1))
    projected = torch.stack([(B.T @ (A @ B)).double().cpu() * k for A, k in zip(H, n, strict=True)])
    draws = torch.multinomial(
        torch.ones(groups) / groups, groups * replicates, True, generator=at.generator("bootstrap")
    )
    counts = torch.nn.functional.one_hot(draws.view(replicates, groups), groups).sum(1).double()
    mixed = torch.einsum("rj,jkl->rkl", counts / (counts @ n)[:, None], projected)
    tops = torch.linalg.eigvalsh((mixed + mixed.mT) / 2)[:, -1]
    share = 1 - L.size / float(L.population_size)  # type: ignore[arg-type]
    found = float(pairs.values[0])
    value = found - share * (float(tops.mean()) - found)
    error = float(tops.std()) * (share * groups / (groups - 1)) ** 0.5 + float(pairs.residuals[0])
    how = f"estimated for a population of {L.population_size}; of these {L.size} examples it is {found:.4g}"
    return Measurement(value, error, "sem", df=groups - 1.0, floor=pairs.floor, note=how)


def _group_hessian(at: Snapshot, index: Tensor) -> LinearOperator:
    return hessian(at.objective, products=at.products(batch=index))
