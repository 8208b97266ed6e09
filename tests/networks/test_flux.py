"""FluxTransformer2DModel against diffusers' own, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.networks._layers import rotate, rotation
from memjax.networks.flux import FluxOptions, FluxTransformer2DModel, _pack, _unpack
from memjax.networks.unet2d_condition import TextCondition

TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 7,
    "axes_dims_rope": (2, 4, 6),
}
# name: options, size of the latent
VARIANTS = {
    "schnell": ({}, (4, 10)),
    "dev, told the guidance": ({"guidance_embeds": True}, (6, 4)),
    "one block of a kind, three heads": (
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 3,
            "axes_dims_rope": [4, 4, 4],
        },
        (2, 2),
    ),
}
TIME = 873.0


def build(torch_models, name):
    """The PyTorch model, x, v and u, and the condition."""
    from diffusers import FluxTransformer2DModel as Theirs

    options, size = VARIANTS[name]
    options = TINY | options
    model = torch_models.randomized(Theirs(**options))
    rng = np.random.default_rng(1)
    x, v, u = rng.normal(size=(3, *size, options["in_channels"] // 4)).astype(np.float32)
    text, pooled = (rng.normal(size=size).astype(np.float32) for size in ((5, 10), 7))
    strength = np.float32(2.5) if "guidance_embeds" in options else None
    return model, (x, v, u), TextCondition(text, pooled, guidance=strength)


def theirs(torch_models, model, condition):
    return torch_models.flux(
        model, TIME, condition.hidden_states, condition.pooled, condition.guidance
    )


def ours(loaded, model, dtype=jnp.float32):
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return FluxTransformer2DModel.from_weights(loaded(arrays, dtype), dict(model.config))


def as_arrays(condition):
    return TextCondition(*(None if a is None else jnp.asarray(a) for a in condition))


@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_products_are_those_of_diffusers(torch_models, loaded, products, name):
    model, (x, v, u), condition = build(torch_models, name)
    network, given = ours(loaded, model), as_arrays(condition)
    found = products(lambda f, x: f(x, jnp.float32(TIME), given), network, x, v, u)
    value = theirs(torch_models, model, condition)(torch_models.image(x))
    value = torch_models.array(value)
    np.testing.assert_allclose(found[0], value, atol=1e-5 * np.abs(value).max(), rtol=0)
    with torch_models.precise_times(), torch_models.precise_rotations():
        double = theirs(torch_models, model.double(), condition)
        expected = torch_models.products(double, *(a.astype(np.float64) for a in (x, v, u)))
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), rtol=0)
    assert np.vdot(u, found[1]) == pytest.approx(np.vdot(found[2], v), abs=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_double_precision(torch_models, loaded, compiled, x64, name):
    """With times and places as ``precise_times`` and ``precise_rotations`` have them."""
    model, (x, _, _), condition = build(torch_models, name)
    network, given = ours(loaded, model), as_arrays(condition)
    x = x.astype(np.float64)
    found = compiled(lambda f, x: f(x, jnp.float32(TIME), given), network, x)(network, x)
    assert found.dtype == np.float64
    with torch_models.precise_times(), torch_models.precise_rotations():
        network = theirs(torch_models, model.double(), condition)
        expected = torch_models.array(network(torch_models.image(x)))
    np.testing.assert_allclose(found, expected, atol=1e-7, rtol=0)


def test_without_a_strength_none_is_imitated(torch_models, loaded, compiled):
    """Guidance 1 is what a network is told that is told nothing; another strength is another."""
    model, (x, _, _), condition = build(torch_models, "dev, told the guidance")
    network = ours(loaded, model)
    condition = condition._replace(guidance=None)

    def run(network, x, condition, strength):
        told = condition._replace(guidance=strength)
        return [network(x, TIME, c) for c in (condition, told)]

    args = (network, x, as_arrays(condition), jnp.float32(1))
    program = compiled(run, *args)
    silent, one = program(*args)
    np.testing.assert_allclose(silent, one, atol=1e-5, rtol=0)
    _, other = program(*args[:3], jnp.float32(3.5))
    assert np.abs(other - one).max() > 1e-3
    expected = theirs(torch_models, model, condition._replace(guidance=np.float32(1)))
    expected = torch_models.array(expected(torch_models.image(x)))
    np.testing.assert_allclose(silent, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_half_precision(torch_models, loaded, compiled):
    model, (x, _, _), condition = build(torch_models, "schnell")
    network, given = ours(loaded, model, jnp.bfloat16), as_arrays(condition)
    half = jnp.asarray(x, jnp.bfloat16)
    found = compiled(lambda f, x: f(x, jnp.float32(TIME), given), network, half)(network, half)
    assert found.dtype == jnp.bfloat16
    value = torch_models.array(theirs(torch_models, model, condition)(torch_models.image(x)))
    error = np.linalg.norm(np.asarray(found, np.float32) - value) / np.linalg.norm(value)
    assert error < 0.03


def test_places_are_exact_in_single_precision():
    """The cosines of angles of many turns, at the end of the largest picture there is."""
    places = np.array([[0, 4095, 1]])
    turn = rotation(places, (2, 4, 2), jnp.float32)
    angles = np.array([0, 4095, 40.95, 1])
    np.testing.assert_allclose(turn.cosines[0, 0], np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(turn.sines[0, 0], np.sin(angles), atol=1e-7)


def test_a_rotation_turns_planes():
    """Products of rotated vectors depend on the difference of their places alone."""
    q, k = np.random.default_rng(0).normal(size=(2, 1, 3, 8)).astype(np.float32)

    def product(first, second):
        turned = [
            rotate(jnp.asarray(a), rotation(np.array([place]), (2, 4, 2), jnp.float32))
            for a, place in ((q, first), (k, second))
        ]
        return np.sum(turned[0] * turned[1], axis=-1)

    near = product((0, 3, 5), (0, 1, 9))
    np.testing.assert_allclose(product((0, 23, 45), (0, 21, 49)), near, atol=1e-5)
    assert np.abs(product((0, 3, 5), (0, 2, 9)) - near).max() > 1e-2
    np.testing.assert_allclose(product((0, 0, 0), (0, 0, 0)), np.sum(q * k, axis=-1), atol=1e-6)


def test_patches_are_those_of_the_pipeline(torch_models):
    from diffusers import FluxPipeline

    x = np.arange(4 * 6 * 3, dtype=np.float32).reshape(4, 6, 3)
    tokens = _pack(jnp.asarray(x))
    expected = FluxPipeline._pack_latents(torch_models.image(x), 1, 3, 4, 6)[0]
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(_unpack(tokens, x.shape), x)


def test_every_array_is_needed_and_no_other(torch_models, loaded):
    model, _, _ = build(torch_models, "dev, told the guidance")
    network = ours(loaded, model)
    weights, config = network.weights, network.options._asdict()
    for name in list(weights)[::9]:
        rest = {other: a for other, a in weights.items() if other != name}
        with pytest.raises(InputError, match=f"expected an array '{name}'"):
            FluxTransformer2DModel.from_weights(rest, config)
    with pytest.raises(InputError, match=r"got also 'time_text_embed\.guidance.*and 3 more; memj"):
        FluxTransformer2DModel.from_weights(weights, config | {"guidance_embeds": False})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("patch_size", 2),
        ("out_channels", 8),
        ("in_channels", 384),
        ("axes_dims_rope", [2, 4, 4]),
        ("axes_dims_rope", [3, 3, 6]),
        ("axes_dims_rope", [6, 6]),
        ("num_layers", 0),
        ("guidance_embeds", "yes"),
        ("qk_norm", "layer_norm"),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
    ],
)
def test_an_unsupported_option_is_refused_by_name(option, value):
    config = TINY | {"out_channels": 16} | {option: value}
    name = "out_channels" if option == "in_channels" else option
    with pytest.raises(InputError, match=rf"^{name}: .*got .*; memjax\.from_torch"):
        FluxTransformer2DModel.from_weights({}, config)


def test_channels_make_patches():
    with pytest.raises(InputError, match="in_channels: expected a multiple of 4, got 6"):
        FluxTransformer2DModel.from_weights({}, TINY | {"in_channels": 6})


TEXT, POOLED = jnp.zeros((5, 10)), jnp.zeros(7)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (None, "expected a TextCondition, got NoneType"),
        (TEXT, "expected a TextCondition, got ArrayImpl"),
        (TextCondition(TEXT[:, :8], POOLED), r"hidden_states of shape \[tokens, 10\], got \[5, 8"),
        (TextCondition(TEXT), r"pooled of shape \[7\], got None"),
        (TextCondition(TEXT, POOLED[:3]), r"pooled of shape \[7\], got \[3\]"),
        (TextCondition(TEXT, POOLED, jnp.zeros(6)), "expected None as time_ids"),
        (TextCondition(TEXT, POOLED, None, jnp.ones(())), "expected None as guidance"),
    ],
)
def test_bad_conditions(condition, message):
    network = FluxTransformer2DModel({}, FluxOptions(**TINY))
    with pytest.raises(InputError, match=f"condition: .*{message}"):
        network(jnp.zeros((4, 4, 4)), 0.0, condition)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 5, 4), r"divisible by 2, got \[4, 5\]"), ((4, 4, 16), "expected 4 channels, got 16")],
)
def test_bad_latents(shape, message):
    network = FluxTransformer2DModel({}, FluxOptions(**TINY))
    with pytest.raises(InputError, match=f"x: .*{message}"):
        network(jnp.zeros(shape), 0.0, TextCondition(TEXT, POOLED))
