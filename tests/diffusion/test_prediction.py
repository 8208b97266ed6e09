"""One Gaussian mixture, seen through every prediction under every schedule, is one score."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.calculus.linearization import linearize
from memjax.diffusion.combine import at
from memjax.diffusion.prediction import EDMPreconditioned, from_prediction
from memjax.diffusion.schedule import (
    ContinuousVP,
    DiscreteVP,
    FlowMatching,
    SubVP,
    VarianceExploding,
)

D = 4
SCHEDULES = {
    "linear": DiscreteVP(),
    "scaled_linear": DiscreteVP("scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": DiscreteVP("squaredcos_cap_v2"),
    "linear_zero_snr": DiscreteVP(rescale_betas_zero_snr=True),
    "continuous_vp": ContinuousVP(t_min=1e-4, time_scale=999.0),
    "sub_vp": SubVP(),
    "flow": FlowMatching(time_scale=1000.0),
    "edm": VarianceExploding(),
}
PREDICTIONS = ["epsilon", "v_prediction", "sample", "flow", "score"]


def mixture():
    """Weights, means and variances: two broad components, and two planted points."""
    rng = np.random.default_rng(7)
    return (
        np.array([0.4, 0.3, 0.2, 0.1]),
        rng.normal(size=(4, D)),
        np.array([0.5, 0.2, 1e-3, 1e-4]),
    )


def exact(x, sigma):
    """Score and Hessian of log p_sigma in NumPy float64, from the textbook formulas."""
    weights, means, variances = mixture()
    total = variances + sigma**2
    pull = (means - x) / total[:, None]
    log_r = np.log(weights) - D / 2 * np.log(total) - np.sum((means - x) ** 2, 1) / total / 2
    r = np.exp(log_r - log_r.max())
    r /= r.sum()
    score = r @ pull
    spread = pull - score
    return score, (spread.T * r) @ spread - np.eye(D) * np.sum(r / total)


def posterior(x, sigma, arrays):
    """(x0_hat, n_hat) given x = x0 + sigma n in JAX, neither as a difference of the other."""
    weights, means, variances = arrays
    total = variances + sigma**2
    offset = x[None, :] - means
    logits = jnp.log(weights) - D / 2 * jnp.log(total) - jnp.sum(offset**2, 1) / total / 2
    r = jax.nn.softmax(logits)
    clean = (means * sigma**2 + x[None, :] * variances[:, None]) / total[:, None]
    return r @ clean, r @ (sigma * offset / total[:, None])


def process(schedule, time):
    """(alpha, sigma_t) from what the network is fed, by the papers' formulas.

    Not by the schedule's own methods: an error in them must not cancel.
    """
    match schedule:
        case VarianceExploding():
            return jnp.ones_like(time), time
        case FlowMatching():
            t = time / schedule.time_scale
            return 1 - t, t
        case DiscreteVP():
            table = np.log(table_sigmas(schedule))
            finite = table[np.isfinite(table)]
            i = jnp.clip(jnp.floor(time).astype(jnp.int32), 0, len(finite) - 2)
            steps = jnp.asarray(np.diff(finite), time.dtype)
            nodes = jnp.asarray(np.exp(finite), time.dtype)
            sigma = nodes[i] * jnp.exp(steps[i] * (time - i.astype(time.dtype)))
            return 1 / jnp.sqrt(1 + sigma**2), 1 / jnp.sqrt(1 + 1 / sigma**2)
    t = time / schedule.time_scale
    integral = t**2 / 2 * (schedule.beta_max - schedule.beta_min) + t * schedule.beta_min
    variance = -jnp.expm1(-integral)
    return jnp.exp(-integral / 2), variance if isinstance(schedule, SubVP) else jnp.sqrt(variance)


def table_sigmas(schedule):
    n, start, end = schedule.num_train_timesteps, schedule.beta_start, schedule.beta_end
    betas = {
        "linear": np.linspace(start, end, n),
        "scaled_linear": np.linspace(start**0.5, end**0.5, n) ** 2,
        "squaredcos_cap_v2": np.array(
            [
                min(1 - (np.cos(b) / np.cos(a)) ** 2, 0.999)
                for a, b in itertools.pairwise((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2)
            ]
        ),
    }[schedule.beta_schedule]
    alphas = np.sqrt(np.cumprod(1 - betas))
    if schedule.rescale_betas_zero_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
        alphas = alphas[:-1]
    return np.sqrt(1 - alphas**2) / alphas


class ExactNetwork(eqx.Module):
    """What a perfectly trained network would output; the mixture's numbers are its weights.

    It works in float64 and rounds its output to the dtype of its input, so that what is measured
    is the conversion.
    """

    arrays: tuple
    prediction: str = eqx.field(static=True)
    schedule: object = eqx.field(static=True)

    def __call__(self, x_t, time, condition=None):
        alpha, sigma_t = process(self.schedule, time.astype(jnp.float64))
        x = x_t.astype(jnp.float64) / alpha
        clean, noise = posterior(x, sigma_t / alpha, self.arrays)
        outputs = {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma_t * clean,
            "flow": noise - clean,
            "score": -noise / sigma_t,
        }
        return outputs.get(self.prediction, clean).astype(x_t.dtype)


class ExactRawNetwork(eqx.Module):
    """The raw network F within EDM's preconditioning, for data of standard deviation d."""

    arrays: tuple
    data_std: float = eqx.field(static=True)

    def __call__(self, scaled, c_noise, condition=None):
        sigma = jnp.exp(4 * c_noise.astype(jnp.float64))
        total = sigma**2 + self.data_std**2
        x = scaled.astype(jnp.float64) * jnp.sqrt(total)
        _, noise = posterior(x, sigma, self.arrays)
        raw = (sigma * x / total - noise) * jnp.sqrt(total) / self.data_std
        return raw.astype(scaled.dtype)


