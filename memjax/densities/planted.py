"""A mixture with stored points planted in it: what a detector should find is known exactly."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from memjax._core.checks import check_count
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.densities.mixture import GaussianMixture

BROAD = (2, 4, 8)
"""Local dimensions of the background's components, as far as d goes."""
NARROW = 0.1


class PlantedMixture(NamedTuple):
    """A density, and points of which some are stored in it.

    Attributes:
        density: the background and the stored points, as one mixture.
        background: the same without stored points.
        points: the stored points, then ordinary ones drawn from the background.
        stored: which points are.
        weight: probability of each stored point under ``density``.
    """

    density: GaussianMixture
    background: GaussianMixture
    points: Float[Array, "n d"]
    stored: Bool[Array, " n"]
    weight: float

    def log_odds(self, sigma: float | Float[Array, ""]) -> Float[Array, " n"]:
        """Log odds that a noisy point comes from a stored point and not from the background.

            log w + log sum_k N(x; y_k, sigma^2 I) - log (1 - K w) - log p_background,sigma(x)

        Taken at every point without noise. Above 0 at a stored point the score there is that of
        the stored point, and a detector can see it; below, no detector can.

        Args:
            sigma: noise level > 0, in the units of the points.

        Returns:
            One number a point, in nats.
        """
        num = self.density.weights.size - self.background.weights.size
        planted = self.points[:num]
        alone = GaussianMixture([1 / num] * num, planted, jnp.zeros_like(planted))
        prior = math.log(num * self.weight) - math.log1p(-num * self.weight)

        def one(x):
            level = jnp.asarray(sigma, x.dtype)
            return prior + alone.log_prob(x, level) - self.background.log_prob(x, level)

        return jax.vmap(one)(self.points)


def planted_mixture(
    key: PRNGKeyArray,
    d: int,
    *,
    num_stored: int = 20,
    num_ordinary: int = 380,
    weight: float = 1e-3,
) -> PlantedMixture:
    """Plant stored points in a background of unequal local dimensions.

    The background has three components of weight 1/3 with 2, 4 and 8 broad coordinates (as far as
    d goes), standard deviation 1, chosen anew for each; the others have 0.1. So an ordinary
    point's neighborhood may be narrow without anything being stored there. A stored point is a
    draw of the background that has probability ``weight`` of its own, a component without
    covariance.

    Args:
        key: which coordinates are broad, where the points lie.
        d: their dimension, at least 2.
        num_stored: points planted, at least 1.
        num_ordinary: draws of the background, at least 1.
        weight: probability of each stored point, > 0 and together below 1.

    Returns:
        A `PlantedMixture`; ``points`` holds the stored ones first.

    Raises:
        InputError: an argument out of range.

    >>> world = planted_mixture(jax.random.key(0), 8)
    >>> odds = world.log_odds(0.02)
    >>> bool(odds[world.stored].min() > 0 > odds[~world.stored].max())
    True
    """
    check_count("d", d, BROAD[0])
    check_count("num_stored", num_stored, 1)
    check_count("num_ordinary", num_ordinary, 1)
    if not 0 < weight * num_stored < 1:
        raise InputError(
            f"weight: expected a positive number below 1/{num_stored} (num_stored), got {weight}"
        )
    count = len(BROAD)
    orders = jax.vmap(lambda k: jax.random.permutation(k, d))(
        jax.random.split(derive_key(key, "coordinates"), count)
    )
    broad = orders < jnp.asarray(BROAD)[:, None]
    variances = jnp.where(broad, 1.0, NARROW**2)
    means = jax.random.normal(derive_key(key, "means"), (count, d)) * jnp.sqrt(variances)
    background = GaussianMixture([1 / count] * count, means, variances)
    points = background.sample(derive_key(key, "points"), num_stored + num_ordinary, 0.0)
    total = num_stored * weight
    density = GaussianMixture(
        jnp.concatenate([jnp.full(count, (1 - total) / count), jnp.full(num_stored, weight)]),
        jnp.concatenate([means, points[:num_stored]]),
        jnp.concatenate([variances, jnp.zeros((num_stored, d))]),
    )
    stored = jnp.arange(num_stored + num_ordinary) < num_stored
    return PlantedMixture(density, background, points, stored, weight)
