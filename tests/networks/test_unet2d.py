"""UNet2DModel against diffusers' own, and what it refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.networks.unet2d import UNet2DModel

TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
ONE_LEVEL = {
    "block_out_channels": (8,),
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
RESNET_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D"),
}
THREE_LEVELS = {
    "block_out_channels": (4, 8, 8),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
# name: options, size of the image, condition
VARIANTS = {
    "ddpm": (
        {
            "downsample_padding": 0,
            "freq_shift": 1,
            "flip_sin_to_cos": False,
            "attention_head_dim": None,
            "norm_eps": 1e-6,
        },
        (8, 8),
        None,
    ),
    "head width 8, not square": ({}, (6, 10), None),
    "no attention in the middle": ({"add_attention": False, "act_fn": "swish"}, (6, 4), None),
    "odd below the top": ({**THREE_LEVELS, "downsample_padding": 0}, (20, 12), None),
    "scale and shift, residual resampling, classes": (
        {
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "num_class_embeds": 5,
        },
        (6, 6),
        np.int32(3),
    ),
    "gelu, class times": (
        {
            **ONE_LEVEL,
            "class_embed_type": "timestep",
            "mid_block_scale_factor": 2**0.5,
            "act_fn": "gelu",
        },
        (4, 6),
        np.float32(41.5),
    ),
    "mish, learned variance, odd widths": (
        {
            **ONE_LEVEL,
            "act_fn": "mish",
            "attention_head_dim": 3,
            "out_channels": 6,
            "time_embedding_dim": 23,
        },
        (4, 4),
        None,
    ),
    "relu, no middle, centered": (
        {"act_fn": "relu", "mid_block_type": None, "center_input_sample": True},
        (4, 4),
        None,
    ),
    "residual blocks that resample": (RESNET_BLOCKS | {"attn_norm_num_groups": 8}, (6, 6), None),
    "two layers, one group": (
        {**ONE_LEVEL, "layers_per_block": 2, "norm_num_groups": 1},
        (4, 4),
        None,
    ),
}


def build(torch_models, name):
    """The PyTorch model, and x, v, u, t, condition."""
    from diffusers import UNet2DModel as Theirs

    options, size, condition = VARIANTS[name]
    model = torch_models.randomized(Theirs(**TINY | options))
    x, v, u = np.random.default_rng(1).normal(size=(3, *size, 3)).astype(np.float32)
    return model, (x, v, u), np.float32(873), condition


def theirs(torch_models, model, t, condition, dtype):
    """The model as a function of one image alone, its first channels the prediction."""
    torch = torch_models.torch
    label = None if condition is None else torch.tensor(condition)[None]

    def network(x):
        return model.to(dtype)(x.to(dtype), torch.tensor(t), label).sample[:, :3]

    return network


def ours(torch_models, loaded, model, dtype):
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return UNet2DModel.from_weights(loaded(arrays, dtype), dict(model.config))


@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_products_are_those_of_diffusers(torch_models, loaded, products, name):
    model, (x, v, u), t, condition = build(torch_models, name)
    network = ours(torch_models, loaded, model, jnp.float32)
    label = None if condition is None else jnp.asarray(condition)
    found = products(lambda f, x: f(x, jnp.asarray(t), label), network, x, v, u)
    torch = torch_models.torch
    value = theirs(torch_models, model, t, condition, torch.float32)(torch_models.image(x))
    np.testing.assert_allclose(found[0], torch_models.array(value), atol=1e-5, rtol=0)
    with torch_models.precise_times():
        network = theirs(torch_models, model.double(), t, condition, torch.float64)
        expected = torch_models.products(network, *(a.astype(np.float64) for a in (x, v, u)))
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), rtol=0)
    assert np.vdot(u, found[1]) == pytest.approx(np.vdot(found[2], v), abs=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_double_precision(torch_models, loaded, compiled, x64, name):
    """In double precision, with times as ``precise_times`` says, and weights still in single."""
    model, (x, _, _), t, condition = build(torch_models, name)
    network = ours(torch_models, loaded, model, jnp.float32)
    x = x.astype(np.float64)
    label = None if condition is None else jnp.asarray(condition)
    f = compiled(lambda f, x: f(x, jnp.asarray(t), label), network, x)
    found = f(network, x)
    assert found.dtype == np.float64
    with torch_models.precise_times():
        torch = torch_models.torch
        expected = theirs(torch_models, model.double(), t, condition, torch.float64)(
            torch_models.image(x)
        )
    np.testing.assert_allclose(found, torch_models.array(expected), atol=1e-7, rtol=0)


@pytest.fixture(scope="module")
def tiny():
    """Weights of a network of one level and its options, without PyTorch."""
    from numpy.random import default_rng

    options = {**TINY, **ONE_LEVEL, "num_class_embeds": 3}
    rng = default_rng(0)
    names = {}

    def resnet(prefix, i, o=8):
        names.update({f"{prefix}.norm1.{kind}": (i,) for kind in ("weight", "bias")})
        names.update({f"{prefix}.norm2.{kind}": (o,) for kind in ("weight", "bias")})
        dense = {"conv1": (3, 3, i, o), "conv2": (3, 3, o, o), "time_emb_proj": (o, 32)}
        if i != o:
            dense["conv_shortcut"] = (1, 1, i, o)
        for name, shape in dense.items():
            names.update({f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": (o,)})

    def attention(prefix):
        names.update({f"{prefix}.group_norm.{kind}": (8,) for kind in ("weight", "bias")})
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            names.update({f"{prefix}.{name}.weight": (8, 8), f"{prefix}.{name}.bias": (8,)})

    for name, shape in {
        "conv_in": (3, 3, 3, 8),
        "time_embedding.linear_1": (32, 8),
        "time_embedding.linear_2": (32, 32),
        "conv_out": (3, 3, 8, 3),
    }.items():
        bias = shape[-1] if len(shape) == 4 else shape[0]
        names.update({f"{name}.weight": shape, f"{name}.bias": (bias,)})
    names.update({f"conv_norm_out.{kind}": (8,) for kind in ("weight", "bias")})
    names["class_embedding.weight"] = (3, 32)
    resnet("down_blocks.0.resnets.0", 8)
    attention("down_blocks.0.attentions.0")
    resnet("mid_block.resnets.0", 8)
    attention("mid_block.attentions.0")
    resnet("mid_block.resnets.1", 8)
    resnet("up_blocks.0.resnets.0", 16)
    resnet("up_blocks.0.resnets.1", 16)
    draw = {name: rng.normal(size=shape) / 4 for name, shape in names.items()}
    return {name: jnp.asarray(a, jnp.float32) for name, a in draw.items()}, options


IMAGE = np.random.default_rng(5).normal(size=(4, 4, 3)).astype(np.float32)


def test_old_names_of_attention_layers(tiny):
    weights, options = tiny
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name):
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        return name

    legacy = {renamed(name): a for name, a in weights.items()}
    assert legacy.keys() != weights.keys()
    network = UNet2DModel.from_weights(legacy, options)
    assert network.weights.keys() == weights.keys()
    assert all(network.weights[name] is a for name, a in weights.items())


def test_block_types_of_the_first_release(tiny):
    weights, options = tiny
    named = {"down_block_types": ["UNetResAttnDownBlock2D"], "up_block_types": ["UNetResUpBlock2D"]}
    UNet2DModel.from_weights(weights, options | named)


def test_every_array_is_needed_and_no_other(tiny):
    """Each name taken away, one misshapen, one too many: refused by its name."""
    weights, options = tiny
    for name in weights:
        rest = {other: a for other, a in weights.items() if other != name}
        with pytest.raises(InputError, match=f"expected an array '{re.escape(name)}' of shape"):
            UNet2DModel.from_weights(rest, options)
    more = weights | {"down_blocks.0.extra": IMAGE, "up": IMAGE}
    with pytest.raises(InputError, match=r"got also 'down_blocks\.0\.extra' and 1 more; memjax\."):
        UNet2DModel.from_weights(more, options)
    with pytest.raises(InputError, match=r"'conv_out.bias' of shape \[3\], got \[1\]"):
        UNet2DModel.from_weights(weights | {"conv_out.bias": jnp.ones(1)}, options)
    with pytest.raises(InputError, match=r"'conv_out.bias' in floating point, got int8"):
        UNet2DModel.from_weights(weights | {"conv_out.bias": jnp.ones(3, jnp.int8)}, options)


def test_shapes_alone_are_enough_for_the_check(tiny):
    weights, options = tiny
    shapes = jax.eval_shape(lambda: weights)
    assert UNet2DModel.from_weights(shapes, options).weights == shapes


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("time_embedding_type", "fourier"),
        ("time_embedding_type", "learned"),
        ("resnet_time_scale_shift", "spatial"),
        ("class_embed_type", "identity"),
        ("downsample_padding", 2),
        ("downsample_type", "kdown"),
        ("act_fn", "tanh"),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("down_block_types", ["SkipDownBlock2D"]),
        ("up_block_types", ["AttnSkipUpBlock2D"]),
        ("out_channels", 4),
        ("norm_num_groups", 0),
        ("norm_num_groups", "4"),
        ("add_attention", 1),
        ("layers_per_block", True),
        ("quantum_attention", "on"),
    ],
)
def test_an_unsupported_option_is_refused_by_name(tiny, option, value):
    weights, options = tiny
    with pytest.raises(InputError, match=rf"^{option}: .*got .*; memjax\.from_torch"):
        UNet2DModel.from_weights(weights, options | {option: value})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_out_channels": (8, 8)}, r"one for each of block_out_channels = \[8, 8\]"),
        ({"block_out_channels": ()}, r"one for each of block_out_channels = \[\]"),
        ({"norm_num_groups": 3}, r"groups: expected a divisor of 8 channels, got 3"),
        ({"attention_head_dim": 9}, r"attention_head_dim: expected at most 8 channels, got 9"),
        ({"freq_shift": 4}, r"freq_shift: expected less than 4, got 4"),
    ],
)
def test_options_that_do_not_fit_each_other(tiny, changed, message):
    weights, options = tiny
    with pytest.raises(InputError, match=message):
        UNet2DModel.from_weights(weights, options | changed)


def test_bookkeeping_and_options_of_later_versions_that_are_off_are_left_out(tiny):
    weights, options = tiny
    extra = {"_class_name": "UNet2DModel", "_diffusers_version": "0.99", "new_option": None}
    network = UNet2DModel.from_weights(weights, options | extra)
    assert network.options == UNet2DModel.from_weights(weights, options).options


@pytest.mark.parametrize(
    ("size", "label", "message"),
    [
        ((4, 4, 1), 0, "x: expected 3 channels, got 1"),
        ((4, 4, 3), None, "condition: expected the label of a class, got None"),
    ],
)
def test_bad_input(tiny, size, label, message):
    network = UNet2DModel.from_weights(*tiny)
    condition = None if label is None else jnp.int32(label)
    with pytest.raises(InputError, match=message):
        network(jnp.zeros(size), 0.0, condition)


def test_sides_must_be_halved_evenly(tiny):
    network = UNet2DModel.from_weights(*tiny)
    options = network.options._replace(block_out_channels=(8, 8), num_class_embeds=None)
    with pytest.raises(InputError, match=r"x: expected sides divisible by 2, got \[4, 5\]"):
        UNet2DModel(network.weights, options)(jnp.zeros((4, 5, 3)), 0.0)


def test_labels_times_and_batches(tiny):
    """Each label and time its own answer, NaN beyond the labels, a batch as one by one."""
    network = UNet2DModel.from_weights(*tiny)
    x = jnp.asarray(IMAGE)
    labels = jnp.arange(-1, 4, dtype=jnp.int32)
    times = jnp.array([0, 1, 500, 500, 500], jnp.int32)
    f = jax.jit(lambda network, t, label: network(x, t, label))
    alone = np.array([f(network, *args) for args in zip(times, labels, strict=True)])
    assert np.isnan(alone[[0, 4]]).all()
    together = jax.jit(jax.vmap(f, (None, 0, 0)))(network, times, labels)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    for a, b in ((1, 2), (2, 3), (1, 3)):
        assert np.abs(alone[a] - alone[b]).max() > 1e-3
    assert f(network, jnp.float32(0.5), labels[1]).shape == x.shape


def test_weights_are_leaves_and_products_full_precision(tiny):
    """Weights are arguments of the program, not constants in it; no product falls to TF32."""
    weights, options = tiny
    network = UNet2DModel.from_weights(weights, options)
    assert len(jax.tree.leaves(network)) == len(weights)
    f = jax.jit(lambda network, x: network(x, jnp.float32(3), jnp.int32(1)))
    text = f.lower(network, jnp.asarray(IMAGE)).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
    assert len(products) > 20
    assert all("HIGHEST" in line for line in products)
    sizes = [
        np.prod([int(n) for n in dims.split("x")])
        for dims in re.findall(r"stablehlo\.constant dense<\S+> : tensor<([\dx]+)xf32>", text)
    ]
    assert max(sizes, default=1) <= 8


def test_half_precision(tiny, compiled):
    """In bfloat16 throughout, and with its weights alone."""
    weights, options = tiny
    network = UNet2DModel.from_weights(weights, options)
    halved = jax.tree.map(lambda a: a.astype(jnp.bfloat16), network)
    x = jnp.asarray(IMAGE)

    def f(network, x):
        return network(x, jnp.float32(400), jnp.int32(1))

    cases = [(network, x), (halved, x.astype(jnp.bfloat16)), (halved, x)]
    exact, both, rounded = (compiled(f, *args)(*args) for args in cases)
    scale = np.abs(exact).max()
    assert both.dtype == jnp.bfloat16
    assert rounded.dtype == jnp.float32
    assert 1e-4 * scale < np.abs(both.astype(np.float32) - exact).max() < 0.1 * scale
    assert 1e-4 * scale < np.abs(rounded - exact).max() < 0.05 * scale
