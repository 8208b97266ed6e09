"""Extreme eigenpairs of a symmetric operator: Lanczos, thick restart, and what is certain."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from memjax._core.checks import check_count
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.linalg._krylov import (
    any_lane,
    check_krylov,
    length,
    matmul,
    orthogonalize,
    product_noise,
)
from memjax.linalg._operator import Matvec

Draw = Callable[[], Float[Array, "b d"]]

FAILURE_PROBABILITY = 1e-6
"""Of a missed eigenvalue where ``extreme`` says that none was (over the random vectors drawn)."""


class Eigenpairs(NamedTuple):
    """Eigenpairs of a symmetric operator A, the most extreme first.

    Attributes:
        values: Ritz values theta; descending for "largest", ascending for "smallest" and "both".
        vectors: Ritz vectors y, orthonormal, stacked along the first axis.
        residuals: bounds on |A y - theta y|. An eigenvalue of A lies within ``residuals[i]`` of
            ``values[i]``, and the error is of order residual^2 / gap.
        converged: residual within the tolerance.
        extreme: true only if it was established that no eigenvalue is missing among the k: the
            whole space was searched, or what a fresh random vector finds in the complement leaves
            no room for one. False means "not established".
        status: ``OK`` (all converged), ``BREAKDOWN`` (all converged, and a Krylov space closed),
            ``NOT_CONVERGED`` (budget used up; ``converged`` says which are) or ``NONFINITE``.
        num_products: products with A.
    """

    values: Float[Array, " k"]
    vectors: Float[Array, "k ..."]
    residuals: Float[Array, " k"]
    converged: Bool[Array, " k"]
    extreme: Bool[Array, ""]
    status: Int[Array, ""]
    num_products: Int[Array, ""]


class _Plan(NamedTuple):
    """The static choices of one call."""

    d: int
    k: int
    which: str
    tol: float
    basis_size: int
    keep: int
    restarts: bool
    block_size: int
    max_products: int
    verify: int
    noise: float

    @property
    def closure(self) -> float:
        """Remainder, relative to |A|, at which a Krylov space counts as closed."""
        return max(self.noise, 0.1 * self.tol)

    @property
    def num_high(self) -> int:
        """How many of the k are at the upper end."""
        return {"largest": self.k, "smallest": 0, "both": (self.k + 1) // 2}[self.which]


class _State(NamedTuple):
    """A V^T = V^T T + Q^T C + E with orthonormal rows V and Q, and columns of E below ``dropped``.

    The basis V has ``size`` slots in use, some of them ``valid`` (the others are zero). Q is the
    block to be multiplied next; ``theta`` and ``ritz`` are the eigenpairs of T, unused slots last.

    After a Krylov space has closed, or when what has converged is to be verified, the search goes
    on from random vectors in the complement: ``probing``, until ``deadline`` (in products) at the
    latest. ``steps`` counts the blocks multiplied since then and before a restart; ``reference``
    are the selected values at the beginning of it.
    """

    basis: Float[Array, "m d"]
    valid: Bool[Array, " m"]
    size: Int[Array, ""]
    projected: Float[Array, "m m"]
    block: Float[Array, "b d"]
    coupling: Float[Array, "b m"]
    dropped: Float[Array, " m"]
    theta: Float[Array, " m"]
    ritz: Float[Array, "m m"]
    norm: Float[Array, ""]
    lowest: Float[Array, ""]
    highest: Float[Array, ""]
    num_products: Int[Array, ""]
    closed: Bool[Array, ""]
    exactly: Bool[Array, ""]
    ever_closed: Bool[Array, ""]
    probing: Bool[Array, ""]
    verifying: Bool[Array, ""]
    relock: Bool[Array, ""]
    restarted: Bool[Array, ""]
    steps: Int[Array, ""]
    deadline: Int[Array, ""]
    reference: Float[Array, " k"]
    extreme: Bool[Array, ""]
    nonfinite: Bool[Array, ""]
    done: Bool[Array, ""]


class _Selection(NamedTuple):
    """The k most extreme Ritz pairs of a state, in the order of ``_inwards``."""

    values: Float[Array, " k"]
    coefficients: Float[Array, "k m"]
    residuals: Float[Array, " k"]
    converged: Bool[Array, " k"]


def eigsh(
    matvec: Matvec,
    like: Float[Array, "..."],
    key: PRNGKeyArray,
    k: int,
    *,
    which: str = "largest",
    tol: float | None = None,
    max_products: int | None = None,
    basis_size: int | None = None,
    block_size: int = 1,
    start: Float[Array, "..."] | None = None,
    verify: int = 0,
) -> Eigenpairs:
    """Extreme eigenpairs of a symmetric operator by thick-restart Lanczos.

    Rayleigh-Ritz on a Krylov space with full (twice) reorthogonalization: with V the orthonormal
    basis, T = V A V^T, T z = theta z and y = V^T z, the residual |A y - theta y| is known from T
    and the last remainder, without another product. It stops as soon as all k residuals are
    within the tolerance; in a vmapped batch each lane stops counting by itself.

    A remainder of the size of rounding is an answer: the Krylov space has closed, and its pairs
    are exact. (One below a tenth of the tolerance closes it too; what is dropped is kept in the
    residuals.) The search then goes on from a random vector in the complement until nothing new
    appears among the k, so multiple eigenvalues are found as often as they occur, low-rank
    operators give no ghosts, and the identity is as good an operator as any other.

    A single Krylov space cannot see whether an eigenvalue is double, so convergence alone does
    not prove that the k pairs are the k extreme ones. ``extreme`` says when it is proven: the
    space is exhausted; or a Krylov space in the complement closed without improving on the k;
    or (``verify``) i products from a random vector in the complement left its largest Ritz value
    a fraction e of the spectrum's width below the k-th, and the bound of Kuczynski and
    Wozniakowski 1.648 sqrt(d) exp(-(2i - 1) sqrt(e)) on the probability of a missed one is below
    1e-6. A gap of a tenth of the width takes about 30 products, of a hundredth about 90; inside a
    cluster it is never established.

    Args:
        matvec: v -> A v on arrays of one shape (any rank), A symmetric, traceable. Of a matrix
            that is not, this uses inconsistent products: symmetrize first
            (``Linearization.symmetric``).
        like: an array of that shape and dtype (float32 or float64); its values are not used.
        key: for the start, and for the fresh vectors after a breakdown.
        k: number of pairs, 1 <= k <= d. Static.
        which: "largest" or "smallest" (algebraically) or "both" ends (one more of the largest if
            k is odd). Static.
        tol: a pair has converged when its residual is below ``tol * |A|``, |A| estimated by the
            largest Ritz value; by default the square root of the machine epsilon. With 0 the
            budget is used up (unless the space closes). Static.
        max_products: budget; by default ten times ``basis_size``. Static.
        basis_size: vectors kept before a restart; by default min(d, max(64, 2 k + 20)). A basis
            of ``max_products`` never restarts and needs the fewest products; memory is
            ``basis_size`` times that of ``like``. Static.
        block_size: vectors multiplied together; several see multiplicities at once and use a
            batched operator better, at some more products. Static.
        start: first vector, shaped like ``like``, or ``block_size`` of them stacked; random by
            default.
        verify: products that may be spent after convergence to establish ``extreme``. Static.

    Returns:
        ``Eigenpairs``.

    Raises:
        InputError: ``like`` is not float32 or float64, A v differs from v in shape or dtype, k or a
            size is out of range, ``which`` is unknown, or the budget cannot hold k pairs.

    Without raising: a NaN or infinite product ends the run with ``NONFINITE`` and NaN values; an
    exhausted budget gives ``NOT_CONVERGED`` with valid residuals.

    Accuracy and cost: eigenvalues to residual^2 / gap; ``num_products`` products, and per product
    about 8 m d operations and one eigenproblem of size m = ``basis_size``.

    >>> import jax, jax.numpy as jnp
    >>> pairs = eigsh(lambda v: jnp.array([3.0, 3.0, 1.0]) * v, jnp.zeros(3), jax.random.key(0), 2)
    >>> pairs.values.round(4).tolist(), bool(pairs.extreme)
    ([3.0, 3.0], True)

    References:
        Wu and Simon (2000), Thick-restart Lanczos, doi:10.1137/S0895479898334605. Giraud, Langou
        and Rozloznik (2005), doi:10.1007/s00211-005-0615-4. Kuczynski and Wozniakowski (1992),
        Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start,
        doi:10.1137/0613066, theorem 4.2.
    """
    check_krylov(matvec, like)
    plan = _make_plan(like, k, which, tol, max_products, basis_size, block_size, verify)
    first = _start_block(like, start, key, plan)

    def product(v):
        return matvec(v.reshape(like.shape)).reshape(-1)

    def products(block):
        return product(block[0])[None] if plan.block_size == 1 else jax.vmap(product)(block)

    def draw(count):
        fresh_key = derive_key(key, "fresh", count)
        return lambda: jax.random.normal(fresh_key, first.shape, first.dtype)

    def unfinished(state: _State):
        return ~state.done & (state.num_products + plan.block_size <= plan.max_products)

    def step(state: _State):
        fresh = draw(state.num_products)
        if plan.restarts:
            full = state.size + plan.block_size > plan.basis_size
            state = jax.lax.cond(
                full | state.relock, lambda s: _restart(s, fresh, plan), lambda s: s, state
            )
        return _decide(_expand(state, products(state.block), fresh, plan), plan)

    state = jax.lax.while_loop(unfinished, step, _initial(first, draw(plan.max_products), plan))
    return _report(state, like, plan)


def _make_plan(like, k, which, tol, max_products, basis_size, block_size, verify) -> _Plan:
    """Fill in the defaults and refuse what cannot work."""
    d = like.size
    check_count("k", k, 1, d)
    check_count("block_size", block_size, 1, d)
    check_count("verify", verify, 0)
    if which not in ("largest", "smallest", "both"):
        raise InputError(f'which: expected "largest", "smallest" or "both", got {which!r}')
    tol = float(jnp.finfo(like.dtype).eps) ** 0.5 if tol is None else float(tol)
    if not tol >= 0:
        raise InputError(f"tol: expected a number >= 0, got {tol}")
    smallest = min(d, k + block_size)
    if basis_size is None:
        basis_size = max(64, 2 * k + 20, smallest)
    check_count("basis_size", basis_size, smallest)
    if max_products is None:
        max_products = 10 * basis_size
    check_count("max_products", max_products // block_size * block_size, k)
    # Slots come in blocks, and no more of them are used than there are dimensions or products.
    whole = -(-d // block_size) * block_size
    budget = max(max_products // block_size * block_size, k + block_size)
    restarts = basis_size < min(whole, budget)
    basis_size = min(basis_size, whole, budget)
    keep = min(k + (basis_size - k) // 2, basis_size - block_size) if restarts else k
    return _Plan(
        d=d,
        k=k,
        which=which,
        tol=tol,
        basis_size=basis_size,
        keep=keep,
        restarts=restarts or verify > 0,
        block_size=block_size,
        max_products=max_products,
        verify=verify,
        noise=product_noise(like),
    )


def _start_block(like, start, key, plan: _Plan) -> Float[Array, "b d"]:
    """The caller's start or a random one, flat."""
    if start is None:
        shape = (plan.block_size, plan.d)
        return jax.random.normal(derive_key(key, "start"), shape, like.dtype)
    block_shape = (plan.block_size, *like.shape)
    one = start.shape == like.shape and plan.block_size == 1
    if start.dtype != like.dtype or not (one or start.shape == block_shape):
        expected = f"{like.dtype}{list(like.shape if plan.block_size == 1 else block_shape)}"
        raise InputError(f"start: expected {expected}, got {start.dtype}{list(start.shape)}")
    return start.reshape(plan.block_size, plan.d)


