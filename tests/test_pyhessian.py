"""PyHessian's interface: products, eigenpairs, traces and densities against dense float64 Hessians of the criterion on all
data at once; signatures and types against the installed PyHessian. Behavioural: that measuring leaves no trace, and what is
refused."""

import copy
import inspect
import random
from functools import partial

import numpy as np
import pyhessian
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, SubsetRandomSampler, TensorDataset

import curvlab.compat.pyhessian as ours
from curvlab.compat.pyhessian import density_generate, get_esd_plot, hessian, normalization


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


def single():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))


def conv():
    layers = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(), nn.Linear(12, 4)
    model = nn.Sequential(*layers)
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


def vectors(n):
    return torch.randn(n, 5).double()


def images(n):
    return torch.randn(n, 1, 3, 3).double()


def classes(n):
    return torch.arange(n) % 4  # so that batches differ in their classes


def focal(outputs, targets):
    p = outputs.softmax(1).gather(1, targets[:, None])
    return (-((1 - p) ** 2) * p.log()).mean()


class Ranked(nn.Module):
    """A criterion with control flow, which vmap cannot take."""

    def forward(self, outputs, targets):
        losses = F.mse_loss(outputs, targets, reduction="none").mean(1)
        return sum(loss if loss > 0.5 else 2 * loss for loss in losses) / len(losses)


WEIGHT = torch.tensor([10.0, 1.0, 1.0, 0.1]).double()
CASES = {  # model, criterion, inputs, targets
    "mlp": (mlp, nn.CrossEntropyLoss(), vectors, classes),
    "conv": (conv, nn.CrossEntropyLoss(), images, classes),
    "weighted": (mlp, nn.CrossEntropyLoss(weight=WEIGHT), vectors, classes),
    "ignored": (mlp, nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1), vectors, classes),
    "mse": (mlp, nn.MSELoss(), vectors, lambda n: torch.randn(n, 4).double()),
    "function": (mlp, F.cross_entropy, vectors, classes),
    "poisson": (mlp, nn.PoissonNLLLoss(), vectors, lambda n: torch.rand(n, 4).double()),
    "squeezed": (
        single,
        lambda o, t: F.binary_cross_entropy_with_logits(o.squeeze(), t),
        vectors,
        lambda n: torch.rand(n).double(),
    ),
    "callable": (mlp, focal, vectors, classes),
    "loop": (mlp, Ranked(), vectors, lambda n: torch.randn(n, 4).double()),
    "concave": (
        mlp,
        lambda outputs, targets: -F.mse_loss(outputs, targets),
        vectors,
        lambda n: torch.zeros(n, 4).double(),
    ),
}


def problem(name, n=22):
    """model, criterion, inputs, targets, and the dense Hessian of the criterion on all of them at once."""
    build, criterion, inputs, targets = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = build().double(), inputs(n), targets(n)
    return model, criterion, x, y, dense(model, criterion, x, y)


def dense(model, criterion, x, y):
    model = copy.deepcopy(model).eval()
    params = list(model.parameters())
    flat = flatten(torch.autograd.grad(criterion(model(x), y), params, create_graph=True))
    return torch.stack([flatten(torch.autograd.grad(g, params, retain_graph=True)) for g in flat])


