"""Lanczos: every bound holds, breakdown is an answer, and a claim is made only when earned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.linalg.lanczos import eigsh

K = 3


def rotated(values, seed):
    """A dense symmetric matrix with these eigenvalues, in float64."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    a = (q * values) @ q.T
    return (a + a.T) / 2


def spectra(n, k):
    """Spectra on which eigen-solvers go wrong."""
    unit = np.arange(n) / max(n - 1, 1)
    ring = 2 - 2 * np.cos(2 * np.pi * np.arange(n) / n)
    return {
        "identity": np.ones(n),
        "zero": np.zeros(n),
        "rank one": np.r_[2.0, np.zeros(n - 1)],
        "two values": np.where(np.arange(n) < n // 3, 1.0, -100.0),
        "clustered": np.where(np.arange(n) < n // 2, 1 - 1e-4 * unit, 0.3 * unit),
        "rank k - 1": np.where(np.arange(n) < k - 1, 3.0 - np.arange(n) / n, 0.0),
        "rank k": np.where(np.arange(n) < k, -3.0 + np.arange(n) / n, 0.0),
        "geometric 1e3": 1e3**-unit,
        "geometric 1e5": 1e5**-unit,
        "pairs": np.where(np.arange(n) % 2 == 0, 1, -1) * (1 + np.arange(n) // 2) / n,
        "ring Laplacian": ring,
    }


def solver(k, **options):
    """Eigenpairs of a stack of matrices, compiled once."""

    def one(a, key):
        like = jnp.zeros(a.shape[0], a.dtype)
        product = lambda v: jnp.matmul(a, v, precision="highest")  # noqa: E731
        return eigsh(product, like, key, k, **options)

    return jax.jit(jax.vmap(one))


def run(matrices, k, dtype, seed=0, **options):
    a = jnp.asarray(np.stack(matrices), dtype)
    keys = jax.random.split(jax.random.key(seed), len(a))
    return jax.device_get(solver(k, **options)(a, keys)), np.asarray(a, np.float64)


def recomputed(a, values, vectors):
    """Residuals from a fresh product, in float64."""
    v = vectors.reshape(len(values), -1).astype(np.float64)
    return np.linalg.norm(v @ a - values[:, None] * v, axis=1)


def matched(found, radius, true):
    """Whether every found value has a true one of its own within its radius."""
    free = list(np.sort(true))
    for i in np.argsort(found):
        near = [j for j, t in enumerate(free) if abs(t - found[i]) <= radius[i]]
        if not near:
            return False
        free.pop(near[0])
    return True


def assert_bounds_hold(pairs, matrices, dtype):
    """No value without its eigenvalue, no ghost, no skew basis, no wrong residual."""
    n = matrices.shape[-1]
    eps = float(jnp.finfo(dtype).eps)
    for i, a in enumerate(matrices):
        true = np.linalg.eigvalsh(a)
        slack = 30 * n * eps * np.abs(true).max()
        ok, values = pairs.converged[i], pairs.values[i].astype(np.float64)
        assert np.isfinite(values).all(), i
        fresh = recomputed(a, values, pairs.vectors[i])
        assert matched(values[ok], fresh[ok] + slack, true), (i, values, true)
        assert (fresh <= pairs.residuals[i] + slack).all(), (i, fresh, pairs.residuals[i])
        gram = pairs.vectors[i].astype(np.float64) @ pairs.vectors[i].astype(np.float64).T
        assert np.abs(gram - np.eye(len(gram))).max() < (1e-5 if eps > 1e-10 else 1e-12)


SIZES = {2: (1, "largest"), 5: (2, "smallest"), 24: (3, "both"), 100: (4, "largest")}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("n", SIZES)
def test_every_stated_bound_holds(x64, n, dtype):
    """4 sizes x 2 precisions x 11 spectra x 5 rotations = 440 operators, against dense eigh."""
    k, which = SIZES[n]
    matrices = [rotated(v, seed) for v in spectra(n, k).values() for seed in range(5)]
    pairs, a = run(matrices, k, dtype, which=which, max_products=40)
    assert_bounds_hold(pairs, a, dtype)
    assert np.isin(pairs.status, [Status.OK, Status.BREAKDOWN, Status.NOT_CONVERGED]).all()
    if n <= 24:
        assert pairs.converged.all()
    assert pairs.extreme.mean() > 0.3
    ends = {"largest": slice(n - k, n), "smallest": slice(0, k)}
    for i in np.flatnonzero(pairs.extreme):
        true = np.linalg.eigvalsh(a[i])
        both = np.r_[true[: k // 2], true[n - (k + 1) // 2 :]]
        expected = both if which == "both" else true[ends[which]]
        tolerance = 30 * n * float(jnp.finfo(dtype).eps) * np.abs(true).max() + 1e-30
        np.testing.assert_allclose(np.sort(pairs.values[i]), expected, rtol=0, atol=tolerance)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("n", [2, 3, 8, 33, 128, 256])
def test_every_stated_bound_holds_at_large(x64, n, dtype):
    """6 sizes x 2 precisions x 11 spectra x 40 rotations = 5,280 operators."""
    k = min(K, n)
    matrices = [rotated(v, seed) for v in spectra(n, k).values() for seed in range(40)]
    for which in ("largest", "smallest", "both"):
        pairs, a = run(matrices, k, dtype, which=which, max_products=120)
        assert_bounds_hold(pairs, a, dtype)


def clusters(n, widths, sizes):
    """A cluster at the upper end, cut by k, matched by it, or smaller than it."""
    for width in widths:
        for size in sizes:
            top = 1 - width * np.arange(size) / max(size - 1, 1)
            yield size, np.r_[top, np.linspace(-0.5, 0.5, n - size)]


def misses(pairs, matrices, k):
    """Which runs do not hold the k largest, beyond what their residuals allow."""
    n = matrices.shape[-1]
    missed = []
    for i, a in enumerate(matrices):
        true = np.linalg.eigvalsh(a)[::-1][:k]
        allowed = pairs.residuals[i] + 30 * n * np.finfo(float).eps
        missed.append((np.abs(np.sort(pairs.values[i])[::-1] - true) > allowed).any())
    return np.asarray(missed)


@pytest.mark.parametrize("verify", [0, 40])
def test_extreme_is_claimed_only_when_earned(x64, verify):
    """100 starts on clusters of width 1e-3 to 1e-7 and on multiple values: no silent miss."""
    worlds = list(clusters(100, [1e-3, 1e-4, 1e-5, 1e-7, 0.0], [2, 3, 4, 6]))
    sizes = np.repeat([size for size, _ in worlds], 5)
    matrices = [a for _, values in worlds for a in [rotated(values, 0)] * 5]
    options = {"verify": verify, "tol": 1e-6, "max_products": 100, "basis_size": 30}
    pairs, a = run(matrices, K, jnp.float64, **options)
    missed = misses(pairs, a, K)
    assert not (missed & pairs.extreme).any()
    assert_bounds_hold(pairs, a, jnp.float64)
    if verify:
        assert pairs.extreme[sizes == K].all()  # a gap below the third: established
        assert not missed[sizes <= K].any()
    else:
        assert missed.any()  # what a single Krylov space cannot see
        assert not pairs.extreme.any()


@pytest.mark.nightly
def test_extreme_is_claimed_only_when_earned_at_large(x64):
    """1,000 starts."""
    worlds = list(clusters(100, np.logspace(-7, -3, 10), [1, 2, 3, 4, 6]))
    for rotation in range(4):
        matrices = [a for _, values in worlds for a in [rotated(values, rotation)] * 5]
        pairs, a = run(matrices, K, jnp.float64, seed=rotation, verify=80, max_products=300)
        assert not (misses(pairs, a, K) & pairs.extreme).any()


@pytest.mark.parametrize("seeds", [4, pytest.param(41, marks=pytest.mark.nightly)])
def test_breakdown_is_an_answer(x64, seeds):
    """200 starts (nightly: 2,050) inside invariant subspaces, of operators that are hardly any."""
    n, rng = 12, np.random.default_rng(0)
    table = {**spectra(n, K), "distinct": np.linspace(1, 2, n) ** 2}
    matrices, starts = [], []
    for values in table.values():
        for dimension in (1, 2, 5, n):
            for seed in range(seeds):
                a = rotated(values, seed)
                space = np.linalg.eigh(a)[1][:, rng.choice(n, dimension, replace=False)]
                matrices.append(a)
                starts.append(space @ rng.normal(size=dimension))
    for degenerate in (np.zeros(n), np.full(n, 1e-300)):
        matrices += [rotated(table["distinct"], 0)] * seeds
        starts += [degenerate] * seeds
    inside = len(table) * 4 * seeds
    assert len(matrices) == inside + 2 * seeds

    @jax.jit
    @jax.vmap
    def solve(a, start, key):
        return eigsh(lambda v: a @ v, start, key, K, start=start, max_products=50)

    a, starts = jnp.asarray(np.stack(matrices)), jnp.asarray(np.stack(starts))
    keys = jax.random.split(jax.random.key(0), len(a))
    pairs = jax.device_get(solve(a, starts, keys))
    assert_bounds_hold(pairs, np.asarray(a), jnp.float64)
    assert np.isin(pairs.status, [Status.OK, Status.BREAKDOWN]).all()
    eigenvectors = np.asarray([i for i in range(inside) if (i // seeds) % 4 == 0])
    assert (pairs.status[eigenvectors] == Status.BREAKDOWN).all()
    for i, matrix in enumerate(np.asarray(a)):
        true = np.linalg.eigvalsh(matrix)[::-1][:K]
        right = np.allclose(pairs.values[i], true, rtol=0, atol=1e-11 * max(1, abs(true).max()))
        assert right or not pairs.extreme[i], i
    # The search goes on in the complement; only a start that hides the ends may stop before.
    assert pairs.extreme.mean() > 0.9


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 2)])
def test_any_shape_and_all_of_a_space(x64, shape):
    """The whole spectrum of a small operator, in the shape of its argument."""
    d = int(np.prod(shape))
    a = jnp.asarray(rotated(np.linspace(-1, 2, d), 1))
    pairs = eigsh(
        lambda v: (a @ v.reshape(-1)).reshape(shape), jnp.zeros(shape), jax.random.key(0), d
    )
    assert pairs.vectors.shape == (d, *shape)
    assert bool(pairs.extreme)
    np.testing.assert_allclose(pairs.values, np.linalg.eigvalsh(a)[::-1], atol=1e-12)


def test_a_breakdown_costs_what_is_there_and_no_more(x64):
    """Isotropic: one product per copy, and one to see that there is nothing else."""
    eye = np.eye(50)
    pairs, _ = run([-100 * eye, 0 * eye], K, jnp.float64, which="smallest")
    np.testing.assert_array_equal(pairs.num_products, K + 1)
    np.testing.assert_allclose(pairs.values[0], -100)


def test_restarts_agree_with_scipy(x64):
    """A basis of 20 on 300 dimensions, both ends, against ARPACK."""
    values = np.sort(np.random.default_rng(3).normal(size=300))
    a = rotated(values, 2)
    pairs, _ = run([a], 4, jnp.float64, which="both", basis_size=20, max_products=2000, tol=1e-9)
    expected = scipy.sparse.linalg.eigsh(a, 4, which="BE", tol=1e-12, v0=np.ones(300))[0]
    np.testing.assert_allclose(pairs.values[0], expected, atol=1e-10)
    assert (pairs.status == Status.OK).all()
    assert 20 < pairs.num_products[0] < 2000


def test_products_are_those_of_unrestarted_lanczos(x64):
    """Twenty starts: no product more than a plain Lanczos with a full basis needs."""
    n, tol = 120, 1e-6
    a = rotated(np.r_[np.linspace(0, 0.7, n - 4), 0.8, 0.85, 0.93, 1.0], 5)

    def plain(start):
        basis = [start / np.linalg.norm(start)]
        for m in range(1, n):
            w = a @ basis[-1]
            v = np.stack(basis)
            for _ in range(2):
                w = w - v.T @ (v @ w)
            theta, z = np.linalg.eigh(v @ a @ v.T)
            if m >= K and (np.linalg.norm(w) * np.abs(z[-1, -K:]) <= tol * theta[-1]).all():
                return m
            basis.append(w / np.linalg.norm(w))
        raise AssertionError

    starts = np.random.default_rng(0).normal(size=(20, n))

    @jax.jit
    @jax.vmap
    def solve(start):
        product = lambda v: jnp.asarray(a) @ v  # noqa: E731
        return eigsh(product, start, jax.random.key(0), K, start=start, tol=tol).num_products

    np.testing.assert_array_equal(solve(jnp.asarray(starts)), [plain(s) for s in starts])


def test_each_lane_stops_by_itself(x64):
    """A batch counts what each operator needed, and gives what each gives alone."""
    easy, hard = np.r_[5.0, 3.0, 2.0, np.zeros(57)], np.linspace(0, 1, 60)
    matrices = [rotated(easy, 0), rotated(hard, 0)]
    together, a = run(matrices, K, jnp.float64)
    assert together.num_products[0] < 8 < together.num_products[1]
    for i in range(2):
        keys = jax.random.split(jax.random.key(0), 2)[i]
        alone = jax.jit(lambda a, key: eigsh(lambda v: a @ v, a[0], key, K))(a[i], keys)
        assert alone.num_products == together.num_products[i]
        np.testing.assert_allclose(alone.values, together.values[i], atol=1e-13)


def test_blocks_see_multiple_values(x64):
    """A double eigenvalue in one go, with a block of two; blocks that do not divide d."""
    matrices = [rotated(np.r_[1.0, 1.0, 0.8, np.linspace(-0.5, 0.5, 38)], s) for s in range(3)]
    pairs, a = run(matrices, K, jnp.float64, block_size=2, tol=1e-7, max_products=40)
    assert_bounds_hold(pairs, a, jnp.float64)
    np.testing.assert_allclose(pairs.values, [[1, 1, 0.8]] * 3, atol=1e-10)
    pairs, a = run([rotated(v, 0) for v in spectra(7, 7).values()], 7, jnp.float64, block_size=3)
    assert pairs.extreme.all()
    assert (pairs.num_products == 7).all()
    assert_bounds_hold(pairs, a, jnp.float64)


def test_scale_does_not_matter():
    """Squares that overflow or vanish in single precision."""
    a = rotated(np.r_[1.0, 0.7, 0.4, np.zeros(20)], 0)
    pairs, _ = run([scale * a for scale in (1e-25, 1.0, 1e25)], K, jnp.float32)
    np.testing.assert_array_equal(pairs.num_products, pairs.num_products[1])
    scaled = pairs.values.astype(np.float64) / np.array([[1e-25], [1.0], [1e25]])
    np.testing.assert_allclose(scaled, [[1.0, 0.7, 0.4]] * 3, rtol=1e-5)
    assert pairs.converged.all()


def test_the_budget_is_kept_and_said(x64):
    pairs, a = run([rotated(np.linspace(0, 1, 80), 0)], K, jnp.float64, tol=1e-12, max_products=9)
    assert pairs.num_products[0] == 9
    assert pairs.status[0] == Status.NOT_CONVERGED
    assert not pairs.converged.all()
    assert_bounds_hold(pairs, a, jnp.float64)


@pytest.mark.parametrize("bad", ["operator", "later", "start"])
def test_nonfinite_products_end_the_run(bad):
    like = jnp.ones(6)
    scale = {"operator": jnp.nan, "later": 1.0, "start": 1.0}[bad]
    start = like.at[0].set(jnp.inf) if bad == "start" else like.at[0].set(2.0)

    def product(v):
        poison = jnp.where((bad == "later") & (jnp.abs(v[0]) < 0.3), jnp.nan, 1.0)
        return scale * poison * jnp.arange(1.0, 7.0) * v

    pairs = eigsh(product, like, jax.random.key(0), 2, start=start)
    assert pairs.status == Status.NONFINITE
    assert jnp.isnan(pairs.values).all()
    assert not pairs.converged.any()
    assert not pairs.extreme
    assert pairs.vectors.shape == (2, 6)


def test_traced_once_for_all_operators():
    traces = 0

    @jax.jit
    def solve(a, key):
        nonlocal traces
        traces += 1
        return eigsh(lambda v: a @ v, a[0], key, 1, max_products=5)

    for seed in range(3):
        solve(jnp.eye(4) * (seed + 1), jax.random.key(seed))
    assert traces == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected a whole number from 1 to 3, got 0"),
        ({"k": 4}, "k: expected a whole number from 1 to 3, got 4"),
        ({"which": "LM"}, 'which: expected "largest", "smallest" or "both", got .LM.'),
        ({"tol": -1.0}, "tol: expected a number >= 0, got -1.0"),
        ({"tol": float("nan")}, "tol: expected a number >= 0, got nan"),
        ({"basis_size": 1}, "basis_size: expected a whole number at least 3, got 1"),
        ({"max_products": 1}, "max_products: expected a whole number at least 2, got 1"),
        ({"block_size": 0}, "block_size: expected a whole number from 1 to 3, got 0"),
        ({"verify": -1}, "verify: expected a whole number at least 0, got -1"),
        ({"start": jnp.zeros(2)}, r"start: expected float\d+\[3\], got float\d+\[2\]"),
        ({"like": jnp.zeros(0)}, "like: expected at least one entry"),
        ({"matvec": lambda v: v[:2]}, r"matvec: expected A v like v"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"matvec": lambda v: v, "like": jnp.zeros(3), "key": jax.random.key(0), "k": 2}
    with pytest.raises(InputError, match=message):
        eigsh(**(arguments | options))
