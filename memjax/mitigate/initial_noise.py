"""SAIL: choose the noise from which a sampler starts, and leave prompt and weights alone."""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from memjax._core.checks import check_count, check_positive
from memjax._core.chunked import chunked_map
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import widest_dtype
from memjax.mitigate.objectives import (
    MEANS_COST,
    NoiseObjective,
    check_conditions,
    condition_means,
)

Optimizer = Literal["polyak", "adam"]

_LEARNING_RATES = {"polyak": 1.0, "adam": 0.05}
_OVERSHOOT = 0.05
"""Of a step of ``"polyak"``: a convex objective would be approached from above for ever."""

_ACCEPTED, _REJECTED, _EMPTY = 0, 1, 2


class SailResult(NamedTuple):
    """Noises for every condition, and what became of the search for them.

    Attributes:
        noises: n, unit variance; the sampler starts at sigma_max n. Accepted ones come first, in
            the order in which they were found; then the best of the others; NaN where the budget
            ended before there were enough finite ones.
        accepted: whether the objective is at most the threshold.
        objective: of each noise.
        steps: optimizer steps it took.
        moved: how far it lies from where it was drawn, |n - n_0|.
        candidate: which draw of the condition it comes from; -1 for none. All are different.
        candidates: draws begun, per condition.
        status: per condition ``OK`` (all accepted), ``NOT_CONVERGED`` (the budget ended first) or
            ``NONFINITE`` (and not even one candidate was finite).
        cost: network products, per condition.
    """

    noises: Float[Array, "c n *event"]
    accepted: Bool[Array, "c n"]
    objective: Float[Array, "c n"]
    steps: Int[Array, "c n"]
    moved: Float[Array, "c n"]
    candidate: Int[Array, "c n"]
    candidates: Int[Array, "c"]
    status: Int[Array, "c"]
    cost: Cost


@dataclasses.dataclass(frozen=True)
class _Search:
    """What determines a search beside model, condition, key and threshold; static under jit."""

    objective: NoiseObjective
    num_noises: int
    optimizer: str
    learning_rate: float
    num_steps: int
    num_parallel: int
    max_candidates: int
    keep_norm: bool

    def __post_init__(self):
        check_count("num_noises", self.num_noises, 1)
        check_count("num_steps", self.num_steps, 0)
        check_count("num_parallel", self.num_parallel, 1)
        check_count("max_candidates", self.max_candidates, self.num_noises)
        check_positive("learning_rate", self.learning_rate)


