"""Finite-difference stencils: order, default step, random frames, and honesty at zeros."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.calculus.differential import divergence
from memjax.calculus.p_laplace import p_laplacian
from memjax.calculus.stencil import divergence_stencil, p_laplacian_stencil
from memjax.densities import GaussianMixture

ORDERS = (2, 4, 6)
PS = (1, 1.5, 2, 3)
POSITIVE = "expected a positive finite number"


def field(x):
    """Smooth, with a dense Jacobian that is not symmetric, and div = 2 cos(..) - 3 sin(..) .."""
    a, b, c = x
    return jnp.stack([2 + jnp.sin(2 * a + b), jnp.cos(3 * b - c), jnp.exp(a - c / 2)])


def exact_divergence(x):
    a, b, c = x
    return 2 * np.cos(2 * a + b) - 3 * np.sin(3 * b - c) - np.exp(a - c / 2) / 2


X = [0.5, 0.1, -0.3]


@pytest.mark.parametrize("order", ORDERS)
def test_measured_order_is_the_claimed_one(x64, order):
    """Slope of log error against log step, along coordinates and along a full random frame."""
    x, key = jnp.asarray(X), jax.random.key(0)
    steps = np.geomspace(0.01, 0.05, 6)

    @jax.jit
    def run(steps):
        def one(h):
            along = p_laplacian_stencil(field, PS, order=order, step=h)(x).value
            turned = p_laplacian_stencil(field, PS, order=order, step=h, num_directions=3)
            return along, turned(x, key).value

        return jax.vmap(one)(steps), p_laplacian(field, PS)(x)

    values, exact = run(jnp.asarray(steps))
    np.testing.assert_allclose(exact[2], exact_divergence(x), rtol=1e-14)
    for value in values:
        errors = np.abs(np.asarray(value) - np.asarray(exact))
        slopes = np.polyfit(np.log(steps), np.log(errors), 1)[0]
        np.testing.assert_allclose(slopes, order, atol=0.1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_default_step_suits_dtype_and_scale(x64, dtype):
    """The promised error, near the least of any step, on small and large scales and far from 0."""
    scales = jnp.asarray([0.01, 1, 100, 0.01], dtype)
    origins = jnp.asarray([0, 0, 0, 1], dtype)
    factors = jnp.asarray([1 / 30, 1 / 5, 1, 5, 30], dtype)
    xs = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (40, 3)), dtype)

    @jax.jit
    def run(xs):
        def one(x, scale, origin):
            def scaled(y):
                return field((y - origin) / (3 * scale))  # whose fastest part is cos(3 .)

            out, y = [], origin + 3 * scale * x
            for order in ORDERS:
                default = divergence_stencil(scaled, order=order, length_scale=scale)(y)

                def at(h, order=order):
                    return divergence_stencil(scaled, order=order, step=h)(y).value

                out.append((3 * scale * jax.vmap(at)(default.step * factors), default.step))
            return out, y

        over_points = jax.vmap(one, (0, None, None))
        return jax.vmap(over_points, (None, 0, 0))(xs, scales, origins)

    results, ys = run(xs)
    scales, origins = (np.float64(a)[:, None, None] for a in (scales, origins))
    exact = exact_divergence(np.moveaxis((np.float64(ys) - origins) / (3 * scales), -1, 0))
    roundoff = float(jnp.finfo(dtype).eps) * np.array([3, 3, 3, 100])
    for order, (values, steps) in zip(ORDERS, results, strict=True):
        steps = np.float64(steps).mean(axis=1)
        np.testing.assert_allclose(steps[[0, 2]], steps[1] * scales[[0, 2], 0, 0], rtol=1e-5)
        rms = np.sqrt(np.mean((np.float64(values) - exact[..., None]) ** 2, axis=1))
        assert (rms[:, 2] < 3 * roundoff ** (order / (order + 1))).all()
        assert (rms[:, 2] < 2 * rms.min(axis=1)).all()
        assert (rms[:, [0, 4]] > 3 * rms[:, 2:3]).all()


def test_against_mixtures(x64):
    rng = np.random.default_rng(1)
    means = jnp.asarray(rng.normal(size=(3, 2, 2)))
    density = GaussianMixture([0.2, 0.5, 0.3], means, rng.uniform(0.3, 1, 3))
    xs = jnp.asarray(rng.normal(size=(20, 2, 2)))

    @jax.jit
    def run(density, xs):
        def one(x):
            stencil = p_laplacian_stencil(
                lambda x: density.score(x, 0.1), PS, order=6, length_scale=0.5, chunk_size=3
            )
            return stencil(x), jnp.stack([density.p_laplacian(x, 0.1, p) for p in PS])

        return jax.vmap(one)(xs)

    found, exact = run(density, xs)
    np.testing.assert_allclose(found.value, exact, rtol=1e-8)
    assert (found.status == Status.OK).all()
    assert (found.cost.forward == 6 * 4).all()
    np.testing.assert_array_equal(found.standard_error, 0)


def test_random_frames_are_unbiased_with_an_honest_error_bar(x64):
    rng = np.random.default_rng(2)
    d, num_keys = 6, 1000
    w = jnp.asarray(rng.normal(size=(d, d)))
    x = jnp.asarray(rng.normal(size=(2, 3)))
    keys = jax.random.split(jax.random.key(3), num_keys)

    def curved(x):
        return jnp.tanh(w @ x.reshape(-1)).reshape(x.shape)

    @jax.jit
    def run(keys):
        def some(num):
            return jax.vmap(
                lambda key: divergence_stencil(curved, step=1e-4, num_directions=num)(x, key)
            )

        return some(2)(keys), some(5)(keys), some(d)(keys[:10]), divergence(curved)(x)

    two, five, all_of_them, exact = run(keys)
    for num, found in ((2, two), (5, five)):
        spread = float(found.value.std(ddof=1))
        assert abs(float(found.value.mean() - exact)) < 4 * spread / math.sqrt(num_keys)
        np.testing.assert_allclose(np.sqrt((found.standard_error**2).mean()), spread, rtol=0.1)
        assert (found.cost.forward == 2 * num).all()
        assert (found.degrees_of_freedom == num - 1).all()
    # Drawn without replacement: (1 - k/d)/k times the variance of one.
    ratio = two.value.std() / five.value.std()
    np.testing.assert_allclose(ratio, np.sqrt((1 - 2 / d) / 2 / ((1 - 5 / d) / 5)), rtol=0.1)
    np.testing.assert_allclose(all_of_them.value, exact, rtol=1e-7)
    np.testing.assert_array_equal(all_of_them.standard_error, 0)


@pytest.mark.parametrize("order", [2, 6])
def test_at_a_zero(order):
    """Within the stencil's reach p < 2 does not exist; the others do."""
    stencil = p_laplacian_stencil(lambda x: -x, (1, 1.5, 2, 3, 4), order=order, step=1e-2)
    near = jnp.zeros((3, 2)).at[:, 0].set(jnp.asarray([0.0, 0.5e-2, 10.0]))
    found = jax.jit(jax.vmap(stencil))(near)
    undefined, ok = Status.UNDEFINED, Status.OK
    assert found.status.tolist() == [[undefined] * 2 + [ok] * 3] * 2 + [[ok] * 5]
    assert jnp.isnan(found.value[:2, :2]).all()
    np.testing.assert_allclose(found.value[:, 2], -2, rtol=1e-4)
    assert (jnp.abs(found.value[0, 3:]) < 0.1).all()
    p = np.asarray([1, 1.5, 2, 3, 4])
    np.testing.assert_allclose(found.value[2], -p * 10 ** (p - 2), rtol=1e-3)


