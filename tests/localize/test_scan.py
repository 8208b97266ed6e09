"""Scans over noise levels, where maps are made, and the programs for many rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.diffusion.model import Model
from memjax.localize.maps import PixelMap, curvature_maps, mean_over_draws
from memjax.localize.points import noised_points, trajectory_points
from memjax.localize.scan import scan_images, scan_levels, scan_points, scan_samples

KEY = jax.random.key(0)
SIGMAS = jnp.array([0.1, 0.2, 0.4, 0.8])


def exact_map(values) -> PixelMap:
    values = jnp.asarray(values, jnp.float32)[:, None, :, None]  # levels, rows, pixels, channel
    zero = jnp.zeros_like(values)
    return PixelMap(values, zero, values[..., 0], zero[..., 0])


def test_a_signal_counts_at_two_neighboring_levels_of_a_released_base():
    #             stands  one level  not released  released late  nothing
    difference = [[0.6, 0.1, 0.7, 0.9, -0.1]]
    difference += [[0.5, 0.8, 0.6, 0.5, -0.2]]
    difference += [[0.2, 0.05, 0.5, 0.4, -0.1]]
    difference += [[0.0, 0.0, 0.1, 0.3, 0.0]]
    base = [[0.9, 0.9, 0.3, 1.3, 0.9]] + [[0.8, 0.9, 0.2, 0.9, 0.8]] * 2 + [[0.6] * 5]
    of, of_base = exact_map(difference), np.asarray(base)
    curvature = exact_map(1 - (of_base - np.asarray(difference)))
    found = scan_levels(SIGMAS, of, curvature)
    np.testing.assert_allclose(found.persistent[0], [0.5, 0.1, 0, 0.4, 0], atol=1e-6)
    assert found.level[0].tolist() == [0, 0, -1, 1, -1]
    assert found.released[0].tolist() == [True, True, False, True, True]
    # The same levels in falling order are the same scan.
    turned = jax.tree.map(lambda leaf: leaf[::-1], (of, curvature))
    again = scan_levels(SIGMAS[::-1], *turned)
    for here, there in zip(found._replace(level=0), again._replace(level=0), strict=True):
        np.testing.assert_allclose(here, there, atol=1e-6)
    assert (3 - np.asarray(again.level[0]))[[0, 1, 3]].tolist() == [0, 0, 1]


def test_what_is_unknown_at_a_level_is_unknown():
    of = exact_map([[0.5, np.nan], [0.5, 0.5]])
    found = scan_levels(SIGMAS[:2], of, exact_map([[0.5, 0.5]] * 2))
    assert np.isnan(found.persistent[0]).tolist() == [False, True]


def test_the_integral_is_the_pixels_share_of_volume_growth(x64):
    """Of a Gaussian of variance v, log volume grows by log sqrt((v + s1^2)/(v + s0^2)) a pixel."""
    sigmas = jnp.geomspace(0.05, 3.0, 400)
    free, stored = np.array([1.0, 2.0, 0.5]), np.array([1.0, 0.01, 0.2])

    def score(x, sigma, condition=None):
        return -x / (jnp.asarray(free if condition is None else stored) + sigma**2)

    given = jax.jit(jax.vmap(lambda s: curvature_maps(score, jnp.zeros(3), s, jnp.int32(0))))(
        sigmas
    )
    found = scan_levels(sigmas, given.curvature_over_null, given.curvature)

    def growth(variance):
        return 0.5 * np.log((variance + 3.0**2) / (variance + 0.05**2))

    np.testing.assert_allclose(found.integral, growth(stored) - growth(free), atol=1e-4)
    assert not np.any(found.integral_standard_error)


def test_bad_scans_are_refused():
    of = exact_map([[0.5]] * 2)
    with pytest.raises(InputError, match="at least 2 noise levels"):
        scan_levels(SIGMAS[:1], of, of)
    with pytest.raises(InputError, match="window"):
        scan_levels(SIGMAS[:2], of, of, window=(1.0, 0.5))


def test_noised_points_are_images_plus_noise_common_to_all(planted):
    images = jnp.stack([jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1))])
    points = noised_points(images, SIGMAS, KEY, num_draws=5)
    assert points.shape == (4, 5, 2, 2, 1)
    noise = (points - images[jnp.arange(5) % 2][None]) / SIGMAS[:, None, None, None, None]
    np.testing.assert_allclose(noise, jnp.broadcast_to(noise[:1], noise.shape), atol=1e-5)
    other = noised_points(images[:1] + 3, SIGMAS, KEY, num_draws=5)
    np.testing.assert_allclose(other[0] - 3, points[0] - images[jnp.arange(5) % 2], atol=1e-5)
    many = noised_points(images, SIGMAS[:1], KEY, num_draws=4000)[0]
    assert np.asarray(many - images[jnp.arange(4000) % 2]).std() == pytest.approx(0.1, rel=0.03)


def gaussian_model(dtype=jnp.float32, std=0.5):
    def score(x, sigma, condition=None):
        center = 0.0 if condition is None else condition
        return (center - x) / (std**2 + sigma**2)

    return Model(score, (2, 3, 1), sigma_min=0.01, sigma_max=20.0, data_std=std, null_condition=0.0)


def test_trajectories_are_those_of_the_probability_flow(x64):
    """Of a Gaussian, the flow scales deviations by sqrt((v + s^2)/(v + s_max^2))."""
    model, levels = gaussian_model(), (1.0, 0.1, 20.0)
    run = jax.jit(
        lambda c, w: trajectory_points(model, levels, KEY, c, weight=w, num_draws=7, num_steps=60),
        static_argnums=1,
    )
    points = np.asarray(run(jnp.float64(2.0), 1.0))
    assert points.shape == (3, 7, 2, 3, 1)
    start = points[2]
    for sigma, here in zip(levels, points, strict=True):
        scale = np.sqrt((0.25 + sigma**2) / (0.25 + 400))
        np.testing.assert_allclose(here, 2 + (start - 2) * scale, atol=5e-3)
    # Guidance of weight w is the Gaussian around w times the condition.
    guided = np.asarray(run(jnp.float64(2.0), 1.5))
    np.testing.assert_allclose(guided, run(jnp.float64(3.0), 1.0), atol=1e-9)
    for bad in ((30.0,), (0.0,), ()):
        with pytest.raises(InputError, match="sigmas"):
            trajectory_points(model, bad, KEY)


def test_many_rows_are_each_row_alone(planted):
    world, sigmas = planted(4), SIGMAS[1:3]
    images = jax.random.normal(KEY, (3, 2, 4, 4, 1), world.free.variances.dtype)
    given = {"num_draws": 4, "method": "hutchinson", "num_products": 3}
    conditions = jnp.arange(3, dtype=jnp.int32)
    found = scan_images(world, images, sigmas, conditions, key=KEY, row_chunk=2, **given)
    assert found.curvature_over_null.summed.shape == (3, 2, 4, 4)
    assert found.curvature_over_baseline is None
    alone = scan_images(world, images[1:2], sigmas, conditions[1:2], key=KEY, **given)
    np.testing.assert_allclose(
        found.curvature_over_null.value[1], alone.curvature_over_null.value[0], atol=1e-5
    )
    assert np.all(found.cost.forward == 2 * 4)
    assert np.all(found.cost.jvp == 2 * 4 * 3)
    assert np.all(found.status == Status.OK)
    bad = scan_images(
        world, images.at[1, 0, 0, 0, 0].set(jnp.nan), sigmas, conditions, key=KEY, **given
    )
    assert np.all(np.asarray(bad.status) == np.array([0, 1, 0])[:, None])
    np.testing.assert_array_equal(
        np.isnan(bad.curvature.value).all((2, 3, 4)), [[False] * 2, [True] * 2, [False] * 2]
    )


def test_a_level_is_the_mean_of_its_draws(planted):
    world = planted(4)
    points = jax.random.normal(KEY, (1, 5, 4, 4, 1), world.free.variances.dtype)
    found = scan_points(world, points, SIGMAS[1:2], jnp.int32(0), key=KEY, baseline=world.free)
    each = jax.vmap(
        lambda x: curvature_maps(world, x, SIGMAS[1], jnp.int32(0), baseline=world.free)
    )(points[0])
    expected = mean_over_draws(each)
    for name in ("curvature", "score_over_baseline", "curvature_over_baseline"):
        of = getattr(found, name)
        np.testing.assert_allclose(of.value[0], getattr(expected, name).value, atol=2e-5)
        np.testing.assert_allclose(
            of.standard_error[0], getattr(expected, name).standard_error, atol=2e-5
        )


def test_maps_along_the_sampler_are_maps_at_its_points():
    model, levels = gaussian_model(), (0.2, 1.0)
    conditions = jnp.array([0.0, 2.0])
    found = scan_samples(model, np.array(levels), conditions, key=KEY, num_draws=3)
    expected = 0.04 * 1 / (0.25 + 0.04)
    np.testing.assert_allclose(found.curvature.value[:, 0], expected, rtol=1e-5)
    assert found.score_over_null.summed.shape == (2, 2, 2, 3)
    # The gap of the scores is c/(v + s^2), wherever the trajectories are.
    gap = (np.array(levels) * np.array([[0.0], [2.0]]) / (0.25 + np.square(levels))) ** 2
    np.testing.assert_allclose(
        found.score_over_null.value[:, :, 0, 0, 0], gap, rtol=1e-3, atol=1e-9
    )
