"""Tokenizers of published pipelines, by the files in their folders."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from memjax._core.errors import CheckpointError, require
from memjax._core.text import one_line
from memjax.checkpoints._safetensors import fail, open_inside, read_json, shown

_MAX_FILE_BYTES = 2**24
_WHOLE = "tokenizer.json"
_CLIP_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_T5_SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>"}
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
        self._special, self.length = _settings(folder, _CLIP_SPECIAL, self._vocabulary, longest)
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
        with _library_faults(f"{self.folder}: merges"):
            model = tokenizers.models.BPE(
                vocab=self._vocabulary,
                merges=self._merges,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                fuse_unk=False,
                unk_token=self._special["unk_token"],
            )
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


class T5Tokenizer:
    """The T5 tokenizer in a folder, by the file that ``transformers`` saves.

    A Unigram model: of all ways to write the text as words of the vocabulary, the likeliest. The
    file itself says how the text is cleaned and split; the library ``tokenizers`` follows it. The
    ids are followed by that of the end, cut or padded to one length.

    Args:
        folder: with ``tokenizer.json``; and, for the special tokens and the length,
            ``tokenizer_config.json`` and ``special_tokens_map.json``.
        longest: most tokens. The pipelines of diffusers take 512 unless told otherwise; a smaller
            ``model_max_length`` in the folder counts here.

    Raises:
        CheckpointError: a file is missing or damaged, or a special token is no word of the
            vocabulary.

    References:
        Kudo (2018), arXiv:1804.10959; Kudo and Richardson (2018), arXiv:1808.06226; Raffel et al.
        (2020), arXiv:1910.10683.
    """

    def __init__(self, folder: Path, longest: int = 512):
        self.folder = folder
        file = folder / _WHOLE
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: expected {_WHOLE}, found none; transformers makes it of spiece.model: "
                "T5TokenizerFast.from_pretrained(folder).save_pretrained(folder)"
            )
        self._content = read_json(file, limit=_MAX_FILE_BYTES)
        self._ids = _unigram_ids(file, self._content)
        special, self.length = _settings(folder, _T5_SPECIAL, self._ids, longest)
        self._end, self._pad = (self._ids[special[name]] for name in _T5_SPECIAL)
        self._encoder: Any = None

    @property
    def largest(self) -> int:
        """The largest id."""
        return len(self._ids) - 1

    def __call__(self, prompt: str) -> Int[np.ndarray, "n"]:
        """Ids of one prompt, int32, always ``length`` of them.

        A prompt that is longer keeps its first tokens, as in the pipelines of diffusers.

        Raises:
            MissingExtraError: the ``prompts`` extra is not installed (the empty prompt does not
                need it).
            CheckpointError: the library finds a fault in the file.
        """
        body = self._words(prompt)[: self.length - 1] if prompt else []
        ids = [*body, self._end]
        return np.array(ids + [self._pad] * (self.length - len(ids)), np.int32)

    def _words(self, prompt: str) -> list[int]:
        tokenizers = require("tokenizers", "prompts")
        with _library_faults(self.folder / _WHOLE):
            if self._encoder is None:
                encoder = tokenizers.Tokenizer.from_str(json.dumps(self._content))
                encoder.no_padding()
                encoder.no_truncation()
                self._encoder = encoder
            return self._encoder.encode(prompt, add_special_tokens=False).ids


def _unigram_ids(file: Path, content: Mapping[str, Any]) -> dict[str, int]:
    """The ids of all tokens, 0, 1, ...: of the vocabulary, then of those added to it."""
    model, added = content.get("model"), content.get("added_tokens", [])
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "Unigram":
        fail(file, "a Unigram model", shown(kind))
    words = model.get("vocab")
    if not isinstance(words, list) or not all(
        isinstance(word, list) and len(word) == 2 and isinstance(word[0], str) for word in words
    ):
        fail(file, "a list of words and their scores", "something else")
    ids = {word: i for i, (word, _) in enumerate(words)}
    if len(ids) < len(words):
        fail(file, "words that differ", "one twice")
    if not isinstance(added, list):
        fail(file, "a list of added tokens", shown(added))
    for token in added:
        word, i = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, 0)
        if not isinstance(word, str) or ids.setdefault(word, len(ids)) != i:
            fail(file, "added tokens with the ids after those of the vocabulary", shown(token))
    return ids


@contextlib.contextmanager
def _library_faults(file: Path | str) -> Iterator[None]:
    """What the library ``tokenizers`` finds wrong with a file, in one line."""
    try:
        yield
    except BaseException as error:
        # A panic of its Rust code is no Exception, and has no name that could be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{file}: {one_line(str(error))}") from None


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of tokens, and the pairs that merge, in order."""
    whole = folder / _WHOLE
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


def _settings(
    folder: Path, defaults: Mapping[str, str], ids: Mapping[str, int], longest: int
) -> tuple[dict[str, str], int]:
    """The special tokens, and the length that prompts are padded to."""
    special, length = dict(defaults), longest
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    given = [config]
    # Where the configuration lists the added tokens, the older file is not read.
    older = folder / "special_tokens_map.json"
    if older.is_file() and "added_tokens_decoder" not in config:
        given.append(read_json(older))
    for source in given:
        for name in special:
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[name] = token
    if isinstance(config.get("model_max_length"), int):
        length = config["model_max_length"]
    if length < 3:
        raise CheckpointError(f"{file}: model_max_length: expected at least 3, found {length}")
    for name, token in special.items():
        if token not in ids:
            raise CheckpointError(
                f"{folder}: {name}: expected a word of the vocabulary, found {shown(token)}"
            )
    return special, min(length, longest)
