"""A residual multilayer perceptron: the network of the test beds."""

import math

import flax.linen as nn
from jaxtyping import Array, Float, Int

from memjax.networks._parts import Embedding, dense, film


class ResidualMLP(nn.Module):
    """A residual MLP on one flattened sample, modulated by the noise level.

        h_0 = W_in x,    h_{k+1} = h_k + V_k silu(film(W_k h_k, e)),    F = W_out h_K

    with e an embedding of t (and of the condition) and W_out zero at the start. Made for the
    preconditioning of EDM: x near unit variance and t = c_noise = log(sigma)/4.

    Attributes:
        width: of the hidden layers.
        num_blocks: K.
        embedding_width: of e.
        num_conditions: conditions are indices 0..num_conditions - 1, and num_conditions stands
            for none; 0 for a network without conditions.

    References:
        He et al. (2016), arXiv:1603.05027 (residual blocks); Perez et al. (2018),
        arXiv:1709.07871 (FiLM); Karras et al. (2022), arXiv:2206.00364, Table 1 (c_noise).
    """

    width: int = 256
    num_blocks: int = 3
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
            x: one sample of any shape.
            t: c_noise = log(sigma)/4.
            condition: index, its vector of ``embedding_width`` numbers, or ``None`` for none.

        Raises:
            InputError: a condition for a network without.
        """
        embedding = Embedding(self.embedding_width, self.num_conditions)(t, condition, x)
        h = dense(self.width, x, name="in")(x.reshape(-1))
        for k in range(self.num_blocks):
            inner = dense(self.width, x, name=f"block{k}_in")(h)
            inner = nn.silu(film(inner, embedding, name=f"block{k}_film"))
            h = h + dense(self.width, x, name=f"block{k}_out")(inner)
        out = dense(math.prod(x.shape), x, kernel_init=nn.initializers.zeros, name="out")(h)
        return out.reshape(x.shape)
