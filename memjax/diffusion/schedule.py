"""Noise schedules: how a network was trained, in its own time, and the way back from sigma.

A forward process x_t = alpha(t) x0 + sigma_t(t) n becomes x = x0 + sigma n by x = x_t / alpha and
sigma = sigma_t / alpha. A schedule knows these functions of time, their inverse, and alpha as a
function of sigma, in forms that keep full relative precision at both ends. It is static: a frozen,
hashable dataclass of numbers. Tables are rebuilt in float64 from these numbers and cached.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import expit

from memjax._core.errors import InputError

Scalar = float | Float[Array, "..."]
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace")
MAX_TABLE = 1_000_000
"""Most betas in a table: a schedule from a file of unknown origin must not exhaust memory."""


class Schedule(abc.ABC):
    """How noise grows with the time t that a network was trained with.

    All functions are elementwise, traceable and differentiable, and return the dtype they get
    (JAX's default for a Python float). Times and noise levels outside the schedule's range are
    extrapolated, never clipped: the range is stated by ``sigma_min`` and ``sigma_max``.
    ``time(sigma(t)) == t`` and ``sigma(time(sigma)) == sigma`` up to a few roundings of either
    side: where sigma runs fast in t (the noisy end) it is t's own rounding that limits sigma.
    """

    kind: ClassVar[str]

    @abc.abstractmethod
    def sigma(self, t: Scalar) -> Float[Array, "..."]:
        """The noise-to-signal ratio sigma_t(t) / alpha(t), increasing in t."""

    @abc.abstractmethod
    def time(self, sigma: Scalar) -> Float[Array, "..."]:
        """The t with noise-to-signal ratio sigma, the inverse of ``sigma``."""

    @abc.abstractmethod
    def alpha_at(self, sigma: Scalar) -> Float[Array, "..."]:
        """The signal's scale alpha at noise-to-signal ratio sigma: ``alpha(time(sigma))``."""

    @property
    @abc.abstractmethod
    def sigma_min(self) -> float:
        """Smallest noise-to-signal ratio of training, > 0."""

    @property
    @abc.abstractmethod
    def sigma_max(self) -> float:
        """Largest finite noise-to-signal ratio of training."""

    def alpha(self, t: Scalar) -> Float[Array, "..."]:
        """The signal's scale in x_t = alpha x0 + sigma_t n."""
        return self.alpha_at(self.sigma(t))

    def sigma_t(self, t: Scalar) -> Float[Array, "..."]:
        """The noise's scale in x_t = alpha x0 + sigma_t n."""
        sigma = self.sigma(t)
        return sigma * self.alpha_at(sigma)

    def network_time(self, t: Scalar) -> Float[Array, "..."]:
        """What the network is fed at time t: t itself, or t times ``time_scale``."""
        return _array(t)

    def to_config(self) -> dict[str, Any]:
        """A dictionary of JSON values from which ``schedule_from_config`` rebuilds the schedule."""
        fields = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return {"schedule": self.kind, **listed}


@dataclasses.dataclass(frozen=True)
class VarianceExploding(Schedule):
    """Variance exploding, the convention of EDM and of memjax: alpha = 1, sigma_t = t = sigma.

    Args:
        sigma_min: smallest noise level of training, > 0.
        sigma_max: largest.

    Raises:
        InputError: not 0 < sigma_min <= sigma_max < infinity.

    >>> float(VarianceExploding(0.002, 80.0).time(0.5))
    0.5

    References:
        Karras, Aittala, Aila, Laine (2022), arXiv:2206.00364, Table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    kind: ClassVar[str] = "variance_exploding"

    def __post_init__(self):
        _require_range("sigma_min, sigma_max", self.sigma_min, self.sigma_max)

    def sigma(self, t: Scalar) -> Float[Array, "..."]:
        """The noise level at time t is t."""
        return _array(t)

    def time(self, sigma: Scalar) -> Float[Array, "..."]:
        """The time at noise level sigma is sigma."""
        return _array(sigma)

    def alpha_at(self, sigma: Scalar) -> Float[Array, "..."]:
        """One."""
        return jnp.ones_like(_array(sigma))


@dataclasses.dataclass(frozen=True)
class _TimeRange(Schedule):
    """A schedule in continuous time, used between t_min and t_max."""

    t_min: float = 1e-3
    t_max: float = 1.0
    time_scale: float = 1.0

    def __post_init__(self):
        _require_range("t_min, t_max", self.t_min, self.t_max)
        if not 0 < self.time_scale < np.inf:
            raise InputError(f"time_scale: expected a positive number, got {self.time_scale}")

    def network_time(self, t: Scalar) -> Float[Array, "..."]:
        """``time_scale`` times t."""
        return _array(t) * self.time_scale

    @property
    def sigma_min(self) -> float:
        """Sigma at t_min."""
        return self._sigma_float64(self.t_min)

    @property
    def sigma_max(self) -> float:
        """Sigma at t_max."""
        return self._sigma_float64(self.t_max)

    @abc.abstractmethod
    def _sigma_float64(self, t: float) -> float: ...


@dataclasses.dataclass(frozen=True)
class FlowMatching(_TimeRange):
    """Flow matching on straight lines (rectified flow): alpha = 1 - t, sigma_t = t.

    sigma = t / (1 - t) is infinite at t = 1, where there is no signal left.

    Args:
        t_min: smallest time used, > 0.
        t_max: largest time used, < 1.
        time_scale: what t is multiplied by before the network sees it (1,000 for SD 3 and Flux).

    Raises:
        InputError: not 0 < t_min <= t_max < 1, or ``time_scale`` not positive.

    >>> float(FlowMatching().sigma(0.75))
    3.0

    References:
        Lipman et al. (2023), arXiv:2210.02747; Liu, Gong, Liu (2022), arXiv:2209.03003;
        Esser et al. (2024), arXiv:2403.03206.
    """

    t_max: float = 0.999
    kind: ClassVar[str] = "flow_matching"

    def __post_init__(self):
        super().__post_init__()
        if self.t_max >= 1:
            raise InputError(f"t_max: expected a time below 1, got {self.t_max}")

    def sigma(self, t: Scalar) -> Float[Array, "..."]:
        """The ratio t / (1 - t)."""
        t = _array(t)
        return t / (1 - t)

    def time(self, sigma: Scalar) -> Float[Array, "..."]:
        """The ratio sigma / (1 + sigma), written to hold at sigma = infinity too."""
        return 1 / (1 + 1 / _array(sigma))

    def alpha_at(self, sigma: Scalar) -> Float[Array, "..."]:
        """1 / (1 + sigma)."""
        return 1 / (1 + _array(sigma))

    def _sigma_float64(self, t: float) -> float:
        return t / (1 - t)


@dataclasses.dataclass(frozen=True)
class _BetaIntegral(_TimeRange):
    """The integral B(t) = beta_min t + (beta_max - beta_min) t^2 / 2 of a linear beta(t)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        _require_range("beta_min, beta_max", self.beta_min, self.beta_max)

    def _integral(self, t: Any) -> Any:
        return t * (self.beta_min + (self.beta_max - self.beta_min) / 2 * t)

    def _time_at(self, integral: Float[Array, "..."]) -> Float[Array, "..."]:
        # The root of the quadratic without the cancellation of the textbook formula at B -> 0.
        slope = 2 * (self.beta_max - self.beta_min)
        return 2 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + slope * integral))


