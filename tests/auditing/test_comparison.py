"""Which detectors an audit plans, and how those that compare images with each other do so."""

import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.auditing import Calibration, audit
from memjax.auditing.plan import (
    DEFAULT_DETECTORS,
    DETECTORS,
    RANKING,
    SAMPLE_DETECTORS,
    Given,
    plan_detectors,
)
from memjax.data.images import from_array
from memjax.diffusion.model import Model
from memjax.evaluate import conformal_p_values, excess_over_difficulty, image_difficulty

NUM_STORED = 6
NOISE = {"sigma_min": 0.01, "sigma_max": 20.0, "data_std": 0.4}


def run(model, images, **arguments):
    return audit(model, images, num_samples=0, **arguments)


def column(result, name):
    return np.array(result.table.column(name).to_pylist(), dtype=object)


def names_of(planned):
    return [entry.label for entry in planned]


def test_defaults_and_all_leave_out_what_cannot_run(model):
    none = Given(conditions=False, baseline=False, samples=False)
    everything = names_of(plan_detectors("all", model))
    assert everything == list(
        dict.fromkeys((*RANKING, *DEFAULT_DETECTORS, *DETECTORS, *SAMPLE_DETECTORS))
    )
    assert names_of(plan_detectors(None, model)) == [RANKING[0], *DEFAULT_DETECTORS]
    few, many = (names_of(plan_detectors(specs, model, none)) for specs in (None, "all"))
    assert few[0] == many[0] == RANKING[0]
    assert set(few[1:]) < set(DEFAULT_DETECTORS)
    assert set(few) < set(many) < set(everything)
    assert not set(many) & set(SAMPLE_DETECTORS)
    mine = names_of(plan_detectors(["score_norm", "all"], model, none))
    assert mine[0] == "score_norm"
    assert sorted(mine) == sorted(many)


def test_few_images_rank_by_the_blurred_neighbor_and_few_vectors_by_the_flux(model):
    few = Given(images=49)
    assert names_of(plan_detectors(None, model, few)) == [RANKING[1], *DEFAULT_DETECTORS]
    assert names_of(plan_detectors("all", model, few))[0] == RANKING[1]
    vectors = Model(lambda x, sigma, c=None: -x, (16,), sigma_min=0.01, sigma_max=9.0, data_std=1.0)
    assert names_of(plan_detectors(None, vectors)) == [RANKING[0], *DEFAULT_DETECTORS]
    assert names_of(plan_detectors(None, vectors, few)) == list(DEFAULT_DETECTORS)
    assert RANKING[1] not in names_of(plan_detectors("all", vectors))
    with pytest.raises(InputError, match=r"over_blurred needs images .*the model's are \[16\]"):
        plan_detectors("sphere_loss_over_blurred", vectors)
    with pytest.raises(InputError, match=r"over_difficulty compares images .* 50"):
        plan_detectors("flipd_over_difficulty", model, few)
    with pytest.raises(InputError, match="unknown 'distance_ratio_over_difficulty'"):
        plan_detectors("distance_ratio_over_difficulty", model)


def many_images(n=90):
    """The stored images of the world, and so many of its broad component that they compare."""
    rng = np.random.default_rng(0)
    stored = rng.uniform(-0.9, 0.9, (NUM_STORED, 4, 4, 1))
    scale = rng.uniform(0.1, 0.4, (n, 1, 1, 1))
    ordinary = np.clip(rng.normal(0, 1, (n, 4, 4, 1)) * scale, -0.99, 0.99)
    return from_array(np.concatenate([stored, ordinary]).astype(np.float32))


def test_the_excess_over_difficulty_is_a_column_like_any_other(model):
    images = many_images()
    names = ["score_norm_over_difficulty", "score_norm"]
    result = run(model, images, detectors=names)
    compared, alone = (column(result, name).astype(float) for name in names)
    logarithm = -np.log(np.maximum(-alone, 1e-30))  # of a norm, which is 0 at best
    expected = excess_over_difficulty(logarithm, image_difficulty(images.images))
    np.testing.assert_allclose(compared, expected, rtol=1e-12)
    np.testing.assert_array_equal(column(result, f"{names[0]}_raw"), alone)
    np.testing.assert_array_equal(column(result, f"{names[0]}_se"), 0)
    assert sorted(row["row"] for row in result.top(NUM_STORED)) == list(range(NUM_STORED))
    entry, other = result.manifest["detectors"]
    assert entry["cost"] == other["cost"]
    assert entry["sigma"] == other["sigma"]
    assert result.manifest["primary"] == names[0]

    # Ranks compare the rows said to be trained on; others are measured by them.
    trained = np.arange(96) % 4 > 0
    some = run(model, images, detectors=names, trained_on=trained)
    difficulty = image_difficulty(images.images, trained)
    expected = excess_over_difficulty(logarithm, difficulty, trained)
    np.testing.assert_allclose(column(some, names[0]).astype(float), expected, rtol=1e-12)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_flags_compare_the_tested_and_the_calibrating_rows(model, elsewhere):
    images, at = many_images(), np.arange(60, 96)
    if elsewhere:
        pixels, rest = images.images[at], from_array(images.images[:60])
        calibration = Calibration("membership", images=from_array(pixels))
    else:
        rest = images
        calibration = Calibration("membership", rows=at)
    names = ["score_norm_over_difficulty", "score_norm"]
    # Ranks look at some rows only, flags at all that are tested or calibrate.
    arguments = {"trained_on": np.arange(55), "calibrations": (calibration,), "fdr": 0.2}
    result = run(model, rest, detectors=names, **arguments)
    alone = column(result, "score_norm").astype(float)
    logarithm = -np.log(np.maximum(-alone, 1e-30))
    value = excess_over_difficulty(logarithm, image_difficulty(images.images))
    expected = conformal_p_values(value[:60], value[60:])
    found = column(result, f"p_membership_{names[0]}")[:60].astype(float)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert column(result, f"flag_membership_{names[0]}")[:NUM_STORED].all()


def test_too_few_different_images_leave_the_comparison_out(model):
    images = many_images()
    repeated = from_array(images.images[np.arange(96) % 40])
    assert run(model, repeated, detectors=None).manifest["primary"] == RANKING[1]
    with pytest.raises(InputError, match="at least 50 different ones, found 40"):
        run(model, repeated, detectors="flipd_over_difficulty")
    with pytest.raises(InputError, match="at least 50 different ones, found 49"):
        run(model, images, detectors="flipd_over_difficulty", trained_on=np.arange(49))
    few = Calibration("membership", rows=np.arange(20), tested=np.arange(49))
    with pytest.raises(InputError, match="at least 50 different ones, found 49"):
        run(model, images, detectors="flipd_over_difficulty", calibrations=(few,))


def test_too_few_scores_leave_the_excess_undefined(model):
    images = many_images()
    dark = images.images[:50].mean(axis=(1, 2, 3), keepdims=True)[:, 0, 0, 0]

    def failing(x, sigma, condition=None):
        return jnp.where(jnp.mean(x) > float(np.median(dark)), jnp.nan, model(x, sigma))

    result = run(
        type(model)(failing, model.event_shape, **NOISE),
        images,
        detectors=["score_norm_over_difficulty", "score_norm"],
    )
    status = column(result, "score_norm_over_difficulty_status")
    scored = np.array([value is not None for value in column(result, "score_norm")])
    assert 0 < scored.sum() < 50
    assert set(status[scored]) == {"undefined"}
    assert set(status[~scored]) == {"nonfinite"}
    assert set(column(result, "score_norm_over_difficulty")) == {None}
