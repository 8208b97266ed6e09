"""Arnoldi against dense eigenproblems, ARPACK, and what a closed Krylov space must say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.linalg import arnoldi
from memjax.linalg.arnoldi import eigs

KEY = jax.random.key(0)
D = 20


def multiply(a, v):
    return jnp.matmul(a, v, precision="highest")


@functools.partial(jax.jit, static_argnames=("k", "which", "tol", "num_products"))
def solve(a, keys, k, starts=None, **options):
    """One eigenproblem per matrix and key."""

    def one(a, key, start):
        like = jnp.zeros(a.shape[-1], a.dtype)
        return eigs(functools.partial(multiply, a), like, key, k, start=start, **options)

    return jax.vmap(one)(a, keys, starts)


def rotated(a, rng):
    """An orthogonal similarity: same spectrum and departure from normality, nothing sparse."""
    q, _ = np.linalg.qr(rng.standard_normal(a.shape))
    return q @ a @ q.T


def low_rank(rng, rank):
    return rng.standard_normal((D, rank)) @ rng.standard_normal((rank, D)) / D


def planes(rng, angles_and_moduli):
    """Normal with conjugate pairs: scaled plane rotations."""
    a = np.zeros((D, D))
    for i, (angle, modulus) in enumerate(angles_and_moduli):
        c, s = modulus * np.cos(angle), modulus * np.sin(angle)
        a[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
    return rotated(a, rng)


def companion(roots):
    a = np.diag(np.ones(D - 1), -1)
    a[:, -1] = -np.poly(roots)[::-1][:D]
    return a


NORMAL = {
    "zero": lambda rng: np.zeros((D, D)),
    "identity": lambda rng: np.eye(D),
    "minus identity": lambda rng: -3 * np.eye(D),
    "two values": lambda rng: rotated(np.diag([2.0] * 3 + [-1.0] * (D - 3)), rng),
    "projector": lambda rng: rotated(np.diag([1.0] * 7 + [0.0] * (D - 7)), rng),
    "rank one": lambda rng: rotated(np.diag([3.0] + [0.0] * (D - 1)), rng),
    "triple": lambda rng: rotated(np.diag([4.0] * 3 + [3.0] * 2 + [1.0] * (D - 5)), rng),
    "cyclic shift": lambda rng: np.roll(np.eye(D), 1, axis=0),
    "equal planes": lambda rng: planes(rng, [(0.7, 2.0)] * 3 + [(0.3, 1.0)] * (D // 2 - 3)),
    "planes": lambda rng: planes(rng, rng.uniform(0.1, 3, (D // 2, 2))),
    "skew": lambda rng: (lambda a: a - a.T)(rng.standard_normal((D, D))),
    "symmetric": lambda rng: (lambda a: a + a.T)(rng.standard_normal((D, D))),
    "graded": lambda rng: rotated(np.diag(0.3 ** np.arange(D)), rng),
}
NON_NORMAL = {
    "Gaussian": lambda rng: rng.standard_normal((D, D)),
    "low rank": lambda rng: low_rank(rng, 3),
    "nilpotent": lambda rng: rotated(np.diag(np.ones(D - 1), 1), rng),
    "Jordan": lambda rng: rotated(2 * np.eye(D) + np.diag(np.ones(D - 1), 1), rng),
    "short Jordan": lambda rng: rotated(
        np.diag([2.0] * 4 + [1.0] * (D - 4)) + np.diag([1, 0, 1] + [0.0] * (D - 4), 1), rng
    ),
    "companion": lambda rng: companion(rng.uniform(-1, 1, D)),
    "triangular": lambda rng: rotated(np.triu(rng.standard_normal((D, D))), rng),
    "Grcar": lambda rng: sum(np.eye(D, k=i) for i in range(4)) - np.eye(D, k=-1),
    "half a percent skew": lambda rng: (lambda a, b: a + a.T + 0.005 * (b - b.T))(
        *rng.standard_normal((2, D, D))
    ),
}


def zoo(repeats):
    """Names and matrices of every kind, at several scales."""
    rng = np.random.default_rng(0)
    kinds = list((NORMAL | NON_NORMAL).items())
    names = [name for name, _ in kinds] * repeats
    scales = 10.0 ** rng.integers(-6, 7, len(names))
    return names, np.stack(
        [s * kind(rng) for s, (_, kind) in zip(scales, kinds * repeats, strict=True)]
    )


def key_of(values, which):
    """What the selection sorts by, descending."""
    return {
        "largest_magnitude": np.abs(values),
        "largest_real": np.real(values),
        "smallest_real": -np.real(values),
    }[which]


def true_residuals(a, pairs):
    """|A y - theta y| in double precision."""
    y = np.asarray(pairs.vectors, complex)
    theta = np.asarray(pairs.values, complex)
    return np.linalg.norm(np.einsum("nij,nkj->nki", a, y) - theta[..., None] * y, axis=-1)


def check_zoo(which, dtype, repeats, k=5, **options):
    """Every claim that a result makes, on every kind of operator."""
    names, exact = zoo(repeats)
    a = np.asarray(exact, dtype).astype(float)
    eps = np.finfo(dtype).eps
    keys = jax.random.split(KEY, len(names))
    pairs = jax.tree.map(np.asarray, solve(jnp.asarray(a, dtype), keys, k, which=which, **options))
    norm = np.linalg.norm(a, 2, axis=(1, 2))
    rounding = (30 * D * eps * norm)[:, None]
    np.testing.assert_allclose(np.linalg.norm(pairs.vectors, axis=-1), 1, atol=1e3 * eps)
    # The bound bounds, and is not idle.
    true = true_residuals(a, pairs)
    assert (true <= pairs.residuals + rounding).all()
    assert (pairs.residuals <= true + rounding).all()
    # Descending; complex values come in pairs, but for a last one cut off by k.
    order = key_of(pairs.values, which)
    assert (np.diff(order, axis=1) <= 4 * eps * norm[:, None]).all()
    for values in pairs.values:
        above = values[values.imag > 0]
        below = values[values.imag < 0]
        assert set(below.conj()) <= set(above)
        assert len(above) - len(below) == (values[-1].imag > 0)
        for i in np.flatnonzero(values.imag < 0):
            assert values[i] == values[i - 1].conj()
    done = pairs.status == Status.BREAKDOWN
    assert set(pairs.status) <= {Status.OK, Status.BREAKDOWN, Status.NOT_CONVERGED}
    tol = options.get("tol", eps**0.5)
    within = (pairs.residuals <= tol * norm[:, None]).all(axis=1)
    assert within[pairs.status == Status.OK].all()
    assert pairs.converged[pairs.status != Status.NOT_CONVERGED].all()
    for i, name in enumerate(names):
        if name not in NORMAL:
            continue
        # Normal operators: every value is an eigenvalue, and no oftener than it is one.
        dense = list(np.linalg.eigvals(a[i]))
        for value, residual in zip(pairs.values[i], pairs.residuals[i], strict=True):
            distance = np.abs(np.array(dense) - value)
            assert distance.min() <= residual + rounding[i, 0], name
            dense.pop(int(distance.argmin()))
        if done[i]:
            # The claim of BREAKDOWN: these are the k extreme ones, with their multiplicities.
            best = np.sort(key_of(np.linalg.eigvals(a[i]), which))[::-1][:k]
            np.testing.assert_allclose(order[i], best, atol=2 * tol * norm[i], err_msg=name)
    return dict(zip(names, pairs.status, strict=True)), pairs


SIMPLE = ("zero", "identity", "minus identity", "projector", "rank one", "two values")


def test_every_claim_in_double(x64):
    status, _ = check_zoo("largest_real", np.float64, 8)
    for name in SIMPLE:
        assert status[name] == Status.BREAKDOWN, name


def test_every_claim_for_whole_spectra(x64):
    """k = d: every eigenvalue with its multiplicity, and the status says that this is all."""
    status, _ = check_zoo("smallest_real", np.float64, 4, k=D)
    assert set(status.values()) == {Status.BREAKDOWN}


def test_every_claim_in_single():
    status, pairs = check_zoo("largest_magnitude", np.float32, 12)
    for name in SIMPLE:
        assert status[name] == Status.BREAKDOWN, name
    # The identity takes k products and one more, to see that nothing is left.
    assert pairs.num_products[list(status).index("identity")] == 6


def test_a_short_budget_keeps_valid_residuals():
    status, pairs = check_zoo("largest_magnitude", np.float32, 4, num_products=10)
    assert status["Gaussian"] == Status.NOT_CONVERGED
    assert (pairs.num_products <= 10).all()


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_claim_thousands_of_times(x64, dtype):
    check_zoo("largest_magnitude", dtype, 230)


@functools.partial(jax.jit, static_argnames="steps")
def recurrence(a, steps):
    """The state after some steps, none of them decided upon."""
    like = jnp.zeros(a.shape[-1], a.dtype)
    plan = arnoldi._make_plan(like, 1, "largest_magnitude", None, steps)
    state = arnoldi._initial(plan, arnoldi._first_vector(like, KEY, None))

    def step(_, state):
        return arnoldi._expand(plan, state, multiply(a, state.vector), KEY)

    return jax.lax.fori_loop(0, steps, step, state)


def test_the_recurrence():
    """A Q^T = Q^T H + h q e_n^T with orthonormal Q and q, across breakdowns."""
    _, matrices = zoo(1)
    steps, dtype = 12, jnp.zeros(()).dtype
    eps = np.finfo(dtype).eps
    batch = jax.vmap(lambda a: recurrence(a, steps))(jnp.asarray(matrices, dtype))
    basis, h, q, remainder = (
        np.asarray(x, float) for x in (batch.basis, batch.hessenberg, batch.vector, batch.remainder)
    )
    for i, a in enumerate(np.asarray(matrices, dtype).astype(float)):
        rows, last = basis[i, :-1], remainder[i] * np.outer(q[i], np.eye(steps)[-1])
        error = a @ rows.T - rows.T @ h[i] - last
        assert np.linalg.norm(error, 2) <= 30 * D * eps * np.linalg.norm(a, 2)
        np.testing.assert_allclose(basis[i] @ basis[i].T, np.eye(steps + 1), atol=50 * eps)
        np.testing.assert_array_equal(basis[i, -1], q[i])
        assert np.linalg.norm(np.tril(h[i], -2)) == 0


def test_against_arpack(x64):
    """A non-normal operator of moderate size: SciPy's ARPACK finds the same."""
    rng = np.random.default_rng(3)
    d, k = 200, 6
    a = np.diag(np.concatenate([np.linspace(2, 3, 8), rng.uniform(-1, 1, d - 8)]))
    a[:8, :8] += 0.8 * rng.standard_normal((8, 8))
    a += 0.02 * rng.standard_normal((d, d))
    product = functools.partial(multiply, jnp.asarray(a))
    ours = jax.jit(lambda key: eigs(product, jnp.zeros(d), key, k, tol=1e-10, num_products=120))(
        KEY
    )
    theirs = scipy.sparse.linalg.eigs(a, k, which="LM", tol=1e-12, ncv=60)[0]
    assert ours.status == Status.OK
    assert ours.num_products < 120
    np.testing.assert_allclose(
        np.sort_complex(ours.values), np.sort_complex(theirs), rtol=1e-7, atol=1e-7
    )


