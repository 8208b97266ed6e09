"""The U that published U-Nets and autoencoders share: residual blocks, and changes of size."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax._core.errors import InputError
from memjax.networks._layers import (
    Activation,
    activate,
    convolve,
    doubled_convolve,
    group_norm,
    halve,
    linear,
    nearest,
    pointwise,
)
from memjax.networks._weights import WAY_OUT, Weights

Attend = Callable[[Weights, Float[Array, "h w c"]], Float[Array, "h w c"]]
Resample = Literal["conv", "resnet"] | None


class Style(NamedTuple):
    """What the residual blocks of one network have in common.

    Attributes:
        activation: by name.
        groups: of every normalization.
        eps: of every normalization.
        scale_shift: the embedding scales and shifts the second normalization, instead of being
            added before it.
    """

    activation: Activation
    groups: int
    eps: float | int
    scale_shift: bool = False


class Level(NamedTuple):
    """One resolution, on the way down or up.

    Attributes:
        channels: of all its blocks.
        attend: one entry for each residual block: the attention after it, or None.
        resample: how it ends: a change of size by a convolution, by a residual block, or none.
    """

    channels: int
    attend: tuple[Attend | None, ...]
    resample: Resample


def resnet(
    p: Weights,
    x: Float[Array, "h w i"],
    embedding: Float[Array, "e"] | None,
    channels: int,
    style: Style,
    *,
    scale: float | int = 1,
    resample: Literal["up", "down"] | None = None,
) -> Float[Array, "p q o"]:
    """A residual block, modulated by an embedding; it may halve or double the image inside."""
    h = activate(style.activation, group_norm(p / "norm1", x, style.groups, style.eps))
    if resample == "up":
        size = 2 * x.shape[0], 2 * x.shape[1]
        x, h = nearest(x, size), doubled_convolve(p / "conv1", h, channels, size)
    else:
        if resample == "down":
            x, h = halve(x), halve(h)
        h = convolve(p / "conv1", h, channels)
    if embedding is None:
        h = group_norm(p / "norm2", h, style.groups, style.eps)
    else:
        h = _modulated(p, h, embedding, style)
    h = convolve(p / "conv2", activate(style.activation, h), channels)
    if x.shape[-1] != channels:
        x = pointwise(p / "conv_shortcut", x, channels)
    return (x + h) / scale


def _modulated(
    p: Weights, h: Float[Array, "h w c"], embedding: Float[Array, "e"], style: Style
) -> Float[Array, "h w c"]:
    features = h.shape[-1] * (2 if style.scale_shift else 1)
    e = linear(p / "time_emb_proj", activate(style.activation, embedding), features)
    if not style.scale_shift:
        return group_norm(p / "norm2", h + e.reshape(1, 1, -1), style.groups, style.eps)
    scale, shift = jnp.split(e.reshape(1, 1, -1), 2, axis=-1)
    return group_norm(p / "norm2", h, style.groups, style.eps) * (1 + scale) + shift


def downsample(p: Weights, x: Float[Array, "h w c"], padding: int) -> Float[Array, "p q c"]:
    """A convolution of stride 2; without padding, a row and a column of zeros at the far ends."""
    low, high = (0, 1) if padding == 0 else (padding, padding)
    return convolve(p / "conv", x, x.shape[-1], stride=2, padding=(low, high))


def upsample(
    p: Weights, x: Float[Array, "h w c"], size: Sequence[int] | None = None
) -> Float[Array, "p q c"]:
    """Enlarge to ``size``, twice the image's own by default, then convolve."""
    height, width = (2 * x.shape[0], 2 * x.shape[1]) if size is None else size
    return doubled_convolve(p / "conv", x, x.shape[-1], (height, width))


