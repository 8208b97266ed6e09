"""What the extraction benches share: models of the digits, and what their samples give away.

A sample matches an image if it lies three times nearer to it than to any other distinct training
image (``find_copies``). Distinct images are expected numbers at a fixed number of samples
(rarefaction of a pool). The interval of a multiple is the wider, on either side, of Student's t
over the training seeds' logarithms and of the error of sampling alone.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks._beds import GROUP_SIZES, score_of
from benchmarks._precision import rounded
from benchmarks.harness import Target
from memjax.diffusion.model import Model
from memjax.evaluate.distances import find_copies
from memjax.evaluate.extraction import extraction_scores, rarefaction
from memjax.evaluate.intervals import proportion_interval
from memjax.evaluate.similarity import adaptive_distance_blocks
from memjax.extract.fixed_points import polish
from memjax.training.testbeds import graded_testbed

BANDS = {"high": (0.0, 0.5), "middle": (0.5, 0.75), "low": (0.75, 1.0)}
"""Of the adaptive distance. The paper's for it are not known; these are ours."""
PER_SAMPLE = 35
"""Network products of one unguided sample."""
CHUNK = 1024
DATA_STD = 0.75
"""Of the digits, about: the same for every training set."""
Z = 1.959964
T3 = 4.302653
"""Quantile of Student's t with three seeds, 95 %."""


TUNING, SCORING = (1, 2, 3), (4, 5, 6)
BEDS = {"wide": (0, 0, 128, 64, 0), "graded": GROUP_SIZES}
LONG, SHORT = 16_000, 8_000
"""Training steps."""
SAMPLES = 2048
DRAWN, POOL = 4096, 16_384
"""Samples drawn from a model to tune, and to score."""


class Digits(NamedTuple):
    """One training seed.

    Attributes:
        model: the trained one, the data's standard deviation among its leaves.
        trained: as it came.
        samples: drawn from it.
        images: distinct training images.
        labels: the digit of each.
        multiplicity: how often each stands in the training set.
        heldout: images of the same kind that it never saw.
    """

    model: Model
    trained: Model
    samples: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    multiplicity: np.ndarray
    heldout: np.ndarray


class Found(NamedTuple):
    """What a pool of samples gave away.

    Attributes:
        hits: per training image, samples that match it.
        pool: samples.
        heldout: samples that match a held-out image.
    """

    hits: np.ndarray
    pool: int
    heldout: int


def train_digits(seed: int, bed: str, steps: int, pool: int) -> Digits:
    """The models of a bed, made so that those of all seeds share compiled programs."""
    found = graded_testbed(seed, BEDS[bed], steps=steps, num_samples=pool)
    multiplicity, images = found.bed.multiplicity, found.bed.images
    trained, model = multiplicity > 0, found.model
    shared = Model(
        score_of(model),
        model.event_shape,
        sigma_min=model.sigma_min,
        sigma_max=model.sigma_max,
        data_std=DATA_STD,
    )
    return Digits(
        shared,
        model,
        found.samples,
        images[trained],
        found.bed.labels[trained],
        multiplicity[trained],
        images[~trained],
    )


def polished(bed: Digits, setting: tuple[float, int]) -> np.ndarray:
    """The samples after so many denoising steps at a noise level."""
    sigma, steps = setting
    samples = jnp.asarray(bed.samples)
    return np.asarray(polish(bed.model, samples, sigma, num_steps=steps, chunk_size=CHUNK))


def give_away(bed: Digits, samples: np.ndarray) -> Found:
    hits = find_copies(samples, bed.images).hits
    heldout = find_copies(samples, bed.heldout).is_copy.sum()
    return Found(hits, len(samples), int(heldout))


def count_distinct(found: Found, samples: int) -> tuple[float, float]:
    """Expected distinct images among so many samples, and the standard error."""
    curve = rarefaction(found.hits, found.pool, np.array([samples]))
    return float(curve.value[0]), float(curve.value[0] - curve.low[0]) / Z


def share_matched(found: Found) -> tuple[float, float]:
    """Share of samples that match, and the standard error."""
    k, n = int(found.hits.sum()), found.pool
    return k / n, math.sqrt(max(k, 1) * max(n - k, 1) / n) / n


def multiple_of(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, Any]:
    """Geometric mean over seeds of quotients of estimates, with the interval the module names."""
    if any(value <= 0 for pair in pairs for value, _ in pair):
        return {"value": None, "interval": [None, None], "seeds": [None] * len(pairs)}
    logs = np.array([math.log(a[0] / b[0]) for a, b in pairs])
    errors = [math.hypot(*(error / value for value, error in pair)) for pair in pairs]
    mean, seeds = float(logs.mean()), len(logs)
    half = Z * math.sqrt(sum(e**2 for e in errors)) / seeds
    if seeds > 1:
        half = max(half, T3 * float(logs.std(ddof=1)) / math.sqrt(seeds))
    return {
        "value": rounded(math.exp(mean)),
        "interval": [rounded(math.exp(mean - half)), rounded(math.exp(mean + half))],
        "seeds": [rounded(math.exp(log)) for log in logs],
    }


