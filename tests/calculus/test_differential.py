"""Divergence, Laplacian, Hessian, curl and asymmetry against closed forms and dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import t as student

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.calculus.differential import (
    asymmetry,
    asymmetry_exact,
    curl,
    divergence,
    hessian,
    laplacian,
)
from memjax.calculus.linearization import linearize
from memjax.densities import GaussianMixture

SIGMA = 0.3


def mixture(dtype):
    rng = np.random.default_rng(0)
    means = jnp.asarray(rng.normal(size=(3, 2, 3)), dtype)
    return GaussianMixture([0.2, 0.5, 0.3], means, rng.uniform(0.2, 1, (3, 2, 3)))


def points(dtype, num=8, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(num, 2, 3)), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_derivatives_of_a_log_density(x64, dtype):
    """Automatic derivatives of log p and of its score against the closed forms."""

    @jax.jit
    def everything(density, xs):
        def one(x):
            def log_density(x):
                return density.log_prob(x, SIGMA)

            def score(x):
                return density.score(x, SIGMA)

            ours = (
                hessian(log_density, chunk_size=4)(x),
                laplacian(log_density, chunk_size=4)(x),
                divergence(score, chunk_size=4)(x),
            )
            exact = density.hessian(x, SIGMA), density.laplacian(x, SIGMA)
            return *ours, *exact, curl(score)(x)

        return jax.vmap(one)(xs)

    ours_h, ours_l, div, h, lap, rotation = everything(mixture(dtype), points(dtype))
    assert {a.dtype for a in (ours_h, ours_l, div, rotation)} == {jnp.dtype(dtype)}
    scale = float(jnp.abs(h).max())
    close = {"rtol": 0, "atol": (1e-5 if dtype == jnp.float32 else 1e-13) * scale}
    np.testing.assert_allclose(ours_h, h, **close)
    np.testing.assert_allclose(ours_l, lap, **close)
    np.testing.assert_allclose(div, lap, **close)
    np.testing.assert_allclose(rotation, jnp.zeros_like(h), **close)


def test_hessian_is_that_of_jax_in_every_chunking(x64):
    def u(x):
        return jnp.sum(jnp.sin(x[0]) * x[1] ** 3) + x[0, 0] * x[1, 2]

    sizes = (1, 4, 256, None)
    expected, *found = jax.jit(
        lambda x: [jax.hessian(u)(x), *(hessian(u, chunk_size=c)(x) for c in sizes)]
    )(points(jnp.float64)[0])
    for ours in found:
        np.testing.assert_allclose(ours, expected.reshape(6, 6), rtol=1e-14, atol=1e-14)


def test_divergence_against_central_differences(x64):
    w = np.random.default_rng(2).normal(size=(6, 6))

    def field(x):
        return jnp.tanh(jnp.asarray(w) @ x.reshape(-1)).reshape(x.shape)

    x = points(jnp.float64)[0]
    flat, h = np.asarray(x).ravel(), 1e-6
    steps = h * np.eye(6)
    rows = np.tanh((flat + steps) @ w.T) - np.tanh((flat - steps) @ w.T)
    found = divergence(field)(x)
    np.testing.assert_allclose(found, np.trace(rows) / (2 * h), rtol=1e-8)
    np.testing.assert_allclose(curl(field)(x), (rows.T - rows) / (2 * h), rtol=1e-6, atol=1e-9)


def test_the_classical_curl(x64):
    """f = omega cross x has curl 2 omega, read off as documented."""
    omega = jnp.asarray([0.3, -1.0, 2.0])
    c = curl(lambda x: jnp.cross(omega, x))(jnp.ones(3))
    np.testing.assert_allclose(jnp.stack([c[2, 1], c[0, 2], c[1, 0]]), 2 * omega, rtol=1e-15)
    np.testing.assert_array_equal(c, -c.T)


# Asymmetry.


def parts_of(rng, d):
    """Symmetric and antisymmetric random matrices."""
    a, b = rng.normal(size=(2, d, d))
    return a + a.T, b - b.T


def linear(matrix, shape=None):
    x = jnp.zeros(shape or len(matrix), matrix.dtype)
    return linearize(lambda x: (matrix @ x.reshape(-1)).reshape(x.shape), x)


def test_exact_asymmetry_is_the_share_of_the_antisymmetric_part(x64):
    rng = np.random.default_rng(0)
    symmetric, skew = parts_of(rng, 6)
    for share in (0.0, 0.09, 0.5, 1.0):
        a = np.sqrt(1 - share**2) * symmetric / np.linalg.norm(symmetric)
        b = share * skew / np.linalg.norm(skew)
        found = asymmetry_exact(linear(jnp.asarray(a + b), (2, 3)))
        np.testing.assert_allclose(found, share, atol=1e-15)
    assert asymmetry_exact(linear(jnp.zeros((4, 4)))) == 0


@pytest.fixture(scope="module")
def estimates():
    """Estimates of three Jacobians, 400 keys each, 16 and 64 probes; and the exact answers."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        d = 12
        scaled = np.diag(10 ** np.linspace(0, 1, d))
        symmetric, skew = parts_of(rng, d)
        matrices = [scaled @ symmetric + 0.3 * skew, symmetric + skew, 5 * scaled + 0.4 * skew]
        matrices = jnp.asarray(np.stack(matrices))
        exact = np.asarray(jax.jit(jax.vmap(lambda m: asymmetry_exact(linear(m))))(matrices))
        keys = jax.random.split(jax.random.key(0), 400)

        def run(num):
            over_keys = jax.vmap(lambda m, k: asymmetry(linear(m), k, num), in_axes=(None, 0))
            return jax.tree.map(np.asarray, jax.jit(jax.vmap(over_keys, (0, None)))(matrices, keys))

        return exact, {num: run(num) for num in (16, 64)}


