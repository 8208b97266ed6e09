"""Published scheduler configurations: their tables, and the flows that they describe.

The networks here are exact for a mixture of Gaussians and know each family's time and scale from
the papers' formulas, not from memjax: an error there must not cancel.
"""

import math
import warnings
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from memjax._core.errors import CheckpointError
from memjax.checkpoints._scheduler import (
    _DISTILLED,
    _EDM,
    _FLOWS,
    _TABLES,
    is_distilled,
    precondition,
    schedule_from_scheduler,
)
from memjax.diffusion.flow import probability_flow
from memjax.diffusion.prediction import EDMPreconditioned, from_prediction
from memjax.diffusion.sampling import ddim, heun, noise_levels
from memjax.diffusion.schedule import BETA_SCHEDULES, DiscreteVP, FlowMatching, VarianceExploding

FILE = Path("scheduler_config.json")
BETAS = [0.02 + 0.01 * math.sin(i) ** 2 for i in range(40)]


def read(name, **options):
    return schedule_from_scheduler({"_class_name": name, **options}, FILE)


# What files say


def test_a_well_known_file():
    """The configuration of the DDPM of CIFAR-10, in the form it was first published in."""
    early = {
        "_class_name": "GaussianDDPMScheduler",
        "_diffusers_version": "0.0.4",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "clip_predicted_image": True,
        "timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    assert schedule_from_scheduler(early, FILE) == (DiscreteVP(), "epsilon")


def test_defaults_are_those_of_the_class():
    assert read("PNDMScheduler")[0] == DiscreteVP()
    assert read("HeunDiscreteScheduler")[0] == DiscreteVP(beta_start=0.00085, beta_end=0.012)
    assert read("UnCLIPScheduler")[0] == DiscreteVP("squaredcos_cap_v2")
    latent = DiscreteVP("scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert read("LCMScheduler")[0] == latent
    assert read("FlaxPNDMScheduler")[0] == DiscreteVP()
    assert read("EDMEulerScheduler") == (VarianceExploding(0.002, 80.0), "denoiser")
    assert read("ScoreSdeVeScheduler") == (VarianceExploding(0.01, 1348.0), "score")
    flow = FlowMatching(t_min=1e-3, t_max=0.999, time_scale=1000.0)
    assert read("FlowMatchEulerDiscreteScheduler") == (flow, "flow")


def test_options():
    schedule, prediction = read(
        "DDIMScheduler",
        trained_betas=BETAS,
        num_train_timesteps=40,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
    )
    expected = DiscreteVP(
        trained_betas=tuple(BETAS), num_train_timesteps=40, rescale_betas_zero_snr=True
    )
    assert (schedule, prediction) == (expected, "v_prediction")
    assert read("DDPMScheduler", predict_epsilon=False)[1] == "sample"
    assert read("DDPMScheduler", predict_epsilon=True)[1] == "epsilon"
    assert read("DDPMScheduler", beta_end=1e-2, beta_start=None)[0].beta_end == 0.01
    solver = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    flow = FlowMatching(t_min=1e-3, t_max=0.999, time_scale=1000.0)
    for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        assert read(name, **solver) == (flow, "flow")


def test_distilled_networks_are_known():
    assert is_distilled({"_class_name": "LCMScheduler"})
    assert not is_distilled({"_class_name": "DDIMScheduler"})
    assert not is_distilled({})
    assert set(_TABLES) | _FLOWS >= _DISTILLED


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "_class_name: expected a scheduler that says .* found None"),
        (
            {"_class_name": "VQDiffusionScheduler"},
            ".* found 'VQDiffusionScheduler'; memjax.from_call",
        ),
        ({"_class_name": "KarrasVeScheduler"}, ".* found 'KarrasVeScheduler'"),
        ({"_class_name": ["DDPMScheduler"]}, r".* found \['DDPMScheduler'\]"),
        ({"_class_name": "os.system"}, r".* found 'os\.system'"),
        ({"beta_schedule": "sine"}, "beta_schedule: expected one of .* got 'sine'"),
        ({"beta_schedule": 3}, "beta_schedule: expected str, got 3"),
        ({"beta_end": "0.02"}, "beta_end: expected float, got '0.02'"),
        ({"beta_end": 1.5}, r"betas: expected values in \(0, 1\)"),
        ({"beta_end": float("nan")}, "betas: expected values"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps: expected 2 to 1000000"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps: expected int"),
        ({"trained_betas": [0.1]}, "trained_betas: expected num_train_timesteps = 1000"),
        ({"trained_betas": "betas.npy"}, "trained_betas: expected a list"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr: expected bool"),
        ({"prediction_type": "noise"}, "prediction_type: expected one of epsilon, .*'noise'"),
        ({"prediction_type": ["epsilon"]}, r"prediction_type: .* found \['epsilon'\]"),
        (
            {"prediction_type": "flow_prediction"},
            "prediction_type flow_prediction: expected use_flow_sigmas",
        ),
        ({"use_flow_sigmas": True}, "use_flow_sigmas: expected False, found True"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type: expected 'discrete', found 'continuous'",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
            "invert_sigmas: expected false, found True",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1},
            "num_train_timesteps: expected a whole number, at least 3, found 1",
        ),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": -1}, "sigma_min, sigma_max: expected"),
        (
            {"_class_name": "EDMEulerScheduler", "prediction_type": "sample"},
            "prediction_type: expected epsilon or v_prediction, found 'sample'",
        ),
    ],
)
def test_bad_files_get_one_line(config, message):
    config = (
        config
        if "_class_name" in config or not config
        else {
            "_class_name": "DDIMScheduler",
            **config,
        }
    )
    with pytest.raises(CheckpointError, match=f"^{FILE}: {message}") as caught:
        schedule_from_scheduler(config, FILE)
    assert "\n" not in str(caught.value)


