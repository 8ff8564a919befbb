"""Verdicts of the claims of Cohen et al. on planted logs, whose truth is known by construction, and on quadratic losses.

Nothing here is compared with a dense reference: a claim reads logs and nothing else.
"""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_claims import climb, wave

import curvlab as cl
from curvlab import Run
from curvlab.claims import CLAIMS
from curvlab.claims.registry import _judge
from curvlab.claims.statistics import average

LR, N = 0.2, 1024


def plant(path, columns, *, b=N, lr=LR, optimizer=None, threshold=None, steps=None, errors=None, axes=None, **config):
    """A run folder whose log holds these series, by name; (T, K) ones over an axis (name, coordinates)."""
    settings = {"name": "SGD", "momentum": 0.0, "weight_decay": 0.0, "lr": lr} | (optimizer or {})
    training = {"objective": {"examples": N}, "optimizer": settings, "batch_size": b, "replacement": False, "lr": lr}
    training |= {"trained_loss": None, "batches": {"steps": 1, "epochs": False, "seed": 0}} | config.pop("training", {})
    length = len(next(iter(columns.values())))
    columns = {"loss": np.geomspace(1.0, 0.5, length)} | columns
    steps = np.arange(length) if steps is None else steps
    with patch("curvlab.runs.provenance", dict):  # asks git, which takes longer than all the rest
        run = Run.create(path, {"training": training, **config})
    for i, step in enumerate(steps):
        entries = {}
        for name, values in columns.items():
            error = (errors or {}).get(name, 0.0)
            value = np.asarray(values)[i].tolist()
            wide = isinstance(value, list)
            entry = {
                "value": value,
                "error": [error] * len(value) if wide else error,
                "kind": "bound" if error else "exact",
            }
            entries[name] = entry | ({"axis": axes[name]} if name in (axes or {}) else {})
        run.append({"step": int(step), "lr": lr, "threshold": threshold, "measurements": entries})
    run.close()
    return Run(path)


def judged(name, run):
    """The verdict as `check` gives it, of one claim."""
    return _judge(CLAIMS[name], run, "planted")


def linear_regression(path, make, *, steps=120, diagnostics=()):
    """A full-batch run on the control, with the optimizer that `make` makes of parameters and 2/λ_max."""
    train, _ = cl.problems.linear_regression(64, 6, seed=3)
    model = cl.problems.linear(6, 1)
    L = cl.Objective(model, "squared_error", train)
    top = float(cl.eigsh(cl.hessian(L)).values[0])
    names = ["loss", "gradient_norm", "sharpness", *diagnostics]
    for _ in cl.train(L, make(model.parameters(), 2 / top), cl.Batches(64, 64, steps), diagnostics=names, run=path):
        pass
    return Run(path)


MOMENTUM = {"momentum": 0.9}
ADAM = {"name": "Adam", "betas": [0.9, 0.999]}
EDGES = [
    ("momentum_edge", MOMENTUM, 3.8, "sharpness"),
    ("momentum_edge", MOMENTUM | {"nesterov": True}, 3.8 / 2.8, "sharpness"),
    ("adaptive_edge", ADAM, 38.0, "preconditioned_sharpness"),
    ("adaptive_edge", ADAM | {"name": "AdamW", "weight_decay": 0.01}, 38.0, "preconditioned_sharpness"),
    ("adaptive_edge", {"name": "RMSprop", "momentum": 0.5}, 3.0, "preconditioned_sharpness"),
]


