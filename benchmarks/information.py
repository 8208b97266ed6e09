"""How much the graded digits tell of their repetitions, and what would tell more.

Every row of the table is a classifier for each question, fitted on five training seeds and scored
on five others: logistic regression, one weight a feature. The features of the first are all local
statistics together: score norm, flux and sphere loss at six noise levels and three radii, a
thousand evaluations an image, where a detector takes thirty. What it does not find, no rule made
of them does. The second adds the same statistics at the blurred image, which tell how hard an
image like it is; the third how hard each image is for a Gaussian fitted to the others, which an
audit takes for that. The others add to the first what nobody has who holds one model, from the
training runs, and the last has everything:

- rows nearby: distances to the training rows nearby, their number, and the image's brightness;
- exposures: how often the training drew the row lately, beyond what its multiplicity makes expect,
  at low and at middle noise. Batches are drawn with replacement;
- shadows: the mean of the statistics of the same image under the models of the other nine seeds,
  over those that saw it once, and over those that did not see it: the difficulty of the image.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._beds import GROUP_SIZES, QUICK_STEPS, graded, values
from benchmarks._quality import Question, quality, record
from benchmarks.harness import Case, Table
from memjax._core.keys import derive_key
from memjax.data.testbeds import graded as graded_rows
from memjax.detect.combined import FluxAndLoss
from memjax.detect.neighbors import Blurred
from memjax.detect.p_laplace import PLaplaceFlux
from memjax.detect.score_norm import ScoreNorm
from memjax.detect.sphere_loss import SphereLoss
from memjax.evaluate.difficulty import image_difficulty

TUNING, SCORING = (1, 2, 3, 4, 5), (6, 7, 8, 9, 10)
STEPS = 8000
SIGMAS, RADII = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2), (0.25, 0.5, 0.75)
QUESTIONS = ("x2", "x4", "membership")
BATCH, LOG_SIGMA = 128, (-1.0, 1.3)
"""The defaults of ``memjax.train``, with which the test beds are trained."""
LATELY = 4000
BANDS = ((0.0125, 0.1), (0.1, 0.4))
"""Noise levels whose exposures move the statistics."""
RIDGE = 1e-3

AT_A_LEVEL = (
    FluxAndLoss(1.0),
    ScoreNorm(1.0),
    *(PLaplaceFlux(1.0, radius=radius) for radius in RADII),
    *(SphereLoss(1.0, radius) for radius in RADII),
)
"""Detectors in units of the noise level, as ``values`` wants them; the first is no feature."""
STATISTICS = tuple((sigma, detector) for sigma in SIGMAS for detector in AT_A_LEVEL[1:])
SHADOWED = tuple(
    STATISTICS.index((sigma, detector))
    for detector in (PLaplaceFlux(1.0, radius=0.5), SphereLoss(1.0, 0.5))
    for sigma in (0.05, 0.1)
)
SHIPPED = SIGMAS.index(0.05)


def log_statistics(found: np.ndarray) -> np.ndarray:
    """Logarithms, whose spread depends less on their size: [row, statistic]."""
    out = []
    for at_level in found:
        for detector, value in zip(AT_A_LEVEL[1:], at_level[1:], strict=True):
            above_zero = 1 - value if isinstance(detector, PLaplaceFlux) else -value
            out.append(np.log(np.maximum(above_zero, 1e-9)))
    return np.stack(out, axis=1)


def rows_nearby(images: np.ndarray, multiplicity: np.ndarray) -> np.ndarray:
    """The image among the training rows, [row, feature]."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    squares = np.sum(flat**2, axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * flat @ flat.T, 0))
    np.fill_diagonal(distances, np.inf)
    trained = multiplicity > 0
    nearest = np.sort(distances[:, trained], axis=1)[:, [0, 1, 3, 9, 29, 99]]
    weights = [
        np.exp(-(distances[:, trained] ** 2) / (2 * h**2)) @ multiplicity[trained]
        for h in (1, 2, 3)
    ]
    image = [flat.mean(axis=1), flat.std(axis=1), np.linalg.norm(flat - flat.mean(0), axis=1)]
    columns = np.column_stack([np.log(nearest), np.log(np.stack(weights, 1) + 1e-12), *image])
    columns = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    return np.column_stack([columns, columns**2])


