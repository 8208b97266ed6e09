"""A detector's value less what the difficulty of the image makes expect: images tell each other."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from memjax.detect.protocol import Detector
from memjax.evaluate.difficulty import excess_over_difficulty


@dataclasses.dataclass(frozen=True)
class OverDifficulty:
    """A detector's value beyond what images as difficult have under the same model.

        value_i - E[value | difficulty of image i],    raw = value_i

    The expectation is a robust regression over many images (``excess_over_difficulty``) on what a
    Gaussian fitted to the other images finds hard in each (``image_difficulty``). Two easy images
    may look equally memorized when the model has seen one of them only; what is left after the
    regression is what it has learned from their copies. No other model is needed, and no further
    product: see ``benchmarks/detectors.py`` for the flux.

    It answers for many images at once, so it is no ``Detector``: evaluate ``detector`` on every
    image, then take their ``excess``.

    Args:
        detector: any detector of single images.
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
        return f"Beyond what images as difficult have: {self.detector.statement}"

    @property
    def sigma(self) -> float:
        """That of the detector."""
        return self.detector.sigma

    def excess(
        self,
        value: Float[np.ndarray, "n"],
        difficulty: Float[np.ndarray, "n k"],
        population: Bool[np.ndarray, "n"] | None = None,
    ) -> Float[np.ndarray, "n"]:
        """What ``excess_over_difficulty`` makes of the detector's values.

        Args:
            value: of ``detector``, one per image.
            difficulty: as from ``memjax.evaluate.image_difficulty``.
            population: images that say what is usual; ``None`` for all.

        Returns:
            One value per image, larger = more memorized.

        Raises:
            InputError: fewer than 50 images of the population have a value.
        """
        return excess_over_difficulty(value, difficulty, population)