class _Block(NamedTuple):
    """Orthonormal rows (zero where there is no room), with ``vectors = coupling^T rows``.

    The columns of ``deficient`` vectors are missing from that: those were replaced, and had the
    ``lengths`` left.
    """

    rows: Float[Array, "b d"]
    coupling: Float[Array, "b b"]
    deficient: Bool[Array, " b"]
    lengths: Float[Array, " b"]


def _orthonormal_block(
    vectors: Float[Array, "b d"],
    fresh: Draw,
    basis: Float[Array, "m d"],
    threshold: Float[Array, " b"],
    room: Int[Array, ""],
) -> _Block:
    """Orthonormalize a block that is orthogonal to the basis; replace what has no direction.

    Args:
        vectors: remainders, orthogonal to the rows of ``basis``.
        fresh: draws random vectors to take the place of those up to ``threshold``.
        basis: orthonormal rows and zeros.
        threshold: length up to which a remainder is rounding.
        room: dimensions left in the complement of the basis.
    """
    plain = _gram_schmidt(vectors, jnp.zeros_like(vectors), threshold, room)

    def with_fresh():
        outside = jax.vmap(lambda v: orthogonalize(basis, v)[0])(fresh())
        return _gram_schmidt(vectors, outside, threshold, room)

    # Drawing costs more than all the rest, and is rarely needed.
    return jax.lax.cond(any_lane(jnp.any(plain.deficient)), with_fresh, lambda: plain)


