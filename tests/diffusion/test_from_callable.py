"""One door for networks of any library: Linen, NNX, Equinox, functions."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax._core.errors import InputError
from memjax.diffusion.adapters import LinenNetwork, NNXNetwork
from memjax.diffusion.model import Model, from_callable
from memjax.diffusion.prediction import EDMPreconditioned
from memjax.diffusion.schedule import DiscreteVP, VarianceExploding

WEIGHTS = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)
SCHEDULE = DiscreteVP()
FACTS = {"schedule": SCHEDULE, "prediction": "epsilon", "event_shape": (4,), "data_std": 0.5}
X = jnp.array([0.5, -1.0, 2.0, 0.25], jnp.float32)
SIGMA = 0.7


def output(x, t, condition=None):
    """The one function that every library computes here."""
    return x @ WEIGHTS + t / 1000 + (0 if condition is None else condition)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, t, condition=None):
        h = nn.Dense(4, use_bias=False)(x) + t / 1000
        return h if condition is None else h + condition


class NNX(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.asarray(WEIGHTS))

    def __call__(self, x, t, condition=None):
        h = x @ self.kernel[...] + t / 1000
        return h if condition is None else h + condition


class Equinox(eqx.Module):
    kernel: jax.Array

    def __call__(self, x, t, condition=None):
        return x @ self.kernel + t / 1000 + (0 if condition is None else condition)


class Unconditional(eqx.Module):
    kernel: jax.Array

    def __call__(self, x, t):
        return x @ self.kernel + t / 1000


def weighted(weights, x, t, condition):
    return x @ weights + t / 1000 + (0 if condition is None else condition)


NETWORKS = {
    "linen": lambda: LinenNetwork(Linen(), {"params": {"Dense_0": {"kernel": WEIGHTS}}}),
    "nnx": lambda: NNXNetwork(NNX()),
    "equinox": lambda: Equinox(jnp.asarray(WEIGHTS)),
    "partial": lambda: jax.tree_util.Partial(weighted, jnp.asarray(WEIGHTS)),
    "plain": lambda: output,
    "two arguments": lambda: Unconditional(jnp.asarray(WEIGHTS)),
    "two arguments, plain": lambda: lambda x, t: output(x, t),
}


def expected(condition=None):
    sigma = jnp.float32(SIGMA)
    return -output(SCHEDULE.alpha_at(sigma) * X, SCHEDULE.time(sigma), condition) / sigma


@pytest.mark.parametrize("name", NETWORKS)
def test_every_library_comes_in(name):
    model = from_callable(NETWORKS[name](), **FACTS)
    assert isinstance(model, Model)
    assert (model.sigma_min, model.sigma_max) == (SCHEDULE.sigma_min, SCHEDULE.sigma_max)
    np.testing.assert_allclose(model(X, SIGMA), expected(), rtol=1e-5)
    sizes = [leaf.size for leaf in jax.tree.leaves(model) if eqx.is_array(leaf)]
    assert ("plain" in name) == (16 not in sizes)  # the weights are leaves, unless closed over


@pytest.mark.parametrize("name", ["linen", "nnx", "equinox", "partial", "plain"])
def test_conditions_come_in(name):
    null = jnp.full(4, 0.5, jnp.float32)
    model = from_callable(NETWORKS[name](), null_condition=null, **FACTS)
    np.testing.assert_allclose(model(X, SIGMA), expected(null), rtol=1e-5)
    np.testing.assert_allclose(model(X, SIGMA, null + 1), expected(null + 1), rtol=1e-5)


def test_the_rest_is_handed_on():
    model = from_callable(
        EDMPreconditioned(output, 0.5),
        **{**FACTS, "schedule": VarianceExploding(), "prediction": "denoiser"},
        sigma_min=0.01,
        sigma_max=3.0,
        encode=lambda image: image / 2,
        decode=lambda x: 2 * x,
    )
    assert (model.sigma_min, model.sigma_max, model.data_std) == (0.01, 3.0, 0.5)
    np.testing.assert_array_equal(model.decode(model.encode(X)), X)


def test_a_network_that_needs_a_condition_is_tried_with_an_example():
    def needy(x, t, condition):
        return x * condition["scale"]

    example = {"scale": jax.ShapeDtypeStruct((), jnp.float32)}
    model = from_callable(needy, example_condition=example, **FACTS)
    assert model.null_condition is None
    assert model(X, SIGMA, {"scale": jnp.float32(0.0)}).tolist() == [0.0] * 4
    with pytest.raises(TypeError):  # its own error
        from_callable(needy, **FACTS)


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        (lambda x, t, c: x[:2], {}, r"network: expected an output of the shape of x, \(4,\)"),
        (lambda x, t, c: x[None], {}, r"got \(1, 4\)"),
        (output, {"event_shape": (2, 0)}, "event_shape: expected positive"),
        (output, {"prediction": "noise"}, "prediction: expected one of"),
        (output, {"data_std": -1.0}, "data_std: expected a positive number"),
        (output, {"sigma_min": 1e9}, "sigma_min <= sigma_max"),
        (lambda x, t: x, {"null_condition": np.float32(1.0)}, r"the network takes \(x, t\) alone"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(network, changes, message):
    with pytest.raises(InputError, match=message) as raised:
        from_callable(network, **{**FACTS, **changes})
    assert "\n" not in str(raised.value)


def test_double_weights_are_tried_in_double(x64):
    network = Equinox(jnp.asarray(WEIGHTS, jnp.float64))
    model = from_callable(network, **FACTS)
    assert model(jnp.asarray(X, jnp.float64), SIGMA).dtype == np.float64
