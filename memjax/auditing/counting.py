"""How often images of a folder stand in a model's training set, rows that failed included."""

from typing import Any

import numpy as np
from jaxtyping import Integer

from memjax._core.backend import check_backend
from memjax._core.errors import InputError, MemjaxError
from memjax._core.status import Status
from memjax.auditing.localization import encode_images
from memjax.auditing.rows import Progress
from memjax.data.images import ImageSet, from_array
from memjax.detect.multiplicity import MultiplicityEstimate, estimate_multiplicity
from memjax.diffusion.model import Model
from memjax.training.testbeds import graded_testbed


def count_images(
    model: Model,
    images: ImageSet,
    conditions: Integer[np.ndarray, "m"] | None = None,
    **options: Any,
) -> MultiplicityEstimate:
    """``estimate_multiplicity`` of the rows that can be used; the others keep their status.

    Args:
        model: trained on most of the images.
        images: nearly all of its training set.
        conditions: one each row, for a model with such conditions.
        **options: of ``estimate_multiplicity``.

    Returns:
        One entry each row; NaN where there is no estimate.

    Raises:
        MemjaxError: this machine computes wrong numbers.
        InputError: no row can be used, or as ``estimate_multiplicity``.
    """
    backend = check_backend()
    if not backend.ok:
        raise MemjaxError(f"this machine computes wrong numbers: {backend.message}")
    ok = np.flatnonzero(images.ok)
    if not len(ok):
        raise InputError("images: expected some that can be used, found none")
    latents = encode_images(model, images.images[ok])
    if model.origin.assumed:
        std = float(np.std(latents, dtype=np.float64))
        model = model.with_data_std(std, "measured on the images")
    shown = None if conditions is None else conditions[ok]
    found = estimate_multiplicity(model, latents, conditions=shown, **options)
    n = len(images)

    def everywhere(column: np.ndarray, fill: Any) -> np.ndarray:
        out = np.full(n, fill, column.dtype)
        out[ok] = column
        return out

    status = images.status.copy()
    status[ok] = found.status
    return found._replace(
        value=everywhere(found.value, np.nan),
        multiplicity=everywhere(found.multiplicity, np.nan),
        standard_error=everywhere(found.standard_error, np.nan),
        held_at=everywhere(found.held_at, 0),
        status=np.where(images.ok, status, np.maximum(images.status, Status.NONFINITE)),
    )


def digits_counts(seed: int, progress: Progress) -> dict[str, Any]:
    """The training set of the graded test bed.

    Args:
        seed: of the test bed and the training.
        progress: called while the model trains.

    Returns:
        ``model``; ``images``, each of them once; ``times`` that each stands in the training set.
    """
    bed, model, *_ = graded_testbed(seed, num_samples=64, progress=progress)
    rows = np.flatnonzero(bed.multiplicity)
    return {
        "model": model,
        "images": from_array(bed.images[rows], ids=tuple(bed.ids[row] for row in rows)),
        "times": bed.multiplicity[rows],
    }
