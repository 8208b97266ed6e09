"""p-Laplace detectors: is the image an attractor of the model's density?"""

import dataclasses
import math
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from memjax._core.errors import InputError
from memjax._core.p_laplace import p_laplacian_from_parts
from memjax.detect._sphere import (
    check_sphere,
    field_on_sphere,
    mean_of_pairs,
    sphere_points,
)
from memjax.detect.products import (
    EXACT_LIMIT,
    NUM_PROBES,
    AlongGap,
    AlongScore,
    Roundoff,
    Trace,
    TraceGap,
)
from memjax.detect.protocol import (
    Evidence,
    Finding,
    Need,
    Point,
    Product,
    check_sigma,
    finding,
    image_size,
    undefined_if,
)


def _check_exponent(p: float | int, *, finite: bool) -> None:
    if not p >= 1 or (finite and math.isinf(p)):
        interval = "[1, infinity)" if finite else "[1, infinity]"
        raise InputError(f"p: expected an exponent in {interval}, got {p}")


def _check_field(field: str) -> None:
    if field not in ("score", "gap"):
        raise InputError(f"field: expected 'score' or 'gap', got {field!r}")


@dataclasses.dataclass(frozen=True)
class PLaplaceFlux:
    """Inward flux of the score's p-Laplace field through a sphere around the clean image.

    With s the score at noise sigma (or the gap, s under the row's condition minus s under the
    null condition), n uniform on the unit sphere of R^d and r = radius sigma sqrt(d)::

        Phi_p = E_n[|s|^(p-2) s . n]   at x0 + r n
        value = -(sigma^2/r)^(p-1) Phi_p
        raw   = (d/r) Phi_p = mean of Delta_p log p_sigma over the ball |x - x0| < r

    p = 1: ``value`` is the mean cosine between the score and the direction to x0, in [-1, 1].
    In general the displacement sigma^2 s of the denoiser is measured in radii: a point that the
    model has stored, s = (x0 - x)/sigma^2, reads 1 for every p and every radius, and nothing
    changes when data, sigma and score are rescaled together. p = 2 of the score reads one minus
    the ball mean of d_eff/d. p = 1 is blind to the score's length; the larger p, the more it is
    that length that speaks, which is large wherever x0 lies off the model's density, so that
    p = 1 detects best and p > 2 hardly at all.

    ``raw`` is taken in the coordinates x0 + sigma n. In those of a variance-preserving process,
    alpha x0 + alpha sigma n, the same sphere is centered at alpha x0, and theirs = ours /
    alpha^p. The paper's image protocol is p = 1, radius = 1 and 128 directions, of the predicted
    noise -sigma s: its statistic is this ``value``.

    Args:
        sigma: noise level, in the score's units.
        p: exponent, 1 <= p < infinity.
        radius: of the sphere, in units of sigma sqrt(d). 1 puts it where the score was trained;
            inside, less comes from how any image is denoised and more from what lies at x0.
        num_pairs: antithetic pairs n, -n, at least 1. The directions are common to all images.
        field: ``"score"`` or ``"gap"``.

    Raises:
        InputError: an argument out of range.

    Without raising: UNDEFINED where the field is exactly zero at a point and p = 1 (as the gap
    of an unconditional model is everywhere); for p > 1 such a point adds nothing.

    Cost: 2 ``num_pairs`` forward evaluations, twice that for the gap; shared by every p and by
    ``FluxDimension``. The standard error is over pairs, infinite for one pair; near a stored
    point it vanishes.

    References:
        Brokman et al. (2025), arXiv:2505.08246 (the flux, and p = 1 on images). Their directions
        are independent; in antithetic pairs the score at x0 itself, which adds nothing but
        noise, cancels.
    """

    sigma: float
    p: float | int = 1
    radius: float = 0.5
    num_pairs: int = 16
    field: str = "score"
    name: ClassVar[str] = "p_laplace_flux"
    title: ClassVar[str] = "p-Laplace flux"
    raw_name: ClassVar[str] = "ball mean of the p-Laplacian, per data unit^p"
    default_level: ClassVar[float] = 0.1
    statement: ClassVar[str] = (
        "Whether the score around the image points back at it, as it does around a stored image."
    )

    def __post_init__(self):
        check_sigma(self.sigma)
        _check_exponent(self.p, finite=True)
        check_sphere(self.radius, self.num_pairs)
        _check_field(self.field)

    @property
    def ceiling(self) -> float | None:
        """1 for p = 1, a mean of cosines; other exponents have none for learned scores."""
        return 1.0 if self.p == 1 else None

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score at both ends of every pair; for the gap under both conditions."""
        points = sphere_points(self.sigma, self.radius, self.num_pairs, d)
        if self.field == "gap":
            points += sphere_points(self.sigma, self.radius, self.num_pairs, d, "null")
        return tuple(Need(point) for point in points)

    def finish(self, evidence: Evidence) -> Finding:
        """Mean of ``(sigma^2 |s| / r)^(p-1)`` times the cosine."""
        around = field_on_sphere(evidence, self.sigma, self.radius, self.num_pairs, self.field)
        power = self._power()
        safe = jnp.where(around.zero, jnp.ones_like(around.length), around.length)
        value, error = mean_of_pairs(safe**power * around.cosine)
        undefined = jnp.any(around.zero) & (power <= 0)
        raw = self._raw(value, image_size(evidence))
        return finding(value, raw, error, score=around.values, status=undefined_if(undefined))

    def _power(self) -> float | int:
        """Power of the length that multiplies the cosine."""
        return self.p - 1

    def _raw(self, value: Float[Array, ""], d: int) -> Float[Array, ""]:
        r = self.radius * self.sigma * d**0.5
        unit = jnp.asarray(r / self.sigma**2, value.dtype)
        return -value * (d / r) * unit ** (self.p - 1)


@dataclasses.dataclass(frozen=True)
class PublishedPLaplaceFlux(PLaplaceFlux):
    """The statistic of the paper's published code, which is no p-Laplacian unless p = 1.

    With e = -sigma s the predicted noise at x0 + r n, n uniform on the unit sphere::

        raw   = E_n[|e|^(p-2) cos(e, n)],    E_n[cos(e, n)] for p = 1
        value = E_n[(sigma |e|/r)^(p-2) cos(e, n)]

    The flux of |s|^(p-2) s has the power p - 1 of the length beside the cosine: one factor |s|
    is missing here, so that p = 2 repeats p = 1 and p = 3 is the flux for p = 2. Offered for
    comparison with results of that code; ``PLaplaceFlux`` is the formula of the paper. ``raw``
    is the same number in variance-preserving coordinates.

    Args, cost and what is raised are those of ``PLaplaceFlux``. UNDEFINED where the field is
    exactly zero at a point and p <= 2.

    References:
        Brokman et al. (2025), arXiv:2505.08246, code for p = 1, 2, ... on images.
    """

    name: ClassVar[str] = "published_p_laplace_flux"
    title: ClassVar[str] = "p-Laplace flux (published code)"
    raw_name: ClassVar[str] = "mean |e|^(p-2) cos(e, n) of the predicted noise e"

    def _power(self) -> float | int:
        return 0 if self.p == 1 else self.p - 2

    def _raw(self, value: Float[Array, ""], d: int) -> Float[Array, ""]:
        unit = jnp.asarray(self.radius * d**0.5, value.dtype)
        return value * unit ** self._power()


@dataclasses.dataclass(frozen=True)
class PLaplace:
    """p-Laplacian of log p_sigma at the clean image, or averaged over noised versions of it.

    With s the score (or the gap, s under the row's condition minus s under the null condition)
    and H its Jacobian at the same point::

        raw   = |s|^(p-2) [tr H + (p - 2) s^T H s / |s|^2],   s^T H s for p = infinity
        value = -sigma^2 m^q [tr H + (p - 2) s^T H s / |s|^2] / (d + p - 2),   q = min(p - 2, 0)
        value = -sigma^2 s^T H s / |s|^2                                       for p = infinity

    where m = sigma |s| / sqrt(d) is the distance, in units of the noise and per direction, by
    which the denoiser moves the point. From p = 2 on ``value`` is the normalized
    (game-theoretic) p-Laplacian, a weighted mean over all directions of one minus the retained
    variance, and 1 at a stored point: p = 2 weighs all directions alike and is 1 - d_eff/d,
    p = infinity looks along the score alone. For p < 2 it is the p-Laplacian itself, which grows
    without bound where the score vanishes as it does at a stored image: p = 1 is the mean
    curvature of the level set, one over the distance from the mode it lies around, in units of
    sigma sqrt(d). (For p > 2 the power of |s| would turn the order over.)

    ``raw`` is taken in the coordinates x0 + sigma n; a variance-preserving process with signal
    alpha has theirs = ours / alpha^p (alpha^4 for p = infinity).

    Args:
        sigma: noise level, in the score's units.
        p: exponent, 1 <= p <= infinity.
        num_draws: noised images x0 + sigma n to average over, at least 2; 0 for the clean image.
        num_probes: products of Hutchinson's estimator of the trace, at least 2, with probes
            common to all images; ``None`` for the exact trace of images of up to ``exact_limit``
            numbers, and 16 above.
        field: ``"score"`` or ``"gap"``.
        exact_limit: see ``num_probes``.

    Raises:
        InputError: an argument out of range; (from ``needs``) p = 1 for images of one number,
            where level sets have no curvature.

    Without raising: UNDEFINED where the field is zero, at the clean image or at a draw, and p is
    not 2: no direction, or no limit. It counts as zero where rounding the image could turn it
    around, as in ``memjax.p_laplacian``. An exact score vanishes at the points it has stored:
    ask for draws there, or for ``PLaplaceFlux``.

    Cost: for each point one forward evaluation; d jvps, or ``num_probes``, for the trace, unless
    p is infinite; and two jvps unless p = 2. For the gap the double. Everything is shared by all
    p. ``standard_error``: over draws, and over probes, which all draws have in common.

    References:
        Brokman et al. (2025), arXiv:2505.08246. Peres and Sheffield (2008), Tug-of-war with noise,
        arXiv:math/0607761 (the normalized p-Laplacian).
    """

    sigma: float
    p: float | int = 1
    num_draws: int = 0
    num_probes: int | None = None
    field: str = "score"
    exact_limit: int = EXACT_LIMIT
    name: ClassVar[str] = "p_laplace"
    title: ClassVar[str] = "p-Laplacian"
    raw_name: ClassVar[str] = "p-Laplacian, per data unit^p"
    default_level: ClassVar[float] = 0.1
    statement: ClassVar[str] = (
        "How tightly the model's density closes around the image: most around a stored one."
    )

    def __post_init__(self):
        check_sigma(self.sigma)
        _check_exponent(self.p, finite=False)
        _check_field(self.field)
        if self.num_draws < 0 or self.num_draws == 1:
            raise InputError(
                f"num_draws: expected 0, or at least 2 (for an error), got {self.num_draws}"
            )
        Trace(self.num_probes)  # refuses what it cannot take

    def _probes(self, d: int) -> int | None:
        return self.num_probes or (None if d <= self.exact_limit else NUM_PROBES)

    def _points(self) -> tuple[Point, ...]:
        if not self.num_draws:
            return (Point(self.sigma),)
        return tuple(Point(self.sigma, "noised", draw=j) for j in range(self.num_draws))

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score at every point with its trace, its product along itself and its rounding."""
        if d == 1 and self.p == 1:
            raise InputError("p: expected an exponent above 1 for images of one number, got 1")
        traced, along, probes = not math.isinf(self.p), self.p != 2, self._probes(d)
        roundoff: tuple[Product, ...] = (Roundoff(),) if along else ()
        if self.field == "score":
            products = (Trace(probes),) * traced + (AlongScore(),) * along + roundoff
            return tuple(Need(point, products) for point in self._points())
        if probes is None:
            # The trace of a difference, from two that others may want.
            given = null = (Trace(),) * traced
        else:
            given, null = (TraceGap(probes),) * traced, ()
        given += (AlongGap(),) * along + roundoff
        return tuple(
            need
            for point in self._points()
            for need in (Need(point, given), Need(_null(point), null + roundoff))
        )

    def finish(self, evidence: Evidence) -> Finding:
        """The formula at each point, averaged."""
        each = [self._read(evidence, point) for point in self._points()]
        parts = _Parts(*(jnp.stack(column) for column in zip(*each, strict=True)))
        p, d = self.p, image_size(evidence)
        raws, normalized = (
            jax.vmap(partial(p_laplacian_from_parts, p=p, normalized=flag))(*parts[:3])
            for flag in (False, True)
        )
        if math.isinf(p):
            values, slope = -(self.sigma**2) * normalized, jnp.zeros_like(raws)
        else:
            # What multiplies the bracket, and with it an error of its trace.
            moved = self.sigma**2 / d * jnp.where(parts.zero, 1, parts.squared_norm)
            slope = self.sigma**2 / (d + p - 2) * moved ** min(p / 2 - 1, 0)
            values = -slope * p * normalized
        error = jnp.mean(slope * parts.trace_error)
        if self.num_draws:
            error = jnp.hypot(error, jnp.std(values, ddof=1) / self.num_draws**0.5)
        undefined = jnp.any(parts.zero)
        value, raw = (jnp.where(undefined, 0, jnp.mean(each)) for each in (values, raws))
        return finding(value, raw, error, score=parts.squared_norm, status=undefined_if(undefined))

    def _read(self, evidence: Evidence, point: Point) -> "_Parts":
        here = evidence[point]
        other = evidence[_null(point)] if self.field == "gap" else None
        s = here.score if other is None else here.score - other.score
        squared_norm = jnp.sum(s * s)
        none = jnp.zeros_like(squared_norm)
        probes = self._probes(s.size)
        trace, error, curvature, zero = none, none, none, jnp.asarray(False)
        if math.isinf(self.p):
            pass
        elif other is None:
            trace, error = here.products[Trace(probes)]
        elif probes is None:
            trace = here.products[Trace()].value - other.products[Trace()].value
        else:
            trace, error = here.products[TraceGap(probes)]
        if self.p != 2:
            curvature = jnp.sum(s * here.products[AlongScore() if other is None else AlongGap()])
            roundoff = here.products[Roundoff()]
            if other is not None:
                roundoff = roundoff + other.products[Roundoff()]
            zero = (squared_norm <= roundoff**2) & jnp.isfinite(roundoff)
        return _Parts(squared_norm, trace, curvature, error, zero)


class _Parts(NamedTuple):
    """What a p-Laplacian is made of, at one point or at several."""

    squared_norm: Float[Array, "*points"]
    trace: Float[Array, "*points"]
    curvature: Float[Array, "*points"]
    trace_error: Float[Array, "*points"]
    zero: Bool[Array, "*points"]


def _null(point: Point) -> Point:
    return dataclasses.replace(point, condition="null")
