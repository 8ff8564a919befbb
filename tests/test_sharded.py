"""Models of which each rank holds a part of every parameter: FSDP2 (`fully_shard`) and tensor parallelism.

Compared with a reference: operators, example gradients and diagnostics of a training on 3 gloo ranks, with parameters
that do not divide by 3, unequal parts of the data and an empty one, against one process in float64; the same for eigenpairs
and traces of vectors that stay in parts; trainings on 2 ranks with measurements, bit by bit, against those without.
Behaviour only: what is refused.
"""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import together
from test_ranks import CLOSE, MICRO_BATCHES, assert_alike
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import curvlab as cl
from curvlab import landscape, memory
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.per_example import ExampleGradients
from curvlab.regularizers import gradient_norm_penalty
from curvlab.trained import TrainedObjective

F64 = torch.float64
N = 7
WHOLE = (
    "diagnostics such as gradient_norm", "batches", "products with the GGN", "per-example gradients", "accuracies",
    "products by engine='traced'",
    "gradient flows", "planes", "penalties and weight decay",
)  # fmt: skip


class Net(nn.Module):
    """A convolution, a scale that is a buffer, layers of which one weight is used twice, and a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.again = nn.Conv1d(1, 2, 3), nn.Linear(8, 5), nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))
        self.again.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).flatten(1) * self.scale
        return self.head(F.gelu(self.again(F.gelu(self.inner(h)))) + h)


def net(shard=lambda model: model) -> nn.Module:
    torch.manual_seed(0)
    model = Net().double()
    shard(model)
    return model


def fsdp(model: nn.Module) -> None:
    fully_shard([model.inner, model.again])
    fully_shard(model)


def examples(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 6, generator=generator, dtype=F64), torch.arange(n) % 3


def vectors(L: cl.Objective) -> Tensor:
    return torch.randn(L.num_params, 3, generator=torch.Generator().manual_seed(2), dtype=F64)


def few(model: nn.Module, group=None) -> dict[str, Tensor]:
    """With two examples, so that the last of three ranks has none."""
    L = cl.Objective(model, "cross_entropy", examples(2), group=group)
    E = ExampleGradients(L, L.params())
    return {"few": L.gradient(), "few H": cl.hessian(L) @ vectors(L), "few norms": E.squared_norms()}


def operators(model: nn.Module, group=None) -> dict[str, Tensor]:
    """What one asks of an objective."""
    L = cl.Objective(model, "cross_entropy", examples(N), group=group, chunk_size=2)
    w = 1.1 * L.params()
    V, E = vectors(L), ExampleGradients(L, w)
    block = cl.Objective(model, "cross_entropy", examples(N), group=group, parameters=["inner", "head.bias"])
    return {
        "params": L.params(),
        "value": L.value(w),
        "gradient": L.gradient(w),
        "here": L.gradient(),
        "batch": L.gradient(w, torch.tensor([N - 1, 0])),
        "accuracy": L.accuracy(w),
        "H": cl.hessian(L, w) @ V,
        "G": cl.ggn(L, w) @ V,
        "S": cl.gradient_second_moment(L, w, batch_size=2) @ V,
        "norms": E.squared_norms(),
        "gram": E.gram(),
        "rows": L.example_gradients(w),
        "eigenvalues": cl.eigsh(cl.hessian(L, w), 3, tol=1e-8).values,
        "block": cl.dense(cl.hessian(block)),
    }


def kept(model: nn.Module, n: int, group=None) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Which entries of vectors are here, these entries of vectors, and numbers, with vectors divided among the ranks."""
    options = {"group": group, "sharded": "keep"} if group else {}
    L = cl.Objective(model, "cross_entropy", examples(n), chunk_size=2, **options)
    here = torch.arange(L.num_params) if L.kept is None else L.kept.here
    H, draw = cl.hessian(L, 1.1 * L.params()), torch.Generator().manual_seed(3)
    V = torch.randn(H.shape[0], 3, generator=draw, dtype=F64)[here]
    rebuilt = cl.hessian(L, 1.1 * L.params(), engine="double_backward")
    rows = {"w": L.params(), "gradient": L.gradient(), "H": H @ V, "rebuilt": rebuilt @ V}
    numbers = {"value": L.value(), "norms": L.entries.norms(V)}
    if n < N:
        return here, rows, numbers
    few = {"max_basis": 6, "generator": draw, "max_matvecs": 60}
    pairs, warm = cl.eigsh(H, 2, tol=1e-8, generator=draw), cl.eigsh(H, 2, start=V, distrust=0.1, random_columns=0, **few)
    xtrace, hutchinson = (cl.trace(H, method=m, num_matvecs=8, generator=draw) for m in ("xtrace", "hutchinson"))
    numbers |= {"values": pairs.values, "residuals ±": pairs.residuals, "warm": warm.values}
    for name, m in (("xtrace", xtrace), ("hutchinson", hutchinson)):
        numbers[name] = torch.tensor([m.value, m.error, m.df, m.floor], dtype=F64)
    return here, rows | {"vectors": pairs.vectors}, numbers


