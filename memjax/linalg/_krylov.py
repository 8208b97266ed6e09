"""The one orthogonalization that every Krylov method here uses, and what counts as zero in it."""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float

from memjax._core.errors import InputError
from memjax.linalg._operator import Matvec, check_matvec


def check_krylov(matvec: Matvec, like: Array) -> None:
    """``check_matvec``, and refuse half precision: its small eigenproblems cannot be solved."""
    check_matvec(matvec, like)
    if jnp.finfo(like.dtype).bits < 32:
        raise InputError(f"like: expected float32 or float64, got {like.dtype}")


def product_noise(like: Array) -> float:
    """Rounding of a product relative to |A|: a remainder up to this times |A| counts as zero."""
    return float(jnp.finfo(like.dtype).eps) * (10 + like.size**0.5)


def length(v: Float[Array, " d"]) -> Float[Array, ""]:
    """Euclidean norm without overflow or underflow of the squares; NaN or inf where v is."""
    top = jnp.max(jnp.abs(v))
    unit = jnp.where((top > 0) & jnp.isfinite(top), top, jnp.ones_like(top))
    return unit * jnp.linalg.norm(v / unit)


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


@custom_vmap
def any_lane(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """The flag itself; under ``vmap``, whether it is set in any lane, and not batched.

    A ``lax.cond`` on it stays a branch under ``vmap``, where one on the flag would become a select
    and run both sides for every lane at every step.
    """
    return flag


@any_lane.def_vmap
def _(axis_size, in_batched, flag):
    return any_lane(jnp.any(flag)), False
