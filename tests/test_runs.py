"""Measurements, runs and the trainer.

Compared with a reference: intervals with scipy's quantiles, training with a loop of torch alone. The rest is behaviour:
what is refused, what survives a kill, what a record says.
"""

from __future__ import annotations

import copy
import doctest
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab as cl
from curvlab import measurement, runs
from curvlab.measurement import Measurement
from curvlab.runs import Run

ROOT = Path(cl.__file__).parent.parent


# Measurement


def test_an_interval_is_the_error_times_its_quantile_and_the_rounding():
    sem = Measurement(3.0, 0.5, "sem", df=7, floor=0.01)
    for level in (0.5, 0.95, 0.999):
        half = 0.5 * scipy.stats.t.ppf((1 + level) / 2, 7) + 0.01
        assert sem.interval(level) == pytest.approx((3 - half, 3 + half))
    normal = Measurement(3.0, 0.5, "sem")
    assert normal.interval()[1] == pytest.approx(3 + 0.5 * scipy.stats.norm.ppf(0.975))
    bound = Measurement(3.0, 0.5, "bound", floor=0.01)
    assert bound.interval(0.1) == bound.interval(0.999) == pytest.approx((2.49, 3.51))
    assert Measurement(3.0, floor=0.01).interval() == pytest.approx((2.99, 3.01))


def test_an_interval_of_an_array_goes_entry_by_entry():
    axis = ("batch_size", (1, 2))
    m = Measurement(np.array([1.0, 2.0]), np.array([0.1, 0.0]), "sem", np.array([3.0, math.inf]), np.array([0.0, 0.2]))
    low, high = Measurement(m.value, m.error, "sem", m.df, m.floor, axis=axis).interval()
    assert high[0] == pytest.approx(1 + 0.1 * scipy.stats.t.ppf(0.975, 3))
    assert (low[1], high[1]) == pytest.approx((1.8, 2.2))


@pytest.mark.parametrize("level", [0, 1, 95, -0.5])
def test_interval_refuses_a_level_that_is_no_probability(level):
    with pytest.raises(ValueError, match=rf"level is {level}; expected a probability between 0 and 1, such as 0.95"):
        Measurement(1.0).interval(level)


def test_nothing_can_be_done_with_a_value_that_does_not_exist():
    m = measurement.missing("the gradient is zero")
    assert str(m) == "no value (the gradient is zero)"
    with pytest.raises(ValueError, match=r"there is no value and so no interval: the gradient is zero"):
        m.interval()
    with pytest.raises(ValueError, match=r"there is no value to scale: the gradient is zero"):
        m.scaled(2.0)


def test_selecting_from_a_named_axis():
    axis = ("batch_size", (1, 8, 32))
    m = Measurement(np.arange(3.0), np.ones(3), "sem", np.full(3, 7.0), 0.5, matvecs=4, axis=axis)
    one = m.select(batch_size=8)
    assert (one.value, one.error, one.df, one.floor, one.matvecs, one.axis) == (1.0, 1.0, 7.0, 0.5, 4, None)
    with pytest.raises(KeyError, match=r"batch_size=9 is not there: the axis is batch_size = \[1, 8, 32\]"):
        m.select(batch_size=9)
    with pytest.raises(KeyError, match=r"index=1 is not there: the axis is batch_size"):
        m.select(index=1)
    with pytest.raises(KeyError, match=r"batch_size=1, index=2 is not there"):
        m.select(batch_size=1, index=2)
    with pytest.raises(KeyError, match=r"batch_size=8 is not there: the value is a single number"):
        one.select(batch_size=8)


def test_scaling_scales_the_error_and_the_rounding():
    m = Measurement(2.0, 0.5, "sem", df=3, floor=0.1, matvecs=7).scaled(-2.0, plus=1.0, floor=0.01)
    assert (m.value, m.error, m.kind, m.df, m.matvecs) == (-3.0, 1.0, "sem", 3, 7)
    assert m.floor == pytest.approx(0.21)


@pytest.mark.parametrize(
    "m, text",
    [
        (Measurement(0.123456), "0.1235"),
        (Measurement(12.3456, 0.0789, "bound"), "12.35 ± 0.08"),
    ],
)
def test_a_measurement_prints_what_is_known(m, text):
    assert str(m) == text


