"""Spectra against closed forms and NumPy; the matrix-free ones against the dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.densities import GaussianMixture
from memjax.detect import (
    FLIPD,
    BelowFloor,
    EffectiveDimension,
    ExtremeEigenvalue,
    FloorShare,
    NegativeShare,
    Sharpness,
    SharpnessProxy,
    cost,
    evaluate_detectors,
)

KEY = jax.random.key(4)
STDS = np.array([2.0, 1.0, 0.5, 0.1, 0.0, 0.0])


def spectral(sigma, **kwargs):
    return (
        Sharpness(sigma, **kwargs),
        Sharpness(sigma, order=1, **kwargs),
        NegativeShare(sigma, threshold=0.5, **kwargs),
        FloorShare(sigma, window=0.3, **kwargs),
        BelowFloor(sigma, **kwargs),
        ExtremeEigenvalue(sigma, **kwargs),
        ExtremeEigenvalue(sigma, which="smallest", **kwargs),
    )


def expected_of(eigenvalues, sigma):
    """Value and raw of ``spectral`` by NumPy."""
    z, d = sigma**2 * eigenvalues, len(eigenvalues)
    counts = [np.sum(z < -0.5), np.sum(z <= -0.7), np.sum(z < -1.01)]
    ends = [np.max(eigenvalues), np.min(eigenvalues)]
    values = [-np.sum(z**3) / d, -np.sum(z) / d, *(c / d for c in counts)]
    values += [-(1 + sigma**2 * end) for end in ends]
    return values, [np.sum(eigenvalues**3), np.sum(eigenvalues), *counts, *ends]


def run(score, x, detectors):
    return jax.jit(lambda x: evaluate_detectors(score, x, detectors, key=KEY))(x)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 1)])
def test_closed_forms_of_a_gaussian(x64, shape):
    sigma = 0.4
    variance = jnp.asarray(STDS**2 + sigma**2).reshape(shape)
    found = run(
        lambda x, sigma, condition=None: -x / variance,
        jnp.linspace(-1, 1, 6).reshape(shape),
        spectral(sigma),
    )
    values, raws = expected_of(-1 / (STDS**2 + sigma**2), sigma)
    for one, value, raw in zip(found, values, raws, strict=True):
        np.testing.assert_allclose([one.value, one.raw], [value, raw], rtol=1e-12, atol=1e-14)
        assert one.standard_error == 0
        assert one.status == Status.OK
    assert found[4].raw == 0


@pytest.mark.parametrize("kind", ["clean", "noised"])
def test_a_mixture_against_its_own_hessian(x64, kind):
    rng, sigma = np.random.default_rng(3), 0.6
    density = GaussianMixture([0.5, 0.3, 0.2], jnp.asarray(rng.normal(size=(3, 6))), 0.2)
    x = jnp.asarray(rng.normal(size=6))
    detectors = spectral(sigma, kind=kind, num_draws=3)
    draws = [jax.random.normal(derive_key(KEY, "draw", j), (6,)) for j in range(3)]
    points = [x] if kind == "clean" else [x + sigma * n for n in draws]
    spectra = [np.linalg.eigvalsh(density.hessian(p, sigma)) for p in points]
    each = np.array([expected_of(spectrum, sigma) for spectrum in spectra])
    for i, one in enumerate(run(density.score, x, detectors)):
        np.testing.assert_allclose([one.value, one.raw], each[:, :, i].mean(0), atol=1e-9)
        if kind == "noised":
            error = np.std(each[:, 0, i], ddof=1) / 3**0.5
            np.testing.assert_allclose(one.standard_error, error, atol=1e-9)


def skewed(d, seed):
    """A Jacobian with pinned, nearly free and one free direction, not symmetric; sigma is 1."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    z = np.where(np.arange(d) < d // 3, -0.1 * rng.random(d), -1 + 0.05 * rng.normal(size=d))
    z[0] = 0.4
    return (basis * z) @ basis.T + 0.03 * (lambda a: a - a.T)(rng.normal(size=(d, d)) / d**0.5)


