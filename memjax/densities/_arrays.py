"""Checks of constructor arguments: one line each, before anything is traced."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memjax._core.checks import is_traced
from memjax._core.errors import InputError

# What constructors read numbers from (numpy's own ArrayLike leaves out jax arrays).
Numbers = float | int | Sequence[Any] | np.generic | np.ndarray | Array


def float_array(name: str, value: Numbers, dtype: np.dtype | None = None) -> Array:
    """A finite floating-point array; a bare Python number counts as one."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        found = type(value).__name__
        raise InputError(f"{name}: expected a floating-point array, got {found}") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"{name}: expected a floating-point array, got dtype {array.dtype}")
    if not is_traced(array) and not bool(jnp.isfinite(array).all()):
        raise InputError(f"{name}: expected finite numbers, got NaN or infinity")
    return array if dtype is None else array.astype(dtype)


def log_weights(weights: Numbers, num: int, dtype: np.dtype) -> Float[Array, " n"]:
    """Logarithms of ``num`` positive weights that sum to one."""
    array = float_array("weights", weights)
    if array.shape != (num,):
        raise InputError(f"weights: expected shape [{num}], got {list(array.shape)}")
    if is_traced(array):
        return jnp.log(array).astype(dtype)
    exact = np.asarray(weights, np.float64)
    if not (exact > 0).all():
        raise InputError(f"weights: expected positive numbers, got {exact.min():g}")
    # The sum of many float32 weights drifts.
    if abs(exact.sum() - 1) > 1e-5:
        raise InputError(f"weights: expected a sum of 1, got {exact.sum():g}")
    return jnp.asarray(np.log(exact), dtype)


class Mixed(NamedTuple):
    """Several candidates weighed by their posterior probabilities.

    Attributes:
        log_total: log of the sum of the joint densities.
        weights: posterior probabilities, summing to one.
        mean: weighted mean of the candidates' values.
        deviations: values minus their mean.
    """

    log_total: Float[Array, ""]
    weights: Float[Array, " k"]
    mean: Float[Array, " d"]
    deviations: Float[Array, "k d"]

    def spread(self) -> Float[Array, "d d"]:
        """Weighted covariance of the values."""
        weighted = self.weights[:, None] * self.deviations
        return jnp.matmul(weighted.T, self.deviations, precision="highest")

    def total_spread(self) -> Float[Array, ""]:
        """Trace of ``spread``, without the matrix."""
        return jnp.sum(jnp.matmul(self.weights, self.deviations**2, precision="highest"))


def mix(log_joint: Float[Array, " k"], values: Float[Array, "k d"]) -> Mixed:
    """Weigh candidates by exp(log_joint), shifted so that the largest is one."""
    weights = jax.nn.softmax(log_joint)
    mean = jnp.matmul(weights, values, precision="highest")
    return Mixed(jax.nn.logsumexp(log_joint), weights, mean, values - mean[None])
