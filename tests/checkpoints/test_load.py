"""Folders that become models, and folders that do not: one line says why."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import CheckpointError, InputError
from memjax.checkpoints import load, load_prompts, save
from memjax.checkpoints._layout import recognize
from memjax.diffusion import LinenNetwork, Model, VarianceExploding, from_prediction
from memjax.networks import ResidualMLP

SCHEDULER = {"_class_name": "DDPMScheduler", "beta_end": 0.02}
INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


def write(folder, **files):
    """JSON files; ``unet__config`` is unet/config.json."""
    for name, content in files.items():
        file = folder / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


# What the JSON files alone tell, with no weights and no PyTorch.
REFUSED = {
    "nothing": (lambda f: f / "none", "none: expected the folder of a model, found nothing"),
    "a file of weights": (
        lambda f: (f / "a.safetensors").write_bytes(b"x") and f / "a.safetensors",
        r"found a file; diffusers' from_single_file\(file\).save_pretrained\(folder\)",
    ),
    "a pickle": (
        lambda f: (f / "model.ckpt").write_bytes(b"x") and f / "model.ckpt",
        r"model.ckpt: expected safetensors, found .ckpt, which may be a pickle .* convert it",
    ),
    "a folder of pickles": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"x") and f,
        "expected safetensors, found .bin",
    ),
    "an empty folder": (lambda f: f, "expected a file config.json or model_index.json, found nei"),
    "a model of transformers": (
        lambda f: write(f, config={"architectures": ["BertModel"]}),
        r"config.json: expected _class_name, .* found none; a model of transformers is no score",
    ),
    "another network": (
        lambda f: write(f, config={"_class_name": "DiTTransformer2DModel"}),
        r"expected UNet2DModel, UNet2DConditionModel or FluxTransformer2DModel, found "
        r"DiTTransformer2DModel; load it in PyTorch and hand the module to memjax.from_torch",
    ),
    "a pipeline with another transformer": (
        lambda f: write(
            f,
            model_index={
                "_class_name": "StableDiffusion3Pipeline",
                "transformer": ["diffusers", "SD3Transformer2DModel"],
            },
        ),
        r"expected UNet2DModel, .* found SD3Transformer2DModel; load it in .* memjax.from_torch",
    ),
    "a pipeline without a network": (
        lambda f: write(
            f, model_index={"_class_name": "APipeline", "prior": ["diffusers", "PriorTransformer"]}
        ),
        r"expected a part 'unet' or 'transformer', found prior \(PriorTransformer\); name another "
        r"with component=, or load it in .* memjax.from_torch",
    ),
    "a pipeline with code of its own": (
        lambda f: write(f, model_index=INDEX | {"unet": ["my_unet", "MyUNet"]}),
        "or FluxTransformer2DModel, found MyUNet; load it in PyTorch",
    ),
    "a part that is not there": (
        lambda f: write(f, model_index=INDEX),
        "expected unet/config.json, which model_index.json lists, found none; download that part",
    ),
    "a part of another class": (
        lambda f: write(f, model_index=INDEX, unet__config={"_class_name": "VQModel"}),
        "_class_name: expected UNet2DModel, as model_index.json says, found VQModel",
    ),
    "no scheduler": (
        lambda f: write(f, config={"_class_name": "UNet2DModel", "sample_size": 8}),
        "expected scheduler_config.json, .* weights alone do not say how noise was added",
    ),
    "no size": (
        lambda f: write(f, config={"_class_name": "UNet2DModel"}, scheduler_config=SCHEDULER),
        "config.json: sample_size: expected a number of pixels, or two, found None; write .* or "
        "give memjax.load a sample_size",
    ),
    "no weights": (
        lambda f: write(
            f,
            config={"_class_name": "UNet2DModel", "sample_size": 8},
            scheduler_config=SCHEDULER,
        ),
        "expected a file diffusion_pytorch_model.safetensors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_how(name, tmp_path):
    make, message = REFUSED[name]
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_components_are_named(tmp_path):
    write(tmp_path, model_index=INDEX, unet__config={"_class_name": "UNet2DModel"})
    assert recognize(tmp_path).kind == "UNet2DModel"
    assert recognize(tmp_path, "unet").folder == tmp_path / "unet"
    with pytest.raises(CheckpointError, match=r"expected a part 'prior', found .*unet \(UNet2D"):
        load(tmp_path, component="prior")
    with pytest.raises(CheckpointError, match=r"found DDPMScheduler; load it in PyTorch"):
        load(tmp_path, component="scheduler")
    with pytest.raises(CheckpointError, match="component: expected a pipeline"):
        load(tmp_path / "unet", component="unet")
    with pytest.raises(CheckpointError, match="expected a pipeline with a text_encoder, found non"):
        load_prompts(tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"scheduler_config": {"_class_name": "LCMScheduler"}}, "its scheduler is LCMScheduler"),
        ({"config": {"_class_name": "UNet2DModel", "time_cond_proj_dim": 256}}, "time_cond_proj"),
        (
            {"config": {"_class_name": "UNet2DModel", "_name_or_path": "someone/sdxl-turbo"}},
            "its name is 'sdxl-turbo'",
        ),
    ],
)
def test_distilled_models_warn(files, reason, tmp_path):
    plain = {"config": {"_class_name": "UNet2DModel"}, "scheduler_config": SCHEDULER}
    write(tmp_path, **(plain | files))
    with pytest.warns(UserWarning, match=f"distilled model .*{reason}.*not the score"):
        with pytest.raises(CheckpointError):  # there are no weights
            load(tmp_path)


def test_others_do_not_warn(tmp_path):
    config = {"_class_name": "UNet2DModel", "_name_or_path": "me/turbofan-photos"}
    write(tmp_path, config=config, scheduler_config=SCHEDULER)
    with pytest.raises(CheckpointError):
        load(tmp_path)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A model of ours."""
    module = ResidualMLP(width=8, num_blocks=1, embedding_width=4)
    variables = module.init(jax.random.key(0), jnp.zeros((4, 4, 1), jnp.float32), jnp.float32(0))
    score = from_prediction(
        LinenNetwork(module, variables), prediction="denoiser", schedule=VarianceExploding()
    )
    model = Model(score, (4, 4, 1), sigma_min=0.002, sigma_max=80.0, data_std=0.25)
    path = tmp_path_factory.mktemp("own") / "mine"
    save(model, path)
    return model, path


