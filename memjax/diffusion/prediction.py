"""The door: what a network predicts, in its own convention, becomes the one score."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from memjax._core.errors import InputError
from memjax.diffusion.adapters import Scalar, callable_pytree
from memjax.diffusion.schedule import Schedule

PREDICTIONS = ("epsilon", "v_prediction", "sample", "denoiser", "flow", "score")


class EDMPreconditioned(eqx.Module):
    """A raw network F with the preconditioning of EDM: a denoiser D(x, sigma, condition).

        D = c_skip x + c_out F(c_in x, c_noise, condition)
        c_skip = d^2 / (sigma^2 + d^2)       c_out = sigma d / sqrt(sigma^2 + d^2)
        c_in   = 1 / sqrt(sigma^2 + d^2)     c_noise = log(sigma) / 4

    with d the standard deviation of the data. Use it with ``prediction="denoiser"`` and
    ``schedule=VarianceExploding(...)``.

    Args:
        network: F, a callable pytree on one sample whose output has the shape of x.
        data_std: d > 0, static.

    Raises:
        InputError: ``data_std`` is not positive, or ``network`` not callable.

    References:
        Karras, Aittala, Aila, Laine (2022), arXiv:2206.00364, Table 1 and equation 7.
    """

    network: Callable
    data_std: float = eqx.field(static=True)

    def __init__(self, network: Callable, data_std: float):
        if not 0 < data_std < float("inf"):
            raise InputError(f"data_std: expected a positive number, got {data_std}")
        self.network = callable_pytree(network, "network")
        self.data_std = float(data_std)

    def __call__(
        self,
        x: Float[Array, "..."],
        sigma: Scalar,
        condition: PyTree = None,
    ) -> Float[Array, "..."]:
        """D(x, sigma, condition), like x. One evaluation of the network."""
        sigma = jnp.asarray(sigma, x.dtype)
        total = sigma**2 + self.data_std**2
        raw = self._raw(x, sigma, condition)
        return (self.data_std**2 / total) * x + (sigma * self.data_std / jnp.sqrt(total)) * raw

    def noise(
        self,
        x: Float[Array, "..."],
        sigma: Scalar,
        condition: PyTree = None,
    ) -> Float[Array, "..."]:
        """The noise (x - D)/sigma = sigma/(sigma^2 + d^2) x - d/sqrt(sigma^2 + d^2) F.

        Formed without the difference x - D, which loses log2(|x|/(sigma |noise|)) bits.
        """
        sigma = jnp.asarray(sigma, x.dtype)
        total = sigma**2 + self.data_std**2
        raw = self._raw(x, sigma, condition)
        return (sigma / total) * x - (self.data_std / jnp.sqrt(total)) * raw

    def _raw(self, x, sigma, condition):
        c_in = 1 / jnp.sqrt(sigma**2 + self.data_std**2)
        return _like(self.network(c_in * x, jnp.log(sigma) / 4, condition), x)


class PredictionScore(eqx.Module):
    """The score of a network trained under any schedule to predict any of the usual targets.

        s(x, sigma, condition) = grad_x log p_sigma(x | condition),    x = x0 + sigma n

    With t = time(sigma), a = alpha(t) and x_t = a x the network is called as
    ``network(x_t, network_time(t), condition)``, and its output becomes the noise n_hat with
    s = -n_hat / sigma:

    ==================  =====================================  ==============================
    prediction          the network's target                   n_hat
    ==================  =====================================  ==============================
    ``"epsilon"``       n                                      output
    ``"v_prediction"``  a n - sigma_t x0                       (output/a + sigma x)/(1 + sigma^2)
    ``"sample"``        x0                                     (x - output)/sigma
    ``"denoiser"``      x0, a denoiser D of EDM                (x - output)/sigma
    ``"flow"``          n - x0                                 (x + output)/(1 + sigma)
    ``"score"``         -n/sigma_t, the score at x_t           -sigma_t output
    ==================  =====================================  ==============================

    These are the usual conversions divided through by a: no difference of nearly equal images is
    formed where algebra can avoid it. It cannot where the output itself carries the clean image
    and rounds the noise away: a relative error of about eps |x|/(sigma |n_hat|) remains for
    ``"sample"`` and ``"denoiser"``, and eps |x|/((1 + sigma) |n_hat|) for ``"flow"``, eps being
    the dtype's rounding. An ``EDMPreconditioned`` network is asked for its noise instead of its
    denoiser and has no such loss.

    Made by ``from_prediction``. The network's weights are the leaves of this pytree.

    Attributes:
        network: callable pytree ``(x_t, network_time, condition) -> output`` on one sample.
        prediction: its target. Static.
        schedule: how noise was added in training. Static.
    """

    network: Callable
    prediction: str = eqx.field(static=True)
    schedule: Schedule = eqx.field(static=True)

    def __call__(
        self,
        x: Float[Array, "..."],
        sigma: Scalar,
        condition: PyTree = None,
    ) -> Float[Array, "..."]:
        """s(x, sigma, condition), like x in shape and dtype. One evaluation of the network.

        Args:
            x: one sample in EDM coordinates, x = x_t / alpha_t.
            sigma: noise level, in (0, infinity); outside [sigma_min, sigma_max] of the schedule
                the network is asked for times it was not trained for.
            condition: passed to the network as it is.

        Raises:
            InputError: x is not floating point, or the network's output has not x's shape.
        """
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"x: expected a floating-point array, got dtype {x.dtype}")
        sigma = jnp.asarray(sigma, x.dtype)
        if self.prediction == "denoiser" and isinstance(self.network, EDMPreconditioned):
            return -self.network.noise(x, sigma, condition) / sigma
        alpha = self.schedule.alpha_at(sigma)
        time = self.schedule.network_time(self.schedule.time(sigma))
        out = _like(self.network(alpha * x, time, condition), x)
        match self.prediction:
            case "epsilon":
                noise = out
            case "v_prediction":
                noise = (out / alpha + sigma * x) / (1 + sigma**2)
            case "flow":
                noise = (x + out) / (1 + sigma)
            case "score":
                noise = -alpha * sigma * out
            case _:
                noise = (x - out) / sigma
        return -noise / sigma


def _like(out: Array, x: Array) -> Array:
    """The network's output in x's dtype; its shape must already be x's."""
    if out.shape != x.shape:
        raise InputError(
            f"network: expected an output of the shape of x, {x.shape}, got {out.shape}"
        )
    return out.astype(x.dtype)