def middle(
    p: Weights,
    h: Float[Array, "h w c"],
    embedding: Float[Array, "e"] | None,
    attend: Sequence[Attend | None],
    style: Style,
    *,
    scale: float | int = 1,
) -> Float[Array, "h w c"]:
    """A residual block, then for each entry its attention and another residual block."""
    h = resnet(p / "resnets" / 0, h, embedding, h.shape[-1], style, scale=scale)
    for j, attention in enumerate(attend):
        if attention is not None:
            h = attention(p / "attentions" / j, h)
        h = resnet(p / "resnets" / (j + 1), h, embedding, h.shape[-1], style, scale=scale)
    return h


def unet(
    p: Weights,
    x: Float[Array, "h w c"],
    embedding: Float[Array, "e"],
    *,
    down: Sequence[Level],
    bottom: Sequence[Attend | None] | None,
    up: Sequence[Level],
    style: Style,
    bottom_scale: float | int,
    downsample_padding: int,
    out_channels: int,
    out_activation: Activation,
    kernel_sizes: tuple[int, int] = (3, 3),
) -> Float[Array, "h w k"]:
    """The whole U: every image of the way down is concatenated on the way up.

    Args:
        p: weights of the network.
        x: one image.
        embedding: of the time and of conditions.
        down: levels from the finest.
        bottom: attentions of the middle; None where there is no middle.
        up: levels from the coarsest.
        style: of all residual blocks.
        bottom_scale: divides the sums of the middle's blocks.
        downsample_padding: see ``downsample``.
        out_channels: of the result.
        out_activation: before the last convolution.
        kernel_sizes: of the first and the last convolution.
    """
    h = convolve(p / "conv_in", x, down[0].channels, size=kernel_sizes[0])
    skips = [h]
    for i, level in enumerate(down):
        block = p / "down_blocks" / i
        for j, attend in enumerate(level.attend):
            h = _step(block, j, h, embedding, level, style, attend)
            skips.append(h)
        if level.resample is not None:
            sampler = block / "downsamplers" / 0
            if level.resample == "conv":
                h = downsample(sampler, h, downsample_padding)
            else:
                h = resnet(sampler, h, embedding, level.channels, style, resample="down")
            skips.append(h)
    if bottom is not None:
        h = middle(p / "mid_block", h, embedding, bottom, style, scale=bottom_scale)
    for i, level in enumerate(up):
        block = p / "up_blocks" / i
        for j, attend in enumerate(level.attend):
            h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = _step(block, j, h, embedding, level, style, attend)
        if level.resample is not None:
            sampler = block / "upsamplers" / 0
            if level.resample == "conv":
                h = upsample(sampler, h, skips[-1].shape[:2])
            else:
                h = resnet(sampler, h, embedding, level.channels, style, resample="up")
    h = group_norm(p / "conv_norm_out", h, style.groups, style.eps)
    h = activate(out_activation, h)
    return convolve(p / "conv_out", h, out_channels, size=kernel_sizes[1])


def _step(block, j, h, embedding, level, style, attend):
    h = resnet(block / "resnets" / j, h, embedding, level.channels, style)
    return h if attend is None else attend(block / "attentions" / j, h)


def check_sides(shape: tuple[int, ...], factor: int) -> None:
    """Refuse an image whose sides cannot be halved as often as the network does."""
    if shape[0] % factor or shape[1] % factor:
        raise InputError(f"x: expected sides divisible by {factor}, got {list(shape[:2])}")


def check_levels(channels: Sequence[int], down: Sequence[str], up: Sequence[str]) -> None:
    """Refuse lists of unequal or no length."""
    if not channels or not len(channels) == len(down) == len(up):
        raise InputError(
            "down_block_types, up_block_types: expected one for each of block_out_channels = "
            f"{list(channels)}, got {len(down)} and {len(up)}"
        )


def same_channels(in_channels: int, out_channels: int) -> None:
    """Refuse a network whose output is not like its input, or its mean and variance."""
    if out_channels not in (in_channels, 2 * in_channels):
        raise InputError(
            f"out_channels: expected in_channels = {in_channels}, or twice as many where the "
            f"variance is learned, got {out_channels}; {WAY_OUT}"
        )
