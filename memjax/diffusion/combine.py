"""New scores from old ones: fixed noise, guidance, gap, difference."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from memjax._core.errors import InputError
from memjax.diffusion.adapters import Scalar, callable_pytree

Score = Callable[..., Float[Array, "..."]]


class ScoreAt(eqx.Module):
    """The field x -> s(x, sigma, condition); made by ``at``."""

    score: Score
    sigma: Float[Array, "..."]
    condition: PyTree = None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """s(x, sigma, condition) for one x. One evaluation of the score."""
        return self.score(x, self.sigma.astype(x.dtype), self.condition)


class Guided(eqx.Module):
    """s_null + w (s_cond - s_null); made by ``guided``."""

    score: Score
    weight: Float[Array, "..."]

    def __call__(
        self,
        x: Float[Array, "..."],
        sigma: Scalar,
        condition: PyTree = None,
    ) -> Float[Array, "..."]:
        """The guided score; s_null for ``condition=None``. Two evaluations of the score."""
        if condition is None:
            return self.score(x, sigma, None)
        conditional, null = _branches(self.score, x, sigma, condition)
        return null + self.weight.astype(x.dtype) * (conditional - null)


class Unconditional(eqx.Module):
    """s_null whatever the condition; made by ``guided`` with weight 0."""

    score: Score

    def __call__(
        self,
        x: Float[Array, "..."],
        sigma: Scalar,
        condition: PyTree = None,
    ) -> Float[Array, "..."]:
        """s(x, sigma, None). One evaluation of the score."""
        del condition
        return self.score(x, sigma, None)


class Gap(eqx.Module):
    """s_cond - s_null; made by ``gap``."""

    score: Score

    def __call__(
        self,
        x: Float[Array, "..."],
        sigma: Scalar,
        condition: PyTree,
    ) -> Float[Array, "..."]:
        """The gap at a condition other than ``None``. Two evaluations of the score."""
        if condition is None:
            raise InputError("condition: expected a condition, got None, whose gap is zero")
        conditional, null = _branches(self.score, x, sigma, condition)
        return conditional - null


class Difference(eqx.Module):
    """s - s_baseline; made by ``difference``."""

    score: Score
    baseline: Score

    def __call__(
        self,
        x: Float[Array, "..."],
        sigma: Scalar,
        condition: PyTree = None,
    ) -> Float[Array, "..."]:
        """The difference, both at the same condition. One evaluation of either score."""
        return self.score(x, sigma, condition) - self.baseline(x, sigma, condition)


class ClassifierGuided(eqx.Module):
    """s_null + w grad_x log p(condition | x, sigma); made by ``classifier_guided``."""

    score: Score
    log_prob: Callable[..., Float[Array, ""]]
    weight: Float[Array, "..."] | None
    window: tuple[Float[Array, "..."], Float[Array, "..."]] | None
    limit: Float[Array, "..."] | None
    normalize: bool = eqx.field(static=True)

    def __call__(
        self,
        x: Float[Array, "..."],
        sigma: Scalar,
        condition: PyTree = None,
    ) -> Float[Array, "..."]:
        """The guided score. One evaluation of the score, one gradient of the classifier."""
        sigma = jnp.asarray(sigma, x.dtype)
        condition, weight = condition if self.weight is None else (condition, self.weight)
        weight = jnp.asarray(weight, x.dtype)
        score = self.score(x, sigma, None)

        def push() -> Float[Array, "..."]:
            slope = weight * jax.grad(self.log_prob)(x, sigma, condition)
            if self.limit is None and not self.normalize:
                return slope
            size = _safe_norm(score)
            length = _safe_norm(slope)
            if self.normalize:
                slope = jnp.abs(weight) * size / length * slope
                length = jnp.abs(weight) * size
            if self.limit is None:
                return slope
            most = self.limit.astype(x.dtype) * size
            return slope * jnp.minimum(1, most / jnp.maximum(length, most))

        if self.window is None:
            return score + push()
        low, high = (level.astype(x.dtype) for level in self.window)
        inside = (sigma > low) & (sigma < high)
        return score + jax.lax.cond(inside, push, lambda: jnp.zeros_like(score))


def _safe_norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    """|x|, and 1 for x = 0, whose norm has no derivative."""
    squared = jnp.sum(x**2)
    return jnp.sqrt(jnp.where(squared > 0, squared, 1))


def _floating(value: Scalar) -> Float[Array, ""]:
    return value if isinstance(value, jax.Array) else jnp.asarray(float(value))


def _branches(score: Score, x: Array, sigma: float | Array, condition: PyTree) -> tuple:
    """(s_cond, s_null), by one batched evaluation where the null condition can be stacked."""
    null = getattr(score, "null_condition", None)
    if null is None or not _stackable(condition, null):
        return score(x, sigma, condition), score(x, sigma, None)
    stacked = jax.tree.map(lambda *pair: jnp.stack(pair), condition, null)
    both = jax.vmap(lambda one: score(x, sigma, one))(stacked)
    return both[0], both[1]


def _stackable(a: PyTree, b: PyTree) -> bool:
    def signature(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]

    return signature(a) == signature(b)


def at(score: Score, sigma: Scalar, condition: PyTree = None) -> ScoreAt:
    """The field x -> s(x, sigma, condition): a score at one noise level and condition.

    The field is a callable pytree whose leaves are the score's weights, sigma and the condition:
    pass it to a jitted function rather than closing over it.

    Args:
        score: callable pytree or plain function ``(x, sigma, condition=None) -> s``.
        sigma: noise level in the score's units, > 0. The score receives it in x's dtype.
        condition: pytree of arrays, or ``None`` for the null condition.

    Returns:
        A field for ``memjax.linearize``, ``jax.vmap`` and the operators.

    Raises:
        InputError: ``score`` is not callable.

    >>> import jax, jax.numpy as jnp
    >>> field = at(lambda x, sigma, condition=None: -x / (1 + sigma**2), 1.0)
    >>> field(jnp.array([2.0, 4.0])).tolist()
    [-1.0, -2.0]
    """
    return ScoreAt(callable_pytree(score, "score"), _floating(sigma), condition)


def guided(score: Score, weight: Scalar) -> Score:
    """Classifier-free guidance: s_null + w (s_cond - s_null).

    Args:
        score: conditional score; ``condition=None`` gives s_null.
        weight: w; 1 is the conditional score, 0 the unconditional one. (Ho and Salimans' w is
            ours less 1.) A Python number 1 or 0 costs one evaluation, anything else two, batched
            into one call where ``score`` has a ``null_condition`` of the condition's structure.

    Returns:
        A score, callable pytree; s_null at ``condition=None``.

    Raises:
        InputError: ``score`` is not callable.

    References:
        Ho, Salimans (2022), arXiv:2207.12598, equation 6.
    """
    score = callable_pytree(score, "score")
    known = not isinstance(weight, jax.Array)
    if known and weight == 1:
        return score
    if known and weight == 0:
        return Unconditional(score)
    return Guided(score, _floating(weight))


def gap(score: Score) -> Gap:
    """The gap s(x, sigma, condition) - s(x, sigma, null) of a conditional score.

    Args:
        score: conditional score; ``condition=None`` gives s_null.

    Returns:
        A callable pytree ``(x, sigma, condition) -> gap``, which raises ``InputError`` at
        ``condition=None``. Two evaluations, batched into one call where ``score`` has a
        ``null_condition`` of the condition's structure.

    Raises:
        InputError: ``score`` is not callable.

    References:
        Wen, Liu, Chen, Lyu (2024), arXiv:2407.21720, section 3.3 (the gap of the predicted noise,
        which is -sigma times ours).
    """
    return Gap(callable_pytree(score, "score"))


def difference(score: Score, baseline: Score) -> Difference:
    """The difference s(x, sigma, condition) - s_baseline(x, sigma, condition) of two models.

    Args:
        score: the score under study.
        baseline: the score to compare with, such as that of a model trained on other images.

    Returns:
        A callable pytree ``(x, sigma, condition=None) -> difference``. One evaluation of each.

    Raises:
        InputError: ``score`` or ``baseline`` is not callable.
    """
    return Difference(callable_pytree(score, "score"), callable_pytree(baseline, "baseline"))


def classifier_guided(
    score: Score,
    log_prob: Callable[..., Float[Array, ""]],
    weight: Scalar | None,
    *,
    window: tuple[float | int, float | int] | None = None,
    limit: float | int | None = None,
    normalize: bool = False,
) -> ClassifierGuided:
    """Classifier guidance: s(x, sigma, null) + w grad_x log p(condition | x, sigma).

    For w = 1 this is Bayes' rule: the exact conditional score, if both parts are exact. For other
    weights the field is not the score of any noised density, and large ones overshoot: hence the
    options, which bound the push g = w grad log p by the score s itself.

    Args:
        score: the unconditional score, evaluated at ``condition=None``.
        log_prob: callable pytree ``(x, sigma, condition) -> log p``, a scalar in nats, of a
            classifier trained on noised images (``memjax.training.train_classifier``).
        weight: w >= 0; ``None`` to take it from the condition, which is then a pair (condition of
            the classifier, w): a batch may hold samples of many weights.
        window: noise levels (low, high): guided is only low < sigma < high, and the classifier
            not evaluated elsewhere. ``None`` for all.
        limit: the push is shortened to |g| <= limit |s|. ``None`` for no limit.
        normalize: the push is w |s| in the direction of grad log p (zero where that is zero).

    Returns:
        A score, callable pytree, whose condition is the classifier's. One evaluation of the
        score and one gradient of the classifier.

    Raises:
        InputError: ``score`` or ``log_prob`` is not callable, or an option is out of range.

    References:
        Dhariwal, Nichol (2021), arXiv:2105.05233, section 4. Kynkaanniemi et al. (2024),
        arXiv:2404.07724 (guidance in a limited interval of noise levels).
    """
    levels = None
    if window is not None:
        low, high = window
        if not 0 <= low < high:
            raise InputError(f"window: expected noise levels 0 <= low < high, got {window}")
        levels = (_floating(low), _floating(high))
    if limit is not None and not limit > 0:
        raise InputError(f"limit: expected a positive number, got {limit}")
    return ClassifierGuided(
        callable_pytree(score, "score"),
        callable_pytree(log_prob, "log_prob"),
        None if weight is None else _floating(weight),
        levels,
        None if limit is None else _floating(limit),
        normalize,
    )
