"""Randomized traces: exact values, honest error bars, twins from the papers, hard operators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import t as student

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.linalg.probes import gaussian, orthonormal, rademacher, sphere
from memjax.linalg.trace import trace_hutchinson, trace_hutchpp, trace_xnystrace, trace_xtrace

ESTIMATORS = {
    "hutchinson": trace_hutchinson,
    "orthonormal": functools.partial(trace_hutchinson, probes=orthonormal),
    "hutchpp": trace_hutchpp,
    "xtrace": trace_xtrace,
    "xnystrace": trace_xnystrace,
}
D, BUDGET = 40, 16


@functools.cache
def compiled(name, d, budget, dtype):
    def one(a, key):
        return ESTIMATORS[name](lambda v: a @ v, jnp.zeros(d, dtype), key, budget)

    by_key = jax.vmap(one, in_axes=(None, 0))
    return jax.jit(jax.vmap(by_key, in_axes=(0, None)))


def run(name, a, keys, budget=BUDGET):
    """Estimates [a, b] of matrices [a, d, d] with keys [b]: one program for each shape."""
    return compiled(name, a.shape[-1], budget, a.dtype.name)(jnp.asarray(a), keys)


def keys(num, seed=0):
    return jax.random.split(jax.random.key(seed), num)


def rotated(spectrum, rng):
    """Symmetric matrix of a given spectrum in a random basis."""
    q = np.linalg.qr(rng.standard_normal((len(spectrum), len(spectrum))))[0]
    a = (q * spectrum) @ q.T
    return (a + a.T) / 2


INDEX = np.arange(D)
SPECTRA = {
    "flat": np.linspace(0.5, 1.5, D),
    "geometric": 0.9**INDEX,
    "power 1": 1 / (INDEX + 1.0),
    "power 1/2": (INDEX + 1.0) ** -0.5,
    "two levels": np.where(INDEX < 12, 1.0, 0.1),
}


def operators(name, bases, seed):
    """[spectra, bases, D, D]: each spectrum in random bases, indefinite and skewed ones too."""
    rng = np.random.default_rng(seed)
    families = [[rotated(spectrum, rng) for _ in range(bases)] for spectrum in SPECTRA.values()]
    if name != "xnystrace":
        signs = np.where(INDEX % 3 == 0, -1, 1) * SPECTRA["flat"]
        families.append([rotated(signs, rng) for _ in range(bases)])
        skew = rng.standard_normal((bases, D, D)) / D
        skew -= np.swapaxes(skew, 1, 2)
        families.append([rotated(SPECTRA["geometric"], rng) + part for part in skew])
    return np.array(families)


def errors_and_estimates(name, a, keys, budget):
    out = run(name, a, keys, budget)
    assert not np.any(out.status)
    trace = np.trace(a, axis1=1, axis2=2)[:, None]
    return np.asarray(out.value) - trace, out, trace


def bias_in_standard_errors(error):
    return np.abs(error.mean(1)) / (error.std(1, ddof=1) / np.sqrt(error.shape[1]))


def check_error_bars(name, bases, seed, num_keys=200):
    """Every operator: mean bias below 4 standard errors. Every family: 92-98 % covered.

    One in 10,000 unbiased means lies 4 standard errors off. An operator where that happens gets
    20 times as many fresh keys, which would show any bias there is 4.5 times as clearly.
    """
    # Forms of few eigenvalues are skew; their mean takes more of them to become normal.
    budget = 2 * BUDGET if name in ("hutchinson", "orthonormal") else BUDGET
    families = operators(name, bases, seed)
    for a in families:
        error, out, trace = errors_and_estimates(name, a, keys(num_keys, seed), budget)
        for i in np.flatnonzero(bias_in_standard_errors(error) >= 4):
            again = keys(20 * num_keys, 1000 + seed)
            fresh, *_ = errors_and_estimates(name, a[i : i + 1], again, budget)
            assert bias_in_standard_errors(fresh) < 4
        low, high = out.interval(0.95)
        covered = np.mean((low <= trace) & (trace <= high))
        assert 0.92 <= covered <= 0.98, covered
    return families.shape[0] * families.shape[1]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_error_bars_are_honest(x64, name):
    """The five together: 264 operators in 33 families, 200 keys each."""
    assert check_error_bars(name, bases=8, seed=1) >= 40


@pytest.mark.nightly
@pytest.mark.parametrize("name", ESTIMATORS)
def test_error_bars_are_honest_on_many_operators(x64, name):
    """The five together: 2,640 operators."""
    assert check_error_bars(name, bases=80, seed=2) >= 400


def projector(columns):
    """Orthogonal projector onto the span of the columns, and its dimension."""
    if columns.shape[1] == 0:
        return np.zeros((len(columns), len(columns))), 0
    q = np.linalg.qr(columns)[0]
    return q @ q.T, columns.shape[1]


def xtrace_term(a, w, i, missed):
    """One leave-one-out estimate, from an explicit QR factorization of the columns in use."""
    d, k = w.shape
    used = [j for j in range(k) if j not in missed]
    p, rank = projector(a @ w[:, used])
    rest = np.eye(d) - p
    u = rest @ w[:, i]
    return np.trace(p @ a @ p) + (d - rank) / (u @ u) * (u @ a @ u)


def xnystrace_term(a, w, i, missed):
    """The same with a Nystrom approximation, whose error vanishes on the columns in use."""
    d, k = w.shape
    used = [j for j in range(k) if j not in missed]
    y = a @ w[:, used]
    approximation = y @ np.linalg.solve(w[:, used].T @ y, y.T) if used else np.zeros_like(a)
    p, rank = projector(w[:, used])
    u = w[:, i] - p @ w[:, i]
    rest = w[:, i] @ (a - approximation) @ w[:, i]
    return np.trace(approximation) + (d - rank) / (u @ u) * rest


def naive(term, a, w, frame):
    """Mean and standard error of leave-one-out estimates, everything in loops."""
    d, k = w.shape
    t = np.array([term(a, w, i, {i}) for i in range(k)])
    both = np.array([[term(a, w, i, {i, j}) for j in range(k)] for i in range(k)])
    pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
    covariance = np.mean([(t[i] - both[i, j]) * (t[j] - both[j, i]) for i, j in pairs])
    if frame:
        covariance += np.mean([(both[i, j] - both[j, i]) ** 2 for i, j in pairs]) / (
            2 * (d - k + 2)
        )
    covariance = abs(covariance) if frame else max(covariance, 0)
    return t.mean(), np.sqrt(t.var(ddof=1) / k + covariance)


def twin_operators(name):
    rng = np.random.default_rng(3)
    a = [rotated(s, rng) for s in (SPECTRA["flat"], 0.7**INDEX, 1 / (INDEX + 1.0))]
    a.append(np.eye(D) / 3)
    if name == "xnystrace":
        return np.array([*a, rotated(SPECTRA["power 1/2"], rng), rotated(0.9**INDEX, rng)])
    return np.array([*a, rotated(np.linspace(-1, 1, D), rng), rng.standard_normal((D, D))])


@pytest.mark.parametrize("name", ["xtrace", "xnystrace"])
def test_against_a_naive_twin(x64, name):
    a = twin_operators(name)
    out = run(name, a, keys(8, 4))
    for j, key in enumerate(keys(8, 4)[:2]):
        if name == "xtrace":
            w, term = sphere(key, BUDGET // 2, jnp.zeros(D)), xtrace_term
        else:
            w, term = orthonormal(key, BUDGET, jnp.zeros(D)), xnystrace_term
        for i, dense in enumerate(a):
            value, error = naive(term, dense, np.asarray(w).T, name == "xnystrace")
            np.testing.assert_allclose(out.value[i, j], value, rtol=1e-8)
            np.testing.assert_allclose(out.standard_error[i, j], error, rtol=1e-6, atol=1e-12)


def test_hutchpp_against_a_naive_twin(x64):
    a = twin_operators("hutchpp")
    out = run("hutchpp", a, keys(8, 4))
    k, r = 5, 6
    for j, key in enumerate(keys(8, 4)[:2]):
        for_range, for_rest = jax.random.split(key)
        s = np.asarray(sphere(for_range, k, jnp.zeros(D))).T
        g = np.asarray(sphere(for_rest, r, jnp.zeros(D))).T
        for i, dense in enumerate(a):
            p, _ = projector(dense @ s)
            g_rest = np.linalg.qr(g - p @ g)[0]
            rest = (D - k) * np.einsum("ir,ij,jr->r", g_rest, dense, g_rest)
            value = np.trace(p @ dense @ p) + rest.mean()
            np.testing.assert_allclose(out.value[i, j], value, rtol=1e-10)
            error = np.sqrt(rest.var(ddof=1) / r * (1 - r / (D - k)))
            np.testing.assert_allclose(out.standard_error[i, j], error, rtol=1e-8, atol=1e-12)


HARD = {
    "zero": np.zeros(D),
    "identity": np.ones(D),
    "minus identity": -np.ones(D),
    "rank 1": np.eye(D)[0],
    "rank 2": np.eye(D)[:2].sum(0),
    "rank 4": 2.0 ** -np.arange(D) * (np.arange(D) < 4),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_degenerate_operators_are_ordinary_input(x64, name, dtype):
    rng = np.random.default_rng(6)
    a = np.array([rotated(spectrum, rng) for spectrum in HARD.values()], dtype=dtype)
    out = run(name, a, keys(8, 7))
    exact = np.trace(a.astype(float), axis1=1, axis2=2)
    for i, kind in enumerate(HARD):
        assert out.value.dtype == out.standard_error.dtype == dtype
        if name == "xnystrace" and kind == "minus identity":
            assert np.all(out.status[i] == Status.INDEFINITE)
            assert np.all(np.isfinite(out.value[i]))
            assert np.all(np.isinf(out.standard_error[i]))
            continue
        assert np.all(out.status[i] == Status.OK), kind
        assert np.all(np.isfinite(out.standard_error[i])), kind
        error = np.abs(np.asarray(out.value[i], float) - exact[i])
        # Hutchinson's mean is exact for c I, when the probes are on a sphere; not at low rank.
        if "rank" in kind and name in ("hutchinson", "orthonormal"):
            low, high = (end[i] for end in out.interval(0.9999))
            assert np.all((low <= exact[i]) & (exact[i] <= high)), kind
            continue
        eps = np.finfo(dtype).eps
        assert np.all(error <= 200 * D * eps), (kind, error)
        allowed = (3 * BUDGET if name == "xnystrace" else 10) * D * eps
        assert np.all(out.standard_error[i] <= allowed), (kind, out.standard_error[i])


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_any_scale(x64, name, scale):
    """Squares of these overflow, or vanish, in single precision: the error bar must not."""
    rng = np.random.default_rng(8)
    spectra = [*SPECTRA.values(), SPECTRA["flat"]]
    a = np.array([rotated(spectrum, rng) for spectrum in spectra], dtype=np.float32)
    unit = run(name, a, keys(8, 9))
    scaled = run(name, a * np.float32(scale), keys(8, 9))
    np.testing.assert_allclose(scaled.value / np.float32(scale), unit.value, rtol=1e-3)
    error = scaled.standard_error / np.float32(scale)
    np.testing.assert_allclose(error, unit.standard_error, rtol=1e-2)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_non_finite_products_say_so(x64, name):
    rng = np.random.default_rng(10)
    a = np.array([rotated(SPECTRA["flat"], rng) for _ in HARD])
    a[1, 3, 4], a[2, 0, 0], a[3] = np.nan, np.inf, -np.inf
    out = run(name, a, keys(8, 7))
    expected = np.where(np.isin(np.arange(len(a)), [1, 2, 3]), Status.NONFINITE, Status.OK)
    np.testing.assert_array_equal(out.status, np.repeat(expected[:, None], 8, axis=1))
    np.testing.assert_array_equal(np.isnan(out.value), out.status != Status.OK)
    np.testing.assert_array_equal(np.isnan(out.standard_error), out.status != Status.OK)


def test_a_direction_that_rounding_makes_negative_is_not_indefinite(x64):
    rng = np.random.default_rng(11)
    tail = np.where(INDEX < 5, 1.0, -1e-15)
    a = np.array([rotated(tail, rng), rotated(tail - 1e-3, rng)] * 3)
    out = run("xnystrace", a, keys(8, 7))
    assert np.all(out.status[::2] == Status.OK)
    assert np.all(out.status[1::2] == Status.INDEFINITE)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1, 2)])
def test_a_budget_for_all_directions_is_answered_exactly(x64, shape):
    d = int(np.prod(shape))
    a = jnp.asarray(np.random.default_rng(12).standard_normal((d, d)))
    like = jnp.zeros(shape)

    def matvec(v):
        return (a @ v.reshape(-1)).reshape(v.shape)

    @jax.jit
    def run(key):
        budgets = {name: max(d, 4) for name in ESTIMATORS if name != "hutchinson"}
        return {n: ESTIMATORS[n](matvec, like, key, m) for n, m in budgets.items()}

    for out in run(jax.random.key(0)).values():
        np.testing.assert_allclose(out.value, jnp.trace(a), rtol=1e-12)
        assert out.value.shape == ()
        assert out.standard_error == 0
        assert out.num_products == d
        assert out.degrees_of_freedom == np.inf
        low, high = out.interval()
        assert low == high == out.value


def test_one_product_has_no_error_bar():
    out = trace_hutchinson(lambda v: 2 * v, jnp.zeros(3), jax.random.key(0), 1)
    np.testing.assert_allclose(out.value, 6.0, rtol=1e-6)
    assert out.standard_error == jnp.inf
    assert out.degrees_of_freedom == 0
    assert out.interval() == (-np.inf, np.inf)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_counts_its_products_and_traces_once(name):
    """An odd budget leaves XTrace with one product that it does not use, and says so."""
    used = 10 if name == "xtrace" else 11
    calls, traced = [], []

    def matvec(scale, v):
        jax.debug.callback(lambda: calls.append(1))
        return scale * v

    @jax.jit
    def estimate(scale, key):
        traced.append(1)
        return ESTIMATORS[name](lambda v: matvec(scale, v), scale, key, 11, chunk_size=1)

    for i, key in enumerate(keys(3)):
        out = estimate(i + jnp.arange(1.0, 31.0).reshape(5, 3, 2), key)
        assert out.num_products == used
    jax.effects_barrier()
    assert len(calls) == 3 * used
    assert len(traced) == 1


def rms(name, a, budget, keys):
    out = run(name, a, keys, budget)
    error = np.asarray(out.value) - np.trace(a, axis1=1, axis2=2)[:, None]
    return np.sqrt(np.mean(error**2))


def test_hutchinson_converges_like_one_over_root_m(x64):
    a = rotated(SPECTRA["flat"], np.random.default_rng(13))[None]
    few, many = (rms("hutchinson", a, m, keys(600, 14)) for m in (4, 256))
    assert abs(np.log(many / few) / np.log(256 / 4) + 0.5) < 0.05


def test_low_rank_methods_converge_with_the_spectrum(x64):
    """Geometric decay 0.6^i: each further vector in the basis takes off a constant factor."""
    rng = np.random.default_rng(13)
    a = np.array([rotated(0.6**INDEX, rng) for _ in HARD])
    few = {name: rms(name, a, BUDGET, keys(8, 7)) for name in ESTIMATORS}
    assert few["hutchpp"] < 0.3 * few["hutchinson"]
    assert few["xtrace"] < 0.1 * few["hutchinson"]
    assert few["xnystrace"] < 0.02 * few["hutchinson"]
    # Half of XTrace's products widen its basis, all of XNysTrace's.
    assert rms("xtrace", a, 28, keys(8, 7)) < 3 * 0.6**6 * few["xtrace"]
    assert rms("xnystrace", a, 28, keys(8, 7)) < 3 * 0.6**12 * few["xnystrace"]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_shape_transforms_and_chunks_change_nothing(x64, name):
    rng = np.random.default_rng(15)
    a = np.array([rotated(SPECTRA["power 1"], rng) for _ in HARD])
    batched = run(name, a, keys(8, 16))
    shape = (5, 4, 2)

    @jax.jit
    def alone(a, key):
        def matvec(v):
            return (a @ v.reshape(-1)).reshape(v.shape)

        like = jnp.full(shape, jnp.nan)
        return ESTIMATORS[name](matvec, like, key, BUDGET, chunk_size=3)

    for i, j in ((0, 0), (2, 5)):
        one = alone(a[i], keys(8, 16)[j])
        for found, expected in zip(one, batched, strict=True):
            assert found.shape == ()
            np.testing.assert_allclose(found, expected[i, j], rtol=1e-9)
    assert len(np.unique(batched.value)) == batched.value.size


def test_hutchinson_is_differentiable(x64):
    """d/dA of the mean of v^T A v is the mean of v v^T."""
    a = jnp.asarray(np.random.default_rng(17).standard_normal((5, 5)))
    key = jax.random.key(3)

    def value(a):
        return trace_hutchinson(lambda v: a @ v, jnp.zeros(5), key, 6, chunk_size=4).value

    v = rademacher(key, 6, jnp.zeros(5))
    np.testing.assert_allclose(jax.grad(value)(a), v.T @ v / 6, rtol=1e-12)


def test_gaussian_probes_see_the_identity_others_do_not():
    @jax.jit
    def errors(key):
        out = [
            trace_hutchinson(lambda v: v, jnp.zeros(9), key, 5, probes=probes)
            for probes in (gaussian, sphere, rademacher)
        ]
        return [estimate.standard_error for estimate in out]

    by_gaussian, by_sphere, by_signs = errors(jax.random.key(0))
    assert by_gaussian > 0.1
    assert by_sphere < 1e-5
    assert by_signs == 0


def test_half_precision_is_summed_in_single():
    out = trace_hutchinson(lambda v: 2 * v, jnp.zeros(50, jnp.bfloat16), jax.random.key(0), 8)
    assert out.value.dtype == jnp.float32
    np.testing.assert_allclose(out.value, 100, rtol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_products": 0}, "num_products: expected a whole number at least"),
        ({"like": jnp.zeros(4, jnp.int32)}, "like: expected a floating-point array, got dtype int"),
        ({"like": jnp.zeros(0)}, "like: expected at least one entry"),
        ({"matvec": lambda v: v[:2]}, "matvec: expected A v like v, float.*4., got float.*2."),
        ({"matvec": lambda v: v.astype(jnp.float16)}, "matvec: expected A v like v, .*got float16"),
        ({"matvec": lambda v: (v, v)}, "matvec: expected A v like v, .*got tuple"),
        ({"chunk_size": 0}, "chunk_size: expected a positive number"),
    ],
)
@pytest.mark.parametrize("name", ["hutchinson", "hutchpp", "xtrace", "xnystrace"])
def test_bad_input(name, change, message):
    given = {"matvec": lambda v: v, "like": jnp.zeros(4), "num_products": 4} | change
    estimator = ESTIMATORS[name]
    with pytest.raises(InputError, match=message):
        getattr(estimator, "__wrapped__", estimator)(key=jax.random.key(0), **given)


def test_interval_is_students():
    a = jnp.asarray(np.random.default_rng(18).standard_normal((5, 5)), jnp.float32)
    out = trace_hutchinson(lambda v: a @ v, jnp.zeros(5, jnp.float32), jax.random.key(0), 4)
    low, high = out.interval(0.9)
    value, half = float(out.value), student.ppf(0.95, 3) * float(out.standard_error)
    np.testing.assert_allclose([low, high], [value - half, value + half], rtol=1e-5)
