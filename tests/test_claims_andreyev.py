"""Verdicts of the claims of Andreyev and Beneventano on planted logs, whose truth is known, and on the control.

Nothing here is compared with a dense reference: a claim reads logs and nothing else.
"""

import numpy as np
import pytest
import torch
from test_claims import climb, wave
from test_claims_cohen import LR, N, judged, plant

import curvlab as cl
from curvlab import Run

SIZES = (8, 64, 512)


def columns(batch, instability, sharpness=None):
    """Series of 500 steps, in units of 2/lr."""
    batch = np.full(500, float(batch)) if np.isscalar(batch) else np.asarray(batch)
    given = {"batch_sharpness": batch, "instability": instability, "sharpness": sharpness}
    given = {name: wave(500, 1.0, 0.1) if values is None else values for name, values in given.items()}
    given["sharpness"] = climb(0.7, start=0.3, rise=150, stay=350) if sharpness is None else sharpness
    return {name: np.asarray(values) * 2 / LR for name, values in given.items()}


class TestBatchSharpnessEdge:
    def verdict(self, path, batch, sharpness=None, *, b=32, **options):
        return judged("batch_sharpness_edge", plant(path / "run", columns(batch, None, sharpness), b=b, **options))

    rise = climb(1.02, start=0.3, rise=150, stay=350)

    def test_holds_when_it_rises_to_2_by_lr(self, tmp_path):
        verdict = self.verdict(tmp_path, self.rise)
        assert verdict.decision == "holds"
        assert verdict.interval[0] < 1.02 < verdict.interval[1]

    @pytest.mark.parametrize(
        ("batch", "options", "decision"),
        [
            (climb(0.5, start=0.2, rise=150, stay=350), {}, "does not hold"),  # settles below
            (climb(1.6, start=0.2, rise=150, stay=350), {}, "does not hold"),  # settles above
            (np.geomspace(0.2, 0.7, 500), {}, "undecided"),  # still rising
            (climb(0.87, start=0.2, rise=150, stay=350), {}, "undecided"),  # at the end of the band, and short of 0.9
            (rise, {"sharpness": np.full(500, 0.3)}, "does not hold"),  # a quadratic
            (rise, {"b": N}, "not applicable"),
            (rise, {"optimizer": {"momentum": 0.9}}, "not applicable"),
        ],
    )
    def test_planted_violations(self, tmp_path, batch, options, decision):
        assert self.verdict(tmp_path, batch, **options).decision == decision

    def test_the_loss_must_still_fall_and_not_diverge(self, tmp_path):
        for name, loss, decision in (
            ("flat", np.full(500, 0.5), "undecided"),
            ("up", np.geomspace(1, 3, 500), "does not hold"),
        ):
            run = plant(tmp_path / name, columns(self.rise, None) | {"loss": loss}, b=32)
            assert judged("batch_sharpness_edge", run).decision == decision

    def test_short_runs_are_undecided(self, tmp_path):
        short = {name: values[:80] for name, values in columns(self.rise, None).items()}
        assert judged("batch_sharpness_edge", plant(tmp_path / "run", short, b=32)).decision == "undecided"


class TestCloser:
    def runs(self, path, levels, instability=1.1, *, seeds=3, sizes=SIZES, drift=0.0, **options):
        made = []
        for b, at in zip(sizes, levels, strict=True):
            for seed in range(seeds):
                shift = 1 + 0.01 * (seed - 1)
                batch = at * shift * (1 + drift * np.linspace(-0.5, 0.5, 500)) + 0.01 * wave(500, 0, 1, seed)
                series = columns(batch, wave(500, instability * shift, 0.1, seed + 7))
                experiment = {"init_seed": seed, "data_seed": seed, "batch_size": [b]}
                made.append(plant(path / f"b{b}s{seed}", series, b=b, experiment=experiment, **options))
        return made

    def verdict(self, path, *given, **options):
        return judged("batch_sharpness_is_closer", self.runs(path, *given, **options))

    @pytest.mark.parametrize("seeds", [1, 3])
    def test_holds_where_it_is_closer_at_every_b(self, tmp_path, seeds):
        verdict = self.verdict(tmp_path, (1.02, 0.98, 1.0), 1.2, seeds=seeds)
        assert verdict.decision == "holds", verdict
        assert verdict.details["seeds"] == dict.fromkeys(SIZES, seeds)
        assert verdict.statistic == pytest.approx(-0.17, abs=0.03)

    @pytest.mark.parametrize(
        ("levels", "options", "decision"),
        [
            ((0.4, 0.98, 1.0), {"instability": 1.2}, "does not hold"),  # worse at one b
            ((0.4, 0.6, 0.9), {"instability": 1.0}, "does not hold"),  # noise balance: instability at 2/lr everywhere
            ((0.5, 0.98, 1.0), {"instability": 1.2, "drift": 0.8}, "undecided"),  # still on its way at one b
            ((1.02, 0.98, 1.0), {"instability": 1.02}, "undecided"),  # equally close
            ((1.0, 1.0), {"sizes": (8, 64)}, "not applicable"),
            ((1.0, 1.0, 1.0), {"sizes": (8, 64, N)}, "not applicable"),  # full batches do not count
            ((1.0, 1.0, 1.0), {"optimizer": {"momentum": 0.9}}, "not applicable"),
        ],
    )
    def test_planted_violations(self, tmp_path, levels, options, decision):
        assert self.verdict(tmp_path, levels, **options).decision == decision

    def test_runs_of_other_settings_are_left_out(self, tmp_path):
        runs = self.runs(tmp_path / "a", (1.02, 0.98, 1.0), 1.2)
        other = self.runs(tmp_path / "b", (0.3, 0.3), 1.0, sizes=(16, 32), lr=0.1)
        verdict = judged("batch_sharpness_is_closer", runs + other)
        assert verdict.decision == "holds"
        assert sorted(verdict.details["runs"]) == sorted(run.path.name for run in runs)


@pytest.mark.slow
def test_the_control_holds_nothing(tmp_path):
    """Linear regression with label noise: instability is at 2/lr, batch sharpness where the data puts it."""
    train, _ = cl.problems.linear_regression(128, 8, seed=3)
    runs, lr = [], 0.14  # a tenth of 2/λ_max
    for b in (4, 16, 64):
        model = cl.problems.linear(8, 1)
        L = cl.Objective(model, "squared_error", train)
        sgd = torch.optim.SGD(model.parameters(), lr=lr)
        names = ["loss", "sharpness", "instability", "batch_sharpness"]
        for _ in cl.train(L, sgd, cl.Batches(128, b, 120), diagnostics=names, run=tmp_path / f"b{b}"):
            pass
        runs.append(Run(tmp_path / f"b{b}"))
    assert {judged("batch_sharpness_edge", run).decision for run in runs} == {"does not hold"}
    assert judged("batch_sharpness_is_closer", runs).decision == "does not hold"
