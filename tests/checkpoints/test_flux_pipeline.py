"""A pipeline of Flux's shape, against diffusers, and one network of it without PyTorch."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import CheckpointError, InputError
from memjax.checkpoints import load, load_prompts
from memjax.checkpoints.inspect import inspect_model
from memjax.diffusion.sampling import ddim
from memjax.diffusion.schedule import FlowMatching
from memjax.networks import FluxTransformer2DModel, TextCondition

GOLDEN = Path(__file__).parents[1] / "networks" / "golden" / "flux"
SIDES = (4, 6)
PROMPT = "a photo of the cat and the dog"
WARNING = "ignore:.*looks like a distilled model"
pytestmark = pytest.mark.filterwarnings(WARNING)


@pytest.fixture(scope="module", params=["dev", "schnell"])
def saved(request, torch_pipelines, tmp_path_factory):
    """The pipeline in PyTorch and its folder."""
    folder = tmp_path_factory.mktemp("flux") / "pipeline"
    return torch_pipelines.flux(folder, guidance=request.param == "dev"), folder


@pytest.fixture
def flux(saved):
    """The pipeline in PyTorch, and our model of small latents."""
    return saved[0], load(saved[1], sample_size=SIDES)


@pytest.fixture(scope="module")
def text():
    """A condition made elsewhere."""
    rng = np.random.default_rng(0)
    hidden, pooled = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((5, 10), 16))
    return TextCondition(hidden, pooled)


def velocity(torch_pipelines, pipeline, x_t, t, condition, guidance):
    """What the network in PyTorch says of [1, c, h, w] at t in 0..1, in the pipeline's words."""
    torch = torch_pipelines.torch
    _, c, h, w = x_t.shape
    hidden, pooled = (torch.tensor(np.asarray(a))[None] for a in condition[:2])
    told = pipeline.transformer.config.guidance_embeds
    out = pipeline.transformer(
        hidden_states=pipeline._pack_latents(x_t, 1, c, h, w),
        timestep=torch.tensor([t], dtype=torch.float32),
        guidance=torch.tensor([guidance]) if told else None,
        pooled_projections=pooled,
        encoder_hidden_states=hidden,
        txt_ids=torch.zeros(hidden.shape[1], 3),
        img_ids=pipeline._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", torch.float32),
    ).sample
    return pipeline._unpack_latents(out, h, w, 1)


def test_the_model_says_what_it_is_and_warns(saved):
    pipeline, folder = saved
    told = pipeline.transformer.config.guidance_embeds
    reason = "its option guidance_embeds" if told else "Flux without guidance as an input"
    with pytest.warns(UserWarning, match=f"distilled model .{reason}.*is not the score"):
        model = load(folder)
    assert model.event_shape == (128, 128, 4)
    assert (model.data_std, model.null_condition) == (1.0, None)
    schedule = FlowMatching(t_min=0.001, t_max=0.999, time_scale=1000.0)
    assert model.raw_score.schedule == schedule
    assert (model.sigma_min, model.sigma_max) == (schedule.sigma_min, schedule.sigma_max)
    origin = model.origin
    assert (origin.pipeline, origin.network) == ("FluxPipeline", "FluxTransformer2DModel")
    assert origin.prediction == "flow"
    assert [name for name, _ in origin.sha256] == ["transformer", "vae"]
    assert not origin.assumed
    assert load(folder, component="transformer").origin == origin


def test_encoder_and_decoder_are_those_of_the_pipeline(flux, torch_pipelines):
    pipeline, model = flux
    assert model.event_shape == (*SIDES, 4)
    image = np.random.default_rng(1).uniform(-1, 1, (8, 12, 3)).astype(np.float32)
    latent, decoded = jax.jit(lambda m, x: (m.encode(x), m.decode(m.encode(x))))(model, image)
    mean = pipeline.vae.encode(torch_pipelines.tensor(image)).latent_dist.mean
    config = pipeline.vae.config
    expected = (mean - config.shift_factor) * config.scaling_factor
    np.testing.assert_allclose(latent, torch_pipelines.array(expected), atol=1e-5)
    expected = torch_pipelines.array(pipeline.vae.decode(mean).sample)
    np.testing.assert_allclose(decoded, expected, atol=1e-4)


