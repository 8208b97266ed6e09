"""Differences of memorization divergences against closed-form likelihoods."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.extract import divergence_difference

SIGMA, HIGH = 0.005, 60.0


def pair():
    means = jnp.array([[-1.0, 0.5], [1.0, 0.0]])
    return mj.ConditionalMixture([0.7, 0.3], means, jnp.array([0.2, 0.4]), [0, 1])


def test_conditioning_brings_the_model_closer(x64):
    """Per image log p(x | c) / p(x), which for images of the cluster is positive on average."""
    images = math.sqrt(0.4) * jax.random.normal(jax.random.key(0), (32, 2)) + jnp.array(
        [[1.0, 0.0]]
    )
    density = pair()
    found = divergence_difference(
        density,
        density,
        images,
        SIGMA,
        HIGH,
        key=0,
        conditions=jnp.ones(32, jnp.int32),
        divergence="exact",
        num_steps=150,
    )

    def exact(x):
        return density.log_prob(x, SIGMA, 1) - density.log_prob(x, SIGMA)

    ratio = np.asarray(jax.vmap(exact)(images))
    # The noise of q moves a point by sigma, and the ratio by sigma times its slope.
    np.testing.assert_allclose(found.log_ratio, ratio, atol=0.1)
    np.testing.assert_allclose(found.value, -ratio.mean(), atol=0.02)
    assert found.value < 0
    assert found.low < found.value < found.high
    assert set(found.status.tolist()) == {Status.OK}


def test_gaussians_in_closed_form(x64):
    """E_q [log p_ref - log p] for q = N(0, s^2), p = N(0, v + s^2): the mean over many draws."""
    sigma, d, narrow, wide = 0.5, 4, 0.1, 1.0
    scores = [mj.Gaussian(jnp.zeros(d), jnp.full(d, v)) for v in (narrow, wide)]
    found = divergence_difference(
        *scores, jnp.zeros((400, d)), sigma, HIGH, key=2, num_products=2, num_steps=100
    )
    a, b = narrow + sigma**2, wide + sigma**2
    exact = d / 2 * (math.log(a / b) + sigma**2 * (1 / a - 1 / b))
    assert found.low < exact < found.high
    assert found.high - found.low < 0.2
    swapped = divergence_difference(
        *scores[::-1], jnp.zeros((400, d)), sigma, HIGH, key=2, num_products=2, num_steps=100
    )
    np.testing.assert_allclose(swapped.value, -found.value, rtol=1e-9)


def test_a_model_against_itself_is_zero():
    found = divergence_difference(pair(), pair(), jnp.zeros((5, 2)), 0.1, 20.0, key=0)
    assert found.value == 0
    assert found.log_ratio.tolist() == [0.0] * 5


def test_a_bad_image_is_left_out_and_changes_no_other():
    images = jax.random.normal(jax.random.key(2), (6, 2))
    other = mj.Gaussian(jnp.zeros(2), jnp.ones(2))
    whole = divergence_difference(pair(), other, images, 0.1, 20.0, key=0)
    broken = divergence_difference(pair(), other, images.at[3].set(jnp.nan), 0.1, 20.0, key=0)
    keep = np.arange(6) != 3
    np.testing.assert_array_equal(broken.log_ratio[keep], whole.log_ratio[keep])
    assert broken.status[3] == Status.NONFINITE
    np.testing.assert_allclose(broken.value, -whole.log_ratio[keep].mean(), rtol=1e-6)
    alone = divergence_difference(pair(), other, images[:1], 0.1, 20.0, key=0)
    assert (alone.low, alone.high) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "hutchpp"}, "divergence: expected 'hutchinson' or 'exact'"),
        ({"confidence": 1.0}, "confidence: expected a number between 0 and 1"),
        ({"conditions": jnp.zeros(3, jnp.int32)}, "conditions: expected 5 rows"),
    ],
)
def test_refused(change, message):
    with pytest.raises(InputError, match=message):
        divergence_difference(pair(), pair(), jnp.zeros((5, 2)), 0.1, 20.0, key=0, **change)
