"""Norm of the score at the clean image."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from memjax.detect.protocol import Evidence, Finding, Need, Point, check_sigma, finding


@dataclasses.dataclass(frozen=True)
class ScoreNorm:
    """Minus the dimensionless norm of the score at the clean image.

    value = -sigma |s(x0, sigma)| / sqrt(d),  raw = |s(x0, sigma)|

    sigma |s| is the distance from x0 to its denoised version D(x0) in units of sigma. A stored
    image is a fixed point of the denoiser (the score vanishes on it), so a *small* norm means
    memorized. At a noised point the sign turns over (there the residual of an ordinary image is
    spread over its manifold), which is why this detector looks at the clean image only.

    Args:
        sigma: noise level, in the score's units.

    Raises:
        InputError: sigma is not positive and finite.

    Cost: one forward evaluation. Deterministic.

    References:
        The norm of the score as a measure of sharpness: Jeon, Kim and No, 2025,
        arXiv:2412.04140, Lemma 4.1 (there squared and at noised points).
    """

    sigma: float
    name: ClassVar[str] = "score_norm"
    title: ClassVar[str] = "Score norm"
    raw_name: ClassVar[str] = "|s|, per data unit"
    default_level: ClassVar[float] = 0.1
    ceiling: ClassVar[float] = 0.0
    statement: ClassVar[str] = (
        "How far the denoiser moves the clean image, in units of the noise: "
        "a stored image stays where it is."
    )

    def __post_init__(self):
        check_sigma(self.sigma)

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score at the clean image."""
        return (Need(Point(self.sigma)),)

    def finish(self, evidence: Evidence) -> Finding:
        """``-sigma |s| / sqrt(d)``."""
        s = evidence[Point(self.sigma)].score
        norm = jnp.sqrt(jnp.sum(s * s))
        return finding(-self.sigma * norm / s.size**0.5, norm)
