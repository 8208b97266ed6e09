"""Published scheduler configurations: how a network was trained, apart from how it is sampled.

The class in a ``scheduler_config.json`` names a sampler; what matters here is the path x_t = alpha
x0 + sigma_t n that the sampler runs along, and what the network predicts on it.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx

from memjax._core.errors import CheckpointError, InputError
from memjax._core.text import one_line
from memjax.checkpoints._safetensors import fail, shown
from memjax.diffusion.prediction import EDMPreconditioned
from memjax.diffusion.schedule import (
    DiscreteVP,
    FlowMatching,
    Schedule,
    VarianceExploding,
    schedule_from_config,
)

# What a class takes for what its configuration leaves out, where that is not DDPM's 1e-4 to 0.02.
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
_TABLES: dict[str, dict[str, Any]] = {
    "DDIMInverseScheduler": {},
    "DDIMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSDEScheduler": _LATENT,
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _LATENT,
    "KDPM2AncestralDiscreteScheduler": _LATENT,
    "KDPM2DiscreteScheduler": _LATENT,
    "LCMScheduler": _LATENT | {"beta_schedule": "scaled_linear"},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "RePaintScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": _LATENT | {"beta_schedule": "scaled_linear"},
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "UniPCMultistepScheduler": {},
}
_FLOWS = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
}
_EDM = {"EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"}
_SCORES = {"ScoreSdeVeScheduler"}
_DISTILLED = {"FlowMatchLCMScheduler", "LCMScheduler", "TCDScheduler"}
_OLD_NAMES = {"GaussianDDPMScheduler": "DDPMScheduler"}


def schedule_from_scheduler(config: Mapping[str, Any], file: Path) -> tuple[Schedule, str]:
    """The schedule and the prediction behind a published scheduler configuration.

    ======================================  ====================================================
    class                                   schedule
    ======================================  ====================================================
    DDPM, DDIM, PNDM, LMS, Euler, Heun,     `DiscreteVP` of its betas: ``beta_schedule``,
    KDPM2, DPMSolver, UniPC, DEIS,          ``beta_start``, ``beta_end``, ``trained_betas``,
    SASolver, UnCLIP, RePaint, LCM, TCD     ``num_train_timesteps``, ``rescale_betas_zero_snr``
    FlowMatchEuler, -Heun, -LCM; others     `FlowMatching`, its network fed
    with ``use_flow_sigmas``                t ``num_train_timesteps``
    EDMEuler, EDMDPMSolver                  `VarianceExploding`, ``sigma_min`` to ``sigma_max``,
                                            a raw network: see ``precondition``
    ScoreSdeVe                              `VarianceExploding`, its network predicts the score
    ======================================  ====================================================

    All other options concern sampling and change no score: ``clip_sample``, ``thresholding``,
    ``variance_type``, ``timestep_spacing``, ``steps_offset``, ``set_alpha_to_one``, Karras'
    sigmas, orders of solvers, a flow's ``shift``. They are not looked at.

    Args:
        config: the configuration, with its ``_class_name``. What it leaves out is what its class
            takes by default; in particular a missing ``prediction_type`` is ``"epsilon"``. Early
            names (``timesteps``, ``predict_epsilon``, classes beginning with Flax) are known.
        file: where it was read from, for errors.

    Returns:
        The schedule, and the prediction as ``from_prediction`` calls it.

    Raises:
        CheckpointError: a class that does not say how its network was trained, or an option that
            is unknown or out of range.

    >>> config = {"_class_name": "DDIMScheduler", "beta_end": 0.012, "steps_offset": 1}
    >>> schedule, prediction = schedule_from_scheduler(config, Path("scheduler_config.json"))
    >>> prediction, schedule.beta_start, schedule.beta_end
    ('epsilon', 0.0001, 0.012)
    """
    name, given = _class_name(config, file), _given(config)
    prediction = given.get("prediction_type", "epsilon")
    known = ("epsilon", "sample", "v_prediction")
    try:
        if name in _FLOWS or (name in _TABLES and prediction == "flow_prediction"):
            if name in _TABLES and given.get("use_flow_sigmas") is not True:
                fail(f"{file}: prediction_type flow_prediction", "use_flow_sigmas", "none")
            if given.get("invert_sigmas", False) is not False:
                fail(f"{file}: invert_sigmas", "false", shown(given["invert_sigmas"]))
            return _flow(given, file), "flow"
        if name in _EDM:
            if prediction not in ("epsilon", "v_prediction"):
                fail(f"{file}: prediction_type", "epsilon or v_prediction", shown(prediction))
            return _exploding(given, 0.002, 80.0), "denoiser"
        if name in _SCORES:
            return _exploding(given, 0.01, 1348.0), "score"
        if prediction not in known:
            fail(f"{file}: prediction_type", f"one of {', '.join(known)}", shown(prediction))
        for option, meant in [("timestep_type", "discrete"), ("use_flow_sigmas", False)]:
            if given.get(option, meant) != meant:
                fail(f"{file}: {option}", repr(meant), shown(given[option]))
        return _table(given, _TABLES[name]), prediction
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(f"{file}: {one_line(str(error))}") from None


def precondition(network: Callable, config: Mapping[str, Any], file: Path) -> Callable:
    """A network as ``schedule_from_scheduler`` speaks of it, from the one in the files.

    The schedulers of EDM hold the preconditioning of their network, with the data's standard
    deviation ``sigma_data``; with ``"v_prediction"`` the raw network has the other sign.

    Args:
        network: callable pytree ``(x, network_time, condition) -> output`` on one sample.
        config: the scheduler's configuration.
        file: where it was read from, for errors.

    Returns:
        An ``EDMPreconditioned`` network for the schedulers of EDM; else ``network`` itself.

    Raises:
        CheckpointError: ``sigma_data`` is not a positive number.
    """
    if _class_name(config, file) not in _EDM:
        return network
    given = _given(config)
    data_std = given.get("sigma_data", 0.5)
    if type(data_std) not in (int, float) or not 0 < data_std < math.inf:
        fail(f"{file}: sigma_data", "a positive number", shown(data_std))
    if given.get("prediction_type") == "v_prediction":
        network = _Negated(network)
    return EDMPreconditioned(network, float(data_std))


def is_distilled(config: Mapping[str, Any]) -> bool:
    """Does the scheduler belong to a network that was distilled to few steps?

    Such a network (LCM, TCD) maps noise to images; it is no score of its training data.

    Args:
        config: the scheduler's configuration.
    """
    return config.get("_class_name") in _DISTILLED


class _Negated(eqx.Module):
    network: Callable

    def __call__(self, x, time, condition=None):
        return -self.network(x, time, condition)


def _class_name(config: Mapping[str, Any], file: Path) -> str:
    name = config.get("_class_name")
    if isinstance(name, str):
        name = name.removeprefix("Flax")
        name = _OLD_NAMES.get(name, name)
        if name in (*_TABLES, *_FLOWS, *_EDM, *_SCORES):
            return name
    raise CheckpointError(
        f"{file}: _class_name: expected a scheduler that says how its network was trained (such "
        f"as DDPMScheduler or FlowMatchEulerDiscreteScheduler), found {shown(name)}; "
        "memjax.from_callable takes any network with the schedule you name"
    )


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options that have a value, under their present names."""
    given = {name: value for name, value in config.items() if value is not None}
    if "timesteps" in given:
        given.setdefault("num_train_timesteps", given["timesteps"])
    if given.get("predict_epsilon") is False:
        given.setdefault("prediction_type", "sample")
    return given


def _table(given: dict[str, Any], defaults: dict[str, Any]) -> Schedule:
    options = defaults | given
    names = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "trained_betas")
    chosen = {n: options[n] for n in (*names, "rescale_betas_zero_snr") if n in options}
    return schedule_from_config({"schedule": DiscreteVP.kind, **chosen})


def _flow(given: dict[str, Any], file: Path) -> Schedule:
    """Times 1/N to 1 - 1/N of the N + 1 that training knew: at t = 1 nothing is left to score."""
    steps = given.get("num_train_timesteps", 1000)
    if type(steps) is not int or steps < 3:
        fail(f"{file}: num_train_timesteps", "a whole number, at least 3", shown(steps))
    return FlowMatching(t_min=1 / steps, t_max=1 - 1 / steps, time_scale=float(steps))


def _exploding(given: dict[str, Any], low: float, high: float) -> Schedule:
    chosen = {"sigma_min": given.get("sigma_min", low), "sigma_max": given.get("sigma_max", high)}
    return schedule_from_config({"schedule": VarianceExploding.kind, **chosen})
