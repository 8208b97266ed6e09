"""Wrong scores are named, good ones raise no alarm: from samples and the function alone."""

import inspect
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import custom_vmap

from memjax._core.errors import InputError
from memjax.densities.conditional import ConditionalMixture
from memjax.densities.empirical import Empirical
from memjax.densities.gaussian import Gaussian
from memjax.densities.mixture import GaussianMixture
from memjax.diffusion.combine import classifier_guided, guided
from memjax.diffusion.conformance import CODES, check_score
from memjax.diffusion.model import Model


def array(values):
    """NumPy's numbers in the dtype the process runs with."""
    return jnp.asarray(values, jnp.zeros(()).dtype)


def mixture(d=8, k=3, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    means = scale * rng.standard_normal((k, d))
    variances = (0.4 * scale) ** 2 * (0.5 + rng.random((k, d)))
    return GaussianMixture(array(np.full(k, 1 / k)), array(means), array(variances))


def draw(density, n=128, seed=0):
    return density.sample(jax.random.key(seed), n, 0.0)


DENSITY = mixture()
SCORE = DENSITY.score
LABELLED = ConditionalMixture(
    array([0.5, 0.5]), array(np.random.default_rng(4).standard_normal((2, 8))), 0.2, [0, 1]
)


def labelled(n=128):
    labels = np.arange(n) // 3 % 2
    halves = [LABELLED.sample(jax.random.key(c), n, 0.0, c) for c in (0, 1)]
    x = np.where(labels[:, None] == 0, *halves)
    return array(x), jnp.asarray(labels)


# Wrong scores ----------------------------------------------------------------------------------

STATE = itertools.count()
NOISE = np.random.default_rng(0)


def vp(sigma):
    return 1 / jnp.sqrt(1 + jnp.asarray(sigma) ** 2)


def denoised(x, sigma):
    return x + sigma**2 * SCORE(x, sigma)


def velocity(x, sigma, condition=None):
    """v = alpha n - sigma_t x0 with the expected x0 and n."""
    x0 = denoised(x, sigma)
    return vp(sigma) * ((x - x0) / sigma - sigma * x0)


def dropped(x, sigma, condition=None):
    key = jax.random.key(next(STATE))
    return SCORE(x, sigma) * 2 * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)


def noisy(x, sigma, condition=None):
    return SCORE(x, sigma) * array(1 + 0.1 * NOISE.standard_normal(x.shape))


def counted(x, sigma, condition=None):
    """The counter is read once, when traced."""
    return SCORE(x, sigma) * (1.0 + (next(STATE) > -1 and isinstance(x, jax.core.Tracer)))


def branching(x, sigma, condition=None):
    return SCORE(x, sigma) if sigma > 0.5 else 1.0 * SCORE(x, sigma)


def with_numpy(x, sigma, condition=None):
    return array(-np.asarray(x) / (1 + np.square(sigma)))


def called_back(x, sigma, condition=None):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda y: y, like, SCORE(x, sigma), vmap_method="sequential")


@custom_vmap
def centred(x):
    return x


@centred.def_vmap
def _(axis_size, in_batched, x):
    return x - jnp.mean(x, axis=0, keepdims=True), True


def axis_named(x, sigma, condition=None):
    return SCORE(x - jax.lax.pmean(x, "batch"), sigma)


def clipped_derivative(x, sigma, condition=None):
    return (jax.lax.stop_gradient(denoised(x, sigma)) - x) / sigma**2


def rotated(x, sigma, condition=None):
    s = SCORE(x, sigma)
    return s + 0.8 * jnp.roll(s, 4) * array([1.0] * 4 + [-1.0] * 4)


def unit_at_zero(x, sigma, condition=None):
    return SCORE(x, sigma) * jnp.linalg.norm(x) / jnp.sqrt(jnp.sum(x**2))


def rooted(x, sigma, condition=None):
    return SCORE(x, sigma) + 1e-6 * jnp.sqrt(jnp.abs(x))


