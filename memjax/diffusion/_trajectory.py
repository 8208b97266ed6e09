"""One trajectory of the probability flow with its volume: by a fixed rule, or step by step."""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from memjax._core.status import Status, finite_status
from memjax.calculus.linearization import linearize
from memjax.diffusion._divergence import Divergence, Rates
from memjax.diffusion.combine import Score, at


class Rule(NamedTuple):
    """An explicit Runge-Kutta rule whose every stage uses only the stage before it.

    With h the step and f the field, k_j = f(t + c_j h, y + a_j h k_{j-1}), y' = y + h sum b_j k_j.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def stages(self, sigma: Float[Array, " n"], h: Float[Array, ""]) -> "Stages":
        """One row of stages for each of n steps from sigma to sigma exp(h).

        The point moves by dx/dsigma = -sigma s, whose right-hand side is constant near a stored
        point and at large noise: both are then integrated without error. The log volume is an
        integral over log sigma, for which the weights are those of the parabola through its
        integrand at the stages. (Its weights differ from b by O(h), the stages from the solution
        by terms that b sums to O(h^4) and each O(h^2): the order is that of the rule.)
        """
        a, b, c = (jnp.asarray(row, h.dtype) for row in self)
        change = (sigma * jnp.expm1(h))[:, None]
        weights = b
        if len(b) == 4:
            still = h == 0  # equal levels, known only when traced
            middle = jnp.log1p(jnp.expm1(h) / 2) / jnp.where(still, 1, h)
            middle = jnp.where(still, 0.5, middle)
            inner = 1 / (6 * middle * (1 - middle))
            weights = jnp.stack(
                [0.5 - inner * (1 - middle), inner / 2, inner / 2, 0.5 - inner * middle]
            )
        return Stages(
            sigma[:, None] + c[None] * change,
            a[None] * change,
            b[None] * change,
            jnp.broadcast_to(h * weights, change.shape[:1] + b.shape),
        )


class Stages(NamedTuple):
    """Of each stage of each step: the noise level, and what multiplies the slopes there."""

    sigma: Float[Array, "n j"]
    reach: Float[Array, "n j"]
    weight: Float[Array, "n j"]
    growth_weight: Float[Array, "n j"]


FIXED = {
    "heun": Rule((0, 1), (1 / 2, 1 / 2), (0, 1)),
    "rk4": Rule((0, 1 / 2, 1 / 2, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0, 1 / 2, 1 / 2, 1)),
}


class Pair(NamedTuple):
    """An embedded pair of rules of diffrax, its order, and evaluations a step."""

    solver: Any
    order: int
    evaluations: int


# Both hand the last evaluation of a step to the next step; the first step makes one more.
ADAPTIVE = {"tsit5": Pair(diffrax.Tsit5, 5, 6), "dopri8": Pair(diffrax.Dopri8, 8, 13)}

ADJOINTS = {"both": diffrax.DirectAdjoint, "reverse": diffrax.RecursiveCheckpointAdjoint}


class Plan(NamedTuple):
    """The static choices of a flow."""

    solver: str
    tol: float
    num_steps: int
    max_steps: int
    divergence: Divergence
    dense: bool
    derivative: str
    rates: bool
    """Whether an adaptive solve evaluates the rates at the nodes, for the profile."""


class Field(eqx.Module):
    """What the flow follows: dx/dsigma and the rate of volume growth, between two levels."""

    score: Score
    condition: PyTree
    sigma0: Float[Array, "..."]
    log_ratio: Float[Array, "..."]
    drawn: PyTree
    divergence: Divergence = eqx.field(static=True)

    def __call__(
        self, sigma: Float[Array, ""], x: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Rates]:
        """dx/dsigma = -sigma s, and d - d_eff, from one linearization."""
        lin = linearize(at(self.score, sigma, self.condition), x)
        rates = self.divergence.rates(lin, sigma, self.drawn)
        # A NaN that does not depend on x has a Jacobian of zeros.
        known = jnp.all(jnp.isfinite(lin.value))
        return -sigma * lin.value, rates._replace(values=jnp.where(known, rates.values, jnp.nan))

    def levels(self, num_steps: int) -> Float[Array, " n"]:
        """Noise levels at equal steps of log sigma, both ends included."""
        fractions = jnp.linspace(0, 1, num_steps + 1, dtype=self.log_ratio.dtype)
        return self.sigma0 * jnp.exp(self.log_ratio * fractions)

    # An adaptive solver runs in the time s = |log(sigma/sigma0)|, which always increases.

    @property
    def span(self) -> Float[Array, "..."]:
        """The last s."""
        return jnp.abs(self.log_ratio)

    def sigma(self, s: Float[Array, ""]) -> Float[Array, ""]:
        """The noise level at time s."""
        return self.sigma0 * jnp.exp(self._sign * s)

    def slope(self, s: Float[Array, ""], x: Float[Array, "..."]) -> tuple[Array, Array]:
        """dx/ds, and dl/ds of every estimate of the log volume."""
        sigma = self.sigma(s)
        velocity, rates = self(sigma, x)
        return self._sign * sigma * velocity, self._sign * rates.values

    @property
    def _sign(self) -> Float[Array, "..."]:
        return jnp.where(self.log_ratio < 0, -1, 1).astype(self.log_ratio.dtype)


class Nodes(NamedTuple):
    """What is known at n levels from the first to the last."""

    sigmas: Float[Array, " n"]
    growths: Float[Array, "n m"]
    rates: Rates | None


class Trajectory(NamedTuple):
    """Where a trajectory ended, and how."""

    point: Float[Array, "..."]
    growths: Float[Array, " m"]
    nodes: Nodes | None
    interpolation: diffrax.DenseInterpolation | None
    status: Int[Array, ""]
    num_accepted: Int[Array, ""]
    num_rejected: Int[Array, ""]
    evaluations: Int[Array, ""]


def solve(plan: Plan, field: Field, x: Float[Array, "..."]) -> Trajectory:
    """Follow the field from s = 0 to its span."""
    solver = _solve_fixed if plan.solver in FIXED else _solve_adaptive
    return solver(plan, field, x)


def _solve_fixed(plan: Plan, field: Field, x: Float[Array, "..."]) -> Trajectory:
    rule, n = FIXED[plan.solver], plan.num_steps
    sigmas = field.levels(n)
    stages = rule.stages(sigmas[:-1], field.log_ratio / n)
    size = stages.sigma.shape[1]
    ends = jnp.tile(jnp.arange(size) == size - 1, n)
    # One flat scan over evaluations, so that the network is compiled once. One more of them at
    # the end, without weight, gives the rate there.
    flat = jax.tree.map(lambda leaf: jnp.append(leaf.reshape(-1), 0), stages)
    flat = flat._replace(sigma=flat.sigma.at[-1].set(sigmas[-1]))

    @jax.checkpoint
    def evaluate(carry, stage):
        (start, growths), total, slope = carry
        (sigma, reach, weight, growth_weight), end = stage
        here = start + reach * slope
        slope, rates = field(sigma, here)
        total = (total[0] + weight * slope, total[1] + growth_weight * rates.values)
        seen = (growths, rates, (here, slope) if plan.dense else None)
        begin = jax.tree.map(lambda old, new: jnp.where(end, new, old), (start, growths), total)
        return (begin, total, slope), seen

    initial = (x, jnp.zeros(field.divergence.num_values, x.dtype))
    carry = (initial, initial, jnp.zeros_like(x))
    ((point, growths), *_), seen = jax.lax.scan(evaluate, carry, (flat, jnp.append(ends, False)))
    node_growths, rates, states = jax.tree.map(lambda leaf: leaf[::size], seen)
    return Trajectory(
        point,
        growths,
        Nodes(sigmas, node_growths, rates) if field.divergence.method else None,
        _hermite(field, sigmas, *states) if plan.dense else None,
        finite_status(point, growths),
        jnp.int32(n),
        jnp.int32(0),
        jnp.int32(n * size + 1),
    )


def _hermite(
    field: Field,
    sigmas: Float[Array, " n"],
    points: Float[Array, "n ..."],
    slopes: Float[Array, "n ..."],
) -> diffrax.DenseInterpolation:
    """The cubic in log sigma through points and slopes: an error of fourth order in the step."""
    n = len(sigmas) - 1
    along = (field.log_ratio / n * sigmas).reshape(-1, *(1,) * (points.ndim - 1))
    increments = along * slopes
    return diffrax.DenseInterpolation(
        ts=field.span * jnp.linspace(0, 1, n + 1, dtype=sigmas.dtype),
        ts_size=n + 1,
        infos={
            "y0": (points[:-1],),
            "y1": (points[1:],),
            "k0": (increments[:-1],),
            "k1": (increments[1:],),
        },
        interpolation_cls=diffrax.ThirdOrderHermitePolynomialInterpolation,
        direction=1,
        t0_if_trivial=jnp.zeros_like(field.span),
        y0_if_trivial=(points[0],),
    )


class _Controller(diffrax.AbstractStepSizeController):
    """PI control of the error of a step, in the units of ``tol``; ends where no step will do.

    The error of x counts in units of the noise sigma at the step's end, root mean square over
    coordinates; that of the log volume in nats per dimension; neither below rounding.
    The state holds whether the last rejected step met a NaN or an infinity.
    """

    pid: diffrax.PIDController
    tol: float
    smallest: Float[Array, "..."]

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        first, state = self.pid.init(terms, t0, t1, dt0, dt0, args, func, error_order)
        return first, (state, jnp.asarray(False))

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        state, met = state
        error = self._error(t1, *jax.lax.stop_gradient((y1_candidate, y_error, args)))
        nonfinite = ~jnp.isfinite(error)
        error = jnp.where(nonfinite, jnp.inf, error)
        zero = jnp.zeros_like(error)
        keep, start, end, jump, state, _ = self.pid.adapt_step_size(
            t0, t1, zero, zero, args, error, error_order, state
        )
        stuck = ~keep & (end - start < self.smallest)
        result = diffrax.RESULTS.where(
            stuck, diffrax.RESULTS.dt_min_reached, diffrax.RESULTS.successful
        )
        return keep, start, end, jump, (state, jnp.where(keep, met, nonfinite)), result

    def _error(self, s, y, error, field):
        (x, growths), (x_error, growth_errors) = y, error
        rounding = 4 * float(jnp.finfo(x.dtype).eps)
        scale = self.tol * field.sigma(s) + rounding * _rms(x)
        error = _rms(x_error) / scale
        if growths.size == 0:
            return error
        growth = jnp.mean(growths)
        scale = (self.tol + rounding) * x.size + rounding * jnp.abs(growth)
        return jnp.maximum(error, jnp.abs(jnp.mean(growth_errors)) / scale)


def _rms(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(x * x))


def _slope(s, y, field):
    return field.slope(s, y[0])


def _solve_adaptive(plan: Plan, field: Field, x: Float[Array, "..."]) -> Trajectory:
    pair, measured = ADAPTIVE[plan.solver], field.divergence.method is not None
    times = field.span * jnp.linspace(0, 1, plan.num_steps + 1, dtype=x.dtype)
    eps = float(jnp.finfo(x.dtype).eps)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_slope),
        pair.solver(),
        t0=times[0],
        t1=times[-1],
        # About the step that the tolerance asks for where the field varies over s = 1.
        dt0=jnp.minimum(field.span, plan.tol ** (1 / pair.order)),
        y0=(x, jnp.zeros(field.divergence.num_values, x.dtype)),
        args=field,
        saveat=diffrax.SaveAt(
            subs=[diffrax.SubSaveAt(t1=True)] + [diffrax.SubSaveAt(ts=times)] * measured,
            dense=plan.dense,
            controller_state=True,
        ),
        stepsize_controller=_Controller(
            diffrax.PIDController(rtol=0.0, atol=1.0, pcoeff=0.3, icoeff=0.4, norm=jnp.abs),
            plan.tol,
            16 * eps * field.span,
        ),
        adjoint=ADJOINTS[plan.derivative](),
        max_steps=plan.max_steps,
        throw=False,
    )
    ended, *along = solution.ys  # pyright: ignore[reportGeneralTypeIssues]
    point, growths = jax.tree.map(lambda leaf: leaf[0], ended)
    nodes = None
    if measured:
        points, node_growths = along[0]
        sigmas, rates = field.levels(plan.num_steps), None
        if plan.rates:
            rates = jax.lax.map(lambda node: field(*node)[1], (sigmas, points))
        nodes = Nodes(sigmas, node_growths, rates)
    # Out of steps, in number or in size; if the last rejected one met a NaN, because of it.
    _, nonfinite = solution.controller_state  # pyright: ignore[reportGeneralTypeIssues]
    failed = jnp.where(nonfinite, jnp.int32(Status.NONFINITE), jnp.int32(Status.MAX_STEPS))
    done = solution.result == diffrax.RESULTS.successful
    steps, accepted, rejected = (
        solution.stats[name].astype(jnp.int32)
        for name in ("num_steps", "num_accepted_steps", "num_rejected_steps")
    )
    return Trajectory(
        point,
        growths,
        nodes,
        solution.interpolation,
        jnp.where(done, finite_status(point, growths), failed),
        accepted,
        rejected,
        pair.evaluations * steps + 1 + (measured and plan.rates) * len(times),
    )
