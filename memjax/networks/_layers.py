"""Layers of published networks, each a function of its weights and one unbatched input."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from memjax._core.errors import InputError
from memjax.networks._weights import Weights
from memjax.networks.convolution import conv, doubled_conv
from memjax.networks.normalization import group_normalize

Activation = Literal["silu", "swish", "mish", "gelu", "relu", "quick_gelu"]


def activate(name: Activation, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """An activation function by its name in configurations; GELU is the exact one."""
    match name:
        case "silu" | "swish":
            return jax.nn.silu(x)
        case "mish":
            return jax.nn.mish(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "relu":
            return jax.nn.relu(x)
        case "quick_gelu":
            return x * jax.nn.sigmoid(1.702 * x)


def _wide(dtype: DTypeLike) -> DTypeLike:
    """The dtype that means, exponentials and angles are formed in: float32 at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def linear(
    p: Weights, x: Float[Array, "*n i"], features: int, *, bias: bool = True
) -> Float[Array, "*n o"]:
    """W x + b along the last axis, W [features, i] as the file has it."""
    y = jnp.einsum("...i,oi->...o", x, p("weight", features, x.shape[-1]), precision="highest")
    return _add_bias(p, y) if bias else y


def pointwise(p: Weights, x: Float[Array, "h w i"], features: int) -> Float[Array, "h w o"]:
    """A 1 x 1 convolution: a matrix product for each pixel."""
    kernel = p("weight", 1, 1, x.shape[-1], features)[0, 0]
    return _add_bias(p, jnp.einsum("hwi,io->hwo", x, kernel, precision="highest"))


