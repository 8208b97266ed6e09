"""Likelihoods against the densities' own, their differences, and bits per dimension."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.densities import ConditionalMixture, Gaussian
from memjax.diffusion import bits_per_dim, log_likelihood, log_likelihood_ratio, probability_flow

D = 5


def classes(dtype):
    rng = np.random.default_rng(0)
    means = jnp.asarray(rng.normal(size=(4, D)), dtype)
    return ConditionalMixture([0.1, 0.2, 0.3, 0.4], means, rng.uniform(0.01, 0.5, 4), [0, 0, 1, 1])


@pytest.mark.usefixtures("x64")
def test_against_the_density():
    """With the exact prior exactly; with the normal one up to what its documentation allows."""
    density = classes(np.float64)
    xs = density.sample(jax.random.key(0), 16, 0.05)
    exact = jax.vmap(lambda x: density.log_prob(x, 0.05))(xs)
    flow = probability_flow(
        density, 0.05, 20.0, divergence="exact", solver="dopri8", tol=1e-9, num_steps=1
    )

    known = jax.jit(jax.vmap(log_likelihood(flow, prior=density.log_prob)))(xs)
    fixed = probability_flow(density, 0.05, 20.0, divergence="exact", solver="rk4", num_steps=96)
    normal = jax.jit(jax.vmap(log_likelihood(fixed, data_std=0.9)))(xs)
    np.testing.assert_allclose(known.value, exact, atol=1e-8)
    np.testing.assert_allclose(known.value, known.log_volume + known.log_prior, atol=1e-12)
    assert not known.status.any()
    mean = np.linalg.norm(density.means.T @ density.weights)
    error = np.asarray(normal.value) - exact
    assert np.abs(error).max() < 4 * mean / 20 + 0.02
    assert np.abs(error).max() > 1e-5


def test_in_float32_by_32_steps():
    density = Gaussian(jnp.zeros(D, jnp.float32), np.asarray([0.01, 0.1, 0.5, 1.0, 2.0]))
    xs = density.sample(jax.random.key(1), 8, 0.05)
    flow = probability_flow(density, 0.05, 10.0, divergence="exact", solver="rk4")
    out = jax.jit(jax.vmap(log_likelihood(flow, prior=density.log_prob)))(xs)
    exact = jax.vmap(lambda x: density.log_prob(x, 0.05))(xs)
    np.testing.assert_allclose(out.value, exact, atol=1e-4)
    assert out.value.dtype == jnp.float32


def test_ratios():
    """Of a class to all, on the same probes: right, and surer than either likelihood."""
    density = classes(np.float32)
    options = {
        "divergence": "hutchinson", "num_products": 64, "solver": "heun", "num_steps": 64
    }  # fmt: skip

    def flow(density, label):
        return probability_flow(density, 0.3, 10.0, condition=jnp.int32(label), **options)

    @jax.jit
    def run(flow, reference, xs, key):
        ratio = log_likelihood_ratio(flow, reference, data_std=0.9)
        single = log_likelihood(flow, data_std=0.9)
        return jax.vmap(lambda x: (ratio(x, key), single(x, key)))(xs)

    xs, key = density.sample(jax.random.key(2), 16, 0.3, 1), jax.random.key(3)
    ratio, _ = run(flow(density, 1), flow(density, -1), xs, key)
    exact = jax.vmap(lambda x: density.log_prob(x, 0.3, 1) - density.log_prob(x, 0.3))(xs)
    latent = 0.2  # of the two means, over sigma1
    error = np.abs(ratio.value - exact)
    assert (error < 4 * ratio.standard_error + latent).all()
    assert np.median(error) < 0.15
    np.testing.assert_allclose(ratio.value, ratio.log_volume + ratio.log_prior, atol=1e-5)
    assert not ratio.status.any()
    # The more alike two models, the surer their ratio.
    other = eqx.tree_at(lambda d: d.means, density, 1.02 * density.means)
    ratio, single = run(flow(density, 1), flow(other, 1), xs, key)
    exact = jax.vmap(lambda x: density.log_prob(x, 0.3, 1) - other.log_prob(x, 0.3, 1))(xs)
    assert (np.abs(ratio.value - exact) < 4 * ratio.standard_error + 0.02).all()
    assert np.median(ratio.standard_error) < 0.1 * np.median(single.standard_error)
    assert (ratio.cost.forward == 2 * single.cost.forward).all()
    # A flow against itself is nothing, without error.
    nothing, _ = run(flow(density, 1), flow(density, 1), xs, key)
    assert (nothing.value == 0).all()
    assert (nothing.standard_error == 0).all()


def test_a_failed_flow_fails_the_ratio():
    good = probability_flow(lambda x, s, c: -x, 0.1, 1.0, divergence="exact", solver="heun")
    bad = probability_flow(lambda x, s, c: jnp.nan * x, 0.1, 1.0, divergence="exact", solver="heun")
    for pair in ((good, bad), (bad, good)):
        out = log_likelihood_ratio(*pair)(jnp.ones(2))
        assert out.status == Status.NONFINITE
        assert jnp.isnan(out.value)


def test_bits_per_dim():
    """Of a discrete distribution: pixels k = 0..255, a normal density cut into bins."""
    density = Gaussian(jnp.zeros(1, jnp.float32), 0.04)
    pixels = np.arange(256)
    x = jnp.asarray(pixels[:, None] / 127.5 - 1, jnp.float32)
    log_prob = jax.vmap(lambda x: density.log_prob(x, 0.0))(x)
    bits = np.asarray(bits_per_dim(log_prob, 1))
    np.testing.assert_allclose((2.0**-bits).sum(), 1, atol=1e-3)
    np.testing.assert_allclose(bits_per_dim(jnp.zeros(()), 3, bin_width=1 / 128), 7, atol=1e-6)
    # Twice the data in twice the dimensions: the same number.
    np.testing.assert_allclose(bits_per_dim(2 * log_prob, 2), bits, rtol=1e-6)


def test_bad_input():
    def score(x, sigma, condition):
        return -x

    silent = probability_flow(score, 0.1, 1.0)
    down = probability_flow(score, 1.0, 0.1, divergence="exact")
    up = probability_flow(score, 0.1, 1.0, divergence="exact")
    other = probability_flow(score, 0.1, 1.0, divergence="hutchinson")
    with pytest.raises(InputError, match="flow: expected one made with a divergence"):
        log_likelihood(silent)
    with pytest.raises(InputError, match="flow: expected sigma1 above sigma0, or a prior"):
        log_likelihood(down)
    with pytest.raises(InputError, match=r"data_std: expected a number >= 0, got -1\.0"):
        log_likelihood(up, data_std=-1.0)
    with pytest.raises(InputError, match="reference: expected one made with a divergence"):
        log_likelihood_ratio(up, silent)
    with pytest.raises(InputError, match="reference: expected the divergence of flow"):
        log_likelihood_ratio(up, other)
    with pytest.raises(InputError, match="num_dims: expected a whole number at least 1, got 0"):
        bits_per_dim(jnp.zeros(()), 0)
    with pytest.raises(InputError, match=r"bin_width: expected a positive finite number, got 0\.0"):
        bits_per_dim(jnp.zeros(()), 1, bin_width=0.0)
