"""Samplers against the closed flow of a Gaussian, at their orders, and as functions of the key."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from memjax._core.errors import InputError
from memjax.densities.gaussian import Gaussian
from memjax.diffusion.combine import classifier_guided
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import ddim, decode_samples, heun, noise_levels, sample

SAMPLERS = {"heun": (heun, 2), "ddim": (ddim, 1)}

ROOT = np.array([[0.9, 0.2, 0.0], [0.0, 0.5, -0.3], [0.1, 0.0, 0.2]])


def gaussian(dtype=np.float64):
    return Gaussian(jnp.asarray([0.3, -0.7, 1.0], dtype), jnp.asarray(ROOT @ ROOT.T, dtype))


def model_of(score, shape=(3,), **kwargs):
    facts = {"sigma_min": 0.01, "sigma_max": 20.0, "data_std": 0.7} | kwargs
    return Model(score, shape, **facts)


class Linear(eqx.Module):
    """A score with weights worth finding in a program."""

    weights: Array

    def __call__(self, x, sigma, condition=None):
        return (self.weights @ x) / (1 + sigma**2)


@pytest.mark.parametrize("method", SAMPLERS)
def test_order_of_convergence(method, x64):
    """log error against log step has the claimed slope, on the way down and on the way up."""
    sampler, order = SAMPLERS[method]
    density = gaussian()
    x = jnp.asarray([4.0, -3.0, 5.0])
    for start, end in ((5.0, 0.2), (0.2, 5.0)):
        exact = density.flow(x, start, end).point
        steps = np.array([32, 64, 128, 256])
        errors = []
        for n in steps:
            sigmas = jnp.asarray(np.geomspace(start, end, n + 1))
            errors.append(jnp.abs(sampler(density, x, sigmas) - exact).max())
        slope = -np.polyfit(np.log(steps), np.log(np.array(errors)), 1)[0]
        assert abs(slope - order) < 0.1


@pytest.mark.parametrize("method", SAMPLERS)
def test_fine_grid_reaches_the_closed_flow(method, x64):
    """Encoding and decoding on a fine grid: forward and back is the identity."""
    sampler, order = SAMPLERS[method]
    density = gaussian()
    x = jnp.asarray([0.5, -0.2, 0.8])
    sigmas = jnp.asarray(np.geomspace(0.05, 10.0, 2001))
    there = sampler(density, x, sigmas)
    tolerance = 1e-5 if order == 2 else 2e-2
    np.testing.assert_allclose(there, density.flow(x, 0.05, 10.0).point, rtol=tolerance)
    np.testing.assert_allclose(sampler(density, there, sigmas[::-1]), x, atol=tolerance)


def test_heun_is_the_paper_written_out(x64):
    """Algorithm 1 line by line in NumPy, the last step by Euler."""
    density = gaussian()
    t = noise_levels(10.0, 0.05, 5)
    x = np.array([3.0, -8.0, 2.0])
    mean, covariance = np.asarray(density.mean), ROOT @ ROOT.T

    def denoiser(x, t):
        return mean + covariance @ np.linalg.solve(covariance + t**2 * np.eye(3), x - mean)

    expected = x
    for i in range(5):
        d = (expected - denoiser(expected, t[i])) / t[i]
        following = expected + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_next = (following - denoiser(following, t[i + 1])) / t[i + 1]
            following = expected + (t[i + 1] - t[i]) * (d / 2 + d_next / 2)
        expected = following
    np.testing.assert_allclose(heun(density, jnp.asarray(x), jnp.asarray(t)), expected, rtol=1e-12)


@pytest.mark.parametrize("method", SAMPLERS)
def test_last_step_to_zero_is_the_denoiser(method):
    sampler, _ = SAMPLERS[method]
    density = gaussian(np.float32)
    x = jnp.asarray([0.5, -0.2, 0.8], jnp.float32)
    found = sampler(density, x, jnp.asarray([0.3, 0.0], jnp.float32))
    np.testing.assert_allclose(found, density.posterior(x, 0.3).mean, atol=1e-6)


@pytest.mark.parametrize("method", SAMPLERS)
def test_derivative_of_a_sampler_is_finite(method):
    """Reaching zero leaves no NaN in the derivative."""
    sampler, _ = SAMPLERS[method]
    sigmas = jnp.asarray(noise_levels(5.0, 0.1, 4), jnp.float32)
    density = gaussian(np.float32)
    jacobian = jax.jacfwd(lambda x: sampler(density, x, sigmas))(jnp.ones(3, jnp.float32))
    transposed = jax.jacrev(lambda x: sampler(density, x, sigmas))(jnp.ones(3, jnp.float32))
    assert jnp.isfinite(jacobian).all()
    np.testing.assert_allclose(jacobian, transposed, atol=1e-6)


def test_noise_levels():
    levels = noise_levels(80.0, 0.002, 18)
    assert len(levels) == 19
    np.testing.assert_allclose(levels[[0, 17, 18]], [80.0, 0.002, 0.0], rtol=1e-12)
    assert (np.diff(levels) < 0).all()
    np.testing.assert_allclose(np.diff(levels[:-1] ** (1 / 7), n=2), 0, atol=1e-13)
    np.testing.assert_allclose(noise_levels(3.0, 1.0, 3, rho=1.0), [3, 2, 1, 0])
    np.testing.assert_allclose(noise_levels(2.0, 0.1, 1), [2.0, 0.0], rtol=1e-12)


def test_moments_of_samples():
    """Samples of a Gaussian model have its mean and covariance, within sampling error."""
    density = gaussian(np.float32)
    n = 4096
    xs = np.asarray(sample(model_of(density, sigma_max=50.0), n, key=0, chunk_size=n), np.float64)
    covariance = ROOT @ ROOT.T
    # Four standard errors, and the discretization error of 18 steps.
    error = 4 * np.sqrt(np.diag(covariance) / n)
    assert (np.abs(xs.mean(0) - np.asarray(density.mean)) < error + 0.01).all()
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert (np.abs(np.cov(xs.T) - covariance) < 4 * scale * np.sqrt(2 / n) + 0.03).all()


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_sample_depends_on_its_number_only(method):
    model = model_of(gaussian(np.float32))
    draw = lambda n, chunk, key=3: np.asarray(  # noqa: E731
        sample(model, n, key=key, method=method, num_steps=5, chunk_size=chunk)
    )
    all_of_them = draw(11, 4)
    assert all_of_them.shape == (11, 3)
    for n in (1, 4, 5, 8):
        np.testing.assert_array_equal(draw(n, 4), all_of_them[:n])
    for chunk in (1, 3, 64):
        np.testing.assert_allclose(draw(11, chunk), all_of_them, atol=1e-5)
    np.testing.assert_array_equal(draw(11, 4), all_of_them)
    np.testing.assert_array_equal(draw(11, 4, jax.random.key(3)), all_of_them)
    assert np.abs(draw(11, 4, 4) - all_of_them).min(axis=1).max() > 0.01
    assert len(np.unique(all_of_them[:, 0])) == 11


def test_samples_start_from_given_noises():
    """In chunks too; exactly one of key and noises, and one noise for each sample."""
    model = model_of(gaussian(np.float32), sigma_max=5.0)
    noises = jax.random.normal(jax.random.key(3), (5, 3), jnp.float32)
    grid = jnp.asarray(noise_levels(5.0, 0.01, 6), jnp.float32)
    found = sample(model, 5, noises=noises, num_steps=6, chunk_size=2)
    expected = jax.vmap(lambda n: heun(model, 5.0 * n, grid))(noises)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for wrong in ({}, {"key": 0, "noises": noises}, {"noises": noises[:4]}):
        with pytest.raises(InputError, match="noises: expected"):
            sample(model, 5, **wrong)


@pytest.mark.parametrize("weight", [0, 1, 2.5])
def test_guidance_moves_the_mean(weight):
    """Between Gaussians of one width guidance is a shift: w times the condition's mean."""
    null = jnp.zeros(3, jnp.float32)
    model = model_of(lambda x, sigma, mean: (mean - x) / (1 + sigma**2), null_condition=null)
    means = jax.random.normal(jax.random.key(5), (4, 3), jnp.float32)
    found = sample(model, 4, key=1, conditions=means, num_steps=5, guidance=weight)
    expected = sample(model, 4, key=1, conditions=weight * means, num_steps=5)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_samples_are_decoded_one_by_one():
    """The same in chunks as alone, and as many together as an image's size allows."""
    side = 192
    model = model_of(lambda x, s, c: -x, (side, side, 1), decode=lambda z: 2 * z[:4, :4] + 1)
    samples = jax.random.normal(jax.random.key(6), (3, side, side, 1), jnp.float32)
    np.testing.assert_array_equal(decode_samples(model, samples), 2 * samples[:, :4, :4] + 1)


