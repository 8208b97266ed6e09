"""The training-set density: blocks change nothing, one pass, little memory, no cancellation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.densities import Empirical, GaussianMixture

QUANTITIES = {
    "log_prob": lambda d, x, s: d.log_prob(x, s),
    "score": lambda d, x, s: d.score(x, s),
    "hessian": lambda d, x, s: d.hessian(x, s),
    "laplacian": lambda d, x, s: d.laplacian(x, s),
    "p_1": lambda d, x, s: d.p_laplacian(x, s, 1),
    "p_3": lambda d, x, s: d.p_laplacian(x, s, 3),
    "p_infinity": lambda d, x, s: d.p_laplacian(x, s, math.inf),
    "posterior": lambda d, x, s: d.posterior(x, s),
    "effective_dimension": lambda d, x, s: d.effective_dimension(x, s),
}


@jax.jit
def everything(density, x, sigma):
    return {name: f(density, x, sigma) for name, f in QUANTITIES.items()}


def assert_close(actual, expected, tolerance):
    def close(a, e):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * (np.abs(e).max() + 1e-6))

    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 30.0])
def test_blocks_and_mixture_of_points_agree(x64, sigma, weighted):
    rng = np.random.default_rng(1)
    points, x = jnp.asarray(rng.normal(size=(37, 4))), jnp.asarray(rng.normal(size=4))
    weights = rng.uniform(0.1, 1, 37) if weighted else np.ones(37)
    weights /= weights.sum()
    given = weights if weighted else None
    expected = everything(GaussianMixture(weights, points, 0.0), x, sigma)
    for chunk_size in (1, 5, 36, 37, 1000):
        actual = everything(Empirical(points, given, chunk_size=chunk_size), x, sigma)
        # At the largest sigma mixtures take differences of nearly equal scores.
        assert_close(actual, expected, 1e-10 if sigma < 10 else 1e-8)


def test_every_row_counts_once():
    # Weights tell rows apart; 7 does not divide 23, so the last block overlaps the one before.
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 1, 23)
    weights /= weights.sum()
    points = rng.normal(size=(23, 3))
    density = Empirical(jnp.asarray(points), weights, chunk_size=7)
    mean, covariance = density.posterior(jnp.zeros(3, density.dtype), 1e4)
    np.testing.assert_allclose(mean, weights @ points, rtol=1e-4)
    expected = np.cov(points.T, aweights=weights, ddof=0)
    np.testing.assert_allclose(covariance, expected, rtol=1e-3, atol=1e-3)


def naive(points, x, sigma):
    """Posterior mean and effective dimension in NumPy float64."""
    points, x = np.asarray(points, np.float64), np.asarray(x, np.float64)
    logits = -((points - x) ** 2).sum(1) / (2 * sigma**2)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    mean = weights @ points
    return mean, weights @ ((points - mean) ** 2).sum(1) / sigma**2


def test_small_noise_far_from_the_origin_in_single_precision():
    # |x|^2 is 1e6 times the squared distances: the product form would lose all of them.
    rng = np.random.default_rng(2)
    points = jnp.asarray(100 + 0.01 * rng.normal(size=(50, 64)), jnp.float32)
    density = Empirical(points)
    for sigma in (0.002, 0.01, 0.05):
        x = points[3] + sigma * jnp.asarray(rng.normal(size=64), jnp.float32)
        mean, dimension = naive(points, x, sigma)
        expected = (mean - np.asarray(x, np.float64)) / sigma**2
        np.testing.assert_allclose(
            density.score(x, sigma), expected, atol=2e-4 * np.abs(expected).max()
        )
        actual = density.effective_dimension(x, sigma)
        np.testing.assert_allclose(actual, dimension, rtol=1e-3, atol=1e-6)


def test_effective_dimension_stays_small_and_positive_at_a_stored_point():
    # Its true value is 3e-6 here, against d = 512; differences of moments would leave noise.
    rng = np.random.default_rng(3)
    points = jnp.asarray(rng.normal(size=(40, 512)), jnp.float32)
    twin = points[0] + 0.01 * jnp.asarray(rng.normal(size=512), jnp.float32)
    density = Empirical(points.at[1].set(twin), chunk_size=8)
    x = density.points[0]
    for sigma in (0.05, 0.04):
        _, dimension = naive(density.points, x, sigma)
        actual = density.effective_dimension(x, sigma)
        np.testing.assert_allclose(actual, dimension, rtol=1e-3)
        assert actual > 0


def abstract(n, *event_shape):
    """A density of arrays that do not exist, to compile without allocating."""
    points = jax.ShapeDtypeStruct((n, *event_shape), jnp.float32)
    return jax.eval_shape(Empirical, points), jax.ShapeDtypeStruct(event_shape, jnp.float32)


@pytest.mark.parametrize(
    ("quantity", "passes"),
    [("log_prob", 1), ("score", 1), ("laplacian", 1), ("effective_dimension", 1), ("p_1", 2)],
)
def test_passes_over_the_points(quantity, passes):
    density, x = abstract(1000, 8, 8, 1)
    jaxpr = jax.make_jaxpr(lambda d, x: QUANTITIES[quantity](d, x, 0.1))(density, x)
    scans = str(jaxpr).count("scan[")
    assert scans == passes
    assert str(jaxpr).count(f"length={-(-1000 // density.chunk_size)}") == passes


@pytest.mark.parametrize("quantity", ["score", "laplacian", "p_1"])
def test_memory_of_fifty_thousand_images(quantity):
    density, x = abstract(50_000, 32, 32, 3)
    compiled = jax.jit(lambda d, x: QUANTITIES[quantity](d, x, 0.1)).lower(density, x).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes > 50_000 * 3072 * 4
    assert memory.temp_size_in_bytes < 8 << 20


@pytest.mark.slow
def test_twenty_thousand_images():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((20_000, 32, 32, 3), dtype=np.float32)
    density = Empirical(points)
    noise = rng.standard_normal((32, 32, 3), dtype=np.float32)
    for sigma in (0.1, 20.0):
        x = points[17] + np.float32(sigma) * noise
        mean, dimension = naive(points.reshape(20_000, -1), x.reshape(-1), sigma)
        expected = (mean - x.reshape(-1)) / sigma**2
        score = np.asarray(density.score(jnp.asarray(x), sigma)).reshape(-1)
        np.testing.assert_allclose(score, expected, atol=1e-3 * np.abs(expected).max())
        actual = density.effective_dimension(jnp.asarray(x), sigma)
        np.testing.assert_allclose(actual, dimension, rtol=1e-2, atol=1e-6)


def test_samples_are_points_plus_noise():
    points = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 1)))
    density = Empirical(points, [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(density.weights, [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    clean = np.asarray(density.sample(jax.random.key(0), 4000, 0.0))
    counts = (clean[:, None] == np.asarray(points)[None]).all(axis=(2, 3)).sum(axis=0)
    assert counts.sum() == 4000
    expected = 4000 * np.array([0.1, 0.2, 0.3, 0.4])
    assert (np.abs(counts - expected) < 4.5 * np.sqrt(expected)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": np.zeros((3, 2), int)}, "points: expected a floating-point array"),
        ({"points": np.full((3, 2), np.inf)}, "points: expected finite numbers"),
        ({"points": np.zeros((0, 2))}, r"points: expected one row a point, got \[0, 2\]"),
        ({"points": np.zeros((3, 2)), "chunk_size": 0}, "chunk_size: expected a positive number"),
        ({"points": np.zeros((3, 2)), "weights": np.ones(3)}, "weights: expected a sum of 1"),
        ({"points": np.zeros((2, 2)), "weights": np.ones(1)}, r"weights: expected shape \[2\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        Empirical(**arguments)
