"""One Gaussian against SciPy, its closed forms, and a solver of the probability flow."""

import math

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from memjax._core.errors import InputError
from memjax.densities import Gaussian

RNG = np.random.default_rng(11)
FACTOR = RNG.normal(size=(5, 2))
ROTATION = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
MATRIX = (ROTATION * np.array([2.0, 1.0, 0.5, 0.1, 0.01])) @ ROTATION.T
MEAN, X = RNG.normal(size=5), RNG.normal(size=5)

KINDS = {
    "isotropic": (lambda: Gaussian(jnp.asarray(MEAN), 0.4), 0.4 * np.eye(5)),
    "diagonal": (
        lambda: Gaussian(jnp.asarray(MEAN), np.arange(1.0, 6.0)),
        np.diag(np.arange(1.0, 6.0)),
    ),
    "full": (lambda: Gaussian(jnp.asarray(MEAN), MATRIX), MATRIX),
    "low_rank": (
        lambda: Gaussian.low_rank(jnp.asarray(MEAN), FACTOR, 0.3),
        FACTOR @ FACTOR.T + 0.3 * np.eye(5),
    ),
    "rank_d": (
        lambda: Gaussian.low_rank(jnp.asarray(MEAN), np.hstack([FACTOR, FACTOR, MATRIX]), 0.3),
        2 * FACTOR @ FACTOR.T + MATRIX @ MATRIX + 0.3 * np.eye(5),
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("sigma", [0.0, 0.3, 40.0])
def test_log_prob_equals_scipy(x64, kind, sigma):
    make, covariance = kind
    expected = scipy.stats.multivariate_normal(MEAN, covariance + sigma**2 * np.eye(5)).logpdf(X)
    np.testing.assert_allclose(make().log_prob(jnp.asarray(X), sigma), expected, rtol=1e-12)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 40.0])
def test_dense_algebra(x64, kind, sigma):
    make, covariance = kind
    density, x = make(), jnp.asarray(X)
    inverse = np.linalg.inv(covariance + sigma**2 * np.eye(5))
    score = -inverse @ (X - MEAN)
    np.testing.assert_allclose(density.score(x, sigma), score, rtol=1e-11)
    np.testing.assert_allclose(density.hessian(x, sigma), -inverse, atol=1e-11 * inverse.max())
    np.testing.assert_allclose(density.laplacian(x, sigma), -np.trace(inverse), rtol=1e-11)
    p1 = (-np.trace(inverse) + score @ inverse @ score / (score @ score)) / np.linalg.norm(score)
    np.testing.assert_allclose(density.p_laplacian(x, sigma, 1), p1, rtol=1e-10)
    mean, posterior = density.posterior(x, sigma)
    np.testing.assert_allclose(mean, MEAN + covariance @ inverse @ (X - MEAN), rtol=1e-10)
    expected = sigma**2 * covariance @ inverse
    np.testing.assert_allclose(posterior, expected, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("p", [1, 1.5, 3, math.inf])
def test_p_laplacian_of_an_isotropic_gaussian(x64, p):
    v, x = 0.4 + 0.3**2, jnp.asarray(X)
    r = float(np.linalg.norm(X - MEAN))
    expected = -(r**2) / v**3 if p == math.inf else -(5 + p - 2) * r ** (p - 2) / v ** (p - 1)
    actual = Gaussian(jnp.asarray(MEAN), 0.4).p_laplacian(x, 0.3, p)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_flow_solves_its_equation(x64, kind):
    density, x = kind[0](), jnp.asarray(X)
    exact = density.flow(x, 0.05, 3.0)

    def velocity(sigma, y, density):
        return -sigma * density.score(y, sigma)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Dopri8(),
        0.05,
        3.0,
        0.01,
        x,
        density,
        stepsize_controller=diffrax.PIDController(rtol=1e-11, atol=1e-12),
        max_steps=100_000,
    )
    np.testing.assert_allclose(exact.point, solution.ys[0], rtol=1e-8)


def test_flow_conserves_probability(x64, kind):
    density, x = kind[0](), jnp.asarray(X)
    point, log_det = density.flow(x, 0.02, 5.0)
    change = density.log_prob(x, 0.02) - density.log_prob(point, 5.0)
    np.testing.assert_allclose(log_det, change, rtol=1e-12)
    jacobian = jax.jacfwd(lambda y: density.flow(y, 0.02, 5.0).point)(x)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], rtol=1e-12)
    back = density.flow(point, 5.0, 0.02)
    np.testing.assert_allclose(back.point, x, rtol=1e-12)
    np.testing.assert_allclose(back.log_det, -log_det, rtol=1e-12)


