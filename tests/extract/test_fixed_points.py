"""Denoiser fixed points against closed forms, roots found by SciPy, and exact basins."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

import memjax as mj
import memjax.extract.fixed_points as module
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.extract import find_fixed_points, measure_stability, polish

SIGMA = 0.3


class Linear(eqx.Module):
    """A score whose denoiser is x -> A x + b at every noise level."""

    matrix: jax.Array
    offset: jax.Array

    def __call__(self, x, sigma, condition=None):
        image = jnp.matmul(self.matrix, x, precision="highest") + self.offset
        return (image - x) / sigma**2


class Towards(eqx.Module):
    """The score of one stored image, the condition."""

    def __call__(self, x, sigma, condition):
        return (condition - x) / sigma**2


class Broken(eqx.Module):
    """A score that is NaN far out."""

    density: mj.Empirical

    def __call__(self, x, sigma, condition=None):
        return jnp.where(jnp.abs(x[0]) > 10, jnp.nan, self.density(x, sigma))


def one_dimensional(weights, means, variances):
    """The denoiser of a mixture on the line, its fixed points and their slopes, by SciPy."""
    weights, means, variances = map(np.asarray, (weights, means, variances))
    total = variances + SIGMA**2

    def denoiser(x):
        share = weights * norm.pdf(x, means, np.sqrt(total))
        clean = means + variances / total * (x - means)
        return float(share @ clean / share.sum())

    grid = np.linspace(means.min() - 1, means.max() + 1, 4001)
    gap = np.array([denoiser(x) - x for x in grid])
    change = np.flatnonzero(np.sign(gap[:-1]) != np.sign(gap[1:]))
    roots = np.array([brentq(lambda x: denoiser(x) - x, *grid[i : i + 2]) for i in change])
    slopes = np.array([(denoiser(r + 1e-5) - denoiser(r - 1e-5)) / 2e-5 for r in roots])
    return denoiser, roots, slopes


def test_gaussian_contracts_to_the_mean_at_the_known_rate():
    variance = jnp.array([[0.01, 0.5, 4.0], [0.0, 0.09, 0.2]])
    mean = jnp.arange(6.0).reshape(2, 3)
    density = mj.Gaussian(mean, variance)
    starts = mean[None] + jax.random.normal(jax.random.key(0), (5, 2, 3))
    rate = np.asarray(variance / (variance + SIGMA**2))
    for k in (0, 7):
        want = np.asarray(mean) + rate**k * np.asarray(starts - mean[None])
        got = polish(density, starts, SIGMA, num_steps=k, chunk_size=5)
        np.testing.assert_allclose(got, want, atol=3e-5)
    stable = measure_stability(density, mean[None], SIGMA, key=0, chunk_size=1)
    np.testing.assert_allclose(stable.radius, rate.max(), rtol=1e-5)
    found = find_fixed_points(density, starts, SIGMA, num_steps=400, chunk_size=5)
    assert np.all(np.asarray(found.status) == Status.OK)
    # An error e has residual (1 - rate) e in each direction.
    bound = 1e-3 * SIGMA / (1 - rate.max()) + 1e-4
    assert np.linalg.norm(np.asarray(found.points) - np.asarray(mean), axis=(1, 2)).max() <= bound


def test_mixture_comes_to_the_fixed_points_that_scipy_finds(x64):
    weights, means, variances = [0.5, 0.2, 0.3], [-1.0, 0.2, 1.5], [0.02, 0.01, 0.1]
    _, roots, slopes = one_dimensional(weights, means, variances)
    stable, walls = roots[slopes < 1], roots[slopes >= 1]
    assert len(stable) == 3
    assert len(walls) == 2
    starts = np.linspace(-2.5, 3.0, 101)
    starts = starts[np.abs(starts[:, None] - walls).min(axis=1) > 0.01]
    density = mj.GaussianMixture(weights, jnp.array(means)[:, None], jnp.array(variances))
    found = find_fixed_points(
        density, jnp.array(starts)[:, None], SIGMA, num_steps=2000, tolerance=1e-10
    )
    assert np.all(np.asarray(found.status) == Status.OK)
    want = stable[np.searchsorted(walls, starts)]
    np.testing.assert_allclose(found.points[:, 0], want, atol=1e-8)
    radius = measure_stability(density, jnp.array(roots)[:, None], SIGMA, key=0).radius
    np.testing.assert_allclose(radius, slopes, rtol=1e-6)


def test_a_saddle_is_a_fixed_point_that_nothing_comes_to():
    pair = mj.Empirical(jnp.array([[-1.0, 0.0], [1.0, 0.0]]))
    middle = jnp.zeros((1, 2))
    # Along the pair M = |half the distance|^2 / sigma^2, across it nothing.
    found = measure_stability(pair, middle, SIGMA, key=0)
    np.testing.assert_allclose(found.radius, 1 / SIGMA**2, rtol=1e-5)
    assert find_fixed_points(pair, middle, SIGMA).num_steps.tolist() == [0]
    off = find_fixed_points(pair, middle + 1e-3, SIGMA)
    np.testing.assert_allclose(off.points, [[1.0, 0.0]], atol=1e-5)


@pytest.mark.parametrize(("half", "separate"), [(1.05, True), (0.95, False)])
def test_two_stored_images_merge_within_two_sigma(x64, half, separate):
    pair = mj.Empirical(SIGMA * half * jnp.array([[-1.0], [1.0]]))
    starts = jnp.array([[-0.5], [0.5]])
    found = find_fixed_points(pair, starts, SIGMA, num_steps=4000, tolerance=1e-9)
    assert (abs(float(found.points[1, 0] - found.points[0, 0])) > 0.1 * SIGMA) == separate


def test_every_step_climbs(x64):
    keys = jax.random.split(jax.random.key(1), 3)
    density = mj.GaussianMixture(
        jnp.full(6, 1 / 6), jax.random.normal(keys[0], (6, 4)), jnp.linspace(0, 0.2, 6)
    )
    x = 2 * jax.random.normal(keys[1], (200, 4))
    step = polish(density, x, SIGMA, num_steps=1, chunk_size=200)
    log_prob = jax.jit(jax.vmap(lambda y: density.log_prob(y, SIGMA)))
    moved = jnp.sum((step - x) ** 2, axis=1)
    assert jnp.min(log_prob(step) - log_prob(x) - moved / (2 * SIGMA**2)) >= -1e-10


def test_hits_follow_the_basins_of_stored_points():
    points = np.array([-2.0, -0.9, 0.0, 0.3, 2.0])
    weights = np.array([0.1, 0.3, 0.2, 0.25, 0.15])
    _, roots, slopes = one_dimensional(weights, points, np.zeros(5))
    stable, walls = roots[slopes < 1], roots[slopes >= 1]
    assert len(stable) == 4  # 0.0 and 0.3 are nearer than two sigma
    edges = np.concatenate([[-np.inf], walls, [np.inf]])
    inside = norm.cdf((edges[:, None] - points) / SIGMA) @ weights
    probability = np.diff(inside)

    density = mj.Empirical(jnp.array(points)[:, None], weights)
    n, batch = 16_384, 8
    starts = density.sample(jax.random.key(2), n, SIGMA)
    found = find_fixed_points(density, starts, SIGMA, num_steps=300, chunk_size=n)
    arrived = np.asarray(found.status) == Status.OK
    assert arrived.mean() > 0.999
    label = np.abs(np.asarray(found.points) - stable).argmin(axis=1)
    # But for a start in ten thousand so near to a wall that it never left.
    assert np.mean(np.abs(np.asarray(found.points)[:, 0] - stable[label])[arrived] < 0.01) > 0.999
    hits = np.bincount(label, minlength=4)
    error = np.sqrt(n * probability * (1 - probability))
    assert np.all(np.abs(hits - n * probability) < 4 * error)
    unique = np.array([len(set(part)) for part in label.reshape(-1, batch).tolist()])
    expected = np.sum(1 - (1 - probability) ** batch)
    assert abs(unique.mean() - expected) < 4 * unique.std() / np.sqrt(len(unique))


def test_stored_images_are_reached_in_few_steps():
    points = jax.random.normal(jax.random.key(3), (30, 6, 6, 1))
    near = points + 0.2 * jax.random.normal(jax.random.key(4), points.shape)
    found = find_fixed_points(mj.Empirical(points), near, SIGMA)
    np.testing.assert_allclose(found.points, points, atol=1e-4)
    assert int(jnp.max(found.num_steps)) <= 3
    np.testing.assert_array_equal(found.cost.forward, found.num_steps + 1)
    radius = measure_stability(mj.Empirical(points), points[:4], SIGMA, key=0).radius
    assert radius.max() < 1e-3


def test_bad_rows_touch_nobody():
    density = Broken(mj.Empirical(jnp.array([[-1.0, 0.0], [1.0, 0.5], [12.0, 0.0]])))
    starts = jax.random.normal(jax.random.key(5), (12, 2))
    clean = find_fixed_points(density, starts, SIGMA, chunk_size=4)
    bad = jnp.array([[jnp.nan, 0.0], [jnp.inf, 0.0], [8.0, 0.0], [1e30, 1e30]])
    mixed = find_fixed_points(density, starts.at[::3].set(bad), SIGMA, chunk_size=4)
    others = np.arange(12) % 3 != 0
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(mixed), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[others], np.asarray(b)[others])
    assert np.all(np.asarray(mixed.status)[::3] == Status.NONFINITE)
    assert np.all(np.isnan(np.asarray(mixed.points)[::3]))
    radius = measure_stability(density, mixed.points, SIGMA, key=0)
    assert np.all(np.isnan(radius.radius) == ~others)
    assert np.all((radius.status == Status.NONFINITE) == ~others)


def test_chunks_do_not_matter():
    density = mj.GaussianMixture(
        jnp.full(3, 1 / 3), jax.random.normal(jax.random.key(6), (3, 5)), 0.05
    )
    starts = jax.random.normal(jax.random.key(7), (11, 5))
    whole = find_fixed_points(density, starts, SIGMA, chunk_size=16)
    few = find_fixed_points(density, starts[:6], SIGMA, chunk_size=16)
    cut = find_fixed_points(density, starts, SIGMA, chunk_size=4)
    order = np.random.default_rng(0).permutation(11)
    shuffled = find_fixed_points(density, starts[order], SIGMA, chunk_size=16)
    for a, b, c in zip(*map(jax.tree.leaves, (whole, few, shuffled)), strict=True):
        np.testing.assert_array_equal(a[:6], b)
        np.testing.assert_array_equal(a[order], c)
    np.testing.assert_allclose(whole.points, cut.points, atol=1e-4)
    np.testing.assert_array_equal(whole.status, cut.status)


def test_turning_and_scaling_the_world_turns_and_scales_the_answer(x64):
    keys = jax.random.split(jax.random.key(8), 3)
    means, starts = jax.random.normal(keys[0], (4, 3)), jax.random.normal(keys[1], (20, 3))
    turn = jnp.linalg.qr(jax.random.normal(keys[2], (3, 3)))[0]

    def run(change, factor):
        density = mj.GaussianMixture(jnp.full(4, 0.25), change(means), 0.02 * factor**2)
        found = find_fixed_points(
            density, change(starts), factor * SIGMA, num_steps=3000, tolerance=1e-9
        )
        return found, measure_stability(density, found.points, factor * SIGMA, key=0)

    plain, radius = run(lambda x: x, 1.0)
    moved, moved_radius = run(lambda x: 3 * x @ turn + 7.0, 3.0)
    assert np.all(np.asarray(plain.status) == Status.OK)
    np.testing.assert_allclose(moved.points, 3 * plain.points @ turn + 7.0, atol=1e-6)
    np.testing.assert_allclose(moved_radius.radius, radius.radius, rtol=1e-5)


def test_what_turns_never_comes_to_rest():
    def rotation(r):
        return Linear(r * jnp.array([[0.0, -1.0], [1.0, 0.0]]), jnp.array([1.0, 0.0]))

    starts = jnp.array([[2.0, 0.5], [-1.0, 3.0]])
    found = find_fixed_points(rotation(1.0), starts, SIGMA, num_steps=9)
    assert found.status.tolist() == [Status.NOT_CONVERGED] * 2
    np.testing.assert_array_equal(found.cost.forward, 10)
    rest = find_fixed_points(rotation(0.5), starts, SIGMA)
    np.testing.assert_allclose(rest.points, [[0.8, 0.4]] * 2, atol=1e-3)
    for r in (0.5, 1.0, 2.0):  # eigenvalues +- i r
        np.testing.assert_allclose(
            measure_stability(rotation(r), rest.points, SIGMA, key=0).radius, r, rtol=1e-4
        )


def test_residual_is_that_of_the_point_returned():
    density = mj.Gaussian(jnp.zeros(3), 1.0)
    found = find_fixed_points(density, jnp.full((2, 3), 2.0), SIGMA, num_steps=4)
    again = polish(density, found.points, SIGMA, num_steps=1)
    np.testing.assert_allclose(
        found.residual, jnp.linalg.norm(again - found.points, axis=1), rtol=1e-4
    )
    walked = polish(density, jnp.full((2, 3), 2.0), SIGMA, num_steps=4)
    np.testing.assert_allclose(walked, found.points, rtol=1e-6)


def test_every_start_has_its_condition():
    targets = jnp.arange(10.0).reshape(5, 2)
    found = find_fixed_points(Towards(), jnp.zeros((5, 2)), SIGMA, conditions=targets, chunk_size=2)
    np.testing.assert_allclose(found.points, targets, atol=1e-5)
    assert (
        measure_stability(Towards(), targets, SIGMA, key=0, conditions=targets).radius.max() < 1e-5
    )
    np.testing.assert_allclose(
        polish(Towards(), jnp.zeros((5, 2)), SIGMA, conditions=targets, num_steps=1),
        targets,
        atol=1e-5,
    )


def test_arnoldi_agrees_with_the_whole_matrix():
    rng = np.random.default_rng(9)
    basis = rng.normal(size=(300, 300)) / np.sqrt(300)
    values = np.concatenate([[0.9, -0.7, 0.5], np.zeros(297)])
    matrix = basis @ np.diag(values) @ np.linalg.inv(basis)
    want = np.abs(np.linalg.eigvals(matrix)).max()
    score = Linear(jnp.asarray(matrix, jnp.float32), jnp.zeros(300, jnp.float32))
    points = jnp.asarray(rng.normal(size=(3, 300)), jnp.float32).at[1, 0].set(jnp.nan)
    found = measure_stability(score, points, 1.0, key=0)
    np.testing.assert_allclose(found.radius, [want, np.nan, want], rtol=1e-2)
    assert found.status.tolist() == [Status.OK, Status.NONFINITE, Status.OK]
    assert found.cost.forward == 3
    assert found.cost.jvp < 3 * 64
    starved = measure_stability(score, points[:1], 1.0, key=0, num_products=2)
    assert starved.status.tolist() == [Status.NOT_CONVERGED]

    # Where M is about 0 a residual small in itself is enough.
    tiny = measure_stability(
        Linear(1e-5 * score.matrix, score.offset), points[:1], 1.0, key=0, num_products=2
    )
    assert tiny.status.tolist() == [Status.OK]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_precision_is_the_callers(x64, dtype):
    density = mj.Empirical(jnp.array([[-1.0], [1.0]], dtype))
    starts = jnp.array([[0.2]], dtype)
    found = find_fixed_points(density, starts, SIGMA)
    assert found.points.dtype == found.residual.dtype == dtype
    assert polish(density, starts, SIGMA).dtype == dtype


def test_another_noise_level_or_length_compiles_nothing():
    density = mj.Gaussian(jnp.zeros(2), 1.0)
    starts = jnp.ones((3, 2))
    find_fixed_points(density, starts, 0.1, chunk_size=3)
    before = module._iterate_chunk._cache_size()
    find_fixed_points(density, starts[:2], 0.2, chunk_size=3, tolerance=1e-2, num_steps=7)
    assert module._iterate_chunk._cache_size() == before


def test_progress_counts_starts():
    seen = []
    starts = jnp.ones((5, 2))
    density = mj.Gaussian(jnp.zeros(2), 1.0)
    find_fixed_points(density, starts, 0.1, chunk_size=2, progress=lambda *at: seen.append(at))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"num_steps": -1}, "num_steps"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"starts": jnp.ones((0, 2))}, "starts"),
        ({"conditions": jnp.ones(3)}, "conditions"),
    ],
)
def test_refusals_name_the_argument(change, message):
    given = {"score": Towards(), "starts": jnp.ones((2, 2)), "sigma": 1.0} | change
    with pytest.raises(InputError, match=f"^{message}: expected"):
        find_fixed_points(given.pop("score"), given.pop("starts"), given.pop("sigma"), **given)
