"""AMS, UMS and rarefaction: hand-made matrices, direct definitions, simulated coverage."""

import itertools
import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist

import memjax.evaluate.similarity as module
from memjax._core.errors import InputError
from memjax.evaluate.distances import find_copies, group_duplicates, nearest_neighbors
from memjax.evaluate.extraction import extraction_scores, rarefaction
from memjax.evaluate.intervals import proportion_interval
from memjax.evaluate.similarity import adaptive_distance_blocks, cosine_blocks, distance_blocks

HAND_MADE = np.array(
    [
        [0.90, 0.80, 0.10, 0.55],  # one best match, two images in the high band
        [0.70, 0.65, 0.62, 0.20],
        [0.55, 0.10, 0.52, 0.30],
        [0.30, 0.20, 0.10, 0.05],
    ]
)
BANDS = [(0.6, 1.0), (0.5, 0.6), (-1.0, 0.5)]


def by_definition(gamma, low, high, distance=False):
    """F, phi and their means as the paper writes them."""
    best = np.nanmin if distance else np.nanmax
    inside = [set(np.flatnonzero((row >= low) & (row <= high))) for row in gamma]
    matched = [low <= best(row) <= high for row in gamma]
    place = np.nanargmin if distance else np.nanargmax
    first = {int(place(row)) for row, hit in zip(gamma, matched, strict=True) if hit}
    n = len(gamma)
    return sum(matched) / n, len(set().union(*inside)) / n, len(first) / n


def values(scores):
    return [(s.ams.value, s.ums.value, s.ums_best.value) for s in scores]


def test_hand_made_matrix():
    high, middle, low = extraction_scores([HAND_MADE], BANDS)
    # Two of four samples match; three images are matched, all by best match of image 0 alone.
    assert (high.ams.value, high.ums.value, high.ums_best.value) == (0.5, 0.75, 0.25)
    assert high.ums.value > high.ams.value
    assert high.hits.tolist() == [2, 2, 1, 0]
    assert high.hits_best.tolist() == [2, 0, 0, 0]
    # The first sample's best match is in the high band, yet it gives image 3 to the middle one.
    assert (middle.ams.value, middle.ums.value) == (0.25, 0.75)
    assert middle.hits.tolist() == [1, 0, 1, 1]
    assert (low.ams.value, low.ums.value) == (0.25, 1.0)
    assert high.num_samples == 4
    assert high.failed == 0


@pytest.mark.parametrize("distance", [False, True])
def test_equal_to_the_definition_in_any_blocks(distance):
    rng = np.random.default_rng(0)
    gamma = rng.uniform(size=(37, 23)).round(2)
    want = [by_definition(gamma, low, high, distance) for low, high in BANDS]
    for size in (1, 5, 37):
        blocks = (gamma[i : i + size] for i in range(0, 37, size))
        assert values(extraction_scores(blocks, BANDS, distance=distance)) == want


def test_ends_belong_to_the_band():
    (found,) = extraction_scores([np.array([[0.5, 0.6], [0.7, 0.4]])], [(0.5, 0.6)])
    assert found.hits.tolist() == [1, 1]
    assert found.ams.value == 0.5


def test_images_of_a_group_count_once():
    group = np.array([7, 7, 3, -1])
    high, middle, _ = extraction_scores([HAND_MADE], BANDS, group=group)
    assert (high.ams.value, high.ums.value, high.ums_best.value) == (0.5, 0.5, 0.25)
    assert high.hits.tolist() == [2, 2, 1, 0]
    assert middle.hits.tolist() == [1, 1, 1, 0]  # the last image is left out
    doubled = np.repeat(HAND_MADE, 2, axis=1)
    pairs = np.repeat(np.arange(4), 2)
    assert values(extraction_scores([doubled], BANDS, group=pairs)) == values(
        extraction_scores([HAND_MADE], BANDS)
    )


def test_failed_samples_match_nothing_and_count():
    gamma = np.concatenate([HAND_MADE, np.full((1, 4), np.nan)])
    gamma[0, 1] = np.nan
    found = extraction_scores([gamma], [(0.6, 1.0), (-np.inf, np.inf)])
    assert found[0].failed == found[1].failed == 1
    assert found[0].ams.value == 2 / 5
    assert found[0].hits.tolist() == [2, 1, 1, 0]
    assert found[1].ams.value == 4 / 5


def test_ams_interval_is_clopper_and_pearsons():
    high = extraction_scores([HAND_MADE], BANDS)[0]
    assert (high.ams.low, high.ams.high) == proportion_interval(2, 4)


def chance_missed(n, h, m):
    return math.comb(n - h, m) / math.comb(n, m)


