"""The demonstration audit: a model that is known to have stored some digits."""

from typing import Any

import numpy as np

from memjax.auditing.metrics import Truth
from memjax.auditing.plan import Calibration
from memjax.auditing.rows import Progress
from memjax.data.images import from_array
from memjax.training.testbeds import graded_testbed


def digits_audit(seed: int, progress: Progress) -> dict[str, Any]:
    """Arguments of ``audit`` for the graded test bed, training its model at first use.

    Half of the held-out digits calibrate membership flags, and half of the digits seen once
    calibrate duplication flags; the other halves are tested, so that every kind of row is.

    Args:
        seed: of the test bed: which digits are repeated and held out, and the training.
        progress: called while the model trains and samples.

    Returns:
        Keyword arguments: model, images, calibrations, samples, trained_on, truth.
    """
    bed, model, samples, extracted = graded_testbed(seed, progress=progress)
    multiplicity = np.asarray(bed.multiplicity)
    rng = np.random.default_rng([seed, 0xCA11])
    unseen, once = (rng.permutation(np.flatnonzero(multiplicity == m)) for m in (0, 1))
    return {
        "model": model,
        "images": from_array(bed.images, ids=bed.ids, labels=bed.labels),
        "calibrations": (
            Calibration("duplication", rows=once[: len(once) // 2], tested=multiplicity > 0),
            Calibration("membership", rows=unseen[: len(unseen) // 2]),
        ),
        "samples": samples,
        "trained_on": multiplicity > 0,
        "truth": Truth(multiplicity, extracted, bed.split),
    }
