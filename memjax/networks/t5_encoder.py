"""The second text encoder of Flux, from its own weights."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax._core.errors import InputError
from memjax.networks._layers import activate, attention, linear, rms_norm, row
from memjax.networks._weights import Leaf, Weights, check_all_used, read_options

_EMBEDDING = "shared.weight"
# The same array by its place in the encoder; files hold one of the two, or both.
_TIED = "encoder.embed_tokens.weight"


class T5EncoderOptions(NamedTuple):
    """Options of ``config.json`` that the text encoder needs, with their defaults."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: Literal[
        "relu", "gelu", "gelu_new", "silu", "gated-relu", "gated-gelu", "gated-silu"
    ] = "relu"


class T5EncoderModel(eqx.Module):
    """The encoder of T5 as transformers has it (``T5EncoderModel``), on one text.

    Both of its versions: 1.0 (``feed_forward_proj`` "relu") and 1.1 ("gated-gelu"). Every token
    attends to every other, padding included: there is no mask, for the pipelines of Flux hand
    none to it.

    Attributes:
        weights: arrays under the names of the file, the table of tokens as ``shared.weight``; the
            leaves of this pytree.
        options: of ``config.json``, defaults filled in. Static.

    References:
        Raffel et al. (2020), arXiv:1910.10683, section 2.1; Shazeer (2020), arXiv:2002.05202 (the
        gated layer of version 1.1); Zhang and Sennrich (2019), arXiv:1910.07467 (the
        normalization); Wolf et al. (2020), transformers,
        https://github.com/huggingface/transformers.
    """

    weights: dict[str, Leaf]
    options: T5EncoderOptions = eqx.field(static=True)

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Leaf], config: Mapping[str, Any]
    ) -> "T5EncoderModel":
        """The encoder of these weights, once every array is known to be used.

        Args:
            weights: by name, or their ``jax.ShapeDtypeStruct`` alone, to see whether they fit. The
                table of tokens is ``shared.weight``, which counts, or else
                ``encoder.embed_tokens.weight``. A decoder's arrays are refused.
            config: the content of ``config.json``. Options that it lacks have the class's
                defaults, and the many that transformers writes and this network has no use for
                (of the decoder, generation, training, bookkeeping) are left out.

        Returns:
            The encoder.

        Raises:
            InputError: an option is not supported, or an array is missing, has another shape, or
                is used nowhere.

        >>> try:
        ...     T5EncoderModel.from_weights({}, {"feed_forward_proj": "gated-tanh"})
        ... except InputError as error:
        ...     print(str(error).split(": ")[0])
        feed_forward_proj
        """
        names = (name for name in T5EncoderOptions._fields if config.get(name) is not None)
        known = {name: config[name] for name in names}
        options = read_options(T5EncoderOptions, known, cls.__name__)
        if options.relative_attention_num_buckets < 4:
            raise InputError(
                "relative_attention_num_buckets: expected at least 4, "
                f"got {options.relative_attention_num_buckets}"
            )
        if options.relative_attention_max_distance <= options.relative_attention_num_buckets // 4:
            raise InputError(
                "relative_attention_max_distance: expected more than a quarter of "
                f"relative_attention_num_buckets = {options.relative_attention_num_buckets}, "
                f"got {options.relative_attention_max_distance}"
            )
        untied = dict(weights)
        if _TIED in untied:
            untied.setdefault(_EMBEDDING, untied.pop(_TIED))
        encoder = cls(untied, options)
        tokens = jnp.zeros(1, jnp.int32)
        check_all_used(cls.__name__, untied, lambda weights: encoder._run(weights, tokens))
        return encoder

    def __call__(self, tokens: Int[Array, "n"]) -> Float[Array, "n d"]:
        """Encode one text.

        Args:
            tokens: at least one index, padding included. There is no largest number: distances
                beyond ``relative_attention_max_distance`` count alike.

        Returns:
            Hidden states after the last layer, normalized, in the dtype of the weights; all NaN
            where a token is outside the vocabulary.

        Raises:
            InputError: no token.
        """
        return self._run(Weights(self.weights, self.weights[_EMBEDDING].dtype), tokens)

    def _run(self, p, tokens):
        o = self.options
        if not len(tokens):
            raise InputError("tokens: expected at least one, got none")
        h = row((p / "shared")("weight", o.vocab_size, o.d_model), tokens)
        p = p / "encoder"
        bias = self._bias(p / "block" / 0 / "layer" / 0 / "SelfAttention", len(tokens))
        for i in range(o.num_layers):
            h = self._block(p / "block" / i / "layer", h, bias)
        return rms_norm(p / "final_layer_norm", h, o.layer_norm_epsilon)

    def _bias(self, p: Weights, n: int) -> Float[Array, "h n n"]:
        """What the logits of every layer gain by the distance of two tokens."""
        o = self.options
        count = o.relative_attention_num_buckets
        table = (p / "relative_attention_bias")("weight", count, o.num_heads)
        places = np.arange(n)
        buckets = distance_buckets(
            places[None] - places[:, None], count, o.relative_attention_max_distance
        )
        return table[buckets].transpose(2, 0, 1)

    def _block(
        self, p: Weights, h: Float[Array, "n d"], bias: Float[Array, "h n n"]
    ) -> Float[Array, "n d"]:
        o = self.options
        part = p / 0 / "SelfAttention"
        z = rms_norm(p / 0 / "layer_norm", h, o.layer_norm_epsilon)
        q, k, v = (linear(part / name, z, o.num_heads * o.d_kv, bias=False) for name in "qkv")
        z = attention(q, k, v, o.num_heads, bias=bias)
        h = h + linear(part / "o", z, o.d_model, bias=False)
        part = p / 1 / "DenseReluDense"
        z = rms_norm(p / 1 / "layer_norm", h, o.layer_norm_epsilon)
        kind = o.feed_forward_proj
        if kind.startswith("gated-"):
            gate, value = (linear(part / name, z, o.d_ff, bias=False) for name in ("wi_0", "wi_1"))
            z = _activate(kind, gate) * value
        else:
            z = _activate(kind, linear(part / "wi", z, o.d_ff, bias=False))
        return h + linear(part / "wo", z, o.d_model, bias=False)


