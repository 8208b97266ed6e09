"""p-Laplace detectors against closed forms, quadrature, and the paper's protocol written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.calculus.p_laplace import p_laplacian
from memjax.densities.mixture import GaussianMixture
from memjax.detect import (
    EffectiveDimension,
    FluxDimension,
    PLaplace,
    PLaplaceFlux,
    PublishedPLaplaceFlux,
    Requirements,
    cost,
    evaluate_detectors,
    requirements,
)
from memjax.diffusion.combine import at, gap

D = 6
KEY = jax.random.key(0)
POWERS = (1, 1.5, 2, 3)


def find(score, x, detectors, condition=None, key=KEY):
    """Findings of several detectors as arrays [detectors], compiled."""

    def one(x, key):
        found = evaluate_detectors(score, x, tuple(detectors), key=key, condition=condition)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    return jax.jit(one)(x, key)


def find_many(score, x, detectors, keys):
    """Findings [keys, detectors]: independent draws of the directions."""

    def one(key):
        found = evaluate_detectors(score, x, tuple(detectors), key=key)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    return jax.jit(jax.vmap(one))(keys)


def stored_score(x, sigma, condition=None):
    """The origin, stored as a point."""
    return -x / sigma**2


def mixture(d=D):
    """Three components without symmetries, and a point among them."""
    rng = np.random.default_rng(2)
    means = jnp.asarray(rng.standard_normal((3, d)), float)
    return GaussianMixture([0.5, 0.3, 0.2], means, 0.1), 0.3 * means[0] + 0.1


# The flux -----------------------------------------------------------------------------------------


def test_the_seven_points_of_the_paper():
    """Three modes on a triangle of side 5 with variance 0.1, r = 1: printed to four digits."""
    corners = np.array([[0, 0], [5, 0], [2.5, 2.5 * 3**0.5]])
    corners -= corners.mean(0)
    middles = [(corners[i] + corners[j]) / 2 for i, j in ((0, 1), (0, 2), (1, 2))]
    density = GaussianMixture(np.ones(3) / 3, jnp.asarray(corners, float), 0.1)
    points = jnp.asarray([*corners, *middles, [0, 0]], float)
    sigma = 0.5
    detectors = [PLaplaceFlux(sigma, p, 1 / (sigma * 2**0.5), num_pairs=4) for p in (1, 2)]
    keys = jax.random.split(KEY, 4000)

    def score(x, sigma, condition=None):
        return density.score(x, 0.0)

    found = jax.jit(
        jax.vmap(
            lambda x: jax.vmap(lambda key: evaluate_detectors(score, x, tuple(detectors), key=key))(
                keys
            )
        )
    )(points)
    cosine = np.array([-1.0] * 3 + [0.3723] * 3 + [0.6888])
    inward = np.array([62.8319] * 3 + [-37.1023] * 3 + [-87.0693])  # 2 pi Phi_2, turned over
    for result, expected in zip(found, (-cosine, -2 * -inward / (2 * np.pi)), strict=True):
        # p = 1: the value. p = 2: raw = (d/r) Phi_2, with d = 2 and r = 1.
        got = result.value if result is found[0] else -result.raw
        if result is found[1]:
            np.testing.assert_allclose(result.value, -result.raw * sigma**2 / 2, rtol=1e-5)
        tolerance = 4 * np.std(got, axis=1) / len(keys) ** 0.5 + 1e-4
        np.testing.assert_array_less(np.abs(np.mean(got, axis=1) - expected), tolerance)
        assert not np.any(result.status)


def test_a_stored_point_reads_one_for_every_exponent_and_radius():
    sigma = 0.2
    detectors = [PLaplaceFlux(sigma, p, r, 4) for p in POWERS for r in (0.3, 1.0)]
    found = find(stored_score, jnp.zeros(D), detectors)
    np.testing.assert_allclose(found.value, 1, rtol=2e-6)
    np.testing.assert_array_less(found.standard_error, 1e-6)
    r = np.array([detector.radius * sigma * D**0.5 for detector in detectors])
    p = np.array([detector.p for detector in detectors])
    np.testing.assert_allclose(found.raw, -(D / r) * (r / sigma**2) ** (p - 1), rtol=1e-5)


def cosine_off_center(d, distance):
    """Phi_1 of one Gaussian at a distance from its mean in units of r, by quadrature."""

    def weight(c):
        return (1 - c * c) ** ((d - 3) / 2)

    def weighted(c):
        return weight(c) * (distance * c + 1) / np.sqrt(distance**2 + 2 * distance * c + 1)

    total = integrate.quad(weight, -1, 1, epsabs=0)[0]
    return -integrate.quad(weighted, -1, 1, epsabs=1e-12)[0] / total


@pytest.mark.parametrize(
    ("d", "num_keys", "known"),
    [
        (16, 800, {0.5: -0.897016, 1: -0.701246, 2: -0.430447, 5: -0.184836}),
        (256, 200, {0.5: -0.894568, 1: -0.706760, 2: -0.446231, 5: -0.195421}),
    ],
)
def test_off_the_center_of_one_gaussian(d, num_keys, known):
    """p = 1 against known values and quadrature; p = 2 is -d/v whatever the center and draws."""
    sigma, variance = 0.3, 0.7
    r = 0.5 * sigma * d**0.5
    x = jnp.outer(jnp.asarray(list(known), float), jnp.eye(1, d)[0] * r)
    detectors = PLaplaceFlux(sigma, num_pairs=4), PLaplaceFlux(sigma, 2, num_pairs=4)
    keys = jax.random.split(KEY, num_keys)

    def one(x, key):
        return evaluate_detectors(lambda x, s, c=None: -x / variance, x, detectors, key=key)

    one_p, two_p = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(x, keys)
    for distance, value, exact in zip(known, one_p.value, known.values(), strict=True):
        assert cosine_off_center(d, distance) == pytest.approx(exact, abs=1e-6)
        assert abs(np.mean(value) + exact) < 4 * np.std(value) / num_keys**0.5
    np.testing.assert_allclose(two_p.value, sigma**2 / variance, rtol=2e-5)
    np.testing.assert_allclose(two_p.raw, -d / variance, rtol=2e-5)
    # The error is over pairs, and honest: 200 values give their spread to 5 %.
    honest = np.sqrt(np.mean(one_p.standard_error**2, axis=1)) / np.std(one_p.value, axis=1, ddof=1)
    assert np.all(np.abs(honest - 1) < 0.2)


def test_the_papers_protocol_in_its_own_coordinates(x64):
    """A VP process: center alpha x0, radius sigma_t sqrt(d), predicted noise; the same number."""
    density, x0 = mixture()
    alpha = 0.6
    sigma_t = math.sqrt(1 - alpha**2)
    sigma = sigma_t / alpha
    detectors = [PLaplaceFlux(sigma, p, 1.0, 5) for p in POWERS]
    detectors += [PublishedPLaplaceFlux(sigma, p, 1.0, 5) for p in POWERS]
    found = find(density, x0, detectors)

    draws = [np.asarray(jax.random.normal(derive_key(KEY, "draw", j), (D,))) for j in range(5)]
    normals = np.array([sign * n / np.linalg.norm(n) for n in draws for sign in (1, -1)])
    r = sigma_t * D**0.5
    x_t = alpha * np.asarray(x0) + r * normals
    means, weights = alpha * np.asarray(density.means), np.array([0.5, 0.3, 0.2])
    variance = alpha**2 * 0.1 + sigma_t**2
    offsets = x_t[:, None] - means
    odds = weights * np.exp(-np.sum(offsets**2, axis=2) / (2 * variance))
    s_t = -np.einsum("nk,nkd->nd", odds / odds.sum(1, keepdims=True), offsets) / variance
    noise = -sigma_t * s_t
    size, slope = np.linalg.norm(noise, axis=1), np.sum(noise * normals, axis=1)
    for p, ours in zip(POWERS, found.raw[:4], strict=True):
        phi = np.mean(np.linalg.norm(s_t, axis=1) ** (p - 2) * np.sum(s_t * normals, axis=1))
        assert ours == pytest.approx(D / r * phi * alpha**p, rel=1e-10)
    np.testing.assert_allclose(found.value[0], np.mean(slope / size), rtol=1e-10)
    theirs = [np.mean(slope / size * (1 if p == 1 else size ** (p - 2))) for p in POWERS]
    np.testing.assert_allclose(found.raw[4:], theirs, rtol=1e-10)
    assert theirs[0] == theirs[2]  # the missing factor: p = 2 is p = 1 over again


def test_the_ball_mean_is_that_of_the_exact_laplacian(x64):
    """(d/r) Phi_p against the closed-form p-Laplacian averaged over the ball."""
    density, x0 = mixture(d=3)
    sigma, radius = 0.3, 0.8
    r = radius * sigma * 3**0.5
    rng = np.random.default_rng(0)
    n = rng.standard_normal((10_000, 3))
    inside = n / np.linalg.norm(n, axis=1, keepdims=True) * rng.random((10_000, 1)) ** (1 / 3)
    points = x0[None] + r * jnp.concatenate([jnp.asarray(inside), -jnp.asarray(inside)])
    powers = (1.5, 2, 3)
    detectors = [PLaplaceFlux(sigma, p, radius, num_pairs=4) for p in powers]
    found = find_many(density, x0, detectors, jax.random.split(KEY, 4000))
    for p, raw in zip(powers, found.raw.T, strict=True):
        exact = jax.jit(jax.vmap(lambda x, p=p: density.p_laplacian(x, sigma, p)))(points)
        error = np.hypot(np.std(raw) / 4000**0.5, np.std(exact) / 10_000**0.5)
        assert abs(np.mean(raw) - np.mean(exact)) < 4 * error
        assert error < 0.02 * abs(np.mean(exact))


def test_one_pair_has_no_error():
    one, two = find(stored_score, jnp.ones(D), [PLaplaceFlux(0.3, num_pairs=m) for m in (1, 2)])[2]
    assert np.isinf(one)
    assert np.isfinite(two)


# At the point -------------------------------------------------------------------------------------


def test_the_local_one_agrees_with_closed_form_and_calculus(x64):
    """raw with the density's closed form, value with the normalized p-Laplacian by autodiff."""
    density, x0 = mixture()
    sigma, powers = 0.4, (*POWERS, math.inf)
    draws = [jax.random.normal(derive_key(KEY, "draw", j), (D,)) for j in range(3)]
    points = jnp.stack([x0, *(x0 + sigma * n for n in draws)])
    closed = jax.jit(
        jax.vmap(lambda x: jnp.stack([density.p_laplacian(x, sigma, p) for p in powers]))
    )(points)
    normalized = jax.jit(jax.vmap(p_laplacian(at(density, sigma), powers, normalized=True)))(points)
    weight = np.array([1 if math.isinf(p) else p / (D + p - 2) for p in powers])
    norms = np.linalg.norm(jax.vmap(at(density, sigma))(points), axis=1, keepdims=True)
    moved = (sigma * norms / D**0.5) ** np.minimum(np.array(powers) - 2, 0)
    values = -(sigma**2) * weight * moved * np.asarray(normalized)

    clean = find(density, x0, [PLaplace(sigma, p) for p in powers])
    np.testing.assert_allclose(clean.raw, closed[0], rtol=1e-9)
    np.testing.assert_allclose(clean.value, values[0], rtol=1e-9)
    assert not np.any(clean.standard_error)
    averaged = find(density, x0, [PLaplace(sigma, p, num_draws=3) for p in powers])
    np.testing.assert_allclose(averaged.raw, np.mean(closed[1:], axis=0), rtol=1e-9)
    np.testing.assert_allclose(averaged.value, np.mean(values[1:], axis=0), rtol=1e-9)
    error = np.std(values[1:], axis=0, ddof=1) / 3**0.5
    np.testing.assert_allclose(averaged.standard_error, error, rtol=1e-6)


