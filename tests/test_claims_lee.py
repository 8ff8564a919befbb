"""Verdicts of the claims of Lee 2022 on planted logs, whose truth is known, on a quadratic loss and on the control.

Nothing here is compared with a dense reference: a claim reads logs and nothing else. Proposition 4.1 is also judged on a
quadratic loss, of which it is a theorem.
"""

import numpy as np
import pytest
import torch
from test_claims import climb, wave
from test_claims_cohen import LR, N, judged, plant

import curvlab as cl
from curvlab import Run

STEPS = np.arange(600)


def edge(*, aligned_at=190, arrives_at=197, low=0.01, high=0.97, x_after=None, s=None):
    """Series of a run that crosses 2/lr at about step 130, and whose gradient turns into q_1 before x arrives."""
    early = np.arange(600) < aligned_at
    x = np.where(early, 0.01, 0.6)
    x[arrives_at - 4 : arrives_at + 5] = [0.7, 0.8, 0.9, 0.97, 1.02, 1.05, 1.06, 1.07, 1.06]
    x[arrives_at + 5 :] = wave(600, 1.0, 0.05)[arrives_at + 5 :] if x_after is None else x_after
    alignment = np.where(early, low, high)
    norm = np.where(early, 0.1, 1.0)
    s = climb(1.08) if s is None else s
    return {
        "sharpness": s * 2 / LR,
        "instability": x * 2 / LR,
        "gradient_alignment": alignment,
        "gradient_norm": norm,
        "batch_gradient_cosine": np.where(early, 0.9, -0.9),
    }


class TestOrderOfEvents:
    def verdict(self, path, series, **options):
        return judged("order_of_events", plant(path / "run", series, **options))

    def test_holds_and_names_the_steps(self, tmp_path):
        verdict = self.verdict(tmp_path, edge())
        assert verdict.decision == "holds", verdict
        assert 120 < verdict.details["crossing"] < 150
        assert (verdict.details["aligned_from"], verdict.details["arrival"]) == (190, 197)
        assert verdict.statistic == 197 - verdict.details["crossing"] == verdict.interval[0] == verdict.interval[1]

    def test_errors_of_the_log_widen_the_interval(self, tmp_path):
        verdict = self.verdict(tmp_path, edge(), errors={"sharpness": 0.2})
        assert verdict.decision == "holds"
        assert verdict.interval[0] < verdict.statistic < verdict.interval[1]
        verdict = self.verdict(tmp_path / "b", edge(), errors={"sharpness": 2.0})
        assert (verdict.decision, verdict.reason) == (
            "undecided",
            "the errors of (ii) and (iv) overlap; measure with a smaller tol",
        )

    @pytest.mark.parametrize(
        ("changes", "options", "decision"),
        [
            ({"aligned_at": 60}, {}, "does not hold"),  # aligned before the crossing
            ({"high": 0.4}, {}, "does not hold"),  # never aligned
            ({"x_after": 1.05}, {}, "does not hold"),  # stays in the unstable regime
            ({"x_after": np.where(np.arange(398) % 300 < 250, 1.05, 0.9)}, {}, "undecided"),  # falls below twice
            ({"s": climb(1.08, start=0.96)}, {}, "does not hold"),  # hardly rises before
            ({"s": climb(0.8)}, {}, "does not hold"),  # no crossing
            ({"s": np.full(600, 0.5)}, {}, "does not hold"),  # a quadratic below 2/lr
            ({"s": np.linspace(0.3, 0.9, 600)}, {}, "undecided"),  # still rising
            ({"arrives_at": 580, "aligned_at": 575}, {}, "undecided"),  # arrives at the end
            ({}, {"b": 32}, "not applicable"),
            ({}, {"optimizer": {"momentum": 0.9}}, "not applicable"),
        ],
    )
    def test_planted_violations(self, tmp_path, changes, options, decision):
        assert self.verdict(tmp_path, edge(**changes), **options).decision == decision

    def test_divergence(self, tmp_path):
        assert self.verdict(tmp_path, edge() | {"loss": np.geomspace(1, 3, 600)}).decision == "does not hold"