def _activate(kind: str, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """The activation in a name of transformers, where a gated GELU is the approximate one."""
    match kind.removeprefix("gated-"):
        case "gelu_new":
            return jax.nn.gelu(x, approximate=True)
        case "gelu" if kind == "gated-gelu":
            return jax.nn.gelu(x, approximate=True)
        case name:
            return activate(name, x)  # pyright: ignore[reportArgumentType]


def distance_buckets(
    offset: Int[np.ndarray, "..."], count: int, farthest: int
) -> Int[np.ndarray, "..."]:
    """Numbers of the classes into which T5 sorts the distances between tokens.

    Half of the classes are for offsets that are positive. In either half the first half are for
    one distance each, 0 .. e - 1, and the others for distances that grow geometrically up to
    ``farthest``, and beyond:

        e + floor((c - e) log(distance / e) / log(farthest / e)),    c = count // 2, e = c // 2

    at most c - 1.

    Args:
        offset: place of the token attended to, less that of the one attending.
        count: number of classes, at least 4.
        farthest: more than e.

    Returns:
        0 .. count - 1. The logarithms are single-precision, as those that networks were trained
        with.

    >>> distance_buckets(np.array([-200, -128, -10, -3, 0, 3, 10, 200]), 32, 128).tolist()
    [15, 15, 8, 3, 0, 19, 24, 31]

    References:
        Raffel et al. (2020), arXiv:1910.10683, section 2.1.
    """
    side = count // 2
    exact = side // 2
    distance = np.abs(offset)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(farthest / exact)) * np.float32(side - exact)
    far = np.minimum(exact + steps.astype(np.int64), side - 1)
    return side * (offset > 0) + np.where(distance < exact, distance, far)
