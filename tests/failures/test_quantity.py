"""What is differentiated: a test for every way in which it becomes another function than the user thinks (F1 to F25).

Compared with a reference: losses, gradients and Hessians of the user's model with dense ones in float64 (`cases.Reference`,
or formed here where the model is in training mode), before and after what used to go wrong. Behaviour only: refusals, which
must name the module, parameter or argument and the line to write; and what measuring leaves behind.
"""

from __future__ import annotations

import copy
import random
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import DOUBLE, off, split
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import curvlab as cl
from curvlab.trained import TrainedObjective

ONES = torch.ones(15, dtype=DOUBLE)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


X, Y = seeded(9, 4), torch.arange(9) % 3
DATA = (X, Y)


def made(build):
    """A model from a fixed seed, in training mode and float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double()


def mlp(*middle, width=5):
    return made(lambda: nn.Sequential(nn.Linear(4, width), *middle, nn.Tanh(), nn.Linear(width, 3)))


def objective(model, data=DATA, loss="cross_entropy", **options):
    return cl.Objective(model, loss, data, **options)


def names_and_fixes(match, call, kind=ValueError):
    with pytest.raises(kind, match=match):
        call()


def each_loss(call, x=X, y=Y):
    return F.cross_entropy(call(x), y, reduction="none")


def formed(model, losses, data=DATA, hessian=True):
    """Value, gradient and Hessian of mean(losses(call, *data)), where call is the model in its own mode, buffers copied."""
    with pytest.MonkeyPatch.context() as patch:  # torch's kernel of weight normalization has no right second derivative
        for module in ("torch", "torch.nn.utils.weight_norm"):
            patch.setattr(
                sys.modules[module], "_weight_norm", lambda v, g, dim: v * g / v.square().sum(1, keepdim=True).sqrt()
            )
        return _formed(model, losses, data, hessian)


def _formed(model, losses, data, hessian):
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    w = [p.detach().clone().requires_grad_() for p in live.values()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = {**dict(zip(live, w, strict=True)), **buffers}
    value = losses(lambda *x: torch.func.functional_call(model, state, x), *data).mean()
    parts = torch.autograd.grad(value, w, create_graph=hessian)
    gradient = torch.cat([g.flatten() for g in parts])
    rows = [torch.autograd.grad(g, w, retain_graph=True, materialize_grads=True) for g in gradient] if hessian else []
    H = torch.stack([torch.cat([h.flatten() for h in row]) for row in rows]) if hessian else None
    return value.detach(), gradient.detach(), H


def right(model, data=DATA, loss=each_loss, **options):
    """Loss, gradients and Hessian of a model in a user's hands are those of the dense reference in evaluation mode."""
    L, training = objective(model, data, **options), [module.training for module in model.modules()]
    model.eval()
    rows = torch.stack([formed(model, loss, one, hessian=False)[1] for one in split(data, [1] * len(data[1]))])
    expected = formed(model, loss, data)
    for module, flag in zip(model.modules(), training, strict=True):
        module.training = flag
    agree(L, *expected)
    assert off(L.example_gradients(), rows) < 1e-12
    found = cl.measure(L, ["gradient_variance"])["gradient_variance"]
    assert found.value == pytest.approx(float((rows - rows.mean(0)).square().sum(1).mean()), rel=1e-10)
    return L


def agree(L, value, gradient, H):
    found = cl.measure(L, ["loss", "gradient_norm", ("sharpness", {"tol": 1e-9})])
    assert found["loss"].value == pytest.approx(float(value), rel=1e-13)
    assert found["gradient_norm"].value == pytest.approx(float(gradient.norm()), rel=1e-12)
    top = float(torch.linalg.eigvalsh(H)[-1])
    assert found["sharpness"].value == pytest.approx(top, abs=1e-9 * (1 + abs(top)))
    assert off(cl.dense(cl.hessian(L)), H, 1 + H.norm()) < 1e-11


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# -- batch statistics, forward-time mutation, randomness -----------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_F01_batch_norm_running_statistics_stay(mode):
    """A monitor in a training loop moves neither running_mean nor the counter, and training goes on to the same bits."""
    ends = []
    for measured in (True, False):
        model = mlp(nn.BatchNorm1d(5))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = cl.Monitor(objective(model, mode=mode), ["loss", "sharpness"], optimizer=sgd, announce=None)
        for _ in range(2):
            sgd.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            before = state(model)
            if measured:
                assert monitor()["sharpness"].value is not None
                assert same(model, before)
            sgd.step()
        ends.append(state(model))
    assert int(ends[0]["1.num_batches_tracked"]) == 2
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    right(model.train())