def full(model: nn.Module) -> Tensor:
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in model.parameters()])


def trained(
    model: nn.Module, group=None, names=("loss",), optimizer=torch.optim.SGD, steps: int = 2, **options
) -> dict[str, Tensor]:
    """A loop of the user's with a monitor: FSDP means gradients over ranks, here those of unequal shares of a batch."""
    rank, count = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    x, y = examples(N)
    optimizer, found = optimizer(model.parameters(), lr=0.05), {}
    L, test = (cl.Objective(model, "cross_entropy", data, group=group, **options) for data in ((x, y), examples(5)))
    given = {"optimizer": optimizer, "batch_size": 3, "test": test, "announce": None}
    monitor = cl.Monitor(L, names, **given) if names else lambda step, **_: {}
    for step in range(steps):
        F.cross_entropy(model(x[rank::count]), y[rank::count], reduction="sum").mul(count / N).backward()
        for name, m in monitor(step, batch=torch.arange(N)).items():
            if m.value is not None:
                found[f"{name} {step}"] = torch.as_tensor(np.atleast_1d(np.asarray(m.value, dtype=float)))
                found[f"{name} {step} ±"] = torch.as_tensor(np.atleast_1d(np.asarray(m.error, dtype=float)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(x)  # after which FSDP leaves the root's parameters gathered
    return found | {"w": full(model)}


def named() -> list[str]:
    """A third of the diagnostics; of data that are divided, test_ranks.py has all."""
    return [name for name, d in DIAGNOSTICS.items() if "trained" not in d.needs and name not in MICRO_BATCHES][::3]


DIVIDED = [name for name, d in DIAGNOSTICS.items() if d.divided]


def started(rank: int, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))


def ended(found: dict, folder: str) -> None:
    torch.save(found, f"{folder}/{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(rank: int, count: int, folder: str) -> None:
    """One of three ranks: everything."""
    started(rank, count, folder)
    found = operators(net(fsdp), "world") | trained(net(fsdp), "world", named(), torch.optim.Adam)
    parts = [kept(net(fsdp), n, "world") for n in (N, 2)]
    divided = trained(net(fsdp), "world", DIVIDED, torch.optim.Adam, 4, sharded="keep")
    torch.save([*parts, divided], f"{folder}/kept {rank}.pt")
    ended(found | few(net(fsdp), "world"), folder)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("three"))
    together(measure, 3, 3, folder)
    kept = [torch.load(f"{folder}/kept {rank}.pt") for rank in range(3)]
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(3)], kept


def test_operators_of_shards_are_those_of_one_process(three):
    assert_alike(three[0][0], operators(net()) | few(net()))


@pytest.mark.parametrize("i, n", [(0, N), (1, 2)])
def test_vectors_that_ranks_keep_in_parts_are_those_of_one_process(three, i, n):
    _, rows, numbers = kept(net(), n)
    parts = [found[i] for found in three[1]]
    assert torch.equal(torch.cat([here for here, _, _ in parts]).sort().values, torch.arange(len(rows["w"])))
    assert max(len(here) for here, _, _ in parts) < len(rows["w"]) / 2
    for here, own, found in parts:
        assert_alike(own, {name: value[here] for name, value in rows.items()})
        assert_alike(found, numbers)
        assert all(torch.equal(value, parts[0][2][name]) for name, value in found.items())


def test_diagnostics_of_a_sharded_training_are_those_of_one_process(three):
    expected = trained(net(), names=named(), optimizer=torch.optim.Adam)
    drawn = ("batch_sharpness", "batch_gradient_norm_variation")  # which batches they draw at step 1 hangs on rounding
    settled = {name: value for name, value in expected.items() if "1" not in name or not name.startswith(drawn)}
    assert_alike(three[0][0], settled)


def test_diagnostics_of_divided_vectors_are_those_of_one_process(three):
    assert {"loss", "sharpness", "hessian_eigenvalues", "critical_sharpness", "difference_sharpness"} == {*DIVIDED}
    assert_alike(three[1][0][2], trained(net(), names=DIVIDED, optimizer=torch.optim.Adam, steps=4))


