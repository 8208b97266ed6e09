"""Parts that our networks share: layers, and embeddings of noise level and condition."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax._core.errors import InputError
from memjax.networks.convolution import conv, doubled_conv
from memjax.networks.normalization import group_normalize

# c_noise = log(sigma)/4 moves by about 2.6 over a whole range of noise levels: the slowest
# feature turns by half a period over it, the fastest by a period where sigma grows by a factor 2.
_SLOWEST, _FASTEST, _FREQUENCIES = 1.0, 36.0, 16


def dense(features: int, like: Array, **kwargs) -> nn.Dense:
    """A dense layer that computes in the dtype of ``like``, matrix products at full precision."""
    return nn.Dense(features, dtype=like.dtype, precision="highest", **kwargs)


class Embedding(nn.Module):
    """One vector for the noise level and the condition, from which the blocks take their FiLM.

    The noise enters by sines and cosines of ``t`` at fixed frequencies; a condition adds the
    learned vector of its index, or is such a vector itself.

    Attributes:
        width: length of the vector.
        num_conditions: conditions 0..num_conditions - 1; index num_conditions is "no condition".
            0 for a network without conditions.
    """

    width: int
    num_conditions: int

    @nn.compact
    def __call__(
        self,
        t: Float[Array, ""],
        condition: Int[Array, ""] | Float[Array, "w"] | None,
        like: Float[Array, "..."],
    ) -> Float[Array, "w"]:
        """The vector, in the dtype of ``like``."""
        if condition is not None and not self.num_conditions:
            raise InputError("condition: expected None, the network was built without conditions")
        frequencies = jnp.geomspace(_SLOWEST, _FASTEST, _FREQUENCIES, dtype=like.dtype)
        angles = jnp.asarray(t, like.dtype) * frequencies
        h = dense(self.width, like)(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)]))
        if condition is not None and condition.ndim:
            h = h + condition.astype(like.dtype)
        elif self.num_conditions:
            index = jnp.int32(self.num_conditions) if condition is None else condition
            table = nn.Embed(self.num_conditions + 1, self.width, dtype=like.dtype, name="prompt")
            h = h + table(index)
        return nn.silu(dense(self.width, like)(nn.silu(h)))


def film(
    h: Float[Array, "*shape c"], embedding: Float[Array, "w"], name: str
) -> Float[Array, "*shape c"]:
    """Scale and shift the last axis as the embedding says: (1 + a) h + b. Call inside a module.

    The layer starts at zero, so that every block starts out the same at every noise level.

    References:
        Perez et al. (2018), FiLM, arXiv:1709.07871, equation 2.
    """
    c = h.shape[-1]
    both = dense(2 * c, h, kernel_init=nn.initializers.zeros, name=name)(embedding)
    scale, shift = (part.reshape((1,) * (h.ndim - 1) + (c,)) for part in jnp.split(both, 2))
    return (1 + scale) * h + shift


class Conv(nn.Module):
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


class GroupNorm(nn.Module):
    """Zero mean and unit variance per group of channels, then a learned scale and shift."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        h = group_normalize(x, self.groups)
        scale, bias = (a.astype(x.dtype).reshape(1, 1, -1) for a in (scale, bias))
        return h * scale + bias


def check_levels(shape: tuple[int, ...], channels: tuple[int, ...], groups: int) -> None:
    """An image can be halved from level to level, and groups divide the channels of each.

    Raises:
        InputError: an image of another rank or size, or channels that groups do not divide.
    """
    factor = 2 ** (len(channels) - 1)
    if len(shape) != 3 or shape[0] % factor or shape[1] % factor:
        raise InputError(
            f"x: expected an image [height, width, channels] with sides divisible by {factor}, "
            f"got {list(shape)}"
        )
    if not channels or any(width % groups for width in channels):
        raise InputError(f"channels: expected multiples of groups = {groups}, got {channels}")