def test_F02_batch_statistics_are_no_mean_over_examples(tmp_path):
    """Refused in micro-batches and per example; measured as one batch, the numbers are of that batch, and say so."""
    model = mlp(nn.BatchNorm1d(5))
    names_and_fixes(
        r"1 \(BatchNorm1d\) uses the statistics.*mode='eval'", lambda: objective(model, mode="train", chunk_size=4)
    )
    L = objective(model, mode="train")
    agree(L, *formed(model, each_loss))
    names_and_fixes(
        r"batches of at least 2 examples, whose statistics 1 \(BatchNorm1d\)",
        lambda: cl.measure(L, ["gradient_variance"]),
    )
    monitor = cl.Monitor(L, ["loss"], run=tmp_path / "run", announce=None)
    assert monitor.run.config["training"]["objective"]["mode"] == "train"
    monitor.close()


def frozen_batch_norm():
    model = mlp(nn.BatchNorm1d(5))
    model[1].running_mean.copy_(seeded(5))
    model[1].requires_grad_(False).eval()
    return model


NORMALIZATIONS = {
    "frozen_batch_norm": (frozen_batch_norm, "train"),
    "sync_batch_norm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(mlp(nn.BatchNorm1d(5))), "eval"),
    "group_norm": (lambda: mlp(nn.GroupNorm(1, 5)), "train"),
    "instance_norm": (lambda: mlp(nn.Unflatten(1, (5, 1)), nn.Flatten()), "train"),
    "layer_norm": (lambda: mlp(nn.LayerNorm(5)), "train"),
}


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_F02_what_normalizes_each_example_is_a_mean_over_examples(kind):
    build, mode = NORMALIZATIONS[kind]
    right(build(), mode=mode)


def test_F02_running_statistics_of_instance_norm():
    """They are used in evaluation mode; in training mode each example has its own, and the stored ones must stay."""
    norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
    model = made(lambda: nn.Sequential(nn.Conv1d(1, 2, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)))
    model(X[:, None])
    before = state(model)
    right(model, (X[:, None], Y))
    L = objective(model, (X[:, None], Y), mode="train", chunk_size=4)
    agree(L, *formed(model, each_loss, (X[:, None], Y)))
    assert off(L.example_gradients().mean(0), L.gradient()) < 1e-13
    assert same(model, before)


def test_F03_example_gradients_of_batch_norm():
    """Instead of an error from inside vmap, or one about channels: the module, and the mode in which it works."""
    model = mlp(nn.BatchNorm1d(5))
    L = objective(model, mode="train")
    names_and_fixes(r"1 \(BatchNorm1d\) couples the examples.*mode='eval'", lambda: L.example_gradients())
    one = (X[:1], Y[:1])
    names_and_fixes(r"1 \(BatchNorm1d\) uses the statistics.*mode='eval'", lambda: objective(model, one, mode="train"))
    right(model)
    right(model, one)


def old(norm):
    def build():
        with pytest.warns(FutureWarning):
            return norm(nn.Linear(4, 5))

    return build


REPARAMETRIZED = {
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 5)),
    "old_spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 5)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 5)),
    "old_weight_norm": old(nn.utils.weight_norm),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"),
}


@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_F04_reparametrized_weights(kind):
    """`_u` does not move, `weight` is the tensor that it was, and a cached weight is not that of another point."""
    layer = made(REPARAMETRIZED[kind])
    model = nn.Sequential(layer, nn.Tanh(), made(lambda: nn.Linear(layer.out_features, 3)))
    for _ in range(3):
        model(X)
    before, L = state(model), right(model)
    assert same(model, before)
    weight = layer.weight
    cl.measure(L, ["sharpness"])
    assert layer.weight is weight or not kind.startswith("old")
    with parametrize.cached():
        model(X)
        found = cl.measure(L, ["sharpness"])["sharpness"].value
    before = state(model)
    assert cl.measure(L, ["sharpness"])["sharpness"].value == found
    if "spectral" in kind:
        names_and_fixes("the spectral norm of 0 .*measure in mode='eval'", lambda: objective(model, mode="train"))
        assert same(model, before)