def exact_score(prediction, schedule):
    arrays = tuple(jnp.asarray(a) for a in mixture())
    if prediction == "edm_preconditioned":
        network = EDMPreconditioned(ExactRawNetwork(arrays, 0.75), 0.75)
        return from_prediction(network, prediction="denoiser", schedule=schedule)
    network = ExactNetwork(arrays, prediction, schedule)
    return from_prediction(network, prediction=prediction, schedule=schedule)


@jax.jit
def score_and_jacobian(score, xs, sigmas):
    def one(x, sigma):
        lin = linearize(at(score, sigma), x)
        return lin.value, jax.vmap(lin.jvp, out_axes=-1)(jnp.eye(D, dtype=x.dtype))

    return jax.vmap(one)(xs, sigmas)


CASES = [
    *itertools.product(PREDICTIONS, SCHEDULES),
    ("denoiser", "edm"),
    ("edm_preconditioned", "edm"),
]


def noised(sigmas, dtype):
    rng = np.random.default_rng(3)
    weights, means, variances = mixture()
    which = rng.choice(len(weights), size=len(sigmas), p=weights)
    spread = np.sqrt(variances[which] + sigmas**2)[:, None]
    return (means[which] + spread * rng.normal(size=(len(sigmas), D))).astype(dtype)


def check_one_score(prediction, schedule, xs, sigmas, tolerance, roundings):
    """Score and sigma^2 H at every point against the mixture's, relative to the largest entry.

    Where the prediction carries the clean image, its own rounding hides the noise. What is then
    lost is given by the formula in the documentation: so many roundings are allowed for.
    """
    score = exact_score(prediction, schedule)
    found = score_and_jacobian(score, jnp.asarray(xs), jnp.asarray(sigmas))
    assert all(part.dtype == xs.dtype for part in found)
    eps = np.finfo(xs.dtype).eps
    xs, sigmas = np.float64(xs), np.float64(sigmas)
    expected = zip(*[exact(x, sigma) for x, sigma in zip(xs, sigmas, strict=True)], strict=True)
    clean_sizes = np.max(np.abs(xs), 1), np.ones(len(xs))  # of x0_hat, and of dx0_hat/dx
    for value, truth, clean in zip(found, map(np.array, expected), clean_sizes, strict=True):
        axes = tuple(range(1, value.ndim))
        size = np.max(np.abs(truth), axes)
        lost = np.zeros_like(size)
        if prediction in ("sample", "denoiser", "flow"):
            lost = eps * clean / ((sigmas + (prediction == "flow")) * sigmas * size)
        error = np.max(np.abs(np.asarray(value, np.float64) - truth), axes) / size
        assert np.max(error / (tolerance + roundings * lost)) <= 1


