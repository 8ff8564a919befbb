"""Smith et al. 2021 at the paper's scale: Wide-ResNets on CIFAR-10, and an MLP on Fashion-MNIST (appendix D).

Rows whose learning rate or strength goes with the batch size have grids of their own, so that ε/B or λ/B is the same axis
in all of them.
"""

from __future__ import annotations

from ..rows import Row, Study
from .marks import Marked, ours, powers, row, stated, study

_PENALTY = "penalty.implicit_regularizer"
_EVERY_EPOCH = "about once an epoch, since the best test accuracy during training counts; odd"
_RANGE = "the range of the axis is not in our text"
_PROTOCOL: Marked = {
    "method": stated("sgd", "sec. 2.3: SGD without momentum"),
    "momentum": stated(0.0, "sec. 2.3"),
    "loss": ours("cross_entropy", "appendix D has a softmax layer; the loss is not named"),
    "n": ours(0, "all training examples"),
    "epochs": stated(True, "sec. 1 and 4: each example once an epoch"),
    "seeds": stated(tuple(range(7)), "sec. 2.3: 7 runs"),
    "keep": stated(5, "sec. 2.3: best 5 of 7"),
    "statistic": stated("best", "sec. 2.3: highest test accuracy during training"),
    "device": ours("cuda"),
}
_CIFAR: Marked = _PROTOCOL | {
    "data": stated("cifar10", "sec. 2.3"),
    "data_options": ours(("standardize=channel",)),
    "augment": stated("crop_flip", "sec. 2.3: crops and random flips; padding by 4 pixels is ours"),
    "model": stated("wrn_10_1", "sec. 2.3: 10-1 Wide-ResNet, SkipInit; details are ours"),
    "batch_size": stated((32,), "sec. 2.3"),
    "num_epochs": stated(6400, "sec. 2.3"),
    "schedule": stated("constant", "sec. 2.3: no decay"),
    "weight_decay": stated(5e-4, "sec. 2.3: L2 coefficient"),
    "lr": stated(2.0**-9, "sec. 2.3, fig. 1"),
    "every": ours(1561, _EVERY_EPOCH),
}
_FASHION: Marked = _PROTOCOL | {
    "data": stated("fashion_mnist", "appendix D"),
    "data_options": stated(("standardize=image",), "appendix D"),
    "augment": stated("none", "appendix D"),
    "model": stated("mlp_3x4096", "appendix D: 3 relu layers of width 4096"),
    "batch_size": stated((16,), "appendix D"),
    "num_epochs": stated(400, "appendix D, figs. 6a, 6b, 7a"),
    "schedule": stated("constant", "appendix D: no decay"),
    "weight_decay": stated(0.0, "appendix D"),
    "lr": stated(2.0**-9, "appendix D, fig. 6"),
    "every": ours(3751, _EVERY_EPOCH),
    "seeds": stated(tuple(range(7)), "appendix D: 7 runs"),
    "keep": stated(5, "appendix D: best 5"),
    "statistic": ours("best", "as sec. 2.3; appendix D says performance"),
}
_WATCHED = ours(("loss", "train_accuracy", "test_accuracy"), "what the figure shows")


def _rates(base: Marked, about: str, strength: float, where: str) -> Study:
    """Figs. 1, 2, 5 and 6a: C_mod with a small rate against C over rates, and both together."""
    every = 10 * base["every"].value + 1
    watched = (
        "loss",
        "train_accuracy",
        "test_accuracy",
        f"gradient_norm:every={every}",
        f"gradient_variance:every={every}",
    )
    rates = {"lr": ours(powers(-11, -3), _RANGE)}
    return study(
        about,
        base | {"diagnostics": ours(watched, "accuracies, loss, and what C_reg consists of")},
        {
            "rates": row({}, rates, about="C over learning rates (figs. 1b, 1c, 2a, 5; 6a)"),
            "penalties": row(
                {}, {_PENALTY: ours(powers(-10, -1), _RANGE)}, about="C + λ C_reg over λ at ε = 2^-9 (figs. 1b, 1c, 5; 6a)"
            ),
            "penalized-rates": row(
                {"penalty": stated((f"implicit_regularizer={strength!r}",), where)}, rates,
                about="C + λ C_reg over learning rates (figs. 1a, 2b)",
            ),
        },
        scale=100.0,
    )  # fmt: skip


def _batch_rates(base: Marked, about: str) -> Study:
    """Figs. 3a and 6b: equal ε/B, equal epochs."""
    return study(about, base | {"diagnostics": _WATCHED}, _by_batch("lr", -14, -8, "ε/B"), scale=100.0)


