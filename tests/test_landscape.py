"""Lines and planes of the loss, against evaluations one by one and against a quadratic whose loss is known."""

import numpy as np
import pytest
import torch

import curvlab as cl
from curvlab import landscape, plots

F64 = torch.float64


def quadratic():
    """½ w·A w with eigenvalues 1, 2, 5: a linear model without targets."""
    model = torch.nn.Linear(3, 1, bias=False, dtype=F64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.3, -0.2, 0.1]]))
    x = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=F64).mul(3).sqrt())
    return cl.Objective(model, "squared_error", (x, torch.zeros(3, 1, dtype=F64)))


def test_a_line_is_the_loss_point_by_point():
    L = quadratic()
    w, d = L.params(), torch.tensor([1.0, 0.0, 2.0], dtype=F64)
    found = landscape.line(L, w, d, [-1.0, 0.0, 0.5])
    assert found == pytest.approx([float(L.value(w + a * d)) for a in (-1.0, 0.0, 0.5)])


def test_the_top_plane_of_a_quadratic_has_its_two_top_curvatures():
    L = quadratic()
    zero = torch.zeros(3, dtype=F64)
    found = landscape.top_plane(L, zero, radius=1.0, points=5, path=[zero, torch.tensor([1.0, 0.0, 0.0], dtype=F64)])
    a, b = np.meshgrid(found.alphas, found.betas, indexing="ij")
    assert found.values == pytest.approx(0.5 * (5 * a**2 + 2 * b**2), abs=1e-3)
    assert found.names == ("q_1", "q_2")
    assert found.distances == pytest.approx([0.0, 1.0], abs=1e-2)  # the first axis is not in the plane
    assert found.path == pytest.approx(np.zeros((2, 2)), abs=1e-2)
    figure = plots.plane(found)
    assert figure.axes[0].get_xlabel() == "along q_1"


def test_lines_along_the_eigenvectors_and_the_step():
    L = quadratic()
    step = torch.tensor([-3.0, 0.0, 0.0], dtype=F64)
    found = landscape.top_lines(L, torch.zeros(3, dtype=F64), step=step, radius=2.0, points=5)
    assert found.names == ("q_1", "q_2", "the step")
    for values, curvature in zip(found.values, (5.0, 2.0, 1.0), strict=True):
        assert values == pytest.approx(0.5 * curvature * found.alphas**2, abs=1e-2)
    (axes,) = plots.lines(found).axes
    assert [line.get_label() for line in axes.lines[:3]] == ["along q_1", "along q_2", "along the step"]
    assert np.allclose(axes.lines[0].get_ydata(), found.values[0])


def test_a_step_spans_the_second_direction():
    L = quadratic()
    step = torch.tensor([1.0, 0.0, 1.0], dtype=F64)
    found = landscape.top_plane(L, torch.zeros(3, dtype=F64), step=step, points=3)
    assert found.values[1] == pytest.approx([0.5, 0.0, 0.5], abs=1e-3)  # along the first axis, whose curvature is 1
    with pytest.raises(ValueError, match="the step lies along q_1"):
        landscape.top_plane(L, torch.zeros(3, dtype=F64), step=torch.tensor([0.0, 0.0, 1.0], dtype=F64))


def test_directions_of_another_length_are_refused():
    L = quadratic()
    with pytest.raises(ValueError, match=r"direction has shape \(2,\)"):
        landscape.line(L, L.params(), torch.ones(2, dtype=F64), [0.0])
    with pytest.raises(ValueError, match=r"u has shape \(2,\)"):
        landscape.plane(L, L.params(), torch.ones(2, dtype=F64), torch.ones(3, dtype=F64), [0.0], [0.0])