@dataclasses.dataclass(frozen=True)
class ContinuousVP(_BetaIntegral):
    """Variance preserving in continuous time, with beta(t) linear on [0, 1].

        alpha = exp(-B/2), sigma_t^2 = 1 - exp(-B), B(t) = beta_min t + (beta_max - beta_min) t^2/2

    so that sigma = sqrt(exp(B) - 1).

    Args:
        t_min: smallest time used, > 0.
        t_max: largest time used.
        time_scale: what t is multiplied by before the network sees it (999 in ``score_sde``).
        beta_min: beta(0) > 0.
        beta_max: beta(1) >= beta_min.

    Raises:
        InputError: a range is not positive or out of order, or ``time_scale`` not positive.

    >>> round(float(ContinuousVP().sigma(1.0)), 1)
    152.2

    References:
        Song et al. (2021), arXiv:2011.13456, Appendices B and C.
    """

    kind: ClassVar[str] = "continuous_vp"

    def sigma(self, t: Scalar) -> Float[Array, "..."]:
        """sqrt(exp(B) - 1)."""
        return jnp.sqrt(jnp.expm1(self._integral(_array(t))))

    def time(self, sigma: Scalar) -> Float[Array, "..."]:
        """The t with B(t) = log(1 + sigma^2)."""
        return self._time_at(jnp.log1p(_array(sigma) ** 2))

    def alpha_at(self, sigma: Scalar) -> Float[Array, "..."]:
        """1 / sqrt(1 + sigma^2)."""
        return _vp_alpha(sigma)

    def _sigma_float64(self, t: float) -> float:
        return float(np.sqrt(np.expm1(self._integral(t))))


