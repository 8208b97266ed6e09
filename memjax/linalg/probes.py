"""Random test arrays with E v v^T = I, for estimates of traces and diagonals."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from memjax._core.checks import check_count
from memjax.linalg._operator import check_like

Probes = Callable[[PRNGKeyArray, int, Float[Array, "..."]], Float[Array, "..."]]
"""``(key, num, like) -> [num, *like.shape]`` with E v v^T = I."""

# What sets them apart is the variance of v^T A v, with A_s = (A + A^T)/2:
#     Rademacher   2 (|A_s|_F^2 - sum_i A_ii^2)                  0 for every diagonal A
#     sphere       (2 d/(d + 2)) (|A_s|_F^2 - (tr A)^2/d)        0 for A = c I
#     orthonormal  that of the sphere; the mean of m of them has (1/m) (1 - (m-1)/(d-1)) times it
#     Gaussian     2 |A_s|_F^2


def _check(num: int, like: Array) -> None:
    check_count("num", num, 1)
    check_like(like)


def working_dtype(like: Array):
    """Dtype to draw, factorize and sum in: that of ``like``, but at least single precision."""
    return like.dtype if jnp.finfo(like.dtype).bits >= 32 else jnp.dtype(jnp.float32)


def rademacher(
    key: PRNGKeyArray, num: int, like: Float[Array, "*shape"]
) -> Float[Array, "num *shape"]:
    """Independent random signs.

    ``Var[v^T A v] = 2 (|A_s|_F^2 - sum_i A_ii^2)``, A_s = (A + A^T)/2: nothing for a diagonal A.

    Args:
        key: source of randomness.
        num: number of probes, >= 1; static.
        like: an array of the shape and dtype of one probe; its values are not used.

    Returns:
        Probes of entries -1 and 1.

    Raises:
        InputError: ``num`` < 1; ``like`` is empty or not floating point.

    >>> import jax, jax.numpy as jnp
    >>> rademacher(jax.random.key(0), 5, jnp.zeros((2, 3))).shape
    (5, 2, 3)
    """
    _check(num, like)
    return jax.random.rademacher(key, (num, *like.shape), like.dtype)


def gaussian(
    key: PRNGKeyArray, num: int, like: Float[Array, "*shape"]
) -> Float[Array, "num *shape"]:
    """Independent standard normal entries.

    ``Var[v^T A v] = 2 |A_s|_F^2``, A_s = (A + A^T)/2: also for A = I, unlike the others here.

    Args:
        key: source of randomness.
        num: number of probes, >= 1; static.
        like: an array of the shape and dtype of one probe; its values are not used.

    Returns:
        Probes.

    Raises:
        InputError: ``num`` < 1; ``like`` is empty or not floating point.

    >>> import jax, jax.numpy as jnp
    >>> gaussian(jax.random.key(0), 5, jnp.zeros((2, 3))).shape
    (5, 2, 3)
    """
    _check(num, like)
    draws = jax.random.normal(key, (num, *like.shape), working_dtype(like))
    return draws.astype(like.dtype)


def sphere(key: PRNGKeyArray, num: int, like: Float[Array, "*shape"]) -> Float[Array, "num *shape"]:
    """Independent uniformly distributed directions of squared length d.

    ``Var[v^T A v] = (2 d/(d + 2)) (|A_s|_F^2 - (tr A)^2/d)``, A_s = (A + A^T)/2, d its dimension:
    nothing for a multiple of the identity, in every basis.

    Args:
        key: source of randomness.
        num: number of probes, >= 1; static.
        like: an array of the shape and dtype of one probe; its values are not used.

    Returns:
        Probes with ``|v|^2 = d``.

    Raises:
        InputError: ``num`` < 1; ``like`` is empty or not floating point.

    >>> import jax, jax.numpy as jnp
    >>> v = sphere(jax.random.key(0), 5, jnp.zeros((2, 3)))
    >>> bool(jnp.allclose(jnp.sum(v**2, axis=(1, 2)), 6.0))
    True
    """
    _check(num, like)
    d = like.size
    draws = jax.random.normal(key, (num, d), working_dtype(like))
    norm = jnp.linalg.norm(draws, axis=1, keepdims=True)
    # A draw of exact zeros happens for d = 1: a float32 normal has finitely many values.
    probes = jnp.where(norm > 0, math.sqrt(d) * draws / jnp.where(norm > 0, norm, 1), 1)
    return probes.reshape(num, *like.shape).astype(like.dtype)


def orthonormal(
    key: PRNGKeyArray, num: int, like: Float[Array, "*shape"]
) -> Float[Array, "num *shape"]:
    """Mutually orthogonal directions of squared length d, in blocks of at most d.

    Each block is the beginning of a Haar-distributed orthogonal matrix times sqrt(d); the QR
    factorization's signs are fixed so that it is (Mezzadri, 2007). One probe is distributed like
    one of ``sphere``. In a block the quadratic forms share a fixed total, d tr A over a full one,
    so the mean of m <= d of them has the variance of draws without replacement,
    ``(1/m) (1 - (m - 1)/(d - 1))`` times that of one.

    Args:
        key: source of randomness.
        num: number of probes, >= 1; static. Beyond d, further independent blocks.
        like: an array of the shape and dtype of one probe; its values are not used.

    Returns:
        Probes with ``|v|^2 = d``; probes of one block are orthogonal.

    Raises:
        InputError: ``num`` < 1; ``like`` is empty or not floating point.

    Cost: ``O(num d min(num, d))`` operations.

    >>> import jax, jax.numpy as jnp
    >>> v = orthonormal(jax.random.key(0), 3, jnp.zeros(3))
    >>> bool(jnp.allclose(v @ v.T, 3 * jnp.eye(3), atol=1e-5))
    True

    References:
        F. Mezzadri, How to generate random matrices from the classical compact groups, Notices
        of the AMS 54 (2007) 592-604, arXiv:math-ph/0609050, section 5.
    """
    _check(num, like)
    d = like.size
    width = min(num, d)
    draws = jax.random.normal(key, (-(-num // width), d, width), working_dtype(like))
    q, r = jnp.linalg.qr(draws)
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1)
    rows = math.sqrt(d) * jnp.swapaxes(q, -2, -1) * signs[..., None]
    return rows.reshape(-1, *like.shape)[:num].astype(like.dtype)
