"""Extraction: draw samples in several ways, and say which of them may be stored images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from memjax import __version__
from memjax._core.errors import InputError
from memjax._core.hashing import fingerprint
from memjax._core.status import Status
from memjax.auditing.parts import Parts
from memjax.auditing.rows import Progress
from memjax.auditing.stages import Candidates, SampleSet, Side, Stages
from memjax.diffusion.model import Model
from memjax.extract.candidates import rank_by_density
from memjax.training.testbeds import graded_testbed

Method = Literal["fixed-points", "side", "both"]
LEVEL = 0.125
"""Noise level of the fixed points in standard deviations of the data."""
NUM_STEPS = 200
EVALUATIONS = 35
"""Of one sample: Heun's rule in 18 steps."""
WIDE = (0, 0, 128, 64, 0)
"""Images that stand 2, 4, 8, 16 and 32 times in the test bed's training set."""


class Extracted(NamedTuple):
    """Samples, and candidates among them.

    Attributes:
        plan: everything that determined them, as JSON-ready values.
        sets: samples in every way they were drawn, equally many.
        candidates: ranked.
        facts: what else is worth knowing, by name.
    """

    plan: dict[str, Any]
    sets: tuple[SampleSet, ...]
    candidates: Candidates
    facts: dict[str, Any]


