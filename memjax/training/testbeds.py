"""The models of the test beds, trained at first use and kept in the user's cache folder."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open

from memjax._core.errors import CheckpointError, require
from memjax._core.files import write_atomically
from memjax._core.hashing import fingerprint
from memjax._core.keys import derive_key
from memjax.checkpoints.files import describe_network, load, save
from memjax.data.testbeds import GradedBed, PromptBed, graded, prompts
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import sample
from memjax.evaluate.distances import find_copies
from memjax.networks.mlp import ResidualMLP
from memjax.training.loop import STATE_FILE, train

# To be raised when a change to training, networks or sampling makes cached models out of date.
_VERSION = 1

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much is done, out of how much)."""


class GradedTestbed(NamedTuple):
    """A model trained on the graded test bed, and what it has stored.

    Attributes:
        bed: images, and how often each stands in the training set.
        model: the trained `Model`.
        samples: drawn from the model.
        extracted: per image of the bed, whether a sample copies it: d1 < d2 / 3 over the distinct
            training images. False for held-out images.
    """

    bed: GradedBed
    model: Model
    samples: Float[np.ndarray, "m 8 8 1"]
    extracted: Bool[np.ndarray, "n"]


class PromptsTestbed(NamedTuple):
    """A model trained on the conditional test bed, and what it has stored.

    Attributes:
        bed: images and prompts.
        model: the trained `Model`; a condition is a prompt number.
        samples: drawn from the model, sample i under prompt i modulo 70.
        extracted: per row of the bed, whether a sample of the row's prompt copies its image:
            d1 < d2 / 3 over all distinct images of the bed.
    """

    bed: PromptBed
    model: Model
    samples: Float[np.ndarray, "m 8 8 1"]
    extracted: Bool[np.ndarray, "r"]


