"""Statistics of samples alone, against arithmetic on lattices and naive loops."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.detect import DistanceRatio, NearestSample, NormalizedL2, SampleDetector, TiledL2
from memjax.evaluate.distances import copy_ratios, find_copies, nearest_by_tile, nearest_neighbors

ALL = (NearestSample(), NormalizedL2(neighbors=5), DistanceRatio(), TiledL2())
RNG = np.random.default_rng(0)
REFERENCE = RNG.uniform(-1, 1, (30, 4, 6, 1)).astype(np.float32)
SAMPLES = np.concatenate(
    [
        REFERENCE[:8] + RNG.normal(0, 0.05, (8, 4, 6, 1)),
        RNG.uniform(-1, 1, (40, 4, 6, 1)),
    ]
).astype(np.float32)
ELSEWHERE = RNG.uniform(-1, 1, (10, 4, 6, 1)).astype(np.float32)
IMAGES = np.concatenate([REFERENCE, ELSEWHERE])


def flat(images):
    return images.reshape(len(images), -1).astype(np.float64)


def naive_ratio(image, samples, reference):
    best = np.inf
    for g in flat(samples):
        others = [y for y in flat(reference) if not np.array_equal(y, image)]
        best = min(best, np.linalg.norm(image - g) / min(np.linalg.norm(y - g) for y in others))
    return best


@pytest.mark.parametrize("detector", ALL)
def test_they_are_detectors_of_samples(detector):
    assert isinstance(detector, SampleDetector)
    assert detector == type(detector)(**vars(detector))
    assert len({detector, type(detector)(**vars(detector))}) == 1


def test_nearest_sample_equals_scipy():
    found = NearestSample().compare(IMAGES, SAMPLES, REFERENCE)
    exact = cdist(flat(IMAGES), flat(SAMPLES)).min(axis=1)
    np.testing.assert_allclose(found.raw, exact, rtol=1e-12)
    spread = np.std(REFERENCE.astype(np.float64))
    np.testing.assert_allclose(found.value, -exact / (spread * 24**0.5), rtol=1e-12)
    assert (found.status == Status.OK).all()


@pytest.mark.parametrize(("neighbors", "alpha"), [(5, 0.5), (50, 0.25)])
def test_normalized_distance_equals_a_naive_loop(neighbors, alpha):
    found = NormalizedL2(neighbors, alpha).compare(IMAGES, SAMPLES, REFERENCE)
    to_reference = np.sort(cdist(flat(SAMPLES), flat(REFERENCE)), axis=1)
    scale = alpha * to_reference[:, :neighbors].mean(axis=1)
    exact = (cdist(flat(IMAGES), flat(SAMPLES)) / scale[None]).min(axis=1)
    np.testing.assert_allclose(found.raw, exact, rtol=1e-12)
    np.testing.assert_array_equal(found.value, -found.raw)


def test_normalized_distance_on_a_lattice():
    """At 0.1 beside an integer the five nearest are at .1, .9, 1.1, 1.9, 2.1: mean 1.22."""
    lattice = np.arange(20.0)[:, None]
    found = NormalizedL2(neighbors=5).compare(lattice, np.array([[10.1]]), lattice)
    np.testing.assert_allclose(found.raw, np.abs(lattice[:, 0] - 10.1) / 0.61, rtol=1e-12)
    repeated = np.concatenate([lattice, np.full((50, 1), 10.0)])
    again = NormalizedL2(neighbors=5).compare(lattice, np.array([[10.1]]), repeated)
    np.testing.assert_array_equal(again.raw, found.raw)  # repetitions count once


def test_ratio_equals_a_naive_loop():
    found = DistanceRatio().compare(IMAGES, SAMPLES, REFERENCE)
    exact = [naive_ratio(image, SAMPLES, REFERENCE) for image in flat(IMAGES)]
    np.testing.assert_allclose(found.raw, exact, rtol=1e-12)
    np.testing.assert_allclose(found.value, -found.raw / (1 + found.raw), rtol=1e-12)


def test_ratio_on_a_lattice():
    """A sample at t beside node 5 gives 5 the ratio t/(1-t), 6 the ratio (1-t)/t, 7 (2-t)/t."""
    lattice = np.arange(10.0)[:, None]
    raw = DistanceRatio().compare(lattice, np.array([[5.2]]), lattice).raw
    np.testing.assert_allclose(raw[5:8], [0.2 / 0.8, 0.8 / 0.2, 1.8 / 0.2], rtol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_a_ratio_below_a_third_is_a_copy_and_nothing_else(seed):
    """In one dimension with integers and thirds in reach, and with duplicates, ties abound."""
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, 30, (25, 1)).astype(np.float32)
    samples = (rng.integers(0, 240, (12, 1)) / 8).astype(np.float32)
    raw = copy_ratios(reference, samples, reference)
    hits = find_copies(samples, reference).hits
    np.testing.assert_array_equal(raw < 1 / 3, hits > 0)
    values = DistanceRatio().compare(reference, samples, reference).value
    np.testing.assert_array_equal(values > -1 / 4, hits > 0)


def test_exact_copies_of_other_images_leave_a_finite_value():
    found = DistanceRatio().compare(REFERENCE, REFERENCE[:3], REFERENCE)
    assert (found.raw[:3] == 0).all()
    assert np.isinf(found.raw[3:]).all()
    assert (found.value == np.where(np.arange(30) < 3, 0.0, -1.0)).all()
    assert (found.status == Status.OK).all()


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_tiles_equal_a_naive_loop(grid):
    detector = TiledL2(grid)
    found = detector.compare(IMAGES, SAMPLES, REFERENCE)
    tiles = detector.tiles((4, 6, 1)).ravel()
    exact = np.full((len(IMAGES), len(SAMPLES)), -np.inf)
    for tile in range(tiles.max() + 1):
        here = tiles == tile
        squared = cdist(flat(IMAGES)[:, here], flat(SAMPLES)[:, here]) ** 2
        exact = np.maximum(exact, np.sqrt(squared / here.sum()))
    np.testing.assert_allclose(2 * found.raw, exact.min(axis=1), rtol=1e-12)
    np.testing.assert_allclose(
        found.value, -2 * found.raw / np.std(REFERENCE.astype(np.float64)), rtol=1e-12
    )


def test_one_tile_is_the_plain_distance():
    found = nearest_by_tile(IMAGES, SAMPLES, np.zeros((4, 6, 1), int), 3)
    plain = nearest_neighbors(IMAGES, SAMPLES, 3)
    np.testing.assert_array_equal(found.index, plain.index)
    np.testing.assert_allclose(found.distance * 24**0.5, plain.distance, rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ((8, 8, 1), [4] * 16),
        ((4, 4, 3), [12] * 4),
        ((2, 3, 1), [6]),
        ((9, 8, 1), [4] * 12 + [6] * 4),
        ((32, 32, 3), [192] * 16),
        ((8,), [2] * 4),
        ((1, 1, 1), [1]),
    ],
)
def test_small_images_have_fewer_tiles(shape, counts):
    tiles = TiledL2().tiles(shape)
    assert tiles.shape == shape
    assert sorted(np.bincount(tiles.ravel()).tolist()) == counts
    if len(shape) == 3:
        assert (tiles == tiles[:, :, :1]).all()  # channels stay together


def test_a_small_thing_that_differs_is_seen_by_tiles_only():
    """A shared background hides a changed corner from the plain distance."""
    background = RNG.uniform(-1, 1, (8, 8, 1))
    changed = background.copy()
    changed[:2, :2] += 1.0
    noisy = background + RNG.choice([-0.3, 0.3], (8, 8, 1))
    images = np.stack([changed, noisy])
    plain = NearestSample().compare(images, background[None], images).value
    tiled = TiledL2().compare(images, background[None], images).value
    assert plain[0] > plain[1]
    assert tiled[0] < tiled[1]


@pytest.mark.parametrize("detector", ALL)
def test_a_stored_image_scores_higher(detector):
    value = detector.compare(IMAGES, SAMPLES, REFERENCE).value
    assert value[:8].min() > value[8:].max()


@pytest.mark.parametrize("detector", ALL)
def test_without_a_second_reference_image_what_compares_is_undefined(detector):
    reference = np.concatenate([REFERENCE[:1], REFERENCE[:1], np.full((1, 4, 6, 1), np.nan)])
    found = detector.compare(IMAGES, SAMPLES, reference.astype(np.float32))
    compares = isinstance(detector, (NormalizedL2, DistanceRatio))
    assert (found.status == (Status.UNDEFINED if compares else Status.OK)).all()
    assert np.isnan(found.value).all() == compares
    constant = detector.compare(IMAGES, SAMPLES, np.zeros((3, 4, 6, 1)))
    assert (constant.status == Status.UNDEFINED).all()


@pytest.mark.parametrize("detector", ALL)
def test_bad_samples_are_passed_over(detector):
    bad = np.stack([np.full((4, 6, 1), v, np.float32) for v in (np.nan, np.inf)])
    clean = detector.compare(IMAGES, SAMPLES, REFERENCE)
    found = detector.compare(IMAGES, np.concatenate([bad, SAMPLES]), REFERENCE)
    np.testing.assert_array_equal(found.value, clean.value)
    with pytest.raises(InputError, match=r"expected (1\.\.0|at least one finite)"):
        detector.compare(IMAGES, bad, REFERENCE)


@pytest.mark.parametrize("detector", ALL)
def test_a_sample_far_away_does_not_blur_the_others(detector):
    far = np.full((1, 4, 6, 1), 1e30, np.float32)
    clean = detector.compare(IMAGES, SAMPLES, REFERENCE)
    found = detector.compare(IMAGES, np.concatenate([far, SAMPLES]), REFERENCE)
    # What divides by distances to reference images puts a ceiling on all, and changes no other.
    ceiling = {"normalized_l2": 2.0, "distance_ratio": 1.0}.get(detector.name, np.inf)
    np.testing.assert_array_equal(found.raw < 0.999 * ceiling, clean.raw < 0.999 * ceiling)
    kept = clean.raw < 0.999 * ceiling
    np.testing.assert_array_equal(found.raw[kept], clean.raw[kept])
    assert kept.sum() >= 8


@pytest.mark.parametrize("make", [lambda: NormalizedL2(1), lambda: TiledL2(0)])
def test_unusable_settings_are_refused(make):
    with pytest.raises(InputError, match=r"^(neighbors|grid): expected"):
        make()
    with pytest.raises(InputError, match=r"^alpha: expected"):
        NormalizedL2(alpha=0.0)
    with pytest.raises(InputError, match="shape"):
        NearestSample().compare(IMAGES, SAMPLES[:, :3], REFERENCE)