def test_estimated_asymmetry_has_an_honest_error_bar(estimates):
    exact, runs = estimates
    for num, found in runs.items():
        error = found.value - exact[:, None]
        spread = found.value.std(axis=1, ddof=1)
        # The delta method ignores terms of relative order 1/num.
        np.testing.assert_allclose(
            np.sqrt((found.standard_error**2).mean(axis=1)), spread, rtol=0.1 + 2 / num
        )
        bias = np.abs(error.mean(axis=1))
        assert (bias < 4 * spread / np.sqrt(400) + exact / num).all()
        half = student.ppf(0.975, num - 1) * found.standard_error
        covered = (np.abs(error) <= half).mean(axis=1)
        assert (covered > 0.90).all()
        assert (covered < 0.985).all()
        assert (found.status == Status.OK).all()
        assert (found.num_products == 2 * num).all()
        assert (found.degrees_of_freedom == num - 1).all()
    ratio = runs[16].value.std(axis=1) / runs[64].value.std(axis=1)
    np.testing.assert_allclose(ratio, 2, rtol=0.15)


def test_named_cases_of_asymmetry():
    """Symmetric, antisymmetric, zero, one-dimensional, huge and broken Jacobians."""
    key = jax.random.key(1)
    rotation = jnp.asarray([[0.0, -1.0], [1.0, 0.0]])
    cases = jnp.stack(
        [
            jnp.eye(2),
            rotation,
            jnp.zeros((2, 2)),
            1e15 * (jnp.eye(2) + rotation),
            jnp.nan * rotation,
        ]
    )
    found = jax.jit(jax.vmap(lambda m: asymmetry(linear(m), key, 4)))(cases)
    np.testing.assert_allclose(found.value, [0, 1, 0, np.sqrt(0.5), np.nan], rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, [0, 0, 0, 0, np.nan], atol=1e-6)
    assert found.status.tolist() == [0, 0, 0, 0, Status.NONFINITE]
    assert asymmetry(linear(jnp.full((1, 1), -3.0)), key, 2).value == 0


# Transformations and bad input.


def test_compiled_equals_eager_and_traces_once():
    weights = jnp.asarray(np.random.default_rng(4).normal(size=(6, 6)), jnp.float32)
    xs, key = points(jnp.float32), jax.random.key(0)
    traces = []

    def everything(weights, x):
        traces.append(1)

        def field(x):
            return jnp.tanh(weights @ x.reshape(-1)).reshape(x.shape)

        return divergence(field)(x), curl(field)(x), asymmetry(linearize(field, x), key, 4).value

    run = jax.jit(jax.vmap(everything, (None, 0)))
    for shift in (0.0, 0.5):
        compiled = run(weights, xs + shift)
    assert len(traces) == 1
    for ours, eager in zip(compiled, everything(weights, xs[3] + 0.5), strict=True):
        np.testing.assert_allclose(ours[3], eager, rtol=1e-5, atol=1e-6)


def test_divergence_is_differentiable(x64):
    """grad div f against the closed form of f = -x^3."""
    x = points(jnp.float64)[0]
    np.testing.assert_allclose(jax.grad(divergence(lambda x: -(x**3)))(x), -6 * x, rtol=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: divergence(lambda x: x[:1])(jnp.ones(2)), r"field: expected f\(x\) like x"),
        (lambda: curl(lambda x: x[0])(jnp.ones(2)), r"field: expected f\(x\) like x"),
        (lambda: divergence(lambda x: x, chunk_size=0)(jnp.ones(2)), "chunk_size: expected a pos"),
        (lambda: laplacian(lambda x: x)(jnp.ones(2)), r"log_density: expected one number, .*\[2\]"),
        (lambda: hessian(lambda x: (x, x))(jnp.ones(2)), "log_density: expected .*, got tuple"),
        (
            lambda: hessian(lambda x: jnp.sum(x).astype(jnp.float16))(jnp.ones(2)),
            r"log_density: expected one number, float(32|64)\[\], got float16\[\]",
        ),
        (lambda: asymmetry(linear(jnp.eye(2)), jax.random.key(0), 0), "num_probes: .* at least 2"),
        (lambda: asymmetry(linear(jnp.eye(2)), jax.random.key(0), 1), "num_probes: .* at least 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
