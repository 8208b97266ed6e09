"""Published networks against committed files that PyTorch wrote (``make_golden.py``)."""

import functools
import json
import lzma
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from memjax.networks.autoencoder_kl import AutoencoderKL
from memjax.networks.clip_text import CLIPTextModelWithProjection
from memjax.networks.flux import FluxTransformer2DModel
from memjax.networks.t5_encoder import T5EncoderModel
from memjax.networks.unet2d import UNet2DModel
from memjax.networks.unet2d_condition import TextCondition, UNet2DConditionModel

GOLDEN = Path(__file__).with_name("golden")
UNETS = {
    "unet2d-ddpm": UNet2DModel,
    "unet2d-classes": UNet2DModel,
    "unet2d-condition-1": UNet2DConditionModel,
    "unet2d-condition-xl": UNet2DConditionModel,
    "flux": FluxTransformer2DModel,
}


def load(loaded, name, cls):
    folder = GOLDEN / name
    arrays = load_file(folder / "model.safetensors")
    network = cls.from_weights(loaded(arrays), json.loads((folder / "config.json").read_text()))
    return network, dict(np.load(folder / "reference.npz"))


def unet(loaded, name):
    """The network as a function of one image alone, and the reference."""
    network, golden = load(loaded, name, UNETS[name])
    condition = None
    if "label" in golden:
        condition = jnp.asarray(golden["label"])
    if "hidden_states" in golden:
        parts = (golden.get(part) for part in TextCondition._fields)
        condition = TextCondition(*(None if a is None else jnp.asarray(a) for a in parts))
    return network, golden, lambda f, x: f(x, jnp.asarray(golden["t"]), condition)


@pytest.mark.parametrize("name", UNETS)
def test_unet_and_its_products(loaded, products, name):
    network, golden, f = unet(loaded, name)
    x, v, u = (golden[key].astype(np.float32) for key in ("x", "v", "u"))
    y, jv, jtu = products(f, network, x, v, u)
    np.testing.assert_allclose(y, golden["y"], atol=1e-5 * max(1, np.abs(y).max()), rtol=0)
    for found, expected in ((jv, golden["jv"]), (jtu, golden["jtu"])):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    assert np.vdot(u, jv) == pytest.approx(np.vdot(jtu, v), abs=1e-4)


@pytest.mark.parametrize("name", UNETS)
def test_unet_in_double_precision(loaded, compiled, x64, name):
    network, golden, f = unet(loaded, name)
    found = compiled(f, network, golden["x"])(network, golden["x"])
    np.testing.assert_allclose(found, golden["y"], atol=1e-7, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(np.float32, 1e-5), (np.float64, 1e-7)])
def test_autoencoder(loaded, compiled, x64, dtype, atol):
    vae, golden = load(loaded, "vae", AutoencoderKL)
    x, z = golden["x"].astype(dtype), golden["z"].astype(dtype)

    def both(vae, x, z):
        return *vae.encode(x), vae.decode(z)

    found = compiled(both, vae, x, z)(vae, x, z)
    for name, a in zip(("mean", "logvar", "decoded"), found, strict=True):
        np.testing.assert_allclose(a, golden[name], atol=atol, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(np.float32, 1e-5), (np.float64, 1e-7)])
def test_text_encoder(loaded, compiled, x64, dtype, atol):
    encoder, golden = load(loaded, "clip-text", CLIPTextModelWithProjection)
    encoder = jax.tree.map(lambda a: a.astype(dtype), encoder)
    tokens = jnp.asarray(golden["tokens"])
    found = compiled(lambda f, tokens: f(tokens), encoder, tokens)(encoder, tokens)
    for name, a in found._asdict().items():
        np.testing.assert_allclose(a, golden[name], atol=atol, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(np.float32, 1e-5), (np.float64, 1e-7)])
def test_t5_encoder(loaded, compiled, x64, dtype, atol):
    encoder, golden = load(loaded, "t5-text", T5EncoderModel)
    encoder = jax.tree.map(lambda a: a.astype(dtype), encoder)
    tokens = jnp.asarray(golden["tokens"])
    found = compiled(lambda f, tokens: f(tokens), encoder, tokens)(encoder, tokens)
    np.testing.assert_allclose(found, golden["last"], atol=atol, rtol=0)


@functools.cache
def full_sizes():
    return json.loads(lzma.decompress((GOLDEN / "full_sizes.json.xz").read_bytes()))


# Millions of parameters, as published or counted by diffusers.
PARAMETERS = {
    "ddpm-cifar10-32": 35.7,
    "ddpm-celebahq-256": 113.7,
    "stable-diffusion-1.5": 859.5,
    "stable-diffusion-2.1": 865.9,
    "stable-diffusion-xl": 2567.5,
    "flux-dev": 11901.4,
    "flux-schnell": 11891.2,
    "stable-diffusion-vae": 83.7,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size(name):
    """Every array of the published model is used, and none is missing; nothing is allocated."""
    model = full_sizes()[name]
    shapes = {
        key: tuple(shape[i] for i in (2, 3, 1, 0)) if len(shape) == 4 else tuple(shape)
        for key, shape in model["shapes"].items()
    }
    assert sum(map(np.prod, shapes.values())) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.05)
    weights = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}
    classes = {cls.__name__: cls for cls in (*UNETS.values(), AutoencoderKL)}
    network = classes[model["class"]].from_weights(weights, model["config"])
    assert network.weights == weights


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_sizes_are_those_of_diffusers(torch_models, name):
    """The committed names and shapes, and the defaults of options that are left out."""
    import diffusers

    model = full_sizes()[name]
    with torch_models.torch.device("meta"):
        theirs = getattr(diffusers, model["class"])(**model["config"])
    assert {key: list(a.shape) for key, a in theirs.state_dict().items()} == model["shapes"]


def test_defaults_are_those_of_diffusers(torch_models):
    """Each option that diffusers knows stands in our table, with its default."""
    import inspect

    import diffusers
    import transformers

    from memjax.networks.autoencoder_kl import AutoencoderKLOptions
    from memjax.networks.clip_text import CLIPTextOptions
    from memjax.networks.flux import FluxOptions
    from memjax.networks.unet2d import UNet2DOptions
    from memjax.networks.unet2d_condition import UNet2DConditionOptions

    for name, ours in {
        "UNet2DModel": UNet2DOptions,
        "UNet2DConditionModel": UNet2DConditionOptions,
        "AutoencoderKL": AutoencoderKLOptions,
        "FluxTransformer2DModel": FluxOptions,
    }.items():
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        theirs = {key: p.default for key, p in parameters.items() if key != "self"}
        assert ours()._asdict() == theirs
    config = transformers.CLIPTextConfig()
    assert CLIPTextOptions() == tuple(getattr(config, key) for key in CLIPTextOptions._fields)
