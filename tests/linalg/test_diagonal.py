"""Diagonals from products: against dense matrices, naive twins from the papers, and coverage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.linalg.diagonal import (
    diagonal_hutchinson,
    diagonal_xdiag,
    diagonal_xnysdiag,
    signs,
)

METHODS = [diagonal_hutchinson, diagonal_xdiag, diagonal_xnysdiag]
D, KEYS = 40, 200


def rotated(eigenvalues, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    return (q * eigenvalues) @ q.T


def operator(a, shape):
    return lambda v: (a @ v.reshape(-1)).reshape(shape)


def over(method, shape, num, **options):
    """One program: matrices x keys -> estimates."""

    def one(a, key):
        return method(operator(a, shape), jnp.zeros(shape, a.dtype), key, num, **options)

    return jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))


INDEX = np.arange(D)
PSD = {
    "flat": 1 + 0.1 * np.random.default_rng(1).random(D),
    "1/i": 1 / (1.0 + INDEX),
    "1/i^2": 1 / (1.0 + INDEX) ** 2,
    "geometric": 0.7**INDEX,
    "two levels": np.where(INDEX < 5, 1.0, 1e-2),
    "rank 20": np.where(INDEX < 20, 1.0, 0.0),
}


@pytest.mark.parametrize("method", METHODS)
def test_intervals_cover_and_nothing_is_biased(method, x64):
    matrices = np.stack([rotated(v) for v in PSD.values()])
    keys = jax.random.split(jax.random.key(3), KEYS)
    out = over(method, (5, 8), 12)(jnp.asarray(matrices), keys)
    exact = np.diagonal(matrices, axis1=1, axis2=2).reshape(-1, 1, 5, 8)
    low, high = out.interval()
    coverage = np.mean((low <= exact) & (exact <= high), axis=(1, 2, 3))
    for name, share in zip(PSD, coverage, strict=True):
        assert 0.92 <= share <= 0.985, (name, share)
    error = np.asarray(out.value) - exact
    bias = np.mean(error, axis=1) / (np.std(error, axis=1) / KEYS**0.5)
    assert np.max(np.abs(bias)) < 4.5
    # The bars are right in the mean square too, but for the heavy tail of a fast decay.
    ratio = np.sum(np.asarray(out.standard_error) ** 2, (1, 2, 3)) / np.sum(error**2, (1, 2, 3))
    assert np.all(ratio > 0.85)
    assert not np.any(out.status)


def test_hutchinson_has_the_variance_it_claims(x64):
    a = np.random.default_rng(2).normal(size=(D, D))
    keys = jax.random.split(jax.random.key(4), 2000)
    out = over(diagonal_hutchinson, (D,), 4)(jnp.asarray(a)[None], keys)
    expected = (np.sum(a**2, axis=1) - np.diag(a) ** 2) / 4
    for variance in (np.var(out.value[0], axis=0), np.mean(out.standard_error[0] ** 2, axis=0)):
        np.testing.assert_allclose(variance, expected, rtol=0.15)


def twin_xdiag(a, w):
    """Section 2.4 of the paper: an orthonormal basis for every column left out."""
    samples = []
    for i in range(w.shape[1]):
        q = np.linalg.qr(a @ np.delete(w, i, axis=1))[0]
        rest = a @ w[:, i] - q @ (q.T @ a @ w[:, i])
        samples.append(np.diag(q @ q.T @ a) + w[:, i] * rest)
    return np.mean(samples, axis=0)


def twin_xnysdiag(a, w):
    samples = []
    for i in range(w.shape[1]):
        others = np.delete(w, i, axis=1)
        y = a @ others
        nystrom = y @ np.linalg.solve(others.T @ y, y.T)
        samples.append(np.diag(nystrom) + w[:, i] * ((a - nystrom) @ w[:, i]))
    return np.mean(samples, axis=0)


def test_leave_one_out_equals_the_naive_twin(x64):
    key, like = jax.random.key(5), jnp.zeros((2, D // 2))
    a = rotated(0.8**INDEX)
    w = np.asarray(signs(key, 7, like)).T
    out = jax.jit(lambda: diagonal_xnysdiag(operator(a, like.shape), like, key, 7))()
    np.testing.assert_allclose(out.value.reshape(-1), twin_xnysdiag(a, w), atol=1e-8)

    b = a @ rotated(1 + INDEX / D, seed=7) + 0.01 * np.random.default_rng(8).normal(size=(D, D))
    forward, back = operator(b, like.shape), operator(b.T, like.shape)
    out = diagonal_xdiag(forward, like, key, 14, rmatvec=back)
    np.testing.assert_allclose(out.value.reshape(-1), twin_xdiag(b, w), atol=1e-8)
    assert int(out.num_products) == 14


def hard_cases(d):
    rng = np.random.default_rng(9)
    u = rng.normal(size=(d, 2))
    cases = [np.zeros((d, d)), np.eye(d), u[:, :1] @ u[:, :1].T, u @ u.T, np.diag(rng.random(d))]
    return np.stack([*cases, 1e25 * u @ u.T, 1e-25 * u @ u.T])


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_operators_are_ordinary(method):
    # With four entries random signs repeat up to sign all the time: dependent for another reason.
    for d, num in ((12, 8),) if method is diagonal_hutchinson else ((4, 3), (12, 8)):
        matrices = hard_cases(d)
        keys = jax.random.split(jax.random.key(6), 50)
        out = over(method, (d,), num)(jnp.asarray(matrices, jnp.float32), keys)
        value, bar = np.asarray(out.value, float), np.asarray(out.standard_error)
        assert np.all(np.isfinite(value))
        assert not np.any(out.status)
        exact = np.diagonal(matrices, axis1=1, axis2=2)[:, None]
        error = np.abs(value - exact)
        assert not np.any(error[0])
        assert not np.any(bar[0])
        if method is diagonal_hutchinson:
            # A diagonal operator is not estimated but read off.
            assert np.max(error[[1, 4]]) < 1e-7
            assert np.max(bar[[1, 4]]) < 1e-7
        elif d == 12:
            # Rank below the number of probes: exact, at every scale.
            for case in (2, 3, 5, 6):
                assert np.max(error[case]) < 2e-5 * np.max(exact[case])


def test_a_full_budget_is_exact_and_one_product_has_no_bar():
    a = np.random.default_rng(10).normal(size=(6, 6)).astype(np.float32)
    key, like = jax.random.key(0), jnp.zeros((3, 2), jnp.float32)
    for method in METHODS[1:]:
        for num in (6, 9):
            out = jax.jit(lambda f=method, n=num: f(operator(a, like.shape), like, key, n))()
            np.testing.assert_allclose(out.value.reshape(-1), np.diag(a), rtol=1e-6)
            assert not np.any(out.standard_error)
            assert int(out.num_products) == 6
    for method, num in ((diagonal_hutchinson, 1), (diagonal_xdiag, 2)):
        out = jax.jit(lambda f=method, n=num: f(operator(a, like.shape), like, key, n))()
        assert np.all(np.isinf(out.standard_error))
        assert np.all(np.isfinite(out.value))
        low, high = out.interval()
        assert np.all(low == -np.inf)
        assert np.all(high == np.inf)
    scalar = diagonal_xdiag(lambda v: 3 * v, jnp.float32(0), key, 2)
    assert float(scalar.value) == 3
    assert float(scalar.standard_error) == 0


@pytest.mark.parametrize("method", METHODS)
def test_trouble_is_a_status(method):
    # The last row is fine: one program for good and bad operators.
    scale = np.ones((3, 30), np.float32)
    scale[0, 3], scale[1, :20] = np.nan, -1
    keys = jax.random.split(jax.random.key(0), 1)
    out = over(method, (30,), 10)(
        jnp.asarray(scale[:, None, :] * np.eye(30, dtype=np.float32)), keys
    )
    negative = Status.INDEFINITE if method is diagonal_xnysdiag else Status.OK
    assert out.status[:, 0].tolist() == [Status.NONFINITE, negative, Status.OK]
    assert np.all(np.isnan(out.value[0]))
    assert np.all(np.isnan(out.standard_error[0]))
    assert np.all(np.isinf(out.standard_error[1])) == (negative == Status.INDEFINITE)
    assert np.all(np.isfinite(out.value[1:]))


@pytest.mark.parametrize("method", METHODS)
def test_transforms_agree_and_trace_once(method):
    a = jnp.asarray(rotated(0.5**INDEX) + 0.1 * np.eye(D), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 3)
    traces = []

    @jax.jit
    def one(key):
        traces.append(key)
        return method(operator(a, (2, 4, 5)), jnp.zeros((2, 4, 5), a.dtype), key, 9)

    rows = [one(key) for key in keys]
    batch = jax.vmap(one)(keys)
    assert len(traces) <= 2
    for i, row in enumerate(rows):
        assert row.value.shape == (2, 4, 5)
        assert row.value.dtype == jnp.float32
        for name in ("value", "standard_error"):
            np.testing.assert_allclose(
                getattr(batch, name)[i], getattr(row, name), atol=2e-4, err_msg=name
            )


@pytest.mark.parametrize("method", METHODS)
def test_bad_arguments_are_named(method):
    key = jax.random.key(0)
    for matvec, like, num, name in (
        (lambda v: v, jnp.zeros(3), 0, "num_products"),
        (lambda v: v[:2], jnp.zeros(3), 2, "matvec"),
    ):
        with pytest.raises(InputError, match=name):
            method(matvec, like, key, num)
