"""Prompts to conditions: a folder's own tokenizers and text encoders."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from memjax._core.errors import CheckpointError, InputError
from memjax.checkpoints._layout import Layout, blamed_on, image_sides, recognize
from memjax.checkpoints._safetensors import read_json, read_weights, weight_shapes
from memjax.checkpoints._tokenizers import ClipTokenizer, T5Tokenizer
from memjax.networks.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from memjax.networks.flux import NO_GUIDANCE
from memjax.networks.t5_encoder import T5EncoderModel, T5EncoderOptions
from memjax.networks.unet2d_condition import TextCondition

_CLIP = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}
_ENCODERS = {**_CLIP, "T5EncoderModel": T5EncoderModel}
_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")


class _TextEncoder(NamedTuple):
    """One of the pipeline's pairs of tokenizer and text encoder."""

    tokenizer: ClipTokenizer | T5Tokenizer
    model: CLIPTextModel | T5EncoderModel
    digest: str


class PromptEncoder:
    """Turns prompts into conditions as a pipeline of diffusers does; made by ``load_prompts``.

    Attributes:
        null: the condition of "no prompt": the empty prompt, or zeros where the pipeline says so
            (``force_zeros_for_empty_prompt``, as Stable Diffusion XL does).
        sha256: name and SHA-256 of the weights of every text encoder.
    """

    def __init__(
        self,
        parts: dict[str, _TextEncoder],
        join: Callable[[tuple], TextCondition],
        zeros: bool,
    ):
        self._parts = parts
        self._join = join
        self.sha256 = tuple((name, part.digest) for name, part in parts.items())
        self.null = self("")
        if zeros:
            pooled = self.null.pooled
            self.null = self.null._replace(
                hidden_states=jnp.zeros_like(self.null.hidden_states),
                pooled=None if pooled is None else jnp.zeros_like(pooled),
            )

    def tokenize(self, prompts: str | Sequence[str]) -> tuple[Int[np.ndarray, "..."], ...]:
        """Token ids for every text encoder: [tokens] of one prompt, [n, tokens] of several.

        Raises:
            MissingExtraError: the ``prompts`` extra is not installed.
        """
        if isinstance(prompts, str):
            return tuple(part.tokenizer(prompts) for part in self._parts.values())
        if not prompts:
            raise InputError("prompts: expected at least one, got none")
        rows = [self.tokenize(prompt) for prompt in prompts]
        return tuple(np.stack(column) for column in zip(*rows, strict=True))

    def __call__(self, prompts: str | Sequence[str]) -> TextCondition:
        """The condition of one prompt, or of several with a leading axis.

        Args:
            prompts: text, cut where it is longer than the text encoder takes (75 words and pieces
                of words for Stable Diffusion, 511 for Flux).

        Raises:
            InputError: no prompt.
            MissingExtraError: the ``prompts`` extra is not installed.
        """
        ids = self.tokenize(prompts)
        batch = tuple(jnp.atleast_2d(jnp.asarray(column)) for column in ids)
        found = _encode(tuple(part.model for part in self._parts.values()), batch)
        condition = self._join(found)
        if not isinstance(prompts, str):
            return condition
        return jax.tree.map(lambda leaf: leaf[0], condition)


@jax.jit
def _encode(models: tuple, ids: tuple[Int[Array, "n _"], ...]) -> tuple:
    return tuple(jax.vmap(model)(rows) for model, rows in zip(models, ids, strict=True))


def _stable_diffusion(found: tuple) -> TextCondition:
    return TextCondition(found[-1].last)


def _stable_diffusion_xl(found: tuple, *, time_ids: tuple[int, ...]) -> TextCondition:
    """The layer before the last of both encoders, and the second one's projection."""
    hidden = jnp.concatenate([out.penultimate for out in found], axis=-1)
    times = jnp.asarray(time_ids, hidden.dtype).reshape(1, -1)
    return TextCondition(hidden, found[-1].pooled, jnp.tile(times, (len(hidden), 1)))


def _flux(found: tuple, *, guided: bool) -> TextCondition:
    """The hidden states of T5, the row of CLIP's that ends the text, and guidance 1 for dev."""
    clip, t5 = found
    guidance = jnp.full(len(t5), NO_GUIDANCE, jnp.float32) if guided else None
    return TextCondition(t5, clip.pooled, guidance=guidance)


