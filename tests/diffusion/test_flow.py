"""The probability flow against closed forms: where it ends, what it does to volume, what it says.

Densities are mixtures of four diagonal Gaussians in six dimensions throughout, also where one or
two components (some of zero width: stored points) would do: then one compiled program, batched
over densities, points and noise levels, serves every case.
"""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.densities import ConditionalMixture, Empirical, GaussianMixture
from memjax.diffusion import Model, probability_flow

D, K = 6, 4


def mixture(weights, means, variances, dtype=np.float64):
    k = len(weights)
    means = np.broadcast_to(means, (k, D))
    variances = np.broadcast_to(np.reshape(variances, (k, -1)), (k, D))
    return GaussianMixture(np.asarray(weights), jnp.asarray(means, dtype), variances)


def stack(densities):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *densities)


class Broken(eqx.Module):
    """A density whose score is NaN above a noise level."""

    density: GaussianMixture
    limit: Array

    def __call__(self, x, sigma, condition=None):
        return jnp.where(sigma > self.limit, jnp.nan, self.density.score(x, sigma, condition))


def batched(**options):
    """Carry one x of each density from its sigma0 to its sigma1, in one program."""

    @jax.jit
    def run(scores, xs, sigmas0, sigmas1):
        return jax.vmap(
            lambda score, x, sigma0, sigma1: probability_flow(score, sigma0, sigma1, **options)(x)
        )(scores, xs, sigmas0, sigmas1)

    return run


def levels(n, low, high, dtype: type = np.float64):
    return jnp.full(n, low, dtype), jnp.full(n, high, dtype)


def gaussians(seed, n, dtype: type = np.float64):
    """n Gaussians, and what the flow does to a point of each, in NumPy."""
    rng = np.random.default_rng(seed)
    means, variances = rng.normal(size=(n, D)), 10 ** rng.uniform(-4, 0.5, (n, D))
    densities = [
        mixture(np.full(K, 1 / K), m, np.tile(v, (K, 1)), dtype)
        for m, v in zip(means, variances, strict=True)
    ]

    def flow(x, sigma0, sigma1):
        ratio = (variances + sigma1**2) / (variances + sigma0**2)
        return means + np.sqrt(ratio) * (x - means), np.log(ratio).sum(1) / 2

    noise = rng.normal(size=(n, D))
    return densities, lambda sigma: means + np.sqrt(variances + sigma**2) * noise, flow


_ACCURATE = batched(divergence="exact", solver="dopri8", tol=1e-9, num_steps=8)


def accurate(densities, x, sigmas0, sigmas1):
    """In batches of 16, so that it is compiled once."""
    n = len(x)
    lanes = np.arange(16) % n
    arguments = (stack(densities), x, *(jnp.broadcast_to(s, n) for s in (sigmas0, sigmas1)))
    out = _ACCURATE(*jax.tree.map(lambda leaf: leaf[lanes], arguments))
    return jax.tree.map(lambda leaf: leaf[:n], out)


