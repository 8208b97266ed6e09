"""Probes: their moments, their geometry, and the variance laws they are chosen by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.linalg.probes import gaussian, orthonormal, rademacher, sphere

PROBES = [rademacher, gaussian, sphere, orthonormal]
D = 6
KEYS = 40_000


@functools.cache
def many(probes, num=2):
    """[KEYS, num, D] probes in float64, one program for each distribution."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(7), KEYS)
        draw = jax.jit(jax.vmap(lambda key: probes(key, num, jnp.zeros(D))))
        return np.asarray(draw(keys))


def within(sample, expected, sigmas=4.5):
    """Mean of independent rows against its expectation, entry by entry."""
    error = np.std(sample, axis=0) / np.sqrt(len(sample))
    assert np.all(np.abs(np.mean(sample, axis=0) - expected) <= sigmas * error + 1e-12)


@pytest.mark.parametrize("probes", PROBES)
def test_second_moment_is_the_identity(probes):
    v = many(probes)
    for j in range(2):
        within(v[:, j], np.zeros(D))
        within(v[:, j, :, None] * v[:, j, None, :], np.eye(D))


@pytest.mark.parametrize("probes", [rademacher, gaussian, sphere])
def test_probes_of_one_key_are_independent(probes):
    v = many(probes)
    within(v[:, 0, :, None] * v[:, 1, None, :], np.zeros((D, D)))
    a, b = v[:, 0] ** 2, v[:, 1] ** 2
    within(a[:, :, None] * b[:, None, :], np.ones((D, D)))


def variance_laws(a):
    sym = (a + a.T) / 2
    frobenius, trace, d = np.sum(sym**2), np.trace(a), len(a)
    uniform = 2 * d / (d + 2) * (frobenius - trace**2 / d)
    return {
        rademacher: 2 * (frobenius - np.sum(np.diag(a) ** 2)),
        gaussian: 2 * frobenius,
        sphere: uniform,
        orthonormal: uniform,
    }


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("name", ["identity", "diagonal", "random"])
def test_variance_law(probes, name):
    a = {
        "identity": 3 * np.eye(D),
        "diagonal": np.diag(np.arange(1.0, D + 1)),
        "random": np.random.default_rng(0).standard_normal((D, D)),
    }[name]
    form = np.einsum("ki,ij,kj->k", many(probes)[:, 0], a, many(probes)[:, 0])
    within(form, np.trace(a))
    within((form - np.trace(a)) ** 2, variance_laws(a)[probes])


@pytest.mark.parametrize("num", [2, 4])
def test_orthonormal_probes_are_draws_without_replacement(num):
    a = np.random.default_rng(1).standard_normal((D, D))
    v = many(orthonormal, num)
    form = np.einsum("kmi,ij,kmj->km", v, a, v)
    law = variance_laws(a)[sphere]
    within((form[:, 0] - np.trace(a)) * (form[:, 1] - np.trace(a)), -law / (D - 1))
    mean = form.mean(1)
    within((mean - np.trace(a)) ** 2, law / num * (1 - (num - 1) / (D - 1)))
    # The unbiased error bar from one block: its sample variance with the factor 1 - m/d.
    within(form.var(1, ddof=1) / num * (1 - num / D) - (mean - np.trace(a)) ** 2, 0.0)


def test_orthonormal_is_haar():
    """Moments that a QR without the sign rule misses: the determinant's and the diagonal's."""
    q = many(orthonormal, D) / np.sqrt(D)
    within(np.linalg.det(q), 0.0)
    within(np.trace(q, axis1=1, axis2=2), 0.0)
    within(np.trace(q, axis1=1, axis2=2) ** 2, 1.0)
    within(np.trace(q @ q, axis1=1, axis2=2), 1.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("shape", [(), (5,), (2, 2, 2)])
def test_geometry(x64, shape, dtype):
    like = jnp.zeros(shape, dtype)
    d, tolerance = like.size, 30 * like.size * float(jnp.finfo(dtype).eps)
    num = 2 * d + 1
    draw = jax.jit(lambda key: [probes(key, num, like) for probes in PROBES])
    for probes, v in zip(PROBES, draw(jax.random.key(3)), strict=True):
        assert v.shape == (num, *shape)
        assert v.dtype == dtype
        assert jnp.all(jnp.isfinite(v))
        if probes is not gaussian:
            lengths = np.sum(np.asarray(v).reshape(num, -1) ** 2, axis=1)
            np.testing.assert_allclose(lengths, d, rtol=tolerance)
    rows = np.asarray(v).reshape(-1, d)
    for block in (rows[:d], rows[d : 2 * d]):
        np.testing.assert_allclose(block @ block.T, d * np.eye(d), atol=tolerance * d)
    assert d == 1 or np.abs(rows[:d] @ rows[d : 2 * d].T - d * np.eye(d)).max() > 0.1


def test_signs_are_signs():
    assert set(np.unique(rademacher(jax.random.key(0), 50, jnp.zeros(3)))) == {-1.0, 1.0}


@pytest.mark.parametrize("probes", PROBES)
def test_same_key_same_probes_batched_or_not(probes):
    keys = jax.random.split(jax.random.key(5), 3)
    like = jnp.zeros((2, 2))
    alone = jnp.stack([probes(key, 3, like) for key in keys])
    np.testing.assert_allclose(jax.vmap(lambda key: probes(key, 3, like))(keys), alone, rtol=1e-6)
    assert not np.array_equal(alone[0], alone[1])


@pytest.mark.parametrize("probes", PROBES)
def test_half_precision_is_drawn_in_single(probes):
    v = probes(jax.random.key(0), 4, jnp.zeros(8, jnp.bfloat16))
    assert v.dtype == jnp.bfloat16
    assert jnp.all(jnp.isfinite(v))


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize(
    ("num", "like", "message"),
    [
        (0, jnp.zeros(3), "num: expected a whole number at least 1, got 0"),
        (2, jnp.zeros(3, jnp.int32), "like: expected a floating-point array, got dtype int32"),
        (2, jnp.zeros((0, 3)), "like: expected at least one entry"),
    ],
)
def test_bad_input(probes, num, like, message):
    with pytest.raises(InputError, match=message):
        getattr(probes, "__wrapped__", probes)(jax.random.key(0), num, like)
