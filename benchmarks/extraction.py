"""Extraction from models of the digits: how many training images samples give away.

Unguided sampling against denoiser fixed points (``memjax.extract.polish`` of the same samples), on
two test beds: the wide one (128 digits stand 8 times in the training set, 64 stand 16 times, the
rest once), where coverage can be shown, and the graded one of the detector bench. Models are
trained for 16,000 steps, twice as long as the detectors': unguided samples then contain about 40
distinct training images in 2,048 on the graded bed. Two more cases take the models of 8,000 steps,
which store less.

Settings (noise level, steps) are chosen on training seeds 1-3, by the product of the two multiples
of unguided sampling, and scored on 4-6. A sample matches an image if it lies three times nearer to
it than to any other distinct training image (``find_copies``). Distinct images are expected numbers
at 2,048 samples (rarefaction of a larger pool). The interval of a multiple is the wider, on either
side, of Student's t over the three seeds' logarithms and of the error of sampling alone. Targets
are those of its lower end; the control is the same rule against the held-out digits. Candidates
are ranked attractors, for which no training image is needed. At equal network products unguided
sampling is given as many more samples as the steps would pay for.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks._beds import GROUP_SIZES, score_of
from benchmarks._precision import COLORS, panels, rounded
from benchmarks._quality import Question, quality
from benchmarks.harness import Case, Table, Target
from memjax.evaluate.distances import find_copies
from memjax.evaluate.extraction import extraction_scores, rarefaction
from memjax.evaluate.intervals import proportion_interval
from memjax.evaluate.similarity import adaptive_distance_blocks
from memjax.extract.attractors import find_attractors
from memjax.extract.fixed_points import polish
from memjax.training.testbeds import graded_testbed

TUNING, SCORING = (1, 2, 3), (4, 5, 6)
BEDS = {"wide": (0, 0, 128, 64, 0), "graded": GROUP_SIZES}
TARGETS = {"wide": (9.0, 2.6), "graded": (2.5, 2.0)}
"""Multiples of unguided sampling: matched samples, distinct images."""
LONG, SHORT = 16_000, 8_000
"""Training steps."""
SIGMAS = (0.05, 0.075, 0.1, 0.15, 0.2)
STEPS = (20, 50)
SAMPLES = 2048
DRAWN, POOL = 4096, 16_384
"""Samples drawn from a model to tune, and to score."""
PER_SAMPLE = 35
"""Network products of one unguided sample."""
BANDS = {"high": (0.0, 0.5), "middle": (0.5, 0.75), "low": (0.75, 1.0)}
"""Of the adaptive distance. The paper's for it are not known; these are ours."""
CHUNK = 1024
Z = 1.959964
T3 = 4.302653
"""Quantile of Student's t with three seeds, 95 %."""


class Digits(NamedTuple):
    """One training seed."""

    score: Any
    samples: np.ndarray
    images: np.ndarray
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


def _digits(seed: int, bed: str, steps: int, pool: int) -> Digits:
    found = graded_testbed(seed, BEDS[bed], steps=steps, num_samples=pool)
    multiplicity, images = found.bed.multiplicity, found.bed.images
    trained = multiplicity > 0
    return Digits(
        score_of(found.model),
        found.samples,
        images[trained],
        multiplicity[trained],
        images[~trained],
    )


def _polished(bed: Digits, setting: tuple[float, int] | None) -> np.ndarray:
    """The samples as they are, or after so many steps at a noise level."""
    if setting is None:
        return bed.samples
    sigma, steps = setting
    samples = jnp.asarray(bed.samples)
    return np.asarray(polish(bed.score, samples, sigma, num_steps=steps, chunk_size=CHUNK))


def _found(bed: Digits, samples: np.ndarray) -> Found:
    hits = find_copies(samples, bed.images).hits
    heldout = find_copies(samples, bed.heldout).is_copy.sum()
    return Found(hits, len(samples), int(heldout))


def _distinct(found: Found, samples: int) -> tuple[float, float]:
    """Expected distinct images among so many samples, and the standard error."""
    curve = rarefaction(found.hits, found.pool, np.array([samples]))
    return float(curve.value[0]), float(curve.value[0] - curve.low[0]) / Z


