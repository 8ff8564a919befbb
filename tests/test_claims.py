"""Verdicts of the claims on planted series, whose truth is known by construction, and on the real control.

Nothing here is compared with a dense reference: a claim reads logs and nothing else. Each planted series that breaks one
condition of a rule must lose its "holds"; the control, linear regression, must never get one.
"""

import json

import numpy as np
import pytest
import scipy.stats

from curvlab import Run, claims
from curvlab.claims.plain_descent import plateau, plateau_start
from curvlab.claims.statistics import block_bootstrap, first_sustained, level, trend

LR = 0.2
N = 1024


def planted(path, *, s=None, x=None, y=None, u=None, loss=None, b=N, lr=LR, optimizer=None, trained_loss=None, seed=0):
    """A run folder whose log holds series given in units of 2/lr."""
    settings = {"name": "SGD", "momentum": 0.0, "weight_decay": 0.0} | (optimizer or {})
    training = {"objective": {"examples": N}, "optimizer": settings, "batch_size": b, "replacement": False}
    training["trained_loss"] = trained_loss
    given = {"sharpness": s, "instability": x, "interaction_sharpness": u}
    columns = {name: np.asarray(v) * 2 / lr for name, v in given.items() if v is not None}
    steps = len(next(iter(columns.values())))
    columns["loss"] = np.geomspace(1.0, 0.5, steps) if loss is None else np.asarray(loss)
    columns["gradient_norm"] = np.full(steps, 2.0)
    if y is not None:
        columns["expected_loss_difference"] = np.asarray(y) * lr * 4.0
    path.mkdir(parents=True)  # without the provenance of a real run, which takes longer than everything else
    (path / "config.json").write_text(json.dumps({"training": training, "seed": seed}))
    with (path / "measurements.jsonl").open("w") as stream:
        for i in range(steps):
            numbers = {name: None if np.isnan(v[i]) else float(v[i]) for name, v in columns.items()}
            entries = {name: {"value": x, "error": 0.0, "kind": "exact"} for name, x in numbers.items()}
            record = {"step": i, "lr": lr if np.isscalar(lr) else float(lr[i]), "measurements": entries}
            stream.write(json.dumps(record) + "\n")
    return Run(path)


def wave(steps, center, size, seed=0):
    """A level with an oscillation of period 2, a slow one, and noise, as at the edge."""
    i = np.arange(steps)
    noise = np.random.default_rng(seed).standard_normal(steps)
    return center + size * (0.5 * (-1.0) ** i + 0.5 * np.sin(i / 9) + 0.3 * noise)


def climb(to, *, start=0.6, rise=150, stay=450, size=0.03):
    return np.concatenate([np.linspace(start, to, rise), wave(stay, to, size)])


class TestEdgeOfStability:
    def verdict(self, tmp_path, s, **options):
        return claims.cohen2021.edge_of_stability(planted(tmp_path / "run", s=s, **options))

    def test_holds_when_sharpness_climbs_and_hovers_above(self, tmp_path):
        verdict = self.verdict(tmp_path, climb(1.08))
        assert verdict.decision == "holds"
        assert verdict.interval[0] < 1.08 < verdict.interval[1]
        assert 120 < verdict.details["crossing"] < 150

    @pytest.mark.parametrize(
        ("s", "decision"),
        [
            (climb(0.9, size=0.02), "does not hold"),  # hovers below
            (climb(1.8), "does not hold"),  # far above
            (np.linspace(0.3, 0.8, 600), "undecided"),  # still rising
            (climb(1.08)[:160], "undecided"),  # crosses at the end
            (climb(1.08)[:60], "undecided"),  # short
            (np.concatenate([[1.3, 1.2], np.full(598, 0.7)]), "does not hold"),  # above for two steps at the start
        ],
    )
    def test_planted_violations(self, tmp_path, s, decision):
        assert self.verdict(tmp_path, s).decision == decision

    def test_a_rising_loss_is_not_enough(self, tmp_path):
        assert self.verdict(tmp_path, climb(1.08), loss=np.geomspace(0.5, 0.8, 600)).decision == "undecided"

    def test_divergence(self, tmp_path):
        verdict = self.verdict(tmp_path, climb(1.08), loss=np.geomspace(1, 3, 600))
        assert (verdict.decision, verdict.reason) == ("does not hold", "the loss diverged")

    def test_a_quadratic_above_2_by_lr_does_not_hold(self, tmp_path):
        """Linear regression a hair above 2/lr: its slow modes still fall, and its sharpness is constant."""
        verdict = self.verdict(tmp_path, np.full(600, 1.001))
        assert (verdict.decision, verdict.reason) == ("does not hold", "the curvature never moved")

    def test_a_start_above_2_by_lr_cannot_decide(self, tmp_path):
        assert (
            self.verdict(tmp_path, np.concatenate([np.linspace(1.4, 1.08, 100), wave(500, 1.08, 0.02)])).decision
            == "undecided"
        )

    def test_steps_without_a_value_are_left_out(self, tmp_path):
        s = climb(1.08)
        s[[5, 200, 400]] = np.nan
        found = self.verdict(tmp_path, s)
        assert found.decision == "holds"
        assert 120 < found.details["crossing"] < 150

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"b": 32}, "batches of 32"),
            ({"optimizer": {"differing": ["weight_decay"]}}, "parameter groups differ"),
            ({"trained_loss": "1 (Dropout) acts"}, "another loss"),
            ({"optimizer": {"momentum": 0.9}}, "momentum"),
            ({"optimizer": {"weight_decay": 1e-4}}, "weight_decay"),
            ({"optimizer": {"name": "Adam"}}, "Adam"),
        ],
    )
    def test_not_applicable_where_2_by_lr_is_no_threshold(self, tmp_path, options, reason):
        verdict = self.verdict(tmp_path, climb(1.08), **options)
        assert verdict.decision == "not applicable"
        assert reason in verdict.reason


