"""Worlds whose stored pixels are known exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest


class Fields(NamedTuple):
    """Centered Gaussian images: score -(C + sigma^2)^-1 x, with C = V diag(l) V^T."""

    variances: jax.Array
    vectors: jax.Array

    @classmethod
    def of(cls, covariance: np.ndarray) -> "Fields":
        return cls(*map(jnp.asarray, np.linalg.eigh(covariance)))

    def __call__(self, x, sigma, condition=None):
        rotated = self.vectors.T @ x.reshape(-1)
        return -(self.vectors @ (rotated / (self.variances + sigma**2))).reshape(x.shape)


class PlantedWorld(NamedTuple):
    """A score that stores the pixels of ``mask`` under any condition, and none without."""

    stored: Fields
    free: Fields
    mask: np.ndarray

    def __call__(self, x, sigma, condition=None):
        return (self.free if condition is None else self.stored)(x, sigma)


def smooth_covariance(side: int, length: float) -> np.ndarray:
    """Of a field of about unit variance on side x side pixels, correlated over ``length``."""
    place = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1)
    place = place.reshape(-1, 2).astype(float)
    squared = ((place[:, None] - place[None]) ** 2).sum(-1)
    return np.exp(-squared / (2 * length**2)) + 1e-2 * np.eye(len(place))


@pytest.fixture
def planted():
    """Makes a world where a block's deviations are scaled by ``pinned``."""

    def make(side: int = 12, pinned: float = 0.03, length: float = 1.0) -> PlantedWorld:
        free = smooth_covariance(side, length)
        mask = np.zeros((side, side), bool)
        mask[side // 4 : side // 2 + 1, side // 3 : side - 2] = True
        scale = np.where(mask.reshape(-1), pinned, 1.0)
        stored = free * scale[:, None] * scale[None]
        return PlantedWorld(Fields.of(stored), Fields.of(free), mask)

    return make
