"""What holds for every density: derivatives, identities, transformations, honest errors."""

import math

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.calculus.linearization import linearize
from memjax.densities import Empirical

SIGMA = 0.6


def close(actual, expected, tolerance=1e-10):
    """Equal relative to the largest entry."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def everything(density, x, sigma):
    """All quantities of the contract at one point."""
    return {
        "log_prob": density.log_prob(x, sigma),
        "score": density.score(x, sigma),
        "hessian": density.hessian(x, sigma),
        "laplacian": density.laplacian(x, sigma),
        "p_laplacian": density.p_laplacian(x, sigma, 1.5),
        "posterior": density.posterior(x, sigma),
        "effective_dimension": density.effective_dimension(x, sigma),
    }


evaluate = jax.jit(everything)


def test_derivatives_equal_automatic_differentiation(x64, build):
    density, x = build()

    @jax.jit
    def automatic(density, x):
        return jax.grad(density.log_prob)(x, SIGMA), jax.hessian(density.log_prob)(x, SIGMA)

    score, hessian = automatic(density, x)
    hessian = hessian.reshape(x.size, x.size)
    actual = evaluate(density, x, SIGMA)
    close(actual["score"], score)
    close(density(x, SIGMA), score)
    close(actual["hessian"], hessian)
    close(actual["laplacian"], jnp.trace(hessian))


def test_p_laplacian_equals_the_divergence(x64, build):
    density, x = build()
    exponents = (1, 1.25, 1.5, 2, 3, 4)

    @jax.jit
    def both(density, x):
        def fields(y):
            score = jax.grad(lambda z: density.log_prob(z.reshape(x.shape), SIGMA))(y)
            return jnp.stack([jnp.sum(score**2) ** (p / 2 - 1) * score for p in exponents])

        expected = jnp.trace(jax.jacfwd(fields)(x.reshape(-1)), axis1=1, axis2=2)
        return jnp.stack([density.p_laplacian(x, SIGMA, p) for p in exponents]), expected

    actual, expected = both(density, x)
    # In one dimension p = 1 is the divergence of a sign, zero up to rounding of the two terms.
    scale = np.maximum(np.abs(expected), np.abs(density.laplacian(x, SIGMA)))
    assert (np.abs(actual - expected) < 1e-10 * scale).all()


def test_p_laplacian_at_infinity(x64, build):
    density, x = build()
    s = density.score(x, SIGMA).reshape(-1)
    expected = s @ density.hessian(x, SIGMA) @ s
    close(density.p_laplacian(x, SIGMA, math.inf), expected)
    close(density.p_laplacian(x, SIGMA, math.inf, normalized=True), expected / (s @ s))


def test_tweedie(x64, build):
    density, x = build()
    found = evaluate(density, x, SIGMA)
    mean, covariance = found["posterior"]
    retained = np.eye(x.size) + SIGMA**2 * found["hessian"]
    close(x + SIGMA**2 * found["score"], mean)
    close(SIGMA**2 * retained, covariance)
    close(covariance, covariance.T)
    close(found["effective_dimension"], np.trace(covariance) / SIGMA**2)
    close(found["effective_dimension"], x.size + SIGMA**2 * found["laplacian"])
    assert np.linalg.eigvalsh(covariance).min() > -1e-12


def test_posterior_by_weighted_sampling(x64, build):
    density, x = build()
    clean = np.asarray(density.sample(jax.random.key(1), 40_000, 0.0)).reshape(40_000, -1)
    distance = ((clean - np.asarray(x).reshape(1, -1)) ** 2).sum(axis=1)
    weights = np.exp(-distance / (2 * SIGMA**2))
    weights /= weights.sum()
    exact = evaluate(density, x, SIGMA)["posterior"]
    centered = clean - np.asarray(exact.mean).reshape(1, -1)
    products = centered[:, :, None] * centered[:, None, :]
    for draws, expected in ((centered, 0.0), (products, np.asarray(exact.covariance))):
        mean = np.tensordot(weights, draws, 1)
        error = np.sqrt(np.tensordot(weights**2, (draws - mean) ** 2, 1))
        assert (np.abs(mean - expected) < 4.5 * error + 1e-12).all()


def test_samples_have_the_density_s_moments(build):
    density, _ = build()
    draws = np.asarray(density.sample(jax.random.key(0), 20_000, SIGMA), np.float64)
    draws = draws.reshape(20_000, -1)
    # sigma -> infinity of the posterior is the prior: the exact mean and covariance.
    mean, covariance = _prior(density)
    deviation = draws - mean
    assert (np.abs(deviation.mean(0)) < 4.5 * deviation.std(0) / 20_000**0.5).all()
    products = deviation[:, :, None] * deviation[:, None, :]
    expected = covariance + SIGMA**2 * np.eye(len(covariance))
    error = products.std(0) / 20_000**0.5
    assert (np.abs(products.mean(0) - expected) < 4.5 * error).all()


def _prior(density):
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf, density
        )
        posterior = evaluate(wide, jnp.zeros(density.event_shape), 1e7)["posterior"]
        return np.asarray(posterior.mean).reshape(1, -1), np.asarray(posterior.covariance)


def test_a_density_is_a_score(build):
    density, x = build()

    @jax.jit
    def value_and_trace(score, x):
        lin = linearize(lambda y: score(y, SIGMA), x)
        return lin.value, lin.trace()

    value, trace = value_and_trace(density, x)
    found = evaluate(density, x, SIGMA)
    close(value, found["score"], 1e-5)
    close(trace, found["laplacian"], 1e-4)


def test_jit_and_vmap_agree_with_the_plain_call(build):
    density, x = build()
    chex.clear_trace_counter()
    xs = jnp.stack([x, x + 0.5, x - 1.0])
    sigmas = jnp.asarray([0.6, 0.3, 2.0], x.dtype)

    @jax.jit
    @chex.assert_max_traces(1)
    def batched(density, xs, sigmas):
        return jax.vmap(lambda x, sigma: everything(density, x, sigma))(xs, sigmas)

    rows = [everything(density, x, float(sigma)) for x, sigma in zip(xs, sigmas, strict=True)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    tolerance = 1e-11 if x.dtype == jnp.float64 else 1e-4
    for actual in (batched(density, xs, sigmas), batched(density, xs, sigmas)):
        jax.tree.map(lambda a, e: close(a, e, tolerance), actual, expected)
        assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {x.dtype}


def test_gradients_equal_difference_quotients(x64, build):
    density, x = build()
    direction = jnp.asarray(np.random.default_rng(3).normal(size=x.shape))

    @jax.jit
    def values(density, x):
        found = everything(density, x, SIGMA)
        return jnp.stack([found[k] for k in ("laplacian", "p_laplacian", "effective_dimension")])

    reverse = jax.jit(jax.jacrev(values, argnums=1))(density, x)
    slopes = (reverse * direction[None]).reshape(3, -1).sum(axis=1)
    step = 1e-5
    quotient = (values(density, x + step * direction) - values(density, x - step * direction)) / (
        2 * step
    )
    np.testing.assert_allclose(slopes, quotient, rtol=1e-6, atol=1e-7)


def test_gradient_with_respect_to_the_arrays(x64, build):
    density, x = build()
    centers = next(a for a in ("mean", "means", "points") if hasattr(density, a))

    def log_prob(shift):
        moved = eqx.tree_at(
            lambda d: getattr(d, centers), density, getattr(density, centers) + shift
        )
        return moved.log_prob(x, SIGMA)

    # Moving the data one way is moving x the other way.
    gradient = jax.jit(jax.grad(log_prob))(jnp.zeros(()))
    close(gradient, -jnp.sum(density.score(x, SIGMA)), 1e-9)


def test_single_precision_is_kept_and_close(build):
    density, x = build()
    narrow = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf, density
    )
    x = x.astype(jnp.float32)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf, narrow
        )
        expected = evaluate(wide, x.astype(jnp.float64), SIGMA)
    actual = evaluate(narrow, x, SIGMA)
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(lambda a, e: close(a, e, 2e-5), actual, expected)


def test_arrays_are_arguments_not_constants(build):
    density, x = build()
    text = jax.jit(lambda d, x: d.score(x, SIGMA)).lower(density, x).as_text()
    leaves = [leaf for leaf in jax.tree.leaves(density) if leaf.size]
    assert text.split("func.func")[1].count("%arg") >= len(leaves)
    assert "dense<[[" not in text


def test_shape_dtype_sigma_and_condition_are_checked(build):
    density, x = build()
    with pytest.raises(InputError, match="x: expected float"):
        density.score(jnp.zeros((*x.shape, 1)), 0.1)
    with pytest.raises(InputError, match="x: expected float"):
        density.log_prob(x.astype(jnp.bfloat16), 0.1)
    with pytest.raises(InputError, match="sigma: expected a number >= 0"):
        density.score(x, -0.1)
    with pytest.raises(InputError, match="sigma: expected a number >= 0"):
        density.sample(jax.random.key(0), 2, math.nan)
    with pytest.raises(InputError, match="p: expected"):
        density.p_laplacian(x, 0.1, 0.5)
    with pytest.raises(InputError, match="condition: expected"):
        density.score(x, 0.1, 7)


def test_nan_in_nan_out(build):
    density, x = build()
    bad = jnp.full_like(x, jnp.nan)
    found = evaluate(density, bad, SIGMA)
    for name in ("log_prob", "score", "p_laplacian"):
        assert jnp.isnan(found[name]).all(), name


def test_zero_noise(x64, build):
    density, x = build()
    if isinstance(density, Empirical) or not jnp.isfinite(density.log_prob(x, 0.0)):
        assert not jnp.isfinite(density.score(x, 0.0)).all() or density.log_prob(x, 0.0) == -jnp.inf
        return
    close(density.score(x, 0.0), jax.grad(density.log_prob)(x, 0.0))
    close(density.laplacian(x, 0.0), density.laplacian(x, 1e-9), 1e-8)
    mean, covariance = density.posterior(x, 0.0)
    close(mean, x)
    np.testing.assert_allclose(covariance, 0, atol=1e-25)
    close(density.effective_dimension(x, 0.0), float(x.size))
