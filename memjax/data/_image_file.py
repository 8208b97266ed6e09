"""Decode one image file of unknown origin, in bounded time and memory."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memjax._core.errors import require
from memjax.data._refuse import RefusedError, corrupt, describe, mismatch, open_regular

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

# 2896 x 2896. The float32 RGB image is then at most 96 MiB, and every decoder stays under a
# second and, with its buffers, under 300 MiB.
_MAX_PIXELS = 2**23
_MAX_FILE_BYTES = 2**26
# Each scan of a progressive JPEG costs a pass over all coefficients but only some 30 bytes of
# file. Encoders write about ten.
_MAX_JPEG_SCANS = 100
# Pillow walks through the chunks of a PNG in Python, some four reads each; encoders write chunks
# of at least 8 KiB.
_MAX_READS = 100_000

_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of a TIFF

_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3}
_CHANNELS |= dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), 1)


def image_shape(path: Path) -> tuple[int, int, int]:
    """(height, width, channels) from the header of an image file.

    Raises:
        RefusedError: not an image that `decode_image` could read.
    """
    with _opened(path) as (_, shape):
        return shape


def decode_image(path: Path, event_shape: tuple[int, int, int]) -> np.ndarray:
    """The pixels of an image file, uint8 or uint16 [height, width, channels].

    Raises:
        RefusedError: unreadable, or of another shape than ``event_shape``.
    """
    with _opened(path) as (image, shape):
        if shape != event_shape:
            raise mismatch(f"shape {list(shape)}, expected {list(event_shape)}")
        image.load()
        pixels = np.asarray(_without_alpha(image))
    return pixels.reshape(shape)


class _CountedReads(io.BytesIO):
    """File content in memory that refuses to be read in very many pieces."""

    left = _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise corrupt("its content is chopped into too many parts")
        return super().read(size)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, tuple[int, int, int]]]:
    """Open with Pillow, check the header, and turn whatever goes wrong inside into a refusal."""
    pillow = require("PIL.Image", "audit")
    with open_regular(path) as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise corrupt(f"more than {_MAX_FILE_BYTES} bytes")
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise corrupt(f"a JPEG of more than {_MAX_JPEG_SCANS} scans")
    # Decoders of damaged files fail with almost any exception and warn about the rest.
    with warnings.catch_warnings(action="ignore"):
        try:
            with pillow.open(_CountedReads(data), formats=_FORMATS) as image:
                width, height = image.size
                if image.mode not in _CHANNELS:
                    raise mismatch(f"color mode {image.mode}, expected gray, RGB or a palette")
                if width * height > _MAX_PIXELS:
                    raise corrupt(f"{width} x {height} is more than {_MAX_PIXELS} pixels")
                # libtiff allocates a whole tile, however small the image that it covers.
                tags = getattr(image, "tag_v2", {})
                if tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0) > _MAX_PIXELS:
                    raise corrupt(f"tiles of more than {_MAX_PIXELS} pixels")
                yield image, (height, width, _CHANNELS[image.mode])
        except RefusedError:
            raise
        except pillow.UnidentifiedImageError:
            raise corrupt(f"not one of {', '.join(_FORMATS)}") from None
        except Exception as error:
            raise corrupt(f"cannot be decoded: {describe(error)}") from None


def _without_alpha(image: Any) -> Any:
    """The image as L, RGB or 16-bit gray; transparent pixels are refused, not flattened."""
    gray = _CHANNELS[image.mode] == 1
    if image.mode.startswith("I;16"):
        return image
    if image.mode.endswith("A") or "transparency" in image.info:
        image = image.convert("LA" if gray else "RGBA")
        if image.getextrema()[-1][0] < 255:
            raise mismatch("has transparent pixels: flatten it onto the background it stands on")
    return image.convert("L" if gray else "RGB")
