"""Verdicts of the claims of Novack et al. 2022 on planted runs, whose regimes, seeds and ends are known by construction.

Against references: paired t intervals against scipy, decisions against those that a sweep of the same runs comes to.
Behavioural: what each planted violation does to a verdict, on what claims refuse, and the table over data sets.
"""

import json
import math

import numpy as np
import pytest
import scipy.stats

import curvlab as cl
from curvlab import Run, claims
from curvlab.claims import datasets, regimes, registry
from curvlab.claims.novack2022 import METHODS
from curvlab.claims.registry import CLAIMS
from curvlab.claims.statistics import Estimate, mean_over_seeds
from curvlab.problems.presets import Experiment
from curvlab.problems.rows import Row, Sentence, Study
from curvlab.sweep import Sweep, conduct, estimate, judge, summarize
from curvlab.sweep.plan import plan
from curvlab.sweep.work import Result

SMALL, LARGE, STEPS = 16, 256, 400
SEEDS = (0, 1, 2, 3)
NOISE = dict(zip(SEEDS, (0.001, -0.0005, 0.0, 0.0005), strict=True))
OURS = [name for name, c in CLAIMS.items() if "Novack" in c.source]


def planted(
    folder, label, end, *, b=LARGE, penalty=None, micro=SMALL, method="SGD", lr=0.1, data="digits", metric="test_accuracy",
    steps=STEPS, logged=None, points=0, seeds=SEEDS, norms=None, size=SMALL, options=None, extra=None, own_loop=False,
):  # fmt: skip
    """Runs of a regime, one for each seed, whose metric ends at `end` plus a little of the seed's own.

    The metric rises to its end along a line; `norms`, a function of (seed, steps), are micro-batch gradient norms.
    """
    for seed in seeds:
        experiment = {"data": data, "n": 1024, "model": "mlp", "init_seed": seed, "data_seed": seed, "lr": lr}
        penalties = [[penalty[1], f"{penalty[0]}_penalty", {}]] if penalty else []
        training = {
            "objective": {"examples": 1024}, "optimizer": {"name": method, "lr": lr} | (options or {}), "lr": lr,
            "batch_size": b, "batches": {"steps": steps}, "penalties": penalties, "micro_batch_size": micro,
            "diagnostics": [["microbatch_gradient_norm", {"micro_batch_size": size}]],
        }  # fmt: skip
        if own_loop:  # what a Monitor states
            experiment |= {"penalty": [f"{penalty[0]}={penalty[1]}"] if penalty else [], "micro_batch": micro}
            del training["penalties"], training["micro_batch_size"], training["batches"]
        at = np.arange(0, logged or steps, max(1, steps // (points or (80 if norms else 8))))
        value = (end(seed) if callable(end) else end) + NOISE[seed] * (1 if metric == "test_accuracy" else 0)
        columns = {metric: np.interp(at, [0, 0.7 * steps], [0.1 * value, value])}
        if norms is not None:
            columns["microbatch_gradient_norm"] = norms(seed, at)
        columns |= {name: f(seed, at) for name, f in (extra or {}).items()}
        run = folder / f"{label}_seed={seed}"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"experiment": experiment, "training": training}))
        lines = []
        for i, step in enumerate(at.tolist()):
            values = {name: None if math.isnan(v[i]) else float(v[i]) for name, v in columns.items()}
            entries = {name: {"value": x, "error": 0.0, "kind": "exact"} for name, x in values.items()}
            lines.append(json.dumps({"step": step, "lr": lr, "measurements": entries}))
        (run / "measurements.jsonl").write_text("\n".join(lines) + "\n")


def baselines(folder, small=0.95, large=0.90, **options):
    planted(folder, "SB", small, b=SMALL, **options)
    planted(folder, "LB", large, **options)


def read(folder):
    return [Run(file.parent) for file in sorted(folder.rglob("config.json"))]


def verdict(folder, name):
    """As `check` gives it: not applicable where a claim lacks something."""
    return registry._judge(CLAIMS[name], read(folder), "")


# -- regimes against small batches -----------------------------------------------------------------

REGIMES = {
    "gradient_norm_recovers": ({"penalty": ("gradient_norm", 0.1)}, "reaches"),
    "fisher_trace_recovers": ({"penalty": ("fisher_trace", 0.1)}, "reaches"),
    "average_jacobian_fails": ({"penalty": ("average_jacobian", 0.1)}, "misses"),
    "unit_jacobian_fails": ({"penalty": ("unit_jacobian", 0.1)}, "misses"),
    "sampled_micro_batch_recovers": ({"penalty": ("sampled_gradient_norm", 0.1)}, "reaches"),
    "iterative_grafting_recovers": ({"method": "IterativeGrafting"}, "reaches"),
    "external_grafting_recovers": ({"method": "ExternalGrafting"}, "reaches"),
    "normalized_gd_recovers": ({"method": "NormalizedGD", "micro": None}, "reaches"),
    "anti_pgd_fails": ({"method": "AntiPGD", "micro": None}, "misses"),
}


