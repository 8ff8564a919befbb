"""Presets and studies at the papers' scale. Against references: numbers that the papers state, operations that torch
counts, the page that ships. Behavioural: every setting has a source, every row and command starts (on images of the right
shape), and a missing data set gives one message.
"""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from curvlab.cli import main
from curvlab.docs import costs, figures
from curvlab.problems import MODELS, model, synthetic_images
from curvlab.problems import registry as problems_registry
from curvlab.problems.experiments import build, start
from curvlab.problems.paper import FIGURES, PAPER
from curvlab.problems.paper.marks import ESSENTIAL, PROTOCOL, is_ours
from curvlab.problems.presets import PRESETS, Experiment, vary
from curvlab.problems.studies import STUDIES, preset, studies, study
from curvlab.sweep import Sweep
from curvlab.sweep.plan import points

SHAPES = {
    "cifar10": ((3, 32, 32), 10), "cifar100": ((3, 32, 32), 100), "svhn": ((3, 32, 32), 10), "stl10": ((3, 96, 96), 10),
    "fashion_mnist": ((1, 28, 28), 10), "tiny_imagenet": ((3, 64, 64), 200),
}  # fmt: skip
DRAWN = [figure for figures_of in FIGURES.values() for figure in figures_of]


# Settings and their sources


@pytest.mark.parametrize("name", PAPER)
def test_every_setting_has_a_source(name):
    asked = PAPER[name]
    fields = {field.name: field.default for field in dataclasses.fields(Experiment)}
    by_rows = set.intersection(*({n.partition(".")[0] for n in row.sources} for row in asked.rows.values()))
    changed = {n for n, default in fields.items() if getattr(asked.base, n) != default}
    assert {*ESSENTIAL, *changed, "steps"} - {*asked.sources, *by_rows} <= {"steps" if asked.base.num_epochs else ""}
    assert set(asked.sources) <= {*fields, *PROTOCOL}
    for row in asked.rows.values():
        assert {*row.change, *row.tune, *row.grid} == set(row.sources)
    sources = [*asked.sources.values(), *(s for row in asked.rows.values() for s in row.sources.values())]
    assert all(s.startswith(("ours", "sec. ", "fig. ", "table ", "appendix ")) for s in sources)
    assert len({is_ours(s) for s in sources}) == 2


