"""Group normalization against its formula differentiated by JAX, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.networks.normalization import group_normalize

SHAPE, GROUPS = (4, 3, 6), 3


def formula(x, groups):
    grouped = x.reshape(-1, groups, x.shape[-1] // groups)
    centered = grouped - grouped.mean((0, 2), keepdims=True)
    variance = (centered**2).mean((0, 2), keepdims=True)
    return (centered / jnp.sqrt(variance + 1e-6)).reshape(x.shape)


def products(f, x, t, u):
    """Value, every first derivative, a second and a third one."""

    def g(x):
        return f(x, GROUPS)

    def bent(x):
        return jnp.sum(jnp.sin(g(x)) * u)

    value, push = jax.linearize(g, x)
    second = jax.jvp(jax.grad(bent), (x,), (t,))[1]
    third = jax.grad(lambda x: jnp.sum(u * jax.jvp(jax.grad(bent), (x,), (t,))[1]))(x)
    return value, push(t), jax.linear_transpose(push, x)(u)[0], second, third


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_every_derivative_is_that_of_the_formula(x64, scale):
    x, t, u = jax.random.normal(jax.random.key(0), (3, *SHAPE), jnp.float64)
    found, expected = (
        jax.jit(lambda *a, f=f: products(f, *a))(scale * x + 5, t, u)
        for f in (group_normalize, formula)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9 * np.abs(b).max(), rtol=0)


def test_moments():
    x = 3 + 2 * jax.random.normal(jax.random.key(1), (8, 8, 8))
    h = np.asarray(group_normalize(x, 2)).reshape(64, 2, 4)
    np.testing.assert_allclose(h.mean((0, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(h.std((0, 2)), 1, atol=1e-5)


def test_eps(x64):
    """Where it outweighs the variance, in value and derivative."""
    x, t = 1e-3 * jax.random.normal(jax.random.key(2), (2, *SHAPE), jnp.float64)

    def f(x):
        return group_normalize(x, 1, 1.0)

    value, pushed = jax.jvp(f, (x,), (t,))
    centered = x - x.mean()
    scale = 1 / np.sqrt(1 + np.var(x))
    np.testing.assert_allclose(value, centered * scale, atol=1e-12)
    along = (centered * (t - t.mean())).mean() * scale**3
    np.testing.assert_allclose(pushed, (t - t.mean()) * scale - centered * along, atol=1e-12)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (0, 0, 0), (None, None, 1)])
def test_vmap(axes):
    """Mapped over points, over directions of one point, over both."""
    arrays = []
    for i, axis in enumerate(axes):
        shape = SHAPE if axis is None else tuple(np.insert(SHAPE, axis, 2))
        arrays.append(jax.random.normal(jax.random.key(i), shape))
    found, expected = (
        jax.jit(jax.vmap(lambda x, t, u, f=f: products(f, x, t, u), axes))(*arrays)
        for f in (group_normalize, formula)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * (1 + np.abs(b).max()), rtol=0)


def test_transposed_over_points_that_share_a_direction():
    """A direction that is broadcast over points collects the products of all of them."""
    xs = jax.random.normal(jax.random.key(0), (5, *SHAPE))
    t, us = jnp.ones(SHAPE), jax.random.normal(jax.random.key(1), (5, *SHAPE))

    def summed(f):
        def push(t):
            return jax.vmap(lambda x: jax.jvp(lambda x: f(x, GROUPS), (x,), (t,))[1])(xs)

        return jax.linear_transpose(push, t)(us)[0]

    np.testing.assert_allclose(summed(group_normalize), summed(formula), atol=1e-4)


def test_groups_must_divide_the_channels():
    with pytest.raises(InputError, match=r"^groups: expected a divisor of 6 channels, got 4$"):
        group_normalize(jnp.zeros(SHAPE), 4)
