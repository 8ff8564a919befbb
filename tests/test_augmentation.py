"""Cropped and mirrored images. Against references: crops cut by hand from the padded image, the mean over all that can be
drawn, penalties of the batch as it was trained on. Behavioural: what is measured does not change, runs resume, and what
cannot be augmented is refused.
"""

import dataclasses
import itertools

import pytest
import torch

import curvlab as cl
from curvlab import Run
from curvlab.linalg.probes import generator
from curvlab.problems import Augmented
from curvlab.problems.augmentation import cropped, draws
from curvlab.problems.experiments import build, start
from curvlab.problems.presets import Experiment

IMAGES = Experiment(
    data="synthetic_images-24", data_options=("num_classes=3", "shape_of=small"), model="cnn6", model_size="small",
    loss="cross_entropy", lr=0.05, batch_size=(8,), steps=6, augment="crop_flip", epochs=True, dtype="float64",
    diagnostics=("loss", "gradient_norm", "gradient_norm_penalty", "batch_gradient_norm"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    """synthetic_images of 3x8x8: a shape is no option of the command line."""
    from curvlab.problems import registry, synthetic_images

    def small(n, *, shape_of, **options):
        return synthetic_images(n, n_test=4, shape=(3, 8, 8), **options)

    monkeypatch.setitem(registry.DATA, "synthetic_images", small)


def trained(experiment, **options):
    return torch.stack([at.w for at in start(experiment, 8, **options).snapshots])


def test_pixels_are_those_of_the_padded_image_and_flips_mirror():
    x = torch.arange(2 * 3 * 5 * 4, dtype=torch.float64).reshape(2, 3, 5, 4) + 1
    padded = torch.zeros(2, 3, 13, 12, dtype=torch.float64)
    padded[:, :, 4:9, 4:8] = x
    for (top, left), mirror in itertools.product(itertools.product((0, 3, 8), (0, 4, 8)), (False, True)):
        corners, mirrored = torch.tensor([[top, left], [4, 4]]), torch.tensor([mirror, False])
        got = cropped(x, corners, mirrored)
        crop = padded[0, :, top : top + 5, left : left + 4]
        assert torch.equal(got[0], crop.flip(-1) if mirror else crop)
        assert torch.equal(got[1], x[1])  # the middle of the padded image is the image
    assert torch.equal(cropped(cropped(x, corners * 0 + 4, ~mirrored | True), corners * 0 + 4, ~mirrored | True), x)


def test_draws_are_uniform_over_places_and_sides():
    corners, mirrored = draws(20_000, generator(0, "test"))
    assert (corners.min(), corners.max()) == (0, 8)
    counts = torch.bincount(corners[:, 0] * 9 + corners[:, 1], minlength=81)
    expected = 20_000 / 81
    assert float(((counts - expected) ** 2 / expected).sum()) < 80 + 5 * (2 * 80) ** 0.5  # chi-squared, 80 degrees
    assert abs(float(mirrored.double().mean()) - 0.5) < 5 * (0.25 / 20_000) ** 0.5


def test_the_mean_over_draws_is_the_mean_over_all_crops():
    image = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = torch.tensor(list(itertools.product(range(9), range(9))))
    every = [cropped(image.expand(81, -1, -1, -1), places, torch.full((81,), side)) for side in (False, True)]
    exact, spread = torch.cat(every).mean(0), torch.cat(every).std(0, correction=0)
    got = cropped(image.expand(5000, -1, -1, -1), *draws(5000, generator(1, "test"))).mean(0)
    assert ((got - exact).abs() <= 5 * spread / 5000**0.5 + 1e-12).all()


def test_batches_are_those_of_the_seed_with_their_labels():
    L, _, _, batches = build(IMAGES, 8)
    plain = build(dataclasses.replace(IMAGES, augment="none"), 8)[3]
    (x, y), whole = L.examples.batches[0], list(batches)
    for step, (index, (images, labels)) in enumerate(zip(plain, whole, strict=True)):
        assert torch.equal(labels, y[index])
        assert torch.equal(images, cropped(x[index], *draws(8, generator(0, step, "augmentation"))))
        assert not torch.equal(images, x[index])
    for later, expected in zip(batches.since(4), whole[4:], strict=True):
        assert torch.equal(later[0], expected[0])
    other = next(iter(build(dataclasses.replace(IMAGES, data_seed=1), 8)[3]))[0]
    assert not torch.equal(other, whole[0][0])
    assert (len(batches), batches.batch_size, batches.replacement) == (6, 8, False)


def test_measuring_is_of_the_images_as_they_are(tmp_path):
    found = list(start(IMAGES, 8, run=tmp_path).snapshots)
    L = build(IMAGES, 8)[0]
    losses, norms = (Run(tmp_path).series(name).values for name in ("loss", "gradient_norm"))
    for at, loss, norm in zip(found, losses, norms, strict=True):
        assert float(L.value(at.w)) == pytest.approx(loss, rel=1e-12)
        assert float(L.gradient(at.w).norm()) == pytest.approx(norm, rel=1e-12)
    assert "crops after padding by 4" in Run(tmp_path).config["training"]["batches"]["augment"]
    bare = dataclasses.replace(IMAGES, diagnostics=())
    assert torch.equal(trained(IMAGES), trained(bare))


def test_penalties_and_micro_batches_are_of_the_batch_that_is_trained_on(tmp_path):
    experiment = dataclasses.replace(IMAGES, penalty=("gradient_norm=0.1",), micro_batch=4)
    points, run = trained(experiment, run=tmp_path), Run(tmp_path)
    L, _, _, batches = build(experiment, 8)
    for w, (x, y), penalty, norm in zip(
        points, batches, *(run.series(n).values for n in ("gradient_norm_penalty", "batch_gradient_norm")), strict=True
    ):
        parts = [cl.Objective(L.model, "cross_entropy", (x[k : k + 4], y[k : k + 4])).gradient(w) for k in (0, 4)]
        assert penalty == pytest.approx(float(sum(g.square().sum() for g in parts) / 2), rel=1e-10)
        assert norm > 0


def test_a_resumed_run_sees_the_same_images(tmp_path):
    whole = trained(IMAGES, run=tmp_path / "whole")
    first = start(IMAGES, 8, run=tmp_path / "r", checkpoint_every=2)
    for at in first.snapshots:
        if at.step == 5:
            first.snapshots.close()
            break
    rest = trained(IMAGES, run=tmp_path / "r", checkpoint_every=2, resume=True)
    assert torch.equal(rest, whole[-len(rest) :])
    assert len(rest) == 2  # from the checkpoint before step 4
    series = [Run(tmp_path / name).series("loss") for name in ("whole", "r")]
    assert series[0].values.tolist() == series[1].values.tolist()


def test_claims_about_the_step_do_not_apply_to_augmented_batches(tmp_path):
    measured = ("loss", "sharpness", "gradient_norm", "gradient_variance", "batch_gradient_norm")
    experiment = dataclasses.replace(IMAGES, diagnostics=measured, epochs=False)
    for name in ("crop_flip", "none"):
        list(start(dataclasses.replace(experiment, augment=name), 8, run=tmp_path / name).snapshots)
    for name, applies in (("crop_flip", False), ("none", True)):
        verdicts = {v.claim: v for v in cl.claims.check(Run(tmp_path / name))}
        for claim in ("edge_of_stability", "minibatch_gradient_spread"):
            told = "augmented" in verdicts[claim].reason
            assert (verdicts[claim].decision == "not applicable" and told) != applies, verdicts[claim]


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"augment crops and mirrors images, but an example has shape \(64,\)"):
        start(Experiment(n=16, augment="crop_flip", steps=1))
    L = build(IMAGES, 8)[0]
    with pytest.raises(ValueError, match="expected 1 to 24"):
        Augmented(L, cl.Batches(24, 30, steps=1))
