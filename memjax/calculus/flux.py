"""p-Laplacians from evaluations of the score alone: sphere flux, ball average, Gaussian form.

The three are one estimate. With s = grad u, F = |s|^(p-2) s, centers y and directions v with
E v v^T = I, a pair of evaluations gives

    v . [F(y + w v) - F(y - w v)] / (2 w)

    sphere flux     y = x                   |v|^2 = d    w = r / sqrt(d)
    ball average    y uniform in a ball     |v|^2 = d    w = step / sqrt(d)
    Gaussian form   y = x                   v ~ N(0, I)  w = width

Both ends of a pair are used because F(y) . v, which has mean zero and a variance that grows like
1/w^2, drops out of their difference.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from memjax._core.checks import check_count, check_positive
from memjax._core.chunked import chunked_map
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.calculus.linearization import Field, check_field
from memjax.calculus.p_laplace import Exponents, exponents
from memjax.linalg.estimate import Estimate
from memjax.linalg.probes import gaussian, orthonormal, sphere

Length = float | int | Float[Array, ""]

_MIN_FRAMES = 8
"""Frames from which the spread of their means is a usable error bar (7 degrees of freedom)."""


class FluxEstimate(NamedTuple):
    """A p-Laplacian estimated from pairs of evaluations.

    Attributes:
        value: the estimate, one for every exponent: a scalar, or ``[len(p)]`` for a tuple p.
        standard_error: of each value over the random directions (and points), not of the
            smoothing. Infinite where there is nothing to tell it from: one pair, or one frame of
            the plane. Carries no gradient.
        degrees_of_freedom: of the standard error, for Student's t.
        status: a ``Status`` for each value. ``NONFINITE``: an evaluation or the value is not
            finite. ``UNDEFINED``, with the value NaN: p = 1 and the score is exactly zero at an
            evaluation (its direction is 0/0), or a traced length is not positive.
        cost: evaluations of the field; all exponents share them.
    """

    value: Float[Array, "*p"]
    standard_error: Float[Array, "*p"]
    degrees_of_freedom: Int[Array, ""]
    status: Int[Array, "*p"]
    cost: Cost

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Confidence interval of every value, on the host: ``value -+ t standard_error``.

        Args:
            level: coverage, in (0, 1).

        Returns:
            Lower and upper ends as NumPy arrays; for a batch of estimates, batched alike.
        """
        value, error, freedom, status, cost = self
        evaluations = jnp.asarray(cost.forward)
        return Estimate(value, error, freedom, status, evaluations).interval(level)


Estimator = Callable[[Float[Array, "..."], PRNGKeyArray], FluxEstimate]


