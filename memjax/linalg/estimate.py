"""A number estimated from random products: never without its error bar."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int


class Estimate(NamedTuple):
    """An unbiased estimate with its standard error.

    Attributes:
        value: the estimate; a scalar for traces, an array like the operator's argument for
            diagonals.
        standard_error: of each entry of ``value``; zero where the estimate is exact.
        degrees_of_freedom: of the standard error, for Student's t.
        status: a ``Status``; anything but ``OK`` says why not to trust the error bar.
        num_products: products with the operator (and its transpose) that were used.
    """

    value: Float[Array, "..."]
    standard_error: Float[Array, "..."]
    degrees_of_freedom: Int[Array, ""] | Float[Array, ""]
    status: Int[Array, ""]
    num_products: Int[Array, ""]

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Confidence interval of every entry, on the host: ``value -+ t standard_error``.

        Args:
            level: coverage, in (0, 1).

        Returns:
            Lower and upper ends as NumPy arrays; for a batch of estimates, batched alike. Without
            a degree of freedom (a single product) they are infinite.
        """
        from scipy.stats import t

        value = np.asarray(self.value)
        freedom = np.asarray(self.degrees_of_freedom, dtype=float)
        freedom = freedom.reshape(freedom.shape + (1,) * (value.ndim - freedom.ndim))
        half = t.ppf((1 + level) / 2, freedom) * np.asarray(self.standard_error)
        half = np.where(freedom > 0, half, np.inf)
        return np.asarray(value - half), np.asarray(value + half)
