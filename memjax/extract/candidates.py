"""Candidates without training data: samples that lie close together within their cluster."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from memjax._core.checks import check_count
from memjax._core.errors import InputError
from memjax.evaluate.distances import finite_rows, nearest_neighbors
from memjax.evaluate.similarity import distance_blocks


class Candidates(NamedTuple):
    """Samples that may be stored images, the most crowded first.

    Attributes:
        row: the sample of each.
        label: its cluster.
        contrast: distance to its k-th neighbor in the cluster over its median distance to all
            samples; smaller is more crowded.
        radius: that distance to the k-th neighbor.
        hits: samples that the candidate stands for, itself included.
    """

    row: Int[np.ndarray, "c"]
    label: Int[np.ndarray, "c"]
    contrast: Float[np.ndarray, "c"]
    radius: Float[np.ndarray, "c"]
    hits: Int[np.ndarray, "c"]


def rank_by_density(
    samples: Float[np.ndarray, "n ..."],
    labels: Int[np.ndarray, "m"],
    *,
    num_neighbors: int = 2,
    merge: float | int = 0.3,
) -> Candidates:
    """Rank samples by how closely others of their cluster crowd around them.

    A stored image comes out again and again, nearly the same; what the model composes does not.
    With d_k(x) the distance to the k-th nearest other sample of the cluster of x, and m(x) the
    median distance of x to all samples,

        contrast(x) = d_k(x) / m(x)

    so that pictures with little in them, which are near to everything, gain nothing. From the
    most crowded on, a sample becomes a candidate and those of its cluster within ``merge`` m(x)
    that no candidate has yet join it. No training image is needed.

    Args:
        samples: one a row, or features of them.
        labels: the cluster of each, such as ``GuidedSamples.label``; a negative one leaves the
            sample out, and so does a value that is not finite.
        num_neighbors: k.
        merge: radius of a candidate, relative to m(x).

    Returns:
        `Candidates`. A cluster of at most k samples has none.

    Raises:
        InputError: an argument out of range, or not one label a sample.

    Cost: 2 n^2 d operations; memory of a few blocks and of one cluster's distances.

    >>> import numpy as np
    >>> x = np.array([[0.0], [0.1], [5.0], [9.0]])
    >>> found = rank_by_density(x, np.zeros(4, int), num_neighbors=1)
    >>> found.row.tolist(), found.hits.tolist()
    ([0, 3, 2], [2, 1, 1])

    References:
        Carlini et al. (2023), Extracting training data from diffusion models, arXiv:2301.13188,
        section 4.2 (stored images as cliques of generations), section 5.1 (distances relative to
        what is usual around a sample).
    """
    check_count("num_neighbors", num_neighbors, 1)
    if not merge >= 0:
        raise InputError(f"merge: expected a number of at least 0, got {merge}")
    if len(labels) != len(samples):
        raise InputError(f"labels: expected {len(samples)}, one a sample, got {len(labels)}")
    finite = np.flatnonzero(finite_rows(samples))
    usual = np.full(len(samples), np.nan)
    if len(finite):
        blocks = distance_blocks(samples[finite], samples[finite])
        usual[finite] = np.concatenate([np.median(block, axis=1) for block in blocks])
    found: list[tuple[float, float, int, int, int]] = []
    for label in np.unique(labels[finite]).tolist():
        rows = finite[labels[finite] == label]
        if label >= 0 and len(rows) > num_neighbors:
            found += _in_cluster(samples[rows], rows, label, usual[rows], num_neighbors, merge)
    found.sort()
    contrast, radius, row, cluster, hits = np.array(found, float).reshape(-1, 5).T
    row, cluster, hits = (column.astype(int) for column in (row, cluster, hits))
    return Candidates(row, cluster, contrast, radius, hits)


def _in_cluster(
    samples: np.ndarray,
    rows: np.ndarray,
    label: int,
    usual: np.ndarray,
    num_neighbors: int,
    merge: float,
) -> list[tuple[float, float, int, int, int]]:
    """Contrast, radius, row, label and hits of every candidate of one cluster."""
    near = nearest_neighbors(samples, samples, len(rows))
    other = near.index != np.arange(len(rows))[:, None]
    index = near.index[other].reshape(len(rows), -1)
    distance = near.distance[other].reshape(len(rows), -1)
    radius = distance[:, num_neighbors - 1]
    contrast = np.divide(radius, usual, out=np.zeros_like(radius), where=usual > 0)
    free = np.ones(len(rows), bool)
    found = []
    for i in np.argsort(contrast, kind="stable"):
        if not free[i]:
            continue
        joined = index[i][distance[i] <= merge * usual[i]]
        hits = 1 + int(free[joined].sum())
        free[joined] = free[i] = False
        found.append((float(contrast[i]), float(radius[i]), int(rows[i]), label, hits))
    return found