def test_p_two_is_the_effective_dimension():
    x = jnp.linspace(-1, 1, D)
    density = mixture()[0]
    local, effective = find(density, x, [PLaplace(0.4, 2), EffectiveDimension(0.4)]).value
    np.testing.assert_allclose(local, 1 + effective, rtol=1e-5)


def test_one_gaussian_at_every_exponent():
    """N(0, v I): H = -I/(v + sigma^2), so raw = -(d+p-2) |s|^(p-2) / (v + sigma^2)."""
    v, sigma = 0.02, 0.3
    x = jnp.linspace(0.5, 1.0, D)
    total = v + sigma**2
    found = find(lambda x, s, c=None: -x / (v + s**2), x, [PLaplace(sigma, p) for p in POWERS])
    norm = float(jnp.linalg.norm(x)) / total
    expected = [-(D + p - 2) * norm ** (p - 2) / total for p in POWERS]
    np.testing.assert_allclose(found.raw, expected, rtol=1e-5)
    # sigma^2/total at p >= 2; p = 1 is one over |x|, in units of sigma sqrt(d).
    shorter = (sigma * norm / D**0.5) ** -0.5
    np.testing.assert_allclose(found.value[1:], sigma**2 / total * np.array([shorter, 1, 1]), 1e-5)
    np.testing.assert_allclose(found.value[0], sigma * D**0.5 / (norm * total), rtol=1e-5)