def test_rarefaction_is_the_mean_over_all_subsets():
    labels = [0, 0, 0, 1, 1, 2, -1, -1]
    hits = np.array([3, 2, 1, 0])
    sizes = np.arange(1, 9)
    found = rarefaction(hits, 8, sizes)
    for m, value in zip(sizes.tolist(), found.value, strict=True):
        subsets = [len(set(s) - {-1}) for s in itertools.combinations(labels, m)]
        assert value == pytest.approx(np.mean(subsets), rel=1e-12)
    assert found.value[-1] == pytest.approx(3)


def test_rarefaction_of_many_samples_is_exact():
    hits = np.array([1, 2, 5, 400, 30_000])
    for m in (1, 1000, 25_000, 49_999):
        want = sum(1 - chance_missed(50_000, h, m) for h in hits.tolist())
        got = rarefaction(hits, 50_000, np.array([m])).value[0]
        assert got == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("m", [1, 4, 7, 8])
def test_variance_is_the_jackknifes(m):
    # Recomputed from the eight estimates that leave one sample out.
    labels = np.array([0, 0, 0, 1, 1, 2, -1, -1])
    n, at = 8, min(m, 7)

    def estimate(kept):
        hits = np.bincount(kept[kept >= 0], minlength=3)
        return sum(1 - chance_missed(n - 1, h, at) for h in hits.tolist())

    left = np.array([estimate(np.delete(labels, i)) for i in range(n)])
    variance = (n - 1) / n * np.sum((left - left.mean()) ** 2)
    found = rarefaction(np.array([3, 2, 1]), n, np.array([m]))
    step = m / n * 1.959964 / 2
    want = found.value[0] - 1.959964 * math.sqrt(variance + step**2)
    assert found.low[0] == pytest.approx(max(0, want), abs=1e-6)


def test_the_union_of_best_matches_is_the_curves_end():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 12, size=40)
    gamma = np.where(np.arange(12) == label[:, None], 0.9, 0.0)
    (found,) = extraction_scores([gamma], [(0.5, 1.0)])
    curve = rarefaction(found.hits_best, 40, np.array([40]))
    assert found.ums == found.ums_best
    np.testing.assert_allclose(
        [found.ums.value, found.ums.low, found.ums.high],
        np.array([curve.value[0], curve.low[0], curve.high[0]]) / 40,
    )


PROFILES = {
    "even": np.full(50, 0.015),
    "steep": 0.18 * 0.8 ** np.arange(40),
    "rare": np.full(200, 0.0002),
    "few": np.array([0.3, 0.2]),
    "none": np.full(10, 1e-6),
}


@pytest.mark.parametrize("name", PROFILES)
def test_intervals_cover_the_expectation(name):
    probability = PROFILES[name]
    rng = np.random.default_rng(2)
    n, runs = 200, 400
    rest = np.append(probability, 1 - probability.sum())
    counts = rng.multinomial(n, rest, size=runs)[:, :-1]
    sizes = np.array([20, 100, 200])
    want = (1 - (1 - probability) ** sizes[:, None]).sum(axis=1)
    found = [rarefaction(row, n, sizes) for row in counts]
    value = np.array([f.value for f in found])
    error = value.std(axis=0) / math.sqrt(runs)
    assert np.all(np.abs(value.mean(axis=0) - want) <= 4 * error + 1e-9)
    covered = np.mean([(f.low <= want) & (want <= f.high) for f in found], axis=0)
    assert np.all(covered >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / runs))


def test_union_interval_covers_with_images_that_come_in_pairs():
    # Each sample brings two images or none, so that their counts are not independent.
    rng = np.random.default_rng(3)
    probability = 0.6 * 0.9 ** np.arange(20) / np.sum(0.9 ** np.arange(20))
    expected = 2 * np.sum(1 - (1 - probability) ** 60)
    inside = 0
    for _ in range(300):
        label = rng.choice(21, size=60, p=np.append(probability, 0.4))
        gamma = np.where(np.arange(40) // 2 == label[:, None], 0.9, 0.0)
        (found,) = extraction_scores([gamma], [(0.5, 1.0)])
        inside += found.ums.low * 60 <= expected <= found.ums.high * 60
    assert inside >= 300 * 0.95 - 2 * math.sqrt(300 * 0.95 * 0.05)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(module, "_BLOCK", 40)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_equal_scipy(blocks, dtype):
    rng = np.random.default_rng(4)
    samples = rng.normal(size=(11, 3, 2)).astype(dtype)
    images = (5 + rng.normal(size=(9, 3, 2))).astype(dtype)
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (samples, images))
    np.testing.assert_allclose(
        np.concatenate(list(cosine_blocks(samples, images))), 1 - cdist(a, b, "cosine"), atol=1e-12
    )
    table = cdist(a, b)
    np.testing.assert_allclose(
        np.concatenate(list(distance_blocks(samples, images))), table, rtol=1e-9
    )
    usual = 0.5 * np.sort(table, axis=1)[:, :4].mean(axis=1, keepdims=True)
    found = np.concatenate(list(adaptive_distance_blocks(samples, images, num_neighbors=4)))
    np.testing.assert_allclose(found, table / usual, rtol=1e-9)


