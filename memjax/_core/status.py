"""Outcome codes: failure is a value, small enough to live inside a jitted result."""

import enum

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Status(enum.IntEnum):
    """What became of one row or one estimate.

    Results computed under ``jit`` carry the integer; tables and messages carry ``label``.
    ``OK`` is zero, so ``status == 0`` (or ``not status``) reads as success. Codes are stable:
    new ones are appended, none is renumbered.
    """

    OK = 0
    """The value is what its docstring says."""
    NONFINITE = 1
    """A NaN or an infinity appeared in the input or in a network product."""
    UNDEFINED = 2
    """The quantity does not exist at this point (for example p < 2 at a zero of the score)."""
    NOT_CONVERGED = 3
    """An iteration ended on its budget; the error bound is valid but wider than asked for."""
    BREAKDOWN = 4
    """A Krylov space closed early; what was found is exact, and there is no more to find."""
    MAX_STEPS = 5
    """A solver used up its steps before the end of its interval."""
    INPUT_CORRUPT = 6
    """The row's file could not be read as an image, or its pixels are not finite."""
    INPUT_MISMATCH = 7
    """The row was read but does not fit: wrong size, channels or dtype."""
    INDEFINITE = 8
    """A method for positive semi-definite operators met a negative direction."""

    @property
    def label(self) -> str:
        """Lower-case name, as written into tables."""
        return self.name.lower()


def finite_status(*arrays: Float[Array, "..."]) -> Int[Array, ""]:
    """``Status.OK`` if every entry of every array is finite, else ``Status.NONFINITE``.

    Args:
        *arrays: any number of floating-point arrays.

    Returns:
        An int32 scalar, usable under ``jit`` and ``vmap``.
    """
    ok = jnp.asarray(True)
    for array in arrays:
        ok = ok & jnp.all(jnp.isfinite(array))
    return jnp.where(ok, jnp.int32(Status.OK), jnp.int32(Status.NONFINITE))
