"""Many images as one picture."""

import numpy as np
from jaxtyping import Float

from memjax.report._images import png, thumbnail

_SIDE = 64
"""Small images are enlarged, pixel by pixel, to at least this side."""


def picture_grid(images: Float[np.ndarray, "n h w c"], *, columns: int | None = None) -> bytes:
    """Images side by side, row by row, as a PNG file.

    Args:
        images: at least one, in [-1, 1]; values outside are clipped, NaN is mid-gray. One or
            three channels are gray or RGB; of any other number the first is shown.
        columns: images per row; ``None`` for a square grid.

    Returns:
        The PNG file. Images are separated by thin white lines; small ones are enlarged by a
        whole factor, ones of more than 128 pixels a side are reduced to that.
    """
    tiles = [thumbnail(image) for image in images]
    height, width, channels = tiles[0].shape
    factor = max(1, -(-_SIDE // max(height, width)))
    columns = columns or int(np.ceil(np.sqrt(len(tiles))))
    rows = -(-len(tiles) // columns)
    gap = 2
    step_y, step_x = factor * height + gap, factor * width + gap
    page = np.full((rows * step_y + gap, columns * step_x + gap, channels), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = gap + step_y * (i // columns), gap + step_x * (i % columns)
        enlarged = tile.repeat(factor, axis=0).repeat(factor, axis=1)
        page[y : y + factor * height, x : x + factor * width] = enlarged
    return png(page)