def test_evaluations_are_counted_and_traced_once():
    calls, traces = [], []

    def counted(x):
        jax.debug.callback(lambda x: calls.append(1), x)
        return field(x)

    @jax.jit
    def run(x, step, key):
        traces.append(1)
        along = p_laplacian_stencil(counted, PS, order=4, step=step, chunk_size=1)(x)
        frame = divergence_stencil(counted, order=6, length_scale=step, num_directions=2)(x, key)
        return along, frame

    for step in (0.01, 0.02):
        along, frame = jax.block_until_ready(
            run(jnp.asarray(X, jnp.float32), jnp.float32(step), jax.random.key(0))
        )
        jax.effects_barrier()
    assert len(traces) == 1
    assert len(calls) == 2 * (int(along.cost.forward) + int(frame.cost.forward)) == 2 * (12 + 12)
    assert along.step == jnp.float32(0.02)
    eager = p_laplacian_stencil(field, PS, order=4, step=0.02)(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(along.value, eager.value, rtol=1e-4)
    assert eager.value.dtype == jnp.float32


def test_broken_rows_say_so():
    xs = jnp.asarray([X, [jnp.nan, 0, 0], [jnp.inf, 0, 0]], jnp.float32)
    found = jax.jit(jax.vmap(p_laplacian_stencil(field, (1, 2))))(xs)
    assert found.status.tolist() == [[0, 0]] + [[Status.NONFINITE] * 2] * 2
    assert not jnp.isfinite(found.value[1:]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: divergence_stencil(field, order=3), "order: expected 2, 4 or 6, got 3"),
        (
            lambda: divergence_stencil(field, step=0),
            "step: expected a positive finite number, got 0",
        ),
        (
            lambda: divergence_stencil(field, step=-1e-3),
            "step: expected a positive finite number, got -",
        ),
        (
            lambda: divergence_stencil(field, step=math.nan),
            "step: expected a positive finite number, got nan",
        ),
        (
            lambda: divergence_stencil(field, length_scale=0.0),
            "length_scale: expected a positive finite number, got 0",
        ),
        (lambda: p_laplacian_stencil(field, 0.5), r"p: expected a number in \[1, infinity\]"),
        (lambda: p_laplacian_stencil(field, (2, math.inf)), "p: expected a finite number, got inf"),
        (
            lambda: divergence_stencil(field, num_directions=0)(jnp.ones(3), jax.random.key(0)),
            "num_directions: expected a whole number from 2 to 3, got 0",
        ),
        (
            lambda: divergence_stencil(field, num_directions=4)(jnp.ones(3), jax.random.key(0)),
            "num_directions: expected a whole number from 2 to 3, got 4",
        ),
        (
            lambda: divergence_stencil(field, num_directions=2)(jnp.ones(3)),
            "key: expected a random key, got NoneType",
        ),
        (
            lambda: divergence_stencil(field)(jnp.ones(3), jax.random.key(0)),
            "key: expected None along the coordinates",
        ),
        (lambda: divergence_stencil(lambda x: x[:1])(jnp.ones(3)), r"field: expected f\(x\) like"),
        (lambda: divergence_stencil(field, chunk_size=0)(jnp.ones(3)), "chunk_size: expected"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