def p_laplacian_flux(
    field: Field,
    p: Exponents,
    *,
    radius: Length,
    num_pairs: int,
    directions: Literal["orthonormal", "independent"] = "orthonormal",
    scaled: bool = True,
    chunk_size: int | None = 16,
) -> Estimator:
    """p-Laplacian of u around a point, from the flux of its score through a sphere.

    With s = grad u the field, F = |s|^(p-2) s, n uniform on the unit sphere of R^d and x the
    center::

        Phi_p = E_n[F(x + r n) . n]                                   scaled=False
        (d/r) Phi_p = mean over the ball |y - x| < r of Delta_p u     scaled=True
                    = Delta_p u(x) + r^2/(2 (d + 2)) Lap(Delta_p u)(x) + O(r^4)

    by the divergence theorem and the mean-value expansion, Delta_p u = div(|s|^(p-2) s). Negative
    around attractors (modes, stored points). Phi_1 is the mean cosine between score and outward
    normal, in [-1, 1] and the same for s and c s, c > 0. A ball mean is finite at a zero of the
    score, where Delta_p u for p < 2 is not (d >= 2).

    Delta_inf u = s^T J s is not a divergence and has no flux. For p = inf the same pairs, with
    s+ = s(x + r n) and s- = s(x - r n), estimate its value at the point::

        (d/8r) E_n[(|s+|^2 - |s-|^2) (s+ + s-) . n] = s^T J s(x) + O(r^2)

    (half of Delta_4 u - |s|^2 Delta_2 u, by pairs), exactly for linear s at every r; Phi_inf is
    r/d times that.

    Args:
        field: s, from an array to an array of the same shape and dtype, traceable by JAX. For a
            score at fixed noise use ``memjax.at(score, sigma, condition)``.
        p: exponent or tuple of exponents, each in [1, inf]. Static.
        radius: r > 0, in units of x; a number or a traced scalar. sigma sqrt(d) puts the sphere
            where a score at noise sigma was trained.
        num_pairs: m >= 1 antithetic pairs n, -n. Static.
        directions: ``"orthonormal"``: Haar-distributed frames of at most d; ``"independent"``.
        scaled: return (d/r) Phi_p, or Phi_p. Static.
        chunk_size: evaluations made together; memory is ``chunk_size`` times that of one, plus
            the m directions. None for all at once.

    Returns:
        A function ``(x, key) -> FluxEstimate`` of one point of any shape; use it under ``jit``
        and ``vmap``. Values are in float32 for a half-precision x, else in its dtype.

    Raises:
        InputError: p below 1, empty or not a number; a number r that is not positive and finite;
            m < 1; unknown directions. From the returned function: x is not floating point or
            is empty; f(x) differs from x in shape or dtype.

    Without raising: NaN with a status where a traced r is not positive, where an evaluation is
    not finite, and for p = 1 where the score is exactly zero at an evaluation. For p > 1 a zero
    adds nothing, as F is continuous there.

    Accuracy: unbiased for the ball mean (p < inf). As r -> 0 one pair has the variance
    ``(2d/(d + 2)) (|A|_F^2 - (tr A)^2/d)``, A the symmetric part of dF/dx: none for A = c I. For
    p = inf, ``(d/(d + 2)) (|J^T s|^2 |s|^2 + (1 - 2/d) (s^T J s)^2)``. Rounding adds about
    ``eps |F| sqrt(d)/r``, and r has to stand out of ``eps |x|``. Powers of |s| neither overflow
    nor underflow unless the value does.

    The standard error is that of the mean of m samples. In one orthonormal frame the part of
    F . n that is quadratic in n (all of it as r -> 0) is drawn without replacement and has
    sqrt(1 - m/d) of that error, none for m = d; higher orders gain nothing. One frame cannot tell
    the two apart: the differences on it are those of some linear field, whatever the field. So for
    fewer than 8 frames the pairs are counted as if independent: right for m << d, an upper bound
    towards m = d, and scaled so that its square is on average never below the variance (samples
    of degree 4 have correlation 3/(d^2 - 1) within a frame, the largest of any degree, which
    matters in low d only). From 8 frames on it is the spread of their means. Samples are skewed
    where the curvature lies in one or two directions (few modes; p = inf): 95 % intervals from 8
    to 32 pairs then cover 85 to 93 %.

    Cost: 2 m forward evaluations for all exponents together, and O(m d min(m, d)) operations to
    orthonormalize. The gradient with respect to x (directions held) costs 2 m vjps and stores
    2 m forward passes.

    >>> import jax, jax.numpy as jnp
    >>> estimate = p_laplacian_flux(lambda x: -4 * x, (1, 2, 3), radius=0.5, num_pairs=2)
    >>> estimate(jnp.zeros(3), jax.random.key(0)).value.round(4).tolist()  # -d (r/v)^(p-1) / r
    [-6.0, -12.0, -24.0]

    References:
        Brokman et al. (2025), Identifying memorization of diffusion models through p-Laplace
        analysis: estimators, bounds and applications, arXiv:2505.08246 (p-Laplacians of
        log-densities by flux and by volume; antithetic pairs, error bars and p = inf are ours).
        P. Pizzetti (1909), Sulla media dei valori che una funzione dei punti dello spazio assume
        alla superficie di una sfera, Rendiconti Lincei 18, 182-185 (the mean-value expansion).
    """
    exponents(p)
    check_positive("radius", radius)
    check_count("num_pairs", num_pairs, 1)
    if directions not in ("orthonormal", "independent"):
        raise InputError(f"directions: expected 'orthonormal' or 'independent', got {directions!r}")

    def estimate(x: Float[Array, "..."], key: PRNGKeyArray) -> FluxEstimate:
        base = _enter(field, x)
        r = jnp.asarray(radius, base.dtype)
        width = r / math.sqrt(x.size)
        frames = directions == "orthonormal"
        draw = orthonormal if frames else sphere
        ends = _evaluate_pairs(
            field, x, lambda pair: base, draw(key, num_pairs, base), width, chunk_size
        )
        unit = width if scaled else jnp.full_like(width, math.sqrt(x.size))
        grouping = _group_frames(num_pairs, x.size) if frames else _INDEPENDENT
        return _summarize(ends, p, unit, r > 0, grouping)

    return estimate