def test_a_curve_prints_its_entries():
    text = str(Measurement(np.array([1.0, 2.5]), np.zeros(2), axis=("batch_size", (4, 32))))
    assert "1" in text
    assert "2.5" in text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null_with_a_note(bad):
    single = Measurement(bad, bad, "sem", df=bad).to_dict()
    assert (single["value"], single["error"], single["df"], single["note"]) == (None, None, None, "not finite")
    curve = Measurement(np.array([1.0, bad]), np.zeros(2), axis=("batch_size", (1, 2))).to_dict()
    assert (curve["value"], curve["note"]) == ([1.0, None], "not finite")
    json.dumps([single, curve], allow_nan=False)


# Run: the folder


def record(step: int, **values) -> dict:
    measurements = {name: m.to_dict() if isinstance(m, Measurement) else m for name, m in values.items()}
    return {"step": step, "lr": 0.1, "measurements": measurements}


def log_of(path: Path) -> Path:
    return path / runs.LOG


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path / "run", {"name": "a test"})


def test_create_never_overwrites(tmp_path):
    first = Run.create(tmp_path / "a", {"number": 1})
    first.append(record(0, loss=Measurement(1.0)))
    before = {file.name: file.read_bytes() for file in first.path.iterdir()}
    with pytest.raises(FileExistsError, match=r"a already holds a run, which is never overwritten; choose another"):
        Run.create(tmp_path / "a", {"number": 2})
    assert {file.name: file.read_bytes() for file in first.path.iterdir()} == before


def test_create_makes_the_folders_and_tolerates_other_files(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "notes.txt").write_text("mine")
    made = Run.create(tmp_path / "deep" / "er", {})
    assert made.records == []
    assert made.names == []
    assert (made.path / "notes.txt").read_text() == "mine"
    assert Run.create(tmp_path / "deep" / "other" / "still", {}).path.is_dir()


