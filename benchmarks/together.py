"""What all detectors of one noise level cost together: in turn with those of them alone.

On digits (a trained network of 64 numbers, where spectra are dense), in turn with every detector;
on images of 32 by 32 pixels in color (a U-Net with random weights: its values mean nothing, its
time is that of any weights), in turn with the dearest. The cases are ``detectors/together`` and
``detectors/together-unet``: their results stand beside the tables of ``detectors``.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _unet
from benchmarks._beds import Preconditioned, chunk_values, graded
from benchmarks.harness import Baseline, Case, Program
from memjax._core.keys import derive_key
from memjax.auditing.plan import DETECTORS
from memjax.detect.plan import Requirements, cost, plan_evaluations, requirements
from memjax.diffusion.adapters import LinenNetwork

SIGMA, TARGET = 0.1, 1.3
TOLERANCE = 2e-3
SEED = 6
"""Of the trained network: the first that ``detectors`` scores on."""


def _fits(detector: Any, d: int) -> bool:
    """Whether it needs nothing but a score and an image, and no flow."""
    flows = plan_evaluations((detector,), d).trajectories
    return not flows and requirements((detector,), d) == Requirements(False, False)


def _program(
    score: Callable, images: jax.Array, seed: int, checked: int, *, weights: str, each: bool
) -> Program:
    """All detectors, flows apart, on some images.

    Args:
        score: a pytree.
        images: one row each.
        seed: of the draws.
        checked: images on which each detector is run alone, one image at a time.
        weights: "trained" or "random", for the record.
        each: in turn with each detector alone, not only with the dearest.
    """
    d = images[0].size
    detectors = tuple(kind(1.0) for kind in DETECTORS.values() if _fits(kind(1.0), d))
    key, sigma = derive_key(seed, "detectors"), jnp.asarray(SIGMA, images.dtype)

    def run(detectors, score, images):
        return chunk_values(score, None, images, None, key, sigma, detectors=detectors)

    def forward(score, images):
        return jax.vmap(lambda x: score(x, SIGMA))(images)

    seconds, reference = [], np.empty((checked, len(detectors)))
    for i, detector in enumerate(detectors):
        alone, times = jax.jit(partial(run, (detector,))), []
        for row in (0, *range(checked)):  # the first compiles
            start = time.perf_counter()
            reference[row, i] = alone(score, images[row : row + 1])[0, 0]
            times.append(time.perf_counter() - start)
        seconds.append(min(times[1:]))
    dearest = int(np.argmax(seconds))

    def check(columns, out) -> float:
        found, expected = np.asarray(out, np.float64)[:checked], reference[:, columns]
        # A number that is 0 for every image is exactly that.
        size = np.max(np.abs(expected), axis=0)
        return float(np.max(np.abs(found - expected) / np.where(size > 0, size, 1)))

    return Program(
        partial(run, detectors),
        (score, images),
        partial(check, slice(None)),
        TOLERANCE,
        (forward, (score, images)),
        parameters={
            "images": len(images),
            "event_shape": list(images.shape[1:]),
            "weights": weights,
            "network_parameters": sum(leaf.size for leaf in jax.tree.leaves(score)),
            "sigma": SIGMA,
            "detectors": [detector.name for detector in detectors],
            "dearest": detectors[dearest].name,
            "products": int(cost(detectors, d).total),
            "products_alone": [int(cost((detector,), d).total) for detector in detectors],
        },
        baselines={
            f"{detector.name} alone": Baseline(
                partial(run, (detector,)),
                (score, images),
                partial(check, slice(i, i + 1)),
                target=TARGET if i == dearest else None,
            )
            for i, detector in enumerate(detectors)
            if each or i == dearest
        },
    )


def _digits(quick: bool, seed: int) -> Program:
    bed = graded(8000, SEED, quick)
    images = jnp.asarray(bed.images[:64])
    return _program(bed.score, images, seed, 4, weights="trained", each=True)


def _color(quick: bool, seed: int) -> Program:
    net = _unet.network(quick, seed)
    score = Preconditioned(LinenNetwork(net.module, net.weights), jnp.float32(0.5), None)
    images = net.points[: 2 if quick else 4] / 2
    return _program(score, images, seed, 2, weights="random", each=False)


def cases() -> list[Case]:
    """The time of all detectors together: small vectors, then images."""
    return [Case("detectors/together", _digits), Case("detectors/together-unet", _color)]
