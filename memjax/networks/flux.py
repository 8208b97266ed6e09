"""The transformer of Flux, from its own weights."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from memjax._core.errors import InputError
from memjax.networks._blocks import check_sides
from memjax.networks._layers import (
    Rotation,
    TimeFeatures,
    attention,
    linear,
    perceptron,
    rms_norm,
    rotate,
    rotation,
    standardize,
)
from memjax.networks._weights import WAY_OUT, Leaf, Weights, check_all_used, read_options
from memjax.networks.unet2d_condition import TextCondition

PATCH = 2
"""Pixels of the latent on a side of what becomes one token."""

NO_GUIDANCE = 1.0
"""The strength that stands for none: the text-conditional velocity itself, not pushed further."""

_EPS = 1e-6
_TIMES = TimeFeatures(256, cosines_first=True, shift=0)


class FluxOptions(NamedTuple):
    """Options of ``config.json``, with their defaults and the values that are supported."""

    patch_size: Literal[1] = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)


class FluxTransformer2DModel(eqx.Module):
    """The transformer of Flux as diffusers has it (``FluxTransformer2DModel``), channels last.

    It is called as ``network(x_t, network_time, condition)`` on one latent and gives the velocity
    that it was trained to predict, so it enters a score through ``from_prediction``. What the
    pipeline of diffusers does around its own network is done here: each 2 x 2 pixels of the latent
    become one token (channel by channel, rows within, as in ``_pack_latents``), its row and column
    are the token's place, and tokens become pixels again. The time is in thousandths, as
    ``FlowMatching`` with ``time_scale=1000`` gives it.

    Attributes:
        weights: arrays under the names of the file; the leaves of this pytree.
        options: of ``config.json``, defaults filled in. Static.

    Networks with ``guidance_embeds`` (Flux dev) are told how strong the guidance is that they
    imitate. Where ``condition.guidance`` is None it is 1, no guidance: of what such a network
    knows, the nearest to the score of what it was trained on. The pipeline of diffusers draws at
    3.5 unless told otherwise. Refused are channels that go in and do not come out (fill, depth,
    canny) and ``patch_size`` other than 1.

    References:
        Black Forest Labs (2024), Flux, https://github.com/black-forest-labs/flux;
        Esser et al. (2024), arXiv:2403.03206, section 4 (two streams); Su et al. (2021),
        arXiv:2104.09864, section 3.4.2 (rotary embedding); von Platen et al. (2022), diffusers,
        https://github.com/huggingface/diffusers.
    """

    weights: dict[str, Leaf]
    options: FluxOptions = eqx.field(static=True)

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Leaf], config: Mapping[str, Any]
    ) -> "FluxTransformer2DModel":
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
        ...     FluxTransformer2DModel.from_weights({}, {"patch_size": 2})
        ... except InputError as error:
        ...     print(str(error).split(";")[0])
        patch_size: expected 1 for FluxTransformer2DModel, got 2
        """
        model = "FluxTransformer2DModel"
        options = read_options(FluxOptions, config, model)
        _check_widths(options)
        network = cls(dict(weights), options)

        def run(weights):
            x = jnp.zeros((PATCH, PATCH, network.channels), jnp.float32)
            text = jnp.zeros((1, options.joint_attention_dim), jnp.float32)
            pooled = jnp.zeros(options.pooled_projection_dim, jnp.float32)
            return network._run(weights, x, jnp.float32(0), TextCondition(text, pooled))

        check_all_used(model, network.weights, run)
        return network

    @property
    def channels(self) -> int:
        """Of the latent."""
        return self.options.in_channels // PATCH**2

    def __call__(
        self,
        x: Float[Array, "h w c"],
        t: Shaped[Array, ""] | float | int,
        condition: PyTree = None,
    ) -> Float[Array, "h w c"]:
        """The velocity at one latent, computed in the dtype of x whatever that of the weights.

        Args:
            x: x_t, with sides divisible by 2.
            t: the time as the network knows it, 0..1000; may be fractional.
            condition: the text, a ``TextCondition`` with ``pooled``, and with ``guidance`` where
                the network takes it and another strength than 1 is meant.

        Returns:
            The velocity, of the shape and dtype of x.

        Raises:
            InputError: sides or channels do not fit, the condition is not a ``TextCondition``,
                or its parts are missing, superfluous or of another width.
        """
        return self._run(Weights(self.weights, x.dtype), x, jnp.asarray(t), condition)

    def _run(self, p, x, t, condition):
        o = self.options
        if x.shape[-1] != self.channels:
            raise InputError(f"x: expected {self.channels} channels, got {x.shape[-1]}")
        check_sides(x.shape, PATCH)
        self._check_condition(condition)
        d = o.num_attention_heads * o.attention_head_dim
        h = linear(p / "x_embedder", _pack(x), d)
        text = linear(p / "context_embedder", condition.hidden_states.astype(x.dtype), d)
        embedding = jax.nn.silu(self._embedding(p / "time_text_embed", x.dtype, t, condition, d))
        n = len(text)
        places = _places(n, x.shape[0] // PATCH, x.shape[1] // PATCH)
        turn = rotation(places, o.axes_dims_rope, x.dtype)
        for i in range(o.num_layers):
            h, text = self._double_block(p / "transformer_blocks" / i, h, text, embedding, turn)
        h = jnp.concatenate([text, h])
        for i in range(o.num_single_layers):
            h = self._single_block(p / "single_transformer_blocks" / i, h, embedding, turn)
        scale, shift = _modulation(p / "norm_out", embedding, 2)
        h = _adapted(h[n:], shift, scale)
        return _unpack(linear(p / "proj_out", h, o.in_channels), x.shape)

    def _check_condition(self, condition: PyTree) -> None:
        o = self.options
        if not isinstance(condition, TextCondition):
            raise InputError(f"condition: expected a TextCondition, got {type(condition).__name__}")
        shape = condition.hidden_states.shape
        if len(shape) != 2 or shape[1] != o.joint_attention_dim:
            raise InputError(
                f"condition: expected hidden_states of shape [tokens, {o.joint_attention_dim}], "
                f"got {list(shape)}"
            )
        found = None if condition.pooled is None else list(condition.pooled.shape)
        if found != [o.pooled_projection_dim]:
            raise InputError(
                f"condition: expected pooled of shape [{o.pooled_projection_dim}], got {found}"
            )
        unknown = ["time_ids"] if o.guidance_embeds else ["time_ids", "guidance"]
        for name in unknown:
            if getattr(condition, name) is not None:
                raise InputError(f"condition: expected None as {name} for this network")

    def _embedding(self, p, dtype, t, condition, d):
        """Of the time, the whole text and, where the network is told it, the guidance."""
        e = perceptron(p / "timestep_embedder", _TIMES(t, dtype), d, "silu")
        if self.options.guidance_embeds:
            given = condition.guidance
            strength = jnp.asarray(NO_GUIDANCE if given is None else given)
            features = _TIMES(1000 * strength, dtype)
            e = e + perceptron(p / "guidance_embedder", features, d, "silu")
        return e + perceptron(p / "text_embedder", condition.pooled.astype(dtype), d, "silu")

    def _double_block(
        self,
        p: Weights,
        h: Float[Array, "n d"],
        text: Float[Array, "m d"],
        embedding: Float[Array, "d"],
        turn: Rotation,
    ) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
        """Image and text, each with its own layers, attend to both."""
        image_rows, text_rows = (
            _modulation(p / name, embedding, 6) for name in ("norm1", "norm1_context")
        )
        part = p / "attn"
        pairs = zip(
            self._projected(part, _adapted(text, *text_rows[:2]), "add_{}_proj", "norm_added_{}"),
            self._projected(part, _adapted(h, *image_rows[:2]), "to_{}", "norm_{}"),
            strict=True,
        )
        q, k, v = (jnp.concatenate(pair) for pair in pairs)
        out = self._attention(q, k, v, turn)
        out_text, out = out[: len(text)], out[len(text) :]
        d = h.shape[-1]
        h = h + image_rows[2] * linear(part / "to_out" / 0, out, d)
        h = h + image_rows[5] * _feed_forward(p / "ff", _adapted(h, *image_rows[3:5]))
        text = text + text_rows[2] * linear(part / "to_add_out", out_text, d)
        text = text + text_rows[5] * _feed_forward(
            p / "ff_context", _adapted(text, *text_rows[3:5])
        )
        return h, text

    def _single_block(
        self, p: Weights, h: Float[Array, "n d"], embedding: Float[Array, "d"], turn: Rotation
    ) -> Float[Array, "n d"]:
        """All tokens alike; the attention and the dense layer stand side by side."""
        shift, scale, gate = _modulation(p / "norm", embedding, 3)
        d = h.shape[-1]
        z = _adapted(h, shift, scale)
        out = self._attention(*self._projected(p / "attn", z, "to_{}", "norm_{}"), turn)
        dense = jax.nn.gelu(linear(p / "proj_mlp", z, 4 * d), approximate=True)
        return h + gate * linear(p / "proj_out", jnp.concatenate([out, dense], axis=-1), d)

    def _projected(
        self, p: Weights, x: Float[Array, "n d"], layer: str, norm: str
    ) -> tuple[Float[Array, "n h k"], Float[Array, "n h k"], Float[Array, "n d"]]:
        """Queries and keys, each of every head normalized, and values."""
        q, k, v = (linear(p / layer.format(name), x, x.shape[-1]) for name in "qkv")
        q, k = (a.reshape(len(x), self.options.num_attention_heads, -1) for a in (q, k))
        return rms_norm(p / norm.format("q"), q, _EPS), rms_norm(p / norm.format("k"), k, _EPS), v

    def _attention(
        self,
        q: Float[Array, "n h k"],
        k: Float[Array, "n h k"],
        v: Float[Array, "n d"],
        turn: Rotation,
    ) -> Float[Array, "n d"]:
        q, k = (rotate(a, turn).reshape(v.shape) for a in (q, k))
        return attention(q, k, v, self.options.num_attention_heads)


def _check_widths(o: FluxOptions) -> None:
    """Refuse channels in and out that differ or make no patches, and places that fill no head."""
    if o.in_channels % PATCH**2:
        raise InputError(f"in_channels: expected a multiple of {PATCH**2}, got {o.in_channels}")
    if o.out_channels not in (None, o.in_channels):
        raise InputError(
            f"out_channels: expected in_channels = {o.in_channels}, got {o.out_channels}; {WAY_OUT}"
        )
    axes = o.axes_dims_rope
    if len(axes) != 3 or any(axis % 2 for axis in axes) or sum(axes) != o.attention_head_dim:
        raise InputError(
            "axes_dims_rope: expected three even numbers whose sum is attention_head_dim = "
            f"{o.attention_head_dim}, got {list(axes)}; {WAY_OUT}"
        )


def _pack(x: Float[Array, "h w c"]) -> Float[Array, "n k"]:
    """A token for each 2 x 2 pixels: its channels one after another, each row by row."""
    h, w, c = x.shape
    patches = x.reshape(h // PATCH, PATCH, w // PATCH, PATCH, c)
    return patches.transpose(0, 2, 4, 1, 3).reshape(-1, PATCH**2 * c)


def _unpack(tokens: Float[Array, "n k"], shape: Sequence[int]) -> Float[Array, "h w c"]:
    h, w, c = shape
    patches = tokens.reshape(h // PATCH, w // PATCH, c, PATCH, PATCH)
    return patches.transpose(0, 3, 1, 4, 2).reshape(h, w, c)


def _places(num_text: int, height: int, width: int) -> np.ndarray:
    """0, row and column of every token, [n, 3]; the text, which comes first, is at the origin."""
    rows, columns = np.indices((height, width)).reshape(2, -1)
    image = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
    return np.concatenate([np.zeros((num_text, 3), image.dtype), image])


def _modulation(p: Weights, embedding: Float[Array, "d"], count: int) -> Float[Array, "m 1 d"]:
    """Rows that scale, shift and gate tokens, from the embedding after its activation."""
    width = embedding.shape[-1]
    return linear(p / "linear", embedding, count * width).reshape(count, 1, width)


def _adapted(
    h: Float[Array, "n d"], shift: Float[Array, "1 d"], scale: Float[Array, "1 d"]
) -> Float[Array, "n d"]:
    return standardize(h, _EPS) * (1 + scale) + shift


def _feed_forward(p: Weights, h: Float[Array, "n d"]) -> Float[Array, "n d"]:
    d = h.shape[-1]
    z = jax.nn.gelu(linear(p / "net" / 0 / "proj", h, 4 * d), approximate=True)
    return linear(p / "net" / 2, z, d)
