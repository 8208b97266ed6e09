"""Divergence, Laplacian, Hessian; and how far a field is from being a gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from memjax._core.checks import check_count
from memjax._core.chunked import chunked_map
from memjax._core.errors import InputError
from memjax._core.status import finite_status
from memjax.calculus.linearization import Field, Linearization, linearize
from memjax.linalg.estimate import Estimate
from memjax.linalg.probes import rademacher

LogDensity = Callable[[Float[Array, "..."]], Float[Array, ""]]


def divergence(
    field: Field, *, chunk_size: int | None = 256
) -> Callable[[Float[Array, "..."]], Float[Array, ""]]:
    """Divergence of a field: ``div f = sum_i df_i/dx_i = tr J``.

    Of a score it is the Laplacian of the log-density, ``(d_eff - d)/sigma^2`` with the effective
    dimension d_eff: negative at a stored point.

    Args:
        field: f, from an array to an array of the same shape and dtype.
        chunk_size: products evaluated together; memory is ``chunk_size`` times that of one.
            Static.

    Returns:
        A function x -> tr J, for one x of any shape. NaN where the field is.

    Raises:
        InputError: (when called) x is not floating point, f(x) is not like x, or ``chunk_size``
            is not positive.

    Exact up to rounding. Cost: one forward evaluation and d jvps.

    >>> float(divergence(lambda x: -(x**3))(jnp.array([1.0, 2.0])))
    -15.0
    """

    def apply(x: Float[Array, "..."]) -> Float[Array, ""]:
        return linearize(field, x).trace(chunk_size=chunk_size)

    return apply


def laplacian(
    log_density: LogDensity, *, chunk_size: int | None = 256
) -> Callable[[Float[Array, "..."]], Float[Array, ""]]:
    """Laplacian of a scalar function: ``sum_i d^2 u/dx_i^2``.

    Where the gradient s = grad u is known (a score), ``divergence(s)`` is the same for less.

    Args:
        log_density: u, from an array to one number of the same dtype, twice differentiable.
        chunk_size: products evaluated together. Static.

    Returns:
        A function x -> tr Hess u, for one x of any shape. NaN where u is.

    Raises:
        InputError: (when called) x is not floating point, u(x) is not one number of its dtype, or
            ``chunk_size`` is not positive.

    Exact up to rounding. Cost: one gradient and d products with the Hessian, forward over reverse.

    >>> float(laplacian(lambda x: -jnp.sum(x**4))(jnp.array([1.0, 2.0])))
    -60.0
    """
    return divergence(_gradient(log_density), chunk_size=chunk_size)


def hessian(
    log_density: LogDensity, *, chunk_size: int | None = 256
) -> Callable[[Float[Array, "..."]], Float[Array, "d d"]]:
    """Hessian of a scalar function, as a dense matrix over flattened x.

    ``H[i, j] = d^2 u/dx_i dx_j``: what ``jax.hessian`` computes, ``chunk_size`` columns at a time.

    Args:
        log_density: u, from an array to one number of the same dtype, twice differentiable.
        chunk_size: columns evaluated together; ``None`` for all at once. Static.

    Returns:
        A function x -> H. Symmetric up to rounding. NaN where u is.

    Raises:
        InputError: (when called) as for ``laplacian``.

    Exact up to rounding. Cost: one gradient and d products, forward over reverse; d^2 memory for
    the result and ``chunk_size`` products at a time.

    >>> hessian(lambda x: x[0] ** 2 * x[1])(jnp.array([1.0, 2.0])).tolist()
    [[4.0, 2.0], [2.0, 0.0]]
    """
    gradient = _gradient(log_density)

    def apply(x: Float[Array, "..."]) -> Float[Array, "d d"]:
        return linearize(gradient, x).jacobian(chunk_size=chunk_size)

    return apply


def curl(
    field: Field, *, chunk_size: int | None = 256
) -> Callable[[Float[Array, "..."]], Float[Array, "d d"]]:
    """Exterior derivative of a field: what keeps a learned score from being a gradient.

    ``C = J - J^T``, that is ``C[i, j] = df_i/dx_j - df_j/dx_i`` over flattened x: twice the
    antisymmetric part of J, zero at every x exactly if f = grad u for some u. In three dimensions
    the classical curl is ``(C[2, 1], C[0, 2], C[1, 0])``.

    Args:
        field: f, from an array to an array of the same shape and dtype.
        chunk_size: columns evaluated together. Static.

    Returns:
        A function x -> C, antisymmetric. NaN where the field is.

    Raises:
        InputError: (when called) as for ``divergence``.

    Exact up to rounding. Cost: one forward evaluation and d jvps; d^2 memory. For large d see
    ``asymmetry``.

    >>> curl(lambda x: jnp.stack([-x[1], x[0]]))(jnp.zeros(2)).tolist()  # a rotation
    [[0.0, -2.0], [2.0, 0.0]]
    """

    def apply(x: Float[Array, "..."]) -> Float[Array, "d d"]:
        jacobian = linearize(field, x).jacobian(chunk_size=chunk_size)
        return jacobian - jacobian.T

    return apply


def asymmetry(
    lin: Linearization, key: PRNGKeyArray, num_probes: int, *, chunk_size: int | None = 16
) -> Estimate:
    """Share of a Jacobian that is antisymmetric, estimated from random products.

    ``|J - J^T|_F / (2 |J|_F)`` in [0, 1]: 0 for a gradient field, 1 for a rotation; about 0.09
    for the scores of trained networks. With Rademacher probes v, E v v^T = I, the same products
    give both norms::

        |J - J^T|_F^2 / 4 = E |J v - J^T v|^2 / 4
        |J|_F^2           = E (|J v|^2 + |J^T v|^2) / 2

    Args:
        lin: linearization of the field, see ``linearize``.
        key: source of randomness.
        num_probes: probes, >= 2. Static.
        chunk_size: probes evaluated together. Static.

    Returns:
        An ``Estimate``: the square root of the ratio of the two means, never outside [0, 1];
        its standard error by the delta method; ``2 num_probes`` products. Zero with standard
        error zero for J = 0, which is symmetric. ``status`` is NONFINITE if a product is.

    Raises:
        InputError: ``num_probes`` < 2 or ``chunk_size`` < 1.

    Bias of order 1/num_probes, below the standard error. Cost: ``num_probes`` jvps and vjps.

    >>> from memjax.calculus.linearization import linearize
    >>> lin = linearize(lambda x: jnp.stack([-x[1], x[0]]), jnp.zeros(2))
    >>> float(asymmetry(lin, jax.random.key(0), 4).value)
    1.0

    References:
        Cochran (1977), Sampling techniques, section 6.3 (variance of a ratio of means).
    """
    check_count("num_probes", num_probes, 2)

    def squares(v):
        forward, backward = lin.jvp(v), lin.vjp(v)
        defect = jnp.sum((forward - backward) ** 2) / 4
        return defect, (jnp.sum(forward**2) + jnp.sum(backward**2)) / 2

    probes = rademacher(key, num_probes, lin.point)
    defects, norms = chunked_map(squares, probes, chunk_size=chunk_size)
    # Relative to the mean: squares of squares overflow in float32.
    norm = jnp.mean(norms)
    norm = jnp.where(norm == 0, 1, norm)
    defects, norms = defects / norm, norms / norm
    ratio = jnp.mean(defects)
    variance = jnp.sum((defects - ratio * norms) ** 2) / (num_probes * (num_probes - 1))
    value = jnp.sqrt(ratio)
    standard_error = jnp.sqrt(variance) / (2 * jnp.where(value == 0, 1, value))
    return Estimate(
        value=value,
        standard_error=standard_error,
        degrees_of_freedom=jnp.int32(num_probes - 1),
        status=finite_status(value, standard_error),
        num_products=jnp.int32(2 * num_probes),
    )


def asymmetry_exact(lin: Linearization, *, chunk_size: int | None = 256) -> Float[Array, ""]:
    """Share of a Jacobian that is antisymmetric, from the dense matrix.

    ``|J - J^T|_F / (2 |J|_F)`` in [0, 1], see ``asymmetry``; 0 for J = 0.

    Args:
        lin: linearization of the field, see ``linearize``.
        chunk_size: columns evaluated together. Static.

    Returns:
        The share. NaN if a product is.

    Raises:
        InputError: ``chunk_size`` < 1.

    Exact up to rounding. Cost: d jvps and d^2 memory.

    >>> from memjax.calculus.linearization import linearize
    >>> float(asymmetry_exact(linearize(lambda x: -x, jnp.ones(3))))
    0.0
    """
    jacobian = lin.jacobian(chunk_size=chunk_size)
    norm = jnp.linalg.norm(jacobian)
    return jnp.linalg.norm(jacobian - jacobian.T) / (2 * jnp.where(norm == 0, 1, norm))


def _gradient(log_density: LogDensity) -> Field:
    """The gradient as a field, after a look at what the function returns."""

    def gradient(x: Float[Array, "..."]) -> Float[Array, "..."]:
        out = jax.eval_shape(log_density, x)
        if not hasattr(out, "shape") or out.shape != () or out.dtype != x.dtype:
            found = f"{out.dtype}{list(out.shape)}" if hasattr(out, "shape") else type(out).__name__
            raise InputError(f"log_density: expected one number, {x.dtype}[], got {found}")
        return jax.grad(log_density)(x)

    return gradient
