"""The T5 encoder against that of transformers, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.networks.t5_encoder import T5EncoderModel, distance_buckets

TINY = {
    "vocab_size": 30,
    "d_model": 12,
    "d_kv": 5,  # heads times this is not the width of the model
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 3,
}
VARIANTS = {
    "version 1.0": {"feed_forward_proj": "relu"},
    "version 1.1": {"feed_forward_proj": "gated-gelu"},
    "few distances": {
        "feed_forward_proj": "gelu_new",
        "relative_attention_num_buckets": 10,
        "relative_attention_max_distance": 20,
        "layer_norm_epsilon": 0.1,
    },
}
# Longer than the largest distance that counts.
TOKENS = np.random.default_rng(0).integers(0, 30, 160).astype(np.int32)


def build(torch_models, loaded, options, dtype=jnp.float32):
    import transformers

    config = transformers.T5Config(**TINY | options)
    model = torch_models.randomized(transformers.T5EncoderModel(config))
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return model, arrays, T5EncoderModel.from_weights(loaded(arrays, dtype), config.to_dict())


def reference(torch_models, model, tokens=TOKENS):
    tokens = torch_models.torch.tensor(tokens, dtype=torch_models.torch.int64)
    return model(tokens[None]).last_hidden_state[0].numpy()


def encode(compiled, encoder, tokens=TOKENS):
    tokens = jnp.asarray(tokens)
    return compiled(lambda f, tokens: f(tokens), encoder, tokens)(encoder, tokens)


@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_are_those_of_transformers(torch_models, loaded, compiled, name):
    model, _, encoder = build(torch_models, loaded, VARIANTS[name])
    found, expected = encode(compiled, encoder), reference(torch_models, model)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_double_precision(torch_models, loaded, compiled, x64, name):
    model, _, encoder = build(torch_models, loaded, VARIANTS[name], jnp.float64)
    with torch_models.precise_means():
        expected = reference(torch_models, model.double())
    np.testing.assert_allclose(encode(compiled, encoder), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", ["gelu", "silu", "gated-relu", "gated-silu"])
def test_other_activations(torch_models, loaded, compiled, kind):
    model, _, encoder = build(torch_models, loaded, {"feed_forward_proj": kind, "num_layers": 1})
    found, expected = (
        encode(compiled, encoder, TOKENS[:9]),
        reference(torch_models, model, TOKENS[:9]),
    )
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_bfloat16(torch_models, loaded, compiled):
    model, _, encoder = build(torch_models, loaded, VARIANTS["version 1.1"], jnp.bfloat16)
    found = encode(compiled, encoder)
    assert found.dtype == jnp.bfloat16
    error = found.astype(jnp.float32) - reference(torch_models, model)
    assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.02


@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (10, 20), (64, 300), (4, 2), (33, 40)])
def test_distances_fall_where_they_do_in_transformers(torch_models, count, farthest):
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = np.arange(-700, 701)
    theirs = T5Attention._relative_position_bucket(
        torch_models.torch.tensor(offset), True, count, farthest
    )
    found = distance_buckets(offset, count, farthest)
    np.testing.assert_array_equal(found, theirs.numpy())
    assert set(found) == set(range(count // 2 * 2)) - {count // 2}


def test_the_table_of_tokens_has_two_names(torch_models, loaded, compiled):
    """Files hold it under one or under both; the shared one counts, as in transformers."""
    _, arrays, encoder = build(torch_models, loaded, VARIANTS["version 1.0"])
    weights = loaded(arrays)
    shared, tied = "shared.weight", "encoder.embed_tokens.weight"
    assert {shared, tied} <= weights.keys()
    for left_out in (shared, tied):
        rest = {name: a for name, a in weights.items() if name != left_out}
        again = T5EncoderModel.from_weights(rest, TINY)
        assert jax.tree.structure(again) == jax.tree.structure(encoder)
        np.testing.assert_array_equal(again.weights[shared], weights[shared])
    other = T5EncoderModel.from_weights({**weights, tied: 0 * weights[tied]}, TINY)
    np.testing.assert_array_equal(other.weights[shared], weights[shared])


def test_every_array_is_needed_and_no_other(torch_models, loaded):
    *_, encoder = build(torch_models, loaded, VARIANTS["version 1.1"])
    config = encoder.options._asdict()
    for name in encoder.weights:
        rest = {other: a for other, a in encoder.weights.items() if other != name}
        with pytest.raises(InputError, match=f"expected an array '{name}'"):
            T5EncoderModel.from_weights(rest, config)
    decoder = {**encoder.weights, "decoder.final_layer_norm.weight": jnp.ones(12)}
    with pytest.raises(InputError, match=r"got also 'decoder\.final_layer_norm\.weight'; memjax"):
        T5EncoderModel.from_weights(decoder, config)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("feed_forward_proj", "gated-tanh", r".*got .*; memjax\.from_torch"),
        ("num_heads", 2.5, r".*got .*; memjax\.from_torch"),
        ("relative_attention_num_buckets", 3, "expected at least 4, got 3"),
        ("relative_attention_max_distance", 8, "expected more than a quarter of .* 32, got 8"),
    ],
)
def test_an_unsupported_option_is_refused_by_name(option, value, message):
    with pytest.raises(InputError, match=f"^{option}: {message}"):
        T5EncoderModel.from_weights({}, TINY | {option: value})


def test_tokens(torch_models, loaded, compiled):
    """None is refused; one beyond the vocabulary spoils everything, wherever it stands."""
    _, _, encoder = build(torch_models, loaded, VARIANTS["version 1.0"])
    with pytest.raises(InputError, match="tokens: expected at least one, got none"):
        encoder(jnp.zeros(0, jnp.int32))
    texts = np.tile(TOKENS[:7], (3, 1))
    texts[1:, 6] = 30, -1
    whole, *spoiled = compiled(jax.vmap(encoder), texts)(texts)
    assert not np.isnan(whole).any()
    assert np.isnan(spoiled).all()


def test_full_size(torch_models):
    """Every array of the encoder that Flux has is used, and none is missing."""
    import transformers

    options = {
        "d_model": 4096,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    }
    config = transformers.T5Config(**options)
    with torch_models.torch.device("meta"):
        model = transformers.T5EncoderModel(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 4762
    weights = {
        name: jax.ShapeDtypeStruct(tuple(a.shape), np.float32)
        for name, a in model.state_dict().items()
    }
    encoder = T5EncoderModel.from_weights(weights, config.to_dict())
    out = jax.eval_shape(lambda f, t: f(t), encoder, jax.ShapeDtypeStruct((512,), np.int32))
    assert out.shape == (512, 4096)


def test_defaults_are_those_of_transformers(torch_models):
    import transformers

    from memjax.networks.t5_encoder import T5EncoderOptions

    config = transformers.T5Config()
    assert T5EncoderOptions() == tuple(getattr(config, key) for key in T5EncoderOptions._fields)
