"""Denoising loss on a sphere around the image that is smaller than the announced noise."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.detect._sphere import check_sphere, mean_of_pairs, sphere_points
from memjax.detect.protocol import Evidence, Finding, Need, check_sigma, finding, image_size


@dataclasses.dataclass(frozen=True)
class SphereLoss:
    """Minus the denoising loss where the image is displaced by less noise than is announced.

    With n uniform on the unit sphere of R^d, x = x0 + radius sigma sqrt(d) n and D the denoiser::

        loss  = E_n |x0 - D(x, sigma)|^2 / (sigma^2 d) = E_n |(x - x0)/sigma + sigma s|^2 / d
        value = -loss,  raw = d loss

    Where the score is linear, with H = ds/dx and M = I + sigma^2 H = dD/dx::

        loss = (sigma^2 |s(x0, sigma)|^2 + radius^2 |M|_F^2) / d

    so two signs of a stored image are added: the denoiser leaves the clean image where it is (the
    squared ``ScoreNorm``), and it takes displacements back (|M|_F^2 = 0). The first tells images
    of the training set from others best, the second those that stand in it often. ``radius`` is
    their exchange rate. At 1, which is ``DenoisingLoss`` with the length of the noise held fixed,
    the second drowns the first, and adds what the image's surroundings alone decide; at 0 nothing
    but the first is left.

    Args:
        sigma: noise level announced to the score, in the score's units.
        radius: of the sphere, in units of sigma sqrt(d).
        num_pairs: antithetic pairs n, -n, at least 1. The directions are common to all images.

    Raises:
        InputError: an argument out of range.

    Cost: 2 ``num_pairs`` forward evaluations, shared with ``PLaplaceFlux`` at the same sigma and
    radius. The standard error is over pairs, infinite for one pair. The pairs remove the term
    linear in n.

    References:
        The denoising loss as a sign of membership: Carlini et al. (2023), arXiv:2301.13188,
        Section 5. The smaller displacement is ours.
    """

    sigma: float
    radius: float = 0.5
    num_pairs: int = 16
    name: ClassVar[str] = "sphere_loss"
    title: ClassVar[str] = "Sphere loss"
    raw_name: ClassVar[str] = "|x0 - D|^2 / sigma^2"
    default_level: ClassVar[float] = 0.067
    ceiling: ClassVar[float] = 0.0
    statement: ClassVar[str] = (
        "How far from the image the denoiser ends when it starts beside it: "
        "it returns to a stored image."
    )

    def __post_init__(self):
        check_sigma(self.sigma)
        check_sphere(self.radius, self.num_pairs)

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score at both ends of every pair."""
        points = sphere_points(self.sigma, self.radius, self.num_pairs, d)
        return tuple(Need(point) for point in points)

    def finish(self, evidence: Evidence) -> Finding:
        """Minus the mean of ``|(x - x0)/sigma + sigma s|^2 / d``."""
        losses = losses_on_sphere(evidence, self.sigma, self.radius, self.num_pairs)
        loss, error = mean_of_pairs(losses)
        return finding(-loss, loss * image_size(evidence), error)


def losses_on_sphere(
    evidence: Evidence, sigma: float, radius: float, num_pairs: int
) -> Float[Array, "m 2"]:
    """Denoising loss ``|(x - x0)/sigma + sigma s|^2 / d`` at each of ``sphere_points``.

    Args:
        evidence: the runner's.
        sigma: as for ``sphere_points``.
        radius: as for ``sphere_points``.
        num_pairs: as for ``sphere_points``.

    Returns:
        One number at both ends of every pair.
    """
    points = sphere_points(sigma, radius, num_pairs, image_size(evidence))
    here = [evidence[point] for point in points]
    residual = jnp.stack([e.displacement / sigma + sigma * e.score for e in here])
    losses = jnp.mean(jnp.square(residual), axis=tuple(range(1, residual.ndim)))
    return losses.reshape(num_pairs, 2)