@pytest.mark.parametrize(("prediction", "name"), CASES)
def test_one_score_in_float64(prediction, name, x64):
    schedule = SCHEDULES[name]
    sigmas = np.geomspace(schedule.sigma_min, schedule.sigma_max, 60)
    xs = noised(sigmas, np.float64)
    # In float64 the network's own arithmetic rounds as well, its softmax by |s| at a time.
    check_one_score(prediction, schedule, xs, sigmas, 1e-10, roundings=96)


@pytest.mark.parametrize(("prediction", "name"), CASES)
def test_one_score_in_float32(prediction, name, x64):
    """At times that float32 can hold, so that the network is fed the exact time."""
    schedule = SCHEDULES[name]
    sigmas = np.float32(sigma_at(schedule, representable_times(schedule)))
    check_one_score(prediction, schedule, noised(sigmas, np.float32), sigmas, 1e-5, roundings=3)


def representable_times(schedule):
    match schedule:
        case DiscreteVP():
            last = schedule.num_train_timesteps - 1 - schedule.rescale_betas_zero_snr
            return np.unique(np.round(np.linspace(0, last, 60)))
        case VarianceExploding():
            return np.geomspace(schedule.sigma_min, schedule.sigma_max, 60)
        case FlowMatching():
            # Multiples of 2^-9: exact in float32, also as 1 - t.
            return np.unique(np.round(np.linspace(1, 511, 60))) / 512
    return np.geomspace(schedule.t_min, schedule.t_max, 60)


def sigma_at(schedule, times):
    if isinstance(schedule, DiscreteVP):
        return table_sigmas(schedule)[times.astype(int)]
    if isinstance(schedule, VarianceExploding):
        return times
    if isinstance(schedule, FlowMatching):
        return times / (1 - times)
    integral = times**2 / 2 * (schedule.beta_max - schedule.beta_min) + times * schedule.beta_min
    return 2 * np.sinh(integral / 2) if isinstance(schedule, SubVP) else np.sqrt(np.expm1(integral))


def test_the_oracles_agree(x64):
    """The mixture's textbook score is the gradient of its log-density, and its H the Hessian."""
    weights, means, variances = (jnp.asarray(a) for a in mixture())

    def log_density(x, sigma):
        total = variances + sigma**2
        logits = jnp.log(weights) - D / 2 * jnp.log(total)
        return jax.nn.logsumexp(logits - jnp.sum((x[None] - means) ** 2, 1) / total / 2)

    sigmas = np.geomspace(1e-3, 100, 8)
    for x, sigma in zip(noised(sigmas, np.float64), sigmas, strict=True):
        score, hessian = exact(x, sigma)
        x = jnp.asarray(x)
        np.testing.assert_allclose(jax.grad(log_density)(x, sigma), score, rtol=1e-9)
        scale = np.abs(hessian).max()
        np.testing.assert_allclose(
            jax.hessian(log_density)(x, sigma), hessian, rtol=1e-9, atol=1e-9 * scale
        )


class Recorder:
    """A network that keeps what it was called with, and returns what it is told to."""

    def __init__(self, output=None):
        self.calls, self.output = [], output

    def __call__(self, x, time, condition):
        self.calls.append((x, time, condition))
        return jnp.zeros_like(x) if self.output is None else self.output


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "denoiser"])
def test_the_network_is_called_once_in_its_own_coordinates(prediction):
    network = Recorder()
    schedule = FlowMatching(time_scale=1000.0)
    score = from_prediction(network, prediction=prediction, schedule=schedule)
    score(jnp.full(3, 8.0), 3.0, jnp.int32(5))
    ((x_t, time, condition),) = network.calls
    assert x_t.tolist() == [2.0, 2.0, 2.0]  # t = 3/4: alpha = 1/4
    assert float(time) == 750.0
    assert time.shape == ()
    assert condition == 5


