"""Run detectors on one image: the union of their needs, each evaluation made once."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.calculus.linearization import linearize
from memjax.detect.protocol import (
    Detector,
    Evaluation,
    Finding,
    Point,
    Product,
    merge_needs,
)
from memjax.diffusion.combine import Score, at


def _displacement(point: Point, key: PRNGKeyArray, x: Float[Array, "..."]) -> Float[Array, "..."]:
    if point.kind == "clean":
        return jnp.zeros_like(x)
    n = jax.random.normal(derive_key(key, "draw", point.draw), x.shape, x.dtype)
    if point.kind == "noised":
        return point.sign * point.sigma * n
    return point.sign * point.radius * n / jnp.sqrt(jnp.sum(n * n))


def _evaluate_group(
    score: Score,
    condition: PyTree,
    x: Float[Array, "..."],
    displacements: Float[Array, "k ..."],
    sigmas: Float[Array, "k"],
    products: tuple[Product, ...],
) -> tuple[Float[Array, "k ..."], tuple[Any, ...]]:
    def one(displacement, sigma):
        field = at(score, sigma, condition)
        if not products:
            return field(x + displacement), ()
        linearization = linearize(field, x + displacement)
        return linearization.value, tuple(product(linearization) for product in products)

    if not products:
        return jax.vmap(one)(displacements, sigmas)
    # One linearisation in memory at a time: its products already fill the machine.
    return jax.lax.map(lambda arguments: one(*arguments), (displacements, sigmas))


def evaluate_detectors(
    score: Score,
    x: Float[Array, "..."],
    detectors: tuple[Detector, ...],
    *,
    key: PRNGKeyArray,
    condition: PyTree = None,
    baseline: Score | None = None,
) -> tuple[Finding, ...]:
    """Every detector's finding for one image, from the fewest evaluations.

    Evaluations that several detectors need are made once, and those with the same products are
    batched. Pure and traceable: ``jit`` and ``vmap`` it over images, with the score (and its
    weights) as an argument of the jitted function and ``detectors`` static.

    Args:
        score: ``(x, sigma, condition=None) -> s`` in EDM coordinates; a ``Model`` will do.
        x: one clean image, of the model's event shape.
        detectors: what to compute.
        key: randomness of the draws; share it between images (common random numbers).
        condition: the image's own condition; ``None`` for the model's null condition.
        baseline: the score that ``Point(model="baseline")`` refers to.

    Returns:
        One ``Finding`` of scalars per detector, in order. Non-finite numbers give a status, not
        an exception.

    Raises:
        InputError: a detector needs a baseline and none is given.

    Cost: ``memjax.detect.cost(detectors, x.size)`` exactly.
    """
    groups: dict[tuple, list[Point]] = {}
    needs = merge_needs(detectors, x.size)
    for point, products in needs.items():
        groups.setdefault((point.model, point.condition, products), []).append(point)

    evidence: dict[Point, Evaluation] = {}
    for (which, branch, products), points in groups.items():
        if which == "baseline" and baseline is None:
            raise InputError("baseline: a detector compares two models, and no baseline is given")
        displacements = jnp.stack([_displacement(point, key, x) for point in points])
        sigmas = jnp.asarray([point.sigma for point in points], x.dtype)
        scores, results = _evaluate_group(
            score if which == "target" else baseline,  # type: ignore[arg-type]
            condition if branch == "given" else None,
            x,
            displacements,
            sigmas,
            products,
        )
        for i, point in enumerate(points):
            values = {
                product: jax.tree.map(lambda leaf, i=i: leaf[i], result)
                for product, result in zip(products, results, strict=True)
            }
            evidence[point] = Evaluation(displacements[i], scores[i], values)
    return tuple(detector.finish(evidence) for detector in detectors)
