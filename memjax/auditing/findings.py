"""From scores to statements: ranks, flags, stored rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from memjax._core.errors import InputError
from memjax.auditing.comparison import compare_images, flag_population
from memjax.auditing.plan import Calibration, PlannedDetector
from memjax.auditing.rows import RowFindings
from memjax.data.images import ImageSet
from memjax.evaluate.conformal import flag
from memjax.evaluate.distances import find_copies, group_duplicates, nearest_neighbors


class Flags(NamedTuple):
    """Flags of one detector against one calibration, over all rows of the table.

    Attributes:
        meaning: ``"membership"`` or ``"duplication"``.
        label: the detector's column.
        role: ``"calibration"``, ``"tested"`` or ``None`` per row.
        p_value: NaN where the row was not tested or its score is NaN.
        flagged: False there.
        resolvable: whether the calibration is large enough for any flag at all.
    """

    meaning: str
    label: str
    role: np.ndarray
    p_value: Float[np.ndarray, "n"]
    flagged: Bool[np.ndarray, "n"]
    resolvable: bool


class Copies(NamedTuple):
    """What generated samples reproduce, over the data rows.

    Attributes:
        samples: the samples, as images.
        hits: samples that copy the row.
        tested: rows among which copies were looked for; none if fewer than two images differ.
        copying: number of samples that copy some row.
        nearest: number of the sample nearest to the row, -1 for an unreadable row.
        nearest_distance: its distance; NaN for an unreadable row.
    """

    samples: Float[np.ndarray, "m ..."]
    hits: Int[np.ndarray, "n"]
    tested: Bool[np.ndarray, "n"]
    copying: int
    nearest: Int[np.ndarray, "n"]
    nearest_distance: Float[np.ndarray, "n"]


def rank_rows(value: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Rank 1 for the largest value; equal values share the better rank, NaN gets 0.

    Args:
        value: one per row.

    Returns:
        Ranks from 1, and 0 for rows that do not rank.
    """
    finite = np.isfinite(value)
    falling = np.sort(-value[finite])
    rank = np.zeros(value.shape, np.int64)
    rank[finite] = 1 + np.searchsorted(falling, -value[finite], side="left")
    return rank


def flag_rows(
    planned: Sequence[PlannedDetector],
    single: RowFindings,
    images: Float[np.ndarray, "n ..."],
    calibrations: Sequence[Calibration],
    calibration_rows: Sequence[np.ndarray],
    num_data: int,
    fdr: float,
) -> list[Flags]:
    """Flag the tested rows of every calibration with every detector.

    Detectors that compare images compare the tested and the calibrating ones, all of them alike,
    which leaves p-values valid; so their values differ from those that rank.

    Args:
        planned: the detectors.
        single: findings, one image at a time, on all rows of the table.
        images: of all rows of the table.
        calibrations: what flags mean.
        calibration_rows: for each, its row numbers in the table.
        num_data: how many rows are data; others are never tested.
        fdr: false-discovery rate, for each calibration and detector by itself.

    Returns:
        One ``Flags`` per calibration and detector.

    Raises:
        InputError: no calibration row has a score.
    """
    n = len(single.value)
    out = []
    for calibration, rows in zip(calibrations, calibration_rows, strict=True):
        tested, calibrating = flag_population(calibration, rows, num_data, n)
        found = compare_images(planned, single, images, tested | calibrating)
        role = np.full(n, None, object)
        role[tested] = "tested"
        role[rows] = "calibration"
        for k, entry in enumerate(planned):
            scores = found.value[:, k]
            if not np.isfinite(scores[rows]).any():
                raise InputError(
                    f"calibration: expected readable {calibration.meaning} images, "
                    f"found none with a {entry.label} score"
                )
            result = flag(scores[tested], scores[rows], fdr)
            p_value, flagged = np.full(n, np.nan), np.zeros(n, bool)
            p_value[tested], flagged[tested] = result.p_value, result.flagged
            out.append(
                Flags(calibration.meaning, entry.label, role, p_value, flagged, result.resolvable)
            )
    return out


def look_for_copies(
    images: ImageSet, samples: Float[np.ndarray, "m ..."], trained_on: Bool[np.ndarray, "n"]
) -> Copies:
    """Which rows do generated samples reproduce?

    Args:
        images: the data rows.
        samples: generated images of the same shape, at least one of them finite. Others count
            as drawn, and copy nothing.
        trained_on: rows that stand in the training set; copies are looked for among them.

    Returns:
        Hits by row, and the sample nearest to every row.

    Raises:
        InputError: no sample is finite.
    """
    n = len(images)
    tested = np.asarray(images.ok) & trained_on
    if len(np.unique(group_duplicates(images.images[tested]))) < 2:
        tested = np.zeros(n, bool)  # the rule compares with a second image
    hits, copying = np.zeros(n, np.int64), 0
    if tested.any():
        found = find_copies(samples, images.images[tested])
        hits[tested], copying = found.hits, int(found.is_copy.sum())
    near = nearest_neighbors(images.images, samples)
    return Copies(samples, hits, tested, copying, near.index[:, 0], near.distance[:, 0])
