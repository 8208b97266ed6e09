"""Volume growth: right or flagged, of all directions, of frames, and by the published procedure."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.densities import Gaussian, GaussianMixture
from memjax.diffusion import (
    ContinuousVP,
    probability_flow,
    volume_growth,
    volume_growth_edges,
    volume_growth_frame,
    volume_growth_top,
)
from memjax.linalg import orthonormal

D, K = 4, 3
TOL = 1e-6


class Broken(eqx.Module):
    """A mixture whose score is NaN within a band of noise levels."""

    density: GaussianMixture
    band: Array

    def __call__(self, x, sigma, condition=None):
        inside = (sigma > self.band[0]) & (sigma < self.band[1])
        return jnp.where(inside, jnp.nan, self.density.score(x, sigma, condition))


def cases(seed, n):
    """Gaussians, mixtures and stored points, some broken: (score, x, sigma0, sigma1, broken)."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        means = rng.normal(size=(K, D)) * (i % 3 > 0)  # every third: components at one place
        variances = 10 ** rng.uniform(-6, 0, (K, D))
        if i % 3 == 0:
            variances[:] = variances[0]
        if i % 3 == 2:
            variances[0] = 0  # a stored point among others
        weights = rng.dirichlet(np.ones(K))
        sigma0, sigma1 = 10 ** rng.uniform(-4, -1), 10 ** rng.uniform(0, 1.5)
        density = GaussianMixture(weights, jnp.asarray(means), variances)
        chosen = rng.choice(K, p=weights)
        x = means[chosen] + np.sqrt(variances[chosen] + sigma0**2) * rng.normal(size=D)
        broken = i % 10 == 9
        edge = 10 ** rng.uniform(np.log10(sigma0), 0) if broken else np.inf
        band = jnp.asarray([edge, edge * 1.5 if broken else np.inf])
        yield Broken(density, band), jnp.asarray(x), sigma0, sigma1, broken


@jax.jit
def reference(densities, xs, sigmas0, sigmas1):
    """By 600 steps of a fixed rule."""

    def one(score, x, sigma0, sigma1):
        flow = probability_flow(
            score, sigma0, sigma1, divergence="exact", solver="rk4", num_steps=600
        )
        out = flow(x)
        return out.log_volume, out.point

    return jax.vmap(one)(densities, xs, sigmas0, sigmas1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [100, pytest.param(1000, marks=pytest.mark.nightly)])
def test_right_or_flagged(n):
    """Error within ten times the tolerance, or a status that is not ok; never a hang."""
    scores, xs, sigmas0, sigmas1, broken = zip(*cases(n, n), strict=True)
    scores = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scores)
    xs, sigmas0, sigmas1 = (jnp.asarray(a) for a in (jnp.stack(xs), sigmas0, sigmas1))
    broken = np.asarray(broken)
    expected, point = reference(scores.density, xs, sigmas0, sigmas1)
    gaussian = np.arange(n) % 3 == 0
    variances = np.asarray(jax.vmap(lambda d: jnp.diag(d.posterior(xs[0], 1.0).covariance))(
        jax.tree.map(lambda leaf: leaf[::3], scores.density)
    ))  # fmt: skip
    variances = variances / (1 - variances)  # v/(v + 1), the posterior's at sigma = 1
    low, high = (np.asarray(s)[::3, None] for s in (sigmas0, sigmas1))
    closed = np.log((variances + high**2) / (variances + low**2)).sum(1) / 2
    np.testing.assert_allclose(expected[gaussian], closed, atol=TOL)

    for max_steps in (1024, 20):

        @jax.jit
        def run(scores, xs, sigmas0, sigmas1, max_steps=max_steps):
            def one(score, x, sigma0, sigma1):
                flow = probability_flow(
                    score, sigma0, sigma1, divergence="exact", tol=TOL, num_steps=4,
                    max_steps=max_steps,
                )  # fmt: skip
                return volume_growth(flow, solver_error=max_steps == 1024)(x)

            return jax.vmap(one)(scores, xs, sigmas0, sigmas1)

        out = run(scores, xs, sigmas0, sigmas1)
        ok = np.asarray(out.status) == Status.OK
        error = np.abs(out.log_volume - expected)
        assert (error[ok] <= 10 * TOL * D).all()
        apart = np.sqrt(np.mean((out.point - point) ** 2, axis=1)) / sigmas1
        assert (apart[ok] <= 10 * TOL).all()
        if max_steps == 20:
            assert set(np.asarray(out.status)[~ok].tolist()) <= {Status.MAX_STEPS, Status.NONFINITE}
            assert 0.3 * n < (~ok).sum() < n
            continue
        assert ok[~broken].all()
        assert (np.asarray(out.status)[broken] == Status.NONFINITE).all()
        assert np.isnan(out.log_volume[~ok]).all()
        assert (error <= out.solver_error + 1e-9)[ok].all()
        assert (out.normalized[ok] <= 1 + 1e-6).all()
        np.testing.assert_allclose(out.ceiling, D * np.log(sigmas1 / sigmas0))
        np.testing.assert_allclose(out.rate[ok], out.normalized[ok] * D)


