"""Maps of one point: against closed forms, against each other, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.densities.conditional import ConditionalMixture
from memjax.diffusion.prediction import from_prediction
from memjax.diffusion.schedule import DiscreteVP, FlowMatching
from memjax.evaluate.overlap import mask_iou
from memjax.localize.maps import (
    PixelMap,
    curvature_maps,
    maps_cost,
    mean_over_draws,
    over_others,
)

KEY = jax.random.key(0)
METHODS = ("exact", "lattice", "hutchinson", "auto")
SHAPE = (2, 2, 3)
NAMES = (
    "curvature",
    "curvature_over_null",
    "curvature_over_baseline",
    "score_over_null",
    "score_over_baseline",
)


def world(spread: float = 1.0, order: np.ndarray | None = None):
    """Three overlapping components of images of 2 x 2 pixels and 3 channels, classes 0, 1, 1."""
    rng = np.random.default_rng(0)
    order = np.arange(12) if order is None else order
    factors = rng.standard_normal((3, 12, 12)) / 4
    covariances = spread * (factors @ factors.transpose(0, 2, 1) + 0.1 * np.eye(12))
    covariances = covariances[:, order][:, :, order]
    means = (rng.standard_normal((3, 12)) / 2)[:, order].reshape(3, *SHAPE)
    return ConditionalMixture([0.5, 0.3, 0.2], means, covariances, [0, 1, 1])


def point(dtype=None):
    return jnp.linspace(-1, 1, 12, dtype=dtype).reshape(SHAPE)


def test_maps_are_the_closed_forms(x64):
    target, other, x, sigma, c = world(), world(2.0), point(), 0.7, jnp.int32(1)
    found = jax.jit(lambda x, s: curvature_maps(target, x, s, c, baseline=other))(x, sigma)

    def rho(density, condition):
        return 1 + sigma**2 * np.diag(density.hessian(x, sigma, condition)).reshape(SHAPE)

    def proxy(density, condition):
        gap = target.score(x, sigma, c) - density.score(x, sigma, condition)
        return sigma**2 * np.asarray(gap) ** 2

    expected = {
        "curvature": 1 - rho(target, c),
        "curvature_over_null": rho(target, None) - rho(target, c),
        "curvature_over_baseline": rho(other, c) - rho(target, c),
        "score_over_null": proxy(target, None),
        "score_over_baseline": proxy(other, c),
    }
    for name, value in expected.items():
        of = getattr(found, name)
        np.testing.assert_allclose(of.value, value, rtol=0, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(of.summed, value.sum(-1), rtol=0, atol=1e-12, err_msg=name)
        assert not np.any(of.standard_error)
        assert not np.any(of.summed_standard_error)
    # What is retained is the posterior's variance over sigma^2: the second-order Tweedie formula.
    variance = np.diag(target.posterior(x, sigma, c).covariance).reshape(SHAPE)
    np.testing.assert_allclose(sigma**2 * (1 - found.curvature.value), variance, atol=1e-12)
    assert found.status == Status.OK
    # The papers' scaling, in our coordinates and in those of a process with alpha.
    raw = -np.diag(target.hessian(x, sigma, c)).reshape(SHAPE)
    np.testing.assert_allclose(found.curvature.times(found.curvature_unit()).value, raw)
    of_process = found.curvature.times(found.curvature_unit(0.5)).summed
    np.testing.assert_allclose(of_process, raw.sum(-1) / 0.5**2)


def test_the_proxy_is_the_curvature_on_average_over_conditions(x64):
    """E_{c ~ p(c|x)} of both differences to the null branch agree, at every x and sigma."""
    density = world()

    def gap(x, sigma):
        total = jnp.zeros(SHAPE)
        for c in (0, 1):
            maps = curvature_maps(density, x, sigma, jnp.int32(c))
            weight = jnp.exp(density.log_class_prob(x, sigma, c))
            total += weight * (maps.curvature_over_null.value - maps.score_over_null.value)
        return total

    xs = jax.random.normal(KEY, (20, *SHAPE))
    assert np.abs(jax.jit(jax.vmap(gap))(xs, jnp.geomspace(0.05, 5, 20))).max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_a_target_that_is_its_baseline_differs_by_exactly_zero(method, planted):
    same = planted(4, pinned=1.0)
    given = {"baseline": same, "key": KEY, "method": method, "num_products": 8}
    x = jnp.linspace(-1, 1, 16, dtype=same.free.variances.dtype).reshape(4, 4, 1)
    found = jax.jit(lambda x: curvature_maps(same, x, 0.5, jnp.int32(0), **given))(x)
    for name in NAMES[1:]:
        assert not np.any(getattr(found, name).value), name
    assert np.all(found.curvature.value != 0)


@pytest.mark.parametrize("method", METHODS[1:])
def test_estimates_err_as_they_say(method, planted):
    world = planted(8, length=1.5)
    x = jnp.full((8, 8, 1), 0.1, world.free.variances.dtype)

    def run(key, method):
        given = {"key": key, "method": method, "num_products": 16}
        return curvature_maps(world, x, 0.5, jnp.int32(0), **given).curvature_over_null

    truth = np.asarray(run(KEY, "exact").summed)
    found = jax.jit(jax.vmap(lambda key: run(key, method)))(jax.random.split(KEY, 64))
    error = np.asarray(found.summed) - truth
    scale = np.sqrt(np.mean(error**2))
    assert np.abs(error.mean(0)).max() < 5 * max(error.std(0).max(), scale) / 8
    stated = np.sqrt(np.mean(np.asarray(found.summed_standard_error) ** 2))
    assert 0.5 < stated / scale < 6  # the lattice's bar is wide where operators fade fast
    assert scale < 0.25 * np.abs(truth).max()


def test_errors_of_summed_maps_hold_for_coupled_channels():
    """Channels of a pixel can err alike: the sum's bar is that of the worst case, and no more."""
    coupled = jnp.asarray(np.kron(np.eye(4), np.ones((3, 3))), jnp.float32)

    def score(x, sigma, condition=None):
        return -(coupled @ x.reshape(-1)).reshape(x.shape) / sigma**2

    def one(key):
        given = {"key": key, "method": "hutchinson", "num_products": 8}
        return curvature_maps(score, point(jnp.float32), 1.0, **given).curvature

    found = jax.jit(jax.vmap(one))(jax.random.split(KEY, 400))
    stated = np.sqrt(np.mean(np.asarray(found.summed_standard_error) ** 2))
    assert np.asarray(found.summed).std() == pytest.approx(stated, rel=0.1)
    independent = np.sqrt(np.sum(np.var(found.value, axis=0), axis=-1))
    assert independent.max() < 0.8 * stated


