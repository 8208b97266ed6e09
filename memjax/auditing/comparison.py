"""Compare audited images with each other, for detectors that look at all of them at once."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from memjax._core.status import Status
from memjax.auditing.plan import Calibration, PlannedDetector, row_mask
from memjax.auditing.rows import RowFindings
from memjax.data.images import ImageSet
from memjax.detect.difficulty import OverDifficulty
from memjax.evaluate.difficulty import SMALLEST_POPULATION, image_difficulty


def compare_images(
    planned: Sequence[PlannedDetector],
    single: RowFindings,
    images: Float[np.ndarray, "n ..."],
    population: Bool[np.ndarray, "n"],
) -> RowFindings:
    """Findings with the columns of ``OverDifficulty`` put in.

    Args:
        planned: the detectors.
        single: findings of what each looks at one image at a time.
        images: of all rows.
        population: rows that say what is usual.

    Returns:
        ``single``, and where a detector compares images its value is the excess, its raw value
        the one before. Status UNDEFINED where the population has too few values to say what is
        usual.
    """
    columns = [k for k, entry in enumerate(planned) if isinstance(entry.detector, OverDifficulty)]
    if not columns:
        return single
    difficulty = image_difficulty(images, population)
    found = RowFindings(*(column.copy() for column in single))
    for k in columns:
        detector, before = planned[k].detector, single.value[:, k]
        assert isinstance(detector, OverDifficulty)
        finite = np.isfinite(before)
        if np.sum(finite & population) >= SMALLEST_POPULATION:
            error = single.standard_error[:, k]
            found.value[:, k], found.standard_error[:, k] = detector.excess(
                before, error, difficulty, population
            )
            found.raw[:, k] = before
            continue
        for column in (found.value, found.raw, found.standard_error):
            column[:, k] = np.nan
        found.status[finite, k] = Status.UNDEFINED
    return found


def flag_population(
    calibration: Calibration, at: np.ndarray, num_data: int, n: int
) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Rows that a calibration tests, and those it tests them against.

    Args:
        calibration: the calibration.
        at: its rows in the table.
        num_data: how many rows of the table are data; others are never tested.
        n: rows of the table.

    Returns:
        Two masks that exclude each other.
    """
    tested, calibrating = np.zeros(n, bool), np.zeros(n, bool)
    tested[:num_data] = row_mask(calibration.tested, num_data, "tested rows")
    calibrating[at] = True
    return tested & ~calibrating, calibrating


def fewest_different(
    rows: ImageSet, calibrations: Sequence[Calibration], among: Bool[np.ndarray, "n"]
) -> int:
    """Different readable images in the smallest population that an audit compares images in.

    Args:
        rows: the data rows.
        calibrations: what flags are calibrated with; each has a population of its own.
        among: data rows that ranks compare with each other.

    Returns:
        A number of images.
    """

    def different(images: ImageSet, mask: Bool[np.ndarray, "n"]) -> set[str]:
        return {images.sha256[row] for row in np.flatnonzero(mask & np.asarray(images.ok))}

    counts = [len(different(rows, among))]
    for calibration in calibrations:
        inside = row_mask(calibration.rows, len(rows), "calibration rows")
        pool = row_mask(calibration.tested, len(rows), "tested rows")
        found = different(rows, pool | inside if calibration.images is None else pool)
        if calibration.images is not None:
            found |= different(calibration.images, np.ones(len(calibration.images), bool))
        counts.append(len(found))
    return min(counts)