STATED = [  # study, row, what the papers' texts say
    ("edge-of-stability", "", {"data": "cifar10-8k", "model": "cnn6", "lr": 0.02, "batch_size": (0,), "weight_decay": 0.0}),
    ("valleys", "", {"lr": 0.04, "batch_size": (0,)}),
    ("sgd-iir", "", {"lr": 0.08, "batch_size": (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)}),
    ("scaling", "", {"num_epochs": 800, "model_options": ("batch_norm=true",), "augment": "none"}),
    ("smith-rates", "penalties", {"lr": 0.001953125, "num_epochs": 6400, "batch_size": (32,), "weight_decay": 5e-4,
                                  "model": "wrn_10_1", "augment": "crop_flip", "schedule": "constant", "momentum": 0.0}),
    ("smith-rates", "penalized-rates", {"penalty": ("implicit_regularizer=0.015625",)}),
    ("smith-batch-penalties", "B=32", {"steps": 10_000_000, "num_epochs": 0, "lr": 0.001953125}),
    ("smith-n-step", "n=16", {"num_epochs": 400, "model": "wrn_16_4", "schedule": "halving", "batch_size": (32,)}),
    ("smith-rates-mlp", "rates", {"num_epochs": 400, "batch_size": (16,), "weight_decay": 0.0, "augment": "none",
                                      "model": "mlp_3x4096", "data_options": ("standardize=image",)}),
    ("smith-batch-penalties-mlp", "B=16", {"steps": 1_500_000}),
    ("smith-n-step-mlp", "n=4-updates", {"steps": 6_000_000 // 4, "method_options": ("n=4",)}),
    ("novack-regularizers", "SB", {"batch_size": (128,), "model": "resnet18", "momentum": 0.0}),
    ("novack-regularizers", "GN", {"batch_size": (5120,), "micro_batch": 128}),
    ("novack-micro-batch", "FT-2560", {"micro_batch": 2560, "data": "cifar100"}),
    ("novack-vgg", "GN-2500", {"micro_batch": 2500, "model": "vgg11", "data": "cifar10"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "values"), STATED)
def test_what_the_papers_state(name, row, values):
    asked = study(name, "paper")
    experiment = asked.experiment(row)
    assert {setting: getattr(experiment, setting) for setting in values} == values
    for setting in values:
        source = {**asked.sources, **asked.rows[row].sources}.get(setting)
        known_as_ours = (name, setting) in (("smith-n-step-mlp", "method_options"),)
        assert source is None or is_ours(source) == known_as_ours, (setting, source)


def test_the_protocol_of_smith_needs_no_option(tmp_path):
    for name in (name for name in PAPER if name.startswith("smith")):
        sweep = Sweep(study(name, "paper"), tmp_path)
        assert (sweep.seeds, sweep.keep, sweep.statistic) == (tuple(range(7)), 5, "best")
    assert (Sweep(study("control"), tmp_path).seeds, Sweep(study("control"), tmp_path).keep) == ((0, 1, 2), 0)


@pytest.mark.parametrize("name", ["smith-batch-rates", "smith-batch-penalties", "smith-batch-rates-mlp"])
def test_rows_of_batch_sizes_share_the_axis_over_the_batch_size(name, tmp_path):
    sweep = Sweep(study(name, "paper"), tmp_path, seeds=(0,), keep=0)
    ratios = {}
    for job in sweep.jobs():
        b, (axis,) = job.experiment.batch_size[0], list(dict(job.point))
        ratios.setdefault(b, []).append(float(dict(job.point)[axis]) / b)
    assert set(ratios) == {8, 16, 32, 64, 128}
    assert len({tuple(each) for each in ratios.values()}) == 1
    assert len(sweep.jobs()) == sweep.size
    assert next(iter(ratios.values()))[0] == 2.0**-14


def test_a_grid_of_the_command_replaces_the_axis_of_a_row_and_adds_to_it(tmp_path):
    asked = study("smith-n-step", "paper")
    sweep = Sweep(asked, tmp_path, rows=("n=2",), seeds=(0,), keep=0, grid={"lr": ("0.5",), "num_epochs": ("1", "2")})
    assert [(j.experiment.lr, j.experiment.num_epochs) for j in sweep.jobs()] == [(0.5, 1), (0.5, 2)]
    with pytest.raises(ValueError, match="--grid varies settings and --tune chooses them"):
        Sweep(asked, tmp_path, tuning_seeds=(9,), tune={"lr": ("0.1",)})


# Everything starts


def shrunk(experiment: Experiment, size: str = "small") -> Experiment:
    """The same experiment for one step on few examples on a CPU."""
    b = min(experiment.batch_size[0] or 8, 8)
    return dataclasses.replace(
        experiment, device="cpu", model_size=size, batch_size=(b if size == "small" else 2,), steps=1, num_epochs=0,
        validation=min(experiment.validation, 4), micro_batch=min(experiment.micro_batch, 4 if size == "small" else 2),
        lr=1e-3, external="", n=0,
    )  # fmt: skip


def first(name: str, label: str) -> Experiment:
    """A row of a study at the first point of its grid and of what it is tuned over."""
    asked = study(name, "paper")
    experiment = asked.experiment(label)
    for axes in (asked.rows[label].grid, asked.rows[label].tune):
        for setting, text in points(axes)[0].items():
            experiment = vary(experiment, setting, text)
    return experiment


def kind(experiment: Experiment) -> Experiment:
    """What experiments have in common that differ in numbers only, or in data of the same shape."""
    penalty = tuple(entry.partition("=")[0] for entry in experiment.penalty)
    data = experiment.data.partition("-")[0].replace("cifar100", "cifar10").replace("svhn", "cifar10")
    options = tuple(entry.partition("=")[0] for entry in experiment.method_options)
    return dataclasses.replace(
        experiment, penalty=penalty, data=data, diagnostics=(), method_options=options, batch_size=(), micro_batch=0
    )


ROWS = [(name, label) for name, asked in PAPER.items() for label in asked.rows]
FIRST = {kind(shrunk(first(*row))): row for row in reversed(ROWS)}.values()  # of each kind


@pytest.fixture
def images(monkeypatch):
    """Few images of the right shapes in place of the data sets, and how many were asked for."""
    asked = {}
    for name, (shape, classes) in SHAPES.items():

        def read(n=None, *, standardize="channel", name=name, shape=shape, classes=classes, **options):
            asked[name] = n
            (x, y), test = synthetic_images(
                16, n_test=4, shape=shape, num_classes=classes, seed=0, dtype=options["dtype"]
            )
            y[-1] = classes - 1  # so that the number of classes shows
            return (x, y), test

        monkeypatch.setitem(problems_registry.DATA, name, read)
    return asked


def one_step(experiment: Experiment, folder) -> None:
    if experiment.method == "external_grafting":
        plain = dataclasses.replace(experiment, method="sgd", diagnostics=("batch_gradient_norm",))
        list(start(plain, experiment.batch_size[0], run=folder).snapshots)
        experiment = dataclasses.replace(experiment, external=str(folder))
    L, *_ = build(experiment, experiment.batch_size[0])
    before = L.params()
    training = start(experiment, experiment.batch_size[0])
    (at,) = training.snapshots
    assert at.measurements
    after = at.objective.params()
    assert torch.equal(at.w, before)
    assert after.isfinite().all()
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    ("name", "label"), [pytest.param(*row, marks=() if row in FIRST else pytest.mark.slow) for row in ROWS]
)
def test_every_row_starts(name, label, images, tmp_path):
    one_step(shrunk(first(name, label)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label"), ROWS)
def test_every_row_starts_in_full_size(name, label, images, tmp_path):
    one_step(dataclasses.replace(shrunk(first(name, label), "full"), diagnostics=("loss", "test_accuracy")), tmp_path)


@pytest.fixture(scope="module")
def commands():
    """What the commands of the page run beyond the rows: other data, models and options, each kind once."""
    found = {kind(shrunk(first(name, label))): "" for name, label in ROWS}
    for figure in DRAWN:
        for experiment, _ in costs.runs(figure.command("paper")):
            found.setdefault(kind(shrunk(experiment)), experiment)
    return [experiment for experiment in found.values() if experiment]


@pytest.mark.slow
def test_what_commands_run_beyond_the_rows_starts(commands, images, tmp_path):
    plain = [e for e in commands if e.method == "sgd" and not e.penalty]
    assert {e.data for e in commands} >= {"stl10-4k", "tiny-imagenet-32k", "tiny_imagenet"}
    assert {e.model for e in commands} >= {"vgg16_bn"}
    for i, experiment in enumerate(plain):
        one_step(dataclasses.replace(shrunk(experiment), diagnostics=("loss",)), tmp_path / str(i))


@pytest.mark.slow
def test_all_that_commands_run_beyond_the_rows_starts(commands, images, tmp_path):
    for i, experiment in enumerate(commands):
        one_step(shrunk(experiment), tmp_path / str(i))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("sgd-iir", "cifar10"),
        ("smith-n-step", "cifar10"),
        ("smith-rates-mlp", "fashion_mnist"),
        pytest.param("novack-vgg", "cifar10", marks=pytest.mark.slow),
        pytest.param("novack-micro-batch", "cifar100", marks=pytest.mark.slow),
    ],
)
def test_the_models_are_built_in_full_size_for_the_data(name, data, images):
    base, (shape, classes) = study(name, "paper").base, SHAPES[data]
    L = build(shrunk(base, "full"), 2)[0]
    with torch.device("meta"):
        expected = MODELS[base.model]("full", shape=shape, num_classes=classes)
    assert L.num_params == sum(p.numel() for p in expected.parameters())


def test_subsets_are_asked_for_by_their_numbers(images):
    for data in ("cifar10-8k", "stl10-4k", "tiny-imagenet-32k"):
        build(dataclasses.replace(shrunk(preset("edge-of-stability", "paper")), data=data), 2)
    assert images == {"cifar10": 8192, "stl10": 4096, "tiny_imagenet": 32768}


# The command line


@pytest.mark.parametrize(
    "command",
    [
        "run edge-of-stability --scale paper",
        "run --scale=paper",
        "sweep smith-rates --scale paper --workers 1",
        pytest.param("sweep smith-rates-mlp --scale paper --workers 2", marks=pytest.mark.slow),
    ],
)
def test_a_missing_data_set_is_one_message(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATASETS", raising=False)
    assert main(command.split()) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "curvlab: " in line]
    file = "fashion-mnist/train-images" if "mlp" in command else "cifar-10-batches-py/data_batch_1"
    assert len(told) == 1
    assert f"expected {file}" in told[0]
    assert "Nothing is downloaded" in told[0]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run control --scale paper", "no preset 'control' at --scale paper, but at --scale small; there are edge-of"),
        ("run smith-rates-mlp", "no preset 'smith-rates-mlp' at --scale small, but at --scale paper"),
        ("run smith-rates --scale paper", "smith-rates is a study of 3 rows; run it by `curvlab sweep smith-rates`"),
    ],
)
def test_what_does_not_exist_at_a_scale_is_said(command, message, capsys):
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