def test_our_own_models_say_where_they_are_from(own):
    model, path = own
    loaded = load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    assert loaded.data_std == 0.25
    assert (loaded.origin.folder, loaded.origin.network) == ("mine", "ResidualMLP")
    assert not loaded.origin.assumed
    other = load(path, data_std=0.5)
    assert (other.data_std, other.origin.data_std) == (0.5, "given")
    options = [{"component": "unet"}, {"variant": "fp16"}, {"dtype": jnp.bfloat16}]
    for option in [*options, {"sample_size": 4}]:
        with pytest.raises(InputError, match="expected no component, variant, dtype or sample_si"):
            load(path, **option)


@pytest.fixture(scope="module")
def ddpm(torch_pipelines, tmp_path_factory):
    """The network in PyTorch, and the folder of its pipeline."""
    folder = tmp_path_factory.mktemp("ddpm") / "pipeline"
    return torch_pipelines.ddpm(folder).unet, folder


@jax.jit
def evaluate(model, x, sigma):
    return model(x, sigma)


@pytest.fixture(scope="module")
def noise(ddpm, torch_pipelines):
    """An image x and a sigma, and what the network in PyTorch says is its noise."""
    unet, folder = ddpm
    x = np.random.default_rng(0).normal(size=(8, 8, 1)).astype(np.float32)
    sigma = float(load(folder).raw_score.schedule.sigma(250.0))
    expected = unet(torch_pipelines.tensor(x / (1 + sigma**2) ** 0.5), 250).sample
    return x, sigma, torch_pipelines.array(expected)


def same_noise(model, noise, atol=1e-5):
    x, sigma, expected = noise
    found = -sigma * evaluate(model, jnp.asarray(x), sigma)
    np.testing.assert_allclose(found, expected, atol=atol)


def test_a_pipeline_of_pixels(ddpm, noise):
    model = load(ddpm[1])
    assert model.event_shape == (8, 8, 1)
    assert model.null_condition is None
    assert round(model.sigma_max, 1) == 157.4
    assert (model.data_std, model.origin.assumed) == (0.5, True)
    assert load(ddpm[1], data_std=0.3).data_std == 0.3
    assert not load(ddpm[1], data_std=0.3).origin.assumed
    measured = model.with_data_std(0.7, "measured")
    assert (measured.data_std, measured.origin.folder) == (0.7, "pipeline")
    assert not measured.origin.assumed
    same_noise(model, noise)


