import numpy as np
import pytest
from scipy.spatial.distance import cdist

import memjax.evaluate.distances as module
from memjax._core.errors import InputError
from memjax.evaluate.distances import find_copies, group_duplicates, nearest_neighbors


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Every computation in one block, or cut into pieces that do not divide the sizes."""
    if request.param == "many blocks":
        monkeypatch.setattr(module, "_BLOCK", 64)
        monkeypatch.setattr(module, "_MAX_WIDTH", 7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("q", "n", "shape", "k"), [(5, 9, (2, 3, 1), 1), (40, 30, (8,), 3), (3, 4, (1,), 4)]
)
def test_neighbors_equal_scipy(blocks, q, n, shape, k, dtype):
    rng = np.random.default_rng(q)
    queries = rng.normal(size=(q, *shape)).astype(dtype)
    points = rng.normal(size=(n, *shape)).astype(dtype)
    table = cdist(queries.reshape(q, -1), points.reshape(n, -1))
    found = nearest_neighbors(queries, points, k)
    np.testing.assert_array_equal(found.index, np.argsort(table, axis=1, kind="stable")[:, :k])
    np.testing.assert_allclose(found.distance, np.sort(table, axis=1)[:, :k], rtol=1e-12)


def test_distances_survive_a_large_offset(blocks):
    # At an offset of 1e6 the squared norms are 1e12 times the squared distances.
    rng = np.random.default_rng(1)
    points = (1e6 + rng.normal(size=(20, 16))).astype(np.float32)
    queries = points[::3] + np.float32(0.0625)
    found = nearest_neighbors(queries, points)
    exact = cdist(queries.astype(np.float64), points.astype(np.float64))
    np.testing.assert_array_equal(found.index[:, 0], exact.argmin(axis=1))
    np.testing.assert_allclose(found.distance[:, 0], exact.min(axis=1), rtol=1e-12)


def test_an_equal_image_is_at_exactly_zero(blocks):
    points = np.random.default_rng(2).normal(size=(50, 12)).astype(np.float32)
    found = nearest_neighbors(points, points)
    np.testing.assert_array_equal(found.index[:, 0], np.arange(50))
    np.testing.assert_array_equal(found.distance, 0)


def test_equal_distances_come_in_row_order(blocks):
    points = np.array([[1.0], [-1.0], [1.0], [5.0]])
    found = nearest_neighbors(np.zeros((1, 1)), points, 3)
    assert found.index.tolist() == [[0, 1, 2]]


def test_bad_rows_cost_themselves_only(blocks):
    rng = np.random.default_rng(3)
    queries, points = rng.normal(size=(9, 5)), rng.normal(size=(12, 5))
    clean = nearest_neighbors(queries[[0, 1, 2, 4, 5, 6, 7, 8]], points[1:], 2)
    queries[3, 2], points[0, 0] = np.nan, np.inf
    found = nearest_neighbors(queries, points, 2)
    assert found.index[3].tolist() == [-1, -1]
    assert np.isnan(found.distance[3]).all()
    others = np.delete(np.arange(9), 3)
    np.testing.assert_array_equal(found.index[others], clean.index + 1)
    # One block for all rows may round differently from another.
    np.testing.assert_allclose(found.distance[others], clean.distance, rtol=1e-14)


def test_neighbors_errors():
    with pytest.raises(InputError, match=r"queries: expected arrays of the points' shape \(3,\)"):
        nearest_neighbors(np.zeros((2, 4)), np.zeros((2, 3)))
    for k in (0, 3):
        with pytest.raises(InputError, match=r"k: expected 1..2"):
            nearest_neighbors(np.zeros((2, 3)), np.zeros((2, 3)), k)


def test_exact_duplicates():
    rng = np.random.default_rng(4)
    pool = rng.integers(0, 3, size=(20, 2, 2, 1)).astype(np.float32)
    images = pool[rng.integers(0, 20, 60)]
    expected = [next(j for j in range(60) if (images[j] == images[i]).all()) for i in range(60)]
    np.testing.assert_array_equal(group_duplicates(images), expected)


def test_negative_zero_is_zero_and_bad_rows_have_no_group():
    images = np.array([[0.0], [np.nan], [-0.0], [1.0], [np.nan]])
    assert group_duplicates(images).tolist() == [0, -1, 0, 3, -1]
    assert group_duplicates(np.full((2, 3), np.nan)).tolist() == [-1, -1]


def test_near_duplicates_are_connected_components(blocks):
    # Points on a line at 0, .9, 1.8 | 4 | 6, 6.5, shuffled: steps of at most 1 join them.
    line = np.array([6.0, 0.9, 4.0, 0.0, 6.5, 1.8, 0.9])[:, None]
    assert group_duplicates(line, tolerance=1.0).tolist() == [0, 1, 2, 1, 0, 1, 1]
    assert group_duplicates(line, tolerance=0.0).tolist() == [0, 1, 2, 3, 4, 5, 1]
    assert group_duplicates(line, tolerance=10.0).tolist() == [0] * 7


def test_near_duplicates_equal_a_naive_search(blocks):
    rng = np.random.default_rng(5)
    for tolerance in (0.05, 0.15, 0.3):
        points = rng.random((60, 2))
        close = cdist(points, points) <= tolerance
        group = np.arange(60)
        for _ in range(60):
            group = np.array([group[row].min() for row in close])
        np.testing.assert_array_equal(group_duplicates(points, tolerance=tolerance), group)


def test_negative_tolerance():
    with pytest.raises(InputError, match="tolerance: expected a distance of at least 0"):
        group_duplicates(np.zeros((2, 1)), tolerance=-1.0)


def test_copy_rule_on_a_lattice(blocks):
    # Integers with spacing 1: at offset t from a node d1/d2 = t/(1-t), below 1/3 iff t < 1/4.
    lattice = np.arange(10.0)[:, None]
    offsets = np.array([0.0, 0.1, 0.249, 0.251, 0.4, -0.249, -0.251])
    result = find_copies(5 + offsets[:, None], lattice)
    assert result.is_copy.tolist() == [True, True, True, False, False, True, False]
    np.testing.assert_allclose(result.d1, np.abs(offsets), atol=1e-12)
    np.testing.assert_allclose(result.d2, 1 - np.abs(offsets), atol=1e-12)
    assert (result.nearest == 5).all()
    assert result.hits.tolist() == [0] * 5 + [4] + [0] * 4


def test_copy_rule_on_a_square_lattice(blocks):
    # In the plane, toward a neighbor at distance 1 as on the line; diagonally (t, t):
    # d1^2 = 2 t^2, d2^2 = (1-t)^2 + t^2, so d1/d2 < 1/3 iff 16 t^2 + 2 t - 1 < 0, t < .19519...
    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), -1).reshape(-1, 2)
    edge = (np.sqrt(68) - 2) / 32
    samples = 2 + np.array([[edge - 1e-6] * 2, [edge + 1e-6] * 2])
    assert find_copies(samples, grid).is_copy.tolist() == [True, False]


def test_duplicates_do_not_hide_a_copy_and_share_its_hits(blocks):
    distinct = np.array([[0.0], [1.0], [2.0]])
    images = distinct[[1, 0, 1, 2, 1]]
    samples = np.array([[1.1], [0.95], [0.05], [1.5]])
    result = find_copies(samples, images)
    assert result.is_copy.tolist() == [True, True, True, False]
    assert result.nearest.tolist()[:3] == [0, 0, 1]
    assert result.hits.tolist() == [2, 1, 2, 0, 2]
    np.testing.assert_allclose(result.d2[:3], [0.9, 0.95, 0.95])


def test_near_duplicates_count_as_one(blocks):
    images = np.array([[0.0], [1.0], [1.05]])
    samples = np.array([[1.01]])
    assert not find_copies(samples, images, tolerance=0.0).d2[0] > 0.05
    result = find_copies(samples, images, tolerance=0.1)
    assert result.is_copy.tolist() == [True]
    assert result.hits.tolist() == [0, 1, 1]
    np.testing.assert_allclose(result.d2, 1.01)


def test_bad_samples_copy_nothing_and_bad_images_are_never_hit():
    images = np.array([[0.0], [np.nan], [1.0]])
    samples = np.array([[0.0], [np.nan], [np.inf], [1.0]])
    result = find_copies(samples, images)
    assert result.is_copy.tolist() == [True, False, False, True]
    assert result.nearest.tolist() == [0, -1, -1, 2]
    assert result.hits.tolist() == [1, 0, 1]


@pytest.mark.parametrize("images", [np.zeros((3, 2)), np.array([[1.0, 1.0], [np.nan, 0.0]])])
def test_the_rule_needs_two_distinct_images(images):
    with pytest.raises(InputError, match="images: expected at least 2 distinct images, found 1"):
        find_copies(np.zeros((1, 2)), images)


def test_ratio_out_of_range():
    with pytest.raises(InputError, match="ratio: expected a number between 0 and 1, got 3"):
        find_copies(np.zeros((1, 1)), np.arange(3.0)[:, None], ratio=3.0)
