"""Experiments as objects. Against references: schedules, splits, penalties and methods as their formulas and classes say.
Behavioural: names, mistakes, and what older runs mean."""

import dataclasses
import inspect
import math

import pytest
import torch

import curvlab as cl
from curvlab import Run
from curvlab.methods import METHODS
from curvlab.problems import digits, vary
from curvlab.problems.experiments import OPTIMIZERS, build, final_point, make_problem, make_scheduler, start
from curvlab.problems.presets import Experiment, from_config, parse_penalties

SMALL = Experiment(n=32, hidden=(4,), steps=8, diagnostics=("loss",), dtype="float64")


def trained(experiment, b=0, **options):
    training = start(experiment, b, **options)
    points = [at.w for at in training.snapshots]
    return torch.stack(points)


def test_what_is_set_aside_is_never_trained_on():
    experiment = dataclasses.replace(SMALL, validation=12, label_noise=0.25)
    problem = make_problem(experiment)
    (x, y), test = digits(32, label_noise=0.25, dtype=torch.float64)
    w = problem.objective.params()
    for objective, (inputs, targets) in zip(problem, [(x[:20], y[:20]), test, (x[20:], y[20:])], strict=True):
        alone = cl.Objective(problem.objective.model, "squared_error", (inputs, targets))
        assert objective.size == len(inputs)
        assert float(objective.value(w)) == float(alone.value(w))
    batches = start(dataclasses.replace(experiment, steps=50), 5).batches
    assert max(int(batch.max()) for batch in batches) < 20
    assert make_problem(SMALL).validation is None


def test_schedules_are_their_formulas():
    def rates(schedule):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
        scheduler = make_scheduler(dataclasses.replace(SMALL, schedule=schedule), optimizer, 100)
        found = []
        for _ in range(100):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    assert rates("cosine") == pytest.approx([0.4 * (1 + math.cos(math.pi * k / 100)) for k in range(100)])
    halved = [0.8] * 50 + [0.8 / 2**tenth for tenth in range(1, 6) for _ in range(10)]
    assert rates("halving") == pytest.approx(halved)
    assert make_scheduler(SMALL, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), 100) is None


def test_the_schedule_is_in_the_log(tmp_path):
    trained(dataclasses.replace(SMALL, schedule="halving", steps=10), run=tmp_path)
    assert Run(tmp_path).column("lr")[1].tolist() == [0.2] * 5 + [0.2 / 2**k for k in range(1, 6)]


def test_penalties_are_added_to_what_is_trained():
    experiment = dataclasses.replace(
        SMALL, penalty=("gradient_norm=0.05", "gradient_norm_difference=0.1:h=0.001"), micro_batch=8
    )
    L, _, optimizer, batches = build(experiment)
    given = [(0.05, "gradient_norm"), (0.1, ("gradient_norm_difference", {"h": 0.001}))]
    by_hand = [at.w for at in cl.train(L, optimizer, batches, penalties=given, micro_batch_size=8)]
    assert torch.equal(trained(experiment), torch.stack(by_hand))
    assert not torch.equal(trained(experiment), trained(SMALL))
    assert parse_penalties(()) == []


@pytest.mark.parametrize("name", [*OPTIMIZERS, *METHODS])
def test_every_method_has_a_name(name, tmp_path):
    options = {
        "anti_pgd": ("sigma=0.01", "seed=5"),
        "n_step_sgd": ("n=2",),
        "noisy_gd": ("batch_size=4",),
        "sde": ("batch_size=4",),
    }
    external = ""
    if name == "external_grafting":
        trained(dataclasses.replace(SMALL, diagnostics=("batch_gradient_norm",)), 4, run=tmp_path)
        external = str(tmp_path)
    experiment = dataclasses.replace(
        SMALL, method=name, method_options=options.get(name, ()), micro_batch=8, external=external, lr=0.01, data_seed=3
    )
    optimizer = build(experiment)[2]
    kind = METHODS.get(name) or getattr(torch.optim, OPTIMIZERS[name])
    assert type(optimizer) is kind
    if "seed" in inspect.signature(kind).parameters:
        assert optimizer.param_groups[0]["seed"] == (5 if name == "anti_pgd" else 3)
    path = trained(experiment)
    assert len(path) == 8
    assert path.isfinite().all()
    assert not torch.equal(path[0], path[-1])


