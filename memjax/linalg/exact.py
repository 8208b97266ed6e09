"""Exact trace and diagonal of a linear operator known by its products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax._core.chunked import chunked_map
from memjax.linalg._operator import Matvec


def diagonal_exact(
    matvec: Matvec, like: Float[Array, "..."], *, chunk_size: int | None = 256
) -> Float[Array, "..."]:
    """Diagonal of A from its d products with the coordinate vectors.

    ``out[i] = e_i . A e_i``.

    Args:
        matvec: v -> A v on arrays of one shape (any rank), traceable.
        like: an array of that shape and dtype; its values are not used.
        chunk_size: products evaluated together; memory is ``chunk_size`` times that of one.

    Returns:
        The diagonal, in the shape of ``like``. NaN where a product is.

    Cost: d products. Exact up to rounding.

    >>> import jax.numpy as jnp
    >>> diagonal_exact(lambda v: jnp.array([2.0, 3.0]) * v, jnp.zeros(2)).tolist()
    [2.0, 3.0]
    """
    d = like.size

    def entry(i):
        basis = jax.nn.one_hot(i, d, dtype=like.dtype).reshape(like.shape)
        return matvec(basis).reshape(-1)[i]

    return chunked_map(entry, jnp.arange(d), chunk_size=chunk_size).reshape(like.shape)


def trace_exact(
    matvec: Matvec, like: Float[Array, "..."], *, chunk_size: int | None = 256
) -> Float[Array, ""]:
    """Trace of A: the sum of ``diagonal_exact``.

    Args:
        matvec: v -> A v on arrays of one shape (any rank), traceable.
        like: an array of that shape and dtype; its values are not used.
        chunk_size: products evaluated together.

    Returns:
        ``sum_i e_i . A e_i``. NaN if any product is.

    Cost: d products. Exact up to rounding.

    >>> import jax.numpy as jnp
    >>> float(trace_exact(lambda v: jnp.array([2.0, 3.0]) * v, jnp.zeros(2)))
    5.0
    """
    return jnp.sum(diagonal_exact(matvec, like, chunk_size=chunk_size))