def _batch_penalties(base: Marked, about: str, steps: int, where: str) -> Study:
    """Figs. 3b and 6c: equal λ/B, equal numbers of steps."""
    fixed = {name: mark for name, mark in base.items() if name != "num_epochs"} | {"steps": stated(steps, where)}
    return study(about, fixed | {"diagnostics": _WATCHED}, _by_batch(_PENALTY, -14, -5, "λ/B"), scale=100.0)


def _by_batch(axis: str, low: int, high: int, ratio: str) -> dict[str, Row]:
    return {
        f"B={b}": row(
            {"batch_size": ours((b,), "the sizes are not in our text, but for the base's")},
            {axis: ours(powers(low, high, b), f"{ratio} = 2^{low} to 2^{high}; {_RANGE}")},
            about=f"batches of {b}, over {ratio}",
        )
        for b in (8, 16, 32, 64, 128)
    }


def _n_step(base: Marked, about: str, where: str, updates: Marked | None) -> Study:
    """Figs. 4 and 7: n updates on the same batch over bare rates, at equal epochs and at equal updates."""
    steps, epochs = None if updates is None else updates["steps"], base["num_epochs"].value
    rows = {}
    for n in (1, 2, 4, 8, 16):
        known = stated if n in (1, 16) and base is not _FASHION else ours
        change = {
            "method": stated("n_step_sgd", "sec. 4"),
            "method_options": known((f"n={n}",), "sec. 4: n = 1 and 16" if known is stated else "n is not in our text"),
        }
        grid = {"lr": ours(powers(-9, -1), _RANGE)}
        rows[f"n={n}"] = row(change, grid, about=f"{n}-step SGD over bare rates, equal epochs")
        if n == 1 and steps is None:
            continue  # the same runs
        if steps is None:
            length = {"num_epochs": ours(epochs // n, "as many updates as n = 1 has; the number is not in our text")}
        else:
            length = {"num_epochs": ours(0, "steps count"), "steps": stated(steps.value // n, steps.source)}
        rows[f"n={n}-updates"] = row(change | length, grid, about=f"{n}-step SGD over bare rates, equal updates")
    return study(about, base | {"diagnostics": _WATCHED, "lr": ours(2.0**-5, where)}, rows, scale=100.0)


_DECAYED: Marked = _CIFAR | {
    "model": stated("wrn_16_4", "sec. 4: 16-4 Wide-ResNet, SkipInit; details are ours"),
    "batch_size": stated((32,), "sec. 4"),
    "num_epochs": stated(400, "sec. 4, fig. 4a"),
    "schedule": stated("halving", "sec. 4: constant for half, then halved each tenth"),
    "augment": ours("crop_flip", "as sec. 2.3; sec. 4 does not say"),
    "weight_decay": ours(0.0, "sec. 4 does not say; sec. 2.3 has 5e-4, which n-step SGD here does not"),
    "data": stated("cifar10", "sec. 4"),
    "keep": stated(5, "sec. 4: best 5 of 7"),
    "seeds": stated(tuple(range(7)), "sec. 4: 7 runs"),
    "statistic": ours("best", "as sec. 2.3"),
}

SMITH: dict[str, Study] = {
    "smith-rates": _rates(
        _CIFAR, "learning rates against C_reg in the loss, WRN-10-1 (Smith et al. 2021, figs. 1, 2, 5)", 2.0**-6,
        "sec. 2.3, figs. 1a, 2b",
    ),
    "smith-batch-rates": _batch_rates(_CIFAR, "batch sizes at equal ε/B, WRN-10-1 (Smith et al. 2021, fig. 3a)"),
    "smith-batch-penalties": _batch_penalties(
        _CIFAR, "batch sizes at equal λ/B, WRN-10-1 (Smith et al. 2021, fig. 3b)", 10_000_000, "sec. 3: 10 million"
    ),
    "smith-n-step": _n_step(_DECAYED, "n updates on each batch, WRN-16-4 (Smith et al. 2021, fig. 4)", "a middle one", None),
    "smith-rates-mlp": _rates(
        _FASHION, "learning rates against C_reg in the loss, MLP (Smith et al. 2021, fig. 6a)", 2.0**-2,
        "appendix D: the optimal λ; fig. 6 has no such row",
    ),
    "smith-batch-rates-mlp": _batch_rates(_FASHION, "batch sizes at equal ε/B, MLP (Smith et al. 2021, fig. 6b)"),
    "smith-batch-penalties-mlp": _batch_penalties(
        _FASHION, "batch sizes at equal λ/B, MLP (Smith et al. 2021, fig. 6c)", 1_500_000, "appendix D: 1.5 million"
    ),
    "smith-n-step-mlp": _n_step(
        _FASHION, "n updates on each batch, MLP (Smith et al. 2021, fig. 7)", "a middle one",
        {"steps": stated(6_000_000, "appendix D, fig. 7b: 6 million updates")},
    ),
}  # fmt: skip
