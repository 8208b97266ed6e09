"""How alike all samples and all images are: similarity matrices in blocks of rows.

A matrix of 50,000 x 50,000 similarities does not fit in memory. These functions yield it from top
to bottom, a few rows at a time (64 MiB of float64), as `memjax.evaluate.extraction_scores` takes
it. A row that is not finite, on either side, has NaN similarities.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

from memjax._core.errors import InputError
from memjax.evaluate.distances import finite_rows, nearest_neighbors, squared_distances

# float64 entries of one block (64 MiB).
_BLOCK = 2**23


def cosine_blocks(
    samples: Float[np.ndarray, "m ..."], images: Float[np.ndarray, "n ..."]
) -> Iterator[Float[np.ndarray, "b n"]]:
    """Cosine of the angle between every sample's embedding and every image's.

        gamma(x, y) = <x, y> / (|x| |y|)

    Args:
        samples: embeddings of one shape, flattened: pixels, or whatever a descriptor gives.
        images: embeddings of the images, of the same shape.

    Yields:
        Rows in order, float64 in [-1, 1]; larger is more alike. NaN where either embedding is
        zero or not finite.

    Raises:
        InputError: different shapes.

    Cost: 2 m n d operations; a few blocks of memory.

    >>> import numpy as np
    >>> np.concatenate(list(cosine_blocks(np.eye(2), np.array([[2.0, 0.0], [1.0, 1.0]])))).round(3)
    array([[1.   , 0.707],
           [0.   , 0.707]])
    """

    def compare(left, right):
        return np.clip(_directions(left) @ _directions(right).T, -1, 1)

    yield from _compared(samples, images, compare)


def distance_blocks(
    samples: Float[np.ndarray, "m ..."], images: Float[np.ndarray, "n ..."]
) -> Iterator[Float[np.ndarray, "b n"]]:
    """L2 distance of every sample to every image, over all entries.

    Args:
        samples: arrays of one shape.
        images: arrays of the same shape.

    Yields:
        Rows in order, float64 >= 0; smaller is more alike. NaN where either is not finite.

    Raises:
        InputError: different shapes.

    Accuracy and cost: from |x|^2 + |y|^2 - 2 x.y in float64 about a center of the images, so a
    distance below 1e-8 times their spread is rounding (``nearest_neighbors`` recomputes its
    distances instead). 2 m n d operations; a few blocks of memory.

    >>> import numpy as np
    >>> list(distance_blocks(np.zeros((1, 2)), np.array([[3.0, 4.0], [0.0, 0.0]])))
    [array([[5., 0.]])]
    """
    known = np.flatnonzero(finite_rows(images))[:64]
    flat = images.reshape(len(images), -1)[known].astype(np.float64)
    center = np.median(flat, axis=0) if len(known) else np.zeros(flat.shape[1])

    def compare(left, right):
        squared = squared_distances(left - center, right - center)
        return np.sqrt(np.maximum(squared, 0, out=squared), out=squared)

    yield from _compared(samples, images, compare)


def adaptive_distance_blocks(
    samples: Float[np.ndarray, "m ..."],
    images: Float[np.ndarray, "n ..."],
    *,
    num_neighbors: int = 50,
    scale: float | int = 0.5,
) -> Iterator[Float[np.ndarray, "b n"]]:
    """L2 distance in units of what is usual around the sample.

        gamma(x, y) = |x - y| / (alpha mean_{z in S(x)} |x - z|)

    with S(x) the ``num_neighbors`` images nearest to x, itself included if it is one. Pictures of
    little contrast are near to everything in L2 distance; this asks for a neighbor that stands out.

    Args:
        samples: arrays of one shape.
        images: arrays of the same shape.
        num_neighbors: 50 in the literature; at most the number of finite images.
        scale: alpha > 0; 0.5 in the literature, where a sample like any other scores about 2.

    Yields:
        Rows in order, float64 >= 0; smaller is more alike. NaN where either is not finite, and
        where all neighbors are at distance 0.

    Raises:
        InputError: different shapes, or an argument out of range.

    Cost: that of ``distance_blocks`` and of ``nearest_neighbors`` together.

    References:
        Carlini et al. (2023), Extracting training data from diffusion models, arXiv:2301.13188,
        section 5.1, equation 2.
    """
    if not 0 < scale < np.inf:
        raise InputError(f"scale: expected a positive number, got {scale}")
    done = 0
    usual = nearest_neighbors(samples, images, num_neighbors).distance.mean(axis=1)
    for block in distance_blocks(samples, images):
        with np.errstate(divide="ignore", invalid="ignore"):
            block /= scale * usual[done : done + len(block), None]
        done += len(block)
        yield np.where(np.isinf(block), np.nan, block)


def _compared(
    samples: Float[np.ndarray, "m ..."],
    images: Float[np.ndarray, "n ..."],
    compare: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Iterator[Float[np.ndarray, "b n"]]:
    """``compare`` of a few samples with all images, both flat, float64, NaN where not finite."""
    if samples.shape[1:] != images.shape[1:]:
        raise InputError(
            f"samples: expected arrays of the images' shape {images.shape[1:]}, "
            f"found {samples.shape[1:]}"
        )
    d = max(1, int(np.prod(images.shape[1:])))
    width = max(1, _BLOCK // d)
    height = max(1, min(_BLOCK // max(1, len(images)), width))
    for start in range(0, len(samples), height):
        left = _flat(samples[start : start + height])
        block = np.empty((len(left), len(images)))
        for first in range(0, len(images), width):
            right = _flat(images[first : first + width])
            block[:, first : first + width] = compare(left, right)
        yield block


def _flat(rows: Float[np.ndarray, "m ..."]) -> Float[np.ndarray, "m d"]:
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    flat[~finite_rows(rows)] = np.nan
    return flat


def _directions(rows: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m d"]:
    """Rows of unit length; NaN for zero."""
    top = np.abs(rows).max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        unit = rows / top  # so that squares neither overflow nor vanish
        return unit / np.sqrt(np.einsum("ij,ij->i", unit, unit))[:, None]
