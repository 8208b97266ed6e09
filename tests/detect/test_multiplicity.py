"""Multiplicities: exact where a model answers as supposed, right on digits, failures kept apart."""

import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.detect import multiplicity as module
from memjax.detect.denoising_loss import DenoisingLoss
from memjax.detect.difficulty import below_ceiling
from memjax.detect.multiplicity import _estimates, _observation, estimate_multiplicity
from memjax.detect.p_laplace import PLaplaceFlux
from memjax.diffusion.model import Model
from memjax.evaluate.difficulty import image_difficulty
from memjax.evaluate.roc import auroc
from memjax.training.testbeds import graded_testbed


class Answering:
    """A model that shows of every image l = ease + slope log(times in training), plus noise."""

    def __init__(self, truth, ease, slope, noise):
        self.truth, self.ease, self.slope, self.noise = truth, ease, slope, noise
        self.asked = []

    def install(self, monkeypatch):
        def retrained(model, images, *, multiplicity, seed, steps, **_):
            self.asked.append((multiplicity, seed, steps))
            return some_model()

        def values(which, images, conditions, key, detectors, chunk_size):
            rerun = len(self.asked)
            log_m, log_w = (
                np.log(np.maximum(times, 0.3))
                for times in (self.truth, self.asked[-1][0] if rerun else self.truth)
            )
            lost = self.slope * (log_m - log_w)
            random = np.random.default_rng(rerun).normal(size=len(log_m))
            shown = self.ease + self.slope * log_m - lost + self.noise * random
            return np.repeat(1 - np.exp(-shown)[:, None], len(detectors), axis=1)

        monkeypatch.setattr(module, "continue_training", retrained)
        monkeypatch.setattr(module, "_values", values)


def some_model(data_std=1.0):
    exact = mj.Gaussian(jnp.zeros(3), 1.0)
    return Model(exact, (3,), sigma_min=0.05, sigma_max=10.0, data_std=data_std)


def images_of(n):
    return np.random.default_rng(5).normal(size=(n, 3)).astype(np.float32)


def count(images, **options):
    """In several rounds and runs, with the slope of the models above."""
    options = {"rounds": 2, "runs": 4, "slope": 3.0} | options
    return estimate_multiplicity(some_model(), images, **options)


@pytest.fixture
def alone(monkeypatch):
    """Nothing is known before the first run."""
    monkeypatch.setattr(module, "_difficulty", lambda images: None)


TRUTH = np.repeat([0, 1, 2, 4, 8, 32], [15, 120, 20, 10, 10, 5])


def test_recovers_planted_multiplicities_whatever_the_images_difficulty(monkeypatch):
    random = np.random.default_rng(0)
    ease = random.normal(3, 1, len(TRUTH))
    Answering(TRUTH, ease, np.full(len(TRUTH), 1 / 3), 0.0).install(monkeypatch)
    found = count(images_of(len(TRUTH)))
    np.testing.assert_allclose(found.multiplicity[TRUTH > 0], TRUTH[TRUTH > 0], rtol=1e-6)
    np.testing.assert_allclose(found.multiplicity[TRUTH == 0], 0.3, rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-9)
    assert (found.status == Status.OK).all()
    assert set(found.held_at[TRUTH == 0]) == {0}
    assert set(found.held_at[(TRUTH == 1) | (TRUTH == 2)]) == {1}


def test_images_with_slopes_of_their_own_are_not_thrown_off(monkeypatch, alone):
    """A slope 2.5 times the usual one makes 1 + 2 rounds of the usual one overshoot its image."""
    slope = np.random.default_rng(1).uniform(0.25, 0.8, len(TRUTH))
    Answering(TRUTH, np.zeros(len(TRUTH)), slope, 0.02).install(monkeypatch)
    found = count(images_of(len(TRUTH)))
    many = TRUTH >= 4
    np.testing.assert_allclose(np.log(found.multiplicity[many] / TRUTH[many]), 0, atol=0.35)
    assert auroc(found.value[TRUTH > 0], TRUTH[TRUTH > 0] > 1).value > 0.999


@pytest.mark.parametrize("runs", [1, 4, 9])
def test_of_images_seen_once_the_standard_error_tells_how_far_they_lie(monkeypatch, alone, runs):
    """Slope times the noise of the model and of the runs' mean; 5 of 100 beyond 1.96, or fewer."""
    truth, noise = np.ones(4000, int), 0.03
    Answering(truth, np.zeros(4000), np.full(4000, 1 / 3), noise).install(monkeypatch)
    found = count(images_of(4000), runs=runs)
    expected = 3 * noise * np.sqrt(1 + 1 / runs)
    assert found.standard_error.min() == pytest.approx(expected, rel=0.1)
    assert 0.02 < np.mean(np.abs(found.value) > 1.96 * found.standard_error) < 0.065


