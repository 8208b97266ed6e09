"""Sharpness: the spectrum of the score's Jacobian, and norms that stand for its sums."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.detect._draws import Draws
from memjax.detect.products import (
    EXACT_LIMIT,
    AlongScore,
    ExtremeEigenvalues,
    Product,
    SpectralQuadrature,
    Spectrum,
)
from memjax.detect.protocol import Evidence, Finding, Need, finding, image_size
from memjax.linalg.quadrature import SpectralDensity

# Every class below has the fields of Draws first; only their defaults differ.


class _Sum(NamedTuple):
    """A sum over the spectrum, averaged over draws."""

    value: Float[Array, ""]
    error: Float[Array, ""]
    seen: Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class _SpectralSum(Draws):
    """sum_i f(sigma^2 lambda_i) over the eigenvalues of (H + H^T)/2 at the draws.

    Args:
        sigma: noise level, in the score's units.
        kind: ``"clean"`` at the image, ``"noised"``, or ``"pure"`` for conditions without image.
        num_draws: noises averaged, common to all images; none at the clean image.
        num_probes: of the quadrature that replaces the dense matrix for large images, at least 2.
        num_steps: Lanczos steps of each probe.
        exact_limit: largest number of pixels for which the dense matrix is used.
    """

    num_probes: int = 16
    num_steps: int = 16
    exact_limit: int = EXACT_LIMIT

    def __post_init__(self):
        super().__post_init__()
        SpectralQuadrature(self.num_probes, self.num_steps)  # refuses what it cannot take

    def _product(self, d: int) -> Product:
        if d <= self.exact_limit:
            return Spectrum()
        return SpectralQuadrature(self.num_probes, self.num_steps)

    def needs(self, d: int) -> tuple[Need, ...]:
        """The spectrum at every draw, exact or by quadrature."""
        return tuple(Need(point, (self._product(d),)) for point in self.points())

    def _sum(self, evidence: Evidence, f: Callable[[Array], Array]) -> _Sum:
        values, errors, seen = [], [], []
        for point in self.points():
            evaluation = evidence[point]
            found = evaluation.products[self._product(evaluation.score.size)]
            if isinstance(found, SpectralDensity):
                estimate = found.trace(lambda nodes: f(self.sigma**2 * nodes))
                value, error, nodes = estimate.value, estimate.standard_error, found.nodes
            else:
                value, nodes = jnp.sum(f(self.sigma**2 * found)), found
                error = jnp.zeros_like(value)
            values.append(value)
            errors.append(error)
            seen.append(jnp.stack([jnp.max(jnp.abs(a)) for a in (nodes, evaluation.score)]))
        mean, error = self.mean(jnp.stack(values), jnp.stack(errors))
        return _Sum(mean, error, jnp.stack(seen))


def _indicator(condition: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda z: condition(z).astype(z.dtype)


@dataclasses.dataclass(frozen=True)
class Sharpness(_SpectralSum):
    """Minus the sum of odd powers of the Hessian's eigenvalues.

    With H = ds/dx, made symmetric, p = ``order`` and the sum over its eigenvalues::

        value = -sigma^(2p) tr H^p / d,   raw = tr H^p

    A stored image has all eigenvalues at the floor -1/sigma^2 and reads 1; a direction that the
    model leaves free adds nothing. The cube weighs pinned directions more. In
    variance-preserving coordinates with signal alpha, theirs = ours / alpha^(2p); ``value`` is
    the same. At order 1 ``value`` is 1 + that of ``EffectiveDimension``: the same ranking.

    Args:
        sigma: noise level, in the score's units.
        kind: ``"clean"`` at the image, ``"noised"`` (as in the paper), or ``"pure"`` for
            conditions without image.
        num_draws: noises averaged, common to all images; none at the clean image.
        num_probes: of the quadrature that replaces the dense matrix for large images, at least 2.
        num_steps: Lanczos steps of each probe; (order + 1)/2 would do for the sum itself.
        exact_limit: largest number of pixels for which the dense matrix is used.
        order: 1 or 3.

    Raises:
        InputError: an argument out of range.

    Cost: per draw one forward evaluation and d jvps, shared by all detectors that use the dense
    matrix; for large images num_probes x num_steps jvps and as many vjps. ``standard_error``:
    over draws, infinite for one, and over probes, which all draws have in common.

    References:
        Jeon, Kim and No (2025), arXiv:2412.04140, lemmas 4.1 and 4.3: -tr H = E|s|^2 and
        -tr H^3 = E|H s|^2 for a Gaussian.
    """

    order: int = 3
    name: ClassVar[str] = "sharpness"
    title: ClassVar[str] = "Sharpness"
    raw_name: ClassVar[str] = "tr H^order, per data unit^(2 order)"
    default_level: ClassVar[float] = 0.1
    statement: ClassVar[str] = (
        "How steeply the model's density falls in all directions: most at a stored image."
    )

    def __post_init__(self):
        super().__post_init__()
        _check_order(self.order)

    def finish(self, evidence: Evidence) -> Finding:
        """``-sigma^(2p) tr H^p / d``."""
        total, d = self._sum(evidence, lambda z: z**self.order), image_size(evidence)
        raw = total.value / self.sigma ** (2 * self.order)
        return finding(-total.value / d, raw, total.error / d, score=total.seen)


@dataclasses.dataclass(frozen=True)
class NegativeShare(_SpectralSum):
    """Share of directions in which log p_sigma bends down.

        value = #{i: sigma^2 lambda_i < -threshold} / d,   raw = their number

    over the eigenvalues lambda_i of H = ds/dx, made symmetric. Threshold 0 is the paper's count;
    where the density is log-concave (a Gaussian) that counts every direction, stored or not.
    Both numbers are the same in variance-preserving coordinates.

    Args:
        sigma: noise level, in the score's units.
        kind: ``"clean"`` at the image, ``"noised"`` (as in the paper), or ``"pure"`` for
            conditions without image.
        num_draws: noises averaged, common to all images; none at the clean image.
        num_probes: of the quadrature that replaces the dense matrix for large images, at least 2.
        num_steps: Lanczos steps of each probe.
        exact_limit: largest number of pixels for which the dense matrix is used.
        threshold: in [0, 1), in units of the floor -1/sigma^2.

    Raises:
        InputError: an argument out of range.

    Without raising: by quadrature a count is blurred by the distance of the nodes, and this
    bias is not in the standard error (``memjax.linalg.SpectralDensity.count_bias`` bounds it).

    Cost and ``standard_error``: as for ``Sharpness``.

    References:
        Jeon, Kim and No (2025), arXiv:2412.04140, section 4.1.
    """

    threshold: float | int = 0.25
    name: ClassVar[str] = "negative_share"
    title: ClassVar[str] = "Negative eigenvalues"
    raw_name: ClassVar[str] = "number of eigenvalues below the threshold"
    default_level: ClassVar[float] = 0.1
    statement: ClassVar[str] = (
        "Share of directions in which the model's density falls: most around a stored image."
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.threshold < 1:
            raise InputError(f"threshold: expected a number in [0, 1), got {self.threshold}")

    def finish(self, evidence: Evidence) -> Finding:
        """Count them."""
        total = self._sum(evidence, _indicator(lambda z: z < -self.threshold))
        d = image_size(evidence)
        return finding(total.value / d, total.value, total.error / d, score=total.seen)


@dataclasses.dataclass(frozen=True)
class FloorShare(_SpectralSum):
    """Share of directions that the model has pinned: eigenvalues at the floor -1/sigma^2.

        value = #{i: 1 + sigma^2 lambda_i <= window} / d,   raw = their number

    over the eigenvalues lambda_i of H = ds/dx, made symmetric. 1 + sigma^2 lambda is the share
    of the noise's variance that the posterior retains in that direction, so this counts
    directions with almost none. d minus ``raw`` is a local dimension. Eigenvalues below the
    floor, which no density has, count as pinned; ``BelowFloor`` counts them alone. Both numbers
    are the same in variance-preserving coordinates.

    Args:
        sigma: noise level, in the score's units.
        kind: ``"clean"`` at the image, ``"noised"`` (as in the paper), or ``"pure"`` for
            conditions without image.
        num_draws: noises averaged, common to all images; none at the clean image.
        num_probes: of the quadrature that replaces the dense matrix for large images, at least 2.
        num_steps: Lanczos steps of each probe.
        exact_limit: largest number of pixels for which the dense matrix is used.
        window: retained variance up to which a direction counts as pinned, in (0, 1).

    Raises:
        InputError: an argument out of range.

    Without raising: by quadrature a count is blurred by the distance of the nodes, and this
    bias is not in the standard error (``memjax.linalg.SpectralDensity.count_bias`` bounds it).

    Cost and ``standard_error``: as for ``Sharpness``.

    References:
        Jeon, Kim and No (2025), arXiv:2412.04140, figure 3: eigenvalues of stored images gather
        near -1/sigma^2.
    """

    window: float = 0.3
    name: ClassVar[str] = "floor_share"
    title: ClassVar[str] = "Pinned directions"
    raw_name: ClassVar[str] = "number of eigenvalues at the floor -1/sigma^2"
    default_level: ClassVar[float] = 0.1
    statement: ClassVar[str] = (
        "Share of directions that the model has pinned: all of them at a stored image."
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.window < 1:
            raise InputError(f"window: expected a number between 0 and 1, got {self.window}")

    def finish(self, evidence: Evidence) -> Finding:
        """Count them."""
        total = self._sum(evidence, _indicator(lambda z: 1 + z <= self.window))
        d = image_size(evidence)
        return finding(total.value / d, total.value, total.error / d, score=total.seen)


@dataclasses.dataclass(frozen=True)
class BelowFloor(_SpectralSum):
    """Share of eigenvalues below the physical floor: a diagnosis of the model, not of the row.

        value = #{i: sigma^2 lambda_i < -(1 + slack)} / d,   raw = their number

    The Hessian of a smoothed density satisfies H >= -1/sigma^2, because a covariance is not
    negative. Where a learned score breaks this, its eigenvalues, traces and dimensions are off
    by at least as much. It is run like a detector, but larger does not mean more memorized.

    Args:
        sigma: noise level, in the score's units.
        kind: ``"clean"`` at the image, ``"noised"`` or ``"pure"``.
        num_draws: noises averaged, common to all images; none at the clean image.
        num_probes: of the quadrature that replaces the dense matrix for large images, at least 2.
        num_steps: Lanczos steps of each probe.
        exact_limit: largest number of pixels for which the dense matrix is used.
        slack: how far below the floor still counts as rounding, at least 0.

    Raises:
        InputError: an argument out of range.

    Cost and ``standard_error``: as for ``Sharpness``.

    References:
        Second-order Tweedie formula: Cov[x0 | x] = sigma^2 (1 + sigma^2 H).
    """

    slack: float | int = 0.01
    name: ClassVar[str] = "below_floor"
    title: ClassVar[str] = "Eigenvalues below the floor"
    raw_name: ClassVar[str] = "number of eigenvalues below -1/sigma^2"
    default_level: ClassVar[float] = 0.1
    statement: ClassVar[str] = "Share of directions in which the score is that of no density."

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.slack < float("inf"):
            raise InputError(f"slack: expected a number of at least 0, got {self.slack}")

    def finish(self, evidence: Evidence) -> Finding:
        """Count them."""
        total = self._sum(evidence, _indicator(lambda z: z < -(1 + self.slack)))
        d = image_size(evidence)
        return finding(total.value / d, total.value, total.error / d, score=total.seen)


@dataclasses.dataclass(frozen=True)
class ExtremeEigenvalue(Draws):
    """Minus the variance retained in the model's freest (or most pinned) direction.

        value = -(1 + sigma^2 lambda),   raw = lambda

    with lambda the largest or smallest eigenvalue of H = ds/dx, made symmetric. At a stored
    image even the largest is at the floor -1/sigma^2, and ``value`` is 0; at an ordinary one some
    direction is free, and it is about -1. The smallest is near the floor wherever the data fill
    fewer dimensions than there are pixels, and tells less. ``raw``: theirs = ours / alpha^2 in
    variance-preserving coordinates with signal alpha; ``value`` is the same.

    Args:
        sigma: noise level, in the score's units.
        kind: ``"clean"`` at the image, ``"noised"`` (as in the paper), or ``"pure"`` for
            conditions without image.
        num_draws: noises averaged, common to all images; none at the clean image.
        which: ``"largest"`` or ``"smallest"``.
        num_products: Lanczos products for large images.
        tolerance: largest bound on the error of ``value`` that is accepted.
        exact_limit: largest number of pixels for which the dense matrix is used.

    Raises:
        InputError: an argument out of range.

    Without raising: NOT_CONVERGED where ``num_products`` leave a bound above ``tolerance``.

    Accuracy: an eigenvalue lies within the bound; that it is the extreme one is certain for the
    dense matrix and all but certain otherwise. ``standard_error`` is over draws (infinite for
    one), with the bound added for large images.

    Cost: per draw one forward evaluation and d jvps, shared by all detectors that use the dense
    matrix; for large images ``num_products`` jvps and as many vjps.

    References:
        Jeon, Kim and No (2025), arXiv:2412.04140, section 4.1, there by Arnoldi without bounds.
    """

    which: str = "largest"
    num_products: int = 32
    tolerance: float = 0.05
    exact_limit: int = EXACT_LIMIT
    name: ClassVar[str] = "extreme_eigenvalue"
    title: ClassVar[str] = "Extreme eigenvalue"
    raw_name: ClassVar[str] = "eigenvalue of H, per squared data unit"
    default_level: ClassVar[float] = 0.1
    statement: ClassVar[str] = (
        "Freedom that the model leaves in its freest direction: none at a stored image."
    )

    def __post_init__(self):
        super().__post_init__()
        self._lanczos()  # refuses what it cannot take
        if not self.tolerance > 0:
            raise InputError(f"tolerance: expected a positive number, got {self.tolerance}")

    def _lanczos(self) -> ExtremeEigenvalues:
        return ExtremeEigenvalues(1, self.which, self.num_products)

    def needs(self, d: int) -> tuple[Need, ...]:
        """The spectrum, or its end, at every draw."""
        product = Spectrum() if d <= self.exact_limit else self._lanczos()
        return tuple(Need(point, (product,)) for point in self.points())

    def finish(self, evidence: Evidence) -> Finding:
        """``-(1 + sigma^2 lambda)``, averaged over draws."""
        evaluations = [evidence[point] for point in self.points()]
        if evaluations[0].score.size <= self.exact_limit:
            end = -1 if self.which == "largest" else 0
            raws = jnp.stack([e.products[Spectrum()][end] for e in evaluations])
            bounds = jnp.zeros_like(raws)
        else:
            found = [e.products[self._lanczos()] for e in evaluations]
            raws = jnp.stack([extremes.values[0] for extremes in found])
            bounds = self.sigma**2 * jnp.stack([extremes.residuals[0] for extremes in found])
        mean, error = self.mean(-(1 + self.sigma**2 * raws), bounds)
        converged = jnp.all(bounds <= self.tolerance)
        status = jnp.where(converged, jnp.int32(Status.OK), jnp.int32(Status.NOT_CONVERGED))
        score = jnp.stack([e.score for e in evaluations])
        return finding(mean, jnp.mean(raws), error, score=score, status=status)


@dataclasses.dataclass(frozen=True)
class SharpnessProxy(Draws):
    """Norms of the score that stand for the sharpness on average over noised points.

        order 1:  value = sigma^2 mean_j |s|^2 / d,     raw = mean_j |s|^2,    E raw = -E tr H
        order 3:  value = sigma^6 mean_j |H s|^2 / d,   raw = mean_j |H s|^2,  E raw = -E tr H^3

    at x0 + sigma n_j. The expectations are over x ~ p_sigma: the first holds for every density,
    the second for a Gaussian. Far fewer products than the spectrum needs. At the clean image the
    order turns over (a stored image is where the score vanishes), which is why there is no such
    point here; ``ScoreNorm`` looks there. ``raw``: theirs = ours / alpha^2 and ours / alpha^6 in
    variance-preserving coordinates with signal alpha; ``value`` is the same.

    Args:
        sigma: noise level, in the score's units.
        kind: ``"noised"``, or ``"pure"`` for conditions without image.
        num_draws: noises averaged, common to all images.
        order: 1 or 3.

    Raises:
        InputError: an argument out of range.

    Cost: per draw one forward evaluation, and one jvp at order 3. ``standard_error`` is over
    draws, infinite for one.

    References:
        Jeon, Kim and No (2025), arXiv:2412.04140, lemmas 4.1 and 4.3.
    """

    kind: str = "noised"
    num_draws: int = 16
    order: int = 3
    name: ClassVar[str] = "sharpness_proxy"
    title: ClassVar[str] = "Sharpness from the score"
    raw_name: ClassVar[str] = "|s|^2 or |H s|^2, per data unit^(2 order)"
    default_level: ClassVar[float] = 0.1
    statement: ClassVar[str] = (
        "How steeply the model's density falls around the noised image: most near a stored one."
    )

    def __post_init__(self):
        super().__post_init__()
        _check_order(self.order)
        if self.kind == "clean":
            raise InputError("kind: expected 'noised' or 'pure', got 'clean'")

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score at every draw, and its product along itself."""
        products = (AlongScore(),) if self.order == 3 else ()
        return tuple(Need(point, products) for point in self.points())

    def finish(self, evidence: Evidence) -> Finding:
        """Mean square, in units of the noise."""
        evaluations = [evidence[point] for point in self.points()]
        vectors = [e.products[AlongScore()] if self.order == 3 else e.score for e in evaluations]
        scaled = self.sigma**self.order * jnp.stack(vectors)
        d, axes = evaluations[0].score.size, tuple(range(1, scaled.ndim))
        mean, error = self.mean(jnp.sum(scaled * scaled, axis=axes))
        raw = mean / self.sigma ** (2 * self.order)
        score = jnp.stack([e.score for e in evaluations])
        return finding(mean / d, raw, error / d, score=score)


def _check_order(order: int) -> None:
    if order not in (1, 3):
        raise InputError(f"order: expected 1 or 3, got {order}")
