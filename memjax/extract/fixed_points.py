"""Fixed points of the denoiser: the images that a model gives back unchanged.

The denoiser D(x) = E[x0 | x] = x + sigma^2 s(x, sigma) at one noise level sigma is a map of images
to images, and ``x <- D(x)`` is its simplest use. For an exact score this is the mean-shift
iteration on p_sigma, the data smoothed by noise sigma, and all of the following is exact.

- **What stays.** D(x) = x where s = 0: the modes, saddles and minima of p_sigma.
- **It climbs.** M = dD/dx = Cov[x0 | x] / sigma^2 is positive semi-definite, so log p_sigma(x) +
  |x|^2 / 2 sigma^2 is convex, and its tangent at x gives

      log p_sigma(D(x)) >= log p_sigma(x) + |D(x) - x|^2 / (2 sigma^2).

  The density rises at every step, by an amount that the residual |D(x) - x| bounds from below;
  so the residuals are square-summable, and there are no cycles.
- **What attracts.** A fixed point is stable if the spectral radius of M there, the largest share
  of noise that one denoising leaves in a direction, is below 1: that is a strict mode. The error
  then shrinks by that factor with every step. Where |M| <= q < 1 on the ball around x of radius
  |D(x) - x| / (1 - q), there is exactly one fixed point in that ball (Banach).
- **Stored images attract at once.** For the density of a training set (``memjax.Empirical``) M is
  about 0 near an image y that is far from the others in units of sigma, and |D(y) - y| is at most
  the distance of the farthest image times the posterior weight of all others, which is of order
  exp(-(distance to the nearest)^2 / 2 sigma^2): one step arrives. As sigma falls the basin of an
  image becomes its Voronoi cell. Of two images of equal weight it is the half-space nearer to it
  at every sigma; nearer to each other than 2 sigma, they share one fixed point, their mean.
- **What was learned in general hardly moves.** For a Gaussian of covariance C the only fixed point
  is the mean, M = C (C + sigma^2 I)^-1, and a direction of variance v contracts by the factor
  v / (v + sigma^2): next to nothing where the noise is small against the data.

So a few dozen steps carry samples to the nearest stored image, where there is one, and leave the
others about where they were. A learned score is not an exact gradient; its M may have negative or
complex eigenvalues and the iteration may cycle or diverge, which the status of a start then shows.
Noise levels of a tenth to a fifth of the data's standard deviation reach the most images.

No acceleration is offered. Where an image is stored M is about 0, and plain steps are nearly the
best there are. Steps omega (D(x) - x) with 0 < omega < 2 do keep the stable fixed points of an
exact score (every eigenvalue m of M in [0, 1) gives |1 - omega (1 - m)| < 1), but move the bounds
between their basins and so the hits, and can destabilize those of a learned one.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from memjax._core.checks import check_count, check_floating, check_positive
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.calculus.linearization import linearize
from memjax.diffusion.adapters import callable_pytree
from memjax.diffusion.combine import Score
from memjax.linalg.arnoldi import eigs

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""

DENSE_SIZE = 256
"""Dimension up to which the spectrum of M is found from the whole matrix."""


class FixedPoints(NamedTuple):
    """Where the iteration went from n starts.

    Attributes:
        points: the last iterate of every start; NaN where the score was not finite.
        residual: |D(x) - x| of that point itself, L2; NaN where not finite.
        num_steps: steps taken.
        status: ``OK`` (residual within the tolerance), ``NOT_CONVERGED`` or ``NONFINITE``.
        cost: network products of every start, one forward evaluation a step and one for the last
            residual.
    """

    points: Float[Array, "n ..."]
    residual: Float[Array, " n"]
    num_steps: Int[Array, " n"]
    status: Int[Array, " n"]
    cost: Cost


class Stability(NamedTuple):
    """How strongly n fixed points attract.

    Attributes:
        radius: spectral radius of M = dD/dx, the factor by which an error shrinks with every
            step in the end; below 1 the point is stable. NaN where not finite.
        status: ``OK``, ``NOT_CONVERGED`` (the largest eigenvalue found has a residual above the
            tolerance, and the true radius may be larger) or ``NONFINITE``.
        cost: network products of all points together.
    """

    radius: Float[np.ndarray, "n"]
    status: Int[np.ndarray, "n"]
    cost: Cost


class _Iterate(NamedTuple):
    x: Float[Array, "..."]
    denoised: Float[Array, "..."]
    residual: Float[Array, ""]
    num_steps: Int[Array, ""]


def find_fixed_points(
    score: Score,
    starts: Float[Array, "n ..."],
    sigma: float | int,
    *,
    conditions: PyTree = None,
    num_steps: int = 50,
    tolerance: float | int = 1e-3,
    chunk_size: int = 128,
    progress: Progress | None = None,
) -> FixedPoints:
    """Iterate x <- D(x) = x + sigma^2 s(x, sigma) from every start until it stands still.

    A start has converged when |D(x) - x| <= ``tolerance`` sigma in L2 norm over all coordinates;
    it then stops counting, and changes no more, while others go on. The module's docstring says
    what the fixed points are, which of them attract, and how fast.

    Args:
        score: callable ``(x, sigma, condition) -> s``, such as a `Model`; its weights are
            arguments of the compiled program.
        starts: one a row, such as samples of the model (``memjax.sample``).
        sigma: noise level in the score's units, > 0. Traced: another one compiles nothing.
        conditions: pytree of arrays with a leading axis of n, or ``None``.
        num_steps: steps allowed. Traced.
        tolerance: residual relative to sigma, >= 0: a norm of the score sigma |s|. In float32
            about 1e-6 |x| / sigma is the least that can be asked for.
        chunk_size: starts computed together. Static.
        progress: called as ``progress(done, n)`` after every chunk.

    Returns:
        `FixedPoints`, one entry a start.

    Raises:
        InputError: an argument out of range, or conditions without one row per start.

    Without raising: a start that is not finite, or comes to a NaN, gets ``NONFINITE`` and changes
    no other; one that is still moving after ``num_steps`` gets ``NOT_CONVERGED``. A start that
    happens to lie at an unstable fixed point is ``OK`` and stays; `measure_stability` tells.

    Accuracy and cost: at most ``num_steps`` + 1 evaluations a start; a chunk runs as long as its
    slowest start. Deterministic; at a fixed chunk size a row is bitwise the same whatever rows
    stand beside it, and another chunk size changes rounding only.

    >>> import jax.numpy as jnp
    >>> import memjax as mj
    >>> stored = mj.Empirical(jnp.array([[-1.0], [1.0]]))
    >>> found = find_fixed_points(stored, jnp.array([[-0.4], [3.0]]), 0.3)
    >>> found.points.round(3).tolist(), found.status.tolist()
    ([[-1.0], [1.0]], [0, 0])

    References:
        Cheng (1995), Mean shift, mode seeking, and clustering, doi:10.1109/34.400568. Carreira-
        Perpinan (2007), Gaussian mean-shift is an EM algorithm, doi:10.1109/TPAMI.2007.1057
        (ascent, linear rate, the Jacobian as a covariance).
    """
    score = callable_pytree(score, "score")
    check_count("num_steps", num_steps, 0)
    if not tolerance >= 0:
        raise InputError(f"tolerance: expected a number of at least 0, got {tolerance}")
    scalars = _scalars("starts", starts, sigma, tolerance)
    found = []
    for done, xs, given in _chunks(starts, conditions, chunk_size):
        found.append(_iterate_chunk(score, xs, given, *scalars, jnp.int32(num_steps)))
        _report(progress, found[-1], done, len(starts))
    return _joined(found, len(starts))


def polish(
    score: Score,
    samples: Float[Array, "n ..."],
    sigma: float | int,
    *,
    conditions: PyTree = None,
    num_steps: int = 20,
    chunk_size: int = 128,
    progress: Progress | None = None,
) -> Float[Array, "n ..."]:
    """Take ``num_steps`` steps x <- D(x) = x + sigma^2 s(x, sigma) from every sample.

    The iteration of `find_fixed_points` without a stopping rule: to clean samples, guided ones
    or those that are to be clustered, of what is not stored.

    Args:
        score: callable ``(x, sigma, condition) -> s``, such as a `Model`.
        samples: one a row.
        sigma: noise level in the score's units, > 0. Traced.
        conditions: pytree of arrays with a leading axis of n, or ``None``.
        num_steps: steps. Traced.
        chunk_size: samples computed together. Static.
        progress: called as ``progress(done, n)`` after every chunk.

    Returns:
        The polished samples; a row is NaN where the score is. No error is raised.

    Raises:
        InputError: an argument out of range, or conditions without one row per sample.

    Cost: ``num_steps`` evaluations a sample.

    >>> import jax.numpy as jnp
    >>> import memjax as mj
    >>> stored = mj.Empirical(jnp.array([[-1.0], [1.0]]))
    >>> polish(stored, jnp.array([[-0.4], [3.0]]), 0.3, num_steps=3).round(3).tolist()
    [[-1.0], [1.0]]
    """
    score = callable_pytree(score, "score")
    check_count("num_steps", num_steps, 0)
    (level,) = _scalars("samples", samples, sigma)
    found = []
    for done, xs, given in _chunks(samples, conditions, chunk_size):
        found.append(_polish_chunk(score, xs, given, level, jnp.int32(num_steps)))
        _report(progress, found[-1], done, len(samples))
    return _joined(found, len(samples))


def measure_stability(
    score: Score,
    points: Float[Array, "n ..."],
    sigma: float | int,
    *,
    key: int | PRNGKeyArray,
    conditions: PyTree = None,
    tol: float = 1e-3,
    num_products: int = 64,
    chunk_size: int = 16,
    progress: Progress | None = None,
) -> Stability:
    """Spectral radius of M = dD/dx = I + sigma^2 ds/dx at every fixed point.

    Up to 256 dimensions the whole matrix is computed and its eigenvalues found; beyond, the
    largest by Arnoldi's method (``memjax.eigs``).

    Args:
        score: callable ``(x, sigma, condition) -> s``, such as a `Model`.
        points: one a row.
        sigma: noise level in the score's units, > 0. Traced.
        key: a seed or a typed key, for the starting vectors beyond 256 dimensions.
        conditions: pytree of arrays with a leading axis of n, or ``None``.
        tol: residual at which Arnoldi's eigenvalue has converged, relative to |M| or absolute:
            M has no unit, and what matters is the distance from 1. Static.
        num_products: Arnoldi's budget. Static.
        chunk_size: points computed together. Static.
        progress: called as ``progress(done, n)`` after every chunk.

    Returns:
        `Stability`, one entry a point.

    Raises:
        InputError: an argument out of range, or conditions without one row per point.

    Accuracy and cost: exact up to rounding with one forward evaluation and d jvps; beyond 256
    dimensions one and at most ``num_products`` jvps, with the status saying what is certain.

    >>> import jax.numpy as jnp
    >>> import memjax as mj
    >>> normal = mj.Gaussian(jnp.zeros(2), jnp.array([1.0, 3.0]))
    >>> measure_stability(normal, jnp.zeros((1, 2)), 1.0, key=0).radius.round(3).tolist()
    [0.75]
    """
    score = callable_pytree(score, "score")
    (level,) = _scalars("points", points, sigma)
    n, d = len(points), int(np.prod(points.shape[1:], dtype=int))
    check_count("num_products", num_products, 1)
    key = derive_key(key, "stability")
    parts = []
    for done, xs, given in _chunks(points, conditions, chunk_size):
        if d <= DENSE_SIZE:
            parts.append(_dense_radius(_jacobian_chunk(score, xs, given, level)))
        else:
            rows = jnp.arange(done - chunk_size, done, dtype=jnp.int32)
            parts.append(
                _arnoldi_chunk(
                    score, xs, given, level, rows, key, tol=tol, num_products=num_products
                )
            )
        _report(progress, parts[-1], done, n)
    radius, status, jvps = (np.asarray(part) for part in _joined(parts, n))
    return Stability(radius, status, Cost(forward=n, jvp=int(jvps.sum())))


def _denoise(
    score: Score, x: Float[Array, "..."], condition: PyTree, sigma: Float[Array, ""]
) -> Float[Array, "..."]:
    return x + sigma**2 * score(x, sigma, condition)


@jax.jit
def _iterate_chunk(score, xs, conditions, sigma, tolerance, num_steps) -> FixedPoints:
    def look(x, condition, count) -> _Iterate:
        denoised = _denoise(score, x, condition, sigma)
        return _Iterate(x, denoised, jnp.linalg.norm((denoised - x).reshape(-1)), count)

    def moving(residual):  # false for NaN, which stops at once
        return (residual > tolerance * sigma) & (residual < jnp.inf)

    def one(x, condition) -> FixedPoints:
        last = jax.lax.while_loop(
            lambda now: moving(now.residual) & (now.num_steps < num_steps),
            lambda now: look(now.denoised, condition, now.num_steps + 1),
            look(x, condition, jnp.int32(0)),
        )
        finite = jnp.isfinite(last.residual)
        status = jnp.where(moving(last.residual), Status.NOT_CONVERGED, Status.OK)
        return FixedPoints(
            points=jnp.where(finite, last.x, jnp.nan),
            residual=jnp.where(finite, last.residual, jnp.nan),
            num_steps=last.num_steps,
            status=jnp.where(finite, status, Status.NONFINITE).astype(jnp.int32),
            cost=Cost(forward=last.num_steps + 1, jvp=jnp.int32(0), vjp=jnp.int32(0)),
        )

    return jax.vmap(one)(xs, conditions)


@jax.jit
def _polish_chunk(score, xs, conditions, sigma, num_steps) -> Float[Array, "n ..."]:
    def one(x, condition):
        def step(_, x):
            return _denoise(score, x, condition, sigma)

        return jax.lax.fori_loop(jnp.int32(0), num_steps, step, x)

    return jax.vmap(one)(xs, conditions)


@jax.jit
def _jacobian_chunk(score, xs, conditions, sigma) -> Float[Array, "n d d"]:
    def one(x, condition):
        lin = linearize(lambda x: _denoise(score, x, condition, sigma), x)
        return jnp.where(jnp.all(jnp.isfinite(lin.value)), lin.jacobian(), jnp.nan)

    return jax.vmap(one)(xs, conditions)


def _dense_radius(jacobians: Float[Array, "n d d"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spectral radius, status and jvps of every matrix."""
    matrices = np.asarray(jacobians, np.float64)
    finite = np.isfinite(matrices).all(axis=(1, 2))
    radius = np.full(len(matrices), np.nan)
    if finite.any():
        radius[finite] = np.abs(np.linalg.eigvals(matrices[finite])).max(axis=1)
    status = np.where(finite, Status.OK, Status.NONFINITE).astype(np.int32)
    return radius, status, np.full(len(matrices), matrices.shape[1], np.int32)


