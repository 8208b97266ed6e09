"""The choice among diagonal estimators: what it takes, what it costs, what it loses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.linalg.choice import DiagonalMethod, diagonal_auto
from memjax.linalg.diagonal import diagonal_xdiag
from memjax.linalg.lattice import diagonal_lattice

SHAPE, D = (16, 16), 256


def matrices():
    """A spectrum that decays by half, entries that fade with distance, and some that grow."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(D, D)))[0]
    grid = np.moveaxis(np.mgrid[:16, :16], 0, -1).reshape(-1, 2)
    square = np.sum((grid[:, None] - grid[None]) ** 2, -1)
    smooth = np.exp(-square / 12.5)
    retained = np.linalg.solve(0.5 * smooth + 0.5 * np.eye(D), 0.5 * smooth)
    # Only every second row and column couple: separating near pixels is no use.
    even = np.all((grid[:, None] - grid[None]) % 2 == 0, -1)
    spaced = even * rng.normal(size=(D, D))
    decaying = (q * 0.5 ** np.arange(D)) @ q.T
    return np.stack([decaying, (retained + retained.T) / 2, spaced + spaced.T])


def over(method, num, **options):
    def one(a, key):
        matvec = lambda v: (a @ v.reshape(-1)).reshape(SHAPE)  # noqa: E731
        return method(matvec, jnp.zeros(SHAPE, a.dtype), key, num, **options)

    return jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))


def relative_error(out, a):
    exact = np.diagonal(a, axis1=1, axis2=2)[:, None]
    error = np.asarray(out.value).reshape(len(a), -1, D) - exact
    return np.mean(np.linalg.norm(error, axis=2) / np.linalg.norm(exact, axis=2), axis=1)


def test_it_is_as_good_as_the_better_method(x64):
    a, keys = matrices(), jax.random.split(jax.random.key(0), 10)
    out = over(diagonal_auto, 64)(jnp.asarray(a), keys)
    expected = [DiagonalMethod.XDIAG, DiagonalMethod.LATTICE, DiagonalMethod.HUTCHINSON]
    assert np.all(np.asarray(out.method) == np.asarray(expected)[:, None])
    assert np.all(out.estimate.num_products == 64)
    chosen = relative_error(out.estimate, a)
    rank = relative_error(over(diagonal_xdiag, 64)(jnp.asarray(a), keys), a)
    lattice = relative_error(over(diagonal_lattice, 64)(jnp.asarray(a), keys), a)
    assert np.all(chosen <= 1.5 * np.minimum(rank, lattice)), (chosen, rank, lattice)
    assert chosen[0] <= 1e-6
    low, high = out.estimate.interval()
    exact = np.diagonal(a, axis1=1, axis2=2).reshape(-1, 1, *SHAPE)
    assert np.all(np.mean((low <= exact) & (exact <= high), axis=(1, 2, 3)) > 0.92)


def test_a_positive_operator_gets_twice_the_rank(x64):
    a, keys = matrices()[:2], jax.random.split(jax.random.key(1), 10)
    out = over(diagonal_auto, 32, positive=True)(jnp.asarray(a), keys)
    assert np.all(out.method[0] == DiagonalMethod.XNYSDIAG)
    assert np.all(out.method[1] == DiagonalMethod.LATTICE)
    # At 32 products XDiag reaches 4e-4, and the lattice 0.03 on the second.
    assert np.all(relative_error(out.estimate, a) < (1e-6, 0.05))
    assert not np.any(out.estimate.status)


def test_every_choice_is_unbiased_with_honest_bars(x64):
    rng = np.random.default_rng(2)
    keys = jax.random.split(jax.random.key(2), 400)
    g = rng.normal(size=(64, 64))
    q = np.linalg.qr(g)[0]
    a = np.stack([g + g.T, (q * 0.6 ** np.arange(64)) @ q.T, np.kron(np.eye(16), np.ones((4, 4)))])

    def one(a, key):
        out = diagonal_auto(lambda v: a @ v, jnp.zeros(64), key, 16, rmatvec=lambda v: v @ a)
        return out.estimate, out.method

    program = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    out, method = program(jnp.asarray(a), keys)
    assert len(np.unique(method)) >= 2
    exact = np.diagonal(a, axis1=1, axis2=2)[:, None]
    error = np.asarray(out.value) - exact
    bias = np.abs(np.mean(error, axis=1)) / (np.std(error, axis=1) / 20 + 1e-12)
    assert np.max(bias) < 4.5
    low, high = out.interval()
    coverage = np.mean((low - 1e-12 <= exact) & (exact <= high + 1e-12), axis=(1, 2))
    assert np.all(coverage > 0.92), coverage


def test_products_are_counted_also_when_rows_choose_differently():
    a, rows = matrices()[:2].astype(np.float32), []

    def product(a, v):
        rows.append(v.size // D)
        return np.einsum("...ij,...j->...i", a, v)

    def one(a, key):
        def matvec(v):
            flat = jax.ShapeDtypeStruct((D,), jnp.float32)
            out = jax.pure_callback(product, flat, a, v.reshape(-1), vmap_method="broadcast_all")
            return out.reshape(SHAPE)

        return diagonal_auto(matvec, jnp.zeros(SHAPE, jnp.float32), key, 16)

    keys = jax.random.split(jax.random.key(3), 2)
    out = jax.jit(jax.vmap(one))(jnp.asarray(a), keys)
    jax.block_until_ready(out)
    assert out.method.tolist() == [DiagonalMethod.XDIAG, DiagonalMethod.LATTICE]
    assert sum(rows) == 2 * 16
    assert out.estimate.num_products.tolist() == [16] * 2


def test_small_and_full_budgets_and_trouble():
    keys = jax.random.split(jax.random.key(6), 2)
    scale = jnp.arange(1.0, 13.0)
    rows = jnp.stack([scale, scale.at[0].set(jnp.inf)])
    for num, method in ((1, "lattice"), (8, "lattice"), (12, "exact")):
        program = jax.vmap(lambda a, key, n=num: diagonal_auto(lambda v: a * v, a, key, n))
        out = jax.jit(program)(rows, keys)
        assert DiagonalMethod(int(out.method[0])).label == method
        np.testing.assert_allclose(out.estimate.value[0], scale, rtol=1e-6)
        assert out.estimate.num_products.tolist() == [num, num]
        assert out.estimate.status.tolist() == [Status.OK, Status.NONFINITE]
        assert np.all(np.isnan(out.estimate.value[1]))


def test_bad_arguments_are_named():
    key, like = jax.random.key(0), jnp.zeros(12)
    with pytest.raises(InputError, match="num_products"):
        diagonal_auto(lambda v: v, like, key, 0)
    with pytest.raises(InputError, match="spatial_axes"):
        diagonal_auto(lambda v: v, like, key, 4, spatial_axes=(1,))
    with pytest.raises(InputError, match="matvec"):
        diagonal_auto(lambda v: v[1:], like, key, 4)