@dataclasses.dataclass(frozen=True)
class SubVP(_BetaIntegral):
    """The sub-VP process: alpha = exp(-B/2), sigma_t = 1 - exp(-B), with B as in ContinuousVP.

    sigma = 2 sinh(B/2), and alpha = 2 / (sigma + sqrt(sigma^2 + 4)).

    Args:
        t_min: smallest time used, > 0.
        t_max: largest time used.
        time_scale: what t is multiplied by before the network sees it (999 in ``score_sde``).
        beta_min: beta(0) > 0.
        beta_max: beta(1) >= beta_min.

    Raises:
        InputError: a range is not positive or out of order, or ``time_scale`` not positive.

    >>> schedule = SubVP()
    >>> round(float(schedule.time(schedule.sigma(0.25))), 6)
    0.25

    References:
        Song et al. (2021), arXiv:2011.13456, Appendix B.
    """

    kind: ClassVar[str] = "sub_vp"

    def sigma(self, t: Scalar) -> Float[Array, "..."]:
        """2 sinh(B/2)."""
        return 2 * jnp.sinh(self._integral(_array(t)) / 2)

    def time(self, sigma: Scalar) -> Float[Array, "..."]:
        """The t with B(t) = 2 asinh(sigma/2)."""
        return self._time_at(2 * jnp.arcsinh(_array(sigma) / 2))

    def alpha_at(self, sigma: Scalar) -> Float[Array, "..."]:
        """2 / (sigma + sqrt(sigma^2 + 4))."""
        sigma = _array(sigma)
        return 2 / (sigma + jnp.sqrt(sigma**2 + 4))

    def _sigma_float64(self, t: float) -> float:
        return float(2 * np.sinh(self._integral(t) / 2))