def test_before_any_training_images_are_compared_with_those_as_difficult(monkeypatch):
    """What difficulty explains counts once; the first run starts from what stands out."""
    images = images_of(400)
    difficulty = image_difficulty(images)
    truth = np.where(np.arange(400) < 12, 8, 1)
    excess = np.interp(np.log(truth), module._AT_REST[1], module._AT_REST[0])
    ease = excess - np.log(truth) / 3 + 0.5 * difficulty[:, 3] + 2
    world = Answering(truth, ease, np.full(400, 1 / 3), 0.01)
    world.install(monkeypatch)
    found = count(images, rounds=0, runs=1)
    first = world.asked[0][0]
    np.testing.assert_allclose(first, truth, atol=1)
    np.testing.assert_allclose(found.multiplicity, truth, rtol=0.2)
    before = module._from_difficulty(0.5 * difficulty[:, 3] + excess, difficulty)
    assert before is not None
    np.testing.assert_allclose(before, np.log(truth), atol=0.1)
    assert module._difficulty(images[:49]) is None
    few = np.where(np.arange(400) < 49, 1.0, np.nan)
    assert module._from_difficulty(few, difficulty) is None


def test_changes_are_those_of_images_as_difficult_and_as_uncertain():
    """Mean and scatter that follow the difficulty are taken out, where images count once."""
    images = images_of(3000)
    difficulty = image_difficulty(images)
    random = np.random.default_rng(6)
    w = np.where(np.arange(3000) < 100, 5, 1)
    z = random.normal(size=3000)
    size = 0.1 * np.exp(0.3 * (difficulty[:, 4] - difficulty[:, 4].mean()))
    change = 0.2 * difficulty[:, 2] + size * z + (w > 1)
    loss = _observation(w, change, difficulty).loss
    once = w == 1
    assert abs(np.corrcoef(loss[once], difficulty[once, 2])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.abs(loss[once]), difficulty[once, 4])[0, 1]) < 0.05
    assert np.corrcoef(loss[once], z[once])[0, 1] > 0.99
    np.testing.assert_allclose(np.median(loss[~once]), 1, rtol=0.2)
    exact = _observation(w, 0.2 * difficulty[:, 2] + (w > 1), difficulty).loss
    assert np.isfinite(exact).all()


def test_two_estimates_are_averaged_by_their_precision():
    random = np.random.default_rng(4)
    w = np.where(np.arange(5000) < 4900, 1, 7)
    after, before = (np.where(w == 1, s * random.normal(size=5000), s) for s in (0.1, 0.3))
    found = module._together(after, before, w)
    np.testing.assert_allclose(found, 0.9 * after + 0.1 * before, atol=0.02)
    assert module._together(after, None, w) is after
    exact = module._together(np.where(w == 1, 0.0, 2.0), before, w)
    np.testing.assert_allclose(exact[w == 7], 2.0, atol=1e-6)


def test_slopes_follow_the_observations_where_these_say_more():
    """Against ridge regression by NumPy, with the slope's prior as one more row."""
    random = np.random.default_rng(2)
    log_w, loss = random.normal(size=(4, 6)), 0.2 * random.normal(size=(4, 6))
    observed = [module._Observation(x, y) for x, y in zip(log_w, loss, strict=True)]
    usual, prior = 1 / 3, module._NOISE / (module._SPREAD / 3)
    for image, (x, y) in enumerate(zip(log_w.T, loss.T, strict=True)):
        rows = np.append(-(x - x.mean()), prior), np.append(y, prior * usual)
        b = max(rows[0] @ rows[1] / (rows[0] @ rows[0]), usual / 4)
        expected = x + y / b
        found = [estimate[image] for estimate in _estimates(observed, 3.0)]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_what_lies_beyond_all_observations_is_not_made_up(monkeypatch):
    """An image that loses as much however often it counts: the estimate ends at 128."""
    truth = np.where(np.arange(40) == 7, 10**6, 1)
    Answering(truth, np.zeros(40), np.full(40, 1 / 3), 0.0).install(monkeypatch)
    found = count(images_of(40))
    np.testing.assert_allclose(found.multiplicity, np.minimum(truth, 128), rtol=1e-6)


def test_the_typical_image_counts_once():
    seen = _observation(np.array([1, 1, 1, 5, 0]), np.array([0.1, 0.2, 0.9, 7.0, np.nan]), None)
    np.testing.assert_allclose(seen.loss, [-0.1, 0, 0.7, 6.8, np.nan])
    np.testing.assert_allclose(np.exp(seen.log_w), [1, 1, 1, 5, 0.3])


def test_equal_and_broken_rows(monkeypatch):
    """Equal images share an estimate and are trained on once; one that is not finite has none."""
    images = images_of(6)
    images[4], images[2] = images[1], np.nan
    truth = np.array([1, 8, 1, 1])  # of rows 0, 1, 3, 5
    world = Answering(truth, np.zeros(4), np.full(4, 1 / 3), 0.0)
    world.install(monkeypatch)
    found = count(images)
    np.testing.assert_allclose(found.multiplicity, [1, 8, np.nan, 1, 8, 1], rtol=1e-6)
    assert found.status.tolist() == [0, 0, Status.NONFINITE, 0, 0, 0]
    assert found.held_at.tolist() == [1, 8, 0, 1, 8, 1]
    assert [len(w) for w, _, _ in world.asked] == [4] * 6
    assert len({seed for _, seed, _ in world.asked}) == 6


