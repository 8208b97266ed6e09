"""A folder of ours, config.json and model.safetensors: written whole, read with suspicion.

What a configuration says beside its format, network and weights is its reader's business; the
fields are read one by one, and every fault is one line that names file and field.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from memjax._core.errors import CheckpointError, InputError
from memjax._core.files import write_atomically
from memjax._core.text import one_line
from memjax.checkpoints._safetensors import open_inside, parse_weights, read_json, refuse_pickle

VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# Our networks are small: larger numbers are no network of ours, and would make building one take
# forever.
_MAX_SIZE = 2**16
_MAX_DEPTH = 64

Kinds = Mapping[str, type[nn.Module]]
"""The networks that a folder may hold, by name."""


def write_folder(
    path: Path,
    config: dict[str, Any],
    variables: dict[str, Any],
    training: Mapping[str, Any] | None,
) -> None:
    """Write weights and configuration, each file whole, the latter with the former's hash last.

    Args:
        path: the folder; made if missing.
        config: the configuration, but for ``weights`` and ``training``.
        variables: the network's parameters, float32 arrays.
        training: how it was trained, as JSON values; kept as it is.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    weights = safetensors.numpy.save(
        {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    )
    record = {
        "file": WEIGHTS_FILE,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables)),
    }
    training = None if training is None else dict(training)
    whole = {**config, "weights": record, "training": training}
    text = json.dumps(whole, indent=2, allow_nan=False) + "\n"
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / WEIGHTS_FILE, weights)
        write_atomically(path / CONFIG_FILE, text.encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None


def read_folder(path: Path, format: str, what: str) -> dict[str, Any]:
    """The configuration of a folder, its ``format`` and ``version`` checked.

    Args:
        path: the folder.
        format: the one expected.
        what: what the folder should be of, in words.

    Raises:
        CheckpointError: no folder, no configuration, or one of another format or version.
    """
    if not path.is_dir():
        refuse_pickle(path)
        found = "a file" if path.exists() else "nothing"
        raise CheckpointError(f"{path}: expected the folder of {what}, found {found}")
    file = path / CONFIG_FILE
    if not file.is_file():
        refuse_pickle(path)
        raise CheckpointError(f"{path}: expected a file {CONFIG_FILE}, found none")
    config = read_json(file)
    if config.get("format") != format:
        fail(file, "format", repr(format), one_line(repr(config.get("format")), limit=80))
    if config.get("version") != VERSION:
        fail(file, "version", str(VERSION), one_line(repr(config.get("version")), limit=80))
    return config


def describe(module: nn.Module, kinds: Kinds) -> dict[str, Any]:
    """Name and arguments of one of these networks, as JSON values.

    Raises:
        InputError: another module.
    """
    name = type(module).__name__
    if kinds.get(name) is not type(module):
        raise InputError(f"network: expected one of {', '.join(kinds)}, got {name}")
    arguments = {key: getattr(module, key) for key in _arguments(type(module))}
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    return {"name": name, **listed}


def _arguments(kind: type[nn.Module]) -> dict[str, Any]:
    """Arguments of a network by name, with their defaults."""
    fields = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    return {f.name: f.default for f in fields if f.name not in ("parent", "name")}


def _network(path: Path, config: dict[str, Any], kinds: Kinds) -> nn.Module:
    file = path / CONFIG_FILE
    given = read_field(path, config, "network", dict)
    kind = kinds.get(given["name"]) if isinstance(given.get("name"), str) else None
    if kind is None:
        known = f"one of {', '.join(kinds)}"
        fail(file, "network.name", known, one_line(repr(given.get("name")), limit=80))
    arguments = _arguments(kind)
    unknown = sorted(set(given) - set(arguments) - {"name"})
    if unknown:
        fail(file, "network", f"arguments of {kind.__name__}", one_line(repr(unknown[0])))
    values = {}
    for name, default in arguments.items():
        check: Callable = {bool: bool, tuple: a_shape}.get(type(default), a_size)
        if name == "num_conditions":
            check = an_index
        values[name] = read_field(path, given, name, check, "network.")
    depth = values["num_blocks"] * len(values.get("channels", (1,)))
    if depth > _MAX_DEPTH:
        fail(file, "network.num_blocks", f"at most {_MAX_DEPTH} blocks", str(depth))
    return kind(**values)


def plan(
    path: Path, config: dict[str, Any], kinds: Kinds
) -> tuple[nn.Module, dict[str, jax.ShapeDtypeStruct]]:
    """The network that a configuration describes, and the shapes of its weights by name."""
    module = _network(path, config, kinds)
    event_shape = read_field(path, config, "event_shape", a_shape)
    try:
        x = jax.ShapeDtypeStruct(event_shape, jnp.float32)
        t = jax.ShapeDtypeStruct((), jnp.float32)
        wanted = jax.eval_shape(module.init, jax.random.key(0), x, t)["params"]
    except InputError as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: {one_line(str(error))}") from None
    return module, flatten_dict(wanted, sep="/")  # pyright: ignore[reportReturnType]


def compare(file: Path, planned: dict[str, Any], found: Mapping[str, Any]) -> None:
    """The arrays in a file are those that the network wants."""
    for name in sorted(planned.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{file}: expected an array {name!r}, found none")
        if name not in planned:
            extra = one_line(repr(name), limit=200)
            raise CheckpointError(f"{file}: expected no array {extra}, found one")
        want, have = (f"{a.dtype}{list(a.shape)}" for a in (planned[name], found[name]))
        if want != have:
            fail(file, name, want, have)


def read_variables(path: Path, config: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any]:
    """Read the weights, after their hash, and compare them with what the network wants."""
    record = read_field(path, config, "weights", dict)
    if record.get("file") != WEIGHTS_FILE:
        found = one_line(repr(record.get("file")), limit=80)
        fail(path / CONFIG_FILE, "weights.file", repr(WEIGHTS_FILE), found)
    file = path / WEIGHTS_FILE
    with open_inside(file, "the weights") as stream:
        data = stream.read()
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.get("sha256"):
        expected = one_line(str(record.get("sha256")), limit=64)
        fail(file, "sha256", expected, f"{digest} ({len(data)} bytes): damaged or exchanged")
    arrays = parse_weights(data, file)
    compare(file, planned, arrays)
    count = sum(array.size for array in arrays.values())
    if record.get("parameters") != count:
        found = one_line(repr(record.get("parameters")), limit=80)
        fail(path / CONFIG_FILE, "weights.parameters", str(count), found)
    return {"params": unflatten_dict({k: jnp.asarray(v) for k, v in arrays.items()}, sep="/")}


def read_field(
    path: Path, config: Mapping[str, Any], name: str, check: Callable, prefix: str = ""
) -> Any:
    """One field of the configuration, as ``check`` (a type or one of the functions below) says."""
    file = path / CONFIG_FILE
    if name not in config:
        raise CheckpointError(f"{file}: expected a field {prefix}{name}, found none")
    value = config[name]
    if isinstance(check, type):
        if isinstance(value, check):
            return value
        expected = {dict: "an object", str: "text", bool: "true or false"}[check]
    else:
        try:
            return check(value)
        except ValueError as error:
            expected = str(error)
    fail(file, f"{prefix}{name}", expected, one_line(repr(value), limit=80))


def some_positives(value: Any) -> list[float]:
    low, high = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= _MAX_SIZE
        or any(type(number) not in (int, float) for number in value)
        or not all(low <= number <= high for number in value)
    ):
        raise ValueError(f"a list of 1 to {_MAX_SIZE} positive numbers in single precision")
    return [float(number) for number in value]


def a_size(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"an integer from 1 to {_MAX_SIZE}")
    return value


def an_index(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_SIZE:
        raise ValueError(f"an integer from 0 to {_MAX_SIZE}")
    return value


def an_index_or_none(value: Any) -> int | None:
    return None if value is None else an_index(value)


def an_object_or_none(value: Any) -> dict | None:
    if value is not None and not isinstance(value, dict):
        raise ValueError("an object or null")
    return value


def a_shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise ValueError("a list of 1 to 8 positive integers")
    return tuple(a_size(size) for size in value)


def a_positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError("a positive number")
    return float(value)


def fail(file: Path, key: str, expected: str, found: str) -> NoReturn:
    raise CheckpointError(f"{file}: {key}: expected {expected}, found {found}")
