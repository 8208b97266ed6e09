"""Prompts to conditions: a folder's own CLIP tokenizer and text encoders."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from memjax._core.errors import CheckpointError, InputError, require
from memjax._core.text import one_line
from memjax.checkpoints._layout import Layout, blamed_on, image_sides, recognize
from memjax.checkpoints._safetensors import open_inside, read_json, read_weights
from memjax.networks.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from memjax.networks.unet2d_condition import TextCondition

_ENCODERS = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_MAX_FILE_BYTES = 2**24
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# What CLIP splits a cleaned prompt into before byte-pair encoding.
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
    """The tokenizer in a folder, by the files that ``transformers`` reads.

    Text is brought to Unicode's composed form, its white space to single blanks, its letters to
    lower case; then split into words, digits and punctuation, and these by byte-pair encoding.
    The ids are those between a begin and an end token, cut or padded to one length.

    Args:
        folder: with ``vocab.json`` and ``merges.txt``, or ``tokenizer.json``; and, for the special
            tokens and the length, ``tokenizer_config.json`` and ``special_tokens_map.json``.
        longest: most tokens that the text encoder takes.

    Raises:
        CheckpointError: a file is missing or damaged, or a special token is no word of the
            vocabulary.

    References:
        Radford et al. (2021), arXiv:2103.00020; Sennrich, Haddow, Birch (2016), arXiv:1508.07909.
    """

    def __init__(self, folder: Path, longest: int = 77):
        self.folder = folder
        self._vocabulary, self._merges = _vocabulary(folder)
        self._special, length = _settings(folder)
        self.length = min(length, longest)
        for name, token in self._special.items():
            if token not in self._vocabulary:
                shown = one_line(repr(token), limit=80)
                raise CheckpointError(
                    f"{folder}: {name}: expected a word of the vocabulary, found {shown}"
                )
        self._encoder: Any = None

    @property
    def largest(self) -> int:
        """The largest id."""
        return max(self._vocabulary.values())

    def __call__(self, prompt: str) -> Int[np.ndarray, "n"]:
        """Ids of one prompt, int32, as many as the text encoder takes.

        A prompt that is longer keeps its first tokens, as in the pipelines of diffusers.

        Raises:
            MissingExtraError: the ``prompts`` extra is not installed (the empty prompt does not
                need it).
        """
        bos, eos, pad = (
            self._vocabulary[self._special[name]]
            for name in ("bos_token", "eos_token", "pad_token")
        )
        body = self._words(prompt)[: self.length - 2] if prompt.strip() else []
        ids = [bos, *body, eos]
        return np.array(ids + [pad] * (self.length - len(ids)), np.int32)

    def _words(self, prompt: str) -> list[int]:
        if self._encoder is None:
            self._encoder = self._build()
        return self._encoder.encode(prompt, add_special_tokens=False).ids

    def _build(self) -> Any:
        tokenizers = require("tokenizers", "prompts")
        normalizers, splitters = tokenizers.normalizers, tokenizers.pre_tokenizers
        try:
            model = tokenizers.models.BPE(
                vocab=self._vocabulary,
                merges=self._merges,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                fuse_unk=False,
                unk_token=self._special["unk_token"],
            )
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{self.folder}: merges: {one_line(str(error))}") from None
        encoder = tokenizers.Tokenizer(model)
        encoder.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Lowercase(),
            ]
        )
        encoder.pre_tokenizer = splitters.Sequence(
            [
                splitters.Split(tokenizers.Regex(_PIECES), behavior="removed", invert=True),
                splitters.ByteLevel(add_prefix_space=False),
            ]
        )
        # A special token in a prompt is that token; "!" where it pads (Stable Diffusion 2) too.
        special = dict.fromkeys(self._special.values())
        encoder.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
        return encoder


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of tokens, and the pairs that merge, in order."""
    whole = folder / "tokenizer.json"
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        file = folder / "vocab.json"
        vocabulary = read_json(file, limit=_MAX_FILE_BYTES)
        merges = _lines(folder / "merges.txt")
    elif whole.is_file():
        file = whole
        model = read_json(file, limit=_MAX_FILE_BYTES).get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise CheckpointError(f"{file}: model: expected byte-pair encoding, found another")
        vocabulary, merges = model.get("vocab"), model.get("merges")
    else:
        raise CheckpointError(
            f"{folder}: expected vocab.json and merges.txt, or tokenizer.json, found neither"
        )
    if not isinstance(vocabulary, dict) or not all(type(v) is int for v in vocabulary.values()):
        raise CheckpointError(f"{file}: expected an id for every token, found something else")
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges or ()]
    if not all(len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        raise CheckpointError(f"{folder}: expected merges of two tokens each, found others")
    return vocabulary, pairs  # pyright: ignore[reportReturnType]


def _lines(file: Path) -> list[str]:
    with open_inside(file, "the merges of a tokenizer") as stream:
        data = stream.read(_MAX_FILE_BYTES + 1)
    try:
        if len(data) > _MAX_FILE_BYTES:
            raise ValueError(f"more than {_MAX_FILE_BYTES} bytes")
        lines = data.decode().split("\n")
    except ValueError as error:
        raise CheckpointError(f"{file}: expected text, found: {one_line(str(error))}") from None
    start = 1 if lines[0].startswith("#version") else 0
    return [line for line in lines[start:] if line]


def _settings(folder: Path) -> tuple[dict[str, str], int]:
    """The special tokens, and the length that prompts are padded to."""
    special = dict.fromkeys(_SPECIAL, "<|endoftext|>") | {"bos_token": "<|startoftext|>"}
    file, length = folder / "tokenizer_config.json", 77
    config = read_json(file) if file.is_file() else {}
    given = [config]
    # Where the configuration lists the added tokens, the older file is not read.
    older = folder / "special_tokens_map.json"
    if older.is_file() and "added_tokens_decoder" not in config:
        given.append(read_json(older))
    for source in given:
        for name in _SPECIAL:
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[name] = token
    if isinstance(config.get("model_max_length"), int):
        length = config["model_max_length"]
    if length < 3:
        raise CheckpointError(f"{file}: model_max_length: expected at least 3, found {length}")
    return special, length


class _TextEncoder(NamedTuple):
    """One of the pipeline's pairs of tokenizer and text encoder."""

    tokenizer: ClipTokenizer
    model: Any
    digest: str


class PromptEncoder:
    """Turns prompts into conditions as a pipeline of diffusers does; made by ``load_prompts``.

    Attributes:
        null: the condition of "no prompt": the empty prompt, or zeros where the pipeline says so
            (``force_zeros_for_empty_prompt``, as Stable Diffusion XL does).
        sha256: name and SHA-256 of the weights of every text encoder.
    """

    def __init__(
        self, parts: dict[str, _TextEncoder], time_ids: tuple[int, ...] | None, zeros: bool
    ):
        self._parts = parts
        self._time_ids = time_ids
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
                of words for Stable Diffusion).

        Raises:
            InputError: no prompt.
            MissingExtraError: the ``prompts`` extra is not installed.
        """
        ids = self.tokenize(prompts)
        batch = tuple(jnp.atleast_2d(jnp.asarray(column)) for column in ids)
        found = _encode(tuple(part.model for part in self._parts.values()), batch)
        if self._time_ids is None:
            condition = TextCondition(found[-1].last)
        else:
            # Stable Diffusion XL: the layer before the last, and the second encoder's projection.
            hidden = jnp.concatenate([out.penultimate for out in found], axis=-1)
            times = jnp.asarray(self._time_ids, hidden.dtype)
            condition = TextCondition(
                hidden, found[-1].pooled, jnp.tile(times.reshape(1, -1), (len(hidden), 1))
            )
        if not isinstance(prompts, str):
            return condition
        return jax.tree.map(lambda leaf: leaf[0], condition)


@jax.jit
def _encode(models: tuple, ids: tuple[Int[Array, "n t"], ...]) -> tuple:
    return tuple(jax.vmap(model)(rows) for model, rows in zip(models, ids, strict=True))


def load_prompts(
    path: str | os.PathLike, *, variant: str | None = None, dtype: Any = jnp.float32
) -> PromptEncoder:
    """Load what turns prompts into the conditions of a pipeline's score.

    The result is apart from the model of ``memjax.load``, whose weights are those of the score
    alone: text is encoded once, before anything is computed with it. A condition computed
    elsewhere is a ``memjax.networks.TextCondition`` of the arrays, a class label an int32 array.

    Args:
        path: folder of a diffusers pipeline with ``CLIPTextModel`` and ``CLIPTokenizer`` in it,
            one of each (Stable Diffusion 1.x and 2.x) or two (XL).
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

    Cost: seconds and half a gigabyte for Stable Diffusion 1.x.

    References:
        Radford et al. (2021), arXiv:2103.00020; Podell et al. (2023), arXiv:2307.01952.
    """
    layout = recognize(Path(path))
    if not any(name.startswith("text_encoder") for name in layout.parts()):
        raise CheckpointError(f"{layout.root}: expected a pipeline with a text_encoder, found none")
    return read_prompts(layout, variant=variant, dtype=dtype)


def read_prompts(layout: Layout, *, variant: str | None, dtype: Any) -> PromptEncoder:
    """``load_prompts`` of a folder that has been looked at."""
    names = [name for name in ("text_encoder", "text_encoder_2") if name in layout.parts()]
    if "text_encoder_3" in layout.parts() or layout.index.get("requires_aesthetics_score"):
        raise CheckpointError(
            f"{layout.root}: expected the text encoders of Stable Diffusion 1.x, 2.x or XL's base "
            "model, found others; compute its conditions elsewhere and load the network alone"
        )
    parts = {name: _read_encoder(layout, name, variant, dtype) for name in names}
    large = layout.config.get("addition_embed_type") == "text_time"
    zeros = bool(layout.index.get("force_zeros_for_empty_prompt")) and large
    return PromptEncoder(parts, _time_ids(layout) if large else None, zeros)


def _read_encoder(layout: Layout, name: str, variant: str | None, dtype: Any) -> _TextEncoder:
    folder = layout.require(name, tuple(_ENCODERS))
    config = read_json(folder / "config.json")
    weights = read_weights(folder, "model", variant=variant, dtype=dtype)
    with blamed_on(folder / "config.json"):
        model = _ENCODERS[layout.parts()[name]].from_weights(weights.arrays, config)
    tokenizer = name.replace("text_encoder", "tokenizer")
    if tokenizer not in layout.parts():
        raise CheckpointError(f"{layout.root}: expected a part {tokenizer!r}, found none")
    words = ClipTokenizer(
        layout.require(tokenizer, _TOKENIZERS, None), model.options.max_position_embeddings
    )
    if words.largest >= model.options.vocab_size:
        raise CheckpointError(
            f"{words.folder}: expected ids below the text encoder's vocab_size = "
            f"{model.options.vocab_size}, found {words.largest}"
        )
    return _TextEncoder(words, model, weights.sha256)


def _time_ids(layout: Layout) -> tuple[int, ...]:
    """Size of the original, corner of the crop and size of the image: whole images, uncropped."""
    height, width = image_sides(layout)
    return (height, width, 0, 0, height, width)
