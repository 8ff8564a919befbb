"""Eight styles of training loop with a monitor in them: plain, gradient accumulation, automatic mixed precision (bfloat16,
and float16 with a GradScaler), compiled, Lightning, Hugging Face's Trainer, accelerate (bfloat16), DistributedDataParallel.

Compared with a reference, for each style: what is logged, against the same diagnostics of a float64 copy on its own at the
same weights; learning rate and threshold, against the formula of the schedule; the trained parameters, bit by bit, against
the same loop without a monitor. Styles of packages that are not installed are skipped.
"""

import datetime
import logging
import warnings

import numpy as np
import pytest
import torch
from processes import together
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import curvlab as cl
from curvlab.unwrap import unwrap

LR, DECAY, MOMENTUM, STEPS = 0.1, 0.8, 0.9, 5
# The last one depends on the batch size, exactly: each style must find its own.
DIAGNOSTICS = ["loss", "gradient_norm", "sharpness", "batch_gradient_norm", "gradient_concentration"]
X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (24,), generator=torch.Generator().manual_seed(2))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 4))


def descent(model):
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    return sgd, torch.optim.lr_scheduler.ExponentialLR(sgd, DECAY)


def batches(size=4):
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(X, Y), batch_size=size, shuffle=True, drop_last=True, generator=generator)


def vector(model):
    return torch.cat([p.detach().reshape(-1) for p in unwrap(model).parameters()])


class Watch:
    """Puts a monitor into a loop, or nothing; keeps the weights and gradients at which the monitor was called."""

    def __init__(self, run=None):
        self.run, self.rows = run, []

    def options(self, model):
        """What `Monitor` and the callbacks are given besides the loop's own objects."""

        def keep(numbers, step):
            grads = [p.grad for p in unwrap(model).parameters()]
            gradient = torch.cat([g.reshape(-1) for g in grads]).double() if None not in grads else None
            self.rows.append((step, numbers, vector(model).double(), gradient))

        return {"loss": "cross_entropy", "data": (X, Y), "every": 2, "run": self.run, "log": keep, "announce": None}

    def monitor(self, model, optimizer, batch_size):
        if self.run is None:
            return lambda *_: {}
        return cl.Monitor(model, DIAGNOSTICS, optimizer=optimizer, batch_size=batch_size, **self.options(model))


def plain(watch, wrap=lambda model: model):
    model = wrap(net())
    sgd, schedule = descent(model)
    monitor = watch.monitor(model, sgd, 4)
    for step, (x, y) in zip(range(STEPS), batches(), strict=False):
        cross_entropy(model(x), y).backward()
        monitor(step)
        sgd.step()
        sgd.zero_grad()
        schedule.step()
    return vector(model)


def accumulation(watch):
    model = net()
    sgd, schedule = descent(model)
    monitor = watch.monitor(model, sgd, 8)
    for i, (x, y) in enumerate([*batches(), *batches()][: 2 * STEPS]):
        (cross_entropy(model(x), y) / 2).backward()
        if i % 2:
            monitor()
            sgd.step()
            sgd.zero_grad()
            schedule.step()
    return vector(model)


def amp(watch):
    model = net()
    sgd, schedule = descent(model)
    monitor = watch.monitor(model, sgd, 4)
    for step, (x, y) in zip(range(STEPS), batches(), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            cross_entropy(model(x), y).backward()
            monitor(step)  # also inside the context
        sgd.step()
        sgd.zero_grad()
        schedule.step()
    return vector(model)


def scaler(watch):
    model = net()
    sgd, schedule = descent(model)
    scaled = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = watch.monitor(model, sgd, 4)
    for step, (x, y) in zip(range(STEPS), batches(), strict=False):
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(model(x), y)
        scaled.scale(loss).backward()
        scaled.unscale_(sgd)
        monitor(step)
        scaled.step(sgd)
        scaled.update()
        sgd.zero_grad()
        schedule.step()
    return vector(model)


def compiled(watch):
    return compiling(watch, lambda model: torch.compile(model, backend="aot_eager"))


def compiled_in_place(watch):
    class Whole(nn.Module):  # torch leaves a plain Sequential that is compiled in place as it is
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return self.layers(x)

    def wrap(model):
        whole = Whole(model)
        whole.compile(backend="aot_eager")
        return whole

    return compiling(watch, wrap)


def compiling(watch, wrap):
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    trained = plain(watch, wrap)
    assert counters["stats"]["unique_graphs"] == 1  # that of the training step: measuring adds none and drops none
    return trained


def lightning(watch):
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed", exc_type=ImportError)
    from curvlab.integrations.lightning import CurvatureCallback

    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch):
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            sgd, schedule = descent(self)
            return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    module, callbacks = Classifier(), []
    if watch.run:
        callbacks.append(CurvatureCallback(DIAGNOSTICS, model="net", **watch.options(module.net)))
    trainer = pl.Trainer(
        max_steps=STEPS, accumulate_grad_batches=2, callbacks=callbacks, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, batches())
    return vector(module.net)