def test_a_run_states_where_it_came_from(run):
    again = Run(run.path)
    assert again.config["name"] == "a test"
    where = again.config["provenance"]
    assert where["command"] == sys.argv
    assert where["versions"]["torch"] == torch.__version__
    assert set(where["versions"]) == {"curvlab", "torch", "numpy", "scipy", "python"}
    assert "commit" in where
    assert where["platform"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", where["started"])


def test_opening_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run: config.json is missing. Runs are made by train\(run="):
        Run(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"torn": ')
    with pytest.raises(ValueError, match=r"config.json is not readable JSON .* restore it or run again"):
        Run(tmp_path)


def test_only_the_creator_can_write(run):
    with pytest.raises(RuntimeError, match=r"was opened for reading; only the run that Run.create made can be written"):
        Run(run.path).append(record(0))
    run.close()
    run.close()
    with pytest.raises(RuntimeError, match="was opened for reading"):
        run.append(record(0))


def test_every_record_is_there_at_once(run):
    reader = Run(run.path)
    for step in range(5):
        run.append(record(step, loss=Measurement(float(step))))
        assert [r["step"] for r in Run(run.path).records] == list(range(step + 1))
        assert reader.series("loss").steps.tolist() == run.series("loss").steps.tolist() == list(range(step + 1))


def in_another_process(code: str, *arguments: object, **options) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, text=True, **options)


def test_another_process_reads_along(run):
    for step in range(3):
        run.append(record(step, loss=Measurement(step / 2)))
    code = """
        import sys
        from curvlab.runs import Run
        series = Run(sys.argv[1]).series("loss")
        print(series.steps.tolist(), series.values.tolist())
    """
    out, _ = in_another_process(code, run.path, stdout=subprocess.PIPE).communicate(timeout=60)
    assert out.split("\n")[0] == "[0, 1, 2] [0.0, 0.5, 1.0]"


# Run: series


def test_series_of_numbers(run):
    run.append(record(0, a=Measurement(1.0, 0.5, "sem", df=4, floor=0.1), b=Measurement(7.0)))
    run.append(record(3, b=Measurement(8.0)))
    run.append(record(6, a=Measurement(2.0, 0.25, "bound"), b=Measurement(9.0)))
    assert run.names == ["a", "b"]
    a = run.series("a")
    assert len(a) == 2
    assert a.steps.tolist() == [0, 6]
    assert a.values.tolist() == [1.0, 2.0]
    assert a.errors.tolist() == [0.5, 0.25]
    assert a.kinds.tolist() == ["sem", "bound"]
    assert a.floors.tolist() == [0.1, 0.0]
    assert a.df.tolist() == [4, math.inf]
    low, high = a.interval()
    first, second = Measurement(1.0, 0.5, "sem", df=4, floor=0.1).interval(), Measurement(2.0, 0.25, "bound").interval()
    assert np.allclose([low, high], np.array([first, second]).T)
    steps, lr = run.column("lr")
    assert steps.tolist() == [0, 3, 6]
    assert lr.tolist() == [0.1] * 3
    assert run.column("nothing")[0].size == 0


def test_series_where_there_is_no_value(run):
    run.append(record(0, a=Measurement(1.0)))
    run.append(record(1, a=measurement.missing("diverged")))
    run.append(record(2, a=Measurement(math.nan)))
    a = run.series("a")
    assert np.array_equal(a.values, [1.0, math.nan, math.nan], equal_nan=True)
    assert a.notes == {1: "diverged", 2: "not finite"}
    assert "NaN" not in log_of(run.path).read_text()
    assert np.isnan(a.interval()[0]).tolist() == [False, True, True]


def test_series_of_a_named_axis(run):
    axis = ("batch_size", (1, 32))
    for step in range(3):
        value = np.array([1.0, 2.0]) + step
        run.append(record(step, s=Measurement(value, value / 10, "sem", np.array([3.0, 5.0]), 0.0, axis=axis)))
    run.append(record(3, s=measurement.missing("diverged")))
    one = run.series("s", batch_size=32)
    assert np.array_equal(one.values, [2.0, 3.0, 4.0, math.nan], equal_nan=True)
    assert one.errors[:3].tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert one.df.tolist() == [5.0, 5.0, 5.0, math.inf]
    every = run.series("s")
    assert every.values.shape == every.errors.shape == (4, 2)
    assert np.isnan(every.values[3]).all()
    low, high = every.interval()
    assert np.allclose(low[:3, 1], one.interval()[0][:3])
    assert np.allclose(high[:3, 1], one.interval()[1][:3])


def test_series_that_are_not_there(run):
    with pytest.raises(KeyError, match=r"loss was not measured in .*; there are no records yet"):
        run.series("loss")
    run.append(record(0, loss=Measurement(1.0), s=Measurement(np.ones(2), axis=("batch_size", (1, 32)))))
    with pytest.raises(KeyError, match=r"losss was not measured in .*; there are loss, s"):
        run.series("losss")
    with pytest.raises(KeyError, match=r"batch_size=8 is not there: the axis is batch_size = \[1, 32\]"):
        run.series("s", batch_size=8)
    with pytest.raises(KeyError, match=r"batch_size=8 is not there: the value is a single number"):
        run.series("loss", batch_size=8)


def test_records_take_what_numpy_and_torch_give(run):
    run.append(
        {
            "step": np.int64(3),
            "measurements": {},
            "a": np.float32(0.5),
            "b": torch.ones(2),
            "c": np.array([1.0, math.nan]),
            "d": Path("x"),
            "e": (1, None, True),
            4: math.inf,
        }
    )
    expected = {"a": 0.5, "b": [1.0, 1.0], "c": [1.0, None], "d": "x", "e": [1, None, True], "4": None}
    assert run.records[0] == {"step": 3, "measurements": {}} | expected


# Run: tensors


def test_saved_tensors_come_back(run):
    saved = {"w": torch.randn(5), "step": 3, "nested": {"list": [1.5, None, "x"], "v": torch.arange(3)}}
    file = run.save("state", saved)
    assert file == run.path / "state.pt"
    again = Run(run.path).load("state")
    assert torch.equal(again["w"], saved["w"])
    assert torch.equal(again["nested"]["v"], saved["nested"]["v"])
    assert again["nested"]["list"] == [1.5, None, "x"]
    run.save("state", {"step": 4})
    assert run.load("state") == {"step": 4}
    assert not list(run.path.glob("*.tmp"))


def test_a_file_that_was_not_saved(run):
    with pytest.raises(FileNotFoundError, match=r"final.pt does not exist; a run saves its final parameters when it"):
        run.load("final")


# train


class Setup:
    """A small problem; the same one each time it is made."""

    def __init__(self, *, weights: Tensor | None = None, dropout: bool = False, **options) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(24, 4, generator=draw), torch.randint(3, (24,), generator=draw)
        self.model = cl.problems.mlp((4, 6, 3), seed=1)
        if dropout:
            self.model.insert(2, nn.Dropout(0.5))
        self.L = cl.Objective(self.model, "cross_entropy", (self.x, self.y), weights=weights)
        self.sgd = torch.optim.SGD(self.model.parameters(), **({"lr": 0.2} | options))

    def train(self, batches=None, **options):
        batches = cl.Batches(24, 6, steps=8) if batches is None else batches
        return cl.train(self.L, self.sgd, batches, **options)


def by_torch(setup: Setup, batches, loss=None) -> Tensor:
    """The same training by a loop of torch alone, on a copy of the model; returns the parameters."""
    model = copy.deepcopy(setup.model)
    sgd = torch.optim.SGD(model.parameters(), **{k: v for k, v in setup.sgd.defaults.items() if k != "params"})
    for index in batches:
        sgd.zero_grad()
        losses = nn.functional.cross_entropy(model(setup.x[index]), setup.y[index], reduction="none")
        (losses.mean() if loss is None else loss(losses, index)).backward()
        sgd.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1, "nesterov": True, "momentum": 0.5}])
