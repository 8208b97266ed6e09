"""Local dimension from the flux, and profiles over noise levels, against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gammaln

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.detect import (
    FLIPD,
    EffectiveDimension,
    FluxDimension,
    PLaplaceFlux,
    cost,
    dimension_profile,
    evaluate_detectors,
)

KEY = jax.random.key(0)


def find(score, x, *detectors):
    return jax.jit(lambda x: evaluate_detectors(score, x, detectors, key=KEY))(x)


def find_many(score, x, detectors, num_keys):
    keys = jax.random.split(KEY, num_keys)

    def one(key):
        return evaluate_detectors(score, x, tuple(detectors), key=key)

    return jax.jit(jax.vmap(one))(keys)


@pytest.mark.parametrize(("d", "m"), [(64, 12), (16, 0)])
def test_a_flat_manifold(d, m):
    """A = E|n across| = Gamma((k+1)/2) Gamma(d/2) / (Gamma(k/2) Gamma((d+1)/2)), k = d - m."""
    across = jnp.arange(d) >= m

    def score(x, sigma, condition=None):
        return -jnp.where(across, x, 0) / sigma**2

    x = jnp.where(across, 0, 7.0)
    cosine, dimension = find_many(score, x, (PLaplaceFlux(0.1), FluxDimension(0.1)), 200)
    log_gammas = gammaln([(d - m + 1) / 2, d / 2, (d - m) / 2, (d + 1) / 2])
    exact = math.exp(log_gammas @ [1, 1, -1, -1])
    slack = 1e-5
    assert abs(np.mean(cosine.value) - exact) < 4 * np.std(cosine.value) / 200**0.5 + slack
    expected = d * (1 - exact**2)
    assert abs(expected - (m + m / (2 * d))) < 0.02
    spread = np.std(dimension.raw)
    # A^2 is too small by the variance of A: a second-order bias.
    bias = d * np.var(cosine.value)
    assert abs(np.mean(dimension.raw) - expected) < 4 * spread / 200**0.5 + bias + d * slack
    np.testing.assert_allclose(dimension.value, -dimension.raw / d, rtol=1e-5, atol=1e-6)
    if m:
        honest = np.sqrt(np.mean(dimension.standard_error**2)) * d / spread
        assert abs(honest - 1) < 0.2


@pytest.mark.parametrize("detector", [FLIPD, EffectiveDimension])
def test_a_trace_of_large_images_is_estimated(detector):
    """One product a number would be days; a diagonal Hessian's trace needs no more than a few."""
    d = 1025
    assert cost((detector(0.1),), d - 1) == Cost(forward=1, jvp=d - 1)
    assert cost((detector(0.1),), d) == Cost(forward=1, jvp=16)
    assert cost((detector(0.1, exact_limit=d),), d) == Cost(forward=1, jvp=d)
    assert cost((detector(0.1, 3),), d) == Cost(forward=1, jvp=3)
    free = jnp.arange(d) < 40
    found, exact = find(
        lambda x, sigma, condition=None: -jnp.where(free, 0, x) / sigma**2,
        jnp.where(free, 7.0, 0),
        detector(0.1),
        detector(0.1, exact_limit=d),
    )
    np.testing.assert_allclose([found.value, exact.value], -40 / d, rtol=1e-3)


def test_it_shares_every_evaluation_with_the_flux():
    flux, dimension = PLaplaceFlux(0.2, num_pairs=3), FluxDimension(0.2, num_pairs=3)
    assert cost((flux, dimension), 9) == cost((flux,), 9) == cost((dimension,), 9)

    def score(x, sigma, condition=None):
        return -jnp.tanh(x - 0.1) / sigma**2

    a, b = find(score, jnp.linspace(-1, 1, 9), flux, dimension)
    np.testing.assert_allclose(b.raw, 9 * (1 - a.value**2), rtol=1e-5)
    np.testing.assert_allclose(b.standard_error, 2 * a.value * a.standard_error, rtol=1e-5)


def test_a_point_that_repels_has_every_dimension():
    """The square of A would take a maximally repelling point for a stored one."""

    def score(x, sigma, condition=None):
        return x / sigma**2

    repels, one = find(score, jnp.zeros(5), *(FluxDimension(0.2, num_pairs=m) for m in (2, 1)))
    assert repels.raw == 5
    assert repels.value == -1
    assert np.isinf(one.standard_error)


