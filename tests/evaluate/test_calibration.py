"""Calibration: hand-made cases, closed forms, and a general minimizer."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from memjax._core.errors import InputError
from memjax.evaluate.calibration import calibration_error, fit_temperature


def naive(probs, labels, num_bins):
    """The sum over bins as it is written, bin by bin."""
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    total = 0.0
    for b in range(num_bins):
        inside = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            total += inside.sum() / len(labels) * gap
    return total


def test_a_hand_made_case():
    """Two bins: (.6, 1.0] holds .7 and .9 (one right), (.2, .6] holds .5 twice (both right)."""
    probs = np.array([[0.7, 0.3, 0.0], [0.05, 0.9, 0.05], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    labels = np.array([0, 2, 0, 2])
    # In 2 bins: (0, .5]: confidence .5, accuracy 1; (.5, 1]: confidence .8, accuracy .5.
    expected = (2 * 0.5 + 2 * 0.3) / 4
    assert calibration_error(probs, labels, num_bins=2) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_bins", [1, 3, 15])
def test_calibration_error_is_the_sum_over_bins(num_bins):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(4, 0.5), size=500)
    labels = rng.integers(0, 4, 500)
    found = calibration_error(probs, labels, num_bins=num_bins)
    assert found == pytest.approx(naive(probs, labels, num_bins), abs=1e-12)
    assert found > 0.1


def test_calibrated_probabilities_have_an_error_that_vanishes():
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(3), size=100_000)
    labels = (rng.random((len(probs), 1)) > probs.cumsum(axis=1)).sum(axis=1)
    # E |gap| of a bin of n/15 rows is at most sqrt(2/pi) .5 sqrt(15/n).
    assert calibration_error(probs, labels) < np.sqrt(2 / np.pi) * 0.5 * np.sqrt(15 / len(probs))
    sharpened = probs**3 / (probs**3).sum(axis=1, keepdims=True)
    assert calibration_error(sharpened, labels) > 0.1


def test_certain_and_wrong_is_the_largest_error():
    probs = np.tile([1.0, 0.0], (5, 1))
    assert calibration_error(probs, np.ones(5, int)) == 1.0
    assert calibration_error(probs, np.zeros(5, int)) == 0.0
    assert np.isnan(calibration_error(np.full((2, 2), np.nan), np.zeros(2, int)))


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_temperature_is_that_of_a_general_minimizer(temperature):
    rng = np.random.default_rng(2)
    z = rng.normal(size=(400, 5)) * 2
    labels = np.array([rng.choice(5, p=p) for p in scipy.special.softmax(z, axis=1)])
    logits = (z * temperature).astype(np.float32)

    def loss(log_t):
        scaled = logits.astype(np.float64) / np.exp(log_t)
        return (scipy.special.logsumexp(scaled, axis=1) - scaled[np.arange(400), labels]).mean()

    best = scipy.optimize.minimize_scalar(loss, bounds=(-3, 3), options={"xatol": 1e-10})
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(np.exp(best.x), rel=1e-6)
    assert found == pytest.approx(temperature, rel=0.2)


def test_two_classes_have_a_closed_form():
    """Logits (a, 0), a share s right: a / T = log(s / (1 - s)), whatever is added to a row."""
    logits = np.tile([3.0, 0.0], (10, 1)) + np.arange(10)[:, None]
    labels = np.array([0] * 8 + [1] * 2)
    assert fit_temperature(logits, labels) == pytest.approx(3 / np.log(4), rel=1e-8)


def test_temperatures_beyond_the_range_are_its_ends():
    logits = np.tile([1.0, 0.0], (6, 1))
    assert fit_temperature(logits, np.zeros(6, int)) == 1 / 20  # never wrong: T = 0
    assert fit_temperature(logits, np.ones(6, int)) == 20  # worse than chance: T = infinity
    assert fit_temperature(np.ones((3, 2)), np.zeros(3, int)) == 1
    assert np.isnan(fit_temperature(np.array([[np.nan, 0.0]]), np.zeros(1, int)))


@pytest.mark.parametrize("function", [calibration_error, fit_temperature])
def test_labels_that_do_not_fit_are_refused(function):
    with pytest.raises(InputError, match=r"labels: expected 0\.\.1, found -1\.\.1"):
        function(np.full((2, 2), 0.5), np.array([-1, 1]))
    with pytest.raises(InputError, match=r"labels: expected 0\.\.1, found 0\.\.2"):
        function(np.full((2, 2), 0.5), np.array([0, 2]))
    with pytest.raises(InputError, match="at least one row"):
        function(np.zeros((0, 2)), np.zeros(0, int))


def test_no_bins_are_refused():
    with pytest.raises(InputError, match="num_bins"):
        calibration_error(np.ones((1, 1)), np.zeros(1, int), num_bins=0)
