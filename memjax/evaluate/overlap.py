"""How well masks and maps cover the stored part of images: numbers, floors and intervals.

Arrays have the images along the first axis. A number comes with what calling every pixel stored,
and what chance, would give: both can be high. Intervals are for other images of the same kind:
whole clusters (prompts) are resampled, since the pixels of one image are no independent draws.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from memjax._core.errors import InputError
from memjax.evaluate.intervals import check_open_unit, proportion_interval
from memjax.evaluate.roc import auroc, average_precision

_RANDOM_MASKS = 32


class OverlapEstimate(NamedTuple):
    """A number about overlap, its interval, and what it is without any skill.

    Attributes:
        value: the estimate; NaN where it does not exist.
        low: lower limit of the interval.
        high: upper limit.
        all_ones: the same number for the mask of all pixels (for a map: a constant one).
        random: for the pixels of the mask (the map) in random order over all images.
    """

    value: float
    low: float
    high: float
    all_ones: float
    random: float


class MaskOverlap(NamedTuple):
    """How far masks and the truth agree.

    Attributes:
        iou: intersections over unions, pooled over all images.
        mean_iou: the mean over images of their own, an empty union counting 1.
        accuracy: share of pixels that are right.
        num_images: images.
        num_pixels: pixels that counted.
    """

    iou: OverlapEstimate
    mean_iou: OverlapEstimate
    accuracy: OverlapEstimate
    num_images: int
    num_pixels: int


class MapRanking(NamedTuple):
    """How far stored pixels score above others, all images together, without a threshold.

    Attributes:
        auroc: see ``memjax.evaluate.auroc``.
        average_precision: see ``memjax.evaluate.average_precision``.
        num_stored: stored pixels that ranked.
        num_free: others.
        excluded: pixels whose map is NaN.
    """

    auroc: OverlapEstimate
    average_precision: OverlapEstimate
    num_stored: int
    num_free: int
    excluded: int


def mask_overlap(
    masks: Bool[np.ndarray, "n ..."],
    truth: Bool[np.ndarray, "n ..."],
    *,
    counted: Bool[np.ndarray, "n ..."] | None = None,
    clusters: Int[np.ndarray, "n"] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> MaskOverlap:
    """Intersection over union and accuracy of masks, with floors and intervals.

    Args:
        masks: pixels called stored.
        truth: pixels that are.
        counted: pixels that count, such as those that vary; ``None`` for all.
        clusters: a number for each image; images of one (a prompt, a family of near duplicates)
            are resampled together. ``None`` for every image its own.
        confidence: coverage aimed at by the intervals.
        num_resamples: of the bootstrap.
        seed: of the bootstrap and the random masks.

    Returns:
        `MaskOverlap`. Intervals are the percentiles of the bootstrap over clusters; where all
        resamples agree (all right, or one cluster), Clopper and Pearson's for as many
        proportions as there are clusters.

    Raises:
        InputError: arrays that do not fit, or an argument out of range.

    >>> truth = np.array([[True, True, False, False]])
    >>> found = mask_overlap(np.array([[True, False, False, False]]), truth)
    >>> found.iou.value, found.iou.all_ones, found.accuracy.value
    (0.5, 0.5, 0.75)
    """
    counted = _checked(masks, truth, counted)
    group = _groups(clusters, len(masks))
    check_open_unit("confidence", confidence)
    parts = _parts(masks, truth, counted)
    ones = _parts(np.ones_like(masks), truth, counted)
    rng = np.random.default_rng(seed)
    shuffled = []
    for _ in range(_RANDOM_MASKS):
        drawn = np.zeros_like(masks)
        drawn[counted] = rng.permutation(masks[counted])
        shuffled.append(_parts(drawn, truth, counted))
    weights = _resamples(group, num_resamples, rng)

    def estimate(measure: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> OverlapEstimate:
        whole = np.ones((1, len(masks)))
        value = float(measure(whole, parts)[0])
        low, high = _limits(value, measure(weights, parts), int(group.max()) + 1, confidence)
        floor = float(np.mean([measure(whole, one)[0] for one in shuffled]))
        return OverlapEstimate(value, low, high, float(measure(whole, ones)[0]), floor)

    return MaskOverlap(
        estimate(_pooled_iou),
        estimate(_mean_iou),
        estimate(_accuracy),
        len(masks),
        int(counted.sum()),
    )


def map_ranking(
    maps: Float[np.ndarray, "n ..."],
    truth: Bool[np.ndarray, "n ..."],
    *,
    counted: Bool[np.ndarray, "n ..."] | None = None,
    clusters: Int[np.ndarray, "n"] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> MapRanking:
    """AUROC and average precision of the pixels of all images, with floors and intervals.

    Args:
        maps: larger means stored; pixels with NaN do not rank.
        truth: pixels that are.
        counted: as for ``mask_overlap``, like the other options.
        clusters: likewise.
        confidence: likewise.
        num_resamples: likewise.
        seed: likewise.

    Returns:
        `MapRanking`. One scale serves all images: the same value must mean the same in each.

    Raises:
        InputError: arrays that do not fit, or an argument out of range.

    Cost: a sort of all pixels, then ``num_resamples`` sums over them.
    """
    counted = _checked(maps, truth, counted)
    group = _groups(clusters, len(maps))
    check_open_unit("confidence", confidence)
    ranked = counted & ~np.isnan(maps)
    owner = np.broadcast_to(group.reshape(-1, *(1 for _ in maps.shape[1:])), maps.shape)[ranked]
    scores, stored = maps[ranked].astype(np.float64), truth[ranked]
    area = auroc(scores, stored, confidence=confidence).value
    precision = average_precision(scores, stored, num_resamples=2).value

    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, [True] * bool(len(order))))
    stored_in_order, owner = stored[order].astype(np.float64), owner[order]
    num_clusters = int(group.max()) + 1
    rng = np.random.default_rng(seed)
    found: list[tuple[float, float]] = []
    for weight in _cluster_weights(num_clusters, num_resamples, rng) if len(order) else ():
        drawn = weight[owner]
        true = np.cumsum(drawn * stored_in_order)[ends]
        called = np.cumsum(drawn)[ends]
        found.append(_area_and_precision(true, called))
    areas, precisions = np.array(found).reshape(-1, 2).T
    share = float(stored.mean()) if len(stored) else math.nan

    def estimate(value: float, resampled: np.ndarray, floor: float) -> OverlapEstimate:
        low, high = _limits(value, resampled, num_clusters, confidence)
        return OverlapEstimate(value, low, high, floor, floor)

    return MapRanking(
        estimate(area, areas, 0.5),
        estimate(precision, precisions, share),
        int(stored.sum()),
        int((~stored).sum()),
        int((counted & np.isnan(maps)).sum()),
    )


def mask_iou(masks: Bool[np.ndarray, "n ..."], truth: Bool[np.ndarray, "n ..."]) -> float:
    """Intersections over unions of all images together; 1 if all unions are empty."""
    union = int((masks | truth).sum())
    return int((masks & truth).sum()) / union if union else 1.0


def mean_iou(masks: Bool[np.ndarray, "n ..."], truth: Bool[np.ndarray, "n ..."]) -> float:
    """The mean over images of intersection over union, an empty union counting 1."""
    return float(np.mean([mask_iou(m, t) for m, t in zip(masks, truth, strict=True)]))


def mask_accuracy(masks: Bool[np.ndarray, "n ..."], truth: Bool[np.ndarray, "n ..."]) -> float:
    """Share of pixels at which mask and truth agree."""
    return float((masks == truth).mean())


def _parts(masks: np.ndarray, truth: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Per image: pixels in the intersection, in the union, right, and counted."""
    rows = (masks & truth, masks | truth, masks == truth, np.ones_like(truth))
    return np.stack([(row & counted).reshape(len(truth), -1).sum(1) for row in rows]).astype(float)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > 0, above / np.where(below > 0, below, 1), 1.0)


