"""p-Laplacians from evaluations alone: closed forms, quadrature of derivatives, honest errors."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.calculus.flux import p_laplacian_ball, p_laplacian_flux, p_laplacian_stein
from memjax.densities.gaussian import Gaussian
from memjax.densities.mixture import GaussianMixture
from memjax.diffusion.combine import at

POWERS = (1, 1.5, 2, 3, 4)
KEY = jax.random.key(0)


def triangle():
    """Three modes on an equilateral triangle of side 5, variance 0.1, and the seven points."""
    corners = np.array([[0, 0], [5, 0], [2.5, 2.5 * 3**0.5]])
    corners -= corners.mean(0)
    middles = [(corners[i] + corners[j]) / 2 for i, j in ((0, 1), (0, 2), (1, 2))]
    points = np.concatenate([corners, middles, [[0.0, 0.0]]])
    return GaussianMixture(np.ones(3) / 3, jnp.asarray(corners), 0.1), jnp.asarray(points)


# p = 1: the mean cosine; p = 2: the total inward flux through the circle of radius 1.
COSINES = np.array([-1.0] * 3 + [0.3723] * 3 + [0.6888])
INWARD = {
    1: np.array([6.2832] * 3 + [-2.3393] * 3 + [-4.3277]),
    2: np.array([62.8319] * 3 + [-37.1023] * 3 + [-87.0693]),
}


def circle_means(field, center, powers, num=20_000):
    """Phi_p for every p on the unit circle about the center, by the trapezoid rule."""
    angles = jnp.linspace(0, 2 * math.pi, num, endpoint=False)
    normals = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    s = jax.vmap(field)(center[None] + normals)
    length, slope = jnp.linalg.norm(s, axis=1), jnp.sum(s * normals, axis=1)
    return jnp.stack([jnp.mean(length ** (p - 2) * slope) for p in powers])


def tilted(d, seed=0, components=3, spread=2.0):
    """A mixture without symmetries, and a point among its modes."""
    rng = np.random.default_rng(seed)
    means = spread * rng.standard_normal((components, d)) / d**0.5
    weights = rng.dirichlet(np.full(components, 5.0))
    density = GaussianMixture(weights, jnp.asarray(means), 0.4)
    return density, jnp.asarray(means.mean(0))


def run(form, field, p, x, key=KEY, **options):
    return jax.jit(form(field, p, **options))(x, key)


def within(estimate, expected, errors=4.0, rounding=0.0):
    """Every value within some standard errors of what it should be."""
    deviation = np.abs(np.asarray(estimate.value) - np.asarray(expected))
    np.testing.assert_array_less(deviation, errors * np.asarray(estimate.standard_error) + rounding)


# Closed forms -------------------------------------------------------------------------------------


def test_the_seven_points_by_quadrature(x64):
    """Our scores on the circle against the printed table, and against adaptive quadrature."""
    density, points = triangle()
    means = np.asarray(density.means)

    def twin(angle, center, p):
        normal = np.array([np.cos(angle), np.sin(angle)])
        offsets = center + normal - means
        energies = np.sum(offsets**2, axis=1) / 0.2
        odds = np.exp(energies.min() - energies)
        s = -(odds / odds.sum()) @ offsets / 0.1
        return np.linalg.norm(s) ** (p - 2) * (s @ normal)

    phi = jax.jit(jax.vmap(lambda x: circle_means(at(density, 0.0), x, (1, 2))))(points)
    np.testing.assert_allclose(phi[:, 0], COSINES, atol=5.1e-5)
    for column, (p, table) in zip(2 * np.pi * phi.T, INWARD.items(), strict=True):
        np.testing.assert_allclose(-column, table, atol=5.1e-5)
        for i in (0, 3, 6):
            exact, _ = integrate.quad(twin, 0, 2 * np.pi, (np.asarray(points[i]), p), limit=500)
            assert column[i] == pytest.approx(exact, abs=1e-6)


def test_the_seven_points_by_the_estimator():
    density, points = triangle()
    estimate = jax.jit(
        jax.vmap(
            p_laplacian_flux(
                at(density, 0.0),
                (1, 2),
                radius=1.0,
                num_pairs=500_000,
                directions="independent",
                scaled=False,
                chunk_size=50_000,
            ),
            in_axes=(0, None),
        )
    )(points, KEY)
    table = -np.stack([INWARD[1], INWARD[2]], axis=1) / (2 * np.pi)
    within(estimate, table, rounding=5e-5)
    assert np.all(estimate.standard_error[:, 0] < 1e-3)
    assert np.all(estimate.standard_error[:, 1] < 2e-3 * np.abs(table[:, 1]))
    assert not np.any(estimate.status)


def test_a_mode_has_no_variance():
    """Phi_p = -(r/v)^(p-1) by every pair, in any shape."""
    v, r, shape = 0.5, 1.5, (2, 3, 2)
    field = at(Gaussian(jnp.zeros(shape), v), 0.0)
    expected = np.array([-((r / v) ** (p - 1)) for p in POWERS])
    flux = functools.partial(p_laplacian_flux, field, POWERS, radius=r, num_pairs=30)

    @jax.jit
    def both(x, key):
        plain = flux(directions="independent", scaled=False)
        return flux()(x, key), plain(x, key)

    for found, factor in zip(both(jnp.zeros(shape), KEY), (12 / r, 1.0), strict=True):
        np.testing.assert_allclose(found.value, factor * expected, rtol=2e-6)
        np.testing.assert_array_less(found.standard_error, 1e-6 * np.abs(factor * expected))
        assert not np.any(found.status)


def expected_cosine(d, distance):
    """Phi_1 of one Gaussian at a distance from its mean in units of r, by quadrature over c."""
    weight = lambda c: (1 - c * c) ** ((d - 3) / 2)  # noqa: E731
    cosine = lambda c: (distance * c + 1) / np.sqrt(distance**2 + 2 * distance * c + 1)  # noqa: E731
    total = integrate.quad(weight, -1, 1, epsabs=0, epsrel=1e-10)[0]
    return -integrate.quad(lambda c: weight(c) * cosine(c), -1, 1, epsrel=1e-10)[0] / total


@pytest.mark.parametrize(
    ("d", "num_pairs", "known"),
    [
        (3, 20_000, {0.5: -(1 - 0.25 / 3), 1: -2 / 3, 2: -1 / 3, 5: -2 / 15}),
        (16, 2_400, {0.5: -0.897016, 1: -0.701246, 2: -0.430447, 5: -0.184836}),
        (256, 512, {0.5: -0.894568, 1: -0.706760, 2: -0.446231, 5: -0.195421}),
    ],
)
def test_off_center(d, num_pairs, known):
    """p = 1 measures the distance; p = 2 does not see it, and has no variance."""
    v, r = 0.3, 0.7
    x = jnp.asarray(list(known))[:, None] * r * jnp.ones((1, d)) / d**0.5
    estimate = jax.jit(
        jax.vmap(
            p_laplacian_flux(
                at(Gaussian(jnp.zeros(d), v), 0.0),
                (1, 2),
                radius=r,
                num_pairs=num_pairs,
                directions="orthonormal" if d == 3 else "independent",
                scaled=False,
                chunk_size=1024,
            )
        )
    )(x, jax.random.split(KEY, 4))
    for distance, value in known.items():
        assert expected_cosine(d, distance) == pytest.approx(value, abs=1e-6)
    cosines = jax.tree.map(lambda leaf: leaf[:, 0] if leaf.ndim == 2 else leaf, estimate)
    within(cosines, list(known.values()), rounding=1e-6)
    assert np.all(cosines.standard_error < 2.5e-3)
    np.testing.assert_allclose(estimate.value[:, 1], -r / v, rtol=1e-5)


def test_a_full_frame_is_exact_for_a_linear_score(x64):
    """Phi_2 = -(r/d) tr V^-1 and, p = inf, -s^T V^-1 s at every center and radius."""
    rng = np.random.default_rng(3)
    root = rng.standard_normal((6, 6))
    precision = np.linalg.inv(root @ root.T + np.eye(6))
    field = at(Gaussian(jnp.zeros(6), np.linalg.inv(precision)), 0.0)
    x = jnp.asarray(rng.standard_normal((4, 6)))
    s = -np.asarray(x) @ precision
    curvature = -np.einsum("ni,ij,nj->n", s, precision, s)

    def estimate(x, radius, key):
        return p_laplacian_flux(field, (2, math.inf), radius=radius, num_pairs=6)(x, key)

    radii = jnp.asarray([0.01, 0.1, 1.0, 10.0])
    found = jax.jit(jax.vmap(estimate))(x, radii, jax.random.split(KEY, 4))
    np.testing.assert_allclose(found.value[:, 0], -np.trace(precision), rtol=1e-9)
    np.testing.assert_allclose(found.value[:, 1], curvature, rtol=1e-9)


def test_variance_laws(x64):
    """Var of one pair at a linear score, from the standard error over many."""
    rng = np.random.default_rng(4)
    d, m = 5, 100_000
    matrix = rng.standard_normal((d, d))  # not symmetric: only its symmetric part counts
    a = jnp.asarray(matrix)
    x = jnp.asarray(rng.standard_normal(d))
    s = matrix @ np.asarray(x)
    curvature = s @ matrix @ s
    symmetric = (matrix + matrix.T) / 2
    squared, trace = np.sum(symmetric**2), np.trace(matrix)
    options = {"num_pairs": m, "chunk_size": None}

    @jax.jit
    def both(x, key):
        flux = p_laplacian_flux(
            lambda y: a @ y, (2, math.inf), radius=0.7, directions="independent", **options
        )
        stein = p_laplacian_stein(lambda y: a @ y, (2, math.inf), width=0.7, **options)
        return flux(x, key), stein(x, key)

    flux, stein = both(x, KEY)
    laws = [
        2 * d / (d + 2) * (squared - trace**2 / d),
        d / (d + 2) * (np.sum((s @ matrix) ** 2) * (s @ s) + (1 - 2 / d) * curvature**2),
    ]
    np.testing.assert_allclose(m * flux.standard_error**2, laws, rtol=0.03)
    np.testing.assert_allclose(m * stein.standard_error[0] ** 2, 2 * squared, rtol=0.03)
    for found in (flux, stein):
        within(found, [trace, curvature])


def test_a_saddle_of_the_plane(x64):
    """Midway between two modes, s = 0: the cosine for r -> 0 is an integral of the Hessian."""
    v, m = 0.5, 1.2
    density = GaussianMixture([0.5, 0.5], jnp.asarray([[-m, 0.0], [m, 0.0]]), v)
    along, across = -1 / v + m**2 / v**2, -1 / v
    angles = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    c, s = np.cos(angles), np.sin(angles)
    limit = np.mean((along * c**2 + across * s**2) / np.hypot(along * c, across * s))
    found = run(
        p_laplacian_flux,
        at(density, 0.0),
        1,
        jnp.zeros(2),
        radius=1e-4,
        num_pairs=100_000,
        directions="independent",
        scaled=False,
        chunk_size=None,
    )
    within(found, limit)
    assert found.standard_error < 3e-3


def test_a_flat_manifold():
    """A sheet of m dimensions: cosine about -sqrt(1 - m/d), and d_eff from p = 2, exactly."""
    d, m, sigma = 64, 12, 0.1
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.standard_normal((d, m)))[0]
    density = Gaussian.low_rank(jnp.zeros(d), jnp.asarray(5 * basis), 0.0)
    radius = sigma * d**0.5
    field, x = at(density, sigma), jnp.zeros(d)
    found = run(p_laplacian_flux, field, (1, 2), x, radius=radius, num_pairs=8 * d)
    cosine = float(found.value[0]) * radius / d
    assert cosine == pytest.approx(-math.sqrt(1 - m / d), abs=2e-3)
    effective = d + sigma**2 * float(found.value[1])
    assert effective == pytest.approx(float(density.effective_dimension(x, sigma)), 1e-4)


# Means of derivatives -----------------------------------------------------------------------------


def p_laplacians(density, powers):
    return lambda y: jnp.stack([density.p_laplacian(y, 0.0, p) for p in powers])


def test_all_forms_are_means_of_the_p_laplacian(x64):
    """Against products with the Hessian, integrated over disc and Gaussian."""
    density, x = tilted(2, seed=1)
    x = x + 1.5
    powers, r, w = (1, 1.5, 2, 3), 0.5, 0.35
    pointwise = jax.jit(jax.vmap(p_laplacians(density, powers)))

    nodes, weights = np.polynomial.legendre.leggauss(24)
    radii, weights = r * np.sqrt((nodes + 1) / 2), weights / 2  # uniform in the squared radius
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    normals = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    disc = x[None] + jnp.asarray((radii[:, None, None] * normals).reshape(-1, 2))
    ball_mean = weights @ np.asarray(pointwise(disc)).reshape(24, 96, 4).mean(1)

    nodes, weights = np.polynomial.hermite_e.hermegauss(48)
    grid = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    weights = np.outer(weights, weights).reshape(-1) / (2 * np.pi)
    gaussian_mean = weights[:, None] * np.asarray(pointwise(x[None] + w * jnp.asarray(grid)))

    field, options = at(density, 0.0), {"num_pairs": 50_000, "chunk_size": None}
    flux = run(p_laplacian_flux, field, powers, x, radius=r, directions="independent", **options)
    ball = run(p_laplacian_ball, field, powers, x, radius=r, **options)
    stein = run(p_laplacian_stein, field, powers, x, width=w, **options)
    within(flux, ball_mean)
    within(ball, ball_mean)
    smooth = slice(2, None)  # Gauss-Hermite does not integrate the singularity of p < 2
    within(jax.tree.map(lambda v: v[smooth] if jnp.ndim(v) else v, stein), gaussian_mean.sum(0)[2:])
    for found in (flux, ball, stein):
        assert np.all(found.standard_error < 0.02 * np.abs(found.value))


def test_ball_and_flux_agree_in_any_precision():
    density, x = tilted(16, seed=2)
    powers, field = (1, 2, 3), at(density, 0.0)
    flux = run(p_laplacian_flux, field, powers, x, radius=1.5, num_pairs=1600)
    ball = run(p_laplacian_ball, field, powers, x, radius=1.5, num_pairs=20_000)
    errors = jnp.hypot(ball.standard_error, flux.standard_error)
    within(ball._replace(standard_error=errors), flux.value)
    assert np.all(errors < 0.02 * np.abs(ball.value))


def test_the_bias_is_the_stated_one(x64):
    """(d/r) Phi_p - Delta_p u = r^2/(2(d+2)) Lap(Delta_p u): a quarter at half the radius."""
    density, x = tilted(2, seed=1)
    x = x + 0.6
    powers = (1, 2, 3)
    every = p_laplacians(density, (*powers, math.inf))

    @jax.jit
    def derivatives(x):
        return every(x), jnp.trace(jax.hessian(every)(x), axis1=1, axis2=2)

    exact, laplacian = derivatives(x)
    radii = jnp.asarray([0.08, 0.04, 0.02])

    @jax.jit
    @jax.vmap
    def flux(radius):
        options = {"radius": radius, "num_pairs": 20_000, "chunk_size": None}
        return p_laplacian_flux(at(density, 0.0), (*powers, math.inf), **options)(x, KEY)

    found = flux(radii)
    bias = found.value - exact[None]
    predicted = radii[:, None] ** 2 / 8 * laplacian[None, :3]
    np.testing.assert_allclose(bias[1:, :3], predicted[1:], rtol=0.05)
    np.testing.assert_allclose(bias[:2] / bias[1:], 4, rtol=0.06)


def test_equivariance(x64):
    """Phi_1 of c s is that of s; stretching space by b divides Delta_p u by b^p."""
    density, x = tilted(5)
    score = at(density, 0.0)
    powers, degrees = (1, 1.5, 2, 4, math.inf), np.array([0, 0.5, 1, 3, 3])

    @jax.jit
    @jax.vmap
    def flux(c, b):
        field = lambda y: c * score(y / b) / b  # noqa: E731
        return p_laplacian_flux(field, powers, radius=0.5 * b, num_pairs=8)(b * x, KEY)

    values, errors, *_ = flux(jnp.asarray([1.0, 7.0, 1.0]), jnp.asarray([1.0, 1.0, 3.0]))
    for leaf in (values, errors):
        np.testing.assert_allclose(leaf[1], 7**degrees * leaf[0], rtol=1e-11)
        np.testing.assert_allclose(leaf[2], 3 ** -(degrees + 1) * leaf[0], rtol=1e-11)


def test_powers_of_the_score_do_not_overflow(x64):
    """float32: the square of a sample, or of a score, is out of range where its mean is not."""
    density, x = tilted(5)
    density, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (density, x))
    score, powers = at(density, 0.0), (1, 2, 4)

    @jax.jit
    @jax.vmap
    def flux(scale):
        field = lambda y: score(y) * scale  # noqa: E731
        return p_laplacian_flux(field, powers, radius=0.5, num_pairs=8)(x, KEY)

    scales = np.array([1, 1e-30, 1e-15, 1e12])
    found = flux(jnp.asarray(scales, jnp.float32))
    assert found.value.dtype == jnp.float32
    factors = scales[:, None] ** (np.array(powers) - 1)
    inside = (factors > 1e-36) & (factors < 1e37)
    assert inside.sum() == 10
    for leaf in (found.value, found.standard_error):
        expected = factors * np.asarray(leaf, np.float64)[:1]
        np.testing.assert_allclose(leaf[inside], expected[inside], rtol=1e-4)
    assert not np.any(found.status[inside])


# Error bars ---------------------------------------------------------------------------------------


def coverage(d, num_pairs, directions, seeds=1000):
    """At three radii and for three powers: the share of 95 % intervals that hold the mean over
    all seeds, and the root mean square of the standard error over what it stands for."""
    density, x = tilted(d, seed=6, components=12)
    keys = jax.random.split(jax.random.key(1), seeds)

    @jax.jit
    @jax.vmap
    def estimates(radius):
        options = {"radius": radius, "num_pairs": num_pairs, "directions": directions}
        estimate = p_laplacian_flux(at(density, 0.0), (1, 2, 3), chunk_size=None, **options)
        return jax.vmap(lambda key: estimate(x, key))(keys)

    found = estimates(jnp.asarray([0.3, 1.0, 3.0]))
    low, high = found.interval(0.95)
    truth = np.mean(found.value, axis=1, keepdims=True)
    covered = np.mean((low <= truth) & (truth <= high), axis=1)
    error = np.sqrt(np.mean(np.square(found.standard_error), axis=1))
    return covered, error / np.std(found.value, axis=1)


@pytest.mark.parametrize(
    ("d", "num_pairs", "directions"),
    [
        (16, 32, "independent"),
        (2, 48, "orthonormal"),  # 24 frames
        (96, 12, "orthonormal"),  # an eighth of a frame
    ],
)
def test_error_bars_cover(x64, d, num_pairs, directions):
    covered, honesty = coverage(d, num_pairs, directions)
    assert np.all((covered > 0.92) & (covered < 0.98)), covered
    np.testing.assert_allclose(honesty, 1, atol=0.15)


def test_error_bars_of_few_frames_are_upper_bounds(x64):
    covered, honesty = coverage(8, 8, "orthonormal")
    assert np.all(covered > 0.92), covered
    assert np.all(honesty > 0.97), honesty
    assert np.all(honesty[0] > 2)  # nearly quadratic: a full frame does much better than it says


def test_the_bound_is_reached_in_the_plane(x64):
    """Flux cos(4 angle): both directions of a frame see the same, half as many count."""

    def field(y):
        radius, angle = jnp.linalg.norm(y), jnp.arctan2(y[1], y[0])
        return y / radius * jnp.cos(4 * angle)

    keys = jax.random.split(KEY, 4000)
    estimate = p_laplacian_flux(field, 2, radius=1.0, num_pairs=7, scaled=False)
    found = jax.jit(jax.vmap(lambda key: estimate(jnp.zeros(2), key)))(keys)
    ratio = jnp.sqrt(jnp.mean(found.standard_error**2)) / jnp.std(found.value)
    assert ratio == pytest.approx(1, abs=0.05)
    lone = run(p_laplacian_flux, field, 2, jnp.zeros(2), radius=1.0, num_pairs=2)
    assert lone.standard_error == jnp.inf
    assert lone.degrees_of_freedom == 0


def test_one_pair_and_one_dimension(x64):
    def field(y):
        return -(y**3) + jnp.sin(y)

    x = jnp.asarray([0.4])
    exact = (field(x + 0.3) - field(x - 0.3))[0] / 0.6
    one = run(p_laplacian_flux, field, 2, x, radius=0.3, num_pairs=1)
    four = run(p_laplacian_flux, field, 2, x, radius=0.3, num_pairs=4)
    assert one.value == pytest.approx(float(exact))
    assert one.standard_error == jnp.inf
    assert one.status == Status.OK
    assert four.value == pytest.approx(float(exact))
    assert four.standard_error < 1e-15


# Where it is not defined --------------------------------------------------------------------------


def test_zero_scores():
    """A zero has no direction and nothing else: only p = 1 suffers."""
    powers = (1, 1.5, 2, 3, math.inf)

    @jax.jit
    @jax.vmap
    def flux(slope):
        field = lambda y: slope * jax.nn.relu(y)  # noqa: E731
        return p_laplacian_flux(field, powers, radius=1.0, num_pairs=32)(jnp.zeros(3), KEY)

    found = flux(jnp.asarray([0.0, 1.0]))
    np.testing.assert_array_equal(found.status, [[Status.UNDEFINED, *[Status.OK] * 4]] * 2)
    assert np.all(np.isnan(found.value[:, 0]))
    assert np.all(np.isfinite(found.value[:, 1:]))
    np.testing.assert_array_equal(found.value[0, 1:], 0)
    np.testing.assert_array_equal(found.standard_error[0, 1:], 0)
    assert found.value[1, 2] == pytest.approx(1.5)  # by every pair: half the Laplacian of |x|^2/2

    def value(x):
        return p_laplacian_flux(jax.nn.relu, powers[1:], radius=1.0, num_pairs=32)(x, KEY).value

    assert np.all(np.isfinite(jax.jit(jax.jacfwd(value))(jnp.zeros(3))))


def test_non_finite_evaluations():
    @jax.jit
    @jax.vmap
    def flux(bad):
        field = lambda y: jnp.where(y[0] > 0, bad, -y)  # noqa: E731
        return p_laplacian_flux(field, (1, 2), radius=1.0, num_pairs=4)(jnp.zeros(2), KEY)

    found = flux(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf]))
    np.testing.assert_array_equal(found.status, Status.NONFINITE)
    assert not np.any(np.isfinite(found.value))


def test_a_value_out_of_range_says_so():
    x = jnp.zeros(2, jnp.float32)
    found = run(p_laplacian_flux, lambda y: -1e20 * y, (2, 3), x, radius=1.0, num_pairs=2)
    np.testing.assert_array_equal(found.status, [Status.OK, Status.NONFINITE])


def test_traced_lengths_that_are_not_positive():
    def flux(radius):
        return p_laplacian_flux(lambda y: -y, (1, 2), radius=radius, num_pairs=2)(jnp.ones(2), KEY)

    def ball(step):
        make = functools.partial(p_laplacian_ball, lambda y: -y, (1, 2), radius=1.0, num_pairs=2)
        return make(step=step)(jnp.ones(2), KEY)

    def stein(width):
        return p_laplacian_stein(lambda y: -y, (1, 2), width=width, num_pairs=2)(jnp.ones(2), KEY)

    for estimate in (flux, ball, stein):
        found = jax.jit(jax.vmap(estimate))(jnp.asarray([1.0, 0.0, -1.0]))
        expected = [[Status.OK] * 2, [Status.UNDEFINED] * 2, [Status.UNDEFINED] * 2]
        np.testing.assert_array_equal(found.status, expected)
        np.testing.assert_array_equal(np.isnan(found.value), np.asarray(expected) > 0)


def test_half_precision_is_summed_in_single():
    """4,096 terms of 2^-8 relative rounding each; a sum in bfloat16 would lose most of them."""
    x = jnp.zeros(4096, jnp.bfloat16)
    options = {"radius": 16.0, "num_pairs": 2, "scaled": False}
    found = run(p_laplacian_flux, lambda y: -4 * y, (1, 2), x, **options)
    assert found.value.dtype == jnp.float32
    np.testing.assert_allclose(found.value, [-1, -64], rtol=2e-4)


# How it is used -----------------------------------------------------------------------------------

FORMS = {
    "flux": functools.partial(p_laplacian_flux, radius=0.8),
    "ball": functools.partial(p_laplacian_ball, radius=0.8, step=0.1),
    "stein": functools.partial(p_laplacian_stein, width=0.4),
}


@pytest.mark.parametrize("form", FORMS)
def test_transformations(x64, form):
    """Jit, vmap over points and keys, gradient; traced once, evaluated 2 m times."""
    density, x = tilted(4)
    calls, traces, powers = [], [], (1, 2.5, math.inf)

    def field(y):
        jax.debug.callback(lambda _: calls.append(1), y[0])
        return density.score(y, 0.0)

    @jax.jit
    def together(xs, keys):
        traces.append(1)
        return jax.vmap(FORMS[form](field, powers, num_pairs=5, chunk_size=5))(xs, keys)

    xs, keys = x[None] + 0.3 * jax.random.normal(KEY, (3, 4)), jax.random.split(KEY, 3)
    found = jax.block_until_ready(together(xs, keys))
    jax.effects_barrier()
    assert len(calls) == 3 * 10
    np.testing.assert_array_equal(together(xs + 0.1, keys).cost.forward, 10)
    assert len(traces) == 1
    assert found.value.shape == found.standard_error.shape == found.status.shape == (3, 3)

    def value(y, key):
        estimate = FORMS[form](at(density, 0.0), powers, num_pairs=5, chunk_size=None)
        return estimate(y, key).value

    @jax.jit
    def slopes(x, key):
        steps = h * jnp.eye(4)
        moved = jnp.concatenate([x[None], x[None] + steps, x[None] - steps])
        alone, *values = jnp.split(jax.vmap(value, (0, None))(moved, key), [1, 5])
        return alone[0], jax.jacrev(value)(x, key), (values[0] - values[1]).T / (2 * h)

    h = 1e-5
    alone, exact, differences = slopes(xs[2], keys[2])
    np.testing.assert_allclose(found.value[2], alone, rtol=1e-12)  # in whatever chunks
    np.testing.assert_allclose(exact, differences, rtol=1e-5, atol=1e-7)


def test_every_power_as_if_asked_alone():
    density, x = tilted(4)
    powers = (1, 2, 2.5, math.inf)

    @jax.jit
    def ask(x, key):
        estimate = functools.partial(p_laplacian_flux, at(density, 0.0), radius=0.8, num_pairs=3)
        return estimate(powers)(x, key), [estimate(p)(x, key) for p in powers]

    every, alone = ask(x, KEY)
    for name in ("value", "standard_error", "status"):
        assert [getattr(one, name).shape for one in alone] == [()] * 4
        values = np.stack([getattr(one, name) for one in alone])
        np.testing.assert_allclose(getattr(every, name), values, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32), (jnp.float64, jnp.float64)],
)
def test_precision_is_the_callers_or_single(x64, dtype, expected):
    for form in FORMS.values():
        estimate = form(lambda y: -y, (1, 2), num_pairs=2)
        found = jax.eval_shape(estimate, jnp.ones(3, dtype), KEY)
        assert found.value.dtype == found.standard_error.dtype == expected


FIELD, POINT = (lambda y: -y), jnp.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: p_laplacian_flux(FIELD, 0.5, radius=1.0, num_pairs=2), "p: expected"),
        (lambda: p_laplacian_flux(FIELD, math.nan, radius=1.0, num_pairs=2), "p: expected"),
        (lambda: p_laplacian_flux(FIELD, (), radius=1.0, num_pairs=2), "p: expected"),
        (lambda: p_laplacian_flux(FIELD, 1, radius=0, num_pairs=2), "radius: expected a positive"),
        (lambda: p_laplacian_flux(FIELD, 1, radius=math.nan, num_pairs=2), "radius: expected"),
        (lambda: p_laplacian_ball(FIELD, 1, radius=-1.0, num_pairs=2), "radius: .* got -1.0"),
        (lambda: p_laplacian_ball(FIELD, 1, radius=1, num_pairs=2, step=0.0), "step: expected"),
        (lambda: p_laplacian_stein(FIELD, 1, width=math.inf, num_pairs=2), "width: expected"),
        (lambda: p_laplacian_stein(FIELD, 1, width=1.0, num_pairs=0), "num_pairs: expected"),
        (lambda: p_laplacian_flux(FIELD, 1, radius=1.0, num_pairs=0), "num_pairs: .* got 0"),
        (
            lambda: inspect.unwrap(p_laplacian_flux)(
                FIELD, 1, radius=1.0, num_pairs=2, directions="random"
            ),
            "directions: expected 'orthonormal' or 'independent', got 'random'",
        ),
        (
            lambda: p_laplacian_flux(FIELD, 1, radius=1.0, num_pairs=2, chunk_size=0)(POINT, KEY),
            "chunk_size: expected",
        ),
        (
            lambda: inspect.unwrap(p_laplacian_flux(FIELD, 1, radius=1.0, num_pairs=2))(
                jnp.arange(3), KEY
            ),
            "x: expected a floating-point array",
        ),
        (
            lambda: p_laplacian_flux(FIELD, 1, radius=1.0, num_pairs=2)(jnp.zeros(0), KEY),
            "x: expected at least one entry",
        ),
        (
            lambda: p_laplacian_ball(lambda y: y[:2], 1, radius=1.0, num_pairs=2)(POINT, KEY),
            r"field: expected f\(x\) like x",
        ),
        (
            lambda: p_laplacian_stein(lambda y: y.astype(jnp.bfloat16), 1, width=1.0, num_pairs=2)(
                POINT, KEY
            ),
            r"field: expected f\(x\) like x",
        ),
    ],
)
def test_unusable_input_is_refused_before_tracing(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
