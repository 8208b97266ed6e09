"""Prompts to tokens and conditions, against transformers and diffusers."""

import json
import shutil

import jax
import numpy as np
import pytest

from memjax._core.errors import CheckpointError, InputError
from memjax.checkpoints.prompts import ClipTokenizer, load_prompts

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
    "word " * 120,
    "x" * 300,
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _tokenizers():
    pytest.importorskip("tokenizers")


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


@pytest.fixture(scope="module")
def stable(torch_pipelines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stable")
    return torch_pipelines.stable_diffusion(folder), folder / "pipeline"


def test_conditions_are_those_of_stable_diffusion(stable):
    pipeline, folder = stable
    encoder = load_prompts(folder)
    prompts = ["the cat and the dog", "A photo!", ""]
    wanted, null = pipeline.encode_prompt(prompts, "cpu", 1, True)
    found = encoder(prompts)
    assert found.pooled is None
    assert found.time_ids is None
    np.testing.assert_allclose(found.hidden_states, wanted.numpy(), atol=1e-5)
    one = encoder(prompts[1]).hidden_states
    assert one.shape == (77, 16)
    np.testing.assert_allclose(one, wanted[1].numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.null.hidden_states, null[0].numpy(), atol=1e-5)
    tokens = encoder.tokenize(prompts)
    assert [t.shape for t in tokens] == [(3, 77)]
    with pytest.raises(InputError, match="prompts: expected at least one"):
        encoder([])


def test_conditions_are_those_of_stable_diffusion_xl(torch_pipelines, tmp_path):
    pipeline = torch_pipelines.stable_diffusion_xl(tmp_path)
    encoder = load_prompts(tmp_path / "pipeline")
    prompt = "the cat and the dog!"
    hidden, null, pooled, null_pooled = pipeline.encode_prompt(prompt, device="cpu")
    found = encoder(prompt)
    np.testing.assert_allclose(found.hidden_states, hidden[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.pooled, pooled[0].numpy(), atol=1e-5)
    times = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), hidden.dtype, 12)
    assert found.time_ids.tolist() == times[0].tolist()
    # This pipeline's "no prompt" is zeros, not the empty prompt.
    np.testing.assert_array_equal(encoder.null.hidden_states, null[0].numpy())
    np.testing.assert_array_equal(encoder.null.pooled, null_pooled[0].numpy())
    structure = jax.tree.structure(found)
    assert structure == jax.tree.structure(encoder.null)
    assert jax.tree.structure(encoder([prompt, prompt])) == structure


@pytest.fixture
def words(torch_pipelines, tmp_path):
    torch_pipelines.write_tokenizer(tmp_path)
    return tmp_path


def test_the_empty_prompt_needs_no_library(words, monkeypatch):
    def unavailable(module, extra):
        raise AssertionError(module)

    monkeypatch.setattr("memjax.checkpoints.prompts.require", unavailable)
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


def test_parts_that_do_not_fit_are_named(stable, tmp_path):
    folder = shutil.copytree(stable[1], tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())

    def with_index(**parts):
        (folder / "model_index.json").write_text(json.dumps(index | parts))

    with_index(text_encoder=["transformers", "T5EncoderModel"])
    with pytest.raises(CheckpointError, match=r"text_encoder: expected CLIPTextModel or .*T5Enc"):
        load_prompts(folder)
    with_index(tokenizer=[None, None])
    with pytest.raises(CheckpointError, match="expected a part 'tokenizer', found none"):
        load_prompts(folder)
    with_index(text_encoder=[None, None])
    with pytest.raises(CheckpointError, match="expected a pipeline with a text_encoder"):
        load_prompts(folder)
    with_index()
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"vocab_size": 5}))
    with pytest.raises(CheckpointError, match=r"text_encoder/config.json: .*token_embedding"):
        load_prompts(folder)