def test_preconditioning():
    network = lambda x, t, c=None: 2 * x  # noqa: E731
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 2.0}
    wrapped = precondition(network, config, FILE)
    assert isinstance(wrapped, EDMPreconditioned)
    assert wrapped.data_std == 2.0
    negated = precondition(network, config | {"prediction_type": "v_prediction"}, FILE)
    # D = c_skip x + c_out F with x = sigma = 2 = d: c_skip = 1/2, c_out c_in = 1/2.
    assert float(wrapped(jnp.float32(2), 2.0)) == pytest.approx(1 + 2)
    assert float(negated(jnp.float32(2), 2.0)) == pytest.approx(1 - 2)
    assert precondition(network, {"_class_name": "DDIMScheduler"}, FILE) is network
    for value in ("1", 0, -1.0, float("nan")):
        with pytest.raises(CheckpointError, match=f"^{FILE}: sigma_data: expected a positive"):
            precondition(network, config | {"sigma_data": value}, FILE)


# The flows, with exact networks


D = 3
WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.random.default_rng(5).normal(size=(3, D))
VARIANCES = np.array([0.5, 0.1, 0.02])


def posterior(xp, x, sigma):
    """(x0_hat, n_hat) of one point, in NumPy or JAX."""
    total = VARIANCES + sigma**2
    offset = x[None, :] - MEANS
    logits = xp.log(WEIGHTS) - D / 2 * xp.log(total) - xp.sum(offset**2, 1) / total / 2
    r = xp.exp(logits - xp.max(logits))
    r = r / xp.sum(r)
    clean = (MEANS * sigma**2 + x[None, :] * VARIANCES[:, None]) / total[:, None]
    return r @ clean, r @ (sigma * offset / total[:, None])


def log_sigmas(config):
    """log(sigma) at every index where it is finite, one beta after the other."""
    n = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    match config.get("beta_schedule", "linear"):
        case "linear":
            betas = np.linspace(start, end, n)
        case "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, n) ** 2
        case "squaredcos_cap_v2":
            bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    alphas = np.sqrt(np.cumprod(1 - betas))
    if config.get("rescale_betas_zero_snr"):
        alphas = ((alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1]))[:-1]
    return np.log(np.sqrt(1 - alphas**2) / alphas)


class ExactNetwork(eqx.Module):
    """What a network perfectly trained under a configuration returns, in its own convention."""

    table: jax.Array | None
    kind: str = eqx.field(static=True)
    prediction: str = eqx.field(static=True)

    def __init__(self, config):
        name = config["_class_name"]
        self.kind = "flow" if name in _FLOWS else "edm" if name in _EDM else "ve"
        self.table = None
        if name in _TABLES:
            self.kind, self.table = "vp", jnp.asarray(log_sigmas(config))
        self.prediction = config.get("prediction_type", "epsilon")

    def __call__(self, x_t, time, condition=None):
        match self.kind:
            case "vp":
                last = self.table.shape[0]
                sigma = jnp.exp(jnp.interp(time, jnp.arange(last, dtype=x_t.dtype), self.table))
                alpha = 1 / jnp.sqrt(1 + sigma**2)
            case "flow":
                t = time / 1000
                sigma, alpha = t / (1 - t), 1 - t
            case "edm":
                sigma = jnp.exp(4 * time)
                alpha = 1 / jnp.sqrt(sigma**2 + 0.25)  # the raw network's input, for d = 1/2
            case _:
                sigma, alpha = time, 1.0
        clean, noise = posterior(jnp, x_t / alpha, sigma)
        if self.kind == "edm":
            sign = -1 if self.prediction == "v_prediction" else 1
            skip = 0.25 / (sigma**2 + 0.25) * x_t / alpha
            return sign * (clean - skip) / (sigma * 0.5 * alpha)
        if self.kind == "flow":
            return noise - clean
        if self.kind == "ve":
            return -noise / sigma
        return {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": alpha * (noise - sigma * clean),
        }[self.prediction]