def _matched(found: Found) -> tuple[float, float]:
    """Share of samples that match, and the standard error."""
    k, n = int(found.hits.sum()), found.pool
    return k / n, math.sqrt(max(k, 1) * max(n - k, 1) / n) / n


def _multiple(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, Any]:
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


def _summary(
    method: str,
    which: str,
    setting: tuple[float, int] | None,
    beds: list[Digits],
    found: list[Found],
    unguided: list[Found],
    samples: int,
) -> dict[str, Any]:
    steps = 0 if setting is None else setting[1]
    equal = round(samples * (PER_SAMPLE + steps) / PER_SAMPLE)
    heldout, pool = sum(f.heldout for f in found), sum(f.pool for f in found)
    levels = np.unique(beds[0].multiplicity)
    row: dict[str, Any] = {
        "method": method,
        "seeds": which,
        "status": "ok",
        "sigma": None if setting is None else setting[0],
        "steps": steps,
        "products": PER_SAMPLE + steps,
        "matched": [rounded(_matched(f)[0]) for f in found],
        "distinct": [rounded(_distinct(f, samples)[0]) for f in found],
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
            for m in levels
        },
    }
    if setting is not None:
        pairs = list(zip(found, unguided, strict=True))
        at = [(_distinct(f, samples), _distinct(u, samples)) for f, u in pairs]
        row["matched multiple"] = _multiple([(_matched(f), _matched(u)) for f, u in pairs])
        row["distinct multiple"] = _multiple(at)
        row["unguided samples at equal products"] = equal
        if all(equal <= u.pool for u in unguided):
            paid = [(_distinct(f, samples), _distinct(u, equal)) for f, u in pairs]
            row["distinct multiple at equal products"] = _multiple(paid)
    return row


def _bands(method: str, beds: list[Digits], samples: list[np.ndarray]) -> list[dict[str, Any]]:
    """AMS and UMS in the layout of the paper, one row a seed and band."""
    rows = []
    for i, (bed, these) in enumerate(zip(beds, samples, strict=True)):
        blocks = adaptive_distance_blocks(these, bed.images)
        scores = extraction_scores(blocks, tuple(BANDS.values()), distance=True)
        for name, score in zip(BANDS, scores, strict=True):
            row = {"method": method, "status": "ok", "band": name, "seed": i}
            for what in ("ams", "ums", "ums_best"):
                value, low, high = map(rounded, getattr(score, what))
                row[what] = {"value": value, "interval": [low, high]}
            rows.append(row)
    return rows


def _candidates(beds: list[Digits], sigma: float, count: int) -> list[dict[str, Any]]:
    """Attractors against the truth: how many are training images, and which ranking knows it."""
    rows = []
    for i, bed in enumerate(beds):
        starts = jnp.asarray(bed.samples[:count])
        found = find_attractors(bed.score, starts, sigma, key=0, chunk_size=CHUNK)
        row = {"method": "attractors", "status": "ok", "seed": i, "attractors": len(found.hits)}
        copies = find_copies(found.points, bed.images).is_copy if len(found.hits) else np.zeros(0)
        row["status of starts"] = np.bincount(found.fixed_points.status, minlength=4).tolist()
        row["training images"] = int(copies.sum())
        row["precision of the first 50"] = rounded(float(copies[:50].mean())) if count else None
        row["radius"] = [rounded(r) for r in found.radius]
        row["is training image"] = copies.astype(int).tolist()
        row["products"] = int(found.cost.total)
        if 0 < copies.sum() < len(copies):
            question = Question(copies.astype(bool), ~copies.astype(bool))
            for name, value in (("radius", -found.radius), ("hits", found.hits.astype(float))):
                row[f"auroc of {name}"] = rounded(quality(value, question).auroc)
        rows.append(row)
    return rows


def _curves(method: str, found: list[Found], most: int) -> dict[str, Any]:
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