def test_the_score_is_that_of_the_flow(flux, torch_pipelines, text, fast_compile):
    """At x = x_t / (1 - t), sigma = t / (1 - t): (D - x)/sigma^2 with D = x_t - t v."""
    pipeline, model = flux
    x = np.random.default_rng(2).normal(size=(*SIDES, 4)).astype(np.float32)
    given = text
    guidance = 1.0
    if pipeline.transformer.config.guidance_embeds:
        guidance = 2.5
        given = text._replace(guidance=jnp.float32(guidance))
    score = jax.jit(lambda m, x, t, c: m(x, t / (1 - t), c))
    lowered = score.lower(model, x, jnp.float32(0.5), given)
    score = lowered.compile(compiler_options=fast_compile)
    for t in (0.1, 0.5, 0.9):
        x_t = (1 - t) * torch_pipelines.tensor(x)
        v = velocity(torch_pipelines, pipeline, x_t, t, text, guidance)
        expected = (torch_pipelines.array(x_t - t * v) - x) * ((1 - t) / t) ** 2
        found = score(model, x, jnp.float32(t), given)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_steps_of_the_sampler_are_those_of_diffusers(flux, torch_pipelines, text, fast_compile):
    """A step of Euler along the flow is one of DDIM, in whatever coordinates."""
    pipeline, model = flux
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(sigmas=[0.95, 0.7, 0.4])
    x_t = torch_pipelines.tensor(np.random.default_rng(3).normal(size=(*SIDES, 4)))
    x_t = x_t.float()
    times = scheduler.sigmas.numpy()
    sigmas = jnp.asarray(times / (1 - times))
    start = torch_pipelines.array(x_t) / (1 - times[0])
    follow = jax.jit(lambda score, x, c: ddim(score, x, sigmas, c))
    follow = follow.lower(model, start, text).compile(compiler_options=fast_compile)
    for t, time in zip(scheduler.timesteps, times, strict=False):
        v = velocity(torch_pipelines, pipeline, x_t, time, text, 1.0)
        x_t = scheduler.step(v, t, x_t).prev_sample
    expected = torch_pipelines.array(x_t)
    found = follow(model, start, text)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_from_a_prompt_to_latents(torch_pipelines, tmp_path, fast_compile):
    """The whole way of the pipeline of diffusers, from the same noise."""
    texts = torch_pipelines.flux_text(tmp_path)
    pipeline = torch_pipelines.flux(tmp_path / "pipeline", guidance=True, **texts)
    pipeline.set_progress_bar_config(disable=True)
    model = load(tmp_path / "pipeline", sample_size=SIDES)
    names = ["transformer", "vae", "text_encoder", "text_encoder_2"]
    assert [name for name, _ in model.origin.sha256] == names
    encode = load_prompts(tmp_path / "pipeline")
    empty = encode("")
    for name in ("hidden_states", "pooled"):
        found = getattr(model.null_condition, name)
        np.testing.assert_array_equal(found, getattr(empty, name))
    assert inspect_model(tmp_path / "pipeline").null_condition
    noise = np.random.default_rng(4).normal(size=(*SIDES, 4)).astype(np.float32)
    x_t = torch_pipelines.tensor(noise)
    expected = pipeline(
        PROMPT,
        height=2 * SIDES[0],
        width=2 * SIDES[1],
        sigmas=[0.95, 0.7, 0.4],
        num_inference_steps=3,
        guidance_scale=2.5,
        latents=pipeline._pack_latents(x_t, *x_t.shape),
        output_type="latent",
    ).images
    expected = pipeline._unpack_latents(expected, *SIDES, 1)
    times = pipeline.scheduler.sigmas.numpy()
    sigmas = jnp.asarray(times / (1 - times))
    start, prompt = noise / (1 - times[0]), encode(PROMPT)._replace(guidance=jnp.float32(2.5))
    follow = jax.jit(lambda score, x, c: ddim(score, x, sigmas, c))
    follow = follow.lower(model, start, prompt).compile(compiler_options=fast_compile)
    expected = torch_pipelines.array(expected)
    found = follow(model, start, prompt)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_the_folder_is_described(saved):
    pipeline, folder = saved
    found = inspect_model(folder)
    assert found.problem == ""
    parts = {part.name: part.parameters for part in found.parts}
    for name in ("transformer", "vae"):
        count = sum(p.numel() for p in getattr(pipeline, name).parameters())
        assert parts[name] == count
    assert (found.network, found.prediction) == ("FluxTransformer2DModel", "flow")
    assert (found.event_shape, found.image_shape) == ((128, 128, 4), (256, 256))
    assert (found.latent, found.null_condition) == (True, False)
    words = "text, 10 numbers a token and 16 pooled"
    told = pipeline.transformer.config.guidance_embeds
    assert found.condition == words + ", and the strength of guidance, 1 unless given" * told
    (note,) = found.notes
    assert "distilled" in note
    # Two operations for each product of a query and a key, and as many for the values.
    pairs, width, layers = (64 * 64 + 512) ** 2, 24, 2
    assert 4 * pairs * width * layers < found.work.flops < 12 * pairs * width * layers
    assert found.work.weight_bytes == 4 * parts["transformer"]
    assert found.work.row_bytes > 4 * pairs * 2 * layers  # the shares of every head


