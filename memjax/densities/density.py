"""What every exact density offers, checked and reshaped in one place."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from memjax._core.errors import InputError
from memjax._core.p_laplace import p_laplacian_from_parts

Sigma = float | int | Float[Array, ""]
Condition = int | Int[Array, ""] | None


class Posterior(NamedTuple):
    """Mean and covariance of the clean x0 given its noisy version x.

    Attributes:
        mean: E[x0 | x], in the shape of x: what an optimal denoiser returns.
        covariance: Cov[x0 | x] over flattened x0, symmetric and positive semi-definite.
    """

    mean: Float[Array, "..."]
    covariance: Float[Array, "d d"]


class Parts(NamedTuple):
    """What a p-Laplacian is made of: s, tr H and s^T H s."""

    score: Float[Array, " d"]
    laplacian: Float[Array, ""]
    curvature: Float[Array, ""]


class Density(eqx.Module):
    """A density p of clean data x0 whose noisy versions are known in closed form.

    Everything is about p_sigma, the density of x = x0 + sigma n with n ~ N(0, I), at any
    sigma >= 0 (sigma > 0 where p itself has no density). Closed forms, not automatic
    differentiation. A density is an equinox Module, hence a pytree whose arrays are leaves:
    pass it to a jitted function as an argument. It is callable as a score,
    ``density(x, sigma, condition)``, and so stands wherever a network's score does.

    x has the shape ``event_shape`` the density was built with and the density's dtype; matrices
    are over flattened x. ``sigma`` is in the units of x, a number or a traced scalar.
    ``condition`` is for ``ConditionalMixture``; elsewhere only None is accepted.
    Under ``jit`` nothing raises. Where p_sigma has no density (sigma = 0 and a singular
    covariance) results are NaN or infinite.

    All methods raise ``InputError`` if x differs from the density in shape or dtype, if sigma is a
    negative or NaN number, or if the condition is not one the density knows.
    """

    @property
    @abc.abstractmethod
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample x."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Floating-point type of x and of every result."""

    def __call__(
        self, x: Float[Array, "..."], sigma: Sigma, condition: Condition = None
    ) -> Float[Array, "..."]:
        """The same as ``score``."""
        return self.score(x, sigma, condition)

    def log_prob(
        self, x: Float[Array, "..."], sigma: Sigma, condition: Condition = None
    ) -> Float[Array, ""]:
        """Log-density log p_sigma(x), in nats.

        Args:
            x: point, of ``event_shape``.
            sigma: noise level >= 0.
            condition: class label or None.

        Returns:
            Log-density with respect to Lebesgue measure on R^d.
        """
        density, flat, sigma = self._enter(x, sigma, condition)
        return density._log_prob(flat, sigma)

    def score(
        self, x: Float[Array, "..."], sigma: Sigma, condition: Condition = None
    ) -> Float[Array, "..."]:
        """Score s = grad_x log p_sigma(x).

        By Tweedie's formula s = (E[x0|x] - x) / sigma^2.

        Args:
            x: point, of ``event_shape``.
            sigma: noise level >= 0.
            condition: class label or None.

        Returns:
            The score, with the shape and dtype of x, in 1 / (units of x).

        References:
            Efron (2011), Tweedie's formula and selection bias, eq. 1.4.
        """
        density, flat, sigma = self._enter(x, sigma, condition)
        return density._score(flat, sigma).reshape(x.shape)

    def hessian(
        self, x: Float[Array, "..."], sigma: Sigma, condition: Condition = None
    ) -> Float[Array, "d d"]:
        """Hessian H = Hess_x log p_sigma(x) = ds/dx, as a dense matrix over flattened x.

        By the second-order Tweedie formula H = (Cov[x0|x] / sigma^2 - I) / sigma^2, so the
        retained-variance operator M = I + sigma^2 H is Cov[x0|x] / sigma^2. d^2 memory.

        Args:
            x: point, of ``event_shape``.
            sigma: noise level >= 0.
            condition: class label or None.

        Returns:
            Symmetric matrix, ``H[i, j] = ds_i/dx_j``.

        References:
            Meng et al. (2021), Estimating high order gradients of the data distribution by
            denoising, arXiv:2111.04726, theorem 1.
        """
        density, flat, sigma = self._enter(x, sigma, condition)
        return density._hessian(flat, sigma)

    def laplacian(
        self, x: Float[Array, "..."], sigma: Sigma, condition: Condition = None
    ) -> Float[Array, ""]:
        """Laplacian tr Hess log p_sigma(x) = div s, without building the Hessian.

        Equal to (effective_dimension - d) / sigma^2; -d / sigma^2 at a stored point.

        Args:
            x: point, of ``event_shape``.
            sigma: noise level >= 0.
            condition: class label or None.

        Returns:
            The Laplacian of log p_sigma, in 1 / (units of x)^2.
        """
        density, flat, sigma = self._enter(x, sigma, condition)
        return density._laplacian(flat, sigma)

    def p_laplacian(
        self,
        x: Float[Array, "..."],
        sigma: Sigma,
        p: float | int,
        condition: Condition = None,
        *,
        normalized: bool = False,
    ) -> Float[Array, ""]:
        """p-Laplacian of log p_sigma: div(|s|^(p-2) s).

        ``|s|^(p-2) [tr H + (p-2) s^T H s / |s|^2]``; s^T H s for p = infinity. Negative at
        attractors (modes, stored points). p = 2 is the Laplacian, p = 1 minus the sum of the
        principal curvatures of the level set. With ``normalized`` the game-theoretic variant
        ``(1/p) [tr H + (p-2) s^T H s / |s|^2]``, which is s^T H s / |s|^2 at infinity.

        Args:
            x: point, of ``event_shape``.
            sigma: noise level >= 0.
            p: exponent, 1 <= p <= infinity. Static.
            condition: class label or None.
            normalized: the game-theoretic variant. Static.

        Returns:
            The value. NaN at a zero of the score if p < 2 (or normalized with p other than 2),
            where no limit exists; 0 there if p > 2.

        Raises:
            InputError: p is below 1 or not a number.

        References:
            Brokman et al. (2025), arXiv:2505.08246.
        """
        density, flat, sigma = self._enter(x, sigma, condition)
        score, laplacian, curvature = density._parts(flat, sigma)
        return p_laplacian_from_parts(
            jnp.sum(score**2), laplacian, curvature, p, normalized=normalized
        )

    def posterior(
        self, x: Float[Array, "..."], sigma: Sigma, condition: Condition = None
    ) -> Posterior:
        """Mean and covariance of the clean x0 given x = x0 + sigma n.

        Computed as moments, not as x + sigma^2 s and sigma^2 (I + sigma^2 H), which cancel:
        the first at large sigma, the second at small. d^2 memory for the covariance.

        Args:
            x: point, of ``event_shape``.
            sigma: noise level >= 0.
            condition: class label or None.

        Returns:
            ``Posterior(mean, covariance)``, in units of x and their square.
        """
        density, flat, sigma = self._enter(x, sigma, condition)
        mean, covariance = density._posterior(flat, sigma)
        return Posterior(mean.reshape(x.shape), covariance)

    def effective_dimension(
        self, x: Float[Array, "..."], sigma: Sigma, condition: Condition = None
    ) -> Float[Array, ""]:
        """d_eff = tr Cov[x0|x] / sigma^2 = d + sigma^2 tr H, without cancellation.

        Zero at a point that stands alone at this noise level (stored), about the local dimension
        of the data elsewhere, possibly above d between modes.

        Args:
            x: point, of ``event_shape``.
            sigma: noise level >= 0.
            condition: class label or None.

        Returns:
            The effective dimension, dimensionless and >= 0.
        """
        density, flat, sigma = self._enter(x, sigma, condition)
        return density._effective_dimension(flat, sigma)

    def sample(
        self, key: PRNGKeyArray, num: int, sigma: Sigma, condition: Condition = None
    ) -> Float[Array, "n ..."]:
        """Draw from p_sigma.

        Args:
            key: random key.
            num: number of samples. Static.
            sigma: noise level >= 0; 0 for clean data.
            condition: class label or None.

        Returns:
            ``[num, *event_shape]`` independent samples.
        """
        density = self._given(condition)
        flat = density._sample(key, num, self._check_sigma(sigma))
        return flat.reshape(num, *self.event_shape)

    def _check_sigma(self, sigma: Sigma) -> Float[Array, ""]:
        if isinstance(sigma, float | int) and not sigma >= 0:
            raise InputError(f"sigma: expected a number >= 0, got {sigma}")
        return jnp.asarray(sigma, self.dtype)

    def _enter(
        self, x: Float[Array, "..."], sigma: Sigma, condition: Condition
    ) -> tuple["Density", Float[Array, " d"], Float[Array, ""]]:
        """The density given the condition, x flattened and sigma as an array."""
        x = jnp.asarray(x)
        if x.shape != self.event_shape or x.dtype != self.dtype:
            raise InputError(
                f"x: expected {self.dtype}{list(self.event_shape)} like the density, "
                f"got {x.dtype}{list(x.shape)}"
            )
        return self._given(condition), x.reshape(-1), self._check_sigma(sigma)

    def _given(self, condition: Condition) -> "Density":
        """The unconditional density that p(. | condition) is."""
        if condition is not None:
            name = type(self).__name__
            raise InputError(f"condition: expected None for {name}, which has no classes")
        return self

    # What a density must know, on flattened x and with sigma an array of the density's dtype.

    @abc.abstractmethod
    def _log_prob(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, ""]: ...

    @abc.abstractmethod
    def _score(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, " d"]: ...

    @abc.abstractmethod
    def _hessian(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, "d d"]: ...

    @abc.abstractmethod
    def _parts(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Parts: ...

    def _laplacian(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Float[Array, ""]:
        return self._parts(x, sigma).laplacian

    @abc.abstractmethod
    def _posterior(self, x: Float[Array, " d"], sigma: Float[Array, ""]) -> Posterior: ...

    @abc.abstractmethod
    def _effective_dimension(
        self, x: Float[Array, " d"], sigma: Float[Array, ""]
    ) -> Float[Array, ""]: ...

    @abc.abstractmethod
    def _sample(
        self, key: PRNGKeyArray, num: int, sigma: Float[Array, ""]
    ) -> Float[Array, "n d"]: ...