def underflowing(x, sigma, condition=None):
    """Posterior weights without logsumexp: 0/0 at small sigma."""
    deviations = DENSITY.means - x[None]
    variance = 0.16 + 0 * sigma + sigma**2
    weights = jnp.exp(-jnp.sum(deviations**2, 1) / (2 * variance * sigma**2))
    return (weights @ deviations) / jnp.sum(weights) / variance


def batched(x, sigma, condition=None):
    assert x.ndim == 2, "expected a batch"
    return jax.vmap(SCORE)(x, sigma)


def array_sigma(x, sigma, condition=None):
    return SCORE(x, sigma.astype(x.dtype))


WRONG = {
    "sign": ("sign", lambda x, s, c=None: -SCORE(x, s)),
    "noise instead of score": ("noise", lambda x, s, c=None: -s * SCORE(x, s)),
    "denoiser instead of score": ("denoiser", lambda x, s, c=None: denoised(x, s)),
    "v-prediction": ("velocity", velocity),
    "flow velocity": ("velocity", lambda x, s, c=None: -s * SCORE(x, s) - denoised(x, s)),
    "1/sigma missing": ("sigma_power", lambda x, s, c=None: s * SCORE(x, s)),
    "1/sigma^2 missing": ("sigma_power", lambda x, s, c=None: s**2 * SCORE(x, s)),
    "x minus denoiser": ("sigma_power", lambda x, s, c=None: x - denoised(x, s)),
    "1/sigma too many": ("sigma_power", lambda x, s, c=None: SCORE(x, s) / s),
    "1/sigma^2 too many": ("sigma_power", lambda x, s, c=None: SCORE(x, s) / s**2),
    "alpha missing": ("alpha", lambda x, s, c=None: SCORE(x, s) / vp(s)),
    "alpha too many": ("alpha", lambda x, s, c=None: SCORE(x, s) * vp(s)),
    "mean over coordinates": ("constant", lambda x, s, c=None: SCORE(x, s) / 8),
    "twice the score": ("constant", lambda x, s, c=None: 2 * SCORE(x, s)),
    "variance-preserving coordinates": (
        "coordinates",
        lambda x, s, c=None: SCORE(x / vp(s), s) / vp(s),
    ),
    "flow coordinates": (
        "coordinates",
        lambda x, s, c=None: SCORE(x * (1 + s), s) * (1 + s),
    ),
    "sigma is a variance": ("sigma_units", lambda x, s, c=None: SCORE(x, jnp.sqrt(s))),
    "sigma is a logarithm": ("sigma_units", lambda x, s, c=None: SCORE(x, jnp.exp(s))),
    "sigma counts pixel levels": ("sigma_units", lambda x, s, c=None: SCORE(x, s / 127.5)),
    "other data": ("not_the_score", lambda x, s, c=None: SCORE(x + 6, s)),
    "asymmetric": ("asymmetric", rotated),
    "flattened": ("shape", lambda x, s, c=None: SCORE(x, s)[None]),
    "a tuple": ("shape", lambda x, s, c=None: (SCORE(x, s), None)),
    "wants a batch": ("shape", batched),
    "half precision": ("dtype", lambda x, s, c=None: SCORE(x, s).astype(jnp.float16)),
    "two arguments": ("raises", lambda x, sigma: SCORE(x, sigma)),
    "sigma must be an array": ("raises", array_sigma),
    "dropout on": ("impure", dropped),
    "noise inside": ("impure", noisy),
    "another answer when traced": ("impure", counted),
    "python branch on sigma": ("not_traceable", branching),
    "numpy inside": ("not_traceable", with_numpy),
    "host callback": ("not_differentiable", called_back),
    "stop_gradient": ("not_differentiable", clipped_derivative),
    "batch statistics by axis name": ("batch_coupled", axis_named),
    "batch mean subtracted": ("batch_coupled", lambda x, s, c=None: SCORE(centred(x), s)),
    "NaN at x = 0": ("nonfinite", unit_at_zero),
    "NaN derivative at x = 0": ("nonfinite", rooted),
    "NaN at small sigma": ("nonfinite", underflowing),
    "ignores x": ("ignores_x", lambda x, s, c=None: jnp.ones_like(x) / s),
    "ignores sigma": ("ignores_sigma", lambda x, s, c=None: SCORE(x, 0.5)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_score_is_named(name):
    code, score = WRONG[name]
    report = check_score(score, draw(DENSITY))
    assert not report.ok
    assert report.codes == (code,), str(report)
    (finding,) = report.findings
    assert "\n" not in finding.message
    assert code in str(report)
    assert finding.message in str(report)


# Good scores -----------------------------------------------------------------------------------


class Scaled(eqx.Module):
    """The exact score with a smooth relative error."""

    density: GaussianMixture
    error: float

    def __call__(self, x, sigma, condition=None):
        wave = jnp.sin(3 * x + jnp.roll(x, 1) / jnp.asarray(sigma, x.dtype))
        return self.density.score(x, sigma) * (1 + self.error * wave)


class Skewed(eqx.Module):
    """The exact score with a Jacobian about 9 % asymmetric, as learned scores have."""

    density: GaussianMixture

    def __call__(self, x, sigma, condition=None):
        s = self.density.score(x, sigma)
        signs = jnp.where(jnp.arange(x.size) < x.size // 2, 1.0, -1.0).astype(x.dtype)
        return s + 0.09 * jnp.roll(s, x.size // 2) * signs


class Denoiser(eqx.Module):
    """A small MLP in EDM preconditioning."""

    layers: list

    def __init__(self, d, width, key):
        sizes = ((d + 1, width), (width, width), (width, d))
        keys = jax.random.split(key, 3)
        self.layers = [
            jax.random.normal(k, size) / size[0] ** 0.5 for k, size in zip(keys, sizes, strict=True)
        ]

    def __call__(self, x, sigma, condition=None):
        sigma = jnp.asarray(sigma, x.dtype)
        total = jnp.sqrt(1 + sigma**2)
        h = jnp.append(x / total, jnp.log(sigma) / 4)
        for w in self.layers[:-1]:
            h = jax.nn.silu(h @ w)
        denoised = x / total**2 + sigma / total * (h @ self.layers[-1])
        return (denoised - x) / sigma**2


def trained(x, steps, width=64):
    """Adam on the denoising loss; few steps make a poor score, but no wrong one."""

    def loss(model, key):
        keys = jax.random.split(key, 3)
        x0 = x[jax.random.randint(keys[0], (128,), 0, len(x))]
        sigma = jnp.exp(1.3 * jax.random.normal(keys[1], (128,), x.dtype) - 0.5)
        noise = jax.random.normal(keys[2], x0.shape, x.dtype)
        s = jax.vmap(model)(x0 + sigma[:, None] * noise, sigma)
        weight = (1 + sigma**2)[:, None]  # EDM's weight, in terms of the score
        return jnp.mean(weight * (sigma[:, None] * s + noise) ** 2)

    def step(carry, key):
        model, m, v, i = carry
        g = jax.grad(loss)(model, key)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, v, g)
        correct = jnp.sqrt(1 - 0.99**i) / (1 - 0.9**i)
        model = jax.tree.map(
            lambda p, m, v: p - 2e-3 * correct * m / (jnp.sqrt(v) + 1e-8), model, m, v
        )
        return (model, m, v, i + 1), None

    model = Denoiser(x.shape[1], width, jax.random.key(1))
    zeros = jax.tree.map(jnp.zeros_like, model)
    keys = jax.random.split(jax.random.key(2), steps)
    (model, *_), _ = jax.jit(
        lambda model, zeros: jax.lax.scan(step, (model, zeros, zeros, array(1.0)), keys)
    )(model, zeros)
    return model


def gaussian(d, scale=1.0, mean=0.0, seed=0):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((d, d)) * scale / d**0.5
    return Gaussian(
        array(np.full(d, mean * scale)), array(factor @ factor.T + 0.01 * scale**2 * np.eye(d))
    )


def exact(density, n=128):
    return density, draw(density, n), {}


def good_empirical(shape, n=48):
    points = array(np.random.default_rng(5).uniform(-1, 1, (n, *shape)))
    return Empirical(points), points, {}


def good_labelled(make):
    x, labels = labelled()
    return make(LABELLED), x, {"conditions": labels}


def good_model():
    model = Model(DENSITY, (8,), sigma_min=0.002, sigma_max=80.0, data_std=1.0)
    return model, draw(DENSITY), {}


def classifier(x, sigma, condition):
    """Log-posterior of one class of the labelled mixture, by Bayes' rule."""
    joint = LABELLED.log_prob(x, sigma, condition)
    return joint - LABELLED.log_prob(x, sigma)


GOOD = {
    "Gaussian, d = 1": lambda: exact(gaussian(1, mean=2.0)),
    "Gaussian, d = 2": lambda: exact(gaussian(2)),
    "Gaussian, d = 64, ill conditioned": lambda: exact(gaussian(64)),
    "Gaussian, 24 samples": lambda: exact(gaussian(8), 24),
    "Gaussian, scale 0.01": lambda: exact(gaussian(8, scale=0.01)),
    "Gaussian, scale 100": lambda: exact(gaussian(8, scale=100.0)),
    "Gaussian, far from zero": lambda: exact(gaussian(8, mean=20.0)),
    "Gaussian on a line": lambda: exact(
        Gaussian(array(np.zeros(6)), array([1.0, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6]))
    ),
    "mixture, d = 1": lambda: exact(mixture(1), 256),
    "mixture, d = 2": lambda: exact(mixture(2, 5)),
    "mixture, d = 8": lambda: exact(DENSITY),
    "mixture, d = 32, scale 30": lambda: exact(mixture(32, 4, scale=30.0)),
    "mixture with a stored point": lambda: exact(
        GaussianMixture(array([0.8, 0.2]), array([[0.0] * 5, [1.0] * 5]), array([1.0, 0.0]))
    ),
    "training set, images": lambda: good_empirical((4, 4, 2)),
    "training set, 16 points": lambda: good_empirical((3,), 16),
    "conditional": lambda: good_labelled(lambda s: s),
    "guided, weight 2": lambda: good_labelled(lambda s: guided(s, 2.0)),
    "guided, weight 0.5": lambda: good_labelled(lambda s: guided(s, 0.5)),
    "classifier guided": lambda: good_labelled(lambda s: classifier_guided(s, classifier, 1.0)),
    "5 % smooth error": lambda: (Scaled(DENSITY, 0.05), draw(DENSITY), {}),
    "20 % smooth error": lambda: (Scaled(DENSITY, 0.2), draw(DENSITY), {}),
    "9 % asymmetric": lambda: (Skewed(DENSITY), draw(DENSITY), {}),
    "a Model": good_model,
    "trained network": lambda: (trained(draw(DENSITY, 1024), 3000), draw(DENSITY), {}),
    "barely trained network": lambda: (trained(draw(DENSITY, 1024), 300), draw(DENSITY), {}),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_score_raises_no_alarm(name):
    score, x, arguments = GOOD[name]()
    report = check_score(score, x, **arguments)
    assert report.ok, str(report)


# The report ------------------------------------------------------------------------------------


def test_every_code_is_exercised_and_documented():
    used = {code for code, _ in WRONG.values()} | {"ignores_condition"}
    assert used == set(CODES)


def test_condition_that_is_ignored_is_named():
    x, labels = labelled()
    report = check_score(lambda x, s, c=None: LABELLED.score(x, s), x, conditions=labels)
    assert report.codes == ("ignores_condition",), str(report)


def test_equal_conditions_cannot_be_ignored():
    x = LABELLED.sample(jax.random.key(0), 64, 0.0, 1)
    report = check_score(LABELLED.score, x, conditions=jnp.ones(64, int))
    assert report.ok, str(report)


def test_two_faults_are_both_named():
    report = check_score(lambda x, s, c=None: -s * unit_at_zero(x, s), draw(DENSITY))
    assert report.codes == ("nonfinite", "noise"), str(report)


def test_network_taken_raw_in_its_own_coordinates():
    """The commonest mistake: predicted noise at x_t, called as if it were a score at x."""
    report = check_score(lambda x, s, c=None: -s * SCORE(x / vp(s), s), draw(DENSITY))
    assert report.codes == ("coordinates", "noise"), str(report)


def test_double_precision(x64):
    x = draw(mixture())
    assert x.dtype == jnp.float64
    score = mixture().score
    assert check_score(score, x).ok
    assert check_score(lambda x, s, c=None: -score(x, s), x).codes == ("sign",)
    report = check_score(lambda x, s, c=None: score(x, s).astype(jnp.float32), x)
    assert report.codes == ("dtype",)


def test_numpy_samples_are_welcome():
    x = np.asarray(draw(DENSITY))
    assert check_score(DENSITY, x) == check_score(DENSITY, jnp.asarray(x))


def test_measurements_are_the_exact_ones():
    """For N(0, 1) in eight dimensions every measured number has a closed form."""
    x = array(np.random.default_rng(0).standard_normal((512, 8)))
    measured = check_score(lambda x, s, c=None: -2 * x / (1 + s**2), x).measurements
    sigma = np.asarray(measured.sigma)
    best = 1 / (1 + sigma**2)  # E |n + sigma s|^2 / d of the exact score
    gain = sigma**2 / (1 + sigma**2)
    # Four standard errors of a ratio of mean squares of 512 samples.
    np.testing.assert_allclose(measured.scale, 0.5, rtol=0.12)
    np.testing.assert_allclose(measured.attainable_loss, best, atol=0.03)
    np.testing.assert_allclose(measured.denoising_loss, best + gain, rtol=0.1)
    np.testing.assert_allclose(measured.asymmetry, 0, atol=1e-6)
    np.testing.assert_allclose(measured.derivative_error, 0, atol=1e-3)


def test_measured_asymmetry_is_that_of_the_dense_jacobian(x64):
    a = np.random.default_rng(0).standard_normal((6, 6))
    a = -np.eye(6) + 0.2 * (a - a.T)
    x = array(np.random.default_rng(1).standard_normal((64, 6)))
    matrix = jnp.asarray(a)
    report = check_score(lambda x, s, c=None: matrix @ x / (1 + s**2), x)
    expected = np.linalg.norm(a - a.T) / (2 * np.linalg.norm(a))
    np.testing.assert_allclose(report.measurements.asymmetry, expected, rtol=0.25)


def test_same_key_same_report():
    x = draw(DENSITY)
    first, second, other = (check_score(DENSITY, x, key=key) for key in (3, 3, 4))
    assert first == second
    assert first.measurements.scale != other.measurements.scale


def test_levels_stay_in_the_range():
    report = check_score(DENSITY, draw(DENSITY), sigma_range=(0.5, 2.0))
    assert report.ok
    np.testing.assert_allclose(
        (report.measurements.sigma[0], report.measurements.sigma[-1]), (0.5, 2.0)
    )


def test_printed_report_reads_as_a_table():
    x = draw(DENSITY)
    good, wrong = check_score(DENSITY, x), check_score(WRONG["sign"][1], x)
    assert str(good).splitlines()[-1] == "ok: nothing wrong was found"
    assert str(wrong).startswith("sign: the sign is flipped")
    header, *rows = [line.split() for line in str(good).splitlines()[:-1]]
    assert header == list(good.measurements._fields)
    assert [float(row[0]) for row in rows] == pytest.approx(good.measurements.sigma, rel=1e-3)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (np.zeros((20, 3), np.int32), {}, "x: expected a floating-point array, got dtype int32"),
        (np.ones((3, 3), np.float32), {}, "x: expected at least 16 samples .*, got 3"),
        (np.ones((20, 3), np.float32), {}, "x: expected finite samples that differ"),
        (np.full((20, 3), np.nan, np.float32), {}, "x: expected finite samples that differ"),
        (np.eye(20, dtype=np.float32), {"sigma_range": (1.0, 0.1)}, "sigma_range: expected 0 <"),
        (
            np.eye(20, dtype=np.float32),
            {"conditions": np.zeros(3)},
            "conditions: expected arrays with leading axis 20",
        ),
    ],
)
def test_unusable_arguments_are_refused(x, arguments, message):
    with pytest.raises(InputError, match=message):
        inspect.unwrap(check_score)(DENSITY, x, **arguments)