def transformers(watch):
    pytest.importorskip("accelerate", reason="accelerate is not installed", exc_type=ImportError)
    pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
    from transformers import Trainer, TrainingArguments

    from curvlab.integrations.transformers import CurvatureCallback

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, inputs, labels=None):
            logits = self.net(inputs)
            return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}

    model = Classifier()
    sgd, schedule = descent(model)
    arguments = TrainingArguments(
        "unused", per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=STEPS, use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, max_grad_norm=1e9, seed=5,
    )  # fmt: skip
    examples = [{"inputs": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    trainer = Trainer(model, arguments, train_dataset=examples, optimizers=(sgd, schedule))
    if watch.run:
        trainer.add_callback(CurvatureCallback(DIAGNOSTICS, **watch.options(model) | {"data": examples}))
    trainer.train()
    return vector(model)


def accelerate(watch):
    pytest.importorskip("accelerate", reason="accelerate is not installed", exc_type=ImportError)
    from accelerate import Accelerator

    from curvlab.integrations.accelerate import monitor as watched

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    raw = net()
    sgd, schedule = descent(raw)
    model, sgd, loader, schedule = accelerator.prepare(raw, sgd, batches(), schedule)
    assert model(X).dtype == torch.float32  # of what forward was patched to give
    monitor = lambda: {}  # noqa: E731
    if watch.run:
        monitor = watched(accelerator, model, DIAGNOSTICS, optimizer=sgd, loader=loader, **watch.options(raw))
    for x, y in [*loader, *loader][: 2 * STEPS]:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                monitor()
            sgd.step()
            schedule.step()
            sgd.zero_grad()
    return vector(raw)


# name -> loop, examples in one step of the optimizer
STYLES = {
    "plain": (plain, 4),
    "accumulation": (accumulation, 8),
    "amp": (amp, 4),
    "scaler": (scaler, 4),
    "compiled": (compiled, 4),
    "compiled in place": (compiled_in_place, 4),
    "lightning": (lightning, 8),
    "transformers": (transformers, 8),
    "accelerate": (accelerate, 8),
}


def check(rows, run, batch_size):
    """What was logged, against the same diagnostics of a float64 copy at the weights that were kept."""
    assert [step for step, *_ in rows] == [0, 2, 4]
    model = net().double()
    L = cl.Objective(model, "cross_entropy", (X.double(), Y))
    for step, numbers, w, gradient in rows:
        reference = cl.measure(L, DIAGNOSTICS[:3] + DIAGNOSTICS[4:], w=w, batch_size=batch_size)
        for name in reference:
            value, rounding = float(reference[name].value), 2e-5 if name != "sharpness" else 1e-3
            assert numbers[f"curvlab/{name}"] == pytest.approx(value, rel=rounding), (step, name)
        top = torch.linalg.eigvalsh(cl.dense(cl.hessian(L, w)))[-1]
        assert abs(numbers["curvlab/sharpness"] - top) <= numbers["curvlab/sharpness_error"] + 1e-6 * top
        assert numbers["curvlab/batch_gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-6)
        assert numbers["curvlab/batch_gradient_norm"] < 10 * numbers["curvlab/gradient_norm"]  # without the loss scale
        lr = LR * DECAY**step
        assert numbers["curvlab/lr"] == pytest.approx(lr)
        assert numbers["curvlab/threshold"] == pytest.approx((2 + 2 * MOMENTUM) / lr)
    log = cl.Run(run)
    assert log.config["training"]["batch_size"] == batch_size
    assert log.config["training"]["optimizer"]["name"] == "SGD"
    series = log.series("sharpness")
    assert series.steps.tolist() == [0, 2, 4]
    np.testing.assert_array_equal(series.values, [numbers["curvlab/sharpness"] for _, numbers, *_ in rows])
    assert len({w.sum().item() for _, _, w, _ in rows}) == 3  # it was trained in between


@pytest.mark.parametrize("loop, batch_size", STYLES.values(), ids=STYLES)
def test_measured_as_on_its_own_and_trained_as_without(loop, batch_size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watch = Watch(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning|torch|transformers|accelerate")
        with_monitor, without = loop(watch), loop(Watch())
    assert torch.equal(with_monitor, without)
    assert not torch.equal(without, vector(net()))
    check(watch.rows, watch.run, batch_size)


def _rank(rank, folder):
    """One of two processes: the same loop under DistributedDataParallel without a monitor, and with one on every rank."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )

    def train(watch):
        model = nn.parallel.DistributedDataParallel(net())
        sgd, schedule = descent(model)
        monitor, found = watch.monitor(model, sgd, batches(4)), []
        both = [*batches(8), *batches(8)]
        for step, (x, y) in enumerate(both[:STEPS]):
            mine = slice(4 * rank, 4 * rank + 4)
            cross_entropy(model(x[mine]), y[mine]).backward()
            found.append(monitor(step))
            sgd.step()
            sgd.zero_grad()
            schedule.step()
        return vector(model), found

    watch = Watch(f"{folder}/run")
    without, _ = train(Watch())
    with_monitor, found = train(watch)
    assert torch.equal(with_monitor, without)
    assert rank == 0 or found == [{}] * STEPS
    torch.save({"rows": watch.rows, "parameters": with_monitor}, f"{folder}/rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    together(_rank, 2, str(tmp_path))
    zero, one = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert torch.equal(zero["parameters"], one["parameters"])
    assert one["rows"] == []
    check(zero["rows"], tmp_path / "run", 8)
