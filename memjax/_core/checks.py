"""Arguments refused in one line, before anything is traced: name, what was expected, what found."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from memjax._core.errors import InputError


def is_traced(value: object) -> bool:
    """Whether values cannot be read, because a transformation is being traced."""
    return isinstance(value, Tracer)


def check_count(name: str, value: int, low: int, high: int | None = None) -> None:
    """Refuse a size outside [low, high]."""
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name}: expected a whole number {bounds}, got {value}")


def check_positive(name: str, value: float | int | Array) -> None:
    """Refuse a number that is not positive and finite; an array's values are not looked at."""
    if not isinstance(value, jax.Array) and not 0 < value < math.inf:
        raise InputError(f"{name}: expected a positive finite number, got {value}")


def check_floating(name: str, array: Array) -> None:
    """Refuse an array that is not floating point."""
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"{name}: expected a floating-point array, got dtype {dtype}")


def check_maps_alike(
    name: str, claim: str, function: Callable[[Array], Array], like: Array
) -> None:
    """Refuse a function whose result differs from its argument in shape or dtype.

    Args:
        name: what the function is called by the caller.
        claim: what is expected of it in words, such as ``"f(x) like x"``.
        function: not computed, only its result's shape and dtype.
        like: an argument.
    """
    out = jax.eval_shape(function, like)
    if not hasattr(out, "shape") or out.shape != like.shape or out.dtype != like.dtype:
        found = f"{out.dtype}{list(out.shape)}" if hasattr(out, "shape") else type(out).__name__
        expected = f"{claim}, {like.dtype}{list(like.shape)}"
        raise InputError(f"{name}: expected {expected}, got {found}")
