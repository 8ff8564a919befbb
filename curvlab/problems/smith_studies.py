"""Smith et al. 2021 at small scale: what governs test performance, on a diagonal linear net. Imports no torch.

Sparse regression with fewer examples than inputs has many solutions, and gradient noise leads to sparser ones: here a larger
learning rate surely generalizes better, so that it can be asked what explains that. The paper's: the settings that are
compared, their grids of factors of two, shuffled epochs, equal epochs (equal steps over λ), strengths of C_reg over batches
of the size of training. Ours: problem, sizes, and test loss for test accuracy. Grids and lengths were chosen on the problems
of seeds 100 to 111: from where the smallest rate has settled to where training turns unstable.
"""

from __future__ import annotations

from typing import Any

from .presets import Experiment
from .rows import Row, Study

_BASE = Experiment(
    data="sparse_regression",
    data_options=("d=200", "nonzeros=10"),
    n=80,
    label_noise=0.2,
    model="diagonal_linear",
    loss="squared_error",
    dtype="float64",
    lr=0.04,
    batch_size=(4,),
    epochs=True,
    num_epochs=125,
    every=101,
    diagnostics=("loss", "test_loss"),
)
_C_REG = "penalty.implicit_regularizer"


def _study(about: str, rows: dict[str, Row], panels: tuple[str, ...], **base: Any) -> Study:
    experiment = Experiment(**{**vars(_BASE), **base})
    return Study(f"{about}, on sparse regression", experiment, rows, metric="test_loss", panels=panels)


SMITH: dict[str, Study] = {
    "smith-rates": _study(
        "learning rates ε, and strengths λ of C_reg at a small ε (Smith et al. 2021, figs. 1, 2, 5, 6a)",
        {
            "rates": Row(
                grid={"lr": ("0.02", "0.04", "0.08", "0.16", "0.32")},
                about="SGD over its learning rate",
                paper="best at 2^-6 (CIFAR-10), 2^-5 (Fashion-MNIST)",
            ),
            "penalties": Row(
                {"penalty": ("implicit_regularizer=0.04",), "lr": 0.04},
                grid={_C_REG: ("0.04", "0.08", "0.16", "0.32", "0.64")},
                about="C + λ C_reg at a small learning rate",
                paper="best at 2^-6 (CIFAR-10), 2^-2 (Fashion-MNIST)",
            ),
        },
        ("learning rate ε (rates), or strength λ of C_reg at ε = 0.04 (penalties)",),
        diagnostics=("loss", "test_loss", "gradient_norm", "gradient_variance"),
    ),
    "smith-batch-rates": _study(
        "learning rates over batch sizes at equal epochs (Smith et al. 2021, figs. 3a, 6b)",
        {
            f"B={B}": Row(
                {"batch_size": (B,)}, grid={"lr": tuple(f"{x * B:g}" for x in (0.01, 0.02, 0.04, 0.08))}, per=B,
                about=f"batches of {B}",
            )
            for B in (1, 2, 4)
        },
        ("learning rate ε", "ε/B"),
    ),
    "smith-batch-penalties": _study(
        "strengths of C_reg over batch sizes at equal steps (Smith et al. 2021, figs. 3b, 6c)",
        {
            f"B={B}": Row(
                {"batch_size": (B,), "penalty": ("implicit_regularizer=0.16",)},
                grid={_C_REG: tuple(f"{x * B:g}" for x in (0.02, 0.04, 0.08))}, per=B, about=f"batches of {B}",
            )
            for B in (2, 4, 8)
        },
        ("strength λ of C_reg", "λ/B"),
        lr=0.02,
        steps=4000,
        num_epochs=0,
    ),
    "smith-n-step": _study(
        "several updates on each batch, at equal epochs (Smith et al. 2021, figs. 4, 7)",
        {
            f"n={n}": Row(
                {"method": "n_step_sgd", "method_options": (f"n={n}",)}, grid={"lr": ("0.02", "0.04", "0.08", "0.16")},
                per=1 / n, about=f"{n} updates on each batch" if n > 1 else "plain SGD",
            )
            for n in (1, 2, 4)
        },
        ("bare learning rate α", "effective rate ε = nα (by which the SDE analogy goes)"),
    ),
}  # fmt: skip
