"""The probability flow of a score: where a point goes as noise grows or shrinks, and its volume."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from memjax._core.checks import check_count, check_positive
from memjax._core.cost import Cost, Count
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.diffusion._divergence import Divergence, Rates, mean_error
from memjax.diffusion._trajectory import (
    ADAPTIVE,
    ADJOINTS,
    FIXED,
    Field,
    Nodes,
    Plan,
    Trajectory,
    solve,
)
from memjax.diffusion.adapters import Scalar, callable_pytree
from memjax.diffusion.combine import Score


class FlowProfile(NamedTuple):
    """A trajectory at noise levels evenly spaced in log sigma, both ends included.

    Attributes:
        sigmas: the levels, in the order in which they are passed.
        log_volumes: log volume growth from the first level to each, in nats. Differences are the
            growth between any two levels. NaN beyond the point where the solver gave up.
        effective_dimensions: d_eff = tr M at each.
        standard_errors: of ``effective_dimensions``, from the probes; zero for an exact trace.
    """

    sigmas: Float[Array, " n"]
    log_volumes: Float[Array, " n"]
    effective_dimensions: Float[Array, " n"]
    standard_errors: Float[Array, " n"]


class FlowPath(eqx.Module):
    """The trajectory as a function of the noise level, between its two ends; NaN beyond."""

    sigma0: Float[Array, "..."]
    log_ratio: Float[Array, "..."]
    interpolation: diffrax.DenseInterpolation

    def __call__(self, sigma: Scalar) -> Float[Array, "..."]:
        """x(sigma)."""
        s = jnp.log(jnp.asarray(sigma, self.sigma0.dtype) / self.sigma0)
        s = jnp.where(self.log_ratio < 0, -s, s)
        # The ends are met although log and exp round.
        span = jnp.abs(self.log_ratio)
        near = 8 * float(jnp.finfo(s.dtype).eps) * (1 + span)
        s = jnp.where(jnp.abs(s) < near, 0, jnp.where(jnp.abs(s - span) < near, span, s))
        return self.interpolation.evaluate(s)[0]


class Flow(NamedTuple):
    """Where the probability flow carried a point, and how it stretched volume on the way.

    Attributes:
        point: x(sigma1), in the shape of x. NaN unless ``status`` is ``OK``.
        log_volume: log |det dx(sigma1)/dx(sigma0)| in nats. NaN unless ``status`` is ``OK`` or
            ``INDEFINITE``; None where no divergence was asked for.
        standard_error: of ``log_volume``, from the probes alone: for ``"hutchinson"`` the standard
            error of the mean of the probes' own log volumes, infinite for one probe; for
            ``"hutchpp"`` and ``"xnystrace"``, whose errors along a trajectory are correlated, the
            upper bound of the integral of the standard errors of d_eff over log sigma; zero for
            ``"exact"``.
        log_volumes: each probe's own log volume for ``"hutchinson"``, whose mean is
            ``log_volume``; otherwise the one.
        profile: the trajectory level by level; None where no divergence was asked for.
        path: x as a function of sigma, if ``dense``; else None.
        num_steps: steps of the solver, accepted ones.
        num_rejected: steps tried and rejected.
        status: a ``Status``: ``NONFINITE`` if the flow met a NaN or an infinity, ``MAX_STEPS`` if
            steps ran out, in number or in size, ``INDEFINITE`` if XNysTrace met a negative
            direction of M (see ``trace_xnystrace``).
        cost: network products used; of one lane in a vmapped batch, which costs its slowest.
    """

    point: Float[Array, "..."]
    log_volume: Float[Array, ""] | None
    standard_error: Float[Array, ""] | None
    log_volumes: Float[Array, " m"] | None
    profile: FlowProfile | None
    path: FlowPath | None
    num_steps: Int[Array, ""]
    num_rejected: Int[Array, ""]
    status: Int[Array, ""]
    cost: Cost


class ProbabilityFlow(eqx.Module):
    """The map x -> ``Flow`` of a score between two noise levels; made by ``probability_flow``.

    A callable pytree: its leaves are the score's weights, the noise levels and the condition.
    """

    score: Score
    condition: PyTree
    sigma0: Float[Array, "..."]
    log_ratio: Float[Array, "..."]
    plan: Plan = eqx.field(static=True)

    def __call__(self, x: Float[Array, "..."], key: PRNGKeyArray | None = None) -> Flow:
        """Carry x from sigma0 to sigma1.

        Args:
            x: one point at sigma0, float32 or float64.
            key: for a stochastic divergence, whose probes are drawn from it once. Trajectories
                of one key share their probes, so that differences between them lose less.

        Raises:
            InputError: x is not float32 or float64, a key is missing, or s(x) is not like x.
        """
        trajectory = self.trajectory(x, key)
        ok = trajectory.status == Status.OK
        point = jnp.where(ok, trajectory.point, jnp.nan)
        path = None
        if trajectory.interpolation is not None:
            path = FlowPath(*self._levels(x), trajectory.interpolation)
        log_volumes = log_volume = standard_error = profile = None
        status = trajectory.status
        if trajectory.nodes is not None and trajectory.nodes.rates is not None:
            profile, standard_error, worst = self._profile(
                x, trajectory.growths, trajectory.nodes, trajectory.nodes.rates
            )
            log_volumes = jnp.where(ok, trajectory.growths, jnp.nan)
            log_volume = jnp.mean(log_volumes)
            standard_error = jnp.where(ok, standard_error, jnp.nan)
            status = jnp.where(ok, worst, status)
        return Flow(
            point,
            log_volume,
            standard_error,
            log_volumes,
            profile,
            path,
            trajectory.num_accepted,
            trajectory.num_rejected,
            status,
            self.cost(x.size, trajectory.evaluations),
        )

    def cost(self, d: int, evaluations: Count) -> Cost:
        """Network products of a number of evaluations in d dimensions."""
        jvp, vjp = self.plan.divergence.products(d)
        return Cost(evaluations, jvp * evaluations, vjp * evaluations)

    @property
    def num_evaluations(self) -> int | None:
        """Evaluations of a solve, where they are known beforehand: for a fixed rule."""
        if self.plan.solver not in FIXED:
            return None
        return self.plan.num_steps * len(FIXED[self.plan.solver].b) + 1

    @property
    def sigma1(self) -> Float[Array, "..."]:
        """The level reached."""
        return self.sigma0 * jnp.exp(self.log_ratio)

    def with_plan(self, plan: Plan) -> "ProbabilityFlow":
        """The same flow by other static choices."""
        return dataclasses.replace(self, plan=plan)

    def field(
        self, x: Float[Array, "..."], key: PRNGKeyArray | None, divergence: Divergence
    ) -> Field:
        """What is followed from x."""
        sigma0, log_ratio = self._levels(x)
        drawn = divergence.draw(key, x)
        return Field(self.score, self.condition, sigma0, log_ratio, drawn, divergence)

    def trajectory(self, x: Float[Array, "..."], key: PRNGKeyArray | None) -> Trajectory:
        """What ``__call__`` reports on, whole."""
        if jnp.result_type(x) not in (jnp.float32, jnp.float64):
            raise InputError(f"x: expected float32 or float64, got {jnp.result_type(x)}")
        return _solve(self, x, key)

    def _levels(self, x: Array) -> tuple[Array, Array]:
        return self.sigma0.astype(x.dtype), self.log_ratio.astype(x.dtype)

    def _profile(
        self, x: Array, growths: Array, nodes: Nodes, rates: Rates
    ) -> tuple[FlowProfile, Array, Array]:
        """The profile, the standard error of the log volume and the worst status along the way."""
        sigmas, node_growths, _ = nodes
        passed = jnp.isfinite(node_growths[:, 0])
        profile = FlowProfile(
            sigmas,
            jnp.where(passed, jnp.mean(node_growths, axis=1), jnp.nan),
            x.size - jnp.mean(rates.values, axis=1),
            rates.standard_error,
        )
        if self.plan.divergence.method == "hutchinson":
            error = mean_error(growths)
        else:
            error = jnp.abs(jnp.trapezoid(rates.standard_error, jnp.log(sigmas)))
        return profile, error, jnp.max(rates.status)


# Jitted here, not only by the caller: loops outside jit would compile anew at every call.
@jax.jit
def _solve(flow: ProbabilityFlow, x: Float[Array, "..."], key: PRNGKeyArray | None) -> Trajectory:
    return solve(flow.plan, flow.field(x, key, flow.plan.divergence), x)


def _log_ratio(sigma0: Scalar, sigma1: Scalar) -> Array:
    """log(sigma1/sigma0): in double precision where both are numbers, which are checked."""
    for name, sigma in (("sigma0", sigma0), ("sigma1", sigma1)):
        check_positive(name, sigma)
    arrays = [sigma for sigma in (sigma0, sigma1) if isinstance(sigma, jax.Array)]
    if arrays:
        dtype = jnp.result_type(*arrays)
        return jnp.log(jnp.asarray(sigma1, dtype)) - jnp.log(jnp.asarray(sigma0, dtype))
    if sigma0 == sigma1:
        raise InputError(f"sigma1: expected another noise level than sigma0, got {sigma1}")
    return jnp.asarray(math.log(sigma1) - math.log(sigma0))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def probability_flow(
    score: Score,
    sigma0: Scalar,
    sigma1: Scalar,
    *,
    condition: PyTree = None,
    divergence: str | None = None,
    num_products: int = 16,
    solver: str = "tsit5",
    tol: float = 1e-5,
    num_steps: int = 32,
    max_steps: int = 256,
    dense: bool = False,
    derivative: str = "both",
    chunk_size: int = 64,
) -> ProbabilityFlow:
    """The probability flow of a score from noise sigma0 to sigma1, and the volume it sweeps.

    With s the score, J = ds/dx, M = I + sigma^2 J and d_eff = tr M, x obeys

        dx/dlog sigma = -sigma^2 s(x, sigma)
        dL/dlog sigma = d - d_eff,        L = log |det dx(sigma)/dx(sigma0)|

    which carries samples of p_sigma0 to samples of p_sigma1. For an exact score d_eff >= 0, so L
    is at most d log(sigma1/sigma0) towards noise. Towards noise the flow is well conditioned: an
    error of x in units of sigma shrinks by M. Towards data it grows by M, most between modes.

    Args:
        score: ``(x, sigma, condition) -> s``, a callable pytree or a plain function.
        sigma0: noise level of the starting point, > 0, a number or traced. Neither level is
            compared with the range that a model was trained on.
        sigma1: noise level to reach, > 0; above sigma0 towards noise, below it towards data.
        condition: passed to the score.
        divergence: how tr M is found at every evaluation. None: no volume. ``"exact"``: d jvps.
            ``"hutchinson"``: ``num_products`` jvps with fixed random signs. ``"hutchpp"``:
            ``num_products`` jvps. ``"xnystrace"``: ``num_products`` jvps and vjps, on the
            symmetric part of M.
        num_products: products of a stochastic divergence.
        solver: adaptive ``"tsit5"`` (order 5, six evaluations a step) or ``"dopri8"`` (order 8,
            13), or on a grid of ``num_steps`` equal steps in log sigma ``"heun"`` (order 2, two
            evaluations) or ``"rk4"`` (order 4, four).
        tol: of an adaptive solver: the error of a step, of x in units of sigma (root mean square
            over coordinates) and of L in nats per dimension. Errors below rounding are not asked
            for.
        num_steps: steps of a fixed rule; in any case the profile has ``num_steps + 1`` levels.
        max_steps: of an adaptive solver, accepted or rejected.
        dense: also return x as a function of sigma: of the solver's order, for a fixed rule
            cubic.
        derivative: what an adaptive solve can be differentiated by: ``"both"`` modes, or
            ``"reverse"`` alone, in less memory. No other result depends on it. Fixed rules have
            both.
        chunk_size: products evaluated together.

    Returns:
        A ``ProbabilityFlow``, a callable pytree ``(x, key=None) -> Flow`` for one point.

    Raises:
        InputError: an argument out of range.

    Nothing is raised at a NaN, a field too stiff or too few steps: ``Flow.status`` tells, and
    values that were not reached are NaN. In a vmapped batch an adaptive solve runs until its
    slowest lane is done; lanes do not touch each other.

    Accuracy: fixed rules of the order said; adaptive ones within about ten ``tol``. Float32 knows
    x to 6e-8 |x|, which is 6e-4 sigma at sigma = 1e-4 |x|: measured on a mixture in 8 dimensions,
    log volumes up to sigma = 20 are right to 2e-4 nats from 0.01, to 2e-3 from 1e-4.

    Cost of an evaluation: one forward and the products above. A solve takes ``num_steps`` times
    the rule's evaluations and one more, or 6 (13) a step and one more; the profile of an adaptive
    solve one a level.

    Derivatives with respect to x, the condition, the noise levels and the weights are those of
    the discrete solution (the steps an adaptive solver chose count as constant). A forward-mode
    derivative costs about one solve more for each direction. Reverse mode evaluates everything
    once more; fixed rules store each state, an adaptive solve with ``"both"`` the inner workings
    of many steps. Measured on one log volume in 8 dimensions: 25 times a plain solve in time and
    280 times in memory, with ``"reverse"`` 5 and 2 times, by "rk4" 5 and 9 times. ``max_steps``
    matters to none of these, nor to a plain solve. The traces of Hutch++ and XNysTrace hold
    factorizations whose derivatives need not exist.

    >>> import jax.numpy as jnp
    >>> score = lambda x, s, c=None: -x / s**2  # one stored point, at the origin
    >>> flow = probability_flow(score, 0.1, 1.0, divergence="exact", solver="rk4")
    >>> out = flow(jnp.array([0.1, 0.2]))
    >>> out.point.round(3).tolist(), round(float(out.log_volume), 3)  # 2 log 10
    ([1.0, 2.0], 4.605)

    References:
        Song et al. (2021), arXiv:2011.13456, section 4.3 and Appendix D; Karras et al. (2022),
        arXiv:2206.00364, equation 1; Kidger (2021), arXiv:2202.02435 (diffrax).
    """
    log_ratio = _log_ratio(sigma0, sigma1)
    plan = Divergence(divergence, num_products, chunk_size)
    plan.check()
    _check_choice("solver", solver, (*ADAPTIVE, *FIXED))
    _check_choice("derivative", derivative, tuple(ADJOINTS))
    if not 0 < tol < 1:
        raise InputError(f"tol: expected a number between 0 and 1, got {tol}")
    check_count("num_steps", num_steps, 1)
    check_count("max_steps", max_steps, 1)
    return ProbabilityFlow(
        callable_pytree(score, "score"),
        condition,
        jnp.asarray(sigma0, log_ratio.dtype),
        log_ratio,
        Plan(solver, float(tol), num_steps, max_steps, plan, dense, derivative, True),
    )
