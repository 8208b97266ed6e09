"""From a map to a mask: smoothing, a threshold from other images, the papers' own protocol."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from memjax._core.errors import InputError
from memjax.evaluate.overlap import mask_accuracy, mask_iou, mean_iou

THRESHOLDS = np.linspace(-1e-6, 1 + 1e-6, 101)


def smooth(maps: Float[np.ndarray, "... h w"], width: float | int) -> Float[np.ndarray, "... h w"]:
    """Maps blurred by a Gaussian, for memories that are larger than a pixel.

    Args:
        maps: summed maps; the last two axes are the image's.
        width: standard deviation in pixels; 0 leaves the maps as they are.

    Returns:
        float64. Weights are normalized over the pixels that there are, so constants stay.

    Raises:
        InputError: a negative width, or maps without two axes.
    """
    if maps.ndim < 2 or not 0 <= width < np.inf:
        raise InputError(
            f"maps, width: expected images and a width of at least 0, got rank {maps.ndim}, {width}"
        )
    maps = maps.astype(np.float64)
    if width == 0:
        return maps
    for axis in (-2, -1):
        place = np.arange(maps.shape[axis])
        weight = np.exp(-0.5 * ((place[:, None] - place[None]) / width) ** 2)
        weight /= weight.sum(1, keepdims=True)
        maps = np.moveaxis(np.moveaxis(maps, axis, -1) @ weight.T, -1, axis)
    return maps


def fit_threshold(
    maps: Float[np.ndarray, "n ..."],
    truth: Bool[np.ndarray, "n ..."],
    *,
    counted: Bool[np.ndarray, "n ..."] | None = None,
) -> float:
    """The threshold with the largest IoU over a calibration split; masks are maps *above* it.

        IoU(t) = #{map > t and true} / #{map > t or true}, over all pixels of all images

    Args:
        maps: of images with known truth. Never of images that are then scored.
        truth: whether a pixel is stored.
        counted: pixels that count, such as those that vary at all; ``None`` for all.

    Returns:
        Half-way between the two map values around the best cut (just below the smallest if all
        pixels are best called stored). Exact over all cuts; of equally good ones the highest.

    Raises:
        InputError: arrays of different shapes, no pixel that counts, or none that is stored.

    Cost: O(pixels log pixels). Pixels whose map is NaN do not count.

    >>> fit_threshold(np.array([[0.1, 0.2, 0.6, 0.8]]), np.array([[False, False, True, True]]))
    0.4
    """
    if maps.shape != truth.shape or (counted is not None and counted.shape != maps.shape):
        raise InputError(f"truth: expected the maps' shape {maps.shape}, found {truth.shape}")
    used = ~np.isnan(maps) & (True if counted is None else counted)
    values, stored = maps[used].astype(np.float64), truth[used]
    if not stored.any():
        raise InputError("truth: expected a stored pixel to calibrate on, found none")
    order = np.argsort(-values, kind="stable")
    values, hit = values[order], np.cumsum(stored[order])
    called = np.arange(1, len(values) + 1)
    cuts = np.append(values[1:] < values[:-1], True)
    iou = np.where(cuts, hit / (called + stored.sum() - hit), -1)
    best = int(np.argmax(iou))
    below = values[best + 1] if best + 1 < len(values) else values[best] - 1
    return float((values[best] + below) / 2)


class PublishedOverlap(NamedTuple):
    """The best each number can be made by a threshold chosen on the scored images themselves.

    Attributes:
        iou: intersections over unions, pooled over all images.
        mean_iou: the mean over images, an empty union counting 1.
        accuracy: share of pixels that are right.
        thresholds: the threshold of each, on the scale from 0 to 1.
    """

    iou: float
    mean_iou: float
    accuracy: float
    thresholds: tuple[float, float, float]


def published_overlap(
    maps: Float[np.ndarray, "n ..."], truth: Bool[np.ndarray, "n ..."]
) -> PublishedOverlap:
    """Overlap by the protocol of Kim and Lee's code, to compare with published numbers.

    Maps (summed over channels) are cut at zero from below, log1p is taken, one minimum and maximum
    over all images scale them to [0, 1], and of 101 thresholds from -1e-6 to 1 + 1e-6 the best is
    taken, for each of the three numbers alone.

    Args:
        maps: summed maps, in the papers' scaling (log1p depends on it, if little).
        truth: whether a pixel is stored.

    Returns:
        `PublishedOverlap`: optimistic, because the threshold has seen the answer, and never below
        what calling every pixel stored gives. For a threshold that has not, ``fit_threshold``.

    Raises:
        InputError: arrays of different shapes.

    References:
        Kim, Lee (2026), arXiv:2605.26756, and the code released with it.
    """
    if maps.shape != truth.shape:
        raise InputError(f"truth: expected the maps' shape {maps.shape}, found {truth.shape}")
    scaled = np.log1p(np.maximum(maps.astype(np.float64), 0))
    low, high = scaled.min(), scaled.max()
    scaled = (scaled - low) / (high - low if high > low else 1)
    found = np.array(
        [
            [measure(scaled > t, truth) for measure in (mask_iou, mean_iou, mask_accuracy)]
            for t in THRESHOLDS
        ]
    )
    best = found.argmax(0)
    iou, mean, accuracy = (float(found[row, column]) for column, row in enumerate(best))
    first, second, third = (float(THRESHOLDS[row]) for row in best)
    return PublishedOverlap(iou, mean, accuracy, (first, second, third))
