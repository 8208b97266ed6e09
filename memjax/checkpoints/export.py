"""Our models as folders of diffusers, so that others can load them."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from memjax._core.errors import CheckpointError, InputError
from memjax._core.files import write_atomically
from memjax._core.text import one_line
from memjax.checkpoints._layout import CONFIG_FILE, INDEX_FILE, SCHEDULER_FILE
from memjax.checkpoints._safetensors import STEM
from memjax.checkpoints.files import pixel_score
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.model import Model
from memjax.diffusion.prediction import EDMPreconditioned, PredictionScore
from memjax.diffusion.schedule import DiscreteVP, FlowMatching, VarianceExploding
from memjax.networks.unet2d import UNet2DModel
from memjax.networks.unet2d_linen import LinenUNet2D

_OIHW = (3, 2, 0, 1)
_BETAS = (
    "beta_schedule",
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def export_diffusers(model: Model, path: str | os.PathLike) -> None:
    """Write a model as a folder of diffusers.

    Where the network predicts under a table of betas, the folder is a ``DDPMPipeline``. Else no
    pipeline of diffusers samples from it, and the folder is that of the network with
    ``scheduler_config.json`` beside it: ``UNet2DModel.from_pretrained(path)`` and the scheduler's
    class read it, as ``memjax.load`` does. EDM's preconditioning is that of ``EDMEulerScheduler``.

    Args:
        model: a model of pixels around a ``memjax.networks.UNet2DModel``, read from a folder of
            diffusers or made by ``from_prediction``; or around a ``LinenUNet2D``, as
            ``memjax.train(images, network="unet2d")`` makes it. The other networks that it knows
            by name have no counterpart in diffusers.
        path: the folder; missing or empty.

    Raises:
        InputError: the network is of another architecture, or its training is one that diffusers
            cannot describe; one line says what does not fit.
        CheckpointError: the folder is not empty, or cannot be written.

    The numbers are the same: weights are written in their own precision, bfloat16 as float32.

    References:
        von Platen et al. (2022), diffusers, https://github.com/huggingface/diffusers.
    """
    path = Path(path)
    score = pixel_score(model)
    network = _network(score.network, model.event_shape[-1])
    scheduler = _scheduler(score)
    height, width = model.event_shape[:2]
    config = {
        "_class_name": "UNet2DModel",
        **network.options._asdict(),
        "sample_size": height if height == width else [height, width],
    }
    files = {CONFIG_FILE: _json(config), f"{STEM}.safetensors": _weights(network)}
    if scheduler["_class_name"] == "DDPMScheduler":
        index = {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        }
        files = {f"unet/{name}": data for name, data in files.items()}
        files |= {f"scheduler/{SCHEDULER_FILE}": _json(scheduler), INDEX_FILE: _json(index)}
    else:
        files[SCHEDULER_FILE] = _json(scheduler)
    try:
        if path.exists() and any(path.iterdir()):
            raise CheckpointError(f"{path}: expected a new or empty folder, found files in it")
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path / name, data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None


def _network(network: Any, num_channels: int) -> UNet2DModel:
    """The network without its preconditioning."""
    if isinstance(network, EDMPreconditioned):
        network = network.network
    if isinstance(network, UNet2DModel):
        return network
    if isinstance(network, LinenNetwork) and isinstance(network.module, LinenUNet2D):
        return UNet2DModel(network.variables["params"], network.module.options(num_channels))
    kind = type(network.module if isinstance(network, LinenNetwork) else network).__name__
    raise InputError(
        f"network: expected a UNet2DModel, got {kind}, an architecture that diffusers does not "
        'have; train with network="unet2d"'
    )


def _scheduler(score: PredictionScore) -> dict[str, Any]:
    """The configuration of a scheduler that means the same training."""
    schedule, prediction = score.schedule, score.prediction
    match schedule:
        case DiscreteVP() if prediction in ("epsilon", "v_prediction", "sample"):
            betas = schedule.to_config()
            return {
                "_class_name": "DDPMScheduler",
                **{name: betas[name] for name in _BETAS},
                "prediction_type": prediction,
                "clip_sample": False,
            }
        case VarianceExploding() if isinstance(score.network, EDMPreconditioned):
            return {
                "_class_name": "EDMEulerScheduler",
                "sigma_min": schedule.sigma_min,
                "sigma_max": schedule.sigma_max,
                "sigma_data": score.network.data_std,
                "prediction_type": "epsilon",
            }
        case FlowMatching() if prediction == "flow" and schedule.time_scale.is_integer():
            return {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": int(schedule.time_scale),
            }
    shown = one_line(f"{prediction} under {schedule!r}", limit=200)
    raise InputError(
        "schedule: expected a prediction under DiscreteVP, FlowMatching, or EDM's preconditioning, "
        f"got {shown}, which no scheduler of diffusers describes"
    )


def _weights(network: UNet2DModel) -> bytes:
    arrays = {}
    for name, leaf in network.weights.items():
        array = np.asarray(leaf)
        if array.dtype == jnp.bfloat16:
            array = array.astype(np.float32)
        arrays[name] = np.ascontiguousarray(array.transpose(_OIHW) if array.ndim == 4 else array)
    return safetensors.numpy.save(arrays, {"format": "pt"})


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
