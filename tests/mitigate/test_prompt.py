"""The prompt's embedding: AdamW transcribed, what may move, and what stays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.model import Model
from memjax.mitigate import embed_conditions, optimize_prompts
from memjax.networks.mlp import ResidualMLP

D, W, SIGMA = 4, 3, 5.0
FACTS = {"sigma_min": 0.01, "sigma_max": SIGMA, "data_std": 1.0}


class Linear(eqx.Module):
    """s = (A c - x) / (1 + sigma^2): the gap is that of the conditions, whatever the noise."""

    matrix: Array

    def __call__(self, x, sigma, condition):
        return (self.matrix @ condition - x) / (1 + sigma**2)


def linear(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(D, W)), dtype)
    model = Model(Linear(matrix), (D,), null_condition=jnp.zeros(W, dtype), **FACTS)
    return model, jnp.asarray(2 * rng.normal(size=(3, W)), dtype)


def losses(model, conditions):
    matrix = np.asarray(model.raw_score.matrix)
    return SIGMA / (1 + SIGMA**2) * np.linalg.norm(np.asarray(conditions) @ matrix.T, axis=-1)


def test_steps_are_those_of_adamw(x64):
    """Against the optimizer written out, prompt by prompt, until each one's own stop."""
    model, conditions = linear(jnp.float64)
    target = 0.6 * losses(model, conditions).min()
    found = optimize_prompts(model, key=0, conditions=conditions, target=target, num_steps=200)
    matrix = np.asarray(model.raw_score.matrix)
    for row in range(3):
        c = np.asarray(conditions[row])
        m, v, steps = np.zeros(W), np.zeros(W), 0
        while losses(model, c) > target and steps < 200:
            drawn = matrix @ c
            g = SIGMA / (1 + SIGMA**2) * matrix.T @ drawn / np.linalg.norm(drawn)
            steps += 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            update = (m / (1 - 0.9**steps)) / (np.sqrt(v / (1 - 0.999**steps)) + 1e-8)
            c = c - 0.05 * (update + 0.01 * c)
        assert found.steps[row] == steps > 3
        np.testing.assert_allclose(found.conditions[row], c, rtol=1e-6)
    np.testing.assert_allclose(found.before, losses(model, conditions), rtol=1e-9)
    np.testing.assert_allclose(found.after, losses(model, found.conditions), rtol=1e-9)
    assert (found.status == Status.OK).all()
    assert (found.after <= target).all()


def test_the_steps_end_and_it_is_said():
    model, conditions = linear()
    found = optimize_prompts(model, key=0, conditions=conditions, target=1e-4, num_steps=2)
    assert (found.status == Status.NOT_CONVERGED).all()
    assert (found.after < found.before).all()
    alone = optimize_prompts(model, key=0, conditions=conditions[1:2], target=1e-4, num_steps=2)
    np.testing.assert_allclose(alone.conditions[0], found.conditions[1], rtol=1e-6)
    done = optimize_prompts(model, key=0, conditions=conditions, target=1e4)
    np.testing.assert_array_equal(done.conditions, conditions)
    assert (done.steps == 0).all()


def test_what_must_not_move_does_not():
    """The first number and everything that is no floating-point array."""
    matrix = jnp.asarray(np.random.default_rng(1).normal(size=(D, W)), jnp.float32)

    def score(x, sigma, condition):
        return (matrix @ condition["vector"] - x) / (1 + sigma**2)

    null = {"vector": jnp.zeros(W, jnp.float32), "length": jnp.int32(0)}
    model = Model(score, (D,), null_condition=null, **FACTS)
    conditions = {
        "vector": jnp.ones((2, W), jnp.float32),
        "length": jnp.asarray([1, 2], jnp.int32),
    }
    mask = {"vector": jnp.asarray([0.0, 1.0, 1.0]), "length": None}
    found = optimize_prompts(model, key=0, conditions=conditions, target=1e-3, trainable=mask)
    moved = np.asarray(found.conditions["vector"]) != 1
    np.testing.assert_array_equal(moved, [[False, True, True]] * 2)
    np.testing.assert_array_equal(found.conditions["length"], [1, 2])


@pytest.mark.parametrize("count", [1, 8])
def test_a_target_does_not_depend_on_the_number_of_noises(count):
    model, conditions = linear()
    found = optimize_prompts(
        model, key=0, conditions=conditions, target=1e4, num_noises=count, num_steps=0
    )
    np.testing.assert_allclose(found.before, losses(model, conditions), rtol=1e-5)


def test_not_finite_is_said():
    model, conditions = linear()
    found = optimize_prompts(
        model, key=0, conditions=conditions.at[1, 0].set(jnp.nan), target=0.01, num_steps=3
    )
    assert list(found.status == Status.NONFINITE) == [False, True, False]


def test_cost_is_counted(counting):
    score = counting(lambda x, sigma, condition: (condition.sum() - x) / (1 + sigma**2))
    model = Model(score, (D,), null_condition=jnp.zeros(W, jnp.float32), **FACTS)
    found = optimize_prompts(
        model, key=0, conditions=jnp.ones((1, W), jnp.float32), target=1e-6, num_steps=3
    )
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert score.calls == found.cost.forward[0] == 4 + 4 * 4
    assert found.cost.vjp[0] == 4 * 4


@pytest.fixture(scope="module")
def network():
    module = ResidualMLP(width=8, num_blocks=1, embedding_width=6, num_conditions=3)
    x, t = jnp.zeros(D, jnp.float32), jnp.zeros((), jnp.float32)
    variables = module.init(jax.random.key(0), x, t)
    # The last layer starts at zero, which would hide the condition.
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    return Model(LinenNetwork(module, variables), (D,), null_condition=jnp.int32(3), **FACTS)


def test_vectors_say_what_indices_said(network):
    indices = jnp.arange(3, dtype=jnp.int32)
    embedded, vectors = embed_conditions(network, indices)
    assert vectors.shape == (3, 6)
    x = jnp.linspace(-1, 1, D, dtype=jnp.float32)
    sigma = jnp.float32(0.5)
    for index, vector in zip(indices, vectors, strict=True):
        np.testing.assert_array_equal(network(x, sigma, index), embedded(x, sigma, vector))
    np.testing.assert_array_equal(network(x, sigma), embedded(x, sigma))
    assert not np.array_equal(embedded(x, sigma, vectors[0]), embedded(x, sigma, vectors[1]))


def test_other_prompts_stay(network):
    embedded, vectors = embed_conditions(network, jnp.arange(3, dtype=jnp.int32))
    found = optimize_prompts(
        embedded, key=0, conditions=vectors[:1], target=1e-6, num_steps=5, learning_rate=1e-3
    )
    assert found.after[0] < found.before[0]
    again, same = embed_conditions(network, jnp.arange(3, dtype=jnp.int32))
    np.testing.assert_array_equal(same, vectors)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(embedded), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bad_input(network):
    model, conditions = linear()
    with pytest.raises(InputError, match="model: expected a network with a table of conditions"):
        embed_conditions(model, jnp.zeros(1, jnp.int32))
    for wrong, message in (
        ({"target": 0.0}, "target: expected a positive"),
        ({"num_noises": 0}, "num_noises: expected"),
        ({"learning_rate": -1.0}, "learning_rate: expected a positive"),
        ({"conditions": jnp.zeros(2, jnp.int32)}, "conditions: expected floating-point arrays"),
    ):
        with pytest.raises(InputError, match=message):
            optimize_prompts(
                network, **({"key": 0, "conditions": conditions, "target": 0.1} | wrong)
            )
