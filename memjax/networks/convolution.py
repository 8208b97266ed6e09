"""The one convolution of every network: as fast transposed, and inside loops, as it is forward.

XLA's CPU backend runs a convolution fast when image, kernel and output are laid out channels
last. The derivatives that `jax.lax.conv_general_dilated` asks for are not: reversed kernels and
permuted axes, which cost 2 to 500 times a forward convolution inside ``scan``, ``while`` and
``fori`` bodies. Both derivatives of a convolution are convolutions themselves:

    y[o] = sum_i  x[stride o + i - low] k[i]
    dx   = convolution of dy, dilated by the stride, with k flipped and its channels exchanged
    dk   = convolution of x by dy, the batch axis taking the part of the input channels

So one bilinear primitive with strides and dilations, of a kernel as it is or flipped, is closed
under transposition in both of its arguments, and always lowers to the fast layout; on a CPU
without the multiplications by the zeros of a dilated image, and with a kernel that is flipped once
before a loop rather than at every turn. Being a primitive of JAX rather than a ``custom_vjp``, it
has a jvp, can be linearised, transposed, mapped and differentiated again.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from memjax._core.errors import InputError

Padding = Literal["SAME"] | tuple[tuple[int, int], tuple[int, int]]


def conv(
    x: Float[Array, "*batch h w c"],
    kernel: Float[Array, "kh kw c k"],
    *,
    stride: int = 1,
    padding: Padding = "SAME",
) -> Float[Array, "*batch p q k"]:
    """Convolve images with a kernel, as networks mean it (no flip): channels last throughout.

        y[p, q, k] = sum_ijc  x[stride p + i - low_h, stride q + j - low_w, c] kernel[i, j, c, k]

    with zeros outside the image. Equal to ``jax.lax.conv_general_dilated`` with ``NHWC``,
    ``HWIO``, ``NHWC`` and precision "highest", in value and in every derivative.

    Args:
        x: one image, or images with any leading axes.
        kernel: weights in the dtype of x. Sizes are static.
        stride: of both axes, static, at least 1.
        padding: ``"SAME"``, so that the output has ceil(size / stride) rows and columns (an odd
            total puts the extra row below, as in TensorFlow), or explicit
            ``((low_h, high_h), (low_w, high_w))``. Static.

    Returns:
        The images, with the leading axes of x and as many channels as the kernel's last axis.

    Raises:
        InputError: ranks, channels or dtypes do not fit, the stride is not positive, or nothing
            is left of the image.

    Accuracy: that of a matrix product in the dtype of x, without TF32 or bfloat16 passes.
    Cost: jvp and both transposed products take about the time of the forward convolution, in
    loops as outside; a loop of transposed products keeps a flipped copy of its fixed kernels.
    Under ``vmap`` over images, or over kernels at fixed images, it stays one
    convolution; over both (an ensemble, gradients per example) it runs one member at a time.

    >>> import jax.numpy as jnp
    >>> conv(jnp.ones((4, 4, 1)), jnp.ones((3, 3, 1, 2)), stride=2)[..., 0].tolist()
    [[9.0, 6.0], [6.0, 4.0]]
    """
    if x.ndim < 3 or kernel.ndim != 4 or kernel.shape[2] != x.shape[-1]:
        raise InputError(
            "x, kernel: expected [..., height, width, c] and [height, width, c, k], "
            f"got {list(x.shape)} and {list(kernel.shape)}"
        )
    if x.dtype != kernel.dtype:
        raise InputError(f"kernel: expected the dtype of x, {x.dtype}, got {kernel.dtype}")
    if stride < 1:
        raise InputError(f"stride: expected at least 1, got {stride}")
    if padding == "SAME":
        padding = (
            _same(x.shape[-3], kernel.shape[0], stride),
            _same(x.shape[-2], kernel.shape[1], stride),
        )
    sizes = zip(x.shape[-3:-1], kernel.shape[:2], padding, strict=True)
    if any(size + sum(pad) < taps for size, taps, pad in sizes):
        raise InputError(
            f"padding: expected the padded image to hold the kernel {list(kernel.shape[:2])}, "
            f"got image {list(x.shape[-3:-1])} with padding {padding}"
        )
    flat = x.reshape(-1, *x.shape[-3:])
    out = _bind(flat, kernel, stride=stride, padding=padding, x_dilation=1, kernel_dilation=1)
    return out.reshape(*x.shape[:-3], *out.shape[1:])


def doubled_conv(
    x: Float[Array, "*batch h w c"], kernel: Float[Array, "kh kw c k"]
) -> Float[Array, "*batch p q k"]:
    """Double every pixel of images along both axes, then convolve with a 3 x 3 kernel.

    Equal to ``conv(repeat(repeat(x, 2, rows), 2, columns), kernel)`` up to rounding: a doubled
    pixel is multiplied once, by the sum of the kernel entries that meet it. The output's even
    rows see the rows (i - 1, i) with the kernel's (k_0, k_1 + k_2), its odd rows (i, i + 1) with
    (k_0 + k_1, k_2), and columns likewise: four 2 x 2 convolutions of the small image.

    Args:
        x: one image, or images with any leading axes.
        kernel: weights in the dtype of x.

    Returns:
        Images of twice the height and width.

    Raises:
        InputError: as for ``conv``, or the kernel is not 3 x 3.

    Cost: 16/36 of the multiplications of the convolution of the doubled image.

    References:
        Shi et al. (2016), arXiv:1609.05158 (convolution at the low resolution).
    """
    if kernel.shape[:2] != (3, 3):
        raise InputError(f"kernel: expected [3, 3, c, k], got {list(kernel.shape)}")

    def halved(kernel, axis, odd):
        a, b, c = jnp.split(kernel, 3, axis=axis)
        return jnp.concatenate([a + b, c] if odd else [a, b + c], axis=axis)

    def part(i, j):
        taps = halved(halved(kernel, 0, i), 1, j)
        return conv(x, taps, padding=((1 - i, i), (1 - j, j)))

    return _interleave(part, 2)


def _same(size: int, taps: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + taps - size, 0)
    return total // 2, total - total // 2


# The primitive: x [n, h, w, c], kernel [kh, kw, c, k] (flipped: [kh, kw, k, c]) -> [n, p, q, k].

conv_p = Primitive("memjax_conv")


def _bind(x, kernel, *, stride, padding, x_dilation, kernel_dilation, flipped=False):
    padding = tuple((int(low), int(high)) for low, high in padding)
    return conv_p.bind(
        x,
        kernel,
        stride=stride,
        padding=padding,
        x_dilation=x_dilation,
        kernel_dilation=kernel_dilation,
        flipped=flipped,
    )


def _flip(kernel):
    """The kernel of the transposed convolution. Its own inverse."""
    return jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)


def _evaluate(x, kernel, *, stride, padding, x_dilation, kernel_dilation, flipped=False):
    return jax.lax.conv_general_dilated(
        x,
        _flip(kernel) if flipped else kernel,
        window_strides=(stride, stride),
        padding=padding,
        lhs_dilation=(x_dilation, x_dilation),
        rhs_dilation=(kernel_dilation, kernel_dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


def _evaluate_on_cpu(x, kernel, *, flipped, **params):
    if flipped:
        # By itself XLA leaves reversals and transpositions in a loop, however fixed the kernel:
        # a third of a product on two small images. A barrier it moves out, with what it needs.
        kernel = jax.lax.optimization_barrier(_flip(kernel))
    return _evaluate_by_phase(x, kernel, **params)


def _evaluate_by_phase(x, kernel, *, stride, padding, x_dilation, kernel_dilation):
    """Without multiplying the zeros between the pixels of a dilated image.

    Every x_dilation-th row (column) of the output meets the same subset of the kernel's rows, so
    that each phase is a small convolution of the image itself.
    """
    if x_dilation == 1 or stride > 1 or kernel_dilation > 1:
        return _evaluate(
            x,
            kernel,
            stride=stride,
            padding=padding,
            x_dilation=x_dilation,
            kernel_dilation=kernel_dilation,
        )
    shape = [
        _extent(size, x_dilation) + sum(pad) - taps + 1
        for size, taps, pad in zip(x.shape[1:3], kernel.shape, padding, strict=False)
    ]
    counts = [-(-n // x_dilation) for n in shape]

    def window(phase, size, taps, low, count):
        """First row of the kernel that this phase meets, and the padding of its convolution."""
        first = (low - phase) % x_dilation
        start = (phase + first - low) // x_dilation
        rows = len(range(first, taps, x_dilation))
        return first, rows, (-start, start + count + rows - 1 - size)

    def part(*phases):
        (i, rows, pad_h), (j, columns, pad_w) = (
            window(phase, size, taps, low, count)
            for phase, size, taps, (low, _), count in zip(
                phases, x.shape[1:3], kernel.shape, padding, counts, strict=False
            )
        )
        if not (rows and columns):
            return jnp.zeros((len(x), *counts, kernel.shape[3]), x.dtype)
        taps = kernel[i::x_dilation, j::x_dilation]
        return _evaluate(x, taps, stride=1, padding=(pad_h, pad_w), x_dilation=1, kernel_dilation=1)

    return _interleave(part, x_dilation)[:, : shape[0], : shape[1]]


def _interleave(
    part: Callable[[int, int], Float[Array, "*batch h w k"]], steps: int
) -> Float[Array, "*batch p q k"]:
    """The image whose rows i, i + steps, ... and columns j, j + steps, ... are ``part(i, j)``."""
    phases = range(steps)
    rows = [jnp.stack([part(i, j) for j in phases], axis=-2) for i in phases]
    out = jnp.stack(rows, axis=-4)  # [*batch, h, steps, w, steps, k]
    *batch, h, _, w, _, k = out.shape
    return out.reshape(*batch, steps * h, steps * w, k)


def _abstract(x, kernel, **params):
    shaped = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel)]
    out = jax.eval_shape(lambda *args: _evaluate(*args, **params), *shaped)
    return ShapedArray(out.shape, out.dtype)


def _extent(count: int, step: int) -> int:
    """Length covered by ``count`` points ``step`` apart."""
    return (count - 1) * step + 1


def _transpose_x(dy, x, kernel, *, stride, padding, x_dilation, kernel_dilation, flipped):
    def pad(size, taps, count, low):
        taps = _extent(taps, kernel_dilation)
        return taps - 1 - low, _extent(size, x_dilation) + low - _extent(count, stride)

    sizes = zip(x.aval.shape[1:3], kernel.shape, dy.shape[1:3], padding, strict=False)
    return _bind(
        dy,
        kernel,
        stride=x_dilation,
        padding=[pad(size, taps, count, low) for size, taps, count, (low, _) in sizes],
        x_dilation=stride,
        kernel_dilation=kernel_dilation,
        flipped=not flipped,
    )


def _transpose_kernel(dy, x, kernel, *, stride, padding, x_dilation, kernel_dilation, flipped):
    def pad(size, taps, count, low):
        taps = _extent(taps, kernel_dilation)
        return low, taps - 1 + _extent(count, stride) - _extent(size, x_dilation) - low

    sizes = zip(x.shape[1:3], kernel.aval.shape, dy.shape[1:3], padding, strict=False)
    out = _bind(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        stride=kernel_dilation,
        padding=[pad(size, taps, count, low) for size, taps, count, (low, _) in sizes],
        x_dilation=x_dilation,
        kernel_dilation=stride,
    ).transpose(1, 2, 0, 3)
    return _flip(out) if flipped else out


def _batch(args, axes, **params):
    x, kernel = args
    x_axis, kernel_axis = axes
    if kernel_axis is None:
        x = jnp.moveaxis(x, x_axis, 0)
        out = _bind(x.reshape(-1, *x.shape[2:]), kernel, **params)
        return out.reshape(*x.shape[:2], *out.shape[1:]), 0
    if x_axis is None:
        axis = 2 if params["flipped"] else 3  # of the output's channels
        kernel = jnp.moveaxis(kernel, kernel_axis, axis)
        members = kernel.shape[axis : axis + 2]
        merged = kernel.reshape(*kernel.shape[:axis], -1, *kernel.shape[axis + 2 :])
        out = _bind(x, merged, **params)
        return out.reshape(*out.shape[:3], *members), 3
    members = jnp.moveaxis(x, x_axis, 0), jnp.moveaxis(kernel, kernel_axis, 0)
    return jax.lax.map(lambda member: _bind(*member, **params), members), 0


conv_p.def_impl(_evaluate)
conv_p.def_abstract_eval(_abstract)
mlir.register_lowering(conv_p, mlir.lower_fun(_evaluate, multiple_results=False))
mlir.register_lowering(
    conv_p, mlir.lower_fun(_evaluate_on_cpu, multiple_results=False), platform="cpu"
)
ad.defbilinear(conv_p, _transpose_x, _transpose_kernel)
batching.primitive_batchers[conv_p] = _batch
