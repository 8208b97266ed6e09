"""The command line on folders of diffusers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import memjax.auditing.run as run_module
from memjax._core.errors import InputError
from memjax.checkpoints import load, save
from memjax.checkpoints.export import export_diffusers
from memjax.cli.conditions import encode_prompts, read_conditions, usual_guidance
from memjax.diffusion import DiscreteVP, LinenNetwork, Model, VarianceExploding, from_prediction
from memjax.diffusion.model import Origin
from memjax.networks import ResidualMLP, TextCondition, UNet2DModel

GOLDEN = Path(__file__).parent.parent / "networks" / "golden" / "unet2d-ddpm"


@pytest.fixture(autouse=True, scope="module")
def _one_backend_check():
    report = run_module.check_backend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "check_backend", lambda: report)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of pixels, without PyTorch."""
    arrays = load_file(GOLDEN / "model.safetensors")
    weights = {
        name: jnp.asarray(a.transpose(2, 3, 1, 0) if a.ndim == 4 else a, jnp.float32)
        for name, a in arrays.items()
    }
    network = UNet2DModel.from_weights(weights, json.loads((GOLDEN / "config.json").read_text()))
    schedule = DiscreteVP()
    score = from_prediction(network, prediction="epsilon", schedule=schedule)
    noise = {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max, "data_std": 0.5}
    path = tmp_path_factory.mktemp("published") / "tiny-ddpm"
    export_diffusers(Model(score, (8, 8, 3), **noise), path)
    return path


def test_audit_and_report_name_the_folder(memjax, folder, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    status, out, err = memjax(
        *("audit", folder, "--data", tmp_path / "images.npy", "--out", tmp_path / "out"),
        *("--samples", 0, "--detector", "score_norm", "--chunk-size", 5),
    )
    assert (status, err) == (0, "evaluating detectors: 5 of 5\n")
    assert "Most suspicious by score_norm" in out
    model = json.loads((tmp_path / "out" / "manifest.json").read_text())["model"]
    assert model["name"] == model["origin"]["folder"] == "tiny-ddpm"
    assert model["origin"]["pipeline"] == "DDPMPipeline"
    assert model["data_std"] == pytest.approx(np.std(images / 127.5 - 1), rel=1e-4)
    assert model["origin"]["data_std"] == "measured on the audited images"
    page = (tmp_path / "out" / "report.html").read_text()
    assert model["origin"]["sha256"]["unet"] in page
    assert "DDPMScheduler" in page


def test_sample_draws_a_picture(memjax, folder, tmp_path):
    status, _, _ = memjax(
        *("sample", folder, "-n", 4, "--method", "ddim", "--steps", 2),
        *("--out", tmp_path / "samples.png"),
    )
    assert status == 0
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.mode == "RGB"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "a cat"), "--prompt: the model takes no prompts"),
        (("--label", 1), "--label: the model takes no conditions"),
        (("--guidance", 2), "--guidance: expected a condition"),
        (("--prompt", "a cat", "--label", 1), "--prompt and --label: expected one of them"),
    ],
)
def test_conditions_that_the_model_does_not_take(memjax, folder, options, message):
    status, _, err = memjax("sample", folder, *options)
    assert status == 2
    assert message in " ".join(err.split())


def test_export_writes_what_it_read(memjax, folder, tmp_path):
    status, out, _ = memjax("export", folder, tmp_path / "copy")
    assert (status, out) == (0, f"folder: {tmp_path / 'copy'}\n")
    for file in folder.rglob("*.*"):
        assert (tmp_path / "copy" / file.relative_to(folder)).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_what_train_makes_for_diffusers_is_exported(memjax, tmp_path):
    images = np.random.default_rng(0).normal(size=(6, 4, 4, 1)).clip(-1, 1).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    words = ["--network", "unet2d", "--steps", 1, "--batch-size", 2, "--out", tmp_path / "own"]
    status, _, err = memjax("train", tmp_path / "images.npy", *words)
    assert status == 0, err
    assert memjax("export", tmp_path / "own", tmp_path / "theirs")[0] == 0
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (config["_class_name"], config["sample_size"]) == ("UNet2DModel", 4)
    own, theirs = load(tmp_path / "own"), load(tmp_path / "theirs")
    weights = [
        sorted(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model))
        for model in (own, theirs)
    ]
    assert weights[0] == weights[1]


def test_networks_of_no_class_of_diffusers_are_not_exported(memjax, tmp_path):
    module = ResidualMLP(width=8, num_blocks=1, embedding_width=4)
    variables = module.init(jax.random.key(0), jnp.zeros((4, 4, 1), jnp.float32), jnp.float32(0))
    score = from_prediction(
        LinenNetwork(module, variables), prediction="denoiser", schedule=VarianceExploding()
    )
    save(Model(score, (4, 4, 1), sigma_min=0.1, sigma_max=9.0, data_std=0.5), tmp_path / "own")
    status, _, err = memjax("export", tmp_path / "own", tmp_path / "out")
    assert status == 2
    assert err.startswith("memjax: error: network: expected a UNet2DModel, got ResidualMLP")
    assert err.count("\n") == 1


def test_what_is_no_model_is_one_line(memjax, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    status, _, err = memjax("sample", tmp_path)
    assert status == 2
    assert "expected a part 'unet' or 'transformer', found none" in err
    assert err.count("\n") == 1


def test_a_distilled_model_is_warned_of_in_one_line(memjax, folder, tmp_path):
    status, _, err = memjax("export", folder, tmp_path / "some-turbo")
    assert (status, err) == (0, "")
    status, _, err = memjax("export", tmp_path / "some-turbo", tmp_path / "copy")
    assert status == 0
    assert err.startswith("memjax: warning: some-turbo: this looks like a distilled model")
    assert err.count("\n") == 1


def test_prompts_are_read_line_by_line(folder, tmp_path, monkeypatch):
    model = load(folder)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    given = {}

    def encode(prompts, model, model_dir, what):
        given.update(prompts=prompts, what=what)

    monkeypatch.setattr("memjax.cli.conditions.encode_prompts", encode)
    path = str(tmp_path / "prompts.txt")
    read_conditions(path, 2, model, str(folder))
    assert given == {"prompts": ["a cat", "a dog"], "what": path}
    with pytest.raises(InputError, match="expected 3 lines, one prompt per image, found 2"):
        read_conditions(path, 3, model, str(folder))
    (tmp_path / "prompts.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="expected text, found"):
        read_conditions(path, 1, model, str(folder))
    with pytest.raises(InputError, match="the model takes no prompts"):
        encode_prompts(["a cat"], model, str(folder), path)


def test_text_is_guided_but_for_flux():
    text = TextCondition(np.zeros((2, 3), np.float32))
    facts = {"sigma_min": 0.1, "sigma_max": 9.0, "data_std": 1.0}

    def usual(network, null):
        origin = Origin(network=network)
        return usual_guidance(Model(len, (2,), null_condition=null, origin=origin, **facts))

    assert usual("UNet2DConditionModel", text) == 7.5
    assert usual("FluxTransformer2DModel", text) == usual("UNet2DModel", None) == 1
