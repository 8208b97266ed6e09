"""The p-Laplacian of a function from its gradient field, exactly, for every p at once."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax._core.errors import InputError
from memjax._core.p_laplace import p_laplacian_from_parts
from memjax._core.status import Status
from memjax.calculus.linearization import Field, Linearization, linearize
from memjax.linalg._operator import Matvec
from memjax.linalg.exact import trace_exact

Exponents = float | int | tuple[float | int, ...]
Trace = Callable[[Matvec, Float[Array, "..."]], Float[Array, ""]]

ROUNDINGS = 16
"""A score this many roundings of its argument away from zero, or less, has no direction. Measured
on mixtures in 2 to 64 dimensions, zeros of the score known to the last bit come out at 0.2 of them
as a rule and at 8 at most."""


class PLaplacianInfo(NamedTuple):
    """What a p-Laplacian was made of, and whether it exists.

    Attributes:
        status: a ``Status`` for each p, in the shape of the value: UNDEFINED where s is zero and
            no limit exists there, NONFINITE where a NaN or an infinity appeared.
        score_norm: |s|.
        trace: tr J, the p-Laplacian for p = 2; None if no p asked for needs it.
        curvature: s^T J s, the p-Laplacian for p = infinity; None if no p asked for needs it.
    """

    status: Int[Array, "*p"]
    score_norm: Float[Array, ""]
    trace: Float[Array, ""] | None
    curvature: Float[Array, ""] | None


def exponents(p: Exponents) -> tuple[float | int, ...]:
    """The exponents asked for, each in [1, infinity], as a tuple.

    Args:
        p: a number or a tuple of numbers.

    Returns:
        ``p`` if it is a tuple, else ``(p,)``.

    Raises:
        InputError: the tuple is empty, or an entry is not a number or below 1.
    """
    every = p if isinstance(p, tuple) else (p,)
    for one in every:
        if isinstance(one, bool) or not isinstance(one, float | int):
            found = type(one).__name__
            raise InputError(f"p: expected a number or a tuple of numbers, got {found}")
        if not one >= 1:
            raise InputError(f"p: expected a number in [1, infinity], got {one}")
    if not every:
        raise InputError("p: expected at least one number, got an empty tuple")
    return every


def p_laplacian(
    field: Field,
    p: Exponents,
    *,
    normalized: bool = False,
    chunk_size: int | None = 256,
    trace: Trace | None = None,
    has_aux: bool = False,
) -> Callable[[Float[Array, "..."]], Any]:
    """p-Laplacian of a function u, from its gradient field s = grad u (a score: u = log p).

    With J = ds/dx::

        div(|s|^(p-2) s) = |s|^(p-2) [tr J + (p-2) s^T J s / |s|^2]        1 <= p < infinity
        s^T J s                                                             p = infinity

    and, ``normalized`` (the game-theoretic p-Laplacian, of degree one in J, hence bounded where
    s -> 0, though without a limit at s = 0 itself)::

        (1/p) [tr J + (p-2) s^T J s / |s|^2]        and        s^T J s / |s|^2  at p = infinity

    Negative where u has an attractor (a mode, a stored point). p = 2 is the Laplacian, p = 1
    minus the sum of the principal curvatures of the level set. Scaling x by b scales the
    p-Laplacian of a log-density by b^-p, the normalized one by b^-2.

    Args:
        field: s, from an array to an array of the same shape and dtype.
        p: exponent in [1, infinity], or a tuple of exponents: all come from one linearization and
            one trace, and cost no more than the dearest alone. Static.
        normalized: the game-theoretic family. Static.
        chunk_size: products of the exact trace evaluated together. Static.
        trace: ``(matvec, like) -> tr J`` in place of the exact trace, for large d; an unbiased
            estimate makes the p-Laplacian unbiased. Not called if only p = infinity is asked for.
        has_aux: return ``(value, info)``. Static.

    Returns:
        A function of one x, of any shape, returning a scalar, or ``[len(p)]`` for a tuple; with
        ``has_aux`` and the ``PLaplacianInfo``. Where s is zero: 0 for p > 2 (the limit), the
        trace for p = 2, and NaN, with status UNDEFINED, where no limit exists: p < 2, and every
        normalized p other than 2. s counts as zero where ``|s| <= 16 eps |J x|``: rounding x to
        its dtype would have turned it around. NaN in, NaN out.

    Raises:
        InputError: p is below 1 or not a number; (when called) x is not floating point, s(x) is
            not like x, ``chunk_size`` is not positive, or ``trace`` does not return one number.

    Exact up to rounding: the relative error is of order eps, and towards a zero of s, where
    rounding x turns s, of order ``|p - 2| eps |J x| / |s|``.

    Cost: one forward evaluation; d jvps for the trace, unless only p = infinity is asked for; and
    two jvps, of which p = infinity (not normalized) needs one and p = 2 none.

    Differentiable in x, with finite gradients also where s = 0 and the value is finite; the
    gradient there is that of the trace for p = 2, of s^T J s for p = infinity, and 0 for the others
    (the limit for p > 3).

    >>> gaussian = lambda x: -x  # in d dimensions: -(d + p - 2) |x|^(p - 2)
    >>> p_laplacian(gaussian, (1, 2, 4))(jnp.array([0.0, 2.0])).tolist()
    [-0.5, -2.0, -16.0]

    References:
        Brokman et al. (2025), arXiv:2505.08246 (p-Laplacians of log-densities). Peres and
        Sheffield (2008), Tug-of-war with noise, arXiv:math/0607761 (the normalized family).
    """
    exponents(p)

    def apply(x: Float[Array, "..."]):
        return p_laplacian_of(
            linearize(field, x),
            p,
            normalized=normalized,
            chunk_size=chunk_size,
            trace=trace,
            has_aux=has_aux,
        )

    return apply


def p_laplacian_of(
    lin: Linearization,
    p: Exponents,
    *,
    normalized: bool = False,
    chunk_size: int | None = 256,
    trace: Trace | None = None,
    has_aux: bool = False,
) -> Any:
    """``p_laplacian`` on a linearization that exists already, to share it with other operators.

    Args:
        lin: linearization of s, see ``linearize``.
        p: as for ``p_laplacian``.
        normalized: as for ``p_laplacian``.
        chunk_size: as for ``p_laplacian``.
        trace: as for ``p_laplacian``; with tr J in hand, ``lambda matvec, like: value``.
        has_aux: as for ``p_laplacian``.

    Returns:
        The value, or ``(value, info)``, as the function that ``p_laplacian`` returns.

    Raises:
        InputError: as for ``p_laplacian``.

    Cost: that of ``p_laplacian`` less the forward evaluation.

    >>> lin = linearize(lambda x: -x, jnp.array([0.0, 4.0]))
    >>> float(p_laplacian_of(lin, 1)), float(lin.trace())
    (-0.25, -2.0)
    """
    value, info = _evaluate(lin, p, normalized, chunk_size, trace)
    return (value, info) if has_aux else value


def level_set_curvature(
    field: Field, *, chunk_size: int | None = 256, trace: Trace | None = None
) -> Callable[[Float[Array, "..."]], Float[Array, ""]]:
    """Mean curvature of the level set of u through a point, from s = grad u.

    ``div(s/|s|) / (d - 1)``: the mean of the d - 1 principal curvatures, one over a length,
    whose sum is the p-Laplacian with p = 1. Negative where the level set bends around what lies
    uphill: on a sphere of radius rho around a mode it is -1/rho, for every d.

    Args:
        field: s, from an array to an array of the same shape and dtype.
        chunk_size: products of the exact trace evaluated together. Static.
        trace: ``(matvec, like) -> tr J`` in place of the exact trace, for large d.

    Returns:
        A function x -> mean curvature, for one x of any shape. NaN where s = 0, see
        ``p_laplacian``.

    Raises:
        InputError: (when called) x has a single entry, or as for ``p_laplacian``.

    Accuracy, cost and gradients: those of ``p_laplacian`` with p = 1.

    >>> float(level_set_curvature(lambda x: -x)(jnp.array([0.0, 0.0, 4.0])))
    -0.25

    References:
        Osher and Sethian (1988), Fronts propagating with curvature-dependent speed, J. Comput.
        Phys. 79, section 2.
    """

    def apply(x: Float[Array, "..."]) -> Float[Array, ""]:
        if x.size < 2:
            raise InputError(f"x: expected two entries or more, got shape {list(x.shape)}")
        total, _ = _evaluate(linearize(field, x), 1, False, chunk_size, trace)
        return total / (x.size - 1)

    return apply


def _evaluate(
    lin: Linearization, p: Exponents, normalized: bool, chunk_size: int | None, trace: Trace | None
) -> tuple[Float[Array, "*p"], PLaplacianInfo]:
    every = exponents(p)
    score, point = lin.value, lin.point
    squared_norm = jnp.sum(score**2)
    divergence = curvature = None
    if any(one != math.inf for one in every):
        if trace is None:
            divergence = trace_exact(lin.jvp, point, chunk_size=chunk_size)
        else:
            divergence = _checked(trace(lin.jvp, point), point)
    zero = jnp.asarray(False)
    if any(one not in (2, math.inf) or (normalized and one != 2) for one in every):
        along_score, along_point = jax.vmap(lin.jvp)(jnp.stack([score, point]))
        curvature = jnp.sum(score * along_score)
        roundoff = jnp.sum((ROUNDINGS * jnp.finfo(point.dtype).eps * along_point) ** 2)
        zero = (squared_norm <= roundoff) & jnp.isfinite(roundoff)
    elif math.inf in every:  # a polynomial in s: no matter where its zeros are
        curvature = jnp.sum(score * lin.jvp(score))
    # A quantity that no exponent needs enters the formula only to be dropped.
    parts = (
        jnp.where(zero, 0, squared_norm),
        squared_norm if divergence is None else divergence,
        squared_norm if curvature is None else curvature,
    )
    values = [p_laplacian_from_parts(*parts, one, normalized=normalized) for one in every]
    value = jnp.stack(values) if isinstance(p, tuple) else values[0]
    finite = jnp.isfinite(jnp.stack([squared_norm, *parts[1:]])).all()
    status = jnp.where(
        jnp.isfinite(squared_norm) & jnp.isfinite(value),
        jnp.int32(Status.OK),
        jnp.where(zero & finite, jnp.int32(Status.UNDEFINED), jnp.int32(Status.NONFINITE)),
    )
    # Twice guarded: the square root must not turn gradients at s = 0 into NaN.
    norm = jnp.where(squared_norm == 0, 0, jnp.sqrt(jnp.where(squared_norm == 0, 1, squared_norm)))
    return value, PLaplacianInfo(status, norm, divergence, curvature)


def _checked(divergence: Array, point: Array) -> Array:
    """What the caller's trace function returned, if it is one number."""
    out = getattr(divergence, "shape", None), getattr(divergence, "dtype", None)
    if out != ((), point.dtype):
        found = type(divergence).__name__ if out[0] is None else f"{out[1]}{list(out[0])}"
        raise InputError(f"trace: expected one number, {point.dtype}[], got {found}")
    return divergence
