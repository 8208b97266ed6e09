"""p-Laplacians against closed forms, an independent complex-step oracle, and at zeros."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.calculus.linearization import linearize
from memjax.calculus.p_laplace import (
    exponents,
    level_set_curvature,
    p_laplacian,
    p_laplacian_of,
)
from memjax.densities import GaussianMixture

PS = (1, 1.25, 1.5, 2, 3, 4)
ALL = (*PS, math.inf)


# Right away from zeros of the score, and honest at them.


def numpy_score(means, covariances, x):
    """Score of an equally weighted mixture; analytic in x, hence fit for complex steps."""
    deviations = means - x
    pulls = np.linalg.solve(covariances.astype(deviations.dtype), deviations[..., None])[..., 0]
    logs = -0.5 * (deviations * pulls).sum(1) - 0.5 * np.linalg.slogdet(covariances)[1]
    weights = np.exp(logs - logs.real.max())
    return weights / weights.sum() @ pulls


def numpy_jacobian(means, covariances, x):
    steps = 1e-100j * np.eye(x.size)
    return np.stack([numpy_score(means, covariances, x + h).imag for h in steps], 1) * 1e100


def numpy_p_laplacian(means, covariances, x, p):
    """Div |s|^(p-2) s by complex steps, exact to rounding: no formula of derivatives in it."""

    def component(j):
        s = numpy_score(means, covariances, x + 1e-100j * np.eye(x.size)[j])
        return ((s * s).sum() ** (p / 2 - 1) * s[j]).imag * 1e100

    return sum(component(j) for j in range(x.size))


def zero_near(means, covariances, x):
    """The zero of the score that Newton's steps, kept short, lead to; or None."""
    for _ in range(200):
        s = numpy_score(means, covariances, x)
        step = np.linalg.solve(numpy_jacobian(means, covariances, x), s)
        x = x - step * min(1, 0.2 / (np.linalg.norm(step) + 1e-300))
    return x if np.linalg.norm(s) < 1e-12 else None


