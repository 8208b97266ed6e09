"""Distances between images: nearest neighbors, duplicates, and the rule for a copy."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from memjax._core.errors import InputError
from memjax.evaluate.intervals import check_open_unit

# float64 entries of one block (64 MiB); the temporary arrays are a few of these.
_BLOCK = 2**23
_MAX_WIDTH = 2**14
# Rounding can swap candidates at nearly equal distance: keep a few to spare until the exact ones
# are known.
_SPARE = 4


class Neighbors(NamedTuple):
    """The k nearest points of each query, nearest first.

    Attributes:
        index: row numbers of the points; -1 for a query that is not finite.
        distance: L2 distances, float64; NaN for a query that is not finite.
    """

    index: Int[np.ndarray, "q k"]
    distance: Float[np.ndarray, "q k"]


class CopyResult(NamedTuple):
    """Which samples copy which images.

    Attributes:
        nearest: per sample, the row number of the nearest image (the first of its duplicates);
            -1 for a sample that is not finite.
        d1: L2 distance to it.
        d2: L2 distance to the nearest image that is not a duplicate of it.
        is_copy: d1 < ratio * d2, per sample.
        hits: per image, the number of samples that copy it; duplicates share their hits.
    """

    nearest: Int[np.ndarray, "m"]
    d1: Float[np.ndarray, "m"]
    d2: Float[np.ndarray, "m"]
    is_copy: Bool[np.ndarray, "m"]
    hits: Int[np.ndarray, "n"]


def nearest_neighbors(
    queries: Float[np.ndarray, "q ..."],
    points: Float[np.ndarray, "n ..."],
    k: int = 1,
    *,
    scale: Float[np.ndarray, "n"] | None = None,
) -> Neighbors:
    """The k points nearest to each query in L2 distance over all entries.

    Args:
        queries: arrays of one shape.
        points: arrays of the same shape; those with a NaN or infinite entry are nobody's
            neighbor.
        k: neighbors per query, 1 to the number of finite points.
        scale: one positive finite number per point, by which its distances are divided before
            they are compared and returned; ``None`` for 1.

    Returns:
        `Neighbors`, points at equal distance in row order. Where more than k + 4 points share
        the k-th distance, any of them may be returned.

    Raises:
        InputError: different shapes, or fewer than k finite points.

    Accuracy and cost:
        k + 4 candidates are found by |q|^2 + |p|^2 - 2 q.p in float64 about a center of the
        points; the distances returned are recomputed from the differences, so equal images are at
        exactly 0 and the relative error is that of float64. 2 q n d operations, a few blocks of
        64 MiB beside a copy of the inputs.
    """
    rows = np.flatnonzero(finite_rows(points))
    divisor = None if scale is None else scale.astype(np.float64)[rows]

    def estimate(q, p, columns):
        squared = squared_distances(q, p)
        return squared if divisor is None else squared / np.square(divisor[columns])

    def exact(q, p, columns):
        distance = _distance(q, p)
        return distance if divisor is None else distance / divisor[columns]

    return _nearest(queries, points, rows, k, estimate, exact)


def nearest_by_tile(
    queries: Float[np.ndarray, "q ..."],
    points: Float[np.ndarray, "n ..."],
    tiles: Int[np.ndarray, "..."],
    k: int = 1,
) -> Neighbors:
    """The k points whose most different tile is least different from the query's.

        distance(q, p) = max over tiles t of sqrt(mean over the entries i of t of (q_i - p_i)^2)

    Args:
        queries: arrays of one shape.
        points: arrays of the same shape; those with a NaN or infinite entry are nobody's
            neighbor.
        tiles: the number of the tile of every entry, in the shape of one array.
        k: neighbors per query, 1 to the number of finite points.

    Returns:
        As for `nearest_neighbors`, with this distance.

    Raises:
        InputError: different shapes, or fewer than k finite points.

    Accuracy and cost:
        As for `nearest_neighbors`, whose arithmetic is spread over the tiles.
    """
    if tiles.shape != points.shape[1:]:
        raise InputError(
            f"tiles: expected the points' shape {points.shape[1:]}, found {tiles.shape}"
        )
    parts = [np.flatnonzero(tiles.ravel() == tile) for tile in np.unique(tiles)]

    def worst(measure, q, p):
        found = measure(q[:, parts[0]], p[:, parts[0]]) / len(parts[0])
        for part in parts[1:]:
            np.maximum(found, measure(q[:, part], p[:, part]) / len(part), out=found)
        return found

    def estimate(q, p, columns):
        return worst(squared_distances, q, p)

    def exact(q, p, columns):
        return np.sqrt(worst(_squared_distance, q, p))

    return _nearest(queries, points, np.flatnonzero(finite_rows(points)), k, estimate, exact)


def group_duplicates(
    images: Float[np.ndarray, "n ..."], *, tolerance: float | int = 0.0
) -> Int[np.ndarray, "n"]:
    """Group images that are equal, or linked by steps of at most ``tolerance`` in L2 distance.

    Args:
        images: arrays of one shape.
        tolerance: 0 for equal entries only; above 0, groups are the connected components of the
            graph that joins images at distance <= ``tolerance``.

    Returns:
        Per image the row number of the first image of its group; -1 where it is not finite.

    Raises:
        InputError: a negative tolerance.

    Accuracy and cost:
        Equality is exact. Distances are computed as |a|^2 + |b|^2 - 2 a.b in float64 about the
        mean, so a pair whose squared distance is within about 1e-15 |x|^2 of ``tolerance``^2 may
        fall on either side. O(n d log n) for equality, 2 n^2 d operations beyond it; memory as
        for `nearest_neighbors`.
    """
    if not tolerance >= 0:
        raise InputError(f"tolerance: expected a distance of at least 0, got {tolerance}")
    group = np.full(len(images), -1, np.int64)
    rows = np.flatnonzero(finite_rows(images))
    if not len(rows):
        return group
    # Adding zero makes -0.0 equal 0.0 byte by byte; comparing bytes is faster than comparing rows.
    flat = np.ascontiguousarray(images.reshape(len(images), -1)[rows] + images.dtype.type(0))
    packed = flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1])))[:, 0]
    _, first, inverse = np.unique(packed, return_index=True, return_inverse=True)
    leader = first[inverse]
    if tolerance > 0:
        distinct = np.sort(first)
        merged = distinct[_components(flat[distinct], tolerance)]
        leader = merged[np.searchsorted(distinct, leader)]
    group[rows] = rows[leader]
    return group


def find_copies(
    samples: Float[np.ndarray, "m ..."],
    images: Float[np.ndarray, "n ..."],
    *,
    ratio: float = 1 / 3,
    tolerance: float | int = 0.0,
) -> CopyResult:
    """Find the samples that reproduce an image, by the distance-ratio rule d1 / d2 < ratio.

    d1 is the L2 distance from the sample to the nearest image and d2 that to the nearest one that
    is not a duplicate of it. Without that proviso an image that stands twice in the training set
    could never be copied, because d2 would equal d1.

    Args:
        samples: images drawn from the model.
        images: the images it was trained on, with or without repetitions.
        ratio: 1/3 in the literature.
        tolerance: images linked by steps of at most this L2 distance count as duplicates
            (`group_duplicates`), and the first of them stands for all.

    Returns:
        A `CopyResult`. Samples that are not finite are never copies; images that are not finite
        are never hit.

    Raises:
        InputError: different shapes, a ratio outside (0, 1), or fewer than two distinct images.

    Accuracy and cost:
        As `nearest_neighbors` with m queries, k = 2 and the distinct images.

    References:
        Yoon, Choi, Kwon, Ryu (2023), "Diffusion probabilistic models generalize when they fail to
        memorize", ICML workshop on structured probabilistic inference and generative modeling;
        Gu et al. (2023), arXiv:2310.02664.
    """
    check_open_unit("ratio", ratio)
    group = group_duplicates(images, tolerance=tolerance)
    distinct = np.unique(group[group >= 0])
    if len(distinct) < 2:
        raise InputError(f"images: expected at least 2 distinct images, found {len(distinct)}")
    found = nearest_neighbors(samples, images[distinct], k=2)
    nearest = np.where(found.index[:, 0] >= 0, distinct[found.index[:, 0]], -1)
    d1, d2 = found.distance[:, 0], found.distance[:, 1]
    is_copy = _quotient(d1, d2) < ratio
    hits = np.bincount(nearest[is_copy], minlength=len(images))
    return CopyResult(nearest, d1, d2, is_copy, np.where(group >= 0, hits[group], 0))


def copy_ratios(
    images: Float[np.ndarray, "n ..."],
    samples: Float[np.ndarray, "m ..."],
    reference: Float[np.ndarray, "r ..."],
) -> Float[np.ndarray, "n"]:
    """How much nearer some sample lies to an image than to every other one.

        ratio(x) = min over samples g of |g - x| / |g - y(g, x)|

    y(g, x) is the reference image nearest to g that differs from x. For an image of the reference
    set this is the quantity of `find_copies`, kept continuous: ratio(x) < 1/3 exactly where that
    rule finds a copy of x. It is also defined for an image from elsewhere.

    Args:
        images: the images in question.
        samples: images drawn from the model.
        reference: the images it was trained on, with or without repetitions.

    Returns:
        One ratio per image, >= 0; infinite where every sample lies exactly on an image other than
        x; NaN for an image that is not finite.

    Raises:
        InputError: different shapes, fewer than two distinct reference images, no finite sample.

    Accuracy and cost:
        That of `find_copies` and of `nearest_neighbors` for the images among the samples.
    """
    found = find_copies(samples, reference)
    known = found.nearest >= 0
    if not known.any():
        raise InputError("samples: expected at least one finite sample, found none")
    ratio = np.where(finite_rows(images), np.inf, np.nan)
    # Where y(g, x) is the image nearest to g: all pairs but those of a sample and its own image.
    apart = found.d1 > 0
    if apart.any():
        near = nearest_neighbors(images, samples[apart], scale=found.d1[apart])
        ratio = np.minimum(ratio, near.distance[:, 0])
    # A sample's own image: at most 1, and so never above what the other samples gave it.
    own = np.full(len(reference), np.inf)
    np.minimum.at(own, found.nearest[known], _quotient(found.d1, found.d2)[known])
    group = group_duplicates(np.concatenate([reference, images]))[len(reference) :]
    inside = (group >= 0) & (group < len(reference))
    return np.where(inside, np.fmin(ratio, own[np.where(inside, group, 0)]), ratio)


def _quotient(d1: Float[np.ndarray, "m"], d2: Float[np.ndarray, "m"]) -> Float[np.ndarray, "m"]:
    """d1 / d2, written once, so that all who compare it with a ratio agree to the last bit."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return d1 / d2


