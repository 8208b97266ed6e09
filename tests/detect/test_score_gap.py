"""Gap detectors against closed forms, another coordinate system, and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.densities import ConditionalMixture, GaussianMixture
from memjax.detect import (
    Anisotropy,
    DenoisedNorm,
    GapSharpness,
    Point,
    Requirements,
    ScoreGap,
    cost,
    evaluate_detectors,
    requirements,
)
from memjax.diffusion.prediction import from_prediction
from memjax.diffusion.schedule import ContinuousVP

D = 4
KEY = jax.random.key(2)
KINDS = ("clean", "noised", "pure")


def mixture(dtype=None):
    """Two classes of two components each, class 0 narrow; one full covariance shape for all."""
    rng = np.random.default_rng(5)
    roots = rng.normal(size=(4, D, D)) * np.array([0.2, 0.1, 0.6, 0.8])[:, None, None]
    means = jnp.asarray(rng.normal(size=(4, D)), dtype)
    return ConditionalMixture(
        [0.2, 0.2, 0.4, 0.2], means, roots @ roots.transpose(0, 2, 1), [0, 0, 1, 1]
    )


def run(score, x, detectors, condition=None):
    return jax.jit(
        lambda x, condition: evaluate_detectors(score, x, detectors, key=KEY, condition=condition)
    )(x, condition)


def run_rows(score, xs, detectors, conditions):
    return jax.jit(
        jax.vmap(
            lambda x, condition: evaluate_detectors(
                score, x, detectors, key=KEY, condition=condition
            )
        )
    )(xs, conditions)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 1)])
def test_gaussian_expectations(x64, shape):
    """Over p(x | c): E|s_gap|^2 and E|H_gap s_gap|^2, with means and covariances that differ."""
    sigma, rng = 0.5, np.random.default_rng(1)
    roots = rng.normal(size=(2, D, D)) * np.array([0.4, 1.0])[:, None, None]
    data = roots @ roots.transpose(0, 2, 1)
    means = rng.normal(size=(2, D))
    given, null = (np.linalg.inv(c + sigma**2 * np.eye(D)) for c in data)
    spread = np.linalg.inv(given)
    shift = null @ (means[0] - means[1])
    change = null - given
    gap2 = shift @ shift + np.trace(change @ change @ spread)
    along2 = (change @ shift) @ (change @ shift) + np.trace(
        np.linalg.matrix_power(change, 4) @ spread
    )

    def score(x, sigma, condition=None):
        which = 1 if condition is None else 0
        centered = x.reshape(-1) - means[which]
        return -((null if which else given) @ centered).reshape(x.shape)

    detectors = (
        ScoreGap(sigma, "noised", num_draws=1),
        GapSharpness(sigma, "noised", num_draws=1, norm="squared"),
    )
    xs = means[0] + rng.normal(size=(20_000, D)) @ roots[0].T
    keys = jax.random.split(KEY, len(xs))
    found = jax.jit(
        jax.vmap(
            lambda x, key: evaluate_detectors(score, x, detectors, key=key, condition=jnp.zeros(()))
        )
    )(jnp.asarray(xs.reshape(-1, *shape)), keys)
    for raw, expected in ((found[0].raw ** 2 / sigma**2, gap2), (found[1].raw, along2)):
        error = np.std(raw) / len(xs) ** 0.5
        assert abs(np.mean(raw) - expected) < 4 * error
        assert error < 0.03 * expected


def points_of(x, kind, sigma, num_draws):
    """The points of a detector, as the runner draws them."""
    draws = [
        jax.random.normal(derive_key(KEY, "draw", j), x.shape, x.dtype) for j in range(num_draws)
    ]
    start = jnp.zeros_like(x) if kind == "pure" else x
    return [x] if kind == "clean" else [start + sigma * n for n in draws]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_against_its_hessians(x64, kind):
    density, sigma, draws = mixture(jnp.float64), 0.7, 3
    x = jnp.linspace(-1.0, 0.5, D)
    detectors = (
        ScoreGap(sigma, kind, draws),
        GapSharpness(sigma, kind, draws),
        GapSharpness(sigma, kind, draws, norm="squared"),
    )
    norms, along = [], []
    for point in points_of(x, kind, sigma, draws):
        gap = density.score(point, sigma, 0) - density.score(point, sigma)
        bend = density.hessian(point, sigma, 0) - density.hessian(point, sigma)
        norms.append(sigma * np.linalg.norm(gap))
        along.append(np.linalg.norm(np.asarray(bend) @ np.asarray(gap)))
    along = np.array(along)
    wen, jeon, squared = run(density.score, x, detectors, jnp.int32(0))
    np.testing.assert_allclose(wen.raw, np.mean(norms), rtol=1e-10)
    np.testing.assert_allclose(wen.value, np.mean(norms) / D**0.5, rtol=1e-10)
    np.testing.assert_allclose(jeon.raw, np.mean(along), rtol=1e-10)
    np.testing.assert_allclose(jeon.value, sigma**3 * np.mean(along) / D**0.5, rtol=1e-10)
    np.testing.assert_allclose(squared.raw, np.mean(along**2), rtol=1e-10)
    np.testing.assert_allclose(squared.value, sigma**6 * np.mean(along**2) / D, rtol=1e-10)
    if kind == "clean":
        assert wen.standard_error == 0
    else:
        expected = sigma**3 * np.std(along, ddof=1) / (D * draws) ** 0.5
        np.testing.assert_allclose(jeon.standard_error, expected, rtol=1e-10)


def test_values_do_not_depend_on_the_coordinates_of_training(x64):
    """One mixture as a variance-preserving noise predictor, its own density in its own x_t."""
    density, schedule = mixture(jnp.float64), ContinuousVP()
    roots = np.random.default_rng(5).normal(size=(4, D, D))
    covariances = roots * np.array([0.2, 0.1, 0.6, 0.8])[:, None, None]
    covariances = covariances @ covariances.transpose(0, 2, 1)
    sigma = 1.3
    alpha = float(schedule.alpha_at(sigma))
    noised = alpha**2 * covariances
    in_time = {
        None: GaussianMixture(density.weights, alpha * density.means, noised),
        0: GaussianMixture([0.5, 0.5], alpha * density.means[:2], noised[:2]),
    }
    spread = alpha * sigma

    def network(x_t, time, condition):
        return -spread * in_time[None if condition is None else 0].score(x_t, spread)

    wrapped = from_prediction(network, prediction="epsilon", schedule=schedule)
    x = jnp.linspace(-1.0, 0.5, D)
    detectors = (ScoreGap(sigma), GapSharpness(sigma, "noised"), DenoisedNorm(sigma, 2))
    ours = run(density.score, x, detectors, jnp.int32(0))
    theirs = run(wrapped, x, detectors, jnp.int32(0))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.value, b.value, rtol=1e-9)
    # The paper's own number, at the same points in x_t: theirs = ours / alpha^3.
    published = []
    for point in points_of(x, "noised", sigma, 4):
        x_t = alpha * point
        gap = in_time[0].score(x_t, spread) - in_time[None].score(x_t, spread)
        bend = in_time[0].hessian(x_t, spread) - in_time[None].hessian(x_t, spread)
        published.append(np.linalg.norm(np.asarray(bend) @ np.asarray(gap)))
    np.testing.assert_allclose(ours[1].raw / alpha**3, np.mean(published), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_anisotropy_is_a_norm_and_a_cosine(x64, kind):
    density, x = mixture(jnp.float64), jnp.linspace(-1.0, 0.5, D)
    detector = Anisotropy(3.0, kind, 2, sigma_low=0.4, norm_weight=0.5, cosine_weight=3)
    terms = []
    low = 1 if kind != "pure" else (1 + 0.4**2) ** 0.5 / 0.4  # sigma_low n, moved out to the radius
    for high, near in zip(points_of(x, kind, 3.0, 2), points_of(x, kind, 0.4, 2), strict=True):
        gap = density.score(high, 3.0, 0) - density.score(high, 3.0)
        null = density.score(low * near, 0.4)
        gap_low = density.score(low * near, 0.4, 0) - null
        cosine = gap_low @ null / np.linalg.norm(gap_low) / np.linalg.norm(null)
        terms.append(0.5 * 3.0 * np.linalg.norm(gap) + 3 * cosine)
    (found,) = run(density.score, x, (detector,), jnp.int32(0))
    np.testing.assert_allclose(found.value, np.mean(terms), rtol=1e-9)
    np.testing.assert_array_equal(found.raw, found.value)


def test_the_denoised_norm_is_that_of_the_shrunken_mean(x64):
    """Of N(m, v): |m| v-independent shrinkage sigma^2/(v + sigma^2), whatever the noise."""
    mean, sigma = np.array([1.0, -2.0, 0.5, 0.0]), 3.0
    variance = np.array([0.0, 1.0, 4.0, 2.0])

    def score(x, sigma, condition=None):
        return -(x - mean) / (variance + sigma**2)

    one, two = run(score, jnp.zeros(D), (DenoisedNorm(sigma), DenoisedNorm(sigma, 2)))
    expected = np.linalg.norm(sigma**2 * mean / (variance + sigma**2))
    np.testing.assert_allclose(one.raw, expected, rtol=1e-12)
    np.testing.assert_allclose(one.value, expected / (sigma * D**0.5), rtol=1e-12)
    assert np.isinf(one.standard_error)
    assert two.standard_error < 1e-12


def test_the_denoised_norm_has_an_honest_error(x64):
    def score(x, sigma, condition=None):
        return (2 + jnp.cos(x) - x) / sigma**2  # even in x but for the input itself

    keys = jax.random.split(KEY, 300)
    detector = (DenoisedNorm(1.0, 24),)
    found = jax.jit(
        jax.vmap(lambda key: evaluate_detectors(score, jnp.zeros(D), detector, key=key)[0])
    )(keys)
    # E cos(n) = exp(-1/2) for a standard normal n.
    assert abs(np.mean(found.raw) / (D**0.5 * (2 + np.exp(-0.5))) - 1) < 0.01
    spread = np.std(found.value, ddof=1)
    assert abs(np.mean(found.standard_error**2) / spread**2 - 1) < 0.3


STORED = (
    ScoreGap(8.0, "pure", 1),
    GapSharpness(8.0, "pure", 1),
    DenoisedNorm(8.0),
    ScoreGap(0.5, num_draws=2),
    GapSharpness(0.5, num_draws=2),
    Anisotropy(8.0, sigma_low=4.0),
)


def test_a_condition_that_stores_a_point_scores_higher():
    """One class is a point, the other a cloud around the origin as far out as that point."""
    d = 16
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(20, d))
    cloud /= np.linalg.norm(cloud, axis=1, keepdims=True)
    density = ConditionalMixture(
        [0.05] * 20, jnp.asarray(4 * cloud, jnp.float32), 0.01, [0] + [1] * 19
    )
    found = run_rows(density.score, density.means[:2], STORED, jnp.arange(2, dtype=jnp.int32))
    for detector, one in zip(STORED, found, strict=True):
        assert np.all(np.asarray(one.status) == Status.OK)
        assert one.value[0] > 1.2 * one.value[1], detector


def test_pure_noise_needs_no_image_and_no_condition_means_no_gap():
    density = mixture()
    detectors = (
        ScoreGap(2.0, "pure"),
        GapSharpness(2.0, "pure"),
        Anisotropy(2.0),
        DenoisedNorm(2.0),
    )
    xs = jnp.stack([jnp.zeros(D), jnp.ones(D), jnp.zeros(D)])
    conditions = jnp.asarray([0, 0, density.null_condition], jnp.int32)
    found = run_rows(density.score, xs, detectors, conditions)
    for one in found:
        np.testing.assert_allclose(one.value[0], one.value[1], rtol=1e-3)
    gap, sharpness, anisotropy, _ = found
    for zero in (gap, sharpness):
        assert zero.value[0] > 0.01
        assert zero.value[2] < 1e-6
        assert zero.status[2] == Status.OK
    assert np.isnan(anisotropy.value[2])
    assert anisotropy.status.tolist() == [Status.OK, Status.OK, Status.UNDEFINED]


def test_a_nonfinite_image_is_a_status():
    detectors = (
        ScoreGap(0.5, "noised"),
        GapSharpness(0.5, "noised"),
        Anisotropy(0.5, "noised"),
        Anisotropy(0.5, "clean"),
    )
    for found in run(mixture().score, jnp.full(D, jnp.nan), detectors, jnp.int32(0)):
        assert found.status == Status.NONFINITE
        assert np.isnan(found.value)


def bent_score(x, sigma, condition=None):
    """Any score that is not linear."""
    return jnp.tanh(x) * (1.0 if condition is None else condition)


@pytest.mark.parametrize(
    ("detectors", "expected"),
    [
        ((ScoreGap(0.5),), Cost(8)),
        ((ScoreGap(20.0, "pure", 1), GapSharpness(20.0, "pure", 1)), Cost(2, 2)),
        ((ScoreGap(0.5), GapSharpness(0.5), GapSharpness(0.5, norm="squared")), Cost(8, 8)),
        ((Anisotropy(20.0), ScoreGap(20.0, "pure")), Cost(16)),
        ((DenoisedNorm(20.0, 2), ScoreGap(20.0, "pure", 1)), Cost(5)),
    ],
)
def test_the_declared_cost_is_what_runs(detectors, expected, counting):
    counted = counting(bent_score)
    assert cost(detectors, D) == expected
    found = evaluate_detectors(counted, jnp.ones(D), detectors, key=KEY, condition=jnp.asarray(0.5))
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert counted.calls == expected.forward


@pytest.mark.parametrize(
    "detector", [ScoreGap(0.5), GapSharpness(0.5), Anisotropy(0.5), DenoisedNorm(0.5)]
)
def test_they_ask_for_conditions(detector):
    assert requirements((detector,), D) == Requirements(conditions=True, baseline=False)


def test_points_are_shared_with_other_detectors():
    assert ScoreGap(0.5, "noised").needs(D)[0].point == Point(0.5, "noised", draw=0)
    assert ScoreGap(0.5, "clean").needs(D)[1].point == Point(0.5, condition="null")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScoreGap(0.0),
        lambda: ScoreGap(1.0, "sphere"),
        lambda: GapSharpness(1.0, num_draws=0),
        lambda: GapSharpness(1.0, norm="l1"),
        lambda: Anisotropy(1.0, sigma_low=0.0),
        lambda: DenoisedNorm(1.0, 0),
    ],
)
def test_unusable_settings_are_refused(make):
    with pytest.raises(InputError, match=r"^(sigma|kind|num_draws|norm|sigma_low|num_pairs): "):
        make()