def test_another_scale_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["run", "control", "--scale", "large"])
    assert "Expected one of ('small'" in " ".join(capsys.readouterr().err.split())


def test_presets_of_a_scale_in_python():
    assert preset("sgd-iir") is PRESETS["sgd-iir"]
    assert preset("sgd-iir", "paper").data == "cifar10-8k"
    assert set(studies()) == {*STUDIES, *PRESETS}
    assert {n for n, s in PAPER.items() if list(s.rows) == [""]} <= set(
        PRESETS
    )  # every preset of a paper is there small
    with pytest.raises(ValueError, match="there is no preset 'nonsense'; there are"):
        study("nonsense")


def test_list_and_explain_have_them(capsys):
    assert main(["list"]) == 0
    assert main(["explain", "sgd-iir"]) == 0
    out = capsys.readouterr().out
    assert "at --scale paper" in out
    assert "smith-n-step-mlp" in out
    shown = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "fig. 4d" in shown["lr"]
    assert "ours" in shown["steps"]


# The page of figures


def test_the_page_is_made_from_the_presets():
    assert figures.FILE.read_text() == figures.page(), "run python -m curvlab.docs"


def test_every_study_draws_a_figure_and_every_command_is_on_the_page():
    assert {figure.name for figure in DRAWN} == set(PAPER)
    text = figures.FILE.read_text()
    for figure in DRAWN:
        assert f"`{figure.command('paper')}`" in text
        assert f"`{figure.command('small')}`" in text


