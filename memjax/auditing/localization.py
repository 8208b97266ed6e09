"""Which pixels are stored: maps of many images or prompts, a threshold from others, and masks."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PyTree

from memjax._core.chunked import chunked_map
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.auditing.rows import Progress
from memjax.diffusion.model import Model
from memjax.evaluate.overlap import MapRanking, MaskOverlap, map_ranking, mask_overlap
from memjax.localize.maps import PixelMap, over_others
from memjax.localize.masks import fit_threshold, smooth
from memjax.localize.scan import Scan, scan_images, scan_levels, scan_samples
from memjax.training.testbeds import prompts_testbed

LEVELS = (0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.5)
"""Noise levels in standard deviations of the data, unless told otherwise."""
UNITS = {
    "curvature": "share of a pixel's variance that is gone",
    "curvature_over_null": "share of a pixel's variance that the condition takes",
    "curvature_over_baseline": "share of a pixel's variance lost since the baseline",
    "curvature_over_others": "share of a pixel's variance lost here, not elsewhere",
    "score_over_null": "sigma^2 (score - score without condition)^2",
    "score_over_baseline": "sigma^2 (score - score of the baseline)^2",
}
"""Every map, and what its mean over noise levels is."""
UNCALIBRATED = dict.fromkeys(UNITS, 0.1) | {"curvature": 0.5, "curvature_over_others": 0.0}
"""Thresholds by convention: nothing is known of their error rates."""
SMOOTH = 0.65
WEAKER_STEPS = 1000
"""Of the test bed's baseline, whose model takes 8,000."""


class Rows(NamedTuple):
    """What is looked at.

    Attributes:
        ids: a name for each of n rows.
        conditions: pytree with a leading axis of n, or ``None``.
        images: r images for each row in the space of the score, at which, with noise, maps are
            made; ``None`` for the trajectories of the sampler.
        status: `Status` of each row as it was read.
        reasons: in words.
        masks: which pixels are stored, where that is known.
        counted: the pixels that count in judging; ``None`` for all.
        kinds: a word for each row where rows are of different kinds.
    """

    ids: tuple[str, ...]
    conditions: PyTree
    images: Float[np.ndarray, "n r ..."] | None
    status: Int[np.ndarray, "n"]
    reasons: tuple[str, ...]
    masks: Bool[np.ndarray, "n h w"] | None = None
    counted: Bool[np.ndarray, "h w"] | None = None
    kinds: tuple[str, ...] | None = None

    def shown_to(self, masks: np.ndarray) -> Bool[np.ndarray, "n h w"]:
        """The pixels that count, for every one of these masks."""
        counted = True if self.counted is None else self.counted
        return np.broadcast_to(counted, masks.shape)


class Localized(NamedTuple):
    """Maps and masks of n rows at l noise levels.

    Attributes:
        sigmas: the levels.
        maps: by name, `PixelMap` with leading axes [n, l].
        scans: by name of a difference of curvatures, `Scan` of each row; empty for one level.
        means: by name [n, h, w]: the mean over channels and over the logarithm of the level.
        mean_errors: standard errors of these, upper bounds.
        thresholds: by name, above which a pixel is called stored.
        calibrated: whether they come from known masks.
        masks: by name [n, h, w], from the smoothed means.
        status: of each row.
        cost: network products of all rows.
    """

    sigmas: Float[np.ndarray, " l"]
    maps: dict[str, PixelMap]
    scans: dict[str, Scan]
    means: dict[str, Float[np.ndarray, "n h w"]]
    mean_errors: dict[str, Float[np.ndarray, "n h w"]]
    thresholds: dict[str, float]
    calibrated: bool
    masks: dict[str, Bool[np.ndarray, "n h w"]]
    status: Int[np.ndarray, "n"]
    cost: Cost