@pytest.mark.parametrize("name", REGIMES)
def test_a_regime_is_held_against_small_batches(name, tmp_path):
    setting, relation = REGIMES[name]
    found = []
    for place, end in (("reaches", 0.948), ("misses", 0.93), ("unclear", lambda s: 0.95 + 0.02 * (-1) ** s)):
        baselines(tmp_path / place)
        planted(tmp_path / place, "X", end, **setting)
        found.append(verdict(tmp_path / place, name).decision)
    right = ["holds", "does not hold"] if relation == "reaches" else ["does not hold", "holds"]
    assert found == [*right, "undecided"]


def test_the_interval_is_that_of_paired_differences(tmp_path):
    ends = dict(zip(SEEDS, (0.946, 0.953, 0.951, 0.943), strict=True))
    baselines(tmp_path)
    planted(tmp_path, "GN", ends.get, penalty=("gradient_norm", 0.1))
    found = verdict(tmp_path, "gradient_norm_recovers")
    d = np.array([*ends.values()]) - 0.95  # both have the seed's own part
    low, high = scipy.stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert (found.statistic, *found.interval) == pytest.approx((d.mean(), low, high))
    assert found.details["pairs"] == 4
    assert found.details["paper"]["cifar10"] == pytest.approx(-0.0035)
    assert found.details["runs"][0] == [f"GN_seed={s}" for s in SEEDS]
    three = {s: ends[s] for s in (0, 1, 2)}
    for run in read(tmp_path):
        if run.path.name.endswith("seed=3"):
            (run.path / "config.json").unlink()
    assert verdict(tmp_path, "gradient_norm_recovers").statistic == pytest.approx(np.mean([*three.values()]) - 0.95)


@pytest.mark.parametrize(("large", "decision"), [(0.90, "holds"), (0.95, "does not hold"), (0.97, "does not hold")])
def test_nothing_is_decided_without_a_gap(large, decision, tmp_path):
    """The control: where large batches are as good, no claim about generalization can hold, whatever the regimes do."""
    baselines(tmp_path, large=large)
    for name, (setting, _) in REGIMES.items():
        planted(tmp_path, name, 0.95, **setting)
    found = {v.claim: v for v in claims.check(read(tmp_path))}
    assert found["generalization_gap"].decision == decision
    if large == 0.97:
        assert not any(found[name].decision == "holds" for name in OURS)
        for name in REGIMES:
            assert found[name].decision == "not applicable"
            assert found[name].reason.startswith("small batches are not surely above large ones here (-0.02")
            assert found[name].statistic == pytest.approx(0, abs=1e-12)


def test_one_seed_decides_nothing(tmp_path):
    baselines(tmp_path, seeds=(0,))
    assert verdict(tmp_path, "generalization_gap").decision == "undecided"
    assert "more seeds would tell" in verdict(tmp_path, "generalization_gap").reason


def test_of_several_settings_the_best_counts_and_the_interval_knows_of_the_choice(tmp_path):
    baselines(tmp_path)
    ends = (0.944, 0.953, 0.951, 0.940)
    planted(tmp_path, "good", lambda s: ends[s], method="AntiPGD", options={"sigma": 0.1})
    one = verdict(tmp_path, "anti_pgd_fails")
    for i in range(3):
        planted(tmp_path, f"bad{i}", 0.5, method="AntiPGD", options={"sigma": 0.2 + i})
    four = verdict(tmp_path, "anti_pgd_fails")
    d = np.array(ends) - 0.95
    half = scipy.stats.t.ppf(1 - 0.025 / 4, 3) * d.std(ddof=1) / 2
    assert four.statistic == pytest.approx(one.statistic)
    assert four.interval[1] - four.statistic == pytest.approx(half)
    assert four.interval[1] > one.interval[1]
    assert '"sigma": 0.1' in four.details["settings"][0]


def test_bonferroni_intervals_contain_all_truths_at_once():
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((2000, 5, 4))
    kept = [all(e.low < 0 < e.high for e in (mean_over_seeds(x, comparisons=5) for x in group)) for group in draws]
    assert 0.95 <= np.mean(kept) < 0.98
    assert mean_over_seeds([1.0]) == Estimate(1.0, -math.inf, math.inf)
    assert math.isnan(mean_over_seeds([]).value)


def test_runs_that_did_not_end_are_left_out_and_named(tmp_path):
    baselines(tmp_path)
    planted(tmp_path, "GN", 0.95, penalty=("gradient_norm", 0.1), seeds=(0, 1, 2))
    planted(tmp_path, "GN", 0.95, penalty=("gradient_norm", 0.1), seeds=(3,), logged=200)
    found = verdict(tmp_path, "gradient_norm_recovers")
    assert (found.decision, found.details["pairs"]) == ("holds", 3)
    assert found.details["left_out"] == ["GN_seed=3"]
    planted(tmp_path, "FT", math.nan, penalty=("fisher_trace", 0.1))
    lost = verdict(tmp_path, "fisher_trace_recovers")
    assert lost.decision == "not applicable"
    assert "left out as unfinished or diverged: FT_seed=0, FT_seed=1" in lost.reason


