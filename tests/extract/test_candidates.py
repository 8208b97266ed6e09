"""Candidates by density: what crowds within its cluster comes first, once."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from memjax._core.errors import InputError
from memjax.extract import rank_by_density


@pytest.fixture(scope="module")
def samples():
    """Forty strewn samples in two clusters; five nearly equal ones in one, three in the other."""
    rng = np.random.default_rng(0)
    strewn = 3 * rng.standard_normal((40, 6))
    first, second = np.full(6, 2.0), np.full(6, -2.0)
    tight = first + 0.02 * rng.standard_normal((5, 6))
    loose = second + 0.1 * rng.standard_normal((3, 6))
    return np.concatenate([strewn, tight, loose]), np.repeat([0, 1, 0, 1], (20, 20, 5, 3))


def test_against_all_distances(samples):
    x, labels = samples
    found = rank_by_density(x, labels, num_neighbors=2, merge=0.0)
    distance = cdist(x, x)
    usual = np.median(distance, axis=1)
    contrast = np.empty(len(x))
    for i in range(len(x)):
        own = np.flatnonzero((labels == labels[i]) & (np.arange(len(x)) != i))
        contrast[i] = np.sort(distance[i, own])[1] / usual[i]
    np.testing.assert_array_equal(found.row, np.argsort(contrast))
    np.testing.assert_allclose(found.contrast, np.sort(contrast), rtol=1e-9)
    np.testing.assert_array_equal(found.label, labels[found.row])
    assert found.hits.tolist() == [1] * len(x)


def test_a_crowd_is_one_candidate(samples):
    x, labels = samples
    found = rank_by_density(x, labels)
    assert found.row[0] in range(40, 45)
    assert found.row[1] in range(45, 48)
    assert found.hits[:2].tolist() == [5, 3]
    assert found.hits.sum() == len(x)
    assert len(set(found.row.tolist())) == len(found.row)


def test_equal_samples_of_two_clusters_stay_apart(samples):
    x, labels = samples
    split = labels.copy()
    split[40:42] = 1
    found = rank_by_density(x, split, num_neighbors=1)
    top = zip(found.row[:2].tolist(), found.hits[:2].tolist(), strict=True)
    assert {(row in (40, 41), hits) for row, hits in top} == {(True, 2), (False, 3)}


def test_what_cannot_be_compared_is_left_out(samples):
    x, labels = samples
    broken, marked = x.copy(), labels.copy()
    broken[40], marked[41], marked[0] = np.nan, -1, 7  # label 7 has one sample only
    found = rank_by_density(broken, marked)
    assert not {40, 41, 0} & set(found.row.tolist())
    assert found.hits[0] == 3
    assert found.hits.sum() == len(x) - 3
    empty = rank_by_density(np.full((3, 2), np.nan), np.zeros(3, int))
    assert len(empty.row) == 0


def test_refused(samples):
    x, labels = samples
    with pytest.raises(InputError, match="labels: expected 48, one a sample"):
        rank_by_density(x, labels[1:])
    with pytest.raises(InputError, match="num_neighbors: expected"):
        rank_by_density(x, labels, num_neighbors=0)
    with pytest.raises(InputError, match="merge: expected"):
        rank_by_density(x, labels, merge=-1.0)
