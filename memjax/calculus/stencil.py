"""Finite-difference stencils: divergence and p-Laplacian without derivative products."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from memjax._core.checks import check_count, check_positive
from memjax._core.chunked import chunked_map
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.calculus.linearization import Field, check_field
from memjax.calculus.p_laplace import Exponents, exponents
from memjax.linalg.probes import orthonormal

Size = float | int | Float[Array, ""]


class _Rule(NamedTuple):
    """Central differences g'(0) = sum_m weights[m] [g((m+1) h) - g(-(m+1) h)] / h.

    Their error is c h^k |g^(k+1)| + R eps |g| / h with R = 2 sum |weights|: least at
    h^(k+1) = R eps / (k c) |g| / |g^(k+1)|, of which ``balance`` is R / (k c).
    """

    weights: tuple[float, ...]
    balance: float


_RULES = {
    2: _Rule((1 / 2,), 1 / (2 / 6)),
    4: _Rule((2 / 3, -1 / 12), (3 / 2) / (4 / 30)),
    6: _Rule((3 / 4, -3 / 20, 1 / 60), (11 / 6) / (6 / 140)),
}


class StencilEstimate(NamedTuple):
    """A differential operator from finite differences.

    Attributes:
        value: the estimate; ``[len(p)]`` for a tuple of exponents.
        standard_error: what the choice of directions contributes, in the shape of ``value``; zero
            if the directions are complete. Truncation and rounding come on top.
        degrees_of_freedom: of the standard error, for Student's t.
        status: a ``Status`` for each value: NONFINITE if an evaluation is, UNDEFINED (and value
            NaN) if p < 2 and a zero of the field lies within the stencil.
        cost: evaluations of the field.
        step: the step h that was used.
    """

    value: Float[Array, "*p"]
    standard_error: Float[Array, "*p"]
    degrees_of_freedom: Int[Array, ""]
    status: Int[Array, "*p"]
    cost: Cost
    step: Float[Array, ""]


Stencil = Callable[..., StencilEstimate]


def divergence_stencil(
    field: Field,
    *,
    order: int = 2,
    step: Size | None = None,
    length_scale: Size = 1.0,
    num_directions: int | None = None,
    chunk_size: int | None = 16,
) -> Stencil:
    """Divergence of a field by central differences: evaluations only, no derivatives.

    ``sum_i n_i . D_h f(x; n_i)`` over orthonormal directions n_i, where D_h is the central
    difference of order k in h with k evaluations, at x +- h n_i, ..., x +- (k/2) h n_i. The
    directions are the d coordinates, or ``num_directions`` of a random orthonormal frame; these
    count d / num_directions times.

    Args:
        field: f, from an array to an array of the same shape and dtype.
        order: k, one of 2, 4, 6. Static.
        step: h > 0, in the units of x, a number or a traced scalar. None: the step at which
            truncation and rounding balance for a field that varies over ``length_scale`` L,
            ``h = L (c_k eps max(1, |x|_max / L))^(1/(k+1))`` with c = 3, 11.25 and 42.8 for
            k = 2, 4 and 6 and eps of the dtype of x: 0.007 L, 0.07 L and 0.17 L in float32,
            1e-5 L, 1e-3 L and 1e-2 L in float64. The factor in |x| is for the rounding of
            x + h n.
        length_scale: L > 0, over which the field varies, in the units of x, a number or a traced
            scalar; for a score at noise sigma, sigma. Not used if ``step`` is given.
        num_directions: directions of a random frame, from 2 to d; None for the coordinates.
            Static.
        chunk_size: directions evaluated together. Static.

    Returns:
        A function of one x, of any shape, and with ``num_directions`` also a random key:
        ``(x, key) -> StencilEstimate``.

    Raises:
        InputError: ``order`` is not 2, 4 or 6; ``step`` or ``length_scale`` is a number that is
            not positive; (when called) x is not floating point, f(x) is not like x,
            ``num_directions`` is not from 2 to d, or the key is missing or superfluous.

    Error ``c h^k``, with c = 1/6, 1/30, 1/140 times the (k+1)-th derivatives of f, and rounding
    ``eps |f| / h``: at the default step about eps^(k/(k+1)), 3e-5 to 1e-6 in float32. Products with
    the Jacobian, ``divergence``, have neither. A random frame is unbiased apart from this; its
    standard error takes account of drawing directions without replacement and vanishes for
    ``num_directions`` = d. Cost: k evaluations a direction.

    >>> estimate = divergence_stencil(lambda x: -(x**3), order=4)(jnp.array([1.0, 2.0]))
    >>> round(float(estimate.value), 2), int(estimate.cost.forward)
    (-15.0, 8)

    References:
        Fornberg (1988), Generation of finite difference formulas on arbitrarily spaced grids,
        Math. Comp. 51, table 1. Cochran (1977), Sampling techniques, theorem 2.2 (the variance of
        draws without replacement).
    """
    return p_laplacian_stencil(
        field,
        2,
        order=order,
        step=step,
        length_scale=length_scale,
        num_directions=num_directions,
        chunk_size=chunk_size,
    )


def p_laplacian_stencil(
    field: Field,
    p: Exponents,
    *,
    order: int = 2,
    step: Size | None = None,
    length_scale: Size = 1.0,
    num_directions: int | None = None,
    chunk_size: int | None = 16,
) -> Stencil:
    """p-Laplacian of u from its gradient s = grad u (a score) by central differences.

    ``div(|s|^(p-2) s)``, 1 <= p < infinity, as the ``divergence_stencil`` of that field; every
    p from the same evaluations. Negative at attractors, as ``p_laplacian``.

    Args:
        field: s, from an array to an array of the same shape and dtype.
        p: exponent in [1, infinity), or a tuple of exponents. Static.
        order: as for ``divergence_stencil``.
        step: as for ``divergence_stencil``.
        length_scale: as for ``divergence_stencil``; for p other than 2 no more than the
            distance to the next zero of s, over which |s|^(p-2) varies.
        num_directions: as for ``divergence_stencil``.
        chunk_size: as for ``divergence_stencil``.

    Returns:
        As for ``divergence_stencil``; for a tuple, value, standard error and status are arrays
        ``[len(p)]``. For p < 2 the value is NaN and the status UNDEFINED where a zero of s lies
        within the stencil, that is where s turns by 90 degrees or more between two of its points
        opposite each other.

    Raises:
        InputError: p is below 1, infinite or not a number; and as for ``divergence_stencil``.

    Accuracy and cost: those of ``divergence_stencil``, in terms of the derivatives of
    |s|^(p-2) s. Near a zero of s these blow up unless p is an even number: there, for p > 2, the
    error is of order h^(p-2) at worst.

    >>> estimate = p_laplacian_stencil(lambda x: -x, (1, 4), order=6)(jnp.array([0.0, 2.0]))
    >>> estimate.value.round(2).tolist()  # -(d + p - 2) |x|^(p - 2)
    [-0.5, -16.0]

    References:
        Brokman et al. (2025), arXiv:2505.08246; and as for ``divergence_stencil``.
    """
    every = exponents(p)
    if math.inf in every:
        raise InputError("p: expected a finite number, got inf")
    if order not in _RULES:
        raise InputError(f"order: expected 2, 4 or 6, got {order}")
    rule = _RULES[order]
    for name, size in (("step", step), ("length_scale", length_scale)):
        if size is not None:
            check_positive(name, size)

    def estimate(x: Float[Array, "..."], key: PRNGKeyArray | None = None) -> StencilEstimate:
        check_field(field, x)
        d = x.size
        num = d if num_directions is None else num_directions
        check_count("num_directions", num, min(2, d), d)
        if (key is None) != (num_directions is None):
            expected = "None along the coordinates" if num_directions is None else "a random key"
            raise InputError(f"key: expected {expected}, got {type(key).__name__}")
        h = _step(rule, order, x, step, length_scale)

        def coordinate(i):
            return along(jax.nn.one_hot(i, d, dtype=x.dtype).reshape(x.shape))

        def along(direction):
            """Derivative along the direction, and whether the field turns within the stencil."""
            offsets = h * jnp.arange(1, order // 2 + 1).astype(x.dtype)
            ahead = jax.vmap(lambda t: field(x + t * direction))(offsets)
            behind = jax.vmap(lambda t: field(x - t * direction))(offsets)
            slopes = []
            for one in every:
                difference = _component(ahead, direction, one) - _component(behind, direction, one)
                slopes.append(jnp.sum(jnp.asarray(rule.weights, x.dtype) * difference) / h)
            return jnp.stack(slopes), jnp.any(_dots(ahead, behind) <= 0)

        if key is None:
            slopes, turns = chunked_map(coordinate, jnp.arange(d), chunk_size=chunk_size)
        else:
            frame = orthonormal(key, num, x) / math.sqrt(d)
            slopes, turns = chunked_map(along, frame, chunk_size=chunk_size)
        value = d * jnp.mean(slopes, axis=0)
        if num == d:
            standard_error = jnp.zeros_like(value)
        else:
            standard_error = d * jnp.std(slopes, axis=0, ddof=1) * math.sqrt((1 - num / d) / num)
        undefined = jnp.any(turns) & (jnp.asarray(every) < 2)
        finite = jnp.isfinite(value)
        status = jnp.where(undefined, jnp.int32(Status.UNDEFINED), jnp.int32(Status.OK))
        status = jnp.where(finite, status, jnp.int32(Status.NONFINITE))
        value = jnp.where(undefined, jnp.nan, value)
        if not isinstance(p, tuple):
            value, standard_error, status = value[0], standard_error[0], status[0]
        freedom, cost = jnp.int32(num - 1), Cost(forward=order * num)
        return StencilEstimate(value, standard_error, freedom, status, cost, h)

    return estimate


def _step(rule: _Rule, order: int, x: Array, step: Size | None, length_scale: Size) -> Array:
    if step is not None:
        return jnp.asarray(step, x.dtype)
    scale = jnp.asarray(length_scale, x.dtype)
    roundoff = jnp.finfo(x.dtype).eps * jnp.maximum(1, jnp.max(jnp.abs(x)) / scale)
    return scale * (rule.balance * roundoff) ** (1 / (order + 1))


def _dots(a: Array, b: Array) -> Array:
    """Inner product of each row; a sum of products has the caller's precision on every device."""
    return jnp.sum((a * b).reshape(len(a), -1), axis=1)


def _component(scores: Array, direction: Array, p: float | int) -> Array:
    """|s|^(p-2) s . n for each row s; 0 where s = 0."""
    along = _dots(scores, jnp.broadcast_to(direction, scores.shape))
    if p == 2:
        return along
    squared = _dots(scores, scores)
    zero = squared < jnp.finfo(squared.dtype).tiny
    return jnp.where(zero, 0, jnp.where(zero, 1, squared) ** (p / 2 - 1) * along)
