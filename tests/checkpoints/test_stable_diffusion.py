"""A pipeline of Stable Diffusion's shape, from prompt to statistics, against diffusers."""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax.cli.app as app
from memjax.checkpoints import load, load_prompts
from memjax.detect.evaluate import _displacements, evaluate_detectors
from memjax.detect.p_laplace import PLaplaceFlux
from memjax.detect.score_gap import GapSharpness, ScoreGap
from memjax.diffusion.combine import guided
from memjax.diffusion.sampling import ddim
from memjax.diffusion.schedule import DiscreteVP
from memjax.networks import TextCondition

PROMPT = "a photo of the cat and the dog"
TIMES = {"wen": 981, "jeon": 501, "flux": 101}


@pytest.fixture(scope="module")
def stable(torch_pipelines, tmp_path_factory):
    """The pipeline in PyTorch, its folder and our model."""
    folder = tmp_path_factory.mktemp("stable")
    pipeline = torch_pipelines.stable_diffusion(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder / "pipeline", load(folder / "pipeline")


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).uniform(-1, 1, (16, 16, 3)).astype(np.float32)


def test_the_model_says_what_it_is(stable):
    pipeline, _, model = stable
    assert model.event_shape == (8, 8, 4)
    assert model.data_std == 1.0
    assert isinstance(model.null_condition, TextCondition)
    schedule = DiscreteVP("scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert (model.sigma_min, model.sigma_max) == (schedule.sigma_min, schedule.sigma_max)
    origin = model.origin
    assert (origin.folder, origin.pipeline) == ("pipeline", "StableDiffusionPipeline")
    assert origin.network == "UNet2DConditionModel"
    assert origin.schedule.startswith("DDIMScheduler: DiscreteVP(beta_schedule='scaled_linear'")
    assert origin.prediction == "epsilon"
    assert [name for name, _ in origin.sha256] == ["unet", "vae", "text_encoder"]
    assert not origin.assumed
    # Every array once: the halves of the VAE do not share any.
    halves = sum(
        leaf.size for half in (model.encode, model.decode) for leaf in jax.tree.leaves(half)
    )
    assert halves == sum(p.numel() for p in pipeline.vae.parameters())


def test_encoder_and_decoder_are_those_of_the_pipeline(stable, image, torch_pipelines):
    pipeline, _, model = stable
    scale = pipeline.vae.config.scaling_factor
    latent, decoded = jax.jit(lambda m, x: (m.encode(x), m.decode(m.encode(x))))(model, image)
    expected = pipeline.vae.encode(torch_pipelines.tensor(image)).latent_dist.mean
    np.testing.assert_allclose(latent, torch_pipelines.array(scale * expected), atol=1e-5)
    expected = pipeline.vae.decode(expected).sample
    np.testing.assert_allclose(decoded, torch_pipelines.array(expected), atol=1e-4)


@pytest.mark.slow
def test_statistics_of_a_prompt_and_an_image(stable, image, torch_pipelines):
    """Wen's and Jeon's statistics of the gap, and the p-Laplace flux of the image."""
    pipeline, folder, model = stable
    schedule = model.raw_score.schedule
    sigmas = {name: float(schedule.sigma(float(t))) for name, t in TIMES.items()}
    detectors = (
        ScoreGap(sigmas["wen"], "pure", 2),
        GapSharpness(sigmas["jeon"], "noised", 1),
        PLaplaceFlux(sigmas["flux"], num_pairs=2),
    )
    key = jax.random.key(0)

    @jax.jit
    def ours(model, image, condition):
        return evaluate_detectors(
            model, model.encode(image), detectors, key=key, condition=condition
        )

    found = ours(model, image, load_prompts(folder)(PROMPT))
    assert [int(f.status) for f in found] == [0, 0, 0]

    torch = torch_pipelines.torch
    latent = pipeline.vae.config.scaling_factor * torch_pipelines.array(
        pipeline.vae.encode(torch_pipelines.tensor(image)).latent_dist.mean
    )
    given, null = pipeline.encode_prompt(PROMPT, "cpu", 1, True)

    def score(x, name, condition):
        sigma = sigmas[name]
        x_t = x / (1 + sigma**2) ** 0.5
        return -pipeline.unet(x_t, TIMES[name], condition).sample / sigma

    def gap(x, name):
        return score(x, name, given) - score(x, name, null)

    def points(detector):
        places = list(dict.fromkeys(need.point.place for need in detector.needs(latent.size)))
        steps = np.asarray(_displacements(places, key, jnp.asarray(latent)))
        return [(torch_pipelines.tensor(latent + step), step) for step in steps]

    wen = [sigmas["wen"] * gap(x, "wen").norm() for x, _ in points(detectors[0])]
    np.testing.assert_allclose(found[0].raw, np.mean(wen), rtol=1e-4)

    ((x, _),) = points(detectors[1])
    x.requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y = gap(x, "jeon")
        w = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, w, create_graph=True)
        (jeon,) = torch.autograd.grad(pulled, w, y.detach())
    np.testing.assert_allclose(found[1].raw, jeon.norm().item(), rtol=1e-4)

    cosines = []
    for x, step in points(detectors[2]):
        s = torch_pipelines.array(score(x, "flux", given))
        cosines.append(-np.sum(s * step) / np.linalg.norm(s) / np.linalg.norm(step))
    assert len(cosines) == 4
    np.testing.assert_allclose(found[2].value, np.mean(cosines), atol=1e-4)