@pytest.mark.usefixtures("x64")
class TestClosedForms:
    """All in float64 by the one adaptive program."""

    def test_gaussians_both_ways(self):
        densities, draw, flow = gaussians(0, 12)
        x = jnp.asarray(draw(0.01))
        low, high = levels(12, 0.01, 20.0)
        up = accurate(densities, x, low, high)
        point, log_det = flow(np.asarray(x), 0.01, 20.0)
        assert not up.status.any()
        np.testing.assert_allclose(up.log_volume, log_det, atol=1e-8)
        np.testing.assert_allclose(up.point, point, atol=1e-8 * 20)
        assert (up.standard_error == 0).all()
        # Back again: the identity, and the same volume.
        down = accurate(densities, up.point, high, low)
        assert not down.status.any()
        np.testing.assert_allclose(down.point, x, atol=1e-7)
        np.testing.assert_allclose(down.log_volume, -up.log_volume, atol=1e-7)
        # The profile: levels, their growth, their effective dimension.
        for out in (up, down):
            profile = out.profile
            np.testing.assert_allclose(
                profile.sigmas[0], np.geomspace(low[0], high[0], 9)[:: 1 if out is up else -1]
            )
            assert (profile.log_volumes[:, 0] == 0).all()
            np.testing.assert_allclose(profile.log_volumes[:, -1], out.log_volume, atol=1e-10)
        middle = float(up.profile.sigmas[0, 4])
        np.testing.assert_allclose(
            up.profile.log_volumes[:, 4], flow(np.asarray(x), 0.01, middle)[1], atol=1e-7
        )
        np.testing.assert_allclose(
            up.profile.effective_dimensions[:, 4],
            [d.effective_dimension(x[0], middle) for d in densities],
            atol=1e-8,
        )

    def test_stored_points(self):
        """One alone reaches the ceiling; between two, growth along the line of both is lost."""
        rng = np.random.default_rng(1)
        y, low, high = rng.normal(size=D), 0.3, 20.0
        m = np.zeros(D)
        m[0] = 3.0
        alone = mixture(np.full(K, 1 / K), y, np.zeros(K))
        pair = mixture(np.full(K, 1 / K), np.stack([m, m, -m, -m]), np.zeros(K))
        ridge = np.append(0.0, rng.normal(size=D - 1) * low)
        x = jnp.asarray(np.stack([y, y + low * rng.normal(size=D), ridge, m]))
        out = accurate([alone, alone, pair, pair], x, *levels(4, low, high))
        assert not out.status.any()
        ceiling = D * np.log(high / low)
        loss = m @ m / 2 * (1 / low**2 - 1 / high**2)
        expected = [ceiling, ceiling, ceiling - loss]
        np.testing.assert_allclose(out.log_volume[:3], expected, atol=1e-8)
        assert loss - ceiling > 24  # on the ridge volume shrinks
        np.testing.assert_allclose(out.point[0], y, atol=1e-12)
        np.testing.assert_allclose(out.point[1], y + high / low * (x[1] - y), rtol=1e-8)
        assert out.point[2, 0] == 0  # by symmetry
        assert 0 < ceiling - out.log_volume[3] < loss

    def test_mixtures_by_the_change_of_variables(self):
        rng = np.random.default_rng(2)
        densities = [
            mixture(rng.dirichlet(np.ones(K)), rng.normal(size=(K, D)), 10 ** rng.uniform(-4, 0, K))
            for _ in range(12)
        ]
        x = jnp.stack([d.sample(jax.random.key(i), 1, 0.01)[0] for i, d in enumerate(densities)])
        out = accurate(densities, x, *levels(12, 0.01, 20.0))
        assert not out.status.any()
        for density, start, end, log_volume in zip(
            densities, x, out.point, out.log_volume, strict=True
        ):
            gained = density.log_prob(start, 0.01) - density.log_prob(end, 20.0)
            np.testing.assert_allclose(log_volume, gained, atol=1e-7)

    def test_a_training_set(self):
        """An empirical density is the mixture of its points."""
        points = np.random.default_rng(3).normal(size=(K, D))
        same = mixture(np.full(K, 1 / K), points, np.zeros(K))
        x = jnp.asarray(points[:2] + 0.1)
        expected = accurate([same, same], x, *levels(2, 0.1, 5.0))
        flow = probability_flow(
            Empirical(jnp.asarray(points)), 0.1, 5.0, divergence="exact", solver="rk4", num_steps=64
        )
        out = jax.jit(jax.vmap(flow))(x)
        np.testing.assert_allclose(out.log_volume, expected.log_volume, atol=1e-4)
        np.testing.assert_allclose(out.point, expected.point, atol=1e-4)


