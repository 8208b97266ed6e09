"""Weights and configurations from folders of unknown origin.

A safetensors file is eight bytes of length, a JSON header of that length, and the numbers. Each
claim of a header is compared with its file before memory is taken for it; what is read is what is
hashed, in one pass and one array at a time. Nothing is ever unpickled, no link leads out of the
folder, and every fault is one line that names the file.
"""

import contextlib
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from memjax._core.errors import CheckpointError, InputError
from memjax._core.files import open_regular
from memjax._core.text import one_line

STEM = "diffusion_pytorch_model"
"""What diffusers calls the weights of a model."""

_PICKLED = {".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pt2", ".pth", ".sav"}
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_FIELDS = {"dtype", "shape", "data_offsets"}
# A configuration is a page of text, and a header some hundred bytes an array: 2^22 bytes hold
# twenty times the arrays of the largest diffusion model, and are parsed in a fraction of a second.
_MAX_CONFIG_BYTES = 2**20
_MAX_HEADER_BYTES = 2**22
_MAX_NESTING = 32
_MAX_AXES = 8
_MAX_NAME = 500
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", re.ASCII)
_VARIANT = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_HWIO = (2, 3, 1, 0)


class Weights(NamedTuple):
    """The arrays of a model, by the names in its files.

    Attributes:
        arrays: each array; those with four axes as [height, width, in, out].
        sha256: of the one file; of several, the hash of what ``sha256sum`` prints for them in
            order of their names.
        files: the files read, in order of their names.
    """

    arrays: dict[str, Array]
    sha256: str
    files: tuple[Path, ...]


