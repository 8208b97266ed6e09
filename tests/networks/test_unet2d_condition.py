"""UNet2DConditionModel against diffusers' own, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.networks.unet2d_condition import TextCondition, UNet2DConditionModel

TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 5 + 6 * 4,
}
# name: options, size of the latent
VARIANTS = {
    "Stable Diffusion 1": ({}, (4, 6)),
    "Stable Diffusion 2": (
        {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True},
        (4, 6),
    ),
    "Stable Diffusion XL": (XL, (4, 6)),
    "lists, learned variance, padding 0": (
        {
            "block_out_channels": (8, 8),
            "layers_per_block": (1, 2),
            "transformer_layers_per_block": [[2], [1, 2]],
            "reverse_transformer_layers_per_block": [[1, 1, 2], [2, 1]],
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "act_fn": "mish",
            "out_channels": 8,
            "downsample_padding": 0,
        },
        (4, 4),
    ),
    "no text, scale and shift, residual resampling": (
        {
            "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
            "attention_head_dim": (2, 4),
            "mid_block_type": "UNetMidBlock2D",
            "resnet_time_scale_shift": "scale_shift",
            "conv_in_kernel": 1,
            "conv_out_kernel": 5,
        },
        (4, 4),
    ),
    "latent consistency, told the guidance": ({"time_cond_proj_dim": 7}, (4, 4)),
    "odd sides": ({"mid_block_type": None, "act_fn": "gelu", "attention_head_dim": 4}, (5, 7)),
    "odd sides, padding 0": ({"downsample_padding": 0, "mid_block_type": None}, (5, 7)),
}


def build(torch_models, name):
    """The PyTorch model, x, v and u, and the condition."""
    from diffusers import UNet2DConditionModel as Theirs

    options, size = VARIANTS[name]
    model = torch_models.randomized(Theirs(**TINY | options))
    rng = np.random.default_rng(1)
    x, v, u = rng.normal(size=(3, *size, 4)).astype(np.float32)
    condition = TextCondition(rng.normal(size=(5, 12)).astype(np.float32))
    if options is XL:
        condition = condition._replace(
            pooled=rng.normal(size=5).astype(np.float32),
            time_ids=np.array([512, 640, 0, 3, 1024, 768], np.float32),
        )
    if "time_cond_proj_dim" in options:
        condition = condition._replace(guidance=np.float32(7.5))
    return model, (x, v, u), condition


def theirs(torch_models, model, condition, dtype):
    """The model as a function of one latent alone, its first channels the prediction."""
    from diffusers import LatentConsistencyModelPipeline
    from diffusers.models import embeddings

    torch = torch_models.torch
    text, pooled, ids, strength = (
        None if a is None else torch.tensor(a)[None].to(dtype) for a in condition
    )
    options = {} if pooled is None else {"text_embeds": pooled, "time_ids": ids}
    options = {"added_cond_kwargs": options or None}
    width = model.config.time_cond_proj_dim
    if strength is not None and dtype == torch.float32:
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        options["timestep_cond"] = embed(None, strength, width)
    elif strength is not None:  # the same features, in double precision by ``precise_times``
        options["timestep_cond"] = embeddings.get_timestep_embedding(1000 * strength, width)

    def network(x):
        out = model.to(dtype)(x.to(dtype), torch.tensor(873.0), text, **options)
        return out.sample[:, :4]

    return network


def ours(loaded, model):
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return UNet2DConditionModel.from_weights(loaded(arrays), dict(model.config))


def as_arrays(condition):
    return TextCondition(*(None if a is None else jnp.asarray(a) for a in condition))


@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_products_are_those_of_diffusers(torch_models, loaded, products, name):
    model, (x, v, u), condition = build(torch_models, name)
    network, given = ours(loaded, model), as_arrays(condition)
    found = products(lambda f, x: f(x, jnp.float32(873), given), network, x, v, u)
    torch = torch_models.torch
    value = theirs(torch_models, model, condition, torch.float32)(torch_models.image(x))
    np.testing.assert_allclose(found[0], torch_models.array(value), atol=1e-5, rtol=0)
    with torch_models.precise_times():
        network = theirs(torch_models, model.double(), condition, torch.float64)
        expected = torch_models.products(network, *(a.astype(np.float64) for a in (x, v, u)))
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), rtol=0)
    assert np.vdot(u, found[1]) == pytest.approx(np.vdot(found[2], v), abs=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_double_precision(torch_models, loaded, compiled, x64, name):
    """In double precision, with times as ``precise_times`` says, and weights still in single."""
    model, (x, _, _), condition = build(torch_models, name)
    network, given = ours(loaded, model), as_arrays(condition)
    x = x.astype(np.float64)
    found = compiled(lambda f, x: f(x, jnp.float32(873), given), network, x)(network, x)
    assert found.dtype == np.float64
    with torch_models.precise_times():
        network = theirs(torch_models, model.double(), condition, torch_models.torch.float64)
        expected = torch_models.array(network(torch_models.image(x)))
    np.testing.assert_allclose(found, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("only_cross_attention", True),
        ("only_cross_attention", [False, True]),
        ("dual_cross_attention", True),
        ("mid_block_only_cross_attention", True),
        ("cross_attention_norm", "layer_norm"),
        ("attention_type", "gated"),
        ("encoder_hid_dim", 16),
        ("encoder_hid_dim_type", "text_proj"),
        ("class_embed_type", "projection"),
        ("class_embeddings_concat", True),
        ("num_class_embeds", 10),
        ("num_attention_heads", 8),
        ("addition_embed_type", "image"),
        ("time_embedding_type", "fourier"),
        ("time_embedding_act_fn", "silu"),
        ("timestep_post_act", "silu"),
        ("resnet_skip_time_act", True),
        ("resnet_out_scale_factor", 2.0),
        ("conv_in_kernel", 2),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("down_block_types", ["SimpleCrossAttnDownBlock2D"]),
        ("up_block_types", ["KUpBlock2D"]),
        ("in_channels", 9),
        ("cross_attention_dim", [12, 8]),
        ("norm_num_groups", None),
    ],
)
def test_an_unsupported_option_is_refused_by_name(option, value):
    name = "out_channels" if option == "in_channels" else option
    with pytest.raises(InputError, match=rf"^{name}: .*got .*; memjax\.from_torch"):
        UNet2DConditionModel.from_weights({}, TINY | {option: value})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers_per_block": [1]}, r"layers_per_block: expected one for each of 2 levels, got 1"),
        ({"attention_head_dim": [1, 2, 3]}, r"attention_head_dim: expected one for each of 2"),
        (
            {"transformer_layers_per_block": [[1], [1]]},
            r"reverse_transformer_layers_per_block: expected a list",
        ),
        (
            {
                "transformer_layers_per_block": [1, 1],
                "reverse_transformer_layers_per_block": [[1], 1],
            },
            r"transformer_layers_per_block: expected 2 depths, got \[1\]",
        ),
        (
            {"addition_embed_type": "text_time"},
            r"addition_time_embed_dim: expected less than .* = 0, got 0",
        ),
    ],
)
def test_options_that_do_not_fit_each_other(changed, message):
    with pytest.raises(InputError, match=message):
        UNet2DConditionModel.from_weights({}, TINY | changed)


TEXT = jnp.zeros((5, 12))


@pytest.mark.parametrize(
    ("options", "condition", "message"),
    [
        ({}, TEXT, "expected a TextCondition, got ArrayImpl"),
        ({}, None, "expected a TextCondition, got NoneType"),
        ({}, TextCondition(TEXT[:, :8]), r"hidden_states of shape \[tokens, 12\], got \[5, 8\]"),
        ({}, TextCondition(TEXT, TEXT[0]), "expected None as pooled"),
        (XL, TextCondition(TEXT), "expected an array as pooled"),
        (XL, TextCondition(TEXT, TEXT[0]), "expected an array as time_ids"),
    ],
)
def test_bad_conditions(options, condition, message):
    from memjax.networks.unet2d_condition import UNet2DConditionOptions

    network = UNet2DConditionModel({}, UNet2DConditionOptions(**TINY | options))
    with pytest.raises(InputError, match=f"condition: .*{message}"):
        network._check_condition(condition)


def test_residual_resampling_wants_even_sides():
    options = {**TINY, "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")}
    from memjax.networks.unet2d_condition import UNet2DConditionOptions

    network = UNet2DConditionModel({}, UNet2DConditionOptions(**options))
    with pytest.raises(InputError, match=r"x: expected sides divisible by 2, got \[4, 5\]"):
        network(jnp.zeros((4, 5, 4)), 0.0, TextCondition(TEXT))


def test_a_network_distilled_for_guidance_does_without_it(torch_models, loaded, compiled):
    model, (x, _, _), condition = build(torch_models, "latent consistency, told the guidance")
    network, given = ours(loaded, model), as_arrays(condition._replace(guidance=None))
    found = compiled(lambda f, x: f(x, jnp.float32(873), given), network, x)(network, x)
    torch = torch_models.torch
    text = torch.tensor(condition.hidden_states)[None]
    expected = model(torch_models.image(x), torch.tensor(873.0), text).sample
    np.testing.assert_allclose(found, torch_models.array(expected), atol=1e-5, rtol=0)


def test_guidance_is_refused_where_the_network_takes_none(torch_models, loaded):
    model, (x, _, _), condition = build(torch_models, "Stable Diffusion 1")
    given = as_arrays(condition._replace(guidance=np.float32(2)))
    with pytest.raises(InputError, match="condition: expected None as guidance"):
        ours(loaded, model)(jnp.asarray(x), 873.0, given)
