"""What is said of the speed of products: behaviour only. Which engine wins is never tested."""

import logging
import time

import matplotlib.image
import pytest
import torch
from torch import nn

import curvlab as cl
from curvlab import plots
from curvlab.throughput import EAGER, Speed, compare, recommended, throughput
from curvlab.timing import Spread, one_stage, timed


def mlp(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return cl.Objective(model, "cross_entropy", (torch.randn(12, 4), torch.randint(3, (12,))), **options)


def speed(name, first, product, setup, used=None):
    return Speed(name, used or name, Spread(first, first, first), Spread(product, product, product), setup=setup)


def test_rounds_run_every_candidate_once_in_changing_order_and_time_its_stages():
    calls = []

    def slow():
        calls.append("slow")
        yield
        time.sleep(0.02)
        yield
        calls.append("slow ends")

    seconds = timed([slow, one_stage(lambda: calls.append("fast"), 2)], 8, warm_up=1)
    assert seconds.shape == (8, 3, 2)
    assert (seconds[:, 1, 1] > 0.02).all()  # by the clock
    assert (seconds[:, [0, 2], 1] < 0.02).all()
    assert seconds[:, 1, 0].mean() < 0.01  # sleeping takes no CPU time
    rounds = "".join(name[0] for name in calls if name != "slow ends").replace("ff", "f")
    assert calls.count("slow ends") == 9
    halves = {rounds[i : i + 2] for i in range(2, len(rounds), 2)}
    assert halves == {"sf", "fs"}


def test_engines_agree_and_say_what_they_are_and_keep():
    L = mlp()
    before = L.params()
    speeds = throughput(L, rounds=2)
    assert [s.name for s in speeds] == [s.used for s in speeds] == list(EAGER)
    assert torch.equal(before, L.params())
    for s in speeds:
        assert s.difference < (1e-3 if s.name == "differences" else 1e-5)
        assert s.first.low <= s.first.median <= s.first.high
        assert s.product_ratio.median > 0
        assert s.per_second == 1 / s.product.median
    kept = {s.name: s.nbytes for s in speeds}
    assert kept["graph"] > 0 < kept["traced"]
    assert kept["double_backward"] == kept["forward_over_reverse"] == kept["differences"] == 0
    traced = next(s for s in speeds if s.name == "traced")
    assert traced.setup > max(0.02, next(s for s in speeds if s.name == "graph").setup)  # recording


def test_what_falls_back_or_fails_says_why(caplog):
    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.cell(x if x.sum() < 1e9 else 2 * x)[0][:, -1])

    torch.manual_seed(0)
    L = cl.Objective(Bent(), "cross_entropy", (torch.randn(6, 3, 4), torch.randint(3, (6,))), chunk_size=3)
    with caplog.at_level(logging.WARNING):
        speeds = {s.name: s for s in throughput(L, rounds=1)}
    assert not caplog.records  # a note instead of a line in the log
    assert speeds["traced"].used == "graph"
    assert "no trace" in speeds["traced"].note
    assert speeds["forward_over_reverse"].used == "forward_over_reverse"  # of recurrent layers too
    assert recommended(list(speeds.values())).name in ("graph", "double_backward")


def test_graphs_that_do_not_fit_are_counted():
    L = mlp(chunk_size=2)
    L.memory = int(2 * 3.5 * L.graph_bytes * L.chunk_size)
    (found,) = throughput(L, engines=["graph"], rounds=1)
    assert found.note == "keeps 3 of 6 chunks"
    assert found.nbytes == int(3 * L.graph_bytes * 2)


def test_a_candidate_with_another_product_is_seen():
    A = torch.diag(torch.arange(1.0, 4.0))
    starts = {"right": lambda: A.__matmul__, "wrong": lambda: lambda v: 1.5 * (A @ v), "none": lambda: 1 / 0}
    right, wrong, none = compare(lambda: A @ A, starts, torch.ones(3), rounds=1)
    assert right.difference == 0
    assert wrong.difference == pytest.approx(0.5)
    assert none == Speed("none", note="ZeroDivisionError: division by zero")
    assert [s.name for s in compare(lambda: A, {"none": starts["none"]}, torch.ones(3))] == ["none"]


def test_the_recommendation_counts_recording_and_points():
    graph, traced = speed("graph", 1.0, 2.0, 0.0), speed("traced", 1.5, 1.5, 30.0)
    fallen = speed("compiled", 0.1, 0.1, 0.0, used="graph")
    assert graph.seconds(20, 1) == 41
    assert traced.seconds(20, 2) == 30 + 2 * 31.5
    assert recommended([graph, traced, fallen]) is graph
    assert recommended([graph, traced, fallen], points=4) is traced
    assert recommended([graph, traced, fallen], products=1, points=1000) is graph


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"engines are \('fast',\); expected some of \('graph'"):
        throughput(mlp(), engines=("fast",))
    with pytest.raises(ValueError, match=r"engines are \(\); expected some of"):
        throughput(mlp(), engines=())
    with pytest.raises(ValueError, match="rounds is 0; expected at least 1"):
        throughput(mlp(), engines=("graph",), rounds=0)
    with pytest.raises(ValueError, match="no engine works: traced: broken"):
        recommended([Speed("traced", note="broken")])


def test_bars_are_drawn_also_of_what_failed(tmp_path):
    fine = Speed("graph", "graph", *[Spread(1.0, 0.9, 1.2)] * 4, setup=0.0)
    panels = {"one": [fine, Speed("forward_over_reverse", note="NotImplementedError: no rule")], "two": [fine]}
    figure = plots.throughput(panels)
    assert any("no rule" in text.get_text() for text in figure.axes[0].texts)
    figure.savefig(tmp_path / "bars.png")
    assert matplotlib.image.imread(tmp_path / "bars.png")[..., :3].std() > 0.05