def test_weight_decay_and_momentum_reach_the_optimizer():
    group = build(dataclasses.replace(SMALL, momentum=0.9, weight_decay=5e-4))[2].param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
    assert build(dataclasses.replace(SMALL, method="adamw"))[2].param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("model", "data", "loss"),
    [
        ("mlp", "synthetic_images-16", "cross_entropy"),
        ("resnet18", "synthetic_images-16", "cross_entropy"),
        ("vgg11", "digits-16", "cross_entropy"),
        ("cnn", "digits", "squared_error"),
        ("diagonal_linear", "sparse_regression-10", "squared_error"),
        ("diagonal_linear", "sparse_classification-10", "squared_error"),
        ("gpt", "markov_chain-16", "token"),
    ],
)
def test_models_and_data_go_by_their_names(model, data, loss):
    shape = ("num_classes=3",) if data.startswith("synthetic") else ()
    experiment = Experiment(
        model=model, model_size="small", data=data, data_options=shape, loss=loss, n=16, hidden=(4,), steps=2, lr=0.01,
        diagnostics=("loss",),
    )  # fmt: skip
    path = trained(experiment)
    assert path.isfinite().all()
    assert not torch.equal(path[0], path[1])


def test_the_number_of_examples_is_in_the_name_or_beside_it():
    sizes = {
        name: make_problem(dataclasses.replace(SMALL, data=name)).objective.size for name in ("digits", "digits-20")
    }
    assert sizes == {"digits": 32, "digits-20": 20}
    assert make_problem(dataclasses.replace(SMALL, n=0)).objective.size == 1024


def test_a_budget_may_be_in_epochs(tmp_path):
    experiment = dataclasses.replace(SMALL, num_epochs=3, schedule="cosine")
    assert [start(experiment, b).batches.steps for b in (4, 5, 0)] == [24, 18, 3]
    path = trained(dataclasses.replace(experiment, trajectory=True), 4, run=tmp_path)
    assert len(path) == 24
    assert Run(tmp_path).column("lr")[1][12] == pytest.approx(0.1)  # half-way
    saved = Run(tmp_path).load("trajectory")
    assert saved["steps"].tolist() == list(range(24))
    assert torch.equal(saved["params"], path)


def test_a_run_ends_where_its_final_point_is(tmp_path):
    experiment = dataclasses.replace(SMALL, validation=8)
    for _ in start(experiment, 4, run=tmp_path).snapshots:
        pass
    end = final_point(tmp_path)
    assert (end.experiment, end.batch_size, end.step) == (experiment, 4, 8)
    assert torch.equal(end.w, Run(tmp_path).load("final")["params"])
    assert end.problem.validation.size == 8


def test_runs_of_older_versions_have_todays_defaults():
    old = dataclasses.asdict(SMALL)
    del old["penalty"], old["schedule"]
    assert from_config({"experiment": old, "run_batch_size": 4}) == (SMALL, 4)
    with pytest.raises(ValueError, match=r"differs in the settings \['colour'\]"):
        from_config({"experiment": old | {"colour": "red"}})
    with pytest.raises(ValueError, match="does not state an experiment"):
        from_config({})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-3", 1e-3),
        ("steps", "7", 7),
        ("batch_size", "8", (8,)),
        ("hidden", "", ()),
        ("epochs", "true", True),
        ("loss", "cross_entropy", "cross_entropy"),
        ("penalty", "fisher_trace=0.1+unit_jacobian=1", ("fisher_trace=0.1", "unit_jacobian=1")),
    ],
)
def test_a_setting_is_varied_by_text(name, text, value):
    assert getattr(vary(SMALL, name, text), name) == value


def test_one_option_is_varied_without_the_others():
    several = dataclasses.replace(SMALL, penalty=("a=1", "b=2"), method_options=("sigma=1",))
    assert vary(several, "penalty.a", "3").penalty == ("b=2", "a=3")
    assert vary(several, "method.seed", "3").method_options == ("sigma=1", "seed=3")
    assert vary(several, "data.difficulty", "3").data_options == ("difficulty=3",)