def test_training_is_that_of_torch(options):
    setup = Setup(**options)
    expected = by_torch(setup, cl.Batches(24, 6, steps=8))
    assert [at.step for at in setup.train(diagnostics=["loss"])] == list(range(8))
    assert torch.allclose(setup.L.params(), expected, rtol=1e-6, atol=1e-7)


ALL = ["loss", "sharpness", "instability", "gradient_variance", "expected_loss_difference", "train_accuracy"]


@pytest.mark.parametrize("dropout", [False, True])
def test_measuring_changes_no_bit_of_the_training(dropout):
    def trained(**options) -> tuple[Tensor, Tensor]:
        setup = Setup(dropout=dropout, momentum=0.9)
        torch.manual_seed(7)
        for _ in setup.train(**options):
            pass
        return setup.L.params(), torch.get_rng_state()

    plain, state = trained()
    for options in ({"diagnostics": ALL}, {"diagnostics": ALL, "every": 3}, {"diagnostics": ALL, "seed": 5}):
        measured, state_after = trained(**options)
        assert torch.equal(measured, plain)
        assert torch.equal(state_after, state)


def test_a_snapshot_is_the_point_before_its_step():
    setup = Setup()
    expected = setup.L.params()
    for at, index in zip(setup.train(), cl.Batches(24, 6, steps=8), strict=True):
        assert torch.equal(at.w, setup.L.params())
        assert torch.allclose(at.w, expected, atol=1e-7)
        assert torch.allclose(at.batch_gradient, setup.L.gradient(at.w, index), atol=1e-6)
        assert (at.lr, at.batch_size, at.optimizer["name"]) == (0.2, 6, "SGD")
        expected = at.w - at.lr * at.batch_gradient
    assert torch.allclose(setup.L.params(), expected, atol=1e-7)


def test_train_writes_where_it_came_from(tmp_path):
    setup = Setup(momentum=0.9)
    requests = ["loss", ("hessian_eigenvalues", {"k": 2})]
    config = {"preset": "mine", "problem": {"seed": 4}}
    for _ in setup.train(diagnostics=requests, run=tmp_path / "a", seed=11, every=2, config=config):
        pass
    run = Run(tmp_path / "a")
    assert run.config["preset"] == "mine"
    assert run.config["problem"] == {"seed": 4}
    told = run.config["training"]
    assert told["objective"]["loss"] == "cross_entropy"
    assert told["objective"]["examples"] == 24
    assert told["objective"]["parameters"] == 51
    assert told["objective"]["dtype"] == "torch.float32"
    assert told["objective"]["mode"] == "eval"
    assert told["optimizer"]["name"] == "SGD"
    assert told["optimizer"]["momentum"] == 0.9
    assert (told["lr"], told["batch_size"], told["every"], told["probe_seed"]) == (0.2, 6, 2, 11)
    assert told["diagnostics"] == [["loss", {}], ["hessian_eigenvalues", {"k": 2}]]
    assert told["threads"] == torch.get_num_threads()
    assert run.config["provenance"]["command"] == sys.argv
    assert run.series("hessian_eigenvalues", index=2).values.shape == (4,)
    assert run.series("loss").steps.tolist() == [0, 2, 4, 6]
    assert all({"step", "lr", "batch_size", "batch_loss", "matvecs", "seconds"} <= set(r) for r in run.records)


