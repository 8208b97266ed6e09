"""Samplers: the probability-flow ODE from noise to image, deterministic by key."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from memjax._core.chunked import chunked_map
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.diffusion.combine import Score, guided
from memjax.diffusion.model import Model

Method = Literal["heun", "ddim"]


def noise_levels(
    sigma_max: float, sigma_min: float, num_steps: int, *, rho: float = 7.0
) -> Float[np.ndarray, "n"]:
    """The grid of noise levels of EDM, ending at zero.

        sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    for i = 0..n-1, and sigma_n = 0.

    Args:
        sigma_max: first noise level.
        sigma_min: last noise level above zero, > 0.
        num_steps: n, at least 1; with 1 the grid is (sigma_max, 0).
        rho: > 0; larger values put more steps at small noise.

    Returns:
        num_steps + 1 descending values, float64.

    Raises:
        InputError: an argument out of range.

    >>> noise_levels(80.0, 0.002, 3).round(3).tolist()
    [80.0, 2.515, 0.002, 0.0]

    References:
        Karras, Aittala, Aila, Laine (2022), arXiv:2206.00364, equation 5.
    """
    if num_steps < 1:
        raise InputError(f"num_steps: expected at least 1, got {num_steps}")
    if not 0 < rho < float("inf"):
        raise InputError(f"rho: expected a positive number, got {rho}")
    if not 0 < sigma_min <= sigma_max < float("inf"):
        raise InputError(
            "sigma_min, sigma_max: expected 0 < sigma_min <= sigma_max < infinity, "
            f"got {sigma_min}, {sigma_max}"
        )
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps) ** rho
    return np.append(ramp, 0.0)


def heun(
    score: Score,
    x: Float[Array, "..."],
    sigmas: Float[Array, "n"],
    condition: PyTree = None,
) -> Float[Array, "..."]:
    """Follow the probability flow dx/dsigma = -sigma s(x, sigma) by Heun's rule, one sample.

        d  = -sigma_i s(x_i, sigma_i)              x' = x_i + h d,    h = sigma_{i+1} - sigma_i
        d' = -sigma_{i+1} s(x', sigma_{i+1})       x_{i+1} = x_i + h (d + d') / 2

    A last noise level of zero, where the score does not exist, is reached by Euler's step alone:
    the denoiser D at the last positive level.

    Args:
        score: callable ``(x, sigma, condition) -> s``.
        x: the sample at ``sigmas[0]``.
        sigmas: noise levels in the order in which they are visited, descending to sample,
            ascending to encode; all positive but the last, which may be zero.
        condition: passed to the score.

    Returns:
        The sample at ``sigmas[-1]``. NaN if the score is; no error is raised.

    Accuracy: global error of second order in the steps. Cost: 2 evaluations a step, one for a
    step to zero.

    References:
        Karras, Aittala, Aila, Laine (2022), arXiv:2206.00364, Algorithm 1 (its churn is left out).
    """
    sigmas = sigmas.astype(x.dtype)

    def step(x, pair):
        here, there = pair
        d = -here * score(x, here, condition)
        euler = x + (there - here) * d

        def correct():
            d_there = -there * score(euler, there, condition)
            return x + (there - here) * (d + d_there) / 2

        return jax.lax.cond(there > 0, correct, lambda: euler), None

    return jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))[0]


def ddim(
    score: Score,
    x: Float[Array, "..."],
    sigmas: Float[Array, "n"],
    condition: PyTree = None,
) -> Float[Array, "..."]:
    """Follow the probability flow by DDIM's deterministic rule, one sample.

        x_{i+1} = x_i + (sigma_{i+1} - sigma_i) n_hat_i,    n_hat_i = -sigma_i s(x_i, sigma_i)

    In our coordinates x = x_t / alpha_t this is DDIM with eta = 0, and Euler's rule.

    Args:
        score: callable ``(x, sigma, condition) -> s``.
        x: the sample at ``sigmas[0]``.
        sigmas: noise levels in the order in which they are visited; all positive but the last,
            which may be zero.
        condition: passed to the score.

    Returns:
        The sample at ``sigmas[-1]``. NaN if the score is; no error is raised.

    Accuracy: global error of first order in the steps. Cost: one evaluation a step.

    References:
        Song, Meng, Ermon (2021), arXiv:2010.02502, equation 13.
    """
    sigmas = sigmas.astype(x.dtype)

    def step(x, pair):
        here, there = pair
        return x - (there - here) * here * score(x, here, condition), None

    return jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))[0]


_METHODS: dict[str, Callable] = {"heun": heun, "ddim": ddim}


def sample(
    model: Model,
    num_samples: int,
    *,
    key: int | PRNGKeyArray | None = None,
    noises: Float[Array, "n *event"] | None = None,
    conditions: PyTree = None,
    method: Method = "heun",
    num_steps: int = 18,
    rho: float = 7.0,
    guidance: float | int = 1,
    chunk_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Array, "n *event"]:
    """Draw samples of a model by its probability flow, from sigma_max to zero.

    Sample i starts at ``sigma_max`` times normal noise from a key derived from ``key`` and i
    alone. Every chunk is filled up to ``chunk_size``, so at a fixed chunk size sample i is
    bitwise the same however many are drawn; another chunk size changes rounding only.

    Args:
        model: a `Model`; its weights are arguments of the compiled program.
        num_samples: n, at least 1.
        key: a seed or a typed key.
        noises: in place of a key: what samples start from, divided by sigma_max, such as the
            noises found by ``memjax.mitigate.sail``.
        conditions: pytree of arrays with a leading axis of n, one condition per sample; ``None``
            for the model's null condition.
        method: ``"heun"`` (EDM's, 2 ``num_steps`` - 1 evaluations) or ``"ddim"`` (``num_steps``).
        num_steps: steps on the grid of ``noise_levels``.
        rho: the grid's exponent.
        guidance: weight of classifier-free guidance, see ``memjax.guided``; 1 is none, at half
            the cost.
        chunk_size: samples computed together; ``None`` for as many as hold 2^16 numbers, at
            most 128.
        progress: called as ``progress(done, num_samples)`` after every chunk.

    Returns:
        n samples in the space of the score (see ``model.decode``), in the widest floating-point
        dtype of the model's weights (JAX's default for a model without).

    Raises:
        InputError: an argument out of range, an unknown method, conditions without one row per
            sample, or not exactly one of key and noises.

    References:
        Karras et al. (2022), arXiv:2206.00364, Algorithm 1; Song et al. (2021), arXiv:2010.02502.
    """
    if num_samples < 1:
        raise InputError(f"num_samples: expected at least 1, got {num_samples}")
    if chunk_size is None:
        chunk_size = _default_chunk_size(model.event_shape)
    if chunk_size < 1:
        raise InputError(f"chunk_size: expected at least 1, got {chunk_size}")
    if method not in get_args(Method):
        raise InputError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
    for leaf in jax.tree.leaves(conditions):
        if jnp.ndim(leaf) < 1 or leaf.shape[0] != num_samples:
            raise InputError(
                f"conditions: expected {num_samples} rows, one per sample, got shape "
                f"{jnp.shape(leaf)}"
            )
    sigmas = noise_levels(model.sigma_max, model.sigma_min, num_steps, rho=rho)
    sigmas = jnp.asarray(sigmas, widest_dtype(model))
    if guidance != 1:
        model = Model(
            guided(model, guidance),
            model.event_shape,
            sigma_min=model.sigma_min,
            sigma_max=model.sigma_max,
            data_std=model.data_std,
            null_condition=model.null_condition,
        )
    if (key is None) == (noises is None):
        raise InputError("key, noises: expected one of them")
    if noises is not None and noises.shape != (num_samples, *model.event_shape):
        raise InputError(
            f"noises: expected shape {(num_samples, *model.event_shape)}, got {noises.shape}"
        )
    key = None if key is None else derive_key(key, "sample")
    chunks = []
    for start in range(0, num_samples, chunk_size):
        rows = np.arange(start, start + chunk_size)
        present = np.minimum(rows, num_samples - 1)
        given = (conditions, noises)
        chunk = jax.tree.map(lambda leaf, present=present: jnp.asarray(leaf)[present], given)
        chunks.append(
            _sample_chunk(model, key, jnp.asarray(rows, jnp.int32), sigmas, chunk, method)
        )
        if progress is not None:
            chunks[-1].block_until_ready()
            progress(min(start + chunk_size, num_samples), num_samples)
    return jnp.concatenate(chunks)[:num_samples]


def decode_samples(model: Model, samples: Float[Array, "n *event"]) -> Float[Array, "n *image"]:
    """Samples as images, through ``model.decode``, as many together as ``sample`` draws.

    Args:
        model: the model they are from.
        samples: in the space of the score.

    Returns:
        n images.
    """
    chunk_size = _default_chunk_size(model.event_shape)
    decode = jax.jit(lambda m, rows: chunked_map(m.decode, rows, chunk_size=chunk_size))
    return decode(model, samples)


def _default_chunk_size(event_shape: tuple[int, ...]) -> int:
    return max(1, min(128, 2**16 // math.prod(event_shape)))


def widest_dtype(model: Model) -> np.dtype:
    """The widest floating-point dtype among the weights.

    Numbers given as Python's, such as the weight of a guidance, have no dtype of their own.
    """
    leaves = (leaf for leaf in jax.tree.leaves(model) if not getattr(leaf, "weak_type", False))
    floating = {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return max(floating, key=lambda dtype: dtype.itemsize, default=jnp.result_type(float))


@partial(jax.jit, static_argnames="method")
def _sample_chunk(
    model: Model,
    key: PRNGKeyArray | None,
    rows: Int[Array, "n"],
    sigmas: Float[Array, "m"],
    given: tuple[PyTree, Float[Array, "n *event"] | None],
    method: str,
) -> Float[Array, "n *event"]:
    def one(row, given):
        condition, noise = given
        if key is not None:
            # In float32 always, so that double precision refines a sample, not replaces it.
            noise = jax.random.normal(derive_key(key, row), model.event_shape, jnp.float32)
        x = sigmas[0] * noise.astype(sigmas.dtype)
        return _METHODS[method](model, x, sigmas, condition)

    return jax.vmap(one)(rows, given)
