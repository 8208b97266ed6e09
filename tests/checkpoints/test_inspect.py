"""What is said of a folder, against what is known of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from memjax._core.errors import CheckpointError
from memjax.checkpoints import save
from memjax.checkpoints.files import outline
from memjax.checkpoints.inspect import inspect_model
from memjax.checkpoints.loading import load
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.model import Model
from memjax.diffusion.prediction import EDMPreconditioned, from_prediction
from memjax.diffusion.schedule import DiscreteVP, VarianceExploding
from memjax.networks._weights import Weights
from memjax.networks.mlp import ResidualMLP
from memjax.networks.unet2d import UNet2DModel

CONFIG = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [4, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "add_attention": False,
}
STEM = "diffusion_pytorch_model"


def weights_of(config):
    """Random weights for a configuration: every array that the network asks for."""
    shapes: dict = {}

    def answer(view, name, *shape):
        shapes[view._prefix + name] = shape
        return jnp.zeros(shape, jnp.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "__call__", answer)
        UNet2DModel.from_weights({}, config)
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) / 10 for n, s in shapes.items()}


def stored(array):
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array


@pytest.fixture(scope="module")
def weights():
    return weights_of(CONFIG)


@pytest.fixture
def pixels(weights, tmp_path):
    """A pipeline of diffusers on pixels, as save_pretrained would have written it."""
    return write_pipeline(tmp_path / "pixels", weights)


def write_pipeline(root, weights, dtype=np.float32, **scheduler):
    (root / "unet").mkdir(parents=True)
    (root / "scheduler").mkdir()
    arrays = {name: np.ascontiguousarray(stored(a)).astype(dtype) for name, a in weights.items()}
    (root / "unet" / f"{STEM}.safetensors").write_bytes(safetensors.numpy.save(arrays))
    (root / "unet" / "config.json").write_text(json.dumps(CONFIG))
    scheduler = {"_class_name": "DDPMScheduler", **scheduler}
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    module = ResidualMLP(width=16, num_blocks=1, embedding_width=8, num_conditions=3)
    x = jnp.zeros((4, 4, 1), jnp.float32)
    variables = module.init(jax.random.key(0), x, jnp.float32(0), jnp.int32(0))
    score = from_prediction(
        EDMPreconditioned(LinenNetwork(module, variables), 0.7),
        prediction="denoiser",
        schedule=VarianceExploding(0.01, 40.0),
    )
    noise = {"sigma_min": 0.01, "sigma_max": 40.0, "data_std": 0.7}
    path = tmp_path_factory.mktemp("own") / "model"
    save(Model(score, (4, 4, 1), null_condition=jnp.int32(3), **noise), path)
    return path


def test_a_published_pipeline(pixels, weights):
    found = inspect_model(pixels)
    count = sum(a.size for a in weights.values())
    assert found.problem == ""
    assert found.kind == "a pipeline of diffusers, DDPMPipeline"
    (part,) = found.parts
    assert part[:5] == ("unet", "UNet2DModel", count, 4 * count, ("float32",))
    assert (found.network, found.prediction, found.schedule) == (
        "UNet2DModel",
        "epsilon",
        DiscreteVP(),
    )
    model = load(pixels)
    assert (found.sigma_min, found.sigma_max) == (model.sigma_min, model.sigma_max)
    assert found.event_shape == model.event_shape == (8, 8, 3)
    assert found.image_shape == (8, 8)
    assert (found.latent, found.condition, found.null_condition) == (False, "", False)
    work = found.work
    assert work.weight_bytes == 4 * count
    # Two operations for each weight of a convolution at each pixel; all else is small beside it.
    at_pixels = 0
    for name, array in weights.items():
        if array.ndim == 4:
            coarse = any(part in name for part in ("down_blocks.1", "mid_block", "downsamplers"))
            coarse |= "up_blocks.0" in name and "upsamplers" not in name
            at_pixels += 2 * array.size * (16 if coarse else 64)
    assert 0.7 * at_pixels < work.flops < 2 * at_pixels
    assert work.row_bytes > 4 * 8 * 8 * 4
    assert work.seconds > 0
    assert not work.measured


def test_no_numbers_are_read(pixels):
    """With the arrays cut off the header still speaks, until the file's length is looked at."""
    file = pixels / "unet" / f"{STEM}.safetensors"
    size = file.stat().st_size
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    with open(file, "r+b") as stream:
        stream.truncate(header)
        stream.truncate(size)  # a hole: the numbers are gone
    assert inspect_model(pixels).problem == ""