def _gram_schmidt(
    vectors: Float[Array, "b d"],
    others: Float[Array, "b d"],
    threshold: Float[Array, " b"],
    room: Int[Array, ""],
) -> _Block:
    """One vector after the other, ``others`` in the place of those up to ``threshold``."""
    b = len(vectors)
    rows = jnp.zeros_like(vectors)
    coupling = jnp.zeros((b, b), vectors.dtype)
    deficient, lengths = [], []
    for i in range(b):
        rest, along = orthogonalize(rows, vectors[i])
        remainder = length(rest)
        lacks = ~(remainder > threshold[i])
        chosen = jnp.where(lacks, orthogonalize(rows, others[i])[0], rest)
        size = length(chosen)
        inside = (i < room) & (size > 0)
        rows = rows.at[i].set(jnp.where(inside, chosen / jnp.where(size > 0, size, 1), 0))
        coupling = coupling.at[:, i].set(along.at[i].set(jnp.where(lacks, 0, remainder)))
        deficient.append(lacks)
        lengths.append(remainder)
    return _Block(rows, coupling, jnp.stack(deficient), jnp.stack(lengths))


def _initial(first: Float[Array, "b d"], fresh: Draw, plan: _Plan) -> _State:
    """An empty basis, and the start as the first block."""
    m, b, dtype = plan.basis_size, plan.block_size, first.dtype
    lengths = jax.vmap(length)(first)
    nonfinite = ~jnp.all(jnp.isfinite(lengths))
    empty = jnp.zeros((m, plan.d), dtype)
    block = _orthonormal_block(first, fresh, empty, 0 * lengths, jnp.int32(plan.d)).rows
    zero, no, none = jnp.zeros((), dtype), jnp.asarray(False), jnp.int32(0)
    return _State(
        basis=empty,
        valid=jnp.zeros(m, bool),
        size=none,
        projected=jnp.zeros((m, m), dtype),
        block=block,
        coupling=jnp.zeros((b, m), dtype),
        dropped=jnp.zeros(m, dtype),
        theta=jnp.zeros(m, dtype),
        ritz=jnp.eye(m, dtype=dtype),
        norm=zero,
        lowest=zero + jnp.inf,
        highest=zero - jnp.inf,
        num_products=none,
        closed=no,
        exactly=no,
        ever_closed=no,
        probing=no,
        verifying=no,
        relock=no,
        restarted=no,
        steps=none,
        deadline=none,
        reference=jnp.full(plan.k, jnp.nan, dtype),
        extreme=no,
        nonfinite=nonfinite,
        done=nonfinite,
    )


