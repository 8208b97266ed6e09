"""Detectors against closed forms, and the runner's sharing of evaluations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.detect import (
    FLIPD,
    DenoisingLoss,
    EffectiveDimension,
    Need,
    Point,
    ScoreNorm,
    cost,
    evaluate_detectors,
    finding,
)

D = 6
STDS = np.array([2.0, 1.0, 0.5, 0.1, 0.0, 0.0])
KEY = jax.random.key(0)


def gaussian_score(x, sigma, condition=None):
    """N(0, diag STDS^2) plus noise: s = -x / (STDS^2 + sigma^2); condition scales the data."""
    scale = 1.0 if condition is None else condition
    variance = jnp.asarray(STDS**2, x.dtype).reshape(x.shape) * scale + sigma**2
    return -x / variance


def all_detectors(sigma):
    return (
        FLIPD(sigma),
        EffectiveDimension(sigma),
        ScoreNorm(sigma),
        DenoisingLoss(sigma, num_draws=4),
    )


def run(x, detectors, **kwargs):
    evaluate = jax.jit(
        lambda x: evaluate_detectors(gaussian_score, x, detectors, key=KEY, **kwargs)
    )
    return evaluate(x)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 1)])
@pytest.mark.parametrize("sigma", [0.05, 0.7])
def test_closed_forms_of_a_gaussian(x64, shape, sigma):
    x = jnp.linspace(-1.0, 2.0, D).reshape(shape)
    variance = STDS**2 + sigma**2
    s = -np.asarray(x).ravel() / variance
    d_eff = np.sum(STDS**2 / variance)
    flipd, effective, norm, _ = run(x, all_detectors(sigma))

    np.testing.assert_allclose(effective.value, -d_eff / D, rtol=1e-12)
    np.testing.assert_allclose(effective.raw, -np.sum(1 / variance), rtol=1e-12)
    np.testing.assert_allclose(flipd.raw, d_eff + sigma**2 * s @ s, rtol=1e-12)
    np.testing.assert_allclose(flipd.value, -flipd.raw / D, rtol=1e-12)
    np.testing.assert_allclose(norm.raw, np.linalg.norm(s), rtol=1e-12)
    np.testing.assert_allclose(norm.value, -sigma * norm.raw / np.sqrt(D), rtol=1e-12)
    for deterministic in (flipd, effective, norm):
        assert deterministic.standard_error == 0
        assert deterministic.status == Status.OK


def test_denoising_loss_estimates_its_expectation_with_an_honest_error(x64):
    """E|n + sigma s(x + sigma n)|^2 = |sigma s(x)|^2 + sum (1 - sigma^2/v)^2 for a Gaussian."""
    sigma, draws = 0.4, 16
    x = jnp.linspace(-1.0, 1.0, D)
    variance = STDS**2 + sigma**2
    s = -np.asarray(x) / variance
    expected = (sigma**2 * s @ s + np.sum((1 - sigma**2 / variance) ** 2)) / D
    keys = jax.random.split(jax.random.key(3), 300)
    detector = (DenoisingLoss(sigma, draws),)
    found = jax.jit(
        jax.vmap(lambda key: evaluate_detectors(gaussian_score, x, detector, key=key)[0])
    )(keys)
    values, errors = np.asarray(found.value), np.asarray(found.standard_error)
    spread = np.std(values, ddof=1)
    assert abs(np.mean(values) + expected) < 4 * spread / np.sqrt(len(values))
    # The relative error of a variance estimated from 300 values is about 8 %.
    assert abs(np.mean(errors**2) / spread**2 - 1) < 0.25
    np.testing.assert_allclose(found.raw, -D * np.asarray(found.value), rtol=1e-12)


def test_a_stored_point_scores_higher_than_an_ordinary_one():
    """One narrow and one broad Gaussian: every detector ranks the centre of the narrow one up."""

    def score(x, sigma, condition=None):
        narrow, broad = 0.01**2 + sigma**2, 1.0 + sigma**2
        centre = jnp.full_like(x, 3.0)
        logits = jnp.stack(
            [
                -0.5 * jnp.sum((x - centre) ** 2) / narrow - 0.5 * D * jnp.log(narrow),
                -0.5 * jnp.sum(x**2) / broad - 0.5 * D * jnp.log(broad),
            ]
        )
        weights = jax.nn.softmax(logits)
        return -weights[0] * (x - centre) / narrow - weights[1] * x / broad

    stored = jnp.full(D, 3.0)
    ordinary = jax.random.normal(jax.random.key(5), (D,))
    for detector in all_detectors(0.1):
        (high,) = evaluate_detectors(score, stored, (detector,), key=KEY)
        (low,) = evaluate_detectors(score, ordinary, (detector,), key=KEY)
        assert high.value > low.value, detector


def test_the_union_of_needs_is_evaluated_once(counting):
    detectors = (*all_detectors(0.1), ScoreNorm(0.3), DenoisingLoss(0.1, num_draws=3))
    counted = counting(gaussian_score)
    x = jnp.ones(D)
    out = evaluate_detectors(counted, x, detectors, key=KEY)
    jax.block_until_ready(out)
    jax.effects_barrier()
    # clean at .1 (shared by three), clean at .3, four noises at .1 (three of them shared)
    assert cost(detectors, D) == Cost(forward=6, jvp=D)
    assert counted.calls == 6


def test_sharing_does_not_change_a_finding():
    detectors = all_detectors(0.2)
    x = jnp.linspace(-1.0, 1.0, D)
    together = run(x, detectors)
    for detector, shared in zip(detectors, together, strict=True):
        (alone,) = run(x, (detector,))
        np.testing.assert_allclose(shared.value, alone.value, rtol=1e-6)


def test_draws_are_common_to_images_and_levels():
    class Recorder(DenoisingLoss):
        def finish(self, evidence):
            n = jnp.stack([evidence[p].displacement for p in self._points()]) / self.sigma
            return finding(jnp.sum(n), jnp.sum(n * n))

    a = run(jnp.zeros(D), (Recorder(0.1, 3),))[0]
    b = run(jnp.ones(D), (Recorder(0.4, 3),))[0]
    np.testing.assert_allclose(a.value, b.value, rtol=1e-4)


def test_sphere_points_lie_on_their_sphere_and_come_in_antithetic_pairs():
    class Sphere:
        name = title = statement = raw_name = "sphere"
        default_level = 1.0
        sigma = 0.5
        points = tuple(Point(0.5, "sphere", draw=2, sign=sign, radius=0.25) for sign in (1, -1))

        def needs(self, d):
            return tuple(Need(point) for point in self.points)

        def finish(self, evidence):
            plus, minus = (evidence[point].displacement for point in self.points)
            return finding(jnp.linalg.norm(plus), jnp.linalg.norm(plus + minus))

    (found,) = run(jnp.ones(D), (Sphere(),))
    np.testing.assert_allclose(found.value, 0.25, rtol=1e-6)
    assert found.raw == 0


def test_pure_noise_does_not_know_the_image():
    class Pure(ScoreNorm):
        def needs(self, d):
            return (Need(Point(0.5, "pure", radius=20.0)),)

        def finish(self, evidence):
            score = evidence[Point(0.5, "pure", radius=20.0)].score
            return finding(jnp.sum(score), jnp.sum(score * score))

    a, b = (run(x, (Pure(0.5),))[0] for x in (jnp.zeros(D), jnp.ones(D)))
    np.testing.assert_allclose(a.value, b.value, rtol=1e-4)
    n = np.asarray(jax.random.normal(derive_key(KEY, "draw", 0), (D,)))
    np.testing.assert_allclose(a.value, np.sum(-20 * n / (STDS**2 + 0.25)), rtol=1e-4)


def test_condition_and_baseline_reach_the_right_score():
    class Compare(ScoreNorm):
        points = (
            Point(0.5, condition="given"),
            Point(0.5, condition="null"),
            Point(0.5, model="baseline"),
        )

        def needs(self, d):
            return tuple(Need(point) for point in self.points)

        def finish(self, evidence):
            given, null, baseline = (evidence[point].score[0] for point in self.points)
            return finding(given / null, baseline)

    def baseline(x, sigma, condition=None):
        return jnp.full_like(x, 7.0)

    x = jnp.ones(D)
    (found,) = run(x, (Compare(0.5),), condition=jnp.asarray(2.0), baseline=baseline)
    np.testing.assert_allclose(found.value, (4 + 0.25) / (8 + 0.25), rtol=1e-6)
    assert found.raw == 7
    with pytest.raises(InputError, match="baseline"):
        run(x, (Compare(0.5),))


def test_a_nonfinite_image_is_a_status_and_leaves_its_neighbours_alone():
    detectors = all_detectors(0.2)
    huge = jnp.finfo(jnp.ones(D).dtype).max
    xs = jnp.stack([jnp.ones(D), jnp.full(D, jnp.nan), jnp.full(D, huge), jnp.linspace(0, 1, D)])

    def one(x):
        return evaluate_detectors(gaussian_score, x, detectors, key=KEY)

    batch = jax.jit(jax.vmap(one))
    found, clean = batch(xs), batch(xs.at[1:3].set(0.0))
    for detector, clean_detector in zip(found, clean, strict=True):
        assert np.isnan(detector.value[1])
        assert detector.status[1] == Status.NONFINITE
        for row in (0, 3):
            assert detector.value[row] == clean_detector.value[row]
            assert detector.status[row] == Status.OK
    flipd = found[0]
    assert flipd.status[2] == Status.NONFINITE
    assert np.isnan(flipd.raw[2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScoreNorm(0.0),
        lambda: FLIPD(-1.0),
        lambda: EffectiveDimension(float("nan")),
        lambda: DenoisingLoss(float("inf")),
        lambda: DenoisingLoss(0.1, num_draws=1),
    ],
)
def test_unusable_settings_are_refused(make):
    with pytest.raises(InputError, match=r"^(sigma|num_draws): expected"):
        make()


def test_one_trace_for_many_chunks():
    import chex

    detectors = all_detectors(0.2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def batch(xs):
        return jax.vmap(lambda x: evaluate_detectors(gaussian_score, x, detectors, key=KEY))(xs)

    for seed in range(3):
        batch(jax.random.normal(jax.random.key(seed), (4, D)))