@pytest.mark.parametrize("every, expected", [(1, 8), (3, 3), (8, 1), (100, 1)])
def test_every(tmp_path, every, expected):
    setup = Setup()
    seen = [bool(at.measurements) for at in setup.train(diagnostics=["loss"], every=every, run=tmp_path / "a")]
    assert seen == [step % every == 0 for step in range(8)]
    assert len(Run(tmp_path / "a").records) == expected


@pytest.mark.parametrize("every", [0, -1])
def test_every_must_be_positive(every):
    with pytest.raises(ValueError, match=rf"every is {every}; expected a whole number of steps from 1"):
        Setup().train(every=every)


def test_train_refuses_what_cannot_be_trained():
    setup = Setup()
    with pytest.raises(ValueError, match=r"micro_batch_size is 0; expected at least 1 example, or None for the whole"):
        setup.train(micro_batch_size=0)
    with pytest.raises(ValueError, match=r"the batches index 25 examples, but the objective has 24: pass Batches\(L"):
        setup.train(cl.Batches(25, 5, steps=1))
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the optimizer holds none of the trainable parameters of the objective's"):
        cl.train(setup.L, other, cl.Batches(24, 6, steps=1))


def test_refusals_come_before_a_folder_is_made(tmp_path):
    setup = Setup()
    for options, message in [
        ({"diagnostics": ["sharpnes"]}, "there is no diagnostic 'sharpnes'"),
        ({"diagnostics": ["test_loss"]}, "test_loss needs test: pass test=Objective"),
        ({"diagnostics": ["instability"], "batches": [torch.arange(3)]}, "instability needs batch_size"),
        ({"every": 0}, "every is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            setup.train(run=tmp_path / "a", **options)
        assert not (tmp_path / "a").exists()
    Run.create(tmp_path / "b", {})
    with pytest.raises(FileExistsError, match="already holds a run, which is never overwritten"):
        setup.train(run=tmp_path / "b")


def final(path: Path) -> dict:
    return Run(path).load("final")


def test_the_final_parameters_are_those_of_the_model(tmp_path):
    setup = Setup()
    for _ in setup.train(run=tmp_path / "a", diagnostics=["loss"]):
        pass
    assert torch.equal(final(tmp_path / "a")["params"], setup.L.params())
    assert final(tmp_path / "a")["step"] == 8


def test_the_final_parameters_after_break(tmp_path):
    setup = Setup()
    for at in setup.train(run=tmp_path / "a", diagnostics=["loss"]):
        if at.step == 3:
            break
    assert torch.equal(final(tmp_path / "a")["params"], setup.L.params())
    assert torch.equal(setup.L.params(), at.w)  # the step of the last snapshot is not taken
    assert final(tmp_path / "a")["step"] == 3
    assert Run(tmp_path / "a").series("loss").steps.tolist() == [0, 1, 2, 3]


def test_the_final_parameters_after_an_exception_in_the_loop(tmp_path):
    setup = Setup()

    def fails_at_step_2() -> None:
        for at in setup.train(run=tmp_path / "a", diagnostics=["loss"]):
            1 / (at.step - 2)

    with pytest.raises(ZeroDivisionError):
        fails_at_step_2()
    assert torch.equal(final(tmp_path / "a")["params"], setup.L.params())
    assert final(tmp_path / "a")["step"] == 2
    assert Run(tmp_path / "a").series("loss").steps.tolist() == [0, 1, 2]


def test_the_final_parameters_after_an_exception_in_the_data(tmp_path):
    def batches():
        yield torch.arange(4)
        yield torch.arange(4)
        raise OSError("the disk is gone")

    setup = Setup()
    with pytest.raises(OSError, match="the disk is gone"):
        list(setup.train(batches(), run=tmp_path / "a", diagnostics=["loss"]))
    assert torch.equal(final(tmp_path / "a")["params"], setup.L.params())


@pytest.mark.parametrize("lr", [1e4, 1e30])
def test_a_diverging_run_ends_by_itself_and_can_be_read(tmp_path, lr):
    setup = Setup(lr=lr)
    setup.L = cl.Objective(setup.model, "squared_error", (setup.x, setup.y))
    names = [name for name in ALL if name != "train_accuracy"]
    steps = [
        at.step for at in setup.train(cl.Batches(24, 6, steps=200), run=tmp_path / "a", diagnostics=names, test=setup.L)
    ]
    assert len(steps) < 200
    run = Run(tmp_path / "a")
    for name in names:
        series = run.series(name)
        assert series.steps.tolist() == steps
        assert np.isfinite(series.values[0]) or name == "expected_loss_difference"  # which takes such a step
        assert np.isnan(series.values[-1])
        assert series.notes[steps[-1]]
    assert run.records[-1]["batch_loss"] is None
    assert torch.equal(final(tmp_path / "a")["params"].isnan(), setup.L.params().isnan())
    assert "NaN" not in log_of(run.path).read_text()
    assert "Infinity" not in log_of(run.path).read_text()


@pytest.mark.parametrize("micro", [1, 2, 4, 5, 6, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_give_the_same_training(micro, weighted):
    weights = torch.linspace(0, 2, 24) if weighted else None
    whole, parts = Setup(weights=weights), Setup(weights=weights)
    for a, b in zip(whole.train(), parts.train(micro_batch_size=micro), strict=True):
        assert torch.allclose(a.batch_gradient, b.batch_gradient, rtol=1e-4, atol=1e-6)
    assert torch.allclose(whole.L.params(), parts.L.params(), rtol=1e-4, atol=1e-6)


def test_batches_of_foreign_data(tmp_path):
    """Augmented batches train the model; what is measured stays the fixed data of the objective."""
    setup = Setup()
    foreign = TensorDataset(setup.x[:12] + 0.1, setup.y[:12])
    loader = DataLoader(foreign, batch_size=4)
    expected = []
    for at in setup.train(loader, diagnostics=["loss", "instability"], run=tmp_path / "a"):
        assert at.batch_size == 4
        x, y = foreign[4 * at.step : 4 * at.step + 4]
        expected.append(float(setup.L.value(at.w)))
        assert torch.allclose(at.batch_gradient, setup.L.gradient(at.w, (x, y)), atol=1e-6)
    run = Run(tmp_path / "a")
    assert run.series("loss").values.tolist() == expected
    assert len(run.records) == 3


def test_weights_enter_the_training():
    weights = torch.linspace(0, 2, 24)
    setup = Setup(weights=weights)
    scaled = weights / weights.mean()
    expected = by_torch(setup, cl.Batches(24, 6, steps=8), lambda losses, index: (losses * scaled[index]).mean())
    for _ in setup.train():
        pass
    assert torch.allclose(setup.L.params(), expected, rtol=1e-5, atol=1e-6)


def test_weights_of_foreign_batches_are_unknown():
    setup = Setup(weights=1.0 + torch.arange(24))
    with pytest.raises(ValueError, match=r"the examples are weighted and the weights of a foreign batch are unknown"):
        list(setup.train([(setup.x[:4], setup.y[:4])]))


def test_a_run_repeats_bit_by_bit(tmp_path):
    for name in ("a", "b"):
        for _ in Setup().train(run=tmp_path / name, diagnostics=ALL):
            pass
    one, two = Run(tmp_path / "a"), Run(tmp_path / "b")
    for name in ALL:
        assert np.array_equal(one.series(name).values, two.series(name).values)
        assert np.array_equal(one.series(name).errors, two.series(name).errors)
    assert torch.equal(one.load("final")["params"], two.load("final")["params"])


def test_training_that_is_killed_can_be_read(tmp_path):
    code = """
        import sys, torch, curvlab as cl
        model = cl.problems.mlp((4, 6, 3))
        x, y = torch.randn(24, 4), torch.randint(3, (24,))
        L = cl.Objective(model, "cross_entropy", (x, y))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for at in cl.train(L, sgd, cl.Batches(24, 6, 10**6), diagnostics=["loss"], run=sys.argv[1]):
            pass
    """
    path = tmp_path / "killed"
    child = in_another_process(code, path)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log_of(path).exists() and log_of(path).stat().st_size > 5000):
        time.sleep(0.05)
    child.kill()
    child.wait()
    steps = Run(path).series("loss").steps
    assert len(steps) > 5
    assert steps.tolist() == list(range(len(steps)))
    with pytest.raises(FileNotFoundError, match=r"final\.pt does not exist"):
        Run(path).load("final")


@pytest.mark.parametrize("module", [measurement, runs, sys.modules[cl.train.__module__]])
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0
