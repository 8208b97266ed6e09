"""Train a classifier of noised images, and measure it at every noise level."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray, PyTree

from memjax._core.chunked import chunked_map
from memjax._core.keys import derive_key
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.classifier import NoisyClassifier
from memjax.evaluate.calibration import calibration_error, fit_temperature
from memjax.networks.classifier import MLPClassifier, ResNetClassifier

_NETWORKS = {"mlp": MLPClassifier, "resnet": ResNetClassifier}
STEPS_PER_CALL = 100
_NUM_LEVELS = 12
_EVALUATIONS = 4096
"""Noised held-out images per noise level, about: few images are noised several times."""
_CHUNK_SIZE = 128

Progress = Callable[[int, int, float], None]


class ClassifierReport(NamedTuple):
    """A classifier on held-out images, per noise level.

    Attributes:
        sigmas: noise levels [m].
        accuracy: share of noised images whose most probable class is theirs.
        loss: mean of -log p(y | x, sigma), in nats.
        calibration_error: expected calibration error, 15 bins.
        temperature: by which the logits are divided.
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


def train_classifier(
    images: Float[np.ndarray, "n *event"],
    labels: Integer[np.ndarray, "n"],
    *,
    network: nn.Module | Literal["mlp", "resnet"] = "mlp",
    num_classes: int | None = None,
    time_dependent: bool = True,
    steps: int = 4000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    ema_decay: float = 0.999,
    sigma_range: tuple[float, float] | None = None,
    data_std: float | None = None,
    heldout: float = 0.1,
    calibrate: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainedClassifier:
    """Train a classifier of noised images."""
    if num_classes is None:
        num_classes = int(np.max(labels)) + 1
    if isinstance(network, str) and network in _NETWORKS:
        network = _NETWORKS[network](num_classes)
    if data_std is None:
        data_std = float(np.std(images, dtype=np.float64))
    if sigma_range is None:
        sigma_range = (data_std / 20, 20 * data_std)
    recipe = _Recipe(
        batch_size,
        learning_rate,
        weight_decay,
        ema_decay,
        sigma_range,
        data_std,
        time_dependent,
    )
    rows = np.flatnonzero(labels >= 0)
    order = np.asarray(jax.random.permutation(derive_key(seed, "split"), len(rows)))
    count = max(1, round(heldout * len(rows)))
    held, kept = np.sort(rows[order[:count]]), np.sort(rows[order[count:]])

    zero = jnp.zeros((), jnp.float32)
    event = jnp.zeros(images.shape[1:], jnp.float32)
    weights = jax.jit(network.init)(derive_key(seed, "init"), event, zero)["params"]
    state = _State(
        jnp.int32(0), weights, _adamw(recipe).init(weights), jax.tree.map(jnp.zeros_like, weights)
    )
    data = _Data(jnp.asarray(images[kept]), jnp.asarray(labels[kept], jnp.int32))
    step = 0
    while step < steps:
        stop = min(step + STEPS_PER_CALL, steps)
        state, total = _run(
            state, jnp.int32(stop), data, derive_key(seed, "step"), network=network, recipe=recipe
        )
        if progress is not None:
            progress(stop, steps, float(total) / (stop - step))
        step = stop

    sigmas = np.geomspace(*sigma_range, _NUM_LEVELS).astype(np.float32)
    classifier = NoisyClassifier(
        LinenNetwork(network, {"params": state.average}),
        num_classes=num_classes,
        data_std=data_std,
        sigmas=sigmas,
        time_dependent=time_dependent,
    )
    return _measured(classifier, images[held], labels[held], calibrate, seed)


class _Data(NamedTuple):
    images: Float[Array, "n *event"]
    labels: Int[Array, "n"]


class _State(NamedTuple):
    """What a step changes: its number, the weights, the optimizer's moments, the average."""

    step: Int[Array, ""]
    weights: PyTree
    optimizer: PyTree
    average: PyTree


@partial(jax.jit, static_argnames=("network", "recipe"), donate_argnames="state")
def _run(
    state: _State,
    stop: Int[Array, ""],
    data: _Data,
    key: PRNGKeyArray,
    *,
    network: nn.Module,
    recipe: _Recipe,
) -> tuple[_State, Float[Array, ""]]:
    """Steps from ``state.step`` to ``stop``, and the sum of their losses."""

    def step(index, carry):
        state, total = carry
        step_key = jax.random.fold_in(key, index)
        loss, gradient = jax.value_and_grad(_loss)(state.weights, data, step_key, network, recipe)
        # optax mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = _adamw(recipe).update(gradient, state.optimizer, state.weights)
            weights = optax.apply_updates(state.weights, updates)
        decay = jnp.float32(np.log(max(recipe.ema_decay, 1e-30)))
        count = (index + 1).astype(jnp.float32)
        share = jnp.expm1(decay) / jnp.expm1(decay * count)
        average = jax.tree.map(lambda mean, w: mean + share * (w - mean), state.average, weights)
        return _State(index + 1, weights, optimizer, average), total + loss

    return jax.lax.fori_loop(state.step, stop, step, (state, jnp.float32(0)))


def _loss(weights, data, key, network, recipe):
    """Mean cross-entropy of a batch of noised images."""
    n = recipe.batch_size
    rows = jax.random.randint(derive_key(key, "rows"), (n,), 0, len(data.images), jnp.int32)
    x0, labels = data.images[rows], data.labels[rows]
    low, high = (float(np.log(sigma)) for sigma in recipe.sigma_range)
    draw = jax.random.uniform(derive_key(key, "sigma"), (n,), jnp.float32)
    noise = jax.random.normal(derive_key(key, "noise"), x0.shape, jnp.float32)

    def one(x0, label, draw, noise):
        log_sigma = low + (high - low) * draw
        sigma = jnp.exp(log_sigma)
        x = (x0 + sigma * noise) / jnp.sqrt(sigma**2 + recipe.data_std**2)
        if not recipe.time_dependent:
            x, log_sigma = x0 / recipe.data_std, jnp.zeros_like(draw)
        return -jax.nn.log_softmax(network.apply({"params": weights}, x, log_sigma / 4))[label]

    return jax.vmap(one)(x0, labels, draw, noise).mean()


def _adamw(recipe: _Recipe) -> optax.GradientTransformation:
    """Decay shrinks matrices and kernels only."""
    return optax.adamw(
        recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        mask=lambda weights: jax.tree.map(lambda leaf: leaf.ndim > 1, weights),
    )


def _measured(
    classifier: NoisyClassifier,
    images: np.ndarray,
    labels: np.ndarray,
    calibrate: bool,
    seed: int,
) -> TrainedClassifier:
    """Temperatures by maximum likelihood on held-out images, and the report on the same."""
    repeats = -(-_EVALUATIONS // len(images))
    repeated = jnp.asarray(np.tile(images, (repeats,) + (1,) * (images.ndim - 1)))
    labels = np.tile(labels, repeats)
    noise = jax.random.normal(derive_key(seed, "heldout"), repeated.shape, jnp.float32)
    rows, temperature = [], np.ones(_NUM_LEVELS, np.float32)

    def logits_at(sigma):
        return np.asarray(_log_probs(classifier, repeated, noise, jnp.float32(sigma)))

    if calibrate and not classifier.time_dependent:
        temperature[:] = fit_temperature(logits_at(0.0), labels)
    for i, sigma in enumerate(classifier.sigmas):
        logits = logits_at(sigma)
        if calibrate and classifier.time_dependent:
            temperature[i] = fit_temperature(logits, labels)
        logits = logits / temperature[i]
        log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        accuracy = (log_probs.argmax(axis=1) == labels).mean()
        loss = -log_probs[np.arange(len(labels)), labels].mean()
        rows.append((accuracy, loss, calibration_error(np.exp(log_probs), labels)))
    accuracy, loss, error = np.array(rows, np.float64).T
    sigmas = np.asarray(classifier.sigmas, np.float64)
    report = ClassifierReport(sigmas, accuracy, loss, error, temperature.astype(np.float64))
    calibrated = NoisyClassifier(
        classifier.network,
        num_classes=classifier.num_classes,
        data_std=classifier.data_std,
        sigmas=classifier.sigmas,
        temperature=temperature,
        time_dependent=classifier.time_dependent,
    )
    return TrainedClassifier(calibrated, report)


@jax.jit
def _log_probs(classifier, images, noise, sigma):
    """Log probabilities of images noised to sigma, chunk by chunk."""

    def one(pair):
        x0, noise = pair
        return classifier.log_probs(x0 + sigma * noise, sigma)

    return chunked_map(one, (images, noise), chunk_size=_CHUNK_SIZE)
