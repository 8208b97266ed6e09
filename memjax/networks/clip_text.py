"""The text encoders of Stable Diffusion, from their own weights."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax._core.errors import InputError
from memjax.networks._layers import (
    activate,
    attention,
    layer_norm,
    linear,
    row,
)
from memjax.networks._weights import Leaf, Weights, check_all_used, read_options

# A table of the numbers 0..n - 1 that older files hold.
_POSITIONS = "embeddings.position_ids"


class CLIPTextOptions(NamedTuple):
    """Options of ``config.json`` that the text encoder needs, with their defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu", "relu", "silu", "swish", "mish"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


class TextEncoding(NamedTuple):
    """What a text encoder makes of n tokens.

    Attributes:
        last: hidden states after the last layer, normalized.
        penultimate: hidden states before the last layer, not normalized.
        pooled: of the end-of-text token: its row of ``last``, projected where the encoder has a
            projection.
    """

    last: Float[Array, "n d"]
    penultimate: Float[Array, "n d"]
    pooled: Float[Array, "p"]


class CLIPTextModel(eqx.Module):
    """The text encoder of CLIP as transformers has it (``CLIPTextModel``), on one text.

    Attributes:
        weights: arrays under the names of the file, without the prefix ``text_model.`` that most
            files give them; the leaves of this pytree.
        options: of ``config.json``, defaults filled in. Static.

    References:
        Radford et al. (2021), arXiv:2103.00020, section 2.4; Wolf et al. (2020), transformers,
        https://github.com/huggingface/transformers.
    """

    weights: dict[str, Leaf]
    options: CLIPTextOptions = eqx.field(static=True)

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Leaf], config: Mapping[str, Any]
    ) -> "CLIPTextModel":
        """The encoder of these weights, once every array is known to be used.

        Args:
            weights: by name, with or without ``text_model.``; or their ``jax.ShapeDtypeStruct``
                alone, to see whether they fit. The table of position numbers that older files
                hold is left out.
            config: the content of ``config.json``. Options that it lacks have the class's
                defaults, and the many that transformers writes and this network has no use for
                (of generation, training, bookkeeping) are left out.

        Returns:
            The encoder.

        Raises:
            InputError: an option is not supported, or an array is missing, has another shape, or
                is used nowhere.

        >>> try:
        ...     CLIPTextModel.from_weights({}, {"hidden_act": "tanh"})
        ... except InputError as error:
        ...     print(str(error).split(": ")[0])
        hidden_act
        """
        names = (name for name in CLIPTextOptions._fields if config.get(name) is not None)
        known = {name: config[name] for name in names}
        options = read_options(CLIPTextOptions, known, cls.__name__)
        stripped = {name.removeprefix("text_model."): leaf for name, leaf in weights.items()}
        stripped.pop(_POSITIONS, None)
        encoder = cls(stripped, options)
        tokens = jnp.zeros(1, jnp.int32)
        check_all_used(cls.__name__, stripped, lambda weights: encoder._run(weights, tokens))
        return encoder

    def __call__(self, tokens: Int[Array, "n"]) -> TextEncoding:
        """Encode one text, each token attending to itself and those before it.

        Args:
            tokens: at most ``max_position_embeddings`` indices, padding included.

        Returns:
            Hidden states and the pooled vector, in the dtype of the weights; all NaN where a
            token is outside the vocabulary.

        Raises:
            InputError: too many tokens.
        """
        dtype = self.weights["embeddings.token_embedding.weight"].dtype
        return self._run(Weights(self.weights, dtype), tokens)

    def _run(self, p, tokens):
        o = self.options
        n, d = len(tokens), o.hidden_size
        if not 0 < n <= o.max_position_embeddings:
            raise InputError(
                f"tokens: expected from 1 to {o.max_position_embeddings} tokens, got {n}"
            )
        words = (p / "embeddings" / "token_embedding")("weight", o.vocab_size, d)
        places = (p / "embeddings" / "position_embedding")("weight", o.max_position_embeddings, d)
        h = before = row(words, tokens) + places[:n]
        for i in range(o.num_hidden_layers):
            before, h = h, self._layer(p / "encoder" / "layers" / i, h)
        last = layer_norm(p / "final_layer_norm", h, o.layer_norm_eps)
        # Configurations of before 2023 wrongly say 2; the token of the largest index ends the text.
        at_end = tokens if o.eos_token_id == 2 else tokens == o.eos_token_id
        return TextEncoding(last, before, self._pooled(p, last[jnp.argmax(at_end)]))

    def _layer(self, p: Weights, h: Float[Array, "n d"]) -> Float[Array, "n d"]:
        o = self.options
        d = o.hidden_size
        z = layer_norm(p / "layer_norm1", h, o.layer_norm_eps)
        part = p / "self_attn"
        q, k, v = (linear(part / name, z, d) for name in ("q_proj", "k_proj", "v_proj"))
        z = attention(q, k, v, o.num_attention_heads, causal=True)
        h = h + linear(part / "out_proj", z, d)
        z = layer_norm(p / "layer_norm2", h, o.layer_norm_eps)
        z = activate(o.hidden_act, linear(p / "mlp" / "fc1", z, o.intermediate_size))
        return h + linear(p / "mlp" / "fc2", z, d)

    def _pooled(self, p: Weights, end: Float[Array, "d"]) -> Float[Array, "p"]:
        return end


class CLIPTextModelWithProjection(CLIPTextModel):
    """The same with a linear map on the pooled vector: Stable Diffusion XL's second encoder."""

    def _pooled(self, p: Weights, end: Float[Array, "d"]) -> Float[Array, "p"]:
        return linear(p / "text_projection", end, self.options.projection_dim, bias=False)