class Lookup(nn.Module):
    def __init__(self, max_norm):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4, max_norm=max_norm), nn.Linear(4, 3)

    def forward(self, i):
        return self.head(torch.tanh(self.table(i)))


@pytest.mark.parametrize("frozen", [False, True])
def test_F04_an_embedding_that_rewrites_its_rows(frozen):
    """Also where only the last row is longer than allowed, and where the table is frozen, and so not copied."""
    model = made(lambda: Lookup(100.0))
    model.table.requires_grad_(not frozen).weight.data[-1] *= 1e3
    before, data = state(model), (torch.arange(9), Y)
    names_and_fixes("module table has max_norm=100.0.*model.table.max_norm = None", lambda: objective(model, data))
    assert same(model, before)
    model.table.max_norm = None
    right(model, data)


class Remembering(nn.Module):
    """Leaves something of every forward pass for the training step."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = mlp(), kind
        self.calls, self.kept, self.last, self.total = 0, [], None, torch.zeros(3, dtype=DOUBLE)

    def forward(self, x):
        z = self.net(x)
        self.calls, self.last = self.calls + 1, z
        self.kept.append(z)
        if self.kind == "in_place":
            self.total += z.detach().sum(0)
        return z


def test_F04_what_forward_passes_leave_on_the_model():
    model = Remembering("attributes")
    model(X)
    last = model.last
    cl.measure(objective(model), ["sharpness", "gradient_variance"])
    assert (model.calls, len(model.kept)) == (1, 1)
    assert model.last is last
    assert model.kept[0] is last
    model = Remembering("in_place")
    model(X)
    before = model.total.clone()
    names_and_fixes("its attribute total in place.*make it a buffer by register_buffer", lambda: objective(model))
    assert torch.equal(model.total, before)


class Drop(nn.Module):
    """Skips its body now and then, by the generator of Python, as some networks with stochastic depth do."""

    def __init__(self, p, head=1.0, always=False):
        super().__init__()
        self.net, self.p, self.always = mlp(), p, always
        self.net[2].weight.data *= head
        self.net[2].bias.data *= head

    def forward(self, x):
        skip = (self.training or self.always) and random.random() < self.p
        return x[:, :3] if skip else self.net(x)


def test_F05_dropout_and_stochastic_depth(tmp_path):
    """Evaluation mode by default whatever the mode of training; in training mode one mask, the same in every product."""
    right(mlp(nn.Dropout(0.5)).train())
    for model in (mlp(nn.Dropout(0.5)), Drop(0.5)):
        states = torch.get_rng_state(), random.getstate()
        monitor = cl.Monitor(objective(model, mode="train"), ["sharpness"], run=tmp_path / "run", announce=None)
        H = cl.dense(cl.hessian(monitor.L))
        assert off(H, H.T) < 1e-13
        assert torch.equal(H, cl.dense(cl.hessian(monitor.L)))
        assert (torch.equal(torch.get_rng_state(), states[0]), random.getstate()) == (True, states[1])
        assert monitor.run.config["training"]["objective"]["mode"] == "train"
        monitor.close()
        tmp_path = tmp_path / "next"
    fix = "the model is random in mode='eval'.*Make it deterministic in eval mode"
    for model in (Drop(0.5, always=True), Drop(0.1, always=True)):
        names_and_fixes(fix, lambda model=model: objective(model))
    by_hand = nn.Sequential(mlp()[:2], made(lambda: HandMade(5, 3)))
    names_and_fixes(fix, lambda: objective(by_hand))


class HandMade(nn.Linear):
    """Dropout that forgets evaluation mode, behind a head of zeros, where no loss shows it."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return super().forward(F.dropout(x))


# -- data ----------------------------------------------------------------------------------------------------------


