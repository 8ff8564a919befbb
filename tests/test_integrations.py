"""The files in integrations/, each against the framework that it is for; what is not installed is skipped.

Compared with a reference: measured numbers, with dense float64 Hessians by double backward; logs of resumed trainings, with
those of uninterrupted ones; trained parameters, bit by bit, with training without a callback; what trackers received, with
what was measured. (The examples in their docstrings are run by test_docs.py, loops of every style by test_loops.py.)
"""

import copy
import csv
import importlib
import json
import logging
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import curvlab as cl
from curvlab import integrations

# What each file is for, and which package has to be there.
PACKAGES = {
    "accelerate": "accelerate",
    "fabric": "lightning.fabric",
    "lightning": "lightning.pytorch",
    "tensorboard": "tensorboard",
    "transformers": "transformers",
    "wandb": "wandb",
}
X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randn(24, 2, generator=torch.Generator().manual_seed(2))
NUMBERS = {"curvlab/sharpness": 1.2345678901234567, "curvlab/sharpness_error": 0.1, "curvlab/instability/32": 3.0}


def installed(name):
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    """Frameworks write where they are, and warn about small machines."""
    monkeypatch.chdir(tmp_path)
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning|torch|transformers|accelerate")
        yield


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loader(shuffle=True):
    return DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=shuffle, generator=torch.Generator().manual_seed(3))


def vector(model):
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def top_eigenvalue(model, loss):
    """Of the dense Hessian of loss(model), row by row."""
    params = list(model.parameters())
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):  # the one with a second derivative
        grads = torch.autograd.grad(loss(model), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in flat]
    return float(torch.linalg.eigvalsh(torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]))[-1])


