"""ROC numbers against scikit-learn, intervals against simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from memjax._core.errors import InputError
from memjax.evaluate.roc import auroc, average_precision, roc_curve, tpr_at_fpr

ALL = (500, pytest.param(10_000, marks=pytest.mark.nightly))


def random_case(rng):
    """Scores with ties and NaN, in either precision, and labels with both classes ranked."""
    while True:
        n = int(rng.integers(4, 60))
        scores = rng.normal(size=n) * 10.0 ** rng.integers(-3, 4)
        if rng.random() < 0.5:
            scores = np.round(scores / np.abs(scores).max() * rng.integers(1, 6))
        labels = rng.random(n) < rng.uniform(0.1, 0.9)
        scores = scores + labels * rng.normal() * scores.std()
        scores[rng.random(n) < rng.choice([0, 0.2])] = np.nan
        if rng.random() < 0.3:
            scores = scores.astype(np.float32)
        ranked = ~np.isnan(scores)
        if 0 < labels[ranked].sum() < ranked.sum():
            return scores, labels, ranked


@pytest.mark.parametrize("cases", ALL)
def test_scores_equal_scikit_learn(cases):
    rng = np.random.default_rng(0)
    for _ in range(cases):
        scores, labels, ranked = random_case(rng)
        known, truth = scores[ranked].astype(np.float64), labels[ranked]
        ours = auroc(scores, labels)
        assert abs(ours.value - metrics.roc_auc_score(truth, known)) <= 1e-12
        assert ours.excluded == (~ranked).sum()
        assert (ours.num_positive, ours.num_negative) == (truth.sum(), (~truth).sum())
        assert 0 <= ours.low <= ours.value <= ours.high <= 1

        precision = average_precision(scores, labels, num_resamples=2)
        assert abs(precision.value - metrics.average_precision_score(truth, known)) <= 1e-12
        assert 0 <= precision.low <= precision.value <= precision.high <= 1

        fpr, tpr, thresholds = metrics.roc_curve(truth, known, drop_intermediate=False)
        curve = roc_curve(scores, labels)
        np.testing.assert_allclose(curve.fpr, fpr, rtol=0, atol=1e-12)
        np.testing.assert_allclose(curve.tpr, tpr, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(curve.thresholds, thresholds)

        alpha = float(rng.choice([0.01, 0.05, 0.1, 0.29, 0.5]))
        rate = tpr_at_fpr(scores, labels, fpr=alpha)
        assert rate.resolvable == ((~truth).sum() >= 1 / alpha)
        if rate.resolvable:
            assert abs(rate.value - tpr[fpr <= alpha].max()) <= 1e-12
            assert 0 <= rate.low <= rate.value <= rate.high <= 1
            # The threshold is one at which the value is attained.
            assert (known[truth] > rate.threshold).mean() == rate.value
            assert (known[~truth] > rate.threshold).mean() <= alpha
        else:
            assert math.isnan(rate.value)
            assert math.isnan(rate.low)


def test_auroc_by_its_definition():
    positive, negative = np.array([3.0, 1.0, 2.0]), np.array([2.0, 0.0])
    pairs = [(p > q) + (p == q) / 2 for p in positive for q in negative]
    labels = np.array([True, True, True, False, False])
    assert auroc(np.concatenate([positive, negative]), labels).value == np.mean(pairs)


def test_labels_are_never_flipped():
    scores = np.arange(100.0)
    labels = scores < 50
    assert auroc(scores, labels).value == 0
    assert auroc(scores, labels).high < 0.5
    assert auroc(-scores, labels).value == 1
    assert tpr_at_fpr(scores, labels, fpr=0.1).value == 0


def test_infinite_scores_rank_at_the_ends():
    scores = np.array([np.inf, 1.0, np.inf, -np.inf])
    labels = np.array([True, True, False, False])
    assert auroc(scores, labels).value == (0.5 + 1 + 0 + 1) / 4


def test_nan_scores_change_nothing_but_the_count():
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=300), rng.random(300) < 0.3
    padded = np.concatenate([scores, np.full(7, np.nan)])
    marks = np.concatenate([labels, np.array([True] * 3 + [False] * 4)])
    for function in (auroc, average_precision, lambda s, y: tpr_at_fpr(s, y, fpr=0.1)):
        assert function(padded, marks) == function(scores, labels)._replace(excluded=7)


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_one_empty_group_gives_nan(labels):
    scores, marks = np.array([1.0, 2.0]), np.array(labels)
    for result in (auroc(scores, marks), average_precision(scores, marks)):
        assert math.isnan(result.value)
        assert math.isnan(result.low)
    rate = tpr_at_fpr(scores, marks, fpr=0.5)
    assert not rate.resolvable
    curve = roc_curve(scores, marks)
    assert np.isnan(curve.fpr).all() == marks.all()
    assert np.isnan(curve.tpr).all() == (not marks.any())


def test_no_rows_at_all():
    empty = np.zeros(0)
    assert math.isnan(auroc(empty, empty.astype(bool)).value)
    assert roc_curve(empty, empty.astype(bool)).thresholds.tolist() == [math.inf]


def test_rates_are_compared_without_rounding():
    # floor(0.29 * 100) is 28 in floating point, but 29 of 100 is a rate of at most 0.29.
    scores = np.concatenate([np.arange(100.0), [70.5]])
    labels = np.arange(101) == 100
    assert tpr_at_fpr(scores, labels, fpr=0.29).value == 1
    assert tpr_at_fpr(scores, labels, fpr=0.28).value == 0


@pytest.mark.parametrize(("negatives", "resolvable"), [(99, False), (100, True)])
def test_a_rate_needs_one_over_alpha_negatives(negatives, resolvable):
    scores = np.concatenate([np.arange(float(negatives)), [1e3]])
    labels = np.arange(negatives + 1) == negatives
    assert tpr_at_fpr(scores, labels, fpr=0.01).resolvable == resolvable


def test_lower_limit_needs_enough_negatives_to_bound_the_threshold():
    # P(no negative above the population's threshold) = 0.99^n falls below 1.25 % at n = 436.
    for negatives, positive in ((435, False), (437, True)):
        scores = np.concatenate([np.arange(float(negatives)), np.full(50, 1e3)])
        labels = np.arange(negatives + 50) >= negatives
        assert (tpr_at_fpr(scores, labels, fpr=0.01).low > 0) == positive


@pytest.mark.parametrize(
    ("scores", "labels", "word"),
    [
        (np.zeros(3), np.zeros(2, bool), "labels"),
        (np.zeros((2, 2)), np.zeros((2, 2), bool), "labels"),
    ],
)
def test_shapes_that_do_not_fit(scores, labels, word):
    with pytest.raises(Exception, match=word):
        auroc(scores, labels)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, math.nan])
def test_levels_outside_the_unit_interval(level):
    scores, labels = np.arange(4.0), np.arange(4) > 1
    with pytest.raises(InputError, match="confidence: expected a number between 0 and 1"):
        auroc(scores, labels, confidence=level)
    with pytest.raises(InputError, match="fpr: expected"):
        tpr_at_fpr(scores, labels, fpr=level)


def test_bootstrap_is_seeded():
    rng = np.random.default_rng(4)
    scores, labels = rng.normal(size=80), rng.random(80) < 0.4
    assert average_precision(scores, labels) == average_precision(scores, labels)
    assert average_precision(scores, labels) != average_precision(scores, labels, seed=1)


def binormal(separation, spread):
    def draw(rng, m, n):
        return rng.normal(separation, spread, m), rng.normal(size=n)

    return draw, float(stats.norm.cdf(separation / math.hypot(1, spread)))


def tied(rng, m, n):
    return rng.binomial(4, 0.6, m).astype(float), rng.binomial(4, 0.3, n).astype(float)


_P, _Q = stats.binom.pmf(np.arange(5), 4, 0.6), stats.binom.pmf(np.arange(5), 4, 0.3)
TIED_AUROC = float(sum(_P[i] * (_Q[:i].sum() + _Q[i] / 2) for i in range(5)))

WORLDS = {
    "chance": binormal(0.0, 1.0),
    "good": binormal(1.2, 1.0),
    "excellent": binormal(3.3, 1.0),  # 0.99
    "nearly perfect": binormal(4.1, 1.0),  # 0.998
    "broad positives": binormal(7.4, 3.0),  # 0.99, by a few positives far below the rest
    "ties": (tied, TIED_AUROC),
}


@pytest.mark.parametrize("sizes", [(10, 10), (16, 920), (64, 920)])
@pytest.mark.parametrize("world", WORLDS)
def test_auroc_interval_covers(world, sizes):
    draw, truth = WORLDS[world]
    rng = np.random.default_rng([1, *sizes])
    labels = np.arange(sum(sizes)) < sizes[0]
    repeats = 300
    covered = 0
    for _ in range(repeats):
        result = auroc(np.concatenate(draw(rng, *sizes)), labels)
        covered += result.low <= truth <= result.high
    # At least 92 %, within 3 standard errors of the simulation.
    assert covered / repeats >= 0.92 - 3 * math.sqrt(0.92 * 0.08 / repeats)


def test_auroc_interval_is_not_trivially_wide():
    # At moderate values and sizes it is DeLong's, whose length is known.
    rng = np.random.default_rng(2)
    draw, _ = WORLDS["good"]
    labels = np.arange(400) < 200
    results = [auroc(np.concatenate(draw(rng, 200, 200)), labels) for _ in range(100)]
    deviation = np.std([r.value for r in results])
    width = np.mean([r.high - r.low for r in results])
    assert 0.8 < width / (2 * 1.96 * deviation) < 1.3


@pytest.mark.parametrize("world", ["good", "excellent", "broad positives"])
def test_tpr_interval_covers_the_rate_of_the_population(world):
    draw, _ = WORLDS[world]
    separation, spread = {
        "good": (1.2, 1.0),
        "excellent": (3.3, 1.0),
        "broad positives": (7.4, 3.0),
    }[world]
    alpha = 0.02
    truth = stats.norm.sf((stats.norm.isf(alpha) - separation) / spread)
    rng = np.random.default_rng(5)
    labels = np.arange(364) < 64
    repeats = 300
    results = [
        tpr_at_fpr(np.concatenate(draw(rng, 64, 300)), labels, fpr=alpha) for _ in range(repeats)
    ]
    covered = np.mean([r.low <= truth <= r.high for r in results])
    assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / repeats)
    # Both limits say something: the naive binomial interval at the sample's threshold is shorter,
    # but not by an order of magnitude.
    assert np.mean([r.high - r.low for r in results]) < 0.75


def test_tpr_interval_covers_with_ties():
    # Negatives 0 (95 %) or 1, positives 0 or 1 alike: at alpha = 10 % the threshold is 0 and the
    # rate is P(positive = 1) = 0.7.
    rng = np.random.default_rng(6)
    labels = np.arange(140) < 40
    covered = 0
    for _ in range(300):
        scores = np.concatenate([rng.random(40) < 0.7, rng.random(100) < 0.05]).astype(float)
        result = tpr_at_fpr(scores, labels, fpr=0.1)
        covered += result.low <= 0.7 <= result.high
    assert covered >= 0.95 * 300 - 12


def population_ap(separation, share):
    """Average precision of the binormal world by integrating precision over recall."""
    u = (np.arange(20_000) + 0.5) / 20_000
    fpr = stats.norm.sf(stats.norm.isf(u) + separation)
    return float(np.mean(u * share / (u * share + fpr * (1 - share))))


@pytest.mark.parametrize(("separation", "positives"), [(1.2, 64), (3.3, 64), (3.3, 16), (4.1, 16)])
def test_average_precision_interval_covers(separation, positives):
    truth = population_ap(separation, positives / (positives + 300))
    rng = np.random.default_rng([7, positives])
    labels = np.arange(positives + 300) < positives
    repeats = 200
    covered = 0
    for _ in range(repeats):
        scores = rng.normal(size=len(labels)) + separation * labels
        result = average_precision(scores, labels, num_resamples=200)
        covered += result.low <= truth <= result.high
    # An approximate interval: 88 % and more, within 3 standard errors of the simulation.
    assert covered / repeats >= 0.88 - 3 * math.sqrt(0.88 * 0.12 / repeats)


def test_perfect_separation_is_not_certainty():
    scores = np.arange(100.0)
    labels = scores >= 84
    area, precision = auroc(scores, labels), average_precision(scores, labels)
    assert area.value == precision.value == 1
    assert area.high == precision.high == 1
    # 16 of 16 disjoint pairs: Clopper-Pearson's 0.794.
    assert area.low == pytest.approx(0.025 ** (1 / 16), rel=1e-12)
    assert 0.3 < precision.low < 0.9


def test_all_scores_tied():
    scores, labels = np.zeros(40), np.arange(40) < 10
    area, precision = auroc(scores, labels), average_precision(scores, labels)
    assert area.value == 0.5
    assert area.low < 0.3
    assert area.high > 0.7
    assert precision.value == 0.25
    assert precision.low < 0.1 < 0.4 < precision.high
