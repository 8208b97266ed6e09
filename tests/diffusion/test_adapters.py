"""Flax modules behind adapters compute what they compute alone."""

from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax._core.errors import InputError
from memjax.calculus.linearization import linearize
from memjax.diffusion.adapters import LinenNetwork, NNXNetwork, callable_pytree
from memjax.diffusion.combine import at
from memjax.diffusion.prediction import from_prediction
from memjax.diffusion.schedule import DiscreteVP

SHAPE = (3, 2)


class Linen(nn.Module):
    """For one sample; ``scale`` and ``train`` are static choices of the call."""

    width: int = 8

    @nn.compact
    def __call__(self, x, t, condition=None, *, scale=1.0, train=True):
        h = jnp.concatenate([x.reshape(-1), t[None]])
        if condition is not None:
            h = jnp.concatenate([h, condition["text"]])
        h = nn.Dropout(0.5, deterministic=not train)(nn.tanh(nn.Dense(self.width)(h)))
        return scale * nn.Dense(x.size)(h).reshape(x.shape)


class BatchedLinen(nn.Module):
    """For a batch: the first axis of x, t and the condition."""

    @nn.compact
    def __call__(self, x, t, condition=None):
        assert x.ndim == 3
        assert t.ndim == 1
        h = jnp.concatenate([x.reshape(len(x), -1), t[:, None]], axis=1)
        if condition is not None:
            h = jnp.concatenate([h, condition["text"]], axis=1)
        return nn.Dense(6)(h).reshape(x.shape)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(7, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.outer = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x, t, condition=None, *, scale=1.0):
        h = self.dropout(nnx.tanh(self.inner(jnp.concatenate([x.reshape(-1), t[None]]))))
        if condition is not None:
            h = h + condition
        return scale * self.outer(h).reshape(x.shape)


class BatchedNNX(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x, t):
        return self.norm(self.linear(x.reshape(len(x), -1)) + t[:, None]).reshape(x.shape)


X = jax.random.normal(jax.random.key(1), SHAPE, jnp.float32)
T = jnp.float32(0.7)
TEXT = {"text": jnp.arange(4, dtype=jnp.float32)}


def linen_case():
    module = Linen()
    variables = module.init(jax.random.key(0), X, T, TEXT, train=False)
    network = LinenNetwork(module, variables, train=False, scale=3.0)
    return network, partial(module.apply, variables, train=False, scale=3.0), TEXT


def batched_linen_case():
    module = BatchedLinen()
    batch = (X[None], T[None], {"text": TEXT["text"][None]})
    variables = module.init(jax.random.key(0), *batch)
    network = LinenNetwork(module, variables, batched=True)

    def direct(x, t, condition):
        return module.apply(variables, x[None], t[None], {"text": condition["text"][None]})[0]

    return network, direct, TEXT


def nnx_case():
    model = NNX(nnx.Rngs(0))
    model.eval()
    return NNXNetwork(model, scale=2.0), partial(model, scale=2.0), jnp.ones(8, jnp.float32)


def batched_nnx_case():
    model = BatchedNNX(nnx.Rngs(0))
    model.eval()

    def direct(x, t, condition=None):
        return model(x[None], t[None])[0]

    return NNXNetwork(model, batched=True), direct, None


CASES = {f.__name__: f for f in (linen_case, batched_linen_case, nnx_case, batched_nnx_case)}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_module_itself(name):
    network, direct, condition = CASES[name]()
    args = (X, T) if condition is None else (X, T, condition)
    expected = direct(*args)
    np.testing.assert_array_equal(network(X, T, condition), expected)
    jitted = jax.jit(lambda network, *args: network(*args))
    np.testing.assert_allclose(jitted(network, *args), expected, rtol=1e-6, atol=1e-6)
    batched = jax.vmap(lambda x: network(x, T, condition))(jnp.stack([X, -X]))
    np.testing.assert_allclose(batched[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batched[1], direct(-X, *args[1:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_weights_are_leaves_and_the_rest_is_static(name):
    network, _, condition = CASES[name]()
    again, *_ = CASES[name]()
    assert jax.tree.structure(network) == jax.tree.structure(again)
    assert hash(jax.tree.structure(network)) == hash(jax.tree.structure(again))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(network))
    # New weights of the same structure need no new trace.
    traces = []

    @jax.jit
    def run(network):
        traces.append(None)
        return network(X, T, condition)

    floats, rest = eqx.partition(again, eqx.is_inexact_array)
    doubled = eqx.combine(jax.tree.map(lambda leaf: 2 * leaf, floats), rest)
    assert not np.allclose(run(network), run(doubled))
    assert len(traces) == 1


@pytest.mark.parametrize("name", CASES)
def test_a_score_of_it_can_be_linearized(name):
    network, _, condition = CASES[name]()
    score = from_prediction(network, prediction="epsilon", schedule=DiscreteVP())
    lin = jax.jit(linearize)(at(score, 0.5, condition), X)
    expected = jax.jacfwd(lambda x: score(x, 0.5, condition))(X).reshape(6, 6)
    np.testing.assert_allclose(lin.jacobian(), expected, rtol=1e-4, atol=1e-5)
    u, v = jax.random.normal(jax.random.key(2), (2, *SHAPE), jnp.float32)
    np.testing.assert_allclose(
        jnp.vdot(u, lin.jvp(v)), jnp.vdot(lin.vjp(u), v), rtol=1e-4, atol=1e-5
    )


def test_ensemble_of_networks():
    """A stacked pytree of weights under vmap is a batch of networks."""
    module = Linen()
    keys = jax.random.split(jax.random.key(3), 3)
    networks = [LinenNetwork(module, module.init(k, X, T, train=False), train=False) for k in keys]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    outputs = jax.vmap(lambda network: network(X, T))(stacked)
    for output, network in zip(outputs, networks, strict=True):
        np.testing.assert_allclose(output, network(X, T), rtol=1e-5, atol=1e-6)


def test_nnx_state_is_split_once_and_never_mutated():
    model = NNX(nnx.Rngs(0))
    network = NNXNetwork(model)  # in training mode: dropout draws from the model's counter
    first, second = network(X, T), network(X, T)
    np.testing.assert_array_equal(first, second)
    model.outer.bias[...] = jnp.ones(6, jnp.float32)
    np.testing.assert_array_equal(network(X, T), first)


def test_callable_pytree():
    network, *_ = linen_case()
    assert callable_pytree(network) is network

    def plain(x):
        return 2 * x

    as_tree = callable_pytree(plain)
    assert jax.tree.leaves(as_tree) == []
    assert jax.tree.structure(as_tree) == jax.tree.structure(callable_pytree(plain))
    assert jax.jit(lambda f, x: f(x))(as_tree, 3.0) == 6.0
    # An Equinox network keeps an activation function among its leaves.
    mlp = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    as_tree = callable_pytree(mlp)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(as_tree))
    x = jnp.ones(2, mlp.layers[0].bias.dtype)
    np.testing.assert_array_equal(as_tree(x), mlp(x))
    gradient = jax.jit(jax.grad(lambda f: jnp.sum(f(x))))(as_tree)
    np.testing.assert_allclose(jax.tree.leaves(gradient)[-1], jnp.ones(2))
    with pytest.raises(InputError, match="score: expected a callable, got list"):
        callable_pytree([1, 2], "score")
