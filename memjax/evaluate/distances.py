"""Distances between images, and the rule by which a sample counts as a copy."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from memjax._core.errors import InputError

COPY_RATIO = 1 / 3
_BLOCK = 2**24
"""Entries of a distance block held at once: 128 MiB in float64."""


class Neighbors(NamedTuple):
    """The k nearest references of each query, nearest first.

    Attributes:
        index: row numbers among the references.
        distance: Euclidean distances.
    """

    index: Int[np.ndarray, "q k"]
    distance: Float[np.ndarray, "q k"]


class CopyResult(NamedTuple):
    """Which samples copy which images.

    Attributes:
        nearest: for each sample, the row number of its nearest image (the first of equal ones).
        d1: distance to it.
        d2: distance to the nearest image with other pixels.
        is_copy: d1 / d2 < 1/3.
        hits: for each image, the number of samples that copy it; equal images share their hits.
    """

    nearest: Int[np.ndarray, "m"]
    d1: Float[np.ndarray, "m"]
    d2: Float[np.ndarray, "m"]
    is_copy: Bool[np.ndarray, "m"]
    hits: Int[np.ndarray, "n"]


def nearest_neighbors(
    queries: Float[np.ndarray, "q ..."], references: Float[np.ndarray, "n ..."], k: int = 1
) -> Neighbors:
    """The k nearest references of each query in Euclidean distance.

    Candidates are ranked by |a|^2 + |b|^2 - 2 a.b in float64, in blocks; the distances returned
    are those of the differences themselves, so that a copy has distance exactly 0.

    Args:
        queries: images, none with NaN.
        references: images of the same shape.
        k: how many, at most n.

    Returns:
        Row numbers and distances, nearest first; the first of equal references comes first.

    Raises:
        InputError: different image shapes, NaN, or k outside 1..n.

    Cost: q n d multiplications; memory is one block of 128 MiB beside the inputs in float64.
    """
    if queries.shape[1:] != references.shape[1:]:
        raise InputError(
            f"queries: expected images of shape {references.shape[1:]}, got {queries.shape[1:]}"
        )
    n = len(references)
    if not 1 <= k <= n:
        raise InputError(f"k: expected between 1 and {n} neighbors, got {k}")
    a = queries.reshape(len(queries), -1).astype(np.float64)
    b = references.reshape(n, -1).astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("queries, references: expected finite pixels, found NaN or infinity")
    square = np.sum(b * b, axis=1)
    index = np.empty((len(a), k), np.int64)
    distance = np.empty((len(a), k))
    # Rounding can swap candidates whose distances agree to 1e-8: keep a few to spare.
    spare = min(n, k + 4)
    step = max(1, _BLOCK // n)
    for start in range(0, len(a), step):
        block = a[start : start + step]
        ranking = square[None, :] - 2 * block @ b.T
        near = np.argpartition(ranking, spare - 1, axis=1)[:, :spare]
        near.sort(axis=1)
        exact = np.stack([np.linalg.norm(block - b[column], axis=1) for column in near.T], axis=1)
        order = np.argsort(exact, axis=1, kind="stable")[:, :k]
        index[start : start + step] = np.take_along_axis(near, order, axis=1)
        distance[start : start + step] = np.take_along_axis(exact, order, axis=1)
    return Neighbors(index, distance)


def group_identical(images: Shaped[np.ndarray, "n ..."]) -> Int[np.ndarray, "n"]:
    """Number of the first image with the same pixels, for each image.

    Args:
        images: any arrays of one shape.

    Returns:
        ``out[i] <= i``, and ``out[i] == out[j]`` exactly if images i and j are equal.
    """
    flat = np.ascontiguousarray(images.reshape(len(images), -1))
    _, first, inverse = np.unique(flat, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def find_copies(
    samples: Float[np.ndarray, "m ..."], images: Float[np.ndarray, "n ..."]
) -> CopyResult:
    """Samples that reproduce an image, by the distance-ratio rule d1 / d2 < 1/3.

    d1 and d2 are the distances to the nearest and second nearest *distinct* image: among
    repeated images d2 would be zero too, and the rule would never see a duplicated one.

    Args:
        samples: generated images, none with NaN.
        images: training images, at least two of them different.

    Returns:
        A ``CopyResult``.

    Raises:
        InputError: shapes differ, pixels are not finite, or all images are equal.

    References:
        Yoon, Choi, Kwon and Ryu, 2023 (ICML workshop SPIGM); Gu et al., 2023, arXiv:2310.02664.
    """
    group = group_identical(images)
    distinct = np.unique(group)
    if len(distinct) < 2:
        raise InputError("images: expected at least two different images, found one")
    found = nearest_neighbors(samples, images[distinct], k=2)
    nearest = distinct[found.index[:, 0]]
    d1, d2 = found.distance[:, 0], found.distance[:, 1]
    is_copy = d1 < COPY_RATIO * d2
    per_group = np.bincount(nearest[is_copy], minlength=len(images))
    return CopyResult(nearest, d1, d2, is_copy, per_group[group])
