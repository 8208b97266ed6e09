"""One table of densities that every test of the common contract runs over."""

import jax.numpy as jnp
import numpy as np
import pytest

from memjax.densities import ConditionalMixture, Empirical, Gaussian, GaussianMixture


def spd(rng, *shape):
    """Symmetric positive definite matrices with eigenvalues of order one."""
    factor = rng.normal(size=shape)
    return factor @ factor.swapaxes(-1, -2) / shape[-1] + 0.1 * np.eye(shape[-1])


def diagonal(rng):
    return Gaussian(jnp.asarray(rng.normal(size=(2, 3))), rng.uniform(0.1, 2, (2, 3)))


def full(rng):
    return Gaussian(jnp.asarray(rng.normal(size=(2, 3))), spd(rng, 6, 6))


def low_rank(rng):
    return Gaussian.low_rank(jnp.asarray(rng.normal(size=(2, 3))), rng.normal(size=(2, 3, 2)), 0.05)


def isotropic_mixture(rng):
    return GaussianMixture([0.2, 0.8], jnp.asarray(rng.normal(size=(2, 4))), [0.0, 0.5])


def full_mixture(rng):
    means = jnp.asarray(rng.normal(size=(3, 5)))
    return GaussianMixture([0.2, 0.5, 0.3], means, spd(rng, 3, 5, 5))


def conditional(rng):
    means = jnp.asarray(rng.normal(size=(4, 3)))
    return ConditionalMixture([0.1, 0.2, 0.3, 0.4], means, spd(rng, 4, 3, 3), [0, 1, 0, 2])


def empirical(rng):
    weights = rng.uniform(0.5, 1.5, 23)
    points = jnp.asarray(rng.normal(size=(23, 2, 2, 1)))
    return Empirical(points, weights / weights.sum(), chunk_size=5)


def scalar(rng):
    return GaussianMixture([0.4, 0.6], jnp.asarray(rng.normal(size=2)), 0.2)


BUILDERS = (
    diagonal,
    full,
    low_rank,
    isotropic_mixture,
    full_mixture,
    conditional,
    empirical,
    scalar,
)


@pytest.fixture(params=BUILDERS, ids=lambda build: build.__name__)
def build(request):
    """Make a density and a point of its shape, in the precision that is on when called."""

    def make(seed=0):
        rng = np.random.default_rng(seed)
        density = request.param(rng)
        return density, jnp.asarray(rng.normal(size=density.event_shape))

    return make
