"""Studies of Novack, Kaur, Marwah, Garg and Lipton 2022 (arXiv 2211.15853) at small scale. Imports no torch.

The paper's: the regimes, micro-batches as large as small batches, no momentum, and that learning rate and strength are tuned
for each regime. Ours, since the paper does not state them or has other data: model, data, sizes, steps, grids, and the
choice by examples that are set aside. The values of each row were chosen from its grid by `curvlab sweep NAME
--tuning-seeds 100-102`, on seeds that no table has.
"""

from __future__ import annotations

from typing import Any

from .presets import Experiment
from .studies import Row, Sentence, Study

_RATES = ("0.1", "0.3", "1")
_GAP = ("SB", "LB")
_RECOVERS = "{} recovers the accuracy of small batches"
_FAILS = "{} does not recover the accuracy of small batches"
_ANTI_PGD = "large batches, anticorrelated noise for three quarters of the steps"


def _penalty(
    name: str, lr: float, strength: str, tune: dict[str, tuple[str, ...]], paper: str = "", **change: Any
) -> Row:
    tune = {"lr": tune["lr"], f"penalty.{name}": tune["strength"]}
    change |= {"penalty": (f"{name}={strength}",), "lr": lr}
    return Row(change, tune, about=f"large batches, {name} on micro-batches", paper=paper)


def _method(name: str, lr: float, rates: tuple[str, ...], paper: str = "", external: str = "", **change: Any) -> Row:
    return Row(
        {"method": name, "lr": lr, **change}, {"lr": rates}, external, about=f"large batches, {name}", paper=paper
    )


def _digits() -> dict[str, Row]:
    def penalty(name: str, lr: float, strength: str, strengths: tuple[str, ...], paper: str) -> Row:
        return _penalty(name, lr, strength, {"lr": _RATES, "strength": strengths}, f"{paper} (CIFAR-10)")

    def method(name: str, rates: tuple[str, ...], paper: str, external: str = "") -> Row:
        return _method(name, 0.03, rates, f"{paper} (CIFAR-10)", external)

    return {
        "SB": Row(
            {"batch_size": (16,), "lr": 0.3}, {"lr": ("0.03", *_RATES)}, about="small batches", paper="92.33 (CIFAR-10)"
        ),
        "LB": Row({"lr": 0.1}, {"lr": ("0.03", *_RATES)}, about="large batches", paper="90.00 (CIFAR-10)"),
        "GN": penalty("gradient_norm", 0.3, "0.3", ("0.1", "0.3", "1"), "91.98"),
        "FT": penalty("fisher_trace", 0.3, "0.3", ("0.1", "0.3", "1"), "91.79"),
        "AJ": penalty("average_jacobian", 0.1, "0.3", ("0.3", "1", "3"), "90.41"),
        "UJ": penalty("unit_jacobian", 0.3, "0.03", ("0.01", "0.03", "0.1"), "90.46"),
        "IG": method("iterative_grafting", ("0.01", "0.03", "0.1", "0.3"), "92.16"),
        "EG": method("external_grafting", ("0.01", "0.03", "0.1", "0.3"), "92.12", external="SB"),
        "NGD": method("normalized_gd", ("0.01", "0.03", "0.1"), "92.10"),
        "Anti-PGD": Row(
            {"method": "anti_pgd", "method_options": ("noise_steps=300", "sigma=0.01"), "lr": 0.1},
            {"lr": _RATES, "method.sigma": ("0.01", "0.03", "0.1")},
            about=_ANTI_PGD,
            paper="67.54 against SB 71.21 (CIFAR-100)",
        ),
    }


def _diagonal(data: str, steps: int, every: int, validation: int, **change: Any) -> Experiment:
    """20 examples with fewer of them than inputs, which a diagonal net fits in many ways; more are for choosing settings."""
    return Experiment(
        data=data,
        n=20 + validation,
        validation=validation,
        model="diagonal_linear",
        loss="squared_error",
        dtype="float64",
        batch_size=(20,),
        steps=steps,
        every=every,
        **change,
    )


def _regimes(
    rates: dict[str, tuple[str, ...]], strengths: dict[str, tuple[str, ...]], best: dict[str, float], noise_steps: int
) -> dict[str, Row]:
    """The ten regimes on 20 examples with small batches of 2.

    Args:
        rates, strengths: grids by row.
        best: the learning rate, and under "NAME penalty" the strength, that were chosen for each row.
    """

    def penalty(row: str, name: str, paper: str) -> Row:
        tune = {"lr": rates[row], "strength": strengths[row]}
        return _penalty(name, best[row], f"{best[f'{row} penalty']:g}", tune, f"{paper} (CIFAR-10)", micro_batch=2)

    def method(row: str, name: str, paper: str, external: str = "", **change: Any) -> Row:
        return _method(name, best[row], rates[row], f"{paper} (CIFAR-10)", external, **change)

    sigma = f"sigma={best['Anti-PGD penalty']:g}"
    return {
        "SB": Row(
            {"batch_size": (2,), "lr": best["SB"], "every": 1}, {"lr": rates["SB"]}, about="small batches",
            paper="92.33 (CIFAR-10)",
        ),
        "LB": Row({"lr": best["LB"]}, {"lr": rates["LB"]}, about="large batches", paper="90.00 (CIFAR-10)"),
        "GN": penalty("GN", "gradient_norm", "91.98"),
        "FT": penalty("FT", "fisher_trace", "91.79"),
        "AJ": penalty("AJ", "average_jacobian", "90.41"),
        "UJ": penalty("UJ", "unit_jacobian", "90.46"),
        "IG": method("IG", "iterative_grafting", "92.16", micro_batch=2),
        "EG": method("EG", "external_grafting", "92.12", external="SB"),
        "NGD": method("NGD", "normalized_gd", "92.10"),
        "Anti-PGD": Row(
            {"method": "anti_pgd", "method_options": (f"noise_steps={noise_steps}", sigma), "lr": best["Anti-PGD"]},
            {"lr": rates["Anti-PGD"], "method.sigma": strengths["Anti-PGD"]},
            about=_ANTI_PGD,
            paper="67.54 against SB 71.21 (CIFAR-100)",
        ),
    }  # fmt: skip


