"""Changes of the training set: exactly which rows, and what an oracle and chance are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.diffusion.model import Model
from memjax.mitigate import Fitted, fitted_model, heldout_loss, mitigate_data, retrain, shift

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(60, 4, 4, 1)).astype(np.float32)
MULTIPLICITY = np.ones(60, np.int32)
MULTIPLICITY[:8] = 10
MULTIPLICITY[50:] = 0


class Storing:
    """In place of a training: what stands twice or more is stored, the rest is learned."""

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        self.seen.append(images)
        _, inverse, count = np.unique(
            images.reshape(len(images), -1), axis=0, return_inverse=True, return_counts=True
        )
        rng = np.random.default_rng(len(self.seen))
        rows = rng.integers(len(images), size=400)
        width = np.where(count[inverse.ravel()][rows] > 1, 0.01, 1.0)
        noise = rng.normal(size=(400, *images.shape[1:])) * width[:, None, None, None]
        return Fitted((images[rows] + noise).astype(np.float32), 1 / len(images))


@pytest.mark.parametrize("action", ["drop", "deduplicate", "augment"])
def test_an_oracle_stops_copies_and_chance_does_not(action):
    fit = Storing()
    ranking = MULTIPLICITY + RNG.random(60)
    found = mitigate_data(
        IMAGES, MULTIPLICITY, ranking, fit, num_images=8, action=action, num_random=2
    )
    assert sorted(found.chosen) == list(range(8))
    assert found.before.copies > 0.5
    assert found.after.copies < 0.05 * found.before.copies
    assert all(r.copies > 0.25 * found.before.copies for r in found.random)
    changed = {"drop": 80, "deduplicate": 72, "augment": 72}[action]
    assert found.before.changed == 0
    assert {found.after.changed, *(r.changed for r in found.random)} == {changed}
    left = 122 if action == "augment" else 122 - changed
    assert [len(rows) for rows in fit.seen] == [122, left, left, left]
    assert found.after.rows == left
    assert found.after.heldout_loss == 1 / left
    assert found.before.copied == 8


def test_rows_are_exactly_those():
    """The chosen one is the largest finite value among training images."""
    fit = Storing()
    ranking = np.linspace(0, 1, 60)
    ranking[3] = 5.0
    ranking[40] = np.nan
    ranking[55] = 9.0  # held out
    before = Fitted(IMAGES[:4], 0.5)
    options = {"num_images": 1, "num_random": 0, "before": before}
    for action in ("drop", "deduplicate", "augment"):
        found = mitigate_data(IMAGES, MULTIPLICITY, ranking, fit, action=action, **options)
        assert list(found.chosen) == [3]
        assert found.before == (122, 0, 1.0, 4, 0.5)
    rows = np.repeat(np.arange(60), MULTIPLICITY)
    drop, once, augmented = fit.seen
    np.testing.assert_array_equal(drop, IMAGES[rows[rows != 3]])
    keep = np.append(np.flatnonzero(rows != 3), np.flatnonzero(rows == 3)[0])
    np.testing.assert_array_equal(once, IMAGES[rows[np.sort(keep)]])
    same = (augmented == IMAGES[rows]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(~same), np.flatnonzero(rows == 3)[1:])
    assert len(augmented[~same]) == 9
    for version in augmented[~same]:
        inside = np.pad(IMAGES[3], ((1, 1), (1, 1), (0, 0)), mode="edge")
        views = [inside[i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
        assert any(np.array_equal(version, view) for view in views)


def test_same_seed_same_random_rows():
    first, second, other = Storing(), Storing(), Storing()
    ranking = MULTIPLICITY.astype(float)
    before = Fitted(IMAGES[:4], 0.5)
    for fit, seed in ((first, 1), (second, 1), (other, 2)):
        mitigate_data(IMAGES, MULTIPLICITY, ranking, fit, num_images=8, seed=seed, before=before)
    np.testing.assert_array_equal(first.seen[1], second.seen[1])
    assert not np.array_equal(first.seen[1], other.seen[1])


def test_shift_moves_every_image_by_one_pixel():
    ramp = np.arange(36.0, dtype=np.float32).reshape(1, 6, 6, 1)
    moved = shift(np.repeat(ramp, 80, axis=0), np.random.default_rng(0))
    steps = np.unique(moved[:, 2, 2, 0] - ramp[0, 2, 2, 0])
    np.testing.assert_array_equal(steps, [-7, -6, -5, -1, 1, 5, 6, 7])


def gaussian(variance, shape=(4, 4, 1)):
    def score(x, sigma, condition=None):
        return -x / (variance + sigma**2)

    return Model(score, shape, sigma_min=0.01, sigma_max=20.0, data_std=variance**0.5)


def test_heldout_loss_of_an_exact_score():
    """E |sigma s + n|^2 / d = v / (v + sigma^2), averaged over the levels."""
    v, sigmas = 0.5, (0.1, 0.7, 2.0)
    images = v**0.5 * jax.random.normal(jax.random.key(0), (400, 4, 4, 1), jnp.float32)
    found = float(heldout_loss(gaussian(v), images, sigmas=sigmas, num_draws=4))
    expected = np.mean([v / (v + s**2) for s in sigmas])
    # Images and noises are random: 4,800 losses of 16 coordinates, squares of a normal each.
    assert abs(found - expected) < 4 * expected * np.sqrt(2 / (400 * 16))
    fitted = fitted_model(gaussian(v), np.asarray(images), num_samples=300)
    assert fitted.samples.shape == (300, 4, 4, 1)
    assert abs(fitted.samples.var() / v - 1) < 0.1
    wrong = float(heldout_loss(gaussian(2 * v), images, sigmas=sigmas, num_draws=4))
    assert wrong > found


@pytest.mark.slow
def test_retraining_is_a_fit():
    images = IMAGES[:40]
    fit = retrain(IMAGES[50:], num_samples=32, steps=100, seed=1)
    first, again = fit(images), fit(images)
    np.testing.assert_array_equal(first.samples, again.samples)
    assert first.samples.shape == (32, 4, 4, 1)
    assert 0 < first.heldout_loss < 2


def test_bad_input():
    def fit(images):
        return Fitted(images, 0.0)

    good = {"images": IMAGES, "multiplicity": MULTIPLICITY, "ranking": np.ones(60), "fit": fit}
    for wrong, message in (
        ({"multiplicity": -MULTIPLICITY}, "multiplicity: expected numbers of at least 0"),
        ({"num_images": 51}, "num_images: expected a whole number from 1 to 50"),
        ({"num_images": 50, "action": "drop"}, "num_images: expected some images to be left"),
        ({"num_random": -1}, "num_random: expected"),
    ):
        with pytest.raises(InputError, match=message):
            mitigate_data(**({**good, "num_images": 1} | wrong))
