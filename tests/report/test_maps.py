"""Pictures of maps and of samples: true to their numbers, and legible."""

from typing import Any, cast

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from memjax.report import _figures
from memjax.report._images import thumbnail
from memjax.report._maps import MapRow, SampleRow, draw_maps, draw_samples


def make_row(seed=0, shape=(8, 8), truth=True, image=True, label="prompt 7", channels=1):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape).astype(np.float32)
    pixels = thumbnail(rng.uniform(-1, 1, (*shape, channels)).astype(np.float32))
    known = rng.uniform(size=shape) > 0.5
    return MapRow(label, pixels if image else None, values, values > 0.3, known if truth else None)


def drawn(draw, *arguments):
    with matplotlib.rc_context(cast(Any, _figures._STYLE)):
        figure = draw(*arguments)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return figure, canvas


def pictures(figure):
    """Arrays that are shown, with their color limits, line by line."""
    shown = [axes.images[0] for axes in figure.axes if axes.images]
    return [(np.ma.filled(image.get_array(), np.nan), image.get_clim()) for image in shown]


def test_what_is_drawn_is_what_is_given():
    rows = [make_row(0), make_row(1, truth=False)]
    rows[1].values[2, 3] = -7.5
    rows[0].values[0, 0] = np.nan
    figure, _ = drawn(draw_maps, rows, "unit")
    found = pictures(figure)
    assert len(found) == 8
    for line, row in enumerate(rows):
        image, values, mask, truth = found[4 * line : 4 * line + 4]
        assert row.image is not None
        np.testing.assert_array_equal(image[0], row.image[..., 0])
        np.testing.assert_array_equal(values[0], row.values)
        assert values[1] == (-7.5, 7.5)  # one scale for all, symmetric about zero
        np.testing.assert_array_equal(mask[0], row.mask)
        np.testing.assert_array_equal(truth[0], row.truth if line == 0 else np.zeros((8, 8)))
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert "not known" in texts
    assert {text.get_text() for text in figure.texts} >= {"image", "map", "mask", "truth"}
    assert figure.axes[-1].get_xlabel() == "unit"


def test_columns_that_no_row_has_are_left_out():
    figure, _ = drawn(draw_maps, [make_row(image=False, truth=False)], "unit")
    assert len(pictures(figure)) == 2
    assert not {"image", "truth"} & {text.get_text() for text in figure.texts}


def test_zero_is_white_and_the_ends_are_told_apart_without_color():
    colors = matplotlib.colormaps["RdBu_r"]
    low, zero, high = (np.array(colors(place)[:3]) for place in (0.15, 0.5, 0.85))
    assert zero.min() > 0.95
    # Simulated deuteranopia and protanopia (Vienot, Brettel, Mollon 1999): still far apart.
    for matrix in (
        [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
        [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    ):
        seen = [np.clip(np.array(matrix) @ color, 0, 1) for color in (low, high)]
        assert np.abs(seen[0] - seen[1]).max() > 0.3


@pytest.mark.parametrize(
    "rows",
    [
        [make_row()],
        [make_row(i) for i in range(8)],
        [make_row(shape=(4, 16), channels=3)],
        [make_row(shape=(30, 10)), make_row(shape=(30, 10), truth=False)],
        [make_row(label="W" * 300 + "\n$x^2$ \x1b[31m")],
        [make_row()._replace(values=np.zeros((8, 8)))],
        [make_row()._replace(values=np.full((8, 8), np.nan))],
        [make_row()._replace(values=1e30 * np.eye(8)), make_row()],
    ],
    ids=["one", "page", "wide", "tall", "long name", "zero", "nan", "huge"],
)
def test_nothing_leaves_the_canvas_or_overlaps(rows):
    figure, canvas = drawn(draw_maps, rows, "share of a pixel's variance that is gone " * 3)
    width, height = canvas.get_width_height()
    renderer = canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    boxes += [axes.get_window_extent(renderer) for axes in figure.axes]
    bar = figure.axes[-1]
    labels = [bar.xaxis.label, *bar.get_xticklabels()]
    boxes += [text.get_window_extent(renderer) for text in labels]
    for box in boxes:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert not (across > 1 and down > 1)
    assert _figures.render(draw_maps, rows, "unit") == _figures.render(draw_maps, rows, "unit")


def test_samples_before_and_after():
    rng = np.random.default_rng(0)
    tiles = [thumbnail(rng.uniform(-1, 1, (8, 8, 1)).astype(np.float32)) for _ in range(8)]
    row = SampleRow("prompt 3", tiles[:4], tiles[4:], ([True, False] * 2, [False] * 4))
    figure, _ = drawn(draw_samples, [row, row], "a copy")
    found = pictures(figure)
    assert len(found) == 16
    for k in range(8):
        np.testing.assert_array_equal(found[k][0], tiles[k][..., 0])
    widths = [axes.spines["top"].get_linewidth() for axes in figure.axes]
    assert [width > 1 for width in widths] == 2 * ([True, False] * 2 + [False] * 4)
    assert "framed: a copy" in {text.get_text() for text in figure.texts}
    plain = row._replace(marked=([False] * 4, [False] * 4))
    figure, _ = drawn(draw_samples, [plain], "a copy")
    assert not any("framed" in text.get_text() for text in figure.texts)
    many = SampleRow("W" * 99, tiles, tiles, ([False] * 8, [False] * 8))
    figure, canvas = drawn(draw_samples, [many], "a copy")
    assert len(pictures(figure)) == 12
    width = canvas.get_width_height()[0]
    assert all(axes.get_window_extent(canvas.get_renderer()).x1 <= width for axes in figure.axes)
