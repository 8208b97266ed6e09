"""A detector's value less what the difficulty of the image makes expect: images tell each other."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from memjax.detect.protocol import Detector
from memjax.evaluate.difficulty import excess_over_difficulty


@dataclasses.dataclass(frozen=True)
class OverDifficulty:
    """A detector's value beyond what images as difficult have under the same model.

        value_i = l_i - E[l | difficulty of image i],    raw_i = the detector's value v_i

    where the detector's value has a ceiling c, that of an image memorized perfectly (1 for the
    p = 1 flux, 0 for minus a loss or a norm), ``l = -log(c - v)``: value log 2 means half as far
    from it as images as difficult usually are. For other detectors l = v. Near its ceiling a value
    hardly depends on difficulty any more; on this scale it stands far above all others there.

    The expectation is a robust regression over many images (``excess_over_difficulty``) on what a
    Gaussian fitted to the other images finds hard in each (``image_difficulty``). Two easy images
    may look equally memorized when the model has seen one of them only; what is left after the
    regression is what it has learned from their copies. No other model is needed, and no further
    product: see ``benchmarks/detectors.py`` for the flux.

    It answers for many images at once, so it is no ``Detector``: evaluate ``detector`` on every
    image, then take their ``excess``.

    Args:
        detector: any detector of single images; its attribute ``ceiling``, if it has one, is c.

    References:
        As for ``memjax.evaluate.excess_over_difficulty``.
    """

    detector: Detector

    @property
    def name(self) -> str:
        """The detector's, followed by ``_over_difficulty``."""
        return f"{self.detector.name}_over_difficulty"

    @property
    def title(self) -> str:
        """For figures and reports."""
        return f"{self.detector.title} over difficulty"

    @property
    def raw_name(self) -> str:
        """What ``raw`` holds."""
        return f"{self.detector.title}, not compared"

    @property
    def statement(self) -> str:
        """One sentence on what the number is."""
        how = "More than" if self._ceiling is None else "How much nearer to its ceiling than"
        return f"{how} for images as difficult: {self.detector.statement}"

    @property
    def sigma(self) -> float:
        """That of the detector."""
        return self.detector.sigma

    @property
    def _ceiling(self) -> float | None:
        return getattr(self.detector, "ceiling", None)

    def excess(
        self,
        value: Float[np.ndarray, "n"],
        standard_error: Float[np.ndarray, "n"],
        difficulty: Float[np.ndarray, "n k"],
        population: Bool[np.ndarray, "n"] | None = None,
    ) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """The detector's values compared with each other.

        Args:
            value: of ``detector``, one per image.
            standard_error: of these.
            difficulty: as from ``memjax.evaluate.image_difficulty``.
            population: images that say what is usual; ``None`` for all.

        Returns:
            One value per image, larger = more memorized, and its standard error to first order;
            the expectation's own error is left out.

        Raises:
            InputError: fewer than 50 images of the population have a value.
        """
        value, error = below_ceiling(self.detector, value, standard_error)
        return excess_over_difficulty(value, difficulty, population), error


def below_ceiling(
    detector: Detector, value: Float[np.ndarray, "n"], standard_error: Float[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Values on the scale -log(ceiling - value), where a detector has a ceiling; else as they are.

    Args:
        detector: with or without an attribute ``ceiling``.
        value: of it, one per image.
        standard_error: of these.

    Returns:
        Both in float64, the error to first order.
    """
    value, error = value.astype(np.float64), standard_error.astype(np.float64)
    ceiling = getattr(detector, "ceiling", None)
    if ceiling is None:
        return value, error
    # What single precision cannot tell from the ceiling is that far below it.
    least = max(float(np.spacing(np.float32(ceiling))), 1e-30)
    short = np.maximum(ceiling - value, least)
    return -np.log(short), error / short