def from_prediction(network: Callable, *, prediction: str, schedule: Schedule) -> PredictionScore:
    """Turn a network into a score in EDM coordinates (see ``PredictionScore`` for the formulas).

    Args:
        network: callable pytree ``(x_t, network_time, condition) -> output`` on one sample, like
            ``LinenNetwork``, ``NNXNetwork``, ``EDMPreconditioned`` or an Equinox module.
        prediction: ``"epsilon"``, ``"v_prediction"``, ``"sample"``, ``"denoiser"``, ``"flow"`` or
            ``"score"``.
        schedule: the schedule the network was trained under.

    Returns:
        The score, a callable pytree ``(x, sigma, condition=None) -> s``.

    Raises:
        InputError: unknown prediction, or the network is not callable.

    >>> import jax.numpy as jnp
    >>> from memjax.diffusion.schedule import ContinuousVP
    >>> # data x0 = 0: x_t = sigma_t n, so the noise is x_t / sigma_t
    >>> schedule = ContinuousVP()
    >>> score = from_prediction(
    ...     lambda x, t, condition: x / schedule.sigma_t(t), prediction="epsilon", schedule=schedule
    ... )
    >>> round(float(score(jnp.array([3.0]), 0.5)[0]), 4)
    -12.0

    References:
        Ho, Jain, Abbeel (2020), arXiv:2006.11239, section 3.2 (noise); Salimans, Ho (2022),
        arXiv:2202.00512, section 4 (v); Karras et al. (2022), arXiv:2206.00364, equation 3
        (denoiser); Esser et al. (2024), arXiv:2403.03206, section 2 (flow).
    """
    if prediction not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise InputError(f"prediction: expected one of {known}, got {prediction!r}")
    return PredictionScore(callable_pytree(network, "network"), prediction, schedule)