@pytest.mark.parametrize("d", [64, pytest.param(256, marks=pytest.mark.nightly)])
def test_without_the_matrix(d):
    """Lanczos bounds hold, and sums are within their errors, on many asymmetric Jacobians."""
    count = 12
    jacobians = np.stack([skewed(d, seed) for seed in range(count)])
    detectors = (
        *(Sharpness(1.0, exact_limit=0, order=order) for order in (1, 3)),
        NegativeShare(1.0, exact_limit=0, threshold=0.5),
        FloorShare(1.0, exact_limit=0, window=0.5),
        ExtremeEigenvalue(1.0, exact_limit=0),
        ExtremeEigenvalue(1.0, exact_limit=0, which="smallest"),
    )

    def one(jacobian, key):
        def score(x, sigma, condition=None):
            return jnp.einsum("ij,j->i", jacobian, x, precision="highest")

        return evaluate_detectors(score, jnp.ones(d), detectors, key=key)

    keys = jax.random.split(KEY, count)
    found = jax.jit(jax.vmap(one))(jnp.asarray(jacobians, jnp.ones(()).dtype), keys)
    spectra = np.linalg.eigvalsh((jacobians + jacobians.transpose(0, 2, 1)) / 2)
    exact = [
        -np.mean(spectra, 1),
        -np.mean(spectra**3, 1),
        np.mean(spectra < -0.5, 1),
        np.mean(spectra <= -0.5, 1),
    ]
    for estimate, truth in zip(found[:4], exact, strict=True):
        t = (np.asarray(estimate.value) - truth) / np.asarray(estimate.standard_error)
        assert np.max(np.abs(t)) < 5  # Student's t of 15 degrees of freedom
        assert np.max(estimate.standard_error) < 0.05
    for estimate, end in zip(found[4:], (spectra[:, -1], spectra[:, 0]), strict=True):
        assert np.all(np.asarray(estimate.status) == Status.OK)
        off = np.abs(np.asarray(estimate.raw) - end)
        assert np.all(off <= np.asarray(estimate.standard_error) + 1e-5)
    assert np.max(found[4].standard_error) < 1e-3  # the free direction stands alone


def test_a_trace_follows_from_the_quadrature():
    """The same random signs: nothing more is paid, and the number is what it is alone."""
    jacobian = jnp.asarray(skewed(64, 0), jnp.ones(()).dtype)
    quadrature, trace = Sharpness(1.0, exact_limit=0), FLIPD(1.0, num_probes=16)
    other = FLIPD(1.0, num_probes=15)
    assert cost((trace, quadrature), 64) == cost((quadrature,), 64) == Cost(1, 256, 256)
    assert cost((other, quadrature), 64) == Cost(1, 256 + 15, 256)

    def score(x, sigma, condition=None):
        return jnp.matmul(jacobian, x, precision="highest")

    x = jnp.linspace(-0.2, 0.2, 64)
    beside = run(score, x, (trace, other, quadrature))[:2]
    for detector, shared in zip((trace, other), beside, strict=True):
        (alone,) = run(score, x, (detector,))
        assert alone.standard_error > 0
        np.testing.assert_allclose(shared.value, alone.value, rtol=1e-5)
        np.testing.assert_allclose(shared.standard_error, alone.standard_error, rtol=1e-4)
    assert beside[0].value != beside[1].value


def test_too_few_products_are_a_status():
    jacobian = jnp.asarray(skewed(64, 0), jnp.ones(()).dtype)
    detector = ExtremeEigenvalue(1.0, exact_limit=0, num_products=3, which="smallest")
    (found,) = run(
        lambda x, sigma, condition=None: jnp.matmul(jacobian, x, precision="highest"),
        jnp.ones(64),
        (detector,),
    )
    assert found.status == Status.NOT_CONVERGED
    assert np.isnan(found.value)


def test_proxies_have_the_expectations_of_the_lemmas(x64):
    """E|s|^2 = -tr H for any density; E|H s|^2 = -tr H^3 for a Gaussian."""
    sigma, count = 0.5, 20_000
    detectors = tuple(SharpnessProxy(sigma, num_draws=1, order=order) for order in (1, 3))
    variance = jnp.asarray(STDS**2 + sigma**2)
    data = np.random.default_rng(0).normal(size=(count, 6)) * STDS
    keys = jax.random.split(KEY, count)
    found = jax.jit(
        jax.vmap(
            lambda x, key: evaluate_detectors(
                lambda x, sigma, condition=None: -x / variance, x, detectors, key=key
            )
        )
    )(jnp.asarray(data), keys)
    for power, one in zip((1, 3), found, strict=True):
        expected = np.sum(1 / np.asarray(variance) ** power)
        error = np.std(one.raw) / count**0.5
        assert abs(np.mean(one.raw) - expected) < 4 * error
        np.testing.assert_allclose(one.value, sigma ** (2 * power) * one.raw / 6, rtol=1e-10)
    density = GaussianMixture([0.5, 0.5], jnp.asarray([[0.0] * 6, [1.0] * 6]), 0.3)
    data = density.sample(jax.random.key(9), count, 0.0)
    detector = (SharpnessProxy(sigma, num_draws=1, order=1), Sharpness(sigma, "noised", 1, order=1))
    proxy, trace = jax.jit(
        jax.vmap(lambda x, key: evaluate_detectors(density.score, x, detector, key=key))
    )(data, keys)
    gap = np.asarray(proxy.value - trace.value)
    assert abs(np.mean(gap)) < 4 * np.std(gap) / count**0.5