FAMILIES = {
    "linear": {"_class_name": "DDPMScheduler"},
    "latent": {
        "_class_name": "EulerDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
    },
    "cosine": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "sample",
    },
    "zero_snr": {
        "_class_name": "DDIMScheduler",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "edm": {"_class_name": "EDMEulerScheduler"},
    "edm_v": {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "v_prediction"},
    "score": {"_class_name": "ScoreSdeVeScheduler"},
}


def family(name):
    """(score, schedule) as the loader makes them."""
    config = FAMILIES[name]
    schedule, prediction = schedule_from_scheduler(config, FILE)
    network = precondition(ExactNetwork(config), config, FILE)
    return from_prediction(network, prediction=prediction, schedule=schedule), schedule


def start(sigma, count=8):
    rng = np.random.default_rng(2)
    return MEANS[rng.integers(0, 3, count)] + sigma * rng.normal(size=(count, D))


def exact_flow(x, sigma0, sigma1):
    """The end of the flow by an eighth-order rule of SciPy, in float64."""

    def rate(s, flat):
        sigma = np.exp(s)
        points = flat.reshape(x.shape)
        return np.concatenate([sigma * posterior(np, point, sigma)[1] for point in points])

    ends = (np.log(sigma0), np.log(sigma1))
    solved = solve_ivp(rate, ends, x.ravel(), method="DOP853", rtol=1e-10, atol=1e-12)
    return solved.y[:, -1].reshape(x.shape)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"edm"}))
def test_the_flow_from_noise_in_few_steps(name, x64):
    score, schedule = family(name)
    ends = schedule.sigma_max, schedule.sigma_min
    x = start(ends[0])
    solve = jax.jit(lambda flow, x: jax.vmap(flow)(x))
    flow = solve(probability_flow(score, *ends, solver="dopri8", tol=1e-6), jnp.asarray(x))
    np.testing.assert_allclose(flow.point, exact_flow(x, *ends), atol=1e-5)
    assert np.max(flow.num_steps) <= 30


@jax.jit
def follow(score, x, sigmas):
    return tuple(jax.vmap(partial(rule, score), (0, None))(x, sigmas) for rule in (ddim, heun))


@pytest.mark.parametrize("name", ["latent", "flow", "edm_v"])
def test_samplers_converge_at_their_order(name, x64):
    score, _ = family(name)
    low, high = 0.05, 10.0
    x = start(high)
    truth = exact_flow(x, high, low)
    errors = []
    for steps in (64, 128):
        sigmas = noise_levels(high, low, steps + 1)[:-1]
        found = follow(score, jnp.asarray(x), jnp.asarray(sigmas))
        errors.append([np.max(np.abs(rule - truth)) for rule in found])
    orders = np.log2(np.divide(*errors))
    np.testing.assert_allclose(orders, [1, 2], atol=0.2)
    assert errors[1][1] < 1e-3


# Against diffusers, some of whose schedulers speak to NumPy as it was before 2.0
NUMPY_1 = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(scope="module")
def published():
    """diffusers' schedulers by name."""
    pytest.importorskip("torch").set_num_threads(1)
    pytest.importorskip("diffusers")
    with warnings.catch_warnings(action="ignore"):
        import diffusers.schedulers

        yield lambda config: getattr(diffusers.schedulers, config["_class_name"])(
            **{name: value for name, value in config.items() if name[0] != "_"}
        )


