"""Detectors made of detectors: flux and loss on one sphere, and differences.

A difference is between two scores at one image, or between an image and one near it.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax.numpy as jnp

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.detect._sphere import (
    check_sphere,
    field_on_sphere,
    mean_of_pairs,
    sphere_points,
)
from memjax.detect.protocol import (
    Branch,
    Detector,
    Evidence,
    Finding,
    Need,
    Neighbor,
    Point,
    Trajectory,
    check_sigma,
    finding,
    undefined_if,
)
from memjax.detect.sphere_loss import losses_on_sphere

Against = Literal["baseline", "null"]


@dataclasses.dataclass(frozen=True)
class FluxAndLoss:
    """Sum of the p = 1 flux and the sphere loss, each in units of its spread, from the same points.

        value = flux - loss_weight loss,  raw = the same

    with flux the mean cosine between the score and the direction to the image (``PLaplaceFlux``,
    p = 1) and loss the mean of |x0 - D|^2 / (sigma^2 d) (``SphereLoss``). Both know a stored
    image; the flux, which is blind to lengths, sees better how often an image was repeated, the
    loss sees better whether it was seen at all. A stored image reads 1.

    ``loss_weight`` makes this the sum of their z-scores, up to one factor and one constant: at
    sigma = 0.067 data standard deviations and radius = 0.5 the standard deviations of flux and
    loss over digits seen once in training, means of five test beds (seeds 1 to 5 of
    ``memjax.training.graded_testbed``), are 0.042 and 0.026. Neither changes when data, sigma and
    score are rescaled together. Between 1 and 4 the weight hardly matters there.

    Args:
        sigma: noise level announced to the score, in the score's units.
        radius: of the sphere, in units of sigma sqrt(d).
        num_pairs: antithetic pairs n, -n, at least 1. The directions are common to all images.
        loss_weight: what a unit of the loss counts in units of the flux, at least 0.

    Raises:
        InputError: an argument out of range.

    Without raising: UNDEFINED where the score is exactly zero at a point.

    Cost: 2 ``num_pairs`` forward evaluations, shared with ``PLaplaceFlux`` and ``SphereLoss`` at
    the same sigma and radius. The standard error is over pairs, infinite for one pair.
    """

    sigma: float
    radius: float = 0.5
    num_pairs: int = 16
    loss_weight: float | int = 1.6
    name: ClassVar[str] = "flux_and_loss"
    title: ClassVar[str] = "Flux and sphere loss"
    raw_name: ClassVar[str] = "flux minus weighted loss"
    default_level: ClassVar[float] = 0.067
    ceiling: ClassVar[float] = 1.0
    statement: ClassVar[str] = (
        "Whether the score around the image points back at it, and the denoiser returns to it."
    )

    def __post_init__(self):
        check_sigma(self.sigma)
        check_sphere(self.radius, self.num_pairs)
        if not 0.0 <= self.loss_weight < float("inf"):
            raise InputError(
                f"loss_weight: expected a finite number of at least 0, got {self.loss_weight}"
            )

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score at both ends of every pair."""
        points = sphere_points(self.sigma, self.radius, self.num_pairs, d)
        return tuple(Need(point) for point in points)

    def finish(self, evidence: Evidence) -> Finding:
        """Mean over the sphere of the cosine minus the weighted loss."""
        sphere = (evidence, self.sigma, self.radius, self.num_pairs)
        around, losses = field_on_sphere(*sphere), losses_on_sphere(*sphere)
        value, error = mean_of_pairs(around.cosine - self.loss_weight * losses)
        undefined = undefined_if(jnp.any(around.zero))
        return finding(value, value, error, score=around.values, status=undefined)


class _Side(NamedTuple):
    """Which score, and around what."""

    branch: Branch
    neighbor: Neighbor | None


