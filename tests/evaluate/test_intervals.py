import numpy as np
import pytest
from scipy import stats

from memjax._core.errors import InputError
from memjax.evaluate.intervals import proportion_interval


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("trials", [1, 7, 50, 1000])
def test_equals_scipy(trials, confidence):
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        exact = stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
        ours = proportion_interval(successes, trials, confidence=confidence)
        assert ours == pytest.approx((exact.low, exact.high), rel=1e-9)


def test_covers_for_every_probability():
    # Exactly, by summing the binomial over all outcomes.
    n = 20
    limits = [proportion_interval(k, n, confidence=0.9) for k in range(n + 1)]
    for p in np.linspace(0.01, 0.99, 99):
        inside = [low <= p <= high for low, high in limits]
        assert stats.binom.pmf(np.arange(n + 1), n, p)[inside].sum() >= 0.9


def test_no_trials_says_nothing():
    assert proportion_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "trials"), [(2, 1), (-1, 5)])
def test_impossible_counts(successes, trials):
    with pytest.raises(InputError, match="successes: expected 0"):
        proportion_interval(successes, trials)


def test_confidence_out_of_range():
    with pytest.raises(InputError, match="confidence: expected a number between 0 and 1, got 95"):
        proportion_interval(1, 2, confidence=95.0)