def flatten(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def loader(x, y, **options):
    return DataLoader(TensorDataset(x, y), batch_size=8, **options)  # a last batch of 6


# -- right answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_eigenpairs_and_products_are_those_of_the_mean_over_all_examples(name):
    model, criterion, x, y, H = problem(name)
    given = (
        {"data": (x, y)},
        {"dataloader": loader(x, y, shuffle=True)},
        {"dataloader": [(x[:15], y[:15]), (x[15:], y[15:])]},
    )
    exact = torch.linalg.eigvalsh(H)
    exact = exact[exact.abs().argsort(descending=True)][:3]
    for options in given:
        h = hessian(model, criterion, **options, cuda=False)
        v = [torch.randn_like(p) for p in h.params]
        form, Hv = h.dataloader_hv_product(v)
        assert torch.allclose(flatten(Hv), H @ flatten(v), atol=1e-10)
        assert form == pytest.approx(float(flatten(v) @ H @ flatten(v)), rel=1e-9)
        values, eigenvectors = h.eigenvalues(tol=1e-6, top_n=3)
        assert values == pytest.approx(exact.tolist(), rel=1e-6)  # in the order of magnitude
        for value, vector in zip(values, eigenvectors, strict=True):
            assert [part.shape for part in vector] == [p.shape for p in model.parameters()]
            flat = flatten(vector)
            assert float(flat.norm()) == pytest.approx(1, abs=1e-9)
            assert float((H @ flat - value * flat).norm()) < 2e-6 * abs(values[0])


def test_a_criterion_is_mapped_over_examples_where_torch_can():
    def mapped(name):
        model, criterion, x, y, _ = problem(name)
        return hessian(model, criterion, data=(x, y), cuda=False).objective.loss.mapped

    assert mapped("callable")
    assert not mapped("loop")


def test_largest_in_magnitude_may_be_negative():
    model, criterion, x, y, _ = problem("concave")
    assert hessian(model, criterion, data=(x, y), cuda=False).eigenvalues()[0][0] < 0


def test_the_error_of_an_eigenvalue_reaches_to_the_spectrum():
    model, criterion, x, y, H = problem("conv")
    h = hessian(model, criterion, data=(x, y), cuda=False)
    values, _ = h.eigenvalues(tol=0.05, top_n=4)
    m = h.eigenvalue_measurement
    assert m.value.tolist() == values
    assert 0 < m.matvecs <= 400
    assert (m.error > 1e-6).any()  # otherwise the next line says little
    assert all(
        float((torch.linalg.eigvalsh(H) - value).abs().min()) <= e + 1e-12
        for value, e in zip(values, m.error, strict=True)
    )


def test_products_end_at_maxIter_with_a_warning():
    model, criterion, x, y, _ = problem("mlp")
    h = hessian(model, criterion, data=(x, y), cuda=False)
    with pytest.warns(
        RuntimeWarning, match=r"maxIter=2 products for each eigenpair left a residual of .* raise maxIter"
    ):
        h.eigenvalues(maxIter=2, top_n=3)
    assert h.eigenvalue_measurement.matvecs == 6


def hutchinson_variance(M):
    return 2 * float(M.square().sum() - M.diagonal().square().sum())


@pytest.mark.parametrize("name", ["mlp", "concave"])
def test_samples_of_the_trace_have_its_mean_and_the_variance_of_random_signs(name):
    model, criterion, x, y, H = problem(name)
    torch.manual_seed(3)
    h = hessian(model, criterion, data=(x, y), cuda=False)
    samples = h.trace(maxIter=1500, tol=0)
    variance = hutchinson_variance(H)
    assert len(samples) == 1500
    assert np.mean(samples) == pytest.approx(float(H.trace()), abs=4 * (variance / 1500) ** 0.5)
    assert np.var(samples) == pytest.approx(variance, rel=0.3)
    assert h.trace_measurement.value == pytest.approx(np.mean(samples))
    assert h.trace_measurement.error == pytest.approx((variance / 1500) ** 0.5, rel=0.2)


def test_the_interval_of_the_trace_contains_it_and_is_as_narrow_as_asked():
    model, criterion, x, y, H = problem("mlp")
    inside, lengths, exact = 0, [], float(H.trace())
    for seed in range(30):
        torch.manual_seed(seed)
        h = hessian(model, criterion, data=(x, y), cuda=False)
        lengths.append(len(h.trace(maxIter=400, tol=0.3)))
        inside += abs(h.trace_measurement.value - exact) <= 0.3 * exact
    assert min(lengths) >= 16
    assert 16 < np.median(lengths) < 200
    assert inside >= 26  # at least 28.5 expected


def test_a_negative_trace_is_not_cut_short():
    model, criterion, x, y, H = problem("concave")
    torch.manual_seed(0)
    theirs = pyhessian.hessian(copy.deepcopy(model).float(), criterion, data=(x.float(), y.float()), cuda=False)
    assert float(H.trace()) < 0
    assert len(theirs.trace()) <= 2  # its criterion divides by a negative number
    assert len(hessian(model, criterion, data=(x, y), cuda=False).trace()) == 100


def test_density_integrates_polynomials_as_its_probes_do():
    """The moments tr(H)/P and tr(H²)/P within the sampling error of random signs."""
    model, criterion, x, y, H = problem("mlp")
    torch.manual_seed(5)
    nodes, weights = hessian(model, criterion, data=(x, y), cuda=False).density(iter=10, n_v=60)
    P, nodes, weights = len(H), np.array(nodes), np.array(weights)
    assert nodes.shape == weights.shape == (60, 10)
    assert np.allclose(weights.sum(1), 1)
    spectrum = torch.linalg.eigvalsh(H).numpy()
    assert spectrum[0] - 1e-9 <= nodes.min()
    assert nodes.max() <= spectrum[-1] + 1e-9
    for power, M in ((1, H), (2, H @ H)):
        moments, error = (weights * nodes**power).sum(1), (hutchinson_variance(M) / 60) ** 0.5 / P
        assert moments.mean() == pytest.approx(float(M.trace()) / P, abs=4 * error)
        assert moments.std() == pytest.approx(error * 60**0.5, rel=0.5)


def test_density_of_a_matrix_of_low_rank_is_exact_and_filled_to_equal_length():
    model = nn.Linear(4, 1, bias=False).double()
    x = torch.diag(torch.tensor([2.0, 2.0, 0.0, 0.0])).double()
    h = hessian(model, nn.MSELoss(), data=(x, torch.zeros(4, 1).double()), cuda=False)  # H = diag(2, 2, 0, 0)
    nodes, weights = h.density(iter=100, n_v=3)
    assert len({len(row) for row in nodes + weights}) == 1
    for row, mass in zip(nodes, weights, strict=True):
        assert np.dot(row, mass) == pytest.approx(1)  # every random sign vector has half its length in each half
        assert np.dot(np.square(row), mass) == pytest.approx(2)


def test_class_weights_are_normalised_over_the_data_set_where_pyhessian_takes_each_batch_alone():
    model, criterion, x, y, H = problem("weighted")
    order = y.argsort(stable=True)
    given = loader(x[order], y[order])
    v = [torch.ones_like(p) for p in model.parameters()]
    exact = H @ flatten(v)
    theirs = flatten(
        pyhessian.hessian(copy.deepcopy(model), criterion, dataloader=given, cuda=False).dataloader_hv_product(v)[1]
    )
    found = flatten(hessian(model, criterion, dataloader=given, cuda=False).dataloader_hv_product(v)[1])
    assert float((found - exact).norm() / exact.norm()) < 1e-12
    assert float((theirs - exact).norm() / exact.norm()) > 0.1


def test_parameters_are_read_at_every_call():
    model, criterion, x, y, _ = problem("mlp")
    h = hessian(model, criterion, data=(x, y), cuda=False)
    with torch.no_grad():
        model[0].weight.mul_(2)
    v = [torch.ones_like(p) for p in model.parameters()]
    assert torch.allclose(flatten(h.dataloader_hv_product(v)[1]), dense(model, criterion, x, y) @ flatten(v))


# -- the same interface --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["__init__", "eigenvalues", "trace", "density", "dataloader_hv_product"])
def test_signatures_are_those_of_pyhessian(name):
    def parameters(owner):
        return [(p.name, p.default, p.kind) for p in inspect.signature(getattr(owner, name)).parameters.values()]

    assert parameters(hessian) == parameters(pyhessian.hessian)


def shape_of(result):
    """Types of nested lists and tuples; tensors by shape."""
    if isinstance(result, torch.Tensor):
        return tuple(result.shape), result.dtype
    if isinstance(result, list | tuple):
        return type(result), [shape_of(part) for part in result]
    return type(result)


def test_results_have_the_types_of_pyhessian():
    model, criterion, x, y, _ = problem("mlp")
    model, x = model.float(), x.float()
    theirs = pyhessian.hessian(copy.deepcopy(model), criterion, data=(x, y), cuda=False)
    own = hessian(model, criterion, data=(x, y), cuda=False)
    assert shape_of(own.eigenvalues(top_n=2)) == shape_of(theirs.eigenvalues(top_n=2))
    assert shape_of(own.trace(maxIter=5, tol=0)) == shape_of(theirs.trace(maxIter=5, tol=0))
    assert shape_of(own.params) == shape_of(theirs.params)
    assert own.device == theirs.device == "cpu"
    assert all(p is q for p, q in zip(own.params, model.parameters(), strict=True))
    assert shape_of(own.density(iter=4, n_v=2)) == (
        tuple,
        [(list, [(list, [float] * 4)] * 2)] * 2,
    )  # theirs needs torch.eig


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e5])
def test_the_smoothed_density_has_the_masses_of_the_eigenvalues(scale):
    density, grid = density_generate(
        [[0.0, scale], [0.0, 4.9 * scale]], [[0.75, 0.25], [0.5, 0.5]], overhead=0.1 * scale
    )
    assert density.sum() * (grid[1] - grid[0]) == pytest.approx(1)
    if scale >= 1:  # otherwise all is one bump, as sigma_squared is no smaller
        assert density[grid > 0.5 * scale].sum() / density.sum() == pytest.approx(0.375, abs=0.01)
        assert density[grid > 3 * scale].sum() / density.sum() == pytest.approx(0.25, abs=0.01)


