"""Parts that our networks share: dense layers and embeddings of noise level and condition."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax._core.errors import InputError

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