class TestInteractionEdge:
    x = np.concatenate([np.full(180, 0.01), np.geomspace(0.01, 1, 10), wave(410, 1.0, 0.1)])

    def verdict(self, tmp_path, x, s, **options):
        return claims.lee2022.interaction_edge(planted(tmp_path / "run", s=s, x=x, **options))

    def test_holds_at_an_edge(self, tmp_path):
        verdict = self.verdict(tmp_path, self.x, climb(1.08))
        assert verdict.decision == "holds"
        assert abs(verdict.statistic - 1) < 0.05

    def test_balance_of_noise_does_not_hold(self, tmp_path):
        verdict = self.verdict(tmp_path, self.x, np.full(600, 0.1), b=32)
        assert verdict.decision == "does not hold"
        assert "balance of noise" in verdict.reason

    def test_sharpness_below_2_by_lr_cannot_decide(self, tmp_path):
        verdict = self.verdict(tmp_path, self.x, climb(0.7), b=32)
        assert verdict.decision == "undecided"
        assert "several b" in verdict.reason

    @pytest.mark.parametrize(
        ("x", "s", "decision"),
        [
            (np.full(600, 0.3), climb(0.7), "does not hold"),  # stays away, sharpness at rest
            (np.full(600, 0.3), np.linspace(0.3, 0.8, 600), "undecided"),  # still on its way
            (np.concatenate([np.full(190, 0.01), np.full(410, 1.01)]), climb(1.08), "does not hold"),  # on one side
            (np.concatenate([np.full(190, 0.01), wave(410, 1.5, 0.05)]), climb(1.08), "does not hold"),  # too high
            (np.concatenate([np.full(575, 0.01), wave(25, 1, 0.1)]), climb(1.08), "undecided"),  # arrives at the end
            (x[:90], climb(1.08)[:90], "undecided"),  # short
        ],
    )
    def test_planted_violations(self, tmp_path, x, s, decision):
        assert self.verdict(tmp_path, x, s).decision == decision

    def test_the_loss_must_still_fall(self, tmp_path):
        flat = np.full(600, 0.5)
        assert self.verdict(tmp_path, self.x, climb(1.08), loss=flat).decision == "undecided"