@pytest.mark.parametrize("of", [lambda three: three[0], lambda three: [found[2] for found in three[1]]])
def test_all_ranks_have_the_same_bits(three, of):
    zero, *others = of(three)
    for other in others:
        for name, value in zero.items():
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(other[name])), name


def state(model: nn.Module) -> list:
    """What measuring must leave as it is: parts and gradients, their versions, what stands in modules, hooks, generators."""
    parts = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    grads = [p.grad._local_tensor for p in model.parameters() if isinstance(p, DTensor) and p.grad is not None]
    modules = [
        (type(m), m.training, [*map(id, m._parameters.values())], [*m._forward_hooks], [*m._forward_pre_hooks])
        for m in model.modules()
    ]
    groups = [g for m in model.modules() if hasattr(m, "_get_fsdp_state") for g in m._get_fsdp_state()._fsdp_param_groups]
    own = [(g._sharded_state, g._training_state) for g in groups]
    values = [t.clone() for t in (*parts, *grads, *model.buffers(), torch.get_rng_state())]
    return [values, [id(t) for t in (*parts, *grads)], [t._version for t in (*parts, *grads)], modules, own]


def same(before: list, after: list) -> bool:
    (values, *rest), (now, *others) = before, after
    return all(map(torch.equal, values, now)) and rest == others


class Failing(nn.Module):
    """A loss that may be told to fail."""

    on = False

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        if self.on:
            raise LookupError("the loss fails")
        return F.cross_entropy(z, y, reduction="none")


def untouched(group) -> dict[str, bool]:
    """Whether the state of a training is the same after measurements, at each place of a step, and after one that fails."""
    rank, found, loss = dist.get_rank(), {}, Failing()
    model, (x, y) = net(fsdp), examples(N)
    L = cl.Objective(model, loss, (x, y), group=group)

    def check(name: str, fails: bool = False) -> None:
        before, loss.on = state(model), fails
        try:
            cl.measure(L, ["sharpness", "gradient_variance"])
            raised = False
        except LookupError:
            raised = True
        loss.on = False
        found[name] = raised == fails and same(before, state(model))

    check("before")
    value = loss(model(x[rank::2]), y[rank::2]).mean()
    check("between forward and backward")
    value.backward()
    check("with gradients")
    check("failing", fails=True)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    check("after a step")
    return found