def convolve(
    p: Weights,
    x: Float[Array, "h w i"],
    features: int,
    *,
    size: int = 3,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
) -> Float[Array, "p q o"]:
    """A convolution with bias; padded by (size - 1)/2 on every side unless told otherwise."""
    low, high = ((size - 1) // 2,) * 2 if padding is None else padding
    kernel = p("weight", size, size, x.shape[-1], features)
    return _add_bias(p, conv(x, kernel, stride=stride, padding=((low, high), (low, high))))


def doubled_convolve(
    p: Weights, x: Float[Array, "h w i"], features: int, size: tuple[int, int]
) -> Float[Array, "p q o"]:
    """Enlarge to ``size`` by repeating the nearest pixel, then a 3 x 3 convolution with bias."""
    if size != (2 * x.shape[0], 2 * x.shape[1]):
        return convolve(p, nearest(x, size), features)
    return _add_bias(p, doubled_conv(x, p("weight", 3, 3, x.shape[-1], features)))


def nearest(x: Float[Array, "h w c"], size: tuple[int, int]) -> Float[Array, "p q c"]:
    """Enlarge an image: row i of the result is row floor(i h / p), columns likewise."""
    rows, columns = (np.arange(m) * n // m for m, n in zip(size, x.shape, strict=False))
    return x[rows][:, columns]


def halve(x: Float[Array, "h w c"]) -> Float[Array, "p q c"]:
    """Means of 2 x 2 pixels; sides must be even."""
    h, w, c = x.shape
    return x.reshape(h // 2, 2, w // 2, 2, c).mean((1, 3))


def _add_bias(p: Weights, y: Float[Array, "*n o"]) -> Float[Array, "*n o"]:
    return y + _along_last(p("bias", y.shape[-1]), y.ndim)


def _along_last(a: Float[Array, "c"], ndim: int) -> Float[Array, "..."]:
    return a.reshape((1,) * (ndim - 1) + a.shape)


def _affine(p: Weights, h: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    scale, shift = (_along_last(p(name, h.shape[-1]), h.ndim) for name in ("weight", "bias"))
    return h * scale + shift


def group_norm(
    p: Weights, x: Float[Array, "h w c"], groups: int, eps: float | int
) -> Float[Array, "h w c"]:
    """Group normalization, then a learned scale and shift."""
    return _affine(p, group_normalize(x.astype(_wide(x.dtype)), groups, eps).astype(x.dtype))


def standardize(x: Float[Array, "*n c"], eps: float | int) -> Float[Array, "*n c"]:
    """Zero mean and unit variance along the last axis."""
    wide = x.astype(_wide(x.dtype))
    centered = wide - wide.mean(-1, keepdims=True)
    h = centered * jax.lax.rsqrt((centered * centered).mean(-1, keepdims=True) + eps)
    return h.astype(x.dtype)


def layer_norm(p: Weights, x: Float[Array, "n c"], eps: float | int = 1e-5) -> Float[Array, "n c"]:
    """Zero mean and unit variance of each row, then a learned scale and shift."""
    return _affine(p, standardize(x, eps))


def rms_norm(p: Weights, x: Float[Array, "*n c"], eps: float | int) -> Float[Array, "*n c"]:
    """Unit mean square along the last axis, then a learned scale; no mean is removed."""
    wide = x.astype(_wide(x.dtype))
    h = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + eps)
    return h.astype(x.dtype) * _along_last(p("weight", x.shape[-1]), x.ndim)


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which ``rotate`` turns n rows."""

    cosines: Float[Array, "n 1 k"]
    sines: Float[Array, "n 1 k"]


def rotation(places: np.ndarray, widths: tuple[int, ...], dtype: DTypeLike) -> Rotation:
    """A rotary embedding of places on several axes, each with its own part of a head.

        angle_ik = places_ia 10000^(-2k / widths_a),    k = 0 .. widths_a/2 - 1

    The angles are formed in double precision on the host, so that their cosines are exact in any
    dtype at any place; these are in float32 at least.

    Args:
        places: [n, axes], known when the network is traced.
        widths: of the parts of a head, one for each axis, all even.
        dtype: of what will be rotated.
    """
    parts = []
    for place, width in zip(places.T.astype(np.float64), widths, strict=True):
        frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)
        parts.append(np.outer(place, frequencies))
    angles = np.concatenate(parts, axis=-1)[:, None]
    return Rotation(*(jnp.asarray(f(angles), _wide(dtype)) for f in (np.cos, np.sin)))


def rotate(x: Float[Array, "n h c"], turn: Rotation) -> Float[Array, "n h c"]:
    """Turn the pairs (0, 1), (2, 3), ... of the last axis, each in its plane."""
    pairs = x.reshape(*x.shape[:-1], -1, 2).astype(turn.cosines.dtype)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = (a * turn.cosines - b * turn.sines, b * turn.cosines + a * turn.sines)
    return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)


def attention(
    q: Float[Array, "n c"],
    k: Float[Array, "m c"],
    v: Float[Array, "m c"],
    heads: int,
    *,
    causal: bool = False,
    bias: Float[Array, "h n m"] | None = None,
) -> Float[Array, "n c"]:
    """softmax(q k^T / sqrt(c/heads)) v in each of ``heads`` parts of the channels.

    With a bias, as the T5 encoder has it: softmax(q k^T + bias) v.
    """
    if q.shape[-1] % heads:
        raise InputError(f"heads: expected a divisor of {q.shape[-1]} channels, got {heads}")
    q, k, v = (a.reshape(a.shape[0], heads, -1) for a in (q, k, v))
    logits = jnp.einsum("qhd,khd->hqk", q, k, precision="highest")
    logits = logits / math.sqrt(q.shape[-1]) if bias is None else logits + bias
    if causal:
        seen = np.tril(np.ones((1, *logits.shape[1:]), bool))
        logits = jnp.where(seen, logits, -jnp.inf)
    share = jax.nn.softmax(logits.astype(_wide(v.dtype)), axis=-1).astype(v.dtype)
    out = jnp.einsum("hqk,khd->qhd", share, v, precision="highest")
    return out.reshape(out.shape[0], -1)


def attend(
    p: Weights,
    x: Float[Array, "n c"],
    context: Float[Array, "m e"],
    heads: int,
    width: int,
    *,
    bias: bool,
) -> Float[Array, "n c"]:
    """Attention of the rows of x to those of ``context``, projected to ``width`` and back."""
    q = linear(p / "to_q", x, width, bias=bias)
    k, v = (linear(p / name, context, width, bias=bias) for name in ("to_k", "to_v"))
    return linear(p / "to_out" / 0, attention(q, k, v, heads), x.shape[-1])


def perceptron(
    p: Weights, x: Float[Array, "i"], width: int, activation: Activation
) -> Float[Array, "o"]:
    """Two dense layers of one width, made for the embeddings of times."""
    h = activate(activation, linear(p / "linear_1", x, width))
    return linear(p / "linear_2", h, width)


class TimeFeatures(NamedTuple):
    """Sines and cosines of a time at geometrically spaced frequencies.

        f_k = 10000^(-k / (half - shift)),    k = 0 .. half - 1,    half = width // 2

    The frequencies are rounded to float32, as those that networks were trained with, whatever
    the precision of the angles.

    Attributes:
        width: number of features; the last is zero where it is odd.
        cosines_first: otherwise the sines come first.
        shift: 0 or 1 in published models.
    """

    width: int
    cosines_first: bool
    shift: float | int

    def __call__(self, t: Shaped[Array, ""], dtype: DTypeLike) -> Float[Array, "w"]:
        """The features of t in this dtype; angles are formed in float32 at least."""
        half = self.width // 2
        if half <= self.shift:
            raise InputError(f"freq_shift: expected less than {half}, got {self.shift}")
        steps = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
        frequencies = np.exp((steps / np.float32(half - self.shift)).astype(np.float64))
        wide = _wide(dtype)
        angles = t.astype(wide) * jnp.asarray(frequencies.astype(np.float32)).astype(wide)
        parts = [jnp.sin(angles), jnp.cos(angles)]
        features = jnp.concatenate(parts[::-1] if self.cosines_first else parts)
        return jnp.pad(features, (0, self.width % 2)).astype(dtype)


def row(table: Float[Array, "n c"], index: Int[Array, "*k"]) -> Float[Array, "*k c"]:
    """Rows of an embedding table; NaN for an index outside 0..n - 1."""
    return table.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def self_attention_2d(
    p: Weights,
    x: Float[Array, "h w c"],
    *,
    head_width: int | None,
    groups: int | None,
    eps: float | int,
    scale: float | int = 1,
) -> Float[Array, "h w c"]:
    """Self-attention of the pixels with its residual: (x + attention(norm(x)))/scale.

    Args:
        p: its weights.
        x: one image.
        head_width: channels of a head; None for one head.
        groups: of the normalization; None for none.
        eps: of the normalization.
        scale: divides the sum.
    """
    channels = x.shape[-1]
    head_width = channels if head_width is None else head_width
    heads = channels // head_width
    if not heads:
        raise InputError(
            f"attention_head_dim: expected at most {channels} channels, got {head_width}"
        )
    h = x if groups is None else group_norm(p / "group_norm", x, groups, eps)
    h = h.reshape(-1, channels)
    h = attend(p, h, h, heads, heads * head_width, bias=True)
    return (x + h.reshape(x.shape)) / scale


def transformer_2d(
    p: Weights,
    x: Float[Array, "h w c"],
    context: Float[Array, "m e"],
    *,
    heads: int,
    depth: int,
    groups: int,
    linear_projection: bool,
) -> Float[Array, "h w c"]:
    """A transformer over the pixels that attends to a text, with its residual.

    Args:
        p: its weights.
        x: one image.
        context: hidden states of the text.
        heads: of every attention.
        depth: number of blocks: attention to the pixels, to the context, and a gated layer.
        groups: of the normalization.
        linear_projection: the projections in and out are dense layers, not 1 x 1 convolutions.
    """
    *sides, channels = x.shape
    width = channels // heads * heads
    h = group_norm(p / "norm", x, groups, 1e-6)
    project = linear if linear_projection else pointwise
    h = project(p / "proj_in", h, width).reshape(-1, width)
    for k in range(depth):
        h = _transformer_block(p / "transformer_blocks" / k, h, context, heads)
    return x + project(p / "proj_out", h.reshape(*sides, width), channels)


def _transformer_block(
    p: Weights, h: Float[Array, "n c"], context: Float[Array, "m e"], heads: int
) -> Float[Array, "n c"]:
    width = h.shape[-1]
    z = layer_norm(p / "norm1", h)
    h = h + attend(p / "attn1", z, z, heads, width, bias=False)
    z = layer_norm(p / "norm2", h)
    h = h + attend(p / "attn2", z, context, heads, width, bias=False)
    z = linear(p / "ff" / "net" / 0 / "proj", layer_norm(p / "norm3", h), 8 * width)
    value, gate = jnp.split(z, 2, axis=-1)
    return h + linear(p / "ff" / "net" / 2, value * activate("gelu", gate), width)