def test_log_det_is_the_integral_of_the_lost_dimension(x64, kind):
    density, x = kind[0](), jnp.asarray(X)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    low, high = np.log(0.02), np.log(5.0)
    log_sigma = jnp.asarray((high - low) / 2 * nodes + (high + low) / 2)
    lost = 5 - jax.vmap(lambda t: density.effective_dimension(x, jnp.exp(t)))(log_sigma)
    integral = (high - low) / 2 * np.sum(weights * np.asarray(lost))
    np.testing.assert_allclose(density.flow(x, 0.02, 5.0).log_det, integral, rtol=1e-9)


def test_flow_of_a_stored_point_reaches_the_ceiling():
    stored = Gaussian(jnp.zeros((2, 2)), 0.0)
    point, log_det = stored.flow(jnp.ones((2, 2)), 0.01, 1.0)
    np.testing.assert_allclose(point, 100.0, rtol=1e-5)
    np.testing.assert_allclose(log_det, 4 * np.log(100.0), rtol=1e-6)


def test_close_noise_levels_do_not_cancel():
    density, x = Gaussian(jnp.zeros(3), 1.0), jnp.ones(3)
    sigma0 = jnp.float32(0.5)
    sigma1 = jnp.nextafter(sigma0, jnp.float32(1))
    # d sigma (sigma1 - sigma0) / v
    expected = 3 * 0.5 * float(sigma1 - sigma0) / 1.25
    np.testing.assert_allclose(density.flow(x, sigma0, sigma1).log_det, expected, rtol=1e-5)


def test_small_variances_survive_single_precision():
    variances = np.array([1.0, 1e-3, 1e-6, 1e-9, 1e-12])
    matrix = (ROTATION * variances) @ ROTATION.T
    density = Gaussian(jnp.zeros(5, jnp.float32), (matrix + matrix.T) / 2)
    for sigma in (1e-5, 1e-3, 1e-1):
        expected = np.sum(variances / (variances + sigma**2))
        actual = density.effective_dimension(jnp.zeros(5, jnp.float32), sigma)
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_low_rank_scales_to_images():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(32, 32, 3, 8)).astype(np.float32)
    density = Gaussian.low_rank(jnp.zeros((32, 32, 3), jnp.float32), factor, 0.0)
    x = density.sample(jax.random.key(0), 1, 0.1)[0]

    @jax.jit
    @chex.assert_max_traces(1)
    def quantities(density, x):
        parts = (
            density.score(x, 0.1),
            density.effective_dimension(x, 0.1),
            density.p_laplacian(x, 0.1, 1),
        )
        return parts

    compiled = quantities.lower(density, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20  # d^2 floats are 37 MB
    score, dimension, _ = compiled(density, x)
    assert score.shape == (32, 32, 3)
    np.testing.assert_allclose(dimension, 8, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(3, int), 1.0), "mean: expected a floating-point array, got dtype int"),
        ((np.array([0.0, np.nan]), 1.0), "mean: expected finite numbers"),
        ((np.zeros(3), -1.0), "covariance: expected variances >= 0, got -1"),
        ((np.zeros(3), [1.0, 0.0, -0.5]), "covariance: expected variances >= 0, got -0.5"),
        ((np.zeros(3), np.ones((2, 2))), r"covariance: expected shape \[\] or \[3\] or \[3, 3\]"),
        ((np.zeros(2), np.array([[1.0, 2.0], [0.0, 1.0]])), "covariance: expected symmetric"),
        ((np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]])), "covariance: expected positive semi"),
        ((np.zeros(2), np.full((2, 2), np.inf)), "covariance: expected finite"),
        ((np.zeros(2), np.eye(2, dtype=int)), "covariance: expected a floating-point array"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        Gaussian(*arguments)
    assert "\n" not in str(caught.value)


def test_bad_factors():
    with pytest.raises(InputError, match=r"factor: expected shape \[3, r\], got \[2, 3\]"):
        Gaussian.low_rank(np.zeros(3), np.ones((2, 3)), 0.1)
    with pytest.raises(InputError, match=r"variance: expected one number"):
        Gaussian.low_rank(np.zeros(3), np.ones((3, 1)), np.ones(3))
    with pytest.raises(InputError, match="outside jit"):
        jax.jit(lambda c: Gaussian(jnp.zeros(2), c).log_prob(jnp.zeros(2), 1.0))(jnp.eye(2))