def load_prompts(
    path: str | os.PathLike, *, variant: str | None = None, dtype: Any = jnp.float32
) -> PromptEncoder:
    """Load what turns prompts into the conditions of a pipeline's score.

    The result is apart from the model of ``memjax.load``, whose weights are those of the score
    alone: text is encoded once, before anything is computed with it. A condition computed
    elsewhere is a ``memjax.networks.TextCondition`` of the arrays, a class label an int32 array.

    Args:
        path: folder of a diffusers pipeline with ``CLIPTextModel`` and ``CLIPTokenizer`` in it,
            one of each (Stable Diffusion 1.x and 2.x) or two (XL), or with ``T5EncoderModel`` and
            ``T5TokenizerFast`` as the second (Flux).
        variant: of the weights' files, such as ``"fp16"``.
        dtype: of the weights and of the conditions.

    Returns:
        A callable: a prompt to its condition, a list of n prompts to conditions with a leading
        axis of n; with the null condition as an attribute.

    Raises:
        CheckpointError: no such folder, or a part of it is missing, damaged or of another kind.

    The library ``tokenizers`` (extra ``prompts``) is needed at the first prompt that is not empty.
    Text that is longer than the encoder takes is cut, as in diffusers. The prompts of no one leave
    this machine.

    Cost: seconds and half a gigabyte for Stable Diffusion 1.x; twenty gigabytes for Flux, whose T5
    has 4.8 billion weights, and half of it with ``dtype=jnp.bfloat16``.

    References:
        Radford et al. (2021), arXiv:2103.00020; Podell et al. (2023), arXiv:2307.01952; Raffel et
        al. (2020), arXiv:1910.10683; Black Forest Labs (2024), FLUX,
        https://github.com/black-forest-labs/flux.
    """
    layout = recognize(Path(path))
    if not any(name.startswith("text_encoder") for name in layout.parts()):
        raise CheckpointError(f"{layout.root}: expected a pipeline with a text_encoder, found none")
    return read_prompts(layout, variant=variant, dtype=dtype)


def read_prompts(layout: Layout, *, variant: str | None, dtype: Any) -> PromptEncoder:
    """``load_prompts`` of a folder that has been looked at."""
    listed = layout.parts()
    if "text_encoder_3" in listed or layout.index.get("requires_aesthetics_score"):
        raise CheckpointError(
            f"{layout.root}: expected the text encoders of Stable Diffusion 1.x, 2.x, XL's base "
            "model or Flux, found others; compute its conditions elsewhere and load the network "
            "alone"
        )
    flux = listed.get("text_encoder_2") == "T5EncoderModel"
    if flux:
        kinds = {"text_encoder": ("CLIPTextModel",), "text_encoder_2": ("T5EncoderModel",)}
    else:
        names = [name for name in ("text_encoder", "text_encoder_2") if name in listed]
        kinds = dict.fromkeys(names, tuple(_CLIP))
    parts = {
        name: _read_encoder(layout, name, kind, variant, dtype) for name, kind in kinds.items()
    }
    if flux:
        guided = bool(layout.config.get("guidance_embeds"))
        return PromptEncoder(parts, functools.partial(_flux, guided=guided), False)
    if layout.config.get("addition_embed_type") != "text_time":
        return PromptEncoder(parts, _stable_diffusion, False)
    join = functools.partial(_stable_diffusion_xl, time_ids=_time_ids(layout))
    return PromptEncoder(parts, join, bool(layout.index.get("force_zeros_for_empty_prompt")))


def _read_encoder(
    layout: Layout, name: str, kinds: tuple[str, ...], variant: str | None, dtype: Any
) -> _TextEncoder:
    tokenizer = name.replace("text_encoder", "tokenizer")
    for part in (name, tokenizer):
        if part not in layout.parts():
            raise CheckpointError(f"{layout.root}: expected a part {part!r}, found none")
    folder = layout.require(name, kinds)
    config = read_json(folder / "config.json")
    model = _ENCODERS[layout.parts()[name]]
    # What is quick to refuse comes before the weights, many gigabytes of T5.
    with blamed_on(folder / "config.json"):
        options = model.from_weights(weight_shapes(folder, "model", variant), config).options
    if isinstance(options, T5EncoderOptions):
        words = T5Tokenizer(layout.require(tokenizer, _T5_TOKENIZERS, None))
    else:
        longest = options.max_position_embeddings
        words = ClipTokenizer(layout.require(tokenizer, _CLIP_TOKENIZERS, None), longest)
    if words.largest >= options.vocab_size:
        raise CheckpointError(
            f"{words.folder}: expected ids below the text encoder's vocab_size = "
            f"{options.vocab_size}, found {words.largest}"
        )
    weights = read_weights(folder, "model", variant=variant, dtype=dtype)
    return _TextEncoder(words, model.from_weights(weights.arrays, config), weights.sha256)


def _time_ids(layout: Layout) -> tuple[int, ...]:
    """Size of the original, corner of the crop and size of the image: whole images, uncropped."""
    height, width = image_sides(layout)
    return (height, width, 0, 0, height, width)
