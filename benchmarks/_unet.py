"""The network of the cost targets: a U-Net of 2.6 million parameters on 32 x 32 x 3 images."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax._core.keys import derive_key
from memjax.networks.unet import UNet


class Network(NamedTuple):
    """A network with random weights in every layer, and where to evaluate it.

    Attributes:
        module: the U-Net.
        weights: as flax keeps them.
        points: a batch of images, [batch, height, width, channels].
        directions: one unit vector a point, in the shape of ``points``.
    """

    module: UNet
    weights: dict
    points: jax.Array
    directions: jax.Array


def network(quick: bool, seed: int) -> Network:
    """The network (or a small one of the same build), eight images and eight directions."""
    module = UNet(channels=(16, 24) if quick else (64, 96, 128))
    batch, size = (2, 8) if quick else (8, 32)
    shape = (2, batch, size, size, 3)
    points, v = jax.random.normal(derive_key(seed, "points"), shape, jnp.float32)
    weights = module.init(derive_key(seed, "weights"), points[0], jnp.zeros((), jnp.float32))
    # Last layers start at zero: make every one count.
    leaves, structure = jax.tree.flatten(weights)
    noise = [
        0.05 * jax.random.normal(derive_key(seed, "leaf", i), w.shape, w.dtype)
        for i, w in enumerate(leaves)
    ]
    weights = jax.tree.map(jnp.add, weights, jax.tree.unflatten(structure, noise))
    norms = jnp.sqrt(jnp.sum(v**2, axis=(1, 2, 3), keepdims=True))
    return Network(module, weights, points, v / norms)


def parameters(net: Network) -> dict:
    """Sizes, for the record."""
    return {
        "network_parameters": sum(w.size for w in jax.tree.leaves(net.weights)),
        "channels": list(net.module.channels),
        "batch": len(net.points),
        "event_shape": list(net.points.shape[1:]),
    }


def field(net_module: UNet, weights: dict):
    """One image -> one image, at a fixed noise level."""
    return lambda x: jnp.asarray(net_module.apply(weights, x, jnp.zeros((), jnp.float32)))


def forward(net_module: UNet, weights: dict, points: jax.Array) -> jax.Array:
    """The whole batch: the unit of cost."""
    return jax.vmap(field(net_module, weights))(points)