class TestOtherThresholds:
    """`momentum_edge` and `adaptive_edge`: one rule, in units of the threshold that the log states."""

    def verdict(self, path, case, s, *, sharpness=None, **options):
        name, optimizer, units, quantity = case
        columns = {"sharpness": np.asarray(s) if sharpness is None else sharpness} | {
            quantity: np.asarray(s) * units / LR
        }
        options = {"optimizer": optimizer, "threshold": units / LR} | options
        return judged(name, plant(path / "run", columns, **options))

    @pytest.mark.parametrize("case", EDGES, ids=lambda c: f"{c[0]}-{c[1].get('name', 'SGD')}")
    def test_holds_at_the_optimizers_own_threshold(self, tmp_path, case):
        verdict = self.verdict(tmp_path, case, climb(1.0))
        assert verdict.decision == "holds", verdict
        assert verdict.interval[0] < 1.0 < verdict.interval[1]

    @pytest.mark.parametrize(
        ("s", "options", "decision"),
        [
            (climb(2 / 3.8, start=0.2), {}, "does not hold"),  # hovers at 2/lr: the threshold of another optimizer
            (climb(1.6), {}, "does not hold"),
            (np.linspace(0.3, 0.7, 600), {}, "undecided"),  # still rising
            (climb(1.0)[:150], {}, "undecided"),  # arrives at the end
            (climb(1.0), {"sharpness": np.full(600, 3.0)}, "does not hold"),  # a quadratic, P alone moves
            (wave(600, 1.0, 0.03), {}, "undecided"),  # starts there
            (climb(1.0), {"threshold": None}, "not applicable"),
            (climb(1.0), {"b": 32}, "not applicable"),
            (climb(1.0), {"optimizer": {}}, "not applicable"),
            (climb(1.0), {"optimizer": ADAM | {"weight_decay": 0.1}}, "not applicable"),
        ],
    )
    def test_planted_violations(self, tmp_path, s, options, decision):
        assert self.verdict(tmp_path, EDGES[2], s, **options).decision == decision

    def test_divergence_and_a_rising_loss(self, tmp_path):
        columns = {"sharpness": climb(1.0) * 19, "loss": np.geomspace(1, 3, 600)}
        options = {"optimizer": MOMENTUM, "threshold": 19.0}
        assert judged("momentum_edge", plant(tmp_path / "a", columns, **options)).decision == "does not hold"
        columns["loss"] = np.geomspace(0.5, 0.8, 600)
        assert judged("momentum_edge", plant(tmp_path / "b", columns, **options)).decision == "undecided"

    def test_the_families_exclude_each_other(self, tmp_path):
        run = plant(tmp_path / "run", {"sharpness": climb(1.08) * 10})
        decisions = {v.claim: v for v in cl.claims.check(run)}
        assert decisions["edge_of_stability"].decision == "holds"
        assert "the claim is about SGD with momentum" in decisions["momentum_edge"].reason
        assert "the claim is about Adam, AdamW and RMSprop" in decisions["adaptive_edge"].reason

    @pytest.mark.parametrize(
        ("name", "make", "extra"),
        [
            ("momentum_edge", lambda p, edge: torch.optim.SGD(p, lr=0.3 * edge, momentum=0.9), []),
            ("momentum_edge", lambda p, edge: torch.optim.SGD(p, lr=0.1 * edge, momentum=0.9, nesterov=True), []),
            ("adaptive_edge", lambda p, edge: torch.optim.Adam(p, lr=0.1), ["preconditioned_sharpness"]),
        ],
    )
    def test_the_control_does_not_hold(self, tmp_path, name, make, extra):
        verdict = judged(name, linear_regression(tmp_path / "run", make, diagnostics=extra))
        assert verdict.decision in ("does not hold", "undecided"), verdict


