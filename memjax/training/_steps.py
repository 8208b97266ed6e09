"""One step of training a denoiser, compiled once: what ``train`` and ``fine_tune`` share."""

import abc
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from memjax._core.errors import InputError
from memjax._core.keys import derive_key

STEPS_PER_CALL = 100

Progress = Callable[[int, int, float], None]

RawNetwork = Callable[[Float[Array, "..."], Float[Array, ""], PyTree], Float[Array, "..."]]
"""F(x, sigma, condition) of the preconditioning of EDM: x near unit variance."""


class Family(eqx.Module):
    """The networks among which training chooses, by their weights; its leaves are not trained.

    Attributes:
        num_conditions: conditions are 0..num_conditions - 1; num_conditions stands for none.
    """

    num_conditions: int = eqx.field(static=True, kw_only=True, default=0)

    @abc.abstractmethod
    def __call__(self, weights: PyTree) -> RawNetwork:
        """The network of these weights."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What determines a step, beside data and network; static under ``jit``."""

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


class Counted(NamedTuple):
    """Rows of images that count several times, for even draws.

    Attributes:
        rows: row numbers, each as often as its image counts, and then any others up to a round
            size, so that one program serves many training sets.
        size: how many of ``rows`` stand for the training set.
    """

    rows: Int[Array, "t"]
    size: Int[Array, ""]


class Data(NamedTuple):
    """A training set.

    Attributes:
        images: one row each.
        conditions: of each image.
        counted: how often each image counts, and that draws are even; ``None`` for once, and
            independent draws.
    """

    images: Float[Array, "n *event"]
    conditions: Int[Array, "n"] | None
    counted: Counted | None = None


class State(NamedTuple):
    """What a step changes: its number, the weights, Adam's moments, the average of the weights."""

    step: Int[Array, ""]
    weights: PyTree
    optimizer: PyTree
    average: PyTree