def graded_testbed(
    seed: int = 0,
    group_size: int | tuple[int, ...] = 16,
    *,
    steps: int = 8000,
    num_samples: int = 4096,
    cache_dir: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> GradedTestbed:
    """The graded test bed with a model trained on it and samples drawn from that.

    Trained at the first call; later calls with the same arguments read it from the cache. A
    training that was killed goes on where it was. A damaged entry is made anew, and two
    processes may do so at once.

    Args:
        seed: of the bed, the training and the samples.
        group_size: images per multiplicity, or five numbers, see ``memjax.data.graded``.
        steps: of the training.
        num_samples: samples to draw.
        cache_dir: the cache folder; ``None`` for the environment variable ``MEMJAX_CACHE_DIR``,
            or the user's cache folder if that is not set.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        A `GradedTestbed`.

    Raises:
        InputError: an argument out of range.
        MissingExtraError: the ``audit`` extra is not installed.
        CheckpointError: the cache folder cannot be written.

    Cost: about half a minute of two CPU cores at the first call with the defaults.
    """
    bed = graded(seed, group_size)
    folder, model = _trained(
        "graded", ResidualMLP(), bed.training_images, None, seed, steps, cache_dir, progress
    )
    samples = _samples(folder, model, None, num_samples, seed, progress)
    rows = np.flatnonzero(bed.multiplicity)
    extracted = np.zeros(len(bed.images), bool)
    extracted[rows] = find_copies(samples, bed.images[rows]).hits > 0
    return GradedTestbed(bed, model, samples, extracted)


def prompts_testbed(
    seed: int = 0,
    *,
    steps: int = 8000,
    num_samples: int = 4096,
    cache_dir: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> PromptsTestbed:
    """The conditional test bed with a model trained on it and samples drawn from that.

    Cached like ``graded_testbed``.

    Args:
        seed: of the bed, the training and the samples.
        steps: of the training.
        num_samples: samples to draw, over all prompts.
        cache_dir: as for ``graded_testbed``.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        A `PromptsTestbed`.

    Raises:
        InputError: an argument out of range.
        MissingExtraError: the ``audit`` extra is not installed.
        CheckpointError: the cache folder cannot be written.
    """
    bed = prompts(seed)
    count = len(bed.kind)
    network = ResidualMLP(num_conditions=count)
    folder, model = _trained(
        "prompts", network, bed.images, bed.prompt, seed, steps, cache_dir, progress
    )
    asked = np.arange(num_samples, dtype=np.int32) % count
    samples = _samples(folder, model, asked, num_samples, seed, progress)
    copies = find_copies(samples, bed.images)
    # Equal images share a group; a row counts as extracted by samples of its own prompt only.
    distinct, group = np.unique(
        bed.images.reshape(len(bed.images), -1), axis=0, return_inverse=True
    )
    hit = np.zeros((count, len(distinct)), bool)
    hit[asked[copies.is_copy], group[copies.nearest[copies.is_copy]]] = True
    return PromptsTestbed(bed, model, samples, hit[bed.prompt, group])


def _cache_root(cache_dir: str | os.PathLike | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    if from_environment := os.environ.get("MEMJAX_CACHE_DIR"):
        return Path(from_environment)
    return Path(require("platformdirs", "audit").user_cache_dir("memjax"))


def _trained(
    name: str,
    network: nn.Module,
    images: Float[np.ndarray, "n 8 8 1"],
    conditions: Int[np.ndarray, "n"] | None,
    seed: int,
    steps: int,
    cache_dir: str | os.PathLike | None,
    progress: Progress | None,
) -> tuple[Path, Model]:
    """The cache entry and its model, trained now if it is not there whole."""
    training: dict[str, Any] = {
        "testbed": name,
        "version": _VERSION,
        "network": describe_network(network),
        "seed": seed,
        "steps": steps,
        "images": fingerprint(images),
        "conditions": None if conditions is None else fingerprint(conditions),
    }
    digest = hashlib.sha256(json.dumps(training, sort_keys=True).encode()).hexdigest()
    folder = _cache_root(cache_dir) / f"{name}-{digest[:16]}"
    try:
        return folder, load(folder)
    except CheckpointError:
        pass  # not there yet, or damaged

    def report(step: int, total: int, loss: float) -> None:
        if progress is not None:
            progress("training", step, total)

    fit = partial(
        train,
        images,
        network=network,
        conditions=conditions,
        steps=steps,
        seed=seed,
        progress=report,
        checkpoint_dir=folder,
    )
    try:
        model = fit()
    except CheckpointError:
        # The state of an unfinished training is damaged; the training starts over. If it is the
        # folder that cannot be written, that is said again.
        (folder / STATE_FILE).unlink(missing_ok=True)
        model = fit()
    save(model, folder, training=training)
    (folder / STATE_FILE).unlink(missing_ok=True)
    return folder, model


def _samples(
    folder: Path,
    model: Model,
    conditions: Int[np.ndarray, "m"] | None,
    num_samples: int,
    seed: int,
    progress: Progress | None,
) -> Float[np.ndarray, "m 8 8 1"]:
    """Samples of a cached model, drawn now if they are not there whole."""
    file = folder / f"samples-{num_samples}.safetensors"
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    try:
        with safe_open(file, framework="numpy") as stored:
            record, samples = stored.metadata() or {}, stored.get_tensor("samples")
        if record == {"weights": weights, "sha256": fingerprint(samples)}:
            return samples
    except (OSError, SafetensorError, ValueError):
        pass  # not there yet, or damaged
    drawn = sample(
        model,
        num_samples,
        key=derive_key(seed, "testbed samples"),
        conditions=None if conditions is None else jnp.asarray(conditions),
        progress=None if progress is None else partial(progress, "drawing samples"),
    )
    samples = np.asarray(drawn, np.float32)
    record = {"weights": weights, "sha256": fingerprint(samples)}
    try:
        write_atomically(file, safetensors.numpy.save({"samples": samples}, record))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error.strerror}") from None
    return samples