@pytest.mark.usefixtures("x64")
def test_error_bars_of_a_fixed_rule():
    """The coarser solution bounds the error; the price of both is reported."""
    density = GaussianMixture([0.3, 0.7], jnp.asarray(np.eye(2, D)), [0.01, 0.1])
    xs = density.sample(jax.random.key(0), 8, 0.1)
    flow = probability_flow(density, 0.1, 10.0, divergence="exact", solver="heun", num_steps=16)
    out = jax.jit(jax.vmap(volume_growth(flow)))(xs)
    fine = probability_flow(density, 0.1, 10.0, divergence="exact", solver="rk4", num_steps=500)
    expected = jax.vmap(fine)(xs).log_volume
    error = np.abs(out.log_volume - expected)
    assert (error <= out.solver_error).all()
    assert (out.solver_error < 0.3).all()
    assert (out.cost.forward == 2 * 16 + 1 + 2 * 8 + 1).all()
    assert not out.status.any()


def linear_flow(variances, **options):
    density = Gaussian(jnp.zeros(len(variances)), np.asarray(variances))
    stretch = np.sqrt((np.asarray(variances) + 25.0) / (np.asarray(variances) + 0.01))
    return probability_flow(density, 0.1, 5.0, **options), stretch


VARIANCES = [0.0, 1e-3, 0.05, 0.3, 1.0, 4.0]


@pytest.mark.usefixtures("x64")
def test_frames():
    """QR of tangents: the volume of the frame, of any of its beginnings, and of everything."""
    flow, stretch = linear_flow(VARIANCES, solver="rk4", num_steps=64)
    x, key = jnp.ones(6), jax.random.key(1)
    out = volume_growth_frame(flow, 3)(x, key)
    frame = np.asarray(orthonormal(key, 3, x)) / np.sqrt(6)
    moved = frame * stretch
    for j in (1, 2, 3):
        expected = np.linalg.slogdet(moved[:j] @ moved[:j].T)[1] / 2
        np.testing.assert_allclose(out.log_stretches[:j].sum(), expected, atol=1e-6)
    np.testing.assert_allclose(out.log_volume, out.log_stretches.sum())
    np.testing.assert_allclose(out.frame @ out.frame.T, np.eye(3), atol=1e-12)
    assert out.log_volume < np.sort(np.log(stretch))[-3:].sum()
    assert int(out.cost.forward) == 256
    assert int(out.cost.jvp) == 768
    assert not out.status
    # The whole space: the determinant of the discrete flow, which its divergence only estimates.
    density = GaussianMixture([0.5, 0.5], jnp.asarray(np.eye(2, 4)), 0.1)
    flow = probability_flow(density, 0.1, 5.0, solver="heun", num_steps=8)
    x = jnp.asarray([0.4, 0.6, 0.1, 0.0])
    whole = volume_growth_frame(flow, 4)(x, key)
    exact = jnp.linalg.slogdet(jax.jacfwd(lambda x: flow(x).point)(x))[1]
    np.testing.assert_allclose(whole.log_volume, exact, atol=1e-10)
    broken = Broken(density, jnp.asarray([1.0, 2.0]))
    flow = probability_flow(broken, 0.1, 5.0, solver="heun", num_steps=8)
    lost = volume_growth_frame(flow, 4)(x, key)
    assert lost.status == Status.NONFINITE
    assert np.isnan(lost.log_volume)


