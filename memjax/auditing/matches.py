"""What samples give away of a training set that is known, and which of its images."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from memjax._core.errors import InputError
from memjax.auditing.extraction import Extracted
from memjax.auditing.rows import Progress
from memjax.auditing.stages import decode_images
from memjax.diffusion.model import Model
from memjax.evaluate.distances import CopyResult, find_copies, group_duplicates
from memjax.evaluate.extraction import (
    BandScores,
    IntervalEstimate,
    Rarefaction,
    extraction_scores,
    rarefaction,
)
from memjax.evaluate.intervals import proportion_interval
from memjax.evaluate.similarity import adaptive_distance_blocks, distance_blocks

Distance = Literal["adaptive", "l2"]
BANDS = (0.5, 0.75, 1.0)
"""Ends of the bands of the adaptive distance, ours: the paper's are not known."""
_NEIGHBORS = 50
_POINTS = 30
"""Of a rarefaction curve."""


class Reference(NamedTuple):
    """A training set without repetitions.

    Attributes:
        images: one of every group of duplicates.
        rows: where each stands in the data.
        times: how many rows of the data it stands for.
    """

    images: Float[np.ndarray, "g ..."]
    rows: Int[np.ndarray, "g"]
    times: Int[np.ndarray, "g"]


class Matches(NamedTuple):
    """What n samples give away.

    Attributes:
        bands: AMS and UMS of every band of distance.
        copies: which training image each sample copies, by d1 < d2 / 3.
        copied: share of the samples that copy one.
        distinct: different images copied by them.
        curve: expected number of these against the number of samples.
        heldout: share of the samples that copy an image which was not trained on; ``None``
            where none is known.
    """

    bands: tuple[BandScores, ...]
    copies: CopyResult
    copied: IntervalEstimate
    distinct: IntervalEstimate
    curve: Rarefaction
    heldout: IntervalEstimate | None


class Judged(NamedTuple):
    """What an extraction brought out of a training set that is known.

    Attributes:
        sets: what each set of samples gives away.
        nearest: per candidate, the number of the nearest image of the reference.
        d1: L2 distance to it.
        d2: L2 distance to the next.
        distance: to the nearest, in the units of the bands.
        is_copy: d1 < d2 / 3.
    """

    sets: tuple[Matches, ...]
    nearest: Int[np.ndarray, "k"]
    d1: Float[np.ndarray, "k"]
    d2: Float[np.ndarray, "k"]
    distance: Float[np.ndarray, "k"]
    is_copy: Bool[np.ndarray, "k"]


def distinct_images(
    images: Float[np.ndarray, "n ..."], rows: Int[np.ndarray, "n"], tolerance: float = 0.0
) -> Reference:
    """Bring a training set's duplicates together.

    Args:
        images: finite.
        rows: where they stand in the data.
        tolerance: images linked by steps of at most this L2 distance count as one.

    Raises:
        InputError: fewer than two different ones.
    """
    group = group_duplicates(images, tolerance=tolerance)
    first, times = np.unique(group, return_counts=True)
    if len(first) < 2:
        raise InputError(f"data: expected at least 2 distinct images, found {len(first)}")
    return Reference(images[first], rows[first], times)


def band_edges(distance: str, edges: Sequence[float] | None) -> tuple[tuple[float, float], ...]:
    """Bands of distance, from 0 to the first edge, from there to the second, and so on.

    Args:
        distance: ``"adaptive"`` or ``"l2"``.
        edges: ascending; ``None`` for ``BANDS``.

    Raises:
        InputError: edges that do not ascend from 0, none for L2 distances, or an unknown distance.
    """
    if distance not in get_args(Distance):
        raise InputError(f"distance: expected 'adaptive' or 'l2', got {distance!r}")
    if edges is None:
        if distance == "l2":
            raise InputError("bands: expected edges; none are usual for L2 distances")
        edges = BANDS
    ends = (0.0, *map(float, edges))
    if len(ends) < 2 or any(a >= b for a, b in pairwise(ends)):
        shown = ", ".join(f"{edge:g}" for edge in edges)
        raise InputError(f"bands: expected ascending edges above 0, got {shown}")
    return tuple(pairwise(ends))


def distances(
    samples: Float[np.ndarray, "m ..."], images: Float[np.ndarray, "g ..."], distance: str
) -> Iterator[Float[np.ndarray, "b g"]]:
    """All distances, in blocks of rows."""
    if distance == "l2":
        return distance_blocks(samples, images)
    count = min(_NEIGHBORS, len(images))
    return adaptive_distance_blocks(samples, images, num_neighbors=count)


def match(
    samples: Float[np.ndarray, "n ..."],
    reference: Reference,
    *,
    bands: Sequence[tuple[float, float]],
    distance: str = "adaptive",
    heldout: Float[np.ndarray, "h ..."] | None = None,
) -> Matches:
    """Compare samples with a training set.

    Args:
        samples: images; those that are not finite match nothing.
        reference: the training set.
        bands: pairs of distances.
        distance: ``"adaptive"`` (Carlini's, relative to the nearest 50) or ``"l2"``.
        heldout: images that were not trained on: what matches them shows how often the rule errs.

    Returns:
        `Matches`; intervals at 95 %.

    Raises:
        InputError: different shapes, or fewer than two different held-out images.
    """
    n = len(samples)
    copies = find_copies(samples, reference.images)
    sizes = np.unique(np.geomspace(1, n, _POINTS).astype(int))
    curve = rarefaction(copies.hits, n, sizes)
    wrong = None
    if heldout is not None:
        wrong = _share(int(find_copies(samples, heldout).is_copy.sum()), n)
    return Matches(
        extraction_scores(
            distances(samples, reference.images, distance), tuple(bands), distance=True
        ),
        copies,
        _share(int(copies.is_copy.sum()), n),
        IntervalEstimate(*(float(part[-1]) for part in (curve.value, curve.low, curve.high))),
        curve,
        wrong,
    )


def judge(
    model: Model,
    found: Extracted,
    reference: Reference,
    *,
    bands: Sequence[tuple[float, float]],
    distance: str = "adaptive",
    heldout: Float[np.ndarray, "h ..."] | None = None,
    progress: Progress | None = None,
) -> Judged:
    """Compare all that an extraction found with the training set.

    Args:
        model: that it was found in, to decode samples.
        found: by ``memjax.auditing.extraction.extract``.
        reference: the training set.
        bands: pairs of distances.
        distance: ``"adaptive"`` or ``"l2"``.
        heldout: images that were not trained on.
        progress: called with (stage, done, total).

    Returns:
        `Judged`.

    Raises:
        InputError: different shapes, or fewer than two different held-out images.
    """
    sets = []
    for each in found.sets:
        images = decode_images(model, each.samples)
        sets.append(match(images, reference, bands=bands, distance=distance, heldout=heldout))
        if progress is not None:
            progress("comparing with the data", len(sets), len(found.sets))
    images = found.candidates.images
    if not len(images):
        none = np.zeros(0)
        return Judged(tuple(sets), none.astype(int), none, none, none, none > 0)
    copies = find_copies(images, reference.images)
    near = [block.min(axis=1) for block in distances(images, reference.images, distance)]
    return Judged(
        tuple(sets), copies.nearest, copies.d1, copies.d2, np.concatenate(near), copies.is_copy
    )


def _share(k: int, n: int) -> IntervalEstimate:
    return IntervalEstimate(k / n, *proportion_interval(k, n))