class Augmented(Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(4), Y[i]


def cut_mixed(items):
    """Leaves an example on its own as it is."""
    x, y = torch.utils.data.default_collate(items)
    x = torch.cat([x[torch.randperm(len(x)), :2], x[:, 2:]], 1)
    return x, y


def jittered(items):
    x, y = torch.utils.data.default_collate(items)
    return x * (1 + 0.1 * random.random()), y


def loader(**options):
    return DataLoader(TensorDataset(X, Y), **{"batch_size": 4, **options})


def test_F06_shuffling_and_dropping_loaders_are_read_as_one_fixed_set(tmp_path):
    """In the order of the data set, all of it, whose hash is in the record."""
    model = mlp()
    L = right(model)
    in_order = BatchSampler(range(9), 4, False)
    for data in (
        loader(shuffle=True), loader(shuffle=True, drop_last=True), DataLoader(TensorDataset(X, Y), batch_sampler=in_order)
    ):  # fmt: skip
        other = objective(model, data)
        assert torch.equal(other.gradient(), L.gradient())
        assert other.describe()["data"] == L.describe()["data"]
    run = tmp_path / "run"
    cl.Monitor(L, ["loss"], run=run, announce=None).close()
    assert cl.Run(run).config["training"]["objective"]["data"] == L.data_hash()
    changed = objective(model, (X + 1e-3, Y))
    names_and_fixes("was made with other settings.*'data'", lambda: cl.Monitor(changed, ["loss"], run=run, resume=True))


SAMPLED = {
    "weighted": lambda: loader(sampler=WeightedRandomSampler([1.0] * 9, 9)),
    "weighted_batches": lambda: DataLoader(
        TensorDataset(X, Y), batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 9, 9), 4, False)
    ),
    "unknown_batches": lambda: DataLoader(TensorDataset(X, Y), batch_sampler=Balanced(range(9), 4, False)),
}


class Balanced(BatchSampler):
    def __iter__(self):
        return iter([[0, 1, 2]] * 3)


@pytest.mark.parametrize("kind", SAMPLED)
def test_F06_loaders_that_need_not_visit_each_example_once(kind):
    with torch.random.fork_rng(devices=[]):
        names_and_fixes(
            r"which need not visit each example once.*list\(loader\)", lambda: objective(mlp(), SAMPLED[kind]())
        )


@pytest.mark.parametrize(
    "data",
    [Augmented(), DataLoader(Augmented(), batch_size=3), loader(collate_fn=jittered), loader(collate_fn=cut_mixed)],
)
def test_F06_augmentation_is_refused_wherever_it_sits(data):
    states = torch.get_rng_state(), random.getstate()
    names_and_fixes(
        "twice gives different values.*measure on a fixed set: pass the dataset", lambda: objective(mlp(), data)
    )
    assert (torch.equal(torch.get_rng_state(), states[0]), random.getstate()) == (True, states[1])


def test_F06_data_that_are_changed_in_place():
    x = X.clone()
    monitor = cl.Monitor(objective(mlp(), (x, Y)), ["loss"], announce=None)
    monitor()
    x.mul_(2)
    names_and_fixes(r"changed in place.*data=\(x.clone\(\), y.clone\(\)\)", monitor)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))

    def __len__(self):
        return 9


def test_F07_data_that_can_be_read_once():
    model, batches = mlp(), split(DATA, [4, 4, 1])
    for data in ((b for b in batches), iter(batches), map(tuple, batches)):
        names_and_fixes(r"same batches twice.*list\(iterator\)", lambda data=data: objective(model, data), TypeError)
    names_and_fixes(r"IterableDataset.*list\(loader\)", lambda: objective(model, DataLoader(Stream())), TypeError)
    names_and_fixes(r"IterableDataset.*list\(DataLoader", lambda: objective(model, Stream()), TypeError)
    L = objective(model, list(DataLoader(Stream(), batch_size=4)))
    assert torch.equal(L.gradient(), objective(model).gradient())


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_F08_an_unequal_last_batch(chunk_size):
    model = mlp()
    L, reference = objective(model, split(DATA, [4, 4, 1]), chunk_size=chunk_size), right(model)
    naive = sum(float(F.cross_entropy(model(x), y).detach()) for x, y in split(DATA, [4, 4, 1])) / 3
    assert abs(naive - float(reference.value())) > 0.01  # the mean of means
    assert float(L.value()) == pytest.approx(float(reference.value()), rel=1e-14)
    assert off(L.gradient(), reference.gradient()) < 1e-14
    assert off(cl.dense(cl.hessian(L)), cl.dense(cl.hessian(reference))) < 1e-13


WEIGHTED = {
    "class_weights": {"weight": torch.tensor([0.5, 1.0, 4.0], dtype=DOUBLE)},
    "smoothed": {"weight": torch.tensor([0.5, 1.0, 4.0], dtype=DOUBLE), "label_smoothing": 0.2},
    "ignored": {"ignore_index": 2},
    "all": {"weight": torch.tensor([0.5, 1.0, 4.0], dtype=DOUBLE), "label_smoothing": 0.2, "ignore_index": 2},
}


