"""Overlap of masks and maps with the truth: values against the definitions, floors, coverage."""

import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.evaluate.overlap import (
    map_ranking,
    mask_accuracy,
    mask_iou,
    mask_overlap,
    mean_iou,
)
from memjax.evaluate.roc import auroc, average_precision

RNG = np.random.default_rng


def draw(rng, n=12, side=4, skill=1.0):
    truth = rng.random((n, side, side)) < rng.random((n, 1, 1))
    maps = skill * truth + rng.standard_normal(truth.shape)
    return maps, truth


def test_values_are_the_definitions():
    from sklearn.metrics import (
        accuracy_score,
        average_precision_score,
        jaccard_score,
        roc_auc_score,
    )

    maps, truth = draw(RNG(0))
    masks, counted = maps > 0.5, RNG(1).random(truth.shape) < 0.7
    found = mask_overlap(masks, truth, counted=counted, num_resamples=20)
    ranking = map_ranking(maps, truth, counted=counted, num_resamples=20)
    assert found.iou.value == pytest.approx(jaccard_score(truth[counted], masks[counted]))
    assert found.accuracy.value == pytest.approx(accuracy_score(truth[counted], masks[counted]))
    each = [jaccard_score(t[c], m[c]) for m, t, c in zip(masks, truth, counted, strict=True)]
    assert found.mean_iou.value == pytest.approx(np.mean(each))
    assert ranking.auroc.value == pytest.approx(roc_auc_score(truth[counted], maps[counted]))
    precision = average_precision_score(truth[counted], maps[counted])
    assert ranking.average_precision.value == pytest.approx(precision)
    assert (found.num_images, found.num_pixels) == (12, counted.sum())
    assert (ranking.num_stored, ranking.num_free) == (truth[counted].sum(), (~truth[counted]).sum())
    # Without ``counted`` they are the plain functions.
    whole = mask_overlap(masks, truth, num_resamples=2)
    assert whole.iou.value == mask_iou(masks, truth)
    assert whole.mean_iou.value == pytest.approx(mean_iou(masks, truth))
    assert whole.accuracy.value == mask_accuracy(masks, truth)


def test_floors_are_no_skill():
    maps, truth = draw(RNG(0), n=40)
    masks = maps > 0.5
    found = mask_overlap(masks, truth, num_resamples=2)
    share, said = truth.mean(), masks.mean()
    assert found.iou.all_ones == found.accuracy.all_ones == pytest.approx(share)
    assert found.mean_iou.all_ones == pytest.approx(truth.mean((1, 2)).mean())
    by_chance = said * share / (said + share - said * share)
    assert found.iou.random == pytest.approx(by_chance, abs=0.01)
    assert found.accuracy.random == pytest.approx(said * share + (1 - said) * (1 - share), abs=0.01)
    assert found.iou.value > found.iou.random + 0.1
    ranking = map_ranking(maps, truth, num_resamples=2)
    assert ranking.auroc.random == 0.5
    assert ranking.average_precision.random == pytest.approx(share)


def test_empty_unions_count_one():
    nothing = np.zeros((2, 3), bool)
    found = mask_overlap(nothing, nothing, num_resamples=5)
    assert found.iou.value == found.mean_iou.value == found.accuracy.value == 1
    assert found.iou.all_ones == 0
    one = mask_overlap(np.array([[True], [False]]), np.array([[False], [False]]), num_resamples=5)
    assert (one.iou.value, one.mean_iou.value) == (0, 0.5)


def test_ties_and_missing_pixels_rank_as_they_should():
    maps, truth = draw(RNG(3))
    maps = np.round(maps)
    maps[0, 0, :2] = np.nan
    found = map_ranking(maps, truth, num_resamples=50)
    assert found.excluded == 2
    assert found.auroc.value == auroc(maps.reshape(-1), truth.reshape(-1)).value
    expected = average_precision(maps.reshape(-1), truth.reshape(-1), num_resamples=2).value
    assert found.average_precision.value == expected


def test_a_resample_is_the_number_of_the_drawn_images():
    """The bootstrap's weights say what repeating images would: seen through its extremes."""
    maps, truth = draw(RNG(4), n=2)
    maps = np.round(maps)
    found = map_ranking(maps, truth, num_resamples=400, confidence=0.999)

    def value(rows):
        return auroc(maps[rows].reshape(-1), truth[rows].reshape(-1)).value

    possible = [value([0, 0]), value([0, 1]), value([1, 1])]
    assert found.auroc.low == pytest.approx(min(possible))
    assert found.auroc.high == pytest.approx(max(possible))


@pytest.mark.parametrize("number", ["iou", "auroc"])
def test_intervals_cover_other_prompts(number):
    """Prompts differ in how well they are found; two images of one are no two prompts."""
    rng, prompts, repeats = RNG(5), 20, 60

    def value(found):
        return getattr(found, number)

    def measure(num, **options):
        skill = np.repeat(1 + rng.standard_normal(num), 2)[:, None]
        truth = np.broadcast_to(np.arange(16) < 8, (2 * num, 16))
        maps = skill * truth + rng.standard_normal(truth.shape)
        clusters = np.repeat(np.arange(num), 2)
        run = mask_overlap if number == "iou" else map_ranking
        given = maps > 0.5 if number == "iou" else maps
        return value(run(given, truth, clusters=clusters, **options))

    truth = measure(5_000, num_resamples=2).value
    hits = sum(
        found.low <= truth <= found.high
        for found in (measure(prompts, num_resamples=200) for _ in range(repeats))
    )
    assert hits >= (0.93 - 3 * (0.93 * 0.07 / repeats) ** 0.5) * repeats


def test_intervals_do_not_collapse_where_all_is_right():
    truth = np.broadcast_to(np.arange(6) < 3, (20, 6))
    found = mask_overlap(truth, truth, num_resamples=50)
    assert (found.iou.value, found.iou.high) == (1, 1)
    assert found.iou.low == pytest.approx(0.025 ** (1 / 20))
    ranking = map_ranking(truth.astype(float), truth, num_resamples=50)
    assert ranking.auroc.low == pytest.approx(0.025 ** (1 / 20))


def test_a_group_that_is_empty_has_no_ranking():
    found = map_ranking(np.ones((2, 3)), np.ones((2, 3), bool), num_resamples=5)
    assert np.isnan([found.auroc.value, found.auroc.low]).all()


def test_arrays_that_do_not_fit_are_refused():
    masks = np.zeros((2, 3), bool)
    with pytest.raises(InputError, match="truth, counted"):
        mask_overlap(masks, masks[:, :2])
    with pytest.raises(InputError, match="confidence"):
        map_ranking(np.zeros((2, 3)), masks, confidence=1.0)
