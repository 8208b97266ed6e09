"""Train a denoiser on images, from a seed to the last bit."""

import dataclasses
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from safetensors import SafetensorError, safe_open

from memjax._core.errors import CheckpointError, InputError
from memjax._core.files import write_atomically
from memjax._core.hashing import fingerprint
from memjax._core.keys import derive_key
from memjax._core.text import one_line
from memjax.checkpoints.files import describe_network
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.model import Model
from memjax.diffusion.prediction import EDMPreconditioned, from_prediction
from memjax.diffusion.schedule import VarianceExploding
from memjax.networks.mlp import ResidualMLP
from memjax.networks.unet import UNet
from memjax.networks.unet2d_linen import LinenUNet2D

STATE_FILE = "state.safetensors"
_STEPS_PER_CALL = 100
_NETWORKS = {"mlp": ResidualMLP, "unet": UNet, "unet2d": LinenUNet2D}

Progress = Callable[[int, int, float], None]


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What determines a step of ``train``, beside data and network; static under ``jit``."""

    batch_size: int
    learning_rate: float
    ema_decay: float
    log_sigma_mean: float
    log_sigma_std: float
    condition_dropout: float
    data_std: float
    second_order_weight: float = 0.0

    def __post_init__(self):
        if self.batch_size < 1:
            raise InputError(f"batch_size: expected at least 1, got {self.batch_size}")
        for name in ("learning_rate", "log_sigma_std", "data_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("ema_decay", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if not 0 <= self.second_order_weight < float("inf"):
            raise InputError(
                f"second_order_weight: expected at least 0, got {self.second_order_weight}"
            )

    @property
    def record(self) -> dict[str, Any]:
        """The fields by name; the second order only where it is used.

        So a training that was interrupted before there was one can still be resumed.
        """
        fields = dataclasses.asdict(self)
        if not self.second_order_weight:
            del fields["second_order_weight"]
        return fields

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Noise levels within three standard deviations: outside, hardly any is ever seen."""
        low, high = (self.log_sigma_mean + z * self.log_sigma_std for z in (-3, 3))
        return float(np.exp(low)), float(np.exp(high))


