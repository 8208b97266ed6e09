"""Images near an image that nobody stored: how hard an image like it is."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memjax._core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Blurred:
    """The image convolved with a Gaussian, its border continued by its outermost pixels.

        x' = A x A^T,    A_ij proportional to exp(-(i - j)^2 / 2 width^2) for |i - j| <= 4 width

    A blurred image is about as hard to denoise as the image, and is not in the training set: what
    a model knows of it, it has not learned from copies of the image. An image that blurring hardly
    changes (all of one color, or smooth over many pixels) is its own neighbor: then nothing is
    compared, and a wider blur may serve.

    Args:
        width: standard deviation of the Gaussian, in pixels (of the latent, where the score is of
            latents). Positive.

    Raises:
        InputError: a width that is not positive and finite; when called, an array that is no
            image [height, width, channels].
    """

    width: float = 0.5
    name: ClassVar[str] = "blurred"
    needs_image: ClassVar[bool] = True

    def __post_init__(self):
        if not 0.0 < self.width < math.inf:
            raise InputError(f"width: expected a positive finite number, got {self.width}")

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The blurred image, of the same shape."""
        if x.ndim != 3:
            shape = list(x.shape)
            raise InputError(f"neighbor: expected an image [height, width, channels], got {shape}")
        rows, columns = (jnp.asarray(self._matrix(side), x.dtype) for side in x.shape[:2])
        return jnp.einsum("ih,hwc,jw->ijc", rows, x, columns, precision="highest")

    def _matrix(self, side: int) -> Float[np.ndarray, "side side"]:
        reach = math.ceil(4 * self.width)
        offsets = np.arange(-reach, reach + 1)
        kernel = np.exp(-0.5 * (offsets / self.width) ** 2)
        matrix = np.zeros((side, side))
        for i in range(side):
            np.add.at(matrix[i], np.clip(i + offsets, 0, side - 1), kernel / kernel.sum())
        return matrix