def p_laplacian_ball(
    field: Field,
    p: Exponents,
    *,
    radius: Length,
    num_pairs: int,
    step: Length | None = None,
    chunk_size: int | None = 16,
) -> Estimator:
    """p-Laplacian of u averaged over a ball, by central differences of the score inside it.

    With s = grad u the field, F = |s|^(p-2) s, y uniform in the ball |y - x| < r, n uniform on
    the unit sphere, independent of y, and h the step::

        (d/2h) E_{y,n}[n . (F(y + h n) - F(y - h n))]

    It is the volume side of ``p_laplacian_flux``, whose expectation it shares up to the
    h^2/(2 (d + 2)) mean Lap(Delta_p u) of the differences. For p = inf, which is no flux, it is
    the ball mean of s^T J s, up to O(h^2). Prefer the flux: it needs no step, and no
    differences of close evaluations.

    Args:
        field: s, from an array to an array of the same shape and dtype, traceable by JAX.
        p: exponent or tuple of exponents, each in [1, inf]. Static.
        radius: r > 0, in units of x; a number or a traced scalar.
        num_pairs: m >= 1 points, with one random direction each. Static.
        step: h > 0, in units of x; a number or a traced scalar. None: ``h = L (3 eps max(1,
            |x|_max/L))^(1/3)`` with L = r/sqrt(d) and the eps of x's dtype. It balances truncation
            and rounding for a score that varies over L, as it does at noise sigma for
            r = sigma sqrt(d).
        chunk_size: evaluations made together. None for all at once.

    Returns:
        A function ``(x, key) -> FluxEstimate`` of one point of any shape; use it under ``jit``
        and ``vmap``. The standard error is over the m independent samples.

    Raises:
        InputError: as ``p_laplacian_flux``; a number h that is not positive and finite.

    Without raising: as ``p_laplacian_flux``.

    Accuracy: for d <= 4 - 2p the variance grows without bound as h -> 0 if the score has a zero in
    the ball, and a small sample may miss where it comes from.

    Cost: 2 m forward evaluations for all exponents together.

    >>> import jax, jax.numpy as jnp
    >>> estimate = p_laplacian_ball(lambda x: -4 * x, 2, radius=0.5, num_pairs=2)
    >>> round(float(estimate(jnp.zeros(3), jax.random.key(0)).value), 2)  # -d/v everywhere
    -12.0

    References:
        Brokman et al. (2025), arXiv:2505.08246 (the volume form; their code takes differences
        along all d coordinates at every point, ours along one direction).
    """
    exponents(p)
    check_positive("radius", radius)
    if step is not None:
        check_positive("step", step)
    check_count("num_pairs", num_pairs, 1)

    def estimate(x: Float[Array, "..."], key: PRNGKeyArray) -> FluxEstimate:
        base = _enter(field, x)
        r = jnp.asarray(radius, base.dtype)
        length = r / math.sqrt(x.size)
        if step is None:
            largest = jax.lax.stop_gradient(jnp.max(jnp.abs(base)))
            roundoff = float(jnp.finfo(x.dtype).eps) * jnp.maximum(1, largest / length)
            h = (3 * roundoff) ** (1 / 3) * length
        else:
            h = jnp.asarray(step, base.dtype)
        side_key, depth_key, direction_key = jax.random.split(key, 3)
        side = sphere(side_key, num_pairs, base)
        depth = jax.random.uniform(depth_key, (num_pairs,), base.dtype) ** (1 / x.size)
        width = h / math.sqrt(x.size)
        ends = _evaluate_pairs(
            field,
            x,
            lambda pair: base + (length * depth[pair]) * side[pair],
            sphere(direction_key, num_pairs, base),
            width,
            chunk_size,
        )
        valid = (r > 0) & (h > 0)
        return _summarize(ends, p, width, valid, _INDEPENDENT)

    return estimate