@pytest.mark.slow
def test_sampling_with_guidance(stable, torch_pipelines):
    """DDIM over the times of diffusers, from the same noise, ends where the pipeline does."""
    pipeline, folder, model = stable
    schedule, weight, steps = model.raw_score.schedule, 3.0, 4
    noise = np.random.default_rng(1).normal(size=(8, 8, 4)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pipeline(
            PROMPT,
            latents=torch_pipelines.tensor(noise),
            num_inference_steps=steps,
            guidance_scale=weight,
            output_type="latent",
        ).images
    times = [*pipeline.scheduler.timesteps.tolist(), 0]  # the last step ends at alpha_0
    sigmas = schedule.sigma(jnp.asarray(times, jnp.float32))
    alphas = schedule.alpha_at(sigmas)
    follow = jax.jit(lambda score, x, c: ddim(score, x, sigmas, c))
    found = follow(guided(model, weight), noise / alphas[0], load_prompts(folder)(PROMPT))
    np.testing.assert_allclose(alphas[-1] * found, torch_pipelines.array(expected), atol=1e-4)


@pytest.mark.slow
def test_a_prompt_is_drawn_from_the_command_line(stable, tmp_path, monkeypatch):
    _, folder, _ = stable
    words = ["sample", folder, "--prompt", PROMPT, "-n", 1, "--method", "ddim", "--steps", 1]
    words += ["--guidance", 2, "--out", tmp_path / "drawn.png"]
    monkeypatch.setattr(sys, "argv", ["memjax", *map(str, words)])
    assert app.run() == 0
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_stable_diffusion_xl(torch_pipelines, tmp_path):
    pipeline = torch_pipelines.stable_diffusion_xl(tmp_path)
    model = load(tmp_path / "pipeline")
    assert model.event_shape == (8, 8, 4)
    names = ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert [name for name, _ in model.origin.sha256] == names
    hidden, null, pooled, null_pooled = pipeline.encode_prompt(PROMPT, device="cpu")
    times = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), hidden.dtype, 12)
    x = np.random.default_rng(2).normal(size=(8, 8, 4)).astype(np.float32)
    t = 300
    sigma = float(model.raw_score.schedule.sigma(float(t)))
    x_t = torch_pipelines.tensor(x / (1 + sigma**2) ** 0.5)
    score = jax.jit(lambda m, x, c: m(x, sigma, c))
    conditions = (load_prompts(tmp_path / "pipeline")(PROMPT), model.null_condition)
    for condition, states, vector in zip(
        conditions, (hidden, null), (pooled, null_pooled), strict=True
    ):
        added = {"text_embeds": vector, "time_ids": times}
        noise = pipeline.unet(x_t, t, states, added_cond_kwargs=added).sample
        found = -sigma * score(model, x, condition)
        np.testing.assert_allclose(found, torch_pipelines.array(noise), atol=1e-4)