def test_other_runs_are_ignored(tmp_path):
    baselines(tmp_path)
    planted(tmp_path, "GN", 0.95, penalty=("gradient_norm", 0.1))
    before = verdict(tmp_path, "gradient_norm_recovers")
    planted(tmp_path, "GN256", 0.5, penalty=("gradient_norm", 0.1), micro=LARGE)  # other micro-batches
    planted(tmp_path, "Adam", 0.5, method="Adam", penalty=("gradient_norm", 0.1))
    planted(tmp_path, "momentum", 0.5, penalty=("gradient_norm", 0.1), options={"momentum": 0.9})
    planted(
        tmp_path, "other", 0.5, penalty=("gradient_norm", 0.1), data="cifar10"
    )  # there is nothing to compare it with
    after = verdict(tmp_path, "gradient_norm_recovers")
    assert (after.statistic, after.interval) == (before.statistic, before.interval)


@pytest.mark.parametrize("own_loop", [False, True])
def test_a_loop_of_the_user_s_own_states_its_regime_in_the_configuration(own_loop, tmp_path):
    baselines(tmp_path, own_loop=own_loop)
    planted(tmp_path, "GN", 0.95, penalty=("gradient_norm", 0.1), own_loop=own_loop)
    assert verdict(tmp_path, "gradient_norm_recovers").decision == "holds"


REFUSED = {
    "one batch size": (
        lambda p: planted(p, "LB", 0.9),
        "needs runs of plain descent with small and with large batches",
    ),
    "no regime": (
        baselines,
        r"needs runs of gradient_norm \|M\|=16 with large batches \(B=256; small ones have b=16\)",
    ),
    "no metric": (
        lambda p: (
            baselines(p, metric="train_accuracy"),
            planted(p, "GN", 1.0, penalty=("gradient_norm", 1), metric="train_accuracy"),
        ),
        "needs test_accuracy, or test_loss, of the runs of gradient_norm",
    ),
    "two problems": (
        lambda p: (baselines(p / "a"), baselines(p / "b", data="svhn")),
        r"runs of 2 problems have small and large batches \(digits, svhn\); judge each on its own",
    ),
}


def test_configurations_of_another_form(tmp_path):
    baselines(tmp_path)
    cl.Run.create(
        tmp_path / "a", {"experiment": "mine", "training": {"batch_size": 4, "optimizer": {"name": "SGD"}}}
    ).close()
    assert verdict(tmp_path, "generalization_gap").decision == "holds"
    config = {"experiment": {"penalty": ["gradient_norm"]}, "training": {"batch_size": 4, "optimizer": {"name": "SGD"}}}
    cl.Run.create(tmp_path / "b", config).close()
    with pytest.raises(
        KeyError, match="a penalty in the configuration is 'gradient_norm'; expected name=strength, such as"
    ):
        claims.novack2022.generalization_gap(read(tmp_path))


@pytest.mark.parametrize("name", REFUSED)
def test_not_applicable(name, tmp_path):
    plant, reason = REFUSED[name]
    plant(tmp_path)
    with pytest.raises(KeyError, match=reason):
        claims.novack2022.gradient_norm_recovers(read(tmp_path))
    assert verdict(tmp_path, "gradient_norm_recovers").decision == "not applicable"


# -- test losses -----------------------------------------------------------------------------------


def test_test_losses_are_compared_at_equal_training_loss(tmp_path):
    """Test loss = (training loss)^½ times noise of the seed for all, so that no regime is better; one is only faster."""
    speed, noise = {"SB": 0.05, "LB": 0.025}, {"SB": (1.01, 1.0, 1.0, 1.01), "LB": (1.0, 1.01, 1.01, 1.0)}
    for label, b in (("SB", SMALL), ("LB", LARGE)):
        extra = {
            "loss": lambda s, t, r=speed[label]: (1 + s) * np.exp(-r * t),
            "test_loss": lambda s, t, r=speed[label], e=noise[label]: e[s] * np.sqrt((1 + s) * np.exp(-r * t)),
        }
        planted(tmp_path, label, 1.0, b=b, metric="test_loss", extra=extra, points=40)
    found = verdict(tmp_path, "generalization_gap")
    assert found.details["metric"] == "test_loss"
    assert found.statistic == pytest.approx(0, abs=1e-9)
    assert found.decision == "does not hold"
    last = [m.final("test_loss") for m in regimes.Regimes(read(tmp_path)).small.members]
    assert max(last) < 0.01  # where large ones are at 0.013 or more


