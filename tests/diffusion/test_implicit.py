"""The implicit classifier: that of a mixture is its exact one, in every derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj
from memjax._core.errors import InputError
from memjax.densities import ConditionalMixture, GaussianMixture
from memjax.diffusion.implicit import implicit_classifier

MEANS = jnp.array([[1.0, 0.0], [-1.0, 0.5], [0.2, -1.5]])


@pytest.fixture(scope="module")
def mixture():
    return ConditionalMixture([0.5, 0.3, 0.2], MEANS, 0.3, [0, 1, 1])


def test_gradient_and_hessian_are_those_of_the_posterior(mixture):
    classifier = implicit_classifier(mixture.score)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)), MEANS.dtype)

    def derivatives(f, x, c):
        slope = jax.grad(lambda x: f(x, 0.4, c))
        return slope(x), jax.jacfwd(slope)(x), jax.jacrev(slope)(x)

    def both(x, c):
        return derivatives(classifier, x, c), derivatives(mixture.log_class_prob, x, c)

    found, exact = jax.jit(jax.vmap(both))(x, jnp.arange(8, dtype=jnp.int32) % 2)
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_another_score_guided_by_it(mixture):
    """A mixture of other weights and the same components, guided to one of them: its score."""
    other = GaussianMixture([0.1, 0.9], MEANS[:2], 0.3)
    pair = ConditionalMixture([0.1, 0.9], MEANS[:2], 0.3, [0, 1])
    guided = mj.classifier_guided(other.score, implicit_classifier(pair), 1.0, window=(0.1, 5.0))
    x = jnp.array([0.3, 0.1])
    component = mj.Gaussian(MEANS[1], 0.3)
    found = guided(x, 0.4, jnp.int32(1))
    np.testing.assert_allclose(found, component.score(x, 0.4), atol=1e-5)
    outside = guided(x, 0.05, jnp.int32(1))
    np.testing.assert_array_equal(outside, other.score(x, 0.05))


def test_no_condition_is_refused(mixture):
    with pytest.raises(InputError, match="condition: expected a condition, got None"):
        jax.grad(implicit_classifier(mixture.score))(jnp.zeros(2), 0.5, None)