def exposures(seed: int, train_indices: np.ndarray, multiplicity: np.ndarray, steps: int):
    """Draws of each row in the last steps, by band, over what its multiplicity makes expect."""

    @jax.jit
    @jax.vmap
    def draws(step):
        key = jax.random.fold_in(derive_key(seed, "step"), step)
        shape = (BATCH,)
        rows = jax.random.randint(derive_key(key, "rows"), shape, 0, len(train_indices), jnp.int32)
        normal = jax.random.normal(derive_key(key, "sigma"), shape, jnp.float32)
        return rows, jnp.exp(LOG_SIGMA[0] + LOG_SIGMA[1] * normal)

    rows, sigmas = map(np.asarray, draws(jnp.arange(max(0, steps - LATELY), steps)))
    columns = []
    for low, high in BANDS:
        chosen = train_indices[rows[(sigmas > low) & (sigmas <= high)]]
        counts = np.bincount(chosen, minlength=len(multiplicity))
        expected = np.maximum(multiplicity, 1) * len(chosen) / len(train_indices)
        columns.append(np.where(multiplicity > 0, counts / expected - 1, 0))
    return np.stack(columns, axis=1)


def shadows(seed: int, statistics: dict[int, np.ndarray], multiplicity: dict[int, np.ndarray]):
    """Mean of an image's statistics under the other seeds' models, seen once and not at all.

    Centered over the rows of each model, and drawn to zero where few models speak: the spread of
    an image between models is about that between images.
    """
    out = []
    for times in (1, 0):
        total, count = 0.0, 0.0
        for other in statistics:
            seen = (multiplicity[other] == times)[:, None]
            if other != seed and seen.any():
                found = statistics[other][:, SHADOWED]
                total = total + np.where(seen, found - found[seen[:, 0]].mean(axis=0), 0)
                count = count + seen
        out.append(total / (count + 1))
    return np.concatenate(out, axis=1)