class Keep:
    """A tracker that also keeps a float64 copy of the model at each call."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def log(self, numbers, step):
        self.rows.append((step, numbers, vector(self.model).double()))

    def check(self, model, loss, steps, points=slice(None)):
        """Steps, and at some points the sharpness: within its error and to 1e-3, that of the weights that were kept."""
        assert [step for step, *_ in self.rows] == steps
        double = copy.deepcopy(model).double().eval()
        for _, numbers, w in self.rows[points]:
            nn.utils.vector_to_parameters(w, double.parameters())
            expected, found = top_eigenvalue(double, loss), numbers["curvlab/sharpness"]
            assert abs(found - expected) <= numbers["curvlab/sharpness_error"] + 1e-6 * expected
            assert found == pytest.approx(expected, rel=1e-3)


def squares(model):
    return mse_loss(model(X.double()), Y.double())


def test_the_folder_is_the_list():
    assert set(integrations.__all__) == set(PACKAGES)
    assert all(f"`{name}`" in integrations.__doc__ for name in PACKAGES)
    assert set(PACKAGES) <= set(dir(integrations))
    with pytest.raises(AttributeError, match="integrations has no 'keras'; it has accelerate, fabric, lightning"):
        _ = integrations.keras


def test_nothing_is_imported_before_it_is_asked_for():
    code = f"import sys, curvlab.integrations; print(sorted(set({list(PACKAGES.values())}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name, package", [("lightning", "lightning"), ("transformers", "transformers")])
def test_a_missing_or_broken_package_is_named_with_the_remedy(name, package, tmp_path, monkeypatch):
    class Missing:
        def find_spec(self, module, path=None, target=None):
            if module.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {module!r}", name=package)

    loaded = [module for module in sys.modules if module.split(".")[0] in (package, f"pytorch_{package}")]
    for module in [*loaded, f"curvlab.integrations.{name}"]:
        monkeypatch.delitem(sys.modules, module, raising=False)
    with monkeypatch.context() as missing:
        missing.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
        with pytest.raises(ImportError, match=rf"^{package} is not installed: pip install 'curvlab\[{name}\]'$"):
            importlib.import_module(f"curvlab.integrations.{name}")

    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError, match=rf"^{package} does not import \(RuntimeError: operator torchvision::nms does .*torch"
    ):
        importlib.import_module(f"curvlab.integrations.{name}")


# -- Lightning --------------------------------------------------------------------------------------------------------


def module_of(pl, step=None, optimizers=1):
    class Regression(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.other = net(), nn.Linear(3, 2)
            self.automatic_optimization = optimizers == 1

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, i):
            return step(self, batch, i) if step else mse_loss(self(batch[0]), batch[1])

        def validation_step(self, batch):
            self.log("validation", mse_loss(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            rates = {self.net: 0.1} if optimizers == 1 else {self.net: 0.1, self.other: 0.2}
            return [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5) for model, lr in rates.items()]

    return Regression()


def fit(pl, module, callbacks, *, compiled=None, ckpt_path=None, validation=None, shuffle=True, **options):
    quiet = {"logger": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        **quiet | options, callbacks=callbacks, accelerator="cpu", devices=1, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module if compiled is None else compiled, loader(shuffle=shuffle), validation, ckpt_path=ckpt_path)
    return trainer


def test_lightning_with_validation_accumulation_bf16_and_a_logger(tmp_path):
    pl = installed("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from curvlab.integrations.lightning import CurvatureCallback

    with torch.inference_mode():
        data = X.clone(), Y.clone()
    trained = []
    for watch in (True, False):
        module = module_of(pl)
        keep, logger = Keep(module.net), CSVLogger(tmp_path, name=f"csv{watch}")
        curvature = CurvatureCallback(
            ["sharpness", "gradient_concentration"], loss=nn.MSELoss(), data=data, model="net", every=2,
            run=tmp_path / "run", log=keep, announce=None,
        )  # fmt: skip
        fit(
            pl, module, [curvature] * watch, max_epochs=2, accumulate_grad_batches=2, precision="bf16-mixed",
            gradient_clip_val=0.1, logger=logger, validation=loader(), num_sanity_val_steps=2,
        )  # fmt: skip
        trained.append(vector(module))
        if watch:
            assert curvature.monitor.batch_size == 4 * 2
            keep.check(net(), squares, [0, 2, 4])
            with open(f"{logger.log_dir}/metrics.csv") as file:
                rows = [row for row in csv.DictReader(file) if row["curvlab/sharpness"]]
            assert [int(row["step"]) for row in rows] == [0, 2, 4]
            assert [float(row["curvlab/sharpness"]) for row in rows] == [
                row[1]["curvlab/sharpness"] for row in keep.rows
            ]
            assert cl.Run(tmp_path / "run").series("sharpness").steps.tolist() == [0, 2, 4]
    assert torch.equal(*trained)


def test_lightning_with_two_optimizers():
    pl = installed("lightning.pytorch")
    from curvlab.integrations.lightning import CurvatureCallback

    def alternate(module, batch, i):
        first, second = module.optimizers()
        for optimizer, model, due in ((first, module.net, True), (second, module.other, i % 2 == 1)):
            if due:
                optimizer.zero_grad()
                module.manual_backward(mse_loss(model(batch[0]), batch[1]))
                optimizer.step()

    trained = []
    for watch in (True, False):
        module = module_of(pl, alternate, optimizers=2)
        keep = Keep(module.other)
        curvature = CurvatureCallback(
            ["sharpness", "batch_gradient_norm"], loss=nn.MSELoss(), data=(X, Y), model="other", optimizer=1, log=keep,
            announce=None,
        )  # fmt: skip
        trainer = fit(pl, module, [curvature] * watch, max_epochs=1)
        trained.append(vector(module))
        if watch:
            assert trainer.global_step == 6 + 3
            keep.check(module.other, squares, [0, 1, 2])
            assert {numbers["curvlab/lr"] for _, numbers, _ in keep.rows} == {0.2}
    assert torch.equal(*trained)


def test_lightning_resumes_from_a_checkpoint_as_if_uninterrupted(tmp_path):
    pl = installed("lightning.pytorch")
    from curvlab.integrations.lightning import CurvatureCallback

    def watched(run):
        module = module_of(pl)
        keep = Keep(module)
        names = ["sharpness", "interaction_sharpness"]  # tracked: they depend on what was found before
        return module, keep, CurvatureCallback(
            names, loss=nn.MSELoss(), data=(X, Y), model="net", run=run, log=keep, announce=None
        )  # fmt: skip

    module, _, whole = watched(tmp_path / "whole")
    fit(pl, module, [whole], max_epochs=2, shuffle=False)
    final = vector(module)
    assert whole.state_dict()["monitor"]["log_size"] == cl.Run(tmp_path / "whole").size  # also when saved after `fit`

    module, _, first = watched(tmp_path / "parts")
    each = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(pl, module, [first, each], max_steps=9, enable_checkpointing=True, shuffle=False)
    module, keep, second = watched(tmp_path / "parts")
    fit(pl, module, [second], max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt", shuffle=False)

    assert torch.equal(final, vector(module))
    assert [step for step, *_ in keep.rows] == list(range(6, 12))
    for name in ("sharpness", "interaction_sharpness"):
        uninterrupted, resumed = (cl.Run(tmp_path / run).series(name) for run in ("whole", "parts"))
        assert resumed.steps.tolist() == list(range(12))
        np.testing.assert_array_equal(resumed.values, uninterrupted.values)
        np.testing.assert_array_equal(resumed.errors, uninterrupted.errors)
    other = CurvatureCallback(["sharpness"], loss=nn.MSELoss(), data=(X, Y))
    assert first.state_key == second.state_key != other.state_key


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_lightning_with_a_compiled_module(backend):
    pl = installed("lightning.pytorch")
    from curvlab.integrations.lightning import CurvatureCallback

    torch.compiler.reset()
    module = module_of(pl)
    module.other = None  # the model is the module itself, and compiled
    keep = Keep(module)
    curvature = CurvatureCallback(["sharpness"], loss=nn.MSELoss(), data=(X, Y), log=keep, every=3, announce=None)
    fit(pl, module, [curvature], compiled=torch.compile(module, backend=backend), max_epochs=1)
    keep.check(net(), squares, [0, 3])


# -- Hugging Face -----------------------------------------------------------------------------------------------------

TEXT = torch.randint(7, (16, 6), generator=torch.Generator().manual_seed(4))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=7,
        n_positions=6,
        n_embd=4,
        n_inner=4,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def next_tokens(model):
    logits = model(TEXT[:8]).logits
    return cross_entropy(logits[:, :-1].reshape(-1, 7), TEXT[:8, 1:].reshape(-1))


def collate(rows):
    """As a collator with random masks does, it draws from the global generator."""
    rows = torch.stack([row["input_ids"] for row in rows])
    torch.rand(())
    return {"input_ids": rows, "labels": rows}


def huggingface(output, steps=4, data_collator=None, **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(output), per_device_train_batch_size=4, max_steps=steps, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_steps=1, save_steps=2, seed=6, learning_rate=1e-2, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    text = [{"input_ids": row, "labels": row} for row in TEXT]
    return Trainer(gpt2(), arguments, train_dataset=text, data_collator=data_collator), text[:8]


@pytest.mark.parametrize(
    "precision", [pytest.param({}, id="float32", marks=pytest.mark.slow), pytest.param({"bf16": True}, id="bfloat16")]
)
def test_transformers_with_a_language_model_and_its_own_log(precision, tmp_path):
    installed("accelerate"), installed("transformers")
    from curvlab.integrations.transformers import CurvatureCallback

    trained = []
    for watch in (True, False):
        trainer, data = huggingface(
            tmp_path / f"out{watch}", gradient_accumulation_steps=2, data_collator=collate, **precision
        )
        keep = Keep(trainer.model)
        if watch:
            curvature = CurvatureCallback(
                ["loss", "sharpness", "instability"], loss="next_token", data=data, log=[trainer, keep], announce=None,
                run=tmp_path / "run", every={"instability": 2},
            )  # fmt: skip
            trainer.add_callback(curvature)
        trainer.train()
        trained.append(vector(trainer.model))
        if watch:
            assert curvature.monitor.batch_size == 4 * 2
            keep.check(gpt2(), next_tokens, [0, 1, 2, 3], points=slice(0, None, 3))
            assert not any("epoch" in numbers for _, numbers, _ in keep.rows)  # which the Trainer adds to its own
            own = [entry for entry in trainer.state.log_history if "curvlab/sharpness" in entry]
            assert [(entry["step"], entry["curvlab/sharpness"]) for entry in own] == [
                (step, numbers["curvlab/sharpness"]) for step, numbers, _ in keep.rows
            ]
            assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]
            run = cl.Run(tmp_path / "run")
            assert run.series("instability").steps.tolist() == [0, 2]
            assert run.config["training"]["optimizer"]["name"] == "AdamW"
            _, thresholds = run.column("threshold")
            np.testing.assert_allclose(thresholds, 38 / 1e-2)
    assert torch.equal(*trained)


def test_transformers_resumes_from_a_checkpoint_as_if_uninterrupted(tmp_path):
    installed("accelerate"), installed("transformers")
    from curvlab.integrations.transformers import CurvatureCallback

    class Rows:
        """A data set that knows nothing of torch, as those of the datasets library."""

        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            return self.rows[i]

    def train(run, output, steps, **options):
        trainer, data = huggingface(output, steps)
        for name in ("sharpness", "hessian_trace"):
            watched = {"loss": "next_token", "data": Rows(data), "run": tmp_path / run / name, "announce": None}
            trainer.add_callback(CurvatureCallback([name], **watched))
        trainer.train(**options)
        return vector(trainer.model), [
            cl.Run(tmp_path / run / name).series(name) for name in ("sharpness", "hessian_trace")
        ]

    final, whole = train("whole", "a", 4)
    train("parts", "b", 3)  # one step beyond its last checkpoint
    resumed, parts = train("parts", "b", 4, resume_from_checkpoint="b/checkpoint-2")
    assert torch.equal(final, resumed)
    for found, expected in zip(parts, whole, strict=True):
        assert found.steps.tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_array_equal(found.errors, expected.errors)


# -- loops with accelerate and Fabric ---------------------------------------------------------------------------------


def test_accelerate_logs_to_its_trackers_and_wants_a_prepared_loader():
    installed("accelerate")
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    from curvlab.integrations.accelerate import monitor

    class Memory(GeneralTracker):
        name, requires_logging_directory, tracker = "memory", False, None

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **kwargs):
            received.append((step, values))

    received = []
    accelerator = Accelerator(cpu=True, log_with=Memory())
    accelerator.init_trackers("unused")
    raw = net()
    model, sgd, batches = accelerator.prepare(raw, torch.optim.SGD(raw.parameters(), lr=0.1), loader())
    keep = Keep(raw)
    given = {"loss": nn.MSELoss(), "data": (X, Y), "optimizer": sgd, "announce": None}
    with monitor(accelerator, model, ["sharpness", "instability"], loader=batches, log=keep, **given) as curvature:
        for x, y in batches:
            accelerator.backward(mse_loss(model(x), y))
            curvature()
            sgd.step()
            sgd.zero_grad()
    keep.check(net(), squares, list(range(6)))
    assert received == [(step, numbers) for step, numbers, _ in keep.rows]
    assert curvature.batch_size == 4
    with pytest.raises(
        ValueError, match=r"loader is a DataLoader; expected .* as accelerator.prepare\(\.\.\.\) gave it"
    ):
        monitor(accelerator, model, ["sharpness"], loader=loader(), **given)


def test_fabric_in_bf16_logs_to_its_loggers(tmp_path):
    installed("lightning.fabric")
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import CSVLogger

    from curvlab.integrations.fabric import monitor

    trained = []
    for watch in (True, False):
        raw, logger = net(), CSVLogger(tmp_path, name=f"csv{watch}")
        fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed", loggers=logger)
        model, sgd = fabric.setup(raw, torch.optim.SGD(raw.parameters(), lr=0.1, momentum=0.9))
        batches, keep = fabric.setup_dataloaders(loader()), Keep(raw)
        curvature = monitor(
            fabric, model, ["sharpness", "instability"], loader=batches, accumulate=2, loss=nn.MSELoss(), data=(X, Y),
            optimizer=sgd, log=keep, announce=None,
        ) if watch else lambda: None  # fmt: skip
        for i, (x, y) in enumerate(batches):
            fabric.backward(mse_loss(model(x), y) / 2)
            if i % 2:
                curvature()
                sgd.step()
                sgd.zero_grad()
        trained.append(vector(raw))
        if watch:
            logger.finalize("success")
            keep.check(net(), squares, [0, 1, 2])
            assert curvature.batch_size == 4 * 2
            assert curvature.threshold == pytest.approx(3.8 / 0.1)
            with open(f"{logger.log_dir}/metrics.csv") as file:
                rows = list(csv.DictReader(file))
            assert [float(row["curvlab/sharpness"]) for row in rows] == [
                row[1]["curvlab/sharpness"] for row in keep.rows
            ]
    assert torch.equal(*trained)


# -- trackers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["torch.utils.tensorboard", "tensorboardX"])
def test_tensorboard_has_the_numbers_in_float32(writer, tmp_path):
    installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from curvlab.integrations.tensorboard import tracker

    with installed(writer).SummaryWriter(str(tmp_path)) as events:
        for step in (0, 3):
            tracker(events)(NUMBERS, step=step)
    read = EventAccumulator(str(tmp_path)).Reload()
    assert set(read.Tags()["scalars"]) == set(NUMBERS)
    for name, number in NUMBERS.items():
        assert [(event.step, event.value) for event in read.Scalars(name)] == [
            (0, np.float32(number)),
            (3, np.float32(number)),
        ]


def history(folder):
    """The rows of an offline run of wandb, which its service may still be writing when `finish` returns."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    for _ in range(100):
        records = list(messages(file.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.1)
    histories = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in histories
    ]


