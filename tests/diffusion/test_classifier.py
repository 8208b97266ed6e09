"""log p(y | x, sigma): the formula, Bayes' rule to machine precision, and what is refused."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.densities.gaussian import Gaussian
from memjax.densities.mixture import GaussianMixture
from memjax.diffusion.classifier import NoisyClassifier
from memjax.diffusion.combine import classifier_guided

SIGMAS = [0.1, 1.0, 10.0]
D = 0.7


class Affine(eqx.Module):
    """Logits that tell what the network was shown: (sum of x, t, 0)."""

    weight: jax.Array

    def __call__(self, x, t):
        return jnp.stack([self.weight.astype(x.dtype) * x.sum(), t, jnp.zeros_like(t)])


def classifier(**options):
    settings = {"num_classes": 3, "data_std": D, "sigmas": SIGMAS, **options}
    return NoisyClassifier(Affine(jnp.float32(1)), (2,), **settings)


def logits(x, sigma, t, temperature=1.0):
    z = np.array([x.sum() / np.sqrt(sigma**2 + D**2), t, 0]) / temperature
    return z - np.log(np.exp(z).sum())


@pytest.mark.parametrize(
    ("sigma", "t", "temperature"),
    [
        (0.1, np.log(0.1) / 4, 2.0),
        (1.0, 0.0, 1.0),
        (10.0, np.log(10) / 4, 8.0),
        (10**0.5, np.log(10) / 8, 8**0.5),  # halfway in log sigma: geometric means
        (0.0, np.log(0.1) / 4, 2.0),  # as at the smallest level
        (50.0, np.log(10) / 4, 8.0),  # as at the largest, but for the scale of x
    ],
)
def test_log_probs_are_the_formula(sigma, t, temperature):
    x = jnp.array([0.4, -1.1], jnp.float32)
    found = classifier(temperature=[2.0, 1.0, 8.0]).log_probs(x, sigma)
    expected = logits(np.asarray(x), sigma, t, temperature)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_without_time_the_network_is_shown_zero():
    timeless = classifier(time_dependent=False)
    x = jnp.array([0.4, -1.1], jnp.float32)
    for sigma in (0.0, 0.3, 4.0):
        found = timeless.log_probs(x, sigma)
        np.testing.assert_allclose(found, logits(np.asarray(x), sigma, 0.0), rtol=2e-6)


def test_a_class_is_picked_and_others_are_not_a_number():
    model, x = classifier(), jnp.array([0.4, -1.1], jnp.float32)
    every = model.log_probs(x, 0.3)
    f = jax.jit(lambda model, x, c: model(x, jnp.float32(0.3), c))
    found = jax.vmap(lambda c: f(model, x, c))(jnp.array([2, 0, -1, 3], jnp.int32))
    np.testing.assert_allclose(found[:2], every[jnp.array([2, 0])], rtol=1e-6)
    assert np.isnan(found[2:]).all()
    np.testing.assert_allclose(model(x, 0.3, 1), every[1], rtol=1e-6)


def test_weights_levels_and_temperatures_are_leaves():
    model = classifier()
    assert [leaf.shape for leaf in jax.tree.leaves(model)] == [(), (3,), (3,)]
    other = model.with_temperature(np.array([3.0, 2.0, 1.0]))
    assert jax.tree.structure(other) == jax.tree.structure(model)
    f = jax.jit(lambda model, x: model.log_probs(x, 0.3))
    x = jnp.ones(2, jnp.float32)
    assert np.abs(f(model, x) - f(other, x)).max() > 0.1
    assert f._cache_size() == 1
    # An ensemble: leaves with an axis more, mapped.
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), model, other)
    both = jax.vmap(lambda model: model.log_probs(x, 0.3))(pair)
    np.testing.assert_allclose(both, [f(model, x), f(other, x)], rtol=1e-6)


class Posterior(eqx.Module):
    """The true logits of a mixture's components, in the coordinates that a network is shown."""

    means: jax.Array
    variance: jax.Array

    def __call__(self, x, t):
        sigma = jnp.exp(4 * t)
        x = x * jnp.sqrt(sigma**2 + D**2)
        v = self.variance + sigma**2
        return -((x[None] - self.means) ** 2).sum(axis=1) / (2 * v) - jnp.log(v)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 5.0])
def test_guidance_of_weight_one_is_bayes_rule(sigma, x64):
    """The marginal score becomes the component's, to machine precision."""
    means, variance = jnp.array([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]]), jnp.array([0.3, 0.2, 0.1])
    density = GaussianMixture([1 / 3] * 3, means, variance)
    model = NoisyClassifier(
        Posterior(means, variance), (2,), num_classes=3, data_std=D, sigmas=[0.01, 100.0]
    )

    def score(x, sigma, condition=None):
        return density.score(x, sigma)

    field = classifier_guided(score, model, 1.0)
    guided = jax.jit(lambda *args: field(*args))
    for x in (jnp.array([0.3, -0.8]), jnp.array([-2.0, 1.0])):
        for c in range(3):
            component = Gaussian(means[c], variance[c] * jnp.eye(2))
            expected = component.score(x, sigma)
            found = guided(x, jnp.float64(sigma), jnp.int32(c))
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.0, 0.4, 3.0])
def test_gradient_of_two_gaussians(sigma, x64):
    """grad log p(+ | x) = (2 m/v)(1 - sigmoid(2 m.x/v)), v = variance + sigma^2."""
    m = jnp.array([0.6, -0.2])
    network = Posterior(jnp.stack([-m, m]), jnp.full(2, 0.3))
    model = NoisyClassifier(network, (2,), num_classes=2, data_std=D, sigmas=[1e-9, 10.0])
    x = jnp.array([0.5, 0.9])
    found = jax.jit(jax.grad(lambda x: model(x, sigma, 1)))(x)
    v = 0.3 + sigma**2
    expected = 2 * m / v * (1 - jax.nn.sigmoid(2 * m @ x / v))
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes: expected a whole number at least 1, got 0"),
        ({"data_std": 0.0}, "data_std: expected a positive"),
        ({"sigmas": []}, "sigmas: expected [m] with m >= 1, got [0]"),
        ({"sigmas": 1.0}, "sigmas: expected [m] with m >= 1, got []"),
        ({"sigmas": [1.0, 0.5]}, "sigmas: expected positive numbers, ascending"),
        ({"sigmas": [0.0, 0.5]}, "sigmas: expected positive numbers, ascending"),
        ({"temperature": [1.0]}, "temperature: expected one per noise level, [3], got [1]"),
        ({"temperature": [1.0, 0.0, 1.0]}, "temperature: expected positive numbers"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        classifier(**options)


def test_samples_and_networks_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"x: expected shape \(2,\), got \(3,\)"):
        classifier().log_probs(jnp.zeros(3, jnp.float32), 1.0)
    with pytest.raises(InputError, match=r"network: expected logits of shape \[4\], got \[3\]"):
        classifier(num_classes=4).log_probs(jnp.zeros(2, jnp.float32), 1.0)