@pytest.mark.parametrize("field", ["score", "gap"])
def test_probes_are_within_their_error(field):
    density, x = mixture()

    def score(x, sigma, condition=None):
        plain = density.score(x, sigma)
        return plain if condition is None else plain - condition * jnp.roll(x, 1) ** 3

    # Of what counts as large here, the trace is estimated without being asked for.
    large = PLaplace(0.4, 1.5, field=field, exact_limit=D - 1)
    exact, probed = (PLaplace(0.4, 1.5, num_probes=n, field=field) for n in (None, 6))
    keys = jax.random.split(KEY, 300)

    def one(key):
        condition = jnp.asarray(0.5, float)
        return evaluate_detectors(score, x, (exact, probed, large), key=key, condition=condition)

    known, *estimates = jax.jit(jax.vmap(one))(keys)
    for found in estimates:
        spread = np.std(found.value, ddof=1)
        assert abs(np.mean(found.value) - known.value[0]) < 4 * spread / 300**0.5
        assert abs(np.sqrt(np.mean(found.standard_error**2)) / spread - 1) < 0.2
    assert not np.any(known.standard_error)


@pytest.mark.parametrize(("field", "times"), [("score", 1), ("gap", 2)])
def test_a_trace_of_large_images_is_estimated(field, times):
    """As for FLIPD: a diagonal Hessian's trace needs no more than a few products."""
    d = 1025
    few, all_of_them = (PLaplace(0.1, 3, field=field, exact_limit=n) for n in (1024, d))
    assert few == PLaplace(0.1, 3, field=field)
    along = 2 * times
    assert cost((few,), d - 1) == Cost(forward=times, jvp=times * (d - 1) + along)
    assert cost((few,), d) == Cost(forward=times, jvp=times * 16 + along)
    assert cost((all_of_them,), d) == Cost(forward=times, jvp=times * d + along)
    assert cost((PLaplace(0.1, 3, 0, 5, field),), d) == Cost(times, times * 5 + along)
    stiffness = jnp.linspace(0.5, 1.0, d) / 0.1**2

    def score(x, sigma, condition=None):
        return -stiffness * x * (1.0 if condition is None else 1.0 + condition)

    found = find(score, jnp.linspace(-1, 1, d), (few, all_of_them), jnp.asarray(0.5))
    np.testing.assert_allclose(found.value[0], found.value[1], rtol=1e-4)
    assert found.status.tolist() == [Status.OK] * 2


