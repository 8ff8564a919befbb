"""Named experiments: every setting of a training run in one place. Loads torch only to build one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from ..objective import Objective

EDGE = (
    "loss",
    "gradient_norm",
    "sharpness",
    "interaction_sharpness",
    "instability",
    "gradient_concentration",
    "expected_loss_difference",
    "batch_gradient_norm",
    "test_loss",
    "test_accuracy",
)


@dataclass(frozen=True)
class Experiment:
    """All settings of an experiment; several batch sizes are several runs."""

    data: Literal["digits", "linear_regression"] = "digits"
    """Data set."""
    n: int = 1024
    """Number of training examples."""
    center: bool = False
    """Standardize the inputs (digits)."""
    label_noise: float = 0.0
    """Share of wrong training labels (digits), or standard deviation of the noise (linear_regression)."""
    model: Literal["mlp", "cnn", "linear"] = "mlp"
    """Architecture."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers (mlp), or channels of the convolutions (cnn)."""
    activation: str = "tanh"
    """Activation (mlp): tanh, relu, gelu, elu or silu."""
    loss: Literal["squared_error", "cross_entropy"] = "squared_error"
    """squared_error is 0.5 times the sum over outputs."""
    lr: float = 0.2
    """Learning rate."""
    momentum: float = 0.0
    """Polyak momentum."""
    batch_size: tuple[int, ...] = (0,)
    """Batch sizes, one run each; 0 is the full data set."""
    replacement: bool = False
    """Draw batches with replacement."""
    epochs: bool = False
    """Walk through shuffled data instead of drawing every batch independently."""
    steps: int = 600
    """Optimizer steps."""
    every: int = 1
    """Measure at every so many steps; odd, because dynamics at the edge have period 2."""
    init_seed: int = 0
    """Seed of the initialization (and of label noise)."""
    data_seed: int = 0
    """Seed of the order of the data."""
    probe_seed: int = 0
    """Seed of the random probes of measurements."""
    diagnostics: tuple[str, ...] = EDGE
    """What to measure."""
    device: str = "cpu"
    """Where to train and measure: cpu, cuda, cuda:1."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of training and measuring."""
    threads: int = 1
    """CPU threads; small models are fastest with one, and bits depend on it."""


PRESETS: dict[str, Experiment] = {
    "edge-of-stability": Experiment(),
    "sgd-iir": Experiment(batch_size=(8, 32, 128, 512, 1024), every=3),
    "control": Experiment(
        data="linear_regression", n=256, label_noise=1.0, model="linear", lr=0.12, batch_size=(4, 16, 64, 256)
    ),
}

ABOUT: dict[str, str] = {
    "edge-of-stability": "full-batch descent on digits: sharpness climbs to 2/lr and hovers above (Lee 2022, fig. 4a-c)",
    "sgd-iir": "SGD over batch sizes: the plateau of ‖H‖_{S_b} follows 2ρ_b/lr (Lee 2022, fig. 4d)",
    "control": "linear regression with label noise: instability sits at 2/lr without any edge; no claim may hold",
}


def build(experiment: Experiment, batch_size: int = 0) -> tuple[Objective, Objective, torch.optim.Optimizer, Any]:
    """The training objective, the test objective, the optimizer and the batches of one run of an experiment.

    Args:
        batch_size: of the run; 0 is the full data set.

    Raises:
        ValueError: from the problem itself, such as a batch size above n.
    """
    import torch

    from ..batches import Batches
    from ..objective import Objective
    from .data import digits, linear_regression
    from .models import cnn, linear, mlp

    try:
        torch.empty(0, device=experiment.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {experiment.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    torch.set_num_threads(experiment.threads)
    dtype = getattr(torch, experiment.dtype)
    seed = experiment.init_seed
    if experiment.data == "digits":
        noise = experiment.label_noise
        train, test = digits(experiment.n, center=experiment.center, label_noise=noise, seed=seed, dtype=dtype)
        outputs = 10
    else:
        train, test = linear_regression(experiment.n, noise=experiment.label_noise, seed=seed, dtype=dtype)
        outputs = 1
    inputs = train[0].shape[1]
    if experiment.model == "mlp":
        model: torch.nn.Module = mlp(
            (inputs, *experiment.hidden, outputs), experiment.activation, seed=seed, dtype=dtype
        )
    elif experiment.model == "cnn":
        model = cnn(experiment.hidden, num_classes=outputs, seed=seed, dtype=dtype)
    else:
        model = linear(inputs, outputs, dtype=dtype)
    model = model.to(experiment.device)
    L = Objective(model, experiment.loss, train)
    optimizer = torch.optim.SGD(model.parameters(), lr=experiment.lr, momentum=experiment.momentum)
    batches = Batches(
        experiment.n,
        batch_size or experiment.n,
        experiment.steps,
        replacement=experiment.replacement,
        epochs=experiment.epochs,
        seed=experiment.data_seed,
    )
    return L, Objective(model, experiment.loss, test), optimizer, batches


def from_config(config: dict[str, Any]) -> tuple[Experiment, int]:
    """The experiment and batch size that a run's configuration states.

    Raises:
        ValueError: the run was not made from an experiment, or by another version with other settings.
    """
    stored = config.get("experiment")
    if not isinstance(stored, dict):
        raise ValueError(
            "the run does not state an experiment, so its model and data are unknown here; measure it with "
            "curvlab.measure(L, names, w=Run(path).load('final')['params'])"
        )
    known = {field.name for field in dataclasses.fields(Experiment)}
    if set(stored) != known:
        odd = sorted(set(stored) ^ known)
        raise ValueError(f"the run's experiment differs in the settings {odd}; read it with the version that made it")
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
    }
    return Experiment(**settings), int(config.get("run_batch_size", 0))
