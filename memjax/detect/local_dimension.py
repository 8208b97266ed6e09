"""Local dimension of the model's density: effective dimension, FLIPD, from the flux; profiles."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from memjax._core.errors import InputError
from memjax.detect._sphere import (
    check_sphere,
    field_on_sphere,
    mean_of_pairs,
    sphere_points,
)
from memjax.detect.evaluate import evaluate_detectors
from memjax.detect.products import EXACT_LIMIT, NUM_PROBES, Trace
from memjax.detect.protocol import (
    Evidence,
    Finding,
    Need,
    Point,
    check_sigma,
    finding,
    image_size,
    undefined_if,
)
from memjax.diffusion.combine import Score


@dataclasses.dataclass(frozen=True)
class _CleanTrace:
    """What both need: the score and its divergence at the clean image, from one linearization."""

    sigma: float
    num_probes: int | None = None
    exact_limit: int = EXACT_LIMIT
    default_level: ClassVar[float] = 0.1

    def __post_init__(self):
        check_sigma(self.sigma)
        Trace(self.num_probes)  # refuses what it cannot take

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score and its divergence at the clean image."""
        return (Need(Point(self.sigma), (self._trace(d),)),)

    def _trace(self, d: int) -> Trace:
        return Trace(self.num_probes or (None if d <= self.exact_limit else NUM_PROBES))


@dataclasses.dataclass(frozen=True)
class EffectiveDimension(_CleanTrace):
    """Minus the share of directions that the model leaves free at the clean image.

    d_eff(x0, sigma) = d + sigma^2 tr H(x0, sigma) = tr Cov[x0 | x] / sigma^2,  H = ds/dx
    value = -d_eff / d,  raw = tr H = Laplacian of log p_sigma

    For an exact score d_eff >= 0: near 0 at a stored image (its posterior is a point), about
    the local dimension of the data at an ordinary one, once sigma is below the spread of the
    data.

    Args:
        sigma: noise level, in the score's units.
        num_probes: products of Hutchinson's estimator of the trace, at least 2, with probes
            common to all images; ``None`` for the exact trace of images of up to ``exact_limit``
            numbers, and 16 above.
        exact_limit: see there.

    Raises:
        InputError: sigma is not positive and finite, or fewer than two probes.

    Cost: one forward evaluation and d jvps, or one for each probe. Deterministic if exact.

    References:
        Second-order Tweedie formula; the Laplacian is p = 2 of Brokman et al., 2025,
        arXiv:2505.08246.
    """

    name: ClassVar[str] = "effective_dimension"
    title: ClassVar[str] = "Effective dimension"
    raw_name: ClassVar[str] = "tr H, per squared data unit"
    statement: ClassVar[str] = (
        "How many directions the model leaves free at the image: near none at a stored one."
    )

    def finish(self, evidence: Evidence) -> Finding:
        """``-(1 + sigma^2 tr H / d)``."""
        evaluation = evidence[Point(self.sigma)]
        trace, error = evaluation.products[self._trace(evaluation.score.size)]
        scale = self.sigma**2 / evaluation.score.size
        return finding(-(1 + scale * trace), trace, scale * error, score=evaluation.score)


