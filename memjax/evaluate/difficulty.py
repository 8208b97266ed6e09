"""How hard images are whatever model looks at them, and what is left of a score beyond that.

A memorization score mixes two things: how much a model has learned from an image's own copies, and
how easy any image like it is for any model of such data. Images seen by one model can be compared
with each other: how hard each is for a Gaussian fitted to the others needs no second model.
"""

import numpy as np
from jaxtyping import Bool, Float

from memjax._core.errors import InputError
from memjax.evaluate.distances import group_duplicates

LEVELS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""Noise levels of the Gaussian's denoiser, in standard deviations of the images."""
SMALLEST_POPULATION = 50
"""Distinct images below which nothing is fitted."""
_MOST_NUMBERS = 4096
"""Numbers in an image above which the Gaussian is held by its principal directions."""
_ENTRIES = 2**27
"""Numbers that these directions take at most, 1 GiB."""
_CHUNK = 2**22
"""Numbers of images worked on together."""
_RIDGE = 0.02
_HUBER, _BISQUARE = 1.0, 4.685
_STEPS = 200


def image_difficulty(
    images: Float[np.ndarray, "n ..."], population: Bool[np.ndarray, "n"] | None = None
) -> Float[np.ndarray, "n 7"]:
    """What makes images hard to denoise, from the images alone.

    Mean and standard deviation over an image's numbers, and at five noise levels s, from 1/16 to 1
    standard deviation of the images, the logarithm of how far the best linear denoiser moves the
    image itself, per number, in those standard deviations::

        log |s^2 (C + s^2 I)^-1 (x - m)| / sqrt(d)

    with mean m and covariance C of the population without x: where x is one of them, it is left
    out in closed form (Sherman and Morrison), so that images in the population and images beside
    it are measured alike. Equal images count as one, and are left out together.

    Args:
        images: of one shape, with at least two numbers each.
        population: the images that m and C come from; ``None`` for all.

    Returns:
        Seven columns; NaN in rows that are not finite.

    Raises:
        InputError: fewer than 50 distinct finite images in the population, or all of them equal
            but for rounding.

    Cost: n d min(n, d) operations, in float64. Beyond 4,096 numbers an image, C is taken from at
    most 4,096 images of the population, evenly over their rows, and fewer where their d numbers
    take more than 1 GiB: then the result depends on the order of the rows too, though little.
    """
    flat = images.reshape(len(images), -1)
    group = group_duplicates(images)
    among = np.ones(len(images), bool) if population is None else population
    members = np.unique(group[among & (group >= 0)])
    if len(members) < SMALLEST_POPULATION:
        raise InputError(
            f"population: expected at least {SMALLEST_POPULATION} distinct finite images, "
            f"found {len(members)}"
        )
    d = flat.shape[1]
    if d > _MOST_NUMBERS:
        most = max(SMALLEST_POPULATION, min(_MOST_NUMBERS, _ENTRIES // d))
        members = members[np.linspace(0, len(members) - 1, min(most, len(members))).astype(int)]
    n, mean = len(members), np.zeros(d)
    for rows in _chunks(members, d):
        mean += flat[rows].sum(axis=0, dtype=np.float64) / n
    scatter, directions = _principal(flat, members, mean)
    variance = scatter.sum() / (n * d)
    if not variance > (1e3 * np.finfo(images.dtype).eps) ** 2 * np.mean(mean**2):
        raise InputError("population: expected images that differ, found them equal")

    noise = (n - 1) * variance * np.square(LEVELS)
    kept = noise[:, None] / (scatter + noise[:, None])  # of a coordinate, by level
    inside = np.isin(group, members)
    out = np.full((len(images), 2 + len(LEVELS)), np.nan)
    for rows in _chunks(np.flatnonzero(group >= 0), d):
        x = flat[rows].astype(np.float64)
        out[rows, 0], out[rows, 1] = x.mean(axis=1), x.std(axis=1)
        x -= mean
        at = np.square(x @ directions)
        beyond = np.maximum(np.square(x).sum(axis=1) - at.sum(axis=1), 0)
        moved = at @ np.square(kept).T + beyond[:, None]
        # Of the image's own share in its prediction: x' (S + n s^2 I)^-1 x n/(n - 1).
        own = (at / scatter) @ (1 - kept).T * (n / (n - 1)) * inside[rows, None]
        floor = np.finfo(np.float64).eps
        moved = np.maximum(moved / (variance * d), floor**2)
        farther = np.where(inside[rows], n / (n - 1), 1.0)[:, None]  # from the others' mean
        out[rows, 2:] = 0.5 * np.log(moved) + np.log(farther / np.maximum(1 - own, floor))
    return out


def _principal(
    flat: Float[np.ndarray, "n d"], members: np.ndarray, mean: Float[np.ndarray, " d"]
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "d k"]]:
    """Eigenvalues of the scatter matrix of some rows, but those that are rounding, and vectors."""
    n, d = len(members), flat.shape[1]
    if d <= n:
        gram = np.zeros((d, d))
        for rows in _chunks(members, d):
            x = flat[rows] - mean
            gram += x.T @ x
    else:
        x = flat[members] - mean
        gram = x @ x.T
    values, vectors = np.linalg.eigh(gram)
    good = values > max(n, d) * np.finfo(np.float64).eps * values[-1]
    values, vectors = values[good], vectors[:, good]
    return values, vectors if d <= n else x.T @ (vectors / np.sqrt(values))


def _chunks(rows: np.ndarray, d: int) -> list[np.ndarray]:
    return np.array_split(rows, -(-len(rows) * d // _CHUNK)) if len(rows) else []


def excess_over_difficulty(
    value: Float[np.ndarray, "n"],
    difficulty: Float[np.ndarray, "n k"],
    population: Bool[np.ndarray, "n"] | None = None,
) -> Float[np.ndarray, "n"]:
    """A score less what images as difficult as this one usually have.

        value - (a + sum_j b_j z_j + c_j z_j^2)

    with z the standardized columns of ``difficulty`` and the coefficients of a robust regression
    over the population, with a ridge of 0.02 on b and c: Huber's, which gives the scale (threshold
    of one robust standard deviation), and from there Tukey's bisquare (4.685), which leaves out
    what stands far apart, also where its difficulty does. What is looked for must be the
    exception: where half of the population is memorized, that is what is usual.

    The result depends on the population as a set. Rows that are exchangeable before are so after,
    whether all of them are in the population or none: conformal p-values stay valid.

    Args:
        value: one score per row; NaN where there is none.
        difficulty: as from ``image_difficulty``; columns that do not vary are passed by.
        population: rows that say what is usual; ``None`` for all.

    Returns:
        In the unit of ``value``; NaN where the score or the difficulty is.

    Raises:
        InputError: fewer than 50 rows of the population have a score.

    References:
        Watson, Guo, Cormode and Sablayrolles (2022), arXiv:2111.08440: scores of membership less
        the difficulty of the image, from other models; Bertran et al. (2023), arXiv:2307.03694:
        from a regression on the image. The covariates are ours.
    """
    usable = np.isfinite(value) & np.isfinite(difficulty).all(axis=1)
    among = usable if population is None else usable & population
    if among.sum() < SMALLEST_POPULATION:
        raise InputError(
            f"value: expected at least {SMALLEST_POPULATION} rows of the population with a score, "
            f"found {among.sum()}"
        )
    z = _standardized(difficulty, among)
    z = _standardized(np.concatenate([z, z**2], axis=1), among)
    design = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    penalty = np.diag(np.append(np.full(z.shape[1], _RIDGE * among.sum()), 0.0))
    x, y = design[among], value[among].astype(np.float64)
    shift, scale = np.median(y), np.max(np.abs(y - np.median(y)))
    if scale == 0:
        return np.where(usable, value - shift, np.nan)
    y = (y - shift) / scale
    coefficients = _robust_fit(x, y, penalty)
    out = np.full(len(value), np.nan)
    expected = shift + scale * (design[usable] @ coefficients)
    out[usable] = value[usable] - expected
    return out


def _robust_fit(
    x: Float[np.ndarray, "n k"], y: Float[np.ndarray, "n"], penalty: Float[np.ndarray, "k k"]
) -> Float[np.ndarray, " k"]:
    """An M-estimate by iterated weights, |y| <= 1: Huber's with its scale, from there Tukey's."""
    eps = np.finfo(np.float64).eps

    def huber(r: np.ndarray, spread: float) -> np.ndarray:
        return np.minimum(1, _HUBER * spread / np.maximum(np.abs(r), eps * spread))

    def bisquare(r: np.ndarray, spread: float) -> np.ndarray:
        return np.square(np.maximum(1 - np.square(r / (_BISQUARE * spread)), 0))

    residual, spread = y, 1.0  # of all residuals none is larger: at first all weigh alike
    for weigh in (huber, bisquare):
        for _ in range(_STEPS):
            weighted = x.T * weigh(residual, spread)
            coefficients = np.linalg.solve(weighted @ x + penalty, weighted @ y)
            before, residual = residual, y - x @ coefficients
            if weigh is huber:
                spread = 1.4826 * np.median(np.abs(residual)) + eps
            if np.max(np.abs(residual - before)) < 1e-9 * spread:
                break
    return coefficients


def _standardized(
    columns: Float[np.ndarray, "n k"], among: Bool[np.ndarray, "n"]
) -> Float[np.ndarray, "n j"]:
    """Columns that vary, with mean 0 and variance 1 over some rows."""
    center, scale = columns[among].mean(axis=0), columns[among].std(axis=0)
    varies = scale > 1e-9 * np.abs(center)
    return (columns[:, varies] - center[varies]) / scale[varies]
