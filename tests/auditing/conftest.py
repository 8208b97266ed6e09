"""A small exact world to audit: a model that stored six images and knows the rest loosely."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import memjax.auditing.run as audit_module
from memjax.data.images import ImageSet, from_array
from memjax.densities import GaussianMixture
from memjax.diffusion.model import Model

SHAPE = (4, 4, 1)
NUM_STORED = 6
NUM_ROWS = 40


@pytest.fixture(autouse=True)
def _one_backend_check(monkeypatch):
    """The installed stack is checked once a session instead of once an audit."""
    monkeypatch.setattr(audit_module, "check_backend", _backend())


@functools.cache
def _backend():
    report = audit_module.check_backend()
    assert report.ok
    return lambda: report


@pytest.fixture(scope="session")
def images() -> ImageSet:
    """Rows 0..5 are stored by the model; the other 34 are draws from its broad component."""
    rng = np.random.default_rng(0)
    stored = rng.uniform(-0.9, 0.9, (NUM_STORED, *SHAPE))
    ordinary = np.clip(rng.normal(0, 0.4, (NUM_ROWS - NUM_STORED, *SHAPE)), -0.99, 0.99)
    return from_array(np.concatenate([stored, ordinary]).astype(np.float32))


@pytest.fixture(scope="session")
def model(images) -> Model:
    """Half of its mass is one broad Gaussian, the other half lies on the stored rows."""
    means = np.concatenate([np.zeros((1, *SHAPE)), images.images[:NUM_STORED]])
    weights = np.array([0.5, *[0.5 / NUM_STORED] * NUM_STORED])
    covariances = np.array([0.16, *[1e-6] * NUM_STORED])
    density = GaussianMixture(
        weights=jnp.asarray(weights, jnp.float32),
        means=jnp.asarray(means, jnp.float32),
        covariances=jnp.asarray(covariances, jnp.float32),
    )
    return Model(density, SHAPE, sigma_min=0.01, sigma_max=20.0, data_std=0.4)