def test_without_training_losses_ends_are_compared(tmp_path):
    planted(tmp_path, "SB", lambda s: 0.5 + 0.01 * s, b=SMALL, metric="test_loss")
    planted(tmp_path, "LB", lambda s: 1.0 + 0.02 * s, metric="test_loss")
    found = verdict(tmp_path, "generalization_gap")
    assert (found.decision, found.statistic) == ("holds", pytest.approx(math.log(2)))
    flat = {"loss": lambda s, t: 1.0 - 0.5 * t / STEPS}  # far from trained, so no level to compare at
    planted(tmp_path / "flat", "SB", 0.5, b=SMALL, metric="test_loss", extra=flat)
    planted(tmp_path / "flat", "LB", 1.0, metric="test_loss", extra=flat)
    assert verdict(tmp_path / "flat", "generalization_gap").statistic == pytest.approx(math.log(2))


# -- micro-batches, and pairs of penalties ---------------------------------------------------------

SIZED = {
    "gradient_norm_needs_small_micro_batches": "gradient_norm",
    "fisher_trace_needs_small_micro_batches": "fisher_trace",
    "sampled_micro_batch_must_be_small": "sampled_gradient_norm",
}


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize(
    ("ends", "decision"),
    [
        ({16: 0.95, 64: 0.93, 256: 0.90}, "holds"),
        ({16: 0.95, 256: 0.949}, "does not hold"),  # no loss that matters
        ({16: 0.98, 256: 0.96}, "does not hold"),  # a loss, but the largest still reaches small batches
        ({16: 0.95, 256: lambda s: 0.95 - 0.03 * s}, "undecided"),
        ({16: 0.95, 64: 0.90}, "not applicable"),  # below half of the batch
        ({64: 0.95, 256: 0.90}, "not applicable"),  # none as small as small batches
    ],
)
def test_micro_batches_must_be_small(name, ends, decision, tmp_path):
    baselines(tmp_path)
    for micro, end in ends.items():
        planted(tmp_path, f"M{micro}", end, penalty=(SIZED[name], 0.1), micro=micro)
    found = verdict(tmp_path, name)
    assert found.decision == decision
    if decision == "holds":
        assert [*found.details["benefit"]] == [16, 64, 256]
        assert found.details["benefit"][64].startswith("0.03 ")


@pytest.mark.parametrize(
    ("end", "decision"), [(0.951, "holds"), (0.97, "does not hold"), (lambda s: 0.93 + 0.01 * s, "undecided")]
)
def test_sampled_and_average(end, decision, tmp_path):
    baselines(tmp_path)
    planted(tmp_path, "GN", 0.95, penalty=("gradient_norm", 0.1))
    planted(tmp_path, "S", end, penalty=("sampled_gradient_norm", 0.1))
    assert verdict(tmp_path, "sampled_micro_batch_equals_average").decision == decision


@pytest.mark.parametrize(
    ("fisher", "unit", "decision"),
    [(0.95, 0.92, "holds"), (0.93, 0.94, "does not hold"), (lambda s: 0.92 + 0.02 * s, 0.92, "undecided")],
)
def test_loss_gradients_and_jacobians(fisher, unit, decision, tmp_path):
    baselines(tmp_path)
    for name, end in {
        "gradient_norm": 0.95,
        "fisher_trace": fisher,
        "average_jacobian": 0.91,
        "unit_jacobian": unit,
    }.items():
        planted(tmp_path, name, end, penalty=(name, 0.1))
    found = verdict(tmp_path, "loss_gradients_beat_jacobians")
    assert found.decision == decision
    assert len(found.details["differences"]) == 4


# -- trajectories ----------------------------------------------------------------------------------


def course(level, late=1.0, peak=1.0, noise=0.02):
    """Norms at a level, rising to a peak within the first tenth, and going to another level in the second half."""

    def norms(seed, t):
        x = level * (1 + (peak - 1) * np.exp(-(((t - 0.08 * STEPS) / (0.03 * STEPS)) ** 2)))
        x = x * np.where(t > STEPS / 2, late, 1.0)
        return x * np.exp(
            noise * np.random.default_rng([seed, int(100 * level), int(100 * late)]).standard_normal(len(t))
        )

    return norms


def regimes_with_norms(folder, gn, ft=None, aj=None, *, small=None, large=None, **ends):
    planted(folder, "SB", ends.get("SB", 0.95), b=SMALL, norms=small or course(1.0))
    planted(folder, "LB", ends.get("LB", 0.90), norms=large or course(2.0))
    for name, norms in {"gradient_norm": gn, "fisher_trace": ft, "average_jacobian": aj}.items():
        if norms is not None:
            planted(folder, name, ends.get(name, 0.94), penalty=(name, 0.1), norms=norms)