_CLASSES = _diagonal("sparse_classification", 400, 3, 500, diagnostics=("batch_gradient_norm", "test_accuracy"))
_SPARSE = _diagonal("sparse_regression", 500, 5, 100, diagnostics=("loss", "test_loss", "batch_gradient_norm"))

_CLASSES_ROWS = _regimes(
    {"SB": ("0.2", "0.4", "0.6"), "LB": ("0.2", "0.4", "0.8"), "GN": ("0.2", "0.4"), "FT": ("0.4", "0.8"),
     "AJ": ("0.4", "0.8"), "UJ": ("0.4", "0.8"), "IG": ("0.1", "0.3", "0.6"), "EG": ("0.1", "0.3", "0.6"),
     "NGD": ("0.03", "0.1", "0.3"), "Anti-PGD": ("0.4", "0.8")},
    {"GN": ("0.2", "0.3", "0.5"), "FT": ("0.01", "0.03"), "AJ": ("0.1", "0.3"), "UJ": ("0.03", "0.1"),
     "Anti-PGD": ("0.1", "0.2")},
    {"SB": 0.6, "LB": 0.4, "GN": 0.4, "FT": 0.8, "AJ": 0.8, "UJ": 0.8, "IG": 0.3, "EG": 0.3, "NGD": 0.3, "Anti-PGD": 0.8,
     "GN penalty": 0.3, "FT penalty": 0.03, "AJ penalty": 0.3, "UJ penalty": 0.1, "Anti-PGD penalty": 0.2},
    noise_steps=300,
)  # fmt: skip
_SPARSE_ROWS = _regimes(
    {"SB": ("0.1", "0.2", "0.3"), "LB": ("0.1", "0.2", "0.4", "0.6"), "GN": ("0.12", "0.2"), "FT": ("0.2", "0.4"),
     "AJ": ("0.2", "0.4"), "UJ": ("0.2", "0.4"), "IG": ("0.03", "0.06", "0.12", "0.25"),
     "EG": ("0.03", "0.06", "0.12", "0.25"), "NGD": ("0.003", "0.01", "0.03", "0.1"), "Anti-PGD": ("0.2", "0.4")},
    {"GN": ("0.06", "0.1", "0.15"), "FT": ("0.003", "0.01", "0.03"), "AJ": ("0.003", "0.01", "0.03"),
     "UJ": ("0.003", "0.01", "0.03"), "Anti-PGD": ("0.1", "0.2")},
    {"SB": 0.3, "LB": 0.4, "GN": 0.2, "FT": 0.4, "AJ": 0.4, "UJ": 0.4, "IG": 0.06, "EG": 0.06, "NGD": 0.01, "Anti-PGD": 0.4,
     "GN penalty": 0.1, "FT penalty": 0.01, "AJ penalty": 0.01, "UJ penalty": 0.01, "Anti-PGD penalty": 0.1},
    noise_steps=375,
)  # fmt: skip
_SENTENCES = (
    Sentence("small batches generalize better than large ones", "above", _GAP),
    *(Sentence(_RECOVERS.format(x), "reaches", (x, "SB"), _GAP) for x in ("GN", "FT")),
    *(Sentence(_FAILS.format(x), "misses", (x, "SB"), _GAP) for x in ("AJ", "UJ")),
    *(Sentence(_RECOVERS.format(x) + " (on CIFAR-10)", "reaches", (x, "SB"), _GAP) for x in ("IG", "EG", "NGD")),
    Sentence(_FAILS.format("Anti-PGD"), "misses", ("Anti-PGD", "SB"), _GAP),
    *(
        Sentence(f"{x} generalizes better than plain large batches", "above", (x, "LB"))
        for x in ("GN", "FT", "AJ", "UJ", "IG", "EG", "NGD", "Anti-PGD")
    ),
    *(Sentence(f"{x} generalizes better than {y}", "above", (x, y)) for x in ("GN", "FT") for y in ("AJ", "UJ")),
)

NOVACK: dict[str, Study] = {
    "novack-regularizers": Study(
        "regularizers and methods against small batches (Novack et al. 2022, tables 1, 4, 6, figs. 1, 4), on a diagonal net",
        _CLASSES,
        _CLASSES_ROWS,
        baselines=_GAP[::-1],
        sentences=_SENTENCES,
        margin=0.005,
        scale=100.0,
    ),
    "novack-sparse": Study(
        "the same on sparse regression, by test loss",
        _SPARSE,
        _SPARSE_ROWS,
        metric="test_loss",
        select="validation_loss",
        baselines=_GAP[::-1],
    ),
    "novack-digits": Study(
        "regularizers and methods against small batches, digits with 20% wrong labels (Novack et al. 2022, tables 1, 4)",
        Experiment(
            n=1024,
            validation=512,
            label_noise=0.2,
            activation="relu",
            loss="cross_entropy",
            batch_size=(256,),
            micro_batch=26,
            steps=400,
            diagnostics=("batch_gradient_norm", "microbatch_gradient_norm", "test_accuracy"),
        ),
        _digits(),
        baselines=_GAP[::-1],
        sentences=_SENTENCES,
        margin=0.005,
        scale=100.0,
    ),
}  # fmt: skip
