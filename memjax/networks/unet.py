"""A small convolutional U-Net for images."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.networks._parts import Conv, Embedding, GroupNorm, check_levels, dense, film


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
        check_levels(x.shape, self.channels, self.groups)
        embedding = Embedding(self.embedding_width, self.num_conditions)(t, condition, x)
        h = Conv(self.channels[0], name="in")(x)
        skips = []
        for k, width in enumerate(self.channels):
            if k:
                h = Conv(width, stride=2, name=f"down{k}")(h)
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
                h = Conv(self.channels[k - 1], doubled=True, name=f"up{k}")(h)
        h = nn.silu(GroupNorm(self.groups, name="out_norm")(h))
        return Conv(x.shape[-1], zero=True, name="out")(h)


class _Block(nn.Module):
    """A residual block; a dense layer per pixel where the number of channels changes."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"], e: Float[Array, "e"]) -> Float[Array, "h w k"]:
        h = nn.silu(GroupNorm(self.groups, name="norm0")(x))
        h = Conv(self.features, name="conv0")(h)
        h = nn.silu(film(GroupNorm(self.groups, name="norm1")(h), e, name="film"))
        h = Conv(self.features, zero=True, name="conv1")(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, x, name="skip")(x)
        return x + h


class _Attention(nn.Module):
    """Self-attention of the pixels, one head, with its residual connection."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        width = x.shape[-1]
        h = GroupNorm(self.groups, name="norm")(x).reshape(-1, width)
        q, k, v = jnp.split(dense(3 * width, x, name="qkv")(h), 3, axis=-1)
        logits = jnp.einsum("ic,jc->ij", q, k, precision="highest") / math.sqrt(width)
        h = jnp.einsum("ij,jc->ic", jax.nn.softmax(logits), v, precision="highest")
        return x + dense(width, x, kernel_init=nn.initializers.zeros, name="out")(h).reshape(
            x.shape
        )