def test_gaussians_in_float32_by_32_steps():
    densities, draw, flow = gaussians(4, 12, np.float32)
    x = jnp.asarray(draw(0.01), jnp.float32)
    run = batched(divergence="exact", solver="rk4", num_steps=32)
    out = run(stack(densities), x, *levels(12, 0.01, 20.0, np.float32))
    point, log_det = flow(np.asarray(x, np.float64), 0.01, 20.0)
    assert not out.status.any()
    assert out.log_volume.dtype == jnp.float32
    np.testing.assert_allclose(out.log_volume, log_det, atol=1e-4)
    np.testing.assert_allclose(out.point / 20, point / 20, atol=1e-4)
    assert (out.cost.forward == 129).all()
    assert (out.cost.jvp == 129 * D).all()


@pytest.mark.usefixtures("x64")
def test_order_of_the_fixed_rules():
    rng = np.random.default_rng(5)
    density = mixture(rng.dirichlet(np.ones(K)), rng.normal(size=(K, D)), [1e-4, 0.01, 0.1, 1.0])
    x = density.sample(jax.random.key(0), 16, 0.05)
    reference = accurate([density] * 16, x, *levels(16, 0.05, 10.0))
    for solver, order in (("heun", 2), ("rk4", 4)):
        errors = []
        for num_steps in (48, 192):
            flow = probability_flow(
                density, 0.05, 10.0, divergence="exact", solver=solver, num_steps=num_steps
            )
            out = jax.jit(lambda flow, x: jax.vmap(flow)(x))(flow, x)
            errors.append(
                [
                    np.std(out.log_volume - reference.log_volume),
                    np.std(out.point - reference.point),
                ]
            )
        slopes = np.log(np.divide(*errors)) / np.log(4)
        assert (np.abs(slopes - order) < 0.4).all(), (solver, slopes)


@pytest.mark.usefixtures("x64")
def test_lanes_fail_alone():
    """A NaN field says so; healthy lanes beside it are right."""
    densities, draw, flow = gaussians(6, 6)
    limits = [np.inf, 1.0, np.inf, 1e-3, np.inf, 15.0]
    broken = stack([Broken(d, jnp.asarray(v)) for d, v in zip(densities, limits, strict=True)])
    x = jnp.asarray(draw(0.01)).at[4].set(jnp.nan)
    out = batched(divergence="exact", solver="heun", num_steps=16)(
        broken, x, *levels(6, 0.01, 20.0)
    )
    assert out.status.tolist() == [0, 1, 0, 1, 1, 1]
    assert np.isnan(out.log_volume[out.status > 0]).all()
    assert np.isnan(out.point[out.status > 0]).all()
    expected = flow(np.asarray(x), 0.01, 20.0)[1]
    np.testing.assert_allclose(out.log_volume[:3:2], expected[:3:2], atol=0.1)
    # What was passed before the trouble is kept: levels below 15.
    known = np.isfinite(out.profile.log_volumes[5])
    assert known.tolist() == (np.asarray(out.profile.sigmas[5]) < 15).tolist()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver", ["dopri8", "rk4"])
def test_derivatives(solver):
    """With respect to point and condition, forward over reverse, against finite differences."""
    rng = np.random.default_rng(7)
    density = mixture([0.4, 0.6], rng.normal(size=(2, D)), [0.1, 0.3])

    class Shifted(eqx.Module):
        density: GaussianMixture

        def __call__(self, x, sigma, condition):
            return self.density.score(x - condition["shift"], sigma)

    options = {"dopri8": {"tol": 1e-8, "max_steps": 16}, "rk4": {"num_steps": 12}}[solver]

    def run(x, shift):
        condition = {"shift": shift}
        flow = probability_flow(
            Shifted(density), 0.3, 3.0, condition=condition, divergence="exact", solver=solver,
            **options,
        )  # fmt: skip
        out = flow(x)
        return out.log_volume, out.point

    @jax.jit
    def derivatives(x, shift):
        """The value, the point, both gradients and the Hessian of the log volume."""

        def gradients(x):
            (value, point), slopes = jax.value_and_grad(run, (0, 1), has_aux=True)(x, shift)
            return (slopes[0], point), (value, point, *slopes)

        (hessian, jacobian), aux = jax.jacfwd(gradients, has_aux=True)(x)
        return *aux, hessian, jacobian

    x, shift = jnp.asarray(rng.normal(size=D)), jnp.asarray(rng.normal(size=D) / 10)
    value, _, slope, by_shift, hessian, jacobian = derivatives(x, shift)
    v, h = jnp.asarray(rng.normal(size=D)), 1e-4
    above, below = (derivatives(x + sign * h * v, shift) for sign in (1, -1))
    difference = jax.tree.map(lambda a, b: (a - b) / (2 * h), above, below)
    np.testing.assert_allclose(slope @ v, difference[0], atol=1e-5)
    np.testing.assert_allclose(jacobian @ v, difference[1], atol=1e-5)
    np.testing.assert_allclose(hessian @ v, difference[2], atol=1e-4)
    above, below = (derivatives(x, shift + sign * h * v)[0] for sign in (1, -1))
    np.testing.assert_allclose(by_shift @ v, (above - below) / (2 * h), atol=1e-5)
    # The volume is the determinant of the Jacobian, found without it.
    np.testing.assert_allclose(jnp.linalg.slogdet(jacobian)[1], value, atol=1e-3)


