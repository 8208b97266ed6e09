"""Randomness by name: a key depends on what it is for, never on the order of work."""

import zlib

import jax
from jaxtyping import Array, Int, PRNGKeyArray


def derive_key(root: int | PRNGKeyArray, *purpose: str | int | Int[Array, ""]) -> PRNGKeyArray:
    """Derive the key for one purpose from a seed.

    ``derive_key(seed, "noise", draw)`` is the same number whatever else was drawn before, in
    which chunk, and on which device: names and indices are folded in one after the other
    (strings by CRC-32, which is stable across processes and Python versions).

    Args:
        root: a seed in [0, 2^32) or a typed key (``jax.random.key``).
        *purpose: names (static) and indices (static or traced), outermost first.

    Returns:
        A typed key.
    """
    key = jax.random.key(root) if isinstance(root, int) else root
    for part in purpose:
        data = zlib.crc32(part.encode()) if isinstance(part, str) else part
        key = jax.random.fold_in(key, data)
    return key