class TestGradientAligns:
    def verdict(self, path, series, *, second=0.8, **options):
        if second:
            values = np.full(len(series["sharpness"]), second * 2 / LR)
            series = series | {"hessian_eigenvalues": np.stack([series["sharpness"], values], 1)}
            options["axes"] = {"hessian_eigenvalues": ["index", [1, 2]]}
        return judged("gradient_aligns", plant(path / "run", series, **options))

    def test_the_premise_is_that_the_second_eigenvalue_is_below_2_by_lr(self, tmp_path):
        assert self.verdict(tmp_path / "a", edge(high=0.8), second=1.05).decision == "not applicable"
        assert self.verdict(tmp_path / "b", edge(), second=1.05).details["second_eigenvalue"] == pytest.approx(1.05)
        assert self.verdict(tmp_path / "d", edge(), second=None).decision == "holds"
        unknown = self.verdict(tmp_path / "c", edge(high=0.8), second=None)
        assert unknown.decision == "undecided"
        assert "measure hessian_eigenvalues" in unknown.reason

    def test_holds(self, tmp_path):
        verdict = self.verdict(tmp_path, edge())
        assert verdict.decision == "holds", verdict
        assert (verdict.statistic, verdict.details["peak"]) == (0.97, 200)  # where x first falls again
        assert verdict.details["growth_along_q1"] == pytest.approx(0.97 / 0.001)

    @pytest.mark.parametrize(
        ("changes", "options", "decision"),
        [
            ({"high": 0.8}, {}, "does not hold"),
            ({"low": 0.45, "aligned_at": 131}, {}, "holds"),
            ({"s": climb(1.4)}, {}, "does not hold"),  # ‖H‖_{S_n} stays at 0.8 of ‖H‖
            ({}, {"errors": {"gradient_alignment": 0.2}}, "undecided"),
            ({"arrives_at": 590, "x_after": 0.9}, {"cut": 580}, "undecided"),  # does not arrive
            ({"low": 0.7}, {}, "not applicable"),  # aligned before
            ({"s": climb(0.8)}, {}, "not applicable"),
            ({}, {"b": 32}, "not applicable"),
        ],
    )
    def test_planted_violations(self, tmp_path, changes, options, decision):
        cut = options.pop("cut", 600) if "cut" in options else 600
        series = {name: values[:cut] for name, values in edge(**changes).items()}
        assert self.verdict(tmp_path, series, **options).decision == decision

    def test_growth_along_q1_is_needed(self, tmp_path):
        series = edge(low=0.4) | {"gradient_norm": np.full(600, 1.0)}
        verdict = self.verdict(tmp_path, series)
        assert verdict.decision == "does not hold"
        assert "has grown by 2.4" in verdict.reason

    def test_on_a_quadratic_loss_it_is_a_theorem(self, tmp_path):
        """Eigenvalues 1.1, 0.9, 0.5 and 0.2 in units of 2/lr, and a start that is hardly along q_1."""
        values = torch.tensor([1.1, 0.9, 0.5, 0.2], dtype=torch.float64)
        inputs = torch.diag((4 * values).sqrt())
        model = torch.nn.Linear(4, 1, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1e-4, 1.0, 1.0, 1.0]]))
        L = cl.Objective(model, "squared_error", (inputs, torch.zeros(4, 1, dtype=torch.float64)))
        sgd = torch.optim.SGD(model.parameters(), lr=2.0)
        names = ["loss", "gradient_norm", "sharpness", "instability", "gradient_alignment"]
        for _ in cl.train(L, sgd, cl.Batches(4, 4, 70), diagnostics=names, run=tmp_path / "run"):
            pass
        verdict = judged("gradient_aligns", Run(tmp_path / "run"))
        assert verdict.decision == "holds", verdict
        assert verdict.details["interaction_over_sharpness"] == pytest.approx(1, abs=1e-3)
        assert judged("order_of_events", Run(tmp_path / "run")).decision == "does not hold"  # it diverges


class TestOscillatingGradients:
    def verdict(self, path, series, **options):
        return judged("oscillating_gradients", plant(path / "run", series, **options))

    def test_holds(self, tmp_path):
        verdict = self.verdict(tmp_path, edge())
        assert verdict.decision == "holds"
        assert (verdict.statistic, verdict.details["share_before"]) == (1.0, 0.0)

    def test_full_gradients_do_for_full_batches(self, tmp_path):
        series = edge()
        series["gradient_cosine"] = series.pop("batch_gradient_cosine")
        assert self.verdict(tmp_path / "a", series).decision == "holds"
        assert "was not measured" in self.verdict(tmp_path / "b", series, b=32).reason

    @pytest.mark.parametrize(
        ("cosine", "s", "decision"),
        [
            (np.full(600, 0.5), climb(1.08), "does not hold"),
            (np.random.default_rng(1).random(600) - 0.52, climb(1.08), "undecided"),
            (np.full(600, -0.5), climb(0.8), "undecided"),  # balance of noise is as good an explanation
            (np.full(600, -0.5), np.full(600, 0.5), "not applicable"),  # a quadratic
        ],
    )
    def test_planted_violations(self, tmp_path, cosine, s, decision):
        assert self.verdict(tmp_path, edge(s=s) | {"batch_gradient_cosine": cosine}, b=32).decision == decision

    def test_needs_a_plateau_and_neighbouring_steps(self, tmp_path):
        late = edge(arrives_at=560, aligned_at=555)
        assert self.verdict(tmp_path / "late", late).decision == "undecided"
        cosine = np.where(STEPS % 9 == 0, -0.9, np.nan)
        found = self.verdict(tmp_path / "rare", edge() | {"batch_gradient_cosine": cosine})
        assert found.decision == "undecided"
        assert "measure every step" in found.reason


