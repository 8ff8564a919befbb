"""An experiment as objects: data, model, objective, optimizer, schedule, batches; and its training, by one call."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..batches import Batches
from ..checks import usable_device
from ..diagnostics import parse
from ..methods import METHODS
from ..objective import Objective
from ..regularizers.registry import terms
from ..runs import Run
from ..snapshot import Snapshot
from ..trainer import train
from .augmentation import Augmented
from .data import Examples
from .presets import Experiment, from_config, parse_diagnostics, parse_options, parse_penalties
from .registry import DATA, canonical, load
from .registry import model as make_model

OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "halving": lambda t: 1.0 if t < 0.5 else 0.5 ** (1 + math.floor(10 * (t - 0.5) + 1e-9)),
}


class Problem(NamedTuple):
    """What an experiment trains and measures on; `validation` is None where nothing was set aside."""

    objective: Objective
    test: Objective
    validation: Objective | None


def build(
    experiment: Experiment, batch_size: int = 0, *, group: Any = None
) -> tuple[Objective, Objective, torch.optim.Optimizer, Batches | Augmented]:
    """The training objective, the test objective, the optimizer and the batches of one run of an experiment.

    Args:
        batch_size: of the run; 0 is the full data set.
        group: of the processes that share the data, as for `Objective`.

    Raises:
        ValueError: unknown names, settings that do not go together, or from the problem itself, such as a batch size
            above the number of examples.
    """
    problem = make_problem(experiment, group)
    L = problem.objective
    b = batch_size or L.size
    batches = Batches(
        L.size,
        b,
        experiment.num_epochs * (L.size // b) or experiment.steps,
        replacement=experiment.replacement,
        epochs=experiment.epochs,
        seed=experiment.data_seed,
        order=experiment.order,
    )
    shown = batches if experiment.augment == "none" else Augmented(L, batches)
    return L, problem.test, make_optimizer(experiment, L), shown


def make_problem(experiment: Experiment, group: Any = None) -> Problem:
    """The objectives of an experiment over one model: training, test, and what was set aside for validation."""
    torch.set_num_threads(experiment.threads)
    train_set, test_set = _data(experiment)
    usable_device(experiment.device)
    (x, y), kept = train_set, len(train_set[0]) - experiment.validation
    if not 0 < kept <= len(x):
        raise ValueError(
            f"validation is {experiment.validation} of {len(x)} training examples; expected 0 to {len(x) - 1}"
        )
    model = _model(experiment, x, y, test_set[1]).to(experiment.device)
    objective = functools.partial(Objective, model, experiment.loss, group=group)
    held = objective((x[kept:], y[kept:])) if experiment.validation else None
    return Problem(objective((x[:kept], y[:kept])), objective(test_set), held)


def _data(experiment: Experiment) -> tuple[Examples, Examples]:
    name, _, number = canonical(experiment.data).partition("-")
    options = parse_options("data set", experiment.data_options)
    takes = inspect.signature(DATA[name]).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for option, value in (("center", experiment.center), ("label_noise", experiment.label_noise)):
        option = "noise" if option == "label_noise" and "noise" in takes else option
        if option in takes or (any_name and option == "label_noise"):
            options.setdefault(option, value)
        elif value:
            raise ValueError(f"data set {name} has no {option}; leave the setting out")
    count = int(number) if number else experiment.n
    options |= {"seed": experiment.init_seed, "dtype": getattr(torch, experiment.dtype)}
    return _called(f"data set {name}", load, name if not count else f"{name}-{count}", **options)


def _model(experiment: Experiment, x: torch.Tensor, y: torch.Tensor, y_test: torch.Tensor) -> torch.nn.Module:
    classes = not y.is_floating_point()
    outputs = int(max(y.max(), y_test.max())) + 1 if classes else y.shape[1]
    inputs = math.prod(x.shape[1:])
    given: dict[str, Any] = {"seed": experiment.init_seed, "dtype": getattr(torch, experiment.dtype)}
    given |= parse_options("model", experiment.model_options)
    name = experiment.model
    made = functools.partial(_called, f"model {name}", make_model, name)
    if name == "mlp":
        network = made((inputs, *experiment.hidden, outputs), experiment.activation, **given)
        return network if x.ndim == 2 else torch.nn.Sequential(torch.nn.Flatten(), network)
    if name == "cnn":
        return made(experiment.hidden, num_classes=outputs, **given)
    if name == "linear":
        return made(inputs, outputs, **given)
    if name == "diagonal_linear":
        return made(inputs, outputs, **given)
    shape = (1, 8, 8) if canonical(experiment.data).startswith("digits") else tuple(x.shape[1:])
    return made(experiment.model_size, shape=shape, num_classes=outputs, **given)


def make_optimizer(experiment: Experiment, L: Objective) -> torch.optim.Optimizer:
    """The optimizer of an experiment over the model of its objective.

    Raises:
        ValueError: an unknown method or option, or a setting that the method does not have.
    """
    name, options = experiment.method, parse_options("method", experiment.method_options)
    if name not in OPTIMIZERS and name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are {', '.join([*OPTIMIZERS, *METHODS])}")
    own: Any = getattr(torch.optim, OPTIMIZERS[name]) if name in OPTIMIZERS else METHODS[name]
    takes = inspect.signature(own).parameters
    for setting in ("momentum", "weight_decay"):
        value = getattr(experiment, setting)
        if setting in takes and name in OPTIMIZERS:
            options.setdefault(setting, value)
        elif value:
            raise ValueError(f"{setting} is {value}, but method {name} has none; leave the setting out")
    if name == "iterative_grafting" and not experiment.micro_batch:
        raise ValueError(
            "iterative_grafting takes its step lengths from micro-batches; give their size by --micro-batch"
        )
    if (name == "external_grafting") != bool(experiment.external):
        raise ValueError(
            "external_grafting and the run that it takes step lengths from go together; give --method external_grafting "
            "--external RUN, where RUN measured batch_gradient_norm at every step"
        )
    if experiment.external:
        options["norms"] = Run(experiment.external).series("batch_gradient_norm")
    if "objective" in takes:
        options["objective"] = L
    if "seed" in takes:
        options.setdefault("seed", experiment.data_seed)
    return _called(f"method {name}", own, L.model.parameters(), lr=experiment.lr, **options)


def make_scheduler(experiment: Experiment, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The schedule of the learning rate over so many steps, or None where it is constant."""
    if experiment.schedule == "constant":
        return None
    factor = SCHEDULES[experiment.schedule]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / steps))