def fit(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights of a logistic regression with a ridge, both classes weighing the same, by Newton."""
    center, scale = features.mean(axis=0), features.std(axis=0) + 1e-12
    design = np.column_stack([(features - center) / scale, np.ones(len(features))])
    share = np.where(labels, 0.5 / labels.mean(), 0.5 / (1 - labels.mean())) / len(labels)
    penalty = RIDGE * np.append(np.ones(features.shape[1]), 1e-6)
    weights = np.zeros(design.shape[1])

    def loss(weights):
        signed = np.where(labels, -1, 1) * (design @ weights)
        return share @ np.logaddexp(0, signed) + penalty @ weights**2

    for _ in range(100):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -40, 40)))
        gradient = design.T @ (share * (chance - labels)) + 2 * penalty * weights
        curvature = (design.T * (share * chance * (1 - chance))) @ design + 2 * np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        length = 1.0
        while loss(weights - length * step) > loss(weights) and length > 1e-6:
            length /= 2
        weights = weights - length * step
        if np.abs(length * step).max() < 1e-8:
            break
    return weights[:-1] / scale


def rows(
    found: dict[int, np.ndarray],
    blurred: dict[int, np.ndarray],
    difficulty: dict[int, np.ndarray],
    multiplicity: dict[int, np.ndarray],
    images: np.ndarray,
    exposed: dict[int, np.ndarray],
    tuning: tuple[int, ...],
    scoring: tuple[int, ...],
) -> list[dict[str, Any]]:
    """The table, from values [level, detector, row] on every seed, at the images and blurred.

    ``difficulty`` is that of the images among the training rows.
    """
    seeds = (*tuning, *scoring)
    statistics = {seed: log_statistics(found[seed]) for seed in seeds}
    easier = {seed: log_statistics(blurred[seed]) for seed in seeds}
    harder = {seed: np.hstack([difficulty[seed], difficulty[seed] ** 2]) for seed in seeds}
    around = {seed: rows_nearby(images, multiplicity[seed]) for seed in seeds}
    shadow = {seed: shadows(seed, statistics, multiplicity) for seed in seeds}
    questions = {
        seed: {
            "x2": Question(m == 2, m == 1),
            "x4": Question(m == 4, m == 1),
            "membership": Question(m == 1, m == 0),
        }
        for seed, m in multiplicity.items()
    }
    methods: dict[str, dict[int, np.ndarray] | None] = {
        "flux and sphere loss, 32 products": None,
        "all local statistics": {},
        "and at the blurred image": easier,
        "and difficulty": harder,
        "and exposures": exposed,
        "and rows nearby": around,
        "and shadows": shadow,
        "and all of these": {
            s: np.hstack([easier[s], harder[s], exposed[s], around[s], shadow[s]]) for s in seeds
        },
    }
    out = []
    for method, extra in methods.items():
        answers: dict[str, list] = {name: [] for name in QUESTIONS}
        for name in QUESTIONS:
            if extra is None:
                scores = {seed: found[seed][SHIPPED, 0] for seed in scoring}
            else:
                features = {
                    s: np.hstack([statistics[s], *([extra[s]] if extra else [])]) for s in seeds
                }
                asked = {
                    s: questions[s][name].positive | questions[s][name].negative for s in seeds
                }
                weights = fit(
                    np.concatenate([features[s][asked[s]] for s in tuning]),
                    np.concatenate([questions[s][name].positive[asked[s]] for s in tuning]),
                )
                scores = {seed: features[seed] @ weights for seed in scoring}
            answers[name] = [quality(scores[s], questions[s][name]) for s in scoring]
        out.append(
            {
                "method": method,
                "status": "ok",
                "quality": {q: record(a) for q, a in answers.items()},
            }
        )
    return out


def _compute(quick: bool, seed: int):
    tuning, scoring = ((1, 2), (6,)) if quick else (TUNING, SCORING)
    found, blurred, difficulty, multiplicity, exposed, images = {}, {}, {}, {}, {}, None
    for training in (*tuning, *scoring):
        bed, planted = graded(STEPS, training, quick), graded_rows(training, GROUP_SIZES)
        found[training] = np.stack([values(bed, AT_A_LEVEL, sigma, 300) for sigma in SIGMAS])
        near = bed._replace(images=np.asarray(jax.vmap(Blurred())(bed.images)))
        blurred[training] = np.stack([values(near, AT_A_LEVEL, sigma, 300) for sigma in SIGMAS])
        multiplicity[training], images = planted.multiplicity, planted.images
        difficulty[training] = image_difficulty(images, planted.multiplicity > 0)
        steps = QUICK_STEPS[STEPS] if quick else STEPS
        exposed[training] = exposures(training, planted.train_indices, planted.multiplicity, steps)
    assert images is not None
    return rows(found, blurred, difficulty, multiplicity, images, exposed, tuning, scoring), []


def _make(quick: bool, seed: int) -> Table:
    compute: Callable = partial(_compute, quick, seed)
    parameters = {
        "steps": STEPS,
        "group_sizes": list(GROUP_SIZES),
        "tuning": list(TUNING),
        "scoring": list(SCORING),
        "statistics": len(STATISTICS),
    }
    return Table(compute, parameters, "float32")


def cases() -> list[Case]:
    """One table."""
    return [Case("information/graded", _make)]


def figure(records):
    """AUROC and rate at 1 % of every classifier, with intervals."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    (result,) = records
    table = result["rows"][::-1]
    out = Figure(figsize=(10, 5), layout=ConstrainedLayoutEngine(rect=(0, 0.04, 1, 0.96)))
    axes = out.subplots(2, 2, sharey=True)
    metrics = {"auroc": "AUROC", "tpr": "true-positive rate at 1 % false positives"}
    names = {"x2": "repeated twice / seen once", "membership": "seen once / never"}
    for line, (metric, label) in zip(axes, metrics.items(), strict=True):
        for axis, (question, title) in zip(line, names.items(), strict=True):
            for i, row in enumerate(table):
                found = row["quality"][question][metric]
                axis.plot([found["low"], found["high"]], [i, i], color="0.6")
                axis.plot(found["value"], i, "o", color="#4477aa")
            axis.set(title=title, xlabel=label)
            axis.set_yticks(range(len(table)), [row["method"] for row in table])
            axis.grid(axis="x", color="0.9")
    return out