def test_a_bad_row_is_nan_alone(blocks):
    rng = np.random.default_rng(5)
    samples, images = rng.normal(size=(6, 4)), rng.normal(size=(7, 4))
    clean = [np.concatenate(list(f(samples, images))) for f in (cosine_blocks, distance_blocks)]
    samples[2, 0], images[0, 1], images[3] = np.inf, np.nan, 0
    for f, want in zip((cosine_blocks, distance_blocks), clean, strict=True):
        got = np.concatenate(list(f(samples, images)))
        assert np.isnan(got[2]).all()
        assert np.isnan(got[:, 0]).all()
        assert np.isnan(got[:, 3]).all() == (f is cosine_blocks)
        kept = np.ix_([0, 1, 3, 4, 5], [1, 2, 4, 5, 6])
        np.testing.assert_allclose(got[kept], want[kept], rtol=1e-9)


def test_cosine_survives_extreme_lengths():
    a = np.array([[1e-200, 0.0], [1e200, 1e200]])
    found = np.concatenate(list(cosine_blocks(a, a)))
    np.testing.assert_allclose(found, [[1, 0.5**0.5], [0.5**0.5, 1]])


def test_adaptive_distance_on_a_lattice():
    # Integers, x at 10.25: distance 0.25 to the nearest, and 0.25, 0.75, 1.25, 1.75 on average 1.
    images = np.arange(20.0)[:, None]
    row = np.concatenate(
        list(adaptive_distance_blocks(np.array([[10.25]]), images, num_neighbors=4))
    )[0]
    assert row[10] == pytest.approx(0.5)
    assert row[12] == pytest.approx(3.5)


@pytest.mark.nightly
def test_fifty_thousand_by_fifty_thousand_fit_in_little_memory():
    import tracemalloc

    rng = np.random.default_rng(6)
    images = rng.normal(size=(50_000, 64)).astype(np.float32)
    images[40_000:] = images[:10_000]
    samples = images + 0.01 * rng.normal(size=images.shape).astype(np.float32)
    tracemalloc.start()
    found = find_copies(samples, images)
    assert found.is_copy.all()
    near = nearest_neighbors(samples[::50], images[:40_000])
    np.testing.assert_array_equal(found.nearest[::50], near.index[:, 0])
    group = group_duplicates(images, tolerance=0.5)
    np.testing.assert_array_equal(group[40_000:], np.arange(10_000))
    (scores,) = extraction_scores(cosine_blocks(samples, images), [(0.9, 1.0)], group=group)
    assert scores.ams.value == 1
    assert scores.ums.value == 0.8
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**30


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: extraction_scores([], BANDS), "similarity: expected at least one row"),
        (lambda: extraction_scores([np.ones((2, 0))], BANDS), "similarity: expected at least one"),
        (lambda: extraction_scores([np.ones((1, 2)), np.ones((1, 3))], BANDS), "similarity: "),
        (lambda: extraction_scores([HAND_MADE], [(0.6, 0.5)]), "bands: expected pairs"),
        (lambda: extraction_scores([HAND_MADE], [(math.nan, 1.0)]), "bands: expected pairs"),
        (
            lambda: extraction_scores([HAND_MADE], BANDS, group=np.arange(3)),
            "group: expected 4 numbers",
        ),
        (lambda: extraction_scores([HAND_MADE], BANDS, confidence=1.0), "confidence: expected"),
        (lambda: rarefaction(np.array([3]), 2, np.array([1])), "hits: expected counts"),
        (lambda: rarefaction(np.array([-1]), 2, np.array([1])), "hits: expected counts"),
        (lambda: rarefaction(np.array([1]), 2, np.array([3])), "sizes: expected numbers from 1"),
        (lambda: list(cosine_blocks(np.ones((1, 2)), np.ones((1, 3)))), "samples: expected arrays"),
        (
            lambda: list(adaptive_distance_blocks(np.ones((1, 2)), np.ones((3, 2)), scale=0.0)),
            "scale: expected",
        ),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(InputError, match=f"^{message}"):
        call()
