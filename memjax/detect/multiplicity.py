"""How often each image stands in the training set: held still, the model tells."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray, PyTree

from memjax._core.checks import check_count, check_positive
from memjax._core.chunked import chunked_map
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.detect.difficulty import below_ceiling
from memjax.detect.evaluate import evaluate_detectors
from memjax.detect.p_laplace import PLaplaceFlux
from memjax.detect.plan import cost as detectors_cost
from memjax.detect.plan import requirements
from memjax.detect.protocol import Detector
from memjax.diffusion.model import Model
from memjax.evaluate.difficulty import (
    SMALLEST_POPULATION,
    excess_over_difficulty,
    image_difficulty,
)
from memjax.evaluate.distances import group_duplicates
from memjax.training._adapted import changed_model
from memjax.training.continued import continue_training

LEVELS = (1 / 15, 4 / 15)
"""Noise levels of the fluxes, in standard deviations of the data; the first is read at rest too."""
NUM_PAIRS = 2
PASSES = 42
"""Passes over the distinct images that a run makes unless told otherwise."""
BATCH_SIZE, LEARNING_RATE = 16, 5e-4
SLOPE = 4.0
"""Logarithm of the multiplicity by the change of a flux's -log(1 - flux)."""
_TRAINED_AT, _TRAINED_STD = 0.18, 0.6
"""Median of the noise levels of training, in standard deviations of the data, and of their log."""
_NOISE, _SPREAD = 0.1, 0.45
"""Of a loss, and of the images' own slopes, as a share of the usual one."""
_AT_REST = ((0.0, 0.3, 2.7), (0.0, math.log(2), math.log(32)))
"""What an excess over difficulty counts, as the logarithm of the multiplicity; lines between."""
_SMALL = 0.1
"""Of the usual size of a change: no change counts as smaller when sizes are compared."""
_CLEAR, _GONE = 2.5, 0.5
"""An estimate beyond which an image counts as often as it says, and below which not at all."""
_UNSEEN = 0.3
"""What counts as the multiplicity of an image that does not count, for its logarithm."""
_MOST = 64
"""What an image counts at most; an estimate is at most twice that: more cannot be told."""

Progress = Callable[[str, int, int], None]


class MultiplicityEstimate(NamedTuple):
    """How often each image stands in a training set.

    Attributes:
        value: log of the estimate, larger = more often; NaN where there is none.
        multiplicity: the estimate, relative to the typical image, which counts as 1; at most 128.
        standard_error: of ``value``, for the question whether an image stands there more than
            once: the robust scatter of the images that count once, which holds the noise of the
            model's own training too, or the error over the runs of the last round where that is
            larger. How large a multiplicity is depends on the slope besides.
        held_at: how often each image counted in the last round.
        status: ``memjax.Status`` codes.
        cost: network products for one image, of the continued training and the evaluations.
    """

    value: Float[np.ndarray, "n"]
    multiplicity: Float[np.ndarray, "n"]
    standard_error: Float[np.ndarray, "n"]
    held_at: Int[np.ndarray, "n"]
    status: Int[np.ndarray, "n"]
    cost: Cost


