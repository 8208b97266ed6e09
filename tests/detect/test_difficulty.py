import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.detect import (
    FLIPD,
    DenoisingLoss,
    Detector,
    Difference,
    FluxAndLoss,
    OverDifficulty,
    PLaplaceFlux,
    SampleDetector,
    ScoreNorm,
    SphereLoss,
    evaluate_detectors,
)
from memjax.evaluate import excess_over_difficulty, image_difficulty


@pytest.fixture(scope="module")
def difficulty():
    images = np.random.default_rng(0).normal(size=(80, 6)) * np.linspace(0.2, 2, 80)[:, None]
    return image_difficulty(images)


def test_below_a_ceiling_the_logarithm_of_the_shortfall_is_compared(difficulty):
    rng = np.random.default_rng(1)
    value, error = rng.uniform(0.3, 0.9, 80), rng.uniform(0.01, 0.1, 80)
    population = np.arange(80) < 70
    found, its_error = OverDifficulty(PLaplaceFlux(0.1)).excess(
        value, error, difficulty, population
    )
    expected = excess_over_difficulty(-np.log(1 - value), difficulty, population)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(its_error, error / (1 - value))
    # Half the shortfall of one image, which bears little on the others, is log 2 more.
    closer = value.copy()
    closer[75] = 1 - (1 - value[75]) / 2
    again, _ = OverDifficulty(PLaplaceFlux(0.1)).excess(closer, error, difficulty, population)
    np.testing.assert_allclose(again[75] - found[75], np.log(2), rtol=1e-12)


def test_without_a_ceiling_the_value_itself_is(difficulty):
    value = np.random.default_rng(2).normal(size=80)
    error = np.ones(80)
    for detector in (FLIPD(0.1), PLaplaceFlux(0.1, p=2), Difference(PLaplaceFlux(0.1))):
        found, its_error = OverDifficulty(detector).excess(value, error, difficulty)
        np.testing.assert_array_equal(found, excess_over_difficulty(value, difficulty))
        np.testing.assert_array_equal(its_error, error)


def test_at_the_ceiling_an_image_stands_far_out_and_stays_finite(difficulty):
    value = np.full(80, -0.5) + 0.01 * np.arange(80)
    value[3], value[4] = 0, np.nan
    found, _ = OverDifficulty(ScoreNorm(0.1)).excess(value, np.zeros(80), difficulty)
    assert 10 < found[3] < 100
    assert np.isnan(found[4])
    assert np.isfinite(np.delete(found, 4)).all()
    flux = np.where(np.arange(80) == 3, 1 + 1e-8, 0.5 + 0.001 * np.arange(80))
    found, _ = OverDifficulty(PLaplaceFlux(0.1)).excess(flux, np.zeros(80), difficulty)
    assert 10 < found[3] < 100


def test_no_value_exceeds_its_ceiling():
    """Not of a field that points straight back, and not of one that does anything else."""
    detectors = (PLaplaceFlux(0.3), SphereLoss(0.3), FluxAndLoss(0.3), ScoreNorm(0.3))
    detectors = (*detectors, DenoisingLoss(0.3))
    stored = jnp.linspace(-1.0, 1.0, 12)
    rng = np.random.default_rng(3)
    matrix = jnp.asarray(rng.normal(size=(12, 12)))

    def perfect(x, sigma, condition=None):
        return (stored - x) / sigma**2

    def arbitrary(x, sigma, condition=None):
        return matrix @ x

    for score, best in ((perfect, True), (arbitrary, False)):
        found = evaluate_detectors(score, stored, detectors, key=jax.random.key(0))
        for detector, finding in zip(detectors, found, strict=True):
            assert finding.value <= detector.ceiling + 1e-6
            if best:
                np.testing.assert_allclose(finding.value, detector.ceiling, atol=1e-5)


def test_what_it_is_called():
    detector = OverDifficulty(SphereLoss(0.2))
    assert detector.name == "sphere_loss_over_difficulty"
    assert detector.sigma == 0.2
    assert detector.statement.startswith("How much nearer to its ceiling than for images as")
    assert OverDifficulty(FLIPD(0.2)).statement.startswith("More than for images as difficult: ")
    assert not isinstance(detector, (Detector, SampleDetector))