def test_normalization():
    v = normalization([torch.full((2, 2), 3.0), torch.full((3,), 4.0)])
    assert float(flatten(v).norm()) == pytest.approx(1)
    assert float(flatten(v)[0] / flatten(v)[-1]) == pytest.approx(0.75)
    assert flatten(normalization([torch.zeros(3)])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("batch_num", [1, 2])
def test_a_script_in_the_calls_of_pyhessian(batch_num, tmp_path, monkeypatch):
    """The published example's course: a list of batches of a loader, DataParallel, all three quantities, the figure."""
    monkeypatch.chdir(tmp_path)
    model, criterion, x, y, _ = problem("conv", n=40)
    model = nn.DataParallel(model.float())
    batches = []
    for batch in loader(x.float(), y, shuffle=True):
        batches.append(batch)
        if len(batches) == batch_num:
            break
    model.eval()
    if batch_num == 1:
        computed = hessian(model, criterion, data=batches[0], cuda=False)
    else:
        computed = hessian(model, criterion, dataloader=batches, cuda=False)
    H = dense(
        model.module.double(),
        criterion,
        torch.cat([b[0] for b in batches]).double(),
        torch.cat([b[1] for b in batches]),
    )
    model.float()
    top_eigenvalues, top_eigenvector = computed.eigenvalues()
    trace = computed.trace()
    density_eigen, density_weight = computed.density()
    spectrum = torch.linalg.eigvalsh(H)
    assert top_eigenvalues[-1] == pytest.approx(float(spectrum[spectrum.abs().argmax()]), rel=1e-3)
    assert len(top_eigenvector[0]) == len(list(model.parameters()))
    assert abs(np.mean(trace) - float(H.trace())) <= 4 * (hutchinson_variance(H) / 100) ** 0.5
    assert max(density_eigen[0]) == pytest.approx(float(spectrum[-1]), rel=1e-3)
    get_esd_plot(density_eigen, density_weight)
    assert (tmp_path / "example.pdf").read_bytes().startswith(b"%PDF")


# -- no trace ------------------------------------------------------------------------------------------------------


def test_measuring_leaves_flags_buffers_gradients_and_random_states_alone():
    model, criterion, x, y, _ = problem("conv")
    model.train()
    model[3].eval()
    criterion(model(x), y).backward()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    flags = [module.training for module in model.modules()]
    grads = [p.grad for p in model.parameters()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    h = hessian(model, criterion, dataloader=loader(x, y, shuffle=True), cuda=False)
    h.eigenvalues()
    h.trace(maxIter=20)
    h.density(iter=5)
    h.dataloader_hv_product([torch.ones_like(p) for p in model.parameters()])
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert flags == [module.training for module in model.modules()]
    assert all(
        p.grad is g and torch.equal(g, old) for p, g, old in zip(model.parameters(), grads, before[1], strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[0].values(), strict=True))
    assert not any(g.requires_grad for g in grads)


def test_probes_follow_the_global_seed_and_differ_from_call_to_call():
    model, criterion, x, y, _ = problem("mlp")

    def traces(seed):
        torch.manual_seed(seed)
        h = hessian(model, criterion, data=(x, y), cuda=False)
        return h.trace(maxIter=4), h.trace(maxIter=4)

    first, second = traces(0)
    assert first != second
    assert traces(0) == (first, second)
    assert not set(traces(1)[0]) & set(first)


# -- what is refused -----------------------------------------------------------------------------------------------


class Augmented(Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, i):
        return torch.randn(5).double(), i % 4


class Zero(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x):
        return self.layer(x)


X, Y = torch.randn(22, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(22) % 4
SET = TensorDataset(X, Y)


def refused(criterion=None, **options):
    options = options or {"data": (X, Y)}
    return hessian(mlp().double(), criterion or nn.CrossEntropyLoss(), **options, cuda=False)


REFUSALS = {
    "neither": (
        ValueError,
        "got neither of data and dataloader; pass data=",
        lambda: hessian(mlp(), nn.MSELoss(), cuda=False),
    ),
    "both": (ValueError, "got both of data and dataloader", lambda: refused(data=(X, Y), dataloader=[(X, Y)])),
    "subset": (
        ValueError,
        "draws by a SubsetRandomSampler, which need not visit each example once.*Subset",
        lambda: refused(dataloader=loader(X, Y, sampler=SubsetRandomSampler(range(9)))),
    ),
    "replacement": (
        ValueError,
        "draws by a RandomSampler, which need not visit each example once",
        lambda: refused(dataloader=loader(X, Y, sampler=RandomSampler(SET, replacement=True))),
    ),
    "part": (
        ValueError,
        "draws by a RandomSampler",
        lambda: refused(dataloader=loader(X, Y, sampler=RandomSampler(SET, num_samples=8))),
    ),
    "batch_sampler": (
        ValueError,
        "draws by a list, which need not visit each example once",
        lambda: refused(dataloader=DataLoader(SET, batch_sampler=[[0, 1], [0, 2]])),
    ),
    "augmentation": (
        ValueError,
        "twice gives different values, as random augmentation.*without augmentation",
        lambda: refused(dataloader=DataLoader(Augmented(), batch_size=4)),
    ),
    "iterator": (TypeError, "pass .* a list of batches", lambda: refused(dataloader=iter([(X, Y)]))),
    "sum": (
        ValueError,
        r"criterion gives .* for 22 examples, whose own values have the mean .*Divide a sum by len\(outputs\)",
        lambda: refused(lambda o, t: F.cross_entropy(o, t, reduction="sum")),
    ),
    "sum_module": (ValueError, "reduction='sum'", lambda: refused(nn.CrossEntropyLoss(reduction="sum"))),
    "class_weights": (
        ValueError,
        "whose own values have the mean .*CrossEntropyLoss",
        lambda: refused(partial(F.cross_entropy, weight=WEIGHT)),
    ),
    "coupled": (
        ValueError,
        "take out terms that couple examples",
        lambda: refused(lambda o, t: F.cross_entropy(o - o.mean(0), t)),
    ),
    "not_reduced": (
        ValueError,
        "criterion gives no number for a batch of one example, repeated .*RuntimeError.*expected the mean over a batch",
        lambda: refused(lambda o, t: F.cross_entropy(o, t, reduction="none")),
    ),
    "pairs": (
        ValueError,
        "criterion gives no number for a batch of one example, repeated .*IndexError",
        lambda: refused(lambda o, t: F.cross_entropy(o, t) + o[2].sum()),
    ),
    "maxIter": (ValueError, "maxIter is 0; expected at least 1", lambda: refused().trace(maxIter=0)),
    "top_n": (ValueError, "top_n is 0; expected at least 1", lambda: refused().eigenvalues(top_n=0)),
    "n_v": (ValueError, "n_v is 0; expected at least 1", lambda: refused().density(n_v=0)),
    "not_finite": (
        FloatingPointError,
        "a product with the Hessian is not finite in parameter layer.weight; .*Measure at other parameters",
        lambda: hessian(Zero().double(), lambda o, t: o.square().sum(1).sqrt().mean(), data=(X, Y), cuda=False).trace(),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    error, text, call = REFUSALS[case]
    with pytest.raises(error, match=text):
        call()


def test_without_a_gpu_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(ours.torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="cuda=True, the default as in PyHessian, but torch finds no CUDA device; pass cuda="
    ):
        hessian(mlp(), nn.CrossEntropyLoss(), data=(X.float(), Y))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_by_default_the_gpu_measures_and_the_model_stays_where_it_is():
    model, criterion, x, y, H = problem("conv")
    h = hessian(model, criterion, data=(x, y))
    values, vectors = h.eigenvalues(tol=1e-6)
    assert h.device == "cuda:0"
    assert vectors[0][0].is_cuda
    assert not next(model.parameters()).is_cuda
    assert abs(values[0]) == pytest.approx(float(torch.linalg.eigvalsh(H).abs().max()), rel=1e-6)


def test_a_subset_is_measured_as_the_data_set():
    model, criterion, x, y, _ = problem("mlp")
    h = hessian(
        model, criterion, dataloader=DataLoader(Subset(TensorDataset(x, y), range(9)), batch_size=4), cuda=False
    )
    v = [torch.ones_like(p) for p in model.parameters()]
    assert torch.allclose(flatten(h.dataloader_hv_product(v)[1]), dense(model, criterion, x[:9], y[:9]) @ flatten(v))
