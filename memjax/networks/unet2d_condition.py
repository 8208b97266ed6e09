"""The text-conditional U-Net of Stable Diffusion 1.x, 2.x and XL, from its own weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from memjax._core.errors import InputError
from memjax.networks._blocks import (
    Attend,
    Level,
    Style,
    check_levels,
    check_sides,
    same_channels,
    unet,
)
from memjax.networks._layers import (
    TimeFeatures,
    linear,
    perceptron,
    self_attention_2d,
    transformer_2d,
)
from memjax.networks._weights import (
    WAY_OUT,
    Leaf,
    Weights,
    check_all_used,
    current_names,
    read_options,
)

_Activation = Literal["silu", "swish", "mish", "gelu", "relu"]
_Down = Literal["CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
_Up = Literal["CrossAttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]
_Depths = int | tuple[int | tuple[int, ...], ...]


class TextCondition(NamedTuple):
    """What a text-conditional network is told.

    Attributes:
        hidden_states: of the text encoder, one row a token.
        pooled: one vector for the whole text; Stable Diffusion XL and Flux alone take it.
        time_ids: original height and width, top and left of the crop, target height and width;
            Stable Diffusion XL alone takes them.
        guidance: the strength of guidance that a distilled network is to imitate; networks with
            ``time_cond_proj_dim`` (latent consistency models) or ``guidance_embeds`` (Flux dev)
            alone take it, and may be left without.
    """

    hidden_states: Float[Array, "*b n d"]
    pooled: Float[Array, "*b p"] | None = None
    time_ids: Float[Array, "*b k"] | None = None
    guidance: Float[Array, "*b"] | None = None


class UNet2DConditionOptions(NamedTuple):
    """Options of ``config.json``, with their defaults and the values that are supported."""

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[_Down, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] | None = (
        "UNetMidBlock2DCrossAttn"
    )
    up_block_types: tuple[_Up, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: Literal[False] | tuple[Literal[False], ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: Literal[0, 1] = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0
    act_fn: _Activation = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: _Depths = 1
    reverse_transformer_layers_per_block: _Depths | None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: None = None
    dual_cross_attention: Literal[False] = False
    use_linear_projection: bool = False
    class_embed_type: None = None
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    resnet_skip_time_act: Literal[False] = False
    resnet_out_scale_factor: Literal[1] = 1
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: None = None
    timestep_post_act: None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: Literal[1, 3, 5, 7] = 3
    conv_out_kernel: Literal[1, 3, 5, 7] = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    mid_block_only_cross_attention: Literal[False] | None = None
    cross_attention_norm: None = None
    addition_embed_type_num_heads: int = 64


class UNet2DConditionModel(eqx.Module):
    """The text-conditional U-Net of diffusers (``UNet2DConditionModel``), channels last.

    It is called as ``network(x_t, network_time, condition)`` with a ``TextCondition`` and gives
    what it was trained to predict, so it enters a score through ``from_prediction``. Where the
    variance is learned (twice the channels in the output), the first half is kept.

    Attributes:
        weights: arrays under the names of the file (kernels as [height, width, in, out], all else
            as in the file); the leaves of this pytree.
        options: of ``config.json``, defaults filled in. Static.

    ``attention_head_dim`` means the number of heads here, as in diffusers; ``upcast_attention``
    changes nothing, because attention is formed in float32 at least. Refused by name are, among
    others, ``only_cross_attention``, ``dual_cross_attention``, projected or image conditions,
    classes, and more channels in than out (inpainting, depth).

    References:
        Rombach et al. (2022), arXiv:2112.10752; Podell et al. (2023), arXiv:2307.01952 (XL);
        von Platen et al. (2022), diffusers, https://github.com/huggingface/diffusers.
    """

    weights: dict[str, Leaf]
    options: UNet2DConditionOptions = eqx.field(static=True)

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Leaf], config: Mapping[str, Any]
    ) -> "UNet2DConditionModel":
        """The network of these weights, once every array is known to be used.

        Args:
            weights: by name; or their ``jax.ShapeDtypeStruct`` alone, to see whether they fit.
            config: the content of ``config.json``; options that it lacks have the class's
                defaults.

        Returns:
            The network.

        Raises:
            InputError: an option is unknown or not supported, or an array is missing, has
                another shape, or is used nowhere.

        >>> try:
        ...     UNet2DConditionModel.from_weights({}, {"dual_cross_attention": True})
        ... except InputError as error:
        ...     print(str(error).split(";")[0])
        dual_cross_attention: expected False for UNet2DConditionModel, got True
        """
        model = "UNet2DConditionModel"
        options = read_options(UNet2DConditionOptions, config, model)
        check_levels(options.block_out_channels, options.down_block_types, options.up_block_types)
        same_channels(options.in_channels, options.out_channels)
        _check_lists(options)
        network = cls(current_names(weights), options)

        def run(weights):
            side = 2 ** (len(options.block_out_channels) - 1)
            x = jnp.zeros((side, side, options.in_channels), jnp.float32)
            return network._run(weights, x, jnp.float32(0), _some_condition(options))

        check_all_used(model, network.weights, run)
        return network

    def __call__(
        self,
        x: Float[Array, "h w c"],
        t: Shaped[Array, ""] | float | int,
        condition: PyTree = None,
    ) -> Float[Array, "h w c"]:
        """The prediction at one image, computed in the dtype of x whatever that of the weights.

        Args:
            x: x_t of any size; where blocks halve it by residual blocks, its sides must be
                divisible by 2^(levels - 1).
            t: the time as the network knows it, 0..999 in most; may be fractional.
            condition: the text, a ``TextCondition``.

        Returns:
            The prediction, of the shape and dtype of x.

        Raises:
            InputError: sides or channels do not fit, the condition is not a ``TextCondition``,
                or its parts are missing, superfluous or of another width.
        """
        return self._run(Weights(self.weights, x.dtype), x, jnp.asarray(t), condition)

    def _run(self, p, x, t, condition):
        o = self.options
        if x.shape[-1] != o.in_channels:
            raise InputError(f"x: expected {o.in_channels} channels, got {x.shape[-1]}")
        if "ResnetDownsampleBlock2D" in o.down_block_types:
            check_sides(x.shape, 2 ** (len(o.block_out_channels) - 1))
        self._check_condition(condition)
        if o.center_input_sample:
            x = 2 * x - 1
        embedding = self._embedding(p, x.dtype, t, condition)
        down, bottom, up = self._levels(condition.hidden_states.astype(x.dtype))
        out = unet(
            p,
            x,
            embedding,
            down=down,
            bottom=bottom,
            up=up,
            style=Style(
                o.act_fn, o.norm_num_groups, o.norm_eps, o.resnet_time_scale_shift == "scale_shift"
            ),
            bottom_scale=o.mid_block_scale_factor,
            downsample_padding=o.downsample_padding,
            out_channels=o.out_channels,
            out_activation=o.act_fn,
            kernel_sizes=(o.conv_in_kernel, o.conv_out_kernel),
        )
        return out[..., : o.in_channels]

    def _check_condition(self, condition: PyTree) -> None:
        o = self.options
        if not isinstance(condition, TextCondition):
            raise InputError(f"condition: expected a TextCondition, got {type(condition).__name__}")
        width = _each(o.cross_attention_dim, 1)[0]
        shape = condition.hidden_states.shape
        if len(shape) != 2 or shape[1] != width:
            raise InputError(
                f"condition: expected hidden_states of shape [tokens, {width}], got {list(shape)}"
            )
        if condition.guidance is not None and o.time_cond_proj_dim is None:
            raise InputError("condition: expected None as guidance for this network")
        wanted = o.addition_embed_type is not None
        for name in ("pooled", "time_ids"):
            if wanted != (getattr(condition, name) is not None):
                expected = "an array" if wanted else "None"
                raise InputError(f"condition: expected {expected} as {name} for this network")

    def _embedding(self, p, dtype, t, condition):
        """Of the time and, in Stable Diffusion XL, of the whole text and the sizes."""
        o = self.options
        width = o.time_embedding_dim or 4 * o.block_out_channels[0]
        features = TimeFeatures(o.block_out_channels[0], o.flip_sin_to_cos, o.freq_shift)
        p_time, times = p / "time_embedding", features(t, dtype)
        if o.time_cond_proj_dim is not None:
            strength = TimeFeatures(o.time_cond_proj_dim, cosines_first=False, shift=1)
            times = times + _guidance(p_time / "cond_proj", times, strength, condition.guidance)
        embedding = perceptron(p_time, times, width, o.act_fn)
        if o.addition_embed_type is None:
            return embedding
        features = features._replace(width=o.addition_time_embed_dim)
        sizes = jax.vmap(lambda number: features(number, dtype))(condition.time_ids)
        added = jnp.concatenate([condition.pooled.astype(dtype), sizes.reshape(-1)])
        return embedding + perceptron(p / "add_embedding", added, width, "silu")

    def _levels(
        self, text: Float[Array, "n d"]
    ) -> tuple[list[Level], list[Attend | None] | None, list[Level]]:
        """The ways down and up, and the attention of the middle between them."""
        o = self.options
        count = len(o.block_out_channels)
        heads = _each(o.attention_head_dim, count)
        layers = _each(o.layers_per_block, count)
        depths = _each(o.transformer_layers_per_block, count)
        back = o.reverse_transformer_layers_per_block
        depths_up = depths[::-1] if back is None else _each(back, count)

        def cross(heads, depth):
            return partial(
                transformer_2d,
                context=text,
                heads=heads,
                depth=depth,
                groups=o.norm_num_groups,
                linear_projection=o.use_linear_projection,
            )

        def level(kind, channels, layers, heads, depths, head_width, last):
            if kind.startswith("CrossAttn"):
                attend = [cross(heads, depth) for depth in _each(depths, layers)[:layers]]
            elif kind.startswith("Attn"):
                pixels = partial(
                    self_attention_2d,
                    head_width=head_width,
                    groups=o.norm_num_groups,
                    eps=o.norm_eps,
                )
                attend = [pixels] * layers
            else:
                attend = [None] * layers
            how = "resnet" if kind.startswith("Resnet") else "conv"
            return Level(channels, tuple(attend), None if last else how)

        last = [i == count - 1 for i in range(count)]
        down = zip(
            o.down_block_types,
            o.block_out_channels,
            layers,
            heads,
            depths,
            heads,
            last,
            strict=True,
        )
        # diffusers reverses the number of heads on the way up, but not their width.
        up = zip(
            o.up_block_types,
            o.block_out_channels[::-1],
            [n + 1 for n in layers[::-1]],
            heads[::-1],
            depths_up,
            heads,
            last,
            strict=True,
        )
        bottom = {
            None: None,
            "UNetMidBlock2D": [],
            "UNetMidBlock2DCrossAttn": [cross(heads[-1], _each(depths[-1], 1)[0])],
        }[o.mid_block_type]
        return [level(*args) for args in down], bottom, [level(*args) for args in up]


def _guidance(
    p: Weights,
    times: Float[Array, "w"],
    features: TimeFeatures,
    guidance: Float[Array, ""] | None,
) -> Float[Array, "w"]:
    """What the strength of guidance adds to the features of the time; zero without one."""
    if guidance is None:
        p("weight", times.size, features.width)  # the file has it
        return jnp.zeros_like(times)
    strength = features(1000 * jnp.asarray(guidance), times.dtype)
    return linear(p, strength, times.size, bias=False)


def _each(value: Any, count: int) -> tuple:
    """A list as it is, or a single value for each of ``count`` places."""
    return value if isinstance(value, tuple) else (value,) * count


def _check_lists(o: UNet2DConditionOptions) -> None:
    """Refuse lists of another length than levels or blocks, and options that go with others."""
    count = len(o.block_out_channels)
    layers = _each(o.layers_per_block, count)
    for name in (
        "layers_per_block",
        "attention_head_dim",
        "cross_attention_dim",
        "transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
    ):
        value = getattr(o, name)
        if isinstance(value, tuple) and len(value) != count:
            raise InputError(f"{name}: expected one for each of {count} levels, got {len(value)}")
    depths = _each(o.transformer_layers_per_block, count)
    back = o.reverse_transformer_layers_per_block
    nested = [depth for depth in depths if isinstance(depth, tuple)]
    if nested and back is None:
        raise InputError(
            "reverse_transformer_layers_per_block: expected a list where "
            "transformer_layers_per_block has lists, got None"
        )
    ways = [(depths, layers, 0)] + ([] if back is None else [(_each(back, count), layers[::-1], 1)])
    for depths, layers, more in ways:
        for depth, n in zip(depths, layers, strict=True):
            if isinstance(depth, tuple) and len(depth) < n + more:
                raise InputError(
                    f"transformer_layers_per_block: expected {n + more} depths, got {list(depth)}"
                )
    if len(set(_each(o.cross_attention_dim, count))) > 1:
        raise InputError(
            "cross_attention_dim: expected one width for all levels, "
            f"got {list(_each(o.cross_attention_dim, count))}; {WAY_OUT}"
        )


def _some_condition(o: UNet2DConditionOptions) -> TextCondition:
    """A condition of the right widths, for a trace."""
    hidden = jnp.zeros((1, _each(o.cross_attention_dim, 1)[0]), jnp.float32)
    if o.addition_embed_type is None:
        return TextCondition(hidden)
    total, width = o.projection_class_embeddings_input_dim or 0, o.addition_time_embed_dim or 0
    if not 0 < width < total:
        raise InputError(
            "addition_time_embed_dim: expected less than projection_class_embeddings_input_dim "
            f"= {total}, got {width}"
        )
    return TextCondition(hidden, jnp.zeros(total - width, jnp.float32), jnp.zeros(1, jnp.float32))
