"""A synthetic audit folder: what auditing writes, without an audit."""

import json
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

DETECTORS = [
    ("flipd", "FLIPD local dimension", "higher = fewer free directions at the image."),
    ("denoising_loss", "Denoising loss", "How badly the model denoises the image: less badly if "
     "trained on. Higher = smaller loss."),
    ("score_norm", "Score norm", "Higher = the score vanishes at the clean image."),
    ("effective_dimension", "Effective dimension", "Higher = more variance is pinned."),
]  # fmt: skip


def write_audit(
    folder,
    *,
    rows=1797,
    size=8,
    channels=1,
    detectors=4,
    truth="multiplicity",
    calibration=("duplication",),
    samples=4096,
    failed=3,
    gallery=40,
    state="completed",
    external=0,
    text=None,
    seed=0,
):
    """Write manifest, table, metrics and gallery.

    ``text(i)`` replaces every free string; the last ``external`` rows are calibration images from
    elsewhere, which are scored but neither ranked nor tested.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    say = (lambda default, i=0: default) if text is None else (lambda default, i=0: text(i))

    # Truth, roughly the graded bed's proportions at any size.
    multiplicity = rng.choice([0, 1, 2, 4, 8, 16, 32], rows, p=[0.443, 0.512, *[0.009] * 5]).astype(
        np.int64
    )
    failing = np.zeros(rows, bool)
    failing[rng.permutation(rows - external)[: min(failed, rows - 1)]] = True
    status = np.where(failing, "input_corrupt", "ok")
    elsewhere = np.arange(rows) >= rows - external
    multiplicity[elsewhere] = 1
    level = np.log2(np.maximum(multiplicity, 0.5)) + 1.0

    specs = [
        DETECTORS[i]
        if i < len(DETECTORS)
        else (f"detector_{i}@0.{i}", f"Detector {i}", "Higher = more.")
        for i in range(detectors)
    ]
    columns: dict = {
        "row": pa.array(np.arange(rows)),
        "id": pa.array([say(f"digit-{i:04d}", i) for i in range(rows)]),
        "sha256": pa.array([f"{i:064x}" for i in range(rows)]),
        "source": pa.array(np.where(elsewhere, "calibration", "data")),
        "status": pa.array(status),
        "reason": pa.array([say("", i) for i in range(rows)]),
    }
    scores = {}
    for j, (name, _, _) in enumerate(specs):
        value = 4.0 * level + (2.5 + j) * rng.normal(size=rows) - 60.0 + 30.0 * j
        value[failing] = np.nan
        scores[name] = value

    def rank(value):
        out = np.full(rows, -1)
        value = np.where(elsewhere, np.nan, value)
        order = np.argsort(-value, kind="stable")
        order = order[np.isfinite(value[order])]
        out[order] = np.arange(1, len(order) + 1)
        return out

    ranks = {name: rank(value) for name, value in scores.items()}
    primary = specs[0][0]
    columns["rank"] = pa.array(ranks[primary], mask=failing | elsewhere)
    for name, value in scores.items():
        columns[name] = pa.array(value, from_pandas=True)
        columns[f"{name}_raw"] = pa.array(-value, from_pandas=True)
        columns[f"{name}_status"] = pa.array(status)
        columns[f"{name}_rank"] = pa.array(ranks[name], mask=failing | elsewhere)
    flags = []
    for meaning in calibration:
        null = multiplicity == (1 if meaning == "duplication" else 0)
        calibrates = null & (rng.random(rows) < 0.5) & ~failing
        calibrates = elsewhere if external else calibrates
        tested = ~calibrates & ~failing & (null | (multiplicity > (meaning == "duplication")))
        role = np.where(calibrates, "calibration", np.where(tested, "tested", ""))
        columns[f"role_{meaning}"] = pa.array(role, mask=role == "")
        for name, value in scores.items():
            reference = np.sort(value[calibrates])
            above = len(reference) - np.searchsorted(reference, value, side="left")
            p = (1.0 + above) / (1.0 + len(reference))
            ordered = np.sort(p[tested])
            steps = 0.1 * np.arange(1, len(ordered) + 1) / max(1, len(ordered))
            passing = np.flatnonzero(ordered <= steps)
            threshold = ordered[passing[-1]] if len(passing) else -1.0
            flag = tested & (p <= threshold)
            columns[f"p_{meaning}_{name}"] = pa.array(p, mask=~tested)
            columns[f"flag_{meaning}_{name}"] = pa.array(flag, mask=~tested)
            flags.append(
                {
                    "meaning": meaning,
                    "detector": name,
                    "tested": int(tested.sum()),
                    "flagged": int(flag.sum()),
                    "true": int((flag & ~null).sum()) if truth else None,
                    "false": int((flag & null).sum()) if truth else None,
                    "fdr": 0.1,
                    "resolvable": True,
                }
            )
    copies = np.where(multiplicity >= 8, rng.poisson(np.maximum(multiplicity, 0) * 0.25), 0)
    if samples:
        # Where the truth is known, copies are looked for among the training images.
        sought = ~failing & ~elsewhere & ((multiplicity > 0) | (truth is None))
        columns["stored"] = pa.array(copies > 0, mask=~sought)
        columns["copies"] = pa.array(copies, mask=~sought)
        columns["nearest_sample_distance"] = pa.array(
            np.where(copies > 0, 0.3, 2.0) + 0.1 * rng.random(rows), mask=failing
        )
    else:
        columns["stored"] = pa.array([None] * rows, pa.bool_())
    if truth:
        split = np.where(multiplicity > 0, "train", "heldout")
        columns["split"] = pa.array(split, mask=elsewhere)
        if truth == "multiplicity":
            columns["multiplicity"] = pa.array(multiplicity, mask=elsewhere)
            columns["extracted"] = pa.array(copies > 0, mask=elsewhere)
    pq.write_table(pa.table(columns), folder / "table.parquet")

    def interval(value, width=0.03):
        value = float(np.clip(value, 0.0, 1.0))
        return {"value": value, "low": max(0.0, value - width), "high": min(1.0, value + width)}

    contrasts = []
    if truth:
        pairs = [("repeated 4 times or more", "seen once"), ("seen once", "never seen")]
        pairs += [(f"repeated {m} times", "seen once") for m in (2, 4, 8, 16, 32)]
        for c, (positives, negatives) in enumerate(pairs):
            for j, (name, _, _) in enumerate(specs):
                auroc = [0.99, 0.7, 0.6, 0.97, 0.99, 0.998, 1.0][c] - 0.03 * j
                contrasts.append(
                    {
                        "detector": name,
                        "positives": say(positives, c),
                        "negatives": say(negatives, c + 50),
                        "n_positive": 64,
                        "n_negative": 920,
                        "auroc": interval(auroc),
                        "average_precision": interval(auroc - 0.1, 0.06),
                        "tpr_at_fpr": [
                            {"fpr": 0.01, "resolvable": True, **interval(auroc - 0.2, 0.1)},
                            {
                                "fpr": 0.001,
                                "resolvable": False,
                                "value": None,
                                "low": None,
                                "high": None,
                            },
                        ],
                    }
                )
    stored = None
    if samples:
        by = None
        if truth == "multiplicity":
            by = {
                str(m): [
                    int(((multiplicity == m) & (copies > 0)).sum()),
                    int((multiplicity == m).sum()),
                ]
                for m in (1, 2, 4, 8, 16, 32)
            }
        stored = {"rows": int(((copies > 0) & ~failing).sum()), "by_multiplicity": by}
        stored["images"] = stored["rows"]
    metrics = {
        "truth": say("how often each row stands in the training set") if truth else None,
        "contrasts": contrasts,
        "flags": flags,
        "stored": stored,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))

    labels, counts = np.unique(status, return_counts=True)
    manifest = {
        "memjax": "0.1.0",
        "created": "2025-01-02T03:04:05+00:00",
        "state": state,
        "command": say("memjax audit digits"),
        "versions": {"python": "3.11.9", "jax": "0.10.1", "jaxlib": "0.10.1", "numpy": "2.2.0"},
        "devices": [say("TFRT_CPU_0")],
        "seed": seed,
        "model": {
            "name": say("residual MLP on graded digits", 1),
            "path": say("graded-digits", 2),
            "sha256": "ab" * 32,
            "event_shape": [size, size, channels],
            "data_std": 0.75,
            "sigma_min": 0.01,
            "sigma_max": 20.0,
            "parameters": 812345,
        },
        "data": {
            "name": say("handwritten digits", 3),
            "rows": rows,
            "sha256": "cd" * 32,
            "status_counts": dict(zip(labels.tolist(), counts.tolist(), strict=True)),
        },
        "detectors": [
            {
                "name": name,
                "title": say(title, 4 + j),
                "column": name,
                "sigma": 0.05,
                "sigma_over_data_std": 0.0667,
                "statement": say(statement, 20 + j),
                "cost": {"forward": 1, "jvp": 64, "vjp": 0},
                "raw": say("dimensions", 40 + j),
            }
            for j, (name, title, statement) in enumerate(specs)
        ],
        "primary": primary,
        "calibrations": [
            {
                "meaning": meaning,
                "count": 460,
                "fdr": 0.1,
                "description": say(
                    "training images known to occur once"
                    if meaning == "duplication"
                    else "images the model was not trained on",
                    30,
                ),
            }
            for meaning in calibration
        ],
        "samples": (
            {"count": samples, "rule": say("d1/d2 < 1/3", 31), "copies": int(copies.sum())}
            if samples
            else None
        ),
        "backend": {"ok": True, "message": say("all products agree with NumPy", 32)},
        "seconds": {"sampling": 20.5, "scores": 13.0},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))

    order = np.where(failing | elsewhere, rows + 1, ranks[primary])
    top = np.argsort(order)[: min(gallery, rows - failed - external)]
    digits = load_digits(return_X_y=True)[0].reshape(-1, 8, 8).astype(np.float32) / 8 - 1
    images = digits[top % len(digits)][..., None]
    scale = max(1, size // 8)
    images = np.repeat(np.repeat(images, scale, 1), scale, 2)[:, :size, :size]
    if channels == 2:
        images = np.concatenate([images, -images], -1)
    if channels == 3:
        tint = np.linspace(-1, 1, size, dtype=np.float32)[None, :, None, None]
        images = np.concatenate([images, np.clip(images + tint, -1, 1), 0.5 * images], -1)
    noise = rng.normal(size=images.shape).astype(np.float32)
    amount = np.where(copies[top] > 0, 0.05, 0.5).astype(np.float32)[:, None, None, None]
    nearest = np.clip(images + amount * noise, -1, 1)
    distance = np.sqrt(np.sum((nearest - images) ** 2, (1, 2, 3)))
    if not samples:
        nearest, distance = np.full_like(images, np.nan), np.full(len(top), np.nan)
    np.savez(
        folder / "gallery.npz",
        rows=top,
        images=images,
        nearest_samples=nearest,
        nearest_distance=distance,
    )
    return folder


VARIANTS = types.MappingProxyType(
    {
        "complete": {"calibration": ("duplication", "membership")},
        "no truth": {"truth": None, "calibration": ("membership",)},
        "split only": {"truth": "split"},
        "no calibration": {"calibration": ()},
        "no samples": {"samples": 0},
        "ranking only": {"truth": None, "calibration": (), "samples": 0, "failed": 0},
        "failed rows": {"rows": 400, "failed": 300},
        "incomplete": {"state": "incomplete"},
        "one detector": {"detectors": 1},
        "many detectors": {"detectors": 12},
        "ten rows": {"rows": 10, "failed": 1},
        "RGB 64": {"rows": 200, "size": 64, "channels": 3},
        "RGB 256": {"rows": 60, "size": 256, "channels": 3},
        "gray 32": {"rows": 200, "size": 32},
        "two channels": {"rows": 100, "channels": 2, "size": 8},
    }
)


@pytest.fixture
def write():
    """The function that writes a synthetic audit folder."""
    return write_audit
