"""A small convolutional U-Net for images."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax._core.errors import InputError
from memjax.networks._parts import Embedding, dense, film
from memjax.networks.convolution import conv, doubled_conv
from memjax.networks.normalization import group_normalize


class UNet(nn.Module):
    """A U-Net on one image: residual blocks of 3 x 3 convolutions, modulated by the noise level.

    Level k has ``channels[k]`` channels at size / 2^k. Going down, ``num_blocks`` residual blocks
    and a convolution of stride 2; in the middle a block, attention where asked for, and a block;
    going up, pixels doubled, a convolution, the skipped image concatenated, ``num_blocks`` blocks.
    A block is

        h + conv(silu(film(GroupNorm(conv(silu(GroupNorm(h)))), e)))

    with e an embedding of t (and of the condition); the last convolution of every block and of
    the network starts at zero. Made for the preconditioning of EDM: x near unit variance and
    t = c_noise = log(sigma)/4.

    Attributes:
        channels: per level, each a multiple of ``groups``; the number of levels is its length.
        num_blocks: residual blocks per level and direction.
        groups: of the group normalizations.
        attention: self-attention (one head) at the lowest resolution.
        embedding_width: of e.
        num_conditions: conditions are indices 0..num_conditions - 1, and num_conditions stands
            for none; 0 for a network without conditions.

    References:
        Ronneberger, Fischer, Brox (2015), arXiv:1505.04597; Ho, Jain, Abbeel (2020),
        arXiv:2006.11239, Appendix B; Wu, He (2018), arXiv:1803.08494 (group normalization).
    """

    channels: tuple[int, ...] = (32, 64)
    num_blocks: int = 1
    groups: int = 8
    attention: bool = False
    embedding_width: int = 128
    num_conditions: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "..."],
        t: Float[Array, ""],
        condition: Int[Array, ""] | Float[Array, "w"] | None = None,
    ) -> Float[Array, "..."]:
        """F(x, t, condition), like x; computed in the dtype of x whatever that of the weights.

        Args:
            x: one image, channels last, height and width multiples of 2^(levels - 1).
            t: c_noise = log(sigma)/4.
            condition: index, its vector of ``embedding_width`` numbers, or ``None`` for none.

        Raises:
            InputError: an image of another rank or size, channels that groups do not divide, or a
                condition for a network without.
        """
        self._check(x.shape)
        embedding = Embedding(self.embedding_width, self.num_conditions)(t, condition, x)
        h = _Conv(self.channels[0], name="in")(x)
        skips = []
        for k, width in enumerate(self.channels):
            if k:
                h = _Conv(width, stride=2, name=f"down{k}")(h)
            for i in range(self.num_blocks):
                h = _Block(width, self.groups, name=f"down{k}_block{i}")(h, embedding)
            skips.append(h)
        h = _Block(h.shape[-1], self.groups, name="middle_block0")(h, embedding)
        if self.attention:
            h = _Attention(self.groups, name="middle_attention")(h)
        h = _Block(h.shape[-1], self.groups, name="middle_block1")(h, embedding)
        for k, width in reversed(list(enumerate(self.channels))):
            h = jnp.concatenate([h, skips[k]], axis=-1)
            for i in range(self.num_blocks):
                h = _Block(width, self.groups, name=f"up{k}_block{i}")(h, embedding)
            if k:
                h = _Conv(self.channels[k - 1], doubled=True, name=f"up{k}")(h)
        h = nn.silu(_GroupNorm(self.groups, name="out_norm")(h))
        return _Conv(x.shape[-1], zero=True, name="out")(h)

    def _check(self, shape: tuple[int, ...]) -> None:
        factor = 2 ** (len(self.channels) - 1)
        if len(shape) != 3 or shape[0] % factor or shape[1] % factor:
            raise InputError(
                f"x: expected an image [height, width, channels] with sides divisible by {factor}, "
                f"got {list(shape)}"
            )
        if not self.channels or any(width % self.groups for width in self.channels):
            raise InputError(
                f"channels: expected multiples of groups = {self.groups}, got {self.channels}"
            )


class _Conv(nn.Module):
    """A 3 x 3 convolution with bias, of the image or of the image with its pixels doubled."""

    features: int
    stride: int = 1
    zero: bool = False
    doubled: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "p q k"]:
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel = kernel.astype(x.dtype)
        out = doubled_conv(x, kernel) if self.doubled else conv(x, kernel, stride=self.stride)
        return out + bias.astype(x.dtype).reshape(1, 1, -1)


class _Block(nn.Module):
    """A residual block; a dense layer per pixel where the number of channels changes."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"], e: Float[Array, "e"]) -> Float[Array, "h w k"]:
        h = nn.silu(_GroupNorm(self.groups, name="norm0")(x))
        h = _Conv(self.features, name="conv0")(h)
        h = nn.silu(film(_GroupNorm(self.groups, name="norm1")(h), e, name="film"))
        h = _Conv(self.features, zero=True, name="conv1")(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, x, name="skip")(x)
        return x + h


class _Attention(nn.Module):
    """Self-attention of the pixels, one head, with its residual connection."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        width = x.shape[-1]
        h = _GroupNorm(self.groups, name="norm")(x).reshape(-1, width)
        q, k, v = jnp.split(dense(3 * width, x, name="qkv")(h), 3, axis=-1)
        logits = jnp.einsum("ic,jc->ij", q, k, precision="highest") / math.sqrt(width)
        h = jnp.einsum("ij,jc->ic", jax.nn.softmax(logits), v, precision="highest")
        return x + dense(width, x, kernel_init=nn.initializers.zeros, name="out")(h).reshape(
            x.shape
        )


class _GroupNorm(nn.Module):
    """Zero mean and unit variance per group of channels, then a learned scale and shift."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        h = group_normalize(x, self.groups)
        scale, bias = (a.astype(x.dtype).reshape(1, 1, -1) for a in (scale, bias))
        return h * scale + bias