def _expand(state: _State, products: Float[Array, "b d"], fresh: Draw, plan: _Plan) -> _State:
    """Take the block into the basis, its products into T, their remainders as the next block."""
    b, size = plan.block_size, state.size
    finite = jnp.all(jnp.isfinite(products))
    products = jnp.where(finite, products, 0)
    basis = jax.lax.dynamic_update_slice(state.basis, state.block, (size, jnp.int32(0)))
    present = jnp.any(state.block != 0, axis=1)
    valid = jax.lax.dynamic_update_slice(state.valid, present, (size,))
    projected, remainders = state.projected, []
    for i in range(b):
        rest, column = orthogonalize(basis, products[i])
        projected = projected.at[size + i, :].set(column).at[:, size + i].set(column)
        remainders.append(rest)
    norm = jnp.maximum(state.norm, jnp.max(jax.vmap(length)(products)))
    num_valid = jnp.sum(valid, dtype=jnp.int32)
    rows, triangle, deficient, lengths = _orthonormal_block(
        jnp.stack(remainders),
        fresh,
        basis,
        jnp.full(b, plan.closure, norm.dtype) * norm,
        plan.d - num_valid,
    )
    at = (jnp.int32(0), size)
    coupling = jax.lax.dynamic_update_slice(jnp.zeros_like(state.coupling), triangle, at)
    lost = jnp.where(deficient, lengths, 0)
    theta, ritz = _eigh(projected, valid)
    return state._replace(
        basis=basis,
        valid=valid,
        size=size + b,
        projected=projected,
        block=rows,
        coupling=coupling,
        dropped=jax.lax.dynamic_update_slice(state.dropped, lost, (size,)),
        theta=theta,
        ritz=ritz,
        norm=norm,
        lowest=jnp.minimum(state.lowest, theta[0]),
        highest=jnp.maximum(state.highest, theta[num_valid - 1]),
        num_products=state.num_products + jnp.sum(present, dtype=jnp.int32),
        closed=jnp.all(deficient),
        exactly=jnp.all(lengths <= plan.noise * norm),
        nonfinite=~finite,
        steps=jnp.where(state.restarted, state.steps, state.steps + 1),
    )


