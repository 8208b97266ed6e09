"""The pixel-space U-Net of diffusers, from its own weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from memjax._core.errors import InputError
from memjax.networks._blocks import (
    Level,
    Style,
    check_levels,
    check_sides,
    same_channels,
    unet,
)
from memjax.networks._layers import TimeFeatures, perceptron, row, self_attention_2d
from memjax.networks._weights import Leaf, Weights, check_all_used, current_names, read_options

_Activation = Literal["silu", "swish", "mish", "gelu", "relu"]
_Down = Literal[
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "UNetResDownBlock2D",
    "UNetResAttnDownBlock2D",
]
_Up = Literal[
    "UpBlock2D",
    "AttnUpBlock2D",
    "ResnetUpsampleBlock2D",
    "UNetResUpBlock2D",
    "UNetResAttnUpBlock2D",
]


class UNet2DOptions(NamedTuple):
    """Options of ``config.json``, with their defaults and the values that are supported."""

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[_Down, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    up_block_types: tuple[_Up, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: Literal[0, 1] = 1
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    dropout: float = 0
    act_fn: _Activation = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    class_embed_type: Literal["timestep"] | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None


class UNet2DModel(eqx.Module):
    """The pixel-space U-Net of diffusers (``UNet2DModel``), on one image, channels last.

    It is called as ``network(x_t, network_time, condition)`` and gives what it was trained to
    predict, so it enters a score through ``from_prediction``. Where the variance is learned (twice
    the channels in the output), the first half is kept: the prediction of the mean.

    Attributes:
        weights: arrays under the names of the file (kernels as [height, width, in, out], all else
            as in the file); the leaves of this pytree.
        options: of ``config.json``, defaults filled in. Static.

    Not supported, and refused by name: Fourier and learned embeddings of time and the blocks of
    NCSN++ (``Skip``), spatial normalization, K blocks.

    References:
        Ho, Jain, Abbeel (2020), arXiv:2006.11239, Appendix B; Nichol, Dhariwal (2021),
        arXiv:2102.09672 (learned variance, scale and shift); von Platen et al. (2022), diffusers,
        https://github.com/huggingface/diffusers.
    """

    weights: dict[str, Leaf]
    options: UNet2DOptions = eqx.field(static=True)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Leaf], config: Mapping[str, Any]) -> "UNet2DModel":
        """The network of these weights, once every array is known to be used.

        Args:
            weights: by name; or their ``jax.ShapeDtypeStruct`` alone, to see whether they fit.
                The attention layers' old names (``query``, ``proj_attn``) are understood.
            config: the content of ``config.json``; options that it lacks have the class's
                defaults.

        Returns:
            The network.

        Raises:
            InputError: an option is unknown or not supported, or an array is missing, has
                another shape, or is used nowhere.

        >>> try:
        ...     UNet2DModel.from_weights({}, {"time_embedding_type": "fourier"})
        ... except InputError as error:
        ...     print(str(error).split(";")[0])
        time_embedding_type: expected 'positional' for UNet2DModel, got 'fourier'
        """
        options = read_options(UNet2DOptions, config, "UNet2DModel")
        check_levels(options.block_out_channels, options.down_block_types, options.up_block_types)
        same_channels(options.in_channels, options.out_channels)
        network = cls(current_names(weights), options)

        def run(weights):
            side = 2 ** (len(options.block_out_channels) - 1)
            x = jnp.zeros((side, side, options.in_channels), jnp.float32)
            label = jnp.int32(0) if network._labeled else None
            return network.run(weights, x, jnp.float32(0), label)

        check_all_used("UNet2DModel", network.weights, run)
        return network

    @property
    def _labeled(self) -> bool:
        return (
            self.options.class_embed_type is not None or self.options.num_class_embeds is not None
        )

    def __call__(
        self,
        x: Float[Array, "h w c"],
        t: Shaped[Array, ""] | float | int,
        condition: Shaped[Array, ""] | None = None,
    ) -> Float[Array, "h w c"]:
        """The prediction at one image, computed in the dtype of x whatever that of the weights.

        Args:
            x: x_t, sides divisible by 2^(levels - 1).
            t: the time as the network knows it, 0..999 in most; may be fractional.
            condition: index of a class, or a number where ``class_embed_type`` is
                ``"timestep"``; None for a network without classes.

        Returns:
            The prediction, of the shape and dtype of x. All NaN for an index that is no class.

        Raises:
            InputError: sides do not fit, channels are not the network's, or a condition is
                missing or superfluous.
        """
        return self.run(Weights(self.weights, x.dtype), x, jnp.asarray(t), condition)

    def run(
        self,
        p: Weights,
        x: Float[Array, "h w c"],
        t: Shaped[Array, ""],
        condition: Shaped[Array, ""] | None,
    ) -> Float[Array, "h w c"]:
        """As the call, with weights from elsewhere."""
        o = self.options
        levels = len(o.block_out_channels)
        check_sides(x.shape, 2 ** (levels - 1))
        if x.shape[-1] != o.in_channels:
            raise InputError(f"x: expected {o.in_channels} channels, got {x.shape[-1]}")
        if o.center_input_sample:
            x = 2 * x - 1
        style = Style(
            o.act_fn, o.norm_num_groups, o.norm_eps, o.resnet_time_scale_shift == "scale_shift"
        )
        attend = partial(
            self_attention_2d,
            head_width=o.attention_head_dim,
            groups=o.norm_num_groups,
            eps=o.norm_eps,
        )

        def level(kind, channels, layers, last, how):
            kind = kind.removeprefix("UNetRes")
            attention = "Attn" in kind
            if not attention:
                how = "resnet" if kind.startswith("Resnet") else "conv"
            return Level(channels, (attend if attention else None,) * layers, None if last else how)

        def levels_of(kinds, channels, layers, how):
            pairs = enumerate(zip(kinds, channels, strict=True), start=1)
            return [level(kind, c, layers, i == levels, how) for i, (kind, c) in pairs]

        n = o.layers_per_block
        bottom = None
        if o.mid_block_type is not None:
            groups = self._bottom_groups(style)
            at_bottom = partial(attend, groups=groups, scale=o.mid_block_scale_factor)
            bottom = [at_bottom if o.add_attention else None]
        out = unet(
            p,
            x,
            self._embedding(p, x.dtype, t, condition),
            down=levels_of(o.down_block_types, o.block_out_channels, n, o.downsample_type),
            bottom=bottom,
            up=levels_of(o.up_block_types, o.block_out_channels[::-1], n + 1, o.upsample_type),
            style=style,
            bottom_scale=o.mid_block_scale_factor,
            downsample_padding=o.downsample_padding,
            out_channels=o.out_channels,
            out_activation="silu",
        )
        return out[..., : o.in_channels]

    def _bottom_groups(self, style: Style) -> int | None:
        """The middle's attention alone is not normalized where its blocks scale and shift."""
        if self.options.attn_norm_num_groups is not None:
            return self.options.attn_norm_num_groups
        return None if style.scale_shift else style.groups

    def _embedding(self, p, dtype, t, condition):
        """Of the time and the class; always with SiLU, whatever the blocks' activation."""
        o = self.options
        if self._labeled != (condition is not None):
            expected = "the label of a class" if self._labeled else "None, there are no classes"
            raise InputError(f"condition: expected {expected}, got {condition!r}")
        width = o.time_embedding_dim or 4 * o.block_out_channels[0]
        features = TimeFeatures(o.block_out_channels[0], o.flip_sin_to_cos, o.freq_shift)
        embedding = perceptron(p / "time_embedding", features(t, dtype), width, "silu")
        if not self._labeled:
            return embedding
        p = p / "class_embedding"
        if o.class_embed_type == "timestep":
            return embedding + perceptron(p, features(condition, dtype), width, "silu")
        return embedding + row(p("weight", o.num_class_embeds, width), condition)