def messages(raw):
    """Of wandb's file: protobuf records in LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, message = 7, b""
    while position + 7 <= len(raw):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        size, part = int.from_bytes(raw[position + 4 : position + 6], "little"), raw[position + 6]
        message += raw[position + 7 : position + 7 + size]
        position += 7 + size
        if part in (1, 4):  # whole, or the last of several
            yield Record.FromString(message)
            message = b""


@pytest.mark.parametrize("style", ["without steps", "with steps", "ahead"])
def test_wandb_drops_no_number_of_either_side(style, tmp_path):
    wandb = installed("wandb")
    from curvlab.integrations.wandb import tracker

    run = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    log, logged = tracker(run), []
    for step in range(4):
        log({"curvlab/sharpness": 2.5 + step}, step=step)
        for i in range(3 if style == "ahead" and step < 2 else style != "ahead"):
            logged.append(step + i / 10)
            run.log({"loss": logged[-1]}, **({"step": step} if style == "with steps" else {}))
    run.finish()
    rows = history(tmp_path)
    found = {row["curvlab/step"]: row["curvlab/sharpness"] for row in rows if "curvlab/step" in row}
    assert found == {step: 2.5 + step for step in range(4)}
    assert [row["loss"] for row in rows if "loss" in row] == logged


def test_what_logs_dictionaries_needs_no_adapter(tmp_path, monkeypatch):
    model = net()
    with cl.Monitor(model, ["sharpness"], loss=nn.MSELoss(), data=(X, Y), log=Keep(model), announce=None) as monitor:
        monitor(3)
        (tracker,) = monitor.trackers
        tracker.check(net(), squares, [3])


def test_mlflow_needs_no_adapter(tmp_path):
    mlflow = installed("mlflow")
    installed("sqlalchemy")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    model = net()
    with mlflow.start_run() as run:
        keep = Keep(model)
        monitor = cl.Monitor(
            model, ["sharpness"], loss=nn.MSELoss(), data=(X, Y), log=[mlflow.log_metrics, keep], announce=None
        )
        monitor(3)
    ((_, numbers, _),) = keep.rows
    for name, number in numbers.items():
        (found,) = mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
        assert (found.step, found.value) == (3, number)


def test_trackio_needs_no_adapter(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = installed("trackio")
    import sqlite3

    model = net()
    keep = Keep(model)
    trackio.init(project="curvature")
    monitor = cl.Monitor(model, ["sharpness"], loss=nn.MSELoss(), data=(X, Y), log=[trackio, keep], announce=None)
    monitor(3)
    trackio.finish()
    rows = (
        sqlite3.connect(tmp_path / "trackio" / "curvature.db").execute("select step, metrics from metrics").fetchall()
    )
    ((_, numbers, _),) = keep.rows
    assert [(step, json.loads(metrics)) for step, metrics in rows] == [(3, numbers)]
