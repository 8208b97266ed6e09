"""The one orthogonalization that every Krylov method here uses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """``a @ b`` in full precision on every backend (TF32 would cost half the digits)."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def orthogonalize(
    basis: Float[Array, "m d"], w: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Float[Array, " m"]]:
    """Remove from w its components along the rows of a basis, twice.

    Two passes of classical Gram-Schmidt leave a remainder orthogonal to working precision unless
    it is rounding noise itself (Giraud, Langou and Rozloznik, 2005, doi:10.1007/s00211-005-0615-4,
    "twice is enough"); each is two matrix-vector products.

    Args:
        basis: orthonormal rows; unused rows are zero.
        w: the vector.

    Returns:
        ``(w - basis^T c, c)``, not normalized, with c the coefficients of both passes together.
    """
    first = matmul(basis, w)
    w = w - matmul(first, basis)
    second = matmul(basis, w)
    return w - matmul(second, basis), first + second
