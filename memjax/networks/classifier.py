"""Networks that name the class of a noised sample: logits at every noise level."""

import flax.linen as nn
from jaxtyping import Array, Float

from memjax.networks._parts import Conv, Embedding, GroupNorm, check_levels, dense, film


class MLPClassifier(nn.Module):
    """Logits of one flattened sample by a residual MLP, modulated by the noise level.

        h_0 = W_in x,    h_{k+1} = h_k + V_k silu(film(W_k h_k, e)),    logits = W_out silu(h_K)

    with e an embedding of t and W_out zero at the start, where all classes are equally likely. No
    normalization: the derivative in x, by which a classifier guides, is that of a smooth function.
    Made for x near unit variance and t = log(sigma)/4.

    Attributes:
        num_classes: number of logits.
        width: of the hidden layers.
        num_blocks: K.
        embedding_width: of e.

    References:
        He et al. (2016), arXiv:1603.05027 (residual blocks); Perez et al. (2018),
        arXiv:1709.07871 (FiLM).
    """

    num_classes: int
    width: int = 256
    num_blocks: int = 2
    embedding_width: int = 128

    @nn.compact
    def __call__(self, x: Float[Array, "..."], t: Float[Array, ""]) -> Float[Array, "c"]:
        """The logits, computed in the dtype of x whatever that of the weights.

        Args:
            x: one sample of any shape.
            t: log(sigma)/4.
        """
        embedding = Embedding(self.embedding_width, 0)(t, None, x)
        h = dense(self.width, x, name="in")(x.reshape(-1))
        for k in range(self.num_blocks):
            inner = dense(self.width, x, name=f"block{k}_in")(h)
            inner = nn.silu(film(inner, embedding, name=f"block{k}_film"))
            h = h + dense(self.width, x, name=f"block{k}_out")(inner)
        return _logits(self.num_classes, nn.silu(h))


class ResNetClassifier(nn.Module):
    """Logits of one image by a residual network of 3 x 3 convolutions, modulated by the noise.

    Level k has ``channels[k]`` channels at size / 2^k: a convolution of stride 2 between levels,
    ``num_blocks`` residual blocks in each. A block is

        h + conv(silu(GroupNorm(conv(silu(film(GroupNorm(h), e))))))

    with e an embedding of t, which enters once per block, right after the first normalization; the
    last convolution of every block starts at zero. The logits are a dense layer, zero at the
    start, of the mean over the pixels. Made for x near unit variance and t = log(sigma)/4.

    Attributes:
        num_classes: number of logits.
        channels: per level, each a multiple of ``groups``; the number of levels is its length.
        num_blocks: residual blocks per level.
        groups: of the group normalizations.
        embedding_width: of e.

    References:
        He et al. (2016), arXiv:1603.05027; Wu, He (2018), arXiv:1803.08494 (group normalization,
        for the batch normalization of the paper that follows, whose statistics would mix noise
        levels); Chen, Ma, Liu, Dong (2024), arXiv:2410.02467 (where the time enters).
    """

    num_classes: int
    channels: tuple[int, ...] = (32, 64)
    num_blocks: int = 2
    groups: int = 8
    embedding_width: int = 128

    @nn.compact
    def __call__(self, x: Float[Array, "..."], t: Float[Array, ""]) -> Float[Array, "c"]:
        """The logits, computed in the dtype of x whatever that of the weights.

        Args:
            x: one image, channels last, height and width multiples of 2^(levels - 1).
            t: log(sigma)/4.

        Raises:
            InputError: an image of another rank or size, or channels that groups do not divide.
        """
        check_levels(x.shape, self.channels, self.groups)
        embedding = Embedding(self.embedding_width, 0)(t, None, x)
        h = Conv(self.channels[0], name="in")(x)
        for k, width in enumerate(self.channels):
            if k:
                h = Conv(width, stride=2, name=f"down{k}")(h)
            for i in range(self.num_blocks):
                h = _Block(self.groups, name=f"down{k}_block{i}")(h, embedding)
        h = nn.silu(GroupNorm(self.groups, name="out_norm")(h))
        return _logits(self.num_classes, h.mean((0, 1)))


class _Block(nn.Module):
    """A residual block that learns the noise level right after its first normalization."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"], e: Float[Array, "e"]) -> Float[Array, "h w c"]:
        h = nn.silu(film(GroupNorm(self.groups, name="norm0")(x), e, name="film"))
        h = Conv(x.shape[-1], name="conv0")(h)
        h = nn.silu(GroupNorm(self.groups, name="norm1")(h))
        return x + Conv(x.shape[-1], zero=True, name="conv1")(h)


def _logits(num_classes: int, h: Float[Array, "w"]) -> Float[Array, "c"]:
    return dense(num_classes, h, kernel_init=nn.initializers.zeros, name="out")(h)
