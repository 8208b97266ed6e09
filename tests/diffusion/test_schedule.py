"""Schedules against closed forms and loops written out in NumPy float64."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.diffusion.schedule import (
    ContinuousVP,
    DiscreteVP,
    FlowMatching,
    SubVP,
    VarianceExploding,
    schedule_from_config,
)

BETAS = tuple(0.01 + 0.02 * math.sin(i) ** 2 for i in range(37))
TABLES = {
    "linear": DiscreteVP(),
    "scaled_linear": DiscreteVP("scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": DiscreteVP("squaredcos_cap_v2"),
    "sigmoid": DiscreteVP("sigmoid", beta_start=1e-7, beta_end=2e-3, num_train_timesteps=500),
    "exp": DiscreteVP("exp"),
    "laplace": DiscreteVP("laplace"),
    "trained_betas": DiscreteVP(trained_betas=BETAS, num_train_timesteps=37),
    "linear_zero_snr": DiscreteVP(rescale_betas_zero_snr=True),
    "scaled_linear_zero_snr": DiscreteVP(
        "scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True
    ),
    "shortest_table": DiscreteVP(num_train_timesteps=2, beta_start=0.1, beta_end=0.2),
}
CONTINUOUS = {
    "continuous_vp": ContinuousVP(),
    "constant_beta": ContinuousVP(beta_min=3.0, beta_max=3.0),
    "sub_vp": SubVP(t_min=1e-4, time_scale=999.0),
    "flow": FlowMatching(),
    "flow_1000": FlowMatching(time_scale=1000.0),
    "edm": VarianceExploding(),
}
SCHEDULES = TABLES | CONTINUOUS


def names(schedules):
    return pytest.mark.parametrize("name", schedules)


def published_curve(name, u):
    """The curve whose quotients are 1 - beta, at one point."""
    if name == "squaredcos_cap_v2":
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    if name == "exp":
        return math.exp(-12 * u)
    snr = (1 - 2 * abs(0.5 - u) + 1e-6) ** (-0.5 if u <= 0.5 else 0.5)
    return math.sqrt(snr / (1 + snr))


def published_sigmas(schedule):
    """sigma_i of a table, one product after the other, as published code forms it."""
    n, start, end = schedule.num_train_timesteps, schedule.beta_start, schedule.beta_end
    betas = []
    for i in range(n):
        if schedule.trained_betas is not None:
            beta = schedule.trained_betas[i]
        elif schedule.beta_schedule == "linear":
            beta = start + (end - start) * i / (n - 1)
        elif schedule.beta_schedule == "scaled_linear":
            beta = (start**0.5 + (end**0.5 - start**0.5) * i / (n - 1)) ** 2
        elif schedule.beta_schedule == "sigmoid":
            beta = start + (end - start) / (1 + math.exp(6 - 12 * i / (n - 1)))
        else:
            bar = [published_curve(schedule.beta_schedule, u / n) for u in (i, i + 1)]
            beta = min(1 - bar[1] / bar[0], 0.999)
        betas.append(beta)
    alphas, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        alphas.append(math.sqrt(product))
    if schedule.rescale_betas_zero_snr:
        first, last = alphas[0], alphas[-1]
        alphas = [(a - last) * first / (first - last) for a in alphas]
    return np.array([math.sqrt(1 - a**2) / a if a > 0 else math.inf for a in alphas])


def closed_form(name, t):
    """(alpha, sigma_t) from the papers' formulas, in NumPy float64."""
    schedule = CONTINUOUS[name]
    match schedule:
        case VarianceExploding():
            return np.ones_like(t), t
        case FlowMatching():
            return 1 - t, t
    b0, b1 = schedule.beta_min, schedule.beta_max
    integral = t**2 / 2 * (b1 - b0) + t * b0
    alpha = np.exp(-integral / 2)
    variance = -np.expm1(-integral)
    return alpha, variance if isinstance(schedule, SubVP) else np.sqrt(variance)


def times(schedule, num=201):
    """Times over the schedule's whole range, dense near both ends, as float64."""
    match schedule:
        case DiscreteVP():
            last = schedule.num_train_timesteps - 1 - schedule.rescale_betas_zero_snr
            return np.linspace(0, last, num)
        case VarianceExploding():
            return np.geomspace(schedule.sigma_min, schedule.sigma_max, num)
        case FlowMatching():
            odds = np.geomspace(schedule.sigma_min, schedule.sigma_max, num)
            return odds / (1 + odds)
        case _:
            return np.geomspace(schedule.t_min, schedule.t_max, num)


@names(TABLES)
def test_table_equals_the_published_loop(name, x64):
    schedule, expected = TABLES[name], published_sigmas(TABLES[name])
    indices = jnp.arange(len(expected), dtype=jnp.float64)
    np.testing.assert_allclose(schedule.sigma(indices), expected, rtol=1e-9)
    finite = expected[np.isfinite(expected)]
    np.testing.assert_allclose([schedule.sigma_min, schedule.sigma_max], finite[[0, -1]], rtol=1e-9)
    alpha, sigma_t = schedule.alpha(indices), schedule.sigma_t(indices)
    np.testing.assert_allclose(alpha[:-1] ** 2 + sigma_t[:-1] ** 2, 1, rtol=1e-14)
    np.testing.assert_allclose((sigma_t / alpha)[:-1], expected[:-1], rtol=1e-9)


