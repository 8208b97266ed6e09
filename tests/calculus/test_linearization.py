"""One linearization of a field gives every first-order product, and evaluates it once."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.calculus.linearization import Linearization, linearize

SHAPES = [(1,), (6,), (2, 3, 2)]


def weights(shape, seed=0, width=16):
    d = int(np.prod(shape))
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((width, d))), jnp.asarray(
        rng.standard_normal((d, width))
    )


def field(params, x):
    """A network whose Jacobian is dense and not symmetric."""
    w_in, w_out = params
    flat = x.reshape(-1)
    return (w_out @ jnp.tanh(w_in @ flat) - flat**3).reshape(x.shape)


def setup(shape, seed=0):
    params = weights(shape, seed)
    x, u, v = jax.random.normal(jax.random.key(seed), (3, *shape))
    return params, x, u, v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_against_dense_jacobians(x64, shape, chunk_size):
    params, x, u, v = setup(shape)
    d = x.size
    forward = jax.jacfwd(lambda x: field(params, x))(x).reshape(d, d)
    reverse = jax.jacrev(lambda x: field(params, x))(x).reshape(d, d)
    lin = linearize(lambda x: field(params, x), x)
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_array_equal(lin.point, x)
    np.testing.assert_allclose(lin.value, field(params, x), **close)
    np.testing.assert_allclose(lin.jvp(v).reshape(-1), forward @ v.reshape(-1), **close)
    np.testing.assert_allclose(lin.vjp(u).reshape(-1), reverse.T @ u.reshape(-1), **close)
    np.testing.assert_allclose(
        lin.symmetric(v).reshape(-1), (forward + reverse.T) @ v.reshape(-1) / 2, **close
    )
    np.testing.assert_allclose(lin.jacobian(chunk_size=chunk_size), reverse, **close)
    np.testing.assert_allclose(lin.trace(chunk_size=chunk_size), jnp.trace(reverse), **close)
    diagonal = lin.diagonal(chunk_size=chunk_size)
    assert diagonal.shape == shape
    np.testing.assert_allclose(diagonal.reshape(-1), jnp.diag(forward), **close)


@pytest.mark.parametrize("shape", SHAPES)
def test_adjoint_and_symmetry(x64, shape):
    params, x, u, v = setup(shape)
    lin = linearize(lambda x: field(params, x), x)
    np.testing.assert_allclose(jnp.vdot(u, lin.jvp(v)), jnp.vdot(lin.vjp(u), v), rtol=1e-12)
    np.testing.assert_allclose(
        jnp.vdot(u, lin.symmetric(v)), jnp.vdot(lin.symmetric(u), v), rtol=1e-12
    )


def test_the_jacobian_is_rows_of_outputs(x64):
    """J[i, j] = df_i/dx_j, not its transpose."""
    lin = linearize(lambda x: jnp.stack([x[1] ** 2, 0 * x[0]]), jnp.asarray([3.0, 5.0]))
    np.testing.assert_array_equal(lin.jacobian(), [[0.0, 10.0], [0.0, 0.0]])


def test_remainder_is_second_order(x64):
    params, x, _, v = setup((6,))
    lin = linearize(lambda x: field(params, x), x)
    steps = np.logspace(-2, -4, 5)
    errors = [
        float(jnp.linalg.norm(field(params, x + h * v) - lin.value - h * lin.jvp(v))) for h in steps
    ]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_precision_is_the_callers(x64, dtype):
    params, x, u, v = jax.tree.map(lambda a: a.astype(dtype), setup((6,)))
    lin = linearize(lambda x: field(params, x), x)
    outputs = (lin.value, lin.jvp(v), lin.vjp(u), lin.symmetric(v), lin.trace(), lin.jacobian())
    assert {out.dtype for out in outputs} == {jnp.dtype(dtype)}


def test_a_linearization_crosses_jit_boundaries(x64):
    """One jitted function returns it, another takes it: traced once for all points."""
    params = weights((6,))
    traced = {"linearize": 0, "apply": 0}

    @jax.jit
    def at(params, x):
        traced["linearize"] += 1
        return linearize(lambda x: field(params, x), x)

    @jax.jit
    def apply(lin, v):
        traced["apply"] += 1
        return lin.symmetric(v), lin.trace()

    for seed in range(4):
        _, x, _, v = setup((6,), seed)
        lin = at(params, x)
        assert isinstance(lin, Linearization)
        jacobian = jax.jacfwd(lambda x: field(params, x))(x)
        product, trace = apply(lin, v)
        np.testing.assert_allclose(product, (jacobian + jacobian.T) @ v / 2, rtol=1e-11)
        np.testing.assert_allclose(trace, jnp.trace(jacobian), rtol=1e-11)
    assert traced == {"linearize": 1, "apply": 1}


def test_vmap_gives_a_batch_of_linearizations(x64):
    params = weights((2, 3))
    xs, vs = jax.random.normal(jax.random.key(1), (2, 5, 2, 3))
    lins = jax.jit(jax.vmap(lambda x: linearize(lambda x: field(params, x), x)))(xs)
    assert lins.value.shape == xs.shape
    products = jax.jit(jax.vmap(lambda lin, v: lin.vjp(v)))(lins, vs)
    traces = jax.vmap(lambda lin: lin.trace(chunk_size=4))(lins)
    for x, v, product, trace in zip(xs, vs, products, traces, strict=True):
        alone = linearize(lambda x: field(params, x), x)
        np.testing.assert_allclose(product, alone.vjp(v), rtol=1e-12)
        np.testing.assert_allclose(trace, alone.trace(), rtol=1e-12)


def test_field_is_evaluated_exactly_once():
    calls = []
    params, x, u, v = setup((6,))

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return field(params, x)

    @jax.jit
    def everything(x, u, v):
        lin = linearize(counted, x)
        return lin.value, lin.jvp(v), lin.vjp(u), lin.symmetric(v), lin.trace(), lin.jacobian()

    jax.block_until_ready(everything(x, u, v))
    jax.effects_barrier()
    assert len(calls) == 1


def count_primitive(jaxpr, name):
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += count_primitive(inner, name)
    return total


def test_the_nonlinear_part_stands_once_in_the_program():
    params, x, u, v = setup((6,))

    def everything(x, u, v):
        lin = linearize(lambda x: field(params, x), x)
        return lin.value, lin.jvp(v), lin.vjp(u), lin.symmetric(v), lin.trace(), lin.diagonal()

    assert count_primitive(jax.make_jaxpr(everything)(x, u, v).jaxpr, "tanh") == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nan_propagates_and_does_not_raise(bad):
    params, x, _, v = setup((6,))
    lin = linearize(lambda x: field(params, x), x.at[2].set(bad))
    assert not jnp.all(jnp.isfinite(lin.value))
    assert not jnp.isfinite(lin.trace())
    assert not jnp.all(jnp.isfinite(lin.jvp(v)))


def test_a_constant_field_has_zero_products():
    x = jnp.ones((2, 2))
    lin = linearize(jnp.zeros_like, x)
    np.testing.assert_array_equal(lin.jvp(x), jnp.zeros((2, 2)))
    np.testing.assert_array_equal(lin.vjp(x), jnp.zeros((2, 2)))
    assert lin.trace() == 0


@pytest.mark.parametrize(
    ("bad", "x", "message"),
    [
        (lambda x: x, jnp.arange(3), r"x: expected a floating-point array, got dtype int"),
        (lambda x: x[:2], jnp.ones(3), r"float(32|64)\[3\], got float(32|64)\[2\]"),
        (lambda x: jnp.sum(x), jnp.ones(3), r"float(32|64)\[3\], got float(32|64)\[\]"),
        (lambda x: x.astype(jnp.float16), jnp.ones(3), r"float(32|64)\[3\], got float16\[3\]"),
        (lambda x: (x, x), jnp.ones(3), r"float(32|64)\[3\], got tuple"),
    ],
)
def test_unusable_fields_are_refused_before_tracing(bad, x, message):
    with pytest.raises(InputError, match=message) as caught:
        inspect.unwrap(linearize)(bad, x)  # without the type checker, which refuses integers first
    assert "\n" not in str(caught.value)
