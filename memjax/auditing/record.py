"""What must be written down to repeat an audit: hashes, versions, parameters, costs."""

import dataclasses
import datetime
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from memjax import __version__
from memjax._core.backend import BackendReport
from memjax._core.cost import Cost
from memjax._core.hashing import fingerprint
from memjax.auditing.findings import Copies
from memjax.auditing.plan import Calibration, PlannedDetector
from memjax.auditing.rows import status_labels
from memjax.data.images import ImageSet
from memjax.detect.plan import cost
from memjax.detect.sample_distance import SampleDetector
from memjax.diffusion.model import Model

CALIBRATION_WORDS = {
    "membership": "images that were not trained on",
    "duplication": "training images known to occur once",
}


def plan_record(
    model: Model,
    images: ImageSet,
    planned: Sequence[PlannedDetector],
    calibrations: Sequence[Calibration],
    baseline: Model | None,
    **settings: Any,
) -> dict[str, Any]:
    """Everything that determines an audit's numbers, as JSON-ready values.

    Two runs with equal records may share finished chunks; two with different ones may not.

    Args:
        model: the audited model.
        images: the rows.
        planned: the detectors.
        calibrations: what flags are calibrated with.
        baseline: the model compared with, if any.
        **settings: seed, chunk size and the like.

    Returns:
        Hashes and settings by name.
    """
    return {
        "detectors": [repr(entry.detector) for entry in planned],
        "model": fingerprint(model),
        "baseline": None if baseline is None else fingerprint(baseline),
        "data": _data_hash(images),
        "calibrations": [_calibration_record(calibration) for calibration in calibrations],
        **settings,
        "memjax": __version__,
        "jax": jax.__version__,
    }


def build_manifest(
    model: Model,
    images: ImageSet,
    planned: Sequence[PlannedDetector],
    calibrations: Mapping[str, int],
    copies: Copies | None,
    backend: BackendReport,
    baseline: Model | None,
    plan: dict[str, Any],
    seconds: dict[str, float],
    names: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of a finished audit.

    Args:
        model: the audited model.
        images: the data rows.
        planned: the detectors; the first is the primary one.
        calibrations: number of calibration rows by meaning.
        copies: what samples reproduce; ``None`` if none were drawn.
        backend: what ``check_backend`` found.
        baseline: the model compared with, if any.
        plan: the ``plan_record``.
        seconds: time by stage.
        names: model, data and command, as the user calls them.

    Returns:
        Nested dictionaries and lists of JSON values.
    """
    labels, counts = np.unique(status_labels(images.status), return_counts=True)
    return {
        "memjax": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "state": "completed",
        "command": names.get("command"),
        "versions": backend.versions,
        "devices": backend.devices,
        "seed": plan["seed"],
        "chunk_size": plan["chunk_size"],
        "plan": plan,
        "model": _model_record(model, names.get("model"), plan["model"]),
        "baseline": None
        if baseline is None
        else _model_record(baseline, names.get("baseline"), plan["baseline"]),
        "conditions": plan["conditions"],
        "data": {
            "name": names.get("data"),
            "rows": len(images),
            "sha256": plan["data"],
            "status_counts": dict(zip(labels.tolist(), counts.tolist(), strict=True)),
        },
        "detectors": [_detector_record(entry, model) for entry in planned],
        "primary": planned[0].label,
        "calibrations": [
            {
                "meaning": meaning,
                "count": count,
                "fdr": plan["fdr"],
                "description": CALIBRATION_WORDS[meaning],
            }
            for meaning, count in calibrations.items()
        ],
        "samples": None
        if copies is None
        else {"count": len(copies.samples), "rule": "d1/d2 < 1/3", "copies": copies.copying},
        "backend": {"ok": backend.ok, "message": backend.message},
        "seconds": seconds,
    }


def _model_record(model: Model, name: str | None, digest: str) -> dict[str, Any]:
    return {
        "name": name,
        "sha256": digest,
        "event_shape": list(model.event_shape),
        "data_std": model.data_std,
        "sigma_min": model.sigma_min,
        "sigma_max": model.sigma_max,
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(model)),
        "origin": {**dataclasses.asdict(model.origin), "sha256": dict(model.origin.sha256)},
    }


def _data_hash(images: ImageSet) -> str:
    digest = hashlib.sha256()
    for name, content, status in zip(images.ids, images.sha256, images.status, strict=True):
        digest.update(f"{name!r} {content} {int(status)}\n".encode())
    return digest.hexdigest()


def _calibration_record(calibration: Calibration) -> list[str | None]:
    images = None if calibration.images is None else _data_hash(calibration.images)
    rows, tested = (
        None if part is None else fingerprint(np.asarray(part))
        for part in (calibration.rows, calibration.tested)
    )
    record = [calibration.meaning, images, rows, tested]
    if calibration.conditions is not None:
        record.append(fingerprint(calibration.conditions))
    return record


def _detector_record(entry: PlannedDetector, model: Model) -> dict[str, Any]:
    detector, evaluated = entry.detector, entry.evaluated
    record = {
        "name": entry.label,
        "title": detector.title,
        "column": entry.label,
        "sigma": None,
        "sigma_over_data_std": entry.level,
        "statement": detector.statement,
        "raw": detector.raw_name,
        "cost": Cost()._asdict(),
    }
    if not isinstance(evaluated, SampleDetector):
        record["sigma"] = evaluated.sigma
        record["cost"] = cost((evaluated,), int(np.prod(model.event_shape)))._asdict()
    return record
