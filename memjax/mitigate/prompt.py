"""Change the prompt's embedding until it no longer pulls: the baseline of Wen et al."""

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from memjax._core.checks import check_count, check_positive
from memjax._core.chunked import chunked_map
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import widest_dtype
from memjax.mitigate.objectives import check_conditions

WEIGHT_DECAY = 0.01


class PromptResult(NamedTuple):
    """Embeddings that pull less, one for every condition.

    Attributes:
        conditions: in place of those given, of the same structure.
        before: gap of the predicted noise under the condition given.
        after: under the one found.
        steps: optimizer steps taken.
        status: per condition ``OK`` (the target was reached), ``NOT_CONVERGED`` (the steps ended
            first) or ``NONFINITE`` (a gap or gradient is not finite; the search stopped there).
        cost: network products, per condition.
    """

    conditions: PyTree
    before: Float[Array, "c"]
    after: Float[Array, "c"]
    steps: Int[Array, "c"]
    status: Int[Array, "c"]
    cost: Cost


def embed_conditions(
    model: Model, conditions: Int[Array, "c"]
) -> tuple[Model, Float[Array, "c w"]]:
    """Conditions that are indices into the network's table, as the vectors that stand there.

    Args:
        model: with a network of ours (``ResidualMLP``, ``UNet``) with conditions.
        conditions: indices.

    Returns:
        The same model with the null condition's vector as its null condition, and the vectors.

    Raises:
        InputError: the model has no table of conditions.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model)
    tables = [leaf for path, leaf in leaves if _names(path)[-2:] == ["prompt", "embedding"]]
    null = model.null_condition
    if len(tables) != 1 or null is None or not jnp.issubdtype(jnp.result_type(null), jnp.integer):
        raise InputError("model: expected a network with a table of conditions, found none")
    (table,) = tables
    embedded = eqx.tree_at(lambda m: m.null_condition, model, table[null])
    return embedded, table[conditions]


def _names(path) -> list[str]:
    return [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]


def optimize_prompts(
    model: Model,
    *,
    key: int | PRNGKeyArray,
    conditions: PyTree,
    target: float | int,
    sigma: float | int | None = None,
    num_noises: int = 4,
    num_steps: int = 10,
    learning_rate: float | int = 0.05,
    trainable: PyTree = None,
    chunk_size: int = 16,
) -> PromptResult:
    """Move the embedding of a prompt until its gap at the first sampling step is small.

        loss(c) = mean_j sigma |s(sigma n_j, sigma, c) - s(sigma n_j, sigma, null)| = mean_j |e_j|

    by AdamW, from the prompt's own embedding, until the loss is at most ``target``. The model and
    all other prompts stay as they are. What the prompt asks for fades with the gap: a loss of
    zero is the null condition.

    Args:
        model: unguided, conditional `Model`; its weights are arguments of the compiled program.
        key: of the noises n_j, the same for all conditions. A seed or a typed key.
        conditions: pytree of arrays with a leading axis of c, with floating-point ones among them:
            those are moved. For indices see ``embed_conditions``.
        target: of the loss, > 0. Traced.
        sigma: noise level; ``None`` for the model's largest.
        num_noises: averaged; the papers take as many as images are drawn.
        num_steps: at most.
        learning_rate: of AdamW, whose weight decay is 0.01.
        trainable: pytree like one condition's floating-point leaves, 1 where a number may move
            and 0 where not (the paper holds the first token); ``None`` for all.
        chunk_size: conditions computed together.

    Returns:
        `PromptResult`; deterministic.

    Raises:
        InputError: an argument out of range, conditions that do not fit, or nothing to move.

    Cost: one evaluation a noise for the null condition, then one evaluation and one vjp for each
    noise and loss; there is one loss more than steps.

    References:
        Wen, Liu, Chen, Lyu (2024), arXiv:2407.21720, section 4.1. Its code takes one norm over
        all images together, so that its target grows as the root of their number; here each has
        its own, and a published target for one image holds for any number.
    """
    check_conditions(conditions)
    for name, value in (("target", target), ("learning_rate", learning_rate)):
        check_positive(name, value)
    check_count("num_noises", num_noises, 1)
    check_count("num_steps", num_steps, 0)
    check_count("chunk_size", chunk_size, 1)
    conditions = jax.tree.map(jnp.asarray, conditions)
    if not jax.tree.leaves(eqx.filter(conditions, eqx.is_inexact_array)):
        raise InputError(
            "conditions: expected floating-point arrays among them, found indices only "
            "(embed_conditions makes vectors of them)"
        )
    sigma = model.sigma_max if sigma is None else sigma
    check_positive("sigma", sigma)
    return _optimize(
        model,
        derive_key(key, "prompts"),
        conditions,
        jnp.asarray(target, widest_dtype(model)),
        jnp.asarray(sigma, widest_dtype(model)),
        trainable,
        num_noises=num_noises,
        num_steps=num_steps,
        learning_rate=float(learning_rate),
        chunk_size=chunk_size,
    )


@partial(jax.jit, static_argnames=("num_noises", "num_steps", "learning_rate", "chunk_size"))
def _optimize(
    model,
    key,
    conditions,
    target,
    sigma,
    trainable,
    *,
    num_noises,
    num_steps,
    learning_rate,
    chunk_size,
):
    shape = (num_noises, *model.event_shape)
    points = sigma * jax.random.normal(key, shape, jnp.float32).astype(target.dtype)
    null = jax.vmap(lambda x: model(x, sigma, None))(points)
    adamw = optax.adamw(learning_rate, weight_decay=WEIGHT_DECAY)

    def one(condition):
        start, rest = eqx.partition(condition, eqx.is_inexact_array)

        def loss(moving):
            given = eqx.combine(moving, rest)
            gaps = jax.vmap(lambda x: model(x, sigma, given))(points) - null
            return jnp.mean(sigma * jnp.linalg.norm(gaps.reshape(num_noises, -1), axis=1))

        def going(state):
            _, _, value, gradient, steps = state
            finite = jnp.isfinite(value)
            for leaf in jax.tree.leaves(gradient):
                finite &= jnp.all(jnp.isfinite(leaf))
            return (steps < num_steps) & finite & (value > target)

        def step(state):
            moving, optimizer, _, gradient, steps = state
            if trainable is not None:
                gradient = jax.tree.map(lambda g, t: g * t.astype(g.dtype), gradient, trainable)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
                update, optimizer = adamw.update(gradient, optimizer, moving)
            if trainable is not None:  # weight decay too
                update = jax.tree.map(lambda u, t: u * t.astype(u.dtype), update, trainable)
            moving = jax.tree.map(lambda m, u: m + u.astype(m.dtype), moving, update)
            return moving, optimizer, *jax.value_and_grad(loss)(moving), steps + 1

        before, gradient = jax.value_and_grad(loss)(start)
        first = (start, adamw.init(start), before, gradient, jnp.int32(0))
        moving, _, after, gradient, steps = jax.lax.while_loop(going, step, first)
        finite = jnp.isfinite(after)
        for leaf in jax.tree.leaves(gradient):
            finite &= jnp.all(jnp.isfinite(leaf))
        status = jnp.where(after <= target, Status.OK, Status.NOT_CONVERGED)
        status = jnp.where(finite, status, Status.NONFINITE).astype(jnp.int32)
        losses = num_noises * (steps + 1)
        cost = Cost(num_noises + losses, jnp.int32(0), losses)
        return PromptResult(eqx.combine(moving, rest), before, after, steps, status, cost)

    return chunked_map(one, conditions, chunk_size=chunk_size)
