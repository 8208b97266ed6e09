"""Points that are one image, several noised versions of it, or pure noise."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax._core.checks import check_count
from memjax._core.errors import InputError
from memjax.detect.protocol import Point, check_sigma


@dataclasses.dataclass(frozen=True)
class Draws:
    """Where a statistic is taken: settings that several detectors have in common.

    Detectors that take their points from here at one noise level share them.

    Args:
        sigma: noise level, in the score's units.
        kind: ``"clean"`` at the image x0, ``"noised"`` at x0 + sigma n, ``"pure"`` at sigma n
            wherever x0 lies.
        num_draws: noises n, common to all images; at the clean image there are none.

    Raises:
        InputError: an argument out of range.
    """

    sigma: float
    kind: str = "clean"
    num_draws: int = 1

    def __post_init__(self):
        check_sigma(self.sigma)
        if self.kind not in ("clean", "noised", "pure"):
            raise InputError(f"kind: expected 'clean', 'noised' or 'pure', got {self.kind!r}")
        check_count("num_draws", self.num_draws, 1)

    def points(self, condition: Literal["given", "null"] = "given") -> tuple[Point, ...]:
        """One point for each draw.

        Args:
            condition: of the score.

        Returns:
            ``num_draws`` points, or the clean image alone.
        """
        if self.kind == "clean":
            return (Point(self.sigma, condition=condition),)
        kind, radius = ("pure", self.sigma) if self.kind == "pure" else ("noised", 0.0)
        return tuple(
            Point(self.sigma, kind, draw=j, radius=radius, condition=condition)
            for j in range(self.num_draws)
        )

    def mean(
        self, values: Float[Array, " draws"], errors: Float[Array, " draws"] | None = None
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Mean over the draws with its standard error.

        Args:
            values: one number a draw.
            errors: standard errors of the numbers themselves, from probes that all draws have in
                common, so that averaging does not make them smaller.

        Returns:
            Mean and standard error: zero for the clean image alone, infinite for a single noise,
            which has nothing to tell an error from.
        """
        mean = jnp.mean(values)
        if self.kind == "clean":
            error = jnp.zeros_like(mean)
        elif self.num_draws == 1:
            error = jnp.full_like(mean, jnp.inf)
        else:
            error = jnp.std(values, ddof=1) / self.num_draws**0.5
        return mean, error if errors is None else jnp.hypot(error, jnp.mean(errors))