def test_hard_cases():
    """Starts and scales, each a lane of one program."""
    rng = np.random.default_rng(4)
    random = rng.standard_normal(D)
    ladder = np.diag(np.arange(1.0, D + 1))
    cut = np.zeros((D, D))
    cut[:4, :4] = np.kron(np.diag([2, 1]), [[1, -2], [2, 1]])
    several = np.diag([4.0] * 2 + [-3.0] * 2 + [0.0] * (D - 4))
    generic = rng.standard_normal((D, D))
    expected = np.sort(np.abs(np.linalg.eigvals(generic)))[:-4:-1]
    cases = {
        "eigenvector": (ladder, np.eye(D)[4]),
        "invariant plane": (ladder, np.eye(D)[4] + np.eye(D)[7]),
        "zero start": (ladder, np.zeros(D)),
        "start not finite": (ladder, np.full(D, np.nan)),
        "cut pair": (cut, random),
        "multiplicities": (several, random),
        "tiny": (1e-25 * generic, random),
        "huge": (1e25 * generic, random),
        "tiny start": (generic, 1e-30 * random),
        "infinite": (generic + np.diag([0.0, np.inf] + [0.0] * (D - 2)), random),
    }
    matrices, starts = (np.stack(x).astype(np.float32) for x in zip(*cases.values(), strict=True))
    keys = jax.random.split(KEY, len(cases))
    batch = jax.tree.map(np.asarray, solve(jnp.asarray(matrices), keys, 3, jnp.asarray(starts)))
    pairs = {name: jax.tree.map(lambda x, i=i: x[i], batch) for i, name in enumerate(cases)}
    for name in ("eigenvector", "invariant plane", "zero start"):
        np.testing.assert_allclose(pairs[name].values, [D, D - 1, D - 2], rtol=1e-3, err_msg=name)
        assert pairs[name].converged.all()
    np.testing.assert_allclose(pairs["cut pair"].values, [2 + 4j, 2 - 4j, 1 + 2j], atol=1e-4)
    np.testing.assert_allclose(pairs["multiplicities"].values, [4, 4, -3], atol=1e-4)
    assert np.linalg.matrix_rank(pairs["multiplicities"].vectors, tol=0.1) == 3
    for name in ("cut pair", "multiplicities"):
        assert pairs[name].status == Status.BREAKDOWN, name
    for name, scale in (("tiny", 1e-25), ("huge", 1e25), ("tiny start", 1.0)):
        assert pairs[name].status in (Status.OK, Status.BREAKDOWN), name
        moduli = np.abs(pairs[name].values / scale)
        np.testing.assert_allclose(moduli, expected, rtol=1e-3, err_msg=name)
    for name in ("start not finite", "infinite"):
        assert pairs[name].status == Status.NONFINITE, name
        assert pairs[name].num_products <= 2
        assert np.isnan(pairs[name].values).all()
        assert not pairs[name].converged.any()


