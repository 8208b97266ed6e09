"""Where maps are made: noised images, or the trajectories along which samples come about."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from memjax._core.checks import check_count
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.diffusion.adapters import Scalar
from memjax.diffusion.combine import guided
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import heun, noise_levels, widest_dtype


def noised_points(
    images: Float[Array, "r ..."],
    sigmas: Float[Array, " l"],
    key: PRNGKeyArray,
    *,
    num_draws: int = 8,
) -> Float[Array, "l n ..."]:
    """Images with noise, ``x_lk = images[k mod r] + sigmas[l] n_k``; no sampling is needed.

    Args:
        images: r >= 1 images that stand for one prompt: the one under suspicion, or several.
        sigmas: noise levels.
        key: of the noises; draw k is the same at every level, and for every prompt with this key.
        num_draws: noises n_k. Static.

    Returns:
        Points by level and draw.

    Raises:
        InputError: ``num_draws`` < 1.
    """
    check_count("num_draws", num_draws, 1)
    draws = jnp.arange(num_draws)

    def noise(draw):
        return jax.random.normal(derive_key(key, "draw", draw), images.shape[1:], images.dtype)

    scale = sigmas.astype(images.dtype).reshape(-1, *(1 for _ in images.shape))
    return images[draws % images.shape[0]][None] + scale * jax.vmap(noise)(draws)[None]


def trajectory_points(
    model: Model,
    sigmas: Sequence[float] | Float[np.ndarray, " l"],
    key: PRNGKeyArray,
    condition: PyTree = None,
    *,
    weight: Scalar = 1.0,
    num_draws: int = 8,
    num_steps: int = 18,
) -> Float[Array, "l n ..."]:
    """Points of the sampler's trajectories at chosen noise levels: where samples come about.

    Every trajectory starts at ``model.sigma_max`` times normal noise and follows the probability
    flow by Heun's rule over the grid of ``noise_levels`` refined by ``sigmas``.

    Args:
        model: whose weights should be arguments of the jitted caller.
        sigmas: noise levels in the model's range. Static.
        key: of the starts; the same for every prompt with this key.
        condition: the prompt's.
        weight: of the guidance; 1 for none. A Python number is static.
        num_draws: trajectories. Static.
        num_steps: steps of the grid down to the smallest of ``sigmas``. Static.

    Returns:
        Points by level and draw, in the order of ``sigmas``.

    Raises:
        InputError: a level outside the model's range, ``num_draws`` or ``num_steps`` < 1.

    Cost: 2 evaluations a step and draw (4 with guidance).
    """
    check_count("num_draws", num_draws, 1)
    levels = np.asarray(sigmas, np.float64)
    if not (levels.size and levels.min() > 0 and levels.max() <= model.sigma_max):
        raise InputError(f"sigmas: expected levels in (0, {model.sigma_max}], got {sigmas}")
    grid = noise_levels(model.sigma_max, float(levels.min()), num_steps)[:-1]
    grid = np.unique(np.concatenate([[model.sigma_max], grid, levels]))[::-1]
    visited = np.searchsorted(-grid, -levels)
    dtype = widest_dtype(model)
    steps = jnp.asarray(np.stack([grid[:-1], grid[1:]], 1), dtype)
    score = guided(model, weight)

    def follow(draw):
        noise = jax.random.normal(derive_key(key, "draw", draw), model.event_shape, jnp.float32)
        start = model.sigma_max * noise.astype(dtype)

        def step(x, pair):
            there = heun(score, x, pair, condition)
            return there, there

        _, path = jax.lax.scan(step, start, steps)
        return jnp.concatenate([start[None], path])[visited]

    return jnp.moveaxis(jax.vmap(follow)(jnp.arange(num_draws)), 0, 1)