LAYOUTS = {
    "the network's own folder": lambda f: f / "unet",
    "everything at the root": lambda f: _flat(f, index=True),
    "one network, its scheduler beside it": lambda f: _flat(f, index=False),
}


def _flat(folder, index):
    for file in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        file.rename(folder / file.name)
    (folder / "unet").rmdir()
    (folder / "scheduler").rmdir()
    if not index:
        (folder / "model_index.json").unlink()
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts(name, ddpm, noise, tmp_path):
    folder = shutil.copytree(ddpm[1], tmp_path / "pipeline")
    same_noise(load(LAYOUTS[name](folder)), noise)


def test_shards_and_variants(torch_pipelines, noise, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_pipelines.ddpm(tmp_path / "shards", max_shard_size="20KB")
        torch_pipelines.ddpm(tmp_path / "half", variant="fp16")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1
    same_noise(load(tmp_path / "shards"), noise)
    same_noise(load(tmp_path / "half"), noise)  # the only ones there are
    same_noise(load(tmp_path / "half", variant="fp16"), noise)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.bf16.safetensors"):
        load(tmp_path / "half", variant="bf16")


def test_dtypes(ddpm, noise):
    model = load(ddpm[1], dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    same_noise(model, noise, atol=0.1)


def test_options_and_arrays_that_do_not_fit_name_their_file(ddpm, tmp_path):
    folder = shutil.copytree(ddpm[1], tmp_path / "pipeline")
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    for change, message in [
        ({"time_embedding_type": "fourier"}, "time_embedding_type.*memjax.from_torch"),
        ({"block_out_channels": [8, 8]}, "weights: expected"),
        ({"invented": 3}, "invented: expected no such option"),
    ]:
        file.write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=f"unet/config.json: {message}") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_another_size_than_the_configuration_says(ddpm, noise, tmp_path):
    assert load(ddpm[1], sample_size=16).event_shape == (16, 16, 1)
    assert load(ddpm[1], sample_size=(4, 6)).event_shape == (4, 6, 1)
    same_noise(load(ddpm[1], sample_size=8), noise)
    for size in (0, -8, True, (8, 0), 2**14 + 1):
        with pytest.raises(InputError, match=r"^sample_size: expected a number of pixels from 1"):
            load(ddpm[1], sample_size=size)
    folder = shutil.copytree(ddpm[1], tmp_path / "pipeline")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": None}))
    assert load(folder, sample_size=8).event_shape == (8, 8, 1)


def test_a_class_conditional_network_has_no_null(torch_pipelines, tmp_path):
    network = torch_pipelines.unet2d(num_class_embeds=3)
    network.save_pretrained(tmp_path)
    write(tmp_path, scheduler_config=SCHEDULER)
    model = load(tmp_path)
    assert model.null_condition is None
    x = np.random.default_rng(0).normal(size=(8, 8, 1)).astype(np.float32)
    sigma = float(model.raw_score.schedule.sigma(100.0))
    labels = torch_pipelines.torch.tensor([2])
    x_t = torch_pipelines.tensor(x / (1 + sigma**2) ** 0.5)
    expected = network(x_t, 100, class_labels=labels).sample
    found = jax.jit(lambda m, x, c: -sigma * m(x, sigma, c))(model, x, jnp.int32(2))
    np.testing.assert_allclose(found, torch_pipelines.array(expected), atol=1e-5)
    with pytest.raises(InputError, match="condition: expected the label of a class, got None"):
        model(jnp.asarray(x), sigma)


def test_preconditioned_networks(torch_pipelines, tmp_path):
    """A raw network of EDM, under the scheduler that knows its preconditioning."""
    from diffusers import EDMEulerScheduler

    network = torch_pipelines.unet2d()
    network.save_pretrained(tmp_path)
    scheduler = EDMEulerScheduler(sigma_data=0.7)
    scheduler.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (model.data_std, model.origin.assumed) == (0.7, False)
    x = np.random.default_rng(0).normal(size=(8, 8, 1)).astype(np.float32)
    sigma = 1.3
    inputs = scheduler.precondition_inputs(torch_pipelines.tensor(x), sigma)
    time = scheduler.precondition_noise(sigma)
    output = scheduler.precondition_outputs(
        torch_pipelines.tensor(x), network(inputs, time).sample, sigma
    )
    expected = (torch_pipelines.array(output) - x) / sigma**2
    np.testing.assert_allclose(evaluate(model, x, sigma), expected, atol=1e-5)