@pytest.mark.parametrize(
    ("norms", "decision"),
    [
        (course(1.1), "holds"),
        (course(2.0), "does not hold"),
        (course(0.5), "does not hold"),  # as far away, on the other side
        (lambda s, t: course(1.0 + 0.4 * s)(s, t), "undecided"),
    ],
)
@pytest.mark.parametrize("kind", ["gradient_norm", "fisher_trace"])
def test_mimicking(kind, norms, decision, tmp_path):
    regimes_with_norms(tmp_path, *((norms,) if kind == "gradient_norm" else (None, norms)))
    assert verdict(tmp_path, f"{kind}_mimics").decision == decision


def test_the_distance_is_that_of_logarithms(tmp_path):
    regimes_with_norms(tmp_path, course(1.2, noise=0), small=course(1.0, noise=0), large=course(4.0, noise=0))
    found = verdict(tmp_path, "gradient_norm_mimics")
    assert found.statistic == pytest.approx(math.log(1.2) / math.log(4))


def test_there_must_be_something_to_mimic(tmp_path):
    """Large batches whose norms differ from small ones by no more than seeds do."""
    regimes_with_norms(tmp_path, course(1.0), large=course(1.01, noise=0.1), small=course(1.0, noise=0.1))
    found = verdict(tmp_path, "gradient_norm_mimics")
    assert found.decision == "not applicable"
    assert "not surely farther from small ones than seeds are from each other" in found.reason


def test_replicates_tell_how_far_small_batches_are_from_each_other(tmp_path):
    """Seeds are different problems here, of very different norms; another order of the data changes little."""

    def problem(level):
        return lambda s, t: 3.0**s * course(level)(s, t)

    regimes_with_norms(tmp_path, problem(1.1), small=problem(1.0), large=problem(2.0))
    assert verdict(tmp_path, "gradient_norm_mimics").decision == "not applicable"
    for run in read(tmp_path):
        if run.path.name.startswith("SB"):
            seed = run.config["experiment"]["init_seed"]
            experiment = run.config["experiment"] | {"data_seed": seed + 100}
            other = Run.create(tmp_path / f"again{seed}", run.config | {"experiment": experiment})
            for record in run.records:
                entry = record["measurements"]["microbatch_gradient_norm"]
                noise = 0.05 * math.sin(record["step"])
                other.append(record | {"measurements": record["measurements"] | {
                    "microbatch_gradient_norm": entry | {"value": entry["value"] * math.exp(noise)}}})  # fmt: skip
            other.close()
    found = verdict(tmp_path, "gradient_norm_mimics")
    assert found.decision == "holds"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"size": LARGE}, r"GN_seed=0 needs microbatch_gradient_norm of 16 examples.*measured of 256 examples"),
        ({"norms": None}, r"GN_seed=0 needs microbatch_gradient_norm of 16 examples.*measured at all"),
        ({"steps": 4000, "logged": 3990, "norms": lambda s, t: np.where(t > 30, 1.0, np.nan)}, None),
    ],
)
def test_norms_that_are_missing(options, reason, tmp_path):
    regimes_with_norms(tmp_path, None)
    planted(tmp_path, "GN", 0.94, penalty=("gradient_norm", 0.1), **{"norms": course(1.0)} | options)
    found = verdict(tmp_path, "gradient_norm_mimics")
    if reason:
        with pytest.raises(KeyError, match=reason):
            claims.novack2022_norms.gradient_norm_mimics(read(tmp_path))
    assert found.decision != "holds"


