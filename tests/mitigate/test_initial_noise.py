"""SAIL: where it arrives, what it returns, what it cannot do twice."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.densities import ConditionalMixture
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import sample
from memjax.mitigate import NoiseObjective, judge_noises, sail

D, SIGMA = 6, 10.0
FACTS = {"sigma_min": 0.01, "sigma_max": SIGMA, "data_std": 1.0}


def world():
    """Condition 0 fills 9 of 10 rows with one image; condition 1 knows no other image at all."""
    rng = np.random.default_rng(2)
    means = rng.normal(size=(4, D))
    covariances = np.array([1e-4, 1e-2, 1e-4, 1.0])[:, None, None] * np.eye(D)
    means[3] = 0
    mixture = ConditionalMixture(
        [0.18, 0.02, 0.2, 0.6],
        jnp.asarray(means, jnp.float32),
        jnp.asarray(covariances, jnp.float32),
        [0, 0, 1, 2],
    )
    return Model(mixture, (D,), **FACTS), means


PULL = NoiseObjective("pull", sigma=1.5)
SEARCH = {"threshold": 0.6, "objective": PULL, "num_parallel": 4, "max_candidates": 40}
CONDITIONS = jnp.asarray([0, 1], jnp.int32)


@pytest.fixture(scope="module")
def found():
    return sail(world()[0], 8, key=3, conditions=CONDITIONS, **SEARCH)


def test_noises_avoid_the_image_that_fills_the_prompt(found):
    model, means = world()
    flat = found.noises[0]
    drawn = np.asarray(sample(model, 8, noises=flat, conditions=jnp.zeros(8, jnp.int32)))
    plain = np.asarray(sample(model, 60, key=0, conditions=jnp.zeros(60, jnp.int32)))
    near = [np.linalg.norm(x - means[0], axis=1) < 0.5 for x in (drawn, plain)]
    assert found.accepted[0].all()
    assert found.status[0] == Status.OK
    assert near[0].mean() <= 0.125
    assert near[1].mean() > 0.7


def test_a_prompt_of_one_image_is_reported_not_found(found):
    """Every noise draws all of it: the budget ends, and the best ones come back not accepted."""
    assert found.status[1] == Status.NOT_CONVERGED
    assert not found.accepted[1].any()
    assert found.candidates[1] == SEARCH["max_candidates"]
    assert np.isfinite(found.noises[1]).all()
    assert (np.diff(found.objective[1]) >= 0).all()
    assert (np.asarray(found.objective[1]) > 0.6).all()


def test_what_is_reported_is_so(found):
    model, _ = world()
    judged = judge_noises(model, found.noises, CONDITIONS, PULL)
    np.testing.assert_allclose(judged, found.objective, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.accepted, np.asarray(found.objective) <= 0.6)
    # An untouched candidate has not moved; the others have, on their sphere.
    still = np.asarray(found.steps) == 0
    np.testing.assert_array_equal(np.asarray(found.moved) == 0, still)


def test_no_noise_stands_twice_and_none_is_tried_twice(found):
    for row in range(2):
        assert len(np.unique(found.candidate[row])) == 8
        assert len(np.unique(np.asarray(found.noises[row]), axis=0)) == 8
    # Conditions draw from keys of their own.
    assert not np.intersect1d(np.asarray(found.noises[0]), np.asarray(found.noises[1])).size


def test_same_key_same_noises_and_more_begin_with_them(found):
    model, _ = world()
    again = sail(model, 8, key=3, conditions=CONDITIONS, **SEARCH)
    np.testing.assert_array_equal(again.noises, found.noises)
    more = sail(model, 12, key=3, conditions=CONDITIONS, **(SEARCH | {"max_candidates": 60}))
    np.testing.assert_array_equal(more.noises[0, :8], found.noises[0])
    other = sail(model, 8, key=4, conditions=CONDITIONS, **SEARCH)
    assert not np.intersect1d(np.asarray(other.noises[0]), np.asarray(found.noises[0])).size


class Quadratic(eqx.Module):
    """Equal means, so that the exact objective is a quadratic."""

    change: Array
    mean: Array

    def __call__(self, x, sigma, condition=None):
        base = -x / sigma**2
        return base if condition is None else base - self.change @ (x - self.mean)


@pytest.mark.parametrize("optimizer", ["adam", "polyak"])
def test_the_minimizer_of_a_quadratic_is_reached(optimizer, x64):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    change = basis * np.linspace(1, 2, D) @ basis.T / SIGMA**2  # objective's curvature: 1 to 16
    mean, a = SIGMA * rng.normal(size=D), 0.05
    model = Model(Quadratic(jnp.asarray(change), jnp.asarray(mean)), (D,), **FACTS)
    fourth = np.linalg.matrix_power(change, 4)
    best = np.linalg.solve(SIGMA**8 * fourth + a * np.eye(D), SIGMA**7 * fourth @ mean)
    y = SIGMA * best - mean
    least = SIGMA**6 * y @ fourth @ y + a * best @ best
    found = sail(
        model,
        2,
        key=0,
        conditions=jnp.zeros(1, jnp.int32),
        threshold=1.02 * least,
        objective=NoiseObjective("exact", regularization=a),
        optimizer=optimizer,
        learning_rate=0.05 if optimizer == "adam" else 0.2,
        num_steps=1000,
        num_parallel=2,
        keep_norm=False,
    )
    assert found.accepted.all()
    assert (np.asarray(found.objective) >= least * (1 - 1e-9)).all()
    # What the excess of 2 % allows, in the metric of the quadratic.
    for noise in np.asarray(found.noises[0]):
        apart = noise - best
        excess = SIGMA**8 * apart @ fourth @ apart + a * apart @ apart
        assert excess <= 0.02 * least * (1 + 1e-6)


def test_a_candidate_keeps_the_norm_of_its_draw(found):
    """Draws are named by key, row and number: |n|^2 is that of a normal vector, exactly."""
    for row in range(2):
        for j, number in enumerate(found.candidate[row]):
            key = derive_key(derive_key(3, "sail"), row, int(number))
            drawn = np.asarray(jax.random.normal(key, (D,), jnp.float32))
            noise = np.asarray(found.noises[row, j])
            np.testing.assert_allclose(np.linalg.norm(noise), np.linalg.norm(drawn), rtol=1e-5)
            moved = np.linalg.norm(noise - drawn)
            np.testing.assert_allclose(moved, found.moved[row, j], rtol=1e-4, atol=1e-6)
    assert found.moved.max() > 0.5


@pytest.mark.parametrize("bad", ["some", "all"])
def test_what_is_not_finite_is_given_up(bad):
    def score(x, sigma, condition=None):
        broken = (x[0] > 0) if bad == "some" else jnp.asarray(True)
        pull = 0.0 if condition is None else 1.0
        return jnp.where(broken, jnp.nan, (pull - x) / (1 + sigma**2))

    model = Model(score, (D,), **FACTS)
    found = sail(
        model,
        5,
        key=0,
        conditions=jnp.zeros(1, jnp.int32),
        threshold=1e9,
        objective=NoiseObjective("gap"),
        max_candidates=30,
    )
    if bad == "some":
        assert found.status[0] == Status.OK
        assert (np.asarray(found.noises[0, :, 0]) <= 0).all()
    else:
        assert found.status[0] == Status.NONFINITE
        assert not found.accepted.any()
        assert np.isnan(np.asarray(found.noises)).all()
        assert (np.asarray(found.candidate) == -1).all()


def test_cost_is_counted(counting):
    """All candidates run to their end side by side, so that none is idle."""
    score = counting(lambda x, sigma, condition: -x * (1 if condition is None else 2))
    model = Model(score, (D,), **FACTS)
    found = sail(
        model,
        2,
        key=0,
        conditions=jnp.zeros(1, jnp.int32),
        threshold=-1.0,
        objective=NoiseObjective("gap"),
        num_steps=3,
        num_parallel=4,
        max_candidates=8,
    )
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert score.calls == found.cost.forward[0] == 8 * (3 + 1) * 2
    assert found.cost.vjp[0] == found.cost.forward[0]


def test_bad_input():
    model, _ = world()
    good = {"key": 0, "conditions": CONDITIONS, "threshold": 0.6, "max_candidates": 4}
    for wrong, message in (
        ({"max_candidates": 1}, "max_candidates: expected a whole number at least 2"),
        ({"num_parallel": 0}, "num_parallel: expected"),
        ({"num_steps": -1}, "num_steps: expected"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive"),
        ({"threshold": float("nan")}, "threshold: expected one number or 2"),
        ({"threshold": np.zeros(3, np.float32)}, "threshold: expected one number or 2"),
        ({"conditions": None}, "conditions: expected arrays"),
        ({"conditions": jnp.int32(0)}, "conditions: expected one row each"),
        ({"objective": NoiseObjective(sigma=99.0)}, "sigma: expected at most the model's 10"),
        ({"chunk_size": 0}, "chunk_size: expected"),
    ):
        with pytest.raises(InputError, match=message):
            sail(model, 2, **(good | wrong))
