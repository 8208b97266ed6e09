"""The p-Laplacian as a formula of three numbers, for every way of obtaining them."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax._core.errors import InputError


def p_laplacian_from_parts(
    squared_norm: Float[Array, ""],
    trace: Float[Array, ""],
    curvature: Float[Array, ""],
    p: float | int,
    *,
    normalized: bool = False,
) -> Float[Array, ""]:
    """p-Laplacian of a function u from first and second derivatives already contracted.

    With s = grad u and J = Hess u::

        div(|s|^(p-2) s) = |s|^(p-2) [tr J + (p-2) s^T J s / |s|^2]        1 <= p < infinity
        s^T J s                                                             p = infinity

    and, ``normalized`` (the game-theoretic p-Laplacian, of degree one in J and bounded where
    s -> 0)::

        (1/p) [tr J + (p-2) s^T J s / |s|^2]        and        s^T J s / |s|^2  at p = infinity

    Negative where u is an attractor (a mode, a stored point).

    Args:
        squared_norm: s . s, never negative. (The square, because it is smooth at s = 0.)
        trace: tr J.
        curvature: s^T J s.
        p: exponent, 1 <= p <= infinity. Static.
        normalized: the game-theoretic variant. Static.

    Returns:
        The p-Laplacian. Where s = 0 (s . s below the smallest normal number): the trace form for
        p = 2, the limit 0 for p > 2, and NaN where no limit exists, that is for p < 2 and for the
        normalized variant with p other than 2. NaN in, NaN out.

    Raises:
        InputError: p is below 1 or not a number.

    >>> one, two = jnp.array(1.0), jnp.array(2.0)
    >>> float(p_laplacian_from_parts(one, two, -one, 1)), float(
    ...     p_laplacian_from_parts(one, two, -one, math.inf)
    ... )
    (3.0, -1.0)

    References:
        Brokman et al. (2025), arXiv:2505.08246 (p-Laplacian of log-densities). Peres and Sheffield
        (2008), Tug-of-war with noise, arXiv:math/0607761 (the normalized variant).
    """
    if not p >= 1:
        raise InputError(f"p: expected a number in [1, infinity], got {p}")
    if p == 2:
        return trace / 2 if normalized else trace
    if math.isinf(p) and not normalized:
        return curvature
    # Twice guarded: the unused branch must not turn gradients at s = 0 into NaN.
    zero = squared_norm < jnp.finfo(squared_norm.dtype).tiny
    safe = jnp.where(zero, jnp.ones_like(squared_norm), squared_norm)
    along = curvature / safe
    if normalized:
        value = along if math.isinf(p) else (trace + (p - 2) * along) / p
    else:
        value = safe ** (p / 2 - 1) * (trace + (p - 2) * along)
    limit = 0.0 if p > 2 and not normalized else jnp.nan
    return jnp.where(zero, limit, value)
