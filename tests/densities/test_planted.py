"""Planted points: the world is what it says, and its odds are Bayes'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from memjax._core.errors import InputError
from memjax.densities import planted_mixture


@pytest.fixture(scope="module")
def world():
    return planted_mixture(jax.random.key(3), 16, num_stored=5, num_ordinary=400, weight=0.01)


def test_the_world_is_what_it_says(world):
    assert world.points.shape == (405, 16)
    assert world.stored.tolist() == [True] * 5 + [False] * 400
    np.testing.assert_allclose(world.density.weights.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(world.density.weights[-5:], 0.01, rtol=1e-5)
    np.testing.assert_allclose(world.background.weights, 1 / 3, rtol=1e-5)
    np.testing.assert_array_equal(world.density.means[-5:], world.points[:5])
    broad = np.asarray(world.background.covariances.off) > 0.5
    assert broad.sum(axis=1).tolist() == [2, 4, 8]
    # Ordinary points are draws of the background: their score is a standard normal's, squared.
    means, stds = np.asarray(world.background.means), np.where(broad, 1.0, 0.1)
    scaled = ((np.asarray(world.points)[:, None] - means) / stds) ** 2
    smallest = scaled.sum(axis=2).min(axis=1)
    assert abs(smallest.mean() - 16) < 4 * np.sqrt(2 * 16 / 405)


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_log_odds_are_bayes(world, sigma):
    x = np.asarray(world.points, np.float64)
    variances = np.asarray(world.background.covariances.off, np.float64)

    def log_density(center, variance):
        return norm.logpdf(x, center, np.sqrt(variance + sigma**2)).sum(axis=1)

    means = np.asarray(world.background.means, np.float64)
    parts = [log_density(m, v) for m, v in zip(means, variances, strict=True)]
    background = logsumexp(parts, axis=0) + np.log(0.95 / 3)
    stored = logsumexp([log_density(y, 0.0) for y in x[:5]], axis=0) + np.log(0.01)
    found = np.asarray(world.log_odds(sigma))
    np.testing.assert_allclose(found, stored - background, rtol=2e-4, atol=2e-3)


def test_odds_say_where_the_score_is_a_stored_points(world):
    """Far above 0, the effective dimension is that of a point; far below, the background's."""
    sigma = 0.05
    odds = np.asarray(world.log_odds(sigma))
    found = jax.vmap(lambda x: world.density.effective_dimension(x, sigma))(world.points)
    plain = jax.vmap(lambda x: world.background.effective_dimension(x, sigma))(world.points)
    assert (odds[:5] > 5).all()
    assert (np.asarray(found)[:5] < 1).all()
    far = odds < -10
    assert far.sum() > 300
    np.testing.assert_allclose(np.asarray(found)[far], np.asarray(plain)[far], rtol=0.02)
    assert (np.asarray(plain) > 10).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": 1}, "d: expected a whole number at least 2, got 1"),
        ({"num_stored": 0}, "num_stored: expected a whole number at least 1, got 0"),
        ({"num_ordinary": 0}, "num_ordinary: expected a whole number at least 1, got 0"),
        ({"weight": 0.0}, r"weight: expected a positive number below 1/20 \(num_stored\), got 0.0"),
        ({"weight": 0.05}, r"weight: expected a positive number below 1/20 \(num_stored\)"),
    ],
)
def test_arguments_out_of_range(changes, message):
    arguments = {"d": 4} | changes
    with pytest.raises(InputError, match=message):
        planted_mixture(jax.random.key(0), arguments.pop("d"), **arguments)


def test_dtype_follows_the_precision(x64):
    assert planted_mixture(jax.random.key(0), 4, num_ordinary=5).points.dtype == jnp.float64
