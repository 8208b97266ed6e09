"""Conditional mixtures: Bayes' rule as an identity of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.densities import ConditionalMixture, GaussianMixture

WEIGHTS, LABELS = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 1, 0, 2])
SIGMA = 0.5


def build():
    rng = np.random.default_rng(4)
    variances = rng.uniform(0.1, 1, (4, 3))
    density = ConditionalMixture(WEIGHTS, jnp.asarray(rng.normal(size=(4, 3))), variances, LABELS)
    return density, variances, jnp.asarray(rng.normal(size=3))


def class_log_prior(label):
    return np.log(WEIGHTS[label == LABELS].sum())


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_class_is_the_mixture_of_its_components(x64, label):
    density, variances, x = build()
    kept = label == LABELS
    weights = WEIGHTS[kept] / WEIGHTS[kept].sum()
    alone = GaussianMixture(weights, density.means[kept], variances[kept])
    for quantity in ("log_prob", "score", "hessian", "laplacian", "effective_dimension"):
        actual = getattr(density, quantity)(x, SIGMA, label)
        expected = getattr(alone, quantity)(x, SIGMA)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    actual, expected = density.p_laplacian(x, SIGMA, 1, label), alone.p_laplacian(x, SIGMA, 1)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    for actual, expected in zip(
        density.posterior(x, SIGMA, label), alone.posterior(x, SIGMA), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_bayes_rule(x64, label):
    density, _, x = build()
    classifier = density.log_class_prob(x, SIGMA, label)
    change = density.log_prob(x, SIGMA, label) - density.log_prob(x, SIGMA)
    np.testing.assert_allclose(classifier, change + class_log_prior(label), rtol=1e-12)
    gap = density.score(x, SIGMA, label) - density.score(x, SIGMA)
    gradient = jax.grad(density.log_class_prob)(x, SIGMA, label)
    np.testing.assert_allclose(gap, gradient, rtol=1e-11)


def test_fisher_identity(x64):
    density, _, x = build()
    probabilities = [float(jnp.exp(density.log_class_prob(x, SIGMA, c))) for c in range(3)]
    np.testing.assert_allclose(sum(probabilities), 1, rtol=1e-13)
    scores = np.stack([density.score(x, SIGMA, c) for c in range(3)])
    np.testing.assert_allclose(probabilities @ scores, density.score(x, SIGMA), rtol=1e-12)


def test_null_condition_is_the_marginal(x64):
    density, variances, x = build()
    marginal = GaussianMixture(WEIGHTS, density.means, variances)
    expected = marginal.score(x, SIGMA)
    for null in (None, -1, density.null_condition):
        np.testing.assert_allclose(density.score(x, SIGMA, null), expected, rtol=1e-14)
    assert float(density.log_class_prob(x, SIGMA, None)) == 0


def test_branches_stack_under_vmap(x64):
    density, _, x = build()
    labels = jnp.array([-1, 0, 1, 2, 9])
    scores = jax.jit(lambda d, x: jax.vmap(lambda c: d.score(x, SIGMA, c))(labels))(density, x)
    expected = [density.score(x, SIGMA, c) for c in (None, 0, 1, 2)]
    np.testing.assert_allclose(scores[:4], jnp.stack(expected), rtol=1e-12)
    assert jnp.isnan(scores[4]).all()  # a traced label that no component carries


def test_samples_come_from_the_class():
    density, _, _ = build()
    draws = density.sample(jax.random.key(0), 500, 0.0, 1)
    deviation = np.asarray(draws - density.means[1][None])
    standard_error = deviation.std(axis=0) / 500**0.5
    assert (np.abs(deviation.mean(axis=0)) < 4.5 * standard_error).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 0], "labels: expected 4 integers, got int"),
        ([0.0, 1.0, 0.0, 2.0], "labels: expected 4 integers, got float"),
        ([0, 1, -1, 2], "labels: expected integers >= 0, got -1"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(InputError, match=message):
        ConditionalMixture(WEIGHTS, np.zeros((4, 3)), 1.0, labels)


def test_bad_conditions():
    density, _, x = build()
    with pytest.raises(InputError, match="condition: expected one of the labels 0, 1, 2, got 5"):
        density.score(x, SIGMA, 5)
    with pytest.raises(InputError, match="condition: expected one of the labels 0, 1, 2, got 3"):
        density.log_class_prob(x, SIGMA, jnp.int32(3))
