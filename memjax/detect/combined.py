"""Detectors made of detectors: a difference between two scores."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.detect.protocol import (
    Branch,
    Detector,
    Evidence,
    Finding,
    Need,
    Point,
    Trajectory,
    finding,
)

Against = Literal["baseline", "null"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A detector's value under the audited score minus its value under another.

        value = value(score) - value(other),  raw = raw(score) - raw(other)

    What makes an image easy or hard for any model drops out of the difference; what this model
    has learned of it stays. Both scores are evaluated at the same points, with the same draws.

    Args:
        detector: what is compared; one that looks at one score only, the audited model's under
            the row's own condition.
        against: ``"baseline"``, another model given the row's own condition, such as an earlier
            checkpoint or one not trained on these images; or ``"null"``, the audited model
            without the condition.

    Raises:
        InputError: another ``against``, or (from ``needs``) a detector that compares scores
            itself.

    Without raising: fails where the detector fails under either score, with that status.

    Cost: that of the detector, twice; the half under the audited score is shared with it.
    ``standard_error`` adds the two in squares: common draws make the difference more precise
    than that wherever the two scores are alike.

    References:
        Watson, Guo, Cormode, Sablayrolles (2022), "On the importance of difficulty calibration in
        membership inference attacks", arXiv:2111.08440.
    """

    detector: Detector
    against: Against = "baseline"
    name: ClassVar[str] = "difference"
    title: ClassVar[str] = "Difference"
    raw_name: ClassVar[str] = "difference"
    default_level: ClassVar[float] = 0.1
    statement: ClassVar[str] = "How much more memorized the image looks than under another score."

    def __post_init__(self):
        if self.against not in ("baseline", "null"):
            raise InputError(f"against: expected 'baseline' or 'null', got {self.against!r}")
        other = "another model" if self.against == "baseline" else "the model without a condition"
        own = {
            "name": f"{self.detector.name}_over_{self.against}",
            "title": f"{self.detector.title} over {self.against}",
            "raw_name": f"difference of {self.detector.raw_name}",
            "default_level": self.detector.default_level,
            "statement": f"How much larger than under {other}: {self.detector.statement}",
        }
        for name, value in own.items():  # what tables and figures call this very difference
            object.__setattr__(self, name, value)

    @property
    def sigma(self) -> float:
        """That of the detector."""
        return self.detector.sigma

    @property
    def _branch(self) -> Branch:
        """The other score."""
        if self.against == "baseline":
            return Branch(model="baseline")
        return Branch(condition="null")

    def needs(self, d: int) -> tuple[Need, ...]:
        """Those of the detector, for both scores."""
        needs = self.detector.needs(d)
        for need in needs:
            here = _start(need.point).branch
            others = (o for product in need.products for o in product.branches(here))
            if any(branch != Branch() for branch in (here, *others)):
                raise InputError(
                    f"detector: expected one that looks at one score, got {self.detector.name}"
                )
        other = self._branch
        return (*needs, *(Need(_moved(point, other), products) for point, products in needs))

    def finish(self, evidence: Evidence) -> Finding:
        """The detector's finding under each score, subtracted."""
        given, other = (
            self.detector.finish(
                {_moved(p, Branch()): e for p, e in evidence.items() if _start(p).branch == branch}
            )
            for branch in (Branch(), self._branch)
        )
        status = jnp.where(given.status == Status.OK, other.status, given.status)
        failed = status != Status.OK
        value, raw = (
            jnp.where(failed, 0, a - b)
            for a, b in ((given.value, other.value), (given.raw, other.raw))
        )
        error = jnp.hypot(given.standard_error, other.standard_error)
        return finding(value, raw, error, status=status)


def _start(point: Point | Trajectory) -> Point:
    return point.start if isinstance(point, Trajectory) else point


def _moved(point: Point | Trajectory, branch: Branch) -> Point | Trajectory:
    """The same under another score."""
    start = dataclasses.replace(_start(point), **branch._asdict())
    return dataclasses.replace(point, start=start) if isinstance(point, Trajectory) else start
