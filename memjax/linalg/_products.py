"""Products with many probes, and the estimate they end in."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax._core.chunked import chunked_map
from memjax._core.status import Status, finite_status
from memjax.linalg._operator import Matvec
from memjax.linalg.estimate import Estimate
from memjax.linalg.exact import diagonal_exact
from memjax.linalg.probes import working_dtype


def apply_rows(
    matvec: Matvec, rows: Float[Array, "m d"], like: Float[Array, "..."], chunk_size: int | None
) -> Float[Array, "m d"]:
    """The operator applied to flat rows, ``chunk_size`` at a time."""

    def product(row):
        out = matvec(row.reshape(like.shape).astype(like.dtype))
        return out.reshape(-1).astype(row.dtype)

    return chunked_map(product, rows, chunk_size=chunk_size)


def normalized(
    x: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """``(x / unit, unit)``, unit the largest magnitude: squares neither overflow nor vanish.

    Entries that are not finite become zero: factorizations promise nothing for them.
    """
    x = jnp.where(jnp.isfinite(x), x, 0)
    largest = jnp.max(jnp.abs(x))
    unit = jnp.where(largest > 0, largest, 1)
    return x / unit, unit


def estimate_of(
    value: Float[Array, "..."],
    standard_error: Float[Array, "..."],
    degrees_of_freedom: Int[Array, ""] | Float[Array, ""] | float | int,
    num_products: int,
    *products: Float[Array, "..."],
    status: Int[Array, ""] | int = Status.OK,
) -> Estimate:
    """An estimate; NaN, and saying so, if it or any of the products is not finite."""
    finite = finite_status(value, *products)
    bad = finite != Status.OK
    return Estimate(
        value=jnp.where(bad, jnp.nan, value),
        standard_error=jnp.where(bad, jnp.nan, standard_error),
        degrees_of_freedom=jnp.asarray(degrees_of_freedom).astype(value.dtype),
        status=jnp.where(bad, finite, jnp.asarray(status, finite.dtype)),
        num_products=jnp.int32(num_products),
    )


def diagonal_estimate(
    like: Float[Array, "..."],
    value: Float[Array, " d"],
    standard_error: Float[Array, " d"],
    degrees_of_freedom: Int[Array, ""] | Float[Array, ""] | float | int,
    num_products: int,
    products: Float[Array, "..."],
    status: Int[Array, ""] | int = Status.OK,
) -> Estimate:
    """``estimate_of`` a flat diagonal, in the shape of ``like``."""
    value, error = value.reshape(like.shape), standard_error.reshape(like.shape)
    return estimate_of(value, error, degrees_of_freedom, num_products, products, status=status)


def exact_diagonal(matvec: Matvec, like: Float[Array, "..."], chunk_size: int | None) -> Estimate:
    """The answer to a budget of d products or more: the exact diagonal."""
    value = diagonal_exact(matvec, like, chunk_size=chunk_size)
    value = value.reshape(-1).astype(working_dtype(like))
    return diagonal_estimate(like, value, jnp.zeros_like(value), jnp.inf, like.size, value)