def test_chunks_do_not_matter(planted, x64):
    world = planted(6)

    def run(method, chunk):
        given = {"key": KEY, "method": method, "num_products": 7, "chunk_size": chunk}
        return jax.jit(lambda x: curvature_maps(world, x, 0.5, jnp.int32(0), **given))(
            jnp.zeros((6, 6, 1))
        ).curvature_over_null.value

    for method in ("exact", "lattice"):
        np.testing.assert_allclose(run(method, 5), run(method, None), rtol=1e-11, atol=1e-13)


def test_maps_move_with_pixels_and_channels(x64):
    """The world of permuted pixels and channels has the permuted maps."""
    density, x = world(), point()
    pixels, channels = np.array([2, 0, 3, 1]), np.array([1, 2, 0])

    def moved(image):
        flat = np.asarray(image).reshape(*image.shape[:-3], 4, 3)
        return flat[..., pixels, :][..., channels].reshape(image.shape)

    again = world(order=moved(np.arange(12).reshape(SHAPE)).reshape(-1))
    run = jax.jit(lambda density, x: curvature_maps(density, x, 0.6, jnp.int32(1)))
    here, there = run(density, x), run(again, jnp.asarray(moved(x)))
    for name in ("curvature_over_null", "score_over_null"):
        of, expected = getattr(there, name), getattr(here, name)
        np.testing.assert_allclose(of.value, moved(expected.value), atol=1e-13)
        summed = np.asarray(expected.summed).reshape(-1)[pixels].reshape(2, 2)
        np.testing.assert_allclose(of.summed, summed, atol=1e-13)


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [("epsilon", DiscreteVP()), ("v_prediction", DiscreteVP()), ("flow", FlowMatching())],
    ids=["noise", "velocity", "flow"],
)
def test_maps_do_not_depend_on_what_the_network_predicts(prediction, schedule, x64):
    density, x, sigma, c = world(), point(), 0.8, jnp.int32(1)

    def network(x_t, time, condition):
        t = time if isinstance(schedule, DiscreteVP) else time / schedule.time_scale
        alpha, sigma_t = schedule.alpha(t), schedule.sigma_t(t)
        noise = -(sigma_t / alpha) * density.score(x_t / alpha, sigma_t / alpha, condition)
        clean = (x_t - sigma_t * noise) / alpha
        outputs = {"epsilon": noise, "v_prediction": alpha * noise - sigma_t * clean}
        return outputs.get(prediction, noise - clean)

    score = from_prediction(network, prediction=prediction, schedule=schedule)

    def run(score):
        return jax.jit(lambda x: curvature_maps(score, x, sigma, c))(x)

    expected = run(density)
    found = run(lambda x, s, k=None: score(x, s, density.null_condition if k is None else k))
    for name in ("curvature", "curvature_over_null", "score_over_null"):
        np.testing.assert_allclose(
            getattr(found, name).value, getattr(expected, name).value, rtol=1e-6, atol=1e-9
        )


