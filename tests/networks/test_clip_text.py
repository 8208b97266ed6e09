"""The text encoders against those of transformers, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.networks.clip_text import CLIPTextModel, CLIPTextModelWithProjection

TINY = {
    "vocab_size": 30,
    "hidden_size": 12,
    "intermediate_size": 20,
    "projection_dim": 7,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "bos_token_id": 28,
}
TOKENS = np.array([28, 3, 4, 17, 29, 27, 29], np.int32)  # 29 ends the text, twice
# name: class, options
VARIANTS = {
    "quick gelu": (CLIPTextModel, {"eos_token_id": 29}),
    "gelu, old end of text": (CLIPTextModel, {"hidden_act": "gelu", "eos_token_id": 2}),
    "projection": (CLIPTextModelWithProjection, {"hidden_act": "gelu", "eos_token_id": 27}),
}


def build(torch_models, loaded, name, dtype=jnp.float32):
    import transformers

    cls, options = VARIANTS[name]
    config = transformers.CLIPTextConfig(**TINY | options)
    model = torch_models.randomized(getattr(transformers, cls.__name__)(config))
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return model, arrays, cls.from_weights(loaded(arrays, dtype), config.to_dict())


def reference(torch_models, model):
    tokens = torch_models.torch.tensor(TOKENS, dtype=torch_models.torch.int64)
    out = model(tokens[None], output_hidden_states=True)
    pooled = out["text_embeds"] if "text_embeds" in out else out["pooler_output"]
    return [a[0].numpy() for a in (out.last_hidden_state, out.hidden_states[-2], pooled)]


@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_and_pooled_are_those_of_transformers(torch_models, loaded, compiled, name):
    model, _, encoder = build(torch_models, loaded, name)
    tokens = jnp.asarray(TOKENS)
    found = compiled(lambda f, tokens: f(tokens), encoder, tokens)(encoder, tokens)
    for a, b in zip(found, reference(torch_models, model), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_double_precision(torch_models, loaded, compiled, x64, name):
    model, _, encoder = build(torch_models, loaded, name, jnp.float64)
    tokens = jnp.asarray(TOKENS)
    found = compiled(lambda f, tokens: f(tokens), encoder, tokens)(encoder, tokens)
    for a, b in zip(found, reference(torch_models, model.double()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_names_with_and_without_prefix(torch_models, loaded, name):
    """Files of every age: with ``text_model.``, without, and with the table of positions."""
    _, arrays, encoder = build(torch_models, loaded, name)
    bare = {name.removeprefix("text_model."): a for name, a in loaded(arrays).items()}
    old = {
        name if name.startswith("text_p") else f"text_model.{name}": a for name, a in bare.items()
    }
    old["text_model.embeddings.position_ids"] = jnp.arange(9)[None]
    for weights in (bare, old):
        again = type(encoder).from_weights(weights, {**TINY, **VARIANTS[name][1]})
        assert again.options == encoder.options
        assert again.weights.keys() == bare.keys()


def test_every_array_is_needed_and_no_other(torch_models, loaded):
    _, arrays, encoder = build(torch_models, loaded, "projection")
    weights = loaded(arrays)
    for name in list(encoder.weights)[::4]:
        rest = {other: a for other, a in weights.items() if not other.endswith(name)}
        with pytest.raises(InputError, match=f"expected an array '{name}'"):
            CLIPTextModelWithProjection.from_weights(rest, encoder.options._asdict())
    with pytest.raises(InputError, match=r"got also 'text_projection\.weight'; memjax"):
        CLIPTextModel.from_weights(weights, encoder.options._asdict())


@pytest.mark.parametrize(
    ("option", "value"),
    [("hidden_act", "tanh"), ("eos_token_id", [1, 2]), ("num_attention_heads", 2.5)],
)
def test_an_unsupported_option_is_refused_by_name(option, value):
    with pytest.raises(InputError, match=rf"^{option}: .*got .*; memjax\.from_torch"):
        CLIPTextModel.from_weights({}, TINY | {option: value})


def test_tokens(torch_models, loaded):
    """Too many are refused; one beyond the vocabulary spoils everything, wherever it stands."""
    _, _, encoder = build(torch_models, loaded, "quick gelu")
    with pytest.raises(InputError, match="tokens: expected from 1 to 9 tokens, got 10"):
        encoder(jnp.zeros(10, jnp.int32))
    assert not np.isnan(encoder(jnp.asarray(TOKENS)).last).any()
    for outside in (30, -1):
        spoiled = encoder(jnp.asarray(np.where(np.arange(7) == 6, outside, TOKENS)))
        assert np.isnan(spoiled.last).all()
        assert np.isnan(spoiled.pooled).all()
