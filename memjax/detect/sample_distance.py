"""What generated samples alone tell: how near do they come to an image?

These statistics see no score. They compare images with samples drawn from the model, and are what
one has when there is nothing but samples. They are computed on the host, in float64, from exact
differences; nothing in them is random but the samples themselves.
"""

import dataclasses
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from memjax._core.checks import check_count, check_positive
from memjax._core.status import Status
from memjax.evaluate.distances import (
    copy_ratios,
    group_duplicates,
    nearest_by_tile,
    nearest_neighbors,
)


class SampleFinding(NamedTuple):
    """One detector's answer for n images. Given the samples, nothing in it is random.

    Attributes:
        value: dimensionless, oriented: larger = more memorized.
        raw: the same statistic in the units and with the sign of its paper.
        status: ``memjax.Status`` codes: NONFINITE for an image that is not finite, UNDEFINED
            where the reference set does not define the statistic; ``value`` and ``raw`` are NaN
            unless it is ``OK``.
    """

    value: Float[np.ndarray, "n"]
    raw: Float[np.ndarray, "n"]
    status: Int[np.ndarray, "n"]


@runtime_checkable
class SampleDetector(Protocol):
    """A memorization statistic of images given samples of the model. Implementations are frozen.

    Attributes:
        name: what it is called on the command line and in tables.
        title: for figures and reports.
        statement: one sentence on what the number is and why it tells memorization.
        raw_name: what the ``raw`` column holds, with its unit.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    statement: ClassVar[str]
    raw_name: ClassVar[str]

    def compare(
        self,
        images: Float[np.ndarray, "n ..."],
        samples: Float[np.ndarray, "m ..."],
        reference: Float[np.ndarray, "r ..."],
    ) -> SampleFinding:
        """The statistic of every image.

        Args:
            images: the images in question.
            samples: images drawn from the model, at least one of them finite; others are passed
                over.
            reference: the images the model was trained on, as far as they are known: what other
                distances are compared with.

        Returns:
            A ``SampleFinding``.
        """
        ...


def _findings(
    images: Float[np.ndarray, "n ..."],
    value: Float[np.ndarray, "n"],
    raw: Float[np.ndarray, "n"],
) -> SampleFinding:
    """Arrays of one status each: a number, an image that is none, or no reference."""
    finite = np.isfinite(images.reshape(len(images), -1)).all(axis=1)
    known = finite & np.isfinite(value)
    status = np.where(finite, Status.UNDEFINED, Status.NONFINITE).astype(np.int32)
    return SampleFinding(
        np.where(known, value, np.nan),
        np.where(known, raw, np.nan),
        np.where(known, np.int32(Status.OK), status),
    )


def _distinct(reference: Float[np.ndarray, "r ..."]) -> Float[np.ndarray, "j ..."]:
    group = group_duplicates(reference)
    return reference[np.unique(group[group >= 0])]


def _spread(reference: Float[np.ndarray, "r ..."]) -> float:
    """Standard deviation of the reference images over all their entries; NaN if it is none."""
    finite = np.isfinite(reference.reshape(len(reference), -1)).all(axis=1)
    spread = float(np.std(reference[finite], dtype=np.float64)) if finite.any() else 0.0
    return spread if spread > 0 else float("nan")


@dataclasses.dataclass(frozen=True)
class NearestSample:
    """Minus the distance from the image to the nearest sample.

    value = -min_g |x - g| / (s sqrt(d)),  raw = min_g |x - g|, in pixel units

    over the samples g, with s the standard deviation of the reference images over all entries.
    An image that the model draws again has a sample nearby. So has a bland image, near which
    every sample lies: what the other statistics of this file divide out.

    Cost: no network product; 2 n m d operations for n images and m samples.

    References:
        The distance behind every copy rule, such as that of Carlini et al., 2023,
        arXiv:2301.13188, section 4.
    """

    name: ClassVar[str] = "nearest_sample"
    title: ClassVar[str] = "Nearest sample"
    raw_name: ClassVar[str] = "L2 distance to the nearest sample, pixel units"
    statement: ClassVar[str] = "How far the nearest generated sample lies: near a stored image."

    def compare(
        self,
        images: Float[np.ndarray, "n ..."],
        samples: Float[np.ndarray, "m ..."],
        reference: Float[np.ndarray, "r ..."],
    ) -> SampleFinding:
        """``-min |x - g| / (s sqrt(d))``."""
        raw = nearest_neighbors(images, samples).distance[:, 0]
        size = _spread(reference) * float(np.prod(images.shape[1:])) ** 0.5
        return _findings(images, -raw / size, raw)


@dataclasses.dataclass(frozen=True)
class NormalizedL2:
    """Minus the distance to a sample, relative to how far the sample lies from training images.

    l(x, g) = |x - g| / (alpha mean over y in S(g) of |y - g|)
    value = -min over samples g of l(x, g),  raw = min over samples g of l(x, g)

    S(g) are the ``neighbors`` distinct reference images nearest to g (all, if there are fewer).
    The mean takes out that some samples are near everything. A sample far from all images is at
    1/alpha from each, so that larger numbers say nothing. Repeated images count once in S, or
    a picture that stands there ``neighbors`` times would normalize itself away.

    Args:
        neighbors: size of S, at least 2 (no sample lies on both).
        alpha: a constant factor, kept so that ``raw`` is the paper's number.

    Raises:
        InputError: ``neighbors`` below 2, or ``alpha`` not positive and finite.

    UNDEFINED with fewer than two distinct reference images.

    Cost: no network product; 2 (n + r) m d operations for n images, m samples, r references.

    References:
        Carlini et al., 2023, arXiv:2301.13188, section 5, with n = 50 and alpha = 0.5.
    """

    neighbors: int = 50
    alpha: float = 0.5
    name: ClassVar[str] = "normalized_l2"
    title: ClassVar[str] = "Normalized L2 distance"
    raw_name: ClassVar[str] = "min over samples of |x - g| / (alpha mean |y - g|)"
    statement: ClassVar[str] = (
        "How near some sample comes to the image, in units of its distance to training images."
    )

    def __post_init__(self):
        check_count("neighbors", self.neighbors, 2)
        check_positive("alpha", self.alpha)

    def compare(
        self,
        images: Float[np.ndarray, "n ..."],
        samples: Float[np.ndarray, "m ..."],
        reference: Float[np.ndarray, "r ..."],
    ) -> SampleFinding:
        """``-min |x - g| / (alpha mean |y - g|)``."""
        distinct = _distinct(reference)
        if len(distinct) < 2:
            nothing = np.full(len(images), np.nan)
            return _findings(images, nothing, nothing)
        near = nearest_neighbors(samples, distinct, min(self.neighbors, len(distinct)))
        scale = self.alpha * near.distance.mean(axis=1)
        raw = nearest_neighbors(images, samples, scale=scale).distance[:, 0]
        return _findings(images, -raw, raw)


@dataclasses.dataclass(frozen=True)
class DistanceRatio:
    """The copy rule d1/d2 < 1/3, kept continuous.

    r(x) = min over samples g of |x - g| / |y(g, x) - g|
    value = -r / (1 + r),  raw = r

    y(g, x) is the reference image nearest to g other than x (and its duplicates). For an image of
    the reference set, r < 1/3 (value > -1/4) exactly where ``memjax.evaluate.find_copies`` finds
    a copy. ``value`` is bounded, and so finite even where every sample is an exact copy of other
    images; it orders like -r.

    UNDEFINED with fewer than two distinct reference images.

    Cost: no network product; 2 (n + r) m d operations for n images, m samples, r references.

    References:
        The rule: Yoon et al., 2023 (ICML workshop on structured probabilistic inference and
        generative modeling); Gu et al., 2023, arXiv:2310.02664.
    """

    name: ClassVar[str] = "distance_ratio"
    title: ClassVar[str] = "Distance ratio"
    raw_name: ClassVar[str] = "min over samples of d1/d2"
    statement: ClassVar[str] = (
        "How much nearer some sample lies to the image than to any other training image."
    )

    def compare(
        self,
        images: Float[np.ndarray, "n ..."],
        samples: Float[np.ndarray, "m ..."],
        reference: Float[np.ndarray, "r ..."],
    ) -> SampleFinding:
        """``-r / (1 + r)``."""
        if len(_distinct(reference)) < 2:
            nothing = np.full(len(images), np.nan)
            return _findings(images, nothing, nothing)
        ratio = copy_ratios(images, samples, reference)
        with np.errstate(invalid="ignore"):
            value = np.where(np.isinf(ratio), -1.0, -ratio / (1 + ratio))
        return _findings(images, value, ratio)


@dataclasses.dataclass(frozen=True)
class TiledL2:
    """Minus the distance to a sample in the tile where the two differ most.

    l(x, g) = max over tiles t of sqrt(mean over the entries i of t of (x_i - g_i)^2)
    value = -min over samples g of l(x, g) / s
    raw = min over samples g of l(x, g) / 2, the paper's distance of pixels in [0, 1]

    with s the standard deviation of the reference images over all entries. The maximum keeps
    pictures apart that share a background and differ in a small thing. Height and width are cut
    into ``grid`` parts each, as equal as they can be, but into no parts of less than two pixels
    (an 8x8 image into 4x4 tiles of 2x2, a 4x4 image into 2x2). All channels of a pixel lie in one
    tile. Of arrays that are no pictures the only axis is cut.

    Args:
        grid: tiles a side.

    Raises:
        InputError: ``grid`` below 1.

    Cost: no network product; 2 n m d operations for n images and m samples.

    References:
        Carlini et al., 2023, arXiv:2301.13188, section 4 (16 tiles of 128 x 128 pixels; there
        between generations of one prompt).
    """

    grid: int = 4
    name: ClassVar[str] = "tiled_l2"
    title: ClassVar[str] = "Tiled L2 distance"
    raw_name: ClassVar[str] = "min over samples of the largest tile's r.m.s., pixels in [0, 1]"
    statement: ClassVar[str] = (
        "How much the nearest sample differs from the image where it differs most."
    )

    def __post_init__(self):
        check_count("grid", self.grid, 1)

    def tiles(self, shape: tuple[int, ...]) -> Int[np.ndarray, "..."]:
        """Number of the tile of every entry of an image of this shape."""
        height = _parts(shape[0], self.grid)
        if len(shape) == 1:
            return height
        width = _parts(shape[1], self.grid)
        grid = height[:, None] * (width[-1] + 1) + width[None]
        return np.broadcast_to(grid.reshape(*grid.shape, *[1] * (len(shape) - 2)), shape)

    def compare(
        self,
        images: Float[np.ndarray, "n ..."],
        samples: Float[np.ndarray, "m ..."],
        reference: Float[np.ndarray, "r ..."],
    ) -> SampleFinding:
        """``-min max_t rms_t(x - g) / s``."""
        tiles = self.tiles(images.shape[1:])
        found = nearest_by_tile(images, samples, tiles).distance[:, 0]
        return _findings(images, -found / _spread(reference), found / 2)


def _parts(n: int, most: int) -> Int[np.ndarray, "n"]:
    """The part, of at most ``most`` as equal as they can be, of each of n pixels."""
    count = max(1, min(most, n // 2))
    return np.arange(n) * count // n