def test_norms_of_small_batches_are_read_where_they_are_measured_most(tmp_path):
    planted(tmp_path, "SB", 0.95, b=SMALL, norms=course(1.0), seeds=(0,), extra={"batch_gradient_norm": course(3.0)})
    (run,) = read(tmp_path)
    lines = [
        r if i % 2 else {**r, "measurements": {k: v for k, v in r["measurements"].items() if k[:5] != "micro"}}
        for i, r in enumerate(run.records)
    ]
    (run.path / "measurements.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = regimes.member(Run(run.path)).trajectory(SMALL, STEPS)
    steps = np.array([r["step"] for r in lines])
    expected = [np.log(course(3.0)(0, steps)[steps * 40 // STEPS == k].mean()) for k in range(40)]
    np.testing.assert_allclose(found, expected)


def test_external_grafting_has_no_micro_batches_of_its_own(tmp_path):
    baselines(tmp_path)
    planted(tmp_path, "EG", 0.95, method="ExternalGrafting", micro=None)
    assert verdict(tmp_path, "external_grafting_recovers").decision == "holds"


def test_norms_measured_too_rarely(tmp_path):
    regimes_with_norms(tmp_path, course(1.0))
    for run in read(tmp_path):
        if run.path.name.startswith("LB"):
            kept = [json.dumps(r) for r in run.records if r["step"] % 40 == 0 or r["step"] > 390]
            (run.path / "measurements.jsonl").write_text("\n".join(kept) + "\n")
    with pytest.raises(KeyError, match="LB_seed=0 has gradient norms in 11 of 40 parts of 396 steps; needs all"):
        claims.novack2022_norms.gradient_norm_mimics(read(tmp_path))


@pytest.mark.parametrize(("level", "decision"), [(2.0, "holds"), (1.1, "does not hold")])
def test_jacobians_do_not_mimic(level, decision, tmp_path):
    regimes_with_norms(tmp_path, None, aj=course(level))
    assert verdict(tmp_path, "jacobians_do_not_mimic").decision == decision
    planted(tmp_path, "UJ", 0.9, penalty=("unit_jacobian", 0.1), norms=course(1.05))
    assert verdict(tmp_path, "jacobians_do_not_mimic").decision == "does not hold"


@pytest.mark.parametrize(("level", "decision"), [(1.8, "holds"), (1.01, "does not hold")])
def test_large_micro_batches_mimic_less(level, decision, tmp_path):
    regimes_with_norms(tmp_path, course(1.2))
    planted(tmp_path, "GN256", 0.9, penalty=("gradient_norm", 0.1), micro=LARGE, norms=course(level))
    assert verdict(tmp_path, "large_micro_batches_mimic_less").decision == decision


@pytest.mark.parametrize(
    ("gn", "ft", "decision"),
    [
        (course(1.1, late=0.3), course(1.1), "holds"),
        (course(1.1), course(1.1, late=0.3), "does not hold"),
        (course(1.3), course(1.1), "does not hold"),  # closer, but nothing collapses
    ],
)
def test_mimicking_longer(gn, ft, decision, tmp_path):
    regimes_with_norms(tmp_path, gn, ft)
    assert verdict(tmp_path, "fisher_trace_mimics_longer").decision == decision


@pytest.mark.parametrize(
    ("large", "decision"),
    [(course(1.0, peak=3.0), "holds"), (course(2.0), "does not hold"), (course(1.0, peak=1.1), "does not hold")],
)
def test_early_explosion(large, decision, tmp_path):
    regimes_with_norms(tmp_path, None, large=large)
    assert verdict(tmp_path, "early_explosion").decision == decision


def test_an_explosion_without_a_gap_says_nothing(tmp_path):
    regimes_with_norms(tmp_path, None, large=course(1.0, peak=3.0), LB=0.95)
    assert verdict(tmp_path, "early_explosion").decision == "not applicable"


def accuracy(speed, drops):
    """Rises to its end within STEPS/speed, and falls for single steps in the second half."""

    def values(seed, t):
        x = np.minimum(0.1 + 0.84 * speed * t / STEPS, 0.94)
        x = np.where((t > STEPS / 2) & (t % 20 == 0) & (t < 0.95 * STEPS), x - drops * (1 + 0.1 * seed), x)
        return x

    return values


@pytest.mark.parametrize(
    ("gn", "ft", "decision"),
    [
        (accuracy(4, 0.2), accuracy(2, 0.01), "holds"),
        (accuracy(2, 0.2), accuracy(4, 0.01), "does not hold"),  # slower
        (accuracy(4, 0.01), accuracy(2, 0.2), "does not hold"),  # steadier
        (accuracy(4, 0.2), lambda s, t: accuracy((2, 6, 2, 6)[s], 0.01)(s, t), "undecided"),
    ],
)
def test_faster_but_unstable(gn, ft, decision, tmp_path):
    baselines(tmp_path)
    planted(tmp_path, "GN", 0.94, penalty=("gradient_norm", 0.1), extra={"test_accuracy": gn}, points=200)
    planted(tmp_path, "FT", 0.94, penalty=("fisher_trace", 0.1), extra={"test_accuracy": ft}, points=200)
    assert verdict(tmp_path, "gradient_norm_faster_but_unstable").decision == decision


def test_drops_need_many_accuracies(tmp_path):
    baselines(tmp_path)
    for kind in ("gradient_norm", "fisher_trace"):
        planted(tmp_path, kind, 0.94, penalty=(kind, 0.1), steps=50, points=50)
    with pytest.raises(KeyError, match="50 measured accuracies of a run; needs at least 100"):
        claims.novack2022_norms.gradient_norm_faster_but_unstable(read(tmp_path))


@pytest.mark.parametrize("sign", [1, -1])
def test_mimicking_and_generalization(sign, tmp_path):
    levels = {"gradient_norm": 1.1, "fisher_trace": 1.2, "average_jacobian": 1.5, "unit_jacobian": 1.7}
    ends = {name: 0.92 + sign * (1.3 - level) / 20 for name, level in levels.items()}
    regimes_with_norms(tmp_path, None)
    assert "1 regimes of large batches" in verdict(tmp_path, "mimicking_goes_with_generalization").reason
    for name, level in levels.items():
        planted(tmp_path, name, ends[name], penalty=(name, 0.1), norms=course(level))
    found = verdict(tmp_path, "mimicking_goes_with_generalization")
    assert found.decision == ("holds" if sign == 1 else "does not hold")
    scores, distances = [0.9, *ends.values()], [2.0, *levels.values()]
    assert found.statistic == pytest.approx(-scipy.stats.spearmanr(scores, distances)[0])


@pytest.mark.parametrize(
    ("ends", "level", "decision"),
    [
        ((0.95, 0.93, 0.92), 2.0, "holds"),  # one reaches, and is as far away as plain large batches
        ((0.95, 0.93, 0.92), 1.1, "does not hold"),
        ((0.93, 0.92, 0.92), 2.0, "not applicable"),  # nothing was recovered
        ((lambda s: 0.95 - 0.02 * s, 0.92, 0.92), 2.0, "undecided"),
        ((0.95, 0.93, 0.92), None, "undecided"),  # reaches, but its norms differ from seed to seed
    ],
)
def test_mimicking_is_not_necessary(ends, level, decision, tmp_path):
    regimes_with_norms(tmp_path, None)
    for method, end in zip(METHODS, ends, strict=True):
        norms = (lambda s, t: course(1.0 + 0.5 * s)(s, t)) if level is None else course(level)
        planted(tmp_path, method, end, method=method, norms=norms)
    assert verdict(tmp_path, "mimicking_is_not_necessary").decision == decision


# -- the same rule as in sweeps, and real runs -----------------------------------------------------


@pytest.mark.parametrize(
    "d", [[0.02, 0.021, 0.019], [0.0, 0.004, 0.003], [-0.02, -0.021, -0.019], [-0.01, 0.02, 0.0], [0.1]]
)
@pytest.mark.parametrize("relation", ["above", "reaches", "misses"])
def test_sweeps_decide_by_the_same_rule(relation, d, tmp_path):
    """Finished runs of a sweep, judged from its table and from their folders."""
    rows = {
        "SB": Row({"batch_size": (4,)}),
        "LB": Row(),
        "X": Row({"penalty": ("gradient_norm=0.1",), "micro_batch": 4}),
    }
    asked = Study(
        "a test", Experiment(n=64, hidden=(4,), steps=1, batch_size=(64,), diagnostics=()), rows, margin=0.005,
        sentences=(Sentence("x", relation, ("X", "SB"), ("SB", "LB")),),
    )  # fmt: skip
    b = 0.9 + 0.01 * np.arange(len(d))
    values = {"SB": b, "LB": b - 0.1, "X": b + d}
    jobs = plan(asked, asked.base, {label: [{}] for label in rows}, range(len(d)), tmp_path)
    results = [Result(job, "finished", {"test_accuracy": float(values[job.label][job.seed])}) for job in jobs]
    (swept,) = judge(asked, summarize(results, "test_accuracy"))
    planted(tmp_path, "SB", 0.5, b=SMALL, seeds=range(len(d)))
    planted(tmp_path, "LB", 0.5, seeds=range(len(d)))
    planted(tmp_path, "X", 0.5, penalty=("gradient_norm", 0.1), seeds=range(len(d)))
    for job in jobs:  # what a sweep leaves there
        found = {"status": "finished", "step": 1, "final": {"test_accuracy": float(values[job.label][job.seed])}}
        (job.folder / "result.json").write_text(json.dumps(found))
    name = {"above": "generalization_gap", "reaches": "gradient_norm_recovers", "misses": "average_jacobian_fails"}[
        relation
    ]
    ours = regimes.Regimes(read(tmp_path))
    difference = regimes.difference(ours.of("gradient_norm"), ours.small).estimate
    assert regimes.decide(relation, difference, 0.005) == swept.decision or swept.decision == "not applicable"
    assert difference.value == pytest.approx(swept.difference.value)
    assert (difference.low, difference.high) == pytest.approx((swept.difference.low, swept.difference.high))
    assert estimate(d) == mean_over_seeds(d)
    if relation == "reaches" and len(d) > 1:
        assert verdict(tmp_path, name).decision == swept.decision


def test_runs_of_a_real_sweep(tmp_path):
    """Every regime of a small sweep is recognized, and ends are those that the sweep has measured."""
    rows = {
        "SB": Row({"batch_size": (4,)}), "LB": Row(), "GN": Row({"penalty": ("gradient_norm=0.1",)}),
        "EG": Row({"method": "external_grafting"}, external="SB"), "NGD": Row({"method": "normalized_gd"}),
    }  # fmt: skip
    base = Experiment(
        n=64,
        hidden=(4,),
        steps=4,
        batch_size=(32,),
        micro_batch=4,
        diagnostics=("batch_gradient_norm", "test_accuracy"),
    )
    sentences = (Sentence("gap", "above", ("SB", "LB")),)
    outcome = conduct(Sweep(Study("a test", base, rows, sentences=sentences, margin=0.005), tmp_path, seeds=(0, 1)))
    found = regimes.Regimes(read(tmp_path))
    assert (found.b, found.B, set(found.kinds)) == (4, 32, {"gradient_norm", "ExternalGrafting", "NormalizedGD"})
    d = regimes.difference(found.small, found.large).estimate
    assert (d.value, d.low, d.high) == pytest.approx((lambda e: (e.value, e.low, e.high))(outcome.judged[0].difference))
    assert verdict(tmp_path, "generalization_gap").decision == outcome.judged[0].decision
    assert {v.decision for v in claims.check(read(tmp_path)) if v.claim in OURS} <= {
        "undecided",
        "not applicable",
        "does not hold",
    }


def test_methods_are_known_by_the_names_of_their_optimizers():
    names = ("iterative_grafting", "external_grafting", "normalized_gd", "anti_pgd")
    assert {cl.methods.METHODS[name].__name__ for name in names} == {*METHODS, "AntiPGD"} == set(regimes._OURS)


# -- over data sets --------------------------------------------------------------------------------


def test_reversals_between_data_sets_are_marked(tmp_path):
    for data, end in (("cifar10-8k", 0.949), ("svhn", 0.93), ("digits", 0.95)):
        baselines(tmp_path / data, data=data, large=0.95 if data == "digits" else 0.9)
        planted(tmp_path / data, "GN", end, penalty=("gradient_norm", 0.1), data=data)
        planted(tmp_path / data, "FT", 0.95, penalty=("fisher_trace", 0.1), data=data)
    rows = {row.claim: row for row in claims.by_data_set(read(tmp_path))}
    gn = rows["gradient_norm_recovers"]
    assert {name: cell.decision for name, cell in gn.cells.items()} == {
        "cifar10-8k": "holds", "svhn": "does not hold", "digits": "not applicable"
    }  # fmt: skip
    assert gn.reversed
    assert not rows["fisher_trace_recovers"].reversed
    assert gn.cells["cifar10-8k"].paper == pytest.approx(-0.0035)
    assert gn.cells["digits"].paper is None
    assert gn.paper["tiny_imagenet"] == pytest.approx(-0.0186)
    head, *body = datasets.lines([*rows.values()])
    assert head == ("claim", "cifar10-8k", "digits", "svhn", "", "in the paper")
    (line,) = [line for line in body if line[0] == "gradient_norm_recovers"]
    assert line[1].startswith("holds -0.001 [")
    assert line[1].endswith("; paper -0.0035")
    assert "test_accuracy" in line[1]
    assert (line[2], line[4]) == ("not applicable", "reversal")
    assert line[5] == "cifar10 -0.0035, cifar100 -0.0079, tiny_imagenet -0.0186, svhn -0.0092"
    assert "edge_of_stability" not in {one[0] for one in body}
    everything = datasets.lines([*rows.values()], everything=True)
    assert len(everything) == len(CLAIMS) + 1


def test_runs_that_contradict_each_other_on_one_data_set_are_a_reversal(tmp_path, monkeypatch):
    decisions = ("holds", "does not hold")
    found = [claims.Verdict("edge_of_stability", decision, "") for decision in decisions]
    monkeypatch.setattr(datasets, "check", lambda runs: found)
    cl.Run.create(tmp_path / "a", {"data": "mine", "training": {}}).close()
    rows = {row.claim: row for row in claims.by_data_set(read(tmp_path))}
    assert rows["edge_of_stability"].cells["mine"].decision == "mixed"
    assert [row.claim for row in rows.values() if row.reversed] == ["edge_of_stability"]


def test_several_verdicts_on_one_data_set():
    def cell(*decisions):
        return datasets._cell([claims.Verdict("c", d, d) for d in decisions], None)

    assert cell("holds", "undecided").decision == "holds"
    assert cell("holds", "does not hold", "holds").decision == "mixed"
    assert datasets._written(cell("holds", "does not hold", "holds")) == "mixed (2 holds, 1 does not hold)"
    assert datasets._written(cell("undecided", "undecided")) == "undecided"
    assert cell().reason == "needs several runs"


def test_runs_without_a_named_data_set(tmp_path):
    w = cl.Run.create(tmp_path / "a", {"training": {}})
    w.close()
    v = cl.Run.create(tmp_path / "b", {"data": "mine", "training": {}})
    v.close()
    cl.Run.create(tmp_path / "c", {"experiment": "mine", "training": {}}).close()
    assert set(claims.by_data_set(read(tmp_path))[0].cells) == {"unnamed", "mine"}


def test_values_of_the_paper_are_differences_of_its_tables():
    """Table 1, CIFAR-10: SB 92.33, LB 90.00, UJ 90.46; tables 2 and 4, CIFAR-100."""
    from curvlab.claims.novack2022 import _minus

    assert _minus((90.46,), (92.33,), ("cifar10",)) == {"cifar10": -0.0187}
