"""Images as arrays: one status per row, whatever stands in the files."""

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.data._array_file import read_array
from memjax.data._image_file import EXTENSIONS, decode_image, image_shape
from memjax.data._refuse import RefusedError, corrupt, mismatch

# Resampling and float32 arithmetic leave [-1, 1] by this much.
_RANGE_TOLERANCE = 1e-6


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
        status: `Status` per row, int32: OK; INPUT_CORRUPT (unreadable, unsafe to decode, or
            pixels not finite); INPUT_MISMATCH (readable, but of another shape, value range or
            kind).
        reasons: what is wrong with the row, in one line; empty where the status is OK.
        labels: class per row, -1 where none is known.
    """

    images: Float[np.ndarray, "n h w c"]
    ids: tuple[str, ...]
    sha256: tuple[str, ...]
    status: Int[np.ndarray, "n"]
    reasons: tuple[str, ...]
    labels: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        """Number of rows, the failed ones included."""
        return len(self.ids)

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    @property
    def ok(self) -> Bool[np.ndarray, "n"]:
        """True for the rows that can be used."""
        return self.status == Status.OK


def load_images(
    path: str | os.PathLike[str],
    *,
    event_shape: tuple[int, int, int] | None = None,
    value_range: tuple[float | int, float | int] | None = None,
) -> ImageSet:
    """Read the images of a folder, of a ``.npy`` or of a ``.npz`` file.

    *Folder*: every file below it with the extension of a PNG, JPEG, WebP, BMP, GIF or TIFF image
    is a row, in the order of the relative paths, which are the ids; hidden files and other files
    are passed over. The content decides how a file is decoded, not its extension; of animations
    the first frame counts. Gray and RGB at 8 bits and gray at 16 bits are read exactly, 16-bit
    color at 8 bits (as Pillow does), palettes as RGB. An alpha channel is dropped where it is
    opaque everywhere; images with transparent pixels do not fit, because what stands behind them
    is not known. Orientation tags and color profiles are not applied. Links to files inside the
    folder are read, links out of it are not, linked folders are not entered.

    *Array file*: [n, height, width] or [n, height, width, channels], as for `from_array`, in a
    ``.npz`` the only array or the one named ``images`` (or ``arr_0``). Pickled objects are
    refused.

    A file that cannot be used costs its own row only. No image is resized.

    Args:
        path: the folder or file.
        event_shape: (height, width, channels) that every image must have. ``None``: the shape
            most files have (of equally frequent ones, that of the earliest row).
        value_range: as for `from_array`; files with integer pixels do not need it.

    Returns:
        An `ImageSet`, with status and reason per row.

    Raises:
        InputError: nothing there, nothing usable in it, or an array file that is damaged.
        MissingExtraError: the folder holds images and Pillow is not installed.

    Accuracy and cost:
        Integer pixels k of b bits become the float32 nearest to 2 k / (2^b - 1) - 1. Every image
        file is read twice, the first time for its header only, unless ``event_shape`` is given.
        Files of more than 64 MiB or 2^23 pixels are not decoded; a hostile file costs less than
        2 s and 512 MB.
    """
    root = Path(path)
    if not os.path.exists(root):
        raise InputError(f"{root}: expected a folder of images or an array file, found nothing")
    if os.path.isdir(root):
        return _load_folder(root, event_shape)
    images = _check(read_array(root), str(root), value_range=value_range)
    if event_shape is not None and images.event_shape != event_shape:
        raise InputError(
            f"{root}: expected images of shape {event_shape} (height, width, channels), "
            f"found {images.event_shape}"
        )
    return images


def from_array(
    images: Num[np.ndarray, "..."],
    *,
    ids: Sequence[str] | None = None,
    labels: Int[np.ndarray, "n"] | None = None,
    value_range: tuple[float | int, float | int] | None = None,
) -> ImageSet:
    """Images that are already an array, checked row by row.

    Args:
        images: [n, height, width] or [n, height, width, channels], uint8, uint16 or floating.
            Integers span their type: 0 is -1 and 255 (65535) is 1.
        ids: one unique name per row; ``None`` for ``row-0000``, ``row-0001``, ...
        labels: class per row; ``None`` for -1.
        value_range: the floating-point values that mean black and white. They are mapped to
            [-1, 1]. ``None``: the values are in [-1, 1] already; since images in [0, 1] would
            pass for that, an array without any negative value is refused and the range has to be
            said.

    Returns:
        An `ImageSet`. Rows with NaN or infinite pixels are INPUT_CORRUPT, rows that leave the
        value range by more than a millionth INPUT_MISMATCH.

    Raises:
        InputError: another shape or dtype, no usable row, an unsaid value range, ids that are
            not unique or not one per row.

    Example:
        >>> import numpy as np
        >>> from memjax.data.images import from_array
        >>> black_and_white = np.array([[[0, 255]]], np.uint8)
        >>> from_array(black_and_white).images.ravel()
        array([-1.,  1.], dtype=float32)
    """
    return _check(images, "images", ids=ids, labels=labels, value_range=value_range)


def _check(
    images: Num[np.ndarray, "..."],
    name: str,
    *,
    ids: Sequence[str] | None = None,
    labels: Int[np.ndarray, "n"] | None = None,
    value_range: tuple[float | int, float | int] | None,
) -> ImageSet:
    """`from_array` under the name that its errors shall give."""
    if images.ndim not in (3, 4) or images.size == 0:
        raise InputError(
            f"{name}: expected shape [n, height, width] or [n, height, width, channels] without "
            f"empty axes, found {list(images.shape)}"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype.kind != "f" and images.dtype.str[1:] not in ("u1", "u2"):
        raise InputError(f"{name}: expected uint8, uint16 or floats, found {images.dtype}")
    n = len(images)
    names = tuple(ids) if ids is not None else _row_names(n)
    if len(names) != n or len(set(names)) != n:
        raise InputError(f"ids: expected {n} distinct names, found {len(set(names))}")

    rows = _Rows(names, images.shape[1:])
    if images.dtype.kind == "u":
        for i in range(n):
            rows.accept(i, _from_integers(images[i]))
    else:
        if value_range is None and not (images < 0).any():
            raise InputError(
                f"{name}: expected values in [-1, 1], found none below 0; "
                "give value_range=(0, 1), or (-1, 1) if that is meant"
            )
        low, high = value_range or (-1.0, 1.0)
        if not low < high:
            raise InputError(f"value_range: expected (low, high), found {value_range}")
        for i in range(n):
            try:
                rows.accept(i, _from_floats(images[i], low, high))
            except RefusedError as refusal:
                rows.refuse(i, refusal)
    return rows.finish(name, labels)


def _load_folder(root: Path, event_shape: tuple[int, int, int] | None) -> ImageSet:
    files = _image_files(root)
    if not files:
        raise InputError(
            f"{root}: expected images ({', '.join(sorted(EXTENSIONS))}), found none in the folder"
        )
    paths: list[Path] = []
    refusals: dict[int, RefusedError] = {}
    shapes: list[tuple[int, int, int]] = []
    inside = root.resolve()
    for i, name in enumerate(files):
        paths.append(path := root / name)
        try:
            if path.is_symlink():
                paths[i] = path = path.resolve()
                if not path.is_relative_to(inside):
                    raise corrupt("a link out of the folder")
            if event_shape is None:
                shapes.append(image_shape(path))
        except RefusedError as refusal:
            refusals[i] = refusal
        except (OSError, RuntimeError):  # RuntimeError: Python's word for a circle of links
            refusals[i] = corrupt("a link that leads nowhere")

    if event_shape is None:
        # With no shape at all every row is refused already, and any shape will do.
        event_shape = (collections.Counter(shapes).most_common(1) or [((1, 1, 1), 0)])[0][0]
    rows = _Rows(tuple(_printable(name) for name in files), event_shape)
    for i, path in enumerate(paths):
        try:
            if i in refusals:
                raise refusals[i]
            rows.accept(i, _from_integers(decode_image(path, event_shape)))
        except RefusedError as refusal:
            rows.refuse(i, refusal)
    return rows.finish(str(root), None)


class _Rows:
    """The columns of an `ImageSet` while they are being filled."""

    def __init__(self, ids: tuple[str, ...], event_shape: tuple[int, ...]):
        n = len(ids)
        try:
            self.images = np.empty((n, *event_shape), np.float32)
        except MemoryError:
            size = n * int(np.prod(event_shape)) * 4 / 2**30
            raise InputError(
                f"images: expected a set that fits in memory, found {n} rows of shape "
                f"{event_shape}, {size:.0f} GiB"
            ) from None
        self.ids = ids
        self.sha256 = [""] * n
        self.status = np.zeros(n, np.int32)
        self.reasons = [""] * n

    def accept(self, row: int, pixels: Float[np.ndarray, "h w c"]) -> None:
        self.images[row] = pixels
        self.sha256[row] = _content_hash(pixels)

    def refuse(self, row: int, refusal: RefusedError) -> None:
        self.images[row] = np.nan
        self.status[row] = refusal.status
        self.reasons[row] = str(refusal)

    def finish(self, name: str, labels: Int[np.ndarray, "n"] | None) -> ImageSet:
        if self.status.all():
            raise InputError(
                f"{name}: expected at least one usable image, found none among {len(self.ids)} "
                f"(first: {self.ids[0]}: {self.reasons[0]})"
            )
        return ImageSet(
            images=self.images,
            ids=self.ids,
            sha256=tuple(self.sha256),
            status=self.status,
            reasons=tuple(self.reasons),
            labels=np.full(len(self.ids), -1, np.int32) if labels is None else labels,
        )


def _image_files(root: Path) -> list[str]:
    """Relative POSIX paths of the image files below a folder, sorted.

    A stack instead of recursion: folders may be nested deeper than Python's stack.
    """
    found: list[str] = []
    stack = [""]
    while stack:
        folder = stack.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}{entry.name}"
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(f"{name}/")
                    elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                        found.append(name)
        except OSError as error:
            raise InputError(
                f"{root / folder}: expected a readable folder, found: {error.strerror}"
            ) from None
    return sorted(found)


def _from_integers(pixels: Num[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w c"]:
    """Whole range of an unsigned type to [-1, 1]."""
    return _integer_table(pixels.dtype.itemsize * 8)[pixels]


@functools.cache
def _integer_table(bits: int) -> Float[np.ndarray, "k"]:
    """Pixel value of every integer.

    The quotients are rounded once, in double precision, so that a gray level written at 8 bits
    (k) and at 16 (257 k) is the same float32: 257 k / (257 * 127.5) = k / 127.5.
    """
    return (np.arange(2**bits) / ((2**bits - 1) / 2) - 1).astype(np.float32)


def _from_floats(
    pixels: Float[np.ndarray, "h w c"], low: float | int, high: float | int
) -> Float[np.ndarray, "h w c"]:
    """[low, high] to [-1, 1]."""
    if not np.isfinite(pixels).all():
        raise corrupt("pixels are not finite")
    if (low, high) != (-1.0, 1.0):
        pixels = (pixels.astype(np.float64) - low) / (high - low) * 2 - 1
    if np.abs(pixels).max() > 1 + _RANGE_TOLERANCE:
        raise mismatch(f"pixel values leave the range [{low:g}, {high:g}]")
    return pixels.astype(np.float32)


def _content_hash(pixels: Float[np.ndarray, "h w c"]) -> str:
    """SHA-256 of one image, as `ImageSet.sha256` defines it."""
    shape = "x".join(map(str, pixels.shape))
    # Adding zero turns -0.0 into 0.0, so that equal pixels have equal bytes.
    data = np.ascontiguousarray(pixels + np.float32(0), dtype="<f4").tobytes()
    return hashlib.sha256(f"{shape}\n".encode() + data).hexdigest()


def _row_names(n: int) -> tuple[str, ...]:
    width = max(4, len(str(n - 1)))
    return tuple(f"row-{i:0{width}d}" for i in range(n))


def _printable(name: str) -> str:
    """A file name as valid Unicode; other bytes are written in hexadecimal."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
