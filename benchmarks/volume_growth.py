"""Volume growth as a detector on the graded digits: what it finds, and at which noise.

Settings of ``NormalizedVolumeGrowth`` (where it starts, between which noise levels, how precisely)
on training seeds 1-3, on which the default was chosen, and 4-6, on which nothing was. Targets are
those of the default on 4-6: images that stand four times in the training set, and more often,
against images seen once; on test beds of 48 images twice and four times, which resolve rates finer
and memorize a little less, and on those of 16 images a group that ``memjax audit digits`` uses.
The figure follows every group from noise 0.02 to 2: the rate of growth there, 1 - d_eff/d, whose
mean over log sigma is the detector's value.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._beds import GROUP_SIZES, score_of
from benchmarks._precision import COLORS, panels, rounded
from benchmarks._quality import Question, pooled, quality
from benchmarks.harness import Case, Table, Target
from memjax._core.keys import derive_key
from memjax.detect.evaluate import evaluate_detectors
from memjax.detect.plan import cost
from memjax.detect.volume_growth import NormalizedVolumeGrowth
from memjax.diffusion.flow import probability_flow
from memjax.training.testbeds import graded_testbed

TUNING, SCORING = (1, 2, 3), (4, 5, 6)
STANDARD = 16
"""Images a group of the test bed of ``memjax audit digits``."""
DATA_STD = 0.75
DEFAULT = "default"
DETECTORS = {
    DEFAULT: NormalizedVolumeGrowth(0.05 * DATA_STD),
    "16 probes": NormalizedVolumeGrowth(0.05 * DATA_STD, num_probes=16),
    "from 2 noised": NormalizedVolumeGrowth(0.05 * DATA_STD, "noised", 2),
    "0.02 to 0.18": NormalizedVolumeGrowth(0.0225, ratio=8),
    "0.05 to 0.4": NormalizedVolumeGrowth(0.05, ratio=8),
}
GROUPS = (0, 1, 2, 4, 8, 16, 32)
PROFILE = (0.02, 2.0)
LEVELS = 24
SHOWN = 150
"""Rows of a large group in the figure, for each seed."""
BATCH = 128


class Digits(NamedTuple):
    """One training seed."""

    score: Any
    images: jax.Array
    multiplicity: np.ndarray


def _digits(seed: int, quick: bool, groups: int | tuple[int, ...]) -> Digits:
    steps, samples = (300, 64) if quick else (8000, 4096)
    found = graded_testbed(seed, groups, steps=steps, num_samples=samples)
    return Digits(score_of(found.model), jnp.asarray(found.bed.images), found.bed.multiplicity)


@partial(jax.jit, static_argnames="detector")
def _values(score, images, key, detector):
    def one(x):
        return evaluate_detectors(score, x, (detector,), key=key)[0].value

    return jax.lax.map(one, images, batch_size=BATCH)


@jax.jit
def _rates(score, images):
    """[images, levels]: share of directions that grow with the noise, 1 - d_eff/d."""
    options = {"divergence": "exact", "solver": "heun", "num_steps": LEVELS}
    flow = probability_flow(score, *PROFILE, **options)

    def one(x):
        return 1 - flow(x).profile.effective_dimensions / x.size

    return jax.lax.map(one, images, batch_size=BATCH)


def _questions(multiplicity: np.ndarray) -> dict[str, Question]:
    once = multiplicity == 1
    out = {f"x{m}": Question(multiplicity == m, once) for m in GROUPS[2:]}
    out["x8 or more"] = Question(multiplicity >= 8, once)
    out["membership"] = Question(once, multiplicity == 0)
    return out


def _summary(name: str, seeds: str, found: list[np.ndarray], beds: list[Digits]) -> dict[str, Any]:
    products = cost((DETECTORS[name],), beds[0].images[0].size).total
    four_times = int(np.sum(beds[0].multiplicity == 4))
    row = {"method": name, "seeds": seeds, "status": "ok", "products": int(products)}
    row["images four times"] = four_times
    if not all(np.all(np.isfinite(values)) for values in found):
        row["status"] = "failed"
    for question in _questions(beds[0].multiplicity):
        each = [
            quality(values, _questions(bed.multiplicity)[question])
            for values, bed in zip(found, beds, strict=True)
        ]
        for metric in ("auroc", "tpr"):
            mean, low, high = pooled(metric, each)
            row[f"{question} {metric}"] = {
                "mean": round(mean, 4),
                "interval": [rounded(low), rounded(high)],
                "seeds": [rounded(getattr(q, metric)) for q in each],
            }
    return row


def _profiles(beds: list[Digits]) -> list[dict[str, Any]]:
    """Quantiles of the growth rate over the rows of a group, all seeds together."""
    rows = []
    rates: dict[int, list[np.ndarray]] = {group: [] for group in GROUPS}
    for bed in beds:
        chosen = np.concatenate(
            [np.flatnonzero(bed.multiplicity == group)[:SHOWN] for group in GROUPS]
        )
        found = np.asarray(_rates(bed.score, bed.images[chosen]))
        for group in GROUPS:
            rates[group].append(found[bed.multiplicity[chosen] == group])
    for group, every in rates.items():
        low, middle, high = np.quantile(np.concatenate(every), (0.1, 0.5, 0.9), axis=0)
        quantiles = {"low": low, "median": middle, "high": high}
        rows.append(
            {"method": "profile", "status": "ok", "group": group, "images": sum(map(len, every))}
            | {name: [rounded(value) for value in curve] for name, curve in quantiles.items()}
        )
    return rows


def _make(quick: bool, seed: int) -> Table:
    tuning, scoring = ([seed + n for n in s[: 1 if quick else None]] for s in (TUNING, SCORING))

    def compute():
        key = derive_key(seed, "volume growth")
        rows, targets, beds = [], [], []
        for which, seeds, groups, names in (
            ("tuning", tuning, GROUP_SIZES, tuple(DETECTORS)),
            ("scoring", scoring, GROUP_SIZES, tuple(DETECTORS)),
            ("scoring", scoring, STANDARD, (DEFAULT,)),
        ):
            these = [_digits(one, quick, groups) for one in seeds]
            for name in names:
                found = [
                    np.asarray(_values(b.score, b.images, key, DETECTORS[name])) for b in these
                ]
                rows.append(_summary(name, which, found, these))
            if groups == GROUP_SIZES:
                beds = these
            if which == "tuning":
                continue
            row = next(r for r in rows[-len(names) :] if r["method"] == DEFAULT)
            for what, bound in (("x4 auroc", 0.98), ("x4 tpr", 0.70), ("x8 or more auroc", 1.0)):
                missing = round(1 - row[what]["mean"], 4)
                where = f"mean of seeds, {row['images four times']} images four times"
                targets.append(Target(f"1 - {what}, {where}", missing, round(1 - bound, 4)))
        return rows + _profiles(beds), targets

    parameters = {"d": 64, "tuning_seeds": tuning, "scoring_seeds": scoring, "levels": LEVELS}
    return Table(compute, parameters, dtype="float32")


def cases() -> list[Case]:
    """One table."""
    return [Case("volume_growth/digits", _make)]


def figure(records):
    """Left: growth against noise, group by group. Right: what settings find."""
    (record,) = records
    canvas, (left, right) = panels(2, height=3.9)
    levels = np.geomspace(*PROFILE, LEVELS + 1)
    profiles = [row for row in record["rows"] if row["method"] == "profile"]
    for row, color in zip(profiles, ("#7F7F7F", *COLORS), strict=False):
        name = {0: "held out", 1: "once"}.get(row["group"], f"{row['group']} times")
        left.fill_between(levels, row["low"], row["high"], color=color, alpha=0.13, linewidth=0)
        left.plot(levels, row["median"], color=color, linewidth=1.4, label=name)
    default = DETECTORS[DEFAULT]
    left.axvspan(default.sigma, default.ratio * default.sigma, color="0.94", zorder=0)
    left.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    left.set(xscale="log", xlabel="noise level", ylim=(0.0, 1.15))
    left.set_title("growth of volume per log noise, of what it can be", fontsize=9)
    left.legend(fontsize=7, frameon=False, title="in the training set", title_fontsize=7)
    scored = [r for r in record["rows"] if r.get("seeds") == "scoring"]
    sizes = {r["images four times"] for r in scored}
    for i, (metric, marker) in enumerate((("x4 auroc", "o"), ("x4 tpr", "s"))):
        for j, row in enumerate(scored):
            found = row[metric]
            y = -j - 0.2 * i
            right.plot(found["interval"], [y, y], color=COLORS[i], linewidth=1.2)
            label = {"label": f"{metric.split()[1].upper()}, 4 times"} if not j else {}
            right.plot(found["mean"], y, marker, color=COLORS[i], markersize=5, **label)
    right.set_yticks([-j for j in range(len(scored))])
    right.set_yticklabels(
        [
            f"{r['method']} ({r['products']})"
            + (f", {STANDARD} a group" if r["images four times"] != max(sizes) else "")
            for r in scored
        ],
        fontsize=7,
    )
    right.set_xlim(0.0, 1.02)
    right.set_title("against images seen once; (network products)", fontsize=9)
    right.legend(fontsize=7, frameon=False, loc="lower left")
    for axis in (left, right):
        axis.grid(color="0.92")
        axis.tick_params(labelsize=8)
    return canvas