class TestIIR:
    sizes = (8, 32, 128, 512, 1024)
    plateaus = (0.35, 0.62, 0.87, 0.98, 1.0)
    sharp = (0.64, 0.88, 1.02, 1.06, 1.07)

    def runs(self, folder, plateaus=plateaus, sharp=sharp, ratio=1.03, sizes=sizes, **options):
        found = []
        for b, u, s in zip(sizes, plateaus, sharp, strict=True):
            x = np.concatenate([np.linspace(0.1, ratio, 100), wave(400, ratio, 0.1, seed=b)])
            curve = np.concatenate([np.full(100, 0.9 * s), wave(400, s, 0.01, seed=b)])
            found.append(planted(folder / f"b{b}", s=curve, x=x, u=np.full(500, u), b=b, **options))
        return found

    def verdict(self, tmp_path, *args, **options):
        return claims.lee2022_iir.iir(self.runs(tmp_path, *args, **options))

    def test_holds(self, tmp_path):
        verdict = self.verdict(tmp_path)
        assert verdict.decision == "holds"
        assert verdict.details["batch_sizes"] == list(self.sizes)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"ratio": 1.6}, "off the bound"),
            ({"plateaus": (0.9, 0.9, 0.9, 0.95, 1.0)}, "not ordered"),
            ({"plateaus": (0.1, 0.15, 0.2, 0.3, 0.4)}, "of 2/lr"),
            ({"sharp": (0.9, 0.9, 0.9, 0.9, 0.9)}, "does not answer"),
        ],
    )
    def test_planted_violations(self, tmp_path, options, reason):
        verdict = self.verdict(tmp_path, **options)
        assert verdict.decision == "does not hold"
        assert reason in verdict.reason

    def test_needs_several_batch_sizes_far_apart(self, tmp_path):
        sizes, plateaus, sharp = (32, 64, 128), self.plateaus[:3], self.sharp[:3]
        assert self.verdict(tmp_path, plateaus, sharp, sizes=sizes).decision == "not applicable"

    def test_each_learning_rate_and_seed_is_compared_by_itself(self, tmp_path):
        """Sharpness differs by 3 between learning rates, and sizes are at both: mixed they would be in no order."""
        runs = [
            run
            for lr in (0.1, 0.3)
            for seed in (0, 1, 2)
            for run in self.runs(tmp_path / f"{lr}-{seed}", ratio=1 + 0.02 * seed, lr=lr, seed=seed)
        ]
        verdict = claims.lee2022_iir.iir(runs)
        assert (verdict.decision, verdict.details["seeds"]) == ("holds", ["0", "1", "2"])
        low, high = scipy.stats.t.interval(0.95, 2, *(f(np.log([1, 1.02, 1.04])) for f in (np.mean, scipy.stats.sem)))
        assert verdict.interval == pytest.approx((np.exp(low), np.exp(high)), abs=0.01)
        assert set(verdict.details["each"].values()) == {"holds"}

    @pytest.mark.parametrize(
        ("of_seeds", "decision"),
        [
            ([{}, {}, {"ratio": 1.6}], "undecided"),  # one seed of three is off
            ([{"ratio": 1.58}, {"ratio": 1.6}, {"ratio": 1.62}], "does not hold"),
            ([{}, {}, {"sharp": (0.9,) * 5}], "undecided"),
            ([{"sharp": (0.9,) * 5}] * 3, "does not hold"),
        ],
    )
    def test_planted_violations_of_several_seeds(self, tmp_path, of_seeds, decision):
        runs = [r for i, options in enumerate(of_seeds) for r in self.runs(tmp_path / str(i), seed=i, **options)]
        assert claims.lee2022_iir.iir(runs).decision == decision

    def test_one_learning_rate_that_does_not_hold_decides(self, tmp_path):
        runs = [*self.runs(tmp_path / "a", lr=0.1), *self.runs(tmp_path / "b", ratio=1.6, lr=0.3)]
        verdict = claims.lee2022_iir.iir(runs)
        assert verdict.decision == "does not hold"
        assert sorted(verdict.details["each"].values()) == ["does not hold", "holds"]


class TestQuadraticLossDifference:
    def verdict(self, tmp_path, slope_after, slope_before=1.0, jump=12):
        x = np.concatenate([np.full(180, 0.01), np.linspace(0.02, 0.98, jump), wave(420 - jump, 1.0, 0.2)])
        y = np.where(np.arange(600) < 180 + jump, slope_before * (x - 1), slope_after * (x - 1))
        return claims.lee2022.quadratic_loss_difference(planted(tmp_path / "run", s=climb(1.08), x=x, y=y))

    def test_holds_with_a_gentler_slope(self, tmp_path):
        verdict = self.verdict(tmp_path, 0.6)
        assert verdict.decision == "holds"
        assert verdict.statistic == pytest.approx(0.6)

    @pytest.mark.parametrize(
        ("slopes", "decision"),
        [((1.0, 1.0), "does not hold"), ((0.6, 0.5), "does not hold"), ((0.6, 1.0, 2), "undecided")],
    )
    def test_planted_violations(self, tmp_path, slopes, decision):
        assert self.verdict(tmp_path, *slopes).decision == decision

    def test_not_applicable_without_an_edge(self, tmp_path):
        x = TestInteractionEdge.x
        run = planted(tmp_path / "run", s=np.full(600, 0.1), x=x, y=x - 1, b=32)
        assert claims.lee2022.quadratic_loss_difference(run).decision == "not applicable"


def test_a_quantity_that_was_not_measured_is_named(tmp_path):
    verdicts = {v.claim: v for v in claims.check(planted(tmp_path / "run", s=climb(1.08)))}
    assert verdicts["edge_of_stability"].decision == "holds"
    assert verdicts["interaction_edge"].decision == "not applicable"
    assert "instability was not measured" in verdicts["interaction_edge"].reason
    assert verdicts["edge_of_stability"].run == "run"