def sail(
    model: Model,
    num_noises: int,
    *,
    key: int | PRNGKeyArray,
    conditions: PyTree,
    threshold: float | int | Float[Array, "c"] | Float[np.ndarray, "c"],
    objective: NoiseObjective | None = None,
    optimizer: Optimizer = "polyak",
    learning_rate: float | int | None = None,
    num_steps: int = 10,
    num_parallel: int = 8,
    max_candidates: int = 64,
    keep_norm: bool = True,
    chunk_size: int = 16,
) -> SailResult:
    """Find initial noises from which a condition pulls the sampler but weakly (SAIL).

    Candidate j of a condition is drawn from the key, the condition's row and j alone, and moved
    down the objective until that is at most ``threshold``. It then is accepted as it stands, moved
    no further than that took; after ``num_steps`` steps in vain it is given up. ``num_parallel``
    candidates are under way at any time, and whatever is accepted or given up is replaced by a
    fresh draw, until there are ``num_noises`` or ``max_candidates`` were begun. All of it is one
    compiled loop.

    **Steps.** ``"polyak"`` goes along the gradient g as far as a linear objective would need to
    reach the threshold (and 0.05 more, lest it never arrive): the length is
    min(learning_rate, (objective - threshold)/|g| + 0.05). That is the shortest way, and few
    steps. ``"adam"`` is the paper's: it moves all coordinates alike, whatever their share in the
    gradient, and so the noise further than needed.

    So no noise stands twice in the result, none is tried twice, and a call with more noises or a
    larger budget begins with the same ones.

    **Which prompts.** For those that a detector has flagged. A prompt of many images is led away
    from their mean as well, and with ``"pull"`` from what it means (0.95 of our general prompts'
    samples show the right digit, 0.45 afterwards). A threshold of infinity leaves a prompt alone.

    **Gaussian noises.** With ``keep_norm`` every step goes back to the sphere on which the
    candidate was drawn, and |n|^2 of the candidates stays exactly chi-square. The papers' penalty
    ``objective.regularization`` instead pulls to the origin, where a Gaussian has its mode but in
    high dimension no mass. Any method that avoids an image must shift the noises, also if it only
    selects among random ones: compare with rejected ones (``num_steps=0`` selects).

    Args:
        model: unguided, conditional `Model`; its weights are arguments of the compiled program.
        num_noises: n noises for each condition.
        key: a seed or a typed key.
        conditions: pytree of arrays with a leading axis of c.
        threshold: of acceptance, one number or one for each condition; see ``judge_noises`` for
            how to find it. Traced.
        objective: what is minimized; ``None`` for ``NoiseObjective()``.
        optimizer: ``"polyak"`` or ``"adam"``.
        learning_rate: longest step of ``"polyak"`` as a length in the space of n, 1 for ``None``;
            Adam's step per coordinate of n, the paper's 0.05 for ``None``.
        num_steps: for each candidate; 0 selects among random noises.
        num_parallel: candidates under way together for each condition.
        max_candidates: begun at most for each condition, >= ``num_noises``.
        keep_norm: whether a candidate keeps its norm.
        chunk_size: conditions searched together.

    Returns:
        `SailResult`; deterministic. ``sample(model, ..., noises=...)`` starts from its noises.

    Raises:
        InputError: an argument out of range, or conditions that do not fit.

    Without raising: a candidate whose objective or gradient is not finite is given up. The noises
    found when the budget ends are returned, the best others with them, not accepted.

    Cost: per step and candidate ``objective.cost_with_gradient``, 16 evaluations a condition
    where the objective needs means. ``cost`` counts candidates under way; while a condition ends,
    or waits for others of its chunk, the program computes idle ones too.

    References:
        Jeon, Kim, No (2025), arXiv:2412.04140, section 5, Algorithm 2. There all candidates take
        all steps, failed passes are repeated from the same seed, and noises accepted before stand
        in the result again; Polyak (1969), Minimization of
        unsmooth functionals (the step); Kingma, Ba (2015), arXiv:1412.6980 (Adam).
    """
    count = check_conditions(conditions)
    objective = NoiseObjective() if objective is None else objective
    objective.level(model)
    if optimizer not in _LEARNING_RATES:
        raise InputError(f"optimizer: expected 'polyak' or 'adam', got {optimizer!r}")
    if learning_rate is None:
        learning_rate = _LEARNING_RATES[optimizer]
    search = _Search(
        objective,
        num_noises,
        optimizer,
        float(learning_rate),
        num_steps,
        num_parallel,
        max_candidates,
        keep_norm,
    )
    if np.isnan(threshold).any() or np.shape(threshold) not in ((), (count,)):
        raise InputError(f"threshold: expected one number or {count}, not nan, got {threshold}")
    check_count("chunk_size", chunk_size, 1)
    conditions = jax.tree.map(jnp.asarray, conditions)
    levels = jnp.broadcast_to(jnp.asarray(threshold, widest_dtype(model)), (count,))
    rows = jnp.arange(count, dtype=jnp.int32)
    key = derive_key(key, "sail")
    return _sail(model, key, rows, conditions, levels, search=search, chunk_size=chunk_size)


class _Pool(NamedTuple):
    """The best candidates so far, best first."""

    rank: Int[Array, "n"]
    noises: Float[Array, "n *event"]
    objective: Float[Array, "n"]
    steps: Int[Array, "n"]
    moved: Float[Array, "n"]
    candidate: Int[Array, "n"]


class _Slots(NamedTuple):
    """The candidates under way."""

    noises: Float[Array, "k *event"]
    optimizer: PyTree
    steps: Int[Array, "k"]
    candidate: Int[Array, "k"]
    active: Bool[Array, "k"]


class _State(NamedTuple):
    slots: _Slots
    pool: _Pool
    begun: Int[Array, ""]
    evaluations: Int[Array, ""]


@partial(jax.jit, static_argnames=("search", "chunk_size"))
def _sail(model, key, rows, conditions, thresholds, *, search, chunk_size):
    def one(given):
        row, condition, threshold = given
        return _search(model, derive_key(key, row), condition, threshold, search)

    return chunked_map(one, (rows, conditions, thresholds), chunk_size=chunk_size)


