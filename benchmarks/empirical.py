"""The score of a training set: one pass over the points against whole matrices.

``Empirical`` reads the points in blocks and keeps running posterior sums. The twins hold every
difference x - y_i at once (JAX and NumPy), or use |x|^2 - 2 x.y + |y|^2, which is faster for many
x and loses digits: its error is recorded too.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, Program
from memjax._core.keys import derive_key
from memjax.densities.empirical import Empirical

SIZES = {"full": (50_000, 3072), "quick": (2_000, 256)}
SIGMA = 0.05
METHODS = ("memjax", "jax-matrix", "jax-product-form", "numpy-matrix")


def _score(density, x):
    return density.score(x, SIGMA)


def _jax_matrix(points, x):
    squares = jnp.sum((points - x[None]) ** 2, axis=1)
    return (jax.nn.softmax(-squares / (2 * SIGMA**2)) @ points - x) / SIGMA**2


def _product_form(points, x):
    squares = jnp.sum(points**2, axis=1) - 2 * points @ x + jnp.sum(x**2)
    return (jax.nn.softmax(-squares / (2 * SIGMA**2)) @ points - x) / SIGMA**2


def _numpy_matrix(points, x):
    logits = -np.sum((points - x) ** 2, axis=1) / (2 * SIGMA**2)
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum() @ points - x) / SIGMA**2


def _reference(points, x, block=256):
    """Float64, in blocks."""
    x = np.asarray(x, np.float64)
    logits = np.concatenate(
        [
            -np.sum((points[i : i + block].astype(np.float64) - x) ** 2, axis=1) / (2 * SIGMA**2)
            for i in range(0, len(points), block)
        ]
    )
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    mean = sum(
        weights[i : i + block] @ points[i : i + block].astype(np.float64)
        for i in range(0, len(points), block)
    )
    return (mean - x) / SIGMA**2


def _case(method: str, quick: bool, seed: int) -> Program:
    n, d = SIZES["quick" if quick else "full"]
    rng = np.random.default_rng(seed)
    # Far from zero, as pixels are, and near one another, so that many share the posterior.
    spread = np.float32(1.5 * SIGMA / d**0.5)
    points = np.float32(0.5) + spread * rng.standard_normal((n, d), np.float32)
    noise = np.asarray(jax.random.normal(derive_key(seed, "noise"), (d,)))
    x = points[0] + np.float32(SIGMA) * noise
    expected = _reference(points, x)
    run, arguments = {
        "memjax": lambda: (_score, (Empirical(points), jnp.asarray(x))),
        "jax-matrix": lambda: (_jax_matrix, (jnp.asarray(points), jnp.asarray(x))),
        "jax-product-form": lambda: (_product_form, (jnp.asarray(points), jnp.asarray(x))),
        "numpy-matrix": lambda: (_numpy_matrix, (points, x)),
    }[method]()
    return Program(
        run,
        arguments,
        lambda out: float(np.max(np.abs(np.asarray(out) - expected)) / np.max(np.abs(expected))),
        1e-3,
        parameters={"points": n, "dimension": d, "sigma": SIGMA},
        jit=method != "numpy-matrix",
    )


def cases() -> list[Case]:
    """One score at one x, by each method."""
    return [Case(f"empirical/{method}", partial(_case, method)) for method in METHODS]
