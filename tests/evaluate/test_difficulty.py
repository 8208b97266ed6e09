import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import memjax.evaluate.difficulty as module
from memjax._core.errors import InputError
from memjax.densities import Gaussian
from memjax.evaluate.conformal import conformal_p_values
from memjax.evaluate.difficulty import LEVELS, excess_over_difficulty, image_difficulty
from memjax.evaluate.roc import auroc


def smooth_images(n, shape=(4, 4, 1), seed=0, dtype=np.float32):
    """Images whose numbers go together, so that some directions hardly vary."""
    rng = np.random.default_rng(seed)
    d = int(np.prod(shape))
    mix = rng.normal(size=(d, d)) * 2.0 ** -np.arange(d)
    return (0.3 + rng.normal(size=(n, d)) @ mix.T).reshape(n, *shape).astype(dtype)


def moves_without(images, row, members):
    """How far the denoiser of a Gaussian fitted to the other members moves an image, by level."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    whole = flat[members]
    std = np.sqrt(np.mean((whole - whole.mean(axis=0)) ** 2))
    rest = flat[[m for m in members if m != row]]
    mean = rest.mean(axis=0)
    # One noise for all rows: that of the population, also where a row is left out.
    per_row = (len(members) - 1) / len(rest)
    covariance = np.cov(rest.T, bias=True)
    density = Gaussian(jnp.asarray(mean), jnp.asarray(covariance))
    out = []
    for level in LEVELS:
        sigma = level * std * np.sqrt(per_row)
        moved = sigma**2 * density(jnp.asarray(flat[row]), sigma)
        out.append(np.log(np.linalg.norm(moved) / np.sqrt(flat.shape[1]) / std))
    return np.array(out)


@pytest.mark.parametrize(("n", "d"), [(70, 6), (60, 90)])
def test_each_image_is_measured_by_a_gaussian_of_the_others(x64, n, d):
    images = smooth_images(n + 5, (d,), dtype=np.float64)
    population = np.arange(n + 5) < n
    found = image_difficulty(images, population)
    np.testing.assert_allclose(found[:, 0], images.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found[:, 1], images.std(axis=1), rtol=1e-12)
    for row in (0, 1, n - 1):
        expected = moves_without(images, row, list(range(n)))
        np.testing.assert_allclose(found[row, 2:], expected, rtol=1e-7, atol=1e-7)
    for row in (n, n + 4):
        expected = moves_without(images, row, list(range(n)))
        # Nothing is left out, and the covariance is that of n rows at n - 1 times the noise.
        flat = images - images[:n].mean(axis=0)
        values, vectors = np.linalg.eigh(flat[:n].T @ flat[:n])
        std = np.sqrt(np.mean(flat[:n] ** 2))
        noise = (n - 1) * np.square(np.array(LEVELS) * std)
        parts = (flat[row] @ vectors) ** 2
        kept = noise[:, None] / (np.maximum(values, 0) + noise[:, None])
        by_hand = 0.5 * np.log((parts * kept**2).sum(axis=1) / d / std**2)
        np.testing.assert_allclose(found[row, 2:], by_hand, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(found[row, 2:], expected, atol=0.05)


def test_images_inside_and_beside_the_population_are_alike():
    """Left out, members look no easier than images drawn like them; without, far easier."""
    images = smooth_images(400, (60,))
    among = np.arange(400) < 80
    found = image_difficulty(images, among)
    spread = found.std(axis=0)[2:]
    gap = (found[~among].mean(axis=0) - found[among].mean(axis=0))[2:]
    assert np.all(np.abs(gap) < 0.4 * spread)


def test_equal_images_count_once_and_are_left_out_together():
    images = smooth_images(60)
    repeated = np.concatenate([images, images[:3], images[:1]])
    found, alone = image_difficulty(repeated), image_difficulty(images)
    np.testing.assert_allclose(found[:60], alone, rtol=1e-10)
    np.testing.assert_array_equal(found[60:], found[[0, 1, 2, 0]])


def test_it_depends_on_the_population_as_a_set_and_not_on_the_scale(monkeypatch):
    images = smooth_images(80)
    found = image_difficulty(images)
    order = np.random.default_rng(1).permutation(80)
    np.testing.assert_allclose(image_difficulty(images[order]), found[order], rtol=1e-9)
    scaled = image_difficulty(4 * images - 1)
    np.testing.assert_allclose(scaled[:, 2:], found[:, 2:], atol=1e-5)
    monkeypatch.setattr(module, "_CHUNK", 40)
    np.testing.assert_allclose(image_difficulty(images), found, rtol=1e-9)


def test_large_images_take_the_gaussian_of_some(monkeypatch):
    images = smooth_images(100, (30,))
    population = np.arange(100) < 90
    monkeypatch.setattr(module, "_MOST_NUMBERS", 20)
    monkeypatch.setattr(module, "_ENTRIES", 60 * 30)
    found = image_difficulty(images, population)
    chosen = np.zeros(100, bool)
    chosen[np.linspace(0, 89, 50).astype(int)] = True
    monkeypatch.undo()
    np.testing.assert_allclose(found, image_difficulty(images, chosen), rtol=1e-7, atol=1e-7)


def test_what_cannot_be_measured_is_said():
    images = smooth_images(60)
    images[3, 0, 0, 0] = np.nan
    found = image_difficulty(images)
    assert np.isnan(found[3]).all()
    np.testing.assert_allclose(np.delete(found, 3, 0), image_difficulty(np.delete(images, 3, 0)))
    with pytest.raises(InputError, match="at least 50 distinct finite images, found 49"):
        image_difficulty(images, np.arange(60) < 50)
    with pytest.raises(InputError, match="at least 50 distinct finite images, found 1"):
        image_difficulty(np.ones((60, 4, 4, 1), np.float32))
    nearly = np.ones((60, 16)) + 1e-15 * np.arange(60)[:, None]
    with pytest.raises(InputError, match="images that differ"):
        image_difficulty(nearly)
    with pytest.raises(InputError, match="at least 50 rows of the population with a score"):
        excess_over_difficulty(np.full(60, np.nan), np.ones((60, 1)))


def test_the_regression_is_hubers_then_tukeys(x64):
    rng = np.random.default_rng(2)
    difficulty = rng.normal(size=(120, 2))
    value = difficulty @ [0.5, -0.2] + 0.1 * rng.normal(size=120)
    value[:9] += rng.uniform(1, 3, 9)
    found = excess_over_difficulty(value, difficulty)
    z = (difficulty - difficulty.mean(axis=0)) / difficulty.std(axis=0)
    z = np.concatenate([z, z**2], axis=1)
    z = (z - z.mean(axis=0)) / z.std(axis=0)

    def minimum(loss, start):
        def whole(parameters):
            penalty = 0.01 * len(value) * np.sum(parameters[1:] ** 2)
            return loss(np.abs(value - parameters[0] - z @ parameters[1:])).sum() + penalty

        return minimize(whole, start, tol=1e-12, method="BFGS").x

    def huber(threshold):
        return lambda r: np.where(r < threshold, r**2 / 2, threshold * (r - threshold / 2))

    def tukey(threshold):
        return lambda r: threshold**2 / 6 * (1 - np.maximum(1 - (r / threshold) ** 2, 0) ** 3)

    # The scale is where Huber's threshold is the robust deviation of the residuals that it leaves.
    spread, at = 1.0, np.zeros(5)
    for _ in range(60):
        at = minimum(huber(spread), at)
        spread = 1.4826 * np.median(np.abs(value - at[0] - z @ at[1:]))
    at = minimum(tukey(4.685 * spread), at)
    np.testing.assert_allclose(found, value - at[0] - z @ at[1:], atol=1e-5)


def test_what_is_memorized_and_unlike_all_others_stands_out():
    """Outliers in difficulty bend a fit that only bounds what each of them weighs."""
    rng = np.random.default_rng(5)
    difficulty = rng.normal(size=(100, 1))
    difficulty[:6] += 8
    planted = np.arange(100) < 6
    value = 0.3 * difficulty[:, 0] + 0.1 * rng.normal(size=100) + 60 * planted
    found = excess_over_difficulty(value, difficulty)
    assert found[planted].min() > 10 * np.abs(found[~planted]).max()


@pytest.mark.parametrize("count", [30, 100])
def test_what_difficulty_explains_is_gone_and_what_is_planted_stays(count):
    rng = np.random.default_rng(3)
    difficulty = rng.normal(size=(300, 3))
    usual = 2 + difficulty[:, 0] - 0.3 * difficulty[:, 1] ** 2
    planted = np.arange(300) < count
    value = usual + 0.05 * rng.normal(size=300) + 0.3 * planted
    found = excess_over_difficulty(value, difficulty)
    assert auroc(value, planted).value < 0.7
    assert auroc(found, planted).value > 0.99
    shifted = excess_over_difficulty(10 * value + 5, difficulty)
    np.testing.assert_allclose(shifted, 10 * found, atol=1e-6)


def test_a_constant_column_or_score_says_nothing():
    rng = np.random.default_rng(4)
    value, difficulty = rng.normal(size=60), rng.normal(size=(60, 1))
    padded = np.concatenate([difficulty, np.ones((60, 1))], axis=1)
    np.testing.assert_array_equal(
        excess_over_difficulty(value, padded), excess_over_difficulty(value, difficulty)
    )
    np.testing.assert_array_equal(excess_over_difficulty(np.ones(60), difficulty), np.zeros(60))
    mostly = np.where(np.arange(60) < 5, 1.0, 0.0)
    found = excess_over_difficulty(mostly, difficulty)
    assert np.isfinite(found).all()
    assert set(np.argsort(found)[-5:]) == set(range(5))


def test_p_values_stay_valid():
    """Rows that are exchangeable before are so after, if all of them are in the population."""
    small = 0
    repeats, n = 400, 60
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        images = rng.normal(size=(n, 8)) * rng.uniform(0.2, 2, (n, 1))
        difficulty = image_difficulty(images)
        value = difficulty[:, 3] + rng.standard_t(2, n)
        found = excess_over_difficulty(value, difficulty)
        small += np.sum(conformal_p_values(found[:20], found[20:]) <= 0.1)
    rate = small / (20 * repeats)
    # 4/41 on the grid; the standard error of the mean of correlated p-values is below 0.006.
    assert abs(rate - 4 / 41) < 0.02


def test_stored_points_of_an_exact_world_stay_first(x64):
    """The excess of an exact score finds what the score itself finds."""
    from memjax.densities.planted import planted_mixture
    from memjax.detect import PLaplaceFlux, evaluate_detectors

    world = planted_mixture(jax.random.key(0), 8, num_stored=10, num_ordinary=190)
    detector = (PLaplaceFlux(0.05),)

    @jax.jit
    def values(points):
        key = jax.random.key(1)
        return jax.vmap(lambda x: evaluate_detectors(world.density, x, detector, key=key)[0].value)(
            points
        )

    value = np.asarray(values(world.points))
    found = excess_over_difficulty(value, image_difficulty(np.asarray(world.points)))
    assert auroc(found, np.asarray(world.stored)).value == 1.0