@pytest.mark.usefixtures("x64")
def test_the_fastest_directions():
    flow, stretch = linear_flow(VARIANCES, solver="rk4", num_steps=64)
    run = jax.jit(lambda flow, x, key: volume_growth_top(flow, 3, tol=1e-9)(x, key))
    out = run(flow, jnp.ones(6), jax.random.key(0))
    expected = np.sort(np.log(stretch))[::-1]
    np.testing.assert_allclose(out.log_stretches, expected[:3], atol=1e-5)
    np.testing.assert_allclose(out.log_volume, expected[:3].sum(), atol=1e-5)
    assert out.status in (Status.OK, Status.BREAKDOWN)
    np.testing.assert_allclose(np.abs(out.directions), np.eye(3, 6), atol=1e-4)
    assert int(out.cost.jvp) == int(out.cost.vjp)
    assert int(out.cost.jvp) % 257 == 0
    # All alike at a stored point: every exponent is one.
    alone, _ = linear_flow(np.zeros(6), solver="rk4", num_steps=64)
    same = run(alone, jnp.ones(6), jax.random.key(0))
    np.testing.assert_allclose(same.log_stretches, np.log(50.0), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_published_procedure():
    """Its length sum exceeds the volume by Hadamard, and both biases shrink as the step does."""
    schedule = ContinuousVP()
    variances = np.asarray([0.1, 0.2, 0.4, 0.7, 1.0, 2.0])
    density = Gaussian(jnp.zeros(6), variances)
    x, key = jnp.ones(6), jax.random.key(2)
    alpha, sigma = schedule.alpha(jnp.asarray([1e-3, 1.0])), schedule.sigma_t(
        jnp.asarray([1e-3, 1.0])
    )  # fmt: skip
    spread = np.outer(alpha**2, variances) + np.outer(sigma**2, np.ones(6))
    stretch = np.sqrt(spread[1] / spread[0])

    # The frame the procedure starts from: normal draws, longest first, made orthogonal.
    draws = np.asarray(jax.random.normal(key, (3, 6)))
    draws = draws[np.argsort(-np.linalg.norm(draws, axis=1))]
    frame = np.linalg.qr(draws.T)[0].T
    exact = np.linalg.slogdet((frame * stretch) @ (frame * stretch).T)[1] / 2

    excess = []
    for num_steps in (500, 2000):
        out = volume_growth_edges(density, k=3, num_steps=num_steps, edge=1e-3)(x, key)
        assert not out.status
        assert int(out.cost.forward) == 4 * num_steps
        np.testing.assert_allclose(out.curve[-1], out.log_volume)
        lengths, volume = published_twin(variances, frame, num_steps)
        # On a linear flow edges of any length are tangents.
        np.testing.assert_allclose(out.log_volume, lengths, atol=1e-9)
        np.testing.assert_allclose(out.log_volume, exact, atol=0.03)
        excess.append(lengths - volume)
    assert excess[1] > 0
    np.testing.assert_allclose(excess[0] / excess[1], 4, rtol=0.1)
    # One stored point: the ceiling, but for Euler's rule (4.63 for 4.56 a direction).
    point = Gaussian(jnp.zeros(6), 0.0)
    alone = volume_growth_edges(point, k=3)(jnp.zeros(6), key)
    np.testing.assert_allclose(alone.ceiling / 3, 4.5577, atol=1e-3)
    np.testing.assert_allclose(alone.log_volume / 3, 4.6336, atol=1e-3)


def published_twin(variances, frame, num_steps):
    """The steps on a linear flow, in NumPy: log volumes by lengths and by QR."""
    lengths = volume = 0.0
    for t in np.linspace(1e-3, 1, num_steps):
        beta, integral = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t * t
        spread = np.exp(-integral) * variances + 1 - np.exp(-integral)
        moved = frame * (1 - beta / 2 / num_steps * (1 - 1 / spread))
        grown = np.linalg.norm(moved, axis=1)
        q, r = np.linalg.qr(moved[np.argsort(-grown)].T)
        lengths += np.log(grown).sum()
        volume += np.log(np.abs(np.diag(r))).sum()
        frame = q.T
    return lengths, volume


def test_bad_input():
    def score(x, sigma, condition):
        return -x

    silent = probability_flow(score, 0.1, 1.0)
    with pytest.raises(InputError, match="flow: expected one made with a divergence"):
        volume_growth(silent)
    odd = probability_flow(score, 0.1, 1.0, divergence="exact", solver="heun", num_steps=5)
    with pytest.raises(InputError, match=r"flow: expected an even num_steps, .*got 5"):
        volume_growth(odd)
    with pytest.raises(InputError, match="flow: expected a fixed rule, heun or rk4, got"):
        volume_growth_frame(silent, 2)
    with pytest.raises(InputError, match="flow: expected derivatives of both modes"):
        volume_growth_top(probability_flow(score, 0.1, 1.0, derivative="reverse"), 2)
    fixed = probability_flow(score, 0.1, 1.0, solver="heun")
    for make in (volume_growth_frame, volume_growth_top):
        with pytest.raises(InputError, match="k: expected a whole number at least 1, got 0"):
            make(fixed, 0)
        with pytest.raises(InputError, match="k: expected a whole number from 1 to 2, got 3"):
            make(fixed, 3)(jnp.ones(2), jax.random.key(0))
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"k": 0}, "k: expected a whole number at least 1, got 0"),
        ({"edge": 0.0}, "edge: expected a positive finite number"),
        ({"num_steps": 0}, "num_steps: expected a whole number at least 1, got 0"),
    )
    for change, message in changes:
        with pytest.raises(InputError, match=message):
            volume_growth_edges(score, **change)
    with pytest.raises(InputError, match="k: expected a whole number from 1 to 2, got 100"):
        volume_growth_edges(score)(jnp.ones(2), jax.random.key(0))
