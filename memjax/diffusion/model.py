"""A model: a score with what one must know about it."""

import dataclasses
import inspect
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from memjax._core.errors import InputError
from memjax.diffusion.adapters import Scalar, callable_pytree
from memjax.diffusion.combine import Score
from memjax.diffusion.prediction import from_prediction
from memjax.diffusion.schedule import Schedule


def identity(x: PyTree) -> PyTree:
    """Return x: the encoder and decoder of a model that works on pixels."""
    return x


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model comes from: facts for the record, which change no number.

    All origins compare equal, so that models of one architecture share compiled programs
    whatever files they were read from.

    Attributes:
        folder: name of the folder it was read from.
        pipeline: what the folder holds, such as ``"DDPMPipeline"``; empty for a single network.
        network: class of the network.
        schedule: how noise was added in training, in words.
        prediction: what the network predicts.
        sha256: name and SHA-256 of the weights of every part.
        data_std: where the model's ``data_std`` comes from, in words.
        assumed: whether that is a guess, which an audit replaces by what it measures.
    """

    folder: str = dataclasses.field(default="", compare=False)
    pipeline: str = dataclasses.field(default="", compare=False)
    network: str = dataclasses.field(default="", compare=False)
    schedule: str = dataclasses.field(default="", compare=False)
    prediction: str = dataclasses.field(default="", compare=False)
    sha256: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False)
    data_std: str = dataclasses.field(default="", compare=False)
    assumed: bool = dataclasses.field(default=False, compare=False)


class Model(eqx.Module):
    """A score, and the facts that an audit of it needs.

    A Model is itself a score, ``model(x, sigma, condition=None)``, and can be passed wherever one
    is expected. It is a pytree: its leaves are the weights (and the null condition, and the
    weights of the encoder and decoder); everything else is static.

    Args:
        score: callable pytree ``(x, sigma, condition) -> s`` in EDM coordinates, one sample.
        event_shape: shape of one sample, channels last.
        sigma_min: smallest noise level the score can be trusted at, > 0.
        sigma_max: largest.
        data_std: standard deviation of the data in the score's space, over all coordinates.
        null_condition: pytree of arrays that stands for "no condition"; ``None`` for a model
            that has none.
        encode: image -> x, one sample. The identity in pixel space.
        decode: x -> image.
        origin: the files that the model was read from; empty for one made in memory.

    Raises:
        InputError: a shape, noise level or standard deviation that is not positive, sigma_min
            above sigma_max, or something not callable.

    Attributes:
        raw_score: the score as given, for which ``condition=None`` means ``None``.
    """

    raw_score: Score
    null_condition: PyTree
    encode: Callable
    decode: Callable
    event_shape: tuple[int, ...] = eqx.field(static=True)
    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)
    data_std: float = eqx.field(static=True)
    origin: Origin = eqx.field(static=True)

    def __init__(
        self,
        score: Score,
        event_shape: tuple[int, ...],
        *,
        sigma_min: float,
        sigma_max: float,
        data_std: float,
        null_condition: PyTree = None,
        encode: Callable = identity,
        decode: Callable = identity,
        origin: Origin = Origin(),
    ):
        self.raw_score = callable_pytree(score, "score")
        self.null_condition = jax.tree.map(jnp.asarray, null_condition)
        self.encode = callable_pytree(encode, "encode")
        self.decode = callable_pytree(decode, "decode")
        self.event_shape = tuple(int(n) for n in event_shape)
        self.sigma_min = float(sigma_min)
        self.sigma_max = float(sigma_max)
        self.data_std = float(data_std)
        self.origin = origin
        if any(n < 1 for n in self.event_shape):
            raise InputError(f"event_shape: expected positive sizes, got {self.event_shape}")
        if not 0 < self.sigma_min <= self.sigma_max < float("inf"):
            raise InputError(
                "sigma_min, sigma_max: expected 0 < sigma_min <= sigma_max < infinity, "
                f"got {self.sigma_min}, {self.sigma_max}"
            )
        if not 0 < self.data_std < float("inf"):
            raise InputError(f"data_std: expected a positive number, got {self.data_std}")

    def with_data_std(self, data_std: float, source: str) -> "Model":
        """The same model with another standard deviation of the data.

        Args:
            data_std: > 0, in the score's space, over all coordinates.
            source: where it comes from, in words, for ``origin``.

        Raises:
            InputError: ``data_std`` is not positive.
        """
        return Model(
            self.raw_score,
            self.event_shape,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            data_std=data_std,
            null_condition=self.null_condition,
            encode=self.encode,
            decode=self.decode,
            origin=dataclasses.replace(self.origin, data_std=source, assumed=False),
        )

    def score(
        self,
        x: Float[Array, "..."],
        sigma: Scalar,
        condition: PyTree = None,
    ) -> Float[Array, "..."]:
        """s(x, sigma, condition), like x; ``None`` stands for the null condition.

        Args:
            x: one sample, of shape ``event_shape``, floating point.
            sigma: noise level, > 0; neither clipped to nor checked against the range.
            condition: pytree of arrays with the structure of ``null_condition``, or ``None``.

        Raises:
            InputError: x has another shape, or the condition another structure.
        """
        if x.shape != self.event_shape:
            raise InputError(f"x: expected shape {self.event_shape}, got {x.shape}")
        if condition is None:
            condition = self.null_condition
        elif self.null_condition is not None:
            expected, found = (jax.tree.structure(c) for c in (self.null_condition, condition))
            if found != expected:
                raise InputError(
                    f"condition: expected the null condition's structure {expected}, got {found}"
                )
        return self.raw_score(x, sigma, condition)

    def __call__(
        self,
        x: Float[Array, "..."],
        sigma: Scalar,
        condition: PyTree = None,
    ) -> Float[Array, "..."]:
        """``model.score(x, sigma, condition)``."""
        return self.score(x, sigma, condition)


class _Unconditional(eqx.Module):
    """A network of two arguments as one of three."""

    network: Callable

    def __call__(self, x, t, condition=None):
        if condition is not None:
            raise InputError("condition: expected None, the network takes (x, t) alone")
        return self.network(x, t)


def from_callable(
    network: Callable,
    *,
    schedule: Schedule,
    prediction: str,
    event_shape: tuple[int, ...],
    data_std: float,
    null_condition: PyTree = None,
    example_condition: PyTree = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    encode: Callable = identity,
    decode: Callable = identity,
) -> Model:
    """Turn a network of any library into a model.

    The network is a function of one sample,

        network(x_t, network_time, condition) -> output, of the shape of x_t,

    with x_t = alpha_t x0 + sigma_t n and the time that ``schedule`` defines; or of
    ``(x_t, network_time)`` alone. What it predicts is converted once, by ``from_prediction``.
    Its arrays are the leaves of the model, so that they are arguments of every compiled program;
    what a plain function closes over cannot be seen and becomes constants. So pass

    - Flax Linen: ``LinenNetwork(module, variables)``; Flax NNX: ``NNXNetwork(model)``, with
      ``batched=True`` for a module that wants a batch axis;
    - Equinox: the module itself;
    - a plain function of weights: ``jax.tree_util.Partial(function, weights)``;
    - a raw network of EDM: ``EDMPreconditioned(network, data_std)``, a ``"denoiser"``;
    - PyTorch: see ``from_torch``.

    Args:
        network: callable pytree, channels last, in evaluation mode.
        schedule: the schedule it was trained under.
        prediction: ``"epsilon"``, ``"v_prediction"``, ``"sample"``, ``"denoiser"`` or ``"flow"``.
        event_shape: shape of one sample.
        data_std: standard deviation of the data in the network's space, over all coordinates.
        null_condition: pytree of arrays that stands for "no condition"; ``None`` for a network
            that has none.
        example_condition: a condition (arrays, or their shapes) to try the network with; needed
            for a network that takes conditions and has no null condition. Not kept.
        sigma_min: smallest noise level the score can be trusted at; by default the schedule's.
        sigma_max: largest.
        encode: image -> x, one sample. The identity in pixel space.
        decode: x -> image.

    Returns:
        The model.

    Raises:
        InputError: the network is not callable with these arguments, or returns another shape
            than ``event_shape``; or what ``from_prediction`` and ``Model`` refuse. What the
            network itself raises comes through.

    What a wrong schedule or prediction does cannot be seen here: ``check_score`` tells, from
    samples. Cost: one evaluation by shape.

    >>> import equinox as eqx, jax
    >>> from memjax.diffusion.schedule import DiscreteVP
    >>> class Network(eqx.Module):
    ...     layer: eqx.nn.Linear
    ...     def __call__(self, x, t):
    ...         return self.layer(x) / (1 + t)
    >>> network = Network(eqx.nn.Linear(4, 4, key=jax.random.key(0)))
    >>> model = from_callable(
    ...     network, schedule=DiscreteVP(), prediction="epsilon", event_shape=(4,), data_std=0.5
    ... )
    >>> model(jax.numpy.ones(4), 0.3).shape
    (4,)
    """
    if callable(network) and not _takes(network, 3) and _takes(network, 2):
        network = _Unconditional(callable_pytree(network, "network"))
    model = Model(
        from_prediction(network, prediction=prediction, schedule=schedule),
        event_shape,
        sigma_min=schedule.sigma_min if sigma_min is None else sigma_min,
        sigma_max=schedule.sigma_max if sigma_max is None else sigma_max,
        data_std=data_std,
        null_condition=null_condition,
        encode=encode,
        decode=decode,
    )
    leaves = [leaf for leaf in jax.tree.leaves(network) if eqx.is_inexact_array(leaf)]
    x = jax.ShapeDtypeStruct(model.event_shape, leaves[0].dtype if leaves else jnp.float32)
    condition = model.null_condition if null_condition is not None else example_condition
    jax.eval_shape(model.raw_score, x, 1.0, condition)
    return model


def _takes(function: Callable, count: int) -> bool:
    """Can it be called with this many arguments by position? So if nothing is known."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