def summary_row(
    method: str,
    which: str,
    beds: list[Digits],
    found: list[Found],
    unguided: list[Found],
    samples: int,
    products: float,
) -> dict[str, Any]:
    """What a method found on all seeds, and as multiples of unguided sampling.

    Args:
        method: its name.
        which: "tuning" or "scoring".
        beds: one a seed.
        found: by the method.
        unguided: by plain samples.
        samples: at which distinct images are counted.
        products: network products of a sample.
    """
    equal = round(samples * products / PER_SAMPLE)
    heldout, pool = sum(f.heldout for f in found), sum(f.pool for f in found)
    row: dict[str, Any] = {
        "method": method,
        "seeds": which,
        "status": "ok",
        "products": rounded(products),
        "matched": [rounded(share_matched(f)[0]) for f in found],
        "distinct": [rounded(count_distinct(f, samples)[0]) for f in found],
        "heldout": {
            "matches": heldout,
            "samples": pool,
            "interval": [rounded(x) for x in proportion_interval(heldout, pool)],
        },
        "reached by the pool": {
            f"x{m}": [
                [int(np.sum(f.hits[b.multiplicity == m] > 0)), int(np.sum(b.multiplicity == m))]
                for f, b in zip(found, beds, strict=True)
            ]
            for m in np.unique(beds[0].multiplicity)
        },
    }
    if found is unguided:
        return row
    pairs = list(zip(found, unguided, strict=True))
    row["matched multiple"] = multiple_of([(share_matched(f), share_matched(u)) for f, u in pairs])
    at = [(count_distinct(f, samples), count_distinct(u, samples)) for f, u in pairs]
    row["distinct multiple"] = multiple_of(at)
    row["unguided samples at equal products"] = equal
    if all(equal <= u.pool for u in unguided):
        paid = [(count_distinct(f, samples), count_distinct(u, equal)) for f, u in pairs]
        row["distinct multiple at equal products"] = multiple_of(paid)
    return row


def gain(row: dict[str, Any]) -> float:
    """What settings are chosen by: the product of both multiples of unguided sampling."""
    return math.prod(row[f"{what} multiple"]["value"] or 0.0 for what in ("matched", "distinct"))


def targets(row: dict[str, Any], bounds: tuple[float, float] | None) -> list[Target]:
    """No held-out image is matched; and, if named, multiples that lower ends should reach."""
    found = [
        Target(
            "share of samples that match a held-out image, lower end of its exact interval",
            row["heldout"]["interval"][0],
            0.0,
        )
    ]
    for what, bound in zip(("matched", "distinct"), bounds or (), strict=False):
        low = row[f"{what} multiple"]["interval"][0]
        name = f"{bound:g} / multiple of unguided, {what}, lower end"
        found.append(Target(name, rounded(bound / low) if low else math.inf, 1.0))
    return found


def band_rows(method: str, beds: list[Digits], samples: list[np.ndarray]) -> list[dict[str, Any]]:
    """AMS and UMS of every band, and the distance that 5 % of the samples stay below, by seed."""
    rows = []
    for i, (bed, these) in enumerate(zip(beds, samples, strict=True)):
        blocks = list(adaptive_distance_blocks(these, bed.images))
        nearest = np.concatenate([block.min(axis=1) for block in blocks])
        closest = rounded(float(np.nanquantile(nearest, 0.05)))
        rows.append({"method": method, "status": "ok", "band": "5 %", "seed": i, "value": closest})
        scores = extraction_scores(blocks, tuple(BANDS.values()), distance=True)
        for name, score in zip(BANDS, scores, strict=True):
            row = {"method": method, "status": "ok", "band": name, "seed": i}
            for what in ("ams", "ums", "ums_best"):
                value, low, high = map(rounded, getattr(score, what))
                row[what] = {"value": value, "interval": [low, high]}
            rows.append(row)
    return rows


def curve_row(method: str, found: list[Found], most: int) -> dict[str, Any]:
    """Distinct images against samples, mean over seeds; every interval end a mean too."""
    sizes = np.unique(np.geomspace(16, most, 30).astype(int))
    curves = [rarefaction(f.hits, f.pool, sizes) for f in found]
    mean = {k: np.mean([getattr(c, k) for c in curves], axis=0) for k in ("value", "low", "high")}
    return {
        "method": f"curve: {method}",
        "status": "ok",
        "samples": sizes.tolist(),
        **{k: [rounded(x) for x in v] for k, v in mean.items()},
    }
