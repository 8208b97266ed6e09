"""Our own format for trained models: a folder with config.json and model.safetensors.

The configuration names the network and how its output becomes a score; the weights are float32
arrays by name. Nothing is ever unpickled, and every fault is one line that names it.
"""

import dataclasses
import hashlib
import json
import math
import os
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
from memjax.checkpoints._safetensors import (
    open_inside,
    parse_weights,
    read_json,
    refuse_pickle,
    stored_shapes,
)
from memjax.diffusion.adapters import LinenNetwork, callable_pytree
from memjax.diffusion.model import Model, Origin, identity
from memjax.diffusion.prediction import EDMPreconditioned, PredictionScore, from_prediction
from memjax.diffusion.schedule import schedule_from_config
from memjax.networks.mlp import ResidualMLP
from memjax.networks.unet import UNet
from memjax.networks.unet2d_linen import LinenUNet2D

FORMAT = "memjax"
VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_NETWORKS: dict[str, type[nn.Module]] = {
    "ResidualMLP": ResidualMLP,
    "UNet": UNet,
    "LinenUNet2D": LinenUNet2D,
}
# Our networks are small: larger numbers are no model of ours, and would make building one take
# forever.
_MAX_SIZE = 2**16
_MAX_DEPTH = 64


def save(model: Model, path: str | os.PathLike, *, training: Mapping[str, Any] | None = None):
    """Save a model of one of our networks as a folder; ``load`` gives it back bitwise.

    Each file appears whole, the configuration with the hash of the weights last. A folder left
    half written, or read while it is being replaced, is refused by ``load``, never misread.

    Args:
        model: a `Model` in pixel space whose score is ``from_prediction`` of a ``LinenNetwork``
            (or of one in ``EDMPreconditioned``) around a ``ResidualMLP``, a ``UNet`` or a
            ``LinenUNet2D``.
        path: the folder; made if missing. A model that is there is replaced, other files stay.
        training: how the model was trained, as JSON values; kept as it is, for the reader.

    Raises:
        InputError: the model has parts that this format does not hold.
        CheckpointError: the folder cannot be written.
    """
    path = Path(path)
    config, variables = _describe(model)
    weights = safetensors.numpy.save(
        {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    )
    config["weights"] = {
        "file": WEIGHTS_FILE,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables)),
    }
    config["training"] = None if training is None else dict(training)
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / WEIGHTS_FILE, weights)
        write_atomically(path / CONFIG_FILE, text.encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None


def load(path: str | os.PathLike) -> Model:
    """Load a model that ``save`` has written. No code is run and nothing is unpickled.

    Args:
        path: the folder.

    Returns:
        The model, its weights float32 and bitwise as saved.

    Raises:
        CheckpointError: the folder or one of its files is missing, damaged, of another format or
            version, or disagrees with another; one line names the file, what was expected and
            what was found.
    """
    path = Path(path)
    config = read_config(path)
    module, planned = _plan(path, config)
    return _assemble(path, config, module, _variables(path, config, planned))


def outline(path: str | os.PathLike) -> Model:
    """A saved model with shapes in place of its weights, whose numbers are not read.

    Args:
        path: the folder.

    Returns:
        The model, each leaf a ``jax.ShapeDtypeStruct``.

    Raises:
        CheckpointError: as for ``load``, as far as configuration and header go.
    """
    path = Path(path)
    config = read_config(path)
    module, planned = _plan(path, config)
    _compare(path / WEIGHTS_FILE, planned, stored_shapes(path / WEIGHTS_FILE))
    return jax.eval_shape(
        lambda arrays: _assemble(path, config, module, {"params": unflatten_dict(arrays, sep="/")}),
        planned,
    )


def _assemble(
    path: Path, config: dict[str, Any], module: nn.Module, variables: dict[str, Any]
) -> Model:
    """The model that the configuration describes, around its network's variables."""
    shape = _field(path, config, "event_shape", _shape)
    try:
        schedule = schedule_from_config(_field(path, config, "schedule", dict))
    except (InputError, TypeError) as error:
        _fail(path / CONFIG_FILE, "schedule", "a known schedule", one_line(str(error)))
    null = _field(path, config, "null_condition", _index_or_none)
    if null != (config["network"]["num_conditions"] or None):
        wanted = "the network's number of conditions, or null where it has none"
        _fail(path / CONFIG_FILE, "null_condition", wanted, str(null))
    network: Callable = LinenNetwork(module, variables)
    preconditioning = _field(path, config, "preconditioning", _dict_or_none)
    if preconditioning is not None:
        if preconditioning.get("name") != "edm":
            found = one_line(repr(preconditioning.get("name")))
            _fail(path / CONFIG_FILE, "preconditioning.name", "'edm'", found)
        network = EDMPreconditioned(
            network, _field(path, preconditioning, "data_std", _positive, "preconditioning.")
        )
    prediction = _field(path, config, "prediction", str)
    numbers = {
        name: _field(path, config, name, _positive)
        for name in ("sigma_min", "sigma_max", "data_std")
    }
    try:
        score = from_prediction(network, prediction=prediction, schedule=schedule)  # pyright: ignore[reportArgumentType]
        return Model(
            score,
            shape,
            null_condition=None if null is None else jnp.int32(null),
            origin=Origin(
                folder=path.resolve().name,
                network=type(module).__name__,
                schedule=one_line(repr(score.schedule), limit=400),
                prediction=prediction,
                sha256=((WEIGHTS_FILE, config["weights"]["sha256"]),),
                data_std="of the training",
            ),
            **numbers,
        )
    except InputError as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: {one_line(str(error))}") from None


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The configuration of a saved model: what it is, how it was trained, its weights' hash.

    Args:
        path: the folder.

    Returns:
        The contents of config.json; ``format`` and ``version`` are checked, the rest is not.

    Raises:
        CheckpointError: as for ``load``, as far as the configuration goes.
    """
    path = Path(path)
    if not path.is_dir():
        refuse_pickle(path)
        found = "a file" if path.exists() else "nothing"
        raise CheckpointError(f"{path}: expected the folder of a saved model, found {found}")
    file = path / CONFIG_FILE
    if not file.is_file():
        refuse_pickle(path)
        raise CheckpointError(f"{path}: expected a file {CONFIG_FILE}, found none")
    config = read_json(file)
    if config.get("format") != FORMAT:
        _fail(file, "format", repr(FORMAT), one_line(repr(config.get("format")), limit=80))
    if config.get("version") != VERSION:
        _fail(file, "version", str(VERSION), one_line(repr(config.get("version")), limit=80))
    return config


def describe_network(module: nn.Module) -> dict[str, Any]:
    """Name and arguments of one of our networks, as JSON values.

    Args:
        module: a ``ResidualMLP``, a ``UNet`` or a ``LinenUNet2D``.

    Raises:
        InputError: another module.
    """
    name = type(module).__name__
    if _NETWORKS.get(name) is not type(module):
        raise InputError(f"network: expected one of {', '.join(_NETWORKS)}, got {name}")
    arguments = {key: getattr(module, key) for key in _arguments(type(module))}
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    return {"name": name, **listed}


def pixel_score(model: Model) -> PredictionScore:
    """The score of a network that sees pixels, which a folder can hold.

    Args:
        model: any model.

    Raises:
        InputError: its score is no network's, or it has an encoder or decoder.
    """
    score = model.raw_score
    if not isinstance(score, PredictionScore):
        raise InputError(f"model: expected the score of a network, got {type(score).__name__}")
    pixels = jax.tree.structure(callable_pytree(identity))
    if any(jax.tree.structure(part) != pixels for part in (model.encode, model.decode)):
        raise InputError("model: expected a model of pixels, got one with an encoder or decoder")
    return score


def _describe(model: Model) -> tuple[dict[str, Any], dict]:
    """The configuration without its weights, and the weights."""
    score = pixel_score(model)
    network, preconditioning = score.network, None
    if isinstance(network, EDMPreconditioned):
        preconditioning = {"name": "edm", "data_std": network.data_std}
        network = network.network
    if not isinstance(network, LinenNetwork) or network.batched or network.apply_kwargs:
        raise InputError(
            f"model: expected a LinenNetwork called on one sample, got {type(network).__name__}"
        )
    described = describe_network(network.module)
    null = model.null_condition
    if null is not None:
        if not isinstance(null, jax.Array) or null.ndim or null.dtype != jnp.int32:
            raise InputError("model: expected an int32 index as null condition, got something else")
        null = int(null)
    if null != (network.module.num_conditions or None):
        raise InputError(
            "model: expected as null condition the network's num_conditions = "
            f"{network.module.num_conditions}, got {null}"
        )
    config = {
        "format": FORMAT,
        "version": VERSION,
        "network": described,
        "prediction": score.prediction,
        "preconditioning": preconditioning,
        "schedule": score.schedule.to_config(),
        "event_shape": list(model.event_shape),
        "sigma_min": model.sigma_min,
        "sigma_max": model.sigma_max,
        "data_std": model.data_std,
        "null_condition": null,
    }
    return config, network.variables["params"]


def _arguments(kind: type[nn.Module]) -> dict[str, Any]:
    """Arguments of a network by name, with their defaults."""
    fields = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    return {f.name: f.default for f in fields if f.name not in ("parent", "name")}


def _network(path: Path, config: dict[str, Any]) -> nn.Module:
    file = path / CONFIG_FILE
    given = _field(path, config, "network", dict)
    kind = _NETWORKS.get(given["name"]) if isinstance(given.get("name"), str) else None
    if kind is None:
        known = f"one of {', '.join(_NETWORKS)}"
        _fail(file, "network.name", known, one_line(repr(given.get("name")), limit=80))
    arguments = _arguments(kind)
    unknown = sorted(set(given) - set(arguments) - {"name"})
    if unknown:
        _fail(file, "network", f"arguments of {kind.__name__}", one_line(repr(unknown[0])))
    values = {}
    for name, default in arguments.items():
        check: Callable = {bool: bool, tuple: _shape}.get(type(default), _size)
        if name == "num_conditions":
            check = _index
        values[name] = _field(path, given, name, check, "network.")
    depth = values["num_blocks"] * len(values.get("channels", (1,)))
    if depth > _MAX_DEPTH:
        _fail(file, "network.num_blocks", f"at most {_MAX_DEPTH} blocks", str(depth))
    return kind(**values)


def _plan(path: Path, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and the shapes of its weights by name."""
    module = _network(path, config)
    shape = _field(path, config, "event_shape", _shape)
    try:
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        t = jax.ShapeDtypeStruct((), jnp.float32)
        wanted = jax.eval_shape(module.init, jax.random.key(0), x, t)["params"]
    except InputError as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: {one_line(str(error))}") from None
    return module, flatten_dict(wanted, sep="/")  # pyright: ignore[reportReturnType]


def _compare(file: Path, planned: dict[str, Any], found: Mapping[str, Any]) -> None:
    """The arrays in a file are those that the network wants."""
    for name in sorted(planned.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{file}: expected an array {name!r}, found none")
        if name not in planned:
            extra = one_line(repr(name), limit=200)
            raise CheckpointError(f"{file}: expected no array {extra}, found one")
        want, have = (f"{a.dtype}{list(a.shape)}" for a in (planned[name], found[name]))
        if want != have:
            _fail(file, name, want, have)


def _variables(path: Path, config: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any]:
    """Read the weights, after their hash, and compare them with what the network wants."""
    record = _field(path, config, "weights", dict)
    if record.get("file") != WEIGHTS_FILE:
        found = one_line(repr(record.get("file")), limit=80)
        _fail(path / CONFIG_FILE, "weights.file", repr(WEIGHTS_FILE), found)
    file = path / WEIGHTS_FILE
    with open_inside(file, "the weights") as stream:
        data = stream.read()
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.get("sha256"):
        expected = one_line(str(record.get("sha256")), limit=64)
        _fail(file, "sha256", expected, f"{digest} ({len(data)} bytes): damaged or exchanged")
    arrays = parse_weights(data, file)
    _compare(file, planned, arrays)
    count = sum(array.size for array in arrays.values())
    if record.get("parameters") != count:
        found = one_line(repr(record.get("parameters")), limit=80)
        _fail(path / CONFIG_FILE, "weights.parameters", str(count), found)
    return {"params": unflatten_dict({k: jnp.asarray(v) for k, v in arrays.items()}, sep="/")}


def _field(
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
    _fail(file, f"{prefix}{name}", expected, one_line(repr(value), limit=80))


def _size(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"an integer from 1 to {_MAX_SIZE}")
    return value


def _index(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_SIZE:
        raise ValueError(f"an integer from 0 to {_MAX_SIZE}")
    return value


def _index_or_none(value: Any) -> int | None:
    return None if value is None else _index(value)


def _dict_or_none(value: Any) -> dict | None:
    if value is not None and not isinstance(value, dict):
        raise ValueError("an object or null")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise ValueError("a list of 1 to 8 positive integers")
    return tuple(_size(size) for size in value)


def _positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError("a positive number")
    return float(value)


def _fail(file: Path, key: str, expected: str, found: str) -> NoReturn:
    raise CheckpointError(f"{file}: {key}: expected {expected}, found {found}")
