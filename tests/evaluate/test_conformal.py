import math

import numpy as np
import pytest
from scipy import stats

from memjax._core.errors import InputError
from memjax.evaluate.conformal import benjamini_hochberg, conformal_p_values, flag


def test_p_values_by_their_definition():
    rng = np.random.default_rng(0)
    for _ in range(100):
        scores = np.round(rng.normal(size=20), 1)
        calibration = np.round(rng.normal(size=int(rng.integers(1, 40))), 1)
        expected = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in scores]
        np.testing.assert_allclose(conformal_p_values(scores, calibration), expected, rtol=1e-15)


def test_p_values_are_super_uniform():
    # Exchangeable rows: P(p <= u) <= u, with equality on the grid 1/(n+1) when there are no ties.
    rng = np.random.default_rng(1)
    repeats, n = 20_000, 19
    draws = rng.normal(size=(repeats, n + 1))
    values = np.array([conformal_p_values(x[:1], x[1:])[0] for x in draws])
    for u in (0.05, 0.1, 0.5):
        assert abs((values <= u + 1e-9).mean() - u) < 4 * math.sqrt(u * (1 - u) / repeats)
    tied = rng.integers(0, 3, size=(repeats // 4, n + 1)).astype(float)
    coarse = np.array([conformal_p_values(x[:1], x[1:])[0] for x in tied])
    assert (coarse <= 0.05 + 1e-9).mean() <= 0.05


def test_benjamini_hochberg_equals_scipy():
    rng = np.random.default_rng(2)
    for _ in range(300):
        p = rng.random(int(rng.integers(1, 50))) ** rng.uniform(1, 4)
        fdr = float(rng.uniform(0.01, 0.5))
        expected = stats.false_discovery_control(p) <= fdr
        np.testing.assert_array_equal(benjamini_hochberg(p, fdr), expected)


def test_a_p_value_on_the_line_is_rejected():
    # k fdr / m and p are the same rational numbers; neither form is exact in floating point.
    for n in range(2, 200):
        p = np.append(np.full(n - 1, 1.0), 1 / (n * 10))
        assert benjamini_hochberg(p, 0.1)[-1]


def test_nan_rows_are_not_tested():
    p = np.array([0.001, np.nan, 0.9, np.nan, 0.04])
    expected = np.array([True, False, False, False, True])
    np.testing.assert_array_equal(benjamini_hochberg(p, 0.1), expected)
    result = flag(
        np.array([5.0, np.nan, 0.0], np.float32), np.append(np.arange(40) / 40, np.nan), 0.2
    )
    assert result.flagged.tolist() == [True, False, False]
    assert np.isnan(result.p_value).tolist() == [False, True, False]
    assert result.excluded == (1, 1)
    assert result.smallest_p == 1 / 41


@pytest.mark.parametrize("planted", [0, 20])
def test_false_discovery_rate_is_controlled(planted):
    rng = np.random.default_rng(3)
    fdr, repeats, tested = 0.1, 400, 200
    shares, found = [], []
    for _ in range(repeats):
        scores = rng.normal(size=tested)
        scores[:planted] += 4
        result = flag(scores, rng.normal(size=500), fdr)
        false = result.flagged[planted:].sum()
        shares.append(false / max(1, result.flagged.sum()))
        found.append(result.flagged[:planted].sum())
    error = np.std(shares, ddof=1) / math.sqrt(repeats)
    assert np.mean(shares) <= fdr * (tested - planted) / tested + 4 * error
    if planted:
        # Control is not bought by never flagging.
        assert np.mean(found) > planted / 2


def test_flagged_share_when_nothing_is_planted():
    # Without anything to find every flag is false: a run flags anything in at most fdr of cases.
    rng = np.random.default_rng(4)
    runs = [flag(rng.normal(size=100), rng.normal(size=199), 0.1).flagged.any() for _ in range(500)]
    assert np.mean(runs) <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / 500)


@pytest.mark.parametrize(("rows", "resolvable"), [(8, False), (9, True)])
def test_calibration_too_small_for_any_flag(rows, resolvable):
    result = flag(np.full(5, 1e9), np.arange(float(rows)), 0.1)
    assert result.resolvable == resolvable
    assert result.flagged.all() == resolvable
    assert result.flagged.any() == resolvable


def test_fewest_is_the_smallest_number_that_can_be_flagged():
    calibration = np.arange(99.0)
    for fdr in (0.05, 0.1, 0.2):
        fewest = flag(np.zeros(70), calibration, fdr).fewest
        for outstanding in (fewest - 1, fewest):
            scores = np.where(np.arange(70) < outstanding, 1e9, -1.0)
            flagged = flag(scores, calibration, fdr).flagged
            assert flagged.sum() == (outstanding if outstanding == fewest else 0)


def test_no_calibration():
    with pytest.raises(InputError, match="calibration: expected at least one score"):
        flag(np.zeros(3), np.full(2, np.nan), 0.1)


def test_fdr_out_of_range():
    with pytest.raises(InputError, match="fdr: expected a number between 0 and 1, got 1"):
        flag(np.zeros(3), np.zeros(3), 1.0)


def test_nothing_to_test():
    result = flag(np.zeros(0), np.zeros(3), 0.5)
    assert result.flagged.shape == (0,)