def start(weights: PyTree, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step.

    Donated buffers must not be shared: the average starts at zeros, where its first step
    overwrites it.
    """
    return State(
        jnp.int32(0), weights, optimizer.init(weights), jax.tree.map(jnp.zeros_like, weights)
    )


def descend(
    state: State, gradient: PyTree, optimizer: optax.GradientTransformation, ema_decay: float
) -> State:
    """The state after one more step: the optimizer moves the weights, their average follows."""
    # optax mixes dtypes: the only place of memjax where that is allowed.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = optimizer.update(gradient, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
    # (1 - b) / (1 - b^(i+1)): the average divided by the sum of its weights, as a recursion.
    decay = jnp.float32(np.log(max(ema_decay, 1e-30)))
    count = (state.step + 1).astype(jnp.float32)
    share = jnp.expm1(decay) / jnp.expm1(decay * count)
    average = jax.tree.map(lambda mean, w: mean + share * (w - mean), state.average, weights)
    return State(state.step + 1, weights, moments, average)


def advance(
    state: State,
    steps: int,
    data: Data,
    seed: int,
    family: Family,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    store: Callable[[State], None] | None = None,
    store_every: int = 1,
) -> State:
    """The state after ``steps`` steps in all, stored and reported on the way.

    Args:
        state: used up.
        steps: in all, those of ``state`` among them.
        data: the training set.
        seed: of batches and noise.
        family: the networks.
        recipe: the rest.
        progress: called as ``progress(step, steps, loss)`` after every 100 steps and every store.
        store: called with the state after every ``store_every`` steps, and with the last.
        store_every: see there.
    """
    step = int(state.step)
    key = derive_key(seed, "step")
    while step < steps:
        stop = min(step - step % STEPS_PER_CALL + STEPS_PER_CALL, steps)
        if store is not None:
            stop = min(stop, step - step % store_every + store_every)
        state, total = run(state, jnp.int32(stop), data, key, family=family, recipe=recipe)
        loss = float(total) / (stop - step)
        step = stop
        if store is not None and (step % store_every == 0 or step == steps):
            store(state)
        if progress is not None:
            progress(step, steps, loss)
    return state


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def run(
    state: State,
    stop: Int[Array, ""],
    data: Data,
    key: PRNGKeyArray,
    *,
    family: Family,
    recipe: Recipe,
) -> tuple[State, Float[Array, ""]]:
    """Steps from ``state.step`` to ``stop``, and the sum of their losses.

    The number of steps is traced: one program runs every stretch, so where a training is cut into
    calls, or was killed, does not touch its bits.
    """

    def step(index, carry):
        state, total = carry
        step_key = jax.random.fold_in(key, index)
        if data.counted is None:
            draws = draw_rows(step_key, len(data.images), recipe.batch_size)
        else:
            draws = even_draws(key, index, data.counted, recipe.batch_size)
        loss, gradient = jax.value_and_grad(batch_loss)(
            state.weights, data, draws, step_key, family, recipe
        )
        return descend(state, gradient, adam(recipe), recipe.ema_decay), total + loss

    return jax.lax.fori_loop(state.step, stop, step, (state, jnp.float32(0)))


Draws = tuple[Int[Array, "n"], Float[Array, "n"]]
"""Rows of a batch, and the normal numbers of their noise levels."""


def draw_rows(key: PRNGKeyArray, count: int, n: int) -> Draws:
    """A batch of n among ``count`` rows, every draw independent; the key is the step's."""
    rows = jax.random.randint(derive_key(key, "rows"), (n,), 0, count, jnp.int32)
    return rows, jax.random.normal(derive_key(key, "sigma"), (n,), jnp.float32)


def even_draws(key: PRNGKeyArray, step: Int[Array, ""], counted: Counted, n: int) -> Draws:
    """The same spread evenly: the gradient's mean is the same, its variance smaller.

    Rows come from a permutation for every pass over the training set, whose last ``size`` modulo
    n are left out (``size`` is at least n); the noise levels of a batch, one from each n-th of
    their distribution. The key is the training's.
    """
    steps = counted.size // n
    turn = derive_key(key, "pass", step // steps)
    place = jax.random.uniform(turn, counted.rows.shape, jnp.float32)
    among = jnp.arange(len(place), dtype=jnp.int32) < counted.size
    order = jnp.argsort(jnp.where(among, place, jnp.inf))
    rows = counted.rows[jax.lax.dynamic_slice(order, (step % steps * n,), (n,))]
    within = jax.random.uniform(
        derive_key(key, "level", step), (n,), jnp.float32, minval=1e-3, maxval=1 - 1e-3
    )
    return rows, jax.scipy.special.ndtri((jnp.arange(n, dtype=jnp.float32) + within) / n)


def batch_loss(weights, data, draws, key, family, recipe):
    """Mean over a batch and its coordinates of |F - target|^2, and of w |M v - l (l . v)|^2."""
    rows, normal = draws
    n, data_std = recipe.batch_size, recipe.data_std
    event_shape = data.images.shape[1:]
    sigmas = jnp.exp(recipe.log_sigma_mean + recipe.log_sigma_std * normal)
    noise = jax.random.normal(derive_key(key, "noise"), (n, *event_shape), jnp.float32)
    conditions = None
    if data.conditions is not None:
        draw = jax.random.uniform(derive_key(key, "dropout"), (n,), jnp.float32)
        null = jnp.int32(family.num_conditions)
        conditions = jnp.where(draw < recipe.condition_dropout, null, data.conditions[rows])

    signs = None
    if recipe.second_order_weight:
        signs = jax.random.rademacher(derive_key(key, "signs"), noise.shape, jnp.float32)

    network = family(weights)

    def one(x0, sigma, noise, condition, v):
        total = jnp.sqrt(sigma**2 + data_std**2)

        def forward(x):
            return network(x, sigma, condition)

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


def adam(recipe: Recipe) -> optax.GradientTransformation:
    return optax.adam(recipe.learning_rate)


def check_images(images: np.ndarray) -> None:
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


def check_conditions(conditions: np.ndarray | None, rows: int, count: int) -> None:
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
