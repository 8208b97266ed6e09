"""What an initial noise is judged by before a sampler starts from it."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from memjax._core.checks import check_positive
from memjax._core.chunked import chunked_map
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.diffusion.combine import gap
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import widest_dtype

MEAN_PAIRS = 4
"""Antithetic pairs of pure noise over which ``condition_means`` averages."""

# Network products of (value, its gradient), with e the gap of the predicted noise: one gap is two
# evaluations, and reverse mode goes through each evaluation and each product once.
_COSTS = {
    "exact": (Cost(forward=2, jvp=2), Cost(vjp=4)),
    "paper": (Cost(forward=4), Cost(vjp=4)),
    "algorithm": (Cost(forward=4), Cost(vjp=4)),
    "released": (Cost(forward=4), Cost(vjp=4)),
    "gap": (Cost(forward=2), Cost(vjp=2)),
    "pull": (Cost(forward=1), Cost(vjp=1)),
}


class Means(NamedTuple):
    """What the model draws on average, before anything is known of the noise.

    Attributes:
        null: E[x0] under the null condition.
        given: E[x0 | c].
    """

    null: Float[Array, "..."]
    given: Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class NoiseObjective:
    """How strongly a condition pulls a sampler that starts at the noise n; smaller is better.

    At noise level sigma, by default the first of the sampler, with y = sigma n and the gap of the
    predicted noise between condition and null condition::

        e(n) = -sigma [s(y, sigma, c) - s(y, sigma, null)],    u = e / |e|,    a = regularization

        "exact"      |e'(n) e(n)|^2 = sigma^6 |H_gap s_gap|^2        + a |n|^2   products, no step
        "paper"      |e(n + step e(n)) - e(n)|^2 / step^2            + a |n|^2   the paper's text
        "algorithm"  |e(n + step u) - e(n)|^2 / step^2               + a |n|^2   its Algorithm 2
        "released"   |e(n + step u)|                                 + a |n|     its published code
        "gap"        |e(n)|                                          + a |n|     Wen et al.'s norm
        "pull"       <D - m_null, m_c - m_null> / |m_c - m_null|^2   + a |n|

    ``"pull"`` is ours: D = E[x0 | y, c] is what the condition draws from y, m_c and m_null what it
    and no condition draw on average (``condition_means``). Its mean over noises is about 1; where
    a condition stands for one image, m_c is that image and every noise draws all of it, and a
    noise of little pull draws something else, or but a part of it. It costs least, one evaluation,
    and alone knows in which direction the stored image lies.

    Below the model's largest noise level the point is where the sampler would come from n,

        y = (1 - sigma/sigma_max) [m_null + guidance (m_c - m_null)] + sigma n,

    a step along the straight line to the mean: what first steps of the probability flow are.

    **Scale.** e, n and all values are dimensionless and the same in the coordinates x_t of a
    variance-preserving process. The paper's raw |H_gap s_gap|^2 is value / sigma^6 in our
    coordinates and value / sigma_t^6 in x_t (sigma_t^6 = 0.98 at the first step of Stable
    Diffusion). Published thresholds (7.6 to 9, and 4 to 6) belong to ``"released"`` with a = 0.05
    and 0.01 and the d of Stable Diffusion: |n| is about sqrt(d).

    Attributes:
        name: one of the six. Static, like all fields.
        sigma: noise level in the score's units; ``None`` for the model's largest.
        step: of the finite differences, in units of n for ``"algorithm"`` and ``"released"``.
        regularization: a >= 0; the paper has 0.05 and 0.01.
        guidance: of the sampler; used below the largest noise level only.

    Raises:
        InputError: an unknown name, or a number out of range.

    >>> NoiseObjective("released", regularization=0.05).cost
    Cost(forward=4, jvp=0, vjp=0)
    >>> NoiseObjective("pull", sigma=2.0).cost_with_gradient
    Cost(forward=1, jvp=0, vjp=1)

    References:
        Jeon, Kim, No (2025), arXiv:2412.04140, section 5 and Algorithm 2, which leave out
        1/step^2, and whose published code computes ``"released"``; Wen, Liu, Chen, Lyu (2024),
        arXiv:2407.21720, section 4.
    """

    name: str = "pull"
    sigma: float | int | None = None
    step: float | int = 1.0
    regularization: float | int = 0.0
    guidance: float | int = 1.0

    def __post_init__(self):
        if self.name not in _COSTS:
            raise InputError(f"name: expected one of {', '.join(_COSTS)}, got {self.name!r}")
        if self.sigma is not None:
            check_positive("sigma", self.sigma)
        check_positive("step", self.step)
        if not 0 <= self.regularization < float("inf"):
            raise InputError(f"regularization: expected at least 0, got {self.regularization}")

    @property
    def cost(self) -> Cost:
        """Products of one value."""
        return _COSTS[self.name][0]

    @property
    def cost_with_gradient(self) -> Cost:
        """Products of one value with its gradient."""
        return _COSTS[self.name][0].plus(_COSTS[self.name][1])

    def level(self, model: Model) -> float:
        """The noise level at which the model is asked."""
        if self.sigma is None:
            return model.sigma_max
        if self.sigma > model.sigma_max:
            raise InputError(
                f"sigma: expected at most the model's {model.sigma_max:g}, got {self.sigma:g}"
            )
        return float(self.sigma)

    def needs_means(self, model: Model) -> bool:
        """Whether ``value`` reads its ``means``."""
        return self.name == "pull" or self.level(model) < model.sigma_max

    def value(
        self, model: Model, noise: Float[Array, "..."], condition: PyTree, means: Means | None
    ) -> Float[Array, ""]:
        """The objective of one noise under one condition.

        Args:
            model: unguided.
            noise: n, of the model's event shape, standard normal by origin.
            condition: other than ``None``.
            means: from ``condition_means``; ``None`` where ``needs_means`` is false.
        """
        sigma, dtype = self.level(model), noise.dtype

        def point(n):
            if sigma == model.sigma_max:
                return sigma * n
            null, given = means  # type: ignore[misc]
            mean = null + self.guidance * (given - null)
            return (1 - sigma / model.sigma_max) * mean + sigma * n

        def predicted_gap(n):
            return -sigma * gap(model)(point(n), sigma, condition)

        length = _norm(noise)
        match self.name:
            case "pull":
                null, given = means  # type: ignore[misc]
                y = point(noise)
                drawn = y + sigma**2 * model(y, sigma, condition)
                apart = given - null
                value = jnp.sum((drawn - null) * apart) / jnp.sum(apart * apart)
            case "gap":
                value = _norm(predicted_gap(noise))
            case "released":
                e = predicted_gap(noise)
                value = _norm(predicted_gap(noise + self.step * e / _norm(e)))
            case "exact":
                e, push = jax.linearize(predicted_gap, noise)
                value, length = jnp.sum(push(e) ** 2), length**2
            case _:
                e = predicted_gap(noise)
                along = e if self.name == "paper" else e / _norm(e)
                change = (predicted_gap(noise + self.step * along) - e) / self.step
                value, length = jnp.sum(change**2), length**2
        return value + self.regularization * length.astype(dtype)


def condition_means(model: Model, condition: PyTree) -> Means:
    """What a model draws on average under a condition, and under none.

        m = mean of D(sigma_max n, sigma_max) over four antithetic pairs of noises n, -n

    At the largest noise level the denoiser D = x + sigma^2 s hardly knows its input: it draws the
    mean of all images of the condition, the stored image itself if there is only one.

    Args:
        model: the model.
        condition: one condition, other than ``None``.

    Returns:
        `Means`. 16 forward evaluations of the network (``MEANS_COST``); the noises are fixed.
    """
    sigma = model.sigma_max
    shape = (MEAN_PAIRS, *model.event_shape)
    half = jax.random.normal(derive_key(0, "condition means"), shape, jnp.float32)
    noises = jnp.concatenate([half, -half]).astype(widest_dtype(model))

    def mean(condition):
        def drawn(n):
            return sigma * n + sigma**2 * model(sigma * n, sigma, condition)

        return jnp.mean(jax.vmap(drawn)(noises), axis=0)

    return Means(mean(None), mean(condition))


MEANS_COST = Cost(forward=4 * MEAN_PAIRS)
"""Of ``condition_means``, for one condition."""


def judge_noises(
    model: Model,
    noises: Float[Array, "c n *event"],
    conditions: PyTree,
    objective: NoiseObjective,
    *,
    chunk_size: int = 16,
) -> Float[Array, "c n"]:
    """The objective of every noise under its condition.

    Of noises drawn at random under harmless prompts, quantiles are thresholds for ``sail``.

    Args:
        model: unguided `Model`; its weights are arguments of the compiled program.
        noises: n noises for each condition.
        conditions: pytree of arrays with a leading axis of c.
        objective: what is computed.
        chunk_size: conditions computed together.

    Returns:
        One value each; NaN where the network is.

    Raises:
        InputError: shapes that do not fit, or a level above the model's largest.

    Cost: ``judge_cost``, for each condition.
    """
    check_conditions(conditions, noises.shape[0])
    if noises.shape[2:] != model.event_shape:
        raise InputError(
            f"noises: expected [c, n, {str(model.event_shape)[1:]}, got {noises.shape}"
        )
    return _judge(model, noises, conditions, objective, chunk_size)


def judge_cost(model: Model, num_noises: int, objective: NoiseObjective) -> Cost:
    """Network products of ``judge_noises`` for one condition: its means, if needed, and values."""
    values = objective.cost.times(num_noises)
    return values.plus(MEANS_COST) if objective.needs_means(model) else values


@partial(jax.jit, static_argnames=("objective", "chunk_size"))
def _judge(model, noises, conditions, objective, chunk_size):
    def row(given):
        noises, condition = given
        means = condition_means(model, condition) if objective.needs_means(model) else None
        return jax.vmap(lambda n: objective.value(model, n, condition, means))(noises)

    return chunked_map(row, (noises, conditions), chunk_size=chunk_size)


def check_conditions(conditions: PyTree, count: int | None = None) -> int:
    """The number of conditions, refused unless all arrays have as many rows."""
    leaves = jax.tree.leaves(conditions)
    if not leaves:
        raise InputError("conditions: expected arrays, one row per condition, got none")
    rows = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in leaves}
    found = min(rows)
    if len(rows) > 1 or found < 1 or count not in (None, found):
        expected = "one row each" if count is None else f"{count} rows"
        raise InputError(
            f"conditions: expected {expected}, got shapes {[jnp.shape(leaf) for leaf in leaves]}"
        )
    return found


def _norm(v: Float[Array, "..."]) -> Float[Array, ""]:
    """|v|, with gradient zero where v is."""
    square = jnp.sum(v * v)
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
