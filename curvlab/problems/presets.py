"""Named experiments: every setting of a training run in one place. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

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

    data: str = "digits"
    """Data set (see `curvlab list`), such as digits, cifar10-8k: a number in the name is that of training examples."""
    data_options: tuple[str, ...] = ()
    """Options of the data set as name=value, such as difficulty=2.0."""
    n: int = 1024
    """Number of training examples; 0 for all that there are."""
    validation: int = 0
    """Training examples that are set aside for choosing settings, and never trained on: the last ones of the n."""
    center: bool = False
    """Standardize the inputs (digits)."""
    label_noise: float = 0.0
    """Share of wrong training labels, or standard deviation of the noise (regressions)."""
    model: str = "mlp"
    """Architecture (see `curvlab list`), such as mlp, cnn, resnet18."""
    model_size: Literal["full", "small"] = "full"
    """Size of the papers' models: as in the paper, or small enough for a CPU."""
    model_options: tuple[str, ...] = ()
    """Options of the model as name=value, such as batch_norm=true (cnn6)."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers (mlp), or channels of the convolutions (cnn)."""
    activation: str = "tanh"
    """Activation (mlp): tanh, relu, gelu, elu or silu."""
    loss: Literal["squared_error", "cross_entropy", "token"] = "squared_error"
    """squared_error is 0.5 times the sum over outputs; token is for sequences (gpt)."""
    lr: float = 0.2
    """Learning rate."""
    schedule: Literal["constant", "cosine", "halving"] = "constant"
    """Of the learning rate; halving: constant for half of the steps, then halved each tenth (Smith et al. 2021, sec. 4)."""
    method: str = "sgd"
    """Optimizer: sgd, adam, adamw, rmsprop, or a method of a paper (see `curvlab list`), such as iterative_grafting."""
    method_options: tuple[str, ...] = ()
    """Options of the optimizer as name=value, such as sigma=0.01."""
    momentum: float = 0.0
    """Polyak momentum (sgd, rmsprop)."""
    weight_decay: float = 0.0
    """Weight decay (sgd, adam, adamw, rmsprop)."""
    penalty: tuple[str, ...] = ()
    """Penalties that are added to the loss, as name=strength, such as gradient_norm=0.01; options after colons:
    gradient_norm_difference=0.01:h=0.001."""
    micro_batch: int = 0
    """Examples of a micro-batch, for penalties and grafting; 0 is the whole batch."""
    external: str = ""
    """Run folder whose batch_gradient_norm, measured at every step, gives the step lengths of external_grafting."""
    batch_size: tuple[int, ...] = (0,)
    """Batch sizes, one run each; 0 is the full data set."""
    replacement: bool = False
    """Draw batches with replacement."""
    epochs: bool = False
    """Walk through shuffled data instead of drawing every batch independently."""
    order: Literal["new", "fixed", "shuffled", "alternating"] = "new"
    """Order of epochs: new batches in each, or the same ones in a fixed, shuffled or alternating order."""
    augment: Literal["none", "crop_flip"] = "none"
    """Of training images, never of those that are measured: crop_flip pads by 4 pixels, crops at random and mirrors half."""
    steps: int = 600
    """Optimizer steps."""
    num_epochs: int = 0
    """Length of training in epochs, N/b steps each, instead of `steps`; 0 for `steps`."""
    every: int = 1
    """Measure at every so many steps; odd, because dynamics at the edge have period 2."""
    init_seed: int = 0
    """Seed of the initialization (and of label noise)."""
    data_seed: int = 0
    """Seed of the order of the data, and of what a method draws."""
    probe_seed: int = 0
    """Seed of the random probes of measurements, and of what penalties draw."""
    diagnostics: tuple[str, ...] = EDGE
    """What to measure; options after colons: microbatch_gradient_norm:micro_batch_size=16, test_accuracy:every=101."""
    trajectory: bool = False
    """Also save the parameters at the measured steps, for trajectory_distance."""
    device: str = "cpu"
    """Where to train and measure: cpu, cuda, cuda:1."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of training and measuring."""
    threads: int = 1
    """CPU threads; small models are fastest with one, and bits depend on it."""


