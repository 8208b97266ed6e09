"""Volume growth as a detector: closed forms, an independent solver, errors, statuses, cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.densities import GaussianMixture
from memjax.detect import (
    Difference,
    NormalizedVolumeGrowth,
    Requirements,
    cost,
    evaluate_detectors,
    requirements,
)

D = 6
STDS = np.array([2.0, 1.0, 0.5, 0.1, 0.0, 0.0])
KEY = jax.random.key(0)


def gaussian_score(x, sigma, condition=None):
    """N(0, diag STDS^2) and noise; a condition scales the variances of the data."""
    scale = 1.0 if condition is None else condition
    return -x / (jnp.asarray(STDS**2, x.dtype).reshape(x.shape) * scale + sigma**2)


def gaussian_growth(sigma0, sigma1, scale=1.0):
    variances = scale * STDS**2
    return 0.5 * np.sum(np.log((variances + sigma1**2) / (variances + sigma0**2)))


@functools.partial(jax.jit, static_argnames=("score", "detectors"))
def run(x, detectors, key=KEY, score=gaussian_score, condition=None):
    return evaluate_detectors(score, x, detectors, key=key, condition=condition)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 1)])
def test_closed_form_of_a_gaussian(x64, shape):
    """Linear flows stretch alike everywhere: clean, noised and image-free starts agree."""
    detectors = tuple(
        NormalizedVolumeGrowth(0.05, kind, 2, ratio=8, num_steps=128)
        for kind in ("clean", "noised", "pure")
    )
    expected = gaussian_growth(0.05, 0.4)
    for found in run(jnp.linspace(-1.0, 2.0, D).reshape(shape), detectors):
        np.testing.assert_allclose(found.raw, expected, rtol=2e-5)
        np.testing.assert_allclose(found.value, found.raw / (D * np.log(8)), rtol=1e-12)
        assert found.standard_error < 1e-12
        assert found.status == Status.OK


def test_the_default_steps_are_close_at_any_ratio():
    detectors = tuple(NormalizedVolumeGrowth(1e-4, ratio=ratio) for ratio in (2, 8, 1e5))
    for detector, found in zip(detectors, run(jnp.ones(D), detectors), strict=True):
        exact = gaussian_growth(1e-4, 1e-4 * detector.ratio) / (D * np.log(detector.ratio))
        assert abs(found.value - exact) < 0.01, detector


def test_a_stored_point_reaches_one_wherever_it_is_looked_at():
    def score(x, sigma, condition=None):
        return (0.3 - x) / sigma**2

    detectors = tuple(NormalizedVolumeGrowth(0.1, kind) for kind in ("clean", "noised"))
    for x in (jnp.full(D, 0.3), jnp.linspace(-2.0, 2.0, D)):
        for found in run(x, detectors, score=score):
            np.testing.assert_allclose(found.value, 1.0, rtol=1e-5)
            np.testing.assert_allclose(found.raw, D * np.log(3), rtol=1e-5)


def mixture(dtype=None):
    """Broad, with a narrow component in it."""
    means = jnp.zeros((2, 3), dtype).at[1].set(1.5)
    return GaussianMixture(np.array([0.8, 0.2]), means, np.array([1.0, 1e-4]))


def test_against_scipy_on_a_mixture(x64):
    """Where neighbors of the start end up, by another solver: log |det| of their differences."""
    from scipy.integrate import solve_ivp

    density = mixture(jnp.float64)
    score = jax.jit(lambda x, sigma: density.score(x, sigma))
    x, h = np.array([1.2, 1.5, 1.7]), 1e-4

    def arrive(y):
        out = solve_ivp(
            lambda s, y: -np.exp(2 * s) * np.asarray(score(jnp.asarray(y), jnp.exp(s))),
            (np.log(0.2), np.log(1.6)),
            y,
            rtol=1e-9,
            atol=1e-10,
        )
        return out.y[:, -1]

    columns = [(arrive(x + h * e) - arrive(x - h * e)) / (2 * h) for e in np.eye(3)]
    expected = np.linalg.slogdet(np.stack(columns))[1]
    detector = NormalizedVolumeGrowth(0.2, ratio=8, num_steps=256)
    (found,) = evaluate_detectors(density, jnp.asarray(x), (detector,), key=KEY)
    assert abs(expected) > 0.5
    np.testing.assert_allclose(found.raw, expected, atol=2e-4)


DENSITY = mixture()
IMAGES = jnp.stack([jnp.full(3, 1.5), jnp.full(3, 1.4), jnp.full(3, -0.6), jnp.full(3, jnp.nan)])


def broken(x, sigma, condition=None):
    """NaN within a band of noise that only the flow passes."""
    inside = (sigma > 0.1) & (sigma < 0.2)
    return jnp.where(inside, jnp.nan, DENSITY.score(x, sigma, condition))


def wild(x, sigma, condition=None):
    """Outgrows the largest number in its second step."""
    return -(float(jnp.finfo(x.dtype).max) ** 0.4) * x / sigma**2


def test_stored_points_rank_first_and_bad_rows_stay_alone():
    every = jax.jit(jax.vmap(lambda x: evaluate_detectors(DENSITY, x, DETECTORS, key=KEY)))
    for found in every(IMAGES):
        stored, _, ordinary, _ = np.asarray(found.value)
        assert 0.9 < stored <= 1.0 + 1e-5
        assert ordinary < 0.3
        assert list(found.status) == [Status.OK] * 3 + [Status.NONFINITE]
        assert np.isnan(np.asarray(found.standard_error)[-1])


DETECTORS = (NormalizedVolumeGrowth(0.05), NormalizedVolumeGrowth(0.05, "noised", 4))


@pytest.mark.parametrize("score", [broken, wild])
def test_a_broken_score_is_told(score):
    for found in run(IMAGES[0], DETECTORS, score=score):
        assert found.status == Status.NONFINITE
        assert np.isnan(found.value)
        assert np.isnan(found.raw)


def test_errors_are_honest_and_common_to_images():
    """Over 300 keys: the spread of values, of what is reported, and of differences."""
    probed = NormalizedVolumeGrowth(0.3, "noised", 4, ratio=4, num_probes=3)
    exact = NormalizedVolumeGrowth(0.3, "noised", 4, ratio=4)
    images = jnp.stack([jnp.array([0.3, 1.0, 1.4]), jnp.array([0.2, 1.1, 1.4])])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def every(key, x):
        return evaluate_detectors(DENSITY, x, (probed, exact), key=key)

    for found, upper in zip(every(jax.random.split(KEY, 300), images), (2.0, 1.25), strict=True):
        values, errors = np.asarray(found.value), np.asarray(found.standard_error)
        spread = np.var(values[:, 0], ddof=1)
        assert spread > 1e-5
        # An upper estimate where probes are shared by draws, else unbiased; 8 % of chance.
        assert 0.75 < np.mean(errors[:, 0] ** 2) / spread < upper
        assert np.var(values[:, 0] - values[:, 1], ddof=1) < 0.2 * spread
    probed, exact = every(jax.random.split(jax.random.key(1), 300), images)
    apart = np.asarray(probed.value - exact.value)[:, 0]
    assert abs(np.mean(apart)) < 4 * np.std(apart) / 300**0.5


def test_a_single_noise_has_no_error():
    (found,) = run(jnp.ones(D), (NormalizedVolumeGrowth(0.1, "noised", 1),))
    assert found.standard_error == np.inf
    assert found.status == Status.OK


def test_the_declared_cost_is_what_runs(counting):
    detectors = (
        NormalizedVolumeGrowth(0.1),
        NormalizedVolumeGrowth(0.1, ratio=3.0, num_steps=2),  # the same flow
        NormalizedVolumeGrowth(0.1, "noised", 2, num_steps=3, num_probes=4),
    )
    declared = cost(detectors, D)
    assert declared == Cost(5 + 2 * 7, 5 * D + 2 * 7 * 4)
    counted = counting(gaussian_score)
    jax.block_until_ready(evaluate_detectors(counted, jnp.ones(D), detectors, key=KEY))
    jax.effects_barrier()
    assert counted.calls == declared.forward
    assert requirements(detectors, D) == Requirements(False, False)
    assert cost(detectors[:1], 1024) == Cost(5, 5 * 1024)
    assert cost(detectors[:1], 3072) == Cost(5, 5 * 16)


def test_growth_beyond_that_without_the_condition():
    detector = NormalizedVolumeGrowth(0.1, num_steps=16)
    gap = (Difference(detector, "null"),)
    (found,) = run(jnp.ones(D), gap, condition=jnp.asarray(0.01))
    expected = gaussian_growth(0.1, 0.3, 0.01) - gaussian_growth(0.1, 0.3)
    np.testing.assert_allclose(found.raw, expected, rtol=1e-3)
    assert found.value > 0
    assert requirements(gap, D) == Requirements(True, False)
    assert cost(gap, D) == Cost(66, 66 * D)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, r"^sigma: expected a positive"),
        ({"kind": "sphere"}, r"^kind: expected 'clean', 'noised'"),
        ({"ratio": 1.0}, r"^ratio: expected a finite number above 1, got 1.0"),
        ({"ratio": float("inf")}, r"^ratio: "),
        ({"num_steps": 0}, r"^num_steps: expected a whole number at least 1"),
        ({"num_probes": 1}, r"^num_probes: expected a whole number at least 2"),
        ({"num_draws": 0}, r"^num_draws: "),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(InputError, match=message):
        NormalizedVolumeGrowth(**{"sigma": 0.1} | change)
