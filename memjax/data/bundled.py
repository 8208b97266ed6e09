"""Images that come with a dependency: nothing to download."""

import numpy as np

from memjax._core.errors import require
from memjax.data.images import ImageSet, from_array


def digits() -> ImageSet:
    """The 1,797 handwritten digits (8 x 8, gray) that scikit-learn carries.

    Pixels are integers 0..16 mapped by ``pixel / 8 - 1``, exactly, to [-1, 1]; their standard
    deviation is about 0.75. No two rows are equal. Rows keep scikit-learn's order, ids are
    ``digit-0000``, ..., labels are the digit.

    Returns:
        An `ImageSet` with images [1797, 8, 8, 1], every status OK.

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> from memjax.data.bundled import digits
        >>> digits().images.shape
        (1797, 8, 8, 1)

    References:
        Alpaydin, Kaynak (1998), "Optical recognition of handwritten digits", UCI machine learning
        repository; the test part of it.
    """
    bunch = require("sklearn.datasets", "audit").load_digits()
    pixels = (bunch.images / 8 - 1).astype(np.float32)
    return from_array(
        pixels,
        ids=tuple(f"digit-{i:04d}" for i in range(len(pixels))),
        labels=bunch.target.astype(np.int32),
    )
