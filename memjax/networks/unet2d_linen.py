"""The pixel-space U-Net of diffusers as a Linen module, to be trained here and read elsewhere."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax._core.errors import InputError
from memjax.networks._weights import Weights
from memjax.networks.unet2d import UNet2DModel, UNet2DOptions


class LinenUNet2D(nn.Module):
    """``UNet2DModel`` with few options, its weights made by ``init`` under the names of diffusers.

    A model trained with it can be written as a folder of diffusers
    (``memjax.checkpoints.export_diffusers``). Like ``UNet`` it is made for the preconditioning of
    EDM: x near unit variance and t = c_noise = log(sigma)/4. Its last convolution starts at zero.

    Attributes:
        channels: per level, each a multiple of ``groups``; the number of levels is its length.
        num_blocks: residual blocks per level on the way down; one more on the way up.
        groups: of the group normalizations.
        attention: self-attention of the pixels at the lowest resolution.
        num_conditions: conditions are indices 0..num_conditions - 1, and num_conditions stands
            for none; 0 for a network without conditions.

    References:
        See ``UNet2DModel``; Karras et al. (2022), arXiv:2206.00364 (preconditioning).
    """

    channels: tuple[int, ...] = (32, 64)
    num_blocks: int = 1
    groups: int = 8
    attention: bool = False
    num_conditions: int = 0

    def options(self, num_channels: int) -> UNet2DOptions:
        """The options of ``config.json`` for images of this many channels.

        Raises:
            InputError: channels that ``groups`` do not divide, or none.
        """
        if not self.channels or any(width % self.groups for width in self.channels):
            raise InputError(
                f"channels: expected multiples of groups = {self.groups}, got {self.channels}"
            )
        plain = len(self.channels) - 1
        lowest = "Attn" if self.attention else ""
        return UNet2DOptions(
            in_channels=num_channels,
            out_channels=num_channels,
            block_out_channels=self.channels,
            down_block_types=(*("DownBlock2D",) * plain, f"{lowest}DownBlock2D"),  # type: ignore[arg-type]
            up_block_types=(f"{lowest}UpBlock2D", *("UpBlock2D",) * plain),  # type: ignore[arg-type]
            layers_per_block=self.num_blocks,
            attention_head_dim=None,
            add_attention=self.attention,
            norm_num_groups=self.groups,
            num_class_embeds=self.num_conditions + 1 if self.num_conditions else None,
        )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "..."],
        t: Float[Array, ""],
        condition: Int[Array, ""] | None = None,
    ) -> Float[Array, "..."]:
        """F(x, t, condition), like x; computed in the dtype of x whatever that of the weights.

        Args:
            x: one image, channels last, height and width multiples of 2^(levels - 1).
            t: c_noise = log(sigma)/4.
            condition: index, or ``None`` for none.

        Raises:
            InputError: an image of another rank or size, or a condition for a network without.
        """
        if x.ndim != 3:
            raise InputError(f"x: expected an image [height, width, channels], got {list(x.shape)}")
        if condition is None and self.num_conditions:
            condition = jnp.int32(self.num_conditions)
        network = UNet2DModel({}, self.options(x.shape[-1]))
        return network.run(_Parameters(self.param, x.dtype), x, t, condition)


class _Parameters(Weights):
    """Weights that come into being when ``init`` first asks for them."""

    def __init__(self, parameter: Callable, dtype: DTypeLike, prefix: str = ""):
        super().__init__({}, dtype, prefix)
        self._parameter = parameter

    def __truediv__(self, part: str | int) -> "_Parameters":
        return _Parameters(self._parameter, self._dtype, f"{self._prefix}{part}.")

    def __call__(self, name: str, *shape: int) -> Array:
        name = self._prefix + name
        return self._parameter(name, _initial, name, shape).astype(self._dtype)


def _initial(key: Array, name: str, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Normal with variance 1/(inputs of a unit); zeros and ones where nothing is multiplied."""
    if len(shape) == 1 or name == "conv_out.weight":
        ones = "norm" in name and name.endswith("weight")
        return jnp.ones(shape, jnp.float32) if ones else jnp.zeros(shape, jnp.float32)
    # Kernels are [height, width, in, out], matrices [out, in], the table of conditions [n, width].
    inputs = math.prod(shape[:-1]) if len(shape) == 4 else shape[1]
    return jax.random.normal(key, shape, jnp.float32) / math.sqrt(inputs)