def _pooled_iou(weights: np.ndarray, parts: np.ndarray) -> np.ndarray:
    return _ratio(weights @ parts[0], weights @ parts[1])


def _mean_iou(weights: np.ndarray, parts: np.ndarray) -> np.ndarray:
    return (weights @ _ratio(parts[0], parts[1])) / weights.sum(1)


def _accuracy(weights: np.ndarray, parts: np.ndarray) -> np.ndarray:
    return _ratio(weights @ parts[2], weights @ parts[3])


def _area_and_precision(true: np.ndarray, called: np.ndarray) -> tuple[float, float]:
    """AUROC and average precision from weighted counts at the end of every tie; NaN if empty."""
    false = called - true
    if not true[-1] or not false[-1]:
        return math.nan, math.nan
    gain = np.diff(true, prepend=0)
    beaten = false[-1] - false + np.diff(false, prepend=0) / 2
    area = float((gain * beaten).sum() / (true[-1] * false[-1]))
    return area, float((gain * true / np.maximum(called, 1)).sum() / true[-1])


def _limits(
    value: float, resampled: np.ndarray, num_clusters: int, confidence: float
) -> tuple[float, float]:
    """Percentiles of the resamples, or a binomial interval where they all agree."""
    if math.isnan(value):
        return math.nan, math.nan
    known = resampled[~np.isnan(resampled)]
    if len(known) and np.ptp(known) > 0:
        low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(min(low, value)), float(max(high, value))
    trials = num_clusters
    return proportion_interval(value * trials, trials, confidence=confidence)


def _resamples(group: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each image is drawn in each resample of the clusters."""
    drawn = list(_cluster_weights(int(group.max()) + 1, num_resamples, rng))
    return np.array(drawn)[:, group].astype(float)


def _cluster_weights(num_clusters: int, num_resamples: int, rng: np.random.Generator):
    share = np.full(num_clusters, 1 / num_clusters)
    for _ in range(num_resamples):
        yield rng.multinomial(num_clusters, share).astype(float)


def _groups(clusters: np.ndarray | None, n: int) -> np.ndarray:
    if clusters is None:
        return np.arange(n)
    if clusters.shape != (n,):
        raise InputError(
            f"clusters: expected one number for each of {n} images, got shape {clusters.shape}"
        )
    return np.unique(clusters, return_inverse=True)[1]


def _checked(given: np.ndarray, truth: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
    """The pixels that count, after a look at the shapes."""
    counted = np.ones(truth.shape, bool) if counted is None else counted
    if not len(given) or given.shape != truth.shape or counted.shape != truth.shape:
        raise InputError(
            f"truth, counted: expected the shape {given.shape} of at least one image, found "
            f"{truth.shape} and {counted.shape}"
        )
    return counted
