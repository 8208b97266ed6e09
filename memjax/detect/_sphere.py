"""Antithetic pairs on a sphere around the image: points that several detectors share."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from memjax._core.errors import InputError
from memjax.detect.protocol import Evidence, Point, image_size


def check_sphere(radius: float, num_pairs: int) -> None:
    """Raise unless there is a sphere with pairs on it.

    Args:
        radius: of the sphere, in units of sigma sqrt(d).
        num_pairs: antithetic pairs.

    Raises:
        InputError: the radius is not positive and finite, or there is no pair.
    """
    if not 0.0 < radius < float("inf"):
        raise InputError(f"radius: expected a positive finite number, got {radius}")
    if num_pairs < 1:
        raise InputError(f"num_pairs: expected at least 1, got {num_pairs}")


def sphere_points(
    sigma: float,
    radius: float,
    num_pairs: int,
    d: int,
    condition: Literal["given", "null"] = "given",
) -> tuple[Point, ...]:
    """Draws 0, 1, ... on a sphere, each followed by its antithetic partner.

    Detectors that take their points from here at one noise level and radius share them.

    Args:
        sigma: noise level announced to the score.
        radius: of the sphere, in units of sigma sqrt(d).
        num_pairs: antithetic pairs.
        d: numbers in the image.
        condition: of the score.

    Returns:
        2 ``num_pairs`` points.
    """
    return tuple(
        Point(sigma, "sphere", j, sign, radius * sigma * d**0.5, condition)
        for j in range(num_pairs)
        for sign in (1, -1)
    )


class SphereField(NamedTuple):
    """A field on the sphere, and what its flux is made of.

    Attributes:
        length: sigma^2 |s| / r at both ends of every pair: how far the denoiser moves the point,
            in units of the radius.
        cosine: between s and the direction to the center; 0 where s = 0.
        zero: where s = 0.
        values: s, to be checked for what is not finite.
    """

    length: Float[Array, "m 2"]
    cosine: Float[Array, "m 2"]
    zero: Bool[Array, "m 2"]
    values: Float[Array, "..."]


def field_on_sphere(
    evidence: Evidence, sigma: float, radius: float, num_pairs: int, field: str = "score"
) -> SphereField:
    """Read the evidence at ``sphere_points``.

    Args:
        evidence: the runner's.
        sigma: as for ``sphere_points``.
        radius: as for ``sphere_points``.
        num_pairs: as for ``sphere_points``.
        field: ``"score"``, or ``"gap"``: the given condition's score minus the null one's.

    Returns:
        The score, or the gap, and its parts.
    """
    d = image_size(evidence)
    points = sphere_points(sigma, radius, num_pairs, d)
    s = jnp.stack([evidence[point].score for point in points])
    if field == "gap":
        null = sphere_points(sigma, radius, num_pairs, d, "null")
        s = s - jnp.stack([evidence[point].score for point in null])
    displacement = jnp.stack([evidence[point].displacement for point in points])
    axes = tuple(range(1, s.ndim))
    r = points[0].radius
    moved = s * (sigma**2 / r)
    length = jnp.sqrt(jnp.sum(moved * moved, axis=axes))
    inward = -jnp.sum(moved * (displacement / r), axis=axes)
    zero = length < jnp.finfo(length.dtype).tiny ** 0.5
    cosine = jnp.where(zero, 0, inward / jnp.where(zero, 1, length))
    pairs = (num_pairs, 2)
    return SphereField(length.reshape(pairs), cosine.reshape(pairs), zero.reshape(pairs), s)


def mean_of_pairs(
    values: Float[Array, "m 2"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean over all points, with its standard error over the pairs.

    Args:
        values: one number at both ends of every pair.

    Returns:
        Mean and standard error; one pair has nothing to tell an error from, so it is infinite.
    """
    each = jnp.mean(values, axis=1)
    mean = jnp.mean(each)
    if len(each) == 1:
        return mean, jnp.full_like(mean, jnp.inf)
    return mean, jnp.std(each, ddof=1) / len(each) ** 0.5
