"""Lattice probes: their geometry, what they leave in the diagonal, and honest error bars."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.linalg.diagonal import diagonal_hutchinson
from memjax.linalg.lattice import diagonal_lattice, lattice_probes

N = 24
GRID = np.moveaxis(np.mgrid[:N, :N], 0, -1).reshape(-1, 2)


def apart(v):
    """Whether the round never mixes two entries: their mean product vanishes."""
    v = np.asarray(v, float).reshape(len(v), -1)
    return np.abs(v.T @ v / len(v)) < 0.5


def test_pixels_of_a_color_are_far_apart_and_colors_equal():
    like = jnp.zeros((16, 16), jnp.float32)
    v = lattice_probes(jax.random.key(0), 64, like)
    assert set(np.unique(v)) == {-1, 1}
    grid = np.moveaxis(np.mgrid[:16, :16], 0, -1).reshape(-1, 2)
    distance = np.linalg.norm(grid[:, None] - grid[None], axis=-1)
    for bits in range(7):
        same = ~apart(v[: 1 << bits])
        assert np.all(np.sum(same, axis=1) == 256 >> bits)
        assert np.min(distance[same & (distance > 0)]) >= 2 ** (bits / 2) - 1e-9


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((), None), ((19,), None), ((5, 12), None), ((4, 4, 4), (0, 1, 2)), ((3, 9), ())],
)
def test_every_shape_ends_with_a_color_for_each_entry(shape, axes):
    like = jnp.zeros(shape, jnp.float32)
    num = 1 << sum((n - 1).bit_length() for n in shape)
    num = 1 << (27 - 1).bit_length() if axes == () else num
    v = lattice_probes(jax.random.key(1), num, like, spatial_axes=axes)
    np.testing.assert_array_equal(~apart(v), np.eye(like.size, dtype=bool))


def test_channels_are_the_nearest_or_share_a_color():
    like = jnp.zeros((8, 8, 3), jnp.float32)
    draw = functools.partial(lattice_probes, jax.random.key(2), 16, like)
    pixel = np.arange(192) // 3
    same_pixel = (pixel[:, None] == pixel[None]) & ~np.eye(192, dtype=bool)
    assert np.all(apart(draw())[same_pixel])
    assert not np.any(apart(draw(channel_colors=False))[same_pixel])
    first = lattice_probes(jax.random.key(2), 16, jnp.zeros((3, 8, 8)), spatial_axes=(1, -1))
    moved = np.moveaxis(np.asarray(first), 1, -1).reshape(16, 192)
    np.testing.assert_array_equal(apart(moved), apart(draw()))


def test_budgets_nest_and_keys_differ():
    like, key = jnp.zeros((6, 7), jnp.float32), jax.random.key(3)
    draw = jax.jit(lambda num: lattice_probes(key, num, like), static_argnums=0)
    long = draw(32)
    for num in (1, 4, 16):
        np.testing.assert_array_equal(draw(num), long[:num])
    rounds = draw(21)
    np.testing.assert_array_equal(rounds[:16], long[:16])
    for part in (rounds[16:20], rounds[20:]):
        assert not np.array_equal(part, long[: len(part)])
    # Over keys the signs are independent and the lattice moves.
    keys = jax.random.split(key, 4000)
    v = np.asarray(jax.vmap(lambda k: lattice_probes(k, 2, like))(keys)).reshape(4000, 2, 42)
    for k in range(2):
        second = v[:, k].T @ v[:, k] / 4000
        assert np.max(np.abs(second - np.eye(42))) < 5 / 4000**0.5


def test_the_error_is_what_is_left_within_a_color(x64):
    a = jnp.asarray(np.random.default_rng(4).normal(size=(60, 60)))
    like, key = jnp.zeros((6, 10)), jax.random.key(4)
    matvec = lambda v: (a @ v.reshape(-1)).reshape(v.shape)  # noqa: E731
    out = jax.jit(lambda: diagonal_lattice(matvec, like, key, 8))()
    v = np.asarray(lattice_probes(key, 8, like)).reshape(8, 60)
    left = np.sum(np.asarray(a) * (v.T @ v / 8), axis=1)
    np.testing.assert_allclose(out.value.reshape(-1), left, atol=1e-12)
    assert int(out.num_products) == 8


def conditional(retained):
    """Retained variance of a smooth field less that of the field with its middle pinned."""
    square = np.sum((GRID[:, None] - GRID[None]) ** 2, -1)
    base = np.exp(-square / (2 * 2.5**2))
    disc = np.sum((GRID - (N - 1) / 2) ** 2, axis=1) <= 36
    scale = np.where(disc, 1e-3**0.5, 1.0)

    def retains(s):
        return retained * np.linalg.solve(retained * s + (1 - retained) * np.eye(N * N), s)

    a = retains(base) - retains(base * scale[:, None] * scale[None])
    return (a + a.T) / 2


def over(method, num, shape=(N, N), **options):
    def one(a, key):
        matvec = lambda v: (a @ v.reshape(-1)).reshape(shape)  # noqa: E731
        return method(matvec, jnp.zeros(shape, a.dtype), key, num, **options)

    return jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))


def relative_error(out, matrices):
    exact = np.diagonal(matrices, axis1=1, axis2=2)
    error = np.asarray(out.value).reshape(len(exact), -1, exact.shape[1]) - exact[:, None]
    return np.mean(np.linalg.norm(error, axis=2) / np.linalg.norm(exact, axis=1)[:, None], axis=1)


def test_local_diagonals_beat_random_signs_by_the_stated_factors(x64):
    matrices = np.stack([conditional(0.998), conditional(0.5)])
    keys = jax.random.split(jax.random.key(0), 10)
    for num, limit, plain in ((16, (0.12, 0.18), (0.41, 0.66)), (64, (0.04, 0.03), (0.20, 0.34))):
        lattice = relative_error(over(diagonal_lattice, num)(jnp.asarray(matrices), keys), matrices)
        assert np.all(lattice <= limit), (num, lattice)
        other = over(diagonal_hutchinson, num)(jnp.asarray(matrices), keys)
        np.testing.assert_allclose(relative_error(other, matrices), plain, rtol=0.1)


def worlds():
    """256 entries on 16 x 16 pixels: operators that do not fade with distance, and that do."""
    rng = np.random.default_rng(5)
    grid = np.moveaxis(np.mgrid[:16, :16], 0, -1).reshape(-1, 2)
    r = np.linalg.norm(grid[:, None] - grid[None], axis=-1)
    g = rng.normal(size=(256, 256))
    g, u, scale = g + g.T, rng.normal(size=(256, 6)), np.exp(0.5 * rng.normal(size=256))
    still = [g, g * scale[:, None] * scale[None], u @ u.T, np.outer(u[:, 0], u[:, 1])]
    fading = [g / (1 + r), np.exp(-r / 3), g * np.exp(-r / 2), np.sinc(r / 2.2) * g, g * (r < 1.9)]
    return np.stack(still + fading), len(still)


@pytest.mark.parametrize("num", [16, 24])
def test_intervals_of_a_single_round_are_honest(num, x64):
    matrices, still = worlds()
    keys = jax.random.split(jax.random.key(6), 60)
    out = over(diagonal_lattice, num, (16, 16))(jnp.asarray(matrices), keys)
    exact = np.diagonal(matrices, axis1=1, axis2=2).reshape(-1, 1, 16, 16)
    low, high = out.interval()
    coverage = np.mean((low - 1e-12 <= exact) & (exact <= high + 1e-12), axis=(1, 2, 3))
    assert np.all((coverage[:still] >= 0.92) & (coverage[:still] <= 0.98)), coverage
    assert np.all(coverage[still:] >= 0.94), coverage
    error = np.asarray(out.value) - exact
    spread = np.std(error, axis=1) / 60**0.5
    assert np.max(np.abs(np.mean(error, axis=1)) - 5 * spread) < 1e-12
    # Cautious, not idle: a band narrower than what the colors resolve leaves no error and no bar.
    if num == 16:
        assert np.max(out.standard_error[-1]) < 1e-12
        assert np.max(np.abs(error[-1])) < 1e-12


def test_a_blind_bar_is_infinite_and_the_exact_one_zero():
    a = jnp.asarray(np.random.default_rng(7).normal(size=(48, 48)), jnp.float32)
    key = jax.random.key(8)
    shared = over(diagonal_lattice, 8, (4, 4, 3), channel_colors=False)(a[None], key[None])
    assert np.all(np.isinf(shared.standard_error))
    assert np.all(np.isfinite(shared.value))
    one = over(diagonal_lattice, 1, (4, 4, 3))(a[None], key[None])
    assert np.all(np.isinf(one.standard_error))
    assert np.all(np.isfinite(one.value))
    full = over(diagonal_lattice, 50, (4, 4, 3))(a[None], key[None])
    np.testing.assert_allclose(full.value.reshape(-1), jnp.diagonal(a), rtol=1e-6)
    assert not np.any(full.standard_error)
    assert int(full.num_products[0, 0]) == 48


def test_one_program_serves_every_case():
    # Diagonal: read off without variance; huge: no overflow; NaN: a status.
    scale = np.random.default_rng(9).random(48).astype(np.float32)
    rows = np.stack([np.diag(scale), np.zeros((48, 48)), np.full((48, 48), 1e30), np.eye(48)])
    rows = rows.astype(np.float32)
    rows[3, 5, 5] = np.nan
    traces = []

    @jax.jit
    def one(a, key):
        traces.append(key)
        matvec = lambda v: (a @ v.reshape(-1)).reshape(v.shape)  # noqa: E731
        return diagonal_lattice(matvec, jnp.zeros((4, 12), jnp.float32), key, 12)

    keys = jax.random.split(jax.random.key(10), 4)
    batch = jax.vmap(one)(jnp.asarray(rows), keys)
    np.testing.assert_allclose(batch.value[0].reshape(-1), scale, rtol=1e-6)
    assert np.max(batch.standard_error[:2]) < 1e-6
    assert not np.any(batch.value[1])
    assert np.all(np.isfinite(batch.standard_error[2]))
    assert batch.value.dtype == jnp.float32
    assert batch.status.tolist() == [Status.OK, Status.OK, Status.OK, Status.NONFINITE]
    assert np.all(np.isnan(batch.value[3]))
    for i in range(3):
        single = one(jnp.asarray(rows[i]), keys[i])
        scale_of = np.max(np.abs(batch.value[i])) + 1e-30
        assert np.max(np.abs(single.value - batch.value[i])) < 1e-5 * scale_of
    assert len(traces) <= 2


def test_bad_arguments_are_named():
    key, like = jax.random.key(0), jnp.zeros((3, 4))
    for axes in ((2,), (0, 0), (0, -2)):
        with pytest.raises(InputError, match="spatial_axes"):
            lattice_probes(key, 2, like, spatial_axes=axes)
    with pytest.raises(InputError, match="num"):
        lattice_probes(key, 0, like)
    with pytest.raises(InputError, match="num_products"):
        diagonal_lattice(lambda v: v, like, key, 0)
    with pytest.raises(InputError, match="matvec"):
        diagonal_lattice(lambda v: v[0], like, key, 2)