def test_one_dimension_of_freedom_lies_in_other_coordinates(x64):
    """Two prompts of the same local dimension in four coordinates: a concept and a template."""
    concept = np.diag([1e-6] * 4) + np.ones((4, 4)) / 4  # one free direction, spread over all
    template = np.diag([1.0, 1e-6, 1e-6, 1e-6])  # one free coordinate
    density = ConditionalMixture(
        [0.4, 0.4, 0.2], np.zeros((3, 4)), np.stack([concept, template, np.eye(4)]), [0, 1, 2]
    )
    sigma = 0.05

    def run(c):
        maps = curvature_maps(density, jnp.zeros(4), sigma, c, baseline=density)
        return maps.curvature.value

    retained = np.asarray(1 - jax.jit(jax.vmap(run))(jnp.arange(3, dtype=jnp.int32)))
    # The same number of dimensions, tr M = 1, to the noise...
    np.testing.assert_allclose(retained[:2].sum(1), 1.0, atol=3e-3)
    # ... in each coordinate a quarter of its variance, or all of it in the first.
    np.testing.assert_allclose(retained[0], 0.25, atol=1e-3)
    np.testing.assert_allclose(retained[1], [1, 0, 0, 0], atol=3e-3)
    stored = (retained[2] - retained[1]) > 0.9
    assert stored.tolist() == [False, True, True, True]


def test_a_planted_block_is_found(planted, x64):
    world = planted(12)
    x = jax.random.normal(KEY, (12, 12, 1)) * 0.2
    found = curvature_maps(world, x, 0.2, jnp.int32(0), baseline=world.free)
    for name in ("curvature_over_null", "curvature_over_baseline"):
        values = np.asarray(getattr(found, name).summed)
        assert mask_iou(values[None] > 0.25, world.mask[None]) >= 0.95, name


def test_the_more_a_block_is_pinned_the_more_it_stands_out(planted, x64):
    def run(pinned):
        world = planted(8, pinned)
        maps = jax.jit(curvature_maps)(world, jnp.zeros((8, 8, 1)), 0.3, jnp.int32(0))
        values = np.asarray(maps.curvature_over_null.summed)
        return values[world.mask].mean(), np.abs(values[~world.mask]).max()

    inside, outside = np.array([run(pinned) for pinned in (1.0, 0.8, 0.5, 0.2, 0.05)]).T
    assert inside[0] == pytest.approx(0, abs=1e-12)
    assert np.all(np.diff(inside) > 0)
    assert outside.max() < 0.5 * inside.max()


def test_float32_is_near_float64(planted, x64):
    world = planted(6)

    def run(dtype):
        given = (leaf.astype(dtype) for leaf in jax.tree.leaves((world.stored, world.free)))
        fields = jax.tree.unflatten(jax.tree.structure((world.stored, world.free)), given)
        x = jnp.linspace(-1, 1, 36, dtype=dtype).reshape(6, 6, 1)
        score = world._replace(stored=fields[0], free=fields[1])
        return jax.jit(lambda x: curvature_maps(score, x, 0.5, jnp.int32(0), baseline=score))(x)

    single, double = run(jnp.float32), run(jnp.float64)
    for name in NAMES:
        of = getattr(single, name)
        assert of.value.dtype == jnp.float32
        np.testing.assert_allclose(of.value, getattr(double, name).value, atol=5e-6)


@pytest.mark.parametrize("where", ["target", "null", "baseline"])
def test_what_is_not_finite_is_said(where):
    bad = jnp.where(jnp.arange(4) == 1, jnp.nan, 1.0)

    def score(of):
        def at(x, sigma, condition=None):
            branch = "null" if of == "target" and condition is None else of
            return -x * (bad if branch == where else 1.0)

        return at

    given = {"baseline": score("baseline")}
    found = curvature_maps(score("target"), jnp.ones(4), 0.5, jnp.int32(0), **given)
    assert found.status == Status.NONFINITE
    for name in NAMES:
        assert np.all(np.isnan(getattr(found, name).value)), name


COSTS = {
    ("exact", 12, 9): (3, 36, 0),
    ("lattice", 12, 9): (3, 27, 0),
    ("lattice", 12, 20): (3, 36, 0),
    ("hutchinson", 12, 20): (3, 60, 0),
    ("auto", 12, 9): (3, 24, 45),
    ("auto", 12, 5): (3, 15, 0),
}


