"""Covariance matrices decomposed once, so that adding sigma^2 I costs nothing."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memjax._core.checks import is_traced
from memjax._core.errors import InputError
from memjax.densities._arrays import Numbers, float_array

Spectral = Callable[[Float[Array, " m"]], Float[Array, " m"]]


class Covariance(eqx.Module):
    """S = U diag(along) U^T + off on the orthogonal complement of U.

    One form for all kinds: isotropic (r = 0, one value off), diagonal (r = 0, d values off), full
    (r = d, none off), low rank plus isotropic (0 < r < d, one value off). Since S + sigma^2 I has
    the axes of S, every function of it is ``f(variances)`` on the same axes: O(d) or O(d r).
    Leading axes stack covariances for ``vmap``.

    Attributes:
        axes: U, orthonormal columns.
        along: variances along the axes.
        off: variances off the axes.
    """

    axes: Float[Array, "*k d r"]
    along: Float[Array, "*k r"]
    off: Float[Array, "*k m"]

    def apply(self, f: Spectral, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """f(S) v."""
        inside, outside = self._split(v)
        if outside is None:
            return jnp.matmul(self.axes, f(self.along) * inside, precision="highest")
        out = f(self.off) * outside
        if inside.size:
            out += jnp.matmul(self.axes, f(self.along) * inside, precision="highest")
        return out

    def quadratic(self, f: Spectral, v: Float[Array, " d"]) -> Float[Array, ""]:
        """v^T f(S) v as a sum of squares: keeps its sign and its small terms in float32."""
        inside, outside = self._split(v)
        out = jnp.sum(f(self.along) * inside**2)
        return out if outside is None else out + jnp.sum(f(self.off) * outside**2)

    def trace(self, f: Spectral) -> Float[Array, ""]:
        """Trace of f(S)."""
        out = jnp.sum(f(self.along))
        if self.off.size:
            d, r = self.axes.shape
            out += jnp.sum(f(self.off)) * ((d - r) // self.off.size)
        return out

    def dense(self, f: Spectral) -> Float[Array, "d d"]:
        """f(S) as a matrix."""
        inside = jnp.matmul(self.axes * f(self.along)[None], self.axes.T, precision="highest")
        if not self.off.size:
            return inside
        d, r = self.axes.shape
        complement = jnp.eye(d, dtype=inside.dtype)
        if r:
            complement -= jnp.matmul(self.axes, self.axes.T, precision="highest")
        return inside + f(self.off)[None] * complement

    def _split(self, v: Float[Array, " d"]) -> tuple[Float[Array, " r"], Float[Array, " d"] | None]:
        """Coordinates along the axes, and the part of v off them (None where nothing is)."""
        inside = jnp.matmul(v, self.axes, precision="highest")
        if not self.off.size:
            return inside, None
        if not inside.size:
            return inside, v
        return inside, v - jnp.matmul(self.axes, inside, precision="highest")


def covariance_from(
    name: str, value: Numbers, event_shape: tuple[int, ...], dtype: np.dtype, *stack: int
) -> Covariance:
    """Read a covariance by its shape: a number, one per coordinate, or a matrix; stacked or not.

    Matrices are decomposed on the host in float64, so that small variances survive a float32
    density.
    """
    array = float_array(name, value)
    d = int(np.prod(event_shape))
    if array.shape in (stack, ()):
        off = jnp.broadcast_to(array, stack)[..., None]
    elif array.shape == (*stack, *event_shape):
        off = array.reshape(*stack, d)
    elif array.shape == (*stack, d, d):
        return _decompose(name, value, dtype)
    else:
        shapes = dict.fromkeys(((), stack, (*stack, *event_shape), (*stack, d, d)))
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(f"{name}: expected shape {expected}, got {list(array.shape)}")
    if not is_traced(off) and bool((off < 0).any()):
        raise InputError(f"{name}: expected variances >= 0, got {float(off.min()):g}")
    empty = jnp.zeros((*stack, d, 0), dtype)
    return Covariance(empty, jnp.zeros((*stack, 0), dtype), off.astype(dtype))


def low_rank_covariance(
    factor: Numbers, variance: Numbers, event_shape: tuple[int, ...], dtype: np.dtype
) -> Covariance:
    """F F^T + variance I, by the singular values of F."""
    matrix = float_array("factor", factor)
    if matrix.ndim == 0 or matrix.shape[:-1] != event_shape:
        expected = ", ".join([*map(str, event_shape), "r"])
        raise InputError(f"factor: expected shape [{expected}], got {list(matrix.shape)}")
    off = covariance_from("variance", variance, event_shape, dtype).off
    if off.shape != (1,):
        raise InputError(f"variance: expected one number, got shape {list(np.shape(variance))}")
    d = int(np.prod(event_shape))
    exact = _host("factor", factor).reshape(d, matrix.shape[-1])
    axes, singular, _ = np.linalg.svd(exact, full_matrices=False)
    along = singular**2 + np.float64(off[0])
    return Covariance(
        jnp.asarray(axes, dtype), jnp.asarray(along, dtype), off if along.size < d else off[:0]
    )


def _decompose(name: str, value: Numbers, dtype: np.dtype) -> Covariance:
    matrix = _host(name, value)
    given = np.asarray(value).dtype
    eps = float(np.finfo(given if np.issubdtype(given, np.floating) else np.float64).eps)
    size = np.abs(matrix).max()
    asymmetry = np.abs(matrix - matrix.swapaxes(-1, -2)).max()
    if asymmetry > 1e3 * eps * size:
        raise InputError(f"{name}: expected symmetric matrices, got asymmetry {asymmetry:g}")
    along, axes = np.linalg.eigh((matrix + matrix.swapaxes(-1, -2)) / 2)
    if along.min() < -1e2 * eps * matrix.shape[-1] * size:
        raise InputError(
            f"{name}: expected positive semi-definite matrices, got eigenvalue {along.min():g}"
        )
    along = jnp.asarray(np.maximum(along, 0), dtype)
    return Covariance(jnp.asarray(axes, dtype), along, jnp.zeros((*along.shape[:-1], 0), dtype))


def _host(name: str, value: Numbers) -> np.ndarray:
    if is_traced(value):
        raise InputError(f"{name}: expected concrete numbers (decomposed once, outside jit)")
    return np.asarray(value, np.float64)
