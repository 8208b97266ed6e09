"""Other noises, or other embeddings, for prompts that copy: before and after, side by side."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray, PyTree

from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.auditing.rows import Progress
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import decode_samples, sample, widest_dtype
from memjax.evaluate.distances import find_copies
from memjax.mitigate.initial_noise import sail
from memjax.mitigate.objectives import NoiseObjective, judge_cost, judge_noises
from memjax.mitigate.prompt import embed_conditions, optimize_prompts
from memjax.networks.unet2d_condition import TextCondition
from memjax.training.testbeds import prompts_testbed

Method = Literal["sail", "prompt"]
PILOT = 16
"""Random noises of a prompt whose median objective the threshold is a share of."""
SHARES = {"sail": 0.7, "prompt": 0.4}
LEVEL = 2.5
"""Noise level of SAIL's objective in standard deviations of the data, where the model has it: there
the sampler decides between images."""
PROMPT_STEPS = 60
_TOGETHER = 16


class Mitigated(NamedTuple):
    """Samples of c conditions, n each, before and after.

    Attributes:
        before: images from random noises.
        after: images from the noises found, or under the embeddings found.
        noises_before: n, unit variance; the sampler starts at sigma_max n.
        noises_after: likewise; NaN where not even a candidate was finite.
        accepted: whether the objective went below the threshold.
        objective_before: of each random noise; of method ``"prompt"`` one for all of a condition.
        objective_after: of each.
        threshold: of each condition.
        moved: how far noises lie from where they were drawn, |n - n_0|.
        candidates: noises tried for each condition; 0 for method ``"prompt"``.
        products: network products of each condition, beside those of the samples.
        conditions: those that were found, of method ``"prompt"``.
    """

    before: Float[np.ndarray, "c n ..."]
    after: Float[np.ndarray, "c n ..."]
    noises_before: Float[np.ndarray, "c n ..."]
    noises_after: Float[np.ndarray, "c n ..."]
    accepted: Bool[np.ndarray, "c n"]
    objective_before: Float[np.ndarray, "c n"]
    objective_after: Float[np.ndarray, "c n"]
    threshold: Float[np.ndarray, "c"]
    moved: Float[np.ndarray, "c n"]
    candidates: Int[np.ndarray, "c"]
    products: Int[np.ndarray, "c"]
    conditions: PyTree = None


class Copies(NamedTuple):
    """Which samples copy a training image.

    Attributes:
        is_copy: d1 < d2 / 3 over the distinct training images.
        nearest: row of the nearest training image; -1 for a sample that is not finite.
    """

    is_copy: Bool[np.ndarray, "c n"]
    nearest: Int[np.ndarray, "c n"]


def mitigate(
    model: Model,
    conditions: PyTree,
    *,
    method: Method = "sail",
    objective: str = "pull",
    level: float | None = None,
    share: float | None = None,
    threshold: float | None = None,
    num_samples: int = 8,
    budget: int = 64,
    guidance: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Mitigated:
    """Draw samples, look for noises or embeddings that pull less, and draw again.

    Args:
        model: unguided, conditional.
        conditions: pytree of arrays with a leading axis of c.
        method: ``"sail"`` changes the initial noise, ``"prompt"`` the embedding.
        objective: of ``NoiseObjective``; the gap of Wen et al. for method ``"prompt"``.
        level: noise level of the objective in standard deviations of the data; ``None`` for
            ``LEVEL``, and for method ``"prompt"`` the sampler's first.
        share: the threshold as a share of the objective's median over random noises of the prompt
            (method ``"prompt"``: of its median over prompts); ``None`` for that of ``SHARES``.
        threshold: the threshold itself, instead.
        num_samples: n.
        budget: noises tried for each condition, at least n; steps of method ``"prompt"`` are 60.
        guidance: of the sampler.
        seed: of every draw.
        progress: called with (stage, done, total).

    Returns:
        `Mitigated`. Method ``"prompt"`` draws from the same noises before and after.

    Raises:
        InputError: an argument out of range, or a model without conditions.
    """
    if method not in get_args(Method):
        raise InputError(f"method: expected 'sail' or 'prompt', got {method!r}")
    share = SHARES[method] if share is None else share
    if not 0 < share < np.inf:
        raise InputError(f"share: expected a positive number, got {share}")
    if model.null_condition is None:
        raise InputError("model: expected one with conditions, and none as one of them")
    report = progress or (lambda stage, done, total: None)
    if level is None and method == "sail" and LEVEL * model.data_std < model.sigma_max:
        level = max(LEVEL, model.sigma_min / model.data_std)
    sigma = None if level is None else level * model.data_std
    if sigma is not None and not model.sigma_min <= sigma <= model.sigma_max:
        low, high = (s / model.data_std for s in (model.sigma_min, model.sigma_max))
        raise InputError(f"level: expected a number from {low:.3g} to {high:.3g}, got {level:g}")
    goal = NoiseObjective(objective, sigma=sigma, guidance=guidance)
    count = len(jax.tree.leaves(conditions)[0])
    noises = np.asarray(_noises(model, seed, "before", count, num_samples))
    target, pilot = threshold or 0.0, np.int32(0)  # what method "prompt" aims at
    if method == "prompt" and threshold is None:
        gap, pilot = _typical_gap(model, conditions, sigma, derive_key(seed, "mitigate", 0))
        target = share * gap
    parts = []
    for start in range(0, count, _TOGETHER):
        rows = slice(start, min(start + _TOGETHER, count))
        some = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf)[rows], conditions)
        if method == "sail":
            key = derive_key(seed, "mitigate", start)
            parts.append(_sailed(model, some, noises[rows], goal, share, threshold, budget, key))
        else:  # one threshold for all prompts, so one set of noises
            key = derive_key(seed, "mitigate", 0)
            parts.append(_reworded(model, some, num_samples, sigma, target, key))
        report("searching", rows.stop, count)
    found: dict[str, Any] = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    found["products"] = found["products"] + pilot

    def draw(stage: str, model: Model, noises: np.ndarray, conditions: PyTree) -> np.ndarray:
        each = jax.tree.map(
            lambda leaf: np.repeat(np.asarray(leaf), num_samples, axis=0), conditions
        )
        flat = sample(
            model,
            count * num_samples,
            noises=jnp.asarray(noises.reshape(-1, *model.event_shape)),
            conditions=each,
            guidance=guidance,
            progress=lambda done, total: report(stage, done, total),
        )
        images = np.asarray(decode_samples(model, flat))
        return images.reshape(count, num_samples, *images.shape[1:])

    before = draw("samples before", model, noises, conditions)
    if method == "sail":
        after = draw("samples after", model, found["noises_after"], conditions)
    else:
        found["noises_after"] = noises
        changed = _embedded(model, conditions)[0]
        after = draw("samples after", changed, noises, found["conditions"])
    return Mitigated(before=before, after=after, noises_before=noises, **found)


def look_for_copies(samples: Float[np.ndarray, "c n ..."], images: np.ndarray) -> Copies:
    """Compare samples with the training set, by the rule of a copy."""
    flat = samples.reshape(-1, *samples.shape[2:])
    found = find_copies(flat, images)
    shape = samples.shape[:2]
    return Copies(found.is_copy.reshape(shape), found.nearest.reshape(shape))


def digits_prompts(seed: int, progress: Progress) -> dict[str, Any]:
    """The conditional test bed's prompts that can be helped, and some that cannot.

    Args:
        seed: of the test bed and the training.
        progress: called while the model trains.

    Returns:
        ``model``, ``conditions``, ``ids``, ``kinds`` of the ten prompts of which one image fills
        36 of 40 rows and of five that mean one image only; ``images``, the training set, and
        ``owners``, the prompt of each of its rows.
    """
    found = prompts_testbed(seed, num_samples=70, progress=progress)
    kinds = found.bed.kind
    mixed, stored = (
        [p for p, kind in enumerate(kinds) if kind == which]
        for which in ("mitigation", "memorized")
    )
    chosen = np.array(mixed + stored[:5], np.int32)
    words = {"mitigation": "mixed", "memorized": "stored"}
    return {
        "model": found.model,
        "conditions": chosen,
        "ids": tuple(f"{p:02d} {words[kinds[p]]}" for p in chosen),
        "kinds": tuple(words[kinds[p]] for p in chosen),
        "images": found.bed.images,
        "owners": found.bed.prompt,
    }


def _noises(model: Model, key: int | PRNGKeyArray, what: str, count: int, n: int) -> jax.Array:
    """Standard normal, in float32 always, as the sampler draws them."""
    shape = (count, n, *model.event_shape)
    drawn = jax.random.normal(derive_key(key, "mitigate", what), shape, jnp.float32)
    return drawn.astype(widest_dtype(model))


def _sailed(
    model: Model,
    conditions: PyTree,
    noises: np.ndarray,
    goal: NoiseObjective,
    share: float,
    threshold: float | None,
    budget: int,
    key: PRNGKeyArray,
) -> dict[str, Any]:
    """Noises for some conditions."""
    count = len(noises)
    together = int(np.clip(2**12 // np.prod(model.event_shape), 1, count))
    pilot = _noises(model, key, "pilot", count, PILOT)
    judged = jnp.concatenate([pilot, jnp.asarray(noises, pilot.dtype)], axis=1)
    values = np.asarray(judge_noises(model, judged, conditions, goal, chunk_size=together))
    scale, before = values[:, :PILOT], values[:, PILOT:]
    levels = share * np.median(scale, axis=1)
    if threshold is not None:
        levels = np.full(count, threshold)
    levels = np.asarray(levels, scale.dtype)
    if not np.isfinite(levels).all():
        raise InputError("model: its scores are not finite at the first step of the sampler")
    found = sail(
        model, noises.shape[1], key=key, conditions=conditions, threshold=levels, objective=goal,
        max_candidates=budget, chunk_size=together,
    )  # fmt: skip
    judging = judge_cost(model, judged.shape[1], goal)
    return {
        "noises_after": np.asarray(found.noises),
        "accepted": np.asarray(found.accepted),
        "objective_before": before,
        "objective_after": np.asarray(found.objective),
        "threshold": levels,
        "moved": np.asarray(found.moved),
        "candidates": np.asarray(found.candidates),
        "products": sum(np.asarray(part) for part in found.cost) + int(judging.total),
    }


def _typical_gap(
    model: Model, conditions: PyTree, sigma: float | None, key: PRNGKeyArray
) -> tuple[float, Any]:
    """The median gap over all prompts, and the network products of each."""
    changed, vectors = _embedded(model, conditions)
    start = optimize_prompts(
        changed, key=key, conditions=vectors, sigma=sigma, target=1.0, num_steps=0
    )
    return float(np.median(start.before)), sum(np.asarray(part) for part in start.cost)


def _words(conditions: PyTree) -> PyTree:
    """What other words would change of a text's condition: not the sizes, not the guidance."""
    if not isinstance(conditions, TextCondition):
        return None
    words = ("hidden_states", "pooled")
    given = [name for name, leaf in conditions._asdict().items() if leaf is not None]
    return conditions._replace(**{name: jnp.float32(name in words) for name in given})


