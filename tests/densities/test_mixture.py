"""Mixtures against scikit-learn, published numbers, closed forms and hard cases."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.mixture

from memjax._core.errors import InputError
from memjax.densities import Gaussian, GaussianMixture


def sklearn_mixture(weights, means, covariances):
    reference = sklearn.mixture.GaussianMixture(len(weights), covariance_type="full")
    reference.weights_, reference.means_, reference.covariances_ = weights, means, covariances
    inverse = np.linalg.inv(np.linalg.cholesky(covariances))
    reference.precisions_cholesky_ = inverse.swapaxes(-1, -2)
    return reference


@pytest.mark.parametrize("kind", ["common", "isotropic", "diagonal", "full"])
def test_log_prob_equals_scikit_learn(x64, kind):
    rng = np.random.default_rng(5)
    weights, means = np.array([0.1, 0.6, 0.3]), rng.normal(size=(3, 4))
    factor = rng.normal(size=(3, 4, 4))
    given = {
        "common": 0.5,
        "isotropic": rng.uniform(0.1, 1, 3),
        "diagonal": rng.uniform(0.1, 1, (3, 4)),
        "full": factor @ factor.swapaxes(1, 2),
    }[kind]
    eye = np.eye(4)
    dense = {
        "common": lambda: np.broadcast_to(given * eye, (3, 4, 4)),
        "isotropic": lambda: given[:, None, None] * eye,
        "diagonal": lambda: given[:, :, None] * eye,
        "full": lambda: given,
    }[kind]()
    xs = rng.normal(size=(20, 4)) * 3
    density = GaussianMixture(weights, jnp.asarray(means), given)
    np.testing.assert_allclose(density.weights, weights, rtol=1e-14)
    for sigma in (0.0, 0.4, 10.0):
        reference = sklearn_mixture(weights, means, dense + sigma**2 * eye)
        actual = jax.vmap(lambda x, s=sigma: density.log_prob(x, s))(jnp.asarray(xs))
        np.testing.assert_allclose(actual, reference.score_samples(xs), rtol=1e-11)


def triangle():
    """Three equal modes on a triangle of side 5, covariance 0.1 I."""
    corners = np.array([[0.0, 0.0], [5.0, 0.0], [2.5, 2.5 * 3**0.5]])
    return GaussianMixture(np.full(3, 1 / 3), jnp.asarray(corners - corners.mean(0)), 0.1)


def field(density, p, x):
    s = density.score(x, 0.0)
    return jnp.sum(s**2) ** (p / 2 - 1) * s


def outward_flux(density, p, center, radius, count=20_000):
    angles = jnp.linspace(0, 2 * np.pi, count, endpoint=False)
    normals = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    values = jax.vmap(lambda n: field(density, p, center + radius * n) @ n)(normals)
    return 2 * np.pi * radius * float(jnp.mean(values))


def test_seven_points_of_the_triangle(x64):
    density = triangle()
    modes = density.means
    midpoints = (modes + jnp.roll(modes, 1, axis=0)) / 2
    # Inward flux through the unit circle for p = 1 and p = 2.
    expected = [(6.2832, 62.8319)] * 3 + [(-2.3393, -37.1023)] * 3 + [(-4.3277, -87.0693)]
    for center, fluxes in zip([*modes, *midpoints, jnp.zeros(2)], expected, strict=True):
        actual = [-outward_flux(density, p, center, 1.0) for p in (1, 2)]
        np.testing.assert_allclose(actual, fluxes, atol=6e-5)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_divergence_theorem(x64, p):
    # A disc without a zero of the score, crossing the ridge between two modes.
    density, center, radius = triangle(), jnp.array([1.2, -0.5]), 0.6
    nodes, weights = np.polynomial.legendre.leggauss(60)
    radii, weights = jnp.asarray(radius * (nodes + 1) / 2), weights * radius / 2
    angles = jnp.linspace(0, 2 * np.pi, 400, endpoint=False)

    def value(r, a):
        x = center + r * jnp.stack([jnp.cos(a), jnp.sin(a)])
        return density.p_laplacian(x, 0.0, p)

    values = jax.vmap(lambda r: jax.vmap(lambda a: value(r, a))(angles))(radii)
    volume = 2 * np.pi * np.sum(weights * np.asarray(radii * jnp.mean(values, axis=1)))
    np.testing.assert_allclose(volume, outward_flux(density, p, center, radius), rtol=1e-6)


def test_two_mode_midpoint(x64):
    m, v, d = np.array([1.5, 0.0, 0.0]), 0.5, 3
    pair = GaussianMixture([0.5, 0.5], jnp.asarray([m, -m]), 0.25)
    x, sigma = jnp.zeros(3), 0.5
    np.testing.assert_array_equal(pair.score(x, sigma), 0)
    expected = -np.eye(d) / v + np.outer(m, m) / v**2
    np.testing.assert_allclose(pair.hessian(x, sigma), expected, atol=1e-14)
    np.testing.assert_allclose(pair.laplacian(x, sigma), -d / v + m @ m / v**2, rtol=1e-14)
    assert jnp.isnan(pair.p_laplacian(x, sigma, 1))
    assert pair.p_laplacian(x, sigma, 3) == 0
    assert pair.p_laplacian(x, sigma, math.inf) == 0
    # Between the modes the effective dimension exceeds d.
    assert pair.effective_dimension(x, sigma) > 3


def test_one_component_is_a_gaussian(x64):
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(3, 3))
    matrix, x = matrix @ matrix.T, jnp.asarray(rng.normal(size=3))
    mixture = GaussianMixture([1.0], jnp.asarray(rng.normal(size=(1, 3))), matrix[None])
    single = Gaussian(mixture.means[0], matrix)
    for p in (1, 2, 3.5):
        actual, expected = mixture.p_laplacian(x, 0.2, p), single.p_laplacian(x, 0.2, p)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_far_away_and_nearly_without_noise():
    density = GaussianMixture([0.5, 0.5], jnp.asarray([[0.0, 0.0], [1.0, 0.0]]), [0.0, 1e-8])
    for x in (jnp.array([1e3, 1e3]), jnp.array([0.5, 0.1]), jnp.array([0.0, 0.0])):
        for sigma in (1e-4, 1e-2, 1e3):
            values = (density.log_prob(x, sigma), density.score(x, sigma))
            values += (density.p_laplacian(x + 1e-3, sigma, 1),)
            assert all(bool(jnp.isfinite(v).all()) for v in values)
    # At a point that stands alone, everything is that point's.
    stored = jnp.array([1e-4, 0.0])
    np.testing.assert_allclose(density.score(stored, 1e-3), [-100, 0], rtol=1e-6)
    np.testing.assert_allclose(density.effective_dimension(stored, 1e-3), 0, atol=1e-6)


def test_effective_dimension_at_large_noise_is_not_cancelled():
    points = jnp.asarray(np.random.default_rng(0).normal(size=(10, 3)))
    density = GaussianMixture(np.full(10, 0.1), points, 0.0)
    spread = float(jnp.sum(jnp.var(points, axis=0)))
    for sigma in (1e2, 1e3):
        actual = density.effective_dimension(jnp.zeros(3, points.dtype), sigma)
        np.testing.assert_allclose(actual, spread / sigma**2, rtol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 0.5], np.zeros((2, 3), int), 1.0), "means: expected a floating-point array"),
        (([0.5, 0.5], np.full((2, 3), np.nan), 1.0), "means: expected finite numbers"),
        (([0.5, 0.5], np.array(1.0), 1.0), "means: expected one row a component"),
        (([0.5, 0.5], np.zeros((3, 2)), 1.0), r"weights: expected shape \[3\], got \[2\]"),
        (([0.5, 0.4], np.zeros((2, 3)), 1.0), "weights: expected a sum of 1, got 0.9"),
        (([1.5, -0.5], np.zeros((2, 3)), 1.0), "weights: expected positive numbers, got -0.5"),
        (([0.5, 0.5], np.zeros((2, 3)), np.ones(4)), "covariances: expected shape"),
        (([0.5, 0.5], np.zeros((2, 3)), -np.ones((2, 3, 3))), "covariances: expected positive"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        GaussianMixture(*arguments)
    assert "\n" not in str(caught.value)