# Both ---------------------------------------------------------------------------------------------


def everything(sigma: float, field: str = "score"):
    """Every detector and exponent of this file, and the dimension that shares their points."""
    detectors = [PLaplaceFlux(sigma, p, num_pairs=2, field=field) for p in POWERS]
    detectors += [PublishedPLaplaceFlux(sigma, 3, num_pairs=2, field=field)]
    detectors += [PLaplace(sigma, p, field=field) for p in (*POWERS, math.inf)]
    return detectors


def test_the_gap_is_the_score_of_a_difference(x64):
    density, x = mixture()

    def score(x, sigma, condition=None):
        plain = density.score(x, sigma)
        return plain if condition is None else plain - condition * jnp.roll(x, 1) ** 3

    condition = jnp.asarray(0.5)
    found = find(score, x, everything(0.4, "gap"), condition)
    alone = find(gap(score), x, everything(0.4), condition)
    for ours, expected in zip(found, alone, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-13)
    assert not np.any(found.status)


def test_values_are_free_of_scale_and_raw_is_in_units(x64):
    """Data, noise and score rescaled together: x to b x, sigma to b sigma, s to s / b."""
    density, x = mixture()
    b = 3.7

    def scaled(x, sigma, condition=None):
        return density.score(x / b, sigma / b) / b

    found = find(density, x, everything(0.4))
    other = find(scaled, b * x, everything(0.4 * b))
    np.testing.assert_allclose(found.value, other.value, rtol=1e-9)
    units = np.array([*POWERS, 0, *POWERS, 4])
    np.testing.assert_allclose(found.raw, other.raw * b**units, rtol=1e-9)


