"""What a folder holds and what working with it takes, read from its headers alone."""

import os
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from memjax._core.errors import InputError
from memjax._core.text import one_line
from memjax.checkpoints._layout import (
    CONFIG_FILE,
    INDEX_FILE,
    SCORES,
    Layout,
    blamed_on,
    image_sides,
    recognize,
    warn_if_distilled,
)
from memjax.checkpoints._safetensors import STEM, read_json, read_weights, weight_shapes
from memjax.checkpoints.files import FORMAT, outline, read_config
from memjax.checkpoints.loading import load
from memjax.checkpoints.pipeline import CLASSES, event_shape, read_schedule, sees_latents
from memjax.diffusion.prediction import EDMPreconditioned, PredictionScore
from memjax.diffusion.schedule import Schedule
from memjax.networks.flux import FluxTransformer2DModel
from memjax.networks.unet2d import UNet2DModel
from memjax.networks.unet2d_condition import TextCondition, UNet2DConditionModel

TRANSFORMERS_STEM = "model"
"""What transformers calls the weights of a model."""
PROMPT_LENGTH = 77
"""Tokens of a prompt in Stable Diffusion, for which evaluations are counted."""
FLUX_PROMPT_LENGTH = 512
"""Of one in Flux."""


class Part(NamedTuple):
    """One network of a folder, as the headers of its weights describe it.

    Attributes:
        name: of the part, such as ``"unet"``; empty for a folder of one network.
        kind: its class.
        parameters: how many numbers; None where the weights cannot be read.
        num_bytes: as stored.
        dtypes: as stored, the most frequent first.
        problem: why the weights cannot be read, in one line; else empty.
    """

    name: str
    kind: str
    parameters: int | None
    num_bytes: int | None
    dtypes: tuple[str, ...]
    problem: str


class Work(NamedTuple):
    """What one evaluation of the network takes.

    Attributes:
        flops: floating-point operations, as XLA counts them in the traced program.
        weight_bytes: the weights in float32.
        row_bytes: what ``jax.linearize`` keeps of one evaluation for its products, in float32,
            without the weights.
        seconds: of one evaluation in float32 on this machine.
        measured: whether it was run; else ``seconds`` is a lower bound, at the rate of a large
            matrix product, which small layers do not come near.
    """

    flops: float
    weight_bytes: int
    row_bytes: int
    seconds: float
    measured: bool


class Inspection(NamedTuple):
    """What a folder holds.

    Attributes:
        path: the folder.
        kind: what it is, in words.
        parts: its networks.
        problem: why memjax makes no model of it, and the way out, in one line; else empty, and
            None stands in no other field but ``image_shape`` of a folder without its decoder.
        network: class of the network that becomes the score.
        prediction: what it predicts.
        schedule: how noise was added in training.
        sigma_min: smallest noise level of training, in the coordinates x = x_t / alpha_t.
        sigma_max: largest.
        event_shape: shape of what the score sees, channels last.
        image_shape: height and width of an image.
        latent: whether the score sees latents.
        condition: what the network takes beside image and noise, in words; empty for nothing.
        null_condition: whether it knows "no condition".
        work: what one evaluation takes.
        notes: what a reader should know, a line each.
    """

    path: str
    kind: str
    parts: tuple[Part, ...]
    problem: str
    network: str | None = None
    prediction: str | None = None
    schedule: Schedule | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    event_shape: tuple[int, ...] | None = None
    image_shape: tuple[int, ...] | None = None
    latent: bool | None = None
    condition: str | None = None
    null_condition: bool | None = None
    work: Work | None = None
    notes: tuple[str, ...] = ()