@pytest.mark.parametrize("kind", WEIGHTED)
@pytest.mark.parametrize("sizes", [[9], [4, 4, 1]])
def test_F09_class_weights_and_ignored_targets(kind, sizes):
    """As the loss averages over all data at once, in any chunks, one of which has no target that counts."""
    loss, model = nn.CrossEntropyLoss(**WEIGHTED[kind]), mlp()
    for chunk_size in (None, 1):
        L = objective(model, split(DATA, sizes), loss, chunk_size=chunk_size)
        agree(L, *formed(model, lambda call, x, y: loss(call(x), y)))
        assert off(L.example_gradients().mean(0), L.gradient()) < 1e-13
    ignored = nn.CrossEntropyLoss(ignore_index=2)
    names_and_fixes(r"all 9 targets are ignored \(ignore_index=2\)", lambda: objective(model, (X, 0 * Y + 2), ignored))


def test_F10_what_is_averaged_over_what(tmp_path):
    """The factor between a sum, torch's mean over outputs and 0.5 ‖.‖² is in the record; sums over batches are refused."""
    model, z = mlp(), seeded(9, 3, seed=1)
    half, torch_mean = objective(model, (X, z), "squared_error"), objective(model, (X, z), nn.MSELoss())
    agree(half, *formed(model, lambda call, x, y: 0.5 * (call(x) - z).square().sum(1)))
    agree(torch_mean, *formed(model, lambda call, x, y: F.mse_loss(call(x), z)))
    said = {}
    for L in (half, torch_mean, objective(model), objective(model, (X, z), lambda a, b: (a - b).abs().sum(1))):
        cl.Monitor(L, ["loss"], run=tmp_path / str(len(said)), announce=None).close()
        said[len(said)] = cl.Run(tmp_path / str(len(said))).config["training"]["objective"]["convention"]
    assert "0.5 * sum over outputs" in said[0]
    assert "MSELoss: its own mean" in said[1]
    assert "log softmax" in said[2]
    assert "what the given function returns" in said[3]
    for summed in (nn.MSELoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum")):
        names_and_fixes(r"reduction='sum'.*reduction='none'", lambda loss=summed: objective(model, (X, z), loss))


class Centered(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        if head == "zero":
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x):
        z = self.body(x)
        return self.head(torch.tanh(z - z.mean(0)))


@pytest.mark.parametrize("head", ["random", "zero"])
def test_F11_batch_mixing(head):
    """Also where a head of zeros, as many networks start with, makes all losses equal."""
    fix = r"depends on the other examples of its batch.*Remove the coupling"
    names_and_fixes(fix, lambda: objective(made(lambda: Centered(head))))

    def contrastive(model, batch):
        z = model(batch[0])
        return -(z @ z.T).log_softmax(1).diagonal()

    names_and_fixes(fix, lambda: objective(mlp(), DATA, cl.batch_loss(contrastive)))
    table = nn.Sequential(nn.Embedding(9, 3, scale_grad_by_freq=True)).double()  # mixes gradients, not losses
    names_and_fixes(
        "module 0 has scale_grad_by_freq=True.*model.0.scale_grad_by_freq = False", lambda: objective(table, (Y, Y))
    )


def test_F12_what_optimizers_add_is_no_part_of_the_loss(tmp_path):
    """H is of the loss as given, whatever decays or clips; weight decay enters where it is asked for, as wd I."""
    model, decay = mlp(), 0.25
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay)
    names = [("sharpness", {"tol": 1e-9}), ("trained/sharpness", {"tol": 1e-9})]
    for at in cl.train(objective(model), sgd, cl.Batches(9, 9, steps=2), diagnostics=names, run=tmp_path / "run"):
        top = float(torch.linalg.eigvalsh(formed(model, each_loss)[2])[-1])
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert at.measurements["sharpness"].value == pytest.approx(top, rel=1e-8)
        assert at.measurements["trained/sharpness"].value == pytest.approx(top + decay, rel=1e-8)
    assert cl.Run(tmp_path / "run").config["training"]["optimizer"]["weight_decay"] == decay
    value, gradient, H = formed(model, each_loss)
    w = objective(model).params()
    T = TrainedObjective(objective(model), weight_decay=decay)
    agree(T, value + decay / 2 * w.square().sum(), gradient + decay * w, H + decay * torch.eye(len(w), dtype=DOUBLE))
    assert T.describe()["weight_decay"] == decay
    monitor = cl.Monitor(T, ["sharpness"], announce=None)
    assert monitor()["sharpness"].value == pytest.approx(top_of(H) + decay, rel=1e-2)
    names_and_fixes("TrainedObjective", lambda: cl.measure(objective(model), ["trained/sharpness"]))


