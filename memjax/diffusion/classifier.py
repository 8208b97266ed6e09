"""The class of a noised sample: log p(y | x, sigma) in the coordinates of the scores."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from memjax._core.checks import check_count, check_floating, check_positive, is_traced
from memjax._core.errors import InputError
from memjax.diffusion.adapters import Scalar, callable_pytree


class NoisyClassifier(eqx.Module):
    """A classifier of noised samples, log p(y | x, sigma) with x = x0 + sigma n.

        log p(. | x, sigma) = log_softmax(f(x / sqrt(sigma^2 + d^2), log(sigma)/4) / T(sigma))

    with f the network, d = ``data_std`` and T the temperature, whose logarithm is interpolated
    linearly in log sigma between the ``sigmas``. Below the smallest of them and above the largest,
    t = log(sigma)/4 and T are those at the end; x is scaled by its own sigma everywhere. So sigma
    = 0 is allowed, and far above the data's spread the derivative in x falls like 1/sigma.

    With ``time_dependent=False`` the network is shown t = 0 at every sigma: the classifier that
    one trains on clean images, as a comparison. (In the coordinates of a variance-preserving
    process it would see x_t = x / sqrt(1 + sigma^2), as it does here at d = 1.)

    Its leaves are the network's weights, ``sigmas`` and ``temperature``: pass it to a jitted
    function as an argument. ``memjax.train_classifier`` makes one.

    Args:
        network: callable pytree ``(x, t) -> logits [num_classes]`` on one sample, such as a
            ``LinenNetwork`` around an ``MLPClassifier``.
        event_shape: shape of one sample, channels last. Static.
        num_classes: number of logits. Static.
        data_std: d > 0, the standard deviation of the clean data over all coordinates. Static.
        sigmas: noise levels [m], positive and ascending: the range the classifier was trained on.
        temperature: T [m] at those levels, > 0; ``None`` for 1 everywhere.
        time_dependent: whether the network is told the noise level. Static.

    Raises:
        InputError: a network that is not callable, a number out of range, or levels and
            temperatures of different shapes.

    >>> import jax.numpy as jnp
    >>> network = lambda x, t: jnp.stack([x.sum(), -x.sum()])
    >>> classifier = NoisyClassifier(
    ...     network, (2,), num_classes=2, data_std=1.0, sigmas=[0.1, 10.0]
    ... )
    >>> x = jnp.array([1.0, 1.0])
    >>> [round(float(each), 4) for each in classifier.log_probs(x, jnp.sqrt(3.0))]
    [-0.1269, -2.1269]
    >>> round(float(classifier(x, jnp.sqrt(3.0), jnp.int32(1))), 4)
    -2.1269

    References:
        Song et al. (2021), arXiv:2011.13456, Section 5 (time-dependent classifiers); Dhariwal,
        Nichol (2021), arXiv:2105.05233, Section 4; Guo et al. (2017), arXiv:1706.04599
        (temperature).
    """

    network: Callable
    sigmas: Float[Array, "m"]
    temperature: Float[Array, "m"]
    event_shape: tuple[int, ...] = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    data_std: float = eqx.field(static=True)
    time_dependent: bool = eqx.field(static=True)

    def __init__(
        self,
        network: Callable,
        event_shape: tuple[int, ...],
        *,
        num_classes: int,
        data_std: float,
        sigmas: ArrayLike | list[float],
        temperature: ArrayLike | list[float] | None = None,
        time_dependent: bool = True,
    ):
        self.network = callable_pytree(network, "network")
        self.event_shape = tuple(int(n) for n in event_shape)
        self.num_classes = int(num_classes)
        self.data_std = float(data_std)
        self.sigmas = jnp.asarray(sigmas, jnp.float32)
        ones = jnp.ones_like(self.sigmas)
        self.temperature = ones if temperature is None else jnp.asarray(temperature, jnp.float32)
        self.time_dependent = bool(time_dependent)
        check_count("num_classes", self.num_classes, 1)
        check_positive("data_std", self.data_std)
        shape = self.sigmas.shape
        if len(shape) != 1 or not shape[0]:
            raise InputError(f"sigmas: expected [m] with m >= 1, got {list(shape)}")
        if self.temperature.shape != shape:
            raise InputError(
                f"temperature: expected one per noise level, {list(shape)}, "
                f"got {list(self.temperature.shape)}"
            )
        if is_traced(self.sigmas) or is_traced(self.temperature):
            return
        levels, temperatures = np.asarray(self.sigmas), np.asarray(self.temperature)
        if not (levels[0] > 0 and np.all(np.diff(levels) > 0) and np.isfinite(levels[-1])):
            raise InputError(f"sigmas: expected positive numbers, ascending, got {levels}")
        if not np.all((temperatures > 0) & np.isfinite(temperatures)):
            raise InputError(f"temperature: expected positive numbers, got {temperatures}")

    def with_temperature(
        self, temperature: Float[Array, "m"] | Float[np.ndarray, "m"]
    ) -> "NoisyClassifier":
        """The same classifier with other temperatures, one per level of ``sigmas``."""
        return NoisyClassifier(
            self.network,
            self.event_shape,
            num_classes=self.num_classes,
            data_std=self.data_std,
            sigmas=self.sigmas,
            temperature=temperature,
            time_dependent=self.time_dependent,
        )

    def log_probs(self, x: Float[Array, "..."], sigma: Scalar) -> Float[Array, "c"]:
        """Log probabilities of all classes in nats, in the dtype of x.

        Args:
            x: one sample in EDM coordinates, of shape ``event_shape``, floating point.
            sigma: noise level, >= 0.

        Raises:
            InputError: x has another shape or is not floating point, or the network's logits are
                not [num_classes].
        """
        if x.shape != self.event_shape:
            raise InputError(f"x: expected shape {self.event_shape}, got {x.shape}")
        check_floating("x", x)
        sigma = jnp.asarray(sigma, x.dtype)
        levels, temperature = self.sigmas.astype(x.dtype), self.temperature.astype(x.dtype)
        inside = jnp.log(jnp.clip(sigma, levels[0], levels[-1]))
        t = inside / 4 if self.time_dependent else jnp.zeros_like(inside)
        logits = self.network(x / jnp.sqrt(sigma**2 + self.data_std**2), t)
        if logits.shape != (self.num_classes,):
            raise InputError(
                f"network: expected logits of shape [{self.num_classes}], got {list(logits.shape)}"
            )
        log_temperature = jnp.interp(inside, jnp.log(levels), jnp.log(temperature))
        return jax.nn.log_softmax(logits * jnp.exp(-log_temperature))

    def __call__(
        self, x: Float[Array, "..."], sigma: Scalar, condition: Int[Array, ""] | int
    ) -> Float[Array, ""]:
        """The log of p(condition | x, sigma) in nats: the ``log_prob`` of ``classifier_guided``.

        Args:
            x: one sample in EDM coordinates.
            sigma: noise level, >= 0.
            condition: class 0..num_classes - 1; NaN for any other index.
        """
        every = self.log_probs(x, sigma).at[condition]
        return every.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
