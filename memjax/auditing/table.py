"""One table of everything an audit says about each row, and the pictures to go with it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from memjax._core.errors import require
from memjax.auditing.findings import Copies, Flags, rank_rows
from memjax.auditing.metrics import Truth
from memjax.auditing.plan import PlannedDetector
from memjax.auditing.rows import RowFindings, status_labels
from memjax.data.images import ImageSet

GALLERY_ROWS = 24


def _nullable(values: np.ndarray, known: Bool[np.ndarray, "n"], kind: Any) -> Any:
    pa = require("pyarrow", "audit")
    return pa.array(values, type=kind, mask=~known)


def build_table(
    images: ImageSet,
    planned: Sequence[PlannedDetector],
    found: RowFindings,
    flags: Sequence[Flags],
    copies: Copies | None,
    truth: Truth | None,
    num_data: int,
) -> Any:
    """Put findings, ranks, flags, copies and truth side by side.

    Args:
        images: all rows, data first, then calibration images from elsewhere.
        planned: the detectors; the first is the primary one.
        found: their findings on all rows.
        flags: one per calibration and detector.
        copies: what samples reproduce, over the data rows; ``None`` if none were drawn.
        truth: what is known of the data rows.
        num_data: how many rows are data; only they are ranked.

    Returns:
        A ``pyarrow.Table``; columns as ``AuditResult.table`` says.
    """
    pa = require("pyarrow", "audit")
    n = len(images)
    data = np.arange(n) < num_data
    columns: dict[str, Any] = {
        "row": pa.array(np.arange(n), pa.int64()),
        "id": pa.array([name.encode("utf-8", "replace").decode() for name in images.ids]),
        "sha256": pa.array(images.sha256, pa.string()),
        "source": pa.array(["data" if is_data else "calibration" for is_data in data]),
        "status": pa.array(status_labels(_row_status(found))),
        "reason": pa.array(images.reasons, pa.string()),
    }
    for k, entry in enumerate(planned):
        value = found.value[:, k]
        rank = rank_rows(np.where(data, value, np.nan))
        ranked = rank > 0
        if k == 0:
            columns["rank"] = _nullable(rank, ranked, pa.int64())
        finite = np.isfinite(value)
        columns[entry.label] = _nullable(value, finite, pa.float64())
        columns[f"{entry.label}_raw"] = _nullable(found.raw[:, k], finite, pa.float64())
        columns[f"{entry.label}_se"] = _nullable(found.standard_error[:, k], finite, pa.float64())
        columns[f"{entry.label}_status"] = pa.array(status_labels(found.status[:, k]))
        columns[f"{entry.label}_rank"] = _nullable(rank, ranked, pa.int64())
    for flag in flags:
        columns.setdefault(f"role_{flag.meaning}", pa.array(flag.role.tolist(), pa.string()))
        name = f"{flag.meaning}_{flag.label}"
        columns[f"p_{name}"] = _nullable(flag.p_value, np.isfinite(flag.p_value), pa.float64())
        columns[f"flag_{name}"] = _nullable(flag.flagged, np.isfinite(flag.p_value), pa.bool_())

    def padded(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, np.zeros(n - num_data, values.dtype)])

    if copies is None:
        none = np.zeros(n, bool)
        columns["stored"] = _nullable(none, none, pa.bool_())
        columns["copies"] = _nullable(none.astype(np.int64), none, pa.int64())
        columns["nearest_sample_distance"] = _nullable(none.astype(float), none, pa.float64())
    else:
        tested = padded(copies.tested)
        columns["stored"] = _nullable(padded(copies.hits) > 0, tested, pa.bool_())
        columns["copies"] = _nullable(padded(copies.hits), tested, pa.int64())
        near = padded(copies.nearest_distance)
        known = data & np.isfinite(near)
        columns["nearest_sample_distance"] = _nullable(near, known, pa.float64())
    if truth is not None:
        columns["split"] = pa.array([*truth.split, *[None] * (n - num_data)], pa.string())
        columns["multiplicity"] = _nullable(padded(truth.multiplicity), data, pa.int64())
        columns["extracted"] = _nullable(padded(truth.extracted), data, pa.bool_())
    return pa.table(columns)


def _row_status(found: RowFindings) -> np.ndarray:
    """The first detector's status that is not OK, for each row."""
    status = found.status
    first = np.argmax(status != 0, axis=1)
    return status[np.arange(len(status)), first]


def gallery(
    images: ImageSet, primary: Float[np.ndarray, "n"], copies: Copies | None
) -> dict[str, np.ndarray]:
    """Pictures of the first rows beside the samples nearest to them.

    Args:
        images: the data rows.
        primary: the primary detector's values on them.
        copies: nearest samples, if any were drawn.

    Returns:
        ``rows`` (row numbers, best first), ``images``, ``nearest_samples`` (NaN where there is
        none) and ``nearest_distance``.
    """
    rank = rank_rows(primary)
    order = np.argsort(np.where(rank > 0, rank, len(rank) + 1), kind="stable")
    rows = order[: min(GALLERY_ROWS, int(np.sum(rank > 0)))]
    pictures = images.images[rows]
    if copies is None:
        samples, distance = np.full_like(pictures, np.nan), np.full(len(rows), np.nan)
    else:
        samples = copies.samples[copies.nearest[rows]]
        distance = copies.nearest_distance[rows]
    return {
        "rows": rows.astype(np.int64),
        "images": pictures.astype(np.float32),
        "nearest_samples": samples.astype(np.float32),
        "nearest_distance": distance.astype(np.float64),
    }
