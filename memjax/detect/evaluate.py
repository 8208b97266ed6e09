"""Run detectors on one image: the union of their needs, each evaluation made once."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.calculus.linearization import linearize
from memjax.detect.plan import BranchPlan, flow_of, place_cost, plan_evaluations
from memjax.detect.protocol import (
    Branch,
    Detector,
    Evaluation,
    Finding,
    Local,
    Neighbor,
    Place,
    Point,
    Product,
    Trajectory,
)
from memjax.diffusion.combine import Score, at
from memjax.diffusion.volume import VolumeGrowth, volume_growth

_NUMBERS = 2**14
"""Numbers in the tangents that several places may hold together."""


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
    batched, as far as what the products keep in memory allows. Pure and traceable: ``jit`` and
    ``vmap`` it over images, with the score (and its weights) as an argument of the jitted function
    and ``detectors`` static.

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
    plan = plan_evaluations(detectors, x.size)

    def score_of(branch: Branch) -> tuple[Score, PyTree]:
        if branch.model == "baseline" and baseline is None:
            raise InputError("baseline: a detector compares two models, and no baseline is given")
        which = score if branch.model == "target" else baseline
        return which, condition if branch.condition == "given" else None  # type: ignore[return-value]

    groups: dict[tuple, list[Place]] = {}
    for place, branches in plan.places.items():
        groups.setdefault((place.neighbor, tuple(branches.items())), []).append(place)
    evidence: dict[Any, Any] = {}
    for (neighbor, branches), places in groups.items():
        scores = {branch: score_of(branch) for branch, _ in branches}
        center = _center(neighbor, x)
        found = _evaluate_group(scores, dict(branches), places, center, key)
        for i, place in enumerate(places):
            here = jax.tree.map(lambda leaf, i=i: leaf[i], found)
            for (branch, branch_plan), (displacement, value, results) in zip(
                branches, here, strict=True
            ):
                point = Point(**place._asdict(), **branch._asdict())
                products = dict(zip(branch_plan.asked, results, strict=True))
                evidence[point] = Evaluation(displacement, value, products)
    for trajectory in plan.trajectories:
        which, branch_condition = score_of(trajectory.start.branch)
        center = _center(trajectory.start.neighbor, x)
        evidence[trajectory] = _follow(trajectory, which, branch_condition, center, key)
    return tuple(detector.finish(evidence) for detector in detectors)


def _center(neighbor: Neighbor | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x if neighbor is None else neighbor(x)


def _evaluate_group(
    scores: dict[Branch, tuple[Score, PyTree]],
    plans: dict[Branch, BranchPlan],
    places: list[Place],
    x: Float[Array, "..."],
    key: PRNGKeyArray,
) -> tuple[Any, ...]:
    """Displacement, score and products by branch, at places where the same is wanted, stacked."""
    displacements = _displacements(places, key, x)
    sigmas = jnp.asarray([place.sigma for place in places], x.dtype)

    def one(displacement, sigma):
        values, linearizations = {}, {}
        for branch, plan in plans.items():
            which, condition = scores[branch]
            field = at(which, sigma, condition)
            if plan.linearized:
                linearizations[branch] = linearize(field, x + displacement)
                values[branch] = linearizations[branch].value
            else:
                values[branch] = field(x + displacement)
        out = []
        for branch, plan in plans.items():
            results: dict[Product, Any] = {}
            for product in plan.products:
                local = Local(linearizations, branch, results, derive_key(key, "product"))
                results[product] = product(local)
            asked = tuple(results[product] for product in plan.asked)
            out.append((displacement, values[branch], asked))
        return tuple(out)

    together = _places_together(plans, len(places), x.size)
    if together == len(places):
        return jax.vmap(one)(displacements, sigmas)
    return jax.lax.map(
        lambda arguments: one(*arguments),
        (displacements, sigmas),
        batch_size=together if together > 1 else None,
    )


def _places_together(plans: dict[Branch, BranchPlan], num_places: int, d: int) -> int:
    """How many places are evaluated at once: all of them where only scores are wanted.

    Elsewhere their products may hold what an exact trace does at one place, and not more than
    ``_NUMBERS``: every place keeps its linearization too, which for large images is the most.
    """
    if not any(plan.linearized for plan in plans.values()):
        return num_places
    products = max(1, int(place_cost(plans, d).jvp))
    most = max(1, min(d, _NUMBERS // d) // products)
    # In equal parts: what is left over is compiled for itself.
    return -(-num_places // -(-num_places // most))


def _follow(
    trajectory: Trajectory,
    score: Score,
    condition: PyTree,
    x: Float[Array, "..."],
    key: PRNGKeyArray,
) -> VolumeGrowth:
    start = trajectory.start
    (displacement,) = _displacements([start.place], key, x)
    growth = volume_growth(flow_of(trajectory, score, condition), solver_error=False)
    return growth(x + displacement, derive_key(key, "flow"))


def _displacements(
    places: list[Place], key: PRNGKeyArray, x: Float[Array, "..."]
) -> Float[Array, "places ..."]:
    """Steps from x to every place, all at once: that compiles far faster than one by one."""
    if all(place.kind == "clean" for place in places):
        return jnp.zeros((len(places), *x.shape), x.dtype)

    def column(values: list[float | bool]) -> Array:
        return jnp.asarray(values).reshape(-1, *(1 for _ in x.shape))

    def draw_noise(draw):
        n = jax.random.normal(derive_key(key, "draw", draw), x.shape, x.dtype)
        return n, n / jnp.sqrt(jnp.sum(n * n))

    draws = sorted({place.draw for place in places})
    # Computed once, so that antithetic partners are exactly that.
    noises, units = jax.lax.optimization_barrier(jax.vmap(draw_noise)(jnp.asarray(draws)))
    which = jnp.asarray([draws.index(place.draw) for place in places])
    on_sphere = column([place.kind == "sphere" for place in places])
    sizes = [p.sign * {"clean": 0.0, "noised": p.sigma}.get(p.kind, p.radius) for p in places]
    moved = column(sizes).astype(x.dtype) * jnp.where(on_sphere, units[which], noises[which])
    return jnp.where(column([p.kind == "pure" for p in places]), moved - x[None], moved)