def test_endpoints_of_well_known_tables():
    # The values to which the published configurations are known to run.
    for name, low, high in [("linear", 0.0100, 157), ("scaled_linear", 0.0292, 14.6)]:
        assert TABLES[name].sigma_min == pytest.approx(low, rel=5e-3)
        assert TABLES[name].sigma_max == pytest.approx(high, rel=5e-3)
    assert TABLES["cosine"].sigma_max == pytest.approx(2e4, rel=2e-2)


def test_cosine_table_follows_its_curve_where_not_capped(x64):
    def bar(u):
        return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

    i = np.arange(0, 990)
    np.testing.assert_allclose(
        TABLES["cosine"].alpha(jnp.asarray(i, jnp.float64)) ** 2,
        bar((i + 1) / 1000) / bar(0),
        rtol=1e-11,
    )


def test_between_indices_log_sigma_is_linear(x64):
    schedule, table = TABLES["linear"], np.log(published_sigmas(TABLES["linear"]))
    t = np.random.default_rng(0).uniform(0, 999, 300)
    expected = np.exp(np.interp(t, np.arange(1000), table))
    np.testing.assert_allclose(schedule.sigma(jnp.asarray(t)), expected, rtol=1e-9)


@names([name for name in TABLES if "zero_snr" in name])
def test_zero_snr_ends_in_pure_noise(name, x64):
    schedule = TABLES[name]
    last = schedule.num_train_timesteps - 1.0
    assert schedule.sigma(last) == jnp.inf
    assert schedule.alpha(last) == 0
    assert schedule.time(jnp.inf) == last
    # 1/sigma falls linearly over the last step, and both directions agree there.
    halves = schedule.sigma(jnp.array([last - 1, last - 0.5]))
    np.testing.assert_allclose(halves, [schedule.sigma_max, 2 * schedule.sigma_max], rtol=1e-12)
    np.testing.assert_allclose(schedule.time(halves), [last - 1, last - 0.5], rtol=1e-12)
    assert jnp.isfinite(jax.grad(schedule.time)(2 * schedule.sigma_max))
    assert jnp.isfinite(jax.grad(schedule.time)(schedule.sigma_min))


@names(CONTINUOUS)
def test_continuous_schedules_equal_their_closed_forms(name, x64):
    schedule = CONTINUOUS[name]
    t = times(schedule)
    alpha, sigma_t = closed_form(name, t)
    t = jnp.asarray(t)
    # t near 1 is rounded before flow matching forms 1 - t, in the oracle as well as here.
    np.testing.assert_allclose(schedule.alpha(t), alpha, rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma_t(t), sigma_t, rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma(t), sigma_t / alpha, rtol=1e-12)
    ends = (sigma_t / alpha)[[0, -1]]
    np.testing.assert_allclose([schedule.sigma_min, schedule.sigma_max], ends, rtol=1e-12)