def test_one_dimension():
    pairs = jax.jit(lambda key: eigs(lambda v: -7 * v, jnp.zeros((1, 1)), key, 1))(KEY)
    np.testing.assert_allclose(pairs.values, [-7.0], rtol=1e-6)
    assert (pairs.status, pairs.num_products) == (Status.BREAKDOWN, 1)


def test_lanes_are_alone():
    """Each lane of a batch stops by itself, and a failing one touches no other."""
    rng = np.random.default_rng(5)
    a = 0.05 * rng.standard_normal((6, 60, 60))
    for i in range(6):
        a[i] += np.diag([3.0 + i, 2.5 + i] + [0.0] * 58)
    a = a.astype(np.float32)
    keys = jax.random.split(KEY, 6)
    batch = solve(jnp.asarray(a), keys, 2)
    assert (np.asarray(batch.status) == Status.OK).all()
    products = np.asarray(batch.num_products)
    assert products.min() < products.max() < 30
    alone = jax.jit(
        lambda a, key: eigs(functools.partial(multiply, a), jnp.zeros(60, a.dtype), key, 2)
    )
    for i in range(6):
        one = alone(jnp.asarray(a[i]), keys[i])
        assert one.num_products == products[i]
        np.testing.assert_allclose(one.values, batch.values[i], rtol=1e-5)
        np.testing.assert_allclose(one.residuals, batch.residuals[i], rtol=0.1, atol=1e-4)
    assert alone._cache_size() == 1
    broken = a.copy()
    broken[2, 0, 0] = np.nan
    broken[4, 3, 3] = np.inf
    other = solve(jnp.asarray(broken), keys, 2)
    bad = np.array([2, 4])
    assert (np.asarray(other.status)[bad] == Status.NONFINITE).all()
    assert np.isnan(np.asarray(other.values)[bad]).all()
    assert not np.asarray(other.converged)[bad].any()
    rest = np.delete(np.arange(6), bad)
    for mine, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(np.asarray(mine)[rest], np.asarray(theirs)[rest])


