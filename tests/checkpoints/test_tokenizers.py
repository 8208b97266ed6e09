"""Prompts to ids, against the tokenizers of transformers."""

import json

import numpy as np
import pytest

from memjax._core.errors import CheckpointError
from memjax.checkpoints._tokenizers import ClipTokenizer, T5Tokenizer

PROMPTS = [
    "",
    "   ",
    "the cat and the dog",
    "A PHOTO of the Cat's dog!",
    "  white\tspace\n\neverywhere \u00a0\u2003 here ",
    "1990 cats, 19th-century... photo!!!",
    "caf\u00e9 cafe\u0301 na\u00efve \u0130stanbul stra\u00dfe",
    "it's they're I'd we'll you've I'm don't can'T",
    "\u732b\u3068\u72ac \U0001f63a\U0001f468\u200d\U0001f469 \u0645\u0631\u062d\u0628",
    "<|endoftext|> and <|startoftext|>and <|ENDOFTEXT|>",
    "!important ! !! hello!",
    "snake_case a-b/c\\d (parens) [x] {y} 50% $9.99 #1 @me &amp; \"q\"",
    "zero\u200bwidth \ufeffbom soft\u00adhyphen \x00null",
    "\u2167 \u00bd \u00b2 \u0661\u0662",
    "the cat</s> and <pad><extra_id_0>dog <extra_id_7> <unk>",
    "word " * 120,
    "x" * 600,
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _tokenizers():
    pytest.importorskip("tokenizers")


@pytest.fixture
def no_library(monkeypatch):
    def unavailable(module, extra):
        raise AssertionError(module)

    monkeypatch.setattr("memjax.checkpoints._tokenizers.require", unavailable)


def edit(file, change):
    """Change the content of a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# CLIP


@pytest.mark.parametrize("saved", [False, True], ids=["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"], ids=["as v1", "as v2"])
def test_tokens_are_those_of_transformers(torch_pipelines, tmp_path, pad, saved):
    torch_pipelines.write_tokenizer(tmp_path, pad)
    reference = torch_pipelines.tokenizer(tmp_path)
    folder = tmp_path
    if saved:
        folder = tmp_path / "saved"
        reference.save_pretrained(folder)
        assert not (folder / "vocab.json").exists()
    ours = ClipTokenizer(folder)
    for prompt in PROMPTS:
        expected = reference(prompt, padding="max_length", max_length=77, truncation=True)
        assert ours(prompt).tolist() == expected["input_ids"], prompt


@pytest.fixture
def words(torch_pipelines, tmp_path):
    torch_pipelines.write_tokenizer(tmp_path)
    return tmp_path


def test_the_empty_prompt_needs_no_library(words, no_library):
    ids = ClipTokenizer(words)("")
    assert ids[1] == ids[-1] == ids[0] + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "vocab.json").unlink(), "expected vocab.json and merges.txt, or tok"),
        (lambda f: (f / "vocab.json").write_text("[]"), "vocab.json: expected a JSON object"),
        (lambda f: (f / "vocab.json").write_text('{"a": "b"}'), "expected an id for every token"),
        (lambda f: (f / "merges.txt").write_text("a b c\n"), "expected merges of two tokens"),
        (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe"), "merges.txt: expected text"),
        (
            lambda f: (f / "special_tokens_map.json").write_text('{"pad_token": "nowhere"}'),
            "pad_token: expected a word of the vocabulary, found 'nowhere'",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"model_max_length": 2}'),
            "model_max_length: expected at least 3, found 2",
        ),
    ],
)
def test_damage_is_one_line(words, change, message):
    change(words)
    with pytest.raises(CheckpointError, match=message) as caught:
        ClipTokenizer(words)
    assert "\n" not in str(caught.value)


def test_merges_of_unknown_tokens_are_one_line(words):
    (words / "merges.txt").write_text("zz zz\n")
    with pytest.raises(CheckpointError, match=r"merges: ") as caught:
        ClipTokenizer(words)("text")
    assert "\n" not in str(caught.value)


# T5


def published(content):
    """The file as it lies beside the published models of Flux: cleaned and split otherwise."""
    gap = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    content["pre_tokenizer"] = gap
    blanks = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    ends = {"type": "Strip", "strip_left": False, "strip_right": True}
    many = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [blanks, ends, many]}
    content["padding"] = {
        **{"strategy": {"Fixed": 7}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
    }
    content["truncation"] = {
        **{"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    }


@pytest.mark.parametrize("form", [None, published], ids=["as saved", "as published"])
def test_t5_tokens_are_those_of_transformers(torch_pipelines, tmp_path, form):
    reference = torch_pipelines.t5_tokenizer()
    reference.save_pretrained(tmp_path)
    if form is not None:
        edit(tmp_path / "tokenizer.json", form)
    ours = T5Tokenizer(tmp_path)
    assert ours.largest == len(reference) - 1
    found = {prompt: ours(prompt).tolist() for prompt in PROMPTS}
    for prompt, ids in found.items():
        expected = reference(prompt, padding="max_length", max_length=512, truncation=True)
        assert ids == expected["input_ids"], prompt
    assert found[PROMPTS[-1]][-1] == 1
    assert {2, len(reference) - 1} <= {i for ids in found.values() for i in ids}


@pytest.mark.parametrize(("given", "length"), [(256, 256), (10**30, 512), (None, 512)])
def test_the_length_is_that_of_the_folder_up_to_512(torch_pipelines, tmp_path, given, length):
    torch_pipelines.t5_tokenizer().save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", lambda c: c.update(model_max_length=given))
    ids = T5Tokenizer(tmp_path)("a " * 600)
    assert ids.shape == (length,)
    assert ids[-1] == 1
    assert 1 not in ids[:-1]


@pytest.fixture
def pieces(torch_pipelines, tmp_path):
    torch_pipelines.t5_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_the_empty_t5_prompt_needs_no_library(pieces, no_library):
    assert T5Tokenizer(pieces)("").tolist() == [1] + [0] * 511


def test_special_tokens_of_other_names(pieces):
    """A pipeline may pad with any word."""
    edit(pieces / "tokenizer_config.json", lambda c: c.update(pad_token={"content": "ing"}))
    pad = T5Tokenizer(pieces)("ing")[-1]
    assert pad == T5Tokenizer(pieces)("the ing")[-1] > 2


def vocabulary(change):
    return lambda content: change(content["model"]["vocab"])


def added(**entry):
    return lambda content: content["added_tokens"].append(entry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(type="BPE"), "json: expected a Unigram model, found 'BPE'"),
        (lambda c: c.pop("model"), "json: expected a Unigram model, found None"),
        (lambda c: c["model"].update(vocab={"a": 0}), "expected a list of words and their scores"),
        (vocabulary(lambda v: v.append(["a"])), "expected a list of words and their scores"),
        (vocabulary(lambda v: v.append(v[0])), "expected words that differ, found one twice"),
        (added(content="new", id=7), "expected added tokens with the ids after .*'new'"),
        (added(content="cat"), "expected added tokens with the ids after .*'cat'"),
        (lambda c: c.update(added_tokens=3), "expected a list of added tokens, found 3"),
        (lambda c: c.update(added_tokens=["a"]), "expected added tokens with the ids .*'a'"),
        (vocabulary(lambda v: v.pop(0)), "expected added tokens with the ids after "),
    ],
)
def test_damage_of_a_t5_tokenizer_is_one_line(pieces, change, message):
    edit(pieces / "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        T5Tokenizer(pieces)
    assert "\n" not in str(caught.value)


def charsmap(text):
    return lambda c: c.update(normalizer={"type": "Precompiled", "precompiled_charsmap": text})


@pytest.mark.parametrize(
    "change",
    [
        vocabulary(lambda v: v.append(["a word", "a score"])),
        vocabulary(lambda v: v.append(["a word", float("nan")])),
        lambda c: c["model"].update(unk_id=10**6),
        lambda c: c.update(normalizer={"type": "Evil"}),
        lambda c: c.update(pre_tokenizer=3),
        charsmap("????"),  # the library panics as it reads this,
        charsmap("BAAAAP////8="),  # and at the first prompt with this
    ],
)
def test_what_the_library_refuses_is_one_line(pieces, change):
    edit(pieces / "tokenizer.json", change)
    tokenizer = T5Tokenizer(pieces)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: ") as caught:
        tokenizer("the cat")
    assert "\n" not in str(caught.value)


VALUES = [None, 0, -1, 1, 10**6, 2**64, 1e308, "", "a", "\u2581", "Precompiled", [], {}, [[]], True]


def places(value, path=()):
    """The paths of all items of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def mutate(rng, content):
    """Change or remove one to three items, anywhere."""
    for _ in range(rng.integers(1, 4)):
        where = list(places(content))
        *path, last = where[rng.integers(len(where))]
        item = content
        for key in path:
            item = item[key]
        if rng.random() < 0.3:
            del item[last]
        else:
            item[last] = VALUES[rng.integers(len(VALUES))]


def attempt(folder):
    """(ids of a prompt and the largest there is, None), or (None, the line that says why not)."""
    try:
        tokenizer = T5Tokenizer(folder)
        return (tokenizer("the cat</s> \u732b, and a dog<extra_id_0>"), tokenizer.largest), None
    except CheckpointError as error:
        return None, str(error)


@pytest.mark.parametrize("count", [1_000, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_mutated_t5_tokenizers(pieces, count):
    """Refused in one line, or ids of the right number that the tokenizer itself says it has."""
    rng = np.random.default_rng(4)
    file = pieces / "tokenizer.json"
    content = json.loads(file.read_text())
    # What is beside the words; there are too many of them to be hit by a change elsewhere.
    content["model"]["vocab"] = content["model"]["vocab"][:12]
    content["added_tokens"] = content["added_tokens"][:3]
    whole = json.dumps(content)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(count):
        changed = json.loads(whole)
        mutate(rng, changed)
        file.write_text(json.dumps(changed))
        found, message = attempt(pieces)
        if found is None:
            outcomes["refused"] += 1
            assert message.startswith(str(pieces))
            assert message.isprintable()
        else:
            outcomes["read"] += 1
            ids, largest = found
            assert ids.shape == (512,)
            assert ids.min() >= 0
            assert ids.max() <= largest
    assert all(hits > count / 30 for hits in outcomes.values()), outcomes


def test_an_interrupt_is_no_fault_of_the_file(pieces, monkeypatch):
    import tokenizers

    class Interrupted:
        @staticmethod
        def from_str(text):
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers, "Tokenizer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        T5Tokenizer(pieces)("the cat")


def test_a_folder_without_the_file_says_how_to_make_it(pieces):
    (pieces / "tokenizer.json").rename(pieces / "spiece.model")
    with pytest.raises(CheckpointError, match=r"found none; .* T5TokenizerFast\.from_pretrained"):
        T5Tokenizer(pieces)