def inspect_model(
    path: str | os.PathLike, *, variant: str | None = None, measure: bool = False
) -> Inspection:
    """Say what a folder holds, whether memjax can load it, and what that takes.

    Weights are not read, only the headers of their files; the network is traced to see that
    every array it needs is there, and to count. No code is run and nothing is unpickled.

    Args:
        path: a folder that ``memjax.load`` might take.
        variant: of the weights' files, such as ``"fp16"``.
        measure: read the weights, and time the network instead of estimating.

    Returns:
        What is there. A folder of diffusers that memjax makes no model of is described as far as
        it can be read, with ``problem`` saying why.

    Raises:
        CheckpointError: no folder of a model; or, with ``measure``, what ``memjax.load`` raises.

    Cost: a second for small models, some ten for Stable Diffusion's; little memory.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    ...     print(inspect_model(folder).problem.split("; ")[1])
    load it in PyTorch and hand the module to memjax.from_torch
    """
    path = Path(path)
    file = path / CONFIG_FILE
    if file.is_file() and read_json(file).get("format") == FORMAT:
        return _own(path, measure)
    if not (file.is_file() or (path / INDEX_FILE).is_file()):
        recognize(path)  # says what is wrong
    return _published(path, variant, measure)


def _own(path: Path, measure: bool) -> Inspection:
    model = load(path) if measure else outline(path)
    score = model.raw_score
    assert isinstance(score, PredictionScore)
    network = score.network
    if isinstance(network, EDMPreconditioned):
        network = network.network
    config = read_config(path)
    kind, count = config["network"]["name"], config["network"]["num_conditions"]
    return Inspection(
        str(path),
        "a model of memjax",
        (_part("", kind, path, "model", None),),
        "",
        network=kind,
        prediction=score.prediction,
        schedule=score.schedule,
        sigma_min=model.sigma_min,
        sigma_max=model.sigma_max,
        event_shape=model.event_shape,
        image_shape=model.event_shape[:2] if len(model.event_shape) == 3 else None,
        latent=False,
        condition=f"a class, 0 to {count - 1}" if count else "",
        null_condition=model.null_condition is not None,
        work=_work(network, model.event_shape, jnp.int32(0) if count else None, measure),
        notes=(f"data_std = {model.data_std:g}, of its training",),
    )