def test_measured(pixels):
    found = inspect_model(pixels, measure=True)
    assert found.work.measured
    assert 0 < found.work.seconds < 5


def test_our_own_model(own):
    found = inspect_model(own)
    model = load(own)
    assert found.kind == "a model of memjax"
    assert found.parts[0].parameters == sum(leaf.size for leaf in jax.tree.leaves(model.raw_score))
    assert (found.sigma_min, found.sigma_max) == (0.01, 40.0)
    assert (found.network, found.prediction) == ("ResidualMLP", "denoiser")
    assert (found.condition, found.null_condition) == ("a class, 0 to 2", True)
    assert found.work.weight_bytes == found.parts[0].num_bytes
    assert inspect_model(own, measure=True).work.measured


def test_the_outline_is_the_model_without_its_numbers(own):
    model, shapes = load(own), outline(own)
    assert jax.tree.structure(shapes) == jax.tree.structure(model)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(model), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


def test_half_precision_and_variants(weights, tmp_path):
    root = write_pipeline(tmp_path / "half", weights, np.float16, prediction_type="v_prediction")
    file = root / "unet" / f"{STEM}.safetensors"
    file.rename(file.with_name(f"{STEM}.fp16.safetensors"))
    for variant in (None, "fp16"):
        found = inspect_model(root, variant=variant)
        assert found.parts[0].dtypes == ("float16",)
        assert found.parts[0].num_bytes == 2 * found.parts[0].parameters
        assert found.work.weight_bytes == 4 * found.parts[0].parameters
        assert found.prediction == "v_prediction"
    assert "bf16" in inspect_model(root, variant="bf16").problem


def test_what_memjax_makes_no_model_of(pixels):
    unet = pixels / "unet"
    assert "expected scheduler_config.json" not in inspect_model(unet).problem  # beside it
    (pixels / "scheduler" / "scheduler_config.json").unlink()
    found = inspect_model(unet)
    assert "expected scheduler_config.json" in found.problem
    assert found.kind == "a single network of diffusers"
    assert found.parts[0].parameters > 0
    assert found.work is None
    (unet / "config.json").write_text(json.dumps(CONFIG | {"_class_name": "DiTTransformer2DModel"}))
    found = inspect_model(unet)
    assert "found DiTTransformer2DModel" in found.problem
    assert "from_torch" in found.problem
    (unet / "config.json").write_text(json.dumps(CONFIG | {"layers_per_block": 2}))
    (pixels / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    found = inspect_model(pixels)
    assert "weights: expected an array" in found.problem
    assert "\n" not in found.problem


def test_damaged_weights_are_told_by_part(pixels):
    (pixels / "unet" / f"{STEM}.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    found = inspect_model(pixels)
    assert "convert it" in found.parts[0].problem
    assert "convert it" in found.problem
    assert found.parts[0].parameters is None


def test_distilled_models_are_noted(weights, tmp_path):
    root = write_pipeline(tmp_path / "fast", weights, _class_name="LCMScheduler")
    (note,) = inspect_model(root).notes
    assert "distilled" in note


@pytest.mark.parametrize("make", ["nothing", "file", "empty", "pickle"])
def test_no_model(make, tmp_path):
    path = tmp_path / "model"
    match make:
        case "file":
            path.write_text("")
        case "empty":
            path.mkdir()
        case "pickle":
            path.mkdir()
            (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"expected|convert") as caught:
        inspect_model(path)
    assert "\n" not in str(caught.value)