# From the last index to the first, whatever the number of steps.
TRAILING = {
    "_class_name": "DDIMScheduler",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def signal(schedule):
    """alpha^2 at every index, from our table."""
    indices = jnp.arange(schedule.num_train_timesteps, dtype=jnp.float64)
    return np.asarray(schedule.alpha(indices)) ** 2


TABLES = [
    (beta_schedule, zero_snr)
    for beta_schedule in (*BETA_SCHEDULES, "trained")
    for zero_snr in (False, True)
    if not (beta_schedule == "exp" and zero_snr)
]


@NUMPY_1
@pytest.mark.parametrize(("beta_schedule", "zero_snr"), TABLES)
def test_tables_equal_those_of_diffusers(beta_schedule, zero_snr, published, monkeypatch, x64):
    """alpha^2 at every index, relative: to 1e-6 of their code run in float64.

    Their own tables are float32: a thousand rounded factors leave up to 3e-5, and where a table
    is shifted to end in zero, small differences of large numbers up to 4e-5, which is theirs.
    """
    import torch

    config = {"_class_name": "DDPMScheduler", "beta_schedule": beta_schedule}
    if beta_schedule == "trained":
        config |= {"beta_schedule": "linear", "trained_betas": BETAS, "num_train_timesteps": 40}
    if beta_schedule == "exp":
        config["_class_name"] = "HeunDiscreteScheduler"
    if zero_snr:
        config["rescale_betas_zero_snr"] = True
    schedule, _ = schedule_from_scheduler(config, FILE)
    ours = signal(schedule)
    single = published(config).alphas_cumprod.numpy()
    monkeypatch.setattr(torch, "float32", torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        double = published(config).alphas_cumprod.numpy()
    finally:
        monkeypatch.undo()
        torch.set_default_dtype(torch.float32)
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    finite = slice(None, -1) if zero_snr else slice(None)
    assert (ours[-1] == 0) == zero_snr
    np.testing.assert_allclose(ours[finite], double[finite], rtol=1e-6)
    np.testing.assert_allclose(ours[finite], single[finite], rtol=4e-5)


@NUMPY_1
@pytest.mark.parametrize("name", sorted(set(_TABLES) - {"DPMSolverSDEScheduler"}))
def test_every_class_takes_the_defaults_of_diffusers(name, published, x64):
    """From its bare name, from what it writes itself, and for ten other betas."""
    for options in ({}, {"beta_start": 0.001, "beta_end": 0.03, "num_train_timesteps": 10}):
        if name == "UnCLIPScheduler":
            options.pop("beta_start", None)
            options.pop("beta_end", None)
        theirs = published({"_class_name": name, **options})
        bare = schedule_from_scheduler({"_class_name": name, **options}, FILE)
        assert schedule_from_scheduler(dict(theirs.config) | {"_class_name": name}, FILE) == bare
        assert bare[1] == "epsilon"
        np.testing.assert_allclose(signal(bare[0]), theirs.alphas_cumprod.numpy(), rtol=4e-5)


@NUMPY_1
@pytest.mark.parametrize("name", ["linear", "latent", "cosine", "flow", "edm"])
def test_the_same_steps_as_diffusers(name, published, x64):
    """Twenty steps of their first-order sampler are twenty of ours, with one exact network."""
    import torch

    config = FAMILIES[name]
    if name in ("linear", "cosine"):
        config = config | TRAILING
    if name == "edm":
        config = config | {"final_sigmas_type": "sigma_min"}
    score, schedule = family(name)
    network = jax.jit(jax.vmap(ExactNetwork(FAMILIES[name]), (0, None)))
    sampler = published(config)
    sampler.set_timesteps(20)
    steps = sampler.timesteps
    if name in ("linear", "cosine"):
        visited = np.append(steps.numpy(), 0)
        sigmas = np.asarray(schedule.sigma(jnp.asarray(visited, jnp.float64)))
        scale = float(schedule.alpha(float(visited[0])))
    else:
        sigmas = sampler.sigmas.numpy().astype(np.float64)
        scale = 1.0
        if name == "flow":  # from the second time on: at the first, t = 1, is no signal
            steps, t = steps[1:], sigmas[1:]
            sampler.set_begin_index(1)
            sigmas, scale = t / (1 - t), 1 - t[0]
    x = start(sigmas[0])
    theirs = torch.from_numpy(x * scale)
    for step in steps:
        scaled = theirs
        if name not in ("linear", "cosine", "flow"):
            scaled = sampler.scale_model_input(theirs, step)
        out = network(jnp.asarray(scaled.numpy()), jnp.float64(step.item()))
        theirs = sampler.step(torch.from_numpy(np.array(out)), step, theirs).prev_sample
    end = 1 / np.sqrt(1 + sigmas[-1] ** 2) if name in ("linear", "cosine") else 1.0
    ours, _ = follow(score, jnp.asarray(x), jnp.asarray(sigmas))
    np.testing.assert_allclose(ours, theirs.numpy() / end, atol=2e-4)


def test_the_gap_of_diffusers_halves_as_its_steps_double(published, x64):
    import torch

    config = FAMILIES["linear"] | TRAILING
    schedule, _ = schedule_from_scheduler(config, FILE)
    ends = schedule.sigma_max, schedule.sigma_min
    x = start(ends[0])
    truth = exact_flow(x, *ends)
    network = jax.jit(jax.vmap(ExactNetwork(FAMILIES["linear"]), (0, None)))
    sampler, gaps = published(config), []
    alphas = np.sqrt(sampler.alphas_cumprod.numpy().astype(np.float64))
    for steps in (125, 250, 500):
        sampler.set_timesteps(steps)
        theirs = torch.from_numpy(x * alphas[-1])
        for step in sampler.timesteps:
            out = network(jnp.asarray(theirs.numpy()), jnp.float64(step.item()))
            theirs = sampler.step(torch.from_numpy(np.array(out)), step, theirs).prev_sample
        gaps.append(np.max(np.abs(theirs.numpy() / alphas[0] - truth)))
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 2, rtol=0.15)