@dataclasses.dataclass(frozen=True)
class DiscreteVP(Schedule):
    """Variance preserving with a table of betas: DDPM, Stable Diffusion and their kin.

        alpha_i^2 = prod_{j <= i} (1 - beta_j),    sigma_i^2 = (1 - alpha_i^2) / alpha_i^2

    Time is the index i = 0 ... N - 1, which the network is fed. Between two indices log(sigma) is
    linear in t. The parameters are named as in published ``scheduler_config.json`` files:

    - ``"linear"``: beta from beta_start to beta_end (Ho et al. 2020);
    - ``"scaled_linear"``: sqrt(beta) from sqrt(beta_start) to sqrt(beta_end) (Rombach et al. 2022);
    - ``"sigmoid"``: beta = beta_start + (beta_end - beta_start) S(v), v from -6 to 6, with
      S(v) = 1/(1 + exp(-v)) (Xu et al. 2022);
    - beta_i = min(1 - f((i+1)/N) / f(i/N), 0.999), in which beta_start and beta_end do not occur:
      ``"squaredcos_cap_v2"`` with f(u) = cos^2(pi/2 (u + 0.008)/1.008) (Nichol, Dhariwal 2021);
      ``"exp"`` with f(u) = exp(-12 u); ``"laplace"`` with f(u) = sqrt(S(l)) and
      l = -sgn(1/2 - u) log(1 - 2 |1/2 - u| + 1e-6) / 2 (Hang et al. 2024).

    With ``rescale_betas_zero_snr`` alpha is shifted and scaled so that the last one is zero (Lin
    et al. 2024, algorithm 1) and its sigma infinite. ``sigma_max`` is then the last finite one,
    and between the last two indices 1/sigma falls linearly to zero.

    Args:
        beta_schedule: which table.
        num_train_timesteps: N from 2 (3 with ``rescale_betas_zero_snr``) to 1,000,000.
        beta_start: beta_0.
        beta_end: beta_{N-1}.
        trained_betas: N betas to use instead of a named table.
        rescale_betas_zero_snr: end in pure noise.

    Raises:
        InputError: an unknown table, or betas outside (0, 1).

    Accuracy: tables are built in float64, with sums of log1p(-beta) instead of products.

    >>> schedule = DiscreteVP("scaled_linear", beta_start=0.00085, beta_end=0.012)
    >>> round(schedule.sigma_min, 4), round(schedule.sigma_max, 2)
    (0.0292, 14.61)

    References:
        Ho, Jain, Abbeel (2020), arXiv:2006.11239; Nichol, Dhariwal (2021), arXiv:2102.09672,
        equation 17; Rombach et al. (2022), arXiv:2112.10752; Xu et al. (2022),
        arXiv:2203.02923; Lin, Liu, Li, Yang (2024), arXiv:2305.08891; Hang et al. (2024),
        arXiv:2407.03297.
    """

    beta_schedule: str = "linear"
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    kind: ClassVar[str] = "discrete_vp"

    def __post_init__(self):
        if self.beta_schedule not in BETA_SCHEDULES:
            known = ", ".join(BETA_SCHEDULES)
            raise InputError(f"beta_schedule: expected one of {known}, got {self.beta_schedule!r}")
        least = 3 if self.rescale_betas_zero_snr else 2
        if not least <= self.num_train_timesteps <= MAX_TABLE:
            raise InputError(
                f"num_train_timesteps: expected {least} to {MAX_TABLE}, "
                f"got {self.num_train_timesteps}"
            )
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise InputError(
                f"trained_betas: expected num_train_timesteps = {self.num_train_timesteps} betas, "
                f"got {len(self.trained_betas)}"
            )
        betas = _betas(self)
        if not np.all((betas > 0) & (betas < 1)):
            raise InputError(
                f"betas: expected values in (0, 1), got {betas.min():g} to {betas.max():g}"
            )

    @property
    def sigma_min(self) -> float:
        """Sigma at index 0."""
        return float(_finite_sigmas(self)[0])

    @property
    def sigma_max(self) -> float:
        """Sigma at the last index, or at the last but one with ``rescale_betas_zero_snr``."""
        return float(_finite_sigmas(self)[-1])

    def sigma(self, t: Scalar) -> Float[Array, "..."]:
        """sigma_i (sigma_{i+1} / sigma_i)^(t - i), with i the index below t."""
        t = _array(t)
        nodes, log_steps = _tables(self, t.dtype)
        last = len(nodes) - 1
        i = jnp.clip(jnp.floor(t), 0, last - 1).astype(jnp.int32)
        inner = nodes[i] * jnp.exp((t - i.astype(t.dtype)) * log_steps[i])
        if not self.rescale_betas_zero_snr:
            return inner
        # The guard keeps the branch that is not taken finite, for the sake of derivatives.
        beyond = t > last
        return jnp.where(beyond, nodes[last] / (1 - jnp.where(beyond, t - last, 0)), inner)

    def time(self, sigma: Scalar) -> Float[Array, "..."]:
        """The real-valued index at which the table holds sigma."""
        sigma = _array(sigma)
        nodes, log_steps = _tables(self, sigma.dtype)
        last = len(nodes) - 1
        below = jnp.searchsorted(nodes, sigma, side="right", method="compare_all") - 1
        i = jnp.clip(below, 0, last - 1).astype(jnp.int32)
        # log(sigma / sigma_i) by log1p: neighbours in the table differ by little.
        inner = i.astype(sigma.dtype) + jnp.log1p((sigma - nodes[i]) / nodes[i]) / log_steps[i]
        if not self.rescale_betas_zero_snr:
            return inner
        beyond = sigma > nodes[last]
        return jnp.where(
            beyond, last + (1 - nodes[last] / jnp.where(beyond, sigma, nodes[last])), inner
        )

    def alpha_at(self, sigma: Scalar) -> Float[Array, "..."]:
        """1 / sqrt(1 + sigma^2)."""
        return _vp_alpha(sigma)


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Rebuild a schedule from what ``Schedule.to_config`` returned.

    Args:
        config: ``{"schedule": kind, ...}`` with the parameters of the schedule's class by name;
            those left out take their defaults.

    Returns:
        The schedule, equal to the one that wrote the configuration.

    Raises:
        InputError: unknown kind, unknown parameter, or a value the schedule refuses.

    >>> schedule_from_config({"schedule": "variance_exploding", "sigma_max": 50.0})
    VarianceExploding(sigma_min=0.002, sigma_max=50.0)
    """
    parameters = dict(config)
    kind = parameters.pop("schedule", None)
    classes = {
        cls.kind: cls for cls in (DiscreteVP, ContinuousVP, SubVP, FlowMatching, VarianceExploding)
    }
    if kind not in classes:
        raise InputError(f"schedule: expected one of {', '.join(classes)}, got {kind!r}")
    known = {field.name: field.type for field in dataclasses.fields(classes[kind])}
    for name in parameters:
        if name not in known:
            raise InputError(f"schedule {kind}: expected {', '.join(known)}, got {name!r}")
    parameters = {name: _parsed(name, known[name], value) for name, value in parameters.items()}
    return classes[kind](**parameters)


def _parsed(name: str, annotation: Any, value: Any) -> Any:
    """A JSON value as the type of its field: whole numbers are floats too, lists are tuples."""
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(annotation, type):
        if type(value) is not annotation:
            raise InputError(f"{name}: expected {annotation.__name__}, got {value!r}")
        return value
    # The one field left: an optional table of numbers.
    if value is not None and not isinstance(value, list | tuple):
        raise InputError(f"{name}: expected a list of numbers, got {value!r}")
    return None if value is None else tuple(_parsed(name, float, item) for item in value)


def _array(value: Scalar) -> Float[Array, "..."]:
    return jnp.asarray(value)


def _vp_alpha(sigma: Scalar) -> Float[Array, "..."]:
    return 1 / jnp.sqrt(1 + _array(sigma) ** 2)


def _require_range(names: str, low: float, high: float) -> None:
    if not 0 < low <= high < np.inf:
        raise InputError(f"{names}: expected 0 < low <= high < infinity, got {low}, {high}")


def _betas(schedule: DiscreteVP) -> np.ndarray:
    n = schedule.num_train_timesteps
    start, end = schedule.beta_start, schedule.beta_end
    if schedule.trained_betas is not None:
        return np.asarray(schedule.trained_betas, np.float64)
    match schedule.beta_schedule:
        case "linear":
            return np.linspace(start, end, n)
        case "scaled_linear":
            return np.linspace(np.sqrt(start), np.sqrt(end), n) ** 2
        case "sigmoid":
            return start + (end - start) * expit(np.linspace(-6, 6, n))
    u = np.arange(n + 1) / n
    match schedule.beta_schedule:
        case "squaredcos_cap_v2":
            f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        case "exp":
            f = np.exp(-12 * u)
        case _:
            log_snr = -np.copysign(0.5, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
            f = np.sqrt(expit(log_snr))
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


@functools.lru_cache(maxsize=32)
def _finite_sigmas(schedule: DiscreteVP) -> np.ndarray:
    """Sigma at every index where it is finite, float64."""
    log_alpha = np.cumsum(np.log1p(-_betas(schedule))) / 2
    if schedule.rescale_betas_zero_snr:
        alpha = np.exp(log_alpha)
        scale = alpha[0] / (alpha[0] - alpha[-1])
        log_alpha = np.log((alpha[:-1] - alpha[-1]) * scale)
    sigmas = np.sqrt(np.expm1(-2 * log_alpha))
    sigmas.setflags(write=False)
    return sigmas


def _tables(schedule: DiscreteVP, dtype: Any) -> tuple[Array, Array]:
    """Sigma at the indices, and the steps of log(sigma) between them."""
    sigmas = _finite_sigmas(schedule)
    return jnp.asarray(sigmas, dtype), jnp.asarray(np.diff(np.log(sigmas)), dtype)