@pytest.mark.parametrize("figure", DRAWN, ids=lambda f: f.number)
def test_small_commands_are_understood(figure):
    _, base, labels = costs.asked(figure.command("small"))
    assert labels
    assert base.device == "cpu"


def test_options_of_the_command_are_in_the_settings():
    (line,) = [figures._line(f) for f in DRAWN if f.number == "fig. 4a" and f.name == "edge-of-stability"]
    assert "lr 0.01" in line[3]
    assert "steps 1000†" in line[3]


# Costs


@pytest.mark.parametrize("name", costs.FORWARD)
def test_operations_are_those_that_torch_counts(name):
    shape = (1, 28, 28) if name.startswith("mlp") else (3, 32, 32)
    with torch.device("meta"):
        network = model(name, shape=shape)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(2, *shape))
    assert counter.get_total_flops() / 2 == pytest.approx(costs.FORWARD[name], rel=1e-3)


def test_an_estimate_is_its_formula():
    e = dataclasses.replace(study("smith-n-step", "paper").experiment("n=4"), num_epochs=2)
    updates = 2 * (50_000 // 32) * 4
    assert costs.seconds(e) == max(updates * 32 * 3 * 785.22e6 / 20e12, updates / 200)
    gd = dataclasses.replace(preset("edge-of-stability", "paper"), steps=10, every=5)
    one = 8192 * 3 * 105.58e6 / 20e12
    assert costs.seconds(gd) == pytest.approx(10 * one + 2 * 40 * one)
    few = costs.estimate("curvlab sweep novack-regularizers --scale paper --rows SB LB --tuning-seeds 100,101")
    assert few.startswith("22 runs")  # two tuning seeds at four rates, and three of the table, for two rows