@pytest.mark.usefixtures("x64")
def test_reverse_derivatives_in_less_memory():
    """The gradient of the log-density that a flow finds is the score."""
    density = mixture([0.4, 0.6], np.random.default_rng(11).normal(size=(2, D)), [0.1, 0.3])
    flow = probability_flow(
        density, 0.3, 3.0, divergence="exact", derivative="reverse", tol=1e-7, max_steps=64
    )

    def log_density(x):
        out = flow(x)
        assert out.log_volume is not None
        return out.log_volume + density.log_prob(out.point, 3.0)

    x = jnp.ones(D) / 2
    slope = jax.jit(jax.grad(log_density))(x)
    np.testing.assert_allclose(slope, density.score(x, 0.3), atol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver", ["dopri8", "rk4"])
def test_dense_output(solver):
    densities, draw, flow = gaussians(8, 2)
    x = jnp.asarray(draw(0.05))
    run = batched(solver=solver, dense=True, tol=1e-8, num_steps=48)
    low, high = jnp.asarray([0.05, 5.0]), jnp.asarray([5.0, 0.05])
    out = run(stack(densities), x, low, high)
    assert out.log_volume is None
    assert out.profile is None
    sigmas = jnp.asarray([0.05, 0.06, 0.31, 1.0, 4.9, 5.0, 5.1, 0.049])
    path = jax.vmap(lambda path: jax.vmap(path)(sigmas))(out.path)
    assert np.isnan(path[:, -2:]).all()
    for i in range(2):
        start = float(low[i])
        expected = [flow(np.asarray(x), start, float(s))[0][i] for s in sigmas[:-2]]
        scale = np.asarray(sigmas)[:-2, None]
        np.testing.assert_allclose(path[i, :-2] / scale, expected / scale, atol=2e-4)
    np.testing.assert_allclose(path[0, 5], out.point[0], atol=1e-9)
    np.testing.assert_allclose(path[1, 0], out.point[1], atol=1e-9)


class Linear(eqx.Module):
    """s = -(W x) / (1 + sigma^2)."""

    weight: Array

    def __call__(self, x, sigma, condition=None):
        return -jnp.matmul(self.weight, x, precision="highest") / (1 + sigma**2)


STOCHASTIC = {"hutchinson": 5, "hutchpp": 9, "xnystrace": 6}


@pytest.mark.parametrize("method", STOCHASTIC)
def test_stochastic_divergences(method):
    """Unbiased, with an honest error bar, at a known price; probes depend on the key alone."""
    d, m = 16, STOCHASTIC[method]
    rng = np.random.default_rng(9)
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    # M = I - sigma^2/(1 + sigma^2) W is positive semi-definite, its trace mostly of rank 3.
    weight = jnp.asarray(basis @ np.diag([0.1, 0.2, 0.3] + [0.9] * 13) @ basis.T, jnp.float32)
    flow = probability_flow(
        Linear(weight), 0.5, 50.0, divergence=method, num_products=m, solver="rk4", num_steps=12
    )
    x = jnp.ones(d, jnp.float32)
    run = jax.jit(lambda flow, x, keys: jax.vmap(lambda key: flow(x, key))(keys))
    out = run(flow, x, jax.random.split(jax.random.key(0), 200))
    # dL/dlog sigma = sigma^2 tr W/(1 + sigma^2)
    exact = float(np.trace(weight)) * np.log((1 + 50.0**2) / (1 + 0.5**2)) / 2
    errors = np.asarray(out.log_volume) - exact
    assert not out.status.any()
    assert np.abs(errors.mean()) < 4 * errors.std() / np.sqrt(200) + 1e-3
    bars = np.sqrt(np.mean(np.asarray(out.standard_error) ** 2))
    assert 0.8 * errors.std() < bars + 1e-3
    if method == "hutchinson":
        assert bars < 1.2 * errors.std()
        assert out.log_volumes.shape == (200, m)
        # The variance law of signs, at fixed probes: the path integral of one quadratic form.
        off = np.asarray(weight) - np.diag(np.diag(weight))
        growth = np.log((1 + 50.0**2) / (1 + 0.5**2)) / 2
        law = np.sqrt(2 * (off**2).sum() / m) * growth
        np.testing.assert_allclose(errors.std(), law, rtol=0.15)
    assert (out.cost.forward == 49).all()
    assert (out.cost.jvp == 49 * m).all()
    assert (out.cost.vjp == (49 * m if method == "xnystrace" else 0)).all()
    again = run(flow, x + 1, jax.random.split(jax.random.key(0), 200))
    np.testing.assert_allclose(again.log_volume, out.log_volume, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_an_indefinite_operator_is_told():
    """A score beyond the exact ones: M has a negative direction, which the Nystrom trace meets."""
    flow = probability_flow(
        Linear(3 * jnp.eye(8)), 1.0, 5.0, divergence="xnystrace", num_products=3, solver="heun"
    )
    out = flow(jnp.ones(8), jax.random.key(0))
    assert out.status == Status.INDEFINITE
    assert out.standard_error is not None
    assert jnp.isinf(out.standard_error)


def test_fixed_probes_against_fresh_ones():
    """With probes drawn once the field is one field; drawn anew, errors average along the way."""
    d, n, m = 12, 24, 400
    rng = np.random.default_rng(10)
    a = rng.normal(size=(d, d)) / d
    weight = jnp.asarray(a + a.T, jnp.float32)
    flow = probability_flow(
        Linear(weight), 0.5, 50.0, divergence="hutchinson", num_products=m, solver="heun",
        num_steps=n,
    )  # fmt: skip
    fixed = flow(jnp.ones(d, jnp.float32), jax.random.key(0)).log_volumes
    assert fixed is not None
    # By Heun's rule with fresh signs at every level: the trapezoid rule of independent forms.
    sigmas = np.geomspace(0.5, 50.0, n + 1)
    weights = np.full(n + 1, np.log(100.0) / n)
    weights[[0, -1]] /= 2
    weights *= sigmas**2 / (1 + sigmas**2)
    signs = rng.choice([-1.0, 1.0], (m, n + 1, d))
    forms = np.einsum("mni,ij,mnj->mn", signs, np.asarray(weight), signs)
    fresh = forms @ weights
    off = np.asarray(weight) - np.diag(np.diag(weight))
    one = 2 * (off**2).sum()
    np.testing.assert_allclose(np.var(fixed), one * weights.sum() ** 2, rtol=0.25)
    np.testing.assert_allclose(np.var(fresh), one * (weights**2).sum(), rtol=0.25)


def largest_constant(lowered):
    text = lowered.as_text()
    assert "elided" not in text
    shapes = re.findall(r'dense<["\[][^>]*>\s*:\s*tensor<((?:\d+x)+)\w+>', text)
    return max((np.prod([int(n) for n in s.rstrip("x").split("x")]) for s in shapes), default=0)


@pytest.mark.parametrize("solver", ["tsit5", "heun"])
def test_weights_are_arguments_and_compiled_once(solver):
    traces = []

    class Counted(Linear):
        def __call__(self, x, sigma, condition=None):
            traces.append(None)
            return super().__call__(x, sigma, condition)

    def model(scale):
        score = Counted(scale * jnp.eye(20, dtype=jnp.float32) + 0.01)
        return Model(score, (20,), sigma_min=0.01, sigma_max=10.0, data_std=1.0)

    def flow_of(model, sigma1=5.0):
        return probability_flow(
            model, 0.1, sigma1, divergence="hutchinson", num_products=2, solver=solver, num_steps=4
        )

    xs, key = jnp.ones((3, 20), jnp.float32), jax.random.key(0)
    run = jax.jit(lambda model, xs, key: jax.vmap(lambda x: flow_of(model)(x, key))(xs))
    assert largest_constant(run.lower(model(1.0), xs, key)) < 400
    eager = flow_of(model(1.0))(xs[0], key)
    count = len(traces)
    other = flow_of(model(2.0), 7.0)(xs[1], jax.random.key(1))
    assert len(traces) == count
    assert not eager.status
    assert not other.status


def test_conditions_reach_the_score():
    density = ConditionalMixture([0.5, 0.5], jnp.asarray([[-2.0], [2.0]]), 1.0, [0, 1])
    x = jnp.zeros(1)
    options = {"solver": "heun", "num_steps": 64, "divergence": "exact"}
    ends = [
        probability_flow(density, 0.1, 3.0, condition=condition, **options)(x).point[0]
        for condition in (jnp.int32(0), jnp.int32(1), None)
    ]
    stretch = np.sqrt((1 + 9) / (1 + 0.01))
    np.testing.assert_allclose(ends, [-2 + 2 * stretch, 2 - 2 * stretch, 0], atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma0": 0.0}, r"sigma0: expected a positive finite number, got 0\.0"),
        ({"sigma1": -1.0}, r"sigma1: expected a positive finite number, got -1\.0"),
        ({"sigma1": float("nan")}, "sigma1: expected a positive finite number, got nan"),
        ({"sigma1": 0.1}, r"sigma1: expected another noise level than sigma0, got 0\.1"),
        ({"num_steps": 0}, "num_steps: expected a whole number at least 1, got 0"),
        ({"max_steps": 0}, "max_steps: expected a whole number at least 1, got 0"),
        ({"solver": "euler"}, "solver: expected one of tsit5, dopri8, heun, rk4, got 'euler'"),
        ({"derivative": "none"}, "derivative: expected one of both, reverse, got 'none'"),
        ({"divergence": "guess"}, "divergence: expected one of None, exact, .*got 'guess'"),
        ({"divergence": "hutchpp", "num_products": 3}, "num_products: .*at least 4, got 3"),
        ({"chunk_size": 0}, "chunk_size: expected a whole number at least 1, got 0"),
        ({"tol": 0.0}, r"tol: expected a number between 0 and 1, got 0\.0"),
    ],
)
def test_bad_options(change, message):
    arguments = {"score": lambda x, sigma, c: -x, "sigma0": 0.1, "sigma1": 1.0} | change
    with pytest.raises(InputError, match=message):
        probability_flow(**arguments)


def test_bad_points():
    flow = probability_flow(lambda x, s, c: -x, 0.1, 1.0, divergence="hutchinson", solver="heun")
    with pytest.raises(InputError, match="key: expected a key for divergence='hutchinson'"):
        flow(jnp.ones(2))
    with pytest.raises(InputError, match="x: expected float32 or float64, got bfloat16"):
        flow(jnp.ones(2, jnp.bfloat16), jax.random.key(0))
    scalar = probability_flow(lambda x, s, c: jnp.sum(x), 0.1, 1.0, solver="heun")
    with pytest.raises(InputError, match=r"expected f\(x\) like x"):
        scalar(jnp.ones(2))
