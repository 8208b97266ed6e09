"""The one door for saved models: ours, and folders of diffusers."""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from memjax._core.errors import InputError
from memjax.checkpoints._layout import CONFIG_FILE, recognize, with_sample_size
from memjax.checkpoints._safetensors import read_json
from memjax.checkpoints.files import FORMAT
from memjax.checkpoints.files import load as load_own
from memjax.checkpoints.pipeline import read_model
from memjax.diffusion.model import Model


def load(
    path: str | os.PathLike,
    *,
    component: str | None = None,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    data_std: float | int | None = None,
    sample_size: int | tuple[int, int] | None = None,
) -> Model:
    """Load a model from a folder: one of ours, or one of diffusers.

    Recognized are what ``memjax.save`` has written; a pipeline of diffusers with its
    ``model_index.json``; and the folder of one network with its ``config.json``, whose
    ``scheduler_config.json`` stands beside it, or in a folder ``scheduler`` in or beside it.
    Networks of the classes ``UNet2DModel``, ``UNet2DConditionModel`` (Stable Diffusion 1.x, 2.x,
    XL) and ``FluxTransformer2DModel`` (Flux dev, schnell) become a score. No code is run and
    nothing is unpickled.

    Args:
        path: the folder.
        component: the pipeline's part that becomes the score; ``None`` for ``"unet"`` or else
            ``"transformer"``.
        variant: of the weights' files, such as ``"fp16"``; ``None`` for those without a variant,
            or the only ones there are.
        dtype: of the weights; ``None`` keeps that of the files.
        data_std: standard deviation of the data in the score's space, over all coordinates.
            ``None``: of our own models, that of their training; 1 for latents, whose scaling is
            chosen for it; else 0.5, a guess for images in [-1, 1], which ``memjax.audit``
            replaces by that of the audited images.
        sample_size: height and width, or one number for both, of what the network takes: pixels,
            or the smaller ones of a latent, an eighth as many for Stable Diffusion and Flux.
            ``None``: what the configuration says; for Flux, whose does not, 128, as its pipeline.
            Other sizes than that of the training are for networks that know several.

    Returns:
        The model. A pipeline with a VAE has the mean of its posterior, scaled, as ``encode``, and
        the event shape of its latents; with text encoders its conditions are ``TextCondition``,
        made from prompts by ``memjax.checkpoints.load_prompts``, and its null condition is the
        empty prompt's. Where a null condition is not known (class labels, or the network of a
        text-conditional pipeline alone) it is ``None``, and every evaluation needs a condition.
        ``origin`` holds folder, classes, schedule and hashes, for the record.

    Raises:
        CheckpointError: something is missing, damaged, or of a kind that is not supported; one
            line names the file and the key or option, and the way out.
        InputError: an option for a folder that has no use for it, or a ``sample_size`` that is
            none, or odd for Flux.

    A distilled model (latent consistency, turbo, every published Flux) loads with a warning: it is
    not the score of the density that it was trained on. Flux dev is told the strength of guidance
    that it imitates; that of ``load_prompts`` is 1, no guidance, and
    ``condition._replace(guidance=...)`` says another. The sizes that ``load_prompts`` tells Stable
    Diffusion XL are those of the configuration, whatever ``sample_size``.

    References:
        von Platen et al. (2022), diffusers, https://github.com/huggingface/diffusers.
    """
    path = Path(path)
    file = path / CONFIG_FILE
    if file.is_file() and read_json(file).get("format") == FORMAT:
        if (component, variant, sample_size) != (None,) * 3 or dtype not in (None, jnp.float32):
            raise InputError(
                f"{path}: expected no component, variant, dtype or sample_size for a saved model"
            )
        model = load_own(path)
        return model if data_std is None else model.with_data_std(float(data_std), "given")
    given = None if data_std is None else float(data_std)
    layout = with_sample_size(recognize(path, component), sample_size)
    return read_model(layout, variant=variant, dtype=dtype, data_std=given)
