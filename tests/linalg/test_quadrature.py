"""Stochastic Lanczos quadrature against dense spectra, exact moments and classical bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.linalg import probes
from memjax.linalg.quadrature import spectral_density

KEY = jax.random.key(0)
D = 24


def rotated(values, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values),) * 2))
    a = (q * values) @ q.T
    return (a + a.T) / 2


SPECTRA = {
    "zero": np.zeros(D),
    "identity": np.ones(D),
    "rank one": np.r_[np.zeros(D - 1), 5.0],
    "two values": np.r_[np.full(5, -1.0), np.full(D - 5, 2.0)],
    "clustered": np.r_[np.linspace(-1e-3, 1e-3, D - 3), 1.0, 2.0, 3.0],
    "even": np.linspace(-2.0, 2.0, D),
    "geometric": 0.6 ** np.arange(D),
    "random": np.random.default_rng(1).standard_normal(D),
    "tiny": 1e-25 * np.linspace(0.5, 1.0, D),
    "huge": 1e25 * np.linspace(0.5, 1.0, D),
}
EXACT = ("zero", "identity", "rank one", "two values")


@functools.partial(jax.jit, static_argnames=("num_probes", "num_steps", "draw", "chunk_size"))
def densities(a, keys, num_probes, num_steps, draw=probes.sphere, chunk_size=None):
    """One spectral density per matrix and key."""

    def one(a, key):
        def matvec(v):
            return jnp.matmul(a, v, precision="highest")

        like = jnp.zeros(a.shape[-1], a.dtype)
        return spectral_density(
            matvec, like, key, num_probes, num_steps, probes=draw, chunk_size=chunk_size
        )

    return jax.vmap(one)(a, keys)


def spectra(dtype):
    values = np.stack([np.sort(x) for x in SPECTRA.values()])
    return jnp.asarray(np.stack([rotated(x) for x in SPECTRA.values()]), dtype), values


def draws_of(keys, num_probes, dtype):
    """The probes that ``spectral_density`` draws from each key."""
    from memjax._core.keys import derive_key

    like = jnp.zeros(D, dtype)
    return jax.vmap(lambda key: probes.sphere(derive_key(key, "probes"), num_probes, like))(keys)


def test_gauss_rules(x64):
    """Every probe: exact to degree 2 m - 1, positive, and closed where it should be."""
    steps, num_probes = 6, 8
    a, _ = spectra(np.float64)
    keys = jax.random.split(KEY, len(a))
    batch = densities(a, keys, num_probes, steps)
    vectors = np.asarray(draws_of(keys, num_probes, np.float64))
    nodes, weights, exact = (np.asarray(x) for x in (batch.nodes, batch.weights, batch.exact))
    assert (np.asarray(batch.status) == Status.OK).all()
    assert (weights >= 0).all()
    assert (np.diff(nodes, axis=-1) >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=-1), D, rtol=1e-13)
    for i, name in enumerate(SPECTRA):
        lam, q = np.linalg.eigh(np.asarray(a[i]))
        scale = np.abs(lam).max() or 1.0
        measure = (vectors[i] @ q) ** 2
        degrees = range(2 * steps + 8 if name in EXACT else 2 * steps)
        for degree in degrees:
            found = (weights[i] * (nodes[i] / scale) ** degree).sum(axis=-1)
            expected = measure @ (lam / scale) ** degree
            np.testing.assert_allclose(found, expected, atol=1e-11 * D, err_msg=name)
        assert exact[i].all() == (name in EXACT), name


@jax.jit
@jax.vmap
def counts(density, taus):
    """What a density says at each of several thresholds."""

    def at(tau):
        count = density.count_above(tau).value, density.count_below(tau).value
        return *count, density.count_bias(tau)

    return jax.vmap(at)(taus)


def test_the_bound_of_the_counts(x64):
    """Chebyshev, Markov and Stieltjes, away from eigenvalues by more than rounding."""
    a, values = spectra(np.float64)
    keys = jax.random.split(KEY, len(a))
    batch = densities(a, keys, 8, 6)
    vectors = np.asarray(draws_of(keys, 8, np.float64))
    scale = np.abs(values).max(axis=1)
    scale[scale == 0] = 1
    taus = np.linspace(-1.1, 1.1, 99)[None, :] * scale[:, None]
    largest = []
    for i, (name, above, below, bias) in enumerate(
        zip(SPECTRA, *map(np.asarray, counts(batch, jnp.asarray(taus))), strict=True)
    ):
        lam, q = np.linalg.eigh(np.asarray(a[i]))
        measure = np.mean((vectors[i] @ q) ** 2, axis=0)
        clear = np.abs(taus[i][:, None] - lam[None, :]).min(axis=1) > 1e-9 * scale[i]
        true_above, true_below = (
            (measure[None, :] * side).sum(axis=1)
            for side in (lam[None, :] > taus[i][:, None], lam[None, :] < taus[i][:, None])
        )
        for error in (above - true_above, below - true_below):
            assert (np.abs(error) <= bias + 1e-9)[clear].all(), name
            largest.append(np.max((np.abs(error) / (bias + 1e-9))[clear]))
        if name in EXACT:
            assert (bias == 0).all(), name
    # The bound is not idle: seven tenths of it are reached.
    assert max(largest) > 0.5


def test_orthonormal_probes_and_all_steps_are_exact():
    """Every trace and count, whatever f and the spectrum; more steps than dimensions are cut."""
    dtype = jnp.zeros(()).dtype
    a, values = spectra(dtype)
    keys = jax.random.split(KEY, len(a))
    batch = densities(a, keys, D, D + 10, draw=probes.orthonormal, chunk_size=5)
    assert batch.nodes.shape == (len(a), D, D)
    assert np.asarray(batch.exact).all()
    tol = 1e3 * np.finfo(dtype).eps
    for i, name in enumerate(SPECTRA):
        density = jax.tree.map(lambda x, i=i: x[i], batch)
        lam = values[i]
        scale = float(np.abs(lam).max() or 1.0)
        for f in (lambda x: x, lambda x: x**2, lambda x: x**3, np.exp):
            found = density.trace(lambda x, f=f, scale=scale: f(np.asarray(x) / scale))
            np.testing.assert_allclose(found.value, f(lam / scale).sum(), atol=tol * D, rtol=tol)
        # Between the two eigenvalues farthest from each other.
        gap = np.diff(lam).argmax()
        tau = (lam[gap] + lam[gap + 1]) / 2 if np.ptp(lam) > 0 else lam[0] + 1
        assert np.isclose(density.count_above(tau).value, (lam > tau).sum(), atol=tol * D), name
        assert np.isclose(density.count_below(tau).value, (lam < tau).sum(), atol=tol * D), name
        assert density.count_bias(tau) == 0


def test_products_are_those_that_were_needed():
    """A closed Krylov space asks for no more products; the bookkeeping is per probe."""
    a, _ = spectra(np.float32)
    batch = densities(a, jax.random.split(KEY, len(a)), 8, 6)
    products = dict(zip(SPECTRA, np.asarray(batch.num_products), strict=True))
    assert products["zero"] == products["identity"] == 8
    assert products["rank one"] == products["two values"] == 16
    assert products["even"] == products["tiny"] == products["huge"] == 48
    assert np.isfinite(np.asarray(batch.nodes)).all()
    assert np.isfinite(np.asarray(batch.weights)).all()


def test_counts_in_a_gap():
    """Ten eigenvalues above a wide gap: the counts are right to their standard errors."""
    d, num_keys = 120, 8
    rng = np.random.default_rng(2)
    lam = np.r_[rng.uniform(-0.3, 0.3, d - 10), rng.uniform(1.5, 2.5, 10)]
    a = jnp.broadcast_to(jnp.asarray(rotated(lam), jnp.float32), (num_keys, d, d))
    batch = densities(a, jax.random.split(KEY, num_keys), 30, 16)
    for above, estimate in (
        (10, jax.vmap(lambda density: density.count_above(0.9))(batch)),
        (d - 10, jax.vmap(lambda density: density.count_below(0.9))(batch)),
    ):
        score = (np.asarray(estimate.value) - above) / np.asarray(estimate.standard_error)
        assert np.abs(score).max() < 4
        assert np.asarray(estimate.standard_error).max() < 1.5
    # The rule cannot be wrong by more than a small part of that.
    assert np.asarray(jax.vmap(lambda density: density.count_bias(0.9))(batch)).max() < 1e-3


@pytest.mark.parametrize("draw", [probes.sphere, probes.gaussian])
def test_intervals_cover(draw):
    """95 % intervals of tr f(A) hold the truth in 92-98 % of the runs, without bias."""
    num_keys, num_probes = 1000, 30
    lam = SPECTRA["random"]
    a = jnp.broadcast_to(jnp.asarray(rotated(lam), jnp.float32), (num_keys, D, D))
    batch = densities(a, jax.random.split(jax.random.key(7), num_keys), num_probes, 3, draw=draw)
    for power in (1, 2):
        estimate = jax.vmap(lambda density, p=power: density.trace(lambda x: x**p))(batch)
        truth = (lam**power).sum()
        low, high = estimate.interval()
        assert 0.92 <= np.mean((low <= truth) & (truth <= high)) <= 0.98
        values = np.asarray(estimate.value)
        assert abs(values.mean() - truth) < 4 * values.std() / num_keys**0.5
        # The error bars obey the laws of the probes.
        squares = (lam ** (2 * power)).sum()
        law = {
            probes.sphere: 2 * D / (D + 2) * (squares - truth**2 / D),
            probes.gaussian: 2 * squares,
        }[draw]
        found = np.mean(np.asarray(estimate.standard_error) ** 2) * num_probes
        np.testing.assert_allclose(found, law, rtol=0.06)


def test_density():
    """Integrates to d, is the smoothed spectrum where exact, and carries its error bar."""
    a, values = spectra(jnp.zeros(()).dtype)
    i = list(SPECTRA).index("even")
    batch = densities(
        a, jax.random.split(KEY, len(a)), D, D + 10, draw=probes.orthonormal, chunk_size=5
    )
    density = jax.tree.map(lambda x: x[i], batch)
    points, width = jnp.linspace(-5, 5, 401), 0.25
    phi = density.density(points, width)
    assert phi.value.shape == phi.standard_error.shape == (401,)
    np.testing.assert_allclose(np.sum(phi.value) * 0.025, D, rtol=1e-4)
    exact = scipy.stats.norm.pdf(np.asarray(points)[:, None], values[i], width).sum(axis=1)
    np.testing.assert_allclose(phi.value, exact, atol=1e-3)


def test_a_probe_that_fails_is_not_hidden():
    """NaN and a status, also where a comparison would make a number of it."""
    a, _ = spectra(np.float32)
    keys = jax.random.split(KEY, len(a))
    good = densities(a, keys, 8, 6)
    batch = densities(a.at[0, 3, 3].set(jnp.nan).at[1, 3, 3].set(jnp.inf), keys, 8, 6)
    failed = [True] * 2 + [False] * (len(a) - 2)
    assert (np.asarray(batch.status) == Status.NONFINITE).tolist() == failed
    assert not np.asarray(batch.exact)[:2].any()
    for mine, theirs in zip(jax.tree.leaves(batch), jax.tree.leaves(good), strict=True):
        np.testing.assert_array_equal(mine[2:], theirs[2:])
    for method in (
        lambda density: density.trace(jnp.sign),
        lambda density: density.count_above(0.5),
        lambda density: density.count_below(0.5),
    ):
        estimate = jax.vmap(method)(batch)
        assert np.isnan(np.asarray(estimate.value)).tolist() == failed
        np.testing.assert_array_equal(estimate.status, batch.status)
    bias = jax.vmap(lambda density: density.count_bias(0.5))(batch)
    assert np.isnan(np.asarray(bias)).tolist() == failed
    with pytest.raises(InputError, match=r"nodes: expected \[m, steps\]"):
        batch.count_above(0.5)


def test_chunks_batches_and_traces():
    """Chunks, a loop, and a batch give the same; the operator is traced twice."""
    traces = 0
    scale = jnp.arange(12.0).reshape(3, 4)

    def matvec(v):
        nonlocal traces
        traces += 1
        return scale * v

    @functools.partial(jax.jit, static_argnames="chunk_size")
    def run(key, chunk_size):
        return spectral_density(matvec, scale, key, 10, 4, chunk_size=chunk_size)

    keys = jax.random.split(KEY, 2)
    whole = run(keys[0], 16)
    assert traces <= 3
    run(keys[1], 16)
    assert traces <= 3
    batch = jax.vmap(functools.partial(run, chunk_size=3))(keys)
    np.testing.assert_allclose(batch.nodes[0], whole.nodes, atol=1e-4)
    np.testing.assert_allclose(batch.weights[0], whole.weights, atol=1e-3)
    assert not np.allclose(batch.nodes[1], whole.nodes, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("num_probes", {"num_probes": 1}),
        ("num_steps", {"num_steps": 0}),
        ("chunk_size", {"chunk_size": 0}),
        ("like", {"like": jnp.zeros(3, jnp.int32)}),
        ("like", {"like": jnp.zeros(3, jnp.float16)}),
        ("matvec", {"matvec": lambda v: v[:2]}),
        ("probes", {"probes": lambda key, num, like: jnp.zeros((num, 2))}),
    ],
)
def test_bad_input_is_named(name, arguments):
    defaults = {
        "matvec": lambda v: v,
        "like": jnp.zeros(3),
        "key": KEY,
        "num_probes": 4,
        "num_steps": 2,
    }
    with pytest.raises(InputError, match=f"^{name}: expected "):
        getattr(spectral_density, "__wrapped__", spectral_density)(**(defaults | arguments))
