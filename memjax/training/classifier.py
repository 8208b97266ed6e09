"""Train a classifier of noised images, and measure it at every noise level."""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from memjax._core.checks import check_count, check_positive
from memjax._core.chunked import chunked_map
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.classifier import NoisyClassifier
from memjax.evaluate.calibration import calibration_error, fit_temperature
from memjax.networks.classifier import MLPClassifier, ResNetClassifier
from memjax.training._steps import STEPS_PER_CALL, Progress, State, check_images, descend, start

_NETWORKS = {"mlp": MLPClassifier, "resnet": ResNetClassifier}
_NUM_LEVELS = 12
# Noised held-out images per noise level, at least: few images are noised several times.
_NUM_NOISED = 4096
_CHUNK_SIZE = 128


class ClassifierReport(NamedTuple):
    """A classifier on held-out images, per noise level.

    Attributes:
        sigmas: noise levels [m], ascending.
        accuracy: share of the noised images whose most probable class is theirs.
        loss: mean of -log p(y | x, sigma), in nats.
        calibration_error: expected calibration error of ``memjax.evaluate.calibration_error``.
        temperature: T, by which the logits are divided.
    """

    sigmas: Float[np.ndarray, "m"]
    accuracy: Float[np.ndarray, "m"]
    loss: Float[np.ndarray, "m"]
    calibration_error: Float[np.ndarray, "m"]
    temperature: Float[np.ndarray, "m"]