PRESETS: dict[str, Experiment] = {
    "edge-of-stability": Experiment(),
    "sgd-iir": Experiment(batch_size=(8, 32, 128, 512, 1024), every=3),
    "events": Experiment(
        diagnostics=(
            *EDGE, "gradient_alignment", "gradient_cosine", "batch_gradient_cosine", "directional_sharpness",
            "hessian_eigenvalues",
        ),
    ),
    "loss-differences": Experiment(
        activation="gelu", loss="cross_entropy", label_noise=0.2, lr=0.4, batch_size=(128, 1024),
        diagnostics=(
            "loss", "gradient_norm", "sharpness", "interaction_sharpness", "instability", "gradient_concentration",
            "expected_loss_difference",
        ),
    ),
    "valleys": Experiment(
        activation="gelu", lr=0.4,
        diagnostics=("loss", "sharpness", "instability", "directional_sharpness", "loss_along_step"),
    ),
    "momentum-edge": Experiment(
        lr=0.05, momentum=0.9, method_options=("nesterov=true",), steps=900, every=3, diagnostics=("loss", "sharpness")
    ),
    "adaptive-edge": Experiment(
        method="adam", lr=1e-3, steps=1000, every=3, diagnostics=("loss", "sharpness", "preconditioned_sharpness")
    ),
    "sgd-edge": Experiment(
        batch_size=(8, 32, 128, 512), every=3,
        diagnostics=(
            "loss", "gradient_norm", "sharpness", "instability", "interaction_sharpness", "gradient_concentration",
            "mean_resultant_length", "batch_sharpness", "batch_gradient_norm", "batch_gradient_cosine",
        ),
    ),
    "scaling": Experiment(
        label_noise=0.2, batch_size=(8, 32, 128, 512, 1024), steps=800, every=41,
        diagnostics=("loss", "sharpness", "test_accuracy", "gradient_concentration"),
    ),
    "gradient-spread": Experiment(
        n=256, hidden=(64,), loss="cross_entropy", label_noise=0.2, lr=0.1, steps=500, batch_size=(8, 32, 128),
        diagnostics=("loss", "batch_gradient_norm", "gradient_norm", "gradient_variance"),
    ),
    "control": Experiment(
        data="linear_regression", n=256, label_noise=1.0, model="linear", lr=0.12, batch_size=(4, 16, 64, 256)
    ),
}  # fmt: skip

ABOUT: dict[str, str] = {
    "edge-of-stability": "full-batch descent on digits: sharpness climbs to 2/lr and hovers above (Lee 2022, fig. 4a-c)",
    "sgd-iir": "SGD over batch sizes: the plateau of ‖H‖_{S_b} follows 2ρ_b/lr (Lee 2022, fig. 4d)",
    "events": "full-batch descent: the order of events on the way to the edge, alignment, cosines (Lee 2022, sec. 4.2)",
    "loss-differences": "expected loss difference against instability, for SGD and full batch (Lee 2022, figs. 1, 2)",
    "valleys": "curvature across the valley in the stable and the unstable regime (Lee 2022, fig. 3)",
    "momentum-edge": "Nesterov momentum: sharpness hovers at (2 + 2β)/(lr(1 + 2β)) (Cohen et al. 2021)",
    "adaptive-edge": "Adam: preconditioned sharpness hovers at 38/lr (Cohen et al. 2022)",
    "sgd-edge": "SGD: batch sharpness and instability against 2/lr (Andreyev and Beneventano 2024; Lee 2022)",
    "scaling": "final sharpness and accuracy over b; with --grid lr=0.1,0.2,0.4 and 3 seeds (Lee 2022, fig. 5)",
    "gradient-spread": "the mini-batch gradient's variance against Γ(N-b)/((N-1)b) (Smith et al. 2021, eq. 32)",
    "control": "linear regression with label noise: instability sits at 2/lr without any edge; no claim may hold",
}


def vary(experiment: Experiment, name: str, text: str) -> Experiment:
    """The experiment with one setting changed, as a grid of the command line writes it.

    Args:
        name: of a setting; ``penalty.NAME`` is the strength of a penalty, ``method.NAME`` an option of the method,
            ``data.NAME`` one of the data set, ``model.NAME`` one of the model.
        text: its value; the parts of a setting of several values are joined by +, such as ``hidden=64+64``.

    Raises:
        ValueError: an unknown setting, or a value that it cannot have.

    Example:
        >>> vary(Experiment(), "hidden", "32+32").hidden
        (32, 32)
        >>> vary(Experiment(penalty=("gradient_norm=1",)), "penalty.gradient_norm", "0.1").penalty
        ('gradient_norm=0.1',)
    """
    kind, _, option = name.partition(".")
    plural = {"penalty": "penalty"}.get(kind, f"{kind}_options" if kind in ("method", "data", "model") else None)
    if option and plural:
        others = tuple(entry for entry in getattr(experiment, plural) if entry.partition("=")[0] != option)
        changed: dict[str, Any] = {plural: (*others, f"{option}={text}")}
        return dataclasses.replace(experiment, **changed)
    known = {field.name: field.default for field in dataclasses.fields(Experiment)}
    if name not in known:
        raise ValueError(
            f"there is no setting {name!r} to vary; there are {', '.join(known)}, and penalty.NAME, method.NAME, data.NAME, "
            "model.NAME"
        )
    return dataclasses.replace(experiment, **{name: _value(name, known[name], text)})


