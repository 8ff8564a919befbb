"""Figures: that every figure is drawn from a log alone and shows what it claims; behavioural."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from test_claims import planted, wave

import curvlab as cl
from curvlab import Measurement, Run, plots
from curvlab.plots.series import smooth


@pytest.fixture
def run(tmp_path):
    x = np.concatenate([np.full(50, 0.1), wave(70, 1.0, 0.1)])
    return planted(tmp_path / "run", s=1.1 * x, x=x, u=x, y=x - 1)


def texts(figure):
    found = []
    for axes in figure.axes:
        found += [axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")]
        legend = axes.get_legend()
        found += [t.get_text() for t in legend.get_texts()] if legend else []
    return " | ".join(found)


def test_edge_of_stability_names_axes_curves_and_threshold(run):
    figure = plots.edge_of_stability(run)
    words = texts(figure)
    for word in ("training loss", "step", "curvature", "sharpness", "interaction-aware", "2/lr = 10", "full batch"):
        assert word in words
    threshold = [line for line in figure.axes[1].lines if "2/lr" in str(line.get_label())]
    assert np.allclose(threshold[0].get_ydata(), 10.0)


def test_error_bands_are_the_intervals(tmp_path):
    run = planted(tmp_path / "run", s=np.full(30, 1.0))
    entry = '"sharpness": {"value": 10.0, "error": %s, "kind": "%s"}'
    text = (run.path / "measurements.jsonl").read_text().replace(entry % ("0.0", "exact"), entry % ("2.0", "bound"))
    (run.path / "measurements.jsonl").write_text(text)
    figure = plots.edge_of_stability(Run(run.path))
    band = figure.axes[1].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (8.0, 12.0)


def test_momentum_gets_no_line_at_2_by_lr(tmp_path):
    run = planted(tmp_path / "run", s=np.full(30, 1.0), optimizer={"momentum": 0.9})
    assert "2/lr" not in texts(plots.edge_of_stability(run))


def test_loss_difference_draws_the_line_of_eq_6(run):
    figure = plots.loss_difference(run)
    line = figure.axes[0].lines[0]
    assert np.allclose(line.get_ydata(), line.get_xdata() - 1)


@pytest.mark.slow
def test_batch_sizes_orders_the_runs(tmp_path):
    runs = []
    for b, u in ((128, 0.9), (8, 0.3)):
        run = planted(tmp_path / f"b{b}", s=np.full(40, 1.0), u=np.full(40, u), b=b)
        text = (
            (run.path / "measurements.jsonl")
            .read_text()
            .replace('"loss":', '"gradient_concentration":{"value":0.5,"error":0.0,"kind":"exact"},"loss":')
        )
        (run.path / "measurements.jsonl").write_text(text)
        runs.append(Run(run.path))
    words = texts(plots.batch_sizes(runs))
    assert words.index("b = 8") < words.index("b = 128")
    paths = plots.plot(runs, tmp_path / "out")
    assert [p.name for p in paths] == ["batch_sizes.png", *["edge_of_stability.png", "quantities.png"] * 2]


def test_nothing_to_draw_is_said(tmp_path):
    empty = Run.create(tmp_path / "empty", {})
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.plot(empty)


def test_plots_need_no_torch():
    code = "import sys, curvlab.plots, curvlab.claims\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_notebook_shows_the_whole_figure_without_pyplot(run):
    figure = plots.edge_of_stability(run)
    pixels = imread(io.BytesIO(figure._repr_png_()))
    assert pixels.shape[:2] == (560, 720)
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 10  # curves, bands, text


def test_what_was_measured_over_an_axis_is_drawn_with_its_interval():
    two, zero = np.array([4.0, 2.0]), np.zeros(2)
    found = {
        "hessian_eigenvalues": Measurement(two, np.ones(2), "bound", axis=("index", (1, 2))),
        "layer_gradient_norm": Measurement(two, zero, axis=("layer", ("first", "second"))),
        "interaction_sharpness": Measurement(two, np.ones(2), "sem", np.full(2, 5.0), axis=("batch_size", (8, 32))),
        "hessian_density": Measurement(two, zero, "sem", np.full(2, 5.0), axis=("eigenvalue", (0.0, 1.0))),
        "loss": Measurement(1.0),
        "gradient_noise_scale": Measurement(None, note="zero gradient"),
    }
    figure = plots.measurements(found, title="a point")
    assert [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()] == list(found)[:4]
    spectrum, layers, sizes, density = figure.axes[:4]
    ends = spectrum.collections[0].get_segments()
    assert [(s[0][1], s[1][1]) for s in ends] == [(3.0, 5.0), (1.0, 3.0)]
    assert [t.get_text() for t in layers.get_yticklabels()] == ["first", "second"]
    assert [bar.get_width() for bar in layers.patches] == [4.0, 2.0]
    assert (sizes.get_xscale(), density.get_yscale(), density.get_xlabel()) == ("log", "log", "eigenvalue")
    with pytest.raises(ValueError, match="no quantity has an axis"):
        plots.measurements({"loss": Measurement(1.0)})


def test_a_density_is_drawn_for_any_operator():
    A = torch.diag(torch.cat([torch.zeros(90), torch.full((10,), 5.0)])).double()
    found = cl.spectral_density(A, generator=torch.Generator().manual_seed(0))
    (axes,) = plots.density(found, title="planted").axes
    x, y = axes.lines[0].get_data()
    assert np.allclose(x, found.grid)
    peaks = x[y > 0.1 * y.max()]
    assert ((np.abs(peaks) < 0.5) | (np.abs(peaks - 5) < 0.5)).all()
    assert peaks.min() < 0.5 < 4.5 < peaks.max()


def logged(path, measured, *, steps=60, lr=0.2, threshold=True, optimizer=None, batch_size=32, config=None, **beside):
    """A run whose quantities, functions of the step, are measured at steps of their own: {name: (every, function)}."""
    settings = {"name": "SGD", "momentum": 0.0} | (optimizer or {})
    training = {"objective": {"examples": 1024}, "optimizer": settings, "batch_size": batch_size, "probe_seed": 0}
    run = Run.create(path, {"training": training} | (config or {}))
    for step in range(steps):
        entries = {
            name: entry if isinstance(entry := value(step), dict) else {"value": entry, "error": 0.0, "kind": "exact"}
            for name, (every, value) in measured.items()
            if step % every == 0
        }
        rate = lr(step) if callable(lr) else lr
        factor = 1 + settings["momentum"]
        record = {"step": step, "lr": rate} | ({"threshold": threshold and 2 * factor / rate} if threshold else {})
        run.append(record | {key: f(step) for key, f in beside.items()} | {"measurements": entries})
    run.close()
    return Run(path)


def line_of(axes, label):
    (found,) = (line for line in axes.lines if str(line.get_label()).startswith(label))
    return found


def cosine(step):
    return 0.2 * (0.51 + 0.49 * np.cos(np.pi * step / 60))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_bound_is_taken_at_the_steps_of_its_own_parts(tmp_path, momentum):
    def rho(step):
        return 0.5 + 0.005 * step

    measured = {"loss": (1, lambda t: 1.0 / (1 + t)), "sharpness": (7, lambda t: 9.0)}
    measured |= {"interaction_sharpness": (3, lambda t: 5.0), "gradient_concentration": (5, rho)}
    run = logged(tmp_path / "run", measured, lr=cosine, optimizer={"momentum": momentum})
    bottom = plots.edge_of_stability(run).axes[1]
    steps = np.arange(0, 60, 5)
    limit = (2 + 2 * momentum) / cosine(np.arange(60))
    bound = line_of(bottom, r"$\rho_b$ · threshold of SGD" if momentum else r"$2\rho_b")
    assert np.array_equal(bound.get_xdata(), steps)
    assert np.allclose(bound.get_ydata(), smooth(rho(steps) * limit[::5]))
    drawn = line_of(bottom, "threshold of SGD = 19 ..." if momentum else "2/lr = 10 ...")
    assert np.array_equal(drawn.get_xdata(), np.arange(60))
    assert np.allclose(drawn.get_ydata(), limit)
    assert np.array_equal(line_of(bottom, "sharpness").get_xdata(), np.arange(0, 60, 7))


def test_adaptive_optimizers_have_no_interaction_bound(tmp_path):
    measured = {name: (1, lambda t: 9.0) for name in ("sharpness", "preconditioned_sharpness", "interaction_sharpness")}
    measured["gradient_concentration"] = (1, lambda t: 0.5)
    run = logged(tmp_path / "run", measured, optimizer={"name": "Adam"}, lr=0.2)
    words = texts(plots.edge_of_stability(run))
    assert "preconditioned" in words
    assert "rho" not in words
    assert "interaction" not in words
    with pytest.raises(ValueError, match="cannot be compared over batch sizes: expected interaction_sharpness"):
        plots.batch_sizes([run])


def test_an_optimizer_without_a_known_threshold_gets_no_line(tmp_path):
    run = logged(tmp_path / "run", {"sharpness": (1, lambda t: 9.0)}, threshold=False)
    text = (run.path / "measurements.jsonl").read_text().replace('"lr":0.2,', '"lr":0.2,"threshold":null,')
    assert "2/lr = 10" in texts(plots.edge_of_stability(run))  # an old log, of plain descent
    (run.path / "measurements.jsonl").write_text(text)
    assert "2/lr" not in texts(plots.edge_of_stability(Run(run.path)))


def test_without_a_loss_that_of_the_batches_is_drawn_or_none(tmp_path):
    run = logged(tmp_path / "a", {"sharpness": (2, lambda t: 9.0)}, batch_loss=lambda t: 1.0 + t)
    top, _ = plots.edge_of_stability(run).axes
    assert top.get_ylabel() == "mini-batch loss"
    assert np.array_equal(top.lines[0].get_ydata(), 1.0 + np.arange(60))
    run = logged(tmp_path / "b", {"sharpness": (2, lambda t: 9.0)})
    (only,) = plots.edge_of_stability(run).axes
    assert np.array_equal(line_of(only, "sharpness").get_xdata(), np.arange(0, 60, 2))
    assert "edge_of_stability.png" in [path.name for path in plots.plot(run)]
    run = logged(tmp_path / "c", {"gradient_norm": (1, lambda t: 1.0)})
    with pytest.raises(ValueError, match="has no curvature to draw; measure one of sharpness"):
        plots.edge_of_stability(run)


def test_what_was_measured_once_is_a_point(tmp_path):
    run = logged(tmp_path / "a", {"loss": (100, lambda t: 1.0), "sharpness": (100, lambda t: 9.0)}, steps=1)
    top, bottom = plots.edge_of_stability(run).axes
    assert [line.get_marker() for line in (top.lines[0], *bottom.lines)] == ["o", ".", "o"]


def test_a_curve_over_batch_sizes_is_drawn_at_that_of_training(tmp_path):
    def curve(step):
        return {"value": [1.0, 4.0], "error": [0.0, 0.0], "kind": "exact", "axis": ["batch_size", [8, 32]]}

    measured = {"interaction_sharpness": (1, curve), "gradient_concentration": (1, curve)}
    run = logged(tmp_path / "run", measured)
    (axes,) = plots.edge_of_stability(run).axes
    assert set(line_of(axes, "interaction-aware").get_ydata()) == {4.0}
    assert "batch size 32" in texts(axes.figure)
    assert set(line_of(axes, r"$2\rho_b").get_ydata()) == {40.0}


def test_loss_differences_are_compared_at_the_steps_that_all_have(tmp_path):
    measured = {
        "instability": (2, lambda t: 10.0 + t), "expected_loss_difference": (3, lambda t: -0.01 * (t + 1)),
        "gradient_norm": (1, lambda t: 1.0 + t),
    }  # fmt: skip
    run = logged(tmp_path / "run", measured, lr=cosine)
    figure = plots.loss_difference(run)
    steps = np.arange(0, 60, 6)
    drawn = figure.axes[0].collections[-1].get_offsets()
    lr = cosine(steps)
    assert np.allclose(drawn, np.stack([(10 + steps) * lr / 2, -0.01 * (steps + 1) / (lr * (1 + steps) ** 2)], axis=1))
    odd = {"instability": (1, lambda t: None if t else 1.0), "gradient_norm": (1, lambda t: None if not t else 1.0)}
    run = logged(tmp_path / "odd", odd | {"expected_loss_difference": (1, lambda t: 1.0)})
    with pytest.raises(ValueError, match="has no step at which expected_loss_difference, instability"):
        plots.loss_difference(run)


def test_batch_sizes_draws_each_run_against_its_own_bound(tmp_path):
    runs = [
        logged(
            tmp_path / f"{b}-{every}",
            {"interaction_sharpness": (1, lambda t, b=b: b / 10), "gradient_concentration": (every, lambda t: 0.5)},
            batch_size=b, lr=cosine,
        )
        for b, every in ((8, 4), (32, 1), (32, 6))
    ]  # fmt: skip
    left, _ = plots.batch_sizes(runs).axes
    assert [t.get_text().split(" =")[0] for t in left.get_legend().get_texts()] == ["b", "b", "2/lr"]
    dashed = [line for line in left.lines if line.get_linestyle() == "--"][:3]
    for line, every in zip(dashed, (4, 1, 6), strict=True):
        steps = np.arange(0, 60, every)
        assert np.array_equal(line.get_xdata(), steps)
        assert np.allclose(line.get_ydata(), smooth(1.0 / cosine(steps)))


def test_quantities_says_why_there_is_no_value_and_draws_long_curves(tmp_path):
    def spectrum(step):
        value = [float(step + 20 - i) for i in range(15)] if step < 59 else None
        axis = ["index", list(range(1, 16))]
        return {"value": value, "error": 0.5, "kind": "bound"} | ({"axis": axis} if value else {})

    def nothing(step):
        return {"value": None, "error": 0.0, "kind": "exact", "note": "no step before"}

    run = logged(tmp_path / "run", {"hessian_eigenvalues": (1, spectrum), "secant_sharpness": (1, nothing)})
    curve, empty = (ax for ax in plots.quantities(run).axes if ax.get_visible())
    assert curve.get_title(loc="left") == "hessian_eigenvalues, at step 58"
    assert np.array_equal(curve.lines[0].get_ydata(), 78.0 - np.arange(15))
    assert "no step before" in empty.texts[0].get_text()


class TestBands:
    @pytest.fixture
    def runs(self, tmp_path):
        """Two rates, three seeds each; the third seed is measured at every other step."""

        def make(lr, seed):
            every = 2 if seed == 2 else 1
            measured = {
                "loss": (every, lambda t: (1 + 0.1 * seed) / (1 + t)),
                "sharpness": (every, lambda t: 1 / lr + seed**2 + 0.01 * t),
            }
            experiment = {
                "data": "digits", "model": "mlp", "activation": "tanh", "n": 64, "lr": lr, "init_seed": seed,
                "every": every,
            }  # fmt: skip
            return logged(tmp_path / f"{lr}-{seed}", measured, lr=lr, config={"experiment": experiment})

        return [make(lr, seed) for lr in (0.1, 0.2) for seed in range(3)]

    def test_runs_that_differ_in_seeds_give_their_mean_and_t_interval(self, runs):
        figure = plots.bands(runs)
        _, axes = figure.axes
        label = "lr = 0.2, mean of 3 runs, 95%, at the 30 of 60 steps that all have"
        mean = line_of(axes, label)
        steps = np.arange(0, 60, 2)
        values = np.stack([5 + seed**2 + 0.01 * steps for seed in range(3)])
        assert np.array_equal(mean.get_xdata(), steps)
        assert np.allclose(mean.get_ydata(), values.mean(0))
        half = 4.302652729911275 * values.std(0, ddof=1) / np.sqrt(3)  # Student's t with 2 degrees of freedom
        band = axes.collections[1].get_paths()[0].vertices
        at = band[band[:, 0] == 20.0][:, 1]
        assert (at.min(), at.max()) == pytest.approx((5 + 5 / 3 + 0.2 - half[10], 5 + 5 / 3 + 0.2 + half[10]))
        faint = [line for line in axes.lines if line.get_alpha()]
        assert [len(line.get_xdata()) for line in faint] == [60, 60, 30] * 2

    def test_thresholds_are_those_of_the_groups(self, runs):
        axes = plots.bands(runs).axes[1]
        assert set(line_of(axes, "2/lr = 20").get_ydata()) == {20.0}
        assert set(line_of(axes, "2/lr = 10").get_ydata()) == {10.0}

    def test_what_is_asked_for_is_drawn(self, runs):
        figure = plots.bands(runs[:3], ["sharpness"])
        (axes,) = figure.axes
        assert axes.get_ylabel() == "sharpness"
        assert "lr = 0.1" in axes.get_title(loc="left")
        with pytest.raises(ValueError, match=r"nothing to draw for instability in .*; all runs have loss, sharpness"):
            plots.bands(runs, ["instability"])
        with pytest.raises(ValueError, match="name at least one run"):
            plots.bands([])

    def test_a_run_on_its_own_and_runs_without_a_common_step(self, runs, tmp_path):
        (axes,) = plots.bands(runs[:1], ["loss"]).axes
        assert "1 run" in texts(axes.figure)
        assert not axes.collections
        early = logged(tmp_path / "x", {"loss": (1, lambda t: None if t > 5 else 1.0)}, config={"seed": 1})
        late = logged(tmp_path / "y", {"loss": (1, lambda t: None if t < 6 else 1.0)}, config={"seed": 2})
        assert "no step in common" in texts(plots.bands([early, late]))

    def test_one_seed_that_diverges_leaves_the_view(self, runs, tmp_path):
        wild = logged(
            tmp_path / "w", {"loss": (1, lambda t: 10.0**t), "sharpness": (1, lambda t: 10.0**t)}, lr=0.2,
            config={"experiment": runs[0].config["experiment"] | {"lr": 0.2}},
        )  # fmt: skip
        loss, sharpness = plots.bands([*runs, wild]).axes
        assert loss.get_ylim()[1] < 20
        assert sharpness.get_ylim()[1] < 100