def test_shapes_and_batches_do_not_matter():
    density, x = mixture()

    def image_score(x, sigma, condition=None):
        return density.score(x.reshape(-1), sigma).reshape(x.shape)

    detectors = tuple(everything(0.4))
    flat = find(density, x, detectors)
    images = jnp.stack([x, x + 1]).reshape(2, 2, 3, 1)
    batch = jax.jit(jax.vmap(lambda x: evaluate_detectors(image_score, x, detectors, key=KEY)))(
        images
    )
    for i, found in enumerate(batch):
        np.testing.assert_allclose(found.value[0], flat.value[i], rtol=1e-4)


def test_a_stored_point_scores_higher_than_an_ordinary_one():
    """One narrow and one broad Gaussian: every detector ranks the center of the narrow one up."""
    means = jnp.stack([jnp.full(D, 3.0), jnp.zeros(D)])
    density = GaussianMixture([0.5, 0.5], means, jnp.array([1e-4, 1.0], means.dtype))
    points = jnp.stack([means[0] + 1e-3, jax.random.normal(jax.random.key(5), (D,), means.dtype)])
    detectors = tuple(everything(0.1))
    found = jax.jit(jax.vmap(lambda x: evaluate_detectors(density, x, detectors, key=KEY)))(points)
    for detector, (value, *_) in zip(detectors, found, strict=True):
        assert value[0] > value[1], detector


def test_where_the_field_vanishes():
    """An unconditional model has no gap, a stored point no direction, and so no p = 1."""

    def statuses(detectors):
        found = find(stored_score, jnp.zeros(D), detectors)
        for value, raw, error, status in zip(*found, strict=True):
            assert np.isfinite([value, raw, error]).all() == (status == Status.OK)
        return found.status.tolist()

    ok, undefined = int(Status.OK), int(Status.UNDEFINED)
    flux = [PLaplaceFlux(0.3, p, 0.5, 2, "gap") for p in (1, 1.5, 2)]
    published = [PublishedPLaplaceFlux(0.3, p, 0.5, 2, "gap") for p in (1, 2, 3)]
    assert statuses(flux + published) == [undefined, ok, ok, undefined, undefined, ok]
    local = [PLaplace(0.3, p) for p in (1, 1.5, 2, 3, math.inf)]
    assert statuses(local) == [undefined, undefined, ok, undefined, undefined]
    averaged = [PLaplace(0.3, p, num_draws=2) for p in (1, math.inf)]
    assert statuses([*averaged, PLaplace(0.3, 1, field="gap")]) == [ok, ok, undefined]


