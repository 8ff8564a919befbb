"""Any set of diagnostics at one point, sharing every intermediate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .diagnostics import evaluate, parse, require
from .diagnostics.registry import Request, batch_sizes
from .hvp import Engine
from .measurement import Measurement
from .objective import Objective
from .snapshot import Snapshot


def measure(
    L: Objective,
    diagnostics: Iterable[Request],
    *,
    w: Tensor | None = None,
    batch_size: int | Sequence[int] | None = None,
    replacement: bool = False,
    lr: float | None = None,
    test: Objective | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
    engine: Engine = "auto",
) -> dict[str, Measurement]:
    """Measure diagnostics of an objective at one point; nothing about the model or the random states changes.

    Args:
        diagnostics: names, or pairs (name, options) such as ``("hessian_eigenvalues", {"k": 5})``.
        w: (P,) where; default the model's current parameters.
        batch_size: b of S_b; a sequence gives whole curves for the price of a point.
        replacement: whether batches are drawn with replacement.
        lr: learning rate, for what depends on a step.
        test: held-out data, for `test_loss` and `test_accuracy`.
        seed: of the probes; the same seed gives the same numbers, whichever diagnostics are asked for.
        generator: draws the seed instead, if given.
        engine: of Hessian-vector products.

    Returns:
        Measurements by name, in the order asked for.

    Raises:
        ValueError: an unknown diagnostic or option, or one that needs what is not given; before anything is computed.

    Example:
        >>> import torch
        >>> from curvlab import Objective
        >>> data = torch.eye(2).double(), torch.zeros(2, 1).double()
        >>> L = Objective(torch.nn.Linear(2, 1).double(), "squared_error", data)
        >>> m = measure(L, ["sharpness", "interaction_sharpness"], batch_size=1)
        >>> float(m["interaction_sharpness"].value) <= float(m["sharpness"].value) * (1 + 1e-9)
        True
    """
    if generator is not None:
        seed = int(torch.randint(2**31, (), generator=generator))
    plan = parse(diagnostics)
    sizes = batch_sizes(batch_size)
    require(L, plan, {"batch_size": sizes, "lr": lr, "test": test})
    at = Snapshot(L, L.point(w), seed=seed, batch_size=sizes, replacement=replacement, lr=lr, test=test, engine=engine)
    return evaluate(at, plan)