def tensor_parallel(model: nn.Module) -> None:
    plan = {"inner": ColwiseParallel(), "again": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


class Scored(nn.Module):
    """A model that is called by a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1).double()

    def score(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def scored(shard=lambda model: None, group=None) -> Tensor:
    torch.manual_seed(0)
    model = Scored()
    shard(model)
    register_fsdp_forward_method(model, "score")
    x = torch.linspace(-1, 1, 15, dtype=F64).view(5, 3)
    L = cl.Objective(model, cl.batch_loss(lambda m, batch: m.score(batch[0])[:, 0]), [(x,)], group=group)
    return cl.dense(cl.hessian(L))


def refused(compute, *kinds: type) -> str:
    try:
        compute()
    except kinds as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    model, data = net(fsdp), examples(N)
    L = cl.Objective(model, "cross_entropy", data, group="world")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {
        "one process": refused(lambda: cl.Objective(model, "cross_entropy", data), ValueError),
        "train": refused(lambda: list(cl.train(L, sgd, cl.Batches(N, 3, 1))), ValueError),
        "penalty": refused(lambda: gradient_norm_penalty(L, None, data), ValueError),
        "noise": refused(lambda: cl.methods.NoisyGD(model.parameters(), 0.1, objective=L, batch_size=2), ValueError),
    }
    K = cl.Objective(model, "cross_entropy", data, group="world", sharded="keep")
    for name, compute in {
        "diagnostics such as gradient_norm": lambda: cl.measure(K, ["sharpness", "gradient_norm"]),
        "batches": lambda: K.gradient(batch=torch.arange(3)),
        "products with the GGN": lambda: cl.ggn(K),
        "per-example gradients": lambda: K.example_gradients(),
        "accuracies": lambda: K.accuracy(),
        "products by engine='traced'": lambda: cl.hessian(K, engine="traced"),
        "gradient flows": lambda: cl.gradient_flow(K, 2, lr=0.1),
        "planes": lambda: landscape.plane(K, K.params(), K.params(), K.params(), [0.0], [0.0]),
        "penalties and weight decay": lambda: TrainedObjective(K, weight_decay=0.1),
    }.items():
        found[name] = refused(compute, ValueError)
    w, v = K.params(), K.gradient()
    if dist.get_rank() == 0:  # and no other
        w[0] = v[1] = torch.nan
    found["diverged"] = cl.measure(K, ["sharpness"], w=w)["sharpness"].note
    found["not finite"] = str((cl.hessian(K) @ v).isfinite().all()) + K.not_finite(v)
    found["density"] = refused(lambda: cl.spectral_density(cl.hessian(K)), ValueError)
    found["choice"] = refused(lambda: cl.Objective(model, "cross_entropy", data, group="world", sharded="no"), ValueError)
    other = net(tensor_parallel)
    found["undivided"] = refused(
        lambda: cl.Objective(other, "cross_entropy", data, group="world", sharded="keep"), ValueError
    )
    found["unchecked"] = str(cl.trace(cl.hessian(K), method="hutchinson", num_matvecs=2) and K.checked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "SMALL", 0)
        patch.setattr(memory, "free_bytes", lambda device: 100)
        found["memory"] = refused(lambda: cl.Objective(model, "cross_entropy", data, group="world"), MemoryError)
    with torch.no_grad():
        model.again.bias.add_(1.0)  # sharded and frozen
    found["frozen"] = refused(lambda: L.value(torch.zeros(L.num_params, dtype=F64)), RuntimeError)
    found["gathered again"] = refused(lambda: L.value(L.params()), RuntimeError)
    model.scale.mul_(1 + dist.get_rank())
    found["buffers"] = refused(L.params, ValueError)
    model.scale = distribute_tensor(model.scale, init_device_mesh("cpu", (2,)), [Shard(0)])
    found["sharded buffer"] = refused(lambda: cl.Objective(model, "cross_entropy", data, group="world"), ValueError)
    return found


def step(rank: int, count: int, folder: str) -> None:
    """One of two ranks: trainings with and without measurements, tensor parallelism, refusals."""
    started(rank, count, folder)
    found = {
        "measured": trained(net(fsdp), "world", ["sharpness", "interaction_trace"], torch.optim.Adam, 3)["w"],
        "bare": trained(net(fsdp), "world", [], torch.optim.Adam, 3)["w"],
        "parallel": operators(net(tensor_parallel), "world"),
        "scored": scored(fully_shard, "world"),
        "untouched": untouched("world"),
        "refusals": refusals(),
    }
    ended(found, folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("two"))
    together(step, 2, 2, folder)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


def test_measuring_changes_no_bit_of_a_sharded_training(two):
    for found in two:
        assert torch.equal(found["measured"], found["bare"])


def test_no_measurement_leaves_a_trace_even_if_it_fails(two):
    for found in two:
        assert found["untouched"] == dict.fromkeys(found["untouched"], True)


def test_parameters_of_tensor_parallelism_are_gathered_too(two):
    assert_alike(two[0]["parallel"], operators(net()))


def test_methods_that_FSDP_calls_as_forward_are_measured(two):
    torch.testing.assert_close(two[0]["scored"], scored(), atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize(
    "name, text",
    [
        ("one process", "parameter conv.weight is sharded over 2 ranks, and one process alone would measure; pass group="),
        ("train", "steps of curvlab.train need every parameter whole on each rank, and parameter conv.weight is sharded"),
        ("penalty", "micro-batches of a penalty need all data in one process"),
        ("frozen", "the frozen parameter again.bias is sharded and has changed since it was gathered; call L.params()"),
        *((name, f"{name} need whole vectors on each rank, and with sharded='keep' each holds parts") for name in WHOLE),
        ("diverged", "parameter conv.weight holds"),
        ("not finite", "parameter conv.weight"),
        ("density", "the Hessian is 120 x 120, of which"),
        ("choice", "sharded is 'no'; expected 'gather' or 'keep'"),
        ("undivided", "needs every variable divided among the 2 ranks of the group, once and in their order, and"),
        ("unchecked", "unchecked: ranks keep parts of the parameters; check a smaller model, or sharded='gather'"),
        ("noise", "optimizers that add noise need every parameter whole on each rank"),
        ("memory", "gathering 8 sharded parameters, which every rank holds whole while it measures, takes"),
        ("sharded buffer", "buffer scale is sharded; expected buffers that every rank has whole, as FSDP leaves them"),
        ("buffers", "differ in buffers such as scale, which SyncBatchNorm would keep alike"),
    ],
)
def test_what_cannot_be_done_with_shards_is_refused(two, name, text):
    assert all(text in found["refusals"][name] for found in two)
    assert not two[0]["refusals"]["gathered again"]
