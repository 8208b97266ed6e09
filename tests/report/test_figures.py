"""Figures stay legible: no text over other text, none outside the canvas."""

import itertools
import json
from typing import Any, cast

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from memjax.report import _figures
from memjax.report._folder import read_audit
from memjax.report._images import THUMBNAIL_SIDE, png, thumbnail
from memjax.report._record import Record

VARIANTS = {
    "complete": {"calibration": ("duplication", "membership")},
    "large": {"rows": 30_000, "gallery": 5},
    "no truth": {"truth": None, "calibration": ("duplication", "membership")},
    "split only": {"truth": "split"},
    "ranking only": {"truth": None, "calibration": (), "samples": 0},
    "one detector": {"detectors": 1},
    "many detectors": {"detectors": 12},
    "ten rows": {"rows": 10, "failed": 1},
    "one row": {"rows": 1, "failed": 0},
    "external": {"rows": 200, "external": 80, "truth": None},
    "long names": {"text": lambda i: f"{i} " + "W" * 200},
}


def check_text(monkeypatch, draw_figure, *arguments):
    with matplotlib.rc_context(cast(Any, _figures._STYLE)):
        figure = draw_figure(*arguments)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # settles the layout
        boxes = []
        draw = Text.draw

        def recorded(text, renderer):
            if text.get_visible() and text.get_text().strip():
                boxes.append((text.get_text(), text.get_window_extent(renderer)))
            draw(text, renderer)

        monkeypatch.setattr(Text, "draw", recorded)
        canvas.draw()
    assert boxes
    for label, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= canvas.get_width_height()[0] + 1
        assert inside, label
        assert box.y1 <= canvas.get_width_height()[1] + 1, label
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        # One pixel of touching line height is no overlap.
        overlap = min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
        assert not overlap, (first, second)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, options in VARIANTS.items()
        for kind in ("ranking", "distribution", "metrics", "gallery")
        if kind != "metrics" or options.get("truth", "known")
    ],
)
def test_no_text_overlaps(write, tmp_path, monkeypatch, name, kind):
    audit = read_audit(write(tmp_path, **{"rows": 500, **VARIANTS[name]}))
    arguments = []
    if kind == "gallery":
        arguments = [
            [thumbnail(image) for image in audit.gallery.images],
            [None if np.isnan(s).any() else thumbnail(s) for s in audit.gallery.nearest],
        ]
    check_text(monkeypatch, getattr(_figures, f"draw_{kind}"), audit, *arguments)


def test_text_is_drawn_as_it_stands():
    assert _figures.drawable("a$x^2$b", 5.0) == "a$x^2$b"
    assert _figures.drawable("日本 é ß \x00", 5.0) == "?? é ß"


@pytest.mark.parametrize("text", ["W" * 500, "i" * 500, "short", ""])
def test_text_is_cut_to_its_room(text):
    lengths = [len(_figures.drawable(text, inches)) for inches in (0.01, 0.5, 1.0, 2.0, 4.0)]
    assert lengths == sorted(lengths)
    assert lengths[-1] == len(text) or _figures.drawable(text, 4.0).endswith("\u2026")


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("outlier", [1.0, 1e3, 1e9, -1e9])
@pytest.mark.parametrize("kind", ["ranking", "distribution"])
def test_scores_of_any_size(write, tmp_path, monkeypatch, scale, outlier, kind):
    audit = read_audit(write(tmp_path, rows=60))
    scores = audit.scores * scale
    scores[np.nanargmax(scores)] = outlier * scale
    stretched = audit.__class__(**{**vars(audit), "scores": scores})
    check_text(monkeypatch, getattr(_figures, f"draw_{kind}"), stretched)


def test_equal_scores(write, tmp_path):
    audit = read_audit(write(tmp_path, rows=60, truth=None))
    same = audit.__class__(**{**vars(audit), "scores": np.zeros_like(audit.scores)})
    for draw in (_figures.draw_ranking, _figures.draw_distribution):
        assert _figures.render(draw, same).startswith(b"\x89PNG")


def test_unresolvable_and_worse_than_chance(write, tmp_path):
    folder = write(tmp_path, rows=60)
    metrics = json.loads((folder / "metrics.json").read_text())
    contrast = metrics["contrasts"][0]
    contrast["auroc"] = {"value": 0.1, "low": 0.0, "high": 0.2}
    contrast["tpr_at_fpr"] = [{"fpr": 0.001, "resolvable": False}]
    metrics["contrasts"] = [contrast]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    audit = read_audit(folder)
    assert _figures.render(_figures.draw_metrics, audit).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rates", "shown"),
    [
        ({}, None),
        ({0.01: True, 0.05: True}, 0.01),
        ({0.001: True, 0.01: True}, 0.01),
        ({0.01: False, 0.05: True}, 0.05),
        ({0.01: False, 0.05: False}, 0.01),
        ({0.001: False}, 0.001),
    ],
)
def test_the_rate_that_is_drawn(rates, shown):
    entries = [{"fpr": fpr, "resolvable": resolvable} for fpr, resolvable in rates.items()]
    assert _figures.figure_rate([Record({"tpr_at_fpr": entries}, "test")]) == shown


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 3), (256, 128, 3), (1, 500, 1), (9, 7, 5)])
def test_thumbnails(shape):
    image = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    pixels = thumbnail(image)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == (3 if shape[2] == 3 else 1)
    assert max(pixels.shape[:2]) == min(THUMBNAIL_SIDE, max(shape[:2]))
    assert png(pixels).startswith(b"\x89PNG")


def test_pixels_outside_the_range():
    image = np.array([[[np.nan], [np.inf], [-np.inf], [5.0], [-1.0], [1.0]]], np.float32)
    assert thumbnail(image)[0, :, 0].tolist() == [128, 255, 0, 255, 0, 255]
