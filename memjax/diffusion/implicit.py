"""The classifier that a conditional score implies."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from memjax.diffusion.adapters import Scalar
from memjax.diffusion.combine import Gap, Score, gap


class ImplicitClassifier(eqx.Module):
    """A function whose gradient in x is that of log p(c | x); made by ``implicit_classifier``."""

    gap: Gap

    def __call__(
        self, x: Float[Array, "..."], sigma: Scalar, condition: PyTree
    ) -> Float[Array, ""]:
        """Zero; its gradient in x is the gap."""
        return _potential(self.gap, x, sigma, condition)


def implicit_classifier(score: Score) -> ImplicitClassifier:
    """The classifier of a conditional score, by its gradient alone.

        grad_x log p(c | x, sigma) = s(x, sigma, c) - s(x, sigma)        (Bayes' rule)

    It stands for ``log_prob`` in ``memjax.classifier_guided`` and
    ``memjax.extract.guided_samples``: so one model is guided by what another one, such as
    ``memjax.training.fine_tune`` gives, tells labels by, and keeps its own weights::

        s_model(x, sigma) + w (s_tuned(x, sigma, c) - s_tuned(x, sigma))

    Args:
        score: conditional; a ``Model`` or callable pytree ``(x, sigma, condition) -> s``, for
            which ``None`` is no condition.

    Returns:
        A callable pytree ``(x, sigma, condition) -> number``. The number itself is 0, for the gap
        of a learned score is the gradient of nothing; its first and higher derivatives in x are
        the gap and the gap's. Derivatives in other arguments are zero. Two evaluations of the
        score for a gradient.

    Raises:
        InputError: ``score`` is not callable.

    >>> from memjax.densities import ConditionalMixture
    >>> from memjax.diffusion.combine import classifier_guided
    >>> pair = ConditionalMixture([0.5, 0.5], jnp.array([[-2.0], [2.0]]), 1.0, [0, 1])
    >>> guided = classifier_guided(pair.score, implicit_classifier(pair.score), 1.0)
    >>> [float(guided(jnp.zeros(1), 0.0, c)[0]) for c in (0, 1)]
    [-2.0, 2.0]

    References:
        Ho, Salimans (2022), arXiv:2207.12598, section 3.2 (implicit classifier).
    """
    return ImplicitClassifier(gap(score))


@jax.custom_jvp
def _potential(gap, x, sigma, condition):
    return jnp.zeros((), x.dtype)


@_potential.defjvp
def _potential_jvp(primals, tangents):
    gap, x, sigma, condition = primals
    return jnp.zeros((), x.dtype), jnp.sum(gap(x, sigma, condition) * tangents[1])