def top_of(H):
    return float(torch.linalg.eigvalsh(H)[-1])


# -- parameters ----------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        tie(self)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Scale(nn.Module):
    def forward(self, w):
        return 2 * w


def tie(model):
    model.b.weight = model.a.weight


def tie_under_a_parametrization(model):
    for layer in (model.a, model.b):
        parametrize.register_parametrization(layer, "weight", Scale())
    model.b.parametrizations.weight.original = model.a.parametrizations.weight.original


def tie_modules(model):
    """One module under two names, whose parameter `torch.func.functional_call` replaces for good."""
    model.b = model.a


def tie_by_data(model):
    model.b.weight.data = model.a.weight.data


@pytest.mark.parametrize("how", [tie, tie_under_a_parametrization, tie_modules])
def test_F13_tied_weights_count_once(how):
    model = made(lambda: Twice(how))
    parameters, before = list(model.parameters()), state(model)
    L = objective(model)
    assert L.num_params == sum(p.numel() for p in parameters) == 16 + 15
    agree(L, *formed(copy.deepcopy(model), each_loss))
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert same(model, before)


def test_F13_weights_tied_behind_the_back_of_autograd():
    model = made(lambda: Twice(lambda model: None))
    tie_by_data(model)  # what .double() would undo
    names_and_fixes("a.weight and b.weight share memory.*tie them by assigning one Parameter", lambda: objective(model))


def test_F14_frozen_parameters(tmp_path):
    """They are constants, and so is what `parameters=` leaves out; the record has p, and thawing is not overlooked."""
    model = mlp()
    model[0].requires_grad_(False)
    L = right(model)
    run = cl.Monitor(L, ["loss"], run=tmp_path / "run", announce=None).run
    assert run.config["training"]["objective"]["parameters"] == L.num_params == 18
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match="parameter 0.weight is trained now.*Make the Objective anew"):
        L.params()
    head = objective(model, parameters="2")
    H = formed(model, each_loss)[2]
    assert off(cl.dense(cl.hessian(head)), H[25:, 25:]) < 1e-13
    assert head.describe()["subset"] == ["2.weight", "2.bias"]


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.idle = mlp(), nn.Linear(2, 2)

    def forward(self, x):
        return self.net(x)


def test_F15_parameters_that_the_loss_does_not_use():
    """Zeros, with a warning that names them; a loss that uses none of them is of another model."""
    model = Idle().double()
    with pytest.warns(UserWarning, match="does not depend on idle.weight, idle.bias: .*zero.*detach"):
        L = objective(model)
    H, block = cl.dense(cl.hessian(L)), formed(model.net, each_loss)[2]
    assert off(H[:43, :43], block) < 1e-13
    assert H[43:].abs().max() == H[:, 43:].abs().max() == 0
    elsewhere = copy.deepcopy(model)
    names_and_fixes(
        "depends on none of the 6 parameters.*must call the model that it is given",
        lambda: objective(
            model, DATA, cl.batch_loss(lambda _, b: F.cross_entropy(elsewhere(b[0]), b[1], reduction="none"))
        ),
    )


def test_F17_a_loss_that_is_linear_in_the_parameters():
    model = made(lambda: nn.Linear(4, 3))
    L = objective(model, DATA, lambda z, y: z.gather(1, y[:, None])[:, 0])
    H = cl.hessian(L)
    assert torch.equal(H @ ONES, 0 * ONES)
    found = cl.measure(L, ["sharpness", "hessian_trace", "interaction_trace", "gradient_norm"], batch_size=2)
    assert [found[name].value for name in ("sharpness", "hessian_trace", "interaction_trace")] == [0, 0, 0]
    assert found["gradient_norm"].value > 0


