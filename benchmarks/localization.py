"""Which pixels a model stores: maps of curvature and score against masks that are known.

``prompts``: 20 prompts a training seed whose images share their top half. Every map at noised
images of the prompt and along the sampler's trajectories; noise level (or range), smoothing, the
steps of the weaker checkpoint and the threshold are chosen on training seeds 1-3, and 4-6 say what
that is worth, on other prompts of other models. Beside it the published protocol, whose threshold
sees the masks, on the same maps in the papers' scaling, and the floors. About a sixth of all
pixels hardly varies in the whole training set; nothing shows whether those are stored, so that
"varying" leaves them out. ``fields``: a block pinned in an exact Gaussian world, and how many
products an estimate of its map needs.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._beds import score_of
from benchmarks._precision import COLORS, MARKERS, panels, rounded
from benchmarks.harness import Case, Table, Target
from memjax._core.keys import derive_key
from memjax.diffusion.model import Model
from memjax.evaluate.overlap import OverlapEstimate, map_ranking, mask_iou, mask_overlap
from memjax.evaluate.roc import auroc
from memjax.localize.maps import Maps, curvature_maps, over_others
from memjax.localize.masks import fit_threshold, published_overlap, smooth
from memjax.localize.scan import scan_images, scan_levels, scan_samples
from memjax.training.testbeds import prompts_testbed

TUNING, SCORING = (1, 2, 3), (4, 5, 6)
STEPS, WEAKER = 8000, (300, 1000)
SIGMAS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0)
"""In the units of the digits, whose pixels have standard deviations up to 0.8."""
RANGES = ((0.1, 1.5), (0.2, 1.5), (0.35, 1.5), (0.1, 20.0))
"""Noise levels over which a difference is integrated."""
WIDTHS = (0.5, 0.65, 0.85, 1.2)
"""Of the smoothing, in pixels."""
DRAWS = 8
VARYING = 0.05
"""Standard deviation over the training set, images having the range -1 to 1."""
PLACES = {"noised": "noised images of the prompt", "trajectory": "along the sampler"}
TITLES = {
    "curvature": "curvature alone",
    "curvature_over_null": "curvature over no prompt",
    "curvature_over_baseline": "curvature over a weaker checkpoint",
    "curvature_over_others": "curvature over other prompts (ours)",
    "score_over_null": "score over no prompt",
    "score_over_baseline": "score over a weaker checkpoint",
}
SECOND_MODEL = ("curvature_over_baseline", "score_over_baseline")


class Bed(NamedTuple):
    """One training seed: what is known, and maps [prompt, level, 8, 8] by place and name."""

    mask: np.ndarray
    kind: np.ndarray
    varying: np.ndarray
    maps: dict[tuple[str, str, int], np.ndarray]
    scans: dict[tuple[str, str, int], dict[str, np.ndarray]]


class Candidate(NamedTuple):
    """A way to make one number a pixel: a map at a level, or over a range of them."""

    steps: int
    at: str
    width: float = 0.0


@cache
def _bed(seed: int, quick: bool) -> Bed:
    steps, weaker = (150, (50,)) if quick else (STEPS, WEAKER)
    found = prompts_testbed(seed, steps=steps, num_samples=70 if quick else 4096)
    bed, count = found.bed, len(found.bed.kind)
    images = jnp.asarray(bed.images.reshape(count, -1, *bed.images.shape[1:])[:, ::5])
    model = Model(  # the standard deviation among the leaves: one program for all seeds
        score_of(found.model),
        found.model.event_shape,
        sigma_min=min(SIGMAS),
        sigma_max=max(SIGMAS),
        data_std=1.0,
        null_condition=found.model.null_condition,
    )
    conditions, key = jnp.arange(count, dtype=jnp.int32), derive_key(0, "localization")
    maps: dict[tuple[str, str, int], np.ndarray] = {}
    scans: dict[tuple[str, str, int], dict[str, np.ndarray]] = {}
    for other in weaker:
        baseline = score_of(prompts_testbed(seed, steps=other, num_samples=70).model)
        given = {"key": key, "baseline": baseline, "num_draws": DRAWS, "row_chunk": count}
        by_place = {
            "noised": scan_images(model, images, jnp.asarray(SIGMAS), conditions, **given),
            "trajectory": scan_samples(model, SIGMAS, conditions, **given),
        }
        for place, here in by_place.items():
            assert not np.any(here.status)
            _collect(here, place, other, maps, scans)
    std = np.broadcast_to(bed.images.std(0)[..., 0], (count, 8, 8))
    return Bed(bed.mask[..., 0], np.array(bed.kind), std > VARYING, maps, scans)


def _collect(here: Maps, place: str, steps: int, maps: dict, scans: dict) -> None:
    differences = {name: getattr(here, name) for name in TITLES if hasattr(here, name)}
    differences["curvature_over_others"] = over_others(here.curvature)
    for name, of in differences.items():
        maps[place, name, steps] = np.asarray(of.summed)
        if not name.startswith("curvature_over"):
            continue
        found = {}
        for low, high in RANGES:
            levels = np.flatnonzero((np.array(SIGMAS) >= low) & (np.array(SIGMAS) <= high))
            scan = _scan(int(levels[0]), int(levels[-1]) + 1)(of, here.curvature)
            found[f"{low:g} to {high:g}"] = np.asarray(scan.integral)
        found["persistent"] = np.asarray(scan.persistent)  # over all levels
        scans[place, name, steps] = found


@cache
def _scan(start: int, stop: int) -> Callable:
    sigmas = jnp.asarray(SIGMAS[start:stop])

    @jax.jit
    def run(difference, curvature):
        cut = partial(jax.tree.map, lambda leaf: leaf[:, start:stop])
        return jax.vmap(partial(scan_levels, sigmas))(cut(difference), cut(curvature))

    return run


def _values(bed: Bed, place: str, name: str, c: Candidate) -> np.ndarray:
    """One number a pixel for every prompt."""
    key = (place, name, c.steps)
    if key in bed.scans and c.at in bed.scans[key]:
        found = bed.scans[key][c.at]
    else:
        found = bed.maps[key][:, SIGMAS.index(float(c.at))]
    return smooth(found, c.width)


def _candidates(bed: Bed, place: str, name: str, widths: tuple[float, ...]) -> list[Candidate]:
    steps = sorted({key[2] for key in bed.maps})
    out = []
    for k in steps if name in SECOND_MODEL else steps[:1]:
        where = [f"{sigma:g}" for sigma in SIGMAS] + list(bed.scans.get((place, name, k), {}))
        out += [Candidate(k, at, width) for at in where for width in widths]
    return out


def _rows_of(bed: Bed, kinds: tuple[str, ...]) -> np.ndarray:
    return np.isin(bed.kind, kinds)


def _merit(beds: list[Bed], place: str, name: str, c: Candidate) -> float:
    """AUROC over the varying pixels of template prompts, mean of the seeds."""
    out = []
    for bed in beds:
        rows = _rows_of(bed, ("template",))
        used = bed.varying[rows]
        found = _values(bed, place, name, c)[rows][used].astype(np.float64)
        out.append(auroc(found, bed.mask[rows][used]).value)
    return float(np.mean(out))


def _summary(
    tuning: list[Bed], scoring: list[Bed], place: str, name: str, widths: tuple[float, ...]
) -> dict[str, Any]:
    """What a map is worth on seeds that chose nothing."""
    options = _candidates(tuning[0], place, name, widths)
    merits = {c: _merit(tuning, place, name, c) for c in options}
    best = max(merits, key=merits.__getitem__)

    def pooled(beds: list[Bed]) -> tuple[np.ndarray, ...]:
        rows = [_rows_of(bed, ("template",)) for bed in beds]
        each = [
            (_values(bed, place, name, best)[r], bed.mask[r], bed.varying[r])
            for bed, r in zip(beds, rows, strict=True)
        ]
        return tuple(np.concatenate(parts) for parts in zip(*each, strict=True))

    values, truth, varying = pooled(tuning)
    threshold = fit_threshold(values, truth, counted=varying)
    values, truth, varying = pooled(scoring)
    masks = values > threshold
    row: dict[str, Any] = {
        "method": name,
        "title": TITLES[name],
        "status": "ok",
        "place": place,
        "smoothed": len(widths) > 1 or widths[0] > 0,
        "needs_second_model": name in SECOND_MODEL,
        "chosen": {"at": best.at, "width": best.width}
        | ({"weaker_steps": best.steps} if name in SECOND_MODEL else {}),
        "merit": round(merits[best], 4),
        "threshold": rounded(threshold),
        "auroc_by_seed": [round(_merit([bed], place, name, best), 4) for bed in scoring],
        "auroc_by_sigma": [
            round(_merit(scoring, place, name, best._replace(at=f"{s:g}")), 4) for s in SIGMAS
        ],
        "iou_ceiling_all": round(mask_iou(truth & varying, truth), 4),
    }
    for what, counted in (("varying", varying), ("all", np.ones_like(varying))):
        ranking = map_ranking(values, truth, counted=counted)
        overlap = mask_overlap(masks, truth, counted=counted)
        found = ranking._asdict() | overlap._asdict()
        row[what] = {k: _short(v) for k, v in found.items() if isinstance(v, OverlapEstimate)}
    row["published"] = _published(scoring, place, name, best)
    return row


def _short(of: OverlapEstimate) -> dict[str, float]:
    return {key: round(value, 4) for key, value in of._asdict().items()}


def _published(beds: list[Bed], place: str, name: str, best: Candidate) -> dict[str, Any]:
    """The published protocol for the same map, unsmoothed, on its columns."""
    single = best.at.replace(".", "").isdigit()
    columns = {
        "template": ("template",),
        "template and general": ("template", "general"),
        "all": ("template", "memorized", "general"),
    }
    out = {}
    for column, kinds in columns.items():
        unit = float(best.at) ** -2 if single else 1.0
        rows = [_rows_of(bed, kinds) for bed in beds]
        values = np.concatenate(
            [
                unit * _values(bed, place, name, best._replace(width=0.0))[r]
                for bed, r in zip(beds, rows, strict=True)
            ]
        )
        truth = np.concatenate([bed.mask[r] for bed, r in zip(beds, rows, strict=True)])
        found = published_overlap(values, truth)
        out[column] = {
            "iou": round(found.iou, 4),
            "mean_iou": round(found.mean_iou, 4),
            "accuracy": round(found.accuracy, 4),
            "all_ones": round(mask_iou(np.ones_like(truth), truth), 4),
        }
    return out


def _targets(rows: list[dict[str, Any]]) -> list[Target]:
    """What the project has set itself, for the maps that the tuning seeds recommend."""
    out = []
    groups = (("best map", rows, 0.01), ("best without a second model", None, 0.03))
    for what, own, bound in groups:
        own = rows if own is not None else [r for r in rows if not r["needs_second_model"]]
        best = max(own, key=lambda row: row["merit"])
        named = f"{what}: {best['title']}, {PLACES[best['place']]}"
        missing = {m: round(1 - best["varying"][m]["value"], 4) for m in ("auroc", "iou")}
        out.append(Target(f"1 - AUROC on varying pixels, {named}", missing["auroc"], bound))
        out.append(Target(f"1 - IoU on varying pixels, {named}", missing["iou"], 0.15))
    return out


def _prompts(quick: bool, seed: int) -> Table:
    tuning, scoring = ([seed + n for n in s[: 1 if quick else None]] for s in (TUNING, SCORING))

    def compute():
        learn, score = ([_bed(one, quick) for one in seeds] for seeds in (tuning, scoring))
        rows = [
            _summary(learn, score, place, name, widths)
            for place in PLACES
            for name in TITLES
            for widths in ((0.0,), (0.0, *WIDTHS))
        ]
        return rows, _targets(rows)

    parameters = {"d": 64, "tuning_seeds": tuning, "scoring_seeds": scoring, "draws": DRAWS}
    return Table(compute, parameters | {"sigmas": SIGMAS, "varying": VARYING}, dtype="float32")


class Field(NamedTuple):
    """A centered Gaussian image: score -(C + sigma^2)^-1 x, with C = V diag(l) V^T."""

    variances: jax.Array
    vectors: jax.Array

    def __call__(self, x, sigma, condition=None):
        """The score at x."""
        rotated = self.vectors.T @ x.reshape(-1)
        return -(self.vectors @ (rotated / (self.variances + sigma**2))).reshape(x.shape)


class Planted(NamedTuple):
    """A block of pixels is pinned under any condition, and free without."""

    pinned: Field
    free: Field

    def __call__(self, x, sigma, condition=None):
        """The score at x."""
        return (self.free if condition is None else self.pinned)(x, sigma)


def planted(side: int, pinned: float) -> tuple[Planted, np.ndarray]:
    """A smooth field, a disc of which deviates ``pinned`` times as much as without condition."""
    place = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1)
    place = place.reshape(-1, 2).astype(float)
    squared = ((place[:, None] - place[None]) ** 2).sum(-1)
    covariance = np.exp(-squared / (2 * 1.5**2)) + 1e-2 * np.eye(side**2)
    mask = ((place - np.array([0.4, 0.55]) * side) ** 2).sum(-1) < (side / 4) ** 2
    scale = np.where(mask, pinned, 1.0)

    def field(matrix):
        return Field(*(jnp.asarray(part, jnp.float32) for part in np.linalg.eigh(matrix)))

    world = Planted(field(covariance * scale[:, None] * scale[None]), field(covariance))
    return world, mask.reshape(side, side)


def _fields(quick: bool, seed: int) -> Table:
    side, sigma, repeats = (12, 0.3, 2) if quick else (24, 0.3, 10)
    budgets = (16, 64) if quick else (16, 32, 64, 128, 256)

    def compute():
        world, mask = planted(side, 0.03)
        x = jnp.zeros((side, side, 1))

        @partial(jax.jit, static_argnames=("method", "num"))
        def run(world, key, method, num):
            given = {"key": key, "method": method, "num_products": num}
            return curvature_maps(world, x, sigma, jnp.int32(0), **given).curvature_over_null

        keys = [derive_key(seed, "fields", i) for i in range(repeats)]
        exact = np.asarray(run(world, keys[0], "exact", 1).summed)
        half = float(np.median(exact[mask])) / 2
        rows = [{"method": "exact", "status": "ok", "products": side**2}]
        rows[0] |= {"iou": mask_iou(exact[None] > half, mask[None])}
        for method in ("lattice", "hutchinson", "auto"):
            for num in budgets:
                found = [run(world, key, method, num) for key in keys]
                maps = np.stack([np.asarray(of.summed) for of in found])
                bars = np.stack([np.asarray(of.summed_standard_error) for of in found])
                error = np.sqrt(np.mean((maps - exact) ** 2))
                rows.append(
                    {
                        "method": method,
                        "status": "ok",
                        "products": num,
                        "relative_error": rounded(error / np.sqrt(np.mean(exact**2))),
                        "stated_over_error": rounded(np.sqrt(np.mean(bars**2)) / error),
                        "iou": rounded(
                            np.mean([mask_iou(m[None] > half, mask[None]) for m in maps])
                        ),
                    }
                )
        for pinned in (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.03):
            dose = np.asarray(run(planted(side, pinned)[0], keys[0], "exact", 1).summed)
            inside = rounded(dose[mask].mean())
            rows.append({"method": "dose", "status": "ok", "pinned": pinned, "inside": inside})
        at_64 = next(r for r in rows if r["method"] == "lattice" and r["products"] == 64)
        targets = [
            Target("1 - IoU of the exact map", 1 - rows[0]["iou"], 0.05),
            Target("1 - IoU of a lattice map of 64 products", 1 - at_64["iou"], 0.05),
        ]
        return rows, targets

    return Table(compute, {"side": side, "sigma": sigma, "repeats": repeats}, dtype="float32")


def cases() -> list[Case]:
    """Two tables."""
    return [Case("localization/prompts", _prompts), Case("localization/fields", _fields)]


def figure(records):
    """AUROC against noise; quality of what was chosen; error of estimates against products."""
    tables = {record["case"].split("/")[1]: record["rows"] for record in records}
    canvas, (left, middle, right) = panels(3, height=4.2)
    rows = [row for row in tables.get("prompts", []) if row["place"] == "noised"]
    raw = [row for row in rows if not row["smoothed"]]
    for i, row in enumerate(raw):
        left.plot(
            SIGMAS,
            row["auroc_by_sigma"],
            MARKERS[i] + "-",
            color=COLORS[i],
            markersize=3.5,
            linewidth=1,
            label=row["title"],
        )
    left.set(xscale="log", xlabel="noise level", ylim=(0.45, 1.01))
    left.set_title("AUROC of varying pixels, not smoothed", fontsize=8)
    left.legend(fontsize=6.5, frameon=False, loc="lower left")
    for j, row in enumerate(rows):
        color = COLORS[list(TITLES).index(row["method"])]
        for metric, marker in (("auroc", "o"), ("iou", "s")):
            of, y = row["varying"][metric], -j - (0.25 if metric == "iou" else 0)
            middle.plot([of["low"], of["high"]], [y, y], color=color, linewidth=1)
            fill = color if metric == "auroc" else "white"
            middle.plot(of["value"], y, marker, color=color, markerfacecolor=fill, markersize=4)
    if rows:
        middle.axvline(rows[0]["varying"]["iou"]["all_ones"], color="0.6", linestyle=":")
    middle.set_yticks([-j - 0.1 for j in range(len(rows))])
    middle.set_yticklabels(
        [row["title"] + (", smoothed" if row["smoothed"] else "") for row in rows], fontsize=6.5
    )
    middle.set_title("AUROC (filled), IoU (open); all pixels (dotted)", fontsize=8)
    for i, method in enumerate(("lattice", "hutchinson", "auto")):
        own = [row for row in tables.get("fields", []) if row["method"] == method]
        products, error = [r["products"] for r in own], [r["relative_error"] for r in own]
        right.plot(products, error, MARKERS[i] + "-", color=COLORS[i], label=method)
    if "fields" in tables:
        right.set(xscale="log", yscale="log", xlabel="products with each branch")
        right.set_xticks(products, [str(count) for count in products])
        right.minorticks_off()
    right.set_title("relative error, Gaussian world, d = 576", fontsize=8)
    right.legend(fontsize=7, frameon=False)
    for axis in (left, middle, right):
        axis.grid(color="0.92")
        axis.tick_params(labelsize=7)
    return canvas
