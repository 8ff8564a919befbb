"""What users bring: torch losses that average, weighted targets, models with other outputs, subsets of parameters, wrappers.

Compared with a reference: value, gradient and products with the Hessian of every loss that is taken apart, with those of
the loss itself on all data, at all splits of the data; the Hessian of a subset of parameters with a block of the dense one.
Behaviour only: what is unwrapped.
"""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from cases import EAGER
from torch import nn

import curvlab as cl
from curvlab import losses
from curvlab.cross_entropy import many_classes
from curvlab.hvp import HessianProducts
from curvlab.unwrap import unwrap, unwrap_optimizer


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


N, CLASSES = 10, 3
X, Y = seeded(N, 4), torch.arange(N) % CLASSES
MASKED = torch.where(torch.arange(N) % 4 == 1, -100, Y)
TOKENS = torch.arange(N * 5).view(N, 5) % CLASSES
PARTLY = torch.where((TOKENS + torch.arange(N)[:, None]) % 3 == 0, -100, TOKENS)
PARTLY[3] = -100  # nothing counts in this one
PROBABILITIES = seeded(N, CLASSES, seed=3).softmax(1)
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


class Net(nn.Module):
    """Two layers; `form` is the shape of what comes out."""

    def __init__(self, form="logits", outputs=CLASSES):
        super().__init__()
        self.body, self.head, self.form = nn.Linear(4, 5), nn.Linear(5, outputs), form
        for i, p in enumerate(self.double().parameters()):
            p.data = seeded(*p.shape, seed=i) / 2

    def forward(self, x):
        z = self.head(torch.tanh(self.body(x)))
        if self.form == "positions last":
            return z[:, :, None] + torch.linspace(0, 1, 5) * z.roll(1, 1)[:, :, None]
        if self.form == "classes last":
            return z[:, None, :] + torch.linspace(0, 1, 5)[:, None] * z.roll(1, 1)[:, None, :]
        return {"logits": z, "log": z.log_softmax(1), "sigmoid": z.sigmoid(), "tuple": (z, x), "mapping": {"logits": z},
                "userdict": UserDict(logits=z), "object": Output(z, None)}[self.form]  # fmt: skip


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None


AVERAGING = {
    "cross_entropy": (nn.CrossEntropyLoss(), "logits", Y),
    "probabilities": (nn.CrossEntropyLoss(), "logits", PROBABILITIES),
    "weighted probabilities": (nn.CrossEntropyLoss(CLASS_WEIGHTS), "logits", PROBABILITIES),
    "class weights": (nn.CrossEntropyLoss(CLASS_WEIGHTS), "logits", Y),
    "ignored": (nn.CrossEntropyLoss(), "logits", MASKED),
    "smoothed": (nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.1), "logits", MASKED),
    "ignore a class": (nn.CrossEntropyLoss(ignore_index=1), "logits", Y),
    "positions": (nn.CrossEntropyLoss(CLASS_WEIGHTS), "positions last", PARTLY),
    "function": (F.cross_entropy, "logits", MASKED),
    "nll": (nn.NLLLoss(CLASS_WEIGHTS), "log", MASKED),
    "mse": (nn.MSELoss(), "logits", PROBABILITIES),
    "mse function": (F.mse_loss, "logits", PROBABILITIES),
    "l1": (nn.SmoothL1Loss(beta=0.5), "logits", PROBABILITIES),
    "huber": (nn.HuberLoss(delta=0.3), "logits", PROBABILITIES),
    "bce": (nn.BCELoss(), "sigmoid", PROBABILITIES),
    "bce logits": (nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS), "logits", PROBABILITIES),
    "kl": (nn.KLDivLoss(reduction="batchmean"), "log", PROBABILITIES),
}


@pytest.fixture(params=[losses.CLASSES, 2], ids=["few classes", "many classes"])
def threshold(request, monkeypatch):
    """From how many classes on the cross-entropy is `many_classes`."""
    monkeypatch.setattr(losses, "CLASSES", request.param)


