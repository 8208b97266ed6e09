"""Audit a model: which of these images has it memorized?"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from memjax._core.backend import check_backend
from memjax._core.chunked import chunked_map
from memjax._core.errors import InputError, MemjaxError
from memjax._core.hashing import fingerprint
from memjax._core.keys import derive_key
from memjax.auditing.comparison import compare_images, fewest_different
from memjax.auditing.findings import flag_rows, look_for_copies
from memjax.auditing.metrics import CONFIDENCE, Truth, flag_metrics, score_metrics, stored_metrics
from memjax.auditing.parts import Parts
from memjax.auditing.plan import (
    AnyDetector,
    Calibration,
    Given,
    PlannedDetector,
    check_rows,
    default_chunk_size,
    plan_detectors,
    row_mask,
)
from memjax.auditing.record import build_manifest, plan_record
from memjax.auditing.result import AuditResult
from memjax.auditing.rows import Progress, RowFindings, compare_rows, evaluate_rows
from memjax.auditing.table import build_table, gallery
from memjax.data.images import ImageSet, from_array
from memjax.detect.sample_distance import SampleDetector
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import decode_samples, sample


def audit(
    model: Model,
    images: ImageSet | Float[np.ndarray, "n ..."],
    *,
    detectors: str | Sequence[str | AnyDetector] | None = None,
    calibrations: Sequence[Calibration] = (),
    fdr: float = 0.1,
    num_samples: int = 1024,
    samples: Float[np.ndarray, "m ..."] | None = None,
    trained_on: np.ndarray | None = None,
    truth: Truth | None = None,
    conditions: PyTree = None,
    baseline: Model | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
    out: str | Path | None = None,
    names: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Score, rank and flag images by how strongly a model has memorized them.

    Three statements of different strength come out, in exact words:

    - a *rank*: larger detector value, more suspicious. Always there; no error rate.
    - a *flag*: conformal p-value against calibration images under false-discovery control
      (Benjamini-Hochberg at ``fdr``). It means membership when the calibration images were not
      trained on, duplication when they are training images known to occur once.
    - *stored*: at least one generated sample reproduces the row under the copy rule
      d1/d2 < 1/3 (distances from the sample to its nearest and second nearest distinct image).

    Args:
        model: a score with its noise range and data scale, as from ``memjax.load``. Where the
            files it was read from do not say the standard deviation of its data, that of
            ``images`` is taken, and the manifest says so.
        images: the rows, as from ``memjax.load_images``; or an array [n, ...] in [-1, 1].
        detectors: names (``"flipd"``, ``"flipd@0.1"`` at 0.1 times the data's standard
            deviation) or detectors; the first is the primary one. ``"all"`` stands for every
            one that can run with what is given, ``None`` for a few quick ones. Those that end
            in ``_over_difficulty`` compare images with each other: the images of ``trained_on``
            to rank, the tested and the calibrating ones to flag.
        calibrations: what flags are calibrated with. None: a ranking and no flag.
        fdr: expected share of false flags among the flags, in (0, 1).
        num_samples: samples to draw for *stored*; 0 to leave that question open.
        samples: samples drawn before, instead.
        trained_on: mask or row numbers of the images that stand in the training set, among
            which copies are looked for and with which detectors that look at samples, or at
            all images at once, compare; ``None`` for all.
        truth: what is known about the rows, to measure the detectors with.
        conditions: pytree of arrays with one leading row axis; ``None`` for the null condition.
            Samples are then drawn under the rows' conditions in turn, and detectors may compare
            a row's condition with the null condition.
        baseline: another model of the same event shape (an earlier checkpoint, or one that was
            not trained on the rows), which detectors may compare the audited one with. Images
            are encoded through the audited model.
        seed: of every random draw.
        chunk_size: rows evaluated together; ``None`` to choose by image size.
        out: folder for the results, which also keeps finished chunks, so that the same call goes
            on where an interrupted one stopped. ``None`` to keep everything in memory.
        names: ``{"model": ..., "baseline": ..., "data": ..., "command": ...}`` for the record.
        progress: called with (stage, done, total).

    Returns:
        An ``AuditResult``: table, metrics, manifest, gallery; ``.top(n)``, ``.write(folder)``.

    Raises:
        InputError: arguments that do not fit each other, named in one line.
        MemjaxError: the installed numerical stack computes wrong numbers.

    Rows that cannot be read or evaluated keep their place with a status, and enter no ranking,
    flag or metric.

    Cost: ``memjax.detect.cost(detectors, d)`` products a row, plus the samples. Results are
    bitwise repeatable at one chunk size; across chunk sizes float32 differs by about 1e-6.

    References:
        Conformal p-values under false-discovery control: Bates et al., 2023, arXiv:2104.08279.
        The distance-ratio rule: Yoon et al., 2023 (ICML workshop on structured probabilistic
        inference and generative modeling).
    """
    report = progress or (lambda stage, done, total: None)
    clock: dict[str, float] = {}
    rows = images if isinstance(images, ImageSet) else from_array(np.asarray(images))
    _check_arguments(
        model,
        rows,
        calibrations,
        fdr,
        num_samples,
        samples,
        truth,
        conditions,
        baseline,
        chunk_size,
    )
    if model.origin.assumed:
        model = model.with_data_std(_measured_std(model, rows), "measured on the audited images")
    among = row_mask(trained_on, len(rows), "trained_on")
    given = Given(
        conditions=conditions is not None,
        baseline=baseline is not None,
        samples=samples is not None or num_samples > 0,
        images=fewest_different(rows, calibrations, among),
    )
    planned = plan_detectors(detectors, model, given)
    chunk = chunk_size or default_chunk_size(int(np.prod(model.event_shape)))

    backend = check_backend()
    if not backend.ok:
        raise MemjaxError(f"this machine computes wrong numbers: {backend.message}")

    plan = plan_record(
        model,
        rows,
        planned,
        calibrations,
        baseline,
        fdr=fdr,
        conditions=None if conditions is None else fingerprint(conditions),
        seed=seed,
        chunk_size=chunk,
        num_samples=num_samples if samples is None else fingerprint(samples),
    )
    parts = Parts(Path(out) if out is not None else None, plan)
    clock["prepared"] = time.perf_counter()

    def evaluate(images: ImageSet, prefix: str, conditions: PyTree) -> RowFindings:
        return evaluate_rows(
            model,
            images,
            tuple(e.evaluated for e in planned if not isinstance(e.evaluated, SampleDetector)),
            baseline=baseline,
            conditions=conditions,
            seed=seed,
            chunk_size=chunk,
            parts=parts,
            prefix=prefix,
            progress=report,
        )

    evaluated = [evaluate(rows, "data", conditions)]
    sets = [rows]
    for c in calibrations:
        if c.images is not None:
            evaluated.append(evaluate(c.images, c.meaning, c.conditions))
            sets.append(c.images)
    clock["evaluated"] = time.perf_counter()

    drawn = samples
    if drawn is None:
        drawn = _draw(model, conditions, len(rows), num_samples, seed, parts, report)
    copies = None
    if drawn is not None:
        drawn = np.asarray(drawn)
        copies = look_for_copies(rows, drawn, among)
    reference = rows.images[among & np.asarray(rows.ok)]
    compared = [
        compare_rows(
            images,
            tuple(e.detector for e in planned if isinstance(e.detector, SampleDetector)),
            drawn,
            reference,
        )
        for images in sets
    ]
    clock["sampled"] = time.perf_counter()

    single = _in_order(planned, _stack(evaluated), _stack(compared))
    all_images, calibration_rows = _append(rows, calibrations)
    everything = all_images.images
    usual = np.concatenate([among, np.zeros(len(everything) - len(rows), bool)])
    found = compare_images(planned, single, everything, usual)
    values = found.value[: len(rows)]
    flags = flag_rows(planned, single, everything, calibrations, calibration_rows, len(rows), fdr)
    metrics = {
        "confidence": CONFIDENCE,
        "truth": None if truth is None else "multiplicity in the training set",
        "contrasts": [] if truth is None else score_metrics(planned, values, truth),
        "flags": flag_metrics(flags, fdr, truth, len(rows)),
        "stored": stored_metrics(copies, rows.sha256, truth),
    }
    manifest = build_manifest(
        model,
        rows,
        planned,
        {c.meaning: len(at) for c, at in zip(calibrations, calibration_rows, strict=True)},
        copies,
        backend,
        baseline,
        plan,
        {
            "detectors": clock["evaluated"] - clock["prepared"],
            "samples": clock["sampled"] - clock["evaluated"],
        },
        names or {},
    )
    result = AuditResult(
        build_table(all_images, planned, found, flags, copies, truth, len(rows)),
        metrics,
        manifest,
        gallery(rows, values[:, 0], copies),
    )
    if out is not None:
        result.write(out)
        parts.discard()
    return result