def finite_rows(images: Float[np.ndarray, "n ..."]) -> Bool[np.ndarray, "n"]:
    """Whether all entries of each row are finite."""
    return np.asarray(np.isfinite(images.reshape(len(images), -1)).all(axis=1))


def _nearest(
    queries: Float[np.ndarray, "q ..."],
    points: Float[np.ndarray, "n ..."],
    rows: Int[np.ndarray, "j"],
    k: int,
    estimate: Callable[[np.ndarray, np.ndarray, slice], np.ndarray],
    exact: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
) -> Neighbors:
    """The k best among the points ``rows``: candidates by ``estimate``, decided by ``exact``.

    ``estimate(q, p, columns)`` compares all rows of q with the points ``columns`` and orders like
    ``exact(q, p, columns)``, which compares row i of q with row i of p, the point columns[i].
    """
    if queries.shape[1:] != points.shape[1:]:
        raise InputError(
            f"queries: expected arrays of the points' shape {points.shape[1:]}, "
            f"found {queries.shape[1:]}"
        )
    if not 1 <= k <= len(rows):
        raise InputError(f"k: expected 1..{len(rows)} (the finite points), got {k}")
    good = np.flatnonzero(finite_rows(queries))
    q = queries.reshape(len(queries), -1)[good]
    p = points.reshape(len(points), -1)[rows]
    index = np.full((len(queries), k), -1, np.int64)
    distance = np.full((len(queries), k), np.nan)
    for part, blocks in _blocks(q, p, estimate):
        near = np.empty((len(q[part]), 0), np.int64)
        best = np.empty((len(q[part]), 0))
        for columns, estimates in blocks:
            chosen = _smallest(estimates, k + _SPARE)
            near = np.concatenate([near, chosen + columns.start], axis=1)
            best = np.concatenate([best, np.take_along_axis(estimates, chosen, axis=1)], axis=1)
            chosen = _smallest(best, k + _SPARE)
            near = np.take_along_axis(near, chosen, axis=1)
            best = np.take_along_axis(best, chosen, axis=1)
        value = np.stack([exact(q[part], p[column], column) for column in near.T], axis=1)
        order = np.lexsort((near, value), axis=1)[:, :k]
        index[good[part]] = rows[np.take_along_axis(near, order, axis=1)]
        distance[good[part]] = np.take_along_axis(value, order, axis=1)
    return Neighbors(index, distance)


