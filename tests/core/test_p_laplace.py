"""The p-Laplacian of three numbers: formula, limits at zero score, gradients there."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax._core.p_laplace import p_laplacian_from_parts


def gaussian_parts(x, variance):
    """s . s, tr H and s^T H s of log N(0, variance I)."""
    score = -x / variance
    q = jnp.sum(score**2)
    return q, jnp.asarray(-x.size / variance, x.dtype), -q / variance


@pytest.mark.parametrize("p", [1, 1.25, 2, 3, 4.5])
def test_isotropic_gaussian(x64, p):
    x, v, d = jnp.array([0.3, -1.2, 0.4, 2.0]), 0.7, 4
    value = p_laplacian_from_parts(*gaussian_parts(x, v), p)
    r = float(jnp.linalg.norm(x))
    np.testing.assert_allclose(value, -(d + p - 2) * r ** (p - 2) / v ** (p - 1), rtol=1e-13)
    normalized = p_laplacian_from_parts(*gaussian_parts(x, v), p, normalized=True)
    np.testing.assert_allclose(normalized, -(d + p - 2) / (p * v), rtol=1e-13)


def test_infinity_is_the_limit_of_the_normalized_family(x64):
    parts = jnp.array(0.4), jnp.array(-3.0), jnp.array(0.25)
    far = p_laplacian_from_parts(*parts, 1e9, normalized=True)
    at_infinity = p_laplacian_from_parts(*parts, math.inf, normalized=True)
    np.testing.assert_allclose(at_infinity, 0.25 / 0.4, rtol=1e-14)
    np.testing.assert_allclose(far, at_infinity, rtol=1e-7)
    assert float(p_laplacian_from_parts(*parts, math.inf)) == 0.25


@pytest.mark.parametrize(
    ("p", "normalized", "expected"),
    [
        (1, False, math.nan),
        (1.5, False, math.nan),
        (2, False, -3.0),
        (2.5, False, 0.0),
        (4, False, 0.0),
        (math.inf, False, 0.0),
        (1, True, math.nan),
        (2, True, -1.5),
        (3, True, math.nan),
        (math.inf, True, math.nan),
    ],
)
def test_zero_score(p, normalized, expected):
    zero = jnp.zeros(())
    value = p_laplacian_from_parts(zero, zero - 3, zero, p, normalized=normalized)
    np.testing.assert_equal(float(value), expected)


@pytest.mark.parametrize("p", [1, 2.5, 3, math.inf])
def test_nan_is_not_taken_for_zero(p):
    nan = jnp.asarray(jnp.nan)
    assert jnp.isnan(p_laplacian_from_parts(nan, nan, nan, p))


@pytest.mark.parametrize("p", [2, 3, 4, math.inf])
def test_gradient_at_a_zero_of_the_score_is_finite(p):
    gradient = jax.grad(lambda x: p_laplacian_from_parts(*gaussian_parts(x, 0.5), p))(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("p", [0.99, 0, -1, -math.inf, math.nan])
def test_p_out_of_range(p):
    one = jnp.ones(())
    with pytest.raises(InputError, match=r"p: expected a number in \[1, infinity\]"):
        p_laplacian_from_parts(one, one, one, p)
