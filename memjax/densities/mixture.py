"""Mixtures of Gaussians: the smallest world in which a point can be stored."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from memjax._core.errors import InputError
from memjax.densities._arrays import Mixed, Numbers, float_array, log_weights, mix
from memjax.densities._covariance import Covariance, covariance_from
from memjax.densities.density import Density, Parts, Posterior
from memjax.densities.gaussian import Gaussian


class GaussianMixture(Density):
    """sum_k w_k N(mean_k, covariance_k), smoothed by noise: covariance_k + sigma^2 I.

    With the components' scores s_k, Hessians H_k and posterior weights r_k(x), in nats and over
    flattened x::

        s = sum_k r_k s_k
        H = sum_k r_k [H_k + (s_k - s) (s_k - s)^T]

    Deviations from the mean are squared, never a difference of squares taken. A component with
    zero covariance is a stored point. Every quantity costs K times that of one ``Gaussian``; all
    components are held at once (for many points use ``Empirical``). float32 log-densities of
    components carry a relative error of 1e-7, which at d = 3,072 makes posterior odds uncertain
    by about 1e-3.

    Args:
        weights: K positive numbers that sum to one.
        means: floating-point ``[K, *event_shape]``; its dtype is the density's.
        covariances: a number, ``[K]`` variances, ``[K, *event_shape]`` variances per coordinate,
            or ``[K, d, d]`` matrices.

    Raises:
        InputError: an array is not floating point or not finite, shapes do not fit, weights are
            not positive or do not sum to one, or a matrix is not symmetric and positive
            semi-definite.

    >>> pair = GaussianMixture([0.5, 0.5], jnp.array([[-2.0], [2.0]]), 1.0)
    >>> float(pair.score(jnp.zeros(1), 0.0)[0]), float(pair.laplacian(jnp.zeros(1), 0.0))
    (0.0, 3.0)
    """

    log_weights: Float[Array, " k"]
    means: Float[Array, "k ..."]
    covariances: Covariance

    def __init__(self, weights: Numbers, means: Numbers, covariances: Numbers):
        self.means = float_array("means", means)
        if self.means.ndim == 0 or self.means.shape[0] == 0:
            raise InputError(f"means: expected one row a component, got {list(self.means.shape)}")
        num, *event_shape = self.means.shape
        self.log_weights = log_weights(weights, num, self.dtype)
        self.covariances = covariance_from(
            "covariances", covariances, tuple(event_shape), self.dtype, num
        )

    @property
    def weights(self) -> Float[Array, " k"]:
        """Prior probabilities of the components."""
        return jnp.exp(self.log_weights)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one mean."""
        return self.means.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Type of the means."""
        return self.means.dtype

    def _each(self, f: Callable[[Gaussian], Any]) -> Any:
        """Apply f to every component."""

        def component(mean, covariance):
            return f(Gaussian(mean, covariance))

        return jax.vmap(component)(self.means, self.covariances)

    def _log_joint(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, " k"]:
        return self.log_weights + self._each(lambda g: g._log_prob(x, sigma))

    def _mixed_score(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Mixed:
        return mix(self._log_joint(x, sigma), self._each(lambda g: g._score(x, sigma)))

    def _log_prob(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, ""]:
        return jax.nn.logsumexp(self._log_joint(x, sigma))

    def _score(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, " d"]:
        return self._mixed_score(x, sigma).mean

    def _hessian(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, "d d"]:
        mixed = self._mixed_score(x, sigma)
        within = self._each(lambda g: g._hessian(x, sigma))
        return jnp.tensordot(mixed.weights, within, 1, precision="highest") + mixed.spread()

    def _parts(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Parts:
        mixed = self._mixed_score(x, sigma)
        score = mixed.mean
        laplacian = self._each(lambda g: g._laplacian(x, sigma))
        curvature = self._each(lambda g: g._curvature(score, sigma))
        along = jnp.matmul(mixed.deviations, score, precision="highest")
        return Parts(
            score,
            jnp.sum(mixed.weights * laplacian) + mixed.total_spread(),
            # In this order: the square of a component without weight may overflow.
            jnp.sum(mixed.weights * curvature + mixed.weights * along * along),
        )

    def _posterior(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Posterior:
        mean, within = self._each(lambda g: g._posterior(x, sigma))
        mixed = mix(self._log_joint(x, sigma), mean)
        within = jnp.tensordot(mixed.weights, within, 1, precision="highest")
        return Posterior(mixed.mean, within + mixed.spread())

    def _effective_dimension(
        self, x: Float[Array, " d"], sigma: Float[Array, ""]
    ) -> Float[Array, ""]:
        # sigma (s_k - s) is the deviation of posterior means over sigma, and finite at sigma = 0.
        mixed = self._mixed_score(x, sigma)
        within = self._each(lambda g: g._effective_dimension(x, sigma))
        between = jnp.sum((sigma * mixed.deviations) ** 2, axis=1)
        return jnp.sum(mixed.weights * (within + between))

    def _sample(self, key: PRNGKeyArray, num: int, sigma: Float[Array, ""]) -> Float[Array, "n d"]:
        choice_key, noise_key = jax.random.split(key)
        chosen = jax.random.categorical(choice_key, self.log_weights, shape=(num,))

        def draw(index, row_key):
            pick = jax.tree.map(lambda leaf: leaf[index], (self.means, self.covariances))
            return Gaussian(*pick)._sample(row_key, 1, sigma)[0]

        return jax.vmap(draw)(chosen, jax.random.split(noise_key, num))