def _value(name: str, default: Any, text: str) -> Any:
    """A setting of the type of its default."""
    choices = get_args(get_type_hints(Experiment)[name]) if isinstance(default, str) else ()
    if choices and text not in choices:
        raise ValueError(f"{name} is {text!r}; expected one of {', '.join(choices)}")
    if isinstance(default, tuple):
        numbers = name in ("hidden", "batch_size")
        return tuple(_number(name, part) if numbers else part for part in text.split("+") if part)
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} is {text!r}; expected true or false")
        return text.lower() == "true"
    return text if isinstance(default, str) else _number(name, text, type(default))


def _number(name: str, text: str, kind: type = int) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}; expected a number of type {kind.__name__}") from None


def parse_options(what: str, entries: tuple[str, ...]) -> dict[str, Any]:
    """Pairs name=value as a dictionary of numbers, truth values, None, strings, and tuples of integers joined by +.

    Raises:
        ValueError: an entry without a name or a value.

    Example:
        >>> parse_options("method", ("sigma=0.1", "noise_steps=none", "n=2"))
        {'sigma': 0.1, 'noise_steps': None, 'n': 2}
    >>> parse_options("data set", ("shape=1+8+8",))
    {'shape': (1, 8, 8)}
    """
    found = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not (name and equals and text):
            raise ValueError(f"an option of the {what} is {entry!r}; expected name=value, such as sigma=0.01")
        found[name] = _literal(text)
    return found


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    parts = text.split("+")
    return tuple(map(int, parts)) if len(parts) > 1 and all(part.isdecimal() for part in parts) else text


def parse_penalties(entries: tuple[str, ...]) -> list[tuple[float, tuple[str, dict[str, Any]]]]:
    """Entries name=strength, with options after colons, as `curvlab.train` takes them.

    Raises:
        ValueError: an entry that is not of that form.

    Example:
        >>> parse_penalties(("gradient_norm=0.01",))
        [(0.01, ('gradient_norm', {}))]
    """
    found = []
    for entry in entries:
        first, *options = entry.split(":")
        name, _, strength = first.partition("=")
        try:
            found.append((float(strength), (name, parse_options("penalty", tuple(options)))))
        except ValueError as error:
            wrong = str(error) if "option" in str(error) else f"a penalty is {entry!r}"
            raise ValueError(f"{wrong}; expected name=strength, such as gradient_norm=0.01") from None
    return found


def parse_diagnostics(entries: tuple[str, ...]) -> tuple[list[str | tuple[str, dict[str, Any]]], dict[str, Any]]:
    """Names, with options after colons, as `curvlab.train` takes them; and schedules of their own, which `every` gives.

    Raises:
        ValueError: an option that is not name=value.

    Example:
        >>> parse_diagnostics(("loss", "microbatch_gradient_norm:micro_batch_size=16", "sharpness:every=5"))
        (['loss', ('microbatch_gradient_norm', {'micro_batch_size': 16}), 'sharpness'], {'sharpness': 5})
    """
    found: list[str | tuple[str, dict[str, Any]]] = []
    schedules = {}
    for entry in entries:
        name, *texts = entry.split(":")
        options = parse_options(f"diagnostic {name}", tuple(texts))
        if "every" in options:
            schedules[name] = options.pop("every")
        found.append((name, options) if options else name)
    return found, schedules


def from_config(config: dict[str, Any]) -> tuple[Experiment, int]:
    """The experiment and batch size that a run's configuration states; settings that it does not know have their default.

    Raises:
        ValueError: the run was not made from an experiment, or by another version with other settings.
    """
    stored = config.get("experiment")
    if not isinstance(stored, dict):
        raise ValueError(
            "the run does not state an experiment, so its model and data are unknown here; name them: curvlab measure "
            "--model package.module:make_model --data package.module:make_data --checkpoint file.pt"
        )
    odd = sorted(set(stored) - {field.name for field in dataclasses.fields(Experiment)})
    if odd:
        raise ValueError(f"the run's experiment differs in the settings {odd}; read it with the version that made it")
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
    }
    known = {field.name: field.default for field in dataclasses.fields(Experiment)}
    wrong = [key for key, value in settings.items() if not _fits(key, value, known[key])]
    batch_size = config.get("run_batch_size", 0)
    if wrong or not isinstance(batch_size, int):
        what = ", ".join(f"{key} = {str(settings[key])[:80]}" for key in wrong[:3]) or f"run_batch_size = {batch_size}"
        raise ValueError(f"the run's experiment has settings of other types ({what}); it was not written by curvlab")
    return Experiment(**settings), batch_size


def _fits(name: str, value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        kind = int if name in ("hidden", "batch_size") else str
        return isinstance(value, tuple) and all(isinstance(x, kind) for x in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)
