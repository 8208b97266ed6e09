"""Extraction candidates without training data: the attractors of the denoiser, ranked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.diffusion.combine import Score
from memjax.evaluate.distances import group_duplicates
from memjax.extract.fixed_points import (
    FixedPoints,
    Progress,
    find_fixed_points,
    measure_stability,
)

_DIGITS = 3
"""Radii that agree to so many digits after the point are one in the ranking."""


class Attractors(NamedTuple):
    """Distinct fixed points, the most attracting first.

    Attributes:
        points: one image a row: of the starts that came to it, where the residual was least.
        hits: starts that came to it.
        radius: spectral radius of dD/dx there, the share of an error that a step leaves; NaN
            where it could not be found.
        stable: radius below 1, and found for certain.
        residual: |D(x) - x| of the point.
        status: of the radius, as in ``Stability``.
        label: per start the row of its attractor; -1 where the start came to none.
        fixed_points: what became of every start.
        cost: network products in all.
    """

    points: Float[np.ndarray, "k ..."]
    hits: Int[np.ndarray, "k"]
    radius: Float[np.ndarray, "k"]
    stable: Bool[np.ndarray, "k"]
    residual: Float[np.ndarray, "k"]
    status: Int[np.ndarray, "k"]
    label: Int[np.ndarray, "n"]
    fixed_points: FixedPoints
    cost: Cost


def find_attractors(
    score: Score,
    starts: Float[Array, "n ..."],
    sigma: float | int,
    *,
    key: int | PRNGKeyArray,
    conditions: PyTree = None,
    num_steps: int = 200,
    tolerance: float | int = 1e-3,
    merge: float | int = 0.5,
    chunk_size: int = 128,
    progress: Progress | None = None,
) -> Attractors:
    """Find where x <- D(x; sigma) comes to rest, and rank these points as stored images.

    Every start is iterated (`find_fixed_points`); those that converged are grouped by distance,
    so that a group is one fixed point; the spectral radius of the denoiser's Jacobian at each
    says how firmly it attracts (`measure_stability`). No training image is needed.

    Ranked are the points by ascending radius, those that agree in it to 0.001 by descending hits,
    and last those whose radius could not be found. A stored image pins its surroundings, which is
    what the radius measures; hits measure the size of the basin as well, and with it how common
    the image looks.

    Args:
        score: callable ``(x, sigma, condition) -> s``, such as a `Model`.
        starts: one a row, such as samples of the model (``memjax.sample``).
        sigma: noise level in the score's units, > 0.
        key: a seed or a typed key, used beyond 256 dimensions only.
        conditions: pytree of arrays with a leading axis of n, or ``None``. An attractor is then
            examined under the condition of the start that represents it.
        num_steps: steps allowed.
        tolerance: residual, relative to sigma, at which a start has converged.
        merge: fixed points linked by steps of at most this, relative to sigma, are one: more than
            the error of a converged start, tolerance / (1 - radius), and less than 2, nearer to
            each other than which two stored images share one attractor.
        chunk_size: starts computed together. Static.
        progress: called as ``progress(done, n)`` after every chunk of starts.

    Returns:
        `Attractors`; none (k = 0) if no start converged.

    Raises:
        InputError: an argument out of range, or conditions without one row per start.

    Cost: at most ``num_steps`` + 1 evaluations a start; for each attractor one evaluation and d
    jvps (up to 256 dimensions) or at most 64; and the distances between all that converged, in
    bounded memory (``memjax.evaluate.group_duplicates``).

    >>> import jax.numpy as jnp
    >>> import memjax as mj
    >>> stored = mj.Empirical(jnp.array([[-1.0], [1.0], [3.0]]), [0.25, 0.5, 0.25])
    >>> found = find_attractors(stored, jnp.array([[-0.7], [0.4], [1.2], [1.5]]), 0.3, key=0)
    >>> found.points.round(3).tolist(), found.hits.tolist(), found.label.tolist()
    ([[1.0], [-1.0]], [3, 1], [1, 0, 0, 0])
    """
    _check_merge(merge)
    found = find_fixed_points(
        score,
        starts,
        sigma,
        conditions=conditions,
        num_steps=num_steps,
        tolerance=tolerance,
        chunk_size=chunk_size,
        progress=progress,
    )
    return rank_attractors(score, found, sigma, key=key, conditions=conditions, merge=merge)


def rank_attractors(
    score: Score,
    found: FixedPoints,
    sigma: float | int,
    *,
    key: int | PRNGKeyArray,
    conditions: PyTree = None,
    merge: float | int = 0.5,
    chunk_size: int = 16,
    progress: Progress | None = None,
) -> Attractors:
    """Group fixed points that were found before, and rank them: the second half of the above.

    Args:
        score: callable ``(x, sigma, condition) -> s``, such as a `Model`.
        found: as ``find_fixed_points`` gives it, at this ``sigma``.
        sigma: noise level in the score's units, > 0.
        key: a seed or a typed key, used beyond 256 dimensions only.
        conditions: those of the starts.
        merge: as for ``find_attractors``.
        chunk_size: attractors examined together. Static.
        progress: called as ``progress(done, k)`` after every chunk of attractors.

    Returns:
        `Attractors`.

    Raises:
        InputError: an argument out of range.

    >>> import jax.numpy as jnp
    >>> import memjax as mj
    >>> stored = mj.Empirical(jnp.array([[-1.0], [1.0], [3.0]]), [0.25, 0.5, 0.25])
    >>> found = find_fixed_points(stored, jnp.array([[-0.7], [0.4], [1.2]]), 0.3)
    >>> rank_attractors(stored, found, 0.3, key=0).hits.tolist()
    [2, 1]
    """
    _check_merge(merge)
    residual = np.asarray(found.residual)
    reached = np.flatnonzero(np.asarray(found.status) == Status.OK)
    points = np.asarray(found.points)[reached]
    searched = Cost(forward=int(np.sum(found.cost.forward)))
    label = np.full(len(residual), -1)
    if not len(reached):
        none, zero = np.zeros(0), np.zeros(0, np.int32)
        return Attractors(points, zero, none, zero > 0, none, zero, label, found, searched)
    leader = group_duplicates(points, tolerance=float(merge * sigma))
    _, group, hits = np.unique(leader, return_inverse=True, return_counts=True)
    order = np.lexsort((residual[reached], group))
    first = order[np.searchsorted(group[order], np.arange(len(hits)))]
    chosen = reached[first]
    radius, status, cost = measure_stability(
        score,
        jnp.asarray(points[first]),
        sigma,
        key=key,
        conditions=jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], conditions),
        chunk_size=chunk_size,
        progress=progress,
    )
    rank = np.lexsort((-hits, np.round(np.nan_to_num(radius, nan=np.inf), _DIGITS)))
    place = np.empty_like(rank)
    place[rank] = np.arange(len(rank))
    label[reached] = place[group]
    return Attractors(
        points=points[first][rank],
        hits=hits[rank],
        radius=radius[rank],
        stable=((radius < 1) & (status == Status.OK))[rank],
        residual=residual[chosen][rank],
        status=status[rank],
        label=label,
        fixed_points=found,
        cost=searched.plus(cost),
    )


def _check_merge(merge: float | int) -> None:
    if not merge >= 0:
        raise InputError(f"merge: expected a number of at least 0, got {merge}")
