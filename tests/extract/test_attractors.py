"""Attractors: one row a fixed point, its hits, its rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.extract import find_attractors

SIGMA = 0.3
MEANS = jnp.array([[-3.0, 0.0], [0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
VARIANCES = jnp.array([0.5, 0.0, 0.05, 0.1])
STORED = mj.GaussianMixture(jnp.full(4, 0.25), MEANS, VARIANCES)
# Far apart, so that each behaves as if alone.
RADII = np.asarray(VARIANCES / (VARIANCES + SIGMA**2))


@pytest.fixture(scope="module")
def starts():
    """Seven, ten, one and four starts near the four means, shuffled, and a bad one."""
    which = np.repeat(np.arange(4), (7, 10, 1, 4))
    np.random.default_rng(0).shuffle(which)
    near = MEANS[which] + 0.3 * jax.random.normal(jax.random.key(0), (22, 2))
    return jnp.concatenate([near, jnp.array([[jnp.nan, 0.0]])]), np.append(which, -1)


@pytest.fixture(scope="module")
def found(starts):
    return find_attractors(STORED, starts[0], SIGMA, key=0)


def test_ranked_by_how_firmly_they_attract(found):
    order = np.argsort(RADII)
    np.testing.assert_allclose(found.points, MEANS[order], atol=0.01)
    np.testing.assert_allclose(found.radius, RADII[order], atol=0.01)
    assert found.hits.tolist() == [10, 1, 4, 7]
    assert found.stable.all()
    assert np.all(np.diff(found.radius) >= 0)


def test_labels_lead_from_starts_to_attractors(found, starts):
    _, which = starts
    order = np.argsort(RADII)
    assert found.label[-1] == -1
    np.testing.assert_array_equal(order[found.label[:-1]], which[:-1])
    np.testing.assert_array_equal(np.bincount(found.label[:-1]), found.hits)
    assert found.fixed_points.status[-1] == Status.NONFINITE
    # The representative is the start that came closest to rest.
    for row, point in enumerate(found.points):
        own = np.flatnonzero(found.label == row)
        residual = np.asarray(found.fixed_points.residual)[own]
        assert found.residual[row] == residual.min()
        np.testing.assert_array_equal(point, found.fixed_points.points[own[residual.argmin()]])


def test_cost_counts_starts_and_matrices(found):
    searched = int(np.sum(found.fixed_points.cost.forward))
    assert found.cost.forward == searched + 4
    assert found.cost.jvp == 4 * 2


def test_equally_firm_ones_rank_by_hits():
    points = 4.0 * jnp.eye(3)
    starts = points[jnp.array([0, 1, 1, 2, 2, 2])] + 0.1
    ranked = find_attractors(mj.Empirical(points), starts, SIGMA, key=0)
    assert ranked.hits.tolist() == [3, 2, 1]
    np.testing.assert_allclose(ranked.points, points[::-1], atol=1e-4)


def test_merging_is_by_chains_of_short_steps():
    line = 0.9 * SIGMA * jnp.arange(4.0)[:, None]

    def still(x, sigma, condition=None):  # every point is a fixed point
        return 0 * x

    apart = find_attractors(still, line, SIGMA, key=0, merge=0.8)
    assert apart.hits.tolist() == [1, 1, 1, 1]
    assert not apart.stable.any()  # radius 1
    joined = find_attractors(still, line, SIGMA, key=0, merge=1.0)
    assert joined.hits.tolist() == [4]


def test_no_attractor_is_an_empty_answer():
    def away(x, sigma, condition=None):
        return x / sigma**2

    none = find_attractors(away, jnp.ones((3, 2)), SIGMA, key=0, num_steps=3)
    assert none.points.shape == (0, 2)
    assert len(none.hits) == len(none.radius) == 0
    assert none.label.tolist() == [-1, -1, -1]


def test_a_negative_distance_is_refused():
    with pytest.raises(InputError, match=r"^merge: expected"):
        find_attractors(STORED, jnp.ones((1, 2)), SIGMA, key=0, merge=-1.0)