class _Entry(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_weights(
    folder: Path, stem: str = STEM, *, variant: str | None = None, dtype: Any = jnp.float32
) -> Weights:
    """Read the safetensors weights in a folder: one file, or shards with an index.

    Args:
        folder: the folder of one model.
        stem: what the file is called: ``{stem}.safetensors``, or with shards
            ``{stem}.safetensors.index.json``.
        variant: ``"fp16"`` reads ``{stem}.fp16.safetensors``, or the shards that
            ``{stem}.safetensors.index.fp16.json`` lists. None reads the files without a variant,
            or the only variant there is.
        dtype: what floating-point arrays become; None keeps what is stored. Integers stay
            integers. Types of 64 bits need ``jax_enable_x64``, without it they become 32 bits.

    Returns:
        The arrays, the hash and the files. Bitwise what is stored where the type is kept; float16
        and bfloat16 to float32 is exact.

    Raises:
        CheckpointError: no such weights, only pickled ones, a damaged file or index, a shard
            missing or with other arrays than the index says, a link out of the folder, or an
            integer that needs 64 bits without ``jax_enable_x64``.
        InputError: ``dtype`` is not floating point, or ``variant`` not a name.

    Cost: the memory of the result and of one array more.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype: expected a floating-point type or None, got {dtype}")
    shards = _find(folder, stem, variant)
    _headers(shards)
    arrays, lines, digest = {}, "", ""
    for file, names in shards.items():
        hasher = hashlib.sha256()
        with open_inside(file, "the weights") as stream:
            header = _read_header(stream, file, hasher)
            _check_names(file, header, names)
            for name, array in _read_arrays(stream, file, header, hasher):
                arrays[name] = _convert(file, name, array, dtype)
        digest = hasher.hexdigest()
        lines += f"{digest}  {file.name}\n"
    if len(shards) > 1:
        digest = hashlib.sha256(lines.encode()).hexdigest()
    return Weights(arrays, digest, tuple(shards))


def weight_shapes(
    folder: Path, stem: str = STEM, variant: str | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and stored types of the weights in a folder, from the headers alone.

    Args:
        folder: the folder of one model.
        stem: as for ``read_weights``.
        variant: the same.

    Returns:
        Shape and stored type by name, in the order of the files; shapes with four axes as
        [height, width, in, out].

    Raises:
        CheckpointError: as for ``read_weights``, as far as the headers go.
    """
    return {
        name: jax.ShapeDtypeStruct(_permuted(entry.shape), entry.dtype)
        for header in _headers(_find(folder, stem, variant))
        for name, entry in header.items()
    }


def stored_shapes(file: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types in one file, both as stored, from its header alone.

    Args:
        file: the safetensors file.

    Returns:
        Shape and type by name, in the order of the file.

    Raises:
        CheckpointError: as for ``read_weights``, as far as the header goes.
    """
    (header,) = _headers({file: None})
    return {name: jax.ShapeDtypeStruct(e.shape, e.dtype) for name, e in header.items()}


def parse_weights(data: bytes, file: Path) -> dict[str, np.ndarray]:
    """The arrays in the bytes of one safetensors file, as they are stored.

    Args:
        data: the whole file.
        file: its name, for errors.

    Returns:
        The arrays by name, each with memory of its own.

    Raises:
        CheckpointError: the bytes are not a well-formed safetensors file.
    """
    stream = io.BytesIO(data)
    header = _read_header(stream, file)
    return dict(_read_arrays(stream, file, header))


def read_json(file: Path, *, limit: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file in a model's folder.

    Args:
        file: the file; a regular one, in its folder or in the cache that its folder belongs to.
        limit: most bytes it may have.

    Returns:
        The object. NaN and infinities, which published configurations hold, are numbers here.

    Raises:
        CheckpointError: the file cannot be read, is larger than ``limit``, or not one JSON object,
            nested at most 32 deep, whose names differ.
    """
    with open_inside(file, "JSON") as stream:
        data = stream.read(limit + 1)
    try:
        if len(data) > limit:
            raise ValueError(f"more than {limit} bytes")
        value = _parse(data)
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON, found: {one_line(str(error))}") from None
    if not isinstance(value, dict):
        fail(file, "a JSON object", type(value).__name__)
    return value


@contextlib.contextmanager
def open_inside(file: Path, what: str) -> Iterator[io.BufferedReader]:
    """Open a file that is in its folder, or that the Hugging Face cache of the folder holds.

    Args:
        file: the file: a regular one, or a link to one there.
        what: what it should be, for errors.

    Yields:
        The open file, in binary mode.

    Raises:
        CheckpointError: there is none, it cannot be read, or is a link out of the folder.
    """
    try:
        target, folder = file.resolve(), file.parent.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a zero byte
        fail(file, what, one_line(str(error)))
    # models--name/snapshots/revision/... is a tree of links into models--name/blobs.
    caches = [p.parent / "blobs" for p in folder.parents if p.name == "snapshots"]
    if not any(target.is_relative_to(home) for home in (folder, *caches)):
        fail(file, what, "a link out of its folder")
    try:
        with open_regular(target) as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(f"{file}: expected {what}, found: {error.strerror}") from None


def refuse_pickle(path: Path) -> None:
    """Refuse what may be a pickle, with a line on how to convert it. It is not opened.

    Args:
        path: a file, refused by its suffix; or a folder in which nothing readable was found,
            refused if a file in it has such a suffix.

    Raises:
        CheckpointError: the file is, or the folder holds, ``.bin``, ``.ckpt``, ``.pkl``, ``.pt``
            or their like.
    """
    files = [path]
    if path.is_dir():
        files = sorted(_list(path))
    for file in files:
        if file.suffix.lower() in _PICKLED:
            _fail_pickled(file, file.suffix)


def _find(folder: Path, stem: str, variant: str | None) -> dict[Path, Any]:
    """The files of the weights, each with the names that an index puts there, or None."""
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise InputError(f"variant: expected a name such as 'fp16', got {one_line(repr(variant))}")
    if not folder.is_dir():
        refuse_pickle(folder)
        fail(folder, "the folder of a model", "a file" if folder.exists() else "nothing")
    present = {file.name for file in _list(folder)}
    if variant is None:
        variant = _only_variant(folder, stem, present)
    infix = f".{variant}" if variant else ""
    file = f"{stem}{infix}.safetensors"
    index = f"{stem}.safetensors.index{infix}.json"
    if file in present and index in present:
        fail(folder, f"one of {file} and {index}", "both: remove the one that is out of date")
    if file in present:
        return {folder / file: None}
    if index in present:
        return _read_index(folder / index)
    refuse_pickle(folder)
    fail(folder, f"a file {file} or {index}", "neither")


def _only_variant(folder: Path, stem: str, present: set[str]) -> str | None:
    """None where there are files without a variant or none at all, else the one variant."""
    name = re.escape(stem)
    pattern = re.compile(
        rf"{name}(\.(?P<one>\w+))?\.safetensors"
        rf"|{name}\.safetensors\.index(\.(?P<many>\w+))?\.json",
        re.ASCII,
    )
    matches = [match for match in map(pattern.fullmatch, present) if match]
    variants = sorted({match["one"] or match["many"] or "" for match in matches})
    if not variants or variants[0] == "":
        return None
    if len(variants) > 1:
        fail(folder, f"{stem}.safetensors, or one variant of it", ", ".join(variants))
    return variants[0]


def _read_index(index: Path) -> dict[Path, Any]:
    """The shards that an index lists, in order of their names, each with its arrays."""
    places = read_json(index, limit=_MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        fail(index, "an object weight_map", shown(places))
    shards: dict[str, list[str]] = {}
    for name, place in places.items():
        # A plain name: no folder, no way out of this one.
        if not isinstance(place, str) or not _SHARD.fullmatch(place):
            fail(index, "names of safetensors files in this folder", shown(place))
        shards.setdefault(place, []).append(name)
    return {index.parent / place: frozenset(shards[place]) for place in sorted(shards)}


def _headers(shards: dict[Path, Any]) -> list[dict[str, _Entry]]:
    """The headers of all files, checked."""
    headers = []
    for file, names in shards.items():
        with open_inside(file, "the weights") as stream:
            header = _read_header(stream, file)
        _check_names(file, header, names)
        headers.append(header)
    return headers


def _check_names(file: Path, header: dict[str, _Entry], names: frozenset[str] | None) -> None:
    """A shard holds what the index says, no less and no more."""
    if names is None or header.keys() == names:
        return
    missing, extra = sorted(names - header.keys()), sorted(header.keys() - names)
    if missing:
        fail(file, f"an array {shown(missing[0])}, as the index says", "none")
    fail(file, "the arrays that the index lists", f"{shown(extra[0])} too")


def _read_header(stream: io.BufferedIOBase, file: Path, hasher: Any = None) -> dict[str, _Entry]:
    """Read and check the header; the stream is then at the first array."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8:
        fail(file, "safetensors", f"{size} bytes")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
            _fail_pickled(file, "an archive or a pickle")
        fail(file, "safetensors", f"a header of {length} bytes in a file of {size}")
    data = stream.read(length)
    if hasher is not None:
        hasher.update(start + data)
    try:
        records = _parse(data)
    except ValueError as error:
        fail(file, "safetensors", f"no header: {one_line(str(error))}")
    if not isinstance(records, dict):
        fail(file, "safetensors", f"a header of {type(records).__name__}")
    records.pop("__metadata__", None)  # free text
    entries = {name: _entry(file, name, record) for name, record in records.items()}
    header = dict(sorted(entries.items(), key=lambda item: item[1].begin))
    end = 0
    for name, entry in header.items():
        if entry.begin != end:
            where = f"{shown(name)} at byte {shown(entry.begin)}, not at {end}"
            fail(file, "arrays one after the other", where)
        end = entry.end
    if end != size - 8 - length:
        fail(file, f"{shown(end)} bytes of arrays", f"{size - 8 - length}")
    return header


def _entry(file: Path, name: str, record: Any) -> _Entry:
    """One array's claims, checked for themselves."""
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        fail(file, "printable names of arrays", shown(name))
    where = f"{file}: {one_line(name, limit=80)}"
    if not isinstance(record, dict) or record.keys() != _FIELDS:
        fail(where, f"an object of {', '.join(sorted(_FIELDS))}", shown(record))
    kind, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        fail(where, f"a type among {', '.join(_DTYPES)}", shown(kind))
    if not _whole(shape) or len(shape) > _MAX_AXES or 0 in shape:
        fail(where, f"a shape of at most {_MAX_AXES} positive sizes", shown(shape))
    if not _whole(offsets) or len(offsets) != 2:
        fail(where, "where it begins and ends", shown(offsets))
    dtype = np.dtype(_DTYPES[kind])
    begin, end = offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        fail(where, f"the bytes of {kind}{shown(shape)}", f"bytes {shown(offsets)}")
    return _Entry(dtype, tuple(shape), begin, end)


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _read_arrays(
    stream: io.BufferedIOBase, file: Path, header: dict[str, _Entry], hasher: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Read the arrays in order, each into memory of its own."""
    for name, entry in header.items():
        try:
            data = np.empty(entry.end - entry.begin, np.uint8)
        except MemoryError:
            fail(file, "arrays that fit in memory", f"{shown(name)}, which does not")
        view, filled = memoryview(data), 0  # pyright: ignore[reportArgumentType]
        while filled < len(view):
            count = stream.readinto(view[filled:])
            if not count:
                fail(file, f"{len(view)} bytes of {shown(name)}", f"{filled}")
            filled += count
        if hasher is not None:
            hasher.update(view)
        if entry.dtype == np.bool_ and data.max() > 1:
            fail(file, f"zeros and ones in {shown(name)}", f"{data.max()}")
        yield name, data.view(entry.dtype).reshape(entry.shape)


def _convert(file: Path, name: str, array: np.ndarray, dtype: Any) -> Array:
    """An array as JAX holds it; copied at most once."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        target = jax.dtypes.canonicalize_dtype(array.dtype if dtype is None else dtype)
    else:
        target = jax.dtypes.canonicalize_dtype(array.dtype)
        limits = None if array.dtype == np.bool_ else np.iinfo(target)
        if limits and (array.max() > limits.max or array.min() < limits.min):
            fail(file, f"numbers of 32 bits in {shown(name)}", "larger ones")
    if array.ndim == 4:
        array = array.transpose(_HWIO)
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinity
        return jnp.asarray(array.astype(target, order="C", copy=False))


def _permuted(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _HWIO) if len(shape) == 4 else shape


def _list(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None


def _parse(data: bytes) -> Any:
    """JSON whose names differ, in which no later step can get lost."""
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    # What is left without the strings are brackets that match.
    marks = np.frombuffer(_STRING.sub("", text).encode(), np.uint8)
    opened = np.isin(marks, list(b"[{")).astype(np.int32) - np.isin(marks, list(b"]}"))
    if np.cumsum(opened).max(initial=0) > _MAX_NESTING:
        raise ValueError(f"nested more than {_MAX_NESTING} deep")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name given twice")
    return names


def shown(value: Any) -> str:
    """A value of a configuration, fit for the end of an error's line."""
    return one_line(repr(value), limit=80)


def fail(where: Path | str, expected: str, found: str) -> NoReturn:
    """Raise a `CheckpointError`.

    Args:
        where: the file, and the field in it.
        expected: what should be there.
        found: what is.
    """
    raise CheckpointError(f"{where}: expected {expected}, found {found}")


def _fail_pickled(file: Path, found: str) -> NoReturn:
    raise CheckpointError(
        f"{file}: expected safetensors, found {found}, which may be a pickle and run code "
        "when read; convert it where you trust it: safetensors.torch.save_file("
        "torch.load(file, weights_only=True), 'model.safetensors')"
    )
