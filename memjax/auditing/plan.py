"""What an audit will do: which detectors at which noise levels, in which chunks."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import jax
import numpy as np
from jaxtyping import Bool, PyTree

from memjax._core.errors import InputError
from memjax.data.images import ImageSet
from memjax.detect.combined import Difference, FluxAndLoss
from memjax.detect.denoising_loss import DenoisingLoss
from memjax.detect.difficulty import OverDifficulty
from memjax.detect.local_dimension import FLIPD, EffectiveDimension, FluxDimension
from memjax.detect.neighbors import Blurred
from memjax.detect.p_laplace import PLaplace, PLaplaceFlux
from memjax.detect.plan import requirements
from memjax.detect.protocol import Detector
from memjax.detect.sample_distance import (
    DistanceRatio,
    NearestSample,
    NormalizedL2,
    SampleDetector,
    TiledL2,
)
from memjax.detect.score_gap import Anisotropy, DenoisedNorm, GapSharpness, ScoreGap
from memjax.detect.score_norm import ScoreNorm
from memjax.detect.sharpness import (
    ExtremeEigenvalue,
    FloorShare,
    NegativeShare,
    Sharpness,
    SharpnessProxy,
)
from memjax.detect.sphere_loss import SphereLoss
from memjax.detect.volume_growth import NormalizedVolumeGrowth
from memjax.diffusion.model import Model
from memjax.evaluate.difficulty import SMALLEST_POPULATION

DETECTORS: dict[str, type] = {
    kind.name: kind
    for kind in (
        FLIPD,
        DenoisingLoss,
        SphereLoss,
        FluxAndLoss,
        ScoreNorm,
        EffectiveDimension,
        PLaplaceFlux,
        PLaplace,
        FluxDimension,
        Sharpness,
        NegativeShare,
        FloorShare,
        ExtremeEigenvalue,
        SharpnessProxy,
        NormalizedVolumeGrowth,
        ScoreGap,
        GapSharpness,
        Anisotropy,
        DenoisedNorm,
    )
}
"""Detectors that look at the score, by name: ``kind(sigma)`` makes one."""

SAMPLE_DETECTORS: dict[str, type] = {
    kind.name: kind for kind in (DistanceRatio, NormalizedL2, NearestSample, TiledL2)
}
"""Detectors that look at generated samples, by name: ``kind()`` makes one."""

RANKING = ("p_laplace_flux_over_difficulty", "p_laplace_flux_over_blurred", "p_laplace_flux")
"""The first of these that can run with what is given is the primary one, by which rows rank,
unless told otherwise."""

DEFAULT_DETECTORS = (
    "p_laplace_flux",
    "flipd",
    "effective_dimension",
    "score_norm",
    "denoising_loss",
    "score_gap",
    "p_laplace_flux_over_baseline",
)
"""What an audit runs beside the primary one unless told otherwise, as far as it can."""

OVER_DIFFICULTY = "difficulty"
"""After ``_over_`` in a detector's name: compared with what the images' difficulty makes expect."""

COMPARISONS: dict[str, tuple[Any, float | int]] = {
    "baseline": ("baseline", 0.5),
    "null": ("null", 1),
    "blurred": (Blurred(), 0.5),
}
"""What else may follow ``_over_`` in a detector's name: what its value is compared with, and how
much of the other value is subtracted.

