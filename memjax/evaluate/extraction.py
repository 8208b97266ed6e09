"""How much of a training set the samples of a model give away: AMS, UMS, and how UMS grows.

Samples are compared with training images by a similarity; what counts as a match is a band of it.
The average memorization score (AMS) is the share of samples that match, the unique memorization
score (UMS) the number of images matched, divided by the number of samples. A model that repeats
one image has a high AMS and a low UMS, and UMS falls as samples are added, so that UMS can only be
compared at an equal number of them; `rarefaction` gives it at any smaller number.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from memjax._core.errors import InputError
from memjax.evaluate.intervals import check_open_unit, proportion_interval


class IntervalEstimate(NamedTuple):
    """A number and its confidence interval."""

    value: float
    low: float
    high: float


class BandScores(NamedTuple):
    """What N samples give away in one band of similarity.

    Attributes:
        band: its two ends.
        ams: share of samples whose best similarity lies in the band (Clopper-Pearson).
        ums: images, per sample drawn, that lie in the band of some sample. An image counts
            whether or not it is that sample's best match, so UMS may exceed AMS.
        ums_best: images, per sample drawn, that are the best match of some sample and lie in the
            band; at most AMS.
        hits: per image, the samples in whose band it lies.
        hits_best: per image, the samples whose best match it is, in the band.
        num_samples: N, failed ones included.
        failed: samples that have no similarity to any image; they match nothing.
    """

    band: tuple[float, float]
    ams: IntervalEstimate
    ums: IntervalEstimate
    ums_best: IntervalEstimate
    hits: Int[np.ndarray, "n"]
    hits_best: Int[np.ndarray, "n"]
    num_samples: int
    failed: int


class Rarefaction(NamedTuple):
    """Expected number of distinct images against the number of samples.

    Attributes:
        size: numbers of samples m.
        value: expected number of distinct images among m samples.
        low: lower limits of the interval, one m at a time.
        high: upper limits.
    """

    size: Int[np.ndarray, "k"]
    value: Float[np.ndarray, "k"]
    low: Float[np.ndarray, "k"]
    high: Float[np.ndarray, "k"]


def extraction_scores(
    similarity: Iterable[Float[np.ndarray, "..."]],
    bands: Sequence[tuple[float, float]],
    *,
    distance: bool = False,
    group: Int[np.ndarray, "n"] | None = None,
    confidence: float = 0.95,
) -> tuple[BandScores, ...]:
    """AMS and UMS of every band of a similarity between N samples and n images.

        F(x)   = 1[max_j gamma(x, y_j) in [a, b]]         AMS = (1/N) sum_x F(x)
        phi(x) = {j : gamma(x, y_j) in [a, b]}            UMS = (1/N) |union_x phi(x)|

    and, for comparison, UMS with phi(x) cut down to the best match, the j of the maximum. Both
    ends belong to a band, as in the paper; its bands are disjoint, not cumulative.

    Args:
        similarity: the matrix gamma in blocks of rows, such as ``cosine_blocks`` gives; a whole
            matrix is ``[matrix]``. NaN stands for "no similarity".
        bands: pairs (a, b), a <= b, in units of the similarity; infinite ends are allowed.
        distance: whether smaller is more alike; the best match is then the minimum.
        group: per image the number of its group (``group_duplicates``): images of a group count as
            one, or duplicates would inflate UMS. A negative number leaves an image out. ``None``
            for every image on its own.
        confidence: of the intervals, in (0, 1).

    Returns:
        `BandScores`, one a band. ``hits`` of a group stand at every image of it.

    Raises:
        InputError: no sample, blocks that do not fit together or the groups, or a band that is
            empty.

    Accuracy and cost:
        AMS's interval covers whatever the distribution. UMS's is for its expectation at this N,
        from the jackknife over samples, whose variance is never too small on average (Efron and
        Stein), with the continuity of a Poisson count's score interval: see ``rarefaction``.
        O(N n) for every band; memory of a block and of n numbers for every band.

    >>> import numpy as np
    >>> gamma = np.array([[0.9, 0.7], [0.8, 0.2]])
    >>> (found,) = extraction_scores([gamma], [(0.6, 1.0)])
    >>> found.ams.value, found.ums.value, found.ums_best.value
    (1.0, 1.0, 0.5)

    References:
        SIDE: surrogate conditional data extraction from diffusion models, arXiv:2410.02467v7,
        equations of F, phi, AMS and UMS (its similarity is the cosine of SSCD descriptors, or
        Carlini's adaptive distance). Efron and Stein (1981), The jackknife estimate of variance,
        Annals of Statistics 9.
    """
    check_open_unit("confidence", confidence)
    for low, high in bands:
        if not low <= high:
            raise InputError(f"bands: expected pairs (a, b) with a <= b, got ({low}, {high})")
    columns = None
    seen = failed = 0
    for block in similarity:
        if columns is None:
            columns = _columns(group, block.shape[-1])
            every = [_Union(columns.num_items) for _ in bands]
            best = [_Union(columns.num_items) for _ in bands]
        if block.ndim != 2 or block.shape[1] != len(columns.item):
            raise InputError(
                f"similarity: expected blocks of {len(columns.item)} columns, found shape "
                f"{block.shape}"
            )
        kept = block[:, columns.order]
        missing = np.isnan(kept)
        worst = np.where(missing, np.inf if distance else -np.inf, kept)
        place = (worst.argmin if distance else worst.argmax)(axis=1)
        top = np.take_along_axis(kept, place[:, None], axis=1)[:, 0]
        failed += int(missing.all(axis=1).sum())
        for (low, high), all_of, best_of in zip(bands, every, best, strict=True):
            inside = (kept >= low) & (kept <= high)
            row, item = np.nonzero(np.logical_or.reduceat(inside, columns.first, axis=1))
            all_of.add(row + seen, item)
            row = np.flatnonzero((top >= low) & (top <= high))
            best_of.add(row + seen, columns.item[columns.order[place[row]]])
        seen += len(block)
    if columns is None or not seen:
        raise InputError("similarity: expected at least one row, found none")
    return tuple(
        BandScores(
            band=(float(band[0]), float(band[1])),
            ams=_share(int(best_of.hits.sum()), seen, confidence),
            ums=all_of.per_sample(seen, confidence),
            ums_best=best_of.per_sample(seen, confidence),
            hits=np.where(columns.item >= 0, all_of.hits[columns.item], 0),
            hits_best=np.where(columns.item >= 0, best_of.hits[columns.item], 0),
            num_samples=seen,
            failed=failed,
        )
        for band, all_of, best_of in zip(bands, every, best, strict=True)
    )


def rarefaction(
    hits: Int[np.ndarray, "n"],
    num_samples: int,
    sizes: Int[np.ndarray, "k"],
    *,
    confidence: float = 0.95,
) -> Rarefaction:
    """Expected number of distinct images among m samples, from N >= m samples.

        S(m) = sum_i [1 - C(N - h_i, m) / C(N, m)]

    is the mean over all subsets of m of the N samples, with h_i the samples that hit image i; and
    so, among all unbiased estimates of the expectation sum_i [1 - (1 - k_i)^m] for hit
    probabilities k_i, the one of least variance. It cannot be continued beyond N.

    Args:
        hits: per image, the samples that hit it; a sample hits one image or none. Duplicates
            must stand as one (one entry a group of ``group_duplicates``).
        num_samples: N, those without a hit included.
        sizes: numbers m, 1..N.
        confidence: of the intervals, in (0, 1).

    Returns:
        A `Rarefaction`. Its intervals are for the expectation at one m each: the curve's points
        are strongly correlated.

    Raises:
        InputError: negative hits, more hits than samples, or a size out of range.

    Accuracy and cost:
        The value is exact up to rounding (1e-10 relative). The variance V is the jackknife's over
        samples, in closed form (at m = N that at N - 1: the number h = 1 images); it is never too
        small on average, and too large where images are hit a few times each. With z the normal
        quantile, u = m/N z/2 and r = sqrt(V + u^2), the interval is [S - z r, S + z r + z u],
        which for V = S, m = N are the score limits of a Poisson count, a little widened, and
        stays wide enough where nothing was hit. O(n k).

    >>> import numpy as np
    >>> rarefaction(np.array([3, 1]), 4, np.array([1, 2, 4])).value.round(3).tolist()
    [1.0, 1.5, 2.0]

    References:
        Hurlbert (1971), The nonconcept of species diversity, doi:10.2307/1934145, equation 8
        (first given by Sanders 1968 with another formula). Efron and Stein (1981), The jackknife
        estimate of variance, Annals of Statistics 9.
    """
    check_open_unit("confidence", confidence)
    if np.any(hits < 0) or not hits.sum() <= num_samples:
        raise InputError(
            f"hits: expected counts that sum to at most {num_samples} (samples), got a sum of "
            f"{int(hits.sum())}"
        )
    if np.any(sizes < 1) or np.any(sizes > num_samples):
        raise InputError(f"sizes: expected numbers from 1 to {num_samples} (samples), got {sizes}")
    counts, images = np.unique(hits[hits > 0], return_counts=True)
    found = []
    for m in sizes.tolist():
        value = float(images @ -np.expm1(_log_missed(num_samples, counts, m)))
        variance = _variance(num_samples, counts, images, m)
        limits = _limits(value, variance, m, num_samples, len(hits), confidence)
        found.append((value, *limits))
    value, low, high = np.array(found, np.float64).reshape(-1, 3).T
    return Rarefaction(sizes, value, low, high)


class _Union:
    """A union of sets of items, one set a sample: how many, and what each sample brought alone."""

    def __init__(self, num_items: int):
        self.hits = np.zeros(num_items, np.int64)
        self.last = np.full(num_items, -1, np.int64)

    def add(self, row: Int[np.ndarray, "p"], item: Int[np.ndarray, "p"]) -> None:
        """Add distinct pairs of sample and item, in the order of the samples."""
        np.add.at(self.hits, item, 1)
        self.last[item] = row  # of several, numpy keeps the last

    def per_sample(self, n: int, confidence: float) -> IntervalEstimate:
        """Size of the union over n, with the jackknife's interval."""
        alone = np.bincount(self.last[self.hits == 1], minlength=n)
        variance = (n - 1) / n * float(np.sum((alone - alone.mean()) ** 2))
        size = float(np.count_nonzero(self.hits))
        low, high = _limits(size, variance, n, n, len(self.hits), confidence)
        return IntervalEstimate(size / n, low / n, high / n)


class _Columns(NamedTuple):
    """Images brought together by group.

    Attributes:
        item: per image the number 0, 1, ... of its group; -1 for those left out.
        order: the images that are not left out, group by group.
        first: where in ``order`` each group begins.
    """

    item: Int[np.ndarray, "n"]
    order: Int[np.ndarray, "j"]
    first: Int[np.ndarray, "g"]

    @property
    def num_items(self) -> int:
        return len(self.first)


def _columns(group: Int[np.ndarray, "n"] | None, n: int) -> _Columns:
    if group is None:
        group = np.arange(n)
    if group.shape != (n,):
        raise InputError(f"group: expected {n} numbers, one an image, found shape {group.shape}")
    order = np.argsort(group, kind="stable")
    order = order[group[order] >= 0]
    if not len(order):
        raise InputError("similarity: expected at least one image, found none")
    _, first, inverse = np.unique(group[order], return_index=True, return_inverse=True)
    item = np.full(n, -1)
    item[order] = inverse
    return _Columns(item, order, first)


def _share(k: int, n: int, confidence: float) -> IntervalEstimate:
    return IntervalEstimate(k / n, *proportion_interval(k, n, confidence=confidence))


def _log_missed(n: int, hits: Int[np.ndarray, "c"], m: int) -> Float[np.ndarray, "c"]:
    """Log of C(n - h, m) / C(n, m): the chance that m of n samples are none of the h."""
    from scipy.special import gammaln

    left = n - hits - m
    inside = left >= 0
    rest = np.maximum(left, 0)
    log = gammaln(n - hits + 1) + gammaln(n - m + 1) - gammaln(rest + 1) - gammaln(n + 1)
    return np.where(inside, log, -np.inf)


def _variance(n: int, counts: Int[np.ndarray, "c"], images: Int[np.ndarray, "c"], m: int) -> float:
    """The jackknife's variance of S(m), m <= n - 1.

    Without a sample that hit an image h times, S changes by what that image loses,
    C(n-1-(h-1), m)/C(n-1, m) - C(n-1-h, m)/C(n-1, m), negated, against a sample without a hit.
    """
    if n < 2:
        return 0.0
    m = min(m, n - 1)
    loss = np.exp(_log_missed(n - 1, counts - 1, m)) - np.exp(_log_missed(n - 1, counts, m))
    weight = counts * images
    mean = float(weight @ loss) / n
    return (n - 1) / n * (float(weight @ loss**2) - n * mean**2)


def _limits(
    value: float, variance: float, m: int, n: int, most: int, confidence: float
) -> tuple[float, float]:
    """Interval for an expected number of distinct images, see ``rarefaction``."""
    from scipy.special import ndtri

    z = float(ndtri((1 + confidence) / 2))
    step = m / n * z / 2
    half = z * math.sqrt(max(variance, 0.0) + step**2)
    return max(0.0, value - half), min(float(most), value + half + z * step)