def _eigh(projected: Float[Array, "m m"], valid: Bool[Array, " m"]):
    """Eigenpairs of the valid part, ascending; unused slots come after, as unit vectors."""
    used = valid[:, None] & valid[None, :]
    inner = jnp.where(used, projected, 0)
    bound = jnp.max(jnp.sum(jnp.abs(inner), axis=1))
    sentinel = jnp.where(bound > 0, 2 * bound, 1)
    return jnp.linalg.eigh(inner + jnp.diag(jnp.where(valid, 0, sentinel)), symmetrize_input=True)


def _inwards(num_valid: Int[Array, ""], count: int, plan: _Plan) -> Int[Array, " count"]:
    """Positions of the ``count`` most extreme values, alternating from the top for "both"."""
    i = jnp.arange(count, dtype=jnp.int32)
    if plan.which == "largest":
        return num_valid - 1 - i
    if plan.which == "smallest":
        return i
    return jnp.where(i % 2 == 0, num_valid - 1 - i // 2, i // 2)


def _select(state: _State, plan: _Plan) -> _Selection:
    """The k most extreme pairs and their residuals |C z| + |E z|."""
    num_valid = jnp.sum(state.valid, dtype=jnp.int32)
    order = _inwards(num_valid, plan.k, plan)
    coefficients = state.ritz[:, order].T
    ahead = jax.vmap(length)(matmul(coefficients, state.coupling.T))
    residuals = ahead + matmul(jnp.abs(coefficients), state.dropped)
    scale = jnp.maximum(jnp.abs(state.theta[0]), jnp.abs(state.theta[num_valid - 1]))
    small = residuals <= jnp.maximum(plan.tol * scale, plan.noise * state.norm)
    return _Selection(state.theta[order], coefficients, residuals, small & (num_valid >= plan.k))


def _decide(state: _State, plan: _Plan) -> _State:
    """Stop, go on, or look into the complement."""
    selection = _select(state, plan)
    num_valid = jnp.sum(state.valid, dtype=jnp.int32)
    enough = num_valid >= plan.k
    converged = jnp.all(selection.converged)
    exhausted = num_valid >= plan.d
    closed = state.closed & ~exhausted
    # NaN reference: nothing to compare with, hence changed.
    alike = 10 * jnp.where(state.exactly, plan.noise, plan.closure) * state.norm
    same = jnp.abs(selection.values - state.reference) <= alike
    changed = ~jnp.all(same)

    settled = closed & state.probing & enough & ~changed
    certain = state.probing & converged & ~changed & _no_room(state, selection, plan)
    late = state.num_products >= state.deadline
    content = converged & ~closed & jnp.where(state.probing, late, plan.verify == 0)
    done = exhausted | settled | certain | content | state.nonfinite

    inject = closed & ~done
    relock = ~done & ~closed & converged & (plan.verify > 0)
    relock = relock & (~state.probing | (state.verifying & changed))
    anew = inject | relock
    patience = jnp.where(
        inject,
        2 * state.num_products + 10 * plan.block_size,
        jnp.where(state.verifying, state.deadline, state.num_products + plan.verify),
    )
    return state._replace(
        ever_closed=state.ever_closed | closed,
        probing=state.probing | anew,
        verifying=(state.verifying & ~inject) | relock,
        relock=relock,
        restarted=state.restarted & ~anew,
        steps=jnp.where(anew, 0, state.steps),
        deadline=jnp.where(anew, patience, state.deadline),
        reference=jnp.where(anew & enough, selection.values, state.reference),
        extreme=exhausted | (settled & state.exactly) | certain,
        done=done,
    )


def _no_room(state: _State, selection: _Selection, plan: _Plan) -> Bool[Array, ""]:
    """Whether another eigenvalue beyond the k is too improbable to be feared.

    With i products from a random vector, Lanczos misses the largest eigenvalue of an operator by
    more than a fraction e of its spectrum's width with probability below
    1.648 sqrt(d) exp(-(2i - 1) sqrt(e)). The operator is A on the complement of the k pairs, its
    largest Ritz value the (k+1)-th, and e what lies between that and the k-th.
    """
    num_valid = jnp.sum(state.valid, dtype=jnp.int32)
    num_low = plan.k - plan.num_high
    gaps = []
    if plan.num_high:
        inner = num_valid - 1 - plan.num_high
        gaps.append(state.theta[inner + 1] - state.theta[inner])
    if num_low:
        gaps.append(state.theta[num_low] - state.theta[num_low - 1])
    gap = jnp.min(jnp.stack(gaps)) - jnp.max(selection.residuals)
    width = 1.1 * (state.highest - state.lowest)  # Ritz values lie inside the spectrum
    share = jnp.clip(gap / jnp.where(width > 0, width, 1), 0, 1)
    needed = float(np.log(1.648 * plan.d**0.5 / FAILURE_PROBABILITY))
    products = (2 * state.steps - 1).astype(share.dtype)
    return (num_valid > plan.k) & (jnp.sqrt(share) * products >= needed)


def _restart(state: _State, fresh: Draw, plan: _Plan) -> _State:
    """Keep the most extreme Ritz vectors only; to verify, just the k, and start afresh."""
    m, keep = plan.basis_size, plan.keep
    num_valid = jnp.sum(state.valid, dtype=jnp.int32)
    count = jnp.minimum(jnp.where(state.relock, plan.k, keep), num_valid)
    held = jnp.arange(m, dtype=jnp.int32) < count
    order = _inwards(num_valid, keep, plan)
    coefficients = jnp.where(held[:keep, None], state.ritz[:, order].T, 0)
    coefficients = jnp.pad(coefficients, ((0, m - keep), (0, 0)))
    values = jnp.pad(state.theta[order], (0, m - keep))
    basis = matmul(coefficients, state.basis)
    coupling = matmul(state.coupling, coefficients.T)
    dropped = matmul(jnp.abs(coefficients), state.dropped)
    room = plan.d - count
    nothing = jnp.zeros_like(state.block)
    block = _orthonormal_block(nothing, fresh, basis, nothing[:, 0], room).rows
    ahead = jax.vmap(length)(coupling.T)
    return state._replace(
        basis=basis,
        valid=held,
        size=count,
        projected=jnp.diag(jnp.where(held, values, 0)),
        block=jnp.where(state.relock, block, state.block),
        coupling=jnp.where(state.relock, 0, coupling),
        dropped=jnp.where(state.relock, dropped + ahead, dropped),
        relock=jnp.asarray(False),
        restarted=state.probing & ~state.relock,
    )


def _report(state: _State, like: Float[Array, "..."], plan: _Plan) -> Eigenpairs:
    """The selected pairs of the last state, in their final order."""
    selection = _select(state, plan)
    values, coefficients, residuals, converged = selection
    if plan.which == "both":
        order = jnp.argsort(values)
        values, coefficients = values[order], coefficients[order]
        residuals, converged = residuals[order], converged[order]
    vectors = matmul(coefficients, state.basis).reshape(plan.k, *like.shape)
    residuals = residuals + plan.noise * state.norm
    status = jnp.where(jnp.all(converged), Status.OK, Status.NOT_CONVERGED)
    status = jnp.where(jnp.all(converged) & state.ever_closed, Status.BREAKDOWN, status)
    status = jnp.where(state.nonfinite, Status.NONFINITE, status).astype(jnp.int32)
    lost = state.nonfinite
    return Eigenpairs(
        values=jnp.where(lost, jnp.nan, values),
        vectors=jnp.where(lost, jnp.nan, vectors),
        residuals=jnp.where(lost, jnp.nan, residuals),
        converged=converged & ~lost,
        extreme=state.extreme & ~lost,
        status=status,
        num_products=state.num_products,
    )