def p_laplacian_stein(
    field: Field,
    p: Exponents,
    *,
    width: Length,
    num_pairs: int,
    chunk_size: int | None = 16,
) -> Estimator:
    """p-Laplacian of u averaged over a Gaussian, by Stein's identity from the score alone.

    With s = grad u the field, F = |s|^(p-2) s, z ~ N(0, I) and w the width::

        E_z[F(x + w z) . z] / w = E_z[Delta_p u(x + w z)]
                                = Delta_p u(x) + (w^2/2) Lap(Delta_p u)(x) + O(w^4)

    by antithetic pairs z, -z. It is the mean of ``p_laplacian_flux`` over the radii r = w |z|,
    weighted by |z|^2/d; in high dimension it is close to the one at r = w sqrt(d), whose bias is
    d/(d + 2) times this one's. For p = inf, as there: s^T J s(x) + O(w^2), exactly for linear s.

    Args:
        field: s, from an array to an array of the same shape and dtype, traceable by JAX.
        p: exponent or tuple of exponents, each in [1, inf]. Static.
        width: w > 0, standard deviation per coordinate, in units of x; a number or a traced
            scalar.
        num_pairs: m >= 1 antithetic pairs. Static.
        chunk_size: evaluations made together. None for all at once.

    Returns:
        A function ``(x, key) -> FluxEstimate`` of one point of any shape; use it under ``jit``
        and ``vmap``. The standard error is over the m independent pairs.

    Raises:
        InputError: as ``p_laplacian_flux``, with ``width`` in the place of ``radius``.

    Without raising: as ``p_laplacian_flux``.

    Accuracy: unbiased for the Gaussian mean (p < inf). As w -> 0 one pair has the variance
    ``2 |A|_F^2``, A the symmetric part of dF/dx, also for A = c I: around an attractor, where the
    flux has next to none, prefer the flux.

    Cost: 2 m forward evaluations for all exponents together.

    >>> import jax, jax.numpy as jnp
    >>> estimate = p_laplacian_stein(lambda x: -4 * x, 2, width=0.5, num_pairs=10_000)
    >>> value, error, *_ = estimate(jnp.zeros(3), jax.random.key(0))  # -d/v = -12
    >>> bool(abs(value + 12) < 3 * error), round(float(error), 2)  # sqrt(2 |A|_F^2 / m) = 0.1
    (True, 0.1)

    References:
        C. Stein (1981), Estimation of the mean of a multivariate normal distribution, Annals of
        Statistics 9(6), 1135-1151, lemma 2. Brokman et al. (2025), arXiv:2505.08246 (why r =
        w sqrt(d)).
    """
    exponents(p)
    check_positive("width", width)
    check_count("num_pairs", num_pairs, 1)

    def estimate(x: Float[Array, "..."], key: PRNGKeyArray) -> FluxEstimate:
        base = _enter(field, x)
        w = jnp.asarray(width, base.dtype)
        ends = _evaluate_pairs(
            field, x, lambda pair: base, gaussian(key, num_pairs, base), w, chunk_size
        )
        return _summarize(ends, p, w, w > 0, _INDEPENDENT)

    return estimate


class _Ends(NamedTuple):
    """The score at both ends of every pair, [m, 2]: |s|, and s . v / |s| along the outward v."""

    length: Float[Array, "m 2"]
    cosine: Float[Array, "m 2"]


class _Grouping(NamedTuple):
    """Which samples to count as one: ``block`` in a row; and by what to raise their error."""

    block: int
    factor: float


_INDEPENDENT = _Grouping(1, 1.0)


def _evaluate_pairs(
    field: Field,
    x: Float[Array, "..."],
    center: Callable[[Int[Array, ""]], Float[Array, "..."]],
    directions: Float[Array, "m ..."],
    width: Float[Array, ""],
    chunk_size: int | None,
) -> _Ends:
    """Evaluate s at y + w v and y - w v; only two numbers of each evaluation are kept."""
    num = len(directions)

    def evaluate(index):
        pair, sign = index // 2, (1 - 2 * (index % 2)).astype(width.dtype)
        v = sign * directions[pair]
        point = center(pair) + width * v
        return _length_and_cosine(field(point.astype(x.dtype)).astype(width.dtype), v)

    length, cosine = chunked_map(evaluate, jnp.arange(2 * num), chunk_size=chunk_size)
    return _Ends(length.reshape(num, 2), cosine.reshape(num, 2))


def _length_and_cosine(
    s: Float[Array, "..."], v: Float[Array, "..."]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """|s| and s . v / |s|, or 0 and 0 where s = 0; no square overflows or underflows."""
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(s)))
    zero = scale < jnp.finfo(s.dtype).tiny
    scale = jnp.where(zero, 1, scale)
    s = s / scale
    # Twice guarded: the unused branch must not turn gradients at s = 0 into NaN.
    length = jnp.sqrt(jnp.where(zero, 1, jnp.sum(s * s)))
    cosine = jnp.sum(s * v) / length
    return jnp.where(zero, 0, scale * length), jnp.where(zero, 0, cosine)


