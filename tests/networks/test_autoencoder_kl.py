"""AutoencoderKL against diffusers' own, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLOptions

TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
VARIANTS = {
    "as in Stable Diffusion": {"layers_per_block": 2},
    "without convolutions of the moments": {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "act_fn": "mish",
        "latent_channels": 3,
        "norm_num_groups": 8,
    },
}


def build(torch_models, loaded, name):
    """Both autoencoders, an image of odd width and a latent."""
    from diffusers import AutoencoderKL as Theirs

    model = torch_models.randomized(Theirs(**TINY | VARIANTS[name]))
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    ours = AutoencoderKL.from_weights(loaded(arrays), dict(model.config))
    rng = np.random.default_rng(1)
    x, z = rng.normal(size=(6, 9, 3)), rng.normal(size=(3, 4, model.config.latent_channels))
    return model, ours, x.astype(np.float32), z.astype(np.float32)


def reference(torch_models, model, x, z):
    latent = model.encode(torch_models.image(x)).latent_dist
    tensors = latent.mean, latent.logvar, model.decode(torch_models.image(z)).sample
    return [torch_models.array(tensor) for tensor in tensors]


def both(vae, x, z):
    return *vae.encode(x), vae.decode(z)


@pytest.mark.parametrize("name", VARIANTS)
def test_encode_and_decode_are_those_of_diffusers(torch_models, loaded, compiled, name):
    model, vae, x, z = build(torch_models, loaded, name)
    found = compiled(both, vae, x, z)(vae, x, z)
    for a, b in zip(found, reference(torch_models, model, x, z), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_double_precision(torch_models, loaded, compiled, x64, name):
    model, vae, x, z = build(torch_models, loaded, name)
    x, z = x.astype(np.float64), z.astype(np.float64)
    found = compiled(both, vae, x, z)(vae, x, z)
    for a, b in zip(found, reference(torch_models, model.double(), x, z), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7, rtol=0)


def test_products_of_the_decoder(torch_models, loaded, products):
    name = "as in Stable Diffusion"
    model, vae, _, z = build(torch_models, loaded, name)
    rng = np.random.default_rng(2)
    v = rng.normal(size=z.shape).astype(np.float32)
    u = rng.normal(size=(6, 8, 3)).astype(np.float32)
    _, jv, jtu = products(lambda vae, z: vae.decode(z), vae, z, v, u)
    model = model.double()
    expected = torch_models.products(
        lambda z: model.decode(z).sample, *(a.astype(np.float64) for a in (z, v, u))
    )
    for a, b in zip((jv, jtu), expected[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), rtol=0)
    assert np.vdot(u, jv) == pytest.approx(np.vdot(jtu, v), abs=1e-4)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("down_block_types", ["AttnDownEncoderBlock2D"]),
        ("up_block_types", ["AttnUpDecoderBlock2D"]),
        ("act_fn", "tanh"),
        ("block_out_channels", [8.0, 16.0]),
        ("spatial_norm", True),
    ],
)
def test_an_unsupported_option_is_refused_by_name(option, value):
    with pytest.raises(InputError, match=rf"^{option}: .*got .*; memjax\.from_torch"):
        AutoencoderKL.from_weights({}, TINY | {option: value})


def test_a_missing_array_is_named():
    with pytest.raises(InputError, match=r"expected an array 'encoder.conv_in.weight' of shape"):
        AutoencoderKL.from_weights({}, TINY)


def test_channels_must_fit():
    vae = AutoencoderKL({}, AutoencoderKLOptions(**TINY))
    with pytest.raises(InputError, match="image: expected 3 channels, got 4"):
        vae.encode(jnp.zeros((4, 4, 4)))
    with pytest.raises(InputError, match="latent: expected 4 channels, got 3"):
        jax.eval_shape(vae.decode, jnp.zeros((4, 4, 3)))