An earlier checkpoint, or a model of similar data, knows part of what makes an image easy and part
of what makes it stored: on the graded digits half of its flux told members best, all of it no
better than none. So with a neighbor of the image.
"""

ALL = "all"
"""Stands for every detector that can run with what is given."""


AnyDetector = Detector | SampleDetector | OverDifficulty
"""What an audit can run: on one image, on images and samples, on all images at once."""


@overload
def evaluated(detector: Detector | OverDifficulty) -> Detector: ...
@overload
def evaluated(detector: SampleDetector) -> SampleDetector: ...
def evaluated(detector: AnyDetector) -> Detector | SampleDetector:
    """What is computed before images are compared with each other, if they are.

    Args:
        detector: any.

    Returns:
        The same, or what ``OverDifficulty`` compares.
    """
    return detector.detector if isinstance(detector, OverDifficulty) else detector


@dataclasses.dataclass(frozen=True)
class PlannedDetector:
    """A detector with the column it fills.

    Attributes:
        label: column name: the detector's name, with ``@level`` unless at its default level.
        detector: the detector, at a noise level in the model's units.
        level: that noise level as a multiple of the data's standard deviation; ``None`` for a
            detector that looks at samples.
    """

    label: str
    detector: AnyDetector
    level: float | None

    @property
    def samples(self) -> bool:
        """Whether it looks at generated samples, not at the score."""
        return isinstance(self.detector, SampleDetector)

    @property
    def evaluated(self) -> Detector | SampleDetector:
        """What is computed before images are compared with each other, if they are."""
        return evaluated(self.detector)


class Given(NamedTuple):
    """What an audit has beside the model and the images: what some detectors cannot do without.

    Attributes:
        conditions: the rows' own conditions.
        baseline: a model to compare with.
        samples: images drawn from the model.
        images: different readable images; of several populations the fewest.
    """

    conditions: bool = True
    baseline: bool = True
    samples: bool = True
    images: int = SMALLEST_POPULATION

    def missing(self, detector: AnyDetector, event_shape: tuple[int, ...]) -> str | None:
        """What a detector needs and has not got.

        Args:
            detector: the detector.
            event_shape: of one image of the model.

        Returns:
            ``None`` if it can run, otherwise a clause that says why not.
        """
        if isinstance(detector, SampleDetector):
            if self.samples:
                return None
            return "compares the rows with generated samples; give samples, or draw some"
        if isinstance(detector, OverDifficulty):
            if self.images < SMALLEST_POPULATION:
                return (
                    f"compares images with each other: expected at least {SMALLEST_POPULATION} "
                    f"different ones, found {self.images}"
                )
            return self.missing(detector.detector, event_shape)
        needed = requirements((detector,), math.prod(event_shape))
        if needed.conditions and not self.conditions:
            return "needs the rows' own conditions; give conditions"
        if needed.baseline and not self.baseline:
            return "compares the model with another one; give a baseline"
        if needed.images and len(event_shape) != 3:
            return f"needs images [height, width, channels], the model's are {list(event_shape)}"
        return None


class Kind(NamedTuple):
    """A detector by name, without its noise level.

    Attributes:
        name: what it is called.
        make: makes one from a noise level in the score's units, or from nothing if it looks at
            samples.
        level: noise level unless told otherwise, as a multiple of the data's standard deviation;
            ``None`` if it looks at samples.
    """

    name: str
    make: Callable[..., AnyDetector]
    level: float | None


def find_kind(name: str) -> Kind:
    """The detector of a name.

    Args:
        name: one of ``DETECTORS`` or ``SAMPLE_DETECTORS``, or one of the former followed by
            ``_over_baseline``, ``_over_null`` or ``_over_blurred``: its difference to half of the
            same under the baseline, to the same without the condition, or to half of the same at
            the blurred image; or by ``_over_difficulty``: to what images as difficult have.

    Returns:
        How to make one.

    Raises:
        InputError: unknown name.
    """
    if name in SAMPLE_DETECTORS:
        return Kind(name, SAMPLE_DETECTORS[name], None)
    plain, over, against = name.rpartition("_over_")
    if over and plain in DETECTORS and against == OVER_DIFFICULTY:
        kind = DETECTORS[plain]
        return Kind(name, lambda sigma: OverDifficulty(kind(sigma)), kind.default_level)
    if over and plain in DETECTORS and against in COMPARISONS:
        kind, (other, weight) = DETECTORS[plain], COMPARISONS[against]
        return Kind(name, lambda sigma: Difference(kind(sigma), other, weight), kind.default_level)
    if name not in DETECTORS:
        known = ", ".join((*DETECTORS, *SAMPLE_DETECTORS))
        raise InputError(
            f"detectors: unknown {name!r}; known: {known}; with _over_difficulty, _over_baseline, "
            "_over_null or _over_blurred after one: its difference to other images, another score "
            "or another image"
        )
    return Kind(name, DETECTORS[name], DETECTORS[name].default_level)


def parse_detector(spec: str) -> tuple[Kind, float | None]:
    """Read ``NAME`` or ``NAME@LEVEL``.

    Args:
        spec: a detector's name, optionally with the noise level as a multiple of the data's
            standard deviation.

    Returns:
        The detector and the level, its default if none is given; ``None`` for a detector that
        looks at samples.

    Raises:
        InputError: unknown name, a level that is no positive finite number, or a level for a
            detector that has none.
    """
    name, at, suffix = spec.partition("@")
    kind = find_kind(name)
    if kind.level is None:
        if at:
            raise InputError(f"detectors: {name} looks at samples, not at a noise level: {spec!r}")
        return kind, None
    try:
        level = float(suffix) if suffix else kind.level
    except ValueError:
        level = float("nan")
    if not 0.0 < level < float("inf"):
        raise InputError(
            f"detectors: expected NAME@LEVEL with a positive number of the data's standard "
            f"deviations, got {spec!r}"
        )
    return kind, level


def default_detectors(
    event_shape: tuple[int, ...], given: Given
) -> tuple[tuple[str, Detector | OverDifficulty], ...]:
    """What an audit runs unless told otherwise, at noise level 1; the first ranks.

    Args:
        event_shape: of one image of the model.
        given: what there is beside model and images.

    Returns:
        Names and detectors: the first of ``RANKING`` and all of ``DEFAULT_DETECTORS`` that can
        run.
    """
    able: dict[str, Detector | OverDifficulty] = {}
    for name in (*RANKING, *DEFAULT_DETECTORS):
        detector = find_kind(name).make(1.0)
        assert not isinstance(detector, SampleDetector)
        if given.missing(detector, event_shape) is None:
            able[name] = detector
    first = next(name for name in RANKING if name in able)
    names = dict.fromkeys((first, *(name for name in DEFAULT_DETECTORS if name in able)))
    return tuple((name, able[name]) for name in names)


def _plan_one(spec: str | AnyDetector, model: Model) -> PlannedDetector:
    if isinstance(spec, SampleDetector):
        return PlannedDetector(spec.name, spec, None)
    if not isinstance(spec, str):
        return PlannedDetector(spec.name, spec, spec.sigma / model.data_std)
    kind, wanted = parse_detector(spec)
    if wanted is None:
        return PlannedDetector(kind.name, kind.make(), None)
    sigma = min(max(wanted * model.data_std, model.sigma_min), model.sigma_max)
    label = kind.name if wanted == kind.level else f"{kind.name}@{wanted:g}"
    return PlannedDetector(label, kind.make(sigma), sigma / model.data_std)


def plan_detectors(
    specs: str | Sequence[str | AnyDetector] | None,
    model: Model,
    given: Given = Given(),  # noqa: B008  (immutable)
) -> tuple[PlannedDetector, ...]:
    """Turn names into detectors at noise levels that suit a model.

    Args:
        specs: ``"flipd"`` (at its default level), ``"flipd@0.1"`` (at 0.1 times the standard
            deviation of the data), ``"flipd_over_baseline"`` (the difference to half of the same
            under the baseline; what else it may be ``_over_``, ``find_kind`` says), or detectors
            with their own sigma; ``"all"`` for every other known one; ``None`` for
            ``default_detectors``. Levels are clipped to the model's range of noise. Of ``"all"``
            and ``None``, those that lack something are left out.
        model: supplies ``event_shape``, ``data_std``, ``sigma_min``, ``sigma_max``.
        given: what there is beside model and images.

    Returns:
        The detectors in order; the first is the primary one.

    Raises:
        InputError: unknown name, unreadable level, two detectors with one column, or one named
            that lacks what it needs.
    """
    if specs is None:
        specs = tuple(name for name, _ in default_detectors(model.event_shape, given))
    wanted = specs if isinstance(specs, Sequence) and not isinstance(specs, str) else (specs,)
    planned: list[PlannedDetector] = []
    for spec in wanted:
        if spec == ALL:
            continue
        entry = _plan_one(spec, model)
        lack = given.missing(entry.detector, model.event_shape)
        if lack is not None:
            raise InputError(f"detectors: {entry.label} {lack}")
        planned.append(entry)
    labels = [entry.label for entry in planned]
    if len(set(labels)) != len(labels):
        raise InputError(f"detectors: expected each once, got {', '.join(labels)}")
    if ALL in wanted:
        names = dict.fromkeys((*RANKING, *DEFAULT_DETECTORS, *DETECTORS, *SAMPLE_DETECTORS))
        others = (_plan_one(name, model) for name in names if name not in labels)
        planned += [
            entry for entry in others if given.missing(entry.detector, model.event_shape) is None
        ]
    if not planned:
        raise InputError("detectors: expected at least one, got none")
    return tuple(planned)


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
        conditions: conditions of ``images``, one per image; wanted where the audited rows have
            conditions, because scores under other conditions are no measure for theirs.
    """

    meaning: str
    images: ImageSet | None = None
    rows: np.ndarray | None = None
    tested: np.ndarray | None = None
    conditions: PyTree = None

    def __post_init__(self):
        if self.meaning not in ("membership", "duplication"):
            raise InputError(
                f"calibration: expected the meaning 'membership' or 'duplication', "
                f"got {self.meaning!r}"
            )
        if (self.images is None) == (self.rows is None):
            raise InputError("calibration: expected either images or rows, got both or neither")
        if self.images is None and self.conditions is not None:
            raise InputError("calibration: rows have the conditions of the audit; give none")
        if self.images is not None:
            check_rows("calibration conditions", self.conditions, len(self.images))


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


def check_rows(name: str, columns: PyTree, n: int) -> None:
    """Refuse columns that have not one entry per row.

    Args:
        name: the argument's name, for the error.
        columns: pytree of arrays with one leading row axis, or ``None``.
        n: how many rows there are.

    Raises:
        InputError: an array of another length.
    """
    for leaf in jax.tree.leaves(columns):
        if np.shape(leaf)[:1] != (n,):
            shape = "x".join(map(str, np.shape(leaf)))
            raise InputError(f"{name}: expected {n} rows, got shape {shape}")


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