def test_double_precision_refines_a_sample():
    single = sample(model_of(gaussian(np.float32)), 3, key=1, num_steps=5)
    with jax.enable_x64(True):
        double = sample(model_of(gaussian(np.float64)), 3, key=1, num_steps=5)
        assert double.dtype == np.float64
        np.testing.assert_allclose(single, double, atol=1e-5)


def test_numbers_of_a_guidance_do_not_widen_a_sample(x64):
    """They are Python's: 1.5 is no more double precision than the weights it multiplies."""
    density = gaussian(np.float32)
    guided = classifier_guided(density, lambda x, sigma, c: x[c], 1.5, window=(0.1, 5.0), limit=2.0)
    samples = sample(model_of(guided), 2, key=0, num_steps=3, conditions=jnp.arange(2))
    assert samples.dtype == np.float32


def test_progress_is_told_after_every_chunk():
    told = []
    draw = sample(
        model_of(gaussian(np.float32)),
        5,
        key=0,
        num_steps=2,
        chunk_size=2,
        progress=lambda *args: told.append(args),
    )
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert draw.shape == (5, 3)


def test_conditions_are_one_per_sample():
    """Samples of condition k come from component k alone; none means the null condition."""
    means = jnp.asarray([[-3.0, 0.0], [3.0, 1.0]], jnp.float32)

    class Choose(eqx.Module):
        means: Array

        def __call__(self, x, sigma, condition):
            return (self.means[condition] - x) / (sigma**2 + 1e-4)

    model = model_of(Choose(means), (2,), null_condition=jnp.int32(1))
    conditions = jnp.asarray([0, 1, 0, 0, 1], jnp.int32)
    found = sample(model, 5, key=0, conditions=conditions, chunk_size=2)
    np.testing.assert_allclose(found, means[conditions], atol=0.1)
    np.testing.assert_allclose(sample(model, 3, key=0), means[jnp.asarray([1, 1, 1])], atol=0.1)


