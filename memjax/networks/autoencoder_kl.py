"""The autoencoder between images and the latents of Stable Diffusion, from its own weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax._core.errors import InputError
from memjax.networks._blocks import (
    Style,
    check_levels,
    downsample,
    middle,
    resnet,
    upsample,
)
from memjax.networks._layers import (
    activate,
    convolve,
    group_norm,
    pointwise,
    self_attention_2d,
)
from memjax.networks._weights import Leaf, Weights, check_all_used, current_names, read_options

_EPS = 1e-6


class AutoencoderKLOptions(NamedTuple):
    """Options of ``config.json``, with their defaults and the values that are supported."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class AutoencoderKL(eqx.Module):
    """The variational autoencoder of Stable Diffusion (``AutoencoderKL``), channels last.

    Attributes:
        weights: arrays under the names of the file (kernels as [height, width, in, out], all else
            as in the file); the leaves of this pytree.
        options: of ``config.json``, defaults filled in. Static. The scaling of latents
            (``scaling_factor``, ``shift_factor``) is left to the caller.

    References:
        Kingma, Welling (2014), arXiv:1312.6114; Rombach et al. (2022), arXiv:2112.10752,
        section 3.1; von Platen et al. (2022), diffusers,
        https://github.com/huggingface/diffusers.
    """

    weights: dict[str, Leaf]
    options: AutoencoderKLOptions = eqx.field(static=True)

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Leaf], config: Mapping[str, Any]
    ) -> "AutoencoderKL":
        """The autoencoder of these weights, once every array is known to be used.

        Args:
            weights: by name; or their ``jax.ShapeDtypeStruct`` alone, to see whether they fit.
                The attention layers' old names (``query``, ``proj_attn``) are understood.
            config: the content of ``config.json``; options that it lacks have the class's
                defaults.

        Returns:
            The autoencoder.

        Raises:
            InputError: an option is unknown or not supported, or an array is missing, has
                another shape, or is used nowhere.

        >>> try:
        ...     AutoencoderKL.from_weights({}, {"down_block_types": ["AttnDownEncoderBlock2D"]})
        ... except InputError as error:
        ...     print(str(error).split(",")[0])
        down_block_types: expected a list of ('DownEncoderBlock2D') for AutoencoderKL
        """
        options = read_options(AutoencoderKLOptions, config, "AutoencoderKL")
        check_levels(options.block_out_channels, options.down_block_types, options.up_block_types)
        vae = cls(current_names(weights), options)

        def run(weights):
            side = 2 ** (len(options.block_out_channels) - 1)
            x = jnp.zeros((side, side, options.in_channels), jnp.float32)
            return vae._decode(weights, vae._encode(weights, x)[0])

        check_all_used("AutoencoderKL", vae.weights, run)
        return vae

    def encode(
        self, image: Float[Array, "h w c"]
    ) -> tuple[Float[Array, "p q k"], Float[Array, "p q k"]]:
        """Mean and log-variance of the latents of one image: E(x) and log diag Cov.

        Args:
            image: values in [-1, 1].

        Returns:
            The mean, before any scaling, and the logarithm of the variance, clipped to [-30, 20]
            as in diffusers; computed in the dtype of the image.

        Raises:
            InputError: channels are not the encoder's.
        """
        return self._encode(Weights(self.weights, image.dtype), image)

    def decode(self, latent: Float[Array, "p q k"]) -> Float[Array, "h w c"]:
        """The image of one latent, unclipped.

        Args:
            latent: as ``encode`` gives it, any scaling undone.

        Returns:
            The image, values about [-1, 1]; computed in the dtype of the latent.

        Raises:
            InputError: channels are not the decoder's.
        """
        return self._decode(Weights(self.weights, latent.dtype), latent)

    def _encode(self, p, x):
        o = self.options
        _check_channels("image", x, o.in_channels)
        h = convolve(p / "encoder" / "conv_in", x, o.block_out_channels[0])
        for i, channels in enumerate(o.block_out_channels):
            block = p / "encoder" / "down_blocks" / i
            for j in range(o.layers_per_block):
                h = resnet(block / "resnets" / j, h, None, channels, self._style)
            if i < len(o.block_out_channels) - 1:
                h = downsample(block / "downsamplers" / 0, h, padding=0)
        h = self._middle(p / "encoder" / "mid_block", h)
        moments = self._out(p / "encoder", h, 2 * o.latent_channels)
        if o.use_quant_conv:
            moments = pointwise(p / "quant_conv", moments, 2 * o.latent_channels)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def _decode(self, p, z):
        o = self.options
        _check_channels("latent", z, o.latent_channels)
        if o.use_post_quant_conv:
            z = pointwise(p / "post_quant_conv", z, o.latent_channels)
        h = convolve(p / "decoder" / "conv_in", z, o.block_out_channels[-1])
        h = self._middle(p / "decoder" / "mid_block", h)
        for i, channels in enumerate(o.block_out_channels[::-1]):
            block = p / "decoder" / "up_blocks" / i
            for j in range(o.layers_per_block + 1):
                h = resnet(block / "resnets" / j, h, None, channels, self._style)
            if i < len(o.block_out_channels) - 1:
                h = upsample(block / "upsamplers" / 0, h)
        return self._out(p / "decoder", h, o.out_channels)

    @property
    def _style(self) -> Style:
        return Style(self.options.act_fn, self.options.norm_num_groups, _EPS)

    def _middle(self, p, h):
        attend = partial(
            self_attention_2d, head_width=None, groups=self.options.norm_num_groups, eps=_EPS
        )
        attend = attend if self.options.mid_block_add_attention else None
        return middle(p, h, None, [attend], self._style)

    def _out(self, p, h, channels):
        h = group_norm(p / "conv_norm_out", h, self.options.norm_num_groups, _EPS)
        return convolve(p / "conv_out", activate("silu", h), channels)


def _check_channels(name: str, x: Float[Array, "h w c"], channels: int) -> None:
    if x.shape[-1] != channels:
        raise InputError(f"{name}: expected {channels} channels, got {x.shape[-1]}")
