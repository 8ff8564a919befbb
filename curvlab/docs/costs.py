"""What a command at a paper's scale costs on a GPU, estimated from floating-point operations."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from typing import Any

from ..command_line import run_options, sweep_asked
from ..problems.presets import Experiment, parse_diagnostics, parse_options, vary
from ..problems.registry import canonical
from ..problems.rows import Study
from ..problems.studies import study
from ..sweep.plan import points

SPEED, UPDATES = 20e12, 200.0  # operations a second, and updates of small networks, that we assume of a GPU
MEASURED = 40.0  # gradients of all data at a step with curvatures (the README's table)
CURVATURES = {"sharpness", "instability", "interaction_sharpness", "expected_loss_difference"}
PENALIZED = 3.0  # cost of a step with a penalty, without one
FORWARD: dict[
    str, float
] = {  # operations, two for a multiplication and an addition, for one example of 3x32x32 or 1x28x28
    "cnn6": 105.58e6,
    "wrn_10_1": 25.00e6,
    "wrn_16_4": 785.22e6,
    "resnet18": 1110.85e6,
    "vgg11": 305.54e6,
    "vgg16_bn": 626.40e6,
    "mlp_3x4096": 73.61e6,
}
EXAMPLES = {
    "cifar10": 50_000, "cifar100": 50_000, "fashion_mnist": 60_000, "svhn": 73_257, "stl10": 5_000, "tiny_imagenet": 100_000,
}  # fmt: skip
AREA = {"stl10": 9.0, "tiny_imagenet": 4.0}  # pixels, over those of CIFAR


def asked(command: str) -> tuple[Study, Experiment, tuple[str, ...]]:
    """The study of a command, the base of its rows with the command's options, and its rows."""
    _, verb, *arguments = shlex.split(command)
    if verb == "run":
        options = run_options(*arguments)
        return study(arguments[0], options.scale), options.experiment, ("",)
    sweep = sweep_asked(*arguments)
    return sweep.study, sweep.base or sweep.study.base, sweep.labels


def runs(command: str) -> Iterator[tuple[Experiment, int]]:
    """The experiments of a command with one batch size each, and how often each is run."""
    _, verb, *arguments = shlex.split(command)
    if verb == "run":
        base = run_options(*arguments).experiment
        yield from ((vary(base, "batch_size", str(b)), 1) for b in base.batch_size)
        return
    sweep = sweep_asked(*arguments)
    for label in sweep.labels:
        base = sweep.study.experiment(label, sweep.base)
        grid, times = sweep.axes(label), len(sweep.seeds)
        if sweep.tuning_seeds:
            yield base, times
            grid, times = sweep.study.rows[label].tune, len(sweep.tuning_seeds)
        for point in points(grid):
            experiment = base
            for name, text in point.items():
                experiment = vary(experiment, name, text)
            yield experiment, times


def seconds(experiment: Experiment) -> float:
    """Of one run: updates, and full-batch measurements of curvature; other measurements are left out."""
    name, _, number = canonical(experiment.data).partition("-")
    n = int(number or experiment.n or EXAMPLES[name]) - experiment.validation
    b = experiment.batch_size[0] or n
    gradient = 3 * FORWARD[experiment.model] * AREA.get(name, 1.0)
    batches = experiment.num_epochs * (n // b) or experiment.steps
    options: dict[str, Any] = parse_options("method", experiment.method_options)
    updates = batches * (options.get("n", 1) if experiment.method == "n_step_sgd" else 1)
    training = max(updates * b * gradient * (PENALIZED if experiment.penalty else 1.0) / SPEED, updates / UPDATES)
    requests, own = parse_diagnostics(experiment.diagnostics)
    every = [own.get(name, experiment.every) for name in CURVATURES.intersection(map(str, requests))]
    measured = max((10 * math.log10(batches) if k == "log" else batches / k for k in every), default=0.0)
    return training + measured * MEASURED * n * gradient / SPEED


def estimate(command: str) -> str:
    """Hours on a GPU and the number of runs, as text."""
    found = list(runs(command))
    hours = sum(seconds(experiment) * times for experiment, times in found) / 3600
    shown = f"{hours:.2g}" if hours < 10 else f"{float(f'{hours:.2g}'):,.0f}"
    count = sum(times for _, times in found)
    return f"{count} run{'s' * (count > 1)}, {shown} GPU-hours"
