"""The sphere loss against the closed form of a Gaussian and a denoiser that knows its points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.densities.empirical import Empirical
from memjax.detect import PLaplaceFlux, ScoreNorm, SphereLoss, cost, evaluate_detectors

D = 6
STDS = np.array([2.0, 1.0, 0.5, 0.1, 0.0, 0.0])
KEY = jax.random.key(0)


def gaussian_score(x, sigma, condition=None):
    return -x / (jnp.asarray(STDS**2, x.dtype).reshape(x.shape) + sigma**2)


def run(score, x, detectors, key=KEY):
    return jax.jit(lambda x: evaluate_detectors(score, x, detectors, key=key))(x)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 1)])
def test_its_expectation_under_a_gaussian(x64, shape):
    """(sigma^2 |s|^2 + radius^2 |M|^2) / d, with an error that says how far off it is."""
    x = jnp.linspace(-1.0, 2.0, D).reshape(shape)
    sigma, radius = 0.4, 0.7
    variance = STDS**2 + sigma**2
    s, retained = -np.asarray(x).ravel() / variance, STDS**2 / variance
    expected = (sigma**2 * s @ s + radius**2 * retained @ retained) / D
    detectors = (SphereLoss(sigma, radius, num_pairs=8),)
    keys = jax.random.split(KEY, 300)
    one = jax.vmap(lambda key: evaluate_detectors(gaussian_score, x, detectors, key=key)[0])
    found = jax.jit(one)(keys)
    spread = np.std(found.value, ddof=1)
    assert abs(np.mean(found.value) + expected) < 4 * spread / np.sqrt(len(keys))
    assert abs(np.mean(np.asarray(found.standard_error) ** 2) / spread**2 - 1) < 0.3
    np.testing.assert_allclose(found.raw, -D * np.asarray(found.value), rtol=1e-12)


def test_it_is_the_distance_from_the_image_to_the_denoised_point(x64):
    """By hand, with the posterior mean of an empirical density, which is its denoiser."""
    points = jax.random.normal(jax.random.key(2), (5, D))
    density = Empirical(points)
    sigma, x0 = 0.5, points[0] + 0.1
    (found,) = run(density.score, x0, (SphereLoss(sigma, radius=0.5, num_pairs=3),))
    squares = []
    for j in range(3):
        n = np.asarray(jax.random.normal(derive_key(KEY, "draw", j), x0.shape))
        step = 0.5 * sigma * np.sqrt(D) * n / np.linalg.norm(n)
        for x in (np.asarray(x0) + step, np.asarray(x0) - step):
            weights = np.exp(-np.sum((np.asarray(points) - x) ** 2, axis=1) / (2 * sigma**2))
            denoised = weights @ np.asarray(points) / weights.sum()
            squares.append(np.sum((np.asarray(x0) - denoised) ** 2))
    np.testing.assert_allclose(found.value, -np.mean(squares) / (sigma**2 * D), rtol=1e-10)


def test_a_small_sphere_leaves_the_score_norm(x64):
    x = jnp.linspace(-1.0, 2.0, D)
    loss, norm = run(gaussian_score, x, (SphereLoss(0.3, radius=1e-4), ScoreNorm(0.3)))
    np.testing.assert_allclose(loss.value, -(norm.value**2), rtol=1e-6)


def test_a_stored_point_scores_higher_than_one_beside_it():
    points = jnp.concatenate([jnp.zeros((1, D)), 3 + jax.random.normal(KEY, (400, D))])
    density = Empirical(points)
    detector = (SphereLoss(0.2),)
    find = jax.jit(lambda x: evaluate_detectors(density.score, x, detector, key=KEY)[0].value)
    stored, beside = find(points[0]), find(jnp.full(D, 3.0))
    assert stored > -1e-5
    assert beside < stored - 0.01


def test_it_shares_its_points_with_the_flux(counting):
    detectors = (SphereLoss(0.1, 0.3, num_pairs=4), PLaplaceFlux(0.1, radius=0.3, num_pairs=3))
    assert cost(detectors, D) == Cost(forward=8)
    counted = counting(gaussian_score)
    jax.block_until_ready(evaluate_detectors(counted, jnp.ones(D), detectors, key=KEY))
    jax.effects_barrier()
    assert counted.calls == 8


def test_one_pair_has_no_error_and_a_nan_has_no_value():
    xs = jnp.stack([jnp.ones(D), jnp.full(D, jnp.nan)])
    detector = (SphereLoss(0.1, num_pairs=1),)
    one = jax.vmap(lambda x: evaluate_detectors(gaussian_score, x, detector, key=KEY)[0])
    found = jax.jit(one)(xs)
    assert found.status.tolist() == [Status.OK, Status.NONFINITE]
    assert np.isfinite(found.value[0])
    assert np.isinf(found.standard_error[0])
    assert np.isnan(found.value[1])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SphereLoss(0.0), "sigma"),
        (lambda: SphereLoss(0.1, radius=0.0), "radius"),
        (lambda: SphereLoss(0.1, num_pairs=0), "num_pairs"),
    ],
)
def test_unusable_settings_are_refused(make, named):
    with pytest.raises(InputError, match=f"^{named}: expected"):
        make()
