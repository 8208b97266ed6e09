"""Volume growth by finite edges and Euler's rule, as first published, for comparison."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from memjax._core.checks import check_count, check_positive
from memjax._core.chunked import chunked_map
from memjax._core.cost import Cost
from memjax._core.status import finite_status
from memjax.diffusion.adapters import callable_pytree
from memjax.diffusion.combine import Score
from memjax.diffusion.schedule import ContinuousVP


class EdgeGrowth(NamedTuple):
    """Volume growth by finite edges.

    Attributes:
        log_volume: sum over steps and edges of the logarithm of what an edge grew by, in nats, in
            x_t = alpha x coordinates. k log(alpha(t_0)/alpha(T)) more is the growth in ours.
        curve: the same after each step.
        ceiling: k log(sigma_t(T)/sigma_t(t_0)), which the exact flow of a stored point reaches.
        status: ``OK``, or ``NONFINITE``.
        cost: network products used.
    """

    log_volume: Float[Array, ""]
    curve: Float[Array, " n"]
    ceiling: Float[Array, ""]
    status: Int[Array, ""]
    cost: Cost


def volume_growth_edges(
    score: Score,
    *,
    condition: PyTree = None,
    schedule: ContinuousVP = ContinuousVP(),  # noqa: B008
    k: int = 100,
    edge: float = 0.05,
    num_steps: int = 1000,
    chunk_size: int = 64,
) -> Callable[..., EdgeGrowth]:
    """Volume growth of k finite edges by Euler's rule: the published procedure, flaws and all.

    In x_t = alpha x0 + sigma_t n coordinates, from the clean image at t_0 = ``t_min`` on, with
    beta(t) = beta_min + t (beta_max - beta_min) and s_t = s(x_t/alpha, sigma_t/alpha)/alpha::

        k neighbors: image + edge N(0, I), edges sorted by length, longest first, made orthogonal
        by Gram-Schmidt and all of length ``edge``; then at each of num_steps times, evenly spaced
        from t_min to t_max with both ends,
            x_t <- x_t - (beta/2) (x_t + s_t)/num_steps     for the image and its neighbors
            log volume += sum over edges of log(length after/length before)
            edges sorted, made orthogonal and rescaled as above

    What it computes differs from the log volume growth of the flow: (1) lengths are measured
    before edges are made orthogonal, and by Hadamard's inequality their product is at least the
    volume, a bias of first order in the step; (2) Euler's rule, of first order too, is poor near
    t_0; (3) num_steps steps of 1/num_steps pass a time of 1, not of t_max - t_min, at the rates of
    t_min to t_max: 0.1 % too much however many steps; (4) edges of 0.05 are five times the noise
    at t_0 = 1e-3; (5) the image is neither noised nor scaled by alpha(t_0); (6) k < d edges depend
    on the random frame. Use ``volume_growth`` or ``volume_growth_frame`` for anything but
    comparison.

    Args:
        score: in our coordinates, as everywhere.
        condition: passed to the score.
        schedule: the VP schedule whose times are used. Static.
        k: number of neighbors, at most d. Static.
        edge: length of the edges, > 0.
        num_steps: Euler steps. Static.
        chunk_size: points moved together. Static.

    Returns:
        A function ``(x, key) -> EdgeGrowth`` of one clean image x.

    Raises:
        InputError: an argument out of range.

    Cost: (k + 1) ``num_steps`` forward evaluations, 101,000 as published.

    References:
        Hasegawa and Yasuda (2025), arXiv:2503.19429, and the authors' public code (defaults and
        order of operations).
    """
    score = callable_pytree(score, "score")
    check_count("k", k, 1)
    check_count("num_steps", num_steps, 1)
    check_count("chunk_size", chunk_size, 1)
    check_positive("edge", edge)

    def growth(x: Float[Array, "..."], key: PRNGKeyArray) -> EdgeGrowth:
        check_count("k", k, 1, x.size)
        curve = _edge_growth(score, condition, x, key, edge, schedule, k, num_steps, chunk_size)
        ends = schedule.sigma_t(jnp.asarray([schedule.t_min, schedule.t_max], x.dtype))
        used = jnp.int32((k + 1) * num_steps)
        return EdgeGrowth(
            curve[-1],
            curve,
            k * jnp.log(ends[1] / ends[0]),
            finite_status(curve),
            Cost(used, jnp.int32(0), jnp.int32(0)),
        )

    return growth


@partial(jax.jit, static_argnames=("schedule", "k", "num_steps", "chunk_size"))
def _edge_growth(
    score: Score,
    condition: PyTree,
    x: Float[Array, "..."],
    key: PRNGKeyArray,
    edge: float | Float[Array, ""],
    schedule: ContinuousVP,
    k: int,
    num_steps: int,
    chunk_size: int,
) -> Float[Array, " n"]:
    def frame(edges):
        lengths = jnp.linalg.norm(edges, axis=1)
        edges = edges[jnp.argsort(-lengths)]
        finite = jnp.all(jnp.isfinite(edges))
        q, r = jnp.linalg.qr(jnp.where(finite, edges, 0).T)
        # Gram-Schmidt keeps the sense of each edge; QR need not.
        signs = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(x.dtype)
        return jnp.where(finite, edge * q.T * signs[:, None], jnp.nan)

    def step(carry, t):
        center, edges = carry
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        beta = schedule.beta_min + t * (schedule.beta_max - schedule.beta_min)

        def move(y):
            y = y.reshape(x.shape)
            s = score(y / alpha, sigma, condition) / alpha
            return (y - beta / 2 / num_steps * (y + s)).reshape(-1)

        points = jnp.concatenate([center[None], center[None] + edges])
        moved = chunked_map(move, points, chunk_size=chunk_size)
        center, edges = moved[0], moved[1:] - moved[:1]
        grown = jnp.sum(jnp.log(jnp.linalg.norm(edges, axis=1) / edge))
        return (center, frame(edges)), grown

    edge = jnp.asarray(edge, x.dtype)
    edges = frame(edge * jax.random.normal(key, (k, x.size), x.dtype))
    times = jnp.linspace(schedule.t_min, schedule.t_max, num_steps, dtype=x.dtype)
    _, grown = jax.lax.scan(step, (x.reshape(-1), edges), times)
    return jnp.cumsum(grown)