def test_equal_images_under_other_conditions_are_others(monkeypatch):
    images = np.repeat(images_of(2), 2, axis=0)
    world = Answering(np.array([1, 4, 1]), np.zeros(3), np.full(3, 1 / 3), 0.0)
    world.install(monkeypatch)
    found = count(images, conditions=np.array([0, 1, 0, 0]))
    np.testing.assert_allclose(found.multiplicity, [1, 4, 1, 1], rtol=1e-6)


def test_a_row_whose_score_fails_has_no_estimate_and_moves_no_other(monkeypatch):
    truth = np.array([1, 1, 4, 1, 1])
    ease = np.array([0.0, 0, 0, np.nan, 0])
    Answering(truth, ease, np.full(5, 1 / 3), 0.0).install(monkeypatch)
    found = count(images_of(5))
    np.testing.assert_allclose(found.multiplicity, [1, 1, 4, np.nan, 1], rtol=1e-6)
    assert found.status.tolist() == [0, 0, 0, Status.NONFINITE, 0]


def test_cost_counts_training_and_evaluations(monkeypatch):
    world = Answering(np.ones(50, int), np.zeros(50), np.full(50, 1 / 3), 0.0)
    world.install(monkeypatch)
    found = estimate_multiplicity(
        some_model(), images_of(50), rounds=1, runs=2, steps=30, batch_size=10
    )
    trained = 3 * 30 * 10 / 50  # each image, forward and backward
    assert found.cost == (4 * 2 * 2 * module.NUM_PAIRS + trained, 0, trained)
    assert [steps for _, _, steps in world.asked] == [30] * 3


def test_passes_set_the_steps(monkeypatch):
    world = Answering(np.ones(50, int), np.zeros(50), np.full(50, 1 / 3), 0.0)
    world.install(monkeypatch)
    estimate_multiplicity(some_model(), images_of(50), rounds=0, runs=1, batch_size=10)
    assert world.asked[0][2] == module.PASSES * 5


def test_values_below_a_ceiling_by_their_shortfall():
    value, error = np.array([0.5, 1.0, 2.0]), np.array([0.1, 0.1, 0.1])
    flux = PLaplaceFlux(0.1)
    found, spread = below_ceiling(flux, value, error)
    assert found[0] == pytest.approx(np.log(2))
    assert spread[0] == pytest.approx(0.2)
    assert np.isfinite(found).all()  # at the ceiling and, by rounding, above it
    np.testing.assert_array_equal(below_ceiling(PLaplaceFlux(0.1, p=2), value, error)[0], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": 0}, "runs: expected a whole number at least 1"),
        ({"rounds": -1}, "rounds: expected a whole number at least 0"),
        ({"slope": 0.0}, "slope: expected a positive finite number"),
        ({"detectors": ()}, "detectors: expected some that look at one model, got none"),
        (
            {"detectors": (mj.detect.Difference(DenoisingLoss(0.1)),)},
            "detectors: expected some that look at one model, got denoising_loss_over_baseline",
        ),
        ({"conditions": np.zeros(3, int)}, "conditions: expected one per image, 5"),
    ],
)
def test_refuses_what_does_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        estimate_multiplicity(some_model(), images_of(5), **options)


def test_refuses_training_that_does_not_stay_finite(monkeypatch):
    world = Answering(np.ones(5, int), np.zeros(5), np.full(5, 1 / 3), 0.0)
    world.install(monkeypatch)
    shown = module._values
    monkeypatch.setattr(
        module, "_values", lambda *given: shown(*given) * (np.nan if world.asked else 1)
    )
    with pytest.raises(InputError, match=r"learning_rate: expected one with which .* got 9"):
        estimate_multiplicity(some_model(), images_of(5), learning_rate=9.0)


def test_refuses_one_image():
    with pytest.raises(InputError, match="images: expected at least 2 different finite ones"):
        estimate_multiplicity(some_model(), np.ones((4, 3), np.float32))


@pytest.mark.slow
def test_digits_that_stand_twice_are_told_from_those_seen_once():
    """The test bed of the first audit, with a hundred products an image."""
    found = graded_testbed(0)
    m = found.bed.multiplicity
    trained = np.flatnonzero(m > 0)
    m = m[trained]
    estimate = estimate_multiplicity(found.model, found.bed.images[trained])
    assert (estimate.status == Status.OK).all()
    assert estimate.cost.total == 100
    for times, least in ((2, 0.97), (4, 0.999)):
        asked = (m == times) | (m == 1)
        assert auroc(estimate.value[asked], m[asked] == times).value > least
    medians = [np.median(estimate.multiplicity[m == k]) for k in (1, 2, 4, 8)]
    assert medians[0] == pytest.approx(1, abs=0.1)
    assert medians == sorted(medians)
    assert 1.2 < medians[1] < 2.5
