"""Studies of Novack, Kaur, Marwah, Garg and Lipton 2022 (arXiv 2211.15853) at small scale. Imports no torch.

The paper's: the regimes, micro-batches as large as small batches, no momentum, and that learning rate and strength are tuned
for each regime. Ours, since the paper does not state them or has other data: model, data, sizes, steps, grids, and the
choice by examples that are set aside. The values of each row were chosen from its grid by `curvlab sweep NAME
--tuning-seeds 100-102` (novack-digits: 100,101; novack-vgg, of which SB and LB alone: 100), on seeds that no table has.

On the diagonal nets the sparse solution is one of many, and which is found depends surely on the batch size; on digits it
hardly does. Micro-batches of 2 of 20 examples stand for 128 of 5120.
"""

from __future__ import annotations

from typing import Any

from .presets import Experiment
from .rows import Row, Sentence, Study

Grid = tuple[str, ...]

_GAP = ("SB", "LB")
_RECOVERS = "{} recovers the accuracy of small batches"
_FAILS = "{} does not recover the accuracy of small batches"
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
_GN, _FT, _AJ, _UJ = "gradient_norm", "fisher_trace", "average_jacobian", "unit_jacobian"
_ON_CIFAR10 = {
    "SB": "92.33", "LB": "90.00", _GN: "91.98", _FT: "91.79", _AJ: "90.41", _UJ: "90.46",
    "iterative_grafting": "92.16", "external_grafting": "92.12", "normalized_gd": "92.10",
}  # fmt: skip


def _paper(name: str) -> str:
    return f"{_ON_CIFAR10[name]} (CIFAR-10)"


def _small(size: int, lr: float, rates: Grid, paper: str = _paper("SB")) -> Row:
    return Row({"batch_size": (size,), "lr": lr}, {"lr": rates}, about="small batches", paper=paper)


def _again(small: Row) -> Row:
    """Small batches from the same starts in another order: what gradient norms scatter by, where each seed is a problem."""
    return Row({**small.change, "data_seed": 1000}, about=f"{small.about} in another order")


def _large(lr: float, rates: Grid, paper: str = _paper("LB")) -> Row:
    return Row({"lr": lr}, {"lr": rates}, about="large batches", paper=paper)


def _penalty(
    name: str, lr: float, strength: str, rates: Grid, strengths: Grid, size: int, paper: str | None = None
) -> Row:
    return Row(
        {"penalty": (f"{name}={strength}",), "lr": lr, "micro_batch": size},
        {"lr": rates, f"penalty.{name}": strengths},
        about=f"large batches, {name} on micro-batches of {size}",
        paper=_paper(name) if paper is None else paper,
    )


def _method(name: str, lr: float, rates: Grid, **change: Any) -> Row:
    external = "SB" if name == "external_grafting" else ""
    change |= {"method": name, "lr": lr}
    return Row(change, {"lr": rates}, external, about=f"large batches, {name}", paper=_paper(name))


def _anti_pgd(lr: float, sigma: str, rates: Grid, sigmas: Grid, noise_steps: int) -> Row:
    return Row(
        {"method": "anti_pgd", "method_options": (f"noise_steps={noise_steps}", f"sigma={sigma}"), "lr": lr},
        {"lr": rates, "method.sigma": sigmas},
        about="large batches, anticorrelated noise for three quarters of the steps",
        paper="67.54 against SB 71.21 (CIFAR-100)",
    )


def _over_strengths(name: str, size: int, about: str) -> Row:
    strengths = ("0.1", "0.3", "0.5")
    change = {"penalty": (f"{name}={strengths[0]}",), "lr": 0.4, "micro_batch": size}
    return Row(change, grid={f"penalty.{name}": strengths}, about=f"large batches, {about}")


def _diagonal(data: str, validation: int, steps: int, *diagnostics: str) -> Experiment:
    norms = ("batch_gradient_norm", "microbatch_gradient_norm:micro_batch_size=2:every=3")
    return Experiment(
        data=data,
        n=20 + validation,
        validation=validation,
        model="diagonal_linear",
        loss="squared_error",
        dtype="float64",
        batch_size=(20,),
        steps=steps,
        diagnostics=(*norms, *(f"{name}:every=3" for name in diagnostics)),
    )


