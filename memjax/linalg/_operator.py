"""What a linear operator is here: a function of arrays of one shape; and its checks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax._core.errors import InputError

Matvec = Callable[[Float[Array, "..."]], Float[Array, "..."]]


def check_like(like: Array) -> None:
    """Refuse an example array that is empty or not floating point."""
    if not jnp.issubdtype(jnp.result_type(like), jnp.floating):
        raise InputError(f"like: expected a floating-point array, got dtype {like.dtype}")
    if like.size == 0:
        raise InputError(f"like: expected at least one entry, got shape {list(like.shape)}")


def check_matvec(matvec: Matvec, like: Array, name: str = "matvec") -> None:
    """Refuse an operator whose product differs from its argument in shape or dtype."""
    check_like(like)
    out = jax.eval_shape(matvec, like)
    if not hasattr(out, "shape") or out.shape != like.shape or out.dtype != like.dtype:
        found = f"{out.dtype}{list(out.shape)}" if hasattr(out, "shape") else type(out).__name__
        expected = f"{like.dtype}{list(like.shape)}"
        raise InputError(f"{name}: expected A v like v, {expected}, got {found}")


def check_count(name: str, value: int, low: int, high: int | None = None) -> None:
    """Refuse a size outside [low, high]."""
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name}: expected a whole number {bounds}, got {value}")
