"""Training further: it ends where a regression on the weighted images ends, and spreads draws."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj
from memjax._core.errors import InputError
from memjax.diffusion.model import Model
from memjax.diffusion.prediction import EDMPreconditioned, from_prediction
from memjax.diffusion.schedule import DiscreteVP, VarianceExploding
from memjax.networks import ResidualMLP
from memjax.training import continue_training, train
from memjax.training._steps import Counted, even_draws, run

SIGMA, D = 0.4, 0.5


class Linear(nn.Module):
    """F = x K + b, or with conditions the b of one: best for data of one noise level."""

    num_conditions: int = 0

    @nn.compact
    def __call__(self, x, t, condition=None):
        out = nn.Dense(x.size, precision="highest", name="map")(x)
        if self.num_conditions:
            table = nn.Embed(self.num_conditions + 1, x.size, name="label")
            out = out + table(jnp.int32(self.num_conditions) if condition is None else condition)
        return out


def linear_model(conditions=0):
    module = Linear(conditions)
    zeros = {"map": {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)}}
    if conditions:
        zeros["label"] = {"embedding": np.zeros((conditions + 1, 2))}
    zeros = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), zeros)
    network = EDMPreconditioned(mj.LinenNetwork(module, {"params": zeros}), D)
    score = from_prediction(network, prediction="denoiser", schedule=VarianceExploding(0.02, 10.0))
    null = jnp.int32(conditions) if conditions else None
    return Model(score, (2,), sigma_min=0.02, sigma_max=10.0, data_std=D, null_condition=null)


IMAGES = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0], [5.0, 5.0]], np.float32)
ONE_LEVEL = {"log_sigma_mean": float(np.log(SIGMA)), "log_sigma_std": 1e-6}


def gaussian_denoiser(points, weights, x):
    """Of the Gaussian with the points' weighted mean and covariance: the best linear one."""
    weights = weights / weights.sum()
    mean = weights @ points
    covariance = (points - mean).T * weights @ (points - mean)
    return mean + covariance @ np.linalg.solve(covariance + SIGMA**2 * np.eye(2), x - mean)


def denoised(model, x, condition=None):
    return x + SIGMA**2 * np.asarray(model(jnp.asarray(x, jnp.float32), SIGMA, condition))


@pytest.mark.parametrize("weights", [(1, 1, 1, 0), (4, 1, 2, 0), (1, 3, 0, 1)])
def test_ends_at_the_regression_on_weighted_images(weights):
    """An image counts as often as it is said to, and one that counts 0 times not at all."""
    model = linear_model()
    found = continue_training(
        model, IMAGES, multiplicity=np.array(weights), steps=4000, batch_size=128,
        learning_rate=3e-3, ema_decay=0.998, **ONE_LEVEL,
    )  # fmt: skip
    moved = []
    for x in np.array([[0.3, -0.7], [1.0, 1.0], [-2.0, 1.0]]):
        expected = gaussian_denoiser(IMAGES.astype(np.float64), np.array(weights, float), x)
        np.testing.assert_allclose(denoised(found, x), expected, atol=0.1)
        moved.append(np.abs(denoised(model, x) - expected).max())
    assert max(moved) > 0.4
    assert found.event_shape == model.event_shape


def test_counting_twice_is_standing_there_twice():
    """Batches that hold a pass are the same set of rows in either case."""
    few = {"steps": 300, "batch_size": 6, "learning_rate": 3e-3, **ONE_LEVEL}
    counted = continue_training(linear_model(), IMAGES[:3], multiplicity=np.array([3, 1, 2]), **few)
    repeated = continue_training(linear_model(), np.repeat(IMAGES[:3], [3, 1, 2], axis=0), **few)
    x = np.array([0.3, -0.7])
    np.testing.assert_allclose(denoised(counted, x), denoised(repeated, x), rtol=1e-6)


def test_conditions_are_kept_apart():
    """Two images at (1, 1) and (-1, -1), linear in x and the condition, both by regression.

    Along (1, 1): s = a (s + 0.4 n / sqrt 2) + b l, where l = s, or 0 in 30 % of the batches.
    """
    model = linear_model(conditions=2)
    images = np.array([[1.0, 1.0], [-1.0, -1.0]], np.float32)
    options = {
        "multiplicity": np.array([32, 32]),
        "steps": 1000,
        "learning_rate": 1e-2,
        "condition_dropout": 0.3,
        **ONE_LEVEL,
    }
    found = continue_training(model, images, conditions=np.array([0, 1]), **options)
    _, b = np.linalg.solve([[1 + SIGMA**2 / 2, 0.7], [0.7, 0.7]], [1, 0.7])
    for condition, end in ((0, b), (1, -b), (2, 0)):
        shown = denoised(found, np.zeros(2), jnp.int32(condition))
        np.testing.assert_allclose(shown, end, atol=0.02)
    again = continue_training(model, images, **options)  # all under the null condition
    np.testing.assert_allclose(denoised(again, np.zeros(2), jnp.int32(0)), 0, atol=0.02)