class TestAsymmetricValleys:
    alphas = (0.5, 1.0)

    def verdict(self, path, unstable, stable, *, alphas=alphas, series=None, **options):
        series = edge(x_after=wave(600, 1.0, 0.05)[202:]) if series is None else series
        x = series["instability"]
        ratio = np.where(x * LR / 2 > 1, unstable, stable)
        curve = x[:, None] * np.stack([np.sqrt(ratio), ratio], 1)
        options = {"axes": {"directional_sharpness": ["alpha", list(alphas)]}} | options
        return judged("asymmetric_valleys", plant(path / "run", series | {"directional_sharpness": curve}, **options))

    def test_holds(self, tmp_path):
        verdict = self.verdict(tmp_path, 0.9, 1.1)
        assert verdict.decision == "holds"
        assert verdict.details["median_ratio"]["unstable"]["1.0"] == pytest.approx(0.9)

    @pytest.mark.parametrize(
        ("unstable", "stable", "decision"),
        [
            (1.0, 1.0, "does not hold"),  # a quadratic
            (0.9995, 1.0005, "does not hold"),  # and its rounding
            (1.1, 1.1, "does not hold"),
            (0.9, 0.9, "does not hold"),
            (np.where(np.random.default_rng(1).random(600) < 0.52, 0.9, 1.1), 1.1, "undecided"),
        ],
    )
    def test_planted_violations(self, tmp_path, unstable, stable, decision):
        assert self.verdict(tmp_path, unstable, stable).decision == decision

    def test_not_applicable_and_undecided(self, tmp_path):
        assert self.verdict(tmp_path / "a", 0.9, 1.1, alphas=(0.5, 0.9)).decision == "not applicable"
        assert self.verdict(tmp_path / "b", 0.9, 1.1, b=32).decision == "not applicable"
        flat = edge() | {"instability": np.full(600, 0.3)}
        assert self.verdict(tmp_path / "c", 0.9, 1.1, series=flat).decision == "not applicable"
        short = {name: values[:215] for name, values in edge().items()}
        assert self.verdict(tmp_path / "d", 0.9, 1.1, series=short).decision == "undecided"


def noisy(ratio, *, seed=0, sharpness=None):
    """Series of SGD in which a squared length, or norm, is `ratio` times what ρ_b says, with noise."""
    noise = np.random.default_rng(seed).standard_normal((2, 600))
    rho, norm = np.geomspace(0.8, 0.1, 600), np.geomspace(2.0, 0.5, 600)
    return {
        "sharpness": climb(0.8) * 2 / LR if sharpness is None else sharpness,
        "gradient_concentration": rho,
        "mean_resultant_length": rho * ratio * (1 + 0.3 * noise[0]),
        "gradient_norm": norm,
        "batch_gradient_norm": norm * np.sqrt(ratio / rho * np.exp(0.3 * noise[1] - 0.045)),
        "batch_gradient_norm_variation": np.full(600, 0.1),
    }


@pytest.mark.parametrize("name", ["resultant_length", "concentration_of_drawn_batches"])
class TestConcentration:
    def verdict(self, path, name, series, *, b=32, **options):
        return judged(name, plant(path / "run", series, b=b, **options))

    def test_holds(self, tmp_path, name):
        verdict = self.verdict(tmp_path, name, noisy(1.0))
        assert verdict.decision == "holds", verdict
        assert verdict.interval[0] < 1 < verdict.interval[1]

    @pytest.mark.parametrize(
        ("series", "options", "decision"),
        [
            (noisy(1.5), {}, "does not hold"),
            (noisy(0.6), {}, "does not hold"),
            ({k: v[:60] for k, v in noisy(1.0).items()}, {}, "undecided"),
            ({k: v * (np.resize([0.01] * 60 + [1.99] * 60, 600) if "length" in k or "batch" in k else 1.0)
              for k, v in noisy(1.0).items()}, {}, "undecided"),
            (noisy(1.0, sharpness=np.full(600, 3.0)), {}, "not applicable"),  # a quadratic: true, and no evidence
            (noisy(1.0), {"b": N}, "not applicable"),
            (noisy(1.0), {"optimizer": {"momentum": 0.9}}, "not applicable"),
        ],
    )  # fmt: skip
    def test_planted_violations(self, tmp_path, name, series, options, decision):
        assert self.verdict(tmp_path, name, series, **options).decision == decision

    def test_batches_of_an_epoch_are_not_independent(self, tmp_path, name):
        found = self.verdict(tmp_path, name, noisy(1.0), training={"batches": {"epochs": True}})
        assert found.decision == ("not applicable" if name.startswith("concentration") else "holds")


