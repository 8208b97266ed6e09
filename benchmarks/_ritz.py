"""What a Krylov solver should find after a fixed number of products: float64, on the host."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np


def hessenberg(product: Callable, starts, num_products: int) -> np.ndarray:
    """V A V^T of every point in float64: Gram-Schmidt twice, products one by one.

    Args:
        product: A on a batch of arrays, one operator a row.
        starts: first vectors of norm 1, batch first.
        num_products: columns.

    Returns:
        [batch, num_products, num_products].
    """
    batch = len(starts)
    basis = np.zeros((batch, num_products + 1, starts[0].size))
    basis[:, 0] = np.asarray(starts, np.float64).reshape(batch, -1)
    out = np.zeros((batch, num_products + 1, num_products))
    for j in range(num_products):
        v = jnp.asarray(basis[:, j], starts.dtype).reshape(starts.shape)
        w = np.asarray(product(v), np.float64).reshape(batch, -1)
        for _ in range(2):
            along = np.einsum("bmd,bd->bm", basis[:, : j + 1], w)
            w -= np.einsum("bm,bmd->bd", along, basis[:, : j + 1])
            out[:, : j + 1, j] += along
        out[:, j + 1, j] = np.linalg.norm(w, axis=1)
        basis[:, j + 1] = w / out[:, j + 1, j, None]
    return out[:, :num_products]


def largest_modulus(projected: np.ndarray, pairs: int) -> np.ndarray:
    """Moduli of the largest eigenvalues, because conjugates may come in either order."""
    return -np.sort(-np.abs(np.linalg.eigvals(projected)), axis=1)[:, :pairs]


def both_ends(ritz, pairs: int) -> np.ndarray:
    """Half of the values from either end of an ascending list."""
    return np.concatenate([ritz[:, : pairs // 2], ritz[:, -pairs // 2 :]], axis=1)


def relative_error(found, expected) -> float:
    """Largest deviation in units of the largest entry expected."""
    return float(np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected)))