def _search(
    model: Model,
    key: PRNGKeyArray,
    condition: PyTree,
    threshold: Float[Array, ""],
    search: _Search,
) -> SailResult:
    """The search of one condition."""
    n, k, shape = search.num_noises, search.num_parallel, model.event_shape
    dtype = widest_dtype(model)
    adam = optax.adam(search.learning_rate)
    needs_means = search.objective.needs_means(model)
    means = condition_means(model, condition) if needs_means else None

    def draw(candidate):
        # In float32 always, so that double precision refines a search, not replaces it.
        return jax.random.normal(derive_key(key, candidate), shape, jnp.float32).astype(dtype)

    drawn = jax.vmap(draw)(jnp.arange(search.max_candidates))

    def begin(candidates):
        noises = drawn.at[candidates].get(mode="clip")
        return _Slots(
            noises,
            jax.vmap(adam.init)(noises) if search.optimizer == "adam" else (),
            jnp.zeros(k, jnp.int32),
            candidates,
            candidates < search.max_candidates,
        )

    def judge(noise):
        return search.objective.value(model, noise, condition, means)

    def improve(noise, value, gradient, state):
        if search.optimizer == "adam":
            with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
                update, state = adam.update(gradient, state)
                moved = (noise + update).astype(dtype)
        else:
            if search.keep_norm:  # along the sphere
                outward = noise / _length(noise)
                gradient = gradient - jnp.sum(gradient * outward) * outward
            slope = _length(gradient)
            length = jnp.minimum((value - threshold) / slope + _OVERSHOOT, search.learning_rate)
            moved = noise - length * gradient / slope
        if search.keep_norm:
            moved = moved * (_length(noise) / _length(moved))
        return moved, state

    def searching(state):
        found = jnp.sum(state.pool.rank == _ACCEPTED)
        return (found < n) & jnp.any(state.slots.active)

    def step(state):
        slots, pool = state.slots, state.pool
        value, gradient = jax.vmap(jax.value_and_grad(judge))(slots.noises)
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient.reshape(k, -1)), axis=1)
        accepted = slots.active & finite & (value <= threshold)
        last = slots.steps >= search.num_steps
        done = accepted | (slots.active & (last | ~finite))
        moved = jax.vmap(_length)(slots.noises - drawn.at[slots.candidate].get(mode="clip"))
        rank = jnp.where(accepted, _ACCEPTED, jnp.where(done & finite, _REJECTED, _EMPTY))
        rank = rank.astype(jnp.int32)
        ours = _Pool(rank, slots.noises, value, slots.steps, moved, slots.candidate)
        pool = _best(pool, ours, n)
        noises, optimized = jax.vmap(improve)(slots.noises, value, gradient, slots.optimizer)
        going = slots._replace(noises=noises, optimizer=optimized, steps=slots.steps + 1)
        order = jnp.cumsum(done, dtype=jnp.int32)
        fresh = begin(jnp.where(done, state.begun + order - 1, search.max_candidates))
        replaced = jnp.minimum(order[-1], search.max_candidates - state.begun)
        return _State(
            jax.tree.map(partial(_select, done), fresh, going),
            pool,
            state.begun + replaced,
            state.evaluations + jnp.sum(slots.active, dtype=jnp.int32),
        )

    first = jnp.arange(k, dtype=jnp.int32)
    empty = _Pool(
        jnp.full(n, _EMPTY, jnp.int32),
        jnp.full((n, *shape), jnp.nan, dtype),
        jnp.full(n, jnp.nan, dtype),
        jnp.zeros(n, jnp.int32),
        jnp.full(n, jnp.nan, dtype),
        jnp.full(n, -1, jnp.int32),
    )
    begun = min(k, search.max_candidates)
    start = _State(begin(first), empty, jnp.int32(begun), jnp.int32(0))
    end = jax.lax.while_loop(searching, step, start)
    pool = end.pool
    status = jnp.where(
        jnp.all(pool.rank == _ACCEPTED),
        Status.OK,
        jnp.where(jnp.all(pool.rank == _EMPTY), Status.NONFINITE, Status.NOT_CONVERGED),
    )
    cost = search.objective.cost_with_gradient.times(end.evaluations)
    if needs_means:
        cost = cost.plus(MEANS_COST)
    return SailResult(
        pool.noises,
        pool.rank == _ACCEPTED,
        pool.objective,
        pool.steps,
        pool.moved,
        pool.candidate,
        end.begun,
        status.astype(jnp.int32),
        Cost(*(jnp.asarray(part, jnp.int32) for part in cost)),
    )


def _best(pool: _Pool, slots: _Pool, n: int) -> _Pool:
    """The n best of both: accepted ones as they came, then the others by their objective."""
    both = _Pool(*(jnp.concatenate(pair) for pair in zip(pool, slots, strict=True)))
    # lexsort is stable: accepted ones keep their order, the pool's before the slots'.
    value = jnp.where(both.rank == _REJECTED, both.objective, 0)
    order = jnp.lexsort((value, both.rank))[:n]
    best = _Pool(*(part[order] for part in both))
    # What is under way, or was not finite, is none of them.
    missing = best.rank == _EMPTY
    return _Pool(
        best.rank,
        _select(missing, jnp.full_like(best.noises, jnp.nan), best.noises),
        jnp.where(missing, jnp.nan, best.objective),
        jnp.where(missing, 0, best.steps),
        jnp.where(missing, jnp.nan, best.moved),
        jnp.where(missing, -1, best.candidate),
    )


def _select(which: Bool[Array, "k"], yes: Array, no: Array) -> Array:
    """Row by row."""
    return jnp.where(which.reshape(-1, *(1 for _ in yes.shape[1:])), yes, no)


def _length(v: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.sum(v * v))
