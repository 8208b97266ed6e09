"""Fine-tune a model on labeled samples: low-rank adapters, and conditions that are learned."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import Array, Float, Integer, PyTree

from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.model import Model
from memjax.diffusion.prediction import EDMPreconditioned, PredictionScore
from memjax.networks.lora import (
    Changes,
    KernelLayout,
    LearnedConditions,
    low_rank_adapters,
    merge_adapters,
)
from memjax.networks.unet2d import UNet2DModel
from memjax.networks.unet2d_condition import TextCondition, UNet2DConditionModel
from memjax.training._adapted import (
    Adapted,
    changed_model,
    check_event,
    network_score,
    recipe_of,
)
from memjax.training._steps import (
    Data,
    Progress,
    Recipe,
    adam,
    advance,
    check_images,
    start,
)


def fine_tune(
    model: Model,
    images: Float[np.ndarray, "n *event"],
    labels: Integer[np.ndarray, "m"],
    *,
    num_labels: int | None = None,
    rank: int = 16,
    alpha: float | int | None = None,
    steps: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.999,
    log_sigma_mean: float | None = None,
    log_sigma_std: float | None = None,
    condition_dropout: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Model:
    """Teach a model labels, by low-rank changes to its weights and one learned row per label.

        F = F_(W + (alpha / rank) A B)(x, sigma, c_label)

    is trained by the loss of ``train`` in A, B and the rows c alone. At first A B is zero and
    every c, as well as that of the null condition, stands for the model's own null condition: the
    model before step 1 is the given one under every label, with the same bits where both are
    evaluated operation by operation (zeros are added; a compiler may round other fusions
    otherwise).

    What c is depends on the network:

    - a Linen module with a field ``num_conditions`` (``ResidualMLP``, ``UNet``, ``LinenUNet2D``)
      or a ``UNet2DModel`` gets a table of ``num_labels`` + 1 embeddings, in place of its own if
      it has one; zeros for a network that was trained without conditions;
    - any network whose null condition is floating point (a vector, a ``TextCondition``) is
      wrapped in ``LearnedConditions``; sizes and strengths in a ``TextCondition`` are not
      learned.

    The result is a plain model: the changes are merged, and a label is an index. So
    ``memjax.sample(model, n, conditions=labels, guidance=w)`` draws from it, and ``memjax.save``
    takes it if it took ``model``. Weights that are trained on samples can lose what the model had
    stored; ``implicit_classifier`` of the result guides the model itself instead.

    Args:
        model: a score of a network, as made by ``train``, ``load`` and ``from_callable``.
        images: in the space of the score, such as samples of ``model``; float32.
        labels: one per image, in 0..``num_labels`` - 1, or -1 for an image that is left out.
        num_labels: ``None`` for the largest label + 1.
        rank: of the changes, at least 1; see ``low_rank_adapters``.
        alpha: ``None`` for the rank.
        steps: of the optimizer.
        batch_size: images per step, drawn with replacement.
        learning_rate: of Adam, constant.
        ema_decay: of the average of the factors and rows, in [0, 1).
        log_sigma_mean: mean of log sigma over the noise levels of training; ``None`` for the
            middle of the model's range.
        log_sigma_std: its standard deviation; ``None`` for a sixth of the range, so that a model
            of ``train`` sees the noise levels that it was trained on.
        condition_dropout: share of the images that are shown under the null condition, in [0, 1).
        seed: of the factors, batches and noise.
        progress: called as ``progress(step, steps, loss)`` after every 100 steps, with their mean
            loss.

    Returns:
        The model with conditions 0..``num_labels`` - 1, and ``num_labels`` as null condition.

    Raises:
        InputError: images or labels that do not fit, or a network that has no way to take a
            condition; an argument out of range.

    Deterministic by seed; all arithmetic is float32 unless the network computes otherwise.
    Cost: a step costs what one of ``train`` does, as the gradient of every adapted matrix is
    formed; Adam and the average hold the changes alone.

    >>> tuned = mj.training.fine_tune(model, samples, clusters, num_labels=100)  # doctest: +SKIP
    >>> mj.sample(tuned, 100, key=0, conditions=jnp.arange(100), guidance=2)  # doctest: +SKIP

    References:
        Chen et al. (2024), SIDE, arXiv:2410.02467 v7 (fine-tuning on clustered samples); Hu et
        al. (2022), LoRA, arXiv:2106.09685; Ho, Salimans (2022), arXiv:2207.12598 (dropout of the
        condition).
    """
    check_images(images)
    check_event(images, model)
    num_labels = _check_labels(labels, len(images), num_labels)
    if steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise InputError(f"alpha: expected a positive number, got {alpha}")
    score, learned, layout = _labeled(model, num_labels)
    adapters = low_rank_adapters(
        score, rank, key=derive_key(seed, "adapters"), kernel_layout=layout
    )
    changes: Changes = adapters | learned
    data_std, mean, std = recipe_of(model, score, log_sigma_mean, log_sigma_std)
    recipe = Recipe(batch_size, learning_rate, ema_decay, mean, std, condition_dropout, data_std)
    kept = labels >= 0
    data = Data(jnp.asarray(images[kept]), jnp.asarray(labels[kept], jnp.int32))
    family = Adapted(
        score, 1.0 if alpha is None else alpha / rank, data_std, num_conditions=num_labels
    )
    # The program uses up the state's arrays, of which the score holds the learned ones too.
    changes = jax.tree.map(jnp.copy, changes)
    state = advance(
        start(changes, adam(recipe)), steps, data, seed, family, recipe, progress=progress
    )
    merged = jax.jit(merge_adapters, static_argnames="scale")(
        score, state.average, scale=family.scale
    )
    return changed_model(model, merged, null_condition=jnp.int32(num_labels))


def _check_labels(labels: np.ndarray, rows: int, num_labels: int | None) -> int:
    """The number of labels."""
    if labels.shape != (rows,):
        raise InputError(f"labels: expected one per image, {rows}, got shape {labels.shape}")
    low, high = int(labels.min()), int(labels.max())
    count = high + 1 if num_labels is None else num_labels
    if low < -1 or high < 0 or high >= count:
        raise InputError(
            f"labels: expected 0..{count - 1}, or -1 for images left out, found {low}..{high}"
        )
    return count


def _labeled(model: Model, count: int) -> tuple[PredictionScore, Changes, KernelLayout]:
    """The score with labels, its learned leaves by their paths, and the layout of its kernels."""
    score = network_score(model)
    edm = isinstance(score.network, EDMPreconditioned)
    network = score.network.network if edm else score.network
    grown, names = _with_labels(network, model.null_condition, count, model.event_shape)
    denoiser = EDMPreconditioned(grown, score.network.data_std) if edm else grown
    prefix = ".network.network" if edm else ".network"
    paths = {prefix + name for name in names}
    labeled = PredictionScore(denoiser, score.prediction, score.schedule)
    leaves = {keystr(path): leaf for path, leaf in tree_flatten_with_path(labeled)[0]}
    ours = isinstance(network, LinenNetwork | UNet2DModel | UNet2DConditionModel)
    return labeled, {path: leaves[path] for path in paths}, "HWIO" if ours else "OIHW"


def _with_labels(
    network: Callable, null: PyTree, count: int, event_shape: tuple[int, ...]
) -> tuple[Callable, list[str]]:
    """The network with labels, all of which are its null condition, and the paths to learn."""
    kinds = [jnp.result_type(leaf) for leaf in jax.tree.leaves(null)]
    if kinds and all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
        return _with_table(network, null, count)
    if null is None or (kinds == [jnp.int32] and jnp.ndim(null) == 0):
        if isinstance(network, UNet2DModel) and network.options.class_embed_type is None:
            return _with_classes(network, null, count)
        if isinstance(network, LinenNetwork) and hasattr(network.module, "num_conditions"):
            return _with_embeddings(network, null, count, event_shape)
    what = "none" if null is None else "a null condition of whole numbers"
    raise InputError(
        "model: expected a network that can take a condition (one with num_conditions, or a "
        f"null condition in floating point), got {type(network).__name__} with {what}"
    )


def _with_table(network: Callable, null: PyTree, count: int) -> tuple[Callable, list[str]]:
    """Any network of vectors: its conditions themselves are learned."""
    grown = LearnedConditions.all_equal(network, null, count)
    names = [".table" + keystr(path) for path, _ in tree_flatten_with_path(grown.table)[0]]
    if isinstance(null, TextCondition):
        names = [name for name in names if name in (".table.hidden_states", ".table.pooled")]
    return grown, names


def _with_classes(
    network: UNet2DModel, null: Array | None, count: int
) -> tuple[Callable, list[str]]:
    """A U-Net of diffusers: its table of classes grows, or comes to be."""
    o, name = network.options, "class_embedding.weight"
    if (o.num_class_embeds is None) != (null is None):
        raise InputError(
            "model: expected a null condition where the network has classes, and none where not"
        )
    if null is None:
        width = o.time_embedding_dim or 4 * o.block_out_channels[0]
        row = jnp.zeros((1, width), jnp.float32)
    else:
        row = jnp.asarray(network.weights[name])[null][None]
    weights = {**network.weights, name: jnp.tile(row, (count + 1, 1))}
    grown = UNet2DModel(weights, o._replace(num_class_embeds=count + 1))
    return grown, [f".weights[{name!r}]"]


def _with_embeddings(
    network: LinenNetwork, null: Array | None, count: int, event_shape: tuple[int, ...]
) -> tuple[Callable, list[str]]:
    """A Linen module with a field for the number of conditions: what they add grows or comes."""
    if (null is None) != (network.module.num_conditions == 0):
        raise InputError(
            "model: expected a null condition where the network has num_conditions > 0, and "
            "none where not"
        )

    def outline(number: int) -> dict[tuple[str, ...], Any]:
        module = network.module.clone(num_conditions=number)
        args = [(event_shape, jnp.float32), ((), jnp.float32)] + [((), jnp.int32)] * (number > 0)
        batch = (1,) * network.batched
        shapes = [jax.ShapeDtypeStruct((*batch, *shape), dtype) for shape, dtype in args]
        init = partial(module.init, **dict(network.apply_kwargs))
        return flatten_dict(jax.eval_shape(init, jax.random.key(0), *shapes))

    without, wanted = outline(0), outline(count)
    found: dict[tuple[str, ...], Array] = flatten_dict(network.variables)  # pyright: ignore[reportAssignmentType]
    arrays, names = {}, []
    for path, leaf in wanted.items():
        if path in without:
            arrays[path] = found[path]
            continue
        names.append(".variables" + "".join(f"[{part!r}]" for part in path))
        if null is None:
            arrays[path] = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            arrays[path] = jnp.tile(found[path][null][None], (count + 1,) + (1,) * (leaf.ndim - 1))
    if not names or any(arrays[path].shape != leaf.shape for path, leaf in wanted.items()):
        raise InputError(
            "model: expected a network whose num_conditions adds tables of one row each and one "
            f"for none, got {type(network.module).__name__}"
        )
    module = network.module.clone(num_conditions=count)
    kwargs = dict(network.apply_kwargs)
    grown = LinenNetwork(module, unflatten_dict(arrays), batched=network.batched, **kwargs)
    return grown, names
