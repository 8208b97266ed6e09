"""Exact trace and diagonal against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.linalg.exact import diagonal_exact, trace_exact

OPERATORS = {
    "random": lambda d, rng: rng.standard_normal((d, d)),
    "zero": lambda d, rng: np.zeros((d, d)),
    "identity": lambda d, rng: np.eye(d),
    "rank one": lambda d, rng: np.outer(rng.standard_normal(d), rng.standard_normal(d)),
    "strictly triangular": lambda d, rng: np.triu(rng.standard_normal((d, d)), 1),
    "ill scaled": lambda d, rng: np.diag(10.0 ** -np.arange(d)) @ rng.standard_normal((d, d)),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("d", [1, 2, 7])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_against_dense(x64, name, d, chunk_size):
    a = OPERATORS[name](d, np.random.default_rng(0))
    dense = jnp.asarray(a)
    like = jnp.zeros(d)
    diagonal = diagonal_exact(lambda v: dense @ v, like, chunk_size=chunk_size)
    trace = trace_exact(lambda v: dense @ v, like, chunk_size=chunk_size)
    np.testing.assert_allclose(diagonal, np.diag(a), rtol=1e-14, atol=1e-300)
    np.testing.assert_allclose(trace, np.trace(a), rtol=1e-13, atol=1e-15)


def test_any_shape_is_one_vector(x64):
    a = jnp.asarray(np.random.default_rng(1).standard_normal((12, 12)))
    like = jnp.zeros((2, 3, 2))
    diagonal = diagonal_exact(lambda v: (a @ v.reshape(-1)).reshape(v.shape), like, chunk_size=5)
    assert diagonal.shape == like.shape
    np.testing.assert_allclose(diagonal.reshape(-1), jnp.diag(a), rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_keeps_the_precision_of_its_argument(x64, dtype):
    scale = jnp.asarray([1.0, 2.0, 3.0], dtype)
    assert diagonal_exact(lambda v: scale * v, jnp.zeros(3, dtype)).dtype == dtype
    assert trace_exact(lambda v: scale * v, jnp.zeros(3, dtype)).dtype == dtype


def test_nan_where_a_product_is():
    scale = jnp.asarray([1.0, jnp.nan, 3.0])
    # Row 1 alone: coordinate products that never meet the NaN keep their value.
    diagonal = diagonal_exact(lambda v: jnp.where(v != 0, scale * v, v), jnp.zeros(3))
    np.testing.assert_array_equal(diagonal, [1.0, np.nan, 3.0])
    assert jnp.isnan(trace_exact(lambda v: scale * v, jnp.zeros(3)))


def test_values_of_like_do_not_matter():
    scale = jnp.asarray([1.0, 2.0, 3.0])
    out = diagonal_exact(lambda v: scale * v, jnp.full(3, jnp.nan))
    np.testing.assert_array_equal(out, scale)


def test_under_jit_vmap_and_grad(x64):
    a = jnp.asarray(np.random.default_rng(2).standard_normal((4, 5, 5)))
    traces = jax.jit(jax.vmap(lambda m: trace_exact(lambda v: m @ v, jnp.zeros(5), chunk_size=2)))
    np.testing.assert_allclose(traces(a), jnp.trace(a, axis1=1, axis2=2), rtol=1e-13)
    grad = jax.grad(lambda m: trace_exact(lambda v: m @ v, jnp.zeros(5), chunk_size=2))(a[0])
    np.testing.assert_array_equal(grad, jnp.eye(5))


def test_costs_d_products():
    count = []
    scale = jnp.asarray([1.0, 2.0, 3.0, 4.0])

    def matvec(v):
        jax.debug.callback(lambda: count.append(1))
        return scale * v

    diagonal_exact(matvec, jnp.zeros(4), chunk_size=1).block_until_ready()
    jax.effects_barrier()
    assert len(count) == 4