class Training(NamedTuple):
    """A training that has not begun: its batches, and the snapshots to walk through."""

    batches: Batches | Augmented
    snapshots: Iterator[Snapshot]


def start(
    experiment: Experiment,
    batch_size: int = 0,
    *,
    run: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    group: Any = None,
) -> Training:
    """Everything up to the first step of one run of an experiment; the run's configuration states the experiment.

    Args:
        batch_size: of the run; 0 is the full data set.
        run, checkpoint_every, resume: as `curvlab.train`.
        group: of the processes that share the data, as for `Objective`.

    Raises:
        ValueError: as `build` and `curvlab.train`.

    Example:
        >>> len(list(start(Experiment(n=16, hidden=(4,), steps=3, diagnostics=())).snapshots))
        3
    """
    L, test, optimizer, batches = build(experiment, batch_size, group=group)
    penalties = parse_penalties(experiment.penalty)
    diagnostics, own = parse_diagnostics(experiment.diagnostics)
    names = [*parse(diagnostics), *(entry.name for _, entry, _ in terms(penalties))]
    snapshots = train(
        L,
        optimizer,
        batches,
        penalties=penalties,
        micro_batch_size=experiment.micro_batch or None,
        diagnostics=diagnostics,
        every={name: own.get(name, experiment.every) for name in names} if own else experiment.every,
        scheduler=make_scheduler(experiment, optimizer, batches.steps),
        trajectory=experiment.trajectory,
        run=run,
        config={"experiment": dataclasses.asdict(experiment), "run_batch_size": batch_size},
        test=test,
        seed=experiment.probe_seed,
        checkpoint_every=checkpoint_every,
        resume=resume,
    )
    return Training(batches, snapshots)


class Final(NamedTuple):
    """Where a run ended: the experiment, its objectives over the model at that point, b, the step, and lr."""

    experiment: Experiment
    problem: Problem
    batch_size: int
    step: int
    w: torch.Tensor


def final_point(path: str | os.PathLike) -> Final:
    """The end of a run that was made from an experiment; raises as `Run`, `Run.load` and `from_config`."""
    run = Run(path)
    experiment, b = from_config(run.config)
    problem = make_problem(experiment)
    final = run.load("final")
    problem.objective.model.load_state_dict(final["buffers"], strict=False)
    return Final(experiment, problem, b or problem.objective.size, final["step"], final["params"])


def _called(what: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A function with options that a user wrote: an unknown one is a mistake of the user's."""
    try:
        return function(*args, **options)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error
