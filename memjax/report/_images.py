"""Arrays in [-1, 1] as PNG bytes and data URIs, small enough for a page that holds them all."""

import base64
import io

import numpy as np
from jaxtyping import Float, UInt8

from memjax._core.errors import require

THUMBNAIL_SIDE = 128
"""Longer side, in pixels, above which an image is reduced: 80 of them then take some 5 MB."""
PIXELATED_SIDE = 48
"""Images up to this side are shown with their pixels as squares instead of smoothed."""


def thumbnail(image: Float[np.ndarray, "height width channels"]) -> UInt8[np.ndarray, "h w c"]:
    """An image in [-1, 1] as 8-bit pixels, reduced to at most 128 pixels a side.

    Args:
        image: one or three channels are gray or RGB; of any other number the first is shown.

    Returns:
        Pixels with one or three channels; values outside [-1, 1] are clipped, NaN is mid-gray.
    """
    shown = image if image.shape[2] == 3 else image[:, :, :1]
    levels = np.nan_to_num((shown.astype(np.float64) + 1.0) * 127.5, nan=127.5)
    pixels = np.rint(np.clip(levels, 0.0, 255.0)).astype(np.uint8)
    height, width = pixels.shape[:2]
    if max(height, width) <= THUMBNAIL_SIDE:
        return pixels
    scale = THUMBNAIL_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pil = require("PIL.Image", "audit")
    reduced = pil.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).resize(
        size, pil.Resampling.LANCZOS
    )
    return np.asarray(reduced).reshape(size[1], size[0], -1)


def png(pixels: UInt8[np.ndarray, "h w c"]) -> bytes:
    """Encode 8-bit pixels with one or three channels as a PNG file."""
    pil = require("PIL.Image", "audit")
    buffer = io.BytesIO()
    image = pil.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png_file: bytes) -> str:
    """A PNG file as a ``data:`` URI."""
    return "data:image/png;base64," + base64.b64encode(png_file).decode("ascii")
