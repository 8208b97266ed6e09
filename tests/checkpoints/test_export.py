"""Models written for diffusers: the same numbers there, and a reason where they cannot be."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from memjax._core.errors import CheckpointError, InputError
from memjax.checkpoints import load, save
from memjax.checkpoints.export import export_diffusers
from memjax.diffusion import (
    ContinuousVP,
    DiscreteVP,
    EDMPreconditioned,
    FlowMatching,
    LinenNetwork,
    Model,
    VarianceExploding,
    from_prediction,
)
from memjax.networks import LinenUNet2D, ResidualMLP, UNet2DModel
from memjax.training import train

GOLDEN = Path(__file__).parent.parent / "networks" / "golden" / "unet2d-ddpm"
SCHEDULES = {
    "epsilon": (DiscreteVP(num_train_timesteps=100), "epsilon"),
    "v": (DiscreteVP("scaled_linear", 50, rescale_betas_zero_snr=True), "v_prediction"),
    "sample": (DiscreteVP(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3)), "sample"),
    "flow": (FlowMatching(t_min=1e-3, t_max=1 - 1e-3, time_scale=1000.0), "flow"),
    "edm": (VarianceExploding(0.01, 40.0), "denoiser"),
}


@pytest.fixture(scope="module")
def network():
    """A random network, from a file that PyTorch wrote."""
    arrays = load_file(GOLDEN / "model.safetensors")
    config = json.loads((GOLDEN / "config.json").read_text()) | {"sample_size": 8}

    def kernel_last(a):
        return jnp.asarray(a.transpose(2, 3, 1, 0) if a.ndim == 4 else a, jnp.float32)

    return UNet2DModel.from_weights({k: kernel_last(a) for k, a in arrays.items()}, config)


def model_of(network, schedule, prediction, **options):
    if prediction == "denoiser":
        network = EDMPreconditioned(network, 0.6)
    score = from_prediction(network, prediction=prediction, schedule=schedule)
    noise = {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max, "data_std": 0.6}
    return Model(score, (8, 8, channels_of(score)), **noise, **options)


def channels_of(score):
    network = score.network
    raw = network.network if isinstance(network, EDMPreconditioned) else network
    return raw.options.in_channels if isinstance(raw, UNet2DModel) else 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_written_is_read_again(name, network, tmp_path):
    model = model_of(network, *SCHEDULES[name])
    export_diffusers(model, tmp_path / "out")
    found = load(tmp_path / "out", data_std=0.6)
    assert jax.tree.structure(found) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
    pipeline = "DDPMPipeline" if isinstance(SCHEDULES[name][0], DiscreteVP) else ""
    assert found.origin.pipeline == pipeline
    export_diffusers(found, tmp_path / "again")
    files = [sorted(f.rglob("*.*")) for f in (tmp_path / "out", tmp_path / "again")]
    assert len(files[0]) == (4 if pipeline else 3)
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_diffusers_reads_it(torch_pipelines, network, tmp_path):
    """The network, the pipeline and the schedulers, with outputs that differ by rounding."""
    from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

    export_diffusers(model_of(network, *SCHEDULES["v"]), tmp_path / "v")
    pipeline = torch_pipelines.DDPMPipeline.from_pretrained(tmp_path / "v")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    alphas = pipeline.scheduler.alphas_cumprod.numpy()
    sigmas = SCHEDULES["v"][0].sigma(jnp.arange(49, dtype=jnp.float32))
    np.testing.assert_allclose(sigmas, np.sqrt(1 / alphas[:49] - 1), rtol=1e-4)
    x = np.random.default_rng(0).normal(size=(8, 8, network.options.in_channels))
    x = x.astype(np.float32)
    found = jax.jit(lambda n, x: n(x, jnp.float32(17)))(network, x)
    expected = pipeline.unet(torch_pipelines.tensor(x), 17).sample
    np.testing.assert_allclose(found, torch_pipelines.array(expected), atol=1e-5)

    for name, kind in {
        "edm": EDMEulerScheduler,
        "flow": FlowMatchEulerDiscreteScheduler,
    }.items():
        export_diffusers(model_of(network, *SCHEDULES[name]), tmp_path / name)
        scheduler = kind.from_pretrained(tmp_path / name)
        again = UNet2DModel.from_pretrained(tmp_path / name)
        expected = again(torch_pipelines.tensor(x), 17).sample
        np.testing.assert_allclose(found, torch_pipelines.array(expected), atol=1e-5)
        if name == "edm":
            assert scheduler.config.sigma_data == 0.6


@pytest.fixture(scope="module", params=[0, 3], ids=["plain", "conditions"])
def trained(request):
    """A model of our own training in the architecture of diffusers, all its weights moved."""
    images = np.random.default_rng(0).normal(size=(16, 4, 4, 2)).astype(np.float32)
    count = request.param
    module = LinenUNet2D((8, 16), groups=4, attention=True, num_conditions=count)
    labels = np.arange(16, dtype=np.int32) % count if count else None
    return train(images, network=module, conditions=labels, steps=3, batch_size=4)


def test_a_model_of_our_training_is_written_whole(trained, tmp_path):
    save(trained, tmp_path / "own")
    own = load(tmp_path / "own")
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)
    export_diffusers(own, tmp_path / "theirs")
    found = load(tmp_path / "theirs")
    assert found.data_std == pytest.approx(trained.data_std)
    x = jax.random.normal(jax.random.key(0), (4, 4, 2))
    label = None if trained.null_condition is None else jnp.int32(1)
    both = [np.asarray(jax.jit(lambda m: m(x, 0.5, label))(m)) for m in (own, found)]
    np.testing.assert_allclose(both[1], both[0], rtol=1e-6, atol=1e-6)
    if label is not None:  # the label after the last stands for none
        last = jax.jit(lambda m: m(x, 0.5, jnp.int32(3)))(found)
        none = jax.jit(lambda m: m(x, 0.5))(own)
        np.testing.assert_allclose(last, none, rtol=1e-6, atol=1e-6)


def test_diffusers_reads_what_we_have_trained(torch_pipelines, trained, tmp_path):
    from diffusers import UNet2DModel

    export_diffusers(trained, tmp_path / "out")
    theirs = UNet2DModel.from_pretrained(tmp_path / "out")
    network = trained.raw_score.network.network
    x = np.random.default_rng(1).normal(size=(4, 4, 2)).astype(np.float32)
    t, label = -0.4, None if trained.null_condition is None else 2
    given = () if label is None else (jnp.int32(label),)
    found = jax.jit(lambda f: f(jnp.asarray(x), jnp.float32(t), *given))(network)
    torch = torch_pipelines.torch
    labels = None if label is None else torch.tensor([label])
    expected = theirs(torch_pipelines.tensor(x), torch.tensor([t]), class_labels=labels).sample
    np.testing.assert_allclose(found, torch_pipelines.array(expected), atol=1e-5)


def test_what_diffusers_has_not_is_refused(network, tmp_path):
    module = ResidualMLP(width=8, num_blocks=1, embedding_width=4)
    x = jnp.zeros((8, 8, 1), jnp.float32)
    ours = LinenNetwork(module, module.init(jax.random.key(0), x, jnp.float32(0)))
    decoded = model_of(network, *SCHEDULES["epsilon"], decode=lambda z: 2 * z)
    plain = Model(lambda x, s, c: -x, (2,), sigma_min=0.1, sigma_max=1.0, data_std=1.0)
    for model, message in [
        (model_of(ours, *SCHEDULES["edm"]), "network: expected a UNet2DModel, got ResidualMLP"),
        (model_of(network, ContinuousVP(), "epsilon"), "got epsilon under ContinuousVP"),
        (model_of(network, DiscreteVP(), "flow"), "got flow under DiscreteVP"),
        (decoded, "expected a model of pixels"),
        (plain, "model: expected the score of a network"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            export_diffusers(model, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_file_is_overwritten(network, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="expected a new or empty folder, found files"):
        export_diffusers(model_of(network, *SCHEDULES["epsilon"]), tmp_path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_diffusers(model_of(network, *SCHEDULES["epsilon"]), tmp_path / "mine.txt" / "out")