@dataclasses.dataclass(frozen=True)
class FLIPD(_CleanTrace):
    """Minus the local intrinsic dimension estimated by FLIPD, as a share of d.

    FLIPD(x0, sigma) = d + sigma^2 (tr H(x0, sigma) + |s(x0, sigma)|^2)
    value = -FLIPD / d,  raw = FLIPD, a number of dimensions

    It is the slope of log p_sigma(x0) against log sigma, plus d: 0 where the model has stored
    a point, the dimension of the data's manifold elsewhere, larger where the image is off the
    model's manifold. In a variance-preserving model it is the same number: both terms are free
    of the coordinate scale.

    Args:
        sigma: noise level, in the score's units.
        num_probes: products of Hutchinson's estimator of the trace, at least 2, with probes
            common to all images; ``None`` for the exact trace of images of up to ``exact_limit``
            numbers, and 16 above.
        exact_limit: see there.

    Raises:
        InputError: sigma is not positive and finite, or fewer than two probes.

    Cost: one forward evaluation and d jvps, or one for each probe; shared with
    ``EffectiveDimension`` at the same sigma. Deterministic if exact.

    References:
        Kamkari et al., 2024, arXiv:2406.03537; as a sign of memorization: Ross et al., 2025,
        arXiv:2411.00113.
    """

    name: ClassVar[str] = "flipd"
    title: ClassVar[str] = "FLIPD local dimension"
    raw_name: ClassVar[str] = "FLIPD, dimensions"
    statement: ClassVar[str] = (
        "Local dimension of the model's density at the image: near zero where it stored a point."
    )

    def finish(self, evidence: Evidence) -> Finding:
        """``-(1 + sigma^2 (tr H + |s|^2) / d)``."""
        evaluation = evidence[Point(self.sigma)]
        s, d = evaluation.score, evaluation.score.size
        trace, error = evaluation.products[self._trace(d)]
        flipd = d + self.sigma**2 * (trace + jnp.sum(s * s))
        return finding(-flipd / d, flipd, self.sigma**2 * error / d)