def _study(about: str, base: Experiment, rows: dict[str, Row], **options: Any) -> Study:
    """A study by test accuracy in percent, over five seeds."""
    options = {"margin": 0.005, "scale": 100.0, "baselines": _GAP[::-1], "seeds": (0, 1, 2, 3, 4), **options}
    return Study(f"{about} (Novack et al. 2022, {options.pop('where')})", base, rows, **options)


_CLASSES = _diagonal("sparse_classification", 500, 400, "test_accuracy")
_PLAIN = {"SB": _small(2, 0.6, ("0.2", "0.4", "0.6")), "LB": _large(0.4, ("0.2", "0.4", "0.8"))}
_SPARSE_SMALL = _small(2, 0.3, ("0.2", "0.3"))

NOVACK: dict[str, Study] = {
    "novack-regularizers": _study(
        "regularizers and methods against small batches, on a diagonal net",
        _CLASSES,
        _PLAIN
        | {
            "SB again": _again(_PLAIN["SB"]),
            "GN": _penalty(_GN, 0.4, "0.5", ("0.2", "0.4"), ("0.2", "0.3", "0.5"), 2),
            "FT": _penalty(_FT, 0.4, "0.01", ("0.4", "0.8"), ("0.01", "0.03"), 2),
            "AJ": _penalty(_AJ, 0.4, "0.1", ("0.4", "0.8"), ("0.1", "0.3"), 2),
            "UJ": _penalty(_UJ, 0.4, "0.03", ("0.4", "0.8"), ("0.03", "0.1"), 2),
            "IG": _method("iterative_grafting", 0.1, ("0.1", "0.3", "0.6"), micro_batch=2),
            "EG": _method("external_grafting", 0.6, ("0.1", "0.3", "0.6")),
            "NGD": _method("normalized_gd", 0.3, ("0.03", "0.1", "0.3")),
            "Anti-PGD": _anti_pgd(0.4, "0.2", ("0.4", "0.8"), ("0.1", "0.2"), 300),
        },
        sentences=_SENTENCES,
        where="tables 1, 4, 6, figs. 1, 4",
    ),
    "novack-sparse": _study(
        "regularizers and methods against small batches, a diagonal net by test loss; AJ stands for UJ, one output",
        _diagonal("sparse_regression", 100, 500, "loss", "test_loss"),
        {
            "SB": _SPARSE_SMALL,
            "LB": _large(0.4, ("0.2", "0.4", "0.6")),
            "SB again": _again(_SPARSE_SMALL),
            "GN": _penalty(_GN, 0.2, "0.1", ("0.2",), ("0.06", "0.1", "0.15"), 2),
            "FT": _penalty(_FT, 0.4, "0.01", ("0.4",), ("0.003", "0.01", "0.03"), 2),
            "AJ": _penalty(_AJ, 0.4, "0.01", ("0.4",), ("0.003", "0.01", "0.03"), 2),
            "IG": _method("iterative_grafting", 0.06, ("0.03", "0.06", "0.12"), micro_batch=2),
            "EG": _method("external_grafting", 0.06, ("0.03", "0.06", "0.12")),
            "NGD": _method("normalized_gd", 0.03, ("0.003", "0.01", "0.03")),
            "Anti-PGD": _anti_pgd(0.4, "0.2", ("0.2", "0.4"), ("0.1", "0.2"), 375),
        },
        metric="test_loss",
        margin=0.0,
        scale=1.0,
        select="validation_loss",
        where="tables 1, 4, 6",
    ),
    "novack-digits": _study(
        "regularizers and methods against small batches, digits with 20% wrong labels",
        Experiment(
            n=1024,
            validation=512,
            label_noise=0.2,
            activation="relu",
            loss="cross_entropy",
            batch_size=(256,),
            micro_batch=16,
            steps=400,
            diagnostics=("batch_gradient_norm", "microbatch_gradient_norm", "test_accuracy"),
        ),
        {
            "SB": _small(16, 0.3, ("0.03", "0.1", "0.3", "1")),
            "LB": _large(0.1, ("0.03", "0.1", "0.3", "1")),
            "GN": _penalty(_GN, 0.3, "0.3", ("0.1", "0.3", "1"), ("0.1", "0.3", "1"), 16),
            "FT": _penalty(_FT, 0.3, "0.3", ("0.1", "0.3", "1"), ("0.1", "0.3", "1"), 16),
            "AJ": _penalty(_AJ, 0.1, "0.3", ("0.1", "0.3", "1"), ("0.3", "1", "3"), 16),
            "UJ": _penalty(_UJ, 0.3, "0.03", ("0.1", "0.3", "1"), ("0.01", "0.03", "0.1"), 16),
            "IG": _method("iterative_grafting", 0.03, ("0.01", "0.03", "0.1", "0.3")),
            "EG": _method("external_grafting", 0.03, ("0.01", "0.03", "0.1", "0.3")),
            "NGD": _method("normalized_gd", 0.03, ("0.01", "0.03", "0.1")),
            "Anti-PGD": _anti_pgd(0.1, "0.01", ("0.1", "0.3", "1"), ("0.01", "0.03", "0.1"), 300),
        },
        sentences=_SENTENCES,
        where="tables 1, 4",
    ),
    "novack-micro-batch": _study(
        "penalties on larger micro-batches, on a diagonal net",
        _CLASSES,
        _PLAIN
        | {
            "SB again": _again(_PLAIN["SB"]),
            "GN-2": _penalty(_GN, 0.4, "0.5", ("0.2", "0.4"), ("0.2", "0.3", "0.5"), 2, "70.22 (|M| = 128, CIFAR-100)"),
            "GN-4": _penalty(_GN, 0.4, "1", ("0.2", "0.4"), ("0.5", "1"), 4, ""),
            "GN-10": _penalty(_GN, 0.4, "1", ("0.2", "0.4"), ("0.5", "1"), 10, "64.23 (|M| = 2560, CIFAR-100)"),
            "GN-20": _penalty(_GN, 0.4, "0.1", ("0.2", "0.4"), ("0.1", "0.3"), 20, ""),
            "FT-2": _penalty(_FT, 0.4, "0.01", ("0.4", "0.8"), ("0.01", "0.03"), 2, "71.19 (|M| = 128, CIFAR-100)"),
            "FT-4": _penalty(_FT, 0.4, "0.02", ("0.4", "0.8"), ("0.02", "0.06"), 4, ""),
            "FT-10": _penalty(_FT, 0.4, "0.05", ("0.4", "0.8"), ("0.05", "0.15"), 10, "65.44 (|M| = 2560, CIFAR-100)"),
            "FT-20": _penalty(_FT, 0.4, "0.1", ("0.4", "0.8"), ("0.1", "0.3"), 20, ""),
        },
        axis="micro_batch",
        beside="microbatch_gradient_norm",
        where="tables 2, 3, fig. 2",
    ),
    "novack-sampled": _study(
        "the gradient norm of one sampled micro-batch S, over |S| and strength, on a diagonal net",
        _CLASSES,
        _PLAIN
        | {
            "GN": _over_strengths(_GN, 2, "all micro-batches of 2 (fig. 5)"),
            **{f"S={m}": _over_strengths(f"sampled_{_GN}", m, f"one micro-batch of {m}") for m in (2, 4, 20)},
        },
        axis="strength",
        beside="microbatch_gradient_norm",
        where="figs. 3, 5, appendix B.2",
    ),
    "novack-vgg": _study(
        "penalties against small batches, small VGG11 without batch normalization on 128 digits",
        Experiment(
            n=128 + 256,
            center=True,
            validation=256,
            model="vgg11",
            model_size="small",
            loss="cross_entropy",
            batch_size=(128,),
            steps=600,
            diagnostics=(
                "batch_gradient_norm",
                "microbatch_gradient_norm:micro_batch_size=16:every=15",
                "test_accuracy:every=5",
            ),
        ),
        {
            "SB": _small(16, 0.05, ("0.05", "0.1"), "78.19 (CIFAR-10)"),
            "LB": _large(0.1, ("0.1", "0.2"), "73.90 (CIFAR-10)"),
            "GN": _penalty(_GN, 0.1, "0.1", ("0.1",), ("0.03", "0.1"), 16, "77.62 (CIFAR-10)"),
            "FT": _penalty(_FT, 0.1, "0.1", ("0.1",), ("0.03", "0.1"), 16, "79.10 (CIFAR-10)"),
            "AJ": _penalty(_AJ, 0.1, "0.1", ("0.1",), ("0.03", "0.1"), 16, "74.09 (CIFAR-10)"),
            "UJ": _penalty(_UJ, 0.1, "0.1", ("0.1",), ("0.03", "0.1"), 16, "N/A"),
        },
        sentences=_SENTENCES,
        seeds=(0, 1, 2),
        where="table 5",
    ),
}
