"""Evaluate detectors on many images, chunk by chunk, each chunk committed as it is done."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.auditing.parts import Parts
from memjax.data.images import ImageSet
from memjax.detect.evaluate import evaluate_detectors
from memjax.detect.protocol import Detector, Finding
from memjax.detect.sample_distance import SampleDetector
from memjax.diffusion.model import Model

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much is done, out of how much)."""


class RowFindings(NamedTuple):
    """Findings of k detectors on n images, as plain arrays.

    Attributes:
        value: oriented, larger = more memorized; NaN in failed rows.
        raw: in the papers' scaling.
        standard_error: of ``value``.
        status: ``memjax.Status`` codes.
    """

    value: Float[np.ndarray, "n k"]
    raw: Float[np.ndarray, "n k"]
    standard_error: Float[np.ndarray, "n k"]
    status: Int[np.ndarray, "n k"]


@partial(jax.jit, static_argnames="detectors")
def _evaluate_chunk(
    model: Model,
    baseline: Model | None,
    images: Float[Array, "c ..."],
    conditions: PyTree,
    key: PRNGKeyArray,
    detectors: tuple[Detector, ...],
) -> Finding:
    def one(image, condition):
        x = model.encode(image)
        findings = evaluate_detectors(
            model, x, detectors, key=key, condition=condition, baseline=baseline
        )
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *findings)

    return jax.vmap(one)(images, conditions)


def evaluate_rows(
    model: Model,
    images: ImageSet,
    detectors: tuple[Detector, ...],
    *,
    baseline: Model | None = None,
    conditions: PyTree = None,
    seed: int,
    chunk_size: int,
    parts: Parts,
    prefix: str,
    progress: Progress,
) -> RowFindings:
    """Every detector on every readable image.

    All chunks have one shape: the last is filled up with its own last row. Rows that could not
    be read keep their place with their status, and never enter the network.

    Args:
        model: the audited model.
        images: the rows.
        detectors: what to compute.
        baseline: the model that detectors may compare with, on the same encoded images.
        conditions: pytree of arrays with one leading row axis, or ``None``.
        seed: of the detectors' random draws.
        chunk_size: rows evaluated together.
        parts: where finished chunks are kept, and found again.
        prefix: names these rows' parts.
        progress: called after each chunk.

    Returns:
        Arrays over all rows, in the order of ``images``.
    """
    columns = _empty(images, len(detectors))
    if not detectors:
        return columns
    key = derive_key(seed, "detectors")
    good = np.flatnonzero(images.ok)
    title = "evaluating detectors"
    progress(title, 0, len(good))
    for start in range(0, len(good), chunk_size):
        rows = good[start : start + chunk_size]
        name = f"{prefix}-{start:08d}"
        part = parts.read(name)
        if part is None or not _fits(part, rows, len(detectors)):
            filled = np.concatenate([rows, np.repeat(rows[-1:], chunk_size - len(rows))])
            found = _evaluate_chunk(
                model,
                baseline,
                jnp.asarray(images.images[filled]),
                jax.tree.map(lambda leaf, filled=filled: jnp.asarray(leaf)[filled], conditions),
                key,
                detectors,
            )
            part = {k: np.asarray(v)[: len(rows)] for k, v in found._asdict().items()}
            part["rows"] = rows
            parts.write(name, part)
        for field, column in zip(RowFindings._fields, columns, strict=True):
            column[rows] = part[field]
        progress(title, min(start + chunk_size, len(good)), len(good))
    return columns


def compare_rows(
    images: ImageSet,
    detectors: tuple[SampleDetector, ...],
    samples: Float[np.ndarray, "m ..."] | None,
    reference: Float[np.ndarray, "r ..."],
) -> RowFindings:
    """Every detector that looks at samples, on every readable image.

    Args:
        images: the rows.
        detectors: what to compute.
        samples: images drawn from the model; ``None`` only if there is no detector.
        reference: training images, as far as they are known.

    Returns:
        Arrays over all rows, in the order of ``images``; unreadable rows keep their status.
    """
    columns = _empty(images, len(detectors))
    good = np.flatnonzero(images.ok)
    for k, detector in enumerate(detectors):
        assert samples is not None
        found = detector.compare(images.images[good], samples, reference)
        columns.value[good, k] = found.value
        columns.raw[good, k] = found.raw
        columns.standard_error[good, k] = np.where(found.status == Status.OK, 0.0, np.nan)
        columns.status[good, k] = found.status
    return columns


def _empty(images: ImageSet, k: int) -> RowFindings:
    """No finding yet, and the rows' own status."""
    shape = (len(images), k)
    return RowFindings(
        value=np.full(shape, np.nan),
        raw=np.full(shape, np.nan),
        standard_error=np.full(shape, np.nan),
        status=np.repeat(np.asarray(images.status, np.int32)[:, None], k, axis=1),
    )


def _fits(part: dict[str, np.ndarray], rows: np.ndarray, k: int) -> bool:
    shape = (len(rows), k)
    return np.array_equal(part.get("rows", ()), rows) and all(
        field in part and part[field].shape == shape for field in RowFindings._fields
    )


def status_labels(status: Int[np.ndarray, "n"]) -> list[str]:
    """Status codes as the words written into tables."""
    return [Status(int(code)).label for code in status]