def _summarize(
    ends: _Ends,
    p: Exponents,
    unit: Float[Array, ""],
    valid: Bool[Array, ""],
    grouping: _Grouping,
) -> FluxEstimate:
    """Means over pairs of v . (F+ - F-) / (2 unit) for every exponent, with their errors."""
    every = exponents(p)
    largest = jax.lax.stop_gradient(jnp.max(ends.length))
    largest = jnp.where(largest == 0, 1, largest)
    samples = jnp.stack([_samples(ends, one, largest) for one in every])
    mean = jnp.mean(samples, axis=1)
    error, freedom = _standard_error(jax.lax.stop_gradient(samples - mean[:, None]), grouping)
    # The factor |s|^(p-1) (three powers for p = inf) comes last: squares of it would overflow.
    scale = jnp.stack([largest ** (3 if math.isinf(one) else one - 1) for one in every]) / unit

    ones = jnp.asarray(every) == 1
    undefined = (ones & jnp.any(ends.length == 0)) | ~valid
    value = jnp.where(undefined, jnp.nan, scale * mean)
    error = jnp.where(jnp.isnan(value), jnp.nan, jax.lax.stop_gradient(scale) * error)
    status = jnp.where(
        jnp.all(jnp.isfinite(ends.length)) & (undefined | jnp.isfinite(value)),
        jnp.where(undefined, jnp.int32(Status.UNDEFINED), jnp.int32(Status.OK)),
        jnp.int32(Status.NONFINITE),
    )
    if not isinstance(p, tuple):
        value, error, status = value[0], error[0], status[0]
    cost = Cost(forward=ends.length.size)
    return FluxEstimate(value, error, jnp.asarray(freedom, jnp.int32), status, cost)


def _samples(ends: _Ends, p: float | int, largest: Float[Array, ""]) -> Float[Array, " m"]:
    """One number a pair, divided by the power of the largest |s|."""
    if p == 1:
        return jnp.mean(ends.cosine, axis=1)
    zero = ends.length == 0
    ratio = jnp.where(zero, 1, ends.length / largest)
    if math.isinf(p):
        ratio = jnp.where(zero, 0, ratio)
        squares, slopes = ratio**2, ratio * ends.cosine
        return (squares[:, 0] - squares[:, 1]) * (slopes[:, 0] - slopes[:, 1]) / 8
    return jnp.mean(jnp.where(zero, 0, ratio ** (p - 1) * ends.cosine), axis=1)


def _standard_error(
    deviations: Float[Array, "p m"], grouping: _Grouping
) -> tuple[Float[Array, " p"], int]:
    """Standard error of means whose samples are independent from block to block only."""
    num_exponents, m = deviations.shape
    blocks = -(-m // grouping.block)
    if blocks == 1:
        return jnp.full(num_exponents, jnp.inf, deviations.dtype), 0
    padded = jnp.pad(deviations, ((0, 0), (0, blocks * grouping.block - m)))
    totals = jnp.sum(padded.reshape(num_exponents, blocks, grouping.block), axis=2)
    spread = jnp.sqrt(jnp.sum(totals**2, axis=1) * (blocks / (blocks - 1)))
    return grouping.factor / m * spread, blocks - 1


def _group_frames(m: int, d: int) -> _Grouping:
    """How to estimate the error of m samples g(n) = g(-n) in orthonormal frames of d.

    On two orthogonal directions, harmonics of degree l have the correlation P_l(0) of the
    Legendre polynomial of R^d: -1/(d-1) for l = 2, c = 3/(d^2-1) for l = 4, and no more than c
    for every other even l. With q the share of pairs of samples that stand in one frame, their
    sample variance has the expectation (1 - q c) var g at least, and m times the variance of
    their mean is (1 + (m-1) q c) var g at most.
    """
    frames = -(-m // d)
    if d == 1 or frames >= _MIN_FRAMES:
        return _Grouping(d, 1.0)
    last = m - (frames - 1) * d
    shared = ((frames - 1) * d * (d - 1) + last * (last - 1)) / max(m * (m - 1), 1)
    hidden = 3 / (d * d - 1) * shared
    if hidden == 1:  # one frame of the plane: harmonics of degree 4 are equal on its directions
        return _Grouping(m, 1.0)
    return _Grouping(1, math.sqrt((1 + (m - 1) * hidden) / (1 - hidden)))


def _enter(field: Field, x: Array) -> Float[Array, "..."]:
    """X in the precision to compute in: its own, or float32 if that is less."""
    check_field(field, x)
    if x.size == 0:
        raise InputError(f"x: expected at least one entry, got shape {list(x.shape)}")
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)