MISTAKES = {
    "method": ({"method": "adagrad"}, "there is no method 'adagrad'; there are sgd, adam"),
    "method_option": ({"method_options": ("colour=1",)}, "method sgd: .*colour"),
    "own_option": ({"method": "anti_pgd"}, "method anti_pgd: .*sigma"),
    "option": ({"method_options": ("sigma",)}, "an option of the method is 'sigma'; expected name=value"),
    "momentum": ({"method": "normalized_gd", "momentum": 0.9}, "momentum is 0.9, but method normalized_gd has none"),
    "decay": ({"method": "anti_pgd", "weight_decay": 0.1}, "weight_decay is 0.1, but method anti_pgd has none"),
    "micro": ({"method": "iterative_grafting"}, "give their size by --micro-batch"),
    "no_external": ({"method": "external_grafting"}, "give --method external_grafting --external RUN"),
    "external": ({"external": "runs/x"}, "give --method external_grafting --external RUN"),
    "penalty": ({"penalty": ("gradient_norm",)}, "a penalty is 'gradient_norm'; expected name=strength"),
    "penalty_option": ({"penalty": ("gradient_norm=1:h",)}, "an option of the penalty is 'h'"),
    "penalty_name": ({"penalty": ("dropout=1",)}, "there is no regularizer 'dropout'"),
    "data": ({"data": "mnist"}, "data set is 'mnist', expected one of"),
    "data_option": ({"data_options": ("colour=1",)}, "data set digits: .*colour"),
    "label_noise": ({"data": "markov_chain", "label_noise": 0.1}, "data set markov_chain has no label_noise"),
    "center": ({"data": "sparse_regression", "center": True}, "data set sparse_regression has no center"),
    "model": ({"model": "lenet"}, "model is 'lenet', expected one of"),
    "validation": ({"validation": 32}, "validation is 32 of 32 training examples; expected 0 to 31"),
    "order": ({"order": "fixed"}, "pass epochs=True"),
    "device": ({"device": "nonsense"}, "device 'nonsense' cannot be used"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(name):
    change, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        start(dataclasses.replace(SMALL, **change))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lr", "fast", "lr is 'fast'; expected a number of type float"),
        ("epochs", "1", "epochs is '1'; expected true or false"),
        ("hidden", "a", "hidden is 'a'; expected a number of type int"),
        ("schedule", "step", "expected one of constant, cosine"),
        ("colour", "red", "there is no setting 'colour' to vary"),
    ],
)
def test_a_value_that_a_setting_cannot_have_is_refused(name, text, message):
    with pytest.raises(ValueError, match=message):
        vary(SMALL, name, text)


def test_diagnostics_take_options_and_schedules_of_their_own(tmp_path):
    experiment = dataclasses.replace(
        SMALL, diagnostics=("loss", "microbatch_gradient_norm:micro_batch_size=2:every=3", "sharpness:every=4"), every=2,
        penalty=("fisher_trace=0",), loss="cross_entropy",
    )  # fmt: skip
    points = trained(experiment, 8, run=tmp_path)
    run = Run(tmp_path)
    steps = {name: run.series(name).steps.tolist() for name in run.names}
    assert steps == {
        "loss": [0, 2, 4, 6], "fisher_trace_penalty": [0, 2, 4, 6], "microbatch_gradient_norm": [0, 3, 6],
        "sharpness": [0, 4],
    }  # fmt: skip
    L, _, _, batches = build(experiment, 8)
    batch = list(batches)[3]
    norms = [L.gradient(points[3], batch[k : k + 2]).norm() for k in range(0, 8, 2)]
    assert run.series("microbatch_gradient_norm").values[1] == pytest.approx(float(sum(norms) / 4), rel=1e-10)


def test_a_model_takes_options():
    experiment = Experiment(
        model="cnn6", model_size="small", data="synthetic_images-4", model_options=("batch_norm=true",), steps=1, lr=0.01,
        loss="cross_entropy", diagnostics=(),
    )  # fmt: skip
    layers = build(experiment)[0].model.modules()
    assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in layers) == 6
    assert vary(experiment, "model.batch_norm", "false").model_options == ("batch_norm=false",)
    with pytest.raises(ValueError, match=r"model cnn6: .*colour"):
        build(vary(experiment, "model.colour", "1"))