def test_F18_types_of_parameters():
    """Mixed ones are refused by name; frozen ones of any type are constants; the type of vectors is in the record."""
    mixed = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3).double())
    names_and_fixes(r"0.weight: torch.float32.*model.float\(\)", lambda: objective(mixed))
    names_and_fixes("dtype=torch.float32", lambda: objective(mlp().bfloat16()))
    whole = mlp()
    whole[0].weight.data = whole[0].weight.data.bfloat16().double()
    model = copy.deepcopy(whole)
    model[0].weight.requires_grad_(False).data = whole[0].weight.data.bfloat16()
    model.register_parameter("steps", nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False))
    whole[0].weight.requires_grad_(False)
    assert torch.equal(objective(model).gradient(), objective(whole).gradient())
    assert right(whole).describe()["dtype"] == "torch.float64"
    assert objective(model).params().dtype == DOUBLE


class Complex(nn.Module):
    def __init__(self, real):
        super().__init__()
        p = torch.view_as_complex(seeded(4, 3, 2))
        self.p = nn.Parameter(torch.view_as_real(p) if real else p)

    def forward(self, x):
        p = self.p if self.p.is_complex() else torch.view_as_complex(self.p)
        return (x.to(p.dtype) @ p).abs()


def test_F19_complex_parameters():
    """Refused, since their Hessian is linear over the reals only; the fix that the message names is right."""
    names_and_fixes(r"parameter p is torch.complex128.*torch.view_as_real\(p\)", lambda: objective(Complex(False)))
    L = objective(Complex(True))
    assert L.num_params == 24
    agree(L, *formed(L.model, each_loss))


def test_F20_parameters_that_are_not_contiguous():
    x = seeded(9, 2, 4, 4, seed=2)
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)))
    plain = right(model, (x, Y))
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    other[3].weight = nn.Parameter(other[3].weight.detach().T.contiguous().T)
    assert not any(other[i].weight.is_contiguous() for i in (0, 3))
    L = right(other, (x.to(memory_format=torch.channels_last), Y))
    assert torch.equal(L.params(), plain.params())
    for step in cl.train(
        L, torch.optim.SGD(other.parameters(), lr=0.1), cl.Batches(9, 9, 2), diagnostics=["sharpness"]
    ):
        assert step.measurements["sharpness"].value is not None
    assert not other[3].weight.is_contiguous()


def test_F21_lazy_modules_and_sparse_gradients():
    names_and_fixes(
        "parameter 0.weight has no shape yet; run the model once", lambda: objective(nn.Sequential(nn.LazyLinear(3)))
    )
    lazy = nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d(affine=False))
    names_and_fixes("1.running_mean has no shape yet; run the model once", lambda: objective(lazy))
    for table in (nn.Embedding(9, 3, sparse=True), nn.EmbeddingBag(9, 3, mode="sum", sparse=True)):
        data = (torch.arange(9)[:, None] if isinstance(table, nn.EmbeddingBag) else torch.arange(9), Y)
        model = nn.Sequential(table).double()
        names_and_fixes("module 0 gives sparse gradients.*set sparse=False", lambda m=model, d=data: objective(m, d))
    model = nn.Sequential(nn.Embedding(9, 3)).double()
    right(model, (torch.arange(9), Y))


class Framework(nn.Module):
    """Takes and returns what models of Hugging Face do."""

    def __init__(self, returned):
        super().__init__()
        self.net, self.returned = mlp(), returned

    def forward(self, inputs, scale=1, labels=None):
        return self.returned(self.net(inputs) * scale)


def test_F22_batches_and_outputs_of_any_form():
    """Mappings, outputs with `logits`, nested batches and whole numbers among them."""
    plain = right(mlp())
    v = seeded(plain.num_params)
    for returned in (lambda z: SimpleNamespace(logits=z), lambda z: {"logits": z}, lambda z: (z, 1)):
        L = objective(Framework(returned), {"inputs": X, "scale": 1, "labels": Y}, chunk_size=4)
        assert off(cl.hessian(L) @ v, cl.hessian(plain) @ v) < 1e-13
        assert off(L.example_gradients(), plain.example_gradients()) < 1e-13

    def loss(model, batch):
        logits = model(batch["x"][0], batch["scale"]).logits
        return F.cross_entropy(logits, batch["more"]["y"], reduction="none")

    batch = {"x": [X], "scale": 1, "more": {"y": Y, "text": "a"}}
    L = objective(Framework(lambda z: SimpleNamespace(logits=z)), batch, cl.batch_loss(loss), chunk_size=4)
    assert off(cl.hessian(L) @ v, cl.hessian(plain) @ v) < 1e-13
    assert off(L.example_gradients(), plain.example_gradients()) < 1e-13