def train(
    images: Float[np.ndarray, "n *event"],
    *,
    network: nn.Module | Literal["mlp", "unet", "unet2d"] = "mlp",
    conditions: Int[np.ndarray, "n"] | None = None,
    steps: int = 8000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.999,
    log_sigma_mean: float = -1.0,
    log_sigma_std: float = 1.3,
    condition_dropout: float = 0.1,
    data_std: float | None = None,
    second_order_weight: float | int = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    checkpoint_every: int = 1000,
) -> Model:
    """Train a network to denoise images, with the loss and the preconditioning of EDM.

        E lambda(sigma) |D(x0 + sigma n, sigma) - x0|^2
            = E |F - (sigma x0/d - d n)/sqrt(sigma^2 + d^2)|^2

    with D the preconditioned network F, lambda = (sigma^2 + d^2)/(sigma d)^2, d = ``data_std``,
    and log sigma normal; the right side has no difference of nearly equal numbers. Adam moves the
    weights, and their exponential moving average, divided by the sum of its weights, becomes the
    model. All arithmetic is float32, also where JAX's default is float64. Every draw of step i
    comes from a key derived from the seed and i.

    ``second_order_weight`` w adds a loss for the Jacobian H = ds/dx of the score, without which
    curvature is learned as a by-product only. With M = I + sigma^2 H = dD/dx, v random signs and
    l = sigma s + n, held fixed (no gradient goes through it)::

        w E |M v - l (l . v)|^2 / dimension        E_v gives w E |M - l l^T|_F^2 / dimension

    whose minimum over M is E[l l^T | x], for the exact s the exact M. It is weighted equally at
    all noise levels, like the loss for the noise |sigma s + n|^2, of which the first loss is
    1 + sigma^2/d^2 times.

    Args:
        images: the training set, float32, channels last; a row that stands k times counts k times.
        network: a Linen module ``(x, t, condition) -> output`` like ``ResidualMLP``, ``UNet`` and
            ``LinenUNet2D``; ``"mlp"``, ``"unet"`` and ``"unet2d"`` are these with their defaults
            and the conditions' number.
        conditions: one index per image, in 0..``network.num_conditions`` - 1; ``None`` to train
            without conditions.
        steps: of the optimizer.
        batch_size: images per step, drawn with replacement.
        learning_rate: of Adam, constant.
        ema_decay: of the average of the weights, in [0, 1).
        log_sigma_mean: mean of log sigma over the noise levels of training.
        log_sigma_std: its standard deviation.
        condition_dropout: share of the images that are shown under the null condition, in [0, 1).
        data_std: d; ``None`` for the standard deviation of all numbers in ``images``.
        second_order_weight: w, at least 0; 0 leaves the second loss out.
        seed: of the initial weights, batches and noise.
        progress: called as ``progress(step, steps, loss)`` after every 100 steps, with their mean
            loss; per coordinate, 1 is the loss of F = 0 on normalized data.
        checkpoint_dir: folder for the state of an unfinished training. A training that finds its
            own state there goes on from it, and ends with the same bits as an uninterrupted one.
        checkpoint_every: steps between two states.

    Returns:
        A `Model` with ``sigma_min`` and ``sigma_max`` three standard deviations of log sigma
        around its mean, and ``num_conditions`` as null condition if there are conditions.

    Raises:
        InputError: images not finite or not float32, an unknown network, conditions that do not
            fit, or a state in ``checkpoint_dir`` of a different training: the message names the
            difference.
        CheckpointError: the state in ``checkpoint_dir`` is damaged.

    Cost: about 3 forward evaluations of a batch per step, half again to twice as many with the
    second loss. Memory: the images, four copies of the weights, and one batch's activations,
    twice with the second loss.

    References:
        Karras, Aittala, Aila, Laine (2022), arXiv:2206.00364, Table 1 and equation 8 (loss);
        Kingma, Ba (2015), arXiv:1412.6980, Section 2 and 7.2 (Adam, averages); Lu et al. (2022),
        arXiv:2206.08265, Theorem 3.2 (second loss; its form with random signs is Hutchinson's).
    """
    _check_images(images)
    if isinstance(network, str) and network in _NETWORKS:
        count = 0 if conditions is None else int(np.max(conditions)) + 1
        network = _NETWORKS[network](num_conditions=count)
    if not isinstance(network, nn.Module):
        known = ", ".join(map(repr, _NETWORKS))
        raise InputError(f"network: expected {known} or a Linen module, got {network!r}")
    num_conditions = int(getattr(network, "num_conditions", 0))
    _check_conditions(conditions, len(images), num_conditions)
    for name, value in (("steps", steps), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if data_std is None:
        data_std = float(np.std(images, dtype=np.float64))
    recipe = _Recipe(
        batch_size,
        learning_rate,
        ema_decay,
        log_sigma_mean,
        log_sigma_std,
        condition_dropout,
        data_std,
        float(second_order_weight),
    )
    event_shape = images.shape[1:]
    data = _Data(
        jnp.asarray(images), None if conditions is None else jnp.asarray(conditions, jnp.int32)
    )
    zero = jnp.zeros((), jnp.float32)
    init = jax.jit(lambda key: network.init(key, jnp.zeros(event_shape, jnp.float32), zero))
    weights = init(derive_key(seed, "init"))["params"]
    # Donated buffers must not be shared: the average starts at zeros, where its first step
    # overwrites it.
    state = _State(
        jnp.int32(0), weights, _adam(recipe).init(weights), jax.tree.map(jnp.zeros_like, weights)
    )
    store = None
    if checkpoint_dir is not None:
        identity = {
            "network": describe_network(network),
            **recipe.record,
            "steps": steps,
            "seed": seed,
            "images": fingerprint(images),
            "conditions": None if conditions is None else fingerprint(np.asarray(conditions)),
        }
        store = _Store(Path(checkpoint_dir), identity)
        state = store.read(state)

    step = int(state.step)
    while step < steps:
        stop = min(step - step % _STEPS_PER_CALL + _STEPS_PER_CALL, steps)
        if store is not None:
            stop = min(stop, step - step % checkpoint_every + checkpoint_every)
        state, total = _run(
            state, jnp.int32(stop), data, derive_key(seed, "step"), network=network, recipe=recipe
        )
        loss = float(total) / (stop - step)
        step = stop
        if store is not None and (step % checkpoint_every == 0 or step == steps):
            store.write(state)
        if progress is not None:
            progress(step, steps, loss)

    sigma_min, sigma_max = recipe.sigma_range
    denoiser = EDMPreconditioned(LinenNetwork(network, {"params": state.average}), data_std)
    score = from_prediction(
        denoiser, prediction="denoiser", schedule=VarianceExploding(sigma_min, sigma_max)
    )
    return Model(
        score,
        event_shape,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        data_std=data_std,
        null_condition=jnp.int32(num_conditions) if num_conditions else None,
    )


class _Data(NamedTuple):
    images: Float[Array, "n *event"]
    conditions: Int[Array, "n"] | None


class _State(NamedTuple):
    """What a step changes: its number, the weights, Adam's moments, the average of the weights."""

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
    """Steps from ``state.step`` to ``stop``, and the sum of their losses.

    The number of steps is traced: one program runs every stretch, so where a training is cut into
    calls, or was killed, does not touch its bits.
    """

    def step(index, carry):
        state, total = carry
        step_key = jax.random.fold_in(key, index)
        loss, gradient = jax.value_and_grad(_loss)(state.weights, data, step_key, network, recipe)
        # optax mixes dtypes: the only place of memjax where that is allowed.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = _adam(recipe).update(gradient, state.optimizer)
            weights = optax.apply_updates(state.weights, updates)
        # (1 - b) / (1 - b^(i+1)): the average divided by the sum of its weights, as a recursion.
        decay = jnp.float32(np.log(max(recipe.ema_decay, 1e-30)))
        count = (index + 1).astype(jnp.float32)
        share = jnp.expm1(decay) / jnp.expm1(decay * count)
        average = jax.tree.map(lambda mean, w: mean + share * (w - mean), state.average, weights)
        return _State(index + 1, weights, optimizer, average), total + loss

    return jax.lax.fori_loop(state.step, stop, step, (state, jnp.float32(0)))


def _loss(weights, data, key, network, recipe):
    """Mean over a batch and its coordinates of |F - target|^2, and of w |M v - l (l . v)|^2."""
    n, data_std = recipe.batch_size, recipe.data_std
    event_shape = data.images.shape[1:]
    rows = jax.random.randint(derive_key(key, "rows"), (n,), 0, len(data.images), jnp.int32)
    normal = jax.random.normal(derive_key(key, "sigma"), (n,), jnp.float32)
    sigmas = jnp.exp(recipe.log_sigma_mean + recipe.log_sigma_std * normal)
    noise = jax.random.normal(derive_key(key, "noise"), (n, *event_shape), jnp.float32)
    conditions = None
    if data.conditions is not None:
        draw = jax.random.uniform(derive_key(key, "dropout"), (n,), jnp.float32)
        null = jnp.int32(network.num_conditions)
        conditions = jnp.where(draw < recipe.condition_dropout, null, data.conditions[rows])

    signs = None
    if recipe.second_order_weight:
        signs = jax.random.rademacher(derive_key(key, "signs"), noise.shape, jnp.float32)

    def one(x0, sigma, noise, condition, v):
        total = jnp.sqrt(sigma**2 + data_std**2)

        def forward(x):
            return network.apply({"params": weights}, x, jnp.log(sigma) / 4, condition)

        x = (x0 + sigma * noise) / total
        target = (sigma / data_std * x0 - data_std * noise) / total
        if v is None:
            return ((forward(x) - target) ** 2).mean()
        # D = (d^2 x + sigma d total F)/total^2: M v and l are no differences of large numbers.
        out, out_v = jax.jvp(forward, (x,), (v,))
        m_v = (data_std / total) ** 2 * v + sigma * data_std / total**2 * out_v
        residual = jax.lax.stop_gradient(data_std / total * (out - target))
        misfit = m_v - residual * jnp.sum(residual * v)
        return ((out - target) ** 2).mean() + recipe.second_order_weight * (misfit**2).mean()

    return jax.vmap(one)(data.images[rows], sigmas, noise, conditions, signs).mean()


def _adam(recipe: _Recipe) -> optax.GradientTransformation:
    return optax.adam(recipe.learning_rate)


class _Store:
    """The state of an unfinished training in a folder, with the training it belongs to."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.file = folder / STATE_FILE
        self.identity = identity
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"checkpoint_dir: {folder}: {error.strerror}") from None

    def write(self, state: _State) -> None:
        arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        record = {"training": json.dumps(self.identity), "sha256": fingerprint(*arrays.values())}
        try:
            write_atomically(self.file, safetensors.numpy.save(arrays, record))
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be written: {error.strerror}") from None

    def read(self, state: _State) -> _State:
        """The stored state in place of ``state``, or ``state`` where nothing is stored."""
        leaves, tree = jax.tree.flatten(state)
        try:
            with safe_open(self.file, framework="numpy") as stored:
                record = stored.metadata() or {}
                arrays = [stored.get_tensor(str(i)) for i in range(len(leaves))]
            identity = json.loads(record["training"])
        except FileNotFoundError:
            return state
        except (OSError, SafetensorError, ValueError, KeyError):
            identity, arrays, record = None, [], {}
        if isinstance(identity, dict) and identity != self.identity:
            ours = self.identity
            name = next(n for n in {**ours, **identity} if ours.get(n) != identity.get(n))
            raise InputError(
                f"checkpoint_dir: {self.file} belongs to another training: expected {name} = "
                f"{ours.get(name)!r}, found {one_line(repr(identity.get(name)), limit=200)}"
            )
        if record.get("sha256") != fingerprint(*arrays) or any(
            (a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(arrays, leaves, strict=True)
        ):
            raise CheckpointError(
                f"{self.file}: expected the state of a training, found a damaged file; delete it "
                "to start again"
            )
        return jax.tree.unflatten(tree, [jnp.asarray(array) for array in arrays])


def _check_images(images: np.ndarray) -> None:
    if images.dtype != np.float32:
        raise InputError(f"images: expected float32, got {images.dtype}")
    if images.ndim < 2 or images.size == 0:
        raise InputError(f"images: expected [n, ...] with n >= 1, got shape {images.shape}")
    bad = ~np.isfinite(images.reshape(len(images), -1)).all(axis=1)
    if bad.any():
        raise InputError(
            f"images: expected finite numbers, found {bad.sum()} rows with others, "
            f"the first is row {np.argmax(bad)}"
        )


def _check_conditions(conditions: np.ndarray | None, rows: int, count: int) -> None:
    if conditions is None:
        return
    if conditions.shape != (rows,):
        raise InputError(f"conditions: expected one per image, {rows}, got {conditions.shape}")
    low, high = int(conditions.min()), int(conditions.max())
    if low < 0 or high >= count:
        raise InputError(
            f"conditions: expected 0..{count - 1} (network.num_conditions = {count}), "
            f"found {low}..{high}"
        )
