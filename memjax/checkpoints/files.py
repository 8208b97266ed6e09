"""Our own format for trained models: a folder with config.json and model.safetensors.

The configuration names the network and how its output becomes a score; the weights are float32
arrays by name. Nothing is ever unpickled, and every fault is one line that names it.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from memjax._core.errors import CheckpointError, InputError
from memjax._core.text import one_line
from memjax.checkpoints._folder import (
    CONFIG_FILE,
    VERSION,
    WEIGHTS_FILE,
    a_positive,
    a_shape,
    an_index_or_none,
    an_object_or_none,
    compare,
    describe,
    fail,
    plan,
    read_field,
    read_folder,
    read_variables,
    write_folder,
)
from memjax.checkpoints._safetensors import stored_shapes
from memjax.diffusion.adapters import LinenNetwork, callable_pytree
from memjax.diffusion.model import Model, Origin, identity
from memjax.diffusion.prediction import EDMPreconditioned, PredictionScore, from_prediction
from memjax.diffusion.schedule import schedule_from_config
from memjax.networks.mlp import ResidualMLP
from memjax.networks.unet import UNet
from memjax.networks.unet2d_linen import LinenUNet2D

FORMAT = "memjax"

_NETWORKS: dict[str, type[nn.Module]] = {
    "ResidualMLP": ResidualMLP,
    "UNet": UNet,
    "LinenUNet2D": LinenUNet2D,
}


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
    config, variables = _describe(model)
    write_folder(Path(path), config, variables, training)


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
    module, planned = plan(path, config, _NETWORKS)
    return _assemble(path, config, module, read_variables(path, config, planned))


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
    module, planned = plan(path, config, _NETWORKS)
    compare(path / WEIGHTS_FILE, planned, stored_shapes(path / WEIGHTS_FILE))
    return jax.eval_shape(
        lambda arrays: _assemble(path, config, module, {"params": unflatten_dict(arrays, sep="/")}),
        planned,
    )


def _assemble(
    path: Path, config: dict[str, Any], module: nn.Module, variables: dict[str, Any]
) -> Model:
    """The model that the configuration describes, around its network's variables."""
    shape = read_field(path, config, "event_shape", a_shape)
    try:
        schedule = schedule_from_config(read_field(path, config, "schedule", dict))
    except (InputError, TypeError) as error:
        fail(path / CONFIG_FILE, "schedule", "a known schedule", one_line(str(error)))
    null = read_field(path, config, "null_condition", an_index_or_none)
    if null != (config["network"]["num_conditions"] or None):
        wanted = "the network's number of conditions, or null where it has none"
        fail(path / CONFIG_FILE, "null_condition", wanted, str(null))
    network: Callable = LinenNetwork(module, variables)
    preconditioning = read_field(path, config, "preconditioning", an_object_or_none)
    if preconditioning is not None:
        if preconditioning.get("name") != "edm":
            found = one_line(repr(preconditioning.get("name")))
            fail(path / CONFIG_FILE, "preconditioning.name", "'edm'", found)
        network = EDMPreconditioned(
            network, read_field(path, preconditioning, "data_std", a_positive, "preconditioning.")
        )
    prediction = read_field(path, config, "prediction", str)
    numbers = {
        name: read_field(path, config, name, a_positive)
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
    return read_folder(Path(path), FORMAT, "a saved model")


def describe_network(module: nn.Module) -> dict[str, Any]:
    """Name and arguments of one of our networks, as JSON values.

    Args:
        module: a ``ResidualMLP``, a ``UNet`` or a ``LinenUNet2D``.

    Raises:
        InputError: another module.
    """
    return describe(module, _NETWORKS)


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