def extract(
    model: Model,
    *,
    method: Method = "fixed-points",
    num_samples: int = 2048,
    level: float | None = None,
    num_steps: int = NUM_STEPS,
    side: Side | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Draw samples, bring out what the model has stored, and rank candidates.

    Args:
        model: unguided; its null condition is used.
        method: ``"fixed-points"`` iterates samples through the denoiser until they stand still
            and ranks these attractors. ``"side"`` guides samples towards clusters of the model's
            own samples and ranks those that crowd together. ``"both"`` brings guided samples to
            fixed points.
        num_samples: n, of every weight.
        level: noise level of the fixed points in standard deviations of the data; ``None`` for
            ``LEVEL``, where the model has it.
        num_steps: of the iteration.
        side: how samples are guided; ``None`` for the defaults of `Side`.
        chunk_size: samples computed together; ``None`` to choose by their size.
        seed: of every draw.
        out: folder in which finished blocks are kept, so that the same call goes on where an
            interrupted one stopped, until ``discard`` is told that they are no longer needed.
            ``None`` to keep everything in memory.
        progress: called with (stage, done, total).

    Returns:
        `Extracted`. The same arguments give the same bits, whether or not the work was
        interrupted and taken up again.

    Raises:
        InputError: an argument out of range, or ``out`` holds unfinished work with others.
    """
    if method not in get_args(Method):
        raise InputError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    if num_samples < 1:
        raise InputError(f"num_samples: expected at least 1, got {num_samples}")
    fixes, guides = method != "side", method != "fixed-points"
    if fixes and not model.origin.assumed:
        fixed_point_sigma(model, level)
    side = Side() if side is None else side
    if guides:
        side.check()
    size = int(np.prod(model.event_shape))
    chunk_size = chunk_size or int(np.clip(2**16 // size, 1, 128))
    plan = {
        "method": method,
        "samples": num_samples,
        "chunk_size": chunk_size,
        "seed": seed,
        **({"level": level, "steps": num_steps} if fixes else {}),
        **({"side": side.record()} if guides else {}),
        "model": fingerprint(model),
        "data_std": model.data_std,
        "sigma_range": [model.sigma_min, model.sigma_max],
        "memjax": __version__,
        "jax": jax.__version__,
    }
    report = progress or (lambda stage, done, total: None)
    work = Stages(model, seed, chunk_size, _open(out, plan), report)
    if guides:
        sets, facts = _guide(work, side, num_samples)
    else:
        drawn = work.draw("samples", num_samples)
        work.scale(drawn)
        sets, facts = [SampleSet(None, False, drawn, None, EVALUATIONS * num_samples, 0)], {}
    facts["data_std"] = work.model.data_std
    if not fixes:
        return Extracted(plan, tuple(sets), _crowds(work, side, sets), facts)
    sigma = fixed_point_sigma(work.model, level)
    found = [work.settle(f"settled-{k}", each, sigma, num_steps) for k, each in enumerate(sets)]
    candidates = work.attract(found, sigma)
    for each, of in zip(tuple(sets), found, strict=True):
        products = each.products + int(np.sum(of.cost.forward))
        sets.append(each._replace(fixed=True, samples=np.asarray(of.points), products=products))
    status = np.concatenate([np.asarray(of.status) for of in found])
    facts |= {"sigma": sigma, "starts": len(status), "converged": int((status == Status.OK).sum())}
    return Extracted(plan, tuple(sets), candidates, facts)


def _guide(work: Stages, side: Side, num_samples: int) -> tuple[list[SampleSet], dict[str, Any]]:
    """Samples of every weight; and facts about clusters and classifier."""
    pool = work.draw("pool", side.pool)
    work.scale(pool)
    clusters = work.cluster(pool, side)
    log_prob, report = work.classify(pool, clusters, side)
    sets = [
        work.guide(f"guided-{k}", side, log_prob, len(clusters.size), weight, num_samples)
        for k, weight in enumerate(side.weights)
    ]
    names = ("size", "cohesion", "dropped_size", "dropped_cohesion")
    facts: dict[str, Any] = {f"cluster_{n}": getattr(clusters, n).tolist() for n in names}
    if report is not None:
        facts["classifier"] = {name: of.tolist() for name, of in report._asdict().items()}
    return sets, facts | {"pool_products": EVALUATIONS * side.pool}


def _crowds(work: Stages, side: Side, sets: Sequence[SampleSet]) -> Candidates:
    """Guided samples that crowd together within their clusters."""
    guided = [of for of in sets if of.weight] or sets
    samples = np.concatenate([of.samples for of in guided])
    label = np.concatenate([np.asarray(of.label) for of in guided])
    weight = np.repeat([of.weight or 0.0 for of in guided], len(guided[0].samples))
    # A sample has a twin from the same noise at every other weight, and alone they are no crowd.
    twins = len(guided)
    found = rank_by_density(work.features(samples, side), label, num_neighbors=twins + 1)
    crowd = found.hits > twins
    row = found.row[crowd]
    facts = {"hits": found.hits[crowd], "weight": weight[row], "cluster": found.label[crowd]}
    facts |= {"contrast": found.contrast[crowd], "radius": found.radius[crowd]}
    return Candidates(samples[row], work.decode(samples[row]), facts)


def digits_extraction(seed: int, progress: Progress) -> dict[str, Any]:
    """The wide test bed: many images that are stored about equally well, and what they are.

    Args:
        seed: of the test bed and the training.
        progress: called while the model trains.

    Returns:
        ``model``; ``images``, the different training images, with their ``ids`` and how many
        ``times`` each stands in the training set; ``heldout``, images that do not.
    """
    bed, model, *_ = graded_testbed(seed, WIDE, num_samples=64, progress=progress)
    trained = np.flatnonzero(bed.multiplicity)
    return {
        "model": model,
        "images": bed.images[trained],
        "ids": tuple(bed.ids[row] for row in trained),
        "times": bed.multiplicity[trained],
        "heldout": bed.images[bed.multiplicity == 0],
    }


def discard(out: Path, plan: dict[str, Any]) -> None:
    """Remove the blocks that ``extract`` kept, once everything is written."""
    _open(out, plan).discard()


def fixed_point_sigma(model: Model, level: float | None) -> float:
    """The noise level of the fixed points in units of the score.

    Args:
        model: the model.
        level: in standard deviations of its data; ``None`` for ``LEVEL``, or what is nearest to
            it in the model's range.

    Raises:
        InputError: the model does not have this level.
    """
    low, high = (sigma / model.data_std for sigma in (model.sigma_min, model.sigma_max))
    if level is None:
        level = float(np.clip(LEVEL, low, high))
    if not low <= level <= high:
        raise InputError(f"level: expected a number from {low:.3g} to {high:.3g}, got {level:g}")
    return level * model.data_std


def _open(out: Path | None, plan: dict[str, Any]) -> Parts:
    return Parts(out, plan, "extraction")