_OWN = _Side(Branch(), None)
"""The audited score, at the image."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A detector's value minus its value, or part of it, under another score or at another image.

        value = value(score, x0) - weight value(other),  raw = raw(score, x0) - weight raw(other)

    What makes an image easy or hard for any model drops out of the difference; what this model
    has learned of it stays. Both values are taken at the same displacements, with the same draws.

    On trained models half a difference is better than a whole one: at a stored image the audited
    model's value hardly depends on the image's difficulty any more, so that all of the other
    value would put back what training has removed. Measured on the graded digits with
    ``PLaplaceFlux`` at sigma = 0.067 data standard deviations, seen once against never, rate at
    1 % false positives: 0.75 without a baseline; against a model that has not seen the images
    0.93 with weight 0.5 and 0.78 with weight 1; against an earlier checkpoint of the same
    training 0.90 and 0.77. Images repeated twice or more, against those seen once, another model
    tells worse than none (rates for twice: 0.63, 0.42 with weight 0.5, 0.22 with weight 1).

    A neighbor needs no other model, and helps with both: half of the flux at the blurred image
    subtracted, 0.88 of those seen once are told from unseen ones instead of 0.81, and 0.70 of
    those that stand twice from those seen once instead of 0.62 (the bench of detectors, 16 pairs).
    It must be no training image itself, as a mirrored image is wherever training mirrored its
    images; and where it is hardly another image, as a smooth one blurred, the difference is merely
    1 - weight of the value. Losses, whose spread at unseen images is far larger than at seen ones,
    bear less weight still.

    Args:
        detector: what is compared; one that looks at one score only, the audited model's under
            the row's own condition, and at the image itself.
        against: ``"baseline"``, another model given the row's own condition, such as an earlier
            checkpoint or one not trained on these images; ``"null"``, the audited model without
            the condition; or a ``Neighbor``, the audited model at an image near by, such as
            ``Blurred()``.
        weight: how much of the other value is subtracted, positive.

    Raises:
        InputError: an argument out of range, or (from ``needs``) a detector that makes a
            comparison itself or, for a neighbor, one that does not look at the image.

    Without raising: fails where the detector fails on either side, with that status.

    Cost: that of the detector, twice; the half at the image under the audited score is shared
    with it. ``standard_error`` adds the two in squares: common draws make the difference more
    precise than that wherever the two scores are alike.

    References:
        Watson, Guo, Cormode, Sablayrolles (2022), "On the importance of difficulty calibration in
        membership inference attacks", arXiv:2111.08440 (another model); Mattern et al. (2023),
        "Membership inference attacks against language models via neighbourhood comparison",
        arXiv:2305.18462 (neighbors, of texts and for the loss).
    """

    detector: Detector
    against: Against | Neighbor = "baseline"
    weight: float | int = 1
    name: ClassVar[str] = "difference"
    title: ClassVar[str] = "Difference"
    raw_name: ClassVar[str] = "difference"
    default_level: ClassVar[float] = 0.1
    statement: ClassVar[str] = "How much more memorized the image looks than under another score."

    def __post_init__(self):
        if not isinstance(self.against, Neighbor) and self.against not in ("baseline", "null"):
            raise InputError(
                f"against: expected 'baseline', 'null' or a neighbor, got {self.against!r}"
            )
        if not 0.0 < self.weight < float("inf"):
            raise InputError(f"weight: expected a positive finite number, got {self.weight}")
        whole = self.weight == 1
        short, other = self._said
        subtracted = short if whole else f"{self.weight:g} {short}"
        over = short if isinstance(self.against, Neighbor) else subtracted
        part = "" if whole else f"{self.weight:g} times the value "
        own = {
            "name": f"{self.detector.name}_over_{subtracted.replace(' ', '_')}",
            "title": f"{self.detector.title} over {over}",
            "raw_name": f"difference of {self.detector.raw_name}",
            "default_level": self.detector.default_level,
            "statement": f"How much larger than {part}{other}: {self.detector.statement}",
        }
        for name, value in own.items():  # what tables and figures call this very difference
            object.__setattr__(self, name, value)

    @property
    def _said(self) -> tuple[str, str]:
        """What it is compared with, in a name and in a sentence."""
        if isinstance(self.against, Neighbor):
            return self.against.name, f"at the {self.against.name} image"
        if self.against == "baseline":
            return "baseline", "under another model"
        return "null", "under the model without a condition"

    @property
    def sigma(self) -> float:
        """That of the detector."""
        return self.detector.sigma

    @property
    def _other(self) -> _Side:
        """What the value is compared with."""
        if isinstance(self.against, Neighbor):
            return _Side(Branch(), self.against)
        if self.against == "baseline":
            return _Side(Branch(model="baseline"), None)
        return _Side(Branch(condition="null"), None)

    def needs(self, d: int) -> tuple[Need, ...]:
        """Those of the detector, for both sides."""
        needs = self.detector.needs(d)
        other = self._other
        for need in needs:
            here = _side(need.point)
            others = (o for product in need.products for o in product.branches(here.branch))
            if here != _OWN or any(branch != Branch() for branch in others):
                raise InputError(
                    "detector: expected one that looks at one score and one image, "
                    f"got {self.detector.name}"
                )
            if other.neighbor is not None and _start(need.point).kind == "pure":
                raise InputError(
                    f"detector: expected one that looks at the image, got {self.detector.name}"
                )
        return (*needs, *(Need(_moved(point, other), products) for point, products in needs))

    def finish(self, evidence: Evidence) -> Finding:
        """The detector's finding on each side, the other's weighted, subtracted."""
        given, other = (
            self.detector.finish(
                {_moved(p, _OWN): e for p, e in evidence.items() if _side(p) == side}
            )
            for side in (_OWN, self._other)
        )
        status = jnp.where(given.status == Status.OK, other.status, given.status)
        failed = status != Status.OK
        value, raw = (
            jnp.where(failed, 0, a - self.weight * b)
            for a, b in ((given.value, other.value), (given.raw, other.raw))
        )
        error = jnp.hypot(given.standard_error, self.weight * other.standard_error)
        return finding(value, raw, error, status=status)


def _start(point: Point | Trajectory) -> Point:
    return point.start if isinstance(point, Trajectory) else point


def _side(point: Point | Trajectory) -> _Side:
    start = _start(point)
    return _Side(start.branch, start.neighbor)


def _moved(point: Point | Trajectory, side: _Side) -> Point | Trajectory:
    """The same on another side."""
    start = dataclasses.replace(_start(point), **side.branch._asdict(), neighbor=side.neighbor)
    return dataclasses.replace(point, start=start) if isinstance(point, Trajectory) else start
