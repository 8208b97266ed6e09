"""The test beds of the detector bench, one seed at a time, and every detector's values on them."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._quality import Question
from memjax._core.keys import derive_key
from memjax.densities.empirical import Empirical
from memjax.densities.planted import planted_mixture
from memjax.detect.evaluate import evaluate_detectors
from memjax.diffusion.model import Model
from memjax.evaluate.difficulty import image_difficulty
from memjax.training.testbeds import graded_testbed, prompts_testbed

GROUP_SIZES = (48, 48, 16, 16, 16)
EARLIER = 3000
TIMED_IMAGES = 256
QUICK_STEPS = {8000: 300, EARLIER: 150}


class Bed(NamedTuple):
    """One seed of a test bed.

    Attributes:
        score: of the model, or exact.
        images: one row each.
        questions: what to tell apart, the first being what choices are made by.
        conditions: one each row, or ``None``.
        baseline: the score of an earlier checkpoint, or ``None``.
        samples: drawn from the model, or ``None``.
        trained_on: rows that stand in the training set; what a sample is compared with.
        known: values at a noise level that no detector gives, by name: what theory says.
    """

    score: Any
    images: np.ndarray
    questions: dict[str, Question]
    conditions: Any = None
    baseline: Any = None
    samples: np.ndarray | None = None
    trained_on: np.ndarray | None = None
    known: Mapping[str, Callable[[float], np.ndarray]] = MappingProxyType({})


class Preconditioned(eqx.Module):
    """A test bed's score with the data's standard deviation among its leaves.

    In a ``Model`` that number is static: every training seed would be compiled anew.
    """

    network: Any
    data_std: jax.Array
    null_condition: Any

    def __call__(self, x, sigma, condition=None):
        """As EDM preconditions it: s = -x/(sigma^2 + d^2) + d/(sigma sqrt(sigma^2 + d^2)) F."""
        condition = self.null_condition if condition is None else condition
        sigma, std = jnp.asarray(sigma, x.dtype), self.data_std.astype(x.dtype)
        total = sigma**2 + std**2
        raw = self.network(x / jnp.sqrt(total), jnp.log(sigma) / 4, condition)
        return -x / total + (std / (sigma * jnp.sqrt(total))) * raw


def score_of(model: Model) -> Preconditioned:
    """The score of a trained test bed, compiled once for all seeds."""
    denoiser = model.raw_score.network  # type: ignore[attr-defined]
    return Preconditioned(denoiser.network, jnp.float32(denoiser.data_std), model.null_condition)


@cache
def graded(steps: int, seed: int, quick: bool) -> Bed:
    """Digits of which some stand several times in the training set."""

    def trained(steps):
        steps, samples = (QUICK_STEPS[steps], 64) if quick else (steps, 4096)
        return graded_testbed(seed, GROUP_SIZES, steps=steps, num_samples=samples)

    found = trained(steps)
    multiplicity = found.bed.multiplicity
    once = multiplicity == 1
    questions = {f"x{m}": Question(multiplicity == m, once) for m in (2, 4, 8, 16, 32)}
    questions["x4 or more"] = Question(multiplicity >= 4, once)
    questions["membership"] = Question(once, multiplicity == 0)
    questions["extracted"] = Question(found.extracted, (multiplicity > 0) & ~found.extracted)
    baseline = score_of(trained(EARLIER).model) if steps > EARLIER else None
    return Bed(
        score_of(found.model),
        found.bed.images,
        {name: q for name, q in questions.items() if q.positive.any()},
        baseline=baseline,
        samples=found.samples,
        trained_on=multiplicity > 0,
    )


@cache
def prompts(seed: int, quick: bool) -> Bed:
    """Prompts that store an image, or half of one; a row is a prompt with its first image."""
    found = prompts_testbed(seed, **({"steps": 150, "num_samples": 70} if quick else {}))
    kind = np.array(found.bed.kind)
    first = np.searchsorted(found.bed.prompt, np.arange(len(kind)))
    general = kind == "general"
    questions = {name: Question(kind == name, general) for name in ("memorized", "template")}
    return Bed(
        score_of(found.model),
        found.bed.images[first],
        questions | {"mitigation": Question(kind == "mitigation", general)},
        conditions=np.arange(len(kind), dtype=np.int32),
        samples=found.samples,
    )


@cache
def mixture(d: int, seed: int, quick: bool) -> Bed:
    """Points stored in a Gaussian mixture, against ordinary ones."""
    rows = {"num_stored": 10, "num_ordinary": 190} if quick or d > 100 else {}
    world = planted_mixture(derive_key(seed, "planted"), d, **rows)
    stored = np.asarray(world.stored)
    return Bed(
        world.density,
        np.asarray(world.points),
        {"stored": Question(stored, ~stored)},
        known={"log odds": lambda sigma: np.asarray(world.log_odds(sigma))},
    )


@cache
def empirical(d: int, seed: int, quick: bool) -> Bed:
    """A training set with repetitions as a density: what a model that stores everything learns."""
    num = 150 if quick else 300
    world = planted_mixture(
        derive_key(seed, "empirical"), d, num_stored=1, num_ordinary=2 * num - 1
    )
    multiplicity = np.zeros(2 * num)
    multiplicity[:num] = 1
    multiplicity[: num // 10] = 4
    kept = multiplicity > 0
    weights = multiplicity[kept] / multiplicity.sum()
    return Bed(
        Empirical(world.points[np.flatnonzero(kept)], weights, chunk_size=num),
        np.asarray(world.points),
        {
            "x4": Question(multiplicity == 4, multiplicity == 1),
            "membership": Question(multiplicity == 1, multiplicity == 0),
        },
    )


class Rescaled(eqx.Module):
    """A score in units of a noise level: x / sigma, sigma s, noise levels over sigma.

    The values of detectors have no dimension, so at noise level 1 of this score they are those at
    sigma of the score itself. The level is an array here: one program serves all of them.
    """

    score: Any
    sigma: jax.Array

    def __call__(self, x, sigma, condition=None):
        """``sigma s(sigma x, sigma t)`` at noise level t."""
        return self.sigma * self.score(self.sigma * x, self.sigma * sigma, condition)


@partial(jax.jit, static_argnames="detectors")
def chunk_values(score, baseline, images, conditions, key, sigma, detectors):
    """Values [row, detector] at noise level ``sigma``; the detectors are at level 1."""

    def rescaled(which):
        return None if which is None else Rescaled(which, sigma)

    def one(x, condition):
        found = evaluate_detectors(
            rescaled(score),
            x / sigma,
            detectors,
            key=key,
            condition=condition,
            baseline=rescaled(baseline),
        )
        return jnp.stack([finding.value for finding in found])

    return jax.vmap(one)(images, conditions)


def values(bed: Bed, detectors: Sequence[Any], sigma: float, chunk: int) -> np.ndarray:
    """Every detector on every row of a bed, [detector, row]: one program, evaluations shared."""
    n, key = len(bed.images), derive_key(0, "detectors")
    out = []
    for start in range(0, n, chunk):
        rows = np.minimum(np.arange(start, start + chunk), n - 1)
        conditions = None if bed.conditions is None else jnp.asarray(bed.conditions[rows])
        found = chunk_values(
            bed.score,
            bed.baseline,
            jnp.asarray(bed.images[rows]),
            conditions,
            key,
            jnp.asarray(sigma, bed.images.dtype),
            tuple(detectors),
        )
        out.append(np.asarray(found)[: n - start])
    return np.concatenate(out).T


def population(bed: Bed, question: str) -> np.ndarray:
    """Rows of an audit that asks this: the training set, or all where unseen rows are negatives."""
    everything = np.ones(len(bed.images), bool)
    trained = everything if bed.trained_on is None else bed.trained_on
    return everything if (bed.questions[question].negative & ~trained).any() else trained


def excesses(beds: Mapping[int, Bed]) -> Callable[[Any, int, np.ndarray, str], np.ndarray]:
    """What detectors that compare images make of values, by seed, for a question's population."""
    known: dict[tuple[int, bytes], np.ndarray] = {}

    def excess(detector, seed: int, column: np.ndarray, question: str) -> np.ndarray:
        among = population(beds[seed], question)
        at = seed, among.tobytes()
        if at not in known:
            known[at] = image_difficulty(beds[seed].images, among)
        return detector.excess(column, np.zeros_like(column), known[at], among)[0]

    return excess


def forwards(bed: Bed, detector: Any, sigma: float, repeats: int) -> float:
    """Seconds of a detector in seconds of one evaluation of the score, on the same images."""
    images, key = jnp.asarray(bed.images[:TIMED_IMAGES]), derive_key(0, "detectors")
    conditions = None if bed.conditions is None else jnp.asarray(bed.conditions[:TIMED_IMAGES])

    def forward(score, images, conditions, sigma):
        return jax.vmap(lambda x, c: score(x, sigma, c))(images, conditions)

    level = jnp.asarray(sigma, images.dtype)
    given = (bed.score, bed.baseline, images, conditions, key, level)
    alone = (bed.score, images, conditions, level)
    ours = chunk_values.lower(*given, detectors=(detector,)).compile()
    unit = jax.jit(forward).lower(*alone).compile()
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for run, arguments, own in ((ours, given, times[0]), (unit, alone, times[1])):
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            own.append(time.perf_counter() - start)
    return min(times[0][1:]) / min(times[1][1:])  # the first warms up