def test_no_direction_no_dimension():
    (found,) = find(lambda x, sigma, condition=None: 0 * x, jnp.ones(5), FluxDimension(0.2))
    assert found.status == Status.UNDEFINED
    assert np.isnan(found.value)


STDS = np.array([2.0, 1.0, 0.5, 0.1, 0.0, 0.0])


def gaussian_score(x, sigma, condition=None):
    scale = 1.0 if condition is None else condition
    return -x / (jnp.asarray(STDS**2, x.dtype).reshape(x.shape) * scale + sigma**2)


def test_a_profile_is_the_closed_form_at_every_level(x64):
    sigmas = (0.01, 0.1, 1.0, 10.0)
    x = jnp.array([1.0, -1.0, 0.5, 0.05, 0.0, 0.0]).reshape(2, 3, 1)
    profile = jax.jit(
        lambda x: dimension_profile(gaussian_score, x, sigmas, key=KEY, condition=jnp.asarray(2.0))
    )(x)
    variance = 2 * STDS**2 + np.array(sigmas)[:, None] ** 2
    s = np.asarray(x).ravel() / variance
    effective = np.sum(1 - np.array(sigmas)[:, None] ** 2 / variance, axis=1)
    np.testing.assert_allclose(profile.sigmas, sigmas)
    np.testing.assert_allclose(profile.effective.value, effective, rtol=1e-9)
    flipd = effective + np.array(sigmas) ** 2 * np.sum(s**2, axis=1)
    np.testing.assert_allclose(profile.flipd.value, flipd, rtol=1e-9)
    assert not np.any(profile.effective.standard_error)
    assert np.all(np.diff(profile.flux.value) < 0)
    assert np.all(profile.flux.standard_error > 0)


def test_a_profile_is_what_the_detectors_say():
    sigmas = (0.1, 0.6)
    x = jnp.linspace(-1.0, 1.0, 6)
    settings = {"num_probes": 3, "radius": 0.4, "num_pairs": 2}
    profile = jax.jit(lambda x: dimension_profile(gaussian_score, x, sigmas, key=KEY, **settings))(
        x
    )
    kinds = {
        "effective": lambda sigma: EffectiveDimension(sigma, 3),
        "flipd": lambda sigma: FLIPD(sigma, 3),
        "flux": lambda sigma: FluxDimension(sigma, 0.4, 2),
    }
    for name, kind in kinds.items():
        found = find(gaussian_score, x, *map(kind, sigmas))
        ours = getattr(profile, name)
        np.testing.assert_allclose(ours.value, [-6 * f.value for f in found], rtol=1e-4, atol=1e-5)
        expected = [6 * f.standard_error for f in found]
        np.testing.assert_allclose(ours.standard_error, expected, rtol=1e-3, atol=1e-5)
        assert ours.status.tolist() == [Status.OK] * 2


def test_a_stored_point_has_no_dimension_until_the_noise_sees_its_neighbors():
    """Two stored points at distance 2: dimension 0 far below, and one direction in between."""

    def score(x, sigma, condition=None):
        center = jnp.zeros_like(x).at[0].set(jnp.tanh(x[0] / sigma**2))
        return (center - x) / sigma**2

    x = jnp.zeros(8).at[0].set(1.0)
    profile = jax.jit(lambda x: dimension_profile(score, x, (0.1, 0.9), key=KEY))(x)
    for found in (profile.effective, profile.flipd, profile.flux):
        low, high = found.value
        assert abs(low) < 1e-3
        assert 0.05 < high < 1.5


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FluxDimension(0.0), "sigma"),
        (lambda: FluxDimension(0.1, radius=math.inf), "radius"),
        (lambda: FluxDimension(0.1, num_pairs=0), "num_pairs"),
        (lambda: dimension_profile(gaussian_score, jnp.ones(6), (), key=KEY), "sigmas"),
        (lambda: dimension_profile(gaussian_score, jnp.ones(6), (-1.0,), key=KEY), "sigma"),
    ],
)
def test_unusable_settings_are_refused(make, name):
    with pytest.raises(InputError, match=rf"^{name}: expected"):
        make()
