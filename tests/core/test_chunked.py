"""Chunked maps: the rows of vmap, whatever stands beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.chunked import chunked_map
from memjax._core.errors import InputError


def function(row):
    x, i = row["x"], row["i"]
    return {"square": jnp.outer(x, x), "sum": jnp.sum(x), "index": 2 * i}


def rows(n, seed=0):
    x = jax.random.normal(jax.random.key(seed), (n, 3))
    return {"x": x, "i": jnp.arange(n)}


@pytest.mark.parametrize("n", [1, 2, 7, 8])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 8, 100, None])
def test_equals_one_row_at_a_time(n, chunk_size):
    xs = rows(n)
    out = chunked_map(function, xs, chunk_size=chunk_size)
    assert jax.tree.structure(out) == jax.tree.structure(function(xs))
    for i in range(n):
        expected = function(jax.tree.map(lambda leaf, i=i: leaf[i], xs))
        for name, value in expected.items():
            np.testing.assert_allclose(out[name][i], value, rtol=1e-6, err_msg=name)


def test_under_jit_and_nested():
    xs = rows(7)
    jitted = jax.jit(lambda xs: chunked_map(function, xs, chunk_size=3))(xs)
    np.testing.assert_allclose(jitted["sum"], jnp.sum(xs["x"], 1), rtol=1e-6)
    table = chunked_map(
        lambda a: chunked_map(lambda b: a * b, xs["x"][:, 0], chunk_size=2),
        xs["x"][:, 1],
        chunk_size=4,
    )
    np.testing.assert_allclose(table, np.outer(xs["x"][:, 1], xs["x"][:, 0]), rtol=1e-6)


def network(x):
    w = jax.random.normal(jax.random.key(9), (3, 64))
    return jnp.sum(jnp.tanh(x @ w) @ (w.T @ w))


@pytest.mark.parametrize("n", [5, 8, 9, 23])
def test_a_row_does_not_depend_on_how_many_stand_beside_it(n):
    xs = rows(32)["x"]
    full = jax.jit(lambda xs: chunked_map(network, xs, chunk_size=4))(xs)
    part = jax.jit(lambda xs: chunked_map(network, xs, chunk_size=4))(xs[:n])
    np.testing.assert_array_equal(full[:n], part)


def test_a_bad_row_stays_alone():
    xs = rows(10)["x"]
    clean = chunked_map(network, xs, chunk_size=4)
    # Row 9 is also the row that fills up the last chunk.
    for bad in (0, 5, 9):
        out = chunked_map(network, xs.at[bad].set(jnp.nan), chunk_size=4)
        assert jnp.isnan(out[bad])
        np.testing.assert_array_equal(jnp.delete(out, bad), jnp.delete(clean, bad))


@pytest.mark.parametrize("chunk_size", [2, 3, None])
def test_memory_follows_the_chunk(chunk_size):
    """The program works on chunk_size rows at once, not on all."""
    text = str(
        jax.make_jaxpr(lambda xs: chunked_map(network, xs, chunk_size=chunk_size))(rows(12)["x"])
    )
    assert (f"[{12 if chunk_size is None else chunk_size},64]") in text
    assert ("[12,64]" in text) == (chunk_size is None)


def test_differentiable():
    xs = rows(5)["x"]
    grad = jax.grad(lambda xs: jnp.sum(chunked_map(network, xs, chunk_size=2)))(xs)
    np.testing.assert_allclose(grad, jax.vmap(jax.grad(network))(xs), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_a_chunk_has_rows(chunk_size):
    with pytest.raises(InputError, match=f"chunk_size: expected a positive .* got {chunk_size}"):
        chunked_map(network, rows(3)["x"], chunk_size=chunk_size)
