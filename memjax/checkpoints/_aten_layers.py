"""PyTorch's layers in JAX: convolution, normalization, attention, pooling, resizing.

One rule an operator. Tensors come channels first, with a batch axis.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memjax._core.errors import InputError
from memjax.checkpoints._aten import matmul
from memjax.networks.convolution import conv
from memjax.networks.normalization import group_normalize


def _linear(x, weight, bias):
    y = jnp.einsum("...i,oi->...o", x, weight, precision="highest")
    return y if bias is None else y + bias


def _convolution(x, kernel, bias, stride, padding, dilation, transposed, extra, groups):
    """[n, c, *space] with [k, c / groups, *taps]; transposed: with [c, k / groups, *taps]."""
    space = x.ndim - 2
    stride, padding, dilation = (
        tuple(a) * (space if len(a) == 1 else 1) for a in (stride, padding, dilation)
    )
    x = jnp.moveaxis(x, 1, -1)
    pads = [(p, p) for p in padding]
    if transposed:
        # The convolution of the image with stride - 1 zeros between its pixels, taps reversed.
        reach = [d * (n - 1) for d, n in zip(dilation, kernel.shape[2:], strict=True)]
        pads = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
        kernel = jnp.flip(kernel, range(2, kernel.ndim))
        kernel = kernel.reshape(groups, -1, *kernel.shape[1:]).swapaxes(1, 2)
        kernel = kernel.reshape(-1, *kernel.shape[2:])
    kernel = kernel.transpose(*range(2, kernel.ndim), 1, 0)
    if (
        not transposed
        and groups == 1
        and space < 3
        and set(dilation) == {1}
        and len(set(stride)) == 1
    ):
        if space == 1:
            x, kernel, pads = x[:, :, None], kernel[:, None], [*pads, (0, 0)]
        y = conv(x, kernel, stride=stride[0], padding=(pads[0], pads[1]))
        y = y.reshape(len(y), *y.shape[1 : space + 1], -1)
    else:
        letters = "DHW"[3 - space :]
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1,) * space if transposed else stride,
            padding=pads,
            lhs_dilation=stride if transposed else (1,) * space,
            rhs_dilation=dilation,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            feature_group_count=groups,
            precision="highest",
        )
    return jnp.moveaxis(y if bias is None else y + bias, -1, 1)


def _normalized(x: Array, axes: Sequence[int], eps: float) -> tuple[Array, Array, Array]:
    """Zero mean and unit variance along the axes; the mean, and by how much it was scaled."""
    mean = x.mean(axes, keepdims=True)
    centered = x - mean
    scale = jax.lax.rsqrt(jnp.square(centered).mean(axes, keepdims=True) + eps)
    return centered * scale, mean, scale


def _affine(x: Array, weight: Array | None, bias: Array | None, after: int = 0) -> Array:
    """Scaled and shifted along the axes before the last ``after``."""
    weight, bias = (p if p is None else p.reshape(*p.shape, *[1] * after) for p in (weight, bias))
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _group_norm(x, groups, weight, bias, eps, *_):
    images = jnp.moveaxis(x.reshape(*x.shape[:2], *x.shape[2:3], -1), 1, -1)
    h = jax.vmap(lambda image: group_normalize(image, groups, eps))(images)
    return _affine(jnp.moveaxis(h, -1, 1).reshape(x.shape), weight, bias, x.ndim - 2)


def _native_group_norm(x, weight, bias, n, channels, size, groups, eps):
    grouped = x.reshape(n, groups, -1)
    _, mean, scale = _normalized(grouped, (-1,), eps)
    return _group_norm(x, groups, weight, bias, eps), mean[..., 0], scale[..., 0]


def _native_layer_norm(x, shape, weight, bias, eps):
    h, mean, scale = _normalized(x, tuple(range(-len(shape), 0)), eps)
    return _affine(h, weight, bias), mean, scale


def _rms_norm(x, shape, weight, eps):
    eps = float(jnp.finfo(x.dtype).eps) if eps is None else eps
    square = jnp.square(x).mean(tuple(range(-len(shape), 0)), keepdims=True)
    return _affine(x * jax.lax.rsqrt(square + eps), weight, None)


def _batch_norm(x, weight, bias, mean, variance, momentum, eps):
    """With running statistics, as in evaluation."""
    after = x.ndim - 2
    h = _affine(x, None, -mean, after)
    h = _affine(h, jax.lax.rsqrt(variance + eps), None, after)
    return _affine(h, weight, bias, after), mean[:0], mean[:0]


def _batch_norm_no_stats(x, weight, bias, training, momentum, eps):
    h, mean, scale = _normalized(x, (0, *range(2, x.ndim)), eps)
    return _affine(h, weight, bias, x.ndim - 2), mean.reshape(-1), scale.reshape(-1)


def _attention(q, k, v, mask, dropout, causal, scale, grouped=False):
    if dropout:
        raise InputError("module: expected no dropout in evaluation, got attention with dropout")
    if grouped:
        k, v = (jnp.repeat(a, q.shape[-3] // k.shape[-3], axis=-3) for a in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = matmul(q * scale, jnp.swapaxes(k, -1, -2))
    if causal:
        mask = jnp.tri(*logits.shape[-2:], dtype=bool)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf) if mask.dtype == bool else logits + mask
    return matmul(jax.nn.softmax(logits, axis=-1), v)


def _windows(x: Array, taps, stride, padding, init, reduce: Callable) -> Array:
    lead = (1,) * (x.ndim - len(taps))
    pads = [(0, 0)] * len(lead) + [(p, p) for p in padding]
    strides = (*lead, *(stride or taps))
    return jax.lax.reduce_window(
        x, np.asarray(init, x.dtype), reduce, (*lead, *taps), strides, pads
    )


def _average_pool(x, taps, stride, padding, ceil, count_padding, divisor=None):
    if ceil:
        raise InputError("avg_pool: expected ceil_mode=False")
    total = _windows(x, taps, stride, padding, 0, jax.lax.add)
    if divisor is None and not count_padding and any(padding):
        return total / _windows(jnp.ones_like(x), taps, stride, padding, 0, jax.lax.add)
    return total / (divisor or math.prod(taps))


def _adaptive_average_pool(x, size):
    """The mean over size[i] windows an axis, which may overlap by one row."""
    for axis, out in enumerate(size, start=x.ndim - len(size)):
        n = x.shape[axis]
        i, j = np.arange(out)[:, None], np.arange(n)
        inside = (i * n // out <= j) & (j < -(-(i + 1) * n // out))
        x = _along(x, axis, inside / inside.sum(1, keepdims=True))
    return x


def _max_pool(x, taps, stride, padding, dilation, ceil):
    if ceil or set(dilation) != {1}:
        raise InputError("max_pool: expected ceil_mode=False and dilation=1")
    return _windows(x, taps, stride, padding, -np.inf, jax.lax.max), None


def _along(x: Array, axis: int, matrix: np.ndarray) -> Array:
    """A matrix [out, in] applied along one axis."""
    moved = jnp.moveaxis(x, axis, -1)
    return jnp.moveaxis(matmul(moved, jnp.asarray(matrix.T, x.dtype)), -1, axis)


def _sizes(x: Array, size, scales) -> list[tuple[int, int, float]]:
    """Per axis of space: its size, the new one, and pixels of the old image a new pixel."""
    old = x.shape[2:]
    if scales is None:
        return [(n, m, n / m) for n, m in zip(old, size, strict=True)]
    return [(n, math.floor(n * s), 1 / s) for n, s in zip(old, scales, strict=True)]


def _nearest(shift: float) -> Callable:
    """The pixel at or left of (i + shift) n / m, for each new pixel i."""

    def resize(x, size, scales):
        for axis, (n, m, step) in enumerate(_sizes(x, size, scales), start=2):
            if m == n * round(1 / step) and abs(m * step - n) < 1e-6 * n:
                x = jnp.repeat(x, m // n, axis=axis)
                continue
            source = np.floor((np.arange(m, dtype=np.float32) + shift) * np.float32(step))
            x = jnp.take(x, np.minimum(source.astype(int), n - 1), axis=axis)
        return x

    return resize


def _bilinear(x, size, corners, scales):
    for axis, (n, m, step) in enumerate(_sizes(x, size, scales), start=2):
        i = np.arange(m)
        source = i * (n - 1) / max(m - 1, 1) if corners else (i + 0.5) * step - 0.5
        # A hat of width one about each old pixel; beyond the outermost, these.
        hats = np.maximum(1 - abs(np.clip(source, 0, n - 1)[:, None] - np.arange(n)), 0)
        x = _along(x, axis, hats)
    return x


def _embedding(weight: Float[Array, "n d"], index, *_):
    return weight[index]


RULES: dict[str, Callable] = {
    "linear": _linear,
    "embedding": _embedding,
    "convolution": _convolution,
    "group_norm": _group_norm,
    "native_group_norm": _native_group_norm,
    "layer_norm": lambda x, shape, weight, bias, eps, *_: _native_layer_norm(
        x, shape, weight, bias, eps
    )[0],
    "native_layer_norm": _native_layer_norm,
    "rms_norm": _rms_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_native_batch_norm_legit.no_stats": _batch_norm_no_stats,
    "scaled_dot_product_attention": _attention,
    "avg_pool1d": _average_pool,
    "avg_pool2d": _average_pool,
    "avg_pool3d": _average_pool,
    "adaptive_avg_pool1d": _adaptive_average_pool,
    "adaptive_avg_pool2d": _adaptive_average_pool,
    "max_pool2d_with_indices": _max_pool,
    **{f"upsample_nearest{n}d.vec": _nearest(0.0) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d.vec": _nearest(0.5) for n in (1, 2, 3)},
    "upsample_linear1d.vec": _bilinear,
    "upsample_bilinear2d.vec": _bilinear,
    "upsample_trilinear3d.vec": _bilinear,
}
