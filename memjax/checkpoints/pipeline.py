"""A diffusers folder becomes a Model: network, schedule, encoder and decoder, null condition."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax._core.errors import CheckpointError
from memjax._core.text import one_line
from memjax.checkpoints._layout import (
    CONFIG_FILE,
    FLUX,
    VAES,
    Layout,
    blamed_on,
    sample_sides,
    warn_if_distilled,
)
from memjax.checkpoints._safetensors import read_json, read_weights
from memjax.checkpoints._scheduler import precondition, schedule_from_scheduler
from memjax.checkpoints.prompts import read_prompts
from memjax.diffusion.model import Model, Origin, identity
from memjax.diffusion.prediction import EDMPreconditioned, from_prediction
from memjax.diffusion.schedule import Schedule
from memjax.networks.autoencoder_kl import AutoencoderKL
from memjax.networks.flux import FluxTransformer2DModel
from memjax.networks.unet2d import UNet2DModel
from memjax.networks.unet2d_condition import TextCondition, UNet2DConditionModel

PIXEL_STD = 0.5
"""Standard deviation assumed of images in [-1, 1], where nothing says it."""
LATENT_STD = 1.0
"""Of latents: their scaling is chosen for it."""

CLASSES = {
    kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel, FluxTransformer2DModel)
}
"""Networks by the name of their class."""
_ENCODER_WEIGHTS = ("encoder.", "quant_conv.")


class LatentEncoder(eqx.Module):
    """Image to latent: the posterior mean of a VAE, shifted and scaled.

        z = (mean(image) - shift) scale

    Attributes:
        vae: the autoencoder, with the weights that encoding uses.
        shift: one number, or one per channel. Static.
        scale: likewise.

    References:
        Rombach et al. (2022), arXiv:2112.10752, section 3.1 and appendix G (the scale).
    """

    vae: AutoencoderKL
    shift: tuple[float, ...] = eqx.field(static=True)
    scale: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, image: Float[Array, "h w c"]) -> Float[Array, "p q k"]:
        """The latent of an image in [-1, 1]."""
        mean, _ = self.vae.encode(image)
        return (mean - _row(self.shift, mean)) * _row(self.scale, mean)


class LatentDecoder(eqx.Module):
    """Latent to image: z / scale + shift, decoded; the fields are those of ``LatentEncoder``."""

    vae: AutoencoderKL
    shift: tuple[float, ...] = eqx.field(static=True)
    scale: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, latent: Float[Array, "p q k"]) -> Float[Array, "h w c"]:
        """The image of a latent, about in [-1, 1], not clipped."""
        return self.vae.decode(latent / _row(self.scale, latent) + _row(self.shift, latent))


def _row(values: tuple[float, ...], x: Array) -> Array:
    return jnp.asarray(values, x.dtype).reshape(1, 1, -1)


def read_schedule(layout: Layout) -> tuple[Schedule, str]:
    """How noise was added to what the network was trained on, and what it predicts."""
    file, scheduler = layout.scheduler()
    schedule, prediction = schedule_from_scheduler(scheduler, file)
    if layout.kind == FLUX and prediction != "flow":
        raise CheckpointError(
            f"{file}: _class_name: expected a scheduler of flow matching for {FLUX}, found "
            f"{one_line(scheduler['_class_name'], limit=80)}"
        )
    return schedule, prediction


def event_shape(layout: Layout, network: Any) -> tuple[int, int, int]:
    """Of what the network takes, channels last."""
    flux = isinstance(network, FluxTransformer2DModel)
    channels = network.channels if flux else network.options.in_channels
    return (*sample_sides(layout), channels)


def sees_latents(layout: Layout) -> bool:
    """Whether the score is of latents: its pipeline has a VAE, or all networks of the class do."""
    return "vae" in layout.parts() or layout.kind != "UNet2DModel"


def read_model(layout: Layout, *, variant: str | None, dtype: Any, data_std: float | None) -> Model:
    """The model in a diffusers folder that has been looked at.

    Args:
        layout: the folder.
        variant: of the weights' files.
        dtype: of the weights.
        data_std: standard deviation of the data in the score's space; None for the default.

    Returns:
        The model, as ``memjax.load`` says.

    Raises:
        CheckpointError: as for ``memjax.load``.
    """
    scheduler_file, scheduler = layout.scheduler()
    warn_if_distilled(layout, scheduler)
    schedule, prediction = read_schedule(layout)
    sample_sides(layout)  # what is quick to refuse comes before the weights
    # The text encoders are let go before the network is read: T5 is half as large as Flux.
    null, texts = _read_null_condition(layout, variant, dtype)
    weights = read_weights(layout.folder, variant=variant, dtype=dtype)
    with blamed_on(layout.config_file):
        raw = CLASSES[layout.kind].from_weights(weights.arrays, layout.config)
    network = precondition(raw, scheduler, scheduler_file)
    score = from_prediction(network, prediction=prediction, schedule=schedule)
    digests = [(layout.part, weights.sha256)]
    encode, decode = identity, identity
    if "vae" in layout.parts():
        encode, decode, digest = _read_vae(layout, variant, dtype)
        digests.append(("vae", digest))
    digests += texts
    guess = data_std is None
    if data_std is not None:
        source = "given"
    elif isinstance(network, EDMPreconditioned):
        data_std, source, guess = network.data_std, "of the training", False
    elif sees_latents(layout):
        data_std, source, guess = LATENT_STD, "of scaled latents", False
    else:
        data_std, source = PIXEL_STD, "assumed of images in [-1, 1]"
    return Model(
        score,
        event_shape(layout, raw),
        sigma_min=schedule.sigma_min,
        sigma_max=schedule.sigma_max,
        data_std=data_std,
        null_condition=null,
        encode=encode,
        decode=decode,
        origin=Origin(
            folder=layout.root.resolve().name,
            pipeline=layout.pipeline,
            network=layout.kind,
            schedule=one_line(f"{scheduler['_class_name']}: {schedule!r}", limit=400),
            prediction=prediction,
            sha256=tuple(digests),
            data_std=source,
            assumed=guess,
        ),
    )


def _read_null_condition(
    layout: Layout, variant: str | None, dtype: Any
) -> tuple[TextCondition | None, tuple[tuple[str, str], ...]]:
    """The empty prompt's condition where there are text encoders, and their hashes."""
    if not any(name.startswith("text_encoder") for name in layout.parts()):
        return None, ()
    prompts = read_prompts(layout, variant=variant, dtype=dtype)
    return prompts.null, prompts.sha256


def _read_vae(
    layout: Layout, variant: str | None, dtype: Any
) -> tuple[LatentEncoder, LatentDecoder, str]:
    """Both halves of the autoencoder, each with its own weights, and the hash of all."""
    folder = layout.require("vae", VAES)
    weights = read_weights(folder, variant=variant, dtype=dtype)
    with blamed_on(folder / CONFIG_FILE):
        vae = AutoencoderKL.from_weights(weights.arrays, read_json(folder / CONFIG_FILE))
    o = vae.options
    shift = o.latents_mean or (o.shift_factor or 0.0,)
    scale = tuple(o.scaling_factor / std for std in o.latents_std or (1.0,))
    halves: tuple[dict, dict] = ({}, {})
    for name, array in vae.weights.items():
        halves[not name.startswith(_ENCODER_WEIGHTS)][name] = array
    encoder, decoder = (AutoencoderKL(half, o) for half in halves)
    return (
        LatentEncoder(encoder, shift, scale),
        LatentDecoder(decoder, shift, scale),
        weights.sha256,
    )