def _squared_distance(
    a: Float[np.ndarray, "m d"], b: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "m"]:
    """Squared L2 distance of each row to its partner, from the differences."""
    with np.errstate(over="ignore"):
        difference = a.astype(np.float64) - b
        return np.einsum("ij,ij->i", difference, difference)


def _distance(a: Float[np.ndarray, "m d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m"]:
    """L2 distance of each row to its partner, from the differences."""
    return np.sqrt(_squared_distance(a, b))


def squared_distances(
    a: Float[np.ndarray, "m d"], b: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "m n"]:
    """Squared L2 distances of all rows to all rows, from their products."""
    with np.errstate(over="ignore", invalid="ignore"):
        squared = a @ b.T
        squared *= -2
        squared += np.einsum("ij,ij->i", a, a)[:, None]
        squared += np.einsum("ij,ij->i", b, b)
    return squared


def _smallest(values: Float[np.ndarray, "m n"], k: int) -> Int[np.ndarray, "m j"]:
    """Columns of the k smallest entries of each row (of all, if there are no more), unordered."""
    if values.shape[1] <= k:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(values, k - 1, axis=1)[:, :k]


def _blocks(
    a: Float[np.ndarray, "m d"],
    b: Float[np.ndarray, "n d"],
    compare: Callable[[np.ndarray, np.ndarray, slice], np.ndarray],
) -> Iterator[tuple[slice, Iterator[tuple[slice, np.ndarray]]]]:
    """``compare`` block by block: rows of ``a``, and for each an iterator over rows of ``b``.

    Both are moved to one center, so that an offset common to all images does not cancel digits
    (the median: a few huge rows do not move it).
    """
    d = max(1, a.shape[1])
    width = max(1, min(len(b), _BLOCK // d, _MAX_WIDTH))
    height = max(1, min(len(a), _BLOCK // d, _BLOCK // width))
    center = np.median(b[:64].astype(np.float64), axis=0)

    def across(left: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, len(b), width):
            columns = slice(start, min(start + width, len(b)))
            yield columns, compare(left, b[columns] - center, columns)

    for start in range(0, len(a), height):
        left = a[start : start + height] - center
        yield slice(start, start + len(left)), across(left)


def _components(points: Float[np.ndarray, "n d"], tolerance: float) -> Int[np.ndarray, "n"]:
    """First row of each point's connected component, points at <= ``tolerance`` being joined."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(points)
    first = np.arange(n)
    for part, blocks in _blocks(points, points, lambda q, p, columns: squared_distances(q, p)):
        for columns, squared in blocks:
            i, j = np.nonzero(squared <= tolerance**2)
            edges = np.stack([first[part][i], first[columns][j]])
            edges = edges[:, edges[0] != edges[1]]  # few, once large groups have been joined
            if not edges.size:
                continue
            graph = coo_array((np.ones(edges.shape[1], bool), tuple(edges)), shape=(n, n))
            _, component = connected_components(graph, directed=False)
            _, leader = np.unique(component, return_index=True)
            first = leader[component[first]]
    return first