class TrainedClassifier(NamedTuple):
    """A classifier and how good it is.

    Attributes:
        classifier: the `NoisyClassifier`.
        report: its `ClassifierReport`.
    """

    classifier: NoisyClassifier
    report: ClassifierReport


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What determines a step, beside data and network; static under ``jit``."""

    batch_size: int
    learning_rate: float
    weight_decay: float
    ema_decay: float
    sigma_range: tuple[float, float]
    data_std: float
    time_dependent: bool

    def __post_init__(self):
        check_count("batch_size", self.batch_size, 1)
        check_positive("learning_rate", self.learning_rate)
        check_positive("data_std", self.data_std)
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"weight_decay: expected at least 0, got {self.weight_decay}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay: expected 0 <= ema_decay < 1, got {self.ema_decay}")
        low, high = self.sigma_range
        if not 0 < low < high < float("inf"):
            raise InputError(f"sigma_range: expected 0 < low < high, got {low}, {high}")


def train_classifier(
    images: Float[np.ndarray, "n *event"],
    labels: Integer[np.ndarray, "n"],
    *,
    network: nn.Module | Literal["mlp", "resnet"] = "mlp",
    num_classes: int | None = None,
    time_dependent: bool = True,
    soft_labels: bool = True,
    steps: int = 4000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float | int = 0.3,
    ema_decay: float = 0.999,
    sigma_range: tuple[float, float] | None = None,
    data_std: float | None = None,
    heldout: float = 0.1,
    calibrate: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainedClassifier:
    """Train a classifier of noised images, to guide an unconditional model by.

        E -sum_y q(y | x, sigma) log p(y | x, sigma),    x = x_i + sigma n,    log sigma uniform

    over training images x_i and normal n. AdamW moves the weights, and their exponential moving
    average, divided by the sum of its weights, becomes the classifier. All arithmetic is float32,
    also where JAX's default is float64. Every draw of step k comes from a key derived from the
    seed and k.

    What guides is the derivative in x, and where it matters most, at noise above the spread of
    the data, one label says little: the loss is near log(number of classes) whatever is learned.
    With ``soft_labels`` the label y_i is replaced by its expectation given x, which is known::

        q(y | x, sigma) = sum_{y_i = y} e_i / sum_i e_i,    e_i = exp(-|x - x_i|^2 / (2 sigma^2))

    the sums over the training set. The expected loss is the same up to a constant, its gradient
    less noisy. (Measured on 100 clusters of 4,096 samples of a test bed, 3,000 steps: the squared
    error of the derivative, relative to the posterior of 11,776 fresh samples, fell from .53, .18,
    .12 and .10 at sigma = 1, 2, 3 and 5 data standard deviations to .49, .13, .08 and .06.)

    Args:
        images: float32, channels last. For surrogate labels: samples of the model.
        labels: a class per image, or -1 for an image to leave out (which may then hold anything).
        network: a Linen module ``(x, t) -> logits [num_classes]`` like ``MLPClassifier`` and
            ``ResNetClassifier``; ``"mlp"`` and ``"resnet"`` are these with their defaults.
        num_classes: number of classes; ``None`` for one more than the largest label.
        time_dependent: ``False`` for a classifier that is trained on clean images alone and never
            told the noise level, as a comparison.
        soft_labels: whether to learn from q rather than from the labels. Costs 2 n d more
            operations an image; not needed, and not cheap, for large training sets.
        steps: of the optimizer.
        batch_size: images per step, drawn with replacement.
        learning_rate: of AdamW, constant.
        weight_decay: of AdamW, decoupled: each step shrinks matrices and kernels by
            1 - ``learning_rate`` times this.
        ema_decay: of the average of the weights, in [0, 1).
        sigma_range: smallest and largest noise level; ``None`` for 1/5 and 20 times ``data_std``:
            below, digits are as good as clean, above, their classes as good as lost.
        data_std: d of `NoisyClassifier`; ``None`` for the standard deviation of all numbers in
            the labelled images.
        heldout: share of the labelled images that are not trained on but measured, in (0, 1).
        calibrate: whether to divide the logits by the temperature of maximum likelihood on the
            held-out images, one per level of the report (the same at all levels, from clean
            images, without ``time_dependent``).
        seed: of the split, the initial weights, batches and noise.
        progress: called as ``progress(step, steps, loss)`` after every 100 steps, with their mean
            loss in nats.

    Returns:
        A `TrainedClassifier`: the classifier and its report at 12 levels, evenly spaced in
        log sigma over ``sigma_range``, each from about 4,096 noised held-out images or more. The
        temperature is fitted on the same: with h images held out, the loss is too low by about
        1/(2 h) nats. Samples of a model that repeats itself have near copies on both sides of the
        split, which makes the report an optimistic one about new images, but not about samples.

    Raises:
        InputError: images not finite or not float32, labels that do not fit, an unknown network
            or one with other logits, a number out of range, or images of another size than
            ``data_std``, on which the training diverged.

    Cost: about 3 forward evaluations of a batch per step, and the soft labels (about 4 ms in all
    on one CPU core for 100 classes of 8 x 8 digits). Memory: the images, five copies of the
    weights, one batch's activations, and with soft labels a matrix [batch_size, n].

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat([0, 1], 50)
    >>> images = (2.0 * labels[:, None] - 1 + 0.1 * rng.normal(size=(100, 2))).astype(np.float32)
    >>> classifier, report = train_classifier(
    ...     images, labels, network=MLPClassifier(2, width=8, num_blocks=1), steps=100
    ... )
    >>> bool(report.accuracy[0] > 0.9), bool(report.accuracy[-1] < 0.7)
    (True, True)

    References:
        Song et al. (2021), arXiv:2011.13456, Section 5 (the classifier of noised images); Xu,
        Tong, Jaakkola (2023), arXiv:2302.00670, equation 5 (targets averaged over the posterior of
        a batch, there for denoisers); Loshchilov, Hutter (2019), arXiv:1711.05101 (AdamW); Guo et
        al. (2017), arXiv:1706.04599, section 4.2 (temperature).
    """
    rows = _labelled(images, labels, heldout)
    if num_classes is None:
        num_classes = int(labels.max()) + 1
    elif labels.max() >= num_classes:
        raise InputError(f"labels: expected -1..{num_classes - 1}, found {labels.max()}")
    check_count("steps", steps, 1)
    if isinstance(network, str) and network in _NETWORKS:
        network = _NETWORKS[network](num_classes)
    if not isinstance(network, nn.Module):
        known = ", ".join(map(repr, _NETWORKS))
        raise InputError(f"network: expected {known} or a Linen module, got {network!r}")
    if data_std is None:
        data_std = float(np.std(images[rows], dtype=np.float64))
    if sigma_range is None:
        sigma_range = (data_std / 5, 20 * data_std)
    recipe = _Recipe(
        batch_size,
        learning_rate,
        float(weight_decay),
        ema_decay,
        (float(sigma_range[0]), float(sigma_range[1])),
        data_std,
        time_dependent,
    )
    order = np.asarray(jax.random.permutation(derive_key(seed, "split"), len(rows)))
    count = min(max(round(heldout * len(rows)), 1), len(rows) - 1)
    held, kept = rows[np.sort(order[:count])], rows[np.sort(order[count:])]

    x = jnp.zeros(images.shape[1:], jnp.float32)
    logits, weights = jax.jit(network.init_with_output)(
        derive_key(seed, "init"), x, jnp.zeros((), jnp.float32)
    )
    if logits.shape != (num_classes,):
        raise InputError(
            f"network: expected logits of shape [{num_classes}], got {list(logits.shape)}"
        )
    data = _Data(jnp.asarray(images[kept]), jnp.asarray(labels[kept], jnp.int32), None)
    if soft_labels and time_dependent:
        data = data._replace(members=jax.nn.one_hot(data.labels, num_classes, dtype=jnp.float32))
    average = _train(weights["params"], data, network, recipe, steps, seed, progress)
    classifier = NoisyClassifier(
        LinenNetwork(network, {"params": average}),
        images.shape[1:],
        num_classes=num_classes,
        data_std=data_std,
        sigmas=np.geomspace(*recipe.sigma_range, _NUM_LEVELS),
        time_dependent=time_dependent,
    )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(classifier.network)):
        raise InputError(
            f"images: expected numbers of the size of data_std = {data_std:.3g}, found up to "
            f"{np.abs(images[rows]).max():.3g}: the training diverged"
        )
    return _measured(classifier, images[held], labels[held], calibrate, seed)


def _labelled(images: np.ndarray, labels: np.ndarray, heldout: float) -> np.ndarray:
    """The rows with a label, once they are known to be good ones."""
    if labels.shape != images.shape[:1]:
        raise InputError(f"labels: expected one per image, {len(images)}, got {labels.shape}")
    if not 0 < heldout < 1:
        raise InputError(f"heldout: expected 0 < heldout < 1, got {heldout}")
    rows = np.flatnonzero(labels >= 0)
    if len(rows) < 2:
        raise InputError(f"labels: expected at least 2 labelled images, got {len(rows)}")
    if labels.min() < -1:
        raise InputError(f"labels: expected classes, or -1 for none, found {labels.min()}")
    unlabelled = (labels < 0).reshape(-1, *(1,) * (images.ndim - 1))
    check_images(np.where(unlabelled, np.zeros((), images.dtype), images))
    return rows


class _Data(NamedTuple):
    """Images and labels; with soft labels also which image is a member of which class."""

    images: Float[Array, "n *event"]
    labels: Int[Array, "n"]
    members: Float[Array, "n c"] | None


def _train(weights, data, network, recipe, steps, seed, progress):
    """The average of the weights after all steps."""
    state = start(weights, _adamw(recipe))
    key = derive_key(seed, "step")
    for step in range(0, steps, STEPS_PER_CALL):
        stop = min(step + STEPS_PER_CALL, steps)
        state, total = _run(state, jnp.int32(stop), data, key, network=network, recipe=recipe)
        if progress is not None:
            progress(stop, steps, float(total) / (stop - step))
    return state.average


@partial(jax.jit, static_argnames=("network", "recipe"), donate_argnames="state")
def _run(
    state: State,
    stop: Int[Array, ""],
    data: _Data,
    key: PRNGKeyArray,
    *,
    network: nn.Module,
    recipe: _Recipe,
) -> tuple[State, Float[Array, ""]]:
    """Steps from ``state.step`` to ``stop``, which is traced, and the sum of their losses."""

    def step(index, carry):
        state, total = carry
        step_key = jax.random.fold_in(key, index)
        loss, gradient = jax.value_and_grad(_loss)(state.weights, data, step_key, network, recipe)
        return descend(state, gradient, _adamw(recipe), recipe.ema_decay), total + loss

    return jax.lax.fori_loop(state.step, stop, step, (state, jnp.float32(0)))


def _loss(weights, data, key, network, recipe):
    """Mean cross-entropy of a batch of noised images, or of clean ones if there is no time."""
    rows = jax.random.randint(
        derive_key(key, "rows"), (recipe.batch_size,), 0, len(data.images), jnp.int32
    )
    if recipe.time_dependent:
        low, high = (float(np.log(sigma)) for sigma in recipe.sigma_range)
        draws = jax.random.uniform(derive_key(key, "sigma"), rows.shape, jnp.float32)
        sigmas = jnp.exp(low + (high - low) * draws)
    else:
        sigmas = jnp.zeros(rows.shape, jnp.float32)
    shape = (recipe.batch_size, *data.images.shape[1:])
    noise = jax.random.normal(derive_key(key, "noise"), shape, jnp.float32)

    def one(x0, label, sigma, noise):
        x = x0 + sigma * noise
        t = jnp.log(sigma) / 4 if recipe.time_dependent else sigma
        scaled = x / jnp.sqrt(sigma**2 + recipe.data_std**2)
        log_probs = jax.nn.log_softmax(network.apply({"params": weights}, scaled, t))
        if data.members is None:
            return -log_probs[label]
        return -jnp.sum(_posterior(x, sigma, data) * log_probs)

    return jax.vmap(one)(data.images[rows], data.labels[rows], sigmas, noise).mean()


def _posterior(x, sigma, data):
    """q(. | x, sigma) of the training set."""
    x, images = x.reshape(-1), data.images.reshape(len(data.images), -1)
    products = jnp.matmul(images, x, precision="highest")
    log_weights = (products - jnp.sum(images**2, axis=1) / 2) / sigma**2
    return jnp.matmul(jax.nn.softmax(log_weights), data.members, precision="highest")


def _adamw(recipe: _Recipe) -> optax.GradientTransformation:
    """AdamW; what has one axis (biases, scales) does not decay."""
    return optax.adamw(
        recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        mask=lambda weights: jax.tree.map(lambda leaf: leaf.ndim > 1, weights),
    )


def _measured(
    classifier: NoisyClassifier, images: np.ndarray, labels: np.ndarray, calibrate: bool, seed: int
) -> TrainedClassifier:
    """The classifier with its temperatures, and the report on it, from held-out images."""
    repeats = -(-_NUM_NOISED // len(images))
    x0 = jnp.asarray(np.tile(images, (repeats,) + (1,) * (images.ndim - 1)))
    labels = np.tile(labels, repeats)
    noise = jax.random.normal(derive_key(seed, "heldout"), x0.shape, jnp.float32)

    def logits(sigma):
        return np.asarray(_log_probs(classifier, x0, noise, jnp.float32(sigma)), np.float64)

    timeless = 1.0
    if calibrate and not classifier.time_dependent:
        timeless = fit_temperature(logits(0.0), labels)
    rows = []
    for sigma in np.asarray(classifier.sigmas):
        z = logits(sigma)
        fitted = calibrate and classifier.time_dependent
        temperature = fit_temperature(z, labels) if fitted else timeless
        log_probs = z / temperature
        log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
        rows.append(
            (
                sigma,
                (log_probs.argmax(axis=1) == labels).mean(),
                -log_probs[np.arange(len(labels)), labels].mean(),
                calibration_error(np.exp(log_probs), labels),
                temperature,
            )
        )
    report = ClassifierReport(*np.array(rows, np.float64).T)
    return TrainedClassifier(classifier.with_temperature(report.temperature), report)


@jax.jit
def _log_probs(classifier, x0, noise, sigma):
    """Log probabilities of images noised to sigma, some at a time."""

    def one(pair):
        return classifier.log_probs(pair[0] + sigma * pair[1], sigma)

    return chunked_map(one, (x0, noise), chunk_size=_CHUNK_SIZE)
