"""Map over many rows with bounded memory, every chunk of the same shape."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from memjax._core.errors import InputError


def chunked_map(fn: Callable[[PyTree], PyTree], xs: PyTree, *, chunk_size: int | None) -> PyTree:
    """``vmap(fn)(xs)`` computed ``chunk_size`` rows at a time, under ``jit`` or outside.

    The last chunk is filled up with copies of the last row, so that every chunk has one shape:
    at a fixed ``chunk_size`` a row's result does not depend on how many rows stand beside it.
    (``jax.lax.map(..., batch_size=...)`` runs the remainder at its own shape, whose float32
    rounding differs.)

    Args:
        fn: function of one row.
        xs: pytree of arrays with a common leading axis of length n >= 1.
        chunk_size: rows evaluated together; ``None`` for all at once. Static.

    Returns:
        Pytree of arrays with leading axis n.

    Raises:
        InputError: ``chunk_size`` is not positive.
    """
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size: expected a positive number of rows, got {chunk_size}")
    n = jax.tree.leaves(xs)[0].shape[0]
    if chunk_size is None or n <= chunk_size:
        return jax.vmap(fn)(xs)
    num_chunks = -(-n // chunk_size)
    padding = num_chunks * chunk_size - n

    def split(leaf):
        filled = jnp.concatenate([leaf, jnp.repeat(leaf[-1:], padding, axis=0)])
        return filled.reshape(num_chunks, chunk_size, *leaf.shape[1:])

    out = jax.lax.map(jax.vmap(fn), jax.tree.map(split, xs))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:n], out)