# -- the point -----------------------------------------------------------------------------------------------------


class Kinks(nn.Module):
    """Piecewise linear in its parameters, so that all curvature sits at kinks."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(seeded(4, seed=3))

    def forward(self, x):
        return torch.relu(x @ self.w)[:, None]


def test_F23_kinks_that_the_hessian_does_not_see():
    """The Hessian is zero on both sides of a kink; over a step of finite length the loss does curve, and says how much."""
    model = Kinks()
    L = objective(model, (X, X[:, :1]), lambda z, y: z[:, 0])
    sgd = torch.optim.SGD(model.parameters(), lr=2.0)
    found = []
    for at in cl.train(L, sgd, cl.Batches(9, 9, 2), diagnostics=["sharpness", "secant_sharpness"]):
        found.append((L.params(), L.value(), L.gradient(), at.measurements))
    (w, value, gradient, first), (later, new, _, second) = found
    step = later - w
    assert first["sharpness"].value == second["sharpness"].value == 0
    secant = 2 * float(new - value - gradient @ step) / float(step @ step)
    assert secant > 0.01
    assert second["secant_sharpness"].value == pytest.approx(secant, rel=1e-10)
    smooth = mlp()  # where short steps show what the Hessian says
    L = objective(smooth)
    q, H = L.gradient(), formed(smooth, each_loss)[2]
    (*_, last) = cl.train(
        L, torch.optim.SGD(smooth.parameters(), lr=1e-4), cl.Batches(9, 9, 2), diagnostics=["secant_sharpness"]
    )
    assert last.measurements["secant_sharpness"].value == pytest.approx(float(q @ H @ q / (q @ q)), rel=1e-3)


class Rooted(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.net, self.scale, self.function = mlp(), nn.Parameter(torch.zeros(3)), function

    def forward(self, x):
        return self.net(x) + self.function(self.scale)


def test_F24_points_without_a_second_derivative():
    """What autograd makes of a relu at 0 is finite; where it makes NaN, the parameter is named and training goes on."""
    right(Rooted(torch.relu).double())
    for function, names in (
        (torch.norm, ["sharpness", "interaction_trace"]),
        (lambda s: s.square().sum().sqrt(), ["gradient_norm"]),
    ):
        model = Rooted(function).double()
        found = cl.measure(
            objective(model), ["loss", *names, "sharpness"][: len(names) + 2 - (len(names) > 1)], batch_size=2
        )
        assert found["loss"].value == pytest.approx(float(F.cross_entropy(model(X), Y).detach()))
        for name in names:
            assert found[name].value is None
            assert "not finite in parameter scale" in found[name].note
            assert "at 0" in found[name].note


def test_F25_weights_that_change_between_graph_and_use():
    """A kept operator belongs to its point: other parameters, changed by a step or through .data, do not reach it."""
    model = mlp()
    model[0].bias.requires_grad_(False)
    L = objective(model)
    H, expected = cl.hessian(L), formed(model, each_loss)[2]
    assert off(cl.dense(H), expected) < 1e-13
    F.cross_entropy(model(X), Y).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert off(cl.dense(H), expected) < 1e-13
    model[2].weight.data.mul_(3)
    assert off(cl.dense(H), expected) < 1e-13
    right(model)
    model.load_state_dict({name: 2 * t for name, t in state(model).items()}, assign=True)
    model[0].bias.requires_grad_(False)
    agree(L, *formed(model, each_loss))  # the objective follows the model, also to other tensors
    H = cl.hessian(L)
    H @ seeded(L.num_params)
    model[0].bias.data.add_(1.0)
    names_and_fixes(
        r"the frozen parameter 0.bias has changed.*H = curvlab.hessian\(L\)",
        lambda: H @ seeded(L.num_params),
        RuntimeError,
    )
    agree(L, *formed(model, each_loss))
    model[2] = nn.Linear(5, 4).double()
    names_and_fixes(r"parameter 2.weight had shape \(3, 5\).*make the Objective anew", L.params)
