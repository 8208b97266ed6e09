"""Maps at several noise levels: how far a memory reaches, and what it adds up to."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from memjax._core.chunked import chunked_map
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.diffusion.adapters import callable_pytree
from memjax.diffusion.combine import Score
from memjax.diffusion.model import Model
from memjax.localize.maps import Maps, Method, PixelMap, curvature_maps, mean_over_draws
from memjax.localize.points import noised_points, trajectory_points

WINDOW = (0.5, 1.1)


class Scan(NamedTuple):
    """What a difference of retained variances says over all noise levels, pixel by pixel.

    Attributes:
        persistent: the largest difference that stands at two neighboring levels while the base
            is released: max over pairs of the smaller of the two. 0 if there is none. Per pixel,
            as the mean over its channels.
        level: number of the finer level of that pair, -1 where ``persistent`` is 0.
        released: whether the base is released at two neighboring levels at all; elsewhere the
            scan cannot see a memory, and says nothing against one.
        integral: of the difference over log sigma (trapezoids), in nats, summed over channels:
            the pixel's share of how much less log volume grows along the probability flow for
            the base than for the target, over these levels.
        integral_standard_error: an upper bound, whatever the levels have in common.
    """

    persistent: Float[Array, "..."]
    level: Int[Array, "..."]
    released: Bool[Array, "..."]
    integral: Float[Array, "..."]
    integral_standard_error: Float[Array, "..."]


def scan_levels(
    sigmas: Float[Array, " l"],
    difference: PixelMap,
    curvature: PixelMap,
    *,
    window: tuple[float, float] = WINDOW,
) -> Scan:
    """Where a difference stands at neighboring noise levels while the base is released.

    A baseline that never saw the content is sure of nothing at high noise and pretends that
    everything is pinned; at such a level, and where its own retained variance exceeds that of
    free pixels, a difference means nothing. So a level counts for a pixel only while

        window[0] <= rho_base <= window[1],    rho_base = difference + (1 - curvature)

    (the mean over the channels of the pixel), and a pair of neighboring levels if both do.

    Args:
        sigmas: l >= 2 noise levels, in rising or falling order.
        difference: a ``curvature_over_...`` map by level, leading axis l.
        curvature: the ``curvature`` of the same maps.
        window: retained variance of a released base. Static.

    Returns:
        `Scan`. NaN in a map makes its pixel NaN.

    Raises:
        InputError: fewer than 2 levels, or a window that is empty.

    References:
        The comparison: Kim, Lee (2026), arXiv:2605.26756. The integral: log volume grows by
        d - tr M per log sigma, see ``memjax.volume_growth``. Window and persistence: ours.
    """
    if sigmas.shape[0] < 2:
        raise InputError(f"sigmas: expected at least 2 noise levels, got {sigmas.shape[0]}")
    low, high = window
    if not low < high:
        raise InputError(f"window: expected (low, high) with low < high, got {window}")

    def pixels(entries):
        return entries.mean(-1) if entries.ndim > 3 else entries

    signal = pixels(difference.value)
    base = signal + 1 - pixels(curvature.value)
    open_here = (base >= low) & (base <= high)
    open_pair = open_here[:-1] & open_here[1:]
    stands = jnp.where(open_pair, jnp.minimum(signal[:-1], signal[1:]), 0)
    unknown = jnp.any(jnp.isnan(signal) | jnp.isnan(base), 0)
    peak = jnp.where(unknown, jnp.nan, jnp.maximum(jnp.max(stands, 0), 0))

    # The finer level of pair k is its first or its second, as the levels rise or fall.
    finer = jnp.argmax(stands, 0).astype(jnp.int32) + (sigmas[0] > sigmas[-1]).astype(jnp.int32)
    steps = jnp.abs(jnp.diff(jnp.log(sigmas))).astype(signal.dtype)
    weights = jnp.zeros(sigmas.shape, signal.dtype).at[:-1].add(steps / 2).at[1:].add(steps / 2)
    return Scan(
        persistent=peak,
        level=jnp.where(peak > 0, finer, -1),
        released=jnp.any(open_pair, 0),
        integral=jnp.tensordot(weights, difference.summed, 1, precision="highest"),
        integral_standard_error=jnp.tensordot(
            weights, difference.summed_standard_error, 1, precision="highest"
        ),
    )


def scan_points(
    score: Score,
    points: Float[Array, "l n ..."],
    sigmas: Float[Array, " l"],
    condition: PyTree = None,
    *,
    key: PRNGKeyArray,
    baseline: Score | None = None,
    method: Method | None = None,
    num_products: int = 64,
    chunk_size: int | None = 64,
) -> Maps:
    """Maps at every level, each the mean over its points. Pure, for one prompt.

    Args:
        score: as for ``curvature_maps``.
        points: noisy images by level and draw, from ``noised_points`` or ``trajectory_points``.
        sigmas: the levels.
        condition: the prompt's.
        key: of the probes, derived anew for every draw; the same at every level.
        baseline: as for ``curvature_maps``, like the other options.
        method: likewise.
        num_products: likewise.
        chunk_size: likewise.

    Returns:
        `Maps` with a leading axis of levels, ``mean_over_draws`` of each.
    """
    draws = jnp.arange(points.shape[1])

    def one(x, sigma, draw):
        return curvature_maps(
            score,
            x,
            sigma,
            condition,
            baseline=baseline,
            key=derive_key(key, "probes", draw),
            method=method,
            num_products=num_products,
            chunk_size=chunk_size,
        )

    def level(given):
        here, sigma = given
        # One draw in memory at a time: its products already fill the machine.
        return mean_over_draws(jax.lax.map(lambda a: one(a[0], sigma, a[1]), (here, draws)))

    return jax.lax.map(level, (points, sigmas.astype(points.dtype)))


def scan_images(
    score: Score,
    images: Float[Array, "p r ..."],
    sigmas: Float[Array, " l"],
    conditions: PyTree = None,
    *,
    key: PRNGKeyArray,
    baseline: Score | None = None,
    num_draws: int = 8,
    method: Method | None = None,
    num_products: int = 64,
    chunk_size: int | None = 64,
    row_chunk: int | None = 8,
) -> Maps:
    """Maps of many rows at noised images, without sampling: one compiled program.

    Args:
        score: callable pytree or plain function; a pytree's leaves, the weights, are arguments
            of the program.
        images: r >= 1 images for each of p rows; draw k uses number k mod r.
        sigmas: noise levels.
        conditions: one condition for each row along the leading axis of every leaf, or ``None``.
        key: randomness, common to all rows.
        baseline: as for ``curvature_maps``.
        num_draws: noises per row and level.
        method: as for ``curvature_maps``.
        num_products: likewise.
        chunk_size: likewise.
        row_chunk: rows computed together.

    Returns:
        `Maps` with leading axes of rows and levels.

    Raises:
        InputError: conditions without one row for each row of images, or an argument out of range.

    Cost: ``num_draws`` times ``maps_cost`` for every row and level.
    """
    for leaf in jax.tree.leaves(conditions):
        if jnp.ndim(leaf) < 1 or leaf.shape[0] != images.shape[0]:
            raise InputError(
                f"conditions: expected {images.shape[0]} rows, one for each of images, got shape "
                f"{jnp.shape(leaf)}"
            )
    return _scan_images(
        callable_pytree(score, "score"),
        images,
        sigmas,
        conditions,
        key,
        None if baseline is None else callable_pytree(baseline, "baseline"),
        num_draws=num_draws,
        options=(("method", method), ("num_products", num_products), ("chunk_size", chunk_size)),
        row_chunk=row_chunk,
    )


@partial(jax.jit, static_argnames=("num_draws", "options", "row_chunk"))
def _scan_images(
    score, images, sigmas, conditions, key, baseline, *, num_draws, options, row_chunk
) -> Maps:
    def row(given):
        own, condition = given
        points = noised_points(own, sigmas, derive_key(key, "noise"), num_draws=num_draws)
        return scan_points(
            score, points, sigmas, condition, key=key, baseline=baseline, **dict(options)
        )

    return chunked_map(row, (images, conditions), chunk_size=row_chunk)


def scan_samples(
    model: Model,
    sigmas: Float[np.ndarray, " l"],
    conditions: PyTree,
    *,
    key: PRNGKeyArray,
    weight: float | int = 1.0,
    baseline: Score | None = None,
    num_draws: int = 8,
    num_steps: int = 18,
    method: Method | None = None,
    num_products: int = 64,
    chunk_size: int | None = 64,
    row_chunk: int | None = 8,
) -> Maps:
    """Maps of many prompts along the trajectories on which the model draws samples of them.

    Args:
        model: a `Model`; its weights are arguments of the compiled program.
        sigmas: noise levels in (0, ``model.sigma_max``].
        conditions: one condition for each of p prompts along the leading axis of every leaf.
        key: randomness, common to all prompts.
        weight: guidance of the sampler; the maps are always of the model itself.
        baseline: as for ``curvature_maps``, at the same points.
        num_draws: samples per prompt.
        num_steps: steps of the sampler.
        method: as for ``curvature_maps``.
        num_products: likewise.
        chunk_size: likewise.
        row_chunk: prompts computed together.

    Returns:
        `Maps` with leading axes of prompts and levels. The evaluations that drew the samples are
        not in their cost.
    """
    return _scan_samples(
        model,
        conditions,
        key,
        None if baseline is None else callable_pytree(baseline, "baseline"),
        sigmas=tuple(float(sigma) for sigma in sigmas),
        weight=weight,
        num_draws=num_draws,
        num_steps=num_steps,
        options=(("method", method), ("num_products", num_products), ("chunk_size", chunk_size)),
        row_chunk=row_chunk,
    )


@partial(
    jax.jit,
    static_argnames=("sigmas", "weight", "num_draws", "num_steps", "options", "row_chunk"),
)
def _scan_samples(
    model, conditions, key, baseline, *, sigmas, weight, num_draws, num_steps, options, row_chunk
) -> Maps:
    def row(condition):
        points = trajectory_points(
            model,
            sigmas,
            derive_key(key, "start"),
            condition,
            weight=weight,
            num_draws=num_draws,
            num_steps=num_steps,
        )
        levels = jnp.asarray(sigmas, points.dtype)
        return scan_points(
            model, points, levels, condition, key=key, baseline=baseline, **dict(options)
        )

    return chunked_map(row, conditions, chunk_size=row_chunk)