def mixture_cases(num, d, seed):
    """``num`` mixtures, each with five points: two anywhere, two close to a zero, and a zero."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < num:
        k = 3
        factor = rng.normal(size=(k, d, d)) / np.sqrt(d)
        covariances = factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(d)
        if len(found) % 3 == 0:
            covariances = np.stack([0.3 * np.eye(d)] * k)
        # Means away from the origin: a zero of the score is not a zero of x.
        means = rng.normal(size=(k, d)) + 2 * rng.normal(size=d)
        zero = zero_near(means, covariances, means[0] if len(found) % 2 else means.mean(0))
        if zero is None:
            continue
        near = [zero + 10.0**-e * rng.normal(size=d) for e in rng.uniform(1, 7, 2)]
        anywhere = [means[0] + rng.normal(size=d), means.mean(0) + 2 * rng.normal(size=d)]
        found.append((means, covariances, np.stack([*anywhere, *near, zero])))
    return [np.stack(part) for part in zip(*found, strict=True)]


def check_promise(num, d, shape, seed):
    means, covariances, xs = mixture_cases(num, d, seed)
    weights = [1 / 3] * 3
    densities = [
        GaussianMixture(weights, jnp.asarray(m).reshape(3, *shape), c)
        for m, c in zip(means, covariances, strict=True)
    ]
    densities = jax.tree.map(lambda *leaves: jnp.stack(leaves), *densities)

    @jax.jit
    def run(densities, xs):
        def one(density, x):
            ours = p_laplacian(lambda x: density.score(x, 0.0), PS, has_aux=True)(x)
            return *ours, jnp.stack([density.p_laplacian(x, 0.0, p) for p in PS])

        return jax.vmap(lambda density, xs: jax.vmap(lambda x: one(density, x))(xs))(densities, xs)

    value, info, closed = run(densities, jnp.asarray(xs).reshape(num, 5, *shape))
    value, status, closed = np.asarray(value), np.asarray(info.status), np.asarray(closed)
    away, zeros = slice(0, 4), 4
    assert (status[:, away] == Status.OK).all()
    np.testing.assert_allclose(value[:, away], closed[:, away], rtol=1e-5)
    for case in range(num):
        for point in range(4):
            expected = [
                numpy_p_laplacian(means[case], covariances[case], xs[case, point], p) for p in PS
            ]
            np.testing.assert_allclose(value[case, point], expected, rtol=1e-5)
    singular = np.asarray(PS) < 2
    expected = np.where(singular, Status.UNDEFINED, Status.OK)
    np.testing.assert_array_equal(status[:, zeros], np.broadcast_to(expected, (num, len(PS))))
    assert np.isnan(value[:, zeros, singular]).all()
    np.testing.assert_allclose(value[:, zeros, 3], closed[:, zeros, 3], rtol=1e-5)
    np.testing.assert_array_equal(value[:, zeros, 4:], 0)


@pytest.mark.parametrize(("num", "shape"), [(20, (3,)), (20, (1, 2, 3))])
def test_right_away_from_zeros_and_flagged_at_them(x64, num, shape):
    """200 points of 40 mixtures."""
    check_promise(num, math.prod(shape), shape, seed=len(shape))


@pytest.mark.nightly
@pytest.mark.parametrize("shape", [(5,), (2,), (2, 2), (12,)])
def test_right_away_from_zeros_and_flagged_at_them_many_times(x64, shape):
    """2000 points of 400 mixtures."""
    check_promise(100, math.prod(shape), shape, seed=10 + math.prod(shape))


# Closed forms.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_gaussian(x64, dtype):
    """-(d + p - 2) |x|^(p-2) / v^(p-1); -|x|^2/v^3 at infinity; the normalized family."""
    rng = np.random.default_rng(0)
    xs, vs = rng.normal(size=(30, 5)), 10 ** rng.uniform(-3, 1, 30)

    @jax.jit
    def run(xs, vs):
        def one(x, v):
            lin = linearize(lambda x: -x / v, x)
            usual, info = p_laplacian_of(lin, ALL, has_aux=True)
            return usual, p_laplacian_of(lin, ALL, normalized=True), info

        return jax.vmap(one)(xs, vs)

    usual, normalized, info = run(jnp.asarray(xs, dtype), jnp.asarray(vs, dtype))
    assert usual.dtype == normalized.dtype == info.score_norm.dtype == dtype
    r, p = np.linalg.norm(xs, axis=1)[:, None], np.asarray(PS)
    v, d = vs[:, None], 5
    rtol = 1e-5 if dtype == jnp.float32 else 1e-13
    expected = -(d + p - 2) * r ** (p - 2) / v ** (p - 1)
    np.testing.assert_allclose(usual, np.hstack([expected, -(r**2) / v**3]), rtol=rtol)
    expected = -(d + p - 2) / (p * v)
    np.testing.assert_allclose(normalized, np.hstack([expected, -1 / v]), rtol=rtol)
    np.testing.assert_allclose(info.score_norm, (r / v)[:, 0], rtol=rtol)
    np.testing.assert_allclose(info.trace, -d / vs, rtol=rtol)
    np.testing.assert_allclose(info.curvature, -(r**2 / v**3)[:, 0], rtol=rtol)
    assert (info.status == Status.OK).all()


def test_anisotropic_gaussian(x64):
    """Delta_inf = -s^T V^-1 s, Delta_1 = -(tr V^-1 - s^T V^-1 s/|s|^2)/|s|."""
    rng = np.random.default_rng(1)
    factor, x = rng.normal(size=(4, 4)), rng.normal(size=4)
    precision = factor @ factor.T + np.eye(4)
    field = p_laplacian(lambda x: -(jnp.asarray(precision) @ x), (1, math.inf))
    s = -precision @ x
    along = s @ precision @ s
    expected = -(np.trace(precision) - along / (s @ s)) / np.linalg.norm(s), -along
    np.testing.assert_allclose(field(jnp.asarray(x)), expected, rtol=1e-13)


def test_in_one_dimension(x64):
    """(|s|^(p-2) s)' = (p - 1) |s|^(p-2) s': nothing is left of it for p = 1."""
    value = p_laplacian(jnp.sin, PS)(jnp.asarray([2.5]))
    p, s = np.asarray(PS), np.sin(2.5)
    np.testing.assert_allclose(value, (p - 1) * s ** (p - 2) * np.cos(2.5), rtol=1e-14, atol=1e-15)


def pair_score(m, v, x):
    """Score of an equal mixture of N(m, v I) and N(-m, v I)."""
    return (m * jnp.tanh(jnp.sum(m * x) / v) - x) / v


def test_between_two_modes_the_laplacian_changes_sign_at_a_distance(x64):
    """s = 0 and Delta u = -d/v + |m|^2/v^2 in the middle; p < 2 does not exist there."""
    d, v = 16, 0.5
    m = jnp.zeros(d).at[3].set(1.0)
    sizes = jnp.sqrt(d * v) * jnp.asarray([0.5, 0.999, 1.001, 2.0])
    field = jax.vmap(
        lambda size: p_laplacian(lambda x: pair_score(size * m, v, x), (2, 1.5, 4), has_aux=True)(
            jnp.zeros(d)
        )
    )
    value, info = jax.jit(field)(sizes)
    np.testing.assert_allclose(value[:, 0], -d / v + np.asarray(sizes) ** 2 / v**2, atol=1e-12)
    assert (value[:, 0] > 0).tolist() == [False, False, True, True]
    assert np.isnan(value[:, 1]).all()
    np.testing.assert_array_equal(value[:, 2], 0)
    assert info.status.tolist() == [[Status.OK, Status.UNDEFINED, Status.OK]] * 4


def test_scaling_and_rotation(x64):
    """Scaling x by b scales by b^-p (normalized: b^-2), turning x changes nothing."""
    rng = np.random.default_rng(2)
    m, x = rng.normal(size=(2, 3))
    turns = np.linalg.qr(rng.normal(size=(5, 3, 3)))[0]
    turns[0] = np.eye(3)
    scales = np.array([1, 0.01, 0.3, 3, 100])

    @jax.jit
    def run(turns, scales):
        def one(turn, b):
            def score(x):
                return turn @ pair_score(m, 0.7, turn.T @ x / b) / b

            lin = linearize(score, b * (turn @ x))
            return p_laplacian_of(lin, PS), p_laplacian_of(lin, ALL, normalized=True)

        return jax.vmap(one)(turns, scales)

    m, x = jnp.asarray(m), jnp.asarray(x)
    usual, normalized = map(np.asarray, run(jnp.asarray(turns), jnp.asarray(scales)))
    np.testing.assert_allclose(usual, usual[0] * scales[:, None] ** -np.asarray(PS), rtol=1e-11)
    np.testing.assert_allclose(normalized, normalized[0] * scales[:, None] ** -2.0, rtol=1e-11)


# One linearization, one trace.


def flops(p, weights, **options):
    def run(weights, xs):
        def field(x):
            return weights[0] @ jnp.tanh(weights[1] @ x)

        return jax.vmap(p_laplacian(field, p, **options))(xs)

    compiled = jax.jit(run).lower(weights, jnp.ones((2, 64), jnp.float32)).compile()
    return compiled.cost_analysis()["flops"]


def test_all_together_cost_no_more_than_the_dearest_alone():
    """Floating-point operations of the compiled programs."""
    w = jnp.ones((64, 64), jnp.float32)
    weights = (w, w)
    alone = {p: flops(p, weights) for p in (1, 1.5, 2, math.inf)}
    assert flops((1, 1.5, 2, 3, math.inf), weights) <= 1.05 * max(alone.values())
    forward = 2 * 2 * 2 * 64 * 64
    assert alone[2] < 66 * forward  # no s^T J s
    assert alone[math.inf] < 3 * forward  # no trace
    assert alone[1] < 68 * forward


def test_what_is_not_needed_is_not_computed():
    calls = []

    def trace(matvec, like):
        calls.append(1)
        return jnp.sum(like) + jnp.sum(matvec(like))

    def info(p, **options):
        return p_laplacian(lambda x: -x, p, trace=trace, has_aux=True, **options)(jnp.ones(3))

    for normalized in (False, True):
        _, only_infinity = info(math.inf, normalized=normalized)
        assert only_infinity.trace is None
        assert only_infinity.curvature == -3
        assert not calls
    value, only_two = info((2, 2.0))
    assert only_two.curvature is None
    assert value.tolist() == [0, 0]  # the trace function was believed
    assert len(calls) == 1
    info(ALL)
    assert len(calls) == 2


def test_a_linearization_serves_them_all(x64):
    """A batch of linearizations from one program, p-Laplacians from another, traced once each."""
    traces = []
    m = jnp.asarray([1.0, 0.5, -0.2])

    @jax.jit
    def linearized(m, xs):
        return jax.vmap(lambda x: linearize(lambda x: pair_score(m, 0.7, x), x))(xs)

    @jax.jit
    def apply(lins):
        traces.append(1)
        return jax.vmap(lambda lin: p_laplacian_of(lin, ALL))(lins)

    for seed in (0, 1):
        xs = jax.random.normal(jax.random.key(seed), (4, 3))
        found = apply(linearized(m, xs))
    assert len(traces) == 1
    alone = jax.jit(
        lambda x: (
            p_laplacian(lambda x: pair_score(m, 0.7, x), ALL, chunk_size=2)(x),
            p_laplacian(lambda x: pair_score(m, 0.7, x), 3)(x),
        )
    )
    together, one = alone(xs[2])
    np.testing.assert_allclose(found[2], together, rtol=1e-12)
    assert one.shape == ()
    np.testing.assert_allclose(one, together[4], rtol=1e-12)


# Gradients.


def test_gradients_away_from_zeros(x64):
    def both(x):
        lin = linearize(lambda x: pair_score(jnp.asarray([1.0, 0.5, -0.2]), 0.7, x), x)
        return jnp.stack([p_laplacian_of(lin, ALL), p_laplacian_of(lin, ALL, normalized=True)])

    @jax.jit
    def run(x):
        steps = 1e-5 * jnp.eye(3)
        points = jnp.stack([x, x, x])
        differences = jax.vmap(both)(points + steps) - jax.vmap(both)(points - steps)
        return jax.jacrev(both)(x), jnp.moveaxis(differences, 0, -1) / 2e-5

    gradient, expected = run(jnp.asarray([0.4, -0.3, 0.8]))
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("has_aux", [False, True])
def test_gradients_at_a_zero_are_finite_where_the_value_is(x64, has_aux):
    """Of -x - x^3 at 0: div = -d - 3 |x|^2, gradient 0; of s^T J s, 0; for 2 < p set to 0."""
    field = p_laplacian(lambda x: -x - x**3, (2, 2.5, 3, 4, math.inf), has_aux=has_aux)
    gradient = jax.jit(jax.jacrev(field, has_aux=has_aux))(jnp.zeros(3))
    np.testing.assert_array_equal(gradient[0] if has_aux else gradient, 0)
    # The trace has a gradient of its own at a zero of s: div (x^2 - x) = 2 sum x - d.
    gradient = jax.grad(p_laplacian(lambda x: x**2 - x, 2))(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, 2)


# Statuses and bad input.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_score_that_rounding_turns_around_counts_as_zero(x64, dtype):
    """Next to the mean of a Gaussian, a few floats away, and exactly representable at 0."""
    eps = float(jnp.finfo(dtype).eps)
    steps = jnp.asarray([0, 1, 4, 1e3, 1e5], dtype) * eps
    run = jax.jit(
        lambda centers, steps: jax.vmap(
            lambda c, h: p_laplacian(lambda x: c - x, 1, has_aux=True)(c + h)
        )(jnp.stack([centers] * 5), jnp.stack([steps] * 3, 1))
    )
    value, info = run(jnp.full(3, 2.0, dtype), steps)
    assert info.status.tolist() == [2, 2, 2, 0, 0]
    assert jnp.isnan(value).tolist() == [True] * 3 + [False] * 2
    value, info = run(jnp.zeros(3, dtype), steps)
    assert info.status.tolist() == [2, 0, 0, 0, 0]
    expected = -2 / (np.sqrt(3) * np.asarray(steps[1:]))
    np.testing.assert_allclose(value[1:], expected, rtol=1e-5)


def test_broken_rows_say_so_and_leave_their_neighbors_alone():
    def field(x):
        return jnp.where(x[0] > 90, jnp.nan, 1) * -x

    xs = jnp.asarray([[1, 2], [jnp.nan, 1], [99, 1], [jnp.inf, 1], [1e15, 1], [1, 2]], jnp.float32)
    value, info = jax.jit(jax.vmap(p_laplacian(field, (1, 2, 9), has_aux=True)))(xs)
    bad = Status.NONFINITE
    assert info.status[:4].tolist() == [[0, 0, 0], [bad] * 3, [bad] * 3, [bad] * 3]
    assert info.status[4].tolist() == [bad] * 3
    np.testing.assert_array_equal(value[0], value[5])
    assert not np.isfinite(value[4, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: p_laplacian(jnp.sin, 0.99), r"p: expected a number in \[1, infinity\], got 0.99"),
        (lambda: p_laplacian(jnp.sin, (2, math.nan)), r"p: expected a number in \[1, inf.*nan"),
        (lambda: p_laplacian(jnp.sin, ()), "p: expected at least one number, got an empty tuple"),
        (lambda: p_laplacian(jnp.sin, True), "p: expected a number or a tuple .*, got bool"),
        (lambda: p_laplacian(lambda x: x[:1], 1)(jnp.ones(2)), r"field: expected f\(x\) like x"),
        (lambda: p_laplacian(jnp.sin, 1, chunk_size=0)(jnp.ones(2)), "chunk_size: expected"),
        (
            lambda: p_laplacian(jnp.sin, 1, trace=lambda matvec, like: like)(jnp.ones(2)),
            r"trace: expected one number, float(32|64)\[\], got float(32|64)\[2\]",
        ),
        (lambda: level_set_curvature(jnp.sin)(jnp.ones(1)), "x: expected two entries or more"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("p", ["2", None, np.ones(2), [1, 2]])
def test_what_is_no_number_is_no_exponent(p):
    with pytest.raises(InputError, match="p: expected a number or a tuple of numbers, got "):
        inspect.unwrap(exponents)(p)  # without the type checker, which refuses it first


# Level sets.


def test_mean_curvature_of_level_sets(x64):
    """Spheres -1/rho in every dimension; a cylinder -1/(2 rho); a saddle of no mean curvature."""
    x = jnp.asarray([1.0, -2.0, 2.0, 4.0])
    for d in (2, 3, 4):
        sphere = level_set_curvature(lambda x: -7 * x)(x[:d])
        np.testing.assert_allclose(sphere, -1 / np.linalg.norm(x[:d]), rtol=1e-14)
    cylinder = level_set_curvature(lambda x: x * jnp.asarray([-1.0, -1.0, 0.0]))(x[:3])
    np.testing.assert_allclose(cylinder, -1 / (2 * np.sqrt(5)), rtol=1e-14)
    # On the axis of u = a x^2 - b y^2 - c z the level set has curvatures 2a/c and -2b/c.
    saddle = level_set_curvature(
        lambda x: x * jnp.asarray([2.0, -6.0, 0.0]) - jnp.asarray([0, 0, 5.0])
    )
    np.testing.assert_allclose(saddle(jnp.zeros(3)), (2 - 6) / 5 / 2, rtol=1e-14)
    assert jnp.isnan(level_set_curvature(lambda x: -x)(jnp.zeros(3)))
