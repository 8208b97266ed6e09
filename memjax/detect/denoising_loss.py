"""Denoising loss: what membership inference looks at, and the baseline of all detectors."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from memjax._core.errors import InputError
from memjax.detect.protocol import Evidence, Finding, Need, Point, check_sigma, finding


@dataclasses.dataclass(frozen=True)
class DenoisingLoss:
    """Minus the denoising loss at one noise level, averaged over shared noises.

    loss_j = |n_j + sigma s(x0 + sigma n_j, sigma)|^2 / d,   n_j ~ N(0, I),  j = 1..num_draws
    value = -mean_j loss_j,   raw = d x mean_j loss_j = mean |eps_hat - eps|^2

    An image that was trained on (often) is denoised better. The noises are the same for every
    image, so that images are compared on equal terms; ``standard_error`` is over the noises.

    Args:
        sigma: noise level, in the score's units.
        num_draws: noises averaged, at least 2.

    Raises:
        InputError: sigma is not positive and finite, or fewer than two draws.

    Cost: ``num_draws`` forward evaluations. Standard error proportional to num_draws^(-1/2).

    References:
        Loss-threshold membership inference: Carlini et al., 2023, arXiv:2301.13188, section 5.
    """

    sigma: float
    num_draws: int = 32
    name: ClassVar[str] = "denoising_loss"
    title: ClassVar[str] = "Denoising loss"
    raw_name: ClassVar[str] = "mean |eps_hat - eps|^2"
    default_level: ClassVar[float] = 0.1
    ceiling: ClassVar[float] = 0.0
    statement: ClassVar[str] = "How badly the model denoises the image: less badly if trained on."

    def __post_init__(self):
        check_sigma(self.sigma)
        if self.num_draws < 2:
            raise InputError(f"num_draws: expected at least 2 (for an error), got {self.num_draws}")

    def _points(self) -> tuple[Point, ...]:
        return tuple(Point(self.sigma, "noised", draw=j) for j in range(self.num_draws))

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score at ``num_draws`` noised versions of the image."""
        return tuple(Need(point) for point in self._points())

    def finish(self, evidence: Evidence) -> Finding:
        """Minus the mean of ``|n + sigma s|^2 / d``."""
        evaluations = [evidence[point] for point in self._points()]
        residual = jnp.stack(
            [e.displacement / self.sigma + self.sigma * e.score for e in evaluations]
        )
        losses = jnp.mean(jnp.square(residual), axis=tuple(range(1, residual.ndim)))
        loss = jnp.mean(losses)
        error = jnp.std(losses, ddof=1) / self.num_draws**0.5
        return finding(-loss, loss * evaluations[0].score.size, error)
