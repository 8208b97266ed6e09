"""Images as arrays: one status per row, whatever stands in the files."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from memjax._core.status import Status


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one shape, with names, content hashes and one status per row.

    A row that failed keeps its place: its pixels are NaN, its hash is empty and its reason says
    in one line what was wrong.

    Attributes:
        images: float32 [n, height, width, channels] in [-1, 1].
        ids: one name per row, unique.
        sha256: SHA-256 per row of the text ``HEIGHTxWIDTHxCHANNELS`` and a line feed, followed by
            the float32 pixels (little endian, row-major, channels last). Pictures that decode to
            the same pixels share it, whatever their file format.
        status: `Status` per row, int32: OK; INPUT_CORRUPT (unreadable, or pixels not finite);
            INPUT_MISMATCH (readable, but of another shape, value range or kind).
        reasons: what is wrong with the row, in one line; empty where the status is OK.
        labels: class per row, int32, where the source has one.
    """

    images: Float[np.ndarray, "n h w c"]
    ids: tuple[str, ...]
    sha256: tuple[str, ...]
    status: Int[np.ndarray, "n"]
    reasons: tuple[str, ...]
    labels: Int[np.ndarray, "n"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    @property
    def ok(self) -> np.ndarray:
        """Boolean mask of the readable rows."""
        return self.status == Status.OK


def from_array(
    images: np.ndarray,
    *,
    ids: Sequence[str] | None = None,
    labels: Int[np.ndarray, "n"] | None = None,
) -> ImageSet:
    """Images already in [-1, 1], channels last, as an `ImageSet`."""
    pixels = np.asarray(images, np.float32)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    n = len(pixels)
    return ImageSet(
        images=pixels,
        ids=tuple(ids) if ids is not None else tuple(f"row-{i:06d}" for i in range(n)),
        sha256=tuple(_content_hash(row) for row in pixels),
        status=np.zeros(n, np.int32),
        reasons=("",) * n,
        labels=labels,
    )


def _content_hash(pixels: Float[np.ndarray, "h w c"]) -> str:
    """SHA-256 of one image, as `ImageSet.sha256` defines it."""
    shape = "x".join(map(str, pixels.shape))
    # Adding zero turns -0.0 into 0.0, so that equal pixels have equal bytes.
    data = np.ascontiguousarray(pixels + np.float32(0), dtype="<f4").tobytes()
    return hashlib.sha256(f"{shape}\n".encode() + data).hexdigest()
