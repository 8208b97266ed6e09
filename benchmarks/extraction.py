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

    python -m benchmarks.extraction      # SIDE's AMS and UMS in the layout of the paper's table
"""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks._extraction import (
    BEDS,
    CHUNK,
    DRAWN,
    LONG,
    PER_SAMPLE,
    POOL,
    SAMPLES,
    SCORING,
    SHORT,
    TUNING,
    Digits,
    Found,
    band_rows,
    curve_row,
    gain,
    give_away,
    polished,
    summary_row,
    targets,
    train_digits,
)
from benchmarks._precision import COLORS, panels, rounded
from benchmarks._quality import Question, quality
from benchmarks._side import side
from benchmarks.harness import RESULTS, Case, Table
from memjax.evaluate.distances import find_copies
from memjax.extract.attractors import find_attractors

TARGETS = {"wide": (9.0, 2.6), "graded": (2.5, 2.0)}
"""Multiples of unguided sampling: matched samples, distinct images."""
SIGMAS = (0.05, 0.075, 0.1, 0.15, 0.2)
STEPS = (20, 50)


def _candidates(beds: list[Digits], sigma: float, count: int) -> list[dict[str, Any]]:
    """Attractors against the truth: how many are training images, and which ranking knows it."""
    rows = []
    for i, bed in enumerate(beds):
        starts = jnp.asarray(bed.samples[:count])
        found = find_attractors(bed.model, starts, sigma, key=0, chunk_size=CHUNK)
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


def _summary(
    which: str,
    setting: tuple[float, int],
    beds: list[Digits],
    found: list[Found],
    unguided: list[Found],
    samples: int,
) -> dict[str, Any]:
    sigma, steps = setting
    row = summary_row("fixed points", which, beds, found, unguided, samples, PER_SAMPLE + steps)
    return row | {"sigma": sigma, "steps": steps}


def _make(bed: str, steps: int, quick: bool, seed: int) -> Table:
    tuning, scoring = ([seed + n for n in s[: 1 if quick else None]] for s in (TUNING, SCORING))
    samples, drawn, pool = (64, 128, 256) if quick else (SAMPLES, DRAWN, POOL)
    training = 300 if quick else steps

    def compute():
        rows = []
        beds = [train_digits(one, bed, training, drawn) for one in tuning]
        beds = [b._replace(samples=b.samples[:samples]) for b in beds]
        plain = [give_away(b, b.samples) for b in beds]
        rows.append(summary_row("unguided", "tuning", beds, plain, plain, samples, PER_SAMPLE))
        settings = [(sigma, k) for sigma in SIGMAS for k in STEPS]
        tried = []
        for setting in settings:
            found = [give_away(b, polished(b, setting)) for b in beds]
            tried.append(_summary("tuning", setting, beds, found, plain, samples))
        chosen = settings[int(np.argmax([gain(row) for row in tried]))]
        rows += tried
        beds = [train_digits(one, bed, training, pool) for one in scoring]
        after = [polished(b, chosen) for b in beds]
        plain = [give_away(b, b.samples) for b in beds]
        found = [give_away(b, x) for b, x in zip(beds, after, strict=True)]
        rows.append(summary_row("unguided", "scoring", beds, plain, plain, samples, PER_SAMPLE))
        row = _summary("scoring", chosen, beds, found, plain, samples)
        rows.append(row)
        rows += band_rows("unguided", beds, [b.samples[:samples] for b in beds])
        rows += band_rows("fixed points", beds, [x[:samples] for x in after])
        rows += _candidates(beds, chosen[0], samples)
        rows += [curve_row("unguided", plain, pool), curve_row("fixed points", found, pool)]
        return rows, targets(row, TARGETS[bed] if steps == LONG else None)

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
    """Fixed points on two beds, trained long and short; SIDE on the wide one."""
    fixed_points = [
        Case(
            f"extraction/{bed}{suffix}",
            lambda quick, seed, b=bed, s=steps: _make(b, s, quick, seed),
        )
        for steps, suffix in ((LONG, ""), (SHORT, "-8000"))
        for bed in BEDS
    ]
    return [*fixed_points, Case("extraction/side", side)]


def paper_table(record: dict[str, Any]) -> str:
    """AMS and UMS in percent, in the layout of Table 1 of arXiv:2410.02467, in Markdown.

    Means over seeds. The last column is the adaptive distance that 5 % of the samples stay below.
    """
    rows = [row for row in record["rows"] if "band" in row]
    names = ("low", "middle", "high")
    lines = [
        "| | " + " | ".join(f"{n} {w}" for n in names for w in ("AMS", "UMS")) + " | 5 % below |",
        "|---" * 8 + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for band in names:
            own = [row for row in rows if (row["method"], row["band"]) == (method, band)]
            cells += [f"{100 * np.mean([r[w]['value'] for r in own]):.2f}" for w in ("ams", "ums")]
        own = [row for row in rows if (row["method"], row["band"]) == (method, "5 %")]
        cells.append(f"{np.mean([row['value'] for row in own]):.2f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(records):
    """Distinct images against samples, attractors; SIDE against its controls, and its weight."""
    known = {r["case"].split("/")[1]: r for r in records if r["status"] == "ok"}
    beds = {name: known[name] for name in ("wide", "graded") if name in known}
    guided = known.get("side")
    canvas, axes = panels(len(beds) + 1 + (3 if guided else 0), height=3.4)
    left = iter(axes)
    for name, record in beds.items():
        axis = next(left)
        curves = [row for row in record["rows"] if row["method"].startswith("curve")]
        for row, color in zip(curves, COLORS, strict=False):
            label = row["method"].removeprefix("curve: ")
            axis.fill_between(
                row["samples"], row["low"], row["high"], color=color, alpha=0.2, linewidth=0
            )
            axis.plot(row["samples"], row["value"], color=color, linewidth=1.4, label=label)
        axis.axvline(record["parameters"]["samples"], color="0.6", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="samples", ylim=(0, None))
        axis.set_title(f"{name} bed: distinct training images", fontsize=9)
        axis.legend(fontsize=7, frameon=False, loc="upper left")
    _draw_attractors(next(left), list(beds.values()))
    if guided:
        _draw_methods(next(left), guided)
        for what in ("ams", "ums"):
            _draw_sweep(next(left), guided, what)
    for axis in axes:
        axis.set_axisbelow(True)
        axis.grid(color="0.92")
        axis.tick_params(labelsize=8)
    return canvas


def _draw_attractors(axis, records):
    """How firmly what is stored attracts."""
    rows = [row for r in records for row in r["rows"] if row["method"] == "attractors"]
    radius = np.array([r for row in rows for r in row["radius"]], float)
    stored = np.array([s for row in rows for s in row["is training image"]], bool)
    edges = np.linspace(0, max(1.05, float(np.nanmax(radius, initial=1))), 36)
    parts, names = [radius[stored], radius[~stored]], ["training image", "other"]
    axis.hist(parts, edges, stacked=True, color=COLORS[:2], label=names)
    axis.axvline(1, color="0.6", linewidth=0.8, linestyle=":")
    axis.set_xlabel("spectral radius of dD/dx")
    axis.set_title("attractors, all beds and seeds", fontsize=9)
    axis.legend(fontsize=7, frameon=False, loc="upper left")


def _draw_methods(axis, record):
    """Distinct images of every method at equal samples, with the share that matches."""
    rows = [row for row in record["rows"] if row.get("seeds") == "scoring"][::-1]
    mean = [float(np.mean(row["distinct"])) for row in rows]
    axis.barh(range(len(rows)), mean, color=COLORS[0], height=0.6)
    for at, row in enumerate(rows):
        axis.plot(row["distinct"], [at] * len(row["distinct"]), ".", color="0.2", markersize=3)
        text = f"{np.mean(row['matched']):.0%}" if np.mean(row["matched"]) else "0"
        axis.text(max(row["distinct"]) + 3, at, text, va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axis.set(xlabel="distinct training images", xlim=(0, 1.15 * max(max(mean), 1)))
    count = record["parameters"]["samples"]
    axis.set_title(f"wide bed, {count:,} samples; share that matches", fontsize=9)


def _draw_sweep(axis, record, what):
    """AMS or UMS of the high band against the weight of guidance: mean and range over seeds."""
    rows = [row for row in record["rows"] if row["method"].startswith("sweep")]
    for name, color in zip(dict.fromkeys(row["method"] for row in rows), COLORS, strict=False):
        own = [row for row in rows if row["method"] == name]
        label = name.removeprefix("sweep: ")
        weight = np.array([row["weight"] for row in own])
        if "normalized" in label:
            weight, label = weight * 32, label + " (weight / 32)"
        found = np.array([row[what] for row in own])
        axis.fill_between(weight, found.min(1), found.max(1), color=color, alpha=0.15, linewidth=0)
        axis.plot(weight, found.mean(1), color=color, linewidth=1.4, marker=".", label=label)
    axis.set_xscale("symlog", linthresh=1, linscale=0.3)
    axis.set_xticks([0, 1, 2, 4, 8, 16, 32], ["0", "1", "2", "4", "8", "16", "32"])
    axis.minorticks_off()
    axis.set(xlabel="weight of guidance", ylim=(0, None))
    axis.set_title(f"SIDE, wide bed: {what.upper()} of the high band", fontsize=9)
    if what == "ums":
        axis.legend(fontsize=7, frameon=False, loc="lower left")


if __name__ == "__main__":
    print(paper_table(json.loads((RESULTS / "extraction-side.json").read_text())))