def localize(
    model: Model,
    rows: Rows,
    *,
    baseline: Model | None = None,
    calibration: Rows | None = None,
    threshold: float | None = None,
    levels: Sequence[float] | None = None,
    smoothing: float = SMOOTH,
    num_draws: int = 8,
    num_products: int = 64,
    guidance: float = 1.0,
    chunk_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Localized:
    """Make every map of every row, and masks from their means over noise levels.

    Args:
        model: unguided.
        rows: what is looked at.
        baseline: a weaker model under the same conditions.
        calibration: other rows, with known masks: the threshold of every map is the one with the
            largest intersection over union there.
        threshold: of all maps, instead.
        levels: noise levels in standard deviations of the data; ``None`` for those of ``LEVELS``
            that the model has.
        smoothing: of the means, in pixels, before they meet a threshold.
        num_draws: noises or trajectories that maps are averaged over.
        num_products: probes for samples of more than 4,096 numbers.
        guidance: of the sampler, on whose trajectories maps are made.
        chunk_size: products evaluated together; ``None`` to choose by the sample's size.
        seed: of every draw.
        progress: called with (stage, done, total).

    Returns:
        `Localized`, of ``rows`` alone. ``"curvature_over_others"`` compares with the rows of the
        calibration too.

    Raises:
        InputError: a level that the model does not have, or models that do not fit.
    """
    if len(model.event_shape) not in (2, 3):
        raise InputError(f"model: expected one of images, found samples of {model.event_shape}")
    check_baseline(model, baseline)
    sigmas = noise_levels(model, levels)
    n = len(rows.ids)
    together = rows if calibration is None else _append(rows, calibration)
    size = int(np.prod(model.event_shape))
    options = {
        "num_draws": num_draws,
        "num_products": num_products,
        "chunk_size": chunk_size or int(np.clip(2**18 // size, 1, 64)),
    }
    maps, status, cost = _scan(
        model, baseline, together, sigmas, options, guidance, max(1, min(8, 512 // size)), seed,
        progress or (lambda stage, done, total: None),
    )  # fmt: skip
    if "curvature_over_others" in (names := available_maps(rows, baseline, calibration)):
        maps["curvature_over_others"] = jax.tree.map(
            np.asarray, jax.jit(over_others)(jax.tree.map(jnp.asarray, maps["curvature"]))
        )
    maps = {name: maps[name] for name in names}
    weights = _level_weights(sigmas)
    channels = model.event_shape[2] if len(model.event_shape) == 3 else 1

    def mean(entries: Any) -> np.ndarray:
        return np.tensordot(np.asarray(entries), weights, (1, 0)) / channels

    means = {name: mean(of.summed) for name, of in maps.items()}
    blurred = {name: smooth(of, smoothing) for name, of in means.items()}
    if threshold is not None:
        thresholds = dict.fromkeys(maps, threshold)
    elif calibration is not None:
        thresholds = {name: _fit(of[n:], calibration) for name, of in blurred.items()}
    else:
        thresholds = {name: UNCALIBRATED[name] for name in maps}
    return Localized(
        sigmas=sigmas,
        maps={name: PixelMap(*(part[:n] for part in of)) for name, of in maps.items()},
        scans=_scans(maps, sigmas, n),
        means={name: of[:n] for name, of in means.items()},
        mean_errors={name: mean(of.summed_standard_error)[:n] for name, of in maps.items()},
        thresholds=thresholds,
        calibrated=calibration is not None,
        masks={name: of[:n] > thresholds[name] for name, of in blurred.items()},
        status=np.where(rows.status != 0, rows.status, status[:n]),
        cost=cost,
    )


def noise_levels(model: Model, levels: Sequence[float] | None) -> Float[np.ndarray, " l"]:
    """Noise levels in the units of the score, ascending.

    Args:
        model: the model.
        levels: in standard deviations of its data, or ``None``.

    Raises:
        InputError: one is not positive, stands twice, or lies outside the model's range.
    """
    low, high = (sigma / model.data_std for sigma in (model.sigma_min, model.sigma_max))
    if levels is None:
        return np.unique(np.clip(LEVELS, low, high)) * model.data_std
    found = np.unique(np.asarray(levels, np.float64))
    if len(found) < len(levels) or not len(found) or not low <= found[0] <= found[-1] <= high:
        raise InputError(
            f"levels: expected different ones from {low:.3g} to {high:.3g} standard deviations of "
            f"the data, got {', '.join(f'{level:g}' for level in levels)}"
        )
    return found * model.data_std


def check_baseline(model: Model, baseline: Model | None) -> None:
    """Refuse a baseline that takes other samples or conditions than the model."""
    if baseline is None:
        return
    if baseline.event_shape != model.event_shape:
        shapes = ["x".join(map(str, m.event_shape)) for m in (model, baseline)]
        raise InputError(
            f"baseline: expected a model of samples of shape {shapes[0]}, got {shapes[1]}"
        )
    takes, wanted = (jax.tree.structure(m.null_condition) for m in (baseline, model))
    if takes != wanted:
        raise InputError("baseline: expected a model that takes conditions like the other one's")


def encode_images(model: Model, images: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
    """Images in the space of the score."""
    encode = jax.jit(lambda m, rows: chunked_map(m.encode, rows, chunk_size=16))
    return np.asarray(encode(model, jnp.asarray(images)))


def available_maps(
    rows: Rows, baseline: Model | None = None, calibration: Rows | None = None
) -> tuple[str, ...]:
    """Names of the maps that ``localize`` makes of these arguments."""
    known = {
        "null": rows.conditions is not None,
        "baseline": baseline is not None,
        "others": len(rows.ids) > 1 or calibration is not None,
    }
    return tuple(name for name in UNITS if known.get(name.rpartition("_over_")[2], True))


def best_map(names: Sequence[str]) -> str:
    """The map that masks are made of unless told otherwise: the most direct comparison."""
    order = ("curvature_over_baseline", "curvature_over_null", "curvature_over_others", "curvature")
    return next(name for name in order if name in names)


class Quality(NamedTuple):
    """What one map is worth on rows whose masks are known."""

    ranking: MapRanking
    overlap: MaskOverlap


def judge(
    found: Localized, rows: Rows, among: Bool[np.ndarray, "n"], *, smoothing: float = SMOOTH
) -> dict[str, dict[str, Quality]]:
    """Compare every map and mask with the truth.

    Args:
        found: of ``rows``.
        rows: with known masks.
        among: the rows that count.
        smoothing: as for ``localize``.

    Returns:
        By name of the map, on the pixels that count (``"counted"``) and on all (``"all"``).
    """
    assert rows.masks is not None
    truth = rows.masks[among]
    out: dict[str, dict[str, Quality]] = {}
    for name, means in found.means.items():
        values, masks = smooth(means[among], smoothing), found.masks[name][among]
        out[name] = {
            which: Quality(
                map_ranking(values, truth, counted=counted),
                mask_overlap(masks, truth, counted=counted),
            )
            for which, counted in (
                ("counted", np.array(rows.shown_to(truth))),
                ("all", np.ones_like(truth)),
            )
        }
    return out


def digits_rows(seed: int, progress: Progress) -> dict[str, Any]:
    """Arguments of ``localize`` for the conditional test bed, training its models at first use.

    Every second template prompt calibrates; the others, and the prompts that store everything or
    nothing, are looked at.

    Args:
        seed: of the test bed and the training.
        progress: called while models train.

    Returns:
        Keyword arguments: model, baseline, rows, calibration; and ``pictures``, an image of each
        row's prompt.
    """
    found = prompts_testbed(seed, num_samples=70, progress=progress)
    weaker = prompts_testbed(seed, steps=WEAKER_STEPS, num_samples=70, progress=progress).model
    bed = found.bed
    kinds = np.array(bed.kind)
    words = [kind.replace("memorized", "stored") for kind in bed.kind]
    templates = np.flatnonzero(kinds == "template")
    shown = np.flatnonzero(np.isin(kinds, ("memorized", "general")))
    shown = np.concatenate([templates[1::2], shown])
    varying = bed.images[..., 0].std(0) > 0.05

    def rows(prompts: np.ndarray) -> Rows:
        return Rows(
            tuple(f"{p:02d} {words[p]}" for p in prompts),
            prompts.astype(np.int32),
            None,
            np.zeros(len(prompts), np.int32),
            ("",) * len(prompts),
            bed.mask[prompts, ..., 0],
            varying,
            tuple(map(str, kinds[prompts])),
        )

    return {
        "model": found.model,
        "baseline": weaker,
        "rows": rows(shown),
        "calibration": rows(templates[::2]),
        "pictures": bed.images[shown * (len(bed.images) // len(kinds))],
    }


def _append(first: Rows, second: Rows) -> Rows:
    if (first.images is None) != (second.images is None):
        raise InputError("calibration: expected images as for the rows that are looked at")
    conditions = (first.conditions, second.conditions)
    if jax.tree.structure(conditions[0]) != jax.tree.structure(conditions[1]):
        raise InputError(
            "calibration: expected conditions where the rows have some, and none where they have "
            "none"
        )
    images = None
    if first.images is not None and second.images is not None:
        images = np.concatenate([first.images, second.images])
    return Rows(
        first.ids + second.ids,
        jax.tree.map(lambda *leaves: np.concatenate(list(map(np.asarray, leaves))), *conditions),
        images,
        np.concatenate([first.status, second.status]),
        first.reasons + second.reasons,
    )


def _scan(
    model: Model,
    baseline: Model | None,
    rows: Rows,
    sigmas: np.ndarray,
    options: dict[str, Any],
    guidance: float,
    chunk: int,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, PixelMap], np.ndarray, Cost]:
    """All maps of all rows, some rows at a time; a row's depend on no other row."""
    n = len(rows.ids)
    key = derive_key(seed, "localize")
    parts = []
    for start in range(0, n, chunk):
        present = np.minimum(np.arange(start, start + chunk), n - 1)
        conditions = jax.tree.map(lambda a, at=present: jnp.asarray(a)[at], rows.conditions)
        given = {"key": key, "baseline": baseline, "row_chunk": None, **options}
        if rows.images is None:
            found = scan_samples(model, sigmas, conditions, weight=guidance, **given)
        else:
            images = jnp.asarray(rows.images[present])
            levels = jnp.asarray(sigmas, images.dtype)
            found = scan_images(model, images, levels, conditions, **given)
        real = present[-1] - start + 1
        parts.append(jax.tree.map(lambda leaf, real=real: np.asarray(leaf)[:real], found))
        progress("maps", min(start + chunk, n), n)
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    maps = {name: getattr(whole, name) for name in UNITS if getattr(whole, name, None) is not None}
    return maps, whole.status.max(1), Cost(*(int(count.sum()) for count in whole.cost))


def _scans(maps: dict[str, PixelMap], sigmas: np.ndarray, n: int) -> dict[str, Scan]:
    """What differences of curvature say over all levels together."""
    if len(sigmas) < 2:
        return {}
    run = jax.jit(lambda d, c, s: jax.vmap(partial(scan_levels, s))(d, c))
    out = {}
    for name in maps:
        if name.startswith("curvature_over"):
            pair = (
                PixelMap(*(jnp.asarray(part[:n]) for part in maps[k])) for k in (name, "curvature")
            )
            out[name] = jax.tree.map(np.asarray, run(*pair, jnp.asarray(sigmas, jnp.float32)))
    return out


def _level_weights(sigmas: np.ndarray) -> np.ndarray:
    """Of the mean over log sigma (trapezoids)."""
    if len(sigmas) < 2:
        return np.ones(1)
    steps = np.diff(np.log(sigmas))
    weights = np.append(steps, 0) + np.insert(steps, 0, 0)
    return weights / weights.sum()


def _fit(values: np.ndarray, calibration: Rows) -> float:
    assert calibration.masks is not None
    if values.shape != calibration.masks.shape:
        raise InputError(
            f"calibration: expected masks of shape {list(values.shape)}, found "
            f"{list(calibration.masks.shape)}"
        )
    counted = np.array(calibration.shown_to(calibration.masks))
    return fit_threshold(values, calibration.masks, counted=counted)