def _reworded(
    model: Model,
    conditions: PyTree,
    n: int,
    sigma: float | None,
    target: float,
    key: PRNGKeyArray,
) -> dict[str, Any]:
    """Embeddings for some conditions."""
    changed, vectors = _embedded(model, conditions)
    found = optimize_prompts(
        changed, key=key, conditions=vectors, sigma=sigma, target=target,
        num_steps=PROMPT_STEPS, trainable=_words(vectors),
    )  # fmt: skip
    count = len(found.before)

    def each(values: Any) -> np.ndarray:
        return np.repeat(np.asarray(values)[:, None], n, axis=1)

    return {
        "accepted": each(found.status) == 0,
        "objective_before": each(found.before),
        "objective_after": each(found.after),
        "threshold": np.full(count, target),
        "moved": np.zeros((count, n)),
        "candidates": np.zeros(count, np.int32),
        "products": sum(np.asarray(part) for part in found.cost),
        "conditions": jax.tree.map(np.asarray, found.conditions),
    }


def _embedded(model: Model, conditions: PyTree) -> tuple[Model, PyTree]:
    """Conditions as vectors that can be moved."""
    leaves = jax.tree.leaves(conditions)
    if any(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves):
        return model, conditions
    return embed_conditions(model, jnp.asarray(leaves[0]))
