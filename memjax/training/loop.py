"""Train a denoiser on images, from a seed to the last bit."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from jaxtyping import Float, Int, PyTree
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
from memjax.training._steps import (
    Data,
    Family,
    Progress,
    RawNetwork,
    Recipe,
    State,
    adam,
    advance,
    check_conditions,
    check_images,
    start,
)

STATE_FILE = "state.safetensors"
_NETWORKS = {"mlp": ResidualMLP, "unet": UNet, "unet2d": LinenUNet2D}


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
    check_images(images)
    if isinstance(network, str) and network in _NETWORKS:
        count = 0 if conditions is None else int(np.max(conditions)) + 1
        network = _NETWORKS[network](num_conditions=count)
    if not isinstance(network, nn.Module):
        known = ", ".join(map(repr, _NETWORKS))
        raise InputError(f"network: expected {known} or a Linen module, got {network!r}")
    num_conditions = int(getattr(network, "num_conditions", 0))
    check_conditions(conditions, len(images), num_conditions)
    for name, value in (("steps", steps), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if data_std is None:
        data_std = float(np.std(images, dtype=np.float64))
    recipe = Recipe(
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
    data = Data(
        jnp.asarray(images), None if conditions is None else jnp.asarray(conditions, jnp.int32)
    )
    zero = jnp.zeros((), jnp.float32)
    init = jax.jit(lambda key: network.init(key, jnp.zeros(event_shape, jnp.float32), zero))
    weights = init(derive_key(seed, "init"))["params"]
    state = start(weights, adam(recipe))
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

    state = advance(
        state,
        steps,
        data,
        seed,
        _Trained(network, num_conditions=num_conditions),
        recipe,
        progress=progress,
        store=None if store is None else store.write,
        store_every=checkpoint_every,
    )

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


class _Trained(Family):
    """A Linen module: every weight is trained."""

    module: nn.Module = eqx.field(static=True)

    def __call__(self, weights: PyTree) -> RawNetwork:
        denoiser = LinenNetwork(self.module, {"params": weights})
        return lambda x, sigma, condition: denoiser(x, jnp.log(sigma) / 4, condition)


class _Store:
    """The state of an unfinished training in a folder, with the training it belongs to."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.file = folder / STATE_FILE
        self.identity = identity
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"checkpoint_dir: {folder}: {error.strerror}") from None

    def write(self, state: State) -> None:
        arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        record = {"training": json.dumps(self.identity), "sha256": fingerprint(*arrays.values())}
        try:
            write_atomically(self.file, safetensors.numpy.save(arrays, record))
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be written: {error.strerror}") from None

    def read(self, state: State) -> State:
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