def test_a_learning_rate_schedule_is_not_applicable(tmp_path):
    run = planted(tmp_path / "run", s=climb(1.08))
    lines = (tmp_path / "run" / "measurements.jsonl").read_text().splitlines()
    record = json.loads(lines[-1]) | {"lr": 0.1}
    (tmp_path / "run" / "measurements.jsonl").write_text("\n".join([*lines[:-1], json.dumps(record)]) + "\n")
    verdict = claims.cohen2021.edge_of_stability(Run(run.path))
    assert verdict.decision == "not applicable"
    assert "not constant" in verdict.reason


@pytest.mark.parametrize(
    "fraction", [0.1, pytest.param(0.02, marks=pytest.mark.slow), pytest.param(0.2, marks=pytest.mark.slow)]
)
def test_no_claim_holds_on_the_control(tmp_path, fraction):
    """Linear regression with label noise under SGD: instability·lr/2 is near 1 and nothing is at an edge."""
    import torch

    import curvlab as cl

    train, _ = cl.problems.linear_regression(128, 8, seed=3)
    steps = 200 if fraction >= 0.1 else 1000  # so that small steps come to the plateau, and wander over it
    runs, medians = [], []
    for b in (4, 16, 64):
        model = cl.problems.linear(8, 1)
        L = cl.Objective(model, "squared_error", train)
        top = float(cl.eigsh(cl.hessian(L)).values[0])
        sgd = torch.optim.SGD(model.parameters(), lr=fraction * 2 / top)
        names = ["loss", "gradient_norm", "sharpness", "interaction_sharpness", "instability", "gradient_concentration",
                 "expected_loss_difference"]  # fmt: skip
        for at in cl.train(L, sgd, cl.Batches(128, b, steps), diagnostics=names, run=tmp_path / f"b{b}"):
            lr = at.lr
        runs.append(Run(tmp_path / f"b{b}"))
        medians.append(np.median(runs[-1].series("instability").values[steps // 2 :]) * lr / 2)
    assert all(0.7 < m < 1.4 for m in medians[:2]), medians  # where noise balances the descent, x is at 1
    verdicts = claims.check(runs)
    assert {v.claim for v in verdicts} == set(claims.CLAIMS)
    assert not [v for v in verdicts if v.decision == "holds"]


class TestVerdicts:
    def test_only_the_claims_asked_for_are_judged(self, tmp_path):
        run = planted(tmp_path / "run", s=climb(1.08))
        found = claims.check(run, ["edge_of_stability", "progressive_sharpening"])
        assert [v.claim for v in found] == ["edge_of_stability", "progressive_sharpening"]
        with pytest.raises(ValueError, match=r"no claims \['edge'\]; there are .*edge_of_stability"):
            claims.check(run, ["edge"])

    def test_they_show_what_applies_and_count_the_rest(self, tmp_path):
        found = claims.check(planted(tmp_path / "<run>", s=climb(1.08)), ["edge_of_stability", "interaction_edge"])
        assert [v.decision for v in found] == ["holds", "not applicable"]
        line, others = repr(found).splitlines()
        assert line.startswith("edge_of_stability  <run>  holds  1.0")
        assert others == "not applicable: 1 of 2"
        table = found._repr_html_()
        assert "&lt;run&gt;" in table
        assert table.count("<tr>") == 2
        assert found[0].number in table


class TestStatistics:
    def test_levels_cover_the_mean_of_an_autocorrelated_series(self):
        rng, hits = np.random.default_rng(0), 0
        for _ in range(300):
            x = np.zeros(600)
            for i in range(1, 600):
                x[i] = 0.8 * x[i - 1] + rng.standard_normal()
            hits += level(x[100:]).low <= 0 <= level(x[100:]).high
        assert 0.88 <= hits / 300 <= 0.99

    def test_trend_is_the_total_change(self):
        found = trend(np.linspace(1.0, 3.0, 1000))
        assert found.value == pytest.approx(2.0, rel=1e-2)
        assert found.low == pytest.approx(found.high)

    def test_first_sustained_ignores_a_few_steps(self):
        above = np.array([True, True] + [False] * 8 + [True] * 10)
        assert first_sustained(above, 5) == 10
        assert first_sustained(above[:12], 5) is None

    def test_block_bootstrap_of_an_exact_line_has_no_width(self):
        x = np.linspace(0, 1, 50)
        found = block_bootstrap(x, 2 * x, lambda a, b: float(a @ b / (a @ a)))
        assert (found.low, found.high) == (pytest.approx(2), pytest.approx(2))

    def test_plateau_starts_where_the_series_arrives(self):
        x = np.concatenate([np.full(100, 0.1), np.full(300, 1.0)])
        assert 85 <= plateau_start(x) <= 100
        assert plateau(x) == slice(200, 400)
        assert plateau(np.full(400, 0.5)) is None