@pytest.mark.usefixtures("threshold")
@pytest.mark.parametrize("sizes", [[10], [3, 7], [1, 1, 8], [4, 4, 2]], ids=str)
@pytest.mark.parametrize("name", AVERAGING)
def test_a_loss_that_averages_is_measured_as_it_averages_over_all_data(name, sizes):
    criterion, form, targets = AVERAGING[name]
    model = Net(form)
    batches = list(zip(X.split(sizes), targets.split(sizes), strict=True))
    L = cl.Objective(model, criterion, batches, chunk_size=3)
    w, v = L.params(), seeded(L.num_params, seed=9)

    def loss(w):
        return criterion(torch.func.functional_call(model, L.unflatten(w), (X,)), targets)

    assert abs(float(L.value(w) - loss(w))) < 1e-14
    gradient = torch.func.grad(loss)(w)
    hv = torch.func.grad(lambda w: torch.func.grad(loss)(w) @ v)(w)
    torch.testing.assert_close(L.gradient(w), gradient, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(cl.hessian(L, w) @ v, hv, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(L.example_gradients(w).mean(0), gradient, atol=1e-14, rtol=1e-12)
    found = cl.measure(L, ["gradient_variance"])["gradient_variance"]
    rows = L.example_gradients(w) - gradient
    assert found.value == pytest.approx(float(rows.square().sum(1).mean()), rel=1e-10)


def test_class_weights_follow_the_precision_of_measuring():
    criterion, model = nn.CrossEntropyLoss(CLASS_WEIGHTS.float()), Net().float()
    L = cl.Objective(model, criterion, (X.float(), Y), dtype=torch.float64)
    assert cl.measure(L, ["ggn_trace"])["ggn_trace"].value > 0
    expected = nn.CrossEntropyLoss(CLASS_WEIGHTS)(model.double()(X.float().double()), Y).detach()
    assert float(L.value()) == pytest.approx(float(expected), rel=1e-12)


def test_a_plain_cross_entropy_keeps_its_likelihood():
    named, module = (cl.Objective(Net(), loss, (X, Y)) for loss in ("cross_entropy", nn.CrossEntropyLoss()))
    assert named.loss is module.loss
    assert module.weights is None
    assert cl.Objective(Net(), nn.CrossEntropyLoss(), (X, MASKED)).loss is not named.loss


@pytest.mark.usefixtures("threshold")
@pytest.mark.parametrize("shift", [0, 1])
def test_the_mean_over_tokens(shift):
    model = Net("classes last")
    L = cl.Objective(model, "next_token" if shift else "token", list(zip(X.split(4), PARTLY.split(4), strict=True)))
    z, y = model(X), PARTLY
    if shift:
        z, y = z[:, :-1], y[:, 1:]
    expected = F.cross_entropy(z.reshape(-1, CLASSES), y.reshape(-1))
    assert float(L.value()) == pytest.approx(float(expected.detach()), rel=1e-13)
    batch = X[:4], PARTLY[:4]  # of the same data, by its own weights
    torch.testing.assert_close(L.gradient(batch=batch), L.gradient(batch=torch.arange(4)))
    model.zero_grad()
    total = sum(L.live_losses(piece.batch) @ piece.weights for piece in L.pieces(size=3)) / L.size
    total.backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), L.gradient())


# -- many classes ------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 3, 3, 1, 4, 2])


@pytest.fixture
def rows():
    return seeded(6, 5).requires_grad_(), (0.1 + seeded(6, seed=1).square()).requires_grad_()


def test_derivatives_of_many_classes(rows):
    def function(z, g):
        return many_classes(z, LABELS) * g

    assert torch.autograd.gradcheck(function, rows, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, rows, check_fwd_over_rev=True)