@partial(jax.jit, static_argnames=("tol", "num_products"))
def _arnoldi_chunk(score, xs, conditions, sigma, rows, key, *, tol: float, num_products: int):
    """Spectral radius, status and jvps of every point."""

    def one(x, condition, row):
        lin = linearize(lambda x: _denoise(score, x, condition, sigma), x)
        found = eigs(lin.jvp, x, derive_key(key, row), 1, tol=tol, num_products=num_products)
        # eigs' tolerance is relative; where M is about 0, a small residual is enough.
        small = found.converged[0] | (found.residuals[0] <= tol)
        status = jnp.where(small, Status.OK, Status.NOT_CONVERGED)
        radius = jnp.where(jnp.all(jnp.isfinite(lin.value)), jnp.abs(found.values[0]), jnp.nan)
        status = jnp.where(jnp.isnan(radius), Status.NONFINITE, status).astype(jnp.int32)
        return radius, status, found.num_products

    return jax.vmap(one)(xs, conditions, rows)


def _scalars(
    name: str, rows: Float[Array, "n ..."], sigma: float | int, *others: float | int
) -> tuple[Float[Array, ""], ...]:
    """Sigma and other numbers in the dtype of the rows; refuses what is no row, or no sigma."""
    check_floating(name, rows)
    check_count(name, len(rows), 1)
    check_positive("sigma", sigma)
    return tuple(jnp.asarray(float(value), rows.dtype) for value in (sigma, *others))


def _chunks(
    rows: Float[Array, "n ..."], conditions: PyTree, chunk_size: int
) -> Iterator[tuple[int, Array, PyTree]]:
    """(rows done after it, rows, conditions) of every chunk, the last filled up with its last."""
    n = len(rows)
    check_count("chunk_size", chunk_size, 1)
    for leaf in jax.tree.leaves(conditions):
        if jnp.ndim(leaf) < 1 or leaf.shape[0] != n:
            raise InputError(
                f"conditions: expected {n} rows, one for each, got shape {jnp.shape(leaf)}"
            )
    for start in range(0, n, chunk_size):
        present = np.minimum(np.arange(start, start + chunk_size), n - 1)
        yield (
            start + chunk_size,
            jnp.asarray(rows)[present],
            jax.tree.map(lambda leaf, present=present: jnp.asarray(leaf)[present], conditions),
        )


def _joined(parts: list, n: int):
    """The chunks' results end to end, without the filling."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:n], *parts)


def _report(progress: Progress | None, part: PyTree, done: int, n: int) -> None:
    if progress is not None:
        jax.block_until_ready(part)
        progress(min(done, n), n)