def estimate_multiplicity(
    model: Model,
    images: Float[np.ndarray, "n *event"],
    *,
    conditions: Integer[np.ndarray, "m"] | None = None,
    detectors: tuple[Detector, ...] | None = None,
    rounds: int = 0,
    runs: int = 1,
    steps: int | None = None,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    slope: float = SLOPE,
    seed: int = 0,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> MultiplicityEstimate:
    """Estimate how often images stand in a model's training set, by training it further.

    A trained model is at rest: the gradients of its loss over the training set, every image as
    often as it stands there, sum to about zero. Trained further on the same images with other
    multiplicities it moves, and an image that counts too little loses what was stored of it::

        log m_i = log w_i + slope (l_i(theta) - l_i(theta_w) - c)

    with l = -log(1 - flux), averaged over ``detectors``, theta the model's weights, theta_w those
    after training on each image w_i times, and c what the difference usually is at w_i = 1 for
    images as difficult (``excess_over_difficulty``; their median where they are fewer than 50):
    what is typical stands there once. Beyond c differences count by how large they usually are
    for images as difficult. An image seen at different w_i has a slope of its own, which the given
    one is the prior of. The model is its own control: what makes an image easy or hard for it is
    the same in theta and theta_w and drops out.

    Before any training, the first detector's excess over the images' difficulty
    (``OverDifficulty``, from 50 distinct images on) is an estimate too, with errors of its own:
    what the difficulty does not explain. Images that clearly stand there more often by it (above
    2.5) count that often at first, the others once. After each of ``rounds`` rounds w follows the
    estimates, and images below 0.5 do not count at all, so that training leaves the rest at rest.
    The last round is the mean over ``runs`` independent runs, every one from the model itself. Both
    estimates are averaged by their precision, the squared inverse of their robust scatter over
    the images with w_i = 1.

    Noise levels of training are log-normal around 0.18 standard deviations of the data, where the
    images are told apart, and draws are spread evenly (``continue_training``).

    What is given must be nearly all of the training set; images beside it are found to be such.
    Equal images count as one, and share their estimate. ``slope`` and what an excess means were
    measured on one test bed (``benchmarks/multiplicity.py``), the slope with the default steps:
    the order of the estimates hardly depends on them, their size does.

    Args:
        model: a score of a network, as made by ``train``, ``load`` and ``from_callable``.
        images: in the space of the score; float32.
        conditions: one index per image, for a model with such conditions.
        detectors: whose values are compared, where they have a ceiling (see ``Detector``) on the
            scale log(1/(ceiling - value)), the first also with images as difficult; ``None`` for
            the p = 1 flux with 2 pairs at 1/15 and 4/15 standard deviations of the data, as far
            as the model has them.
        rounds: before the last, at least 0.
        runs: of the last round, at least 1.
        steps: of each run; ``None`` for 42 passes over the distinct images.
        batch_size: images per step.
        learning_rate: of Adam.
        slope: see above, positive.
        seed: of everything drawn.
        chunk_size: images evaluated together; ``None`` for what 2^18 numbers hold.
        progress: called with (stage, done, total).

    Returns:
        `MultiplicityEstimate`.

    Raises:
        InputError: images or conditions that do not fit, a detector that compares two models, an
            argument out of range, or training further that ends in numbers that are not finite.

    Without raising: NONFINITE for an image or a value that is not finite.

    Cost: (rounds + runs) trainings of ``steps`` steps and rounds + runs + 1 evaluations of the
    detectors. With the defaults 100 products an image; 24 passes make 64, one round and four runs
    468, with which more images that stand there twice are found.

    >>> found = mj.detect.estimate_multiplicity(model, images)  # doctest: +SKIP
    >>> images[np.argsort(-found.value)][:10]  # those stored most often  # doctest: +SKIP

    References:
        Ours. Haim et al. (2022), arXiv:2206.07758 (stationarity weighs training samples); Watson
        et al. (2022), arXiv:2111.08440, and Zhang et al. (2024), arXiv:2410.10880 (membership by
        comparison with a reference model, and with the model fine-tuned).
    """
    n, d = len(images), math.prod(model.event_shape)
    check_count("rounds", rounds, 0)
    check_count("runs", runs, 1)
    check_positive("slope", slope)
    detectors = _usual(model) if detectors is None else detectors
    needed = requirements(detectors, d)
    if not detectors or needed.baseline:
        names = ", ".join(detector.name for detector in detectors) or "none"
        raise InputError(f"detectors: expected some that look at one model, got {names}")
    first = _first_of_equals(images, conditions)
    rows = np.flatnonzero(first == np.arange(n))
    if len(rows) < 2:
        raise InputError(f"images: expected at least 2 different finite ones, found {len(rows)}")
    distinct = images[rows]
    shown = None if conditions is None else np.asarray(conditions)[rows]
    if steps is None:
        steps = max(1, round(PASSES * len(rows) / min(batch_size, len(rows))))
    if chunk_size is None:
        chunk_size = max(1, min(256, 2**18 // (d * int(detectors_cost(detectors, d).total))))
    report = progress or (lambda stage, done, total: None)
    key = derive_key(seed, "multiplicity")

    def evaluated(which: Model) -> np.ndarray:
        found = _values(which, distinct, shown, key, detectors, chunk_size)
        pairs = zip(detectors, np.asarray(found, np.float64).T, strict=True)
        return np.stack([below_ceiling(by, v, np.zeros_like(v))[0] for by, v in pairs], axis=1)

    def rerun(w: np.ndarray, round_: int, run: int) -> np.ndarray:
        done = round_ + run
        return evaluated(
            continue_training(
                model, distinct, multiplicity=w, conditions=shown, steps=steps,
                batch_size=batch_size, learning_rate=learning_rate,
                log_sigma_mean=math.log(_TRAINED_AT * model.data_std),
                log_sigma_std=_TRAINED_STD, seed=_seed(seed, round_, run),
                progress=lambda step, total, loss: report(
                    "training further", done * total + step, (rounds + runs) * total
                ),
            )
        )  # fmt: skip

    # With the fields that distinguish a model from its continuations, so that one program does.
    at_rest = evaluated(changed_model(model, model.raw_score, model.null_condition))
    usable = np.isfinite(at_rest).all(axis=1)
    if not usable.any():
        raise InputError("model: its scores are not finite at the images")
    difficulty = _difficulty(distinct)
    before = None if difficulty is None else _from_difficulty(at_rest[:, 0], difficulty)
    observed: list[_Observation] = []

    def observe(w: np.ndarray, round_: int, run: int = 0) -> np.ndarray:
        change = (at_rest - rerun(w, round_, run)).mean(axis=1)
        if not np.isfinite(change).any():
            raise InputError(
                "learning_rate: expected one with which training further stays finite, "
                f"got {learning_rate:g}"
            )
        observed.append(_observation(w, change, difficulty))
        return _estimates(observed, slope)

    first_w = np.ones(len(rows)) if before is None else np.maximum(_held(before), 1)
    w = np.where(usable, first_w, 0).astype(np.int64)
    for i in range(rounds):
        w = _held(_together(observe(w, i).mean(axis=0), before, w))
    for run in range(runs):
        found = observe(w, rounds, run)
    final = found[-runs:]
    value = np.minimum(_together(final.mean(axis=0), before, w), math.log(2 * _MOST))
    typical = np.abs(value[(w == 1) & usable])
    error = np.full(len(rows), 1.4826 * np.median(typical) if len(typical) else np.inf)
    if runs > 1:
        error = np.maximum(error, final.std(axis=0, ddof=1) / math.sqrt(runs))
    batch = min(batch_size, int(w.sum()))
    price = _cost(detectors, d, rounds, runs, steps, batch, len(rows))
    return _spread(first, rows, value, error, w, price)


def _difficulty(images: np.ndarray) -> Float[np.ndarray, "n k"] | None:
    """How difficult each image is; none where they are too few, or too equal, to be compared."""
    try:
        return image_difficulty(images)
    except InputError:
        return None


def _from_difficulty(
    value: Float[np.ndarray, "n"], difficulty: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, "n"] | None:
    """Log multiplicities before any training; none where too few images have a value."""
    if np.isfinite(value).sum() < SMALLEST_POPULATION:
        return None
    excess = excess_over_difficulty(value, difficulty)
    below = np.minimum(excess, 0) * _AT_REST[1][1] / _AT_REST[0][1]
    return np.interp(excess, *_AT_REST) + below


def _together(
    after: Float[np.ndarray, "n"], before: Float[np.ndarray, "n"] | None, w: np.ndarray
) -> Float[np.ndarray, "n"]:
    """Two estimates by their precision, if there are two."""
    if before is None:
        return after
    weights = []
    for estimate in (after, before):
        typical = estimate[(w == 1) & np.isfinite(estimate)]
        spread = np.median(np.abs(typical)) if len(typical) else 1.0
        weights.append(1 / max(spread, 1e-6) ** 2)
    return np.average([after, before], axis=0, weights=weights)


def _usual(model: Model) -> tuple[Detector, ...]:
    """The fluxes at the noise levels that the model has."""
    low, high = model.sigma_min, model.sigma_max
    sigmas = dict.fromkeys(float(np.clip(a * model.data_std, low, high)) for a in LEVELS)
    return tuple(PLaplaceFlux(sigma, num_pairs=NUM_PAIRS) for sigma in sigmas)


def _first_of_equals(images: np.ndarray, conditions: np.ndarray | None) -> np.ndarray:
    """Per row the first of those that are equal, under equal conditions; -1 if not finite."""
    group = group_duplicates(images)
    if conditions is None:
        return group
    if np.shape(conditions) != (len(images),):
        raise InputError(
            f"conditions: expected one per image, {len(images)}, got shape {np.shape(conditions)}"
        )
    _, first, inverse = np.unique(
        np.stack([group, conditions]), axis=1, return_index=True, return_inverse=True
    )
    return np.where(group < 0, -1, first[inverse.reshape(-1)])


def _seed(seed: int, round_: int, run: int) -> int:
    """Of one run: not that of the model's own training."""
    return int(jax.random.bits(derive_key(seed, "multiplicity", "run", round_, run), (), np.uint32))


@partial(jax.jit, static_argnames=("detectors", "chunk_size"))
def _values(
    model: Model,
    images: Float[Array, "n ..."],
    conditions: Int[Array, "n"] | None,
    key: PRNGKeyArray,
    detectors: tuple[Detector, ...],
    chunk_size: int,
) -> Float[Array, "n k"]:
    """Every detector on every image."""

    def one(row: PyTree) -> Float[Array, "k"]:
        x, condition = row
        found = evaluate_detectors(model, x, detectors, key=key, condition=condition)
        return jnp.stack([finding.value for finding in found])

    return chunked_map(one, (jnp.asarray(images), conditions), chunk_size=chunk_size)


class _Observation(NamedTuple):
    """What images lost when they counted w times, beyond what is typical, and log w."""

    log_w: Float[np.ndarray, "n"]
    loss: Float[np.ndarray, "n"]


def _observation(
    w: np.ndarray, change: Float[np.ndarray, "n"], difficulty: Float[np.ndarray, "n k"] | None
) -> _Observation:
    """The change beyond that of images as difficult, where as much of it is chance as usual."""
    typical = (w == 1) & np.isfinite(change)
    if difficulty is None or typical.sum() < SMALLEST_POPULATION:
        center = np.median(change[typical] if typical.any() else change[np.isfinite(change)])
        return _Observation(np.log(np.maximum(w, _UNSEEN)), change - center)
    loss = excess_over_difficulty(change, difficulty, typical)
    size = np.abs(loss) + _SMALL * np.median(np.abs(loss[typical]))
    if size[typical].min() > 0:
        size = np.log(size)
        usual = size - excess_over_difficulty(size, difficulty, typical)
        loss = loss / np.exp(np.clip(usual - np.median(usual[typical]), -1, 1))
    return _Observation(np.log(np.maximum(w, _UNSEEN)), loss)


def _estimates(observed: list[_Observation], slope: float) -> Float[np.ndarray, "k n"]:
    """Log multiplicities from each of k observations.

    loss = b (log m - log w) + noise, where b is each image's own: normal around 1/slope before,
    and after the observations at different w their regression where these say more.
    """
    x, y = (np.stack(column) for column in zip(*observed, strict=True))
    usual = 1 / slope
    prior = (_SPREAD * usual) ** -2
    centered = x - x.mean(axis=0)
    weight = np.square(centered).sum(axis=0) / _NOISE**2
    found = -(centered * y).sum(axis=0) / _NOISE**2
    b = np.maximum((found + prior * usual) / (weight + prior), usual / 4)
    return x + y / b


def _held(estimate: np.ndarray) -> np.ndarray:
    """How often images count next: once, unless their estimate is clear."""
    often = np.exp(np.where(np.isfinite(estimate), estimate, -np.inf))
    many = np.minimum(np.round(often), _MOST)
    return np.where(often >= _CLEAR, many, np.where(often < _GONE, 0, 1)).astype(np.int64)


def _cost(
    detectors: tuple[Detector, ...], d: int, rounds: int, runs: int, steps: int, batch: int, n: int
) -> Cost:
    shown = math.ceil((rounds + runs) * steps * batch / n)
    return detectors_cost(detectors, d).times(rounds + runs + 1).plus(Cost(shown, 0, shown))


def _spread(
    first: np.ndarray,
    rows: np.ndarray,
    value: np.ndarray,
    error: np.ndarray,
    w: np.ndarray,
    cost: Cost,
) -> MultiplicityEstimate:
    """From distinct images to all of them."""
    n = len(first)
    place = np.zeros(n, np.int64)
    place[rows] = np.arange(len(rows))
    own = place[np.maximum(first, 0)]
    ok = (first >= 0) & np.isfinite(value[own])
    values, errors = (np.where(ok, column[own], np.nan) for column in (value, error))
    return MultiplicityEstimate(
        values,
        np.exp(values),
        errors,
        np.where(first >= 0, w[own], 0),
        np.where(ok, Status.OK, Status.NONFINITE).astype(np.int32),
        cost,
    )
