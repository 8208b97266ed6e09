"""Saved classifiers of noised samples, in the folder format of our models."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from memjax._core.errors import CheckpointError, InputError
from memjax._core.text import one_line
from memjax.checkpoints._folder import (
    CONFIG_FILE,
    VERSION,
    a_positive,
    a_shape,
    describe,
    plan,
    read_field,
    read_folder,
    read_variables,
    some_positives,
    write_folder,
)
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.classifier import NoisyClassifier
from memjax.networks.classifier import MLPClassifier, ResNetClassifier

FORMAT = "memjax-classifier"

_NETWORKS: dict[str, type[nn.Module]] = {
    "MLPClassifier": MLPClassifier,
    "ResNetClassifier": ResNetClassifier,
}


def save_classifier(
    classifier: NoisyClassifier,
    path: str | os.PathLike,
    *,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Save a classifier of one of our networks as a folder; ``load_classifier`` gives it back.

    The folder is like that of ``memjax.save``: config.json, which names the network and holds
    noise levels and temperatures, and model.safetensors. Each file appears whole, the
    configuration with the hash of the weights last, so that a folder left half written is
    refused, never misread.

    Args:
        classifier: a `NoisyClassifier` whose network is a ``LinenNetwork`` around an
            ``MLPClassifier`` or a ``ResNetClassifier``.
        path: the folder; made if missing. A classifier that is there is replaced, other files
            stay.
        training: how it was trained, as JSON values; kept as it is, for the reader.

    Raises:
        InputError: another network.
        CheckpointError: the folder cannot be written.
    """
    network = classifier.network
    if not isinstance(network, LinenNetwork) or network.batched or network.apply_kwargs:
        raise InputError(
            f"classifier: expected a LinenNetwork called on one sample, got "
            f"{type(network).__name__}"
        )
    config = {
        "format": FORMAT,
        "version": VERSION,
        "network": describe(network.module, _NETWORKS),
        "event_shape": list(classifier.event_shape),
        "data_std": classifier.data_std,
        "sigmas": np.asarray(classifier.sigmas, np.float64).tolist(),
        "temperature": np.asarray(classifier.temperature, np.float64).tolist(),
        "time_dependent": classifier.time_dependent,
    }
    write_folder(Path(path), config, network.variables["params"], training)


def load_classifier(path: str | os.PathLike) -> NoisyClassifier:
    """Load a classifier that ``save_classifier`` has written. Nothing is run or unpickled.

    Args:
        path: the folder.

    Returns:
        The classifier, its weights, noise levels and temperatures float32 and bitwise as saved.

    Raises:
        CheckpointError: the folder or one of its files is missing, damaged, of another format or
            version, or disagrees with another; one line names the file, what was expected and
            what was found.
    """
    path = Path(path)
    config = read_folder(path, FORMAT, "a saved classifier")
    module, planned = plan(path, config, _NETWORKS)
    parts = {
        "event_shape": read_field(path, config, "event_shape", a_shape),
        "data_std": read_field(path, config, "data_std", a_positive),
        "sigmas": read_field(path, config, "sigmas", some_positives),
        "temperature": read_field(path, config, "temperature", some_positives),
        "time_dependent": read_field(path, config, "time_dependent", bool),
    }
    network = LinenNetwork(module, read_variables(path, config, planned))
    try:
        return NoisyClassifier(network, num_classes=config["network"]["num_classes"], **parts)
    except InputError as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: {one_line(str(error))}") from None