def test_no_weight_is_baked_into_the_program():
    from memjax.diffusion.sampling import _sample_chunk

    model = model_of(Linear(-jnp.eye(64)), (64,))
    sigmas = jnp.asarray(noise_levels(1.0, 0.1, 3), jnp.result_type(float))
    rows = jnp.arange(2, dtype=jnp.int32)
    lowered = _sample_chunk.lower(model, jax.random.key(0), rows, sigmas, (None, None), "heun")
    text = lowered.as_text()
    constants = re.findall(r"stablehlo.constant dense.*: tensor<([0-9x]*)x[a-z]", text)
    assert all(np.prod([int(n) for n in shape.split("x")]) < 64 * 64 for shape in constants)
    assert "tensor<64x64x" in text.split("@main")[1].split("{")[0]


def test_compiled_once_for_all_chunks():
    from memjax.diffusion.sampling import _sample_chunk

    model = model_of(gaussian(np.float32))
    sample(model, 3, key=0, chunk_size=7, num_steps=3)
    before = _sample_chunk._cache_size()
    sample(model, 30, key=1, chunk_size=7, num_steps=3)
    other = jax.tree.map(lambda leaf: leaf + 1, model)
    sample(other, 8, key=2, chunk_size=7, num_steps=3)
    assert _sample_chunk._cache_size() == before


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"rho": 0.0}, "rho: expected a positive number, got 0.0"),
        ({"conditions": jnp.zeros(3, jnp.int32)}, r"conditions: expected 2 rows.*got shape \(3,\)"),
    ],
)
def test_bad_input(kwargs, message):
    arguments = {"num_samples": 2, "key": 0} | kwargs
    with pytest.raises(InputError, match=message):
        sample(model_of(gaussian(np.float32)), arguments.pop("num_samples"), **arguments)


def test_bad_noise_range():
    with pytest.raises(InputError, match=r"sigma_min, sigma_max: .*got 2\.0, 1\.0"):
        noise_levels(1.0, 2.0, 3)
