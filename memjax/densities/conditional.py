"""A mixture whose components carry class labels: exact conditional scores."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax._core.checks import is_traced
from memjax._core.errors import InputError
from memjax.densities._arrays import Numbers
from memjax.densities.density import Condition, Sigma
from memjax.densities.mixture import GaussianMixture


class ConditionalMixture(GaussianMixture):
    """A ``GaussianMixture`` with one class label per component.

    ``density.score(x, sigma, c)`` is the score of p_sigma(x | c), the mixture of the components
    labelled c with their weights renormalized. The null condition (None, or any negative label such
    as ``null_condition``, so that conditional and null branches can be stacked in one array)
    gives the marginal. Bayes' rule holds exactly::

        log p(x | c) = log p(x) + log p(c | x) - log p(c)
        s(x, c)      = s(x) + grad log p(c | x)

    Every method of ``Density`` takes the label as ``condition``: an integer or an integer scalar
    array. A traced label that no component carries gives NaN. Cost as for the whole mixture.

    Args:
        weights: as for ``GaussianMixture``.
        means: as for ``GaussianMixture``.
        covariances: as for ``GaussianMixture``.
        labels: K integers >= 0, the class of each component.

    Raises:
        InputError: as for ``GaussianMixture``, or labels are not K integers >= 0.

    >>> pair = ConditionalMixture([0.5, 0.5], jnp.array([[-2.0], [2.0]]), 1.0, [0, 1])
    >>> x = jnp.zeros(1)
    >>> [float(pair.score(x, 0.0, c)[0]) for c in (None, 0, 1)]
    [0.0, -2.0, 2.0]
    """

    labels: Int[Array, " k"]

    def __init__(
        self,
        weights: Numbers,
        means: Numbers,
        covariances: Numbers,
        labels: Numbers,
    ):
        super().__init__(weights, means, covariances)
        given = np.asarray(labels)
        if given.shape != self.log_weights.shape or not np.issubdtype(given.dtype, np.integer):
            raise InputError(
                f"labels: expected {self.log_weights.size} integers, "
                f"got {given.dtype}{list(given.shape)}"
            )
        if (given < 0).any():
            raise InputError(f"labels: expected integers >= 0, got {given.min()}")
        self.labels = jnp.asarray(given, jnp.int32)

    @property
    def null_condition(self) -> Int[Array, ""]:
        """The label that means no condition."""
        return jnp.int32(-1)

    def log_class_prob(
        self, x: Float[Array, "..."], sigma: Sigma, condition: Condition
    ) -> Float[Array, ""]:
        """The exact classifier of noisy points: log p(c | x), in nats.

        Args:
            x: point, of ``event_shape``.
            sigma: noise level >= 0.
            condition: class label c.

        Returns:
            Log-probability <= 0 of the class; 0 for the null condition, -infinity for a traced
            label that no component carries.

        Raises:
            InputError: as for ``score``.
        """
        _, flat, sigma = self._enter(x, sigma, None)
        joint = self._log_joint(flat, sigma)
        members = jnp.where(self._members(condition), joint, -jnp.inf)
        return jax.nn.logsumexp(members) - jax.nn.logsumexp(joint)

    def _members(self, condition: Condition) -> Array:
        """Which components the condition selects."""
        if condition is None:
            condition = self.null_condition
        label = jnp.asarray(condition)
        if label.shape != () or not jnp.issubdtype(label.dtype, jnp.integer):
            raise InputError(
                f"condition: expected an integer label, got {label.dtype}{list(label.shape)}"
            )
        label = label.astype(self.labels.dtype)
        members = (self.labels == label) | (label < 0)
        if not is_traced(members) and not bool(members.any()):
            known = ", ".join(str(c) for c in np.unique(self.labels))
            raise InputError(f"condition: expected one of the labels {known}, got {label}")
        return members

    def _given(self, condition: Condition) -> "ConditionalMixture":
        kept = jnp.where(self._members(condition), self.log_weights, -jnp.inf)
        return eqx.tree_at(lambda m: m.log_weights, self, kept - jax.nn.logsumexp(kept))