class Products:
    """The score -2 x, counting its evaluations and the products with its Jacobian together.

    A linear solve with a solver of one's own is linear to JAX, whatever the solver does besides.
    """

    def __init__(self):
        self.products = self.transposed = 0

    def _count(self, _):
        self.products += 1

    def _count_transposed(self, _):
        self.transposed += 1

    def __call__(self, x, sigma, condition=None):
        def solve(_, v):
            jax.debug.callback(self._count, v[0, 0, 0])
            return -2 * v

        def transposed(_, u):
            jax.debug.callback(self._count_transposed, u[0, 0, 0])
            return -2 * u

        return jax.lax.custom_linear_solve(lambda v: -v / 2, x, solve, transposed)


@pytest.mark.parametrize(("method", "size", "num_products"), COSTS)
def test_the_declared_cost_is_what_runs(method, size, num_products):
    score = Products()
    found = jax.jit(
        lambda x: curvature_maps(
            score,
            x,
            0.5,
            jnp.int32(0),
            baseline=score,
            key=KEY,
            method=method,
            num_products=num_products,
            chunk_size=3 if method in ("exact", "lattice") else None,  # chunks are filled up
        )
    )(point(jnp.float32))
    jax.effects_barrier()
    declared = maps_cost(size, 3, method, num_products)
    assert tuple(declared) == COSTS[method, size, num_products]
    assert tuple(int(n) for n in found.cost) == tuple(declared)
    assert score.products == declared.forward + declared.jvp
    assert score.transposed == declared.vjp


def test_beyond_4096_entries_maps_are_estimates():
    assert maps_cost(4096, 2).jvp == 2 * 4096
    assert maps_cost(4097, 2) == maps_cost(4097, 2, "lattice", 64)
    with pytest.raises(InputError, match="key: expected one for the estimate 'lattice'"):
        curvature_maps(lambda x, s, c=None: -x, jnp.zeros((65, 65)), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_products": 0}, "num_products"),
        ({"sigma": 0.0}, "sigma"),
        ({"method": "hutchinson"}, "key: expected one for the estimate 'hutchinson'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    given = {"x": jnp.zeros(3), "sigma": 1.0} | options
    with pytest.raises(InputError, match=message):
        curvature_maps(lambda x, s, c=None: -x, **given)


def test_the_mean_of_draws_knows_its_error(planted):
    """The error is that of points and probes together; of one draw, the draw's own."""
    world = planted(4)

    def one(x, key):
        given = {"key": key, "method": "hutchinson", "num_products": 4}
        return curvature_maps(world, x, 0.5, jnp.int32(0), **given)

    dtype = world.free.variances.dtype
    xs = jax.random.normal(KEY, (200, 6, 4, 4, 1), dtype)
    keys = jax.random.split(KEY, (200, 6))
    found = jax.jit(jax.vmap(jax.vmap(one)))(xs, keys)
    means = jax.vmap(mean_over_draws)(found)
    for name in ("curvature_over_null", "score_over_null"):
        of = getattr(means, name)
        stated = np.sqrt(np.mean(np.asarray(of.summed_standard_error) ** 2))
        spread = np.sqrt(np.mean(np.var(of.summed, axis=0)))
        assert stated == pytest.approx(spread, rel=0.1), name
    assert int(means.cost.jvp[0]) == 6 * 2 * 4
    alone = jax.tree.map(lambda leaf: leaf[0, :1], found)
    once = mean_over_draws(alone)
    np.testing.assert_array_equal(once.curvature.standard_error, alone.curvature.standard_error[0])


def test_rows_are_compared_with_the_mean_of_the_others():
    rng = np.random.default_rng(0)
    values, errors = rng.random((5, 2, 3)), 0.1 * rng.random((5, 2, 3))
    values[3] = np.nan
    values, errors = jnp.asarray(values, jnp.float32), jnp.asarray(errors, jnp.float32)
    found = over_others(PixelMap(values, errors, values.sum(-1), errors.sum(-1)))
    for row in range(5):
        rest = [i for i in range(5) if i not in (row, 3)]
        expected = np.asarray(values)[row] - np.asarray(values)[rest].mean(0)
        np.testing.assert_allclose(found.value[row], expected, rtol=1e-5, atol=1e-6)
    spread = np.sqrt(errors[0] ** 2 + (errors[jnp.array([1, 2, 4])] ** 2).sum(0) / 9)
    np.testing.assert_allclose(found.standard_error[0], spread, rtol=1e-5)
    assert np.all(np.isnan(found.value[3]))
    with pytest.raises(InputError, match="at least 2 rows"):
        over_others(PixelMap(*(entry[:1] for entry in found)))
