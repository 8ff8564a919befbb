"""The loss along lines and over planes through a point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .linalg import eigsh
from .objective import Objective
from .operators import hessian
from .sharded import require_gathered


@dataclass(frozen=True)
class Plane:
    """L(w + α u + β v) on a grid.

    Attributes:
        alphas, betas: (A,), (B,) coordinates, in the length of u and v.
        values: (A, B) losses; not finite where the loss is not.
        names: what u and v are.
        path: (T, 2) coordinates of points given to `plane`, projected onto it.
        distances: (T,) how far those points lie from the plane.
    """

    alphas: np.ndarray
    betas: np.ndarray
    values: np.ndarray
    names: tuple[str, str]
    path: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True)
class Lines:
    """L(w + α d) along several directions d of length 1.

    Attributes:
        alphas: (A,) distances, in the unit of the parameters.
        values: (D, A) losses; not finite where the loss is not.
        names: (D,) what the directions are.
    """

    alphas: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]


def line(L: Objective, w: Tensor, direction: Tensor, alphas: Sequence[float] | np.ndarray) -> np.ndarray:
    """L(w + α d) for each α, (A,) float64; exact, one forward pass each.

    Raises:
        ValueError: a direction of another length than w.
    """
    if direction.shape != w.shape:
        raise ValueError(f"direction has shape {tuple(direction.shape)}; expected that of w, {tuple(w.shape)}")
    return np.array([float(L.value(w + alpha * direction)) for alpha in alphas])


def plane(
    L: Objective,
    w: Tensor,
    u: Tensor,
    v: Tensor,
    alphas: Sequence[float] | np.ndarray,
    betas: Sequence[float] | np.ndarray,
    *,
    names: tuple[str, str] = ("u", "v"),
    path: Sequence[Tensor] = (),
) -> Plane:
    """The loss over the plane through w spanned by u and v; A·B forward passes.

    Args:
        u, v: (P,) directions, taken as they are.
        path: points, such as iterates of training, to be projected onto the plane (least squares).

    Raises:
        ValueError: a direction of another length than w.
    """
    require_gathered(L, "planes")
    if u.shape != w.shape:
        raise ValueError(f"u has shape {tuple(u.shape)}; expected that of w, {tuple(w.shape)}")
    values = np.stack([line(L, w + alpha * u, v, betas) for alpha in alphas])
    basis = torch.stack([u, v], 1).double()
    offsets = torch.stack([(p - w).double() for p in path], 1) if path else torch.zeros(len(w), 0, dtype=torch.float64)
    offsets = offsets.to(basis.device)
    coordinates = torch.linalg.lstsq(basis, offsets).solution
    distances = torch.linalg.vector_norm(offsets - basis @ coordinates, dim=0)
    return Plane(
        np.asarray(alphas, float), np.asarray(betas, float), values, names,
        coordinates.T.cpu().numpy(), distances.cpu().numpy(),
    )  # fmt: skip


def top_lines(
    L: Objective,
    w: Tensor | None = None,
    *,
    k: int = 2,
    step: Tensor | None = None,
    radius: float = 1.0,
    points: int = 41,
    generator: torch.Generator | None = None,
) -> Lines:
    """The loss along the k top Hessian eigenvectors and along a `step`, such as -∇L, through w.

    Args:
        w: (P,) the centre; default the model's current parameters.
        step: (P,) a further direction.
        radius: how far to each side, in the unit of the parameters.
        points: on each line.
    """
    w = L.params() if w is None else w
    directions = list(eigsh(hessian(L, w), k, generator=generator).vectors.T)
    names = [f"q_{i + 1}" for i in range(k)]
    if step is not None:
        directions, names = [*directions, step / step.norm()], [*names, "the step"]
    alphas = np.linspace(-radius, radius, points)
    return Lines(alphas, np.stack([line(L, w, d, alphas) for d in directions]), tuple(names))


def top_plane(
    L: Objective,
    w: Tensor | None = None,
    *,
    step: Tensor | None = None,
    radius: float = 1.0,
    points: int = 25,
    path: Sequence[Tensor] = (),
    generator: torch.Generator | None = None,
) -> Plane:
    """The plane of the two top Hessian eigenvectors, or of the top one and a `step`, around w.

    Args:
        w: (P,) the centre; default the model's current parameters.
        step: (P,) second direction; the part along q_1 is taken out and the rest has length 1.
        radius: half the side of the square, in the unit of the parameters.
        points: on each side.

    Raises:
        ValueError: a step along q_1, which spans no plane with it.
    """
    w = L.params() if w is None else w
    pairs = eigsh(hessian(L, w), 1 if step is not None else 2, generator=generator)
    u = pairs.vectors[:, 0]
    names = ("q_1", "q_2")
    if step is None:
        v = pairs.vectors[:, 1]
    else:
        rest = step - u * (u @ step)
        length = float(rest.norm())
        if length <= 1e-6 * float(step.norm()):
            raise ValueError("the step lies along q_1 and spans no plane with it; pass step=None for q_1 and q_2")
        v, names = rest / length, ("q_1", "step without q_1")
    grid = np.linspace(-radius, radius, points)
    return plane(L, w, u, v, grid, grid, names=names, path=path)
