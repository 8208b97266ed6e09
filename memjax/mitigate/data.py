"""Change the training set where a ranking points, train again, and see what that was worth."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax._core.checks import check_count
from memjax._core.chunked import chunked_map
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.diffusion.combine import Score
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import sample
from memjax.evaluate.distances import find_copies
from memjax.training.loop import train

Action = Literal["drop", "deduplicate", "augment"]
Augment = Callable[[Float[np.ndarray, "n *event"], np.random.Generator], np.ndarray]


class Fitted(NamedTuple):
    """What a training on some training set came to.

    Attributes:
        samples: drawn from the model.
        heldout_loss: on images that no training saw.
    """

    samples: Float[np.ndarray, "m *event"]
    heldout_loss: float


Fit = Callable[[Float[np.ndarray, "t *event"]], Fitted]


class Outcome(NamedTuple):
    """One training, held against the original training set.

    Attributes:
        rows: of its training set.
        changed: rows that were taken away or altered.
        copies: share of its samples that copy an original training image.
        copied: number of distinct original training images with a copy.
        heldout_loss: of its `Fitted`.
    """

    rows: int
    changed: int
    copies: float
    copied: int
    heldout_loss: float


class DataMitigation(NamedTuple):
    """What a change of the training set was worth.

    Attributes:
        before: the training set as it is.
        after: changed where the ranking points.
        random: changed in as many rows at random, once for every repeat.
        chosen: the images that the ranking chose, best first.
    """

    before: Outcome
    after: Outcome
    random: tuple[Outcome, ...]
    chosen: Int[np.ndarray, "k"]


def mitigate_data(
    images: Float[np.ndarray, "n *event"],
    multiplicity: Int[np.ndarray, "n"],
    ranking: Float[np.ndarray, "n"],
    fit: Fit,
    *,
    num_images: int,
    action: Action = "deduplicate",
    num_random: int = 1,
    seed: int = 0,
    augment: Augment | None = None,
    before: Fitted | None = None,
) -> DataMitigation:
    """Change what a detector ranks highest, train again, and compare with a change at random.

    Of the ``num_images`` training images with the largest value of ``ranking``

    - ``"drop"`` takes away every row,
    - ``"deduplicate"`` all rows but the first,
    - ``"augment"`` none: each row but the first becomes another version of its image.

    The random change takes away (or alters) as many rows, whoever's they are: what the same loss
    of data does without a ranking. A copy is a sample with d1 < d2 / 3 over the distinct images of
    the *original* training set, so that trainings are held against one thing.

    Args:
        images: one row per distinct image.
        multiplicity: how often each stands in the training set, >= 0; 0 for images that do not.
        ranking: larger is more suspicious, such as a detector's values; NaN ranks nowhere.
        fit: trains on the rows it is given and draws samples, such as ``retrain(...)`` or a
            stand-in: ``fit(rows) -> Fitted``. Called 1 + ``num_random`` times, and once more
            where ``before`` is ``None``.
        num_images: chosen by the ranking, at least 1.
        action: ``"drop"``, ``"deduplicate"`` or ``"augment"``.
        num_random: repeats of the random change, at least 0.
        seed: of the random changes and augmentations.
        augment: ``(images, generator) -> images`` of the same shape; ``None`` for ``shift``.
        before: the original training, if there is one already.

    Returns:
        `DataMitigation`.

    Raises:
        InputError: an argument out of range, or arrays that do not fit one another.

    References:
        Somepalli et al. (2023), arXiv:2305.20086 (duplicates and copies); Yoon et al. (2023), for
        the rule of a copy.
    """
    n = len(images)
    for name, array in (("multiplicity", multiplicity), ("ranking", ranking)):
        if array.shape != (n,):
            raise InputError(f"{name}: expected one per image, {n}, got shape {array.shape}")
    if (multiplicity < 0).any():
        raise InputError("multiplicity: expected numbers of at least 0, found negative ones")
    if action not in get_args(Action):
        raise InputError(f"action: expected one of {', '.join(get_args(Action))}, got {action!r}")
    usable = np.flatnonzero((multiplicity > 0) & ~np.isnan(ranking))
    check_count("num_images", num_images, 1, len(usable))
    check_count("num_random", num_random, 0)
    order = np.argsort(-ranking[usable], kind="stable")
    chosen = usable[order[:num_images]]

    rows = np.repeat(np.arange(n), multiplicity)
    first = np.concatenate([[True], rows[1:] != rows[:-1]])
    affected = np.isin(rows, chosen) & ((action == "drop") | ~first)
    original = images[multiplicity > 0]

    def changed(which: np.ndarray, repeat: int) -> np.ndarray:
        if action != "augment":
            return images[rows[~which]]
        out = images[rows]
        generator = np.random.default_rng([seed, repeat])
        out[which] = (augment or shift)(out[which], generator)
        return out

    def outcome(fitted: Fitted, count: int, total: int) -> Outcome:
        found = find_copies(np.asarray(fitted.samples), original)
        share, copied = float(found.is_copy.mean()), int((found.hits > 0).sum())
        return Outcome(total, count, share, copied, float(fitted.heldout_loss))

    def again(which: np.ndarray, repeat: int) -> Outcome:
        training = changed(which, repeat)
        if not len(training):
            raise InputError(f"num_images: expected some images to be left, got {num_images}")
        return outcome(fit(training), int(which.sum()), len(training))

    start = outcome(fit(images[rows]) if before is None else before, 0, len(rows))
    after = again(affected, 0)
    random = []
    for repeat in range(1, num_random + 1):
        generator = np.random.default_rng([seed, repeat, 1])
        which = np.zeros(len(rows), bool)
        which[generator.permutation(len(rows))[: affected.sum()]] = True
        random.append(again(which, repeat))
    return DataMitigation(start, after, tuple(random), chosen)


def shift(
    images: Float[np.ndarray, "n h w c"], generator: np.random.Generator
) -> Float[np.ndarray, "n h w c"]:
    """Move every image by one pixel in one of eight directions; what comes in repeats the edge.

    Args:
        images: channels last.
        generator: where the directions come from.

    Returns:
        Images of the same shape, none of them where it was.

    >>> dot = np.zeros((1, 3, 3, 1), np.float32)
    >>> dot[0, 1, 1] = 1
    >>> float(shift(dot, np.random.default_rng(0))[0, 1, 1, 0])
    0.0
    """
    _, h, w, _ = images.shape
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    moves = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    picked = generator.integers(len(moves), size=len(images))
    out = np.empty_like(images)
    for k, (i, j) in enumerate(moves):
        out[picked == k] = padded[picked == k, i : i + h, j : j + w]
    return out


def retrain(
    heldout: Float[np.ndarray, "h *event"],
    *,
    num_samples: int = 4096,
    seed: int = 0,
    **options: Any,
) -> Fit:
    """A ``fit`` for ``mitigate_data``: our own training loop, sampler and held-out loss.

    Args:
        heldout: images that no training sees.
        num_samples: drawn from every model.
        seed: of training, samples and the loss's noise, the same for every training.
        **options: of ``memjax.train``, such as ``steps``.

    Returns:
        ``fit(rows) -> Fitted``.
    """

    def fit(images: Float[np.ndarray, "t *event"]) -> Fitted:
        model = train(images, seed=seed, **options)
        return fitted_model(model, heldout, num_samples=num_samples, seed=seed)

    return fit


def fitted_model(
    model: Model, heldout: Float[np.ndarray, "h *event"], *, num_samples: int = 4096, seed: int = 0
) -> Fitted:
    """Samples and held-out loss of a model that is there already.

    Args:
        model: unconditional.
        heldout: images that its training did not see.
        num_samples: drawn by ``sample``.
        seed: of samples and noise.

    Returns:
        `Fitted`.
    """
    drawn = sample(model, num_samples, key=derive_key(seed, "data mitigation"))
    loss = float(heldout_loss(model, jnp.asarray(heldout), seed=seed))
    return Fitted(np.asarray(drawn, np.float32), loss)


def heldout_loss(
    score: Score,
    images: Float[Array, "h *event"],
    *,
    sigmas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    num_draws: int = 4,
    seed: int = 0,
    chunk_size: int = 128,
) -> Float[Array, ""]:
    """Denoising loss in units of the noise: mean of |sigma s(x0 + sigma n, sigma) + n|^2 / d.

    1 for a model that knows nothing, 0 for one that knows every image; the same noises for every
    model.

    Args:
        score: ``(x, sigma, condition=None) -> s``.
        images: x0.
        sigmas: noise levels averaged. Static.
        num_draws: noises for each image and level. Static.
        seed: of the noises.
        chunk_size: images computed together. Static.

    Returns:
        One number. ``len(sigmas) * num_draws`` evaluations for each image.
    """
    check_count("num_draws", num_draws, 1)
    return _heldout_loss(
        score, images, derive_key(seed, "held-out loss"), sigmas, num_draws, chunk_size
    )


@partial(jax.jit, static_argnames=("sigmas", "num_draws", "chunk_size"))
def _heldout_loss(score, images, key, sigmas, num_draws, chunk_size):
    def one(given):
        x0, row = given

        def loss(sigma, draw):
            n = jax.random.normal(derive_key(key, row, draw), x0.shape, x0.dtype)
            return jnp.mean((sigma * score(x0 + sigma * n, sigma) + n) ** 2)

        levels = jnp.repeat(jnp.asarray(sigmas, x0.dtype), num_draws)
        return jnp.mean(jax.vmap(loss)(levels, jnp.arange(len(levels))))

    rows = jnp.arange(len(images))
    return jnp.mean(chunked_map(one, (images, rows), chunk_size=chunk_size))
