"""One Gaussian: every quantity exact, the probability flow included."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from memjax.densities._arrays import Numbers, float_array
from memjax.densities._covariance import Covariance, covariance_from, low_rank_covariance
from memjax.densities.density import Density, Parts, Posterior, Sigma


class FlowMap(NamedTuple):
    """Where the probability flow carries a point, and how it stretches volume there.

    Attributes:
        point: x(sigma1), in the shape of x.
        log_det: log |det dx(sigma1)/dx(sigma0)|, in nats: the log volume growth.
    """

    point: Float[Array, "..."]
    log_det: Float[Array, ""]


class Gaussian(Density):
    """N(mean, covariance), smoothed by noise: p_sigma = N(mean, covariance + sigma^2 I).

    The covariance is decomposed once, in float64 on the host; afterwards every quantity costs
    O(d) (isotropic, diagonal), O(d r) (rank r plus isotropic, see ``Gaussian.low_rank``) or O(d^2)
    (full), at every sigma.

    Args:
        mean: floating-point array of the event shape; its dtype is the density's.
        covariance: variance of every coordinate (a number), one variance per coordinate (shape of
            the mean), or a symmetric positive semi-definite ``[d, d]`` matrix over the flattened
            event. Zero variances are allowed: the density then exists for sigma > 0 only.

    Raises:
        InputError: an array is not floating point or not finite, shapes do not fit, the matrix is
            not symmetric or not positive semi-definite, or is a traced value.

    >>> density = Gaussian(jnp.zeros(2), 0.75)
    >>> density.score(jnp.array([1.0, -2.0]), 0.5).tolist()  # -x / (0.75 + 0.25)
    [-1.0, 2.0]
    """

    mean: Float[Array, "..."]
    covariance: Covariance

    def __init__(self, mean: Numbers, covariance: Numbers | Covariance):
        self.mean = float_array("mean", mean)
        if not isinstance(covariance, Covariance):
            covariance = covariance_from("covariance", covariance, self.mean.shape, self.mean.dtype)
        self.covariance = covariance

    @classmethod
    def low_rank(cls, mean: Numbers, factor: Numbers, variance: Numbers) -> "Gaussian":
        """N(mean, F F^T + variance I): a flat r-dimensional sheet of data, slightly thickened.

        Args:
            mean: floating-point array of the event shape.
            factor: F, of shape ``[*event_shape, r]``.
            variance: variance >= 0 of every coordinate on top of F F^T, a number.

        Returns:
            The Gaussian; each quantity costs O(d r), and no d x d matrix is built unless asked for.

        Raises:
            InputError: as for ``Gaussian``.

        References:
            Tipping and Bishop (1999), Probabilistic principal component analysis.
        """
        center = float_array("mean", mean)
        return cls(center, low_rank_covariance(factor, variance, center.shape, center.dtype))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the mean."""
        return self.mean.shape

    @property
    def dtype(self) -> np.dtype:
        """Type of the mean."""
        return self.mean.dtype

    def flow(self, x: Float[Array, "..."], sigma0: Sigma, sigma1: Sigma) -> FlowMap:
        """Carry x from noise sigma0 to sigma1 along the probability flow dx/dsigma = -sigma s.

        The flow is linear, x(sigma1) = mean + [(S + sigma1^2 I) (S + sigma0^2 I)^-1]^(1/2)
        (x - mean) for a covariance S, and transports p_sigma0 to p_sigma1::

            log p_sigma0(x) = log p_sigma1(x(sigma1)) + log_det

        Args:
            x: point at noise sigma0, of ``event_shape``.
            sigma0: noise level x stands at, >= 0 (> 0 if the covariance is singular).
            sigma1: noise level to reach, >= 0, above or below sigma0.

        Returns:
            ``FlowMap(point, log_det)``. For sigma1 > sigma0, ``log_det`` is at most
            d log(sigma1/sigma0), reached where the covariance is zero.

        Raises:
            InputError: as for ``score``.

        References:
            Song et al. (2021), Score-based generative modeling through SDEs, arXiv:2011.13456,
            section 4.3; Karras et al. (2022), arXiv:2206.00364, eq. 1.
        """
        _, flat, sigma0 = self._enter(x, sigma0, None)
        sigma1 = self._check_sigma(sigma1)

        def stretch(variances):
            return jnp.sqrt((variances + sigma1**2) / (variances + sigma0**2))

        def growth(variances):
            # log1p: close noise levels would cancel in a logarithm of the ratio.
            gained = (sigma1 - sigma0) * (sigma1 + sigma0)
            return jnp.log1p(gained / (variances + sigma0**2)) / 2

        point = self._center() + self.covariance.apply(stretch, flat - self._center())
        return FlowMap(point.reshape(x.shape), self.covariance.trace(growth))

    def _center(self) -> Float[Array, " d"]:
        return self.mean.reshape(-1)

    def _log_prob(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, ""]:
        distance = self.covariance.quadratic(lambda v: 1 / (v + sigma**2), x - self._center())
        log_det = self.covariance.trace(lambda v: jnp.log(v + sigma**2))
        return -(distance + log_det + x.size * float(np.log(2 * np.pi))) / 2

    def _score(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, " d"]:
        return self.covariance.apply(lambda v: -1 / (v + sigma**2), x - self._center())

    def _hessian(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, "d d"]:
        return self.covariance.dense(lambda v: -1 / (v + sigma**2))

    def _curvature(self, v: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, ""]:
        """v^T H v."""
        return self.covariance.quadratic(lambda u: -1 / (u + sigma**2), v)

    def _laplacian(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, ""]:
        return self.covariance.trace(lambda v: -1 / (v + sigma**2))

    def _parts(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Parts:
        score = self._score(x, sigma)
        return Parts(score, self._laplacian(x, sigma), self._curvature(score, sigma))

    def _posterior(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Posterior:
        center = self._center()
        mean = center + self.covariance.apply(lambda v: v / (v + sigma**2), x - center)
        return Posterior(mean, self.covariance.dense(lambda v: sigma**2 * (v / (v + sigma**2))))

    def _effective_dimension(
        self, x: Float[Array, " d"], sigma: Float[Array, ""]
    ) -> Float[Array, ""]:
        return self.covariance.trace(lambda v: v / (v + sigma**2))

    def _sample(self, key: PRNGKeyArray, num: int, sigma: Float[Array, ""]) -> Float[Array, "n d"]:
        noise = jax.random.normal(key, (num, self.mean.size), self.dtype)

        def color(row):
            return self.covariance.apply(lambda v: jnp.sqrt(v + sigma**2), row)

        return self._center()[None] + jax.vmap(color)(noise)
