"""Eigenpairs of a non-symmetric operator: Arnoldi with full orthogonalization."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Bool, Complex, Float, Int, PRNGKeyArray

from memjax._core.checks import check_count
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.linalg._krylov import check_krylov, length, matmul, orthogonalize, product_noise
from memjax.linalg._operator import Matvec

Target = Literal["largest_magnitude", "largest_real", "smallest_real"]


class ComplexEigenpairs(NamedTuple):
    """Eigenpairs of a real operator A that need not be symmetric, the most extreme first.

    Attributes:
        values: Ritz values theta; conjugates stand side by side, positive imaginary part first.
        vectors: Ritz vectors y of unit length, stacked along the first axis; real where the value
            is real, up to a phase otherwise. They are not orthogonal, and coincide where A is
            defective.
        residuals: bounds on |A y - theta y|. Each pair is exact for some A + E with
            ``|E| <= residual``; how far that moves an eigenvalue depends on its condition.
        converged: residual within the tolerance.
        status: ``OK`` (all converged), ``BREAKDOWN`` (the Krylov space closed: the pairs are exact
            and there are no others to find), ``NOT_CONVERGED`` (budget used up; ``converged`` says
            which are) or ``NONFINITE``.
        num_products: products with A.
    """

    values: Complex[Array, " k"]
    vectors: Complex[Array, "k ..."]
    residuals: Float[Array, " k"]
    converged: Bool[Array, " k"]
    status: Int[Array, ""]
    num_products: Int[Array, ""]


class _Selected(NamedTuple):
    """The k most extreme eigenpairs of H; ``keys`` descend."""

    keys: Float[Array, " k"]
    values: Complex[Array, " k"]
    vectors: Complex[Array, "m k"]
    residuals: Float[Array, " k"]


class _State(NamedTuple):
    """A Q^T = Q^T H + remainder q e_n^T with Q the first n = size rows of the basis, q the next.

    Each step ends by writing its vector. One that wrote a row first and then read the basis would
    make XLA copy all of it (7 to 15 times slower for d = 49152, m = 40 on a CPU).

    ``found`` is what the last step selected, if it looked. ``best`` are the keys of the k selected
    values when the last block closed, -inf before.
    """

    basis: Float[Array, "m+1 d"]
    hessenberg: Float[Array, "m m"]
    vector: Float[Array, " d"]
    remainder: Float[Array, ""]
    norm: Float[Array, ""]
    size: Int[Array, ""]
    found: _Selected
    best: Float[Array, " k"]
    closed: Bool[Array, ""]
    status: Int[Array, ""]
    done: Bool[Array, ""]


class _Plan(NamedTuple):
    """The static choices of one call."""

    d: int
    m: int
    k: int
    which: Target
    tol: float
    noise: float


def eigs(
    matvec: Matvec,
    like: Float[Array, "..."],
    key: PRNGKeyArray,
    k: int,
    *,
    which: Target = "largest_magnitude",
    tol: float | int | None = None,
    num_products: int | None = None,
    start: Float[Array, "..."] | None = None,
) -> ComplexEigenpairs:
    """Extreme eigenpairs of a non-symmetric operator by Arnoldi's method.

    Rayleigh-Ritz on a Krylov space with full (twice) reorthogonalization: with Q the orthonormal
    basis, ``A Q^T = Q^T H + h q e_n^T``, ``H z = theta z`` and ``y = Q^T z``, the residual
    ``|A y - theta y| = h |z_n|`` is known without another product. It stops as soon as all k
    residuals are within the tolerance; in a vmapped batch each lane stops counting by itself.

    A remainder h of the size of rounding is an answer: the space is invariant, and its pairs are
    exact. The search then goes on from a random vector orthogonal to it while fewer than k pairs
    are known or the block that closed last still changed the k selected. So multiple eigenvalues
    are found as often as they occur, low-rank operators give no ghosts, and the identity is as
    good an operator as any other. Before a space closes, a Krylov space sees every eigenvalue
    once: ``OK`` says that k pairs converged, not that no copy of them (and, as in every Krylov
    method, no value the start has next to no component of) was missed; ``BREAKDOWN`` does.

    Args:
        matvec: v -> A v on arrays of one shape (any rank), A real, traceable.
        like: an array of that shape and dtype (float32 or float64); its values are not used.
        key: for the start, and for the fresh vectors after a breakdown.
        k: number of pairs, 1 <= k <= d. Static. If it cuts a conjugate pair in two, the last value
            is the one with positive imaginary part; its conjugate is one more.
        which: order of the values: by modulus, or by real part from either end. Static.
        tol: a pair has converged when its residual is below ``tol * |A|``, |A| estimated by the
            longest product; by default the square root of the machine epsilon. With 0 the budget
            is used up (unless the space closes). Static.
        num_products: budget, k or more: the size of the basis, which is not restarted; by default
            max(64, 2 k + 20). More than d is never used. Static.
        start: first vector, shaped like ``like``; random by default, and where it is zero.

    Returns:
        ``ComplexEigenpairs``.

    Raises:
        InputError: ``like`` is not float32 or float64, A v differs from v in shape or dtype,
            ``start`` does, k, ``tol`` or ``num_products`` is out of range, or ``which`` is unknown.
        NotImplementedError: compiled for a platform whose ``jnp.linalg.eig`` is missing: TPUs (as
            of jax 0.12: "rule for primitive 'eig' not found for platform tpu"). CPUs have it, and
            GPUs: on the device with cuSOLVER 11.7.1 or newer, on the host otherwise.

    Without raising: a NaN or infinite product ends the run with ``NONFINITE`` and NaN values; an
    exhausted budget gives ``NOT_CONVERGED`` with valid residuals.

    Accuracy and cost: ``num_products`` products, and per product about 8 m d operations and one
    eigenproblem of size m (0.3 ms for m = 40 on a CPU); memory of m + 1 vectors. The residuals
    bound the true ones up to the rounding of the products. No reverse-mode derivative.

    >>> import jax, jax.numpy as jnp
    >>> a = jnp.array([[0.0, -2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    >>> pairs = eigs(lambda v: a @ v, jnp.zeros(3), jax.random.key(0), 2)
    >>> pairs.values.imag.round(4).tolist()
    [2.0, -2.0]

    References:
        Arnoldi (1951), doi:10.1090/qam/42792. Saad (2011), Numerical Methods for Large Eigenvalue
        Problems, revised edition, doi:10.1137/1.9781611970739, section 6.2.
        Giraud, Langou and Rozloznik (2005), doi:10.1007/s00211-005-0615-4.
    """
    check_krylov(matvec, like)
    plan = _make_plan(like, k, which, tol, num_products)
    first = _first_vector(like, key, start)
    select = sequential_vmap(lambda wanted, *args: _select(plan, wanted, *args))

    def step(state: _State) -> _State:
        running = ~state.done
        state = _expand(plan, state, matvec(state.vector.reshape(like.shape)).reshape(-1), key)
        return _decide(plan, state, select, running)

    state = jax.lax.while_loop(lambda s: ~s.done, step, _initial(plan, first))
    return _report(plan, state, like)


def _make_plan(like, k, which, tol, num_products) -> _Plan:
    """Fill in the defaults and refuse what cannot work."""
    check_count("k", k, 1, like.size)
    if which not in get_args(Target):
        raise InputError(f"which: expected one of {', '.join(get_args(Target))}, got {which!r}")
    tol = float(jnp.finfo(like.dtype).eps) ** 0.5 if tol is None else float(tol)
    if not tol >= 0:
        raise InputError(f"tol: expected a number >= 0, got {tol}")
    num_products = max(64, 2 * k + 20) if num_products is None else num_products
    check_count("num_products", num_products, k)
    return _Plan(like.size, min(num_products, like.size), k, which, tol, product_noise(like))


def _first_vector(like, key, start) -> Float[Array, " d"]:
    """The caller's start or a random one, flat and of unit length."""
    random = jax.random.normal(derive_key(key, "start"), (like.size,), like.dtype)
    if start is None:
        return random / length(random)
    if start.shape != like.shape or start.dtype != like.dtype:
        expected = f"{like.dtype}{list(like.shape)}"
        raise InputError(f"start: expected {expected}, got {start.dtype}{list(start.shape)}")
    first = jnp.where(length(start.reshape(-1)) == 0, random, start.reshape(-1))
    return first / length(first)


def _initial(plan: _Plan, first: Float[Array, " d"]) -> _State:
    """A basis of one vector, not yet multiplied."""
    dtype = first.dtype
    return _State(
        basis=jnp.zeros((plan.m + 1, plan.d), dtype).at[0].set(first),
        hessenberg=jnp.zeros((plan.m, plan.m), dtype),
        vector=first,
        remainder=jnp.zeros((), dtype),
        norm=jnp.zeros((), dtype),
        size=jnp.int32(0),
        found=_nothing(plan, dtype),
        best=jnp.full(plan.k, -jnp.inf, dtype),
        closed=jnp.asarray(False),
        status=jnp.int32(Status.NOT_CONVERGED),
        done=jnp.asarray(False),
    )


def _expand(plan: _Plan, state: _State, w: Float[Array, " d"], key: PRNGKeyArray) -> _State:
    """Take the product w of the vector into H, and its remainder into the basis."""
    n, basis = state.size, state.basis
    rest, column = orthogonalize(basis, w)
    norm = jnp.maximum(state.norm, length(w))
    remainder = length(rest)
    # False for NaN. With the whole space in the basis the remainder is rounding, whatever its size.
    closed = (remainder <= plan.noise * norm) | (n + 1 == plan.d)

    def fresh():
        noise = jax.random.normal(derive_key(key, "fresh", n), w.shape, w.dtype)
        return orthogonalize(basis, noise)[0]

    vector = jax.lax.cond(closed, fresh, lambda: rest)
    size = length(vector)
    vector = vector / jnp.where(size > 0, size, jnp.ones_like(size))
    remainder = jnp.where(closed, jnp.zeros_like(remainder), remainder)
    column = jnp.where(jnp.arange(plan.m + 1, dtype=jnp.int32) == n + 1, remainder, column)
    return state._replace(
        basis=jax.lax.dynamic_update_index_in_dim(basis, vector, n + 1, 0),
        hessenberg=jax.lax.dynamic_update_index_in_dim(state.hessenberg, column[:-1], n, 1),
        vector=vector,
        remainder=remainder,
        norm=norm,
        size=n + 1,
        closed=closed,
    )


def _decide(plan: _Plan, state: _State, select, running: Bool[Array, ""]) -> _State:
    """Stop, or say what the next block has to improve on."""
    finite = jnp.isfinite(state.norm)
    full = state.size == plan.m
    searching = jnp.any(state.best > -jnp.inf)
    due = (state.size >= plan.k) & (state.closed | ~searching) | full
    looked = running & finite & due
    found = select(looked, state.hessenberg, state.size, state.remainder, state.norm)
    # A block that closed holds each eigenvalue of A outside the earlier ones: once it brings
    # nothing that counts among the k, nothing is left that would.
    margin = max(plan.tol, plan.noise) * state.norm
    improved = jnp.any(~(found.keys <= state.best + margin))
    exhausted = state.size == plan.d
    complete = looked & state.closed & (exhausted | ~improved)
    converged = looked & ~state.closed & jnp.all(found.residuals <= plan.tol * state.norm)
    status = jnp.where(complete, jnp.int32(Status.BREAKDOWN), state.status)
    status = jnp.where(finite, status, jnp.int32(Status.NONFINITE))
    return state._replace(
        found=found,
        best=jnp.where(looked & state.closed, found.keys, state.best),
        status=status,
        done=complete | converged | full | ~finite,
    )


def _nothing(plan: _Plan, dtype) -> _Selected:
    """What was selected without looking."""
    complex_dtype = np.result_type(dtype, np.complex64)
    return _Selected(
        keys=jnp.full(plan.k, -jnp.inf, dtype),
        values=jnp.full(plan.k, jnp.nan, complex_dtype),
        vectors=jnp.full((plan.m, plan.k), jnp.nan, complex_dtype),
        residuals=jnp.full(plan.k, jnp.nan, dtype),
    )


def _select(plan: _Plan, wanted, hessenberg, size, remainder, norm) -> _Selected:
    """Eigenpairs of the leading block of H, the k most extreme; nothing unless ``wanted``.

    Wrapped in ``sequential_vmap``: under ``vmap`` a ``cond`` would solve the eigenproblem in every
    lane at every step, needed or not, and LAPACK takes the lanes one by one anyway.
    """

    def solve():
        used = jnp.arange(plan.m, dtype=jnp.int32) < size
        block = jnp.where(used[:, None] & used[None, :], hessenberg, 0)
        top = jnp.max(jnp.abs(block))
        unit = jnp.where(top > 0, top, jnp.ones_like(top))
        block = block / unit
        # Empty slots are decoupled and carry a value outside the disc that holds the spectrum.
        radius = jnp.linalg.norm(block)
        padded = block + jnp.diag(jnp.where(used, jnp.zeros_like(radius), 3 * radius + 1))
        values, vectors = jnp.linalg.eig(padded)
        inside = jnp.abs(values) < 2 * radius + 0.5
        vectors = jnp.where(used[:, None], vectors, 0)
        keys = {
            "largest_magnitude": jnp.abs(values),
            "largest_real": values.real,
            "smallest_real": -values.real,
        }[plan.which]
        keys = jnp.where(inside, keys, -jnp.inf)
        # Stable, and equal for conjugates, which LAPACK puts side by side, the positive one first.
        order = jnp.lexsort((jnp.abs(values.imag), -values.real, -keys))[: plan.k]
        values, vectors = values[order], vectors[:, order]
        error = _apply(block, vectors) - vectors * values[None, :]
        coupled = remainder * jnp.abs(vectors[size - 1])
        rounding = plan.noise * norm
        return _Selected(
            keys=keys[order] * unit,
            values=values * unit.astype(values.dtype),
            vectors=vectors,
            residuals=unit * jnp.linalg.norm(error, axis=0) + coupled + rounding,
        )

    return jax.lax.cond(wanted, solve, lambda: _nothing(plan, hessenberg.dtype))


def _apply(a: Float[Array, "p m"], z: Complex[Array, "m k"]) -> Complex[Array, "p k"]:
    """A real matrix times complex columns."""
    return jax.lax.complex(matmul(a, z.real), matmul(a, z.imag))


def _report(plan: _Plan, state: _State, like: Float[Array, "..."]) -> ComplexEigenpairs:
    """Back from the basis to the space of ``like``; NaN where the last step could not look."""
    found, vectors = state.found, _apply(state.basis[:-1].T, state.found.vectors).T
    complete = state.status == Status.BREAKDOWN
    converged = complete | (found.residuals <= plan.tol * state.norm)
    status = jnp.where(
        (state.status == Status.NOT_CONVERGED) & jnp.all(converged),
        jnp.int32(Status.OK),
        state.status,
    )
    finite = jnp.all(jnp.isfinite(found.residuals))
    return ComplexEigenpairs(
        values=found.values,
        vectors=vectors.reshape(-1, *like.shape),
        residuals=found.residuals,
        converged=converged & finite,
        status=jnp.where(finite, status, jnp.int32(Status.NONFINITE)),
        num_products=state.size,
    )