def _make(bed: str, steps: int, quick: bool, seed: int) -> Table:
    tuning, scoring = ([seed + n for n in s[: 1 if quick else None]] for s in (TUNING, SCORING))
    samples, drawn, pool = (64, 128, 256) if quick else (SAMPLES, DRAWN, POOL)
    training = 300 if quick else steps

    def compute():
        rows = []
        beds = [_digits(one, bed, training, drawn) for one in tuning]
        beds = [b._replace(samples=b.samples[:samples]) for b in beds]
        unguided = [_found(b, b.samples) for b in beds]
        rows.append(_summary("unguided", "tuning", None, beds, unguided, unguided, samples))
        settings = [(sigma, k) for sigma in SIGMAS for k in STEPS]
        best, chosen = -math.inf, settings[0]
        for setting in settings:
            found = [_found(b, _polished(b, setting)) for b in beds]
            row = _summary("fixed points", "tuning", setting, beds, found, unguided, samples)
            rows.append(row)
            gains = [row[f"{what} multiple"]["value"] or 0 for what in ("matched", "distinct")]
            if math.prod(gains) > best:
                best, chosen = math.prod(gains), setting
        beds = [_digits(one, bed, training, pool) for one in scoring]
        after = [_polished(b, chosen) for b in beds]
        unguided = [_found(b, b.samples) for b in beds]
        found = [_found(b, x) for b, x in zip(beds, after, strict=True)]
        rows.append(_summary("unguided", "scoring", None, beds, unguided, unguided, samples))
        row = _summary("fixed points", "scoring", chosen, beds, found, unguided, samples)
        rows.append(row)
        rows += _bands("unguided", beds, [b.samples[:samples] for b in beds])
        rows += _bands("fixed points", beds, [x[:samples] for x in after])
        rows += _candidates(beds, chosen[0], samples)
        rows += [_curves("unguided", unguided, pool), _curves("fixed points", found, pool)]
        targets = [
            Target(
                "share of samples that match a held-out image, lower end of its exact interval",
                row["heldout"]["interval"][0],
                0.0,
            )
        ]
        if steps == LONG:
            for what, bound in zip(("matched", "distinct"), TARGETS[bed], strict=True):
                low = row[f"{what} multiple"]["interval"][0]
                name = f"{bound:g} / multiple of unguided, {what}, lower end"
                targets.append(Target(name, rounded(bound / low) if low else math.inf, 1.0))
        return rows, targets

    parameters = {
        "d": 64,
        "group_sizes": BEDS[bed],
        "training_steps": training,
        "samples": samples,
        "pool": pool,
        "tuning_seeds": tuning,
        "scoring_seeds": scoring,
    }
    return Table(compute, parameters, dtype="float32")


def cases() -> list[Case]:
    """Two beds, trained long and short."""
    return [
        Case(
            f"extraction/{bed}{suffix}",
            lambda quick, seed, b=bed, s=steps: _make(b, s, quick, seed),
        )
        for steps, suffix in ((LONG, ""), (SHORT, "-8000"))
        for bed in BEDS
    ]


def figure(records):
    """Distinct images against samples; and how firmly what is stored attracts."""
    records = [r for r in records if r["status"] == "ok" and not r["case"].endswith("-8000")]
    canvas, axes = panels(len(records) + 1, height=3.6)
    for record, axis in zip(records, axes[:-1], strict=True):
        bed = record["case"].split("/")[1]
        curves = [row for row in record["rows"] if row["method"].startswith("curve")]
        for row, color in zip(curves, COLORS, strict=False):
            name = row["method"].removeprefix("curve: ")
            axis.fill_between(
                row["samples"], row["low"], row["high"], color=color, alpha=0.2, linewidth=0
            )
            axis.plot(row["samples"], row["value"], color=color, linewidth=1.4, label=name)
        axis.axvline(record["parameters"]["samples"], color="0.6", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="samples", ylim=(0, None))
        axis.set_title(f"{bed} bed: distinct training images", fontsize=9)
    rows = [row for r in records for row in r["rows"] if row["method"] == "attractors"]
    radius = np.array([r for row in rows for r in row["radius"]], float)
    stored = np.array([s for row in rows for s in row["is training image"]], bool)
    edges = np.linspace(0, max(1.05, float(np.nanmax(radius, initial=1))), 36)
    parts, names = [radius[stored], radius[~stored]], ["training image", "other"]
    axes[-1].hist(parts, edges, stacked=True, color=COLORS[:2], label=names)
    axes[-1].axvline(1, color="0.6", linewidth=0.8, linestyle=":")
    axes[-1].set_xlabel("spectral radius of dD/dx")
    axes[-1].set_title("attractors, all beds and seeds", fontsize=9)
    for axis in axes:
        axis.set_axisbelow(True)
        axis.grid(color="0.92")
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, frameon=False, loc="upper left")
    return canvas
