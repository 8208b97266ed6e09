"""Volume growth along the probability flow: of all directions, of k, and of the k fastest."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from memjax._core.checks import check_count
from memjax._core.chunked import chunked_map
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import Status, finite_status
from memjax.diffusion._divergence import Divergence
from memjax.diffusion._trajectory import ADAPTIVE, FIXED, Stages
from memjax.diffusion.flow import FlowProfile, ProbabilityFlow
from memjax.linalg.lanczos import eigsh
from memjax.linalg.probes import orthonormal

_NO_DIVERGENCE = Divergence(None, 0, 1)


class VolumeGrowth(NamedTuple):
    """How much the flow stretched volume at a point, and how well that is known.

    Attributes:
        log_volume: L = log |det dx(sigma1)/dx(sigma0)|, in nats.
        ceiling: d log(sigma1/sigma0), what a point stored alone reaches.
        normalized: ``log_volume / ceiling``, at most 1 for an exact score; above it the score is
            not one. Not clipped.
        rate: ``log_volume / log(sigma1/sigma0)``: the mean of d - d_eff over log sigma.
        solver_error: largest distance along the way from the log volume of a coarser solution
            (see ``volume_growth``), in nats; None if it was not asked for.
        standard_error: of ``log_volume``, from the probes (see ``Flow``).
        profile: log volume and d_eff level by level.
        point: x(sigma1).
        status: a ``Status``: that of the flow, or ``NOT_CONVERGED`` if an adaptive solver's
            coarser solution is farther away than 100 ``tol`` nats per dimension.
        cost: network products used, those of the coarser solution included.
    """

    log_volume: Float[Array, ""]
    ceiling: Float[Array, ""]
    normalized: Float[Array, ""]
    rate: Float[Array, ""]
    solver_error: Float[Array, ""] | None
    standard_error: Float[Array, ""]
    profile: FlowProfile
    point: Float[Array, "..."]
    status: Int[Array, ""]
    cost: Cost


def volume_growth(
    flow: ProbabilityFlow, *, solver_error: bool = True
) -> Callable[..., VolumeGrowth]:
    """Log volume growth L of a flow at a point, relative to its ceiling, with two error bars.

        L = log |det dx(sigma1)/dx(sigma0)| = integral of (d - d_eff) over log sigma
        ceiling = d log(sigma1/sigma0),    normalized = L / ceiling, in (-inf, 1] for exact scores

    An image whose neighborhood fills more of the noise is drawn more often: 1 is a point stored
    alone at every level passed, less one with neighbors. The complement is the mean share of
    directions that the model leaves free, d_eff / d. It does not tell a stored image from one
    that is merely simple (smooth, empty): compare with a model of other data, or with the
    unconditional branch (``log_likelihood_ratio``).

    Args:
        flow: made by ``probability_flow`` with a ``divergence``. It starts at its sigma0, where
            noisy points, not clean ones, are typical: state which were taken. Towards data L and
            the ceiling are negative and their quotient is the same.
        solver_error: solve again more coarsely, an adaptive solver with 10 ``tol``, a fixed rule
            with half the steps (of an even number), and return the largest distance over the
            levels of the profile. It estimates the error of the coarser solution, as a rule
            several times that of L. Probes are shared, so that they do not enter.

    Returns:
        A function ``(x, key=None) -> VolumeGrowth`` of one point; the key for a stochastic
        divergence.

    Raises:
        InputError: the flow follows no volume, or its number of steps cannot be halved.

    Cost: that of the flow, and about half again for ``solver_error``.

    >>> import jax.numpy as jnp
    >>> from memjax.diffusion import probability_flow
    >>> score = lambda x, s, c=None: -x / s**2  # one stored point
    >>> flow = probability_flow(score, 0.1, 1.0, divergence="exact", solver="rk4")
    >>> out = volume_growth(flow)(jnp.array([0.1, 0.2]))
    >>> float(out.normalized.round(4)), int(out.status)
    (1.0, 0)

    References:
        Hasegawa and Yasuda (2025), arXiv:2503.19429 (the quantity, see ``volume_growth_edges``);
        Song et al. (2021), arXiv:2011.13456, Appendix D.2 (the integral).
    """
    plan = flow.plan
    if plan.divergence.method is None:
        raise InputError("flow: expected one made with a divergence, got divergence=None")
    adaptive = plan.solver in ADAPTIVE
    if adaptive:
        plan = plan._replace(tol=10 * plan.tol)
    elif solver_error:
        if plan.num_steps % 2:
            raise InputError(
                "flow: expected an even num_steps, to be halved for solver_error, "
                f"got {plan.num_steps}"
            )
        plan = plan._replace(num_steps=plan.num_steps // 2)
    coarser = flow.with_plan(plan._replace(dense=False, rates=False))

    def growth(x: Float[Array, "..."], key: PRNGKeyArray | None = None) -> VolumeGrowth:
        out = flow(x, key)
        assert out.log_volume is not None
        assert out.standard_error is not None
        assert out.profile
        log_ratio = flow.log_ratio.astype(x.dtype)
        ceiling = x.size * log_ratio
        status, cost, distance = out.status, out.cost, None
        if solver_error:
            other = coarser.trajectory(x, key)
            assert other.nodes is not None
            finer = out.profile.log_volumes if adaptive else out.profile.log_volumes[::2]
            distance = jnp.max(jnp.abs(finer - jnp.mean(other.nodes.growths, axis=1)))
            distance = jnp.where(jnp.isfinite(distance), distance, jnp.inf)
            cost = cost.plus(coarser.cost(x.size, other.evaluations))
            if adaptive:
                apart = (status == Status.OK) & (distance > 100 * flow.plan.tol * x.size)
                status = jnp.where(apart, jnp.int32(Status.NOT_CONVERGED), status)
        return VolumeGrowth(
            out.log_volume,
            ceiling,
            out.log_volume / ceiling,
            out.log_volume / log_ratio,
            distance,
            out.standard_error,
            out.profile,
            out.point,
            status,
            cost,
        )

    return growth


class FrameGrowth(NamedTuple):
    """How the flow stretched the volume of a frame of k directions.

    Attributes:
        log_volume: (1/2) log det(Q^T F^T F Q), F = dx(sigma1)/dx(sigma0), Q the frame, in nats:
            the sum of ``log_stretches``.
        log_stretches: accumulated log R_ii; the first j sum to the growth of the first j
            directions of the frame.
        frame: the frame after the last step, orthonormal rows.
        point: x(sigma1).
        status: ``OK``, or ``NONFINITE``.
        cost: network products used.
    """

    log_volume: Float[Array, ""]
    log_stretches: Float[Array, " k"]
    frame: Float[Array, "k ..."]
    point: Float[Array, "..."]
    status: Int[Array, ""]
    cost: Cost


def volume_growth_frame(flow: ProbabilityFlow, k: int) -> Callable[..., FrameGrowth]:
    """Log volume growth of k random directions, by QR factorizations of tangents (Benettin).

    The rows of an orthonormal frame are carried through every step by its derivative and made
    orthonormal again, V = Q R: the sum of log R_ii is the log volume growth of the frame, that of
    the discrete flow exactly; for k = d it is log |det|, whatever the frame.

    For k < d it depends on the frame, and is below the growth of the k fastest directions
    (``volume_growth_top``). The accumulated log R_ii over log(sigma1/sigma0) would converge, as
    that grows without bound, to the k largest Lyapunov exponents in descending order; over the
    finite range of a diffusion model they are not the singular values of F, only ordered towards
    them. Compare images by one key, hence one frame.

    Args:
        flow: made by ``probability_flow`` with a fixed rule ("heun" or "rk4").
        k: number of directions, 1 <= k <= d. Static.

    Returns:
        A function ``(x, key) -> FrameGrowth`` of one point; the frame (uniformly distributed) is
        drawn from the key.

    Raises:
        InputError: the flow's solver is adaptive, or k is out of range.

    Accuracy: of the rule's order. Cost: per evaluation of the rule one forward and k jvps, per
    step ``O(d k^2)`` operations.

    References:
        Benettin, Galgani, Giorgilli, Strelcyn (1980), Meccanica 15, doi:10.1007/BF02128236 and
        doi:10.1007/BF02128237; Oseledets (1968) (what it converges to).
    """
    if flow.plan.solver not in FIXED:
        raise InputError(
            f"flow: expected a fixed rule, {' or '.join(FIXED)}, got solver={flow.plan.solver!r}"
        )
    check_count("k", k, 1)

    def growth(x: Float[Array, "..."], key: PRNGKeyArray) -> FrameGrowth:
        check_count("k", k, 1, x.size)
        frame = orthonormal(key, k, x) / x.size**0.5
        point, frame, log_stretches = _carry_frame(flow, x, frame)
        log_volume = jnp.sum(log_stretches)
        used = flow.plan.num_steps * len(FIXED[flow.plan.solver].b)
        return FrameGrowth(
            log_volume,
            log_stretches,
            frame,
            point,
            finite_status(point, log_volume),
            Cost(jnp.int32(used), jnp.int32(k * used), jnp.int32(0)),
        )

    return growth


@jax.jit
def _carry_frame(
    flow: ProbabilityFlow, x: Float[Array, "..."], frame: Float[Array, "k ..."]
) -> tuple[Float[Array, "..."], Float[Array, "k ..."], Float[Array, " k"]]:
    field = flow.field(x, None, _NO_DIVERGENCE)
    plan = flow.plan
    stages = FIXED[plan.solver].stages(
        field.levels(plan.num_steps)[:-1], field.log_ratio / plan.num_steps
    )

    def advance(x: Array, stages: Stages) -> Array:
        def evaluate(carry, stage):
            total, slope = carry
            slope, _ = field(stage.sigma, x + stage.reach * slope)
            return (total + stage.weight * slope, slope), None

        return jax.lax.scan(evaluate, (x, jnp.zeros_like(x)), stages)[0][0]

    def step(carry, stages):
        x, frame, log_stretches = carry
        x, push = jax.linearize(lambda x: advance(x, stages), x)
        moved = chunked_map(push, frame, chunk_size=plan.divergence.chunk_size)
        flat = moved.reshape(len(frame), -1)
        finite = jnp.all(jnp.isfinite(flat))
        q, r = jnp.linalg.qr(jnp.where(finite, flat, 0).T)
        stretches = jnp.where(finite, jnp.diagonal(r), jnp.nan)
        rows = q.T * jnp.where(stretches < 0, -1, 1).astype(x.dtype)[:, None]
        return (x, rows.reshape(frame.shape), log_stretches + jnp.log(jnp.abs(stretches))), None

    return jax.lax.scan(step, (x, frame, jnp.zeros(len(frame), x.dtype)), stages)[0]


class TopGrowth(NamedTuple):
    """How the flow stretched its k fastest directions.

    Attributes:
        log_volume: the sum of ``log_stretches``, in nats: the largest growth of any k directions.
        log_stretches: logarithms of the k largest singular values of F = dx(sigma1)/dx(sigma0),
            descending. Over log(sigma1/sigma0) they are the finite-time Lyapunov exponents, at
            most 1 for exact scores.
        errors: bounds on the error of each, of the eigenvalue solver alone.
        extreme: it was established that no larger one is missing (see ``eigsh``).
        directions: what is stretched so: orthonormal right singular vectors, at x.
        point: x(sigma1).
        status: a ``Status``: that of the flow, else that of ``eigsh``.
        cost: network products used.
    """

    log_volume: Float[Array, ""]
    log_stretches: Float[Array, " k"]
    errors: Float[Array, " k"]
    extreme: Bool[Array, ""]
    directions: Float[Array, "k ..."]
    point: Float[Array, "..."]
    status: Int[Array, ""]
    cost: Cost


def volume_growth_top(
    flow: ProbabilityFlow, k: int, *, tol: float = 1e-3, max_products: int | None = None
) -> Callable[..., TopGrowth]:
    """Log volume growth of the k directions that grow most: finite-time Lyapunov exponents.

    The whole flow is linearized once, F = dx(sigma1)/dx(sigma0), and Lanczos finds the k largest
    eigenvalues of F^T F, the squares of the singular values of F.

    Args:
        flow: made by ``probability_flow``; its divergence is not used. Fixed rules are best: an
            adaptive solve (``derivative="both"``) is linearized at ``max_steps`` steps.
        k: number of directions, 1 <= k <= d. Static.
        tol: of the eigenvalues of F^T F, relative to the largest: twice that of a logarithm of
            the largest singular value. Static.
        max_products: with F^T F; by default as for ``eigsh``. Static.

    Returns:
        A function ``(x, key) -> TopGrowth`` of one point; the key draws Lanczos' first vector.

    Raises:
        InputError: k is out of range, or the flow has reverse derivatives only.

    Near a stored point all singular values agree; Lanczos finds multiple ones, at some products
    more. Memory: the linearization of every evaluation of the solve.

    Cost: one solve, and per product with F^T F a jvp and a vjp per evaluation of the solve.
    """
    check_count("k", k, 1)
    if flow.plan.solver in ADAPTIVE and flow.plan.derivative != "both":
        raise InputError(
            f"flow: expected derivatives of both modes, got derivative={flow.plan.derivative!r}"
        )
    bare = flow.with_plan(flow.plan._replace(divergence=_NO_DIVERGENCE, dense=False))

    def growth(x: Float[Array, "..."], key: PRNGKeyArray) -> TopGrowth:
        check_count("k", k, 1, x.size)

        def arrive(x):
            out = bare(x)
            return out.point, (out.status, out.cost)

        point, push, (status, cost) = jax.linearize(arrive, x, has_aux=True)
        pull = jax.linear_transpose(push, x)
        # Singular values of an exact score's flow towards noise are at most sigma1/sigma0.
        log_scale = flow.log_ratio.astype(x.dtype)
        shrink = jnp.exp(-log_scale)

        def matvec(v):
            (out,) = pull(shrink * push(v))
            return shrink * out

        pairs = eigsh(matvec, x, key, k, tol=tol, max_products=max_products)
        log_stretches = jnp.log(pairs.values) / 2 + log_scale
        errors = jnp.log1p(pairs.residuals / pairs.values) / 2
        used = pairs.num_products * cost.forward
        return TopGrowth(
            jnp.sum(log_stretches),
            log_stretches,
            errors,
            pairs.extreme,
            pairs.vectors,
            point,
            jnp.where(status == Status.OK, pairs.status, status),
            cost.plus(Cost(0, used, used)),
        )

    return growth
