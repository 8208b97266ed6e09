"""Models: the null condition at the door, and no weight in a compiled program."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.calculus.linearization import linearize
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.combine import at, classifier_guided, difference, gap, guided
from memjax.diffusion.model import Model
from memjax.diffusion.prediction import EDMPreconditioned, from_prediction
from memjax.diffusion.schedule import DiscreteVP, VarianceExploding

FACTS = {"sigma_min": 0.01, "sigma_max": 50.0, "data_std": 0.5}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, t, condition=None):
        h = jnp.concatenate([x, t[None]])
        h = nn.tanh(nn.Dense(64)(h))
        if condition is not None:
            h = h + nn.Dense(64)(condition)
        return nn.Dense(x.size)(h)


WEIGHTS = 64 * 8  # entries of the smallest kernel


def linen(condition=None):
    x = jnp.zeros(8, jnp.float32)
    args = (x, x[0]) if condition is None else (x, x[0], condition)
    return LinenNetwork(Net(), Net().init(jax.random.key(0), *args))


def edm(condition=None):
    return from_prediction(
        EDMPreconditioned(linen(condition), 0.5),
        prediction="denoiser",
        schedule=VarianceExploding(),
    )


def largest_constant(lowered):
    """Entries of the largest constant in a lowered program that is not one repeated value."""
    text = lowered.as_text()
    assert "elided" not in text
    sizes = [0]
    for shape in re.findall(r'dense<["\[][^>]*>\s*:\s*tensor<((?:\d+x)+)\w+>', text):
        sizes.append(int(np.prod([int(n) for n in shape.rstrip("x").split("x")])))
    return max(sizes)


def statistic(score, xs):
    """A value, a product and a transposed product: what every detector is made of."""

    def one(x):
        lin = linearize(at(score, 0.1), x)
        return lin.value + lin.jvp(x) + lin.vjp(x)

    return jax.vmap(one)(xs)


XS = jnp.ones((4, 8), jnp.float32)
NULL = jnp.zeros(16, jnp.float32)


@pytest.mark.parametrize(
    "score",
    [
        edm(),
        Model(edm(), (8,), **FACTS),
        Model(edm(NULL), (8,), null_condition=NULL, **FACTS),
        guided(Model(edm(NULL), (8,), null_condition=NULL, **FACTS), 2.0),
        difference(edm(), edm()),
        Model(edm(), (8,), **FACTS).score,
    ],
    ids=["score", "model", "conditional", "guided", "difference", "method"],
)
def test_no_weight_is_baked_into_a_program(score):
    assert largest_constant(jax.jit(statistic).lower(score, XS)) < WEIGHTS
    field = at(score, 0.1)
    assert largest_constant(jax.jit(lambda field, x: field(x)).lower(field, XS[0])) < WEIGHTS


def test_no_weight_is_baked_in_beside_a_schedules_table():
    """A table of 1,000 numbers is in the program, and nothing else that depends on the weights."""
    score = from_prediction(linen(), prediction="v_prediction", schedule=DiscreteVP())
    assert largest_constant(jax.jit(statistic).lower(score, XS)) <= 1000
    assert sum(leaf.size for leaf in jax.tree.leaves(score)) > 1000


@pytest.mark.parametrize("score", [edm(), Model(edm(), (8,), **FACTS)], ids=["score", "model"])
def test_the_check_sees_weights_that_are_closed_over(score):
    assert largest_constant(jax.jit(lambda xs: statistic(score, xs)).lower(XS)) >= WEIGHTS


def test_the_gap_and_the_classifier_bake_nothing_in():
    model = Model(edm(NULL), (8,), null_condition=NULL, **FACTS)

    @jax.jit
    def run(gap, guided, x, condition):
        return gap(x, 0.1, condition) + guided(x, 0.1, condition)

    def log_prob(x, sigma, condition):
        return -jnp.sum(x**2)

    lowered = run.lower(gap(model), classifier_guided(model, log_prob, 1.0), XS[0], NULL + 1)
    assert largest_constant(lowered) < WEIGHTS


def test_new_weights_need_no_new_trace():
    traces = []

    @jax.jit
    def run(model, x):
        traces.append(None)
        return model(x, 0.3)

    model = Model(edm(), (8,), **FACTS)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, Model(edm(), (8,), **FACTS))
    assert not np.allclose(run(model, XS[0]), run(doubled, XS[0]))
    assert len(traces) == 1


def test_none_is_the_null_condition():
    seen = []

    def score(x, sigma, condition):
        seen.append(condition)
        return -x

    null = {"a": np.zeros(2), "b": (np.ones(3),)}
    model = Model(score, (3,), null_condition=null, **FACTS)
    model(jnp.ones(3), 0.5)
    model.score(jnp.ones(3), 0.5, None)
    given = jax.tree.map(lambda leaf: leaf + 1, model.null_condition)
    model.score(jnp.ones(3), 0.5, given)
    for condition, expected in zip(seen, [null, null, given], strict=True):
        jax.tree.map(np.testing.assert_array_equal, condition, expected)
    # A model without one passes anything on.
    free = Model(score, (3,), **FACTS)
    free(jnp.ones(3), 0.5)
    free(jnp.ones(3), 0.5, jnp.int32(4))
    assert seen[-2] is None
    assert seen[-1] == 4


def test_a_model_is_the_score_it_was_given():
    score = edm()
    model = Model(score, (8,), **FACTS)
    np.testing.assert_array_equal(model(XS[0], 0.2), score(XS[0], 0.2))
    np.testing.assert_array_equal(model.score(XS[0], jnp.float32(0.2)), score(XS[0], 0.2))
    batched = jax.vmap(model.score, (0, None))(XS, 0.2)
    np.testing.assert_allclose(batched[1], score(XS[1], 0.2), rtol=1e-5)
    assert (model.event_shape, model.sigma_min, model.sigma_max) == ((8,), 0.01, 50.0)


def test_encode_and_decode_are_part_of_the_pytree():
    weights = jnp.full(3, 2.0)
    scale = jax.tree_util.Partial(jnp.multiply, weights)
    model = Model(lambda x, sigma, c: -x, (3,), encode=scale, decode=lambda x: x / 2, **FACTS)
    assert [leaf.shape for leaf in jax.tree.leaves(model)] == [(3,)]
    image = jnp.arange(3.0)
    around = jax.jit(lambda model, image: model.decode(model.encode(image)))(model, image)
    np.testing.assert_array_equal(around, image)
    pixels = Model(lambda x, sigma, c: -x, (3,), **FACTS)
    assert pixels.encode(image) is image
    assert pixels.decode(image) is image


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event_shape": (3, 0)}, r"event_shape: expected positive sizes, got \(3, 0\)"),
        ({"sigma_min": 0.0}, "sigma_min, sigma_max: .* got 0.0, 50.0"),
        ({"sigma_min": 60.0}, "sigma_min, sigma_max: "),
        ({"sigma_max": float("inf")}, "sigma_min, sigma_max: "),
        ({"sigma_max": float("nan")}, "sigma_min, sigma_max: "),
        ({"data_std": 0.0}, "data_std: expected a positive number, got 0.0"),
    ],
)
def test_bad_facts_get_one_line(change, message):
    arguments = {"score": lambda x, sigma, c: -x, "event_shape": (3,), **FACTS} | change
    with pytest.raises(InputError, match=message) as caught:
        Model(**arguments)
    assert "\n" not in str(caught.value)


def test_bad_calls_get_one_line():
    model = Model(lambda x, sigma, c: -x, (3,), null_condition={"a": np.zeros(2)}, **FACTS)
    with pytest.raises(InputError, match=r"x: expected shape \(3,\), got \(4,\)"):
        model(jnp.ones(4), 0.5)
    with pytest.raises(InputError, match="condition: expected the null condition's structure"):
        model(jnp.ones(3), 0.5, jnp.zeros(2))
    with pytest.raises(InputError, match=r"x: expected shape \(3,\)"):
        jax.jit(lambda model, x: model(x, 0.5))(model, jnp.ones((2, 3)))
