"""What all detectors of one noise level cost together: in turn with each of them alone.

The cases are ``detectors/together``: their results stand beside the tables of ``detectors``.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._beds import chunk_values, graded
from benchmarks.harness import Baseline, Case, Program
from memjax._core.keys import derive_key
from memjax.auditing.plan import DETECTORS
from memjax.detect.plan import Requirements, cost, plan_evaluations, requirements

SIGMA, IMAGES, TARGET = 0.1, 64, 1.3
SEED = 6
"""Of the trained network: the first that ``detectors`` scores on."""


def _fits(detector: Any, d: int) -> bool:
    """Whether it needs nothing but a score and an image, and no flow."""
    flows = plan_evaluations((detector,), d).trajectories
    return not flows and requirements((detector,), d) == Requirements(False, False)


def _digits(quick: bool, seed: int) -> Program:
    """All detectors of one noise level, flows apart, in turn with each alone."""
    bed = graded(8000, SEED, quick)
    d = bed.images[0].size
    detectors = tuple(kind(1.0) for kind in DETECTORS.values() if _fits(kind(1.0), d))
    images, key = jnp.asarray(bed.images[:IMAGES]), derive_key(seed, "detectors")
    arguments = (bed.score, None, images, None, key, jnp.asarray(SIGMA, images.dtype))

    def run(detectors, *arguments):
        return chunk_values(*arguments, detectors=detectors)

    def forward(score, images):
        return jax.vmap(lambda x: score(x, SIGMA))(images)

    def seconds(detector) -> float:
        compiled = jax.jit(partial(run, (detector,))).lower(*arguments).compile()
        times = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times.append(time.perf_counter() - start)
        return min(times)

    # One image at a time, each detector by itself.
    one = [jax.jit(partial(run, (detector,))) for detector in detectors]
    reference = np.array(
        [
            [float(f(*arguments[:2], images[i : i + 1], *arguments[3:])[0, 0]) for f in one]
            for i in range(4)
        ]
    )

    def check(columns, out) -> float:
        found = np.asarray(out, np.float64)[:4]
        expected = reference[:, columns]
        return float(np.max(np.abs(found - expected) / np.max(np.abs(expected), axis=0)))

    dearest = max(detectors, key=seconds)
    return Program(
        partial(run, detectors),
        arguments,
        partial(check, slice(None)),
        2e-3,
        (forward, (bed.score, images)),
        parameters={
            "images": IMAGES,
            "sigma": SIGMA,
            "detectors": [detector.name for detector in detectors],
            "dearest": dearest.name,
            "products": int(cost(detectors, d).total),
        },
        baselines={
            f"{detector.name} alone": Baseline(
                partial(run, (detector,)),
                arguments,
                partial(check, slice(i, i + 1)),
                target=TARGET if detector is dearest else None,
            )
            for i, detector in enumerate(detectors)
        },
    )


def cases() -> list[Case]:
    """The time of all detectors together."""
    return [Case("detectors/together", _digits)]
