"""Train a model further, from its own weights: what it would be with another training set."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import Array, Float, Integer

from memjax._core.errors import InputError
from memjax.diffusion.model import Model
from memjax.diffusion.prediction import PredictionScore
from memjax.networks.lora import merge_adapters
from memjax.training._adapted import (
    Adapted,
    changed_model,
    check_event,
    network_score,
    recipe_of,
)
from memjax.training._steps import (
    Counted,
    Data,
    Progress,
    Recipe,
    adam,
    advance,
    check_conditions,
    check_images,
    start,
)

_SMALLEST_TABLE = 1024


def continue_training(
    model: Model,
    images: Float[np.ndarray, "n *event"],
    *,
    multiplicity: Integer[np.ndarray, "m"] | None = None,
    conditions: Integer[np.ndarray, "c"] | None = None,
    steps: int = 1600,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    ema_decay: float | None = None,
    log_sigma_mean: float | None = None,
    log_sigma_std: float | None = None,
    condition_dropout: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Model:
    """Train all weights of a model further, on images that count as often as one says.

    The loss is that of ``train``, at the weights of the model first. Draws are spread evenly: every
    pass over the training set is a permutation of it, and the noise levels of a batch are one from
    each of ``batch_size`` equal parts of their distribution. The gradient means the same and
    varies less, which is what tells small changes of a training set from the noise of training.

    Args:
        model: a score of a network, as made by ``train``, ``load`` and ``from_callable``.
        images: in the space of the score; float32.
        multiplicity: how often each image counts, at least 0; ``None`` for once.
        conditions: one index per image, for a model whose null condition is one; ``None`` for the
            null condition.
        steps: of the optimizer.
        batch_size: images per step; all images where there are fewer.
        learning_rate: of Adam, constant, whose moments start at zero.
        ema_decay: of the average of the weights, in [0, 1); ``None`` for 1 - 2/steps.
        log_sigma_mean: mean of log sigma over the noise levels of training; ``None`` for the
            middle of the model's range.
        log_sigma_std: its standard deviation; ``None`` for a sixth of the range, so that a model
            of ``train`` sees the noise levels that it was trained on.
        condition_dropout: share of the images that are shown under the null condition, in [0, 1).
        seed: of batches and noise.
        progress: called as ``progress(step, steps, loss)`` after every 100 steps, with their mean
            loss.

    Returns:
        A model like ``model``, whose weights are the average of those after every step; those in
        half precision become float32. Of a Linen module the collection ``params`` is trained, of
        other networks every array of floating-point numbers.

    Raises:
        InputError: images, multiplicities or conditions that do not fit, an argument out of range.

    Deterministic by seed. Cost: one evaluation and one transposed product of the network for each
    image of a batch and step. Memory: the images, four copies of the weights, and one batch's
    activations.

    >>> after = mj.training.continue_training(model, images, steps=400)  # doctest: +SKIP
    """
    check_images(images)
    check_event(images, model)
    n = len(images)
    counts = np.ones(n, np.int64) if multiplicity is None else np.asarray(multiplicity, np.int64)
    if counts.shape != (n,):
        raise InputError(f"multiplicity: expected one per image, {n}, got shape {counts.shape}")
    if counts.min() < 0 or counts.sum() < 1:
        raise InputError(
            "multiplicity: expected numbers of at least 0, not all 0, "
            f"found {counts.min()}..{counts.max()}"
        )
    if steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    total = int(counts.sum())
    if ema_decay is None:
        ema_decay = max(0.0, 1 - 2 / steps)
    score = network_score(model)
    data_std, mean, std = recipe_of(model, score, log_sigma_mean, log_sigma_std)
    recipe = Recipe(
        min(batch_size, total), learning_rate, ema_decay, mean, std, condition_dropout, data_std
    )
    shown, num_conditions = _conditions(model, conditions, n)
    # One program for training sets of about one size.
    size = max(_SMALLEST_TABLE, 2 ** (total - 1).bit_length())
    table = np.zeros(size, np.int32)
    table[:total] = np.repeat(np.arange(n, dtype=np.int32), counts)
    counted = Counted(jnp.asarray(table), jnp.int32(total))
    data = Data(jnp.asarray(images), shown, counted)
    family = Adapted(score, 1.0, data_std, model.null_condition, num_conditions=num_conditions)
    state = advance(
        start(trained_weights(score), adam(recipe)), steps, data, seed, family, recipe,
        progress=progress,
    )  # fmt: skip
    return changed_model(model, merge_adapters(score, state.average), model.null_condition)


def trained_weights(score: PredictionScore) -> dict[str, Array]:
    """Copies of the arrays that training changes, by their paths, in float32 at least."""
    out = {}
    for path, leaf in tree_flatten_with_path(score)[0]:
        name = keystr(path)
        constant = ".variables[" in name and ".variables['params']" not in name
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and not constant:
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            out[name] = jnp.array(leaf, dtype)  # the program uses up what it is given
    if not out:
        raise InputError("model: expected a network with weights, found none")
    return out


def _conditions(model: Model, conditions: np.ndarray | None, n: int) -> tuple[Array | None, int]:
    """Conditions of the images as training wants them, and the index that stands for none."""
    if conditions is None:
        return None, 0
    leaves = jax.tree.leaves(model.null_condition)
    if len(leaves) != 1 or jnp.ndim(leaves[0]) or jnp.result_type(leaves[0]) != jnp.int32:
        raise InputError("conditions: expected a model whose conditions are whole numbers")
    null = int(leaves[0])
    check_conditions(conditions, n, null + 1)
    return jnp.asarray(conditions, jnp.int32), null
