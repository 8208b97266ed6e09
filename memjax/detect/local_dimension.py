"""Local dimension of the model's density: effective dimension and FLIPD."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from memjax.detect.products import Trace
from memjax.detect.protocol import Evidence, Finding, Need, Point, check_sigma, finding


@dataclasses.dataclass(frozen=True)
class _CleanTrace:
    """What both need: the score and its divergence at the clean image, from one linearization."""

    sigma: float
    num_probes: int | None = None
    default_level: ClassVar[float] = 0.1

    def __post_init__(self):
        check_sigma(self.sigma)
        Trace(self.num_probes)  # refuses what it cannot take

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score and its divergence at the clean image."""
        return (Need(Point(self.sigma), (Trace(self.num_probes),)),)


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
            common to all images; ``None`` for the exact trace.

    Raises:
        InputError: sigma is not positive and finite, or fewer than two probes.

    Cost: one forward evaluation and d jvps, or ``num_probes``. Deterministic if exact.

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
        trace, error = evaluation.products[Trace(self.num_probes)]
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
            common to all images; ``None`` for the exact trace.

    Raises:
        InputError: sigma is not positive and finite, or fewer than two probes.

    Cost: one forward evaluation and d jvps, or ``num_probes``; shared with ``EffectiveDimension``
    at the same sigma. Deterministic if exact.

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
        trace, error = evaluation.products[Trace(self.num_probes)]
        flipd = d + self.sigma**2 * (trace + jnp.sum(s * s))
        return finding(-flipd / d, flipd, self.sigma**2 * error / d)