def test_other_predictions_train_too():
    """A network that predicts noise: its loss falls, the model it came from stays as it is."""

    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            scale = self.variable("constants", "scale", lambda: jnp.float32(1.0))
            return scale.value * nn.Dense(2, kernel_init=nn.initializers.zeros)(x)

    module = Noise()
    variables = module.init(jax.random.key(0), jnp.zeros(2, jnp.float32), jnp.float32(0))
    schedule = DiscreteVP()
    score = from_prediction(
        mj.LinenNetwork(module, variables), prediction="epsilon", schedule=schedule
    )
    model = Model(score, (2,), sigma_min=0.03, sigma_max=10.0, data_std=D)
    losses = []
    found = continue_training(
        model, IMAGES[:3], multiplicity=np.full(3, 40), steps=400, learning_rate=1e-2,
        progress=lambda step, total, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < losses[0]
    after = found.raw_score.network.variables
    assert float(after["constants"]["scale"]) == 1.0
    assert np.abs(after["params"]["Dense_0"]["kernel"]).max() > 0.1
    assert np.abs(variables["params"]["Dense_0"]["kernel"]).max() == 0


def test_deterministic_by_seed():
    images = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    model = train(images, network=ResidualMLP(16, 1, 16), steps=20, batch_size=16)
    found = [continue_training(model, images, steps=20, seed=seed) for seed in (1, 1, 2)]
    first, second, other = (jax.tree.leaves(one) for one in found)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("count", "n"), [(12, 4), (13, 4), (5, 5), (7, 1)])
def test_even_draws_take_every_row_once_a_pass(count, n):
    table = jnp.concatenate([jnp.arange(count) + 100, jnp.full(3, -1)]).astype(jnp.int32)
    key, steps = jax.random.key(3), count // n
    draws = jax.jit(lambda step: even_draws(key, step, Counted(table, jnp.int32(count)), n))
    passes = [[draws(jnp.int32(turn * steps + i)) for i in range(steps)] for turn in range(3)]
    orders = [np.concatenate([rows for rows, _ in one]) for one in passes]
    for order in orders:
        assert len(np.unique(order)) == steps * n
        assert order.min() >= 100
        assert order.max() < 100 + count
    assert count == 1 or not all(np.array_equal(orders[0], order) for order in orders[1:])


def test_even_draws_take_noise_levels_from_equal_parts():
    """One of each part, uniform within, so that all together are normal."""
    counted, n = Counted(jnp.arange(8, dtype=jnp.int32), jnp.int32(8)), 8
    draws = jax.vmap(lambda i: even_draws(jax.random.key(1), i, counted, n)[1])
    normal = np.asarray(draws(jnp.arange(500, dtype=jnp.int32)), np.float64)
    part = np.floor(n * np.asarray(jax.scipy.stats.norm.cdf(normal)))
    np.testing.assert_array_equal(part, np.broadcast_to(np.arange(n), part.shape))
    assert abs(normal.mean()) < 0.01
    assert normal.std() == pytest.approx(1, abs=0.02)
    assert normal.mean(axis=1).std() < 0.5 / np.sqrt(n)  # independent ones: 1 / sqrt(n)


def test_one_program_serves_training_sets_of_about_one_size():
    images = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    model = train(images, network=ResidualMLP(8, 1, 8), steps=2, batch_size=4)
    continue_training(model, images, steps=2, batch_size=4)
    before = run._cache_size()
    continue_training(model, images, multiplicity=np.arange(9), steps=2, batch_size=4)
    assert run._cache_size() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiplicity": np.array([1, 2])}, "multiplicity: expected one per image, 4"),
        ({"multiplicity": np.array([1, -2, 0, 0])}, "multiplicity: expected numbers of at least 0"),
        ({"multiplicity": np.zeros(4, int)}, "multiplicity: expected .* not all 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"conditions": np.zeros(4, int)}, "conditions: expected a model whose conditions"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"ema_decay": 1.0}, "ema_decay: expected 0 <= ema_decay < 1"),
    ],
)
def test_refuses_what_does_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        continue_training(linear_model(), IMAGES, **options)


def test_refuses_images_and_scores_that_do_not_fit():
    with pytest.raises(InputError, match=r"images: expected shape \[n, \*\[2\]\], got \[4, 3\]"):
        continue_training(linear_model(), np.zeros((4, 3), np.float32))
    exact = mj.Gaussian(jnp.zeros(2), 1.0)
    model = Model(exact, (2,), sigma_min=0.1, sigma_max=1.0, data_std=1.0)
    with pytest.raises(InputError, match="model: expected the score of a network, got Gaussian"):
        continue_training(model, IMAGES)
