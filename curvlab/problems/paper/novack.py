"""Novack et al. 2022 at the paper's scale: ResNet-18 and VGG11 with large batches, penalties on micro-batches, grafting.

The paper tunes the learning rate and the strength of each regime and states neither, nor the lengths of training: the
values of the rows are starting points of ours, to be chosen anew by `--tuning-seeds 100`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..rows import Row, Study
from .marks import Mark, Marked, ours, row, stated, study

_TUNED = "tuned for each regime, sec. 3.1; values are not in the text"
_STEPS = "lengths are not in the text; equal updates in all regimes"
_BASE: Marked = {
    "data": stated("cifar10", "sec. 3.1; also CIFAR-100, Tiny-ImageNet, SVHN"),
    "data_options": ours(("standardize=channel",)),
    "n": ours(0, "all training examples"),
    "validation": ours(5000, "what settings are tuned on is not stated"),
    "augment": ours("crop_flip", "not stated; the accuracies suggest it"),
    "model": stated("resnet18", "sec. 3.1, with BatchNorm; the stem for small images is ours"),
    "loss": stated("cross_entropy", "appendix A"),
    "batch_size": stated((5120,), "sec. 3.1"),
    "micro_batch": stated(128, "sec. 3.1; appendix A.1: large batches are accumulated from small ones"),
    "epochs": ours(True, "usual"),
    "lr": ours(0.5, _TUNED),
    "schedule": ours("constant"),
    "method": stated("sgd", "sec. 3.1"),
    "momentum": stated(0.0, "appendix D.2: without momentum, of Anti-PGD; sec. 3.1 says SGD"),
    "weight_decay": ours(0.0),
    "steps": ours(20_000, _STEPS),
    "diagnostics": ours(
        ("batch_gradient_norm", "microbatch_gradient_norm:micro_batch_size=128:every=11", "test_accuracy:every=101"),
        "fig. 1: |M| = 128 in all regimes; external grafting reads the first at every step",
    ),
    "device": ours("cuda"),
    "seeds": stated((0, 1, 2), "table 1: two to three initializations"),
    "statistic": ours("final", "table 1: test performance"),
}
_SMALL_RATES, _RATES, _STRENGTHS = ("0.01", "0.03", "0.1", "0.3"), ("0.1", "0.3", "0.5", "1"), ("0.001", "0.01", "0.1")


def _plain(size: Mark, lr: float, rates: Sequence[str], about: str, paper: str) -> Row:
    return row(
        {"batch_size": size, "lr": ours(lr, _TUNED)}, tune={"lr": ours(tuple(rates), _TUNED)}, about=about, paper=paper
    )


def _penalty(name: str, strength: str, paper: str, micro_batch: Mark | None = None) -> Row:
    settings = {"penalty": ours((f"{name}={strength}",), _TUNED)}
    if micro_batch is not None:
        settings["micro_batch"] = micro_batch
    tune = {"lr": ours(_RATES, _TUNED), f"penalty.{name}": ours(_STRENGTHS, _TUNED)}
    size = "" if micro_batch is None else f", |M| = {micro_batch.value}"
    return row(settings, tune=tune, about=f"large batches, {name}{size}", paper=paper)


def _method(name: str, lr: str, paper: str, external: str = "") -> Row:
    settings = {"method": stated(name, "appendix C.1"), "lr": ours(float(lr), _TUNED)}
    return row(
        settings,
        tune={"lr": ours(_SMALL_RATES, _TUNED)},
        external=external,
        about=f"large batches, {name}",
        paper=paper,
    )


_SB = _plain(stated((128,), "sec. 3.1"), 0.1, _SMALL_RATES, "small batches", "92.33, 71.01, 39.64, 93.69")
_LB = _plain(stated((5120,), "sec. 3.1"), 0.5, _RATES, "large batches", "90.00, 66.45, 27.71, 90.37")
_ANTI_PGD = row(
    {
        "method": stated("anti_pgd", "appendix D.2"),
        "method_options": ours(("noise_steps=15000", "sigma=0.1"), "σ² = 0.01: table 6; the end of the noise is not stated"),
        "lr": stated(0.5, "table 6: the best"),
    },
    tune={
        "lr": stated(("0.5", "0.1", "0.05"), "table 6"),
        "method.sigma": stated(("0.1", "0.0316227766"), "table 6: σ² of 0.01 and 0.001"),
    },
    about="large batches, anticorrelated noise", paper="CIFAR-100: 67.54 against SB 71.21",
)  # fmt: skip
_VGG: Marked = _BASE | {
    "data": stated("cifar10", "appendix B.1, D"),
    "model": stated("vgg11", "appendix B.1, D: without batch normalization; one linear head is ours"),
    "augment": ours("none", "not stated; the accuracies suggest it"),
    "batch_size": ours((5000,), "|M| = 100, 1000, 2500 divide it, and not 5120"),
    "micro_batch": ours(100, "table 3 has |M| = 100; table 5 does not say"),
    "lr": ours(0.1, _TUNED),
    "diagnostics": ours(
        ("batch_gradient_norm", "microbatch_gradient_norm:micro_batch_size=100:every=11", "test_accuracy:every=101"),
        "fig. 2, |M| as in table 3",
    ),
}
_GN, _FT = "gradient_norm", "fisher_trace"

NOVACK: dict[str, Study] = {
    "novack-regularizers": study(
        "penalties, grafting, NGD and Anti-PGD against small batches, ResNet-18 (Novack et al. 2022, tables 1, 4, 6)",
        _BASE,
        {
            "SB": _SB,
            "LB": _LB,
            "GN": _penalty(_GN, "0.01", "91.98, 70.22, 37.78, 92.77"),
            "FT": _penalty(_FT, "0.01", "91.79, 71.19, 40.25, 93.72"),
            "AJ": _penalty("average_jacobian", "0.01", "90.41, 65.95, 22.86, 91.76"),
            "UJ": _penalty("unit_jacobian", "0.01", "90.46, 66.41, 26.07, 92.08"),
            "IG": _method("iterative_grafting", "0.1", "92.16; CIFAR-100: 68.4"),
            "EG": _method("external_grafting", "0.1", "92.12; CIFAR-100: 68.3", external="SB"),
            "NGD": _method("normalized_gd", "0.1", "92.10; CIFAR-100: 66.83"),
            "Anti-PGD": _ANTI_PGD,
        },
        baselines=("LB", "SB"),
        scale=100.0,
    ),
    "novack-micro-batch": study(
        "penalties on larger micro-batches, ResNet-18 on CIFAR-100 (Novack et al. 2022, table 2, fig. 2)",
        _BASE | {"data": stated("cifar100", "table 2; also Tiny-ImageNet")},
        {
            "SB": _plain(stated((128,), "sec. 3.1"), 0.1, _SMALL_RATES, "small batches", "71.01, 39.64"),
            "LB": _plain(stated((5120,), "sec. 3.1"), 0.5, _RATES, "large batches", "66.45, 27.71"),
            **{
                f"{label}-{m}": _penalty(name, "0.01", paper, stated(m, "table 2"))
                for label, name, m, paper in (
                    ("GN", _GN, 128, "70.22, 37.78"), ("FT", _FT, 128, "71.19, 40.25"),
                    ("GN", _GN, 2560, "64.23, 31.96"), ("FT", _FT, 2560, "65.44, 37.71"),
                )
            },
        },
        baselines=("LB", "SB"),
        scale=100.0,
    ),
    "novack-sampled": study(
        "the gradient norm of one sampled micro-batch S, over |S| and λ, ResNet-18 (Novack et al. 2022, figs. 3, 5)",
        _BASE | {"data": ours("cifar100", "appendix D.1 names it; the panels of fig. 3 are not in our text")},
        {
            "SB": row({"batch_size": stated((128,), "sec. 3.1"), "lr": ours(0.1, _TUNED)}, about="small batches"),
            **{
                f"S={m}": row(
                    {"micro_batch": ours(m, "the sizes are not in our text, but for small, large and the whole batch")},
                    {"penalty.sampled_gradient_norm": ours(_STRENGTHS, "the axis of fig. 3 is not in our text")},
                    about=f"large batches, one micro-batch of {m}",
                )
                for m in (128, 512, 2560, 5120)
            },
            "GN": row(
                {}, {"penalty.gradient_norm": ours(_STRENGTHS, "as the sampled ones")},
                about="all micro-batches of 128 (fig. 5)",
            ),
        },
        baselines=("SB",),
        scale=100.0,
    ),
    "novack-vgg": study(
        "penalties against small batches, and larger micro-batches, VGG11 (Novack et al. 2022, tables 3, 5)",
        _VGG,
        {
            "SB": _plain(ours((100,), "the smallest |M| of table 3"), 0.03, _SMALL_RATES, "small batches", "78.19"),
            "LB": _plain(ours((5000,), "as the base"), 0.1, _SMALL_RATES, "large batches", "73.90"),
            "GN": _penalty(_GN, "0.01", "77.62 (table 5), 76.89 (table 3)", stated(100, "table 3")),
            "GN-1000": _penalty(_GN, "0.01", "75.19", stated(1000, "table 3")),
            "GN-2500": _penalty(_GN, "0.01", "75.11", stated(2500, "table 3")),
            "FT": _penalty(_FT, "0.01", "79.10"),
            "AJ": _penalty("average_jacobian", "0.01", "74.09"),
            "UJ": _penalty("unit_jacobian", "0.01", "N/A"),
        },
        baselines=("LB", "SB"),
        scale=100.0,
    ),
}  # fmt: skip