@dataclasses.dataclass(frozen=True)
class FluxDimension:
    """Minus the local dimension read off the p = 1 flux around the clean image, as a share of d.

    With n uniform on the unit sphere, r = radius sigma sqrt(d) and A the mean cosine between the
    score and the direction to x0 (the ``value`` of ``PLaplaceFlux`` at p = 1)::

        A = -E_n[s . n / |s|]   at x0 + r n
        value = -(1 - A^2),  raw = d (1 - A^2), a number of dimensions;  A < 0 counts as 0

    Where the density is flat along m dimensions the score points back along the other d - m, and
    A is the mean length of n's part across, about sqrt(1 - m/d): on a flat manifold it needs no
    derivative, and it does not change when the score is multiplied by a positive number. Off the
    manifold it grows, as FLIPD does: an attractor at distance a from x0 reads about
    d a^2 / (a^2 + r^2). ``raw`` is the same number in variance-preserving coordinates.

    Args:
        sigma: noise level, in the score's units.
        radius: of the sphere, in units of sigma sqrt(d).
        num_pairs: antithetic pairs n, -n, at least 1. The directions are common to all images.

    Raises:
        InputError: an argument out of range.

    Without raising: UNDEFINED where the score is exactly zero at a point.

    Accuracy: on a flat manifold the dimension comes out too large by about m/(2d), because a mean
    length is squared. The standard error is over pairs, to first order in that of A, and infinite
    for one pair.

    Cost: 2 ``num_pairs`` forward evaluations, all shared with ``PLaplaceFlux``.

    References:
        Closed form of the p = 1 flux of Brokman et al. (2025), arXiv:2505.08246, on a flat
        manifold; ours.
    """

    sigma: float
    radius: float = 0.5
    num_pairs: int = 16
    name: ClassVar[str] = "flux_dimension"
    title: ClassVar[str] = "Flux dimension"
    raw_name: ClassVar[str] = "flux dimension, dimensions"
    default_level: ClassVar[float] = 0.1
    statement: ClassVar[str] = (
        "Local dimension read off the score around the image: near zero where it stored a point."
    )

    def __post_init__(self):
        check_sigma(self.sigma)
        check_sphere(self.radius, self.num_pairs)

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score at both ends of every pair."""
        points = sphere_points(self.sigma, self.radius, self.num_pairs, d)
        return tuple(Need(point) for point in points)

    def finish(self, evidence: Evidence) -> Finding:
        """``A^2 - 1``."""
        around = field_on_sphere(evidence, self.sigma, self.radius, self.num_pairs)
        mean, error = mean_of_pairs(around.cosine)
        inward = jnp.maximum(mean, 0)
        value = jnp.square(inward) - 1
        return finding(
            value,
            -value * image_size(evidence),
            error if self.num_pairs == 1 else 2 * inward * error,
            score=around.values,
            status=undefined_if(jnp.any(around.zero)),
        )


class Dimensions(NamedTuple):
    """A number of dimensions at every noise level of a profile.

    Attributes:
        value: the dimension, not divided by d and not turned over as a detector's value is.
        standard_error: over the random draws; 0 where nothing is random.
        status: a ``memjax.Status`` code; ``value`` is NaN unless it is ``OK``.
    """

    value: Float[Array, " levels"]
    standard_error: Float[Array, " levels"]
    status: Int[Array, " levels"]


class DimensionProfile(NamedTuple):
    """Local dimensions of a model's density at one image, level by level.

    Attributes:
        sigmas: noise levels, in the score's units, in the order they were given.
        effective: d + sigma^2 tr H, see ``EffectiveDimension``.
        flipd: the same plus sigma^2 |s|^2, see ``FLIPD``.
        flux: d (1 - A^2), see ``FluxDimension``.
    """

    sigmas: Float[Array, " levels"]
    effective: Dimensions
    flipd: Dimensions
    flux: Dimensions


def dimension_profile(
    score: Score,
    x: Float[Array, "..."],
    sigmas: Sequence[float],
    *,
    key: PRNGKeyArray,
    condition: PyTree = None,
    num_probes: int | None = None,
    radius: float = 0.5,
    num_pairs: int = 16,
) -> DimensionProfile:
    """Local dimensions at one image over noise levels: at which scale has the model stored it?

    All three estimates are near 0 at levels where the image is a stored point, and near the
    dimension of the data's manifold where it is not. The level at which they rise is the
    distance, per direction, at which the model begins to see other images. Pure and traceable,
    for one image: ``jit`` and ``vmap`` it, with the score an argument of the jitted function.

    Args:
        score: ``(x, sigma, condition=None) -> s`` in EDM coordinates; a ``Model`` will do.
        x: one clean image, of the model's event shape.
        sigmas: noise levels, in the score's units, at least one. Static.
        key: randomness, common to all levels; share it between images too.
        condition: the image's own condition; ``None`` for the model's null condition.
        num_probes: of the trace, as for ``FLIPD``; ``None`` for the exact trace. Static.
        radius: of the flux's sphere, in units of sigma sqrt(d). Static.
        num_pairs: of the flux, as for ``FluxDimension``. Static.

    Returns:
        The three profiles with their errors.

    Raises:
        InputError: no level, or an argument that the detectors refuse.

    Cost: at each level one forward evaluation, d jvps (or ``num_probes``) and 2 ``num_pairs``
    forward evaluations.

    >>> import jax
    >>> flat = lambda x, sigma, condition=None: x * jnp.array([0.0, -1, -1]) / sigma**2
    >>> profile = dimension_profile(flat, jnp.zeros(3), (0.1, 1.0), key=jax.random.key(0))
    >>> profile.flipd.value.round(5).tolist()
    [1.0, 1.0]

    References:
        Kamkari et al., 2024, arXiv:2406.03537 (FLIPD over noise levels).
    """
    if not sigmas:
        raise InputError("sigmas: expected at least one noise level, got none")
    detectors = tuple(
        detector
        for sigma in sigmas
        for detector in (
            EffectiveDimension(sigma, num_probes, x.size),
            FLIPD(sigma, num_probes, x.size),
            FluxDimension(sigma, radius, num_pairs),
        )
    )
    found = evaluate_detectors(score, x, detectors, key=key, condition=condition)

    def profile(first: int) -> Dimensions:
        value, _, error, status = map(jnp.stack, zip(*found[first::3], strict=True))
        return Dimensions(-x.size * value, x.size * error, status)

    return DimensionProfile(jnp.asarray(sigmas, x.dtype), profile(0), profile(1), profile(2))
