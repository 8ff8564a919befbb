"""Figures: that every figure is drawn from a log alone and shows what it claims; behavioural."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from test_claims import planted, wave

import curvlab as cl
from curvlab import Measurement, Run, plots


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
    entry = '"sharpness":{"value":10.0,"error":%s,"kind":"%s"}'
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
