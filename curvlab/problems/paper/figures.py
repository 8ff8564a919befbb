"""Every figure and table of the three papers that shows an experiment: what draws it at both scales, and what differs."""

from __future__ import annotations

from dataclasses import dataclass

from ..rows import Study
from ..studies import Scale
from .lee import LEE
from .novack import NOVACK
from .smith import SMITH

PAPER: dict[str, Study] = LEE | SMITH | NOVACK


@dataclass(frozen=True)
class Figure:
    """A figure or a table of a paper, or several that one command draws.

    Attributes:
        number: as the paper counts.
        shows: what it shows.
        name: of the preset or study at the paper's scale.
        options: what the command has besides at the paper's scale.
        small: the name at small scale, where it is another.
        small_options: what the command has besides at small scale.
        differences: from the paper, beside the settings that are ours.
    """

    number: str
    shows: str
    name: str
    options: str = ""
    small: str = ""
    small_options: str = ""
    differences: str = ""

    def command(self, scale: Scale) -> str:
        """What to type; one row without a grid of its own is a run, anything else a sweep."""
        rows = PAPER[self.name].rows
        verb = "run" if list(rows) == [""] and not rows[""].grid else "sweep"
        name, options = (self.name, self.options) if scale == "paper" else (self.small or self.name, self.small_options)
        return " ".join(filter(None, ["curvlab", verb, name, "--scale paper" * (scale == "paper"), options]))


_CROSS_ENTROPY = "--loss cross_entropy --activation gelu --label-noise 0.2"
_TUNE = "--tuning-seeds 100"
_N_STEP = "--rows n=1 n=2 n=4 n=8 n=16"
_UPDATES = "--rows n=1{} n=2-updates n=4-updates n=8-updates n=16-updates"
_BUDGETS = f"{_N_STEP} --grid num_epochs=50,100,200,400,800"