SIZES, RATES = (8, 32, 128, 512, 1024), (0.1, 0.2, 0.4)


def concentration(b, rho=0.02):
    share = (N - b) / (N - 1) / b
    return 1 / (share / rho + 1 - share)


class TestScaling:
    def runs(self, path, ratio, *, seeds=3, noise=0.02, sizes=SIZES, rates=RATES, flat=False, diverged=()):
        rng, made = np.random.default_rng(0), []
        for seed in range(seeds):
            for b in sizes:
                for lr in rates:
                    end = np.log(ratio(b, lr)) + noise * rng.standard_normal()
                    series = {
                        "sharpness": np.full(20, 5.0 if flat else np.exp(0.5 * end)),
                        "test_accuracy": np.full(20, 0.9 if flat else 0.9 - 0.01 * end),
                        "gradient_concentration": np.full(20, concentration(b)),
                        "loss": np.geomspace(1, 3 if (b, lr) in diverged else 0.5, 20),
                    }
                    experiment = {"init_seed": seed, "data_seed": seed, "lr": lr, "batch_size": [b]}
                    made.append(plant(path / f"{b}-{lr}-{seed}", series, b=b, lr=lr, experiment=experiment))
        return made

    @pytest.mark.parametrize("name", ["scaling_of_sharpness", "scaling_of_accuracy"])
    def test_each_rule_is_told_from_the_others(self, tmp_path, name):
        truths = {
            "LSSR": lambda b, lr: concentration(b) / lr,
            "linear": lambda b, lr: b / lr,
            "square_root": lambda b, lr: b**0.5 / lr,
        }
        for rule, ratio in truths.items():
            verdict = judged(name, self.runs(tmp_path / rule, ratio))
            assert verdict.decision == ("holds" if rule == "LSSR" else "does not hold"), (rule, verdict)
            assert max(verdict.details["explained"], key=verdict.details["explained"].get) == rule
            assert verdict.details["rho"] == pytest.approx(0.02)

    @pytest.mark.parametrize(
        ("options", "decision"),
        [
            ({"flat": True}, "does not hold"),  # nothing to explain, as on a quadratic
            ({"noise": 5.0}, "does not hold"),  # nothing explains it
            ({"noise": 0.9}, "undecided"),  # not told apart
            ({"seeds": 2}, "not applicable"),
            ({"rates": (0.1, 0.2)}, "not applicable"),
            ({"sizes": (8, 16, 32, 64)}, "not applicable"),
            ({"diverged": ((1024, 0.4),)}, "holds"),  # one cell of the grid is left out
        ],
    )
    def test_planted_violations(self, tmp_path, options, decision):
        found = judged("scaling_of_sharpness", self.runs(tmp_path, lambda b, lr: concentration(b) / lr, **options))
        assert found.decision == decision, found
        assert ("does not answer to (b, lr)" in found.reason) == ("flat" in options)

    def test_runs_without_accuracy_name_it(self, tmp_path):
        assert "needs a grid" in judged("scaling_of_accuracy", []).reason


def test_the_control_holds_nothing(tmp_path):
    """Linear regression with label noise, every quantity measured: the curvature is constant, and that is seen."""
    train, _ = cl.problems.linear_regression(128, 8, seed=3)
    names = ["loss", "gradient_norm", "sharpness", "instability", "gradient_concentration", "mean_resultant_length",
             "batch_gradient_norm", "batch_gradient_cosine", "gradient_alignment", "directional_sharpness"]  # fmt: skip
    claims = ("order_of_events", "gradient_aligns", "oscillating_gradients", "asymmetric_valleys", "resultant_length",
              "concentration_of_drawn_batches")  # fmt: skip
    for b in (16, 128):
        model = cl.problems.linear(8, 1)
        L = cl.Objective(model, "squared_error", train)
        sgd = torch.optim.SGD(model.parameters(), lr=0.14)
        for _ in cl.train(L, sgd, cl.Batches(128, b, 120), diagnostics=names, run=tmp_path / f"b{b}"):
            pass
        verdicts = {name: judged(name, Run(tmp_path / f"b{b}")) for name in claims}
        assert not [v for v in verdicts.values() if v.decision == "holds"]
        if b == 16:
            assert "the loss may be quadratic" in verdicts["resultant_length"].reason
            assert "the curvature never moved" in verdicts["oscillating_gradients"].reason
