"""A network of diffusers in PyTorch, its products by the ways that work, and the same in JAX.

Forward mode fails on ``UNet2DModel`` as it comes: fused attention has none, and group
normalization refuses the strides that attention leaves behind. Two ways remain. ``patched``
writes attention out and copies what group normalization is given, and then takes
``torch.func.jvp``. ``twice`` differentiates u -> J^T u in the direction v, which is J v, and keeps
both graphs for all products. Weights ask for no gradient in either.
"""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.networks.unet2d import UNet2DModel

TIME = 100.0
CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
"""The network of google/ddpm-cifar10-32: 36 million weights."""
SMALL = CIFAR10 | {"sample_size": 8, "block_out_channels": (32, 32, 64, 64)}


class Pair(NamedTuple):
    """The same network twice, random in every weight.

    Attributes:
        module: diffusers' in PyTorch, in evaluation mode.
        network: ours.
        points: images, channels last, [batch, h, w, c].
        directions: vectors of norm 1 in the shape of ``points``.
    """

    module: Any
    network: UNet2DModel
    points: jax.Array
    directions: jax.Array


def pair(quick: bool, seed: int, batch: int) -> Pair:
    """The networks, and where to evaluate them."""
    import diffusers
    import torch

    config = SMALL if quick else CIFAR10
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    module = diffusers.UNet2DModel(**config).eval().requires_grad_(False)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:  # norms and biases start at ones and zeros: make every one count
                p += 0.1 * torch.from_numpy(rng.standard_normal(p.shape).astype(np.float32))
    weights = {
        name: jnp.asarray(t.permute(2, 3, 1, 0).numpy() if t.ndim == 4 else t.numpy())
        for name, t in module.state_dict().items()
    }
    size = config["sample_size"]
    points, v = rng.standard_normal((2, batch, size, size, 3)).astype(np.float32)
    v /= np.sqrt(np.sum(v**2, axis=(1, 2, 3), keepdims=True))
    network = UNet2DModel.from_weights(weights, dict(module.config))
    return Pair(module, network, jnp.asarray(points), jnp.asarray(v))


def patched(module):
    """A copy that forward mode takes: attention written out, group norms fed contiguous images."""
    import torch
    from diffusers.models.attention_processor import Attention, AttnProcessor

    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, Attention):
            layer.set_processor(AttnProcessor())
        if isinstance(layer, torch.nn.GroupNorm):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return module


def _function(module):
    return lambda x: module(x, TIME).sample


class Forward:
    """``torch.func.jvp`` afresh for every product, one forward pass for all transposed ones.

    Of a ``patched`` module.
    """

    def __init__(self, module, x):
        import torch

        self.function, self.x = _function(module), x
        self.pull = torch.func.vjp(self.function, x)[1]

    def jvp(self, v):
        """J v."""
        import torch

        with torch.no_grad():
            return torch.func.jvp(self.function, (self.x,), (v,))[1]

    def vjp(self, u):
        """J^T u."""
        return self.pull(u)[0]


class Twice:
    """Both products from graphs kept after one evaluation: backward, and backward of backward."""

    def __init__(self, module, x):
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        self.x = x.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the fused one cannot be differentiated twice
            self.y = _function(module)(self.x)
            self.u = torch.zeros_like(self.y, requires_grad=True)
            (self.pulled,) = torch.autograd.grad(self.y, self.x, self.u, create_graph=True)

    def jvp(self, v):
        """J v."""
        import torch

        return torch.autograd.grad(self.pulled, self.u, v, retain_graph=True)[0]

    def vjp(self, u):
        """J^T u."""
        import torch

        return torch.autograd.grad(self.y, self.x, u, retain_graph=True)[0]