@names(SCHEDULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trips(name, dtype, x64):
    schedule, eps = SCHEDULES[name], np.finfo(dtype).eps
    t = jnp.asarray(times(schedule), dtype)
    sigma = schedule.sigma(t)
    again = schedule.time(sigma)
    assert sigma.dtype == again.dtype == dtype
    assert schedule.alpha_at(sigma).dtype == schedule.network_time(t).dtype == dtype
    back = schedule.sigma(again)
    speed = jax.vmap(jax.grad(lambda u: jnp.log(schedule.sigma(u))))(t.astype(jnp.float64))
    t, again, sigma, back, speed = (
        np.asarray(a, np.float64) for a in (t, again, sigma, back, speed)
    )
    # Relative in t; a table's time starts at index 0, where its unit is one step.
    scale = np.maximum(t, 1) if isinstance(schedule, DiscreteVP) else t
    assert np.max(np.abs(again - t) / scale) <= 8 * eps <= 1e-6
    # Relative in sigma, up to t's own rounding times how fast log(sigma) runs in t.
    assert np.all(np.abs(back / sigma - 1) <= 8 * eps * (1 + t * np.abs(speed)))


@names(SCHEDULES)
def test_float32_has_float64s_value(name, x64):
    """Closed forms survive float32 at both ends: a few roundings, never 1 - (1 - small)."""
    schedule = SCHEDULES[name]
    t = jnp.asarray(times(schedule), jnp.float32)
    for function in (schedule.sigma, schedule.alpha, schedule.sigma_t):
        expected = function(t.astype(jnp.float64))
        np.testing.assert_allclose(function(t), expected, rtol=2e-6)
    sigma = schedule.sigma(t)
    np.testing.assert_allclose(
        schedule.time(sigma), schedule.time(sigma.astype(jnp.float64)), rtol=1e-6, atol=1e-6
    )


@names(SCHEDULES)
def test_monotone(name, x64):
    schedule = SCHEDULES[name]
    t = jnp.asarray(times(schedule, 5000))
    assert np.all(np.diff(schedule.sigma(t)) > 0)
    assert np.all(np.diff(schedule.alpha(t)) <= 0)
    sigma = jnp.geomspace(schedule.sigma_min, schedule.sigma_max, 5000)
    assert np.all(np.diff(schedule.time(sigma)) > 0)


@names(SCHEDULES)
def test_derivative_of_the_inverse(name, x64):
    """dt/dsigma = 1 / (dsigma/dt), eager, under jit and vmap, at random times."""
    schedule = SCHEDULES[name]
    t = times(schedule)
    t = jnp.asarray(np.random.default_rng(1).uniform(t[0], t[-1], 50))
    up = jax.vmap(jax.grad(schedule.sigma))(t)
    down = jax.jit(jax.vmap(jax.grad(schedule.time)))(jax.vmap(schedule.sigma)(t))
    np.testing.assert_allclose(up * down, 1, rtol=1e-9)
    h = 1e-6 * (t if not isinstance(schedule, DiscreteVP) else 1.0)
    inside = jnp.abs(t - jnp.round(t)) > 1e-5  # not astride a kink of the table
    slope = (schedule.sigma(t + h) - schedule.sigma(t - h)) / (2 * h)
    keep = np.asarray(inside) if isinstance(schedule, DiscreteVP) else np.full(50, True)
    np.testing.assert_allclose(slope[keep], up[keep], rtol=1e-6)


@names(SCHEDULES)
def test_static(name):
    """Equal parameters hash alike, and a schedule is a static argument that does not retrace."""
    schedule = SCHEDULES[name]
    twin = schedule_from_config(schedule.to_config())
    assert twin == schedule
    assert hash(twin) == hash(schedule)
    traces = []

    @partial(jax.jit, static_argnums=0)
    def time(schedule, sigma):
        traces.append(None)
        return schedule.time(sigma)

    time(schedule, jnp.float32(0.5))
    time(twin, jnp.float32(0.5))
    assert len(traces) == 1


@names(SCHEDULES)
def test_config_survives_json(name):
    config = json.loads(json.dumps(SCHEDULES[name].to_config()))
    assert schedule_from_config(config) == SCHEDULES[name]


def test_config_takes_defaults_and_whole_numbers():
    assert schedule_from_config({"schedule": "discrete_vp"}) == DiscreteVP()
    edm = schedule_from_config({"schedule": "variance_exploding", "sigma_max": 80})
    assert edm == VarianceExploding()
    assert isinstance(edm.sigma_max, float)


def test_network_time():
    assert FlowMatching(time_scale=1000.0).network_time(0.25) == 250
    assert DiscreteVP().network_time(12.5) == 12.5
    assert VarianceExploding().network_time(0.5) == 0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "schedule: expected one of discrete_vp, .*, got None"),
        ({"schedule": "karras"}, "schedule: .* got 'karras'"),
        ({"schedule": "sub_vp", "beta_start": 1.0}, "schedule sub_vp: .* got 'beta_start'"),
        ({"schedule": "sub_vp", "beta_min": "1"}, "beta_min: expected float, got '1'"),
        ({"schedule": "discrete_vp", "beta_schedule": "sine"}, "beta_schedule: .* 'sine'"),
        ({"schedule": "discrete_vp", "beta_end": 1.5}, "betas: expected values in"),
        ({"schedule": "discrete_vp", "num_train_timesteps": 1}, "num_train_timesteps: .* got 1"),
        ({"schedule": "discrete_vp", "num_train_timesteps": 10**12}, "timesteps: .* got 10+$"),
        ({"schedule": "discrete_vp", "num_train_timesteps": "9"}, "num_train_timesteps: .*'9'"),
        ({"schedule": "discrete_vp", "trained_betas": [0.1]}, "trained_betas: .* got 1"),
        ({"schedule": "discrete_vp", "trained_betas": ["a"]}, "trained_betas: .* got 'a'"),
        ({"schedule": "discrete_vp", "trained_betas": 3}, "trained_betas: .* got 3"),
        ({"schedule": "discrete_vp", "rescale_betas_zero_snr": "no"}, "rescale_betas_zero_snr"),
        ({"schedule": "flow_matching", "t_max": 1.0}, "t_max: expected a time below 1"),
        ({"schedule": "flow_matching", "t_min": 0.0}, "t_min, t_max: "),
        ({"schedule": "flow_matching", "time_scale": 0.0}, "time_scale: "),
        ({"schedule": "continuous_vp", "beta_min": 30.0}, "beta_min, beta_max: "),
        ({"schedule": "variance_exploding", "sigma_max": math.nan}, "sigma_min, sigma_max: "),
        ({"schedule": "variance_exploding", "sigma_min": -1}, "sigma_min, sigma_max: "),
    ],
)
def test_bad_configurations_get_one_line(config, message):
    with pytest.raises(InputError, match=message) as caught:
        schedule_from_config(config)
    assert "\n" not in str(caught.value)