def _published(path: Path, variant: str | None, measure: bool) -> Inspection:
    index = read_json(path / INDEX_FILE) if (path / INDEX_FILE).is_file() else {}
    kind, parts = _describe(path, index, variant)
    try:
        layout = recognize(path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_if_distilled(layout, layout.scheduler()[1])
        schedule, prediction = read_schedule(layout)
        shapes = {
            name: jax.ShapeDtypeStruct(shape.shape, jnp.float32)
            for name, shape in weight_shapes(layout.folder, variant=variant).items()
        }
        with blamed_on(layout.config_file):
            network = CLASSES[layout.kind].from_weights(shapes, layout.config)
            words, condition = _condition(network)
        shape = event_shape(layout, network)
        image_shape = image_sides(layout)
    except InputError as error:
        return Inspection(str(path), kind, parts, one_line(str(error)))
    if measure:
        arrays = read_weights(layout.folder, variant=variant).arrays
        network = CLASSES[layout.kind].from_weights(arrays, layout.config)
    latent = sees_latents(layout)
    return Inspection(
        str(path),
        kind,
        parts,
        "",
        network=layout.kind,
        prediction=prediction,
        schedule=schedule,
        sigma_min=schedule.sigma_min,
        sigma_max=schedule.sigma_max,
        event_shape=shape,
        image_shape=image_shape if "vae" in layout.parts() or not latent else None,
        latent=latent,
        condition=words,
        null_condition=any(name.startswith("text_encoder") for name in layout.parts()),
        work=_work(network, shape, condition, measure),
        notes=tuple(one_line(str(warning.message)) for warning in caught),
    )


def _describe(
    path: Path, index: dict[str, Any], variant: str | None
) -> tuple[str, tuple[Part, ...]]:
    """What a diffusers folder calls itself, and its networks."""
    if not index:
        name = one_line(str(read_json(path / CONFIG_FILE).get("_class_name")), limit=80)
        return "a single network of diffusers", (_part("", name, path, STEM, variant),)
    layout = Layout(path, index, "", path, "", {})
    parts = []
    for name, kind in layout.parts().items():
        # Tokenizers, schedulers and the like have configurations of other names.
        folder = path if name in SCORES and not (path / name).is_dir() else path / name
        if (folder / CONFIG_FILE).is_file():
            stem = STEM if "_class_name" in read_json(folder / CONFIG_FILE) else TRANSFORMERS_STEM
            parts.append(_part(one_line(name), one_line(kind, limit=80), folder, stem, variant))
    return f"a pipeline of diffusers, {layout.pipeline}", tuple(parts)


def _part(name: str, kind: str, folder: Path, stem: str, variant: str | None) -> Part:
    try:
        try:
            shapes = weight_shapes(folder, stem, variant)
        except InputError:
            if variant is None:
                raise
            shapes = weight_shapes(folder, stem)  # not every part comes in every variant
    except InputError as error:
        return Part(name, kind, None, None, (), one_line(str(error)))
    sizes: dict[str, int] = {}
    for shape in shapes.values():
        sizes[shape.dtype.name] = sizes.get(shape.dtype.name, 0) + shape.size
    return Part(
        name,
        kind,
        sum(sizes.values()),
        sum(shape.size * shape.dtype.itemsize for shape in shapes.values()),
        tuple(sorted(sizes, key=lambda dtype: -sizes[dtype])),
        "",
    )


def _condition(
    network: UNet2DModel | UNet2DConditionModel | FluxTransformer2DModel,
) -> tuple[str, PyTree]:
    """What a network takes beside image and time: in words, and an example."""
    if isinstance(network, FluxTransformer2DModel):
        o = network.options
        width, pooled = o.joint_attention_dim, o.pooled_projection_dim
        words = f"text, {width} numbers a token and {pooled} pooled"
        if o.guidance_embeds:
            words += ", and the strength of guidance, 1 unless given"
        hidden = jnp.zeros((FLUX_PROMPT_LENGTH, width), jnp.float32)
        return words, TextCondition(hidden, jnp.zeros(pooled, jnp.float32))
    if isinstance(network, UNet2DModel):
        if network.options.class_embed_type == "timestep":
            return "a number", jnp.float32(0)
        count = network.options.num_class_embeds
        return ("", None) if count is None else (f"a class, 0 to {count - 1}", jnp.int32(0))
    o = network.options
    dim = o.cross_attention_dim
    dim = dim[0] if isinstance(dim, tuple) else dim
    hidden = jnp.zeros((PROMPT_LENGTH, dim), jnp.float32)
    if o.addition_embed_type is None:
        return f"text, {dim} numbers a token", TextCondition(hidden)
    pooled = (o.projection_class_embeddings_input_dim or 0) - 6 * (o.addition_time_embed_dim or 0)
    if pooled < 1:
        raise InputError("projection_class_embeddings_input_dim: expected room for pooled text")
    extra = (jnp.zeros(n, jnp.float32) for n in (pooled, 6))
    words = f"text, {dim} numbers a token and {pooled} pooled, and six of size"
    return words, TextCondition(hidden, *extra)


def _work(network: Any, event_shape: tuple[int, ...], condition: PyTree, measure: bool) -> Work:
    def evaluate(network, x, t, condition):
        return network(x, t, condition)

    def linearized(network, x, t, condition):
        return jax.linearize(lambda x: network(x, t, condition), x)[1]

    x, t = jnp.zeros(event_shape, jnp.float32), jnp.float32(1)
    program = jax.jit(evaluate)
    analysis = program.lower(network, x, t, condition).cost_analysis()
    flops = float(analysis.get("flops", 0.0)) if isinstance(analysis, dict) else 0.0
    weights = _num_bytes(network)
    kept = _num_bytes(jax.eval_shape(linearized, network, x, t, condition))
    if measure:
        seconds = _seconds(lambda: program(network, x, t, condition))
    else:
        seconds = flops / _machine_rate()
    return Work(flops, weights, max(kept - weights, 0), seconds, measure)


def _num_bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _machine_rate() -> float:
    """Floating-point operations a second in a matrix product in full float32."""
    n = 1024
    a = jnp.full((n, n), 1 / n, jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    return 2 * n**3 / _seconds(lambda: product(a))


def _seconds(run: Any) -> float:
    """Shortest of three runs after the first, which compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)