def test_a_stored_point_scores_higher_than_an_ordinary_one():
    """A point among a flat sheet of data: every detector ranks it up, in all directions alike."""
    d, sigma = 8, 0.1
    stds = jnp.asarray([1.0] * 3 + [0.0] * 5)
    centers = jnp.stack([jnp.zeros(d), jnp.full(d, 2.0)])
    density = GaussianMixture(
        [0.5, 0.5], centers, jnp.stack([jnp.diag(stds**2), jnp.zeros((d, d))])
    )
    detectors = (*spectral(sigma)[:4], ExtremeEigenvalue(sigma), SharpnessProxy(sigma))
    stored = run(density.score, centers[1], detectors)
    ordinary = run(density.score, 0.5 * stds, detectors)
    for detector, high, low in zip(detectors, stored, ordinary, strict=True):
        assert high.value > low.value + 0.2, detector
    np.testing.assert_allclose([one.value for one in stored[:5]], [1, 1, 1, 1, 0], atol=1e-5)


def test_a_score_below_the_floor_is_shown():
    (found,) = run(
        lambda x, sigma, condition=None: -x * jnp.asarray([1.5, 1.005, 1.0, 0.5]) / sigma**2,
        jnp.ones(4),
        (BelowFloor(0.3),),
    )
    assert (found.value, found.raw) == (0.25, 1)


def test_a_nonfinite_image_is_a_status():
    detectors = (
        *spectral(0.3),
        Sharpness(0.3, exact_limit=0),
        FloorShare(0.3, exact_limit=0),
        ExtremeEigenvalue(0.3, exact_limit=0),
        SharpnessProxy(0.3),
    )
    bad = jnp.full(6, jnp.nan)
    for detector, found in zip(
        detectors,
        run(lambda x, sigma, condition=None: -x * jnp.sum(x**2), bad, detectors),
        strict=True,
    ):
        assert found.status == Status.NONFINITE, detector
        assert np.isnan(found.value)


def bent_score(x, sigma, condition=None):
    """Any score that is not linear."""
    return -jnp.tanh(x)


@pytest.mark.parametrize(
    ("detectors", "expected"),
    [
        ((*spectral(0.5), FLIPD(0.5), EffectiveDimension(0.5)), Cost(1, 6)),
        (spectral(0.5, kind="noised", num_draws=2), Cost(2, 12)),
        ((Sharpness(0.5, exact_limit=5, num_probes=3, num_steps=4),), Cost(1, 12, 12)),
        ((ExtremeEigenvalue(0.5, exact_limit=5, num_products=4),), Cost(1, 4, 4)),
        ((SharpnessProxy(0.5, num_draws=3), Sharpness(0.5)), Cost(4, 9)),
    ],
)
def test_the_declared_cost_is_what_runs(detectors, expected, counting):
    counted = counting(bent_score)
    assert cost(detectors, 6) == expected
    found = evaluate_detectors(counted, jnp.ones(6), detectors, key=KEY)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert counted.calls == expected.forward


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sharpness(-1.0),
        lambda: Sharpness(1.0, order=2),
        lambda: Sharpness(1.0, num_probes=1),
        lambda: NegativeShare(1.0, threshold=1.0),
        lambda: FloorShare(1.0, window=0.0),
        lambda: BelowFloor(1.0, slack=-0.1),
        lambda: ExtremeEigenvalue(1.0, which="both"),
        lambda: ExtremeEigenvalue(1.0, tolerance=0.0),
        lambda: SharpnessProxy(1.0, "clean"),
    ],
)
def test_unusable_settings_are_refused(make):
    names = "sigma|order|num_probes|threshold|window|slack|which|tolerance|kind"
    with pytest.raises(InputError, match=rf"^({names}): expected"):
        make()