def _measured_std(model: Model, rows: ImageSet) -> float:
    """Standard deviation of the readable images as the score sees them."""
    encode = jax.jit(lambda m, images: chunked_map(m.encode, images, chunk_size=16))
    encoded = encode(model, jnp.asarray(rows.images[np.asarray(rows.ok)]))
    return float(np.std(np.asarray(encoded), dtype=np.float64))


def _stack(parts: Sequence[RowFindings]) -> RowFindings:
    """Rows of several sets, one after the other."""
    return RowFindings(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _in_order(
    planned: Sequence[PlannedDetector], evaluated: RowFindings, compared: RowFindings
) -> RowFindings:
    """Columns in the order of the plan: from the score, and from samples."""
    sampled = np.array([entry.samples for entry in planned])
    order = np.where(sampled, np.cumsum(sampled) - 1 + np.sum(~sampled), np.cumsum(~sampled) - 1)
    joined = (np.concatenate(pair, axis=1) for pair in zip(evaluated, compared, strict=True))
    return RowFindings(*(columns[:, order] for columns in joined))


def _append(
    rows: ImageSet, calibrations: Sequence[Calibration]
) -> tuple[ImageSet, list[np.ndarray]]:
    """Data rows, then calibration images from elsewhere, and where each calibration stands."""
    positions: list[np.ndarray] = []
    images, end = [rows], len(rows)
    for calibration in calibrations:
        if calibration.images is None:
            mask = row_mask(calibration.rows, len(rows), "calibration rows")
            positions.append(np.flatnonzero(mask))
            continue
        positions.append(np.arange(end, end + len(calibration.images)))
        images.append(calibration.images)
        end += len(calibration.images)
    joined = ImageSet(
        images=np.concatenate([part.images for part in images]),
        ids=tuple(name for part in images for name in part.ids),
        sha256=tuple(digest for part in images for digest in part.sha256),
        status=np.concatenate([part.status for part in images]),
        reasons=tuple(reason for part in images for reason in part.reasons),
        labels=np.concatenate([part.labels for part in images]),
    )
    return joined, positions


def _check_arguments(
    model: Model,
    rows: ImageSet,
    calibrations: Sequence[Calibration],
    fdr: float,
    num_samples: int,
    samples: Any,
    truth: Truth | None,
    conditions: PyTree,
    baseline: Model | None,
    chunk_size: int | None,
) -> None:
    """Find what cannot work before anything is computed."""
    encoded = jax.eval_shape(model.encode, jax.ShapeDtypeStruct(rows.event_shape, np.float32))
    sets = [("images", rows), *(("calibration", c.images) for c in calibrations if c.images)]
    for name, images in sets:
        if images.event_shape != rows.event_shape or encoded.shape != model.event_shape:
            raise InputError(
                f"{name}: the model takes images of shape {_shape(model.event_shape)}, "
                f"found {_shape(images.event_shape)}"
            )
    if not 0 < fdr < 1:
        raise InputError(f"fdr: expected a rate between 0 and 1, got {fdr}")
    if num_samples < 0:
        raise InputError(f"num_samples: expected 0 or more, got {num_samples}")
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size: expected at least 1, got {chunk_size}")
    if samples is not None and samples.shape[1:] != rows.event_shape:
        raise InputError(
            f"samples: expected images of shape {_shape(rows.event_shape)}, "
            f"got {_shape(samples.shape[1:])}"
        )
    if truth is not None and {len(column) for column in truth} != {len(rows)}:
        found = ", ".join(str(len(column)) for column in truth)
        raise InputError(f"truth: expected {len(rows)} rows in every column, got {found}")
    meanings = [c.meaning for c in calibrations]
    if len(set(meanings)) != len(meanings):
        raise InputError(f"calibrations: expected each meaning once, got {', '.join(meanings)}")
    for c in calibrations:
        row_mask(c.rows, len(rows), "calibration rows")
        row_mask(c.tested, len(rows), "tested rows")
        if c.images is not None and (c.conditions is None) != (conditions is None):
            raise InputError(
                "calibration: expected conditions of its images where the audited rows have some, "
                "and none where they have none"
            )
    check_rows("conditions", conditions, len(rows))
    if baseline is None:
        return
    if baseline.event_shape != model.event_shape:
        raise InputError(
            f"baseline: expected a model of samples of shape {_shape(model.event_shape)}, "
            f"got {_shape(baseline.event_shape)}"
        )
    takes, wanted = (jax.tree.structure(m.null_condition) for m in (baseline, model))
    if conditions is not None and takes != wanted:
        raise InputError("baseline: expected a model that takes conditions like the audited one's")


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _draw(
    model: Model,
    conditions: PyTree,
    num_rows: int,
    num_samples: int,
    seed: int,
    parts: Parts,
    progress: Progress,
) -> Float[np.ndarray, "m ..."] | None:
    """Samples, sample i under the condition of row i (the rows in turn) where there are some."""
    if num_samples == 0:
        return None
    part = parts.read("samples")
    if part is None or "samples" not in part or len(part["samples"]) != num_samples:
        turn = np.arange(num_samples) % num_rows
        latents = sample(
            model,
            num_samples,
            key=derive_key(seed, "samples"),
            conditions=jax.tree.map(lambda leaf: jnp.asarray(leaf)[turn], conditions),
            progress=lambda done, total: progress("drawing samples", done, total),
        )
        part = {"samples": np.asarray(decode_samples(model, latents))}
        parts.write("samples", part)
    return part["samples"]