@pytest.fixture
def alone(tmp_path):
    """The folder of a network, its scheduler beside it, as no library need be there to read."""
    shutil.copy(GOLDEN / "config.json", tmp_path)
    shutil.copy(GOLDEN / "model.safetensors", tmp_path / "diffusion_pytorch_model.safetensors")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    return tmp_path


def test_one_network_without_pytorch(alone):
    golden = np.load(GOLDEN / "reference.npz")
    with pytest.warns(UserWarning, match="its option guidance_embeds takes the guidance as an"):
        model = load(alone, sample_size=SIDES)
    assert model.event_shape == (*SIDES, 2)
    assert (model.data_std, model.origin.data_std) == (1.0, "of scaled latents")
    names = ("hidden_states", "pooled", "guidance")
    condition = TextCondition(**{name: jnp.asarray(golden[name]) for name in names})
    assert isinstance(model.raw_score.network, FluxTransformer2DModel)
    t = float(golden["t"]) / 1000
    x = np.asarray(golden["x"] / (1 - t), np.float32)
    found = jax.jit(lambda m, x, c: m(x, t / (1 - t), c))(model, x, condition)
    expected = (golden["x"] - t * golden["y"] - x) * ((1 - t) / t) ** 2
    np.testing.assert_allclose(found, expected, atol=1e-4)
    found = inspect_model(alone)
    assert (found.event_shape, found.image_shape) == ((128, 128, 2), None)
    assert found.latent


def test_what_is_refused(alone):
    for size in (5, (4, 7)):
        with pytest.raises(InputError, match=r"^sample_size: expected even sides for FluxTrans"):
            load(alone, sample_size=size)
    file = alone / "config.json"
    content = json.loads(file.read_text())
    for change, message in [
        ({"in_channels": 24, "out_channels": 8}, "out_channels: expected in_channels = 24, got 8"),
        ({"num_layers": 2}, "weights: expected an array 'transformer_blocks.1"),
        ({"guidance_embeds": False}, "weights: expected only what FluxTransformer2DModel"),
    ]:
        file.write_text(json.dumps(content | change))
        with pytest.raises(CheckpointError, match=f"config.json: {message}") as caught:
            load(alone)
        assert "\n" not in str(caught.value)
    file.write_text(json.dumps(content))
    (alone / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    message = "_class_name: expected a scheduler of flow matching for FluxTransformer2DModel, found"
    with pytest.raises(CheckpointError, match=f"scheduler_config.json: {message} DDIMScheduler"):
        load(alone)
    assert message in inspect_model(alone).problem