def test_signs_and_scales_by_hand():
    """x0 = 1 and n = 2 at sigma = 3: x = 7, whatever is predicted the score is -2/3."""
    x, schedule = jnp.array([7.0]), FlowMatching()
    alpha, sigma_t = 0.25, 0.75
    outputs = {
        "epsilon": 2.0,
        "v_prediction": alpha * 2.0 - sigma_t * 1.0,
        "sample": 1.0,
        "denoiser": 1.0,
        "flow": 2.0 - 1.0,
        "score": -2.0 / sigma_t,
    }
    for prediction, output in outputs.items():
        network = Recorder(jnp.array([output]))
        score = from_prediction(network, prediction=prediction, schedule=schedule)
        assert float(score(x, 3.0)[0]) == pytest.approx(-2 / 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.float64])
def test_the_score_has_the_dtype_of_x(dtype, x64):
    """Whether sigma is a number or an array of any precision, and whatever the network returns."""
    x = jnp.ones((2, 3), dtype)
    network = Recorder(jnp.ones((2, 3), jnp.bfloat16))
    for schedule in SCHEDULES.values():
        score = from_prediction(network, prediction="v_prediction", schedule=schedule)
        for sigma in (1, 0.5, jnp.float32(0.5), jnp.float64(0.5)):
            assert score(x, sigma).dtype == dtype
            assert score(x, sigma).shape == (2, 3)
    assert all(call[0].dtype == call[1].dtype == dtype for call in network.calls)


def test_transformations_agree(x64):
    score = exact_score("v_prediction", SCHEDULES["cosine"])
    sigmas = jnp.geomspace(0.01, 100, 5)
    xs = jnp.asarray(noised(np.asarray(sigmas), np.float64))
    eager = jnp.stack([score(x, sigma) for x, sigma in zip(xs, sigmas, strict=True)])
    batched = jax.jit(lambda score, *args: jax.vmap(score)(*args))(score, xs, sigmas)
    np.testing.assert_allclose(batched, eager, rtol=1e-12, atol=1e-12)
    # In sigma: d score / d sigma, and its slope by central differences inside one step.
    x, sigma, h = xs[2], sigmas[2], 1e-6
    slope = jax.jacfwd(score, argnums=1)(x, sigma)
    np.testing.assert_allclose(
        slope, (score(x, sigma + h) - score(x, sigma - h)) / (2 * h), rtol=1e-5
    )
    np.testing.assert_allclose(jax.jacrev(score, argnums=1)(x, sigma), slope, rtol=1e-12)
    # In the weights: moving all means and x together moves nothing.
    gradient = jax.grad(lambda score: jnp.sum(score(x, sigma) ** 2))(score)
    by_x = jax.grad(lambda x: jnp.sum(score(x, sigma) ** 2))(x)
    np.testing.assert_allclose(gradient.network.arrays[1].sum(0), -by_x, rtol=1e-8)


def test_edm_preconditioning_is_table_1_of_the_paper(x64):
    raw = Recorder(jnp.array([1.0, -2.0]))
    network = EDMPreconditioned(raw, 0.5)
    x, sigma = jnp.array([3.0, 4.0]), 2.0
    d = network(x, sigma, jnp.int32(1))
    root = np.sqrt(2.0**2 + 0.5**2)
    expected = 0.25 / root**2 * x + 2.0 * 0.5 / root * raw.output
    np.testing.assert_allclose(d, expected, rtol=1e-14)
    np.testing.assert_allclose(network.noise(x, sigma), (x - d) / sigma, rtol=1e-14)
    np.testing.assert_allclose(raw.calls[0][0], x / root, rtol=1e-14)
    np.testing.assert_allclose(raw.calls[0][1], np.log(2.0) / 4, rtol=1e-14)
    assert raw.calls[0][2] == 1


def test_bad_input_gets_one_line():
    edm = VarianceExploding()
    with pytest.raises(InputError, match=r"prediction: expected one of epsilon, .*, got 'noise'"):
        from_prediction(Recorder(), prediction="noise", schedule=edm)
    score = from_prediction(Recorder(jnp.ones(3)), prediction="flow", schedule=edm)
    with pytest.raises(InputError, match=r"network: .* \(2,\), got \(3,\)"):
        score(jnp.ones(2), 0.5)
    with pytest.raises(InputError, match=r"network: .* \(2,\), got \(3,\)"):
        EDMPreconditioned(Recorder(jnp.ones(3)), 0.5)(jnp.ones(2), 0.5)
    for data_std in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="data_std: expected a positive number"):
            EDMPreconditioned(Recorder(), data_std)