def test_a_score_below_the_rounding_of_its_argument_has_no_direction():
    """x0 = 1 cannot be told from the mode at 1 + 1e-8 in float32: its score is all rounding."""
    center = jnp.full(D, 1 + 2 * float(jnp.finfo(jnp.ones(()).dtype).eps))

    def score(x, sigma, condition=None):
        return (center - x) / sigma**2

    near, far = (find(score, x, [PLaplace(0.3)]) for x in (jnp.ones(D), jnp.full(D, 1.1)))
    assert near.status.tolist() == [Status.UNDEFINED]
    assert far.status.tolist() == [Status.OK]


def test_what_is_not_finite_is_a_status():
    detectors = tuple(everything(0.3))
    xs = jnp.stack([jnp.ones(D), jnp.full(D, jnp.nan), jnp.full(D, jnp.finfo(jnp.ones(D)).max)])
    found = jax.jit(jax.vmap(lambda x: evaluate_detectors(stored_score, x, detectors, key=KEY)))(xs)
    for value, _, _, status in found:
        assert np.isnan(value[1:]).all()
        assert status.tolist() == [Status.OK, Status.NONFINITE, Status.NONFINITE]


def bent_score(x, sigma, condition=None):
    """Any score that is not linear."""
    return -jnp.tanh(x) / sigma**2 * (1.0 if condition is None else 1 + condition * x)


@pytest.mark.parametrize(
    ("detectors", "expected"),
    [
        (
            [
                *(PLaplaceFlux(0.3, p, num_pairs=2) for p in POWERS),
                FluxDimension(0.3, num_pairs=2),
                PublishedPLaplaceFlux(0.3, 3, num_pairs=1),
            ],
            Cost(4),
        ),
        ([PLaplaceFlux(0.3, num_pairs=1, field="gap"), PLaplaceFlux(0.3, num_pairs=2)], Cost(6)),
        ([PLaplace(0.3, p) for p in (*POWERS, math.inf)], Cost(1, D + 2)),
        ([PLaplace(0.3, 2), EffectiveDimension(0.3)], Cost(1, D)),
        ([PLaplace(0.3, math.inf)], Cost(1, 2)),
        ([PLaplace(0.3, 1, num_draws=3, num_probes=2)], Cost(3, 12)),
        ([PLaplace(0.3, p, field="gap") for p in POWERS], Cost(2, 2 * D + 4)),
        ([PLaplace(0.3, 1, field="gap", num_probes=2)], Cost(2, 8)),
    ],
)
def test_the_declared_cost_is_what_runs(detectors, expected, counting):
    counted = counting(bent_score)
    jax.block_until_ready(find(counted, jnp.ones(D), detectors, jnp.asarray(0.3)))
    jax.effects_barrier()
    assert cost(tuple(detectors), D) == expected
    assert counted.calls == expected.forward


def test_only_the_gap_needs_a_condition():
    assert requirements((PLaplaceFlux(0.3), PLaplace(0.3)), D) == Requirements(False, False)
    for detector in (PLaplaceFlux(0.3, field="gap"), PLaplace(0.3, field="gap")):
        assert requirements((detector,), D) == Requirements(True, False)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: PLaplaceFlux(0.0), "sigma"),
        (lambda: PLaplaceFlux(0.1, 0.5), "p"),
        (lambda: PLaplaceFlux(0.1, math.inf), "p"),
        (lambda: PLaplaceFlux(0.1, math.nan), "p"),
        (lambda: PLaplaceFlux(0.1, radius=0.0), "radius"),
        (lambda: PLaplaceFlux(0.1, num_pairs=0), "num_pairs"),
        (lambda: PLaplaceFlux(0.1, field="noise"), "field"),
        (lambda: PLaplace(-1.0), "sigma"),
        (lambda: PLaplace(0.1, 0), "p"),
        (lambda: PLaplace(0.1, num_draws=1), "num_draws"),
        (lambda: PLaplace(0.1, num_probes=1), "num_probes"),
        (lambda: PLaplace(0.1, field="noise"), "field"),
        (lambda: PLaplace(0.1).needs(1), "p"),
    ],
)
def test_unusable_settings_are_refused(make, name):
    with pytest.raises(InputError, match=rf"^{name}: expected"):
        make()