def test_third_derivatives_of_many_classes(rows):
    def third(loss):
        value = (loss(torch.tanh(rows[0]), LABELS) * rows[1]).sum()
        gradient = torch.autograd.grad(value, rows, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradient), rows, create_graph=True)
        return torch.autograd.grad(sum(h.sin().sum() for h in second), rows)

    expected = third(lambda z, y: F.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(third(many_classes), expected, atol=1e-14, rtol=1e-12)


@pytest.mark.usefixtures("threshold")
@pytest.mark.parametrize("engine", EAGER)
@pytest.mark.parametrize("name", ["token", "next_token"])
def test_products_and_example_gradients_of_tokens(name, engine):
    L = cl.Objective(Net("classes last"), name, (X, PARTLY), chunk_size=4)

    def loss(w):
        z, y = torch.func.functional_call(L.model, L.unflatten(w), (X,)), PARTLY
        z, y = (z[:, :-1], y[:, 1:]) if name == "next_token" else (z, y)
        return F.cross_entropy(z.reshape(-1, CLASSES), y.reshape(-1))

    V = seeded(L.num_params, 3, seed=9)
    found = HessianProducts(L, L.params(), engine=engine)
    assert found.engine == engine
    expected = torch.func.jacfwd(torch.func.grad(loss))(L.params()) @ V
    torch.testing.assert_close(found.matmat(V), expected, atol=1e-13, rtol=1e-12)
    at = cl.measure(L, ["gradient_second_moment_trace"])
    squares = L.example_gradients().square().sum(1).mean()
    assert at["gradient_second_moment_trace"].value == pytest.approx(float(squares), rel=1e-12)


@pytest.mark.parametrize("engine", ["graph", "traced"])
@pytest.mark.parametrize("loss", ["token", "next_token", "cross_entropy"])
def test_one_tensor_of_the_size_of_the_logits_is_kept(loss, engine):
    vocabulary, length = 4096, 1 if loss == "cross_entropy" else 8
    model = nn.Sequential(nn.Embedding(50, 4), nn.Tanh(), nn.Linear(4, vocabulary))
    tokens = torch.arange(6 * length).view(6, length) % 50
    if length == 1:
        model.insert(2, nn.Flatten())
    L = cl.Objective(model, loss, (tokens, tokens[:, 0] if length == 1 else tokens), chunk_size=6)
    logits = 4 * 6 * length * vocabulary
    products = HessianProducts(L, L.params(), engine=engine)
    products.value_and_gradient()
    assert logits <= products.nbytes < 1.1 * logits


@pytest.mark.parametrize("form", ["tuple", "mapping", "userdict", "object"])
def test_named_losses_read_the_logits_of_what_a_model_returns(form):
    plain, other = (cl.Objective(Net(f), "cross_entropy", (X, Y)) for f in ("logits", form))
    names = ["sharpness", "ggn_trace", "fisher_trace", "accuracy"]
    measured = [cl.measure(L, names[:3]) for L in (plain, other)]
    assert all(measured[0][name].value == measured[1][name].value for name in names[:3])
    assert plain.accuracy() == other.accuracy()


@pytest.mark.parametrize("mapping", [dict, UserDict], ids=["dict", "mapping"])
@pytest.mark.parametrize("key", ["labels", "label"])
def test_a_mapping_with_labels_is_inputs_and_targets(mapping, key):
    batches = [mapping({"x": x, key: y}) for x, y in zip(X.split(5), Y.split(5), strict=True)]
    L = cl.Objective(Net(), "cross_entropy", batches)
    assert torch.equal(L.gradient(), cl.Objective(Net(), "cross_entropy", (X, Y)).gradient())


def test_weights_may_be_a_function_of_the_batch():
    batches = list(zip(X.split(4), Y.split(4), strict=True))
    L = cl.Objective(Net(), "cross_entropy", batches, weights=lambda batch: 1.0 + batch[1])
    given = cl.Objective(Net(), "cross_entropy", (X, Y), weights=1.0 + Y)
    torch.testing.assert_close(L.gradient(), given.gradient())
    loss = cl.batch_loss(
        lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"], reduction="none"),
        weights=lambda batch: 1.0 + batch["y"],
    )
    whole = cl.Objective(Net(), loss, [{"x": x, "y": y} for x, y in batches])
    torch.testing.assert_close(whole.gradient(), given.gradient())


# -- subsets of parameters ---------------------------------------------------------------------------------------------

HEAD = slice(25, 43)


@pytest.mark.parametrize(
    "which, place",
    [
        ("head", HEAD),
        ("head.*", HEAD),
        (["head.weight", "head.bias"], HEAD),
        (lambda name, p: "body" not in name, HEAD),
        (lambda name, p: p.ndim == 2, None),
    ],
    ids=["module", "pattern", "names", "predicate", "matrices"],
)
def test_a_subset_of_the_parameters_has_a_block_of_the_hessian(which, place):
    whole, part = (cl.Objective(Net(), "cross_entropy", (X, Y), parameters=p) for p in (None, which))
    index = torch.arange(whole.num_params)
    index = index[place] if place else torch.cat([index[:20], index[25:40]])
    dense = cl.dense(cl.hessian(whole))[index][:, index]
    torch.testing.assert_close(cl.dense(cl.hessian(part)), dense, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(part.gradient(), whole.gradient()[index])
    names = ["sharpness", "interaction_trace", "gradient_variance", "fisher_trace", "layer_sharpness"]
    found = cl.measure(part, names, batch_size=2)
    assert found["sharpness"].value == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-3)
    rows = whole.example_gradients()[:, index]
    assert found["gradient_variance"].value == pytest.approx(float((rows - rows.mean(0)).square().sum(1).mean()))
    assert part.describe()["subset"] == part.names


def test_a_tied_parameter_answers_to_each_of_its_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    L = cl.Objective(model, "cross_entropy", (X, Y), parameters="2")
    assert L.names == ["0.weight", "2.bias"]


def test_a_subset_is_measured_where_all_is_trained():
    model = Net()
    L = cl.Objective(model, "cross_entropy", (X, Y), parameters="head")
    with pytest.raises(ValueError, match=r"has a subset of the model.s parameters.*Monitor"):
        next(cl.train(L, torch.optim.SGD(model.parameters(), lr=0.1), cl.Batches(N, N, 2)))


# -- wrappers ------------------------------------------------------------------------------------------------------------


def test_what_is_wrapped_is_measured_unwrapped():
    class _FabricModule(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Net()
    wrapped = _FabricModule(nn.DataParallel(torch.compile(model, backend="eager")))
    assert unwrap(wrapped) is model
    L = cl.Objective(wrapped, "cross_entropy", (X, Y))
    assert L.names == [name for name, _ in model.named_parameters()]
    assert torch.equal(L.gradient(), cl.Objective(model, "cross_entropy", (X, Y)).gradient())


def test_optimizers_are_unwrapped():
    class AcceleratedOptimizer(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    sgd = torch.optim.SGD(Net().parameters(), lr=0.1)
    assert unwrap_optimizer(AcceleratedOptimizer(sgd)) is sgd
    assert unwrap_optimizer(sgd) is sgd


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_pass_patched_for_mixed_precision_is_put_aside(fails):
    model, plain = Net().float(), Net().float()
    model._original_forward = model.forward

    def cast(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self._original_forward(x).float()

    model.forward = patched = MethodType(cast, model)
    L = cl.Objective(model, "cross_entropy", (X.float(), Y))
    reference = cl.Objective(plain, "cross_entropy", (X.float(), Y))
    v = torch.ones(L.num_params)
    assert torch.equal(cl.hessian(L) @ v, cl.hessian(reference) @ v)
    if fails:
        with pytest.raises(ZeroDivisionError), L.measuring():
            1 / 0  # noqa: B018
    assert vars(model)["forward"] is patched
    assert not torch.equal(model(X.float()), plain(X.float()))
