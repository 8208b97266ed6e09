"""Read one array from a .npy or .npz file of unknown origin; nothing is ever unpickled."""

import io
import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import NoReturn

import numpy as np

from memjax._core.errors import InputError
from memjax.data._refuse import RefusedError, describe, open_regular

NPY_MAGIC = b"\x93NUMPY"
ZIP_MAGIC = b"PK\x03\x04"
# Arrays of an archive with several: our name, then that of published sample batches.
_NPZ_NAMES = ("images", "arr_0")
# Deflate packs at most 1032:1. Pictures stay far below 100:1; small arrays may do as they like.
_MAX_RATIO = 100
_FREE_BYTES = 2**26
# NumPy parses the header with `ast.literal_eval`, whose cost grows fast; 10,000 is its own limit.
_MAX_HEADER = 10_000


def read_array(path: Path) -> np.ndarray:
    """The array in a .npy file, or the one array of images in a .npz file.

    The content decides which of the two it is, not the file's name. Memory: the array's own.

    Raises:
        InputError: not such a file, damaged, truncated, holding Python objects, several arrays
            of which none is named ``images`` or ``arr_0``, or compressed like a bomb.
    """
    return _read(path, None)


def read_member(path: Path, name: str) -> np.ndarray:
    """The array of this name in a .npz file; everything else as for ``read_array``."""
    return _read(path, name)


def _read(path: Path, name: str | None) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"):
        try:
            # What the user names may be a link; only what a folder holds may not lead out of it.
            with open_regular(path.resolve()) as file:
                magic = file.read(len(NPY_MAGIC))
                file.seek(0)
                if magic == NPY_MAGIC and name is None:
                    return _read_npy(path, file, os.fstat(file.fileno()).st_size)
                if magic.startswith(ZIP_MAGIC):
                    return _read_npz(path, file, name)
        except InputError:
            raise
        except RefusedError as error:
            _fail(path, "a readable file", str(error))
        except MemoryError:
            _fail(path, "an array that fits in memory", "one that does not")
        except Exception as error:  # zipfile, zlib and ast fail in many ways on damaged input
            _fail(path, "an intact .npy or .npz file", describe(error))
    if name is not None:
        _fail(path, f"a .npz file with an array {name!r}", "another file")
    _fail(path, "a folder of images, a .npy or a .npz file", "neither")


def _read_npz(path: Path, file: io.BufferedIOBase, wanted: str | None) -> np.ndarray:
    with zipfile.ZipFile(file) as archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        found = f"{len(members)} arrays" if len(members) != 1 else "one"
        names = _NPZ_NAMES if wanted is None else (wanted,)
        name = next((n for n in names if n in members), None)
        if name is None and wanted is not None:
            _fail(path, f"an array {wanted!r}", found)
        if name is None and len(members) == 1:
            (name,) = members
        if name is None:
            _fail(path, "one array, or one of several named 'images'", found)
        member = members[name]
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            _fail(path, "an array stored or deflated, as NumPy writes it", "another compression")
        ratio = member.file_size / max(member.compress_size, 1)
        if member.file_size > _FREE_BYTES and ratio > _MAX_RATIO:
            _fail(path, f"an array compressed at most {_MAX_RATIO}:1", f"{ratio:.0f}:1")
        with archive.open(member) as stream:
            return _read_npy(path, stream, member.file_size)  # pyright: ignore[reportArgumentType]


def _read_npy(path: Path, stream: io.BufferedIOBase, size: int) -> np.ndarray:
    """Read an array from a stream that holds ``size`` bytes."""
    preamble = stream.read(len(NPY_MAGIC) + 2)
    major = preamble[-2] if len(preamble) == len(NPY_MAGIC) + 2 else 0
    width = {1: 2, 2: 4, 3: 4}.get(major, 0)
    length_bytes = stream.read(width)
    length = int.from_bytes(length_bytes, "little")
    if not preamble.startswith(NPY_MAGIC) or len(length_bytes) < width or width == 0:
        _fail(path, "a .npy array", "something else")
    if length > _MAX_HEADER:
        _fail(path, f"a .npy header of at most {_MAX_HEADER} bytes", f"{length}")
    npy = np.lib.format
    parse = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
    shape, fortran_order, dtype = parse(io.BytesIO(length_bytes + stream.read(length)))
    if dtype.hasobject or dtype.names is not None or dtype.kind not in "uifb":
        _fail(path, "an array of numbers", f"dtype {str(dtype)[:80]}")
    if min(shape, default=1) < 1:
        _fail(path, "an array without empty axes", f"shape {shape}")
    need = math.prod(shape) * dtype.itemsize
    have = size - len(preamble) - width - length
    if need > have:
        _fail(path, f"{need} bytes of pixels for shape {shape}", f"{have}")
    data = np.empty(need, np.uint8)
    view = memoryview(data)  # pyright: ignore[reportArgumentType]
    filled = 0
    # An archive may promise more than it holds: stop where it stops.
    while filled < need:
        count = stream.readinto(view[filled : filled + 2**20])
        if not count:
            _fail(path, f"{need} bytes of pixels for shape {shape}", f"{filled}")
        filled += count
    array = data.view(dtype)
    return array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)


def _fail(path: Path, expected: str, found: str) -> NoReturn:
    raise InputError(f"{path}: expected {expected}, found {found}")