class TestProgressiveSharpening:
    def verdict(self, path, s, **options):
        return judged("progressive_sharpening", plant(path / "run", {"sharpness": np.asarray(s) * 2 / LR}, **options))

    def test_holds_up_to_the_crossing(self, tmp_path):
        verdict = self.verdict(tmp_path, climb(1.08))
        assert verdict.decision == "holds"
        assert 120 < verdict.details["to_step"] < 150
        assert verdict.statistic == pytest.approx(np.log(1 / 0.6), rel=0.15)

    def test_holds_below_the_threshold_and_with_momentum(self, tmp_path):
        assert self.verdict(tmp_path / "a", np.geomspace(0.1, 0.6, 300)).decision == "holds"
        found = self.verdict(tmp_path / "b", np.geomspace(0.4, 1.9, 300), optimizer=MOMENTUM, threshold=3.8 / LR)
        assert found.decision == "holds"
        assert found.details["to_step"] == 299  # 1.9 of 2/lr is the threshold with β = 0.9, so nothing is crossed

    @pytest.mark.parametrize(
        ("s", "options", "decision"),
        [
            (np.full(300, 0.5), {}, "does not hold"),  # a quadratic
            (np.geomspace(0.9, 0.3, 300), {}, "does not hold"),  # falls
            (wave(300, 0.5, 0.01), {}, "does not hold"),  # hovers
            (np.geomspace(0.5, 0.56, 300) * (1 + wave(300, 0, 0.3)), {}, "undecided"),  # drowns in its scatter
            (
                0.12 * np.repeat([1, 2, 1.8, 3, 2.8, 4, 3.8, 5, 4.8, 6], 30),
                {},
                "undecided",
            ),  # rises, but falls as often
            (climb(1.08, rise=15), {}, "undecided"),  # crosses within 20 measured steps
            (climb(1.3, start=1.1), {}, "not applicable"),  # starts above
            (climb(1.08), {"b": 32}, "not applicable"),
            (climb(1.08), {"optimizer": ADAM}, "not applicable"),
        ],
    )
    def test_planted_violations(self, tmp_path, s, options, decision):
        assert self.verdict(tmp_path, s, **options).decision == decision

    def test_the_control_does_not_hold(self, tmp_path):
        run = linear_regression(tmp_path / "run", lambda p, edge: torch.optim.SGD(p, lr=0.2 * edge))
        assert judged("progressive_sharpening", run).decision == "does not hold"
        assert judged("nonmonotone_loss", run).decision == "not applicable"


class TestNonmonotoneLoss:
    fall = np.geomspace(1.0, 0.5, 600)

    def loss(self, size=0.02, start=150):
        return self.fall * np.where(np.arange(600) < start, 1.0, 1 + size * (-1.0) ** np.arange(600))

    def verdict(self, path, loss, s=None, **options):
        s = climb(1.08) if s is None else s
        return judged("nonmonotone_loss", plant(path / "run", {"sharpness": s * 2 / LR, "loss": loss}, **options))

    def test_holds(self, tmp_path):
        verdict = self.verdict(tmp_path, self.loss())
        assert verdict.decision == "holds"
        assert verdict.statistic == pytest.approx(0.5, abs=0.05)
        assert verdict.details["share_before"] == 0

    @pytest.mark.parametrize(
        ("loss", "options", "decision"),
        [
            ("fall", {}, "does not hold"),  # monotone
            ("rounding", {}, "does not hold"),  # rises by less than rounding
            ("rising", {}, "does not hold"),  # in the long run
            ("noisy", {}, "undecided"),  # non-monotone before the crossing as well
            ("edge", {"s": climb(0.8)}, "not applicable"),  # no crossing
            ("edge", {"steps": np.arange(0, 1800, 3)}, "not applicable"),  # no neighbouring steps
            ("edge", {"b": 32}, "not applicable"),
            ("edge", {"optimizer": MOMENTUM}, "not applicable"),
            ("edge", {"s": np.full(600, 1.01)}, "does not hold"),  # the curvature never moved
        ],
    )
    def test_planted_violations(self, tmp_path, loss, options, decision):
        losses = {
            "fall": self.fall,
            "rounding": np.geomspace(1, 0.995, 600) * (1 + 6e-6 * (-1.0) ** np.arange(600)),
            "rising": self.loss()[::-1] * np.geomspace(0.9, 1.3, 600),
            "noisy": self.loss(start=0),
            "edge": self.loss(),
        }
        assert self.verdict(tmp_path, losses[loss], **options).decision == decision

    def test_too_short_after_the_crossing(self, tmp_path):
        found = self.verdict(tmp_path, self.loss()[:170], s=climb(1.08)[:170])
        assert found.decision == "undecided"


def test_the_average_of_a_share():
    found = average(np.tile([True, False], 100))
    assert found.value == 0.5
    assert found.low == found.high == 0.5
    assert set(CLAIMS) >= {"momentum_edge", "adaptive_edge", "progressive_sharpening", "nonmonotone_loss"}