def test_traces_and_shapes():
    """The operator is traced twice, whatever the number of products; arrays keep their shape."""
    traces = 0

    def matvec(v):
        nonlocal traces
        traces += 1
        return jnp.flip(v, axis=0) - 2 * v

    pairs = jax.jit(jax.vmap(lambda key: eigs(matvec, jnp.zeros((3, 2, 2)), key, 4)))(
        jax.random.split(KEY, 3)
    )
    assert pairs.vectors.shape == (3, 4, 3, 2, 2)
    np.testing.assert_allclose(pairs.values, np.full((3, 4), -3), atol=1e-5)
    assert traces <= 3


def test_platforms():
    """Where the small eigenproblem cannot be solved, one line says so, and under jit too."""
    program = jax.jit(lambda key: eigs(lambda v: v, jnp.zeros(4), key, 2)).trace(KEY)
    assert program.lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(NotImplementedError, match="'eig' not found for platform tpu") as caught:
        program.lower(lowering_platforms=("tpu",))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("k", {"k": 4}),
        ("k", {"k": 0}),
        ("like", {"like": jnp.zeros(3, jnp.int32)}),
        ("like", {"like": jnp.zeros(3, jnp.bfloat16)}),
        ("like", {"like": jnp.zeros(0)}),
        ("matvec", {"matvec": lambda v: v[:2]}),
        ("matvec", {"matvec": lambda v: v.astype(jnp.float16)}),
        ("start", {"start": jnp.zeros(2)}),
        ("start", {"start": jnp.zeros(3, jnp.float16)}),
        ("num_products", {"num_products": 1}),
        ("tol", {"tol": -1.0}),
        ("tol", {"tol": float("nan")}),
    ],
)
def test_bad_input_is_named(name, arguments):
    defaults = {"matvec": lambda v: v, "like": jnp.zeros(3), "key": KEY, "k": 2}
    with pytest.raises(InputError, match=f"^{name}: expected ") as caught:
        # Below the annotations, which the test run would check first.
        getattr(eigs, "__wrapped__", eigs)(**(defaults | arguments))
    assert "\n" not in str(caught.value)


def test_an_unknown_target_is_named():
    with pytest.raises(InputError, match="which: expected one of largest_magnitude"):
        arnoldi._make_plan(jnp.zeros(3), 1, "largest", None, None)
