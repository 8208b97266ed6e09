"""The union of what detectors need: every evaluation once, and what all of them cost."""

from typing import NamedTuple

from jaxtyping import PyTree

from memjax._core.cost import Cost
from memjax.detect.protocol import Branch, Detector, Place, Product, Trajectory
from memjax.diffusion.combine import Score
from memjax.diffusion.flow import ProbabilityFlow, probability_flow


class BranchPlan(NamedTuple):
    """What is computed with one score at one place.

    Attributes:
        products: in an order in which each comes after those it is computed from.
        asked: those among them that a detector asked for.
        linearized: whether the Jacobian is wanted, here or by another score's product.
    """

    products: tuple[Product, ...]
    asked: tuple[Product, ...]
    linearized: bool


class EvaluationPlan(NamedTuple):
    """Every distinct evaluation.

    Attributes:
        places: for each place the scores wanted there, and their products.
        trajectories: the flows.
    """

    places: dict[Place, dict[Branch, BranchPlan]]
    trajectories: tuple[Trajectory, ...]


def plan_evaluations(detectors: tuple[Detector, ...], d: int) -> EvaluationPlan:
    """Union of what several detectors need.

    Args:
        detectors: any number of detectors.
        d: numbers in one image.

    Returns:
        Places, scores, products and flows in order of first mention, each once.
    """
    asked: dict[Place, dict[Branch, dict[Product, None]]] = {}
    trajectories: dict[Trajectory, None] = {}
    for detector in detectors:
        for point, products in detector.needs(d):
            if isinstance(point, Trajectory):
                trajectories[point] = None
                continue
            here = asked.setdefault(point.place, {}).setdefault(point.branch, {})
            here.update(dict.fromkeys(products))
    places = {place: _plan_place(branches) for place, branches in asked.items()}
    return EvaluationPlan(places, tuple(trajectories))


def _plan_place(asked: dict[Branch, dict[Product, None]]) -> dict[Branch, BranchPlan]:
    linearized = {
        other
        for branch, products in asked.items()
        for product in products
        for other in (branch, *product.branches(branch))
    }
    branches = dict.fromkeys((*asked, *sorted(linearized)))
    return {
        branch: BranchPlan(
            _in_order(tuple(asked.get(branch, ()))),
            tuple(asked.get(branch, ())),
            branch in linearized,
        )
        for branch in branches
    }


def _in_order(asked: tuple[Product, ...]) -> tuple[Product, ...]:
    """Those asked for and those they use, each after what it is computed from."""
    wanted: dict[Product, None] = {}

    def want(product: Product) -> None:
        for other in product.uses:
            want(other)
        wanted[product] = None

    for product in asked:
        want(product)
    ordered: dict[Product, None] = {}

    def place(product: Product) -> None:
        for other in (*product.uses, *(p for p in product.derives if p in wanted)):
            place(other)
        ordered[product] = None

    for product in wanted:
        place(product)
    return tuple(ordered)


def flow_of(trajectory: Trajectory, score: Score, condition: PyTree) -> ProbabilityFlow:
    """The flow that a detector asked for."""
    return probability_flow(
        score,
        trajectory.start.sigma,
        trajectory.sigma1,
        condition=condition,
        divergence=trajectory.divergence,
        num_products=trajectory.num_products,
        solver=trajectory.solver,
        num_steps=trajectory.num_steps,
    )


def _flow_cost(trajectory: Trajectory, d: int) -> Cost:
    flow = flow_of(trajectory, lambda x, sigma, condition: x, None)
    assert flow.num_evaluations is not None
    return flow.cost(d, flow.num_evaluations)


def place_cost(branches: dict[Branch, BranchPlan], d: int) -> Cost:
    """Network products made at one place, by all scores.

    Args:
        branches: what is computed there.
        d: numbers in one image.

    Returns:
        The evaluations and what is asked for on top of them, except what follows from the rest.
    """
    total = Cost()
    for plan in branches.values():
        total = total.plus(Cost(forward=1))
        for product in plan.products:
            if not any(other in plan.products for other in product.derives):
                total = total.plus(product.cost(d))
    return total


def cost(detectors: tuple[Detector, ...], d: int) -> Cost:
    """Network products one image costs when these detectors run together.

    Args:
        detectors: any number of detectors; shared evaluations count once.
        d: numbers in one image.

    Returns:
        The exact number of products made by ``evaluate_detectors``.
    """
    plan = plan_evaluations(detectors, d)
    total = Cost()
    for branches in plan.places.values():
        total = total.plus(place_cost(branches, d))
    for trajectory in plan.trajectories:
        total = total.plus(_flow_cost(trajectory, d))
    return total


class Requirements(NamedTuple):
    """What detectors need beside the audited model and images.

    Attributes:
        conditions: they compare the row's own condition with the null condition, or look at pure
            noise, where nothing but the condition tells rows apart.
        baseline: they compare the model with another one.
        images: the model must be one of images [height, width, channels].
    """

    conditions: bool
    baseline: bool
    images: bool = False


def requirements(detectors: tuple[Detector, ...], d: int) -> Requirements:
    """What must be given for these detectors to mean anything.

    Args:
        detectors: any number of detectors.
        d: numbers in one image.

    Returns:
        What at least one of them requires.
    """
    conditions = baseline = images = False
    for detector in detectors:
        plan = plan_evaluations((detector,), d)
        neighbors = {place.neighbor for place in plan.places}
        neighbors |= {trajectory.start.neighbor for trajectory in plan.trajectories}
        branches = {branch for here in plan.places.values() for branch in here}
        branches |= {trajectory.start.branch for trajectory in plan.trajectories}
        conditions |= len({branch.condition for branch in branches}) > 1
        conditions |= any(place.kind == "pure" for place in plan.places)
        baseline |= any(branch.model == "baseline" for branch in branches)
        images |= any(neighbor is not None and neighbor.needs_image for neighbor in neighbors)
    return Requirements(conditions, baseline, images)
