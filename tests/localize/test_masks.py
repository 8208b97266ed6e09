"""Masks: smoothing, thresholds that have not seen the scored images, and the protocol that has."""

import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.evaluate.overlap import mask_accuracy, mask_iou, mean_iou
from memjax.localize.masks import fit_threshold, published_overlap, smooth

RNG = np.random.default_rng


def test_smoothing_is_a_gaussian_filter():
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros((2, 21, 21))
    impulse[0, 10, 10] = 1.0
    expected = gaussian_filter(impulse[0], 1.3, truncate=8)
    np.testing.assert_allclose(smooth(impulse, 1.3)[0], expected, atol=1e-8)
    assert not np.any(smooth(impulse, 1.3)[1])
    np.testing.assert_allclose(smooth(np.full((3, 5), 2.0), 0.7), 2.0)
    np.testing.assert_array_equal(smooth(impulse, 0), impulse)
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="width"):
            smooth(impulse, bad)


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_of_all(seed):
    """Against every cut there is, with ties and missing pixels."""
    rng = RNG(seed)
    maps, truth = rng.integers(-3, 4, (4, 6)).astype(float), rng.random((4, 6)) < 0.4
    maps[0, 0] = np.nan
    truth[1, 1], counted = True, rng.random((4, 6)) < 0.8
    counted[1, 1] = True
    used = counted & ~np.isnan(maps)
    found = fit_threshold(maps, truth, counted=counted)

    def iou(threshold):
        return mask_iou((maps[used] > threshold)[None], truth[used][None])

    cuts = np.arange(-4, 4) + 0.5
    assert iou(found) == max(iou(cut) for cut in cuts)
    assert np.isclose(found % 1, 0.5) or found < -3


def test_a_threshold_needs_something_to_learn_from():
    maps = np.zeros((1, 2))
    with pytest.raises(InputError, match="stored pixel"):
        fit_threshold(maps, np.zeros((1, 2), bool))
    with pytest.raises(InputError, match="shape"):
        fit_threshold(maps, np.zeros((1, 3), bool))


def test_the_published_protocol_is_its_code():
    """Line by line as released: log1p, min-max of all, 101 thresholds, three bests."""
    rng = RNG(0)
    maps, truth = 50 * rng.standard_normal((6, 5, 5)), rng.random((6, 5, 5)) < 0.3
    truth[2] = False
    scaled = np.log1p(np.clip(maps, 0, None))
    scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min())
    best = [0.0, 0.0, 0.0]
    for threshold in np.linspace(0 - 1e-6, 1 + 1e-6, 101):
        masks = scaled > threshold
        inter, union = (masks & truth).sum((1, 2)), (masks | truth).sum((1, 2))
        each = [1.0 if u == 0 else i / u for i, u in zip(inter, union, strict=True)]
        best[0] = max(best[0], inter.sum() / union.sum())
        best[1] = max(best[1], float(np.mean(each)))
        best[2] = max(best[2], float((masks == truth).mean()))
    found = published_overlap(maps, truth)
    np.testing.assert_allclose([found.iou, found.mean_iou, found.accuracy], best)
    for value, threshold, measure in zip(
        found[:3], found.thresholds, (mask_iou, mean_iou, mask_accuracy), strict=True
    ):
        assert measure(scaled > threshold, truth) == pytest.approx(value)


def test_the_published_protocol_cannot_fall_below_all_ones():
    rng = RNG(1)
    truth = rng.random((4, 8, 8)) < 0.5
    noise = published_overlap(rng.standard_normal((4, 8, 8)), truth)
    assert noise.iou >= mask_iou(np.ones_like(truth), truth)
    # A threshold from other images has no such floor: here it is found where the signal is not.
    found = published_overlap(np.zeros((4, 8, 8)), truth)
    assert found.iou == mask_iou(np.ones_like(truth), truth)
