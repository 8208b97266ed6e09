"""Prompts to conditions, against diffusers."""

import json
import shutil

import jax
import numpy as np
import pytest

from memjax._core.errors import CheckpointError, InputError
from memjax.checkpoints._safetensors import read_weights
from memjax.checkpoints.prompts import load_prompts


@pytest.fixture(scope="module", autouse=True)
def _tokenizers():
    pytest.importorskip("tokenizers")


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


@pytest.fixture(scope="module")
def flux(torch_pipelines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    texts = torch_pipelines.flux_text(folder)
    return torch_pipelines.flux(folder / "pipeline", guidance=True, **texts), folder / "pipeline"


def test_conditions_are_those_of_flux(flux):
    pipeline, folder = flux
    encoder = load_prompts(folder)
    prompts = ["the cat and the dog!", "", "a caf\u00e9 " * 260]
    hidden, pooled, _ = (a.numpy() for a in pipeline.encode_prompt(prompts, device="cpu"))
    found = encoder(prompts)
    assert found.hidden_states.shape == (3, 512, 10)
    assert (found.time_ids, found.guidance.tolist()) == (None, [1, 1, 1])
    # Either side's sums of 512 tokens are 2e-5 from those in double precision.
    np.testing.assert_allclose(found.hidden_states, hidden, atol=1e-4)
    np.testing.assert_allclose(found.pooled, pooled, atol=1e-5)
    assert np.abs(hidden[0] - hidden[1]).max() > 0.1
    one = encoder(prompts[0])
    assert one.hidden_states.shape == (512, 10)
    np.testing.assert_allclose(one.hidden_states, hidden[0], atol=1e-4)
    np.testing.assert_allclose(one.pooled, pooled[0], atol=1e-5)
    np.testing.assert_allclose(encoder.null.hidden_states, hidden[1], atol=1e-4)
    np.testing.assert_allclose(encoder.null.pooled, pooled[1], atol=1e-5)
    assert [name for name, _ in encoder.sha256] == ["text_encoder", "text_encoder_2"]
    assert [t.shape for t in encoder.tokenize(prompts)] == [(3, 77), (3, 512)]


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_schnell_is_told_no_guidance_and_a_shorter_text(flux, tmp_path):
    """Where the folder says 256, as those who run schnell do, that is the length."""
    pipeline, folder = flux[0], shutil.copytree(flux[1], tmp_path / "pipeline")
    rewrite(folder / "transformer" / "config.json", guidance_embeds=False)
    rewrite(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=256)
    prompt = "the photo of a dog"
    hidden, *_ = pipeline.encode_prompt(prompt, device="cpu", max_sequence_length=256)
    found = load_prompts(folder)(prompt)
    assert found.guidance is None
    np.testing.assert_allclose(found.hidden_states, hidden[0].numpy(), atol=1e-4)


def test_parts_of_flux_that_do_not_fit_are_named(flux, tmp_path, monkeypatch):
    """And before the many gigabytes of T5 are read."""

    def read(folder, *args, **options):
        assert folder.name == "text_encoder"
        return read_weights(folder, *args, **options)

    monkeypatch.setattr("memjax.checkpoints.prompts.read_weights", read)
    folder = shutil.copytree(flux[1], tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    cases = [
        ({"text_encoder": [None, None]}, "expected a part 'text_encoder', found none"),
        ({"tokenizer_2": [None, None]}, "expected a part 'tokenizer_2', found none"),
        ({"tokenizer_2": index["tokenizer"]}, "tokenizer_2: expected T5Tokenizer or .*CLIPTok"),
        (
            {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
            "text_encoder: expected CLIPTextModel, found CLIPTextModelWithProjection",
        ),
        (
            {"text_encoder_3": ["transformers", "T5EncoderModel"]},
            "expected the text encoders of Stable Diffusion 1.x, 2.x, XL's base model or Flux",
        ),
    ]
    for parts, message in cases:
        (folder / "model_index.json").write_text(json.dumps(index | parts))
        with pytest.raises(CheckpointError, match=message):
            load_prompts(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    file = folder / "tokenizer_2" / "tokenizer.json"
    words = json.loads(file.read_text())
    words["model"]["vocab"] += [["new", -9.0], ["newer", -9.0], ["newest", -9.0], ["news", -9.0]]
    file.write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match=r"tokenizer_2: expected ids below .* = 59, found 59"):
        load_prompts(folder)


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
