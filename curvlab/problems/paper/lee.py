"""Lee 2022 at the paper's scale: 6CNN on CIFAR-10-8k at the edge of stability."""

from __future__ import annotations

from ..presets import EDGE, PRESETS
from ..rows import Row, Study
from .marks import Marked, ours, stated, study

_REMARK = "sec. 4, remark"
_BASE: Marked = {
    "data": stated("cifar10-8k", f"{_REMARK}; k is 1024"),
    "data_options": ours(("standardize=channel",), "preprocessing is not stated; nor which 8192 images"),
    "n": ours(0, "the number is in the name of the data"),
    "model": stated("cnn6", f"{_REMARK}: 6CNN with 0.51M parameters; layout and initialization are ours"),
    "augment": stated("none", _REMARK),
    "schedule": stated("constant", _REMARK),
    "method": stated("sgd", f"{_REMARK}: vanilla SGD/GD"),
    "momentum": stated(0.0, _REMARK),
    "weight_decay": stated(0.0, _REMARK),
    "epochs": ours(False, "batches drawn independently, as eq. 1 assumes; the paper gives both kinds of sampling"),
    "steps": ours(1000, "the axes of the figures are not in our text"),
    "micro_batch": ours(1024, "bounds memory; without batch normalization the step is the same"),
    "device": ours("cuda"),
}
_GD: Marked = {"batch_size": stated((0,), "fig. 4a-c: full batch"), "every": stated(1, "fig. 4: every step")}
_CROSS_ENTROPY = ours("cross_entropy", "the figure does not name the loss; sec. 4 has both")

LEE: dict[str, Study] = {
    "edge-of-stability": study(
        "full-batch descent of 6CNN on CIFAR-10-8k (Lee 2022, fig. 4a-c; also figs. 1, 2, GD)",
        _BASE | _GD | {
            "loss": stated("cross_entropy", "fig. 4a, 4b; squared error in 4c"),
            "lr": stated(0.02, "fig. 4b, 4c; 0.01 in 4a"),
            "diagnostics": ours(EDGE, "‖H‖ and ‖H‖_{S_n} of fig. 4, and what the claims read"),
        },
    ),
    "loss-differences": study(
        "loss difference against tr(HS_b)/tr(S_n), for SGD and GD (Lee 2022, figs. 1, 2)",
        _BASE | {
            "loss": stated("cross_entropy", "fig. 1: one of two; the other is squared error"),
            "lr": stated(0.02, "fig. 1"),
            "batch_size": ours((128, 0), "0, full batch, is the bottom of figs. 1, 2; b of the top is not stated"),
            "every": ours(1, "as fig. 4"),
            "diagnostics": ours(PRESETS["loss-differences"].diagnostics, "what the figures show"),
        },
    ),
    "valleys": study(
        "curvature and loss along the step in the stable and the unstable regime (Lee 2022, fig. 3)",
        _BASE | {
            "loss": _CROSS_ENTROPY,
            "lr": stated(0.04, "fig. 3"),
            "batch_size": stated((0,), "fig. 3: GD"),
            "every": stated(1, "fig. 3: each t"),
            "diagnostics": ours(PRESETS["valleys"].diagnostics, "fig. 3 left and right, α of sec. 4.2"),
        },
    ),
    "events": study(
        "the order of events (i)-(v) on the way to the edge, alignment, cosines (Lee 2022, sec. 4.2)",
        _BASE | _GD | {
            "loss": _CROSS_ENTROPY,
            "lr": stated(0.02, "fig. 4b; sec. 4.2 refers to an appendix that is not in our text"),
            "diagnostics": ours(PRESETS["events"].diagnostics, "what sec. 4.2 lists"),
        },
    ),
    "sgd-iir": study(
        "SGD over batch sizes: the plateau of ‖H‖_{S_b} follows 2ρ_b/lr (Lee 2022, fig. 4d)",
        _BASE | {
            "loss": _CROSS_ENTROPY,
            "lr": stated(0.08, "fig. 4d"),
            "batch_size": stated(tuple(2**k for k in range(3, 13)), "fig. 4d"),
            "every": ours(3, "odd, since dynamics at the edge have period 2; the figure is smoothed"),
            "diagnostics": ours(EDGE, "‖H‖_{S_b}, ρ_b, and what the claims read"),
        },
    ),
    "sgd-edge": study(
        "SGD: instability, resultant length and batch sharpness over batch sizes (Lee 2022, sec. 4.2, 5.1)",
        _BASE | {
            "loss": _CROSS_ENTROPY,
            "lr": stated(0.08, "fig. 4d; sec. 4.2 and 5.1 refer to an appendix that is not in our text"),
            "batch_size": ours((8, 32, 128, 512, 2048), "some of fig. 4d"),
            "every": ours(3, "odd, since dynamics at the edge have period 2"),
            "diagnostics": ours(PRESETS["sgd-edge"].diagnostics, "what the claims read"),
        },
    ),
    "scaling": study(
        "test accuracy over batch sizes and learning rates after 800 epochs (Lee 2022, fig. 5)",
        {name: mark for name, mark in _BASE.items() if name not in ("steps", "micro_batch")} | {
            "model": ours("cnn6", "the network of fig. 5 is not named; sec. 4 has 6CNN"),
            "model_options": stated(("batch_norm=true",), "sec. 5, remark"),
            "loss": ours("cross_entropy", "not named"),
            "lr": ours(0.08, "that of fig. 4d; one of the axis"),
            "batch_size": ours(tuple(2**k for k in range(3, 14)), "fig. 4d and full batch; axes are not in our text"),
            "epochs": ours(True, "a budget in epochs suggests it"),
            "num_epochs": stated(800, "sec. 5, remark"),
            "every": ours(201, "odd; the figure shows the end of training"),
            "diagnostics": ours(
                ("loss", "train_accuracy", "test_accuracy", "sharpness:every=log", "gradient_concentration:every=log"),
                "the figure, its curve ρ_b, and what the claims read",
            ),
            "seeds": ours((0, 1, 2)),
        },
        {"": Row(
            grid={"lr": tuple(repr(0.01 * 2.0**k) for k in range(8))},
            sources={"lr": "ours: 0.01 and 0.02 to 0.08 are those of other figures; axes are not in our text"},
        )},
    ),
}  # fmt: skip
