"""Sampling trajectories: DDIM, keeping some of the points it passes."""

import jax
import jax.numpy as jnp

from memjax.diffusion.sampling import ddim, noise_levels


def trajectories(model, num, key, *, last, conditions=None, score=None, steps=500, kept=26):
    """``num`` samples by DDIM from ``model.sigma_max`` to ``last``, at ``kept`` levels.

    Args:
        model: a `Model`.
        num: of samples.
        key: of the initial noise.
        last: the last noise level.
        conditions: one a sample, or None.
        score: what is followed, where it is not the model's (guidance).
        steps: of DDIM.
        kept: levels kept, the first and the last among them; ``kept - 1`` divides ``steps``.

    Returns:
        Levels ``[kept]`` and points ``[kept, num, *event]``.
    """
    grid = jnp.asarray(noise_levels(model.sigma_max, last, steps + 1)[:-1], jnp.float32)
    every = steps // (kept - 1)
    starts = every * jnp.arange(kept - 1)
    segments = grid[starts[:, None] + jnp.arange(every + 1)[None]]
    noise = jax.random.normal(key, (num, *model.event_shape), jnp.float32)
    path = _follow(model if score is None else score, grid[0] * noise, segments, conditions)
    return grid[::every], path


@jax.jit
def _follow(score, start, segments, conditions):
    def one(x, condition):
        def segment(x, sigmas):
            x = ddim(score, x, sigmas, condition)
            return x, x

        return jnp.concatenate([x[None], jax.lax.scan(segment, x, segments)[1]])

    path = jax.vmap(one)(start, conditions)
    return jnp.swapaxes(path, 0, 1)
