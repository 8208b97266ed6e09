"""Volume growth along the probability flow, as a share of what a stored point reaches."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from memjax._core.checks import check_count
from memjax._core.errors import InputError
from memjax.detect._draws import Draws
from memjax.detect.products import EXACT_LIMIT, NUM_PROBES
from memjax.detect.protocol import Evidence, Finding, Need, Trajectory, finding
from memjax.diffusion.volume import VolumeGrowth

_STEP = 8**0.5
"""Factor of noise in one step unless told otherwise."""


@dataclasses.dataclass(frozen=True)
class NormalizedVolumeGrowth(Draws):
    """How much the probability flow stretches volume around an image, relative to its ceiling.

    The flow carries a point x_j at noise sigma to x(sigma1) at sigma1 = ratio sigma, and L_j is
    the log volume growth there, with M = I + sigma^2 H the retained-variance operator::

        L_j = log |det dx(sigma1)/dx(sigma)| = integral of (d - tr M) over log sigma
        raw = mean_j L_j, in nats,    value = raw / (d log ratio)

    An image whose neighborhood fills more of the noise is drawn more often. 1 is a point stored
    alone at every level passed; an exact score gives no more, one that was learned may. A mean
    over directions, it tells how often an image was repeated and hardly whether it was seen
    once, and it takes simple images (smooth, empty) for stored ones: compare with another model
    or the null condition (``Difference``). In a variance-preserving model the log volume is
    ``raw`` plus d log(alpha(sigma1)/alpha(sigma)); the published statistic is that of k random
    directions from t = 0.001 to 1 (``memjax.volume_growth_edges``).

    Where it starts: ``"clean"`` at the image, which no sample of p_sigma is, ``"noised"`` at
    x0 + sigma n, typical ones, averaged; ``"pure"`` at sigma n, image-free, for conditions. The
    rule is Heun's on equal steps of log sigma.

    Args:
        sigma: noise level at which it starts, in the score's units.
        kind: ``"clean"``, ``"noised"`` or ``"pure"``.
        num_draws: noises averaged, common to all images; none at the clean image.
        ratio: noise at which it ends, over sigma; > 1. Nothing compares it with the range that
            the model was trained on.
        num_steps: of Heun's rule; ``None`` for one a factor of 2.8, two for the default ratio.
        num_probes: products of Hutchinson's estimator of the trace, at least 2, by random signs
            that are common to all images and levels; ``None`` for the exact trace up to d = 1024
            and 16 of them above.

    Raises:
        InputError: an argument out of range.

    Without raising: a score that is not finite somewhere along the way gives ``NONFINITE``. The
    number of evaluations is fixed, so that no field is too stiff to end; nothing is told of the
    error of the rule, which is of second order in the step. ``memjax.volume_growth`` estimates
    it, and adapts.

    Cost: 2 ``num_steps`` + 1 evaluations a draw, each one forward and d jvps or the probes.
    ``standard_error`` is over draws and probes, infinite for one noise. All draws have the probes
    in common, whose part is counted in full: an upper estimate.

    References:
        Hasegawa and Yasuda (2025), arXiv:2503.19429 (the quantity); Song et al. (2021),
        arXiv:2011.13456, Appendix D.2 (the integral).
    """

    ratio: float | int = 3.0
    num_steps: int | None = None
    num_probes: int | None = None
    name: ClassVar[str] = "volume_growth"
    title: ClassVar[str] = "Volume growth"
    raw_name: ClassVar[str] = "log volume growth, nats"
    default_level: ClassVar[float] = 0.05
    statement: ClassVar[str] = (
        "How much of the noise the image's neighborhood fills: all it can, where it is stored."
    )

    def __post_init__(self):
        super().__post_init__()
        if not 1 < self.ratio < math.inf:
            raise InputError(f"ratio: expected a finite number above 1, got {self.ratio}")
        if self.num_steps is not None:
            check_count("num_steps", self.num_steps, 1)
        if self.num_probes is not None:
            check_count("num_probes", self.num_probes, 2)

    def needs(self, d: int) -> tuple[Need, ...]:
        """One flow from every draw."""
        return tuple(Need(flow) for flow in self._flows(d))

    def finish(self, evidence: Evidence) -> Finding:
        """Mean log volume growth over its ceiling."""
        d = next(e.point.size for e in evidence.values() if isinstance(e, VolumeGrowth))
        growths = [evidence[flow] for flow in self._flows(d)]
        log_volumes = jnp.stack([growth.log_volume for growth in growths])
        errors = jnp.stack([growth.standard_error for growth in growths])
        status = jnp.max(jnp.stack([growth.status for growth in growths]))
        mean, error = self.mean(log_volumes, errors)
        ceiling = growths[0].ceiling
        return finding(mean / ceiling, mean, error / ceiling, status=status)

    def _flows(self, d: int) -> tuple[Trajectory, ...]:
        steps = self.num_steps or max(1, math.ceil(math.log(self.ratio, _STEP) - 1e-9))
        probes = self.num_probes or (None if d <= EXACT_LIMIT else NUM_PROBES)
        return tuple(
            Trajectory(
                point,
                self.ratio * self.sigma,
                solver="heun",
                num_steps=steps,
                divergence="hutchinson" if probes else "exact",
                num_products=probes or NUM_PROBES,
            )
            for point in self.points()
        )
