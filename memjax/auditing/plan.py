"""What an audit will do: which detectors at which noise levels, in which chunks."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from memjax._core.errors import InputError
from memjax.data.images import ImageSet
from memjax.detect.denoising_loss import DenoisingLoss
from memjax.detect.local_dimension import FLIPD, EffectiveDimension
from memjax.detect.protocol import Detector
from memjax.detect.score_norm import ScoreNorm
from memjax.diffusion.model import Model

DETECTORS: dict[str, type] = {
    kind.name: kind for kind in (FLIPD, DenoisingLoss, ScoreNorm, EffectiveDimension)
}
"""Detectors an audit knows by name; the first is the primary one, by which rows are ranked."""


@dataclasses.dataclass(frozen=True)
class PlannedDetector:
    """A detector with the column it fills.

    Attributes:
        label: column name: the detector's name, with ``@level`` unless at its default level.
        detector: the detector, at a noise level in the model's units.
        level: that noise level as a multiple of the data's standard deviation.
    """

    label: str
    detector: Detector
    level: float


def parse_detector(spec: str) -> tuple[type, float]:
    """Read ``NAME`` or ``NAME@LEVEL``.

    Args:
        spec: a detector's name, optionally with the noise level as a multiple of the data's
            standard deviation.

    Returns:
        The detector's class and the level, its default if none is given.

    Raises:
        InputError: unknown name, or a level that is no positive finite number.
    """
    name, _, suffix = spec.partition("@")
    if name not in DETECTORS:
        raise InputError(f"detectors: unknown {name!r}; known: {', '.join(DETECTORS)}")
    kind = DETECTORS[name]
    try:
        level = float(suffix) if suffix else kind.default_level
    except ValueError:
        level = float("nan")
    if not 0.0 < level < float("inf"):
        raise InputError(
            f"detectors: expected NAME@LEVEL with a positive number of the data's standard "
            f"deviations, got {spec!r}"
        )
    return kind, level


def _plan_one(spec: str | Detector, model: Model) -> PlannedDetector:
    if not isinstance(spec, str):
        return PlannedDetector(spec.name, spec, spec.sigma / model.data_std)
    kind, wanted = parse_detector(spec)
    sigma = min(max(wanted * model.data_std, model.sigma_min), model.sigma_max)
    label = kind.name if wanted == kind.default_level else f"{kind.name}@{wanted:g}"
    return PlannedDetector(label, kind(sigma), sigma / model.data_std)


def plan_detectors(
    specs: Sequence[str | Detector] | None, model: Model
) -> tuple[PlannedDetector, ...]:
    """Turn names into detectors at noise levels that suit a model.

    Args:
        specs: ``"flipd"`` (at its default level), ``"flipd@0.1"`` (at 0.1 times the standard
            deviation of the data), or detectors with their own sigma; ``None`` for all known.
            Levels are clipped to the model's range of noise.
        model: supplies ``data_std``, ``sigma_min``, ``sigma_max``.

    Returns:
        The detectors in order; the first is the primary one.

    Raises:
        InputError: unknown name, unreadable level, or two detectors with one column.
    """
    wanted = (specs,) if isinstance(specs, str) else specs or tuple(DETECTORS)
    planned = tuple(_plan_one(spec, model) for spec in wanted)
    labels = [entry.label for entry in planned]
    if len(set(labels)) != len(labels):
        raise InputError(f"detectors: expected each once, got {', '.join(labels)}")
    return planned


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Images that say what an unremarkable score looks like, and so what a flag means.

    Either other images (``images``), or rows of the audited data (``rows``), which are then not
    tested themselves.

    Attributes:
        meaning: ``"membership"`` if the calibration images were not trained on,
            ``"duplication"`` if they are training images known to occur once.
        images: calibration images from elsewhere.
        rows: calibration rows among the audited images, as row numbers or a mask.
        tested: rows to test, likewise; ``None`` for every row that does not calibrate.
    """

    meaning: str
    images: ImageSet | None = None
    rows: np.ndarray | None = None
    tested: np.ndarray | None = None

    def __post_init__(self):
        if self.meaning not in ("membership", "duplication"):
            raise InputError(
                f"calibration: expected the meaning 'membership' or 'duplication', "
                f"got {self.meaning!r}"
            )
        if (self.images is None) == (self.rows is None):
            raise InputError("calibration: expected either images or rows, got both or neither")


def row_mask(rows: np.ndarray | None, n: int, name: str) -> Bool[np.ndarray, "n"]:
    """Row numbers or a mask, as a mask over n rows.

    Args:
        rows: row numbers, a mask, or ``None`` for all rows.
        n: how many rows there are.
        name: the argument's name, for the error.

    Returns:
        A boolean mask.

    Raises:
        InputError: a mask of another length, or a row number outside 0..n-1.
    """
    if rows is None:
        return np.ones(n, bool)
    rows = np.asarray(rows)
    mask = np.zeros(n, bool)
    if rows.dtype == bool:
        if rows.shape != (n,):
            raise InputError(f"{name}: expected a mask of {n} rows, got shape {rows.shape}")
        return rows
    if rows.size and (rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= n):
        raise InputError(
            f"{name}: expected row numbers between 0 and {n - 1}, "
            f"got {rows.dtype} from {rows.min()} to {rows.max()}"
        )
    mask[rows.astype(np.int64)] = True
    return mask


def default_chunk_size(d: int) -> int:
    """Rows evaluated together so that their tangents fit in memory.

    An exact trace holds ``min(d, 256)`` tangents of d numbers a row, times the network's width;
    a budget of 2^20 numbers at the input keeps common networks within a few GiB.

    Args:
        d: numbers in one image.

    Returns:
        Rows a chunk, between 1 and 256.
    """
    return max(1, min(256, 2**20 // (min(d, 256) * d)))