FIGURES: dict[str, tuple[Figure, ...]] = {
    "Lee 2022": (
        Figure("fig. 1, 2 (cross-entropy)", "loss difference against tr(HS_b)/tr(S_n), SGD and GD", "loss-differences",
               differences="the expectation is measured, not one realized difference"),
        Figure("fig. 1, 2 (squared error)", "the same", "loss-differences", "--loss squared_error",
               small_options="--loss squared_error --label-noise 0",
               differences="squared error is half the sum over outputs; the paper does not say"),
        Figure("fig. 3", "asymmetric valleys", "valleys", differences="the right panel is logged, a line for each α"),
        Figure("fig. 4a", "‖H‖ and ‖H‖_{S_n} at the edge, GD", "edge-of-stability", "--lr 0.01",
               small_options=f"{_CROSS_ENTROPY} --lr 0.2"),
        Figure("fig. 4b", "the same, another rate", "edge-of-stability",
               small_options=f"{_CROSS_ENTROPY} --lr 0.4"),
        Figure("fig. 4c", "the same, squared error", "edge-of-stability", "--loss squared_error"),
        Figure("fig. 4d", "‖H‖_{S_b} over batch sizes", "sgd-iir"),
        Figure("sec. 4.2", "events (i)-(v), alignment, cosines", "events"),
        Figure("sec. 4.2, 5.1", "SGD: instability, R̄_b² against ρ_b", "sgd-edge"),
        Figure("fig. 5 (CIFAR-10-8k)", "test accuracy over (b, lr), with ρ_b", "scaling",
               small_options="--grid lr=0.1,0.2,0.4",
               differences="the left panel needs no run: LSSR from ρ_b"),
        Figure("fig. 5 (CIFAR-100-8k)", "the same", "scaling", "--data cifar100-8k", small_options="--grid lr=0.1,0.2,0.4"),
        Figure("fig. 5 (STL-10-4k)", "the same", "scaling",
               "--data stl10-4k --batch-size 8 16 32 64 128 256 512 1024 2048 4096", small_options="--grid lr=0.1,0.2,0.4",
               differences="images have 96x96 pixels; the paper does not say whether it shrinks them"),
        Figure("fig. 5 (Tiny-ImageNet-32k)", "the same", "scaling", "--data tiny-imagenet-32k",
               small_options="--grid lr=0.1,0.2,0.4"),
    ),
    "Smith et al. 2021": (
        Figure("fig. 1, 2, 5", "accuracy, C_reg and loss over ε, over λ at ε = 2^-9, and over ε at λ = 2^-6", "smith-rates",
               differences="C_reg from ‖∇C‖² and Γ, averaged over all batches; the paper has the best training accuracy at "
               "ε = 2^-10 (sec. 2.3) and at 2^-9 (fig. 5)"),
        Figure("fig. 3a", "test accuracy over ε/B", "smith-batch-rates"),
        Figure("fig. 3b", "test accuracy over λ/B", "smith-batch-penalties"),
        Figure("fig. 4a", "n-step SGD at equal epochs", "smith-n-step", _N_STEP),
        Figure("fig. 4b", "n-step SGD at equal updates", "smith-n-step", _UPDATES.format("")),
        Figure("fig. 4c", "n-step SGD over budgets", "smith-n-step", _BUDGETS, differences="the budgets are ours"),
        Figure("fig. 6a", "as fig. 1b, Fashion-MNIST", "smith-rates-mlp", "--rows rates penalties", "smith-rates"),
        Figure("fig. 6b", "as fig. 3a", "smith-batch-rates-mlp", small="smith-batch-rates"),
        Figure("fig. 6c", "as fig. 3b", "smith-batch-penalties-mlp", small="smith-batch-penalties"),
        Figure("fig. 7a", "as fig. 4a", "smith-n-step-mlp", _N_STEP, "smith-n-step"),
        Figure("fig. 7b", "as fig. 4b", "smith-n-step-mlp", _UPDATES.format("-updates"), "smith-n-step"),
        Figure("fig. 7c", "as fig. 4c", "smith-n-step-mlp", _BUDGETS, "smith-n-step",
               differences="the budgets are ours"),
    ),
    "Novack et al. 2022": (
        Figure("table 1, 4, fig. 1, 4 (CIFAR-10)", "penalties and grafting against small batches", "novack-regularizers",
               _TUNE),
        *(
            Figure(f"table 1{also} ({label})", "the same", "novack-regularizers", f"--data {data} {_TUNE}")
            for label, data, also in (
                ("CIFAR-100", "cifar100", ", 4, fig. 1, 4"), ("Tiny-ImageNet", "tiny_imagenet", ""), ("SVHN", "svhn", "")
            )
        ),
        *(
            Figure(f"table 4 (VGG16, {label})", "grafting and NGD", "novack-regularizers",
                   f"--model vgg16_bn --data {data} --rows SB LB IG EG NGD {_TUNE}")
            for label, data in (("CIFAR-10", "cifar10"), ("CIFAR-100", "cifar100"))
        ),
        Figure("table 6", "Anti-PGD over rates and σ²", "novack-regularizers",
               "--data cifar100 --rows Anti-PGD --grid lr=0.5,0.1,0.05 method.sigma=0.1,0.0316227766"),
        Figure("table 2, fig. 2 (CIFAR-100)", "larger micro-batches", "novack-micro-batch", _TUNE),
        Figure("table 2, fig. 2 (Tiny-ImageNet)", "the same", "novack-micro-batch", f"--data tiny_imagenet {_TUNE}"),
        Figure("table 3", "larger micro-batches, VGG11", "novack-vgg", f"--rows SB LB GN GN-1000 GN-2500 {_TUNE}",
               "novack-micro-batch"),
        Figure("table 5", "penalties against small batches, VGG11", "novack-vgg", f"--rows SB LB GN FT AJ UJ {_TUNE}",
               differences="GN at |M| = 100 has 76.89 in table 3 and 77.62 in table 5"),
        Figure("fig. 3, 5", "one sampled micro-batch, over λ and |S|", "novack-sampled",
               differences="eq. 8 is not in our text; which models and data its panels have, neither"),
    ),
}  # fmt: skip

NEEDS: dict[str, str] = {
    "Lee 2022": "Needs a GPU with 24 GB or more (ours, not tried), and in DATASETS the Python version of CIFAR-10; for "
    "fig. 5 also CIFAR-100, STL-10 (binary) and Tiny ImageNet. Measuring costs more than training: about 40 gradients of "
    "all data a measured step.",
    "Smith et al. 2021": "Needs a GPU, and in DATASETS the Python version of CIFAR-10 and the four files of "
    "Fashion-MNIST. The networks are small and the updates many: several runs can share a GPU by `--workers`.",
    "Novack et al. 2022": "Needs a GPU with 80 GB for |M| = 2560 (ours, not tried; less for 128), and in DATASETS the "
    "Python versions of CIFAR-10 and CIFAR-100, SVHN and Tiny ImageNet. The values of rows that are tuned are chosen by "
    "the command.",
}
